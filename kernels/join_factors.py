"""Every layer's A and B, in the compute dtype, into their places in [D; A] and [U, B]: one launch for a whole model.

    target_ij = scale factor_ij           factor [rows, width] float32 and contiguous, target a view with any stride of rows

As a kernel for each matrix the copies of FLUX.1's 418 layers took 1.6 ms of a step on an H100; their bytes are 0.12 ms.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from loragraft.kernels.layout import on_device, uses_triton

BLOCK = 1024  # values of a program
# Of a row of the table: addresses of target and factor, values, values in a row, the target's stride.
FIELDS = tl.constexpr(5)


@triton.jit
def join_factors_kernel(p_table, p_scales, p_work, p_like, BLOCK: tl.constexpr):
    """p_work [programs, 2]: a row of the table and the first value. p_like: a pointer of the targets' dtype."""
    entry, first = tl.load(p_work + 2 * tl.program_id(0)), tl.load(p_work + 2 * tl.program_id(0) + 1)
    p_entry = p_table + FIELDS * entry
    p_target = tl.load(p_entry).to(tl.pointer_type(p_like.dtype.element_ty))
    p_factor = tl.load(p_entry + 1).to(tl.pointer_type(tl.float32))
    size, width = tl.load(p_entry + 2).to(tl.int32), tl.load(p_entry + 3).to(tl.int32)
    o_i = first + tl.arange(0, BLOCK)
    b_x = tl.load(p_factor + o_i, mask=o_i < size, other=0.0) * tl.load(p_scales + entry)
    o_row = o_i // width
    o_target = o_row.to(tl.int64) * tl.load(p_entry + 4) + (o_i - o_row * width)
    tl.store(p_target + o_target, b_x.to(p_like.dtype.element_ty), mask=o_i < size)


class Plan:
    """What does not change from one joining to the next, on the device: sizes, scales and, until they move, addresses."""

    def __init__(self, targets: Sequence[Tensor], factors: Sequence[Tensor], scales: Sequence[float]) -> None:
        """Raises ValueError for matrices that do not fit."""
        for target, factor in zip(targets, factors, strict=True):
            fits = target.shape == factor.shape and target.stride(1) == 1 and target.dtype == targets[0].dtype
            if not fits or factor.dtype != torch.float32 or not factor.is_contiguous():
                raise ValueError(
                    f"join_factors: a factor is {factor.dtype} {tuple(factor.shape)} and its place {target.dtype} {tuple(target.shape)}; "
                    f"factors must be contiguous float32, places {targets[0].dtype} of equal shapes with rows contiguous"
                )
        self.targets, self.factors = list(targets), list(factors)
        device = targets[0].device
        programs = torch.tensor([-(-factor.numel() // BLOCK) for factor in factors])
        entry = torch.repeat_interleave(torch.arange(len(factors)), programs)
        start = torch.arange(int(programs.sum())) - (programs.cumsum(0) - programs)[entry]
        self.work = torch.stack([entry, start * BLOCK], 1).to(torch.int32).to(device)
        self.scales = torch.tensor(list(scales), dtype=torch.float32).to(device)
        self.here = torch.zeros((len(factors), FIELDS.value), dtype=torch.int64)
        self.there = self.here.to(device)

    @torch.no_grad()
    def run(self) -> None:
        """Copies the factors as they are now. Raises RuntimeError where addresses changed and a CUDA graph is captured."""
        factors = [factor.detach() for factor in self.factors]
        _join_factors(self.targets, factors, self.scales, self.work, self.here, self.there)


@torch.library.custom_op("loragraft::join_factors", mutates_args=("targets", "here", "there"))
def _join_factors(
    targets: Sequence[Tensor], factors: Sequence[Tensor], scales: Tensor, work: Tensor, here: Tensor, there: Tensor
) -> None:
    """here and there: the table, on the CPU and on the device; written where addresses are not those of the last call."""
    if not uses_triton(work):
        for target, factor, scale in zip(targets, factors, scales.tolist(), strict=True):
            target.copy_(factor * scale)
        return
    pairs = zip(targets, factors, strict=True)
    table = torch.tensor([(t.data_ptr(), f.data_ptr(), f.numel(), f.shape[1], t.stride(0)) for t, f in pairs])
    if not torch.equal(table, here):
        if work.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "join_factors: the factors moved since they were joined last; join once before a capture"
            )
        here.copy_(table)
        there.copy_(table)
    with on_device(work):
        join_factors_kernel[(len(work),)](there, scales, work, targets[0], BLOCK=BLOCK, num_warps=4)


@_join_factors.register_fake
def _(targets, factors, scales, work, here, there):
    return None
