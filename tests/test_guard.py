"""Further tasks and the forgetting guard: held, restored by a mixture, broken; killed at any moment; exit codes."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
import torch
from conftest import MINILM
from safetensors.torch import load_file
from synthetic_run import search_result
from tiny_models import WORDS

from kinvec import Embedder, merging, pipeline, tasks
from kinvec.contracts import KinvecError
from kinvec.embedder import open_folder
from kinvec.files import open_pairs
from kinvec.pipeline import open_run_data
from kinvec.recipe import load_recipe
from kinvec.reporting import build_report
from kinvec.tasks.evaluation import unit
from kinvec.verbs.train import train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
Main = Callable[..., tuple[int, str]]


def write_known(path: Path, embedder: Embedder, count: int, seed: int) -> Path:
    """Pairs scored by the untouched model itself: its correlation is 1, and whatever changes it forgets some."""
    draw = random.Random(seed)
    first, second = ([" ".join(draw.sample(WORDS, 5)) for _ in range(count)] for _ in range(2))
    cosines = np.sum(unit(embedder.encode_queries(first)) * unit(embedder.encode_queries(second)), axis=1)
    rows = zip(first, second, cosines.tolist(), strict=True)
    path.write_text("".join(json.dumps({"sentence1": a, "sentence2": b, "score": s}) + "\n" for a, b, s in rows))
    return path


@pytest.fixture(scope="module")
def sts(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two splits of what the untouched model knows."""
    folder = tmp_path_factory.mktemp("data") / "sts"
    folder.mkdir()
    embedder = Embedder.load(tiny_folder, precision="fp32")
    for seed, split in enumerate(("dev", "test")):
        write_known(folder / f"sts-{split}.jsonl", embedder, 60, seed)
    return folder


@pytest.fixture(scope="module")
def settings(tiny_folder: Path, tiny_pairs: Path) -> list[str]:
    """A training hard enough that the model forgets."""
    steps = ["trainer.max_steps=20", "trainer.batch_size=8", "trainer.lr=0.003", "trainer.eval_every=10"]
    return [f"model={tiny_folder}", f"data.train={tiny_pairs}", "data.holdout=0.2", "threads=1", *steps]


