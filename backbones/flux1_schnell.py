"""`flux1-schnell`: FLUX.1 [schnell], distilled to 1 to 4 steps. For drawing; adapters come from `flux1-dev`."""

from loragraft.backbones.flux1 import flux1_spec

SPEC = flux1_spec(
    "schnell",
    guidance=1.0,
    guidance_kind="none",
    steps=4,
    refuses_training=(
        "flux1-schnell is distilled to 4 steps, and a flow-matching step at any other time pulls it back to what needs 20. Train on "
        "base=flux1-dev, whose layers have the same names and shapes, and draw with flux1-schnell: loragraft generate --adapter "
        "RUN --base flux1-schnell --any-base"
    ),
)
