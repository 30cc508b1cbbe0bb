"""Shards that are full go on in a further one; the index knows where every document lies."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.prepare.support import (
    COMPRESSORS,
    EOT,
    expected,
    held,
    law,
    make,
    shrink,
    text_of,
    texts,
    write_jsonl,
)


def test_the_index_of_a_shard(tmp_path: Path) -> None:
    documents = [text_of("train"), "é <|endoftext|>", text_of("val"), "a b\n", text_of("train")]
    offsets = write_jsonl(tmp_path / "a.jsonl", documents)
    (tmp_path / "b.md").write_text("three small words")
    out = make(tmp_path / "out", tmp_path / "a.jsonl", tmp_path / "b.md", "--val-fraction", 0.1)
    sources = {"a.jsonl": 0, "b.md": 1}
    wanted = expected(
        [
            *(("a.jsonl", *p) for p in zip(offsets, documents, strict=True)),
            ("b.md", 0, "three small words"),
        ]
    )
    for side in ("train", "val"):
        lengths = [len(document.tokens) for document in wanted[side]]
        assert pq.read_table(out / f"{side}_00000.docs.parquet").to_pylist() == [
            {
                "offset": sum(lengths[:number]),
                "source": sources[document.source],
                "row": document.row,
                "text_bytes": document.text_bytes,
                "continued": False,
            }
            for number, document in enumerate(wanted[side])
        ]
        tokens = np.load(out / f"{side}_00000.npy", allow_pickle=False)
        assert tokens.tolist() == [token for document in wanted[side] for token in document.tokens]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_full_shard_is_followed_by_another(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, MAX_SHARD_TOKENS=500, BATCH_BYTES=200, READ_BYTES=300)
    documents = texts(200)
    offsets = write_jsonl(tmp_path / "plain", documents)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSORS[suffix]((tmp_path / "plain").read_bytes()))
    out = make(tmp_path / "out", path)
    assert held(out) == expected((path.name, *p) for p in zip(offsets, documents, strict=True))
    shards = json.loads((out / "manifest.json").read_bytes())["splits"]["train"]["shards"]
    assert [shard["file"] for shard in shards[:2]] == ["train_00000.npy", "train_00000_001.npy"]
    assert [shard["file"] for shard in shards] == sorted(shard["file"] for shard in shards)
    assert all(500 <= shard["tokens"] < 1200 for shard in shards[:-1])


def test_a_document_longer_than_a_shard_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, MAX_SHARD_TOKENS=100, PIECE_BYTES=100, READ_BYTES=50)
    content = "".join(texts(30))
    (tmp_path / "long.txt.gz").write_bytes(COMPRESSORS[".gz"](content.encode()))
    write_jsonl(tmp_path / "a.jsonl", fillers := [text_of("train"), text_of("val")])
    out = make(tmp_path / "out", tmp_path / "long.txt.gz", tmp_path / "a.jsonl")
    side = next(s for s, found in held(out).items() if found[0].source == "long.txt.gz")
    assert held(out)[side][0].tokens == law(content)
    shards = json.loads((out / "manifest.json").read_bytes())["splits"][side]["shards"]
    assert len(shards) > 3
    for number, shard in enumerate(shards):
        index = pq.read_table(out / shard["index"]).to_pylist()
        first = np.load(out / shard["file"])[0]
        assert index[0]["continued"] == (number > 0)
        assert (first == EOT) == (number == 0)
    assert sum(shard["documents"] for shard in shards) == 1 + sum(
        document.source == "a.jsonl" for document in held(out)[side]
    )
    assert len(fillers) == 2
