"""`make models`: the fifty most used embedding models, each as a tiny configuration; writes docs/models.md.

Every model of `model_list.py` becomes a folder as the hub has it, with a few thousand random weights: model type,
tokenizer, pooling, dense layers, normalisation, prompts, old file formats. Then it is opened, compared with
sentence-transformers, trained for a step by `kinvec.train`, saved, reloaded, and read back by sentence-transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from model_list import AS_OF, FIFTY, OTHERS, SOURCE, Dense, Form, Model  # noqa: E402
from tiny_models import WORDS, random_model, tokenizer_of  # noqa: E402

from kinvec import Embedder  # noqa: E402
from kinvec.contracts import KinvecError  # noqa: E402
from kinvec.folder import POOLING_FLAGS  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89)  # words a text; the longest model takes 72 tokens
TEXTS = [*(" ".join((WORDS * 2)[:length]) for length in LENGTHS), "naïve Café Ωμέγα 你好 🙂", " high   RISK\n"]
ALIKE = 0.99999  # least cosine between two libraries' vectors of a text


# ---- a folder as the hub has it ----


def build(form: Form, folder: Path) -> Path:
    """Write the model folder of a form, with random weights."""
    import transformers

    folder.mkdir(parents=True)
    config = getattr(transformers, form.config)(**form.settings)
    model = random_model(config, spread=0.2)
    model.save_pretrained(folder)
    tokenizer_of(form.tokenizer, form.max_length).save_pretrained(folder)
    _edit(folder / "tokenizer_config.json", tokenizer_class=form.tokenizer_class, **form.tokenizer_says)
    _edit(folder / "config.json", **form.published)
    _weights(form, folder)
    width = getattr(config, "hidden_size", None) or config.d_model
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    _write(folder / "1_Pooling" / "config.json", _pooling(form, width))
    for number, part in enumerate(form.after, 2):
        kind = part if isinstance(part, str) else "Dense"
        modules.append((f"{number}_{kind}", kind))
        if isinstance(part, Dense):
            _dense(part, width, folder / f"{number}_{kind}")
            width = part.width
    types = form.modules or tuple(f"sentence_transformers.models.{kind}" for _, kind in modules)
    rows = [
        {"idx": i, "name": str(i), "path": path, "type": kind}
        for i, ((path, _), kind) in enumerate(zip(modules, types, strict=False))
    ]
    _write(folder / "modules.json", rows)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": form.max_length, "do_lower_case": False})
    _write(folder / "config_sentence_transformers.json", {"prompts": form.prompts, "default_prompt_name": None})
    return folder


def _weights(form: Form, folder: Path) -> None:
    """The weights under the names and in the file that the hub has them."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    for ours, theirs in form.renamed.items():
        tensors = {name.replace(ours, theirs): value for name, value in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    if form.weights == "bin":
        file.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")


def _pooling(form: Form, width: int) -> dict[str, Any]:
    flags = {flag: form.pooling == mode for mode, flag in POOLING_FLAGS.items()}
    return {"word_embedding_dimension": width, **flags, "include_prompt": form.include_prompt}


def _dense(part: Dense, width: int, place: Path) -> None:
    from safetensors.torch import save_file

    place.mkdir()
    linear = torch.nn.Linear(width, part.width, bias=part.bias)
    save_file({f"linear.{key}": value for key, value in linear.state_dict().items()}, place / "model.safetensors")
    config = {"in_features": width, "out_features": part.width, "bias": part.bias}
    _write(place / "config.json", config | {"activation_function": part.activation})


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2), "utf-8")


def _edit(path: Path, **changes: Any) -> None:
    """Change keys of a file; None takes one out."""
    changed = json.loads(path.read_text("utf-8")) | changes
    _write(path, {key: value for key, value in changed.items() if value is not None})


# ---- what is measured ----


@dataclass
class Outcome:
    """What came out of one check: a value to show, or the sentence of the error."""

    good: bool
    text: str


@dataclass
class Work:
    """A form being measured: its folder, and what the checks so far have opened."""

    place: Path
    embedder: Embedder | None = None
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.place / "published"

    @property
    def ours(self) -> Embedder:
        assert self.embedder is not None
        return self.embedder

    @property
    def good(self) -> bool:
        """Whether every check was passed."""
        return len(self.outcomes) == len(CHECKS) and all(outcome.good for outcome in self.outcomes.values())


def _load(folder: Path) -> Embedder:
    return Embedder.load(folder, precision="fp32", device="cpu")


def _vectors(model: Embedder) -> list[np.ndarray]:
    return [model.encode(TEXTS), model.encode_queries(TEXTS), model.encode_documents(TEXTS)]


