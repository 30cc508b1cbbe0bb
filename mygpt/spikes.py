"""Which steps must not move the weights: those without finite numbers, and spikes if one asks.

The rule looks at the loss and the norm of the gradient alone, both the same on all ranks, and what
it remembers is part of a checkpoint: so all ranks skip the same steps, and a resumed run too.
"""

import math
from collections import deque
from typing import Any

import torch

WINDOW = 128  # norms that a spike is held against
ENOUGH = 32  # of them, before anything is called a spike
IN_A_ROW = 10  # skipped steps after which a run is beyond help
# Of the mean: steadier norms than this are not told apart from constant ones.
LEAST_DEVIATION = 0.05


class Spikes:
    """The judge of the steps of one run.

    A norm is a spike if it lies more than `deviations` standard deviations above the mean of the
    last 128 norms; 0 calls nothing a spike (the rule is that of OLMo's SkipStepOptimizer).
    """

    def __init__(self, deviations: float) -> None:
        self.deviations = deviations
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.in_a_row = 0

    def judge(self, loss: float, norm: float) -> str:
        """Why the step must be skipped, "" if it may be taken, and remember it."""
        reason = self._reason(loss, norm)
        if reason:
            self.in_a_row += 1
        else:
            self.in_a_row = 0
            self.norms.append(norm)
        return reason

    def check(self) -> None:
        """Raise ValueError after `IN_A_ROW` steps in a row without one that could be taken."""
        if self.in_a_row >= IN_A_ROW:
            raise ValueError(
                f"{self.in_a_row} steps in a row were skipped, as log.txt says: the run stands at "
                "its last checkpoint; look at what they read, go on from there with another "
                "--skip-spikes, or begin another run with a lower --max-lr"
            )

    def _reason(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(norm):
            return f"norm is {norm}"
        if not self.deviations or len(self.norms) < ENOUGH:
            return ""
        mean = math.fsum(self.norms) / len(self.norms)
        variance = math.fsum((other - mean) ** 2 for other in self.norms) / len(self.norms)
        deviation = max(math.sqrt(variance), LEAST_DEVIATION * mean)
        if norm <= mean + self.deviations * deviation:
            return ""
        return f"norm is {(norm - mean) / deviation:.1f} deviations above its mean {mean:.4f}"

    def state_dict(self) -> dict[str, Any]:
        """All that it remembers, as JSON."""
        return {"norms": list(self.norms), "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what `state_dict` returned."""
        self.norms = deque(state["norms"], maxlen=WINDOW)
        self.in_a_row = state["in_a_row"]


def fp16_overflow(scaler: torch.amp.GradScaler, loss: float, norm: float) -> str:
    """Return why fp16's loss scaler skips a step, "" if it does not.

    Overflow is how the scaler finds its scale; only at scale 1 is it a fault of the training.
    """
    if not scaler.is_enabled() or not math.isfinite(loss) or math.isfinite(norm):
        return ""
    scale = scaler.get_scale()
    return f"fp16 overflow at loss scale {scale:g}" if scale > 1 else ""
