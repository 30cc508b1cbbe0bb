"""The kernels that torch.compile writes for an H100 don't get worse unseen. No GPU is needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def written(what: str) -> dict[str, dict[str, int]]:
    """What `tests.mygpt.codegen` prints, in a process of its own: it changes torch."""
    command = [sys.executable, "-m", "tests.mygpt.codegen", what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


def test_the_loss_is_one_kernel_that_reads_the_logits_twice_or_once() -> None:
    """`logsumexp` would need one loop more each. 412 MB are read, and written with gradients."""
    assert written("loss") == {
        "row_probabilities": {"kernels": 1, "loops": 2, "megabytes": 824},
        "row_losses": {"kernels": 1, "loops": 1, "megabytes": 412},
    }


@pytest.mark.slow
def test_the_kernels_of_a_block_move_no_more_bytes_than_they_did() -> None:
    """Beside matrix products and attention, for 64 x 1024 tokens: 80 GB in 12 blocks."""
    found = written("block")
    assert found["forward"]["kernels"] <= 11 and found["forward"]["megabytes"] <= 1960
    assert found["backward"]["kernels"] <= 17 and found["backward"]["megabytes"] <= 4690
