"""What is kept on the disk: tables in the cache; files and folders, written whole or not at all; fingerprints."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from test_files import jsonl, values, with_line

from kinvec.contracts import KinvecError
from kinvec.files import (
    DataError,
    content_fingerprint,
    normalise,
    open_data,
    replace_folder,
    text_id,
    text_key,
    text_keys,
    write_json,
    write_text,
)
from kinvec.files import arrow as arrow_module
from kinvec.files.writing import beside_path

# --- The cache ---


def cached(suffix: str = ".arrow") -> set[Path]:
    return set((Path(os.environ["KINVEC_CACHE"]) / "data").glob(f"*{suffix}"))


def test_a_copy_is_recognised_by_content_and_named_where_it_lies(tmp_path: Path) -> None:
    first = jsonl(tmp_path / "first.jsonl", with_line(3, {"query": "copied", "pos_doc": ""}))
    table = open_data(first, skip_bad=True)
    known = cached()
    copy = tmp_path / "folder" / "second.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(first.read_bytes())
    again = open_data(copy, skip_bad=True)
    assert cached() == known and again.fingerprint == table.fingerprint
    assert again.problems[0].file == str(copy) and again.where(0) == f"{copy}:1"
    with pytest.raises(DataError, match=rf"^{copy}:3: "):
        open_data(copy)
    copy.write_text(copy.read_text().replace("answer 9", "answer nine"))
    assert open_data(copy, skip_bad=True).fingerprint != table.fingerprint
    assert open_data(first, skip_bad=True, columns={"pos_doc": "query"}).fingerprint != table.fingerprint


def test_what_was_left_half_written_is_made_again(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"query": "half", "pos_doc": "written"}])
    table = open_data(path)
    expected, cut = values(table), table.arrow.path
    cut.write_bytes(cut.read_bytes()[:100])
    assert values(open_data(path)) == expected
    cut.with_suffix(".json").unlink()
    assert values(open_data(path)) == expected
    assert not cached(".tmp")


def test_tables_that_nothing_reads_are_forgotten(tmp_path: Path) -> None:
    old, read, new = (jsonl(tmp_path / f"{name}.jsonl", [{"query": name, "pos_doc": "kept?"}]) for name in "abc")
    tables = [open_data(path).arrow.path for path in (old, read)]
    for table in tables:
        os.utime(table.with_suffix(".json"), (0, 0))
    open_data(read)
    open_data(new)
    assert [table.exists() for table in tables] == [False, True]
    assert values(open_data(old))[0]["query"] == "a"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """What a full disk looks like to a writer: no file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINVEC_CACHE", str(tmp_path / "cache"))
    path = jsonl(tmp_path / "rows.jsonl", [{"query": f"q{i}", "pos_doc": "d" * 1000} for i in range(2000)])
    with largest_file(100_000), pytest.raises(KinvecError, match=r"the disk is full.*KINVEC_CACHE"):
        open_data(path)
    assert list((tmp_path / "cache" / "data").iterdir()) == []
    assert len(open_data(path)) == 2000


def test_batches_of_many_rows_and_of_long_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_module, "BATCH_ROWS", 7)
    monkeypatch.setattr(arrow_module, "BATCH_CHARACTERS", 500)
    rows = [{"text": f"{i} " + "x" * (400 * (i % 5 == 0))} for i in range(50)]
    table = open_data(jsonl(tmp_path / "texts.jsonl", rows))
    assert values(table) == rows and [table.arrow.value("text", i) for i in range(50)] == [row["text"] for row in rows]
    passed = [text for batch in table.batches(["text"]) for text in batch.column(0).to_pylist()]
    assert passed == [row["text"] for row in rows] and max(b.num_rows for b in table.batches()) <= 7


# --- Writers and hashes ---


def test_writers_replace_in_one_step_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "value.json", {"ä": [1]})
    assert json.loads((tmp_path / "deep" / "value.json").read_text()) == {"ä": [1]}
    write_text(tmp_path / "text", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "text", "new\ud800")
    assert (tmp_path / "text").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "text"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for name in ("new", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "final")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["final", "final/new"]
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "absent", tmp_path / "final")
    assert (tmp_path / "final" / "new").read_text() == "new"


def test_a_folder_built_at_the_place_beside_it_replaces_it(tmp_path: Path) -> None:
    for content in ("first", "second"):
        built = beside_path(tmp_path / "final")
        built.mkdir()
        (built / "file").write_text(content)
        replace_folder(built, tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "second" and len(list(tmp_path.iterdir())) == 1


def test_fingerprints_are_of_content(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "file").write_bytes(b"content")
    assert content_fingerprint(tmp_path / "one") == content_fingerprint(tmp_path / "two")
    assert content_fingerprint(tmp_path / "one" / "inner" / "file") == content_fingerprint(b"content")
    (tmp_path / "two" / "inner" / "file").rename(tmp_path / "two" / "inner" / "other")
    assert content_fingerprint(tmp_path / "one") != content_fingerprint(tmp_path / "two")


def test_text_keys_see_through_case_and_white_space() -> None:
    texts = ["Straße  am\tSee", " STRASSE am See\n", "Strasse am Fluss"]
    keys = text_keys(texts)
    assert keys.dtype == np.int64 and keys.shape == (3,)
    assert keys[0] == keys[1] == text_key("strasse am see") != keys[2]
    assert normalise(texts[0]) == "strasse am see"
    assert text_id(texts[0]) != text_id(texts[1])
