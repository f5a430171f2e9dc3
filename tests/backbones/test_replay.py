"""Passes that are replayed: what makes another graph and what keeps one, how many there are, and the same pictures on a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loragraft.backbones.flow import predict_velocity
from loragraft.backbones.load import load_backbone
from loragraft.backbones.replay import Replay
from loragraft.backbones.sampler import generate_images
from loragraft.recipes.schema import WeightsConfig


class NothingRead(TorchDispatchMode):
    """What a graph cannot hold: a value that Python reads."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = {
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        }
        assert func not in read, f"{func} in a captured pass"
        return func(*args, **(kwargs or {}))


class Fake(Replay):
    """Graphs of a CPU: a replay runs the pass again on the captured inputs, and writes where the capture wrote."""

    def __init__(self, most: int = 8, *, room: bool = True) -> None:
        super().__init__(most)
        self.room, self.captures, self.replays = room, 0, 0

    def allowed(self, model: nn.Module) -> bool:
        return self.room

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captures += 1
        with NothingRead():
            output = run()

        def replay() -> None:
            self.replays += 1
            output[0].copy_(run()[0])

        return replay, output


class Toy(nn.Module):
    """y = (x + t) W^T c + shift"""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.linear = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, c: float = 1.0, extra: dict[str, Tensor] | None = None) -> tuple[Tensor]:
        self.calls += 1
        return (self.linear(x + t) * c + (extra or {}).get("shift", torch.zeros(())),)


@pytest.fixture
def toy() -> Toy:
    return Toy()


def inputs(rows: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator), torch.rand((), generator=generator)


@torch.no_grad()
def draw(replay: Replay, model: nn.Module, times: int = 3, rows: int = 2, **more: Any) -> list[Tensor]:
    with replay.drawing(model):
        return [model(*inputs(rows, seed), **more)[0] for seed in range(times)]


@torch.no_grad()
def plainly(model: nn.Module, times: int = 3, rows: int = 2, **more: Any) -> list[Tensor]:
    return [model(*inputs(rows, seed), **more)[0] for seed in range(times)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_second_call_is_captured_and_each_has_a_result_of_its_own(toy: Toy) -> None:
    replay, wanted = Fake(), plainly(toy, 5)
    toy.calls = 0
    assert same(draw(replay, toy, 5), wanted)
    assert (replay.captures, replay.replays, replay.graphs) == (1, 4, 1)
    assert "forward" not in vars(toy)
    draw(replay, toy, 2)
    assert (replay.captures, replay.replays) == (1, 6), "graphs outlast a picture"


def test_one_call_is_not_captured(toy: Toy) -> None:
    replay = Fake()
    draw(replay, toy, 1)
    assert replay.graphs == replay.captures == 0


@pytest.mark.parametrize(
    "other",
    [{"rows": 3}, {"c": 2.0}, {"extra": {"shift": torch.ones(4)}}, {"extra": {"shift": torch.ones(2, 4)}}],
    ids=["batch", "number", "structure", "shape"],
)
def test_another_kind_of_call_is_another_graph(toy: Toy, other: dict[str, Any]) -> None:
    replay = Fake()
    for how in ({}, other, {}, other):
        assert same(draw(replay, toy, 2, **how), plainly(toy, 2, **how))
    assert (replay.captures, replay.graphs) == (2, 2)


def test_other_values_in_the_same_place_keep_the_graph_and_count(toy: Toy) -> None:
    replay = Fake()
    before = draw(replay, toy)
    toy.linear.weight.mul_(2)
    after = draw(replay, toy)
    assert same(after, plainly(toy))
    assert not same(after, before)
    assert replay.captures == 1


def test_tensors_that_lie_elsewhere_make_another_graph_until_they_are_back(toy: Toy) -> None:
    replay, first = Fake(), toy.linear.weight
    before = draw(replay, toy)
    toy.linear.weight = nn.Parameter(first * 2, requires_grad=False)
    assert same(draw(replay, toy), plainly(toy))
    assert replay.captures == 2
    toy.linear.weight = first
    assert same(draw(replay, toy), before)
    assert replay.captures == 2


def test_compiling_and_another_attention_make_another_graph(toy: Toy) -> None:
    replay = Fake()
    draw(replay, toy)
    toy.linear.forward = torch.compile(toy.linear.forward, backend="eager")  # as `compile_blocks` does
    draw(replay, toy)
    assert replay.captures == 2
    toy.linear.processor = type("Processor", (), {"_attention_backend": "flash"})()
    draw(replay, toy)
    assert replay.captures == 3


def test_the_graph_that_was_used_longest_ago_goes_first(toy: Toy) -> None:
    replay = Fake(most=2)
    for rows in (1, 2):
        draw(replay, toy, rows=rows)
    draw(replay, toy, rows=1)
    draw(replay, toy, rows=3)
    assert (replay.captures, replay.graphs) == (3, 2)
    draw(replay, toy, rows=1)
    assert replay.captures == 3
    draw(replay, toy, rows=2)
    assert replay.captures == 4


def test_clearing_forgets_all(toy: Toy) -> None:
    replay = Fake()
    draw(replay, toy)
    replay.clear()
    assert replay.graphs == 0
    assert same(draw(replay, toy), plainly(toy))
    assert replay.captures == 2


def test_gradients_and_what_cannot_be_compared_run_as_they_are(toy: Toy) -> None:
    replay = Fake()
    with replay.drawing(toy):
        for _ in range(3):
            toy(*inputs())
    with torch.no_grad(), replay.drawing(toy):
        for _ in range(3):
            toy(*inputs(), extra={"shift": torch.zeros(4), "unused": bytearray(b"1")})
    assert (replay.captures, toy.calls) == (0, 6)


def test_no_room_and_no_gpu_change_nothing(toy: Toy) -> None:
    for replay in (Fake(room=False), Replay()):
        assert same(draw(replay, toy), plainly(toy))
        assert replay.graphs == 0


def test_a_forward_that_was_wrapped_is_wrapped_again_afterwards(toy: Toy) -> None:
    plain = toy.forward
    toy.__dict__["forward"] = lambda *args, **kwargs: (plain(*args, **kwargs)[0] + 1,)
    wrapped, replay = toy.forward, Fake()
    assert same(draw(replay, toy), plainly(toy))
    assert toy.forward is wrapped
    with pytest.raises(RuntimeError, match="stop"), replay.drawing(toy):
        raise RuntimeError("stop")
    assert toy.forward is wrapped


def test_a_flux_transformer_is_replayed_with_other_noise_times_and_text() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
        )  # fmt: skip
    model.eval().requires_grad_(False)
    replay = Fake()

    @torch.no_grad()
    def velocity(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"latents": (1, 4, 8, 8), "prompt_embeds": (1, 5, 16), "pooled_prompt_embeds": (1, 8)}
        made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return predict_velocity(model, made.pop("latents"), torch.rand(1, generator=generator), made, guidance=3.5)

    with replay.drawing(model):
        found = [velocity(seed) for seed in range(4)]
    assert same(found, [velocity(seed) for seed in range(4)])
    assert (replay.captures, replay.replays) == (1, 3)


