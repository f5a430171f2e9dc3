"""Finds the tile sizes of the Hopper GEMM for this card and writes them where the kernel looks: `kernels/tuned/CARD.json`.

    python benchmarks/tune.py --out kernels/tuned

Every shape of FLUX.1-dev at 1024 px is run with every configuration, packed weights (forward) and INT8 ones (the gradient of
x); of one shape all in turn. A shape that is in no file takes `hopper_gemm.hopper_config`'s heuristic: nothing is tuned while
a model runs. Rows of other shapes stay (`conv.py` adds those of convolutions).
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from int4_engine import BF16, DEVICE, native_weights
from int4_engine import FLUX as LAYERS
from timing import compare

from loragraft.kernels.hopper_gemm import hopper_gemm, keep_tuned
from loragraft.kernels.unpack import transposed_int8

RANKS = 48


def candidates(M: int) -> list[dict[str, int]]:
    tiles = [(256, 64), (128, 64), (128, 128)] if M <= 1024 else [(256, 64)]
    return [
        {"BM": BM, "WN": WN, "GROUP_M": group}
        for (BM, WN), group in itertools.product(tiles, (2, 4, 6, 9, 18) if M > 1024 else (1, 4))
    ]


def tuned(M: int, N: int, K: int, packed: bool) -> dict[str, float]:
    """The fastest configuration of a product [M, K] x [K, N], and its microseconds."""
    layer = next(layer for layer in LAYERS if ((N, K) if packed else (K, N)) == (layer.N, layer.K))
    weights = native_weights(layer, RANKS)
    codes = torch.randint(-127, 128, (M, K), dtype=torch.int8, device=DEVICE)
    scale, h = torch.rand(M, 1, device=DEVICE), torch.randn(M, RANKS, device=DEVICE).to(BF16)
    if packed:
        weight, words, up = weights["qweight"], weights["group_words"], weights["lora_up"]
    else:
        weight, words, up = (
            transposed_int8(weights["qweight"], weights["group_words"])[:N],
            None,
            weights["lora_down"].T,
        )
    rows = torch.rand(N, device=DEVICE)
    steps = {
        json.dumps(config): (lambda config=config: hopper_gemm(codes, scale, weight, words, rows, h, up, None, config))
        for config in candidates(M)
        if packed or config["WN"] == 64
    }
    times = compare(steps, inner=5, rounds=5)
    best = min(times, key=lambda name: times[name])
    return {**json.loads(best), "microseconds": round(times[best], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write CARD.json to")
    arguments = parser.parse_args()
    rows = []
    shapes = dict.fromkeys((layer.M, layer.N, layer.K) for layer in LAYERS)
    for M, N, K in shapes:
        for packed, (outputs, inputs) in ((True, (N, K)), (False, (K, N))):
            rows.append({"M": M, "N": outputs, "K": inputs, "packed": packed, **tuned(M, outputs, inputs, packed)})
            print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    print(keep_tuned(torch.device(DEVICE, 0), rows, arguments.out))


if __name__ == "__main__":
    main()
