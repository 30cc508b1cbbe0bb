"""Models out and in: folders that Hugging Face's library opens.

    python -m mygpt.hub export log/demo exported/demo       a run's model for AutoModelForCausalLM
    python -m mygpt.hub import ckpt.pt exported/nanogpt     nanoGPT's checkpoint

`train.py --init-from` and `eval.py` read such a folder.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.cli import end_on_interrupt, one_line_errors

if __name__ == "__main__":
    end_on_interrupt()

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction


@dataclass(frozen=True)
class Export:
    """Write a run's model as a folder that Hugging Face's library opens, and compare the logits."""

    run: Positional[Path]  # run, whose newest checkpoint is taken, or checkpoint
    out: Positional[Path]  # the new folder
    best: bool = False  # take the best checkpoint by validation, not the newest
    data: UseAppendAction[tuple[str, ...]] = ()  # the dataset, if it has moved; as in train.py


@dataclass(frozen=True)
class Import:
    """Write nanoGPT's checkpoint as such a folder, for train.py --init-from and eval.py."""

    checkpoint: Positional[Path]  # nanoGPT's ckpt.pt, or the folder it lies in
    out: Positional[Path]  # the new folder


def parse(args: Sequence[str] | None) -> Export | Import:
    """Read the command line."""
    return tyro.extras.subcommand_cli_from_dict(
        {"export": Export, "import": Import},
        prog="python -m mygpt.hub",
        description=__doc__,
        args=args,
        config=(FlagCreatePairsOff,),
    )


if __name__ == "__main__":  # answer --help before the imports below, which take seconds
    with one_line_errors():
        parse(sys.argv[1:])

from mygpt.hub import export


@one_line_errors()
def main(args: Sequence[str] | None = None) -> int:
    """Run the command and print what was written. Returns the exit code."""
    command = parse(args)
    if isinstance(command, Export):
        lines = export.export(command.run, command.out, command.best, command.data)
    else:
        lines = export.convert(command.checkpoint, command.out)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
