"""The page in a real browser (headless Chromium through Playwright): pointer, keyboard, slider, numbers, no network."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appo.reports.group_view import LEVELS, clean
from appo.reports.page import write_page
from appo.reports.run_folder import LoadedRun, load_run
from tests.reports import page_cases
from tests.reports.page_cases import INJECTIONS, RECORDED

playwright = pytest.importorskip("playwright.sync_api", reason="needs the dev extra's playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Chromium refuses to run as root inside its own sandbox, and containers have little shared memory.
        arguments = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield launched
        launched.close()


@contextmanager
def opened(browser: Any, file: Path, **settings: Any) -> Iterator[Any]:
    """The page of a file. At the end nothing was logged, no error raised and nothing asked of the network."""
    context = browser.new_context(**{"viewport": {"width": 1400, "height": 1000}, **settings})
    tab = context.new_page()
    complaints: list[str] = []

    def meet(route: Any) -> None:
        if route.request.url == file.as_uri():
            route.continue_()
        else:
            complaints.append(f"asked for {route.request.url}")
            route.abort()

    tab.route("**/*", meet)
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("dialog", lambda dialog: complaints.append(dialog.message) or dialog.dismiss())
    tab.goto(file.as_uri())
    yield tab
    context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("page") / "spotlight.html", [load_run(RECORDED)])


@pytest.fixture(scope="module")
def data(recorded: Path) -> Any:
    return json.loads(recorded.with_suffix(".json").read_text())


@pytest.fixture
def tab(browser: Any, recorded: Path) -> Iterator[Any]:
    with opened(browser, recorded) as page:
        yield page


def film_of(data: Any) -> list[Any]:
    """The filmed question's groups by step: what the page shows first."""
    best = max(data["groups"], key=lambda group: group["interest"])
    return sorted((group for group in data["groups"] if group["key"] == best["key"]), key=lambda group: group["step"])


def looks(group: Any, response: Any, token: int) -> list[float]:
    return [(LEVELS.index(letter) / 63) ** 2 * group["peak"] for letter in response["looks"][token]]


def brightness(cell: Any) -> float:
    """Mean of red, green and blue as shown."""
    colour = cell.evaluate("cell => getComputedStyle(cell).backgroundColor")
    numbers = [float(part) for part in colour[4:-1].split(",")]
    return sum(numbers) / 3


def calm(tab: Any) -> None:
    tab.wait_for_timeout(500)  # colours fade for a third of a second


def test_the_first_group_is_on_screen_as_it_is_in_the_data(tab: Any, data: Any) -> None:
    group = film_of(data)[-1]
    assert tab.locator("h3.question").inner_text() == group["question"]
    assert f"{group['right']} of {group['judged']} right" in tab.locator(".gold").inner_text()
    assert tab.locator(".frame").count() == len(group["times"])
    lit = [i for i, one in enumerate(tab.locator(".frame").all()) if "crucial" in one.get_attribute("class").split()]
    seen = [i for i, one in enumerate(tab.locator(".frame").all()) if "event" in one.get_attribute("class").split()]
    assert (lit, seen) == (group["crucial"], group["event"])
    assert tab.locator(".card").count() == len(group["responses"])
    for card, response in zip(tab.locator(".card").all(), group["responses"], strict=True):
        assert card.locator(".token").all_inner_texts() == response["tokens"]
        assert card.locator(".chosen").count() == len(response["chosen"])
        parts = card.locator(".parts").inner_text().split()
        assert parts[parts.index("tokens") + 1] == str(response["length"])
        assert float(parts[parts.index("advantage") + 1]) == pytest.approx(response["advantage"], rel=0.01)
    pictures = tab.locator(".picture").evaluate_all("all => all.map(one => getComputedStyle(one).backgroundImage)")
    assert all(one.startswith('url("data:image/webp;base64,') for one in pictures)


def test_the_event_is_visibly_brighter_for_winners(tab: Any, data: Any) -> None:
    """On screen, at some step of the filmed question: the mean row of the winners outshines that of the losers."""
    slider, gaps = tab.locator("input[type=range]").first, []
    for at, group in enumerate(film_of(data)):
        slider.fill(str(at))
        calm(tab)
        for frame in group["event"] if group["meanHeat"]["right"] and group["meanHeat"]["wrong"] else ():
            shown = [brightness(tab.locator(f".mean.{side} .cell").nth(frame)) for side in ("right", "wrong")]
            gaps.append(shown[0] - shown[1])
    assert max(gaps) > 25, "of 255"


def test_a_cell_displays_its_number(tab: Any, data: Any) -> None:
    group = film_of(data)[-1]
    for row, frame in ((0, 0), (len(group["responses"]) - 1, 3)):
        tab.locator(".row.one").nth(row).locator(".cell").nth(frame).hover()
        said = tab.locator(".readout").inner_text()
        response = group["responses"][row]
        assert f"Response {response['number']}" in said
        assert float(said.split()[-1]) == pytest.approx(response["scores"][frame], rel=1e-2)


