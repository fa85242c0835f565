"""A widened model computes the function of the model it came from: the same logits, in an ordinary directory."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specengine.measure import widened as pairs

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4  # absolute, fp32; the logits span tens
PROMPTS = (
    "def binary_search(items, x):\n    low",
    "class Stack:\n    '''A stack ‘é’.'''\n\n    def __init__(self",
)
BUNDLED_SHAPES = {
    "one feature more": pairs.Shape(num_features=384, num_layers=8, num_heads=6, vocab_size=4097),
    "deeper": pairs.Shape(num_features=448, num_layers=11, num_heads=7, vocab_size=5000),
    **pairs.SHAPES,
}
TINY_SHAPES = {
    "same": pairs.Shape(num_features=32, num_layers=2, num_heads=4, vocab_size=97, num_positions=48),
    "wide": pairs.Shape(num_features=40, num_layers=2, num_heads=5, vocab_size=101, num_positions=48),
    "long and deep": pairs.Shape(
        num_features=48, num_layers=5, num_heads=6, vocab_size=128, num_positions=64
    ),
    "inner": pairs.Shape(
        num_features=64, num_layers=3, num_heads=8, vocab_size=97, num_positions=48, num_inner=200
    ),
}


@pytest.fixture
def out_dir(tmp_path: Path) -> Iterator[Path]:
    """A directory that goes with the test: pytest keeps `tmp_path` of three runs, gpt2-xl is 6.5 GB."""
    yield tmp_path / "widened"
    shutil.rmtree(tmp_path / "widened", ignore_errors=True)


@pytest.fixture(scope="module")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 with weights large enough to matter, 8-feature heads, an inner size of its own."""
    config = transformers.GPT2Config(
        vocab_size=97,
        n_positions=48,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=100,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.5)
    directory = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(directory)
    return directory


def load(directory: Path) -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32).eval()


def token_ids(directory: Path, config: transformers.GPT2Config) -> torch.Tensor:
    """`[B, T]`: two prompts where there is a tokenizer, random ids elsewhere."""
    if not (directory / "tokenizer.json").exists():
        return torch.randint(
            config.vocab_size, (2, config.n_positions), generator=torch.Generator().manual_seed(1)
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    rows = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    return torch.tensor([row[: min(map(len, rows))] for row in rows])


@torch.inference_mode()
def check_agreement(source: Path, widened: Path) -> None:
    """Same logits over the source's vocabulary; beyond it the padded logit, never the largest."""
    model = load(source)
    ids, vocab_size = token_ids(source, model.config), model.config.vocab_size
    expected = model(ids).logits
    del model
    actual = load(widened)(ids).logits
    assert expected.std() > 0.5, "the source's logits are too flat to tell anything"
    worst = (actual[..., :vocab_size] - expected).abs().max().item()
    assert worst < TOLERANCE, f"logits differ by {worst:.2e}"
    assert (actual.argmax(-1) < vocab_size).all()
    padded = actual[..., vocab_size:]
    if padded.numel():
        assert (padded - pairs.PADDED_LOGIT).abs().max() < 1e-3
        assert (actual.softmax(-1)[..., vocab_size:].sum(-1) < 1e-9).all()


@pytest.mark.parametrize("shape", TINY_SHAPES)
def test_random_model_agrees_with_its_source(tiny_source: Path, shape: str, out_dir: Path) -> None:
    check_agreement(tiny_source, pairs.build_widened(tiny_source, TINY_SHAPES[shape], out_dir))


@pytest.mark.parametrize(
    ("source", "shape"),
    [
        ("target", "one feature more"),
        ("target", "deeper"),
        ("draft", "deeper"),
        ("draft", "distilgpt2"),
        ("target", "gpt2"),
        pytest.param("draft", "gpt2", marks=pytest.mark.slow),
        pytest.param("draft", "gpt2-medium", marks=pytest.mark.slow),
        ("target", "gpt2-medium"),
        pytest.param("target", "gpt2-large", marks=pytest.mark.slow),
        pytest.param("target", "gpt2-xl", marks=pytest.mark.slow),
    ],
)
def test_bundled_model_agrees_with_its_source(source: str, shape: str, out_dir: Path) -> None:
    check_agreement(pairs.BUNDLED / source, pairs.build_widened(source, BUNDLED_SHAPES[shape], out_dir))


def test_a_source_that_stores_the_head_only_and_the_slow_tokenizers_files(
    tiny_source: Path, out_dir: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_source, tmp_path / "source"))
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state.pop("transformer.wte.weight")
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    for name in pairs.SLOW_TOKENIZER_FILES:
        (source / name).write_text(name)
    widened = pairs.build_widened(source, TINY_SHAPES["wide"], out_dir)
    check_agreement(source, widened)
    assert all((widened / name).read_text() == name for name in pairs.SLOW_TOKENIZER_FILES)


def test_agreement_notices_a_missing_centring(
    tiny_source: Path, out_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "centred", lambda tensor: tensor.double())
    widened = pairs.build_widened(tiny_source, TINY_SHAPES["wide"], out_dir)
    with pytest.raises(AssertionError, match="logits differ"):
        check_agreement(tiny_source, widened)


