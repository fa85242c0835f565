"""Triton's interpreter, made to keep the promise of the GPU: a row's bits do not depend on its place in a tile.

The interpreter multiplies with NumPy's `matmul`, and the library under that may round the rows of one tile in different
orders (OpenBLAS does with its kernels for Haswell). Here each element is a sum over k in one order, in float64, rounded
once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime import interpreter

_EXACT_PRODUCTS = (np.float16, np.float32)


def make_products_row_invariant() -> None:
    """Replaces the interpreter's `tl.dot` of matrices of floats."""
    builder = interpreter.InterpreterBuilder
    matmul = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.data.dtype not in _EXACT_PRODUCTS:
            return matmul(self, a, b, d, *options)
        product = np.einsum("...ik,...kn->...in", a.data.astype(np.float64), b.data.astype(np.float64))
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    builder.create_dot = create_dot
