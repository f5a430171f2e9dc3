"""What every base must do, on a CPU, tiny and in its own architecture. A new base is tested by its file in `backbones/` alone."""

import inspect
import json
import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting
from PIL import Image
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from loragraft.adapters.checkpoint import load_adapter
from loragraft.adapters.graft import graft, ungraft
from loragraft.adapters.inject import expand_targets, inject_adapter, load_factors, remove_adapter
from loragraft.backbones.file_size import base_bytes, predicted_bytes, stored_bytes
from loragraft.backbones.load import list_bases, load_backbone
from loragraft.backbones.sampler import build_pipeline, generate_images, other_pipeline
from loragraft.backbones.skeleton import plan_architecture
from loragraft.backbones.spec import Backbone
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.checkpoint import CONFIG_NAME, WEIGHTS_NAME, base_state, quantized_layers
from loragraft.quantization.names import match_paths
from loragraft.quantization.settings import QuantSettings
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import AdapterConfig, WeightsConfig
from loragraft.train import lora
from loragraft.train.memory import set_checkpointing
from loragraft.train.preflight import preflight
from loragraft.train.run_folder import RunFolder

STEPS = 3


@pytest.fixture(scope="module")
def backbone(case: Any) -> Backbone:
    """The native base. Tests leave it as they found it."""
    return case.load()


@pytest.fixture(scope="module")
def plain(case: Any) -> nn.Module:
    """The 16-bit denoiser. Tests leave it as they found it."""
    return case.plain()


def stood_for(layer: Any) -> torch.Tensor:
    """The weight that a quantized layer stands for, in its 16-bit shape."""
    return layer.kernel_weight() if hasattr(layer, "kernel_weight") else layer.dequantized_weight()


