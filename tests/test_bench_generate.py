"""The end-to-end benchmark says what it measured: who did what, in which order, and how the numbers come about."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_generate
import pytest
from generation import contest, plan, table
from generation.peers.ours import compute_dtype
from generation.process import Worker
from generation.protocol import Answer, Arrivals, Counts, Setup, Task, UnavailableError, answer_one_by_one
from generation.rows import Record, Row, Turn, bandwidth_share, build_row, equal_share
from generation.worker import reason
from pairs import SHAPES

from specengine import _C, bundled
from specengine.weight_formats import FLOAT_NAMES, WEIGHT_FORMATS

OPTIONS = plan.Options(
    k=(2, 4), peer_k=(3,), contestants=("ours", "llama.cpp"), num_prompts=2, max_new_tokens=4
)
PROMPTS = plan.Prompts(
    short=[[1, 2], [3, 4]],
    batches=[[[n, n + 1] for n in range(1, 2 * size, 2)] for size in (8, 16)],
    long=[list(range(9)), list(range(20))],
)


class FakeReport:
    """A machine that always reads 2 GB/s."""

    def read_bandwidth(self) -> float:
        return 2.0


class FakeWorker:
    """Continues every prompt with its last token, in a time that depends on how it decodes."""

    def __init__(self, calls: list[str], name: str, *, reason: str | None = None, lie: bool = False) -> None:
        self.calls, self.name, self.reason, self.lie = calls, name, reason, lie

    def generate(self, task: Task) -> Answer:
        k = task.num_speculative_tokens
        if k and self.reason:
            raise UnavailableError(self.reason)
        self.calls.append(f"{self.name} k={k} {len(task.prompts)}x{task.max_new_tokens}")
        tokens = [[prompt[-1] + int(self.lie and bool(k))] * task.max_new_tokens for prompt in task.prompts]
        decoded = len(tokens) * (task.max_new_tokens - 1)
        return Answer(
            tokens, [0.5] * len(tokens), decoded / (10 + (k or 0)), decoded, Counts(3, 6, 3) if k else None
        )

    def cpu_seconds(self) -> float:
        return 0.0


def build_contest(workers: dict[str, Any]) -> contest.Contest:
    records = [
        Record(entry, "fake", "avx2", {"fake": "1"}, target_bytes=1e8, draft_bytes=1e7)
        for entry in plan.build_entries(OPTIONS, PROMPTS)
    ]
    return contest.Contest(workers, records, FakeReport(), lambda line: None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "PAUSE_SECONDS", 0.0)


# The plan


def test_everybody_has_the_same_prompts_of_one_length() -> None:
    prompts = plan.read_prompts(8, (16, 8), (1000, 256))
    assert {len(prompt) for prompt in prompts.short} == {plan.PROMPT_LENGTH}
    assert len({tuple(prompt) for prompt in prompts.short}) == 8
    assert [len(batch) for batch in prompts.batches] == [8, 16]
    assert prompts.short == prompts.batches[0]
    assert all(prompt in prompts.batches[1] for prompt in prompts.short)
    assert [len(prompt) for prompt in prompts.long] == [256, 1000]
    assert prompts.long[0] == prompts.long[1][:256]
    few = plan.read_prompts(2, (8, 16))
    assert len(few.short) == 2
    assert all(prompt in few.batches[0] for prompt in few.short)
    with pytest.raises(ValueError, match="--prompts must be between 1 and"):
        plan.read_prompts(1000)
    with pytest.raises(ValueError, match="--batch-sizes must be between 1 and"):
        plan.read_prompts(1, (8, 1000))


def test_the_entries_are_every_mode_of_every_contestant() -> None:
    modes = [(entry.contestant, entry.mode) for entry in plan.build_entries(OPTIONS, PROMPTS)]
    batches, prefills = ["plain, batch 8", "plain, batch 16"], ["prefill, 9 tokens", "prefill, 20 tokens"]
    ours = ["plain", *batches, "speculative, k=2", "speculative, k=4", *prefills]
    assert [mode for name, mode in modes if name == "ours"] == ours
    peers = ["plain", "speculative, k=3", *prefills]
    assert [mode for name, mode in modes if name == "llama.cpp"] == peers
    every = plan.build_entries(replace(OPTIONS, contestants=("transformers",), peer_k=(2, 3, 4)), PROMPTS)
    assert [entry.task.num_speculative_tokens for entry in every] == [0, None, 3, 0, 0]
    few = plan.build_entries(replace(OPTIONS, modes=("prefill", "plain")), PROMPTS)
    names = [(entry.contestant, entry.mode) for entry in few]
    expected = [(name, mode) for mode in ("plain", *prefills) for name in OPTIONS.contestants]
    assert names == expected, "equal modes side by side"


def test_a_forward_reads_the_published_number_of_weights() -> None:
    """GPT-2 medium without its embeddings, norms and biases, and with its head."""
    shape = SHAPES["gpt2-medium"]
    config = {"n_embd": shape.num_features, "n_layer": shape.num_layers, "n_inner": None, "vocab_size": 50257}
    assert plan.streamed_weights(config) == 24 * 12 * 1024**2 + 50257 * 1024


# Turns


def test_turns_alternate_and_go_to_and_fro() -> None:
    calls: list[str] = []
    workers = {name: FakeWorker(calls, name) for name in OPTIONS.contestants}
    build_contest(workers).take_turns(2)
    assert calls[: len(calls) // 2] == list(reversed(calls[len(calls) // 2 :]))
    first = ["ours k=0 2x4", "llama.cpp k=0 2x4", "ours k=0 8x4", "ours k=0 16x4", "ours k=2 2x4"]
    assert calls[:5] == first


def test_who_cannot_do_something_has_a_row_with_the_reason() -> None:
    calls: list[str] = []
    workers = {
        "ours": FakeWorker(calls, "ours"),
        "llama.cpp": FakeWorker(calls, "llama.cpp", reason="no draft"),
    }
    running = build_contest(workers)
    running.warm_up()
    running.take_turns(1)
    rows = contest.build_rows(running.records, "a→b", "bfloat16", OPTIONS)
    reasons = {(row.contestant, row.mode): row.reason for row in rows if row.reason is not None}
    assert reasons == {("llama.cpp", "speculative, k=3"): "no draft"}
    assert "llama.cpp, bf16, speculative, k=3: no draft" in "\n".join(table.markdown(rows, "", ""))


def test_tokens_that_are_not_our_plain_ones_end_the_benchmark() -> None:
    running = build_contest(
        {"ours": FakeWorker([], "ours", lie=True), "llama.cpp": FakeWorker([], "llama.cpp")}
    )
    with pytest.raises(contest.NotExactError, match="speculative, k=2 gave"):
        running.take_turns(1)


def test_a_peer_may_say_something_else() -> None:
    running = build_contest(
        {"ours": FakeWorker([], "ours"), "llama.cpp": FakeWorker([], "llama.cpp", lie=True)}
    )
    running.take_turns(1)
    rows = contest.build_rows(running.records, "a→b", "bfloat16", OPTIONS)
    equal = {(row.contestant, row.mode): row.equal_tokens for row in rows if row.kind == "generate"}
    assert equal["llama.cpp", "plain"] == 1.0
    assert equal["llama.cpp", "speculative, k=3"] == 0.0


# Rows


def test_a_row_has_the_numbers_of_its_turns() -> None:
    running = build_contest({name: FakeWorker([], name) for name in OPTIONS.contestants})
    running.take_turns(3)
    rows = contest.build_rows(running.records, "a→b", "bfloat16", OPTIONS)
    plain, *_, best = rows[:5]
    assert plain.tokens_per_second == pytest.approx(10)
    assert plain.ratio_to_plain == pytest.approx(1)
    assert plain.prompt_ms == pytest.approx(500)
    assert plain.bandwidth_share == pytest.approx(1e8 * 10 / 2e9)
    assert best.is_best
    assert best.ratio_to_plain == pytest.approx(1.4)
    assert (best.acceptance_rate, best.mean_acceptance_length) == (0.5, 2.0)
    # 3 rounds and 6 draft forwards for 6 tokens
    assert best.bandwidth_share == pytest.approx((3 * 1e8 + 6 * 1e7) / 6 * 14 / 2e9)
    assert json.loads(json.dumps(best.to_json()))["mode"] == "speculative, k=4"


def test_what_was_not_measured_is_left_out() -> None:
    record = Record(plan.build_entries(OPTIONS, PROMPTS)[0], reason="llama_cpp is not installed")
    row = build_row(record, "a→b", "int8", OPTIONS, None, None)
    assert row.mode == "all"
    assert "tokens_per_second" not in row.to_json()
    one_put = Turn(Answer([[1, 2]], [1.0], 0.0, 0), bandwidth=1.0)
    assert bandwidth_share(replace(record, target_bytes=1.0), one_put) is None


def test_equal_tokens_are_those_at_the_same_place() -> None:
    assert equal_share([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.75
    assert equal_share([[1, 2], [3, 4]], [[1, 2], [3]]) == 0.75


def test_tables_have_bits_side_by_side() -> None:
    def rows(dtype: str) -> Iterator[Row]:
        running = build_contest({name: FakeWorker([], name) for name in OPTIONS.contestants})
        running.take_turns(1)
        yield from contest.build_rows(running.records, "a→b", dtype, OPTIONS)

    both = [*rows("bfloat16"), *rows("int8")]
    lines = table.markdown(both, "a machine", "about")
    assert lines[0] == "a machine"
    assert "| ours, speculative | 14.0, 1.40×, k = 4 (500) | 14.0, 1.40×, k = 4 (500) |" in lines
    assert "a→b, int8" in table.text(both)
    assert "ours: fake 1; avx2; fake" in table.text(both)
    assert {row.to_json()["instruction_set"] for row in both} == {"avx2"}


# Timing


def test_the_first_token_is_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([10.0, 11.0, 11.5, 13.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    arrivals = Arrivals()
    for num_tokens in (1, 3, 2):
        arrivals.add(num_tokens)
    answer = answer_one_by_one(Task([[0]], 6), lambda prompt: ([1] * 6, arrivals, None))
    assert answer.prompt_seconds == [1.0]
    assert (answer.num_decoded, answer.decode_seconds) == (5, 2.0)
    assert answer.tokens_per_second == 2.5


# Processes


def setup(contestant: str, cache: Path) -> Setup:
    target, draft = str(bundled.target_path()), str(bundled.draft_path())
    return Setup(contestant, target, draft, "float32", "float32", True, 1, 128, str(cache))


def test_our_worker_generates_the_same_in_every_way(tmp_path: Path) -> None:
    worker = Worker(setup("ours", tmp_path))
    try:
        prompts = plan.read_prompts(2).short
        plain = worker.generate(Task(prompts, 6))
        speculative = worker.generate(Task(prompts, 6, num_speculative_tokens=3))
        batch = worker.generate(Task(prompts, 6, is_batch=True))
        assert plain.token_ids == speculative.token_ids == batch.token_ids
        assert plain.num_decoded == 10
        assert speculative.counts is not None
        assert speculative.counts.num_rounds + speculative.counts.num_accepted == 10
        with pytest.raises(UnavailableError, match="max_new_tokens"):
            worker.generate(Task(prompts, 0))
        assert worker.about["instruction_set"] == _C.build_info()["instruction_set"]
        assert worker.about["versions"].keys() == {"specengine", "torch"}
        worker._process.kill()
        with pytest.raises(UnavailableError, match="its process was ended by SIGKILL"):
            worker.generate(Task(prompts, 1))
    finally:
        worker.close()
    assert not Path(f"/proc/{worker._process.pid}").exists()


@pytest.mark.parametrize("name", ["auto", *WEIGHT_FORMATS])
def test_ours_computes_in_a_float_dtype_whatever_the_weights_are(name: str) -> None:
    assert compute_dtype(name) == (name if name in ("auto", *FLOAT_NAMES) else "bfloat16")


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="nobody"):
        Worker(setup("nobody", tmp_path))
    assert reason(ModuleNotFoundError(name="llama_cpp")) == "llama_cpp is not installed"


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "gpt2"], "'gpt2' is not draft:target"),
        (["--dtypes", "fp16"], "'fp16' is none of fp32, bf16, int8"),
        (["--contestants", "vllm"], "'vllm' is none of ours"),
        (["--k", "2,x"], "'x' is not a whole number"),
        (["--k", "65"], "must be between 1 and 64, got 65"),
        (["--prompts", "999"], "--prompts must be between 1 and"),
        (["--batch-sizes", "8,999"], "--batch-sizes must be between 1 and"),
        (["--batch-sizes", ""], "'' is not a whole number"),
        (["--prefill-lengths", "1024"], "must be between 1 and 1023, got 1024"),
        (["--max-new-tokens", "1"], "must be between 2 and"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        bench_generate.parse(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_arguments_become_options() -> None:
    options, _ = bench_generate.parse(
        [
            "--pairs",
            "gpt2→gpt2-large",
            "--dtypes",
            "bf16,int8",
            "--contestants",
            "openvino,ours",
            "--k",
            "3,3,5",
            "--batch-sizes",
            "16",
        ]
    )
    assert options.pairs == (plan.Pair("gpt2", "gpt2-large"),)
    assert options.dtypes == ("bfloat16", "int8")
    assert options.contestants == ("ours", "openvino")
    assert options.k == (3, 5)
    assert (options.batch_sizes, options.prefill_lengths) == ((16,), (256, 1000))
    assert options.max_seq_len == 1001
    assert options.draft_dtype == "int8"
