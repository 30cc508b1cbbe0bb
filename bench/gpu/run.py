"""train.py as a user runs it: 20 steps, stopped after 10, resumed, evaluated."""

import subprocess
import sys
import time

from bench.gpu import text
from bench.gpu.setting import Setting
from bench.train import MICRO_BATCH
from mygpt import log

STEPS, KEPT_LINES = 20, 12


def run(setting: Setting) -> None:
    """Note how each command ended, and the timings that the training logged."""
    folder = setting.work / "run"
    train = [
        *("train.py", setting.preset, "--data", str(text.find(setting))),
        *("--log-dir", str(folder), "--max-steps", str(STEPS), "--device", setting.device),
        *("--micro-batch", str(MICRO_BATCH[setting.device]), "--val-tokens", "8192"),
        *("--val-interval", str(STEPS // 2), "--checkpoint-interval", str(STEPS // 2)),
    ]
    commands = {
        "start": [*train, "--stop-at", str(STEPS // 2)],
        "resume": train,
        "evaluate": ["eval.py", str(folder), "--device", setting.device, "--prompt", "def"],
    }
    for name, command in commands.items():
        started = time.time()
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, check=False
        )
        print(done.stdout, done.stderr, flush=True)
        setting.note(
            {
                "command": name,
                "exit": done.returncode,
                "seconds": round(time.time() - started, 1),
                "tail": (done.stdout + done.stderr).splitlines()[-KEPT_LINES:],
            }
        )
        if name == "resume":
            history = log.read(folder)
            setting.note({"losses": history.train, "timings": history.timings})
