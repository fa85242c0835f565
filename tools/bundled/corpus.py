"""The training text: the running interpreter's own standard library, in a fixed order, some files held out."""

from __future__ import annotations

import fnmatch
import hashlib
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PER_MILLE = 30
MAX_FILE_BYTES = 400_000
MAX_DATA_SHARE = 0.20

# Generated or machine-specific files, and tests that are tables rather than programs.
SKIPPED_PATTERNS = (
    "*site-packages/*",
    "*dist-packages/*",
    "*__pycache__/*",
    "*config-3.*/*",
    "_sysconfigdata*",
    "sitecustomize.py",
    "usercustomize.py",
    "encodings/cp*.py",
    "encodings/mac_*.py",
    "encodings/iso8859_*.py",
    "encodings/koi8*.py",
    "encodings/*tis_620.py",
    "encodings/palmos.py",
    "encodings/ptcp154.py",
    "encodings/kz1048.py",
    "encodings/hp_roman8.py",
    "encodings/aliases.py",
    "html/entities.py",
    "lib2to3/tests/data/*",
    "pydoc_data/topics.py",
    "msilib/*",
    "test/bad*.py",
    "test/badsyntax*",
    "test/test_email/data/*",
    "test/test_unicode_identifiers.py",
    "test/test_bigmem.py",
)
DATA_CHARACTERS = re.compile(r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|[0-9]|\\[0-7]{3}")


@dataclass(frozen=True)
class Document:
    """One source file: `path` relative to the standard library, its text, and whether training may see it."""

    path: str
    text: str
    is_held_out: bool

    @property
    def is_test(self) -> bool:
        """Whether the file belongs to a test suite (there is as much of that as of everything else)."""
        parts = Path(self.path).parts
        return any(part in ("test", "tests", "idle_test") for part in parts)


def is_skipped(path: str) -> bool:
    """Whether `path` (relative, `/`-separated) is generated, machine-specific or mostly a table."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in SKIPPED_PATTERNS)


def is_held_out(path: str) -> bool:
    """A fixed draw by the hash of the relative path, the same on every machine and Python version."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < HELD_OUT_PER_MILLE


def data_share(text: str) -> float:
    """Share of the characters of `text` that are digits or escapes: high in tables of numbers."""
    return sum(len(match) for match in DATA_CHARACTERS.findall(text)) / max(1, len(text))


def load_documents(root: Path | None = None) -> list[Document]:
    """Read every suitable `.py` file below `root` (default: the standard library), sorted by relative path."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root).as_posix()
        if is_skipped(relative):
            continue
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:  # the tests of other source encodings
            continue
        text = text.removeprefix("\ufeff").replace("\r\n", "\n")
        if not text.strip() or len(raw) > MAX_FILE_BYTES or data_share(text) > MAX_DATA_SHARE:
            continue
        documents.append(Document(path=relative, text=text, is_held_out=is_held_out(relative)))
    return documents


def digest(documents: list[Document]) -> str:
    """SHA-256 over paths and texts: two runs that print the same digest saw the same data."""
    state = hashlib.sha256()
    for document in documents:
        state.update(document.path.encode() + b"\0" + document.text.encode() + b"\0")
    return state.hexdigest()
