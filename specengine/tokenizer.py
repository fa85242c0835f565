"""Text to ids and back, on the `tokenizers` library; text that streams is never split inside a character."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import tokenizers

from specengine.errors import VocabularyMismatchError
from specengine.json_file import shorten

REPLACEMENT = "\ufffd"
# Characters from which on a text takes long enough that others should not wait for it.
_LONG_TEXT = 4096


SPACE = "\u2581"  # how SentencePiece spells it
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_EACH_BYTE = "specengine.each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """How the `tokenizers` library writes bytes that are no UTF-8: U+FFFD for each."""
    assert isinstance(error, UnicodeDecodeError), error
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


def _byte_of_character() -> dict[str, int]:
    """Which byte a character of a byte-level spelling is: itself where it can be seen, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_of_character()


class Tokenizer:
    """A checkpoint's tokenizer.

    vocab_size:     number of ids, added tokens included: the largest id + 1
    eos_token_id:   the end-of-text token that the checkpoint's tokenizer files name, or None
    special_tokens: the text of each special token, by id; `decode` leaves them out
    roles:          the texts of the special tokens that have a name in the checkpoint: bos_token, eos_token and so on
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        eos_token: str | None = None,
        roles: Mapping[str, str] | None = None,
    ) -> None:
        # What a checkpoint was trained with says nothing about how its prompts are to be cut.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        self.roles = {**({} if eos_token is None else {"eos_token": eos_token}), **(roles or {})}
        self.eos_token_id = None if eos_token is None else self._vocabulary.get(eos_token)
        added = tokenizer.get_added_tokens_decoder()
        self.special_tokens = {
            token_id: token.content for token_id, token in sorted(added.items()) if token.special
        }
        self.special_token_ids = frozenset(self.special_tokens)
        self._whole_texts: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the special tokens that the checkpoint's post-processor adds."""
        return self._encode(text, add_special_tokens=True)

    def encode_part(self, text: str) -> list[int]:
        """Ids of `text` as a part of another: without the special tokens that a text begins or ends with."""
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) < _LONG_TEXT:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        # A batch is cut without holding the interpreter's lock: other threads go on.
        return list(self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)

    def token(self, token_id: int) -> str:
        """A token as the vocabulary spells it."""
        return str(self._tokenizer.id_to_token(token_id))

    def fewest_tokens(self, text: str) -> int:
        """No encoding of `text` has fewer tokens: found without making one. 0 where that cannot be told."""
        if len(text) < _LONG_TEXT or self._longest_token is None:
            return 0
        return -(-len(text.encode()) // self._longest_token)

    @cached_property
    def _longest_token(self) -> int | None:
        """The most bytes of a text that one token stands for, where a token is its bytes and no more."""
        tokenizer = self._tokenizer
        is_bytes = (
            isinstance(tokenizer.model, tokenizers.models.BPE)
            and isinstance(tokenizer.pre_tokenizer, tokenizers.pre_tokenizers.ByteLevel)
            and tokenizer.normalizer is None
            and set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) <= self._vocabulary.keys()
            and not any(
                token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values()
            )
        )
        # Each byte is a character of the spelling; an added token's may be of several bytes.
        return max(len(token.encode()) for token in self._vocabulary) if is_bytes else None

    def encode_piece(self, text: str) -> tuple[int, ...]:
        """Ids of a part of a text, without the special tokens that go around a whole one; empty where this vocabulary
        cannot spell it."""
        try:
            return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception:  # the library's own, bare: a word that is unknown, and no token for unknown words
            return ()

    @cached_property
    def _decoder_state(self) -> str:
        decoder = self._tokenizer.decoder
        return "" if decoder is None else decoder.__getstate__().decode()

    @property
    def spells_bytes(self) -> bool:
        """Whether its decoder says which bytes a spelling stands for."""
        return '"ByteLevel"' in self._decoder_state or SPACE in self._decoder_state

    def spellings(self, *, as_bytes: bool) -> dict[int, tuple[bool, bytes]]:
        """By id, whether a token is special, and its spelling, or the bytes that it stands for (`spells_bytes`)."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {
            token_id: (
                token_id in self.special_token_ids,
                token.encode("utf-8", "surrogatepass")
                if token_id in added or not as_bytes
                else self._bytes_of(token),
            )
            for token, token_id in sorted(self._vocabulary.items(), key=lambda item: -item[1])
        }

    def _bytes_of(self, token: str) -> bytes:
        if '"ByteLevel"' in self._decoder_state:
            known = all(character in _BYTE_OF for character in token)
            return bytes(_BYTE_OF[character] for character in token) if known else token.encode()
        if '"ByteFallback"' in self._decoder_state and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.replace(SPACE, " ").encode("utf-8", "surrogatepass")

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special tokens skipped; bytes that are no UTF-8 become U+FFFD."""
        if self._byte_tokens and not self._byte_tokens.keys().isdisjoint(token_ids):
            return self._decode_bytes(token_ids)
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    @cached_property
    def _byte_tokens(self) -> dict[int, bytes]:
        """Of a SentencePiece vocabulary the tokens that are a byte each."""
        if '"ByteFallback"' not in self._decoder_state:
            return {}
        return {
            token_id: self._bytes_of(token)
            for token, token_id in self._vocabulary.items()
            if _BYTE_TOKEN.fullmatch(token)
        }

    def _decode_bytes(self, token_ids: Sequence[int]) -> str:
        """The library gives up a whole run of bytes for one that is not there yet; here only that one's character."""
        parts: list[str] = []
        for is_byte, run in itertools.groupby(token_ids, self._byte_tokens.__contains__):
            if is_byte:
                parts.append(b"".join(map(self._byte_tokens.__getitem__, run)).decode("utf-8", _EACH_BYTE))
            else:
                tokens = (
                    self._tokenizer.id_to_token(each) for each in run if each not in self.special_token_ids
                )
                parts += [token for token in tokens if token is not None]
        return str(self._tokenizer.decoder.decode(parts))

    def whole_text(self, token_id: int) -> str:
        """What a token adds to any text that ends with a whole character; "" where that may depend on the text."""
        text = self._whole_texts.get(token_id)
        if text is None:
            # Byte for byte, no decoder looks at more than the token.
            is_bytes = isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel)
            text = self.decode((token_id,)) if is_bytes else ""
            text = self._whole_texts[token_id] = "" if REPLACEMENT in text else text
        return text

    @cached_property
    def vocabulary_fingerprint(self) -> str:
        """Equal for two tokenizers iff every token has the same id in both."""
        digest = hashlib.sha256()
        for token, token_id in sorted(self._vocabulary.items()):
            data = token.encode("utf-8", "surrogatepass")
            digest.update(f"{len(data)}:{token_id}:".encode() + data)
        return digest.hexdigest()

    def difference_from(self, other: Tokenizer) -> str:
        """The first token, by id, on which two vocabularies differ, in words; empty if they are the same."""
        mine, theirs = set(self._vocabulary.items()), set(other._vocabulary.items())
        if mine == theirs:
            return ""
        token, _ = min(mine ^ theirs, key=lambda item: (item[1], item[0]))
        ids = [str(vocabulary.get(token, "absent")) for vocabulary in (self._vocabulary, other._vocabulary)]
        return f"token {shorten(token)} has id {ids[0]} in the first and {ids[1]} in the second"


