"""Text to train on, from the machine's own packages, prepared while other stages run.

Python's standard library is prepared first: little, but there within seconds.
"""

import subprocess
import sys
import time
from pathlib import Path

from bench import corpus
from bench.gpu.setting import Setting

MEGABYTES = 250
STDLIB, PACKAGES = "stdlib", "packages"


def prepare(setting: Setting) -> None:
    """Prepare both datasets in the background; for tiny models the smaller one alone."""
    _prepare(setting, "stdlib", STDLIB)
    if setting.preset != "tiny":
        _prepare(setting, str(corpus.build(MEGABYTES).parquet), PACKAGES)


def _prepare(setting: Setting, source: str, name: str) -> None:
    folder = setting.work / name
    subprocess.run([sys.executable, "-m", "prepare", source, "--out", str(folder)], check=True)
    setting.note({"dataset": name})


def find(setting: Setting, patience: float = 20) -> Path:
    """Return the largest dataset that is finished, waiting so many seconds for the larger one.

    Raises FileNotFoundError if there is none after twice as many.
    """
    names = (STDLIB,) if setting.preset == "tiny" else (PACKAGES, STDLIB)
    ends = time.time() + patience
    while True:
        found = [setting.work / n for n in names if (setting.work / n / "manifest.json").exists()]
        if found and (found[0].name == names[0] or time.time() > ends):
            return found[0]
        if time.time() > ends + patience:
            raise FileNotFoundError(
                f"expected a dataset in {setting.work}, found none: see log.txt for why"
            )
        time.sleep(0.2)
