"""Compiles every kernel at the sizes of real models for one GPU generation, and writes what came out as JSON.

    python tests/aot_suite.py 90 report.json [--all-dtypes | --one-of-each]

Run by test_ahead_of_time.py in a process of its own, without TRITON_INTERPRET. Nothing is launched: models and batches
are meta tensors, and the engine's own executor says which kernels it would launch on them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from aot import compile_launch, specialise
from torch import Tensor

from specengine.kernels.device.launch import Launch, assume_capability, record
from specengine.kernels.device.linear import row_widths
from specengine.kernels.types.drafts import DraftLaw, Drafts, Staging, Verdict
from specengine.kernels.types.packed import Norm, PackedLinear
from specengine.kernels.types.program import DrawKeys, ForwardBatch
from specengine.kernels.types.round import StateTensors
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.transforms import Transforms
from specengine.models.decoder import Decoder, DecoderSpec, DecoderWeights, LayerWeights
from specengine.ops.load import load_backend
from specengine.runtime.batch import Feed, FirstForward, begin_round, build_forward_batch

TRITON = load_backend("triton", torch.device("cuda"))
BLOCK_SIZE = 16
NUM_DRAFT = 8
# What the default report has: these in every type, and these in float16.
IN_EVERY_DTYPE = ("gpt2-medium", "pythia-1.4b")
IN_FLOAT16 = ("smollm2-135m", "qwen3-0.6b", "gpt2-xl")
BY_GROUP = ("smollm2-135m", "gpt2-medium")
WIDE = "gpt2-xl"  # too wide to be held
IN_PROMPTS, PROMPTS = ("gpt2-medium", "smollm2-135m"), (256, 512)
PROMPT_DTYPES = ("float16", "int8", "int4_min")
# What the report says of a launch's tile.
TILE = {"WIDTH", "HELD", "SPLIT_K", "BLOCK_M", "BLOCK_N", "BLOCK_K"}


@dataclass(frozen=True)
class Size:
    """A real model's shape: by default a GPT's, with `is_gated` one of Llama's family.

    head_norm: whether queries' and keys' heads are normed
    """

    width: int
    num_heads: int
    vocab_size: int
    max_positions: int
    activation: str
    rotary_dim: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 0
    is_gated: bool = False
    head_norm: bool = False

    def __post_init__(self) -> None:
        given = {
            "num_kv_heads": self.num_kv_heads or self.num_heads,
            "head_dim": self.head_dim or self.width // self.num_heads,
            "intermediate_size": self.intermediate_size or 4 * self.width,
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)

    def spec(self, num_layers: int) -> DecoderSpec:
        is_parallel = self.rotary_dim > 0 and not self.is_gated
        return DecoderSpec(
            architecture="gpt_neox" if is_parallel else "gpt2",
            vocab_size=self.vocab_size,
            hidden_size=self.width,
            num_layers=num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            max_positions=self.max_positions,
            norm_eps=1e-5,
            norm="rms" if self.is_gated else "layer",
            activation=self.activation,
            rotary_dim=self.rotary_dim,
            parallel_residual=is_parallel,
        )


def gated(*sizes: int, head_norm: bool = False) -> Size:
    """width, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size, max_positions"""
    width, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size, max_positions = sizes
    heads = (head_dim, num_kv_heads, head_dim, intermediate_size)
    return Size(width, num_heads, vocab_size, max_positions, "swiglu", *heads, True, head_norm)


SIZES = {
    "gpt2": Size(768, 12, 50257, 1024, "gelu_tanh"),
    "gpt2-medium": Size(1024, 16, 50257, 1024, "gelu_tanh"),
    "gpt2-xl": Size(1600, 25, 50257, 1024, "gelu_tanh"),
    "opt-1.3b": Size(2048, 32, 50272, 2048, "relu"),
    "pythia-1.4b": Size(2048, 16, 50304, 2048, "gelu", rotary_dim=32),
    "smollm2-135m": gated(576, 1536, 9, 3, 64, 49152, 8192),
    "llama-3.2-1b": gated(2048, 8192, 32, 8, 64, 128256, 131072),
    "qwen3-0.6b": gated(1024, 3072, 16, 8, 128, 151936, 40960, head_norm=True),
}
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
    "int4_min": 4,
    "int8_group": 8,
}
Storage = torch.dtype | int  # bits of weights by group


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def integers(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int32)


def linear(out_features: int, in_features: int, dtype: Storage, has_bias: bool = True) -> PackedLinear:
    if isinstance(dtype, int):
        row = row_widths(in_features, torch.uint8)[dtype == 8]
        rows = meta(out_features, row, dtype=torch.uint8)
        return PackedLinear(rows, meta(out_features) if has_bias else None, in_features, out_features)
    scale = meta(out_features) if dtype == torch.int8 else None
    bias = meta(out_features) if has_bias else None
    return PackedLinear(meta(out_features, in_features, dtype=dtype), bias, in_features, out_features, scale)


def float_of(dtype: Storage) -> torch.dtype:
    """Of tables and keys."""
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float16


def build_decoder(size: Size, dtype: Storage, num_layers: int = 1) -> Decoder:
    width, has_bias = size.width, not size.is_gated
    norm = Norm(meta(width), meta(width) if has_bias else None, 1e-5)
    attended = size.num_heads * size.head_dim
    qkv_width = attended + 2 * size.num_kv_heads * size.head_dim
    layer = LayerWeights(
        attention_norm=norm,
        qkv=linear(qkv_width, width, dtype, has_bias),
        attention_output=linear(width, attended, dtype, has_bias),
        mlp_norm=norm,
        mlp_up=linear((1 + size.is_gated) * size.intermediate_size, width, dtype, has_bias),
        mlp_down=linear(width, size.intermediate_size, dtype, has_bias),
        head_norm=meta(2, size.head_dim) if size.head_norm else None,
    )
    table_dtype = float_of(dtype)
    weights = DecoderWeights(
        token_table=meta(size.vocab_size, width, dtype=table_dtype),
        position_table=None if size.rotary_dim else meta(size.max_positions, width, dtype=table_dtype),
        layers=(layer,) * num_layers,
        final_norm=norm,
        head=linear(size.vocab_size, width, dtype, has_bias=False),
    )
    return Decoder(size.spec(num_layers), weights, TRITON)


def build_batch(size: Size, num_sequences: int, q_len: int) -> ForwardBatch:
    num_rows, num_slots, max_blocks = num_sequences * q_len, 64, size.max_positions // BLOCK_SIZE
    tables = (integers(num_slots, size.max_positions), integers(num_slots, max_blocks))
    lengths = [integers(num_sequences) for _ in range(4)]
    token_ids, positions, kv_slots, q_start, context_len, logit_rows = TRITON.expand_batch(
        *tables, *lengths, BLOCK_SIZE, num_tokens=num_rows, num_logit_rows=num_rows
    )
    where = (token_ids, positions, kv_slots, q_start, context_len)
    return ForwardBatch(*where, integers(num_sequences), tables[1], logit_rows)


def forward_launches(size: Size, dtype: Storage, num_layers: int = 1) -> list[Launch]:
    """What a verification of k drafts launches, logits with statistics and draws without logits, and what a draft;
    and how rounds with and without drafts begin."""
    kv_dtype = float_of(dtype)
    kv_cache = meta(num_layers, 2, 640, size.num_kv_heads, BLOCK_SIZE, size.head_dim, dtype=kv_dtype)
    off = DrawKeys(SamplingRows.empty(1, "meta"), has_filters=False)
    tokens, one = integers(64, size.max_positions), integers(1)
    staging = Staging(1, tokens, one, one, one, integers(1, NUM_DRAFT), one)
    feed, table = Feed(one, one, one, 1, 1), integers(64, size.max_positions // BLOCK_SIZE)
    with record() as launches:
        decoder, batch = build_decoder(size, dtype, num_layers), build_batch(size, 1, NUM_DRAFT + 1)
        decoder.forward(batch, kv_cache, size.vocab_size)
        decoder.forward_stats(batch, kv_cache, size.vocab_size, off)
        decoder.draw(batch, kv_cache, size.vocab_size, off)
        entry = (off.rows, decoder.weights.token_table, decoder.weights.position_table)
        draft = build_forward_batch(TRITON, tokens, table, one, feed, entry, block_size=BLOCK_SIZE)
        decoder.draw(draft, kv_cache, size.vocab_size, off, staging)
        verified = feed._replace(num_more=one)
        build_forward_batch(TRITON, tokens, table, one, verified, entry, block_size=BLOCK_SIZE)
        state = StateTensors(tokens, table, *(integers(64) for _ in range(3)))
        for k, num_fed in ((0, 1), (NUM_DRAFT, 1), (NUM_DRAFT, 2)):
            first = FirstForward(num_fed, BLOCK_SIZE, *entry[1:])
            begin_round(TRITON, state, one, off.rows, first, k=k, draft_positions=1024)
    return launches


def prompt_launches(size: Size, dtype: Storage, num_tokens: int) -> list[Launch]:
    """What a chunk of a prompt launches."""
    kv_cache = meta(1, 2, 640, size.num_kv_heads, BLOCK_SIZE, size.head_dim, dtype=float_of(dtype))
    with record() as launches:
        build_decoder(size, dtype).forward(build_batch(size, 1, num_tokens), kv_cache, size.vocab_size)
    return launches


def verification_launches(num_sequences: int = 1, row_length: int = 50304) -> list[Launch]:
    """What the ops on logits launch."""
    num_rows = num_sequences * (NUM_DRAFT + 1)
    logits, stats, where = meta(num_rows, row_length), meta(num_rows, 4), integers(num_rows)
    each_row = SamplingRows.empty(num_rows, "meta")
    drafts = Drafts(*(integers(num_sequences) for _ in range(3)), integers(num_sequences, NUM_DRAFT))
    shape = (num_sequences, NUM_DRAFT)
    law = DraftLaw(meta(*shape), meta(*shape, row_length), meta(*shape, 4))
    verdict = Verdict(
        integers(num_sequences, NUM_DRAFT + 1), integers(num_sequences), integers(num_sequences)
    )
    judged_by = (SamplingRows.empty(num_sequences, "meta"), integers(num_sequences), verdict)
    with record() as launches:
        TRITON.filter_rows(logits, each_row)
        for stream in (0, 1):
            TRITON.sample_rows(logits, stats, each_row, where, stream, where)
        TRITON.token_logprobs(logits, where, 5)
        TRITON.match_verify(logits, stats, drafts, *judged_by)
        for each in (law, law._replace(has_law=meta(num_sequences, dtype=torch.bool)), None):
            TRITON.rejection_verify(logits, stats, drafts._replace(law=each), *judged_by)
            TRITON.block_verify(logits, stats, drafts._replace(law=each), *judged_by)
        TRITON.threshold_verify(logits, stats, drafts, *judged_by)
        TRITON.typical_verify(logits, stats, drafts, *judged_by)
    return launches


def short_head_launches(num_tokens: int = 8192, vocab_size: int = 50257, width: int = 768) -> list[Launch]:
    """What the ops on a head of some tokens launch."""
    num_rows, norm = NUM_DRAFT + 1, Norm(meta(width), meta(width), 1e-5)
    layer = (
        meta(num_rows, width),
        norm,
        linear(num_tokens, width, torch.float16, has_bias=False),
        vocab_size,
    )
    each_row, token_ids = SamplingRows.empty(num_rows, "meta"), integers(num_tokens)
    with record() as launches:
        TRITON.head(*layer, token_ids=token_ids)
        where = integers(num_rows)
        TRITON.head_draw(*layer, each_row, where, has_filters=False, token_ids=token_ids)
    return launches


def round_launches(num_sequences: int, row_length: int = 50304) -> list[Launch]:
    """What a round's bookkeeping launches: with and without the draft's law, and with and without forced acceptance."""
    num_rows, num_slots = num_sequences * (NUM_DRAFT + 1), 65
    tokens, state = integers(num_slots, 1024), [integers(num_slots) for _ in range(3)]
    of_sequence, drafts = integers(num_sequences), integers(num_sequences, NUM_DRAFT)
    number = meta(num_sequences)
    law = (number, meta(num_sequences, row_length), meta(num_sequences, 4))
    shape = (num_sequences, NUM_DRAFT)
    kept = (meta(*shape), meta(*shape, row_length), meta(*shape, 4))
    results = (integers(num_sequences, NUM_DRAFT + 1), of_sequence, of_sequence)
    with record() as launches:
        plan = TRITON.plan_round(of_sequence, *state, NUM_DRAFT, 1024)
        rows = (integers(num_sequences + 1), integers(num_rows), meta(num_rows, dtype=torch.int64))
        table = integers(num_slots, 16)
        transforms = Transforms(tokens, integers(num_slots), table, meta(num_slots, 16), *[table] * 5)
        logits = meta(num_rows, row_length)
        asked = SamplingRows.empty(num_sequences, "meta")
        TRITON.transform_rows(logits, asked, of_sequence, *rows, transforms, num_rows=integers(1))
        TRITON.row_keys(SamplingRows.empty(num_sequences, "meta"), *rows, num_rows=integers(1))
        staged = (tokens, of_sequence, plan.seq_len, plan.is_drafting[1], of_sequence)
        TRITON.stage_draft(1, *staged, of_sequence, drafts, of_sequence)
        TRITON.stage_draft(1, *staged, None, drafts, of_sequence, *law, *kept)
        judged = Drafts(of_sequence, plan.seq_len, of_sequence, drafts)
        judged_by = (SamplingRows.empty(num_sequences, "meta"), plan.is_running, Verdict(*results))
        for forced in (None, 0.7):
            drawn = (integers(num_rows), integers(num_rows), judged, *judged_by)
            TRITON.match_draws(*drawn, forced)
            TRITON.commit_draws(*drawn, tokens, *state[:2], of_sequence, forced)
        ended = (of_sequence, plan.seq_len, plan.is_running, *results[:2], of_sequence, of_sequence)
        TRITON.commit_round(tokens, *state[:2], *ended)
    return launches


def num_kernels_a_layer(size: Size) -> int:
    """Kernels of two layers less those of one, in one forward of the four recorded ones."""
    one, two = (len(forward_launches(size, torch.float16, count)) for count in (1, 2))
    return (two - one) // 4


def all_launches(*, all_dtypes: bool) -> Iterator[tuple[str, Launch]]:
    """Every distinct specialisation, with the model and type it is for."""
    seen: set[str] = set()

    def new(launches: list[Launch]) -> Iterator[Launch]:
        for launch in launches:
            key = repr(
                (launch.name, *specialise(launch), launch.num_warps, launch.num_stages, launch.max_registers)
            )
            if key not in seen:
                seen.add(key)
                yield launch

    for launch in new(verification_launches()):
        yield "verification", launch
    for num_sequences in (1, 64):
        for launch in new(round_launches(num_sequences)):
            yield "round", launch
    for launch in new(short_head_launches()):
        yield "some tokens float16", launch
    for name, size in SIZES.items():
        for dtype_name, dtype in DTYPES.items():
            is_grouped = isinstance(dtype, int)
            is_default = name in (BY_GROUP if is_grouped else IN_EVERY_DTYPE)
            is_default |= name in IN_FLOAT16 and dtype == torch.float16
            is_default |= name == WIDE and dtype == torch.int8
            if all_dtypes or is_default:
                for launch in new(forward_launches(size, dtype)):
                    yield f"{name} {dtype_name}", launch
    prompts = itertools.product(IN_PROMPTS, PROMPT_DTYPES, PROMPTS)
    wide = ((WIDE, dtype_name, PROMPTS[0]) for dtype_name in ("float16", "int8"))
    for name, dtype_name, num_tokens in (*prompts, *wide):
        for launch in new(prompt_launches(SIZES[name], DTYPES[dtype_name], num_tokens)):
            yield f"{name} prompt of {num_tokens} {dtype_name}", launch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int, choices=(80, 90))
    parser.add_argument("report", type=Path)
    parser.add_argument("--all-dtypes", action="store_true")
    parser.add_argument("--one-of-each", action="store_true", help="one launch of each kernel")
    arguments = parser.parse_args()
    assume_capability(arguments.capability)
    found = list(all_launches(all_dtypes=arguments.all_dtypes))
    if arguments.one_of_each:
        found = list({launch.name: (model, launch) for model, launch in reversed(found)}.values())
    kernels = [
        {
            "model": model,
            "grid": launch.grid,
            "num_stages": launch.num_stages,
            "num_warps": launch.num_warps,
            "weight_bytes": getattr(launch.arguments.get("weight_ptr"), "nbytes", 0),
            "tile": {name: launch.arguments[name] for name in launch.arguments.keys() & TILE},
            **asdict(compile_launch(launch, arguments.capability)),
        }
        for model, launch in found
    ]
    layers = {name: num_kernels_a_layer(size) for name, size in SIZES.items()}
    arguments.report.write_text(json.dumps({"kernels": kernels, "kernels_a_layer": layers}), encoding="utf-8")


if __name__ == "__main__":
    main()
