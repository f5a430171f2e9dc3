"""Other people's linear layers, built from one bf16 weight [N, K] each, so that they can be timed beside ours.

    y = RIVALS[name].build(weight)(x)          x bf16 [M, K] -> y bf16 [M, N], no bias

`build` raises RivalError, with the reason, where the package, the shape or the device does not allow it; nothing falls back to
another path. SDNQ is licensed under the GPL and never enters this process: `alone` starts this file as a process of its own,

    python benchmarks/rivals.py sdnq --shapes 4608x3072x3072 1x18432x3072

which prints one JSON line per M x N x K: RMS error against bf16 and the median time, with bf16 of the same process as anchor.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]
Shape = tuple[int, int, int]
FP8_MAX, RANK, GROUP, TILE, COPIES, MARKER = 448.0, 32, 64, 128, 8, "RIVAL "


class RivalError(RuntimeError):
    """This rival cannot run here; the message says why."""


@dataclass(frozen=True)
class Rival:
    """build: weight [N, K] -> y = f(x). alone: only in a process of its own (GPL)."""

    build: Callable[[Tensor], Linear]
    licence: str
    about: str
    alone: bool = False


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RivalError(f"{name} cannot be imported ({error}); pip install {name.split('.')[0]}") from error


def _multiple(weight: Tensor, n: int, k: int, what: str) -> None:
    N, K = weight.shape
    if N % n or K % k:
        raise RivalError(f"{what} needs N % {n} == 0 and K % {k} == 0, here N = {N}, K = {K}")


def bf16(weight: Tensor) -> Linear:
    """cuBLAS."""
    return lambda x: F.linear(x, weight)


def rowwise(x: Tensor, largest: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and float32 scale [rows, 1] with max |row| -> `largest`."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_(min=1e-12) / largest
    codes = x / scale
    return (codes.round_() if dtype == torch.int8 else codes).clamp_(-largest, largest).to(dtype), scale


def _fp8(weight: Tensor, quantize: Callable[..., tuple[Tensor, Tensor]]) -> Linear:
    _multiple(weight, 16, 16, "fp8 _scaled_mm")
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 9):
        raise RivalError("fp8 _scaled_mm needs compute capability 8.9 or newer")
    codes_NK, scale_N1 = rowwise(weight, FP8_MAX, torch.float8_e4m3fn)

    def apply(x: Tensor) -> Tensor:
        codes_MK, scale_M1 = quantize(x, FP8_MAX, torch.float8_e4m3fn)
        return torch._scaled_mm(
            codes_MK, codes_NK.T, scale_a=scale_M1, scale_b=scale_N1.T, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return apply


def fp8(weight: Tensor) -> Linear:
    """Rowwise `_scaled_mm`; x is quantized per token in eager torch, at every call."""
    return _fp8(weight, rowwise)


def fp8_compiled(weight: Tensor) -> Linear:
    """The same with the quantization of x compiled into fused kernels."""
    return _fp8(weight, torch.compile(rowwise, dynamic=False))


def _once() -> Callable[..., tuple[Tensor, Tensor]]:
    """`rowwise` that works only when it sees another x."""
    seen: dict[str, Any] = {"x": None}

    def quantize(x: Tensor, largest: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if seen["x"] is not x:
            seen.update(x=x, result=rowwise(x, largest, dtype))
        return seen["result"]  # type: ignore[no-any-return]

    return quantize


def fp8_matmul(weight: Tensor) -> Linear:
    """The multiplication alone: x is quantized when first seen."""
    return _fp8(weight, _once())


def _int8(weight: Tensor, quantize: Callable[..., tuple[Tensor, Tensor]]) -> Linear:
    _multiple(weight, 8, 8, "_int_mm")
    codes_NK, scale_N1 = rowwise(weight, 127, torch.int8)

    def apply(x: Tensor) -> Tensor:
        if x.is_cuda and x.shape[0] <= 16:
            raise RivalError(f"_int_mm needs more than 16 rows on CUDA, here M = {x.shape[0]}")
        codes_MK, scale_M1 = quantize(x, 127, torch.int8)
        return (torch._int_mm(codes_MK, codes_NK.T) * scale_M1 * scale_N1.T).to(x.dtype)

    return apply


def int8(weight: Tensor) -> Linear:
    """`torch._int_mm`, per-token x per-channel, quantization and rescaling in eager torch."""
    return _int8(weight, rowwise)


def int8_compiled(weight: Tensor) -> Linear:
    """The same, compiled as a whole."""
    return torch.compile(_int8(weight, rowwise), dynamic=False)


def int_mm(weight: Tensor) -> Linear:
    """`torch._int_mm` alone: INT32 sums [M, N] that nobody scales back, x quantized when first seen. No rival, a lower bound."""
    _multiple(weight, 8, 8, "_int_mm")
    codes_NK, _ = rowwise(weight, 127, torch.int8)
    quantize = _once()
    return lambda x: torch._int_mm(quantize(x, 127, torch.int8)[0], codes_NK.T)


def nf4(weight: Tensor) -> Linear:
    """bitsandbytes: NF4 in blocks of 64, as `Linear4bit` calls it for inference (without double quantization)."""
    package = _package("bitsandbytes")
    packed, state = package.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    return lambda x: package.matmul_4bit(x, packed, quant_state=state)


def _svdquant(weight: Tensor, tiled: bool) -> Linear:
    kitchen = _package("comfy_kitchen")
    tensor = _package("comfy_kitchen.tensor.svdquant_w4a4")
    _multiple(weight, TILE if tiled else 1, TILE, "comfy-kitchen SVDQuant W4A4")
    backend = kitchen.list_backends()["cuda"]
    if weight.is_cuda and not backend["available"]:
        raise RivalError(f"comfy-kitchen has no CUDA kernels here: {backend['unavailable_reason']}")
    (N, K), dtype = weight.shape, weight.dtype
    U, S, V = torch.svd_lowrank(weight.float(), q=RANK, niter=2)
    up_NR, down_KR = (U * S).to(dtype), V.to(dtype).contiguous()
    residual = (weight.float() - up_NR.float() @ down_KR.float().T).view(N, K // GROUP, GROUP)
    scale_NG = (residual.abs().amax(dim=2) / 7).to(dtype)
    codes_NK = (residual / scale_NG.float()[..., None]).round_().clamp_(-7, 7).to(torch.int8).view(N, K)
    q_NK2 = (codes_NK[:, 0::2] & 15) | (codes_NK[:, 1::2] << 4)
    scale_GN = scale_NG.T.contiguous()
    if tiled:
        q_NK2 = q_NK2.view(N // TILE, TILE // 4, 4, K // GROUP, GROUP // 2).permute(0, 3, 1, 2, 4)
        q_NK2 = q_NK2.reshape(N // TILE, K // GROUP, TILE // 4, 4 * GROUP // 2)
        scale_GN = scale_GN.view(K // GROUP, N // TILE, TILE).permute(1, 0, 2).contiguous()
        up_NR = up_NR.view(N // TILE, TILE, RANK).permute(0, 2, 1)
    params = tensor.TensorCoreSVDQuantW4A4Layout.Params(
        scale=scale_GN, orig_dtype=dtype, orig_shape=(N, K), proj_down=down_KR, proj_up=up_NR.contiguous(),
        smooth_factor=torch.ones(K, dtype=dtype, device=weight.device),
    )  # fmt: skip
    quantized = tensor.QuantizedTensor(q_NK2.contiguous(), "TensorCoreSVDQuantW4A4Layout", params)
    return lambda x: F.linear(x, quantized)


def comfy_kitchen(weight: Tensor) -> Linear:
    """SVDQuant W4A4 of rank 32, row-major weight, through comfy-kitchen's own `F.linear`."""
    return _svdquant(weight, tiled=False)


