"""Export -> import -> the same update in every style; the scale is there without a header; other programs' rules say the same."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux_lora_to_diffusers,
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from torch import Tensor

from loragraft.adapters.checkpoint import Adapter, load_adapter
from loragraft.adapters.formats.families import UNETS, Family
from loragraft.adapters.formats.file_metadata import without_paths
from loragraft.adapters.formats.writing import STYLES, export_adapter, styled
from loragraft.disk import DiskFullError
from loragraft.quantization.dialects.flux_names import flux_linears
from loragraft.quantization.tensor_file import read_tensors, write_tensors

Save = Callable[..., Path]
K = 16
METADATA = {"name": "mine", "base": "tiny", "base_id": "5" * 64, "contract": "portable", "steps": 7,
            "recipe": {"data": {"resolution": 64}, "sample": {"prompts": ["a cat"]}}}  # fmt: skip


def flux_adapter(draw, width: int = K) -> Adapter:
    """Every kind of layer; q and k share A, v has its own; one block without its MLP."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for module, paths in flux_linears({"num_layers": 1, "num_single_layers": 2, "guidance_embeds": True}).items():
        if module == "single_blocks.1.linear1":
            paths = paths[:3]
        shared = draw(2, width)
        for path in paths:
            outputs = 4 * width if path.endswith("proj_mlp") else width
            down = shared if path.endswith(("to_q", "to_k")) else draw(3, width)
            pairs[path] = down, draw(outputs, down.shape[0])
    return Adapter("mine", METADATA, pairs, family=Family("flux", False))


def unet_adapter(draw, name: str) -> Adapter:
    """Every layer of the published UNet, one input and one output each, rank 1; convolutions as such."""
    pairs = {}
    for path, shape in UNETS[name].layers.items():
        kernel = shape[2:]
        pairs[path] = draw(1, 1, *kernel), draw(1, 1, *(1 for _ in kernel))
    return Adapter("mine", METADATA, pairs, "unet", family=Family(name, False))


