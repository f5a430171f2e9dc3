"""LoRA on convolutions: PEFT's names and shapes, training, exact grafts and their undoing, quantized and in 16 bits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loragraft.adapters.checkpoint import Adapter, load_adapter, save_adapter
from loragraft.adapters.graft import graft, graft_deviation, set_weight, ungraft
from loragraft.adapters.inject import (
    SVDQuantLoraConv2d,
    adapter_factors,
    expand_targets,
    inject_adapter,
    load_factors,
    remove_adapter,
)
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.checkpoint import base_id
from loragraft.quantization.convert import quantize_model
from loragraft.quantization.ledger import build_ledger
from loragraft.quantization.settings import QuantSettings
from loragraft.quantization.tensor_file import CheckpointError
from loragraft.recipes.schema import AdapterConfig

QUICK = QuantSettings(rank=4, smoothing="weight", iterations=1, grid=1)
CONFIG = AdapterConfig(rank=3, alpha=6.0, seed=1)
SHAPES = {"first": (64, 3), "down": (64, 3), "skip": (48, 1)}


class _Net(nn.Module):
    """3 x 3, 3 x 3 with stride 2, 1 x 1, and a linear layer at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 48, 3, 2, 1)
        self.skip, self.head = nn.Conv2d(48, 32, 1), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.skip(F.silu(self.down(F.silu(self.first(x)))))
        return self.head(x.mean((2, 3)))


def _plain() -> _Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return _Net().requires_grad_(False)


@pytest.fixture
def net() -> _Net:
    model = _plain()
    quantize_model(model, dict.fromkeys(SHAPES, QUICK), {}, keep=["head"])  # PEFT asks for a first parameter: one stays
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 64, 6, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make_adapter(net: _Net) -> Callable[..., Adapter]:
    def make(name: str, seed: int = 0, rank: int = 2) -> Adapter:
        generator, pairs = torch.Generator().manual_seed(seed), {}
        for path, (C, kernel) in SHAPES.items():
            N = net.get_submodule(path).out_features
            down = torch.randn(rank, C, kernel, kernel, generator=generator) / (C**0.5 * kernel)
            pairs[path] = down, 0.3 * torch.randn(N, rank, 1, 1, generator=generator)
        return Adapter(name, {"base": "net", "base_id": base_id(net), "name": name}, pairs)

    return make


def test_names_and_shapes_are_pefts(net: _Net) -> None:
    """The same keys and shapes that PEFT's own layers have on the 16-bit model."""
    inject_adapter(net, CONFIG, list(SHAPES))
    ours = get_peft_model_state_dict(net, adapter_name="default")
    stock = inject_adapter_in_model(LoraConfig(r=3, target_modules=list(SHAPES)), _plain())
    theirs = get_peft_model_state_dict(stock, adapter_name="default")
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert ours["down.lora_A.weight"].shape == (3, 64, 3, 3)
    assert ours["down.lora_B.weight"].shape == (48, 3, 1, 1)
    assert isinstance(net.first, SVDQuantLoraConv2d)
    assert len(build_ledger(net).rows) == 4


def test_a_few_steps_train_the_adapter_and_nothing_else(net: _Net, x: Tensor) -> None:
    before, identity = net(x), base_id(net)
    parameters = inject_adapter(net, CONFIG, list(SHAPES))
    assert len(parameters) == 6
    assert torch.equal(net(x), before)  # B = 0
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = (net(x) - 1).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    assert base_id(net) == identity
    assert all(up.abs().max() > 0 for _, up in adapter_factors(net).values())
    remove_adapter(net)
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("path", SHAPES)
def test_gradients_equal_autograd_over_the_dequantized_convolution(net: _Net, path: str) -> None:
    base = net.get_submodule(path)
    base.save_x = "raw"
    C, _ = SHAPES[path]
    parameters = inject_adapter(net, CONFIG, [path])
    generator = torch.Generator().manual_seed(3)
    parameters[1].data = torch.randn(parameters[1].shape, generator=generator) * 0.2
    codes = torch.randint(-126, 127, (2, C, 5, 6), generator=generator).float()
    codes[:, 0] = 127  # on the grid of every pixel: only the straight-through rounding is left out
    smooth = base.smooth[:C].float()[:, None, None]
    x = (codes / 127 * smooth).requires_grad_()
    y = net.get_submodule(path)(x)
    dy = torch.randn(y.shape, generator=generator)
    gradients = torch.autograd.grad(y, [x, *parameters], dy)
    x64, A, B = (t.detach().double().requires_grad_(True) for t in (x, *parameters))
    weight = base.kernel_weight(torch.float64) + 2.0 * torch.einsum("nr,rcuv->ncuv", B[:, :, 0, 0], A)
    y64 = F.conv2d(x64, weight, base.bias.double(), base.stride, base.padding)
    assert relative_rms(y, y64) < 1e-5
    for gradient, expected in zip(gradients, torch.autograd.grad(y64, [x64, A, B], dy.double()), strict=True):
        assert gradient.shape == expected.shape
        assert relative_rms(gradient, expected) < 1e-5


