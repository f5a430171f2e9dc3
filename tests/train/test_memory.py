"""Checkpointing changes what is kept, never what is computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from loragraft.kernels.layout import relative_rms
from loragraft.recipes.load import RecipeError, load_recipe
from loragraft.train.memory import (
    _contexts,
    block_paths,
    set_checkpointing,
    worth_keeping,
    worth_keeping_or_small,
)

BLOCKS = ["transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0", "single_transformer_blocks.1"]


def step(model: nn.Module, parameters: list[nn.Parameter], loss_of: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    """[loss, every gradient]."""
    loss = loss_of(model)
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def kept_bytes(run: Callable[[], torch.Tensor]) -> int:
    """Bytes of activations that the graph holds after the forward pass, each storage counted once."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    total = sum(storages.values())
    del loss
    return total


@pytest.mark.parametrize("smoothing", ["hadamard", "weight"])
def test_gradients_are_the_same_bits(smoothing: str, tiny_flux: Any, loss_of: Any) -> None:
    model, parameters = tiny_flux(smoothing=smoothing)
    plain = step(model, parameters, loss_of)
    assert all(bool(gradient.any()) for gradient in plain[1:])
    for policy, blocks, count in (("block", 0, 4), ("selective", 1, 1), ("selective", 3, 3), ("none", 0, 0)):
        assert set_checkpointing(model, policy, blocks) == count
        for one, two in zip(plain, step(model, parameters, loss_of), strict=True):
            assert torch.equal(one, two), policy


@pytest.mark.slow
def test_compiled_blocks_checkpoint_too(tiny_flux: Any, loss_of: Any) -> None:
    """Traced and partitioned as for Inductor, run by torch: the same loss, gradients up to the order of sums."""
    model, parameters = tiny_flux()
    plain = step(model, parameters, loss_of)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    seen = []
    for policy, blocks in (("none", 0), ("block", 0), ("selective", 2)):
        set_checkpointing(model, policy, blocks)
        seen.append(step(model, parameters, loss_of))
    for compiled in seen:
        for one, two, three in zip(plain, compiled, seen[0], strict=True):
            assert torch.equal(two, three)
            assert relative_rms(two, one) < 1e-5


def test_the_compilers_cache_can_tell_policies_apart() -> None:
    """Without a hash of its own a policy keeps its blocks out of the cache; with another's they would compute what that keeps."""
    hashes = {contexts.cache_hash for contexts in map(_contexts, (worth_keeping, worth_keeping_or_small))}
    assert len(hashes) == 2
    assert all(len(found.split()[1]) == 64 for found in hashes)


def test_the_blocks_are_found_in_the_order_they_run(tiny_flux: Any, loss_of: Any) -> None:
    model, _ = tiny_flux()
    assert block_paths(model) == BLOCKS
    ran: list[str] = []
    for path in BLOCKS:
        model.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: ran.append(path))
    loss_of(model).backward()
    assert ran == BLOCKS
    ran.clear()
    set_checkpointing(model, "selective", 2)
    loss_of(model).backward()
    assert ran == [*BLOCKS, BLOCKS[1], BLOCKS[0]]  # the first two again, last first


def test_dropout_is_drawn_once(tiny_flux: Any, loss_of: Any) -> None:
    """No model here has any; one that had would see the same mask again when a block is computed again."""
    model, parameters = tiny_flux()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
            module.train()
    seen = []
    for policy in ("none", "block"):
        set_checkpointing(model, policy)  # type: ignore[arg-type]
        torch.manual_seed(0)
        seen.append(step(model, parameters, loss_of))
    for one, two in zip(*seen, strict=True):
        assert torch.equal(one, two)


def test_less_is_kept(tiny_flux: Any, loss_of: Any) -> None:
    model, _ = tiny_flux()
    kept = {}
    for policy, blocks in (("none", 0), ("selective", 2), ("block", 0)):
        set_checkpointing(model, policy, blocks)
        kept[policy] = kept_bytes(lambda: loss_of(model))
    assert kept["block"] < 0.5 * kept["selective"] < 0.4 * kept["none"]


def test_x_is_kept_once_and_never_wide(tiny_flux: Any, loss_of: Any) -> None:
    """In 16 bits: no float32 copy of a layer's input, and one tensor of codes for all the layers that read it."""
    model, _ = tiny_flux(torch.bfloat16)
    wide, codes = [], set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.float32 and tensor.dim() > 1 and tensor.shape[-1] in (128, 512, 640):
            wide.append(tuple(tensor.shape))
        if tensor.dtype == torch.int8:
            codes.add(tensor.data_ptr())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, torch.bfloat16)
    factors = {tuple(p.shape) for p in model.parameters() if p.requires_grad}
    assert [shape for shape in wide if shape not in factors] == []
    double, single = 2 * 4, 2  # q k v, to_out, two of the feed-forward, for text and image; q k v proj_mlp, proj_out
    assert len(codes) == 2 * double + 2 * single
    assert loss.requires_grad


def test_what_cannot_be_done_is_refused(tiny_flux: Any) -> None:
    model, _ = tiny_flux()
    with pytest.raises(ValueError, match=r"train\.offload_activations .* this run is on cpu"):
        set_checkpointing(model, "block", offload=True)
    with pytest.raises(ValueError, match=r"checkpoint_blocks is 5: FluxTransformer2DModel has 4 blocks"):
        set_checkpointing(model, "selective", 5)
    with pytest.raises(ValueError, match=r"Linear supports no checkpointing: set train\.checkpointing=none"):
        set_checkpointing(nn.Linear(2, 2), "block")
    assert set_checkpointing(nn.Linear(2, 2), "none") == 0
    for wrong in (
        ["train.checkpointing=selective"],
        ["train.checkpoint_blocks=3"],
        ["train.checkpointing=block", "train.checkpoint_blocks=3"],
    ):
        with pytest.raises(RecipeError, match=r"train\.checkpoint_blocks is \d with train\.checkpointing="):
            load_recipe("marketing", wrong)
    for policy in ("none", "gelu", "cheap"):
        with pytest.raises(
            RecipeError, match=rf"train\.offload_activations .* is {policy}: set it to block or selective"
        ):
            load_recipe("marketing", ["train.offload_activations=true", f"train.checkpointing={policy}"])
