"""Passwords and keys of the user are nowhere in what kinvec writes or prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kinvec.contracts import presentable, without_secrets

pytestmark = pytest.mark.usefixtures("one_thread")

Main = Callable[..., tuple[int, str]]
PLANTED = "pl4nted-s3cret-{}"
NAMES = ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "KINVEC_API_KEY", "AWS_SECRET_ACCESS_KEY", "KINVEC_PASSWORD")
ADDRESS = "https://user:pl4nted-s3cret@host.example/v1"


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, PLANTED.format(name))


def leaks(folder: Path) -> list[str]:
    """The files with a planted secret in them, whatever their form."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            text = str(pq.read_table(path).to_pydict()).encode() if path.suffix == ".parquet" else path.read_bytes()
            found += [str(path)] if b"pl4nted" in text or b"pl4nted" in str(path).encode() else []
    return found


@pytest.mark.slow
def test_no_verb_keeps_or_prints_a_secret(tiny_folder: Path, tiny_pairs: Path, tmp_path: Path, main: Main) -> None:
    run, data = str(tmp_path / "run"), str(tiny_pairs)
    model = str(tiny_folder)
    commands = [
        ["train", f"model={model}", f"data.train={data}", f"out={run}", "threads=1", "trainer.max_steps=2"],
        ["evaluate", "--model", model, "--data", data, "--split", "train", "--out", str(tmp_path / "result")],
        ["embed", "--model", model, "--out", str(tmp_path / "vectors"), "--queries", data, "--docs", data],
        ["mine", "--data", data, "--out", str(tmp_path / "mined"), "--model", model],
        ["check", data], ["info", model], ["report", run], ["compare", run], ["init", str(tmp_path / "r.yaml")],
    ]  # fmt: skip
    for command in commands:
        code, said = main(*command)
        assert code == 0, (command, said)
        assert "pl4nted" not in said
    assert leaks(tmp_path) == []


@pytest.mark.parametrize(
    "command",
    [
        ["train", f"model={ADDRESS}", "data.train={data}", "out={out}"],
        ["train", "model={model}", f"data.train={ADDRESS}", "out={out}"],
        ["train", "model={model}", "data.train={data}", "out={out}", f"push_to_hub={ADDRESS}"],
        ["train", "model={model}", "data.train={data}", f"out={ADDRESS}"],
        ["train", "model={model}", "data.train={data}", "out={out}", "push_to_hub=${{oc.env:HF_TOKEN}}"],
        ["train", "model={model}", "data.train=https://host.example/rows.jsonl?token=pl4nted-s3cret", "out={out}"],
        ["train", "{out}/pl4nted-s3cret-HF_TOKEN.yaml"],
        ["evaluate", "--model", ADDRESS, "--data", "{data}", "--api-model", "m"],
        ["evaluate", "--model", ADDRESS, "--data", "{data}"],
        ["evaluate", "--model", "{model}", "--data", ADDRESS],
        ["embed", "--model", ADDRESS, "--out", "{out}", "--docs", "{data}"],
        ["mine", "--data", ADDRESS, "--out", "{out}", "--model", "{model}"],
        ["mine", "--data", "{data}", "--out", "{out}", "--model", ADDRESS],
        ["check", ADDRESS],
        ["info", ADDRESS],
        ["convert", ADDRESS, "{out}/x.nemo"],
        ["compare", ADDRESS],
        ["report", ADDRESS],
        ["search", ADDRESS, "question"],
    ],
)
def test_an_error_does_not_repeat_a_secret(
    command: list[str], tiny_folder: Path, tiny_pairs: Path, tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"model": tiny_folder, "data": tiny_pairs, "out": tmp_path / "out"}
    code, said = main(*(word.format(**places) for word in command))
    assert code in (1, 2) and "pl4nted" not in said, said
    assert leaks(tmp_path) == []


def test_what_a_secret_is() -> None:
    hidden = "https://***@host/x?token=***&b=1 hf_*** sk-*** ***"
    said = f"https://u:p@host/x?token=abc&b=1 hf_{'a' * 30} sk-{'b' * 40} {PLANTED.format('HF_TOKEN')}"
    assert without_secrets(said) == hidden
    for plain in ("user/model", "a@b.c", "https://host/x?page=1", "hf_hub", "C:/x", "key=value"):
        assert without_secrets(plain) == plain


def test_a_terminal_is_sent_no_commands() -> None:
    assert presentable("a\x1b[2J\x07\ud800\u2028b\nc") == "a\\x1b[2J\\x07\\ud800\\u2028b\nc"
