"""What fused kernels move, counted by hand: values inside a join are free, those that cross it are written once and read per group."""

import torch
from torch import nn

from loragraft.train.dry_run import dry_train
from loragraft.train.fusion import Fusion
from loragraft.train.op_cost import OpCost, Part

MOVES, MULTIPLIES = OpCost("aten::mul", (Part("memory", 0, 999),)), OpCost("aten::mm", (Part("gemm", 8, 24),))
X, A, B, Y, C, Z = range(6)


def fused_bytes(fusion: Fusion) -> list[int]:
    return [
        cost.parts[0].nbytes
        for counts in fusion.ops.values()
        for cost, n in counts.items()
        for _ in range(n)
        if cost.name == "fused"
    ]


def test_values_inside_a_join_are_free() -> None:
    fusion = Fusion()
    fusion.op("forward", MOVES, [(X, 10)], [A], fuses=True)
    fusion.op("forward", MOVES, [(A, 20), (X, 10)], [B], fuses=True)
    fusion.op("forward", MULTIPLIES, [(B, 40)], [Y], fuses=False)
    assert fused_bytes(fusion) == [10 + 40]  # x read once, b written for the product; a never left the registers
    assert fusion.ops["forward"][MULTIPLIES] == 1
    fusion.op("backward", MOVES, [(A, 20), (Y, 5)], [C], fuses=True)
    fusion.op("backward", MOVES, [(A, 20), (C, 7)], [Z], fuses=True)
    fusion.op("backward", MULTIPLIES, [(B, 40), (Z, 3)], [X], fuses=False)
    assert fused_bytes(fusion)[1:] == [20 + 20 + 5 + 3]  # a was kept after all: written and read; b lies there already


def test_a_key_that_comes_again_is_another_value() -> None:
    fusion = Fusion()
    fusion.op("forward", MOVES, [], [A], fuses=True)
    fusion.dies(A)
    fusion.op("forward", MULTIPLIES, [(A, 100)], [Y], fuses=False)
    assert fused_bytes(fusion) == []


def test_a_step_has_both_counts() -> None:
    """Products are the same ones; what lies between them moves less, and the optimizer is as written."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64))
    run = dry_train(model, lambda: (model(torch.empty(8, 64)) * 2 + 1).mean(), torch.optim.SGD)

    def moved(compiled: bool, joined: bool) -> int:
        pairs = run.counted(compiled)
        return sum(
            n * p.nbytes for cost, n in pairs for p in cost.parts if (cost.fusible or cost.name == "fused") == joined
        )

    assert moved(True, False) == moved(False, False) > 0
    assert 0 < moved(True, True) < moved(False, True)
    written = {cost: n for cost, n in run.ops["optimizer"].items() if cost.parts}
    assert written
    assert written.items() <= run.fused["optimizer"].items()
