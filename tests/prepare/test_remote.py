"""Sources and datasets in object stores: a real S3 server on loopback, and a network that fails."""

import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from shards.manifest import Manifest
from shards.tokenizer import open_tokenizer
from tests.prepare.proxy import FAULTS, Proxy
from tests.prepare.support import contents, make, run, shrink, texts, write_jsonl
from tests.s3 import s3_server

pytest.importorskip("moto")
pytest.importorskip("flask_cors")

BUCKET = "corpora"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with s3_server() as proxy:
        yield proxy


@pytest.fixture
def s3(proxy: Proxy) -> Iterator[fs.FileSystem]:
    """The server, with one empty bucket and nothing going wrong."""
    system, _ = fs.FileSystem.from_uri(
        "s3://?allow_bucket_creation=true&allow_bucket_deletion=true"
    )
    system.create_dir(BUCKET)
    proxy.requests.clear()
    yield system
    proxy.choose = lambda method, path: ""
    system.delete_dir(BUCKET)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with files of every kind, and names that are not plain, of several units."""
    folder = tmp_path / "corpus"
    documents = texts(300)
    for number, text in enumerate(documents[:60]):
        path = folder / "a b" / f"{number:02d} +%20#é.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8", newline="")
    table = pa.table({"n": range(120), "content": documents[60:180]})
    pq.write_table(table, folder / "b.parquet", row_group_size=20)
    write_jsonl(folder / "c.jsonl", documents[180:240])
    (folder / "d.jsonl.gz").write_bytes(gzip.compress((folder / "c.jsonl").read_bytes()))
    return folder


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, MIN_UNIT_BYTES=4 << 10)


def upload(system: fs.FileSystem, folder: Path) -> str:
    """Put a folder into the bucket; returns its URI."""
    fs.copy_files(str(folder), f"{BUCKET}/{folder.name}", destination_filesystem=system)
    return f"s3://{BUCKET}/{folder.name}"


def objects(system: fs.FileSystem, folder: str) -> dict[str, bytes]:
    """What lies in a folder of the bucket, as `contents` says it of a local one."""
    found = system.get_file_info(fs.FileSelector(f"{BUCKET}/{folder}"))
    files = [info for info in found if info.type == fs.FileType.File]
    return {
        info.base_name: system.open_input_file(info.path).read()
        for info in files
        if info.base_name != "prepare.log"
    }


def first(count: int, fault: str, method: str, part: str) -> Callable[[str, str], str]:
    """The fault for the first `count` requests of a method whose path has a part."""
    left = itertools.count(1)

    def choose(asked: str, path: str) -> str:
        return fault if asked == method and part in path and next(left) <= count else ""

    return choose


class TestSources:
    def test_the_bytes_are_those_of_the_same_files_here(
        self, s3: fs.FileSystem, corpus: Path, tmp_path: Path
    ) -> None:
        uri = upload(s3, corpus)
        assert contents(make(tmp_path / "far", uri)) == contents(make(tmp_path / "near", corpus))

    def test_every_other_format(self, s3: fs.FileSystem, tmp_path: Path) -> None:
        folder = tmp_path / "corpus"
        (folder / "in").mkdir(parents=True)
        (folder / "in/a.csv").write_text("id,text\n" + "".join(f'1,"{i}\n"\n' for i in range(90)))
        (folder / "in/b é.py").write_text("print(1)\n")
        (folder / "in/c.html").write_text("<p>hello")
        (folder / "in/d.png").write_bytes(b"\0")
        table = pa.table({"text": texts(60)})
        with pa.ipc.new_stream(str(folder / "e.arrow"), table.schema) as writer:
            writer.write_table(table)
        shutil.make_archive(str(folder / "f"), "zip", folder, "in")
        uri = upload(s3, folder)
        outcome = run(uri, "--out", tmp_path / "far", "--workers", 2)
        assert "2 .png" in outcome.out, outcome.err
        assert contents(tmp_path / "far") == contents(make(tmp_path / "near", folder))
        assert "nothing to do" in run(uri, "--out", tmp_path / "far").out

    def test_workers_have_clients_of_their_own(
        self, s3: fs.FileSystem, corpus: Path, tmp_path: Path
    ) -> None:
        uri = upload(s3, corpus)
        far = make(tmp_path / "far", uri, "--workers", 2)
        assert contents(far) == contents(make(tmp_path / "near", corpus))

    def test_one_object_a_glob_and_a_name_with_marks(
        self, s3: fs.FileSystem, corpus: Path, tmp_path: Path
    ) -> None:
        uri = upload(s3, corpus)
        here = [corpus / "b.parquet", f"{corpus}/*.jsonl*", corpus / "a b" / "07 +%20#é.txt"]
        there = [f"{uri}/b.parquet", f"{uri}/*.jsonl*", f"{uri}/{quote('a b/07 +%20#é.txt')}"]
        near, far = make(tmp_path / "near", *here), make(tmp_path / "far", *there)
        assert contents(far) == contents(near)

    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_read_that_fails_midway_is_retried(
        self, fault: str, proxy: Proxy, s3: fs.FileSystem, corpus: Path, tmp_path: Path
    ) -> None:
        uri = upload(s3, corpus)
        reads = itertools.count()
        proxy.choose = lambda method, _: (
            fault if method == "GET" and (n := next(reads)) % 4 == 3 and n < 40 else ""
        )
        far = make(tmp_path / "far", uri)
        assert sum(spoilt == fault for *_, spoilt in proxy.requests) == 10
        assert contents(far) == contents(make(tmp_path / "near", corpus))

    def test_what_the_client_gives_up_on_is_tried_again(
        self, proxy: Proxy, s3: fs.FileSystem, corpus: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr("shards.remote.FIRST_PAUSE_SECONDS", 0)
        uri = upload(s3, corpus)
        proxy.choose = first(3, "400", "GET", "/a%20b/")
        far = make(tmp_path / "far", uri)
        assert sum(fault == "400" for *_, fault in proxy.requests) == 3
        assert contents(far) == contents(make(tmp_path / "near", corpus))

    def test_an_outage_ends_the_run_in_one_line_and_the_next_goes_on(
        self, proxy: Proxy, s3: fs.FileSystem, corpus: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr("shards.remote.FIRST_PAUSE_SECONDS", 0)
        uri = upload(s3, corpus)
        # Planned by its name alone, and opened first by the unit that it is in.
        proxy.choose = first(10**9, "400", "GET", "/a%20b/59")
        error = run(uri, "--out", tmp_path / "far").error
        assert "corpus/a b/5" in error and "400" in error and "run the command again" in error
        proxy.choose = lambda method, path: ""
        again = run(uri, "--out", tmp_path / "far")
        assert "Resuming" in again.out
        assert contents(tmp_path / "far") == contents(make(tmp_path / "near", corpus))

    def test_an_object_that_changes_between_two_runs(
        self, proxy: Proxy, s3: fs.FileSystem, corpus: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr("shards.remote.FIRST_PAUSE_SECONDS", 0)
        uri = upload(s3, corpus)
        proxy.choose = first(10**9, "400", "GET", "/a%20b/59")
        assert run(uri, "--out", tmp_path / "far").code == 2
        proxy.choose = lambda method, path: ""
        with s3.open_output_stream(f"{BUCKET}/corpus/c.jsonl") as out:
            out.write(b'{"text": "other"}\n')
        assert "corpus/c.jsonl" in run(uri, "--out", tmp_path / "far").error

    def test_nothing_there(self, s3: fs.FileSystem, tmp_path: Path) -> None:
        for uri in (f"s3://{BUCKET}/none", f"s3://{BUCKET}/*.txt", f"s3://{BUCKET}"):
            assert uri in run(uri, "--out", tmp_path / "out").error
        assert "no-such-bucket" in run("s3://no-such-bucket/a.txt", "--out", tmp_path / "out").error


class TestOut:
    def test_the_objects_are_the_files_that_a_local_folder_gets(
        self, s3: fs.FileSystem, corpus: Path, tmp_path: Path
    ) -> None:
        outcome = run(corpus, "--out", f"s3://{BUCKET}/data/far")
        assert outcome.code == 0, outcome.err
        assert objects(s3, "data/far") == contents(make(tmp_path / "near", corpus))
        again = run(corpus, "--out", f"s3://{BUCKET}/data/far")
        assert again.code == 0
        assert "complete" in again.out

    def test_what_is_missing_is_uploaded_again(self, s3: fs.FileSystem, corpus: Path) -> None:
        out = f"s3://{BUCKET}/out"
        assert run(corpus, "--out", out).code == 0
        before = objects(s3, "out")
        s3.delete_file(f"{BUCKET}/out/train_00002.npy")
        with s3.open_output_stream(f"{BUCKET}/out/val_00003.npy") as file:
            file.write(before["val_00003.npy"][:-2])
        outcome = run(corpus, "--out", out)
        assert "Preparing 2 of" in outcome.out, outcome.err
        assert objects(s3, "out") == before

    def test_an_upload_that_fails_is_done_again(
        self, proxy: Proxy, s3: fs.FileSystem, corpus: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr("shards.remote.FIRST_PAUSE_SECONDS", 0)
        proxy.choose = first(10**9, "400", "POST", "/train_00003.npy")
        out = f"s3://{BUCKET}/out"
        assert "train_00003.npy" in run(corpus, "--out", out).error
        assert "manifest.json" not in objects(s3, "out")
        proxy.choose = first(2, "400", "POST", "/train_00004.npy")
        again = run(corpus, "--out", out)
        assert again.code == 0, again.err
        assert "Resuming: 3 of" in again.out
        assert objects(s3, "out") == contents(make(tmp_path / "near", corpus))

    @pytest.mark.parametrize("given", [False, True])
    def test_append(self, given: bool, s3: fs.FileSystem, corpus: Path, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "more.jsonl", texts(50, seed=1))
        write_jsonl(tmp_path / "val.jsonl", texts(60, seed=1)[40:])
        val = ("--val-source", tmp_path / "val.jsonl") if given else ()
        near = make(tmp_path / "near", corpus, *val)
        make(near, tmp_path / "more.jsonl", "--append")
        for arguments in ((corpus, *val), (tmp_path / "more.jsonl", "--append")):
            assert run(*arguments, "--out", f"s3://{BUCKET}/out").code == 0
        assert objects(s3, "out") == contents(near)

    def test_a_place_with_other_things_in_it(self, s3: fs.FileSystem, corpus: Path) -> None:
        with s3.open_output_stream(f"{BUCKET}/out/letter.txt") as out:
            out.write(b"dear")
        assert "letter.txt" in run(corpus, "--out", f"s3://{BUCKET}/out").error


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as reading one dataset takes, from a folder of this machine.

    Answers the real client: the description of the dataset, its tree, single paths, and ranges of
    files.
    """

    folder: Path
    repository = "someone/corpus"
    commit = "0" * 40

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api, files = f"/api/datasets/{self.repository}", f"/datasets/{self.repository}/resolve/"
        if path.startswith(f"{api}/tree/"):
            self._answer(self._tree(path.removeprefix(f"{api}/tree/").partition("/")[2]))
        elif path == api or path.startswith(f"{api}/revision/"):
            self._answer({"id": self.repository, "sha": self.commit, "siblings": []})
        elif path.startswith(files):
            self._send_range(self.folder / path.removeprefix(files).partition("/")[2])
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        asked = json.loads(self.rfile.read(size)) if size else {}
        paths = [self.folder / name for name in asked.get("paths", [])]
        self._answer([self._entry(path) for path in paths if path.exists()])

    def _tree(self, inside: str) -> list[dict[str, object]]:
        recursive = "recursive=true" in self.path.lower()
        top = self.folder / inside
        return [self._entry(path) for path in (top.rglob("*") if recursive else top.iterdir())]

    def _entry(self, path: Path) -> dict[str, object]:
        kind = "directory" if path.is_dir() else "file"
        name = path.relative_to(self.folder).as_posix()
        return {"type": kind, "oid": "0" * 40, "size": path.stat().st_size, "path": name}

    def _send_range(self, path: Path) -> None:
        content = path.read_bytes()
        first, last = 0, len(content) - 1
        if asked := self.headers.get("Range"):
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end or last), last)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self._end(content[first : last + 1])

    def _answer(self, value: object) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self._end(json.dumps(value).encode())

    def _end(self, body: bytes) -> None:
        for name, value in (("ETag", '"0"'), ("X-Repo-Commit", self.commit)):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass


