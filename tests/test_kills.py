"""The kill suite of `make kills`, short: every verb, killed once or twice."""

from __future__ import annotations

from pathlib import Path

import kills
import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, kills.Work]]:
    place = tmp_path_factory.mktemp("kills")
    return place, kills.prepare(place, rows=120, steps=12)


@pytest.mark.parametrize("verb", ["train", "mine", "embed", "convert", "convert back"])
def test_nothing_is_lost_or_half_valid(verb: str, works: tuple[Path, dict[str, kills.Work]]) -> None:
    place, work = works[0] / verb.replace(" ", "-"), works[1][verb]
    usual = kills.undisturbed(work, place / "whole")
    cases = []
    while kills.count(cases) < (1 if verb == "train" else 2):  # test_train_command.py kills it, too
        cases.append(kills.run_case(work, verb, len(cases), 0, place / "whole", usual))
        assert cases[-1]["lost"] == []


def test_the_suite_sees_what_is_wrong(works: tuple[Path, dict[str, kills.Work]]) -> None:
    """A file that is cut short under its own name, one too many, one too few."""
    work, place = works[1]["embed"], works[0] / "seen"
    kills.undisturbed(work, place / "whole")
    kills.undisturbed(work, place / "other")
    vectors = place / "other" / work.output
    assert kills.problems_of(work, place / "other", place / "whole", finished=True) == []
    (vectors / "doc.npy").write_bytes((vectors / "doc.npy").read_bytes()[:-40])
    for finished in (False, True):
        found = kills.problems_of(work, place / "other", place / "whole", finished)
        assert any("doc.npy: differs" in one for one in found) and any("does not open" in one for one in found)
    (vectors / ".doc.npy.77.tmp").write_bytes(b"")
    (vectors / "doc.ids").unlink()
    found = kills.problems_of(work, place / "other", place / "whole", finished=True)
    assert {"left over: v/.doc.npy.77.tmp", "missing: v/doc.ids"} <= set(found)
