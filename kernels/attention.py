"""Attention whose forward and backward pass may come from different libraries: one op, its gradient, and what each needs.

    S = q k^T / sqrt D,   lse = log sum_j exp S_ij,   o = exp(S - lse) v
    P = exp(S - lse),     dS = P (do v^T - rowsum(do o)),   dq = dS k / sqrt D,  dk = dS^T q / sqrt D,  dv = P^T do

| backend | forward | backward |
|---|---|---|
| cudnn_forward | cuDNN, twice as fast as flash-2 on Hopper | flash-2, as cuDNN's own fails with torch 2.11 and driver 580 |
| flash_attn_4 | FlashAttention-4 (`flash_attn.cute`, Hopper and later) | the same |

The two sides meet in lse: natural logarithm, float32 [B, H, S] everywhere (cuDNN adds an axis of one). Shapes: B batch, S and T
queries and keys, H heads, D width of a head; tensors are [B, S, H, D], as diffusers passes them. On a CPU the op computes
the formulas in float32. Sources: Dao, "FlashAttention-2" (2023), section 3; aten's `native_functions.yaml`.
"""

from importlib import import_module
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Backend = Literal["cudnn_forward", "flash_attn_4"]
LEAST_CAPABILITY = {"cudnn_forward": (8, 0), "flash_attn_4": (9, 0)}


def attention(q_BSHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, backend: Backend) -> Tensor:
    """o [B, S, H, D] in q's dtype, with gradients for q, k and v.

    Raises ValueError for an unknown backend and for shapes or dtypes that differ or that no kernel takes (D not a multiple
    of 8; on a GPU anything but bfloat16 and float16). Whether the backend is there at all is `check_backend`'s question.
    """
    B, _, H, D = q_BSHD.shape
    if backend not in get_args(Backend):
        raise ValueError(f"attention: backend = {backend!r}, must be one of {', '.join(get_args(Backend))}")
    if k_BTHD.shape != v_BTHD.shape or (k_BTHD.shape[0], *k_BTHD.shape[2:]) != (B, H, D) or D % 8:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q_BSHD, k_BTHD, v_BTHD))
        raise ValueError(
            f"attention: q, k, v are {shapes}, must be [B, S, H, D] and twice [B, T, H, D], D a multiple of 8"
        )
    dtypes = {q_BSHD.dtype, k_BTHD.dtype, v_BTHD.dtype}
    if len(dtypes) > 1 or (q_BSHD.is_cuda and not dtypes <= {torch.bfloat16, torch.float16}):
        raise ValueError(f"attention: q, k, v are {', '.join(map(str, dtypes))}, must be all bfloat16 or all float16")
    o_BSHD, _ = _attention(q_BSHD.contiguous(), k_BTHD.contiguous(), v_BTHD.contiguous(), backend)
    return o_BSHD


def check_backend(backend: Backend, device: torch.device) -> None:
    """Raises ValueError, with the remedy, where `backend` cannot run on `device`."""
    if device.type != "cuda":
        raise ValueError(
            f"train.attention={backend} needs a CUDA GPU, this run is on {device}: set train.attention=sdpa"
        )
    found, least = torch.cuda.get_device_capability(device), LEAST_CAPABILITY[backend]
    if found < least:
        raise ValueError(
            f"train.attention={backend} needs compute capability {least[0]}.{least[1]}, {torch.cuda.get_device_name(device)} "
            f"has {found[0]}.{found[1]}: set train.attention=sdpa"
        )
    if backend == "flash_attn_4":
        _flash_attn_4()


def _flash_attn_4() -> ModuleType:
    try:
        return import_module("flash_attn.cute.interface")
    except ImportError as error:
        raise ValueError(
            f'train.attention=flash_attn_4 needs flash-attn-4 ({error}): pip install "loragraft[flash-attn-4]", or set '
            "train.attention=sdpa"
        ) from error


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


