"""Where a model comes from: opened once, every file of it read once, whatever is wrong said in its own words."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
import tiny_models

import specengine
from specengine.models.checkpoints import directory as directories
from specengine.models.checkpoints import open_checkpoint, tensors, tokenizer_files


def test_an_engine_reads_every_file_of_a_checkpoint_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: collections.Counter[Path] = collections.Counter()
    for module, name in (
        (directories, "read_json"),
        (tensors, "read_safetensors_header"),
        (tokenizer_files, "_read_tokenizer_json"),
    ):

        def counted(path: Path, *rest: int, original=getattr(module, name)) -> object:
            reads[path] += 1
            return original(path, *rest)

        monkeypatch.setattr(module, name, counted)
    target, draft = (
        tiny_models.save_checkpoint(tmp_path / name, tokenizer=tiny_models.build_tokenizer(300))
        for name in ("target", "draft")
    )
    with specengine.Engine(target, draft):
        pass
    files = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    assert reads == {directory / file: 1 for directory in (target, draft) for file in files}


def test_a_draft_config_is_refused_before_the_targets_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft = (tiny_models.save_checkpoint(tmp_path / name) for name in ("target", "draft"))
    (draft / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.setattr(tensors.SafetensorsSource, "load", lambda *_: pytest.fail("a tensor was loaded"))
    with pytest.raises(specengine.ModelLoadError, match=r"draft/config\.json: vocab_size"):
        specengine.Engine(target, draft)


def test_a_spec_costs_the_config_only(tmp_path: Path) -> None:
    directory = tiny_models.save_checkpoint(tmp_path / "m")
    for name in ("model.safetensors", "generation_config.json"):
        (directory / name).unlink()
    checkpoint = open_checkpoint(directory)
    assert checkpoint.spec.architecture == "gpt2"
    assert (checkpoint.tokenizer, checkpoint.generation_defaults) == (None, {})
    with pytest.raises(specengine.ModelLoadError, match=r"no model\.safetensors"):
        _ = checkpoint.tensors
