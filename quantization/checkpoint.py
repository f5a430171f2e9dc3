"""Our INT4 checkpoint: a diffusers model folder whose `config.json` says how each linear layer and convolution is stored.

    config.json                            the model's own configuration + quantization_config
    diffusion_pytorch_model.safetensors    diffusers' module names; per quantized layer the buffers of its class,
                                           a convolution's over its patches (`conv`)

quantization_config = {quant_method: "loragraft", version, profile, layers: {path: {numerics, group_size, hadamard,
act_unsigned, act_shift, rank, output_error}}} (and act_unsigned_from, where only the later columns are unsigned). Codes are row-major, low nibble = even column; whatever order a kernel wants
is made at load. `base_id` names the weights, not the files: sha256 over the sorted (name, dtype, shape, bytes).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from loragraft.disk import replacing_folder
from loragraft.kernels.act_quant import GELU_SHIFT
from loragraft.quantization.branched import BranchedLinear
from loragraft.quantization.conv import SVDQuantConv2d, is_quantizable
from loragraft.quantization.formats import FORMATS
from loragraft.quantization.linear import SVDQuantLinear, buffer_layout, fits_dtype, share_inputs
from loragraft.quantization.names import named_module, nearest, replace_module
from loragraft.quantization.quantized_linear import make_empty
from loragraft.quantization.settings import Numerics
from loragraft.quantization.tensor_file import CheckpointError, read_tensors, write_tensors

QUANT_METHOD, VERSION = "loragraft", 1
CONFIG_NAME, WEIGHTS_NAME = "config.json", "diffusion_pytorch_model.safetensors"
PROFILES = {"w4a8": "native", "w4a4": "interchange", **{name: name for name in FORMATS}}
BASE_ID_ATTRIBUTE = "loragraft_base_id"
LAYER_KEYS = {"numerics", "group_size", "hadamard", "act_unsigned", "act_shift", "rank"}


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The base's tensors under their checkpoint names, seen through injected adapters and grafts.

    PEFT's `.base_layer` is taken out of the names, its factors are left out, and of a grafted branch only the base's own
    ranks are returned, which a graft leaves in front.
    """
    state = {}
    ranks = {f"{path}.": m.base_rank for path, m in model.named_modules() if isinstance(m, BranchedLinear)}
    for name, tensor in model.state_dict().items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        owner, _, leaf = name.rpartition(".")
        if leaf in ("lora_down", "lora_up") and f"{owner}." in ranks:
            rank = ranks[f"{owner}."]
            tensor = tensor[:rank] if leaf == "lora_down" else tensor[:, :rank]
        state[name.replace(".base_layer.", ".")] = tensor
    return state


def base_id(model_or_state: nn.Module | Mapping[str, Tensor]) -> str:
    """sha256 (hex) over the sorted (name, dtype, shape, bytes) of the base's tensors."""
    state = base_state(model_or_state) if isinstance(model_or_state, nn.Module) else model_or_state
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checksum(model: nn.Module) -> str:
    """64 bits (hex) over the frozen tensors as they lie in memory, injected factors left out: it differs where any byte does.

    sum_i (2 i + 1) word_i mod 2^64 of each tensor's 8-byte words, then sha256 over names, shapes and sums. One tensor at a time,
    where it lies: `base_id` makes the stored form of all layers at once, and hashes it on the CPU.
    """
    digest = hashlib.sha256()
    named = {name.replace(".base_layer.", "."): t for name, t in (*model.named_parameters(), *model.named_buffers())}
    for name in sorted(name for name in named if ".lora_A." not in name and ".lora_B." not in name):
        tensor = named[name]
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        words = torch.nn.functional.pad(data, (0, -len(data) % 8)).view(torch.int64)
        total = int((words * torch.arange(1, 2 * len(words) + 1, 2, device=words.device)).sum())
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {total}\n".encode())
    return digest.hexdigest()[:16]


def recorded_base_id(model: nn.Module) -> str:
    """The id of the checkpoint that `load_quantized` read, or that of the weights as they are.

    The two differ when the 16-bit layers were cast after loading, which does not make the model another base.
    """
    recorded = getattr(model, BASE_ID_ATTRIBUTE, None)
    return recorded if isinstance(recorded, str) else base_id(model)


def record_base_id(model: nn.Module, identity: str | None = None) -> None:
    """Note on the model which base its weights are, before anything casts them; `identity` None computes it."""
    setattr(model, BASE_ID_ATTRIBUTE, base_id(model) if identity is None else identity)


def branched_layers(model: nn.Module) -> dict[str, BranchedLinear]:
    """Path -> quantized layer of any kind, through injected adapters."""
    found = ((path, m) for path, m in model.named_modules() if isinstance(m, BranchedLinear))
    return {path.removesuffix(".base_layer"): module for path, module in found}


