"""A tiny FLUX of random weights with an adapter that matters, and one loss of it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from loragraft.backbones.flow import flow_loss


@pytest.fixture(scope="session")
def two_ranks(module_of: Callable[[Path, str], ModuleType]) -> ModuleType:
    """What test_several.py runs in two processes, as a module: the model and its steps."""
    return module_of(Path(__file__).with_name("two_ranks.py"), "two_ranks")


@pytest.fixture(autouse=True)
def no_cudnn_attention() -> Iterator[None]:
    """As train/lora.py: its backward pass gives NaN on torch 2.11 with driver 580."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.fixture
def tiny_flux(two_ranks: ModuleType) -> Callable[..., tuple[nn.Module, list[nn.Parameter]]]:
    """(dtype, smoothing, device, quantized) -> model and adapter."""
    return two_ranks.build_tiny_flux  # type: ignore[no-any-return]


@pytest.fixture
def loss_of() -> Callable[..., torch.Tensor]:
    """(model, dtype, device) -> the flow loss of two fixed samples of 4 x 8 x 8 latents (16 tokens) and 5 text tokens."""

    def loss(model: nn.Module, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        text = {"prompt_embeds": draw(2, 5, 64), "pooled_prompt_embeds": draw(2, 32)}
        return flow_loss(model, draw(2, 4, 8, 8), draw(2, 4, 8, 8), torch.tensor([0.3, 0.8], device=device), text)

    return loss
