"""`transformers` as something to measure: its `generate`, and its assisted generation.

Target and assistant are loaded in one dtype, on one device, with as many threads as the engine has. The settings are
those of the request; how much is drafted is the request's k, and its own default where that is "auto".
"""

from __future__ import annotations

import importlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from specengine.config import SamplingParams
from specengine.drafters import ngram, registry
from specengine.engine import Engine
from specengine.errors import SpecEngineError
from specengine.measure.profile import Peaks
from specengine.measure.runs import Shares, describe_pair, describe_settings
from specengine.ops.threads import default_num_threads
from specengine.outputs import GenerationMetrics, SpeculativeDecodingMetrics
from specengine.prompt import Prompt

NAME = "transformers"


def require() -> None:
    """Raises `SpecEngineError` where `transformers` is not installed."""
    try:
        _library()
    except ImportError:
        raise SpecEngineError(
            "bench compare needs transformers, which is not installed: pip install transformers"
        ) from None


def _library() -> Any:
    """An optional one, whose types say less than it does."""
    return importlib.import_module("transformers")


class Clock:
    """A streamer: notes when the first new token came. What `generate` hands over first is the prompt."""

    def __init__(self) -> None:
        self.first: float | None = None
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt and self.first is None:
            self.first = time.perf_counter()
        self._has_prompt = True

    def end(self) -> None:
        pass


