"""Shards are standard .npy files, whole or absent (promise 6), and never wrap an id."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.files import remove_temporaries
from shards.manifest import DTYPE, INDEX_SCHEMA, Shard
from shards.writer import open_shard, to_uint16


def documents(*rows: tuple[int, int, int, int, bool]) -> pa.RecordBatch:
    columns = [list(column) for column in zip(*rows, strict=True)]
    return pa.record_batch(columns, schema=INDEX_SCHEMA)


def write(path: Path, *parts: np.ndarray) -> Shard:
    done: list[Shard] = []
    with open_shard(path, done) as writer:
        for part in parts:
            writer.note(documents((writer.tokens, 0, 7, 3, False)))
            writer.write(part)
    return done[0]


@settings(max_examples=30)
@given(parts=st.lists(st.lists(st.integers(0, 65535), max_size=20), min_size=1, max_size=5))
def test_numpy_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]]
) -> None:
    path = tmp_path_factory.mktemp("npy") / "train_00000.npy"
    shard = write(path, *(np.array(part, np.int64) for part in parts))
    expected = [token for part in parts for token in part]
    for mode in ("r", None) if expected else (None,):
        found = np.load(path, mmap_mode=mode, allow_pickle=False)
        assert found.dtype == np.uint16 and found.shape == (len(expected),)
        assert found.tolist() == expected
    assert shard.tokens == len(expected)


def test_the_file_is_byte_for_byte_numpys(tmp_path: Path) -> None:
    for length in (1, 9, 10, 99_999, 100_000):
        ids = np.arange(length).astype(np.uint16)
        write(tmp_path / "a.npy", ids[: length // 3], ids[length // 3 :])
        np.save(tmp_path / "b.npy", ids)
        assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_the_description(tmp_path: Path) -> None:
    done: list[Shard] = []
    with open_shard(tmp_path / "val_00003.npy", done) as writer:
        writer.write(np.array([50256, 1, 2, 50256, 3], np.uint32))
        writer.note(documents((0, 4, 8, 6, True), (3, 5, 0, 2, False)))
        writer.write(np.array([4], np.uint16))
        writer.note(documents((5, 5, 1, 9, False)))
        assert not done and not (tmp_path / "val_00003.npy").exists()
    (shard,) = done
    assert (shard.file, shard.index) == ("val_00003.npy", "val_00003.docs.parquet")
    assert (shard.tokens, shard.text_bytes) == (6, 17)
    assert shard.documents == 2, "one that goes on was counted where it began"
    for name, recorded in ((shard.file, shard.sha256), (shard.index, shard.index_sha256)):
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == recorded
    index = pq.read_table(tmp_path / shard.index)
    assert index.schema == INDEX_SCHEMA
    assert index["offset"].to_pylist() == [0, 3, 5]
    assert index["continued"].to_pylist() == [True, False, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == [shard.index, shard.file]


def test_the_same_tokens_are_the_same_bytes(tmp_path: Path) -> None:
    ids = np.arange(1000)
    whole = write(tmp_path / "a.npy", ids)
    again = write(tmp_path / "b.npy", ids.astype(np.uint16))
    assert whole.sha256 == again.sha256 and whole.index_sha256 == again.index_sha256


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.int32, np.uint64])
def test_ids_that_do_not_fit_are_an_error(dtype: type) -> None:
    ids = np.array([0, 65535], dtype)
    assert to_uint16(ids).dtype == DTYPE and to_uint16(ids).tolist() == [0, 65535]
    with pytest.raises(ValueError, match="from 0 to 65535, found 0 to 65536"):
        to_uint16(np.array([0, 65536], dtype))
    if np.issubdtype(dtype, np.signedinteger):
        with pytest.raises(ValueError, match="found -1 to 0"):
            to_uint16(np.array([0, -1], dtype))
    assert to_uint16(np.empty(0, dtype)).size == 0


def test_an_id_that_does_not_fit_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found 1 to 70000"):
        write(tmp_path / "a.npy", np.arange(5), np.array([1, 70000]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_inside_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    before = write(tmp_path / "a.npy", np.arange(9))
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done: list[Shard] = []
    with pytest.raises(error), open_shard(tmp_path / "a.npy", done) as writer:
        writer.write(np.arange(5))
        raise error
    assert not done and before.tokens == 9
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_an_index_that_can_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    done: list[Shard] = []
    (tmp_path / "a.docs.parquet").mkdir()
    with pytest.raises(OSError), open_shard(tmp_path / "a.npy", done) as writer:
        writer.write(np.arange(5))
    assert not done
    assert [path.name for path in tmp_path.iterdir()] == ["a.docs.parquet"]


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from shards.writer import open_shard
with open_shard(Path(sys.argv[1], "train_00000.npy"), []) as writer:
    writer.write(np.arange(50_000))
    writer._file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_no_shard(tmp_path: Path) -> None:
    code = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode
    assert code == -signal.SIGKILL if os.name == "posix" else code
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].startswith(".train_00000.npy.")
    write(tmp_path / "train_00000.npy", np.arange(3))  # the next one is not disturbed by it
    assert np.load(tmp_path / "train_00000.npy").tolist() == [0, 1, 2]
    remove_temporaries(tmp_path, "train")
    assert len(list(tmp_path.iterdir())) == 2