class IncrementalDetokenizer:
    """Turns generated ids into text as they come.

    The deltas add up to what decoding prompt and generated ids together puts after the prompt's own text. A
    character is delivered once its bytes are complete, U+FFFD once no further byte can turn it into one. Each
    token costs the decoding of a few ids, however long the text.
    """

    _MAX_PENDING = 3  # a character has at most four bytes, so at most three are waiting for the last
    _NUM_CONTEXT = 8
    _MAX_WINDOW = 24

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = self._visible(prompt_ids[-4 * self._NUM_CONTEXT :])[-self._NUM_CONTEXT :]
        text = tokenizer.decode(self._window)
        self._num_sent = self._stable_length(text)
        # U+FFFD at the prompt's end: the prompt's own, unless the next id completes the character.
        self._prompt_tail = text[self._num_sent :]
        self._boundary = len(self._window)
        # Whether all of the window's text is out, and ends with a whole character.
        self._is_out = not self._prompt_tail

    def push(self, token_id: int) -> str:
        """The text that `token_id` settles, often its own, sometimes none or more."""
        if token_id in self._tokenizer.special_token_ids:
            return ""
        if self._is_out and (whole := self._tokenizer.whole_text(token_id)):
            self._window, self._boundary, self._num_sent = [token_id], 1, len(whole)
            return whole
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        delta = self._deliver(text, self._stable_length(text))
        self._is_out = bool(delta) and self._num_sent == len(text)
        if self._is_out:
            self._forget_before_boundary()
        elif len(self._window) % self._MAX_WINDOW == 0:
            self._forget_settled(text)
        return delta

    def finish(self) -> str:
        """What is left: bytes that no further id will complete."""
        text = self._tokenizer.decode(self._window)
        return self._deliver(text, len(text))

    def _visible(self, token_ids: Sequence[int]) -> list[int]:
        special = self._tokenizer.special_token_ids
        return [token_id for token_id in token_ids if token_id not in special]

    def _stable_length(self, text: str) -> int:
        tail = len(text) - len(text.rstrip(REPLACEMENT))
        return len(text) - min(tail, self._MAX_PENDING)

    def _deliver(self, text: str, end: int) -> str:
        start = self._num_sent + _common_prefix_length(text[self._num_sent :], self._prompt_tail)
        if end <= start:
            return ""
        self._num_sent, self._prompt_tail = end, ""
        return text[start:end]

    def _forget_before_boundary(self) -> None:
        """All text is out: the ids since the last such moment are context enough if a decoder looks back."""
        self._window = self._window[self._boundary :]
        self._boundary = len(self._window)
        self._num_sent = len(self._tokenizer.decode(self._window))

    def _forget_settled(self, text: str) -> None:
        """Cuts text that keeps ending in U+FFFD where both sides decode alone as they decode together.

        No character is split there, and none will be: further bytes change only the last character.
        """
        for cut in range(len(self._window) - 1, 0, -1):
            settled = self._tokenizer.decode(self._window[:cut])
            if len(settled) > self._num_sent:
                continue
            if settled + self._tokenizer.decode(self._window[cut:]) == text:
                self._window = self._window[cut:]
                self._num_sent -= len(settled)
                self._boundary = 0
                return


