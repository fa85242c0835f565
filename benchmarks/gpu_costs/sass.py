"""A kernel's machine code as `nvdisasm` prints it: its blocks, and the longest way through them.

Which way a branch goes is in the data. The model takes the longest: whoever arrives last, draws with noise. Left
out are returns in the middle (padding) and the slow ways of division and square root, which only denormal and
infinite numbers take.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property

_REGISTER = re.compile(r"\b(UR|R|UP|P)(\d+)\b(?:\.(64))?")
# Their first operand is read, too.
_NO_RESULT = (
    "ST",
    "BAR",
    "BRA",
    "EXIT",
    "RET",
    "CALL",
    "RED",
    "MEMBAR",
    "CCTL",
    "DEPBAR",
    "LDGSTS",
    "LDGDEPBAR",
)
_UNLIKELY = ("CALL", "RET", "WARPSYNC.COLLECTIVE", "ENDCOLLECTIVE")


@dataclass(frozen=True)
class Instruction:
    """`@predicate opcode operands`, with the registers it reads and writes."""

    predicate: str
    opcode: str
    operands: str

    @property
    def is_conditional(self) -> bool:
        return bool(self.predicate) and self.predicate not in ("@PT", "@UPT")

    @cached_property
    def _parts(self) -> list[str]:
        return [part.strip() for part in self.operands.split(",")]

    @cached_property
    def _num_results(self) -> int:
        """Operands that are written: of comparisons predicates, else a register, with predicates beside it."""
        if self.opcode.startswith(_NO_RESULT):
            return 0
        kinds = ["p" if re.fullmatch(r"!?U?P[\dT]", part) else "r" for part in self._parts]
        result = r"p{1,2}" if "SETP" in self.opcode or self.opcode.startswith(("PLOP3", "FCHK")) else "p?rp*"
        match = re.match(result, "".join(kinds))
        return 0 if match is None else match.end()

    @cached_property
    def written(self) -> tuple[str, ...]:
        """Registers, a vector's one by one."""
        found: list[str] = []
        for kind, number, _ in _REGISTER.findall(",".join(self._parts[: self._num_results])):
            found += _run(kind, int(number), self._result_width if kind in ("R", "UR") else 1)
        return tuple(found)

    @property
    def _result_width(self) -> int:
        name = self.opcode
        if name.startswith(("HMMA", "IMMA")):
            return 4
        if name.startswith("LDSM"):
            return int(name.rpartition(".")[2]) if name.rpartition(".")[2].isdigit() else 1
        if ".128" in name:
            return 4
        return 2 if ".64" in name or ".WIDE" in name or name.startswith("CS2R") else 1

    @cached_property
    def read(self) -> tuple[str, ...]:
        """Registers, a vector's one by one."""
        found: list[str] = []
        for kind, number, is_pair in _REGISTER.findall(",".join(self._parts[self._num_results :])):
            width = 4 if self.opcode.startswith(("HMMA", "IMMA")) else 2 if is_pair else 1
            found += _run(kind, int(number), width if kind in ("R", "UR") else 1)
        found += [kind + number for kind, number, _ in _REGISTER.findall(self.predicate)]
        return tuple(found)


def _run(kind: str, first: int, count: int) -> list[str]:
    return [f"{kind}{first + place}" for place in range(count)]


@dataclass
class Block:
    """Instructions that are executed one after the other, and the blocks that may follow."""

    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)

    @property
    def is_unlikely(self) -> bool:
        return any(each.opcode.startswith(_UNLIKELY) for each in self.instructions)

    def has(self, *opcodes: str) -> bool:
        return any(each.opcode.startswith(opcodes) for each in self.instructions)


def parse(text: str) -> list[Block]:
    """The blocks of the first kernel of a listing, in order."""
    lines = text[re.search(r"^\.text\.\w+:", text, re.MULTILINE).end() :].splitlines()  # type: ignore[union-attr]
    blocks, labels, targets = [Block()], {}, {}
    for line in lines:
        label = re.match(r"(\.L_x_\d+|\$\w+):", line.strip())
        if label:
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
            continue
        match = re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P[\dT]+)?\s*([A-Z][\w.]*)\s*(.*?)\s*;", line)
        if match is None:
            continue
        each = Instruction(match[1] or "", match[2], match[3])
        blocks[-1].instructions.append(each)
        if each.opcode == "BRA":
            targets[len(blocks) - 1] = each.operands.rpartition("`(")[2].rstrip(")")
        if each.opcode.split(".")[0] in ("BRA", "EXIT", "RET"):
            blocks.append(Block())
    for index, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        ends = last is not None and last.opcode.split(".")[0] in ("BRA", "EXIT", "RET")
        always = ends and last is not None and not last.is_conditional and last.opcode != "BRA.DIV"
        if not always and index + 1 < len(blocks):
            block.next.append(index + 1)
        if index in targets and targets[index] in labels:
            block.next.append(labels[targets[index]])
    return blocks


def longest_way(blocks: list[Block]) -> list[int]:
    """Blocks from the first to an end, each at most once: the way with the most instructions."""

    @cache
    def best(index: int) -> tuple[int, tuple[int, ...]]:
        block = blocks[index]
        own = len(block.instructions)
        following = [best(other) for other in block.next if other > index and not blocks[other].is_unlikely]
        if not following:
            is_end = block.has("EXIT")
            return (own if is_end else -(10**9)), (index,)
        length, way = max(following)
        return own + length, (index, *way)

    return list(best(0)[1])


def loops_on(way: list[int], blocks: list[Block]) -> list[tuple[int, int]]:
    """(first, last) places on the way between which a loop runs, inner loops first."""
    place = {index: at for at, index in enumerate(way)}
    found = {
        (place[other], at)
        for at, index in enumerate(way)
        for other in blocks[index].next
        if other <= index and other in place
    }
    return sorted(found, key=lambda loop: loop[1] - loop[0])


def unroll(way: list[int], blocks: list[Block], trips: Callable[[list[Block]], int]) -> list[Instruction]:
    """The instructions of the way with each loop as often as `trips` of its blocks says."""
    loops = loops_on(way, blocks)

    def emit(first: int, last: int, done: frozenset[tuple[int, int]]) -> Iterable[Instruction]:
        at = first
        while at <= last:
            inner = [loop for loop in loops if loop not in done and loop[0] == at and loop[1] <= last]
            if inner:
                loop = max(inner, key=lambda each: each[1])
                body = [blocks[way[place]] for place in range(loop[0], loop[1] + 1)]
                for _ in range(trips(body)):
                    yield from emit(loop[0], loop[1], done | {loop})
                at = loop[1] + 1
            else:
                yield from blocks[way[at]].instructions
                at += 1

    return list(emit(0, len(way) - 1, frozenset()))
