"""The spine: the files to read in order to understand the whole, listed with line counts in README.

    python -m tests.docs.spine            the README's counts beside those of the tree
    python -m tests.docs.spine --write    bring the README's counts up to date

In the README it is a table of rows like

    | 1 | `prepare/job.py` | 210 | what it is |

and, anywhere below it, the total: "2,750 lines". `tests/docs/test_docs.py` checks both.
"""

import re
import sys
from typing import NamedTuple

from tests.docs.pages import ROOT, line_count

README = ROOT / "README.md"
ROW = re.compile(r"^\| (\d+) \| `([\w/]+\.py)` \| ([\d,]+) \| (.+) \|$", re.MULTILINE)
TOTAL = re.compile(r"\b([\d,]+)(?= lines\b)")
MOST_LINES = 2800


class Row(NamedTuple):
    """A file of the spine: its place, its path in the tree, and its lines as the README says."""

    number: int
    file: str
    lines: int


def rows(text: str) -> list[Row]:
    """The table's rows."""
    return [Row(int(row[1]), row[2], as_number(row[3])) for row in ROW.finditer(text)]


def total(text: str) -> int:
    """The total below the table. Raises ValueError where there is none."""
    found = TOTAL.search(text, _end_of_table(text))
    if found is None:
        raise ValueError('expected a total such as "2,750 lines" below the table of the spine')
    return as_number(found[1])


def updated(text: str) -> str:
    """The README with the counts of the tree."""
    end = _end_of_table(text)
    table = ROW.sub(
        lambda row: f"| {row[1]} | `{row[2]}` | {line_count(ROOT / row[2]):,} | {row[4]} |",
        text[:end],
    )
    lines = sum(row.lines for row in rows(table))
    return table + TOTAL.sub(f"{lines:,}", text[end:], count=1)


def as_number(digits: str) -> int:
    """1,234 as a number."""
    return int(digits.replace(",", ""))


def _end_of_table(text: str) -> int:
    return max((row.end() for row in ROW.finditer(text)), default=0)


def main() -> None:
    """Show the spine, or with --write update the README."""
    text = README.read_text("utf-8")
    for row in rows(text):
        print(f"{row.number:3} {row.lines:6,} {line_count(ROOT / row.file):6,}  {row.file}")
    actual = sum(line_count(ROOT / row.file) for row in rows(text))
    print(f"    {total(text):6,} {actual:6,}  of at most {MOST_LINES:,}")
    if sys.argv[1:] == ["--write"]:
        README.write_text(updated(text), "utf-8")


if __name__ == "__main__":
    main()
