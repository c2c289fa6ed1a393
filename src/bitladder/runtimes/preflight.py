"""Pre-flight: what would a runtime make of a checkpoint, from its files alone? `preflight(directory)`.

Read are the JSON files, the headers of the safetensors files, and every scale; that is milliseconds, whatever the
model's size. With `read_weights=True` the weights are read too, for NaN and infinity: as long as the disk takes.
No runtime is imported. Each runtime's own rules (`registry.py`) are applied to one list of what the architecture needs
and one list of what the files hold:

- which configuration it reads, and whether it knows the algorithm;
- tensors that are missing, or for which it has no place; dtypes and shapes;
- for every linear, or fused group of linears, the format that the configuration decides (a uniform one's exclusions, a
  mix's list) against the one that is stored;
- scales that are missing, of another shape than their format has, not finite and positive, or unequal within a fused
  group where they must be shared;
- the FP8 KV cache that is asked for against its scales; the manifest's promises;
- what each of several ranks would hold of a layer, where the language model is to be shared (`checks/ranks.py`).

Tensor names are read as vLLM's mapper does, for every runtime. How the runtimes differ beyond that is in each one's
rules, what an architecture needs in `architectures.py`, each with its sources; `files.py` reads what the directory
holds; the checks themselves are in `checks/`.
"""

from collections.abc import Sequence
from pathlib import Path

from bitladder.errors import BitladderError, ModelError
from bitladder.formats import COMPRESSED_TENSORS
from bitladder.models.families import Architecture, architecture
from bitladder.models.splitting import Split
from bitladder.records import BF16, ProbedLayer, ProbeResult
from bitladder.runtimes.base import Rules
from bitladder.runtimes.checks.config_groups import GroupsCheck, canonical
from bitladder.runtimes.checks.configuration import ConfigurationCheck
from bitladder.runtimes.checks.formats import FormatsCheck
from bitladder.runtimes.checks.kv_cache import KvCacheCheck
from bitladder.runtimes.checks.names import NamesCheck
from bitladder.runtimes.checks.ranks import Ranks
from bitladder.runtimes.config import inline
from bitladder.runtimes.files import Files, read_files
from bitladder.runtimes.findings import EXPORT_AGAIN, Findings
from bitladder.runtimes.registry import RULES, VERSIONS

RUNTIMES = tuple(RULES)


class _Check(ConfigurationCheck, NamesCheck, FormatsCheck, KvCacheCheck):
    """All checks of one checkpoint by one runtime's rules."""

    def run(self, read_weights: bool) -> str:
        """Make all checks; return the last one that made sense."""
        self.check_model()
        if not self.check_configuration():
            return "configuration"
        self.check_names()
        self.check_shapes()
        self.check_formats()
        if self.reproduced:
            self.check_excludes()
        self.check_scales()
        self.check_kv_cache()
        self.check_manifest()
        if read_weights:
            self._values()
        return "weights" if read_weights else "scales"

    def _values(self) -> None:
        for tensor in self.tensors.weights.values():
            if not tensor.finite():
                self.findings.error("bad_weight", tensor.name, "holds NaN or infinite values", EXPORT_AGAIN)

    def layers(self) -> tuple[ProbedLayer, ...]:
        """Return every linear as the runtime would treat it; none where its names aren't known."""
        if not self.reproduced:
            return ()
        promised = self._promised()
        return tuple(
            ProbedLayer(
                name=self.spelt(module),
                runtime_name=layer.name,
                promised=None if self.files.manifest is None else promised.get(module, BF16),
                format=self._runs(layer),
                method=self.rules.method(self._runs(layer)),
            )
            for layer in self.rules.layers
            for module in layer.modules
        )


def preflight(
    directory: Path, runtimes: Sequence[str] = RUNTIMES, *, read_weights: bool = False, tensor_parallel: int = 1
) -> tuple[ProbeResult, ...]:
    """Return what each runtime would make of the checkpoint in `directory`, one result a runtime.

    Args:
        directory: the checkpoint.
        runtimes: of `RUNTIMES`, or a version of one that is known too, such as `vllm==0.25.1`.
        read_weights: also look for NaN and infinity in the weights, which reads all of them. Without it only JSON
            files, headers and scales are read: milliseconds whatever the size.
        tensor_parallel: ranks that will share the language model.

    Raises:
        ModelError: there is no such directory. BitladderError: an unknown runtime.
    """
    if not directory.is_dir():
        raise ModelError(f"{directory} is no directory; name one that holds a checkpoint")
    unknown = sorted(set(runtimes) - set(VERSIONS))
    if unknown:
        raise BitladderError(f"the pre-flight doesn't know the runtime {unknown[0]!r}; choose of {', '.join(VERSIONS)}")
    findings = Findings()
    files = read_files(directory, findings)
    need = None if files is None else architecture(files.config, canonical(files.tensors))
    return tuple(
        _result(directory, VERSIONS[name], files, need, findings.copy(), read_weights, tensor_parallel)
        for name in runtimes
    )


def _result(
    directory: Path,
    rules: type[Rules],
    files: Files | None,
    need: Architecture | None,
    findings: Findings,
    read_weights: bool,
    tensor_parallel: int,
) -> ProbeResult:
    """Return one runtime's result; `findings` holds what was found whatever the runtime."""
    manifest = None if files is None else files.manifest
    asked = None if files is None else inline(files.config)
    carried = asked is not None and asked.method == COMPRESSED_TENSORS
    reached = "files"
    layers: tuple[ProbedLayer, ...] = ()
    if files is not None and need is not None:
        own = carried and rules.CARRIED
        check = GroupsCheck(files, need, rules, findings) if own else _Check(files, need, rules, findings)
        reached = check.run(read_weights)
        layers = check.layers() if reached != "configuration" else ()
        if tensor_parallel > 1 and layers:
            runs = {need.rename(f"{layer.name}.").removesuffix("."): layer.format for layer in layers}
            ranks = Ranks(need, check.rules, runs, bool(own), check.spelt)
            ranks.check(Split.of(files.config, tensor_parallel), findings)
    return ProbeResult(
        checkpoint=directory.name,
        scheme=None if manifest is None else manifest.scheme,
        manifest_sha256=None if manifest is None else manifest.fingerprint(),
        runtime=rules.runtime,
        version=rules.version,
        stage="preflight",
        tensor_parallel=tensor_parallel,
        reached=reached,
        device=None,
        layers=layers,
        findings=findings.records(),
    )