def test_two_active_adapters_add_up(net: _Net, x: Tensor) -> None:
    before = net.first(x)
    parameters = inject_adapter(net, CONFIG, ["first"])
    layer = net.first
    assert isinstance(layer, SVDQuantLoraConv2d)
    layer.update_layer("second", 2, lora_alpha=4.0, config=LoraConfig())
    for parameter in [*parameters, *layer.lora_B["second"].parameters()]:
        parameter.data.normal_(0, 0.1)
    layer.set_adapter(["default", "second"])
    added = sum(F.conv2d(x, layer.get_delta_weight(name), None, 1, 1) for name in ("default", "second"))
    assert relative_rms(layer(x), before + added) < 1e-5
    with pytest.raises(ValueError, match="use_dora"):
        layer.update_layer("third", 2, lora_alpha=4.0, config=LoraConfig(use_dora=True))
    with pytest.raises(NotImplementedError, match="graft"):
        layer.merge()


def test_grafts_are_the_adapter_and_come_off_again(net: _Net, x: Tensor, make_adapter: Callable[..., Adapter]) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plain, adapter = net(x), make_adapter("one")
    rounded = {p: (a.bfloat16().float(), b.bfloat16().float()) for p, (a, b) in adapter.pairs.items()}
    adapter = Adapter("one", adapter.metadata, rounded)
    graft(net, adapter)
    graft(net, make_adapter("two", 1, rank=5), 0.5)
    set_weight(net, "two", 0.25)
    assert net.first.rank == 4 + 2 + 5
    ungraft(net, "two")
    output = net(x)
    assert relative_rms(output, plain) > 0.05
    ungraft(net, "one")
    assert torch.equal(net(x), plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    inject_adapter(net, AdapterConfig(rank=2, alpha=2.0), list(SHAPES))
    load_factors(net, adapter.pairs)
    assert relative_rms(output, net(x).detach()) < 1e-5


def test_deviation_of_a_convolution(net: _Net, x: Tensor, make_adapter: Callable[..., Adapter]) -> None:
    full = make_adapter("a")
    adapter = Adapter("a", full.metadata, {"down": full.pairs["down"]})
    (deviation,) = graft_deviation(net, adapter, {"down": x})
    assert deviation.effect > 0.05
    assert deviation.merged_vs_exact < 1e-5


def test_a_16_bit_model_is_grafted_too(x: Tensor, make_adapter: Callable[..., Adapter]) -> None:
    model, adapter = _plain(), make_adapter("a")
    before = model.down(x)
    down, up = adapter.pairs["down"]
    graft(model, adapter, 0.5, any_base=True)
    added = 0.5 * F.conv2d(F.conv2d(x, down, None, 2, 1), up)
    assert relative_rms(model.down(x), before + added) < 1e-5
    ungraft(model, "a")
    assert torch.equal(model.down(x), before)


def test_files_keep_kernels(net: _Net, x: Tensor, tmp_path: Path) -> None:
    parameters = inject_adapter(net, CONFIG, list(SHAPES))
    for parameter in parameters:
        parameter.data.normal_(0, 0.1)
    trained = net(x).detach()
    file = save_adapter(net, tmp_path, {"base": "net", "base_id": base_id(net)})
    tensors = load_file(file)
    assert tensors["transformer.down.lora_A.weight"].shape == (3, 64, 3, 3)
    assert tensors["transformer.down.lora_B.weight"].shape == (48, 3, 1, 1)
    remove_adapter(net)
    graft(net, load_adapter(file))
    assert relative_rms(net(x), trained) < 0.02  # factors in bfloat16
    tensors["transformer.down.lora_B.weight"] = torch.ones(48, 3, 3, 3)
    save_file(tensors, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match=r"\[N, r, 1, 1\]"):
        load_adapter(tmp_path / "wide.safetensors")


def test_shapes_that_do_not_fit_are_named(net: _Net, make_adapter: Callable[..., Adapter]) -> None:
    adapter = make_adapter("a")
    flat = Adapter("a", adapter.metadata, {"down": tuple(factor.flatten(1) for factor in adapter.pairs["down"])})
    with pytest.raises(ValueError, match="'down' maps 576 to 48 features, the layer 64 x 3 x 3 to 48"):
        graft(net, flat)
    with pytest.raises(ValueError, match=r"needs \[r, \(64, 3, 3\)\]"):
        net.down.adapter_columns(torch.zeros(2, 64, 1, 1))
    model = nn.ModuleDict({"deep": nn.Conv2d(8, 8, 3, groups=8), "conv": nn.Conv2d(8, 8, 3)})
    assert expand_targets(model, ["conv"]) == ["conv"]
    with pytest.raises(ValueError, match="'deep', a Conv2d, not a Linear or ungrouped Conv2d; "):
        expand_targets(model, [".*"])


@pytest.mark.parametrize("quantized", [False, True])
def test_a_1x1_kernel_may_be_flat(net: _Net, quantized: bool) -> None:
    """Some trainers write proj_in as a matrix where the base has a convolution: the same graft, the same undoing."""
    model = net if quantized else _plain()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    down, up = torch.randn(3, 48), torch.randn(32, 3)
    about = {"base_id": base_id(model)}
    graft(model, Adapter("flat", about, {"skip": (down, up)}))
    flat = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ungraft(model, "flat")
    graft(model, Adapter("kernel", about, {"skip": (down[..., None, None], up[..., None, None])}))
    assert all(torch.equal(tensor, flat[name]) for name, tensor in model.state_dict().items())
    branch = "skip.lora_down" if quantized else "skip.weight"
    assert flat[branch].shape != before[branch].shape or not torch.equal(flat[branch], before[branch])
    ungraft(model, "kernel")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
