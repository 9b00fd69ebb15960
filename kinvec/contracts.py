"""What the parts of kinvec hand to each other: plain values, two protocols, and the errors a user may see.

Shapes: n = texts, d = embedding dimensions, T = tokens of a pack, B = queries of a batch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:  # a fifth of a second of imports, for two signatures: the command line would wait for it
    import numpy as np
    from jaxtyping import Float


SHOWN = 200  # characters of what a library says
LONGEST = 1000  # characters of a line that is printed
SECRET_NAMES = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$")  # of environment variables
SHORTEST_SECRET = 8  # a shorter value is also a word or a number
SECRET_FORMS = (  # in a text: user and password before a host, a key behind an address, keys by themselves
    re.compile(r"(\w:/{1,2})[^\s/@'\"]+(?=@)"),
    re.compile(r"([?&]\w*(?:token|key|secret|password|signature)=)[^\s&'\"]+", re.IGNORECASE),
    re.compile(r"\b(hf_|sk-)[A-Za-z0-9_-]{16,}"),
)


def without_secrets(text: str) -> str:
    """The text with `***` for what nobody else may read.

    That is: passwords and keys in addresses, keys of the hub's and of OpenAI's form, and the values of environment
    variables whose names end in KEY, TOKEN, SECRET or PASSWORD.
    """
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and SECRET_NAMES.search(name):
            text = text.replace(value, "***")
    for form in SECRET_FORMS:
        text = form.sub(r"\1***", text)
    return text


def presentable(text: str) -> str:
    """Lines that may be printed: no secret, no control character (a file may hold a terminal's commands), no end."""
    shown = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in s) for s in without_secrets(text).split("\n"))
    return "\n".join(line if len(line) <= LONGEST else f"{line[: LONGEST - 2]} …" for line in shown)


class KinvecError(ValueError):
    """The data, the model or the machine is wrong: one sentence that names the place and the remedy (exit code 1).

    What it quotes may come from a stranger's file: it is made `presentable`.
    """

    exit_code = 1
    _between = " "  # its lines

    def __init__(self, said: str) -> None:
        super().__init__(self._between.join(presentable(said).split("\n")))


class RecipeError(KinvecError):
    """The arguments or the recipe are wrong (exit code 2): a line for each thing that is."""

    exit_code = 2
    _between = "\n"


@contextmanager
def one_sentence(what: str, remedy: str) -> Iterator[None]:
    """Inside, whatever Python or a library stumbles over in a file that is damaged or hostile becomes a `KinvecError`.

    Nobody can list what a dozen libraries raise of such files. The machine's own errors (no memory, no such file, no
    space) pass; the traceback of what is caught is there with --debug.
    """
    try:
        yield
    except (KinvecError, MemoryError):
        raise
    except Exception as error:
        if type(error) is NameError or (isinstance(error, OSError) and error.errno):
            raise
        why = next(iter(str(error).splitlines()), "")
        raise KinvecError(f"{what} ({type(error).__name__}{why and f': {why[:SHOWN]}'}); {remedy}") from error


class GateError(KinvecError):
    """A gate, such as the forgetting guard, is broken (exit code 3)."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Example:
    """One query with the documents judged for it.

    Ids are always strings; documents read without ids get one made from their text, so that equal texts share an id.
    A score is the judged grade (1.0 where the source has none); documents judged 0 are negatives.
    """

    query_id: str
    query: str
    positives: tuple[str, ...]
    positive_ids: tuple[str, ...]
    positive_scores: tuple[float, ...]
    negatives: tuple[str, ...] = ()
    negative_ids: tuple[str, ...] = ()
    negative_scores: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents in their file's order. `texts` may be lazy (backed by memory-mapped Arrow)."""

    ids: Sequence[str]
    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.ids)


Qrels = dict[str, dict[str, int]]
"""Query id → document id → graded judgement."""


@dataclass(frozen=True, slots=True)
class RetrievalData:
    """A search problem: a corpus, the queries that are judged, and their judgements.

    The kind `reranking` orders only the documents judged for a query, be they relevant or not.
    """

    corpus: Corpus
    queries: dict[str, str]
    qrels: Qrels
    fingerprint: str
    name: str = ""
    split: str = ""
    kind: str = "retrieval"


@dataclass(frozen=True, slots=True)
class PairData:
    """Scored pairs of texts: semantic textual similarity, or of two scores the kind `pair-classification`."""

    first: Sequence[str]
    second: Sequence[str]
    scores: Sequence[float]
    fingerprint: str
    name: str = ""
    split: str = ""
    kind: str = "similarity"


@dataclass(frozen=True, slots=True)
class LabelledData:
    """Labelled texts, and those that a classifier over the embeddings may learn from; kind `clustering` needs none."""

    texts: Sequence[str]
    labels: Sequence[str]
    training_texts: Sequence[str]
    training_labels: Sequence[str]
    fingerprint: str
    name: str = ""
    split: str = ""
    kind: str = "classification"


Problem = RetrievalData | PairData | LabelledData
"""What a model can be measured on. Its `kind` says how, and is that of the result."""


@dataclass(slots=True)
class Result:
    """What an evaluation found, with every per-query value, so that two results can be compared with an interval.

    `metrics` holds the means (or, for whole-set statistics such as Spearman, the statistic) by public name, for example
    `nDCG@10`, `RR@10`, `AP@10`, `R@100`, `P@10`, `spearman_cosine`. `per_query` holds one row per query or item: `id`,
    one column per metric, and what a person needs to read it (`query`, `top_ids`; `score`, `cosine` for pairs; `label`,
    `predicted`, `clusters` for labelled texts). `documents` holds, a row each, those that a person meets while reading
    the rows of a search: the first results and the relevant ones, as `id` and `text` (its beginning). In both, columns
    such as `pca_x` and `pca_y` are places in the plane of those that a picture shows. `thresholds` holds, by
    metric, from which cosine on pairs count as positive. `cheaper` is what `tasks.cheaper`
    found out from the same vectors.
    """

    task: str
    kind: str
    split: str
    model: str
    metrics: dict[str, float]
    per_query: dict[str, list[Any]]
    fingerprint: str
    prompts: dict[str, str] = field(default_factory=dict)
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    precision: str = ""
    documents: dict[str, list[Any]] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    cheaper: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Encoder(Protocol):
    """Anything that turns texts into vectors. Evaluation and mining know nothing else of a model."""

    name: str

    def encode_queries(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]: ...

    def encode_documents(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]: ...
