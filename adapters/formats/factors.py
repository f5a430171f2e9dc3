"""One update of a weight, in whatever form a file has it -> factors A [r, K] and B [N, r] with the scale in B.

    LoRA            scale B A                                       (a convolution's A is [r, C, kh, kw], B [N, r, 1, 1])
    LoCon, CP       scale B (mid x A): A' = mid applied to A
    LoKr            scale kron(W1, W2);  W = Wa Wb:  kron(W1a, W2a) kron(W1b, W2b), rank r1 r2
    LoHa            scale (W1a W1b) o (W2a W2b):  B[n, ij] = W1a[n, i] W2a[n, j],  A[ij, k] = W1b[i, k] W2b[j, k]
    diff            the difference itself

scale = alpha / r. LoKr with two undivided factors has none (LyCORIS; ComfyUI `weight_adapter/lokr.py`), and there r is that of W2
where both are divided. Exact while the rank is at most `max_rank`; above it the best approximation of that rank (singular value
decomposition), with its relative error in the Frobenius norm. Sources: LyCORIS (arXiv:2309.14859), FedPara (arXiv:2108.06098).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loragraft.quantization.low_rank import low_rank

MAX_RANK = 128
"""Of an expanded LoKr, LoHa or difference, unless asked otherwise."""
LARGEST_LAYER = 2**18
"""Inputs (C kh kw) or outputs; SDXL has 23,040, FLUX.1 18,432."""
NO_LOW_RANK = {
    "dora": "DoRA divides by the norm of the changed weight, which is no low-rank update",
    "other": "OFT, BOFT, GLoRA and IA3 multiply the weight, which is no low-rank update",
}


@dataclass(frozen=True)
class Factors:
    """y += B A x, and how far that is from what the file says."""

    down: Tensor
    up: Tensor
    rank_in_file: int
    """0 where the file has no factors."""
    error: float = 0.0
    """|B A - update| / |update|, 0 = exact."""


def expand(parts: Mapping[str, Tensor], scale: float | None, max_rank: int = MAX_RANK) -> Factors:
    """The factors of one update; `scale` replaces alpha / r (a header says so).

    Raises ValueError saying what is missing, does not fit together, or has no low-rank form.
    """
    for part, reason in NO_LOW_RANK.items():
        if part in parts:
            raise ValueError(f"{reason}; merge it into a 16-bit base and quantize that instead")
    if "down" in parts or "up" in parts:
        check_plain(parts)
        return _plain(parts, scale)
    factor = float(parts["scalar"]) if "scalar" in parts else 1.0
    if any(part.startswith("lokr") for part in parts):
        return _kronecker(parts, factor, max_rank)
    if any(part.startswith("hada") for part in parts):
        return _hadamard(parts, factor, max_rank)
    if "diff" in parts:
        matrix = parts["diff"].float().flatten(1) if parts["diff"].ndim > 1 else parts["diff"]
        if matrix.ndim != 2:
            raise ValueError(
                f"the difference has shape {tuple(parts['diff'].shape)}, not that of a linear or convolution"
            )
        up, down = low_rank(matrix, max_rank, seed=0)
        found = Factors(down, up, 0, _distance(matrix, down, up))
        return _with_kernel(found, tuple(parts["diff"].shape[2:]))
    raise ValueError(f"it has only {', '.join(sorted(parts))}")


def _alpha_scale(parts: Mapping[str, Tensor], rank: int) -> float:
    """alpha / r, 1 where the file has no alpha (kohya, ComfyUI and diffusers agree on that)."""
    if "alpha" not in parts:
        return 1.0
    if parts["alpha"].numel() != 1:
        raise ValueError(f"alpha has {parts['alpha'].numel()} values instead of one")
    return float(parts["alpha"]) / rank


def check_plain(parts: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless A and B are there, and are matrices or weights of convolutions of one rank."""
    for part in ("down", "up"):
        if part not in parts:
            raise ValueError(f"has only one factor, {'B' if part == 'down' else 'A'}")
    down, up = parts["down"], parts["up"]
    for name, tensor in (("A", down), ("B", up)):
        if tensor.ndim not in (2, 4):
            raise ValueError(f"has {name} {tuple(tensor.shape)}, expected a matrix or a convolution's weight")
    if 0 in (*down.shape, *up.shape):
        raise ValueError(
            f"has A {tuple(down.shape)} and B {tuple(up.shape)}, factors without a number in them: rank 0 changes nothing"
        )
    if up.shape[1] != down.shape[0]:
        raise ValueError(f"has A {tuple(down.shape)} and B {tuple(up.shape)}: ranks differ")
    if up.ndim == 4 and up.shape[2:] != (1, 1):
        raise ValueError(f"has B {tuple(up.shape)}, expected a 1x1 convolution's [N, r, 1, 1]")


