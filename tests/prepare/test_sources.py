"""SOURCE arguments → the files they name."""

import os
import sysconfig
from pathlib import Path

import pytest

from prepare.sources import InputFile, find_files

TREE = [
    "a.txt",
    "b.jsonl",
    "c.parquet",
    "sub/a.md",
    "sub/deep/z.TXT",
    "sub/deep/y.jsonl.gz",
    "q/w.txt.zst",
]
OTHERS = [".hidden.txt", ".git/x.txt", "sub/.cache/x.txt", "notes.pdf", "data.csv.gz", "sub/README"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    for name in TREE + OTHERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names(*sources: object) -> list[str]:
    return [file.name for file in find_files(map(str, sources))]


def test_a_folder_is_searched_through(corpus: Path) -> None:
    assert names(corpus) == sorted(f"corpus/{name}" for name in TREE)


@pytest.mark.parametrize("spelling", ["corpus", "corpus/", "./corpus", "sub/../corpus"])
def test_a_relative_folder_gives_the_same_names(
    spelling: str, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpus.parent)
    (corpus.parent / "sub").mkdir()
    assert names(spelling) == names(corpus)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.txt", ["a.txt"]),
        ("?.jsonl", ["b.jsonl"]),
        ("[ab].*", ["a.txt", "b.jsonl"]),
        ("*/*.md", ["sub/a.md"]),
        ("**/*.md", ["sub/a.md"]),
        ("**/*.txt", ["a.txt"]),
        ("**/*.TXT", ["sub/deep/z.TXT"]),
        ("sub/**/*.*", ["sub/a.md", "sub/deep/y.jsonl.gz", "sub/deep/z.TXT"]),
        ("sub/**", None),
        ("**/deep/*", ["sub/deep/y.jsonl.gz", "sub/deep/z.TXT"]),
        ("**/deep/**/*.gz", ["sub/deep/y.jsonl.gz"]),
        ("*/deep/y*", ["sub/deep/y.jsonl.gz"]),
        ("q/**", ["q/w.txt.zst"]),
        ("*.csv", None),
    ],
)
def test_globs(pattern: str, found: list[str] | None, corpus: Path) -> None:
    if found is None:  # it names a file of no supported type, or nothing
        with pytest.raises((ValueError, FileNotFoundError), match="expected"):
            names(corpus / pattern)
    else:
        below = pattern[: min(pattern.index(mark) for mark in "*?[" if mark in pattern)]
        base = (corpus / below.rpartition("/")[0]).resolve()
        assert names(corpus / pattern) == [
            f"{base.name}/{(corpus / name).relative_to(base)}" for name in found
        ]


def test_a_file_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1]*.txt").write_text("x")
    (tmp_path / "a1.txt").write_text("x")
    assert names(tmp_path / "a[1]*.txt") == ["a[1]*.txt"]


def test_kinds_and_compressions(corpus: Path) -> None:
    found = {file.name: (file.kind, file.compression) for file in find_files([str(corpus)])}
    assert found == {
        "corpus/a.txt": ("text", None),
        "corpus/b.jsonl": ("jsonl", None),
        "corpus/c.parquet": ("parquet", None),
        "corpus/sub/a.md": ("text", None),
        "corpus/sub/deep/z.TXT": ("text", None),
        "corpus/sub/deep/y.jsonl.gz": ("jsonl", "gzip"),
        "corpus/q/w.txt.zst": ("text", "zstd"),
    }


def test_status_tells_of_change(corpus: Path) -> None:
    (file,) = find_files([str(corpus / "a.txt")])
    path = corpus / "a.txt"
    assert file.status() == (file.size, file.mtime) == (5, path.stat().st_mtime_ns)
    os.utime(path, ns=(0, file.mtime + 1))
    assert file.status() == (5, file.mtime + 1)
    path.unlink()
    assert file.status() is None


def test_a_source_keeps_the_order_given_and_a_file_its_first_place(corpus: Path) -> None:
    found = names(corpus / "sub", corpus / "b.jsonl", corpus, corpus / "a.txt")
    assert found[:4] == ["sub/a.md", "sub/deep/y.jsonl.gz", "sub/deep/z.TXT", "b.jsonl"]
    assert found[4:] == ["corpus/a.txt", "corpus/c.parquet", "corpus/q/w.txt.zst"]


def test_a_link_does_not_make_a_file_two(corpus: Path) -> None:
    before = names(corpus)
    (corpus / "zz.txt").symlink_to(corpus / "a.txt")
    (corpus / "sub" / "zz").symlink_to(corpus)  # a loop
    (corpus / "zzz.txt").symlink_to(corpus / "nowhere")
    assert names(corpus) == before


def test_the_standard_library() -> None:
    files = find_files(["stdlib"])
    assert "stdlib/os.py" in [file.name for file in files]
    assert len(files) > 500
    for file in files:
        assert file.kind == "text"
        assert not {"test", "tests", "idle_test", "site-packages"} & set(Path(file.name).parts)
        assert file.status() == (file.size, file.mtime)
    assert all(
        file.path.startswith(Path(sysconfig.get_path("stdlib")).as_posix()) for file in files
    )


