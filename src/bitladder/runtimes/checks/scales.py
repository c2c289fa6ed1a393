"""Are the scales those of each module's format, numbers that can be scales, and shared where they must be?"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from numpy.typing import NDArray

from bitladder.formats import INPUT_SCALE, SCALE_DTYPE, WEIGHT_SCALE, WEIGHT_SCALE_2, Part, get_format
from bitladder.models.fusing import Layer
from bitladder.reading import open_file
from bitladder.records import BF16
from bitladder.runtimes.base import UNIFORM
from bitladder.runtimes.checks.subject import ANY_SHAPE, Subject
from bitladder.runtimes.files import Tensor
from bitladder.runtimes.findings import EXPORT_AGAIN

_AS_THEY_COME = " scales inputs as they come"


def _usable(scale: float | None) -> bool:
    """Return whether a number can be a scale."""
    return scale is not None and 0 < scale < math.inf


class ScalesCheck(Subject):
    """Checks the scales of linears."""

    def check_scales(self) -> None:
        """Check every scale, and that fused modules share those that are one number."""
        modules = {name.rpartition(".")[0] for name in self.tensors.scales}
        self._read_numbers([*self.tensors.scales.values(), *self.tensors.kv_scales.values()])
        for name, tensor in self.tensors.scales.items():
            self._module_scale(name, tensor)
        for layer in self.rules.layers:
            if self._runs(layer) == BF16:
                continue
            shared = [m for m in layer.modules if m in modules and self._stored(m) not in (None, BF16)]
            for part in get_format(self._runs(layer)).parts(ANY_SHAPE):
                if not part.shape:
                    self._equal(layer, shared, part.name)

    def _read_numbers(self, tensors: Sequence[Tensor]) -> None:
        for path in sorted({tensor.path for tensor in tensors}):
            with open_file(path) as file:
                for tensor in tensors:
                    if tensor.path == path:
                        self._read(tensor, tensor.numbers(file))

    def _read(self, tensor: Tensor, values: NDArray[Any] | None) -> None:
        if tensor.one_number:
            self._numbers[tensor.name] = None if values is None else float(values[0])
        else:
            self._rows[tensor.name] = None if values is None else values[~((values > 0) & (values < math.inf))].tolist()

    def _module_scale(self, name: str, tensor: Tensor) -> None:
        """Check one scale of a linear, of the kind that its format has."""
        module, _, leaf = name.rpartition(".")
        expected = self._expected(module) if module in self._runs_in else None
        if expected is None:  # a layer in 16 bits, which has none: `_left_over`
            self._scale(tensor)
            return
        wanted = get_format(expected)
        part = next((part for part in wanted.parts(self._shape(f"{module}.weight")) if part.name == leaf), None)
        if part is None:
            rounds = {"token": _AS_THEY_COME, "block": _AS_THEY_COME, "unrounded": " leaves inputs in 16 bits"}
            why = rounds.get(wanted.input, " has none") if leaf == INPUT_SCALE else " has none"
            self.findings.error(
                "unexpected_tensor",
                tensor.name,
                f"{self.rules.runtime} has no place for it: {wanted.modelopt_algorithm}{why}",
                "leave it out",
            )
        elif not part.shape:
            if not tensor.one_number:
                self.wrong.add(module)
            self._scale(tensor, wanted.modelopt_algorithm)
        elif len(part.shape) == 1:
            self._row_scales(module, tensor, wanted.modelopt_algorithm)
        else:
            self._block_scales(module, tensor, part, wanted.modelopt_algorithm)

    def _block_scales(self, module: str, tensor: Tensor, part: Part, algorithm: str) -> None:
        """Check the scales of a weight that has one a block; zero is a block of zeros."""
        odd = [value for value in self._rows.get(tensor.name) or () if value != 0]
        if tensor.shape != part.shape or tensor.dtype != part.dtype:
            self.wrong.add(module)
            problem = (
                f"is {tensor.dtype} {list(tensor.shape)}; quant_algo {algorithm} has {part.dtype} {list(part.shape)}"
            )
        elif odd:
            count = math.prod(part.shape)
            problem = f"has {len(odd)} of {count} scales that aren't finite and positive, the first is {odd[0]}"
        else:
            return
        self.findings.error("bad_scale", tensor.name, problem, EXPORT_AGAIN)

    def _row_scales(self, module: str, tensor: Tensor, algorithm: str) -> None:
        """Check the scales of a weight that has one an output row."""
        rows = self.tensors.weights[f"{module}.weight"].shape[:1]
        odd = self._rows.get(tensor.name, [])
        if tensor.one_number and rows == (1,):
            self._scale(tensor, algorithm)
        elif tensor.shape != rows:
            self.wrong.add(module)
            self.findings.error(
                "bad_scale",
                tensor.name,
                f"has the shape {list(tensor.shape)}; quant_algo {algorithm} has one scale an output row, {list(rows)}",
                EXPORT_AGAIN,
            )
        elif odd is None:
            self._not_a_float(tensor)
        elif odd:
            problem = f"has {len(odd)} of {rows[0]} scales that aren't finite and positive, the first is {odd[0]}"
            self.findings.error("bad_scale", tensor.name, problem, EXPORT_AGAIN)
        else:
            self._rounded(tensor)

    def _not_a_float(self, tensor: Tensor) -> None:
        self.findings.error(
            "bad_scale", tensor.name, f"is stored as {tensor.dtype}, not as {SCALE_DTYPE}", EXPORT_AGAIN
        )

    def _rounded(self, tensor: Tensor) -> None:
        if tensor.dtype != SCALE_DTYPE:
            self.findings.warn(
                "bad_scale",
                tensor.name,
                f"is stored as {tensor.dtype}: rounded, so that codes and scale no longer fit exactly",
                f"store scales as {SCALE_DTYPE}",
            )

    def _scale(self, tensor: Tensor, algorithm: str = UNIFORM) -> None:
        """Check a scale that is one number."""
        number = self._numbers.get(tensor.name)
        if not tensor.one_number:
            self.findings.error(
                "bad_scale",
                tensor.name,
                f"has the shape {list(tensor.shape)}; quant_algo {algorithm} has one scale a tensor",
                EXPORT_AGAIN,
            )
        elif number is None:
            self._not_a_float(tensor)
        elif not _usable(number):
            self.findings.error("bad_scale", tensor.name, f"is {number}; a scale is finite and positive", EXPORT_AGAIN)
        else:
            self._rounded(tensor)

    def _equal(self, layer: Layer, modules: Sequence[str], leaf: str) -> None:
        """Check that the modules of a fused layer share a scale."""
        tensors = [self.tensors.scales[name] for m in modules if (name := f"{m}.{leaf}") in self.tensors.scales]
        numbers = [self._numbers.get(tensor.name) for tensor in tensors]
        if not all(_usable(number) for number in numbers) or all(a == b for a, b in pairwise(numbers)):
            return
        fused = layer.name.rpartition(".")[2]
        if leaf == WEIGHT_SCALE_2:
            self.findings.error(
                "unequal_scales",
                tensors[0].name,
                f"the modules that {self.rules.runtime} fuses into {fused} have different scales above those of their "
                "blocks: it takes the largest for all, and serves other weights than those in the files",
                "quantise the modules of a fused layer with one amax, as `bitladder export` does",
            )
        elif leaf == WEIGHT_SCALE:
            self.findings.error(
                "unequal_scales",
                tensors[0].name,
                f"the modules that {self.rules.runtime} fuses into {fused} have different scales: it would quantise "
                "them again, to the largest, and serve other weights than those in the files",
                "quantise the modules of a fused layer with one scale, as `bitladder export` does",
            )
        else:
            self.findings.warn(
                "unequal_scales",
                tensors[0].name,
                f"the modules that {self.rules.runtime} fuses into {fused} have different input scales: it takes the "
                "largest",
                "calibrate the modules of a fused layer together",
            )
