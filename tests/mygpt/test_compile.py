"""What torch.compile makes of the model: few graphs, each for one shape, whole under DDP."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from mygpt.config import GPTConfig
from mygpt.distributed import DistributedContext
from mygpt.evaluate import evaluate
from mygpt.model import GPT
from mygpt.train_state import compile_blocks

pytestmark = pytest.mark.usefixtures("quick")

ALONE = DistributedContext(0, 0, 1, torch.device("cpu"))
SHAPE = GPTConfig(block_size=16, vocab_size=131, n_layers=3, n_heads=2, n_embed=32)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(optimize_ddp=True):  # torch's own setting
        yield
    torch._dynamo.reset()


def is_dynamic(graph: torch.fx.GraphModule) -> bool:
    inputs = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
    return any(isinstance(n, torch.SymInt) for x in inputs for n in getattr(x, "shape", [x]))


ORDERS = {
    "a run": ["train", "validate", "train"],
    "a resume into a validation": ["validate", "train", "validate", "train"],
}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler looks at it
@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
def test_training_and_validation_compile_once_for_their_shape(
    order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three graphs each: of the first block, of the others and of the loss.

    The last batch of a validation is padded.
    """
    monkeypatch.setattr("mygpt.distributed._FIXED_SHAPES", {"cpu"})
    model, counter = GPT(SHAPE), CompileCounterWithBackend("eager")
    compile_blocks(model, counter)
    batch = torch.randint(0, 131, (4, 16))
    windows = list(np.random.default_rng(0).integers(0, 131, (19, 17)))
    for what in order:
        if what == "train":
            model(batch, batch)[1].backward()
        else:
            evaluate(model, windows, ALONE, batch_size=8)
    assert [is_dynamic(graph) for graph in counter.graphs] == [False] * 6


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_kernels_are_not_chosen_by_timing(deterministic: bool) -> None:
    with torch._inductor.config.patch(deterministic=not deterministic):
        torch.use_deterministic_algorithms(deterministic)
        try:
            compile_blocks(GPT(SHAPE), "eager")
            assert torch._inductor.config.deterministic is deterministic
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_under_ddp_a_block_stays_one_graph(tmp_path: Path) -> None:
    store = (tmp_path / "store").as_uri()
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model, counter = GPT(SHAPE), CompileCounterWithBackend("eager")
        compile_blocks(model, counter)
        # Buckets of less than a block, as with GPT-2's width
        ddp = DistributedDataParallel(model, bucket_cap_mb=0.02)
        batch = torch.randint(0, 131, (2, 16))
        ddp(batch, batch)[1].backward()
    finally:
        torch.distributed.destroy_process_group()
    assert counter.frame_count == 3  # the first block, the others and the loss
