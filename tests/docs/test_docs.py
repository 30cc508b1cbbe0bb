"""The documents name nothing that isn't there: files, names in modules, commands, flags, links.

What a user makes or brings has no file here, so these are taken for placeholders: words in capitals
(NAME, FOLDER, OUT, RUN), and paths into the folders of `USER_FOLDERS`.
"""

import ast
import functools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from itertools import zip_longest
from pathlib import Path

import pytest

from mygpt.__main__ import COMMANDS as MYGPT
from tests.docs import spine
from tests.docs.pages import PACKAGES, PAGES, ROOT, code_lines, code_spans, line_count

USER_FOLDERS = {"data", "log", "exported", "checkpoints", "your-name", ".prepare"}
PROJECT_FOLDERS = {"bench", "docs", "mygpt", "prepare", "shards", "tests"}
# Files that a command writes, whose names look like those of modules.
OUTPUT_FILES = {"prepare.log"}
# Files of this project's ancestor, which the README translates for those who know it.
ANCESTOR = {"train_small.py", "data_loader.py"}
# Flags of other programs that stand alone in the text.
FOREIGN_FLAGS = {
    *("--gpus-per-node", "--nodes", "--requeue", "--signal"),  # sbatch
    *("--master-addr", "--max-restarts", "--nnodes", "--node-rank", "--signals-to-handle"),
    *("--no-deps", "--model"),  # pip, lm_eval
}
HIDDEN_FLAGS = {"--tyro-print-completion"}  # of every command whose flags come from tyro
COMMANDS = (
    *("train.py", "eval.py", "prepare", "shards", "mygpt.hub", "mygpt.report"),
    *(
        "mygpt.play",
        "mygpt.explain",
        "mygpt.doctor",
        "mygpt.doctor.verify_resume",
    ),
    "mygpt.launch",
)
# Commands that hand flags they don't know themselves to train.py.
TRAINING = ("mygpt.doctor.verify_resume", "docs/recipes/train.sbatch")

PATH = re.compile(r"(?<![\w/.$~-])((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|md|toml|sbatch))(?![\w/*{])")
NAME = re.compile(rf"(?<![\w/.])((?:{'|'.join((*PACKAGES, 'bench'))})(?:\.[A-Za-z_]\w*)+)(?![\w/])")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*+(?!<TAB>)")
COMMAND = re.compile(
    r"\bpython3? -m (?P<module>[\w.]+)|(?<![\w/])(?P<script>(?:\w+/)*\w+\.(?:py|sbatch))\b"
    r"|(?<![\w/.'-])mygpt (?P<word>[a-z][\w-]*)(?![\w/.'|-])"
)
LINK = re.compile(r"\]\(([^)\s]+)\)")

# --help of every command, in one process and without torch, subcommands included.
HELP = """
import contextlib, io, json, re, runpy, sys

def help_of(*words):
    sys.argv = [*words, "--help"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        if words[0].endswith(".py"):
            runpy.run_path(words[0], run_name="__main__")
        else:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    return out.getvalue()

texts = {}
for command in sys.argv[1:]:
    texts[command] = help_of(command)
    subcommands = re.search(r"\\[-h\\] \\{([\\w,]+)\\}", texts[command])
    for name in subcommands[1].split(",") if subcommands else ():
        texts[command] += help_of(command, name)
print(json.dumps(texts))
"""


