"""Widen a small trained GPT-2 to a real size without changing the function it computes.

A widened pair keeps the natural acceptance of the pair it came from and costs what the real size costs, so that
speed can be measured honestly where no checkpoint can be downloaded. The recipe, for a source of `d`
features widened to `D`:

* Every writer into the residual stream (both embeddings, both output projections and their biases) is centred over
  the feature axis. LayerNorm removes the mean anyway, so nothing changes, and from here on the mean is 0.
* Features `d..D` of the residual stream are 0: the mean stays 0 and the variance shrinks by `d / D`. LayerNorm
  weights are multiplied by `sqrt(d / D)` and its epsilon by `d / D`, which cancels exactly.
* Extra heads and MLP columns compute with random weights, and their output rows are 0. In extra layers half of the
  values and MLP columns do; the other half is 0 and meets random output rows: no two matrices are alike, so that no
  runtime that shares equal constants reads fewer bytes than a real checkpoint has.
* The head is untied, for it needs the embedding as it was before centring.
* Vocabulary rows beyond the source's read -60 from feature `d`, which is always 1 after the final norm (its bias).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from specengine import bundled

BUNDLED = bundled.target_path().parent
RECIPE_VERSION = 2
PADDED_LOGIT = -60.0
RANDOM_SCALE = 0.02
FILES_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
SLOW_TOKENIZER_FILES = ("vocab.json", "merges.txt", "added_tokens.json")
MARKER = "widened.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """A GPT-2 shape. `num_inner` 0 means four times the features."""

    num_features: int
    num_layers: int
    num_heads: int
    vocab_size: int = 50257
    num_positions: int = 1024
    num_inner: int = 0

    @property
    def inner(self) -> int:
        """Columns of the MLP."""
        return self.num_inner or 4 * self.num_features


SHAPES = {
    "distilgpt2": Shape(num_features=768, num_layers=6, num_heads=12),
    "gpt2": Shape(num_features=768, num_layers=12, num_heads=12),
    "gpt2-medium": Shape(num_features=1024, num_layers=24, num_heads=16),
    "gpt2-large": Shape(num_features=1280, num_layers=36, num_heads=20),
    "gpt2-xl": Shape(num_features=1600, num_layers=48, num_heads=25),
}

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


def resolve_shape(shape: str | Shape) -> Shape:
    """A named shape, or the shape itself."""
    if isinstance(shape, Shape):
        return shape
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {sorted(SHAPES)}, got {shape!r}")
    return SHAPES[shape]


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a GPT-2 `config.json` describes."""
    return Shape(
        num_features=config["n_embd"],
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        vocab_size=config["vocab_size"],
        num_positions=config["n_positions"],
        num_inner=config.get("n_inner") or 0,
    )


def check_widening(source: Shape, target: Shape) -> None:
    """Raise `ValueError` where `target` cannot hold `source`."""
    for name in ("num_features", "num_layers", "num_heads", "vocab_size", "num_positions", "inner"):
        if getattr(target, name) < getattr(source, name):
            raise ValueError(f"{name} {getattr(target, name)} is below the source's {getattr(source, name)}")
    source_head, target_head = source.num_features / source.num_heads, target.num_features / target.num_heads
    if source_head != target_head:
        raise ValueError(f"head_dim must not change: the source has {source_head}, the shape {target_head}")
    if target.vocab_size > source.vocab_size and target.num_features == source.num_features:
        raise ValueError("padding the vocabulary needs at least one feature more than the source has")


