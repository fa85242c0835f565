"""What an architecture file is made of: a checked config, and how to read its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor

from specengine.kernels.types.grouped import GroupedWeight
from specengine.models.decoder import DecoderSpec

Weight = Tensor | GroupedWeight

# Far above every published model, far below what would exhaust memory while a config is only being read.
NumTokens = Annotated[int, Field(gt=0, le=1 << 22)]
NumPositions = Annotated[int, Field(gt=0, le=1 << 20)]
NumLayers = Annotated[int, Field(gt=0, le=1024)]
NumHeads = Annotated[int, Field(gt=0, le=1024)]
Width = Annotated[int, Field(gt=0, le=1 << 18)]
Epsilon = Annotated[float, Field(gt=0.0, lt=1.0)]

# The names that checkpoints use, by the function they mean.
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}


def _to_op_activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


Activation = Annotated[str, AfterValidator(_to_op_activation)]


def _must_be_absent(value: Any) -> None:
    if value:
        raise ValueError("specengine would compute something else than this checkpoint means")


# A key that changes the computation in a way we do not have: absent, null, false or empty, or refused.
Unsupported = Annotated[Any, AfterValidator(_must_be_absent)]


class ArchitectureConfig(BaseModel):
    """Allow-list of a checkpoint's config: unknown keys are ignored, known ones are typed and bounded."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    quantization_config: Unsupported = None
    is_encoder_decoder: Unsupported = None
    add_cross_attention: Unsupported = None
    pruned_heads: Unsupported = None

    def end_of_text_ids(self) -> tuple[int, ...]:
        """What `eos_token_id` lists, once each; negative ids, which some files have for none, are left out."""
        eos = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        return tuple(dict.fromkeys(token for token in eos if token is not None and token >= 0))

    def special_token_ids(self, vocab_size: int) -> dict[str, Any]:
        """The spec's `bos_token_id` and `eos_token_ids`; ids that the model cannot emit are no ids."""
        bos = self.bos_token_id
        return {
            "bos_token_id": bos if bos is not None and 0 <= bos < vocab_size else None,
            "eos_token_ids": tuple(token for token in self.end_of_text_ids() if token < vocab_size),
        }


def head_dim_of(hidden_size: int, num_heads: int) -> int:
    """Features of one head. Raises `ValueError` where the heads do not divide the hidden size."""
    if hidden_size % num_heads:
        raise ValueError(f"hidden size {hidden_size} is not divisible by {num_heads} attention heads")
    return hidden_size // num_heads


class TensorReader(Protocol):
    """Reads a checkpoint's tensors by name; raises `ModelLoadError` if missing or of another shape."""

    def __call__(self, name: str, *shape: int) -> Tensor: ...

    def matrix(self, name: str, out_features: int, in_features: int) -> Weight:
        """As stored, which may be by group; read in any other way the numbers themselves are handed out."""

    def first_of(self, names: tuple[str, ...], *shape: int) -> Tensor:
        """The first of `names` that the checkpoint has."""

    def table_and_head(
        self, table: str, heads: tuple[str, ...], *shape: int, is_tied: bool
    ) -> tuple[Weight, Weight | None]:
        """The token table and the head, as stored; the head is None where it is the table.

        is_tied: what the config says. The shared tensor may then stand under either name; a head that is stored
        and differs is a head of its own all the same, with a warning.
        """


@dataclass(frozen=True)
class LinearTensors:
    """weight `[out, in]`, any strides, or by group; bias `[out]` or None."""

    weight: Weight
    bias: Tensor | None


@dataclass(frozen=True)
class NormTensors:
    """weight and bias `[D]`; None = all ones, all zeros. An RMSNorm has no bias."""

    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class LayerTensors:
    """One layer as the checkpoint stores it. `qkv` rows: queries, keys, values, each head contiguous.

    mlp_up:    with `swiglu` rows gate, up, gate, up, …
    head_norm: `[2, head_dim]`, of the queries' and of the keys' heads, or None
    """

    attention_norm: NormTensors
    qkv: LinearTensors
    attention_output: LinearTensors
    mlp_norm: NormTensors
    mlp_up: LinearTensors
    mlp_down: LinearTensors
    head_norm: Tensor | None = None


@dataclass(frozen=True)
class OuterTensors:
    """What surrounds the layers. token_table, head `[V, D]`; position_table `[P, D]`; a tied head is None."""

    token_table: Weight
    position_table: Tensor | None
    final_norm: NormTensors
    head: Weight | None


class Architecture(Protocol):
    """The members of an architecture's module.

    MODEL_TYPE: the config's `model_type`
    PREFIXES:   what tensor names may begin with, tried in order
    TINY:       a config that tests build in a blink
    """

    MODEL_TYPE: str
    PREFIXES: tuple[str, ...]
    TINY: Mapping[str, object]
    Config: type[ArchitectureConfig]

    def spec(self, config: Any) -> DecoderSpec: ...

    def read_outer(self, read: TensorReader, config: Any) -> OuterTensors: ...

    def read_layer(self, read: TensorReader, config: Any, index: int) -> LayerTensors: ...
