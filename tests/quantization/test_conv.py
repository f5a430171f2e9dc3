"""Quantized convolutions: errors like a linear layer's, exact storage, and what stays in 16 bits."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.quantizers import auto
from torch import Tensor, nn

from loragraft.kernels.layout import relative_rms
from loragraft.quantization.calibrate import collect
from loragraft.quantization.checkpoint import base_id, load_quantized, save_quantized
from loragraft.quantization.conv import SVDQuantConv2d, conv_columns, is_quantizable, why_16bit
from loragraft.quantization.convert import layer_paths, plan_layers, quantize_model
from loragraft.quantization.diffusers_quantizer import register
from loragraft.quantization.ledger import build_ledger
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.numerics import convert_numerics
from loragraft.quantization.settings import QuantSettings
from loragraft.quantization.stream import plan_source, quantize_stream, weight_layers
from loragraft.quantization.tensor_file import CheckpointError
from loragraft.quantization.weight_source import FileSource

QUICK = QuantSettings(rank=4, smoothing="weight", iterations=1, grid=1)
QUANTIZED = (
    r"(down|mid|up)_blocks?\..*\.(conv\d?|conv_shortcut|proj_in|proj_out)",
    r".*\.(to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)",
)
KEEP = ("conv_in", "conv_out", r"time_embedding\..*", r".*time_emb_proj")
Inputs = Callable[[int], dict[str, Tensor]]


def _unet() -> UNet2DConditionModel:
    """Convolutions of 32, 64 and 96 channels: padded taps and whole ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = UNet2DConditionModel(
            sample_size=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), layers_per_block=1,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(32, 64), cross_attention_dim=32,
            attention_head_dim=2, norm_num_groups=8,
        )  # fmt: skip
    return model.eval().requires_grad_(False)


def _inputs(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([3.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=generator),
    }


@pytest.fixture
def unet() -> UNet2DConditionModel:
    model = _unet().to(torch.bfloat16)
    quantize_model(model, plan_layers(model, dict.fromkeys(QUANTIZED, QUICK), KEEP), {}, keep=KEEP)
    return model.float()


def _sequence(C: int, N: int, kernel: int, stride: int, padding: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(C, N, kernel, stride, padding)).requires_grad_(False)


def _images(C: int, count: int = 4) -> list[Tensor]:
    """SiLU of channels of unequal loudness, as group norms and convolutions leave them."""
    generator = torch.Generator().manual_seed(1)
    loud = torch.linspace(0.3, 3, C)[:, None, None]
    return [F.silu(torch.randn(2, C, 9, 8, generator=generator) * loud) for _ in range(count)]


def _run(model: nn.Module, *images: Tensor) -> None:
    for x in images:
        model(x)


@pytest.mark.parametrize(
    "settings",
    [
        QuantSettings(rank=8, iterations=2, grid=2),
        QuantSettings(rank=8, grid=2, search="subsampled"),
        QuantSettings(rank=8, smoothing="hadamard", group_size=128),
        QuantSettings(rank=8, iterations=1, grid=1, gptq=True),
    ],
    ids=["exhaustive", "subsampled", "rotated", "gptq"],
)
def test_the_reported_error_is_the_layers(settings: QuantSettings) -> None:
    """Measured on patches, it is what whole images show; and the branch pays."""
    model, images = _sequence(64, 48, 3, 1, 1), _images(64)
    expected = torch.cat([model(x) for x in images])
    stats = collect(model, ["0"], partial(_run, model, *images))
    (report,) = quantize_model(model, {"0": settings}, stats)
    layer = model[0]
    assert isinstance(layer, SVDQuantConv2d)
    actual = torch.cat([model(x) for x in images])
    assert actual.shape == expected.shape
    assert relative_rms(actual - layer.bias[:, None, None], expected - layer.bias[:, None, None]) == pytest.approx(
        report.output_error, rel=0.1
    )
    assert report.output_error < report.rtn_error
    assert layer.hadamard == (settings.smoothing == "hadamard") or report.smoothing == "calibrated"


@pytest.mark.parametrize(
    ("C", "kernel", "stride", "padding"), [(64, 3, 1, 1), (48, 3, 2, 1), (100, 1, 1, 0), (70, 1, 2, 0), (64, 2, 2, 0)]
)
def test_every_window_matches_the_dequantized_weight(C: int, kernel: int, stride: int, padding: int) -> None:
    model = _sequence(C, 24, kernel, stride, padding)
    quantize_model(model, {"0": QUICK}, {})
    layer, x = model[0], _images(C, 1)[0]
    assert layer.in_features == conv_columns(C, kernel)
    assert layer.kernel_weight().shape == (24, C, kernel, kernel)
    expected = F.conv2d(x, layer.kernel_weight(), layer.bias, stride, padding)
    assert relative_rms(layer(x), expected) < 0.02  # what rounding x costs
    assert str(layer).startswith(f"SVDQuantConv2d({C}, 24, kernel_size=({kernel}, {kernel})")


def test_taps_share_their_smoothing() -> None:
    model, images = _sequence(64, 24, 3, 1, 1), _images(64)
    for x in images:
        x[:, 3:6] *= 40
    stats = collect(model, ["0"], partial(_run, model, *images))
    settings = QuantSettings(rank=0, grid=4, rotation="never")
    quantize_model(model, {"0": settings}, stats)
    smooth = model[0].smooth.view(9, 64)
    assert torch.equal(smooth, smooth[:1].expand(9, 64))
    assert smooth[0].unique().numel() > 10


def test_what_stays_in_16_bits_says_why() -> None:
    for conv, reason in (
        (nn.Conv2d(8, 8, 3, groups=8), "depthwise"),
        (nn.Conv2d(8, 8, 3, groups=2), "2 groups"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), "circular"),
        (nn.Conv2d(8, 8, 3, padding="same"), "same"),
        (nn.Conv2d(8, 8, (3, 1)), r"kernel \(3, 1\)"),
        (nn.Conv2d(8, 8, 3, dilation=2), "dilation"),
        (nn.Conv2d(8, 8, 1, padding=1), "a padded 1 x 1"),
    ):
        assert not is_quantizable(conv)
        with pytest.raises(ValueError, match=reason):
            SVDQuantConv2d.from_conv(conv, None, QUICK, path="c")
    assert why_16bit(nn.Conv2d(8, 8, 3, 2, 1)) is None
    assert is_quantizable(nn.Linear(2, 2))
    assert not is_quantizable(nn.ReLU())


