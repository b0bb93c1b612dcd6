"""tables: one table for the terminal, the log and the paper; progress with a rate and the time left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from appo.evaluation.tables import Sheet, answer_progress, duration

SHEET = Sheet("m on d", ["figure", "n", "strict"], [["a|b", "7", "57.1"], ["[bold]", "0", "-"]], ["100 % of [red] 7"])


def test_a_log_gets_markdown_of_any_width_and_a_terminal_a_table():
    log = Console(file=io.StringIO(), width=20, force_terminal=False)
    SHEET.print(log)
    assert log.file.getvalue() == SHEET.markdown()
    assert SHEET.markdown() == (
        "**m on d**\n\n| figure | n | strict |\n| --- | ---: | ---: |\n| a\\|b | 7 | 57.1 |\n| [bold] | 0 | - |\n"
        "\n- 100 % of [red] 7\n"
    )
    terminal = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    SHEET.print(terminal)
    shown = terminal.file.getvalue()
    assert all(cell in shown for row in SHEET.rows for cell in row), "brackets are no styles"
    assert "100 % of [red] 7" in shown
    assert "┃" in shown


def test_progress_reports_the_rate_and_the_time_left_of_this_run():
    times = iter([0.0, 10.0, 20.0, 30.0])
    console = Console(file=io.StringIO(), width=100)
    with answer_progress(console, 100, 40, clock=lambda: next(times)) as update:
        for done in (60, 61, 100):
            update(done)
    assert console.file.getvalue().splitlines() == [
        "answered 60 of 100: 2.00 questions/s, 20 s left",
        "answered 100 of 100: 2.00 questions/s, 0 s left",
    ]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (99, "99 s"), (100, "2 min"), (5999, "100 min"), (9000, "2.5 h")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said
