"""The names of settings, read from source, are those of the parser that is made of the classes."""

from __future__ import annotations

import pytest

from appo import APPOConfig
from appo.training import setting_rules
from appo.training.arguments import OneLineParser, TrainScript
from appo.training.setting_rules import meant, setting_flags


def test_the_flags_read_from_source_are_those_of_the_parser():
    """Whatever version of transformers and TRL is installed."""
    parser = OneLineParser((TrainScript, APPOConfig))
    expected = {flag: action.dest for flag, action in parser._option_string_actions.items()}
    del expected["-h"], expected["--help"]
    assert setting_flags() == expected


@pytest.mark.parametrize(
    ("place", "other"),
    [
        (0, ("transformers", "training_args.py", "GoneArguments", None)),
        (0, ("transformers", "gone.py", "TrainingArguments", None)),
        (0, ("no_such_package", "training_args.py", "TrainingArguments", None)),
        (2, ("trl", "trainer/grpo_config.py", "GRPOConfig", "TrainingArguments")),
        (4, ("appo", "adapters.py", "AdapterSettings", "Other")),
    ],
)
def test_source_that_is_not_as_it_was_is_not_trusted(monkeypatch, place, other):
    """Then the names are left to the parser: slower, but no setting is refused that there is."""
    classes = list(setting_rules._CLASSES)
    classes[place] = other
    monkeypatch.setattr(setting_rules, "_CLASSES", tuple(classes))
    assert setting_flags() is None


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("--top_frame", "--top_frames"),
        ("--top-frame", "--top_frames"),
        ("--max_wieght", "--max_weight"),
        ("--max_w", "--max_weight"),
        ("--colour", ""),
    ],
)
def test_what_is_meant(word, name):
    assert meant(word, ["--top_frames", "--max_weight", "--max_weight_decay"]) == name