def test_validation_sources_are_marked(corpus: Path) -> None:
    for source in (str(corpus), str(corpus / "*.txt"), str(corpus / "a.txt"), "stdlib"):
        assert all(file.val for file in find_files([source], val=True))
        assert not any(file.val for file in find_files([source]))


@pytest.mark.parametrize("source", ["gone.txt", "gone/", "gone/*.txt", "notes/*.txt"])
def test_a_source_that_names_nothing(source: str, corpus: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected input in .*found no ") as error:
        names(corpus / source)
    assert "\n" not in str(error.value)


def test_an_unsupported_type_is_refused_when_named_and_left_out_when_met(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"notes\.pdf: rename or convert it"):
        names(corpus / "notes.pdf")
    (corpus / "table.parquet.gz").write_text("compressed once more")
    with pytest.raises(ValueError, match=r"table\.parquet\.gz: rename or convert it"):
        names(corpus / "table.parquet.gz")
    assert not any("notes" in name or "table" in name for name in names(corpus))


def test_input_files_are_values(corpus: Path) -> None:
    first, second = (find_files([str(corpus / "a.txt")])[0] for _ in range(2))
    assert first == second
    assert isinstance(first, InputFile)


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its client raises."""

    class ConnectError(Exception):
        pass

    class Unreachable:
        def get_file_info(self, path: str) -> None:
            raise ConnectError("Name or service not known")

    monkeypatch.setattr("prepare.sources.filesystem", lambda _: (Unreachable(), "datasets/a"))
    with pytest.raises(OSError, match=r"hf://datasets/a, found ConnectError \(Name or .* network"):
        find_files(["hf://datasets/a"])
    with pytest.raises(ConnectError):
        find_files(["a.txt"])


def test_a_link_never_names_what_has_a_real_path(corpus: Path) -> None:
    """Also if the link comes first by its name; loops end, and what is elsewhere is found once."""
    before = names(corpus)
    elsewhere = corpus.parent / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep/new.txt").write_text("new")
    (corpus / "a_loop").symlink_to(corpus)
    (corpus / "q/a").symlink_to(corpus / "q/w.txt.zst")
    (corpus / "a.md").symlink_to(corpus / "sub/a.md")
    for name in ("one", "two"):
        (corpus / "sub" / name).symlink_to(".")
        (elsewhere / name).symlink_to(elsewhere)
    (corpus / "sub/link").symlink_to(elsewhere)
    (corpus / "zz").symlink_to(elsewhere)
    assert names(corpus) == sorted([*before, "corpus/zz/deep/new.txt"])
    assert names(corpus / "sub/one") == [
        name.replace("corpus/sub", "one")
        for name in sorted([*before, "corpus/sub/link/deep/new.txt"])
        if name.startswith("corpus/sub")
    ]


def test_a_link_names_what_has_no_name_of_a_supported_type(tmp_path: Path) -> None:
    """As the snapshots of a Hugging Face cache do, whose blobs are named by a hash."""
    (tmp_path / "hub/blobs").mkdir(parents=True)
    (tmp_path / "hub/snapshots").mkdir()
    (tmp_path / "hub/blobs/0123").write_text("text")
    (tmp_path / "hub/snapshots/a.txt").symlink_to("../blobs/0123")
    assert names(tmp_path / "hub") == ["hub/snapshots/a.txt"]


def test_a_pipe_is_refused(corpus: Path) -> None:
    os.mkfifo(corpus / "sub/pipe.txt")
    for source in (corpus / "sub/pipe.txt", corpus, corpus / "sub/*.txt"):
        with pytest.raises(ValueError, match=r"pipe\.txt, a pipe, socket or device: write"):
            names(source)


def test_a_name_that_is_not_utf8_is_named(corpus: Path) -> None:
    Path(os.fsdecode(os.fsencode(corpus) + b"/notes\xe9.pdf")).touch()
    assert len(names(corpus)) == len(TREE)
    Path(os.fsdecode(os.fsencode(corpus) + b"/caf\xe9.txt")).touch()
    with pytest.raises(ValueError, match=r"UTF-8, found b'caf\\xe9.txt' in .*corpus: rename it"):
        names(corpus)


@pytest.mark.parametrize("source", ["", " "])
def test_an_empty_source_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="expected a SOURCE, found an empty one"):
        names(source)


def test_a_file_uri_is_absolute(corpus: Path) -> None:
    (corpus / "with space.txt").touch()
    assert names(f"file://{corpus}/with%20space.txt") == ["with space.txt"]
    assert names(f"file://{corpus}") == names(corpus)
    assert not find_files([f"file://{corpus}"])[0].remote


def test_a_missing_file_is_called_so(corpus: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nosuch\.txt, found no such file or folder"):
        names(corpus / "nosuch.txt")
