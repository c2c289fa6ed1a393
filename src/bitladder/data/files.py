"""Data as files and data sets hold it: text, JSONL, rows of the Hub. Read without torch."""

import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitladder.errors import DataError, reason_of
from bitladder.reading import check_regular, parse_json, read_bytes
from bitladder.recipe import MESSAGES, DataSpec, names_a_file

_AS_DATA_SET = "put it into a directory of its own, and name that with kind: huggingface"
# First bytes of files that aren't text, and what to do with them.
_OTHER_FILES = (
    (rb"\x1f\x8b", "is compressed (gzip); unpack it: gunzip"),
    (rb"\x28\xb5\x2f\xfd", "is compressed (zstd); unpack it: unzstd"),
    (rb"BZh[1-9]1AY&SY", "is compressed (bzip2); unpack it: bunzip2"),
    (rb"\xfd7zXZ\0", "is compressed (xz); unpack it: unxz"),
    (rb"PK\x03\x04", "is a ZIP archive, or an office document; unpack or convert it, and name the text"),
    (rb"%PDF-", "is a PDF; take its text out: pdftotext"),
    (rb"PAR1", f"is a Parquet file; {_AS_DATA_SET}"),
    (rb"ARROW1\0\0|\xff\xff\xff\xff", f"is an Arrow file; {_AS_DATA_SET}"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "is UTF-32, not UTF-8; convert it: iconv -f UTF-32 -t UTF-8"),
)
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # bytes that text in no 8-bit encoding has
# Endings of files that hold rows: as one text, they would be calibrated on with their syntax.
_ROW_FILES = {
    **dict.fromkeys((".jsonl", ".ndjson"), "use kind: jsonl, or messages for conversations"),
    ".json": "write one object a line (an array: jq -c '.[]'), and use kind: jsonl, or messages for conversations",
    **dict.fromkeys((".csv", ".tsv"), _AS_DATA_SET),
}
_GLANCED_BYTES = 4 << 20  # of a file whose rows are all looked at before anything else
_OFFLINE = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # what keeps `datasets` off the Hub
_MARK = "\ufeff"  # byte order mark
_TRUE = ("1", "ON", "YES", "TRUE")  # huggingface_hub, constants.py
_CHATS = ("messages", "conversations")  # fields in which chat data holds its turns
_TURNS = re.compile(r'\s*\[\s*\{\s*"')  # how a list of turns begins, written as JSON


def _refuse_other_files(path: Path, content: bytes) -> None:
    """Raise where the content is known not to be UTF-8 text."""
    for head, words in _OTHER_FILES:
        if re.match(head, content):
            raise DataError(f"data file {path} {words}")
    # Without a byte order mark: every other byte of Western text in UTF-16 is NUL.
    zeros = sorted((content[:4096:2].count(0), content[1:4096:2].count(0)))
    if content.startswith(_UTF16) or (zeros[1] * 4 > len(content[:4096]) and zeros[0] * 10 < zeros[1]):
        raise DataError(f"data file {path} is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8")


def _refuse_rows(path: Path) -> None:
    """Raise where a file's name says that it holds rows, not one text."""
    remedy = _ROW_FILES.get(path.suffix.lower())
    if remedy is not None:
        raise DataError(
            f"data file {path} holds rows ({path.suffix}), whose syntax kind text would take for text; {remedy}; "
            "renamed to .txt it is taken as it is"
        )


