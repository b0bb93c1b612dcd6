"""What perceivers and reasoners are asked, and that no answer is left in a description."""

from __future__ import annotations

import random

import pytest

from appo.experiments.study.words import NOTHING, describing_prompt, description_of, reasoning_prompt
from appo.types import VideoQA, VideoSource
from appo.world.teacher import CONCLUSIONS, respond
from appo.world.world import LEVELS, TASKS, make_question, make_scene

LETTERED = VideoQA("q", VideoSource("v.mp4"), "What is cut?", "B", "letter", ("an onion", "a carrot"))


@pytest.mark.parametrize(
    ("response", "description"),
    [
        ("A man cuts a carrot at 3.5 s. He washes it.", "A man cuts a carrot at 3.5 s. He washes it."),
        ("0:01 - a knife\n0:04 - a carrot\n", "0:01 - a knife 0:04 - a carrot"),
        ("<think>Hmm. Long.</think>\nA carrot is cut.", "A carrot is cut."),
        (
            "<think> I see a carrot . it is cut . so it is B . </think> <answer> B </answer>",
            "I see a carrot . it is cut .",
        ),
        ("<think> I see a carrot . so it is B .</think><answer>B</answer><time>[1, 2]</time>", "I see a carrot ."),
        ("<think> I see a carrot . it is", "I see a carrot ."),
        ("A carrot is cut. The answer is B.", "A carrot is cut."),
        ("A carrot is cut. <answer>B", "A carrot is cut."),
        ("A carrot is cut. Therefore, B! \\boxed{B}.", "A carrot is cut."),
        ("<answer>B</answer>", ""),
        ("<think></think><answer>B</answer>", ""),
        ("", ""),
    ],
)
def test_a_description_is_what_is_left_without_answers(response: str, description: str) -> None:
    assert description_of(response) == description


def test_nothing_of_the_tiny_policys_conclusion_is_left() -> None:
    """The answer is replaced by a word that stands nowhere else, in all places where the teacher concludes."""
    for number in range(3000):
        rng = random.Random(number)
        scene = make_scene(LEVELS[rng.choice(("L1", "L2", "L3"))], rng)
        question = make_question(scene, rng.choice(TASKS), rng)
        response = respond(scene, question, rng.randrange(len(scene.events)), rng)
        thought, _, answer = response.partition("</think>")
        start = max(thought.rfind(line.partition("{answer}")[0]) for line in CONCLUSIONS)
        marked = (
            f"{thought[:start]}{' '.join('LEAK' if w == answer.split()[1] else w for w in thought[start:].split())}"
        )
        marked += " </think> <answer> LEAK </answer>"
        assert marked.count("LEAK") == 2
        assert description_of(marked) == " ".join(thought[:start].removeprefix("<think>").split())


def test_a_conclusion_that_others_follow_is_taken_off_too() -> None:
    assert description_of("<think> it is red . i will say red . nothing else matters here . </think>") == "it is red ."


def test_a_perceiver_gets_no_options() -> None:
    prompt = describing_prompt(LETTERED)
    assert LETTERED.question in prompt
    assert "carrot" not in prompt


def test_a_reasoner_reads_description_question_and_options() -> None:
    prompt = reasoning_prompt(LETTERED, "A knife, {braces} and all.")
    for part in ("A knife, {braces} and all.", "What is cut?", "A. an onion", "B. a carrot", "letter"):
        assert part in prompt
    assert NOTHING in reasoning_prompt(LETTERED, "")
    assert "letter" not in reasoning_prompt(VideoQA("q", VideoSource("v"), "How many?", "3", "number"), "")