def update(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[1].double().flatten(1) @ pair[0].double().flatten(1)


def check_same(one: Adapter, other: Adapter) -> None:
    assert one.pairs.keys() == other.pairs.keys()
    for path, pair in one.pairs.items():
        assert torch.equal(update(pair), update(other.pairs[path])), path


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", ["flux", *UNETS])
def test_roundtrip(draw, tmp_path: Path, style: str, kind: str) -> None:
    """Bit by bit, by file and by a file whose header is gone."""
    adapter = flux_adapter(draw) if kind == "flux" else unet_adapter(draw, kind)
    file, *_ = export_adapter(adapter, style, tmp_path / "out")
    again = load_adapter(file)
    check_same(adapter, again)
    assert (again.name, again.component, again.metadata) == (adapter.name, adapter.component, METADATA)
    bare = tmp_path / "bare.safetensors"
    write_tensors(bare, read_tensors(file)[0], {})
    check_same(adapter, load_adapter(bare))


def test_unscaled_factors_are_never_written(draw, save: Save, tmp_path: Path) -> None:
    """A kohya file with alpha = 6 at rank 2: the factor 3 is in B afterwards, whatever a program makes of alpha."""
    name = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = draw.lora(name, K, K) | {f"{name}.alpha": torch.tensor(6.0)}
    expected = 3 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    adapter = load_adapter(save(tensors))
    for style in STYLES:
        written = read_tensors(export_adapter(adapter, style, tmp_path / f"{style}.safetensors")[0])[0]
        down, up = (
            next(t for key, t in written.items() if key.endswith(ends))
            for ends in (("lora_A.weight", "lora_down.weight"), ("lora_B.weight", "lora_up.weight"))
        )
        torch.testing.assert_close(up @ down, expected)
        alphas = {key: float(tensor) for key, tensor in written.items() if key.endswith(".alpha")}
        assert set(alphas.values()) == (set() if style == "diffusers" else {2.0})


def test_kohya_fuses_as_few_ranks_as_there_are(draw) -> None:
    """q and k share 2 ranks, v has 3: 5 in qkv; the MLP's 3 more in linear1. Missing parts are zero."""
    tensors = styled(flux_adapter(draw), "kohya")
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (5, K)
    assert tensors["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (8, K)
    lacking = tensors["lora_unet_single_blocks_1_linear1.lora_up.weight"]
    assert lacking.shape == (7 * K, 5) and not lacking[3 * K :].any() and lacking[: 3 * K].any()
    assert tensors["lora_unet_single_blocks_0_linear1.alpha"].item() == 8


def test_kohya_as_diffusers_reads_it(draw) -> None:
    """The blocks' layers but linear1, whose width diffusers' converter takes for FLUX.1's."""
    adapter = flux_adapter(draw)
    tensors = {
        key: tensor for key, tensor in styled(adapter, "kohya").items() if "_blocks_" in key and "linear1" not in key
    }
    converted = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    paths = {key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in converted if "lora_A" in key}
    assert paths == {path for path in adapter.pairs if "blocks." in path and not (path.startswith("single") and (".attn." in path or "mlp" in path))}  # fmt: skip
    for path in paths:
        got = converted[f"transformer.{path}.lora_B.weight"] @ converted[f"transformer.{path}.lora_A.weight"]
        torch.testing.assert_close(got, update(adapter.pairs[path]).float())


@pytest.mark.parametrize("style", ["kohya", "comfyui"])
def test_flux_as_comfyui_patches_it(draw, style: str) -> None:
    """comfy/lora.py: alpha / r up down onto BFL's weight, of `transformer.<path>` onto the rows that the path is."""
    adapter = flux_adapter(draw)
    tensors = styled(adapter, style)
    weights: dict[str, Tensor] = {}
    for module, paths in flux_linears({"num_layers": 1, "num_single_layers": 2, "guidance_embeds": True}).items():
        rows = [4 * K if path.endswith("proj_mlp") else K for path in paths]
        weights[module] = torch.zeros(sum(rows), K)
        parts = weights[module].split(rows)
        if style == "kohya":
            names = {f"lora_unet_{module.replace('.', '_')}": (weights[module], ("lora_down", "lora_up"))}
        else:
            names = {f"transformer.{p}": (part, ("lora_A", "lora_B")) for p, part in zip(paths, parts, strict=True)}
        for name, (rows_of_weight, (down, up)) in names.items():
            if f"{name}.{up}.weight" in tensors:
                patch = tensors[f"{name}.{up}.weight"] @ tensors[f"{name}.{down}.weight"]
                scale = tensors.pop(f"{name}.alpha") / tensors.pop(f"{name}.{down}.weight").shape[0]
                tensors.pop(f"{name}.{up}.weight")
                swap = (
                    style == "comfyui" and module == "final_layer.adaLN_modulation.1"
                )  # flux_to_diffusers' swap_scale_shift
                rows_of_weight += scale * (torch.cat(patch.chunk(2)[::-1]) if swap else patch)
        for path, part in zip(paths, parts, strict=True):
            expected = update(adapter.pairs[path]).float() if path in adapter.pairs else torch.zeros_like(part)
            swapped = torch.cat(expected.chunk(2)[::-1]) if path == "norm_out.linear" else expected
            torch.testing.assert_close(part, swapped)
    assert tensors == {}


@pytest.mark.parametrize(
    ("kind", "style"), [("sd15", "kohya"), ("sdxl", "kohya"), ("sd15", "comfyui"), ("sdxl", "comfyui")]
)
def test_unets_as_diffusers_reads_them(draw, kind: str, style: str) -> None:
    """Every layer of the published UNet by kohya's names, diffusers' or LDM's: its converter finds path, factors and alpha.

    But for SDXL's added conditions under diffusers' flattened names: the converter drops the numbers of both linears.
    """
    adapter = unet_adapter(draw, kind)
    if style == "comfyui":
        kept = {path: pair for path, pair in adapter.pairs.items() if not path.startswith("add_embedding")}
        adapter = replace(adapter, pairs=kept)
    config = SimpleNamespace(layers_per_block=2)
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(
        _maybe_map_sgm_blocks_to_diffusers(styled(adapter, style), config)
    )
    assert len(converted) == 2 * len(adapter.pairs) and len(alphas) == len(adapter.pairs)
    for path, (down, up) in adapter.pairs.items():
        old = path.replace(".attn1.", ".attn1.processor.").replace(".attn2.", ".attn2.processor.").removesuffix(".0")
        name = f"unet.{old}_lora" if ".processor." in old else f"unet.{path}.lora"
        assert torch.equal(converted[f"{name}.down.weight"], down) and torch.equal(converted[f"{name}.up.weight"], up)


@pytest.mark.parametrize("style", ["diffusers", "comfyui"])
def test_a_stock_pipeline_loads_it(draw, tmp_path: Path, plain_flux: FluxTransformer2DModel, style: str) -> None:
    """Through load_lora_weights: header in one case, .alpha tensors in the other, the same update."""
    paths = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp", "transformer_blocks.0.ff.net.2")
    shapes = {path: plain_flux.get_submodule(path).weight.shape for path in paths}
    pairs = {path: (draw(rank, shape[1]), draw(shape[0], rank)) for rank, (path, shape) in enumerate(shapes.items(), 2)}
    adapter = Adapter("mine", METADATA, pairs, family=Family("flux", False))
    file, *_ = export_adapter(adapter, style, tmp_path)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=plain_flux, **parts)
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="ours")
    for path, pair in pairs.items():
        torch.testing.assert_close(plain_flux.get_submodule(path).get_delta_weight("ours"), update(pair).float())


