"""Token by token, where a text came from, and how likely each token was to the target and to the draft."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from specengine.config import SamplingParams
from specengine.engine import Engine
from specengine.errors import SpecEngineError
from specengine.outputs import CompletionOutput, GenerationResult, Round
from specengine.tokenizer import IncrementalDetokenizer

# "draft": accepted; "recovered": the target's own, where a draft was rejected; "bonus": the target's own after all
# drafts of a round were accepted; "target": of a round without drafts, or of the prompt's forward.
Source = Literal["draft", "recovered", "bonus", "target"]


@dataclass(frozen=True)
class RejectedToken:
    """A draft that was not accepted.

    target_prob, draft_prob: of the raw logits after the same text; None behind the first rejected draft of a round,
                             since nobody asks what follows a token that is not there, and as in `TracedToken`
    """

    token_id: int
    text: str
    target_prob: float | None
    draft_prob: float | None


@dataclass(frozen=True)
class TracedToken:
    """A generated token.

    text:        what it adds to the text: nothing if it ends inside a character, which the next ones complete, or if it
                 ends the text
    round:       the index of its round, from 0; None for the token that the prompt's forward gave
    target_prob: its probability by the target's raw logits, 0 … 1
    draft_prob:  by the draft model's; None where no model with this vocabulary drafted
    rejected:    with a recovered token, the drafts that fell: the one in whose place it is, and those behind it
    """

    token_id: int
    text: str
    source: Source
    round: int | None
    target_prob: float
    draft_prob: float | None
    rejected: list[RejectedToken] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def trace(engine: Engine, draft_engine: Engine | None, result: GenerationResult) -> list[TracedToken]:
    """The tokens of a result's first sample, which was generated with `return_rounds=True`.

    Both models go along the text once, one token a forward: a few times as long as the generation took.

    engine:       with the target
    draft_engine: with the draft as its model, if there is one; a vocabulary other than the target's makes no sense here

    Raises `ValueError` where the rounds were not kept, `SpecEngineError` where a model cannot follow the text.
    """
    output = result.outputs[0]
    if output.rounds is None:
        raise ValueError("a trace needs a result of return_rounds=True")
    prompt = result.prompt_token_ids
    tokens = _tell_sources(engine, output, prompt)
    alternatives = {at: token.rejected[0].token_id for at, token in enumerate(tokens) if token.rejected}
    by_target = _probs_along(engine, prompt, output.token_ids, alternatives)
    by_draft = (
        None if draft_engine is None else _probs_along(draft_engine, prompt, output.token_ids, alternatives)
    )
    return [
        _with_probs(token, by_target[at], (None, None) if by_draft is None else by_draft[at])
        for at, token in enumerate(tokens)
    ]


def _tell_sources(engine: Engine, output: CompletionOutput, prompt: list[int]) -> list[TracedToken]:
    """All but the probabilities."""
    tokenizer = engine.tokenizer
    stream = None if tokenizer is None else IncrementalDetokenizer(tokenizer, prompt)
    found: list[TracedToken] = []

    def add(source: Source, index: int | None, fallen: list[int]) -> None:
        token_id = output.token_ids[len(found)]
        text = "" if stream is None else stream.push(token_id)
        spelled = ["" if tokenizer is None else tokenizer.decode([draft]) for draft in fallen]
        rejected = [RejectedToken(draft, of, None, None) for draft, of in zip(fallen, spelled, strict=True)]
        found.append(TracedToken(token_id, text, source, index, 0.0, None, rejected))

    if output.token_ids:
        add("target", None, [])
    for index, each in enumerate(output.rounds or []):
        for place in range(each.num_tokens):
            source, fallen = _source(each, place)
            add(source, index, fallen)
    if stream is not None and found:
        found[-1] = replace(found[-1], text=found[-1].text + stream.finish())
    return found


def _source(of: Round, place: int) -> tuple[Source, list[int]]:
    """Of a round's token, and the drafts that fell where it is."""
    if place < of.num_accepted_tokens:
        return "draft", []
    if of.num_accepted_tokens < of.num_draft_tokens:
        return "recovered", of.draft_token_ids[place:]
    return ("bonus" if of.num_draft_tokens else "target"), []


def _with_probs(
    token: TracedToken, target: tuple[float, float | None], draft: tuple[float | None, float | None]
) -> TracedToken:
    rejected = list(token.rejected)
    if rejected:
        rejected[0] = replace(rejected[0], target_prob=target[1], draft_prob=draft[1])
    return replace(token, target_prob=target[0], draft_prob=draft[0], rejected=rejected)


def _probs_along(
    engine: Engine, prompt: list[int], text: list[int], alternatives: dict[int, int]
) -> list[tuple[float, float | None]]:
    """For each token of the text, its probability after all before it, and that of the alternative there."""
    found: dict[int, tuple[float, float | None]] = {}

    def lead_along(token_ids: list[int], logits: Tensor) -> Tensor:
        at = len(token_ids) - len(prompt)
        probs = logits.float().softmax(dim=-1)
        other = alternatives.get(at)
        wanted = [text[at]] if other is None else [text[at], other]
        values = probs[wanted].tolist()
        found[at] = (values[0], values[1] if len(values) > 1 else None)
        led = logits.new_full(logits.shape, float("-inf"))
        led[text[at]] = 0.0
        return led

    params = SamplingParams(
        max_new_tokens=len(text),
        temperature=0.0,
        num_speculative_tokens=0,
        ignore_eos=True,
        logits_processor=lead_along,
    )
    followed = engine.generate(prompt, params, progress=False)
    assert isinstance(followed, GenerationResult), "one prompt gives one result"
    if followed.token_ids != text:
        raise SpecEngineError(
            f"{engine.target_name} cannot follow the text: {followed.outputs[0].error or followed.finish_reason}"
        )
    return [found[at] for at in range(len(text))]
