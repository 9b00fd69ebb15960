"""The report in a real Chromium, from the disk: it loads without a complaint, and everything on it can be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from chromium import needs_chromium, open_page
from playwright.sync_api import Browser, Page
from synthetic_run import make_run, similarity_result

from kinvec.reporting import SECTIONS, build_report
from kinvec.tasks import save_result

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_report(make_run(tmp_path_factory.mktemp("browser") / "run")).as_uri()


def background(page: Page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_the_page_loads_alone_and_without_a_complaint(browser: Browser, report: str) -> None:
    page, complaints = open_page(browser, report)
    assert page.locator("h1").inner_text().startswith("Better by")
    shown = page.eval_on_selector_all("nav[aria-label=Sections] a", "links => links.map(link => link.hash.slice(1))")
    assert {"scores", "curve", "queries", "data", "settings"} <= set(shown)
    for anchor, title, _ in (section for section in SECTIONS if section[0] in shown):
        assert page.locator(f"section#{anchor} h2").inner_text() == title
        assert page.locator(f"nav a[href='#{anchor}']").is_visible()
    assert page.locator("#scores tbody tr").count() == 3
    assert [url for url in complaints if not url.startswith("data:")] == []
    page.close()


def test_the_theme_follows_the_system_until_the_button_is_pressed(browser: Browser, report: str) -> None:
    light, _ = open_page(browser, report, color_scheme="light")
    dark, _ = open_page(browser, report, color_scheme="dark")
    colours = background(light), background(dark)
    assert colours[0] != colours[1]
    light.get_by_role("button", name="Dark theme").click()
    assert background(light) == colours[1]
    light.reload()
    assert background(light) == colours[1]
    light.get_by_role("button", name="Light theme").click()
    assert background(light) == colours[0]
    light.close()
    dark.close()


def test_the_page_fits_a_phone(browser: Browser, report: str) -> None:
    page, _ = open_page(browser, report, viewport={"width": 360, "height": 720})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    too_small = page.evaluate(
        """[...document.querySelectorAll('main *')].filter(e => e.children.length === 0 && e.textContent.trim()
           && e.checkVisibility() && parseFloat(getComputedStyle(e).fontSize) < 11).map(e => e.outerHTML)"""
    )
    assert too_small == []
    page.close()


def test_the_name_of_a_metric_stands_on_one_line(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for side, noise in (("base", 0.6), ("tuned", 0.2)):
        save_result(similarity_result(side, noise), run / "results" / side / "pairs")
    for width in (800, 1200):
        page, _ = open_page(browser, build_report(run).as_uri(), viewport={"width": width, "height": 800})
        lines = page.evaluate(
            """[...document.querySelectorAll('#scores tbody th')].map(th => {
                 const name = document.createRange(); name.selectNodeContents(th);
                 return [th.textContent, name.getClientRects().length]; })"""
        )
        assert ["pearson_cosine", 1] in lines and {count for _, count in lines} == {1}
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.close()


def test_everything_can_be_reached_by_keyboard(browser: Browser, report: str) -> None:
    page, _ = open_page(browser, report)
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert reached[0] == "skip"
    assert "theme" in reached
    curve = page.locator(".curve")
    curve.focus()
    resting = page.locator(".curve output").inner_text()
    page.keyboard.press("Home")
    assert page.locator(".curve output").inner_text().startswith("step 1 ·")
    page.keyboard.press("ArrowRight")
    assert page.locator(".curve output").inner_text().startswith("step 2 ·")
    page.keyboard.press("End")
    assert page.locator(".curve output").inner_text().startswith("step 120 ·")
    page.keyboard.press("Escape")
    assert page.locator(".curve output").inner_text() == resting
    page.close()


def test_the_pointer_reads_the_curve(browser: Browser, report: str) -> None:
    page, _ = open_page(browser, report)
    area = page.locator(".curve .area").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 20)
    assert page.locator(".curve output").inner_text().startswith("step 60 ·")
    assert page.locator(".curve .cursor").first.is_visible()
    page.close()


def test_dots_are_round_at_any_width(browser: Browser, report: str) -> None:
    """A stretched picture must not stretch what is drawn in it: a dot has no length and a fixed width."""
    for width in (360, 1400):
        page, _ = open_page(browser, report, viewport={"width": width, "height": 800})
        effect = page.evaluate("getComputedStyle(document.querySelector('.dot')).vectorEffect")
        assert effect == "non-scaling-stroke"
        page.close()
