"""The report: figures as compared, one page that holds together, at every state a run can be in."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_run import QUERIES, SCRIPT, make_run, similarity_result

from kinvec import tasks
from kinvec.contracts import KinvecError
from kinvec.reporting import SECTIONS, axis, build_report, collect, compact, render
from kinvec.verbs.report import report

VOID = {"meta", "link", "input", "br"}


class Structure(HTMLParser):
    """Checks that what is opened is closed in order, and collects ids, links and loaded addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found[key] or "" for key in ("href", "src") if key in found]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        return

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> Structure:
    structure = Structure()
    structure.feed(page)
    assert structure.open == []
    return structure


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    path = build_report(make_run(tmp_path / "run"))
    page = path.read_text(encoding="utf-8")
    structure = parse(page)
    assert path == tmp_path / "run" / "report.html"
    assert len(set(structure.ids)) == len(structure.ids)
    shown = [anchor for anchor, *_ in SECTIONS if anchor in structure.ids]
    assert (
        [i for i in structure.ids if i in shown] == shown == [link[1:] for link in structure.links[2 : 2 + len(shown)]]
    )
    assert {"scores", "curve", "queries", "data", "settings"} <= set(shown)
    assert all(link.startswith(("#", "data:")) for link in structure.links)
    assert not re.search(r"https?://|@import|url\(", page)


