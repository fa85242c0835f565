"""Where a model comes from: opened once, every file of it read once, whatever is wrong said in its own words."""

from __future__ import annotations

import collections
import functools
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import tiny_models
import torch
import transformers

import specengine
import specengine.cli
from specengine.models.checkpoints import directory as directories
from specengine.models.checkpoints import open_checkpoint, tensors, tokenizer_files
from specengine.models.describe import describe_model
from specengine.models.loader import LoadedModel, load_model
from specengine.ops.load import load_backend

CPU = torch.device("cpu")
each_type = pytest.mark.parametrize("model_type", tiny_models.MODEL_TYPES)


def load(source: object, **options: bool) -> LoadedModel:
    backend = load_backend("reference", CPU)
    return load_model(open_checkpoint(source, **options), dtype=torch.float32, device=CPU, backend=backend)


def table_name(model: transformers.PreTrainedModel) -> str:
    table = model.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is table)


def tables(source: object, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The token table and the head as they are loaded."""
    weights = load(source, **options).decoder.weights
    return weights.token_table, weights.head.weight


def rewrite(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    path = directory / "model.safetensors"
    state = safetensors.torch.load_file(path)
    edit(state)
    safetensors.torch.save_file(state, path)
    return directory


# --- read once -----------------------------------------------------------------------------------------------


def test_an_engine_reads_every_file_of_a_checkpoint_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: collections.Counter[Path] = collections.Counter()

    def counted(original: Callable[..., object], path: Path, *rest: int) -> object:
        reads[path] += 1
        return original(path, *rest)

    for module, name in (
        (directories, "read_json"),
        (tensors, "read_safetensors_header"),
        (tokenizer_files, "read_tokenizer_json"),
    ):
        monkeypatch.setattr(module, name, functools.partial(counted, getattr(module, name)))
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


# --- the head ------------------------------------------------------------------------------------------------


@each_type
def test_a_shared_tensor_may_be_stored_under_the_heads_name(model_type: str, tmp_path: Path) -> None:
    model = tiny_models.build_model(model_type, tie_word_embeddings=True)
    directory = tiny_models.save_checkpoint(tmp_path / "m", model)
    for name in ("lm_head.weight", "embed_out.weight") if model_type == "gpt_neox" else ("lm_head.weight",):
        safetensors.torch.save_model(model, str(directory / "model.safetensors"))
        # save_model keeps one of the two names; each may come.
        kept = {"lm_head.weight", table_name(model)} & set(
            safetensors.torch.load_file(directory / "model.safetensors")
        )
        rewrite(directory, lambda state, kept=kept, name=name: state.update({name: state.pop(kept.pop())}))
        assert table_name(model) not in safetensors.torch.load_file(directory / "model.safetensors")
        table, head = tables(directory)
        assert table is head
        assert torch.equal(table, model.get_input_embeddings().weight)


@each_type
@pytest.mark.parametrize("is_said", [True, False])
def test_a_stored_head_that_differs_is_used_whatever_the_config_says(
    model_type: str, is_said: bool, tmp_path: Path
) -> None:
    model = tiny_models.build_model(model_type, tie_word_embeddings=True)
    directory = tiny_models.save_checkpoint(tmp_path / "m", model)
    own = torch.randn(model.lm_head.weight.shape)
    rewrite(directory, lambda state: state.update({"lm_head.weight": own}))
    config = json.loads((directory / "config.json").read_text())
    if not is_said and model_type in ("gpt2", "opt"):  # the others' default is untied
        config.pop("tie_word_embeddings", None)
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=rf"lm_head\.weight differs from {table_name(model)}"):
        table, head = tables(directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(head, own)
    assert torch.equal(head, theirs.lm_head.weight)
    assert torch.equal(table, theirs.get_input_embeddings().weight)
    # The same of a model in memory, whose config may be as wrong.
    with pytest.warns(UserWarning, match="differs from"):
        assert torch.equal(tables(theirs)[1], own)


@each_type
def test_a_head_that_is_stored_twice_and_equal_is_tied(
    model_type: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = tiny_models.build_model(model_type, tie_word_embeddings=True)
    directory = tiny_models.save_checkpoint(tmp_path / "m", model)
    rewrite(directory, lambda state: state.update({"lm_head.weight": model.lm_head.weight.detach().clone()}))
    for source in (directory, model):
        table, head = tables(source)
        assert table is head
    assert not [warning for warning in recwarn if "differs" in str(warning.message)]


def test_a_head_of_another_shape_is_refused_not_ignored(tmp_path: Path) -> None:
    directory = tiny_models.save_checkpoint(tmp_path / "m")
    rewrite(directory, lambda state: state.update({"lm_head.weight": torch.zeros(65, 32)}))
    with pytest.raises(specengine.ModelLoadError, match=r"lm_head\.weight: expected shape \[64, 32\]"):
        load(directory)


# --- names of wrapped models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace(".h.0.", ".h.0._orig_mod."),
        lambda name: name.replace(".h.1.", ".h.1._fsdp_wrapped_module._checkpoint_wrapped_module."),
    ],
    ids=["compiled", "parallel", "both", "a compiled layer", "sharded"],
)
def test_a_checkpoint_of_a_wrapped_model_loads(wrapped: Callable[[str], str], tmp_path: Path) -> None:
    model = tiny_models.build_model("gpt2")
    expected = tables(model)
    directory = tiny_models.save_checkpoint(tmp_path / "m", model)
    rewrite(
        directory,
        lambda state: [state.update({wrapped(name): state.pop(name)}) for name in list(state)],
    )
    for ours, theirs in zip(tables(directory), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_compiled_model_in_memory_loads() -> None:
    model = tiny_models.build_model("gpt2")
    assert torch.equal(tables(torch.compile(model))[0], tables(model)[0])


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    directory = tiny_models.save_checkpoint(tmp_path / "m")
    name = "transformer.ln_f.bias"
    rewrite(directory, lambda state: state.update({f"_orig_mod.{name}": state[name].clone()}))
    with pytest.raises(specengine.ModelLoadError, match=rf"are both '{name}'"):
        load(directory)


# --- pickles and pointers ------------------------------------------------------------------------------------

HOW_TO = r"give allow_pickle=True \(on the command line --allow-pickle\).*weights_only, which runs no code"


def to_pickle(directory: Path) -> Path:
    path = directory / "model.safetensors"
    torch.save(safetensors.torch.load_file(path), directory / "pytorch_model.bin")
    path.unlink()
    return directory


def test_a_repository_of_pickles_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = to_pickle(tiny_models.save_checkpoint(tmp_path / "m"))
    with pytest.raises(specengine.ModelLoadError, match=HOW_TO):
        load(directory)
    load(directory, allow_pickle=True)
    fetched = tmp_path / "fetched"

    def fetch(name: str, *, allow_patterns: list[str], **_: object) -> str:
        """As the Hub does: what is not asked for does not come."""
        fetched.mkdir(exist_ok=True)
        for path in directory.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, fetched)
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(specengine.ModelLoadError, match=rf"'some/model': has no .*{HOW_TO}"):
        load("some/model")
    assert not (fetched / "pytorch_model.bin").exists()
    load("some/model", allow_pickle=True)


def test_what_is_fetched_from_the_hub_is_of_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    directory = tiny_models.save_checkpoint(tmp_path / commit)
    revisions = []

    def fetch(name: str, *, revision: str | None, **_: object) -> str:
        revisions.append(revision)
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    load("some/model")
    assert revisions == [None, commit]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_git_lfs_pointer_says_what_it_is(name: str, tmp_path: Path) -> None:
    directory = to_pickle(tiny_models.save_checkpoint(tmp_path / "m"))
    (directory / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:01\nsize 9\n")
    with pytest.raises(specengine.ModelLoadError, match=rf"{name}: a Git LFS pointer.*git lfs pull"):
        load(directory, allow_pickle=True)


# --- ids that end a text -------------------------------------------------------------------------------------


def test_an_end_of_text_id_that_cannot_be_emitted_is_not_dropped_in_silence(tmp_path: Path) -> None:
    directory = tiny_models.save_checkpoint(tmp_path / "m", vocab_size=300, eos_token_id=[299, 300])
    with pytest.warns(UserWarning, match=r"m/config\.json: eos_token_id=\[300\] ends no text.*only 300 ids"):
        assert open_checkpoint(directory).spec.eos_token_ids == (299,)
    tiny_models.build_tokenizer(290).save(str(directory / "tokenizer.json"))
    with pytest.warns(
        UserWarning, match=r"eos_token_id=\[299\] ends no text: the tokenizer has only 290 ids"
    ):
        specengine.Engine(directory).close()


def test_a_description_reads_no_pickle(tmp_path: Path) -> None:
    directory = to_pickle(tiny_models.save_checkpoint(tmp_path / "m"))
    (directory / "pytorch_model.bin").write_bytes(b"no pickle at all")
    description = describe_model(directory)
    assert "allow_pickle=True" in description["weights"]
    assert description["num_layers"] == 2


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = to_pickle(tiny_models.save_checkpoint(tmp_path / "m", vocab_size=300, eos_token_id=300))
    tiny_models.build_tokenizer(300).save(str(tmp_path / "t.json"))

    def run(*options: str) -> tuple[object, str, str]:
        command = ["generate", "def", "--model", str(directory), "--max-new-tokens", "3", *options]
        with warnings.catch_warnings():  # which puts back how they are shown, too
            warnings.simplefilter("always")
            with pytest.raises(SystemExit) as left:
                specengine.cli.main(command)
        return left.value.code, *capsys.readouterr()

    code, out, err = run()
    assert (code, out) == (1, "")
    assert "--allow-pickle" in err.splitlines()[-1]
    code, out, err = run("--allow-pickle")
    assert code == 2
    assert "--tokenizer" in err.splitlines()[-1]
    code, out, err = run("--allow-pickle", "--tokenizer", str(tmp_path / "t.json"))
    assert code == 0
    assert out != "\n"
    assert [line for line in err.splitlines() if "warning: " in line] == [
        f"specengine: warning: {directory}/config.json: eos_token_id=[300] ends no text: the model has only 300 ids"
    ]
