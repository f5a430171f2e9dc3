"""Compiled forward passes: equal calls become one, and layers that read one x are computed together, to the same result."""

from functools import partial

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.fx.experimental.proxy_tensor import make_fx

from loragraft.adapters.inject import inject_adapter
from loragraft.backbones.architectures import FLUX
from loragraft.backbones.compiled import EqualCalls, compile_blocks, group_layers
from loragraft.backbones.flow import predict_velocity
from loragraft.backbones.skeleton import meta_transformer, plan_architecture, randomize
from loragraft.kernels.layout import relative_rms
from loragraft.kernels.w4a8_group import MOST
from loragraft.quantization.linear import SVDQuantLinear, join_group
from loragraft.quantization.settings import QuantSettings
from loragraft.recipes.schema import AdapterConfig
from loragraft.train.memory import set_checkpointing

CPU = torch.device("cpu")
TINY = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 4,
    "joint_attention_dim": 64, "pooled_projection_dim": 32, "guidance_embeds": False, "axes_dims_rope": [8, 12, 12],
}  # fmt: skip


def tiny_flux(
    device: torch.device, dtype: torch.dtype = torch.float32, double: int = 1, single: int = 2
) -> torch.nn.Module:
    settings = QuantSettings(numerics="w4a8", rank=8, smoothing="hadamard")
    config = {**TINY, "num_layers": double, "num_single_layers": single}
    model = meta_transformer(FluxTransformer2DModel, config, partial(plan_architecture, FLUX, settings))
    return randomize(model, device, dtype).eval().requires_grad_(False)


def velocity_of(
    model: torch.nn.Module, device: torch.device, dtype: torch.dtype, size: tuple[int, int] = (8, 8)
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shapes = {"latents": (1, 4, *size), "prompt_embeds": (1, 5, 64), "pooled_prompt_embeds": (1, 32)}
    made = {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}
    latents = made.pop("latents")
    return predict_velocity(model, latents, torch.tensor([0.5], device=device), made)


def test_of_equal_calls_the_first_is_kept():
    def several(x):
        return [x.sin().cos(), x.sin() + 1, x.sin().cos(), torch.rand_like(x), torch.rand_like(x)]

    traced = make_fx(several)(torch.ones(3))
    EqualCalls()(traced.graph)
    traced.recompile()
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.aten.sin.default) == 1
    assert called.count(torch.ops.aten.cos.default) == 1
    assert called.count(torch.ops.aten.rand_like.default) == 2
    made = traced(torch.ones(3))
    assert made[0] is made[2]
    assert torch.equal(made[1], torch.ones(3).sin() + 1)


def test_a_graph_with_gradients_is_left_alone():
    graph = torch.fx.Graph()
    x, _ = graph.placeholder("primals_1"), graph.placeholder("tangents_1")
    sines = [graph.call_function(torch.ops.aten.sin.default, (x,)) for _ in range(2)]
    graph.output(sines)
    EqualCalls()(graph)
    assert len([node for node in graph.nodes if node.op == "call_function"]) == 2


def test_the_layers_of_a_block_that_read_one_x_are_joined():
    block = tiny_flux(CPU).single_transformer_blocks[0]
    group_layers(block)
    layers = block.attn.to_k.group
    assert [layer.place for layer in layers] == [0, 1, 2, 3]
    assert layers == (block.proj_mlp, block.attn.to_q, block.attn.to_k, block.attn.to_v)
    assert block.proj_out.group == ()


