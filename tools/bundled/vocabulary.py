"""The tokenizer of the bundled pair: byte-level BPE, 4096 entries, `<|endoftext|>` first; text round-trips exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .corpus import Document

VOCABULARY_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
TEST_FILE_STRIDE = 4  # the tokenizer sees every fourth test file, so that ordinary modules shape the merges


def train_tokenizer(documents: list[Document]) -> Tokenizer:
    """Train the BPE on the training files of `documents` (deterministic: counts only, no sampling)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(documents), trainer=trainer)
    if tokenizer.get_vocab_size() != VOCABULARY_SIZE or tokenizer.token_to_id(END_OF_TEXT) != END_OF_TEXT_ID:
        raise RuntimeError(f"unexpected vocabulary of {tokenizer.get_vocab_size()} entries")
    return tokenizer


def _tokenizer_texts(documents: list[Document]) -> Iterator[str]:
    training = [document for document in documents if not document.is_held_out]
    tests = [document for document in training if document.is_test]
    yield from (document.text for document in training if not document.is_test)
    yield from (document.text for document in tests[::TEST_FILE_STRIDE])


def encode_documents(tokenizer: Tokenizer, documents: list[Document]) -> list[np.ndarray]:
    """Token ids of each document, `uint16`, each ended by `<|endoftext|>`; checks that decoding gives the text back."""
    tokenizer.encode_special_tokens = True  # a literal "<|endoftext|>" in a source file stays text
    encodings = tokenizer.encode_batch([document.text for document in documents])
    arrays = []
    for document, encoding in zip(documents, encodings, strict=True):
        if tokenizer.decode(encoding.ids, skip_special_tokens=False) != document.text:
            raise RuntimeError(f"{document.path} does not round-trip through the tokenizer")
        arrays.append(np.array([*encoding.ids, END_OF_TEXT_ID], dtype=np.uint16))
    tokenizer.encode_special_tokens = False
    return arrays


def save_tokenizer(tokenizer: Tokenizer, directory: Path, context: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` as transformers expects them."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )
    fast.save_pretrained(directory)