def test_pointing_at_a_token_lights_the_frames_it_attends_to(tab: Any, data: Any) -> None:
    group = film_of(data)[-1]
    response = group["responses"][0]
    token = max(range(response["length"]), key=lambda j: max(looks(group, response, j)))
    values = looks(group, response, token)
    tab.locator(".card").first.locator(".token").nth(token).hover()
    said = tab.locator(".readout").inner_text()
    assert f"weight {response['weights'][token] / 100:.2f}" in said
    time = group["times"][values.index(max(values))]
    assert f"looked most at {time:g} s" in said
    shown = tab.locator(".frame").evaluate_all("all => all.map(one => Number(one.style.getPropertyValue('--look')))")
    expected = [max(0, (value - group["floor"]) / (group["peak"] - group["floor"])) for value in values]
    assert shown == pytest.approx(expected, abs=1e-3)
    assert tab.locator(".speaking .label").inner_text().endswith(str(response["number"]))
    tab.mouse.move(5, 5)
    assert tab.locator(".glancing").count() == 0


def test_pointing_at_a_frame_lights_the_tokens_that_attend_to_it(tab: Any, data: Any) -> None:
    group = film_of(data)[-1]
    frame = group["event"][0]
    tab.locator(".frame").nth(frame).hover()
    for card, response in zip(tab.locator(".card").all(), group["responses"], strict=True):
        shown = card.locator(".token").evaluate_all(
            "all => all.map(one => Number(one.style.getPropertyValue('--look')))"
        )
        values = [looks(group, response, token)[frame] for token in range(response["length"])]
        glow = [max(0, (value - group["floor"]) / (group["peak"] - group["floor"])) for value in values]
        assert shown == pytest.approx(glow, abs=1e-3)
    assert "mean attention" in tab.locator(".readout").inner_text()
    tab.locator(".frame").nth(frame).click()
    tab.mouse.move(5, 5)
    assert tab.locator(".by-frame").count() == 1, "a click keeps it"
    assert tab.locator(".frame").nth(frame).get_attribute("aria-pressed") == "true"
    tab.keyboard.press("Escape")
    tab.locator("h1").click()
    assert tab.locator(".by-frame").count() == 0


def test_the_slider_is_a_film_of_training(tab: Any, data: Any) -> None:
    film = film_of(data)
    assert len(film) > 2
    slider = tab.get_by_label("Training step")
    slider.focus()
    tab.locator(".stage").evaluate("stage => (stage.dataset.same = 'yes')")
    for group in reversed(film[:-1]):
        tab.keyboard.press("ArrowLeft")
        assert tab.locator(".film output").inner_text() == (
            f"step {group['step']}: {group['right']} of {group['judged']} right"
        )
        assert tab.locator(".card").first.locator(".token").all_inner_texts() == group["responses"][0]["tokens"]
        tab.mouse.move(5, 5)
        tab.locator(".row.one .cell").first.hover()
        said = tab.locator(".readout").inner_text()
        assert float(said.split()[-1]) == pytest.approx(group["responses"][0]["scores"][0], rel=1e-2)
    assert tab.locator(".stage").get_attribute("data-same") == "yes", "repainted in place, so that light moves"
    tab.get_by_role("button", name="Play").click()
    playwright.expect(tab.locator(".film output")).to_contain_text(f"step {film[-1]['step']}:", timeout=30_000)


def test_everything_is_reached_by_keyboard(tab: Any, data: Any) -> None:
    group = film_of(data)[-1]
    tab.locator(".frame").first.focus()
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Frame 2,")
    assert f"{group['times'][1]:g} s" in tab.locator(".readout").inner_text()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.dataset.token") == "0", "one stop for all frames, one a response"
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.activeElement.dataset.token") == "3"
    assert f"“{group['responses'][0]['tokens'][3]}”" in tab.locator(".readout").inner_text()
    tab.keyboard.press("End")
    assert tab.evaluate("document.activeElement.dataset.token") == str(group["responses"][0]["length"] - 1)
    tab.locator(".entry").first.focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    assert tab.locator(".entry").nth(1).get_attribute("aria-current") == "true"


def test_the_list_is_filtered_and_sorted(tab: Any, data: Any) -> None:
    last = {group["key"]: group for group in sorted(data["groups"], key=lambda group: group["step"])}
    tests = {
        "won": lambda group: group["won"],
        "allWrong": lambda group: group["allWrong"],
        "mixed": lambda group: 0 < group["right"] < group["judged"],
        "filmed": lambda group: len(group["steps"]) > 1,
    }
    for name, test in tests.items():
        tab.get_by_label("Show").select_option(name)
        kept = [group for group in last.values() if test(group)]
        assert tab.locator(".entry").count() == len(kept)
        assert tab.locator(".choose .count").inner_text() == f"{len(kept)} of {len(last)} questions"
    tab.get_by_label("Show").select_option("all")
    for name, order in (("step", lambda group: group["step"]), ("spread", lambda group: -group["spread"])):
        tab.get_by_label("Sort").select_option(name)
        shown = tab.locator(".entry .question").all_inner_texts()
        assert shown == [group["question"] for group in sorted(last.values(), key=order)]


