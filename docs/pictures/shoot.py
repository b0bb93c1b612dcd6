"""The README's pictures: the page of a run of the demo, as Chromium shows it. `python docs/pictures/shoot.py RUN`.

Needs the dev extra and a Chromium (`apt-get install chromium`); writes spotlight-light.webp and spotlight-dark.webp
beside itself.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from appo.reports.page import write_page
from appo.reports.run_folder import load_run

HERE = Path(__file__).parent
SIZE = {"width": 1240, "height": 1010}
TOP = 66  # pixels of the page's head that say nothing in a picture


def shoot(run: Path) -> None:
    """Write both pictures."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        page = write_page(Path(folder) / "page.html", [replace(load_run(run), name="appo demo")])
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        for scheme in ("light", "dark"):
            tab = browser.new_page(viewport=SIZE, device_scale_factor=1.5, color_scheme=scheme)
            tab.goto(page.as_uri())
            if scheme == "dark":  # a frame pointed at: its looks light up in the responses
                tab.locator(".stage").evaluate("stage => scrollTo(0, stage.getBoundingClientRect().top - 90)")
                tab.locator(".frame.event").first.hover()
            tab.wait_for_timeout(600)
            shot = tab.screenshot(clip={"x": 0, "y": TOP, "width": SIZE["width"], "height": SIZE["height"] - TOP})
            with Image.open(io.BytesIO(shot)) as picture:
                picture.save(HERE / f"spotlight-{scheme}.webp", quality=82, method=6)
            tab.close()
        browser.close()


if __name__ == "__main__":
    shoot(Path(sys.argv[1]))
