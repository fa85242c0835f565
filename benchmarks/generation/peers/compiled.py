"""`transformers` with a static cache, the decode step compiled by inductor into a CUDA graph: plain decoding as fast as
PyTorch makes it by itself.

Tokens stay on the device: the host waits for the first and for the last, never between. Elsewhere than on CUDA there
are no graphs, and nothing is compiled to machine code: the step is traced in one piece and run as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel, StaticCache

from generation.peers.huggingface import DTYPES, instruction_set, load_model
from generation.protocol import (
    Answer,
    Arrivals,
    Setup,
    Task,
    UnavailableError,
    answer_at_once,
    answer_one_by_one,
)

DISTRIBUTIONS = ("transformers", "torch")


def prepare(setup: Setup) -> None:
    """Nothing: the checkpoint is read as it is."""


@dataclass(frozen=True)
class Step:
    """One token more of every sequence: `[B, 1]` ids to `[B, 1]` ids, for one cache."""

    model: PreTrainedModel
    cache: StaticCache

    def __call__(self, tokens: Tensor) -> Tensor:
        given = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        return self.model(input_ids=tokens, **given).logits[:, -1].argmax(dim=-1, keepdim=True)


class Compiled:
    """A cache and a compiled step for each batch size and length: a graph's shapes are fixed, and attention reads
    the whole cache."""

    def __init__(self, setup: Setup) -> None:
        if setup.dtype not in DTYPES:
            raise UnavailableError(f"not measured in {setup.dtype}")
        self._device = torch.device(setup.device)
        torch.set_num_threads(setup.num_threads)
        self.instruction_set = instruction_set(self._device)
        self._model = load_model(setup.target, setup.dtype, self._device)
        self._steps: dict[tuple[int, int], tuple[Step, Step]] = {}
        how = "mode='reduce-overhead'" if self._device.type == "cuda" else "backend='eager'"
        self.settings = f"static cache, sdpa attention, torch.compile({how}, fullgraph=True)"

    def generate(self, task: Task) -> Answer:
        if task.num_speculative_tokens != 0:
            raise UnavailableError("plain decoding only")
        if task.is_batch:
            return answer_at_once(*self._generate(task.prompts, task))
        return answer_one_by_one(task, lambda prompt: self._generate_one(prompt, task))

    def _generate_one(self, prompt: list[int], task: Task) -> tuple[list[int], Arrivals, None]:
        tokens, arrivals = self._generate([prompt], task)
        return tokens[0], arrivals, None

    # Not inference mode: the cache is written in place by compiled code.
    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], task: Task) -> tuple[list[list[int]], Arrivals]:
        arrivals = Arrivals()
        ids = torch.tensor(prompts, device=self._device)
        step, fast = self._step(len(prompts), ids.shape[1] + task.max_new_tokens)
        step.cache.reset()
        tokens = step(ids)
        found = [tokens]
        self._wait()
        arrivals.add(len(prompts))
        if task.max_new_tokens > 1:
            for _ in range(task.max_new_tokens - 1):
                torch.compiler.cudagraph_mark_step_begin()
                tokens = fast(tokens).clone()  # the graph's own output is overwritten by its next replay
                found.append(tokens)
            self._wait()
            arrivals.add(len(prompts) * (task.max_new_tokens - 1))
        self._check_graphs()
        return torch.cat(found, dim=1).tolist(), arrivals

    def _step(self, batch_size: int, length: int) -> tuple[Step, Step]:
        """The step as it is, for the prompt, and compiled."""
        key = (batch_size, length)
        if key not in self._steps:
            torch.compiler.reset()  # what was compiled for another cache would be looked at first, every time
            self._steps.clear()
            step = Step(self._model, StaticCache(config=self._model.config, max_cache_len=length))
            if self._device.type == "cuda":
                fast = torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)
            else:
                fast = torch.compile(step, backend="eager", fullgraph=True, dynamic=False)
            self._steps[key] = (step, fast)
        return self._steps[key]

    def _check_graphs(self) -> None:
        skipped = counters["inductor"]["cudagraph_skips"]
        if skipped and self._device.type == "cuda":
            raise UnavailableError(f"inductor left {skipped} graphs out: no CUDA graph, no baseline")

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def load(setup: Setup) -> Compiled:
    return Compiled(setup)
