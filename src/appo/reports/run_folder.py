"""The run folder: settings, metrics and recorded groups of a run; all plain text, all append-only.

    config.json      settings, versions, commit, command line, start: enough to run it again
    metrics.jsonl    one JSON object per logging step
    rollouts.jsonl   one JSON object per group: see `RolloutRecord`
    faults.jsonl     one JSON object per row whose video could not be read: see `appo.training.faults`
    resumes.jsonl    one JSON object per resume: from which checkpoint, and how
    frames/          the frames of recorded groups, one WebP picture (`appo.video.thumbnails`) per video

A run may be killed at any moment, so every line is written at once, and a torn last line is tolerated. `RunFolder`
raises `RecordError` for any other damage, with file and line; `load_run` reads for pages and leaves damaged lines out.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from appo.files import atomic_write
from appo.reports.jsonl import (
    RecordError,
    append_line,
    check_unused,
    cut,
    damaged,
    parse_line,
    read_lines,
    reason,
    sync,
    unwritable,
)
from appo.reports.records import RolloutRecord, as_json

CONFIG, METRICS, ROLLOUTS, FRAMES = "config.json", "metrics.jsonl", "rollouts.jsonl", "frames"
RESUMES, FAULTS, EVALUATION = "resumes.jsonl", "faults.jsonl", "evaluation.json"
PAGE = "spotlight.html"  # where `appo spotlight RUN` writes
PACKAGES = ("appo", "torch", "transformers", "trl", "accelerate", "av")
MOST_GROUPS = 200  # of a page, which stays small (not in the paper)
MAX_NAMED_LINES = 3
LARGEST_FILM = 4_000_000  # bytes; a picture of frames has some ten thousand


@dataclass(frozen=True)
class RunFolder:
    """A run's folder; get one by `RunFolder.create` or `RunFolder.open`."""

    path: Path

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any]) -> RunFolder:
        """Start a run in a new or empty folder and write its config.json.

        Raises:
            RecordError: the folder holds something already, or cannot be written.
        """
        folder = cls(Path(path))
        check_unused(folder.path)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            text = json.dumps(as_json(describe_run(config)), indent=2, allow_nan=False) + "\n"
            folder.frames.mkdir()
            atomic_write(folder.path / CONFIG, text)
        except OSError as error:
            raise unwritable(folder.path, error) from error
        return folder

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """A run that `create` started. Raises RecordError if its config.json is missing or damaged."""
        folder = cls(Path(path))
        folder.describe()
        return folder

    @classmethod
    def resume(
        cls, path: str | os.PathLike[str], config: Mapping[str, Any], may_differ: Set[str] = frozenset()
    ) -> RunFolder:
        """A run that `create` started, to resume it. `may_differ`: settings that do not change the run's numbers.

        Raises:
            RecordError: there is no run, or another setting differs from `config`; each is named.
        """
        folder = cls.open(path)
        changed = list(_differences(folder.config, as_json(config), may_differ))
        if changed:
            problem = "; ".join(changed)
            raise RecordError(f"{folder.path}: {problem}; a resumed run keeps its settings: give the old ones")
        return folder

    @property
    def frames(self) -> Path:
        """The folder of pictures."""
        return self.path / FRAMES

    @property
    def config(self) -> dict[str, Any]:
        """The settings given to `create`."""
        return dict(self.describe()["config"])

    def describe(self) -> dict[str, Any]:
        """All of config.json: ``config, versions, git_commit, argv, started, platform``."""
        file = self.path / CONFIG
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(data["config"], dict):
                raise ValueError("no settings")
        except OSError as error:
            problem = f"no run folder ({CONFIG}: {reason(error)})"
            raise RecordError(f"{self.path}: {problem}; give the folder that a run wrote") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RecordError(f"{file}: damaged ({error}); restore it from a copy") from error
        return dict(data)

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write one line of metrics.jsonl; what is not finite becomes null. Raises RecordError."""
        append_line(self.path / METRICS, as_json(metrics))

    def append_rollout(self, record: RolloutRecord) -> None:
        """Write one line of rollouts.jsonl. Raises RecordError."""
        append_line(self.path / ROLLOUTS, record.to_json())

    def save_film(self, picture: bytes) -> str:
        """Put a picture into ``frames/``, equal ones once; returns its name, "" for none. Raises RecordError."""
        if not picture:
            return ""
        file = self.frames / f"{hashlib.sha256(picture).hexdigest()[:16]}.webp"
        try:
            if not file.exists():
                self.frames.mkdir(exist_ok=True)
                atomic_write(file, picture)
        except OSError as error:
            raise unwritable(file, error) from error
        return file.name

    def append_resume(self, config: Mapping[str, Any], start: str | None) -> None:
        """Write one line of resumes.jsonl: what `create` writes of a run, and the checkpoint it is resumed from."""
        append_line(self.path / RESUMES, {"from": start, **as_json(describe_run(config))})

    def sizes(self) -> dict[str, int]:
        """Bytes of the records, synced to the disk: those that belong to a checkpoint."""
        return {name: sync(self.path / name) for name in (METRICS, ROLLOUTS, FAULTS)}

    def rewind(self, sizes: Mapping[str, int]) -> None:
        """Remove what was recorded since `sizes`; {} removes everything. Raises RecordError."""
        for name in (METRICS, ROLLOUTS, FAULTS):
            cut(self.path / name, sizes.get(name, 0))

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl, [] before the first. A torn last line is a `TornLineWarning`."""
        return [data for _, data in read_lines(self.path / METRICS)]

    def read_rollouts(self) -> Iterator[RolloutRecord]:
        """The groups of rollouts.jsonl one by one. A torn last line is a `TornLineWarning`."""
        file = self.path / ROLLOUTS
        for number, data in read_lines(file):
            try:
                record = RolloutRecord.from_json(data)
            except ValueError as error:
                raise damaged(file, number, str(error)) from error
            yield record


