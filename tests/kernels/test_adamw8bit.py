"""One launch of 8-bit AdamW over factors of odd sizes: codes by hand, the reference's bits, float32 AdamW's steps."""

import pytest
import torch

from loragraft.kernels.adamw8bit import BLOCK, CASES, SIGNED, UNSIGNED, adamw8bit, count_blocks, decode, encode
from loragraft.kernels.layout import relative_rms

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def moments(sizes, device="cpu"):
    blocks = sum(-(-size // BLOCK) for size in sizes)
    codes = torch.zeros(2, blocks * BLOCK, dtype=torch.uint8, device=device)
    return codes, torch.zeros(2, blocks, device=device)


def draw(sizes, seed, device="cpu", spread=1.0):
    """Gradients whose sizes vary within a block; the first of every factor is 0."""
    random = torch.Generator().manual_seed(seed)
    scale = torch.Generator().manual_seed(0)
    found = [
        torch.randn(size, generator=random) * torch.exp(spread * torch.randn(size, generator=scale)) for size in sizes
    ]
    for gradient in found:
        gradient[0] = 0
    return [gradient.to(device) for gradient in found]


@pytest.mark.parametrize("format", [SIGNED, UNSIGNED], ids=["m", "r"])
def test_codes_are_small_floats(format):
    exponent, mantissa = format
    top, values = 2 - 2.0**-mantissa, 2 ** (exponent + mantissa)
    codes = torch.arange(256).remainder(values).view(1, 256)
    levels = decode(codes, torch.ones(1, 1), format)
    assert levels[0, 0] == 0
    assert levels[0, values - 1] == top
    assert levels[0, 1] == 2.0 ** (2 - 2**exponent - mantissa)
    assert (levels[0, :values].diff() > 0).all()
    again, scale = encode(levels * 3, format)
    assert torch.equal(again, codes.to(torch.int32))
    assert scale.item() == pytest.approx(3)
    x = torch.rand(64, 256) * 10 ** (8 * torch.rand(64, 1) - 4)
    rounded = decode(*encode(x, format), format)
    step = torch.maximum(x * 2.0**-mantissa, x.amax(1, keepdim=True) / top * levels[0, 1])
    assert ((rounded - x).abs() <= step * (0.5 + 1e-5)).all()
    assert torch.equal(decode(*encode(torch.zeros(1, 256), format), format), torch.zeros(1, 256))


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_every_path_gives_the_references_bits(sizes, device, monkeypatch):
    """float32 has one right rounding of each operation, so a kernel without fused multiply-adds has no choice."""
    ours, expected = ([p.to(where) for p in draw(sizes, 1)] for where in (device, "cpu"))
    state, wanted = moments(sizes, device), moments(sizes)
    for step in range(1, 5):
        adamw8bit(ours, draw(sizes, step, device), *state, step=step, **SETTINGS)
        with monkeypatch.context() as patch:
            patch.setattr("loragraft.kernels.adamw8bit.uses_triton", lambda x: False)
            adamw8bit(expected, draw(sizes, step), *wanted, step=step, **SETTINGS)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one.cpu(), other)
    assert torch.equal(state[1].cpu(), wanted[1])
    first = 0
    for factor in ours:  # what lies behind a factor's end belongs to nobody
        for codes, reference in zip(state[0].cpu(), wanted[0], strict=True):
            assert torch.equal(codes[first : first + factor.numel()], reference[first : first + factor.numel()])
        first += count_blocks(factor) * BLOCK


@pytest.mark.not_interpreted
@pytest.mark.parametrize(("spread", "bound"), [(0.5, 0.07), (1.0, 0.08), (1.5, 0.3)])
def test_steps_are_those_of_float32_adamw(spread, bound):
    sizes = (64 * BLOCK,)
    ours, theirs = torch.zeros(sizes), torch.nn.Parameter(torch.zeros(sizes))
    state = moments(sizes)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(1, 201):
        before, before_theirs = ours.clone(), theirs.detach().clone()
        (theirs.grad,) = draw(sizes, step, spread=spread)
        adamw8bit([ours], [theirs.grad], *state, step=step, **SETTINGS)
        reference.step()
        if step == 1:
            assert torch.allclose(ours, theirs, atol=1e-7)
        ours_moved, theirs_moved = ours - before, theirs.detach() - before_theirs
    assert relative_rms(ours_moved, theirs_moved) < bound
    assert ours_moved.norm() == pytest.approx(float(theirs_moved.norm()), rel=0.05)
    assert ours_moved.abs().max() < 3 * theirs_moved.abs().max()


def test_a_value_without_gradient_stays(device):
    """Beside others that have one: its root is not 0, but its mean is. Without any, nothing moves and nothing is NaN."""
    factor, quiet = torch.ones(BLOCK, device=device), torch.ones(3, device=device)
    gradient = torch.full((BLOCK,), 5.0, device=device)
    gradient[7] = 0
    state = moments((BLOCK, 3), device)
    for step in (1, 2):
        adamw8bit(
            [factor, quiet],
            [gradient, torch.zeros(3, device=device)],
            *state,
            step=step,
            **SETTINGS | {"weight_decay": 0.0},
        )
    assert factor[7] == 1
    assert (factor[8:] < 0.99).all()
    assert torch.equal(quiet.cpu(), torch.ones(3))
    assert state[0][1, 7] == 1


def test_what_does_not_fit_is_named():
    state = moments((8,))
    with pytest.raises(ValueError, match=r"a factor is torch\.bfloat16"):
        adamw8bit([torch.zeros(8, dtype=torch.bfloat16)], [torch.zeros(8)], *state, step=1, **SETTINGS)
    with pytest.raises(ValueError, match="1 factors in 2 blocks of 256"):
        adamw8bit([torch.zeros(300)], [torch.zeros(300)], *state, step=1, **SETTINGS)


@pytest.mark.not_interpreted
def test_opcheck(device):
    arguments = (draw((300, 5), 1, device), draw((300, 5), 2, device), *moments((300, 5), device))
    numbers = (1.0, 0.01, 0.9, 0.1, 0.99, 0.01, 1.0, 1e-8)
    torch.library.opcheck(torch.ops.loragraft.adamw8bit.default, (*arguments, *numbers))
