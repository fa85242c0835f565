"""Options are declared once, in config.py: checks, docstrings, signatures and types say the same of each."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import specengine
from specengine import Engine, EngineConfig, SamplingParams
from specengine.config import ModelOptions, declaration
from specengine.kinds import Repeated, unescape
from specengine.names import ALIASES, DO_SAMPLE
from specengine.option_types import CallOptions, EngineOptions, SamplingOptions

ROOT = Path(__file__).resolve().parent.parent
GROUPS = [ModelOptions, SamplingParams, EngineConfig]
DOORS: list[tuple[Callable[..., Any], list[type]]] = [
    (specengine.generate, GROUPS),
    (specengine.stream, GROUPS),
    (Engine, [EngineConfig]),
    (Engine.generate, [SamplingParams]),
    (Engine.stream, [SamplingParams]),
]


@pytest.mark.parametrize("cls", GROUPS)
def test_every_field_is_declared(cls: type) -> None:
    """With a default that its own check accepts, and help that the docstring shows."""
    options = cls()
    for field in fields(cls):
        option = declaration(field)
        assert field.default is not MISSING, field.name
        assert getattr(options, field.name) == (() if isinstance(option.kind, Repeated) else field.default)
        assert option.help.split()[0] in (cls.__doc__ or ""), field.name
        assert not option.help.endswith("."), field.name


@pytest.mark.parametrize(("door", "groups"), DOORS, ids=lambda value: getattr(value, "__qualname__", ""))
def test_signatures_spell_every_option_out(door: Callable[..., Any], groups: list[type]) -> None:
    parameters = inspect.signature(door).parameters
    for field in (field for group in groups for field in fields(group)):
        assert parameters[field.name].default == field.default, field.name
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
    assert not any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def test_what_type_checkers_read_is_written_anew() -> None:
    """After a change in config.py: `make format`, or python tools/option_types.py."""
    path = ROOT / "tools" / "option_types.py"
    spec = importlib.util.spec_from_file_location("option_types_tool", path)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert (ROOT / "specengine" / "option_types.py").read_text(encoding="utf-8") == tool.render(), (
        test_what_type_checkers_read_is_written_anew.__doc__
    )


@pytest.mark.parametrize(
    ("types", "groups"),
    [(CallOptions, GROUPS), (SamplingOptions, [SamplingParams]), (EngineOptions, [EngineConfig])],
)
def test_type_checkers_read_every_name_and_alias(types: type, groups: list[type]) -> None:
    names = {field.name for group in groups for field in fields(group)}
    aliases = {alias for alias, name in ALIASES.items() if name in names}
    assert set(get_type_hints(types)) == names | aliases | (
        {DO_SAMPLE} if SamplingParams in groups else set()
    )


def test_aliases_are_no_names() -> None:
    names = {field.name for group in GROUPS for field in fields(group)}
    assert set(ALIASES) == {
        "max_tokens",
        "assistant_model",
        "assistant_confidence_threshold",
        "num_assistant_tokens",
        "stop_strings",
        "bad_words_ids",
    }
    assert not names & set(ALIASES)


@pytest.mark.parametrize("cls", [SamplingParams, EngineConfig])
def test_every_flag_is_a_bool(cls: type) -> None:
    flags = [field for field in fields(cls) if str(field.type).startswith("bool")]
    assert flags
    for field in flags:
        for value in (0, 1, 1.0, "yes", None):
            with pytest.raises((TypeError, ValueError), match=field.name):
                cls(**{field.name: value})


@pytest.mark.parametrize(
    ("door", "given", "message"),
    [
        (Engine, {"max_batch": 3}, "'max_batch'; did you mean 'max_batch_size'"),
        (Engine.generate, {"num_beams": 4}, "'num_beams': beam search is out of scope"),
        (Engine, {"assistant_modl": "x"}, "did you mean 'assistant_model'"),
        (Engine.generate, {"temprature": 1}, "did you mean 'temperature'"),
        (Engine.generate, {"max_token": 1}, "did you mean 'max_tokens'"),
        (Engine.stream, {"stop_string": "x"}, "did you mean 'stop_strings'"),
    ],
)
def test_an_engine_answers_with_the_closest_name(door: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        door(object(), "x", **given)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("plain", "plain"),
        (r"\n", "\n"),
        (r"\r\n\t", "\r\n\t"),
        (r"\\n", r"\n"),
        (r"\x41\u00e9\U0001f642", "Aé🙂"),
        (r"a\\\n", "a\\\n"),
    ],
)
def test_escapes(text: str, meant: str) -> None:
    assert unescape(text) == meant


@pytest.mark.parametrize("text", [r"\d", "\\", r"\x4", r"\u12", r"\U00110000", r"a\\\q"])
def test_what_is_no_escape_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(ValueError, match=r"a backslash itself is \\\\"):
        unescape(text)


def test_half_a_surrogate_pair_is_no_stop_string() -> None:
    with pytest.raises(ValueError, match=r"stop\[1\] must be text, got '\\udcff' at position 2"):
        SamplingParams(stop=["a", "ab\udcff"])
