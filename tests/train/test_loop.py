"""What a step sees, and what it does, on a model small enough to think about."""

from types import SimpleNamespace
from typing import Any

import torch

from loragraft.backbones.flow import FLUX_LIKE
from loragraft.recipes.load import load_recipe
from loragraft.train.batches import Batches, seeded


class Dataset:
    """Ten samples whose latents are their index."""

    def __len__(self) -> int:
        return 10

    shapes = ((4, 4),) * 10

    def batch(self, indices: list[int], epochs: list[int]) -> Any:
        return {
            "latents": torch.stack([torch.full((2, 4, 4), float(i)) for i in indices]),
            "prompt_embeds": torch.stack([torch.full((3, 5), float(i)) for i in indices]),
            "pooled_prompt_embeds": torch.stack([torch.full((5,), float(i)) for i in indices]),
        }


EMPTY = {"prompt_embeds": torch.full((3, 5), -1.0), "pooled_prompt_embeds": torch.full((5,), -1.0)}
BACKBONE = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, spec=SimpleNamespace(family=FLUX_LIKE))


def batches(batch_size: int, accumulation: int = 1, rank: int = 0, world: int = 1, dropout: float = 0.3) -> Batches:
    recipe = load_recipe(
        "marketing",
        [f"train.batch_size={batch_size}", f"train.accumulation={accumulation}", f"train.text_dropout={dropout}"],
    )
    accelerator = SimpleNamespace(process_index=rank, num_processes=world)
    return Batches(Dataset(), EMPTY, recipe, BACKBONE, accelerator)  # type: ignore[arg-type]


def test_two_processes_see_together_what_one_sees() -> None:
    (whole,) = batches(6)(step=3)
    parts = [next(iter(batches(3, rank=rank, world=2)(step=3))) for rank in (0, 1)]
    for i in range(3):  # latents, noise, times
        merged = torch.stack([parts[0][i], parts[1][i]], dim=1).flatten(0, 1)
        assert torch.equal(merged, whole[i])
    for key in EMPTY:
        assert torch.equal(torch.stack([parts[0][3][key], parts[1][3][key]], dim=1).flatten(0, 1), whole[3][key])


def test_a_step_depends_on_its_number_alone() -> None:
    fresh, used = batches(4), batches(4)
    for step in range(3):
        list(used(step))
    for a, b in zip(next(iter(fresh(3)))[:3], next(iter(used(3)))[:3], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(iter(fresh(3)))[1], next(iter(fresh(4)))[1])


def test_accumulation_sees_the_same_samples_as_a_larger_batch() -> None:
    large = next(latents for latents, *_ in batches(4)(step=1)).mean((1, 2, 3)).tolist()
    small = torch.cat([latents for latents, *_ in batches(2, accumulation=2)(step=1)]).mean((1, 2, 3)).tolist()
    assert small == large


def test_text_dropout_puts_the_empty_prompt_in_both_embeddings() -> None:
    seen = [text for step in range(40) for *_, text in batches(8, dropout=0.3)(step)]
    tokens = torch.cat([t["prompt_embeds"][:, 0, 0] for t in seen])
    pooled = torch.cat([t["pooled_prompt_embeds"][:, 0] for t in seen])
    assert torch.equal(tokens, pooled)
    assert 0.2 < (tokens == -1).float().mean() < 0.4
    assert not any((t["prompt_embeds"] == -1).any() for *_, t in batches(8, dropout=0.0)(0))


def test_seeds_of_different_purposes_differ() -> None:
    draws = {
        float(torch.rand((), generator=seeded(0, purpose, n))) for purpose in ("step", "validation") for n in range(4)
    }
    assert len(draws) == 8
