"""Text sources as rows of tokens: files, JSONL, data sets of the Hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bitladder.errors import DataError
from bitladder.recipe import DataSpec


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file.

    Raises:
        DataError: it is missing, or isn't UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist; check the recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data file {path} can't be read as UTF-8 text ({error})") from error


def jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSONL file."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not JSON ({error.msg}); one object a line is expected") from error
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number} is not a JSON object")
        yield number, row


def _documents(spec: DataSpec) -> list[str]:
    """Return the texts of a `text`, `jsonl` or `huggingface` source."""
    if spec.kind == "text":
        return [read_text(Path(spec.path))]
    if spec.kind == "jsonl":
        texts = []
        for number, row in jsonl_rows(Path(spec.path)):
            if not isinstance(row.get(spec.text_field), str):
                raise DataError(
                    f"{spec.path} line {number} has no text in '{spec.text_field}'; it has {', '.join(row)}; "
                    "set data.text_field"
                )
            texts.append(row[spec.text_field])
        return texts
    try:
        import datasets
    except ImportError:
        raise DataError("data of kind huggingface needs 'datasets': pip install 'bitladder[data]'") from None
    try:
        rows = datasets.load_dataset(spec.path, spec.subset, split=spec.split or "train")
    except Exception as error:  # `datasets` raises whatever its readers and the network raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"data set {spec.path} (split {spec.split or 'train'}) can't be loaded: {reason}") from error
    if spec.text_field not in rows.column_names:
        raise DataError(
            f"data set {spec.path} has no column '{spec.text_field}'; it has {', '.join(rows.column_names)}; "
            "set data.text_field"
        )
    return [str(text) for text in rows[spec.text_field]]


def token_rows(spec: DataSpec, tokenizer: Any, length: int) -> torch.Tensor:
    """Return all rows of `length` tokens in the source, [rows, length]; documents are separated by the EOS token."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    documents = _documents(spec)
    for index, text in enumerate(documents):
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if index + 1 < len(documents):
            stream += separator
    rows = len(stream) // length
    return torch.tensor(stream[: rows * length], dtype=torch.long).view(rows, length)
