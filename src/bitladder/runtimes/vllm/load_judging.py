"""From what vLLM's loader did with a checkpoint to findings, layer by layer: `findings(...)`.

What vLLM refuses is classified by its exception. What it loads in silence is found from the facts: parameters that no
tensor reached, values cast across the FP8 boundary, layers in another format than promised, scales that can't be, and
scales that it merges. An exception that no rule explains counts last: the facts may explain it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from bitladder.formats import (
    GLOBAL_SCALES,
    INPUT_SCALE,
    WEIGHT,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    WEIGHT_SCALE_2,
    WEIGHT_ZERO_POINT,
)
from bitladder.records import BF16, CheckpointManifest, ErrorClass, ProbedLayer, ProbeFinding, layer_number
from bitladder.runtimes.base import RECOMPUTED
from bitladder.runtimes.child import Outcome
from bitladder.runtimes.vllm.exceptions import advice, classify, classify_exit, exit_words, said
from bitladder.runtimes.vllm.facts import Facts, Failure, Layer, Parameter
from bitladder.runtimes.vllm.formats import (
    PACKED,
    SIXTEEN_BIT,
    fitting,
    packing_of,
    plain_format,
    spread_of,
    wrong_format,
)

_EXPORT = "export the checkpoint again"
_KV_FP8 = "fp8"  # how the names of an FP8 KV cache begin
# What vLLM's attention layers may be given besides k_scale and v_scale; ModelOpt writes neither, 1.0 is used.
# Source: vllm model_executor/layers/quantization/kv_cache.py, BaseKVCacheMethod.create_weights.
# compressed-tensors' have zero points of unsymmetric numbers, too.
_OPTIONAL_SCALES = ("q_scale", "prob_scale", "q_zero_point", "k_zero_point", "v_zero_point")
_KV_SCALES = ("k_scale", "v_scale")
_ABOVE = (WEIGHT_SCALE_2, GLOBAL_SCALES[WEIGHT_SCALE_2])  # of which a fused layer has one, over its blocks' scales


def module_of(tensor: str) -> str:
    """Return the module that a tensor belongs to: its name without the last part."""
    return tensor.rpartition(".")[0]


def _codes(tensors: Mapping[str, Any], module: str) -> Any:
    """Return a module's weight, or its packed codes; None: it has neither."""
    return tensors.get(f"{module}.{WEIGHT}", tensors.get(f"{module}.{WEIGHT_PACKED}"))


def _error(error_class: ErrorClass, where: str, problem: str, remedy: str) -> ProbeFinding:
    return ProbeFinding(error_class=error_class, where=where, problem=problem, remedy=remedy)


def _warning(error_class: ErrorClass, where: str, problem: str, remedy: str) -> ProbeFinding:
    return ProbeFinding(error_class=error_class, severity="warning", where=where, problem=problem, remedy=remedy)


def failure_finding(failure: Failure, facts: Facts) -> ProbeFinding:
    """Return the finding of an exception that vLLM raised; `runtime_bug` where no rule explains it."""
    error_class = classify(failure.type, failure.message or failure.line)
    where = f"vLLM, {failure.step}"
    if failure.step == "weights" and facts.last_tensor is not None:
        where = facts.last_tensor
    problem = f"vLLM stops at the step {failure.step}: {failure.type}: {said(failure.message, failure.line)}"
    return _error(error_class, where, problem, advice(error_class, failure.message))


def tokenizer_findings(facts: Facts) -> Iterator[ProbeFinding]:
    """Yield a tokenizer that makes nothing of text: transformers builds an empty one where the files are missing."""
    if facts.tokenizer is not None and not facts.tokenizer.text_tokens:
        yield _error(
            "missing_file",
            "tokenizer.json",
            f"vLLM makes a tokenizer of {facts.tokenizer.vocabulary} token(s), which turns text into nothing",
            "copy the source's tokenizer files into the checkpoint",
        )


def cast_findings(facts: Facts) -> Iterator[ProbeFinding]:
    """Yield tensors whose values were cast into, out of, or between FP8 types without a scale."""
    for cast in facts.casts:
        yield _error(
            "silent_cast",
            cast.tensor,
            f"vLLM casts it from {cast.before} to {cast.after} without a scale ({cast.parameter or 'on the way'})",
            "store the module in the format that exclude_modules (`ignore` in config.json) gives it, or change those",
        )