def centred(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in fp64 without its mean over the last (feature) axis."""
    tensor = tensor.double()
    return tensor - tensor.mean(dim=-1, keepdim=True)


class Widener:
    """Builds the widened tensors of one source, one at a time, each already in the wanted dtype."""

    def __init__(self, source: Shape, target: Shape, *, dtype: torch.dtype, seed: int) -> None:
        self.source, self.target, self.dtype = source, target, dtype
        self._generator = torch.Generator().manual_seed(seed)
        self._norm_scale = math.sqrt(source.num_features / target.num_features)

    def random(self, *size: int) -> torch.Tensor:
        """N(0, 0.02²), as GPT-2 is initialised."""
        return torch.empty(size).normal_(0.0, RANDOM_SCALE, generator=self._generator).to(self.dtype)

    def zeros(self, *size: int) -> torch.Tensor:
        """Zeros in the wanted dtype."""
        return torch.zeros(size, dtype=self.dtype)

    def norm(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """LayerNorm parameters `[d]` → `[D]`; padded features have weight 1 (they read 0) and bias 0."""
        width = self.source.num_features
        new_weight = torch.ones(self.target.num_features, dtype=self.dtype)
        new_bias = self.zeros(self.target.num_features)
        new_weight[:width] = (weight.double() * self._norm_scale).to(self.dtype)
        new_bias[:width] = bias.to(self.dtype)
        return new_weight, new_bias

    def reader(
        self, weight: torch.Tensor, bias: torch.Tensor, columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A projection that reads the stream, `[d, c]` → `[D, columns]`: random rows (they read 0) and columns."""
        rows, width = weight.shape
        new_weight, new_bias = self.random(self.target.num_features, columns), self.random(columns)
        new_weight[:rows, :width] = weight.to(self.dtype)
        new_bias[:width] = bias.to(self.dtype)
        return new_weight, new_bias

    def query_key_value(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`c_attn`, `[d, 3d]` → `[D, 3D]`: query, key and value are widened each on its own."""
        parts = zip(weight.chunk(3, dim=-1), bias.chunk(3), strict=True)
        widened = [self.reader(part, part_bias, self.target.num_features) for part, part_bias in parts]
        return torch.cat([part for part, _ in widened], dim=-1), torch.cat([part for _, part in widened])

    def writer(
        self, weight: torch.Tensor, bias: torch.Tensor, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A projection that writes the stream, `[r, d]` → `[rows, D]`: centred; extra rows and features are 0."""
        source_rows, width = weight.shape
        new_weight, new_bias = (
            self.zeros(rows, self.target.num_features),
            self.zeros(self.target.num_features),
        )
        new_weight[:source_rows, :width] = centred(weight).to(self.dtype)
        new_bias[:width] = centred(bias).to(self.dtype)
        return new_weight, new_bias

    def embedding(self, table: torch.Tensor, rows: int) -> torch.Tensor:
        """`[r, d]` → `[rows, D]`, centred; rows that the source lacks are random, with the table's own deviation."""
        source_rows, width = table.shape
        table = centred(table)
        extra = centred(self.random(rows - source_rows, width)) / RANDOM_SCALE * table.std()
        widened = self.zeros(rows, self.target.num_features)
        widened[:, :width] = torch.cat([table, extra]).to(self.dtype)
        return widened

    def head(self, embedding: torch.Tensor) -> torch.Tensor:
        """`[v, d]` → `[V, D]`: reads -60 from feature d in padded rows; padded features are 0 after the norm."""
        rows, width = embedding.shape
        weight = self.random(self.target.vocab_size, self.target.num_features)
        weight[:rows, :width] = embedding.to(self.dtype)
        weight[rows:, :width] = 0.0
        if width < self.target.num_features:
            weight[:rows, width] = 0.0
            weight[rows:, width] = PADDED_LOGIT
        return weight

    def layer(self, tensors: Tensors) -> Tensors:
        """One transformer block; names are relative to it (`ln_1.weight`, …)."""
        wide, inner = self.target.num_features, self.target.inner
        pairs = {
            "ln_1": self.norm(*_pair(tensors, "ln_1")),
            "attn.c_attn": self.query_key_value(*_pair(tensors, "attn.c_attn")),
            "attn.c_proj": self.writer(*_pair(tensors, "attn.c_proj"), wide),
            "ln_2": self.norm(*_pair(tensors, "ln_2")),
            "mlp.c_fc": self.reader(*_pair(tensors, "mlp.c_fc"), inner),
            "mlp.c_proj": self.writer(*_pair(tensors, "mlp.c_proj"), inner),
        }
        return _flatten(pairs)

    def silent_layer(self) -> Tensors:
        """A block that costs what a block costs and adds 0: of whatever a writer multiplies, one factor is 0."""
        wide, inner = self.target.num_features, self.target.inner
        ones = torch.ones(wide, dtype=self.dtype)
        values, value_bias = self.half_silent_reader(wide)
        pairs = {
            "ln_1": (ones.clone(), self.zeros(wide)),
            "attn.c_attn": (
                torch.cat([self.random(wide, 2 * wide), values], dim=-1),
                torch.cat([self.random(2 * wide), value_bias]),
            ),
            "attn.c_proj": self.half_silent_writer(wide),
            "ln_2": (ones.clone(), self.zeros(wide)),
            "mlp.c_fc": self.half_silent_reader(inner),
            "mlp.c_proj": self.half_silent_writer(inner),
        }
        return _flatten(pairs)

    def half_silent_reader(self, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`[D, columns]`, random; the first half of what it gives is 0."""
        weight, bias = self.random(self.target.num_features, columns), self.random(columns)
        weight[:, : columns // 2] = 0.0
        bias[: columns // 2] = 0.0
        return weight, bias

    def half_silent_writer(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`[rows, D]`, random for the half of its input that is 0, and 0 for the rest."""
        weight = self.random(rows, self.target.num_features)
        weight[rows // 2 :] = 0.0
        return weight, self.zeros(self.target.num_features)


def _pair(tensors: Tensors, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tensors[f"{name}.weight"], tensors[f"{name}.bias"]


def _flatten(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Tensors:
    weights = {f"{name}.weight": weight for name, (weight, _) in pairs.items()}
    return weights | {f"{name}.bias": bias for name, (_, bias) in pairs.items()}


def _without_prefix(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Names as in `GPT2Model`; causal-mask buffers of old checkpoints are dropped."""
    return {
        name.removeprefix("transformer."): tensor
        for name, tensor in tensors.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }


def _with_both_tables(tensors: Tensors) -> Tensors:
    """A tied table stands under one of its two names, or both."""
    for name, other in (("wte.weight", "lm_head.weight"), ("lm_head.weight", "wte.weight")):
        if name not in tensors:
            tensors = {**tensors, name: tensors[other]}
    return tensors


def layer_places(num_layers: int, wanted: int) -> list[int]:
    """Where the source's layers go among `wanted`: evenly spread, the last one last (early exit stays meaningful)."""
    return [(i + 1) * wanted // num_layers - 1 for i in range(num_layers)]


def widen(
    state_dict: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    shape: str | Shape,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensors, Config]:
    """The same function in a larger shape.

    `state_dict` holds a GPT-2 checkpoint's tensors (`transformer.` prefix or not, head tied or not), `config` its
    `config.json`. In fp32 the logits over the source's vocabulary agree to 1e-4; every further entry has the logit
    -60. Raises `ValueError` where the shape is too small or would change the head size.
    """
    source, target = shape_of(config), resolve_shape(shape)
    check_widening(source, target)
    tensors = _with_both_tables(_without_prefix(state_dict))
    widener = Widener(source, target, dtype=dtype, seed=seed)
    widened = {
        "wte.weight": widener.embedding(tensors["wte.weight"], target.vocab_size),
        "wpe.weight": widener.embedding(tensors["wpe.weight"], target.num_positions),
    }
    places = layer_places(source.num_layers, target.num_layers)
    for index in range(target.num_layers):
        if index in places:
            prefix = f"h.{places.index(index)}."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            layer = widener.layer(own)
        else:
            layer = widener.silent_layer()
        widened |= {f"h.{index}.{name}": tensor for name, tensor in layer.items()}
    weight, bias = widener.norm(*_pair(tensors, "ln_f"))
    if source.num_features < target.num_features:
        bias[source.num_features] = 1.0
    widened |= {"ln_f.weight": weight, "ln_f.bias": bias}
    head = widener.head(tensors["lm_head.weight"])
    result = {f"transformer.{name}": tensor for name, tensor in widened.items()}
    return result | {"lm_head.weight": head}, widen_config(config, target, dtype)


def widen_config(config: Mapping[str, Any], target: Shape, dtype: torch.dtype) -> Config:
    """The source's `config.json` with the new sizes, the scaled epsilon and an untied head."""
    name = str(dtype).removeprefix("torch.")
    sizes = {
        "n_embd": target.num_features,
        "n_layer": target.num_layers,
        "n_head": target.num_heads,
        "n_inner": target.inner,
        "n_positions": target.num_positions,
        "n_ctx": target.num_positions,
        "vocab_size": target.vocab_size,
    }
    epsilon = config.get("layer_norm_epsilon", 1e-5) * config["n_embd"] / target.num_features
    rest = {"layer_norm_epsilon": epsilon, "tie_word_embeddings": False, "dtype": name, "torch_dtype": name}
    return {**config, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **sizes, **rest}


def source_directory(name: str | Path) -> Path:
    """`"target"` and `"draft"` are the bundled models; anything else is a directory."""
    return BUNDLED / str(name) if str(name) in ("target", "draft") else Path(name)


def content_key(source: Path, shape: Shape, dtype: torch.dtype) -> str:
    """SHA-256 over everything that a widened directory depends on."""
    recipe = {"version": RECIPE_VERSION, "shape": asdict(shape), "dtype": str(dtype)}
    state = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    slow = [name for name in SLOW_TOKENIZER_FILES if (source / name).exists()]
    for name in ("config.json", "model.safetensors", *FILES_BESIDE, *slow):
        path = source / name
        state.update(name.encode() + (path.read_bytes() if path.exists() else b""))
    return state.hexdigest()


def build_widened(
    source: str | Path, shape: str | Shape, out_dir: str | Path, *, dtype: torch.dtype = torch.float32
) -> Path:
    """Write `source` (a directory, or `"target"`/`"draft"`), widened to `shape`, as a Hugging Face directory.

    Does nothing when `out_dir` already holds exactly that. Returns `out_dir`; it is written elsewhere first and
    renamed, so it is never half there. Refuses (`ValueError`) to replace a directory that it did not write.
    """
    directory, out = source_directory(source), Path(out_dir)
    wanted = resolve_shape(shape)
    key = content_key(directory, wanted, dtype)
    marker = out / MARKER
    if marker.exists() and json.loads(marker.read_text()).get("key") == key:
        return out
    if out.exists() and not marker.exists() and any(out.iterdir()):
        raise ValueError(f"out_dir {out} holds files that are not a widened model")
    config = json.loads((directory / "config.json").read_text())
    tensors, new_config = widen(load_file(directory / "model.safetensors"), config, wanted, dtype=dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        (new / "config.json").write_text(json.dumps(new_config, indent=2) + "\n")
        for name in (*FILES_BESIDE, *SLOW_TOKENIZER_FILES):
            if (directory / name).exists():
                shutil.copyfile(directory / name, new / name)
        (new / MARKER).write_text(
            json.dumps({"key": key, "shape": asdict(wanted), "source": str(source)}) + "\n"
        )
        if out.exists():
            shutil.rmtree(out)
        new.rename(out)
    return out


def build_pair(
    target_shape: str | Shape,
    draft_shape: str | Shape,
    out_dir: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    target: str | Path = "target",
    draft: str | Path = "draft",
) -> tuple[Path, Path]:
    """(target directory, draft directory) below `out_dir`: the bundled pair at two real sizes.

    Both shapes must have the same vocabulary. A second call with the same arguments only checks the hashes.
    """
    wanted_target, wanted_draft = resolve_shape(target_shape), resolve_shape(draft_shape)
    if wanted_target.vocab_size != wanted_draft.vocab_size:
        raise ValueError(f"vocab_size differs: {wanted_target.vocab_size} and {wanted_draft.vocab_size}")
    out, suffix = Path(out_dir), str(dtype).removeprefix("torch.")
    target_out = out / f"target-{_shape_name(target_shape)}-{suffix}"
    draft_out = out / f"draft-{_shape_name(draft_shape)}-{suffix}"
    return (
        build_widened(target, wanted_target, target_out, dtype=dtype),
        build_widened(draft, wanted_draft, draft_out, dtype=dtype),
    )


def _shape_name(shape: str | Shape) -> str:
    if isinstance(shape, str):
        return shape
    return f"{shape.num_features}x{shape.num_layers}-{shape.vocab_size}"
