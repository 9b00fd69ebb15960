"""`make bench`: kinvec beside sentence-transformers on the same texts, alternating in one run; medians and ratios.

Encoding: kinvec at its default precision and in int8 against the peer's default (float32) and its bf16 weights, on
documents and on texts of 5 to 250 tokens. Training: batch 32, 256 tokens, dropout 0.1, against the peer's default
trainer and its `bf16=True`. Beside them: the machine's measured matrix-product roof, the share of it that is reached,
peak memory, fidelity (cosine to float32; nDCG@10 where all of SciFact is encoded), and start-up times of every verb.
The bf16 arms are left out where the processor has no bf16 product (they would be emulated, hundreds of times slower),
and the result says so. `--encode kinvec:int8 peer:bf16 …` encodes with these arms alone, and compares vectors with
the first one's. Results go to benchmarks/results/, with versions and machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import BATCH, LONG, MODEL, SHARED, SHORT, read_rows, scifact_pairs

from kinvec.machine import multiplies_bf16

HERE = Path(__file__).parent
ROOF_SHAPES = ((2048, 2048, 2048), (4096, 384, 1536))
WORDS_A_TOKEN = 0.65  # of SciFact's abstracts in MiniLM's tokens
LAYERS, WIDTH, PARAMETERS = 6, 384, 10.62e6  # of MiniLM-L6 without embeddings: what a token multiplies


SHORTEST, LONGEST, MIXED = 5, 250, 2000  # tokens of the texts of mixed length, about, and how many


def texts_and_pairs(folder: Path, limit: int | None) -> tuple[Path, Path, Path, str]:
    """Files of documents to encode, of texts of mixed length, and of pairs to train on: SciFact's, else docstrings."""
    texts, mixed, pairs = (folder / f"{name}.jsonl" for name in ("texts", "mixed", "pairs"))
    if (SHARED / "scifact").is_dir():
        from kinvec.files import open_retrieval

        corpus, rows, name = open_retrieval(SHARED / "scifact").corpus.texts, scifact_pairs(), "SciFact"
    else:
        from kinvec.docstrings import PACKAGES, collect

        found = collect(PACKAGES)
        rows = [{"query": pair.query, "pos_doc": pair.document} for pair in found]
        corpus, name = [pair.document for pair in found], "docstrings"
    chosen = list(corpus)[:limit] if limit else list(corpus)
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), "utf-8")
    cut = (" ".join(text.split()[:words]) for text, words in zip(corpus, mixed_words(), strict=False))
    mixed.write_text("".join(json.dumps({"text": text}) + "\n" for text in cut), "utf-8")
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows[:4000]), "utf-8")
    return texts, mixed, pairs, f"{name}: {len(chosen):,} texts"


def mixed_words() -> list[int]:
    """Words of the texts of mixed length, evenly from the shortest to the longest, in a random order."""
    words = np.linspace(SHORTEST, LONGEST, MIXED) * WORDS_A_TOKEN
    return np.random.default_rng(0).permutation(words.round().astype(int)).tolist()


def roof(dtype_name: str) -> list[float]:
    """TFLOP/s of matrix products at the shapes of ROOF_SHAPES, the best of seven."""
    found = []
    for m, k, n in ROOF_SHAPES:
        a, b = (torch.randn(shape).to(getattr(torch, dtype_name)) for shape in ((m, k), (k, n)))
        times = []
        for _ in range(8):
            begun = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - begun)
        found.append(round(2 * m * k * n / min(times[1:]) / 1e12, 3))
    return found


