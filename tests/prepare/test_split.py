"""No leak (promise 3): a document's side is a function of its content and of nothing else."""

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prepare.encode import content_hashes
from prepare.file_types import JSONL, TEXT
from prepare.input_file import InputFile
from prepare.options import Options
from prepare.split import HASH, POSITION, VAL_SOURCE, SplitRule, choose_rule, follow_rule
from tests.prepare.support import (
    COMPRESSORS,
    contents,
    held,
    is_val,
    law,
    make,
    run,
    shrink,
    text_of,
    texts,
    write_jsonl,
)

documents = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), max_size=30)
fractions = st.floats(0.001, 0.999)


def sides(values: list[str], fraction: float, kind: pa.DataType | None = None) -> list[bool]:
    array = pa.array(values, kind or pa.large_string())
    return SplitRule(HASH, fraction).is_val(content_hashes(array)).tolist()


# Appends and other machines rely on this rule for ever.
def test_the_rule_is_pinned() -> None:
    pinned = [f"document {number}" for number in range(40)]
    assert np.flatnonzero(sides(pinned, 0.1)).tolist() == [8, 24, 28, 38]
    assert content_hashes(pa.array(["", "a"], pa.string())).tolist() == [
        [0x99AA06D3014798D8, 0x6001C324468D497F],
        [0xA96FAF705AF16834, 0xE6C632B61E964E1F],
    ]


def test_validation_text_is_what_hashes_below_the_fraction() -> None:
    hashes = np.array([[2**62 - 1, 2**64 - 1], [2**62, 0], [0, 0], [2**64 - 1, 0]], np.uint64)
    assert SplitRule(HASH, 0.25).is_val(hashes).tolist() == [True, False, True, False]


@given(documents, fractions)
def test_a_side_depends_on_nothing_but_the_content(values: list[str], fraction: float) -> None:
    found = sides(values, fraction)
    assert found == [is_val(value.encode(), fraction) for value in values]
    assert found == [sides([value], fraction)[0] for value in values]
    assert found[::-1] == sides(values[::-1], fraction, pa.string())
    around = pa.array(["x", *values, "y"]).slice(1, len(values))
    assert content_hashes(around).tolist() == content_hashes(pa.array(values, pa.string())).tolist()


@given(documents, fractions, fractions)
def test_a_larger_fraction_only_adds_validation_text(
    values: list[str], one: float, other: float
) -> None:
    small, large = sides(values, min(one, other)), sides(values, max(one, other))
    assert all(in_large for in_small, in_large in zip(small, large, strict=True) if in_small)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_the_fraction_is_realised(fraction: float) -> None:
    count = 20_000
    realised = sum(sides([f"document {number}" for number in range(count)], fraction)) / count
    assert abs(realised - fraction) < 4 * math.sqrt(fraction * (1 - fraction) / count)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, math.nan, math.inf])
def test_a_fraction_that_cannot_be(fraction: float) -> None:
    with pytest.raises(ValueError) as caught:
        SplitRule(HASH, fraction)
    assert str(caught.value) == (
        f"expected a --val-fraction between 0 and 1, found {fraction}: 0.1 keeps a tenth of the "
        "documents for validation"
    )


TEXT_FILE = InputFile("a.txt", "in/a.txt", 1, 0, TEXT)
JSONL_FILE = InputFile("b.jsonl", "in/b.jsonl", 1, 0, JSONL)


def options(source: str = "in/a.txt", **flags: object) -> Options:
    return Options((source,), "out", **flags)


@pytest.mark.parametrize(
    ("rule", "flags", "files"),
    [
        (POSITION, {}, [TEXT_FILE]),
        (POSITION, {"source": "in/a.txt/"}, [TEXT_FILE]),
        (POSITION, {"source": "in/a.TEX"}, [replace(TEXT_FILE, name="a.TEX")]),
        (HASH, {"source": "in"}, [TEXT_FILE]),
        (POSITION, {"source": "in", "split": "position"}, [TEXT_FILE]),
        (HASH, {"split": "hash"}, [TEXT_FILE]),
        (HASH, {"source": "in/b.jsonl"}, [JSONL_FILE]),
        (HASH, {}, [TEXT_FILE, TEXT_FILE]),
        (VAL_SOURCE, {"val_source": ("v.txt",)}, [TEXT_FILE]),
    ],
)
def test_the_rule_of_a_new_dataset(rule: str, flags: dict, files: list[InputFile]) -> None:
    assert choose_rule(options(**flags, val_fraction=0.3), files) == SplitRule(rule, 0.3)


