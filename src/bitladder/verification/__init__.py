"""Re-reads exported checkpoints against their schemes, and against each other: `verify(...) -> Verification`.

A second opinion: no code of `checkpoints` is shared, no manifest believed. What a checkpoint must hold is described
from source, scheme and measurement alone (`expected`); then all of its directory is compared with that (`checks`),
tensor by tensor, every shard opened once:

- the files: those of the source's weights, its index and side files, the two configurations; none missing, none extra;
  each as the manifest says, side files byte for byte as in the source;
- `config.json`: the source's and the `quantization_config` that the scheme implies, `hf_quant_config.json` (of a
  checkpoint in ModelOpt's layout; compressed-tensors has no such file) and the
  index likewise, key by key;
- every tensor of the source under its name, in its file, with dtype and shape; outside the scheme with its bytes;
- inside: every code · scale within half an E4M3 step of the source weight (a code at ±448 may stand for more).
  Compensated codes are not the nearest ones: they are the very codes that the measurement has, by their SHA-256, and
  no code · scale is farther from the source weight than it says;
- every weight scale is what the largest weight of the source's fused group gives, every scale of inputs, keys and
  values what the measurement's amax gives;
- the manifest says all that;
- of every two schemes, exactly the modules with different formats have different tensors.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from bitladder.errors import ModelError, RecordError, StaleRecord
from bitladder.records import (
    CheckpointManifest,
    CheckpointVerification,
    Finding,
    Measurement,
    PairDifference,
    Scheme,
    Verification,
)
from bitladder.runinfo import Progress, no_progress
from bitladder.verification.checks import Examination, check
from bitladder.verification.expected import cached_modules, expect
from bitladder.verification.reading import Tensors, weight_files

__all__ = ["compare", "examine", "verify", "weight_files"]


def examine(
    scheme: Scheme,
    measurement: Measurement,
    amax: Mapping[str, torch.Tensor],
    source: Path,
    directory: Path,
    carrier: str = "modelopt",
) -> tuple[CheckpointVerification, dict[str, str]]:
    """Check one checkpoint; return the verdict and each searched module's digest (of its weight's bytes and dtype).

    Raises:
        ModelError: the source can't be read.
    """
    exam = Examination(directory, scheme)
    manifest = None
    try:
        manifest = CheckpointManifest.read(directory / CheckpointManifest.FILE_NAME)
    except RecordError as error:
        exam.find(CheckpointManifest.FILE_NAME, None, str(error))
    with ExitStack() as stack:
        originals = Tensors(weight_files(source), stack)
        for file, problem in originals.broken.items():
            raise ModelError(f"{source / file} can't be read ({problem}); fetch the model again")
        try:
            expected = expect(scheme, measurement, amax, source, originals, carrier)
        except (StaleRecord, RecordError) as error:
            exam.find(CheckpointManifest.FILE_NAME, None, str(error))
        else:
            check(exam, expected, manifest, measurement, source, originals)
    verdict = CheckpointVerification(
        scheme=scheme.name,
        manifest_sha256="" if manifest is None else manifest.fingerprint(),
        tensors_checked=exam.tensors,
        codes_checked=exam.codes,
        bytes_identical=exam.bytes_identical,
        findings=tuple(exam.findings),
    )
    return verdict, exam.digests


def compare(
    first: Scheme, second: Scheme, measurement: Measurement, digests: Mapping[str, Mapping[str, str]]
) -> PairDifference:
    """Check that two checkpoints differ exactly where their schemes do."""
    expected = {
        module.name
        for group in measurement.groups
        if first.formats[group.name] != second.formats[group.name]
        for module in group.modules
    }
    for name in cached_modules(measurement):
        attention = name.rpartition(".")[0]
        one, other = ((s.kv_cache_format, attention in s.kv_cache_skips) for s in (first, second))
        expected |= {f"{name} (KV cache)"} if one != other else set()
    mine, theirs = digests[first.name], digests[second.name]
    differing = {name for name in set(mine) | set(theirs) if mine.get(name) != theirs.get(name)}
    findings = []
    if not differing:
        findings.append(
            Finding(
                file="*.safetensors",
                tensor=None,
                problem=f"the checkpoints of {first.name} and {second.name} hold the same weights",
                remedy="export both again; if their schemes are equal, drop one",
            )
        )
    for name in sorted(expected ^ differing)[:3]:
        problem = "the same in both, though the formats differ" if name in expected else "different in both"
        findings.append(
            Finding(
                file="*.safetensors",
                tensor=name,
                problem=f"{problem} ({first.name}, {second.name})",
                remedy="export both schemes again",
            )
        )
    return PairDifference(
        first=first.name,
        second=second.name,
        modules_expected=len(expected),
        modules_differing=len(differing),
        findings=tuple(findings),
    )


def verify(
    schemes: Sequence[Scheme],
    measurement: Measurement,
    amax: Mapping[str, torch.Tensor],
    source: Path,
    directories: Mapping[str, Path],
    progress: Progress = no_progress,
    carrier: str = "modelopt",
) -> Verification:
    """Check every checkpoint against its scheme, and every two against each other.

    What is wrong with a pair is no finding where one of the two has findings of its own, which explain it.

    Args:
        schemes: what was planned.
        measurement: what they were planned from.
        amax: its amax values (`measured.read_amax`).
        source: the original model's directory.
        directories: `{scheme name: checkpoint directory}`.
        progress: told of every checkpoint.
        carrier: whose layout they have, `modelopt` or `compressed-tensors`.

    Raises:
        ModelError: the source can't be read.
    """
    verdicts, digests = {}, {}
    for index, scheme in enumerate(schemes):
        progress("verify", index, len(schemes))
        verdicts[scheme.name], digests[scheme.name] = examine(
            scheme, measurement, amax, source, directories[scheme.name], carrier
        )
    progress("verify", len(schemes), len(schemes))
    pairs = []
    for index, first in enumerate(schemes):
        for second in schemes[index + 1 :]:
            pair = compare(first, second, measurement, digests)
            explained = not (verdicts[first.name].ok and verdicts[second.name].ok)
            pairs.append(pair.model_copy(update={"findings": ()}) if explained else pair)
    return Verification(checkpoints=tuple(verdicts.values()), pairs=tuple(pairs))
