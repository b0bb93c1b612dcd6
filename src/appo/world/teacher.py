"""Responses that the tiny policy is taught in its warm start, never in RL. Standard library only.

The reasoning names an event and its second («i look at the star at 5 .») before it reports anything about it. The
attention that emits a token cannot depend on that token: responses of one group attend alike until they have named
different events. Around these few decisive words there are many paraphrases, as in real chains of thought.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

from appo.world.world import Event, Question, Scene, answer_of

OPENINGS = (
    "okay , let me watch the clip .",
    "hmm , let me see .",
    "well , i watch the whole video first .",
    "alright , i go through the frames .",
    "let me think about this one .",
    "so , many things move here .",
    "right , i scan the clip for the right moment .",
    "i need to find the right moment .",
    "first i scan the frames one by one .",
)
COMMITMENTS = (
    "i look at the {name} at {second} .",
    "i focus on the {name} at {second} .",
    "my eyes go to the {name} at {second} .",
    "what matters is the {name} at {second} .",
    "i stop at the {name} at {second} .",
)
REPORTS = {
    "colour": (
        "it is clearly {colour} .",
        "its colour is {colour} .",
        "i see that it looks {colour} .",
        "it shines {colour} there .",
    ),
    "shape": (
        "it is clearly the {shape} .",
        "its shape is the {shape} .",
        "i see the outline of the {shape} .",
        "there it is , the {shape} .",
    ),
    "first": (
        "it comes before the others asked about .",
        "nothing asked about came before it .",
        "it is the early one .",
        "it was there first .",
    ),
    "when": (
        "the clock bar says {second} .",
        "the bar shows {second} there .",
        "by the clock that is {second} .",
        "so the time is {second} .",
    ),
}
CHECKS = (
    "i check it again : the {colour} {shape} at {second} .",
    "once more : at {second} there is the {colour} {shape} .",
    "yes , the {shape} is {colour} and the clock says {second} .",
    "looking again , {colour} and {shape} , at {second} .",
)
WANDERERS = (
    "the {colour} {shape} drifts around all the time .",
    "the {colour} {shape} only wanders by .",
    "there is also one {colour} {shape} , but it does not matter .",
    "i ignore the {colour} {shape} that moves about .",
)
OTHERS = (
    "the {shape} at {second} is not it .",
    "another thing , the {shape} at {second} , is beside the point .",
    "i leave out the {shape} at {second} .",
)
FILLERS = (
    "the rest is only background .",
    "nothing else matters here .",
    "the other frames do not help .",
    "i am quite sure about that .",
    "that is all i need .",
)
ASIDES = (*OPENINGS, *FILLERS)
CONCLUSIONS = (
    "so the answer is {answer} .",
    "that settles it : {answer} .",
    "i will say {answer} .",
    "therefore {answer} .",
)


@dataclass(frozen=True)
class Style:
    """The style of a teacher's reasoning."""

    commits: bool = True  # names the event and its second before it reports anything
    asides: int = 0  # sentences without content before the report, each one of fourteen: their gradient is noise


COMMITTING = Style()


def respond(scene: Scene, question: Question, focus: int, rng: random.Random, style: Style = COMMITTING) -> str:
    """A response that names event number `focus` and reports, checks and answers what is there.

    `focus = question.target` is the honest teacher; any other the lazy one, consistent in its mistake.
    """
    event = scene.events[focus]
    answer = answer_of(event, question.task)
    name = f"{event.colour} one" if question.task == "shape" else event.shape
    words = asdict(event) | {"name": name, "answer": answer}
    parts = [
        rng.choice(OPENINGS),
        *[rng.choice(ASIDES) for _ in range(style.asides)],
        *([rng.choice(COMMITMENTS)] if style.commits else []),
        rng.choice(REPORTS[question.task]),
        *_remarks(scene, event, rng),
        rng.choice(CONCLUSIONS),
    ]
    reasoning = " ".join(part.format(**words) for part in parts)
    return f"<think> {reasoning} </think> <answer> {answer} </answer>"


def _remarks(scene: Scene, event: Event, rng: random.Random) -> list[str]:
    """Checks and descriptions between report and conclusion, in any order: three or four sentences."""
    remarks = [rng.choice(CHECKS).format(**asdict(event)), rng.choice(FILLERS)]
    if scene.distractors:
        distractor = rng.choice(scene.distractors)
        remarks.append(rng.choice(WANDERERS).format(colour=distractor.colour, shape=distractor.shape))
    others = [other for other in scene.events if other != event]
    if others and rng.random() < 0.4:
        other = rng.choice(others)
        remarks.append(rng.choice(OTHERS).format(**asdict(other)))
    elif rng.random() < 0.5:
        remarks.append(rng.choice(FILLERS))
    rng.shuffle(remarks)
    return remarks