@pytest.mark.parametrize("name", ["flux1-dev", "sd15", "sdxl", "sana-06b", "pixart-sigma"])
def test_pictures_of_every_kind_of_base_are_the_same(
    name: str, request: pytest.FixtureRequest, unet_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Through diffusers' own pipelines, with a negative pass: one kind of call, no value read, the same pixels."""
    fixtures = {"flux1-dev": "flux_folder", "sana-06b": "sana_folder", "pixart-sigma": "pixart_folder"}
    folder = request.getfixturevalue(fixtures[name]) if name in fixtures else unet_folder(name)
    backbone = load_backbone(name, "16bit", "cpu", tmp_path, WeightsConfig(path=str(folder)))
    backbone.resolution = 64

    def drawn() -> np.ndarray:
        pictures = generate_images(backbone, ["a heart", "a star"], [0, 1], steps=3, guidance=2.0)
        return np.stack([np.asarray(picture) for picture in pictures])

    wanted = drawn()
    replay = backbone.replay = Fake()
    assert np.array_equal(drawn(), wanted)
    assert (replay.captures, replay.replays > 0) == (1, True)


def test_the_last_smaller_batch_of_pocket_is_another_kind(tmp_path: Path) -> None:
    backbone = load_backbone("pocket", "native", "cpu", tmp_path)
    backbone.resolution = 64
    how: dict[str, Any] = {"steps": 2, "guidance": 3.0, "batch_size": 2}
    wanted = generate_images(backbone, ["a", "b", "c"], [0, 1, 2], **how)
    replay = backbone.replay = Fake()
    for picture, same_picture in zip(wanted, generate_images(backbone, ["a", "b", "c"], [0, 1, 2], **how), strict=True):
        assert picture.tobytes() == same_picture.tobytes()
    assert (replay.captures, replay.replays) == (2, 6)  # of 2 steps with 2 passes each the first runs as it is
