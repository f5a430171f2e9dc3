"""Kernels compiled beside the model: while one thread traces blocks, another launches every layer once, at the sizes to come.

Triton compiles a kernel at its first launch, one after the other, and needs Python for little of that time; so does tracing
the other way round. What is computed here is thrown away.
"""

import threading
from collections.abc import Collection

import torch
from torch import Tensor, nn

from loragraft.adapters.inject import SVDQuantLoraLinear
from loragraft.quantization.linear import SVDQuantLinear


def token_counts(tensors: dict[str, Tensor]) -> set[int]:
    """How many rows the linear layers of a transformer over 2x2 patches get from this micro-batch: image, text, both."""
    b, _c, h, w = tensors["latents"].shape
    image, text = b * (h // 2) * (w // 2), b * tensors["prompt_embeds"].shape[1]
    return {image, text, image + text}


def warm_layers(transformer: nn.Module, tokens: Collection[int], dtype: torch.dtype) -> threading.Thread:
    """Starts a thread that runs one layer of every kind forward and backward, for each of the row counts; returns it."""
    kinds: dict[tuple[object, ...], nn.Module] = {}
    for module in transformer.modules():
        if isinstance(module, SVDQuantLoraLinear):
            base = module.get_base_layer()
            if isinstance(base, SVDQuantLinear):  # other formats have no kernels of ours to compile
                kind = (base.in_features, base.out_features, base.numerics, base.hadamard, base.smoothed)
                kinds.setdefault(kind, module)

    def run() -> None:
        for module in kinds.values():
            base = module.get_base_layer()  # type: ignore[operator]
            device = base.qweight.device
            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
                for rows in sorted(tokens):
                    x = torch.zeros(rows, base.in_features, device=device, dtype=dtype, requires_grad=True)
                    y = module(x)
                    torch.autograd.grad(
                        y, [x, *(p for p in module.parameters() if p.requires_grad)], torch.zeros_like(y)
                    )

    thread = threading.Thread(target=run, name="warm-kernels", daemon=True)
    thread.start()
    return thread
