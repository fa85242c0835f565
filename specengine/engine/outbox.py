"""What callers have yet to be told."""

from __future__ import annotations

from typing import NamedTuple

from specengine.engine.results import build_result, build_rounds
from specengine.outputs import StreamEvent
from specengine.runtime.sequence import Request, Sequence, Settled


class News(NamedTuple):
    """What became settled of a sequence since its caller was last told."""

    sequence: Sequence
    before: Settled
    after: Settled

    @property
    def ends_request(self) -> bool:
        """Whether its request is over with these news, or others of the same step."""
        return self.after.finish_reason is not None and self.sequence.request.is_finished


class Outbox:
    """The requests of one caller: of one call of `stream`, or all those that `step` reports.

    requests: by id, those whose end has not been told
    """

    def __init__(self) -> None:
        self.requests: dict[int, Request] = {}
        self._changed: dict[int, Request] = {}

    def __bool__(self) -> bool:
        """Whether there are news."""
        return bool(self._changed)

    def add(self, request: Request) -> None:
        self.requests[request.request_id] = request

    def discard(self, request: Request) -> None:
        self.requests.pop(request.request_id, None)

    def note(self, request: Request) -> None:
        """Something of this request is about to be settled."""
        self._changed[request.request_id] = request

    def news(self) -> list[News]:
        """What has not been told, until it is confirmed."""
        return [
            News(sequence, sequence.reported, settled)
            for request in list(self._changed.values())
            for sequence in request.sequences
            if (settled := sequence.settled) is not sequence.reported
        ]

    def confirm(self, news: list[News]) -> None:
        """These are told now."""
        for item in news:
            item.sequence.reported = item.after
        self._changed = {}
        for item in news:
            if item.ends_request:
                self.discard(item.sequence.request)

    def retract(self, news: list[News]) -> None:
        """These were not told after all: an interruption came first."""
        for item in news:
            item.sequence.reported = item.before
            self.note(item.sequence.request)
            self.add(item.sequence.request)


def build_events(news: list[News]) -> list[StreamEvent]:
    """One event a sequence; a finished request's last one carries its result."""
    last = {item.sequence.request: item for item in news if item.ends_request}
    return [_build_event(item, is_last=last.get(item.sequence.request) is item) for item in news]


def _build_event(item: News, *, is_last: bool) -> StreamEvent:
    sequence, before, after = item.sequence, item.before, item.after
    request, tokens = sequence.request, slice(before.num_tokens, after.num_tokens)
    params = request.params
    return StreamEvent(
        index=request.index,
        output_index=sequence.sample_index,
        token_ids=sequence.output_ids[tokens],
        text_delta=after.text[before.num_final : after.num_final],
        token_source=sequence.token_source[tokens],
        finish_reason=after.finish_reason,
        result=build_result(request) if is_last else None,
        elapsed=(request.last_token_time or request.arrival_time) - request.arrival_time,
        logprobs=None if params.logprobs is None else sequence.logprobs[tokens],
        rounds=build_rounds(sequence, before.num_rounds, after.num_rounds) if params.return_rounds else None,
        stop_reason=after.stop_reason,
        error=after.error,
    )
