"""Who starts ranks, and starts them again: torchrun by itself, and the Slurm script of the docs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from mygpt import checkpoint, log
from tests.dataset import VOCABULARY, write_dataset

ROOT = Path(__file__).parents[1]
SBATCH = ROOT / "docs" / "recipes" / "train.sbatch"
LONG = 250  # seconds: a busy machine, not a slow program
FLAGS = f"""--vocab-size {VOCABULARY} --block-size 16 --n-layers 1 --n-heads 2 --n-embed 8
    --total-batch-size 128 --micro-batch 2 --device cpu --max-steps 150 --val-interval 75
    --checkpoint-interval 20 --optimizer adamw""".split()

pytestmark = pytest.mark.skipif(os.name == "nt", reason="these are POSIX programs and signals")


def arguments(tmp_path: Path) -> list[str]:
    data = write_dataset(tmp_path / "data").folder
    return ["tiny", "--data", str(data), "--log-dir", str(tmp_path / "run"), *FLAGS]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


DIES_ONCE = """
import os, signal, sys
from pathlib import Path
import train
from shards.cli import end_with
take_step, mark = train.train_step, Path(sys.argv[1])

def take_step_or_die(job, stop):
    if job.step == 50 and not job.ranks.is_main and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(job, stop)

train.train_step = take_step_or_die
end_with(lambda: train.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_torchrun_starts_a_lost_rank_again(tmp_path: Path) -> None:
    script, mark, run = tmp_path / "dies_once.py", tmp_path / "died", tmp_path / "run"
    script.write_text(DIES_ONCE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1", str(script), str(mark), *arguments(tmp_path)]
    subprocess.run(command, env=environment(), check=True, timeout=LONG)
    assert mark.exists()
    assert "resume 40/150" in (run / "log.txt").read_text("utf-8")
    assert checkpoint.steps(run)[-1] == 150


# --- Slurm

# Two programs that do what Slurm's do, as far as the script needs them.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
    echo $! >> "$STATE/tasks"
done
worst=0
for task in $(jobs -p); do
    wait "$task"
    code=$?
    worst=$((code > worst ? code : worst))
done
exit $worst
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] && echo 127.0.0.1
[[ $1 == requeue ]] && echo "$2" >> "$STATE/requeued"
"""


def test_the_script_is_one() -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    text = SBATCH.read_text("utf-8")
    assert text.startswith("#!/bin/bash\n")
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert all(line.startswith("#SBATCH --") for line in options)
    # Slurm stops reading its options at the first command.
    assert text.index(options[-1]) < text.index("set -u")


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two tasks, where the two programs are found."""
    for name, program in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(program)
        (tmp_path / name).chmod(0o755)
    return environment(
        SLURM_JOB_ID=str(os.getpid()),
        SLURM_JOB_NODELIST="node[1-2]",
        SLURM_NTASKS="2",
        SLURM_NTASKS_PER_NODE="2",
        STATE=str(tmp_path),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        PYTHON=sys.executable,
    )


@pytest.mark.slow
def test_slurm_queues_again_what_was_asked_to_stop(tmp_path: Path, slurm: dict[str, str]) -> None:
    command, run = ["bash", str(SBATCH), *arguments(tmp_path)], tmp_path / "run"
    job = subprocess.Popen(command, cwd=ROOT, env=slurm, start_new_session=True)
    try:
        wait(lambda: (run / "log.txt").is_file() and max(log.read(run).train, default=0) >= 30)
        for task in (tmp_path / "tasks").read_text().split():
            os.kill(int(task), signal.SIGUSR1)
        assert job.wait(LONG) == 75
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert (tmp_path / "requeued").read_text().split() == [str(os.getpid())]
    stopped_at = checkpoint.steps(run)[-1]
    assert 30 <= stopped_at < 150

    subprocess.run(command, cwd=ROOT, env=slurm, check=True, timeout=LONG)
    assert checkpoint.steps(run)[-1] == 150
    assert f"resume {stopped_at}/150" in (run / "log.txt").read_text("utf-8")
    assert len((tmp_path / "requeued").read_text().split()) == 1


FAULTY = """
import sys, train
from shards.cli import end_with
take_step = train.train_step

def take_step_or_fail(job, stop):
    if job.step == 30 and not job.ranks.is_main:
        raise ValueError("a fault of this rank alone")
    return take_step(job, stop)

train.train_step = take_step_or_fail
end_with(lambda: train.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_slurm_does_not_queue_a_fault_again(tmp_path: Path, slurm: dict[str, str]) -> None:
    """The other rank was lost to it, and its code does not hide the fault's."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    python = tmp_path / "python"  # called with train.py and its arguments
    python.write_text(f'#!/bin/bash\nexec {sys.executable} {tmp_path}/faulty.py "$@"\n')
    python.chmod(0o755)
    command = ["bash", str(SBATCH), *arguments(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**slurm, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert done.returncode == 2
    assert not (tmp_path / "requeued").exists()
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert any("a fault of this rank alone" in line for line in lines)
    assert any("rank 0 of 2 lost the others" in line for line in lines)
    assert len(lines) == 2