@functools.cache
def help_texts() -> dict[str, str]:
    """Command -> what its --help says, that of its subcommands included."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HELP, *COMMANDS],
        cwd=ROOT,
        env={"COLUMNS": "200", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@functools.cache
def flags() -> dict[str, set[str]]:
    """Command -> its flags."""
    # A flag is defined at the left edge of the text; those within sentences are not.
    defined = re.compile(r"^(?:│ |  )(?:-\w, )?(--[\w-]+(?:, --[\w-]+)*)", re.MULTILINE)
    found = {
        command: {flag for line in defined.findall(text) for flag in line.split(", ")}
        for command, text in help_texts().items()
    }
    for command in TRAINING:
        found[command] = found.get(command, set()) | found["train.py"]
    benchmarks = {f"bench.{path.stem}": of_dataclass(path) for path in ROOT.glob("bench/*.py")}
    benchmarks["bench.gpu"] = of_dataclass(ROOT / "bench/gpu/__main__.py")
    return found | benchmarks


def of_dataclass(path: Path) -> set[str]:
    """The flags of a benchmark, from the class Options in its source: its imports are heavy."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == "Options":
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    name = ast.unparse(field.target).replace("_", "-")
                    found |= {f"--{name}"}
                    found |= {f"--no-{name}"} if ast.unparse(field.annotation) == "bool" else set()
    return found


@functools.cache
def source_files() -> set[str]:
    """Every file of the project's folders, by its path in the tree."""
    inner = (p for name in PROJECT_FOLDERS for p in (ROOT / name).rglob("*") if p.is_file())
    outer = (path for path in ROOT.iterdir() if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in (*inner, *outer)}


def missing_paths(text: str, folder: Path) -> Iterator[str]:
    """Paths in code that are not in the tree, nor beside the page.

    The first folders of a file's path may be left out. Blocks of code and spans of several words
    hold other things with slashes too: there only Python files and the project's folders count.
    """
    spans = code_spans(text)
    for code in (*spans, *code_lines(text)):
        for path in PATH.findall(code.partition("::")[0]):
            first = path.partition("/")[0]
            is_span = code == path and code in spans
            if not (is_span or path.endswith(".py") or first in PROJECT_FOLDERS):
                continue
            if first in USER_FOLDERS or first.isupper() or path in ANCESTOR:
                continue
            if (ROOT / path).exists() or (folder / path).exists():
                continue
            if not any(name.endswith(f"/{path}") for name in source_files()):
                yield path


def product_files() -> list[Path]:
    """The Python files of the packages, but for the empty ones that make them packages."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return [path for path in files if path.name != "__init__.py"]


def module_file(name: str) -> str:
    """The file of a module or package in the tree; "" where there is none."""
    stem = name.replace(".", "/")
    for path in (f"{stem}.py", f"{stem}/__init__.py"):
        if (ROOT / path).is_file():
            return path
    return ""


def missing_names(text: str) -> Iterator[str]:
    """Dotted names of modules, and of what is defined in them, that are not there."""
    for code in (*code_lines(text), *code_spans(text)):
        for name in set(NAME.findall(code)) - OUTPUT_FILES:
            parent, _, last = name.rpartition(".")
            if module_file(name):
                continue
            source = (ROOT / file).read_text("utf-8") if (file := module_file(parent)) else ""
            if not re.search(rf"^(?:class |def )?{last}\b", source, re.MULTILINE):
                yield name
    for constant, path in re.findall(r"`([A-Z_]+)` in `([\w/]+\.py)`", text):
        source = (ROOT / path).read_text("utf-8") if (ROOT / path).is_file() else ""
        if not re.search(rf"^{constant}\b", source, re.MULTILINE):
            yield f"{constant} in {path}"
    for variable in set(re.findall(r"\bMYGPT_\w+", text)):
        if not any(f'"{variable}"' in path.read_text("utf-8") for path in product_files()):
            yield variable


def is_runnable(module: str) -> bool:
    """True if `python -m MODULE` runs it: one of our commands, or an installed program."""
    first = module.partition(".")[0]
    if first in (*PACKAGES, "bench"):
        return bool(flags().get(module))
    if first in PROJECT_FOLDERS:
        return (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
    # Not importlib.util.find_spec: setuptools hooks into it, and warns once distutils is loaded.
    return PathFinder.find_spec(first) is not None


def command_faults(text: str) -> Iterator[str]:
    """Commands that can't be run, targets that make does not know, flags that a command lacks."""
    for code in (*code_lines(text), *code_spans(text)):
        yield from make_faults(code)
        matches = list(COMMAND.finditer(code))
        for match, following in zip_longest(matches, matches[1:]):
            end = following.start() if following else len(code)
            command = match["module"] or match["script"]
            if word := match["word"]:
                command = MYGPT.get(word, ("",))[0].partition(" ")[0] or f"mygpt {word}"
                yield from (() if word in MYGPT else (command,))
            if match["module"] and not is_runnable(command):
                yield f"python -m {command}"
            arguments = re.split(r"[;|&]", code[match.end() : end])[0]
            if command in flags():
                yield from (
                    f"{command} {f}" for f in FLAG.findall(arguments) if unknown(f, command)
                )
        if code.startswith("--"):
            yield from (flag for flag in FLAG.findall(code) if unknown(flag))


