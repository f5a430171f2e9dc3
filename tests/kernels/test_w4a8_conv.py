"""The native convolution, forward and gradient, against its float64 reference on odd windows and channels."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from loragraft.kernels.layout import relative_rms
from loragraft.kernels.registry import CONV_CASES, ConvCase, cast
from loragraft.kernels.w4a8_conv import (
    as_columns,
    as_kernel,
    as_pixels,
    dequantize_conv,
    w4a8_conv,
    w4a8_conv_reference,
)
from loragraft.kernels.w4a8_linear import w4a8_linear

SMALL = ConvCase(1, 64, 4, 5, 24)
ALL = [pytest.param(case, id=str(case)) for case in CONV_CASES]


def run(function, inputs, dy, **modes):
    """y, and the gradients of x and of the adapter if there is one."""
    inputs = dict(inputs)
    wrt = [name for name in ("x", "adapter_down", "adapter_up") if inputs[name] is not None]
    for name in wrt:
        inputs[name] = inputs[name].detach().clone().requires_grad_()
    y = function(**inputs, **modes)
    grads = torch.autograd.grad(y, [inputs[name] for name in wrt], dy.to(y))
    return {"y": y.detach(), **dict(zip(wrt, grads, strict=True))}


def gradient_of(inputs, case, seed=1):
    shape = w4a8_conv_reference(**inputs, **case.options).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(inputs["x"].device)


def oracle(inputs, case, dy):
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return run(w4a8_conv_reference, wide, dy.double(), **case.options)


@pytest.mark.parametrize("case", ALL)
@pytest.mark.usefixtures("poison")
def test_forward_and_gradients_match_float64(case, device, dtype, tolerance):
    inputs = cast(case.inputs(), dtype, device)
    dy = gradient_of(inputs, case).to(dtype)
    actual, expected = run(w4a8_conv, inputs, dy, **case.options, save_x="raw"), oracle(inputs, case, dy)
    for name, value in expected.items():
        assert actual[name].dtype == dtype
        assert actual[name].shape == value.shape
        assert relative_rms(actual[name], value) < tolerance, name


def test_one_by_one_is_the_linear_layer(device):
    """On pixels, to the float32 rounding of another order of sums."""
    case = ConvCase(2, 128, 3, 4, 40, kernel=1, padding=0)
    inputs = cast(case.inputs(), torch.float32, device)
    y = w4a8_conv(**inputs, **case.options)
    linear = w4a8_linear(**{**inputs, "x": as_pixels(inputs["x"])}, hadamard=False)
    assert relative_rms(as_pixels(y), linear) < 1e-6


def test_the_same_as_cudnns_convolution_of_the_dequantized_weight(device):
    """A wide image on the grid: y is conv2d(x, W) + conv1x1(conv2d(x, D), U) with W as it stands for, nothing else."""
    inputs = cast(SMALL.inputs(), torch.float64, device)
    inputs |= {"smooth": None, "adapter_down": None, "adapter_up": None}
    codes = torch.randint(-126, 127, inputs["x"].shape, generator=torch.Generator().manual_seed(3)).double()
    codes[:, 0] = 127
    inputs["x"] = (codes / 127).to(device)
    dense = dequantize_conv(inputs["qweight"], inputs["row_scale"], inputs["group_words"], 64, 9, torch.float64)
    weight = as_kernel(dense + inputs["lora_up"] @ inputs["lora_down"], 3)
    expected = torch.nn.functional.conv2d(inputs["x"], weight, inputs["bias"], 1, 1)
    y = w4a8_conv(**cast(inputs, torch.float32, device), **SMALL.options)
    assert relative_rms(y, expected) < 1e-5


def test_columns_and_kernels_are_inverse():
    weight = torch.randn(5, 7, 3, 3)
    assert torch.equal(as_kernel(as_columns(weight), 3), weight)
    assert as_columns(weight)[2, 4 * 7 + 6] == weight[2, 6, 1, 1]  # the middle tap's last channel


@pytest.mark.parametrize("hadamard", [False, True])
def test_saving_codes_changes_only_the_gradient_of_adapter_down(hadamard, device):
    case = ConvCase(2, 64, 6, 7, 24, hadamard=hadamard)
    inputs = cast(case.inputs(), torch.float32, device)
    inputs["x"] = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(2)).to(device)
    dy = gradient_of(inputs, case)
    exact, quantized = (run(w4a8_conv, inputs, dy, **case.options, save_x=mode) for mode in ("raw", "quantized"))
    for name in ("y", "x", "adapter_up"):
        assert torch.equal(exact[name], quantized[name]), name
    assert 1e-3 < relative_rms(quantized["adapter_down"], exact["adapter_down"]) < 2e-2


def test_layouts_of_x_and_dy_do_not_matter(device):
    inputs = cast(SMALL.inputs(), torch.float32, device)
    dy = gradient_of(inputs, SMALL)
    plain = run(w4a8_conv, {**inputs, "x": inputs["x"].contiguous()}, dy.contiguous(), **SMALL.options)
    last = {**inputs, "x": inputs["x"].contiguous(memory_format=torch.channels_last)}
    other = run(w4a8_conv, last, dy.contiguous(memory_format=torch.channels_last), **SMALL.options)
    assert plain["y"].is_contiguous(memory_format=torch.channels_last)
    for name, value in plain.items():
        assert torch.equal(other[name], value), name


def test_an_adapter_in_the_branch_is_the_same_layer(device):
    inputs = cast(SMALL.inputs(), torch.float32, device)
    grafted = inputs | {
        "lora_down": torch.cat([inputs["lora_down"], inputs["adapter_down"]]),
        "lora_up": torch.cat([inputs["lora_up"], inputs["adapter_up"]], dim=1),
        "adapter_down": None,
        "adapter_up": None,
    }
    assert torch.equal(w4a8_conv(**grafted, **SMALL.options), w4a8_conv(**inputs, **SMALL.options))


def test_nan_in_one_pixel_stays_in_its_blocks(device):
    """Two blocks of 8 x 16 outputs side by side; a pixel that only the left one reads."""
    inputs = cast(ConvCase(1, 64, 8, 32, 16).inputs(), torch.float32, device)
    inputs |= {"x": inputs["x"].repeat(1, 1, 1, 4)}  # 128 columns are blocks of 64
    inputs["x"][0, 5, 3, 2] = float("nan")
    finite = w4a8_conv(**inputs, **SMALL.options).isfinite().all(dim=1)[0]
    assert not finite[:, :64].any()
    assert finite[:, 64:].all()


def test_frozen_inputs_get_no_gradient_and_nothing_is_kept(device):
    inputs = cast(SMALL.inputs(), torch.float32, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = inputs["x"].clone().requires_grad_()
        y = w4a8_conv(**{**inputs, "x": x}, **SMALL.options)
    weights = {value.data_ptr() for value in inputs.values() if isinstance(value, torch.Tensor)}
    assert {t.data_ptr() for t in saved} <= weights - {x.data_ptr()}
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert relative_rms(dx, oracle(inputs, SMALL, torch.ones_like(y))["x"]) < 1e-5
    assert not w4a8_conv(**inputs, **SMALL.options).requires_grad


def test_two_runs_give_the_same_bits(device, dtype):
    inputs = cast(SMALL.inputs(), dtype, device)
    dy = gradient_of(inputs, SMALL).to(dtype)
    first, second = (run(w4a8_conv, inputs, dy, **SMALL.options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("rank", [0, 4])
def test_opcheck(rank, device):
    case = ConvCase(1, 48, 5, 4, 24, stride=2, r=rank)
    inputs = cast(case.inputs(), torch.float32, device)
    for name in ("x", "adapter_down", "adapter_up"):
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    window = [1, 5, 4, 3, 2, 1]
    weights = [inputs[name] for name in ("qweight", "row_scale", "group_words", "smooth")]
    rest = [inputs[name] for name in ("lora_down", "lora_up", "bias", "adapter_down", "adapter_up")]
    x_MC = as_pixels(inputs["x"]).detach().requires_grad_()
    torch.library.opcheck(torch.ops.loragraft.w4a8_conv.default, (x_MC, *weights, *rest, window, False, "quantized"))
    dy = torch.randn(6, 24, device=device)
    torch.library.opcheck(
        torch.ops.loragraft.w4a8_conv_dgrad.default,
        (dy, inputs["lora_up"], inputs["lora_down"], *weights, window, False),
    )
    h, up = torch.randn(6, 4, device=device), torch.randn(24, 4, device=device)
    arguments = (dy, h, x_MC.detach(), None, inputs["smooth"], up, window, False, 48)
    torch.library.opcheck(torch.ops.loragraft.conv_adapter_gradients.default, arguments)


@pytest.mark.not_interpreted
def test_compiles_without_a_graph_break(device):
    inputs = cast(SMALL.inputs(), torch.float32, device)
    dy = gradient_of(inputs, SMALL)
    compiled = torch.compile(w4a8_conv, fullgraph=True, backend="aot_eager")
    eager, actual = (run(function, inputs, dy, **SMALL.options) for function in (w4a8_conv, compiled))
    for name, value in eager.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.not_interpreted
def test_fake_tensors_give_shapes_without_running(device):
    case = ConvCase(2, 64, 7, 8, 24, stride=2)
    inputs = cast(case.inputs(), torch.bfloat16, device)
    dy = gradient_of(inputs, case)
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        results = run(w4a8_conv, fake, mode.from_tensor(dy), **case.options)
    assert results["y"].shape == (2, 24, 4, 4)
    assert all(results[name].shape == inputs[name].shape for name in ("x", "adapter_down", "adapter_up"))


@pytest.mark.not_interpreted
def test_what_does_not_fit_is_named():
    inputs = SMALL.inputs()
    for wrong, message in (
        ({"x": inputs["x"][0]}, r"must be \[B, C, H, W\]"),
        ({"x": inputs["x"][:0]}, "at least one pixel"),
        ({"x": inputs["x"].repeat(1, 2, 1, 1)}, "qweight is .* C = 128"),
        ({"qweight": inputs["qweight"].T.contiguous().T}, "contiguous"),
        ({"group_words": inputs["group_words"].to(torch.int64)}, "group_words"),
        ({"smooth": inputs["smooth"][:3]}, "smooth"),
        ({"lora_down": inputs["lora_down"][:, 1:]}, "lora_down"),
        ({"adapter_up": None}, "come together"),
        ({"adapter_up": inputs["adapter_up"][1:]}, "adapter_up"),
        ({"kernel": 9}, "leave no output"),
        ({"save_x": "int8"}, "save_x"),
    ):
        with pytest.raises(ValueError, match=message):
            w4a8_conv(**{**inputs, **SMALL.options, **wrong})
    odd = ConvCase(1, 48, 4, 4, 8)
    with pytest.raises(ValueError, match="C % 64"):
        w4a8_conv(**odd.inputs(), **{**odd.options, "hadamard": True})
