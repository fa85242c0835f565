"""SmolLM2's GGUF file beside transformers, which reads the same file: logits, greedy text, tokens, chat template."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from random_texts import random_texts
from tokenizers import pre_tokenizers
from torch import Tensor

import specengine
from conftest import EngineFactory
from specengine.models.checkpoints import open_checkpoint
from specengine.tokenizer import Tokenizer

pytestmark = pytest.mark.smollm2

TOLERANCE = 1e-3
NUM_NEW = 24
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "import os\n\n\ndef list_files(path):\n",
    "1, 2, 3, 4,",
    "Ångström und 你好, 🙂🚀",
    "   whitespace   runs\n\n\n\t",
    "Dear Sir or Madam,\n\n",
    "Water boils at",
    '{"name": "Ada", "born": 1815, "',
    "SELECT name FROM users WHERE",
    "La capitale de l'Italie est",
    "Q: What is 17 + 25?\nA:",
    "# Shopping list\n\n* milk\n* ",
    "The quick brown fox jumps over the lazy dog. " * 8,
    CHAT.format("Hi!"),
    CHAT.format("Why is the sky blue?"),
    CHAT.format("Write a haiku about rain."),
    CHAT.format("Translate 'good morning' to Spanish."),
    CHAT.format("Summarise: the cat sat on the mat, and the dog lay beside it."),
]


@pytest.fixture(scope="module")
def theirs(smollm2_file: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        # Only its dispatch to several devices needs the package that transformers asks for here.
        patch.setattr(transformers.modeling_utils, "is_accelerate_available", lambda: True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            smollm2_file.parent, gguf_file=smollm2_file.name, dtype=torch.float32
        )
    return model.eval()


@pytest.fixture(scope="module")
def auto_tokenizer(smollm2_file: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name)


@pytest.mark.slow
def test_logits_and_greedy_text_are_those_of_transformers(
    smollm2_file: Path, theirs: Any, build_engine: EngineFactory
) -> None:
    """Of 20 prompts: every logit of every token of the text, and at each the likeliest token."""
    engine = build_engine(smollm2_file, max_seq_len=256)
    num_different = 0
    for prompt in PROMPTS:
        seen: list[Tensor] = []

        def keep(_: list[int], logits: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(logits.clone())
            return logits

        result = engine.generate(
            prompt, max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True, logits_processor=keep
        )
        ids = [*result.prompt_token_ids, *result.token_ids]
        with torch.inference_mode():
            expected = theirs(torch.tensor([ids])).logits[0, len(result.prompt_token_ids) - 1 : -1]
        found = torch.stack(seen)[:, : expected.shape[1]]
        assert (found - expected).abs().max() < TOLERANCE, prompt
        chosen = torch.tensor(result.token_ids)
        if not torch.equal(expected.argmax(-1), chosen):
            num_different += 1
            gap = expected.amax(-1) - expected.gather(1, chosen[:, None])[:, 0]
            assert gap.max() < 2 * TOLERANCE, prompt  # a near-tie
    assert num_different <= 1


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_tokenizer_cuts_as_transformers_does(count: int, smollm2_file: Path, auto_tokenizer: Any) -> None:
    """transformers does not know the cuts named "smollm", and takes GPT-2's: it is given SmolLM2's, a
    digit each. Without digits after whitespace there is no difference."""
    ours = open_checkpoint(smollm2_file).tokenizer
    assert ours is not None
    tokenizer = copy.deepcopy(auto_tokenizer)
    texts = random_texts(count, seed=4, special=tuple(ours.special_tokens.values()))
    unaware = [tokenizer(text, add_special_tokens=True).input_ids for text in texts]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    expected = [tokenizer(text, add_special_tokens=True).input_ids for text in texts]
    found = [ours.encode(text) for text in texts]
    assert found == expected
    for text, ids, unaware_ids in zip(texts, found, unaware, strict=True):
        assert ids == unaware_ids or any(character.isnumeric() for character in text), repr(text)
        assert ours.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)
    assert sum(ids == other for ids, other in zip(found, unaware, strict=True)) > 0.9 * count


def test_what_the_file_says(smollm2_file: Path, auto_tokenizer: Any) -> None:
    checkpoint = open_checkpoint(smollm2_file)
    spec = checkpoint.spec
    assert (spec.architecture, spec.num_layers, spec.num_heads, spec.num_kv_heads) == ("llama", 30, 9, 3)
    assert (spec.max_positions, spec.eos_token_ids, spec.tie_word_embeddings) == (8192, (2,), True)
    assert checkpoint.chat_template == auto_tokenizer.chat_template
    assert isinstance(checkpoint.tokenizer, Tokenizer)
    assert checkpoint.tokenizer.eos_token_id == auto_tokenizer.eos_token_id == 2


def test_conversations_are_written_out_as_transformers_does(
    smollm2_file: Path, auto_tokenizer: Any, build_engine: EngineFactory
) -> None:
    engine = build_engine(smollm2_file, max_seq_len=512)
    turns = [
        {"role": "user", "content": "Which colours does a rainbow have?"},
        {
            "role": "assistant",
            "content": "Red, orange, yellow, green, blue, indigo and violet: seven.\n\nMore?",
        },
        {"role": "user", "content": "  Und auf Deutsch? 日本語で? <|im_end|> 🙂\n"},
    ]
    for messages in (turns[:1], turns, [{"role": "system", "content": "Be brief."}, *turns]):
        expected = auto_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        found = engine.apply_chat_template(messages)
        assert found == auto_tokenizer(expected, add_special_tokens=False).input_ids
        result = engine.chat(messages, max_new_tokens=2)
        assert (result.prompt, result.prompt_token_ids) == (expected, found)


def test_a_question_is_answered_alike_with_drafts(smollm2_file: Path, build_engine: EngineFactory) -> None:
    engine = build_engine(smollm2_file, "suffix", max_seq_len=512)
    text = "Paris is the capital of France. " * 4
    prompt = CHAT.format(f"{text}What is the capital of France?")
    plain, drafted = (
        engine.generate(
            prompt,
            specengine.SamplingParams(
                max_new_tokens=30, temperature=0.0, num_speculative_tokens=k, logprobs=1
            ),
        )
        for k in (0, 5)
    )
    assert "Paris" in plain.text
    assert plain.outputs[0].finish_reason == "stop"
    assert drafted.token_ids == plain.token_ids
    assert drafted.outputs[0].logprobs == plain.outputs[0].logprobs
