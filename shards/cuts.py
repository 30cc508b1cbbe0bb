"""Positions where a text may be cut without changing its tokens."""

import re
from collections.abc import Iterator

# Before an ASCII white-space character that follows another character: in GPT-2's pattern no
# pre-token spans the two.
SAFE_CUT = re.compile(r"(?<=\S)(?=[ \t\n\r\f\v])")
# The same on UTF-8 bytes. Before the cut stands a printing ASCII character or the last byte of a
# character that is not Unicode white space.
SAFE_CUT_BYTES = re.compile(
    rb"(?<=[!-~\x80-\xbf])(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe1\xa0\x8e)"
    rb"(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)(?=[ \t\n\r\f\v])"
)


def cut(text: str, size: int) -> Iterator[str]:
    """Cut `text` into pieces of at least `size` characters without changing its tokens."""
    start = 0
    while start < len(text):
        found = SAFE_CUT.search(text, start + size) if start + size < len(text) else None
        end = found.start() if found else len(text)
        yield text[start:end]
        start = end
