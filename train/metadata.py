"""What an adapter file says about itself. Nothing local goes in: no paths, no user or host names."""

from importlib.metadata import version
from typing import Any

import loragraft
from loragraft.adapters.formats.contract import COMPENSATING, PORTABLE, START_HASH, start_hash
from loragraft.backbones.spec import Backbone
from loragraft.data.dataset import LatentCache
from loragraft.recipes.load import recipe_hash, recipe_to_dict
from loragraft.recipes.schema import Recipe
from loragraft.train.run_folder import RunFolder


def adapter_metadata(recipe: Recipe, backbone: Backbone, cache: LatentCache, folder: RunFolder) -> dict[str, Any]:
    """Base (name, id, profile or "16bit"), contract with the hash of a start, recipe (resolved, hash), data fingerprint, rank, alpha, what was measured, versions."""
    start = {START_HASH: start_hash(folder.start_file)} if recipe.adapter.init == "loftq" else {}
    return start | {
        "name": recipe.name,
        "base": backbone.spec.name,
        "base_id": backbone.base_id,
        "profile": backbone.profile or "16bit",
        "contract": COMPENSATING if start else PORTABLE,
        "recipe_hash": recipe_hash(recipe),
        "recipe": recipe_to_dict(recipe, public=True),
        "data_fingerprint": cache.fingerprint,
        "rank": recipe.adapter.rank,
        "alpha": recipe.adapter.alpha,
        "targets": list(recipe.adapter.targets or backbone.spec.lora_targets),
        "steps": folder.summary.get("best_step", folder.step),
        "validation_loss_start": folder.summary.get("validation_loss_start"),
        "validation_loss_end": folder.summary.get("validation_loss_end"),
        "versions": {"loragraft": loragraft.__version__} | {p: version(p) for p in ("torch", "diffusers", "peft")},
    }