def check_file(path: Path) -> None:
    """Raise DataError where data can't be read from a file: it is missing, a directory, or no file."""
    try:
        if path.is_dir():
            raise DataError(f"data file {path} is a directory; name a file in it (kind huggingface reads directories)")
        check_regular(path)
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist; check the recipe") from None
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise DataError(
                f"data file {path} is no regular file, and data is read more than once; save it to a file"
            ) from error
        raise DataError(f"data file {path} can't be read ({error.strerror})") from error


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file, without its byte order mark, every line ended by a newline alone.

    Raises:
        DataError: it is missing, no file, or isn't UTF-8.
    """
    check_file(path)
    content = read_bytes(path)
    _refuse_other_files(path, content)
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        binary = _BINARY.search(content)
        if binary is not None:  # iconv would make "text" of it all the same
            raise DataError(
                f"data file {path} holds binary data (byte 0x{content[error.start]:02x} in line {line}); name a file "
                "of text"
            ) from error
        raise DataError(
            f"data file {path} line {line} is not UTF-8 (byte 0x{content[error.start]:02x}); convert it, for example: "
            "iconv -f LATIN1 -t UTF-8"
        ) from error


def jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSONL file; only a newline ends a line."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, keys_once=True)
        except ValueError as error:
            if number == 1 and line.lstrip().startswith("["):
                raise DataError(f"{path} is a JSON array; write one object a line: jq -c '.[]'") from None
            if not isinstance(error, json.JSONDecodeError):
                raise DataError(f"{path} line {number} can't be taken ({error}); correct or remove it") from error
            if line[error.pos : error.pos + 1] == _MARK:  # inside JSON's own strings it is a character like others
                raise DataError(
                    f"{path} line {number} is not JSON: a byte order mark stands in it, as where files that begin with "
                    "one were joined; remove it: sed -i 's/\\xEF\\xBB\\xBF//g'"
                ) from error
            raise DataError(f"{path} line {number} is not JSON ({error.msg}); one object a line is expected") from error
        if isinstance(row, list) and row and isinstance(row[0], dict):
            raise DataError(f"{path} line {number} is a JSON array; write one object a line: jq -c '.[]'")
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number} is not a JSON object")
        yield number, row


def _one_set(rows: Any, spec: DataSpec) -> Any:
    """Return a data set that was saved alone, unless the recipe names another part of it.

    Raises:
        DataError: it does, and would be given these rows all the same.
    """
    has = None if rows.split is None else str(rows.split)
    if spec.split not in (None, has or "train"):
        raise DataError(
            f"data set {spec.path} was saved as one set{f', {has}' * bool(has)}, and has no split {spec.split}; leave "
            "out data.split, or name the directory that holds it"
        )
    return rows


def data_set_rows(spec: DataSpec) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 1, row) of a data set of the Hub or a local one, in its order, reading as it goes.

    Raises:
        DataError: no package, no such data set, or it can't be read; the message says why.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"data of kind {spec.kind} from {spec.path} needs 'datasets': pip install 'bitladder[data]'"
        ) from None
    split, local = spec.split or "train", Path(spec.path)
    try:
        if (local / "state.json").exists() or (local / "dataset_dict.json").exists():  # Dataset.save_to_disk
            if spec.subset is not None:
                raise DataError(
                    f"data set {spec.path} was saved to disk, where there are no subsets; leave out data.subset"
                )
            rows: Any = datasets.load_from_disk(str(local))
            rows = rows[split] if isinstance(rows, dict) else _one_set(rows, spec)
        else:
            # Offline a data set of the Hub is found in the cache, which isn't streamed.
            streaming = local.exists() or not datasets.config.HF_HUB_OFFLINE
            rows = datasets.load_dataset(spec.path, spec.subset, split=split, streaming=streaming)
        yield from enumerate(map(dict, rows), start=1)
    except DataError:
        raise
    except Exception as error:  # `datasets` raises whatever its readers and the network raise
        reason = reason_of(error)
        if isinstance(error, ConnectionError) and not local.exists():
            offline = " and ".join(name for name in _OFFLINE if os.environ.get(name, "").upper() in _TRUE)
            files = "messages, a JSONL file" if spec.kind == MESSAGES else "text or jsonl"
            raise DataError(
                f"data set {spec.path} (split {split}) can't be fetched from the Hub ({reason}); name a local file "
                f"(kind {files}), or {f'unset {offline}' if offline else 'set HF_ENDPOINT to a mirror that answers'}"
            ) from error
        if local.is_file():
            reason = f"it is a file; {_AS_DATA_SET}"
        raise DataError(f"data set {spec.path} (split {split}) can't be loaded: {reason}") from error


def parsed_turns(value: Any) -> Any:
    """Return a list that is written as JSON in a string, as CSV files hold turns; anything else as it is."""
    if not isinstance(value, str) or not _TURNS.match(value):
        return value
    try:
        found = parse_json(value)
    except ValueError:
        return value
    return found if is_conversation(found) else value


def is_conversation(value: Any) -> bool:
    """Return whether a value is a list of turns, OpenAI's or ShareGPT's."""
    turn = value[0] if isinstance(value, list) and value else None
    return isinstance(turn, dict) and bool({"role", "from"} & set(turn))


def _text_of(spec: DataSpec, row: dict[str, Any], where: str) -> str | None:
    """Return a row's text; None where a data set has none (null)."""
    value = row.get(spec.text_field)
    if isinstance(value, str) and parsed_turns(value) is value:
        return value
    chat = next((name for name in (spec.text_field, *_CHATS) if is_conversation(parsed_turns(row.get(name)))), None)
    if chat is not None:
        raise DataError(f"{where} holds a list of turns ('{chat}'), not a text; use kind: messages")
    if isinstance(value, list):
        raise DataError(
            f"{where} holds a list ('{spec.text_field}'), not a text; join its texts, or set data.text_field"
        )
    if value is None and spec.text_field in row and spec.kind == "huggingface":
        return None
    has = "null" if value is None else type(value).__name__
    if spec.text_field in row:
        raise DataError(f"{where} has {has} in '{spec.text_field}', not text; correct the row or set data.text_field")
    if spec.kind == "huggingface":
        raise DataError(
            f"data set {spec.path} has no column '{spec.text_field}'; it has {', '.join(map(str, row))}; "
            "set data.text_field"
        )
    raise DataError(f"{where} has no text in '{spec.text_field}'; it has {', '.join(row)}; set data.text_field")


