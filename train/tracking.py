"""The run as Weights & Biases sees it, through accelerate's tracker: recipe, ledger, curves, images, adapter.

Offline unless the recipe asks for more: the run lies in <run folder>/wandb and `wandb sync` uploads it when you
want. A resumed run keeps its W&B id.
"""

import hashlib
import re
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.tracking import WandBTracker
from PIL.Image import Image

from loragraft.backbones.spec import Backbone
from loragraft.recipes.load import recipe_to_dict
from loragraft.recipes.schema import Recipe
from loragraft.train.run_folder import RunFolder


class Tracking:
    """Logs to one W&B run, or to nothing (`tracking.mode: disabled`, and every process but the first)."""

    def __init__(self, tracker: WandBTracker | None, name: str) -> None:
        self._tracker = tracker
        self._name = name

    @classmethod
    def start(cls, recipe: Recipe, backbone: Backbone, folder: RunFolder, accelerator: Accelerator) -> "Tracking":
        """Opens the run with the resolved recipe, its hash, the base's id and the ledger as its config. Raises ValueError where
        W&B opens none."""
        if recipe.tracking.mode == "disabled" or not accelerator.is_main_process:
            return cls(None, recipe.name)
        import wandb  # here and below: a second to import, and `disabled` needs none

        run_id = hashlib.sha256(f"{folder.recipe_hash}/{folder.path.name}".encode()).hexdigest()[:12]
        mode = wandb_mode(recipe.tracking.mode)
        if mode == "offline":
            # The run's own mode does not reach W&B's telemetry, which asks the process-wide settings and would go online.
            wandb.setup(settings=wandb.Settings(mode="offline"))
        tracker = WandBTracker(
            recipe.tracking.project,
            name=recipe.name,
            id=run_id,
            resume="allow",
            mode=mode,
            dir=str(folder.path),
            settings=wandb.Settings(silent=True, disable_git=True, disable_code=True, x_disable_stats=True),
        )
        try:
            tracker.start()
        except wandb.Error as error:
            raise ValueError(f"tracking.mode={recipe.tracking.mode}: {_no_run(error)}") from error
        tracker.store_init_configuration(
            {
                "recipe": recipe_to_dict(recipe),
                "recipe_hash": folder.recipe_hash,
                "base_id": backbone.base_id,
                "ledger": backbone.ledger.to_dict(),
            }
        )
        return cls(tracker, recipe.name)

    def log(self, values: dict[str, float], step: int) -> None:
        """Scalars at an optimizer step."""
        if self._tracker is not None:
            self._tracker.log(values, step=step)

    def log_images(self, images: list[tuple[Image, str]], step: int) -> None:
        """Images with their prompts as captions."""
        if self._tracker is not None:
            import wandb

            shown = [wandb.Image(image, caption=prompt) for image, prompt in images]
            self._tracker.log({"samples": shown}, step=step)

    def log_adapter(self, file: Path) -> None:
        """The adapter as an artifact of type `adapter`, whose name has ASCII letters, digits and `._-` only."""
        if self._tracker is not None:
            import wandb

            plain = re.sub(r"[^A-Za-z0-9._-]+", "-", self._name).strip("-") or "lora"
            artifact = wandb.Artifact(f"{plain}-adapter", type="adapter", description=self._name)
            artifact.add_file(str(file))
            self._tracker.run.log_artifact(artifact)

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracker is not None:
            self._tracker.run.finish(exit_code=0 if error is None else 1)


def check_login(mode: str) -> None:
    """Raises ValueError where W&B would be online and no login is stored: known before anything is loaded."""
    if mode == "online":
        import wandb

        if not wandb.api.api_key:
            raise ValueError(f"tracking.mode=online: {_no_run('no login is stored here; `wandb login` stores one')}")


def _no_run(why: object) -> str:
    return f"Weights & Biases opens no run ({why}); tracking.mode=offline needs neither login nor network, disabled keeps nothing"


def wandb_mode(mode: Literal["offline", "auto", "online", "disabled"]) -> Any:
    """`auto` is online where a login is stored, offline otherwise; the others are themselves."""
    if mode == "auto":
        import wandb

        return "online" if wandb.api.api_key else "offline"
    return mode
