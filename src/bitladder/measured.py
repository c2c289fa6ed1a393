"""What a measurement leaves beside its record: amax values and compensated codes, as tensors in files.

torch is imported where tensors are read: who plans or reports needs only the names of the files.
"""

import re
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Self

from bitladder.errors import MeasurementError, RecordError
from bitladder.formats import Format
from bitladder.reading import open_safetensors, read_tensors
from bitladder.records import Measurement
from bitladder.storage import atomic_path, discard, sha256_of_file

if TYPE_CHECKING:
    import torch

MEASUREMENT_FILE = "measurement.json"
AMAX_FILE = "measurement.safetensors"
CODES = "codes"  # directory
_CODES_FILE = re.compile(r"layer-\d+\.safetensors")
# Float32 scalars: "<module>.weight_amax" and "<module>.input_amax"; keys and values as `formats.kv_cache` names them.
Amax = dict[str, "torch.Tensor"]


class Codes:
    """Compensated codes of weights on disk, and the scales that were chosen with them, read when they are asked for.

    files: what `codes_key` gives -> the file.
    names: the parts, `<key>.<part>`.
    """

    def __init__(self, files: dict[str, Path], names: Collection[str]) -> None:
        self.files, self.names = files, frozenset(names)

    @classmethod
    def in_files(cls, paths: Iterable[Path]) -> Self:
        """Return the codes in these files, and in no other that may lie beside them.

        Raises:
            RecordError: a module's codes are in two of them.
        """
        found: dict[str, Path] = {}
        parts: list[str] = []
        for path in paths:
            with open_safetensors(path) as file:
                names = list(file.keys())
            parts += names
            for key in {name.rpartition(".")[0] for name in names}:
                if key in found:
                    raise RecordError(f"{path} and {found[key]} both have codes of {key}; measure again")
                found[key] = path
        return cls(found, parts)

    def _key(self, module: str, format_: Format) -> str:
        own = codes_key(module, format_.name)
        return own if own in self.files or format_.weight_like is None else codes_key(module, format_.weight_like)

    def have(self, module: str, format_: Format, part: str) -> bool:
        """Return whether a part of a module in a format was chosen with the codes."""
        return f"{self._key(module, format_)}.{part}" in self.names

    def read(self, module: str, format_: Format, part: str) -> "torch.Tensor":
        """Return one of the `parts` of a module in a format, on the CPU."""
        key = self._key(module, format_)
        with open_safetensors(self.files[key]) as file:
            found: torch.Tensor = file.get_tensor(f"{key}.{part}")
        return found

    def parts(self, module: str, format_: Format) -> "dict[str, torch.Tensor]":
        """Return what was chosen of a module in a format, on the CPU: its codes, and maybe scales, `{part: tensor}`."""
        key = self._key(module, format_)
        with open_safetensors(self.files[key]) as file:
            names = (name.rpartition(".") for name in file.keys())  # noqa: SIM118
            return {part: file.get_tensor(f"{key}.{part}") for own, _, part in names if own == key}


def codes_key(module: str, format_name: str) -> str:
    """Return what the tensors of a module's codes in a format begin with, `.<part>` coming after it."""
    return f"{module}.{format_name}"


def codes_files(directory: Path) -> list[Path]:
    """Return the files of layers' codes in a directory, by layer; what else lies there isn't ours."""
    return [path for path in sorted(directory.glob("*")) if _CODES_FILE.fullmatch(path.name)]


def has_earlier_codes(measurement: Measurement) -> bool:
    """Return whether an earlier version made the codes, whose files don't say which format they are of."""
    return measurement.rounding is not None and any(not module.format for module in measurement.rounding.modules)


def read_codes(
    measurement: Measurement, directory: Path, sha256: Callable[[Path], str] = sha256_of_file
) -> Codes | None:
    """Return the codes that belong to a measurement, `directory` being where its files lie; None: the nearest ones.

    Args:
        measurement: whose codes.
        directory: where its files lie.
        sha256: of a file; a cache spares hashing gigabytes again.

    Raises:
        RecordError: a file is missing, or not the one that the measurement was written with, or an earlier version's.
    """
    if measurement.rounding is None:
        return None
    if has_earlier_codes(measurement):
        raise RecordError(f"{directory / CODES} has codes of an earlier version's kind; run `bitladder measure` again")
    for entry in measurement.rounding.files:
        path = directory / CODES / entry.name
        if not path.is_file():
            raise RecordError(f"{path} is missing; run `bitladder measure` again")
        if sha256(path) != entry.sha256:
            raise RecordError(f"{path} is not the file that {MEASUREMENT_FILE} was written with; measure again")
    return Codes.in_files(directory / CODES / entry.name for entry in measurement.rounding.files)


