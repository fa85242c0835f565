"""The one decoder computes what `transformers` computes, for every architecture, however the tokens are cut."""

from __future__ import annotations

import dataclasses
import random

import pytest
import tiny_models
import torch
from torch import Tensor

from specengine.errors import BackendUnavailableError
from specengine.models.architectures import gpt_neox, opt
from specengine.models.checkpoints import open_checkpoint
from specengine.models.decoder import Decoder, ForwardBatch
from specengine.models.loader import LoadedModel, load_model
from specengine.ops.backend import Backend
from specengine.ops.load import load_backend

CPU = torch.device("cpu")
BLOCK_SIZE = 4
TOLERANCE = 1e-4

CONFIGS = [
    ("gpt2", {}),
    ("gpt2", {"tie_word_embeddings": False, "activation": "relu", "num_heads": 1, "vocab_size": 129}),
    ("gpt2", {"activation": "gelu", "intermediate_size": 48, "num_heads": 8, "hidden_size": 64}),
    ("gpt2", {"activation": "gelu_fast", "num_layers": 3, "layer_norm_epsilon": 1e-3, "vocab_size": 8}),
    ("gpt2", {"activation": "gelu_pytorch_tanh", "reorder_and_upcast_attn": True, "vocab_size": 512}),
    ("opt", {}),
    ("opt", {"activation": "gelu", "tie_word_embeddings": False, "num_heads": 2, "vocab_size": 8}),
    ("opt", {"enable_bias": False, "num_heads": 1, "num_layers": 1}),
    ("opt", {"layer_norm_elementwise_affine": False, "intermediate_size": 40}),
    ("gpt_neox", {}),
    ("gpt_neox", {"rotary_pct": 1.0, "activation": "gelu_new", "num_heads": 2, "vocab_size": 512}),
    ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5, "rotary_emb_base": 500}),
    (
        "gpt_neox",
        {
            "rotary_pct": 0.25,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "hidden_size": 64,
            "num_heads": 8,
        },
    ),
    ("gpt_neox", {"activation": "relu", "rotary_pct": 0.26, "hidden_size": 64, "vocab_size": 127}),
]
each_config = pytest.mark.parametrize(
    ("model_type", "overrides"), CONFIGS, ids=[f"{name}-{index}" for index, (name, _) in enumerate(CONFIGS)]
)
each_type = pytest.mark.parametrize("model_type", tiny_models.MODEL_TYPES)


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> Backend:
    try:
        return load_backend(request.param, CPU)
    except (ImportError, BackendUnavailableError) as error:
        pytest.skip(f"backend {request.param}: {error}")


