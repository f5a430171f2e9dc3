"""One layer in Nunchaku's packed tensors, to our buffers and back: what the Nunchaku and Nunchaku Lite files share.

W4A4: qweight int8 [N, K/2], wscales [K/64, N], smooth_factor [K], proj_down [K, R], proj_up [N, R], bias [N], N and K padded
to 128 and R to 16 (zeros; ones in scales and bias). W4A16: qweight int32 [N/4, K/2], wscales and wzeros [>= K/64, N] with
W = c wscale + wzero, bias [N] in plain order. nunchaku `models/linear.py`, DeepCompressor `backend/nunchaku/convert.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loragraft.kernels.layout import padded
from loragraft.quantization.dialects import packing
from loragraft.quantization.dialects.assembly import bias_or_none
from loragraft.quantization.dialects.files import FLOATS, SIXTEEN_BIT, TensorFiles
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.tensor_file import CheckpointError

W4A4_NAMES = ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up", "bias")
V1_NAMES = {
    "smooth_factor": "smooth",
    "proj_down": "lora_down",
    "proj_up": "lora_up",
    "smooth_factor_orig": "smooth_orig",
}


@dataclass(frozen=True)
class Part:
    """A W4A4 linear as it lies in a file, unpacked: N x K, both its own and without padding."""

    codes: Tensor
    """Row-major uint8 [N, K/2]."""
    wscale: Tensor
    """[K/64, N]."""
    smooth: Tensor
    lora_down: Tensor
    """[R, K]."""
    lora_up: Tensor
    """[N, R]."""
    bias: Tensor | None

    def rows(self, first: int, last: int) -> "Part":
        """The layer of output rows first .. last - 1: smooth and lora_down are those of the whole."""
        bias = None if self.bias is None else self.bias[first:last]
        return Part(
            self.codes[first:last], self.wscale[:, first:last], self.smooth, self.lora_down, self.lora_up[first:last], bias
        )  # fmt: skip


def names_of(files: TensorFiles, prefix: str) -> dict[str, str]:
    """Our key of W4A4_NAMES -> the file's tensor name, in the spelling (v1 or v2) that the file uses for this layer."""
    spelt = V1_NAMES if f"{prefix}.smooth" in files or f"{prefix}.lora_down" in files else {}
    return {name: f"{prefix}.{spelt.get(name, name)}" for name in W4A4_NAMES}


