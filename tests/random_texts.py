"""Seeded texts that tokenizers find hard: scripts, emoji, code, runs of whitespace, special tokens in the text."""

from __future__ import annotations

import random
from collections.abc import Sequence

_SPACES = [
    *(" ", "  ", "   ", "       ", "\n", "\n\n", "\n \n", "\t", "\t\t", "\r\n", "\r", " \n", "\n "),
    *("\u00a0", "\u2003", "\u3000", "\u2028", "\x0b", "\x0c", "\x85", "\ufeff"),
]
_CODE = [
    *(
        "def ",
        "return ",
        "x = ",
        "self.",
        "(a, b)",
        "[0]",
        "{}",
        "->",
        "=>",
        "!=",
        "//",
        "/* */",
        "# ",
        "0x1F",
        "1e-5",
    ),
    *(
        "<br/>",
        "&amp;",
        "\\n",
        "f'{x}'",
        '"""',
        "'s",
        "'S",
        "'re",
        "I'M",
        "don't",
        "we'LL",
        "a'd",
        "_private",
        "camelCase",
    ),
]
_WORDS = [
    *(
        "the ",
        "and",
        " of",
        "Hello",
        " world",
        "tokenizer",
        "ING",
        "café",
        "e\u0301",
        "Ångström",
        "Straße",
        "ﬁ",
    ),
    *(
        "नमस्ते",
        "مرحبا",
        "한국어",
        "こんにちは",
        "你好世界",
        "ไทย",
        "Ελλάδα",
        "Привет",
        "Ⅷ",
        "²",
        "½",
        "١٢",
        "㉈",
        "ǅ",
        "ʰ",
    ),
]


def random_texts(count: int, seed: int, special: Sequence[str] = ()) -> list[str]:
    """As many texts, of 1 to 14 parts each. special: what also stands in them."""
    chance = random.Random(seed)
    return ["".join(_part(chance, special) for _ in range(chance.randint(1, 14))) for _ in range(count)]


def _part(chance: random.Random, special: Sequence[str]) -> str:
    kind = chance.randrange(9 if special else 8)
    if kind < 3:
        return chance.choice((_SPACES, _CODE, _WORDS)[kind])
    length = chance.randint(1, 6)
    if kind == 3:
        return "".join(chr(chance.randrange(0x20, 0x7F)) for _ in range(2 * length))
    if kind == 4:
        return "".join(chr(chance.randrange(0x4E00, 0x9FA6)) for _ in range(length))
    if kind == 5:
        joiners = (0x200D, 0xFE0F, 0x1F3FB)
        return "".join(
            chr(chance.choice((chance.randrange(0x1F300, 0x1FAFF), *joiners))) for _ in range(length)
        )
    if kind == 6:
        return str(chance.randrange(10 ** (2 * length)))
    if kind == 7:  # any character that there is, half of the private use areas and surrogates apart
        return chr(chance.choice((chance.randrange(0xD800), chance.randrange(0xE000, 0x20000))))
    return chance.choice(special)
