"""What a run will take on this machine, measured before it begins: seconds, bytes, chunks; in words and as JSON.

The model itself runs real texts of the data for some seconds: forward, backward, forward again, and an optimiser step.
What evaluation does besides encoding is done once with a stand-in for the model. The sampler's own steps say how many
tokens of which lengths the training will see. The random state is put back; the model is not, so whoever trains opens
it anew.

Shapes: n = texts, d = dimensions.
"""

from __future__ import annotations

import math
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from jaxtyping import Float32
from torch import Tensor

from kinvec import masking
from kinvec.backbone import trainable
from kinvec.batching import Pack, cut, packs
from kinvec.console import clock
from kinvec.contracts import Encoder
from kinvec.embedder import ENCODE_TOKENS, Embedder
from kinvec.machine import release_pages
from kinvec.mixing import Mixture, Step
from kinvec.planner import chunks_to_keep, saving
from kinvec.trainer import (
    TrainerSettings,
    bytes_and_budget,
    in_precision,
    make_optimizer,
    prepare,
    step_chunks,
    tokenized,
)

SECONDS = 12.0  # that the model runs at most for the forecast of the training; half as long for that of an evaluation
SHARE, LEAST = 0.05, 0.4  # of what is forecast, that measuring may take; or of its SECONDS, where that is more
WARM_TOKENS = 1024  # of a pack to warm up with, and of the smallest that is measured
POINTS = 3  # lengths of text at which the model is timed
COMPILED, COMPILED_AT_MOST = 25_000_000, 500_000_000
"""Bytes of the products that oneDNN compiles for the shapes of a chunk in bf16, and of all that it keeps of them."""
STEPS = 12  # steps of the training whose lengths are looked at
SAMPLE = 2000  # texts whose lengths stand for all that are encoded
WORDS = 64  # of a text, that the stand-in reads


# --- Cost of texts by their lengths -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Of texts of lengths l: per_token · Σ l + per_pair · Σ l², since attention looks at pairs of tokens."""

    per_token: float
    per_pair: float

    def of(self, lengths: Sequence[int]) -> float:
        array = np.asarray(lengths, dtype=np.float64)
        return float(self.per_token * array.sum() + self.per_pair * (array**2).sum())


def fitted(measured: Sequence[tuple[Sequence[int], float]]) -> Cost:
    """The non-negative cost nearest to what was measured, by least squares of relative errors."""
    from scipy.optimize import nnls

    rows = [
        (sum(lengths) / value, sum(length**2 for length in lengths) / value) for lengths, value in measured if value > 0
    ]
    if not rows:
        return Cost(0.0, 0.0)
    system = np.array(rows)
    scale = system.max(0)
    found, _ = nnls(system / scale, np.ones(len(rows)))
    return Cost(*(found / scale).tolist())


def spread(sorted_by_length: Sequence[Any], count: int = POINTS) -> list[Any]:
    """`count` of them, evenly from the shortest to the longest; all where they are no more."""
    if len(sorted_by_length) <= count:
        return list(sorted_by_length)
    return [sorted_by_length[int((2 * i + 1) * len(sorted_by_length) / (2 * count))] for i in range(count)]


@contextmanager
def peak(device: torch.device) -> Iterator[list[int]]:
    """Holds, when the block is over, the most bytes meanwhile: of the process, or on CUDA of the device."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device))
        return
    process, over, most = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not over.wait(0.003):
            most[0] = max(most[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()
        found.append(max(most[0], process.memory_info().rss))


def held(device: torch.device) -> int:
    """Bytes in use now, once what is free is given back: of the process, or on CUDA of the device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    release_pages()
    return psutil.Process().memory_info().rss


# --- Evaluation -------------------------------------------------------------------------------------------------------


