"""A vocabulary of one's own from text to export: prepare, train, evaluate, compare, export."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import eval as evaluation
import train
from mygpt import checkpoint
from mygpt.config import GPTConfig
from mygpt.hub import __main__ as hub
from mygpt.model import GPT
from shards import __main__ as shards_command
from shards import tokenizer
from shards.manifest import Manifest
from shards.reader import open_tokens
from tests.prepare.support import make, texts, write_jsonl

pytestmark = pytest.mark.usefixtures("quick")

SIZE = 300
DOCUMENTS = [text.replace("<|endoftext|>", "") for text in texts(200, words=60)]
SHAPE = "--block-size 16 --n-layers 1 --n-heads 2 --n-embed 16"
WHEN = "--max-steps 4 --val-interval 2 --checkpoint-interval 2 --total-batch-size 128 --device cpu"
FLAGS = f"{SHAPE} {WHEN} --micro-batch 4 --sample-interval 2".split()


def trained(data: Path, run: Path, *flags: str) -> Path:
    assert train.main(["tiny", "--data", str(data), "--log-dir", str(run), *FLAGS, *flags]) == 0
    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets of one text in two vocabularies, and a run on each."""
    root = tmp_path_factory.mktemp("own")
    write_jsonl(root / "a.jsonl", DOCUMENTS)
    make(root / "own", root / "a.jsonl", "--vocab-size", SIZE)
    make(root / "gpt2", root / "a.jsonl")
    trained(root / "own", root / "run")
    trained(root / "gpt2", root / "gpt2-run")
    assert hub.main(["export", str(root / "run"), str(root / "exported")]) == 0
    assert hub.main(["export", str(root / "gpt2-run"), str(root / "exported-gpt2")]) == 0
    return root


