"""llama.cpp's contexts: plain, and with a second model that drafts."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from llama_cpp import Llama, llama_print_system_info
from llama_cpp.llama_speculative import LlamaDraftModel
from numpy.typing import NDArray

from generation.peers.gguf_pair import TYPE_NAMES, gguf_path
from generation.protocol import Answer, Arrivals, Counts, Setup, Task, UnavailableError, answer_one_by_one

GREEDY = {"temp": 0.0, "repeat_penalty": 1.0}


def load_model(path: Path, setup: Setup, draft: LlamaDraftModel | None = None) -> Llama:
    return Llama(
        str(path),
        n_ctx=setup.max_seq_len,
        n_batch=setup.max_seq_len,
        n_threads=setup.num_threads,
        n_threads_batch=setup.num_threads,
        flash_attn=True,  # llama.cpp's own default, and the faster one here; the package turns it off
        draft_model=draft,
        verbose=False,
    )


def instructions() -> str:
    """What it was built to use."""
    parts = llama_print_system_info().decode().split("|")
    return " ".join(part.partition("=")[0].split(":")[-1].strip() for part in parts if "= 1" in part)


class GreedyDraft(LlamaDraftModel):
    """Drafts with a `Llama`, whose cache keeps what the last round and this one have in common."""

    def __init__(self, model: Llama) -> None:
        self._model = model
        self.start(num_tokens=0, max_len=0)

    def start(self, *, num_tokens: int, max_len: int) -> None:
        """A new prompt: draft `num_tokens` a round, but no more than `max_len` tokens in all leave room for."""
        self._num_tokens, self._max_len = num_tokens, max_len
        self._model.reset()
        self.num_rounds = self.num_drafted = 0

    def __call__(self, input_ids: NDArray[np.intc], /, **kwargs: object) -> NDArray[np.intc]:
        self.num_rounds += 1
        wanted = min(self._num_tokens, self._max_len - len(input_ids) - 1)
        tokens = self._model.generate(input_ids.tolist(), **GREEDY)
        drafted = list(itertools.islice(tokens, max(0, wanted)))
        self.num_drafted += len(drafted)
        return np.array(drafted, dtype=np.intc)


class LlamaCpp:
    """Two contexts over the same mapped weights: with a draft the package keeps the logits of every position."""

    def __init__(self, setup: Setup) -> None:
        path = gguf_path(setup.target, setup.dtype, setup.cache)
        self._plain = load_model(path, setup)
        self._draft: GreedyDraft | None = None
        stored = TYPE_NAMES.get(setup.dtype, "as stored")
        self.instruction_set = instructions()
        self.settings = f"{stored}, {setup.build} build, flash attention, keys and values in f16"
        if setup.speculates:
            self._draft = GreedyDraft(
                load_model(gguf_path(setup.draft, setup.draft_dtype, setup.cache), setup)
            )
            self._speculative = load_model(path, setup, self._draft)
            self.settings += f", draft {TYPE_NAMES[setup.draft_dtype]}"

    def generate(self, task: Task) -> Answer:
        return answer_one_by_one(task, lambda prompt: self._generate_one(prompt, task))

    def _generate_one(self, prompt: list[int], task: Task) -> tuple[list[int], Arrivals, Counts | None]:
        if task.num_speculative_tokens == 0:
            return *generate(self._plain, prompt, task.max_new_tokens), None
        if task.num_speculative_tokens is None:
            raise UnavailableError("llama-cpp-python does not choose how much to draft")
        assert self._draft is not None, "the setup speculates"
        self._draft.start(num_tokens=task.num_speculative_tokens, max_len=len(prompt) + task.max_new_tokens)
        tokens, arrivals = generate(self._speculative, prompt, task.max_new_tokens)
        num_rounds = self._draft.num_rounds
        accepted = len(tokens) - 1 - num_rounds
        return tokens, arrivals, Counts(num_rounds, self._draft.num_drafted, accepted)


def generate(model: Llama, prompt: list[int], max_new_tokens: int) -> tuple[list[int], Arrivals]:
    """Without what the model's cache has of an earlier prompt."""
    model.reset()
    arrivals, tokens = Arrivals(), []
    for token in itertools.islice(model.generate(prompt, **GREEDY), max_new_tokens):
        arrivals.add(1)
        tokens.append(token)
    return tokens, arrivals
