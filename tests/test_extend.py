"""`--extend`: a finished run goes on as if it had been longer, and keeps what it was."""

import json
import shutil
from pathlib import Path

import pytest

from mygpt import checkpoint, log, run_config
from mygpt.run_config import Extension
from tests.training import final_bytes, refused, start

pytestmark = pytest.mark.usefixtures("quick")

WSD = ("--schedule", "wsd")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps whose learning rate falls from step 10 on."""
    run = tmp_path_factory.mktemp("finished")
    assert start(data, run, *WSD) == 0
    return run


def test_the_checkpoint_before_the_decay_is_kept(finished: Path) -> None:
    assert checkpoint.steps(finished) == [10, 15, 20]


def test_a_wsd_run_goes_on_from_before_its_decay(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit the run that was as long from the beginning; also if it is stopped on its way."""
    longer, run = tmp_path / "longer", tmp_path / "run"
    start(data, longer, *WSD, "--max-steps", "26", "--warmup-steps", "1")
    shutil.copytree(finished, run)
    former = final_bytes(run)
    capsys.readouterr()
    assert start(data, run, *WSD, "--extend", "6", "--stop-at", "17") == 0
    told = capsys.readouterr().out
    assert "resume 10/26" in told
    assert "extend from step 10 of a run that was finished after 20" in told
    assert start(data, run, *WSD) == 0  # the same with and without the flag
    assert final_bytes(run) == final_bytes(longer)
    assert log.read(run).train == log.read(longer).train
    record = run_config.read_run(run)
    assert record is not None
    assert record.extensions == (Extension(10, 20),)
    assert (record.config.max_steps, record.config.extend) == (26, 6)
    # What had been reached is there, under another name.
    kept = checkpoint.folder_of(run, 20).with_name("step_00000020.finished")
    assert (kept / "model.safetensors").read_bytes() == former[0]
    assert start(data, run, *WSD, "--extend", "6") == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert start(data, run, *WSD, "--extend", "8") == 0
    assert checkpoint.steps(run)[-1] == 28


def test_without_such_a_checkpoint_it_goes_on_from_the_end(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(checkpoint.folder_of(run, 10))
    assert start(data, run, *WSD, "--extend", "30") == 0
    assert "so the learning rate rises again" in capsys.readouterr().out
    rates = log.read(run).series["lr"]
    assert rates[20] < rates[21] == pytest.approx(3e-3)
    assert rates[50] < rates[21]


def test_a_cosine_run_takes_the_longer_cosine(
    data: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, longer = tmp_path / "run", tmp_path / "longer"
    shutil.copytree(straight, run)
    assert start(data, run, "--extend", "10") == 0
    assert "resume 20/30" in capsys.readouterr().out
    assert checkpoint.steps(run)[-1] == 30
    start(data, longer, "--max-steps", "30", "--warmup-steps", "1")
    found, expected = log.read(run).series["lr"], log.read(longer).series["lr"]
    assert {s: found[s] for s in range(21, 31)} == {s: expected[s] for s in range(21, 31)}


def test_a_kill_while_it_is_taken_up_loses_nothing(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(record: object) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    monkeypatch.setattr("mygpt.start.set_aside_former_end", killed)
    with pytest.raises(SystemExit):
        start(data, run, *WSD, "--extend", "6")
    assert json.loads((run / "config.json").read_text())["config"]["extend"] == 6
    monkeypatch.undo()
    assert start(data, run, *WSD, "--extend", "6") == 0
    assert checkpoint.steps(run)[-1] == 26


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--extend", "5", "--stop-at", "30"), "found step 10 of 20: the command without --extend"),
        (("--extend", "-1"), "--extend must be 0 to"),
    ],
)
def test_only_a_finished_run_is_extended(
    flags: tuple[str, ...],
    message: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused(data, tmp_path / "none", *flags[:2])
    start(data, tmp_path / "run", "--stop-at", "10")
    capsys.readouterr()
    refused(data, tmp_path / "run", *flags)
    assert message in capsys.readouterr().err