def describe_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings and what else decides a run's result."""
    return {
        "config": config,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git_commit": _git_commit(),
        "argv": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
    }


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], may_differ: Set[str]) -> Iterator[str]:
    """What is another value now, among settings that both sides have (others come and go with versions)."""
    for name in old:
        if name in may_differ or name not in new:
            continue
        if isinstance(old[name], Mapping) and isinstance(new[name], Mapping):
            yield from _differences(old[name], new[name], may_differ)
        elif old[name] != new[name]:
            yield f"{name} was {old[name]!r} and is {new[name]!r}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit checked out in the current directory, None outside of git."""
    try:
        return subprocess.check_output(
            ["git", "rev-parse", "--verify", "HEAD"], stderr=subprocess.DEVNULL, text=True, timeout=10
        ).strip()
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


# --- a run for a page: whole, still being written or damaged ----------------------------------------------------------


@dataclass(frozen=True)
class LoadedRun:
    """What could be read of a run."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)  # by name, those of all sections of config.json
    about: Mapping[str, Any] = field(default_factory=dict)  # the rest of config.json: versions, command line, start
    metrics: Sequence[Mapping[str, Any]] = ()  # lines of metrics.jsonl
    groups: Sequence[RolloutRecord] = ()  # of rollouts.jsonl, in order
    films: Mapping[str, bytes] = field(default_factory=dict)  # pictures by the name that groups have for them
    evaluation: Mapping[str, Any] = field(default_factory=dict)  # evaluation.json
    notes: Sequence[str] = ()  # what is missing or damaged, one sentence each


def load_run(path: str | os.PathLike[str], most_groups: int = MOST_GROUPS) -> LoadedRun:
    """Read a run folder, or what is left of it; what is missing or damaged becomes a note.

    Raises:
        RecordError: there is no such folder, or nothing of a run is in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise RecordError(f"{folder}: no such folder; give the folder that a run wrote")
    notes: list[str] = []
    about = _read_object(folder / CONFIG, notes, "so the settings are not known")
    if about and not isinstance(about.get("config"), dict):
        notes.append(f"{CONFIG} is not of a run (no `config` in it), so the settings are not known.")
        about = {}
    metrics = [data for _, data in _sound_lines(folder / METRICS, notes, "so there are no curves")]
    groups = list(_read_groups(folder / ROLLOUTS, notes, most_groups))
    if not (about or metrics or groups):
        missing = "; ".join(note.removesuffix(".").split(", so ")[0] for note in notes)
        raise RecordError(f"{folder}: no run folder ({missing}); give one that a run wrote")
    if groups and not any(response.frame_attention for group in groups for response in group.responses):
        notes.append("No attention was recorded: method grpo and dapo capture none, so there is no heat map.")
    return LoadedRun(
        name=folder.resolve().name,
        settings=_flat(about.pop("config", {})),
        about=about,
        metrics=metrics,
        groups=groups,
        films=_read_films(folder / FRAMES, groups, notes),
        evaluation=_read_object(folder / EVALUATION, [], ""),
        notes=notes,
    )


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings side by side, whatever section of config.json they stand in."""
    merged = {name: value for name, value in config.items() if not isinstance(value, dict)}
    for section in config.values():
        merged |= section if isinstance(section, dict) else {}
    return merged


def _read_object(file: Path, notes: list[str], consequence: str) -> dict[str, Any]:
    """A file that holds one JSON object; {} and a note if it does not."""
    try:
        data = json.loads(file.read_bytes())
        if not isinstance(data, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        notes.append(f"{file.name} is missing, {consequence}.")
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{file.name} is damaged ({_short(error)}), {consequence}.")
    else:
        return data
    return {}


def _sound_lines(file: Path, notes: list[str], consequence: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The sound lines of a file with their numbers; one note for what is missing, one for what is damaged."""
    bad: list[int] = []
    count = 0
    try:
        with file.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                if not line.strip():
                    continue
                count += 1
                data = parse_line(line)
                if data is None:
                    bad.append(number)
                else:
                    yield number, data
    except FileNotFoundError:
        notes.append(f"{file.name} is missing, {consequence}.")
        return
    except OSError as error:
        notes.append(f"{file.name} cannot be read further ({_short(error)}).")
    if not count:
        notes.append(f"{file.name} is empty, {consequence}.")
    _note_bad_lines(file, bad, notes)


