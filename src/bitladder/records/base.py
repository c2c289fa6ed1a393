"""The files that the steps exchange, as frozen types: what was measured, planned, exported, verified and evaluated.

Every record is JSON with a `schema_version`; tensors lie beside it in safetensors; nothing is pickled. A record is
identified by its `fingerprint`: the SHA-256 of its content without the fields that two equal runs may differ in
(times, memory, hardware). Its file ends with the SHA-256 of all of it, so that an edit or a flipped bit is found.
`docs/records.md` describes every field.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from bitladder.errors import RecordError
from bitladder.reading import read_json
from bitladder.storage import atomic_write, sha256_of_bytes

SCHEMA_VERSION = 2
CONTENT_DIGEST = "content_sha256"  # key of a record's file: the digest of everything else in it
BF16 = "bf16"  # the format of a group that a scheme leaves alone, whatever 16-bit dtype the source has
BF16_BITS = 16
ASSISTANT_TURNS: Literal["assistant turns"] = "assistant turns"  # which tokens of conversations count
ALL_TOKENS: Literal["all tokens"] = "all tokens"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that a record may hold")


class Part(BaseModel):
    """A frozen piece of a record; unknown fields, NaN and Inf are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class Grown(Part):
    """A part with fields that came later: they aren't written while they say nothing, so that digests stay the same."""

    later: ClassVar[frozenset[str]]

    @model_serializer(mode="wrap")
    def _without_what_says_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        for name in self.later:
            if getattr(self, name) == type(self).model_fields[name].get_default(call_default_factory=True):
                content.pop(name, None)
        return content


class Record(Part):
    """A frozen record with one file on disk."""

    # Fields that two runs with the same result may differ in; they don't count for the fingerprint.
    volatile: ClassVar[frozenset[str]] = frozenset()
    written_by: ClassVar[str] = "run"  # the command whose step writes it

    schema_version: int = SCHEMA_VERSION

    def fingerprint(self) -> str:
        """Return the hex SHA-256 of the record's content without its volatile fields."""
        return _digest_of_json(self.model_dump(mode="json", exclude=set(self.volatile)))

    def write(self, path: Path) -> None:
        """Write the record to `path` as indented JSON that ends with the digest of its content, atomically."""
        content = self.model_dump(mode="json")
        content[CONTENT_DIGEST] = _digest_of_json(content)
        atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the record at `path`.

        Raises:
            RecordError: the file is missing, isn't JSON, isn't such a record, or isn't what was written; the message
                names the remedy.
        """
        kind, command = cls.__name__, f"bitladder {cls.written_by} RECIPE"
        try:
            content = read_json(path, parse_constant=_refuse_constant)
        except FileNotFoundError:
            raise RecordError(f"{path} does not exist; `{command}` writes it") from None
        except (OSError, ValueError) as error:  # not UTF-8, not JSON, NaN, nested without end
            raise RecordError(
                f"{path} can't be read as JSON ({error}); name a {kind}, and if it should be one, delete it and run "
                f"`{command}` again"
            ) from error
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise RecordError(
                f"{path} has schema_version {version!r}, this Bitladder reads {SCHEMA_VERSION}; "
                f"if it is a {kind}, delete it and run `{command}` again"
            )
        if content.pop(CONTENT_DIGEST, None) != _digest_of_json(content):
            raise RecordError(
                f"{path} was changed since it was written: its content is not what its {CONTENT_DIGEST} says; "
                f"delete it and run `{command}` again"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "(top level)"
            raise RecordError(f"{path} is not a {kind}: {where}: {first['msg']}; run `{command}` again") from error

    @classmethod
    def read_if_whole(cls, path: Path) -> Self | None:
        """Return the record at `path`; None where there is none, or a damaged one that is to be made again."""
        try:
            return cls.read(path) if path.exists() else None
        except RecordError:
            return None


class FileDigest(Part):
    """One file: its path relative to the directory, its size in bytes, its SHA-256."""

    name: str
    bytes: int
    sha256: str


class PhaseCost(Part):
    """What one phase took."""

    phase: str
    seconds: float
    peak_rss_bytes: int
    peak_gpu_bytes: int | None = None


class RunInfo(Part):
    """Where and how a step ran; never part of a fingerprint."""

    started: str
    hardware: str
    threads: int
    workers: int = Field(default=0, description="processes that shared the work through Ray; 0: this one did it alone")
    versions: dict[str, str]
    phases: tuple[PhaseCost, ...] = ()


class RunState(Record):
    """What a run directory belongs to, and what its steps took; `run.json`, which marks the directory as ours."""

    FILE_NAME: ClassVar[str] = "run.json"

    recipe: dict[str, Any] = Field(description="the recipe with every default filled in")
    phases: dict[str, tuple[PhaseCost, ...]] = Field(default={}, description="step -> what its phases took")
    measured_with: dict[str, Any] = Field(default={}, description="those of its sections that decide the measurement")
    digests: dict[str, tuple[int, int, str]] = Field(
        default={}, description="file -> size, modification time (ns), SHA-256: spares hashing it again"
    )


def _digest_of_json(content: Mapping[str, Any]) -> str:
    """Return the hex SHA-256 of a JSON object, however it is laid out."""
    return sha256_of_bytes(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def digest_of(parts: Iterable[str]) -> str:
    """Return the hex SHA-256 over `parts`, each ended by a newline."""
    return sha256_of_bytes("".join(f"{part}\n" for part in parts).encode())