def comfy_kitchen_tiled(weight: Tensor) -> Linear:
    """The same in its tile-packed layout, what its converter writes."""
    return _svdquant(weight, tiled=True)


def _sdnq(weight: Tensor, **settings: Any) -> Linear:
    package = _package("sdnq")
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    model = package.sdnq_post_load_quant(
        torch.nn.Sequential(layer), torch_dtype=weight.dtype, add_skip_keys=False, **settings
    )
    if "sdnq" not in type(model[0]).__name__.lower():
        raise RivalError(f"SDNQ left the layer unquantized (N, K = {tuple(weight.shape)})")
    return model  # type: ignore[no-any-return]


def sdnq(weight: Tensor) -> Linear:
    """UINT4 weights, INT8 matmul, no branch."""
    return _sdnq(weight, weights_dtype="uint4", use_quantized_matmul=True)


def sdnq_svd(weight: Tensor) -> Linear:
    """UINT4 weights with a branch of rank 32, INT8 matmul."""
    return _sdnq(weight, weights_dtype="uint4", use_quantized_matmul=True, use_svd=True, svd_rank=RANK)


RIVALS = {
    "bf16": Rival(bf16, "BSD-3-Clause", "cuBLAS"),
    "fp8": Rival(fp8, "BSD-3-Clause", "rowwise _scaled_mm with eager quantization of x"),
    "fp8_compiled": Rival(fp8_compiled, "BSD-3-Clause", "rowwise _scaled_mm with compiled quantization of x"),
    "fp8_matmul": Rival(fp8_matmul, "BSD-3-Clause", "rowwise _scaled_mm alone"),
    "int8": Rival(int8, "BSD-3-Clause", "_int_mm, eager"),
    "int8_compiled": Rival(int8_compiled, "BSD-3-Clause", "_int_mm, compiled"),
    "nf4": Rival(nf4, "MIT", "bitsandbytes"),
    "comfy_kitchen": Rival(comfy_kitchen, "Apache-2.0", "SVDQuant W4A4, row-major"),
    "comfy_kitchen_tiled": Rival(comfy_kitchen_tiled, "Apache-2.0", "SVDQuant W4A4, tile-packed"),
    "sdnq": Rival(sdnq, "GPL-3.0-only", "UINT4, INT8 matmul", alone=True),
    "sdnq_svd": Rival(sdnq_svd, "GPL-3.0-only", "UINT4 + SVD branch, INT8 matmul", alone=True),
}


