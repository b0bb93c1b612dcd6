"""The real thing on loopback: `transformers serve` with a tiny text model answers as the same model does in process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from recipes.tiny_policy.reasoner import train

from appo.cli.main import main

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

SERVE = "from transformers.cli.transformers import main; main()"


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned to answer with words, if not with the right ones."""
    return train(tmp_path_factory.mktemp("reasoner"), stages=(15,))[0]


@pytest.fixture(scope="module")
def server(reasoner: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    words = ["serve", str(reasoner), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-c", SERVE, *words], stdout=out, stderr=out, env=environment)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1200):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
    raise AssertionError(f"the server did not come up: {log.read_text()}")


def test_a_served_model_answers_as_it_does_in_process(
    reasoner: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-never-to-be-written-down")
    served = f"served=openai:{reasoner}@{server}"
    words = ["study", "--output", str(tmp_path / "study"), "--limit", "24", "--max-answer", "8"]
    words += ["--perceiver", "truth@0.5", "--perceiver", "truth", "--reasoner", f"here={reasoner}"]
    assert main([*words, "--reasoner", served, "--price", "served=1,2", "--timeout", "100"]) == 0

    def answers(perceiver: str, name: str) -> list[dict[str, object]]:
        file = tmp_path / "study" / "answers" / f"{perceiver}__{name}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    for perceiver in ("truth@0.5", "truth"):
        here, there = answers(perceiver, "here"), answers(perceiver, "served")
        assert [line["text"] for line in here] == [line["text"] for line in there]
        assert [line["tokens"] for line in here] == [line["tokens"] for line in there], "the server counts as we do"
        assert len({line["text"] for line in here}) > 1, "all answers are alike, which proves nothing"
        assert len(here) == 24
    summary = json.loads((tmp_path / "study" / "summary.json").read_text())
    unique = {(line["key"], *line["tokens"]) for p in ("truth@0.5", "truth") for line in answers(p, "served")}
    assert summary["costs"]["served"]["dollars"] == pytest.approx(sum(r + 2 * w for _, r, w in unique) / 1e6)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"sk-never" in path.read_bytes() for path in files)
