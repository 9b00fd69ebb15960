"""Cross-encoders: a model that reads query and document together and says how relevant one is to the other.

Any Hugging Face sequence classifier with one output, or two (irrelevant, relevant). Shapes: n = pairs.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from kinvec.backbone import fetch, quiet, resolve_device, resolve_precision
from kinvec.batching import cut
from kinvec.contracts import KinvecError
from kinvec.files import content_fingerprint, write_lines
from kinvec.published import open_config, reading, weight_files

PAIR_TOKENS = 8192  # of a batch, its padding not counted
LONGEST = 512  # tokens of a pair, where the tokenizer knows no limit

Judge = Callable[[str, Sequence[str]], Float32[np.ndarray, " n"]]


def open_reranker(name: str, precision: str = "auto", device: str = "auto") -> tuple[Judge, str]:
    """(query, documents) → relevance of each from 0 to 1; and the model's fingerprint.

    Relevance is the sigmoid of the one output, or the softmax of two. int8 is for embeddings, and stands for auto here.
    Raises `KinvecError` for what is no such model.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, where = fetch(name), resolve_device(device)
    try:
        config = open_config(folder)
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True, **reading(weight_files(folder))
            )
    except (OSError, ValueError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        raise KinvecError(f"{name}: cannot open the reranker: {str(error).splitlines()[0]}") from None
    if info["missing_keys"] or config.num_labels > 2:
        what = f"{config.num_labels} labels" if config.num_labels > 2 else "no trained head for relevance"
        raise KinvecError(f"{name}: {what}; a reranker is a sequence classifier with one output, or two")
    mixed = resolve_precision("auto" if precision == "int8" else precision, where) == "bf16"
    model.to(where).eval()

    def judge(query: str, documents: Sequence[str]) -> Float32[np.ndarray, " n"]:
        if not documents:
            return np.empty(0, dtype=np.float32)
        given = tokenizer(
            [query] * len(documents), list(documents), truncation="longest_first", max_length=_limit(tokenizer, config),
            verbose=False,
        )  # fmt: skip
        scores = np.empty(len(documents), dtype=np.float32)
        lengths = np.fromiter(map(len, given["input_ids"]), dtype=np.int64, count=len(documents))
        with torch.inference_mode(), torch.autocast(where.type, torch.bfloat16, enabled=mixed):
            for rows in cut(lengths, PAIR_TOKENS):
                batch = tokenizer.pad({key: [given[key][row] for row in rows] for key in given}, return_tensors="pt")
                logits = model(**batch.to(where)).logits.float()
                scores[rows] = _relevance(logits).cpu().numpy()
        return scores

    return judge, content_fingerprint(folder)


def _limit(tokenizer: Any, config: Any) -> int:
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or LONGEST]
    return int(min(*limits, 100_000)) if min(limits) < 1_000_000 else LONGEST


def _relevance(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 0].sigmoid() if logits.shape[1] == 1 else logits.softmax(-1)[:, 1]


@contextmanager
def remembering(judge: Judge, path: Path) -> Iterator[Judge]:
    """The judge, with what it said kept in a file, so that a killed run asks nothing twice.

    The file has one JSON line a call, in order; it belongs to one run, whose calls are always the same. From a line on
    that is half-written or damaged, the judge is asked again; a link in its place is replaced, and not written through.
    """
    told = _said(path)
    write_lines(path, map(json.dumps, told))
    with open(path, "a", encoding="utf-8") as file:

        def asked(query: str, documents: Sequence[str]) -> Float32[np.ndarray, " n"]:
            if told:
                return np.array(told.popleft(), dtype=np.float32)
            scores = judge(query, documents)
            file.write(json.dumps([float(score) for score in scores]) + "\n")
            file.flush()
            return scores

        yield asked


def _said(path: Path) -> deque[list[float]]:
    found: deque[list[float]] = deque()
    if path.is_file():
        with open(path, "rb") as lines, suppress(ValueError, RecursionError):
            found.extend(map(json.loads, lines))
    return found
