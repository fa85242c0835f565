"""What a round asks of a GPU, found without one: it runs on meta tensors, which have no values to look at.

Whatever would make the host wait for the device (`.item()`, `bool(tensor)`, a shape that depends on values) is an error
on such tensors, so a round that comes to its end can be recorded as a CUDA graph, as far as its Python goes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from aot_rounds import build_drafter, build_runner, round_launches
from aot_suite import SIZES
from torch.utils._python_dispatch import TorchDispatchMode

from specengine.drafters import draft_model
from specengine.kernels.types.rules import Rule
from specengine.runtime.state import RoundMode

pytestmark = pytest.mark.triton

NUM_LAYERS = 2
K = 3
MODES = {
    "plain": RoundMode(),
    "filtered": RoundMode(has_filters=True),
    "logprobs": RoundMode(wants_logprobs=True),
    "transformed": RoundMode(has_transforms=True),
    "transformed, rejection": RoundMode(rules=(Rule.REJECTION,), has_filters=True, has_transforms=True),
    "rejection": RoundMode(rules=(Rule.REJECTION,)),
    "rejection, filtered": RoundMode(rules=(Rule.REJECTION,), has_filters=True),
    "block": RoundMode(rules=(Rule.BLOCK,)),
    "threshold": RoundMode(rules=(Rule.THRESHOLD,)),
    "mixed": RoundMode(rules=tuple(Rule), has_filters=True),
}
# Those of PyTorch's ops that launch nothing (zeros are workspaces, which on a GPU are there already).
NO_KERNEL = {
    "zeros",
    "empty",
    "empty_strided",
    "new_empty",
    "empty_like",
    "arange",
    "detach",
    "alias",
    "lift_fresh",
}


class PyTorchKernels(TorchDispatchMode):
    """Counts PyTorch's ops that would launch something: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_KERNEL:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def run(
    mode: RoundMode, k: int, drafts: str = "model", size: str = "gpt2"
) -> tuple[Counter[str], Counter[str]]:
    """Kernels of ours and of PyTorch's in a round of two sequences, by name."""
    target, draft = (build_runner(SIZES[size], NUM_LAYERS, index) for index in range(2))
    drafter = build_drafter(drafts if k else "none", target, draft)
    others = PyTorchKernels()
    launches = round_launches(target, drafter, mode, k, batch_size=2, watched=others)
    return Counter(launch.name for launch in launches), others.counts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("drafts", "k"), [("none", 0), ("model", K), ("layers", K), ("upload", K)])
def test_a_round_asks_the_host_nothing(mode: str, drafts: str, k: int) -> None:
    ours, _ = run(MODES[mode], k, drafts)
    assert ours["spec_commit_round"] + ours["spec_commit_draws"] == 1
    assert ours["spec_plan_round"] == (drafts == "upload")  # else its first forward begins with the plan
    num_forwards = 1 + (k if drafts in ("model", "layers") else 0)
    assert ours["spec_paged_attention"] == NUM_LAYERS * num_forwards
    assert ours["spec_begin_forward"] == num_forwards
    assert not ours["spec_embed"] + ours["spec_row_keys"]


def test_the_phases_of_a_plain_token() -> None:
    """Five a layer, and three for the round: what is to be measured against the memory's time."""
    ours, others = run(MODES["plain"], 0)
    assert sum(ours.values()) == 5 * NUM_LAYERS + 3
    assert not others


def test_the_phases_of_a_speculative_round() -> None:
    """A draft forward has five a layer and two more; PyTorch has none."""
    ours, others = run(MODES["plain"], K)
    target, draft = 5 * NUM_LAYERS + 3, 5 * NUM_LAYERS + 2
    assert sum(ours.values()) == target + K * draft
    assert not others
    assert not run(MODES["plain"], K + 2)[1]


@pytest.mark.parametrize("drafts", ["model", "layers"])
def test_drafts_that_may_end_early_have_a_plan_first(drafts: str) -> None:
    """Their model says nothing of a round before it has one."""
    ours, _ = run(RoundMode(has_confidence=True), K, drafts)
    assert ours["spec_plan_round"] == 1
    assert ours["spec_begin_forward"] == K + 1


def test_a_parallel_layer_is_three() -> None:
    ours, _ = run(MODES["plain"], 0, size="pythia-1.4b")
    assert sum(ours.values()) == 3 * NUM_LAYERS + 3


def test_a_round_that_looks_at_a_value_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafting only while somebody drafts is such a look."""
    draw = draft_model._Draft.draw

    def mutant(self: Any, step: int) -> None:
        if self._batch.planned.is_drafting[step].any():
            draw(self, step)

    monkeypatch.setattr(draft_model._Draft, "draw", mutant)
    with pytest.raises(RuntimeError):
        run(MODES["plain"], K)
