"""`sana-06b`: SANA at 1024 px, 0.6 B: 28 blocks of width 1152."""

from loragraft.backbones.sana import sana_spec

SPEC = sana_spec("06b")
