"""Official scores against a second writing of every formula (oracle_scores.py), and where ours differ on purpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from appo.data import DATASETS, get_benchmark, read
from appo.data.vsi_bench import TASKS as VSI_TASKS
from appo.evaluation.scores import Answered, official_scores, unparsable_share
from appo.evaluation.statistics import wilson_interval
from appo.rewards.functions import accuracy_reward
from appo.rewards.scorers import GRADED, KINDS
from appo.types import VideoQA, VideoSource
from tests.evaluation import oracle_scores as oracle
from tests.evaluation.oracle_scores import OPTIONS, Pair, wrapped
from tests.support.data_fixtures import CASES, Case

VIDEO = VideoSource("x.mp4")

# --- random questions of every dataset -----------------------------------------------------------------------------


def letter_question(rng: Random, name: str, options: int, **metadata: Any) -> VideoQA:
    answer = rng.choice("ABCDE"[:options])
    return VideoQA(name, VIDEO, "?", answer, "letter", OPTIONS[:options], metadata=metadata)


def seed_question(rng: Random, name: str) -> VideoQA:
    return letter_question(rng, name, 4, split=rng.choice(["L1", "L2", "L3"]))


def video_r1_question(rng: Random, name: str) -> VideoQA:
    kind, problem = rng.choice([
        ("letter", "multiple choice"), ("number", "numerical"), ("ocr", "OCR"), ("text", "free-form"),
        ("regression", "regression"),
    ])  # fmt: skip
    if kind == "letter":
        return letter_question(rng, name, 5, problem_type=problem)
    words = " ".join(rng.choices(["red", "ball", "falls", "Exit", "door"], k=rng.randrange(1, 6)))
    answer = words if kind in ("ocr", "text") else f"{rng.randrange(1, 4000) / 100}"
    return VideoQA(name, VIDEO, "?", answer, kind, metadata={"problem_type": problem})


def next_qa_question(rng: Random, name: str) -> VideoQA:
    return letter_question(rng, name, 5, type=rng.choice(["CW", "CH", "TN", "TC", "TP", "DC", "DL", "DO"]))


def next_gqa_question(rng: Random, name: str) -> VideoQA:
    starts = [rng.randrange(0, 80) / 4 for _ in range(rng.randrange(1, 4))]
    spans = tuple((start, start + rng.randrange(1, 40) / 4) for start in starts)
    return replace(letter_question(rng, name, 5), spans=spans)


def perception_question(rng: Random, name: str) -> VideoQA:
    area, reasoning = rng.choice(["memory", "physics", "semantics"]), rng.choice(["descriptive", "predictive"])
    return letter_question(rng, name, 3, area=area, reasoning=reasoning)


def vsi_question(rng: Random, name: str) -> VideoQA:
    task = rng.choice(VSI_TASKS)
    kind = f"{task}_{rng.choice(['easy', 'medium', 'hard'])}" if task == "object_rel_direction" else task
    metadata = {"task": task, "question_type": kind}
    if task in VSI_TASKS[:4]:
        return VideoQA(name, VIDEO, "?", f"{rng.randrange(1, 400) / 10}", "mra", metadata=metadata)
    return letter_question(rng, name, 4, **metadata)


def mvbench_question(rng: Random, name: str) -> VideoQA:
    return letter_question(rng, name, rng.randrange(2, 6), task=rng.choice(["moving_count", "action_count"]))


def spotlight_question(rng: Random, name: str) -> VideoQA:
    answer = rng.choice(["red", "Blue ball", "left."])
    return VideoQA(name, VIDEO, "?", answer, "word", metadata={"level": rng.choice(["L1", "L2", "L3"])})


def own_question(rng: Random, name: str) -> VideoQA:
    return rng.choice([video_r1_question, spotlight_question, vsi_question])(rng, name)


def by(name: str, prefix: str = "") -> Callable[[VideoQA], str | None]:
    return lambda question: f"{prefix}{question.metadata[name]}"


QUESTION: dict[str, Callable[[Random, str], VideoQA]] = {
    "seed-bench-r1": seed_question, "video-r1": video_r1_question, "nextqa": next_qa_question,
    "nextgqa": next_gqa_question, "perception-test": perception_question, "vsi-bench": vsi_question,
    "mvbench": mvbench_question, "spotlight": spotlight_question, "jsonl": own_question,
}  # fmt: skip
ORACLE: dict[str, Callable[[Sequence[Pair]], dict[str, float]]] = {
    "seed-bench-r1": lambda pairs: oracle.overall_and(pairs, "accuracy", by("split")),
    "video-r1": lambda pairs: oracle.overall_and(pairs, "score", by("problem_type")),
    "nextqa": oracle.next_qa,
    "nextgqa": lambda pairs: oracle.next_gqa(pairs, skip=False),
    "perception-test": lambda pairs: oracle.overall_and(
        pairs, "accuracy", by("area", "area/"), by("reasoning", "reasoning/")
    ),
    "vsi-bench": oracle.vsi_bench,
    "mvbench": lambda pairs: oracle.overall_and(pairs, "accuracy", by("task")),
    "spotlight": lambda pairs: oracle.overall_and(pairs, "accuracy", by("level")),
    "jsonl": lambda pairs: oracle.overall_and(pairs, "score", lambda question: f"kind/{question.kind}"),
}


def random_pairs(dataset: str, seed: int, missing: float = 0.15) -> list[Pair]:
    rng = Random(seed)
    questions = [QUESTION[dataset](rng, str(number)) for number in range(rng.randrange(1, 40))]
    grounded = dataset == "nextgqa"
    return [(one, None if rng.random() < missing else oracle.response(rng, one, grounded)) for one in questions]


def answered(pairs: Sequence[Pair]) -> list[Answered]:
    return [Answered(question, (said.text,) if said else ()) for question, said in pairs]


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_figure_is_the_official_formula(dataset: str) -> None:
    for seed in range(60):
        pairs = random_pairs(dataset, seed)
        scores = official_scores(dataset, answered(pairs))
        expected = ORACLE[dataset](pairs)
        assert {score.name: score.value for score in scores} == pytest.approx(expected, abs=1e-9)
        assert len(scores) == len(expected), "no figure twice"
        assert scores[0].name == next(iter(expected)), "the headline comes first"


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_figure_without_missing_predictions_is_that_of_a_script_that_skips_them(dataset: str) -> None:
    for seed in range(30):
        pairs = random_pairs(dataset, seed, missing=0.3)
        there = [pair for pair in pairs if pair[1] is not None]
        if not there or (dataset == "nextgqa" and not any(said and said.span for _, said in pairs)):
            continue
        expected = oracle.next_gqa(pairs, skip=True) if dataset == "nextgqa" else ORACLE[dataset](there)
        for score in official_scores(dataset, answered(pairs)):
            if score.answered_only is not None:
                assert score.answered_only == pytest.approx(expected[score.name], abs=1e-9), score.name
                assert score.answered_only >= score.value or dataset == "vsi-bench"
            elif score.name in expected:
                assert score.value == pytest.approx(expected[score.name], abs=1e-9), "nothing was skipped"


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_headline_is_the_mean_of_single_scores_or_for_vsi_bench_within_tasks(dataset: str) -> None:
    pairs = [pair for pair in random_pairs(dataset, 5) if pair[1]]
    singles = [DATASETS[dataset].score(question, said.text) for question, said in pairs]
    assert all(0 <= single <= 1 for single in singles)
    if dataset != "vsi-bench":
        assert official_scores(dataset, answered(pairs))[0].value == pytest.approx(sum(singles) / len(singles))
    lenient = [DATASETS[dataset].score(question, said.text, lenient=True) for question, said in pairs]
    assert all(kind >= strict for kind, strict in zip(lenient, singles, strict=True))
    assert (
        official_scores(dataset, answered(pairs), lenient=True)[0].value
        >= official_scores(dataset, answered(pairs))[0].value
    )


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_score_of_an_answer_is_its_reward(dataset: str) -> None:
    benchmark, pairs = DATASETS[dataset], [pair for pair in random_pairs(dataset, 6) if pair[1]]
    columns = {name: [getattr(question, name) for question, _ in pairs] for name in ("answer", "kind", "options")}
    texts = [said.text for _, said in pairs]
    rewards = accuracy_reward(texts, **columns, response_format=benchmark.response_format)
    assert [benchmark.marker(question)(text).right for (question, _), text in zip(pairs, texts, strict=True)] == rewards
    assert {question.kind for question, _ in pairs} <= set(benchmark.kinds)


def test_every_dataset_and_every_kind_of_answer_is_scored() -> None:
    assert set(DATASETS) == set(QUESTION)
    assert set(GRADED) < set(KINDS)
    assert {name: DATASETS[name].response_format for name in DATASETS if name != "nextgqa"} == dict.fromkeys(
        set(DATASETS) - {"nextgqa"}, "answer"
    )
    assert DATASETS["nextgqa"].response_format == "grounded"
    one = [Answered(LETTER, ("B",))]
    for call in (get_benchmark, lambda name: official_scores(name, one), lambda name: unparsable_share(name, one)):
        with pytest.raises(ValueError, match="unknown dataset 'imagenet'; there are seed-bench-r1"):
            call("imagenet")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gold_answers_to_real_annotations_score_1(case: Case, tmp_path: Path) -> None:
    annotations, videos = case.write(tmp_path)
    gold = []
    for question in read(case.name, annotations, videos, case.split):
        start, end = question.spans[0] if question.spans else (0, 1)
        time = f"[{start}, {end}]" if DATASETS[case.name].response_format == "grounded" else None
        gold.append(Answered(question, (wrapped(question.answer, time),)))
    for score in official_scores(case.name, gold):
        assert score.value == pytest.approx(1.0), score.name
        assert score.high == pytest.approx(1.0)
    assert unparsable_share(case.name, gold) == 0.0
    silent = [Answered(one.question, ("",)) for one in gold]
    assert {score.value for score in official_scores(case.name, silent)} == {0.0}
    assert unparsable_share(case.name, silent) == 1.0


# --- intervals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", DATASETS)
def test_shares_have_wilson_intervals_and_everything_else_a_bootstrap(dataset: str) -> None:
    pairs = random_pairs(dataset, 7)
    graded = {"mIoU", "mIoP", *VSI_TASKS[:4], "OCR", "free-form", "regression", *(f"kind/{kind}" for kind in GRADED)}
    for score in official_scores(dataset, answered(pairs)):
        assert 0 <= score.low <= score.value + 1e-9
        assert score.value - 1e-9 <= score.high <= 1
        whole = score.name == "score" or score.name == "object_rel_direction"
        assert (score.interval == "bootstrap") == (score.name in graded or whole), score.name
        if score.interval == "wilson":
            assert (score.low, score.high) == wilson_interval(score.value, score.questions)


def test_vsi_bench_is_resampled_within_its_question_types() -> None:
    rng = Random(0)
    questions = [vsi_question(rng, str(number)) for number in range(120)]
    pairs = [(question, oracle.response(rng, question, False)) for question in questions]
    cells: dict[str, list[Pair]] = {}
    for pair in pairs:
        cells.setdefault(pair[0].metadata["question_type"], []).append(pair)
    drawn = sorted(
        oracle.vsi_bench([pair for cell in cells.values() for pair in rng.choices(cell, k=len(cell))])["score"]
        for _ in range(400)
    )
    score = official_scores("vsi-bench", answered(pairs))[0]
    assert score.low == pytest.approx(drawn[10], abs=0.02)
    assert score.high == pytest.approx(drawn[390], abs=0.02)


# --- edges, and where we differ from the scripts on purpose --------------------------------------------------------

LETTER = VideoQA("1", VIDEO, "?", "B", "letter", OPTIONS[:4], metadata={"task": "t", "question_type": "t"})
TIMED = VideoQA("2", VIDEO, "?", "B", "letter", OPTIONS, spans=((0.0, 10.0), (20.0, 30.0)))


def figures(dataset: str, *responses: tuple[VideoQA, str]) -> dict[str, float]:
    given = [Answered(replace(question, id=str(n)), (text,)) for n, (question, text) in enumerate(responses)]
    return {score.name: score.value for score in official_scores(dataset, given)}


def test_no_answer_tag_is_wrong_and_every_style_of_the_letter_is_right() -> None:
    for answer in ("B", "(B)", "b", "B.", "B. a blue ball", "a blue ball"):
        assert DATASETS["seed-bench-r1"].score(LETTER, wrapped(answer)) == 1.0, answer
    for text in ("B", "<answer>B</answer>", "<think>B</think>", wrapped("A"), wrapped("A, B")):
        assert DATASETS["seed-bench-r1"].score(LETTER, text) == 0.0, text
    assert DATASETS["seed-bench-r1"].score(LETTER, "B", lenient=True) == 1.0


def test_mra_is_exact_where_the_script_rounds() -> None:
    """11 for 10 is 10 % off, which theta = .9 allows; the script compares .1 with 1 - .9 = .09999999999999998."""
    ten = VideoQA("1", VIDEO, "?", "10", "mra", metadata={"task": "object_counting", "question_type": "x"})
    thetas = [0.5 + 0.05 * step for step in range(10)]
    script = sum(abs(11 - 10) / 10 <= 1 - theta for theta in thetas) / 10
    assert (script, DATASETS["vsi-bench"].score(ten, wrapped("11"))) == (0.8, 0.9)
    assert DATASETS["vsi-bench"].score(ten, wrapped("about 11")) == 0.0, "unparsable"
    assert DATASETS["vsi-bench"].score(ten, wrapped("about 11"), lenient=True) == 0.9


def test_vsi_bench_takes_a_whole_answer_where_the_script_takes_its_first_word() -> None:
    said = "B because it is near"
    assert said.split(" ")[0].rstrip(".") == "B", "the script's rule calls it right"
    assert DATASETS["vsi-bench"].score(LETTER, wrapped(said)) == 0.0
    assert DATASETS["vsi-bench"].score(LETTER, wrapped(said), lenient=True) == 1.0


def test_mvbench_wants_the_option_where_the_script_looks_for_the_first_word_in_it() -> None:
    """Its script asks whether the first word, without full stops, is part of ``(b)``: nothing always is."""
    task = replace(LETTER, metadata={"task": "moving_count"})
    for said, script, ours in (("", True, 0.0), ("( b", True, 0.0), ("B) a red cup", True, 0.0), ("(B)", True, 1.0)):
        first = said.lower().split(" ")[0]
        assert (first.replace(".", "") in "(b)" or "(b)" in first) == script
        assert DATASETS["mvbench"].score(task, wrapped(said)) == ours


def test_video_r1_numbers_are_values_where_the_script_compares_how_they_are_written() -> None:
    three = VideoQA("1", VIDEO, "?", "3", "number", metadata={"problem_type": "numerical"})
    assert DATASETS["video-r1"].score(three, wrapped("3.0")) == 1.0, "the script wants a decimal point in both or none"
    assert DATASETS["video-r1"].score(three, wrapped("3.004")) == 1.0
    assert DATASETS["video-r1"].score(three, wrapped("3.006")) == 0.0
    assert DATASETS["video-r1"].score(replace(three, answer="0", kind="regression"), wrapped("0")) == 1.0, (
        "script: 0 / 1e-9"
    )


def test_thresholds_of_overlap_are_exact() -> None:
    """[1.1, 1.4] of a true [1.1, 2.1]: IoU is 3/10, which floats just miss."""
    short = replace(TIMED, spans=((1.1, 2.1),))
    assert (1.4 - 1.1) / (2.1 - 1.1) < 0.3
    assert figures("nextgqa", (short, wrapped("B", "[1.1, 1.4]")))["IoU@0.3"] == 1.0
    assert figures("nextgqa", (short, wrapped("B", "[1.1, 1.3999]")))["IoU@0.3"] == 0.0
    half = figures("nextgqa", (TIMED, wrapped("B", "[5, 15]")))
    assert (half["mIoP"], half["IoP@0.5"], half["Acc@GQA"]) == (0.5, 1.0, 1.0), "the border counts"


def test_several_predicted_spans_count_as_their_hull() -> None:
    """The script takes one span. Ours: from the first start to the last end, so that hedging never pays."""
    both = figures("nextgqa", (TIMED, wrapped("B", "[0, 10], [20, 30]")))
    assert both == figures("nextgqa", (TIMED, wrapped("B", "[0, 30]")))
    assert both["mIoU"] == pytest.approx(1 / 3)
    assert figures("nextgqa", (TIMED, wrapped("B", "[20, 30]")))["mIoU"] == 1.0, "the better one of two true spans"


def test_a_missing_time_is_skipped_by_the_script_and_wrong_here() -> None:
    good, blind = Answered(TIMED, (wrapped("B", "[0, 10]"),)), Answered(replace(TIMED, id="3"), (wrapped("B"),))
    silent = Answered(replace(TIMED, id="4"), ())
    scores = {score.name: score for score in official_scores("nextgqa", [good, blind, silent])}
    assert list(scores) == ["mIoU", "mIoP", "IoU@0.3", "IoU@0.5", "IoP@0.3", "IoP@0.5", "Acc@QA", "Acc@GQA"]
    for name in set(scores) - {"Acc@QA"}:
        assert (scores[name].value, scores[name].answered_only) == (pytest.approx(1 / 3), 1.0)
    assert (scores["Acc@QA"].value, scores["Acc@QA"].answered_only) == (pytest.approx(1 / 3), 0.5), "blind is no format"
    assert all(score.answered_only is None for score in official_scores("nextgqa", [good]))
    assert all(score.answered_only is None for score in official_scores("nextgqa", [silent])), "nothing is left"


def test_a_time_without_the_right_answer_is_no_grounded_answer() -> None:
    scores = figures("nextgqa", (TIMED, wrapped("A", "[0, 10]")), (TIMED, wrapped("B", "[11, 19]")))
    assert (scores["IoP@0.5"], scores["Acc@QA"], scores["Acc@GQA"]) == (0.5, 0.5, 0.0)


def test_tp_counts_as_tn_and_empty_groups_are_left_out() -> None:
    kinds = {"TP": "B", "TN": "A"}
    scores = figures(
        "nextqa", *((replace(LETTER, metadata={"type": kind}), wrapped(say)) for kind, say in kinds.items())
    )
    assert scores == {"accuracy": 0.5, "T": 0.5, "TN": 0.5, "TP": 1.0}


def test_a_gold_answer_that_cannot_be_scored_is_named() -> None:
    with pytest.raises(ValueError, match="question 'q9': `answer` is 'Q', which is not among the 4 options"):
        official_scores("mvbench", [Answered(replace(LETTER, id="q9", answer="Q"), ("",))])
    with pytest.raises(ValueError, match="there is no question to score"):
        official_scores("mvbench", [])
