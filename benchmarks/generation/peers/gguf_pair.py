"""Write a GPT-2 checkpoint (a Hugging Face directory) as a GGUF file that llama.cpp loads.

Matrices are stored in the file's type, everything with one axis and the positions in fp32, as llama.cpp's own
converter does. The head is written on its own: a widened model's is not its embedding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
from numpy.typing import NDArray
from safetensors import safe_open

from generation.files import cached

TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "int8": gguf.GGMLQuantizationType.Q8_0,
    "int4": gguf.GGMLQuantizationType.Q4_0,
}
TYPE_NAMES = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0", "int4": "q4_0"}
FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "int8": gguf.LlamaFileType.MOSTLY_Q8_0,
    "int4": gguf.LlamaFileType.MOSTLY_Q4_0,
}
OUTER_NAMES = {
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "ln_f.weight": "output_norm.weight",
    "ln_f.bias": "output_norm.bias",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Conv1D stores [in, out]
KEPT_FLOAT32 = ("wpe.weight",)


def gguf_path(directory: str, dtype: str, cache: str) -> Path:
    """The checkpoint as GGUF: the file itself if it is one, else written where it is not there yet."""
    if directory.endswith(".gguf"):
        return Path(directory)
    label = f"{TYPE_NAMES[dtype]}.gguf"
    return cached(directory, cache, label, lambda source, path: write_gguf(source, dtype, path))


def gguf_name(name: str) -> str:
    """`h.3.attn.c_attn.weight` → `blk.3.attn_qkv.weight`; raises `KeyError` for a tensor GPT-2 does not have."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, layer, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[module]}.{kind}"


def tensors(directory: Path, dtype: str) -> Iterator[tuple[str, NDArray[Any], gguf.GGMLQuantizationType]]:
    """(name, stored values, type) of every tensor."""
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        for full_name in file.keys():  # noqa: SIM118 - the handle is no dictionary
            name = full_name.removeprefix("transformer.")
            tensor = file.get_tensor(full_name).float()
            if name.endswith(TRANSPOSED):
                tensor = tensor.T
            values = tensor.contiguous().numpy()
            is_small = values.ndim == 1 or name in KEPT_FLOAT32
            kind = TYPES["float32" if is_small else dtype]
            yield gguf_name(name), gguf.quantize(values, kind), kind


def add_shape(writer: gguf.GGUFWriter, config: dict[str, Any], dtype: str) -> None:
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(FILE_TYPES[dtype])


def add_tokenizer(writer: gguf.GGUFWriter, directory: Path, config: dict[str, Any]) -> None:
    """The byte-level BPE; entries that only a widened vocabulary has get names that no text contains."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    tokens = [f"<unused_{index}>" for index in range(config["vocab_size"])]
    kinds = [gguf.TokenType.UNUSED] * len(tokens)
    for token, index in vocabulary.items():
        tokens[index], kinds[index] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def write_gguf(directory: Path, dtype: str, path: Path) -> Path:
    """Write the checkpoint in `directory` to `path`, matrices as `dtype` ("int8" is llama.cpp's q8_0)."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "gpt2")
    add_shape(writer, config, dtype)
    add_tokenizer(writer, directory, config)
    for name, values, kind in tensors(directory, dtype):
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)
    return path
