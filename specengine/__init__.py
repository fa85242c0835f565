"""Exact speculative decoding: faster generation, the same bits.

    import specengine

    print(specengine.generate("def binary_search(items, x):").text)

Importing this package is cheap: PyTorch and everything else load when a name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specengine.api import chat, clear_cache, generate, stream, stream_chat
    from specengine.config import ChatOptions, EngineConfig, SamplingParams
    from specengine.drafters.base import Drafter, DraftProposal
    from specengine.engine import Engine
    from specengine.errors import (
        BackendUnavailableError,
        ChatTemplateError,
        InsufficientMemoryError,
        KVCacheError,
        ModelLoadError,
        SpecEngineError,
        VocabularyMismatchError,
    )
    from specengine.outputs import (
        CompletionOutput,
        GenerationMetrics,
        GenerationResult,
        Round,
        SpeculativeDecodingMetrics,
        StreamEvent,
        TokenLogprob,
    )

    __version__: str

__all__ = [
    "BackendUnavailableError",
    "ChatOptions",
    "ChatTemplateError",
    "CompletionOutput",
    "DraftProposal",
    "Drafter",
    "Engine",
    "EngineConfig",
    "GenerationMetrics",
    "GenerationResult",
    "InsufficientMemoryError",
    "KVCacheError",
    "ModelLoadError",
    "Round",
    "SamplingParams",
    "SpecEngineError",
    "SpeculativeDecodingMetrics",
    "StreamEvent",
    "TokenLogprob",
    "VocabularyMismatchError",
    "__version__",
    "chat",
    "clear_cache",
    "generate",
    "stream",
    "stream_chat",
]

_HOME_OF = {
    "chat": "api",
    "clear_cache": "api",
    "generate": "api",
    "stream": "api",
    "stream_chat": "api",
    "ChatOptions": "config",
    "EngineConfig": "config",
    "SamplingParams": "config",
    "Drafter": "drafters.base",
    "DraftProposal": "drafters.base",
    "Engine": "engine",
    "BackendUnavailableError": "errors",
    "ChatTemplateError": "errors",
    "InsufficientMemoryError": "errors",
    "KVCacheError": "errors",
    "ModelLoadError": "errors",
    "SpecEngineError": "errors",
    "VocabularyMismatchError": "errors",
    "CompletionOutput": "outputs",
    "GenerationMetrics": "outputs",
    "GenerationResult": "outputs",
    "Round": "outputs",
    "SpeculativeDecodingMetrics": "outputs",
    "StreamEvent": "outputs",
    "TokenLogprob": "outputs",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("specengine")
    elif name in _HOME_OF:
        value = getattr(import_module(f"specengine.{_HOME_OF[name]}"), name)
    else:
        raise AttributeError(f"module 'specengine' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
