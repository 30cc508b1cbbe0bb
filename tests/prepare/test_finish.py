"""What is left out is counted, listed and limited."""

import json
from pathlib import Path

import pytest

from tests.prepare.support import held, make, quarantine, run, texts, write_jsonl


def corpus(path: Path, good: int, bad: int) -> Path:
    write_jsonl(path, texts(good, words=3))
    with open(path, "a") as file:
        file.writelines(['{"text": null}\n'] * bad)
    return path


@pytest.mark.parametrize(
    ("good", "bad", "flags", "allowed"),
    [
        (100, 10, [], True),
        (100, 11, [], False),
        (15_000, 15, [], True),  # a thousandth of the documents read
        (15_000, 16, [], False),
        (100, 0, ["--max-bad", 0], True),
        (100, 1, ["--max-bad", 0], False),
        (100, 50, ["--max-bad", 50], True),
    ],
)
def test_how_many_may_be_bad(
    good: int, bad: int, flags: list, allowed: bool, tmp_path: Path
) -> None:
    source = corpus(tmp_path / "a.jsonl", good, bad)
    outcome = run(source, "--out", tmp_path / "out", *flags)
    assert outcome.code == (0 if allowed else 2), outcome.err
    assert len(quarantine(tmp_path / "out")) == bad
    if allowed:
        held(tmp_path / "out")
    else:
        first = quarantine(tmp_path / "out")[0]
        assert (
            f"found {bad}, the first in a.jsonl at {first['position']} (expected a string in"
            in outcome.error
        )
        assert "quarantine.jsonl" in outcome.error
        assert "--max-bad" in outcome.error
        assert not (tmp_path / "out/manifest.json").exists()


def test_raising_max_bad_goes_on_from_what_is_finished(tmp_path: Path) -> None:
    source = corpus(tmp_path / "a.jsonl", 100, 20)
    assert run(source, "--out", tmp_path / "out").code == 2
    shard = (tmp_path / "out/train_00000.npy").stat().st_mtime_ns
    outcome = run(source, "--out", tmp_path / "out", "--max-bad", 20)
    assert "Resuming: 1 of 1 units are finished." in outcome.out
    assert (tmp_path / "out/train_00000.npy").stat().st_mtime_ns == shard
    assert json.loads((tmp_path / "out/manifest.json").read_bytes())["counts"]["quarantined"] == 20


def test_without_bad_documents_the_list_is_empty(tmp_path: Path) -> None:
    out = make(tmp_path / "out", corpus(tmp_path / "a.jsonl", 100, 0))
    assert (out / "quarantine.jsonl").read_bytes() == b""


def test_the_summary(tmp_path: Path) -> None:
    source = corpus(tmp_path / "a.jsonl", 1000, 3)
    outcome = run(source, "--out", tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_bytes())
    for side in ("train", "val"):
        split = manifest["splits"][side]
        share = split["tokens"] / sum(s["tokens"] for s in manifest["splits"].values())
        assert (
            f"{split['tokens']:,} tokens ({share:.1%}), {split['documents']:,} documents, 1 shards"
        ) in outcome.out
    assert "1,003 read = 1,000 written + 0 empty + 3 quarantined" in outcome.out
    assert "MB/s" in outcome.out
    assert str(tmp_path / "out") in outcome.out