def test_numerics_without_a_kernel_are_refused() -> None:
    conv = nn.Conv2d(48, 8, 3)
    with pytest.raises(ValueError, match="w4a4 for a 3 x 3 convolution"):
        SVDQuantConv2d.from_conv(conv, None, QuantSettings("w4a4", smoothing="weight"), path="c")
    with pytest.raises(ValueError, match="channels divisible by 64, not 48"):
        SVDQuantConv2d.from_conv(conv, None, QuantSettings(smoothing="hadamard"), path="c")
    layer, _ = SVDQuantConv2d.from_conv(nn.Conv2d(48, 8, 1), None, QuantSettings("w4a16", rank=2), path="c")
    x = torch.randn(1, 48, 3, 3)
    assert relative_rms(layer(x), F.conv2d(x, layer.kernel_weight(), layer.bias)) < 1e-5


def test_convolutions_are_planned_or_kept() -> None:
    model = nn.ModuleDict({"a": nn.Conv2d(8, 8, 3), "deep": nn.Conv2d(8, 8, 3, groups=8), "fc": nn.Linear(8, 8)})
    assert layer_paths(model) == ["a", "fc"]
    with pytest.raises(ValueError, match=r"1 layer\(s\) are neither planned nor kept: a"):
        plan_layers(model, {"fc": QUICK})
    assert plan_layers(model, {"fc": QUICK}, keep=["a", "deep"]) == {"fc": QUICK}
    with pytest.raises(ValueError, match="'deep' matches no module path"):
        plan_layers(model, {"deep": QUICK, "fc": QUICK}, keep=["a"])