def unknown(flag: str, command: str = "") -> bool:
    """True if a command lacks a flag; without a command, if all do."""
    if command:
        return flag not in flags()[command] | HIDDEN_FLAGS
    return flag not in FOREIGN_FLAGS.union(*flags().values())


def make_faults(code: str) -> Iterator[str]:
    """Targets and variables of `make ...` that are not in the Makefile, and flags given by ARGS."""
    if not code.startswith("make "):
        return
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for word in shlex.split(code)[1:]:
        name, is_variable, value = word.partition("=")
        used = rf"\$\({name}\b|^{name} \?=" if is_variable else rf"^{name}:"
        if not re.search(used, makefile, re.MULTILINE):
            yield f"make {name}{is_variable}"
        yield from (flag for flag in FLAG.findall(value) if unknown(flag))


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, page: Path) -> Iterator[str]:
    """Links to files that are not there, or to headings that a page does not have."""
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in slugs(target)):
            yield link


@pytest.fixture(params=PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_every_file_is_there(page: Path) -> None:
    assert not list(missing_paths(page.read_text("utf-8"), page.parent))


def test_every_name_is_there(page: Path) -> None:
    assert not list(missing_names(page.read_text("utf-8")))


def test_every_command_is_understood(page: Path) -> None:
    assert not list(command_faults(page.read_text("utf-8")))


def test_every_link_leads_somewhere(page: Path) -> None:
    assert not list(broken_links(page.read_text("utf-8"), page))


def test_the_flags_are_found() -> None:
    assert {"--data", "--max-steps", "--gradient-checkpointing"} <= flags()["train.py"]
    assert {"--help", "--out", "--val-fraction"} <= flags()["prepare"]
    assert {"--step", "--run", "--plot"} <= flags()["shards"]  # of its subcommands
    assert {"--steps", "--data"} <= flags()["mygpt.doctor.verify_resume"]
    assert {"--preset", "--no-json"} <= flags()["bench.train"]
    assert all(flags()[command] for command in COMMANDS)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("see `mygpt/no_such.py`", "mygpt/no_such.py"),
        ("see `no_such.py`", "no_such.py"),
        ("see `docs/recipes/no-such/`", "docs/recipes/no-such/"),
        ("run\n\n    python no_such.py x\n", "no_such.py"),
        ("`tests/no_such.py::test_x`", "tests/no_such.py"),
    ],
)
def test_a_missing_file_would_be_seen(text: str, fault: str) -> None:
    assert list(missing_paths(text, ROOT / "docs")) == [fault]


