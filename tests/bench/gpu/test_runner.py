"""bench.gpu's stages: one that fails, hangs or is killed loses nothing of the others."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import runner
from bench.gpu.runner import LOG, RESULTS, Runner, Setting, Stage, read
from tests.bench.gpu import fakes


def fake(name: str, *args: Any, **options: Any) -> Stage:
    return Stage(name, f"tests.bench.gpu.fakes:{name}", *args, **options)


@pytest.fixture
def base(tmp_path: Path) -> Setting:
    return Setting("all", "tiny", "cpu", tmp_path, tmp_path)


def states(out: Path) -> dict[str, str]:
    return {f["stage"]: f["state"] for f in read(out) if "state" in f}


def test_every_stage_has_its_chance(base: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [
        fake("endless", beside="all"),
        Stage("beside", "tests.bench.gpu.fakes:endless", beside="killed"),
        fake("failing", seconds=60),
        fake("killed", seconds=60),
        fake("slow", seconds=6),
        Stage("late", "tests.bench.gpu.fakes:quick", seconds=5, least=1000),
        fake("quick", seconds=60, least=1),
    ]
    unfinished = Runner(base, deadline=120).run(stages)
    found = list(read(base.out))
    assert states(base.out) == {
        "failing": "failed with exit code 1: see log.txt",
        "killed": "killed by SIGKILL",
        "slow": "out of time after 6 s",
        "late": states(base.out)["late"],
        "quick": "finished",
    }
    assert states(base.out)["late"].startswith("skipped: needs 1000 s, 1")
    assert unfinished == ["failing", "killed", "slow", "late"]
    assert [f["found"] for f in found if "found" in f] == [2, 3, 1]
    assert "ValueError: no room" in (base.out / LOG).read_text()
    assert b'{"stage": "kil\n{' in (base.out / RESULTS).read_bytes()
    child = next(f for f in found if "child" in f)
    assert 0 < child["left"] <= 6
    ticks = {
        name: [f for f in found if f["stage"] == name and "tick" in f]
        for name in ("endless", "beside")
    }
    ended = {f["stage"]: f["time"] for f in found if "state" in f}
    # In the background until the end, or until the stage beside which they run has ended.
    assert ended["killed"] < ended["slow"] - 1 < ticks["endless"][-1]["time"]
    assert ticks["beside"][-1]["time"] < ended["slow"] - 1
    for pid in (child["child"], *(own[-1]["tick"] for own in ticks.values())):
        assert not fakes.is_running(pid)
    assert "slow" in (out := capsys.readouterr().out) and "finished" in out


def test_a_stage_gets_the_time_that_later_ones_do_not_need(
    base: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: dict[str, float] = {}

    def start(self: Runner, stage: Stage, ends: float) -> Any:
        limits[stage.name] = ends - 1000
        return subprocess.Popen(["true"], process_group=0)

    monkeypatch.setattr(Runner, "start", start)
    monkeypatch.setattr("time.time", lambda: 1000.0)
    (base.out / LOG).touch()
    stages = [
        Stage("capped", "", seconds=30, least=10),
        Stage("shortened", "", seconds=500, least=10),
        Stage("at least", "", seconds=300, least=90),
        Stage("last", "", seconds=20, least=10),
        Stage("too long", "", seconds=200, least=101),
    ]
    Runner(base, deadline=100).run(stages)
    assert limits == {"capped": 30, "shortened": 10, "at least": 90, "last": 20}
    Runner(base, deadline=300).run(stages[:4])
    assert limits == {"capped": 30, "shortened": 200, "at least": 290, "last": 20}


def test_a_long_log_keeps_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MAX_LOG_BYTES", 10)
    log = tmp_path / LOG
    log.write_bytes(b"0123456789abc")
    runner.cut(log)
    assert log.read_bytes() == b"3456789abc"
    runner.cut(log)
    assert log.read_bytes() == b"3456789abc"