def distance(ours: Embedder, folder: Path) -> float:
    """The largest 1 − cosine between our vectors and sentence-transformers', plain and with the model's prompts."""
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(folder), device="cpu")
    theirs = [peer.encode(TEXTS), peer.encode_query(TEXTS), peer.encode_document(TEXTS)]
    least = 1.0
    for mine, other in zip(_vectors(ours), theirs, strict=True):
        a, b = mine.astype(np.float64), np.asarray(other, dtype=np.float64)
        cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        least = min(least, float(cosine.min()))
    return 1.0 - least


def _near(value: float) -> Outcome:
    return Outcome(value <= 1 - ALIKE, f"{max(value, 0.0):.0e}")


def loads(work: Work) -> Outcome:
    """The folder opens; on which way its texts go through the model."""
    work.embedder = _load(work.folder)
    way = "packed" if work.ours.backbone.packs else "padded"
    return Outcome(True, f"{way}, causal" if work.ours.attention == "causal" else way)


def agrees(work: Work) -> Outcome:
    """The same vectors as sentence-transformers, from one token to beyond the longest text."""
    native = work.place / "native"
    return _near(distance(work.ours, native if native.is_dir() else work.folder))


def trains(work: Work) -> Outcome:
    """One step of the real trainer: the loss is finite and the vectors change."""
    import kinvec

    rows = [{"query": " ".join(WORDS[i : i + 4]), "pos_doc": " ".join(WORDS[i + 2 : i + 12])} for i in range(8)]
    pairs = work.place / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    kinvec.train(None, [
        f"model={work.folder}", f"data.train={pairs}", f"out={work.place / 'run'}", "evaluate=false", "device=cpu",
        "precision=fp32", "trainer.max_steps=1", "trainer.batch_size=8", "trainer.warmup=0", "trainer.lr=0.001",
    ])  # fmt: skip
    loss = json.loads((work.place / "run" / "log.jsonl").read_text("utf-8"))["loss"]
    moved = not np.array_equal(_load(work.place / "run" / "model").encode(TEXTS), work.ours.encode(TEXTS))
    return Outcome(math.isfinite(loss) and moved, "yes" if moved else "the vectors did not change")


def reloads(work: Work) -> Outcome:
    """Saved and opened again, the vectors are the same to the bit."""
    work.ours.save(work.place / "saved")
    again = _load(work.place / "saved")
    same = all(np.array_equal(a, b) for a, b in zip(_vectors(again), _vectors(work.ours), strict=True))
    return Outcome(same, "to the bit" if same else "the vectors differ")


def read_back(work: Work) -> Outcome:
    """sentence-transformers opens what was trained and saved, and gives its vectors."""
    return _near(distance(_load(work.place / "run" / "model"), work.place / "run" / "model"))


CHECKS: dict[str, Callable[[Work], Outcome]] = {
    "loads": loads, "agrees": agrees, "trains": trains, "reloads": reloads, "read back": read_back,
}  # fmt: skip


def measure(form: Form, place: Path) -> Work:
    """Build a form's folder and put it through every check; one that fails leaves its sentence, and the rest go on."""
    work = Work(place)
    build(form, work.folder)
    if form.native:
        build(form.native, place / "native")
    for name, check in CHECKS.items():
        if work.embedder is None and name != "loads":
            break
        try:
            work.outcomes[name] = check(work)
        except Exception as error:  # whatever it is, it is what a user would meet
            kind = "" if isinstance(error, KinvecError) else f"{type(error).__name__}: "
            sentence = str(error).replace(f"{place}{os.sep}", "").splitlines()[0]
            work.outcomes[name] = Outcome(False, kind + sentence)
    return work


# ---- the page ----


def described(model: Model) -> tuple[str, ...]:
    """The columns of a model that are known before anything is measured: name, downloads, architecture, pooling."""
    form = model.form
    kind, parts = form.config.removesuffix("Config"), [form.pooling]
    parts += [part.lower() if isinstance(part, str) else "dense" for part in form.after]
    if form.modules and not form.modules[0].endswith(".Transformer"):
        kind, parts = form.modules[0].rsplit(".", 1)[-1], []
    return f"`{model.name}`", model.downloads, kind, " → ".join(parts)


def remark(form: Form) -> str:
    """What else is particular to a form."""
    keys = form.published.keys()
    said = {
        "weights in torch's older file": form.weights == "bin",
        "came with its own code": "auto_map" in keys,
        "config.json translated": form.native is not None and bool({"model_type", "n_embd"} & keys),
        "made bidirectional": form.published.get("is_causal") is False,
        "end of text as tokenizer_config.json says": "add_eos_token" in form.tokenizer_says,
        "prompts": any(form.prompts.values()),
        "left out of pooling": not form.include_prompt,
    }
    return ", ".join(words for words, true in said.items() if true)


