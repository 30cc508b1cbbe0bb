"""The whole bench at small size: it measures what it says, and says what it measured."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench import corpus, peers, prepare, table
from tests.prepare.support import texts

PROJECT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def small_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This project's own text, in a cache of the test's own."""
    texts = [path.read_text("utf-8") for path in sorted(PROJECT.glob("*/*.py"))]
    monkeypatch.setattr(corpus, "_files", lambda _: filter(None, texts))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(PROJECT)


def test_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    arguments = ["bench.prepare", "--megabytes", "1", "--rounds", "1", "--no-peers", "--json"]
    monkeypatch.setattr("sys.argv", arguments)
    prepare.main()
    found = json.loads(capsys.readouterr().out)
    rows = {(row["what"], row["processes"]): row for row in found["rows"]}
    all_of_them = (prepare.CEILING, prepare.POOL, prepare.PARQUET, prepare.JSONL, prepare.TXT)
    assert set(rows) == {(what, processes) for processes in (1, 2) for what in all_of_them}
    for what, processes in rows:
        row = rows[what, processes]
        ceiling = rows[prepare.CEILING, processes]["mb_s"]["median"]
        # Of a machine that does other work, so little is left that what was rounded off counts.
        rounded_off = 0.05 / ceiling + 0.001
        ratio = row["mb_s"]["median"] / ceiling
        assert row["of_ceiling"] == pytest.approx(ratio, rel=0.1, abs=rounded_off)
        # The whole process takes longer than what its log says of the work.
        assert ("mb_s_whole" in row) == ("mib" in row) == what.startswith("prepare")
        if "mib" in row:
            assert row["mb_s_whole"]["median"] <= row["mb_s"]["median"]
            # An interpreter with NumPy, Arrow and a vocabulary; at most what prepare promises.
            assert 50 < row["mib"]["median"] < 900
    assert rows[prepare.CEILING, 1]["of_ceiling"] == rows[prepare.POOL, 1]["of_pool"] == 1
    assert found["machine"]["command"].startswith("python -m bench.prepare --megabytes 1")
    text = prepare.as_text(found)
    assert all(what in text for what, _ in rows)


def test_a_prepare_that_fails_is_no_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench.prepare", "--megabytes", "1", "--rounds", "1", "--no-peers", "--json"]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(prepare, "COMMAND", ("-c", "raise SystemExit('no room')"))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    with pytest.raises(SystemExit) as leaving:
        prepare.main()
    assert leaving.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert [row["what"] for row in found["rows"]] == [prepare.CEILING, prepare.POOL]
    failed = [f"{what}, 1" for what in (prepare.PARQUET, prepare.JSONL, prepare.TXT)]
    assert list(found["failed"]) == failed
    assert found["failed"][failed[0]] == "expected prepare to succeed, found: no room"
    assert f"failed: {failed[0]}: expected prepare" in prepare.as_text(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer(name: str, tmp_path: Path) -> None:
    if not table.installed(package := peers.PACKAGES.get(name, name)):
        pytest.skip(f"{package} is not installed: the extra bench")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts(100)}), path)
    assert 0 < peers.seconds(name, path, 2) < 120


def test_a_peer_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected datatrove to run, found: .*no-such"):
        peers.seconds("datatrove", tmp_path / "no-such.parquet", 1)
