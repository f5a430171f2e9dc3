"""Loragraft: train LoRA adapters on a frozen SVDQuant INT4 backbone, graft them into its low-rank branch."""

__version__ = "0.1.0"
