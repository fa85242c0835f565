"""What a kernel does before it waits for the one before it, read from its PTX."""

from __future__ import annotations

import re
from dataclasses import dataclass

_WAIT, _RELEASE, _PREFETCH = "griddepcontrol.wait", "griddepcontrol.launch_dependents", "prefetch.global.L2"
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


def first_block(ptx: str) -> list[Instruction]:
    """What every thread of every program executes, whatever it finds: up to the first branch, return or place that a
    branch goes to."""
    found = []
    for line in ptx[ptx.index("{", ptx.index(".entry")) + 1 :].splitlines():
        text = line.partition("//")[0].strip()
        if text.startswith("$L__BB"):
            break
        match = re.match(r"(@!?%\w+)?\s*([a-z][\w.:]*)\s*(.*?);", text)
        if match is None:
            continue
        instruction = Instruction(match[1] or "", match[2], match[3])
        if instruction.opcode.partition(".")[0] in ("bra", "brx", "ret", "exit", "trap", "call"):
            break
        found.append(instruction)
    return found


def pointers_behind(block: list[Instruction], parameters: list[str]) -> list[set[str]]:
    """For each prefetch of a block, which of the kernel's pointers its address was computed from."""
    behind: dict[str, set[str]] = {}
    prefetched = []
    for instruction in block:
        registers = re.findall(r"%\w+", instruction.operands)
        origin = {
            parameters[int(index)] for index in re.findall(r"\[\w+_param_(\d+)", instruction.operands)
        }.union(*(behind.get(register, set()) for register in registers[1:]))
        if instruction.opcode == _PREFETCH:
            prefetched.append({name for name in behind[registers[0]] if name.endswith("_ptr")})
        elif registers:
            behind[registers[0]] = origin
    return prefetched


def check_wait(ptx: str) -> list[Instruction]:
    """Asserts that every thread waits before memory is touched, weights' prefetches apart, and then lets the next
    kernel begin; returns what comes before the wait."""
    block = first_block(ptx)
    opcodes = [instruction.opcode for instruction in block]
    assert opcodes.count(_WAIT) == 1, "no wait that every thread comes to"
    at = opcodes.index(_WAIT)
    assert not block[at].predicate, "some threads do not wait"
    touched = [
        instruction
        for instruction in block[:at]
        if _MEMORY.match(instruction.opcode) and not instruction.opcode.startswith("ld.param")
    ]
    assert not touched, f"before the wait: {touched}"
    assert _RELEASE in opcodes[at:], "the next kernel is let in nowhere, or before the wait"
    assert len(re.findall(rf"^\s*(?:@\S+\s+)?{_RELEASE}", ptx, re.MULTILINE)) == 1
    return block[:at]


def check_prefetch(ptx: str, parameters: list[str]) -> None:
    """Asserts that weights are asked for before the wait, and nothing but weights."""
    prefetched = pointers_behind(check_wait(ptx), parameters)
    assert prefetched, "no weight is asked for before the wait"
    assert all(names and names <= {"weight_ptr", "mlp_weight_ptr"} for names in prefetched), prefetched


def check_plain(ptx: str) -> None:
    """Asserts that a kernel knows nothing of dependent launches."""
    assert "griddepcontrol" not in ptx
    assert "prefetch" not in ptx
