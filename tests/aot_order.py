"""What a kernel reads, and what it does before it waits for the one before it, read from its PTX."""

from __future__ import annotations

import re
from dataclasses import dataclass

_WAIT, _RELEASE = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
_PREFETCH, _LOAD, _COPY = "prefetch.global.L2", "ld.global", "cp.async.cg.shared.global"
_KEEP = "st.shared"  # a program's own: weights by group, as numbers that tensor cores multiply
# Pointers to what no kernel writes: the weights that linears multiply with, and all of a layer's.
_WEIGHTS = {"weight_ptr", "mlp_weight_ptr"}
_NEVER_WRITTEN = _WEIGHTS | {"scale_ptr", "bias_ptr", "norm_weight_ptr", "norm_bias_ptr"}
# Everything that reads or writes memory, or waits for something else; kernel parameters are constant memory.
_MEMORY = re.compile(
    r"(ld|ldu|st|atom|red|cp|prefetchu|discard|fence|membar|bar|barrier|mbarrier|multimem)\b"
)


@dataclass(frozen=True)
class Instruction:
    """One of PTX: `@predicate opcode operands`."""

    predicate: str
    opcode: str
    operands: str


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"(@!?%\w+)?\s*([a-z][\w.:]*)\s*(.*?);", line.partition("//")[0].strip())
    return None if match is None else Instruction(match[1] or "", match[2], match[3])


def first_block(ptx: str) -> list[Instruction]:
    """What every thread of every program executes, whatever it finds: up to the first branch, return or place that a
    branch goes to."""
    found = []
    for line in ptx[ptx.index("{", ptx.index(".entry")) + 1 :].splitlines():
        text = line.partition("//")[0].strip()
        if text.startswith("$L__BB"):
            break
        instruction = _instruction(line)
        if instruction is None:
            continue
        if instruction.opcode.partition(".")[0] in ("bra", "brx", "ret", "exit", "trap", "call"):
            break
        found.append(instruction)
    return found


def all_instructions(ptx: str) -> list[Instruction]:
    """A kernel's, in the order of its text."""
    lines = ptx[ptx.index("{", ptx.index(".entry")) + 1 :].splitlines()
    return [each for each in map(_instruction, lines) if each is not None]


def pointers_behind(block: list[Instruction], parameters: list[str]) -> list[tuple[str, set[str]]]:
    """For each prefetch, load and asynchronous copy from global memory: its opcode, and which of the kernel's pointers
    its address was computed from."""
    behind: dict[str, set[str]] = {}
    found = []
    for instruction in block:
        operands = instruction.operands
        if instruction.opcode.startswith((_PREFETCH, _LOAD, _COPY)):
            to_shared, _, from_global = operands.partition("],")
            results, _, address = (from_global or to_shared).partition("[")
            origin = set[str]().union(*(behind.get(each, set()) for each in re.findall(r"%\w+", address)))
            found.append((instruction.opcode, {name for name in origin if name.endswith("_ptr")}))
        else:
            results, _, sources = operands.partition(",")
            origin = {parameters[int(index)] for index in re.findall(r"\[\w+_param_(\d+)", operands)}
            origin = origin.union(*(behind.get(each, set()) for each in re.findall(r"%\w+", sources)))
        for register in re.findall(r"%\w+", results):
            behind[register] = origin | behind.get(register, set())
    return found


def check_wait(ptx: str, parameters: list[str]) -> list[tuple[str, set[str]]]:
    """Asserts that every thread waits before memory is touched, weights and the program's own shared memory apart, and
    then lets the next kernel begin; returns what is asked for before the wait, as `pointers_behind` does."""
    block = first_block(ptx)
    opcodes = [instruction.opcode for instruction in block]
    assert opcodes.count(_WAIT) == 1, "no wait that every thread comes to"
    at = opcodes.index(_WAIT)
    assert not block[at].predicate, "some threads do not wait"
    touched = [
        instruction
        for instruction in block[:at]
        if _MEMORY.match(instruction.opcode) and not instruction.opcode.startswith(("ld.param", _LOAD, _KEEP))
    ]
    assert not touched, f"before the wait: {touched}"
    asked = pointers_behind(block[:at], parameters)
    early = [(opcode, names) for opcode, names in asked if not names or not names <= _NEVER_WRITTEN]
    assert not early, f"before the wait: {early}"
    assert _RELEASE in opcodes[at:], "the next kernel is let in nowhere, or before the wait"
    assert len(re.findall(rf"^\s*(?:@\S+\s+)?{_RELEASE}", ptx, re.MULTILINE)) == 1
    return asked


def check_early_weights(ptx: str, parameters: list[str]) -> None:
    """Asserts that weights are asked for before the wait, prefetched or loaded, and that nothing else is prefetched."""
    asked = check_wait(ptx, parameters)
    assert any(names <= _WEIGHTS for _, names in asked), "no weight is asked for before the wait"
    prefetched = [names for opcode, names in asked if opcode == _PREFETCH]
    assert all(names <= _WEIGHTS for names in prefetched), prefetched


def check_plain(ptx: str) -> None:
    """Asserts that a kernel knows nothing of dependent launches."""
    assert "griddepcontrol" not in ptx
    assert "prefetch" not in ptx
