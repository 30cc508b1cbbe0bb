"""--vocab-size and --tokenizer: a vocabulary of the training split alone, the same every time."""

import json
import random
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tiktoken
import tokenizers
from tiktoken_ext.openai_public import r50k_pat_str

from prepare import job, vocabulary
from shards import tokenizer
from shards.manifest import Manifest
from shards.mixture import Mixture
from tests.prepare.support import contents, is_val, make, run, shrink, texts, write_jsonl

SIZE = 400
# Without the two characters that are in newer Unicode tables than the trainer's.
DOCUMENTS = [text.translate({0x88F: "x", 0xA7CE: "y"}) for text in texts(150)]
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def by_hand(documents: Iterable[str], size: int) -> list[bytes]:
    """Byte-pair encoding as it is explained: join the most frequent pair, again and again."""
    words = Counter(word for text in documents for word in regex.findall(PATTERN, text))
    # The trainer gives the bytes the ids that GPT-2 has for them.
    tokens = tokenizer.load().vocabulary()[:256]
    ids = {token: i for i, token in enumerate(tokens)}
    parts = {word: [ids[bytes([byte])] for byte in word.encode()] for word in words}
    while len(tokens) < size - 1:
        pairs = Counter[tuple[int, int]]()
        for word, split in parts.items():
            for pair in pairwise(split):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=(0, 0))
        if pairs[best] < 2:
            break
        tokens.append(tokens[best[0]] + tokens[best[1]])
        for split in parts.values():
            i = 0
            while i < len(split) - 1:
                if (split[i], split[i + 1]) == best:
                    split[i : i + 2] = [len(tokens) - 1]
                i += 1
    return tokens


def training_split(documents: Iterable[str]) -> list[str]:
    return [text for text in documents if not is_val(text.encode())]


def tokens_of(folder: Path) -> list[bytes]:
    return tokenizer.load(folder).vocabulary()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    return tmp_path / "corpus.jsonl"


def test_it_is_trained_on_the_training_split_alone(corpus: Path, tmp_path: Path) -> None:
    out = make(tmp_path / "out", corpus, "--vocab-size", SIZE)
    assert tokens_of(out) == [*by_hand(training_split(DOCUMENTS), SIZE), b""]
    assert tokens_of(out) != [*by_hand(DOCUMENTS, SIZE), b""], "the rest would show"
    identity = Manifest.load(out).tokenizer
    assert (identity.name, identity.n_vocab, identity.eot) == (f"bpe-{SIZE}", SIZE, SIZE - 1)


def test_ties_go_to_the_lowest_ids() -> None:
    # Each pair of letters as often as any other: the order of the ids alone decides.
    letters = [f" {a}{b}" for a in "zyxcba" for b in "abcxyz"] * 2
    found = [vocabulary.train(random.Random(seed).sample(letters, 72), 300) for seed in range(3)]
    assert list(found[0].tokens) == [*by_hand(letters, 300), b""]
    assert found[1] == found[0] == found[2]


