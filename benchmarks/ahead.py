"""What making tokens ahead saves where a device computes: `python benchmarks/ahead.py`; prints one line of JSON.

A pause of so many tokens a second stands in the model's place, as a GPU that takes no core: encoding is timed with and
without the thread that tokenizes the next window, in turn. Wall clock, so leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kinvec.embedder
from kinvec import machine
from kinvec.batching import Pack

sys.path.insert(0, str(Path(__file__).parent))
from arms import MODEL

WORDS = "the effect of insulin on glucose in human cells is not yet known and may depend on age".split()


def main() -> None:
    """Both ways in turn, and the ratio of their medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=500_000, help="tokens a second of what stands for a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model = kinvec.embedder.Embedder.load(MODEL)
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, draw.integers(5, 250))) for _ in range(2048)]

    def pause(texts: Pack) -> np.ndarray:
        time.sleep(sum(texts.lengths) / given.rate)
        return np.zeros((len(texts), model.dimension), dtype=np.float32)

    def tokenized_on(place: str) -> Callable[..., Iterator[Any]]:
        def ahead(make: Callable[[Any], Any], windows: Iterable[Any], _: torch.device) -> Iterator[Any]:
            return machine.ahead(make, windows, torch.device(place))

        return ahead

    model._vectors = pause  # type: ignore[method-assign]
    kinvec.embedder.WINDOW = 512
    seconds: dict[str, list[float]] = {"asked for": [], "ahead": []}
    for _ in range(given.rounds):
        for name, place in zip(seconds, ("cpu", "cuda"), strict=True):
            kinvec.embedder.ahead = tokenized_on(place)  # type: ignore[assignment]
            begun = time.perf_counter()
            model.encode(texts, progress=False)
            seconds[name].append(round(time.perf_counter() - begun, 3))
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(json.dumps({"seconds": seconds, "ratio": round(medians["asked for"] / medians["ahead"], 2)}))


if __name__ == "__main__":
    main()
