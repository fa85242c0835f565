"""Tiny GGUF files of models and tokenizers, written with the `gguf` package's own names and quantisation.

path = write_gguf(tmp_path / "m.gguf", build_model("llama"), "Q4_0", tokenizer=build_tokenizer(320))
numbers = dequantized(model, "Q4_0")          # the model that the file holds, for transformers
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter
from tiny_models import END_OF_TEXT

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
}
CONTROL, NORMAL = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL


def write_gguf(
    path: Path,
    model: transformers.PreTrainedModel,
    type: str = "F32",
    *,
    tokenizer: tokenizers.Tokenizer | None = None,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Writes a model with its matrices in one type, everything else in F32. Returns `path`.

    tokenizer: a byte-level one of `tiny_models`
    metadata:  further keys, or others than the model's own; strings, bools, whole numbers and floats
    extra:     further tensors, in F32
    """
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = GGUFWriter(path, architecture)
    values = {**_describe(config, architecture), **(metadata or {})}
    for key, value in values.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add[value.__class__](key, value)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer)
    for name, tensor in gguf_tensors(model).items():
        stored = GGMLQuantizationType[type if tensor.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor, stored), raw_dtype=stored)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantized(model: transformers.PreTrainedModel, type: str) -> transformers.PreTrainedModel:
    """A copy with the numbers that a file of this type holds. Rows of other lengths than whole blocks fail."""
    result = copy.deepcopy(model)
    stored = GGMLQuantizationType[type]
    for name, parameter in result.named_parameters():
        if parameter.ndim == 2:
            is_transposed = _is_transposed(model, name)
            rows = parameter.data.t() if is_transposed else parameter.data
            packed = gguf.quants.quantize(rows.contiguous().numpy(), stored)
            numbers = torch.from_numpy(gguf.quants.dequantize(packed, stored).copy())
            parameter.data = numbers.t().contiguous() if is_transposed else numbers
    return result


def gguf_tensors(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """A model's tensors under llama.cpp's names, in llama.cpp's order of rows."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture),
        config.num_hidden_layers,
    )
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name.endswith("lm_head.weight") and config.tie_word_embeddings:
            continue
        rows = parameter.t() if _is_transposed(model, name) else parameter
        stored = names.get_name(
            name.replace("lm_head", "embed_out") if architecture == "gptneox" else name,
            try_suffixes=(".weight", ".bias"),
        )
        assert stored is not None, name
        tensors[stored] = _reordered(rows.contiguous().numpy(), name, config, architecture)
    return tensors


def _is_transposed(model: transformers.PreTrainedModel, name: str) -> bool:
    """GPT-2's checkpoints store the weights of linear layers `[in, out]`."""
    is_linear = any(part in name for part in ("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return model.config.model_type == "gpt2" and is_linear


def _reordered(rows: np.ndarray, name: str, config: Any, architecture: str) -> np.ndarray:
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
    if architecture == "gptneox" and "query_key_value" in name:
        heads = rows.reshape(config.num_attention_heads, 3, -1, *rows.shape[1:])
        return np.ascontiguousarray(heads.swapaxes(0, 1)).reshape(rows.shape)
    return rows


def _describe(config: Any, name: str) -> dict[str, Any]:
    heads = config.num_attention_heads
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": heads,
    }
    if name == "gpt2":
        values["feed_forward_length"] = config.n_inner or 4 * config.n_embd
        values["attention.layer_norm_epsilon"] = config.layer_norm_epsilon
    elif name == "gptneox":
        values["feed_forward_length"] = config.intermediate_size
        values["attention.layer_norm_epsilon"] = config.layer_norm_eps
        values["use_parallel_residual"] = config.use_parallel_residual
        share = config.rope_parameters["partial_rotary_factor"]
        values["rope.dimension_count"] = int(config.hidden_size // heads * share)
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        values["feed_forward_length"] = config.intermediate_size
        values["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
        values["attention.head_count_kv"] = config.num_key_value_heads
        values["rope.freq_base"] = float(config.rope_parameters["rope_theta"])
        values["attention.key_length"] = values["attention.value_length"] = head_dim
    return {f"{name}.{key}": value for key, value in values.items()}


def add_tokenizer(
    writer: GGUFWriter,
    tokenizer: tokenizers.Tokenizer,
    pre: str = "gpt-2",
    kinds: Mapping[str, int] | None = None,
) -> None:
    """A byte-level tokenizer as llama.cpp's converter writes it. kinds: the types of tokens that are not normal."""
    import json

    content = json.loads(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {token["content"]: CONTROL for token in content["added_tokens"]} | dict(kinds or {})
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([special.get(token, NORMAL) for token in tokens])
    writer.add_token_merges(merges)
    if END_OF_TEXT in vocabulary:
        writer.add_eos_token_id(vocabulary[END_OF_TEXT])
        writer.add_bos_token_id(vocabulary[END_OF_TEXT])
    writer.add_add_bos_token(False)
