"""Each documented command of NeMo, LLM2Vec and Bg2Vec beside ours: run on real text in their form, and checked.

A case writes the files that their documentation describes, from the real data beside the checkout, and runs our
commands as our pages show them, on tiny models with random weights, made smaller by `SMALLER`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kinvec import Embedder, files, tasks
from kinvec.recipe import load_stages

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("from-nemo.md", "from-llm2vec.md")
TYDI, NEWS = "tydiqa_en/tydiqa.goldp.en.dev.json", "huffpost_news_10k/News_Category_Dataset_v3.json"
WIDTH, STEPS = 64, 20
SMALLER = (
    f"threads=1 trainer.max_steps={STEPS} trainer.lr=3e-3 trainer.warmup=3 trainer.eval_every=0 data.max_length=48"
)
pytestmark = pytest.mark.usefixtures("one_thread")


# --- Their data -------------------------------------------------------------------------------------------------------


def lines_of(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def questions(shared: Path, n: int) -> list[tuple[str, str, list[str]]]:
    """(question, its paragraph, paragraphs of the next five questions) of TyDi QA."""
    found = [(row.query, row.positives[0]) for row in islice(_examples(shared / TYDI), n + 5)]
    return [(query, text, [other for _, other in found[i + 1 : i + 6]]) for i, (query, text) in enumerate(found[:n])]


def _examples(path: Path) -> Iterator[Any]:
    table = files.open_data(path)
    return (table.example(row) for row in range(len(table)))


def sbert_data(shared: Path) -> None:
    """A JSON array; `question`, and the positives as a list, as its first data set class read them."""
    rows = [{"question": q, "pos_doc": [text], "neg_doc": others} for q, text, others in questions(shared, 80)]
    Path("train.json").write_text(json.dumps(rows))


def bert_data(shared: Path) -> None:
    """A JSON array as its documentation shows it, and JSON lines as its code reads them; a file each."""
    rows = [{"query": q, "pos_doc": text, "neg_doc": others} for q, text, others in questions(shared, 100)]
    Path("train.json").write_text(json.dumps(rows[:80], indent=4))
    Path("val.json").write_text(lines_of(rows[80:]))


def gpt_data(shared: Path) -> None:
    """JSON lines with one negative and ids; for inference query rows and document rows, each with its `doc_id`."""
    rows = [
        {"query": q, "pos_doc": text, "neg_doc": others[0], "query_id": f"q{103151 + i}", "doc_id": f"d{14755 + 7 * i}"}
        for i, (q, text, others) in enumerate(questions(shared, 120))
    ]
    Path("train.jsonl").write_text(lines_of(rows[:90]))
    asked, kept = ("query", "query_id", "doc_id"), ("pos_doc", "doc_id")
    Path("queries.jsonl").write_text(lines_of([{key: row[key] for key in asked} for row in rows[90:]]))
    Path("docs.jsonl").write_text(lines_of([{key: row[key] for key in kept} for row in reversed(rows)]))


def news_data(shared: Path) -> None:
    """The notebook's JSON lines: HuffPost's headlines and descriptions of two categories hard to tell apart."""
    kept: dict[str, list[str]] = {"U.S. NEWS": [], "WORLD NEWS": []}
    for line in (shared / NEWS).read_text("utf-8").splitlines():
        label = json.loads(line)["category"]
        if label in kept and len(kept[label]) < 60:
            kept[label].append(line)
    Path("news.json").write_text("\n".join([*kept["U.S. NEWS"], *kept["WORLD NEWS"]]) + "\n")


def articles(shared: Path) -> None:
    """Bulgarian Wikipedia, an article a file as wikiextractor leaves it, and questions to judge the result by."""
    Path("ARTICLES").mkdir()
    rows = (shared / "exams_bg" / "paragraphs.jsonl").read_text("utf-8").splitlines()
    for i, line in enumerate(rows[:150]):
        (Path("ARTICLES") / f"{i:03}.txt").write_text(json.loads(line)["text"], "utf-8")
    bert_data(shared)


def articles_and_nli(shared: Path) -> None:
    """The same, and what the supervised stage learns from: premises with what they entail and what they contradict."""
    articles(shared)
    Path("DATA").mkdir()
    for part in ("s1", "s2", "labels"):
        lines = (shared / "snli" / f"{part}.dev").read_text("utf-8").splitlines()[:450]
        (Path("DATA") / f"{part}.train").write_text("\n".join(lines) + "\n")


# --- What must come out -----------------------------------------------------------------------------------------------


def learnt(run: str) -> Embedder:
    """The run ended with a lower loss than it began with, was measured before and after, and its model opens."""
    losses = [json.loads(line)["loss"] for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    third = STEPS // 3
    assert len(losses) == STEPS and np.isfinite(losses).all()
    assert np.mean(losses[-third:]) < np.mean(losses[:third]), losses
    for side in ("base", "tuned"):
        for result in tasks.load_results(Path(run) / "results" / side).values():
            assert result.metrics and np.isfinite(list(result.metrics.values())).all()
    assert (Path(run) / "report.html").is_file()
    embedder = Embedder.load(f"{run}/model", precision="fp32")
    vectors = embedder.encode_queries(["where is the river", "реката е дълга"])
    assert vectors.shape == (2, WIDTH) and np.isfinite(vectors).all()
    return embedder


def bert_learnt() -> None:
    model = learnt("runs/bert")
    assert model.pooling == ("mean",) and model.prompts == {"query": "query: ", "document": "passage: "}
    (before,), (after,) = (tasks.load_results(f"runs/bert/results/{side}").values() for side in ("base", "tuned"))
    assert {"margin", "triplet_accuracy"} <= {difference.metric for difference in tasks.compare(before, after).metrics}


def overrides_learnt() -> None:
    model = learnt("runs/bert")
    assert model.lineage[-1]["recipe"]["trainer"]["batch_size"] == 8 and model.max_length == 48


def gpt_learnt_and_generated() -> None:
    model = learnt("runs/gpt")
    assert model.pooling == ("lasttoken",) and model.attention == "causal" and Path("runs/gpt/adapter").is_dir()
    theirs = next(Path("vectors").glob("consumed_samples*"))
    assert theirs.name == f"consumed_samples{STEPS * 32}"
    for side, name, rows in (("query", "test_queries", "queries.jsonl"), ("doc", "test_docs", "docs.jsonl")):
        expected = [json.loads(line) for line in Path(rows).read_text("utf-8").splitlines()]
        ids = (theirs / name / f"{side}.ids").read_text("utf-8").splitlines()
        vectors = np.load(theirs / name / f"{side}.npy", allow_pickle=False)
        assert ids == [row[f"{side}_id"] for row in expected]
        assert vectors.shape == (len(ids), WIDTH) and vectors.dtype == np.float32
        texts = [row["query" if side == "query" else "pos_doc"].strip() for row in expected]
        encode = model.encode_queries if side == "query" else model.encode_documents
        np.testing.assert_allclose(vectors, encode(texts), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def news_learnt() -> None:
    learnt("runs/news")
    assert tasks.load_results("runs/news/results/tuned")["news"].kind == "classification"


def converted() -> None:
    before, after = (Embedder.load(name, precision="fp32") for name in ("MODEL", "my-model"))
    np.testing.assert_array_equal(before.encode(["the river Danube"]), after.encode(["the river Danube"]))


def simcse_learnt() -> None:
    losses = [json.loads(line)["loss"] for line in Path("runs/mntp/log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-6:]) < np.mean(losses[:6])
    model = learnt("runs/simcse")
    assert model.attention == "bidirectional" and [stage["objective"] for stage in model.lineage] == ["mntp", "simcse"]


def chain_learnt() -> None:
    model = learnt("runs/bg2vec/simcse")
    first = model.lineage[0]["recipe"]["objective"]["masking"]
    assert (first["probability"], first["replace"], first["token"]) == (0.8, "all", "blank")


def supervised_learnt() -> None:
    model = learnt("runs/mine")
    assert model.pooling == ("mean",) and model.attention == "bidirectional"


def llm2vec_learnt() -> None:
    assert [stage["objective"] for stage in learnt("runs/all/contrastive").lineage] == ["mntp", "simcse", "contrastive"]


# --- The table --------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Their commands, or the page that gives them; what they are given; ours, as our pages show them; what came out."""

    theirs: str
    data: Callable[[Path], None]
    ours: tuple[str, ...]
    check: Callable[[], None]