def test_placeholders_are_no_files() -> None:
    text = """`data/NAME`, `log/web/log.txt`, `FOLDER/a.json`, `OUT`, `s3://bucket/x`, `/mnt/a/b`

        python train.py small --data web=0.7:data/web    step 430/434, tok/s
    """
    assert not list(missing_paths(text, ROOT / "docs"))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("`mygpt.no_such.train_step`", "mygpt.no_such.train_step"),
        ("`shards.loader.NoSuchLoader`", "shards.loader.NoSuchLoader"),
        ("`NO_SUCH` in `shards/reader.py`", "NO_SUCH in shards/reader.py"),
        ("`MYGPT_NO_SUCH`", "MYGPT_NO_SUCH"),
    ],
)
def test_a_missing_name_would_be_seen(text: str, fault: str) -> None:
    assert list(missing_names(text)) == [fault]
    assert not list(missing_names("`shards.loader.TokenLoader`, `mygpt.model`, `MYGPT_CACHE`"))


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("python -m bench.no_such --preset gpt2", "python -m bench.no_such"),
        ("python -m shards.order", "python -m shards.order"),
        ("python -m mygpt.pretrained export log/a", "python -m mygpt.pretrained"),
        ("python train.py small --no-such 3 --seed 1", "train.py --no-such"),
        ("torchrun --standalone train.py gpt2 --microbatch 4", "train.py --microbatch"),
        ("python -m prepare a.txt --out data/a --worker 3 && make eval", "prepare --worker"),
        ("python -m shards explain --run log/a --stpe 3", "shards --stpe"),
        ("sbatch -n 2 docs/recipes/train.sbatch --dta x", "docs/recipes/train.sbatch --dta"),
        ("mygpt trian tiny", "mygpt trian"),
        ("mygpt train tiny --sede 1", "train.py --sede"),
        ("torchrun -m mygpt export log/a out --bets", "mygpt.hub --bets"),
        ("make train-gpu5 DATA=data/web", "make train-gpu5"),
        ("make data IMPUT=x", "make IMPUT="),
        ("make eval ARGS='--no-such 3'", "--no-such"),
    ],
)
def test_a_wrong_command_would_be_seen(code: str, fault: str) -> None:
    assert list(command_faults(f"text\n\n    {code}\n\ntext")) == [fault]
    assert list(command_faults(f"some `{code}` here")) == [fault]


def test_a_flag_that_stands_alone_is_one_of_ours() -> None:
    assert list(command_faults("`--seed 3`, `--requeue` and `--no-such=4`")) == ["--no-such"]


def test_a_broken_link_would_be_seen() -> None:
    readme = ROOT / "README.md"
    text = "[a](docs/SCALE.md#the-plan) [b](docs/SCALE.md#no-such) [c](no.md) [d](https://x.y/z)"
    assert list(broken_links(text, readme)) == ["docs/SCALE.md#no-such", "no.md"]


# Prompts: in GPT-2's BPE a space belongs to the word after it, so a prompt that ends in one is
# hardly ever continued as a text would be.
PROMPT = re.compile(r"""(?:prompt[= ]|PROMPT=)(['"])(?P<prompt>(?:(?!\1).)*)\1""", re.DOTALL)


def prompts_ending_in_a_space(text: str) -> list[str]:
    return [match["prompt"] for match in PROMPT.finditer(text) if match["prompt"].endswith(" ")]


@pytest.mark.parametrize(
    "path", [*PAGES, ROOT / "Makefile", *product_files(), *ROOT.glob("*.py")], ids=str
)
def test_no_example_prompt_ends_in_a_space(path: Path) -> None:
    assert not prompts_ending_in_a_space(path.read_text("utf-8"))


def test_a_prompt_that_ends_in_a_space_would_be_seen() -> None:
    text = (
        """eval.py --prompt 'The ' --sample-prompt "def " --prompt 'a b'; make sample PROMPT='x '"""
    )
    assert prompts_ending_in_a_space(text) == ["The ", "def ", "x "]
    assert PROMPT.search((ROOT / "docs" / "recipes" / "own-text.md").read_text("utf-8"))


# --help: a flag or a positional argument, at the left edge, has its text beside or below it.
SECTION = re.compile(r"^(?:╭─ )?(positional arguments|(?:[\w-]+ )?options)\b")
ARGUMENT = re.compile(r"^ {2}(?P<name>\S+(?: \S+)*)(?: {2,}(?P<text>\S.*))?$")


