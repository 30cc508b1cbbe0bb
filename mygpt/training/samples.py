"""Texts that the model writes while it is trained, so that one can see it learn."""

from typing import Protocol

from mygpt import runs, sharding
from mygpt.generate import generate
from mygpt.training.job import Job

TOKENS = 64  # of each text, at most


class Coder(Protocol):
    """What `shards.tokenizer.Tokenizer` does."""

    @property
    def eot(self) -> int:
        """The token that begins a document."""

    @property
    def n_vocab(self) -> int:
        """How many tokens there are."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens."""


def write_samples(job: Job, coder: Coder) -> None:
    """Let the model continue each --sample-prompt, and append that to RUN/samples.jsonl.

    Without a prompt a document is begun. The same weights write the same text.
    """
    prompts = job.config.sample_prompt or ("",)
    # All ranks write the same text: a model that is cut over them can't run on one of them alone.
    with sharding.together(job.model):
        written = generate(
            job.model,
            [[coder.eot, *coder.encode(prompt)] for prompt in prompts],
            TOKENS,
            temperature=0.8,
            seed=job.config.seed,
            stop=coder.eot,
        )
    # A model may have more ids than its tokenizer: those past the end stand for no text.
    texts = [coder.decode([token for token in ids if token < coder.n_vocab]) for ids in written]
    if job.ranks.is_main:
        samples = [
            {"prompt": prompt, "text": prompt + text}
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        runs.write_samples(job.config.log_dir, job.step, samples)