OVERRIDES = """\
megatron_bert_embedding_finetuning.py restore_from_path=MODEL trainer.devices=1 trainer.max_steps=20
trainer.val_check_interval=100 +trainer.num_sanity_val_steps=0 model.mcore_bert=True model.post_process=False
model.global_batch_size=8 model.micro_batch_size=8 model.optim.lr=0.003 model.optim.sched.min_lr=0.00000001
model.optim.sched.warmup_steps=3 model.encoder_seq_length=48 model.tokenizer.library="huggingface"
model.data.data_train=train.json model.data.data_validation=val.json model.data.hard_negatives_to_train=4
exp_manager.explicit_log_dir=runs/bert exp_manager.resume_if_exists=True
"""
TRAIN_BERT = "kinvec train bert-retrieval model=MODEL data.train=train.json out=runs/bert"
PREPARE = "kinvec prepare ARTICLES --out texts --unit block --model DECODER --tokens 512 --across"
MNTP = "kinvec train mntp model=DECODER data.train=texts/train.jsonl out=runs/mntp"
CASES = {
    "sbert": Case("megatron_sbert_pretraining.py", sbert_data, (TRAIN_BERT,), bert_learnt),
    "bert": Case("megatron_bert_embedding_finetuning.py", bert_data, (TRAIN_BERT,), bert_learnt),
    "overrides": Case(
        OVERRIDES, bert_data, ("kinvec init mine.yaml --from-nemo overrides.txt", "kinvec train mine.yaml"),
        overrides_learnt,
    ),
    "gpt": Case(
        "megatron_gpt_embedding_finetuning.py, then megatron_gpt_embedding_generate.py", gpt_data,
        ("kinvec train gpt-embedding model=DECODER data.train=train.jsonl out=runs/gpt",
         "kinvec embed --model runs/gpt/model --queries queries.jsonl --docs docs.jsonl --layout nemo --out vectors",
         "kinvec evaluate --embeddings vectors --data queries.jsonl"),
        gpt_learnt_and_generated,
    ),
    "convert": Case(
        "convert_bert_hf_to_nemo.py, convert_bert_nemo_to_hf.py", bert_data,
        ("kinvec convert MODEL model.nemo", "kinvec convert model.nemo my-model"), converted,
    ),
    "notebook": Case(
        "NeMo-Sentence-Transformer's notebook", news_data,
        ("kinvec train news-categories model=MODEL data.train=news.json out=runs/news",), news_learnt,
    ),
    "simcse-post": Case(
        "Bg2Vec, parts 2 to 4: group_texts, run_mntp.py, run_simcse.py", articles,
        (PREPARE, MNTP, "kinvec train simcse model=runs/mntp/model data.train=texts/train.jsonl out=runs/simcse"),
        simcse_learnt,
    ),
    "bg2vec": Case(
        "the same in one", articles,
        (PREPARE, "kinvec train bg2vec model=DECODER data.train=texts/train.jsonl out=runs/bg2vec"), chain_learnt,
    ),
    "supervised": Case(
        "run_mntp.py, then run_supervised.py", articles_and_nli,
        (PREPARE, MNTP, "kinvec train llm2vec-supervised model=runs/mntp/model data.train=DATA out=runs/mine"),
        supervised_learnt,
    ),
    "llm2vec": Case(
        "LLM2Vec's three, one after the other", articles_and_nli,
        (PREPARE, "kinvec train llm2vec model=DECODER out=runs/all"), llm2vec_learnt,
    ),
}  # fmt: skip
MORE = {  # settings that a command has here besides `SMALLER`
    "train mine.yaml": "threads=1",
    "train mntp": "data.test=val.json trainer.batch_size=16",
    "train simcse": "data.test=val.json trainer.batch_size=16",
    "train bg2vec": "data.test=val.json trainer.batch_size=16",
    "train llm2vec-supervised": "trainer.batch_size=16",
    "train llm2vec ": "data.test=val.json trainer.batch_size=16 mntp.data.train=texts/train.jsonl "
    "simcse.data.train=texts/train.jsonl contrastive.data.train=DATA",
    "train bert-retrieval": "precision=fp32",
    "prepare": "--tokens 48",
    "embed": "--precision fp32",
}
"""A command's beginning → arguments that this test adds."""


