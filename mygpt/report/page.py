"""A page of HTML that needs nothing but itself: its parts, with every text escaped."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page. No script and no address is in it, and the browser is told to allow none."""
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
    """A heading and what stands under it; nothing where nothing does."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of the class `kind`; nothing where there is no text."""
    if not text:
        return ""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """The figures one looks for first: (name, value, what to know about it)."""
    inside = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in figures
    )
    return f'<dl class="tiles">{inside}</dl>'


def table(
    rows: Iterable[Sequence[str]], head: Sequence[str] = (), caption: str = "", numbers: int = 0
) -> str:
    """A table; the first cell of a row names it, the last `numbers` are set as numbers."""
    columns = len(head)
    body = "".join(f"<tr>{_cells(row, numbers, 'td')}</tr>" for row in rows)
    top = f"<thead><tr>{_cells(head, numbers, 'th')}</tr></thead>" if columns else ""
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    kind = "scroll" if numbers else "scroll words"
    return f'<div class="{kind}"><table>{title}{top}<tbody>{body}</tbody></table></div>'


def _cells(row: Sequence[str], numbers: int, tag: str) -> str:
    first, *others = (escape(cell) for cell in row)
    scope = "col" if tag == "th" else "row"
    cells = [f'<th scope="{scope}">{first}</th>']
    for number, cell in enumerate(others, start=1):
        is_number = number >= len(row) - numbers
        kind = (' class="number"' if is_number else "") + (' scope="col"' if tag == "th" else "")
        cells.append(f"<{tag}{kind}>{cell}</{tag}>")
    return "".join(cells)


def details(summary: str, *parts: str) -> str:
    """What is folded away until it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>\n{''.join(parts)}</details>"


def text_sample(title: str, prompt: str, text: str) -> str:
    """A text that a model wrote, its prompt set off."""
    begun = prompt if prompt and text.startswith(prompt) else ""
    rest = text[len(begun) :]
    return (
        f'<article class="sample"><h3>{escape(title)}</h3>'
        # A line feed right after <pre> is dropped, so one is given to it.
        f'<pre tabindex="0">\n<b>{escape(begun)}</b>{escape(rest)}</pre></article>'
    )
