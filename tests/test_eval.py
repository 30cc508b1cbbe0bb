"""eval.py: the loss of the whole split, exact; the right checkpoint and dataset; samples."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eval as script
import train
from mygpt import checkpoint, runs
from mygpt.model import GPT
from shards import tokenizer
from shards.manifest import Manifest, TokenizerIdentity
from tests.dataset import VOCABULARY, write_dataset

ROOT = Path(script.__file__).parent
MODEL = "--block-size 16 --n-layers 2 --n-heads 2 --n-embed 32"
BATCH = "--total-batch-size 64 --micro-batch 4 --device cpu --max-steps 6 --val-interval 2 --keep 9"


def trained(data: Path, run: Path, *flags: str) -> Path:
    arguments = ["tiny", "--data", str(data), "--log-dir", str(run), *MODEL.split(), *BATCH.split()]
    assert train.main([*arguments, *flags]) == 0
    return run


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two would only wait for each other on models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "random").folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on tokens of no real tokenizer: quick, but nothing can be sampled from it."""
    folder = tmp_path_factory.mktemp("log") / "run"
    return trained(data, folder, "--vocab-size", str(VOCABULARY), "--dropout", "0.5")


@pytest.fixture(scope="module")
def gpt2_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a dataset with GPT-2's vocabulary."""
    root, gpt2 = tmp_path_factory.mktemp("gpt2"), tokenizer.load("gpt2")
    identity = TokenizerIdentity(gpt2.name, gpt2.n_vocab, gpt2.eot, gpt2.hash)
    data = write_dataset(root / "data", tokenizer=identity).folder
    return trained(data, root / "run", "--vocab-size", "50304", "--val-interval", "6")


def report(
    capsys: pytest.CaptureFixture[str], *flags: str | Path, samples: bool = False
) -> dict[str, Any]:
    capsys.readouterr()
    quiet = () if samples else ("--num-samples", "0")
    assert script.main([*map(str, flags), *quiet, "--json", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def refused(capsys: pytest.CaptureFixture[str], *flags: str | Path) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        script.main([*map(str, flags)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def one_token_at_a_time(run: Path) -> tuple[float, int]:
    """(nats, targets) of the validation files, each target asked of the model on its own."""
    folder = checkpoint.newest(run)
    assert folder is not None
    config = runs.from_json(checkpoint.read_state(folder)["config"])
    model, block_size = GPT(config.model).eval(), config.model.block_size
    checkpoint.load_model(folder, model)
    nats, targets = 0.0, 0
    for path in sorted(Path(str(config.data)).glob("val_*.npy")):
        ids = torch.from_numpy(np.load(path).astype(np.int64))
        for place in range(1, len(ids)):
            window_start = (place - 1) // block_size * block_size
            with torch.no_grad():
                logits, _ = model(ids[None, window_start:place])
            assert logits is not None
            nats -= logits[0, -1].double().log_softmax(0)[ids[place]].item()
            targets += 1
    return nats, targets


def test_the_loss_is_that_of_every_token_once(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nats, targets = one_token_at_a_time(run)
    for batch_size in ("0", "1", "5"):
        found = report(capsys, run, "--batch-size", batch_size)
        assert found["tokens"] == targets
        assert found["loss"] == pytest.approx(nats / targets, rel=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(nats / targets), rel=1e-6)
        bits_per_byte = nats / math.log(2) / found["text_bytes"]
        assert found["bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-6)


def test_two_ranks_find_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "eval.py"), str(run), "--json", "--num-samples", "0", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    alone = report(capsys, run)
    for name, value in json.loads(done.stdout).items():
        expected = alone[name]
        summed = name in ("loss", "perplexity", "bits_per_byte")
        assert value == (pytest.approx(expected, rel=1e-6) if summed else expected)


def test_the_baselines_are_those_of_the_shards(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts: Counter[int] = Counter()
    for path in data.glob("train_*.npy"):
        counts.update(np.load(path).tolist())
    total = counts.total() + VOCABULARY
    targets = [t for path in data.glob("val_*.npy") for t in np.load(path)[1:].tolist()]
    expected = sum(-math.log((counts[t] + 1) / total) for t in targets) / len(targets)
    found = report(capsys, run)
    assert found["unigram_loss"] == pytest.approx(expected)
    assert found["uniform_loss"] == pytest.approx(math.log(VOCABULARY))


def test_which_checkpoint(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert report(capsys, run)["step"] == 6
    step_4 = checkpoint.folder_of(run, 4)
    assert report(capsys, step_4)["checkpoint"] == str(step_4)
    other = tmp_path / "log" / "deep" / "run"
    shutil.copytree(run, other)
    state = other / "checkpoints" / "step_00000004" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"val_loss": 0.5}))
    assert report(capsys, other, "--best")["step"] == 4
    monkeypatch.chdir(tmp_path)
    os.utime(other / "checkpoints" / "step_00000006")
    found = report(capsys)
    assert Path(found["checkpoint"]) == Path("log/deep/run/checkpoints/step_00000006")


def test_the_dataset_must_be_that_of_the_training(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    assert report(capsys, run, "--data", moved)["fingerprint"] == Manifest.load(data).fingerprint
    other = write_dataset(tmp_path / "other", seed=1).folder
    assert "expected the dataset" in refused(capsys, run, "--data", other)


def test_what_is_missing_is_said(
    run: Path,
    gpt2_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "expected a run with a checkpoint" in refused(capsys, tmp_path)
    assert "--num-samples must be 0 or more" in refused(capsys, run, "--num-samples", "-1")
    assert "--top-p must be above 0" in refused(capsys, run, "--top-p", "0")
    assert "expected the tokenizer gpt2, found 'random'" in refused(capsys, run)
    assert "python -m prepare" in refused(capsys, run, "--data", tmp_path)
    assert "no-such-file" in refused(capsys, gpt2_run, "--prompt-file", "no-such-file")
    monkeypatch.chdir(tmp_path)
    assert "python train.py" in refused(capsys)


def test_json_has_samples_that_can_be_repeated(
    gpt2_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("import os\n")
    prompts = ["--prompt", "def f", "--prompt", "x <|endoftext|>"]
    flags = [*prompts, "--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "20"]
    found = report(capsys, gpt2_run, *flags, "--num-samples", "2", samples=True)
    assert {"loss", "perplexity", "bits_per_byte", "tokens", "unigram_loss"} < set(found)
    asked = ["def f", "x <|endoftext|>", "import os\n"]
    assert [s["prompt"] for s in found["samples"]] == [p for p in asked for _ in range(2)]
    for sample in found["samples"]:
        assert sample["text"].startswith(sample["prompt"])
    assert report(capsys, gpt2_run, *flags, "--num-samples", "2", samples=True) == found
    other = report(capsys, gpt2_run, *flags, "--num-samples", "2", "--seed", "5", samples=True)
    assert other["samples"] != found["samples"]
    assert other["loss"] == found["loss"]


def test_without_a_prompt_documents_are_begun(
    gpt2_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(capsys, gpt2_run, "--max-new-tokens", "5", samples=True)
    assert [sample["prompt"] for sample in found["samples"]] == ["", ""]
    assert script.main([str(gpt2_run), "--max-new-tokens", "5", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for words in ("step 6 of 6", "nats a token", "bits per byte", "unigram", "sample 2, prompt ''"):
        assert words in text
    assert f"{found['loss']:.4f}" in text
