"""What a caller may ask for: `SamplingParams` for a request, `EngineConfig` for an engine.

An option is declared once, as a field here: name, type, default, range and help. From the fields come the checks, the
docstrings' tables, the signatures of `generate`, `stream` and `Engine`, and the options of every command. After a
change, tools/option_types.py (which `make format` runs) writes what editors and type checkers read.

Both classes are frozen, refuse unknown names, and check every value when they are built, before anything is allocated.
"""

from __future__ import annotations

import textwrap
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar, cast

from specengine.kinds import (
    AUTO,
    BadWords,
    Choice,
    DeviceName,
    Drafting,
    DtypeName,
    FilePath,
    Flag,
    FlagOrAuto,
    Functions,
    Integer,
    IntegerOrAuto,
    Kind,
    LogitBias,
    Model,
    Number,
    Repeated,
    StopStrings,
    Text,
    TokenIds,
    Unavailable,
)
from specengine.weight_formats import FLOAT_NAMES, WEIGHT_FORMATS

# What "auto" begins with, before a round was measured.
AUTO_NUM_SPECULATIVE_TOKENS = 4
MAX_NUM_SPECULATIVE_TOKENS = 64
MAX_NUM_SAMPLES = 64
MAX_NUM_LOGPROBS = 20
MAX_NEW_TOKENS = 2**31 - 1
MAX_ROUNDS_AHEAD = 4
MIN_TEMPERATURE = 1e-4
MAX_PENALTY = 100.0
DTYPE_NAMES = (AUTO, *FLOAT_NAMES)
BACKEND_NAMES = (AUTO, "native", "triton", "reference")
WEIGHT_DTYPE_NAMES = (AUTO, *WEIGHT_FORMATS)

Options = TypeVar("Options", bound=type)


@dataclass(frozen=True)
class Option:
    """What is known of a field besides its name, type and default.

    kind:    which values there are
    help:    one line, for help pages
    details: what the docstring says beyond it
    flags:   more spellings on the command line, besides the name's own
    aliases: other words for the name, as users of other libraries type them
    """

    kind: Kind
    help: str
    details: str = ""
    flags: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


def option(
    default: object,
    kind: Kind,
    help: str,
    details: str = "",
    *,
    flags: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
) -> Any:
    """A field of an options class. A default of None allows None."""
    return field(default=default, metadata={"option": Option(kind, help, details, flags, aliases)})


def declaration(item: Field[Any]) -> Option:
    """The `Option` of a field."""
    return cast(Option, item.metadata["option"])


def field_names(cls: type) -> tuple[str, ...]:
    """The field names of an options class."""
    return tuple(item.name for item in fields(cls))


def _checked(options: Any) -> None:
    """Puts every field into its one form; `TypeError` or `ValueError` for what cannot be."""
    for item in fields(options):
        value, kind = getattr(options, item.name), declaration(item).kind
        if value is not None or item.default is not None or isinstance(kind, Repeated):
            object.__setattr__(options, item.name, kind.check(item.name, value))


def _described(cls: Options) -> Options:
    """Appends a table of the fields to the docstring."""
    lines = [(cls.__doc__ or "").rstrip(), ""]
    for item in fields(cls):
        about = declaration(item)
        text = "; ".join(part for part in (about.help, about.details) if part)
        text += f" ({about.kind.range})" if about.kind.range else ""
        lines.append(
            textwrap.fill(text, 110, initial_indent=f"{f'{item.name}:':<20} ", subsequent_indent=" " * 21)
        )
    cls.__doc__ = "\n".join(lines)
    return cls