def without_text(text: str) -> Iterator[str]:
    """Arguments in a --help that have no text but a default."""
    lines = [re.sub(r"^│", " ", line).rstrip("│ ") for line in text.splitlines()]
    section = ""
    for line, following in zip_longest(lines, lines[1:], fillvalue=""):
        if heading := SECTION.match(line):
            section = heading[1]
        elif not line or line.startswith("╰"):
            section = ""
        match = ARGUMENT.match(line)
        if section and match and (section.startswith("pos") or match["name"].startswith("-")):
            below = re.match(r" {6,}(\S.*)", following)
            words = match["text"] or (below[1] if below else "")
            if not words or words.startswith("(default"):
                yield match["name"]


def test_every_flag_has_a_text() -> None:
    texts = {name: text for name, text in help_texts().items() if name != "mygpt.launch"}
    assert "torchrun" in help_texts()["mygpt.launch"]  # whose help is not ours
    assert not [
        (name, *without_text(text)) for name, text in texts.items() if [*without_text(text)]
    ]


def test_a_flag_without_a_text_would_be_seen() -> None:
    box = "╭─ options ──╮\n│ --a INT    (default: 1)  │\n│ --b INT  text │\n│ --c STR   │\n╰──╯"
    assert list(without_text(box)) == ["--a INT", "--c STR"]
    argparse = (
        "positional arguments:\n  ranks\n\noptions:\n  --device {a,b}\n  --out OUT   text\n"
        "  --long {a,b}\n              text\n"
    )
    assert list(without_text(argparse)) == ["ranks", "--device {a,b}"]


# The tables of ARCHITECTURE.md: under a heading "### `prepare/`", the first cell of each row names
# files by their path in that folder.


def listed_files(text: str) -> list[str]:
    found: list[str] = []
    for section in re.split(r"^#+ ", text, flags=re.MULTILINE):
        if heading := re.match(r"`(\w+)/`", section):
            for cell in re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE):
                files = re.findall(r"`([\w/]+\.py)`", cell)
                found += [f"{heading[1]}/{file}" for file in files]
    return found


def test_the_architecture_lists_every_file_once() -> None:
    listed = listed_files((ROOT / "docs" / "ARCHITECTURE.md").read_text("utf-8"))
    actual = {path.relative_to(ROOT).as_posix() for path in product_files()}
    assert actual - set(listed) == set(), "not listed"
    assert set(listed) - actual == set(), "listed, but not there"
    assert len(listed) == len(actual), "listed twice"


def test_a_file_that_is_not_listed_would_be_seen() -> None:
    text = "### `prepare/`\n\n| file | |\n|---|---|\n| `job.py`, `a/b.py` | text |\n"
    assert listed_files(text) == ["prepare/job.py", "prepare/a/b.py"]


# The spine: see tests/docs/spine.py.


def test_the_spine_is_counted() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    rows = spine.rows(text)
    assert len(rows) > 5
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    advice = "update the README by: python -m tests.docs.spine --write"
    assert {row.file: row.lines for row in rows} == {
        row.file: line_count(ROOT / row.file) for row in rows
    }, advice
    assert spine.total(text) == sum(row.lines for row in rows), advice


def test_the_spine_is_short() -> None:
    assert spine.total((ROOT / "README.md").read_text("utf-8")) <= spine.MOST_LINES


def test_the_spine_is_updated() -> None:
    text = "# x\n\n| 1 | `train.py` | 1 | a |\n| 2 | `eval.py` | 1,000 | b |\n\nIn all 3 lines.\n"
    lines = [line_count(ROOT / name) for name in ("train.py", "eval.py")]
    new = spine.updated(text)
    assert [row.lines for row in spine.rows(new)] == lines
    assert spine.total(new) == sum(lines) and new.endswith(" lines.\n")
