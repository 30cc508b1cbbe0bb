"""Models that ask for more memory than one card has: each rank keeps only its share.

    torchrun --standalone --nproc_per_node=4 train.py gpt2-large --shard optimizer
    torchrun --standalone --nproc_per_node=4 train.py gpt2-xl --shard full

Bytes a parameter and card, of n, in fp32 with AdamW: plain 16, "optimizer" 8 + 8 / n, "full" 16 / n
and one block's weights, and on a GPU about 2 more, whatever n: autocast keeps the 16-bit copies of
the weights it multiplied with until the backward pass has used them. Checkpoints hold whole tensors
under plain names whatever wrote them, so a run may go on with another --shard, or with another
number of ranks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from mygpt.distributed import Ranks, compute_dtype
from mygpt.model import GPT


def shard_optimizers(optimizers: Sequence[Optimizer], ranks: Ranks) -> None:
    """Each rank moves its share of the parameters, and remembers what that takes, for all.

    ZeRO's first stage (arXiv 1910.02054). What `torch.distributed.optim.ZeroRedundancyOptimizer`
    does, as two hooks: the optimizer stays the one it is, and its state can be saved as tensors,
    where the wrapper's goes through pickles. Gradients must be equal on all ranks, as DDP
    leaves them. All ranks must take their steps together.
    """
    for optimizer in optimizers:
        owners = _owners(optimizer, ranks.world_size)
        optimizer.register_step_pre_hook(partial(_keep_own, owners, ranks.rank))
        optimizer.register_step_post_hook(partial(_send_own, owners))


def own_parameters(optimizers: Iterable[Optimizer], ranks: Ranks) -> set[Tensor]:
    """Those that this rank moves, and alone remembers, once `shard_optimizers` was called."""
    owners = [_owners(optimizer, ranks.world_size) for optimizer in optimizers]
    return {p for each in owners for p, owner in each.items() if owner == ranks.rank}


def _owners(optimizer: Optimizer, world_size: int) -> dict[Tensor, int]:
    """Parameter → the rank that moves it: the largest first, each to whom has least so far."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loads, owners = [0] * world_size, {}
    for p in sorted(parameters, key=Tensor.numel, reverse=True):
        owners[p] = loads.index(min(loads))
        loads[owners[p]] += p.numel()
    return owners


def _keep_own(owners: Mapping[Tensor, int], rank: int, *_: Any) -> None:
    """Optimizers pass over a parameter without a gradient, and remember nothing of it."""
    for p, owner in owners.items():
        if owner != rank:
            p.grad = None


def _send_own(owners: Mapping[Tensor, int], *_: Any) -> None:
    sent = [dist.broadcast(p.detach(), owner, async_op=True) for p, owner in owners.items()]
    for work in sent:
        work.wait()


def shard_model(model: GPT, ranks: Ranks) -> None:
    """Cut every parameter over the ranks, in place; a block is whole only while it is at work.

    PyTorch's FSDP2. Gradients are averaged and cut block by block in every backward pass. What is
    kept whole on a GPU are the 16-bit copies of the weights that autocast makes in the forward
    pass, for the backward pass. A model on the CPU moves to the ranks' device one block at a time.
    Raises ValueError where fp16 would be computed in: its loss scaler looks at each rank's share by
    itself.
    """
    if compute_dtype(ranks.device) == torch.float16:
        raise ValueError("--shard full needs bfloat16, this GPU has none: give --shard optimizer")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("token_losses", "next_logits"):
        register_fsdp_forward_method(model, method)


@contextmanager
def unsharded(model: GPT) -> Iterator[None]:
    """Inside the block every rank has all weights, and so need not go in step with the others.

    For validation and samples, which keep no gradients. Does nothing to a model that is not cut.
    """
    parts: list[Any] = [module for module in (*model.h, model) if hasattr(module, "unshard")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def full_tensors(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """All that any rank holds, whole and on the CPU, for the main rank; nothing for the others.

    All ranks must call it. A name that several ranks hold, unless cut, is the same for all of them.
    """
    if ranks.world_size == 1:
        return dict(tensors)
    held = ranks.all_gather_object({name: (t.shape, t.dtype) for name, t in tensors.items()})
    result = {}
    for owner, names in enumerate(held):
        for name, (shape, dtype) in names.items():
            if any(name in before for before in held[:owner]):
                continue
            tensor = tensors.get(name)
            if tensor is None:
                tensor = torch.empty(shape, dtype=dtype, device=ranks.device)
            elif _is_cut(tensor):
                tensor = tensor.full_tensor()  # type: ignore[attr-defined]
            if owner:  # the main rank has it not
                dist.broadcast(tensor := tensor.to(ranks.device), owner)
            if ranks.is_main:
                result[name] = tensor.detach().cpu()
    return result


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a tensor that all have, cut as `like` is; `full` where it is not."""
    if not _is_cut(like):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    here = full.to(like.device)
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


def shard_tensors(tensors: Mapping[str, Tensor], model: GPT) -> dict[str, Tensor]:
    """What an optimizer remembers ("PARAMETER.KEY" → whole tensor) cut as the parameters are."""
    parameters = dict(model.named_parameters())
    return {
        name: shard_like(tensor, parameters[name.rpartition(".")[0]]) if tensor.dim() else tensor
        for name, tensor in tensors.items()
    }


def full_tensor(tensor: Tensor) -> Tensor:
    """A cut tensor put together, on all ranks; any other as it is."""
    return tensor.full_tensor() if _is_cut(tensor) else tensor  # type: ignore[attr-defined]


def _is_cut(tensor: Tensor) -> bool:
    # As with `unshard`, asked without an import that takes longer than others should wait.
    return hasattr(tensor, "full_tensor")
