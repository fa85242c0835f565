"""Every Triton kernel compiles for A100 (sm_80) and H100/H200 (sm_90) at real models' sizes, without a GPU.

What is asserted: no stack frame and no spills (ptxas), vector loads, no 16-bit scalar loads where logits are read,
tensor cores where the type has them, the number of kernels a layer, how often prompts read weights, and what comes
before a dependent launch's wait.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aot_order import all_instructions, check_early_weights, check_plain, check_wait, pointers_behind
from aot_suite import PROMPTS

from specengine.kernels import reference
from specengine.weight_formats import GROUPED_FORMATS

pytestmark = pytest.mark.triton

CAPABILITIES = (80, 90)
# What a program may have of shared memory.
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
ON_LOGITS = {
    "spec_filter_rows",
    "spec_sample_rows",
    "spec_token_logprobs",
    "spec_transform_rows",
    "spec_match_verify",
    "spec_rejection_verify",
    "spec_block_verify",
    "spec_threshold_verify",
    "spec_typical_verify",
}
BY_GROUP = {format.name for format in GROUPED_FORMATS}
WITH_WEIGHTS = {
    "spec_norm_qkv",
    "spec_norm_linear",
    "spec_linear_residual",
    "spec_parallel_norm_linear",
    "spec_parallel_linear_residual",
    "spec_head",
    "spec_head_stats",
    "spec_head_draw",
}


def compile_all(directory: Path, *options: str) -> dict[int, dict[str, Any]]:
    """The reports of tests/aot_suite.py for both generations, made side by side."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(directory / "cache")
    script = Path(__file__).with_name("aot_suite.py")
    running = {}
    for capability in CAPABILITIES:
        command = [
            sys.executable,
            str(script),
            str(capability),
            str(directory / f"{capability}.json"),
            *options,
        ]
        running[capability] = subprocess.Popen(
            command,
            env=environment,
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    for capability, process in running.items():
        log, _ = process.communicate()
        assert process.returncode == 0, f"sm_{capability}: {log[-4000:]}"
    return {
        capability: json.loads((directory / f"{capability}.json").read_text()) for capability in CAPABILITIES
    }


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    return compile_all(tmp_path_factory.mktemp("aot"))


@pytest.fixture(params=CAPABILITIES)
def report(request: pytest.FixtureRequest, reports: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return reports[request.param]


def named(report: dict[str, Any], names: set[str]) -> Iterator[dict[str, Any]]:
    found = [kernel for kernel in report["kernels"] if kernel["name"] in names]
    assert {kernel["name"] for kernel in found} == names
    return iter(found)


def check_resources(report: dict[str, Any]) -> None:
    too_large = [
        (kernel["model"], kernel["name"], kernel["stack_bytes"], kernel["spill_bytes"])
        for kernel in report["kernels"]
        if kernel["stack_bytes"] or kernel["spill_bytes"]
    ]
    assert not too_large, too_large


def test_every_op_was_compiled(report: dict[str, Any]) -> None:
    compiled = {kernel["name"] for kernel in report["kernels"]}
    # expand_batch is begin_forward's kernel without what comes after, begin_round the same behind a plan; prompts are
    # normed before norm_qkv and norm_linear, and rounded before an int8 linear_residual.
    ops = {f"spec_{op}" for op in reference.OPS}
    assert compiled == (ops - {"spec_expand_batch", "spec_begin_round"}) | {
        "spec_norm_rows",
        "spec_round_rows",
    }
    for option in ("plan_ptr", "num_more_ptr"):
        begun = {option in kernel["parameters"] for kernel in named(report, {"spec_begin_forward"})}
        assert begun == {False, True}, option


def test_nothing_spills_and_nothing_has_a_stack_frame(report: dict[str, Any]) -> None:
    check_resources(report)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_shared_memory_suffices(capability: int, reports: dict[int, dict[str, Any]]) -> None:
    for kernel in reports[capability]["kernels"]:
        where = (kernel["model"], kernel["name"], kernel["shared_bytes"])
        assert kernel["shared_bytes"] <= SHARED_BYTES[capability], where


def test_kernels_on_logits_load_vectors(report: dict[str, Any]) -> None:
    for kernel in named(report, ON_LOGITS):
        assert re.search(r"ld\.global\S*\.v4\.b32", kernel["ptx"]), kernel["name"]
        assert not re.search(r"ld\.global(\.\w+)*\.[bu]16", kernel["ptx"]), kernel["name"]


def test_weights_are_read_sixteen_bytes_at_a_time_into_tensor_cores(report: dict[str, Any]) -> None:
    for kernel in named(report, WITH_WEIGHTS):
        ptx, where = kernel["ptx"], (kernel["model"], kernel["name"])
        # Weights that a program holds are loaded before all else, others copied to shared memory as they are needed.
        copied = r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], (0x10|16)"
        assert re.search(copied if "cp.async" in ptx else r"ld\.global\S*\.v4\.b32", ptx), where
        is_grouped = kernel["model"].split()[-1] in BY_GROUP
        # By group the scales are read beside the codes, two bytes each.
        narrow = "8" if is_grouped else "(8|16)"
        assert not re.search(rf"ld\.global(\.\w+)*\.[bu]{narrow}\s", ptx), where
        assert ("mma.sync" in ptx) != kernel["model"].endswith("float32"), where
        assert "wgmma" not in ptx, f"{where}: another order of sums than mma.sync"


VECTOR_BYTES, WARP = 16, 32


def weight_vectors(kernel: dict[str, Any]) -> int:
    """Vectors of weights that a thread asks for, by the text of its kernel: a loop's once."""
    asked = pointers_behind(all_instructions(kernel["ptx"]), kernel["parameters"])
    return sum("weight_ptr" in names and ".L2" not in opcode for opcode, names in asked)


def weight_bytes(kernel: dict[str, Any]) -> int:
    """Bytes of 16-bit or int8 weights that the grid of a linear layer asks for."""
    tile, num_vectors, num_programs = kernel["tile"], weight_vectors(kernel), math.prod(kernel["grid"])
    if "cp.async" in kernel["ptx"]:  # stages before the loop, and in the loop one block of K
        assert num_vectors % kernel["num_stages"] == 0
        depth = tile.get("HELD") or tile["WIDTH"]
        num_vectors = num_vectors // kernel["num_stages"] * -(-depth // tile["BLOCK_K"])
        num_programs //= tile.get("SPLIT_K", 1)  # which share the blocks
    return num_vectors * VECTOR_BYTES * WARP * kernel["num_warps"] * num_programs


def check_prompts(kernels: list[dict[str, Any]]) -> None:
    found = set()
    for kernel in kernels:
        tile, model, name = kernel["tile"], kernel["model"], kernel["name"].removeprefix("spec_")
        if " prompt " not in model or tile.get("BLOCK_M", 16) == 16:
            continue
        num_tokens = next(count for count in PROMPTS if f" {count} " in model)
        assert kernel["grid"][1] == num_tokens // tile["BLOCK_M"], (model, name)
        found.add((name, model.split()[-1], tile["BLOCK_M"]))
        if model.split()[-1] not in BY_GROUP:
            # Some of a tile's depth may lie beyond the row: those vectors are masked.
            width = tile["WIDTH"]
            depth = -(-width // 1024) * 1024
            share = weight_bytes(kernel) / kernel["grid"][1] / kernel["weight_bytes"]
            assert 1 <= share <= depth / width, (model, name, share)
    names = ("norm_qkv", "norm_linear", "linear_residual")
    layers = {(name, "float16", rows) for name in names for rows in (64, 128)}
    layers |= {(name, "int4_min", 64) for name in names} | {(name, "int8", 64) for name in names}
    # Tiles of whole heads, which 64 rows would take to `wgmma`.
    assert found == layers | {("norm_qkv", dtype, 32) for dtype in ("float16", "int8")}


def test_prompts_read_weights_once_for_64_rows_and_longer_ones_for_128(report: dict[str, Any]) -> None:
    check_prompts(report["kernels"])


@pytest.mark.parametrize("fault", ["rows", "twice"])
def test_prompts_that_read_weights_more_often_would_be_noticed(report: dict[str, Any], fault: str) -> None:
    kernels = []
    for kernel in report["kernels"]:
        width, height, *rest = (*kernel["grid"], 1)
        grid = (width, height * (4 if fault == "rows" else 1), *rest)
        kernels.append({**kernel, "grid": (2 * width, *grid[1:]) if fault == "twice" else grid})
    with pytest.raises(AssertionError):
        check_prompts(kernels)


NORMED = {"spec_norm_qkv", "spec_norm_linear", "spec_norm_rows"}


def row_sums(report: dict[str, Any], dtype: str, *, is_held: bool, is_alone: bool) -> set[str]:
    """The types of what norms sum of four rows: by the layer's programs, or by a launch of their own."""
    found = set()
    for kernel in named(report, NORMED):
        is_asked = kernel["model"].endswith(f" {dtype}") and bool(kernel["tile"]["HELD"]) == is_held
        if is_asked and (kernel["name"] == "spec_norm_rows") == is_alone:
            found |= {each for each in kernel["reduced"] if each.startswith("tensor<4x1024xf32")}
    return found


@pytest.mark.parametrize(("dtype", "is_held"), itertools.product(("float16", "int8"), (True, False)))
def test_prompts_are_normed_in_the_order_that_few_rows_are(
    report: dict[str, Any], dtype: str, is_held: bool
) -> None:
    """A row's sums run over threads and then over what each holds of it: another layout would be another order."""
    beside, alone = (row_sums(report, dtype, is_held=is_held, is_alone=each) for each in (False, True))
    assert beside == alone
    assert len(alone) == 1


def test_attention_reads_vectors_into_tensor_cores(report: dict[str, Any]) -> None:
    for kernel in named(report, {"spec_paged_attention"}):
        where = kernel["model"]
        assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg", kernel["ptx"]), where
        assert ("mma.sync" in kernel["ptx"]) != where.endswith("float32"), where
        assert "wgmma" not in kernel["ptx"], where


def test_multiplications_and_additions_are_contracted_nowhere(report: dict[str, Any]) -> None:
    """Kernels that compute the same expression must agree on its bits; only the exact fp32 product uses fma."""
    for kernel in report["kernels"]:
        if kernel["model"].endswith("float32"):
            continue
        for line in re.findall(r"^\s*(?:mul|add|sub)\.\S*f32\b", kernel["ptx"], re.MULTILINE):
            assert ".rn" in line, f"{kernel['name']}: {line} may be contracted"


def test_a_layer_is_five_kernels_and_three_where_it_is_parallel(report: dict[str, Any]) -> None:
    layers = dict(report["kernels_a_layer"])
    assert layers.pop("pythia-1.4b") == 3
    assert layers
    assert set(layers.values()) == {5}


def check_order(kernel: dict[str, Any]) -> None:
    """A kernel of a dependent launch waits first; one with weights asks for them before that."""
    if kernel["name"] in WITH_WEIGHTS:
        check_early_weights(kernel["ptx"], kernel["parameters"])
    else:
        assert not check_wait(kernel["ptx"], kernel["parameters"])


def test_every_kernel_waits_for_the_one_before_it_where_launches_are_dependent(
    reports: dict[int, dict[str, Any]],
) -> None:
    for kernel in reports[90]["kernels"]:
        check_order(kernel)
    for kernel in reports[80]["kernels"]:
        check_plain(kernel["ptx"])


@pytest.mark.slow
def test_every_size_in_every_type(tmp_path: Path) -> None:
    reports = compile_all(tmp_path, "--all-dtypes")
    for report in reports.values():
        check_resources(report)
    for kernel in reports[90]["kernels"]:
        check_order(kernel)


def test_a_spill_would_be_noticed(report: dict[str, Any]) -> None:
    spilled = {"kernels": [*report["kernels"], {**report["kernels"][0], "spill_bytes": 8}]}
    with pytest.raises(AssertionError):
        check_resources(spilled)


WAIT = "griddepcontrol.wait"
RELEASE = "griddepcontrol.launch_dependents"


def without_wait(ptx: str) -> str:
    return re.sub(rf"^\s*{re.escape(WAIT)}.*$", "", ptx, flags=re.MULTILINE)


def with_wait_at(ptx: str, place: str, *, is_behind: bool) -> str:
    """The wait moved to the first line that holds `place`."""
    lines = without_wait(ptx).splitlines()
    at = next(i for i, line in enumerate(lines) if re.search(place, line) and not line.startswith("."))
    lines.insert(at + is_behind, f"{WAIT};")
    return "\n".join(lines)


ASKED = r"(@!?%p\d+ )?(prefetch|ld)\.global"
FAULTS = {
    "no wait": without_wait,
    "some threads wait": lambda ptx: re.sub(
        rf"^\s*{re.escape(WAIT)}", f"@%p1 {WAIT}", ptx, flags=re.MULTILINE
    ),
    "a wait behind padding's return": lambda ptx: with_wait_at(ptx, r"^\s*@!?%p\d+ bra", is_behind=True),
    "a wait behind everything": lambda ptx: with_wait_at(ptx, r"^\s*ret;", is_behind=False),
    "a read before the wait": lambda ptx: re.sub(
        rf"^\s*{re.escape(WAIT)}",
        f"ld.param.b64 %rd1, [spec_norm_linear_param_0];\nld.global.b32 %r1, [%rd1];\n{WAIT}",
        ptx,
        flags=re.MULTILINE,
    ),
    "a write before the wait": lambda ptx: re.sub(
        rf"^\s*{re.escape(WAIT)}", f"st.global.b32 [%rd1], %r1;\n{WAIT}", ptx, flags=re.MULTILINE
    ),
    "the next kernel let in before the wait": lambda ptx: re.sub(
        rf"^\s*{re.escape(WAIT)}",
        f"{RELEASE};\n{WAIT}",
        re.sub(rf"{re.escape(RELEASE)}.*", "", ptx),
        flags=re.MULTILINE,
    ),
    "nothing asked for": lambda ptx: re.sub(rf"^\s*{ASKED}.*$", "", ptx, flags=re.MULTILINE),
    "activations asked for": lambda ptx: ptx.replace("_param_5]", "_param_0]"),
    "weights asked for too late": lambda ptx: with_wait_at(ptx, rf"^\s*{ASKED}", is_behind=False),
}


@pytest.mark.parametrize("holds", [True, False], ids=["loads", "prefetches"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wait_in_the_wrong_place_would_be_noticed(
    fault: str, holds: bool, reports: dict[int, dict[str, Any]]
) -> None:
    kernel = next(
        kernel
        for kernel in reports[90]["kernels"]
        if kernel["name"] == "spec_norm_linear" and ("prefetch" in kernel["ptx"]) != holds
    )
    check_order(kernel)
    with pytest.raises(AssertionError):
        check_order({**kernel, "ptx": FAULTS[fault](kernel["ptx"])})
