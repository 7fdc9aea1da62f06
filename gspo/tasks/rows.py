"""Rows of a user's own data: jsonl, JSON, csv and parquet files, compressed or not, and data sets on the hub.

A row is a dict of its columns, plain JSON data, beside the place where it stands, which messages name.
"""

import csv
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

from gspo import HUB_TIMEOUT_S

GZIP_MAGIC = b"\x1f\x8b"
PARQUET_MAGIC = b"PAR1"
CSV_SEPARATORS = {".csv": ",", ".tsv": "\t"}
# The splits of a hub data set that hold problems out, by preference.
EVAL_SPLITS = ("test", "validation", "dev")

Rows = list[tuple[str, dict]]  # (place, row)


def read_rows(path: Path) -> Rows:
    """The rows of a file. What it is, its content says; csv and tsv go by their names.

    Raises:
        ValueError: the file is not there, cut short, or damaged; the message names the line.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        raise ValueError(f"{path} is {what}; name a jsonl, csv or parquet file")
    content = path.read_bytes()
    if content.startswith(PARQUET_MAGIC):
        return _parquet_rows(path, content)
    try:
        if content.startswith(GZIP_MAGIC):
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is cut short or damaged ({error})") from error
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    if suffixes and suffixes[-1] in CSV_SEPARATORS:
        return _csv_rows(path, text, CSV_SEPARATORS[suffixes[-1]])
    if suffixes and suffixes[-1] == ".json" and text.lstrip().startswith("["):
        values = _json(str(path), text)
        return [_checked(f"{path}, item {i}", value) for i, value in enumerate(values, start=1)]
    lines = enumerate(text.split("\n"), start=1)
    places = [(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    return [_checked(place, _json(place, line)) for place, line in places]


def _json(place: str, text: str) -> Any:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not valid JSON ({error.msg} at column {error.colno})") from error
    except RecursionError:
        raise ValueError(f"{place}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return value


def _checked(place: str, row: Any) -> tuple[str, dict]:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: {type(row).__name__} instead of an object with question and answer")
    return place, row


def _csv_rows(path: Path, text: str, separator: str) -> Rows:
    """Rows of strings, under the names in the first line."""
    csv.field_size_limit(len(text) + 1)  # a long text is one field
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: Rows = []
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise ValueError(f"{path}, line 1: a name stands twice among {', '.join(names)}")
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{place}: not as many fields as the first line has names")
            rows.append((place, row))
    except csv.Error as error:
        raise ValueError(f"{path}, before line {reader.line_num + 1}: {error}") from error
    return rows


def _parquet_rows(path: Path, content: bytes) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except Exception as error:  # a damaged file or an odd value can raise any exception in pyarrow
        first_line = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{path} cannot be read as parquet ({type(error).__name__}: {first_line})"
        ) from error
    return [(f"{path}, row {i}", _plain(row)) for i, row in enumerate(rows, start=1)]


def hub_rows(name: str) -> tuple[Rows, Rows | None]:
    """The rows of a data set on the hub for training, and those of its own held-out split, if it has one.

    name: owner/name, or owner/name:configuration.

    Raises:
        ValueError: the hub cannot be reached, or has no such data set.
    """
    import datasets
    import huggingface_hub

    repository, _, configuration = name.partition(":")
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:  # where it is set, load_dataset asks only the cache
            huggingface_hub.HfApi().dataset_info(repository, timeout=HUB_TIMEOUT_S)
        splits = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # the hub's libraries raise what they like
        first_line = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"cannot load {name} from the hub ({type(error).__name__}: {first_line}); without network, give "
            "its file with --dataset_path PATH.jsonl"
        ) from error
    if "train" not in splits and len(splits) > 1:
        raise ValueError(f"{name} has no split named train, it has {', '.join(splits)}")
    training = "train" if "train" in splits else next(iter(splits))
    held_out = next((split for split in EVAL_SPLITS if split in splits and split != training), None)
    rows = {
        split: [(f"{name} {split} {i}", _plain(row)) for i, row in enumerate(splits[split], start=1)]
        for split in (training, held_out)
        if split is not None
    }
    return rows[training], rows[held_out] if held_out else None


def _plain(row: dict) -> dict:
    """The row as JSON data: bytes, which some writers make of text, and dates and the like become text."""

    def text(value: Any) -> str:
        return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

    return json.loads(json.dumps(row, default=text))
