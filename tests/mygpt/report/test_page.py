"""Whatever a text is, on the page it is text."""

import pytest

from mygpt.report import page

EVIL = "<i>&\"' </pre><script>"


@pytest.mark.parametrize(
    "part",
    [
        page.section(EVIL, "<p></p>"),
        page.paragraph(EVIL, "note"),
        page.tiles([(EVIL, EVIL, EVIL)]),
        page.table([[EVIL, EVIL]], (EVIL, EVIL), EVIL, numbers=1),
        page.details(EVIL),
        page.text_sample(EVIL, EVIL, EVIL + EVIL),
        page.document(EVIL, []),
    ],
)
def test_it_is_escaped(part: str) -> None:
    assert "<i>" not in part
    assert "<script" not in part
    assert "&lt;i&gt;&amp;&quot;" in part


def test_nothing_makes_nothing() -> None:
    assert page.section("A heading", "", "") == ""
    assert page.paragraph("", "note") == ""


def test_numbers_are_set_as_numbers_and_rows_are_named() -> None:
    html = page.table([["loss", "a word", "2.5"]], ("what", "how", "value"), numbers=1)
    assert '<th scope="row">loss</th><td>a word</td><td class="number">2.5</td>' in html
    assert '<th class="number" scope="col">value</th>' in html


def test_a_prompt_is_set_off_where_the_text_begins_with_it() -> None:
    assert "<b>Once</b> upon" in page.text_sample("t", "Once", "Once upon")
    assert "<b></b>upon" in page.text_sample("t", "Once", "upon")
