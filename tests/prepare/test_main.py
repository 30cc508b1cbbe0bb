"""The command as a whole: from files of every kind to exactly tiktoken's tokens."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.prepare.support import (
    COMPRESSORS,
    ROOT,
    contents,
    expected,
    held,
    law,
    make,
    run,
    texts,
    write_jsonl,
)

ARROW_TYPES = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
}


@pytest.mark.parametrize("kind", ARROW_TYPES)
def test_parquet(kind: str, tmp_path: Path) -> None:
    documents = texts(150)
    values = [text.encode() for text in documents] if "binary" in kind else documents
    nested = [{"a": 1, "b": "x"}] * len(documents)
    columns = {"nested": nested, "text": pa.array(values, ARROW_TYPES[kind]), "n": range(150)}
    pq.write_table(pa.table(columns), tmp_path / "corpus.parquet", row_group_size=40)
    out = make(tmp_path / "out", tmp_path / "corpus.parquet")
    assert held(out) == expected(("corpus.parquet", i, text) for i, text in enumerate(documents))


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_jsonl(suffix: str, tmp_path: Path) -> None:
    documents = texts(150)
    offsets = write_jsonl(tmp_path / "plain", documents)
    content = (tmp_path / "plain").read_bytes()
    (tmp_path / f"corpus.jsonl{suffix}").write_bytes(COMPRESSORS[suffix](content))
    out = make(tmp_path / "out", tmp_path / f"corpus.jsonl{suffix}")
    wanted = ((f"corpus.jsonl{suffix}", *pair) for pair in zip(offsets, documents, strict=True))
    assert held(out) == expected(wanted)


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("kind", [".txt", ".md"])
def test_a_folder_of_texts_is_a_document_each(kind: str, suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    wanted = []
    for number, text in enumerate(texts(60)):
        path = folder / f"{number % 3}" / f"{number:02d}{kind}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(COMPRESSORS[suffix](text.encode()))
        wanted.append((f"corpus/{path.parent.name}/{path.name}", 0, text))
    out = make(tmp_path / "out", folder)
    assert held(out) == expected(sorted(wanted))


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_one_text_file_is_cut_by_position_at_a_line_end(suffix: str, tmp_path: Path) -> None:
    content = "".join(text.replace("\n", " ") + "\r\n" for text in texts(200)).encode()
    (tmp_path / f"book.txt{suffix}").write_bytes(COMPRESSORS[suffix](content))
    out = make(tmp_path / "out", tmp_path / f"book.txt{suffix}", "--val-fraction", 0.25)
    sides = held(out)
    (train,), (val,) = sides["train"], sides["val"]
    cut = train.text_bytes
    assert content[cut - 2 : cut] == b"\r\n"
    # The line end is the first one after three quarters of the text.
    assert b"\n" not in content[len(content) * 3 // 4 : cut - 1]
    assert cut > len(content) * 3 // 4
    assert train.tokens == law(content[:cut].decode())
    assert (val.row, val.tokens) == (cut, law(content[cut:].decode()))
    rule = json.loads((out / "manifest.json").read_bytes())["split_rule"]
    assert rule == {"rule": "position", "val_fraction": 0.25}


def test_several_sources_keep_the_order_given_and_each_file_counts_once(tmp_path: Path) -> None:
    documents = texts(200)
    later, sooner = tmp_path / "z.jsonl", tmp_path / "a" / "a.jsonl"
    offsets = write_jsonl(later, documents[:100]) + write_jsonl(sooner, documents[100:])
    names = ["z.jsonl"] * 100 + ["a.jsonl"] * 100
    out = make(tmp_path / "out", later, sooner, tmp_path / "a", tmp_path / "*.jsonl")
    assert held(out) == expected(zip(names, offsets, documents, strict=True))


def test_the_standard_library(tmp_path: Path) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    sources = {
        f"stdlib/{path.relative_to(root).as_posix()}": path.read_bytes().decode()
        for path in root.rglob("*.py")
        if not left_out & set(path.relative_to(root).parts)
    }
    out = make(tmp_path / "out", "stdlib")
    assert held(out) == expected(
        (name, 0, sources[name]) for name in sorted(sources) if sources[name]
    )


def test_a_finished_run_again_says_so_and_changes_nothing(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", texts(100))
    out = make(tmp_path / "out", tmp_path / "corpus.jsonl")
    before = {path: path.stat().st_mtime_ns for path in out.glob("[!.]*")} | contents(out)
    outcome = run(tmp_path / "corpus.jsonl", "--out", out)
    assert outcome.code == 0
    assert "complete" in outcome.out
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("[!.]*")} | contents(out)


def test_the_corpus_may_lie_anywhere(tmp_path: Path) -> None:
    found = []
    for parent, workers in (("here", 1), ("there/deeper", 2)):
        corpus = tmp_path / parent / "corpus"
        write_jsonl(corpus / "a.jsonl", texts(100))
        (corpus / "b.md").write_text("one document")
        found.append(contents(make(tmp_path / parent / "out", corpus, "--workers", workers)))
    assert found[0] == found[1]
    assert found[0].keys() > {"manifest.json", "quarantine.jsonl", "train_00000.npy"}
    for content in found[0].values():
        assert str(tmp_path).encode() not in content


def test_a_manifest_holds_nothing_of_the_run(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", texts(100))
    manifest = json.loads(
        (make(tmp_path / "out", tmp_path / "corpus.jsonl") / "manifest.json").read_bytes()
    )
    assert manifest.keys() == {
        "format", "version", "dtype", "fingerprint", "generation", "tokenizer", "split_rule",
        "sources", "counts", "splits", "checksum",
    }  # fmt: skip
    assert manifest["sources"] == [
        {
            "name": "corpus.jsonl",
            "bytes": (tmp_path / "corpus.jsonl").stat().st_size,
            "generation": 0,
        }
    ]


def test_the_summary_accounts_for_every_document(tmp_path: Path) -> None:
    documents = texts(100)
    write_jsonl(tmp_path / "corpus.jsonl", [*documents, "", ""])
    with open(tmp_path / "corpus.jsonl", "a") as file:
        file.write('{"text": null}\n\n   \n{"text": 5}\n')
    outcome = run(tmp_path / "corpus.jsonl", "--out", tmp_path / "out")
    assert "104 read = 100 written + 2 empty + 2 quarantined" in outcome.out
    counts = json.loads((tmp_path / "out/manifest.json").read_bytes())["counts"]
    assert counts.items() >= {"read": 104, "written": 100, "empty": 2, "quarantined": 2}.items()
    assert "104 read" in (tmp_path / "out/prepare.log").read_text()


IMPOSSIBLE = {
    "no source": ("", "expected a SOURCE, found none"),
    "missing source": ("nothing.jsonl", "expected input in nothing.jsonl, found no such file"),
    "empty glob": ("corpus/*.md", "expected input in corpus/*.md, found no file"),
    "empty folder": ("empty", "expected input in empty, found no file"),
    "no text": ("corpus/x.pdf", "x.pdf, a .pdf file: convert it first (pdftotext "),
    "unsupported remote": ("ftp://host/x.txt", "ftp"),
    "no such column": (
        "corpus --text-column body",
        "column body in corpus/a.jsonl, found id, text",
    ),
    "workers": ("corpus --workers 0", "expected --workers from 1 to 1024, found 0"),
    "max bad": ("corpus --max-bad -1", "expected --max-bad of at least 0, found -1"),
    "fraction 0": ("corpus --val-fraction 0", "expected a --val-fraction between 0 and 1, found 0"),
    "fraction 1": ("corpus --val-fraction 1", "expected a --val-fraction between 0 and 1, found 1"),
    "fraction nan": ("corpus --val-fraction nan", "expected a --val-fraction between 0 and 1"),
    "position": ("corpus --split position", "expected one plain text file for --split position"),
    "two rules": ("corpus --split hash --val-source stdlib", "expected --split or --val-source"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_is_refused_in_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("corpus/a.jsonl"), texts(20))
    Path("corpus/x.pdf").write_text("x")
    Path("empty").mkdir()
    arguments, message = IMPOSSIBLE[case]
    outcome = run(*arguments.split(), "--out", "out")
    assert message in outcome.error
    assert outcome.err.count("\n") == 1
    assert not list(Path("out").glob("[!.]*"))


@pytest.mark.parametrize("flag", ["--workers=many", "--split=random", "--text-colum=x"])
def test_flags_that_do_not_parse_are_refused(flag: str, tmp_path: Path) -> None:
    outcome = run("stdlib", flag, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert flag.partition("=")[0] in outcome.err
    assert "Traceback" not in outcome.err


def test_it_is_a_command(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", texts(100))
    sides = []
    for arguments in (["corpus.jsonl", "--out", "out"], ["gone.jsonl", "--out", "out2"]):
        command = [
            sys.executable,
            "-m",
            "prepare",
            *(f"{tmp_path}/{a}" if a[0] != "-" else a for a in arguments),
        ]
        sides.append(subprocess.run(command, cwd=ROOT, capture_output=True, text=True))
    assert (sides[0].returncode, sides[1].returncode) == (0, 2)
    assert "100 written" in sides[0].stdout
    assert sides[1].stderr.startswith("error: expected input in ")
    assert sides[1].stderr.count("\n") == 1
    held(tmp_path / "out")
