"""Memory of encoding captions: what a base's text encoders take on a GPU, by a dry run of their true shapes.

T5-XXL is streamed: its layers come to the device one at a time; CLIP's text models lie there as a whole.
"""

from collections.abc import Sequence

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import T5Config, T5EncoderModel

from loragraft.backbones.flux1_encoders import CAPTIONS_TOGETHER
from loragraft.backbones.spec import BaseSpec
from loragraft.train.dry_run import dry_infer

T5_XXL = T5Config(
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)


def text_stage(spec: BaseSpec, encoders: Sequence[nn.Module]) -> int:
    """Peak bytes while captions are encoded."""
    external = spec.external
    if external is None:
        return sum(tensor.nbytes for module in encoders for tensor in (*module.parameters(), *module.buffers()))
    if not external.t5_tokens:
        return external.text_bytes
    with init_empty_weights():
        t5 = nn.Module.to(T5EncoderModel(T5_XXL), dtype=torch.bfloat16).requires_grad_(False)
    run = dry_infer(t5, lambda: t5(torch.zeros(CAPTIONS_TOGETHER, external.t5_tokens, dtype=torch.long)))
    layers = [sum(p.nbytes for p in block.parameters()) for block in t5.encoder.block]
    return run.peak - run.static + max(layers) + external.text_bytes
