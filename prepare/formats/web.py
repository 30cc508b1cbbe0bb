"""Text of .html pages, extracted by resiliparse: what a browser shows, but for the navigation."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding

from prepare.batch import Batch, text_batch
from prepare.input_file import InputFile, Slice, byte_stream, bytes_lost
from prepare.quarantine import BadDocuments
from prepare.text import damage

# A page's tree takes up to a hundred times its size.
MAX_PAGE_BYTES = 4 << 20
LEFT_OUT = ["nav", "footer"]


def columns(file: InputFile) -> None:
    """Return None: a page has no columns."""


def read(file: InputFile, part: Slice) -> Iterator[Batch]:
    """Read a page, one document."""
    try:
        with byte_stream(file.path, file.compression) as stream:
            content = stream.read(MAX_PAGE_BYTES + 1)
        if len(content) > MAX_PAGE_BYTES:
            raise ValueError(f"expected at most {MAX_PAGE_BYTES:,} bytes of HTML, found more")
    except ValueError as error:
        yield Batch(bad=[BadDocuments(part.file, 0, str(error), bytes=file.text_bytes)])
    except OSError as error:
        reason = damage(file.path, error)
        yield Batch(bad=[BadDocuments(part.file, 0, reason, bytes=bytes_lost(file))])
    else:
        text = extract_plain_text(_decoded(content), skip_elements=LEFT_OUT)
        texts = pa.array([text.encode(errors="replace")], pa.large_binary())
        yield text_batch(texts, np.array([part.file], np.int32), np.zeros(1, np.int64))


def _decoded(content: bytes) -> str:
    """Decode a page as UTF-8, or else as it declares or as it looks."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return bytes_to_str(content, detect_encoding(content, from_html_meta=True) or "latin-1")