class StandIn:
    """An encoder without a model: it notes what is to be encoded, and answers with directions made of the words."""

    def __init__(self, embedder: Embedder) -> None:
        self.name, self.similarity, self.precision = embedder.name, embedder.similarity, embedder.precision
        self.dimension, self.prompts = embedder.dimension, dict(embedder.prompts)
        self.asked: list[tuple[Sequence[str], str]] = []
        self.seconds: list[float] = []
        self._directions = np.random.default_rng(0).standard_normal((4096, self.dimension), dtype=np.float32)

    def encode_queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        return self._encode(texts, "query")

    def encode_documents(self, texts: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        return self._encode(texts, "document")

    def _encode(self, texts: Sequence[str], side: str) -> Float32[np.ndarray, "n d"]:
        begun = time.perf_counter()
        out = np.empty((len(texts), self.dimension), dtype=np.float32)
        for row, text in enumerate(texts):
            words = [zlib.crc32(word.encode()) % 4096 for word in text.split()[:WORDS]] or [0]
            out[row] = self._directions[words].mean(0)
        out /= np.linalg.norm(out, axis=1, keepdims=True)
        self.asked.append((texts, self.prompts.get(side, "")))
        self.seconds.append(time.perf_counter() - begun)
        return out


def evaluation(embedder: Embedder, evaluate: Callable[[Encoder], object]) -> tuple[float, int]:
    """Seconds and peak bytes of `evaluate` with the embedder: its encoding, and what it does besides."""
    stand_in = StandIn(embedder)
    with peak(embedder.device) as most:
        begun = time.perf_counter()
        evaluate(stand_in)
        besides = time.perf_counter() - begun - sum(stand_in.seconds)
        encoding = _encoding(embedder, stand_in.asked)
    return besides + encoding, most[0]


def _encoding(embedder: Embedder, asked: Sequence[tuple[Sequence[str], str]]) -> float:
    """Seconds to encode all of these texts, each behind its prompt; the model encodes some of a sample."""
    every = [(place, row) for place, (texts, _) in enumerate(asked) for row in range(len(texts))]
    if not every:
        return 0.0
    sample = every[:: max(1, len(every) // SAMPLE)]
    texts = [asked[place][0][row] for place, row in sample]
    tokens = embedder.tokenize(texts, [asked[place][1] for place, _ in sample])
    lengths = tokens.lengths

    def run(part: Pack) -> float:
        begun = time.perf_counter()
        embedder.encode([texts[row] for row in part.rows], prompt=asked[0][1], progress=False)
        return time.perf_counter() - begun

    whole = int(lengths.sum()) * len(every) // len(sample)
    size = _affordable(ENCODE_TOKENS, whole, SECONDS / 2, run, list(packs(tokens, WARM_TOKENS)))
    chosen = spread(list(packs(tokens, size)))
    run(chosen[-1])  # memory that is fresh is slower
    cost = fitted([(part.lengths, run(part)) for part in chosen])
    return cost.of(lengths.tolist()) * len(every) / len(sample)


def _affordable(most: int, whole: int, seconds: float, run: Callable[[Pack], float], small: Sequence[Pack]) -> int:
    """Tokens, at most `most`, of a pack such that all measuring takes at most `seconds`; see `SHARE`.

    `run` gives the seconds of a pack; it is tried on one of the small.
    """
    middle = small[len(small) // 2]
    run(middle)  # once to warm up
    rate = run(middle) / sum(middle.lengths)
    tokens = min(seconds, max(SHARE * whole * rate, LEAST * seconds)) / rate / (POINTS + 1)
    return int(min(most, max(tokens, WARM_TOKENS)))


# --- Training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """A chunk as measured: its texts' lengths, seconds without gradients and with, bytes that its graph holds.

    `most` are the bytes that were in use meanwhile, all in all.
    """

    lengths: tuple[int, ...]
    forward: float
    both: float
    saved: int
    most: int


def training(embedder: Embedder, source: Mixture, settings: TrainerSettings) -> dict[str, Any]:
    """Steps, measured seconds and bytes, chunks, and what follows of them for memory and duration.

    `embedder` has its adapters on; it is prepared as `trainer.fit` does it, and trained a step.
    """
    an_epoch = source.steps_per_epoch(settings.batch_size)
    total = settings.max_steps or math.ceil(settings.epochs * an_epoch)
    every = an_epoch if settings.eval_every is None else settings.eval_every
    with torch.random.fork_rng():
        prepare(embedder, settings)
        per_token, budget = bytes_and_budget(embedder, source, settings)
        steps, drawing = _steps(embedder, source, settings, total)
        before = held(embedder.device)
        small, chunks = _chunks(embedder, steps, settings, total)
        optimizing, gradients, moments = _optimizer(embedder, settings)
        embedder.zero_grad(set_to_none=True)
        scoring, scored = _loss(embedder, steps[0][0])
    shapes = [_shape(asked, lengths, settings.chunk_tokens, per_token, budget) for asked, lengths in steps]
    forward, both = (fitted([(one.lengths, getattr(one, key)) for one in chunks]) for key in ("forward", "both"))
    seconds = [sum(map(both.of, kept + again)) + sum(map(forward.of, again)) for kept, again in shapes]
    step = {"drawing": drawing, "model": float(np.mean(seconds)), "loss": scoring, "optimizer": optimizing}
    fixed = {"process": before, "gradients": gradients, "moments": moments}
    predicts = steps[0][0].objective.ask is not None
    memory = fixed | _activations(small, chunks, shapes, before + gradients, scored, predicts)
    if embedder.device.type == "cpu" and embedder.precision == "bf16":
        passes = total * float(np.mean([len(kept) + 2 * len(again) for kept, again in shapes]))
        memory["compiled"] = min(int(passes * COMPILED), COMPILED_AT_MOST)
    tokens = sum(sum(one.lengths) for one in chunks)
    return {
        "steps": total, "evaluations": math.ceil(total / every) if every else 0, "batch_size": settings.batch_size,
        "tokens_per_step": round(float(np.mean([lengths.sum() for _, lengths in steps]))),
        "chunk_tokens": settings.chunk_tokens, "budget": budget, "bytes_per_token": round(per_token),
        "kept": float(np.mean([len(kept) for kept, _ in shapes])),
        "recomputed": float(np.mean([len(again) for _, again in shapes])),
        "seconds_per_token": {
            "forward": sum(one.forward for one in chunks) / tokens,
            "backward": max(sum(one.both - one.forward for one in chunks), 0.0) / tokens,
        },
        "step": step, "seconds": total * sum(step.values()), "memory": memory, "peak": sum(memory.values()),
    }  # fmt: skip


Shape = tuple[list[list[int]], list[list[int]]]
"""The lengths of the texts of each chunk of a step: of those that keep their graphs, and of those run again."""


def _shape(asked: Step, lengths: np.ndarray, chunk_tokens: int, per_token: float, budget: int) -> Shape:
    chunks = [lengths[rows].tolist() for rows in cut(lengths, chunk_tokens)]
    if asked.objective.ask:  # no prediction depends on another text, so no chunk waits for the others
        return chunks, []
    keep = chunks_to_keep([sum(chunk) for chunk in chunks], per_token, budget)
    return chunks[:keep], chunks[keep:]


def _activations(
    small: Chunk, chunks: Sequence[Chunk], shapes: Sequence[Shape], fixed: int, scored: int, one_by_one: bool
) -> dict[str, int]:
    """Bytes of the graphs that a step holds at once, and of what comes and goes beside them or in its loss.

    The latter grows with a chunk from what a `small` one needed. `fixed` was in use all the time; the loss needs
    `scored`.
    """
    graph = fitted([(one.lengths, float(one.saved)) for one in chunks])
    largest = max(1, *(one.saved for one in chunks))
    longest = max(_largest(graph, [*kept, *again]) for kept, again in shapes)  # it may have been too slow to try
    graphs = longest if one_by_one else max(sum(map(graph.of, kept)) + _largest(graph, again) for kept, again in shapes)
    beside_small, beside = small.most - fixed - small.saved, max(one.most for one in chunks) - fixed - largest
    apart = largest > 2 * small.saved  # else the two cannot tell how it grows
    grows = (beside - beside_small) / (largest - small.saved) if apart else beside / largest
    working = beside + max(grows, 0) * max(longest - largest, 0)
    return {"graphs": int(graphs), "working": max(int(working), scored)}


def _largest(cost: Cost, chunks: Sequence[Sequence[int]]) -> float:
    return max(map(cost.of, chunks), default=0.0)


def _steps(
    embedder: Embedder, source: Mixture, settings: TrainerSettings, total: int
) -> tuple[list[tuple[Step, np.ndarray]], float]:
    """Some of the training's steps with their texts' lengths, and the seconds to draw and tokenize one."""
    found: list[tuple[Step, np.ndarray]] = []
    source.step(0, settings.batch_size)  # what is made once for all steps
    begun = time.perf_counter()
    for number in np.linspace(0, total - 1, min(STEPS, total)).astype(int).tolist():
        asked = source.step(number, settings.batch_size)
        found.append((asked, tokenized(embedder, asked).lengths))
        if time.perf_counter() - begun > SECONDS / 3:
            break
    return found, (time.perf_counter() - begun) / len(found)


def _chunks(
    embedder: Embedder, steps: Sequence[tuple[Step, np.ndarray]], settings: TrainerSettings, total: int
) -> tuple[Chunk, list[Chunk]]:
    """Chunks of real steps as measured, from the shortest texts to the longest, of several steps where one has few.

    Before them a small one: a process keeps what a larger one has taken.
    """
    warm: list[Chunk] = []

    def run(texts: Pack) -> float:
        warm.append(_measured(embedder, first, texts))
        return warm[-1].forward + warm[-1].both

    first, whole = steps[0][0], int(total * np.mean([lengths.sum() for _, lengths in steps]))
    small = step_chunks(embedder, tokenized(embedder, first), min(WARM_TOKENS, settings.chunk_tokens))[0]
    size = _affordable(settings.chunk_tokens, whole, SECONDS, run, small)
    chosen: list[tuple[Step, Pack]] = []
    for asked, _ in steps:
        full = _without_rests(step_chunks(embedder, tokenized(embedder, asked), size)[0])
        chosen += [(asked, texts) for texts in spread(full)]
        if len(chosen) >= POINTS:
            break
    _measured(embedder, *chosen[-1])  # memory that is fresh is slower
    return warm[-1], [_measured(embedder, *one) for one in chosen[:POINTS]]


def _without_rests(parts: Sequence[Pack]) -> list[Pack]:
    """Those of more than half the tokens of the largest: a token of a small rest costs more than of what is typical."""
    most = max(sum(texts.lengths) for texts in parts)
    return [texts for texts in parts if sum(texts.lengths) > most / 2]


def _measured(embedder: Embedder, asked: Step, texts: Pack) -> Chunk:
    if asked.objective.ask:
        return _measured_cloze(embedder, asked, texts)
    embed = in_precision(embedder, embedder)
    with peak(embedder.device) as most:
        begun = time.perf_counter()
        with torch.no_grad():
            embed(texts)
        forward = time.perf_counter() - begun
        begun = time.perf_counter()
        with saving(embedder) as saved:
            vectors = embed(texts)
        vectors.backward(torch.full_like(vectors, 1e-3))
        both = time.perf_counter() - begun
    return Chunk(texts.lengths, forward, both, sum(saved.values()), most[0])


def _measured_cloze(embedder: Embedder, asked: Step, texts: Pack) -> Chunk:
    """Of an objective that predicts tokens; no chunk of it is ever run again."""
    assert asked.objective.ask is not None
    backbone, head = (in_precision(embedder, part) for part in (embedder.backbone, embedder.language))
    with peak(embedder.device) as most:
        begun = time.perf_counter()
        cloze = asked.objective.ask(embedder.tokenizer, texts)
        with saving(embedder) as saved:
            masking.backward(backbone, head, [cloze])
        both = time.perf_counter() - begun
    return Chunk(texts.lengths, both / 3, both, sum(saved.values()), most[0])


def _optimizer(embedder: Embedder, settings: TrainerSettings) -> tuple[float, int, int]:
    """Seconds of clipping and stepping, bytes of the gradients, bytes of the optimiser's state."""
    optimizer = make_optimizer(embedder, settings)
    weights = [parameter for _, parameter in trainable(embedder)]
    optimizer.step()  # makes its state
    begun = time.perf_counter()
    torch.nn.utils.clip_grad_norm_(weights, settings.clip or math.inf)
    optimizer.step()
    seconds = time.perf_counter() - begun
    gradients = sum(weight.grad.nbytes for weight in weights if weight.grad is not None)
    state = sum(value.nbytes for values in optimizer.state.values() for value in values.values())
    return seconds, gradients, state


def _loss(embedder: Embedder, asked: Step) -> tuple[float, int]:
    """Seconds and bytes of the loss of a whole step, on random vectors."""
    if asked.objective.ask:
        return 0.0, 0
    texts = len(asked.queries) + len(asked.documents)
    vectors = torch.nn.functional.normalize(torch.randn(texts, embedder.dimension, device=embedder.device), dim=1)

    def run(given: Tensor) -> float:
        queries, documents = given.split([len(asked.queries), len(asked.documents)])
        begun = time.perf_counter()
        with torch.no_grad():
            asked.objective.measures(queries, documents, asked.batch)
        asked.objective.loss(queries, documents, asked.batch).backward()
        return time.perf_counter() - begun

    run(vectors.requires_grad_())  # what is made once: a teacher is opened
    before = held(embedder.device)
    with peak(embedder.device) as most:
        seconds = run(vectors)
    return seconds, max(most[0] - before, 0)


# --- The whole --------------------------------------------------------------------------------------------------------


def whole(embedder: Embedder, trained: Mapping[str, Any], evaluated: Mapping[str, tuple[float, int]]) -> dict[str, Any]:
    """The forecast of a run: of its training, its evaluations (`base`, `tuned`, one on `dev`), and all together.

    `evaluated` has seconds and peak bytes of each.
    """
    times = {"base": 1, "dev": trained["evaluations"], "tuned": 1}
    return {
        "model": embedder.name, "device": str(embedder.device), "precision": embedder.precision,
        "threads": torch.get_num_threads(), "training": dict(trained),
        "evaluation": {name: seconds for name, (seconds, _) in evaluated.items()},
        "seconds": trained["seconds"] + sum(times[name] * seconds for name, (seconds, _) in evaluated.items()),
        "peak": max([trained["peak"], *(most for _, most in evaluated.values())]),
    }  # fmt: skip


def in_words(plan: Mapping[str, Any]) -> list[str]:
    """The forecast in a few lines."""
    training, evaluated = plan["training"], plan["evaluation"]
    rates = training["seconds_per_token"]
    lines = [
        f"plan: {training['steps']:,} steps of {training['batch_size']:,}, {training['tokens_per_step']:,} tokens each,"
        f" in {plan['precision']} on {plan['device']} ({plan['threads']} threads)",
        f"  measured here: {rates['forward'] * 1e6:.0f} µs a token forward, {rates['backward'] * 1e6:.0f} backward; "
        f"its graph holds {training['bytes_per_token'] / 1e3:.0f} kB a token",
        f"  {_chunking(training)}",
        f"  peak memory {_gib(plan['peak'])}; of training {_gib(training['peak'])}: "
        + ", ".join(f"{name} {_gib(value)}" for name, value in training["memory"].items()),
        f"  training {clock(training['seconds'])}",
    ]
    if evaluated:
        named = [
            f"{name} {clock(value)}" if name != "dev" else f"dev {training['evaluations']} × {clock(value)}"
            for name, value in evaluated.items()
        ]
        lines[-1] += f"; evaluation: {', '.join(named)}; together {clock(plan['seconds'])}"
    return lines


def _chunking(training: Mapping[str, Any]) -> str:
    kept, again = training["kept"], training["recomputed"]
    count, budget = kept + again, _gib(training["budget"])
    size = f"at most {training['chunk_tokens']:,} tokens (trainer.chunk_tokens)"
    if not again:
        return f"a step goes through the model in {count:.3g} chunks of {size}; all graphs fit into {budget}"
    fit = f"the graphs of {kept:.3g} fit" if kept else "no graph fits beside that of a chunk in work"
    return (
        f"a step goes through the model in {count:.3g} chunks of {size}; {fit} into {budget} (trainer.memory_budget), "
        f"so {again:.3g} run forward twice"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.0f} MiB"
