"""A dataset's identity (promise 10): what is read back, what is refused, and generations."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import remote
from shards.checks import check, verify
from shards.manifest import MANIFEST_NAME, Manifest, Shard, Source, Split, checksum
from tests.shards.support import arange_dataset, grown


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return arange_dataset(tmp_path, (100, 30, 7), (20,))


def edit(manifest: Manifest, change: Callable[[dict[str, Any]], object]) -> None:
    path = manifest.folder / MANIFEST_NAME
    raw = json.loads(path.read_text("utf-8"))
    change(raw)
    path.write_text(json.dumps(raw), "utf-8")


def sign(raw: dict[str, Any]) -> None:
    """Let the checksum be that of what the manifest says now."""
    raw["checksum"] = checksum(raw)


def as_version_1(raw: dict[str, Any]) -> None:
    """As it was written before there was a checksum."""
    raw["version"] = 1
    del raw["checksum"]


def refused(manifest: Manifest, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        Manifest.load(manifest.folder)
    assert "\n" not in str(caught.value) and MANIFEST_NAME in str(caught.value)


def test_what_is_saved_is_loaded(manifest: Manifest, tmp_path: Path) -> None:
    full = replace(
        manifest,
        sources=(Source("a/ü\n.txt", 3), Source("b.jsonl", 2**60)),
        split_rule={"rule": "hash", "val_fraction": 0.1},
        counts={"read": 4, "written": 4, "empty": 0, "quarantined": 0},
    )
    again = tmp_path / "again"
    again.mkdir()
    full.save(again)
    loaded = Manifest.load(again)
    assert loaded == full
    assert loaded.folder == again and loaded.path("x.npy") == again / "x.npy"
    assert Manifest.load(str(again)) == full
    first = (again / MANIFEST_NAME).read_bytes()
    loaded.save(again)
    assert (again / MANIFEST_NAME).read_bytes() == first


def test_totals_are_those_of_the_shards(manifest: Manifest) -> None:
    train = manifest.splits["train"]
    assert (train.tokens, train.documents) == (137, 3)
    raw = json.loads((manifest.folder / MANIFEST_NAME).read_text("utf-8"))
    assert raw["splits"]["train"]["tokens"] == 137 and raw["dtype"] == "uint16"
    assert raw["fingerprint"] == manifest.fingerprint


@given(tokens=st.integers(0, 10**12), block=st.integers(1, 5000))
def test_windows_are_a_constant_of_the_shard(tokens: int, block: int) -> None:
    shard = Shard("a.npy", "a.docs.parquet", tokens, 1, 1, "", "")
    windows = shard.windows(block)
    assert windows == max(tokens - 1, 0) // block
    assert windows * block + 1 <= max(tokens, 1) < (windows + 1) * block + 1 + (tokens == 0)


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"found none: .*python -m prepare SOURCE"):
        Manifest.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="found no such folder"):
        Manifest.load(tmp_path / "data")
    (tmp_path / "books.txt").write_text("text")
    with pytest.raises(ValueError, match=r"found the file .*, by `make data INPUT=\S+txt`"):
        Manifest.load(tmp_path / "books.txt")


@pytest.mark.parametrize("content", ["", "{", '{"format": 1', "\ufffd", "[]", "null", "3", '"x"'])
def test_what_is_no_manifest(manifest: Manifest, content: str) -> None:
    (manifest.folder / MANIFEST_NAME).write_text(content, "utf-8")
    refused(manifest, "expected a JSON object|expected format mygpt-shards version 2")


def test_bytes_that_are_not_text(manifest: Manifest) -> None:
    (manifest.folder / MANIFEST_NAME).write_bytes(b'{"format": "\xff"}')
    refused(manifest, "expected a JSON object")


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_another_version(manifest: Manifest, version: object) -> None:
    edit(manifest, lambda raw: raw.update(version=version))
    refused(manifest, f"expected format mygpt-shards version 2 .*found .* version {version}")


def test_version_1_is_refused(manifest: Manifest) -> None:
    edit(manifest, as_version_1)
    refused(manifest, "version 2 in .*found .* version 1: use the version of myGPT that wrote it")


def test_what_was_released_is_read() -> None:
    released = Manifest.load(Path(__file__).parents[1] / "released/v2/dataset")
    assert released.splits["train"].tokens and released.fingerprint
    assert list(verify(released)) == [
        (shard, []) for split in released.splits.values() for shard in split.shards
    ]


def alterations() -> Iterator[tuple[str, Callable[[dict[str, Any]], object]]]:
    def shards(raw: dict[str, Any]) -> list[dict[str, Any]]:
        return raw["splits"]["train"]["shards"]

    yield "a hash", lambda raw: shards(raw)[1].update(sha256="0" * 64)
    yield "a length", lambda raw: shards(raw)[0].update(tokens=101)
    yield "a shard less", lambda raw: shards(raw).pop()
    yield "a shard twice", lambda raw: shards(raw).append(shards(raw)[0])
    yield "another order", lambda raw: shards(raw).reverse()
    yield "a tokenizer", lambda raw: raw["tokenizer"].update(hash="1" * 64)
    yield "the fingerprint", lambda raw: raw.update(fingerprint="ab" * 32)
    yield (
        "sides",
        lambda raw: raw["splits"].update(train=raw["splits"]["val"], val=raw["splits"]["train"]),
    )


@pytest.mark.parametrize(
    "change", [pytest.param(change, id=name) for name, change in alterations()]
)
def test_an_altered_manifest(
    manifest: Manifest, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(manifest, change)
    refused(manifest, "expected the checksum .* the file was altered")
    edit(manifest, sign)
    refused(manifest, "expected the fingerprint .* the file was altered")


@pytest.mark.parametrize("field", ["documents", "text_bytes", "index_sha256", "generation"])
def test_an_altered_count_or_index(manifest: Manifest, field: str) -> None:
    edit(manifest, lambda raw: raw["splits"]["val"]["shards"][0].update({field: 7}))
    refused(manifest, "expected the checksum .* the file was altered")


@pytest.mark.parametrize(
    "name", ["../x.npy", "/etc/passwd", "a/b.npy", "..", ".", "", "..\\x.npy", "c:x.npy"]
)
@pytest.mark.parametrize("field", ["file", "index"])
def test_a_file_name_that_leaves_the_folder(manifest: Manifest, name: str, field: str) -> None:
    edit(manifest, lambda raw: raw["splits"]["val"]["shards"][0].update({field: name}))
    edit(manifest, sign)
    refused(manifest, "expected plain file names of its own folder in .*: restore it or prepare")


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside some JSON."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths(value[key], (*path, key))


@pytest.mark.parametrize("signed", [False, True])
def test_damage_anywhere_is_refused_in_words(manifest: Manifest, signed: bool) -> None:
    raw = json.loads((manifest.folder / MANIFEST_NAME).read_text("utf-8"))
    for *way, last in list(paths(raw))[1:]:
        for other in ("absent", None, 5, -1.5, "text", [], {}, [1], True):
            damaged = json.loads(json.dumps(raw))
            inside = damaged
            for key in way:
                inside = inside[key]
            if other == "absent":
                inside.pop(last)
            else:
                inside[last] = other
            if signed and last != "checksum":
                sign(damaged)
            (manifest.folder / MANIFEST_NAME).write_text(json.dumps(damaged), "utf-8")
            try:
                loaded = Manifest.load(manifest.folder)
            except ValueError as error:
                assert MANIFEST_NAME in str(error) and "\n" not in str(error)
            else:  # what the fingerprint does not cover, by somebody who signs it
                assert signed or json.dumps(damaged) == json.dumps(raw)
                assert loaded.fingerprint == manifest.fingerprint


def test_generations_keep_the_fingerprints_of_what_was(manifest: Manifest) -> None:
    train = manifest.splits["train"].shards
    as_it_was = [
        replace(manifest, splits=manifest.splits | {"train": Split(train[:count])})
        for count in (1, 3)
    ]
    now = grown(manifest, (0, 1, 1))
    assert now.generation == 1
    assert now.fingerprint == manifest.fingerprint, "a generation is no part of the identity"
    for generation, then in enumerate(as_it_was):
        prefix = Manifest.load(manifest.folder, generation)
        assert prefix.fingerprint == then.fingerprint
        assert prefix.generation == generation
        assert [shard.file for shard in prefix.splits["train"].shards] == [
            shard.file for shard in then.splits["train"].shards
        ]
        assert prefix.splits["val"] == manifest.splits["val"]
    assert len({then.fingerprint for then in as_it_was}) == 2


def test_a_generation_knows_its_sources(manifest: Manifest) -> None:
    sources = (Source("old", 1), Source("new", 2, generation=1))
    replace(grown(manifest, (0, 0, 1)), sources=sources).save(manifest.folder)
    assert Manifest.load(manifest.folder).sources == sources
    assert Manifest.load(manifest.folder, 0).sources == sources[:1]


def test_a_generation_that_is_not_there(manifest: Manifest) -> None:
    grown(manifest, (0, 0, 1))
    for generation in (2, -1):
        with pytest.raises(ValueError, match=f"generation from 0 to 1 .*found {generation}"):
            Manifest.load(manifest.folder, generation)


def out_of_range() -> Iterator[tuple[str, Callable[[dict[str, Any]], object]]]:
    def shard(raw: dict[str, Any]) -> dict[str, Any]:
        return raw["splits"]["train"]["shards"][1]

    for field in ("sha256", "index_sha256"):
        for value in ("../../other", "/etc/passwd", "", "A" * 64, "0" * 63, "0" * 64 + "\n"):
            yield "hashes of 64", lambda raw, f=field, v=value: shard(raw).update({f: v})
    yield "hashes of 64", lambda raw: raw["tokenizer"].update(hash="none")
    for field in ("tokens", "documents", "text_bytes"):
        for value in (-1, 1 << 44):
            yield "sizes of shards", lambda raw, f=field, v=value: shard(raw).update({f: v})
    yield "sizes from 0", lambda raw: raw["sources"][0].update(bytes=-1)
    yield "counts from 0", lambda raw: raw["counts"].update(read=-1)
    yield "a generation from 0", lambda raw: raw.update(generation=-1)
    yield "generations up to 0", lambda raw: shard(raw).update(generation=1)
    yield "generations up to 0", lambda raw: raw["sources"][0].update(generation=-1)
    yield "token ids", lambda raw: raw["tokenizer"].update(n_vocab=0)
    yield "token ids", lambda raw: raw["tokenizer"].update(n_vocab=(1 << 16) + 1)
    yield "an eot", lambda raw: raw["tokenizer"].update(eot=1 << 16)
    yield "a rule", lambda raw: raw.update(split_rule={})
    yield "plain file names", lambda raw: shard(raw).update(file="a\x1b[2J.npy")


@pytest.mark.parametrize(("words", "change"), list(out_of_range()))
def test_a_value_out_of_range(
    manifest: Manifest, words: str, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(manifest, change)
    edit(manifest, sign)
    refused(manifest, f"expected .*{words}")


def test_a_hash_that_is_a_path_touches_no_file(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(manifest, lambda raw: raw["splits"]["val"]["shards"][0].update(sha256="../victim"))
    edit(manifest, sign)
    content = (manifest.folder / MANIFEST_NAME).read_bytes()
    monkeypatch.setattr(remote, "read", lambda folder, name: content)
    with pytest.raises(ValueError, match=r"hashes of 64 hex digits in s3://.*'\.\./victim'"):
        Manifest.load("s3://bucket/data")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes of POSIX")
@pytest.mark.parametrize("name", [MANIFEST_NAME, "train_00001.npy", "train_00001.docs.parquet"])
def test_a_fifo_is_refused_not_waited_for(manifest: Manifest, name: str) -> None:
    path = manifest.folder / name
    path.unlink()
    os.mkfifo(path)
    refusals = (FileNotFoundError, ValueError)
    with pytest.raises(refusals, match=rf"{name}.* found (something else|another kind)"):
        check(Manifest.load(manifest.folder), "train")
