"""`sana-16b`: SANA at 1024 px, 1.6 B: 20 blocks of width 2240."""

from loragraft.backbones.sana import sana_spec

SPEC = sana_spec("16b")