def quantized_layers(model: nn.Module) -> dict[str, SVDQuantLinear]:
    """Of these, SVDQuant's."""
    return {path: layer for path, layer in branched_layers(model).items() if isinstance(layer, SVDQuantLinear)}


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The JSON block of `config.json`; raises ValueError if nothing is quantized."""
    layers = branched_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layer; run quantize_model first")
    kinds = {PROFILES[layer.numerics] for layer in layers.values() if layer.numerics in PROFILES}
    profile = kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "weight-only"
    described = {path: _described(layer) for path, layer in layers.items()}
    return {"quant_method": QUANT_METHOD, "version": VERSION, "profile": profile, "layers": described}


def _described(layer: BranchedLinear) -> dict[str, Any]:
    svdquant = layer if isinstance(layer, SVDQuantLinear) else None
    unsigned_from = svdquant.unsigned_from if svdquant else 0
    unsigned = svdquant is not None and svdquant.act_unsigned
    return {
        "numerics": layer.numerics,
        "group_size": layer.group_size,
        "hadamard": svdquant is not None and svdquant.hadamard,
        "act_unsigned": unsigned,
        "act_shift": GELU_SHIFT if unsigned else 0.0,
        **({"act_unsigned_from": unsigned_from} if unsigned_from else {}),
        "rank": layer.rank,
        "output_error": layer.output_error,
    }


def check_saveable(model: nn.Module, bake_grafts: bool) -> None:
    """Raises ValueError for a model with injected adapters, or with grafts unless `bake_grafts`."""
    if any(".base_layer." in name for name in model.state_dict()):
        raise ValueError("the model carries an injected adapter; save that with adapters, and remove_adapter first")
    grafted = [path for path, layer in branched_layers(model).items() if layer.rank != layer.base_rank]
    if grafted and not bake_grafts:
        raise ValueError(
            f"{len(grafted)} layer(s) carry grafts, e.g. {grafted[0]!r}; ungraft, or pass bake_grafts=True"
        )


def save_quantized(model: nn.Module, folder: Path | str, *, overwrite: bool = False, bake_grafts: bool = False) -> Path:
    """Write a quantized diffusers model; the folder appears complete or not at all.

    Raises ValueError for a model with injected adapters, or with grafts unless `bake_grafts` makes them part of the
    written base (which is then another base); FileExistsError if the folder exists and `overwrite` is false.
    """
    folder = Path(folder)
    check_saveable(model, bake_grafts)
    block = quantization_config(model)
    with replacing_folder(folder, overwrite=overwrite) as scratch:
        model.save_config(scratch)  # type: ignore[operator]  # diffusers' ConfigMixin
        config = json.loads((scratch / CONFIG_NAME).read_text())
        config.pop("_name_or_path", None)  # a local path has no business in a published file
        config["quantization_config"] = block
        (scratch / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        write_tensors(scratch / WEIGHTS_NAME, model.state_dict(), {"format": "pt"})
    return folder


def load_quantized(folder: Path | str, model_class: type[Any], *, device: torch.device | str = "cpu") -> Any:
    """Read a folder of `save_quantized` into a frozen `model_class` in evaluation mode.

    The model is built from its configuration on the meta device, so nothing is initialised twice. `recorded_base_id` of
    the result names the weights as they were stored. Raises CheckpointError naming the layer or tensor:
    no checkpoint at all, another quantization method or version, unknown or impossible layers, truncated files, missing and unexpected
    tensors, wrong shapes and dtypes, values outside the code.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_NAME)
    block = config.pop("quantization_config")
    tensors, _ = read_tensors(folder / WEIGHTS_NAME, device)
    with init_empty_weights(include_buffers=False):
        model = model_class.from_config(config)
    for path, layer in block["layers"].items():
        replace_module(model, path, empty_layer(model, path, layer, tensors.get(f"{path}.bias"), folder))
    _check_state(model, tensors, folder)
    model.load_state_dict(tensors, strict=True, assign=True)
    record_base_id(model, base_id(tensors))
    share_inputs(model)
    return model.requires_grad_(False).eval()


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"no {CONFIG_NAME} in {path.parent}; expected the folder that save_quantized wrote")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch it again") from error
    check_block(config.get("quantization_config") or {}, path)
    return dict(config)


