"""`flux1-dev`: FLUX.1 [dev], guidance-distilled.

Trained at a guidance embedding of 1, where the distilled model is the plain flow model whose velocity the loss asks for, as
diffusers' and kohya's training scripts do; sampled at 3.5.
"""

from loragraft.backbones.flux1 import flux1_spec

SPEC = flux1_spec("dev", guidance=3.5, guidance_kind="embedded", training_guidance=1.0, steps=28)