def test_agreement_notices_an_unscaled_epsilon(tiny_source: Path, out_dir: Path) -> None:
    """The tiny model's streams are large, so its epsilon is raised until it matters, then left unscaled."""
    source = shutil.copytree(tiny_source, out_dir.parent / "source")
    edit_config(source, layer_norm_epsilon=0.1)
    widened = pairs.build_widened(source, TINY_SHAPES["wide"], out_dir)
    check_agreement(source, widened)
    edit_config(widened, layer_norm_epsilon=0.1)
    with pytest.raises(AssertionError, match="logits differ"):
        check_agreement(source, widened)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("distilgpt2", 82), ("gpt2", 124), ("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558)],
)
def test_named_shapes_have_the_published_sizes(name: str, millions: int) -> None:
    shape = pairs.SHAPES[name]
    config = transformers.GPT2Config(
        n_embd=shape.num_features, n_layer=shape.num_layers, n_head=shape.num_heads,
        vocab_size=shape.vocab_size, n_positions=shape.num_positions, n_inner=shape.inner,
    )  # fmt: skip
    with torch.device("meta"):
        count = transformers.GPT2LMHeadModel(config).num_parameters()
    assert round(count / 1e6) == millions


def test_what_can_be_data_is(tiny_source: Path) -> None:
    """Zeros may time faster than data: readers hold none, but for half of what an extra layer must not write."""
    tensors = load_file(tiny_source / "model.safetensors")
    config = json.loads((tiny_source / "config.json").read_text())
    shape = TINY_SHAPES["long and deep"]
    widened, _ = pairs.widen(tensors, config, shape)
    own = pairs.layer_places(config["n_layer"], shape.num_layers)
    for name, tensor in widened.items():
        if not name.endswith(("c_attn.weight", "c_fc.weight", "ln_1.weight", "ln_2.weight")):
            continue
        silent = {"c_attn.weight": 1 / 6, "c_fc.weight": 1 / 2}.get(".".join(name.split(".")[-2:]), 0.0)
        expected = 0.0 if int(name.split(".")[2]) in own else silent
        assert (tensor == 0).float().mean().item() == pytest.approx(expected), name


def test_no_two_matrices_are_alike(tiny_source: Path) -> None:
    """A runtime that shares equal constants would read fewer bytes than a checkpoint of this size has."""
    tensors = load_file(tiny_source / "model.safetensors")
    config = json.loads((tiny_source / "config.json").read_text())
    widened, _ = pairs.widen(tensors, config, TINY_SHAPES["long and deep"])
    matrices = [tensor.numpy().tobytes() for tensor in widened.values() if tensor.ndim == 2]
    assert len(set(matrices)) == len(matrices)


def test_source_layers_are_spread_and_the_last_is_last() -> None:
    assert pairs.layer_places(2, 6) == [2, 5]
    assert pairs.layer_places(8, 8) == list(range(8))
    assert pairs.layer_places(8, 12)[-1] == 11
    for wanted in range(8, 49):
        assert len(set(pairs.layer_places(8, wanted))) == 8


def test_a_second_build_is_free_and_a_changed_source_is_not(tiny_source: Path, out_dir: Path) -> None:
    source = shutil.copytree(tiny_source, out_dir.parent / "source")
    weights = pairs.build_widened(source, TINY_SHAPES["wide"], out_dir) / "model.safetensors"
    first = weights.stat().st_mtime_ns
    pairs.build_widened(source, TINY_SHAPES["wide"], out_dir)
    assert weights.stat().st_mtime_ns == first
    pairs.build_widened(source, TINY_SHAPES["wide"], out_dir, dtype=torch.bfloat16)
    assert load_file(weights)["lm_head.weight"].dtype == torch.bfloat16
    edit_config(source, eos_token_id=3)
    pairs.build_widened(source, TINY_SHAPES["wide"], out_dir, dtype=torch.bfloat16)
    assert json.loads((out_dir / "config.json").read_text())["eos_token_id"] == 3


def test_a_pair_shares_vocabulary_and_tokenizer(out_dir: Path) -> None:
    shape = BUNDLED_SHAPES["deeper"]
    target, draft = pairs.build_pair(shape, dataclasses.replace(shape, num_layers=3), out_dir, torch.bfloat16)
    for directory in (target, draft):
        config = transformers.AutoConfig.from_pretrained(directory)
        assert (config.model_type, config.vocab_size, config.tie_word_embeddings) == ("gpt2", 5000, False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        assert [tokenizer.decode(tokenizer(prompt).input_ids) for prompt in PROMPTS] == list(PROMPTS)
        assert load(directory).lm_head.weight.data_ptr() != load(directory).transformer.wte.weight.data_ptr()
    assert (target / "tokenizer.json").read_bytes() == (draft / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_features": 24, "num_heads": 3}, "num_features 24 is below the source's 32"),
        ({"num_layers": 1}, "num_layers 1 is below"),
        ({"vocab_size": 96}, "vocab_size 96 is below"),
        ({"num_positions": 47}, "num_positions 47 is below"),
        ({"num_heads": 8}, "head_dim must not change"),
        ({"num_features": 32, "num_heads": 4}, "at least one feature more"),
    ],
)
def test_a_shape_that_cannot_hold_the_source_is_refused(
    tiny_source: Path, out_dir: Path, change: dict[str, int], message: str
) -> None:
    shape = dataclasses.replace(TINY_SHAPES["wide"], **change)
    with pytest.raises(ValueError, match=message):
        pairs.build_widened(tiny_source, shape, out_dir)
    assert not out_dir.exists()


def test_a_directory_of_something_else_is_not_replaced(tiny_source: Path, out_dir: Path) -> None:
    out_dir.mkdir()
    (out_dir / "thesis.txt").write_text("ten years")
    with pytest.raises(ValueError, match="not a widened model"):
        pairs.build_widened(tiny_source, TINY_SHAPES["wide"], out_dir)
    assert (out_dir / "thesis.txt").exists()


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(ValueError, match="'gpt3'"):
        pairs.resolve_shape("gpt3")
