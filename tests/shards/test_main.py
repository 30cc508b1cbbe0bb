"""`python -m shards`: what a dataset is, what a document says, and which shard is wrong."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards import tokenizer
from shards.__main__ import COMMANDS, main
from shards.commands import inspect
from shards.manifest import MANIFEST_NAME, Manifest, Source, TokenizerIdentity
from tests.shards.support import (
    arange_dataset,
    text_dataset,
    write_dataset,
    write_manifest,
    write_shard,
)

gpt2 = tokenizer.load()
TRAIN = [["one two three", "é — 字\n\nand more", "x"], ["four" * 50, "five\n"], ["six"]]
VAL = [["seven eight", "nine"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_dataset(tmp_path_factory.mktemp("data") / "texts", TRAIN, VAL).folder


Answer = Callable[..., tuple[int, str, str]]


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Answer:
    """Run a command here: its exit code and what it wrote to stdout and stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run


def refused(answer: Answer, words: str, *args: object) -> None:
    code, out, err = answer(*args)
    message = err.rpartition("\r")[2].strip()  # what stands after a progress bar
    assert code == 2 and not out
    assert message.startswith("error: ") and words in message and "\n" not in message


# info


def test_info_as_json(folder: Path, answer: Answer) -> None:
    code, out, err = answer("info", folder, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    facts = json.loads(out)
    manifest = Manifest.load(folder)
    assert facts["fingerprint"] == manifest.fingerprint and facts["generation"] == 0
    assert facts["tokenizer"] == vars(manifest.tokenizer)
    assert facts["split_rule"] == {"rule": "hash", "val_fraction": 0.1}
    assert facts["counts"] == {"read": 8, "written": 8, "empty": 0, "quarantined": 0}
    texts = [text for shard in TRAIN for text in shard]
    lengths = sorted(len(gpt2.encode(text)) + 1 for text in texts)
    train = facts["splits"]["train"]
    assert train["documents"] == len(texts) and train["tokens"] == sum(lengths)
    assert train["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert train["bytes_per_token"] == pytest.approx(train["text_bytes"] / train["tokens"])
    assert train["shards"] == train["indexes_read"] == 3
    # The smallest length that at least so many documents do not exceed.
    expected = {str(q): lengths[max(int(np.ceil(q * 6)) - 1, 0)] for q in inspect.QUANTILES}
    assert train["document_tokens"] == expected
    assert facts["sources"]["files"] == 4
    largest = facts["sources"]["largest"]
    assert largest[0] == {"name": "texts/train_00001", "bytes": 205}
    assert [source["bytes"] for source in largest] == sorted(
        (source.bytes for source in manifest.sources), reverse=True
    )


def test_info_for_people(folder: Path, answer: Answer) -> None:
    code, out, _ = answer("info", folder)
    manifest = Manifest.load(folder)
    assert code == 0
    for words in (
        f"fingerprint  {manifest.fingerprint}, generation 0",
        "gpt2, 50,257 ids, <|endoftext|> 50256",
        "hash (val_fraction 0.1)",
        "8 read = 0 empty + 0 quarantined + 8 written",
        f"{manifest.splits['train'].tokens:,} tokens",
        "2 documents, 15 bytes of text",
        "texts/train_00001",
        "(median)",
    ):
        assert words in out, words


def test_info_names_the_largest_of_many_sources(tmp_path: Path, answer: Answer) -> None:
    manifest = arange_dataset(tmp_path, (9,))
    replace(manifest, sources=tuple(Source(f"s{n}", n) for n in range(100))).save(tmp_path)
    facts = json.loads(answer("info", tmp_path, "--json")[1])
    assert facts["sources"]["files"] == 100 and facts["sources"]["bytes"] == 4950
    assert [source["name"] for source in facts["sources"]["largest"]] == [
        f"s{n}" for n in (99, 98, 97, 96, 95)
    ]


def long_dataset(folder: Path) -> Manifest:
    """Documents that go on over pieces and shards, as a long text has them."""
    folder.mkdir()
    words = ["a b c", " d e", " f g h", " i"]
    first, second, third, fourth = (gpt2.encode(word) for word in words)
    eot, tail = gpt2.eot, gpt2.encode("short")
    shards = [
        write_shard(
            folder,
            "train_00000",
            [eot, *tail, eot, *first, *second],
            [(0, 0, 0, 5, False), (2, 1, 0, 5, False), (5, 1, 5, 4, True)],
        ),
        write_shard(folder, "train_00001", third, [(0, 1, 9, 6, True)]),
        write_shard(
            folder, "train_00002", [*fourth, eot, *tail], [(0, 1, 15, 2, True), (1, 2, 7, 5, False)]
        ),
        write_shard(folder, "train_00003", [eot, *tail], [(0, 3, 0, 5, False)]),
    ]
    val = [write_shard(folder, "val_00000", [eot, *tail], [(0, 3, 1, 5, False)])]
    identity = gpt2.identity
    sources = [Source(name, 1) for name in ("a.txt", "long.txt", "b.txt", "c.jsonl")]
    return write_manifest(folder, {"train": shards, "val": val}, identity, sources)


def test_a_document_that_goes_on_has_one_length(tmp_path: Path) -> None:
    manifest = long_dataset(tmp_path / "long")
    assert manifest.splits["train"].documents == 4
    assert inspect.document_lengths(manifest, "train").tolist() == [2, 1 + 3 + 2 + 3 + 1, 2, 2]
    empty = replace(manifest, splits={"train": replace(manifest.splits["train"], shards=())})
    assert inspect.document_lengths(empty, "train").size == 0


def test_of_very_many_shards_a_sample_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    monkeypatch.setattr(inspect, "INDEXES_READ", 4)
    arange_dataset(tmp_path, range(10, 19))
    facts = json.loads(answer("info", tmp_path, "--json")[1])["splits"]["train"]
    assert (facts["shards"], facts["indexes_read"]) == (9, 4)
    assert facts["document_tokens"]["0"] == 10 and facts["document_tokens"]["1"] == 16
    assert "(from 4 shards)" in answer("info", tmp_path)[1]


# The picture


def test_the_picture_shows_the_numbers(
    folder: Path, tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, list[np.ndarray]] = {"stairs": [], "barh": []}
    for name, values in (("stairs", 0), ("barh", 1)):
        original = getattr(Axes, name)

        def spy(self, *args, name=name, values=values, original=original, **keywords):  # type: ignore[no-untyped-def]
            drawn[name].append(np.asarray(args[values]))
            return original(self, *args, **keywords)

        monkeypatch.setattr(Axes, name, spy)
    path = tmp_path / "picture.png"
    assert answer("info", folder, "--plot", path)[0] == 0
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and width > 1000 and height > 700
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]
    manifest = Manifest.load(folder)
    train, val, shards, val_shards = drawn["stairs"]
    assert train.sum() == pytest.approx(100) and val.sum() == pytest.approx(100)
    assert shards[::2] * 1e6 == pytest.approx([s.tokens for s in manifest.splits["train"].shards])
    assert val_shards.sum() * 1e6 == pytest.approx(manifest.splits["val"].tokens)
    assert sum(drawn["barh"]) == pytest.approx([100, 100, 100])
    assert drawn["barh"][1][2] == pytest.approx(100 * 2 / 8), "a quarter of the documents"


def test_the_picture_of_the_smallest_dataset(tmp_path: Path, answer: Answer) -> None:
    arange_dataset(tmp_path / "data", (2,))
    assert answer("info", tmp_path / "data", "--plot", tmp_path / "p.png")[0] == 0
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_without_matplotlib_a_line_says_how_to_get_it(
    folder: Path, tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = answer("info", folder, "--plot", tmp_path / "p.png")
    assert code == 2 and err.startswith("error: ") and "pip install 'mygpt[plots]'" in err
    assert answer("info", folder)[0] == 0, "nothing else needs it"


# show


def test_every_document_is_shown(folder: Path, answer: Answer) -> None:
    for split, shards in (("train", TRAIN), ("val", VAL)):
        texts = [(n, row, text) for n, shard in enumerate(shards) for row, text in enumerate(shard)]
        for number, (shard, row, text) in enumerate(texts):
            code, out, err = answer("show", folder, "--split", split, "--document", number)
            header, _, shown = out.partition("\n")
            assert (code, err, shown) == (0, "", text + "\n")
            name = f"{split}_{shard:05d}"
            assert f"{split} document {number}: texts/{name}, byte {row}; {name}.npy" in header
            assert f"{len(gpt2.encode(text)) + 1:,} tokens" in header


def test_without_flags_it_is_the_first_of_val(folder: Path, answer: Answer) -> None:
    assert answer("show", folder)[1].endswith("\nseven eight\n")


def test_a_document_over_several_shards_is_joined(tmp_path: Path, answer: Answer) -> None:
    long_dataset(tmp_path / "long")
    show = ("show", tmp_path / "long", "--split", "train", "--document")
    shown = [answer(*show, number)[1] for number in range(4)]
    assert [text.partition("\n")[2] for text in shown] == [
        "short\n",
        "a b c d e f g h i\n",
        "short\n",
        "short\n",
    ]
    assert "long.txt, byte 0; train_00000.npy from token 2 on over 3 shards, 10 tokens" in shown[1]
    assert "b.txt, byte 7; train_00002.npy from token 1, 2 tokens" in shown[2]
    assert "c.jsonl, byte 0; train_00003.npy from token 0, 2 tokens" in shown[3]


@pytest.mark.parametrize("number", [-1, 2, 10**20])
def test_a_document_that_is_not_there(folder: Path, answer: Answer, number: int) -> None:
    refused(answer, "expected --document from 0 to 1 for val", "show", folder, "--document", number)


def test_a_split_with_no_documents(tmp_path: Path, answer: Answer) -> None:
    write_dataset(tmp_path, {"train": [[1, 2]]})
    refused(answer, "has 0 val documents", "show", tmp_path)


# verify


def test_a_sound_dataset_is_verified(folder: Path, answer: Answer) -> None:
    code, out, _ = answer("verify", folder)
    assert code == 0
    assert f"all 4 shards are what the manifest says: {Manifest.load(folder).fingerprint}" in out


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a token": (lambda f: flip(f / "train_00001.npy", -1), "expected sha256"),
    "the header": (lambda f: flip(f / "train_00001.npy", 9), "train_00001.npy"),
    "padding": (lambda f: flip(f / "train_00001.npy", 126), "with another header"),
    "the end": (lambda f: _cut(f / "train_00001.npy"), "train_00001.npy"),
    "gone": (lambda f: (f / "train_00001.npy").unlink(), "no such file"),
    "a folder": (lambda f: _folder(f / "train_00001.npy"), "train_00001.npy"),
    "index gone": (lambda f: (f / "train_00001.docs.parquet").unlink(), "no such file"),
    "index cut": (lambda f: _cut(f / "train_00001.docs.parquet"), "expected a whole index"),
    "index altered": (lambda f: flip(f / "train_00001.docs.parquet", 20), "train_00001.docs"),
    "another index": (
        lambda f: (f / "train_00000.docs.parquet").rename(f / "train_00001.docs.parquet"),
        "expected sha256",
    ),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", DAMAGE)
def test_the_shard_that_is_wrong_is_named(tmp_path: Path, answer: Answer, name: str) -> None:
    manifest = text_dataset(tmp_path, TRAIN, VAL)
    damage, words = DAMAGE[name]
    damage(manifest.folder)
    code, out, _ = answer("verify", tmp_path)
    assert code == 1
    wrong = [line for line in out.splitlines() if line.startswith("wrong: ")]
    assert any("train_00001" in line and words in line for line in wrong), out
    assert not any("00002" in line or "val" in line for line in wrong)
    count = 2 if name == "another index" else 1
    assert f"{count} of 4 shards are wrong; restore, or prepare again" in out


def test_every_wrong_shard_is_named_once(tmp_path: Path, answer: Answer) -> None:
    manifest = arange_dataset(tmp_path, [50] * 20, [50] * 3)
    for file in ("train_00003.npy", "train_00017.npy", "val_00002.docs.parquet"):
        flip(manifest.path(file), 40)
    code, out, _ = answer("verify", tmp_path)
    assert code == 1 and out.count("wrong: ") == 3 and "3 of 23 shards" in out
    for file in ("train_00003", "train_00017", "val_00002"):
        assert out.count(file) == 1


def test_ids_beyond_the_vocabulary(tmp_path: Path, answer: Answer) -> None:
    small = TokenizerIdentity("small", 100, 99, "0" * 64)
    write_dataset(tmp_path, {"train": [[1, 99, 100, 7]], "val": [[1, 99]]}, small)
    code, out, _ = answer("verify", tmp_path)
    assert code == 1 and "1 of 2 shards" in out
    assert "expected ids below 100 in" in out and "train_00000.npy, found 100 at token 2" in out


def test_counts_and_offsets_that_can_not_be(tmp_path: Path, answer: Answer) -> None:
    wrong = [write_shard(tmp_path, "train_00000", [1, 2, 3], [(2, 0, 0, 1, False)] * 2)]
    shard = write_shard(tmp_path, "train_00001", [1, 2], [(1, 0, 0, 1, False), (0, 0, 1, 1, False)])
    beyond = write_shard(tmp_path, "train_00002", [1, 2], [(3, 0, 0, 1, False)])
    wrong += [shard, beyond, replace(wrong[0], documents=7)]
    val = [write_shard(tmp_path, "val_00000", [1, 2], [(0, 0, 0, 1, False)])]
    write_manifest(tmp_path, {"train": wrong, "val": val})
    code, out, _ = answer("verify", tmp_path)
    assert code == 1 and "4 of 5 shards" in out
    assert out.count("expected rising offsets") == 4
    assert "expected 7 documents of 2 bytes in" in out


# import and export


def test_import_and_export(tmp_path: Path, answer: Answer) -> None:
    train = struct.pack("<7H", 50256, 1, 2, 50256, 3, 50256, 4)
    (tmp_path / "train.bin").write_bytes(train)
    (tmp_path / "val.bin").write_bytes(struct.pack("<2H", 50256, 9))
    files, data = [tmp_path / "train.bin", tmp_path / "val.bin"], tmp_path / "data"
    code, out, _ = answer("import", *files, "--out", data)
    assert (code, out) == (
        0,
        f"4 documents, 9 tokens in {data}: python -m shards info {data}\n",
    )
    assert answer("verify", data)[0] == 0
    assert "imported" in answer("info", data)[1]
    code, out, _ = answer("export", data, "--out", tmp_path / "out", "--format", "llmc")
    assert (code, out) == (
        0,
        f"2 files in {tmp_path / 'out'}: train_000000.bin to val_000000.bin\n",
    )
    back = sorted((tmp_path / "out").iterdir())
    assert [path.stat().st_size for path in back] == [1024 + 14, 1024 + 4]
    assert answer("import", *back, "--out", tmp_path / "again")[0] == 0
    assert answer("export", tmp_path / "again", "--out", tmp_path / "bare")[0] == 0
    assert (tmp_path / "bare" / "train.bin").read_bytes() == train
    refused(answer, "expected a new folder", "import", *files, "--out", data)
    refused(answer, "expected a new folder", "export", data, "--out", tmp_path / "out")
    refused(answer, "found none of train", "import", "--out", tmp_path / "c")
    refused(answer, "expected magic", "import", *files, "--out", tmp_path / "c", "--format", "llmc")
    assert not (tmp_path / "c").exists()


# The command line


def test_help_says_what_each_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert not exit_.value.code
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, command in COMMANDS.items():
        assert f"• {name} {' '.join(str(command.__doc__).split())}" in text
    assert "1 from `verify` when a shard is wrong; 2 for bad input" in text


@pytest.mark.parametrize("command", ["info", "show", "verify"])
def test_a_folder_without_a_dataset(tmp_path: Path, answer: Answer, command: str) -> None:
    refused(answer, "found no such folder", command, tmp_path / "nowhere")
    (tmp_path / MANIFEST_NAME).write_text("{")
    refused(answer, "expected a JSON object", command, tmp_path)


@pytest.mark.parametrize(
    "args", [[], ["inspect"], ["info"], ["info", "d", "--nonsense"], ["show", "d", "--split", "x"]]
)
def test_what_is_no_command(answer: Answer, args: list[str]) -> None:
    code, out, err = answer(*args)
    assert code == 2 and "Traceback" not in out + err


def test_exit_codes_reach_the_shell(tmp_path: Path) -> None:
    def code(*args: object) -> int:
        command = [sys.executable, "-W", "error", "-m", "shards", *map(str, args)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    manifest = arange_dataset(tmp_path, (50,))
    assert code("verify", tmp_path) == 0
    flip(manifest.path("train_00000.npy"), -1)
    assert code("verify", tmp_path) == 1
    assert code("verify", tmp_path / "nowhere") == 2


@pytest.mark.skipif(sys.platform == "win32", reason="pipes close otherwise there")
def test_shown_to_a_reader_that_leaves(tmp_path: Path) -> None:
    text_dataset(tmp_path, [["x"]], [["line\n" * 50_000]])
    with subprocess.Popen(
        [sys.executable, "-m", "shards", "show", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 0
        assert process.stderr.read() == b""
