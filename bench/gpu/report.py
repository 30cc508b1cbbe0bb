"""The results of `bench.gpu` as Markdown, judged by the marks, and the race as a picture."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import generate, table, train
from bench.gpu import race
from bench.gpu.runner import read
from bench.gpu.smoke import CHECKS
from bench.gpu.stages import PARITY_STEPS, RUN_STEPS
from bench.train import COMPILED, OURS, PEER, PLAIN
from shards.files import atomic_file

PICTURE = "gpu_race.png"
TOKENS_PER_SECOND = {"H200": 550_000, "H100": 500_000}
Findings = Mapping[str, Sequence[Mapping[str, Any]]]  # by stage


def as_text(out: Path, pictures: Path) -> str:
    """Everything that was found, section by section. Raises FileNotFoundError without results."""
    findings: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for finding in read(out):
        findings[finding["stage"]].append(finding)
    written = [(title, section(findings)) for title, section in SECTIONS.items()]
    if having(findings, "race", "val"):
        written.append(("Picture", f"![race]({draw(findings, pictures)})"))
    return "\n\n".join(f"### {title}\n\n{text or 'Not measured.'}" for title, text in written)


def having(findings: Findings, stage: str, key: str) -> list[Mapping[str, Any]]:
    """The findings of a stage that have a key."""
    return [finding for finding in findings.get(stage, ()) if key in finding]


def results_of(findings: Findings, stage: str, bench: Any) -> dict[str, Any] | None:
    """What `bench.run` would have returned, from what it noted; None if it noted nothing."""
    abouts = having(findings, stage, "about")
    if not abouts:
        return None
    about = abouts[0]["about"]
    records = table.records_of(having(findings, stage, "contender"))
    commands = [f["command"] for f in having(findings, "all", "command")]
    machine = about["machine"] | {"command": "".join(commands[:1])}
    return about | bench.comparison(about, *records) | {"machine": machine}


def validations(findings: Findings, racer: str) -> list[tuple[float, float]]:
    """(seconds raced, loss) of each validation."""
    vals = having(findings, "race", "val")
    return [(f["seconds"], f["val"]) for f in vals if f["racer"] == racer]


# --- the marks


@dataclass(frozen=True)
class Mark:
    """A value, None if it was not measured, that should be at least or at most `aim`."""

    what: str
    value: float | None
    aim: float
    form: str = ".2f"
    at_most: bool = False

    @property
    def verdict(self) -> str:
        """Reached, not reached, or not measured."""
        if self.value is None:
            return "not measured"
        reached = self.value <= self.aim if self.at_most else self.value >= self.aim
        return "reached" if reached else "not reached"


def marks(findings: Findings) -> list[Mark]:
    """All marks of one run."""
    checks = having(findings, "smoke", "contender")
    passed = sum(check.get("passed", False) for check in checks) if checks else None
    results = results_of(findings, "train", train) or {"rows": [], "device": ""}
    ours: dict[str, Any] = {"tokens_s": {}}
    ours = next((row for row in results["rows"] if row["what"] == OURS), ours)
    names = [name for name in TOKENS_PER_SECOND if name in results["device"]]
    aim = TOKENS_PER_SECOND[(names or ["H100"])[0]]
    plain, peer = (speed_ratio(findings, name + COMPILED) for name in (PLAIN, PEER))
    parity = f"loss, mean difference from the plain step's over {PARITY_STEPS} steps"
    return [
        Mark("smoke: checks passed", passed, len(CHECKS), ".0f"),
        Mark("tokens/s", ours["tokens_s"].get("median"), aim, ",.0f"),
        Mark("share of the sustained product rate", ours.get("of_products"), 0.6, ".0%"),
        Mark("× the plain step, compiled", plain, 1.1),
        Mark("× Hugging Face, compiled", peer, 1.15),
        Mark("memory / the plain step's", ours.get("memory_of_plain"), 0.5, at_most=True),
        Mark(parity, loss_difference(findings), 0.01, ".5f", at_most=True),
        Mark("generation of one text × Hugging Face", generation_ratio(findings), 3),
        Mark("race: time to the plain recipe's loss", race_share(findings), 0.6, at_most=True),
        Mark("waiting for data, share of time", waiting(findings), 0.01, ".2%", at_most=True),
    ]


def turns(findings: Findings, name: str) -> list[Mapping[str, Any]]:
    """The turns of one contender of `bench.train`, in order; none if it failed."""
    records, _ = table.records_of(having(findings, "train", "contender"))
    return list(records.get(name, []))


def speed_ratio(findings: Findings, other: str) -> float | None:
    """Our speed relative to another contender's, the median over the rounds."""
    ours, theirs = (table.column(turns(findings, name), "seconds") for name in (OURS, other))
    return table.ratio(theirs, ours)


