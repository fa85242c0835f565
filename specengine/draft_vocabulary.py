"""Which tokens a draft's head keeps, where it is not to have them all: those that a text has most often.

Most of a text is written with a few of its vocabulary's tokens, and a head reads a row for every one of them. A draft
whose head has only the frequent ones (FR-Spec, Zhao et al., 2025) costs less and never proposes the others, which the
target goes on saying itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

from specengine import bundled
from specengine.tokenizer import Tokenizer, Vocabulary, num_usable_ids
from specengine.translation import ByText, Translation


def choose_tokens(
    num_tokens: int,
    text_file: str | None,
    *,
    target: Vocabulary,
    draft: Vocabulary,
    translation: Translation | ByText | None,
) -> tuple[int, ...]:
    """The ids that the draft's head keeps, ascending: the draft's own, or the target's, where it is renumbered.

    text_file:   of UTF-8 text, whose tokens are counted; None: the bundled prompts
    translation: how the draft speaks the target's vocabulary, see `specengine.translation.translate`

    Raises `ValueError` naming the option for more tokens than there are, and for a text that cannot be read or counted.
    """
    tokenizer, candidates = draft.tokenizer or target.tokenizer, num_usable_ids(draft)
    known: Collection[int] = range(candidates)
    if isinstance(translation, Translation):
        tokenizer = target.tokenizer
        known = [token for token, own in enumerate(translation.shared) if own is not None]
    elif translation is None:
        known = range(min(candidates, num_usable_ids(target)))
    if num_tokens > len(known):
        raise ValueError(
            f"draft_vocab_size={num_tokens}: of draft {draft.name!r} only {len(known)} tokens can be proposed"
        )
    return tuple(sorted(_most_frequent(num_tokens, known, count_tokens(tokenizer, text_file))))


def count_tokens(tokenizer: Tokenizer | None, text_file: str | None) -> Counter[int]:
    """How often a text has each token. Without a tokenizer there is no text to count in."""
    if tokenizer is None:
        if text_file is not None:
            raise ValueError(f"draft_vocab_text={text_file!r}: the models have no tokenizer to read it with")
        return Counter()
    bundled_texts = (prompt["prompt"] for prompt in bundled.load_prompts())
    texts = bundled_texts if text_file is None else (_read(text_file),)
    counts = Counter(token for text in texts for token in tokenizer.encode_piece(text))
    if text_file is not None and not counts:
        raise ValueError(f"draft_vocab_text={text_file!r}: has no token that the model knows")
    return counts


def _most_frequent(num_tokens: int, known: Collection[int], counts: Counter[int]) -> list[int]:
    """Of tokens that are equally frequent the lowest ids: they were merged first, which in the text that a vocabulary
    was made of is an order of frequency."""
    return sorted(known, key=lambda token: (-counts[token], token))[:num_tokens]


def _read(text_file: str) -> str:
    try:
        return Path(text_file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"draft_vocab_text={text_file!r}: cannot be read as UTF-8 text ({error})") from None
