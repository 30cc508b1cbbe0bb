"""Stages that end in every way there is."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.gpu.runner import RESULTS, Setting


def quick(setting: Setting) -> None:
    """Finishes."""
    setting.note({"found": 1})


def failing(setting: Setting) -> None:
    """Raises."""
    setting.note({"found": 2})
    raise ValueError("no room")


def killed(setting: Setting) -> None:
    """Dies within a line, as by `kill -9`."""
    setting.note({"found": 3})
    with open(setting.out / RESULTS, "ab") as file:
        file.write(b'\n{"stage": "kil')
    os.kill(os.getpid(), signal.SIGKILL)


def slow(setting: Setting) -> None:
    """Hangs, and so does a process that it has started."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    setting.note({"child": child.pid, "left": setting.ends - time.time()})
    time.sleep(60)


def endless(setting: Setting) -> None:
    """Notes something ten times per second."""
    while True:
        setting.note({"tick": os.getpid()})
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    """True if the process exists and has not ended."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
