"""Cut a run of the demo down to what the page's tests need: `python tests/reports/recorded_run/cut.py RUN`.

Kept: the most telling question at every second step it was filmed at, one that was lost, two training groups; the
metrics of every step; accuracies without the predictions behind them. Numbers lose digits, nothing else is changed but
for the names of folders.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from appo.report import page_data

from appo.reports.run_folder import load_run

HERE = Path(__file__).parent
METRICS = ("step", "resampling/", "reward", "rewards/", "entropy", "grad_norm", "appo/", "time/", "completions/mean")


def cut(source: Path) -> None:
    """Write the folder's files anew."""
    groups = page_data([load_run(source)])["groups"]
    lines = (source / "rollouts.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(groups) == len(records), "a run with fewer groups than a page has room for"
    best = max(groups, key=lambda group: group["interest"])["key"]
    filmed = list({group["step"]: i for i, group in enumerate(groups) if group["key"] == best}.values())
    others = [i for i, group in enumerate(groups) if len(group["steps"]) == 1 and 0 < group["right"] < group["judged"]]
    kept = sorted({*filmed[::2], filmed[-1], *others[:2], len(records) - 1})
    (HERE / "rollouts.jsonl").write_text("".join(_line(_without_folders(records[i])) for i in kept))
    shutil.rmtree(HERE / "frames", ignore_errors=True)
    (HERE / "frames").mkdir()
    for name in {records[i]["film"] for i in kept}:
        shutil.copy(source / "frames" / name, HERE / "frames" / name)
    metrics = [json.loads(line) for line in (source / "metrics.jsonl").read_text().splitlines()]
    chosen = [{key: line[key] for key in line if key.startswith(METRICS)} for line in metrics]
    (HERE / "metrics.jsonl").write_text("".join(map(_line, chosen)))
    evaluation = json.loads((source / "evaluation.json").read_text())
    for levels in evaluation.values():
        for summary in levels.values():
            del summary["predictions"]
    (HERE / "evaluation.json").write_text(_line(evaluation))
    config = json.loads((source / "config.json").read_text())
    settings = {name: value for name, value in config["config"]["training"].items() if value not in (None, "", {}, [])}
    config |= {"argv": ["appo", "demo"], "platform": "Linux", "git_commit": None}
    config["config"] = {"demo": {}, "training": {**settings, "output_dir": "runs/demo", "logging_dir": "runs/demo"}}
    (HERE / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _without_folders(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "video": Path(record["video"]).name}


def _line(data: Any) -> str:
    return json.dumps(_short(data), separators=(",", ":")) + "\n"


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.3g}")
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    return [_short(one) for one in value] if isinstance(value, list) else value


if __name__ == "__main__":
    cut(Path(sys.argv[1]))
