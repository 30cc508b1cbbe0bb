"""However a run is ended, in time or not, it goes on as if it had not been."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import train
from mygpt import checkpoint, log
from mygpt.distributed import DistributedContext
from mygpt.evaluate import Loss
from mygpt.stopping import EXIT_STOPPED, Stop
from mygpt.train_state import TrainState
from shards import stored_json
from tests.dataset import write_dataset
from tests.training import (
    ALONE,
    ROOT,
    arguments,
    environment,
    final_bytes,
    on_ranks,
    refused,
    start,
)

pytestmark = pytest.mark.usefixtures("quick")

posix_only = pytest.mark.skipif(os.name == "nt", reason="forks, and kills as POSIX does")


def last_lines(run: Path, count: int) -> list[str]:
    return (run / "log.txt").read_text("utf-8").splitlines()[-count:]


# --- asked to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_within_a_step_drops_the_step(
    data: Path,
    straight: Path,
    tmp_path: Path,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0
    draw_seed = train.dropout_seed

    def hear(*place: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 2 * 6 + 1:  # in the first of the two micro-steps of step 7
            signal.raise_signal(number)
        return draw_seed(*place)

    monkeypatch.setattr(train, "dropout_seed", hear)
    assert start(data, tmp_path) == (130 if number == signal.SIGINT else 75)
    assert calls == 2 * 6 + 1
    assert checkpoint.steps(tmp_path) == [5, 6]
    assert last_lines(tmp_path, 1) == [
        f"stopped by {number.name} at step 6 of 20: the same command resumes"
    ]
    monkeypatch.undo()
    assert start(data, tmp_path) == 0
    assert final_bytes(tmp_path) == final_bytes(straight)
    assert log.read(tmp_path) == log.read(straight)


def test_a_signal_within_a_validation_makes_it_be_done_again(
    data: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, calls = train.evaluate, 0

    def evaluate_and_hear(*asked: object) -> Loss:
        nonlocal calls
        calls += 1
        if calls == 3 * 9 + 2:  # in the second of the nine batches at step 20, the last one
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*asked)

    monkeypatch.setattr(train, "default_batch_size", lambda *_: 3)
    monkeypatch.setattr(train, "evaluate", evaluate_and_hear)
    assert start(data, tmp_path) == EXIT_STOPPED
    newest = checkpoint.folder_of(tmp_path, 20)
    assert checkpoint.read_state(newest)["val_loss"] is None
    assert list(log.read(tmp_path).val) == [5, 10, 15]
    assert start(data, tmp_path) == 0
    found, expected = log.read(tmp_path), log.read(straight)
    assert found.train == expected.train
    assert found.val == pytest.approx(expected.val, abs=2e-6)
    assert checkpoint.read_state(newest)["val_loss"] == pytest.approx(expected.val[20], abs=2e-6)
    assert final_bytes(tmp_path) == final_bytes(straight)
    assert start(data, tmp_path) == 0
    assert "nothing left to do" in last_lines(tmp_path, 1)[0]


def test_max_time_stops_and_the_next_start_goes_on(
    data: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(data, tmp_path, "--max-time", "0.001") == EXIT_STOPPED
    assert checkpoint.steps(tmp_path) == []
    take_step = train.train_step

    def take_step_in_time(job: TrainState, stop: Stop) -> train.StepResult:
        stop._deadline = 0 if job.step == 13 else stop._deadline
        return take_step(job, stop)

    monkeypatch.setattr(train, "train_step", take_step_in_time)
    assert start(data, tmp_path, "--max-time", "1h") == EXIT_STOPPED
    assert last_lines(tmp_path, 2) == [
        "checkpoint 13/20",
        "stopped by --max-time at step 13 of 20: the same command resumes",
    ]
    monkeypatch.undo()
    assert start(data, tmp_path, "--max-time", "2d") == 0
    assert final_bytes(tmp_path) == final_bytes(straight)


def test_max_time_is_seen_while_the_steps_are_being_measured(data: Path, tmp_path: Path) -> None:
    flags = ("--max-steps", "0", "--time-budget", "1m", "--max-time", "0.001")
    assert start(data, tmp_path, *flags) == EXIT_STOPPED
    assert "stopped by --max-time before the first step" in last_lines(tmp_path, 1)[0]
    assert not (tmp_path / "config.json").exists()


def test_a_signal_right_after_a_checkpoint_writes_no_other(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.save

    def save_and_hear(*asked: object) -> Path:
        folder = save(*asked)
        if folder.name.endswith("10"):
            signal.raise_signal(signal.SIGTERM)
        return folder

    monkeypatch.setattr(checkpoint, "save", save_and_hear)
    assert start(data, tmp_path) == EXIT_STOPPED
    assert checkpoint.steps(tmp_path)[-1] == 10
    text = (tmp_path / "log.txt").read_text("utf-8")
    assert len(re.findall("^checkpoint 10/20", text, re.MULTILINE)) == 1


RANKS = """
import hashlib, os, signal, sys, train
from shards.cli import end_with

