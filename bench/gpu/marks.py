"""What the results are judged by: each mark's value and whether it is reached."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import generate, table, train
from bench.gpu import race, run
from bench.gpu.smoke import CHECKS
from bench.gpu.speed import PARITY_STEPS
from bench.train import COMPILED, OURS, PEER, PLAIN

Findings = Mapping[str, Sequence[Mapping[str, Any]]]  # by stage
TOKENS_PER_SECOND = {"H200": 550_000, "H100": 500_000}


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

    def cells(self) -> tuple[str, str, str, str]:
        """The mark as a row of a table."""
        sign = "≤" if self.at_most else "≥"
        value = table.shown(self.value, self.form)
        return self.what, f"{sign} {self.aim:{self.form}}", value, self.verdict


def marks(findings: Findings) -> list[Mark]:
    """All marks of one run."""
    checks = [f for f in findings.get("smoke", []) if "contender" in f]
    passed = sum(check.get("passed", False) for check in checks)
    return [
        Mark("smoke: checks passed", passed if checks else None, len(CHECKS), ".0f"),
        *of_training(findings),
        of_generation(findings),
        Mark("race: time to the plain recipe's loss", race_share(findings), 0.6, at_most=True),
        Mark("waiting for data, share of time", waiting(findings), 0.01, ".2%", at_most=True),
    ]


def results_of(
    findings: Findings, stage: str, bench: Any, command: str = ""
) -> dict[str, Any] | None:
    """What `bench.run` would have returned, from what it noted; None if it noted nothing."""
    about = next((f["about"] for f in findings.get(stage, []) if "about" in f), None)
    if about is None:
        return None
    lines = [f for f in findings[stage] if "contender" in f]
    machine = about["machine"] | {"command": command}
    return about | bench.comparison(about, *table.records_of(lines)) | {"machine": machine}


def of_training(findings: Findings) -> list[Mark]:
    """Speed, memory and losses of training."""
    results = results_of(findings, "train", train) or {"rows": [], "device": ""}
    rows = {row["what"]: row for row in results["rows"]}
    ours: Mapping[str, Any] = rows.get(OURS, {})
    names = [name for name in TOKENS_PER_SECOND if name in results["device"]]
    rate = ours["tokens_s"]["median"] if ours else None
    return [
        Mark("tokens/s", rate, TOKENS_PER_SECOND[(names or ["H100"])[0]], ",.0f"),
        Mark("share of the sustained product rate", ours.get("of_products"), 0.6, ".0%"),
        Mark("× the plain step, compiled", speed_ratio(findings, PLAIN + COMPILED), 1.1),
        Mark("× Hugging Face, compiled", speed_ratio(findings, PEER + COMPILED), 1.15),
        Mark("memory / the plain step's", ours.get("memory_of_plain"), 0.5, at_most=True),
        Mark(
            f"loss, mean difference from the plain step's over {PARITY_STEPS} steps",
            loss_difference(findings),
            0.01,
            ".5f",
            at_most=True,
        ),
    ]


def turns(findings: Findings, stage: str, contender: str) -> list[Mapping[str, Any]]:
    """The turns of one contender, in order; none if it failed."""
    records, _ = table.records_of([f for f in findings.get(stage, []) if "contender" in f])
    return list(records.get(contender, []))


def speed_ratio(findings: Findings, other: str) -> float | None:
    """Our speed relative to another contender's, the median over the rounds."""
    ours, theirs = (turns(findings, "train", name) for name in (OURS, other))
    return table.ratio(table.column(theirs, "seconds"), table.column(ours, "seconds"))


def loss_difference(findings: Findings) -> float | None:
    """Mean absolute difference of the first losses, if both took enough steps."""
    ours = [loss for turn in turns(findings, "train", OURS) for loss in turn["losses"]]
    for name in (PLAIN + COMPILED, PLAIN):
        theirs = [loss for turn in turns(findings, "train", name) for loss in turn["losses"]]
        if min(len(ours), len(theirs)) >= PARITY_STEPS:
            pairs = list(zip(ours, theirs, strict=False))[:PARITY_STEPS]
            return statistics.mean(abs(a - b) for a, b in pairs)
    return None


def of_generation(findings: Findings) -> Mark:
    """One text beside Hugging Face's, with weights of the same dtype."""
    results = results_of(findings, "generate", generate) or {"rows": []}
    peers = [row["weights"] for row in results["rows"] if row["what"] == generate.PEER]
    ratios = [
        row["of_peer"]
        for row in results["rows"]
        if row["what"] == generate.OURS and row["batch"] == 1 and row["weights"] in peers
    ]
    return Mark("generation of one text × Hugging Face", next(iter(ratios), None), 3)


def race_share(findings: Findings) -> float | None:
    """Time in which we reach the plain recipe's last loss, relative to its time; inf: never."""
    own, plain = (validations(findings, name) for name in (race.OURS, race.PLAIN))
    if not own or not plain:
        return None
    end, goal = plain[-1]
    before = (0.0, float("inf"))
    for seconds, loss in own:
        if loss <= goal:
            part = (before[1] - goal) / (before[1] - loss) if before[1] < float("inf") else 1.0
            return (before[0] + part * (seconds - before[0])) / end
        before = (seconds, loss)
    return float("inf")


def validations(findings: Findings, racer: str) -> list[tuple[float, float]]:
    """(seconds raced, loss) of each validation."""
    own = [f for f in findings.get("race", []) if f.get("racer") == racer]
    return [(f["seconds"], f["val"]) for f in own if "val" in f]


def waiting(findings: Findings) -> float | None:
    """Share of train.py's time spent waiting for data, without the first step of each start."""
    timings = [f["timings"] for f in findings.get("run", []) if "timings" in f]
    firsts = {"1", str(run.STEPS // 2 + 1)}
    shares = (
        [s for step, s in timings[0]["waiting"].items() if step not in firsts] if timings else []
    )
    return statistics.mean(shares) if shares else None
