"""The demo's engine: the same pictures as the command line draws, timed, and nothing left behind."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loragraft.adapters.graft import grafted
from loragraft.demo.catalogue import Catalogue
from loragraft.demo.engine import Engine, Order, Picture, StoppedError
from loragraft.evaluation.generate import Settings, render
from loragraft.quantization.checkpoint import quantized_layers

SETTINGS = Settings(prompt="a red star", seed=3, steps=2, guidance=3.0)


def order(**changes: Any) -> Order:
    fields = {field.name for field in dataclasses.fields(Settings)}
    settings = dataclasses.replace(SETTINGS, **{k: v for k, v in changes.items() if k in fields})
    return Order(settings=settings, **{k: v for k, v in changes.items() if k not in fields})


def draw(engine: Engine, **changes: Any) -> list[Picture]:
    return list(engine.draw(order(**changes), lambda adapted, done, steps: None))


def assert_bare(engine: Engine) -> None:
    """The model computes with the base's own branches."""
    model = engine.backbone("pocket", "native").transformer
    assert grafted(model) == {}
    assert all(layer.rank == layer.base_rank for layer in quantized_layers(model).values())


def distance(a: Image.Image, b: Image.Image) -> float:
    """Mean difference of 8-bit values."""
    return float(np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).mean())


def test_before_and_after_are_what_the_command_line_draws(engine: Engine) -> None:
    seen: list[tuple[bool, int, int]] = []
    before_all = time.perf_counter()
    before, after = engine.draw(order(adapters=(("ours", 0.8),)), lambda *step: seen.append(step))
    wall = time.perf_counter() - before_all
    assert seen == [(False, 1, 2), (False, 2, 2), (True, 1, 2), (True, 2, 2)]
    assert [before.adapted, after.adapted] == [False, True]
    backbone = engine.backbone("pocket", "native")
    assert_bare(engine)
    assert engine.loaded is not None
    assert engine.loaded.adapters.resident == {"ours": 0.8}
    engine.loaded.adapters.clear()  # for another to put adapters in
    (expected,) = render(backbone, [(engine.catalogue.load("ours"), 0.8)], [SETTINGS])
    assert distance(after.image, expected) < 1  # an activation code may round the other way
    assert distance(before.image, render(backbone, [], [SETTINGS])[0]) < 1
    assert distance(before.image, after.image) > 3
    for picture in (before, after):
        assert (picture.steps, picture.passes) == (2, 2)
        assert picture.seconds.start is None
        assert min(picture.seconds.text, picture.seconds.steps, picture.seconds.decoding) > 0
    assert after.seconds.adapters > before.seconds.adapters >= 0
    parts = before.seconds.total + after.seconds.own
    assert parts <= wall
    assert before.seconds.steps > before.seconds.decoding


def test_weights_and_several_adapters_count(engine: Engine) -> None:
    _, one = draw(engine, adapters=(("ours", 1.0),))
    _, both = draw(engine, adapters=(("ours", 1.0), ("second", 1.0)))
    base, none = draw(engine, adapters=(("ours", 0.0), ("second", 0.0)))
    assert distance(one.image, both.image) > 3
    assert distance(base.image, none.image) < 1


def test_a_start_picture_shortens_the_way(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "start.png"
    start = Image.new("RGB", (200, 160), (20, 160, 60))
    start.save(file)
    (near,) = draw(engine, start=file, strength=0.2, steps=5, guidance=1.0)
    (far,) = draw(engine, start=file, strength=1.0, steps=5, guidance=1.0)
    assert (near.steps, near.passes, far.steps) == (1, 1, 5)
    assert near.seconds.start is not None and near.seconds.start > 0
    small = start.resize(near.image.size)
    assert distance(near.image, small) < 0.5 * distance(far.image, small)


def test_sixteen_bits_are_the_same_model_larger(engine: Engine, runs: Any) -> None:
    engine.backbone("pocket", "native")
    assert engine.loaded is not None
    int4 = engine.loaded
    (small,) = draw(engine)
    (large,) = draw(engine, precision="16bit")
    full = engine.loaded
    assert (full.precision, full.size.int4) == ("16bit", None)
    assert int4.size.int4 is not None and int4.size.int4 < 0.5 * int4.size.full
    assert full.size.full == pytest.approx(int4.size.full)
    assert 0 < distance(small.image, large.image) < 30
    with pytest.raises(ValueError, match=f"{runs.base_id}.*this base is {full.backbone.base_id}"):
        draw(engine, precision="16bit", adapters=(("ours", 1.0),))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        (
            {"prompt": "a small red star " * 20},
            "is longer than pocket reads: shorten it. What would be lost is its end",
        ),
        ({"negative_prompt": "blurry " * 40}, "The negative prompt is"),
        ({"steps": 0}, "Steps is 0"),
        ({"steps": 100000}, "Steps is 100000"),
        ({"guidance": float("nan")}, "Guidance is nan"),
        ({"seed": -1}, "Seed is -1"),
        ({"precision": "int3"}, "expected one of native, interchange, 16bit"),
        ({"base": "poket"}, "Did you mean 'pocket'"),
        ({"start": Path(__file__), "strength": 0.0}, "Strength is 0.0"),
        ({"start": Path(__file__)}, "is not a readable image"),
        ({"adapters": (("gone", 1.0),)}, "not in the folders any more"),
    ],
)
def test_mistakes_are_sentences_before_the_first_step(engine: Engine, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(engine.draw(order(**changes), lambda *_: pytest.fail("a step was taken")))


def test_an_adapter_of_another_base_is_refused_with_both_ids(engine: Engine, runs: Any) -> None:
    with pytest.raises(ValueError, match=f"{runs.other_base}.*{runs.base_id}"):
        draw(engine, adapters=(("ours", 1.0), ("foreign", 1.0)))
    before, after = draw(engine, adapters=(("foreign", 1.0),), any_base=True)
    assert distance(before.image, after.image) > 3


def test_stopping_leaves_the_base_as_it_was(engine: Engine) -> None:
    def stop(adapted: bool, done: int, steps: int) -> None:
        if adapted:
            raise StoppedError(f"{done} of {steps}")

    pictures = engine.draw(order(adapters=(("ours", 1.0),)), stop)
    base = next(pictures)
    with pytest.raises(StoppedError, match="1 of 2"):
        next(pictures)
    assert not base.adapted
    assert_bare(engine)
    assert distance(draw(engine)[0].image, base.image) < 1  # and the next order is served


@pytest.mark.gpu
def test_orders_share_their_graphs(runs: Any, tmp_path: Path) -> None:
    """Another adapter, another weight, another prompt: what was captured for the first order draws the others."""
    on_gpu = Engine(Catalogue([runs.folder]), "cuda", tmp_path)
    draw(on_gpu, adapters=(("ours", 1.0),))
    replay = on_gpu.backbone("pocket", "native").replay
    assert replay.graphs == 2  # without and with adapters
    for adapters in ((("ours", 0.5),), (("second", 1.0),), (("ours", 0.7), ("second", 0.3)), ()):
        draw(on_gpu, adapters=adapters, prompt="a blue house", seed=5, steps=3)
    assert replay.graphs == 2
