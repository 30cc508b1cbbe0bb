"""A dataset that version 0.2 started is finished by this one, to the same tokens."""

import json
import os
import shutil
from pathlib import Path

import pytest

from shards.manifest import Manifest
from tests.prepare.support import ROOT, contents, held, make, run, shrink

RELEASED = ROOT / "tests" / "released" / "v2" / "unfinished"
# As when 0.2 made it; three of its units are finished, one of them in the midst of a text.
SIZES = {"MIN_UNIT_BYTES": 1200, "PIECE_BYTES": 1500, "READ_BYTES": 500}
PLAN = ".prepare/plan.json"


@pytest.fixture
def unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unfinished dataset, and beside it its corpus with the recorded times."""
    shrink(monkeypatch, **SIZES)
    for name in ("corpus", "dataset"):
        shutil.copytree(RELEASED / name, tmp_path / name)
    plan = tmp_path / "dataset" / PLAN
    plan.write_text(plan.read_text().replace("SOURCES", tmp_path.as_posix()))
    for file in json.loads(plan.read_bytes())["files"]:
        os.utime(file["path"], ns=(0, file["mtime"]))
    return tmp_path / "dataset"


def test_it_is_finished(unfinished: Path, tmp_path: Path) -> None:
    kept = contents(unfinished)
    outcome = run(tmp_path / "corpus", "--out", unfinished)
    assert outcome.code == 0, outcome.err
    assert "Resuming: 3 of" in outcome.out
    held(unfinished)
    whole = make(tmp_path / "whole", tmp_path / "corpus")
    finished = json.loads((RELEASED / "finished.json").read_bytes())  # by 0.2 itself
    for manifest in (Manifest.load(unfinished), Manifest.load(whole)):
        assert manifest.fingerprint == finished["fingerprint"]
        assert manifest.counts == finished["counts"]
    tokens = {name for name in contents(whole) if name.endswith(".npy")}
    assert {name: contents(unfinished)[name] for name in tokens} == {
        name: contents(whole)[name] for name in tokens
    }
    # What was there stayed, to the byte (an index tells which version of Arrow wrote it).
    assert {name: contents(unfinished)[name] for name in kept} == kept


def test_its_sources_are_compared(unfinished: Path, tmp_path: Path) -> None:
    os.utime(tmp_path / "corpus" / "b.txt", ns=(0, 0))
    assert (
        "the source corpus/b.txt as it was" in run(tmp_path / "corpus", "--out", unfinished).error
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.pop("units"), "units"),
        (lambda plan: plan["units"][0]["slices"][0].pop("begins"), "begins"),
        (lambda plan: plan.update(units=5), "plan.json"),
        (lambda plan: plan.update(format="mygpt-plan", version=2), "version 2"),
        (lambda plan: plan.update(of_the_future=1), "of_the_future"),
        (lambda plan: plan["files"][0].update(size="large"), "size"),
    ],
)
def test_a_damaged_plan_is_refused_in_one_line(
    change: object, message: str, unfinished: Path, tmp_path: Path
) -> None:
    plan = json.loads((unfinished / PLAN).read_bytes())
    assert callable(change)
    change(plan)
    (unfinished / PLAN).write_text(json.dumps(plan))
    assert message in run(tmp_path / "corpus", "--out", unfinished).error


def test_a_field_that_an_older_version_did_not_know_has_its_default(
    unfinished: Path, tmp_path: Path
) -> None:
    plan = json.loads((unfinished / PLAN).read_bytes())
    for name in ("dedup", "generation", "first_source"):
        del plan[name]
    for file in plan["files"]:
        del file["compression"], file["column"]
    (unfinished / PLAN).write_text(json.dumps(plan))
    result = json.loads((unfinished / ".prepare/units/00000.json").read_bytes())
    del result["warnings"]
    (unfinished / ".prepare/units/00000.json").write_text(json.dumps(result))
    assert "Resuming: 3 of" in run(tmp_path / "corpus", "--out", unfinished).out
