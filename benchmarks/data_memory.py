"""Seconds and peak memory of opening and checking a large file: `data_memory.py [rows] [bytes a row]`.

Each step runs in a process of its own, so that its peak is its own: write the file, check it (which parses it into the
memory-mapped copy), open it again, and read 10,000 rows of it at random. Everything lies in a temporary folder.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [
    f"{a}{b}{c}"
    for a in ("ka", "lo", "mi", "ne", "pu")
    for b in ("ran", "ste", "vil", "dor")
    for c in ("a", "en", "ic")
]


def write(path: Path, rows: int, size: int) -> str:
    """`rows` lines of about `size` bytes: a query, a positive and a negative of real-looking words, all different."""
    random.seed(0)
    width = sum(map(len, WORDS)) / len(WORDS) + 1
    count = int((size - 80) / width / 2)
    with open(path, "w", encoding="utf-8") as file:
        for row in range(rows):
            words = random.choices(WORDS, k=2 * count)
            positive, negative = " ".join(words[:count]), " ".join(words[count:])
            file.write(
                json.dumps({"query": f"question {row} {words[0]}", "pos_doc": positive, "neg_doc": [negative]}) + "\n"
            )
    return f"{path.stat().st_size / 1e9:.2f} GB"


def check(path: Path) -> str:
    """All rules over the file, parsed for the first time."""
    from kinvec.doctor import check_source

    checked = check_source(path)
    return f"{checked.summary['rows']:,} rows, {len(checked.findings)} findings"


def reopen(path: Path) -> str:
    """Open it again, from the memory-mapped copy."""
    from kinvec.files import open_data

    return f"{len(open_data(path)):,} rows"


def read(path: Path) -> str:
    """10,000 rows at random."""
    from kinvec.files import open_data

    table = open_data(path)
    random.seed(1)
    length = sum(len(table.example(random.randrange(len(table))).positives[0]) for _ in range(10_000))
    return f"{length:,} characters"


STEPS = {"check": check, "reopen": reopen, "read": read}


def main(rows: int = 1_000_000, size: int = 1000) -> None:
    """Print a row a step: what, rows, seconds, peak memory, what came of it."""
    print(f"{'step':<8}{'rows':>12}{'seconds':>10}{'peak MiB':>10}  result")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        begun = time.monotonic()
        result = write(path, rows, size)
        print(f"{'write':<8}{rows:>12,}{time.monotonic() - begun:>10.1f}{'':>10}  {result}", flush=True)
        for step in STEPS:
            command = [sys.executable, __file__, "--step", step, str(path)]
            environment = os.environ | {"KINVEC_CACHE": folder}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            print(f"{step:<8}{rows:>12,}{found['seconds']:>10.1f}{found['peak']:>10.0f}  {found['result']}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        begun = time.monotonic()
        result = STEPS[sys.argv[2]](Path(sys.argv[3]))
        seconds, peak = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "peak": peak, "result": result}))
    else:
        main(*map(int, sys.argv[1:]))
