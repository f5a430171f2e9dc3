"""Pictures on a GPU: from CUDA graphs the same pixels as launched kernel by kernel, whatever adapters come and go; compiled, nearly."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.graft import graft, set_weight, ungraft
from loragraft.adapters.switching import AdapterSwitch
from loragraft.backbones.compiled import compile_to_draw
from loragraft.backbones.load import load_backbone
from loragraft.backbones.replay import Replay
from loragraft.backbones.sampler import generate_images
from loragraft.backbones.spec import Backbone
from loragraft.evaluation.generate import Settings, render
from loragraft.quantization.checkpoint import quantized_layers

CUDA = torch.device("cuda")
KINDS = [(resolution, guidance) for resolution in (128, 64) for guidance in (1.0, 3.0)]
STEPS = 4


class Eager(Replay):
    """No graph."""

    def allowed(self, model: nn.Module) -> bool:
        return False


class Counting(Replay):
    """Counts captures."""

    captures = 0

    def capture(self, run: Callable[[], object]) -> tuple[Callable[[], None], object]:
        self.captures += 1
        return super().capture(run)


@pytest.fixture
def backbone(tmp_path: Path) -> Iterator[Backbone]:
    made = load_backbone("pocket", "native", CUDA, tmp_path)
    made.replay = Counting(most=64)
    yield made
    made.replay.clear()
    torch._dynamo.reset()


def make_adapter(backbone: Backbone, name: str, seed: int) -> Adapter:
    random, pairs = torch.Generator().manual_seed(seed), {}
    for path, layer in quantized_layers(backbone.transformer).items():
        down = torch.randn(8, layer.in_features, generator=random) / layer.in_features**0.5
        pairs[path] = down, 0.2 * torch.randn(layer.out_features, 8, generator=random) / 8**0.5
    return Adapter(name, {"base": "pocket", "base_id": backbone.base_id}, pairs)


def pictures(backbone: Backbone, replay: Replay, kinds: list[tuple[int, float]] = KINDS) -> list[np.ndarray]:
    """Of each kind two prompts at once, and a third alone."""
    kept, backbone.replay, found = backbone.replay, replay, []
    for resolution, guidance in kinds:
        backbone.resolution = resolution
        prompts = ["a red star", "a blue house", "a green cup"]
        images = generate_images(backbone, prompts, [1, 2, 3], steps=STEPS, guidance=guidance, batch_size=2)
        found.append(np.stack([np.asarray(image, dtype=np.int16) for image in images]))
    backbone.replay = kept
    return found


def same(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.gpu
def test_captured_pictures_are_the_eager_ones_through_every_change_of_adapters(backbone: Backbone) -> None:
    model, switch = backbone.transformer, AdapterSwitch(backbone.transformer)
    a, b = make_adapter(backbone, "a", 0), make_adapter(backbone, "b", 1)
    replay = backbone.replay
    assert isinstance(replay, Counting)
    bare = pictures(backbone, Eager())
    assert same(pictures(backbone, Eager()), bare), "the kernels themselves give the same bits twice"
    seen = [bare]
    for what, change, captures in (
        ("the base", lambda: None, 4),  # 2 resolutions, 2 batches; guidance is another call of the same kind
        ("grafted", lambda: graft(model, a), 4),
        (
            "grafted at another weight",
            lambda: set_weight(model, "a", 0.5),
            None,
        ),  # new tensors: new graphs, or old places
        ("ungrafted", lambda: ungraft(model, "a"), 0),
        ("resident", lambda: switch.use([(a, 1.0)]), 4),
        ("switched", lambda: switch.use([(b, 1.0)]), 0),
        ("at another weight", lambda: switch.use([(b, 0.3)]), 0),
        ("both", lambda: switch.use([(a, 0.5), (b, 0.5)]), 0),
        ("at rest", lambda: switch.use([]), 0),
        ("removed", switch.clear, 0),
    ):
        change()
        before = replay.captures
        captured, eager = pictures(backbone, replay), pictures(backbone, Eager())
        assert same(captured, eager), what
        if captures is not None:
            assert replay.captures - before == captures, what
        seen.append(eager)
    for number in (4, 9, 10):
        assert same(seen[number], bare)
    moved = [np.abs(seen[number][0] - bare[0]).mean() for number in (2, 3, 5, 6, 7, 8)]
    assert min(moved) > 0.5, moved


@pytest.mark.gpu
def test_compiled_pictures_are_close(backbone: Backbone) -> None:
    """With and without an adapter, which moves them as far as it moves the eager ones. One block of each class: each kind of
    block and each rank takes seconds to compile."""
    model, kinds = backbone.transformer, [(128, 3.0)]
    model.transformer_blocks, model.single_transformer_blocks = (
        model.transformer_blocks[:1],
        model.single_transformer_blocks[:1],
    )
    adapter = make_adapter(backbone, "a", 0)
    (bare,) = pictures(backbone, Eager(), kinds)
    with_adapter = AdapterSwitch(model)
    with_adapter.use([(adapter, 1.0)])
    (moved,) = pictures(backbone, Eager(), kinds)
    guided = backbone.spec.guided(3.0)
    assert compile_to_draw(backbone, 1, STEPS, guided, True)
    assert not compile_to_draw(backbone, 10**9, STEPS, guided), "a small model is not compiled unless asked"
    (compiled,) = pictures(backbone, backbone.replay, kinds)
    far = np.abs(moved - bare).mean()
    assert np.abs(compiled - moved).mean() < 0.2 * far
    with_adapter.use([])
    (compiled_bare,) = pictures(backbone, backbone.replay, kinds)
    assert np.abs(compiled_bare - bare).mean() < 0.2 * far
    with_adapter.clear()


@pytest.mark.gpu
def test_graphs_give_their_memory_back(backbone: Backbone) -> None:
    """All but the workspace that cuBLAS keeps for the stream of captures, which the first graphs leave."""
    left = []
    for _ in range(3):
        pictures(backbone, backbone.replay)
        assert backbone.replay.graphs > 0
        gc.collect()
        held = torch.cuda.memory_allocated()
        backbone.replay.clear()
        gc.collect()
        left.append(torch.cuda.memory_allocated())
        assert left[-1] < held
    assert max(left) <= left[0] + 2**20


@pytest.mark.gpu
def test_graphs_that_make_way_for_each_other(backbone: Backbone) -> None:
    """Room for one: each new kind of call sends the only graph away, and its pool of memory with it."""
    replay = Counting(most=1)
    for _ in range(2):
        assert same(pictures(backbone, replay), pictures(backbone, Eager()))
    assert replay.graphs == 1
    assert replay.captures > 4
    replay.clear()


@pytest.mark.gpu
def test_render_leaves_the_base(backbone: Backbone) -> None:
    settings = [Settings(prompt="a red star", seed=1, steps=STEPS)]
    fingerprint, adapter = backbone.fingerprint(), make_adapter(backbone, "a", 0)
    (bare,) = render(backbone, [], settings)
    (moved,) = render(backbone, [(adapter, 1.0)], settings)
    (again,) = render(backbone, [], settings)
    assert backbone.fingerprint() == fingerprint
    assert bare.tobytes() == again.tobytes() != moved.tobytes()


def test_compiling_is_for_a_gpu(tmp_path: Path) -> None:
    backbone = load_backbone("pocket", "native", "cpu", tmp_path)
    guided = backbone.spec.guided(3.0)
    assert not compile_to_draw(backbone, 10**9, STEPS, guided)
    assert not compile_to_draw(backbone, 10**9, STEPS, guided, False)
    with pytest.raises(ValueError, match="--compile needs a CUDA GPU"):
        compile_to_draw(backbone, 1, STEPS, guided, True)
