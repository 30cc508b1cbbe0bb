"""docs/python.md, run from top to bottom."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT
from tests.mygpt.support import gpt2_dataset, write_run

PAGE = ROOT / "docs" / "python.md"
BLOCKS = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("quick")
def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "log" / "books", gpt2_dataset(tmp_path / "data" / "books"), block_size=32)
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text("utf-8")
    blocks = BLOCKS.findall(text)
    assert len(blocks) == text.count("```") / 2 == 6
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {"__name__": "notebook"})
    shown = capsys.readouterr().out
    assert re.search(r"^\d+\.\d{4} nats per token, perplexity [\d.]+, ", shown, re.MULTILINE)
    assert "gpt2 2503 " in shown and "2 (4, 32) (4, 32)\n" in shown
