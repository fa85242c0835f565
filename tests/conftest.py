"""Fixtures for every test: tiny checkpoints made once a session, engines that are closed, a tally of acceptance."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kernel_cases
import markers
import pytest
import tiny_models
import torch
import vocabulary_pairs
from interpreter_speed import patch_once_a_launch
from law_helpers import (
    BACKEND,
    BuildTwins,
    CheckpointFactory,
    DraftedFactory,
    EagerRecorder,
    EngineFactory,
    GreedyOracle,
    Tally,
    choose_ways,
    drafters_of,
)

from specengine import _C, metrics
from specengine.engine import Engine, assembly
from specengine.fetched import find_fetched
from specengine.ops.backend import Backend

# What tests of the server need, and a machine without network may lack (docs/gpu.md).
MISSING_FOR_SERVER = [
    name
    for name in ("fastapi", "uvicorn", "prometheus_client", "openai", "schemathesis", "yaml")
    if find_spec(name) is None
]
collect_ignore = ["server"] if MISSING_FOR_SERVER else []

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Shells start what is in the background so, and programs inherit it; tests press Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if kernel_cases.DEVICE.type == "cpu":
    patch_once_a_launch()
markers.watch_launches()


def pytest_report_header() -> list[str]:
    """What is left out."""
    missing = ", ".join(MISSING_FOR_SERVER)
    return [f"tests/server is left out: there is no {missing}"] if missing else []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Which test is running: one that launches Triton kernels must say so."""
    with markers.running(item):
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, the tests of Triton kernels are tests of it: `pytest -m gpu` runs them. Where there is
    none, what needs one is skipped."""
    has_gpu = torch.cuda.is_available()
    for item in items:
        if has_gpu and item.get_closest_marker("triton"):
            item.add_marker("gpu")
        if not has_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFactory:
    """checkpoint("gpt2", seed=1, vocab_size=320, with_tokenizer=True, noise=0.1, …): a tiny model's directory.

    Built once a session for each set of arguments (those of `tiny_models.build_model`).
    noise:          a copy that agrees with the model of the same arguments now and then: its draft
    with_tokenizer: a byte-level tokenizer of `tokenizer_size` (default: vocab_size) ids beside it
    """
    made: dict[str, Path] = {}

    def make(
        model_type: str = "gpt2",
        *,
        noise: float = 0.0,
        with_tokenizer: bool = False,
        tokenizer_size: int | None = None,
        **build: Any,
    ) -> Path:
        key = repr((model_type, noise, with_tokenizer, tokenizer_size, sorted(build.items())))
        if key not in made:
            tokenizer = None
            if with_tokenizer:
                build.setdefault("vocab_size", 320)
                tokenizer = tiny_models.build_tokenizer(tokenizer_size or build["vocab_size"])
            model = tiny_models.build_model(model_type, **build)
            if noise:
                model = tiny_models.perturbed(model, noise=noise)
            directory = tmp_path_factory.mktemp(f"{model_type}-{len(made)}") / "model"
            made[key] = tiny_models.save_checkpoint(directory, model, tokenizer=tokenizer)
        return made[key]

    return make


@pytest.fixture(scope="session")
def drafted(checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> DraftedFactory:
    """drafted("ngram", seed=1, …): a target, and what drafts for it: a drafter's name, or a draft model of another
    vocabulary where the name is that of a pair (`vocabulary_pairs.PAIRS`), or a list of drafters
    (`law_helpers.LISTS_OF_DRAFTERS`). Arguments are those of `checkpoint`."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str, **build: Any) -> tuple[Path, str | Path]:
        if name not in vocabulary_pairs.PAIRS:
            return checkpoint(**build), drafters_of(name, checkpoint, **build)
        key = repr((name, sorted(build.items())))
        if key not in made:
            build.pop("with_tokenizer", None)
            made[key] = vocabulary_pairs.build_pair(name, tmp_path_factory.mktemp(name), **build)
        return made[key]

    return make


@pytest.fixture(scope="session")
def oracle() -> Callable[..., GreedyOracle]:
    """oracle("gpt2", seed=1, …): `transformers` on the model that `checkpoint` makes of the same arguments.

    weight_dtype: that of an engine with weights by group, whose numbers the model then has
    """
    made: dict[str, GreedyOracle] = {}

    def make(model_type: str = "gpt2", *, weight_dtype: str | None = None, **build: Any) -> GreedyOracle:
        key = repr((model_type, weight_dtype, sorted(build.items())))
        if key not in made:
            model = tiny_models.build_model(model_type, **build)
            made[key] = GreedyOracle(tiny_models.rounded(model, weight_dtype) if weight_dtype else model)
        return made[key]

    return make


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the user's cache; tests that take it are marked `smollm2`."""
    path = find_fetched("smollm2")
    if path is None:
        pytest.skip("SmolLM2 was not fetched: `specengine fetch smollm2` brings it")
    return path