def build(name: str, weight: Tensor) -> Linear:
    """y = f(x) of a rival that may run in this process. Raises KeyError for an unknown name and RivalError."""
    if RIVALS[name].alone:
        raise RivalError(
            f"{name} is {RIVALS[name].licence} and runs in a process of its own: rivals.alone({name!r}, shapes)"
        )
    return RIVALS[name].build(weight)


def alone(name: str, shapes: Sequence[Shape], timeout: float = 300) -> list[dict[str, Any]]:
    """Rows of this file run as a program. Raises RivalError with the end of its output if it fails."""
    command = [sys.executable, __file__, name, "--shapes", *("x".join(map(str, shape)) for shape in shapes)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise RivalError(f"{name} was not done after {timeout} s") from error
    rows = [json.loads(line.removeprefix(MARKER)) for line in result.stdout.splitlines() if line.startswith(MARKER)]
    if result.returncode or len(rows) != len(shapes):
        raise RivalError(f"{name} ended with status {result.returncode}: {(result.stderr or result.stdout)[-800:]}")
    return rows


def _median_us(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of one call, by CUDA events, rotating among `calls`."""
    for call in calls:
        call()
    times = []
    for i in range(3 * len(calls)):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        calls[i % len(calls)]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return float(statistics.median(times))


def measure(name: str, shape: Shape) -> dict[str, Any]:
    """One row: RMS error against bf16, and on CUDA the median microseconds of the rival and of bf16."""
    M, N, K = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator(device).manual_seed(0)
    copies = COPIES if device == "cuda" else 1
    weights = [torch.randn(N, K, device=device, generator=random).mul_(K**-0.5).bfloat16() for _ in range(copies)]
    x = torch.randn(M, K, device=device, generator=random).bfloat16()
    row: dict[str, Any] = {"rival": name, "shape": list(shape), "licence": RIVALS[name].licence}
    try:
        with torch.no_grad():
            layers = [RIVALS[name].build(weight) for weight in weights]
            expected = F.linear(x, weights[0]).float()
            row["error"] = ((layers[0](x).float() - expected).norm() / expected.norm()).item()
            if device == "cuda":
                row["us"] = _median_us([lambda layer=layer: layer(x) for layer in layers])  # type: ignore[misc]
                row["bf16_us"] = _median_us([lambda w=w: F.linear(x, w) for w in weights])  # type: ignore[misc]
    except RivalError as reason:
        row["refused"] = str(reason)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RIVALS)
    parser.add_argument("--shapes", nargs="+", required=True, metavar="MxNxK")
    arguments = parser.parse_args()
    for text in arguments.shapes:
        M, N, K = map(int, text.split("x"))
        print(MARKER + json.dumps(measure(arguments.name, (M, N, K))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
