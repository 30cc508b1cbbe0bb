"""SOURCE arguments → the files they name."""

import os
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from pyarrow import fs

from prepare.input_file import InputFile
from prepare.sources import find_files

TREE = [
    "a.txt",
    "b.jsonl",
    "c.parquet",
    "sub/a.md",
    "sub/deep/z.TXT",
    "sub/deep/y.jsonl.gz",
    "q/w.txt.zst",
]
# What myGPT 0.2 did not read.
MORE = ["data.csv.gz", "sub/README", "sub/model.py"]
HIDDEN = [".hidden.txt", ".git/x.txt", "sub/.cache/x.txt"]
BINARY = ["notes.pdf", "sub/picture.png", "q/blob"]
OTHERS = MORE + HIDDEN


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    for name in TREE + OTHERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name in BINARY:
        (folder / name).write_bytes(b"%PDF \0 or so")
    return folder


def names(*sources: object) -> list[str]:
    return [file.name for file in find_files(map(str, sources))]


def test_a_folder_is_searched_through(corpus: Path) -> None:
    left_out = Counter[str]()
    found = find_files([str(corpus)], left_out=left_out)
    assert [file.name for file in found] == sorted(f"corpus/{name}" for name in TREE + MORE)
    assert left_out == {".pdf": 1, ".png": 1, "without a suffix": 1}


def test_a_folder_as_it_was_read_before(corpus: Path) -> None:
    """For datasets that were started then: the same command finds the same files."""
    left_out = Counter[str]()
    found = find_files([str(corpus)], all_text=False, left_out=left_out)
    assert [file.name for file in found] == sorted(f"corpus/{name}" for name in TREE)
    assert not left_out
    for source in ("sub/model.py", "sub/*.py"):  # named or matched it was refused
        found = find_files([str(corpus / source)], all_text=False)
        assert [file.path for file in found] == [str(corpus / "sub/model.py")]


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
        ("sub/**/*.*", ["sub/a.md", "sub/deep/y.jsonl.gz", "sub/deep/z.TXT", "sub/model.py"]),
        (
            "sub/**",
            [*("sub/README", "sub/a.md", "sub/deep/y.jsonl.gz"), "sub/deep/z.TXT", "sub/model.py"],
        ),
        ("**/deep/*", ["sub/deep/y.jsonl.gz", "sub/deep/z.TXT"]),
        ("**/deep/**/*.gz", ["sub/deep/y.jsonl.gz"]),
        ("*/deep/y*", ["sub/deep/y.jsonl.gz"]),
        ("q/**", ["q/w.txt.zst"]),
        ("*.csv", None),
        ("*.pdf", None),
        ("*/*.png", None),
    ],
)
def test_globs(pattern: str, found: list[str] | None, corpus: Path) -> None:
    if found is None:  # it names nothing with text
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
        "corpus/data.csv.gz": ("csv", "gzip"),
        "corpus/sub/README": ("text", None),
        "corpus/sub/model.py": ("text", None),
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
    assert found[1:4] == ["sub/a.md", "sub/deep/y.jsonl.gz", "sub/deep/z.TXT"]
    assert found[5] == "b.jsonl"
    assert found[6:8] == ["corpus/a.txt", "corpus/c.parquet"]
    assert found[8:] == ["corpus/data.csv.gz", "corpus/q/w.txt.zst"]


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


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("notes.pdf", b"%PDF", r"a \.pdf file: convert it first \(pdftotext \S+notes.pdf\)"),
        ("a b.docx", b"PK", r"\(pandoc -t plain '\S+a b.docx' -o '\S+a b.docx'.txt\)"),
        ("list.json", b"[]", r"\(jq -c .* > \S+list.jsonl\)"),
        ("all.tar.gz", b"\x1f\x8b", r"\(tar -xf \S+all.tar.gz\)"),
        ("table.parquet.gz", b"PAR1", "compressed once more: uncompress it first"),
        ("song.mp3", b"ID3\0", "a binary file: convert it to text first"),
        ("no_suffix", b"\x7fELF\0", "a binary file: convert it to text first"),
        ("a.srt", "caf\xe9".encode("latin-1"), r"text in Latin-1, it seems, .*iconv -f LATIN1 "),
        ("a.log", "text".encode("utf-16"), r"text in UTF-16, .*iconv -f UTF-16 -t UTF-8 \S+a.log"),
        ("b.log", "text".encode("utf-16-le"), "text in UTF-16LE, not UTF-8"),
        ("c.log", "text".encode("utf-16-be"), "text in UTF-16BE, not UTF-8"),
    ],
)
def test_what_is_no_text_is_refused_when_named_and_left_out_when_met(
    name: str, content: bytes, remedy: str, corpus: Path
) -> None:
    (corpus / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"expected text, found .*, .*{remedy}") as error:
        names(corpus / name)
    assert "rename" not in str(error.value)
    left_out = Counter[str]()
    found = find_files([str(corpus)], left_out=left_out)
    assert sorted(file.name for file in found) == sorted(f"corpus/{one}" for one in TREE + MORE)
    assert sum(left_out.values()) == len(BINARY) + 1 - (name in BINARY)
    only = corpus.parent / "only"
    only.mkdir()
    (corpus / name).rename(only / name)
    with pytest.raises(ValueError, match=f"expected text in .*found 1 .*{remedy}"):
        names(only)


