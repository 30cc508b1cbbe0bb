"""csv, tsv, arrow, html and zip files, against the csv module, pyarrow and zipfile."""

import csv
import io
import json
import random
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prepare.columns import with_column
from prepare.documents import read
from prepare.input_file import InputFile, Slice
from prepare.quarantine import BadDocuments
from prepare.sources import find_files
from tests.prepare.support import (
    COMPRESSORS,
    expected,
    held,
    make,
    quarantine,
    run,
    shrink,
    texts,
    write_jsonl,
)

DELIMITERS = {"csv": ",", "tsv": "\t"}
# Characters that matter to the formats, and some that take several bytes.
TEXTS = st.text(st.sampled_from("ab,\"\t\n\r é語🙂\x00\ufeff'\\"), max_size=12)


def documents(
    source: Path, column: str | None = None
) -> tuple[list[tuple[str, int, str]], list[BadDocuments]]:
    """What is read from a source, as (file, row, text), and what is bad."""
    files = [with_column(file, column) for file in find_files([str(source)])]
    found, bad = [], []
    for batch in read(files, [Slice(number) for number in range(len(files))]):
        names = [files[number].name for number in batch.sources.tolist()]
        found += zip(names, batch.rows.tolist(), batch.texts.to_pylist(), strict=True)
        bad += batch.bad
    return found, bad


def write_table(path: Path, rows: list[list[str]], **dialect: object) -> list[int]:
    """A csv or tsv file, and where each row begins."""
    file = io.StringIO(newline="")
    dialect = {"lineterminator": "\n", "delimiter": DELIMITERS[path.suffix[1:]]} | dialect
    writer, starts = csv.writer(file, **dialect), []  # type: ignore[arg-type]
    for row in rows:
        starts.append(len(file.getvalue().encode()))
        writer.writerow(row)
    path.write_bytes(file.getvalue().encode())
    return starts