@pytest.fixture(params=_C.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every one that the processor has, in turn; the default comes back afterwards."""
    _C.set_instruction_set(request.param)
    yield request.param
    _C.set_instruction_set("auto")


_ON_TRITON = pytest.param("triton", marks=pytest.mark.triton)


@pytest.fixture(params=["native", _ON_TRITON])
def ops(request: pytest.FixtureRequest) -> Backend:
    """The backends that promise bits: native on its default instruction set, and Triton."""
    return kernel_cases.NATIVE if request.param == "native" else kernel_cases.TRITON


@pytest.fixture(params=[*_C.instruction_sets(), _ON_TRITON])
def every_ops(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Native on each instruction set in turn, and Triton."""
    if request.param == "triton":
        yield kernel_cases.TRITON
        return
    _C.set_instruction_set(request.param)
    yield kernel_cases.NATIVE
    _C.set_instruction_set("auto")


@pytest.fixture(params=kernel_cases.TILE_SETS)
def tile_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Native on each instruction set with tiles in turn."""
    _C.set_instruction_set(request.param)
    yield request.param
    _C.set_instruction_set("auto")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module with HOLDS_FOR_REPLAYED_ROUNDS runs its engines both ways."""
    if "rounds" in metafunc.fixturenames and getattr(metafunc.module, "HOLDS_FOR_REPLAYED_ROUNDS", False):
        metafunc.parametrize("rounds", ["direct", "replayed"], indirect=True)


@pytest.fixture
def rounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """How engines run their rounds: as a CPU does, in one call where that can be, or as a GPU does, recorded for a few
    batch sizes and replayed, one round ahead (without a GPU the recordings are `EagerRecorder`'s)."""
    if getattr(request, "param", "direct") == "direct":
        return {}
    if BACKEND != "triton" or kernel_cases.DEVICE.type == "cpu":
        monkeypatch.setattr(assembly, "build_recorder", lambda *_: EagerRecorder())
    return {"rounds_ahead": 1}


@pytest.fixture
def build_engine(rounds: dict[str, Any]) -> Iterator[EngineFactory]:
    """build_engine(model, drafter_or_draft_path=None, **config): an engine of the laws' backend, closed at the end.

    Small by default: fp32, blocks of 4 tokens, 8 sequences, one thread. With a list of drafters every row of every
    round gets one of their ways at random (`choose_ways`).
    """
    engines: list[Engine] = []

    def build(model: Any, drafter: Any = None, **config: Any) -> Engine:
        defaults: dict[str, Any] = {
            "backend": BACKEND,
            "device": str(kernel_cases.DEVICE) if BACKEND == "triton" else "cpu",
            "dtype": "float32",
            "block_size": 4,
            "max_batch_size": 8,
            "num_threads": 1,
            **rounds,
        }
        engine = Engine(model, drafter, **{**defaults, **config})
        engines.append(engine)
        if isinstance(drafter, list):
            choose_ways(engine)
        return engine

    yield build
    for engine in engines:
        engine.close()


@pytest.fixture
def build_twins(build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch) -> BuildTwins:
    """build_twins(target, draft, **config): an engine that runs its rounds from Python, and one that replays them,
    one ahead unless `rounds_ahead` says otherwise."""

    def build(*models: Any, **config: Any) -> tuple[Engine, Engine]:
        direct = build_engine(*models, **{**config, "cuda_graphs": False, "rounds_ahead": 0})
        with monkeypatch.context() as patch:
            if direct.device.type == "cpu":
                patch.setattr(assembly, "build_recorder", lambda *_: EagerRecorder())
            return direct, build_engine(*models, **{"rounds_ahead": 1, **config})

    return build


@pytest.fixture
def tally(monkeypatch: pytest.MonkeyPatch) -> Tally:
    """Counts every round of every engine of this test; end the test with `tally.check()`."""
    counted = Tally()
    record_rounds = metrics.record_rounds

    def record(own: Any, *, num_draft: int, num_accepted: int, num_kept: int, count: int = 1) -> None:
        record_rounds(own, num_draft=num_draft, num_accepted=num_accepted, num_kept=num_kept, count=count)
        counted.num_rounds += count
        counted.num_accepted += count * num_accepted
        counted.num_rejected += count * (num_accepted < num_draft)

    monkeypatch.setattr(metrics, "record_rounds", record)
    return counted
