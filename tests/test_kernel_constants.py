"""What Triton 3.6 cannot compile and later versions can: the interpreter and Triton 3.9 would not show it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import specengine.kernels

KERNELS = Path(specengine.kernels.__file__).parent


def jitted(source: str) -> Iterator[ast.FunctionDef]:
    """The functions that Triton compiles."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any(
            "triton.jit" in ast.unparse(d) for d in node.decorator_list
        ):
            yield node


def constants_in_tuples(function: ast.FunctionDef) -> list[str]:
    """`tl.constexpr` names that are kept in a tuple: taken out of it, they are constants no more."""
    annotated = [(argument.arg, argument.annotation) for argument in function.args.args]
    assigned = [node for node in ast.walk(function) if isinstance(node, ast.AnnAssign)]
    annotated += [(ast.unparse(node.target), node.annotation) for node in assigned]
    known = {name for name, kind in annotated if kind is not None and "constexpr" in ast.unparse(kind)}
    return [
        f"{function.name}: {element.id}"
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
        if not isinstance(node.targets[0], ast.Tuple)
        for element in node.value.elts
        if isinstance(element, ast.Name) and element.id in known
    ]


def test_no_kernel_keeps_a_constant_in_a_tuple() -> None:
    sources = [path.read_text() for path in sorted(KERNELS.rglob("*.py"))]
    functions = [function for source in sources for function in jitted(source)]
    assert len(functions) > 50
    assert [found for function in functions for found in constants_in_tuples(function)] == []


def test_a_constant_in_a_tuple_would_be_noticed() -> None:
    source = (KERNELS / "device" / "rounded.py").read_text()
    fault = source.replace("weight_ptr, columns)\n", "weight_ptr, columns, WEIGHT_STRIDE, IS_WHOLE)\n")
    assert fault != source
    found = [name for function in jitted(fault) for name in constants_in_tuples(function)]
    assert found == ["multiply_rounded: WEIGHT_STRIDE", "multiply_rounded: IS_WHOLE"]
