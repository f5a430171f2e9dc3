"""The frozen base divided among the processes (FSDP2): each keeps a part, and a block's layers are gathered while it runs.

    accelerate launch --use_fsdp --fsdp_version 2 train/lora.py --recipe marketing

torch's `fully_shard` divides parameters only, of any dtype as long as they are frozen: INT4 layers hold buffers, so codes,
scales and branch become frozen parameters first. The adapter is small and stays whole on every process, outside of FSDP;
its gradients are averaged after the last micro-batch, as DDP would. One unit per repeated block; accelerate's own wrapping
is not used: its settings for wrapping do not matter, those that would change the result are refused.
Source: torch.distributed.fsdp.fully_shard; Rajbhandari et al., "ZeRO" (2020), stage 3 for weights that never change.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils.environment import parse_flag_from_env
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor

from loragraft.quantization.branched import BranchedLinear
from loragraft.recipes.schema import TrainConfig
from loragraft.train.memory import block_paths

REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "an INT4 base is small: leave --fsdp_offload_params off",
    "FSDP_ACTIVATION_CHECKPOINTING": "set train.checkpointing=block instead of --fsdp_activation_checkpointing",
}


def shards_base() -> bool:
    """Whether the launcher asked for FSDP."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def check_sharding(accelerator: Accelerator, config: TrainConfig) -> None:
    """Call it before anything is loaded. Raises ValueError for a kind of FSDP that is not done here."""
    if not shards_base():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP 1 flattens the weights of a block into one tensor of one dtype: add --fsdp_version 2")
    if accelerator.num_processes < 2:
        raise ValueError("--use_fsdp divides the base among processes, and this is the only one: add --num_processes")
    if config.compile == "always":
        raise ValueError("train.compile=always: a divided base runs uncompiled; leave train.compile at auto")
    for flag, remedy in REFUSED.items():
        if parse_flag_from_env(flag):
            raise ValueError(f"{flag} is set: {remedy}")
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # transformers would load encoders on the first process only


def shard_base(transformer: nn.Module, adapter: Sequence[nn.Parameter], device: torch.device) -> None:
    """Divides everything frozen in `transformer`, in place; `adapter` stays whole. Call it on every process.

    Afterwards only all processes together can run the model, and `state_dict` shows parts.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in transformer.modules():
        if isinstance(module, BranchedLinear):
            _freeze_buffers(module)
    whole = set(adapter)
    with integers_as_parts():
        for path in block_paths(transformer):
            fully_shard(transformer.get_submodule(path), mesh=mesh, ignored_params=whole)
        fully_shard(transformer, mesh=mesh, ignored_params=whole)


@contextlib.contextmanager
def integers_as_parts() -> Iterator[None]:
    """Lets `fully_shard` divide frozen integers on torch 2.11 too.

    There a part is made as a parameter with a gradient and only then frozen, which integers cannot be; later versions make it
    frozen (pytorch issue 177844). In here a parameter of integers is made without one.
    """

    def parameter(data: torch.Tensor, requires_grad: bool | None = None) -> nn.Parameter:
        return nn.Parameter(data, data.is_floating_point() if requires_grad is None else requires_grad)

    module: Any = _fsdp_param
    theirs, module.nn = module.nn, SimpleNamespace(**{**vars(nn), "Parameter": parameter})
    try:
        yield
    finally:
        module.nn = theirs


def _freeze_buffers(layer: BranchedLinear) -> None:
    """Matrices become parameters without gradient; vectors and empty branches are not worth dividing."""
    for name, buffer in list(layer.named_buffers(recurse=False)):
        if buffer.dim() == 2 and buffer.numel():
            delattr(layer, name)
            layer.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


def average_gradients(adapter: Sequence[nn.Parameter]) -> None:
    """Each gradient becomes its mean over the processes: one all-reduce of all of them."""
    gradients = [parameter.grad for parameter in adapter if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    means = [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
    torch._foreach_copy_(gradients, means)  # one launch; FLUX.1 has 836 factors


def held_bytes(transformer: nn.Module) -> int:
    """Bytes of frozen weights that this process keeps between blocks."""
    tensors = [*(p for p in transformer.parameters() if not p.requires_grad), *transformer.buffers()]
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def shard_digest(transformer: nn.Module) -> str:
    """sha256 of this process's part of the frozen base: equal before and after training, or the base changed."""
    for module in transformer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass without a backward one the last unit is still gathered
    digest = hashlib.sha256()
    for name, tensor in sorted([*transformer.named_parameters(), *transformer.named_buffers()]):
        if not tensor.requires_grad:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            digest.update(name.encode())
            digest.update(local.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
