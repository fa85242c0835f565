"""The bundled pair: a small GPT-2-architecture target, its draft, and held-out prompts (see MODEL_CARD.md).

Both directories are ordinary Hugging Face checkpoints. Weights and text only: nothing here imports a framework.
"""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["draft_path", "load_prompts", "target_path"]

_DIRECTORY = Path(__file__).resolve().parent


def target_path() -> Path:
    """Directory of the target model (config.json, model.safetensors, tokenizer.json)."""
    return _DIRECTORY / "target"


def draft_path() -> Path:
    """Directory of the draft model; it has the target's tokenizer."""
    return _DIRECTORY / "draft"


def load_prompts() -> list[dict[str, str]]:
    """The 200 held-out prompts, each `{"id", "source", "prompt"}`; `source` is `path:line` in the standard library."""
    lines = (_DIRECTORY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
