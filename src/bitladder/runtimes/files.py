"""What a checkpoint directory holds: JSON files, safetensors headers, the manifest, tokenizer and processor.

What can't be read is a finding, not an exception: a pre-flight says everything that it can.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bitladder import reading
from bitladder.errors import ModelError, RecordError
from bitladder.models.headers import read_header
from bitladder.records import CheckpointManifest
from bitladder.runtimes.config import CONFIG_FILE, LEGACY_FILE
from bitladder.runtimes.findings import EXPORT_AGAIN, Findings

INDEX_FILE = "model.safetensors.index.json"
_TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("tekken.json",), ("vocab.json", "merges.txt"))
_PROCESSOR_FILES = (("preprocessor_config.json",), ("processor_config.json",))
_HUB_FILES = (".cache/huggingface/", ".git/", ".gitattributes")  # what a hub's clients leave; no runtime reads it
_SCAN_BYTES = 1 << 20  # what a cache holds, and a multiple of every dtype's bytes
# dtypes of weights that aren't quantised: runtimes cast them into 16 bits as they copy them.
# Source: vllm model_executor/model_loader/weight_utils.py, default_weight_loader.
SIXTEEN_BIT = ("BF16", "F16", "F32", "F64")
# dtype -> (integer of its width, bits of the magnitude, least magnitude that is NaN or infinite). E4M3 has no infinity,
# its NaN is 0x7F or 0xFF. Source: OCP OFP8 table 1; IEEE 754.
_NOT_FINITE: dict[str, tuple[type[np.unsignedinteger[Any]], int, int]] = {
    "F8_E4M3": (np.uint8, 0x7F, 0x7F),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "F32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "F64": (np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}
_MAGNITUDES = [  # of the codes 0 to 126: m / 8 · 2^-6 below 2^-6, (1 + m / 8) · 2^(e - 7) from there on
    *(m / 8 * 2**-6 for m in range(8)),
    *((1 + m / 8) * 2 ** (e - 7) for e in range(1, 16) for m in range(8)),
][:-1]
_E4M3 = np.array([*_MAGNITUDES, np.nan, *(-value for value in _MAGNITUDES), np.nan], dtype=np.float32)
_E8M0_BIAS, _E8M0_NAN = 127, 255  # Source: OCP Microscaling Formats Specification 1.0, section 5.4.1
_NUMBERS: dict[str, Callable[[bytes], "np.ndarray[Any, Any]"]] = {  # dtype -> elements
    "BF16": lambda data: (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32),
    "F16": lambda data: np.frombuffer(data, "<f2"),
    "F32": lambda data: np.frombuffer(data, "<f4"),
    "F64": lambda data: np.frombuffer(data, "<f8"),
    "I64": lambda data: np.frombuffer(data, "<i8"),  # a shape
    "F8_E4M3": lambda data: _E4M3[np.frombuffer(data, np.uint8)],
}


@dataclass(frozen=True)
class Tensor:
    """One tensor as a header describes it; `begin` and `end` are byte offsets in the file."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def one_number(self) -> bool:
        """Whether vLLM takes it for one number. Source: vllm model_executor/parameter.py, PerTensorScaleParameter."""
        return self.shape in ((), (1,))

    def numbers(self, file: BinaryIO) -> "np.ndarray[Any, Any] | None":
        """Return the elements of a tensor of numbers, in a row, read from its opened file; None: another dtype.

        Bytes that lie as the scales of blocks do are exponents, E8M0.
        """
        file.seek(self.begin)
        if self.dtype == "U8" and len(self.shape) == 2:
            exponents = np.frombuffer(file.read(self.end - self.begin), np.uint8)
            return np.where(exponents == _E8M0_NAN, np.nan, np.ldexp(1.0, exponents.astype(np.int32) - _E8M0_BIAS))
        if self.dtype not in _NUMBERS:
            return None
        return _NUMBERS[self.dtype](file.read(self.end - self.begin))

    def finite(self) -> bool:
        """Return whether no element is NaN or infinite; dtypes without such values are.

        Raises:
            ModelError: the file changed meanwhile.
        """
        if self.dtype not in _NOT_FINITE or self.begin == self.end:
            return True
        integer, magnitude, least = _NOT_FINITE[self.dtype]
        block = np.empty(_SCAN_BYTES, np.uint8)
        with reading.open_file(self.path) as file:
            file.seek(self.begin)
            left = self.end - self.begin
            while left > 0:
                held = block[: min(left, _SCAN_BYTES)]
                if file.readinto(held.data) != len(held):
                    raise ModelError(f"{self.path} ended inside the tensor {self.name}; it changed while it was read")
                if int((held.view(integer) & integer(magnitude)).max()) >= least:
                    return False
                left -= len(held)
        return True


def _tensors_in(path: Path) -> list[Tensor]:
    """Return the tensors of one file; raises ModelError where it isn't whole."""
    return [Tensor(t.name, path, t.dtype, t.shape, t.begin, t.end) for t in read_header(path).values()]


def _read_json(path: Path, findings: Findings) -> dict[str, Any] | None:
    """Return a JSON object; None: it isn't there, or can't be read (which is a finding)."""
    try:
        content = reading.read_json(path)
        if not isinstance(content, dict):
            raise ValueError(f"holds {type(content).__name__}, not an object")
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        findings.error("missing_file", path.name, f"can't be read: {error}", "fetch or export it again")
        return None
    return content


@dataclass(frozen=True)
class Files:
    """What a checkpoint directory holds, whatever the runtime."""

    directory: Path
    config: dict[str, Any]
    legacy: dict[str, Any] | None
    tensors: tuple[Tensor, ...]
    manifest: CheckpointManifest | None


