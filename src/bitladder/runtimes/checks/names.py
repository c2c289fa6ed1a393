"""Has every tensor a place, every place a tensor of its shape, and every name in a list a module?"""

from bitladder.models.families import uneven_layers
from bitladder.runtimes.checks.subject import Subject
from bitladder.runtimes.config import CONFIG_FILE
from bitladder.runtimes.findings import EXPORT_AGAIN


class NamesCheck(Subject):
    """Checks names and shapes."""

    def check_names(self) -> None:
        """Check that every tensor has a place and every place a tensor."""
        runtime = self.rules.runtime
        for name in self.tensors.unexpected:
            self.findings.error(
                "unexpected_tensor",
                name,
                f"{runtime} has no place for this tensor",
                "rename it as the original model has it, or leave it out",
            )
        for name in self.tensors.ignored:
            self.findings.warn(
                "unexpected_tensor",
                name,
                "is ignored: the configuration ties the output matrix to the embedding",
                "leave it out, or set tie_word_embeddings to false",
            )
        scales = [f"{module}.{leaf}" for module in self.need.linears for leaf in self._leaves(self._expected(module))]
        needed = [*self.need.tensors, *(name for name in scales if name not in self.tensors.scales)]
        for name in needed:
            if name not in self.tensors.weights:
                self.findings.error(
                    "missing_tensor",
                    self.spelt(name),
                    f"isn't there: {runtime} would use whatever its memory holds",
                    EXPORT_AGAIN,
                )
        for name in [] if self.need.known else uneven_layers(self.tensors.weights, self.files.config):
            self.findings.warn("missing_tensor", name, "isn't there, but other layers have it", EXPORT_AGAIN)

    def check_shapes(self) -> None:
        """Check that every tensor has the shape that the configuration asks for."""
        for name, tensor in self.tensors.weights.items():
            wanted, shape = self.need.tensors[name], self._shape(name)
            fits = len(wanted) == len(shape) and all(
                size in (None, held) for size, held in zip(wanted, shape, strict=True)
            )
            if not fits:
                packed = "" if shape == tensor.shape else f" of packed codes, {list(shape)} weights"
                sizes = ", ".join("?" if size is None else str(size) for size in wanted)
                self.findings.error(
                    "shape",
                    tensor.name,
                    f"is {list(tensor.shape)}{packed}, but {CONFIG_FILE} asks for [{sizes}]",
                    f"correct {CONFIG_FILE}, or export again from a model of this size",
                )

    def check_excludes(self) -> None:
        """Warn of names in the lists of a configuration that are none of the runtime's."""
        for entry in self.rules.useless_entries():
            self.findings.warn(
                "ambiguous_exclude",
                entry,
                f"quantized_layers lists it, but it is no layer in {self.rules.runtime}",
                "correct its spelling, or leave it out",
            )
        for pattern in self.rules.useless():
            self.findings.warn(
                "ambiguous_exclude",
                pattern,
                f"the exclusion hits nothing in {self.rules.runtime}",
                "correct its spelling, or leave it out",
            )
