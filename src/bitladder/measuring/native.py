"""Our own engine: the scores of ModelOpt's AutoQuantize, by gradient or by KL, without ModelOpt; and a better gradient.

This module calibrates, and lets a scorer score batch after batch; `gradient` scores by `gradient` and `fisher`, `kl` by
`kl_div`. `decoder` is what both go through, `taps` what a module is in FP8, `kernels` the KL of logits on a GPU.

On GPUs that multiply FP8 numbers the error of FP8 comes from such a product; elsewhere from weights and inputs that are
rounded through FP8. Where a job has tokens enough, torch compiles a layer once for all layers, which takes a dozen
seconds; element-wise work then takes few passes over memory, and rounds less in between.

A model that doesn't fit the device is streamed (`layers`): every batch at hand goes through a layer before the next one
is loaded, and hidden states lie on the host. Its scores are the same, to the last bit.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn

from bitladder.device import OUT_OF_MEMORY, without_cudnn_attention
from bitladder.errors import MeasurementError
from bitladder.formats import Format, get_format, why_not
from bitladder.formats.grids import amax_of
from bitladder.measured import Amax, Codes
from bitladder.measuring import compensation
from bitladder.measuring.amax import RunningAmax, shared
from bitladder.measuring.checks import with_scales
from bitladder.measuring.decoder import Decoder, Pass
from bitladder.measuring.gradient import GradientScorer
from bitladder.measuring.job import BatchScores, Job
from bitladder.measuring.kl import KlScorer
from bitladder.measuring.kv_amax import AmaxCache, kv_cache_amax
from bitladder.measuring.layers import Layers, chunks
from bitladder.measuring.partial import Partial
from bitladder.models.kv_layers import cache_inputs
from bitladder.records import QuantGroup
from bitladder.runinfo import Meter

REMEDY = "engine: native needs one, use engine: modelopt"


@torch.no_grad()
def calibrate(layers: Layers, job: Job) -> Amax:
    """Return the amax of every searched module's weight and input, and of every layer's keys and values; unchecked."""
    seen: RunningAmax[str] = RunningAmax()
    last: list[tuple[torch.Tensor, torch.Tensor]] = []  # the input seen last, and its amax

    def observe(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if not last or last[0][0] is not inputs[0]:
                last[:] = [(inputs[0], amax_of(inputs[0]))]
            seen.see(f"{name}.input_amax", last[0][1])

        return hook

    modules = [module.name for group in job.target.groups for module in group.modules]
    cache, total = AmaxCache(layers.model.config), len(job.batches)
    through_cache = cache_inputs(layers.model, cache)
    with ExitStack() as stack:
        for name in modules:
            stack.callback(layers.model.get_submodule(name).register_forward_pre_hook(observe(name)).remove)
        stack.callback(last.clear)
        if layers.streamed:
            amax = _calibrate_streamed(layers, job, cache)
        else:
            for index, batch in enumerate(job.batches):
                job.progress("calibrate", index, total)
                layers.model(**batch.to(job.device).inputs, **through_cache)
                cache.forget()
                last.clear()
            amax = _weight_amax(layers.model, job.target.groups, job.spec.formats)
    job.progress("calibrate", total, total)
    amax |= seen.values()
    if job.spec.share_fused_scales:
        amax |= shared(amax, job.target.groups)
    amax = {key: value.cpu().clone() for key, value in amax.items()}
    return amax | kv_cache_amax(layers.model, job.target, cache)


def _weight_amax(model: Any, groups: Iterable[QuantGroup], formats: Iterable[str]) -> Amax:
    """Return the amax of the weights of these groups, a scalar each, and what a format scales by beside it."""
    found: Amax = {}
    for group in groups:
        fitting = (get_format(name) for name in formats if why_not(group, name) is None)
        others = [format_ for format_ in fitting if format_.amax_name != Format.amax_name]
        for module in group.modules:
            weight = model.get_parameter(f"{module.name}.weight")
            found[f"{module.name}.{Format.amax_name}"] = amax_of(weight).float()
            found |= {format_.weight_key(module.name): format_.amax_of(weight) for format_ in others}
    return found


def _calibrate_streamed(layers: Layers, job: Job, cache: AmaxCache) -> Amax:
    """Show every batch to the observers, a layer at a time, and return the amax of the weights."""
    decoder, amax = Decoder(layers, job), Amax()
    passes: list[Pass] = []
    for start, chunk in chunks(list(range(len(job.batches))), layers, job.batches, states=1):
        job.progress("calibrate", start, len(job.batches))
        passes = [Pass(job.batches[number].to(job.device)) for number in chunk]
        for current in passes:
            decoder.begin(current, **cache_inputs(layers.model, cache))
        for index in range(len(layers)):
            with layers.loaded(index) as layer:
                amax |= _weight_amax(layers.model, decoder.groups.get(index, ()), job.spec.formats)
                for current in passes:
                    current.output = decoder.run(layer, current.output, current.calls[index])
                    cache.forget()
    return amax


def run(layers: Layers, job: Job, partial: Partial, meter: Meter) -> None:
    """Calibrate and score; amax values and each batch's scores go to `partial`.

    Raises:
        MeasurementError: NaN or Inf in activations, or out of memory. EngineError: a model that it can't score.
    """
    with ready(layers, job):
        amax = partial.amax()
        if amax is None:
            with meter.phase("calibrate"):
                amax = calibrate(layers, job)
                with_scales(job.target, amax, job.spec)  # NaN is found before anything is kept
            partial.keep_amax(amax)
        job = dataclasses.replace(job, target=with_scales(job.target, amax, job.spec))
        codes = None
        if job.spec.rounding == "compensated":
            compensation.run(layers, job, partial, amax, meter)
            codes = partial.codes()
        with meter.phase("score"):
            score(scorer(layers, job, amax, codes), layers, job, partial)


@contextlib.contextmanager
def ready(layers: Layers, job: Job) -> Iterator[None]:
    """Let a model be scored: its weights need no gradient, and the job's GPU is the current one.

    Raises:
        MeasurementError: out of memory.
    """
    layers.model.config.use_cache = False
    for parameter in layers.model.parameters():
        parameter.requires_grad_(False)
    # Streams, graphs and Triton's kernels go to the current GPU.
    current = torch.cuda.device(job.device) if job.device.startswith("cuda") else contextlib.nullcontext()
    try:
        with current, without_cudnn_attention():
            yield
    except torch.OutOfMemoryError as error:
        raise MeasurementError(OUT_OF_MEMORY) from error


Scorer = AbstractContextManager[GradientScorer | KlScorer]


def scorer(layers: Layers, job: Job, amax: Amax, codes: Codes | None) -> Scorer:
    """Return what scores batches in all formats at once: a context, within which `.scores(batches)` takes some."""
    return (KlScorer if job.spec.method == "kl_div" else GradientScorer)(layers, job, amax, codes)


def score(by: Scorer, layers: Layers, job: Job, partial: Partial) -> None:
    """Score every batch that wasn't yet."""
    total = job.score_batches
    missing = partial.unscored(total, job.spec.formats)
    job.progress("score", total - len(missing), total)
    with by as scoring:
        before: list[tuple[int, Callable[[], BatchScores]]] = []  # whose scores the GPU is still at

        def settle() -> None:
            for index, wait in before:
                partial.keep_scores(index, wait())
                job.progress("score", total - len(missing) + missing.index(index) + 1, total)
            before.clear()

        for _, chunk in chunks(missing, layers, job.batches, scoring.states):
            found = scoring.scores([job.batches[index] for index in chunk])
            settle()
            before += zip(chunk, found, strict=True)
            if not layers.memory.is_gpu:
                settle()  # a CPU has done it already
        settle()
    job.progress("score", total, total)
