"""The results of `bench.gpu` as Markdown, and the race as a picture."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import generate, table, train
from bench.gpu import race
from bench.gpu.marks import Findings, marks, results_of, validations
from bench.gpu.setting import read
from shards.files import atomic_file

PICTURE = "gpu_race.png"


def as_text(out: Path, pictures: Path) -> str:
    """Everything that was found, section by section. Raises FileNotFoundError without results."""
    findings: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for finding in read(out):
        findings[finding["stage"]].append(finding)
    written = [(title, section(findings)) for title, section in SECTIONS.items()]
    if any("val" in finding for finding in findings["race"]):
        written.append(("Picture", f"![race]({draw(findings, pictures)})"))
    return "\n\n".join(f"### {title}\n\n{text or 'Not measured.'}" for title, text in written)


def marks_as_text(findings: Findings) -> str:
    """The table of marks."""
    return table.as_text(
        ("mark", "aim", "measured", ""), [mark.cells() for mark in marks(findings)]
    )


def stages(findings: Findings) -> str:
    """The machine, and how each stage ended, with the GPU's clock and power meanwhile."""
    rows = []
    for name, own in findings.items():
        for finding in (f for f in own if "state" in f):
            ended, seconds = finding["time"], finding["seconds"]
            clock, power = (
                median_of(findings, what, ended - seconds, ended) for what in ("sm_mhz", "watts")
            )
            cells = (table.shown(clock, ".0f"), table.shown(power, ".0f"))
            rows.append((name, f"{seconds:.0f}", *cells, finding["state"]))
    head = table.as_text(("stage", "s", "SM MHz", "W", "ended"), rows)
    return "\n\n".join([*(machine(f) for f in findings["machine"] if "machine" in f), head])


def machine(finding: Mapping[str, Any]) -> str:
    """One line on the machine."""
    about = finding["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    return (
        f"{finding['device']}; {about['processor']}, {about['cores']} cores, {about['system']}, "
        f"Python {about['python']}, {versions}"
    )


def median_of(findings: Findings, what: str, start: float, end: float) -> float | None:
    """Median of the samples of a time."""
    samples = [f for f in findings["machine"] if "sample" in f and start <= f["time"] <= end]
    values = [f["sample"][what] for f in samples if what in f["sample"]]
    return statistics.median(values) if values else None


def smoke(findings: Findings) -> str:
    """Each check with its largest error."""
    rows = []
    for check in (f for f in findings["smoke"] if "contender" in f):
        if "failed" in check:
            rows.append((check["contender"], "", "", f"failed: {check['failed']}"))
            continue
        what, error = max(check["errors"].items(), key=lambda item: item[1])
        verdict = "passed" if check["passed"] else f"not passed: {what}"
        rows.append((check["contender"], f"{error:.2g}", f"{check['bound']:.2g}", verdict))
    return table.as_text(("check", "largest error", "bound", ""), rows) if rows else ""


def micro(findings: Findings) -> str:
    """The rate of each operation."""
    figures = [figure for f in findings["micro"] for figure in f.get("figures", [])]
    rows = [(f["what"], f"{f['ms']:.3f}", table.shown(f["tflops"], ",.3g")) for f in figures]
    failed = [
        f"failed: {f['contender']}: {f['failed']}" for f in findings["micro"] if "failed" in f
    ]
    return "\n".join([table.as_text(("", "ms", "TFLOP/s"), rows) if rows else "", *failed]).strip()


def training(findings: Findings) -> str:
    """The table of `bench.train`."""
    results = results_of(findings, "train", train, command_of(findings))
    return train.as_text(results) if results else ""


def profile(findings: Findings) -> str:
    """The parts of a step and its longest kernels."""
    found = [f["profile"] for f in findings["profile"] if "profile" in f]
    return train.profile_as_text(found[0]) if found else ""


def generation(findings: Findings) -> str:
    """The table of `bench.generate`."""
    results = results_of(findings, "generate", generate, command_of(findings))
    return generate.as_text(results) if results else ""


def race_as_text(findings: Findings) -> str:
    """Steps, time and validation loss of both racers."""
    rows = []
    for name in (race.OURS, race.PLAIN):
        steps = [f for f in findings["race"] if f.get("racer") == name and "loss" in f]
        if steps and (vals := validations(findings, name)):
            last = steps[-1]
            rate = f"{last['step'] / last['seconds']:.2f}"
            rows.append(
                (name, str(last["step"]), f"{last['seconds']:.1f}", rate, f"{vals[-1][1]:.4f}")
            )
    headers = ("", "steps", "s", "steps/s", "validation loss")
    return table.as_text(headers, rows) if rows else ""


def whole_run(findings: Findings) -> str:
    """How train.py and eval.py ended, and the speed that train.py logged."""
    rows = [
        (
            f["command"],
            str(f["exit"]),
            f"{f['seconds']:.0f}",
            "".join(f["tail"][-1:]).replace("|", "/"),
        )
        for f in findings["run"]
        if "command" in f
    ]
    lines = [table.as_text(("command", "exit code", "s", "last line"), rows)] if rows else []
    for timings in (f["timings"] for f in findings["run"] if "timings" in f):
        rates = list(timings["tokens_per_second"].values())
        lines.append(
            f"\ntrain.py logged {statistics.median(rates):,.0f} tokens/s, the median step."
        )
    return "\n".join(lines)


def command_of(findings: Findings) -> str:
    """The command that measured."""
    return next((f["command"] for f in findings["all"]), "python -m bench.gpu OUT")


def draw(findings: Findings, folder: Path) -> Path:
    """Draw both racers' losses over the time raced. Returns the picture's path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=140, layout="constrained")
    axes = figure.add_subplot(xlabel="seconds of training", ylabel="loss (nats per token)")
    for number, name in enumerate((race.OURS, race.PLAIN)):
        own = [f for f in findings["race"] if f.get("racer") == name and "loss" in f]
        seconds, losses = ([f[key] for f in own] for key in ("seconds", "loss"))
        axes.plot(seconds, losses, color=f"C{number}", alpha=0.3, linewidth=0.8)
        if vals := validations(findings, name):
            label = f"{name}, validation, ends at {vals[-1][1]:.3f}"
            axes.plot(*zip(*vals, strict=True), ".-", color=f"C{number}", label=label)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path = folder / PICTURE
    with atomic_file(path, durable=False) as file:
        figure.savefig(file, format="png")
    return path


SECTIONS: dict[str, Callable[[Findings], str]] = {
    "Marks": marks_as_text,
    "Machine and stages": stages,
    "Checks": smoke,
    "Operations": micro,
    "Training": training,
    "Where a step's time goes": profile,
    "Generation": generation,
    "Race": race_as_text,
    "train.py, stopped and resumed": whole_run,
}
