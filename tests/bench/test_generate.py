"""bench.generate: everyone writes as many tokens, and the table says how fast."""

import json
import sys
from typing import Any

import pytest

from bench import generate, worker
from bench.generate import OURS, PEER, Options
from mygpt.config import GPTConfig
from mygpt.settings import TrainConfig
from tests.bench.support import InThisProcess

SMALL = Options(preset="tiny", batch=2, new_tokens=3, rounds=1)


@pytest.fixture(scope="module")
def found() -> Any:
    shape = GPTConfig(block_size=8, vocab_size=131, n_layers=2, n_heads=2, n_embed=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "Worker", InThisProcess)
        patch.setitem(generate.PRESETS, "tiny", ("small", TrainConfig(shape)))
        return generate.run(SMALL)


def test_every_contender_has_a_row(found: Any) -> None:
    rows = [(row["what"], row["weights"], row["batch"]) for row in found["rows"]]
    one = [(OURS, "fp32", 1), (OURS, "bf16", 1), (OURS, "int8", 1), (PEER, "fp32", 1)]
    assert rows == one + [(what, weights, 2) for what, weights, _ in one]
    assert all(row["tokens_s"]["median"] > 0 for row in found["rows"])
    assert [row["of_peer"] for row in found["rows"] if row["what"] == PEER] == [1, 1]
    assert PEER in generate.as_text(found)


def test_a_rate_counts_the_tokens_of_all_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, work = iter([10.0, 12.0]), iter([1.0, 1.6])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("time.process_time", lambda: next(work))
    lengths: list[int] = []
    rates = generate.rates(lengths.append, 4, SMALL)
    assert lengths == [3]
    assert rates == {"tokens_s": 4 * 3 / 2, "cpu_ms": pytest.approx(600 / 12)}


def test_the_command_answers_in_json(
    found: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "run", lambda options: found)
    monkeypatch.setattr(sys, "argv", ["bench.generate", "--json"])
    generate.main()
    assert json.loads(capsys.readouterr().out) == found


def test_a_gpu_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["bench.generate", "--device", "cuda"])
    with pytest.raises(SystemExit) as leaving:
        generate.main()
    assert leaving.value.code == 2
    assert "expected a GPU" in capsys.readouterr().err
