"""specengine itself, plain, speculative and with a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch  # noqa: F401 - before specengine's extension, which needs its libraries

from generation.protocol import Answer, Arrivals, Counts, Setup, Task, answer_one_by_one
from specengine import _C, Engine, GenerationResult, SamplingParams, SpecEngineError
from specengine.weight_formats import WEIGHT_FORMATS

DISTRIBUTIONS = ("specengine", "torch")


def prepare(setup: Setup) -> None:
    """Nothing: the checkpoint is read as it is."""


class Ours:
    """One engine; drafting is chosen a task."""

    def __init__(self, setup: Setup) -> None:
        self._engine = Engine(
            setup.target,
            setup.draft if setup.speculates else None,
            dtype=compute_dtype(setup.dtype),
            weight_dtype=setup.dtype,
            draft_weight_dtype=setup.draft_dtype,
            max_batch_size=setup.max_batch_size,
            max_seq_len=setup.max_seq_len,
            num_threads=setup.num_threads,
            device=setup.device,
            enable_prefix_cache=False,  # every repetition pays for its prompt
            **setup.engine,
        )
        is_native = self._engine.backend_name == "native"
        self.instruction_set = _C.build_info()["instruction_set"] if is_native else setup.device
        self.settings = f"{self._engine.backend_name}, keys and values in {self._engine.kv_dtype}"
        self.settings += "".join(f", {name}={value}" for name, value in setup.engine.items())

    def generate(self, task: Task) -> Answer:
        if task.is_batch:
            return self._generate_batch(task)
        return answer_one_by_one(task, lambda prompt: self._generate_one(prompt, task))

    def _generate_one(self, prompt: list[int], task: Task) -> tuple[list[int], Arrivals, Counts]:
        arrivals, results = self._stream([prompt], task)
        result = results[0]
        return result.token_ids, arrivals[0], counts(results)

    def _generate_batch(self, task: Task) -> Answer:
        """Decoding is what happens after the last prompt gave its first token."""
        arrivals, results = self._stream(task.prompts, task)
        start = max(each.times[0] for each in arrivals)
        decoded = [each.after(start) for each in arrivals]
        return Answer(
            token_ids=[result.token_ids for result in results],
            prompt_seconds=[each.prompt_seconds for each in arrivals],
            decode_seconds=max(seconds for seconds, _ in decoded),
            num_decoded=sum(number for _, number in decoded),
            counts=counts(results),
        )

    def _stream(self, prompts: list[list[int]], task: Task) -> tuple[list[Arrivals], list[GenerationResult]]:
        k = task.num_speculative_tokens
        params = SamplingParams(
            max_new_tokens=task.max_new_tokens,
            ignore_eos=True,
            num_speculative_tokens="auto" if k is None else k,
        )
        arrivals = [Arrivals() for _ in prompts]
        results: dict[int, GenerationResult] = {}
        for event in self._engine.stream(prompts, params):
            arrivals[event.index].add(len(event.token_ids))
            if event.result is not None:
                results[event.index] = event.result
        if errors := [result.outputs[0].error for result in results.values() if result.outputs[0].error]:
            raise SpecEngineError(errors[0])
        return arrivals, [results[index] for index in range(len(prompts))]


def compute_dtype(weight_dtype: str) -> str:
    """What is computed in around weights of such a format; "auto" stays."""
    format = WEIGHT_FORMATS.get(weight_dtype)
    return "bfloat16" if format is not None and format.has_scales else weight_dtype


def counts(results: Sequence[GenerationResult]) -> Counts:
    every = [result.metrics.speculative_decoding for result in results]
    return Counts(
        num_rounds=sum(each.num_rounds for each in every),
        num_drafted=sum(each.num_draft_tokens for each in every),
        num_accepted=sum(each.num_accepted_draft_tokens for each in every),
    )


def load(setup: Setup) -> Ours:
    return Ours(setup)