@pytest.fixture(scope="module")
def tiny(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`MODEL`, a tiny BERT with the real one's tokenizer; `DECODER`, a tiny Llama with one trained on the articles."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    real = str(shared_data / "tokenizers" / "bert_uncased_tokenizer.json")
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_file=real, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=64,
    )  # fmt: skip
    transformers.set_seed(0)
    bert = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)
    transformers.BertModel(bert).save_pretrained(folder / "MODEL")
    words.save_pretrained(folder / "MODEL")
    pieces = _pieces((shared_data / "exams_bg" / "paragraphs.jsonl").read_text("utf-8").splitlines()[:300])
    llama = transformers.LlamaConfig(
        vocab_size=len(pieces), max_position_embeddings=128, pad_token_id=1, bos_token_id=0, eos_token_id=2, **sizes
    )
    transformers.LlamaForCausalLM(llama).save_pretrained(folder / "DECODER")
    pieces.save_pretrained(folder / "DECODER")
    return folder


def _pieces(lines: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer trained on these JSON lines' texts: any text, no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


@pytest.mark.parametrize("name", [*sorted(CASES.keys() - {"llm2vec"}), pytest.param("llm2vec", marks=pytest.mark.slow)])
def test_a_documented_command_runs_here(
    name: str, shared_data: Path, tiny: Path, tmp_path: Path, main: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for model in ("MODEL", "DECODER"):
        Path(model).symlink_to(tiny / model)
    Path("overrides.txt").write_text(OVERRIDES)
    case = CASES[name]
    case.data(shared_data)
    for command in case.ours:
        arguments = command.removeprefix("kinvec ")
        more = next((more for begin, more in MORE.items() if arguments.startswith(begin)), "")
        smaller = SMALLER if re.match(r"train (?!mine)", arguments) else ""
        code, said = main(*shlex.split(f"{arguments} {smaller} {more}"))
        assert code == 0, said
    case.check()


def test_each_command_of_the_pages_is_among_them() -> None:
    """And every recipe that the pages name is a shipped one."""
    shown = {
        command for page in PAGES
        for row in re.findall(r"^\|[^|]*\|(.*)\|$", (DOCS / page).read_text("utf-8"), re.MULTILINE)
        for command in re.findall(r"`(kinvec [^`]*)`", row)
    }  # fmt: skip
    run = {command.replace("runs/gpt/model --q", "MODEL --q") for case in CASES.values() for command in case.ours}
    assert shown and shown <= run, shown - run
    for command in run:
        if found := re.match(r"kinvec train ([\w-]+) ", command):
            assert load_stages(found[1], ["model=m", "data.train=d", "out=o"])