def encoded(
    module: str, weight: "torch.Tensor", amax: "torch.Tensor", format_: Format, codes: Codes | None
) -> "dict[str, torch.Tensor]":
    """Return what a module's weight is stored as, `{part: tensor}` without the input's scale, on the weight's device.

    Args:
        module: its name.
        weight: [out_features, in_features].
        amax: of the weight, as the format scales by it, on its device.
        format_: whose parts.
        codes: the measurement's; None: every weight to its nearest.
    """
    if codes is None:
        return format_.encode(weight, amax)
    chosen = {part: tensor.to(weight.device) for part, tensor in codes.parts(module, format_).items()}
    return format_.tensor_scales(amax) | chosen


def check_codes(measurement: Measurement, codes: Codes | None) -> None:
    """Check that compensated codes are at hand exactly where the measurement has them.

    Raises:
        MeasurementError: they are not, or of other modules.
    """
    wanted = None
    if measurement.rounding is not None:
        wanted = {codes_key(module.name, module.format) for module in measurement.rounding.modules}
    if wanted != (None if codes is None else set(codes.files)):
        have, need = ("no" if found is None else "compensated" for found in (codes, wanted))
        raise MeasurementError(f"{have} codes were given, the measurement has {need} ones; read them with read_codes")


def copy_codes(measurement: Measurement, source: Path, destination: Path) -> None:
    """Copy a measurement's codes, where it has some, to another run's directory."""
    discard(destination / CODES)
    for entry in measurement.rounding.files if measurement.rounding is not None else ():
        with atomic_path(destination / CODES / entry.name) as temporary:
            shutil.copyfile(source / CODES / entry.name, temporary)


def kv_amax(measurement: Measurement, amax: Amax) -> "dict[str, torch.Tensor]":
    """Return `{name in the checkpoint: amax}` of every layer's keys and values.

    Raises:
        MeasurementError: the measurement doesn't know them.
    """
    from bitladder.models.kv_layers import cached_layers

    layers = cached_layers(measurement.groups)
    missing = [name for layer in layers for name in layer.amax_names if name not in amax]
    if missing or not layers:
        raise MeasurementError(
            "kv_cache: fp8 was asked for, but this measurement has no amax of keys and values of every attention layer "
            "(some layer's k_proj or v_proj isn't searched or has no scale, or the model doesn't use transformers' "
            "cache); set kv_cache: none"
        )
    return {
        scale: amax[name] for layer in layers for name, scale in zip(layer.amax_names, layer.scale_names, strict=True)
    }


def read_amax(measurement: Measurement, directory: Path) -> Amax:
    """Return the amax values that belong to a measurement, `directory` being where its files lie.

    Raises:
        MeasurementError: it has none (an imported manifest, or measured without shared scales).
        RecordError: the file is missing, damaged, or of another measurement.
    """
    if measurement.amax_sha256 is None:
        raise MeasurementError(
            f"this measurement ({measurement.engine}, imported) has no amax values: it is good for planning, "
            "not for export; run `bitladder measure` on the model itself"
        )
    if not measurement.fused_scales_shared:
        raise MeasurementError(
            "this measurement was made with share_fused_scales: false, for comparison only: a runtime would requantise "
            "its fused modules; measure again with share_fused_scales: true"
        )
    path = directory / AMAX_FILE
    if not path.is_file():
        raise RecordError(f"{path} is missing; run `bitladder measure` again")
    if sha256_of_file(path) != measurement.amax_sha256:
        raise RecordError(f"{path} is not the file that {MEASUREMENT_FILE} was written with; measure again")
    try:
        amax: Amax = read_tensors(path)
        return amax
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} is damaged ({error}); measure again") from error
