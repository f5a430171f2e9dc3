"""`sd-turbo`: Stable Diffusion 2.1 distilled to 1 to 4 steps. For drawing; its undistilled sibling is no base here."""

from loragraft.backbones.stable_diffusion import unet_spec

SPEC = unet_spec(
    "sd-turbo",
    resolution=512,
    guidance=1.0,
    guidance_kind="none",
    steps=4,
    refuses_training=(
        "sd-turbo is distilled adversarially to 4 steps, and a step on the noise-prediction loss pulls it back to what needs 30. What it "
        "was distilled from, Stable Diffusion 2.1, is no base here: an adapter that another program trained on that draws with "
        "loragraft generate --adapter FILE --base sd-turbo --any-base. To train here and draw in 4 steps take base=sdxl for "
        "sdxl-turbo, or base=flux1-dev for flux1-schnell"
    ),
)