@dataclass(eq=False)
class Rival:
    """Loaded models. forwards: of the "target" and of the "draft", counted since it was cleared.

    tokenizers: of target and draft where they differ, as `generate` takes them
    """

    target: Any
    draft: Any = None
    is_lookup: bool = False
    tokenizers: dict[str, Any] = field(default_factory=dict)
    forwards: Counter[str] = field(default_factory=Counter)
    warm: set[int | str] = field(default_factory=set)  # ks

    @property
    def drafts(self) -> bool:
        return self.draft is not None or self.is_lookup

    def __post_init__(self) -> None:
        for name, model in (("target", self.target), ("draft", self.draft)):
            if model is not None:
                model.register_forward_hook(self._counter(name))

    def _counter(self, name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            self.forwards[name] += 1

        return count


def explain_no_drafts(draft_model: Any) -> str | None:
    """Why `transformers` cannot draft as the engine does; None where it can."""
    if isinstance(draft_model, tuple):
        return f"transformers has no list of drafters: nothing there compares with {'+'.join(map(str, draft_model))}"
    if registry.names_a_drafter(draft_model) and not _is_lookup(draft_model):
        return f"transformers has nothing that drafts as {draft_model} does"
    return None


def _is_lookup(draft_model: Any) -> bool:
    return registry.names_a_drafter(draft_model) and registry.is_named(draft_model, ngram)


@contextmanager
def load_rival(engine: Engine, model: Any, draft_model: Any) -> Iterator[Rival]:
    """The models that an engine was built of, for `transformers`; quietly, and with the engine's number of threads
    while the block runs.

    draft_model: one that `explain_no_drafts` has nothing to say of, or None
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(engine.config.num_threads or default_num_threads())
    is_lookup = _is_lookup(draft_model)
    try:
        with _quiet():
            target = _load(engine, model)
            draft = None if draft_model is None or is_lookup else _load(engine, draft_model)
            tokenizers = {} if draft is None else _tokenizers(engine, model, draft_model)
            yield Rival(target, draft, is_lookup, tokenizers)
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stderr: no progress bars, no warnings about settings that are meant."""
    logging = _library().utils.logging
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def _load(engine: Engine, model: Any) -> Any:
    library = _library()
    dtype = getattr(torch, describe_pair(engine)["dtype"])
    loaded = library.AutoModelForCausalLM.from_pretrained(
        os.fspath(model), dtype=dtype, revision=engine.config.revision or "main"
    )
    loaded.to(engine.device).eval()
    loaded.generation_config = library.GenerationConfig()  # the request's settings only
    return loaded


def _tokenizers(engine: Engine, model: Any, draft_model: Any) -> dict[str, Any]:
    revision = engine.config.revision or "main"
    own, other = (
        _library().AutoTokenizer.from_pretrained(os.fspath(each), revision=revision)
        for each in (model, draft_model)
    )
    same = own.get_vocab() == other.get_vocab()
    return {} if same else {"tokenizer": own, "assistant_tokenizer": other}


@dataclass(frozen=True, eq=False)
class RivalCase:
    """A `runs.Case`: `transformers` continuing one prompt. engine: whose settings it has."""

    rival: Rival
    engine: Engine
    params: SamplingParams
    eos_token_ids: Sequence[int]
    batch_size: int = 1

    @property
    def name(self) -> str:
        k = self.params.num_speculative_tokens
        return NAME if k == 0 else f"{NAME}, k = {k}"

    @property
    def pair(self) -> dict[str, Any]:
        return {**describe_pair(self.engine), "backend": NAME}

    @property
    def settings(self) -> dict[str, Any]:
        return describe_settings(self.engine, self.params, batch_size=1)

    def warm_up(self, prompts: Sequence[Prompt]) -> Shares | None:
        """Once: it keeps nothing from prompt to prompt."""
        if (k := self.params.num_speculative_tokens) not in self.rival.warm:
            self.measure(prompts)
            self.rival.warm.add(k)
        return None

    def measure(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        (prompt,) = prompts
        assert not isinstance(prompt, str), "both sides get token ids"
        peaks, clock, rival = Peaks(self.engine.device), Clock(), self.rival
        rival.forwards.clear()
        ids = torch.tensor([list(prompt)], device=self.engine.device)
        options = self._options()
        if self.params.seed is not None:
            torch.manual_seed(self.params.seed)
        began = time.perf_counter()
        try:
            output = rival.target.generate(
                ids, attention_mask=torch.ones_like(ids), streamer=clock, **options
            )
        except Exception as error:  # another library's: whatever it is, it is told
            raise SpecEngineError(f"{self.name}: {type(error).__name__}: {error}") from error
        token_ids = output[0, ids.shape[1] :].tolist()  # waits for the device
        seconds = time.perf_counter() - began
        first = seconds if clock.first is None else clock.first - began
        metrics = self._metrics(len(prompt), len(token_ids), seconds, first)
        return {
            "seconds": seconds,
            "time_to_first_token": first,
            "tokens": len(token_ids),
            "tokens_per_second": metrics.tokens_per_second,
            "target_forwards": metrics.num_target_forwards,
            "lossless": True,
            "metrics": metrics.to_dict(),
            "peak_bytes": peaks.read()[0],
            "token_ids": [token_ids],
        }

    def _options(self) -> dict[str, Any]:
        """What `generate` is given."""
        build_config = _library().GenerationConfig
        params, k = self.params, self.params.num_speculative_tokens
        asked: dict[str, Any] = {
            "max_new_tokens": params.max_new_tokens,
            "do_sample": not params.is_greedy,
            "repetition_penalty": params.repetition_penalty,
            "eos_token_id": None if params.ignore_eos else list(self.eos_token_ids) or None,
            "pad_token_id": 0,
        }
        if not params.is_greedy:
            asked.update(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p)
            asked.update({"min_p": params.min_p} if params.min_p else {})
        if k != 0 and self.rival.is_lookup:
            asked["prompt_lookup_num_tokens"] = 10 if k == "auto" else k  # 10: of its documentation
        config = build_config(**asked)
        if k == 0 or self.rival.is_lookup:
            return {"generation_config": config}
        # `generate` reads from the assistant's own config how much it drafts.
        fixed = {} if k == "auto" else {"num_assistant_tokens": k, "assistant_confidence_threshold": 0.0}
        schedule = {} if k == "auto" else {"num_assistant_tokens_schedule": "constant"}
        self.rival.draft.generation_config = build_config(**fixed, **schedule)
        return {"generation_config": config, "assistant_model": self.rival.draft, **self.rival.tokenizers}

    def _metrics(self, prompt: int, tokens: int, seconds: float, first: float) -> GenerationMetrics:
        """As far as it can be seen from outside. When it drafts, the prompt's forward judges drafts, too, and every
        forward of the draft model drafts a token; how much a lookup drafts is not seen."""
        is_plain, forwards = self.params.num_speculative_tokens == 0, self.rival.forwards
        speculation = SpeculativeDecodingMetrics(
            num_rounds=forwards["target"] - is_plain,
            num_draft_tokens=forwards["draft"],
            num_accepted_draft_tokens=0 if is_plain else max(0, tokens - forwards["target"]),
        )
        return GenerationMetrics(
            num_prompt_tokens=prompt,
            num_generated_tokens=tokens,
            num_target_forwards=forwards["target"],
            prompt_time=first,
            decode_time=seconds - first,
            total_time=seconds,
            speculative_decoding=speculation,
        )
