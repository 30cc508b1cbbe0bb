"""eval.py: the loss of the whole split, exact; the right checkpoint and dataset; samples."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eval as script
import train
from mygpt import checkpoint, run_config
from mygpt.eval import metrics
from mygpt.evaluate import Loss, evaluate
from mygpt.hub import __main__ as hub
from mygpt.model import GPT
from shards import tokenizer
from shards.manifest import Manifest, TokenizerIdentity
from shards.mixture import Mixture
from tests.dataset import VOCABULARY, write_dataset
from tests.sources import write_sources

pytestmark = pytest.mark.usefixtures("quick")

ROOT = Path(script.__file__).parent
MODEL = "--block-size 16 --n-layers 2 --n-heads 2 --n-embed 32"
BATCH = "--total-batch-size 64 --micro-batch 4 --device cpu --max-steps 6 --val-interval 2 --keep 9"


def trained(data: Path, run: Path, *flags: str) -> Path:
    arguments = ["tiny", "--data", str(data), "--log-dir", str(run), *MODEL.split(), *BATCH.split()]
    assert train.main([*arguments, *flags]) == 0
    return run


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


@pytest.fixture(scope="module")
def exported(gpt2_run: Path) -> Path:
    """The model of that run in Hugging Face's format."""
    folder = gpt2_run.parent / "exported"
    assert hub.main(["export", str(gpt2_run), str(folder)]) == 0
    return folder


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


def one_token_at_a_time(run: Path, data: Path | None = None) -> tuple[float, int]:
    """(nats, targets) of the validation files, each target asked of the model on its own."""
    folder = checkpoint.find(run)
    config = run_config.from_dict(checkpoint.read_state(folder)["config"])
    model, block_size = GPT(config.model).eval(), config.model.block_size
    checkpoint.load_model(folder, model)
    nats, targets = 0.0, 0
    for path in sorted((data or Path(config.data[0])).glob("val_*.npy")):
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


def test_two_ranks_find_the_same(
    gpt2_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--reference", str(checkpoint.folder_of(gpt2_run, 4)), "--num-samples", "0"]
    flags += ["--hellaswag", str(write_questions(tmp_path / "some.jsonl"))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "eval.py"), str(gpt2_run), *flags, "--json", "--device", "cpu"]
    command += ["--out", str(tmp_path / "two.md")]  # so that neither finds the other's scores
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    alone = report(capsys, gpt2_run, *flags, "--out", tmp_path / "one.md")
    assert alone["choices"]["hellaswag"]["questions"] == 6
    assert_close(json.loads(done.stdout), alone)


def assert_close(found: Any, expected: Any) -> None:
    """Equal, floats to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_close(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    else:
        assert found == expected


def write_questions(path: Path) -> Path:
    rows = [
        {"ctx": "a b c " * i, "endings": ["d e", "f", "g h i", "x"], "label": i % 4}
        for i in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
    checkpoint.note_val_loss(checkpoint.folder_of(other, 4), 0.5)
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
    assert "--num-samples must be 0 to 10000" in refused(capsys, run, "--num-samples", "-1")
    assert "--top-p must be above 0" in refused(capsys, run, "--top-p", "0")
    assert "of the tokenizer random as" in refused(capsys, run)
    assert "if it was moved" in refused(capsys, run, "--data", tmp_path)
    assert "no-such-file" in refused(capsys, gpt2_run, "--prompt-file", "no-such-file")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for flag in ("--prompt-file", "--choices", "--hellaswag"):
        assert "latin.txt" in refused(capsys, gpt2_run, flag, tmp_path / "latin.txt")
    assert "--interactive" in refused(capsys, gpt2_run, "--interactive", "--json")
    shutil.copytree(run, tmp_path / "new", ignore=shutil.ignore_patterns("checkpoints"))
    assert "let train.py reach its first" in refused(capsys, tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    assert "mygpt train" in refused(capsys)  # no train.py in this folder


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
    for words in ("step 6 of 6", "nats per", "bits per byte", "unigram", "sample 2, prompt ''"):
        assert words in text
    assert f"{found['loss']:.4f}" in text


@pytest.mark.parametrize("version", ["v2"])
def test_what_an_older_version_trained(
    version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", ROOT / "tests" / "released" / version / "dataset"
    shutil.copytree(ROOT / "tests" / "released" / version / "run", run)
    found = report(capsys, run, "--data", data)
    assert found["step"] == 6
    nats, targets = one_token_at_a_time(run, data)
    assert found["loss"] == pytest.approx(nats / targets, rel=1e-6)


# --- documents, sources, positions


@pytest.fixture(scope="module")
def sources_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a dataset of several documents and sources."""
    root = tmp_path_factory.mktemp("sources")
    data = write_sources(root / "data").folder
    return trained(data, root / "run", "--vocab-size", str(VOCABULARY), "--val-interval", "6")


