"""The layer of any format: output and gradients against its dequantized weight, its branch, its checkpoint, its ledger row."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from loragraft.kernels.layout import relative_rms
from loragraft.quantization.calibrate import ActivationStats
from loragraft.quantization.checkpoint import base_id, load_quantized, quantization_config, save_quantized
from loragraft.quantization.convert import plan_layers, quantize_model
from loragraft.quantization.formats import FORMATS
from loragraft.quantization.ledger import build_ledger
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.quantized_linear import QuantizedLinear, from_linear, make_empty
from loragraft.quantization.settings import Numerics, QuantSettings
from loragraft.quantization.tensor_file import CheckpointError

every_name = pytest.mark.parametrize("name", [found.name for found in FORMATS.values()])


def layer_of(name: Numerics, linear: nn.Linear, **settings: object) -> QuantizedLinear:
    layer, _ = from_linear(linear, None, QuantSettings(name, iterations=2, **settings))  # type: ignore[arg-type]
    assert isinstance(layer, QuantizedLinear)
    return layer


@every_name
def test_output_and_gradients_are_those_of_the_dequantized_layer(
    name: Numerics, outlier_layer: tuple[nn.Linear, ActivationStats]
) -> None:
    linear, _ = outlier_layer
    layer = layer_of(name, linear)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, 256, generator=generator, requires_grad=True)
    down = torch.randn(4, 256, generator=generator, requires_grad=True)
    up = torch.randn(192, 4, generator=generator, requires_grad=True)
    dy = torch.randn(2, 5, 192, generator=generator)
    y = layer(x, down, up)
    found = torch.autograd.grad(y, (x, down, up), dy)

    weight = layer.dequantized_codes(torch.float64)
    branch = layer.lora_up.double() @ layer.lora_down.double()
    x64, down64, up64 = (tensor.detach().double().requires_grad_() for tensor in (x, down, up))
    seen = x64
    if layer.format.round_input is not None:
        rounded = layer.format.round_input(x.detach().view(-1, 256)).view_as(x).double()
        assert 0 < relative_rms(rounded, x) < 0.15
        seen = x64 + (rounded - x64).detach()  # straight through
    exact = seen @ weight.T + x64 @ branch.T + (x64 @ down64.T) @ up64.T + linear.bias.double()
    wanted = torch.autograd.grad(exact, (x64, down64, up64), dy.double())
    assert relative_rms(y, exact) < 1e-5
    for gradient, reference in zip(found, wanted, strict=True):
        assert relative_rms(gradient, reference) < 1e-5
    assert relative_rms(layer.dequantized_weight(), weight + branch) < 1e-6


def test_what_the_backward_pass_keeps_is_no_dequantized_weight(
    outlier_layer: tuple[nn.Linear, ActivationStats],
) -> None:
    layer = layer_of("nf4", outlier_layer[0])
    x = torch.randn(3, 256, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    frozen = {buffer.data_ptr() for buffer in layer.buffers()}
    assert kept
    assert all(tensor.data_ptr() in frozen for tensor in kept)


@pytest.mark.parametrize("name", ["int3", "int2", "mxfp4"])
def test_a_branch_lowers_the_error_and_the_report_says_by_how_much(
    name: Numerics, outlier_layer: tuple[nn.Linear, ActivationStats]
) -> None:
    linear, stats = outlier_layer
    _, plain = from_linear(linear, stats, QuantSettings(name, rank=0))
    layer, report = from_linear(linear, stats, QuantSettings(name, rank=16, iterations=3), path="somewhere")
    assert report.weight_error < 0.8 * plain.weight_error
    assert report.output_error < report.rtn_error
    assert report.rtn_error == pytest.approx(plain.output_error, rel=1e-5)
    assert report.weight_error == pytest.approx(relative_rms(layer.dequantized_weight(), linear.weight), rel=1e-4)
    exact = stats.samples_SK @ linear.weight.T + linear.bias
    assert report.output_error == pytest.approx(
        relative_rms(layer(stats.samples_SK) - linear.bias, exact - linear.bias), rel=1e-3
    )
    assert (report.path, report.rank, report.smoothing) == ("somewhere", 16, "none")
    assert QuantSettings(name).branch_rank == FORMATS[name].rank


def test_settings_that_no_format_has() -> None:
    for wrong in ({"smoothing": "weight"}, {"gptq": True}):
        with pytest.raises(ValueError, match="nf4 has neither smoothing nor GPTQ"):
            QuantSettings("nf4", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected one of w4a8, w4a4, w4a16"):
        SVDQuantLinear(8, 8, "nf4", {})
    linear = nn.Linear(64, 64)
    with pytest.raises(ValueError, match="neither a rotation nor unsigned"):
        make_empty(linear, "nf4", rank=0, hadamard=True)
    tensors = FORMATS["nf4"].encode(linear.weight.detach())
    with pytest.raises(ValueError, match=r"missing \['lora_down', 'lora_up'\]"):
        QuantizedLinear(64, 64, "nf4", tensors)


@every_name
def test_few_row_layers_are_never_below_four_bits(name: Numerics) -> None:
    few = QuantSettings(name).for_few_rows().numerics
    assert few == (name if name in ("fp8", "int8", "nf4", "nf4-double") else "w4a16")
    assert QuantSettings("w4a8").for_few_rows() == QuantSettings("w4a16")


def quantized(
    name: Numerics, model: FluxTransformer2DModel, rules: dict[str, QuantSettings], keep: tuple[str, ...]
) -> None:
    main = QuantSettings(name, iterations=1)
    chosen = {pattern: main if s.numerics != "w4a16" else main.for_few_rows() for pattern, s in rules.items()}
    quantize_model(model, plan_layers(model, chosen, keep), {}, keep=keep)


@every_name
def test_a_checkpoint_comes_back_byte_for_byte(
    name: Numerics,
    tiny_flux: FluxTransformer2DModel,
    flux_rules: Callable[..., dict[str, QuantSettings]],
    flux_keep: tuple[str, ...],
    flux_inputs: Callable[[int], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    before = tiny_flux(**flux_inputs(1)).sample
    quantized(name, tiny_flux, flux_rules(), flux_keep)
    after = tiny_flux(**flux_inputs(1)).sample
    # Random weights amplify nothing; the bound of the worst format only says that the model is still the same one.
    assert 0 < relative_rms(after, before) < 0.3
    save_quantized(tiny_flux, tmp_path / "saved")
    again = load_quantized(tmp_path / "saved", FluxTransformer2DModel)
    assert base_id(again) == base_id(tiny_flux)
    assert torch.equal(again(**flux_inputs(1)).sample, after)
    assert quantization_config(again)["profile"] == name
    half = again.to(torch.bfloat16)  # buffers keep their dtypes
    assert {n: b.dtype for n, b in half.named_buffers() if "attn.to_q" in n} == {
        n: b.dtype for n, b in tiny_flux.named_buffers() if "attn.to_q" in n
    }

    rows = {row.path: row for row in build_ledger(tiny_flux).rows}
    row = rows["transformer_blocks.0.attn.to_q"]
    assert (row.numerics, row.backend, row.group_size) == (name, "reference", FORMATS[name].block)
    assert row.error is not None
    assert rows["transformer_blocks.0.norm1.linear"].numerics == QuantSettings(name).for_few_rows().numerics


def test_a_damaged_checkpoint_is_refused(
    tiny_flux: FluxTransformer2DModel,
    flux_rules: Callable[..., dict[str, QuantSettings]],
    flux_keep: tuple[str, ...],
    tmp_path: Path,
) -> None:
    quantized("nf4", tiny_flux, flux_rules(), flux_keep)
    save_quantized(tiny_flux, tmp_path / "saved")
    config = tmp_path / "saved" / "config.json"
    config.write_text(config.read_text().replace('"numerics": "nf4"', '"numerics": "int8"', 1))
    with pytest.raises(CheckpointError, match=r"tensor\(s\) are missing, the first is '.*row_scale'"):
        load_quantized(tmp_path / "saved", FluxTransformer2DModel)
    config.write_text(config.read_text().replace('"numerics": "int8"', '"numerics": "nf5"', 1))
    with pytest.raises(CheckpointError, match="has numerics 'nf5'"):
        load_quantized(tmp_path / "saved", FluxTransformer2DModel)


@pytest.mark.parametrize("name", ["fp8", "nf4-double", "nvfp4", "int3"])
def test_it_compiles_as_one_graph(name: Numerics, outlier_layer: tuple[nn.Linear, ActivationStats]) -> None:
    layer = layer_of(name, outlier_layer[0])
    x = torch.randn(4, 256, requires_grad=True)
    down, up = torch.randn(2, 256, requires_grad=True), torch.randn(192, 2, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    plain = layer(x, down, up)
    y = compiled(x, down, up)
    assert relative_rms(y, plain) < 1e-6
    for a, b in zip(*(torch.autograd.grad(out.sum(), (x, down, up)) for out in (y, plain)), strict=True):
        assert relative_rms(a, b) < 1e-6


def test_its_matrices_may_be_frozen_parameters(outlier_layer: tuple[nn.Linear, ActivationStats]) -> None:
    """What FSDP divides (`train.sharding`) are parameters, codes included."""
    layer = layer_of("nvfp4", outlier_layer[0])
    x = torch.randn(3, 256, requires_grad=True)
    y = layer(x)
    for name, buffer in list(layer.named_buffers()):
        if buffer.dim() == 2 and buffer.numel():
            delattr(layer, name)
            layer.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
    assert torch.equal(layer(x), y)
    assert "qweight" in dict(layer.named_parameters())


@pytest.mark.gpu
def test_codebooks_follow_a_checkpoint_onto_the_gpu(
    tiny_flux: FluxTransformer2DModel,
    flux_rules: Callable[..., dict[str, QuantSettings]],
    flux_keep: tuple[str, ...],
    tmp_path: Path,
) -> None:
    quantized("nf4", tiny_flux, flux_rules(), flux_keep)
    save_quantized(tiny_flux, tmp_path / "saved")
    again = load_quantized(tmp_path / "saved", FluxTransformer2DModel, device="cuda")
    layer = again.transformer_blocks[0].attn.to_q
    assert layer.pairs.is_cuda
    assert torch.equal(
        layer.dequantized_codes(torch.float32).cpu(),
        tiny_flux.transformer_blocks[0].attn.to_q.dequantized_codes(torch.float32),
    )


@pytest.mark.gpu
@every_name
def test_a_gpu_computes_what_the_reference_does(
    name: Numerics, outlier_layer: tuple[nn.Linear, ActivationStats]
) -> None:
    layer = layer_of(name, outlier_layer[0])
    for rows in (1, 17, 300):
        x = torch.randn(rows, 256).bfloat16()
        dy = torch.randn(rows, 192).bfloat16()
        results = []
        for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
            on = layer.to(device)
            given = x.to(device, dtype).requires_grad_()
            y = on(given)
            results.append((y, *torch.autograd.grad(y, given, dy.to(device, dtype))))
        for reference, found in zip(*results, strict=True):
            assert relative_rms(found.cpu(), reference) < 6e-3  # bf16 products; no code may differ by more than a tie