out, rank, jobs = sys.argv[1], int(os.environ["RANK"]), []
take_step = train.train_step

def take_step_with_faults(job, stop):
    jobs[:] = [job]
    forward, calls = job.model.forward, []
    def faulty(*inputs):
        calls.append(1)
        if rank == 1 and job.step == 7 and len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        _, loss = forward(*inputs)
        return None, loss * (float("nan") if rank == 1 and job.step == 3 else 1)
    job.model.forward = faulty
    try:
        return take_step(job, stop)
    finally:
        job.model.forward = forward

def main():
    code, job = train.main(sys.argv[2:]), jobs[0]
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in job.model.parameters()))
    position = job.loader.state_dict()["position"]
    with open(f"{out}/{rank}", "w") as file:
        print(code, job.step, position, weights.hexdigest(), job.spikes.in_a_row, file=file)
    return 0

train.train_step = take_step_with_faults
end_with(main)
"""


def test_ranks_skip_and_stop_alike(data: Path, tmp_path: Path) -> None:
    """A nan on one rank is skipped by both; a signal to one of them stops both at one place."""
    run, script = tmp_path / "run", tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [*on_ranks(2), str(script), str(tmp_path), *arguments(data, run, "--micro-batch=2")]
    subprocess.run(command, env=environment(), check=True)
    one, other = ((tmp_path / name).read_text().split() for name in "01")
    assert one == other
    assert one[:3] == ["75", "8", str(8 * 128 // 16)]
    assert log.read(run).skipped == {4: "loss is nan"}
    assert list(log.read(run).train) == [1, 2, 3, 5, 6, 7, 8]
    assert checkpoint.steps(run)[-1] == 8
    assert start(data, run) == 0  # and one rank goes on
    assert checkpoint.steps(run)[-1] == 20


@pytest.mark.slow
def test_a_signal_to_torchrun_reaches_its_ranks_in_time(data: Path, tmp_path: Path) -> None:
    # Without validations, whose checkpoints say more in their line than those of other steps.
    endless = ("--micro-batch", "2", "--max-steps", "1000000", "--val-interval", "1000000")
    command = [*on_ranks(2), str(ROOT / "train.py"), *arguments(data, tmp_path, *endless)]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None and not (
                (tmp_path / "log.txt").is_file() and log.read(tmp_path).train
            ):
                time.sleep(0.1)
            process.terminate()
            assert process.wait(timeout=120) == 1
        finally:
            process.kill()
    step = checkpoint.steps(tmp_path)[-1]
    assert last_lines(tmp_path, 2) == [
        f"checkpoint {step}/1000000",
        f"stopped by SIGTERM at step {step} of 1000000: the same command resumes",
    ]


# --- killed


KILLED = """
import os, random, signal, sys, torch, train
from mygpt import checkpoint, evaluate, optim, plot
from mygpt import train_state
from shards import files