def documents(spec: DataSpec) -> Iterator[tuple[str, str | None]]:
    """Yield (where, text) of a `text`, `jsonl` or `huggingface` source, as far as it is read, but no empty one.

    None stands for a data set's null.
    """
    if spec.kind == "text":
        _refuse_rows(Path(spec.path))
        found: Iterator[tuple[str, str | None]] = iter([(f"data file {spec.path}", read_text(Path(spec.path)))])
    elif spec.kind == "jsonl":
        named = ((f"{spec.path} line {number}", row) for number, row in jsonl_rows(Path(spec.path)))
        found = ((where, _text_of(spec, row, where)) for where, row in named)
    else:
        named = ((f"data set {spec.path} row {number}", row) for number, row in data_set_rows(spec))
        found = ((where, _text_of(spec, row, where)) for where, row in named)
    yield from ((where, text) for where, text in found if text is None or text.strip())


def of_a_file(spec: DataSpec) -> bool:
    """Return whether conversations come from a JSONL file; else it is a data set, of the Hub or a local one."""
    path = Path(spec.path)
    return not path.is_dir() and (path.exists() or path.is_absolute() or names_a_file(spec.path))


def check_pair(row: dict[str, Any], spec: DataSpec, where: str) -> None:
    """Raise DataError where a line of an `image_text` source lacks its picture or its answer."""
    for name in ("image", spec.text_field):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise DataError(
                f"{where} has no '{name}'; an image_text line is "
                f'{{"image": path or data: URI, "prompt": question (optional), "{spec.text_field}": answer}}'
            )


def coco_captions(spec: DataSpec) -> Path:
    """Return the file of captions of a COCO directory; raises DataError where that isn't there."""
    root, split = Path(spec.path), spec.split or "train2017"
    if not root.is_dir():
        raise DataError(
            f"COCO directory {root} does not exist; it holds <split>/*.jpg and annotations/captions_<split>.json"
        )
    return root / (spec.annotations or f"annotations/captions_{split}.json")


def coco_images(spec: DataSpec) -> Path:
    """Return the directory of pictures of a COCO directory that is there; raises DataError."""
    root, split = Path(spec.path), spec.split or "train2017"
    images = root / split
    if not images.is_dir():
        found = ", ".join(sorted(entry.name for entry in root.iterdir() if entry.is_dir())) or "nothing"
        raise DataError(f"COCO directory {root} has no images in {split}/; it has {found}: set data.split")
    return images


def glance(spec: DataSpec) -> None:
    """Raise DataError for what a short look at a source finds: no such file, not its kind, rows without their keys.

    Only files are looked at, and all of their rows where there are few: nothing is fetched.
    """
    path = Path(spec.path)
    if spec.kind == "coco":
        coco_captions(spec)
        coco_images(spec)
    elif spec.kind in ("text", "jsonl", "image_text") or (spec.kind == MESSAGES and of_a_file(spec)):
        check_file(path)
        if path.stat().st_size > _GLANCED_BYTES:
            return
        if spec.kind in ("text", "jsonl"):
            for _ in documents(spec):
                pass
        else:
            for number, row in jsonl_rows(path):
                if spec.kind == "image_text":
                    check_pair(row, spec, f"{path} line {number}")
