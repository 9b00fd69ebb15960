"""Model folders, adapters and data of a stranger that would run code, leave their folder, or fill memory: refused."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from targets import READERS, attempt, guarded

from kinvec.contracts import KinvecError
from kinvec.files import open_data, records

pytestmark = pytest.mark.usefixtures("one_thread")


class Surprise:
    """Pickled, it asks to run a command when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch surprised",)


def with_values(**values: Any) -> Callable[[bytes], bytes]:
    return lambda raw: json.dumps(json.loads(raw) | values).encode()


def module(place: int, **values: Any) -> Callable[[bytes], bytes]:
    def edit(raw: bytes) -> bytes:
        modules = json.loads(raw)
        modules[place] |= values
        return json.dumps(modules).encode()

    return edit


def pickled(_: bytes) -> bytes:
    return pickle.dumps({"linear.weight": Surprise()})


def petabytes(raw: bytes) -> bytes:
    """A header that is whole, of a tensor that is not."""
    head = {"w": {"dtype": "F32", "shape": [1 << 40, 1 << 8], "data_offsets": [0, 1 << 50]}}
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + raw[:64]


def piled_up(raw: bytes) -> bytes:
    """Every tensor of a shape where the first of that shape is."""
    size = int.from_bytes(raw[:8], "little")
    head, first = json.loads(raw[8 : 8 + size]), {}
    for said in head.values():
        if "shape" in said:
            said["data_offsets"] = first.setdefault(tuple(said["shape"]), said["data_offsets"])
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def required(raw: bytes) -> bytes:
    """A Parquet file whose schema says that its first column lacks no value, which is not what its sizes say."""
    place = raw.index(b"\x25\x02", len(raw) - 8 - int.from_bytes(raw[-8:-4], "little"))  # repetition: optional
    return raw[:place] + b"\x25\x00" + raw[place + 2 :]


def array_head(shape: str, kind: str = "<f4") -> Callable[[bytes], bytes]:
    head = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return lambda raw: b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + raw[128:]


def with_part(name: str, part: dict[str, Any]) -> Callable[[bytes], bytes]:
    return with_values(**{name: part})


LONGER = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 100}
MANY = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
CLS = {"id": "[CLS]", "ids": [2] * 100, "tokens": ["[CLS]"] * 100}
TEMPLATE = {"type": "TemplateProcessing", "single": [MANY] * 200 + [TEXT], "pair": [], "special_tokens": {"[CLS]": CLS}}
SLOW = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}

NOT_RUN = ""  # opened without it