@_described
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What generates."""

    model: Any = option(
        None,
        Model(),
        "the target: a directory, a .gguf file or a name on the Hub; by default the bundled pair",
        "or a `transformers` model",
    )
    draft_model: Any = option(
        None,
        Drafting(),
        "what drafts for it: a model like the target, or self:<layers>; without one decoding is plain",
        "self:6 drafts with the target's own first six layers; also a `transformers` model, a `Drafter`, or a list of "
        "all of these",
        aliases=("assistant_model",),
    )

    def __post_init__(self) -> None:
        _checked(self)


@_described
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is continued."""

    max_new_tokens: int = option(
        128,
        Integer(0, MAX_NEW_TOKENS),
        "new tokens at most",
        "cut to what is left of the model's context; 0 only with `prompt_logprobs`: scores the prompt",
        aliases=("max_tokens",),
    )
    min_new_tokens: int = option(
        0, Integer(0, MAX_NEW_TOKENS), "no EOS and no stop before this many new tokens"
    )
    temperature: float = option(
        0.0, Number(MIN_TEMPERATURE, 1e4, or_zero=True), "0 is greedy decoding, anything above samples"
    )
    top_k: int = option(
        0,
        Integer(0, 2**31 - 1),
        "keep the k most likely tokens; 0 turns it off",
        "the filters follow the temperature: top_k, then top_p, then min_p",
    )
    top_p: float = option(
        1.0,
        Number(0.0, 1.0, above_low=True),
        "keep the most likely tokens that together have this probability; 1 turns it off",
    )
    min_p: float = option(
        0.0,
        Number(0.0, 1.0),
        "keep tokens at least this likely, relative to the likeliest; 0 turns it off",
    )
    repetition_penalty: float = option(
        1.0,
        Number(0.01, 100.0),
        "above 1, tokens that the prompt or the output has grow rarer",
        "before any bias, their logits are divided by it where they are positive and multiplied where negative",
    )
    presence_penalty: float = option(
        0.0,
        Number(-MAX_PENALTY, MAX_PENALTY),
        "is taken from the logits of tokens that the output has",
        "the prompt does not count; after the repetition penalty, before any bias",
    )
    frequency_penalty: float = option(
        0.0,
        Number(-MAX_PENALTY, MAX_PENALTY),
        "is taken from a token's logit for each time that the output has it",
    )
    logit_bias: Any = option(None, LogitBias(), "token ids, and what is added to the logit of each")
    bad_words: Any = option(
        None,
        BadWords(),
        "strings, or lists of token ids, that are never completed",
        "the last id is banned wherever the others stand right before it, in the prompt or the output; a string is "
        "banned as the tokenizer writes it, alone and after a space: other tokens may still spell it",
        flags=("--bad-word",),
        aliases=("bad_words_ids",),
    )
    logits_processor: Any = option(
        None,
        Functions(),
        "a function of (token ids so far, next token's logits) that returns logits, or a list of them",
        "after penalties, bias and bans, before the temperature; a list of ids, the prompt's included, and an fp32 "
        "tensor `[vocabulary]`; called as in plain decoding, once for each token, in order, never with a rejected "
        "draft. Drafts are made without it. Rounds with one run from Python: none is recorded, none runs ahead",
    )
    seed: int | None = option(
        None,
        Integer(0, 2**64 - 1),
        "same seed, same text; by default one is drawn, and the result reports it",
    )
    stop: Any = option(
        None, StopStrings(), "strings; the text ends before the first that occurs", aliases=("stop_strings",)
    )
    stop_token_ids: Any = option(
        None, TokenIds(), "ids that end the output, kept in `token_ids`", flags=("--stop-token-id",)
    )
    include_stop_str_in_output: bool = option(
        False, Flag(), "keep the stop string in the text", flags=("--include-stop",)
    )
    ignore_eos: bool = option(False, Flag(), "do not stop at the model's end-of-text token")
    logprobs: int | None = option(
        None,
        Integer(0, MAX_NUM_LOGPROBS),
        "log-probability of each new token, and of this many most likely ones",
    )
    prompt_logprobs: int | None = option(
        None,
        Integer(0, MAX_NUM_LOGPROBS),
        "the same for the prompt's tokens",
        "the first has none",
    )
    return_rounds: bool = option(
        False, Flag(), "keep what each round drafted, the rejected tokens too", "in `CompletionOutput.rounds`"
    )
    n: int = option(
        1,
        Integer(1, MAX_NUM_SAMPLES),
        "independent samples",
        "sample j > 0 derives its key from (seed, j)",
        flags=("-n",),
    )
    num_speculative_tokens: int | str = option(
        AUTO,
        IntegerOrAuto(0, MAX_NUM_SPECULATIVE_TOKENS),
        "draft tokens a round",
        "auto measures what rounds take and how many drafts are accepted, and drafts as many as give the most tokens a "
        "second, none where that does not pay; with acceptance='rejection' a seed's text is the same again only with a "
        "number",
        flags=("-k",),
        aliases=("num_assistant_tokens",),
    )
    only_drafter: str | None = option(
        None,
        Text(),
        "of several drafters the only one that drafts for it, by the name that the engine was given",
    )
    draft_confidence: float = option(
        0.0,
        Number(0.0, 1.0),
        "a draft model stops before a token of which it is less certain; 0 turns it off",
        "that is: whose likeliest value has less probability, by the draft and after every filter; exact in every "
        "mode, since it asks before a token is drawn. A request that has it is drafted for step by step from Python",
        aliases=("assistant_confidence_threshold",),
    )
    acceptance: str = option(
        AUTO,
        Choice(("auto", "coupled", "rejection", "block", "typical", "threshold")),
        "how drafts are judged; auto is coupled if a seed is given, else rejection",
        "coupled: the text depends on the seed only, whatever drafts; rejection: exact in distribution, one draft "
        "after the other; block: exact too, judges a round's drafts together and accepts a little more; "
        "threshold and typical accept what is likely enough: LOSSY, `lossless` is False in the result; at temperature "
        "0 every mode keeps what the target would have said",
    )
    acceptance_threshold: float = option(
        0.1,
        Number(0.0, 1.0),
        "of the modes threshold and typical: drafts to which the target gives more probability are kept",
        "the epsilon of typical acceptance",
    )
    acceptance_delta: float = option(
        0.3,
        Number(0.0, 1.0),
        "of the mode typical: drafts above this times exp(-H) are kept too, H the target's entropy there",
    )

    def __post_init__(self) -> None:
        _checked(self)
        if self.max_new_tokens == 0 and self.prompt_logprobs is None:
            raise ValueError(
                "max_new_tokens must be at least 1, got 0: only prompt_logprobs need no new token"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} must not exceed max_new_tokens={self.max_new_tokens}"
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_filters(self) -> bool:
        """Whether top-k, top-p or min-p keep some tokens from being drawn."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)

    @property
    def has_transforms(self) -> bool:
        """Whether something is done to the logits of every token, whatever its position."""
        penalties = (self.repetition_penalty - 1.0, self.presence_penalty, self.frequency_penalty)
        return bool(self.logit_bias or self.bad_words) or any(penalties)

    @property
    def rule(self) -> str:
        """The rule that drafts are judged by: "match" (greedy decoding is one in every mode), or the mode's own."""
        is_matched = self.acceptance == "coupled" or (self.acceptance == AUTO and self.seed is not None)
        if self.is_greedy or is_matched:
            return "match"
        return "rejection" if self.acceptance == AUTO else self.acceptance


