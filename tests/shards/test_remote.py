"""Datasets in an object store, through the cache: a real S3 server, and a network that fails."""

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from pyarrow import fs

from shards import cache, remote
from shards.checks import verify
from shards.commands import inspect
from shards.loader import BatchReader, TokenLoader
from shards.manifest import MANIFEST_NAME, Manifest
from shards.mixture import Mixture
from shards.reader import BackgroundCheck, EvalWindows, open_tokens, read_index, token_counts
from tests.prepare.proxy import FAULTS, Proxy
from tests.s3 import s3_server
from tests.shards.support import arange_dataset, text_dataset

pytest.importorskip("moto")
pytest.importorskip("flask_cors")

BUCKET = "datasets"
ROOT = Path(__file__).parents[2]
# Of several sizes, so that what is where can't be told by size.
LENGTHS = (1000, 3000, 64, 2000, 900, 1500, 2500, 700)
BLOCK = 16


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with s3_server() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return arange_dataset(tmp_path_factory.mktemp("near") / "web", LENGTHS, (300, 50))


@pytest.fixture(scope="module")
def bucket(proxy: Proxy) -> fs.FileSystem:
    system, _ = fs.FileSystem.from_uri("s3://?allow_bucket_creation=true")
    system.create_dir(BUCKET)
    return system


