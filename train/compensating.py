"""Training from LoftQ's start (`adapter.init=loftq`): the start is made once, kept in the run folder, and read by who needs it.

adapter/start.safetensors is written before the first step; every process, and every process that resumes, begins from that file,
and `loragraft adapter export --portable` takes it off again.
"""

from collections.abc import Callable

from accelerate import Accelerator
from torch import Tensor

from loragraft.adapters.checkpoint import component_of, load_adapter, write_adapter
from loragraft.adapters.formats.contract import COMPENSATING
from loragraft.adapters.inject import adapter_factors, load_factors
from loragraft.adapters.loftq import compensate
from loragraft.backbones.spec import Backbone
from loragraft.train.run_folder import RunError, RunFolder


def start_compensating(
    accelerator: Accelerator, backbone: Backbone, read: Callable[[str], Tensor], folder: RunFolder
) -> None:
    """Puts the injected adapter at the run's start; the first process makes it unless a checkpoint goes on from one.

    read: path -> 16-bit weight (`backbones.original_weights`). Raises ValueError as `compensate` does, RunError where the start of
    a run that is resumed is gone or another base's.
    """
    file, transformer = folder.start_file, backbone.transformer
    with accelerator.main_process_first():
        if folder.checkpoint is None and accelerator.is_main_process:
            print(compensate(transformer, read))
            about = {"name": "start", "base": backbone.spec.name, "base_id": backbone.base_id, "contract": COMPENSATING}
            factors = adapter_factors(transformer)
            write_adapter(factors, file.parent, about, component=component_of(transformer), file_name=file.name)
        if not file.exists():
            raise RunError(
                f"{file} is gone, and the adapter in {folder.path} cannot be made portable without it: put it back, or start over "
                "with --fresh (the old run is moved aside)"
            )
        start = load_adapter(file)
        if start.base_id != backbone.base_id:
            raise RunError(f"{file} is a start on base {start.base_id[:16]}; the base here is {backbone.base_id[:16]}")
        load_factors(transformer, start.pairs)
