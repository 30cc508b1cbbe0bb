"""The plan: a function of the input and the options alone, which covers all of it once."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prepare import plan
from prepare.options import Options
from prepare.plan import make_plan, read_plan
from tests.prepare.support import shrink, text_of, texts, write_jsonl


def planned(*sources: Path, **options: object) -> plan.Plan:
    return make_plan(Options(tuple(map(str, sources)), out="", **options))  # type: ignore[arg-type]


def test_a_small_corpus_is_one_unit_and_a_larger_one_as_many_as_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", texts(1000))
    size = (tmp_path / "corpus.jsonl").stat().st_size
    assert len(planned(tmp_path / "corpus.jsonl").units) == 1
    for least, most, units in ((1000, 10_000, 64), (size // 8, size, 8), (100, 200, size // 200)):
        shrink(monkeypatch, MIN_UNIT_BYTES=least, MAX_UNIT_BYTES=most)
        made = planned(tmp_path / "corpus.jsonl")
        assert abs(len(made.units) - units) <= 1
        assert sum(unit.weight for unit in made.units) == size


def test_ranges_cover_every_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, MIN_UNIT_BYTES=300, PIECE_BYTES=500, READ_BYTES=64)
    write_jsonl(tmp_path / "corpus/a.jsonl", texts(100, 1))
    (tmp_path / "corpus/b.txt").write_text("".join(texts(100, 2)))
    made = planned(tmp_path / "corpus")
    for source, file in enumerate(made.files):
        parts = [part for unit in made.units for part in unit.slices if part.file == source]
        assert len(parts) > 5
        assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])]
        assert parts[-1].end >= file.size
        if file.kind == "text":  # it is one document: the first part begins it, the rest goes on
            assert [part.continued for part in parts] == [False] + [True] * (len(parts) - 1)
            assert len({part.split for part in parts}) == 1
    assert [unit.number for unit in made.units] == list(range(len(made.units)))


def test_row_groups_are_planned_by_their_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = texts(300)
    ballast = [{"a": "x" * 500 + text, "b": number} for number, text in enumerate(documents)]
    table = pa.table({"ballast": ballast, "text": documents})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=30, use_dictionary=False)
    size = sum(len(text.encode()) for text in documents)
    made = planned(tmp_path / "a.parquet")
    assert size <= sum(unit.weight for unit in made.units) < 1.5 * size
    shrink(monkeypatch, MIN_UNIT_BYTES=size // 4, MAX_UNIT_BYTES=size // 4)
    made = planned(tmp_path / "a.parquet")
    assert 3 <= len(made.units) <= 5
    parts = [part for unit in made.units for part in unit.slices]
    assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])]
    assert parts[-1].end == 10


def test_many_small_files_share_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(100):
        (tmp_path / f"corpus/{number:02d}.txt").write_text("0123456789")
    shrink(monkeypatch, MIN_UNIT_BYTES=95)
    made = planned(tmp_path / "corpus")
    assert [len(unit.slices) for unit in made.units] == [10] * 10


def test_a_plan_is_its_record(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus/a.jsonl", texts(100))
    (tmp_path / "corpus/b.txt").write_bytes(b"\xff")
    one, two = (planned(tmp_path / "corpus") for _ in range(2))
    assert one == two
    stored = json.loads(json.dumps(one.to_dict()))
    assert read_plan(stored, "plan.json") == one
    assert planned(tmp_path / "corpus", val_fraction=0.2) != one


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("a.txt", {}, "position"),
        ("a.md", {}, "position"),
        ("a.txt", {"split": "hash"}, "hash"),
        ("a.jsonl", {}, "hash"),
        ("", {}, "hash"),  # the folder that holds one text alone
        ("", {"split": "position"}, "position"),
        ("*.txt", {}, "hash"),
    ],
)
def test_the_split_rule(name: str, options: dict, rule: str, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    file = folder / (name if "." in name and "*" not in name else "only.txt")
    file.write_text(json.dumps({"text": text_of("train")}) + "\n")
    assert planned(folder / name, **options).rule.rule == rule


def test_text_columns_are_looked_for_in_their_order(tmp_path: Path) -> None:
    for columns, wanted, found in (
        (["content", "text"], None, "text"),
        (["content", "body"], None, "content"),
        (["text", "body"], "body", "body"),
    ):
        table = pa.table({name: ["x"] for name in columns})
        pq.write_table(table, tmp_path / "a.parquet")
        write_jsonl(tmp_path / "b.jsonl", ["x"], columns[0])
        (tmp_path / "b.jsonl").write_text(json.dumps(dict.fromkeys(columns, "x")))
        for source in ("a.parquet", "b.jsonl"):
            (file,) = planned(tmp_path / source, text_column=wanted).files
            assert file.column == found


def test_a_number_column_of_that_name_is_passed_over(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1], "content": ["x"]}), tmp_path / "a.parquet")
    assert planned(tmp_path / "a.parquet").files[0].column == "content"