def test_a_dataset_of_the_hugging_face_hub(corpus: Path, tmp_path: Path) -> None:
    Hub.folder = corpus.parent
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # The client reads its address once, when it is imported: so in a process of its own.
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
    }
    uri = f"hf://datasets/{Hub.repository}/corpus"
    command = [
        sys.executable,
        "-m",
        "prepare",
        uri,
        "--out",
        str(tmp_path / "far"),
        "--workers",
        "1",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    with mock.patch("prepare.plan.MIN_UNIT_BYTES", 4 << 20):
        near = make(tmp_path / "near", corpus)
    assert contents(tmp_path / "far") == contents(near)


def test_a_vocabulary_in_the_store(s3: fs.FileSystem, corpus: Path, tmp_path: Path) -> None:
    far = f"s3://{BUCKET}/out"
    assert run(corpus, "--out", far, "--vocab-size", 400).code == 0
    near = contents(make(tmp_path / "near", corpus, "--vocab-size", 400))
    stored = s3.open_input_stream(f"{BUCKET}/out/tokenizer.json").read()
    assert stored == near["tokenizer.json"]
    manifest = Manifest.load(far)
    assert open_tokenizer(manifest.tokenizer, manifest.location).to_json() == stored
    assert contents(make(tmp_path / "again", corpus, "--tokenizer", far)) == near