@torch.library.custom_op("loragraft::attention", mutates_args=())
def _attention(q_BSHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """(o, lse)."""
    B, S, H, D = q_BSHD.shape
    if not _on_gpu(q_BSHD):
        return _reference(q_BSHD, k_BTHD, v_BTHD)
    if backend == "flash_attn_4":
        o_BSHD, lse_BHS, *_ = _flash_attn_4()._flash_attn_fwd(
            q_BSHD, k_BTHD, v_BTHD, softmax_scale=D**-0.5, return_lse=True
        )
        return o_BSHD, lse_BHS
    q, k, v = (t.transpose(1, 2) for t in (q_BSHD, k_BTHD, v_BTHD))
    bias, wants_lse, dropout, causal, debug = None, True, 0.0, False, False
    o_BHSD, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, bias, wants_lse, dropout, causal, debug, scale=D**-0.5
    )
    return o_BHSD.transpose(1, 2).contiguous(), lse.view(B, H, S)


@_attention.register_fake
def _(q_BSHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    B, S, H, _ = q_BSHD.shape
    return q_BSHD.new_empty(q_BSHD.shape), q_BSHD.new_empty((B, H, S), dtype=torch.float32)


@torch.library.custom_op("loragraft::attention_backward", mutates_args=())
def _attention_backward(
    do_BSHD: Tensor, q_BSHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, o_BSHD: Tensor, lse_BHS: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    S, T, D = q_BSHD.shape[1], k_BTHD.shape[1], q_BSHD.shape[3]
    if not _on_gpu(q_BSHD):
        return _reference_backward(do_BSHD, q_BSHD, k_BTHD, v_BTHD, o_BSHD, lse_BHS)
    if backend == "flash_attn_4":
        dq, dk, dv, *_ = _flash_attn_4()._flash_attn_bwd(
            q_BSHD, k_BTHD, v_BTHD, o_BSHD, do_BSHD, lse_BHS, softmax_scale=D**-0.5
        )
        return dq, dk, dv
    do, q, k, v, o = (t.transpose(1, 2) for t in (do_BSHD, q_BSHD, k_BTHD, v_BTHD, o_BSHD))
    seed, offset = (torch.zeros(shape, dtype=torch.uint64, device=q.device) for shape in ((2,), ()))  # of no dropout
    lengths_q, lengths_k, dropout, causal = None, None, 0.0, False
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, o, lse_BHS, lengths_q, lengths_k, S, T, dropout, causal, seed, offset, scale=D**-0.5
    )
    dq, dk, dv = (gradient.transpose(1, 2).contiguous() for gradient in gradients)
    return dq, dk, dv


@_attention_backward.register_fake
def _(
    do_BSHD: Tensor, q_BSHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, o_BSHD: Tensor, lse_BHS: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q_BSHD.new_empty(q_BSHD.shape), k_BTHD.new_empty(k_BTHD.shape), v_BTHD.new_empty(v_BTHD.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BSHD, k_BTHD, v_BTHD, ctx.backend = inputs
    ctx.save_for_backward(q_BSHD, k_BTHD, v_BTHD, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do_BSHD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_attention_backward(do_BSHD.contiguous(), *ctx.saved_tensors, ctx.backend), None


_attention.register_autograd(_backward, setup_context=_setup_context)


def _reference(q_BSHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (t.transpose(1, 2).float() for t in (q_BSHD, k_BTHD, v_BTHD))
    s_BHST = q @ k.mT * q.shape[-1] ** -0.5
    lse_BHS = s_BHST.logsumexp(-1)
    o_BHSD = (s_BHST - lse_BHS[..., None]).exp() @ v
    return o_BHSD.transpose(1, 2).to(q_BSHD.dtype, memory_format=torch.contiguous_format, copy=True), lse_BHS


def _reference_backward(
    do_BSHD: Tensor, q_BSHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, o_BSHD: Tensor, lse_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    do, q, k, v, o = (t.transpose(1, 2).float() for t in (do_BSHD, q_BSHD, k_BTHD, v_BTHD, o_BSHD))
    scale = q.shape[-1] ** -0.5
    p_BHST = (q @ k.mT * scale - lse_BHS[..., None]).exp()
    ds_BHST = p_BHST * (do @ v.mT - (do * o).sum(-1, keepdim=True)) * scale
    gradients = (ds_BHST @ k, ds_BHST.mT @ q, p_BHST.mT @ do)
    dq, dk, dv = (
        g.transpose(1, 2).to(q_BSHD.dtype, memory_format=torch.contiguous_format, copy=True) for g in gradients
    )
    return dq, dk, dv
