"""Token files of nanoGPT, llm.c and modded-nanogpt: in and out again, byte for byte."""

import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import tokenizer
from shards.checks import verify
from shards.commands import interop
from shards.commands.inspect import find_document
from shards.commands.interop import export, import_files
from shards.manifest import Manifest
from tests.shards.support import arange_dataset, text_dataset

gpt2 = tokenizer.load()
DOCUMENTS = ["Once upon a time", "é — 字\n\n", "x" * 300, " ", "the end"]


def before(texts: Sequence[str]) -> list[int]:
    """Each document after its `<|endoftext|>`, as llm.c has them and we do."""
    return [token for text in texts for token in (gpt2.eot, *gpt2.encode(text))]


def after(texts: Sequence[str]) -> list[int]:
    """Each document before its `<|endoftext|>`, as nanoGPT has them."""
    return [token for text in texts for token in (*gpt2.encode(text), gpt2.eot)]


def nanogpt(path: Path, ids: Sequence[int]) -> Path:
    path.write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    return path


def llmc(path: Path, ids: Sequence[int]) -> Path:
    header = [20240520, 1, len(ids), *[0] * 253]
    path.write_bytes(struct.pack("<256i", *header) + struct.pack(f"<{len(ids)}H", *ids))
    return path


def texts(manifest: Manifest, split: str) -> list[str]:
    count = manifest.splits[split].documents
    return [find_document(manifest, split, number).text() for number in range(count)]


def is_sound(manifest: Manifest) -> bool:
    return not any(faults for _, faults in verify(manifest))


@pytest.mark.parametrize("order", [before, after])
def test_nanogpt_round_trip(tmp_path: Path, order: object) -> None:
    tokens = before(DOCUMENTS) if order is before else after(DOCUMENTS)
    files = [nanogpt(tmp_path / "train.bin", tokens), nanogpt(tmp_path / "val.bin", tokens[:3])]
    manifest = import_files(files, tmp_path / "data", "auto")
    assert is_sound(manifest)
    assert manifest.split_rule == {"rule": "imported"}
    assert [(source.name, source.bytes) for source in manifest.sources] == [
        ("train.bin", 2 * len(tokens)),
        ("val.bin", 6),
    ]
    assert texts(manifest, "train") == DOCUMENTS, "where the end of text stands makes no difference"
    assert manifest.splits["train"].text_bytes == len("".join(DOCUMENTS).encode())
    assert manifest.counts["read"] == manifest.counts["written"] == 6
    assert np.load(tmp_path / "data" / "train_00000.npy").tolist() == tokens
    names = export(manifest, tmp_path / "out", "nanogpt")
    assert names == ["train.bin", "val.bin"]
    for file in files:
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_llmc_round_trip_with_documents_across_files(tmp_path: Path) -> None:
    tokens = before(DOCUMENTS)
    cuts = [0, 7, 11, 40, len(tokens)]
    files = [llmc(tmp_path / "web_val_000000.bin", before(["v", "w"]))]
    for number, (start, end) in enumerate(pairwise(cuts), start=1):
        files.append(llmc(tmp_path / f"web_train_{number:06d}.bin", tokens[start:end]))
    manifest = import_files(files, tmp_path / "data", "auto")
    assert is_sound(manifest)
    assert [shard.tokens for shard in manifest.splits["train"].shards] == np.diff(cuts).tolist()
    assert manifest.splits["train"].documents == len(DOCUMENTS)
    assert texts(manifest, "train") == DOCUMENTS
    assert texts(manifest, "val") == ["v", "w"]
    second = find_document(manifest, "train", 1)
    assert (second.source, second.row, second.shards) == ("web_train_000001.bin", 5, 3)
    names = export(manifest, tmp_path / "out", "llmc")
    assert names == [*(f"train_{number:06d}.bin" for number in range(4)), "val_000000.bin"]
    for name, file in zip(names, [*files[1:], files[0]], strict=True):
        assert (tmp_path / "out" / name).read_bytes() == file.read_bytes()


