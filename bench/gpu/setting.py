"""What every stage of `bench.gpu` is given, and the one file that it writes its findings to.

A finding is a line of JSON, written at once: whatever ends a stage, the lines before stay.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.table import Device, Preset
from mygpt.settings import PRESETS, TrainConfig

Finding = Mapping[str, Any]
RESULTS, LOG = "results.jsonl", "log.txt"


@dataclass(frozen=True)
class Setting:
    """A stage's name, model, device, folders and end."""

    stage: str
    preset: Preset
    device: Device
    out: Path  # of the results
    work: Path  # of datasets and runs, removed in the end
    ends: float = 0.0  # time.time() at which the stage is killed

    @property
    def config(self) -> TrainConfig:
        """The preset's settings."""
        return PRESETS[self.preset][1]

    @property
    def on_gpu(self) -> bool:
        """True on CUDA."""
        return self.device == "cuda"

    @property
    def left(self) -> float:
        """Seconds until the stage is killed."""
        return self.ends - time.time()

    def note(self, finding: Finding) -> None:
        """Append a finding of the stage, with the time, to the results."""
        line = json.dumps({"stage": self.stage, "time": round(time.time(), 3)} | dict(finding))
        with open(self.out / RESULTS, "ab", buffering=0) as file:
            # The line end comes first: it also ends a line that a killed stage left incomplete.
            file.write(b"\n" + line.encode())

    def to_json(self) -> str:
        """Return it as an argument of a stage's process."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "Setting":
        """Read what `to_json` wrote."""
        values = json.loads(text)
        return cls(**values | {name: Path(values[name]) for name in ("out", "work")})


Run = Callable[[Setting], None]


def read(out: Path) -> list[dict[str, Any]]:
    """Return all findings in order; torn lines are passed over. FileNotFoundError without any."""
    path = out / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: give the folder that bench.gpu wrote to")
    return list(_parsed(path.read_text("utf-8", errors="replace").splitlines()))


def _parsed(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            finding = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(finding, dict) and "stage" in finding:
            yield finding
