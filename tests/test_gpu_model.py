"""The model of a GPU's time: what it counts in machine code, and that the kernels' counts do not creep up again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gpu_costs import machine
from gpu_costs.sass import longest_way, parse, unroll
from gpu_costs.schedule import load_levels, time_path

pytestmark = pytest.mark.triton

ROOT = Path(__file__).resolve().parent.parent

# A kernel of two loads, the second where the first says, a loop, a slow way of a division and an early return.
CODE = """
.text.spec_example:
S2R R0, SR_CTAID.X
ACQBULK
LDG.E R2, desc[UR4][R4.64]
@P0 EXIT
LDG.E R3, desc[UR4][R2.64]
.L_x_0:
FADD R6, R3, R7
SHFL.BFLY PT, R7, R6, 0x10, 0x1f
BAR.SYNC.DEFER_BLOCKING 0x0
@P1 BRA `(.L_x_0)
@!P2 BRA `(.L_x_1)
MUFU.RCP R8, R7
MUFU.RCP R8, R8
CALL.REL.NOINC `($slow)
BRA `(.L_x_2)
.L_x_1:
MUFU.RCP R8, R7
.L_x_2:
LDGSTS.E.BYPASS.128 [R9], desc[UR4][R8.64]
LDGDEPBAR
DEPBAR.LE SB0, 0x0
STG.E desc[UR4][R10.64], R8
EXIT
"""


def listing(code: str = CODE) -> str:
    """As nvdisasm prints it."""
    lines = code.strip().splitlines()
    return "\n".join(line if line.startswith(".") else f"        /*0000*/  {line} ;" for line in lines)


def way(trips: int = 1, code: str = CODE) -> list[Any]:
    blocks = parse(listing(code))
    return unroll(longest_way(blocks), blocks, lambda body: trips)


def opcodes(trips: int = 1) -> list[str]:
    return [each.opcode.partition(".")[0] for each in way(trips)]


def test_the_way_leaves_out_slow_paths_and_early_returns() -> None:
    assert opcodes().count("EXIT") == 2  # the one that is not taken, and the last
    assert "CALL" not in opcodes()
    assert opcodes().count("MUFU") == 1
    assert opcodes()[-1] == "EXIT"


def test_a_loop_counts_as_often_as_it_runs() -> None:
    for trips in (1, 5):
        assert opcodes(trips).count("BAR") == opcodes(trips).count("SHFL") == trips


def test_of_two_ways_the_longer_one_is_taken() -> None:
    without_call = CODE.replace("CALL.REL.NOINC `($slow)", "FADD R8, R8, R8")
    assert [each.opcode for each in way(code=without_call)].count("MUFU.RCP") == 2


def test_loads_that_wait_for_loads_are_levels() -> None:
    instructions = way()
    levels = {each.opcode: level for each, level in zip(instructions, load_levels(instructions), strict=True)}
    assert levels["FADD"] == levels["LDGSTS.E.BYPASS.128"] == 2
    assert levels["STG.E"] == 3  # the copy, too


@pytest.mark.parametrize(
    ("line", "written", "read"),
    [
        ("ISETP.LE.AND P0, PT, R96, UR22, PT", {"P0"}, {"R96", "UR22"}),
        ("LEA R54, P1, R2.reuse, UR4, 0xb", {"R54", "P1"}, {"R2", "UR4"}),
        ("IADD3.X R73, RZ, R73, RZ, P4, !PT", {"R73"}, {"R73", "P4"}),
        ("SHFL.BFLY PT, R7, R6, 0x10, 0x1f", {"R7"}, {"R6"}),
        ("LDG.E.128 R4, desc[UR26][R24.64]", {"R4", "R5", "R6", "R7"}, {"R24", "R25", "UR26"}),
        ("STS.64 [R80+UR23+0xf000], R82", set(), {"R80", "UR23", "R82"}),
        ("@!P3 FADD R1, |R2|, -R3", {"R1"}, {"R2", "R3", "P3"}),
        ("ATOMG.E.ADD.STRONG.GPU PT, R13, desc[UR8][R20.64], R14", {"R13"}, {"UR8", "R20", "R21", "R14"}),
    ],
)
def test_what_an_instruction_reads_and_writes(line: str, written: set[str], read: set[str]) -> None:
    (each,) = parse(listing(f".text.spec_example:\n{line}\nEXIT"))[0].instructions[:1]
    assert (set(each.written), set(each.read)) == (written, read)


def test_a_path_takes_at_least_its_dependent_loads() -> None:
    load, shuffle, barrier = (machine.LATENCY[name] for name in ("LDG", "SHFL", "BAR"))
    one, five = (time_path(way(trips), num_warps=4) for trips in (1, 5))
    assert one.end >= 3 * load + shuffle + barrier
    assert 4 * max(shuffle, barrier) <= five.end - one.end <= 4 * (shuffle + barrier)
    assert time_path(way(), num_warps=8).busy > one.busy


def test_what_comes_before_the_wait_costs_nothing_where_there_is_room_for_it() -> None:
    late = CODE.replace("ACQBULK\n", "LDG.E R1, desc[UR4][R4.64]\nFADD R1, R1, R1\nACQBULK\n")
    assert time_path(way(code=late), 4).end == time_path(way(), 4).end
    more = time_path(way(code=late), 4, is_early=False).end - time_path(way(), 4, is_early=False).end
    assert more >= machine.LATENCY["LDG"]


@pytest.mark.parametrize(
    ("num_warps", "registers", "shared_bytes", "expected"),
    [
        (4, 32, 0, 16),
        (4, 168, 0, 3),
        (4, 128, 0, 4),
        (4, 32, 60 << 10, 3),
        (8, 32, 227 << 10, 1),
        (1, 16, 0, 32),
    ],
)
def test_programs_that_fit_on_a_multiprocessor(
    num_warps: int, registers: int, shared_bytes: int, expected: int
) -> None:
    assert machine.programs_per_sm(num_warps, registers, shared_bytes) == expected


def test_kernels_share_a_multiprocessor_while_all_they_take_is_there() -> None:
    half = machine.share_of(2, 4, 128, 100 << 10)
    assert half.registers == 2 * 4 * 32 * 128
    assert (half + machine.share_of(2, 4, 128, 0)).fits
    assert not (half + machine.share_of(2, 4, 136, 0)).fits
    assert not (half + machine.share_of(1, 4, 32, 40 << 10)).fits
    assert not (half + machine.share_of(15, 4, 16, 0)).fits


# The kernels


def run_model(tmp_path: Path, *names: str, dtype: str = "float16") -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = tmp_path / "model.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu_model.py"),
        "--json",
        str(out),
        "--dtype",
        dtype,
        "--only",
        *names,
    ]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "not a measurement" in done.stdout
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_model(tmp_path_factory.mktemp("model"), "gpt2-medium token", "draft step")


# At most, of a plain gpt2-medium token: instructions and dependent loads before the first weights (attention: keys,
# with held weights: rows) are asked for; shuffles in all; barriers of a block of K, or of a group of rows; waves.
MOST = {
    "spec_norm_qkv": (220, 1, 10, 6, 1),
    "spec_paged_attention": (260, 2, 28, 8, 1),
    "spec_norm_linear": (200, 1, 10, 6, 1),
    "spec_linear_residual": (115, 1, 0, 2, 1),
    "spec_head_draw": (880, 2, 96, 2, 2),
}
# Loads one after the other, in launches without weights.
MOST_LEVELS = {"spec_begin_forward": 5, "spec_commit_draws": 2}
MOST_US = {"gpt2-medium token": 366, "draft step": 102}


def check_counts(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        most = MOST.get(kernel["name"])
        if most is not None:
            in_a_block = (kernel["a_block"] or (0, 0))[0]
            found = (
                kernel["to_first_copy"],
                kernel["levels"],
                kernel["shuffles"],
                in_a_block,
                kernel["waves"],
            )
            assert all(one <= other for one, other in zip(found, most, strict=True)), (kernel["name"], found)
        assert kernel["levels"] <= MOST_LEVELS.get(kernel["name"], kernel["levels"]), kernel["name"]


def test_counts_do_not_creep_up(sums: dict[str, Any]) -> None:
    kernels = sums["gpt2-medium token"]["kernels"]
    assert MOST.keys() | MOST_LEVELS.keys() == {kernel["name"] for kernel in kernels}
    check_counts(kernels)
    # Where there is a plan already, it waits for two loads less.
    (begin,) = [kernel for kernel in sums["draft step"]["kernels"] if kernel["name"] == "spec_begin_forward"]
    assert begin["levels"] <= 3
    for name, most in MOST_US.items():
        assert sums[name]["us"] <= most


def test_what_a_layer_launches_is_one_wave_and_mostly_has_room_beside_the_kernel_before(
    sums: dict[str, Any],
) -> None:
    """Held weights take registers: beside the MLP's second layer there is no room for them, nor for it beside them."""
    for name in MOST_US:
        layer = [kernel for kernel in sums[name]["kernels"] if kernel["name"] != "spec_head_draw"]
        assert {kernel["waves"] for kernel in layer} == {1}
        late = [kernel["name"] for kernel in layer if not kernel["is_early"]]
        assert sorted(late) == ["spec_linear_residual", "spec_norm_qkv"], name


