"""Publish -> pull -> verify -> graft -> the same image, through a Hub on this machine, with `pocket`; and measured again."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from loragraft import cli
from loragraft.adapters.checkpoint import load_adapter, write_adapter
from loragraft.adapters.graft import grafted, ungraft
from loragraft.backbones.load import load_backbone
from loragraft.backbones.spec import Backbone
from loragraft.evaluation.generate import Settings, render
from loragraft.evaluation.image_sets import adapter_hash
from loragraft.quantization.checkpoint import quantized_layers
from loragraft.zoo.bench import Comparison, published_recipe, table
from loragraft.zoo.entry import Score, ZooError
from loragraft.zoo.places import open_place
from loragraft.zoo.publish import publish
from loragraft.zoo.verify import verify_folder

SETTINGS = [Settings(prompt="promo tile: white rocket on blue", seed=3, steps=2)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone("pocket", "native", "cpu", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def run(backbone: Backbone, tmp_path: Path) -> Path:
    """A run whose adapter changes every layer of `pocket`, without training."""
    generator = torch.Generator().manual_seed(5)
    pairs = {
        path: (
            torch.randn(4, layer.in_features, generator=generator) / math.sqrt(layer.in_features),
            0.3 * torch.randn(layer.out_features, 4, generator=generator),
        )
        for path, layer in quantized_layers(backbone.transformer).items()
    }
    data = {"domain": "marketing", "count": 40, "validation_fraction": 0.2, "test_fraction": 0.3}
    about = {
        "name": "loud",
        "base": "pocket",
        "base_id": backbone.base_id,
        "profile": "native",
        "recipe_hash": "cd" * 32,
        "data_fingerprint": "ef" * 32,
        "recipe": {
            "base": "pocket",
            "numerics": "native",
            "data": data,
            "weights": {"path": "somebody/elses", "allow_download": True},
            "sample": {"prompts": []},
        },
    }
    write_adapter(pairs, tmp_path / "run" / "adapter", about)
    return tmp_path / "run"


def pixels(image: Image.Image) -> bytes:
    return image.convert("RGB").tobytes()


def test_the_same_image_after_the_way_through_the_hub(
    hub: Any,
    run: Path,
    backbone: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAGRAFT_ZOO", "hf://alice")
    before = backbone.fingerprint()
    bare = render(backbone, [], SETTINGS)[0]
    (published,) = render(backbone, [(load_adapter(run / "adapter"), 1.0)], SETTINGS)
    assert cli.main(["publish", str(run), "--to", "hf://alice"]) == 0
    assert cli.main(["zoo", "pull", "loud"]) == 0
    assert cli.main(["zoo", "verify", "adapters/loud"]) == 0
    text = capsys.readouterr().out
    assert "ok      base       pocket (native)" in text
    assert "taken off again, every byte as before" in text
    (pulled,) = render(backbone, [(load_adapter(tmp_path / "adapters" / "loud"), 1.0)], SETTINGS)
    assert pixels(pulled) == pixels(published)
    assert pixels(pulled) != pixels(bare)
    assert backbone.fingerprint() == before


def test_an_adapter_of_another_base_fails_at_the_base(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = load_adapter(run / "adapter")
    write_adapter(adapter.pairs, run / "adapter", {**adapter.metadata, "base_id": "00" * 32})
    publish(run, open_place("zoo"))
    assert cli.main(["zoo", "verify", "loud"]) == 1
    assert "FAILED  base       adapter 'loud' was trained on base 0000" in capsys.readouterr().out


@pytest.mark.parametrize(("broken", "said"), [("ungraft", "did not restore the base"), ("graft", "changes nothing")])
def test_a_graft_that_does_not_come_off_or_does_nothing_is_told(
    run: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, said: str
) -> None:
    publish(run, open_place(str(tmp_path / "zoo")))
    folder = tmp_path / "zoo" / "loud" / "1.0.0"
    with monkeypatch.context() as patch:
        patch.setattr(f"loragraft.adapters.graft.{broken}", lambda *_: None)
        if broken == "graft":
            patch.setattr("loragraft.adapters.graft.ungraft", lambda *_: None)
        *_, last = verify_folder(folder, backbone=lambda entry: backbone)
    assert (last.question, last.passed) == ("graft", False)
    assert said in last.text
    for name in grafted(backbone.transformer):
        ungraft(backbone.transformer, name)


def test_a_score_is_measured_again_and_compared(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One published figure is far off, one has an interval that holds anything, one has none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAGRAFT_CACHE", str(tmp_path / "cache"))
    figures = {
        "kid_lite0": {"value": 1.0, "low": -1000.0, "high": 1000.0},
        "fd_lite0": 1.0,
        "retrieval_minilm_lite0_r5": {"value": 9.0, "low": 8.9, "high": 9.1},
    }
    claimed = {
        "adapter_hash": adapter_hash(load_adapter(run / "adapter")),
        "images": 4,
        "references": 4,
        "split": "test",
        "seed": 1,
        "steps": 1,
        "guidance": 3.0,
        "rendered_on": ["a dream"],
        "sets": {"base": figures, "adapter": figures},
    }
    (run / "score.json").write_text(json.dumps(claimed))
    publish(run, open_place("zoo"))
    assert cli.main(["zoo", "bench", "loud"]) == 1
    words = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if "published " in line}
    assert {name: words[name] for name in figures} == {
        "kid_lite0": "agrees",
        "fd_lite0": "judged",  # not judged
        "retrieval_minilm_lite0_r5": "DIFFERS",
    }
    written = json.loads((tmp_path / "bench" / "loud-1.0.0" / "bench.json").read_text())
    assert [row["agrees"] for row in written["scores"]] == [True, None, False]
    assert all(row["here"]["n"] == 4 for row in written["scores"])


SCORE = Score(
    metric="kid_lite0", value=0.05, low=0.04, high=0.06, base=0.2, better="lower", protocol="p", n=64, references=32,
    split="test", seed=1, steps=12, guidance=3.0, hardware="here",
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "agrees"),
    [
        ({}, True),
        ({"value": 0.07, "low": 0.059, "high": 0.08}, True),
        ({"value": 0.07, "low": 0.061, "high": 0.08}, False),
        ({"n": 16, "low": 0.0, "high": 0.2, "value": 0.1}, True),
        ({"steps": 20}, None),
        ({"low": None, "high": None, "value": 0.04}, None),
    ],
)
def test_when_two_figures_agree(changes: dict[str, Any], agrees: bool | None) -> None:
    comparison = Comparison(published=SCORE, here=replace(SCORE, **changes))
    assert comparison.agrees is agrees
    assert len(list(table([comparison]))) == 4


def test_recall_among_fewer_images_is_another_figure() -> None:
    recall = replace(SCORE, metric="retrieval_minilm_lite0_r5")
    assert Comparison(published=recall, here=replace(recall, n=16)).agrees is None


def test_a_published_recipe_is_not_trusted_with_paths_or_a_network(run: Path, tmp_path: Path) -> None:
    adapter = load_adapter(run / "adapter")
    recipe = published_recipe(adapter, None)
    assert (recipe.data.domain, recipe.weights.path, recipe.weights.allow_download) == ("marketing", "", False)
    about = adapter.metadata["recipe"]
    foreign = {**adapter.metadata, "recipe": {**about, "data": {"dataset": "somebody/elses", "allow_download": True}}}
    with pytest.raises(ZooError, match="somebody/elses, which is not published with it: give --data FOLDER"):
        published_recipe(replace(adapter, metadata=foreign), None)
    given = published_recipe(replace(adapter, metadata=foreign), tmp_path)
    assert (given.data.folder, given.data.dataset, given.data.allow_download) == (str(tmp_path), None, False)
