"""What a first step waits for is begun early, beside the caller."""

import importlib
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.runtime.jit import JITFunction

from loragraft.adapters.inject import inject_adapter, remove_adapter
from loragraft.adapters.joined import JoinedFactors
from loragraft.backbones.architectures import FLUX
from loragraft.backbones.flow import FLUX_LIKE
from loragraft.backbones.like_later import LikeLater
from loragraft.kernels import hopper_gemm, hopper_quant
from loragraft.kernels.attention import attention
from loragraft.kernels.compile_table import TABLE
from loragraft.kernels.precompile import Launch, compile_recorded, recorded
from loragraft.quantization.linear import share_inputs
from loragraft.recipes.schema import AdapterConfig
from loragraft.train import warm


def test_one_layer_of_every_kind_is_launched(tiny_flux: Any) -> None:
    """At the rows that a step gives it: modulation reads one a sample, and its layers need no adapter to be warmed."""
    model, parameters = tiny_flux()
    kinds = warm.layer_kinds(model)
    shapes = {(base.in_features, base.out_features): (base.numerics, type(module).__name__) for base, module in kinds}
    assert len(shapes) == len(kinds) == 6
    assert shapes[128, 512] == shapes[640, 128] == ("w4a8", "SVDQuantLoraLinear")
    assert shapes[128, 768] == shapes[128, 384] == ("w4a16", "SVDQuantLinear")
    seen: list[tuple[tuple[int, ...], bool]] = []
    for _, module in kinds:
        module.register_forward_pre_hook(lambda _, args: seen.append((tuple(args[0].shape), args[0].requires_grad)))
    latents, text = torch.zeros(2, 4, 8, 8), torch.zeros(2, 5, 64)
    tokens = FLUX_LIKE.rows(tuple(latents.shape), {"prompt_embeds": text})
    warm.launch_kinds(kinds, tokens, 2, torch.float32)
    assert sorted(seen) == sorted(
        [((2, 128), False)] * 2 + [((rows, K), True) for rows in (32, 10, 42) for K in (128, 128, 512, 640)]
    )
    assert all(parameter.grad is None for parameter in parameters)


def test_workers_are_started_beside_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.async_compile import AsyncCompile

    begun: list[str] = []
    for name in ("warm_pool", "wakeup"):
        monkeypatch.setattr(
            AsyncCompile, name, lambda name=name: begun.append(f"{name} on {threading.current_thread().name}")
        )
    warm.start_workers().join()
    assert begun == ["warm_pool on start-compile-workers", "wakeup on start-compile-workers"]


