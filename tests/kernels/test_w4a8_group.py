"""Several layers on one x, computed in one op: what each computes alone."""

import pytest
import torch

from loragraft.kernels.layout import LinearCase, relative_rms
from loragraft.kernels.registry import OPS, cast
from loragraft.kernels.w4a8_group import w4a8_group
from loragraft.kernels.w4a8_linear import w4a8_linear, w4a8_reference

W4A8 = next(op for op in OPS if op.name == "w4a8")
CASES = (
    LinearCase(33, 40, 192, R=8, r=0),
    LinearCase(33, 136, 192, R=20, r=0, bias=False),
    LinearCase(33, 64, 192, R=8, r=0),
)
NAMES = ("qweight", "row_scale", "group_words", "lora_down", "lora_up", "bias")


def made(hadamard, device, dtype):
    """x, and layers of three widths and two ranks."""
    inputs = [cast(W4A8.inputs(case, seed), dtype, device) for seed, case in enumerate(CASES)]
    return inputs[0]["x"], [{name: i[name] for name in NAMES} for i in inputs]


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.usefixtures("poison")
def test_a_group_computes_what_its_layers_compute(hadamard, device, dtype, tolerance):
    x, layers = made(hadamard, device, dtype)
    ys = w4a8_group(x, *([layer[name] for layer in layers] for name in NAMES), hadamard=hadamard)
    for layer, y in zip(layers, ys, strict=True):
        alone = w4a8_linear(x, smooth=None, hadamard=hadamard, **layer)
        assert y.shape == alone.shape
        assert relative_rms(y, alone) < tolerance
        wide = {name: None if t is None else t.double() if t.is_floating_point() else t for name, t in layer.items()}
        assert relative_rms(y, w4a8_reference(x.double(), smooth=None, hadamard=hadamard, **wide)) < max(
            tolerance, 2e-2
        )


def test_the_op_is_what_it_says_to_the_compiler(device, dtype):
    x, layers = made(True, device, dtype)
    arguments = (x.reshape(-1, x.shape[-1]), *([layer[name] for layer in layers] for name in NAMES), True)
    torch.library.opcheck(
        torch.ops.loragraft.w4a8_group.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.not_interpreted
def test_compiles_without_a_graph_break(device):
    x, layers = made(True, device, torch.float32)
    arguments = [[layer[name] for layer in layers] for name in NAMES]
    compiled = torch.compile(w4a8_group, fullgraph=True, backend="aot_eager")
    eager, actual = (run(x, *arguments, hadamard=True) for run in (w4a8_group, compiled))
    assert all(torch.equal(one, other) for one, other in zip(eager, actual, strict=True))


def test_more_layers_than_streams_are_refused():
    with pytest.raises(ValueError, match="at most 4"):
        w4a8_group(torch.ones(1, 64), *[[torch.ones(1)] * 5 for _ in range(6)], hadamard=False)
