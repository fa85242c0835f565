"""`specengine models`: what a model is."""

from __future__ import annotations

from typing import Any

from specengine.cli.options import AsJson, takes
from specengine.cli.output import print_sections
from specengine.config import ModelOptions


@takes(ModelOptions)
def models(options: dict[str, Any], as_json: AsJson = False) -> None:
    """List the bundled pair, what can be fetched and the architectures, or describe models without loading them."""
    from specengine import bundled
    from specengine.drafters.registry import names_a_drafter
    from specengine.fetched import KNOWN_MODELS
    from specengine.models.describe import describe_model, supported_architectures

    chosen = ModelOptions(**options)
    drafts = chosen.draft_model if isinstance(chosen.draft_model, tuple) else (chosen.draft_model,)
    models_drafting = [name for name in drafts if not names_a_drafter(name)]
    named = [name for name in (chosen.model, *models_drafting) if name is not None]
    if named:
        print_sections({name: describe_model(name) for name in named}, as_json=as_json)
        return
    sections = {
        "bundled target": describe_model(bundled.target_path()),
        "bundled draft": describe_model(bundled.draft_path()),
        "can be fetched": {name: _fetched(name) for name in KNOWN_MODELS},
        "supported": {"architectures": ", ".join(supported_architectures())},
    }
    print_sections(sections, as_json=as_json)


def _fetched(name: str) -> str:
    """A known model's size, and where it is."""
    from specengine.fetched import KNOWN_MODELS, find_fetched

    model = KNOWN_MODELS[name]
    where = find_fetched(name) or f"not fetched yet: specengine fetch {name}"
    return f"{model.file}, {model.num_bytes / 1e6:.0f} MB, {model.licence}; {where}"