def loss_difference(findings: Findings) -> float | None:
    """Mean absolute difference of the first losses, if both took enough steps."""
    ours, *plain = (
        [loss for turn in turns(findings, name) for loss in turn["losses"]][:PARITY_STEPS]
        for name in (OURS, PLAIN + COMPILED, PLAIN)
    )
    for theirs in plain:
        if len(ours) == len(theirs) == PARITY_STEPS:
            return statistics.mean(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return None


def generation_ratio(findings: Findings) -> float | None:
    """Our speed for one text relative to Hugging Face's with weights of the same dtype."""
    results = results_of(findings, "generate", generate) or {"rows": []}
    rows = [row for row in results["rows"] if row["batch"] == 1]
    peers = [row["weights"] for row in rows if row["what"] == generate.PEER]
    ours = [row for row in rows if row["what"] == generate.OURS and row["weights"] in peers]
    return ours[0]["of_peer"] if ours else None


def race_share(findings: Findings) -> float | None:
    """Time in which we reach the plain recipe's last loss, relative to its time; inf: never."""
    own, plain = (validations(findings, name) for name in (race.OURS, race.PLAIN))
    if not own or not plain:
        return None
    end, goal = plain[-1]
    before = own[0]
    for seconds, loss in own:
        if loss <= goal:  # between two validations the loss is taken to fall evenly
            fall = before[1] - loss
            part = (before[1] - goal) / fall if fall else 1.0
            return (before[0] + part * (seconds - before[0])) / end
        before = (seconds, loss)
    return float("inf")


def waiting(findings: Findings) -> float | None:
    """Share of train.py's time spent waiting for data, without the first step of each start."""
    for timings in (f["timings"] for f in having(findings, "run", "timings")):
        firsts = {"1", str(RUN_STEPS // 2 + 1)}
        return statistics.mean(s for step, s in timings["waiting"].items() if step not in firsts)
    return None


# --- the sections


def marks_as_text(findings: Findings) -> str:
    """The table of marks."""
    rows = [
        (
            mark.what,
            f"{'≤' if mark.at_most else '≥'} {mark.aim:{mark.form}}",
            table.shown(mark.value, mark.form),
            mark.verdict,
        )
        for mark in marks(findings)
    ]
    return table.as_text(("mark", "aim", "measured", ""), rows)


def stages(findings: Findings) -> str:
    """The machine, and how each stage ended, with the GPU's clock and power meanwhile."""
    lines = []
    for finding in having(findings, "machine", "machine"):
        about = finding["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
        lines.append(
            f"{finding['device']}; {about['processor']}, {about['cores']} cores, "
            f"{about['system']}, Python {about['python']}, {versions}\n"
        )
    rows = []
    for name in findings:
        for f in having(findings, name, "state"):
            meanwhile = [
                sampled["sample"]
                for sampled in having(findings, "machine", "sample")
                if f["time"] - f["seconds"] <= sampled["time"] <= f["time"]
            ]
            cells = (median_of(meanwhile, what) for what in ("sm_mhz", "watts"))
            rows.append((name, f"{f['seconds']:.0f}", *cells, f["state"]))
    lines.append(table.as_text(("stage", "s", "SM MHz", "W", "ended"), rows))
    return "\n".join(lines)


def median_of(samples: Sequence[Mapping[str, float]], what: str) -> str:
    """Median of one of the samples' numbers, as text; empty without any."""
    values = [sample[what] for sample in samples if what in sample]
    return f"{statistics.median(values):.0f}" if values else ""


def smoke(findings: Findings) -> str:
    """Each check with its largest error."""
    rows = []
    for check in having(findings, "smoke", "contender"):
        cells = ("", "", f"failed: {check.get('failed')}")
        if "errors" in check:
            what, error = max(check["errors"].items(), key=lambda item: item[1])
            verdict = "passed" if check["passed"] else f"not passed: {what}"
            cells = (f"{error:.2g}", f"{check['bound']:.2g}", verdict)
        rows.append((check["contender"], *cells))
    return table.as_text(("check", "largest error", "bound", ""), rows) if rows else ""


def micro(findings: Findings) -> str:
    """The rate of each operation."""
    figures = [figure for f in having(findings, "micro", "figures") for figure in f["figures"]]
    rows = [(f["what"], f"{f['ms']:.3f}", f"{f['tflops']:,.3g}") for f in figures]
    failed = having(findings, "micro", "failed")
    lines = [table.as_text(("", "ms", "TFLOP/s"), rows)] if rows else []
    return "\n".join([*lines, *(f"failed: {f['contender']}: {f['failed']}" for f in failed)])


def bench_as_text(findings: Findings, stage: str, bench: Any) -> str:
    """The table of `bench.train` or `bench.generate`."""
    results = results_of(findings, stage, bench)
    return bench.as_text(results) if results else ""


def profile(findings: Findings) -> str:
    """The parts of a step and its longest kernels."""
    found = having(findings, "profile", "profile")
    return train.profile_as_text(found[0]["profile"]) if found else ""


def race_as_text(findings: Findings) -> str:
    """Steps, time and validation loss of both racers."""
    rows = []
    for name in (race.OURS, race.PLAIN):
        steps = [f for f in having(findings, "race", "loss") if f["racer"] == name]
        if steps and (vals := validations(findings, name)):
            count, seconds = steps[-1]["step"], steps[-1]["seconds"]
            cells = (f"{seconds:.1f}", f"{count / seconds:.2f}", f"{vals[-1][1]:.4f}")
            rows.append((name, str(count), *cells))
    headers = ("", "steps", "s", "steps/s", "validation loss")
    return table.as_text(headers, rows) if rows else ""


def whole_run(findings: Findings) -> str:
    """How train.py and eval.py ended, and the speed that train.py logged."""
    rows = []
    for f in having(findings, "run", "command"):
        last = "".join(f["tail"][-1:]).strip()[:80].replace("|", "/")
        rows.append((f["command"], str(f["exit"]), f"{f['seconds']:.0f}", last))
    lines = [table.as_text(("command", "exit code", "s", "last line"), rows)] if rows else []
    for f in having(findings, "run", "timings"):
        rate = statistics.median(f["timings"]["tokens_per_second"].values())
        lines.append(f"\ntrain.py logged {rate:,.0f} tokens/s, the median step.")
    return "\n".join(lines)


def draw(findings: Findings, folder: Path) -> Path:
    """Draw both racers' losses over the time raced. Returns the picture's path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=140, layout="constrained")
    axes = figure.add_subplot(xlabel="seconds of training", ylabel="loss (nats per token)")
    for number, name in enumerate((race.OURS, race.PLAIN)):
        own = [f for f in having(findings, "race", "loss") if f["racer"] == name]
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
    "Training": lambda findings: bench_as_text(findings, "train", train),
    "Where a step's time goes": profile,
    "Generation": lambda findings: bench_as_text(findings, "generate", generate),
    "Race": race_as_text,
    "train.py, stopped and resumed": whole_run,
}
