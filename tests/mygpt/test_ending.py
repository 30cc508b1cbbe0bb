"""How a process that is one of several ranks ends."""

import subprocess
import sys

import pytest

from shards.cli import end_with
from tests.ranks import run_ranks

# Rank 0 ends with a sum under way, which the other joins while Python's lock is held to the end:
# the first that is registered is the last that is called.
LATE = """
import atexit, os, time
if os.environ["RANK"] == "0":
    atexit.register(sum, range(3 * 10**8))
from contextlib import suppress
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
dist.barrier()  # the other still asks this one's store for addresses
if os.environ["RANK"] == "1":
    time.sleep(1)
    with suppress(RuntimeError):  # the other has gone
        dist.all_reduce(torch.ones(3))
        time.sleep(6)
else:
    time.sleep(0.5)
    tensor = torch.ones(3)
    work = dist.all_reduce(tensor, async_op=True)
    del work, tensor
"""


def test_a_thread_of_gloo_that_is_late_aborts_nothing() -> None:
    run_ranks(2, LATE)


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("return 0", 0, ""),
        ("return 75", 75, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit('no such flag')", 1, "no such flag\n"),
        ("sys.stderr.close(); return 3", 3, ""),
    ],
)
@pytest.mark.parametrize("rank", [None, "0"])
def test_the_exit_code_is_the_commands(
    body: str, code: int, said: str, rank: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rank:
        monkeypatch.setenv("RANK", rank)
    else:
        monkeypatch.delenv("RANK", raising=False)
    script = "import sys\nfrom shards.cli import end_with\ndef main():\n    print('told')\n"
    command = [sys.executable, "-c", f"{script}    {body}\nend_with(main)"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "told\n", said)


def test_a_fault_keeps_its_traceback() -> None:
    def fail() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        end_with(fail)
