"""Loragraft: train LoRA adapters on a frozen SVDQuant INT4 backbone, graft them into its low-rank branch."""

import os

__version__ = "0.1.0"

# diffusers' pipelines make transformers say at import that torchvision is missing, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