def test_the_figures_are_those_of_the_comparison(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    data = collect(run)
    base, tuned = (tasks.load_result(run / "results" / side / "docs") for side in ("base", "tuned"))
    expected = tasks.compare(base, tuned, by="nDCG@10").metrics[0]
    row = data["tasks"][0]["rows"][0]
    assert row["metric"] == "nDCG@10"
    assert row["difference"]["difference"] == expected.difference
    assert (row["difference"]["low"], row["difference"]["high"]) == (expected.low, expected.high)
    assert row["base"]["low"] < row["base"]["value"] == base.metrics["nDCG@10"] < row["base"]["high"]
    assert row["bm25"] == 0.61
    page = render(data)
    for value in (expected.a, expected.b, row["base"]["low"], row["tuned"]["high"]):
        assert f"{value:.4f}" in page


@pytest.mark.parametrize(
    ("gain", "word", "says"), [(0.1, "better", "Better by"), (-0.1, "worse", "Worse by"), (0.0, "unclear", "No clear")]
)
def test_the_verdict_follows_the_interval(tmp_path: Path, gain: float, word: str, says: str) -> None:
    verdict = collect(make_run(tmp_path / "run", gain=gain, seed=2))["verdict"]
    assert verdict["word"] == word
    assert verdict["head"].startswith(says)
    assert f"{QUERIES} queries" in verdict["rest"]
    low, high = verdict["difference"]["low"], verdict["difference"]["high"]
    assert {"better": low > 0, "worse": high < 0, "unclear": low <= 0 <= high}[word]


def test_a_run_without_evaluation_has_a_page(tmp_path: Path) -> None:
    data = collect(make_run(tmp_path / "run", evaluate=False))
    assert data["verdict"]["word"] == "unknown"
    assert "evaluate: false" in data["verdict"]["rest"]
    assert data["status"] == "finished"
    parse(render(data))


def test_a_run_that_still_goes_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=37, trained=False)
    with open(run / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 38, "lo')
    data = collect(run)
    assert data["status"] == "not finished, 37 steps so far"
    assert data["tasks"][0]["rows"][0]["tuned"] is None
    assert data["tasks"][0]["rows"][0]["base"]["value"] > 0
    assert "not yet" in render(data)


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: m\nevaluate: true\n")
    data = collect(tmp_path)
    assert data["status"] == "not finished, no step yet"
    parse(render(data))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KinvecError, match="no run folder"):
        collect(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_texts_are_texts_and_never_markup(tmp_path: Path) -> None:
    data = collect(make_run(tmp_path / "run"))
    assert SCRIPT in data["queries"]["tasks"][0]["queries"]
    data["status"] = SCRIPT
    data["curve"]["readout"][0] = "</script><b>"
    page = render(data)
    assert SCRIPT not in page
    assert "&lt;script&gt;" in page
    assert "</script><b>" not in page
    parse(page)


def test_wins_and_losses_are_the_extremes(tmp_path: Path) -> None:
    task = collect(make_run(tmp_path / "run"))["tasks"][0]
    for changes, sign in ((task["wins"], 1), (task["losses"], -1)):
        moved = [sign * change["difference"] for change in changes]
        assert moved == sorted(moved, reverse=True)
        assert min(moved) > 0


def test_several_tasks_of_several_kinds(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for side, noise in (("base", 0.6), ("tuned", 0.2)):
        tasks.save_result(similarity_result(side, noise), run / "results" / side / "pairs")
    data = collect(run)
    assert [task["name"] for task in data["tasks"]] == ["docs", "pairs"]
    pairs = data["tasks"][1]["rows"][0]
    assert pairs["metric"] == "spearman_cosine"
    assert pairs["base"]["low"] < pairs["base"]["value"] < pairs["base"]["high"]
    assert any(line.startswith("pairs: better") for line in data["verdict"]["also"])
    page = render(data)
    parse(page)
    assert page.count(">BM25</th>") == 1, "a task without a lexical baseline has no column for it"


def test_the_loss_on_dev_is_drawn_with_the_loss(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = build_report(run).read_text("utf-8")
    points = collect(run)["curve"]["val_loss"]
    assert [step for step, _ in points] == [24, 48, 72, 96, 120] and "its running mean; dots: on dev" in page
    assert page.count("<title>step 48: ") == 2  # one dot of the measure, one of the loss
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert points[0][1] == rows[23]["dev"]["val_loss"]


def test_long_curves_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluate=False)
    rows = [{"step": step, "loss": 1 / step, "lr": 1e-5} for step in range(1, 5002)]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = collect(run)["curve"]
    assert curve["steps"] == 5001
    assert len(curve["step"]) < 450
    assert (curve["step"][0], curve["step"][-1]) == (1, 5001)
    assert curve["smooth"][0] == pytest.approx(1.0)


def test_the_smoothed_loss_of_a_constant_is_the_constant(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluate=False)
    rows = [{"step": step, "loss": 0.7, "lr": 1e-5} for step in range(1, 30)]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert collect(run)["curve"]["smooth"] == pytest.approx([0.7] * 29)


def test_an_axis_shows_all_values_between_round_ticks() -> None:
    scale = axis([0.613, 0.702])
    assert scale.low <= 0.613 < 0.702 <= scale.high
    assert scale.ticks == pytest.approx([0.6, 0.625, 0.65, 0.675, 0.7, 0.725])
    assert (scale.at(scale.low), scale.at(scale.high)) == (0, 100)
    assert axis([0.9, 1.0], high=1.0).high == 1.0
    assert axis([]).high > axis([]).low
    assert axis([3.0, 3.0]).high > axis([3.0, 3.0]).low
    perfect = axis([1.0, 1.0], high=1.0)  # every query answered before and after
    assert perfect.low < perfect.high == 1.0
    tight = axis([0.0, 130.0], tight=True)
    assert (tight.low, tight.high, tight.ticks) == (0, 130, [0, 50, 100])


def test_ticks_read_well() -> None:
    assert [compact(v) for v in (0, 0.25, 1200, 2e-5, 1.5e-5)] == ["0", "0.25", "1,200", "2e-5", "1.5e-5"]
    assert compact(-0.01) == "−0.01"


def test_the_verb_writes_where_it_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert report(run, out=tmp_path / "elsewhere.html") == tmp_path / "elsewhere.html"
    assert not (run / "report.html").exists()
    assert report(run).read_text().count("<section") == 1 + len(collect(run)["sections"])
