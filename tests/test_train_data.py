"""What a run is trained on and begins with: lengths, growing data, other weights, old versions."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import train
from mygpt import checkpoint, log, run_config
from mygpt.pretrained import from_pretrained
from mygpt.report import run_summary
from shards import tokenizer
from shards.manifest import Manifest, Split, TokenizerIdentity
from tests.dataset import VOCABULARY, write_dataset
from tests.training import (
    ROOT,
    arguments,
    final_bytes,
    one_job,
    refused,
    start,
)

pytestmark = pytest.mark.usefixtures("quick")

RELEASED = ROOT / "tests" / "released"


def config_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())


# --- how long


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (("--max-tokens", "600"), 5),  # of 128 tokens each
        (("--epochs", "0.25"), 5),  # of (1499 // 16 + 1002 // 16) windows, 8 a step
    ],
)
def test_any_one_length_says_how_long_and_the_others_are_told(
    data: Path, tmp_path: Path, flags: tuple[str, str], steps: int
) -> None:
    asked = [*arguments(data, tmp_path), "--max-steps", "0", *flags]
    assert train.main(asked) == 0
    assert checkpoint.steps(tmp_path)[-1] == steps
    text = (tmp_path / "log.txt").read_text()
    assert f"length {steps} steps = {steps * 128} tokens = {steps * 8 / 155:.2f} epochs" in text
    assert config_of(tmp_path)["config"]["max_steps"] == steps
    assert train.main(asked) == 0  # and it says so again
    assert start(data, tmp_path, "--max-steps", str(steps)) == 0
    refused(data, tmp_path, "--max-steps", "0", flags[0], "1")


# --- several sources, and one that grows


def test_several_sources_are_one_stream_that_goes_on(data: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", seed=1).folder
    mixed = ["--data", f"one=0.7:{data}", "--data", f"two=0.3:{other}"]
    for run, *stops in (["straight"], ["stopped", "--stop-at", "7"], ["stopped"]):
        rest = arguments(data, tmp_path / run, *stops)[3:]  # without its own --data
        assert train.main(["tiny", *mixed, *rest]) == 0
    assert final_bytes(tmp_path / "stopped") == final_bytes(tmp_path / "straight")
    record = config_of(tmp_path / "stopped")
    assert record["generations"] == {"one": 0, "two": 0}
    assert record["config"]["data"] == mixed[1::2]
    refused(data, tmp_path / "stopped")
    turned = ["tiny", "--data", f"one=0.6:{data}", "--data", f"two=0.4:{other}"]
    with pytest.raises(SystemExit):
        train.main([*turned, *arguments(data, tmp_path / "stopped")[3:]])


def grown(folder: Path) -> None:
    """Make the second training shard of a dataset one that came with its generation 1."""
    manifest = Manifest.load(folder)
    first, second = manifest.splits["train"].shards
    splits = {**manifest.splits, "train": Split((first, replace(second, generation=1)))}
    replace(manifest, splits=splits, generation=1).save(folder)


def test_a_grown_dataset_is_moved_on_to_when_asked_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_dataset(tmp_path / "data")
    data, run = whole.folder, tmp_path / "run"
    first = Split(whole.splits["train"].shards[:1])
    replace(whole, splits={**whole.splits, "train": first}).save(data)
    before = Manifest.load(data).fingerprint
    start(data, run, "--stop-at", "5")
    whole.save(data)
    grown(data)
    start(data, run, "--stop-at", "6")
    assert (config_of(run)["fingerprint"], config_of(run)["generations"]) == (before, {"data": 0})
    capsys.readouterr()
    for stop in ("8", "12"):  # the flag may stay: there is nothing newer the second time
        start(data, run, "--stop-at", stop, "--generation", "latest")
        assert "up to step 6 the data were those of generation data 0" in capsys.readouterr().out
    start(data, run)
    record = config_of(run)
    assert record["fingerprint"] == Manifest.load(data).fingerprint != before
    assert record["generations"] == {"data": 1}
    assert record["earlier"] == [{"until": 6, "fingerprint": before, "generations": {"data": 0}}]
    assert final_bytes(run)[2]["position"] == 20 * 8
    assert list(log.read(run).train) == list(range(1, 21))


def test_a_damaged_checkpoint_does_not_say_when_a_run_moved_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_dataset(tmp_path / "data")
    data, run = whole.folder, tmp_path / "run"
    first = Split(whole.splits["train"].shards[:1])
    replace(whole, splits={**whole.splits, "train": first}).save(data)
    start(data, run, "--stop-at", "6")
    whole.save(data)
    grown(data)
    (checkpoint.folder_of(run, 6) / "optimizer.safetensors").write_bytes(b"")
    reads = Mock(wraps=checkpoint.newest_intact)
    monkeypatch.setattr(checkpoint, "newest_intact", reads)
    start(data, run, "--stop-at", "8", "--generation", "latest")
    assert reads.call_count == 1  # it reads every tensor
    assert [former["until"] for former in config_of(run)["earlier"]] == [5]


# --- other weights to begin with


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 saved by Hugging Face's library."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    shape = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    path = tmp_path_factory.mktemp("hf")
    GPT2LMHeadModel(shape).save_pretrained(path)
    return path


def test_a_run_may_begin_with_weights_that_it_then_does_not_need(
    data: Path, tmp_path: Path, folder: Path
) -> None:
    begun = tmp_path / "begun"
    shutil.copytree(folder, begun)
    job = one_job(data, tmp_path / "none", "--init-from", str(begun))
    expected = from_pretrained(begun, block_size=16, dropout=0.2)
    assert job.config.model == expected.config
    assert (job.config.model.block_size, job.config.model.n_layers) == (16, 1)
    for name, parameter in job.model.named_parameters():
        assert torch.equal(parameter, dict(expected.named_parameters())[name])
    flags = ("--init-from", str(begun), "--keep", "9")
    start(data, tmp_path / "straight", *flags)
    start(data, tmp_path / "stopped", *flags, "--stop-at", "4")
    assert checkpoint.steps(tmp_path / "stopped") == [0, 4]
    begun.rename(tmp_path / "gone")
    start(data, tmp_path / "stopped", *flags)
    assert final_bytes(tmp_path / "stopped") == final_bytes(tmp_path / "straight")
    assert config_of(tmp_path / "stopped")["config"]["init_from"] == str(begun)


def test_a_run_may_begin_with_another_run(
    data: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (straight, checkpoint.folder_of(straight, 20)):
        job = one_job(data, tmp_path / "none", "--init-from", str(name))
        weights = checkpoint.load_weights(checkpoint.folder_of(straight, 20))
        for parameter_name, parameter in job.model.named_parameters():
            assert torch.equal(parameter, weights[parameter_name])
    start(data, tmp_path / "tuned", "--init-from", str(straight), "--stop-at", "1")
    told = capsys.readouterr().out
    assert f"init   from {checkpoint.folder_of(straight, 20)}, fine-tuned: adamw" in told


def test_initial_weights_for_a_run_without_them_are_refused(
    data: Path, straight: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(data, straight, "--init-from", str(folder))
    told = capsys.readouterr().err
    assert "holds a run with init_from none" in told
    assert "give the command without --init-from to resume it" in told


def test_a_dataset_that_was_moved_is_asked_for(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    shutil.copytree(data, own)
    start(own, tmp_path / "run", "--stop-at", "1")
    own.rename(tmp_path / "moved")
    refused(own, tmp_path / "run")
    told = capsys.readouterr().err
    assert f"in {own}, found none: if it was moved, give its folder with --data" in told
    assert "python -m prepare" not in told
    assert start(tmp_path / "moved", tmp_path / "run", "--stop-at", "2") == 0


def test_weights_that_are_not_there_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    refused(data, tmp_path / "run", "--init-from", str(tmp_path / "empty"))
    assert "config.json" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- texts written on the way


def test_samples_are_written_and_change_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(data, tmp_path / "none", "--sample-interval", "5")  # its tokens are of no text
    budget = ("--max-steps", "0", "--time-budget", "60")
    refused(data, tmp_path / "none", "--sample-interval", "5", *budget)
    assert "measuring" not in capsys.readouterr().out  # refused before any work
    gpt2 = tokenizer.load("gpt2")
    identity = TokenizerIdentity(gpt2.name, gpt2.n_vocab, gpt2.eot, gpt2.hash)
    words = write_dataset(tmp_path / "words", tokenizer=identity).folder
    flags = ("--vocab-size", "50304", "--max-steps", "4", "--n-embed", "8", "--n-layers", "1")
    prompts = ("--sample-interval", "2", "--sample-prompt", "def", "--sample-prompt", "é")
    start(words, tmp_path / "plain", *flags)
    start(words, tmp_path / "told", *flags, *prompts, "--stop-at", "3")
    capsys.readouterr()
    start(words, tmp_path / "told", *flags, *prompts, "--sample-prompt", "a ")
    shown = capsys.readouterr().out
    assert "note: the prompt 'a ' ends in a space" in shown
    assert shown.count("\nsample 4  def") == shown.count("\nsample 4  é") == 1
    assert f"\nsamples     {tmp_path / 'told' / 'samples.jsonl'}\n" in shown
    assert f"\nsample      python eval.py {tmp_path / 'told'} --prompt def\n" in shown
    assert final_bytes(tmp_path / "told") == final_bytes(tmp_path / "plain")
    samples = run_summary.read_samples(tmp_path / "told")
    assert [(one["step"], one["prompt"]) for one in samples] == [
        *((2, "def"), (2, "é"), (4, "def"), (4, "é"), (4, "a ")),
    ]
    assert all(one["text"].startswith(one["prompt"]) for one in samples)
    assert len({one["text"] for one in samples if one["step"] == 4}) == 3
    assert run_summary.read_samples(tmp_path / "plain") == []


# --- what older versions wrote


@pytest.mark.parametrize(("version", "name"), [(2, "dataset")])
def test_a_run_of_an_older_version_goes_on(version: int, name: str, tmp_path: Path) -> None:
    run, data = tmp_path / "run", RELEASED / f"v{version}" / "dataset"
    shutil.copytree(RELEASED / f"v{version}" / "run", run)
    state = checkpoint.read_state(checkpoint.folder_of(run, 6))
    assert (state["version"], state["generations"]) == (version, {name: 0})
    record = run_config.read_run(run)
    assert record is not None
    assert (record.config.data, record.generations) == (("dataset",), {name: 0})
    stored = record.config
    flags = f"""--vocab-size 64 --block-size 16 --n-layers 1 --n-heads 2 --n-embed 8
        --total-batch-size 64 --micro-batch 4 --device cpu --max-steps {stored.max_steps}
        --optimizer adamw --schedule cosine --max-lr 3e-3 --min-lr 1.5e-4 --dropout 0.2""".split()
    asked = ["tiny", "--data", str(data), *flags]
    assert train.main([*asked, "--log-dir", str(run)]) == 0
    assert checkpoint.read_state(checkpoint.folder_of(run, 12))["version"] == 2
    history = log.read(run)
    assert list(history.train) == list(range(1, 13))
    assert all(math.isfinite(loss) for loss in history.val.values())
    # Its own numbers go on in these of today: the same as a run that was never stopped.
    assert train.main([*asked, "--log-dir", str(tmp_path / "new")]) == 0
    found, expected = log.read(run).train, log.read(tmp_path / "new").train
    assert found == pytest.approx(expected, abs=2e-5)
