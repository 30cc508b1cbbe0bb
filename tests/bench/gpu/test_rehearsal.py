"""The whole of bench.gpu without a GPU, some of its stages killed in the middle.

python -m tests.bench.gpu.test_rehearsal OUT STAGE...     the same by hand, with other stages
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.__main__ import STAGES
from bench.gpu.runner import RESULTS, read

OPTIONS = ("--preset", "tiny", "--device", "cpu", "--deadline", "3000")
FOREGROUND = [stage.name for stage in STAGES if not stage.beside]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_is_killed_loses_only_its_own(tmp_path: Path) -> None:
    killed = {"smoke", "profile", "race"}
    states = rehearse(tmp_path / "out", killed)
    assert states == {
        name: "killed by SIGKILL" if name in killed else "finished" for name in FOREGROUND
    }
    found = list(read(tmp_path / "out"))
    contenders = {f["contender"] for f in found if f["stage"] == "train" and "contender" in f}
    assert contenders == {"matrix product", "myGPT", "plain", "Hugging Face"}
    assert [f["exit"] for f in found if "exit" in f] == [0, 0, 0]
    files = list((tmp_path / "out").iterdir())
    assert len(files) <= 8 and all(file.stat().st_size < 16 << 20 for file in files)
    report = [sys.executable, "-m", "bench.gpu", "--report", str(tmp_path / "out")]
    done = subprocess.run([*report, "--pictures", str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "### Marks" in done.stdout


def rehearse(out: Path, killed: Collection[str]) -> dict[str, str]:
    """Run all stages, kill some, and return how each one ended."""
    process = subprocess.Popen([sys.executable, "-m", "bench.gpu", str(out), *OPTIONS])
    left = set(killed)
    while process.poll() is None:
        time.sleep(0.2)
        found = list(read(out)) if (out / RESULTS).exists() else []
        for name in sorted(left):
            own = [f for f in found if f["stage"] == name]
            if is_in_the_middle(name, own):
                os.kill(own[0]["process"], signal.SIGKILL)
                left.remove(name)
    return {f["stage"]: f["state"] for f in read(out) if "state" in f}


def is_in_the_middle(name: str, own: list[dict[str, Any]]) -> bool:
    """After a stage's first finding; a profile has only one, at its end."""
    if name == "profile":
        return bool(own) and time.time() > own[0]["time"] + 3
    return len(own) > 1


if __name__ == "__main__":
    print(rehearse(Path(sys.argv[1]), sys.argv[2:]))
