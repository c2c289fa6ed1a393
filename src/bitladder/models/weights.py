"""A model directory's safetensors files: which tensors lie where, and what model this is, down to its bytes.

torch and numpy are imported where tensors are read: a plan or a report needs to know only which model it is of.
"""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from bitladder.errors import ModelError
from bitladder.models.headers import TensorInfo, read_header
from bitladder.reading import open_file, read_json, read_text
from bitladder.records import FileDigest, ModelSource, digest_of
from bitladder.runinfo import Progress, no_progress
from bitladder.storage import sha256_of_file

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PROVENANCE_FILE = "PROVENANCE"  # in a model's directory: where its weights come from, in a line
_SHARD_NAME = re.compile(r"[^/\\\0.][^/\\\0]*\.safetensors")  # a plain file name
_HASHED_AT_ONCE = 4
_HASHING = "hash model (MiB)"  # what its progress is called
_BLOCK = 2**26  # values
_ROWS = 16  # of a tensor, looked at together
# torch's name of a dtype. Source: safetensors' own table (safetensors/torch.py).
TORCH_NAMES = {
    "C64": "complex64",
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
SIXTEEN_BIT_DTYPES = ("BF16", "F16")


def all_finite(values: "torch.Tensor") -> bool:
    """Return whether no value (any shape) is NaN or Inf.

    Block by block: torch's own test of the whole takes several times its memory.
    """
    import torch

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
        wanted = _read_index(index) if index.exists() else None
        if wanted is not None:
            files = tuple(sorted(set(wanted.values())))
        elif (directory / SINGLE_FILE).exists():
            files = (SINGLE_FILE,)
        else:
            raise ModelError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{_instead(directory)}")
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            path = directory / file
            if not path.is_file():
                says = (
                    f"{path} is no regular file" if wanted is None else f"{index} names {file}, which is no file there"
                )
                raise ModelError(f"{says}; fetch it again")
            try:
                found = read_header(path)
            except ModelError as error:
                raise ModelError(f"{path} {error}; it is truncated or damaged: fetch it again") from error
            twice = sorted(set(found) & set(tensors))
            if twice:
                raise ModelError(
                    f"{directory}: tensor {twice[0]} is in {tensors[twice[0]].file} and in {file}; which one counts "
                    "depends on who reads it: remove one, or fetch the model again"
                )
            tensors.update(found)
        unlisted = sorted(set(tensors) - set(wanted)) if wanted is not None else []
        if unlisted:
            raise ModelError(
                f"{index} doesn't list tensor {unlisted[0]}, which is in {tensors[unlisted[0]].file}; fetch both again"
            )
        return cls(directory, files, tensors)

    @staticmethod
    def are_in(directory: Path) -> bool:
        """Return whether a directory has weights."""
        return (directory / INDEX_FILE).exists() or (directory / SINGLE_FILE).exists()

    def load(self, name: str) -> "torch.Tensor":
        """Return one tensor, on the CPU: read from the disk where it is used, and private where it is written to.

        Only the tensor's own bytes are mapped. safetensors' reader parses the header of the whole file again.

        Raises:
            ModelError: the file is gone or changed, or torch has no such dtype.
        """
        import numpy as np
        import torch

        info = self.tensors[name]
        dtype: Any = getattr(torch, TORCH_NAMES.get(info.dtype, ""), None)
        if dtype is None:
            raise ModelError(f"{self.directory / info.file}: {name} is stored as {info.dtype}, which torch can't read")
        if info.begin == info.end:
            return torch.empty(info.shape, dtype=dtype)
        try:
            with open_file(self.directory / info.file) as file:
                values = np.memmap(file, np.uint8, "c", info.begin, (info.end - info.begin,))
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.directory / info.file} can't be read ({error}); fetch it again") from error
        return torch.from_numpy(values).view(dtype).view(info.shape)

    def is_zero(self, name: str) -> bool:
        """Return whether a tensor [rows, ...] is zero everywhere; reading stops at the first rows that aren't."""
        rows = self.load(name)
        return not any(bool(rows[start : start + _ROWS].any()) for start in range(0, rows.shape[0], _ROWS))


