"""Has vLLM time its linear layers in every format that it runs, and its engine in 16 bits, on the device that serves.

`child_profile.py` does it in vLLM's environment; its result is the record `Profile`, from which
`planning/speed.py` predicts how fast any scheme is served.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from bitladder.errors import ProbeFailed, UnsupportedModel
from bitladder.formats import COMPRESSED_TENSORS, get_format, why_not
from bitladder.models.splitting import Split
from bitladder.models.weights import read_config
from bitladder.records import (
    BF16,
    EngineSettings,
    PhaseCost,
    Profile,
    QuantGroup,
    SearchedShape,
    TimedCell,
    TimedLayer,
    TimedLoad,
)
from bitladder.runinfo import Meter
from bitladder.runtimes.child import run_child, vllm_version
from bitladder.runtimes.registry import VERSIONS
from bitladder.runtimes.vllm.exceptions import said
from bitladder.runtimes.vllm.job import ServeJob, SpeedJob
from bitladder.runtimes.vllm.rules import VllmRules
from bitladder.runtimes.vllm.serve import ENVIRONMENT, child_job, most_tokens

SCRIPT: Final = Path(__file__).with_name("child_profile.py")
# of a layer's input: decoding has a token a request, prefill as many as the engine puts into a step
TOKENS: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# Decoding: every batch with a short and a long context, as the attention's share grows with both. Prefill: from so few
# tokens that the host is what takes time, to many steps' worth of them. Prompts fill steps of 8192 tokens nearly: room
# is left for the answers of the first ones, or else these would take a step more.
LOADS: Final = (
    SpeedJob(1, 16, 65),
    SpeedJob(1, 1000, 129),
    SpeedJob(8, 120, 129),
    SpeedJob(8, 1000, 129),
    SpeedJob(64, 120, 129),
    SpeedJob(64, 1000, 129),
    SpeedJob(16, 500, 65),
    SpeedJob(1, 4000, 33),
    SpeedJob(4, 4000, 33),
)
_TOLD: Final = 300  # characters of why the engine didn't come up
_NO_SHAPE: Final = "none of the model's layers has a shape that it takes"


def rules_of(version: str) -> type[VllmRules]:
    """Return the rules of a release of vLLM, or the newest known ones."""
    found = VERSIONS.get(f"vllm=={version}", VllmRules)
    assert issubclass(found, VllmRules)
    return found


def servable(version: str) -> tuple[str, ...]:
    """Return the formats that this release of vLLM runs, by its rules; those of compressed-tensors' layout as well.

    Where a release's rules of that layout weren't read, those of the newest one are asked: what doesn't run is told.
    """
    rules = rules_of(version)
    carried = rules.CARRIED or VllmRules.CARRIED
    return tuple(name for name in dict.fromkeys((*rules.SUPPORT, *carried)) if rules.why_not(name) is None)


def layer_config(name: str, rules: type[VllmRules]) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint whose every linear layer is in a format."""
    form = get_format(name)
    if rules.support(name) is not None:
        return {"quant_method": "modelopt", "ignore": [], **form.layer_config()}
    layout = form.layouts[COMPRESSED_TENSORS]
    group = {
        "targets": ["Linear"],
        "weights": dict(layout.weights),
        "input_activations": None if layout.inputs is None else dict(layout.inputs),
        "format": layout.compression,
    }
    return {
        "quant_method": COMPRESSED_TENSORS,
        "config_groups": {"group_0": group},
        "format": layout.compression,
        "quantization_status": "compressed",
        "ignore": [],
    }


def profile_job(
    directory: Path,
    groups: Sequence[QuantGroup],
    formats: Sequence[str],
    *,
    rules: type[VllmRules],
    engine: Mapping[str, Any] | None = None,
    loads: Sequence[SpeedJob] = LOADS,
    tokens: Sequence[int] = TOKENS,
    tensor_parallel: int = 1,
) -> dict[str, Any]:
    """Return the job as the child reads it; see `profile`, but that `groups` are as one rank holds them."""
    most = max(load.requests for load in loads)
    longest = max(load.prompt_tokens + load.output_tokens for load in loads)
    shapes: dict[str, dict[tuple[int, int], None]] = {name: {} for name in (BF16, *formats)}
    for group in groups:
        if group.fused_shape is None:
            raise UnsupportedModel(f"{group.name} has modules of unknown shape; name the model's directory")
        for name, own in shapes.items():
            if why_not(group, name) is None:
                own[group.fused_shape] = None
    return {
        **child_job(directory, ServeJob(speed=SpeedJob(most, longest - 1, 1))),
        "engine": dict(engine or {}),
        "tensor_parallel": tensor_parallel,
        "loads": [asdict(load) for load in loads],
        "tokens": list(tokens),
        "formats": {
            name: {"config": None if name == BF16 else layer_config(name, rules), "shapes": list(own)}
            for name, own in shapes.items()
            if own
        },
    }