@pytest.mark.parametrize(
    ("files", "found"),
    [([JSONL_FILE], "1 files (b.jsonl"), ([TEXT_FILE, JSONL_FILE], "2 files (a.txt")],
)
def test_a_split_by_position_needs_one_text(files: list[InputFile], found: str) -> None:
    with pytest.raises(ValueError) as caught:
        choose_rule(options(split="position"), files)
    assert str(caught.value) == (
        f"expected one plain text file for --split position, found {found}, ...): use --split "
        "hash, or --val-source for validation text"
    )


@pytest.mark.parametrize(
    ("rule", "flags", "files"),
    [
        (HASH, {}, [JSONL_FILE]),
        (HASH, {"split": "hash", "val_fraction": 0.3}, [TEXT_FILE]),
        (POSITION, {}, [TEXT_FILE, TEXT_FILE]),
        (VAL_SOURCE, {}, [JSONL_FILE]),
        (VAL_SOURCE, {"val_source": ("v.txt",)}, [TEXT_FILE]),
    ],
)
def test_an_append_follows_the_rule(rule: str, flags: dict, files: list[InputFile]) -> None:
    stored = {"rule": rule, "val_fraction": 0.3}
    assert follow_rule(stored, options(**flags), files) == SplitRule(**stored)


@pytest.mark.parametrize(
    ("rule", "flags", "file", "message"),
    [
        (
            HASH, {"split": "hash"}, TEXT_FILE,
            "expected the split rule of the dataset, hash and 0.3, found hash and 0.1: leave out "
            "--split and --val-fraction",
        ),
        (
            POSITION, {}, JSONL_FILE,
            "expected plain text files to append to a dataset that is split by position, found "
            "another type: prepare everything together into another --out",
        ),
        (
            HASH, {"val_source": ("v.txt",)}, TEXT_FILE,
            "expected no --val-source for a dataset split by hash, found one: append it as a "
            "source, or prepare everything together into another --out",
        ),
    ],
)  # fmt: skip
def test_an_append_by_another_rule_is_refused(
    rule: str, flags: dict, file: InputFile, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        follow_rule({"rule": rule, "val_fraction": 0.3}, options(**flags), [TEXT_FILE, file])
    assert str(caught.value) == message


@pytest.mark.parametrize("stored", [{"rule": "content"}, {}])
def test_the_rule_of_another_program_is_not_followed(stored: dict[str, str]) -> None:
    message = "split by prepare for --append, found .*: prepare the new sources into another --out$"
    with pytest.raises(ValueError, match=message):
        follow_rule(stored, options(), [])


def val_texts(out: Path) -> set[tuple[int, ...]]:
    return {document.tokens for document in held(out)["val"]}


def test_the_format_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = texts(80)
    write_jsonl(tmp_path / "a.jsonl", values)
    pq.write_table(pa.table({"text": values[::-1]}), tmp_path / "b.parquet")
    for number, value in enumerate(values):
        for suffix in ("", ".gz"):
            path = tmp_path / f"c{suffix}" / f"{number}.txt{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(COMPRESSORS[suffix](value.encode()))
    sources = ("a.jsonl", "b.parquet", "c", "c.gz")
    found = [val_texts(make(tmp_path / f"out-{name}", tmp_path / name)) for name in sources]
    shrink(monkeypatch, PIECE_BYTES=50, READ_BYTES=20, BATCH_BYTES=100, MIN_UNIT_BYTES=60)
    found += [val_texts(make(tmp_path / f"small-{name}", tmp_path / name)) for name in sources]
    assert 0 < len(found[0]) < 80
    assert all(other == found[0] for other in found)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_adding_files_moves_nothing(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("adding")
    word = st.text("ab \n", min_size=1, max_size=4)
    old, new = data.draw(st.lists(word)), data.draw(st.lists(word))
    old = [text_of("train"), text_of("val"), *old]
    write_jsonl(folder / "corpus/m.jsonl", old)
    before = held(make(folder / "before", folder / "corpus"))
    where = data.draw(st.sampled_from(["a", "z"]))  # before or after the file that was there
    write_jsonl(folder / f"corpus/{where}.jsonl", new)
    after = held(make(folder / "after", folder / "corpus"))
    for side, other in (("train", "val"), ("val", "train")):
        tokens = [document.tokens for document in after[side]]
        kept = [d for d in after[side] if d.source == "corpus/m.jsonl"]
        assert kept == before[side]
        # Duplicates lie on the same side, within a file and across files.
        assert not {d.tokens for d in after[other]} & set(tokens)
    assert sum(map(len, after.values())) == len(old) + len(new)


class TestValidationTextOfOnesOwn:
    def test_all_of_it_and_nothing_else(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train.jsonl", texts(100, 1))
        write_jsonl(tmp_path / "val.jsonl", texts(30, 2))
        (tmp_path / "val.md").write_text("one more")
        out = make(
            tmp_path / "out", tmp_path / "train.jsonl",
            "--val-source", tmp_path / "val.jsonl", tmp_path / "val.md",
        )  # fmt: skip
        found = held(out)
        assert [document.source for document in found["train"]] == ["train.jsonl"] * 100
        assert [document.source for document in found["val"]] == ["val.jsonl"] * 30 + ["val.md"]
        manifest = json.loads((out / "manifest.json").read_bytes())
        assert manifest["split_rule"]["rule"] == "given"
        names = [source["name"] for source in manifest["sources"]]
        assert names == ["val.jsonl", "val.md", "train.jsonl"]

    def test_a_file_that_is_also_a_source_is_validation_text_alone(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "corpus/a.jsonl", texts(100, 1))
        write_jsonl(tmp_path / "corpus/b.jsonl", texts(30, 2))
        out = make(
            tmp_path / "out", tmp_path / "corpus", "--val-source", tmp_path / "corpus/b.jsonl"
        )
        found = held(out)
        assert {document.source for document in found["train"]} == {"corpus/a.jsonl"}
        assert {document.source for document in found["val"]} == {"b.jsonl"}

    def test_what_is_in_both_is_validation_text_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shrink(monkeypatch, MIN_UNIT_BYTES=500, BATCH_BYTES=300)
        own, shared, validation = texts(60, 1), texts(20, 2), texts(15, 3)
        (tmp_path / "corpus").mkdir()
        write_jsonl(tmp_path / "corpus/a.jsonl", [*own[:30], *shared[:10], *own[30:]])
        pq.write_table(pa.table({"text": shared[10:18]}), tmp_path / "corpus/b.parquet")
        (tmp_path / "corpus/c.txt").write_bytes(shared[18].encode())
        (tmp_path / "corpus/d.md.gz").write_bytes(gzip.compress(shared[19].encode()))
        write_jsonl(tmp_path / "val.jsonl", [*validation, *shared])
        arguments = (tmp_path / "corpus", "--val-source", tmp_path / "val.jsonl")
        outs = [make(tmp_path / f"{n}", *arguments, "--workers", n) for n in (1, 3)]
        found = held(outs[0])
        assert [d.tokens for d in found["train"]] == [law(text) for text in own]
        assert [d.tokens for d in found["val"]] == [law(text) for text in [*validation, *shared]]
        counts = json.loads((outs[0] / "manifest.json").read_bytes())["counts"]
        assert (counts["duplicates"], counts["read"]) == (20, 60 + 20 + 15 + 20)
        assert contents(outs[0]) == contents(outs[1])
        # In an append too, against the validation text that came before.
        write_jsonl(tmp_path / "more.jsonl", [*texts(5, 4), shared[3], validation[0]])
        held(make(outs[0], tmp_path / "more.jsonl", "--append"))
        after = json.loads((outs[0] / "manifest.json").read_bytes())["counts"]
        assert after["duplicates"] == 22
        assert after["written"] == counts["written"] + 5

    @pytest.mark.parametrize("copy", ["copy.txt", "copy.txt.gz", "copy.jsonl"])
    def test_a_large_text_too(
        self, copy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shrink(monkeypatch, PIECE_BYTES=200, READ_BYTES=90, MIN_UNIT_BYTES=300)
        book, other = "".join(texts(60, 1)), "".join(texts(60, 2))
        for name, text in (("corpus/a.txt", other), ("val/book.txt", book)):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_text(text, "utf-8", newline="")
        path = tmp_path / "corpus" / copy
        if path.suffix == ".jsonl":
            write_jsonl(path, [book])
        else:
            compress = gzip.compress if path.suffix == ".gz" else bytes
            path.write_bytes(compress(book.encode()))
        out = make(tmp_path / "out", tmp_path / "corpus", "--val-source", tmp_path / "val")
        assert len(list(out.glob("val_*.npy"))) > 2, "it lies in several shards"
        found = held(out)
        assert [d.tokens for d in found["train"]] == [law(other)]
        assert [d.tokens for d in found["val"]] == [law(book)]
        # And when the copy comes later.
        write_jsonl(tmp_path / "more.jsonl", [book, "something new"])
        after = held(make(out, tmp_path / "more.jsonl", "--append"))
        assert [d.tokens for d in after["train"]] == [law(other), law("something new")]

    def test_with_dedup_the_validation_text_is_kept(self, tmp_path: Path) -> None:
        own, shared = texts(30, 1), texts(10, 2)
        write_jsonl(tmp_path / "train.jsonl", [*own, *shared, *own])
        write_jsonl(tmp_path / "val.jsonl", [*shared, *shared])
        arguments = (tmp_path / "train.jsonl", "--val-source", tmp_path / "val.jsonl")
        found = held(make(tmp_path / "out", *arguments, "--dedup"))
        assert [d.tokens for d in found["train"]] == [law(text) for text in own]
        assert [d.tokens for d in found["val"]] == [law(text) for text in shared]

    def test_large_texts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shrink(monkeypatch, PIECE_BYTES=200, READ_BYTES=90, MIN_UNIT_BYTES=300)
        (tmp_path / "train.txt").write_text("".join(texts(60, 1)))
        (tmp_path / "val.txt").write_text("".join(texts(60, 2)))
        out = make(tmp_path / "out", tmp_path / "train.txt", "--val-source", tmp_path / "val.txt")
        found = held(out)
        assert [document.source for document in found["train"]] == ["train.txt"]
        assert [document.source for document in found["val"]] == ["val.txt"]


class TestFewDocuments:
    """A corpus without text on both sides is refused, and each remedy works."""

    def refused(self, tmp_path: Path, *arguments: object) -> None:
        error = run(*arguments, "--out", tmp_path / "out").error
        for remedy in ("--split position", "--val-fraction", "--val-source", "run again"):
            assert remedy in error
        # Nothing is left that would hold another try to this one.
        left = {path.name for path in (tmp_path / "out").iterdir()}
        assert left == {".prepare", "quarantine.jsonl"}

    @pytest.mark.parametrize("side", ["train", "val"])
    def test_all_on_one_side(self, side: str, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "corpus.jsonl", [text_of(side)] * 5)
        self.refused(tmp_path, tmp_path / "corpus.jsonl")

    def test_remedy_fraction(self, tmp_path: Path) -> None:
        write_jsonl(
            tmp_path / "corpus.jsonl",
            [text_of("train"), text_of("train", 0.5), text_of("val", 0.5)],
        )
        self.refused(tmp_path, tmp_path / "corpus.jsonl", "--val-fraction", 1e-9)
        make(tmp_path / "out", tmp_path / "corpus.jsonl", "--val-fraction", 0.5)

    def test_remedy_position(self, tmp_path: Path) -> None:
        (tmp_path / "corpus").mkdir()
        (tmp_path / "corpus/a.txt").write_text("a line\n" * 50)
        self.refused(tmp_path, tmp_path / "corpus")
        make(tmp_path / "out", tmp_path / "corpus", "--split", "position")

    def test_remedy_source(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("train")
        (tmp_path / "b.txt").write_text("val")
        self.refused(tmp_path, tmp_path / "a.txt")
        make(tmp_path / "out", tmp_path / "a.txt", "--val-source", tmp_path / "b.txt")

    def test_one_line_of_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("no line end in it")
        self.refused(tmp_path, tmp_path / "a.txt")

    @pytest.mark.parametrize("content", ["", '{"text": ""}\n', "\n\n"])
    def test_nothing_at_all(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(content)
        error = run(tmp_path / "a.jsonl", "--out", tmp_path / "out").error
        assert "expected text in the sources, found none" in error


def test_the_same_split_by_hash_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for side in ("train", "val"):
        (tmp_path / f"corpus/{side}.txt").write_text(text_of(side))
    one = contents(make(tmp_path / "one", tmp_path / "corpus"))
    assert one == contents(make(tmp_path / "two", tmp_path / "corpus", "--split", "hash"))
