"""The README's picture: the head of a run's report, as Chromium shows it.

python scripts/demo_picture.py runs/demo/run docs/demo.png
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from kinvec.reporting import build_report

WIDTH, MARGIN = 1060, 20  # of the window, and around what is shown
STYLE = """
.bar, .scores tbody tr:nth-child(n + 5), #scores .lead { display: none !important }
.verdict { padding: 24px 0 16px !important } section { padding-top: 20px !important }
"""  # no navigation, and four metrics: the report has the others


def take(run: Path, picture: Path) -> None:
    """Draw the verdict and the table of scores of `run` into the PNG file `picture`."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        window = {"width": WIDTH, "height": 1400}
        page = browser.new_page(viewport=window, device_scale_factor=1.5, color_scheme="light")  # type: ignore[arg-type]
        page.goto(build_report(run).resolve().as_uri())
        page.add_style_tag(content=STYLE)
        first, last = (page.locator(place).first.bounding_box() for place in (".kicker", ".scores"))
        assert first and last
        top = first["y"] - MARGIN
        area = {"x": 0, "y": max(top, 0), "width": WIDTH, "height": last["y"] + last["height"] + MARGIN - top}
        page.screenshot(path=picture, clip=area, full_page=True)  # type: ignore[arg-type]
        browser.close()
    with Image.open(picture) as image:  # few colours: as a palette it is a third of the size
        few = image.convert("RGB").quantize(255)
    few.save(picture, optimize=True)


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
