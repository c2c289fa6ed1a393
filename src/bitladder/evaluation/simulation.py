"""Evaluates any assignment of formats without exporting it: `Simulation(...).results(references, scheme)`.

The original is loaded once, in float32. A scheme replaces its modules' weights by what their codes restore, and rounds
their inputs, in the very arithmetic in which `evaluation` reads an exported checkpoint: the numbers are the same to the
last bit (tested). Afterwards the modules are put back.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from bitladder.errors import StaleRecord
from bitladder.evaluation.evaluate import compare_loaded
from bitladder.evaluation.reading import FakeQuantLinear
from bitladder.evaluation.reference import Reference
from bitladder.formats import INPUT_SCALE, MODELOPT, get_format, grids
from bitladder.measured import Amax, Codes, check_codes, encoded, kv_amax
from bitladder.models.kv_layers import KEY_MODULE, cached_layers, layer_index
from bitladder.models.loading import load_model
from bitladder.records import BF16, EvalResult, Measurement, QuantModule, Scheme
from bitladder.runinfo import Progress, no_progress


class Simulation:
    """The original in float32 on one device, ready to take any scheme of its measurement.

    Memory: the model once, and what a scheme quantises a second time.
    """

    def __init__(
        self,
        directory: Path,
        measurement: Measurement,
        amax: Amax,
        device: str = "cpu",
        codes: Codes | None = None,
        carrier: str = MODELOPT,
    ) -> None:
        check_codes(measurement, codes)
        self.measurement, self.codes = measurement, codes
        self.amax, self.carrier = amax, carrier
        self.device = device
        self.model = load_model(directory, torch.float32, device)

    def results(
        self, references: Sequence[Reference], scheme: Scheme, progress: Progress = no_progress
    ) -> tuple[EvalResult, ...]:
        """Return the scheme's KL, perplexity and agreement on every held-out set; no task is done.

        Args:
            references: the original on each held-out set, on this device.
            scheme: of this measurement.
            progress: told of every batch.

        Raises:
            StaleRecord: the scheme is of another measurement. ModelError: it gives NaN or Inf.
        """
        if scheme.measurement_sha256 != self.measurement.fingerprint():
            raise StaleRecord(f"scheme {scheme.name} was planned from another measurement; plan again")
        with self._quantised(scheme):
            return tuple(
                result
                for reference in references
                for result in compare_loaded(reference, self.model, scheme.name, scheme.name, progress, answer=False)
            )

    @contextmanager
    def _quantised(self, scheme: Scheme) -> Iterator[None]:
        """Let the model be what the scheme's checkpoint would be."""
        before: dict[str, nn.Module] = {}
        try:
            for group in self.measurement.groups:
                if scheme.formats[group.name] == BF16:
                    continue
                for module in group.modules:
                    before[module.name] = self.model.get_submodule(module.name)
                    self._replace(module.name, self._fake_quantised(module, scheme.formats[group.name]))
            if scheme.kv_cache_format is not None:
                self.model.kv_scales = self._kv_scales()
                self.model.kv_skips = {
                    layer_index(self.model, f"{attention}.{KEY_MODULE}") for attention in scheme.kv_cache_skips
                }
            yield
        finally:
            self.model.kv_scales = {}
            for name, linear in before.items():
                self._replace(name, linear)

    def _replace(self, path: str, module: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)

    @torch.no_grad()
    def _fake_quantised(self, module: QuantModule, format_name: str) -> FakeQuantLinear:
        """Return the module with the weights that its codes restore."""
        linear = self.model.get_submodule(module.name)
        format_ = get_format(format_name, self.measurement.arithmetic)
        layout = format_.layouts[self.carrier]
        weight_amax = self.amax[format_.weight_key(module.name)].to(self.device)
        input_scale = None
        if format_.has_input_scale:
            made = format_.input_scale(self.amax[f"{module.name}.input_amax"].to(self.device))
            input_scale = layout.carried({INPUT_SCALE: made})[INPUT_SCALE]
        parts = encoded(module.name, linear.weight, weight_amax, format_, self.codes)
        weight = format_.served_weight(layout.carried(parts))
        restored = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        restored.weight = nn.Parameter(weight, requires_grad=False)
        restored.bias = linear.bias
        return FakeQuantLinear(restored, format_, input_scale)

    def _kv_scales(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Return `{layer index: (key scale, value scale)}`."""
        amax = kv_amax(self.measurement, self.amax)
        scales = {name: grids.scale_of(value).to(self.device) for name, value in amax.items()}
        return {
            layer_index(self.model, layer.key.name): (scales[layer.scale_names[0]], scales[layer.scale_names[1]])
            for layer in cached_layers(self.measurement.groups)
        }
