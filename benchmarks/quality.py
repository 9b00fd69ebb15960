"""`python benchmarks/quality.py`: do as many steps of training teach as much as sentence-transformers' teach?

SciFact's training pairs, batch 32 of at most 256 tokens, dropout 0.1, one learning rate and schedule for all; kinvec in
its default precision, the peer's trainer with `bf16=True` (or `--arms peer:fp32`, its default). Only order and
dropout differ between seeds. Every model is measured by kinvec alike: nDCG@10 of the 300 test queries, by which
nothing is chosen, over all documents judged for them and others drawn. The target: the means differ by no more than
the seeds of one arm do. Results go to benchmarks/results/, after every seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from arms import BATCH, DROPOUT, LENGTH, MODEL, SHARED, peer_trainer, read_rows, scifact_pairs
from speed import processor

from kinvec.files import open_retrieval

HERE = Path(__file__).parent
SCIFACT = SHARED / "scifact"
STEPS, RATE, WARMUP, DECAY = 60, 5e-5, 0.1, 0.01  # two rounds through the pairs; the rest as in the recipe `scifact`
DOCUMENTS = 1500  # that are searched: 283 are judged


def write_data(folder: Path) -> None:
    """`pairs.jsonl` to train on, and `searched`, a BEIR folder of fewer documents."""
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in scifact_pairs()), "utf-8")
    data = open_retrieval(SCIFACT, split="test")
    judged = {document for row in data.qrels.values() for document in row}
    others = sorted(set(data.corpus.ids) - judged)
    chosen = judged | set(random.Random(0).sample(others, DOCUMENTS - len(judged)))
    rows = [row for row in read_rows(SCIFACT / "corpus.jsonl") if row["_id"] in chosen]
    (folder / "searched" / "qrels").mkdir(parents=True)
    (folder / "searched" / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for name in ("queries.jsonl", "qrels/test.tsv"):
        (folder / "searched" / name).write_bytes((SCIFACT / name).read_bytes())


def kinvec(*arguments: str) -> str:
    """What a command of kinvec prints."""
    done = subprocess.run([sys.executable, "-m", "kinvec", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"kinvec {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def train_kinvec(precision: str, seed: int, pairs: Path, out: Path) -> Path:
    """The folder of the trained model."""
    kinvec(
        "train", "scifact", f"model={MODEL}", f"data.train={pairs}", f"out={out}", f"seed={seed}", "evaluate=false",
        f"data.max_length={LENGTH}", "data.negatives_per_query=0", f"precision={precision}",
        f"trainer.batch_size={BATCH}", f"trainer.max_steps={STEPS}", f"trainer.dropout={DROPOUT}",
        f"trainer.lr={RATE}", f"trainer.warmup={WARMUP}", f"trainer.weight_decay={DECAY}",
    )  # fmt: skip
    return out / "model"


def train_peer(precision: str, seed: int, pairs: Path, out: Path) -> Path:
    """The same by sentence-transformers' trainer; no text twice in a batch, as its documentation advises."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    trainer = peer_trainer(
        partial(MultipleNegativesRankingLoss, scale=20.0), pairs, LENGTH, output_dir=str(out), seed=seed,
        per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=RATE, warmup_steps=round(WARMUP * STEPS),
        weight_decay=DECAY, lr_scheduler_type="linear", max_grad_norm=1.0, batch_sampler="no_duplicates",
        bf16=precision == "bf16",
    )  # fmt: skip
    trainer.train()
    trainer.model.save_pretrained(str(out / "model"))
    return out / "model"


def ndcg(model: str, folder: Path) -> float:
    """nDCG@10 as kinvec measures it."""
    found = kinvec("evaluate", "--model", model, "--data", str(folder / "searched"), "--json")
    return float(json.loads(found)["metrics"]["nDCG@10"])


def summary(found: dict[str, list[float]]) -> dict[str, Any]:
    """Mean and spread of every arm, and how far each mean is from the first arm's."""
    means = {arm: statistics.fmean(seeds) for arm, seeds in found.items()}
    first = next(iter(means.values()))
    return {
        arm: {"seeds": seeds, "mean": means[arm], "spread": max(seeds) - min(seeds), "from_first": means[arm] - first}
        for arm, seeds in found.items()
    }


def main() -> None:
    """Train every arm with every seed, in turn; write the result, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["kinvec:auto", "peer:bf16"], metavar="WHO:PRECISION")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    trainers = {"kinvec": train_kinvec, "peer": train_peer}
    found: dict[str, list[float]] = {arm: [] for arm in options.arms}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder)
        base = ndcg(MODEL, folder)
        for seed in options.seeds:
            for arm in options.arms:
                who, precision = arm.split(":")
                out = folder / f"{who}-{precision}-{seed}"
                found[arm].append(ndcg(str(trainers[who](precision, seed, folder / "pairs.jsonl", out)), folder))
                print(f"seed {seed}, {arm}: {found[arm][-1]:.4f} (base {base:.4f})", file=sys.stderr, flush=True)
            result = {
                "date": date.today().isoformat(),
                "machine": {"processor": processor(), "cores": os.cpu_count()},
                "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
                "steps": STEPS, "seeds": options.seeds, "documents": DOCUMENTS, "base": base, "arms": summary(found),
            }  # fmt: skip
            path = HERE / "results" / f"quality-{date.today().isoformat()}.json"
            path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(json.dumps(result["arms"], indent=2))


if __name__ == "__main__":
    main()
