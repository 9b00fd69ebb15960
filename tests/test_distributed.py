"""Several processes give what one gives: the gradients of a step, the run, the vectors, what is mined."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ranks
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_trainer import log_of, run_fit, source_of
from tiny_models import WORDS

import kinvec.trainer
from kinvec import checkpoint, distributed
from kinvec.adapters import LoraSettings, add_lora
from kinvec.backbone import trainable
from kinvec.batching import deal, join
from kinvec.contracts import KinvecError
from kinvec.embedder import open_folder
from kinvec.files import open_data
from kinvec.mixing import alone
from kinvec.objectives import ObjectiveSettings, make_objective
from kinvec.sampling import DataSettings, label_source
from kinvec.trainer import TrainerSettings, _gradients, _prepared, tokenized

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = 10**12  # bytes: every chunk keeps its graph


def case(objective: dict[str, Any], *, keep: bool = True, chunk: int = 64, lora: int = 0, **trainer: Any) -> dict:
    return {"objective": objective, "keep": keep, "chunk": chunk, "lora": lora, "trainer": {"dropout": 0.0} | trainer}


HARD = {"name": "contrastive"}
CASES = {
    "hard negatives and masks": case(HARD),
    "recomputed": case(HARD, keep=False),
    "own negatives, both ways": case(HARD | {"hard_negatives": "own", "both_directions": True}),
    "matryoshka": case(HARD | {"dimensions": [16, 8]}, keep=False),
    "triplets": case({"name": "triplet", "mining": "all"}),
    "masked language": case({"name": "mlm"}),
    "LoRA": case(HARD, lora=4),
    "sharded": case(HARD, shard="all"),
    "sharded by machine": case(HARD, shard="machine"),
    "sharded, recomputed, LoRA, checkpointed": case(
        HARD, keep=False, lora=4, shard="all", gradient_checkpointing=True
    ),
}  # fmt: skip


def gradients_of(folder: Path, one: dict[str, Any], pairs: Path, labelled: Path) -> dict[str, torch.Tensor]:
    """The gradients of a step over 24 queries (or texts), with the loss."""
    torch.manual_seed(0)
    embedder = open_folder(folder)
    objective = make_objective(ObjectiveSettings(**one["objective"]))
    if objective.ask is not None:
        from kinvec.embedder import add_language_head

        add_language_head(embedder)
    if one["lora"]:
        add_lora(embedder.backbone, LoraSettings(rank=one["lora"], dropout=0.0))
        torch.manual_seed(1)
        for name, parameter in trainable(embedder):
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)  # at their start, zero, half of the gradients would be zero
    settings = TrainerSettings(**one["trainer"])
    embedder = _prepared(embedder, settings)
    if objective.kind == "labelled":
        table = open_data(labelled)
        source: Any = label_source(table, np.arange(len(table)), DataSettings(), seed=0)
    else:
        source = source_of(pairs, negatives_per_query=1)
    step = alone(source, objective).step(0, 24)
    tokens = join(distributed.everyones(tokenized(embedder, step, distributed.rank(), distributed.world())))
    value, *_ = _gradients(embedder, step, tokens, one["chunk"], (100.0, ALL if one["keep"] else 0))
    distributed.add_gradients(parameter for _, parameter in trainable(embedder))
    found = {name: distributed.whole(p.grad).clone() for name, p in trainable(embedder) if p.grad is not None}
    return found | {"loss": torch.tensor(value, dtype=torch.float64)}


def out_of_memory_once(again: bool) -> None:
    """The first step's first chunk is out of memory, or the first that is embedded again with its graph."""
    real, made = kinvec.trainer._embed, count()

    def make(embedder: Any) -> Any:
        embed, for_the_plan = real(embedder), next(made) == 0

        def call(texts: Any) -> torch.Tensor:
            if not for_the_plan and torch.is_grad_enabled() == again:
                kinvec.trainer._embed = real
                raise torch.OutOfMemoryError("out of memory. Tried to allocate 2.00 GiB")
            return embed(texts)

        return call

    kinvec.trainer._embed = make


