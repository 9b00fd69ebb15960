"""Hard-negative mining beside its peers, in one run, each arm in a process of its own and alternating; and its memory.

From vectors: the 100 best of 500,000 × 384 for 10,000 queries, against a flat index of faiss (`pip install faiss-cpu`).
From text: SciFact and TyDi's training questions against all their documents, `kinvec mine` as a whole against
sentence-transformers' `mine_hard_negatives` on an opened model, with the same limits. Memory:
`kinvec mine --embeddings` with 2,000,000 × 384 vectors on disk, its peak as the kernel counts it. Results go to
benchmarks/results/, with versions and machine. By hand, one arm: python benchmarks/mining.py --arm from-vectors kinvec.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from arms import MODEL, SHARED, peer_model

HERE = Path(__file__).parent
SOURCES = {"SciFact": "scifact", "TyDi": "tydiqa_en/tydiqa.goldp.en.train.json"}
DIMENSIONS, BEST = 384, 100
NEGATIVES, DEPTH, RELATIVE = 4, 100, 0.95


def draw(rows: int, seed: int) -> np.ndarray:
    """Unit vectors in ten thousand clusters, as a corpus has topics."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((10_000, DIMENSIONS), dtype=np.float32)
    vectors = centres[rng.integers(0, len(centres), rows)]
    vectors += 1.5 * rng.standard_normal((rows, DIMENSIONS), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# --- Arms -----------------------------------------------------------------------------------------------------------


def vectors_kinvec(folder: Path) -> float:
    """Seconds of an exact search."""
    from kinvec.topk import top_k

    queries, documents = (np.load(folder / f"{side}.npy") for side in ("query", "doc"))
    ids = [str(row) for row in range(len(documents))]
    begun = time.perf_counter()
    found = top_k(queries, [documents], ids, BEST)[1]
    seconds = time.perf_counter() - begun
    np.save(folder / "kinvec-found.npy", found)
    return seconds


def vectors_faiss(folder: Path) -> float:
    """Seconds of filling a flat index and searching it."""
    import faiss

    queries, documents = (np.load(folder / f"{side}.npy") for side in ("query", "doc"))
    begun = time.perf_counter()
    index = faiss.IndexFlatIP(DIMENSIONS)
    index.add(documents)
    found = index.search(queries, BEST)[1]
    seconds = time.perf_counter() - begun
    np.save(folder / "faiss-found.npy", found)
    return seconds


def text_kinvec(folder: Path) -> float:
    """Seconds of the whole verb: reading, opening the model, encoding, searching, writing."""
    from kinvec.mining import MiningSettings
    from kinvec.verbs.mine import mine

    begun = time.perf_counter()
    for name, source in SOURCES.items():
        with tempfile.TemporaryDirectory() as out:
            told = mine(
                MODEL, SHARED / source, out, MiningSettings(negatives=NEGATIVES, depth=DEPTH, relative=RELATIVE)
            )
            print(name, told["negatives"], "negatives", file=sys.stderr)
    return time.perf_counter() - begun


def text_peer(folder: Path, precision: str) -> float:
    """Seconds of sentence-transformers' own miner, model and data sets open already."""
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    from kinvec.files import open_retrieval

    model, seconds = peer_model(precision), 0.0
    model.encode(["warm"] * 8)
    for name, source in SOURCES.items():
        data = open_retrieval(SHARED / source, split="train")
        texts = dict(zip(data.corpus.ids, data.corpus.texts, strict=True))
        pairs = [
            (data.queries[q], texts[d]) for q, judged in data.qrels.items() for d, grade in judged.items() if grade
        ]
        rows = Dataset.from_dict({"query": [q for q, _ in pairs], "answer": [d for _, d in pairs]})
        begun = time.perf_counter()
        mined = mine_hard_negatives(
            rows, model, corpus=list(texts.values()), num_negatives=NEGATIVES, range_max=DEPTH,
            relative_margin=1 - RELATIVE, batch_size=32, verbose=False,
        )  # fmt: skip
        seconds += time.perf_counter() - begun
        print(name, len(mined), "negatives", file=sys.stderr)
    return seconds


ARMS = {
    "from-vectors": {"kinvec": vectors_kinvec, "faiss": vectors_faiss},
    "from-text": {
        "kinvec": text_kinvec,
        "peer": lambda folder: text_peer(folder, "fp32"),
        "peer-bf16": lambda folder: text_peer(folder, "bf16"),
    },
}


# --- The run --------------------------------------------------------------------------------------------------------


def measured(job: str, arm: str, folder: Path) -> float:
    """The seconds of one arm in a process of its own."""
    command = [sys.executable, __file__, "--arm", job, arm, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    print(f"{job}: {arm} {done.stdout.strip()} s", file=sys.stderr, flush=True)
    return float(done.stdout.strip().splitlines()[-1])


def alternated(job: str, arms: list[str], rounds: int, folder: Path) -> dict[str, Any]:
    """Every arm once a round: medians, all times, and how many times as long as kinvec the others take."""
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm in arms:
            times[arm].append(round(measured(job, arm, folder), 2))
    medians = {arm: statistics.median(found) for arm, found in times.items()}
    ratios = {arm: round(medians[arm] / medians["kinvec"], 2) for arm in arms if arm != "kinvec"}
    return {"seconds": medians, "all_seconds": times, "times_faster_than": ratios}


def from_vectors(rows: int, queries: int, rounds: int) -> dict[str, Any]:
    """Both arms, and what they found held against float64 over all pairs of a sample of the queries."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "query.npy", draw(queries, 1))
        np.save(folder / "doc.npy", draw(rows, 2))
        told = alternated("from-vectors", ["kinvec", "faiss"], rounds, folder)
        sample = np.arange(0, queries, max(1, queries // 100))
        exact = np.load(folder / "query.npy")[sample].astype(np.float64) @ np.load(folder / "doc.npy").T.astype(
            np.float64
        )
        best = np.argpartition(-exact, BEST, axis=1)[:, :BEST]
        for arm in ("kinvec", "faiss"):
            found = np.load(folder / f"{arm}-found.npy")[sample]
            told[f"recall_{arm}"] = float(np.mean([np.isin(a, b).mean() for a, b in zip(best, found, strict=True)]))
        return told | {"queries": queries, "documents": rows, "dimensions": DIMENSIONS, "best": BEST}


def resident_peak(pid: int) -> float:
    """GiB that a process has held at most so far, mapped files counted, as Linux tells; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM")), 0.0)


def memory(rows: int, queries: int, budget: str) -> dict[str, Any]:
    """`kinvec mine --embeddings` on vectors on disk: seconds, and the peak of its resident memory."""
    from kinvec.files.vectors import SHARD_WINDOWS, WINDOW

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data" / "qrels").mkdir(parents=True)
        (folder / "vectors").mkdir()
        for side, word, count in (("corpus", "document", rows), ("queries", "question", queries)):
            with open(folder / "data" / f"{side}.jsonl", "w") as file:
                file.writelines(f'{{"_id": "{side[0]}{row}", "text": "{word} number {row}"}}\n' for row in range(count))
        judged = "".join(f"q{row}\tc{row * (rows // queries)}\t1\n" for row in range(queries))
        (folder / "data" / "qrels" / "train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
        np.save(folder / "vectors" / "query.npy", draw(queries, 1))
        (folder / "vectors" / "query.ids").write_text("".join(f"q{row}\n" for row in range(queries)))
        (folder / "vectors" / "doc.ids").write_text("".join(f"c{row}\n" for row in range(rows)))
        for number, start in enumerate(range(0, rows, WINDOW * SHARD_WINDOWS)):
            shard = draw(min(WINDOW * SHARD_WINDOWS, rows - start), 100 + number)
            np.save(folder / "vectors" / f"doc-{number:05d}.npy", shard)
        program = str(Path(sys.executable).with_name("kinvec"))
        command = [
            program,
            "mine",
            "--embeddings",
            folder / "vectors",
            "--data",
            folder / "data",
            "--out",
            folder / "out",
        ]
        begun = time.perf_counter()
        with open(folder / "said", "w") as said, open(folder / "told", "w") as answer:
            process = subprocess.Popen(
                [*map(str, command), "--memory", budget, "--json"], stdout=answer, stderr=said, text=True
            )
            peak = 0.0
            while process.poll() is None:  # rusage of a child would count what this process held when it was started
                peak = max(peak, resident_peak(process.pid))
                time.sleep(0.5)
        if process.returncode:
            raise SystemExit((folder / "said").read_text()[-2000:])
        told = json.loads((folder / "told").read_text())
        return {
            "documents": rows, "queries": queries, "budget": budget, "peak_gib": round(peak, 3),
            "seconds": round(time.perf_counter() - begun, 1), "negatives": told["negatives"],
        }  # fmt: skip


def main() -> None:
    """Measure what is asked for, everything without --only, and write each part down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text-rounds", type=int, default=1, help="of the arms from text: a quarter of an hour each")
    parser.add_argument("--documents", type=int, default=500_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--stored", type=int, default=2_000_000, help="documents on disk, for the memory")
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--only", choices=["from-vectors", "from-text", "memory"])
    parser.add_argument("--arm", nargs=2, metavar=("JOB", "ARM"))
    parser.add_argument("--folder", type=Path, default=Path())
    options = parser.parse_args()
    if options.arm:
        job, arm = options.arm
        print(ARMS[job][arm](options.folder))
        return
    parts = {
        "memory": lambda: memory(options.stored, options.queries, options.memory),
        "from-vectors": lambda: from_vectors(options.documents, options.queries, options.rounds),
        "from-text": lambda: alternated("from-text", list(ARMS["from-text"]), options.text_rounds, Path()),
    }
    from speed import processor

    about = {
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {
            name: version(name) for name in ("kinvec", "torch", "numpy", "sentence-transformers", "faiss-cpu")
        },
    }
    for name, part in parts.items():
        if options.only in (None, name):
            told = json.dumps({name: part()} | about, indent=2) + "\n"
            (HERE / "results" / f"mining-{name}-{date.today().isoformat()}.json").write_text(told, "utf-8")
            print(told)


if __name__ == "__main__":
    main()
