"""Joined factors: the same numbers as joining at every use, and a base that is as it was afterwards."""

import pytest
import torch
from torch import Tensor, nn

from loragraft.adapters.inject import inject_adapter, remove_adapter
from loragraft.adapters.joined import JoinedFactors
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.settings import QuantSettings
from loragraft.recipes.schema import AdapterConfig


def model() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    made = nn.ModuleDict({"norm": nn.LayerNorm(4)})  # PEFT wants a parameter somewhere
    for name, (N, K), numerics in (
        ("first", (96, 128), "w4a8"),
        ("second", (64, 96), "w4a8"),
        ("third", (32, 64), "w4a4"),
    ):
        linear = nn.Linear(K, N)
        linear.weight.data = torch.randn(N, K, generator=generator) / K**0.5
        layer, _ = SVDQuantLinear.from_linear(linear, None, QuantSettings(numerics=numerics, rank=8, smoothing="none"))  # type: ignore[arg-type]
        layer.lora_down, layer.lora_up = layer.lora_down.float(), layer.lora_up.float()
        made.add_module(name, layer)
    return made


def outputs(made: nn.Module, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The output, dx and the gradients of every factor."""
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = made.third(made.second(made.first(x)))  # type: ignore[operator]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


@pytest.mark.parametrize("alpha", [4.0, 10.0])
def test_joined_factors_change_nothing(alpha: float) -> None:
    made = model()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    parameters = inject_adapter(made, AdapterConfig(rank=4, alpha=alpha), ["first", "second", "third"])
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1
    apart = outputs(made, parameters)
    joined = JoinedFactors(made, torch.float32)
    for one, other in zip(outputs(made, parameters), apart, strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        parameters[0] *= 2
    assert torch.equal(outputs(made, parameters)[0], apart[0]), "before a refresh the old factors count"
    with torch.no_grad():  # without gradients the parameters themselves are read
        fresh = made.first(torch.ones(1, 128))  # type: ignore[operator]
    joined.refresh()
    assert torch.equal(made.first(torch.ones(1, 128)).detach(), fresh)  # type: ignore[operator]
    taken = sum(layer.joined_down[8:].nbytes + layer.joined_up[:, 8:].nbytes for layer in (made.first, made.second))  # type: ignore[index, union-attr, operator]
    assert joined.nbytes == taken == 4 * 4 * (128 + 96 + 96 + 64)
    joined.separate()
    assert joined.nbytes == 0
    assert made.first.joined_down is None
    doubled = outputs(made, parameters)
    joined.join()
    joined.join()
    for one, other in zip(outputs(made, parameters), doubled, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(made.first.joined_down[8:], parameters[0])  # type: ignore[index]
    joined.separate()
    remove_adapter(made)
    after = made.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