HOSTILE: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    # --- code ---
    "a module of any class": ("model/modules.json", module(2, type="os.system"), "module 'os.system' is not supp"),
    "a transformer of any class": ("model/modules.json", module(0, type="x.Transformer"), "'x.Transformer' is not s"),
    "an activation of any class": (
        "model/2_Dense/config.json", with_values(activation_function="os.system"), "not one of torch's own"
    ),
    "attention from the hub": ("model/config.json", with_values(attn_implementation="a/b"), "names code on the hub"),
    "attention by part": (
        "model/config.json", with_values(_attn_implementation={"text": "a/b"}), "names code on the hub"
    ),
    "a configuration's own code": (
        "model/config.json",
        with_values(model_type="own", auto_map={"AutoModel": "own.M"}), "needs code of its authors"
    ),
    "a tokenizer's own code": (
        "model/tokenizer_config.json",
        with_values(tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.T", None]}), NOT_RUN
    ),
    "another tuner": ("adapter/adapter_config.json", with_values(peft_type="XLORA"), "of adapters, LORA is read"),
    "a library of the adapter's": (
        "adapter/adapter_config.json", with_values(megatron_config={"a": 1}, megatron_core="antigravity"), "megatron_co"
    ),
    "a pickle in place of a checkpoint": ("model/model.safetensors", pickled, "."),
    # --- out of the folder ---
    "modules above": ("model/modules.json", module(1, path="../other"), "leads outside the folder"),
    "a transformer above": ("model/modules.json", module(0, path="../other"), "leads outside the folder"),
    "modules anywhere": ("model/modules.json", module(2, path="/etc"), "leads outside the folder"),
    "modules on a drive": ("model/modules.json", module(2, path="C:\\x"), "leads outside the folder"),
    "shards above": (
        "decoder/model.safetensors.index.json",
        with_values(weight_map={"x": "../model/model.safetensors"}), "is no file beside it"
    ),
    "shards that are a device": (
        "decoder/model.safetensors.index.json", with_values(weight_map={"x": "/dev/zero"}), "is no file beside it"
    ),
    "ranges elsewhere": ("stored/manifest.json", with_values(ranges="../vectors/doc.npy"), "not in the folder"),
    "vectors elsewhere": (
        "vectors/manifest.json", with_values(rows={"../../mine": 1}, checksums={"../../mine.npy": ""}), "not in the fol"
    ),
    "shards of data elsewhere": (
        "saved/test/state.json", with_values(_data_files=[{"filename": "../../x.arrow"}]), "is no file beside it"
    ),
    "a column that contradicts itself": ("parquet/rows.parquet", required, "not a readable Parquet file"),
    "seeds of a name that no file has": (
        "seeds/seeds.json", lambda _: json.dumps({"1": "9" * 5000}).encode(), "not in the folder"
    ),
    "seeds elsewhere": ("seeds/seeds.json", lambda _: b'{"1": "../model"}', "not in the folder"),
    # --- memory and time ---
    "a million layers": ("model/config.json", with_values(num_hidden_layers=10**6), "'num_hidden_layers' is more than"),
    "a thousand layers": ("model/config.json", with_values(num_hidden_layers=1000), "of 1,000 layers, the weights of"),
    "a billion labels": ("model/config.json", with_values(num_labels=10**9), "'num_labels' is more than"),
    "a billion words": ("model/config.json", with_values(vocab_size=10**9), "do not belong together"),
    "a billion places": ("model/config.json", with_values(max_position_embeddings=10**9), "do not belong together"),
    "a wide layer": ("model/2_Dense/config.json", with_values(in_features=10**6), "does not describe"),
    "a tensor of petabytes": ("model/model.safetensors", petabytes, "."),
    "a head of petabytes": ("model/model.safetensors", lambda raw: b"\xff" * 7 + b"\x7f" + raw[8:], "."),
    "a rank of millions": ("adapter/adapter_config.json", with_values(r=10**7), "rank"),
    "layers copied": ("adapter/adapter_config.json", with_values(layer_replication=[[0, 10**6]]), "layer_replication"),
    "a pattern without end": ("adapter/adapter_config.json", with_values(target_modules="(.+)+x"), "take for ever"),
    "texts made longer": (
        "model/tokenizer.json", with_part("normalizer", {"type": "Sequence", "normalizers": [LONGER] * 6}), "as long"
    ),
    "tokens added": ("model/tokenizer.json", with_part("post_processor", TEMPLATE), "times as long; refused"),
    "settings without end": ("model/config.json", lambda _: b'{"a":' * 100_000, "nested too deeply"),
    "a manifest without end": ("checkpoint/step-00000003/manifest.json", lambda _: b"[" * 5000, "damaged"),
    "an array of exabytes": ("vectors/doc.npy", array_head(f"({1 << 50}, 8)"), "NumPy array"),
    "tensors on top of each other": ("model/model.safetensors", piled_up, "damaged"),
    "an array with a head of 4 GiB": (
        "vectors/doc.npy", lambda raw: b"\x93NUMPY\x02\x00" + b"\xff" * 4 + raw[10:], "no plain NumPy array"
    ),
    "an array of objects": ("vectors/doc.npy", array_head("(1, 1)", "|O"), "NumPy array"),
    "an array of a number": ("vectors/doc.npy", array_head("()"), "no rows of numbers"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_it_is_refused_in_a_sentence(what: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, edit, says = HOSTILE[what]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("open('surprised', 'w')")
    said = attempt(good, target, edit((good / target).read_bytes()), tmp_path / "work")
    assert set(said) == {NOT_RUN} if says == NOT_RUN else any(one and says.lstrip(".") in one for one in said), said
    assert not list(tmp_path.rglob("surprised"))


def of_good(good: Path, name: str, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(good / name, folder / name))


def refuses(folder: Path, says: str) -> None:
    import kinvec

    with pytest.raises(KinvecError, match=says):
        kinvec.Embedder.load(folder)


def test_a_pattern_that_tries_without_end_is_stopped(good: Path, tmp_path: Path) -> None:
    import kinvec

    model = of_good(good, "model", tmp_path)
    words = model / "tokenizer.json"
    words.write_bytes(with_part("pre_tokenizer", SLOW)(words.read_bytes()))
    with pytest.raises(KinvecError, match="is its pattern sound"):
        kinvec.Embedder.load(model).encode(["a" * 40 + "!"])


def test_an_adapter_of_itself_is_refused(good: Path, tmp_path: Path) -> None:
    adapter = of_good(good, "adapter", tmp_path)
    (adapter / "kinvec.json").unlink()
    said = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(said | {"base_model_name_or_path": str(adapter)}))
    refuses(adapter, "is an adapter again")


def test_a_device_or_a_pipe_in_a_folder_is_not_read(good: Path, tmp_path: Path) -> None:
    for number, make in enumerate((lambda p: p.symlink_to("/dev/zero"), os.mkfifo, lambda p: p.symlink_to("nowhere"))):
        model = of_good(good, "model", tmp_path / str(number))
        (model / "config.json").unlink()
        make(model / "config.json")
        refuses(model, "a broken link, a pipe or a device")


ENDLESS = (
    "run/log.jsonl", "vectors/doc.npy", "vectors/doc.ids", "vectors/manifest.json", "stored/ranges.npy",
    "saved/test/data-00000-of-00001.arrow", "checkpoint/step-00000003/.metadata", "result/cheaper.json",
)  # fmt: skip


@pytest.mark.parametrize("target", ENDLESS)
def test_a_device_in_the_place_of_a_file_is_not_read(
    target: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KINVEC_CACHE", str(tmp_path / "cache"))
    reader = target.split("/")[0]
    of_good(good, reader, tmp_path)
    (tmp_path / target).unlink()
    (tmp_path / target).symlink_to("/dev/zero")
    for call in READERS[reader](tmp_path / reader):
        with contextlib.suppress(KinvecError), guarded(tmp_path, good):
            call()


@pytest.mark.parametrize("foreign", ["[0.5]\n[0.", None], ids=["", "to nothing"])
def test_a_link_in_the_place_of_a_file_that_grows_is_replaced(foreign: str | None, tmp_path: Path) -> None:
    from kinvec.reranker import remembering
    from kinvec.resuming import keep_log

    target, log, said = (tmp_path / name for name in ("target", "log.jsonl", "reranker.jsonl"))
    if foreign is not None:
        target.write_text(foreign)
    for path in (log, said):
        path.symlink_to(target)
    keep_log(log, 7)
    with remembering(lambda query, documents: np.ones(len(documents), np.float32), said):
        pass
    assert not log.is_symlink() and not said.is_symlink() and log.is_file() and said.is_file()
    assert (target.read_text() if target.exists() else None) == foreign


def test_a_pipe_is_no_part_of_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.jsonl")
    with pytest.raises(KinvecError, match="no data file"):
        open_data(tmp_path)


def test_weights_are_tensors_alone_and_uncompressed(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = of_good(good, "model", tmp_path)
    for place in (model, model / "2_Dense"):
        weights, old = place / "model.safetensors", place / "pytorch_model.bin"
        raw = weights.read_bytes()
        weights.unlink()
        old.write_bytes(pickle.dumps({"linear.weight": Surprise()}))
        refuses(model, "more than tensors|not tensors alone")
        with zipfile.ZipFile(old, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("archive/data.pkl", pickle.dumps({}))
            file.writestr("archive/data/0", b"\0" * (1 << 24))
        refuses(model, "compressed, as no checkpoint of torch is")
        old.unlink()
        weights.write_bytes(raw)
    assert not (tmp_path / "surprised").exists()


# --- Data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "raw", "says"),
    [
        ("a.jsonl", b'{"text": "' + b"x" * 3000 + b'"}\n', r"a.jsonl:1: the line is longer"),
        ("a.json", b'[{"text": "' + b"x" * 3000, r"a.json:1: the row is longer"),
        ("a.csv", b'text,label\nx,y\n"' + b"x,y\n" * 1000, r"a.csv:3: the cell is longer .* left open"),
        ("a.json", b'[{"text": ' + b"9" * 900 + b"}]", "is a number|broken JSON"),
        ("a.json", b"[" * 5000, "nested too deeply|longer"),
    ],
)
def test_a_row_without_end_ends_the_reading(
    name: str, raw: bytes, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LONGEST", 1000)
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(KinvecError, match=says):
        open_data(tmp_path / name, skip_bad=True)


def test_a_first_cell_may_be_long(tmp_path: Path) -> None:
    """Python's csv reads cells of 128 KiB unless it is told otherwise."""
    csv.field_size_limit(1 << 17)
    (tmp_path / "a.csv").write_text(f"text,{'x' * 200_000}\nthe text,\n")
    assert len(open_data(tmp_path / "a.csv")) == 1


def test_a_row_of_cells_without_end_ends_the_reading(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text" + "," * 10_000 + "\nx\n")
    with pytest.raises(KinvecError, match=r"a.csv:1: the row has 10,001 cells"):
        open_data(tmp_path / "a.csv", skip_bad=True)


def folded(rows: int, cell: str, nested: bool) -> Any:
    """A column of equal cells, which Parquet keeps once."""
    cells = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([cell]))
    return pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32), cells) if nested else cells


@pytest.mark.parametrize("nested", [False, True])
def test_a_cell_that_repeats_without_end_ends_the_reading(nested: bool, tmp_path: Path) -> None:
    """Kilobytes that stand for hundreds of megabytes of memory at once, and of the disk in the end."""
    columns = {"query": folded(400, "q", False), "pos_doc": folded(400, "x" * (1 << 20), nested)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(KinvecError, match="unfold to a thousand times"):
        open_data(tmp_path / "a.parquet", skip_bad=True)


def test_a_dictionary_is_read(tmp_path: Path) -> None:
    columns = {"query": folded(5, "why", False), "pos_doc": folded(5, "so", True)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    rows = open_data(tmp_path / "a.parquet").arrow.rows.to_pylist()
    assert [(row["query"], row["pos_doc"]) for row in rows] == [("why", ["so"])] * 5


def test_a_saved_data_set_is_not_compressed(good: Path, tmp_path: Path) -> None:
    saved = of_good(good, "saved", tmp_path)
    file = saved / "test" / "data-00000-of-00001.arrow"
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    table = table.set_column(table.schema.names.index("query"), "query", pa.array(["x" * 100_000] * 3))
    with pa.ipc.new_stream(file, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as sink:
        sink.write_table(table)
    with pytest.raises(KinvecError, match="compressed"):
        open_data(saved, split="test")


def test_a_broken_name_of_a_column_is_noted(tmp_path: Path) -> None:
    """What is wrong with a row is kept in a file beside the rows, which takes no half of a surrogate pair."""
    rows = ['{"query": "q", "pos_doc": "d"}', '{"query": "q", "\\ud800": "d"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    table = open_data(tmp_path / "rows.jsonl", skip_bad=True)
    assert len(table) == 1 and "\\ud800" in str(table.problems[0])


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
REFERENCES = "a0: " + "x" * 100 + "\n" + "".join(f"a{i}: {f'${{a{i - 1}}}' * 9}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "more than 100,000 values"),
        ("a: &a [*a]\n", "more than 100,000 values"),
        (REFERENCES, "more than 20 references"),
        ("out: !!python/object/apply:os.system [touch surprised]\n", "not valid YAML"),
        ("a: " + "1:" * 3000 + "1", "more than 400 digits"),
        ("a: 0x" + "f" * 5000, "more than 400 digits"),
        ("a: " + "[" * 3000, "nested more than|not valid YAML"),
        ("a: 1\nout: ${oc.env:NO_SUCH}\n", "NO_SUCH"),
        ("out: '" + "x" * (1 << 20) + "'", "longer than 256 KiB"),
    ],
)
def test_a_recipe_does_not_unfold(text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kinvec.recipe import load_recipe

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(KinvecError, match=says):
        load_recipe(tmp_path / "mine.yaml")
    with pytest.raises(KinvecError):
        load_recipe(None, [f"prompts={line.partition(': ')[2]}" for line in text.splitlines()])
    assert not (tmp_path / "surprised").exists()


def test_a_recipe_ends(tmp_path: Path) -> None:
    from kinvec.recipe import load_recipe

    (tmp_path / "mine.yaml").symlink_to("/dev/zero")
    with pytest.raises(KinvecError, match="longer than 256 KiB"):
        load_recipe(tmp_path / "mine.yaml")


def test_a_command_of_nemo_adds_no_setting_of_its_own(tmp_path: Path) -> None:
    import kinvec

    (tmp_path / "command").write_text("model.optim.lr=1 'a\nout: elsewhere\nb=1'")
    kinvec.init(tmp_path / "r.yaml", from_nemo=tmp_path / "command")
    assert "\nout: elsewhere" not in (tmp_path / "r.yaml").read_text()


def test_vectors_of_other_shapes_do_not_meet(good: Path, tmp_path: Path) -> None:
    import kinvec

    folder = of_good(good, "vectors", tmp_path)
    np.save(folder / "query.npy", np.zeros((1, 3), np.float32))
    with pytest.raises(KinvecError, match="cannot be scored"):
        kinvec.evaluate(embeddings=folder)