def read_part(files: TensorFiles, prefix: str, K: int, N: int) -> Part:
    """Unpack the W4A4 linear at `prefix` of a file. Raises CheckpointError, for NVFP4 as well."""
    names = names_of(files, prefix)
    for foreign in ("wtscale", "wcscales"):
        if f"{prefix}.{foreign}" in files:
            raise CheckpointError(f"{files.where(f'{prefix}.{foreign}')}: an NVFP4 layer; only INT4 is read")
    Np, Kp = packing.round_up(N, packing.TILE), packing.round_up(K, packing.TILE)
    rank = files.shape(names["proj_down"])[-1]
    if rank % packing.RANK_TILE:
        raise CheckpointError(f"{files.where(names['proj_down'])} has rank {rank}, not a multiple of 16")
    qweight = files.read(names["qweight"], (Np, Kp // 2), (torch.int8,))
    wscale = files.read(names["wscales"], (Kp // packing.GROUP, Np), SIXTEEN_BIT)
    smooth = files.read(names["smooth_factor"], (Kp,), SIXTEEN_BIT)
    down, up = files.read(names["proj_down"], (Kp, rank)), files.read(names["proj_up"], (Np, rank))
    bias = files.read(names["bias"], (Np,)) if names["bias"] in files else None
    for unused in ("smooth_factor_orig", "smooth_orig"):  # of a smoothing that the layer before has taken over
        files.unread.discard(f"{prefix}.{unused}")
    return Part(
        codes=packing.unpack_qweight(qweight)[:N, : K // 2],
        wscale=packing.unpack_scales(wscale)[: -(-K // packing.GROUP), :N],
        smooth=packing.unpack_vector(smooth)[:K],
        lora_down=packing.unpack_down(down)[:, :K],
        lora_up=packing.unpack_up(up)[:N],
        bias=None if bias is None else packing.unpack_vector(bias)[:N],
    )


def w4a4_layer(part: Part, linear: nn.Linear, where: str, *, unsigned_from: int | None = None) -> SVDQuantLinear:
    """The layer that takes the place of `linear`; unsigned_from None: signed activations throughout.

    Raises CheckpointError naming `where` for a bias that is missing or no bias.
    """
    K, N, Kp = linear.in_features, linear.out_features, padded(linear.in_features)
    tensors = {
        "qweight": packing.pad_to(part.codes, (N, Kp // 2)),
        "wscale": packing.pad_to(part.wscale, (Kp // packing.GROUP, N), 1),
        "smooth": part.smooth, "lora_down": part.lora_down, "lora_up": part.lora_up,
    }  # fmt: skip
    if part.bias is not None:
        bias = bias_or_none(linear, part.bias, where)
        tensors |= {} if bias is None else {"bias": bias}
    elif linear.bias is not None:
        raise CheckpointError(f"{where} is missing")
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return SVDQuantLinear(
        K, N, "w4a4", tensors, act_unsigned=unsigned_from is not None, unsigned_from=unsigned_from or 0
    )


def beside(first: Part, second: Part) -> Part:
    """The sum of two layers over neighbouring input columns as one: y = first(x[:K1]) + second(x[K1:]).

    Exact: groups of 64 columns keep their scales, the branches stand block-diagonally, biases are added in float32.
    K1 must be a multiple of 64.
    """
    biases = [part.bias for part in (first, second) if part.bias is not None and torch.count_nonzero(part.bias)]
    if len(biases) == 2:
        bias: Tensor | None = biases[0].float() + biases[1].float()
    else:
        bias = biases[0] if biases else second.bias
    return Part(
        codes=torch.cat([first.codes, second.codes], dim=1),
        wscale=torch.cat([first.wscale, second.wscale]),
        smooth=torch.cat([first.smooth, second.smooth]),
        lora_down=torch.block_diag(first.lora_down, second.lora_down),
        lora_up=torch.cat([first.lora_up, second.lora_up], dim=1),
        bias=bias,
    )


def read_awq(files: TensorFiles, prefix: str, linear: nn.Linear, *, splits: int = 1) -> SVDQuantLinear:
    """The W4A16 linear at `prefix`. With `splits` > 1 it is an adaLN of Nunchaku's: rows interleaved, 1 in two biases.

    The 1 is taken out of the bias again, in float32, where the difference is exact. Raises CheckpointError naming a tensor that
    is missing or does not fit `linear`.
    """
    K, N, Kp = linear.in_features, linear.out_features, padded(linear.in_features)
    if K % packing.GROUP or N % 4 or N % splits:
        raise CheckpointError(
            f"{files.where(f'{prefix}.qweight')}: AWQ needs K % 64 == 0 and N % 4 == 0, not {N} x {K}"
        )
    groups = K // packing.GROUP
    qweight = files.read(f"{prefix}.qweight", (N // 4, K // 2), (torch.int32,))
    given = files.shape(f"{prefix}.wscales")[0]
    if given < groups:
        raise CheckpointError(f"{files.where(f'{prefix}.wscales')} has {given} groups, expected {groups} or more")
    scales = {
        ours: files.read(f"{prefix}.{theirs}", (given, N), SIXTEEN_BIT)[:groups]
        for ours, theirs in (("wscale", "wscales"), ("wzero", "wzeros"))
    }
    tensors = {name: packing.separate_splits(scale.T, splits).T for name, scale in scales.items()}
    tensors = {
        name: packing.pad_to(tensor, (Kp // packing.GROUP, N), float(name == "wscale"))
        for name, tensor in tensors.items()
    }
    tensors["qweight"] = packing.pad_to(packing.separate_splits(packing.unpack_awq(qweight), splits), (N, Kp // 2))
    tensors["lora_down"] = torch.zeros(0, K, dtype=torch.bfloat16)
    tensors["lora_up"] = torch.zeros(N, 0, dtype=torch.bfloat16)
    if linear.bias is not None or f"{prefix}.bias" in files:
        bias = packing.separate_splits(files.read(f"{prefix}.bias", (N,), FLOATS), splits)
        if splits > 1:
            bias = bias.float() - adaln_ones(N, splits)
        kept = bias_or_none(linear, bias, files.where(f"{prefix}.bias"))
        tensors |= {} if kept is None else {"bias": kept}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return SVDQuantLinear(K, N, "w4a16", tensors)


def adaln_ones(N: int, splits: int) -> Tensor:
    """1 in the rows of the scales (split 1 and the last but one), which Nunchaku's runtime does not add itself; else 0."""
    ones = torch.zeros(splits, N // splits)
    ones[[1, -2]] = 1
    return ones.flatten()
