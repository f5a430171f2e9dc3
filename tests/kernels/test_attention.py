"""The op against plain attention, on a CPU with the two libraries' places taken by stand-ins, on a GPU with the libraries."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from loragraft.kernels import attention as module
from loragraft.kernels.attention import attention, check_backend
from loragraft.kernels.layout import relative_rms

BACKENDS = ["cudnn_forward", "flash_attn_4"]
SHAPES = [(2, 21, 21, 3, 64), (1, 7, 33, 2, 128), (1, 130, 130, 2, 8)]  # B, S, T, H, D
pytestmark = pytest.mark.not_interpreted


def tensors(shape, dtype=torch.float32, device="cpu"):
    """q, k, v and the gradient of the output."""
    (B, S, T, H, D), random = shape, torch.Generator().manual_seed(1)
    sizes = ((B, S, H, D), (B, T, H, D), (B, T, H, D), (B, S, H, D))
    return [torch.randn(size, generator=random).to(device, dtype) for size in sizes]


def oracle(q, k, v, do):
    """o, dq, dk, dv of the formula in float64."""
    q, k, v = (t.double().transpose(1, 2).detach().requires_grad_() for t in (q, k, v))
    o = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v
    return [t.transpose(1, 2) for t in (o.detach(), *torch.autograd.grad(o, (q, k, v), do.double().transpose(1, 2)))]


def results(q, k, v, do, backend, function=attention):
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    o = function(*leaves, backend)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def assert_close(actual, expected, tolerance):
    for name, one, two in zip(("o", "dq", "dk", "dv"), actual, expected, strict=True):
        assert one.shape == two.shape, name
        assert one.is_contiguous(), name
        assert relative_rms(one, two) < tolerance, name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients_match_float64(backend, shape):
    inputs = tensors(shape)
    assert_close(results(*inputs, backend), oracle(*inputs), 2e-6)
    halves = [t.bfloat16() for t in inputs]
    assert_close(results(*halves, backend), oracle(*halves), 5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_gradients(backend):
    inputs = tensors(SHAPES[0])
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
    for one, two in zip(results(*inputs, backend), results(*strided, backend), strict=True):
        assert torch.equal(one, two)


@pytest.fixture
def stand_ins(monkeypatch):
    """The GPU path on CPU tensors: torch's CPU flash attention behind both libraries' own interfaces. Records calls."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    calls = []

    def cudnn(q, k, v, bias, wants_lse, dropout, causal, debug, *, scale):
        calls.append("cudnn")
        assert (bias, wants_lse, dropout, causal, debug) == (None, True, 0.0, False, False)
        o, lse = forward(q, k, v, 0.0, False, scale=scale)
        return o, lse.contiguous()[..., None], None, None, q.shape[2], k.shape[2], None, None, None  # [B, H, S, 1]

    def flash2(do, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, *, scale):
        calls.append("flash2")
        assert lse.shape == q.shape[:3]
        assert (max_q, max_k, dropout, causal) == (q.shape[2], k.shape[2], 0.0, False)
        assert (seed.dtype, seed.shape, offset.dtype) == (torch.uint64, (2,), torch.uint64)
        return backward(do, q, k, v, o, lse, 0.0, False, scale=scale)

    def flash4(q, k, v, *, softmax_scale, return_lse):
        calls.append("flash4 forward")
        assert return_lse
        o, lse = forward(*(t.transpose(1, 2) for t in (q, k, v)), 0.0, False, scale=softmax_scale)
        return o.transpose(1, 2).contiguous(), lse.contiguous(), None, None, None

    def flash4_backward(q, k, v, o, do, lse, softmax_scale):
        calls.append("flash4 backward")
        transposed = [t.transpose(1, 2) for t in (do, q, k, v, o)]
        grads = backward(*transposed, lse, 0.0, False, scale=softmax_scale)
        return tuple(g.transpose(1, 2).contiguous() for g in grads)

    library = ModuleType("flash_attn.cute.interface")
    library._flash_attn_fwd, library._flash_attn_bwd = flash4, flash4_backward
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", library)
    monkeypatch.setattr(module, "_on_gpu", lambda x: True)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", cudnn)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_backward", flash2)
    return calls


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize(("backend", "called"), [
    ("cudnn_forward", ["cudnn", "flash2"]), ("flash_attn_4", ["flash4 forward", "flash4 backward"]),
])  # fmt: skip
def test_each_library_gets_its_own_layout(backend, called, shape, stand_ins):
    inputs = tensors(shape)
    assert_close(results(*inputs, backend), oracle(*inputs), 2e-6)
    assert stand_ins == called


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile_without_a_graph_break(backend):
    q, k, v, do = tensors(SHAPES[1])
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(torch.ops.loragraft.attention.default, (*leaves, backend))
    o, lse = torch.ops.loragraft.attention(q, k, v, backend)
    torch.library.opcheck(torch.ops.loragraft.attention_backward.default, (do, q, k, v, o, lse, backend))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    eager = results(q, k, v, do, backend)
    for one, two in zip(eager, results(q, k, v, do, backend, compiled), strict=True):
        assert torch.equal(one, two)


def test_what_does_not_fit_is_refused(monkeypatch):
    q, k, v, _ = tensors(SHAPES[0])
    for wrong, message in (
        ((q, k, v, "flash_attn_9"), "must be one of cudnn_forward, flash_attn_4"),
        ((q, k, v[:, 1:], "cudnn_forward"), r"must be \[B, S, H, D\]"),
        ((q[..., :60], k[..., :60], v[..., :60], "cudnn_forward"), "D a multiple of 8"),
        ((q.half(), k, v, "cudnn_forward"), "must be all bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*wrong)
    with pytest.raises(ValueError, match=r"needs a CUDA GPU, this run is on cpu: set train\.attention=sdpa"):
        check_backend("cudnn_forward", torch.device("cpu"))
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(
        get_device_capability=lambda d: (8, 6), get_device_name=lambda d: "RTX 3090"
    ))  # fmt: skip
    check_backend("cudnn_forward", torch.device("cuda"))
    with pytest.raises(ValueError, match=r"needs compute capability 9\.0, RTX 3090 has 8\.6"):
        check_backend("flash_attn_4", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", None)
    with pytest.raises(ValueError, match=r"needs flash-attn-4 .*loragraft\[flash-attn-4\]"):
        check_backend("flash_attn_4", torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES[:2], (1, 1100, 1100, 4, 128)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_gpu(backend, shape):
    if backend == "flash_attn_4":
        pytest.importorskip("flash_attn.cute.interface", reason="flash-attn-4, an optional extra, is not installed")
    check_backend(backend, torch.device("cuda"))
    inputs = tensors(shape, torch.bfloat16, "cuda")
    expected = oracle(*inputs)
    assert_close(results(*inputs, backend), expected, 1e-2)
    compiled = torch.compile(attention, fullgraph=True)
    assert_close(results(*inputs, backend, compiled), expected, 1e-2)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
    assert_close(results(*heads_first, backend), expected, 1e-2)