def _plain(parts: Mapping[str, Tensor], scale: float | None) -> Factors:
    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        down = torch.einsum("sr...,rc->sc...", parts["mid"].float(), down.float().flatten(1))
    rank = up.shape[1]
    if down.ndim == 4 and up.ndim == 2:
        up = up[..., None, None]
    elif down.ndim == 2 and up.ndim == 4:
        up = up.flatten(1)
    factor = _alpha_scale(parts, rank) if scale is None else scale
    factor *= float(parts["scalar"]) if "scalar" in parts else 1.0
    return Factors(down, up if factor == 1 else up.float() * factor, rank)


def _kronecker(parts: Mapping[str, Tensor], factor: float, max_rank: int) -> Factors:
    left, right = _lokr_factor(parts, "lokr_w1"), _lokr_factor(parts, "lokr_w2")
    divided = [pair[1].shape[0] for pair, name in ((left, "w1"), (right, "w2")) if f"lokr_{name}_b" in parts]
    scale = factor * (_alpha_scale(parts, divided[-1]) if divided else 1.0)
    _check_size(left[0].shape[0] * right[0].shape[0], left[1].shape[1] * right[1].shape[1])
    rank = left[0].shape[1] * right[0].shape[1]
    kernel = tuple(parts["lokr_t2"].shape[2:] if "lokr_t2" in parts else parts.get("lokr_w2", left[0]).shape[2:])
    error = 0.0
    if rank <= max_rank:
        up, down = torch.kron(left[0], right[0]), torch.kron(left[1], right[1])
    else:
        up, down, error = _truncated_kronecker(left, right, max_rank)
    return _with_kernel(Factors(down, up * scale, rank, error), kernel)


def _lokr_factor(parts: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """(P, Q) with P Q the Kronecker factor as a matrix [o, i kh kw]; the narrower side of an undivided one is the identity."""
    if name in parts:
        matrix = parts[name].float().flatten(1)
        rows, columns = matrix.shape
        return (matrix, torch.eye(columns)) if columns <= rows else (torch.eye(rows), matrix)
    a, b = parts.get(f"{name}_a"), parts.get(f"{name}_b")
    if a is None or b is None:
        raise ValueError(f"lacks {name}, or one of {name}_a and {name}_b")
    a, b = a.float(), b.float()
    if name == "lokr_w2" and "lokr_t2" in parts:
        core = parts["lokr_t2"].float()
        return a.T.contiguous(), torch.einsum("ijkl,jc->ickl", core, b).flatten(1)
    _check_inner(name, a, b)
    return a, b.flatten(1)


def _truncated_kronecker(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], rank: int
) -> tuple[Tensor, Tensor, float]:
    """The largest `rank` of the products of singular values: kron(U1 S1 V1, U2 S2 V2) = kron(U1, U2) kron(S1, S2) kron(V1, V2)."""
    (U1, S1, V1), (U2, S2, V2) = _svd(*left), _svd(*right)
    products = torch.outer(S1, S2).flatten()
    kept = products.argsort(descending=True)[:rank]
    i, j = kept // len(S2), kept % len(S2)
    root = products[kept].sqrt()
    up = torch.einsum("ar,br->abr", U1[:, i], U2[:, j]).reshape(-1, len(kept)) * root
    down = torch.einsum("ra,rb->rab", V1[i], V2[j]).reshape(len(kept), -1) * root[:, None]
    total = products.square().sum()
    lost = (1 - products[kept].square().sum() / total).clamp(min=0).sqrt() if total > 0 else torch.tensor(0.0)
    return up, down, float(lost)


