"""Compiles recorded launches for GPUs that are not there, and reads what came out.

Run in a process without TRITON_INTERPRET: kernels are decorated for one or the other.
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from specengine.kernels.device.launch import Launch

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX and the names of its parameters there, what ptxas says it takes, its shared memory, and the types
    of what it reduces, layouts included: they decide in which order sums are made."""

    name: str
    ptx: str
    parameters: list[str]
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    reduced: list[str]

    def count(self, pattern: str) -> int:
        """Matches of a regular expression in the PTX."""
        return len(re.findall(pattern, self.ptx))


def specialise(launch: Launch) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes as a launch on a device would specialise its arguments; a tuple is one of
    tensors."""
    kernel = launch.kernel
    general = {kernel.arg_names[i] if isinstance(i, int) else i for i in kernel.do_not_specialize or ()}
    constexprs = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, (name, value) in enumerate(launch.arguments.items()):
        is_fixed = name in constexprs or value is None
        if is_fixed or (isinstance(value, int) and value == 1 and name not in general):
            signature[name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            if name not in general:
                attributes[(index,)] = _DIVISIBLE
        elif isinstance(value, tuple):
            signature[name] = tuple(_POINTERS[each.dtype] for each in value)
            attributes.update({(index, place): _DIVISIBLE for place in range(len(value))})
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in general:
                attributes[(index,)] = _DIVISIBLE
    return signature, constants, attributes


def build(launch: Launch, capability: int) -> Any:
    """A launch's kernel as Triton compiles it for sm_`capability` (80 or 90), from its cache where it is there."""
    signature, constants, attributes = specialise(launch)
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": False,
        "launch_pdl": launch.arguments.get("PDL", False),
        "maxnreg": launch.max_registers,
    }
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compiles a launch for sm_`capability` (80 or 90)."""
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        compiled = build(launch, capability)
    usage = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        log.getvalue(),
        re.DOTALL,
    )
    assert usage is not None, log.getvalue()
    stack, stores, loads, registers = map(int, usage.groups())
    shared = compiled.metadata.shared
    signature, _, _ = specialise(launch)
    parameters = [
        name
        for name, kind in signature.items()
        for _ in range(len(kind) if isinstance(kind, tuple) else 1)
        if kind != "constexpr"
    ]
    sizes = (registers, stack, stores + loads, shared)
    return Compiled(
        launch.name, compiled.asm["ptx"], parameters, *sizes, reduced_types(compiled.asm["ttgir"])
    )


def reduced_types(ttgir: str) -> list[str]:
    """The types of what is reduced by one operand, with the layouts that their names stand for."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    found = re.findall(r'"tt\.reduce"\(%\w+\).*?\}\) : \((tensor<[^>]*>)\)', ttgir, re.DOTALL)
    return [re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), each) for each in found]
