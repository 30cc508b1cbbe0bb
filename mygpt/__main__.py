"""The `mygpt` command: every command of the project under one name, in a checkout or installed.

mygpt train tiny --data data/books          what python train.py does
mygpt report log/books                      what python -m mygpt.report does
torchrun --nproc_per_node=4 -m mygpt train gpt2 --data data/web
"""

import difflib
import runpy
import sys
from pathlib import Path

import mygpt
from shards.cli import end_on_interrupt, one_line_errors

# Word -> the script or module that runs, with its first arguments, and the line of `mygpt --help`.
COMMANDS = {
    "prepare": ("prepare", "text to a dataset of token shards"),
    "shards": ("shards", "describe, verify, import and export datasets"),
    "train": ("train.py", "train a model, or resume its run"),
    "eval": ("eval.py", "loss over the validation split, questions, samples"),
    "sample": ("eval.py --no-loss", "samples from a run, within seconds"),
    "play": ("mygpt.play", "a page for the browser where runs continue what is typed"),
    "report": ("mygpt.report", "runs as one HTML page"),
    "explain": ("mygpt.explain", "the sequences of a step, ranked by their losses"),
    "export": ("mygpt.hub export", "a run's model for Hugging Face's library"),
    "import": ("mygpt.hub import", "nanoGPT's checkpoint for train and eval"),
    "doctor": ("mygpt.doctor", "what of this machine works"),
    "verify-resume": ("mygpt.doctor.verify_resume", "check that a resume is exact on this machine"),
}


def script_path(name: str) -> Path:
    """Return where train.py or eval.py lies: beside this package, or in it if it is installed."""
    installed = Path(mygpt.__file__).parent / "scripts" / name
    return installed if installed.is_file() else Path(mygpt.__file__).parents[1] / name


def usage() -> str:
    """Return the text of `mygpt --help`."""
    lines = [f"  {word:<15}{text}" for word, (_, text) in COMMANDS.items()]
    first = f"myGPT {mygpt.__version__}\n\nusage: mygpt COMMAND [...]"
    return "\n".join([first, "", *lines, "", "mygpt COMMAND --help lists the flags of a command."])


@one_line_errors()
def check(words: list[str]) -> None:
    """Answer --help and --version. Raises ValueError for a command that is not there."""
    if not words or words[0] in ("-h", "--help", "--version"):
        print(mygpt.__version__ if words == ["--version"] else usage())
        sys.exit(0 if words else 2)
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1) or ["train"]
        raise ValueError(
            f"expected one of {', '.join(COMMANDS)}, found {words[0]!r}: did you mean {near[0]}?"
        )


def main() -> None:
    """Run the command that the first word names, as if it had been started by its own name."""
    end_on_interrupt()
    check(sys.argv[1:])
    target, *first = COMMANDS[sys.argv[1]][0].split()
    sys.argv = [f"mygpt {sys.argv[1]}", *first, *sys.argv[2:]]
    if target.endswith(".py"):
        runpy.run_path(str(script_path(target)), run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