@pytest.fixture
def uri(
    proxy: Proxy,
    bucket: fs.FileSystem,
    local: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    """The dataset in the bucket, an empty cache, and nothing going wrong."""
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
    yield upload(bucket, local.folder, tmp_path.name)
    proxy.choose = lambda method, path: ""
    wait_for(lambda: not cache._threads(os.getpid())[1])  # nothing is fetched into the next test
    proxy.requests.clear()


def upload(system: fs.FileSystem, folder: Path, name: str) -> str:
    fs.copy_files(str(folder), f"{BUCKET}/{name}", destination_filesystem=system)
    return f"s3://{BUCKET}/{name}"


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def rows(data: str | Path, batches: int = 40, **more: int) -> np.ndarray:
    loader = TokenLoader(data if isinstance(data, Path) else [data], "train", 8, BLOCK, **more)
    return np.concatenate([x.numpy() for x, _ in itertools.islice(loader, batches)])


def cached(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*") if len(path.name) == 64}


def gets(proxy: Proxy, name: str) -> int:
    return sum(method == "GET" and name in path for method, path, _ in list(proxy.requests))


def limit(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setenv("MYGPT_CACHE_GB", str(size / 1e9))


def test_the_stream_is_that_of_the_same_files_here(uri: str, local: Manifest) -> None:
    manifest = Manifest.load(uri)
    assert manifest == local and manifest.fingerprint == local.fingerprint
    assert (manifest.location, local.location) == (uri, str(local.folder))
    assert np.array_equal(rows(uri), rows(local.folder))
    assert np.array_equal(rows(uri, shuffle_shards=2), rows(local.folder, shuffle_shards=2))
    state = TokenLoader([uri], "train", 8, BLOCK).state_dict()
    TokenLoader(local.folder, "train", 8, BLOCK).load_state_dict(state)


def test_evaluation_reads_it_too(uri: str, local: Manifest, proxy: Proxy) -> None:
    far, near = (EvalWindows(m, "val", 7) for m in (Manifest.load(uri), local))
    assert [window.tolist() for window in far] == [window.tolist() for window in near]
    assert np.array_equal(token_counts(Manifest.load(uri), "train"), token_counts(local, "train"))
    assert all(gets(proxy, f"train_{n:05d}.npy") == 1 for n in range(len(LENGTHS)))


def test_documents_and_hashes(
    uri: str, bucket: fs.FileSystem, tmp_path: Path, proxy: Proxy
) -> None:
    text_dataset(tmp_path / "texts", [["one", "two é"], ["three"]])
    manifest = Manifest.load(upload(bucket, tmp_path / "texts", f"{tmp_path.name}-texts"))
    assert inspect.find_document(manifest, "train", 1).text() == "two é"
    assert [faults for _, faults in verify(manifest)] == [[]] * 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_read_that_fails_is_retried(fault: str, uri: str, local: Manifest, proxy: Proxy) -> None:
    reads = itertools.count()
    proxy.choose = lambda method, _: (
        fault if method == "GET" and (n := next(reads)) % 3 == 2 and n < 30 else ""
    )
    assert np.array_equal(rows(uri), rows(local.folder))
    assert sum(spoilt == fault for *_, spoilt in proxy.requests) >= 3


def test_what_the_client_gives_up_on_is_tried_again(
    uri: str, local: Manifest, proxy: Proxy
) -> None:
    reads = itertools.count()
    proxy.choose = lambda method, path: (
        "400" if ".npy" in path and method == "GET" and next(reads) % 2 == 0 else ""
    )
    assert np.array_equal(rows(uri), rows(local.folder))


def test_an_outage_ends_in_one_line(uri: str, proxy: Proxy) -> None:
    loader = TokenLoader([uri], "train", 8, BLOCK)
    proxy.choose = lambda method, path: "400" if ".npy" in path else ""
    with pytest.raises(
        OSError, match=r"expected to read s3://.*npy, found in 6 attempts"
    ) as caught:
        next(loader)
    assert "\n" not in str(caught.value) and "run the command again" in str(caught.value)
    proxy.choose = lambda method, path: "400"
    with pytest.raises(OSError, match=f"{uri}/{MANIFEST_NAME}, found in 6 attempts"):
        Manifest.load(uri)


def test_what_is_not_there(uri: str, bucket: fs.FileSystem) -> None:
    with pytest.raises(
        FileNotFoundError, match=f"{uri}-no/{MANIFEST_NAME}, found no such file"
    ) as got:
        TokenLoader([f"{uri}-no"], "train", 8, BLOCK)
    assert "\n" not in str(got.value)
    name = uri.removeprefix("s3://")
    bucket.delete_file(f"{name}/train_00001.npy")
    with pytest.raises(FileNotFoundError, match=r"train_00001\.npy, found no such file"):
        rows(uri)


def test_an_altered_shard_is_refused_on_arrival(
    uri: str, bucket: fs.FileSystem, tmp_path: Path, local: Manifest
) -> None:
    content = bytearray(local.path("train_00001.npy").read_bytes())
    content[1000] ^= 1
    with bucket.open_output_stream(f"{uri.removeprefix('s3://')}/train_00001.npy") as out:
        out.write(bytes(content))
    with pytest.raises(ValueError, match=r"expected sha256 .* of s3://.*train_00001.npy, found"):
        rows(uri)
    shards = local.splits["train"].shards
    assert cached(tmp_path / "cache") <= {shard.sha256 for shard in shards} - {shards[1].sha256}


@pytest.mark.parametrize("size", [0, 64, 200])
def test_a_damaged_file_in_the_cache_is_fetched_again(
    uri: str, local: Manifest, tmp_path: Path, proxy: Proxy, size: int
) -> None:
    manifest = Manifest.load(uri)
    shard = manifest.splits["train"].shards[1]
    for _ in range(2):
        assert open_tokens(manifest, shard)[-1] == open_tokens(local, shard)[-1]
        assert read_index(manifest, shard) == read_index(local, shard)
        for name in (shard.sha256, shard.index_sha256):
            path = tmp_path / "cache" / name
            path.write_bytes(path.read_bytes()[:size])
    assert gets(proxy, shard.file) == gets(proxy, shard.index) == 2


def test_what_is_fetched_is_on_disk_before_it_has_its_name(
    uri: str, local: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("replace"), replace(*a)))
    shard = local.splits["train"].shards[1]
    cache.open_file(uri, shard.file, shard.sha256).close()
    assert events == ["fsync", "replace"]


def test_verify_reads_the_store_and_not_the_cache(
    uri: str, bucket: fs.FileSystem, tmp_path: Path, local: Manifest
) -> None:
    manifest = Manifest.load(uri)
    rows(uri)
    shards = local.splits["train"].shards
    cached_file = tmp_path / "cache" / shards[3].sha256
    cached_file.write_bytes(bytes(cached_file.stat().st_size))
    assert not any(faults for _, faults in verify(manifest)), "the cache is not the dataset"
    content = bytearray(local.path("train_00001.npy").read_bytes())
    content[1000] ^= 1
    with bucket.open_output_stream(f"{uri.removeprefix('s3://')}/train_00001.npy") as out:
        out.write(bytes(content))
    with bucket.open_output_stream(f"{uri.removeprefix('s3://')}/train_00002.npy") as out:
        out.write(local.path("train_00002.npy").read_bytes()[:-1])
    found = [line for _, faults in verify(manifest) for line in faults]
    assert len(found) == 2 and "expected sha256" in found[0]
    assert f"{uri}/train_00002.npy, a .npy file of 256 bytes, found 255" in found[1]


def test_the_background_check_compares_sizes(uri: str, bucket: fs.FileSystem) -> None:
    manifest = Manifest.load(uri)
    parts = [(manifest, manifest.splits["train"].shards)]

    def swept() -> BackgroundCheck:
        background = BackgroundCheck(parts)
        background.join()
        return background

    swept().check()
    name = f"{uri.removeprefix('s3://')}/train_00003.npy"
    with bucket.open_output_stream(name) as out:
        out.write(b"short")
    with pytest.raises(ValueError, match=r"expected 4128 bytes in s3://.*3.npy, found 5"):
        swept().check()
    bucket.delete_file(name)
    with pytest.raises(FileNotFoundError, match=r"train_00003\.npy, found no such file"):
        swept().check()


def test_the_cache_keeps_within_its_size(
    uri: str, local: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.loader.READ_TOKENS", 1)
    room = 2 * (3000 + 2500 + 2000 + 1500) + 4 * 128
    limit(monkeypatch, room)
    loader = TokenLoader([uri], "train", 8, BLOCK, shuffle_shards=2)
    near = TokenLoader(local.folder, "train", 8, BLOCK, shuffle_shards=2)
    seen = set[str]()
    for _ in range(3 * loader.windows_per_epoch // 8):
        assert np.array_equal(next(loader)[0], next(near)[0])
        seen |= cached(tmp_path / "cache")
        with FileLock(tmp_path / "cache" / "room.lock"):
            sizes = {path.stem: found.st_size for path, found in cache._kept()}
        assert sum(sizes.values()) <= room
    assert seen >= {shard.sha256 for shard in local.splits["train"].shards}, "all of it came by"
    reader = loader._reader._readers[0]
    reader.close_evicted()
    assert {reader.shards[i].sha256 for i in reader._open} <= cached(tmp_path / "cache")


def test_a_cache_that_is_too_small_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 12_000)
    with pytest.raises(ValueError, match=r"expected .* GB in the cache .*--shuffle-shards"):
        TokenLoader([uri], "train", 8, BLOCK)
    assert TokenLoader([uri], "train", 8, BLOCK, shuffle_shards=1)
    limit(monkeypatch, 1000)
    with pytest.raises(ValueError, match=r"room for a file .*: set MYGPT_CACHE_GB"):
        token_counts(Manifest.load(uri), "train")
    monkeypatch.setenv("MYGPT_CACHE_GB", "much")
    with pytest.raises(ValueError, match="expected MYGPT_CACHE_GB above 0, found 'much'"):
        TokenLoader([uri], "train", 8, BLOCK)


def test_what_comes_next_is_fetched_ahead(uri: str, tmp_path: Path) -> None:
    loader = TokenLoader([uri], "train", 1, BLOCK, shuffle_shards=3)
    next(loader)
    order = list(loader._reader.stream.streams[0].upcoming_shards(0))
    assert len(order) == 6
    wanted = {loader._reader._readers[0].shards[i].sha256 for i in order}
    wait_for(lambda: wanted <= cached(tmp_path / "cache"))


def test_many_threads_fetch_a_file_once(uri: str, local: Manifest, proxy: Proxy) -> None:
    shard = local.splits["train"].shards[1]

    def content(_: int) -> bytes:
        with cache.open_file(uri, shard.file, shard.sha256) as file:
            return file.read()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(content, range(16))) == {local.path(shard.file).read_bytes()}
    assert gets(proxy, shard.file) == 1


READ = """
import sys
from shards.mixture import Mixture
from shards.loader import BatchReader
rows = BatchReader(Mixture.load([sys.argv[1]]), "train", 4, 16, int(sys.argv[2]), 2, 0, 0)
print(sum(int(rows.read().sum()) for _ in range(100)))
"""


def test_ranks_share_one_cache(uri: str, local: Manifest, proxy: Proxy) -> None:
    def total(rank: int, data: str) -> int:
        mixed = BatchReader(Mixture.load([data]), "train", 4, 16, rank, 2, 0, 0)
        return sum(int(mixed.read().sum()) for _ in range(100))

    started = [
        subprocess.Popen(
            [sys.executable, "-c", READ, uri, str(rank)], cwd=ROOT, stdout=subprocess.PIPE
        )
        for rank in range(2)
    ]
    answers = [int(process.communicate(timeout=120)[0]) for process in started]
    assert answers == [total(rank, str(local.folder)) for rank in range(2)]
    assert [gets(proxy, f"train_{n:05d}.npy") for n in range(len(LENGTHS))] == [1] * len(LENGTHS)


def test_what_a_killed_process_left_is_cleared_away(
    uri: str, local: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    shard = local.splits["train"].shards[0]
    size = local.path(shard.file).stat().st_size
    for number in (0, 1):  # under its own lock, and under another's
        (folder / f"{shard.sha256[:7]}{number}{shard.sha256[8:]}{cache.PARTIAL}").write_bytes(
            b"x" * size
        )
    (folder / f"{shard.sha256}{cache.PARTIAL}").write_bytes(b"half")
    limit(monkeypatch, size + 10)
    with cache.open_file(uri, shard.file, shard.sha256) as file:
        assert file.read() == local.path(shard.file).read_bytes()
    assert not list(folder.glob(f"*{cache.PARTIAL}"))


def test_room_is_waited_for_while_another_fetches(
    uri: str, local: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = local.splits["train"].shards[:2]
    limit(monkeypatch, 2 * 3000 + 128 + 10)
    (tmp_path / "cache").mkdir()
    with cache._lock_of(first.sha256):
        (tmp_path / "cache" / f"{first.sha256}{cache.PARTIAL}").write_bytes(b"x" * 1000)
        thread = threading.Thread(
            target=lambda: cache.open_file(uri, second.file, second.sha256).close()
        )
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join(60)
    assert cached(tmp_path / "cache") == {second.sha256}


@pytest.mark.slow
def test_a_run_reads_a_mixture_from_a_store(
    uri: str, bucket: fs.FileSystem, tmp_path: Path
) -> None:
    for name in ("web", "code"):
        long = [[f"the {name} is {i} " * 300] for i in range(3)]
        text_dataset(tmp_path / name, long, [[f"val {name} " * 300]])
        upload(bucket, tmp_path / name, f"{tmp_path.name}-{name}")
    run = tmp_path / "log"
    sizes = "--block-size 64 --total-batch-size 512 --micro-batch 4 --n-layers 1 --n-embed 32"
    train = [
        *("train.py", "tiny", "--data", f"web=0.7:{uri}-web", "--data", f"code=0.3:{uri}-code"),
        *("--log-dir", str(run), "--device", "cpu", "--n-heads", "2", *sizes.split()),
    ]
    for command in (
        [*train, "--max-steps", "6", "--stop-at", "3"],
        [*train, "--max-steps", "6"],
        ["eval.py", str(run), "--num-samples", "0"],
        ["-m", "shards", "explain", "--run", str(run), "--step", "5", "--row", "3"],
        ["-m", "shards", "verify", f"{uri}-web"],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=280,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
