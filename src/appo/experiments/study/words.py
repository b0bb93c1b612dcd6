"""What perceivers and reasoners are asked, and what of a perceiver's response a reasoner may read.

A perceiver is shown the question without its options: it cannot name the letter of one. A reasoner never sees the
video.
"""

from __future__ import annotations

import re

from appo.rewards.templates import lettered
from appo.types import VideoQA

# Raised by one whenever the words below, or what is taken as the description, change.
DESCRIPTION_VERSION = 1
REASONING_VERSION = 1

DESCRIBE = (
    "Somebody who cannot see this video will be asked: {question}\n"
    "Describe what the video shows as far as it matters for that, with the times in seconds at which it is seen."
    " Describe only: do not answer the question."
)
REASON = (
    "A video, described by somebody who saw it:\n{description}\n\n{question}\n\n"
    "Answer from this description alone, even where it leaves you to guess. Give your final answer inside <answer> and"
    " </answer>: {wanted}."
)
WANTED = {
    True: "only the letter of the right option",
    False: "only the word, number or words asked for",
}
NOTHING = "(nothing)"

_THOUGHT = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)
_ANSWER = re.compile(r"<(answer|time)>.*?(?:</\1>|\Z)", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer|time)>")
# How an answer is announced, by the tiny policy's teacher (`appo.world.teacher.CONCLUSIONS`) and by others.
_CONCLUSION = re.compile(r"\banswer\b|\btherefore\b|\bthat settles it\b|\bi will say\b|\\boxed", re.IGNORECASE)


def describing_prompt(question: VideoQA) -> str:
    """What a perceiver is asked beside the video."""
    return DESCRIBE.format(question=question.question)


def reasoning_prompt(question: VideoQA, description: str) -> str:
    """What a reasoner is asked."""
    asked = "\n".join([question.question, *lettered(question.options)])
    return REASON.format(description=description or NOTHING, question=asked, wanted=WANTED[bool(question.options)])


def description_of(response: str) -> str:
    """What a response says it sees: its answer, and every sentence that announces one, taken off.

    Of a response that only thinks and answers, as policies trained to do so give it, the description is the thought
    without its last sentence, which concludes. Empty where nothing is left.
    """
    outside = _ANSWER.sub(" ", _THOUGHT.sub(" ", response))
    said = _sentences(_TAG.sub(" ", outside))
    if not said:
        said = _sentences(_TAG.sub(" ", " ".join(_THOUGHT.findall(response))))[:-1]
    return " ".join(sentence for sentence in said if not _CONCLUSION.search(sentence))


def _sentences(text: str) -> list[str]:
    """Not empty, without outer white space; a full stop within a number ends none."""
    parts = re.split(r"(?<=[.!?])\s+|\n+", text)
    return [" ".join(part.split()) for part in parts if part.strip(" \t\r\n.!?")]
