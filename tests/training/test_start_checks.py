"""`appo train` before libraries are loaded: what is refused, how soon, and that nothing is left of it."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from appo.cli.main import main
from appo.training import setting_rules
from appo.training.start_checks import check_start

RECIPE = str(Path(__file__).parents[2] / "recipes" / "spotlight.yaml")
FILES = {
    "typo.yaml": "method: appo\nmax_wieght: 2\n",
    "trl.yaml": "method: appo\nreward_funcs: [accuracy]\n",
    "list.yaml": "- method\n",
    "rows.jsonl": "{}\n",
    "checkpoint-3/x": "",
    "used/x": "",
}
HELP = "`appo train --help` shows an example"
RENAMED = "it is TRL's name, write `rewards`, a list of names or of module:function"
MISTAKES = {
    "--max_wieght 2": "there is no setting --max_wieght; did you mean --max_weight?",
    "--top_frame 3": "there is no setting --top_frame; did you mean --top_frames?",
    "--top-frame=3": "there is no setting --top-frame; did you mean --top_frames?",
    "--no_shared_pre": "there is no setting --no_shared_pre; did you mean --no_shared_prefix?",
    "--tin": "there is no setting --tin; did you mean --tiny?",
    "--qqq 1": f"there is no setting --qqq; {HELP}",
    "--reward_funcs accuracy": f"there is no setting --reward_funcs; {RENAMED}",
    "--config typo.yaml": "typo.yaml: there is no setting `max_wieght`; did you mean `max_weight`?",
    "--config trl.yaml": f"trl.yaml: there is no setting `reward_funcs`; {RENAMED}",
    "--config list.yaml": "list.yaml: holds no settings; write `name: value` lines, as in recipes/spotlight.yaml",
    "recipe.yaml": "'recipe.yaml' stands behind no flag; a file of settings is given as --config FILE",
    "--max_weight heavy": "max_weight must be a number, got 'heavy'",
    "--video_fps=0": "video_fps must be above 0 frames a second, got 0.0",
    "--limit 0": "limit must be at least 1, got 0",
    "--method ppo": "method must be one of grpo, dapo, appo, sft, got 'ppo'",
    "--rewards accuracy accuracy": "rewards holds accuracy_reward more than once ('accuracy'): name each function once",
    "--level L9": "unknown level 'L9'; there are L1, L2, L3",
    "--dataset nextqa": "dataset nextqa is read from files: set `annotations` (and `videos`)",
    "--split val": "`videos` and `split` are about a dataset's files: set `annotations` as well, or leave them out",
    "--dataset x --annotations rows.jsonl": "unknown dataset 'x'; there are seed-bench-r1, ",
    "--dataset jsonl --annotations gone": "annotations gone: there is no such file or folder; correct the path",
    "--annotations rows.jsonl --videos gone": "videos gone: there is no such file or folder; correct the path",
    "--annotations rows.jsonl --response_format x": "response_format is 'x': it must be one of answer, ",
    "--model /nowhere/model": "model /nowhere/model: no such folder; give the folder that a model was saved to",
    "--output_dir used": "used: the run folder is not empty; choose another one, or move or delete this one",
    "--resume_from_checkpoint checkpoint-2": "checkpoint-2: cannot be resumed from: there is no such folder",
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_are_one_line_with_the_fix_and_leave_nothing(here, arguments, capsys):
    words = arguments.split()
    before = sorted(here.rglob("*"))
    config = [] if "--config" in words or not words[0].startswith("-") else ["--config", RECIPE]
    output = [] if "--output_dir" in words else ["--output_dir", "run"]
    assert main(["train", *words, *config, *output]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"appo: {MISTAKES[arguments]}"), error
    assert error.count("\n") == 1
    assert sorted(here.rglob("*")) == before


SOON = ["--max_wieght 2", "--config typo.yaml", "--model /nowhere/model", "--rewards no.such", "--output_dir used"]


@pytest.mark.parametrize("arguments", SOON)
def test_a_mistake_costs_less_than_three_seconds_of_processor_time(here, arguments):
    words = arguments.split()
    config = [] if "--config" in words else ["--config", RECIPE]
    heavy = "torch", "numpy", "transformers", "trl", "datasets"
    program = (
        "import sys; from appo.cli.main import main; main(sys.argv[1:]); "
        f"print([n for n in {heavy} if n in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", program, "train", *words, *config], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.stderr.startswith("appo: "), result.stderr
    assert result.stdout.strip() == "[]", "loaded for nothing"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


def test_a_reward_module_of_the_current_folder_is_found_by_the_installed_command(here):
    """PYTHONSAFEPATH: as for a console script, Python does not put the current folder on its path."""
    (here / "my_rewards.py").write_text("import helper_of_mine\n\ndef score(completions, **kwargs): return [0.0]\n")
    (here / "helper_of_mine.py").write_text("print('my code runs')\n")
    (here / "yaml.py").write_text("raise SystemError('a file of mine in the place of a library')\n")
    command = [
        sys.executable,
        "-P",
        "-m",
        "appo",
        "train",
        "--config",
        RECIPE,
        "--rewards",
        "my_rewards:score",
    ]
    result = subprocess.run([*command, "--model", "/nowhere/model"], capture_output=True, text=True)
    assert result.stdout == "my code runs\n"
    assert result.stderr.startswith("appo: model /nowhere/model: no such folder"), result.stderr


ALLOWED = [
    ["--config", RECIPE],
    ["--config", RECIPE, "--output_dir", "new", "--max-weight=1.5", "--no-shared-prefix", "--max_steps", "-1"],
    ["--instruction", "--answer in one word", "--shared_prefix", "--video_max_frames", "16", "--learning_rate", "1e-6"],
    ["--config", "own.yaml", "--threshold", "0.4"],
    ["--output_dir", "used", "--resume_from_checkpoint", "true"],
    ["--method", "sft", "--rewards", "not.imported"],
]


@pytest.mark.parametrize("words", ALLOWED, ids=" ".join)
def test_what_is_right_passes_in_every_spelling(here, words):
    (here / "own.yaml").write_text(
        "env: {A: 1}\nthreshold: 7\nvideo_max_frames: '16'\nlearning_rate: 1e-6\nlimit: null\n"
    )
    config = words[1] if words[0] == "--config" else None
    check_start(words[2:] if config else words, config)


def test_a_dry_run_does_not_look_for_the_files_it_replaces(here):
    (here / "big.yaml").write_text("model: /nowhere\ndataset: nextqa\nannotations: gone\nvideos: gone\nsplit: val\n")
    check_start([], "big.yaml", tiny=True)
    with pytest.raises(ValueError, match="--tiny sets model itself"):
        check_start(["--model", "x"], "big.yaml", tiny=True)


def test_the_run_folder_is_the_first_process_s_affair(here, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    check_start(["--output_dir", "used"])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="used: the run folder is not empty"):
        check_start(["--output_dir", "used"])


def test_unknown_names_are_left_to_the_parser_where_the_source_is_not_known(here, monkeypatch):
    monkeypatch.setattr(setting_rules, "_CLASSES", (("no_such_package", "x.py", "X", None),))
    check_start(["--of_another_version", "1"], RECIPE)
    with pytest.raises(ValueError, match="max_weight must be"):
        check_start(["--max-weight", "0"], RECIPE)


COMMANDS = {
    "demo --step 3": "--steps",
    "data check jsonl --annotations x --vid y": "--videos",
    "eval --mod spotlight": "--model",
    "plan --gpu-mem 24": "--gpu-memory",
    "compare --output x --method dapo": "--methods",
    "study --output x --perceive truth": "--perceiver",
    "spotlight --vide x.mp4": "--video",
    "replay run --proc 1": "--process",
}


@pytest.mark.parametrize("call", COMMANDS)
def test_no_command_takes_a_shortened_flag(call, capsys):
    assert main(call.split()) == 2
    assert f"did you mean {COMMANDS[call]}? `appo " in capsys.readouterr().err