def test_what_is_quantized_is_near_its_16_bit_weight(case: Any, backbone: Backbone, plain: nn.Module) -> None:
    layers, spec = quantized_layers(backbone.transformer), case.spec
    patterns = [re.compile(pattern) for pattern in (*spec.quantize, *spec.quantize_w4a16, *spec.quantize_conv)]
    weights = (path for path, module in plain.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
    assert set(layers) == {path for path in weights if any(pattern.fullmatch(path) for pattern in patterns)}
    for path, layer in layers.items():
        assert relative_rms(stood_for(layer), plain.get_parameter(f"{path}.weight")) < 0.12, path
    assert relative_rms(case.predict(backbone), case.predict(backbone, plain)) < 0.15


def test_the_ledger_accounts_for_every_layer(case: Any, backbone: Backbone, plain: nn.Module) -> None:
    rows = {row.path: row.numerics for row in backbone.ledger.rows}
    layers = {path for path, module in plain.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert rows.keys() == layers
    for patterns, numerics in ((case.spec.quantize, "w4a8"), (case.spec.quantize_w4a16, "w4a16")):
        for path in (path for matched in match_paths(patterns, list(rows)).values() for path in matched):
            assert rows[path] == numerics, path
    assert {row.backend for row in backbone.ledger.rows if row.numerics == "fp32"} <= {"torch"}


@torch.no_grad()
def dequantized(quantized: nn.Module, plain: nn.Module) -> nn.Module:
    """`plain` with the values that `quantized` stands for."""
    state = base_state(quantized)
    for name, parameter in plain.named_parameters():
        if name in state:
            parameter.copy_(state[name])
    for path, layer in quantized_layers(quantized).items():
        plain.get_parameter(f"{path}.weight").copy_(stood_for(layer))
    return plain


def adapter_gradients(case: Any, backbone: Backbone, model: nn.Module) -> list[torch.Tensor]:
    parameters = inject_adapter(model, AdapterConfig(rank=2, alpha=2), expand_targets(model, case.spec.lora_targets))
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    torch.autograd.backward(case.predict(backbone, model).square().mean())
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@pytest.mark.parametrize(("profile", "off"), [("weight-only", 1e-4), ("native", 0.2)])
def test_the_gradient_is_that_of_the_dequantized_model(case: Any, profile: str, off: float) -> None:
    """Up to rounding where activations are not quantized; INT8 activations leave their own error, which a wrong term exceeds."""
    backbone = case.load(profile)
    backbone.set_training_numerics("raw", "dequantized")
    twin = dequantized(backbone.transformer, case.plain())
    ours, theirs = (adapter_gradients(case, backbone, model) for model in (backbone.transformer, twin))
    targets = expand_targets(case.load().transformer, case.spec.lora_targets)
    assert len(ours) == len(theirs) == 2 * len(targets)
    for mine, right in zip(ours, theirs, strict=True):
        assert relative_rms(mine, right) < off


def command(case: Any, out: Path) -> list[str]:
    return ["--recipe", "marketing", "--cpu", "--out", str(out), *case.overrides, f"train.steps={STEPS}"]


@pytest.fixture(scope="module")
def run(case: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps through `train/lora.py`; skips for a base that is not trained on."""
    if case.spec.refuses_training:
        pytest.skip(f"{case.spec.name} is not trained on: {case.spec.refuses_training}")
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert lora.main(command(case, out)) == 0
    return out


def test_it_trains_or_says_on_which_base_to_train(
    case: Any, backbone: Backbone, request: pytest.FixtureRequest
) -> None:
    if case.spec.refuses_training:
        with pytest.raises(ValueError, match="base=") as refused:
            lora.main(["--recipe", "marketing", "--cpu", f"base={case.spec.name}", "weights.random=true"])
        assert any(f"base={name}" in str(refused.value) for name in list_bases() if name != case.spec.name)
        if sibling := re.search(r"Train on base=([\w-]+)", case.spec.refuses_training):
            assert case.layers(case.spec.name) == case.layers(sibling[1]), "its adapters are not adapters of this one"
        return
    run: Path = request.getfixturevalue("run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["grad_norm"] > 0 for line in lines)
    assert (run / "samples" / f"step_{STEPS:06d}.png").is_file()
    adapter = load_adapter(run / "adapter")
    assert adapter.metadata["base"] == case.spec.name and adapter.base_id == backbone.base_id
    assert list(adapter.pairs) == sorted(expand_targets(backbone.transformer, case.spec.lora_targets))
    assert all(bool(up.any()) for _, up in adapter.pairs.values()), "a target learned nothing"


def test_interrupted_and_resumed_it_is_the_same_to_the_bit(
    case: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = RunFolder.append_metrics

    def interrupting(folder: RunFolder, metrics: dict[str, float | int]) -> None:
        append(folder, metrics)
        if metrics["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", interrupting)
        assert lora.main(command(case, tmp_path / "run")) == 130
    assert not (tmp_path / "run" / "adapter").exists()
    assert lora.main(command(case, tmp_path / "run")) == 0
    whole, resumed = load_adapter(run / "adapter").pairs, load_adapter(tmp_path / "run" / "adapter").pairs
    assert whole.keys() == resumed.keys()
    for path, factors in whole.items():
        assert all(torch.equal(a, b) for a, b in zip(factors, resumed[path], strict=True)), path


@torch.no_grad()
def test_a_graft_is_the_adapter_kept_apart_and_its_undoing_the_base(
    case: Any, backbone: Backbone, tmp_path: Path
) -> None:
    adapter, model = case.adapter(tmp_path), backbone.transformer
    before, bare = backbone.fingerprint(), case.predict(backbone)
    inject_adapter(model, AdapterConfig(rank=3, alpha=3), case.spec.lora_targets)
    load_factors(model, adapter.pairs)
    apart = case.predict(backbone)
    remove_adapter(model)
    assert backbone.fingerprint() == before
    graft(model, adapter)
    merged = case.predict(backbone)
    assert relative_rms(merged, bare) > 0.05, "the adapter does nothing"
    assert relative_rms(merged, apart) < 0.05 * relative_rms(merged, bare)
    ungraft(model, adapter.name)
    assert backbone.fingerprint() == before
    assert torch.equal(case.predict(backbone), bare)


@torch.no_grad()
def test_the_stock_pipeline_reads_the_adapter_file(case: Any, backbone: Backbone, tmp_path: Path) -> None:
    adapter, model = case.adapter(tmp_path), case.plain()
    pipeline = build_pipeline(case.spec.family, model, backbone.encoders)
    if not hasattr(pipeline, "load_lora_weights"):
        pytest.skip(f"diffusers' {type(pipeline).__name__} reads no LoRA files")
    graft(model, adapter, any_base=True)
    ours = case.predict(backbone, model)
    ungraft(model, adapter.name)
    bare = case.predict(backbone, model)
    pipeline.load_lora_weights(tmp_path, adapter_name="strong")
    assert pipeline.get_list_adapters(), "no key of the file was used"
    theirs = case.predict(backbone, model)
    assert relative_rms(ours, bare) > 0.05
    assert relative_rms(theirs, ours) < 1e-3


def picture(seed: int) -> Image.Image:
    low = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(low).resize((64, 64), Image.Resampling.BILINEAR)


def stock(task: Literal["image_to_image", "inpaint"], case: Any, backbone: Backbone) -> Any:
    """The stock pipeline for a task around the quantized denoiser; skips where diffusers has none."""
    family, auto = (
        case.spec.family,
        {"image_to_image": AutoPipelineForImage2Image, "inpaint": AutoPipelineForInpainting},
    )
    plain = build_pipeline(family, backbone.transformer, backbone.encoders)
    try:
        known: type[Any] | None = type(auto[task].from_pipe(plain, **family.options))
    except ValueError:
        known = None
    assert getattr(family, task) is known, "the family does not name what diffusers has"
    if known is None:
        with pytest.raises(ValueError, match="draw from text alone"):
            other_pipeline(family, plain, task)
        pytest.skip(f"diffusers has no {task} pipeline beside {type(plain).__name__}")
    return other_pipeline(family, plain, task)


@torch.no_grad()
def draw(pipeline: Any, backbone: Backbone, caption: str, **how: Any) -> torch.Tensor:
    """Latents of one picture from a caption, unscaled by guidance."""
    text = backbone.encoders.encode_text([caption])
    taken = inspect.signature(pipeline.__call__).parameters
    size = {name: 64 for name in ("height", "width") if name in taken}
    found = pipeline(
        **text, **how, **size, num_inference_steps=2, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0), output_type="latent",
    )  # fmt: skip
    return found.images


def test_image_to_image_through_the_stock_pipeline(case: Any, backbone: Backbone) -> None:
    pipeline = stock("image_to_image", case, backbone)
    first, second = (draw(pipeline, backbone, "a heart", image=picture(seed), strength=0.5) for seed in (0, 1))
    assert first.isfinite().all()
    assert not torch.equal(first, second), "the picture was not looked at"
    assert not torch.equal(first, draw(pipeline, backbone, "umbrella", image=picture(0), strength=0.5))


def test_inpainting_through_the_stock_pipeline_keeps_what_is_not_masked(case: Any, backbone: Backbone) -> None:
    pipeline = stock("inpaint", case, backbone)
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 64, 32))
    heart, umbrella = (
        draw(pipeline, backbone, caption, image=picture(0), mask_image=mask, strength=1.0)
        for caption in ("a heart", "umbrella")
    )
    same = (heart == umbrella).flatten().float().mean().item()
    assert heart.isfinite().all()
    assert same == pytest.approx(0.5, abs=0.01), "not the masked half and nothing else follows the caption"


def test_preflight_counts_its_weights_exactly_and_knows_every_op(case: Any) -> None:
    recipe = load_recipe("marketing", [*case.overrides, "train.cuda_graph=never"])
    found = preflight(recipe, case.cache)
    assert found.unknown == ()
    assert found.peak == max(stage.peak for stage in found.stages)
    nn.Module.to(model := case.load().transformer, dtype=torch.bfloat16)
    nbytes = sum(-(-t.nbytes // 512) * 512 for t in (*model.parameters(), *model.buffers()))
    assert found.train.at_peak["INT4 weights"] + found.train.at_peak["16-bit weights"] == nbytes
    trained = inject_adapter(model, recipe.adapter, case.spec.lora_targets)
    assert found.adapter_parameters == sum(parameter.numel() for parameter in trained)


def kept_and_gradients(case: Any, policy: Literal["none", "block"]) -> tuple[int, list[torch.Tensor | None]]:
    """(bytes that autograd keeps of a step, gradients of the adapter) under a checkpointing policy."""
    backbone, sizes = case.load(), []
    parameters = inject_adapter(backbone.transformer, AdapterConfig(rank=2, alpha=2), case.spec.lora_targets)
    set_checkpointing(backbone.transformer, policy)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = case.predict(backbone).square().mean()
    torch.autograd.backward(loss)
    return sum(sizes), [parameter.grad for parameter in parameters]


def test_checkpointing_keeps_less_and_changes_no_gradient(case: Any) -> None:
    """What a policy returns says which blocks were told, not that they do it."""
    (all_kept, without), (kept, gradients) = (kept_and_gradients(case, policy) for policy in ("none", "block"))
    assert kept < all_kept
    for ours, expected in zip(gradients, without, strict=True):
        assert ours is not None and expected is not None and torch.equal(ours, expected)


def test_the_file_is_as_large_as_its_configuration_says(case: Any, backbone: Backbone) -> None:
    if case.spec.external is None:
        folder = case.spec.transformer_int4["native"]
        config = json.loads((folder / CONFIG_NAME).read_text())
        ranks = {layer["rank"] for layer in config.pop("quantization_config")["layers"].values()}
        plan = partial(plan_architecture, case.spec, QuantSettings(rank=max(ranks)))
        predicted = predicted_bytes(case.spec.transformer_class, config, plan)
    else:
        (folder,) = (case.cache / "bases").glob(f"{case.spec.name}-native-*")
        predicted = base_bytes(case.spec, "native")
    assert (folder / WEIGHTS_NAME).stat().st_size == predicted
    assert stored_bytes(backbone.transformer) == pytest.approx(predicted, rel=0.01)


def test_random_weights_have_the_same_layers_and_draw(case: Any, backbone: Backbone, tmp_path: Path) -> None:
    if case.spec.external is None:
        pytest.skip(f"the weights of {case.spec.name} travel with the package")
    made = load_backbone(case.spec.name, "native", "cpu", tmp_path, WeightsConfig(random=True))
    made.resolution = backbone.resolution
    assert [(row.path, row.numerics) for row in made.ledger.rows] == [
        (row.path, row.numerics) for row in backbone.ledger.rows
    ]
    for drawing in (made, backbone):
        (image,) = generate_images(drawing, ["a heart"], [0], steps=1)
        assert image.size == (64, 64)
    assert not list(tmp_path.iterdir()), "files were written"
