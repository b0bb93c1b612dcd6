"""Groups in a terminal: frames, heat maps of frame attention, and tokens coloured by their weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from appo.reports.group_view import ViewSettings, group_view
from appo.reports.page import page_data
from appo.reports.records import RolloutRecord
from appo.reports.run_folder import LoadedRun

GROUPS_PRINTED = 3  # of each run
MOST_TOKENS = 400  # of a response in a terminal
# Upper bounds of brightness and their colours, from the dark of the page's stage to its light.
_LIGHTS = ((8, "#1e1a14"), (25, "#4c2f14"), (45, "#7e4b18"), (65, "#ac681c"), (85, "#f6b73c"), (100, "#fff4d6"))
_SIGNS = {True: ("✓", "green"), False: ("✗", "red"), None: (" ", "")}


def print_runs(console: Console, runs: Sequence[LoadedRun]) -> None:
    """The most interesting groups of each run, each question at its last step; and notes on missing files."""
    data = page_data(runs)
    for number, run in enumerate(data["runs"]):
        for note in run["notes"]:
            console.print(Text(f"{run['name']}: {note}", style="yellow"))
        latest = {group["key"]: group for group in data["groups"] if group["run"] == number}
        for group in sorted(latest.values(), key=lambda one: -one["interest"])[:GROUPS_PRINTED]:
            change = ": won over" if group["won"] else ": lost" if group["lost"] else ""
            print_view(console, f"{run['name']}, step {group['step']}{change}", group)


def print_group(console: Console, title: str, record: RolloutRecord, settings: ViewSettings | None = None) -> None:
    """A recorded group: question, frames, heat map, and the weighted tokens of a winner and a loser."""
    print_view(console, title, group_view(record, settings or ViewSettings()))


def print_view(console: Console, title: str, group: Mapping[str, Any]) -> None:
    """A group of `group_view`."""
    console.rule(Text(title, style="bold"))
    gold = ("   answer  ", (group["answer"], "bold green")) if group["answer"] else ()
    console.print(Text.assemble("question  ", (group["question"], "bold"), *gold))
    console.print(Text.assemble("video     ", group["video"]))
    if group["times"]:
        console.print(_frame_line(group))
        for view in group["responses"]:
            console.print(_heat_line(view))
        console.print(_crucial_line(group))
    if group["judged"]:
        console.print(f"answers   {group['right']} of {group['judged']} right", highlight=False)
    for name, style, right in (("winner", "green", True), ("loser", "red", False), ("response", "", None)):
        found = next((view for view in group["responses"] if view["right"] is right), None)
        if found:
            console.print(Text.assemble((f"{name:<10}", style), _weighted_text(found)))


def _frame_line(group: Mapping[str, Any]) -> Text:
    """The frames by their seconds: crucial ones highlighted, true event frames in brackets."""
    line = Text("frames    ")
    for frame, time in enumerate(group["times"]):
        name = f"{frame + 1}" if time is None else f"{time:.1f}s"
        mark = f"[{name}]" if frame in (group["event"] or ()) else f" {name} "
        line.append(f"{mark:^7}", style="black on yellow" if frame in group["crucial"] else "dim")
        line.append(" ")
    return line


def _crucial_line(group: Mapping[str, Any]) -> Text:
    times = group["times"]
    names = (f"frame {frame + 1}" if times[frame] is None else f"{times[frame]:.1f}s" for frame in group["crucial"])
    line = Text(f"crucial: {', '.join(names) or 'none'}", style="dim")
    return line.append("; in brackets: where the answer is seen" if group["event"] else "")


def _heat_line(view: Mapping[str, Any]) -> Text:
    """A response's score for each frame, as blocks under the frames."""
    sign, style = _SIGNS[view["right"]]
    line = Text(f"{sign} {view['number']:<8}", style=style)
    for heat in view["heat"]:
        if heat is None:
            line.append(" " * 8)
            continue
        back = next(colour for bound, colour in _LIGHTS if heat <= bound)
        line.append(f"{heat:^7}", style=f"{'black' if heat > 45 else 'white'} on {back}").append(" ")
    return line


def _weighted_text(view: Mapping[str, Any]) -> Text:
    """The tokens of a response by their weight; perception tokens underlined."""
    text = Text(view["text"])
    chosen = set(view["chosen"])
    for number, token in enumerate(view["tokens"][:MOST_TOKENS]):
        level = view["weights"][number] - 100 if number < len(view["weights"]) else 0
        style = "bold black on yellow" if level > 35 else "yellow" if level > 5 else ""
        text.append(token, style=f"{style} underline" if number in chosen and style else style).append(view["gap"])
    if len(view["tokens"]) > MOST_TOKENS:
        text.append(f" … {len(view['tokens']) - MOST_TOKENS} more tokens", style="dim")
    return text
