"""bench.optimizers: every contender is a run of train.py, told by its last validation."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import optimizers
from bench.optimizers import CONTENDERS, Contender, Options
from mygpt import settings
from tests.dataset import write_dataset

# A train.py that learns nothing, but writes the log of one that does.
TRAIN = """
import sys
from pathlib import Path

args = dict(zip(sys.argv[2::2], sys.argv[3::2]))
loss = float(args["--max-lr"]) * 100 + int(args["--seed"]) - 1337
if args["--optimizer"] == "fails":
    sys.exit("error: no such optimizer")
Path(args["--log-dir"], "log.txt").write_text(
    "start 0/20\\n"
    "step 1/20  loss 9.0  lr 1.0e-03  norm 0.5  ms 2.5  tok/s 400  mfu n/a  eta 0:00:01\\n"
    f"val 10/20  loss 7.0  tokens 64\\nval 20/20  loss {loss:.6f}  tokens 64\\n"
)
"""


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    write_dataset(tmp_path / "data")
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(optimizers, "TRAIN", tmp_path / "train.py")
    return Options(data=tmp_path / "data", seconds=7, rounds=2)


def test_every_contender_is_trained_as_often(options: Options) -> None:
    found = optimizers.run(options)
    assert [(row["optimizer"], row["schedule"]) for row in found["rows"]] == [
        (optimizer, schedule) for optimizer in ("adamw", "muon") for schedule in ("cosine", "wsd")
    ]
    for row in found["rows"]:
        first = row["max_lr"] * 100
        assert row["loss"]["runs"] == [pytest.approx(first), pytest.approx(first + 1)]
        assert row["steps"] == [20, 20] and row["tokens_s"]["median"] == 400
    assert "muon, wsd" in optimizers.as_text(found) and "1.300" in optimizers.as_text(found)


def test_a_run_that_fails_says_why(options: Options) -> None:
    with pytest.raises(ValueError, match="to finish, found: error: no such optimizer"):
        optimizers.trained(Contender("fails", "cosine", 1e-3), options, iter([1337]))


def test_no_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="python -m prepare stdlib --out"):
        optimizers.run(Options(data=tmp_path / "none"))


@pytest.mark.parametrize("contender", CONTENDERS)
def test_train_py_takes_the_flags(contender: Contender) -> None:
    flags = optimizers.flags(contender, Options(seconds=300), Path("run"))
    config = settings.parse(flags, "")
    assert (config.optimizer, config.schedule, config.max_lr) == contender
    assert config.time_budget == 300 and not config.max_steps
    assert config.min_lr == pytest.approx(contender.max_lr / 20)
    assert config.resolved(500).val_interval > 500


def test_the_command_answers_in_json(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--data", str(options.data), "--json"])
    optimizers.main()
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert len(found["rows"]) == 4 and found["rounds"] == 1
