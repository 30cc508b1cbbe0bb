"""Scores of endings against Hugging Face's logits one ending at a time; nothing is scored twice."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mygpt.config import GPTConfig
from mygpt.distributed import DistributedContext
from mygpt.eval import metrics, multiple_choice
from mygpt.eval.multiple_choice import Answers, Question
from mygpt.model import GPT
from shards import tokenizer
from tests.mygpt.support import decided

pytestmark = pytest.mark.usefixtures("quick")

ALONE = DistributedContext(0, 0, 1, torch.device("cpu"))
SHAPE = GPTConfig(block_size=32, vocab_size=50257, n_layers=2, n_heads=2, n_embed=8)
QUESTIONS = [
    Question("A man sits down. He", ("opens a book.", "flies.", "is a very tall 東京 tower"), 0),
    Question("The cat  ", ("sat", "sat on the mat.", "", "sat on"), 1),
    Question("", ("begins", "ends"), 1),
    Question("word " * 40, ("and more", "or less of it"), 0),
    Question("One\n", (" two", "three"), 1),
]


@pytest.fixture(scope="module")
def gpt2() -> tokenizer.Tokenizer:
    return tokenizer.load("gpt2")


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return decided(GPT(SHAPE).eval())


def one_at_a_time(model: GPT, gpt2: tokenizer.Tokenizer, question: Question) -> list[float]:
    """The log-probability of each ending's tokens, each asked of the model on its own."""
    scores = []
    for ending in question.endings:
        context = question.context.rstrip()
        before = len(gpt2.encode(context))
        ids = gpt2.encode(question.context + " " + ending)
        if not context:
            ids, before = [gpt2.eot, *ids], 1
        score = 0.0
        for i in range(before, len(ids)):
            # As lm-evaluation-harness: the last tokens of the whole, whatever is cut off.
            window = ids[max(0, len(ids) - SHAPE.block_size - 1) : i]
            with torch.no_grad():
                logits, _ = model(torch.tensor([window]))
            assert logits is not None
            score += logits[0, -1].double().log_softmax(0)[ids[i]].item()
        scores.append(score)
    return scores


def answered(model: GPT, gpt2: tokenizer.Tokenizer, **options: Any) -> Answers:
    options = {"ranks": ALONE, "block_size": 32} | options
    return multiple_choice.answer(model, QUESTIONS, gpt2, **options)


def test_scores_are_those_of_every_token_asked_for_alone(
    model: GPT, gpt2: tokenizer.Tokenizer
) -> None:
    found = answered(model, gpt2)
    for question, scores in zip(QUESTIONS, found.scores, strict=True):
        assert scores == pytest.approx(one_at_a_time(model, gpt2, question), rel=1e-5)


