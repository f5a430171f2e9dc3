"""The rounding kernel against the plain function: in Triton's interpreter, and compiled for every GPU that is supported."""

import os
import subprocess
import sys
import textwrap

import pytest

CHECK = """
    import torch
    from loragraft.kernels.layout import relative_rms
    from loragraft.quantization.fused_rounding import round_progressive_fused
    from loragraft.quantization.settings import QuantSettings
    from loragraft.quantization.split import round_weight
    from loragraft.quantization.weight_quant import round_progressive

    generator = torch.Generator().manual_seed(0)
    for K, group in ((64, 64), (200, 64), (256, 128), (1280, 64), (1280, 128)):
        weight = torch.randn(9, K, generator=generator)
        weight[1] = weight[1] ** 5
        weight[2] = weight[2].abs() + 0.1
        weight[3] = 0
        weight[4] = torch.where(weight[4] < 0, -3.0, 3.0)
        weight[:, 5] *= 40
        plain, fused = round_progressive(weight, group), round_progressive_fused(weight, group)
        assert torch.equal(fused.scales["row_scale"], plain.scales["row_scale"])
        same = torch.ones(9, K // group if K % 128 == 0 else (K + 127) // 128 * 128 // group, dtype=torch.bool)
        for name in ("group_scale", "group_zero"):
            assert fused.scales[name].dtype == torch.uint8 and fused.scales[name].shape == plain.scales[name].shape
            same &= (fused.scales[name] == plain.scales[name]).T
        assert same.float().mean() > 0.97  # the others are ties
        columns = same.repeat_interleave(group, 1)
        assert torch.equal(fused.codes_NK[columns], plain.codes_NK[columns])
        assert torch.equal(fused.dense_NK[columns[:, :K]], plain.dense_NK[columns[:, :K]])
        errors = [(r.dense_NK - weight).norm() for r in (plain, fused)]
        assert abs(errors[1] - errors[0]) <= 1e-5 * errors[0]
        zero, scale = (
            fused.scales[n].int().T.repeat_interleave(group, 1) for n in ("group_zero", "group_scale")
        )
        dense = ((fused.codes_NK.int() - zero) * scale).float() * fused.scales["row_scale"][:, None]
        assert torch.equal(dense[:, :K], fused.dense_NK)
        chosen = round_weight(weight, QuantSettings(group_size=group, search="subsampled"))
        assert torch.equal(chosen.codes_NK, fused.codes_NK)  # it is the one that is used
    print("agrees")
"""
COMPILE = """
    import sys
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from loragraft.quantization.fused_rounding import ELEMENTS, progressive_kernel

    pointers = ("*fp32", "*fp32", "*fp32", "*u8", "*u8", "*u8", "i32", "i32", "i32", "constexpr", "constexpr", "constexpr")
    for group in (64, 128):
        source = ASTSource(
            progressive_kernel,
            dict(zip(progressive_kernel.arg_names, pointers)),
            {(9,): 119.0, (10,): group, (11,): ELEMENTS // group},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))
        assert compiled.metadata.shared <= 99 * 1024
    print("compiled")
"""


def _run(code: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_agrees_with_the_plain_function() -> None:
    assert "agrees" in _run(CHECK, TRITON_INTERPRET="1")


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_compiles_ahead_of_time(capability: int) -> None:
    environment = {"TRITON_INTERPRET": "0"}
    assert "compiled" in _run(COMPILE, str(capability), **environment)
