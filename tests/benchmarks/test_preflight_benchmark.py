"""The benchmark of preflight without its GPU: three bases of their published sizes, and what counts as true."""

from collections.abc import Callable
from types import ModuleType

import pytest

from loragraft.backbones.skeleton import meta_transformer


@pytest.fixture(scope="module")
def benchmark(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("preflight")


@pytest.mark.parametrize(("name", "parameters"), [("sdxl", 2.57e9), ("sana", 1.6e9)])
def test_the_models_have_their_published_size(benchmark: ModuleType, name: str, parameters: float) -> None:
    spec = benchmark.Model.of(benchmark.MODELS[name]).spec
    total = sum(p.numel() for p in meta_transformer(spec.transformer_class, spec.external.config).parameters())
    assert total == pytest.approx(parameters, rel=0.02)


def test_there_are_configurations_of_every_kind(benchmark: ModuleType) -> None:
    names = [str(configuration) for configuration in benchmark.CONFIGURATIONS]
    assert len(names) == len(set(names)) >= 6
    for model in ("flux", "sdxl", "sana"):
        assert f"{model}-1024-train" in names
        assert f"{model}-1024-train-checkpointed" in names
        assert f"{model}-1024-infer" in names


def test_sana_is_predicted(benchmark: ModuleType) -> None:
    model = benchmark.Model.of(benchmark.MODELS["sana"])
    runs = {
        checkpointing: benchmark.predict(model, benchmark.Configuration("sana", checkpointing=checkpointing))
        for checkpointing in (False, True)
    }
    assert runs[True].saved < 0.2 * runs[False].saved
    assert runs[False].unknown == ()
    figures = benchmark.figures(runs[False], None, benchmark.Configuration("sana"))
    assert figures["seconds"] is None
    assert figures["peak_bytes"] == runs[False].peak


def test_what_counts_as_true(benchmark: ModuleType) -> None:
    def holds(predicted: float, measured: float, seconds: float = 1.0) -> tuple[bool, bool]:
        found = benchmark.compare(
            {"peak_bytes": predicted * 2**20, "seconds": seconds},
            {"peak_bytes": measured * 2**20, "seconds": 1.0},
        )
        return found["memory_holds"], found["time_holds"]

    assert holds(1290, 1000) == (True, True)  # 290 MiB off, 29 %
    assert holds(1310, 1000) == (False, True)
    assert holds(10900, 10000) == (True, True)
    assert holds(8900, 10000) == (False, True)
    assert holds(1000, 1000, 1.3) == (True, False)
