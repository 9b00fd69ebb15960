"""What the ladder learns from and is judged by: real texts, pairs, a tokenizer of its own, a decoder at random.

Texts are the docstrings of the installed packages and, where the shared data are, WikiSplit's sentences and TyDi's
passages. What judges (held-out docstrings, TyDi's dev split, STS-B's test split) is trained on in no stage: a text is
left out where it is, or one of its sentences is, a question, document or sentence of an evaluation.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import kinvec
from kinvec import docstrings, files
from kinvec.console import say
from kinvec.contracts import KinvecError, PairData, RetrievalData
from kinvec.preparing import sentences

TEST_SHARE = 0.2  # of the docstrings, whole sub-packages: some 2,400 queries, an interval of about ±0.02
WORDS = 60  # of a docstring's document, for every model and BM25: 93 tokens; one document in eleven is cut at TOKENS
# LLM2Vec's length for SimCSE, here for all stages: attention over its 512 would take twice the time.
TOKENS = 128
SHORTEST = 40  # characters of a text: shorter ones are scraps such as "Notes" or "See also"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@dataclass(frozen=True)
class Size:
    """The decoder, and how much it is given to learn from.

    6.4 million parameters: larger ones would see fewer tokens in the time. Steps are fixed numbers, so that results can
    be compared; together they are half an hour on two cores, half of it pre-training.
    """

    packages: tuple[str, ...] = docstrings.PACKAGES
    vocabulary: int = 8192  # a third of the parameters; of 3 million tokens, rarer pieces would hardly be seen
    hidden: int = 256
    layers: int = 6
    heads: int = 4  # of 64 dimensions, as in Llama 3.2 1B; half as many for keys and values
    clm: int = 1600  # steps of 16 blocks: one pass over 25,000 of them
    mntp: int = 240  # steps of 32 blocks: a third of a pass
    simcse: int = 80  # steps of 128 sentences: a seventh of a pass over 73,000 of them
    supervised: int = 240  # steps of 32 pairs, on each of three ways: more than half a pass over 13,300 of them


@dataclass(frozen=True)
class Task:
    """One column of the table: data that judge a model, and the measure."""

    title: str
    data: Path
    metric: str


def tasks_of(folder: Path, shared: Path) -> dict[str, Task]:
    """The tasks whose data are there; the docstrings always are."""
    known = {
        "docstrings": Task("docstrings", folder / "docstrings", "nDCG@10"),
        "tydi": Task("TyDi", shared / "tydiqa_en" / "tydiqa.goldp.en.dev.json", "nDCG@10"),
        "stsb": Task("STS-B", shared / "stsb" / "sts-test.csv", "spearman_cosine"),
    }
    return {name: task for name, task in known.items() if task.data.exists()}


def prepare(folder: Path, shared: Path, size: Size) -> dict[str, Any]:
    """Write texts, pairs, test data, tokenizer and decoder into `folder`, unless they are there; returns the counts.

    The folder appears whole: what a killed call left is made anew. Raises `KinvecError` for a folder of another size,
    and for one that holds other things.
    """
    manifest = folder / "manifest.json"
    if manifest.is_file():
        known = json.loads(manifest.read_text("utf-8"))
        if known["size"] != json.loads(json.dumps(asdict(size))):
            raise KinvecError(f"{folder} holds data of another size; name another folder, or delete it")
        return known
    if folder.exists():
        raise KinvecError(f"{folder} is there and not the ladder's data; name another --out")
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    counts = _build(beside, shared, size)
    files.write_json(beside / manifest.name, counts)
    files.replace_folder(beside, folder)
    return counts


def _build(folder: Path, shared: Path, size: Size) -> dict[str, Any]:
    found = docstrings.collect(size.packages)
    train, test = docstrings.split(found, TEST_SHARE)
    docstrings.write_beir(folder / "docstrings", [], test, WORDS)
    judged = set(files.text_keys(_judged(folder, shared)).tolist())
    pairs, dropped = _unjudged([(pair.query, pair.document) for pair in train] + list(_questions(shared)), judged)
    texts, more = _unjudged([(f"{q}\n\n{d}",) for q, d in pairs] + [(text,) for text in _sentences(shared)], judged)
    _write(folder / "pairs.jsonl", [{"query": query, "pos_doc": _cut(document)} for query, document in pairs])
    _write(folder / "texts.jsonl", [{"text": text} for (text,) in texts])
    tokenizer = write_tokenizer(folder / "decoder", [text for (text,) in texts], size.vocabulary)
    parameters = write_decoder(folder / "decoder", tokenizer, size)
    source, out = folder / "texts.jsonl", {unit: folder / f"{unit}s" for unit in ("block", "sentence")}
    # A block and the <s> before it; across texts, as LLM2Vec groups them, so that all blocks are full.
    blocks = kinvec.prepare(
        source, out=out["block"], unit="block", model=str(folder / "decoder"), tokens=TOKENS - 1, across=True,
        shortest=SHORTEST, holdout=0.0,
    )  # fmt: skip
    singles = kinvec.prepare(source, out=out["sentence"], unit="sentence", shortest=SHORTEST, holdout=0.0)
    return {
        "size": asdict(size), "parameters": parameters, "docstrings": docstrings.counts(train),
        "texts": len(texts), "characters": sum(len(text) for (text,) in texts), "pairs": len(pairs),
        "blocks": blocks["train"], "sentences": singles["train"], "test_pairs": len(test),
        "judged_and_dropped": dropped + more,
    }  # fmt: skip


def _judged(folder: Path, shared: Path) -> Iterator[str]:
    """Every text that a model is judged by, questions and documents."""
    for task in tasks_of(folder, shared).values():
        problem = files.open_problem(task.data)
        if isinstance(problem, RetrievalData):
            yield from problem.queries.values()
            yield from problem.corpus.texts
        elif isinstance(problem, PairData):
            yield from problem.first
            yield from problem.second


def _unjudged(rows: Iterable[tuple[str, ...]], judged: set[int]) -> tuple[list[tuple[str, ...]], int]:
    """The rows without a judged text or sentence, each once; and how many were left out for having one."""
    free, left_out = dict[tuple[str, ...], None](), 0
    for row in rows:
        cut = [part for text in row for part in sentences(text)]
        if judged.isdisjoint(files.text_keys([*row, *cut]).tolist()):
            free[row] = None
        else:
            left_out += 1
    return list(free), left_out


def _questions(shared: Path) -> Iterator[tuple[str, str]]:
    """TyDi's questions with the passages that answer them."""
    place = shared / "tydiqa_en" / "tydiqa.goldp.en.train.json"
    if not place.is_file():
        say(f"no TyDi questions at {place}: pairs are those of docstrings alone")
        return
    table = files.open_data(place)
    for row in range(len(table)):
        example = table.example(row)
        yield example.query, example.positives[0]


def _sentences(shared: Path) -> Iterator[str]:
    """WikiSplit's unsplit sentences."""
    places = sorted((shared / "wikisplit").glob("*.tsv"))
    if not places:
        say(f"no WikiSplit sentences in {shared / 'wikisplit'}: the texts are those of the pairs alone")
    for place in places:
        yield from (line.split("\t")[0] for line in place.read_text("utf-8").splitlines())


def _cut(document: str) -> str:
    return " ".join(document.split()[:WORDS])


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_tokenizer(folder: Path, texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer trained on the texts; like Llama's it puts <s> before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL.values()), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    start = SPECIAL["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, backend.token_to_id(start))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=TOKENS, **SPECIAL)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_decoder(folder: Path, tokenizer: Any, size: Size) -> int:
    """A Llama with random weights beside its tokenizer, as a plain Hugging Face folder; returns its parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads // 2, intermediate_size=size.hidden * 8 // 3,
        max_position_embeddings=TOKENS, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return int(model.num_parameters())