def write_arrow(path: Path, table: pa.Table, rows: int = 100, **options: object) -> None:
    """A file in the file format, or as a stream if its name says so."""
    new = pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file
    with (
        pa.OSFile(str(path), "wb") as file,
        new(file, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer,
    ):
        writer.write_table(table, max_chunksize=rows)


class TestDelimited:
    @given(
        rows=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), max_size=12),
        kind=st.sampled_from(["csv", "tsv"]),
        # The module quotes what the line ends hold, and leaves other ones as they are.
        dialect=st.sampled_from(
            [(csv.QUOTE_MINIMAL, "\r\n"), *((csv.QUOTE_ALL, end) for end in ("\n", "\r\n", "\r"))]
        ),
        mark=st.booleans(),
        block=st.integers(1, 20),
    )
    @settings(max_examples=50)
    def test_every_row_that_the_csv_module_writes(
        self,
        rows: list[tuple[str, str, str]],
        kind: str,
        dialect: tuple[int, str],
        mark: bool,
        block: int,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
        path = tmp_path_factory.mktemp("table") / f"a.{kind}"
        table = [["id", "text", "more"], *map(list, rows)]
        starts = write_table(path, table, quoting=dialect[0], lineterminator=dialect[1])
        if mark:
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
            starts = [starts[0], *(start + 3 for start in starts[1:])]
        with pytest.MonkeyPatch.context() as patch:
            shrink(patch, READ_BYTES=block)
            file = InputFile(path.name, str(path), path.stat().st_size, 0, "csv", column="text")
            found, bad = [], []
            for batch in read([file], [Slice(0)]):
                found += zip(batch.rows.tolist(), batch.texts.to_pylist(), strict=True)
                bad += batch.bad
        assert found == [(at, row[1]) for at, row in zip(starts[1:], rows, strict=True)]
        assert not bad

    @given(
        content=st.text(st.sampled_from('ab,,""\n\n\r\té'), max_size=60),
        block=st.sampled_from([1, 2, 7, 1000]),
    )
    @settings(max_examples=150)
    def test_what_is_malformed_is_as_bad_as_the_csv_module_finds_it(
        self, content: str, block: int, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """One row in three tells how it is read: the module's own reader on the whole text."""
        good, errors = [], 0
        table = f"id,text\n{content}"
        reader = csv.reader(io.StringIO(table, newline=""), strict=True)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                errors += 1
                if "unexpected end" in str(error):
                    break
                continue
            errors += len(row) not in (0, 2)
            good += row[1:] if len(row) == 2 else []
        path = tmp_path_factory.mktemp("table") / "a.csv"
        path.write_bytes(table.encode())
        with pytest.MonkeyPatch.context() as patch:
            shrink(patch, READ_BYTES=block)
            file = InputFile("a.csv", str(path), path.stat().st_size, 0, "csv", column="text")
            batches = list(read([file], [Slice(0)]))
        assert [text for batch in batches for text in batch.texts.to_pylist()] == good[1:]
        assert sum(len(batch.bad) for batch in batches) == errors

    @pytest.mark.parametrize("suffix", COMPRESSORS)
    @pytest.mark.parametrize("kind", DELIMITERS)
    def test_a_dataset_of_one(self, kind: str, suffix: str, tmp_path: Path) -> None:
        path = tmp_path / f"a.{kind}"
        rows = [[str(i), text, "x"] for i, text in enumerate(texts(60))]
        starts = write_table(path, [["id", "body", "text"], *rows])
        content = path.read_bytes()
        path.unlink()
        (tmp_path / f"a.{kind}{suffix}").write_bytes(COMPRESSORS[suffix](content))
        source = tmp_path / f"a.{kind}{suffix}"
        out = make(tmp_path / "out", source, "--text-column", "body")
        named = [(source.name, at, row[1]) for at, row in zip(starts[1:], rows, strict=True)]
        assert held(out) == expected(named)
        assert not quarantine(out)

    def test_bad_rows_are_listed(self, tmp_path: Path) -> None:
        bad = {
            b'1,"a" b\n': "',' expected after '\"'",
            b"1\n": "expected 2 fields as in the first row, found 1",
            b"1,a,b\n": "expected 2 fields as in the first row, found 3",
            b"1,caf\xe9\n": "invalid UTF-8 at byte 3",
            b'1,"never closed\n': f"unreadable from here on: {'unexpected end of data'}",
        }
        good = b"".join(b"%d,good %d\n\n" % (i, i) for i in range(20))
        content, positions = b"id,text\n", []
        for line in bad:
            content += good
            positions.append(len(content))
            content += line
        (tmp_path / "a.csv").write_bytes(content)
        out = make(tmp_path / "out", tmp_path / "a.csv", "--dedup", "--max-bad", 10)
        entries = quarantine(out)
        assert [entry["position"] for entry in entries] == positions
        for entry, reason in zip(entries, bad.values(), strict=True):
            assert reason in entry["reason"]
        counts = json.loads((out / "manifest.json").read_bytes())["counts"]
        assert counts["read"] == 20 * len(bad) + len(bad)

    def test_a_cell_that_is_too_large_is_bad_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shrink(monkeypatch, MAX_DOCUMENT_BYTES=100, READ_BYTES=16)
        large = ['a "quoted", cell\n' * 10, "x" * 1000, "\n" * 90]
        rows = [["n", "text"], ["1", "before"], *(["2", one] for one in large), ["3", "after"]]
        starts = write_table(tmp_path / "a.csv", rows)
        found, bad = documents(tmp_path / "a.csv")
        assert [text for _, _, text in found] == ["before", large[-1], "after"]
        assert [one.position for one in bad] == starts[2:4]
        for one in bad:
            assert "expected at most 100 bytes, found a row of" in one.reason
        (tmp_path / "b.csv").write_bytes(b'text\nbefore\n"' + b"\n" * 500 + b'"\nafter\n')
        found, bad = documents(tmp_path / "b.csv")
        assert [text for _, _, text in found] == ["before"]
        assert [one.position for one in bad] == [12]
        assert bad[0].reason.startswith("unreadable from here on")

    def test_the_lines_of_a_cell_are_read_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A cell of 84 MB of line ends took three minutes, one call for each of them."""
        lines = []

        def counted(source: Iterator[str], **options: Any) -> Any:
            return csv_reader((lines.append(line) or line for line in source), **options)

        csv_reader = csv.reader
        monkeypatch.setattr("prepare.formats.delimited.csv.reader", counted)
        cell = "a\n" + "\n" * 2000 + "b\n" * 200
        write_table(tmp_path / "a.csv", [["n", "text"], ["1", cell], ["2", "after"]])
        assert [text for _, _, text in documents(tmp_path / "a.csv")[0]] == [cell, "after"]
        assert len(lines) < 10

    def test_the_column_is_one_of_the_first_row(self, tmp_path: Path) -> None:
        write_table(tmp_path / "a.csv", [["id", "body"], ["1", "x"]])
        error = run(tmp_path / "a.csv", "--out", tmp_path / "out").error
        assert "text column text or content in a.csv, found id, body: name it by --text" in error
        (tmp_path / "u.csv").write_bytes("id,text\n1,é\n".encode("utf-16"))
        error = run(tmp_path / "u.csv", "--out", tmp_path / "out").error
        assert "iconv -f UTF-16 -t UTF-8" in error

    @pytest.mark.parametrize("content", [b"", b"\n\n", b"text\n", b'"text'])
    def test_a_table_without_rows(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_bytes(content)
        assert documents(tmp_path / "a.csv")[0] == []


ARROW_TYPES = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "binary": pa.binary(),
    "dictionary": pa.dictionary(pa.int16(), pa.string()),
}


class TestArrow:
    @pytest.mark.parametrize("name", ["a.arrow", "stream.arrow", "stream.arrow.gz"])
    @pytest.mark.parametrize("kind", ARROW_TYPES)
    @pytest.mark.parametrize("compression", [None, "zstd"])
    def test_every_row_that_pyarrow_writes(
        self, name: str, kind: str, compression: str | None, tmp_path: Path
    ) -> None:
        values = [None if i % 9 == 5 else text for i, text in enumerate(texts(50))]
        column = pa.array(values).cast(ARROW_TYPES[kind])
        table = pa.table({"id": range(50), "text": column, "tags": [["a", "b"]] * 50})
        path = tmp_path / name.removesuffix(".gz")
        write_arrow(path, table, rows=7, compression=compression)
        if name.endswith(".gz"):
            (tmp_path / name).write_bytes(COMPRESSORS[".gz"](path.read_bytes()))
        found, bad = documents(tmp_path / name)
        assert found == [(name, i, text) for i, text in enumerate(values) if text is not None]
        assert [one.position for one in bad] == list(range(5, 50, 9))
        assert {one.reason for one in bad} == {"expected a string, found null"}

    def test_a_repeated_text_is_not_decoded_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shrink(monkeypatch, MAX_BATCH_BYTES=1000, BATCH_BYTES=1 << 20)
        column = pa.array(["long" * 100] * 30).dictionary_encode()
        write_arrow(tmp_path / "a.arrow", pa.table({"text": column}))
        (file,) = find_files([str(tmp_path / "a.arrow")])
        sizes = [len(batch.texts) for batch in read([file], [Slice(0)])]
        assert sizes == [2] * 15

    def test_bytes_that_are_no_text_are_bad(self, tmp_path: Path) -> None:
        raw = pa.array([b"a", b"\xff", b"b"])
        column = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
        write_arrow(tmp_path / "a.arrow", pa.table({"text": column}))
        found, bad = documents(tmp_path / "a.arrow")
        assert [(row, text) for _, row, text in found] == [(0, "a"), (2, "b")]
        assert [(one.position, one.reason) for one in bad] == [
            (1, "invalid UTF-8 at byte 0: invalid start byte")
        ]

    def test_damage_never_ends_the_process(self, tmp_path: Path) -> None:
        """Bytes are changed at random; whatever is read is text of the length that it says."""
        chance = random.Random(0)
        for number in range(150):
            name = ("a.arrow", "stream.arrow")[number % 2]
            column = pa.array(["é" * (i % 7) for i in range(40)])
            column = column.dictionary_encode() if number % 3 == 0 else column
            compression = ("lz4", None)[number % 4 // 2]
            write_arrow(tmp_path / name, pa.table({"text": column}), 9, compression=compression)
            content = bytearray((tmp_path / name).read_bytes())
            for _ in range(chance.choice([1, 3, 10])):
                at = chance.randrange(len(content))
                content[at : at + 8] = chance.choice([b"\xff" * 8, chance.randbytes(1), b"\0" * 8])
            (tmp_path / name).write_bytes(content)
            try:
                found, _ = documents(tmp_path / name)
            except ValueError as error:
                assert "expected a text column" in str(error)
                continue
            assert all(isinstance(text, str) for _, _, text in found)

    def test_a_file_that_ends_too_early(self, tmp_path: Path) -> None:
        write_arrow(tmp_path / "stream.arrow", pa.table({"text": texts(60)}), rows=10)
        content = (tmp_path / "stream.arrow").read_bytes()
        (tmp_path / "stream.arrow").write_bytes(content[: len(content) // 2])
        found, bad = documents(tmp_path / "stream.arrow")
        assert [text for _, _, text in found] == texts(60)[: len(found)]
        assert len(found) in (10, 20, 30)
        assert [one.position for one in bad] == [len(found)]
        assert bad[0].reason.startswith("unreadable from here on")

    def test_a_folder_of_save_to_disk(self, tmp_path: Path) -> None:
        folder = tmp_path / "saved"
        folder.mkdir()
        name = "data-00000-of-00001.arrow"
        write_arrow(folder / "stream.arrow", pa.table({"text": texts(60)}))
        (folder / "stream.arrow").rename(folder / name)
        (folder / "cache-1.arrow").write_bytes((folder / name).read_bytes())
        for state in ("state.json", "dataset_info.json"):
            (folder / state).write_text("{}")
        outcome = run(folder, "--out", tmp_path / "out")
        assert "1 .arrow (cached by datasets)" in outcome.out, outcome.err
        rows = [(f"saved/{name}", i, text) for i, text in enumerate(texts(60))]
        assert held(tmp_path / "out") == expected(rows)


class TestNestedColumns:
    def files(self, folder: Path, values: list[dict]) -> list[Path]:
        table = pa.Table.from_pylist(values)
        paths = [folder / name for name in ("a.jsonl", "a.parquet", "a.arrow")]
        paths[0].write_text("".join(json.dumps(value) + "\n" for value in values))
        pq.write_table(table, paths[1], row_group_size=20)
        write_arrow(paths[2], table)
        return paths

    def test_by_a_path(self, tmp_path: Path) -> None:
        values = [{"id": 1, "meta": {"text": text, "at": {"n": 1}}} for text in texts(30)]
        for path in self.files(tmp_path, values):
            found, bad = documents(path, "meta.text")
            assert [text for _, _, text in found] == texts(30), path
            assert not bad

    def test_a_name_with_a_dot_comes_first(self, tmp_path: Path) -> None:
        values = [{"meta.text": "flat", "meta": {"text": "nested"}}] * 3
        for path in self.files(tmp_path, values):
            found, _ = documents(path, "meta.text")
            assert [text for _, _, text in found] == ["flat"] * 3, path

    def test_what_is_missing_on_the_way_is_bad(self, tmp_path: Path) -> None:
        values = [{"meta": {"text": "a"}}, {"meta": {"text": None}}, {"meta": None}]
        for path in self.files(tmp_path, values):
            found, bad = documents(path, "meta.text")
            assert [text for _, _, text in found] == ["a"], path
            assert ["expected a string" in one.reason for one in bad] == [True, True]

    def test_a_list_is_refused_with_what_to_do(self, tmp_path: Path) -> None:
        values = [{"messages": [{"role": "user", "content": "a"}], "meta": {"text": "b"}}] * 3
        for path in self.files(tmp_path, values):
            out = ("--out", tmp_path / "out")
            error = run(path, "--text-column", "messages.content", *out).error
            assert "messages is a list, so write one text per row first: jq -c" in error
            assert "meta.text" in run(path, *out).error

    def test_a_list_in_a_later_row(self, tmp_path: Path) -> None:
        values = [{"a": {"text": "x"}}, {"a": [{"text": "y"}]}]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
        _, bad = documents(tmp_path / "a.jsonl", "a.text")
        assert [one.reason for one in bad] == [
            "expected a string in 'a.text', found a list on the way"
        ]

    def test_objects_within_objects_without_end(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"a":' * 900 + "1" + "}" * 900 + '\n{"text": "x"}\n')
        found, _ = documents(tmp_path / "a.jsonl")
        assert [text for _, _, text in found] == ["x"]


PAGE = """<html><head><title>A title</title><style>p {color: red}</style></head><body>
<nav><a href="/">Home</a></nav><h1>Heading</h1><p>First &amp; caf&eacute;,<br>second.</p>
<ul><li>one</li></ul><script>alert(1)</script><footer>Imprint</footer></body></html>"""


class TestHtml:
    def test_its_text_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "a.html").write_text(PAGE)
        assert documents(tmp_path / "a.html") == (
            [("a.html", 0, "Heading\n\nFirst & café,\nsecond.\n\n  • one")],
            [],
        )

    @pytest.mark.parametrize(
        ("encoding", "head"),
        [
            ("utf-8", ""),
            ("utf-8-sig", ""),
            ("iso-8859-1", "<meta charset=iso-8859-1>"),
            ("windows-1251", '<meta http-equiv=Content-Type content="text/html; charset=cp1251">'),
            ("utf-16", ""),
        ],
    )
    def test_its_encoding(self, encoding: str, head: str, tmp_path: Path) -> None:
        text = "привет, мир" if encoding == "windows-1251" else "naïve café"
        page = f"<html><head>{head}</head><body><p>{text}</p></body></html>"
        (tmp_path / "a.htm").write_bytes(page.encode(encoding))
        assert [text for _, _, text in documents(tmp_path / "a.htm")[0]] == [text]

    def test_a_page_that_is_too_large_is_bad(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("prepare.formats.web.MAX_PAGE_BYTES", len(PAGE))
        (tmp_path / "a.html").write_text(PAGE)
        (tmp_path / "b.html").write_text(PAGE + " ")
        found, bad = documents(tmp_path / "*.html")
        assert [name for name, _, _ in found] == [f"{tmp_path.name}/a.html"]
        assert [one.source for one in bad] == [1]

    @given(content=st.binary(max_size=200) | st.text("<>/ab &#;\"'=!-\x00", max_size=200))
    @settings(max_examples=60)
    def test_whatever_it_holds(
        self, content: bytes | str, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        path = tmp_path_factory.mktemp("page") / "a.html"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        found, bad = documents(path)
        assert len(found) + len(bad) == 1

    def test_without_the_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.html").write_text(PAGE)
        monkeypatch.setitem(sys.modules, "resiliparse.extract.html2text", None)
        monkeypatch.delitem(sys.modules, "prepare.formats.web", raising=False)
        error = run(tmp_path / "a.html", "--out", tmp_path / "out").error
        assert "found none: pip install resiliparse" in error


class TestZip:
    @given(
        members=st.dictionaries(
            st.text("ab:é% /", min_size=1, max_size=6).filter(lambda name: not name.endswith("/")),
            st.text("ab\né\ufeff", max_size=30),
            min_size=1,
            max_size=6,
        ),
        method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
        pieces=st.sampled_from([1, 1 << 20]),
    )
    @settings(max_examples=40)
    def test_every_member_that_zipfile_writes(
        self,
        members: dict[str, str],
        method: int,
        pieces: int,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
        path = tmp_path_factory.mktemp("archive") / "a.zip"
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, text in members.items():
                archive.writestr(f"{name}.txt", text)
        with pytest.MonkeyPatch.context() as patch:
            shrink(patch, PIECE_BYTES=pieces)
            found, bad = documents(path)
        joined: dict[str, str] = {}
        for name, _, text in found:
            joined[name] = joined.get(name, "") + text
        assert joined == {f"a.zip/{name}.txt": text for name, text in members.items()}
        assert not bad

    def test_a_dataset_of_one(self, tmp_path: Path) -> None:
        rows = [["id", "text"], *([str(i), text] for i, text in enumerate(texts(40)))]
        folder = tmp_path / "folder"
        folder.mkdir()
        write_table(folder / "a.csv", rows)
        write_jsonl(folder / "b.jsonl", texts(40, 1))
        write_arrow(folder / "c.arrow", pa.table({"text": texts(40, 2)}))
        write_arrow(folder / "stream.arrow", pa.table({"text": texts(40, 3)}))
        (folder / "d.html").write_text(PAGE)
        (folder / "e.py").write_text("print(1)\n")
        with zipfile.ZipFile(tmp_path / "folder.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.iterdir()):
                archive.write(path, path.name)
            archive.writestr("inner.zip", b"PK\0")
            archive.writestr("f.parquet", b"PAR1\0")
            archive.writestr("picture.png", b"\x89PNG\0")
            archive.writestr(".hidden.txt", "hidden")
            archive.writestr("__MACOSX/._a.csv", "hidden")
        outcome = run(tmp_path / "folder.zip", "--out", tmp_path / "zipped")
        assert outcome.code == 0, outcome.err
        assert "1 .parquet, 1 .png, 1 .zip" in outcome.out
        unzipped = held(make(tmp_path / "out", folder))
        zipped = held(tmp_path / "zipped")
        for side, found in unzipped.items():
            assert [document.tokens for document in zipped[side]] == [d.tokens for d in found]
        assert {d.source for d in zipped["train"]} <= {
            f"folder.zip/{p.name}" for p in folder.iterdir()
        }
        again = run(tmp_path / "folder.zip", "--out", tmp_path / "zipped")
        assert "nothing to do" in again.out

    @pytest.mark.parametrize("damage", ["content", "directory", "end"])
    def test_a_damaged_one(self, damage: str, tmp_path: Path) -> None:
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for number in range(20):
                archive.writestr(f"{number:02d}.txt", " ".join(texts(20, number)))
        content = bytearray(path.read_bytes())
        at = {"content": 60, "directory": content.rindex(b"PK\x01\x02"), "end": -22}[damage]
        content[at : at + 4] = b"\xff" * 4
        path.write_bytes(content)
        if damage != "content":
            with pytest.raises(ValueError, match=r"expected a zip archive in .*: restore it"):
                find_files([str(path)])
            return
        found, bad = documents(path)
        assert len(found) == 19
        assert [one.source for one in bad] == [0]
        assert bad[0].reason.startswith("unreadable from here on")

    def test_what_is_not_read(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
            archive.writestr("a.txt", "text")
        with pytest.raises(ValueError, match=r"a.txt compressed by method 14: unzip it and give"):
            find_files([str(tmp_path / "a.zip")])
        content = bytearray((tmp_path / "a.zip").read_bytes())
        content[content.rindex(b"PK\x01\x02") + 8] |= 1
        (tmp_path / "a.zip").write_bytes(content)
        with pytest.raises(ValueError, match=r"expected no password on .*found a.txt: unzip it"):
            find_files([str(tmp_path / "a.zip")])
        with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
            archive.writestr("a.pdf", "text")
        with pytest.raises(ValueError, match=r"b.zip, found 1 .pdf: a.pdf is a .pdf file: convert"):
            find_files([str(tmp_path / "b.zip")])

    def test_a_member_that_is_longer_than_it_says_is_read_no_further(self, tmp_path: Path) -> None:
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.txt", b"0 " * 1_000_000)
        content = path.read_bytes().replace((2_000_000).to_bytes(4, "little"), b"\x05\0\0\0")
        path.write_bytes(content)
        assert find_files([str(path)])[0].size == 5
        found, bad = documents(path)
        assert not found
        assert "CRC" in bad[0].reason

    def test_a_change_is_noticed(self, tmp_path: Path) -> None:
        def write(text: str) -> InputFile:
            with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
                archive.writestr("a.txt", text)
            return find_files([str(tmp_path / "a.zip")])[0]

        file = write("text")
        assert file.status() == (4, file.mtime)
        write("longer")
        assert file.status() != (4, file.mtime)
        (tmp_path / "a.zip").unlink()
        assert file.status() is None


FORMATS: dict[str, Callable[[Path], object]] = {
    "a.csv": lambda path: write_table(path, [["text"], *([text] for text in texts(60))]),
    "a.arrow": lambda path: write_arrow(path, pa.table({"text": texts(60)})),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("flags", [["--dedup"], ["--val-source", "v.txt"]])
def test_the_other_options_take_them(
    name: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    FORMATS[name](tmp_path / name)
    Path("v.txt").write_text(texts(60)[1])
    out = make(tmp_path / "out", name, *flags)
    assert sum(map(len, held(out).values())) == 60
    assert "nothing to do" in run(name, *flags, "--out", out).out
    assert "tokens     about" in run(name, *flags, "--out", tmp_path / "x", "--plan").out
