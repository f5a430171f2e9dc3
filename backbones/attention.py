"""Which attention a diffusers transformer runs: torch's SDPA (its flash-2 where it can), or one of `kernels/attention.py`.

diffusers' processors call `dispatch_attention_fn` with a backend of a closed list; ours join that list, for this process and
only for the processors that are told so, instead of taking the place of one of its names.
"""

from typing import Any, Literal

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn

from loragraft.kernels.attention import Backend, attention, check_backend

Attention = Literal["sdpa", "cudnn_forward", "flash_attn_4"]


def set_attention(transformer: nn.Module, name: Attention) -> int:
    """Every attention layer of `transformer` uses `name` from here on. Returns how many there are.

    Raises ValueError where the backend cannot run (`check_backend`), or if the model has no attention that can be told.
    """
    processors: list[Any] = [
        module.processor
        for module in transformer.modules()
        if hasattr(getattr(module, "processor", None), "_attention_backend")
    ]
    if name != "sdpa":
        if not processors:
            raise ValueError(
                f"{type(transformer).__name__} has no attention that takes another backend: set train.attention=sdpa"
            )
        check_backend(name, next(transformer.parameters()).device)
    for processor in processors:
        processor._attention_backend = None if name == "sdpa" else _member(name)
    return len(processors)


def _member(name: Backend) -> AttentionBackendName:
    """The entry of diffusers' list for one of ours, made and registered at first use."""
    label = f"loragraft_{name}"
    for known in _AttentionBackendRegistry._backends:
        if known.value == label:
            return known
    member = str.__new__(AttentionBackendName, label)
    member._name_, member._value_ = label.upper(), label

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        if attn_mask is not None or dropout_p or is_causal or scale is not None or enable_gqa or _parallel_config:
            raise ValueError(f"attention {name} is plain attention over whole sequences: set train.attention=sdpa")
        # Under autocast the norms of q and k return float32; torch's own attention casts them back as well.
        return attention(query.to(value.dtype), key.to(value.dtype), value, name)

    _AttentionBackendRegistry.register(member)(run)
    return member
