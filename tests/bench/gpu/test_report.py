"""The report says what was measured, judges it by the marks, and draws the race."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import __main__ as command
from bench.gpu import race, report, stages
from bench.gpu.runner import RESULTS, Runner, Setting, read
from bench.gpu.smoke import CHECKS
from bench.train import COMPILED, OURS, PEER, PLAIN, PRODUCT

MACHINE = {
    "command": "x", "processor": "CPU", "cores": 16, "system": "Linux", "python": "3.12",
    "packages": {"torch": "2.11"},
}  # fmt: skip
ABOUT = {
    "machine": MACHINE, "device": "NVIDIA H100, CUDA 13.0, cuDNN 91000", "preset": "gpt2",
    "batch": [64, 1024], "rounds": 2, "flops_per_token": 1e9, "baseline": PLAIN + COMPILED,
}  # fmt: skip


def turn(number: int, name: str, seconds: float, megabytes: float, loss: float) -> dict[str, Any]:
    return {
        "round": number, "contender": name, "seconds": seconds, "cpu_seconds": seconds,
        "megabytes": megabytes, "losses": [loss] * 150, "start": 20.0,
    }  # fmt: skip


def fill(setting: Setting, faster: float) -> None:
    """Results of a machine on which everything but the memory is so many times better."""
    note = replace(setting, stage="train").note
    note({"about": ABOUT})
    for number in (1, 2):
        rates = {"burst": 8e14, "sustained": 7e14, "datasheet": 9.89e14}
        note({"round": number, "contender": PRODUCT, **rates})
        note(turn(number, OURS, 0.15 / faster, 20_000, 5.0 + 0.005 / faster))
        note(turn(number, PLAIN + COMPILED, 0.15, 41_000, 5.0))
        note({"round": number, "contender": PEER + COMPILED, "failed": "no memory"})
    note(turn(1, PLAIN, 0.3, 61_000, 5.0))
    note = replace(setting, stage="generate").note
    note({"about": ABOUT | {"new_tokens": 100, "batches": [1, 8]}})
    for name, speed in (
        ("myGPT, bf16", 300 * faster),
        ("myGPT, fp32", 1.0),
        ("Hugging Face, bf16", 100),
    ):
        own = {str(batch): {"tokens_s": speed, "cpu_ms": 1.0} for batch in (1, 8)}
        note({"round": 1, "contender": name, **own})
    note = replace(setting, stage="race").note
    for name, speed in ((race.OURS, faster), (race.PLAIN, 0.55)):
        for step in (1, 2, 3, 4):
            at = {"racer": name, "step": step, "seconds": 10.0 * step}
            note(at | {"loss": 6 - step * speed})
            note(at | {"val": 6 - step * speed})
    note = replace(setting, stage="run").note
    note({"command": "start", "exit": 0, "seconds": 9.0, "tail": ["a | b"]})
    waited = {str(step): 0.5 if step in (1, 11) else 0.02 / faster**2 for step in range(1, 21)}
    rates = dict.fromkeys(waited, 400000.0)
    note({"losses": {}, "timings": {"waiting": waited, "tokens_per_second": rates}})


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting("all", "gpt2", "cuda", tmp_path, tmp_path)


def verdicts(setting: Setting) -> dict[str, tuple[float | None, str]]:
    findings: dict[str, list[Any]] = {}
    for finding in read(setting.out) if (setting.out / RESULTS).exists() else []:
        findings.setdefault(finding["stage"], []).append(finding)
    return {mark.what: (mark.value, mark.verdict) for mark in report.marks(findings)}


def test_marks_that_are_reached_and_not(setting: Setting) -> None:
    fill(setting, faster=1.0)
    assert verdicts(setting) == {
        "smoke: checks passed": (None, "not measured"),
        "tokens/s": (pytest.approx(65536 / 0.15, abs=0.1), "not reached"),
        "share of the sustained product rate": (0.624, "reached"),
        "× the plain step, compiled": (1.0, "not reached"),
        "× Hugging Face, compiled": (None, "not measured"),
        "memory / the plain step's": (0.328, "reached"),
        "loss, mean difference from the plain step's over 200 steps": (
            pytest.approx(0.005), "reached",
        ),
        "generation of one text × Hugging Face": (3.0, "reached"),
        "race: time to the plain recipe's loss": (pytest.approx(0.55), "reached"),
        "waiting for data, share of time": (pytest.approx(0.02), "not reached"),
    }  # fmt: skip


def test_marks_of_a_faster_and_of_a_slower_machine(setting: Setting, tmp_path: Path) -> None:
    fill(setting, faster=1.5)
    fast = verdicts(setting)
    assert fast["tokens/s"][1] == fast["× the plain step, compiled"][1] == "reached"
    assert fast["waiting for data, share of time"] == (pytest.approx(0.02 / 2.25), "reached")
    slow = replace(setting, out=tmp_path / "slow")
    slow.out.mkdir()
    fill(slow, faster=0.4)
    found = verdicts(slow)
    assert found["race: time to the plain recipe's loss"] == (float("inf"), "not reached")
    assert found["generation of one text × Hugging Face"] == (1.2, "not reached")
    assert found["loss, mean difference from the plain step's over 200 steps"][1] == "not reached"


def test_a_check_that_is_missing_is_not_passed(setting: Setting) -> None:
    note = replace(setting, stage="smoke").note
    for number, check in enumerate(CHECKS):
        assert verdicts(setting)["smoke: checks passed"][1] == (
            "not reached" if number else "not measured"
        )
        note({"contender": check.__name__, "errors": {}, "bound": 0.1, "passed": True})
    assert verdicts(setting)["smoke: checks passed"] == (6, "reached")


def test_too_few_steps_are_no_comparison_of_losses(setting: Setting) -> None:
    note = replace(setting, stage="train").note
    for name in (OURS, PLAIN + COMPILED):
        note(turn(1, name, 1.0, 1.0, 5.0))
    findings = {"train": list(read(setting.out))}
    assert report.loss_difference(findings) is None


def test_the_report(setting: Setting, tmp_path: Path) -> None:
    fill(setting, faster=1.0)
    setting.note({"command": "python -m bench.gpu OUT", "deadline": 520})
    about = {"machine": MACHINE, "device": "NVIDIA H100"}
    noted = replace(setting, stage="machine")
    noted.note(about)
    noted.note({"sample": {"sm_mhz": 1700.0, "watts": 690.0}})
    smoke = replace(setting, stage="smoke").note
    smoke({"contender": "loader", "errors": {"a": 0.5}, "bound": 0.02, "passed": False})
    smoke({"contender": "resume", "failed": "it broke"})
    micro = replace(setting, stage="micro").note
    micro({"contender": "rates", "figures": [{"what": "square", "ms": 1.5, "tflops": 700.0}]})
    micro({"contender": "losses", "failed": "no memory"})
    replace(setting, stage="train").note({"state": "out of time after 150 s", "seconds": 150})
    kernels = [{"kernel": "nvjet", "calls": 12.0, "ms": 3.2}]
    parts = [{"part": "AdamW", "ms": 1.0, "share": 1.0}]
    replace(setting, stage="profile").note({"profile": {"parts": parts, "kernels": kernels}})
    text = report.as_text(setting.out, tmp_path)
    for words in (
        "$ python -m bench.gpu OUT", "436,907", "failed: Hugging Face, compiled: no memory",
        "not passed: a", "failed: it broke", "1700 |", "690 |", "out of time after 150 s", "nvjet",
        "700", "failed: losses: no memory", "a / b", "400,000 tokens/s", "CUDA 13.0",
        f"![race]({tmp_path / report.PICTURE})",
    ):  # fmt: skip
        assert words in text, words
    assert "Not measured." not in text
    assert (tmp_path / report.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_a_report_of_next_to_nothing(setting: Setting) -> None:
    setting.note({"command": "python -m bench.gpu OUT", "deadline": 520})
    with open(setting.out / RESULTS, "ab") as file:
        file.write(b'\n{"stage": "train", "conten')
    text = report.as_text(setting.out, setting.out)
    assert text.count("Not measured.") == len(report.SECTIONS) - 2
    assert text.count("not measured") == 10 and "![race]" not in text


def test_the_command(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[Any]] = []
    monkeypatch.setattr(Runner, "run", lambda self, stages: ran.append(stages) or ["race"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    arguments = ["x", str(setting.out), "--device", "cpu", "--preset", "tiny", "--deadline", "1040"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as leaving:
        command.main()
    assert leaving.value.code == 1 and "not finished: race" in capsys.readouterr().err
    assert {stage.name: stage.seconds for stage in ran[0]}["race"] == 420
    assert sum(stage.least for stage in command.STAGES) < command.DEADLINE
    monkeypatch.setattr(sys, "argv", ["x", "--report", str(setting.out)])
    command.main()
    assert "### Marks" in capsys.readouterr().out
    for words in (arguments, ["x", "--report", str(setting.out / "none")]):
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as leaving:
            command.main()
        assert leaving.value.code == 2 and "error: " in capsys.readouterr().err


def test_samples_of_a_gpu() -> None:
    expected = {"sm_mhz": 1980.0, "memory_mhz": 2619.0, "watts": 688.2, "celsius": 61.0}
    assert stages.parse("1980, 2619, 688.20, 61, [N/A], \n345, 1593, 70.0, 25, 4, 0\n") == expected
    assert stages.parse("") == {}
