"""What an adapter file says about itself. Nothing local goes in: no paths, no user or host names."""

import json
from importlib.metadata import version
from typing import Any

import loragraft
from loragraft.backbones.spec import Backbone
from loragraft.recipes.load import recipe_to_dict
from loragraft.recipes.schema import Recipe
from loragraft.train.run_folder import RunFolder


def adapter_metadata(recipe: Recipe, recipe_hash: str, backbone: Backbone, folder: RunFolder) -> dict[str, Any]:
    """Base (name, id, profile), recipe (resolved, hash), rank, alpha, what was measured, versions."""
    resolved = recipe_to_dict(recipe)
    if resolved["data"].get("folder"):
        resolved["data"]["folder"] = str(resolved["data"]["folder"]).rstrip("/").rpartition("/")[2]
    return {
        "name": recipe.name,
        "base": backbone.spec.name,
        "base_id": backbone.base_id,
        "profile": backbone.profile,
        "recipe_hash": recipe_hash,
        "recipe": json.loads(json.dumps(resolved)),
        "rank": recipe.adapter.rank,
        "alpha": recipe.adapter.alpha,
        "targets": list(recipe.adapter.targets or backbone.spec.lora_targets),
        "steps": folder.step,
        "validation_loss_start": folder.summary.get("validation_loss_start"),
        "validation_loss_end": folder.summary.get("validation_loss_end"),
        "versions": {"loragraft": loragraft.__version__} | {p: version(p) for p in ("torch", "diffusers", "peft")},
    }