def row(model: Model, work: Work) -> str:
    """A line of the table."""
    measured = [_cell(work.outcomes.get(name)) for name in CHECKS]
    return "| " + " | ".join([*described(model), *measured, remark(model.form)]) + " |"


def _cell(outcome: Outcome | None) -> str:
    return "–" if outcome is None else outcome.text if outcome.good else "**no**"


def table(models: list[Model], works: dict[str, Work]) -> str:
    """The table of some models."""
    head = "| model | downloads | architecture | pooling | loads | agrees | trains | reloads | read back | remark |"
    return "\n".join([head, "|---" * 10 + "|", *(row(model, works[repr(model.form)]) for model in models)])


def failures(models: list[Model], works: dict[str, Work]) -> str:
    """What does not work, each with its sentence, models of the same sentence together."""
    reasons: dict[str, list[str]] = {}
    for model in models:
        for name, outcome in works[repr(model.form)].outcomes.items():
            if not outcome.good:
                reasons.setdefault(f"{name}: “{outcome.text}”", []).append(f"`{model.name}`")
    return "\n".join(f"- {', '.join(names)}\n  {reason}" for reason, names in reasons.items())


def page(works: dict[str, Work]) -> str:
    """docs/models.md."""
    packages = ("kinvec", "transformers", "sentence-transformers", "torch")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    good = sum(works[repr(model.form)].good for model in FIFTY)
    return TEMPLATE.format(
        good=good, source=SOURCE.format(as_of=AS_OF), fifty=table(FIFTY, works), others=table(OTHERS, works),
        failures=failures([*FIFTY, *OTHERS], works), versions=versions, python=platform.python_version(),
        day=date.today().isoformat(), forms=len(works), models=len(FIFTY) + len(OTHERS), alike=1 - ALIKE,
        texts=len(TEXTS),
    )  # fmt: skip


TEMPLATE = """\
# Which models work

<!-- Written by `make models` (benchmarks/models.py, benchmarks/model_list.py): edit those. -->

Of the fifty most used embedding models on the Hugging Face hub, **{good} work here**: they open, give the vectors that
sentence-transformers gives, train, are saved, and are read back by both. What does not work is
[listed with its reason](#what-does-not-work).

**No weights of the hub were used**: it cannot be reached where this page is made. Each model is a folder built here,
with the model type, tokenizer, position embeddings, attention windows, pooling, dense layers, normalisation, prompts
and file forms that the model has, two layers of width 32, a vocabulary of up to 300, and random weights. The page says
that the architecture works, not that a download was tried.

{source}

## How it is measured

- **loads**: `Embedder.load`; whether its texts are packed end to end or padded, and `causal` where a token sees only
  what precedes it.
- **agrees**: the largest 1 − cosine to sentence-transformers' vectors over {texts} texts, from one word to beyond the
  longest that the model takes, plain and with its prompts, in float32. Above {alike:.0e} it counts as a failure.
- **trains**: one step of `kinvec train` on eight pairs; the loss is finite and the vectors change.
- **reloads**: saved and opened again, every vector is equal to the bit.
- **read back**: the tuned folder in sentence-transformers against the same folder here, as 1 − cosine.

Code that comes with a model (`auto_map` in config.json; what others run by `trust_remote_code`) is never run. Where
transformers has the architecture by now, the folder is opened as that; where names or keys differ, config.json is
translated (Alibaba's `new`, nomic's `nomic_bert`), and *agrees* compares the same weights in transformers' own words,
since sentence-transformers would run the code. kinvec says so each time, and asks you to compare a few vectors with the
authors'. A model whose architecture only its code knows is refused in one sentence.

## The fifty

{fifty}

## Others, of further kinds

{others}

## What does not work

{failures}

jina-embeddings-v3 is published a second time in transformers' own form (`jinaai/jina-embeddings-v3-hf`, above), which
works. Static embeddings have no transformer to train; CLIP's images and SPLADE's sparse vectors are another subject.

## Made with

{versions}, Python {python}, on {day}; {forms} different folders for {models} models.
`make models` makes the page again, in about a minute.
"""


def main() -> None:
    """Measure every form and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="measure the models whose name has this in it, and print instead of writing")
    only = parser.parse_args().only
    chosen = [model for model in [*FIFTY, *OTHERS] if only is None or only in model.name]
    works: dict[str, Work] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate(chosen):
            if repr(model.form) not in works:
                works[repr(model.form)] = measure(model.form, Path(folder) / str(number))
            print(row(model, works[repr(model.form)]), file=sys.stderr, flush=True)
    if only is None:
        PAGE.write_text(page(works), "utf-8")
    else:
        print(failures(chosen, works))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