@pytest.fixture(scope="module")
def unguarded(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training without a guard."""
    out = tmp_path_factory.mktemp("unguarded") / "run"
    train(None, [*settings, f"out={out}"])
    return out


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def told_by(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "guard.json").read_text())
    return found


# ---- the parts ----


def test_a_mixture_is_linear_in_every_weight() -> None:
    draw = torch.Generator().manual_seed(0)
    base, tuned = ({"w": torch.randn(5, 3, generator=draw), "ids": torch.tensor([n, 7])} for n in (1, 2))
    for share in merging.SHARES:
        mixed = merging.interpolate(base, tuned, share)
        torch.testing.assert_close(mixed["w"], (1 - share) * base["w"] + share * tuned["w"], atol=1e-6, rtol=0)
        assert mixed["ids"].tolist() == [2, 7]
    for share, whole in ((0.0, base), (1.0, tuned)):
        assert torch.equal(merging.interpolate(base, tuned, share)["w"], whole["w"])
    half = merging.interpolate({"w": base["w"].bfloat16()}, {"w": tuned["w"].bfloat16()}, 0.5)
    assert half["w"].dtype == torch.float32, "a mixture of rounded weights is not rounded again"
    for other in ({"v": base["w"]}, {"w": base["w"][:2]}):
        with pytest.raises(KinvecError, match="'w'"):
            merging.interpolate(other, {"w": tuned["w"]}, 0.5)


def point(share: float, dev: float, **low: float) -> dict[str, Any]:
    return {"share": share, "dev": dev, "guards": {name: {"low": value} for name, value in low.items()}}


def test_the_best_share_whose_whole_interval_keeps_to_every_tolerance_is_chosen() -> None:
    guards = {"a": {"tolerance": 0.01}, "b": {"tolerance": 0.05}}
    kept = [point(0.0, 0.9, a=0, b=0), point(0.2, 0.4, a=-0.001, b=-0.01), point(0.4, 0.6, a=-0.009, b=-0.05)]
    beyond = [point(0.6, 0.8, a=-0.011, b=-0.01), point(0.8, 0.9, a=-0.001, b=-0.051), point(1.0, 0.9, a=0, b=0)]
    assert merging.choose([*kept, *beyond], guards) == 0.4, "not the base or the tuned model, nor what breaks a guard"
    assert merging.choose([*kept, point(0.5, 0.5, a=0, b=0)], guards) == 0.4, "the best on dev, not the largest"
    assert merging.choose([*kept, point(0.5, 0.6, a=0, b=0)], guards) == 0.5, "of equals the largest"
    assert merging.choose([kept[0], *beyond], guards) is None


def test_what_is_retained_of_the_gain_and_how_sure() -> None:
    draw = np.random.default_rng(1)
    base = draw.uniform(0.2, 0.4, 400)
    gain = draw.normal(0.3, 0.1, 400)
    kept = draw.normal(0.7, 0.1, 400) * gain
    results = [search_result("model", np.clip(values, 0, 1)) for values in (base, base + gain, base + kept)]
    found = merging.retained(*results)
    assert found["metric"] == "nDCG@10" and found["retained"] == pytest.approx(0.7, abs=0.02)
    assert found["low"] < found["retained"] < found["high"] < found["low"] + 0.1
    noisy = search_result("model", np.clip(base + draw.normal(0.2, 0.3, 400), 0, 1))
    wide = merging.retained(results[0], results[1], noisy)
    assert wide["high"] - wide["low"] > 3 * (found["high"] - found["low"])
    nothing = merging.retained(results[1], results[0], results[2])
    assert nothing["retained"] is nothing["low"] is nothing["high"] is None, "there was no gain"


# ---- whole runs ----


@pytest.mark.parametrize("lora", [(), ("lora.rank=4", "lora.dropout=0.1")], ids=["all weights", "lora"])
def test_a_broken_guard_is_restored_by_a_mixture(
    tmp_path: Path, settings: list[str], sts: Path, tiny_folder: Path, main: Main, lora: tuple[str, ...]
) -> None:
    """Against the same training without the guard: the weights lie between, and all figures are those of the models."""
    for name, guard in (("plain", []), ("run", [f"guard.sts.data={sts}", "guard.sts.tolerance=0.02"])):
        code, said = main("train", *settings, *lora, *guard, f"out={tmp_path / name}")
        assert code == 0, said
    run, plain = tmp_path / "run", tmp_path / "plain"
    told = told_by(run)
    share, guard = told["share"], told["guards"]["sts"]
    assert told["verdict"] == "restored" and 0 < share < 1 and f"guard restored: {share:g} of the tuned" in said
    assert [found["share"] for found in told["points"]] == list(merging.SHARES)
    assert guard["chosen_on"] == "dev" and guard["full"]["difference"] < -0.02 <= guard["model"]["difference"]

    start, full, mixed = load_file(tiny_folder / "model.safetensors"), weights(plain), weights(run)
    assert mixed.keys() == full.keys()
    for name, value in mixed.items():
        torch.testing.assert_close(value, torch.lerp(start[name], full[name], share), atol=1e-6, rtol=0)
    assert any(not torch.equal(mixed[name], full[name]) for name in full)

    model = Embedder.load(run / "model", precision="fp32")
    assert model.lineage[-1]["share"] == share
    again = {split: tasks.similarity(open_pairs(sts, split=split), model).metrics for split in ("dev", "test")}
    chosen = next(found for found in told["points"] if found["share"] == share)
    assert again["test"]["spearman_cosine"] == pytest.approx(guard["model"]["value"], abs=1e-3)
    assert again["dev"]["spearman_cosine"] == pytest.approx(chosen["guards"]["sts"]["value"], abs=1e-3)
    results = {side: tasks.load_results(run / "results" / side) for side in ("base", "full", "tuned")}
    assert results["tuned"]["sts"].metrics == pytest.approx(again["test"], abs=1e-3)
    assert results["full"]["pairs"].metrics == tasks.load_results(plain / "results" / "tuned")["pairs"].metrics
    assert told["retained"].keys() == {"pairs"}
    if lora:
        scaled = open_folder(run / "adapter").state_dict()
        torch.testing.assert_close(scaled, open_folder(run / "model").state_dict(), atol=1e-6, rtol=0)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["guard"] == told and [found["task"] for found in summary["results"]] == ["pairs", "sts"]
    assert f"{share:g} of the tuned weights" in (run / "model" / "README.md").read_text()


def test_a_guard_that_holds_changes_nothing(
    tmp_path: Path, settings: list[str], sts: Path, unguarded: Path, main: Main
) -> None:
    code, said = main("train", *settings, f"guard.sts.data={sts}", "guard.sts.tolerance=2", f"out={tmp_path / 'run'}")
    told = told_by(tmp_path / "run")
    assert code == 0 and "guard held" in said
    assert (told["verdict"], told["share"], told["points"], told["retained"]) == ("held", 1.0, [], {})
    assert told["guards"]["sts"]["model"] == told["guards"]["sts"]["full"]
    assert not (tmp_path / "run" / "results" / "full").exists()
    assert all(torch.equal(value, weights(unguarded)[name]) for name, value in weights(tmp_path / "run").items())


def test_a_guard_that_cannot_be_held_is_exit_code_3_each_time(
    tmp_path: Path, settings: list[str], sts: Path, unguarded: Path
) -> None:
    """A real process: the summary is written all the same, the model is as trained, and nothing is uploaded."""
    run = tmp_path / "run"
    guard = [f"guard.sts.data={sts / 'sts-test.jsonl'}", "guard.sts.tolerance=0", "push_to_hub=nobody/nothing"]
    for _ in range(2):
        command = command_line.start(["train", *settings, *guard, f"out={run}"], tmp_path / "said")
        assert command.wait() == 3, command.said
        told = told_by(run)
        base, tuned = told["points"][0]["guards"]["sts"]["value"], told["guards"]["sts"]["full"]["value"]
        said = f"error: the guard is broken: sts, spearman_cosine {base:.4f} → {tuned:.4f}"
        assert base > 0.999 and said in command.said, command.said
        assert "Traceback" not in command.said and "upload" not in command.said
    assert "this run is finished" in command.said
    assert told["verdict"] == "broken" and told["share"] == 1.0 and told["guards"]["sts"]["chosen_on"] == "test"
    assert json.loads((run / "summary.json").read_text())["guard"] == told and (run / "report.html").is_file()
    assert all(torch.equal(value, weights(unguarded)[name]) for name, value in weights(run).items())
    results = json.loads((run / "summary.json").read_text())["results"]
    assert train(None, [*settings, *guard, f"out={run}"])["results"] == results, "Python gets the summary"


def test_killed_in_the_sweep_and_while_the_model_is_replaced_it_ends_the_same(
    tmp_path: Path, settings: list[str], sts: Path
) -> None:
    argv = ["train", *settings, f"guard.sts.data={sts}", "guard.sts.tolerance=0.02"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command_line.start([*argv, f"out={whole}"], tmp_path / "said-whole").wait() == 0
    assert told_by(whole)["verdict"] == "restored"
    for moment, lines in (("guard.json", 20), ("guard.json", 60), ("results/full", 0), ("guard.json", 140)):
        command = command_line.start([*argv, f"out={killed}"], tmp_path / "said")
        place = killed / moment
        if lines and command.wait_for(place, lines):
            command.kill()
        elif not lines:
            while command.process.is_alive() and not place.exists():
                pass
            command.kill()
    last = command_line.start([*argv, f"out={killed}"], tmp_path / "said")
    assert last.wait() == 0, last.said
    assert told_by(killed) == told_by(whole)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(killed).items())
    for side in ("base", "full", "tuned"):
        found, expected = (tasks.load_results(run / "results" / side) for run in (killed, whole))
        assert {name: one.metrics for name, one in found.items()} == {n: one.metrics for n, one in expected.items()}
    assert last.said.count("a mixture, 0 tuned and 1 base") == 1, "no share is measured again"


class _Killed(Exception):
    pass


def test_killed_between_any_two_steps_of_the_replacement_it_ends_the_same(
    tmp_path: Path, settings: list[str], sts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, an error in the place of a kill: around the saving of the model, the moving of results, …"""
    argv = [*settings, f"guard.sts.data={sts}", "guard.sts.tolerance=0.02"]
    expected = train(None, [*argv, f"out={tmp_path / 'whole'}"])["guard"]
    run, put, evaluate = tmp_path / "killed", merging._put, pipeline.evaluate_into

    def killed(*_: Any) -> None:
        raise _Killed

    def put_and_killed(*given: Any) -> None:
        put(*given)
        raise _Killed

    def moved_and_killed(folder: Path, embedder: Embedder, data: Any) -> None:
        if folder.with_name("full").exists():
            raise _Killed
        evaluate(folder, embedder, data)

    for place, name, instead in (
        (merging, "_put", killed), (merging, "_put", put_and_killed), (pipeline, "evaluate_into", moved_and_killed),
        (merging, "retained", killed), (merging, "_conclude", killed), (pipeline, "_finish", killed),
    ):  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(place, name, instead)
            with pytest.raises(_Killed):
                train(None, [*argv, f"out={run}"])
    assert train(None, [*argv, f"out={run}"])["guard"] == expected
    assert all(torch.equal(value, weights(tmp_path / "whole")[name]) for name, value in weights(run).items())
    assert Embedder.load(run / "model", precision="fp32").lineage[-1]["share"] == expected["share"]


def test_a_chain_ends_with_the_stage_that_breaks_its_guard(
    tmp_path: Path, settings: list[str], sts: Path, main: Main
) -> None:
    """A stage's drop is that from its own start."""
    chain = tmp_path / "chain.yaml"
    chain.write_text("stages: [{name: one}, {name: two}, {name: three}]\n")
    guard = [f"guard.sts.data={sts}", "one.guard.sts.tolerance=2", "two.guard.sts.tolerance=0"]
    out = tmp_path / "run"
    code, said = main("train", str(chain), *settings, *guard, f"out={out}")
    assert code == 3 and "error: the guard is broken" in said
    one, two = told_by(out / "one")["guards"]["sts"], told_by(out / "two")["guards"]["sts"]
    assert one["model"]["value"] == pytest.approx(two["base"], abs=1e-6) and not (out / "three").exists()


@pytest.mark.slow
def test_intents_make_a_real_model_forget_similarity_and_the_sweep_gives_it_back(
    tmp_path: Path, shared_data: Path, main: Main
) -> None:
    """Part of Banking77 with part of STS Benchmark as the guard; the whole of both is in docs/training.md."""
    intents, pairs = tmp_path / "banking77", tmp_path / "stsb"
    intents.mkdir()
    pairs.mkdir()
    for split in ("train", "test"):
        with (
            open(shared_data / "banking77" / f"{split}.csv", encoding="utf-8", newline="") as source,
            open(intents / f"{split}.csv", "w", encoding="utf-8", newline="") as file,
        ):
            rows = list(csv.reader(source))
            csv.writer(file).writerows([rows[0], *rows[1::5]])
    for split in ("dev", "test"):
        lines = (shared_data / "stsb" / f"sts-{split}.csv").read_text("utf-8").splitlines(keepends=True)
        (pairs / f"sts-{split}.csv").write_text("".join(lines[:300]), "utf-8")
    settings = ["objective.name=supcon", "trainer.max_steps=40", "trainer.batch_size=64", "trainer.lr=3e-4"]
    settings += ["trainer.eval_every=40", "data.holdout=0.1", "data.limit=800", "threads=1"]
    data = [f"data.train={intents}", f"guard.sts.data={pairs}"]
    code, said = main("train", f"model={MINILM}", *data, *settings, f"out={tmp_path / 'run'}")
    assert code == 0, said
    told = told_by(tmp_path / "run")
    guard, kept = told["guards"]["sts"], told["retained"]["banking77"]
    assert told["verdict"] == "restored" and guard["full"]["high"] < 0, "it has forgotten, beyond chance"
    assert guard["full"]["difference"] < -0.01 <= guard["model"]["difference"]
    assert kept["model"] > kept["base"]
    dev = {found["share"]: found["dev"] for found in told["points"]}
    assert dev[told["share"]] > dev[0.0]


# ---- further tasks, and what is wrong with them ----


def test_further_tasks_are_measured_before_and_after_under_their_own_prompts(
    tmp_path: Path, settings: list[str], sts: Path, tiny_pairs: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"tasks:\n- {{data: {sts}, split: dev}}\n- {{name: again, data: {tiny_pairs}, measures: [RR@10]}}\n"
        f"- {{name: asked, data: {tiny_pairs}, prompts: {{query: 'cell '}}}}\n"
    )
    more = ["tasks.again.measures=[R@10,RR@10]", "trainer.max_steps=2", f"out={tmp_path / 'run'}"]
    summary = train(recipe, [*settings, *more])
    assert [found["task"] for found in summary["results"]] == ["pairs", "sts", "again", "asked"]
    assert list(summary["results"][2]["metrics"]) == ["R@10", "RR@10"] and "guard" not in summary
    assert summary["results"][2]["baselines"]["BM25"]["R@10"] > 0.5
    results = tasks.load_results(tmp_path / "run" / "results" / "base")
    assert results["asked"].prompts == {"query": "cell "} and results["again"].prompts == {}
    assert results["sts"].metrics["spearman_cosine"] > 0.99, "what the untouched model itself scored"
    assert "again, 60 test queries" in (tmp_path / "run" / "model" / "README.md").read_text()
    page = build_report(tmp_path / "run").read_text()
    assert all(name in page for name in ("again", "asked", "sts"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["tasks.sts.data=nowhere.csv"], r"nowhere\.csv: there is no such file"),
        (["tasks.sts.data={sts}", "tasks.sts.task=reading"], "there is no task 'reading'; there are retrieval"),
        (["tasks.sts.split=test"], r"tasks\.sts\.data is not set"),
        (["guard.sts.data={sts}", "evaluate=false"], r"guard\.sts: nothing is measured with evaluate=false"),
        (["guard.sts.data={sts}", "trainer.eval_every=0"], r"nothing is measured with trainer\.eval_every=0"),
        (["guard.sts.data={sts}", "data.holdout=0"], r"guard\.sts: if it breaks, dev data choose .* name data\.dev"),
        (["guard.sts.data={sts}", "guard.sts.dev={pairs}"], r"guard\.sts\.dev: .* of another kind"),
        (["guard.sts.data={sts}", "guard.sts.tolerance=-1"], r"'guard\.sts\.tolerance'"),
        (["guard.sts.data={sts}", "guard.sts.tolerence=1"], r"tolerence'; did you mean 'guard\.NAME\.tolerance'"),
        (["guard.sts.data={sts}", "guard.sts.metric=nDCG@10"], r"guard\.sts\.metric: 'nDCG@10' .* spearman_cosine"),
        (["guard.pairs.data={sts}"], r"guard\.pairs: results of that name are there already"),
        (["tasks.x.data={sts}", "guard.x.data={sts}"], r"guard\.x: results of that name are there already"),
        (["guard.sts.data={sts}", "objective.name=mlm", "data.train={texts}"], r"guard\.sts: mlm teaches tokens"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_task_or_guard_is_said_before_training(
    tmp_path: Path, settings: list[str], sts: Path, tiny_pairs: Path, more: list[str], said: str
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the blood of a mouse\n" * 8)
    given = [item.format(sts=sts, pairs=tiny_pairs, texts=texts) for item in more]
    with pytest.raises(KinvecError, match=said):
        train(None, [*settings, *given, f"out={tmp_path / 'run'}"])
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_list_of_tasks_names_each_once(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    for text, said in (
        ("[{data: a/x.csv}, {data: b/x.csv}]", "two entries are named 'x'"),
        ("[x.csv]", "every entry of the list is a mapping, such as 'data: my.jsonl'"),
        ("[{name: 'my task', data: x.csv}]", "cannot be named 'my task'"),
    ):
        for key in ("tasks", "guard"):
            recipe.write_text(f"{key}: {text}\n")
            with pytest.raises(KinvecError, match=f"{key}: .*{said}"):
                load_recipe(recipe, ["model=m", "data.train=d", "out=o"])


def test_other_data_choose_where_there_are_some(settings: list[str], sts: Path, tmp_path: Path) -> None:
    """The dev split beside, or what is named; else the guard's own."""
    alone = tmp_path / "sts-test.jsonl"
    shutil.copy(sts / "sts-test.jsonl", alone)
    for given, dev in (
        ([f"guard.a.data={sts}"], "sts-dev"), ([f"guard.a.data={alone}"], "sts-test"),
        ([f"guard.a.data={alone}", f"guard.a.dev={sts / 'sts-dev.jsonl'}"], "sts-dev"),
    ):  # fmt: skip
        (guard,) = open_run_data(load_recipe(None, [*settings, *given, "out=o"])).guards
        assert guard.dev.fingerprint == open_pairs(sts / f"{dev}.jsonl").fingerprint
        assert guard.problem.fingerprint == open_pairs(alone).fingerprint and guard.problem.name == "a"
