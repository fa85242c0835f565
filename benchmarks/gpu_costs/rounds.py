"""A plain token, a draft step and a round of k drafts, as sums over the launches that the engine makes for them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from aot_rounds import build_drafter, build_runner, round_launches
from aot_suite import SIZES, Storage, prompt_launches

from gpu_costs.kernel import KernelCost, Load, costs
from specengine.kernels.device.launch import Launch, assume_capability
from specengine.runtime.state import RoundMode

NUM_LAYERS = {"gpt2": 12, "gpt2-medium": 24, "gpt2-xl": 48, "distilgpt2": 6}
SHAPES = {**SIZES, "distilgpt2": SIZES["gpt2"]}
DRAFT, K = "distilgpt2", 4
PROMPT = 256
_LINEARS = {
    f"spec_{name}" for name in ("norm_rows", "round_rows", "norm_qkv", "linear_residual", "norm_linear")
}


@dataclass(frozen=True)
class Sum:
    """Launches in order, each with the model's account of it."""

    costs: list[KernelCost]

    @property
    def us(self) -> float:
        return sum(each.us for each in self.costs)

    @property
    def floor_us(self) -> float:
        return sum(each.floor_us for each in self.costs)

    def by_kernel(self) -> list[tuple[KernelCost, int]]:
        """Each account once, and how many launches have it."""
        return list(Counter(self.costs).items())


def plain_token(target: str, dtype: Storage) -> Sum:
    """One sequence, one token. dtype: of the weights"""
    return Sum(costs(_launches(target, 0, dtype), Load(rows=1)))


def draft_step(dtype: Storage) -> Sum:
    """One draft in a round: what a round of K + 1 has more than one of K, without the row more for the target."""
    drafts, _ = _parts(DRAFT, dtype)
    return Sum(costs(drafts, Load(rows=1))[-(len(drafts) // K) :])


def speculative_round(target: str, dtype: Storage) -> Sum:
    """K drafts, verification of them, and the commit."""
    drafts, rest = _parts(target, dtype)
    return Sum(costs(drafts, Load(rows=1)) + costs(rest, Load(rows=K + 1)))


def prompt_layer(target: str, dtype: Storage) -> Sum:
    """One layer with PROMPT tokens of a prompt, but for attention, whose tiles the model does not count."""
    assume_capability(90)
    launches = prompt_launches(SHAPES[target], dtype, PROMPT)
    return Sum(costs([each for each in launches if each.name in _LINEARS], Load(rows=PROMPT)))


def _parts(target: str, dtype: Storage) -> tuple[list[Launch], list[Launch]]:
    """A round's launches: those of its drafts, the plan among them, and the others."""
    launches = _launches(target, K, dtype)
    draws = [at for at, launch in enumerate(launches) if launch.name == "spec_head_draw"]
    end = draws[K - 1] + 1
    return launches[:end], launches[end:]


def _launches(target: str, k: int, dtype: Storage) -> list[Launch]:
    assume_capability(90)
    runner = build_runner(SHAPES[target], NUM_LAYERS[target], 0, dtype)
    draft = build_runner(SHAPES[DRAFT], NUM_LAYERS[DRAFT], 1, dtype)
    drafter = build_drafter("model" if k else "none", runner, draft)
    return round_launches(runner, drafter, RoundMode(), k, batch_size=1)