def _shards(layer: Layer | None, parameter: Parameter, begin: int, end: int) -> list[int]:
    """Return which of a layer's shards the elements `begin` to `end` of a parameter belong to."""
    if layer is None or not layer.shards or not parameter.shape:
        return []
    if parameter.elements == len(layer.shards):  # a scale for each
        edges = list(range(len(layer.shards) + 1))
    elif sum(layer.widths) % parameter.shape[0] == 0:
        line, rows = parameter.elements // parameter.shape[0], sum(layer.widths) // parameter.shape[0]
        edges = [0, *(line * end // rows for end in accumulate(layer.widths))]  # a line a row, or a square's rows
    else:
        return []
    return [index for index, (low, high) in enumerate(pairwise(edges)) if low < end and begin < high]


def _sibling(facts: Facts, layer: Layer) -> str | None:
    """Return the checkpoint's name of a module that was loaded into a layer."""
    own = (p for name, p in facts.parameters.items() if module_of(name) == layer.name)
    return next((module_of(copy.tensor) for parameter in own for copy in parameter.copies), None)


def _tensor_names(facts: Facts, layer: Layer | None, name: str, begin: int, end: int) -> list[str]:
    """Return the checkpoint's names for elements of a parameter, or vLLM's where the checkpoint shows no sibling."""
    kind = name.rpartition(".")[2]
    sibling = _sibling(facts, layer) if layer is not None else None
    if layer is None or sibling is None:
        return [name]
    parent, _, own = sibling.rpartition(".")
    if own not in layer.shards:  # one module in the checkpoint
        return [f"{sibling}.{kind}"]
    shards = _shards(layer, facts.parameters[name], begin, end)
    return [f"{parent}.{layer.shards[index]}.{kind}" for index in shards] or [name]


def _fused_on_disk(facts: Facts, name: str) -> bool:
    """Return whether a scale's layer is one tensor in the checkpoint, so that one scale is all it can have."""
    weight = _codes(facts.parameters, module_of(name))
    own = facts.parameters[name].copies
    return weight is not None and bool(own) and len({copy.tensor for copy in weight.copies}) == 1


def missing_findings(facts: Facts) -> Iterator[ProbeFinding]:
    """Yield what vLLM never loaded: elements that no tensor reached."""
    layers = {layer.name: layer for layer in facts.layers}
    for name, parameter in facts.parameters.items():
        kind = name.rpartition(".")[2]
        if not parameter.unloaded or kind in _KV_SCALES or kind in _OPTIONAL_SCALES or _fused_on_disk(facts, name):
            continue
        layer = layers.get(module_of(name))
        if kind == INPUT_SCALE and layer is not None and not layer.rounds_input:
            continue  # a place for what older checkpoints have, which is dropped
        names = {
            tensor: None
            for begin, end in parameter.unloaded
            for tensor in _tensor_names(facts, layers.get(module_of(name)), name, begin, end)
        }
        count = sum(end - begin for begin, end in parameter.unloaded)
        for tensor in names:
            yield _error(
                "missing_tensor",
                tensor,
                f"vLLM never loads {count:,} of {parameter.elements:,} elements of {name}, and doesn't say so",
                f"{_EXPORT}; the checkpoint lacks this tensor, or has it under a name that vLLM doesn't know",
            )


def unused_findings(facts: Facts, manifest: CheckpointManifest | None) -> Iterator[ProbeFinding]:
    """Yield tensors that vLLM read and put nowhere."""
    promised = set() if manifest is None else {module.tensor for module in manifest.modules}
    for tensor in facts.unused:
        if RECOMPUTED.search(tensor):
            continue
        tied = bool(facts.config.get("tied")) and tensor.endswith("lm_head.weight")
        make = _warning if tied and tensor not in promised and facts.tensors[tensor].dtype in SIXTEEN_BIT else _error
        yield make(
            "unexpected_tensor",
            tensor,
            "vLLM reads it and puts it nowhere" + (": the embeddings are used for the language head" if tied else ""),
            f"{_EXPORT} without it, or under the name that vLLM knows",
        )


def truncated_findings(facts: Facts) -> Iterator[ProbeFinding]:
    """Yield tensors of which vLLM took a part only: its loader of row-parallel layers cuts off what is too wide."""
    taken: dict[str, int] = {}
    for parameter in facts.parameters.values():
        for copy in parameter.copies:
            taken[copy.tensor] = taken.get(copy.tensor, 0) + copy.end - copy.begin
    for name, count in taken.items():
        stored = math.prod(facts.tensors[name].shape) if name in facts.tensors else count
        if count < stored:
            yield _error(
                "shape",
                name,
                f"vLLM takes {count:,} of its {stored:,} elements, and doesn't say so",
                f"{_EXPORT}; the tensor has another shape than its format asks for",
            )


def _source_of(parameter: Parameter, index: int) -> str | None:
    """Return the tensor that was copied into one element; the last one, if there were several."""
    found = [copy.tensor for copy in parameter.copies if copy.begin <= index < copy.end]
    return found[-1] if found else None


def scale_findings(facts: Facts) -> Iterator[ProbeFinding]:
    """Yield loaded scales that no multiplier can have: NaN, infinite, zero, negative."""
    for parameter in facts.parameters.values():
        odd = dict(parameter.odd)
        odd |= {i: value for i, value in enumerate(parameter.values) if not (math.isfinite(value) and value > 0)}
        found: dict[str, list[float]] = {}
        for index, value in odd.items():
            tensor = _source_of(parameter, index)
            if tensor is not None:
                found.setdefault(tensor, []).append(value)
        for tensor, values in found.items():
            one = next(copy for copy in parameter.copies if copy.tensor == tensor)
            single = one.end - one.begin == 1
            yield _error(
                "bad_scale",
                tensor,
                f"the scale is {values[0]}; vLLM loads it without a word"
                if single
                else f"a scale of an output row is {values[0]}; vLLM loads it without a word",
                f"{_EXPORT}; if the scale is the same then, measure again",
            )


def weight_findings(facts: Facts) -> Iterator[ProbeFinding]:
    """Yield loaded weights with values that aren't finite."""
    for name, parameter in facts.parameters.items():
        if parameter.nan > 0 or parameter.inf > 0:
            tensors = ", ".join(dict.fromkeys(copy.tensor for copy in parameter.copies)) or name
            yield _error(
                "bad_scale" if "scale" in name.rpartition(".")[2] else "bad_weight",
                tensors,
                f"{parameter.nan:,} NaN and {parameter.inf:,} infinite values in {name}",
                f"{_EXPORT}; if the source has them too, it is damaged: fetch it again",
            )


def unequal_findings(facts: Facts) -> Iterator[ProbeFinding]:
    """Yield fused layers whose shards have different scales: weights are quantised anew, input scales merged."""
    for name, parameter in facts.parameters.items():
        kind = name.rpartition(".")[2]
        loaded = {
            tensor: value
            for index, value in enumerate(parameter.values)
            if (tensor := _source_of(parameter, index)) is not None and math.isfinite(value) and value > 0
        }
        if kind not in (WEIGHT_SCALE, INPUT_SCALE, *_ABOVE, *GLOBAL_SCALES.values()) or len(set(loaded.values())) < 2:
            continue
        # one an output row or a block, of which a small shard may have just one: nothing is merged
        if len(parameter.shape) > 1 or any(copy.end - copy.begin > 1 for copy in parameter.copies):
            continue
        values = ", ".join(f"{tensor} {value:.6g}" for tensor, value in loaded.items())
        remedy = f"{_EXPORT} with one {kind} for the modules that are fused"
        if kind in _ABOVE:
            done = "takes the largest above all of their blocks' scales: what runs isn't what is stored"
            yield _error("unequal_scales", module_of(name), f"vLLM {done} ({values})", remedy)
        elif kind == WEIGHT_SCALE:
            done = (
                "quantises the weights again to the largest scale: what runs isn't what is stored; "
                f"{len(facts.requantised)} shards in the whole model"
            )
            yield _error("unequal_scales", module_of(name), f"vLLM {done} ({values})", remedy)
        else:
            yield _warning("unequal_scales", module_of(name), f"vLLM takes the largest for all ({values})", remedy)


def _has_input_scale(tensors: Mapping[str, Any], module: str) -> bool:
    return any(f"{module}.{name}" in tensors for name in (INPUT_SCALE, GLOBAL_SCALES[INPUT_SCALE]))


def running_format(facts: Facts, layer: Layer) -> str:
    """Return our name of the format that vLLM made a layer for, by the dtype and the scales that it gave it."""
    plain = plain_format(layer.created_dtype)
    if plain is not None:
        return plain
    scale = facts.parameters.get(f"{layer.name}.weight_scale")
    rows = _codes(facts.parameters, layer.name).shape[0]
    dynamic = not _has_input_scale(facts.parameters, layer.name) or not layer.rounds_input
    spread = None if scale is None else spread_of(scale.shape, scale.dtype, rows)
    if scale is not None and spread == "row" and not scale.elements == rows != max(len(layer.shards), 1):
        spread = "tensor"  # of each of its shards
    packing = packing_of(layer.bits, layer.group_size, layer.symmetric)
    found = fitting(str(layer.created_dtype), spread=spread, dynamic_input=dynamic, **packing)
    if found:
        return found[0]
    scales = "no weight_scale" if scale is None else f"weight_scale {list(scale.shape)}"
    return f"{layer.created_dtype} with {scales}, {'no' if dynamic else 'an'} input_scale"


def stored_formats(facts: Facts, module: str) -> list[str]:
    """Return the formats in which a module may be stored, by its dtype and scales; several where a scale is missing."""
    codes = _codes(facts.tensors, module)
    plain = plain_format(codes.dtype)
    if plain is not None:
        return [plain]
    scale = facts.tensors.get(f"{module}.weight_scale")
    spread = None if scale is None else spread_of(scale.shape, scale.dtype, codes.shape[0])
    packed = codes.dtype in PACKED
    dynamic = not _has_input_scale(facts.tensors, module) if packed else None
    zeros = f"{module}.{WEIGHT_ZERO_POINT}" in facts.tensors if packed else None
    return fitting(codes.dtype, spread=spread, dynamic_input=dynamic, zero_points=zeros) or [codes.dtype]


def _numbered_part(module: str) -> str:
    """Return a module's name from its numbered list on: `layers.3.mlp.up_proj`; all of it where there is none."""
    parts = module.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[max(index - 1, 0) :])


def promises(facts: Facts, manifest: CheckpointManifest) -> dict[str, str]:
    """Return the manifest's format of each quantised module, under the checkpoint's name of it.

    Tensors may have been renamed since (a runtime takes the names of several releases of transformers): a module that
    isn't there by its name is the one whose name ends alike, if there is only one.
    """
    modules = {module_of(name) for name in facts.tensors if name.endswith((f".{WEIGHT}", f".{WEIGHT_PACKED}"))}
    found = {}
    for module in manifest.modules:
        name = module_of(module.tensor)
        if name not in modules:
            ending = f".{_numbered_part(name)}"
            alike = [other for other in modules if other.endswith(ending)]
            name = alike[0] if len(alike) == 1 else name
        found[name] = module.format
    return found


def probed_layers(facts: Facts, manifest: CheckpointManifest | None) -> tuple[ProbedLayer, ...]:
    """Return one row per linear module of the checkpoint that vLLM loaded a weight of, in the model's order."""
    promised = {} if manifest is None else promises(facts, manifest)
    rows = {}
    for layer in facts.layers:
        weight = _codes(facts.parameters, layer.name)
        if weight is None:
            continue
        for copy in sorted(weight.copies, key=lambda copy: copy.begin):
            module = module_of(copy.tensor)
            rows[module] = ProbedLayer(
                name=module,
                runtime_name=layer.name,
                promised=None if manifest is None else promised.get(module, BF16),
                format=running_format(facts, layer),
                method=layer.method,
                kernel=layer.kernel,
                dtype=layer.dtype,
            )
    return tuple(rows.values())


def format_findings(facts: Facts, layers: Iterable[ProbedLayer]) -> Iterator[ProbeFinding]:
    """Yield modules that vLLM runs in another format than the manifest promises, or (without one) than is stored."""
    for layer in layers:
        expected, says = [] if layer.promised is None else [layer.promised], "the manifest promises"
        if layer.promised is None and _codes(facts.tensors, layer.name) is not None:
            expected, says = stored_formats(facts, layer.name), "the checkpoint stores"
        if expected and layer.format not in expected:
            yield wrong_format(layer, f"{says} {expected[0]}")


def _kv_wanted(facts: Facts, manifest: CheckpointManifest | None, layer: str) -> bool:
    """Return whether the checkpoint promises an FP8 KV cache in an attention layer."""
    number = str(layer_number(layer))
    if manifest is not None:
        return manifest.kv_cache_format is not None and number not in _skips(manifest)
    return facts.config.get("kv_cache_promised") is not None and number not in facts.config.get("kv_cache_skips", ())


def _skips(manifest: CheckpointManifest) -> list[str]:
    return [str(layer_number(one)) for one in manifest.kv_cache_skips]


def kv_findings(facts: Facts, manifest: CheckpointManifest | None) -> Iterator[ProbeFinding]:
    """Yield attention layers whose KV cache has another dtype than promised, or scales that were never loaded."""
    for layer in facts.attention:
        wanted = _kv_wanted(facts, manifest, layer.name)
        runs = layer.kv_cache_dtype.startswith(_KV_FP8)
        scales = {kind: facts.parameters.get(f"{layer.name}.{kind}") for kind in _KV_SCALES}
        loaded = {kind for kind, parameter in scales.items() if parameter is not None and parameter.copies}
        if runs != wanted:
            yield _error(
                "wrong_format",
                layer.name,
                f"the KV cache is promised in {_KV_FP8 if wanted else '16 bits'}, vLLM keeps it in "
                f"{layer.kv_cache_dtype if runs else '16 bits'}",
                "make kv_cache_scheme in config.json say what the checkpoint's scales are for",
            )
        elif loaded and not runs and not facts.config.get("kv_cache_skips"):
            yield _warning(
                "unexpected_tensor",
                layer.name,
                f"vLLM ignores {', '.join(sorted(loaded))}: nothing asks for an FP8 KV cache",
                "add kv_cache_scheme to config.json's quantization_config, or leave the scales out",
            )
        for kind in sorted(set(_KV_SCALES) - loaded) if runs else ():
            yield _error(
                "missing_tensor",
                f"{layer.name}.{kind}",
                f"the KV cache is FP8, but no {kind} is loaded; vLLM takes the other scale, or 1.0, and doesn't say so",
                f"{_EXPORT} with {kind} of every layer, or without kv_cache_scheme",
            )


def findings(
    facts: Facts, manifest: CheckpointManifest | None, layers: Sequence[ProbedLayer]
) -> tuple[ProbeFinding, ...]:
    """Return everything that is wrong, the most telling first: known exceptions, silent faults, other exceptions.

    Args:
        facts: what the child found.
        manifest: what the checkpoint promises; None: it has none.
        layers: its layers, as `probed_layers` returns them.
    """
    failures = [failure_finding(failure, facts) for failure in facts.errors]
    silent: list[ProbeFinding] = [*tokenizer_findings(facts), *cast_findings(facts)]
    if facts.loaded:
        silent += [*missing_findings(facts), *unused_findings(facts, manifest), *truncated_findings(facts)]
    silent += [*scale_findings(facts), *weight_findings(facts), *unequal_findings(facts)]
    silent += format_findings(facts, layers)
    if facts.loaded:
        silent += kv_findings(facts, manifest)
    known = [finding for finding in failures if finding.error_class != "runtime_bug"]
    unknown = [finding for finding in failures if finding.error_class == "runtime_bug"]
    return tuple(dict.fromkeys([*known, *silent, *unknown]))


def child_findings(outcome: Outcome, facts: Facts | None, timeout: float) -> tuple[ProbeFinding, ...]:
    """Return what ended the child before it was done with a checkpoint."""
    step = "vLLM, start" if facts is None else f"vLLM, after the step {facts.reached}"
    if outcome.timed_out:
        remedy = "give it more time; if it hangs, the output in the result says where"
        return (_error("timeout", step, f"not finished after {timeout:g} s", remedy),)
    error = outcome.result.get("error")
    if error:
        failure = Failure.model_validate(error)
        problem = f"vLLM can't be imported: {failure.type}: {said(failure.message, failure.line)}"
        remedy = "repair its environment (`make vllm-env` makes one for CPUs)"
        return (_error(classify(failure.type, failure.message or failure.line), "vLLM", problem, remedy),)
    ended = exit_words(outcome.returncode)
    remedy = "see its output in the result; the whole checkpoint is loaded: where memory ran out, give it more"
    return (_error(classify_exit(outcome.returncode, timed_out=False), step, f"the child ended with {ended}", remedy),)
