"""Documents that can't be read: what is noted of them, and the limit on how many there may be."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

QUARANTINE = "quarantine.jsonl"
# A document must be held as a whole where it is a line or a row, and so must a stretch of any text
# without white space, which can't be cut. What is larger is bad.
MAX_DOCUMENT_BYTES = 64 << 20
BROKEN = "unreadable from here on"  # begins the reason of a file that is broken in the middle
# Bad documents listed one by one, per unit and in all; the rest is only counted.
MAX_LISTED = 10_000
UNLISTED = "further bad documents, which are not listed"

# Bad documents and bytes of text lost with them that are allowed without --max-bad, or a share of
# all documents and of all text, if that is more.
BAD_DOCUMENTS = 10
BAD_BYTES = 64 << 10
BAD_SHARE = 0.001
# The size of text that is not read yet is an estimate, which may be too low by this factor.
ESTIMATE_MARGIN = 10


@dataclass(frozen=True)
class BadDocuments:
    """A document, or several from `position` on, that could not be read as text."""

    source: int
    position: int
    reason: str
    documents: int = 1
    bytes: int = 0  # of text lost, estimated if the file is compressed


@dataclass(frozen=True)
class Entry:
    """A line of quarantine.jsonl: `BadDocuments` of the dataset."""

    source: str  # name of the file
    position: int
    reason: str
    documents: int
    generation: int
    bytes: int = 0  # myGPT 0.2 did not note it


def too_large(actual: str) -> str:
    """Return the reason to record for a document that is too large."""
    return f"expected at most {MAX_DOCUMENT_BYTES:,} bytes, found {actual}: split it"


def list_bad(listed: list[BadDocuments], bad: Iterable[BadDocuments]) -> None:
    """Append bad documents to a list; beyond `MAX_LISTED`, broken files and a sum of the rest."""
    rest: list[BadDocuments] = []
    for one in bad:
        room = len(listed) < MAX_LISTED or one.reason.startswith(BROKEN)
        (listed if room else rest).append(one)
    if rest:
        rest.append(listed[MAX_LISTED - 1])
        documents, lost = total_bad(rest)
        listed[MAX_LISTED - 1] = replace(rest[-1], reason=UNLISTED, documents=documents, bytes=lost)


def total_bad(bad: Iterable[BadDocuments | Entry]) -> tuple[int, int]:
    """Return how many documents are bad, and the bytes of text lost with them."""
    counts = [(one.documents, one.bytes) for one in bad]
    return sum(documents for documents, _ in counts), sum(lost for _, lost in counts)


@dataclass(frozen=True)
class BadLimit:
    """How much may be bad: `max_bad` documents, or the default shares; see `Options.max_bad`."""

    max_bad: int | None
    text: int  # estimated bytes of all text

    def allowed(self, documents: int, text: int) -> tuple[int, int]:
        """Return how many of the documents, and how many bytes of their text, may be bad."""
        if self.max_bad is not None:
            return self.max_bad, max(BAD_BYTES, text * self.max_bad // max(documents, 1))
        return max(BAD_DOCUMENTS, int(BAD_SHARE * documents)), max(BAD_BYTES, int(BAD_SHARE * text))

    def is_exceeded(self, bad: int, lost: int) -> bool:
        """True if so many documents, or bytes of text, are too many whatever is still to come."""
        if self.max_bad is not None:
            return bad > self.max_bad
        # A document has at least one byte.
        allowed, allowed_bytes = self.allowed(self.text, ESTIMATE_MARGIN * self.text)
        return bad > allowed or lost > allowed_bytes


def check_bad(entries: list[Entry], documents: int, text: int, limit: BadLimit) -> None:
    """Raise ValueError if more of the documents read, or of their text, is bad than allowed.

    `entries` lists what is bad; `text` is the bytes of the other documents.
    """
    bad, lost = total_bad(entries)
    allowed, allowed_bytes = limit.allowed(documents, text + lost)
    if bad <= allowed and lost <= allowed_bytes:
        return
    if bad > allowed:
        first, needed = entries[0], bad
        counts = f"at most {allowed} bad documents of {documents}, found {bad}, the first"
    else:
        first = max(entries, key=lambda entry: entry.bytes)
        needed = -(-lost * documents // (text + lost))
        counts = (
            f"at most {allowed_bytes:,} of {text + lost:,} bytes of text in bad documents, found "
            f"{lost:,}, most of them"
        )
    raise ValueError(
        f"expected {counts} in {first.source} at {first.position} ({first.reason}): "
        f"{QUARANTINE} lists them; fix them, or raise --max-bad to {needed} and run again "
        "(finished work is kept)"
    )