def test_layers_that_differ_are_not_joined():
    block = tiny_flux(CPU).transformer_blocks[0]
    q, k = block.attn.to_q, block.attn.to_k
    assert join_group([q, k])
    assert not join_group([q, block.ff.net[2]])
    assert not join_group([q] * (MOST + 1))
    other = SVDQuantLinear.empty(128, 64, "w4a8", rank=8, bias=True)
    assert not join_group([q, other])


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What is traced from here on; it is differentiated ahead of time and run op by op."""
    made: list[torch.fx.GraphModule] = []
    compiled, run = torch.compile, torch._dynamo.lookup_backend("aot_eager")

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        made.append(graph)
        return run(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled(function, backend=backend, **how))
    return made


def test_blocks_of_one_kind_share_compiled_code(graphs):
    model = tiny_flux(CPU, single=4)
    with torch.no_grad():
        before = velocity_of(model, CPU, torch.float32)
        assert compile_blocks(model) == 5
        # Not equal bits: some libraries of some processors sum products of other strides in another order.
        torch.testing.assert_close(velocity_of(model, CPU, torch.float32), before, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 2  # double and single
    called = [node.target for graph in graphs for node in graph.graph.nodes]
    assert called.count(torch.ops.loragraft.w4a8_group.default) == 10  # every layer asks; equal calls become one later


@pytest.mark.parametrize("policy", ["none", "gelu"])
def test_in_training_too(graphs, policy):
    """The first double block's input needs no gradient of its own, the first single block's is two tensors."""
    model = tiny_flux(CPU, double=2)
    parameters = inject_adapter(model, AdapterConfig(rank=4, alpha=4), FLUX.quantize)
    with torch.no_grad():
        for up in parameters[1::2]:
            up.copy_(torch.linspace(-0.1, 0.1, up.numel()).view_as(up))
    set_checkpointing(model, policy)

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(velocity_of(model, CPU, torch.float32).square().mean(), parameters))

    before = gradients()
    compile_blocks(model)
    compile_blocks(model)  # the second time changes nothing
    after = gradients()
    assert len(graphs) == 2
    assert max(relative_rms(a, b) for a, b in zip(after, before, strict=True)) < 1e-5


def test_gradients_of_single_blocks_meet_inside_the_compiled_code(graphs):
    """Text and image are no slices of one tensor: autograd would put their gradients together block by block, outside."""
    model = tiny_flux(CPU)
    inject_adapter(model, AdapterConfig(rank=4, alpha=4), FLUX.quantize)
    made: list[tuple[torch.Tensor, ...]] = []
    compile_blocks(model)
    for block in model.single_transformer_blocks:
        block.register_forward_hook(lambda _block, _args, output: made.append(output))
    velocity_of(model, CPU, torch.float32)
    assert len(graphs) == 2
    assert {type(x.grad_fn).__name__ for output in made for x in output} == {"CompiledFunctionBackward"}
    assert all(text._base is None and image._base is None for text, image in made)
    made.clear()
    with torch.no_grad():
        velocity_of(model, CPU, torch.float32)
    assert all(text.data_ptr() < image.data_ptr() and text.storage_offset() == 0 for text, image in made)
    assert all(text.untyped_storage().data_ptr() == image.untyped_storage().data_ptr() for text, image in made), (
        "a copy"
    )


def test_many_sizes_are_compiled_twice(graphs):
    """Once for the first size, once for all others; two sizes each for itself."""
    counts = {}
    for shapes in (4, 2):
        torch._dynamo.reset()
        model = tiny_flux(CPU)
        assert compile_blocks(model, shapes) == 3
        graphs.clear()
        counts[shapes] = []
        with torch.no_grad():
            for size in ((8, 8), (8, 12), (10, 12), (4, 16), (6, 14))[: shapes + 1]:
                velocity_of(model, CPU, torch.float32, size)
                counts[shapes].append(len(graphs))
    assert counts == {4: [2, 4, 4, 4, 4], 2: [2, 4, 6]}


@pytest.mark.gpu
def test_a_compiled_model_computes_what_it_did_before():
    device = torch.device("cuda")
    model = tiny_flux(device, torch.bfloat16)
    with torch.no_grad():
        before = velocity_of(model, device, torch.bfloat16)
        assert compile_blocks(model) == 3
        after = velocity_of(model, device, torch.bfloat16)
    assert (after.float() - before.float()).norm() < 0.02 * before.float().norm()
