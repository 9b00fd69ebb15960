"""Sections of the report beyond its tables: the map, the similarities, and what other parts have left in the run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from chromium import needs_chromium, open_page
from playwright.sync_api import Browser
from scipy.stats import mannwhitneyu
from synthetic_run import make_run, search_result, similarity_result
from test_reporting import parse
from tiny_models import WORDS

from kinvec import Embedder, tasks
from kinvec.contracts import KinvecError, Result
from kinvec.reporting import build_report, collect, collect_several, render
from kinvec.reporting.maps import pictures, turn
from kinvec.reporting.similarities import similarities
from kinvec.tasks import picture
from kinvec.tasks.evaluation import unit
from kinvec.verbs.evaluate import evaluate
from kinvec.verbs.mine import mine
from kinvec.verbs.report import report
from kinvec.verbs.train import train


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


@pytest.mark.slow
def test_umap_has_its_places_where_it_is_installed() -> None:
    pytest.importorskip("umap")
    vectors = np.random.default_rng(0).normal(size=(60, 16)).astype(np.float32)
    first, again = (picture.places(vectors, ["pca"]) for _ in range(2))
    assert first["umap"].shape == (60, 2) and np.isfinite(first["umap"]).all()
    assert np.array_equal(first["umap"], again["umap"])


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
    run = make_run(tmp_path / "run", evaluate=False)
    for side, seed in (("base", 0), ("tuned", 1)):
        tasks.save_result(searched(seed), run / "results" / side / "docs")
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
    for n, side in enumerate(pictures_shown.all()):
        x, y = found["methods"][0]["places"][n][lonely]
        assert side.locator(".mark").get_attribute("d") == f"M{x:g} {y:g}h0"
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


# ---- what other parts leave in a run, by their own code ----


@pytest.fixture(scope="module")
def data(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search problem of words, and pairs that the untouched model scores perfectly."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(1)
    texts = [" ".join(draw.sample(WORDS, 6)) for _ in range(60)]
    (folder / "search" / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", texts), ("queries", [" ".join(text.split()[:4]) for text in texts[:40]])):
        lines = [json.dumps({"_id": f"{name[0]}{i}", "text": text}) + "\n" for i, text in enumerate(rows)]
        (folder / "search" / f"{name}.jsonl").write_text("".join(lines))
    for split, queries in (("train", range(25)), ("test", range(25, 40))):
        judged = ["query-id\tcorpus-id\tscore", *(f"q{i}\tc{i}\t1" for i in queries)]
        (folder / "search" / "qrels" / f"{split}.tsv").write_text("\n".join(judged) + "\n")
    model = Embedder.load(tiny_folder, precision="fp32")
    first, second = ([" ".join(draw.sample(WORDS, 5)) for _ in range(60)] for _ in range(2))
    cosines = np.sum(unit(model.encode_queries(first)) * unit(model.encode_queries(second)), axis=1).tolist()
    pairs = zip(first, second, cosines, strict=True)
    rows = [json.dumps({"sentence1": a, "sentence2": b, "score": score}) + "\n" for a, b, score in pairs]
    (folder / "known.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def guarded(data: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on mined negatives, hard enough that the model forgets, with a guard against it."""
    folder = tmp_path_factory.mktemp("guarded")
    mine(tiny_folder, data / "search", folder / "mined")
    settings = ["trainer.max_steps=10", "trainer.batch_size=8", "trainer.lr=0.003", "trainer.eval_every=5", "threads=1"]
    guard = [f"guard.sts.data={data / 'known.jsonl'}", "guard.sts.tolerance=0.02"]
    named = [f"model={tiny_folder}", f"data.train={folder / 'mined'}", f"data.test={data / 'search'}"]
    train(None, [*named, *settings, *guard, "data.holdout=0.2", f"out={folder / 'run'}"])
    evaluated = folder / "run" / "results" / "tuned" / "search"
    assert evaluated.is_dir()
    evaluate(folder / "run" / "model", data / "search", cheaper=True, out=evaluated)
    return folder / "run"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_shows_what_guard_mining_doctor_and_cheaper_vectors_said(guarded: Path) -> None:
    found = collect(guarded)
    assert [anchor for anchor, *_ in found["sections"]] == [
        "scores", "guard", "curve", "queries", "maps", "similarities", "mining", "doctor", "data", "cheaper",
        "settings",
    ]  # fmt: skip
    assert [task["name"] for task in found["tasks"]] == ["search", "sts"], "the guard comes after the run's own task"
    told = json.loads((guarded / "guard.json").read_text())
    audit = json.loads((guarded / "audit.json").read_text())
    cheaper = json.loads((guarded / "results" / "tuned" / "search" / "cheaper.json").read_text())
    assert found["guard"]["said"] == told["said"] and len(found["guard"]["gain"]["points"]) == len(told["points"])
    assert sum(found["mining"][0]["drawn"]["positives"]) == pytest.approx(1)
    points = [row for line in found["cheaper"][0]["lines"] for *_, row in line["points"]]
    assert len(points) == len(cheaper["rows"])
    page = build_report(guarded).read_text("utf-8")
    parse(page)
    checked = json.loads((guarded / "doctor.json").read_text())["verdict"]
    least = f"{cheaper['rows'][-1]['metrics']['nDCG@10']:.4f}"
    forgot = f"{told['guards']['sts']['full']['value']:.4f}"
    for figure in (told["said"][1:], forgot, f"{audit['negatives']:,}", checked, least):
        assert figure in page


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@needs_chromium
@pytest.mark.parametrize("width", [360, 1100])
def test_every_section_of_that_run_fits_and_complains_of_nothing(browser: Browser, guarded: Path, width: int) -> None:
    page, complaints = open_page(browser, build_report(guarded).as_uri(), viewport={"width": width, "height": 800})
    for fold in page.locator("details:visible > summary").all():
        fold.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [text for text in complaints if not text.startswith("data:")] == []


