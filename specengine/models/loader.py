"""From an opened checkpoint to a `Decoder`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from specengine.errors import ModelLoadError
from specengine.models.checkpoints import Checkpoint
from specengine.models.checkpoints.tensors import TensorSource
from specengine.models.decoder import Decoder, DecoderSpec
from specengine.models.weights import Progress, read_weights
from specengine.ops.backend import Backend
from specengine.tokenizer import Tokenizer, Vocabulary
from specengine.translation import Translation
from specengine.weight_formats import WEIGHT_FORMATS, WeightFormat


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    name:             what it was loaded from, for messages
    tokenizer:        None if the checkpoint has none
    checkpoint_dtype: what most of the checkpoint's bytes are stored in
    weight_dtype:     what its linear layers are stored in, a name in `WEIGHT_FORMATS`, or several with a + between
    """

    name: str
    decoder: Decoder
    tokenizer: Tokenizer | None
    checkpoint_dtype: torch.dtype
    weight_dtype: str

    @property
    def vocabulary(self) -> Vocabulary:
        """What `check_compatible` compares."""
        return Vocabulary(self.name, self.decoder.spec.vocab_size, self.tokenizer)


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str = "auto",
    weight_dtype: str = "auto",
    head_dtype: str = "auto",
    device: torch.device,
    backend: Backend,
    progress: Progress | None = None,
    tokenizer: Tokenizer | None = None,
    num_layers: int | None = None,
    translation: Translation | None = None,
    head_tokens: Sequence[int] | None = None,
) -> LoadedModel:
    """Loads a model and packs its weights for a backend.

    dtype:        of linear layers and tables (norms and biases are fp32). "auto": on CUDA the checkpoint's,
                  on a CPU bf16 if it has it natively and the checkpoint is 16-bit, else fp32
    weight_dtype: a name in `WEIGHT_FORMATS`, instead of `dtype`; one with scales is for linear layers, the head
                  included, and `dtype` is the tables'. "auto": `dtype`, but weights by group as they are stored
    head_dtype:   the same for the head alone; "auto": as other linear layers
    progress:     called with (bytes read, bytes in all) after every tensor
    tokenizer:    instead of the checkpoint's, which is then not read
    num_layers:   only so many of the first layers, and what surrounds them; None: all
    translation:  makes its ids those of another vocabulary, whose tokenizer is `tokenizer`
    head_tokens:  the head keeps only these, ascending, of that other vocabulary, if there is one

    Raises `ModelLoadError` naming file and field for a malformed, unsafe or unsupported checkpoint, before
    anything of its size is allocated, and `ValueError` for a dtype that the backend lacks, or for groups that do not
    divide the model's widths.
    """
    model = checkpoint.model if num_layers is None else checkpoint.model.first_layers(num_layers)
    if tokenizer is None:
        tokenizer = checkpoint.tokenizer
    checkpoint_dtype = main_dtype(checkpoint.tensors)
    named = WEIGHT_FORMATS.get(weight_dtype)
    if named is not None and not named.has_scales:
        dtype = named.dtype
    chosen = choose_dtype(dtype, checkpoint_dtype, device, backend)
    head = WEIGHT_FORMATS.get(head_dtype)
    if head is not None and not head.has_scales:
        choose_dtype(head.dtype, checkpoint_dtype, device, backend)
    for option, format, has, widths in (
        ("weight_dtype", named, "linear layers", linear_widths(model.spec)),
        ("head_dtype", head, "a head", (model.spec.hidden_size,)),
    ):
        width = None if format is None else ungrouped_width(widths, format)
        if format is not None and width is not None:
            raise ValueError(
                f"{option}={format.name!r}: {checkpoint.name} has {has} with {width} inputs, which are no groups of "
                f"{format.group_size}; int8 has none"
            )
    num_tokens = model.spec.vocab_size if translation is None else len(translation.shared)
    if head_tokens is not None:
        check_ascending(head_tokens, num_tokens)
    weights, stored = read_weights(
        model,
        checkpoint.tensors,
        dtype=chosen,
        format=named,
        head_format=head,
        device=device,
        backend=backend,
        progress=progress,
        translation=translation,
        head_tokens=head_tokens,
    )
    decoder = Decoder(replace(model.spec, vocab_size=num_tokens), weights, backend)
    return LoadedModel(checkpoint.name, decoder, tokenizer, checkpoint_dtype, stored)


def check_ascending(head_tokens: Sequence[int], num_tokens: int) -> None:
    """Raises `ValueError` unless these are ids of a vocabulary, each once and in order."""
    bounds = (-1, *head_tokens, num_tokens)
    for before, token in itertools.pairwise(bounds):
        if token <= before:
            raise ValueError(
                f"head_tokens: expected ids that ascend, from 0 to {num_tokens - 1}, got {token} after {before}"
            )
    if not head_tokens:
        raise ValueError("head_tokens: there are none")


def linear_widths(spec: DecoderSpec) -> tuple[int, ...]:
    """The inputs that linear layers have."""
    return spec.hidden_size, spec.num_heads * spec.head_dim, spec.intermediate_size


def ungrouped_width(widths: Iterable[int], format: WeightFormat) -> int | None:
    """The first that is no whole number of groups; None for a format without groups."""
    size = format.group_size
    return next((width for width in widths if width % size), None) if size else None


def choose_dtype(
    requested: torch.dtype | str, checkpoint_dtype: torch.dtype, device: torch.device, backend: Backend
) -> torch.dtype:
    """The dtype to store weights in. Raises `ValueError` naming what the backend supports."""
    if requested == "auto":
        wanted = checkpoint_dtype
        if device.type == "cpu":
            is_16_bit = checkpoint_dtype.itemsize == 2
            wanted = torch.bfloat16 if is_16_bit and has_native_bf16() else torch.float32
        return wanted if wanted in backend.supported_dtypes else torch.float32
    if requested not in backend.supported_dtypes:
        supported = ", ".join(str(dtype) for dtype in backend.supported_dtypes)
        raise ValueError(f"dtype: backend={backend.name!r} does not support {requested}; it has {supported}")
    return requested


def has_native_bf16() -> bool:
    """Whether this machine's processor multiplies bf16 in hardware."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def main_dtype(source: TensorSource) -> torch.dtype:
    """What most of a checkpoint's bytes are stored in."""
    num_bytes: Counter[torch.dtype] = Counter()
    for info in source.tensors.values():
        if info.dtype is not None:
            num_bytes[info.dtype] += info.num_bytes
    if not num_bytes:
        raise ModelLoadError(f"{source.origin}: holds no floating-point tensor")
    return num_bytes.most_common(1)[0][0]