def profile(
    directory: Path,
    groups: Sequence[QuantGroup],
    python: Path,
    *,
    model: str,
    formats: Sequence[str] | None = None,
    engine: Mapping[str, Any] | None = None,
    loads: Sequence[SpeedJob] = LOADS,
    tokens: Sequence[int] = TOKENS,
    tensor_parallel: int = 1,
    timeout: float = 1800.0,
) -> Profile:
    """Have vLLM time a model's layers and its engine in 16 bits, and return what it took.

    Where several ranks share the model, the layers are the parts that one of them holds.

    Args:
        directory: of the model in 16 bits; of its files the configuration and the tokenizer are read, no weights.
        groups: of the model.
        python: the interpreter of vLLM's environment.
        model: what it is called.
        formats: that are timed beside 16 bits; None: all that this release of vLLM runs.
        engine: more arguments of `vllm.LLM`, used on a GPU.
        loads: what the engine is given, as far as the model holds so many tokens.
        tokens: of a layer's input.
        tensor_parallel: ranks that share the model, a GPU each.
        timeout: seconds.

    Raises:
        ProbeFailed: the engine doesn't serve the model, or 16 bits can't be timed. BitladderError: no vLLM there.
        UnsupportedModel: the model can't be split among so many ranks.
    """
    split = Split.of(read_config(directory), tensor_parallel)
    groups = [split.group(group) for group in groups]
    version, meter = vllm_version(python), Meter()
    wanted = servable(version) if formats is None else formats
    rules, most = rules_of(version), most_tokens(directory)
    loads = [one for one in loads if most is None or one.prompt_tokens + one.output_tokens <= most]
    job = profile_job(
        directory,
        groups,
        wanted,
        rules=rules,
        engine=engine,
        loads=loads,
        tokens=tokens,
        tensor_parallel=tensor_parallel,
    )
    outcome = run_child(python, SCRIPT, job, timeout=timeout, environment=ENVIRONMENT)
    if "linears" not in outcome.result:
        error = outcome.result.get("error", {"type": "exit status", "message": str(outcome.returncode)})
        reached = outcome.result.get("reached", "not started")
        limit = f" within {timeout:g} seconds" if outcome.timed_out else ""
        told = " ".join((error["message"] or outcome.output[-_TOLD:]).split())[:_TOLD]
        raise ProbeFailed(
            f"vLLM {version} can't be profiled{limit} (last step finished: {reached}): {error['type']}: {told}; see "
            f"that it serves {directory}"
        )
    untimed = {
        name: {"type": "shape", "message": _NO_SHAPE, "line": ""} for name in wanted if name not in job["formats"]
    }
    found = {**outcome.result, "refused": {**untimed, **outcome.result["refused"]}}
    return profile_of(found, groups, model, meter, tensor_parallel)


def profile_of(
    result: Mapping[str, Any], groups: Sequence[QuantGroup], model: str, meter: Meter, tensor_parallel: int = 1
) -> Profile:
    """Return the record of what the child found; `groups` are as one rank holds them.

    Raises:
        ProbeFailed: 16 bits weren't timed, or vLLM makes other layers of the model than its groups are.
    """
    shapes = [group.fused_shape for group in groups]
    refused = {
        name: f"{error['type']}: {said(error['message'], error['line'])}" for name, error in result["refused"].items()
    }
    if BF16 in refused or BF16 not in result["linears"]:
        why = refused.get(BF16, "no time was left")
        raise ProbeFailed(f"16 bits themselves couldn't be timed: {why}; give it more time (--timeout)")
    runtime, gpu = result["runtime"], result["gpu"]
    _check_layers(result["layers"], shapes, f"vLLM {runtime['version']}")
    info = meter.info()
    return Profile(
        model=model,
        searched=tuple(
            SearchedShape(out_features=shape[0], in_features=shape[1], groups=shapes.count(shape))
            for shape in dict.fromkeys(shapes)
            if shape is not None
        ),
        device=runtime["device"],
        capability=gpu.get("capability"),
        driver=gpu.get("driver"),
        runtime="vllm",
        version=runtime["version"],
        versions=runtime["versions"],
        tensor_parallel=tensor_parallel,
        engine=EngineSettings.model_validate(result["engine"]),
        layers=tuple(
            TimedLayer(
                format=name,
                **{**layer, "cells": tuple(TimedCell(**cell) for cell in layer["cells"])},
            )
            for name, layers in result["linears"].items()
            for layer in layers
        ),
        refused=refused,
        loads=tuple(TimedLoad.model_validate(load) for load in result["loads"]),
        run=info.model_copy(update={"phases": tuple(PhaseCost(**phase) for phase in result["phases"])}),
    )


def _check_layers(layers: Sequence[Mapping[str, Any]], shapes: Sequence[tuple[int, int] | None], who: str) -> None:
    """Raise where the engine has fewer layers of a shape than there are groups of it: it fuses others."""
    found = [(layer["out_features"], layer["in_features"]) for layer in layers]
    for shape in dict.fromkeys(shapes):
        if shape is not None and found.count(shape) < shapes.count(shape):
            raise ProbeFailed(
                f"{who} has {found.count(shape)} layers of {shape[0]} x {shape[1]}, the model {shapes.count(shape)} "
                "groups: it fuses other modules, so that times of its layers say nothing of groups; use another version"
            )