def train_out_of_memory(out: Path, folder: Path, pairs: Path) -> None:
    """Three trainings; in the last two memory ends in process 1, in one half of a step."""
    for name, again in (("calm", None), ("forth", False), ("back", True)):
        if again is not None and distributed.rank() == 1:
            out_of_memory_once(again)
        settings: dict[str, Any] = {"chunk_tokens": 256, "dropout": 0.0, "memory_budget": "1B", "max_steps": 3}
        _, found = run_fit(out / name, folder, pairs, **settings)
        assert found["halvings"] == ([] if again is None else [{"step": 1, "chunk_tokens": 128}])


def test_where_memory_ends_in_one_process_all_halve_their_chunks(
    tmp_path: Path, tiny_folder: Path, tiny_pairs: Path
) -> None:
    ranks.run(2, train_out_of_memory, tmp_path, tiny_folder, tiny_pairs, output=tmp_path / "said")
    calm, forth, back = ([row["loss"] for row in log_of(tmp_path / name)] for name in ("calm", "forth", "back"))
    assert len(calm) == 3 and forth == pytest.approx(calm, rel=1e-5) and back == pytest.approx(calm, rel=1e-5)


def write_gradients(out: Path, *given: Any) -> None:
    """Of every case; rank 0 writes, all compute."""
    for name, one in CASES.items():
        if name == "masked language":  # draws what it hides in every process: its own test is below
            continue
        found = gradients_of(given[0], one, *given[1:])
        if distributed.rank() == 0:
            save_file(found, out / f"{name}.safetensors")


@pytest.fixture(scope="module")
def labelled_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, path = np.random.default_rng(3), tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    with open(path, "w") as file:
        for row in range(60):
            text = " ".join(rng.choice(WORDS, rng.integers(2, 20)))
            file.write(json.dumps({"text": text, "label": f"label {row % 5}"}) + "\n")
    return path


@pytest.mark.parametrize("world", [2, 4])
def test_the_gradients_of_several_processes_are_those_of_one(
    tmp_path: Path, tiny_folder: Path, tiny_pairs: Path, labelled_texts: Path, world: int
) -> None:
    given = (tiny_folder, tiny_pairs, labelled_texts)
    ranks.run(world, write_gradients, tmp_path, *given, output=tmp_path / "said")
    for name, one in CASES.items():
        if name == "masked language":
            continue
        whole = one | {"keep": True, "chunk": 10**6, "trainer": {"dropout": 0.0}}
        alone_, several = gradients_of(tiny_folder, whole, *given[1:]), load_file(tmp_path / f"{name}.safetensors")
        assert alone_.keys() == several.keys(), name
        a, b = (torch.cat([found[key].double().flatten() for key in sorted(alone_)]) for found in (alone_, several))
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) >= 0.999999, name
        assert b.norm() / a.norm() == pytest.approx(1.0, abs=1e-5), name
        assert a.norm() > 0.01 and several["loss"] == pytest.approx(float(alone_["loss"]), rel=1e-6), name


@given(st.lists(st.integers(1, 200), min_size=1, max_size=300), st.integers(16, 512), st.integers(1, 5))
def test_texts_are_dealt_once_and_evenly(lengths: list[int], budget: int, world: int) -> None:
    try:
        dealt = deal(np.array(lengths), budget, world)
    except KinvecError:
        assert len(lengths) < world * math.ceil(sum(lengths) / (budget * world))
        return
    assert sorted(row for own in dealt for group in own for row in group) == list(range(len(lengths)))
    assert len({len(own) for own in dealt}) == 1 and all(group for own in dealt for group in own)
    if world > 1 and len(lengths) > 10 * world:
        sizes = [sum(lengths[row] for group in own for row in group) for own in dealt]
        assert max(sizes) - min(sizes) <= 2 * max(lengths) * len(dealt[0])


