"""Layers that read one x quantize it once, keep one copy of its codes, and compute what each would alone."""

import gc

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from loragraft.kernels.layout import LinearCase, relative_rms, uses_triton
from loragraft.kernels.registry import OPS, cast
from loragraft.kernels.shared_codes import _last, shared_codes
from loragraft.kernels.w4a8_linear import w4a8_linear

W4A8 = next(op for op in OPS if op.name == "w4a8")
CASE = LinearCase(33, 40, 192, R=8, r=4, hadamard=True)


def layers(device, dtype=torch.float32):
    """Three layers that differ in everything but x."""
    made = [cast(W4A8.inputs(CASE, seed), dtype, device) | {"smooth": None} for seed in range(3)]
    x = made[0].pop("x")
    for inputs in made[1:]:
        del inputs["x"]
    return x, made


def outputs_and_gradients(x, made, **modes):
    x = x.detach().clone().requires_grad_()
    leaves = [i[name].clone().requires_grad_() for i in made for name in ("adapter_down", "adapter_up")]
    pairs = zip(leaves[::2], leaves[1::2], strict=True)
    ys = [
        w4a8_linear(x, **{**i, "adapter_down": down, "adapter_up": up}, **modes)
        for i, (down, up) in zip(made, pairs, strict=True)
    ]
    loss = sum((y.float() ** 2).sum() for y in ys)
    return [y.detach() for y in ys] + list(torch.autograd.grad(loss, [x, *leaves]))


@pytest.mark.parametrize("save_x", ["quantized", "raw"])
@pytest.mark.usefixtures("poison")
def test_sharing_changes_no_result(save_x, device, dtype, tolerance):
    x, made = layers(device, dtype)
    alone = outputs_and_gradients(x, made, save_x=save_x)
    shared = outputs_and_gradients(x, made, save_x=save_x, shares_input=True)
    for one, two in zip(alone, shared, strict=True):
        if uses_triton(x):  # h is summed in another order
            assert relative_rms(two, one) < tolerance
        else:
            assert torch.equal(one, two)


def test_the_same_x_gives_the_same_codes_and_another_does_not(device):
    x = torch.randn(3, 5, 192, device=device)
    codes, scale = shared_codes(x, True)
    assert shared_codes(x, True)[0] is codes
    assert codes.shape == (15, 256)
    assert scale.shape == (15, 1)
    assert shared_codes(x, False)[0] is not codes
    equal = x.clone()
    assert shared_codes(equal, False)[0] is not shared_codes(x, False)[0]
    before = shared_codes(x, False)[0]
    x.neg_()
    after = shared_codes(x, False)[0]
    assert torch.equal(after, -before)


def test_codes_live_no_longer_than_x(device):
    x = torch.randn(7, 192, device=device)
    shared_codes(x, False)
    assert _last.codes is not None
    del x
    gc.collect()
    assert _last.codes is None


def test_smoothed_layers_quantize_for_themselves(device):
    x, made = layers(device)
    smoothed = made[0] | {"smooth": torch.rand(192, device=device) + 0.5}
    assert torch.equal(w4a8_linear(x, **smoothed, shares_input=True), w4a8_linear(x, **smoothed))


def test_one_tensor_of_codes_is_kept(device):
    x, made = layers(device)
    made = [i | {name: i[name].requires_grad_() for name in ("adapter_down", "adapter_up")} for i in made]
    for shares, copies in ((False, 3), (True, 1)):
        kept = set()

        def pack(tensor, kept=kept):
            if tensor.dtype == torch.int8:
                kept.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ys = [w4a8_linear(x, **inputs, shares_input=shares) for inputs in made]
        assert len(kept) == copies
        del ys


@pytest.mark.not_interpreted
def test_opcheck_with_codes_from_outside(device):
    x, (inputs, *_) = layers(device)
    codes, scale = shared_codes(x, True)
    for name in ("adapter_down", "adapter_up"):
        inputs[name].requires_grad_()
    names = (
        "qweight",
        "row_scale",
        "group_words",
        "smooth",
        "lora_down",
        "lora_up",
        "bias",
        "adapter_down",
        "adapter_up",
    )
    weights = [inputs[name] for name in names]
    arguments = (x.clone().requires_grad_(), *weights, True, "quantized", "dequantized", codes, scale)
    torch.library.opcheck(torch.ops.loragraft.w4a8_linear.default, arguments)


@pytest.mark.not_interpreted
def test_a_compiled_graph_quantizes_once_too(device):
    x, made = layers(device)
    counts = []

    def count(graph, inputs):
        counts.append(sum("quantize_activation" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    function = torch.compile(
        lambda x, made: [w4a8_linear(x, **inputs, shares_input=True) for inputs in made],
        fullgraph=True,
        backend=backend,
    )
    eager = [w4a8_linear(x, **inputs, shares_input=True) for inputs in made]
    trained = [i | {name: i[name].clone().requires_grad_() for name in ("adapter_down", "adapter_up")} for i in made]
    for one, two in zip(eager, function(x, trained), strict=True):
        assert torch.equal(one, two)
    assert counts[0] == 1
