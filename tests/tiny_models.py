"""Tiny random models of every architecture, and small real tokenizers, for any test that needs one.

model = build_model("opt", vocab_size=8, seed=3)                          # a transformers model
path = save_checkpoint(tmp_path / "m", "gpt2", tokenizer=build_tokenizer(320))
draft = perturbed(model, noise=0.05, seed=1)                              # agrees with it now and then
meant = rounded(model, "int4")                                           # what an engine with these weights computes
"""

from __future__ import annotations

import copy
import importlib
import json
import math
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from transformers.pytorch_utils import Conv1D

from specengine.kernels.reference import quantize_groups
from specengine.models.registry import ARCHITECTURES
from specengine.weight_formats import WEIGHT_FORMATS

MODEL_TYPES = tuple(ARCHITECTURES)
END_OF_TEXT = "<|endoftext|>"

# Sizes that every architecture has, under the name most give them, and where some differ.
_SIZES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
    "activation": "hidden_act",
}
_OTHER_SIZES = {
    "gpt2": {
        "hidden_size": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "max_positions": "n_positions",
        "intermediate_size": "n_inner",
        "activation": "activation_function",
    },
    "opt": {"intermediate_size": "ffn_dim", "activation": "activation_function"},
}

# The sizes with which a tiny model's linear layers are wide enough for weights by group: multiples of 32.
IN_GROUPS: dict[str, dict[str, int]] = {
    "llama": {"intermediate_size": 64},
    "qwen2": {"intermediate_size": 64},
    "qwen3": {"intermediate_size": 64, "head_dim": 16},
}

_CORPUS = [
    "def add(first, second):\n    return first + second\n",
    "for item in items:\n    if item is None:\n        continue\n    print(item)\n",
    "The quick brown fox jumps over the lazy dog. The dog does not mind.\n",
    "naïve café, Straße, Ångström, 你好世界, こんにちは, 🙂🚀👩‍👩‍👧, e\u0301\n",
] * 4


def build_model(
    model_type: str = "gpt2",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    logit_scale: float = 2.0,
    **overrides: object,
) -> transformers.PreTrainedModel:
    """A random model in evaluation mode: the architecture's TINY config with `overrides`.

    `overrides` are keys of the architecture's own config, or one of hidden_size, num_layers, num_heads,
    max_positions, intermediate_size, activation for all of them. logit_scale: standard deviation of the logits.
    """
    names = {**_SIZES, **_OTHER_SIZES.get(model_type, {})}
    tiny = importlib.import_module(ARCHITECTURES[model_type]).TINY
    values = {**tiny, **{names.get(key, key): value for key, value in overrides.items()}}
    values.pop("model_type")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):  # within any vocabulary, unless given
        if key not in overrides:
            values[key] = 0
    config = transformers.AutoConfig.for_model(model_type, **values)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    _randomise(model, seed, logit_scale)
    for (
        parameter
    ) in model.parameters():  # not the buffers: rotary frequencies stay fp32, as where one is loaded
        parameter.data = parameter.data.to(dtype)
    return model


def _randomise(model: transformers.PreTrainedModel, seed: int, logit_scale: float) -> None:
    """Weights large enough that a wrong position, head or bias shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter is head:
                noise *= logit_scale / math.sqrt(parameter.shape[1])
            elif parameter.ndim == 2:
                noise *= (
                    0.4 if "emb" in name or "wte" in name or "wpe" in name else parameter.shape[0] ** -0.5
                )
            elif name.endswith("weight"):
                noise = 1 + 0.2 * noise
            else:
                noise *= 0.2
            parameter.copy_(noise)


def perturbed(
    model: transformers.PreTrainedModel, *, noise: float, seed: int = 0
) -> transformers.PreTrainedModel:
    """A copy with relative noise on every matrix: a draft whose acceptance falls as `noise` rises."""
    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(result.named_parameters()):
            if parameter.ndim == 2:
                step = torch.randn(parameter.shape, generator=generator) * parameter.float().std()
                parameter.add_((noise * step).to(parameter.dtype))
    return result


def rounded(model: transformers.PreTrainedModel, weight_dtype: str) -> transformers.PreTrainedModel:
    """A copy whose linear layers hold what an engine with weights by group computes with: "int4", "int4_min" or
    "int8_group". A head that was tied to the table of embeddings no longer is: the table stays as it was."""
    form = WEIGHT_FORMATS[weight_dtype]
    assert form.is_grouped, weight_dtype
    result = copy.deepcopy(model)
    head = result.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for module in result.modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            rows = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
            codes = quantize_groups(rows.contiguous(), bits=form.bits, has_minimum=form.has_minimum)
            rows.copy_(codes.dequantize())
    return result


def renumbered(
    model: transformers.PreTrainedModel, tokenizer: tokenizers.Tokenizer, *, seed: int = 0
) -> tuple[transformers.PreTrainedModel, tokenizers.Tokenizer]:
    """The same model and the same tokens, every one of them under another id."""
    rows = model.get_input_embeddings().weight.shape[0]
    new_ids = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    result = copy.deepcopy(model)
    with torch.no_grad():
        for old, new in (
            (model.get_input_embeddings(), result.get_input_embeddings()),
            (model.get_output_embeddings(), result.get_output_embeddings()),
        ):
            new.weight[new_ids] = old.weight
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: int(new_ids[index]) for token, index in vocabulary.items()}
    for token in content["added_tokens"]:
        token["id"] = int(new_ids[token["id"]])
    return result, tokenizers.Tokenizer.from_str(json.dumps(content))


def save_checkpoint(
    directory: Path,
    model: transformers.PreTrainedModel | str = "gpt2",
    *,
    tokenizer: tokenizers.Tokenizer | None = None,
    max_shard_size: str | int = "5GB",
    **build: object,
) -> Path:
    """Writes a model, given or built by `build_model(model, **build)`, as transformers does. Returns `directory`.

    A tokenizer's END_OF_TEXT becomes the end-of-text token, and its size the model's vocabulary unless given.
    """
    if isinstance(model, str):
        if tokenizer is not None:
            build.setdefault("vocab_size", tokenizer.get_vocab_size())
            build.setdefault("eos_token_id", tokenizer.token_to_id(END_OF_TEXT))
        model = build_model(model, **build)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save(str(directory / "tokenizer.json"))
        config = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "%s"}'
        (directory / "tokenizer_config.json").write_text(config % END_OF_TEXT)
    return directory


def build_tokenizer(vocab_size: int = 320, *, adds_start: bool = False) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer: END_OF_TEXT is id 0, then the 256 bytes, then merges.

    vocab_size: at least 257. adds_start: `encode` prepends END_OF_TEXT, as OPT's tokenizer prepends </s>.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_OF_TEXT, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if adds_start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[END_OF_TEXT, "$A"], special_tokens=[(END_OF_TEXT, 0)]
        )
    assert tokenizer.get_vocab_size() == vocab_size, (tokenizer.get_vocab_size(), vocab_size)
    return tokenizer