def test_local_paths_become_names() -> None:
    found = {
        "/data/photos/": "photos",
        "C:\\runs\\a.yaml": "a.yaml",
        "made from /home/me/x.png and C:\\Users\\me\\y.png.": "made from x.png and y.png.",
        "https://example.org/home/me": "https://example.org/home/me",
        "org/name": "org/name",
        "a cat / a dog": "a cat / a dog",
    }
    assert without_paths(list(found)) == list(found.values())


def test_the_header_says_what_others_read_and_nothing_local(draw, tmp_path: Path) -> None:
    local = {"cache": "/home/someone/data", "more": [{"at": "C:\\Users\\x\\w.safetensors"}, "~/runs/mine", "org/name"]}
    adapter = flux_adapter(draw, 3072 // 64)
    adapter = replace(adapter, family=Family("flux", True), metadata={**METADATA, **local})
    file, *_ = export_adapter(adapter, "comfyui", tmp_path)
    _, header = read_tensors(file)
    assert header["modelspec.architecture"] == "flux-1-dev/lora" and header["modelspec.sai_model_spec"] == "1.0.1"
    assert header["modelspec.resolution"] == "64x64" and header["ss_steps"] == "7"
    assert header["ss_base_model_version"] == "flux1" and header["ss_network_dim"] == "Dynamic"
    assert "lora_adapter_metadata" not in header
    about = json.loads(header["loragraft"])
    assert (about["cache"], about["more"]) == ("data", [{"at": "w.safetensors"}, "mine", "org/name"])
    assert not any("someone" in value or "Users" in value for value in header.values())
    kept, _ = export_adapter(replace(adapter, name="other"), "comfyui", tmp_path)
    assert read_tensors(kept)[1]["modelspec.hash_sha256"] == header["modelspec.hash_sha256"]


@pytest.mark.parametrize("family", ["flux", *UNETS])
def test_the_workflow_is_a_whole_graph(draw, tmp_path: Path, family: str) -> None:
    """Every link leads to a node, every node to the saved image, the adapter's file is loaded, its prompt is drawn."""
    adapter = flux_adapter(draw) if family == "flux" else unet_adapter(draw, family)
    adapter = replace(adapter, family=Family(family, True))
    file, beside = export_adapter(adapter, "comfyui", tmp_path)
    assert beside.name == "mine.workflow.json"
    graph = json.loads(beside.read_text())
    reached, todo = set(), ["saved"]
    while todo:
        node = todo.pop()
        reached.add(node)
        todo += [value[0] for value in graph[node]["inputs"].values() if isinstance(value, list)]
    assert reached == graph.keys()
    assert graph["lora"]["inputs"]["lora_name"] == file.name
    assert graph["sampler"]["inputs"]["model"] == ["lora", 0]
    assert "a cat" in [node["inputs"].get("text") for node in graph.values()]


def test_an_adapter_and_its_workflow_appear_together(draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without its workflow would be in the way of the same command."""

    def full(path: Path, _: bytes) -> None:
        raise DiskFullError(f"{path} is not written")

    monkeypatch.setattr("loragraft.adapters.formats.writing.write_atomic", full)
    adapter = replace(flux_adapter(draw), family=Family("flux", True))
    with pytest.raises(DiskFullError, match=r"workflow\.json is not written"):
        export_adapter(adapter, "comfyui", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_comfyui_does_not_know_has_no_workflow(draw, tmp_path: Path) -> None:
    assert len(export_adapter(flux_adapter(draw), "comfyui", tmp_path)) == 1


def test_refusals(draw, tmp_path: Path) -> None:
    adapter = flux_adapter(draw)
    with pytest.raises(ValueError, match="also changes text_encoder"):
        export_adapter(replace(adapter, extras={"text_encoder": {"x": torch.ones(1)}}), "kohya", tmp_path)
    with pytest.raises(ValueError, match=r"kohya's names are known for .* the base is unknown"):
        export_adapter(replace(adapter, family=Family("", False)), "kohya", tmp_path)
    huge = {path: (down, up * 1e6) for path, (down, up) in adapter.pairs.items()}
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        export_adapter(replace(adapter, pairs=huge), "diffusers", tmp_path, torch.float16)
    with pytest.raises(ValueError, match="unknown style"):
        export_adapter(adapter, "a1111", tmp_path)
    assert list(tmp_path.iterdir()) == []
    export_adapter(adapter, "kohya", tmp_path)
    with pytest.raises(FileExistsError, match=r"mine\.safetensors exists already"):
        export_adapter(adapter, "kohya", tmp_path)