def test_a_unet_is_quantized_saved_and_read(
    unet: UNet2DConditionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.setitem(mapping, "loragraft", None)  # `register` would stay in force for the tests after this one
    expected = unet(**_inputs(0)).sample
    assert relative_rms(expected, _unet()(**_inputs(0)).sample) < 0.25
    save_quantized(unet, tmp_path / "q")
    block = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert "down_blocks.0.downsamplers.0.conv" in block["layers"]
    loaded = load_quantized(tmp_path / "q", UNet2DConditionModel)
    assert torch.equal(loaded.float()(**_inputs(0)).sample, expected)
    assert base_id(loaded) == base_id(unet)
    register()
    stock = UNet2DConditionModel.from_pretrained(tmp_path / "q")
    assert torch.equal(stock(**_inputs(0)).sample, expected)
    block["layers"]["conv_norm_out"] = block["layers"]["down_blocks.0.downsamplers.0.conv"]
    config = json.loads((tmp_path / "q" / "config.json").read_text()) | {"quantization_config": block}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'conv_norm_out' is no linear layer of the model and no convolution"):
        load_quantized(tmp_path / "q", UNet2DConditionModel)


def test_the_ledger_lists_convolutions(unet: UNet2DConditionModel) -> None:
    rows = {row.path: row for row in build_ledger(unet).rows}
    assert len(rows) == sum(isinstance(m, nn.Linear | nn.Conv2d | SVDQuantLinear) for m in unet.modules())
    first, down, skip = (
        rows[p] for p in ("conv_in", "down_blocks.0.downsamplers.0.conv", "up_blocks.1.resnets.0.conv_shortcut")
    )
    assert (first.kind, first.numerics, first.in_features) == ("conv 3x3", "fp32", 36)
    assert (down.kind, down.numerics, down.in_features, down.rank) == ("conv 3x3 /2", "w4a8", 576, 4)
    assert (skip.kind, skip.out_features, skip.in_features) == ("conv 1x1", 32, 96)
    deep = build_ledger(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))).rows[0]
    assert (deep.kind, deep.in_features) == ("depthwise 3x3", 9)


def test_streaming_writes_what_memory_does(tmp_path: Path) -> None:
    model = _unet().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    source = FileSource(tmp_path / "source")
    assert sorted(weight_layers(source)) == sorted(layer_paths(model))
    plan = plan_source(source, dict.fromkeys(QUANTIZED, QUICK), KEEP)
    quantize_stream(source, plan, dict(model.config), tmp_path / "streamed", progress=False)
    quantize_model(model, plan_layers(model, dict.fromkeys(QUANTIZED, QUICK), KEEP), {}, keep=KEEP)
    assert base_id(load_quantized(tmp_path / "streamed", UNet2DConditionModel)) == base_id(model)


def test_other_numerics_leave_convolutions_alone(unet: UNet2DConditionModel) -> None:
    report = convert_numerics(unet, "w4a4")
    convs = {path for path, m in unet.named_modules() if isinstance(m, SVDQuantConv2d)}
    assert convs
    assert not convs & {conversion.path for conversion in report}
    assert all(unet.get_submodule(path).numerics == "w4a8" for path in convs)


def test_moving_keeps_dtypes_and_the_codes(unet: UNet2DConditionModel) -> None:
    layer = unet.get_submodule("mid_block.resnets.0.conv1")
    before = {name: tensor.dtype for name, tensor in layer.named_buffers()}
    layer.to(torch.float16)
    assert {name: tensor.dtype for name, tensor in layer.named_buffers()} == before
    state = layer.state_dict()
    empty = SVDQuantConv2d.empty_like(nn.Conv2d(64, 64, 3, 1, 1), "w4a8", rank=4)
    empty.load_state_dict(state, assign=True)
    x = torch.randn(1, 64, 4, 4)
    assert torch.equal(empty(x), layer(x))


def test_patches_are_what_unfold_gives() -> None:
    """Every output pixel once: the same rows, in the order of taps first."""
    conv, x = nn.Conv2d(5, 2, 3, 2, 1), torch.randn(2, 5, 6, 7)
    stats = collect(nn.Sequential(conv), ["0"], partial(_run, conv, x))["0"]
    rows = F.unfold(x, 3, padding=1, stride=2).view(2, 5, 9, -1).permute(0, 3, 2, 1).reshape(-1, 9, 5)
    expected = F.pad(rows, (0, 59)).flatten(1)
    assert stats.samples_SK.shape == expected.shape
    assert torch.equal(stats.samples_SK.sort(0).values, expected.sort(0).values)
    assert torch.equal(stats.absmax_K.view(9, 64)[3, :5], x.abs().amax((0, 2, 3)))
