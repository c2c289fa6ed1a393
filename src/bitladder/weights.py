"""A model directory's safetensors files: which tensors lie where, and what model this is, down to its bytes."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bitladder.errors import ModelError
from bitladder.headers import TensorInfo, read_header
from bitladder.records import FileDigest, ModelSource, digest_of
from bitladder.storage import sha256_of_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_HASHED_AT_ONCE = 4
_BLOCK = 2**26  # values
_ROWS = 16  # of a tensor, looked at together
SIXTEEN_BIT_DTYPES = ("BF16", "F16")


def all_finite(values: torch.Tensor) -> bool:
    """Return whether no value (any shape) is NaN or Inf.

    Block by block: torch's own test of the whole takes several times its memory.
    """
    return all(bool(torch.isfinite(block).all()) for block in values.detach().flatten().split(_BLOCK))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class WeightFiles:
    """The weights of one model directory."""

    directory: Path
    files: tuple[str, ...]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, directory: Path) -> "WeightFiles":
        """Read the headers of the weight files in `directory`.

        Raises:
            ModelError: the directory or a file is missing, a file is truncated, or the index disagrees with the files.
        """
        if not directory.is_dir():
            raise ModelError(f"model directory {directory} does not exist; check model.path")
        index = directory / INDEX_FILE
        wanted: dict[str, str] | None = None
        if index.exists():
            try:
                wanted = json.loads(index.read_text())["weight_map"]
                files = tuple(sorted(set(wanted.values())))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ModelError(f"{index} is damaged ({error}); fetch it again") from error
        elif (directory / SINGLE_FILE).exists():
            files = (SINGLE_FILE,)
        else:
            others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
            found = f"; found {', '.join(others[:3])}: convert to safetensors first" if others else ""
            raise ModelError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{found}")
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            path = directory / file
            if not path.exists():
                raise ModelError(f"{index} names {file}, which is missing in {directory}; fetch it again")
            try:
                tensors.update(read_header(path))
            except ModelError as error:
                raise ModelError(f"{path} {error}; it is truncated or damaged: fetch it again") from error
        if wanted is not None and set(wanted) != set(tensors):
            odd = sorted(set(wanted) ^ set(tensors))[0]
            raise ModelError(f"{index} and its files disagree about tensor {odd}; fetch the model again")
        return cls(directory, files, tensors)

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor, on the CPU."""
        with safe_open(self.directory / self.tensors[name].file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def is_zero(self, name: str) -> bool:
        """Return whether a tensor [rows, ...] is zero everywhere; reading stops at the first rows that aren't."""
        with safe_open(self.directory / self.tensors[name].file, framework="pt") as file:
            rows = file.get_slice(name)
            starts = range(0, self.tensors[name].shape[0], _ROWS)
            return not any(bool(rows[start : start + _ROWS].any()) for start in starts)


class DigestCache:
    """SHA-256 of files, recomputed only where size or modification time changed."""

    def __init__(self, known: dict[str, tuple[int, int, str]] | None = None) -> None:
        self.known = dict(known or {})

    def sha256(self, path: Path) -> str:
        """Return the file's hex SHA-256."""
        stat = path.stat()
        entry = self.known.get(str(path))
        if entry is None or tuple(entry[:2]) != (stat.st_size, stat.st_mtime_ns):
            entry = (stat.st_size, stat.st_mtime_ns, sha256_of_file(path))
            self.known[str(path)] = entry
        return entry[2]


def read_config(directory: Path) -> dict[str, Any]:
    """Return the content of `config.json`.

    Raises:
        ModelError: missing or damaged.
    """
    path = directory / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not directory.is_dir():
            raise ModelError(f"model directory {directory} does not exist; check model.path") from None
        raise ModelError(f"{directory} has no config.json; name a Hugging Face model directory") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} is damaged ({error}); fetch it again") from error
    return config


def model_source(directory: Path, *, path: str, revision: str | None, cache: DigestCache) -> ModelSource:
    """Return the identity of the model in `directory`: digests of its config and of every weight file.

    Raises:
        ModelError: files are missing or truncated.
    """
    config = read_config(directory)
    names = ["config.json", *WeightFiles.open(directory).files]
    if (directory / INDEX_FILE).exists():
        names.append(INDEX_FILE)
    with ThreadPoolExecutor(max_workers=_HASHED_AT_ONCE) as pool:
        digests = list(pool.map(lambda name: cache.sha256(directory / name), names))
    files = tuple(
        FileDigest(name=name, bytes=(directory / name).stat().st_size, sha256=digest)
        for name, digest in zip(names, digests, strict=True)
    )
    return ModelSource(
        path=path,
        revision=revision,
        architecture=(config.get("architectures") or ["?"])[0],
        model_type=config.get("model_type", "?"),
        sha256=digest_of(f"{file.name} {file.sha256}" for file in files),
        files=files,
    )