def read_files(directory: Path, findings: Findings) -> Files | None:
    """Return the checkpoint's files; None: what is needed to go on can't be read."""
    config = _read_json(directory / CONFIG_FILE, findings)
    if config is None and not findings.failed:
        findings.error(
            "missing_file", CONFIG_FILE, "isn't there, so no runtime knows the model", "copy it from the model"
        )
    legacy = _read_json(directory / LEGACY_FILE, findings)
    tensors = _read_tensors(directory, findings)
    manifest = read_manifest(directory, findings)
    if config is None or findings.failed:
        return None
    _check_side_files(directory, config, findings)
    return Files(directory, config, legacy, tuple(tensors), manifest)


def read_manifest(directory: Path, findings: Findings) -> CheckpointManifest | None:
    """Return the checkpoint's manifest; None: it has none, or one that can't be read (which is a finding)."""
    path = directory / CheckpointManifest.FILE_NAME
    if not path.exists():
        return None
    try:
        manifest = CheckpointManifest.read(path)
    except RecordError as error:
        findings.error("missing_file", path.name, f"can't be read: {error}", EXPORT_AGAIN)
        return None
    listed = {entry.name for entry in manifest.files} | {path.name, CheckpointManifest.CARD_NAME}
    present = {entry.relative_to(directory).as_posix() for entry in directory.rglob("*") if not entry.is_dir()}
    for name in sorted(present - listed):
        if not name.startswith(_HUB_FILES):
            findings.error("unexpected_file", name, "isn't listed in the manifest; a runtime may read it", "remove it")
    return manifest


def _read_tensors(directory: Path, findings: Findings) -> list[Tensor]:
    """Return the tensors of the files that a runtime reads: those the index names, or all where there is none.

    Source: vllm model_executor/model_loader/weight_utils.py, filter_duplicate_safetensors_files.
    """
    index = _read_json(directory / INDEX_FILE, findings)
    placed = {} if index is None else index.get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        findings.error("missing_file", INDEX_FILE, "has no weight_map of file names", "write it again from the files")
        return []
    names = sorted(set(placed.values())) or sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        findings.error("missing_file", "*.safetensors", "no weight file is there", "fetch or export the weights")
    tensors: list[Tensor] = []
    for name in names:
        if not (directory / name).is_file():
            findings.error("missing_file", name, f"{INDEX_FILE} names it, but it isn't there", "fetch this file again")
            continue
        try:
            tensors += _tensors_in(directory / name)
        except ModelError as error:
            findings.error("missing_file", name, str(error), "it is truncated or damaged: fetch it again")
    _check_twice(directory, tensors, names, indexed=index is not None, findings=findings)
    if index is not None and not findings.failed:
        _check_index(placed, tensors, findings)
    return tensors


def _check_twice(
    directory: Path, tensors: Iterable[Tensor], names: Sequence[str], *, indexed: bool, findings: Findings
) -> None:
    """Check that no tensor is in two files, those that the index doesn't name included.

    Source: TensorRT-LLM reads every *.safetensors but `consolidated*`, whatever the index names.
    """
    strays = (
        [p for p in sorted(directory.glob("*.safetensors")) if p.name not in names and p.is_file()] if indexed else []
    )
    found = list(tensors)
    for path in strays:
        if "consolidated" in path.name:
            continue
        try:
            found += _tensors_in(path)
        except ModelError as error:
            findings.warn("missing_file", path.name, f"{INDEX_FILE} doesn't name it, and it {error}", "remove it")
    first: dict[str, str] = {}
    for tensor in found:
        before = first.setdefault(tensor.name, tensor.path.name)
        if before != tensor.path.name:
            findings.error(
                "unexpected_tensor",
                tensor.name,
                f"is in {before} and in {tensor.path.name}; which one counts depends on who reads it",
                "remove one of the two files, or the tensor from one",
            )


def _check_index(placed: Mapping[str, str], tensors: Iterable[Tensor], findings: Findings) -> None:
    """Warn of an index that doesn't say where the tensors lie; runtimes take only file names from it."""
    odd = sorted(set(placed.items()) ^ {(tensor.name, tensor.path.name) for tensor in tensors})
    if odd:
        findings.warn(
            "config_mismatch",
            INDEX_FILE,
            f"it and the weight files disagree about {len(odd)} entries, first {odd[0][0]} in {odd[0][1]}",
            "write the index again from the files",
        )


def _check_side_files(directory: Path, config: Mapping[str, Any], findings: Findings) -> None:
    """Check that the tokenizer, and for a vision-language model its processor, come along."""

    def present(choices: Sequence[tuple[str, ...]]) -> bool:
        return any(all((directory / name).is_file() for name in names) for names in choices)

    copy_it = "copy it from the original model; vLLM stops without it"
    put_it = "put the file itself there, or remove it"
    if not present(_TOKENIZER_FILES):
        findings.error("missing_file", "tokenizer.json", "no tokenizer is there", copy_it)
    if "vision_config" in config and not present(_PROCESSOR_FILES):
        findings.error("missing_file", "preprocessor_config.json", "no image processor is there", copy_it)
    for path in sorted(directory.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            findings.error("missing_file", path.name, "is no regular file: whoever opens it may wait for ever", put_it)
    if not _has_chat_template(directory):
        findings.warn(
            "missing_file",
            "chat_template.jinja",
            "no chat template is there: prompts can be completed, but chat requests are refused",
            "copy it from the original model, if that is one for chats",
        )


def _has_chat_template(directory: Path) -> bool:
    """Return whether a chat template lies where transformers looks for one."""
    if any((directory / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return "chat_template" in reading.read_json(directory / "tokenizer_config.json")
    except (OSError, ValueError):  # no such file: no template in it
        return False
