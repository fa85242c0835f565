"""What a caller may ask for: `SamplingParams` for a request, `EngineConfig` for an engine.

Both are frozen, refuse unknown names, and check every value when they are built, before anything is allocated.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from specengine.weight_formats import FLOAT_NAMES, WEIGHT_FORMATS

AUTO: Literal["auto"] = "auto"
# What "auto" means until k is chosen from measured cost: a constant that pays for the bundled pair.
AUTO_NUM_SPECULATIVE_TOKENS = 4
MAX_NUM_SPECULATIVE_TOKENS = 64
MAX_NUM_SAMPLES = 64
MAX_NUM_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 256
MAX_NUM_LOGPROBS = 20
MAX_NEW_TOKENS = 2**31 - 1
MAX_ROUNDS_AHEAD = 4
MIN_TEMPERATURE = 1e-4
MAX_LOGIT_BIAS = 1e4
ACCEPTANCE_MODES = ("auto", "coupled", "rejection")
LATER_ACCEPTANCE_MODES = ("block", "typical", "threshold")
DTYPE_NAMES = (AUTO, *FLOAT_NAMES)
WEIGHT_DTYPE_NAMES = (AUTO, *WEIGHT_FORMATS)
BACKEND_NAMES = ("auto", "native", "triton", "reference")


def check_int(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int in [low, high]; TypeError or ValueError naming parameter and value otherwise."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {number}")
    return number


def check_number(name: str, value: object, low: float, high: float) -> float:
    """`value` as a finite float in [low, high]; TypeError or ValueError naming parameter and value otherwise."""
    if isinstance(value, bool | str | bytes):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        raise ValueError(f"{name} must be finite, got {value!r}") from None
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value!r}")
    if not low <= number <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got {number:g}")
    return number


def check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    return str(value)


def check_num_speculative_tokens(value: object) -> int | Literal["auto"]:
    if isinstance(value, str):
        if value != AUTO:
            raise ValueError(f"num_speculative_tokens must be an integer or 'auto', got {value!r}")
        return AUTO
    return check_int("num_speculative_tokens", value, 0, MAX_NUM_SPECULATIVE_TOKENS)


def check_acceptance(value: object) -> str:
    if value in LATER_ACCEPTANCE_MODES:
        raise ValueError(
            f"acceptance={value!r} is not available in this version; use 'rejection' or 'coupled' (both lossless)"
        )
    return check_choice("acceptance", value, ACCEPTANCE_MODES)


def _check_stop_strings(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, Iterable):
        raise TypeError(f"stop must be a string or a list of strings, got {value!r}")
    strings = (value,) if isinstance(value, str) else tuple(value)
    if len(strings) > MAX_NUM_STOP_STRINGS:
        raise ValueError(f"stop must hold at most {MAX_NUM_STOP_STRINGS} strings, got {len(strings)}")
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"stop must hold strings, got {string!r}")
        if not 0 < len(string) <= MAX_STOP_STRING_LENGTH:
            raise ValueError(
                f"stop strings must have 1 to {MAX_STOP_STRING_LENGTH} characters, got one of {len(string)}"
            )
    return strings


def _check_token_ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, Sequence | set | frozenset) else (value,)
    return tuple(sorted({check_int(name, token_id, 0, 2**31 - 1) for token_id in ids}))


def _check_logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, Mapping | tuple):
        raise TypeError(f"logit_bias must map token ids to numbers, got {value!r}")
    items = value.items() if isinstance(value, Mapping) else value
    return tuple(
        (
            check_int("logit_bias token id", token_id, 0, 2**31 - 1),
            check_number(f"logit_bias[{token_id}]", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS),
        )
        for token_id, bias in items
    )


def _refuse_unless_default(name: str, value: object, default: object) -> None:
    if isinstance(value, int | float) and isinstance(default, float):
        check_number(name, value, -1e9, 1e9)
    if value != default:
        raise ValueError(f"{name}={value!r} is not available in this version; leave it at {default!r}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one prompt is continued.

    max_new_tokens:         1 … 2**31 - 1, cut to what the context leaves; 0 with `prompt_logprobs`: scores the prompt
    min_new_tokens:         end-of-text, stop ids and stop strings cannot end the output before this many tokens
    temperature:            0 = greedy; else at least 1e-4
    top_k, top_p, min_p:    filters in this order after the temperature; 0, 1.0 and 0.0 turn them off
    logit_bias:             {token id: number added to its logit, within ±10,000}
    seed:                   0 … 2**64 - 1; None draws one and reports it
    stop:                   up to 16 strings of up to 256 characters; the text ends before the first that occurs
    stop_token_ids:         ids that end the output, kept in `token_ids`
    include_stop_str_in_output: keep the stop string in `text`
    ignore_eos:             do not stop at the model's end-of-text token
    logprobs:               None, or 0 … 20: log-probability of each token, and of that many most likely ones
    prompt_logprobs:        the same for the prompt's tokens (the first has none)
    n:                      1 … 64 independent samples; sample j > 0 derives its key from (seed, j)
    num_speculative_tokens: 0 … 64 draft tokens a round, or "auto" (a constant 4 in this version; 0 without a draft)
    acceptance:             "coupled": the text depends on the seed only, whatever drafts; "rejection": exact in
                            distribution, accepts the most; "auto": coupled if a seed is given, else rejection
    repetition_penalty, presence_penalty, frequency_penalty, logits_processor: not available in this version
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Any = None
    logits_processor: Callable[..., Any] | None = None
    seed: int | None = None
    stop: Any = None
    stop_token_ids: Any = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    num_speculative_tokens: int | str = AUTO
    acceptance: str = AUTO

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        # Nothing but the prompt's log-probabilities may be all that is wanted.
        fewest = 1 if self.prompt_logprobs is None else 0
        put("max_new_tokens", check_int("max_new_tokens", self.max_new_tokens, fewest, MAX_NEW_TOKENS))
        put("min_new_tokens", check_int("min_new_tokens", self.min_new_tokens, 0, MAX_NEW_TOKENS))
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} must not exceed max_new_tokens={self.max_new_tokens}"
            )
        put("temperature", check_number("temperature", self.temperature, 0.0, 1e4))
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"temperature must be 0 or at least {MIN_TEMPERATURE:g}, got {self.temperature:g}"
            )
        put("top_k", check_int("top_k", self.top_k, 0, 2**31 - 1))
        put("top_p", check_number("top_p", self.top_p, 0.0, 1.0))
        if self.top_p == 0.0:
            raise ValueError("top_p must be above 0 (1.0 turns it off), got 0")
        put("min_p", check_number("min_p", self.min_p, 0.0, 1.0))
        _refuse_unless_default("repetition_penalty", self.repetition_penalty, 1.0)
        _refuse_unless_default("presence_penalty", self.presence_penalty, 0.0)
        _refuse_unless_default("frequency_penalty", self.frequency_penalty, 0.0)
        _refuse_unless_default("logits_processor", self.logits_processor, None)
        put("logit_bias", _check_logit_bias(self.logit_bias))
        if self.seed is not None:
            put("seed", check_int("seed", self.seed, 0, 2**64 - 1))
        put("stop", _check_stop_strings(self.stop))
        put("stop_token_ids", _check_token_ids("stop_token_ids", self.stop_token_ids))
        check_bool("include_stop_str_in_output", self.include_stop_str_in_output)
        check_bool("ignore_eos", self.ignore_eos)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                put(name, check_int(name, value, 0, MAX_NUM_LOGPROBS))
        put("n", check_int("n", self.n, 1, MAX_NUM_SAMPLES))
        put("num_speculative_tokens", check_num_speculative_tokens(self.num_speculative_tokens))
        put("acceptance", check_acceptance(self.acceptance))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_filters(self) -> bool:
        """Whether top-k, top-p or min-p keep some tokens from being drawn."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)

    @property
    def rule(self) -> str:
        """The rule that drafts are judged by, "match" or "rejection" (greedy decoding is a match in every mode)."""
        is_matched = self.acceptance == "coupled" or (self.acceptance == AUTO and self.seed is not None)
        if self.is_greedy or is_matched:
            return "match"
        return "rejection" if self.acceptance == AUTO else self.acceptance


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine is built.

    device:             "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1" …
    dtype:              "auto", "float32", "bfloat16" or "float16": of the weights, unless the next two say otherwise
    weight_dtype, draft_weight_dtype: storage of the target's and the draft's weights; besides those, "int8":
                        linear layers rounded to 8 bits with a scale per output channel, the rest in `dtype`. An int8
                        draft changes speed only; an int8 target is another model, a little worse
    kv_dtype:           storage of keys and values; "auto" = the weights' dtype (`dtype`, where they are int8)
    backend:            "auto" (native on a CPU, Triton on CUDA), "native", "triton", "reference"
    block_size:         tokens a KV block holds
    num_blocks | kv_cache_bytes: size of the KV cache; by default as much as max_batch_size sequences of
                        max_seq_len can use, at most 4 GiB on a CPU, half of the free memory on a GPU
    max_batch_size:     sequences that run at the same time
    max_seq_len:        prompt and new tokens of one sequence; by default the target's context
    prefill_chunk_size: prompt tokens computed in one step
    num_threads:        CPU threads. The native backend's are the engine's own; by default SPECENGINE_NUM_THREADS, else
                        OMP_NUM_THREADS, else as many as affinity and the container's CPU quota allow. For the other
                        backends it is PyTorch's setting (`torch.set_num_threads`), of the whole process
    enable_prefix_cache: share the KV blocks of equal prompt prefixes
    cuda_graphs:        "auto": on CUDA a round is recorded as a CUDA graph when its kind first runs; True: the usual
                        kinds are recorded at the start, and what cannot be recorded is an error; False: never. Rounds
                        with `logit_bias` or `min_new_tokens` run without
    rounds_ahead:       0 … 4 rounds that are queued before the results of earlier ones are read; "auto": one on CUDA,
                        none on a CPU. Log-probabilities, biases and, where it drafts, a Drafter object make it 0
    forced_acceptance:  for timing only: each draft token is accepted with this probability whatever the target says.
                        THE OUTPUT IS NOT THE MODEL'S (`lossless` is False in the result). None: off
    deterministic:      True; nothing else is available in this version
    allow_pickle:       also read `pytorch_model.bin` (with `weights_only=True`)
    revision:           branch, tag or commit, for names on the Hub
    tokenizer:          instead of the target's own: a directory, a tokenizer.json, a name on the Hub, or a tokenizer
                        object of `transformers` or `tokenizers`
    """

    device: str = "auto"
    dtype: str = "auto"
    weight_dtype: str = "auto"
    draft_weight_dtype: str = "auto"
    kv_dtype: str = "auto"
    backend: str = "auto"
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_bytes: int | None = None
    max_batch_size: int = 32
    max_seq_len: int | None = None
    prefill_chunk_size: int = 512
    num_threads: int | None = None
    enable_prefix_cache: bool = True
    cuda_graphs: bool | str = AUTO
    rounds_ahead: int | str = AUTO
    forced_acceptance: float | None = None
    deterministic: bool = True
    allow_pickle: bool = False
    revision: str | None = None
    tokenizer: Any = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("dtype", DTYPE_NAMES),
            ("weight_dtype", WEIGHT_DTYPE_NAMES),
            ("draft_weight_dtype", WEIGHT_DTYPE_NAMES),
            ("kv_dtype", DTYPE_NAMES),
        ):
            object.__setattr__(self, name, check_dtype_name(name, getattr(self, name), choices))
        check_choice("backend", self.backend, BACKEND_NAMES)
        check_int("block_size", self.block_size, 1, 1024)
        check_int("max_batch_size", self.max_batch_size, 1, 4096)
        check_int("prefill_chunk_size", self.prefill_chunk_size, 1, 2**20)
        for name, high in (
            ("num_blocks", 2**31 - 1),
            ("kv_cache_bytes", 2**50),
            ("max_seq_len", 2**31 - 1),
            ("num_threads", 1024),
        ):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1, high)
        if self.num_blocks is not None and self.kv_cache_bytes is not None:
            raise ValueError(
                f"num_blocks={self.num_blocks} and kv_cache_bytes={self.kv_cache_bytes} both size the KV cache: "
                "give one of them"
            )
        if self.tokenizer == "":
            raise ValueError("tokenizer must be a directory, a file, a name or a tokenizer, got ''")
        for name in ("enable_prefix_cache", "deterministic", "allow_pickle"):
            check_bool(name, getattr(self, name))
        if self.cuda_graphs != AUTO and not isinstance(self.cuda_graphs, bool):
            raise ValueError(f"cuda_graphs must be 'auto', True or False; got {self.cuda_graphs!r}")
        if self.rounds_ahead != AUTO:
            check_int("rounds_ahead", self.rounds_ahead, 0, MAX_ROUNDS_AHEAD)
        if self.forced_acceptance is not None:
            check_number("forced_acceptance", self.forced_acceptance, 0.0, 1.0)
        if not self.deterministic:
            raise ValueError("deterministic=False is not available in this version; leave it at True")


def check_dtype_name(name: str, value: object, choices: Sequence[str]) -> str:
    """The canonical name of a dtype given as a name or a `torch.dtype`."""
    text = str(value).removeprefix("torch.")
    text = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}.get(text, text)
    if text == "int8" and text not in choices:
        raise ValueError(
            f"{name}='int8' is for weight_dtype and draft_weight_dtype; {name} has {', '.join(choices)}"
        )
    return check_choice(name, text, choices)


def field_names(cls: type) -> tuple[str, ...]:
    """The public field names of a configuration class."""
    return tuple(item.name for item in fields(cls))
