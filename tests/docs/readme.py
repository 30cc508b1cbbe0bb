"""The demo in the README: its output, its curve and its report, all of one run.

    make readme

runs `make demo`, which takes its ten minutes, and writes what came out of it between the markers in
README.md, docs/demo_loss.png, docs/report.png and docs/play.png. It needs Chromium, and neither
data/demo nor log/demo, so that everything is of this run.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path

from PIL import Image

from tests.browser import browser
from tests.docs.pages import ROOT

README = ROOT / "README.md"
BEGIN, END = "<!-- of one run, by: make readme -->", "<!-- end of that run -->"
# Lines of the output that the README shows, each the start of one; of the steps only the last.
SHOWN = (
    *("documents ", "text ", "tokens ", "train ", "val ", "vocabulary "),
    *("start ", "data ", "length ", "model ", "batch ", "step ", "finished ", "checkpoint  "),
    *("                    ", "this model", "unigram ", "uniform ", "--- "),
)
# Not those that end so: corrections of the length, and the head of another table.
HIDDEN = ("as the speed has changed", "nats per token  targets")
SAMPLE_LINES = 16
PROMPT = "import os\n\ndef read(path):"
WIDTHS, HEIGHT, GAP = (920, 390), 1290, 30  # of the picture of the report


def shown(output: str) -> Iterator[str]:
    """The lines that the README shows, "..." for what lies between, and the last sample's text."""
    lines = [line.rstrip() for line in output.splitlines()]
    steps = [i for i, line in enumerate(lines) if line.startswith("step ")]
    samples = [i for i, line in enumerate(lines) if line.startswith("--- ")]
    end = samples[-1] if samples else len(lines)
    last = -1
    for i, line in enumerate(lines[: samples[0] if samples else end]):
        if not line.startswith(SHOWN) or line.endswith(HIDDEN) or i in steps[:-1]:
            continue
        if line.startswith("val ") and re.match(r"val \d", line) and i < steps[-1]:
            continue
        if last >= 0 and i > last + 1:
            yield "..."
        yield line
        last = i
    if samples:
        text = lines[end + 1 : end + 1 + SAMPLE_LINES]
        stop = next((i for i, line in enumerate(text) if line.startswith("picture ")), len(text))
        yield from ("...", lines[end], *text[:stop])


def updated(text: str, block: Iterable[str]) -> str:
    """The README with another block between the markers."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"expected {BEGIN} and {END} in the README")
    inside = "\n".join(f"    {line}".rstrip() for line in block)
    return f"{before}{BEGIN}\n\n{inside}\n\n{END}{after}"


def machine() -> str:
    """The processor's name and its number of CPUs."""
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{len(os.sched_getaffinity(0))} CPUs of {names[0] if names else 'this machine'}"


def demo() -> tuple[str, float]:
    """Run the demo, showing what it prints: (that, seconds)."""
    started, output = time.monotonic(), []
    command = ["make", "--no-print-directory", "demo"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            output.append(line)
    if process.returncode:
        raise SystemExit(process.returncode)
    return "".join(output), time.monotonic() - started


def draw_report(path: Path) -> None:
    """Write the picture of log/demo/report.html: a light desktop beside a dark phone."""
    subprocess.run([sys.executable, "-m", "mygpt.report", "log/demo"], cwd=ROOT, check=True)
    picture = Image.new("RGB", (sum(WIDTHS) + GAP, HEIGHT), "#e3e4de")
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder)) as open_:
        left = 0
        for width, scheme in zip(WIDTHS, ("light", "dark"), strict=True):
            page = open_((ROOT / "log/demo/report.html").as_uri(), width, HEIGHT)
            feature = {"name": "prefers-color-scheme", "value": scheme}
            page.call("Emulation.setEmulatedMedia", features=[feature])
            page.wait_for("document.readyState === 'complete' && document.querySelector('footer')")
            picture.paste(Image.open(BytesIO(page.png())), (left, 0))
            left += width + GAP
    picture.quantize(96).save(path, optimize=True)


def draw_playground(path: Path) -> None:
    """Write the picture of the playground: a prompt continued, and one token pointed at."""
    command = [sys.executable, "-m", "mygpt.play", "log/demo", "--port", "0"]
    tokens = "[...document.querySelectorAll('pre b')]"
    word = f"{tokens}.findIndex((b, i) => i > 8 && b.innerText.trim().length > 1)"
    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process,
        tempfile.TemporaryDirectory() as folder,
        browser(Path(folder)) as open_,
    ):
        assert process.stdout
        page = open_(process.stdout.readline().split()[1], 1000, 720)
        page.wait_for("document.querySelectorAll('article').length")
        page.run("document.querySelector('textarea').focus()")
        page.type(PROMPT)
        page.run("document.querySelector('button').click()")
        page.wait_for("document.querySelector('button').textContent === 'Continue'")
        page.move_to(f"pre b:nth-of-type({1 + page.run(word)})")
        page.wait_for("document.querySelector('#tip:not([hidden])')")
        Image.open(BytesIO(page.png())).quantize(96).save(path, optimize=True)
        process.terminate()


def main() -> None:
    """Run the demo, then write the pictures and the block."""
    if there := [name for name in ("data/demo", "log/demo") if (ROOT / name).exists()]:
        raise SystemExit(f"expected a demo from the beginning, found {there[0]}: move it away")
    output, seconds = demo()
    draw_report(ROOT / "docs/report.png")
    draw_playground(ROOT / "docs/play.png")
    (ROOT / "docs/demo_loss.png").write_bytes((ROOT / "log/demo/loss.png").read_bytes())
    head = f"$ make demo     # {seconds / 60:.1f} minutes on {machine()}"
    README.write_text(updated(README.read_text("utf-8"), (head, *shown(output))), "utf-8")


if __name__ == "__main__":
    main()
