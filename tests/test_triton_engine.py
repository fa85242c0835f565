"""The whole engine on the Triton kernels: the reference's tokens, and plain's bits.

Without a GPU the kernels run in Triton's interpreter, so models and runs are small; `pytest -m gpu` on a GPU runs the
same tests on it, and the long ones.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE
from law_helpers import CheckpointFactory, EngineFactory, Tally, assert_same, make_prompt, plain, spec
from scripted_drafters import ScriptedDrafter

from specengine import Engine, SamplingParams
from specengine.outputs import GenerationResult

pytestmark = pytest.mark.triton

VOCAB = 64
ARCHITECTURES = ("gpt2", "opt", "gpt_neox")
WEIGHT_DTYPES = ("float32", "bfloat16", "float16", "int8", "int4_min", "int8_group")
REJECTION = {"temperature": 0.9, "seed": 5, "acceptance": "rejection"}
COUPLED = {"temperature": 0.9, "seed": 5}
FILTERS = {"top_k": 20, "top_p": 0.9, "min_p": 0.01}


def triton(build_engine: EngineFactory, *models: Any, **config: Any) -> Engine:
    return build_engine(*models, **{"backend": "triton", "device": str(DEVICE), "block_size": 16, **config})


def small(checkpoint: CheckpointFactory, model_type: str, **build: Any) -> Path:
    """One layer of two heads: a launch's programs run one after another, milliseconds each."""
    return checkpoint(model_type, num_layers=1, num_heads=2, **build)


def params(k: int = 3, num_tokens: int = 7, **sampling: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=num_tokens, num_speculative_tokens=k, ignore_eos=True, **sampling)


