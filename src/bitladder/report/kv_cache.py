"""The KV cache in a report: how many tokens fit with each scheme, and what FP8 does in each layer."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bitladder.models.cache_sizes import cached_numbers, unknown_window
from bitladder.records import BF16, KvDamage, Measurement, ProbeResult, Scheme, layer_number
from bitladder.report.escaping import Markdown
from bitladder.report.numbers import NONE, ORIGINAL, exact, markdown_table, scientific
from bitladder.report.types import CachedLayer, CacheOfScheme, ReportedCache

if TYPE_CHECKING:
    from bitladder.report.types import Report

_BYTES = {None: 2, "fp8": 1}  # of a number, by the format of the cache
_GIB = 2**30
_GB = 10**9
_GPUS = (24, 80)  # GB of memory, as examples
_USED = 0.9  # of a GPU's memory, which vLLM takes unless it is told otherwise
SKIP_ARGUMENT = "--kv-cache-dtype-skip-layers"  # of `vllm serve`


def cache_of(
    config: Mapping[str, Any],
    measurement: Measurement,
    ladder: Sequence[Scheme],
    damage: KvDamage | None,
    probes: Sequence[ProbeResult],
) -> ReportedCache | None:
    """Return what the KV cache takes with each scheme; None: what a layer caches isn't known.

    Args:
        config: the original's.
        measurement: of its modules.
        ladder: the schemes.
        damage: of FP8 in each layer, where it was measured.
        probes: what runtimes said of the tokens that fit.
    """
    sizes = cached_numbers(config, measurement.groups, measurement.untouched)
    if not sizes:
        return None
    known = {} if damage is None else {one.layer: one for one in damage.layers}
    kl, medians = ({}, {}) if damage is None else (damage.of_layers(), damage.medians())
    layers = tuple(
        CachedLayer(
            layer=size.attention,
            numbers=size.numbers,
            window=size.window,
            kl=kl.get(size.attention),
            median=medians.get(size.attention),
            standard_error=damage.standard_error(known[size.attention]) if damage and size.attention in known else None,
        )
        for size in sizes
    )
    served = {probe.scheme: probe for probe in probes if probe.memory is not None and probe.memory.kv_cache_tokens}
    return ReportedCache(
        layers=layers,
        unknown_window=unknown_window(config),
        damage_tokens=None if damage is None else sum(damage.tokens),
        original=_taken(layers, None, ()),
        schemes=tuple(
            _taken(layers, scheme.kv_cache_format, scheme.kv_cache_skips).model_copy(
                update={"scheme": scheme.name, **_served(served.get(scheme.name))}
            )
            for scheme in ladder
        ),
    )


def _taken(layers: Sequence[CachedLayer], format_name: str | None, skips: Sequence[str]) -> CacheOfScheme:
    """Return the bytes of a cache in a format but for some layers."""
    own = [(one, one.numbers * _BYTES[None if one.layer in skips else format_name]) for one in layers]
    return CacheOfScheme(
        scheme="",
        fp8_layers=0 if format_name is None else len(layers) - len(skips),
        bytes_a_token=sum(size for one, size in own if one.window is None),
        window_bytes=sum(size * one.window for one, size in own if one.window is not None),
    )


def _served(probe: ProbeResult | None) -> dict[str, Any]:
    if probe is None or probe.memory is None:
        return {}
    return {
        "served_tokens": probe.memory.kv_cache_tokens,
        "served_bytes": probe.memory.kv_cache_bytes,
        "served_on": probe.device,
    }


def skip_argument(skips: Sequence[str]) -> str:
    """Return what `vllm serve` has to be told of layers whose cache stays in 16 bits; none: nothing."""
    return f" {SKIP_ARGUMENT} {' '.join(str(layer_number(one)) for one in skips)}" if skips else ""


def cache_tables(report: "Report") -> dict[str, Markdown]:
    """Return the table of what fits, and that of the layers where their damage is known; {}: nothing is."""
    cache = report.kv_cache
    if cache is None:
        return {}
    windows = any(one.window is not None for one in cache.layers)
    weights = {scheme.name: scheme.weight_file_bytes for scheme in report.schemes}
    header = ["scheme", "layers in FP8", "bytes a token"]
    header += ["bytes of the windows, a sequence"] if windows else []
    header += ["tokens per GiB", "× 16 bits", *(f"in {size} GB, about" for size in _GPUS)]
    rows = []
    for one in (cache.original, *cache.schemes):
        name, taken = one.scheme or ORIGINAL, one.bytes_a_token
        files = weights.get(one.scheme) if one.scheme else report.source_weight_file_bytes
        row = [name, f"{one.fp8_layers} of {len(cache.layers)}", exact(taken)]
        row += [exact(one.window_bytes)] if windows else []
        row += [exact(_GIB // taken), f"{cache.original.bytes_a_token / taken:.2f}"] if taken else [NONE, NONE]
        row += [_beside(files, taken, size) for size in _GPUS]
        rows.append(row)
    tables = {"sizes": markdown_table(header, rows), "layers": Markdown("")}
    if cache.damage_tokens is not None:
        schemes = [scheme for scheme in report.schemes if scheme.kv_cache_format]
        layers = [
            [one.layer, scientific(one.median), scientific(one.kl), scientific(one.standard_error)]
            + [BF16.upper() if one.layer in s.kv_cache_skips else str(s.kv_cache_format).upper() for s in schemes]
            for one in cache.layers
        ]
        tables["layers"] = markdown_table(
            ["layer", "KL, median sample", "mean, nats per token", "SE", *(s.name for s in schemes)], layers
        )
    return tables


def _beside(weights: int | None, bytes_a_token: int, gigabytes: int) -> str:
    """Return how many tokens fit beside the weights into a GPU."""
    if weights is None or not bytes_a_token:
        return NONE
    room = _USED * gigabytes * _GB - weights
    return exact(int(room // bytes_a_token)) if room > 0 else "none"


def cache_lines(report: "Report") -> list[str]:
    """Return what is said of the cache: which layers stay in 16 bits, what runtimes hold, what isn't known."""
    cache, lines = report.kv_cache, []
    for scheme in report.schemes:
        if scheme.kv_cache_skips:
            numbers = ", ".join(str(layer_number(one)) for one in scheme.kv_cache_skips)
            lines.append(
                f"`{scheme.name}` keeps the cache of layers {numbers} in 16 bits, where FP8 does most damage; vLLM has "
                f"to be told: `vllm serve …{skip_argument(scheme.kv_cache_skips)}`, else it stores theirs in FP8 too."
            )
        if scheme.kv_cache_kl is not None:
            lines.append(
                f"`{scheme.name}`: its FP8 cache alone is predicted a KL of {scientific(scheme.kv_cache_kl)} nats per "
                "token, the sum over its layers; the predicted score is that of the weights."
            )
    for one in cache.schemes if cache else ():
        if one.served_tokens is not None:
            lines.append(
                f"`{one.scheme}`: vLLM on {one.served_on} held {exact(one.served_tokens)} tokens in "
                f"{exact(one.served_bytes)} bytes."
            )
    if cache is not None and cache.unknown_window is not None:
        lines.append(
            f"Some layers may keep the last {exact(cache.unknown_window)} tokens only: the configuration doesn't say "
            "which, so all are counted with every token."
        )
    return lines
