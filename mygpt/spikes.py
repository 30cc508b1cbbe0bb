"""Skipping of steps: those with non-finite numbers, and with --skip-spikes gradient spikes.

The rule looks only at the loss and the gradient norm, which are equal on all ranks, and its state
is part of a checkpoint: so all ranks, and a resumed run, skip the same steps.
"""

import math
from collections import deque
from typing import Any

import torch

WINDOW = 128  # latest norms that a norm is compared with
ENOUGH = 32  # norms before any is called a spike
IN_A_ROW = 10  # consecutive skipped steps after which the run ends
LEAST_DEVIATION = 0.05  # lower bound of the standard deviation, as a fraction of the mean


class Spikes:
    """Spike detector over the gradient norms of one run.

    A norm is a spike if it is more than `deviations` standard deviations above the mean of the
    last 128 norms, the rule of OLMo's SkipStepOptimizer. With 0 no norm is a spike.
    """

    def __init__(self, deviations: float) -> None:
        self.deviations = deviations
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.in_a_row = 0

    def update(self, loss: float, norm: float) -> str:
        """Record a step; return why it must be skipped, "" if it must not."""
        reason = self._reason(loss, norm)
        if reason:
            self.in_a_row += 1
        else:
            self.in_a_row = 0
            self.norms.append(norm)
        return reason

    def raise_if_diverged(self) -> None:
        """Raise ValueError if the last `IN_A_ROW` steps were all skipped."""
        if self.in_a_row >= IN_A_ROW:
            raise ValueError(
                f"{self.in_a_row} steps in a row were skipped, see log.txt: look at the windows "
                "they read, resume from the last checkpoint with another --skip-spikes, or start "
                "another run with a lower --max-lr"
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
        """Return the state as JSON."""
        return {"norms": list(self.norms), "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
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
