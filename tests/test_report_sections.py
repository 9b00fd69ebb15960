"""Sections of the report beyond its tables: the map, the similarities, and what other parts have left in the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from chromium import needs_chromium, open_page
from playwright.sync_api import Browser
from scipy.stats import mannwhitneyu
from synthetic_run import make_run, search_result

from kinvec.contracts import Result
from kinvec.reporting import build_report, collect
from kinvec.reporting.maps import pictures, turn
from kinvec.reporting.similarities import similarities


def searched(seed: int = 0, turned: float = 0.0) -> Result:
    """A search whose queries and documents have places in the plane, turned by an angle and mirrored."""
    draws = np.random.default_rng(seed)
    result = search_result("m", draws.uniform(0.2, 0.8, 40))
    places = draws.normal(size=(80, 2)) @ [[np.cos(turned), np.sin(turned)], [np.sin(turned), -np.cos(turned)]]
    result.per_query |= {"pca_x": [None, *places[1:40, 0].tolist()], "pca_y": [None, *places[1:40, 1].tolist()]}
    result.documents |= {"pca_x": places[40:, 0].tolist(), "pca_y": places[40:, 1].tolist()}
    return result


def test_both_sides_show_the_same_texts_and_links_lead_to_what_is_relevant() -> None:
    base, tuned = searched(), searched(seed=1)
    tuned.documents["pca_x"][7] = None
    (found,) = pictures([[base, tuned]])
    before, after = found["methods"][0]["places"]
    assert len(before) == len(after) == len(found["texts"]) == len(found["group"]) == 39 + 39
    texts = [(found["texts"][query], found["texts"][document]) for query, document in found["links"]]
    assert ("query: how does thing 12 differ from thing 13", found["texts"][39 + 11]) in texts
    assert found["texts"][39 + 11].startswith("relevant document: Thing 12 is") and len(texts) == 38
    assert all(0 <= value <= 100 for side in (before, after) for place in side for value in place)


def test_a_picture_that_is_only_turned_and_mirrored_looks_the_same() -> None:
    (found,) = pictures([[searched(), searched(turned=2.0)]])
    before, after = (np.array(side) for side in found["methods"][0]["places"])
    assert np.abs(before - after).max() <= 0.11, "per cent, rounded to a tenth"
    cloud = np.random.default_rng(0).normal(size=(30, 2))
    assert turn(cloud @ [[0, 1], [1, 0]], cloud) == pytest.approx(cloud - cloud.mean(axis=0))


def test_results_without_places_have_no_map() -> None:
    assert pictures([[search_result("m", np.full(20, 0.5))] * 2]) == []


def test_the_histograms_hold_every_score_and_the_area_is_that_of_mann_and_whitney() -> None:
    draws = np.random.default_rng(3)
    sides = [search_result("m", draws.uniform(0, 1, 60)) for _ in range(2)]
    (found,) = similarities([sides])
    for side, result in zip(found["sides"], sides, strict=True):
        positives = [row[0] for row in result.per_query["judged_similarities"]]
        firsts = zip(result.per_query["top_ids"], result.per_query["top_scores"], strict=True)
        negatives = [
            next(score for key, score in zip(ids, scores, strict=True) if key != f"d{i}")
            for i, (ids, scores) in enumerate(firsts)
        ]
        assert sum(side["positives"]) == pytest.approx(1) == sum(side["negatives"])
        assert side["means"] == pytest.approx({"positives": np.mean(positives), "negatives": np.mean(negatives)})
        assert side["apart"] == pytest.approx(mannwhitneyu(positives, negatives).statistic / 60**2)


@needs_chromium
def test_pointing_at_a_text_marks_it_on_both_sides(browser: Browser, tmp_path: Path) -> None:
    from kinvec.tasks import save_result

    run = make_run(tmp_path / "run", evaluate=False)
    for side, seed in (("base", 0), ("tuned", 1)):
        save_result(searched(seed), run / "results" / side / "docs")
    (found,) = collect(run)["maps"]
    page, complaints = open_page(browser, build_report(run).as_uri())
    pictures_shown = page.locator(".map svg")
    pictures_shown.last.scroll_into_view_if_needed()
    box = pictures_shown.last.bounding_box()
    assert box is not None
    places = np.array(found["methods"][0]["places"][1])
    lonely = int(np.argmax([np.sort(np.linalg.norm(places - place, axis=1))[1] for place in places]))
    x, y = places[lonely] / 100
    page.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] * y)
    assert page.locator(".map output").inner_text() == found["texts"][lonely]
    for n, picture in enumerate(pictures_shown.all()):
        x, y = found["methods"][0]["places"][n][lonely]
        assert picture.locator(".mark").get_attribute("d") == f"M{x:g} {y:g}h0"
    page.mouse.move(0, 0)
    page.locator(".map").focus()
    page.keyboard.press("Home")
    assert page.locator(".map output").inner_text() == found["texts"][0]
    assert page.locator(".map .link").first.get_attribute("d") != ""
    page.keyboard.press("ArrowRight")
    assert page.locator(".map output").inner_text() == found["texts"][1]
    page.keyboard.press("Escape")
    assert page.locator(".map .mark").first.get_attribute("d") == ""
    assert [text for text in complaints if not text.startswith("data:")] == []
