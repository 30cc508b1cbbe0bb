"""Parts of a self-contained HTML page, with every text escaped."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page. It holds no scripts or links, and its policy lets the browser load none."""
    style = files("mygpt.report").joinpath("report.css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading with its content; empty if all parts are."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def paragraph(text: str, kind: str) -> str:
    """A paragraph of the class `kind`; empty if there is no text."""
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def tiles(numbers: Iterable[tuple[str, str, str]]) -> str:
    """The key numbers: (name, value, note)."""
    inside = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in numbers
    )
    return f'<dl class="tiles">{inside}</dl>'


def table(
    rows: Iterable[Sequence[str]], head: Sequence[str] = (), caption: str = "", numbers: int = 0
) -> str:
    """A table; the first cell of a row is its header, the last `numbers` are aligned as numbers."""
    body = "".join(f"<tr>{_cells(row, numbers, 'td')}</tr>" for row in rows)
    top = f"<thead><tr>{_cells(head, numbers, 'th')}</tr></thead>" if head else ""
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    kind = "scroll" if numbers else "scroll words"
    return f'<div class="{kind}"><table>{title}{top}<tbody>{body}</tbody></table></div>'


def _cells(row: Sequence[str], numbers: int, tag: str) -> str:
    first, *others = (escape(cell) for cell in row)
    scope = "col" if tag == "th" else "row"
    cells = [f'<th scope="{scope}">{first}</th>']
    for i, cell in enumerate(others, start=1):
        kind = ' class="number"' if i >= len(row) - numbers else ""
        kind += ' scope="col"' if tag == "th" else ""
        cells.append(f"<{tag}{kind}>{cell}</{tag}>")
    return "".join(cells)


def details(summary: str, *parts: str) -> str:
    """Content that is folded away until the reader opens it."""
    return f"<details><summary>{escape(summary)}</summary>\n{''.join(parts)}</details>"


def text_sample(title: str, prompt: str, text: str) -> str:
    """A text that a model wrote, with its prompt in bold."""
    bold = prompt if prompt and text.startswith(prompt) else ""
    rest = text[len(bold) :]
    return (
        f'<article class="sample"><h3>{escape(title)}</h3>'
        # Browsers drop a line feed right after <pre>, so one is added for them to drop.
        f'<pre tabindex="0">\n<b>{escape(bold)}</b>{escape(rest)}</pre></article>'
    )
