"""What the value of an option may be: how it is checked, written on a command line, and described.

`check` gives the value in its one form, or raises `TypeError` or `ValueError` naming the parameter and the value.
`parse` reads what is written on a command line; its `ValueError` says what is wrong with that text.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from specengine.weight_formats import WEIGHT_FORMATS

AUTO: Literal["auto"] = "auto"
MAX_TOKEN_ID = 2**31 - 1
MAX_NUM_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 256
MAX_LOGIT_BIAS = 1e4
MAX_NUM_DRAFTERS = 16
MAX_NUM_BAD_WORDS = 1024
MAX_BAD_WORD_LENGTH = 256
_DEVICE = re.compile(r"auto|(cpu|cuda)(:\d+)?")
_ESCAPE = re.compile(r"\\(?:([nrt\\])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|)")
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


# Checks


def check_int(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int in [low, high]; TypeError or ValueError naming parameter and value otherwise."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {number}")
    return number


def check_ids(name: str, ids: Sequence[Any], high: int = MAX_TOKEN_ID) -> list[int]:
    """`ids` as ints in [0, high]; as `check_int` where one is not, naming its place."""
    # The same at the speed of C, for Python's own ints: there may be hundreds of thousands.
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) <= high:
        return list(ids)
    checked = []
    for place, each in enumerate(ids):
        is_right = type(each) is int and 0 <= each <= high
        checked.append(each if is_right else check_int(f"{name}[{place}]", each, 0, high))
    return checked


def check_number(name: str, value: object) -> float:
    """`value` as a finite float; TypeError or ValueError naming parameter and value otherwise."""
    if isinstance(value, bool | str | bytes):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        raise ValueError(f"{name} must be finite, got {value!r}") from None
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return number


def check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_text(name: str, value: str) -> str:
    """Refuses what no UTF-8 can hold, by its place: half of a surrogate pair, as bytes that are no UTF-8 become."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be text, got {value[error.start]!r} at position {error.start}: half of a surrogate pair, or "
            "a byte that is no UTF-8"
        ) from None
    return value


# Kinds


@dataclass(frozen=True)
class Kind:
    """Anything.

    metavar:     the value's name on a help page
    range:       which values there are, in words; "" where the type says it
    accepts:     the type of what a caller may give, where it is wider than the field's
    is_repeated: a command line may give several, one by one
    is_written:  a command line can give it
    """

    metavar: ClassVar[str] = "TEXT"
    accepts: ClassVar[str] = ""
    is_repeated: ClassVar[bool] = False
    is_written: ClassVar[bool] = True

    @property
    def range(self) -> str:
        return ""

    def check(self, name: str, value: Any) -> Any:
        return value

    def parse(self, text: str) -> Any:
        return text

    def gather(self, values: list[Any]) -> Any:
        """What several parsed values are together, where a command line may give several."""
        return tuple(values)


@dataclass(frozen=True)
class Integer(Kind):
    """low to high, both included."""

    low: int
    high: int

    metavar: ClassVar[str] = "INT"

    @property
    def range(self) -> str:
        return f"{self.low} to {_in_powers(self.high)}"

    def check(self, name: str, value: Any) -> Any:
        return check_int(name, value, self.low, self.high)

    def parse(self, text: str) -> Any:
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{text!r} is not an integer") from None


@dataclass(frozen=True)
class IntegerOrAuto(Integer):
    """The same, or "auto"."""

    metavar: ClassVar[str] = "INT|auto"

    @property
    def range(self) -> str:
        return f"auto, or {super().range}"

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, str):
            return super().check(name, value)
        if value != AUTO:
            raise ValueError(f"{name} must be an integer or 'auto', got {value!r}")
        return AUTO

    def parse(self, text: str) -> Any:
        try:
            return text if text == AUTO else int(text)
        except ValueError:
            raise ValueError(f"{text!r} is neither an integer nor 'auto'") from None