def load(source: object, backend: Backend, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return load_model(open_checkpoint(source), dtype=dtype, device=CPU, backend=backend)


class PagedSequences:
    """Feeds ragged chunks of several sequences through one paged cache whose blocks are handed out at random."""

    def __init__(self, decoder: Decoder, num_sequences: int, seed: int = 0) -> None:
        spec = decoder.spec
        self.decoder = decoder
        blocks_each = -(-spec.max_positions // BLOCK_SIZE)
        num_blocks = num_sequences * blocks_each + 3
        shuffled = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
        table = shuffled[: num_sequences * blocks_each]
        self.block_table = table.view(num_sequences, blocks_each).int().contiguous()
        shape = (spec.num_layers, 2, num_blocks, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
        self.kv_cache = torch.full(shape, 1e4)  # what was never written must not be read
        self.lengths = [0] * num_sequences

    def feed(self, chunks: dict[int, list[int]]) -> list[Tensor]:
        """One forward of a chunk each for some sequences; returns each chunk's logits `[q_len, vocab]`."""
        positions, slots, token_ids, q_lens = [], [], [], [len(chunk) for chunk in chunks.values()]
        for row, chunk in chunks.items():
            for token_id in chunk:
                position = self.lengths[row]
                block = int(self.block_table[row, position // BLOCK_SIZE])
                positions.append(position)
                slots.append(block * BLOCK_SIZE + position % BLOCK_SIZE)
                token_ids.append(token_id)
                self.lengths[row] += 1
        batch = ForwardBatch(
            token_ids=torch.tensor(token_ids, dtype=torch.int32),
            positions=torch.tensor(positions, dtype=torch.int32),
            kv_slots=torch.tensor(slots),
            q_start=torch.tensor([0, *q_lens]).cumsum(0).int(),
            context_len=torch.tensor([self.lengths[row] for row in chunks], dtype=torch.int32),
            slots=torch.tensor(list(chunks), dtype=torch.int32),
            block_table=self.block_table,
            logit_rows=torch.arange(len(token_ids)),
        )
        vocab_size = self.decoder.spec.vocab_size
        logits = self.decoder.forward(batch, self.kv_cache, vocab_size)
        assert logits.dtype == torch.float32
        assert logits.shape[1] % 128 == 0
        assert (logits[:, vocab_size:] == float("-inf")).all()
        return list(logits[:, :vocab_size].split(q_lens))


def random_ids(count: int, vocab_size: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(vocab_size), k=count)


@torch.no_grad()
def expected_logits(model: torch.nn.Module, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids])).logits[0].float()


def worst_difference(
    model: torch.nn.Module, loaded: LoadedModel, *, length: int = 23, seed: int = 0
) -> float:
    ids = random_ids(length, loaded.decoder.spec.vocab_size, seed)
    (logits,) = PagedSequences(loaded.decoder, 1, seed).feed({0: ids})
    return float((logits - expected_logits(model, ids)).abs().max())


@each_config
def test_a_prompt_in_one_forward_gives_the_logits_of_transformers(
    model_type: str, overrides: dict[str, object], backend: Backend
) -> None:
    model = tiny_models.build_model(model_type, seed=1, **overrides)
    assert worst_difference(model, load(model, backend)) < TOLERANCE


@each_config
def test_random_chunks_of_a_ragged_batch_give_the_logits_of_transformers(
    model_type: str, overrides: dict[str, object], backend: Backend
) -> None:
    model = tiny_models.build_model(model_type, seed=2, **overrides)
    loaded = load(model, backend)
    rng = random.Random(model_type + str(overrides))
    prompts = [random_ids(count, loaded.decoder.spec.vocab_size, count) for count in (1, 17, 30, 41)]
    sequences = PagedSequences(loaded.decoder, len(prompts), seed=5)
    collected: list[list[Tensor]] = [[] for _ in prompts]
    while any(length < len(ids) for length, ids in zip(sequences.lengths, prompts, strict=True)):
        unfinished = [row for row, ids in enumerate(prompts) if sequences.lengths[row] < len(ids)]
        rows = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        chunks = {}
        for row in rows:
            start = sequences.lengths[row]
            chunks[row] = prompts[row][start : start + rng.choice((1, 1, 2, 5, 11))]
        for row, logits in zip(chunks, sequences.feed(chunks), strict=True):
            collected[row].append(logits)
    for ids, parts in zip(prompts, collected, strict=True):
        torch.testing.assert_close(torch.cat(parts), expected_logits(model, ids), atol=TOLERANCE, rtol=0)


@each_type
def test_the_last_position_of_the_context_is_usable(model_type: str, backend: Backend) -> None:
    model = tiny_models.build_model(model_type, max_positions=33)
    assert worst_difference(model, load(model, backend), length=33) < TOLERANCE


@each_type
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored_as", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_converted_from_any_stored_dtype_to_any_other(
    model_type: str, dtype: torch.dtype, stored_as: torch.dtype, backend: Backend, tmp_path
) -> None:
    if dtype not in backend.supported_dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    model = tiny_models.build_model(model_type, dtype=stored_as)
    loaded = load(tiny_models.save_checkpoint(tmp_path / "m", model), backend, dtype)
    assert loaded.checkpoint_dtype == stored_as
    # The oracle holds the same rounded weights in fp32: norms and biases as stored, the rest in `dtype`.
    oracle = model.float()
    with torch.no_grad():
        for parameter in oracle.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.to(dtype))
    # The native backend may round activations to bf16 where the weights are.
    is_rounding = backend.name == "native" and dtype == torch.bfloat16
    tolerance = 0.1 if is_rounding else TOLERANCE
    assert worst_difference(oracle, loaded) < tolerance
    layer = loaded.decoder.weights.layers[0]
    norm = layer.attention_norm
    assert {each.dtype for each in (norm.weight, norm.bias) if each is not None} == {torch.float32}


@each_type
def test_directories_shards_and_modules_load_to_the_same_bits(model_type: str, tmp_path) -> None:
    reference = load_backend("reference", CPU)
    model = tiny_models.build_model(model_type, seed=4)
    single = load(tiny_models.save_checkpoint(tmp_path / "single", model), reference)
    sharded_path = tiny_models.save_checkpoint(tmp_path / "sharded", model, max_shard_size=20_000)
    assert len(list(sharded_path.glob("model-*.safetensors"))) > 2
    ids = random_ids(20, 64, 0)
    expected = PagedSequences(single.decoder, 1).feed({0: ids})[0]
    for source in (sharded_path, model):
        assert torch.equal(PagedSequences(load(source, reference).decoder, 1).feed({0: ids})[0], expected)


@each_type
def test_a_base_model_without_prefix_or_head_loads_when_its_head_is_tied(model_type: str, tmp_path) -> None:
    model = tiny_models.build_model(model_type, tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path)
    assert worst_difference(model, load(tmp_path, load_backend("reference", CPU))) < TOLERANCE


def test_what_the_caller_does_to_a_module_later_does_not_reach_the_decoder() -> None:
    model = tiny_models.build_model("gpt2")
    loaded = load(model, load_backend("reference", CPU))
    ids = random_ids(9, 64, 0)
    before = PagedSequences(loaded.decoder, 1).feed({0: ids})[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(PagedSequences(loaded.decoder, 1).feed({0: ids})[0], before)


def test_a_tied_head_is_held_once_by_a_backend_that_packs_by_reference() -> None:
    loaded = load(tiny_models.build_model("gpt2"), load_backend("reference", CPU))
    assert loaded.decoder.weights.head.weight.data_ptr() == loaded.decoder.weights.token_table.data_ptr()


def test_rotary_settings_of_old_and_new_configs_mean_the_same() -> None:
    sizes = {key: value for key, value in gpt_neox.TINY.items() if key != "rotary_pct"}
    old = gpt_neox.Config.model_validate({**sizes, "rotary_pct": 0.5, "rotary_emb_base": 500})
    rope = {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_type": "default"}
    new = gpt_neox.Config.model_validate({**sizes, "rope_parameters": rope})
    assert gpt_neox.spec(old) == gpt_neox.spec(new)
    assert (gpt_neox.spec(new).rotary_dim, gpt_neox.spec(new).rotary_base) == (4, 500.0)


def test_the_comparison_notices_a_dropped_position_offset() -> None:
    model = tiny_models.build_model("opt")
    loaded = load(model, load_backend("reference", CPU))
    table = loaded.decoder.weights.position_table
    faulty = dataclasses.replace(loaded.decoder.weights, position_table=table.roll(opt.POSITION_OFFSET, 0))
    loaded = dataclasses.replace(loaded, decoder=Decoder(loaded.decoder.spec, faulty, loaded.decoder.backend))
    assert worst_difference(model, loaded) > 100 * TOLERANCE


def test_the_comparison_notices_ignored_head_interleaving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt_neox, "_ungroup_heads", lambda qkv, num_heads: qkv)
    model = tiny_models.build_model("gpt_neox")
    assert worst_difference(model, load(model, load_backend("reference", CPU))) > 100 * TOLERANCE


def test_the_comparison_notices_a_wrong_rotary_share_and_a_serial_residual() -> None:
    model = tiny_models.build_model("gpt_neox")
    loaded = load(model, load_backend("reference", CPU))
    for fault in ({"rotary_dim": 8}, {"rotary_base": 500.0}, {"parallel_residual": False}):
        spec = dataclasses.replace(loaded.decoder.spec, **fault)
        decoder = Decoder(spec, loaded.decoder.weights, loaded.decoder.backend)
        assert worst_difference(model, dataclasses.replace(loaded, decoder=decoder)) > 100 * TOLERANCE
