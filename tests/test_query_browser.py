"""The query browser: its data are the results', and in a real Chromium a reader finds, filters and opens them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from chromium import needs_chromium, open_page
from playwright.sync_api import Browser, Page
from synthetic_run import IMAGE, QUERIES, SCRIPT, make_run, search_result, similarity_result

from kinvec import tasks
from kinvec.contracts import Result
from kinvec.reporting import build_report
from kinvec.reporting.browser import browse
from kinvec.reporting.rendering import embed

LIMIT = 15_000_000  # bytes of a page


def both(queries: int = QUERIES, seed: int = 0) -> tuple[Result, Result]:
    draws = np.random.default_rng(seed)
    base = draws.uniform(0.2, 0.8, queries)
    return search_result("base", base), search_result("tuned", np.clip(base + draws.normal(0.05, 0.2, queries), 0, 1))


def test_the_data_are_those_of_both_results_joined_by_id() -> None:
    base, tuned = both()
    turned = {name: column[::-1] for name, column in tuned.per_query.items()}
    tuned.per_query = turned
    found = browse([[base, tuned]], ("Before", "After"))
    assert found is not None
    task = found["tasks"][0]
    row = 17
    there = turned["id"].index("q17")
    assert task["ids"][row] == "q17" and task["queries"][row] == base.per_query["query"][row]
    assert task["values"][1][row] == pytest.approx(turned["nDCG@10"][there], abs=1e-6)
    ids, texts = task["documents"]["ids"], task["documents"]["texts"]
    assert [ids[n] for n in task["top"][1][row]] == turned["top_ids"][there]
    assert [[ids[n], grade] for n, grade in task["relevant"][row]] == [["d17", 1]], "judged 0 is not relevant"
    assert texts[ids.index("d17")].startswith("Thing 17 is")
    assert len(set(ids)) == len(ids)


def test_documents_are_cut_shorter_before_a_query_is_left_out() -> None:
    base, tuned = both(300)
    whole = browse([[base, tuned]], ("a", "b"))
    less = browse([[base, tuned]], ("a", "b"), room=int(0.9 * len(embed(whole).encode())))
    assert whole is not None and less is not None
    assert less["tasks"][0]["ids"] == whole["tasks"][0]["ids"]
    texts = zip(less["tasks"][0]["documents"]["texts"], whole["tasks"][0]["documents"]["texts"], strict=True)
    assert all(len(short) < len(long) and long.startswith(short.removesuffix(" …")) for short, long in texts)


def test_where_all_queries_do_not_fit_they_are_spread_evenly() -> None:
    base, tuned = both(2000)
    whole = len(embed(browse([[base, tuned]], ("a", "b"))).encode())
    found = browse([[base, tuned]], ("a", "b"), room=whole // 4)
    assert found is not None
    task = found["tasks"][0]
    assert 0.8 * (whole // 4) < len(embed(task).encode()) <= whole // 4 and task["total"] == 2000
    rows = [int(identity[1:]) for identity in task["ids"]]
    assert (rows[0], rows[-1]) == (0, 1999)
    assert max(np.diff(rows)) - min(np.diff(rows)) <= 1


def test_what_is_embedded_cannot_leave_its_script_and_comes_back() -> None:
    hostile = {"a": [SCRIPT, IMAGE, "]]> & \u2028 \u2029 'quoted' \"twice\" 漢字", None, 1.5]}
    text = embed(hostile)
    assert json.loads(text) == hostile
    assert not set("<>&\u2028\u2029") & set(text) and "漢字" in text
    with pytest.raises(ValueError, match="JSON"):
        embed([float("nan")])


def test_pairs_show_the_columns_of_their_table() -> None:
    found = browse([[similarity_result("base", 0.6), similarity_result("tuned", 0.2)]], ("Before", "After"))
    assert found is not None
    facts = {fact["name"]: fact["values"] for fact in found["tasks"][0]["facts"]}
    assert set(facts) == {"second", "score", "cosine"}
    assert len(facts["score"]) == 1 and len(facts["cosine"]) == 2, "what both say is there once"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("queries") / "run")
    build_report(folder)
    return folder


@pytest.fixture
def page(browser: Browser, run: Path) -> Page:
    page, _ = open_page(browser, (run / "report.html").as_uri())
    return page


def rows(page: Page) -> list[str]:
    return page.locator("#queries .query .text").all_inner_texts()


def results_of(run: Path) -> tuple[Result, Result]:
    base, tuned = (tasks.load_result(run / "results" / side / "docs") for side in ("base", "tuned"))
    return base, tuned


@needs_chromium
def test_the_search_finds_and_the_right_documents_are_shown(page: Page, run: Path) -> None:
    base, tuned = results_of(run)
    page.get_by_role("searchbox").fill("THING 41 from differ")
    assert sorted(rows(page)) == ["how does thing 40 differ from thing 41", "how does thing 41 differ from thing 42"]
    page.locator("#queries .query").filter(has_text="thing 42").click()
    sides = page.locator("#queries .detail .sides > div")
    for side, result in zip(sides.all(), (base, tuned), strict=True):
        shown = [item.get_attribute("title") for item in side.locator("li").all()]
        assert shown == result.per_query["top_ids"][41]
        marked = [item.get_attribute("title") for item in side.locator("li.relevant").all()]
        assert marked == [document for document in shown if document == "d41"]
        assert f"Thing {shown[0][1:]} is" in side.locator("li").first.inner_text()
    page.get_by_role("searchbox").fill("q41")
    assert rows(page) == ["how does thing 41 differ from thing 42"], "an id is found as well"
    page.get_by_role("searchbox").fill("nowhere to be found")
    assert rows(page) == [] and "0 queries" in page.locator("[data-part=found]").inner_text()


@needs_chromium
def test_documents_that_moved_say_so(page: Page, run: Path) -> None:
    base, tuned = (result.per_query["top_ids"] for result in results_of(run))
    risen = next(i for i in range(QUERIES) if base[i][1] == tuned[i][0] == f"d{i}")
    fallen = next(i for i in range(QUERIES) if base[i][1] == tuned[i][2] == f"d{i}")
    entered = next(i for i in range(QUERIES) if f"d{i}" not in base[i] and f"d{i}" in tuned[i])
    for query, before, after in ((risen, "then 1.", "▲ 1"), (fallen, "then 3.", "▼ 1"), (entered, None, "new")):
        page.get_by_role("searchbox").fill(f"q{query}")
        page.locator("#queries .query").filter(has_text=f"thing {query} differ").click()
        left, right = (side.locator("li.relevant .moved") for side in page.locator(".detail .sides > div").all())
        assert left.all_inner_texts() == ([before] if before else []) and right.all_inner_texts() == [after]


@needs_chromium
def test_filters_and_orders_are_those_of_the_values(page: Page, run: Path) -> None:
    base, tuned = (np.array(result.per_query["nDCG@10"]) for result in results_of(run))
    gain = tuned - base
    for name, of in (("Won", gain > 0), ("Lost", gain < 0), ("Unchanged", gain == 0)):
        page.get_by_text(name, exact=False).locator("visible=true").locator(
            "xpath=ancestor-or-self::label"
        ).first.click()
        assert page.locator("[data-part=found]").inner_text().startswith(f"{of.sum()} queries")
        assert page.locator(f"#queries .chips label:has-text('{name}') small").inner_text() == str(of.sum())
    page.locator("#queries .chips label:has-text('All')").click()
    for order, best in (("lost", gain.argmin()), ("won", gain.argmax()), ("change", abs(gain).argmax()), ("order", 0)):
        page.locator("[data-part=sort]").select_option(order)
        assert rows(page)[0].startswith(f"how does thing {best} differ")
    page.get_by_role("button", name="Next →").click()
    assert rows(page)[0].startswith("how does thing 20 differ") and len(rows(page)) == 20


@needs_chromium
def test_the_keyboard_searches_moves_and_opens(page: Page) -> None:
    page.locator("[data-part=sort]").select_option("order")
    page.locator("[data-part=sort]").blur()
    focused = "document.activeElement.innerText"
    page.keyboard.press("/")
    page.keyboard.type("thing 7")
    assert page.get_by_role("searchbox").input_value() == "thing 7"
    page.keyboard.press("ArrowDown")
    assert "thing 6 differ" in page.evaluate(focused)
    page.keyboard.press("j")
    assert "thing 7 differ" in page.evaluate(focused)
    page.keyboard.press("Enter")
    assert page.locator("#queries [aria-expanded=true]").count() == 1 and page.locator(".detail").is_visible()
    assert "thing 7 differ" in page.evaluate(focused), "what was opened keeps the focus"
    page.keyboard.press("ArrowUp")
    assert "thing 6 differ" in page.evaluate(focused)
    page.keyboard.press("Escape")
    assert page.locator(".detail").count() == 0
    page.keyboard.press("/")
    page.keyboard.press("Backspace")
    page.keyboard.press("Enter")
    for _ in range(20):
        page.keyboard.press("j")
    assert "thing 20 differ" in page.evaluate(focused), "moving on turns the page"
    page.keyboard.press("k")
    assert "thing 19 differ" in page.evaluate(focused), "and back"


@needs_chromium
def test_hostile_texts_are_shown_and_never_run(browser: Browser, run: Path) -> None:
    page, complaints = open_page(browser, (run / "report.html").as_uri())
    page.get_by_role("searchbox").fill("alert")
    page.locator("#queries .query").click()
    assert rows(page) == [" ".join(SCRIPT.split("\u2028"))] or SCRIPT.split("\u2028")[0] in rows(page)[0]
    assert IMAGE[:30] in page.locator(".detail").inner_text()
    assert page.locator("#queries img").count() == 0
    assert [text for text in complaints if not text.startswith("data:")] == []


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_reads_it_in_both_themes(browser: Browser, run: Path, scheme: str) -> None:
    page, _ = open_page(
        browser, (run / "report.html").as_uri(), viewport={"width": 360, "height": 720}, color_scheme=scheme
    )
    page.locator("#queries .query").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    low = page.evaluate(CONTRAST)
    assert low == [], "text stands out from what is behind it by 4.5 : 1 (WCAG AA)"


CONTRAST = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = numbers(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const light = (colour) => {
    const linear = (v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const [r, g, b] = colour.slice(0, 3).map((v) => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  return [...document.querySelectorAll("#queries *")]
    .filter((e) => e.children.length === 0 && e.textContent.trim() && !e.closest("option, .unseen"))
    .filter((e) => e.checkVisibility())
    .map((e) => [light(numbers(getComputedStyle(e).color)), light(behind(e)), e.outerHTML])
    .filter(([a, b]) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5).map((found) => found[2]);
}"""


@needs_chromium
def test_ten_thousand_queries_stay_small_and_few_nodes_stand_for_them(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluate=False)
    base, tuned = both(10_000)
    for side, result in (("base", base), ("tuned", tuned)):
        tasks.save_result(result, run / "results" / side / "docs")
    path = build_report(run)
    assert path.stat().st_size <= LIMIT
    page, _ = open_page(browser, path.as_uri())
    assert page.evaluate("document.querySelectorAll('*').length") < 6000
    won = int(np.sum(np.array(tuned.per_query["nDCG@10"]) > np.array(base.per_query["nDCG@10"])))
    page.locator("#queries .chips label:has-text('Won')").click()
    assert page.locator("[data-part=found]").inner_text().startswith(f"{won:,} queries")
    page.get_by_role("searchbox").fill("thing 9999 ")
    assert len(rows(page)) == len(
        [i for i in (9998, 9999) if tuned.per_query["nDCG@10"][i] > base.per_query["nDCG@10"][i]]
    )
