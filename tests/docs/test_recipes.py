"""Every command line in the recipes is one that the programs of today understand."""

import argparse
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tyro
from torch.distributed.run import get_args_parser

import eval as evaluation
import shards.__main__
from mygpt import command_line, schedule
from mygpt.doctor import __main__ as doctor
from mygpt.hub import __main__ as hub
from mygpt.play import __main__ as play
from mygpt.report import __main__ as report
from prepare.options import Options

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "recipes").glob("*.md"))
OURS = ("python", "torchrun", "make")


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of ours in the indented blocks of a page.

    Variables of a shell become 1: what they hold is not known here.
    """
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in re.findall(r"^    +(\S.*)$", joined, re.MULTILINE):
        line = re.sub(r"\$\([^)]*\)|\$\{?\w+\}?", "1", line)
        if not re.match(rf"(?:until |srun |\w+=\S+ )*(?:{'|'.join(OURS)}) ", line):
            continue
        words = shlex.split(line.partition("; do")[0], comments=True)
        first = next(i for i, word in enumerate(words) if word in OURS)
        yield words[first:]


LINES = [(page.name, words) for page in PAGES for words in commands(page.read_text("utf-8"))]


def subcommand(known: dict[str, Callable[..., object]]) -> Callable[[list[str]], object]:
    return lambda args: tyro.extras.subcommand_cli_from_dict(
        known, args=args, config=(tyro.conf.FlagCreatePairsOff,)
    )


def parse_training(args: list[str], ranks: int = 1) -> None:
    """What train.py refuses before anything slow begins: flags, and batches that don't divide."""
    config = command_line.parse(args, "")
    if config.micro_batch:  # 0 measures one that fits
        schedule.grad_accum_steps(config, ranks)


PARSERS: dict[str, Callable[[list[str]], object]] = {
    "train.py": parse_training,
    "eval.py": evaluation.parse,
    "prepare": lambda args: tyro.cli(Options, args=args),
    "shards": subcommand(shards.__main__.COMMANDS),
    "mygpt.hub": hub.parse,
    "mygpt.play": play.parse,
    "mygpt.report": report.main,
    "mygpt.doctor": doctor.main,
}


@pytest.fixture(autouse=True)
def nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "write", lambda run, data: run)
    monkeypatch.setattr(doctor, "examine", lambda data, log_dir: iter(()))


def check(words: list[str]) -> None:
    """Parse a command; what it does not understand leaves through SystemExit or ValueError."""
    if words[1:3] == ["-m", "mygpt.launch"]:
        words = ["torchrun", *words[3:]]
    if words[0] == "make":
        check_make(words[1:])
    elif words[0] == "torchrun":
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        parser: argparse.ArgumentParser = get_args_parser()
        asked = parser.parse_args(words[1 : script + 1])
        if words[script] == "train.py":
            parse_training(words[script + 1 :], int(asked.nproc_per_node))
        else:
            PARSERS[words[script]](words[script + 1 :])
    elif words[1] == "-c":
        compile(words[2], "recipe", "exec")
    elif words[1] == "-m":
        PARSERS[words[2]](words[3:])
    else:
        PARSERS[words[1]](words[2:])


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for word in words:
        name, is_variable, _ = word.partition("=")
        assert re.search(rf"\$\({name}\b" if is_variable else rf"^{name}:", makefile, re.MULTILINE)


@pytest.mark.parametrize(("page", "words"), LINES, ids=lambda value: " ".join(value)[:60])
def test_it_is_understood(page: str, words: list[str]) -> None:
    check(words)


@pytest.mark.parametrize(
    "line",
    [
        "python train.py tiny --no-such-flag 3",
        "python train.py enormous",
        "python train.py tiny --block-size 256 --micro-batch 8",
        "python eval.py log/x --temprature 1",
        "python -m prepare a.txt",
        "python -m shards inform data/x",
        "python -m mygpt.hub export log/x",
        "torchrun --standalone --nproc_per_gpu=4 train.py",
        "torchrun --standalone train.py gpt2 --microbatch 4",
        "make train-gpu5",
        "make data IMPUT=x",
        "python -c 'print('",
    ],
)
def test_a_mistake_would_be_seen(line: str) -> None:
    with pytest.raises((SystemExit, ValueError, AssertionError, SyntaxError)):
        check(next(commands(f"    {line}\n")))


def test_every_page_has_commands_and_is_in_the_index() -> None:
    index = (ROOT / "docs" / "recipes" / "README.md").read_text("utf-8")
    linked = set(re.findall(r"\]\((\S+\.md)\)", index))
    pages = {page.name for page in PAGES} - {"README.md"}
    assert pages == linked
    assert {name for name, _ in LINES} == pages