def _read_index(path: Path) -> dict[str, str]:
    """Return which file each tensor lies in.

    Raises:
        ModelError: damaged, or a file that doesn't lie in the index's own directory.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged ({error}); fetch it again") from error
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(file, str) for file in table.values()):
        raise ModelError(f"{path} is damaged (no weight_map from tensors to files); fetch it again")
    odd = sorted(file for file in set(table.values()) if not _SHARD_NAME.fullmatch(file))
    if odd:
        raise ModelError(f"{path} names {odd[0]!r}, which is no name of a safetensors file beside it; fetch it again")
    return table


def _instead(directory: Path) -> str:
    """Return what a directory without weights has instead, and what to do, as the end of an error."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    foreign = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf"))]
    if foreign:
        return f"; found {', '.join(foreign[:3])}: convert to safetensors first"
    shards = [name for name in names if name.endswith(".safetensors")]
    if len(shards) == 1:
        return f"; found {shards[0]}: if that is the whole model, rename it to {SINGLE_FILE}"
    return f"; found {', '.join(shards[:3])}: fetch the index that belongs to them" if shards else ""


class DigestCache:
    """SHA-256 of files, recomputed only where size or modification time changed."""

    def __init__(self, known: dict[str, tuple[int, int, str]] | None = None) -> None:
        self.known = dict(known or {})

    def knows(self, path: Path) -> bool:
        """Return whether the file's SHA-256 is known, so that it needn't be read."""
        stat, entry = path.stat(), self.known.get(str(path))
        return entry is not None and tuple(entry[:2]) == (stat.st_size, stat.st_mtime_ns)

    def sha256(self, path: Path, read: Callable[[int], None] | None = None) -> str:
        """Return the file's hex SHA-256; `read` is told the length of each block that had to be read."""
        if not self.knows(path):
            stat = path.stat()
            self.known[str(path)] = (stat.st_size, stat.st_mtime_ns, sha256_of_file(path, read))
        return self.known[str(path)][2]


def read_config(directory: Path) -> dict[str, Any]:
    """Return the content of `config.json`.

    Raises:
        ModelError: missing or damaged.
    """
    path = directory / "config.json"
    try:
        config: Any = read_json(path)
    except FileNotFoundError:
        if not directory.is_dir():
            raise ModelError(f"model directory {directory} does not exist; check model.path") from None
        raise ModelError(f"{directory} has no config.json; name a Hugging Face model directory") from None
    except (ValueError, OSError) as error:
        remedy = "save it as UTF-8 without a byte order mark" if "BOM" in str(error) else "fetch it again"
        raise ModelError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object; name a Hugging Face model directory, or fetch it again")
    return config


def read_provenance(directory: Path) -> str | None:
    """Return what a model's file PROVENANCE says of where its weights come from, in one line; None: there is none.

    Raises:
        ModelError: it isn't UTF-8.
    """
    path = directory / PROVENANCE_FILE
    try:
        return " ".join(read_text(path).split()) or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} can't be read as UTF-8 text ({error}); mend or remove it") from error


def licence_of(directory: Path) -> str | None:
    """Return the licence that the metadata of a model's own card (README.md) names; None: it has none that is read."""
    try:
        parts = read_text(directory / "README.md").split("---\n")
    except (OSError, ValueError):
        return None
    lines = parts[1].splitlines() if len(parts) > 2 and not parts[0].strip() else []
    return next((line.partition(":")[2].strip(" '\"") for line in lines if line.startswith("license:")), None) or None


def commit_of(directory: Path) -> str | None:
    """Return the commit of a snapshot in the Hub's cache; None: the directory is none. Source: huggingface_hub."""
    return directory.name if directory.parent.name == "snapshots" else None


def model_source(
    directory: Path, *, path: str, revision: str | None, cache: DigestCache, progress: Progress = no_progress
) -> ModelSource:
    """Return the identity of the model in `directory`: digests of its config and of every weight file.

    Args:
        directory: of the model.
        path: what the recipe calls it.
        revision: of a Hub id.
        cache: the digests that are known.
        progress: told of the MiB that are read, where some have to be.

    Raises:
        ModelError: files are missing or truncated.
    """
    config = read_config(directory)
    names = ["config.json", *WeightFiles.open(directory).files]
    if (directory / INDEX_FILE).exists():
        names.append(INDEX_FILE)
    wanted = sum((directory / name).stat().st_size for name in names if not cache.knows(directory / name))
    telling, done = Lock(), 0

    def read(size: int) -> None:
        nonlocal done
        with telling:
            done += size
            if wanted >> 20:
                progress(_HASHING, done >> 20, wanted >> 20)

    with ThreadPoolExecutor(max_workers=_HASHED_AT_ONCE) as pool:
        digests = list(pool.map(lambda name: cache.sha256(directory / name, read), names))
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
        provenance=read_provenance(directory),
    )
