"""Token by token, where a text came from, and how likely each token was to the target and to the draft."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
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
    similarity:  Σ_v min(p_v, q_v) of both models, 1 - their total variation: at temperature 1 the chance that
                 an exact rule accepts what the draft draws here (Leviathan et al. 2023, corollary 3.6); None as above
    rejected:    with a recovered token, the drafts that fell: the one in whose place it is, and those behind it
    """

    token_id: int
    text: str
    source: Source
    round: int | None
    target_prob: float
    draft_prob: float | None
    similarity: float | None = None
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
    models = [engine] if draft_engine is None else [engine, draft_engine]
    return [
        _with_probs(token, *rows, alternative=alternatives.get(at))
        for at, (token, rows) in enumerate(
            zip(tokens, _laws_along(models, prompt, output.token_ids), strict=True)
        )
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
        found.append(TracedToken(token_id, text, source, index, 0.0, None, None, rejected))

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
    token: TracedToken, target: Tensor, draft: Tensor | None = None, *, alternative: int | None
) -> TracedToken:
    """target, draft: `[V]`, what each says of the place."""

    def prob(law: Tensor | None, token_id: int) -> float | None:
        return None if law is None else float(law[token_id]) if token_id < len(law) else 0.0

    similarity = None
    if draft is not None:
        shared = min(len(target), len(draft))
        similarity = float(torch.minimum(target[:shared], draft[:shared]).sum())
    rejected = list(token.rejected)
    if alternative is not None:
        to_target, to_draft = prob(target, alternative), prob(draft, alternative)
        rejected[0] = replace(rejected[0], target_prob=to_target, draft_prob=to_draft)
    return replace(
        token,
        target_prob=float(target[token.token_id]),
        draft_prob=prob(draft, token.token_id),
        similarity=similarity,
        rejected=rejected,
    )


def _laws_along(
    engines: list[Engine], prompt: list[int], text: list[int]
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """For each token of the text, what every engine's model says of its place. The models go side by side, so that no
    more than a few rows of probabilities are held."""
    followers = [_follow(engine, prompt, text) for engine in engines]
    for _ in text:
        laws = [next(follower) for follower in followers]
        yield laws[0], laws[1] if len(laws) > 1 else None
    for follower in followers:
        follower.close()


def _follow(engine: Engine, prompt: list[int], text: list[int]) -> Generator[Tensor, None, None]:
    """The probabilities `[V]` of each token of a text, by the raw logits of plain decoding that is led along it."""
    found: deque[Tensor] = deque()

    def lead_along(token_ids: list[int], logits: Tensor) -> Tensor:
        found.append(logits.float().softmax(dim=-1))
        led = logits.new_full(logits.shape, float("-inf"))
        led[text[len(token_ids) - len(prompt)]] = 0.0
        return led

    params = SamplingParams(
        max_new_tokens=len(text),
        temperature=0.0,
        num_speculative_tokens=0,
        ignore_eos=True,
        logits_processor=lead_along,
    )
    for event in engine.stream(prompt, params):
        while found:
            yield found.popleft()
        if event.finish_reason not in (None, "length"):
            error = event.result.outputs[0].error if event.result is not None else event.finish_reason
            raise SpecEngineError(f"{engine.target_name} cannot follow the text: {error}")
