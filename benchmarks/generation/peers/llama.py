"""llama.cpp through llama-cpp-python, in the build that the setup names."""

from __future__ import annotations

from generation.peers.gguf_pair import gguf_path
from generation.protocol import Contestant, Setup

DISTRIBUTIONS = ("llama-cpp-python", "gguf")


def prepare(setup: Setup) -> None:
    gguf_path(setup.target, setup.dtype, setup.cache)
    if setup.speculates:
        gguf_path(setup.draft, setup.draft_dtype, setup.cache)


def load(setup: Setup) -> Contestant:
    # Files are prepared before there is a build to import.
    from generation.peers.llama_contexts import LlamaCpp

    return LlamaCpp(setup)
