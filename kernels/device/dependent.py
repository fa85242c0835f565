"""Programmatic dependent launch: a kernel begins while the one before it still runs, and waits before it reads.

Every kernel with a constexpr PDL calls `wait(PDL)` first of all, and before it only `prefetch_weight`. Why no kernel
then sees anything too early:

* `griddepcontrol.wait` returns when the kernel before has completed: all its programs have ended, and what they wrote
  is visible. No program ends before its own wait, not even one of padding, so a completed kernel implies that the one
  before it had completed too, and so on: a wait is a wait for all that was launched before. One program that returned
  early would break this chain, and a kernel two steps behind could overtake.
* Whatever a kernel writes (outputs, the KV cache, workspaces that must be zero), it writes after its wait: nobody
  before it still reads or writes there.
* `griddepcontrol.launch_dependents` comes right after the wait. The next kernel thus begins when every program here
  has begun and all earlier kernels have completed: at most two overlap, the second takes no multiprocessor that a
  program of the first still needs, and what it does before its wait runs beside its direct predecessor only.
* Before the wait weights are asked into the L2 cache, where all of the GPU's memory traffic meets, or, by programs that
  hold their weights, loaded with the layer's norm and bias; and nothing else. No kernel here writes these. Who does (a
  copy, when a model is loaded) is a kernel without PDL, which has completed before the next one begins.
* Kernels without PDL and PyTorch's own begin when everything before them has completed, and let nobody begin before
  they end.

The instructions come from Triton 3.6 as inline assembly and from 3.9 as operations; loads could be moved above either,
which tests/test_ahead_of_time.py rules out in the PTX of every kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from specengine.kernels.device.launch import INTERPRETED

# One prefetch brings a line of this many bytes.
_LINE_BYTES = tl.constexpr(128)
# Of weights, by each program: what memory delivers in the 1.6 microseconds between two kernels that are to be hidden
# (at 4.3 TB/s, over 264 programs: 26 KB). Not measured yet.
_PREFETCH_BYTES = tl.constexpr(32 << 10)


@triton.jit
def wait(PDL: tl.constexpr):
    """Until all earlier kernels have completed; then lets the next one begin."""
    if PDL and not INTERPRETED:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch_weight(weight_ptr, columns, first, WEIGHT_STRIDE: tl.constexpr, PDL: tl.constexpr):
    """Asks for the weights of `columns` `[BLOCK_N]` from element `first` of their rows on: the first tiles of K."""
    if PDL and not INTERPRETED:
        LINE: tl.constexpr = _LINE_BYTES * 8 // weight_ptr.dtype.element_ty.primitive_bitwidth
        NUM_LINES: tl.constexpr = _PREFETCH_BYTES // (_LINE_BYTES * columns.shape[0])
        k = tl.minimum(first + tl.arange(0, NUM_LINES) * LINE, WEIGHT_STRIDE - 1)
        at = columns[:, None].to(tl.int64) * WEIGHT_STRIDE + k[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // dummy $0",
            "=r,l",
            [weight_ptr + at],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
