"""Evaluates exported checkpoints against the original, from the files, on held-out data.

`Reference.compute(original, data)` runs the original on one held-out set; `evaluate_checkpoint(references, directory)`
reads a checkpoint's files once and compares on every set. transformers' own loader would cast the FP8 codes and drop
the scales, so the files are read here: weights dequantised, and every quantised linear's input rounded through its
format, with the *stored* scale where it has one.

Arithmetic is float32. The noise floor of each metric is that of the original loaded in BF16 (which keeps the rotary
frequencies in float32, as serving does; casting the float32 model would round them too). Over rows r with n_r
counted tokens and sums x_r, a mean is Σ x_r / Σ n_r and its standard error (tokens of one row are not independent)

    sqrt(R / (R - 1) · Σ (x_r - mean · n_r)²) / Σ n_r
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from bitladder.errors import StaleRecord
from bitladder.evaluation.harness.tasks import TaskReference
from bitladder.evaluation.metrics import EXPORT_AGAIN, Sums
from bitladder.evaluation.reading import FakeQuantLinear, load_checkpoint, quantised_tensors
from bitladder.evaluation.reference import Reference, compare_with, on_split
from bitladder.evaluation.task import accuracy
from bitladder.formats import POWERS_OF_TWO, WEIGHT_ONLY, Arithmetic
from bitladder.models.weights import WeightFiles
from bitladder.records import CheckpointManifest, EvalResult, Evaluation
from bitladder.runinfo import Meter, Progress, no_progress, told

_HOW: Mapping[Arithmetic, str] = {
    WEIGHT_ONLY: "with inputs in 16 bits",
    POWERS_OF_TWO: "with every block's scale rounded up to a power of two",
}
ARITHMETIC = (
    "float32; weights dequantised, inputs of quantised linears rounded as their format says; "
    "noise floor: the original loaded in BF16"
)


def in_words(arithmetic: Mapping[str, Arithmetic]) -> str:
    """Return the arithmetic of an evaluation in words.

    Args:
        arithmetic: format -> how it is computed, where that isn't as it is stored.
    """
    return "; ".join([ARITHMETIC, *(f"{name} {_HOW[how]}" for name, how in sorted(arithmetic.items()))])


@torch.no_grad()
def compare(
    reference: Reference, directory: Path, name: str, progress: Progress = no_progress
) -> tuple[tuple[EvalResult, ...], int]:
    """Return the results of a checkpoint directory in ModelOpt's layout, and how many of its modules are quantised.

    Args:
        reference: the original on the same data.
        directory: the exported checkpoint; a manifest isn't needed.
        name: what it is called in the progress.
        progress: told of every batch.

    Raises:
        ModelError: the files are not a whole checkpoint, or give NaN or Inf.
    """
    model = load_checkpoint(directory, device=reference.device)
    quantised = sum(isinstance(module, FakeQuantLinear) for module in model.modules())
    return tuple(compare_loaded(reference, model, str(directory), name, progress)), quantised


@torch.no_grad()
def compare_loaded(
    reference: Reference, model: Any, origin: str, name: str, progress: Progress = no_progress, *, answer: bool = True
) -> list[EvalResult]:
    """Return the results of a loaded model on one held-out set.

    Args:
        reference: the original on the set.
        model: what `load_checkpoint` gives, on the reference's device.
        origin: where it comes from, for errors.
        name: what it is called in the progress.
        progress: told of every batch.
        answer: whether the set's task is done as well.

    Raises:
        ModelError: it gives NaN or Inf.
    """
    phase = f"{name}{on_split(reference.split)}"
    sums = compare_with(model, reference.data, reference.store, reference.device, origin, progress, f"evaluate {phase}")
    results = _results(reference, sums)
    if answer and reference.task is not None:
        assert reference.right is not None
        assert reference.bf16_right is not None
        right = reference.task.right(model, reference.device, progress, f"answer: {phase}")
        results.append(accuracy(reference.split, right, reference.right, reference.bf16_right))
    return results


def evaluate_checkpoint(
    references: Sequence[Reference],
    directory: Path,
    progress: Progress = no_progress,
    arithmetic: Mapping[str, Arithmetic] = MappingProxyType({}),
    tasks: TaskReference | None = None,
) -> Evaluation:
    """Return the checkpoint's KL to the original, perplexity, agreement, and task accuracy where there is a task.

    Args:
        references: the original on each held-out set, at least one, all on one device.
        directory: the exported checkpoint.
        progress: told of every batch.
        arithmetic: format -> how the device that will serve computes it, where that isn't as it is stored.
        tasks: the original's answers to tasks of lm-evaluation-harness; None: none are asked.

    Raises:
        RecordError: no manifest. StaleRecord: the manifest is of other files. ModelError: see `compare`.
    """
    manifest = CheckpointManifest.read(directory / CheckpointManifest.FILE_NAME)
    differing = sorted(
        set(quantised_tensors(WeightFiles.open(directory))) ^ {module.tensor for module in manifest.modules}
    )
    if differing:
        raise StaleRecord(
            f"{directory}: the files and {CheckpointManifest.FILE_NAME} disagree whether {differing[0]} is quantised; "
            f"{EXPORT_AGAIN}"
        )
    meter = Meter()
    with meter.phase(f"evaluate {manifest.scheme}"):
        with told(progress, f"load {manifest.scheme}"):
            model = load_checkpoint(directory, device=references[0].device, arithmetic=arithmetic)
        results = [
            result
            for reference in references
            for result in compare_loaded(reference, model, str(directory), manifest.scheme, progress)
        ]
        results += tasks.results(model, manifest.scheme, progress) if tasks is not None else []
    return Evaluation(
        scheme=manifest.scheme,
        manifest_sha256=manifest.fingerprint(),
        model_sha256=manifest.source_sha256,
        data={reference.split: reference.data.summary for reference in references},
        tasks=tasks.tasks.summaries() if tasks is not None else {},
        arithmetic=in_words(arithmetic),
        results=tuple(results),
        run=meter.info(),
    )


def _results(reference: Reference, sums: Sums) -> list[EvalResult]:
    floor = reference.bf16

    def result(
        metric: str, unit: str, value: tuple[float, float | None], noise_floor: float, own: float | None = None
    ) -> EvalResult:
        return EvalResult(
            metric=metric,
            split=reference.split,
            unit=unit,
            value=value[0],
            standard_error=value[1],
            samples=len(sums.tokens),
            noise_floor=noise_floor,
            reference=own,
        )

    return [
        result("kl", "nats per token", sums.ratio(sums.kl), floor.ratio(floor.kl)[0]),
        result("perplexity", "", sums.perplexity(), floor.perplexity()[0], reference.perplexity),
        result("top1_agreement", "share of tokens", sums.ratio(sums.agree), floor.ratio(floor.agree)[0]),
    ]
