"""The 16-bit weights that a quantized base was made from, read layer by layer: what LoftQ compares it with."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from loragraft.backbones.architectures import open_model
from loragraft.backbones.spec import BaseSpec, Weights
from loragraft.quantization.names import nearest
from loragraft.quantization.weight_source import FileSource, WeightSource


def open_original(spec: BaseSpec, weights: Weights, cache_root: Path) -> Callable[[str], Tensor]:
    """Path of a layer -> its 16-bit weight, on the CPU. Nothing is read yet.

    Raises ValueError where there are none: random weights, or a base of ready-made INT4 weights.
    """
    source = _source(spec, weights, cache_root)

    def read(path: str) -> Tensor:
        name = f"{path}.weight"
        if name not in source.tensors:
            raise ValueError(f"the 16-bit weights of {spec.name} lack {name!r}; {nearest(name, source.tensors)}")
        return source.read(name)

    return read


def _source(spec: BaseSpec, weights: Weights, cache_root: Path) -> WeightSource:
    if spec.transformer_16bit is not None:
        return FileSource(spec.transformer_16bit)
    from loragraft.backbones import external, single_file  # the Hub's client and foreign readers: not for `pocket`

    external.check_weights(spec, weights)
    assert spec.external is not None  # check_weights
    remedy = (
        f"give 16-bit weights, weights.path=FOLDER ({spec.external.hub_id} on the Hub; they are quantized once, here), or start from "
        "zero, adapter.init=default, which makes the adapter portable"
    )
    if weights.random:
        raise ValueError(
            f"adapter.init=loftq makes up for what quantization took, and random weights lost nothing: {remedy}"
        )
    path = external.locate(spec, spec.external, weights).transformer
    if external.is_quantized(path):
        raise ValueError(
            f"adapter.init=loftq needs the 16-bit weights that {path} was quantized from, and it holds INT4 alone: {remedy}"
        )
    if single_file.is_one_file(spec, path):
        path = single_file.as_folder(spec, spec.external, path, cache_root)
    return open_model(path)[0]
