"""Reading text to tokenise: plain text, JSON lines (gzip, zstd), Parquet, folders of them, and data sets of the Hub.

Inputs are cut into units of work, each of which becomes one shard. The cut depends on the inputs and on nothing else.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

Kind = Literal["text", "lines", "jsonl", "parquet", "hub"]
# Of the files in a folder, those that are read unless a pattern says otherwise.
TEXT_SUFFIXES = frozenset({".md", ".py", ".rst", ".txt"})
_COMPRESSED = (".gz", ".zst")


class InputError(ValueError):
    """An input cannot be read; the message names the file and, where there is one, the line or row."""


@dataclass(frozen=True)
class Piece:
    """A part of an input.

    Attributes:
        path: the file, or the name of a data set.
        kind: how it is read.
        start, stop: bytes of lines (one belongs to the piece that it begins in), row groups of Parquet, shards
            of a data set; else the whole file.
        size: bytes, for progress.
    """

    path: str
    kind: Kind
    start: int = 0
    stop: int = 0
    size: int = 0


@dataclass
class Reading:
    """How inputs are read, and what was passed over.

    Attributes:
        text_field: the field of JSON lines, Parquet and data sets that holds the text (or the messages of a chat).
        lines: every line of a text file is a document.
        skip_bad: pass over a document that cannot be read instead of stopping.
        config, split: of a data set of the Hub.
        skipped: documents passed over because they could not be read.
        empty: documents without text.
        first_skipped: why the first was passed over.
        place: where the latest document is.
    """

    text_field: str = "text"
    skip_bad: bool = False
    config: str | None = None
    split: str = "train"
    lines: bool = False
    skipped: int = 0
    empty: int = 0
    first_skipped: str = ""
    place: str = ""

    def documents(self, pieces: Sequence[Piece]) -> Iterator[Any]:
        """The texts (or messages) of the pieces, in order; empty ones are passed over.

        Raises:
            InputError: one cannot be read.
        """
        readers = {
            "text": self._text,
            "lines": self._lines,
            "jsonl": self._json,
            "parquet": self._rows,
            "hub": self._hub,
        }
        for piece in pieces:
            for value in readers[piece.kind](piece):
                if value:
                    yield value
                else:
                    self.empty += 1

    def bad(self, message: str) -> None:
        """Stop at a document that cannot be used, or pass over it if that is wanted.

        Raises:
            InputError: the message, unless documents are passed over.
        """
        if not self.skip_bad:
            raise InputError(f"{message}. Mend it, or pass over such documents with --skip-bad")
        self.skipped += 1
        self.first_skipped = self.first_skipped or message

    def _text(self, piece: Piece) -> Iterator[str]:
        with _opened(piece.path) as file:
            data = b"".join(_guarded(piece.path, iter(lambda: file.read(1 << 20), b"")))
        try:
            yield data.decode()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            self.bad(f"{piece.path}, line {line}: byte {data[error.start]:#04x} is not UTF-8")

    def _lines(self, piece: Piece) -> Iterator[str]:
        for where, line in self._split(piece):
            try:
                yield line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                self.bad(f"{where}: byte {line[error.start]:#04x} is not UTF-8")

    def _json(self, piece: Piece) -> Iterator[Any]:
        import orjson

        for where, line in self._split(piece):
            if not line.strip():
                continue
            try:
                value = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                self.bad(f"{where}: {_why_no_json(line, error)}")
                continue
            yield from self._field(value, where)

    def _split(self, piece: Piece) -> Iterator[tuple[str, bytes]]:
        """(place, line) of the lines that begin in a piece."""
        with _opened(piece.path) as file:
            position = _first_line(file, piece.start)
            # Lines are counted from the beginning of the file, or bytes where that would mean reading it twice.
            for number, line in enumerate(_guarded(piece.path, file), 1):
                if piece.stop and position >= piece.stop:
                    return
                where = f"{piece.path}, byte {position:,}" if piece.start else f"{piece.path}, line {number:,}"
                position += len(line)
                yield where, line

    def _rows(self, piece: Piece) -> Iterator[Any]:
        import pyarrow
        import pyarrow.parquet

        row = 0
        try:
            with pyarrow.parquet.ParquetFile(piece.path) as file:
                if self.text_field not in file.schema_arrow.names:
                    columns = ", ".join(file.schema_arrow.names)
                    raise InputError(f"{piece.path} has no column {self.text_field!r}: choose of {columns} by --field")
                row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
                # By row group, so that the place of a damaged one is known.
                for group in range(piece.start, piece.stop):
                    for batch in file.iter_batches(1024, row_groups=[group], columns=[self.text_field]):
                        for value in batch.column(0).to_pylist():
                            yield from self._field({self.text_field: value or ""}, f"{piece.path}, row {row:,}")
                            row += 1
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(
                f"{piece.path}, row {row:,}: damaged Parquet ({error}); copy or download it again"
            ) from error

    def _hub(self, piece: Piece) -> Iterator[Any]:
        data = _data_set(piece.path, self.config, self.split)
        if data.num_shards > 1:
            data = data.shard(num_shards=data.num_shards, index=piece.start)
        for row, value in enumerate(data):
            yield from self._field(value, f"{piece.path}, shard {piece.start}, row {row:,}")

    def _field(self, value: Any, where: str) -> Iterator[Any]:
        if not isinstance(value, dict):
            self.bad(f"{where}: expected an object, got {type(value).__name__}")
        elif self.text_field not in value:
            known = ", ".join(map(str, value)) or "nothing"
            self.bad(f"{where}: no field {self.text_field!r} (there is {known}; --field chooses)")
        elif not isinstance(value[self.text_field], str | list):
            self.bad(f"{where}: field {self.text_field!r} is {type(value[self.text_field]).__name__}, expected text")
        else:
            self.place = where
            yield value[self.text_field]


def plan(inputs: Sequence[str], reading: Reading, *, unit_bytes: int, pattern: str | None = None) -> list[list[Piece]]:
    """Cut inputs into units of about ``unit_bytes`` bytes, in order.

    Args:
        inputs: files, folders (read recursively, sorted by name), or names of data sets of the Hub (owner/name).
        reading: for data sets.
        unit_bytes: small files share a unit; JSON lines and Parquet are cut.
        pattern: of the files in folders; None takes the kinds that are known.

    Raises:
        InputError: an input does not exist, is empty, or is a folder without files to read.
    """
    units: list[list[Piece]] = []
    room = 0
    for name in inputs:
        for piece in _pieces(name, reading, unit_bytes, pattern):
            if not units or piece.size > room:
                units.append([])
                room = unit_bytes
            units[-1].append(piece)
            room -= piece.size
    return units


def _pieces(name: str, reading: Reading, unit_bytes: int, pattern: str | None) -> Iterator[Piece]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob(pattern or "*") if file.is_file())
        files = [file for file in files if pattern or _stem(file).suffix in TEXT_SUFFIXES or _kind(file) != "text"]
        files = [file for file in files if file.stat().st_size]
        if not files:
            known = pattern or ", ".join(sorted(TEXT_SUFFIXES | {".jsonl", ".parquet"}))
            raise InputError(f"{path} holds no file ({known}) with anything in it: name others with --pattern")
    elif path.is_file():
        files = [path]
    elif name.count("/") == 1 and not name.startswith((".", "/")):
        count = _data_set(name, reading.config, reading.split).num_shards
        yield from (Piece(name, "hub", shard, shard + 1, unit_bytes) for shard in range(count))
        return
    else:
        raise InputError(f"{name} does not exist: name a file, a folder, or a data set of the Hub (owner/name)")
    for file in files:
        yield from _cut(file, unit_bytes, reading.lines)


def _cut(file: Path, unit_bytes: int, lines: bool) -> Iterator[Piece]:
    kind, size = _kind(file), file.stat().st_size
    if kind == "text" and lines:
        kind = "lines"
    if not size:
        raise InputError(f"{file} is empty: leave it out")
    if kind == "parquet":
        yield from _row_groups(file, size, unit_bytes)
    elif kind in ("jsonl", "lines") and file.suffix not in _COMPRESSED and size > unit_bytes:
        for start in range(0, size, unit_bytes):
            stop = min(start + unit_bytes, size)
            yield Piece(str(file), kind, start, stop, stop - start)
    else:
        yield Piece(str(file), kind, size=size)


def _row_groups(file: Path, size: int, unit_bytes: int) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        count = pyarrow.parquet.read_metadata(file).num_row_groups
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{file}: damaged Parquet ({error}); copy or download it again") from error
    step = max(1, round(count * unit_bytes / size))
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield Piece(str(file), "parquet", start, stop, size * (stop - start) // count)


def _stem(file: Path) -> Path:
    return file.with_suffix("") if file.suffix in _COMPRESSED else file


def _kind(file: Path) -> Kind:
    suffix = _stem(file).suffix
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    return "parquet" if suffix == ".parquet" else "text"


def _opened(path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.endswith(".zst"):
        return io.BufferedReader(_Zstd(path), 1 << 20)
    return Path(path).open("rb")


class _Zstd(io.RawIOBase):
    """zstandard's own reader takes a file that breaks off for one that ends."""

    def __init__(self, path: str) -> None:
        import zstandard

        self._file, self._new = Path(path).open("rb"), zstandard.ZstdDecompressor().decompressobj  # noqa: SIM115
        self._frame, self._data, self._begun = self._new(), b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._data:
            if self._frame.eof:
                chunk, self._frame, self._begun = self._frame.unused_data, self._new(), False
            else:
                chunk = b""
            chunk = chunk or self._file.read(1 << 18)
            if not chunk:
                if self._begun:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            self._begun, self._data = True, self._frame.decompress(chunk)
            if self._frame.eof and not self._frame.unused_data:
                self._begun = False
        count = min(len(buffer), len(self._data))
        buffer[:count], self._data = self._data[:count], self._data[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _guarded(path: str, chunks: Any) -> Iterator[bytes]:
    """The lines or chunks of a file, an error of its compression told with the place."""
    number = 0
    failures: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    if path.endswith(".zst"):
        import zstandard

        failures = (EOFError, zstandard.ZstdError)
    try:
        for chunk in chunks:
            yield chunk
            number += 1
    except failures as error:
        raise InputError(
            f"{path} is truncated or damaged behind line {number:,} ({error}): copy or download it again"
        ) from error


def _first_line(file: BinaryIO, start: int) -> int:
    """Go to the first line that begins at ``start`` or behind it; where that is."""
    if not start:
        return 0
    file.seek(start - 1)
    return start - 1 + len(file.readline())


def _why_no_json(line: bytes, error: ValueError) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as bad:
        return f"byte {line[bad.start]:#04x} is not UTF-8"
    return f"not JSON ({error})"


def _data_set(name: str, config: str | None, split: str) -> Any:
    import datasets
    import huggingface_hub

    try:
        # Asked once: without a network datasets tries for half a minute before it says so.
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
        return datasets.load_dataset(name, config, split=split, streaming=True)
    # The errors of the Hub, of the network and of a data set's own builder have nothing in common.
    except Exception as error:
        raise InputError(
            f"{name} is no file here, and no data set of the Hub that can be read ({str(error).splitlines()[0]}): "
            "check the name, --config and --split, and the network"
        ) from error
