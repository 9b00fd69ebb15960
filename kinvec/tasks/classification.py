"""Labelled texts: how well classifiers, neighbours and clusters over the embeddings recover the labels.

Classifiers learn from the training texts of the data and are judged on its test texts; the model itself is not touched.
Clusters need no training texts.
Vectors are scaled to length 1. Every draw has its own seed, so the same vectors give the same figures.
Shapes: n = test texts, m = training texts, d = dimensions.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, Shaped
from scipy.stats import mode
from sklearn.cluster import MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import KNeighborsClassifier

from kinvec.contracts import Encoder, KinvecError, LabelledData, RecipeError, Result
from kinvec.files import evenly
from kinvec.tasks import picture
from kinvec.tasks.evaluation import describe, unit_vectors
from kinvec.tasks.rankings import SNIPPET, timed
from kinvec.tasks.statistics import statistic

SEED = 42
DRAWS, TEXTS_A_LABEL = 10, 8  # of the few-shot protocol of MTEB (Muennighoff et al. 2023)
NEIGHBOURS = 5
ITERATIONS = 100  # of logistic regression, as in MTEB
SAMPLES, SAMPLE_TEXTS, BATCH = 10, 16_384, 512  # of its protocol of clustering

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Space:
    """The embedded data."""

    vectors: Float32[np.ndarray, "n d"]
    labels: Shaped[np.ndarray, " n"]
    training_vectors: Float32[np.ndarray, "m d"]
    training_labels: Shaped[np.ndarray, " m"]
    training_texts: Sequence[str]


def classification(data: LabelledData, encoder: Encoder, measures: Sequence[str] = ()) -> Result:
    """How well the labels are recovered, by `measures` (keys of `LABELLED`); text by text.

    Unless some are named, all, or `CLUSTERING` for data of that kind.
    Then up to 1,000 texts have places in the plane as well (`pca_x`, `pca_y`, `tsne_x` …), for a picture. All texts are
    encoded as queries, as for similarity. Raises `KinvecError` for data without two labels, or without training texts
    where a classifier is to learn, `RecipeError` for an unknown measure.
    """
    names = tuple(measures) or (CLUSTERING if data.kind == "clustering" else tuple(LABELLED))
    if unknown := next((name for name in names if name not in LABELLED), None):
        raise RecipeError(f"unknown measure '{unknown}' of labelled texts; there are {', '.join(LABELLED)}")
    _check(data, names)
    seconds: dict[str, float] = {}
    n = len(data.texts)
    with timed(seconds, "encode"):
        vectors = unit_vectors(encoder, [*data.texts, *data.training_texts])
    labels, known = np.array(list(data.labels)), np.array(list(data.training_labels))
    space = Space(vectors[:n], labels, vectors[n:], known, data.training_texts)
    columns: Columns = {"id": [str(i) for i in range(n)], "query": list(data.texts), "label": list(data.labels)}
    values: dict[str, float] = {}
    with timed(seconds, "classify"), warnings.catch_warnings():
        # The protocol stops after so many iterations, and equal texts are fewer clusters than there are labels.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for name in names:
            columns |= LABELLED[name](space)
            values[name] = statistic(name).value(columns)
    if not measures:
        with timed(seconds, "picture"):
            shown = evenly(n, picture.PICTURED)
            columns |= picture.columns(picture.places(space.vectors[shown], ["pca", "tsne"]), shown.tolist(), n)
    result = Result(data.name or "labels", data.kind, data.split, "", values, columns, data.fingerprint)
    describe(result, encoder)
    result.timing = seconds
    return result


def _check(data: LabelledData, names: Sequence[str]) -> None:
    where = data.name or "the data"
    if len(set(data.labels)) < 2:
        raise KinvecError(f"{where}: the texts to be judged have fewer than two labels; there is nothing to tell apart")
    if len(set(data.training_labels)) < 2 and any(name in NEED_TRAINING for name in names):
        raise KinvecError(f"{where}: the training texts have fewer than two labels; a classifier needs two to learn")


def few_shot(space: Space) -> Columns:
    """MTEB's protocol: logistic regression on 8 training texts a label, 10 draws; the share of draws that are right.

    The draws are those of MTEB: each reseeds with 42 and shuffles the list as the draw before left it.
    """
    order = np.arange(len(space.training_labels))
    right = np.zeros(len(space.labels))
    votes: list[Counter[str]] = [Counter() for _ in space.labels]
    for _ in range(DRAWS):
        np.random.RandomState(SEED).shuffle(order)
        chosen = _first_of_each(space.training_labels, order)
        predicted = _regression(space.training_vectors[chosen], space.training_labels[chosen], space.vectors)
        right += predicted == space.labels
        for vote, label in zip(votes, predicted.tolist(), strict=True):
            vote[label] += 1
    often = [vote.most_common(1)[0][0] for vote in votes]
    return {"accuracy": (right / DRAWS).tolist(), "predicted": often}


def _first_of_each(labels: Shaped[np.ndarray, " m"], order: Int[np.ndarray, " m"]) -> Int[np.ndarray, " k"]:
    """The first texts of each label, at most `TEXTS_A_LABEL`, in this order."""

    def chosen() -> Iterator[int]:
        seen: Counter[str] = Counter()
        for row in order.tolist():
            if seen[labels[row]] < TEXTS_A_LABEL:
                seen[labels[row]] += 1
                yield row

    return np.fromiter(chosen(), dtype=np.int64)


def _regression(
    vectors: Float[np.ndarray, "k d"], labels: Shaped[np.ndarray, " k"], asked: Float[np.ndarray, "n d"]
) -> Shaped[np.ndarray, " n"]:
    fitted = LogisticRegression(max_iter=ITERATIONS, random_state=SEED).fit(vectors, labels)
    predicted: np.ndarray = fitted.predict(asked)
    return predicted


def regression(space: Space) -> Columns:
    """Logistic regression on all training texts: 1 where it is right."""
    predicted = _regression(space.training_vectors, space.training_labels, space.vectors)
    return {"accuracy_lr": (predicted == space.labels).astype(float).tolist(), "predicted_lr": predicted.tolist()}


def neighbours(space: Space) -> Columns:
    """The majority of the 5 training texts with the highest cosine: 1 where it is right; and what the nearest one says.

    Equally many votes go to the label that sorts first.
    """
    count = min(NEIGHBOURS, len(space.training_labels))
    fitted = KNeighborsClassifier(count, metric="cosine").fit(space.training_vectors, space.training_labels)
    predicted = fitted.predict(space.vectors)
    nearest = fitted.kneighbors(space.vectors, 1, return_distance=False)[:, 0].tolist()
    return {
        "accuracy_knn": (predicted == space.labels).astype(float).tolist(),
        "predicted_knn": predicted.tolist(),
        "nearest": [space.training_texts[row][:SNIPPET] for row in nearest],
        "nearest_label": space.training_labels[nearest].tolist(),
    }


def silhouette(space: Space) -> Columns:
    """How much nearer a text is to its own label than to the next one, −1 to 1 (Rousseeuw 1987), by cosine distance."""
    if len(set(space.labels.tolist())) == len(space.labels):
        return {"silhouette": [0.0] * len(space.labels)}  # each text alone with its label
    return {"silhouette": silhouette_samples(space.vectors, space.labels, metric="cosine").astype(float).tolist()}


def clusters(space: Space) -> Columns:
    """MTEB's protocol (Enevoldsen et al. 2025): k-means of ten samples of 16,384 texts, drawn with replacement.

    As many clusters as there are labels, in batches of 512 (Sculley 2010). For each text its cluster in each sample,
    how often it was drawn (where it was not, its cluster says nothing), and the most frequent label where it is.
    """
    n, drawing = len(space.labels), random.Random(SEED)
    names, labels = np.unique(space.labels, return_inverse=True)
    found, draws = (np.zeros((SAMPLES, n), dtype=np.int64) for _ in range(2))
    told = np.zeros((SAMPLES, n), dtype=np.int64)
    fitted = MiniBatchKMeans(len(names), batch_size=BATCH, n_init=1, random_state=SEED)
    for sample in range(SAMPLES):
        chosen = np.array(drawing.choices(range(n), k=SAMPLE_TEXTS))
        found[sample, chosen] = fitted.fit_predict(space.vectors[chosen])
        draws[sample] = np.bincount(chosen, minlength=n)
        table = np.zeros((len(names), len(names)))
        np.add.at(table, (labels, found[sample]), draws[sample])
        told[sample] = table.argmax(axis=0)[found[sample]]
    often = names[mode(told, axis=0).mode]
    return {"clusters": found.T.tolist(), "draws": draws.T.tolist(), "cluster_label": often.tolist()}


LABELLED: dict[str, Callable[[Space], Columns]] = {
    "accuracy": few_shot, "accuracy_lr": regression, "accuracy_knn": neighbours, "silhouette": silhouette,
    "v_measure": clusters,
}  # fmt: skip
"""Measure → the columns it makes, one of its own name with a value a text, or what a statistic of all rows needs."""

NEED_TRAINING = ("accuracy", "accuracy_lr", "accuracy_knn")
CLUSTERING = ("v_measure", "silhouette")
"""What is measured where nothing is to be learnt from."""