def _hadamard(parts: Mapping[str, Tensor], factor: float, max_rank: int) -> Factors:
    names = [f"hada_w{k}_{side}" for k in (1, 2) for side in "ab"]
    missing = [name for name in names if name not in parts]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    w1a, w1b, w2a, w2b = (parts[name].float() for name in names)
    scale = factor * _alpha_scale(parts, w1b.shape[0])
    kernel: tuple[int, ...] = ()
    if "hada_t1" in parts and "hada_t2" in parts:
        kernel = tuple(parts["hada_t1"].shape[2:])
        w1b, w2b = (
            torch.einsum("ijkl,jc->ickl", parts[core].float(), b).flatten(1)
            for core, b in (("hada_t1", w1b), ("hada_t2", w2b))
        )
        w1a, w2a = w1a.T.contiguous(), w2a.T.contiguous()
    _check_inner("hada_w1", w1a, w1b)
    _check_inner("hada_w2", w2a, w2b)
    if w1a.shape[0] != w2a.shape[0] or w1b.shape[1] != w2b.shape[1]:
        raise ValueError("its two products have different shapes")
    up = torch.einsum("ni,nj->nij", w1a, w2a).flatten(1)
    down = torch.einsum("ik,jk->ijk", w1b, w2b).flatten(0, 1)
    rank, error = up.shape[1], 0.0
    if rank > max_rank:
        U, S, V = _svd(up, down)
        root = S[:max_rank].sqrt()
        error = float((S[max_rank:].square().sum() / S.square().sum().clamp(min=1e-30)).sqrt())
        up, down = U[:, :max_rank] * root, V[:max_rank] * root[:, None]
    return _with_kernel(Factors(down, up * scale, rank, error), kernel)


def _check_size(outputs: int, inputs: int) -> None:
    """A product of small factors may be of any size; layers are not."""
    if max(outputs, inputs) > LARGEST_LAYER:
        raise ValueError(
            f"is an update of {inputs} inputs and {outputs} outputs; no layer has more than {LARGEST_LAYER}"
        )


def _check_inner(name: str, a: Tensor, b: Tensor) -> None:
    if a.ndim < 2 or b.ndim < 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"{name}_a {tuple(a.shape)} and {name}_b {tuple(b.shape)} do not fit together")


def _svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V of `up @ down` from a decomposition of its small core: the product itself is never formed."""
    left, upper = torch.linalg.qr(up.double())
    right, lower = torch.linalg.qr(down.double().T)
    U, S, V = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return (left @ U).float(), S.float(), (V @ right.T).float()


def _distance(matrix: Tensor, down: Tensor, up: Tensor) -> float:
    norm = matrix.norm()
    return float((matrix - up @ down).norm() / norm) if norm > 0 else 0.0


def _with_kernel(found: Factors, kernel: tuple[int, ...]) -> Factors:
    """The same with a convolution's shapes, where the file says which."""
    return shaped(found, (kernel[0], kernel[1])) if len(kernel) == 2 else found


def shaped(found: Factors, kernel: tuple[int, int]) -> Factors:
    """A as [r, C, kh, kw], B as [N, r, 1, 1]. Raises ValueError if A's columns are not C kh kw."""
    if found.down.ndim == 4:
        return found
    if found.down.shape[1] % (kernel[0] * kernel[1]):
        raise ValueError(f"{found.down.shape[1]} inputs are not those of a {kernel[0]}x{kernel[1]} convolution")
    down = found.down.reshape(found.down.shape[0], -1, *kernel)
    return Factors(down, found.up[..., None, None], found.rank_in_file, found.error)
