"""Kernels begin before the one before them has ended, where the GPU can do that: no bit depends on it.

What the compiled kernels do before they wait is asserted in test_ahead_of_time.py, for every kernel and size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aot_order import check_plain
from kernel_cases import DEVICE, random_rows, random_seeds
from law_helpers import CheckpointFactory, EngineFactory, make_prompt, visible
from torch import Tensor

from specengine import SamplingParams
from specengine.kernels.device import launch as launching
from specengine.kernels.types.drafts import Drafts, Staging, Verdict
from specengine.kernels.types.packed import Norm, PackedLinear
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.rules import Rule
from specengine.ops.load import load_backend
from specengine.weight_formats import INT8

pytestmark = pytest.mark.triton

BLOCK_SIZE = 16
NUM_TURNS = 200
VARIABLE = "SPECENGINE_PDL"
SWITCH = ("0", "1")


@pytest.mark.parametrize(
    ("capability", "is_interpreted", "wanted", "expected"),
    [
        (90, False, None, True),
        (90, False, "1", True),
        (90, False, "0", False),
        (80, False, "1", False),
        (90, True, "1", False),
    ],
)
def test_where_launches_are_dependent(
    monkeypatch: pytest.MonkeyPatch, capability: int, is_interpreted: bool, wanted: str | None, expected: bool
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if wanted is not None:
        monkeypatch.setenv(VARIABLE, wanted)
    monkeypatch.setattr(launching, "IS_INTERPRETED", is_interpreted)
    monkeypatch.setattr(launching, "_assumed", capability)
    assert launching.has_dependent_launch(torch.device("meta")) is expected


def test_another_value_of_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    with pytest.raises(ValueError, match="SPECENGINE_PDL='off': expected 0 or 1"):
        launching.has_dependent_launch(torch.device("meta"))


class KernelStub:
    """Notes what it is launched with."""

    def __init__(self, *names: str) -> None:
        self.arg_names = list(names)
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.options.update(options)


@pytest.mark.parametrize("is_dependent", [False, True])
def test_kernel_and_driver_are_told_the_same(monkeypatch: pytest.MonkeyPatch, is_dependent: bool) -> None:
    monkeypatch.setattr(launching, "has_dependent_launch", lambda device: is_dependent)
    told, plain = KernelStub("x_ptr", "PDL"), KernelStub("x_ptr")
    for kernel in (told, plain):
        launching.launch(kernel, (1,), torch.zeros(1), num_warps=4)
    assert told.options["PDL"] is told.options["launch_pdl"] is is_dependent
    assert plain.options["launch_pdl"] is False
    assert "PDL" not in plain.options


def test_nothing_of_it_is_compiled_where_it_is_turned_off(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.update({VARIABLE: "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")})
    suite, report = Path(__file__).with_name("aot_suite.py"), tmp_path / "report.json"
    command = [sys.executable, str(suite), "90", str(report), "--one-of-each"]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    kernels = json.loads(report.read_text())["kernels"]
    assert kernels
    for kernel in kernels:
        check_plain(kernel["ptx"])


def there(**tensors: Tensor) -> SimpleNamespace:
    return SimpleNamespace(**{name: tensor.to(DEVICE) for name, tensor in tensors.items()})


def build_verdict(count: int, width: int) -> Verdict:
    shapes = ((count, width), (count,), (count,))
    return Verdict(*(torch.zeros(size, dtype=torch.int32, device=DEVICE) for size in shapes))


def build_staging(count: int) -> Staging:
    """Every sequence drafts, the first ones in the last slots."""
    numbers = torch.arange(count, dtype=torch.int32, device=DEVICE)
    tokens, ones = numbers.new_zeros(count, 32), torch.ones_like(numbers)
    return Staging(1, tokens, numbers.flip(0), 3 + numbers, ones, numbers.new_zeros(count, 4), 4 * ones)


def random_linear(out_features: int, in_features: int, dtype: torch.dtype) -> PackedLinear:
    ops = load_backend("triton", DEVICE)
    weight = random_rows(out_features, in_features, seed=out_features) * in_features**-0.5
    bias = random_rows(1, out_features)[0].to(DEVICE)
    if dtype == torch.int8:
        return ops.pack_linear(weight.to(DEVICE), bias, INT8)
    return ops.pack_linear(weight.to(DEVICE, dtype), bias)


class EveryOp:
    """A forward of both kinds of layer, then all that can be made of its logits: each kernel reads what the one
    before it wrote. Two sequences, of 20 tokens and of 3 behind 14 that are cached."""

    def __init__(
        self, dtype: torch.dtype, *, width: int, num_heads: int, vocab_size: int, num_layers: int
    ) -> None:
        self.ops, self.vocab_size, self.num_layers = load_backend("triton", DEVICE), vocab_size, num_layers
        self.shape = (2, 4, num_heads, BLOCK_SIZE, width // num_heads)
        self.kv_dtype = torch.float32 if dtype == torch.int8 else dtype
        self.norm = Norm(*(random_rows(2, width).to(DEVICE)), 1e-5)
        self.table = random_rows(vocab_size, width).to(DEVICE)
        sizes = {"qkv": (3 * width, width), "output": (width, width), "up": (4 * width, width)}
        sizes.update(down=(width, 4 * width), head=(vocab_size, width))
        self.linear = SimpleNamespace(**{name: random_linear(*size, dtype) for name, size in sizes.items()})
        self.lengths = there(
            slots=torch.tensor([1, 0], dtype=torch.int32),
            start=torch.tensor([0, 14], dtype=torch.int32),
            q_len=torch.tensor([20, 3], dtype=torch.int32),
            num_logits=torch.tensor([3, 3], dtype=torch.int32),
        )
        self.block_table = torch.tensor([[0, 2], [3, 1]], dtype=torch.int32, device=DEVICE)

    def run(self, turn: int) -> list[Tensor]:
        """All results; other tokens every turn, so that what an earlier turn has left in memory is wrong."""
        ops, linear, norm, lengths = self.ops, self.linear, self.norm, self.lengths
        generator = torch.Generator().manual_seed(turn)
        tokens = torch.randint(self.vocab_size, (2, 32), generator=generator).int().to(DEVICE)
        kv_cache = torch.full(self.shape, 0.25 * (turn % 7), dtype=self.kv_dtype, device=DEVICE)
        ragged = (tokens, self.block_table, lengths.slots, lengths.start, lengths.q_len, lengths.num_logits)
        entry = (SamplingRows.empty(2, DEVICE), self.table, None)
        state = [lengths.start + 12, lengths.start + 20, torch.full_like(lengths.start, 4)]
        plan, begun = ops.begin_round(*ragged[:3], *state, 3, 32, 2, BLOCK_SIZE, *entry)
        start = ops.begin_forward(*ragged, BLOCK_SIZE, *entry, num_tokens=23, num_logit_rows=6)
        _, positions, kv_slots, q_start, context_len, logit_rows = start.expanded
        places = (positions, kv_slots, kv_cache, None)
        batch = (self.block_table, lengths.slots, q_start, context_len)
        hidden = start.hidden
        for _ in range(self.num_layers):
            query = ops.norm_qkv(hidden, norm, linear.qkv, *places)
            attended = ops.paged_attention(query, kv_cache, *batch)
            hidden = ops.linear_residual(attended, linear.output, hidden)
            expanded = ops.norm_linear(hidden, norm, linear.up, "gelu_tanh")
            hidden = ops.linear_residual(expanded, linear.down, hidden)
            pair = (linear.qkv, norm, linear.up)
            query, expanded = ops.parallel_norm_linear(hidden, norm, *pair, "gelu", *places)
            attended = ops.paged_attention(query, kv_cache, *batch)
            hidden = ops.parallel_linear_residual(attended, linear.output, expanded, linear.down, hidden)
        judged = self.judge(hidden[logit_rows], positions[logit_rows] + 1, tokens)
        return [hidden, *plan, *begun.expanded, begun.hidden, *judged]

    def judge(self, hidden: Tensor, positions: Tensor, tokens: Tensor) -> list[Tensor]:
        """What is made of rows whose logits are wanted."""
        ops, head = self.ops, (hidden, self.norm, self.linear.head, self.vocab_size)
        row = there(
            temperature=torch.tensor([0.0, 0.7, 1.0, 1.3, 0.0, 0.9]),
            top_k=torch.full((6,), 20, dtype=torch.int32),
            top_p=torch.full((6,), 0.9),
            min_p=torch.full((6,), 0.01),
            seeds=random_seeds(6),
        )
        each = SamplingRows.empty(6, DEVICE)._replace(**vars(row))
        staging = build_staging(6)
        drawn, draw_error = ops.head_draw(*head, each, positions, has_filters=False, staging=staging)
        logits = ops.head(*head)
        _, plain_stats = ops.head_stats(*head, each)
        stats = ops.filter_rows(logits, each)
        sampled = ops.sample_rows(logits, stats, each, positions, 0, positions * 0)
        top = ops.token_logprobs(logits, drawn, 5)
        results = [drawn, draw_error, *staging[1:], logits, plain_stats, stats, *sampled, *top]
        sequence = there(
            row_start=torch.tensor([0, 3], dtype=torch.int32),
            num_draft=torch.tensor([2, 2], dtype=torch.int32),
            temperature=torch.tensor([0.9, 1.1]),
            seeds=random_seeds(2),
            seq_len=torch.tensor([20, 17], dtype=torch.int32),
            is_running=torch.ones(2, dtype=torch.int32),
        )
        drafted = drawn.view(2, 3)[:, :2].contiguous()
        drafts = Drafts(sequence.row_start, sequence.seq_len, sequence.num_draft, drafted)
        rows = SamplingRows.empty(2, DEVICE)._replace(temperature=sequence.temperature, seeds=sequence.seeds)
        for rule in Rule:
            verdict = build_verdict(2, 3)
            ruled = rows._replace(rule=torch.full_like(rows.rule, int(rule)))
            getattr(ops, rule.op)(logits, stats, drafts, ruled, sequence.is_running, verdict)
            results += verdict
        verdict, state = build_verdict(2, 3), [torch.zeros_like(sequence.seq_len) for _ in range(2)]
        judged = (drawn, draw_error, drafts, rows, sequence.is_running, verdict)
        slots = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
        record = ops.commit_draws(*judged, tokens, *state, slots)
        return [*results, *verdict, *state, tokens, record]


def assert_same_bits(results: list[Tensor], expected: list[Tensor], where: str) -> None:
    assert len(results) == len(expected)
    for index, (result, truth) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(result, truth), f"{where}: result {index}"


@pytest.mark.skipif(not launching.IS_INTERPRETED, reason="a GPU has its own say")
def test_the_interpreter_takes_either_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    case = EveryOp(torch.float32, width=32, num_heads=2, vocab_size=130, num_layers=1)
    expected = case.run(0)
    assert torch.isfinite(expected[0]).all()
    monkeypatch.setattr(launching, "has_dependent_launch", lambda device: True)
    assert_same_bits(case.run(0), expected, "PDL")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_every_op_has_the_same_bits_either_way(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    case = EveryOp(dtype, width=1024, num_heads=16, vocab_size=50257, num_layers=6)
    monkeypatch.setenv(VARIABLE, "0")
    expected = [case.run(turn) for turn in range(8)]
    for turn in range(NUM_TURNS):
        monkeypatch.setenv(VARIABLE, SWITCH[turn // 8 % 2 ^ 1])
        assert_same_bits(case.run(turn % 8), expected[turn % 8], f"turn {turn}")


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.9},
        {"temperature": 0.9, "acceptance": "rejection"},
        {"temperature": 1.1, "top_p": 0.9},
    ],
    ids=["greedy", "coupled", "rejection", "filtered"],
)
def test_an_engine_has_the_same_bits_either_way(
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    model_type: str,
    sampling: dict[str, Any],
) -> None:
    """Rounds may be recorded once: an engine keeps what the variable was then."""
    models = checkpoint(model_type, seed=3), checkpoint(model_type, seed=3, noise=0.3)
    engines = {}
    for wanted in SWITCH:
        monkeypatch.setenv(VARIABLE, wanted)
        engine = build_engine(*models, backend="triton", device=str(DEVICE), block_size=BLOCK_SIZE)
        engines[wanted] = engine
    given = SamplingParams(max_new_tokens=24, num_speculative_tokens=4, ignore_eos=True, seed=5, **sampling)
    for turn in range(NUM_TURNS // 10):
        prompts = [make_prompt(length, turn, 64) for length in (2, 9, 17)]
        results = []
        for wanted in SWITCH:
            monkeypatch.setenv(VARIABLE, wanted)
            results.append([visible(result) for result in engines[wanted].generate(prompts, given)])
        assert results[0] == results[1], f"turn {turn}"
