"""The fidelity report measures what it says: exact where nothing is rounded, close where activations are."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from loragraft.adapters.checkpoint import Adapter
from loragraft.recipes.load import load_recipe

LAYERS = ("transformer_blocks.1.attn.to_q", "transformer_blocks.1.ff.net.2", "single_transformer_blocks.2.norm.linear")


@pytest.fixture(scope="module")
def fidelity(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("fidelity")


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    generator = torch.Generator().manual_seed(0)
    shapes = {LAYERS[0]: (256, 256), LAYERS[1]: (256, 1024), LAYERS[2]: (768, 256)}
    pairs = {
        path: tuple(0.02 * torch.randn(shape, generator=generator) for shape in ((4, K), (N, 4)))
        for path, (N, K) in shapes.items()
    }
    return Adapter("random", {"base": "pocket"}, pairs)  # type: ignore[arg-type]


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 16, 16, 16, generator=generator)
    text = {
        "prompt_embeds": torch.randn(2, 32, 384, generator=generator),
        "pooled_prompt_embeds": torch.randn(2, 384, generator=generator),
    }
    return latents, noise, torch.tensor([0.3, 0.7]), text


def test_rounded_activations_are_close_and_exact_layers_are_exact(fidelity: ModuleType, adapter: Adapter) -> None:
    recipe = load_recipe("marketing")
    exact = fidelity.run(fidelity._prepared("native", adapter, recipe, "cpu", exact=True), batch())
    assert set(exact.gradients) == set(LAYERS)
    backbone = fidelity._prepared("native", adapter, recipe, "cpu")
    backbone.set_training_numerics("raw", "dequantized")
    whole = fidelity.compared([fidelity.run(backbone, batch())], [exact])
    assert 0.99 < whole["adapter"]["cosine"] < 1 - 1e-7
    # With x kept raw nothing is rounded on the way back: on equal x and dy a layer's gradients are the exact ones.
    alone = fidelity.compared([fidelity.layers_alone(backbone, exact)], [exact])
    assert alone["adapter"]["error"] < 1e-4
    assert all(row["x"]["error"] < 1e-4 for row in alone["kinds"].values())
    backbone.set_training_numerics("quantized", "dequantized")
    least = whole["least"]
    assert (least["layer"] in LAYERS, least["factor"] in "AB") == (True, True)
    assert least["cosine"] <= min(row[factor]["cosine"] for row in whole["kinds"].values() for factor in "AB")
    kept = fidelity.compared([fidelity.layers_alone(backbone, exact)], [exact])
    assert 1e-3 < kept["kinds"]["transformer_blocks.*.attn.to_q"]["A"]["error"] < 0.03


def test_agreement_is_of_directions_and_of_sizes(fidelity: ModuleType) -> None:
    exact = torch.tensor([3.0, 4.0])
    assert fidelity.agreement(2 * exact, exact) == pytest.approx((1.0, 1.0))
    assert fidelity.agreement(torch.tensor([4.0, -3.0]), exact) == pytest.approx((0.0, 2**0.5))


def test_a_kind_gathers_the_layers_of_all_blocks(fidelity: ModuleType) -> None:
    assert fidelity.kind_of("transformer_blocks.12.attn.to_out.0") == "transformer_blocks.*.attn.to_out.0"
    assert fidelity.kind_of("single_transformer_blocks.0.proj_out") == "single_transformer_blocks.*.proj_out"
