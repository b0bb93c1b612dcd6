"""The embedded world's exact describer, its noise, and the exact reasoner, against scenes and independent counts."""

from __future__ import annotations

import random
from dataclasses import asdict, replace

import pytest

from appo.experiments.study.words import Event, blurred, description_of, events_in, rule_answer, scene_in_words
from appo.world.teacher import respond
from appo.world.world import COLOURS, LEVELS, SHAPES, TASKS, Dials, Question, Scene, make_question, make_scene


def made_question(
    number: int, task: str | None = None, dials: Dials | None = None
) -> tuple[Scene, Question, random.Random]:
    rng = random.Random(f"study/{number}")
    scene = make_scene(dials or LEVELS[rng.choice(("L1", "L2", "L3"))], rng)
    return scene, make_question(scene, task or rng.choice(TASKS), rng), rng


def truth(scene: Scene) -> str:
    return scene_in_words({"events": [asdict(event) for event in scene.events]})


def test_the_rules_are_right_on_every_true_description() -> None:
    for number in range(5000):
        scene, question, _ = made_question(number)
        assert rule_answer(question.text, truth(scene)) == question.answer, (question, truth(scene))


def test_the_rules_are_right_on_all_responses_of_an_honest_policy() -> None:
    for number in range(5000):
        scene, question, rng = made_question(number)
        described = description_of(respond(scene, question, question.target, rng))
        assert rule_answer(question.text, described) == question.answer, (question, described)


def test_a_true_description_is_read_back() -> None:
    for number in range(500):
        scene, _, _ = made_question(number)
        assert events_in(truth(scene)) == [Event(e.shape, e.colour, str(e.second)) for e in scene.events]


def test_what_several_sentences_say_of_one_event_is_put_together() -> None:
    described = (
        "first i scan the frames one by one . i stop at the heart at 7 . its colour is blue . the star at 2 is not it ."
        " the yellow bar drifts around all the time . yes , the heart is blue and the clock says 7 ."
    )
    assert events_in(described) == [Event("heart", "blue", "7"), Event("star", "", "2")]
    assert rule_answer("when does the star appear ?", described) == "2"
    assert rule_answer("which came first , the heart or the star ?", described) == "star"
    assert rule_answer("what shape is the blue one ?", described) == "heart"


def test_what_is_not_described_is_guessed_evenly_and_always_alike() -> None:
    described = [f"there is the pink heart at {n % 8} . {n}" for n in range(4000)]
    guesses = [rule_answer("what colour is the star ?", one) for one in described]
    assert guesses == [rule_answer("what colour is the star ?", one) for one in described]
    assert all(abs(guesses.count(colour) / 4000 - 1 / 8) < 0.025 for colour in COLOURS)  # 4.8 standard deviations


def test_rules_that_know_some_tasks_guess_at_the_others() -> None:
    rows = [made_question(number) for number in range(4000)]
    right = {task: [] for task in TASKS}
    for scene, question, _ in rows:
        right[question.task].append(rule_answer(question.text, truth(scene), ("colour",)) == question.answer)
    shares = {task: sum(values) / len(values) for task, values in right.items()}
    assert shares["colour"] == 1
    for task, chance in {"shape": 1 / 8, "first": 1 / 2, "when": 1 / 12}.items():
        assert shares[task] == pytest.approx(chance, abs=0.07)


def test_rules_refuse_questions_of_another_world() -> None:
    with pytest.raises(ValueError, match="'Who cooks\\?' is none"):
        rule_answer("Who cooks?", "")


# --- noise -------------------------------------------------------------------------------------------------------


def test_noise_replaces_each_attribute_by_another_of_its_kind_at_the_given_share() -> None:
    changed = total = 0
    for number in range(3000):
        scene, _, _ = made_question(number)
        seen = events_in(blurred(truth(scene), 0.3, str(number), scene.seconds))
        for event, described in zip(scene.events, seen, strict=False):
            if len(seen) == len(scene.events):
                assert described.shape in SHAPES
                assert described.colour in COLOURS
                assert 0 <= int(described.second) < scene.seconds
                changed += sum(
                    (
                        described.shape != event.shape,
                        described.colour != event.colour,
                        described.second != str(event.second),
                    )
                )
                total += 3
    assert changed / total == pytest.approx(0.3, abs=0.01)


