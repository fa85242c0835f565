"""What a row is judged by: the one list of the numbers that a sequence brings along.

Whatever handles rows loops over this declaration: the state and its selections, the `row_keys` op, the C++ extension
(`csrc/core/rows.h` lists the same columns). The ops that use a column name it.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple, get_type_hints

import torch
from torch import Tensor


class Column(NamedTuple):
    """How a column is stored and where its numbers come from.

    source:  attribute of a `specengine.runtime.sequence.Sequence`, dotted
    default: what a row that belongs to nobody holds
    """

    dtype: torch.dtype
    source: str
    default: float = 0


class SamplingRows(NamedTuple):
    """What N rows are judged by, `[N]` each: slots of the state, sequences of a batch or rows of logits.

    temperature: fp32, 0 = greedy
    top_k, top_p, min_p: int32, fp32, fp32: the filters, see `specengine.kernels.reference.filter_rows`
    seeds:       int64, the bits of the 64-bit seeds
    rule:        int32, the `Rule` that drafts are judged by (MATCH for greedy rows)
    repetition_penalty, presence_penalty, frequency_penalty: fp32; 1, 0 and 0 = none, see
                 `specengine.kernels.reference.transform_rows`
    prompt_length: int32, tokens of the prompt: those from there on are generated
    acceptance_threshold, acceptance_delta: fp32, in [0, 1]: what the lossy rules accept, see
                 `specengine.kernels.reference.threshold_verify` and `typical_verify`
    draft_confidence: fp32, in [0, 1]: the probability that a draft's likeliest token must have, or nothing is drafted
    """

    temperature: Annotated[Tensor, Column(torch.float32, "params.temperature")]
    top_k: Annotated[Tensor, Column(torch.int32, "params.top_k")]
    top_p: Annotated[Tensor, Column(torch.float32, "params.top_p", default=1)]
    min_p: Annotated[Tensor, Column(torch.float32, "params.min_p")]
    seeds: Annotated[Tensor, Column(torch.int64, "signed_seed")]
    rule: Annotated[Tensor, Column(torch.int32, "rule")]
    repetition_penalty: Annotated[Tensor, Column(torch.float32, "params.repetition_penalty", default=1)]
    presence_penalty: Annotated[Tensor, Column(torch.float32, "params.presence_penalty")]
    frequency_penalty: Annotated[Tensor, Column(torch.float32, "params.frequency_penalty")]
    prompt_length: Annotated[Tensor, Column(torch.int32, "prompt_length")]
    acceptance_threshold: Annotated[Tensor, Column(torch.float32, "params.acceptance_threshold")]
    acceptance_delta: Annotated[Tensor, Column(torch.float32, "params.acceptance_delta")]
    draft_confidence: Annotated[Tensor, Column(torch.float32, "params.draft_confidence")]

    @classmethod
    def empty(cls, count: int, device: torch.device | str = "cpu") -> SamplingRows:
        """`count` rows of nobody."""
        made = (
            torch.full((count,), each.default, dtype=each.dtype, device=device) for each in COLUMNS.values()
        )
        return cls(*made)

    def without_filters(self) -> SamplingRows:
        """The same rows with top-k, top-p and min-p off."""
        return self._replace(
            top_k=torch.zeros_like(self.top_k),
            top_p=torch.ones_like(self.top_p),
            min_p=torch.zeros_like(self.min_p),
        )

    def take(self, index: Tensor | slice) -> SamplingRows:
        """Some of the rows."""
        return SamplingRows(*(values[index] for values in self))


COLUMNS: dict[str, Column] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(SamplingRows, include_extras=True).items()
}
