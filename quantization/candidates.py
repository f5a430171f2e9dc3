"""Which of many transforms suits a part of a layer: all of them for one round each, a stack of them at a time.

Alone, a candidate of a subsampled search keeps a GPU busy for a fraction of the time that its 150 kernels take to launch; ten in
one stack [C, N, K] take as many launches as one. The formulas are those of `split.split_layer` with a single round and
`COLD_ITERATIONS`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from loragraft.quantization.low_rank import Subspace
from loragraft.quantization.split import (
    Layer,
    Transform,
    quantized_inputs,
    rotate,
    round_weight,
    smoothing_vector,
    without_branch,
)

STACK_ELEMENTS = 1 << 25
"""Weights of a stack: three float32 copies of it take 400 MB, less than the alternation of a wide layer does."""
COLD_ITERATIONS = 1
"""Power iterations of a candidate's SVD: enough to rank it."""


def candidate_errors(layer: Layer, transforms: Sequence[Transform]) -> list[float]:
    """The output error of `layer` after one round under each of the transforms, in their order."""
    found = [float("nan")] * len(transforms)
    count = max(1, STACK_ELEMENTS // layer.weight_NK.numel())
    for hadamard in (False, True):
        numbers = [i for i, transform in enumerate(transforms) if transform.hadamard is hadamard]
        for start in range(0, len(numbers), count):
            stack = numbers[start : start + count]
            errors = _stack_errors(layer, [transforms[i] for i in stack], hadamard)
            for i, error in zip(stack, errors, strict=True):
                found[i] = error
    return found


def _stack_errors(layer: Layer, transforms: Sequence[Transform], hadamard: bool) -> list[float]:
    settings, weight = layer.settings, layer.weight_NK
    exponents = torch.tensor([(transform.alpha, transform.beta) for transform in transforms], device=weight.device)
    alpha_C1, beta_C1 = exponents.split(1, dim=1)
    smooth_CK = smoothing_vector(layer.absmax_K, layer.weight_absmax_K, alpha_C1, beta_C1)
    wide_C1K = smooth_CK.float()[:, None]
    target_CNK = rotate(weight * wide_C1K, hadamard)
    up, right = Subspace(settings.branch_rank, settings.seed, COLD_ITERATIONS).factors(target_CNK)
    down = (rotate(right, hadamard) / wide_C1K).to(torch.bfloat16)
    up = up.to(torch.bfloat16)
    residual = without_branch(target_CNK, down, up, wide_C1K, hadamard)
    dense_CNK = round_weight(residual.flatten(0, 1), settings).dense_NK.view_as(residual)
    inputs_CSK = torch.stack([quantized_inputs(layer, smooth, hadamard) for smooth in smooth_CK])
    output_CSN = inputs_CSK @ dense_CNK.mT + (layer.rows_SK @ down.float().mT) @ up.float().mT
    return _relative_rms(output_CSN, layer.target_SN)


def _relative_rms(output_CSN: Tensor, target_SN: Tensor) -> list[float]:
    """`kernels.layout.relative_rms` of every output, with one wait for the device."""
    target = target_SN.double()
    wrong, size = (output_CSN.double() - target).flatten(1).norm(dim=1), target.norm()
    zero = torch.where(wrong == 0, torch.zeros_like(wrong), torch.full_like(wrong, torch.inf))
    found: list[float] = torch.where(size > 0, wrong / size, zero).tolist()
    return found
