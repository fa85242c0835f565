"""The parts of a run. Nothing heavy is imported here: `--list` answers at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# A part, and what comes before it where the machine is new, fit into a command of ten minutes.
LIMIT_SECONDS = 480.0


@dataclass(frozen=True)
class Part:
    """What runs in a process of its own.

    entry:      "module:function", called with a `context.Context`
    needs_cuda: whether it is left out where there is no CUDA device
    rehearses:  whether `--device cpu --tiny` runs it
    is_named:   whether it only runs when it is named
    """

    name: str
    about: str
    entry: str
    arguments: dict[str, Any] = field(default_factory=dict)
    needs_cuda: bool = True
    rehearses: bool = False
    is_named: bool = False

    @property
    def group(self) -> str:
        """`generate-xl` is one of the group `generate`."""
        return self.name.partition("-")[0]


def _pytest(name: str, about: str, *arguments: str) -> Part:
    return Part(name, about, "gpu_parts.suites:run_tests", {"arguments": arguments})


def _sanitizer(tool: str, about: str, *arguments: str) -> Part:
    return Part(
        f"sanitize-{tool}",
        f"compute-sanitizer, {tool}, on {about}",
        "gpu_parts.suites:run_sanitizer",
        {"tool": tool, "arguments": arguments},
    )


def _micro(name: str, about: str, ops: Iterable[str], keyword: str) -> Part:
    files = [f"benchmarks/bench_{op}.py" for op in ops]
    return Part(
        f"micro-{name}",
        f"microbenchmarks: {about}",
        "gpu_parts.suites:run_microbenchmarks",
        {"arguments": [*files, "-k", keyword]},
    )


def _tune(width: int) -> Part:
    return Part(
        f"tune-{width}",
        f"tune_tiles.py for models {width} wide, fp16; writes kernels/device/tiles_sm*.json, and that changes bits",
        "gpu_parts.suites:run_tuning",
        {"width": width},
        is_named=True,
    )


def _generate(name: str, pair: str, batch_sizes: tuple[int, ...]) -> Part:
    sizes = ", ".join(map(str, batch_sizes))
    return Part(
        f"generate-{name}",
        f"end to end: {pair.replace(':', '→')}, batches of {sizes}, beside transformers and torch.compile",
        "gpu_parts.end_to_end:run",
        {"pair": pair, "batch_sizes": batch_sizes},
        rehearses=True,
    )


def _graphs(name: str, pair: str) -> Part:
    return Part(
        f"graphs-{name}",
        f"{pair.replace(':', '→')}: what recording rounds costs; idle time and blocking calls in a trace of replays",
        "gpu_parts.graphs:run",
        {"pair": pair},
        rehearses=True,
    )


def _forced(name: str, pair: str) -> Part:
    return Part(
        f"forced-{name}",
        f"{pair.replace(':', '→')} with forced acceptance: cost without the draft's quality, NOT THE MODEL'S OUTPUT",
        "gpu_parts.end_to_end:run_forced",
        {"pair": pair},
        rehearses=True,
    )


# What says most, on a GPU that is lent for a short time: each visit fits into a command of ten minutes, with what is
# built before it. Correctness comes first.
VISITS = (
    ("machine", "first", "tests-linear"),
    ("tests-attention", "tests-head", "tests-round"),
    ("graphs-medium",),
    ("generate-medium",),
)

# The tests of kernels, in parts of about equal length.
KERNEL_TESTS = {
    "linear": (
        "norm_qkv",
        "norm_linear",
        "linear_residual",
        "parallel_norm_linear",
        "parallel_linear_residual",
    ),
    "attention": ("paged_attention", "embed", "expand_batch", "begin_forward", "noise"),
    "head": (
        "head",
        "head_draw",
        "head_stats",
        "transform_rows",
        "filter_rows",
        "sample_rows",
        "token_logprobs",
    ),
    "round": (
        "plan_round",
        "begin_round",
        "row_keys",
        "stage_draft",
        "match_draws",
        "match_verify",
        "rejection_verify",
        "block_verify",
        "lossy_verify",
        "commit_round",
        "commit_draws",
    ),
}
# Tests that run many times what could go wrong once; and those that only compile.
RACES = ("tests/test_last_arrivers.py", "tests/test_dependent_launch.py")
COMPILED = ("tests/test_ahead_of_time.py", "tests/test_round_launches.py")
LAYERS = ("norm_qkv", "norm_linear", "linear_residual")
VERIFICATIONS = ("match_verify", "rejection_verify", "block_verify", "threshold_verify", "typical_verify")
HEADS = ("head", "head_draw", "head_stats", "transform_rows", "sample_rows", "filter_rows", "token_logprobs")
# In the order in which they run: what is quick, and what says whether the rest makes sense, comes first.
PARTS = (
    Part(
        "machine",
        "GPU, driver, clocks, versions, copy bandwidth",
        "gpu_parts.machine:run",
        needs_cuda=False,
        rehearses=True,
    ),
    Part(
        "first",
        "the bundled pair, greedy: the same bits as graphs and launch by launch, with dependent launches and without",
        "gpu_parts.first:run",
        rehearses=True,
    ),
    *(
        _pytest(
            f"tests-{group}",
            f"pytest -m gpu: kernels against their references ({group})",
            *(f"tests/kernels/test_{name}.py" for name in names),
        )
        for group, names in KERNEL_TESTS.items()
    ),
    _pytest("tests-races", "pytest -m gpu: thousands of launches, the same bits every time", *RACES),
    _pytest(
        "tests-engine",
        "pytest -m gpu: the engine",
        "tests",
        *(f"--ignore={path}" for path in ("tests/kernels", *RACES, *COMPILED)),
    ),
    _pytest("tests-compiled", "pytest -m gpu: what the compiler makes of every kernel", *COMPILED),
    _sanitizer("memcheck", "the tests of kernels", "tests/kernels"),
    _sanitizer(
        "racecheck",
        "the tests of kernels that wait for each other",
        "-k",
        "padded or equals",
        "tests/kernels",
    ),
    _tune(768),
    _tune(1024),
    _tune(1600),
    _micro("verify", "verification", VERIFICATIONS, "test_gpu"),
    _micro("attention", "attention of gpt2-medium, fp16", ("paged_attention",), "test_gpu and 16x64-fp16"),
    _micro("layers", "linear layers of gpt2-medium, fp16", LAYERS, "test_gpu and fp16"),
    _micro(
        "head",
        "head and draws, fp16",
        HEADS,
        "test_gpu and (fp16 or sample_rows or filter_rows or token_logprobs)",
    ),
    _graphs("medium", "distilgpt2:gpt2-medium"),
    _graphs("xl", "distilgpt2:gpt2-xl"),
    _generate("medium", "distilgpt2:gpt2-medium", (1, 8, 32)),
    _generate("medium-gpt2", "gpt2:gpt2-medium", (1, 8, 32)),
    _generate("xl", "distilgpt2:gpt2-xl", (1,)),
    _generate("xl-batch", "distilgpt2:gpt2-xl", (8, 32)),
    _generate("xl-gpt2", "gpt2:gpt2-xl", (1,)),
    _generate("xl-gpt2-batch", "gpt2:gpt2-xl", (8, 32)),
    _forced("medium", "distilgpt2:gpt2-medium"),
    _forced("xl", "distilgpt2:gpt2-xl"),
    _forced("xl-gpt2", "gpt2:gpt2-xl"),
)


def select(names: Iterable[str], parts: Iterable[Part] = PARTS) -> list[Part]:
    """The parts and groups that are named, in the order in which they run; without names all but the optional ones.

    Raises `ValueError` for a name that is none.
    """
    every, wanted = list(parts), set(names)
    known = {part.name for part in every} | {part.group for part in every}
    for name in sorted(wanted - known):
        raise ValueError(f"{name!r} is none of the parts or groups; --list has them all")
    if not wanted:
        return [part for part in every if not part.is_named]
    return [part for part in every if {part.name, part.group} & wanted]


def rehearsed(chosen: Iterable[Part]) -> list[Part]:
    """One part of each kind: the models are the same in all of them."""
    first: dict[str, Part] = {}
    for part in chosen:
        if part.rehearses:
            first.setdefault(part.entry, part)
    return list(first.values())
