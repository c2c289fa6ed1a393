"""What a checkpoint's JSON says of its quantisation, in ModelOpt's two layouts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitladder.formats import KV_SKIPS
from bitladder.models.families import section_of

CONFIG_FILE, LEGACY_FILE = "config.json", "hf_quant_config.json"


@dataclass(frozen=True)
class Quantisation:
    """What a configuration file asks for."""

    file: str
    algorithm: str | None
    excludes: tuple[str, ...]
    kv_cache: str | None
    method: str  # quant_method; hf_quant_config.json is always ModelOpt's
    well_formed: bool  # whether the exclusions are a list of names, as runtimes insist
    layers: Mapping[str, str] | None = None  # of a mix: module -> algorithm; None: it lists none, or not as it should
    kv_skips: tuple[str, ...] = ()  # numbers of layers whose KV cache is to stay in 16 bits; runtimes don't read them


def _layers(listed: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the algorithm of each module that a mix lists; None: the list is none, or empty."""
    entries = {str(name): section_of(listed, name).get("quant_algo") for name in listed}
    if not entries or not all(isinstance(algorithm, str) for algorithm in entries.values()):
        return None
    return {name: str(algorithm) for name, algorithm in entries.items()}


def _quantisation(
    file: str, section: Mapping[str, Any], excludes: object, kv_cache: object, method: object
) -> Quantisation:
    algorithm = section.get("quant_algo")
    names = [] if excludes is None else excludes
    well_formed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return Quantisation(
        file=file,
        algorithm=None if algorithm is None else str(algorithm),
        excludes=tuple(names) if isinstance(names, list) and well_formed else (),
        kv_cache=None if kv_cache is None else str(kv_cache),
        method=str(method),
        well_formed=well_formed,
        layers=_layers(section_of(section, "quantized_layers")),
        kv_skips=skips_of(section),
    )


def skips_of(section: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the numbers of the layers whose KV cache `quantization_config` wants in 16 bits; not a list: none."""
    listed = section.get(KV_SKIPS)
    return tuple(map(str, listed)) if isinstance(listed, list) else ()


def inline(config: Mapping[str, Any]) -> Quantisation | None:
    """Return what config.json asks for. Source: vllm model_executor/model_loader/weight_utils.py, get_quant_config."""
    text = section_of(config, "text_config")
    section = config.get("quantization_config") or text.get("quantization_config") or config.get("compression_config")
    if not isinstance(section, dict):
        return None
    if "quantization" in section:
        return nested(section, CONFIG_FILE)
    cache = section_of(section, "kv_cache_scheme")
    eight_bit = (cache.get("type"), cache.get("num_bits")) == ("float", 8)
    return _quantisation(
        CONFIG_FILE,
        section,
        section.get("ignore"),
        "FP8" if eight_bit else None,
        section.get("quant_method", "modelopt"),
    )


def nested(content: Mapping[str, Any], file: str) -> Quantisation:
    """Return what hf_quant_config.json asks for."""
    section = section_of(content, "quantization")
    return _quantisation(
        file,
        section,
        section.get("exclude_modules"),
        section.get("kv_cache_quant_algo"),
        "modelopt",
    )