def test_accuracies() -> None:
    questions = [Question("", ("a", "bcd", ""), 1), Question("", ("ab", "cd"), 1)]
    found = Answers(questions, [[-2.0, -3.0, -2.5], [-1.0, -1.0]])
    assert (found.chosen, found.chosen_norm) == ([0, 0], [1, 0])
    accuracies = metrics.of_answers({"some": found})["some"]
    assert (accuracies["accuracy"], accuracies["accuracy_norm"]) == (0.0, 0.5)
    assert accuracies["accuracy_norm_se"] == pytest.approx(0.5)
    assert accuracies["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_what_was_scored_is_not_scored_again(
    model: GPT, gpt2: tokenizer.Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, whole = tmp_path / "items.jsonl", answered(model, gpt2)
    monkeypatch.setattr(multiple_choice, "QUESTIONS_PER_ROUND", {"cpu": 2})
    monkeypatch.setattr(multiple_choice, "_append", killed_after(2, multiple_choice._append))
    with pytest.raises(KeyboardInterrupt):
        answered(model, gpt2, items=items)
    monkeypatch.undo()
    with open(items, "ab") as file:
        file.write(b'{"item": 3, "log_pr')  # killed while it wrote
    begun = [json.loads(line)["item"] for line in items.read_text().splitlines()[:-1]]
    assert len(begun) == 2

    rows, score = [], multiple_choice._log_probabilities

    def counted(model: GPT, new: list[Any], device: torch.device) -> list[float]:
        rows.extend(new)
        return score(model, new, device)

    monkeypatch.setattr(multiple_choice, "_log_probabilities", counted)
    found = answered(model, gpt2, items=items)
    assert len(rows) == sum(len(q.endings) for i, q in enumerate(QUESTIONS) if i not in begun)
    assert np.concatenate(found.scores) == pytest.approx(np.concatenate(whole.scores), rel=1e-5)
    assert answered(model, gpt2, items=items).scores == found.scores
    records = [json.loads(line) for line in items.read_text().splitlines()]
    assert sorted(record["item"] for record in records) == [0, 1, 2, 3, 4]


def killed_after(writes: int, append: Any) -> Any:
    left = iter(range(writes - 1))

    def write(*arguments: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        append(*arguments)

    return write


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_the_questions(
    model: GPT, gpt2: tokenizer.Tokenizer, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank's own scores, the others' being zeros: together they are all, each once."""
    monkeypatch.setattr(DistributedContext, "all_reduce_sum", lambda self, values: list(values))
    monkeypatch.setattr(multiple_choice, "QUESTIONS_PER_ROUND", {"cpu": 1})
    shares = [
        np.concatenate(
            answered(
                model, gpt2, ranks=DistributedContext(rank, rank, world_size, ALONE.device)
            ).scores
        )
        for rank in range(world_size)
    ]
    assert (np.count_nonzero(shares, axis=0) == 1).all()
    whole = np.concatenate(answered(model, gpt2).scores)
    np.testing.assert_allclose(np.sum(shares, axis=0), whole, rtol=1e-5)


def test_the_items_files_name_is_of_all_that_decides(model: GPT) -> None:
    def name(model: GPT, questions: list[Question], block_size: int) -> str:
        document, device = Path("here/eval.md"), ALONE.device
        file = multiple_choice.items_file(document, "some", model, questions, block_size, device)
        assert re.fullmatch(r"here/eval\.some\.[0-9a-f]{16}\.jsonl", str(file))
        return file.name

    names = {
        name(model, QUESTIONS, 32),
        name(model, QUESTIONS[:-1], 32),
        name(model, QUESTIONS, 31),
        name(GPT(SHAPE), QUESTIONS, 32),
    }
    assert len(names) == 4
    assert name(model, QUESTIONS, 32) in names


def test_an_ending_that_does_not_fit_is_said(model: GPT, gpt2: tokenizer.Tokenizer) -> None:
    long = [Question("A", ("b", "c " * 40), 0)]
    with pytest.raises(ValueError, match="at most 32 tokens"):
        multiple_choice.answer(model, long, gpt2, ALONE, 32)


def test_reading(tmp_path: Path) -> None:
    raw = {
        "activity_label": "Baking",
        "ctx_a": "She [step] mixes.",
        "ctx_b": "the Dough",
        "ctx": "She [step] mixes. the Dough",
        "endings": [" rises [title] Then it rests", "falls"],
        "label": "1",
    }
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps(raw) + "\n\n" + json.dumps({**raw, "label": 0}) + "\n")
    plain = multiple_choice.read(path)
    assert plain[0] == Question(raw["ctx"], tuple(raw["endings"]), 1)
    assert [question.label for question in plain] == [1, 0]
    cleaned = multiple_choice.read(path, hellaswag=True)[0]
    assert cleaned.context == "Baking: She mixes. The dough"
    assert cleaned.endings == ("rises. Then it rests", "falls")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"ctx": "a", "label": 0}',
        '{"ctx": 1, "endings": ["a"], "label": 0}',
        '{"ctx": "a", "endings": ["b"], "label": 1}',
        '{"ctx": "a", "endings": ["b"], "label": ""}',
    ],
)
def test_what_is_no_question_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"ctx": "a", "endings": ["b"], "label": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"some\.jsonl, line 2: expected an object"):
        multiple_choice.read(path)


def test_a_file_without_questions(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="expected questions"):
        multiple_choice.read(tmp_path / "none.jsonl")