def weight_bytes(found: dict[str, Any]) -> int:
    kernels = [kernel for kernel in found["kernels"] if "attention" not in kernel["name"]]
    return sum(kernel["count"] * kernel["num_bytes"] for kernel in kernels)


def test_int8_weights_are_read_in_half_the_bytes_and_their_counts_stay(
    sums: dict[str, Any], tmp_path: Path
) -> None:
    found = run_model(tmp_path, "gpt2-medium token", dtype="int8")["gpt2-medium token"]
    assert found["us"] <= 415
    layers = {kernel["name"]: kernel for kernel in found["kernels"] if kernel["num_bytes"]}
    assert {kernel["waves"] for kernel in layers.values()} == {1}
    assert 2 * weight_bytes(found) == weight_bytes(sums["gpt2-medium token"])
    assert layers["spec_norm_qkv"]["shuffles"] <= 30
    assert layers["spec_linear_residual"]["shuffles"] <= 20


@pytest.mark.parametrize(
    ("size", "dtype", "most_us"),
    [("gpt2-medium", "float16", 55), ("gpt2-medium", "int8", 40), ("gpt2-xl", "int8", 70)],
)
def test_a_prompts_rows_are_normed_and_rounded_once(
    size: str, dtype: str, most_us: float, tmp_path: Path
) -> None:
    found = run_model(tmp_path, f"{size} prompt", dtype=dtype)[f"{size} prompt"]
    assert found["us"] <= most_us
    kernels = {kernel["name"]: kernel for kernel in found["kernels"]}
    assert kernels["spec_norm_rows"]["count"] == 2
    assert kernels["spec_norm_rows"]["us"] <= (2.2 if size == "gpt2-medium" else 4.7)
    assert ("spec_round_rows" in kernels) == (dtype == "int8")
    for name in ("spec_norm_qkv", "spec_norm_linear", "spec_linear_residual"):
        assert kernels[name]["shuffles"] == 0


