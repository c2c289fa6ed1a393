"""The JSON that tells a runtime how a checkpoint in ModelOpt's layout is quantised."""

from collections.abc import Mapping
from typing import Any

from bitladder.formats import KV_SKIPS, get_format
from bitladder.records import Scheme, layer_number

CONFIG_FILE = "config.json"
QUANT_CONFIG_FILE = "hf_quant_config.json"
# The ModelOpt release whose file layout is written; runtimes look at the producer's name and version.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
MIXED = "MIXED_PRECISION"  # `quant_algo` where modules have several formats
_KV_ALGORITHM = "FP8"  # the one format of a KV cache, as `kv_cache_quant_algo` names it


def quant_config(scheme: Scheme, layers: Mapping[str, str]) -> dict[str, Any]:
    """Return `hf_quant_config.json` for a scheme, in ModelOpt's form: `exclude_modules` are exact names.

    Args:
        scheme: what is quantised.
        layers: its quantised modules by their checkpoint name, `{module: format}`, in the model's order.
    """
    quantisation: dict[str, Any] = {
        "quant_algo": _algorithm(layers),
        "kv_cache_quant_algo": None if scheme.kv_cache_format is None else _KV_ALGORITHM,
        "exclude_modules": list(scheme.exclude_modules),
    }
    if _is_mixed(layers):
        quantisation["quantized_layers"] = _quantized_layers(layers)
    else:
        quantisation |= get_format(next(iter(layers.values()))).layer_config()
    return {"producer": dict(_PRODUCER), "quantization": quantisation}


def _is_mixed(layers: Mapping[str, str]) -> bool:
    return len(set(layers.values())) > 1


def _algorithm(layers: Mapping[str, str]) -> str:
    """Return ModelOpt's name for the one format beside bf16, or for a mix of several."""
    return MIXED if _is_mixed(layers) else get_format(next(iter(layers.values()))).modelopt_algorithm


def _quantized_layers(layers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    return {module: get_format(name).layer_config() for module, name in layers.items()}


def _config_groups(layers: Mapping[str, str]) -> dict[str, Any] | None:
    """Return `config_groups`, as ModelOpt converts its own file; None: it writes none for a uniform format.

    Source: modelopt.torch.export.convert_hf_config.
    """
    names = list(dict.fromkeys(layers.values()))
    if not _is_mixed(layers):
        group = get_format(names[0]).uniform_config_group()
        return None if group is None else {"group_0": {**group, "targets": ["Linear"]}}
    return {
        f"group_{index}": {
            **get_format(name).config_group(),
            "targets": sorted(module for module, own in layers.items() if own == name),
        }
        for index, name in enumerate(names)
    }


def config_with_quantisation(config: dict[str, Any], scheme: Scheme, layers: Mapping[str, str]) -> dict[str, Any]:
    """Return the source's config.json with the `quantization_config` that vLLM and transformers read."""
    groups = _config_groups(layers)
    quantisation: dict[str, Any] = {} if groups is None else {"config_groups": groups}
    quantisation |= {
        "ignore": list(scheme.exclude_modules),
        "quant_algo": _algorithm(layers),
        "producer": dict(_PRODUCER),
        "quant_method": "modelopt",
    }
    if _is_mixed(layers):
        quantisation["quantized_layers"] = _quantized_layers(layers)
    if scheme.kv_cache_format is not None:
        quantisation["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    if scheme.kv_cache_skips:  # which no runtime reads: it has to be told when it is started
        quantisation[KV_SKIPS] = [str(layer_number(module)) for module in scheme.kv_cache_skips]
    return {**config, "quantization_config": quantisation}
