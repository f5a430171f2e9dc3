"""`sd15`: Stable Diffusion 1.5. Trained and drawn with the caption left out as the other side of guidance."""

from loragraft.backbones.stable_diffusion import unet_spec

SPEC = unet_spec("sd15", resolution=512, guidance=7.5, steps=30)
