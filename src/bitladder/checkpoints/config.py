"""The JSON that tells a runtime how a checkpoint is quantised."""

from typing import Any

from bitladder.errors import MeasurementError
from bitladder.formats import get_format
from bitladder.records import BF16, Scheme

CONFIG_FILE = "config.json"
QUANT_CONFIG_FILE = "hf_quant_config.json"
# The ModelOpt release whose file layout is written; runtimes look at the producer's name and version.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
_KV_ALGORITHM = "FP8"  # the one format of a KV cache, as `kv_cache_quant_algo` names it


def quant_config(scheme: Scheme) -> dict[str, Any]:
    """Return `hf_quant_config.json` for a scheme, in ModelOpt's form: `exclude_modules` are exact names."""
    return {
        "producer": dict(_PRODUCER),
        "quantization": {
            "quant_algo": _algorithm(scheme),
            "kv_cache_quant_algo": None if scheme.kv_cache_format is None else _KV_ALGORITHM,
            "exclude_modules": list(scheme.exclude_modules),
        },
    }


def _algorithm(scheme: Scheme) -> str:
    """Return ModelOpt's name for a scheme's one format beside bf16."""
    names = sorted({name for name in scheme.formats.values() if name != BF16})
    if len(names) != 1:
        raise MeasurementError(
            f"scheme {scheme.name} has {len(names)} formats beside {BF16} ({', '.join(names) or 'none'}); "
            "a checkpoint of one such format can be written"
        )
    return get_format(names[0]).modelopt_algorithm


def config_with_quantisation(config: dict[str, Any], scheme: Scheme) -> dict[str, Any]:
    """Return the source's config.json with the `quantization_config` that vLLM and transformers read."""
    eight_bit = {"dynamic": False, "num_bits": 8, "type": "float"}
    quantisation: dict[str, Any] = {
        "config_groups": {
            "group_0": {
                "input_activations": dict(eight_bit),
                "weights": dict(eight_bit),
                "targets": ["Linear"],
            }
        },
        "ignore": list(scheme.exclude_modules),
        "quant_algo": _algorithm(scheme),
        "producer": dict(_PRODUCER),
        "quant_method": "modelopt",
    }
    if scheme.kv_cache_format is not None:
        quantisation["kv_cache_scheme"] = dict(eight_bit)
    return {**config, "quantization_config": quantisation}
