"""Weights that a recipe names: found, quantized once and reused, ready-made in their own numerics, random, or refused by name."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from loragraft.backbones import external, load
from loragraft.backbones.flux1_encoders import TEXT_PARTS
from loragraft.backbones.load import find_spec, load_backbone
from loragraft.backbones.sampler import generate_images
from loragraft.backbones.spec import Backbone
from loragraft.backbones.text_encoders import RandomEncoders
from loragraft.quantization.checkpoint import load_quantized, quantized_layers
from loragraft.quantization.dialects.comfyui import save_comfyui
from loragraft.quantization.dialects.detection import load_any
from loragraft.quantization.dialects.nunchaku_lite import save_lite
from loragraft.quantization.tensor_file import CheckpointError
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import WeightsConfig
from loragraft.train.preflight_command import as_stored


def opened(
    path: Path | str, cache: Path, base: str = "flux1-dev", profile: str | None = "native", **more: object
) -> Backbone:
    return load_backbone(base, profile, "cpu", cache, WeightsConfig(path=str(path), **more))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def int4(flux_cache: Path) -> Path:
    """Our INT4 folder of the tiny transformer, native."""
    (folder,) = (flux_cache / "bases").glob("flux1-dev-native-*")
    return folder


@pytest.fixture(scope="module")
def comfyui_file(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory, quick_quantizer: None) -> Path:
    """A single W4A4 file, as ComfyUI reads it."""
    root = tmp_path_factory.mktemp("comfyui")
    model = opened(flux_folder, root, profile="interchange").transformer
    (folder,) = (root / "bases").iterdir()
    save_comfyui(load_quantized(folder, FluxTransformer2DModel), root / "svdq-int4.safetensors")
    del model
    return root / "svdq-int4.safetensors"


def test_a_pipeline_is_quantized_once_and_reused(
    flux_folder: Path, flux_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in flux_cache.rglob("*")}
    first, again = opened(flux_folder, flux_cache), opened(flux_folder, flux_cache)
    assert {path: path.stat().st_mtime_ns for path in flux_cache.rglob("*")} == before
    assert "quantizing" not in capsys.readouterr().err
    assert first.base_id == again.base_id
    assert first.profile == "native" and first.resolution == 1024
    assert first.ledger.to_dict()["layers"] == {"w4a8": 34, "w4a16": 6, "fp32": 10}


def test_the_transformers_folder_alone_finds_the_pipeline_around_it(flux_folder: Path, flux_cache: Path) -> None:
    assert opened(flux_folder / "transformer", flux_cache).encoders.id == opened(flux_folder, flux_cache).encoders.id


def test_16_bit_stays_16_bit_where_asked(flux_folder: Path, flux_cache: Path) -> None:
    backbone = opened(flux_folder, flux_cache, profile=None)
    assert backbone.profile is None
    assert not quantized_layers(backbone.transformer)


def test_a_ready_made_int4_folder_needs_encoders_and_keeps_its_profile(
    int4: Path, flux_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"holds a transformer alone.*weights\.encoders=FOLDER"):
        opened(int4, tmp_path)
    backbone = opened(int4, tmp_path, profile="interchange", encoders=str(flux_folder))
    assert backbone.profile == "native"
    assert "it runs in that, not in interchange" in capsys.readouterr().err
    assert not (tmp_path / "bases").exists(), "it was quantized again"
    with pytest.raises(ValueError, match="its 16-bit weights are not there"):
        opened(int4, tmp_path, profile=None, encoders=str(flux_folder))


def test_an_imported_file_runs_in_its_own_numerics(comfyui_file: Path, flux_folder: Path, tmp_path: Path) -> None:
    backbone = opened(comfyui_file, tmp_path, encoders=str(flux_folder))
    assert backbone.profile == "interchange"
    assert {layer.numerics for layer in quantized_layers(backbone.transformer).values()} == {"w4a4", "w4a16"}
    backbone.resolution = 64
    (image,) = generate_images(backbone, ["a heart"], [0], steps=1)
    assert image.size == (64, 64)


def test_ready_made_weights_state_their_profile_in_a_header(
    comfyui_file: Path, int4: Path, flux_folder: Path, tmp_path: Path
) -> None:
    spec = find_spec("flux1-dev")

    def stated(path: object) -> str | None:
        return external.stated_profile(spec, WeightsConfig(path=str(path)))

    assert stated(comfyui_file) == "interchange"
    assert stated(int4) == "native"
    lite = save_lite(load_any(comfyui_file)[0], tmp_path / "lite")
    assert stated(lite) == "interchange"
    assert stated(flux_folder) is stated(tmp_path / "nowhere") is stated("nobody/FLUX.1-dev") is None
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(comfyui_file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors is truncated: tensor '"):
        stated(cut)
    recipe = load_recipe("marketing", ["base=flux1-dev", f"weights.path={comfyui_file}"])
    assert (recipe.numerics, as_stored(recipe).numerics) == ("native", "interchange")


def test_the_transformer_waits_where_it_is_told_to(
    flux_folder: Path, flux_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[str] = []
    monkeypatch.setattr(Backbone, "onto_device", lambda self: moves.append(self.spec.name))
    given = WeightsConfig(path=str(flux_folder))
    waiting = load_backbone("flux1-dev", "native", "cpu", flux_cache, given, True)
    assert moves == []
    load_backbone("flux1-dev", "native", "cpu", flux_cache, given)
    assert moves == ["flux1-dev"]
    order: list[str] = []
    encode = waiting.encoders.encode_text
    monkeypatch.setattr(Backbone, "onto_device", lambda self: order.append("moved"))
    monkeypatch.setattr(waiting.encoders, "encode_text", lambda texts: (order.append("text"), encode(texts))[1])
    waiting.resolution = 64
    generate_images(waiting, ["a", "b"], [0, 1], steps=1, batch_size=1)
    assert order == ["text", "text", "text", "moved"]


def test_random_weights_have_the_configured_shapes_and_draw(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flux_folder: Path
) -> None:
    spec = find_spec("flux1-dev")
    assert spec.external is not None
    config = json.loads((flux_folder / "transformer" / "config.json").read_text())
    vae = json.loads((flux_folder / "vae" / "config.json").read_text())
    small = dataclasses.replace(
        spec,
        external=dataclasses.replace(
            spec.external, config=config,
            random_encoders=partial(
                RandomEncoders, "flux1", (AutoencoderKL, vae), (FlowMatchEulerDiscreteScheduler, {}), (6, 64, 32),
                text_parts=TEXT_PARTS,
            ),
        ),
    )  # fmt: skip
    monkeypatch.setattr(load, "find_spec", lambda _: small)
    made = partial(load_backbone, "flux1-dev", "native", "cpu", tmp_path)
    backbone = made(WeightsConfig(random=True))
    assert backbone.base_id.startswith("random-0-") and backbone.profile == "native"
    assert backbone.ledger.to_dict()["layers"] == {"w4a8": 34, "w4a16": 6, "fp32": 10}
    backbone.resolution = 64
    (image,) = generate_images(backbone, ["a heart"], [0], steps=1)
    assert image.size == (64, 64)
    assert made(WeightsConfig(random=True)).fingerprint() == backbone.fingerprint()
    assert made(WeightsConfig(random=True, seed=1)).fingerprint() != backbone.fingerprint()
    assert list(tmp_path.iterdir()) == [], "files were written"


def test_without_weights_the_three_ways_are_named(tmp_path: Path) -> None:
    for weights in (None, WeightsConfig()):
        with pytest.raises(ValueError, match=r"weights\.path=.*allow_download=true.*weights\.random=true"):
            load_backbone("flux1-dev", "native", "cpu", tmp_path, weights)
    with pytest.raises(ValueError, match="the weights of pocket travel with the package"):
        opened("somewhere", tmp_path, base="pocket")
    with pytest.raises(ValueError, match="do not travel with the package"):
        load.load_16bit(find_spec("flux1-dev"))


def test_a_path_that_is_not_there_names_the_nearest(flux_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no such file or folder; did you mean {flux_folder}"):
        opened(flux_folder.with_name("FLUX1-tiny"), tmp_path)


def test_another_pipelines_folder_is_named(flux_folder: Path, flux_cache: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(flux_folder, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(ValueError, match="is a StableDiffusionXLPipeline; flux1-dev needs a FluxPipeline"):
        opened(folder, tmp_path / "cache")
    with pytest.raises(ValueError, match="no diffusers pipeline"):
        opened(flux_folder, flux_cache, encoders=str(tmp_path))


def test_dev_and_schnell_are_not_confused(flux_folder: Path, schnell_folder: Path, int4: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean base=flux1-dev"):
        opened(flux_folder, tmp_path, base="flux1-schnell")
    with pytest.raises(ValueError, match="did you mean base=flux1-schnell"):
        opened(schnell_folder, tmp_path)
    with pytest.raises(ValueError, match="did you mean base=flux1-dev"):
        opened(int4, tmp_path, base="flux1-schnell", encoders=str(schnell_folder))
    assert not (tmp_path / "bases").exists(), "it was quantized before it was looked at"


def test_a_damaged_cache_says_that_it_may_be_deleted(flux_folder: Path, flux_cache: Path, tmp_path: Path) -> None:
    root = shutil.copytree(flux_cache, tmp_path / "cache")
    (file,) = (root / "bases").glob("flux1-dev-*/diffusion_pytorch_model.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is a cache: delete it"):
        opened(flux_folder, root)


class _Response:
    status_code, headers, request = 403, {}, None


@pytest.mark.parametrize(
    ("raised", "allow", "expected"),
    [
        (LocalEntryNotFoundError("no"), False, "nothing is fetched unless you say weights.allow_download=true"),
        (LocalEntryNotFoundError("no route"), True, "the Hub could not be reached"),
        (GatedRepoError("gated", response=_Response()), True, "accepted their licence"),  # type: ignore[arg-type]
        (RepositoryNotFoundError("none", response=_Response()), True, "no such repository on the Hub"),  # type: ignore[arg-type]
    ],
)
@pytest.mark.parametrize("name", ["nobody/FLUX.1-dev", "nobody/files/svdq-int4.safetensors"])
def test_the_hub_is_asked_only_on_request_and_its_refusals_are_sentences(
    name: str, raised: Exception, allow: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def refuse(*_: object, local_files_only: bool, **__: object) -> str:
        asked.append(local_files_only)
        raise raised

    monkeypatch.setattr(external, "snapshot_download", refuse)
    monkeypatch.setattr(external, "hf_hub_download", refuse)
    with pytest.raises(ValueError, match=expected):
        external.find(name, allow, external.PIPELINE_FILES)
    assert asked == [not allow]


def test_what_the_hub_gives_is_used(flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr(
        external, "snapshot_download", lambda name, **how: (seen.update(how, name=name), str(flux_folder))[1]
    )
    patterns = (*external.PIPELINE_FILES, "transformer/*")
    assert external.find("nobody/FLUX.1-dev", True, patterns) == flux_folder
    assert seen["name"] == "nobody/FLUX.1-dev" and "transformer/*" in seen["allow_patterns"]  # type: ignore[operator]
    asked: list[object] = []
    given = WeightsConfig(path="nobody/int4", encoders=str(flux_folder), allow_download=True)
    bare = flux_folder / "transformer"
    monkeypatch.setattr(
        external, "snapshot_download", lambda _, allow_patterns, **how: (asked.append(allow_patterns), bare)[1]
    )
    spec = find_spec("flux1-dev")
    assert external.locate(spec, spec.external, given).transformer == bare  # type: ignore[arg-type]
    assert "*.safetensors" not in asked[0] and "*.safetensors" in asked[1], "a pipeline's second copy would be fetched"  # type: ignore[operator]
    monkeypatch.setattr(external, "hf_hub_download", lambda name, file, **_: f"/cache/{name}/{file}")
    assert external.find("a/b/c/d.safetensors", True, ()) == Path("/cache/a/b/c/d.safetensors")
