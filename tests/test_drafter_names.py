"""Drafters by name: one table for the Python call, the engine and the command line."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import named_drafters
import pytest
from law_helpers import CheckpointFactory, EngineFactory, Tally, assert_same, make_prompt, plain, spec
from typer.testing import CliRunner

import specengine
from specengine.call import prepare_call
from specengine.cli import app
from specengine.drafters import registry
from specengine.engine import Engine

VOCAB = 64
PROMPT = make_prompt(6, 1, VOCAB)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    """A name in the registry."""
    monkeypatch.setitem(registry.DRAFTERS, "toy", "named_drafters")
    named_drafters.contexts.clear()
    return "toy"


def test_a_named_drafter_drafts(
    toy: str, checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    engine = build_engine(checkpoint(seed=1), toy, prefill_chunk_size=32)
    assert engine.draft_name == "random"
    expected = plain(engine, PROMPT, max_new_tokens=60, ignore_eos=True)
    assert_same(spec(engine, PROMPT, 4, max_new_tokens=60, ignore_eos=True), expected)
    tally.check(accepted=False)
    (context,) = named_drafters.contexts
    assert (context.name, context.argument, context.draft) == (toy, "", None)
    assert (context.vocab_size, context.chunk_size, context.max_batch_size) == (VOCAB, 32, 8)
    assert context.kv_cache is engine._kv_cache
    assert context.num_bytes > 0


def test_a_named_drafter_may_draft_with_a_model(
    toy: str, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    """With layers of the target's, or a model that it loads: it gets keys and values in the target's blocks."""
    path = checkpoint(seed=1)
    for argument in ("target", str(path)):
        engine = build_engine(path, f"{toy}:{argument}")
        assert len(engine._kv_cache.tensors) == 2
        result = spec(engine, PROMPT, 3, max_new_tokens=21, ignore_eos=True)
        assert result.metrics.speculative_decoding.draft_acceptance_rate == 1.0
        assert named_drafters.contexts[-1].argument == argument


def test_call_and_engine_and_command_agree_on_what_a_name_is(
    toy: str, checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (toy, "toy:3", "self:2", "self", "ngram", "ngram:3", "suffix"):
        assert registry.names_a_drafter(name)
        assert prepare_call("a", {"draft_model": name}).draft_model == name  # drafts for the bundled target
    for other in ("./self", "toys", "./toy", Path("toy"), None, ["toy"]):
        assert not registry.names_a_drafter(other)
    with pytest.raises(ValueError, match="needs a model"):
        prepare_call("a", {"draft_model": "toys"})


def test_a_named_drafter_is_no_model_to_describe() -> None:
    result = CliRunner().invoke(app, ["models", "--draft-model", "self:2", "--json"])
    assert result.exit_code == 0, result.output
    assert "self:2" not in result.output


@pytest.mark.parametrize("name", ["ngram:0", "ngram:4-2", "ngram:1-33", "ngram:two", "ngram:2-", "suffix:2"])
def test_arguments_that_cannot_be_are_refused_in_the_same_words_everywhere(
    name: str,
) -> None:
    """And before a model is opened: there is none here."""
    messages = []
    for call in (
        lambda: Engine("nowhere", name),
        lambda: specengine.generate("a", model="nowhere", draft_model=name),
    ):
        with pytest.raises(ValueError, match=f"^draft_model='{name}': ") as caught:
            call()
        messages.append(str(caught.value))
    result = CliRunner().invoke(app, ["generate", "a", "--model", "nowhere", "--draft-model", name])
    assert result.exit_code == 2
    assert messages[0] == messages[1]
    assert messages[0] in " ".join(result.output.split())


@pytest.mark.parametrize("name", ["ngram", "ngram:3", "ngram:1-5", "suffix", "suffix:history"])
def test_names_with_arguments_work_on_the_command_line(name: str) -> None:
    """With the bundled target, too."""
    arguments = ["generate", "import os\n" * 4, "--max-new-tokens", "40", "--json"]
    outputs = [
        json.loads(CliRunner().invoke(app, [*arguments, *more]).stdout)
        for more in (["--draft-model", name], ["-k", "0"])
    ]
    drafted, expected = (output["outputs"][0]["token_ids"] for output in outputs)
    assert drafted == expected
    assert outputs[0]["metrics"]["speculative_decoding"]["num_draft_tokens"] > 0


def test_what_names_are_is_written_once() -> None:
    """No module but its own knows the name of a drafter."""
    package = Path(registry.__file__).parents[1]
    for path in package.rglob("*.py"):
        if path == Path(registry.__file__):
            continue
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        module = ".".join(["specengine", *path.relative_to(package).with_suffix("").parts])
        for name in strings & {*registry.DRAFTERS, "self:"} - {"self"}:  # which is also a word of Python
            assert registry.DRAFTERS.get(name) == module, path