@pytest.mark.parametrize("threads", ["false", "true"])
def test_the_order_and_threads_do_not_matter(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [*DOCUMENTS, *texts(2000, seed=1)]
    expected = vocabulary.train(documents, SIZE)
    monkeypatch.setattr(vocabulary.os, "environ", {})  # which would switch threads off
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", threads)
    assert vocabulary.train(random.Random(0).sample(documents, len(documents)), SIZE) == expected


def test_every_token_is_tiktokens_with_these_ranks(corpus: Path, tmp_path: Path) -> None:
    out = make(tmp_path / "out", corpus, "--vocab-size", SIZE)
    ranks = {token: i for i, token in enumerate(tokens_of(out)) if token}
    law = tiktoken.Encoding("x", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    theirs = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    documents = [t for t in DOCUMENTS if t.strip()]
    sides = {
        "train": training_split(documents),
        "val": [text for text in documents if is_val(text.encode())],
    }
    manifest = Manifest.load(out)
    from shards.reader import open_tokens

    for split, expected in sides.items():
        ids = [i for shard in manifest.splits[split].shards for i in open_tokens(manifest, shard)]
        wanted = [[SIZE - 1, *law.encode_ordinary(text)] for text in expected]
        assert ids == [i for document in wanted for i in document]
    plain = [text for text in documents if text.isascii() and "<|" not in text]
    assert plain and all(theirs.encode(t).ids == law.encode_ordinary(t) for t in plain)


def test_workers_units_and_kills_change_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, MIN_UNIT_BYTES=4000)
    expected = contents(make(tmp_path / "one", corpus, "--vocab-size", SIZE))
    assert expected.keys() >= {"tokenizer.json", "train_00001.npy"}
    found = contents(make(tmp_path / "two", corpus, "--vocab-size", SIZE, "--workers", 2))
    assert found == expected

    def killed(*_: object) -> None:
        raise MemoryError

    for module, name in ((vocabulary, "train"), (job, "WriteShards"), (job, "_show_progress")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(module, name, killed)
            run(corpus, "--out", tmp_path / "three", "--vocab-size", SIZE)
    assert contents(make(tmp_path / "three", corpus, "--vocab-size", SIZE)) == expected
    (tmp_path / "three" / "tokenizer.json").unlink()
    assert contents(make(tmp_path / "three", corpus, "--vocab-size", SIZE)) == expected


def test_tasks_agree_on_it(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, MIN_UNIT_BYTES=4000)
    flags = (corpus, "--out", tmp_path / "out", "--vocab-size", SIZE)
    for number in (2, 1):
        assert run(*flags, "--task", f"{number}/2").code == 0
    assert run(*flags, "--finish").code == 0
    expected = contents(make(tmp_path / "one", corpus, "--vocab-size", SIZE))
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("dedup", [False, True])
def test_left_out_documents_are_left_out_here_too(dedup: bool, tmp_path: Path) -> None:
    repeated = ["zqzq zqzq zqzq"] * 9
    write_jsonl(tmp_path / "a.jsonl", [*DOCUMENTS, *repeated])
    write_jsonl(tmp_path / "val.jsonl", [*repeated[:1], "x"])
    flags = ["--dedup"] if dedup else ["--val-source", tmp_path / "val.jsonl"]
    out = make(tmp_path / "out", tmp_path / "a.jsonl", "--vocab-size", SIZE, *flags)
    expected = training_split([*DOCUMENTS, repeated[0]]) if dedup else DOCUMENTS
    assert tokens_of(out) == [*by_hand(expected, SIZE), b""]


def test_one_text_file_gives_its_first_part(tmp_path: Path) -> None:
    lines = [text.replace("\n", " ") + "\n" for text in DOCUMENTS]
    (tmp_path / "book.txt").write_text("".join(lines), "utf-8", newline="")
    out = make(tmp_path / "out", tmp_path / "book.txt", "--vocab-size", SIZE)
    content = (tmp_path / "book.txt").read_bytes()
    end = Manifest.load(out).splits["train"].text_bytes
    assert tokens_of(out) == [*by_hand([content[:end].decode()], SIZE), b""]


def test_a_large_corpus_is_sampled_by_content(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [(random.Random(i).getrandbits(64), "x" * 100) for i in range(1000)]
    shrink(monkeypatch, SAMPLE_BYTES=5000)
    expected: set[tuple[str, ...]] = set()
    for seed in range(3):
        mixed = random.Random(seed).sample(pieces, 1000)
        chosen = vocabulary.choose([mixed[i : i + 90] for i in range(0, 1000, 90)], 1 << 63)
        assert 2500 < sum(map(len, chosen)) <= 10_000
        expected.add(tuple(chosen))
    assert len(expected) == 1


def test_the_sample_does_not_depend_on_the_order_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = texts(600)
    shrink(monkeypatch, SAMPLE_BYTES=20_000, SAMPLED_CHARACTERS=300)
    found = []
    for name, mixed in (("a", documents), ("b", documents[::-1])):
        write_jsonl(tmp_path / f"{name}.jsonl", mixed)
        found.append(
            tokens_of(make(tmp_path / name, tmp_path / f"{name}.jsonl", "--vocab-size", SIZE))
        )
    assert found[0] == found[1] != [*by_hand(training_split(documents), SIZE), b""]


def test_a_short_text_gives_fewer_ids_and_says_so(corpus: Path, tmp_path: Path) -> None:
    outcome = run(corpus, "--out", tmp_path / "out", "--vocab-size", 60000)
    assert outcome.code == 0
    found = Manifest.load(tmp_path / "out").tokenizer.n_vocab
    assert f"It has {found:,} ids" in outcome.out and 400 < found < 60000
    assert "nothing to do" in run(corpus, "--out", tmp_path / "out", "--vocab-size", 60000).out


def test_appends_follow_the_dataset(corpus: Path, tmp_path: Path) -> None:
    out = make(tmp_path / "out", corpus, "--vocab-size", SIZE)
    before, first = (out / "tokenizer.json").read_bytes(), Manifest.load(out)
    write_jsonl(tmp_path / "more.jsonl", texts(50, seed=5))
    more = (tmp_path / "more.jsonl", "--out", out, "--append")
    assert "vocabulary is the dataset's" in run(*more, "--vocab-size", SIZE).error
    assert "vocabulary is the dataset's" in run(*more, "--tokenizer", out).error
    assert run(*more).code == 0
    grown = Manifest.load(out)
    assert (grown.generation, grown.tokenizer) == (1, first.tokenizer)
    assert (out / "tokenizer.json").read_bytes() == before
    assert "nothing to do" in run(*more).out
    assert "nothing to do" in run(corpus, "--out", out, "--vocab-size", SIZE).out


def test_another_vocabulary_is_another_dataset(corpus: Path, tmp_path: Path) -> None:
    out = make(tmp_path / "out", corpus, "--vocab-size", SIZE)
    for flags in ([], ["--vocab-size", SIZE + 1], ["--tokenizer", "p50k_base"]):
        assert "found other vocabulary" in run(corpus, "--out", out, *flags).error
    (out / ".prepare" / "plan.json").unlink()
    assert f"tokenizer bpe-{SIZE}" in run(corpus, "--out", out).error


def test_two_datasets_share_one(corpus: Path, tmp_path: Path) -> None:
    out = make(tmp_path / "out", corpus, "--vocab-size", SIZE)
    write_jsonl(tmp_path / "more.jsonl", texts(90, seed=5))
    for number, place in enumerate((out, out / "tokenizer.json")):
        other = make(tmp_path / str(number), tmp_path / "more.jsonl", "--tokenizer", place)
        assert (other / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
        mixture = Mixture.load([str(out), str(other)])
        assert mixture.tokenizer == Manifest.load(out).tokenizer
    assert "nothing to do" in run(tmp_path / "more.jsonl", "--out", other, "--tokenizer", out).out
    (other / "tokenizer.json").unlink()
    make(other, tmp_path / "more.jsonl", "--tokenizer", out)
    assert (other / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()


def test_gpt2_by_its_other_names(corpus: Path, tmp_path: Path) -> None:
    plain = contents(make(tmp_path / "plain", corpus))
    assert "tokenizer.json" not in plain
    for name in ("gpt2", "r50k_base", tmp_path / "plain"):
        out = make(tmp_path / "other", corpus, "--tokenizer", name)
        assert contents(out) == plain


def test_a_damaged_file_is_one_line(corpus: Path, tmp_path: Path) -> None:
    out = make(tmp_path / "out", corpus, "--vocab-size", SIZE)
    content = json.loads((out / "tokenizer.json").read_bytes())
    (out / "tokenizer.json").write_text(json.dumps(content)[:-9])
    write_jsonl(tmp_path / "more.jsonl", texts(9, seed=5))
    assert "restore it" in run(tmp_path / "more.jsonl", "--out", out, "--append").error
    assert (
        "expected a JSON object" in run(corpus, "--out", tmp_path / "b", "--tokenizer", out).error
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab-size", 256], "--vocab-size from 257"),
        (["--vocab-size", 65537], "to 65536, found 65537"),
        (["--vocab-size", -1], "--vocab-size from 257"),
        (["--vocab-size", 400, "--tokenizer", "p50k_base"], "--vocab-size or --tokenizer"),
        (["--tokenizer", "cl100k_base"], "expected the tokenizer gpt2, r50k_base, p50k_base"),
    ],
)
def test_impossible_requests(
    flags: list[object], message: str, corpus: Path, tmp_path: Path
) -> None:
    assert message in run(corpus, "--out", tmp_path / "out", *flags).error
    assert not (tmp_path / "out").exists()


def test_the_forecast_needs_no_training(corpus: Path, tmp_path: Path) -> None:
    outcome = run(corpus, "--out", tmp_path / "out", "--vocab-size", SIZE, "--plan")
    assert "GPT-2's vocabulary" in outcome.out and "tokens     about" in outcome.out
    assert not (tmp_path / "out").exists()
