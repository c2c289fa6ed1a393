"""Has vLLM time its linear layers in every format that it runs, and its engine in 16 bits, on the device that serves.

`child_profile.py` does it in vLLM's environment; its result is the record `Profile`, from which
`planning/speed.py` predicts how fast any scheme is served.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bitladder.formats import COMPRESSED_TENSORS, get_format
from bitladder.records import BF16, QuantGroup
from bitladder.runtimes.vllm.job import ServeJob, SpeedJob
from bitladder.runtimes.vllm.rules import VllmRules
from bitladder.runtimes.vllm.serve import child_job

SCRIPT: Final = Path(__file__).with_name("child_profile.py")
# of a layer's input: decoding has a token a request, prefill as many as the engine puts into a step
TOKENS: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Load:
    """Requests that are given at once, each of so many tokens, and answered with so many."""

    requests: int
    prompt_tokens: int
    output_tokens: int


# Decoding: every batch with a short and a long context, as the attention's share grows with both. Prefill: from so few
# tokens that the host is what takes time, to many steps' worth of them.
LOADS: Final = (
    Load(1, 16, 33),
    Load(1, 1024, 65),
    Load(8, 128, 65),
    Load(8, 1024, 65),
    Load(64, 128, 65),
    Load(64, 1024, 33),
    Load(1, 4096, 9),
    Load(16, 512, 33),
    Load(4, 4096, 9),
)


def fused_shape(group: QuantGroup) -> tuple[int, int]:
    """Return [out_features, in_features] of the layer that vLLM makes of a group's modules."""
    shapes = [module.shape for module in group.modules if module.shape is not None]
    return sum(shape[0] for shape in shapes), shapes[0][1]


def layer_config(name: str, rules: type[VllmRules]) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint whose every linear layer is in a format."""
    form = get_format(name)
    if rules.support(name) is not None:
        producer = {"name": "modelopt", "version": "0.47.0"}
        return {"quant_method": "modelopt", "producer": producer, "ignore": [], **form.layer_config()}
    from bitladder.checkpoints.config_groups import quantisation_config

    config = quantisation_config({"Linear": name}, ())
    return {**config, "quant_method": COMPRESSED_TENSORS}


def profile_job(
    directory: Path,
    groups: Sequence[QuantGroup],
    formats: Sequence[str],
    *,
    rules: type[VllmRules] = VllmRules,
    engine: Mapping[str, Any] | None = None,
    loads: Sequence[Load] = LOADS,
    tokens: Sequence[int] = TOKENS,
    repeats: int = 3,
) -> dict[str, Any]:
    """Return the job as the child reads it.

    Args:
        directory: of the model in 16 bits; of its files the configuration and the tokenizer are read, no weights.
        groups: of the model.
        formats: that are timed beside 16 bits.
        rules: of the vLLM that is installed.
        engine: more arguments of `vllm.LLM`, used on a GPU.
        loads: what the engine is given.
        tokens: of a layer's input.
        repeats: of each load, after an untimed one.
    """
    most = max(loads, key=lambda one: one.requests)
    longest = max(one.prompt_tokens + one.output_tokens for one in loads)
    words = child_job(directory, ServeJob(speed=SpeedJob(most.requests, longest - 1, 1)))
    shapes = list(dict.fromkeys(fused_shape(group) for group in groups))
    fitting = {
        name: [
            shape
            for shape in shapes
            if any(
                fused_shape(group) == shape
                and all(get_format(name).why_not(module.shape or (0, 0)) is None for module in group.modules)
                for group in groups
            )
        ]
        for name in formats
    }
    timed = {BF16: {"config": None, "shapes": shapes}}
    timed |= {name: {"config": layer_config(name, rules), "shapes": own} for name, own in fitting.items() if own}
    return {
        **words,
        "engine": dict(engine or {}),
        "loads": [asdict(load) for load in loads],
        "tokens": list(tokens),
        "repeats": repeats,
        "formats": timed,
    }
