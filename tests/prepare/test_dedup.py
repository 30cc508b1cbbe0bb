"""--dedup keeps the first of equal documents, in plan order, and counts the rest."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.prepare.support import (
    COMPRESSORS,
    contents,
    expected,
    held,
    make,
    run,
    shrink,
    text_of,
    texts,
    write_jsonl,
)

FILLERS = [text_of("train"), text_of("val")]


def unique(documents: list[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    firsts = {text: (source, row, text) for source, row, text in reversed(documents)}
    return sorted((d for d in firsts.values() if d[2]), key=documents.index)


def counts(out: Path) -> dict[str, int]:
    return json.loads((out / "manifest.json").read_bytes())["counts"]


@settings(max_examples=25)
@given(
    lists=st.lists(st.lists(st.text("ab", max_size=3), max_size=12), min_size=1, max_size=4),
    at_once=st.integers(1, 20),
    unit=st.integers(20, 200),
)
def test_the_first_is_kept(
    lists: list[list[str]], at_once: int, unit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("dedup")
    documents = []
    for number, values in enumerate([FILLERS, *lists]):
        name = f"{number}.jsonl"
        rows = write_jsonl(folder / f"corpus/{name}", values)
        documents += [(f"corpus/{name}", *pair) for pair in zip(rows, values, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, AT_ONCE=at_once, MIN_UNIT_BYTES=unit, BATCH_BYTES=30)
        out = make(folder / "out", folder / "corpus", "--dedup", "--text-column", "text")
    wanted = unique(documents)
    assert held(out) == expected(wanted)
    empty = sum(not text for _, _, text in documents)
    assert counts(out)["duplicates"] == len(documents) - len(wanted) - empty
    assert counts(out)["empty"] == empty


def test_in_every_kind_of_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, PIECE_BYTES=100, READ_BYTES=60, MIN_UNIT_BYTES=500, BATCH_BYTES=300)
    long = "".join(texts(30))
    values = [*FILLERS, *texts(20), long]
    write_jsonl(tmp_path / "corpus/a.jsonl", values)
    pq.write_table(pa.table({"text": values}), tmp_path / "corpus/b.parquet")
    for suffix, compress in COMPRESSORS.items():
        (tmp_path / f"corpus/c.txt{suffix}").write_bytes(compress(long.encode()))
        (tmp_path / f"corpus/d.md{suffix}").write_bytes(compress(values[5].encode()))
    out = make(tmp_path / "out", tmp_path / "corpus", "--dedup")
    found = [document for side in held(out).values() for document in side]
    assert {document.source for document in found} == {"corpus/a.jsonl"}
    assert (len(found), counts(out)["duplicates"]) == (23, 31)


def test_without_it_duplicates_stay(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", FILLERS * 3)
    assert counts(make(tmp_path / "out", tmp_path / "a.jsonl"))["written"] == 6


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, MIN_UNIT_BYTES=2000)
    write_jsonl(tmp_path / "a.jsonl", [*texts(150), *texts(200)])
    outs = [
        make(tmp_path / f"{n}", tmp_path / "a.jsonl", "--dedup", "--workers", n) for n in (1, 3)
    ]
    assert counts(outs[0])["duplicates"] == 150
    assert contents(outs[0]) == contents(outs[1])


def test_a_dataset_begun_without_it_is_another(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", FILLERS * 3)
    out = make(tmp_path / "out", tmp_path / "a.jsonl")
    assert "dedup" in run(tmp_path / "a.jsonl", "--out", out, "--dedup").error


@pytest.mark.parametrize("flags", [["--task", "1/2"], ["--finish"], ["--engine", "ray"]])
def test_on_several_machines_it_is_refused(flags: list[str], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", FILLERS)
    outcome = run(tmp_path / "a.jsonl", "--out", tmp_path / "out", "--dedup", *flags)
    assert "expected --dedup on one machine" in outcome.error


def test_halves_of_one_text_are_no_duplicates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, PIECE_BYTES=100, READ_BYTES=60)
    (tmp_path / "a.txt").write_text("a line\n" * 1000)
    sides = held(make(tmp_path / "out", tmp_path / "a.txt", "--dedup"))
    assert (sides["train"][0].text_bytes, sides["val"][0].text_bytes) == (6307, 693)


def test_too_many_bad_documents_stop_it_while_it_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, MIN_UNIT_BYTES=200, BATCH_ROWS=4, MAX_BATCH_ROWS=4)
    write_jsonl(tmp_path / "a.jsonl", texts(30))
    (tmp_path / "b.jsonl").write_text('{"text": null}\n' * 40)
    write_jsonl(tmp_path / "c.jsonl", texts(30, seed=1))
    sources = [tmp_path / f"{name}.jsonl" for name in "abc"]
    command = (*sources, "--out", tmp_path / "out", "--dedup", "--workers", 1)
    outcome = run(*command, "--text-column", "text")
    assert outcome.code == 2
    assert "expected at most 10 bad documents" in outcome.error
    assert "left out" in outcome.out
    assert "(100.0%)" not in outcome.out, "the text that was hashed counts"
    hashed = len(list((tmp_path / "out/.prepare/hashes").iterdir()))
    units = json.loads((tmp_path / "out/.prepare/plan.json").read_bytes())["units"]
    assert 0 < hashed < len(units) - 5, "it read on"
    again = run(*command, "--text-column", "text", "--max-bad", 40)
    assert again.code == 0, again.err
    assert counts(tmp_path / "out")["quarantined"] == 40