def measure(job: str, who: str, precision: str, source: Path, *rest: str) -> dict[str, float]:
    """One arm, in a process of its own."""
    command = [sys.executable, str(HERE / "arms.py"), job, who, precision, str(source), *rest]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def alternate(
    job: str, arms: list[tuple[str, str]], source: Path, rounds: int, folder: Path
) -> dict[str, dict[str, Any]]:
    """Every arm once a round; medians, and all single times."""
    runs: dict[str, list[dict[str, float]]] = {f"{who} {precision}": [] for who, precision in arms}
    for number in range(rounds):
        for who, precision in arms:
            name = f"{who} {precision}"
            runs[name].append(measure(job, who, precision, source, str(folder / f"{name.replace(' ', '-')}.npy")))
            print(
                f"{source.stem} round {number + 1}/{rounds}: {name} {runs[name][-1]['seconds']:.2f} s",
                file=sys.stderr,
                flush=True,
            )
    return {
        name: {
            "seconds": statistics.median(r["seconds"] for r in found),
            "all_seconds": [round(r["seconds"], 3) for r in found],
            "peak_gib": max(r["peak_gib"] for r in found),
        }
        for name, found in runs.items()
    }


def token_counts(source: Path, *columns: str) -> np.ndarray:
    """Tokens of every text of these columns after truncation at 256."""
    from transformers import AutoTokenizer

    from kinvec.backbone import find_model

    tokenizer = AutoTokenizer.from_pretrained(find_model(MODEL))
    texts = [row[column] for row in read_rows(source) for column in columns]
    return np.array([len(row) for row in tokenizer(texts, truncation=True, max_length=256)["input_ids"]])


def flops(lengths: np.ndarray, training: bool) -> float:
    """Multiplications and additions of one pass over texts of these lengths; training does three times as many."""
    forward = float((lengths * 2 * PARAMETERS + 4 * LAYERS * WIDTH * lengths.astype(float) ** 2).sum())
    return forward * (3 if training else 1)


def fidelity(folder: Path, one: str, other: str = "peer-fp32") -> dict[str, float]:
    """Cosine of an arm's vectors to those of another, the peer's float32 ones unless it is named."""
    ours, theirs = np.load(folder / f"{one}.npy"), np.load(folder / f"{other}.npy")
    cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    return {"cosine_mean": round(float(cosines.mean()), 6), "cosine_least": round(float(cosines.min()), 6)}


def found_by(folder: Path, arms: list[tuple[str, str]]) -> dict[str, float]:
    """nDCG@10 of each arm's vectors of SciFact's documents, for its own of the test queries; none without the data."""
    if not (SHARED / "scifact").is_dir():
        return {}
    import kinvec
    from kinvec.files import open_retrieval

    data, found = open_retrieval(SHARED / "scifact"), {}
    queries = folder / "queries.jsonl"
    queries.write_text("".join(json.dumps({"text": text}) + "\n" for text in data.queries.values()), "utf-8")
    for who, precision in arms:
        documents = np.load(folder / f"{who}-{precision}.npy")
        vectors = folder / f"{who}-{precision}-queries.npy"
        measure("encode", who, precision, queries, str(vectors))
        known = dict(zip([*data.corpus.texts, *data.queries.values()], [*documents, *np.load(vectors)], strict=True))
        result = kinvec.evaluate(Known(known), SHARED / "scifact")
        found[f"ndcg@10 {who} {precision}"] = round(result.metrics["nDCG@10"], 4)
    return found


class Known:
    """An encoder that has its vectors already."""

    def __init__(self, vectors: dict[str, np.ndarray]) -> None:
        self.name, self.prompts, self.vectors = "known", dict[str, str](), vectors

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of queries."""
        return np.stack([self.vectors[text] for text in texts])

    encode_documents = encode_queries


def encode_alone(arms: list[tuple[str, str]], limit: int | None, rounds: int) -> dict[str, Any]:
    """Seconds and texts a second of these arms, alternating, and how near each is to the first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts, *_, data = texts_and_pairs(folder, limit)
        encoding, count = alternate("encode", arms, texts, rounds, folder), len(texts.read_text("utf-8").splitlines())
        first = "-".join(arms[0])
        for (who, precision), row in zip(arms, encoding.values(), strict=True):
            row |= {"texts_per_s": count / row["seconds"], "to_first": fidelity(folder, f"{who}-{precision}", first)}
    return {"data": data, "encode": encoding}