def report(capsys: pytest.CaptureFixture[str], *flags: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert evaluation.main([*map(str, flags), "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], main: Any, *flags: str | Path) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([*map(str, flags)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_the_models_vocabulary_is_the_datasets(root: Path) -> None:
    for run, size in (("run", SIZE), ("gpt2-run", 50257)):
        config = json.loads((root / run / "config.json").read_bytes())["config"]
        assert config["model"]["vocab_size"] == size
    padded = trained(root / "own", root / "padded", "--vocab-size", "320")
    assert checkpoint.load_weights(checkpoint.find(padded))["wte.weight"].shape[0] == 320


@pytest.mark.slow
def test_p50k_base_is_one_of_them(root: Path) -> None:
    p50k = make(root / "p50k", root / "a.jsonl", "--tokenizer", "p50k_base")
    run = trained(p50k, root / "p50k-run")
    assert checkpoint.load_weights(checkpoint.find(run))["wte.weight"].shape[0] == 50281


def test_the_same_command_resumes(root: Path, tmp_path: Path) -> None:
    run = trained(root / "own", tmp_path / "run", "--stop-at", "2")
    trained(root / "own", run)
    for name in ("model.safetensors", "optimizer.safetensors"):
        paths = [checkpoint.find(folder) / name for folder in (run, root / "run")]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_smaller_model_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("tiny", "--data", root / "own", "--log-dir", tmp_path, "--vocab-size", "299")
    assert "expected a vocabulary of at most 299" in refused(capsys, train.main, *flags)


def test_it_travels_with_run_checkpoint_and_export(root: Path) -> None:
    content = (root / "own" / "tokenizer.json").read_bytes()
    folder = checkpoint.find(root / "run")
    assert (root / "run" / "tokenizer.json").read_bytes() == content
    assert (folder / "tokenizer.json").read_bytes() == content
    assert not list((root / "gpt2-run").rglob("tokenizer.json"))
    lines = (root / "run" / "samples.jsonl").read_text("utf-8").splitlines()
    samples = map(json.loads, lines)
    assert [sample["step"] for sample in samples] == [2, 4]


def test_autotokenizer_opens_the_export_and_agrees(root: Path) -> None:
    own = tokenizer.load(root / "own")
    theirs = AutoTokenizer.from_pretrained(root / "exported")
    assert (len(theirs), theirs.eos_token_id) == (SIZE, SIZE - 1)
    for text in (t for t in DOCUMENTS if t.isascii()):
        assert theirs(text, verbose=False)["input_ids"] == own.encode(text)
    assert tokenizer.load(root / "exported").identity == own.identity


def test_a_checkpoint_alone_can_be_sampled_and_exported(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--no-loss", "--prompt", "the quick", "--max-new-tokens", "9")
    expected = report(capsys, root / "run", *flags)["samples"]
    alone = tmp_path / "alone" / "checkpoints" / "step_00000004"
    shutil.copytree(checkpoint.find(root / "run"), alone)
    gone = ("--data", tmp_path / "gone")
    found = report(capsys, alone, *flags, *gone)["samples"]
    assert [sample["text"] for sample in found] == [sample["text"] for sample in expected]
    assert found[0]["text"].startswith("the quick")
    assert report(capsys, root / "exported", *flags)["samples"][0]["text"] == found[0]["text"]
    state = alone / "state.json"
    shutil.copytree(root / "own", tmp_path / "moved")
    (tmp_path / "moved" / "tokenizer.json").unlink()
    assert state.is_file() and report(capsys, alone, *flags, "--data", tmp_path / "moved")


def test_shards_show_and_explain_decode_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert shards_command.main(["show", str(root / "own")]) == 0
    own = capsys.readouterr().out.splitlines()[1:]
    assert shards_command.main(["show", str(root / "gpt2")]) == 0
    assert own == capsys.readouterr().out.splitlines()[1:]
    explain = ["explain", "--run", str(root / "run"), "--step", "1", "--json"]
    assert shards_command.main(explain) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    text = "".join(DOCUMENTS)
    assert len(rows) == 8
    for row in rows:
        assert all(part in text for part in row["text"].strip("\ufffd").split("<|endoftext|>"))
    assert shards_command.main(["info", str(root / "own")]) == 0
    assert f"bpe-{SIZE}, {SIZE} ids, <|endoftext|> {SIZE - 1}" in capsys.readouterr().out
    assert shards_command.main(["verify", str(root / "own")]) == 0


@pytest.mark.parametrize("form", ["nanogpt", "llmc"])
def test_other_projects_files_keep_it(form: str, root: Path, tmp_path: Path) -> None:
    out, back = str(tmp_path / "out"), tmp_path / "back"
    assert shards_command.main(["export", str(root / "own"), "--out", out, "--format", form]) == 0
    files = sorted(map(str, Path(out).glob("*.bin")))
    assert shards_command.main(["import", *files, "--out", str(back)]) == 0
    own, found = Manifest.load(root / "own"), Manifest.load(back)
    assert found.tokenizer == own.tokenizer
    for split in own.splits:
        tokens = [
            np.concatenate([open_tokens(one, shard) for shard in one.splits[split].shards])
            for one in (own, found)
        ]
        assert np.array_equal(*tokens)
    assert shards_command.main(["verify", str(back)]) == 0


def test_verify_finds_a_wrong_vocabulary(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root / "own", tmp_path / "data")
    path = tmp_path / "data" / "tokenizer.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"use_regex":true', b'"use_regex":true ', 1))
    assert shards_command.main(["verify", str(tmp_path / "data")]) == 1
    assert "tokenizer.json" in capsys.readouterr().out
    path.unlink()
    assert shards_command.main(["verify", str(tmp_path / "data")]) == 1
    assert "tokenizer.json" in capsys.readouterr().out


def nats_by_hand(model: GPT, ids: list[int], block_size: int) -> float:
    """The loss of a stream of tokens, cut into windows as eval cuts a shard."""
    total = 0.0
    for start in range(0, len(ids) - 1, block_size):
        window = torch.tensor([ids[start : start + block_size + 1]])
        with torch.no_grad():
            logits, _ = model(window[:, :-1])
        total += float(torch.nn.functional.cross_entropy(logits[0].double(), window[0, 1:])) * (
            window.size(1) - 1
        )
    return total


@pytest.mark.parametrize("name", ["gpt2-run", "exported-gpt2"])
def test_a_reference_of_another_vocabulary_reads_the_same_text(
    name: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--num-samples", "0")
    found = report(capsys, root / "run", "--reference", root / name, *flags)
    alone = report(capsys, root / "gpt2-run", *flags)
    other = found["reference"]
    assert other["tokenizer"] == "gpt2" and "difference" not in other
    for key in ("loss", "bits_per_byte", "perplexity", "tokens", "documents", "text_bytes"):
        assert math.isclose(other[key], alone[key], rel_tol=1e-6), key
    expected = found["bits_per_byte"] - other["bits_per_byte"]
    assert math.isclose(other["difference_bits_per_byte"], expected, rel_tol=1e-6)
    assert 0 < other["difference_bits_per_byte_se"] < 1
    # By hand: the validation text in GPT-2's tokens, through the model.
    manifest, gpt2 = Manifest.load(root / "gpt2"), tokenizer.load()
    ids = np.concatenate([open_tokens(manifest, s) for s in manifest.splits["val"].shards])
    text = gpt2.decode(ids).split("<|endoftext|>")[1:]
    assert sum(len(document.encode()) for document in text) == found["text_bytes"]
    folder = checkpoint.find(root / "gpt2-run")
    config = json.loads((folder / "state.json").read_bytes())["config"]["model"]
    model = GPT(GPTConfig(**config)).eval()
    checkpoint.load_model(folder, model)
    nats = nats_by_hand(model, ids.tolist(), 16)
    bits = nats / math.log(2) / found["text_bytes"]
    assert math.isclose(bits, other["bits_per_byte"], rel_tol=1e-5)


def test_the_tables_say_what_can_be_compared(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "eval.md"
    command = [str(root / "run"), "--reference", str(root / "gpt2-run"), "--num-samples", "0"]
    assert evaluation.main([*command, "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for page in (printed, out.read_text("utf-8")):
        assert "The reference has another vocabulary, gpt2: compare bits per byte only." in page
    line = next(x for x in printed.splitlines() if x.startswith("this model minus"))
    assert line.count("±") == 1 and line.split()[-2][0] in "+-"
    same = [str(root / "run"), "--reference", str(root / "exported"), "--num-samples", "0"]
    assert evaluation.main([*same, "--device", "cpu", "--out", str(out)]) == 0
    assert "another vocabulary" not in capsys.readouterr().out


def test_questions_are_asked_in_each_models_tokens(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "some.jsonl"
    lines = [{"ctx": "the quick", "endings": ["brown fox", "said"], "label": 0}] * 3
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--no-loss", "--num-samples", "0", "--choices", file)
    both = report(capsys, root / "run", "--reference", root / "gpt2-run", *flags)
    alone = report(capsys, root / "gpt2-run", *flags)
    assert both["reference"]["choices"] == alone["choices"]


def test_a_dataset_of_another_vocabulary_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, evaluation.main, root / "exported-gpt2", "--data", root / "own")
    assert "in the vocabulary of" in error and "--reference" in error
    error = refused(capsys, evaluation.main, root / "exported", "--data", root / "gpt2")
    assert f"--tokenizer {root / 'exported'}" in error
    run = ("--data", root / "own", "--log-dir", tmp_path / "x", *WHEN.split())
    for model in ("exported-gpt2", "exported", "gpt2-run", "run"):
        data = root / ("own" if "gpt2" in model else "gpt2")
        flags = ("--init-from", root / model, "--data", data, *run[2:], "--block-size", "16")
        assert "in the vocabulary of" in refused(capsys, train.main, *flags)
    error = refused(capsys, train.main, "tiny", *run[:2], "--log-dir", root / "gpt2-run", *FLAGS)
    assert "expected the dataset with fingerprint" in error
    mixed = ("--data", f"a=1:{root / 'own'}", "--data", f"b=1:{root / 'gpt2'}")
    assert "prepare both with the same one" in refused(capsys, train.main, *mixed, *run[2:])


def test_an_exported_model_is_trained_on(root: Path, tmp_path: Path) -> None:
    flags = ["--init-from", str(root / "exported"), "--data", str(root / "own")]
    rest = ["--log-dir", str(tmp_path / "tuned"), "--block-size", "16", *WHEN.split()]
    assert train.main([*flags, *rest, "--micro-batch", "4"]) == 0
    weights = checkpoint.load_weights(checkpoint.find(tmp_path / "tuned"))
    assert weights["wte.weight"].shape[0] == SIZE
