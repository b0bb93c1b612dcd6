"""The page's data and file: numbers against the method's own, texts that try to break out, sizes. No browser here."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import html5lib
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.method.perception import response_frame_scores
from appo.reports.group_view import LEVELS, ViewSettings, clean, group_view
from appo.reports.jsonl import RecordError
from appo.reports.page import embeddable, page_data, render, write_page
from appo.reports.run_folder import LoadedRun, load_run
from tests.reports import page_cases
from tests.reports.page_cases import INJECTIONS, RECORDED


def embedded(page: str) -> Any:
    """The data of a page, as a strict HTML parser finds it."""
    tree = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)
    (element,) = (script for script in tree.iter("script") if script.get("type") == "application/json")
    return json.loads(element.text)


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score_tokens", [1, 5, 15])
def test_scores_are_those_of_the_method_and_heat_is_their_brightness(score_tokens: int) -> None:
    record = page_cases.group(3, tokens=11)
    view = group_view(record, ViewSettings(score_tokens=score_tokens))
    attn_GNF = torch.tensor([one.frame_attention for one in record.responses], dtype=torch.float64)
    expected_GF = response_frame_scores(attn_GNF, torch.ones(4, 11, dtype=torch.bool), score_tokens)
    low, high = expected_GF.min(), expected_GF.max()
    for one in view["responses"]:
        row_F = expected_GF[one["number"] - 1]
        torch.testing.assert_close(torch.tensor(one["scores"], dtype=torch.float64), row_F, rtol=1e-3, atol=0)
        heat_F = 100 * ((row_F - low) / (high - low)) ** 0.7
        assert one["heat"] == pytest.approx(heat_F.tolist(), abs=0.51)
    rights = [one["heat"] for one in view["responses"] if one["right"]]
    assert view["meanHeat"]["right"] == pytest.approx(
        [sum(column) / 2 for column in zip(*rights, strict=True)], abs=0.51
    )


def test_every_attention_is_decoded_within_its_level() -> None:
    record = page_cases.group(5)
    view = group_view(record, ViewSettings())
    for one in view["responses"]:
        truth = record.responses[one["number"] - 1].frame_attention
        for row, looks in zip(truth, one["looks"], strict=True):
            back = [(LEVELS.index(letter) / 63) ** 2 * view["peak"] for letter in looks]
            roots = zip(row, back, strict=True)
            assert all(abs(math.sqrt(a) - math.sqrt(b)) <= 0.51 / 63 * math.sqrt(view["peak"]) for a, b in roots)


def test_winners_come_first_and_the_settings_decide_who_they_are() -> None:
    record = page_cases.group(1)
    view = group_view(record, ViewSettings.of({"threshold": 0.5, "reward_weights": [0.9, 0.1]}))
    assert [one["number"] for one in view["responses"]] == [1, 3, 2, 4]
    assert (view["right"], view["judged"], view["spread"]) == (2, 4, 0.9)
    assert [one["total"] for one in view["responses"]] == [1.0, 1.0, 0.1, 0.1]
    other = group_view(record, ViewSettings.of({"accuracy_reward": "format_reward"}))
    assert other["right"] == 4
    unknown = group_view(record, ViewSettings.of({"accuracy_reward": "none"}))
    assert (unknown["judged"], unknown["meanHeat"]) == (0, {"right": None, "wrong": None})
    odd = ViewSettings.of({"threshold": "x", "score_tokens": -1, "reward_weights": ["a"], "accuracy_reward": 3})
    assert odd == ViewSettings()


def test_a_repeated_question_reports_what_changed() -> None:
    same = {"id": "q", "question": "?", "video": "a"}
    won = page_cases.group(9, **same)
    lost = [replace(one, rewards={"accuracy_reward": 0.0}) for one in won.responses]
    first, middle = replace(won, step=0, responses=lost), replace(won, step=5, responses=lost[:3] + won.responses[:1])
    data = page_data([page_cases.run([won, first, middle, page_cases.group(4)])])
    end, start, between, alone = data["groups"]
    assert start["steps"] == end["steps"] == [0, 5, 9]
    assert (start["allWrong"], start["won"], start["change"]) == (True, False, 0.0)
    assert (between["won"], between["change"]) == (False, 0.25)
    assert (end["won"], end["lost"], end["change"], end["key"]) == (True, False, 0.5, start["key"])
    assert (alone["steps"], alone["won"], alone["change"]) == ([4], False, 0.0)


def test_in_the_recorded_run_winners_attend_to_the_event_and_losers_do_not() -> None:
    """The point of it all, on groups of a real run of the demo."""
    data = page_data([load_run(RECORDED)])
    assert data["runs"][0]["notes"] == []
    gaps = []
    for group in data["groups"]:
        right, wrong = group["meanHeat"]["right"], group["meanHeat"]["wrong"]
        if right and wrong and group["event"]:
            gaps += [right[frame] - wrong[frame] for frame in group["event"] if frame in group["crucial"]]
    assert max(gaps) >= 20, "of 100 levels of brightness"
    film = max((group for group in data["groups"]), key=lambda group: len(group["steps"]))
    assert film["steps"] == sorted(film["steps"])
    assert film["shares"][0] < 0.5 < film["shares"][-1]
    assert all(group["film"] in data["films"] for group in data["groups"])
    assert {"reward", "accuracy", "entropy", "gradient norm", "mean token weight"} <= data["runs"][0]["curves"].keys()
    assert [level["level"] for level in data["runs"][0]["levels"]] == ["L1", "L2", "L3"]


# --- texts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", INJECTIONS.values(), ids=INJECTIONS)
def test_no_text_leaves_its_place(tmp_path: Path, text: str) -> None:
    hostile = replace(
        page_cases.group(1).responses[0], text=text, tokens=[text] * 12, rewards={text: 1.0, "accuracy_reward": 1.0}
    )
    named = {"id": text, "video": text, "question": text, "answer": text, "kind": text, "film": text}
    run = page_cases.run([page_cases.group(1, responses=[hostile], **named)], name=text, notes=[text])
    run = replace(run, settings={"method": text, "model": text}, about={"argv": [text], "versions": {text: text}})
    run = replace(run, metrics=[{"step": 1, "reward": 0.5, f"eval_accuracy{text}": 1.0}])
    page = write_page(tmp_path / "page.html", [run]).read_text(encoding="utf-8")
    data = embedded(page)
    assert data == json.loads((tmp_path / "page.json").read_text())
    (group,) = data["groups"]
    shown = clean(text, 10_000)
    assert [group["id"], group["question"], group["answer"]] == [shown] * 3
    assert group["responses"][0]["tokens"] == [shown] * 12
    assert data["runs"][0]["name"] == shown
    assert len(re.findall(r"<script", page)) == 2, "the data's and ours"
    assert "\u202e" not in page
    (source,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert not re.search(r"[<>&\u2028\u2029]|[^\x00-\x7f]", source)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec=None), max_size=60))
def test_any_text_comes_through_the_page_unchanged(text: str) -> None:
    page = render(json.dumps({"text": text}), "title")
    assert embedded(page) == {"text": text}
    assert json.loads(embeddable(json.dumps(text))) == text


def test_hidden_marks_are_rendered_by_their_number_and_long_texts_are_shortened() -> None:
    assert clean("a\u202eb\x00c\r\nd\te", 99) == "a[U+202E]b[U+0000]c\nd\te"
    assert clean("émoji 👩\u200d🚀 ok", 99) == "émoji 👩\u200d🚀 ok"
    assert clean("x" * 1_000_000, 20) == "x" * 20 + " … [999980 more characters]"
    clean("\ud800", 9).encode()


def test_a_megabyte_of_response_is_shortened_with_a_note(tmp_path: Path) -> None:
    bare = {"tokens": [], "weights": [], "chosen": [], "frame_attention": []}
    whole = replace(page_cases.group(1).responses[0], text="y" * 1_000_000, **bare)
    many = replace(whole, text="", tokens=["word "] * 200_000, weights=[1.0] * 200_000, chosen=[False] * 200_000)
    one = replace(whole, tokens=["z" * 1_000_000], weights=[1.7], chosen=[True])
    page = write_page(tmp_path / "page.html", [page_cases.run([page_cases.group(1, responses=[whole, many, one])])])
    texts, tokens, token = embedded(page.read_text())["groups"][0]["responses"]
    assert texts["text"].endswith("[980000 more characters]")
    assert (tokens["length"], tokens["more"], len(tokens["tokens"])) == (200_000, 196_000, 4000)
    assert token["tokens"][0].endswith("[999800 more characters]")
    assert page.stat().st_size < 300_000


def test_numbers_that_are_none_are_left_out_or_null(tmp_path: Path) -> None:
    bad = [math.nan, math.inf, -math.inf, 1e300, -1.0]
    odd = replace(
        page_cases.group(1).responses[0],
        tokens=["a"] * 5,
        weights=bad,
        chosen=[True] * 5,
        frame_attention=[[value, 0.5, 1e308] for value in bad],
        rewards={"accuracy_reward": math.nan, "other": 1e308},
        advantage=-math.inf,
    )
    record = page_cases.group(1, step=10**40, responses=[odd], timestamps=[*bad[:3], 1e300], crucial_frames=[-1, 2, 99])
    metrics = [
        {"step": step, "reward": value} for step, value in [(1, math.nan), (math.inf, 1.0), (2, 1e300), (3, 0.5)]
    ]
    metrics += [{"step": True, "reward": 3.0}, {"step": 4, "reward": "high"}, {"reward": 2.0}]
    data = embedded(write_page(tmp_path / "a.html", [page_cases.run([record], metrics=metrics)]).read_text())
    (group,) = data["groups"]
    assert group["times"] == [None] * 4
    assert group["crucial"] == [2]
    assert group["responses"][0]["right"] is False
    assert group["responses"][0]["rewards"] == {"accuracy_reward": None, "other": None}
    assert group["responses"][0]["scores"] == [0.0, 0.5, 0.0, 0.0]
    assert data["runs"][0]["curves"]["reward"]["values"] == [0.5]


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "frames"), [(60, 8), (384, 16)])
def test_a_page_of_200_groups_stays_small(tmp_path: Path, tokens: int, frames: int) -> None:
    """The demo's size is shown whole; the paper's (G = 8, 384 tokens, 16 frames) without the least telling tokens."""
    few = [page_cases.group(i, tokens=tokens, frames=frames, count=8) for i in range(4)]
    groups = [replace(few[i % 4], id=f"q{i}", step=i, film=f"{i}.webp") for i in range(200)]
    picture = page_cases.film(1, frames)
    run = page_cases.run(groups, films={one.film: picture for one in groups})
    page = write_page(tmp_path / "page.html", [run])
    assert page.stat().st_size < 8_000_000
    data = json.loads(page.with_suffix(".json").read_text())
    assert len(data["groups"]) == len(data["films"]) == 200
    whole = sum(bool(group["responses"][0]["tokens"]) for group in data["groups"])
    assert whole == 200 if tokens == 60 else 20 < whole < 200
    for group in data["groups"]:
        assert group["responses"][0]["heat"]
        assert bool(group["responses"][0]["text"]) or bool(group["responses"][0]["tokens"])
        assert any("keep the page small" in note for note in group["notes"]) != bool(group["responses"][0]["tokens"])


def test_several_runs_share_a_page(tmp_path: Path) -> None:
    runs = [page_cases.run([page_cases.group(1)], name=name, metrics=[{"step": 1, "reward": 0.5}]) for name in "ab"]
    data = page_data(runs)
    assert [run["name"] for run in data["runs"]] == ["a", "b"]
    assert [group["key"] for group in data["groups"]] == ["0/0", "1/0"], "the same question of two runs is no film"
    assert set(data["films"]) == {"0/1.webp", "1/1.webp"}


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match=r"page\.html: cannot be written"):
        write_page(tmp_path / "file" / "page.html", [LoadedRun("a")])