def test_sources_and_positions_add_up_to_the_whole(
    sources_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(capsys, sources_run)
    assert [source["name"] for source in found["sources"]] == [
        *("part_1.jsonl", "part_0.jsonl", "part_2.jsonl"),
    ]
    for key in ("tokens", "documents", "text_bytes"):
        assert sum(source[key] for source in found["sources"]) == found[key]
    nats = [source["loss"] * source["tokens"] for source in found["sources"]]
    assert sum(nats) == pytest.approx(found["loss"] * found["tokens"], rel=1e-12)
    curve = found["positions"]
    assert len(curve["loss"]) == len(curve["tokens"]) == 16
    for points in (zip(curve["loss"], curve["tokens"], strict=True),):
        assert sum(loss * n for loss, n in points) == pytest.approx(sum(nats), rel=1e-12)
    assert [(bin_["from"], bin_["to"]) for bin_ in curve["bins"]] == [
        *((1, 1), (2, 2), (3, 4), (5, 8), (9, 16)),
    ]
    assert sum(bin_["tokens"] for bin_ in curve["bins"]) == found["tokens"]


def test_the_error_is_over_documents(sources_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written out: documents' nats from one token at a time, their residuals squared."""
    folder = checkpoint.find(sources_run)
    config = run_config.from_dict(checkpoint.read_state(folder)["config"])
    model = GPT(config.model).eval()
    checkpoint.load_model(folder, model)
    nats, targets, document = Counter[int](), Counter[int](), -1
    for path in sorted(Path(config.data[0]).glob("val_*.npy")):
        ids = torch.from_numpy(np.load(path).astype(np.int64))
        for place in range(1, len(ids)):
            document += ids[place - 1].item() == 0
            with torch.no_grad():
                logits, _ = model(ids[None, (place - 1) // 16 * 16 : place])
            assert logits is not None
            nats[document] -= logits[0, -1].log_softmax(0)[ids[place]].item()
            targets[document] += 1
    mean = nats.total() / targets.total()
    squares = sum((nats[d] - mean * targets[d]) ** 2 for d in targets)
    expected = math.sqrt(squares * len(targets) / (len(targets) - 1)) / targets.total()
    assert report(capsys, sources_run)["loss_se"] == pytest.approx(expected, rel=1e-4)


def test_several_datasets(
    sources_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_sources(tmp_path / "data", seed=1).folder
    specs = [f"some=3:{sources_run.parent / 'data'}", f"other=1:{other}"]
    run, arguments = tmp_path / "run", ["tiny", "--data", specs[0], "--data", specs[1]]
    flags = ["--log-dir", str(run), "--vocab-size", str(VOCABULARY), "--val-interval", "6"]
    assert train.main([*arguments, *MODEL.split(), *BATCH.split(), *flags]) == 0
    found = report(capsys, run)
    assert {part["name"] for part in found["components"]} == {"some", "other"}
    for parts in (found["components"], found["sources"]):
        nats = sum(part["loss"] * part["tokens"] for part in parts)
        assert nats == pytest.approx(found["loss"] * found["tokens"], rel=1e-12)
    assert {part["tokens"] for part in found["components"]} == {found["tokens"] / 2}
    assert {part["name"] for part in found["sources"]} == {
        f"{name}: part_{number}.jsonl" for name in ("some", "other") for number in range(3)
    }
    changed = ("--data", specs[0].replace("=3:", "=1:"), "--data", specs[1])
    assert "expected the dataset" in refused(capsys, run, *changed)


# --- other models


def test_an_exported_folder_gives_what_the_checkpoint_gives(
    gpt2_run: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = gpt2_run.parent / "data"
    prompt = ("--prompt", "def f", "--temperature", "0", "--max-new-tokens", "8")
    own = report(capsys, gpt2_run, *prompt, samples=True)
    found = report(capsys, exported, "--data", data, *prompt, samples=True)
    # An exported model is without the rows that no token has.
    assert found["loss"] == pytest.approx(own["loss"], rel=1e-3)
    for key in ("tokens", "fingerprint", "unigram_loss", "block_size"):
        assert found[key] == own[key]
    assert (found["step"], found["checkpoint"]) == (None, str(exported))
    assert not list(exported.glob("eval*"))
    assert "data/" in refused(capsys, exported)  # which dataset?


def test_a_folder_of_hugging_faces(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "n_positions": 20, "n_embd": 8, "n_layer": 1, "n_head": 2}
    theirs = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    theirs.save_pretrained(tmp_path / "model")
    nats = targets = 0
    for path in sorted(data.glob("val_*.npy")):
        ids = torch.from_numpy(np.load(path).astype(np.int64))
        for start in range(0, len(ids) - 1, 20):
            window = ids[None, start : start + 21]
            with torch.no_grad():
                logits = theirs(window[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum")
            nats, targets = nats + loss.item(), targets + window.size(1) - 1
    found = report(capsys, tmp_path / "model", "--data", data)
    assert found["tokens"] == targets
    assert found["loss"] == pytest.approx(nats / targets, rel=1e-5)


def test_a_reference_reads_the_same_tokens(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = report(capsys, run, "--reference", run)
    assert same["reference"]["loss"] == same["loss"]
    assert (same["reference"]["difference"], same["reference"]["difference_se"]) == (0.0, 0.0)
    step_2 = checkpoint.folder_of(run, 2)
    other = report(capsys, run, "--reference", step_2)
    assert other["reference"]["loss"] == report(capsys, step_2)["loss"]
    assert other["reference"]["step"] == 2
    gain = other["loss"] - other["reference"]["loss"]
    assert other["reference"]["difference"] == pytest.approx(gain)
    assert other["reference"]["difference_se"] > 0


def test_a_shorter_context(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, run, "--block-size", "5")
    folder = checkpoint.find(run)
    config = run_config.from_dict(checkpoint.read_state(folder)["config"])
    model = GPT(config.model)
    checkpoint.load_model(folder, model)
    assert found["loss"] == pytest.approx(loss_in_windows(model, data, 5).mean, rel=1e-6)
    flags = ("--block-size", "17", "--num-samples", "0")
    assert "at most 16 tokens" in refused(capsys, run, *flags)
    assert "at most 16 tokens" in refused(capsys, run, *flags, "--reference", run)


def loss_in_windows(model: GPT, data: Path, block_size: int) -> Loss:
    from mygpt.distributed import DistributedContext
    from shards.reader import EvalWindows

    windows = EvalWindows(Manifest.load(data), "val", block_size)
    return evaluate(model, windows, DistributedContext(0, 0, 1, torch.device("cpu")))


def test_what_is_no_model_is_said(
    run: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    error = refused(capsys, tmp_path / "no" / "where")
    assert f"found no such folder in {Path.cwd()}: name one by its path" in error
    monkeypatch.chdir(tmp_path)  # where there is no log/
    for target in ([], ["log/demo"]):
        assert f"in {tmp_path}: " in refused(capsys, *target)
    error = refused(capsys, run, "--hellaswag", "none.jsonl")
    assert "in none.jsonl, found no such file: get it by curl -LO https://" in error
    shape = {"vocab_size": 60, "n_positions": 20, "n_embd": 8, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / "model")
    error = refused(capsys, tmp_path / "model", "--data", data, "--num-samples", "0")
    assert "dataset's 64 token ids, found one of 60" in error


# --- what is written


def test_the_files(gpt2_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--prompt", "a|b", "--max-new-tokens", "9")
    found = report(capsys, gpt2_run, *flags, samples=True)
    assert json.loads((gpt2_run / "eval.json").read_text()) == found
    document = (gpt2_run / "eval.md").read_text()
    for words in (found["fingerprint"][:12], "step 6 of 6", "| this model |", found["version"]):
        assert words in document
    assert document.count("## sample") == 2
    assert all(
        f"    {line}".rstrip() in document for line in found["samples"][1]["text"].split("\n")
    )
    sample = found["samples"][1]
    assert (sample["step"], sample["temperature"], sample["seed"]) == (6, 0.8, 1337)
    assert sample["checkpoint"] == found["checkpoint"]
    before = (gpt2_run / "eval.json").read_bytes()
    report(capsys, gpt2_run, "--out", tmp_path / "here.md")
    assert json.loads((tmp_path / "here.json").read_text())["samples"] == []
    report(capsys, gpt2_run, "--no-loss")
    assert (gpt2_run / "eval.json").read_bytes() == before
    assert "--out must name" in refused(capsys, gpt2_run, "--out", tmp_path / "here.txt")


def test_every_field_is_explained(
    gpt2_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    explained = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "EVALUATION.md").read_text()))
    questions = write_questions(tmp_path / "some.jsonl")
    flags = ("--reference", gpt2_run, "--choices", questions, "--max-new-tokens", "2")
    found = report(capsys, gpt2_run, *flags, samples=True)
    assert found.keys() <= explained
    assert found["samples"][0].keys() <= explained
    assert found["choices"]["some"].keys() <= explained
    assert found["reference"].keys() <= explained


def test_the_unigram_baseline_of_much_text_counts_some_of_it(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "ENOUGH_TOKENS", 1000)
    counts = metrics.training_counts(Mixture.load([str(data)]))
    assert counts.tolist() == np.bincount(np.load(data / "train_00000.npy"), minlength=64).tolist()


def test_without_a_dataset(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write_questions(tmp_path / "some.jsonl")
    flags = ("--no-loss", "--choices", questions, "--out", tmp_path / "some.md")
    found = report(capsys, exported, *flags)
    assert "loss" not in found
    assert found["choices"]["some"]["questions"] == 6
    assert "guessing" in (tmp_path / "some.md").read_text()
    assert "different names" in refused(capsys, exported, *flags, "--choices", questions)
    (items,) = tmp_path.glob("some.some.*.jsonl")
    items.write_text("".join(items.read_text().splitlines(keepends=True)[:4]))
    assert report(capsys, exported, *flags) == found
    assert len(items.read_text().splitlines()) == 6


def test_samples_of_a_run_need_no_dataset_but_its_tokenizer(
    run: Path, gpt2_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--no-loss", "--max-new-tokens", "3")
    here = report(capsys, gpt2_run, *flags, samples=True)
    assert report(capsys, gpt2_run, *flags, "--data", tmp_path / "gone", samples=True) == here
    assert "of the tokenizer random as" in refused(capsys, run, *flags)


# --- samples


def test_a_prompt_alone_asks_for_samples_only(
    gpt2_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scored: list[bool] = []
    measure = script.evaluate_documents

    def counted(*args: Any) -> Any:
        scored.append(True)
        return measure(*args)

    monkeypatch.setattr(script, "evaluate_documents", counted)
    flags = [str(gpt2_run), "--prompt", "def f", "--max-new-tokens", "2", "--device", "cpu"]
    assert script.main(flags) == 0
    text = capsys.readouterr().out
    assert not scored and "nats per token" not in text and "def f" in text
    assert script.main([*flags, "--loss"]) == 0
    assert scored and "nats per token" in capsys.readouterr().out
    for more in (["--json"], ["--reference", str(gpt2_run)], ["--out", str(gpt2_run / "x.md")]):
        assert script.parse([*flags, *more]).loss
        assert not script.parse([*flags, *more, "--no-loss"]).loss
    assert script.parse([str(gpt2_run)]).loss


def test_a_prompt_that_ends_in_a_space_is_noted_once(
    gpt2_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(gpt2_run), "--max-new-tokens", "1", "--device", "cpu", "--prompt", "def"]
    assert script.main(flags) == 0
    assert capsys.readouterr().err == ""
    assert script.main([*flags, "--prompt", "The ", "--prompt", "def "]) == 0
    error = capsys.readouterr().err
    assert error.startswith("note: the prompt 'The ' ends in a space") and error.count("\n") == 1


def test_a_sample_on_a_terminal_is_the_sample_of_the_report(
    gpt2_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--prompt", "é", "--prompt", "b", "--num-samples", "1", "--max-new-tokens", "9")
    found = report(capsys, gpt2_run, *flags, samples=True)
    for live in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda live=live: live)
        assert script.main([str(gpt2_run), *flags, "--device", "cpu"]) == 0
        shown = capsys.readouterr().out
        for sample in found["samples"]:
            assert sample["text"] in shown


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_smaller_weights_write_samples_only(
    gpt2_run: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = report(capsys, gpt2_run, "--max-new-tokens", "3", samples=True)
    found = report(capsys, gpt2_run, "--max-new-tokens", "3", "--weights", weights, samples=True)
    assert found["samples"][0]["weights"] == weights
    assert found["loss"] == own["loss"]


def test_interactive(
    gpt2_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--temperature", "0", "--max-new-tokens", "5")
    found = report(capsys, gpt2_run, *flags, "--prompt", "def f", "--no-loss", samples=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f\n"))
    assert script.main([str(gpt2_run), "--interactive", *flags, "--device", "cpu"]) == 0
    assert found["samples"][0]["text"].removeprefix("def f") in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\ndef f\n"), "utf-8"))
    assert script.main([str(gpt2_run), "--interactive", *flags, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("\n> ") == 3