@settings(max_examples=25)
@given(
    tokens=st.lists(st.sampled_from([50256, 50256, 11, 220, 198, 447]), min_size=1, max_size=60),
    size=st.integers(1, 9),
    block=st.integers(1, 7),
)
def test_any_stream_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, tokens: list[int], size: int, block: int
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    files = [nanogpt(folder / "train.bin", tokens), nanogpt(folder / "val.bin", [11])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interop, "MAX_SHARD_TOKENS", size)
        patch.setattr(interop, "BLOCK", block)
        manifest = import_files(files, folder / "data", "nanogpt")
        export(manifest, folder / "out", "nanogpt")
    assert (folder / "out" / "train.bin").read_bytes() == files[0].read_bytes()
    assert len(manifest.splits["train"].shards) == -(-len(tokens) // size)
    assert is_sound(manifest)
    # The documents are what stands between the ends of text; nothing follows one at the very end.
    parts: list[list[int]] = [[]]
    for token in tokens:
        parts.append([]) if token == gpt2.eot else parts[-1].append(token)
    parts = parts if tokens[0] != gpt2.eot else parts[1:]
    if len(tokens) > 1 and tokens[-1] == gpt2.eot and (len(tokens) - 1) % size:
        parts = parts[:-1]
    assert manifest.splits["train"].documents == len(parts)
    assert texts(manifest, "train") == [gpt2.decode(part) for part in parts]
    assert manifest.splits["train"].text_bytes == sum(
        len(gpt2._reference.decode_bytes(part)) for part in parts
    )


def test_ours_goes_out_and_comes_back(tmp_path: Path) -> None:
    ours = text_dataset(tmp_path / "ours", [DOCUMENTS[:2], DOCUMENTS[2:]], [["v"]])
    for form in ("nanogpt", "llmc"):
        out = tmp_path / form
        names = export(ours, out, form)
        back = import_files([out / name for name in names], tmp_path / f"{form}-back", "auto")
        assert texts(back, "train") == DOCUMENTS
        assert back.splits["train"].text_bytes == ours.splits["train"].text_bytes
        if form == "llmc":
            assert back.fingerprint == ours.fingerprint, "the same tokens in the same shards"


def test_progress_counts_every_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interop, "BLOCK", 7)
    told: list[int] = []
    files = [nanogpt(tmp_path / "train.bin", [1] * 50), nanogpt(tmp_path / "val.bin", [2] * 6)]
    manifest = import_files(files, tmp_path / "data", "auto", told.append)
    assert sum(told) == 56 and max(told) == 7
    told.clear()
    export(manifest, tmp_path / "out", "llmc", told.append)
    assert sum(told) == 56


def refused(folder: Path, words: str, files: Sequence[Path], form: str = "auto") -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        import_files(files, folder / "data", form)
    assert "\n" not in str(caught.value)
    assert not (folder / "data").exists()
    assert not list(folder.glob(".*")), "and nothing is left"


def test_files_that_are_refused(tmp_path: Path) -> None:
    good = [nanogpt(tmp_path / "train.bin", [1, 2, 3]), nanogpt(tmp_path / "val.bin", [4, 5])]
    refused(tmp_path, "found none of val: add one", good[:1])
    refused(tmp_path, "found none of train: add one", [])
    refused(tmp_path, "expected a file of tokens in .*gone.bin", [tmp_path / "gone.bin"])
    refused(tmp_path, "expected magic 20240520", good, "llmc")
    odd = tmp_path / "odd_train.bin"
    odd.write_bytes(b"\1\2\3")
    refused(tmp_path, "expected 16-bit tokens .*found 3 bytes: it was cut short", [odd, good[1]])
    odd.write_bytes(b"")
    refused(tmp_path, "found 0 bytes", [odd, good[1]])
    foreign_ids = nanogpt(tmp_path / "other_train.bin", [1, 50257, 3])
    refused(tmp_path, "below 50257, in .*other_train.bin, found 50257", [foreign_ids, good[1]])
    (tmp_path / "meta.pkl").touch()
    refused(tmp_path, "found a meta.pkl beside it", good)


