"""A dataset's identity (promise 10): what is read back, what is refused, and generations."""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import remote
from shards.checks import check, verify
from shards.files import json_bytes
from shards.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    Source,
    Split,
    TokenizerIdentity,
    checksum,
)
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


def message_of(folder: Path, generation: int | None = None) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        Manifest.load(folder, generation)
    return str(caught.value)


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
    assert loaded.location_of("x.npy") == str(again / "x.npy")
    assert Manifest.load(str(again)) == full
    first = (again / MANIFEST_NAME).read_bytes()
    loaded.save(again)
    assert (again / MANIFEST_NAME).read_bytes() == first


def small() -> Manifest:
    """The description of a dataset whose every value is chosen here."""
    hashes = ("a" * 64, "b" * 64)
    shards = (
        Shard("train_00000.npy", "train_00000.docs.parquet", 30, 2, 40, *hashes),
        Shard("train_00001.npy", "train_00001.docs.parquet", 5, 1, 9, *hashes, generation=1),
    )
    val = Shard("val_00000.npy", "val_00000.docs.parquet", 9, 1, 15, *hashes)
    return Manifest(
        tokenizer=TokenizerIdentity("gpt2", 50257, 50256, "c" * 64),
        split_rule={"rule": "hash", "val_fraction": 0.1},
        sources=(Source("a.txt", 64),),
        splits={"train": Split(shards), "val": Split((val,))},
        counts={"read": 4, "written": 4},
        generation=1,
    )


