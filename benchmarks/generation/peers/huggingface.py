"""`transformers`: `generate`, and assisted generation with the draft as `assistant_model`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from generation.protocol import (
    Answer,
    Arrivals,
    Counts,
    Setup,
    Task,
    UnavailableError,
    answer_at_once,
    answer_one_by_one,
)

DISTRIBUTIONS = ("transformers", "torch")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def prepare(setup: Setup) -> None:
    """Nothing: the checkpoint is read as it is."""


class TokenClock(BaseStreamer):
    """Notes when tokens come, and tells when the first did; `generate` hands the prompt over before."""

    def __init__(self, on_first: Callable[[], None]) -> None:
        self.arrivals = Arrivals()
        self._has_prompt = False
        self._on_first = on_first

    def put(self, value: torch.Tensor) -> None:
        if not self._has_prompt:
            self._has_prompt = True
            return
        if not self.arrivals.times:
            self._on_first()
        self.arrivals.add(value.numel())

    def end(self) -> None:
        """Nothing is buffered."""


class HuggingFace:
    """Target and assistant in the same dtype; the settings of `generate` are its own."""

    settings = "eager, sdpa attention, assistant in the target's dtype"

    def __init__(self, setup: Setup) -> None:
        if setup.dtype not in DTYPES:
            raise UnavailableError(f"transformers has no {setup.dtype} weights for CPUs of its own")
        torch.set_num_threads(setup.num_threads)
        self._device = torch.device(setup.device)
        self.instruction_set = instruction_set(self._device)
        self._target = load_model(setup.target, setup.dtype, self._device)
        self._draft = load_model(setup.draft, setup.dtype, self._device) if setup.speculates else None
        self._num_forwards: dict[str, int] = {}
        self._count_forwards("target", self._target)
        if self._draft is not None:
            self._count_forwards("draft", self._draft)

    def _count_forwards(self, name: str, model: PreTrainedModel) -> None:
        def count(*_: Any) -> None:
            self._num_forwards[name] = self._num_forwards.get(name, 0) + 1

        model.register_forward_hook(count)

    def generate(self, task: Task) -> Answer:
        if task.is_batch:
            return self._generate_batch(task)
        return answer_one_by_one(task, lambda prompt: self._generate_one(prompt, task))

    def _generate_batch(self, task: Task) -> Answer:
        if task.num_speculative_tokens != 0:
            raise UnavailableError("assisted generation takes one prompt at a time")
        tokens, arrivals, _ = self._generate(task.prompts, task)
        return answer_at_once(tokens, arrivals)

    def _generate_one(self, prompt: list[int], task: Task) -> tuple[list[int], Arrivals, Counts | None]:
        tokens, arrivals, counts = self._generate([prompt], task)
        return tokens[0], arrivals, counts

    @torch.inference_mode()
    def _generate(
        self, prompts: list[list[int]], task: Task
    ) -> tuple[list[list[int]], Arrivals, Counts | None]:
        """Prompts of one length."""
        ids = torch.tensor(prompts, device=self._device)
        is_plain = task.num_speculative_tokens == 0
        clock = TokenClock(on_first=self._num_forwards.clear)
        output = self._target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=task.max_new_tokens,
            streamer=clock,
            **({} if is_plain else {"assistant_model": self._assistant(task.num_speculative_tokens)}),
        )
        tokens = output[:, ids.shape[1] :].tolist()
        return tokens, clock.arrivals, None if is_plain else self._counts(clock.arrivals)

    def _assistant(self, num_tokens: int | None) -> PreTrainedModel:
        """The draft; `generate` reads from its generation config how much it drafts, None = by default."""
        assert self._draft is not None, "the setup speculates"
        config = self._draft.generation_config
        config.num_assistant_tokens = num_tokens
        config.num_assistant_tokens_schedule = None if num_tokens is None else "constant"
        config.assistant_confidence_threshold = None if num_tokens is None else 0.0
        return self._draft

    def _counts(self, arrivals: Arrivals) -> Counts:
        """Each forward of the draft drafts one token."""
        return Counts(
            num_rounds=self._num_forwards.get("target", 0),
            num_drafted=self._num_forwards.get("draft", 0),
            num_accepted=sum(count - 1 for count in arrivals.counts[1:]),
        )


def instruction_set(device: torch.device) -> str:
    """PyTorch's own kernels'; its libraries choose by themselves, from what the processor has."""
    return torch.backends.cpu.get_cpu_capability().lower() if device.type == "cpu" else device.type


def load_model(directory: str, dtype: str, device: torch.device) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype], local_files_only=True)
    model.to(device).eval()
    model.generation_config.eos_token_id = None  # every token counts, end-of-text is one like another
    model.generation_config.pad_token_id = 0
    return model


def load(setup: Setup) -> HuggingFace:
    return HuggingFace(setup)