@pytest.mark.parametrize("name", ["to_first_copy", "levels", "shuffles", "waves"])
def test_one_that_crept_up_would_be_noticed(sums: dict[str, Any], name: str) -> None:
    kernels = [dict(kernel) for kernel in sums["gpt2-medium token"]["kernels"]]
    for kernel in kernels:
        if kernel[name] is not None:
            kernel[name] += 40
    with pytest.raises(AssertionError):
        check_counts(kernels)


def test_bytes_are_those_of_the_weights(sums: dict[str, Any]) -> None:
    """gpt2-medium's 708 MB in float16, and the keys and values of 512 tokens."""
    kernels = sums["gpt2-medium token"]["kernels"]
    read = sum(kernel["count"] * kernel["num_bytes"] for kernel in kernels)
    width, num_layers = 1024, 24
    weights = 2 * width * (12 * width * num_layers + 50257)
    assert read == weights + 2 * 2 * 512 * width * num_layers


@pytest.mark.parametrize(("dtype", "most_us"), [("int4_min", 620), ("int8_group", 495)])
def test_weights_by_group_are_held_and_their_counts_stay(
    dtype: str, most_us: float, sums: dict[str, Any], tmp_path: Path
) -> None:
    found = run_model(tmp_path, "gpt2-medium token", dtype=dtype)["gpt2-medium token"]
    assert found["us"] <= most_us
    bits = {"int4_min": 4 + 2 * 16 / 32, "int8_group": 8 + 16 / 32}[dtype]
    assert weight_bytes(found) == weight_bytes(sums["gpt2-medium token"]) * bits / 16
    layers = {kernel["name"]: kernel for kernel in found["kernels"] if kernel["num_bytes"]}
    assert {kernel["waves"] for name, kernel in layers.items() if name != "spec_head_draw"} == {1}
    assert layers["spec_norm_qkv"]["a_block"][0] <= 10
    assert layers["spec_norm_qkv"]["shuffles"] <= 36
    assert layers["spec_linear_residual"]["a_block"][0] <= 2
