"""The bundled target under other ids, as it is or as an OPT of a real size.

Drafting across vocabularies is measured with it where no checkpoint can be downloaded.

Every id is permuted, in the tokenizer and in the model's tables, so that the two vocabularies have the same texts and
not one id in common. OPT may have GPT-2's activation, and its embeddings and output projections are scaled so that its
fixed epsilon means the source's: it computes the same function.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from specengine.measure.widened import BUNDLED, Shape, Tensors, widen

OPT_SHAPES = {
    "opt-125m": Shape(num_features=768, num_layers=12, num_heads=12, vocab_size=50272, num_positions=2048),
    "opt-1.3b": Shape(num_features=2048, num_layers=24, num_heads=32, vocab_size=50272, num_positions=2048),
}
OPT_EPSILON, OPT_POSITION_OFFSET = 1e-5, 2
TABLES = ("wte.weight", "embed_tokens.weight", "lm_head.weight")
FILES = ("tokenizer.json", "tokenizer_config.json")


def permutation(num_ids: int, seed: int = 0) -> list[int]:
    """The new id of each old one."""
    return torch.randperm(num_ids, generator=torch.Generator().manual_seed(seed)).tolist()


def renumber_tensors(tensors: Tensors, order: Sequence[int]) -> Tensors:
    """The same model under other ids: row `order[i]` of its tables is the old row i; rows beyond stay."""
    new_ids = torch.tensor(order)
    renumbered = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(TABLES):
            renumbered[name] = tensor.clone()
            renumbered[name][new_ids] = tensor[: len(order)]
    return renumbered


def renumber_config(config: dict[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """`config.json` or `generation_config.json` under other ids."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return config | {name: order[config[name]] for name in names if isinstance(config.get(name), int)}


def renumber_tokenizer(content: dict[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """`tokenizer.json` of a BPE tokenizer under other ids."""
    vocabulary = {token: order[index] for token, index in content["model"]["vocab"].items()}
    added = [token | {"id": order[token["id"]]} for token in content["added_tokens"]]
    return content | {"model": content["model"] | {"vocab": vocabulary}, "added_tokens": added}


def to_opt(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """A GPT-2 as an OPT that computes the same function.

    OPT's epsilon is 1e-5, whatever the config says: where the source's is e, what is written into the residual stream
    is multiplied by sqrt(1e-5 / e), which a LayerNorm with the other epsilon takes out again.
    """
    scale = math.sqrt(OPT_EPSILON / config["layer_norm_epsilon"])
    width, num_layers = config["n_embd"], config["n_layer"]
    gpt2 = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    positions = gpt2["wpe.weight"] * scale
    opt = {
        "embed_tokens.weight": gpt2["wte.weight"] * scale,
        "embed_positions.weight": torch.cat([torch.zeros(OPT_POSITION_OFFSET, width), positions]),
    }

    def copy(name: str, source: str, factor: float = 1.0) -> None:
        for part in ("weight", "bias"):
            tensor = gpt2[f"{source}.{part}"] * factor
            # GPT-2 stores its projections transposed.
            opt[f"{name}.{part}"] = tensor.T.contiguous() if tensor.ndim == 2 else tensor

    for index in range(num_layers):
        layer, block = f"layers.{index}", f"h.{index}"
        for part in ("weight", "bias"):
            for kind, tensor in zip("qkv", gpt2[f"{block}.attn.c_attn.{part}"].chunk(3, dim=-1), strict=True):
                opt[f"{layer}.self_attn.{kind}_proj.{part}"] = (
                    tensor.T.contiguous() if tensor.ndim == 2 else tensor
                )
        copy(f"{layer}.self_attn.out_proj", f"{block}.attn.c_proj", scale)
        copy(f"{layer}.self_attn_layer_norm", f"{block}.ln_1")
        copy(f"{layer}.fc1", f"{block}.mlp.c_fc")
        copy(f"{layer}.fc2", f"{block}.mlp.c_proj", scale)
        copy(f"{layer}.final_layer_norm", f"{block}.ln_2")
    copy("final_layer_norm", "ln_f")
    named = {f"model.decoder.{name}": tensor for name, tensor in opt.items()}
    return named | {"lm_head.weight": gpt2["lm_head.weight"]}, {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": config["vocab_size"],
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": config["n_head"],
        "ffn_dim": config.get("n_inner") or 4 * width,
        "max_position_embeddings": config["n_positions"],
        "activation_function": config["activation_function"],
        "do_layer_norm_before": True,
        "tie_word_embeddings": False,
        **{name: config[name] for name in ("bos_token_id", "eos_token_id")},
    }


def build_foreign(out: Path, shape: Shape | None, dtype: torch.dtype) -> list[int]:
    """Writes the bundled target under other ids: as it is, or with a shape as an OPT. Returns the new ids."""
    source = BUNDLED / "target"
    config = json.loads((source / "config.json").read_text())
    order = permutation(config["vocab_size"])
    if out.exists():
        return order
    tensors = load_file(source / "model.safetensors")
    if shape is not None:
        tensors, config = to_opt(*widen(tensors, config, shape))
    tensors = {name: tensor.to(dtype) for name, tensor in renumber_tensors(tensors, order).items()}
    config |= dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    tokenizer = json.loads((source / FILES[0]).read_text())
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        (new / "config.json").write_text(json.dumps(renumber_config(config, order)))
        (new / FILES[0]).write_text(json.dumps(renumber_tokenizer(tokenizer, order)))
        shutil.copyfile(source / FILES[1], new / FILES[1])
        new.rename(out)
    return order