def _note_bad_lines(file: Path, bad: Sequence[int], notes: list[str]) -> None:
    if bad:
        named = ", ".join(map(str, bad[:MAX_NAMED_LINES])) + (", …" if len(bad) > MAX_NAMED_LINES else "")
        lines = f"line {named} is no record and is"
        if len(bad) > 1:
            lines = f"{len(bad)} lines ({named}) are no records and are"
        notes.append(f"{file.name}: {lines} left out.")


def _read_groups(file: Path, notes: list[str], most: int) -> Iterator[RolloutRecord]:
    """All groups; of more than `most`, those of repeated questions first, and the others evenly spaced."""
    lines = _sound_lines(file, notes, "so there are no groups")
    keys = {number: repr([data.get(key) for key in ("id", "question", "video")])[:2000] for number, data in lines}
    counts = Counter(keys.values())
    repeated = _evenly_spaced([number for number, key in keys.items() if counts[key] > 1], most)
    once = [number for number, key in keys.items() if counts[key] == 1]
    chosen = {*repeated, *_evenly_spaced(once, most - len(repeated))}
    if len(chosen) < len(keys):
        notes.append(f"{len(chosen)} of {len(keys)} recorded groups are shown, evenly spaced over the run.")
    bad = []
    for number, data in _sound_lines(file, [], ""):
        if number in chosen:
            try:
                yield RolloutRecord.from_json(data)
            except (ValueError, OverflowError, AttributeError):
                bad.append(number)
    _note_bad_lines(file, bad, notes)


def _evenly_spaced(numbers: Sequence[int], most: int) -> list[int]:
    count = min(len(numbers), most)
    return [numbers[position * len(numbers) // count] for position in range(count)]


def _read_films(folder: Path, groups: Sequence[RolloutRecord], notes: list[str]) -> dict[str, bytes]:
    """The pictures that groups name. A name is only ever that of a file in this folder, whatever the record."""
    films: dict[str, bytes] = {}
    for name in sorted({group.film for group in groups if group.film}):
        try:
            if Path(name).name == name and (folder / name).stat().st_size <= LARGEST_FILM:
                films[name] = (folder / name).read_bytes()
        except (OSError, ValueError):
            continue
    if without := sum(group.film not in films for group in groups):
        of = f"{without} of {len(groups)} groups"
        notes.append(f"{FRAMES}/ has no picture for {of}: their frames are times only.")
    return films


def _short(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error).split(";")[0] or type(error).__name__)[:120]
