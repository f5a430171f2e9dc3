"""What a first step waits for is begun early, beside the caller."""

import threading
from typing import Any

import pytest
import torch

from loragraft.backbones.flow import FLUX_LIKE
from loragraft.train import warm


def test_one_layer_of_every_kind_is_launched(tiny_flux: Any) -> None:
    """At the rows that a step gives it: modulation reads one a sample, and its layers need no adapter to be warmed."""
    model, parameters = tiny_flux()
    kinds = warm.layer_kinds(model)
    shapes = {(base.in_features, base.out_features): (base.numerics, type(module).__name__) for base, module in kinds}
    assert len(shapes) == len(kinds) == 6
    assert shapes[128, 512] == shapes[640, 128] == ("w4a8", "SVDQuantLoraLinear")
    assert shapes[128, 768] == shapes[128, 384] == ("w4a16", "SVDQuantLinear")
    seen: list[tuple[tuple[int, ...], bool]] = []
    for _, module in kinds:
        module.register_forward_pre_hook(lambda _, args: seen.append((tuple(args[0].shape), args[0].requires_grad)))
    latents, text = torch.zeros(2, 4, 8, 8), torch.zeros(2, 5, 64)
    tokens = FLUX_LIKE.rows(tuple(latents.shape), {"prompt_embeds": text})
    warm.launch_kinds(kinds, tokens, 2, torch.float32)
    assert sorted(seen) == sorted(
        [((2, 128), False)] * 2 + [((rows, K), True) for rows in (32, 10, 42) for K in (128, 128, 512, 640)]
    )
    assert all(parameter.grad is None for parameter in parameters)


def test_workers_are_started_beside_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.async_compile import AsyncCompile

    begun: list[str] = []
    for name in ("warm_pool", "wakeup"):
        monkeypatch.setattr(
            AsyncCompile, name, lambda name=name: begun.append(f"{name} on {threading.current_thread().name}")
        )
    warm.start_workers().join()
    assert begun == ["warm_pool on start-compile-workers", "wakeup on start-compile-workers"]
