"""Every linear op, forward and gradient, against its float64 reference on odd shapes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from loragraft.kernels.layout import LinearCase, apply_hadamard, relative_rms
from loragraft.kernels.registry import OPS, cast

ALL = [pytest.param(op, case, id=f"{op.name}-{case}") for op in OPS for case in op.cases]
QUANTIZED = [pytest.param(op, id=op.name) for op in OPS if op.name != "w4a16"]
SMALL = LinearCase(7, 40, 192, R=16, r=4)
EACH = [pytest.param(op, id=op.name) for op in OPS]


def run(function, inputs, dy=None, **modes):
    """y, and the gradients of x and of the adapter if there is one."""
    inputs = dict(inputs)
    wrt = [name for name in ("x", "adapter_down", "adapter_up") if inputs[name] is not None]
    for name in wrt:
        inputs[name] = inputs[name].detach().clone().requires_grad_()
    y = function(**inputs, **modes)
    dy = y.new_ones(y.shape) if dy is None else dy.to(y)
    grads = torch.autograd.grad(y, [inputs[name] for name in wrt], dy)
    return {"y": y.detach(), **dict(zip(wrt, grads, strict=True))}


def oracle(op, inputs, dy):
    in_float64 = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }
    return run(op.reference, in_float64, dy)


def gradient_of(case, device, seed=1):
    return torch.randn(case.M, case.N, generator=torch.Generator().manual_seed(seed)).to(device)


def raw(op):
    """The modes under which the op promises the gradient of its reference."""
    return {} if op.name == "w4a16" else {"save_x": "raw", "dgrad": "dequantized"}


@pytest.mark.parametrize(("op", "case"), ALL)
@pytest.mark.usefixtures("poison")
def test_forward_and_gradients_match_float64(op, case, device, dtype, tolerance):
    inputs = cast(op.inputs(case), dtype, device)
    dy = gradient_of(case, device).to(dtype)
    actual, expected = run(op.apply, inputs, dy, **raw(op)), oracle(op, inputs, dy)
    for name, value in expected.items():
        assert actual[name].dtype == dtype
        assert relative_rms(actual[name], value) < tolerance, name


@pytest.mark.not_interpreted
@pytest.mark.parametrize("op", EACH)
@pytest.mark.usefixtures("poison")
def test_sixteen_thousand_tokens_less_one(op, device, dtype, tolerance):
    """A picture of 2048 px: rows that no tile divides, beyond every tuned shape."""
    case = LinearCase(16383, 136, 192)
    inputs = cast(op.inputs(case), dtype, device)
    dy = gradient_of(case, device).to(dtype)
    actual, expected = run(op.apply, inputs, dy, **raw(op)), oracle(op, inputs, dy)
    for name, value in expected.items():
        assert relative_rms(actual[name], value) < tolerance, name


@pytest.mark.parametrize("op", EACH)
def test_rank_three_x_and_strided_x(op, device):
    inputs = cast(op.inputs(LinearCase(12, 40, 192)), torch.float32, device)
    flat = run(op.apply, inputs)
    batched = run(op.apply, {**inputs, "x": inputs["x"].view(3, 4, 192)})
    strided = run(op.apply, {**inputs, "x": inputs["x"].T.contiguous().T})
    assert batched["y"].shape == (3, 4, 40)
    for name, value in flat.items():
        assert torch.equal(batched[name].reshape(value.shape), value), name
        assert torch.equal(strided[name], value), name


@pytest.mark.parametrize("op", EACH)
def test_strided_and_broadcast_dy(op, device):
    inputs = cast(op.inputs(SMALL), torch.float32, device)
    dense = gradient_of(SMALL, device)
    broadcast = dense[:1].expand(SMALL.M, SMALL.N)
    for dy in (dense.T.contiguous().T, broadcast):
        strided, expected = (
            run(op.apply, inputs, dy),
            run(op.apply, inputs, dy.clone(memory_format=torch.contiguous_format)),
        )
        for name, value in expected.items():
            assert torch.equal(strided[name], value), name


@pytest.mark.parametrize("op", EACH)
def test_without_smooth_and_with_mixed_dtypes(op, device):
    """A bf16 base under a float32 x, and float32 adapters under a 16-bit x: gradients come in the dtype of their tensor."""
    inputs = cast(op.inputs(SMALL), torch.float16, device)
    inputs |= {name: inputs[name].float() for name in ("x", "adapter_down", "adapter_up")}
    if "smooth" in inputs:
        inputs["x"], inputs["smooth"] = inputs["x"] / inputs["smooth"], None
    dy = gradient_of(SMALL, device)
    actual, expected = run(op.apply, inputs, dy, **raw(op)), oracle(op, inputs, dy)
    for name, value in expected.items():
        assert actual[name].dtype == torch.float32
        assert relative_rms(actual[name], value) < 1e-5, name
    inputs["x"] = inputs["x"].half()
    actual, expected = run(op.apply, inputs, dy.half(), **raw(op)), oracle(op, inputs, dy.half())
    for name, value in expected.items():
        assert actual[name].dtype == (torch.float32 if name.startswith("adapter") else torch.float16)
        assert relative_rms(actual[name], value) < 1e-3, name


@pytest.mark.parametrize("op", QUANTIZED)
@pytest.mark.parametrize("hadamard", [False, True])
def test_saving_codes_changes_only_the_gradient_of_adapter_down(op, hadamard, device):
    case = LinearCase(77, 40, 192, hadamard=hadamard)
    inputs = cast(op.inputs(case), torch.float32, device)
    inputs["x"] = torch.randn(77, 192, generator=torch.Generator().manual_seed(2)).to(device)
    dy = gradient_of(case, device)
    exact, quantized = run(op.apply, inputs, dy, save_x="raw"), run(op.apply, inputs, dy, save_x="quantized")
    for name in ("y", "x", "adapter_up"):
        assert torch.equal(exact[name], quantized[name]), name
    assert 1e-3 < relative_rms(quantized["adapter_down"], exact["adapter_down"]) < 2e-2  # 0.6-0.9 % seen


@pytest.mark.parametrize("op", QUANTIZED)
def test_codes_on_the_grid_rebuild_x_exactly(op, device):
    """x exactly on the 8-bit grid: the rebuilt x is x, so both ways of saving it give the same gradient."""
    case = LinearCase(7, 40, 192, hadamard=True)
    inputs = cast(op.inputs(case), torch.float32, device)
    codes = torch.randint(-126, 127, (7, 192), generator=torch.Generator().manual_seed(3)).float()
    codes[:, 0] = 127
    inputs["x"] = apply_hadamard(codes / 127).to(device) * inputs["smooth"]
    dy = gradient_of(case, device)
    exact, quantized = run(op.apply, inputs, dy, save_x="raw"), run(op.apply, inputs, dy, save_x="quantized")
    assert relative_rms(quantized["adapter_down"], exact["adapter_down"]) < 1e-5


@pytest.mark.parametrize("op", EACH)
def test_frozen_inputs_get_no_gradient_and_nothing_is_kept(op, device):
    """Without a trainable adapter neither x nor its codes survive the forward pass."""
    inputs = cast(op.inputs(SMALL), torch.float32, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = inputs["x"].clone().requires_grad_()
        y = op.apply(**{**inputs, "x": x})
    weights = {value.data_ptr() for value in inputs.values() if isinstance(value, torch.Tensor)}
    assert {t.data_ptr() for t in saved} <= weights - {x.data_ptr()}
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert relative_rms(dx, oracle(op, inputs, torch.ones_like(y))["x"]) < 1e-5
    assert not op.apply(**inputs).requires_grad


@pytest.mark.parametrize("op", EACH)
def test_one_factor_of_the_adapter_may_be_frozen(op, device):
    inputs = cast(op.inputs(SMALL), torch.float32, device)
    expected = oracle(op, inputs, torch.ones(SMALL.M, SMALL.N, device=device))
    for name in ("adapter_down", "adapter_up"):
        leaf = inputs[name].clone().requires_grad_()
        (grad,) = torch.autograd.grad(op.apply(**{**inputs, name: leaf}, **raw(op)).sum(), leaf)
        assert relative_rms(grad, expected[name]) < 1e-5


@pytest.mark.parametrize("op", EACH)
def test_an_adapter_in_the_branch_is_the_same_layer(op, device):
    """Grafting: [lora_down; A], [lora_up, B] gives the same bits as the adapter beside the branch."""
    inputs = cast(op.inputs(SMALL), torch.float32, device)
    grafted = inputs | {
        "lora_down": torch.cat([inputs["lora_down"], inputs["adapter_down"]]),
        "lora_up": torch.cat([inputs["lora_up"], inputs["adapter_up"]], dim=1),
        "adapter_down": None,
        "adapter_up": None,
    }
    assert torch.equal(op.apply(**grafted), op.apply(**inputs))


@pytest.mark.parametrize("op", EACH)
def test_two_runs_give_the_same_bits(op, device, dtype):
    case = LinearCase(17, 96, 320)
    inputs = cast(op.inputs(case), dtype, device)
    dy = gradient_of(case, device)
    first, second = run(op.apply, inputs, dy), run(op.apply, inputs, dy)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("op", EACH)
def test_nan_in_one_token_stays_visible_and_in_its_token(op, device):
    inputs = cast(op.inputs(SMALL), torch.float32, device)
    inputs["x"][3, 5] = float("nan")
    finite = op.apply(**inputs).isfinite().all(dim=1)
    assert finite.tolist() == [True] * 3 + [False] + [True] * 3


@pytest.mark.not_interpreted
@pytest.mark.parametrize("op", EACH)
@pytest.mark.parametrize("rank", [0, 4])
def test_opcheck(op, rank, device):
    case = LinearCase(7, 40, 192, R=16, r=rank)
    inputs = cast(op.inputs(case), torch.float32, device)
    for name in ("x", "adapter_down", "adapter_up"):
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    x, *rest = positional(op, inputs)
    torch.library.opcheck(getattr(torch.ops.loragraft, f"{op.name}_linear").default, (x, *rest))
    dy = torch.randn(7, 40, device=device)
    weights = [v for k, v in inputs.items() if k in ("qweight", "row_scale", "group_words", "wscale", "wzero")]
    last = () if op.name == "w4a16" else (inputs.get("smooth"), False)
    name, left = ("dx", torch.randn(7, 16, device=device)) if op.name == "w4a16" else ("dgrad", inputs["lora_up"])
    gradient = getattr(torch.ops.loragraft, f"{op.name}_{name}").default
    torch.library.opcheck(gradient, (dy, left, inputs["lora_down"], *weights, *last))
    if op.name == "w4a8":  # dequantized
        torch.library.opcheck(gradient, (dy, left, inputs["lora_down"], *weights, *last, dy @ left))


def positional(op, inputs):
    names = {
        "w4a8": ("qweight", "row_scale", "group_words", "smooth"),
        "w4a4": ("qweight", "wscale", "smooth"),
        "w4a16": ("qweight", "wscale", "wzero"),
    }[op.name]
    modes = {"w4a8": (False, "quantized", "dequantized"), "w4a4": (False, "quantized"), "w4a16": ()}[op.name]
    branch = ("lora_down", "lora_up", "bias", "adapter_down", "adapter_up")
    return [inputs["x"], *(inputs[name] for name in (*names, *branch)), *modes]


@pytest.mark.not_interpreted
@pytest.mark.parametrize("op", EACH)
def test_compiles_without_a_graph_break(op, device):
    inputs = cast(op.inputs(SMALL), torch.float32, device)
    dy = gradient_of(SMALL, device)
    compiled = torch.compile(op.apply, fullgraph=True, backend="aot_eager")
    eager, actual = run(op.apply, inputs, dy), run(compiled, inputs, dy)
    for name, value in eager.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.not_interpreted
@pytest.mark.parametrize("op", EACH)
def test_fake_tensors_give_shapes_without_running(op, device):
    inputs = cast(op.inputs(SMALL), torch.bfloat16, device)
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        results = run(op.apply, fake)
    assert results["y"].shape == (SMALL.M, SMALL.N)
    assert results["x"].shape == (SMALL.M, SMALL.K)
    assert results["adapter_down"].shape == inputs["adapter_down"].shape
    assert results["adapter_up"].dtype == torch.bfloat16


@pytest.mark.not_interpreted
@pytest.mark.parametrize("op", EACH)
def test_wrong_shapes_are_named(op):
    inputs = op.inputs(SMALL)
    for name, wrong, message in (
        ("qweight", inputs["qweight"][:, :-32], "qweight"),
        ("lora_down", inputs["lora_down"][:, :-1], "lora_down"),
        ("lora_up", inputs["lora_up"][:-1], "lora_up"),
        ("bias", inputs["bias"][:-1], "bias"),
        ("adapter_up", inputs["adapter_up"][:, :-1], "adapter_down"),
        ("adapter_up", None, "come together"),
        ("x", inputs["x"][:0], "at least one token"),
        ("qweight", inputs["qweight"].T.contiguous().T, "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            op.apply(**{**inputs, name: wrong})
