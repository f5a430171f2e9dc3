"""Our kernels compiled by other processes before they are launched, into Triton's cache on disk.

    with recorded() as launches:              # kernels launched in here are written down, neither compiled nor run
        layer(x)
    pool.submit(compile_recorded, launch, ...)  # each, anywhere: what is launched afterwards is found in the cache

Triton compiles a kernel at its first launch, one after the other, and needs Python's lock for a good part of that time. What is
written down is what the launching function asked for, specializations included: there is no second list that could go stale.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime import driver

OURS = __name__.rpartition(".")[0]
PTXAS = "TRITON_PTXAS_PATH"


@dataclass(frozen=True)
class Launch:
    """A kernel as it was launched: where it is defined, for what it is specialized (Triton's own JSON), the GPU, and what the
    launching process takes for its assembler's version: it remembers its first answer, whatever Inductor sets afterwards."""

    module: str
    name: str
    specialization: str
    target: tuple[str, Any, int]
    assembler: str


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """While this is entered, this thread's launches of our kernels that are not compiled yet do nothing but join the list.

    Tensors that they would have written keep whatever they hold. A backward pass must run on this thread
    (`torch.autograd.set_multithreading_enabled`). Each specialization is listed once.
    """
    launches: dict[Launch, None] = {}
    thread, before = threading.get_ident(), triton.knobs.runtime.jit_cache_hook

    def record(*, fn: Any, compile: dict[str, Any], **others: Any) -> bool | None:
        if threading.get_ident() != thread or not fn.module.startswith(OURS):
            return None if before is None else before(fn=fn, compile=compile, **others)
        target = driver.active.get_current_target()
        gpu = (target.backend, target.arch, target.warp_size)
        launches[Launch(fn.module, fn.name, compile["specialization_data"], gpu, get_ptxas_version(target.arch))] = None
        return True  # Triton then neither compiles nor launches

    listed: list[Launch] = []
    triton.knobs.runtime.jit_cache_hook = record
    try:
        yield listed
    finally:
        triton.knobs.runtime.jit_cache_hook = before
        listed.extend(launches)


def compile_recorded(launch: Launch, cache: str, launcher: bool = False) -> None:
    """Compiles one kernel into the cache folder; `launcher`: also the C code that passes its arguments (Triton 3.6), which
    needs a driver."""
    os.environ["TRITON_CACHE_DIR"] = cache
    kernel = getattr(import_module(launch.module), launch.name)
    found = json.loads(launch.specialization)
    constants = dict(zip(map(tuple, found["constant_keys"]), found["constant_vals"], strict=True))
    attributes = dict(zip(map(tuple, found["attrs_keys"]), found["attrs_vals"], strict=True))
    options = {name: _tuples(value) for name, value in found["options"].items()}
    make = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = make(kernel, found["signature"], constants, attributes)
    with _assembler(launch):
        made = triton.compile(source, target=GPUTarget(*launch.target), options=options)
    if launcher and hasattr(nvidia, "make_launcher"):
        nvidia.CudaLauncher(made.src, made.metadata)


@contextmanager
def _assembler(launch: Launch) -> Iterator[None]:
    """Its version is part of the cache's key; Inductor's workers have torch's own, and the launching process may have Triton's."""
    before = os.environ.get(PTXAS)
    try:
        for path in (before, None):
            _set_assembler(path)
            if get_ptxas_version(launch.target[1]) == launch.assembler:
                break
        yield
    finally:
        _set_assembler(before)


def _set_assembler(path: str | None) -> None:
    os.environ.pop(PTXAS, None)
    if path is not None:
        os.environ[PTXAS] = path
    get_ptxas_version.cache_clear()


def _tuples(value: Any) -> Any:
    """JSON has no tuples, and options are part of the cache's key by their text."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
