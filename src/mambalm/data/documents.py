"""Documents from folders of text files, and a held-out set that shares no package with the rest."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Tests repeat one another and the modules that they test; site-packages is not the standard library.
LEFT_OUT = frozenset({"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"})
# Of the standard library, tables of characters and the text of a manual: a fifth of its tokens, and not programs.
GENERATED = frozenset({"encodings", "pydoc_data"})


@dataclass(frozen=True)
class Document:
    """One text file.

    Attributes:
        name: its path inside the folder that was read, with forward slashes.
        text: its contents; encoding it as UTF-8 gives the file's bytes back.
    """

    name: str
    text: str

    @property
    def package(self) -> str:
        """The top-level folder, or the file itself where it stands in none: what is held out as a whole."""
        return self.name.partition("/")[0]

    @property
    def nbytes(self) -> int:
        """The size of the file in bytes."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Split:
    """Documents to learn from and documents to be measured on, disjoint."""

    training: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @property
    def held_out_stream(self) -> str:
        """The held-out documents one after the other, with nothing between them."""
        return "".join(document.text for document in self.held_out)


def standard_library() -> list[Document]:
    """The running Python's standard library, without its tests and generated files."""
    return read_documents(Path(sysconfig.get_paths()["stdlib"]), left_out=LEFT_OUT | GENERATED)


def read_documents(folder: Path, pattern: str = "*.py", left_out: frozenset[str] = LEFT_OUT) -> list[Document]:
    """Read every file below ``folder`` that matches ``pattern``, sorted by name.

    Left out are empty files, those that are not UTF-8, and what lies below a folder named in ``left_out``.

    Raises:
        ValueError: the folder does not exist, or no file is left.
    """
    if not folder.is_dir():
        raise ValueError(f"the corpus {folder} is not a folder; name one that holds {pattern} files")
    documents = []
    for path in folder.rglob(pattern):
        name = path.relative_to(folder)
        if left_out.isdisjoint(name.parts[:-1]) and path.is_file() and (text := _utf8(path)):
            documents.append(Document(name.as_posix(), text))
    if not documents:
        raise ValueError(f"the corpus {folder} holds no {pattern} file with text in UTF-8 outside of test folders")
    return sorted(documents, key=lambda document: document.name)


def _utf8(path: Path) -> str:
    """The text, byte for byte (no newline is translated); "" for what is not UTF-8."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        return ""


def hold_out(documents: Sequence[Document], nbytes: int) -> Split:
    """Hold out whole packages, at most ``nbytes`` in all; which ones depends on names and sizes alone.

    Packages are taken in the order of the hash of their names; one that no longer fits, or would be more than a quarter
    of the held-out set, is passed over. Where no package is that small, single files are held out instead. A training
    document whose text is also held out is dropped. Training documents come in the order of their names' hash, so that
    a model that sees only some of them sees a mixture.

    Raises:
        ValueError: nothing fits, or nothing is left to train on.
    """
    chosen = _choose(documents, lambda document: document.package, nbytes, nbytes // 4)
    chosen = chosen or _choose(documents, lambda document: document.name, nbytes, nbytes)
    names = {document.name for document in chosen}
    texts = {document.text for document in chosen}
    training = {d.name: d for d in documents if d.name not in names and d.text not in texts}
    if not chosen or not training:
        raise ValueError(
            f"cannot hold out up to {nbytes:,} bytes of {len(documents)} files and keep some to train on: use a corpus "
            "of more or smaller files"
        )
    held_out = sorted(chosen, key=lambda document: document.name)
    return Split(tuple(training[name] for name in _shuffled(training)), tuple(held_out))


def _choose(documents: Sequence[Document], group: Callable[[Document], str], room: int, largest: int) -> list[Document]:
    """Whole groups of documents, none above ``largest`` bytes, until no other fits into ``room`` bytes."""
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(group(document), []).append(document)
    chosen: list[Document] = []
    for name in _shuffled(groups):
        size = sum(document.nbytes for document in groups[name])
        if size <= min(room, largest):
            room -= size
            chosen += groups[name]
    return chosen


def _shuffled(names: Iterable[str]) -> list[str]:
    """An order that looks random and is the same on every machine."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
