"""What a caller gets back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "error"]
TokenSource = Literal["draft", "target"]


class TokenLogprob(NamedTuple):
    """A token's raw log-probability (log-softmax of the target's fp32 logits) and the most likely tokens'."""

    token_id: int
    logprob: float
    top: dict[int, float]


class Round(NamedTuple):
    """One round of one sample, counted as in `SpeculativeDecodingMetrics`: what a stop made unneeded is left out.

    num_draft_tokens:    drafted
    num_accepted_tokens: accepted and kept, a prefix of the drafts
    num_tokens:          that the round gave: these, and one of the target's own unless a stop came before it
    draft_token_ids:     the drafts, those that were rejected included
    drafters:            who made each: its place in the list of drafters, 0 where there is one
    """

    num_draft_tokens: int
    num_accepted_tokens: int
    num_tokens: int
    draft_token_ids: list[int]
    drafters: list[int]


@dataclass
class SpeculativeDecodingMetrics:
    """What speculation did, named as in vLLM.

    num_spec_tokens:            the largest k asked for
    num_spec_steps:             rounds in which at least one token was drafted
    num_rounds:                 target forwards after the prompt's
    num_draft_tokens:           drafted
    num_accepted_draft_tokens:  accepted and kept
    num_trimmed_tokens:         target tokens that a stop made unneeded; always
                                emitted = 1 + accepted + rounds - trimmed
    acceptance_histogram:       [j] = rounds that accepted exactly j tokens
    acceptance_by_position:     [i] = share of the drafts at position i that were accepted
    num_drafted_by_position, num_accepted_by_position: its parts
    rejection_positions:        [i] = rounds whose first rejection was at position i
    lossless:                   see `GenerationResult`
    num_rounds_by_num_draft:    [k] = rounds in which k tokens were drafted; [0]: without drafts

    Where k was left to the engine ("auto"), in seconds, by the rounds' measured costs (a round of a batch counts in
    full for each of its requests); 0 where nothing was measured:

    round_seconds:              what rounds took
    estimated_plain_seconds:    what their tokens would have taken in rounds without drafts
    """

    num_spec_tokens: int = 0
    num_spec_steps: int = 0
    num_rounds: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    num_trimmed_tokens: int = 0
    acceptance_histogram: list[int] = field(default_factory=list)
    num_drafted_by_position: list[int] = field(default_factory=list)
    num_accepted_by_position: list[int] = field(default_factory=list)
    rejection_positions: list[int] = field(default_factory=list)
    lossless: bool = True
    num_rounds_by_num_draft: list[int] = field(default_factory=list)
    round_seconds: float = field(default=0.0, compare=False)
    estimated_plain_seconds: float = field(default=0.0, compare=False)

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted / drafted; 0 if nothing was drafted."""
        return self.num_accepted_draft_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted / rounds; 1 if there was no round."""
        return 1.0 + (self.num_accepted_draft_tokens / self.num_rounds if self.num_rounds else 0.0)

    @property
    def mean_num_draft_tokens(self) -> float:
        """Drafted / rounds; 0 if there was no round."""
        return self.num_draft_tokens / self.num_rounds if self.num_rounds else 0.0

    @property
    def num_undrafted_rounds(self) -> int:
        """Rounds without drafts."""
        return self.num_rounds - self.num_spec_steps

    @property
    def estimated_speedup(self) -> float | None:
        """Against plain decoding, by measured costs; None where they were not (k was given, or too few rounds)."""
        return self.estimated_plain_seconds / self.round_seconds if self.round_seconds else None

    @property
    def acceptance_by_position(self) -> list[float]:
        pairs = zip(self.num_accepted_by_position, self.num_drafted_by_position, strict=True)
        return [accepted / drafted for accepted, drafted in pairs]

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "draft_acceptance_rate": self.draft_acceptance_rate,
            "mean_acceptance_length": self.mean_acceptance_length,
            "acceptance_by_position": self.acceptance_by_position,
            "mean_num_draft_tokens": self.mean_num_draft_tokens,
            "num_undrafted_rounds": self.num_undrafted_rounds,
            "estimated_speedup": self.estimated_speedup,
        }


