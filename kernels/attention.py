"""Attention without a mask, by the fastest forward and backward that are there.

    o = softmax(q k^T / sqrt D) v          q, k, v, o [B, S, H, D] in 16 bits, log-sum-exp [B, H, S] float32

| backend | forward | backward |
|---|---|---|
| flash_attn_4 | FlashAttention-4 (package flash-attn-4, Hopper and Blackwell) | the same |
| cudnn | cuDNN, about twice as fast as FlashAttention-2 on Hopper | FlashAttention-2: cuDNN's own fails with some drivers |

Both passes are custom ops, so `torch.compile` and CUDA graphs see one node. Backward sums are in no fixed order: two runs may
differ in the last bits of a gradient. `backbones/attention.py` puts it into a model.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("flash_attn_4", "cudnn")


def attention_runs(backend: str, device: torch.device) -> str:
    """Why `backend` cannot run on `device`; "" if it can."""
    if device.type != "cuda":
        return f"{backend} needs a CUDA GPU"
    if torch.cuda.get_device_capability(device)[0] < 9:
        return f"{backend} is for Hopper and newer; sdpa is as fast here"
    if backend == "flash_attn_4" and (find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None):
        return "flash_attn_4 is not installed: pip install loragraft[flash-attn-4]"
    return ""


@torch.library.custom_op("loragraft::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """(o [B, S, H, D], log-sum-exp [B, H, S])."""
    if backend == "flash_attn_4":
        out, lse, *_ = _flash_attn_4("_flash_attn_fwd")(q, k, v, return_lse=True)
        return out, lse
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads_first, None, True)
    return out.transpose(1, 2).contiguous(), lse.reshape(lse.shape[:3]).contiguous()


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    B, S, H, _D = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, S), dtype=torch.float32)


@torch.library.custom_op("loragraft::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), each [B, S, H, D]."""
    if backend == "flash_attn_4":
        dq, dk, dv, *_ = _flash_attn_4("_flash_attn_bwd")(q, k, v, out, grad, lse)
        return dq, dk, dv
    heads_first = (t.transpose(1, 2) for t in (grad, q, k, v, out))
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that there is not
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *heads_first,
        lse,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        False,
        unused,
        unused,
        scale=1 / math.sqrt(q.shape[3]),
    )
    dq, dk, dv = (g.transpose(1, 2).contiguous() for g in grads)
    return dq, dk, dv


@_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *qkv, ctx.backend = inputs
    ctx.save_for_backward(*qkv, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.backend), None


_attention.register_autograd(_backward, setup_context=_setup_context)


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """o [B, S, H, D] of q [B, S, H, D] and k, v [B, T, H, D], differentiable. Raises ValueError for other shapes or dtypes."""
    if q.dtype not in (torch.bfloat16, torch.float16) or {t.dtype for t in (k, v)} != {q.dtype}:
        raise ValueError(f"attention in {q.dtype}, {k.dtype}, {v.dtype}: these kernels take bfloat16 or float16")
    if q.dim() != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"attention of {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: expected [B, S, H, D], [B, T, H, D] twice"
        )
    out, _ = _attention(q.contiguous(), k.contiguous(), v.contiguous(), backend)
    return out


def _flash_attn_4(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """The halves of its autograd function, which `torch.compile` cannot trace: they launch kernels written in CuTe."""
    from flash_attn.cute import interface

    found: Callable[..., tuple[Tensor, ...]] = getattr(interface, name)
    return found
