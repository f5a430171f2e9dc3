"""What a first step waits for is begun early, beside the caller."""

import threading

import pytest

from loragraft.train import warm


def test_workers_are_started_beside_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.async_compile import AsyncCompile

    begun: list[str] = []
    for name in ("warm_pool", "wakeup"):
        monkeypatch.setattr(
            AsyncCompile, name, lambda name=name: begun.append(f"{name} on {threading.current_thread().name}")
        )
    warm.start_workers().join()
    assert begun == ["warm_pool on start-compile-workers", "wakeup on start-compile-workers"]