sys.modules["matplotlib.figure"] = None
torch.set_num_threads(1)
random.seed(5)
count = 0
while True:
    if (child := os.fork()) == 0:
        sys.stdout = open(os.devnull, "w")
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        if count < 12:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.02, 0.4))
        os._exit(train.main(sys.argv[1:]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    count += 1
print(count)
"""


@posix_only
@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(data: Path, straight: Path, tmp_path: Path) -> None:
    flags = ("--checkpoint-interval", "1", "--val-interval", "3", "--log-interval", "100")
    command = [sys.executable, "-c", KILLED, *arguments(data, tmp_path, *flags)]
    done = subprocess.run(command, env=environment(), check=True, stdout=subprocess.PIPE, text=True)
    assert int(done.stdout) > 0
    assert final_bytes(tmp_path) == final_bytes(straight)
    assert log.read(tmp_path).train == log.read(straight).train
    assert not list((tmp_path / "checkpoints").glob(".*"))


INSIDE = """
import os, signal, sys, torch, train
from mygpt import checkpoint, evaluate, optim, plot
from mygpt import train_state
from shards import files

sys.modules["matplotlib.figure"] = None
torch.set_num_threads(1)

def killed_in(module, name, call):
    '''A child that goes on with the run and is killed as it calls `name` for the n-th time.'''
    if (child := os.fork()) == 0:
        sys.stdout = open(os.devnull, "w")
        original, left = getattr(module, name), [call]
        def kill(*args, **keywords):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **keywords)
        setattr(module, name, kill)
        os._exit(train.main(sys.argv[1:]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, name

killed_in(train, "dropout_seed", 13)           # within step 7, after the checkpoint of step 5
killed_in(train, "evaluate", 1)                # within the validation of step 10
killed_in(checkpoint, "save_file", 2)         # within the checkpoint of step 10
killed_in(files, "sync_file", 3)              # likewise, all written and not yet renamed
killed_in(os, "rename", 1)                    # at its rename
killed_in(checkpoint.shutil, "rmtree", 3)     # while the one of step 5 is removed
assert train.main(sys.argv[1:]) == 0
"""


@posix_only
@pytest.mark.slow
def test_kills_inside_each_part_of_a_run_change_nothing(
    data: Path, straight: Path, tmp_path: Path
) -> None:
    flags = ("--checkpoint-interval", "5", "--keep", "1")
    command = [sys.executable, "-c", INSIDE, *arguments(data, tmp_path, *flags)]
    subprocess.run(command, env=environment(), check=True)
    assert final_bytes(tmp_path) == final_bytes(straight)
    assert log.read(tmp_path) == log.read(straight)
    assert not list((tmp_path / "checkpoints").glob(".*"))


# --- the disk


def can_mount() -> bool:
    command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


FULL = """
mount -t tmpfs -o size=420k tmpfs "$RUN"
"$@" 2> "$ERRORS" || echo $? > "$ERRORS.code"
ls -A "$RUN/checkpoints" > "$ERRORS.names"
mount -o remount,size=40m "$RUN"
"$@"
cp -r "$RUN" "$KEPT"
"""


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="mounting a small disk is not permitted here")
def test_a_full_disk_leaves_the_checkpoint_before(
    data: Path, straight: Path, tmp_path: Path
) -> None:
    run, errors, kept = tmp_path / "run", tmp_path / "errors", tmp_path / "kept"
    run.mkdir()
    flags = ("--checkpoint-interval", "2", "--val-interval", "20", "--keep", "99")
    command = [sys.executable, str(ROOT / "train.py"), *arguments(data, run, *flags)]
    names = {"RUN": str(run), "ERRORS": str(errors), "KEPT": str(kept)}
    shell = ["unshare", "-Urm", "sh", "-ec", FULL, "sh"]
    subprocess.run([*shell, *command], env=environment() | names, check=True)
    assert Path(f"{errors}.code").read_text() == "2\n"
    error = errors.read_text().splitlines()[-1]
    assert re.fullmatch(r"error: cannot write .*make room.*", error)
    left = Path(f"{errors}.names").read_text().split()
    assert left == [f"step_{step:08d}" for step in range(2, 2 + 2 * len(left), 2)]
    assert left
    assert final_bytes(kept) == final_bytes(straight)
    assert log.read(kept).train == log.read(straight).train


# --- what somebody has done to the files


def test_an_edited_config_is_noticed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(data, tmp_path, "--stop-at", "5")
    path = tmp_path / "config.json"
    record = json.loads(path.read_text())
    record["config"]["max_lr"] = 1e-3
    for edited, message in (
        (record, "config.json was altered"),
        (stored_json.with_checksum(record), "and its run's config.json differ"),
    ):
        path.write_text(json.dumps(edited))
        refused(data, tmp_path, "--max-lr", "1e-3")
        assert message in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_noticed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_dataset(tmp_path / "other", seed=1).folder
    start(data, tmp_path / "one", "--stop-at", "5")
    start(other, tmp_path / "two", "--stop-at", "10")
    checkpoint.folder_of(tmp_path / "two", 10).rename(checkpoint.folder_of(tmp_path / "one", 10))
    with pytest.raises(SystemExit):
        start(data, tmp_path / "one")
    assert "was trained on the dataset" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_a_damaged_checkpoint_is_passed_over(
    data: Path, straight: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run resumes from the one before, and saves the damaged one's step anew."""
    start(data, tmp_path, "--stop-at", "10", "--checkpoint-interval", "5")
    path = checkpoint.folder_of(tmp_path, 10) / f"{name}.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert start(data, tmp_path) == 0
    told = capsys.readouterr().out
    assert f"skipped a damaged checkpoint: {path} is damaged" in told
    assert "resume 5/20" in told
    assert final_bytes(tmp_path) == final_bytes(straight)
    assert log.read(tmp_path).train == log.read(straight).train
    for step in checkpoint.steps(tmp_path):
        (checkpoint.folder_of(tmp_path, step) / f"{name}.safetensors").write_bytes(b"")
    refused(data, tmp_path)
    assert "every checkpoint of" in capsys.readouterr().err


def test_a_position_that_is_not_that_of_the_step_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(data, tmp_path, "--stop-at", "5")
    folder = checkpoint.folder_of(tmp_path, 5)
    state = checkpoint.read_state(folder)
    state["loader"]["position"] += 8
    (folder / "state.json").write_bytes(checkpoint._state_bytes(state))
    refused(data, tmp_path)
    assert "expected the stream position 40 after 5 steps" in capsys.readouterr().err


def test_a_shard_lost_or_altered_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_dataset(tmp_path / "data")
    data, shard = manifest.folder, manifest.splits["train"].shards[0]
    path = manifest.path(shard.file)
    whole = path.read_bytes()
    ids = np.frombuffer(whole[-2 * shard.tokens :], np.uint16)
    altered = whole[: -2 * shard.tokens] + ((ids + 1) % 64).astype(np.uint16).tobytes()
    for content, flags, words in [
        (None, (), shard.file),
        (whole[:-2], (), shard.file),
        (altered, ("--verify",), f"expected sha256 {shard.sha256[:12]}"),
    ]:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SystemExit) as exit_:
            start(data, tmp_path / "run", *flags)
        assert exit_.value.code == 2
        assert words in capsys.readouterr().err
    path.write_bytes(whole)
    assert start(data, tmp_path / "run", "--verify", "--stop-at", "1") == 0


def test_a_rank_that_finds_a_damaged_shard_has_met_the_others(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They notice its end; while they wait for all to meet they would not."""
    met = []

    @contextmanager
    def meet(*flags: object) -> Iterator[DistributedContext]:
        met.append(flags)
        yield ALONE

    monkeypatch.setattr(train, "init_distributed", meet)
    monkeypatch.setattr(train.checks, "check_local_part", lambda _: met.append("verified"))
    assert start(data, tmp_path, "--verify", "--stop-at", "1") == 0
    assert met[1:] == ["verified"]
