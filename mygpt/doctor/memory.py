"""Estimate of the memory that training takes, from the shapes alone.

Counted are the weights with their gradients and AdamW's two moments, all fp32, the activations kept
for the backward pass, and one chunk of logits. The framework's own memory, some 0.5 GB on a GPU, is
not.
"""

from mygpt.config import GPTConfig
from mygpt.loss import chunk_rows

BYTES_PER_PARAMETER = 4 * 4  # weight, gradient and two moments, fp32
# Activations of width n_embed that a block keeps per token: input and output of two layer norms,
# queries, keys and values, the attention's output, two residual sums.
KEPT_WIDTHS = 10
KEPT_HIDDEN = 2  # activations of width n_hidden: before and after the GELU


def training_bytes(config: GPTConfig, micro_batch: int, device: str = "cuda") -> int:
    """Peak memory of training in bytes; activations are bf16 on a GPU and fp32 on a CPU.

    Right to within about a third: allocators round up, and kernels differ in what they keep.
    """
    size = 2 if device == "cuda" else 4
    tokens = micro_batch * config.block_size
    kept = KEPT_WIDTHS * config.n_embed + KEPT_HIDDEN * config.n_hidden
    return (
        BYTES_PER_PARAMETER * config.num_params
        + tokens * config.n_layers * kept * size
        + 4 * config.vocab_size * config.n_embed  # gradient of lm_head, beside that of wte
        + 4 * config.vocab_size * min(tokens, chunk_rows(device))  # logits of one chunk
    )
