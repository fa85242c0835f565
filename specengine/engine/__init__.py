"""The engine: queues, the step, and what becomes of requests."""

from specengine.engine.engine import Engine

__all__ = ["Engine"]