@pytest.mark.parametrize(
    "content", [b"", "caf\xe9".encode(), "x" * 8191 + "\xe9", b"a\rb", "\ufeffbom".encode()]
)
def test_text_is_known_by_its_first_block(content: bytes | str, corpus: Path) -> None:
    raw = content if isinstance(content, bytes) else content.encode()
    (corpus / "odd.name").write_bytes(raw)
    assert names(corpus / "odd.name") == ["odd.name"]
    assert "corpus/odd.name" in names(corpus)


def test_a_url_is_to_be_downloaded(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"found https://a.b/c.txt: download it first \(curl -LO"):
        names("https://a.b/c.txt")


class TestDatasetOnDisk:
    """A folder that `datasets.save_to_disk` wrote."""

    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        for split in ("train", "test"):
            folder = tmp_path / "saved" / split
            folder.mkdir(parents=True)
            for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
                (folder / name).write_bytes(b"{}")
        (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        (tmp_path / "saved/train/cache-0123.arrow").write_bytes(b"a result of map")
        return tmp_path / "saved"

    def test_its_data_is_found(self, saved: Path) -> None:
        left_out = Counter[str]()
        found = find_files([str(saved)], left_out=left_out)
        data = [f"saved/{split}/data-00000-of-00001.arrow" for split in ("test", "train")]
        assert [file.name for file in found] == data
        assert {file.kind for file in found} == {"arrow"}
        assert left_out == {".arrow (cached by datasets)": 1}
        assert names(saved / "train") == ["train/data-00000-of-00001.arrow"]

    def test_elsewhere_such_names_mean_nothing(self, saved: Path) -> None:
        (saved / "train/state.json").unlink()
        assert "saved/train/cache-0123.arrow" in names(saved)


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


def test_a_remote_folder_is_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request per file would take an object store twenty minutes for 25,000 of them."""
    asked = []

    class Store:
        def get_file_info(self, what: str | fs.FileSelector) -> fs.FileInfo | list[fs.FileInfo]:
            asked.append(what)
            if isinstance(what, str):
                return fs.FileInfo(what, fs.FileType.Directory)
            names = [f"bucket/web/{number}.txt" for number in range(3)]
            return [fs.FileInfo(name, fs.FileType.File, size=9, mtime=1.5) for name in names]

    monkeypatch.setattr("prepare.sources.filesystem", lambda _: (Store(), "bucket/web"))
    monkeypatch.setattr("prepare.sources.path_of", lambda _, inside: f"s3://{inside}")
    found = find_files(["s3://bucket/web"])
    assert [(file.name, file.path, file.size) for file in found] == [
        (f"web/{number}.txt", f"s3://bucket/web/{number}.txt", 9) for number in range(3)
    ]
    assert len(asked) == 2, "the folder, and the listing of what is in it"


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


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_link_names_what_has_no_name_of_a_supported_type(name: str, tmp_path: Path) -> None:
    """As the snapshots of a Hugging Face cache do, whose blobs are named by a hash."""
    (tmp_path / "hub/blobs").mkdir(parents=True)
    (tmp_path / "hub/snapshots").mkdir()
    (tmp_path / "hub/blobs/0123").write_text("text")
    (tmp_path / "hub/snapshots" / name).symlink_to("../blobs/0123")
    assert names(tmp_path / "hub") == [f"hub/snapshots/{name}"]


def test_a_pipe_is_refused(corpus: Path) -> None:
    os.mkfifo(corpus / "sub/pipe.txt")
    for source in (corpus / "sub/pipe.txt", corpus, corpus / "sub/*.txt"):
        with pytest.raises(ValueError, match=r"pipe\.txt, a pipe, socket or device: write"):
            names(source)


def test_a_name_that_is_not_utf8_is_named(corpus: Path) -> None:
    Path(os.fsdecode(os.fsencode(corpus) + b"/notes\xe9.pdf")).touch()
    assert len(names(corpus)) == len(TREE + MORE)
    for name in (b"/caf\xe9.txt", b"/caf\xe9"):
        path = Path(os.fsdecode(os.fsencode(corpus) + name))
        path.touch()
        with pytest.raises(ValueError, match=r"UTF-8, found b'caf\\xe9.*' in .*corpus: rename it"):
            names(corpus)
        path.unlink()


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
