"""Raw text → training texts: cut into paragraphs, sentences or blocks of tokens; short ones and repeats dropped.

Everything is streamed: memory grows by 8 bytes a text kept (what tells repeats).
"""

from __future__ import annotations

import json
import re
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kinvec.contracts import KinvecError
from kinvec.files import replace_folder, text_key, write_json
from kinvec.files.writing import beside_path

PARAGRAPH = re.compile(r"\n\s*\n")
SENTENCE = re.compile(r"(?<=[.!?…。！？])[\"'”’»)\]]*\s+(?=[^\W_a-zа-я])")  # an end, then space, then no small letter
MANIFEST = "manifest.json"


@dataclass
class Counts:
    """What became of the texts."""

    articles: int = 0
    train: int = 0
    dev: int = 0
    too_short: int = 0
    repeated: int = 0


def paragraphs(article: str) -> list[str]:
    """What blank lines separate."""
    return [" ".join(part.split()) for part in PARAGRAPH.split(article)]


def sentences(article: str) -> list[str]:
    """Paragraphs cut behind full stops, question and exclamation marks that no small letter follows."""
    return [part.strip() for paragraph in paragraphs(article) for part in SENTENCE.split(paragraph)]


def blocks(articles: Iterable[str], tokenizer: Any, tokens: int, across: bool) -> Iterator[str]:
    """Stretches of at most `tokens` tokens, as long as may be, cut where words begin.

    With `across`, articles follow each other without a border, as LLM2Vec groups its texts.
    """
    left = ""
    for article in articles:
        left = f"{left}\n\n{article}" if left else article
        *full, left = _cut(left, tokenizer, tokens)
        yield from full
        if not across:
            yield left
            left = ""
    if left:
        yield left


def _cut(text: str, tokenizer: Any, tokens: int) -> list[str]:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = [start for start, _ in found["offset_mapping"]]
    words = [number for number, at in enumerate(places) if at and (text[at].isspace() or text[at - 1].isspace())]
    cuts, begun = [0], 0
    while begun + tokens < len(places):
        within = bisect_right(words, begun + tokens) - 1
        at_word = within >= 0 and words[within] > begun
        begun = words[within] if at_word else begun + tokens  # a word longer than a block is cut inside
        cuts.append(places[begun])
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def write_texts(
    texts: Iterable[str], folder: Path, said: dict[str, Any], *, shortest: int, share: float, counts: Counts
) -> Counts:
    """Write `train.jsonl` and `dev.jsonl` into `folder`, and what was done into its manifest; the folder is made whole.

    A text of fewer than `shortest` characters, or that was there before (case and white space aside), is dropped. Which
    texts are held out for dev (`share` of them) depends on the text alone. Raises `KinvecError` where nothing is left,
    or the folder holds other things.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise KinvecError(f"{folder} holds other things than prepared texts; name an empty or a new folder")
    beside = beside_path(folder.with_name(f"{folder.name}.new"))
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    seen: set[int] = set()
    try:
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(open(beside / f"{name}.jsonl", "w", encoding="utf-8"))
                for name in ("train", "dev")
            }
            for text in map(str.strip, texts):
                key = text_key(text)
                if len(text) < shortest:
                    counts.too_short += bool(text)
                elif key in seen:
                    counts.repeated += 1
                else:
                    seen.add(key)
                    name = "dev" if _fraction(key) < share else "train"
                    setattr(counts, name, getattr(counts, name) + 1)
                    files[name].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        if not counts.train:
            raise KinvecError(f"no text of at least {shortest} characters is left; lower --shortest or give more text")
        if not counts.dev:
            (beside / "dev.jsonl").unlink()
        write_json(beside / MANIFEST, said | asdict(counts))
        replace_folder(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return counts


def _fraction(key: int) -> float:
    """A number from 0 to 1 that depends on the text alone, other than by the order of its key."""
    return ((key * 0x9E3779B97F4A7C15) % 2**64) / 2**64


UNITS: dict[str, Callable[[str], list[str]]] = {"paragraph": paragraphs, "sentence": sentences}
