"""`python benchmarks/gradcache.py`: a batch of 4,096 pairs in bounded memory, and what it costs beside a small batch.

all-MiniLM-L6-v2 on pairs of two texts of 64 tokens (halves of SciFact's abstracts), dropout 0.1, AdamW. Each arm is a
process of its own, and the arms take turns; medians. kinvec: batch 64, nothing recomputed; batch 4,096 within the
memory budget. sentence-transformers: CachedMultipleNegativesRankingLoss under its trainer with `bf16=True`, the best of
several mini-batches. The targets: 4,096 pairs within 6 GiB of the process's peak, and 1.45 times the time per pair of
batch 64 at most. Results go to benchmarks/results/.

    python benchmarks/gradcache.py                   # an hour of the peer, most of it; --rounds 1 for a look
    python benchmarks/gradcache.py --arm peer 512 2  # one arm: who, batch, steps, and the peer's mini-batch
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from arms import DROPOUT, MODEL, SHARED, peer_trainer

HERE = Path(__file__).parent
LENGTH, SMALL, LARGE = 64, 64, 4096
BUDGET = "3GiB"  # of activations; the rest of 6 GiB is the process, weights, gradients, moments, a chunk in flight


def write_pairs(path: Path, count: int) -> None:
    """The first two runs of words of as many abstracts as are long enough, each of 64 tokens once it is cut there."""
    found = []
    for line in (SHARED / "scifact" / "corpus.jsonl").read_text("utf-8").splitlines():
        words = json.loads(line)["text"].split()
        if len(words) >= 2 * LENGTH:  # a word is one token or more
            found.append({"query": " ".join(words[:LENGTH]), "pos_doc": " ".join(words[LENGTH : 2 * LENGTH])})
    rows = [found[place % len(found)] | {"query_id": str(place)} for place in range(count)]
    for place, row in enumerate(rows[len(found) :], len(found)):  # again, with another word in front: no duplicates
        rows[place] = row | {"query": f"{place} {row['query']}", "pos_doc": f"{place} {row['pos_doc']}"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def train_kinvec(batch: int, steps: int, pairs: str) -> list[float]:
    """Seconds of each step."""
    from kinvec.pipeline import open_model, open_run_data
    from kinvec.recipe import load_recipe
    from kinvec.run_data import mixture
    from kinvec.trainer import fit

    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("scifact", [
            f"model={MODEL}", f"data.train={pairs}", f"out={folder}", "evaluate=false", f"data.max_length={LENGTH}",
            f"trainer.batch_size={batch}", f"trainer.max_steps={steps}", "trainer.save_every=1000000",
            "trainer.eval_every=0", f"trainer.dropout={DROPOUT}", f"trainer.memory_budget={BUDGET}",
        ])  # fmt: skip
        data, embedder = open_run_data(recipe), open_model(recipe)
        fit(embedder, mixture(recipe, data, embedder.prompts), recipe.trainer, Path(folder))
        log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
        return [row["tokens"] / row["tokens_per_s"] for row in log]


def train_peer(batch: int, steps: int, pairs: str, mini: int) -> list[float]:
    """Seconds of each step of sentence-transformers' trainer, with bf16."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    loss = partial(CachedMultipleNegativesRankingLoss, mini_batch_size=mini)
    with tempfile.TemporaryDirectory() as folder:
        trainer = peer_trainer(
            loss, pairs, LENGTH, output_dir=folder, per_device_train_batch_size=batch, max_steps=steps, bf16=True
        )
        trainer.add_callback(Clock())
        begun = time.perf_counter()
        trainer.train()
    return [after - before for before, after in zip([begun, *ends], ends, strict=False)]


def arm(who: str, batch: int, steps: int, mini: int) -> dict[str, float]:
    """One measurement: seconds a pair (the median step after the first, where there are more), peak of the process."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = str(Path(folder) / "pairs.jsonl")
        write_pairs(Path(pairs), max(LARGE, batch) * 2)
        every = train_kinvec(batch, steps, pairs) if who == "kinvec" else train_peer(batch, steps, pairs, mini)
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
    seconds = statistics.median(every[1:] or every)
    return {"ms_per_pair": 1000 * seconds / batch, "seconds": seconds, "peak_gib": int(peak) / 2**20, "steps": steps}


def measured(who: str, batch: int, steps: int, mini: int = 0) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, str(HERE / "gradcache.py"), "--arm", who, str(batch), str(steps), str(mini)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(who, batch, mini or "", found, file=sys.stderr, flush=True)
    return found


def median(found: list[dict[str, float]]) -> dict[str, Any]:
    """Of the rounds of one arm: the median time, the highest peak, and all times."""
    times = [one["ms_per_pair"] for one in found]
    most = max(one["peak_gib"] for one in found)
    return {"ms_per_pair": statistics.median(times), "all": times, "peak_gib": most, "steps": found[0]["steps"]}


def main() -> None:
    """Measure every arm in turn, write the result, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", nargs="+", help="one arm, in this process: who, batch, steps, mini-batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps of the large batch; of one, that one is timed")
    parser.add_argument("--peer", type=int, default=512, help="the batch of the peer; its cost a pair hardly depends")
    options = parser.parse_args()
    if options.arm:
        who, batch, steps, mini = (*options.arm, "0")[:4]
        print(json.dumps(arm(who, int(batch), int(steps), int(mini))))
        return
    tried = {mini: measured("peer", options.peer, 1, mini) for mini in (32, 128)}
    mini = min(tried, key=lambda size: tried[size]["ms_per_pair"])
    arms = {
        "kinvec 64": ("kinvec", SMALL, 16, 0), "kinvec 4096": ("kinvec", LARGE, options.steps, 0),
        f"peer {options.peer}, mini-batch {mini}": ("peer", options.peer, 2, mini),
    }  # fmt: skip
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for _ in range(options.rounds):
        for name, words in arms.items():
            runs[name].append(measured(*words))
    found = {name: median(rounds) for name, rounds in runs.items()}
    small, large, peer = (one["ms_per_pair"] for one in found.values())
    result = {
        "date": date.today().isoformat(), "cores": os.cpu_count(), "tokens_per_text": LENGTH, "budget": BUDGET,
        "versions": {name: version(name) for name in ("kinvec", "torch", "transformers", "sentence-transformers")},
        "arms": found, "mini_batches": {str(size): one["ms_per_pair"] for size, one in tried.items()},
        "times_of_batch_64": round(large / small, 3), "times_faster_than_peer": round(peer / large, 2),
    }  # fmt: skip
    (HERE / "results" / f"gradcache-{result['date']}.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