def test_the_file_that_is_written(tmp_path: Path) -> None:
    small().save(tmp_path)
    raw = json.loads((tmp_path / MANIFEST_NAME).read_text("utf-8"))

    def shard(name: str, tokens: int, documents: int, text_bytes: int, generation: int) -> dict:
        return {
            "file": f"{name}.npy", "index": f"{name}.docs.parquet", "tokens": tokens,
            "documents": documents, "text_bytes": text_bytes, "sha256": "a" * 64,
            "index_sha256": "b" * 64, "generation": generation,
        }  # fmt: skip

    assert raw == {
        "format": "mygpt-shards",
        "version": 2,
        "dtype": "uint16",
        "fingerprint": "94a208b02ec90d1c2b066d65e4b5e42883c6993ebac1f447468f5e6169b7bbd8",
        "generation": 1,
        "tokenizer": {"name": "gpt2", "n_vocab": 50257, "eot": 50256, "hash": "c" * 64},
        "split_rule": {"rule": "hash", "val_fraction": 0.1},
        "sources": [{"name": "a.txt", "bytes": 64, "generation": 0}],
        "counts": {"read": 4, "written": 4},
        "splits": {
            "train": {
                "tokens": 35,
                "documents": 3,
                "text_bytes": 49,
                "shards": [
                    shard("train_00000", 30, 2, 40, 0),
                    shard("train_00001", 5, 1, 9, 1),
                ],
            },
            "val": {
                "tokens": 9,
                "documents": 1,
                "text_bytes": 15,
                "shards": [shard("val_00000", 9, 1, 15, 0)],
            },
        },
        "checksum": "be61f678bcf4dd1ac18ad123dc50f10201a3c9765374c9c61b95fb04072ac6b3",
    }
    assert small().splits["train"].windows(4) == 7 + 1


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_remote_dataset(slash: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json_bytes(small().to_dict())
    asked = []
    monkeypatch.setattr(remote, "read", lambda *names: (asked.append(names), content)[1])
    loaded = Manifest.load(f"s3://bucket/INDEX{slash}", 0)
    assert asked == [(f"s3://bucket/INDEX{slash}", MANIFEST_NAME)]
    assert loaded.location == loaded.uri == "s3://bucket/INDEX"
    assert loaded.location_of("a.npy") == "s3://bucket/INDEX/a.npy"
    assert loaded == small().prefix(0)
    with pytest.raises(ValueError, match=r" in s3://bucket/INDEX/manifest\.json"):
        Manifest.parse(b"", f"s3://bucket/INDEX{slash}")


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


def test_what_to_do_without_a_manifest(tmp_path: Path) -> None:
    def expected(folder: Path, found: str) -> str:
        return (
            f"expected a dataset with manifest.json in {folder}, found {found}: make one with "
            f"`python -m prepare SOURCE --out {folder}` (an unfinished one: the same command again)"
        )

    assert message_of(tmp_path) == expected(tmp_path, "none")
    assert message_of(tmp_path / "no") == expected(tmp_path / "no", "no such folder")
    (tmp_path / MANIFEST_NAME).mkdir()
    assert message_of(tmp_path) == expected(tmp_path, "another kind of file")
    file = tmp_path / "books.txt"
    file.write_text("text")
    assert message_of(file) == (
        f"expected a dataset, found the file {file}: make a dataset of it first, by "
        f"`make data INPUT={file}` or `python -m prepare {file} --out data/books`"
    )


def test_what_the_refusals_say(tmp_path: Path) -> None:
    path, raw = tmp_path / MANIFEST_NAME, small().to_dict()

    def message(change: dict[str, Any], signed: bool = True) -> str:
        changed = raw | change
        if signed:
            sign(changed)
        path.write_bytes(json_bytes(changed))
        return message_of(tmp_path)

    remedy = "restore it or prepare again"
    altered = f"the file was altered; {remedy}"
    assert message({"checksum": "d" * 64}, signed=False) == (
        f"expected the checksum {raw['checksum'][:12]} in {path}, found dddddddddddd: {altered}"
    )
    assert message({"fingerprint": "e" * 64}) == (
        f"expected the fingerprint {raw['fingerprint'][:12]} in {path}, found eeeeeeeeeeee: "
        f"{altered}"
    )
    assert message({"splits": {"val": raw["splits"]["val"], "test": raw["splits"]["val"]}}) == (
        f"expected the splits train and val in {path}, found test, val: {remedy}"
    )
    assert message({"splits": {}}) == (
        f"expected the splits train and val in {path}, found none: {remedy}"
    )
    assert (
        message({"counts": {"read": -1}}) == f"expected counts from 0 in {path}, found -1: {remedy}"
    )
    assert message({"version": 3}).endswith("wrote it, or prepare the dataset again")
    assert re.match(rf"expected .* in {path}, found .*: {remedy}$", message({"sources": 3}))
    path.write_bytes(b"[")
    assert message_of(tmp_path).endswith(remedy)
    small().save(tmp_path)
    assert message_of(tmp_path, 2) == (
        f"expected a generation from 0 to 1 in {tmp_path}, found 2: this copy is older than the "
        "run or checkpoint that names it; copy the newer dataset here"
    )


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
            yield "hashes of 64 hex digits", lambda raw, f=field, v=value: shard(raw).update({f: v})
    yield "hashes of 64 hex digits", lambda raw: raw["tokenizer"].update(hash="none")
    for field in ("tokens", "documents", "text_bytes"):
        for value in (-1, 1 << 44):
            yield "sizes of shards from 0", lambda raw, f=field, v=value: shard(raw).update({f: v})
    yield "sizes from 0", lambda raw: raw["sources"][0].update(bytes=-1)
    yield "counts from 0", lambda raw: raw["counts"].update(read=-1)
    yield "a generation from 0", lambda raw: raw.update(generation=-1)
    yield "generations up to 0", lambda raw: shard(raw).update(generation=1)
    yield "generations up to 0", lambda raw: raw["sources"][0].update(generation=-1)
    yield "1 to 65536 token ids", lambda raw: raw["tokenizer"].update(n_vocab=0)
    yield "1 to 65536 token ids", lambda raw: raw["tokenizer"].update(n_vocab=(1 << 16) + 1)
    yield "an eot among its ids", lambda raw: raw["tokenizer"].update(eot=1 << 16)
    yield "a rule of the split", lambda raw: raw.update(split_rule={})
    yield "plain file names of its own folder", lambda raw: shard(raw).update(file="a\x1b[2J.npy")
    yield "sizes from 0", lambda raw: raw["sources"][0].update(bytes=1 << 62)
    yield "counts from 0", lambda raw: raw["counts"].update(read=1 << 62)
    yield "a generation from 0", lambda raw: raw.update(generation=1 << 31)
    yield "an eot among its ids", lambda raw: raw["tokenizer"].update(eot=-1)
    yield "a rule of the split", lambda raw: raw.update(split_rule={"rule": 1})


def test_the_largest_values_that_can_be(tmp_path: Path) -> None:
    shard = replace(small().splits["val"].shards[0], file="ü-1.a b", generation=(1 << 31) - 1)
    large = replace(shard, **dict.fromkeys(("tokens", "documents", "text_bytes"), (1 << 44) - 1))
    none = replace(shard, **dict.fromkeys(("tokens", "documents", "text_bytes"), 0))
    full = replace(
        small(),
        tokenizer=TokenizerIdentity("", 1 << 16, (1 << 16) - 1, "0" * 64),
        sources=(Source("", (1 << 62) - 1, (1 << 31) - 1), Source("", 0)),
        splits={"train": Split((large, none)), "val": Split(())},
        counts={"read": (1 << 62) - 1, "written": 0},
        generation=(1 << 31) - 1,
    )
    full.save(tmp_path)
    assert Manifest.load(tmp_path) == full
    least = replace(full, tokenizer=TokenizerIdentity("", 1, 0, "0" * 64))
    least.save(tmp_path)
    assert Manifest.load(tmp_path) == least


@pytest.mark.parametrize(("words", "change"), list(out_of_range()))
def test_a_value_out_of_range(
    manifest: Manifest, words: str, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(manifest, change)
    edit(manifest, sign)
    refused(manifest, f"^expected {words} in ")


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
