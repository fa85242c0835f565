"""What `specengine tune` found out about a pair on a machine, as a file: `profile="profile.json"`.

A profile gives options that the caller left open (`given_by`), and "auto" what it begins with: the rounds that were
measured, and how many drafts were accepted. It decides how fast a text comes, never which one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specengine import bundled
from specengine.errors import ModelLoadError
from specengine.json_file import read_json

VERSION: Literal[1] = 1
# Of `Measured.draft_model` and `Profile.model`: the bundled models, wherever they are installed.
BUNDLED = "bundled"
_MAX_BYTES = 16 << 20
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Source = str | list[str] | None


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Round(_Part):
    """What a round took, in seconds: the median of those that were measured like it.

    batch_size, k, rows: sequences, drafts of each, and rows of the target's forward
    draft, verify:       its parts; None where it was recorded as a whole
    """

    batch_size: int = Field(ge=1)
    k: int = Field(ge=0)
    rows: int = Field(ge=1)
    seconds: float = Field(gt=0, allow_inf_nan=False)
    draft: Seconds | None
    verify: Seconds | None


class Measured(_Part):
    """One way to draft.

    draft_model:   as `Engine` takes it, "bundled" for the bundled one; a list of them; None is plain decoding
    name:          what the engine calls it
    identity:      of its checkpoint (`specengine.engine.profiled.identify`); None where it has none of its own
    acceptance:    [m]: the chance that draft m is accepted if all before it were
    num_judged:    rounds that this was seen in
    rounds:        what rounds took
    """

    draft_model: Source
    name: str | None
    identity: str | None
    draft_weight_dtype: str
    acceptance: list[Share]
    num_judged: int = Field(ge=0)
    rounds: list[Round]


class Gain(_Part):
    """Plain seconds a token / seconds a token: the median of measured pairs, and the ends of its 95 % interval."""

    median: float
    low: float
    high: float


class Recommendation(_Part):
    """Options. dtype, weight_dtype: "auto" but where another one was asked for or allowed. acceptance: "auto" but where
    another mode was faster. reason: in words."""

    draft_model: Source
    num_speculative_tokens: int | Literal["auto"]
    dtype: str
    weight_dtype: str
    draft_weight_dtype: str
    acceptance: str
    speedup: Gain | None
    reason: str


class Profile(_Part):
    """All of it.

    run:       that of the records it was made of
    model:     the target, as `Measured.draft_model`; identity: its checkpoint's
    machine:   `specengine.engine.profiled.describe_machine`
    precision: dtype, weight_dtype, device and backend that rounds were measured with
    drafters:  the first is plain decoding
    """

    version: Literal[1]
    run: str
    model: str
    identity: str
    machine: dict[str, str]
    precision: dict[str, str]
    drafters: list[Measured] = Field(min_length=1)
    recommendation: Recommendation


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """Raises `ValueError` that names the file, and the field, for what is no profile of this version."""
    where = os.fspath(path)
    try:
        content = read_json(Path(path).expanduser(), _MAX_BYTES)
    except ModelLoadError as error:
        raise ValueError(f"profile={where!r}: {error}") from None
    if content.get("version") != VERSION:
        raise ValueError(
            f"profile={where!r} has the version {content.get('version')!r}, not {VERSION}: make it again with "
            "`specengine tune`"
        )
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"profile={where!r}: {field}: {first['msg']}") from None


def resolve_source(source: Source, *, is_draft: bool) -> Any:
    """As `Engine` takes it."""
    if isinstance(source, list):
        return [resolve_source(each, is_draft=is_draft) for each in source]
    if source == BUNDLED:
        return bundled.draft_path() if is_draft else bundled.target_path()
    return source


def with_models(profile: Profile, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options with what the profile recommends where `given` says nothing: the pair and how it is stored. Values of
    None say nothing. What belongs to the recommended drafter goes with it only."""
    advice, options = profile.recommendation, dict(given)
    found: dict[str, Any] = {
        "model": resolve_source(profile.model, is_draft=False),
        "dtype": advice.dtype,
        "weight_dtype": advice.weight_dtype,
    }
    if given.get("draft_model") is None:
        found["draft_model"] = resolve_source(advice.draft_model, is_draft=True)
        found["draft_weight_dtype"] = advice.draft_weight_dtype
    options.update({name: value for name, value in found.items() if given.get(name) is None})
    return options


def with_sampling(profile: Profile, given: Mapping[str, Any]) -> dict[str, Any]:
    """The same of how many tokens are drafted and how they are judged, for whoever drafts as recommended.

    With a seed the mode stays: its text would be another one.
    """
    advice, options = profile.recommendation, dict(given)
    options.setdefault("num_speculative_tokens", advice.num_speculative_tokens)
    if given.get("seed") is None:
        options.setdefault("acceptance", advice.acceptance)
    return options


def with_profile(profile: Profile, given: Mapping[str, Any]) -> dict[str, Any]:
    """Both, for a call that loads what it needs."""
    options = with_models(profile, given)
    return with_sampling(profile, options) if given.get("draft_model") is None else options


def drafts_as_recommended(profile: Profile, keys: list[str]) -> bool:
    """Whether an engine's drafters are the recommended ones. keys: of each drafter its checkpoint's identity or, where
    it has none, its name."""
    wanted = profile.recommendation.draft_model
    sources = wanted if isinstance(wanted, list) else [wanted]
    # A draft model may have been measured in several dtypes.
    recommended = {key_of(each) for each in profile.drafters if each.draft_model in sources}
    return recommended == (set(keys) or {key_of(profile.drafters[0])})


def key_of(measured: Measured) -> str:
    """By which an engine knows a drafter again."""
    return measured.identity or measured.name or ""
