"""The report holds what the run's files say, needs nothing else, and fits a phone's screen."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval as evaluation
from mygpt.log import RunLog
from mygpt.report import __main__ as report
from mygpt.report import comparison, run_summary
from shards.manifest import Manifest
from tests.browser import CHROMIUM
from tests.mygpt.support import STEPS, gpt2_dataset, write_run

ROOT = Path(__file__).parents[3]
EVIL = "Once </pre><script>alert(1)</script>"
ANSWERS = {"questions": 10, "accuracy": 0.3, "accuracy_norm": 0.4, "chance": 0.25}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return gpt2_dataset(tmp_path_factory.mktemp("data") / "random")


@pytest.fixture(scope="module")
def run(data: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log") / "a <run>"
    write_run(folder, data)
    sampling = ("--loss", "--prompt", "Once", "--num-samples", "1", "--max-new-tokens", "2")
    assert evaluation.main([str(folder), "--device", "cpu", *sampling]) == 0
    found = json.loads((folder / "eval.json").read_text())
    found["samples"][0]["text"] = EVIL
    found["choices"] = {"hella <swag>": ANSWERS}
    (folder / "eval.json").write_text(json.dumps(found))
    for step in range(1, 21):
        RunLog(folder).write_samples(step, [{"prompt": "The", "text": f"The text of {step}."}])
    return folder


class Balance(HTMLParser):
    """Collects the text, and sees that what is opened is closed."""

    EMPTY = ("meta", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        names = {name for name, _ in attrs}
        assert not names & {"src", "href", "srcset", "onload", "onclick"}
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(html: str) -> Balance:
    found = Balance()
    found.feed(html)
    assert not found.open
    return found


def test_it_says_what_the_files_say(run: Path, data: Manifest) -> None:
    html = report.write([run]).read_text("utf-8")
    text = " ".join("".join(parsed(html).text).split())
    found = json.loads((run / "eval.json").read_text())
    for part in (
        "a <run>",
        "2 layers, 2 heads, width 16 and 24 tokens of context, trained on random; finished.",
        f"of {STEPS}",
        f"{found['loss']:.4f}",
        f"{found['perplexity']:,.2f}",
        "unigram baseline",
        "hella <swag>",
        EVIL,
        data.fingerprint,
        "The text of 1.",
        "The text of 20.",
        "13 more",
        "weight_decay",
    ):
        assert part in text, part


def test_it_needs_nothing_else_and_runs_nothing(run: Path) -> None:
    html = report.write([run]).read_text("utf-8")
    assert not re.search(r"https?:|url\(|@import|//\w", html.replace("/* ", ""))
    assert "script" not in parsed(html).tags
    assert "default-src 'none'" in html
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html


def test_skipped_steps_are_shown(run: Path, data: Manifest, tmp_path: Path) -> None:
    write_run(tmp_path / "run", data)
    skip = f'skip step 7/{STEPS}  loss nan  norm nan  reason "loss is nan"  windows 7..8  look: x\n'
    with open(tmp_path / "run" / "log.txt", "a") as log:
        log.write(skip)
    html = report.write([tmp_path / "run"]).read_text("utf-8")
    assert "1 skipped step" in html
    assert "<title>loss is nan</title>" in html
    assert "skipped" not in report.write([run]).read_text("utf-8")


def test_a_young_run_without_its_dataset(data: Manifest, tmp_path: Path) -> None:
    """Nothing but settings and the first lines of a log: what is missing is said."""
    run = tmp_path / "run"
    write_run(run, data)
    (run / "log.txt").write_text(f"start 0/{STEPS}\n")
    html = report.write([run], [str(tmp_path / "gone")]).read_text("utf-8")
    text = "".join(parsed(html).text)
    assert "at step 0" in text
    assert "Not in the log." in text
    assert "The dataset could not be opened: expected the run's dataset" in text
    assert "Not evaluated on the whole validation split yet" in text
    assert data.fingerprint in text
    assert sorted(path.name for path in run.glob("*.html")) == ["report.html"]


def test_a_diverged_run(run: Path, tmp_path: Path) -> None:
    """JSON has no NaN: eval.json has null for it."""
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "eval.json"
    found = json.loads(path.read_text())
    found |= {"loss": None, "perplexity": None, "bits_per_byte": None}
    found["positions"]["bins"][0]["loss"] = None
    path.write_text(json.dumps(found))
    with open(tmp_path / "run" / "log.txt", "a") as file:
        file.write("val 40/40  loss nan  tokens 64\nstep 40/40  loss e.-  lr 1e400  eta 0:00:00\n")
    assert "nan" in report.write([tmp_path / "run"]).read_text("utf-8")


def test_runs_are_compared(run: Path, data: Manifest, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_run(other, data, dropout=0.25)
    shutil.copytree(run, tmp_path / run.name)
    path = report.write([tmp_path / run.name, other])
    assert path.resolve() == tmp_path / "report.html"
    html = path.read_text("utf-8")
    text = " ".join("".join(parsed(html).text).split())
    found = json.loads((run / "eval.json").read_text())
    for words in (
        *("2 runs", "a <run>", "other", f"{found['loss']:.4f}", f"{found['bits_per_byte']:.4f}"),
        *("Settings that differ", "dropout", "0.25", f"{STEPS} of {STEPS}"),
    ):
        assert words in text
    assert "different vocabularies" not in text and "learning rate" not in text
    tokens = STEPS * 1024
    assert f"other: from 10.09 to 7.364 at token {tokens:,}" in html
    with pytest.raises(ValueError, match="at most 6 runs on a page, found 7"):
        report.write([run] * 7)


def test_runs_of_different_vocabularies_say_so(run: Path) -> None:
    one = run_summary.of_run(run)
    other = SimpleNamespace(tokenizer=SimpleNamespace(hash="1" * 64))
    assert "different vocabularies" not in "".join(comparison.parts([one, one]))
    page = comparison.parts([one, replace(one, dataset=other)])  # type: ignore[arg-type]
    assert "different vocabularies" in "".join(page)


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        report.main([str(tmp_path)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: expected a run with config.json in ")
    assert error.count("\n") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page in")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it_without_anything_sticking_out(
    run: Path, tmp_path: Path, width: int
) -> None:
    from matplotlib.image import imread

    page, picture = report.write([run]), tmp_path / "page.png"
    shutil.copyfile(page, tmp_path / "page.html")
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--disable-sync", "--disable-quic", f"--user-data-dir={tmp_path / 'profile'}"),
        *(f"--window-size={width},3000", f"--screenshot={picture}"),
        (tmp_path / "page.html").as_uri(),
    ]
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    pixels = imread(picture)[..., :3]
    assert pixels.shape[1] == width
    margin = pixels[:, -10:]  # the page's own colour from top to bottom
    assert (margin == margin[0, 0]).all()
    assert len({tuple(colour) for colour in pixels[::7, ::7].reshape(-1, 3).tolist()}) > 20


def test_the_command_in_a_process_of_its_own(run: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "mygpt.report", str(run)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == str(run / "report.html")
