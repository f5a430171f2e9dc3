"""What is particular to the native op; what all linear ops share is in test_registry.py."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from loragraft.kernels.layout import LinearCase, pack_tiles, pack_words, relative_rms
from loragraft.kernels.registry import OPS, cast
from loragraft.kernels.w4a8_linear import dequantize_w4a8, w4a8_linear, weight_int8

W4A8 = next(op for op in OPS if op.name == "w4a8")


def gradients(inputs, dy, **modes):
    names = [name for name in ("x", "adapter_down", "adapter_up") if inputs[name] is not None]
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    y = w4a8_linear(**{**inputs, **leaves}, **modes)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def test_one_output_by_hand(device):
    """K = 128, x = 1 everywhere: a = 1 / 127, codes 127; y = a s_n 127 sum_k (u - z) s = s_n (128 u s - 64 (z0 s0 + z1 s1))."""
    u = torch.full((1, 128), 3, dtype=torch.uint8)
    scale, zero = torch.tensor([[2], [16]], dtype=torch.uint8), torch.tensor([[5], [8]], dtype=torch.uint8)
    words = pack_words(scale, zero, 64)
    assert weight_int8(pack_tiles(u), words).unique().tolist() == [-80, -4]
    empty = {"lora_down": torch.zeros(0, 128, device=device), "lora_up": torch.zeros(1, 0, device=device)}
    weights = {"qweight": pack_tiles(u), "row_scale": torch.tensor([0.5]), "group_words": words}
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    y = w4a8_linear(torch.ones(1, 128, device=device), **weights, **empty, smooth=None, bias=None, hadamard=False)
    assert y.item() == pytest.approx(0.5 * 64 * (-80 - 4), rel=1e-6)


def test_the_ends_of_int8(device):
    """(u - z) s reaches -128 and 112 without wrapping, and a whole row of them sums exactly."""
    inputs = cast(W4A8.inputs(LinearCase(7, 40, 128)), torch.float32, device)
    weight = weight_int8(inputs["qweight"], inputs["group_words"])
    assert weight[0].min() == -128
    assert weight[0].max() == 112
    dense = dequantize_w4a8(inputs["qweight"], inputs["row_scale"], inputs["group_words"])
    assert torch.equal(dense, weight.float() * inputs["row_scale"][:, None])


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.usefixtures("poison")
def test_int8_dgrad_is_close_and_touches_dx_alone(hadamard, group, device, dtype, tolerance):
    case = LinearCase(17, 96, 192 if group == 64 else 256, hadamard=hadamard, group=group)
    inputs = cast(W4A8.inputs(case), dtype, device)
    dy = torch.randn(17, 96, generator=torch.Generator().manual_seed(4)).to(device, dtype)
    exact, int8 = gradients(inputs, dy, dgrad="dequantized"), gradients(inputs, dy, dgrad="int8")
    assert relative_rms(int8["adapter_down"], exact["adapter_down"]) < tolerance  # dy B, summed in another order
    assert torch.equal(exact["adapter_up"], int8["adapter_up"])
    assert 1e-3 < relative_rms(int8["x"], exact["x"]) < 1.5e-2  # 0.3-0.8 % seen


def test_int8_dgrad_is_exact_on_its_grid(device):
    """dy s_n on an 8-bit grid: nothing is lost in quantizing it, so both kinds of dgrad agree to float32 rounding."""
    case = LinearCase(7, 40, 192, hadamard=True)
    inputs = cast(W4A8.inputs(case), torch.float32, device)
    codes = torch.randint(-126, 127, (7, 40), generator=torch.Generator().manual_seed(5)).float()
    codes[:, 0] = 127
    dy = (codes / 127).to(device) / inputs["row_scale"]
    exact, int8 = gradients(inputs, dy, dgrad="dequantized"), gradients(inputs, dy, dgrad="int8")
    assert relative_rms(int8["x"], exact["x"]) < 1e-5


@pytest.mark.parametrize("ranks", [(0, 0), (8, 0), (32, 16), (32, 32), (48, 48)])
def test_int8_dgrad_without_a_branch_and_with_many_ranks(ranks, device, dtype, tolerance):
    """On Hopper the product of dgrad takes its branch from the other side, and its ranks in stages of 64 and 32."""
    inputs = cast(W4A8.inputs(LinearCase(130, 96, 192, *ranks)), dtype, device)
    dy = torch.randn(130, 96, generator=torch.Generator().manual_seed(7)).to(device, dtype)
    wide = cast(inputs, torch.float32, "cpu")
    exact, int8 = gradients(wide, dy.float().cpu(), dgrad="dequantized"), gradients(inputs, dy, dgrad="int8")
    assert relative_rms(int8["x"].cpu(), exact["x"]) < 1.5e-2 + tolerance
    if ranks[1]:
        assert relative_rms(int8["adapter_down"].cpu(), exact["adapter_down"]) < 4 * tolerance


def test_rows_of_weight_zero_do_not_spoil_int8_dgrad(device):
    inputs = cast(W4A8.inputs(LinearCase(7, 40, 192)), torch.float32, device)
    inputs["row_scale"][3] = 0
    dy = torch.randn(7, 40, generator=torch.Generator().manual_seed(6)).to(device)
    exact, int8 = gradients(inputs, dy, dgrad="dequantized"), gradients(inputs, dy, dgrad="int8")
    assert relative_rms(int8["x"], exact["x"]) < 1.5e-2


@pytest.mark.not_interpreted
def test_codes_are_read_before_the_weight_is_written(device):
    """A compiled backward pass then frees codes [M, K] before dx and W take theirs: the peak of a checkpointed step."""
    inputs = cast(W4A8.inputs(LinearCase(7, 40, 192, bias=False)), torch.float32, device)
    leaves = {name: inputs[name].requires_grad_() for name in ("x", "adapter_down", "adapter_up")}
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    compiled = torch.compile(
        lambda x: w4a8_linear(**{**inputs, "x": x * 2}), backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    compiled(leaves["x"]).sum().backward()
    ops = torch.ops.loragraft
    order = [
        node.target
        for node in graphs[-1].graph.nodes
        if node.target in (ops.adapter_gradients.default, ops.w4a8_dgrad.default)
    ]
    assert order == [ops.adapter_gradients.default, ops.w4a8_dgrad.default]


def test_unknown_modes_and_group_sizes_are_refused():
    inputs = W4A8.inputs(LinearCase(7, 40, 256))
    for wrong, message in (
        ({"save_x": "int8"}, "save_x"),
        ({"dgrad": "fp8"}, "dgrad"),
        ({"group_words": inputs["group_words"][:1]}, "group_words"),
        ({"row_scale": inputs["row_scale"][:3]}, "row_scale"),
        ({"x": inputs["x"][:, :200], "hadamard": True}, "K % 64"),
    ):
        with pytest.raises(ValueError, match=message):
            w4a8_linear(**{**inputs, **wrong})
