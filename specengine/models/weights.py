"""From a checkpoint's tensors to a decoder's packed weights, one layer at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specengine.errors import ModelLoadError
from specengine.json_file import shorten
from specengine.kernels.types.grouped import GroupedWeight, numbers
from specengine.kernels.types.packed import Norm, PackedLinear
from specengine.models.architecture import LayerTensors, LinearTensors, NormTensors, OuterTensors, Weight
from specengine.models.checkpoints.tensors import TensorSource
from specengine.models.decoder import DecoderSpec, DecoderWeights, LayerWeights
from specengine.models.registry import ConfiguredModel
from specengine.ops.backend import Backend
from specengine.translation import Translation
from specengine.weight_formats import WeightFormat, float_format

Progress = Callable[[int, int], None]

# What torch.compile, FSDP and activation checkpointing put into names, anywhere; data parallelism puts its own first.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PARALLEL_WRAPPER = "module"

_FLOAT16_OVERFLOW = 65520.0  # rounds to infinity


def read_weights(
    model: ConfiguredModel,
    source: TensorSource,
    *,
    dtype: torch.dtype,
    format: WeightFormat | None,
    head_format: WeightFormat | None = None,
    device: torch.device,
    backend: Backend,
    progress: Progress | None,
    translation: Translation | None = None,
    head_tokens: Sequence[int] | None = None,
) -> tuple[DecoderWeights, str]:
    """Converts and packs a checkpoint: linear layers to `format`, tables to `dtype`.

    format:      None: `dtype` for floats, and weights by group stay as they are stored
    head_format: of the head; None: as other linear layers
    translation: gives token table and head the ids of another vocabulary
    head_tokens: the head has only these, ascending, of that vocabulary; None: all

    No more than one layer is ever held twice. Returns the weights, and what linear layers were packed as by the names
    of `weight_dtype`: one, or several with a + between.
    Every name and shape is checked before the first tensor is loaded: raises `ModelLoadError` naming the
    tensor, the expected and the found shape.
    """
    rehearsal = CheckpointReader(source, model.architecture.PREFIXES)
    model.architecture.read_outer(rehearsal, model.config)
    for index in range(model.spec.num_layers):
        model.architecture.read_layer(rehearsal, model.config, index)
    read = _LoadingReader(source, model.architecture.PREFIXES, rehearsal.num_bytes, progress)
    pack = _Packer(model.spec, dtype, format, device, backend)
    weights = _build(model, read, pack, translation, head_format or format, head_tokens)
    return weights, "+".join(sorted(pack.formats))


class CheckpointReader:
    """Checks names and shapes, and hands out tensors without storage."""

    def __init__(self, source: TensorSource, prefixes: tuple[str, ...]) -> None:
        self.num_bytes = 0
        self._source = source
        self._prefixes = prefixes
        self._stored_names = _unwrapped(source)

    def __call__(self, name: str, *shape: int) -> Tensor:
        return self.first_of((name,), *shape)

    def first_of(self, names: tuple[str, ...], *shape: int) -> Tensor:
        """The first of `names`, under any prefix, that the checkpoint has."""
        return numbers(self._first_stored(names, shape))

    def matrix(self, name: str, out_features: int, in_features: int) -> Weight:
        """See `TensorReader`."""
        return self._first_stored((name,), (out_features, in_features))

    def _first_stored(self, names: tuple[str, ...], shape: tuple[int, ...]) -> Weight:
        found = self._find(names)
        if found is None:
            names_tried = " or ".join(self._candidates(names))
            raise ModelLoadError(
                f"{self._source.origin}: tensor {names_tried} of shape {list(shape)} is missing"
            )
        return self._checked(found, shape)

    def table_and_head(
        self, table: str, heads: tuple[str, ...], *shape: int, is_tied: bool
    ) -> tuple[Weight, Weight | None]:
        """See `TensorReader`."""
        if not is_tied:
            return self._first_stored((table,), shape), self._first_stored(heads, shape)
        token_table = self._first_stored((table, *heads), shape)
        stored_table, stored_head = self._find((table, *heads)), self._find(heads)
        if stored_head is None or stored_head == stored_table:
            return token_table, None
        head = self._checked(stored_head, shape)
        if _is_equal(token_table, head):
            return token_table, None
        warnings.warn(
            f"{self._source.origin}: {stored_head} differs from {stored_table}, which the config says it is "
            "(tie_word_embeddings); the stored one is used",
            stacklevel=2,
        )
        return token_table, head

    def _candidates(self, names: tuple[str, ...]) -> list[str]:
        return [prefix + name for name in names for prefix in self._prefixes]

    def _find(self, names: tuple[str, ...]) -> str | None:
        stored = (self._stored_names.get(name) for name in self._candidates(names))
        return next((name for name in stored if name is not None), None)

    def _checked(self, found: str, shape: tuple[int, ...]) -> Weight:
        info = self._source.tensors[found]
        if info.shape != shape:
            raise ModelLoadError(
                f"{self._source.origin}: tensor {found}: "
                f"expected shape {list(shape)} by the config, found {shorten(list(info.shape))}"
            )
        if info.dtype is None:
            raise ModelLoadError(
                f"{self._source.origin}: tensor {found} is not stored as 16, 32 or 64 bit floats"
            )
        self.num_bytes += info.num_bytes
        return self._read(found, shape, info.dtype)

    def _read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Weight:
        return torch.empty(shape, dtype=dtype, device="meta")


def _unwrapped(source: TensorSource) -> dict[str, str]:
    """The names that tensors are stored under, by what they are called without the wrappers of training."""
    stored: dict[str, str] = {}
    for name in source.tensors:
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        plain = ".".join(parts[1:] if parts[:1] == [_PARALLEL_WRAPPER] else parts)
        if plain in stored:
            raise ModelLoadError(
                f"{source.origin}: tensors {shorten(stored[plain])} and {shorten(name)} are both {shorten(plain)}"
            )
        stored[plain] = name
    return stored


def _is_equal(first: Weight, second: Weight) -> bool:
    """Whether two tensors of one shape are stored as the same numbers; in a rehearsal nobody knows yet."""
    if isinstance(first, GroupedWeight) or isinstance(second, GroupedWeight):
        is_same_format = isinstance(first, GroupedWeight) == isinstance(second, GroupedWeight)
        return is_same_format and torch.equal(numbers(first), numbers(second))
    if first.is_meta or second.is_meta or first.data_ptr() == second.data_ptr():
        return True
    return first.dtype == second.dtype and torch.equal(first, second)


class _LoadingReader(CheckpointReader):
    """Hands out the tensors themselves."""

    def __init__(
        self, source: TensorSource, prefixes: tuple[str, ...], total_bytes: int, progress: Progress | None
    ) -> None:
        super().__init__(source, prefixes)
        self._total_bytes = total_bytes
        self._progress = progress

    def _read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Weight:
        tensor = self._source.load(name)
        if self._progress is not None:
            self._progress(self.num_bytes, self._total_bytes)
        return tensor


def _build(
    model: ConfiguredModel,
    read: CheckpointReader,
    pack: _Packer,
    translation: Translation | None,
    head_format: WeightFormat | None,
    head_tokens: Sequence[int] | None,
) -> DecoderWeights:
    outer = model.architecture.read_outer(read, model.config)
    head_bias = None if translation is None else translation.head_bias()
    if translation is not None:
        outer = _renumbered(outer, translation)
    if head_tokens is not None:
        outer, head_bias = _shortened(outer, head_bias, head_tokens)
    token_table = pack.table(numbers(outer.token_table))
    position_table = None if outer.position_table is None else pack.table(outer.position_table)
    if outer.head is None and pack.is_table(outer.token_table, head_format):
        # A tied head is the very tensor of the table: a backend that packs by reference keeps one copy.
        pack.formats.add(float_format(token_table.dtype).name)
        bias = None if head_bias is None else head_bias.to(token_table.device)
        head = pack.backend.pack_linear(token_table, bias)
    else:
        weight = outer.token_table if outer.head is None else outer.head
        head = pack.linear(LinearTensors(weight, head_bias), head_format)
    final_norm = pack.norm(outer.final_norm)
    del outer
    layers = tuple(
        pack.layer(model.architecture.read_layer(read, model.config, index))
        for index in range(model.spec.num_layers)
    )
    token_ids = None
    if head_tokens is not None:
        token_ids = torch.tensor(head_tokens, dtype=torch.int32, device=token_table.device)
    return DecoderWeights(token_table, position_table, layers, final_norm, head, token_ids)


def _renumbered(outer: OuterTensors, translation: Translation) -> OuterTensors:
    """Table and head by the ids of another vocabulary. A tied head stays tied, unless it is stored by group: where
    the table's row is not the head's, the bias leaves nothing of it."""
    table, head = outer.token_table, outer.head
    if head is None and isinstance(table, GroupedWeight):
        head = table
    if head is not None:
        head = translation.head(head)
    return replace(outer, token_table=translation.table(numbers(table)), head=head)


def _shortened(
    outer: OuterTensors, head_bias: Tensor | None, head_tokens: Sequence[int]
) -> tuple[OuterTensors, Tensor | None]:
    """A head of its own, with the rows of these tokens, and what is left of its bias."""
    rows = outer.token_table if outer.head is None else outer.head
    head = rows[torch.tensor(head_tokens, device=rows.device)]
    return replace(outer, head=head), None if head_bias is None else head_bias[list(head_tokens)]


class _Packer:
    """Copies tensors to their device and dtype; nothing it returns shares memory with the checkpoint."""

    def __init__(
        self,
        spec: DecoderSpec,
        dtype: torch.dtype,
        format: WeightFormat | None,
        device: torch.device,
        backend: Backend,
    ) -> None:
        self.backend = backend
        self.formats: set[str] = set()
        self._format = format
        self._spec = spec
        self._dtype = dtype
        self._device = device

    def layer(self, tensors: LayerTensors) -> LayerWeights:
        return LayerWeights(
            attention_norm=self.norm(tensors.attention_norm),
            qkv=self.linear(tensors.qkv, self._format),
            attention_output=self.linear(tensors.attention_output, self._format),
            mlp_norm=self.norm(tensors.mlp_norm),
            mlp_up=self.linear(tensors.mlp_up, self._format),
            mlp_down=self.linear(tensors.mlp_down, self._format),
            head_norm=None if tensors.head_norm is None else self._copy(tensors.head_norm, torch.float32),
        )

    def linear(self, tensors: LinearTensors, format: WeightFormat | None) -> PackedLinear:
        """format: None: weights by group as they are, and floats to the tables' dtype"""
        bias = None if tensors.bias is None else self._copy(tensors.bias, torch.float32)
        # Packed from where the checkpoint has it, without a copy in between.
        weight = tensors.weight.to(self._device)
        if isinstance(weight, GroupedWeight):
            if format in (None, weight.format):
                self.formats.add(weight.format.name)
                return self.backend.pack_linear(weight, bias)
            weight = weight.dequantize()
        weight = weight.float() if weight.dtype == torch.float64 else weight
        format = format or float_format(self._dtype)
        if not format.has_scales:
            self._check_range(weight, format.dtype)
        self.formats.add(format.name)
        return self.backend.pack_linear(weight, bias, format)

    def is_table(self, weight: Weight, format: WeightFormat | None) -> bool:
        """Whether it is packed as the tables are."""
        if format is None:
            return isinstance(weight, Tensor)
        return not format.has_scales and format.dtype == self._dtype

    def norm(self, tensors: NormTensors) -> Norm:
        weight, bias = tensors.weight, tensors.bias
        width = self._spec.hidden_size
        weight = self._copy(torch.ones(width) if weight is None else weight, torch.float32)
        if self._spec.norm == "rms":
            return Norm(weight, None, self._spec.norm_eps)
        bias = torch.zeros(width) if bias is None else bias
        return Norm(weight, self._copy(bias, torch.float32), self._spec.norm_eps)

    def table(self, tensor: Tensor) -> Tensor:
        self._check_range(tensor, self._dtype)
        return self._copy(tensor, self._dtype)

    def _check_range(self, tensor: Tensor, dtype: torch.dtype) -> None:
        if dtype != torch.float16 or tensor.dtype == torch.float16 or tensor.is_meta:
            return
        low, high = torch.aminmax(tensor)
        if not (low > -_FLOAT16_OVERFLOW and high < _FLOAT16_OVERFLOW):
            raise ModelLoadError("dtype=torch.float16: a weight is beyond its range; use bfloat16 or float32")

    def _copy(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(device=self._device, dtype=dtype, copy=True, memory_format=torch.contiguous_format)