@dataclass
class GenerationMetrics:
    """Times in seconds, counts in tokens, over all samples of one prompt.

    queue_time:    from the request to its first forward
    prompt_time:   from there to the first token
    decode_time:   from the first token to the last
    total_time:    from the request to the last token
    num_cached_tokens: prompt tokens whose KV came from the prefix cache
    num_target_forwards: forwards of the target in which this request took part
    num_preemptions: times its blocks were taken away and recomputed
    """

    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    num_target_forwards: int = 0
    num_preemptions: int = 0
    queue_time: float = 0.0
    prompt_time: float = 0.0
    decode_time: float = 0.0
    total_time: float = 0.0
    speculative_decoding: SpeculativeDecodingMetrics = field(default_factory=SpeculativeDecodingMetrics)

    @property
    def time_to_first_token(self) -> float:
        """From the request to its first token: what a reader waits for."""
        return self.queue_time + self.prompt_time

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens that were computed, not found in the prefix cache, over the time to the first token from the
        first forward on."""
        computed = self.num_prompt_tokens - self.num_cached_tokens
        return computed / self.prompt_time if self.prompt_time > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the time from the first forward to the last token."""
        busy = self.prompt_time + self.decode_time
        return self.num_generated_tokens / busy if busy > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "time_to_first_token": self.time_to_first_token,
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "tokens_per_second": self.tokens_per_second,
            "speculative_decoding": self.speculative_decoding.to_dict(),
        }


@dataclass(frozen=True)
class CompletionOutput:
    """One sample.

    token_ids:          generated ids, the EOS or stop token included
    text:               the continuation, without EOS and without the stop string
    finish_reason:      "stop", "length", "abort" or "error"
    stop_reason:        the stop string or stop token id that ended it; None at EOS
    logprobs:           one `TokenLogprob` a token, if asked for
    cumulative_logprob: their sum, if asked for
    token_source:       whether each token was an accepted draft or the target's own
    seed:               the key this sample was drawn with
    rounds:             in order, if asked for (`return_rounds`): all tokens but the first, which the prompt's forward
                        gave, come from them
    text_offsets:       where in `text` each token begins: token i ends where the next one begins, and is empty inside a
                        character that a later token completes; without a tokenizer all are 0
    error:              with finish_reason "error", what was wrong: the target's logits held a NaN or nothing finite
    """

    index: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: list[TokenLogprob] | None
    cumulative_logprob: float | None
    token_source: list[TokenSource]
    seed: int
    error: str | None = None
    rounds: list[Round] | None = None
    text_offsets: list[int] = field(default_factory=list)

    def _repr_html_(self) -> str:
        from specengine.html_view import completion_html

        return completion_html(self)

    def to_dict(self) -> dict[str, Any]:
        result = asdict(self)
        for name in ("logprobs", "rounds"):
            entries = getattr(self, name)
            result[name] = None if entries is None else [entry._asdict() for entry in entries]
        return result


@dataclass(frozen=True)
class GenerationResult:
    """Everything about one prompt. `.text`, `.token_ids` and `.finish_reason` are the first sample's.

    lossless: False where drafts were taken that the target would have said at other times, or not at all: with a lossy
              acceptance mode (`SamplingParams`) above temperature 0, or where acceptance was forced, for timing
    generation_defaults: sampling options that came from the model's generation_config.json: in a chat, those that the
              caller left open
    """

    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: GenerationMetrics
    prompt: str | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    seed: int | None = None
    lossless: bool = True
    generation_defaults: dict[str, Any] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        from specengine.html_view import result_html

        return result_html(self)

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON."""
        prompt_logprobs = self.prompt_logprobs
        return {
            "prompt": self.prompt,
            "prompt_token_ids": self.prompt_token_ids,
            "outputs": [output.to_dict() for output in self.outputs],
            "metrics": self.metrics.to_dict(),
            "prompt_logprobs": None
            if prompt_logprobs is None
            else [None if entry is None else entry._asdict() for entry in prompt_logprobs],
            "seed": self.seed,
            "lossless": self.lossless,
            "generation_defaults": dict(self.generation_defaults),
        }


@dataclass(frozen=True)
class StreamEvent:
    """Tokens that became final in one step.

    index:        the prompt's place in the list
    output_index: the sample
    token_ids:    new ids, in order
    text_delta:   new text; a character is never split, so it may lag behind the ids
    token_source: "draft" or "target" for each id
    finish_reason: set on the sample's last event
    elapsed:      seconds from the request to these tokens: of the first event, the time to the first token
    result:       the prompt's `GenerationResult`, on the last event of its last sample
    logprobs:     of these tokens, if asked for
    rounds:       those that gave these tokens, if asked for (`return_rounds`)
    stop_reason, error: with a finish_reason, as in `CompletionOutput`
    """

    index: int
    output_index: int
    token_ids: list[int]
    text_delta: str
    token_source: list[TokenSource]
    finish_reason: FinishReason | None = None
    result: GenerationResult | None = None
    elapsed: float = 0.0
    logprobs: list[TokenLogprob] | None = None
    rounds: list[Round] | None = None
    stop_reason: str | int | None = None
    error: str | None = None
