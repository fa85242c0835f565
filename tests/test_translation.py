"""Which tokens of two vocabularies are the same, and what a draft reads where it has none."""

from __future__ import annotations

import tiny_models
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models

from specengine.tokenizer import REPLACEMENT, Tokenizer, Vocabulary
from specengine.translation import ByText, Translation, translate

RAW = tiny_models.build_tokenizer(320)
BYTE_LEVEL = Tokenizer(RAW, eos_token=tiny_models.END_OF_TEXT)


def build(tokens: list[str], decoder: decoders.Decoder | None, *, special: str | None = None) -> Tokenizer:
    """A tokenizer without merges, whose ids are the places in `tokens`."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    if decoder is not None:
        raw.decoder = decoder
    if special is not None:
        raw.add_special_tokens([AddedToken(special, special=True)])
    return Tokenizer(raw, eos_token=special)


def shared_ids(target: Tokenizer, draft: Tokenizer) -> list[int | None]:
    translation = translate(vocabulary("T", target), vocabulary("D", draft))
    assert isinstance(translation, Translation)
    return list(translation.shared)


def vocabulary(name: str, tokenizer: Tokenizer, num_rows: int | None = None) -> Vocabulary:
    return Vocabulary(name, num_rows or tokenizer.vocab_size, tokenizer)


def test_tokens_match_by_name_whatever_their_ids() -> None:
    model = tiny_models.build_model(vocab_size=320, seed=1)
    permuted = Tokenizer(tiny_models.renumbered(model, RAW, seed=3)[1], eos_token=tiny_models.END_OF_TEXT)
    shared = shared_ids(BYTE_LEVEL, permuted)
    assert [permuted.token(index) for index in shared] == [BYTE_LEVEL.token(index) for index in range(320)]
    assert shared != list(range(320))


def test_the_same_vocabulary_needs_no_translation() -> None:
    assert translate(vocabulary("T", BYTE_LEVEL), vocabulary("D", BYTE_LEVEL, 384)) is None
    assert translate(vocabulary("T", BYTE_LEVEL), Vocabulary("D", 320, None)) is None


def test_bytes_are_compared_where_spellings_differ() -> None:
    bytes_ = build(["Ġthe", "é", "Ã©", "Ċ", "a", "▁"], decoders.ByteLevel())
    sentence_piece = build(
        ["a", "▁the", "é", "<0x0A>", "<0xE9>"],
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )
    assert shared_ids(bytes_, sentence_piece) == [1, 4, 2, 3, 0, None]
    assert shared_ids(sentence_piece, bytes_) == [4, 0, 2, 3, 1]


def test_a_decoder_that_does_not_say_its_bytes_leaves_the_spelling() -> None:
    assert shared_ids(build(["Ġthe", "a", "é"], decoders.ByteLevel()), build(["a", "Ġthe"], None)) == [
        1,
        0,
        None,
    ]


def test_ends_of_text_are_the_same_under_any_name_and_special_tokens_are_no_text() -> None:
    first = build(["a", "b"], decoders.ByteLevel(), special="</s>")
    assert shared_ids(first, build(["</s>", "b"], decoders.ByteLevel(), special="<end>")) == [None, 1, 2]
    assert shared_ids(first, build(["</s>", "b"], decoders.ByteLevel())) == [None, 1, None]


def test_rows_beyond_the_tokenizer_or_the_model_are_no_tokens() -> None:
    permuted = build(["c", "b", "a"], decoders.ByteLevel())
    target = build(["a", "b", "c", "d"], decoders.ByteLevel())
    translation = translate(vocabulary("T", target, 7), vocabulary("D", permuted, 2))
    assert isinstance(translation, Translation)
    assert list(translation.shared) == [None, 1, 0, None]


def test_a_token_that_the_draft_has_not_is_read_as_the_mean_of_its_parts() -> None:
    smaller = Tokenizer(tiny_models.build_tokenizer(300), eos_token=tiny_models.END_OF_TEXT)
    translation = translate(vocabulary("T", BYTE_LEVEL), vocabulary("D", smaller))
    assert isinstance(translation, Translation)
    assert list(translation.shared[:300]) == list(range(300))
    assert set(translation.spelled) == set(range(300, 320))
    rows = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    table, head, bias = translation.table(rows), translation.head(rows), translation.head_bias()
    assert torch.equal(table[:300], rows)
    assert torch.equal(head[:300], rows)
    assert bias is not None
    assert bias.tolist() == [0.0] * 300 + [float("-inf")] * 20
    end_of_text = (0,)
    for token, pieces in translation.spelled.items():
        text = BYTE_LEVEL.decode([token])
        assert pieces == end_of_text if REPLACEMENT in text else smaller.decode(pieces) == text
        assert torch.allclose(table[token], rows[list(pieces)].mean(dim=0))


def test_nothing_in_common_leaves_the_text() -> None:
    other = build(["no token", "of theirs"], None)
    assert translate(vocabulary("T", BYTE_LEVEL), vocabulary("D", other)) == ByText(0, 320)
