"""Files appear whole or not at all (promise 6)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.files import (
    atomic_file,
    atomic_folder,
    json_bytes,
    move_durably,
    remove_temporaries,
    sync_folder,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_on_leaving_the_block(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with atomic_file(path) as file:
        file.write(b"abc")
        file.seek(0)
        assert file.read() == b"abc", "it can be read back"
        assert not path.exists()
        (temporary,) = names(tmp_path)
        assert re.fullmatch(r"\.a\.json\.[0-9a-f]{32}\.tmp", temporary)
    assert path.read_bytes() == b"abc" and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_keeps_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")
    with pytest.raises(error), atomic_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"before" and names(tmp_path) == ["a"]


def test_a_rename_replaces(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        with atomic_file(tmp_path / "a") as file:
            file.write(content)
    assert (tmp_path / "a").read_bytes() == b"two" and names(tmp_path) == ["a"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "no" / "a"):
        raise AssertionError("nothing was opened")
    assert not names(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from shards.files import atomic_file
with atomic_file(Path(sys.argv[1], "a")) as file:
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert (tmp_path / "a").read_bytes() == b"before"
    assert len(names(tmp_path)) == 2
    remove_temporaries(tmp_path, "a")
    assert names(tmp_path) == ["a"]


def test_durable_is_now_or_with_the_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(number), original(number))[1])
    with atomic_file(tmp_path / "a", durable=False) as file:
        file.write(b"abc")
    assert not synced and names(tmp_path) == ["a"]
    move_durably(tmp_path / "a", tmp_path / "b")
    assert len(synced) == 1 and names(tmp_path) == ["b"]
    assert (tmp_path / "b").read_bytes() == b"abc"


def test_only_leftovers_of_that_name_are_removed(tmp_path: Path) -> None:
    kept = ["a.tmp", ".a.1.json", ".b.npy.7.tmp", "val_[0].npy", ".gitignore"]
    for name in (*kept, ".val_[0].npy.12.tmp", ".val_[0].docs.parquet.3.tmp"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path, "val_[0]")
    assert names(tmp_path) == sorted(kept)


def test_a_folder_appears_whole_on_leaving_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for name in ("fsync", "rename"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, original=original: (done.append(name), original(*a))[1]
        )
    left = tmp_path / ".new.tmp"
    left.mkdir()
    (left / "of a killed writer").touch()
    (tmp_path / "new").mkdir()
    with atomic_folder(tmp_path / "new") as folder:
        assert folder == left and not names(folder), "what a killed writer left is gone"
        (folder / "inside").mkdir()
        for name in ("a", "inside/b"):
            (folder / name).write_bytes(b"abc")
        assert not names(tmp_path / "new"), "an empty folder is replaced"
    assert done == [*["fsync"] * 4, "rename", "fsync"], "content, its name, the folder above"
    assert names(tmp_path) == ["new"] and names(tmp_path / "new") == ["a", "inside"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_no_folder(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "new") as folder:
        (folder / "a").touch()
        raise error
    assert not names(tmp_path)


def test_a_folder_with_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        with pytest.raises(ValueError, match=name), atomic_folder(tmp_path / name):
            raise AssertionError("nothing was made")
    assert names(tmp_path) == ["file", "full"] and names(tmp_path / "full") == ["a"]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(value=json_values)
def test_equal_json_is_equal_bytes(value: object) -> None:
    written = json_bytes(value)
    assert json.loads(written) == value
    assert json_bytes(json.loads(written)) == written
    if isinstance(value, dict):
        assert json_bytes(dict(reversed(value.items()))) == written
    assert written.endswith(b"\n")


def test_json_is_written_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": ["ü"]})
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n  "a": [\n    "ü"\n  ],\n  "b": 1\n}\n'
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"b": object()})
    assert (
        names(tmp_path) == ["a.json"] and json.loads((tmp_path / "a.json").read_bytes())["b"] == 1
    )


def test_the_bytes_are_on_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, original=original: (done.append(name), original(*a))[1]
        )
    write_json(tmp_path / "a.json", {})
    assert done == ["fsync", "replace", "fsync"], "the file, its name, the folder"
    sync_folder(tmp_path)
    assert done[3:] == ["fsync"]
