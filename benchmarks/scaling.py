"""`python benchmarks/scaling.py`: how cost grows with processes, batch and corpus on this machine.

Training: all-MiniLM-L6-v2 on pairs of 16-token texts, batch 64 to 4,096, by one process and by two of one thread each.
Encoding: the same documents by one process and by two. Search: the 100 nearest of 10^4 to 10^6 vectors on disk for
1,000 queries, by one process and by two. Each is processes of its own; seconds are rank 0's, without loading; memory is
the peak of each process as the kernel counts it. Results go to benchmarks/results/.

    python benchmarks/scaling.py --arm train 1 256  # one arm: what, processes, size
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from arms import MODEL, SHARED

HERE = Path(__file__).parent
LENGTH = 16  # tokens a text
BATCHES, CORPORA, TEXTS = (64, 256, 1024, 4096), (10_000, 100_000, 1_000_000), (512, 2048)
QUERIES, BEST, DIMENSIONS = 1000, 100, 384


def sentences(count: int) -> list[str]:
    """Runs of words of SciFact's abstracts, longer than what is read of them."""
    words = [json.loads(line)["text"].split() for line in open(SHARED / "scifact" / "corpus.jsonl", encoding="utf-8")]
    runs = [" ".join(own[at : at + LENGTH]) for own in words for at in range(0, len(own) - LENGTH, LENGTH)]
    return [runs[row % len(runs)] + f" {row // len(runs)}" * (row >= len(runs)) for row in range(count)]


def train(batch: int) -> dict[str, Any]:
    """Seconds of a step, the first left out."""
    from kinvec import distributed
    from kinvec.pipeline import open_model, open_run_data
    from kinvec.recipe import load_recipe
    from kinvec.run_data import mixture
    from kinvec.trainer import fit

    distributed.start()
    steps = max(2, min(8, 1024 // batch))
    texts = sentences(2 * batch * steps)
    with tempfile.TemporaryDirectory() as name:
        folder, pairs = Path(name), Path(name) / "pairs.jsonl"
        rows = ({"query": a, "pos_doc": b} for a, b in zip(texts[::2], texts[1::2], strict=True))
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        recipe = load_recipe("scifact", [
            f"model={MODEL}", f"data.train={pairs}", f"out={folder}", "evaluate=false", f"data.max_length={LENGTH}",
            f"trainer.batch_size={batch}", f"trainer.max_steps={steps}", "trainer.save_every=1000000",
            "trainer.eval_every=0", "trainer.dropout=0.1", "trainer.memory_budget=2GiB",
        ])  # fmt: skip
        data, embedder = open_run_data(recipe), open_model(recipe)
        fit(embedder, mixture(recipe, data, embedder.prompts), recipe.trainer, folder)
        if distributed.rank():
            return {}
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    each = [row["tokens"] / row["tokens_per_s"] for row in log[1:]]
    return {"seconds": sum(each) / len(each), "tokens": log[-1]["tokens"]}


def embed(count: int) -> dict[str, Any]:
    """Seconds of encoding real documents."""
    from kinvec import distributed
    from kinvec.embedder import Embedder

    distributed.start()
    lines = open(SHARED / "scifact" / "corpus.jsonl", encoding="utf-8")
    texts = [json.loads(line)["text"] for line in lines][:count]

    def lead() -> dict[str, Any]:
        model = Embedder.load(MODEL)
        model.encode(texts[:64], progress=False)
        begun = time.perf_counter()
        model.encode(texts, progress=False)
        return {"seconds": time.perf_counter() - begun}

    return distributed.led(lead)


def search(count: int) -> dict[str, Any]:
    """Seconds of an exact search, and a checksum of what it found."""
    import xxhash
    from mining import draw

    from kinvec import distributed
    from kinvec.topk import top_k

    distributed.start()

    def lead() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            np.save(f"{folder}/doc.npy", draw(count, 2))
            documents, queries = [np.load(f"{folder}/doc.npy", mmap_mode="r")], draw(QUERIES, 1)
            ids = [f"{row:08d}" for row in range(count)]
            begun = time.perf_counter()
            rows = top_k(queries, documents, ids, BEST)[1]
            return {"seconds": time.perf_counter() - begun, "found": xxhash.xxh3_64_hexdigest(rows.tobytes())}

    return distributed.led(lead)


ARMS = {"train": (train, BATCHES), "embed": (embed, TEXTS), "search": (search, CORPORA)}


def measured(what: str, processes: int, size: int) -> dict[str, Any]:
    """One arm in processes of its own, as torchrun would start them, one thread each."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1}
    command = [sys.executable, __file__, "--arm", what, str(processes), str(size)]
    started = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True,
            env=os.environ | {name: str(value) for name, value in (common | {"RANK": r, "LOCAL_RANK": r}).items()},
        )
        for r in range(processes)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{what} {processes} {size} failed")
    told = json.loads(said[0].strip().splitlines()[-1])
    row = {"what": what, "processes": processes, "size": size} | told
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def arm(what: str, size: int) -> None:
    """Do one arm and print what it took, as rank 0."""
    import resource

    import torch

    torch.set_num_threads(1)
    told = ARMS[what][0](size)
    told["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
    told["seconds"] = round(told.get("seconds", 0.0), 3)
    print(json.dumps(told))


def main() -> None:
    """Measure everything, or one arm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", nargs=3, metavar=("WHAT", "PROCESSES", "SIZE"))
    parser.add_argument("--only", choices=list(ARMS))
    options = parser.parse_args()
    if options.arm:
        arm(options.arm[0], int(options.arm[2]))
        return
    chosen = {name: sizes for name, (_, sizes) in ARMS.items() if options.only in (None, name)}
    rows = [measured(name, n, size) for name, sizes in chosen.items() for size in sizes for n in (1, 2)]
    from speed import processor

    about = {"processor": processor(), "cores": os.cpu_count(), "torch": version("torch"), "kinvec": version("kinvec")}
    told = json.dumps({"machine": about, "rows": rows}, indent=2) + "\n"
    (HERE / "results" / f"scaling-{date.today().isoformat()}.json").write_text(told, "utf-8")
    print(told)


if __name__ == "__main__":
    main()
