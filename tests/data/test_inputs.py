"""Reading inputs: every kind gives the same texts, cut or whole, and damage is named with its place."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from mambalm.data.inputs import InputError, Reading, plan

pyarrow = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")
pytest.importorskip("orjson")

TEXTS = [f"line {i} é\n" * (i % 7 + 1) for i in range(200)]
LINES = "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(TEXTS)).encode()


def write_parquet(path: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "n": range(200)}), path, row_group_size=30)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    # Two frames, as parallel compressors write them.
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(LINES[:5000]) + zstandard.compress(LINES[5000:])),
    "a.parquet": write_parquet,
}


def read(path: Path, unit_bytes: int = 1 << 30, **arguments: object) -> list[str]:
    reading = Reading(**arguments)  # type: ignore[arg-type]
    units = plan([str(path)], reading, unit_bytes=unit_bytes)
    return [text for unit in units for text in reading.documents(unit)]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("unit_bytes", [1 << 30, 1000, 77])
def test_every_kind_gives_every_text_once(name: str, unit_bytes: int, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name, unit_bytes) == TEXTS


@pytest.mark.parametrize("unit_bytes", [1 << 30, 100, 7])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_every_line_can_be_a_document(name: str, unit_bytes: int, tmp_path: Path) -> None:
    lines = [text.strip() for text in "".join(TEXTS).split("\n")[:99]]
    data = "\r\n".join([*lines, "", "last"]).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read(tmp_path / name, unit_bytes, lines=True) == [*lines, "last"]


def test_a_folder_is_read_in_order_and_small_files_share_a_unit(tmp_path: Path) -> None:
    for name, text in {"b/x.py": "two", "a.txt": "one", "c.bin": "no", "d.md": "", "e.txt.gz": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"three"))
    reading = Reading()
    units = plan([str(tmp_path)], reading, unit_bytes=100)
    assert [len(unit) for unit in units] == [3]
    assert list(reading.documents(units[0])) == ["one", "two", "three"]
    assert len(plan([str(tmp_path)], reading, unit_bytes=1)) == 3
    named = plan([str(tmp_path)], reading, unit_bytes=100, pattern="*.bin")
    assert list(reading.documents(named[0])) == ["no"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(LINES)[:-40], r"a.jsonl.gz is truncated or damaged behind line"),
        ("a.jsonl.gz", LINES, r"a.jsonl.gz is truncated or damaged behind line 0 .*[Nn]ot a gzipped"),
        ("a.jsonl.zst", zstandard.compress(LINES)[:-40], r"a.jsonl.zst is truncated or damaged behind line"),
        ("a.jsonl.zst", zstandard.compress(LINES)[:-1], r"a.jsonl.zst is truncated or damaged"),
        ("a.jsonl.zst", LINES, r"a.jsonl.zst is truncated or damaged behind line 0"),
        ("a.txt", b"fine\nna\xefve\n", r"a.txt, line 2: byte 0xef is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a.jsonl, line 2: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"content": "a", "id": 1}\n', r"line 1: no field 'text' \(there is content, id; --field"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: field 'text' is int, expected text"),
        ("a.jsonl", b"[1]\n", r"line 1: expected an object, got list"),
        ("a.parquet", b"PAR1 no", r"a.parquet: damaged Parquet"),
        ("a.jsonl", b"", r"a.jsonl is empty"),
    ],
)
def test_damage_is_named_with_its_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_a_damaged_page_of_parquet_is_named_with_its_row(tmp_path: Path) -> None:
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(table, path, row_group_size=50, compression="gzip", use_dictionary=False)
    place = pyarrow.parquet.read_metadata(path).row_group(2).column(0)
    data = bytearray(path.read_bytes())
    begin = place.data_page_offset + place.total_compressed_size // 2
    data[begin : begin + 20] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a.parquet, row 1\d\d: damaged Parquet"):
        read(path)
    with pytest.raises(InputError, match=r"no column 'body': choose of text"):
        read(path, text_field="body")


def test_what_cannot_be_read_is_passed_over_on_request(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n{}\n{"text": ""}\n{"text": "b"}\n')
    reading = Reading(skip_bad=True)
    [unit] = plan([str(path)], reading, unit_bytes=1 << 20)
    assert list(reading.documents(unit)) == ["a", "b"]
    assert (reading.skipped, reading.empty) == (2, 1)
    assert "line 2: byte 0xff" in reading.first_skipped


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.txt does not exist: name a file"):
        read(tmp_path / "missing.txt")
    with pytest.raises(InputError, match="holds no file"):
        read(tmp_path)


def test_without_a_network_the_hub_is_asked_once(asked_hosts: list[str]) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(InputError, match=r"mambalm-tests/none is no file here, and no data set.*Name or service"):
        plan(["mambalm-tests/none"], Reading(), unit_bytes=100)
    assert 1 <= len(asked_hosts) <= 2


def test_a_data_set_is_streamed_by_its_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(name: str, config: str | None, split: str, streaming: bool) -> object:
        assert (name, config, split, streaming) == ("owner/name", "small", "train", True)

        def rows(numbers: list[int]) -> object:
            yield from ({"text": TEXTS[number]} for number in numbers)

        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"numbers": list(range(10))})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: None)
    reading = Reading(config="small")
    units = plan(["owner/name"], reading, unit_bytes=100)
    assert len(units) == 10
    assert [text for unit in units for text in reading.documents(unit)] == TEXTS[:10]
