"""Step number -> what the denoiser sees in that step, on every process its part; and reading ahead of a GPU."""

import hashlib
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Thread
from types import TracebackType

import torch
from accelerate import Accelerator
from torch import Tensor

from loragraft.backbones.spec import Backbone
from loragraft.data.dataset import Batch, LatentDataset, collate, text_of
from loragraft.data.order import BatchOrder, batch_indices
from loragraft.recipes.schema import Recipe

MicroBatch = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]
"""latents [B, C, h, w], noise of the same shape, times [B], text."""


class Batches:
    """Step number -> this process's part of the step's batches. Holds no state that a resume would have to restore.

    Every micro-batch is of one bucket, the same on all processes (`data/order.py`); on a GPU, a thread reads ahead.

    With `prior`, every second sample of a batch is one of its images, whatever the number of processes; `weights` [B]
    then says how much each sample counts in the loss.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        empty_text: dict[str, Tensor],
        recipe: Recipe,
        backbone: Backbone,
        accelerator: Accelerator,
        prior: LatentDataset | None = None,
    ) -> None:
        self.dataset, self.empty_text, self.config, self.prior = dataset, empty_text, recipe.train, prior
        self.device, self.dtype = backbone.device, backbone.dtype
        self.process = backbone.spec.family.process
        self.total = recipe.train.batch_size * accelerator.num_processes
        self.mine = slice(accelerator.process_index, None, accelerator.num_processes)
        own = self.total if prior is None else self.total - self.total // 2
        self.order = BatchOrder(dataset.shapes, own, recipe.train.seed)
        self.weights: Tensor | None = None
        if prior is not None:
            weights = [recipe.data.prior.weight if place % 2 else 1.0 for place in range(self.total)]
            self.weights = torch.tensor(weights[self.mine], device=self.device)
        depth = recipe.data.prefetch if self.device.type == "cuda" else 0
        self.ahead = ReadAhead(self.read, depth, recipe.train.steps * recipe.train.accumulation, self.device)

    def __call__(self, step: int) -> Iterator[MicroBatch]:
        """Yields each of `accumulation` micro-batches, on the device."""
        for micro in range(self.config.accumulation):
            latents, noise, times, text = self.ahead(step * self.config.accumulation + micro)
            yield (
                latents.to(self.device, self.dtype, non_blocking=True),
                noise.to(self.device, self.dtype, non_blocking=True),
                times.to(self.device, non_blocking=True),
                {key: value.to(self.device, self.dtype, non_blocking=True) for key, value in text.items()},
            )

    def read(self, number: int) -> MicroBatch:
        """This process's part of micro-batch `number`, in host memory: pinned, and of the compute dtype, for a GPU."""
        generator = seeded(self.config.seed, "step", number)
        batch = self._samples(number)
        latents = batch["latents"]
        times = self.process.sample_times(self.total, generator)[self.mine]
        noise = torch.randn(self.total, *latents.shape[1:], generator=generator)[self.mine]
        dropped = (torch.rand(self.total, generator=generator) < self.config.text_dropout)[self.mine]
        said = text_of(batch)
        text = {
            key: torch.where(dropped.view(-1, *[1] * empty.dim()), empty, said[key])
            for key, empty in self.empty_text.items()
        }
        if self.device.type != "cuda":
            return latents, noise, times, text
        return (
            latents.to(self.dtype).pin_memory(),
            noise.to(self.dtype).pin_memory(),
            times.pin_memory(),
            {key: value.to(self.dtype).pin_memory() for key, value in text.items()},
        )

    def __enter__(self) -> "Batches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ahead.close()

    def _samples(self, number: int) -> Batch:
        """This process's samples of micro-batch `number`."""
        draw = self.order(number)
        if self.prior is None:
            mine = draw.part(self.mine)
            return self.dataset.batch(mine.indices, mine.epochs)
        of_class = batch_indices(number, self.total // 2, len(self.prior), self.config.seed)
        own = list(zip(draw.indices, draw.epochs, strict=True))
        places = range(self.total)[self.mine]
        return collate([self.prior[of_class[p // 2]] if p % 2 else self.dataset.item(*own[p // 2]) for p in places])


class ReadAhead:
    """Results of `read(number)` for number = first, first + 1, ... < `end`, `depth` of them computed ahead by one thread.

    What comes out depends on the number alone, so neither a resume nor an interruption can tell it from calling `read`.
    An error of `read` is raised where its number is asked for. Another number than the next one starts afresh.

    Both sides meet in queues written in C. A ctrl-C inside the standard library's futures may leave a lock taken that the thread
    needs to end.
    """

    def __init__(
        self, read: Callable[[int], MicroBatch], depth: int, end: int, device: torch.device | None = None
    ) -> None:
        """depth 0: no thread. device: the GPU whose context pins the thread's memory."""
        self._read, self._depth, self._end, self._gpu = read, depth, end, -1
        if device is not None and device.type == "cuda":
            self._gpu = torch.cuda.current_device() if device.index is None else device.index
        self._asked: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
        self._found: SimpleQueue[tuple[int, MicroBatch | BaseException]] = SimpleQueue()
        self._thread: Thread | None = None
        self._turn = 0
        """Counts the fresh starts: what was asked for before the last one is dropped."""
        self._next, self._after = 0, 0
        """The number that is expected, and the first that was not asked for yet."""
        self._within = False

    def __call__(self, number: int) -> MicroBatch:
        if not self._depth:
            return self._read(number)
        if self._within or number != self._next:
            self._turn, self._after = self._turn + 1, number
        self._within = True  # a call that is interrupted leaves it so
        if self._thread is None:
            self._thread = Thread(target=self._work, name="batches", daemon=True)
            self._thread.start()
        while self._after < max(number + 1, min(number + 1 + self._depth, self._end)):
            self._asked.put((self._turn, self._after))
            self._after += 1
        turn, found = self._found.get()
        while turn != self._turn:
            turn, found = self._found.get()
        self._next, self._within = number + 1, False
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        """Drops what was read ahead and ends the thread."""
        self._turn += 1
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        for turn, number in iter(self._asked.get, None):
            if turn != self._turn:
                continue
            try:
                if self._gpu >= 0:
                    # A thread starts on GPU 0, where pinning would make a context of half a gigabyte for every process.
                    torch.cuda.set_device(self._gpu)
                self._found.put((turn, self._read(number)))
            except BaseException as error:
                self._found.put((turn, error))


def seeded(seed: int, purpose: str, number: int) -> torch.Generator:
    """A CPU generator that depends on its arguments alone (sha256 of them, 63 bits)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