@_described
@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How a conversation is written out and answered, beside the options of any request."""

    chat_template: str | None = option(
        None,
        FilePath(),
        "a Jinja template, or a file that holds one, instead of the model's own",
        "text with a brace is a template, other text is a file's path",
    )
    generation_config: bool = option(
        True,
        Flag(),
        "sampling options that are not given are as the model's generation_config.json says",
        "max_new_tokens and repetition_penalty, and with do_sample: true temperature, top_k, top_p and min_p; the "
        "result tells which (`generation_defaults`)",
    )

    def __post_init__(self) -> None:
        _checked(self)


@_described
@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine is built."""

    device: str = option(AUTO, DeviceName(), "where it runs; auto is CUDA where there is one")
    dtype: str = option(
        AUTO,
        DtypeName(DTYPE_NAMES),
        "of the weights, unless weight_dtype or draft_weight_dtype says otherwise",
    )
    weight_dtype: str = option(
        AUTO,
        DtypeName(WEIGHT_DTYPE_NAMES),
        "storage of the target's weights",
        "int8: linear layers rounded to 8 bits with a scale per output channel, the rest in dtype; int4, int4_min and "
        "int8_group: to 4 bits, 4 bits with a minimum, or 8 bits, with a scale for every 32 inputs; a rounded "
        "target is another model, a little worse; auto is dtype, and what a GGUF file stores by group as it is",
    )
    draft_weight_dtype: str = option(
        AUTO,
        DtypeName(WEIGHT_DTYPE_NAMES),
        "storage of the draft's weights",
        "int8 or int4 change nothing there but speed; auto is dtype, and for self:<layers> the target's own weights",
    )
    head_dtype: str = option(
        AUTO,
        DtypeName(WEIGHT_DTYPE_NAMES),
        "storage of the target's head, the layer with a row for every token",
        "in a small model a quarter of what a token reads; int8 or int4 there, with the rest as it is, makes a model "
        "between the two; auto is weight_dtype",
    )
    draft_head_dtype: str = option(
        AUTO,
        DtypeName(WEIGHT_DTYPE_NAMES),
        "storage of the draft's head",
        "auto is draft_weight_dtype",
    )
    draft_vocab_size: int | None = option(
        None,
        Integer(1, 2**31 - 1),
        "tokens that the draft's head keeps, the most frequent ones; by default all",
        "it never proposes the others, which changes no output: a draft of a large vocabulary is cheaper, and a little "
        "less is accepted",
    )
    draft_vocab_text: str | None = option(
        None,
        FilePath(),
        "a text file in which tokens are counted for draft_vocab_size; by default the bundled prompts",
        "best what the model is to write; of tokens that it does not have the lowest ids come first",
    )
    kv_dtype: str = option(
        AUTO,
        DtypeName(DTYPE_NAMES),
        "storage of keys and values; auto is the weights' dtype",
        "where those have scales, dtype",
    )
    backend: str = option(AUTO, Choice(BACKEND_NAMES), "auto is native on a CPU, triton on CUDA")
    block_size: int = option(16, Integer(1, 1024), "tokens a KV block holds")
    num_blocks: int | None = option(
        None,
        Integer(1, 2**31 - 1),
        "size of the KV cache in blocks",
        "by default as much as max_batch_size sequences of max_seq_len can use, at most 4 GiB on a CPU, half of the "
        "free memory on a GPU",
    )
    kv_cache_bytes: int | None = option(
        None, Integer(1, 2**50), "size of the KV cache in bytes, instead of num_blocks"
    )
    max_batch_size: int = option(
        32, Integer(1, 4096), "sequences that run at the same time", flags=("--max-num-seqs",)
    )
    max_seq_len: int | None = option(
        None,
        Integer(1, 2**31 - 1),
        "prompt and new tokens of one sequence; by default the target's context, as far as memory goes",
        flags=("--max-model-len",),
    )
    prefill_chunk_size: int = option(512, Integer(1, 2**20), "prompt tokens computed in one step")
    num_threads: int | None = option(
        None,
        Integer(1, 1024),
        "CPU threads; by default as many as environment, affinity and container allow",
        "the native backend's are the engine's own: by default SPECENGINE_NUM_THREADS, else OMP_NUM_THREADS, else as "
        "many as affinity and the container's CPU quota allow; for the other backends it is PyTorch's setting "
        "(`torch.set_num_threads`), of the whole process",
    )
    enable_prefix_cache: bool = option(True, Flag(), "share the KV blocks of equal prompt prefixes")
    cuda_graphs: bool | str = option(
        AUTO,
        FlagOrAuto(),
        "record rounds as CUDA graphs",
        "auto: on CUDA a round is recorded when its kind first runs; True: the usual kinds are recorded at the start, "
        "and what cannot be recorded is an error",
        flags=("--graphs",),
    )
    rounds_ahead: int | str = option(
        AUTO,
        IntegerOrAuto(0, MAX_ROUNDS_AHEAD),
        "rounds that are queued before the results of earlier ones are read",
        "auto: one on CUDA, none on a CPU; log-probabilities and, where it drafts, a Drafter object make it 0",
    )
    forced_acceptance: float | None = option(
        None,
        Number(0.0, 1.0),
        "for timing only: accept each draft token with this probability, whatever the target says",
        "THE OUTPUT IS NOT THE MODEL'S: `lossless` is False in the result",
    )
    deterministic: bool = option(True, Unavailable(Flag(), True), "the same bits every time")
    allow_pickle: bool = option(
        False, Flag(), "also read `pytorch_model.bin`", "with `weights_only=True`: no code in it runs"
    )
    revision: str | None = option(None, Text(), "branch, tag or commit, for names on the Hub")
    tokenizer: Any = option(
        None,
        Model("a directory, a file, a name or a tokenizer"),
        "instead of the target's own: a directory, a tokenizer.json or a name on the Hub",
        "or a tokenizer object of `transformers` or `tokenizers`",
    )

    profile: str | None = option(
        None,
        FilePath(),
        "a file that `specengine tune` wrote: options that are not given are as it recommends",
        "and num_speculative_tokens='auto' begins with the costs and the acceptance that were measured. It is refused "
        "where it is of another model; a warning says if it is of another machine or dtype",
    )

    def __post_init__(self) -> None:
        _checked(self)
        if self.num_blocks is not None and self.kv_cache_bytes is not None:
            raise ValueError(
                f"num_blocks={self.num_blocks} and kv_cache_bytes={self.kv_cache_bytes} both size the KV cache: "
                "give one of them"
            )
        if self.draft_vocab_text is not None and self.draft_vocab_size is None:
            raise ValueError(
                f"draft_vocab_text={self.draft_vocab_text!r} says which tokens a draft keeps: give draft_vocab_size, "
                "how many these are"
            )