def test_noise_is_nested_repeatable_and_the_same_wherever_a_word_stands() -> None:
    for number in range(300):
        scene, question, rng = made_question(number)
        described = respond(scene, question, question.target, rng)
        little, more = (blurred(described, share, str(number), scene.seconds) for share in (0.2, 0.5))
        assert little == blurred(described, 0.2, str(number), scene.seconds)
        renamed: dict[str, str] = {}
        for word, at_little, at_more in zip(described.split(), little.split(), more.split(), strict=True):
            assert at_little in (word, at_more), "what is wrong at a small share is as wrong at a larger one"
            assert renamed.setdefault(word, at_more) == at_more
    assert blurred("a red star, 3.", 0.0, "x", 8) == "a red star, 3."
    everything = blurred("a red star at 3 .", 1.0, "x", 8).split()
    assert [a == b for a, b in zip(everything, ["a", "red", "star", "at", "3", "."], strict=True)] == [1, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("task", ["colour", "shape"])
@pytest.mark.parametrize("p", [0.1, 0.4, 0.8])
def test_accuracy_under_noise_is_what_pencil_and_paper_say(task: str, p: float) -> None:
    """Two events, the name asked for is found on the right one, on both, on the wrong one, or nowhere."""
    q = p / 7  # that one given wrong word of eight takes its place
    on_one, on_both, on_other, nowhere = (1 - p) * (1 - q), (1 - p) * q, p * q, p * (1 - q)
    expected = on_one * (1 - p) + on_both * ((1 - p) + q) / 2 + on_other * q + nowhere / 8
    dials, right = Dials(events=(2, 2)), []
    for number in range(6000):
        scene, question, _ = made_question(number, task, dials)
        described = blurred(truth(scene), p, f"{number}", scene.seconds)
        right.append(rule_answer(question.text, described) == question.answer)
    assert sum(right) / len(right) == pytest.approx(expected, abs=4 * (0.25 / 6000) ** 0.5)


@pytest.mark.parametrize("p", [0.2, 0.6])
@pytest.mark.parametrize("task", TASKS)
def test_accuracy_under_noise_is_that_of_a_simulation_without_words(task: str, p: float) -> None:
    """Events as tuples of numbers, drawn, blurred and looked up by other code and other random numbers."""
    rng = random.Random(f"simulation/{task}/{p}")
    count = 6000

    def blur(value: int, size: int) -> int:
        return rng.choice([other for other in range(size) if other != value]) if rng.random() < p else value

    def simulated() -> bool:
        n, seconds = rng.randint(2, 3), 8
        shapes, colours = rng.sample(range(8), n), rng.sample(range(8), n)
        times = sorted(rng.sample(range(seconds), n))
        seen = [(blur(s, 8), blur(c, 8), blur(t, seconds)) for s, c, t in zip(shapes, colours, times, strict=True)]
        if task == "first":
            one, two = rng.sample(range(n), 2)
            when = {i: [t for s, _, t in seen if s == shapes[i]][:1] for i in (one, two)}
            if (not when[one] and not when[two]) or when[one] == when[two]:
                found = rng.choice([one, two])
            elif when[one] and when[two]:
                found = one if when[one] < when[two] else two
            else:
                found = one if when[one] else two
            return found == min(one, two)
        i = rng.randrange(n)
        given, wanted = {"colour": (0, 1), "shape": (1, 0), "when": (0, 2)}[task]
        true = (shapes[i], colours[i], times[i])
        matches = [event[wanted] for event in seen if event[given] == true[given]]
        return (matches[0] if matches else rng.randrange({"when": 12}.get(task, 8))) == true[wanted]

    expected = sum(simulated() for _ in range(count)) / count
    right = []
    for number in range(count):
        scene, question, _ = made_question(number, task, replace(LEVELS["L1"]))
        described = blurred(truth(scene), p, f"{number}", scene.seconds)
        right.append(rule_answer(question.text, described) == question.answer)
    assert sum(right) / count == pytest.approx(expected, abs=4 * (0.5 / count) ** 0.5)