def assert_tokens(ours: list[GenerationResult], theirs: list[GenerationResult]) -> None:
    assert [result.token_ids for result in ours] == [result.token_ids for result in theirs]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_tokens_of_the_reference(
    model_type: str, checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    """Draws without logits; then rejection, filters, biases and log-probabilities in one batch."""
    models = small(checkpoint, model_type, seed=3), small(checkpoint, model_type, seed=3, noise=0.3)
    prompts = [make_prompt(length, length, VOCAB) for length in (2, 17)]
    decided = [params(), params(**COUPLED)]
    judged = [params(**REJECTION), params(**REJECTION, **FILTERS, logit_bias={7: 2.0}, logprobs=2)]
    theirs, ours = (
        [*engine.generate(prompts, decided), *engine.generate(prompts, judged)]
        for engine in (
            build_engine(*models, backend="reference", block_size=16),
            triton(build_engine, *models),
        )
    )
    assert_tokens(ours, theirs)
    tally.check()


@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
def test_filters_alone(
    acceptance: str, checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    models = (small(checkpoint, "gpt2", seed=3), small(checkpoint, "gpt2", seed=3, noise=0.3))
    given = params(temperature=1.1, seed=2, acceptance=acceptance, **FILTERS)
    prompts = [make_prompt(5, 1, VOCAB), make_prompt(3, 1, VOCAB)]
    engines = build_engine(*models, backend="reference", block_size=16), triton(build_engine, *models)
    assert_tokens(*(engine.generate(prompts, [given, params(seed=1)]) for engine in reversed(engines)))
    tally.check()


def check_bits(engine: Engine, drafter: ScriptedDrafter, ks: tuple[int, ...], num_tokens: int) -> int:
    """Plain's tokens and log-probabilities, to the last bit, for every k; returns the tokens compared."""
    prompts = [make_prompt(length, vocab_size=engine.vocab_size) for length in (2, 16)]
    compared = 0
    for mode in ({}, COUPLED):
        sampling = {"max_new_tokens": num_tokens, "ignore_eos": True, "logprobs": 1, **mode}
        expected = plain(engine, prompts, **sampling)
        drafter.forget()
        drafter.learn(expected[0], counts=(16, 2, 0))
        drafter.learn(expected[1], counts=(1, 16, 5))
        for k in ks:
            engine._kv_cache.manager.reset_prefix_cache()
            for result, truth in zip(spec(engine, prompts, k, **sampling), expected, strict=True):
                assert_same(result, truth)
                compared += len(result.token_ids)
    return compared


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_speculation_gives_plains_bits(
    weight_dtype: str, checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    drafter = ScriptedDrafter(vocab_size=VOCAB)
    kv_dtype = "float32" if weight_dtype.startswith("int") else weight_dtype
    model = small(checkpoint, "gpt2", seed=8)
    engine = triton(build_engine, model, drafter, weight_dtype=weight_dtype, kv_dtype=kv_dtype)
    check_bits(engine, drafter, (3, 17) if weight_dtype == "float32" else (4,), num_tokens=11)
    tally.check()


def test_neighbours_that_need_logits_change_nothing(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    """Statistics come from the head's epilogue, or from a pass over logits that others have biased: the same bits."""
    engine = triton(
        build_engine,
        small(checkpoint, "gpt2", seed=5),
        small(checkpoint, "gpt2", seed=5, noise=0.3),
    )
    prompt = make_prompt(9, 1, VOCAB)
    alone = [params(), params(**COUPLED), params(**REJECTION)]
    needy = params(temperature=0.7, top_p=0.9, logprobs=1, logit_bias={3: 1.0})
    expected = [engine.generate(prompt, one) for one in alone]
    assert_tokens(engine.generate([prompt] * 4, [*alone, needy])[:3], expected)


def test_a_wrong_noise_stream_is_noticed(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = (small(checkpoint, "gpt2", seed=3), small(checkpoint, "gpt2", seed=3, noise=0.3))
    engines = build_engine(*models, backend="reference", block_size=16), triton(build_engine, *models)
    backend = engines[1]._target.backend
    head_draw = backend.head_draw

    def shifted(*given: Any, **padding: Any) -> Any:
        return head_draw(*given[:-1], given[-1] + 1, **padding)

    monkeypatch.setattr(backend, "head_draw", shifted)
    results = [engine.generate(make_prompt(5, 1, VOCAB), params(**COUPLED)) for engine in engines]
    with pytest.raises(AssertionError):
        assert_tokens([results[1]], [results[0]])


def test_a_mask_that_lets_padding_in_is_noticed(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention one position too far sees what a rejected draft left behind."""
    drafter = ScriptedDrafter(vocab_size=VOCAB)
    engine = triton(build_engine, small(checkpoint, "gpt2", seed=8), drafter)
    backend = engine._target.backend
    paged_attention = backend.paged_attention

    def faulty(query: Any, cache: Any, table: Any, slots: Any, q_start: Any, context_len: Any) -> Any:
        return paged_attention(query, cache, table, slots, q_start, context_len + 1)

    monkeypatch.setattr(backend, "paged_attention", faulty)
    with pytest.raises(AssertionError):
        check_bits(engine, drafter, (3,), num_tokens=11)


@pytest.mark.skipif(
    DEVICE.type != "cpu", reason="the interpreter stands in for a GPU only where there is none"
)
def test_a_triton_that_was_imported_without_the_interpreter_is_refused(tmp_path: Path) -> None:
    script = (
        "import os; os.environ.pop('TRITON_INTERPRET', None); import triton, torch\n"
        "from specengine.ops.load import load_backend\n"
        "from specengine.errors import BackendUnavailableError\n"
        "try:\n    load_backend('triton', torch.device('cpu'))\n"
        "except BackendUnavailableError as error:\n    print(error)"
    )
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "TRITON_INTERPRET=1" in output


# -- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_hundred_thousand_tokens_have_plains_bits(
    model_type: str,
    dtype: str,
    cuda_graphs: bool,
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    tally: Tally,
) -> None:
    """Law M on the device, with graphs and without: k = 1 … 8, batches of 1 … 9 that shrink as sequences finish."""
    shape = {"hidden_size": 256, "num_heads": 4, "intermediate_size": 1024, "num_layers": 3}
    model = checkpoint(model_type, seed=8, vocab_size=1000, max_positions=640, **shape)
    drafter = ScriptedDrafter(vocab_size=1000)
    engine = triton(build_engine, model, drafter, dtype=dtype, max_batch_size=9, cuda_graphs=cuda_graphs)
    compared = 0
    for size in range(1, 10):
        prompts = [make_prompt(3 + 29 * row, row, 1000) for row in range(size)]
        given = [params(0, 290 + 20 * row, logprobs=1, **(COUPLED if row % 2 else {})) for row in range(size)]
        expected = engine.generate(prompts, given)
        drafter.forget()
        for row, result in enumerate(expected):
            drafter.learn(result, counts=((8, 2, 0), (1, 8, 5), (0, 3, 8))[row % 3])
        for k in range(1, 9):
            engine._kv_cache.manager.reset_prefix_cache()
            results = engine.generate(
                prompts,
                [
                    params(k, 290 + 20 * row, logprobs=1, **(COUPLED if row % 2 else {}))
                    for row in range(size)
                ],
            )
            for result, truth in zip(results, expected, strict=True):
                assert_same(result, truth)
                compared += len(result.token_ids)
    assert compared >= 100_000
    tally.check()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_auto_and_every_backend_on_a_gpu(
    backend: str, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    model = checkpoint("gpt2", seed=3)
    engine = build_engine(model, backend=backend, device="cuda", dtype="float32", num_threads=None)
    automatic = build_engine(model, backend="auto", device="cuda", dtype="float32", num_threads=None)
    assert automatic.backend_name == "triton"
    prompt = make_prompt(20, 1, VOCAB)
    assert (
        plain(engine, prompt, max_new_tokens=40).token_ids
        == plain(automatic, prompt, max_new_tokens=40).token_ids
    )
    assert torch.cuda.memory_allocated() > 0