def help_seconds() -> dict[str, float]:
    """Seconds of `kinvec --help` and of each verb's, the median of five."""
    from kinvec.cli import VERBS

    program = str(Path(sys.executable).with_name("kinvec"))
    found = {}
    for words in ([], *([verb] for verb in VERBS)):
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            subprocess.run([program, *words, "--help"], capture_output=True, check=True)
            times.append(time.perf_counter() - begun)
        found[" ".join(["kinvec", *words])] = round(statistics.median(times), 3)
    return found


def main() -> None:
    """Measure everything, write the result, print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="alternations (medians are taken over them)")
    parser.add_argument("--texts", type=int, default=None, help="encode only the first so many texts")
    parser.add_argument("--encode", nargs="+", metavar="WHO:PRECISION", help="encode alone, with these arms")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    bf16 = multiplies_bf16(torch.device("cpu"))
    if options.encode:
        named = [(who, precision) for who, _, precision in (arm.partition(":") for arm in options.encode)]
        write(machine(bf16) | encode_alone(named, options.texts, options.rounds), f"encode-{date.today().isoformat()}")
        return
    arms = [("kinvec", "auto"), ("peer", "fp32"), *([("peer", "bf16")] if bf16 else [])]
    result = machine(bf16) | {
        "roof_tflops": {"shapes": ROOF_SHAPES, "fp32": roof("float32")} | ({"bf16": roof("bfloat16")} if bf16 else {}),
        "help_seconds": help_seconds(),
    }
    best = 1e12 * max(result["roof_tflops"]["bf16" if bf16 else "fp32"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts, mixed, pairs, result["data"] = texts_and_pairs(folder, options.texts)
        encoders = [arms[0], ("kinvec", "int8"), *arms[1:]]
        for job, source in (("mixed", mixed), ("encode", texts)):  # vectors of the last are looked at
            result[job] = alternate("encode", encoders, source, options.rounds, folder)
            lengths = token_counts(source, "text")
            for row in result[job].values():
                row["texts_per_s"], row["tokens_per_s"] = len(lengths) / row["seconds"], sum(lengths) / row["seconds"]
                row["share_of_roof"] = flops(lengths, False) / row["seconds"] / best
        near = {f"{who} {name}": fidelity(folder, f"{who}-{name}") for who, name in encoders}
        found = {} if options.texts else found_by(folder, encoders)
        result["train"] = alternate("train", arms, pairs, options.rounds, folder)
        lengths = token_counts(pairs, "query", "pos_doc")
        for row in result["train"].values():
            row["pairs_per_s"] = BATCH * (LONG - SHORT) / row["seconds"]
            row["share_of_roof"] = row["pairs_per_s"] * flops(lengths, True) / (len(lengths) / 2) / best
    for job in ("encode", "mixed", "train"):
        seconds = {name: row["seconds"] for name, row in result[job].items()}
        ours, peers = ([name for name in seconds if name.startswith(who)] for who in ("kinvec", "peer"))
        result[job]["times_faster_than"] = {
            name: {peer: round(seconds[peer] / seconds[name], 2) for peer in peers} for name in ours
        }
    result["encode"]["fidelity"] = near | found
    write(result, f"speed-{result['date']}-{'bf16' if bf16 else 'fp32'}")


def machine(bf16: bool) -> dict[str, Any]:
    """Date, machine and versions."""
    return {
        "date": date.today().isoformat(),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "bf16_products": bf16},
        "versions": {name: version(name) for name in ("kinvec", "torch", "transformers", "sentence-transformers")},
    }


def write(result: dict[str, Any], name: str) -> None:
    """Into the folder of results, and to the screen."""
    out = HERE / "results"
    out.mkdir(exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(json.dumps(result, indent=2))


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