# ---- several runs ----


def test_several_runs_are_compared_with_the_first_and_their_base(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, gain=gain, seed=4) for name, gain in (("a", 0.02), ("b", 0.1))]
    path = report(*runs, out=tmp_path / "both.html")
    page = path.read_text("utf-8")
    parse(page)
    found = collect_several(runs)
    (task,) = found["tasks"]
    assert [system["name"] for system in task["systems"]][1:] == [*map(str, runs)]
    base, second = (tasks.load_result(runs[n] / "results" / side / "docs") for n, side in ((0, "base"), (1, "tuned")))
    expected = tasks.compare(base, second, by="nDCG@10").metrics[0]
    cell = task["rows"][0]["cells"][2]
    assert cell["difference"]["difference"] == pytest.approx(expected.difference)
    assert (cell["difference"]["low"], cell["difference"]["high"]) == pytest.approx((expected.low, expected.high))
    assert (
        f"{expected.b:.4f}" in page
        and "Best: " in found["verdict"]["head"]
        and str(runs[1]) in found["verdict"]["head"]
    )
    assert [line["name"] for line in found["curves"]["lines"]] == [str(run) for run in runs]
    assert len(found["queries"]["tasks"][0]["values"]) == 3


def test_results_without_a_run_are_compared_too_and_others_are_refused(tmp_path: Path) -> None:
    for name, value in (("a", 0.3), ("b", 0.6)):
        tasks.save_result(search_result(name, np.linspace(0, value, 50)), tmp_path / name)
    found = collect_several([tmp_path / "a", tmp_path / "b"])
    assert found["curves"] is None and [anchor for anchor, *_ in found["sections"]] == ["scores", "queries"]
    parse(render(found))
    tasks.save_result(similarity_result("c", 0.3), tmp_path / "c")
    with pytest.raises(KinvecError, match="cannot be compared|different data"):
        collect_several([tmp_path / "a", tmp_path / "c"])


@needs_chromium
def test_a_reader_chooses_which_of_several_systems_to_see(browser: Browser, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, gain=gain, seed=4) for name, gain in (("a", 0.02), ("b", 0.1))]
    page, complaints = open_page(browser, report(*runs, out=tmp_path / "both.html").as_uri())
    found = collect_several(runs)["queries"]["tasks"][0]
    for left, right in ((0, 2), (0, 1), (1, 2)):
        page.locator("[data-part=left]").select_option(str(left))
        page.locator("[data-part=right]").select_option(str(right))
        won = sum(b > a for a, b in zip(found["values"][left], found["values"][right], strict=True))
        assert page.locator(".chips label:has-text('Won') small").inner_text() == str(won)
    assert [text for text in complaints if not text.startswith("data:")] == []