def test_workers_are_given_all_that_a_step_launches(
    tiny_flux: Any, loss_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a GPU that is not there: what forward and backward of the whole model launch is among it."""
    from torch._inductor import async_compile

    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 80, 32),
        get_current_device=lambda: 78,
        get_current_stream=lambda _: 0,
    )
    pool, given = ThreadPoolExecutor(1), []

    def compiled(launch: Launch, cache: str, launcher: bool) -> None:
        given.append(launch)
        assert (cache, launcher, launch.target) == (str(tmp_path), False, ("cuda", 80, 32))

    model, _ = tiny_flux(torch.bfloat16)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # ops on the CPU launch their kernels
    monkeypatch.setattr(triton.runtime.driver, "_active", gpu)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(warm, "compile_recorded", compiled)
    monkeypatch.setattr(async_compile, "get_compile_threads", lambda: 2)
    monkeypatch.setattr(async_compile.AsyncCompile, "process_pool", lambda: pool)
    tokens = FLUX_LIKE.rows((2, 4, 8, 8), {"prompt_embeds": torch.empty(2, 5, 64)})
    warm.warm_layers(model, tokens, 2, torch.bfloat16).join()
    count = len(given)
    assert len(set(given)) == count
    first = model.transformer_blocks[0]
    first.register_forward_pre_hook(LikeLater(first), with_kwargs=True)  # as `compile_blocks` does: dx in every block
    with recorded() as launched:
        loss_of(model, torch.bfloat16).backward()
    assert {launch.name for launch in launched} == {
        "effective_weight_kernel", "gemv_kernel", "row_product_kernel", "sum_parts_kernel", "token_quant_kernel", "w4a8_gemm_kernel"
    }  # fmt: skip
    assert [launch for launch in launched if launch not in given] == []
    monkeypatch.setattr(async_compile, "get_compile_threads", lambda: 1)  # no workers: nothing is handed over
    warm.warm_layers(model, tokens, 2, torch.bfloat16).join()
    assert len(given) == count


class AskedError(Exception):
    """A compilation came as far as its key in the cache."""


def keys_asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(kernel, key in the cache) of everything that Triton is asked to compile from here on; nothing is."""
    keys: list[tuple[str, str]] = []
    compiler = importlib.import_module("triton.compiler.compiler")  # triton.compiler.compile hides it
    launched = JITFunction._do_compile

    def looked_up(key: str) -> None:
        raise AskedError(key)

    def noted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return launched(kernel, *args, **kwargs)
        except AskedError as asked:
            keys.append((kernel.__name__, str(asked)))

    monkeypatch.setattr(compiler, "get_cache_manager", looked_up)
    monkeypatch.setattr(JITFunction, "_do_compile", noted)
    return keys


@pytest.mark.parametrize("remembers", ["its own", "the compiler's"])
def test_a_launch_looks_for_the_key_that_a_worker_wrote(
    remembers: str, tiny_flux: Any, loss_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every kernel of a step on Hopper, for either of the assemblers that the launching process may have asked first: Triton's,
    or the one that torch's compiler sets, in its workers always and in the launching process at some time."""
    assembler = tmp_path / "ptxas"
    assembler.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 99.9, V99.9.1'\n")
    assembler.chmod(0o755)
    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 79 if remembers == "its own" else 80,
        get_current_stream=lambda _: 0,
    )
    card = SimpleNamespace(multi_processor_count=132, name="NVIDIA H100 80GB HBM3")
    model, _ = tiny_flux(torch.bfloat16)
    remove_adapter(model)
    inject_adapter(model, AdapterConfig(rank=8, alpha=8), FLUX.quantize)  # whose rows TMA can move
    share_inputs(model)
    JoinedFactors(model, torch.bfloat16)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # ops on the CPU launch their kernels
    monkeypatch.setattr(triton.runtime.driver, "_active", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    for module in (hopper_gemm, hopper_quant):
        monkeypatch.setattr(module, "on_hopper", lambda *_: True)
    get_ptxas_version.cache_clear()
    if remembers == "the compiler's":
        monkeypatch.setenv("TRITON_PTXAS_PATH", str(assembler))
    tokens = FLUX_LIKE.rows((2, 4, 8, 8), {"prompt_embeds": torch.empty(2, 5, 64)})
    with torch.autograd.set_multithreading_enabled(False), recorded() as launches:
        warm.launch_kinds(warm.layer_kinds(model), tokens, 2, torch.bfloat16)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(assembler))
    remembered = get_ptxas_version(90)
    keys, written = keys_asked(monkeypatch), []
    for launch in launches:  # a worker
        get_ptxas_version.cache_clear()
        with pytest.raises(AskedError) as asked:
            compile_recorded(launch, str(tmp_path))
        written.append((launch.name, str(asked.value)))
    get_ptxas_version.cache_clear()
    if remembers == "its own":
        monkeypatch.delenv("TRITON_PTXAS_PATH")
    assert get_ptxas_version(90) == remembered
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(assembler))
    first = model.transformer_blocks[0]
    first.register_forward_pre_hook(LikeLater(first), with_kwargs=True)
    with torch.autograd.set_multithreading_enabled(False):
        loss_of(model, torch.bfloat16).backward()
    assert {name for name, _ in keys} == {
        "effective_weight_kernel", "gemv_kernel", "row_product_kernel", "sum_parts_kernel", "hopper_quant_kernel", "hopper_gemm_kernel"
    }  # fmt: skip
    assert set(keys) - set(written) == set()
    get_ptxas_version.cache_clear()


@pytest.mark.gpu
def test_what_a_step_launches_was_compiled_elsewhere(
    tiny_flux: Any, loss_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As above, with the processes and on a GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    model, _ = tiny_flux(torch.bfloat16, device="cuda")
    for build in TABLE:  # what other tests have compiled
        build.kernel.device_caches.clear()
    tokens = FLUX_LIKE.rows((2, 4, 8, 8), {"prompt_embeds": torch.empty(2, 5, 64)})
    warm.warm_layers(model, tokens, 2, torch.bfloat16).join()
    assert "row_product_kernel" in {file.stem for file in tmp_path.glob("*/*.cubin")}, "written by a worker"
    found: list[bool] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, cache_hit, **_: found.append(cache_hit))
    first = model.transformer_blocks[0]
    first.register_forward_pre_hook(LikeLater(first), with_kwargs=True)
    loss_of(model, torch.bfloat16, "cuda").backward()
    assert found
    assert all(found)


@pytest.mark.gpu
def test_flash_attention_4_is_compiled_for_every_length() -> None:
    interface = pytest.importorskip("flash_attn.cute.interface")
    warm.start_workers("flash_attn_4", torch.device("cuda")).join()
    caches = (interface._flash_attn_fwd.compile_cache, interface._flash_attn_bwd.compile_cache)
    before = [len(cache) for cache in caches]
    assert all(before)
    x = torch.randn(2, 320, *warm.HEADS, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    attention(x, x, x, "flash_attn_4").sum().backward()
    assert [len(cache) for cache in caches] == before
