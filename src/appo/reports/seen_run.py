"""A run folder as a page can use it: whole, still being written or damaged. What is missing is said, nothing raises.

`appo.reports.run_folder` reads the same files strictly; here every line that is sound is worth showing.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appo.reports.jsonl import RecordError, parse_line
from appo.reports.run_folder import CONFIG, FRAMES, METRICS, ROLLOUTS, RolloutRecord

EVALUATION = "evaluation.json"
MOST_GROUPS = 200  # of a page («ours»: more than anybody looks through, and the page stays small)
NAMED_FAULTS = 3
LARGEST_FILM = 4_000_000  # bytes; a strip of frames has some ten thousand


@dataclass(frozen=True)
class SeenRun:
    """What could be read of a run.

    Attributes:
        name: of the run.
        settings: by name, those of all sections of config.json; {} if there are none.
        about: the rest of config.json: versions, command line, start.
        metrics: lines of metrics.jsonl.
        groups: of rollouts.jsonl, in order; at most `MOST_GROUPS`.
        films: pictures by the name that groups have for them.
        evaluation: evaluation.json; {} if there is none.
        notes: what is missing or damaged, one sentence each.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    groups: Sequence[RolloutRecord] = ()
    films: Mapping[str, bytes] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def see_run(path: str | os.PathLike[str], most_groups: int = MOST_GROUPS) -> SeenRun:
    """Read a run folder, or what is left of it.

    Raises:
        RecordError: there is no such folder, or nothing of a run is in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise RecordError(f"{folder}: no such folder; give the folder that a run wrote")
    notes: list[str] = []
    about = _about(folder / CONFIG, notes)
    metrics = [data for _, data in _lines(folder / METRICS, notes, "so there are no curves")]
    groups = list(_groups(folder / ROLLOUTS, notes, most_groups))
    if not (about or metrics or groups):
        missing = "; ".join(note.removesuffix(".").split(", so ")[0] for note in notes)
        raise RecordError(f"{folder}: no run folder ({missing}); give one that a run wrote")
    if groups and not any(response.frame_attention for group in groups for response in group.responses):
        notes.append("No attention was recorded: method grpo and dapo capture none, so nobody knows who looked where.")
    evaluation = _object(folder / EVALUATION, [], "")
    return SeenRun(
        name=folder.resolve().name,
        settings=_settings(about.get("config")),
        about={key: value for key, value in about.items() if key != "config"},
        metrics=metrics,
        groups=groups,
        films=_films(folder / FRAMES, groups, notes),
        evaluation=evaluation,
        notes=notes,
    )


def _about(file: Path, notes: list[str]) -> dict[str, Any]:
    """The config.json of a run; {} and a note for any other, such as a model's."""
    about = _object(file, notes, "so the settings are not known")
    if about and not isinstance(about.get("config"), dict):
        notes.append(f"{file.name} is not of a run (no `config` in it), so the settings are not known.")
        return {}
    return about


def _settings(config: Any) -> dict[str, Any]:
    """All settings side by side, whatever section of config.json they stand in."""
    sections = [value for value in config.values() if isinstance(value, dict)] if isinstance(config, dict) else []
    own = {key: value for key, value in (config or {}).items() if not isinstance(value, dict)} if sections else {}
    merged = own if sections else dict(config) if isinstance(config, dict) else {}
    for section in sections:
        merged = {**merged, **section}
    return merged


def _object(file: Path, notes: list[str], consequence: str) -> dict[str, Any]:
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


def _lines(file: Path, notes: list[str], consequence: str) -> Iterator[tuple[int, dict[str, Any]]]:
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
    _note_bad(file, bad, notes)


def _note_bad(file: Path, bad: Sequence[int], notes: list[str]) -> None:
    if bad:
        named = ", ".join(map(str, bad[:NAMED_FAULTS])) + (", …" if len(bad) > NAMED_FAULTS else "")
        lines = f"line {named} is no record and is"
        if len(bad) > 1:
            lines = f"{len(bad)} lines ({named}) are no records and are"
        notes.append(f"{file.name}: {lines} left out.")


def _groups(file: Path, notes: list[str], most: int) -> Iterator[RolloutRecord]:
    """The groups a page shows: all, or of more than `most` the questions met repeatedly and others evenly spaced."""
    keys = {number: _key(data) for number, data in _lines(file, notes, "so there are no groups to look at")}
    kept = _choice(keys, most)
    if len(kept) < len(keys):
        notes.append(f"{len(kept)} of {len(keys)} recorded groups are shown, evenly spaced over the run.")
    bad = []
    for number, data in _lines(file, [], ""):
        if number in kept:
            try:
                yield RolloutRecord.from_json(data)
            except (ValueError, OverflowError, AttributeError):
                bad.append(number)
    _note_bad(file, bad, notes)


def _key(data: Mapping[str, Any]) -> str:
    return repr((data.get("id"), data.get("question"), data.get("video")))[:2000]


def _choice(keys: Mapping[int, str], most: int) -> set[int]:
    counts = Counter(keys.values())
    again = [number for number, key in keys.items() if counts[key] > 1]
    once = [number for number, key in keys.items() if counts[key] == 1]
    again = _spaced(again, most)
    return {*again, *_spaced(once, most - len(again))}


def _spaced(numbers: Sequence[int], most: int) -> list[int]:
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[position * len(numbers) // most] for position in range(most)]


def _films(folder: Path, groups: Sequence[RolloutRecord], notes: list[str]) -> dict[str, bytes]:
    """The pictures that groups name. A name is only ever that of a file in this folder, whatever a record says."""
    films: dict[str, bytes] = {}
    names = {group.film for group in groups if group.film}
    for name in sorted(names):
        try:
            if Path(name).name == name and (folder / name).stat().st_size <= LARGEST_FILM:
                films[name] = (folder / name).read_bytes()
        except (OSError, ValueError):
            continue
    without = sum(group.film not in films for group in groups)
    if without:
        of = f"{without} of {len(groups)} groups"
        notes.append(f"{FRAMES}/ has no picture for {of}: their frames are shown as times only.")
    return films


def _short(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error).split(";")[0] or type(error).__name__)[:120]
