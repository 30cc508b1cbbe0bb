"""How much memory training takes, worked out on paper: no torch, no GPU.

What is counted: weights and their gradients in fp32, AdamW's two averages, what the backward pass
needs of every layer, and one chunk of the head. The framework itself, some 0.5 GB on a GPU, is not.
"""

from mygpt.config import GPTConfig

# Bytes for each parameter: the weight, its gradient, and the two averages, all fp32.
BYTES_A_PARAMETER = 4 * 4
# Values of width n_embed that a block keeps for the backward pass, for each token: two inputs of
# layer norms and two outputs, queries, keys and values, what attention gives, two sums.
KEPT_WIDTHS = 10
# Values of width n_hidden: before and after the GELU.
KEPT_HIDDEN = 2
HEAD_ROWS = {"cpu": 256, "cuda": 4096}  # rows of logits that exist at once


def parameters(config: GPTConfig) -> int:
    """Parameters of the model, the tied matrix counted once."""
    width, hidden = config.n_embed, config.n_hidden
    matrices = 4 * width * width + 2 * width * hidden
    norms = 2 * width
    biases = (4 * width + hidden + width + 2 * width) if config.bias else 0
    final = width + (width if config.bias else 0)
    embeddings = (config.vocab_size + config.block_size) * width
    return embeddings + config.n_layers * (matrices + norms + biases) + final


def training_bytes(config: GPTConfig, micro_batch: int, device: str = "cuda") -> int:
    """Bytes that training takes at its peak, with activations in bf16 on a GPU and fp32 on a CPU.

    An estimate, right to within a third or so: allocators round up and kernels keep more or less.
    """
    size = 2 if device == "cuda" else 4
    tokens = micro_batch * config.block_size
    kept = KEPT_WIDTHS * config.n_embed + KEPT_HIDDEN * config.n_hidden
    head = min(tokens, HEAD_ROWS[device]) * config.vocab_size * 4
    return (
        BYTES_A_PARAMETER * parameters(config)
        + tokens * config.n_layers * kept * size
        + 4 * config.vocab_size * config.n_embed  # the head's gradient, beside that of wte
        + head
    )
