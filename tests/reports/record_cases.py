"""A rollout record with everything awkward in it, shared by the tests of the run folder."""

from __future__ import annotations

from dataclasses import replace

from appo.reports.records import ResponseRecord, RolloutRecord

RESPONSE = ResponseRecord(
    text="<think>a</think><answer>B</answer>",
    tokens=["<think>", "\n", "é", "\u2028", "\ud800"],  # a lone half of a pair, as byte-level tokens can be
    weights=[1.0, 1.7, 1.25, 1.0, 1.0],
    chosen=[False, True, True, False, False],
    frame_attention=[[0.125, 1e-7], [0.5, 0.25], [0.0, 0.0], [1.0, 0.0], [0.0, 3.5e-20]],
    rewards={"accuracy": 1.0, "format": 0.0},
    advantage=-0.75,
)
RECORD = RolloutRecord(
    step=3,
    id="q1",
    video="clips/a.mp4",
    question="What\nfalls?",
    answer="B",
    kind="letter",
    timestamps=[0.25, 1.25],
    crucial_frames=[1],
    responses=[RESPONSE, replace(RESPONSE, frame_attention=[])],
    event_frames=[0, 1],
)