@dataclass(frozen=True)
class Number(Kind):
    """low to high, both included.

    or_zero:   0 too, though it is below low
    above_low: all but low itself
    """

    low: float
    high: float
    or_zero: bool = False
    above_low: bool = False

    metavar: ClassVar[str] = "NUMBER"

    @property
    def range(self) -> str:
        if self.above_low:
            return f"above {self.low:g}, up to {self.high:g}"
        return f"{'0, or ' if self.or_zero else ''}{self.low:g} to {self.high:g}"

    def check(self, name: str, value: Any) -> Any:
        number = check_number(name, value)
        is_inside = self.low <= number <= self.high and not (self.above_low and number == self.low)
        if not is_inside and not (self.or_zero and number == 0.0):
            raise ValueError(f"{name} must be {self.range}, got {number:g}")
        return number

    def parse(self, text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a number") from None


@dataclass(frozen=True)
class Flag(Kind):
    """True or False."""

    def check(self, name: str, value: Any) -> Any:
        return check_bool(name, value)


@dataclass(frozen=True)
class FlagOrAuto(Flag):
    """True, False or "auto"; a command line that says nothing means "auto"."""

    @property
    def range(self) -> str:
        return "auto, True or False"

    def check(self, name: str, value: Any) -> Any:
        if value is not True and value is not False and value != AUTO:
            raise ValueError(f"{name} must be 'auto', True or False; got {value!r}")
        return value


@dataclass(frozen=True)
class Choice(Kind):
    """One of some names."""

    names: tuple[str, ...]

    metavar: ClassVar[str] = "NAME"

    @property
    def range(self) -> str:
        return ", ".join(self.names)

    def check(self, name: str, value: Any) -> Any:
        if value not in self.names:
            raise ValueError(f"{name} must be one of {self.range}; got {value!r}")
        return str(value)


@dataclass(frozen=True)
class DtypeName(Choice):
    """A dtype by its name, by a usual short one, or as a `torch.dtype`."""

    accepts: ClassVar[str] = "Any"
    _ABBREVIATIONS: ClassVar[Mapping[str, str]] = {
        "fp32": "float32",
        "bf16": "bfloat16",
        "fp16": "float16",
        "half": "float16",
    }

    def check(self, name: str, value: Any) -> Any:
        text = str(value).removeprefix("torch.")
        text = self._ABBREVIATIONS.get(text, text)
        if text in WEIGHT_FORMATS and text not in self.names:
            raise ValueError(
                f"{name}={text!r} is for weight_dtype and draft_weight_dtype; {name} has {self.range}"
            )
        return super().check(name, text)


@dataclass(frozen=True)
class DeviceName(Kind):
    """A device by its name or as a `torch.device`."""

    metavar: ClassVar[str] = "NAME"
    accepts: ClassVar[str] = "Any"

    @property
    def range(self) -> str:
        return "auto, cpu, cuda, cuda:1 and so on"

    def check(self, name: str, value: Any) -> Any:
        if not _DEVICE.fullmatch(str(value)):
            raise ValueError(f"{name} must be 'auto', 'cpu' or 'cuda[:n]', got {value!r}")
        return str(value)


@dataclass(frozen=True)
class Text(Kind):
    """A string that is not empty."""

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string, got {value!r}")
        if not value:
            raise ValueError(f"{name} must not be empty, got ''")
        return check_text(name, value)


@dataclass(frozen=True)
class FilePath(Text):
    """The path of a file, as a string; what is in it shows when it is read."""

    metavar: ClassVar[str] = "FILE"
    accepts: ClassVar[str] = "str | os.PathLike[str] | None"

    def check(self, name: str, value: Any) -> Any:
        return super().check(name, os.fspath(value) if isinstance(value, os.PathLike) else value)


@dataclass(frozen=True)
class Model(Kind):
    """A directory, a name on the Hub, or an object; what it is shows when it is loaded. what: in a message."""

    what: str = "a directory, a name or a model"

    metavar: ClassVar[str] = "NAME"

    def check(self, name: str, value: Any) -> Any:
        if isinstance(value, str) and not value:
            raise ValueError(f"{name} must be {self.what}, got ''")
        return value


def _is_same(one: object, other: object) -> bool:
    """Whether these name the same, or are the same object."""
    if isinstance(one, str | os.PathLike) and isinstance(other, str | os.PathLike):
        return os.fspath(one) == os.fspath(other)
    return one is other


@dataclass(frozen=True)
class Drafting(Model):
    """What drafts: one thing or a list of them."""

    is_repeated: ClassVar[bool] = True

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return super().check(name, value)
        if not 0 < len(value) <= MAX_NUM_DRAFTERS:
            raise ValueError(f"{name} must list 1 to {MAX_NUM_DRAFTERS} drafters, got {len(value)}")
        for each in value:
            if each is None or isinstance(each, list | tuple):
                raise TypeError(
                    f"{name} must list models, names and Drafter objects, got {each!r} among them"
                )
            super().check(name, each)
        for place, each in enumerate(value):
            if any(_is_same(each, other) for other in value[:place]):
                raise ValueError(f"{name} must list a drafter once, got {each!r} twice")
        return tuple(value)

    def gather(self, values: list[Any]) -> Any:
        return values[0] if len(values) == 1 else values


@dataclass(frozen=True)
class Repeated(Kind):
    """Several values, None for none of them; what `check` gives is a tuple."""

    is_repeated: ClassVar[bool] = True


@dataclass(frozen=True)
class Functions(Repeated):
    """Something to call, or several: nothing that a command line could give."""

    accepts: ClassVar[str] = "Callable[..., Any] | Sequence[Callable[..., Any]] | None"
    is_written: ClassVar[bool] = False

    def check(self, name: str, value: Any) -> Any:
        if value is None:
            return ()
        functions = tuple(value) if isinstance(value, list | tuple) else (value,)
        for function in functions:
            if not callable(function):
                raise TypeError(f"{name} must be a function or a list of them, got {function!r}")
        return functions


@dataclass(frozen=True)
class StopStrings(Repeated):
    """A string or several. A command line writes some characters as `unescape` reads them."""

    accepts: ClassVar[str] = "str | Sequence[str] | None"

    @property
    def range(self) -> str:
        return f"up to {MAX_NUM_STOP_STRINGS} of up to {MAX_STOP_STRING_LENGTH} characters"

    def check(self, name: str, value: Any) -> Any:
        if value is None:
            return ()
        if not isinstance(value, Iterable):
            raise TypeError(f"{name} must be a string or a list of strings, got {value!r}")
        strings = (value,) if isinstance(value, str) else tuple(value)
        if len(strings) > MAX_NUM_STOP_STRINGS:
            raise ValueError(f"{name} must hold at most {MAX_NUM_STOP_STRINGS} strings, got {len(strings)}")
        for place, string in enumerate(strings):
            if not isinstance(string, str):
                raise TypeError(f"{name} must hold strings, got {string!r}")
            if not 0 < len(string) <= MAX_STOP_STRING_LENGTH:
                raise ValueError(
                    f"{name} strings must have 1 to {MAX_STOP_STRING_LENGTH} characters, got one of {len(string)}"
                )
            check_text(f"{name}[{place}]", string)
        return strings

    def parse(self, text: str) -> Any:
        return unescape(text)


@dataclass(frozen=True)
class BadWords(Repeated):
    """Strings, or lists of token ids; a string alone is one. A command line gives strings, as `unescape` reads them."""

    accepts: ClassVar[str] = "str | Sequence[str | Sequence[int]] | None"

    @property
    def range(self) -> str:
        return f"up to {MAX_NUM_BAD_WORDS} of up to {MAX_BAD_WORD_LENGTH} characters or ids"

    def check(self, name: str, value: Any) -> Any:
        if value is None:
            return ()
        if not isinstance(value, Sequence):
            raise TypeError(f"{name} must be strings or lists of token ids, got {value!r}")
        words = (value,) if isinstance(value, str) else tuple(value)
        if len(words) > MAX_NUM_BAD_WORDS:
            raise ValueError(f"{name} must hold at most {MAX_NUM_BAD_WORDS} words, got {len(words)}")
        return tuple(self._check_word(f"{name}[{place}]", word) for place, word in enumerate(words))

    def _check_word(self, name: str, word: Any) -> str | tuple[int, ...]:
        if not isinstance(word, Sequence):
            raise TypeError(f"{name} must be a string or a list of token ids, got {word!r}")
        if not 0 < len(word) <= MAX_BAD_WORD_LENGTH:
            raise ValueError(
                f"{name} must have 1 to {MAX_BAD_WORD_LENGTH} characters or ids, got {len(word)}"
            )
        if isinstance(word, str):
            return check_text(name, word)
        return tuple(check_ids(name, word))

    def parse(self, text: str) -> Any:
        return unescape(text)


@dataclass(frozen=True)
class TokenIds(Repeated):
    """An id or several."""

    metavar: ClassVar[str] = "ID"
    accepts: ClassVar[str] = "int | Sequence[int] | None"

    def check(self, name: str, value: Any) -> Any:
        if value is None:
            return ()
        if not isinstance(value, Sequence | set | frozenset):
            return (check_int(name, value, 0, MAX_TOKEN_ID),)
        return tuple(sorted(set(check_ids(name, tuple(value)))))

    def parse(self, text: str) -> Any:
        return Integer(0, MAX_TOKEN_ID).parse(text)


@dataclass(frozen=True)
class LogitBias(Repeated):
    """A number for each of some token ids, as a mapping or as pairs."""

    metavar: ClassVar[str] = "ID=BIAS"
    accepts: ClassVar[str] = "Mapping[int, float] | None"

    @property
    def range(self) -> str:
        return f"{-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}"

    def check(self, name: str, value: Any) -> Any:
        if value is None:
            return ()
        if not isinstance(value, Mapping | tuple):
            raise TypeError(f"{name} must map token ids to numbers, got {value!r}")
        items = tuple(value.items()) if isinstance(value, Mapping) else value
        number = Number(-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        pairs = tuple(
            (
                check_int(f"{name} token id", token_id, 0, MAX_TOKEN_ID),
                number.check(f"{name}[{token_id}]", bias),
            )
            for token_id, bias in items
        )
        for token_id, count in Counter(token_id for token_id, _ in pairs).items():
            if count > 1:
                raise ValueError(f"{name} must name a token once, got {count} numbers for {token_id}")
        return pairs

    def parse(self, text: str) -> Any:
        token_id, _, bias = text.partition("=")
        try:
            return int(token_id), float(bias)
        except ValueError:
            raise ValueError(f"{text!r} is not ID=BIAS, for example 50256=-100") from None


@dataclass(frozen=True)
class Unavailable(Kind):
    """A name that is taken: only its default is possible in this version."""

    kind: Kind
    default: object

    @property
    def range(self) -> str:
        return f"only {self.default!r} in this version"

    def check(self, name: str, value: Any) -> Any:
        if self.kind.check(name, value) != self.default:
            raise ValueError(
                f"{name}={value!r} is not available in this version; leave it at {self.default!r}"
            )
        return self.default

    def parse(self, text: str) -> Any:
        return self.kind.parse(text)


def unescape(text: str) -> str:
    r"""`text` with its backslash sequences replaced: \n \t \r \\ \xNN \uNNNN \UNNNNNNNN; ValueError for others."""

    def character(match: re.Match[str]) -> str:
        control, *codes = match.groups()
        if control:
            return _CONTROLS[control]
        code = next((int(code, 16) for code in codes if code), None)
        if code is None or code > 0x10FFFF:
            raise ValueError(
                f"{text!r} has a backslash at position {match.start()} that begins none of "
                r"\n \t \r \\ \xNN \uNNNN \UNNNNNNNN; a backslash itself is \\"
            )
        return chr(code)

    return _ESCAPE.sub(character, text)


def _in_powers(number: int) -> str:
    """A large number as people know it: 2**31 - 1."""
    for extra, suffix in ((0, ""), (1, " - 1")):
        power = number + extra
        if power >= 2**20 and power & (power - 1) == 0:
            return f"2**{power.bit_length() - 1}{suffix}"
    return str(number)
