"""The kernels that torch.compile writes for an H100, on a machine without GPU or Triton.

python -m tests.mygpt.codegen loss|block

Inductor is told of a GPU that is not there, and stopped when its code is written. Prints one JSON
object: kernels, their loops over a row, and the bytes that they move, matrix products apart.
"""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx as compile_fx
import torch._inductor.config as inductor_config
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.scheduler as scheduler
import torch.utils._triton
from torch._dynamo import device_interface
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._subclasses import fake_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from mygpt import loss, model
from mygpt.config import GPTConfig

H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=32,
    total_memory=80 * 2**30, L2_cache_size=50 * 2**20, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block_optin=232448, gcnArchName="",
)  # fmt: skip
ANSWERS = {
    "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": H100,
    "get_device_capability": (9, 0), "get_compute_capability": 90, "is_bf16_supported": True,
    "is_triton_capable": True, "raise_if_triton_unavailable": None, "get_raw_stream": 0,
    "synchronize": None, "set_device": None, "exchange_device": 0, "maybe_exchange_device": 0,
    "_exchange_device": 0, "_maybe_exchange_device": 0, "_lazy_init": None,
}  # fmt: skip


class Written(Exception):
    """Inductor's code; there is nothing to run it on."""


def written(graph: GraphLowering) -> Any:
    code, _ = graph.codegen()
    _, accesses, _ = graph.count_bytes()  # in units of 4 bytes
    products = scheduler.ExternKernelSchedulerNode
    raise Written(code.value, 4 * sum(n for node, n in accesses if not isinstance(node, products)))


def pretend() -> None:
    """Make Inductor believe in an H100. For the whole process."""
    interface = device_interface.CudaInterface
    for kind in (torch.cuda, interface, interface.Worker):
        for name, answer in ANSWERS.items():
            if hasattr(kind, name):
                setattr(kind, name, staticmethod(mock.Mock(return_value=answer)))
    torch.version.cuda = "13.0"
    inductor_config.fx_graph_cache, inductor_config.compile_threads = False, 1
    compile_fx.dynamo_utils.preserve_rng_state = nullcontext
    fake_tensor.init_gpu_context = joint_graph.lazy_init = lambda *_: None
    scheduler.has_triton = lambda *_: True
    torch.utils._triton.triton_hash_with_backend = lambda: ""
    GraphLowering.compile_to_module = written


def kernels(module: torch.fx.GraphModule, is_backward: bool) -> dict[str, int]:
    """What Inductor writes for a graph that was traced on the CPU."""
    inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    inputs = [
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in inputs
    ]
    for node in module.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    module.recompile()
    FakeTensorProp(module, inputs[0].fake_mode).propagate_dont_convert_inputs(*inputs)
    try:
        compile_fx.compile_fx_inner(module, inputs, is_backward=is_backward, static_input_idxs=[])
    except Exception as error:  # Inductor wraps ours
        cause: BaseException | None = error
        while not isinstance(cause, Written):
            if cause is None:
                raise
            cause = cause.__cause__ or cause.__context__
    code, moved = cause.args
    return {
        "kernels": code.count(".run("),
        "loops": code.count("for r0_offset"),
        "megabytes": round(moved / 1e6),
    }


def loss_graphs() -> dict[str, torch.fx.GraphModule]:
    """The row kernels of the loss, for a chunk of logits of GPT-2's vocabulary."""
    logits, targets = torch.empty(4096, 50304, dtype=torch.bfloat16), torch.empty(4096).long()
    return {
        "row_probabilities": traced(loss.row_probabilities, logits, targets),
        "row_losses": traced(lambda *rows: (loss.row_losses(*rows),), logits, targets),
    }


def traced(function: Callable[..., Any], *inputs: torch.Tensor) -> torch.fx.GraphModule:
    return make_fx(function, decomposition_table=select_decomp_table())(*inputs)


def block_graphs() -> dict[str, torch.fx.GraphModule]:
    """A block of GPT-2 after another one, forward and backward, for 64 x 1024 tokens in bf16."""
    block = model.Block(GPTConfig(), flash=True)
    names = [name for name, _ in block.named_parameters()]
    weights = [torch.empty(p.shape, requires_grad=True) for p in block.parameters()]
    parts: dict[str, torch.fx.GraphModule] = {}

    def partition(module: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        compile_fx._recursive_joint_graph_passes(module)
        options["compiler"] = "inductor"
        both = min_cut_rematerialization_partition(module, inputs, **options)
        parts.update(zip(("forward", "backward"), both, strict=True))
        return both

    def step(x: torch.Tensor, mlp: torch.Tensor, *weights: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            own = dict(zip(names, weights, strict=True))
            return torch.func.functional_call(block, own, (x, mlp))

    same: Callable[..., Any] = lambda module, _: module  # noqa: E731
    aot_function(step, same, same, partition_fn=partition, decompositions=select_decomp_table())(
        torch.empty(64, 1024, 768, requires_grad=True),
        torch.empty(64, 1024, 768, requires_grad=True, dtype=torch.bfloat16),
        *weights,
    )
    return parts


def flash(q: Any, k: Any, v: Any, attn_mask: None, dropout_p: float, is_causal: bool) -> Any:
    """The attention that a GPU would take, where a CPU has one of its own."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]


if __name__ == "__main__":
    model.F.scaled_dot_product_attention = flash
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        graphs = {"loss": loss_graphs, "block": block_graphs}[sys.argv[1]]()
        pretend()
        print(json.dumps({name: kernels(g, name == "backward") for name, g in graphs.items()}))
