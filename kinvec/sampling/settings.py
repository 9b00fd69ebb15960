"""Which data, and how they are read and drawn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kinvec.config import Settings


class DataSettings(Settings):
    """What is trained on, and how it is read and drawn: one data set's settings."""

    train: str = ""
    """Training data: a BEIR folder, or a file of retrieval examples (JSON, JSONL, CSV, Parquet), SQuAD, triplets."""
    dev: str | None = None
    """Data that chooses the best checkpoint; unset, the dev split beside train's, else a held-out share of train."""
    test: str | None = None
    """Data for the evaluation before and after; unset, the test split beside train's, else a held-out share."""
    split: str = "train"
    """The split of a folder or hub data set to train on."""
    test_split: str = "test"
    """The split of a folder or hub data set to evaluate on."""
    labels: list[str] | None = None
    """Of labelled texts, those of these labels only; unset, all."""
    texts_per_label: int = Field(4, ge=2)
    """Labelled texts of one label in a batch; where a batch has room for more than all labels, more of each."""
    score_range: tuple[float, float] | None = None
    """Lowest and highest score of scored pairs; they are trained on as 0 to 1. Unset, those of the training data."""
    columns: dict[str, str] | None = None
    """Names of the columns, where they differ: `{query: question, pos_doc: answer}`."""
    kind: str | None = None
    """The kind of data, where detection is wrong: retrieval, labelled, texts or pairs."""
    skip_bad: bool = False
    """Drop and count bad rows instead of stopping at the first."""
    holdout: float = 0.1
    """Share of the training queries held out where no dev (or test) data is named; 0 holds out none."""
    distractors: int = 1000
    """Documents of the training data added to the corpus of a held-out split, to make it a search problem."""
    negatives_per_query: int = 4
    """Hard negatives a query brings into the batch, at most."""
    fewer_negatives: Literal["keep", "repeat", "drop", "error"] = "keep"
    """A query with fewer: brings those it has, repeats them, is left out, or stops the run."""
    negatives: Literal["first", "random"] = "first"
    """Which of more hard negatives: the first (as mined, the hardest), or a random draw at each epoch."""
    limit: int | None = Field(None, ge=1)
    """Train on at most so many rows, drawn at random; unset, all."""
