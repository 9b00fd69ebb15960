"""The tutorial does what it says: its program and every command, in their order, on a smaller table."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import pytest

from kinvec import cli

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
ROWS = "[:1500]"


def test_every_command_of_the_tutorial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    programs = [block for language, block in blocks if language == "python"]
    commands = [line for _, block in blocks for line in block.splitlines() if line.startswith("kinvec ")]
    assert len(programs) == 1 and programs[0].count(ROWS) == 1 and len(commands) == 5
    assert max(map(len, commands)) <= 80  # none longer than a line of a terminal
    monkeypatch.chdir(tmp_path)
    exec(programs[0].replace(ROWS, "[:40]"), {})
    with open("faq.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 40
    said = {}
    for line in commands:
        _, *arguments = shlex.split(line)
        with pytest.raises(SystemExit) as ended:
            cli.run_verb(arguments)
        assert ended.value.code == 0, line
        said[arguments[0]] = capsys.readouterr().out
    assert "fit to train on" in said["check"] and "hard negatives from" in said["mine"]
    rows = [json.loads(line) for line in Path("mined/train.jsonl").read_text("utf-8").splitlines()]
    assert all(row["neg_doc"] and row["pos_doc"][0] not in row["neg_doc"] for row in rows)
    summary = json.loads(Path("runs/faq/summary.json").read_text("utf-8"))
    assert summary["results"][0]["metrics"]["nDCG@10"]["tuned"] > 0 and "nDCG@10" in said["train"]
    assert Path(said["report"].strip()).stat().st_size > 50_000
    assert said["search"].count("tuned") and len(said["search"].splitlines()) > 5