def _common_prefix_length(first: str, second: str) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length


@dataclass(frozen=True)
class Vocabulary:
    """What decides whether two models can work together.

    name:     the model's, for messages
    num_rows: ids that its embedding and head know, padding included
    """

    name: str
    num_rows: int
    tokenizer: Tokenizer | None


def check_compatible(target: Vocabulary, draft: Vocabulary) -> int:
    """The number of ids that the pair may use: the target's own, never more than its tokenizer has.

    Tokenizers must agree on every token's id; the models' sizes may differ by padding rows. Where a model has
    no tokenizer there is nothing to compare but sizes, which must be equal. Raises `VocabularyMismatchError`
    naming both models and the difference.
    """
    pair = f"target {target.name!r} and draft {draft.name!r} do not share a vocabulary"
    num_ids = num_usable_ids(target)
    if target.tokenizer is None or draft.tokenizer is None:
        if target.num_rows != draft.num_rows:
            raise VocabularyMismatchError(
                f"{pair}: {target.num_rows} and {draft.num_rows} ids, and no tokenizers to compare"
            )
        return min(num_ids, num_usable_ids(draft))
    if target.tokenizer.vocabulary_fingerprint != draft.tokenizer.vocabulary_fingerprint:
        raise VocabularyMismatchError(f"{pair}: {target.tokenizer.difference_from(draft.tokenizer)}")
    if draft.num_rows < num_ids:
        raise VocabularyMismatchError(
            f"{pair}: the target uses {num_ids} ids, the draft's embedding has {draft.num_rows} rows"
        )
    return num_ids


def num_usable_ids(vocabulary: Vocabulary) -> int:
    """Ids that a model may emit: it has a row for them, and its tokenizer, if any, knows them."""
    if vocabulary.tokenizer is None:
        return vocabulary.num_rows
    return min(vocabulary.num_rows, vocabulary.tokenizer.vocab_size)