# ---- whole runs ----

STEPS, SAVED = 12, 3
KEPT = 2 * SAVED + 1  # steps after which the first checkpoint is on the disk: the next one waits for it


@pytest.fixture(scope="module")
def recipe(tiny_folder: Path, tiny_pairs: Path) -> list[str]:
    """A short training with a dev set; dropout is on, so that a wrong random state would show."""
    return [
        "train", f"model={tiny_folder}", f"data.train={tiny_pairs}", "trainer.batch_size=8",
        f"trainer.max_steps={STEPS}", f"trainer.save_every={SAVED}", "trainer.eval_every=6", "trainer.lr=1e-3",
        "seed=1", "threads=1", "precision=fp32",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone_run(recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That training by one process, without dropout, whose masks each process draws for itself."""
    run = tmp_path_factory.mktemp("alone") / "run"
    finished(ranks.command(1, [*recipe, "trainer.dropout=0", f"out={run}"], run.with_name("said")))
    return run


def finished(started: list[Any]) -> None:
    codes = [one.wait() for one in started]
    assert codes == [0] * len(started), [one.said for one in started]


def model_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda said, n=name: f"{n}: {said}")


@pytest.mark.parametrize("shard", ["null", "all"])
def test_two_processes_train_what_one_trains(tmp_path: Path, recipe: list[str], alone_run: Path, shard: str) -> None:
    """Without dropout: losses, dev metrics and weights."""
    alike = [*recipe, "trainer.dropout=0", f"trainer.shard={shard}"]
    finished(ranks.command(2, [*alike, f"out={tmp_path / 'two'}"], tmp_path / "said"))
    one, two = log_of(alone_run), log_of(tmp_path / "two")
    assert [row["step"] for row in two] == list(range(1, STEPS + 1))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-4) and a["tokens"] == b["tokens"], a["step"]
    assert one[-1]["dev"]["nDCG@10"] == pytest.approx(two[-1]["dev"]["nDCG@10"], abs=0.02)
    assert_close(model_of(alone_run), model_of(tmp_path / "two"), 2e-4)


@pytest.mark.parametrize("shard", ["null", "all"])
def test_a_process_killed_stops_all_and_the_same_command_goes_on(tmp_path: Path, recipe: list[str], shard: str) -> None:
    """To the bit with as many processes, closely with another number of them."""
    recipe = [*recipe, f"trainer.shard={shard}"]
    finished(ranks.command(2, [*recipe, f"out={tmp_path / 'whole'}"], tmp_path / "said"))
    saved = dict(checkpoint.steps(tmp_path / "whole" / "checkpoints"))
    assert checkpoint.names(saved[STEPS]) == checkpoint.names(saved[STEPS - SAVED]), "lost where it was evaluated first"
    broken = tmp_path / "broken"
    started = ranks.command(2, [*recipe, f"out={broken}"], tmp_path / "said")
    assert started[0].wait_for(broken / "log.jsonl", KEPT), started[0].said
    started[1].kill()
    assert started[0].wait() != 0, "it waits for ever for the one that is gone"
    kept = sorted(path.name for path in (broken / "checkpoints").iterdir() if path.name.startswith("step-"))
    assert kept, started[0].said
    finished(ranks.command(2, [*recipe, f"out={broken}"], tmp_path / "said"))
    whole, again = model_of(tmp_path / "whole"), model_of(broken)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [row["step"] for row in log_of(broken)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(("before", "after", "shard"), [(2, 1, "all"), (1, 2, "null"), (2, 3, "all")])
def test_a_checkpoint_is_resumed_by_another_number_of_processes(
    tmp_path: Path, recipe: list[str], alone_run: Path, before: int, after: int, shard: str
) -> None:
    recipe = [*recipe, f"trainer.shard={shard}", "trainer.dropout=0"]
    run = tmp_path / "run"
    started = ranks.command(before, [*recipe, f"out={run}"], tmp_path / "said")
    assert started[0].wait_for(run / "log.jsonl", KEPT), started[0].said
    for one in started:
        one.kill()
    finished(ranks.command(after, [*recipe, f"out={run}"], tmp_path / "said"))
    assert_close(model_of(alone_run), model_of(run), 2e-4)


def test_torchrun_starts_again_when_a_process_is_killed(tmp_path: Path, recipe: list[str]) -> None:
    """The real launcher, with `--max-restarts`: one process is killed, all begin again from the checkpoint."""
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "kinvec", *recipe, f"out={run}",
    ]  # fmt: skip
    with open(tmp_path / "launcher", "w") as said:
        launcher = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"})
    log, killed = run / "log.jsonl", False
    while launcher.poll() is None:
        if not killed and log.exists() and log.read_bytes().count(b"\n") >= KEPT:
            workers = psutil.Process(launcher.pid).children()
            workers[-1].kill()
            killed = True
        time.sleep(0.001)
    told = (tmp_path / "launcher").read_text()
    assert launcher.returncode == 0 and killed, told
    assert "continuing after step" in told, told
    assert [row["step"] for row in log_of(run)] == list(range(1, STEPS + 1)) and model_of(run)


# ---- led by the first ----


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All files but those that tell when and how fast."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in (".npy", ".ids", ".jsonl", ".tsv")
    }  # fmt: skip


def test_vectors_and_negatives_of_three_processes_are_those_of_one(
    tmp_path: Path, tiny_folder: Path, tiny_pairs: Path
) -> None:
    """Same ids in the same order, same ranking, same bytes, at equal threads."""
    where: dict[int, Path] = {}
    for world in (1, 3):
        where[world] = tmp_path / str(world)
        where[world].mkdir()
        model = ["--model", str(tiny_folder), "--threads", "1", "--precision", "fp32"]
        finished(ranks.command(
            world, ["embed", *model, "--queries", str(tiny_pairs), "--docs", str(tiny_pairs), "--out",
                    str(where[world] / "vectors")], tmp_path / "said",
        ))  # fmt: skip
        finished(ranks.command(
            world, ["mine", *model, "--data", str(tiny_pairs), "--out", str(where[world] / "mined")],
            tmp_path / "said",
        ))  # fmt: skip
    one, three = bytes_of(where[1]), bytes_of(where[3])
    assert one.keys() == three.keys() and len(one) > 6
    assert [name for name in one if one[name] != three[name]] == []


def share_out(out: Path) -> None:
    """What rank 0 gets of work that is shared out, and what the others get of what it made."""
    import os

    from kinvec import distributed

    def lead() -> list[Any]:
        done = list(distributed.shared(lambda part: (part, os.getpid()), list(range(7)), whose))
        return [[part for part, _ in done], len({process for _, process in done})]

    found = distributed.led(lead)
    (out / f"{distributed.rank()}.json").write_text(json.dumps(found))


def whose(part: int) -> tuple[int, int]:
    import os

    return part, os.getpid()


def test_work_that_is_shared_out_is_done_by_all_and_comes_back_in_order(tmp_path: Path) -> None:
    ranks.run(3, share_out, tmp_path, output=tmp_path / "said")
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [list(range(7)), 3]


def fail_on_the_first() -> None:
    from kinvec import distributed

    def lead() -> None:
        raise KinvecError("the file is not there")

    try:
        distributed.led(lead)
    except KinvecError:
        assert distributed.rank() == 0
    except SystemExit as ended:
        assert distributed.rank() == 1 and ended.code == 1


def test_where_the_first_fails_the_others_end(tmp_path: Path) -> None:
    ranks.run(2, fail_on_the_first, output=tmp_path / "said")
