"""`make soak`: training, encoding and mining again and again in one process; do memory and open files grow?

Every round trains all-MiniLM-L6-v2 for a few steps on part of SciFact, embeds part of the corpus and mines negatives
for some queries, each into a new folder that is deleted. After every round the resident memory, the open files and the
threads are noted. A slope is that of a line through the rounds after the first tenth, with its 95 % interval (least
squares); memory grows where the interval lies above 0 and the slope is more than a hundredth of the memory in an hour.
Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from arms import MODEL, SHARED
from scipy import stats

HERE = Path(__file__).parent
DOCUMENTS, PAIRS = 300, 64


def write_data(folder: Path) -> None:
    """A BEIR folder: the first documents of SciFact and, of those with an abstract, titles as queries."""
    (folder / "qrels").mkdir(parents=True)
    lines = (SHARED / "scifact" / "corpus.jsonl").read_text("utf-8").splitlines()[:DOCUMENTS]
    rows = [json.loads(line) for line in lines]
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": row["_id"], "text": row["text"][:400]}) + "\n" for row in rows), "utf-8"
    )
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{row['_id']}", "text": row["title"]}) + "\n" for row in rows[:PAIRS]), "utf-8"
    )
    judged = "".join(f"q{row['_id']}\t{row['_id']}\t1\n" for row in rows[:PAIRS])
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged, "utf-8")


def work(data: Path, folder: Path) -> None:
    """One round, as the commands do it."""
    from kinvec.mining import MiningSettings
    from kinvec.verbs.embed import embed
    from kinvec.verbs.mine import mine
    from kinvec.verbs.train import train

    mine(MODEL, data, folder / "mined", MiningSettings(negatives=1, depth=20))
    settings = {
        "model": MODEL, "data.train": folder / "mined", "out": folder / "run", "trainer.batch_size": 16,
        "trainer.max_steps": 4, "trainer.save_every": 2, "trainer.eval_every": 2, "data.max_length": 64,
    }  # fmt: skip
    train(None, [f"{key}={value}" for key, value in settings.items()])
    embed(folder / "run" / "model", folder / "vectors", docs=data / "corpus.jsonl")


def growth(values: np.ndarray, hours: np.ndarray) -> dict[str, float]:
    """The slope an hour of the rounds after the first tenth, with its interval."""
    kept = slice(max(1, len(values) // 10), None)
    line = stats.linregress(hours[kept], values[kept])
    reach = float(np.nan_to_num(stats.t.ppf(0.975, max(len(values[kept]) - 2, 1)) * line.stderr))  # nothing changed
    return {
        "first": float(values[kept][0]), "last": float(values[-1]), "most": float(values.max()),
        "slope_per_hour": float(line.slope), "low": float(line.slope) - reach, "high": float(line.slope) + reach,
    }  # fmt: skip


def main() -> None:
    """Work for so many minutes, then say what grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=45)
    options = parser.parse_args()
    process, rows, begun = psutil.Process(), [], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        write_data(Path(name) / "data")
        while (elapsed := time.monotonic() - begun) < 60 * options.minutes:
            place = Path(name) / "round"
            work(Path(name) / "data", place)
            shutil.rmtree(place)
            row = {"seconds": round(elapsed), "mib": process.memory_info().rss / 2**20, "files": process.num_fds()}
            rows.append(row | {"threads": process.num_threads()})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    columns: dict[str, Any] = {key: np.array([row[key] for row in rows], dtype=float) for key in rows[0]}
    hours = columns.pop("seconds") / 3600
    found = {key: growth(values, hours) for key, values in columns.items()}
    memory, files = found["mib"], columns["files"]
    grows = [memory["low"] > 0 and memory["slope_per_hour"] > 0.01 * memory["first"], bool(files[-1] > files[1])]
    told = {"rounds": len(rows), "hours": float(hours[-1]), **found}
    told |= {"memory_grows": grows[0], "files_grow": grows[1]}
    out = HERE / "results" / f"soak-{date.today().isoformat()}.json"
    out.write_text(json.dumps(told | {"each": rows}, indent=2) + "\n", "utf-8")
    print(json.dumps(told, indent=2))
    sys.exit(any(grows))


if __name__ == "__main__":
    main()