def test_curves_say_their_numbers_and_are_smoothed(tab: Any, data: Any) -> None:
    for name, curve in data["runs"][0]["curves"].items():
        figure = tab.locator(f'[data-curve="{name}"]')
        assert float(figure.locator(".value").inner_text()) == pytest.approx(curve["values"][-1], rel=1e-2)
        assert figure.locator("svg").get_attribute("aria-label") == curve["says"]
    figure = tab.locator('[data-curve="entropy"]')
    rough = figure.locator(".raw").get_attribute("d")
    tab.get_by_label("Smoothing").fill("0")
    assert figure.locator(".smooth").get_attribute("d") == rough
    tab.get_by_label("Smoothing").fill("0.9")
    assert figure.locator(".smooth").get_attribute("d") != rough
    figure.locator("svg").hover(position={"x": 1, "y": 20})
    assert figure.locator(".value").inner_text().endswith("step 1")
    assert f"{data['runs'][0]['levels'][0]['after']['mean']:.1f} %" in tab.locator(".level").first.inner_text()


def test_runs_lie_over_each_other(browser: Any, tmp_path: Path) -> None:
    runs = [load_run(RECORDED), replace(load_run(RECORDED), name="other")]
    with opened(browser, write_page(tmp_path / "both.html", runs)) as tab:
        assert tab.locator('[data-curve="reward"] .smooth').count() == 2
        whole = tab.locator(".entry").count()
        tab.locator(".choose select").nth(2).select_option("1")
        assert tab.locator(".entry").count() == whole / 2
        assert "other · " in tab.locator(".where").inner_text()


def test_hostile_texts_are_only_ever_text(browser: Any, tmp_path: Path) -> None:
    groups = []
    for number, text in enumerate(INJECTIONS.values()):
        one = replace(
            page_cases.group(1).responses[0], text=text, tokens=[text] * 12, rewards={"accuracy_reward": 1.0, text: 0.0}
        )
        same = {"id": text, "video": text, "question": text, "answer": text}
        groups += [page_cases.group(number * 10 + step, responses=[one], film="", **same) for step in (0, 1)]
    everything = " ".join(INJECTIONS.values())
    run = LoadedRun(everything, {"method": everything}, {"argv": [everything]}, [], groups, {}, {}, [everything])
    with opened(browser, write_page(tmp_path / "hostile.html", [run])) as tab:
        assert tab.locator("h1").inner_text().split() == clean(everything, 300).split()
        for entry in tab.locator(".entry").all():
            entry.click()
            question = tab.locator("h3.question").evaluate("one => one.textContent")
            assert question in {clean(text, 999) for text in INJECTIONS.values()}
            assert tab.locator(".token").first.evaluate("one => one.textContent") == question
            tab.locator(".token").first.hover()
        assert tab.evaluate("window.broken") is None
        assert tab.locator("script, img, svg[onload], style").count() == 3, "the page's own"


def test_a_partial_run_names_what_is_missing(browser: Any, tmp_path: Path) -> None:
    folder = page_cases.folder(tmp_path / "run", [page_cases.group(1)]).path
    (folder / "metrics.jsonl").write_bytes(b"")
    (folder / "config.json").unlink()
    with opened(browser, write_page(tmp_path / "a.html", [load_run(folder)])) as tab:
        assert "metrics.jsonl is empty" in tab.locator("#notes").inner_text()
        assert "config.json is missing" in tab.locator("#notes").inner_text()
        assert tab.locator(".card").count() == 4
        assert tab.locator("#lede").inner_text() == "1 recorded group"
    (folder / "rollouts.jsonl").write_text("{")
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    with opened(browser, write_page(tmp_path / "b.html", [load_run(folder)])) as tab:
        assert "No groups were recorded" in tab.locator("main").inner_text()


VIEWS = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark", "reduced_motion": "reduce"},
    "phone": {"viewport": {"width": 360, "height": 740}, "has_touch": True},
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_the_page_is_accessible(browser: Any, recorded: Path, view: dict[str, Any]) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the dev extra's axe")
    with opened(browser, recorded, **view) as tab:
        tab.locator(".frame.event").first.click()  # its looks stay lit
        calm(tab)
        found = axe.Axe().run(tab).response["violations"]
        serious = [one for one in found if one["impact"] in ("serious", "critical")]
        named = [(one["id"], node["html"][:160], node["failureSummary"]) for one in serious for node in one["nodes"]]
        assert named == []
        assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
