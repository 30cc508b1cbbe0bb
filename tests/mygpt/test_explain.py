"""Losses of a step's sequences: together they are the loss that the step logged."""

import json
from pathlib import Path

import pytest
import torch

from mygpt import checkpoint, log
from mygpt.explain import main
from mygpt.pretrained import from_pretrained
from shards import __main__ as shards
from shards.commands.explain import rows_of
from tests.shards.support import text_dataset
from tests.training import start

pytestmark = pytest.mark.usefixtures("quick")
SHAPE = "--vocab-size 50304 --n-embed 8 --n-layers 1"
FLAGS = f"{SHAPE} --max-steps 3 --dropout 0 --keep 9".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    texts = [[" ".join(f"{word} {i}" for i in range(99)) for word in ("one", "two", "three")]] * 2
    data = text_dataset(folder / "data", texts, texts[:1]).folder
    assert start(data, folder / "run", *FLAGS, "--checkpoint-interval", "1") == 0
    return folder / "run"


def ranked(
    capsys: pytest.CaptureFixture[str], run: Path, *flags: str, main_=main
) -> list[dict[str, object]]:
    capsys.readouterr()
    assert main_(["--run", str(run), *flags, "--json", "--device", "cpu"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_losses_are_those_of_the_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint of step 2 has the weights with which step 3 read its batch."""
    rows = ranked(capsys, run, "--step", "3")
    losses = [row["loss"] for row in rows]
    assert sum(losses) / len(losses) == pytest.approx(log.read(run).train[3], abs=2e-6)
    assert losses == sorted(losses, reverse=True) and len({row["row"] for row in rows}) == 8
    model = from_pretrained(checkpoint.folder_of(run, 2)).eval()
    [first] = rows_of(run, 3, rows[0]["row"], ())
    assert {key: rows[0][key] for key in ("shard", "token", "text")} == {
        key: getattr(first, key) for key in ("shard", "token", "text")
    }
    ids = torch.tensor(first.ids.astype("int64"))[None]
    assert model(ids[:, :-1], ids[:, 1:])[1].item() == pytest.approx(losses[0], rel=1e-5)


def test_another_checkpoint_and_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ranked(capsys, run, "--step", "2")
    other = ranked(capsys, run, "--step", "2", "--checkpoint", str(checkpoint.folder_of(run, 3)))
    assert [row["loss"] for row in own] != [row["loss"] for row in other]
    with pytest.raises(SystemExit) as exit_:
        main(["--run", str(run), "--step", "1"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "before step 1, found " in error and "--keep-every" in error and error.count("\n") == 1


def test_for_people(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(run), "--step", "3", "--device", "cpu"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("mean ") and first.endswith("step_00000002")
    assert second.startswith("loss ") and "=== row " in second


def test_shards_hands_over(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(
        "shards.commands.explain.subprocess.call", lambda command: asked.append(command) or 3
    )
    words = ["explain", "--run", str(run), "--step", "3", "--losses", "--data", "a", "--json"]
    assert shards.main(words) == 3
    assert asked[0][1:] == [
        *("-m", "mygpt.explain", "--run", str(run), "--step", "3", "--data", "a", "--json"),
    ]
