"""How a server listens, whom it admits, and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass, fields

from specengine.config import declaration, option
from specengine.kinds import Choice, Integer, Number, Text

# What one request may ask for, besides the library's own limits.
MAX_NUM_SAMPLES = 16
MAX_NUM_STOP_STRINGS = 4
MAX_NUM_BIASED_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a server listens, whom it admits, and how long it waits; declared as the library's options are."""

    host: str = option("127.0.0.1", Text(), "address to listen on; 0.0.0.0 is every one of the machine's")
    port: int = option(8000, Integer(0, 65535), "port to listen on; 0 takes a free one, and says which")
    api_key: str | None = option(
        None, Text(), "what clients must send as a bearer token; by default $SPECENGINE_API_KEY, or nothing"
    )
    served_model_name: str | None = option(
        None, Text(), "what requests call the model; by default its name as it was given"
    )
    max_queued_requests: int = option(
        256,
        Integer(0, 1_000_000),
        "sequences that wait while all that can run do; more are answered with 429",
    )
    request_timeout: float = option(
        600.0, Number(0.0, 86400.0, above_low=True), "seconds after which a request is ended where it stands"
    )
    shutdown_timeout: float = option(
        30.0, Number(0.0, 86400.0), "seconds that running requests are given after SIGTERM"
    )
    max_body_bytes: int = option(2 << 20, Integer(1, 1 << 30), "bytes of a request's body at most")
    stream_period: float = option(
        0.0,
        Number(0.0, 10.0),
        "seconds between the events of a stream; 0 sends tokens as they come, and so tells how many drafts each "
        "round accepted",
    )
    metrics_prefix: str = option(
        "specengine",
        Choice(("specengine", "vllm")),
        "what metrics' names begin with; vllm is for clients and dashboards that look for vLLM's",
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None or item.default is not None:
                object.__setattr__(self, item.name, declaration(item).kind.check(item.name, value))
