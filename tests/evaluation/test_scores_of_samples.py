"""Several responses to a question (mean, pass@k, majority), and two models compared figure by figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from random import Random

import pytest

from appo.data import DATASETS
from appo.evaluation.scores import Answered, Score, official_scores, score_differences, unparsable_share
from appo.evaluation.statistics import bootstrap_interval, mcnemar
from appo.types import VideoQA, VideoSource
from tests.evaluation import oracle_scores as oracle
from tests.evaluation.oracle_scores import OPTIONS, wrapped
from tests.evaluation.test_scores import QUESTION

LETTER = VideoQA("1", VideoSource("x.mp4"), "?", "B", "letter", OPTIONS[:4], metadata={"split": "L1"})


def sampled(dataset: str, seed: int, samples: int, questions: int = 25) -> list[Answered]:
    """Questions with up to that many responses; at least one has all of them."""
    rng = Random(seed)
    answered = []
    for number in range(questions):
        question = QUESTION[dataset](rng, str(number))
        count = samples if number == 0 or rng.random() < 0.7 else rng.randrange(samples)
        said = [oracle.response(rng, question, dataset == "nextgqa") for _ in range(count)]
        answered.append(Answered(question, tuple(one.text for one in said)))
    return answered


def by_name(dataset: str, answered: Sequence[Answered]) -> dict[str, Score]:
    return {score.name: score for score in official_scores(dataset, answered)}


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_figure_of_k_responses_is_the_mean_of_k_figures_of_one(dataset: str) -> None:
    """Response i of every question is an evaluation by itself, in which it may be missing."""
    answered = sampled(dataset, 1, 3)
    together = by_name(dataset, answered)
    alone = [by_name(dataset, [Answered(one.question, one.texts[i : i + 1]) for one in answered]) for i in range(3)]
    for name, score in alone[0].items():
        assert together[name].value == pytest.approx(sum(one[name].value for one in alone) / 3, abs=1e-12), name
        assert together[name].questions == score.questions
        assert together[name].interval == "bootstrap"
        assert together[name].low - 1e-9 <= together[name].value <= together[name].high + 1e-9
    assert set(together) - set(alone[0]) == {"pass@1", "pass@2", "majority"}


@pytest.mark.parametrize("dataset", sorted(set(DATASETS) - {"vsi-bench"}))
def test_pass_at_k_is_the_share_of_choices_with_a_right_response(dataset: str) -> None:
    answered = sampled(dataset, 2, 5, questions=12)
    scores = by_name(dataset, answered)
    for k in (1, 2, 4):
        passed = []
        for one in answered:
            marks = [DATASETS[dataset].score(one.question, text) >= 0.5 for text in one.texts]
            marks += [False] * (5 - len(marks))
            choices = [any(choice) for choice in combinations(marks, k)]
            passed.append(sum(choices) / len(choices))
        assert scores[f"pass@{k}"].value == pytest.approx(sum(passed) / len(passed), abs=1e-12)
    assert "pass@5" not in scores
    assert "pass@8" not in scores
    assert by_name(dataset, sampled(dataset, 2, 4))["pass@4"].interval == "wilson", "all of them: right or wrong"


@pytest.mark.parametrize(
    ("answers", "right", "remark"),
    [
        (["B", "A", "B"], 1.0, "two of three"),
        (["A", "A", "B"], 0.0, "two of three are wrong"),
        (["A", "B", "C"], 0.0, "a tie: the first seen, which is wrong"),
        (["B", "A"], 1.0, "a tie: the first seen, which is right"),
        (["A", "B", "(b)", "a blue ball"], 1.0, "one answer in three spellings"),
        (["C", "Z", "Z", "no idea", "B", "B"], 1.0, "what is no answer is no vote"),
        (["Z", "no idea"], 0.0, "no vote at all"),
    ],
)
def test_the_majority_of_letters(answers: list[str], right: float, remark: str) -> None:
    given = [Answered(LETTER, tuple(map(wrapped, answers)))]
    majority = by_name("mvbench", [replace(one, question=replace(LETTER, metadata={"task": "t"})) for one in given])
    assert majority["majority"].value == right, remark
    assert majority["majority"].interval == "wilson"


def test_the_majority_of_numbers_and_words_and_with_a_time() -> None:
    size = replace(LETTER, kind="mra", answer="10", options=(), metadata={"task": "t", "question_type": "t"})
    texts = tuple(map(wrapped, ["5", "9 m", "9.0", "10"]))
    assert by_name("vsi-bench", [Answered(size, texts)])["majority"].value == 0.9, "9 and 9.0 are one number"
    word = replace(LETTER, kind="word", answer="left", options=(), metadata={"level": "L1"})
    texts = tuple(map(wrapped, ["right", "Left.", "left"]))
    assert by_name("spotlight", [Answered(word, texts)])["majority"].value == 1.0
    timed = replace(LETTER, spans=((0.0, 10.0),))
    texts = (wrapped("A", "[0, 10]"), wrapped("B", "[0, 5]"), wrapped("B", "[0, 10]"))
    assert by_name("nextgqa", [Answered(timed, texts)])["majority"].value == 0.5, "the first one that says B"


def test_missing_responses_count_as_wrong_and_are_left_out_of_the_other_figure() -> None:
    full, half = Answered(LETTER, (wrapped("B"), wrapped("B"))), Answered(replace(LETTER, id="2"), (wrapped("B"),))
    none = Answered(replace(LETTER, id="3"), ())
    scores = by_name("seed-bench-r1", [full, half, none])
    assert (scores["accuracy"].value, scores["accuracy"].answered_only) == (0.5, 1.0)
    assert (scores["pass@2"].value, scores["pass@2"].answered_only) == (pytest.approx(2 / 3), 1.0)
    assert (scores["majority"].value, scores["majority"].answered_only) == (pytest.approx(2 / 3), 1.0)
    assert unparsable_share("seed-bench-r1", [full, half, none]) == 0.0
    assert unparsable_share("seed-bench-r1", [none]) == 0.0
    assert unparsable_share("seed-bench-r1", [none, Answered(LETTER, ("B", wrapped("B"), wrapped("Z"), ""))]) == 0.5


@pytest.mark.parametrize("dataset", DATASETS)
def test_scores_do_not_depend_on_the_order_of_questions(dataset: str) -> None:
    answered = sampled(dataset, 3, 2)
    shuffled = Random(0).sample(answered, len(answered))
    assert official_scores(dataset, shuffled) == official_scores(dataset, answered)


# --- two models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", DATASETS)
def test_differences_are_those_of_the_scores(dataset: str) -> None:
    first = sampled(dataset, 4, 1)
    rng = Random(9)
    second = [
        replace(one, texts=(oracle.response(rng, one.question, dataset == "nextgqa").text,)) for one in reversed(first)
    ]
    before, after = by_name(dataset, first), by_name(dataset, second)
    differences = score_differences(dataset, first, second)
    assert [difference.name for difference in differences] == [score.name for score in official_scores(dataset, first)]
    for difference in differences:
        name = difference.name
        assert (difference.first, difference.second) == (before[name].value, after[name].value)
        assert difference.questions == before[name].questions
        assert difference.low - 1e-9 <= difference.second - difference.first <= difference.high + 1e-9
        assert (difference.p_value is None) == (before[name].interval == "bootstrap")
    for same in score_differences(dataset, first, first):
        assert (same.second - same.first, same.low, same.high, same.p_value) in ((0, 0, 0, 1.0), (0, 0, 0, None))


def test_a_difference_of_shares_is_mcnemars_and_a_paired_bootstrap() -> None:
    right, wrong = (wrapped("B"),), (wrapped("A"),)
    pairs = [(right, right)] * 5 + [(wrong, right)] * 6 + [(right, wrong)] + [(wrong, wrong)] * 3 + [((), right)]
    first, second = (
        [Answered(replace(LETTER, id=str(number)), pair[side]) for number, pair in enumerate(pairs)] for side in (0, 1)
    )
    accuracy = score_differences("seed-bench-r1", first, second[::-1])[0]  # paired by id, not by place
    assert accuracy.second - accuracy.first == pytest.approx(6 / 16)
    assert accuracy.p_value == mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 2**8)
    assert (accuracy.low, accuracy.high) == bootstrap_interval([[0.0] * 8 + [1.0] * 7 + [-1.0]])


def test_only_the_same_questions_are_compared() -> None:
    one, other = [Answered(LETTER, ())], [Answered(replace(LETTER, id="2"), ())]
    for first, second in ((one, other), (one, [*one, *other]), (one, []), (one * 2, one)):
        with pytest.raises(ValueError, match="the two answered different questions"):
            score_differences("mvbench", first, second)


def test_a_mean_of_levels_is_no_share_and_a_level_alone_is() -> None:
    def level(name: str, number: int) -> Answered:
        metadata = {"task": "object_rel_direction", "question_type": f"object_rel_direction_{name}"}
        return Answered(replace(LETTER, id=str(number), metadata=metadata), (wrapped("AB"[number % 2]),))

    several = [level(name, number) for number, name in enumerate(["easy", "hard", "hard", "easy", "hard"])]
    one = [level("easy", number) for number in range(5)]
    for answered, interval in ((several, "bootstrap"), (one, "wilson")):
        assert {score.interval for score in official_scores("vsi-bench", answered)} == {interval}
        differences = score_differences("vsi-bench", answered, answered)
        assert [difference.p_value for difference in differences] == [None if interval == "bootstrap" else 1.0] * 2