def check_block(block: dict[str, Any], path: Path | str) -> None:
    """Raises CheckpointError for a quantization_config of another method or version, or with an impossible layer."""
    method, version = block.get("quant_method"), block.get("version")
    if method != QUANT_METHOD:
        raise CheckpointError(f"{path}: quant_method is {method!r}, this reader knows {QUANT_METHOD!r} only")
    if version != VERSION:
        raise CheckpointError(f"{path}: format version {version!r}, this reader knows {VERSION}; upgrade loragraft")
    for name, layer in block.get("layers", {}).items():
        lacking = sorted(LAYER_KEYS - layer.keys())
        if lacking:
            raise CheckpointError(f"{path}: layer {name!r} lacks {', '.join(lacking)}")
        if layer["numerics"] not in get_args(Numerics):
            raise CheckpointError(
                f"{path}: layer {name!r} has numerics {layer['numerics']!r}; known: {get_args(Numerics)}"
            )
        if layer["act_shift"] != (GELU_SHIFT if layer["act_unsigned"] else 0.0):
            raise CheckpointError(
                f"{path}: layer {name!r} has act_unsigned {layer['act_unsigned']} with act_shift {layer['act_shift']}; "
                f"unsigned activations are shifted by {GELU_SHIFT}, signed ones by 0"
            )
        if layer["act_unsigned"] and (layer["numerics"] != "w4a4" or layer["hadamard"]):
            raise CheckpointError(f"{path}: layer {name!r}: unsigned activations are for w4a4 without a rotation")


def empty_layer(
    model: nn.Module, path: str, layer: dict[str, Any], bias: Tensor | None, folder: Path | str
) -> BranchedLinear:
    """An empty layer as quantization_config describes it, for the linear layer or convolution of `model` at `path`; the bias has `bias`' dtype.

    Raises CheckpointError naming the nearest layers if there is none, or if the description does not fit it.
    """
    known = [name for name, module in model.named_modules() if is_quantizable(module)]
    if path not in known:
        raise CheckpointError(
            f"{folder}: quantized layer {path!r} is no linear layer of the model and no convolution that can be quantized; "
            f"{nearest(path, known)}"
        )
    module = named_module(model, path)
    options = {
        "rank": layer["rank"],
        "group_size": layer["group_size"],
        "hadamard": layer["hadamard"],
        "act_unsigned": layer["act_unsigned"],
        "unsigned_from": layer.get("act_unsigned_from", 0),
        "output_error": layer.get("output_error"),
        "bias_dtype": bias.dtype if bias is not None and bias.is_floating_point() else torch.bfloat16,
    }
    try:
        if isinstance(module, nn.Conv2d):
            return SVDQuantConv2d.empty_like(module, layer["numerics"], path=path, **options)
        assert isinstance(module, nn.Linear)  # is_quantizable
        return make_empty(module, layer["numerics"], **options)
    except ValueError as error:
        raise CheckpointError(f"{folder}: layer {path!r}: {error}") from error


def _check_state(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    expected = model.state_dict()
    missing, foreign = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensor(s) are missing, the first is {missing[0]!r}")
    if foreign:
        raise CheckpointError(f"{folder}: {len(foreign)} tensor(s) belong to no layer, the first is {foreign[0]!r}")
    strict = {f"{path}.{name}" for path, layer in branched_layers(model).items() for name in _stored(layer)}
    for name, wanted in expected.items():
        check_tensor(name, tensors[name], wanted, folder, strict=name in strict)


def check_tensor(name: str, tensor: Tensor, wanted: Tensor, folder: Path | str, *, strict: bool) -> None:
    """Raises CheckpointError naming a tensor that is not like `wanted`; `strict`: it is a quantized layer's, but no bias."""
    if tensor.shape != wanted.shape:
        raise CheckpointError(
            f"{folder}: tensor {name!r} has shape {tuple(tensor.shape)}, expected {tuple(wanted.shape)}"
        )
    leaf = name.rpartition(".")[2]
    fits = fits_dtype(leaf, tensor.dtype, wanted.dtype) if strict else tensor.is_floating_point()
    if not fits:
        raise CheckpointError(f"{folder}: tensor {name!r} is {tensor.dtype}, expected {wanted.dtype}")
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise CheckpointError(f"{folder}: tensor {name!r} holds NaN or infinity")
    if name.endswith(".group_scale") and strict and not (tensor.min() >= 1 and tensor.max() <= 15):
        raise CheckpointError(f"{folder}: tensor {name!r} leaves the code: integer scales are 1 to 15")
    if name.endswith(".group_zero") and strict and tensor.max() > 15:
        raise CheckpointError(f"{folder}: tensor {name!r} leaves the code: zero points are 0 to 15")


def _stored(layer: BranchedLinear) -> list[str]:
    return list(buffer_layout(layer.in_features, layer.out_features, layer.numerics, layer.group_size, layer.rank))
