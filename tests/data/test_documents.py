"""Which files are read, and that what is held out is in nothing that is learned from."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mambalm.data.documents import GENERATED, LEFT_OUT, Document, hold_out, read_documents, standard_library


def write(root: Path, name: str, data: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def documents(count: int, size: int = 100) -> list[Document]:
    return [Document(f"package{i // 3}/module{i}.py", f"# {i}\n".ljust(size, "x")) for i in range(count)]


def test_reads_bytes_exactly_and_leaves_out_tests(tmp_path: Path) -> None:
    text = "a = 'é'\r\nb = 1\n"
    write(tmp_path, "b.py", text.encode())
    write(tmp_path, "a/c.py", b"pass")
    for name in ("a/test/t.py", "tests/u.py", "site-packages/v.py", "w.txt"):
        write(tmp_path, name, b"no")
    write(tmp_path, "latin.py", "é".encode("latin-1"))
    write(tmp_path, "empty.py", b"")
    found = read_documents(tmp_path)
    assert found == [Document("a/c.py", "pass"), Document("b.py", text)]
    assert found[1].nbytes == len(text.encode()) == len(text) + 1


def test_the_standard_library_has_neither_tests_nor_tables() -> None:
    names = [document.name for document in standard_library()]
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert not [name for name in names if set(name.split("/")[:-1]) & (LEFT_OUT | GENERATED)]


def test_the_split_ignores_the_order_of_the_files() -> None:
    files = documents(60)
    shuffled = random.Random(0).sample(files, len(files))
    assert hold_out(files, 1500) == hold_out(shuffled, 1500)


def test_the_split_is_disjoint_in_packages_and_complete() -> None:
    files = documents(60)
    split = hold_out(files, 1500)
    assert {d.package for d in split.training}.isdisjoint(d.package for d in split.held_out)
    assert sorted(d.name for d in split.training + split.held_out) == sorted(d.name for d in files)
    assert 1200 < len(split.held_out_stream) <= 1500


def test_a_copy_of_a_held_out_file_is_not_learned_from() -> None:
    files = documents(60)
    held = hold_out(files, 1500).held_out[0]
    # A package too large to be held out itself.
    copies = [Document("large/copy.py", held.text), Document("large/rest.py", "y" * 2000)]
    split = hold_out(files + copies, 1500)
    assert held in split.held_out
    assert held.text not in {document.text for document in split.training}
    assert copies[1] in split.training


def test_one_package_alone_is_split_by_files() -> None:
    files = [Document(f"package/{i}.py", f"# {i}".ljust(100)) for i in range(20)]
    split = hold_out(files, 300)
    assert len(split.held_out) == 3
    assert len(split.training) == 17


def test_what_cannot_be_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        read_documents(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"holds no \*\.py file"):
        read_documents(tmp_path)
    with pytest.raises(ValueError, match="cannot hold out up to 10 bytes of 1 files"):
        hold_out(documents(1), 10)