@pytest.mark.parametrize("keep", [4, 8, 12, 1023, 1024, 1026, 1029])
def test_a_file_with_a_header_cut_short(tmp_path: Path, keep: int) -> None:
    whole = llmc(tmp_path / "train.bin", [1, 2, 3]).read_bytes()
    (tmp_path / "train.bin").write_bytes(whole[:keep])
    val = llmc(tmp_path / "val.bin", [1])
    refused(
        tmp_path, r"expected (magic|16-bit).*train.bin.*cut short", [tmp_path / "train.bin", val]
    )


@pytest.mark.parametrize(("field", "value"), [(0, 20240801), (1, 7), (2, 4), (2, -3)])
def test_another_header(tmp_path: Path, field: int, value: int) -> None:
    path = llmc(tmp_path / "train.bin", [1, 2, 3])
    content = bytearray(path.read_bytes())
    content[4 * field : 4 * field + 4] = struct.pack("<i", value)
    path.write_bytes(content)
    val = llmc(tmp_path / "val.bin", [1])
    refused(tmp_path, "expected magic 20240520, version 1 and the number", [path, val], "llmc")
    words = "another format" if field == 0 else "expected magic"
    refused(tmp_path, words, [path, val])


@pytest.mark.parametrize(
    "name",
    ["data.bin", "training.bin", "retrain.bin", "valid.bin", "interval.bin", "train_val.bin"],
)
def test_the_side_is_a_word_of_the_name(tmp_path: Path, name: str) -> None:
    val = nanogpt(tmp_path / "val.bin", [1])
    refused(tmp_path, f"as a word in the name {name}", [nanogpt(tmp_path / name, [1, 2]), val])
    for word in ("train-1.bin", "my.TRAIN.bin", "a_train_0.bin", "train00.bin"):
        file = nanogpt(tmp_path / word, [1, 2])
        assert (
            import_files([file, val], tmp_path / f"of-{word}", "auto").splits["train"].tokens == 2
        )


def test_a_folder_with_files_in_it_is_refused(tmp_path: Path) -> None:
    files = [nanogpt(tmp_path / "train.bin", [1, 2]), nanogpt(tmp_path / "val.bin", [1])]
    out = tmp_path / "data"
    out.mkdir()
    manifest = import_files(files, out, "auto")  # an empty one is taken
    content = {path: path.read_bytes() for path in out.iterdir()}
    for again in (
        lambda: import_files(files, out, "auto"),
        lambda: export(manifest, out, "nanogpt"),
        lambda: export(manifest, files[0], "nanogpt"),
    ):
        with pytest.raises(ValueError, match="expected a new folder"):
            again()
    assert {path: path.read_bytes() for path in out.iterdir()} == content


def test_what_a_killed_import_left_is_no_hindrance(tmp_path: Path) -> None:
    files = [nanogpt(tmp_path / "train.bin", [1, 2]), nanogpt(tmp_path / "val.bin", [1])]
    with pytest.raises(KeyboardInterrupt):
        import_files(files, tmp_path / "data", "auto", _interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.bin", "val.bin"]
    left = tmp_path / ".data.tmp"
    left.mkdir()
    (left / "train_00007.npy").touch()
    manifest = import_files(files, tmp_path / "data", "auto")
    assert not left.exists() and is_sound(manifest)
    assert len(list((tmp_path / "data").iterdir())) == 5


def _interrupt(_: int) -> None:
    raise KeyboardInterrupt


def test_a_shard_too_large_for_the_header_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = arange_dataset(tmp_path / "data", (20,))
    monkeypatch.setattr(interop, "MAX_COUNT", 19)
    with pytest.raises(ValueError, match=r"at most 19 tokens per shard, found 20 .*nanogpt"):
        export(manifest, tmp_path / "out", "llmc")
    assert not (tmp_path / "out").exists()
    export(manifest, tmp_path / "out", "nanogpt")
