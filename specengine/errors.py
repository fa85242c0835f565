"""The exceptions that specengine raises beyond `ValueError` and `TypeError`."""


class SpecEngineError(Exception):
    """Base class of every error that is specengine's own."""


class ModelLoadError(SpecEngineError, ValueError):
    """A checkpoint is malformed, unsafe or of an unsupported architecture. Names the file and the field."""


class FetchError(SpecEngineError):
    """A known model could not be brought into the cache. Says why each source failed, or what could not be written."""


class ChatTemplateError(SpecEngineError, ValueError):
    """A chat template is missing or malformed, refuses the messages, or takes too much. Names whose it is."""


class VocabularyMismatchError(SpecEngineError, ValueError):
    """A draft model that can neither read the target's tokens nor write its text. Names both models."""


class InsufficientMemoryError(SpecEngineError, ValueError):
    """The configuration cannot fit: names what is asked, what there is, and what would fit."""


class BackendUnavailableError(SpecEngineError, RuntimeError):
    """The requested backend cannot run here. Says what to install or choose."""


class GraphCaptureError(SpecEngineError, RuntimeError):
    """A round cannot be recorded as a CUDA graph. Names the round: its batch size, k and mode."""


class KVCacheError(SpecEngineError):
    """Base class of the paged KV cache's errors. The state is unchanged whenever one is raised."""


class OutOfBlocksError(KVCacheError):
    """Fewer blocks are free or evictable than the call needs."""


class OutOfSlotsError(KVCacheError):
    """All sequence slots are in use."""


class UnknownSequenceError(KVCacheError):
    """The slot names no live sequence: never allocated, or freed already."""


def blame(error: Exception, request_id: int) -> None:
    """Notes on what a step raises for which request that was, as its `request_id`: others need not end for it."""
    vars(error).setdefault("request_id", request_id)
