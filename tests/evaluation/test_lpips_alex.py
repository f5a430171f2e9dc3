"""LPIPS against a second implementation that is built of torch's modules, on random weights in the published layout."""

from typing import Any

import pytest
import torch
from torch import nn

from loragraft.evaluation.lpips_alex import WIDTHS, LPIPSAlex


def alexnet() -> nn.Sequential:
    """The layers of torchvision's AlexNet, numbered as in its file."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> tuple[nn.Sequential, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    layers = alexnet().requires_grad_(False)
    backbone = {f"features.{name}": tensor for name, tensor in layers.state_dict().items()}
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(WIDTHS)}
    return layers, backbone, heads


def test_agrees_with_the_modules(weights: Any) -> None:
    layers, backbone, heads = weights
    torch.manual_seed(1)
    a, b = torch.rand(2, 3, 72, 64), torch.rand(2, 3, 72, 64)

    def seen(images: torch.Tensor) -> list[torch.Tensor]:
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x, found = (images - mean.view(3, 1, 1)) / deviation.view(3, 1, 1), []  # LPIPS's constants, said for [0, 1]
        for number, layer in enumerate(layers):
            x = layer(x)
            if number in (1, 4, 7, 9, 11):
                found.append(nn.functional.normalize(x, dim=1, eps=1e-10))
        return found

    expected = sum(
        ((p - q).square() * heads[f"lin{i}.model.1.weight"]).sum(1).mean((1, 2))
        for i, (p, q) in enumerate(zip(seen(a), seen(b), strict=True))
    )
    assert torch.allclose(LPIPSAlex(backbone, heads)(a, b), torch.as_tensor(expected), rtol=1e-4)


def test_equal_images_are_at_distance_zero_and_it_is_symmetric(weights: Any) -> None:
    network = LPIPSAlex(*weights[1:])
    a, b = torch.rand(1, 3, 40, 40), torch.rand(1, 3, 40, 40)
    assert float(network(a, a)) == 0
    assert float(network(a, b)) > 0
    assert torch.equal(network(a, b), network(b, a))


def test_what_is_refused(weights: Any) -> None:
    _, backbone, heads = weights
    network = LPIPSAlex(backbone, heads)
    with pytest.raises(ValueError, match="at least 31 pixels"):
        network(torch.rand(1, 3, 30, 40), torch.rand(1, 3, 30, 40))
    with pytest.raises(ValueError, match="two batches"):
        network(torch.rand(1, 3, 40, 40), torch.rand(1, 3, 40, 41))
    with pytest.raises(ValueError, match=r"AlexNet has features\.0\.bias of shape None"):
        LPIPSAlex({}, heads)
    with pytest.raises(ValueError, match=r"LPIPS heads has lin0\.model\.1\.weight of shape \(1, 8, 1, 1\)"):
        LPIPSAlex(backbone, heads | {"lin0.model.1.weight": torch.rand(1, 8, 1, 1)})


def test_the_smallest_image(weights: Any) -> None:
    assert torch.isfinite(LPIPSAlex(*weights[1:])(torch.rand(1, 3, 31, 31), torch.rand(1, 3, 31, 31))).all()
