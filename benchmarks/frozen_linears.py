"""Frozen linear layers of other precisions that pass gradients to x, for LoRA over bf16, FP8, NF4 and SDNQ bases.

FP8: y from rowwise codes of x and W, both e4m3; dx = dy W in bf16 with W dequantized. NF4: bitsandbytes, everything in bf16.
SDNQ: UINT4 weights, INT8 products forward and backward, as its own training mode chooses without gradient checkpointing: each layer
keeps its weight rounded to INT8 from the forward pass for the backward pass. GPL, so it is imported in the process of its variant alone.
"""

import os
from typing import Any

import torch
from rivals import FP8_MAX, RivalError, rowwise
from torch import Tensor, nn


def frozen_linear(kind: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer of `weight` [N, K], bf16 on its device, in `kind`: bf16, fp8, nf4 (bitsandbytes) or sdnq."""
    bias = None if bias is None else bias.to(torch.bfloat16)
    if kind == "fp8":
        return Fp8Linear(weight, bias)
    if kind == "nf4":
        import bitsandbytes as bnb

        linear = bnb.nn.Linear4bit(
            weight.shape[1], weight.shape[0], bias is not None, torch.bfloat16, quant_type="nf4", device="meta"
        )
        linear.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", module=linear)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear.to(weight.device)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return _sdnq(linear) if kind == "sdnq" else linear


def _sdnq(linear: nn.Linear) -> nn.Module:
    """Autocast does not reach into its ops, which answer in x's dtype: x is cast here, as autocast casts that of others.

    Its products and compiled functions are its defaults; the variables only keep it from trying out at import what it may use.
    Raises RivalError where it leaves the layer as it is."""
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "1")
    os.environ.setdefault("SDNQ_USE_OPENVINO_MM", "0")
    from sdnq.training import sdnq_training_post_load_quant

    frame = nn.Sequential(linear)
    sdnq_training_post_load_quant(
        frame, weights_dtype="uint4", use_quantized_matmul=True, use_grad_ckpt=False, use_stochastic_rounding=False, add_skip_keys=False,
    )  # fmt: skip
    if "sdnq" not in type(frame[0]).__name__.lower():
        raise RivalError(f"SDNQ left the layer unquantized (N, K = {tuple(linear.weight.shape)})")
    frame[0].register_forward_pre_hook(lambda _, args: (args[0].to(torch.bfloat16), *args[1:]))
    return frame[0]


class Fp8Linear(nn.Linear):
    """A frozen linear with rowwise FP8 weights: x is quantized per token, dx is computed from the dequantized weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        codes, scale = rowwise(weight, FP8_MAX, torch.float8_e4m3fn)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)  # PEFT reads its dtype and device
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        y = _Fp8Product.apply(x.reshape(-1, x.shape[-1]), self.codes, self.scale)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.dtype = x.dtype
        rounded, x_scale = rowwise(x, FP8_MAX, torch.float8_e4m3fn)
        return torch._scaled_mm(
            rounded, codes.T, scale_a=x_scale, scale_b=scale.T, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        codes, scale = ctx.saved_tensors
        return (dy @ (codes.to(dy.dtype) * scale.to(dy.dtype))).to(ctx.dtype), None, None
