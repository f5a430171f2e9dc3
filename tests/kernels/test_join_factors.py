"""Factors copied into their places by one launch, against copies one by one."""

import pytest
import torch

from loragraft.kernels.join_factors import BLOCK, Plan

SHAPES = ((4, 300), (130, 4), (1, 1), (3, BLOCK), (700, 16))


def places(device, dtype):
    """(wide matrices, their last rows or columns, factors)."""
    random = torch.Generator().manual_seed(0)
    factors = [torch.randn(shape, generator=random).to(device) for shape in SHAPES]
    wide = [torch.full((f.shape[0] + 8, f.shape[1] + 8), 7.0, device=device, dtype=dtype) for f in factors]
    return wide, [w[8:, 8:] for w in wide], factors


def test_factors_are_scaled_cast_and_put_in_place(device, dtype):
    if dtype == torch.bfloat16 and device == "cpu":
        dtype = torch.float16  # the interpreter rounds bfloat16 otherwise
    wide, targets, factors = places(device, dtype)
    scales = [1.0, 0.3, 2.0, -1.5, 1.0]
    plan = Plan(targets, factors, scales)
    for _ in range(2):
        plan.run()
        for around, target, factor, scale in zip(wide, targets, factors, scales, strict=True):
            assert torch.equal(target, (factor * scale).to(dtype))
            assert (around[:8] == 7).all() and (around[:, :8] == 7).all()
        factors[1].mul_(2)  # as an optimizer changes them


def test_factors_that_moved_are_found(device):
    _, targets, factors = places(device, torch.float32)
    parameters = [torch.nn.Parameter(factor) for factor in factors]
    plan = Plan(targets, parameters, [1.0] * len(factors))
    plan.run()
    parameters[0].data = parameters[0].data * 3
    plan.run()
    assert torch.equal(targets[0], factors[0] * 3)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="contiguous float32"):
        Plan([torch.zeros(2, 3)], [torch.zeros(3, 2).T], [1.0])
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        Plan([torch.zeros(2, 4)], [torch.zeros(2, 3)], [1.0])


@pytest.mark.not_interpreted
def test_opcheck(device):
    _, targets, factors = places(device, torch.float32)
    plan = Plan(targets, factors, [1.0] * len(factors))
    arguments = (targets, factors, plan.scales, plan.work, plan.here, plan.there)
    torch.library.opcheck(torch.ops.loragraft.join_factors.default, arguments)


@pytest.mark.gpu
def test_a_captured_copy_reads_the_factors_anew():
    _, targets, factors = places("cuda", torch.bfloat16)
    plan = Plan(targets, factors, [1.0] * len(factors))
    plan.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run()
    for factor in factors:
        factor.add_(1)
    graph.replay()
    for target, factor in zip(targets, factors, strict=True):
        assert torch.equal(target, factor.bfloat16())
