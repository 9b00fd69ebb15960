"""`kinvec train` as a command: killed, stopped, begun anew, damaged; what a run folder then holds."""

from __future__ import annotations

import hashlib
import json
import random
import signal
from collections.abc import Callable
from pathlib import Path

import command_line
import pytest
import torch
from conftest import flip
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from test_trainer import FAST, log_of

import kinvec
from kinvec import Embedder, checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def arguments(tiny_folder: Path, tiny_pairs: Path) -> list[str]:
    settings = [f"trainer.{key}={value}" for key, value in FAST.items()]
    return ["train", f"model={tiny_folder}", f"data.train={tiny_pairs}", "threads=1", "evaluate=false", *settings]


def sha(run: Path) -> str:
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


def interrupted(tmp_path: Path, dev: Path, *more: str) -> list[str]:
    """A training of 80 steps with dropout, dev evaluation and checkpoints at steps that do not coincide."""
    steps = ["trainer.max_steps=80", "trainer.save_every=7", "trainer.eval_every=9", "trainer.keep=1"]
    return [f"data.dev={dev}", *steps, *more]


@pytest.mark.parametrize("lora", [(), ("lora.rank=2", "lora.dropout=0.1")], ids=["all weights", "lora"])
def test_killed_at_any_moment_it_ends_with_the_same_weights(
    tmp_path: Path, arguments: list[str], tiny_pairs: Path, lora: tuple[str, ...]
) -> None:
    """SIGKILL while it starts, then again and again while it trains and saves; every step is logged once."""
    argv = [*arguments, *interrupted(tmp_path, tiny_pairs, *lora)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command_line.start([*argv, f"out={whole}"], tmp_path / "said-whole").wait() == 0
    draw, ends = random.Random(), []
    for moment in (0, 4, 20, 45):
        command = command_line.start([*argv, f"out={killed}"], tmp_path / "said")
        reached = command.wait_for(killed / ("log.jsonl" if moment else "run.json"), max(moment, 1))
        assert reached, command.said
        command.process.join(draw.uniform(0, 0.05))
        ends.append(command.kill())
    assert ends.count(-signal.SIGKILL) >= 3, ends  # a fast machine may have finished before the last one
    last = command_line.start([*argv, f"out={killed}"], tmp_path / "said")
    assert last.wait() == 0, last.said
    assert sha(killed) == sha(whole)
    rows, expected = log_of(killed), log_of(whole)
    assert [row["step"] for row in rows] == list(range(1, 81))
    for key in ("loss", "grad_norm", "lr", "tokens", "dev"):
        assert [row.get(key) for row in rows] == [row.get(key) for row in expected], key
    assert last.said.count("continuing after step") >= 2  # the last two at least did not begin afresh
    leftovers = [path.name for path in killed.iterdir() if path.name.startswith(".")]
    assert not leftovers


def test_sigterm_saves_and_exits_and_the_same_command_goes_on(
    tmp_path: Path, arguments: list[str], tiny_pairs: Path
) -> None:
    argv = [*arguments, *interrupted(tmp_path, tiny_pairs), "trainer.save_every=1000", "trainer.eval_every=0"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command = command_line.start([*argv, f"out={stopped}"], tmp_path / "said")
    assert command.wait_for(stopped / "log.jsonl", 5), command.said
    assert command.kill(signal.SIGTERM) == 130
    assert "stopped; the same command continues" in command.said and "Traceback" not in command.said
    done = len(log_of(stopped))
    assert 5 <= done < 80
    assert [step for step, _ in checkpoint.steps(stopped / "checkpoints")] == [done]
    assert command_line.start([*argv, f"out={stopped}"], tmp_path / "said").wait() == 0
    assert f"continuing after step {done}" in command.said
    assert command_line.start([*argv, f"out={whole}"], tmp_path / "said-whole").wait() == 0
    assert sha(stopped) == sha(whole) and [row["step"] for row in log_of(stopped)] == list(range(1, 81))


def test_killed_while_it_evaluates_or_finishes_nothing_is_lost(tmp_path: Path, arguments: list[str]) -> None:
    """At the moment that each of the files of the end appears."""
    argv = [*arguments, "evaluate=true", "trainer.max_steps=12"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command_line.start([*argv, f"out={whole}"], tmp_path / "said-whole").wait() == 0
    for moment in ("results/base/pairs/results.json", "model/model.safetensors", "training.json", "report.html"):
        command = command_line.start([*argv, f"out={killed}"], tmp_path / "said")
        if command.wait_for(killed / moment, 0):
            command.kill()
    last = command_line.start([*argv, f"out={killed}"], tmp_path / "said")
    assert last.wait() == 0, last.said
    assert sha(killed) == sha(whole)
    names = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (whole, killed)]
    assert names[0] == names[1]
    first, second = (json.loads((run / "summary.json").read_text())["results"] for run in (whole, killed))
    assert first == second and first[0]["task"] == "pairs"
    for run in (whole, killed):
        assert "1. contrastive from" in (run / "model" / "README.md").read_text()
        assert len(Embedder.load(run / "model").lineage) == 1


def test_a_run_that_was_killed_before_it_began_can_be_begun(
    tmp_path: Path, arguments: list[str], main: Callable[..., tuple[int, str]]
) -> None:
    """What a kill while the folder is made leaves behind: only the folder beside."""
    beside = tmp_path / ".run.tmp"
    beside.mkdir()
    (beside / "run.json").write_text("{")
    code, said = main(*arguments, "trainer.max_steps=2", f"out={tmp_path / 'run'}")
    assert code == 0, said
    assert not beside.exists()
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"run.json", "recipe.yaml", "environment.json", "data.json", "log.jsonl", "model", "checkpoints"} <= made


def test_finished_other_settings_other_data_and_force(
    tmp_path: Path, arguments: list[str], tiny_pairs: Path, main: Callable[..., tuple[int, str]]
) -> None:
    out = f"out={tmp_path / 'run'}"
    argv = [*arguments, "trainer.max_steps=4", out]
    assert main(*argv)[0] == 0
    before = sha(tmp_path / "run")

    code, said = main(*argv)
    assert code == 0 and "this run is finished; --force starts it afresh" in said

    told = json.loads((tmp_path / "run" / "run.json").read_text())
    del told["settings"]["data"]["limit"], told["settings"]["attention"]  # as before there were such settings
    (tmp_path / "run" / "run.json").write_text(json.dumps(told))
    assert "this run is finished" in main(*argv)[1]
    assert "data.limit: None → 3" in main(*argv, "data.limit=3")[1]

    code, said = main(*argv, "trainer.lr=0.002", "data.negatives_per_query=1")
    assert code == 1 and "trainer.lr: 0.001 → 0.002" in said and "data.negatives_per_query: 4 → 1" in said
    assert "--force" in said and "Traceback" not in said

    moved = tmp_path / "moved.jsonl"  # inputs are recognised by content, not by path
    moved.write_bytes(tiny_pairs.read_bytes())
    assert "this run is finished" in main(*argv, f"data.train={moved}")[1]
    moved.write_bytes(tiny_pairs.read_bytes() + b'{"query": "one more", "pos_doc": "document"}\n')
    code, said = main(*argv, f"data.train={moved}")
    assert code == 1 and "train: its content differs" in said
    assert sha(tmp_path / "run") == before

    code, said = main(*argv, "trainer.lr=0.002", "--force")
    assert code == 0 and sha(tmp_path / "run") != before
    assert [row["step"] for row in log_of(tmp_path / "run")] == [1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved.jsonl", "run"]


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_folder_that_is_not_ours_is_never_touched(
    tmp_path: Path, arguments: list[str], main: Callable[..., tuple[int, str]], force: tuple[str, ...]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, said = main(*arguments, f"out={tmp_path}", *force)
    assert code == 1 and "not a run of kinvec; choose another out=" in said
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_of_damaged_checkpoints_is_said_and_training_goes_on_from_one_before(
    tmp_path: Path, arguments: list[str], tiny_pairs: Path, main: Callable[..., tuple[int, str]]
) -> None:
    """The newest; then the best, without which those after it are of no use; then all of them. The same weights."""
    argv = [*arguments, f"data.dev={tiny_pairs}", "trainer.max_steps=8", "trainer.eval_every=2", "trainer.keep=2"]
    argv += ["trainer.early_stop=0", f"out={tmp_path / 'run'}"]
    assert main(*argv)[0] == 0
    before, folder = sha(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    best = json.loads((tmp_path / "run" / "training.json").read_text())["best_step"]
    for steps, place in (([8], 0.5), ([best], 0.1), ([step for step, _ in checkpoint.steps(folder)], 0.9)):
        for name in ("summary.json", "training.json"):
            (tmp_path / "run" / name).unlink()
        for step in steps:
            flip(folder / f"step-{step:08d}" / ("__0_0.distcp" if place < 0.6 else "manifest.json"), place)
        code, said = main(*argv)
        assert code == 0 and f"step-{steps[-1]:08d}" in said and "the checkpoint is damaged" in said, said
        assert sha(tmp_path / "run") == before
        assert [row["step"] for row in log_of(tmp_path / "run")] == list(range(1, 9))
        for _, path in checkpoint.steps(folder):
            checkpoint.read_values(path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_lora_run_keeps_its_adapter_and_merges_it(
    tmp_path: Path, arguments: list[str], tiny_folder: Path, main: Callable[..., tuple[int, str]]
) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    run = tmp_path / "run"
    code, said = main(*arguments, "lora.rank=4", "trainer.max_steps=8", "trainer.lr=0.02", f"out={run}")
    assert code == 0, said
    base = AutoModel.from_pretrained(tiny_folder)
    start = {key: value.clone() for key, value in base.state_dict().items()}
    adapted = PeftModel.from_pretrained(base, str(run / "adapter")).merge_and_unload()
    merged = load_file(run / "model" / "model.safetensors")
    moved = 0.0
    for key, value in adapted.state_dict().items():
        if key in merged:
            torch.testing.assert_close(merged[key], value, atol=1e-5, rtol=0)
            moved = max(moved, float((merged[key] - start[key]).abs().max()))
    assert moved > 1e-2
    frozen = [key for key in merged if "embeddings.weight" in key or "LayerNorm" in key]
    assert len(frozen) > 4 and all(torch.equal(merged[key], start[key]) for key in frozen)
    said_by_adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert said_by_adapter["r"] == 4 and said_by_adapter["base_model_name_or_path"]
    texts = ["gene expression", "insulin and glucose in the blood", ""]
    peer = SentenceTransformer(str(run / "model"), device="cpu").encode(texts)
    ours = Embedder.load(run / "model", precision="fp32").encode(texts)
    assert (peer * ours).sum(1).min() > 0.99999


def test_a_users_own_objective_and_a_change_of_it(
    tmp_path: Path, arguments: list[str], main: Callable[..., tuple[int, str]]
) -> None:
    file = tmp_path / "my_file.py"
    text = "def my_loss(q, d, batch):\n    return (q - d[batch.targets]).pow(2).sum(1).mean()\n"
    file.write_text(text)
    argv = [*arguments, f"objective.name={file}:my_loss", "trainer.max_steps=20", f"out={tmp_path / 'run'}"]
    code, said = main(*argv)
    assert code == 0, said
    losses = [row["loss"] for row in log_of(tmp_path / "run")]
    assert 0 < losses[-1] < 0.5 * losses[0] < 2
    file.write_text(text.replace("pow(2)", "abs()"))
    code, said = main(*argv)
    assert code == 1 and "objective: its content differs" in said


def test_prompts_of_the_recipe_train_and_stay_with_the_model(
    tmp_path: Path, arguments: list[str], main: Callable[..., tuple[int, str]]
) -> None:
    prompts = ["prompts={query: 'cell blood ', document: 'human gene '}", "pool_prompt=false"]
    runs = {}
    for name, more in (("with", prompts), ("without", [])):
        code, said = main(*arguments, *more, "trainer.max_steps=2", f"out={tmp_path / name}")
        assert code == 0, said
        runs[name] = log_of(tmp_path / name)
    assert runs["with"][0]["tokens"] == runs["without"][0]["tokens"] + 2 * 8 * 3
    tuned = Embedder.load(tmp_path / "with" / "model", precision="fp32")
    assert tuned.prompts == {"query": "cell blood ", "document": "human gene "} and not tuned.include_prompt
    peer = SentenceTransformer(str(tmp_path / "with" / "model"), device="cpu").encode_query(["a drug"])
    assert float((peer * tuned.encode_queries(["a drug"])).sum()) > 0.99999
    assert "human gene" in (tmp_path / "with" / "model" / "README.md").read_text()


def test_the_python_function_returns_what_the_command_prints(
    tmp_path: Path, arguments: list[str], main: Callable[..., tuple[int, str]]
) -> None:
    argv = [*arguments, "evaluate=true", "trainer.max_steps=4", f"out={tmp_path / 'run'}"]
    summary = kinvec.train(None, argv[1:])
    code, said = main(*argv, "--json")
    assert code == 0 and json.loads(said[said.index("{") : said.rindex("}") + 1]) == summary
    for metric in summary["results"][0]["metrics"].values():
        assert metric["low"] <= metric["difference"] <= metric["high"]
    assert summary["results"][0]["baselines"]["BM25"]["nDCG@10"] > 0
    assert Path(summary["report"]).is_file() and Path(summary["model"]).is_dir()
