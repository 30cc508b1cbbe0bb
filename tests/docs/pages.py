"""The documents and the code in them, for the tests of the documentation."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("docs/recipes/*.md")),
]
PACKAGES = ("prepare", "shards", "mygpt")
FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4,}(?![ -*])(\S.*)$", re.MULTILINE)


def code_lines(text: str) -> list[str]:
    """The lines of a page's code blocks, continued lines joined, without shell comments."""
    joined = re.sub(r"\\\n\s*", " ", text)
    fenced = [line for block in FENCED.findall(joined) for line in block.splitlines()]
    lines = fenced + INDENTED.findall(FENCED.sub("", joined))
    return [re.sub(r"(^|\s)#\s.*$", "", line) for line in lines]


def code_spans(text: str) -> list[str]:
    """The inline code of a page, each span on one line."""
    prose = INDENTED.sub("", FENCED.sub("", text))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def line_count(path: Path) -> int:
    """Lines of a file, as `wc -l` counts them."""
    return path.read_bytes().count(b"\n")
