"""The two model shapes, and how a trained model becomes an ordinary Hugging Face directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from .vocabulary import END_OF_TEXT_ID, VOCABULARY_SIZE

CONTEXT = 1024
HEAD_DIM = 64
SHAPES = {"target": (320, 8), "draft": (256, 2)}  # name → (features, layers)


def build_config(name: str) -> GPT2Config:
    """The GPT-2 configuration of `"target"` or `"draft"`, as it is exported."""
    features, layers = SHAPES[name]
    return GPT2Config(
        vocab_size=VOCABULARY_SIZE,
        n_positions=CONTEXT,
        n_embd=features,
        n_layer=layers,
        n_head=features // HEAD_DIM,
        activation_function="gelu_new",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        tie_word_embeddings=True,
    )


def build_model(name: str, seed: int) -> GPT2LMHeadModel:
    """A freshly initialised fp32 model. While training, `gelu_new` is computed by PyTorch's fused tanh-GELU."""
    torch.manual_seed(seed)
    config = build_config(name)
    config.activation_function = "gelu_pytorch_tanh"  # the same function as gelu_new, one pass over memory
    config.use_cache = False
    return GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")


def count_parameters(model: GPT2LMHeadModel) -> dict[str, int]:
    """Features, layers, parameters in all (tied head counted once), and without token and position embeddings."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.transformer.wte.weight.numel() + model.transformer.wpe.weight.numel()
    size = {"features": model.config.n_embd, "layers": model.config.n_layer}
    return size | {"total": total, "non_embedding": total - embedding}


def export_model(model: GPT2LMHeadModel, name: str, directory: Path) -> None:
    """Write `config.json`, `generation_config.json` and bf16 `model.safetensors` (tied head stored once)."""
    directory.mkdir(parents=True, exist_ok=True)
    config = build_config(name).to_dict()
    config |= {"architectures": ["GPT2LMHeadModel"], "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    write_json(directory / "config.json", config)
    write_json(
        directory / "generation_config.json", {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID}
    )
    tensors = {
        key: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for key, tensor in model.state_dict().items()
        if key != "lm_head.weight"
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # safetensors writes private files


def load_exported(directory: Path) -> GPT2LMHeadModel:
    """The exported bf16 weights, computed in fp32: what every figure in the model card is measured on."""
    model = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval()


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON ending in a newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
