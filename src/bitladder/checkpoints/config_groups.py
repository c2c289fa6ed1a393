"""The JSON by which compressed-tensors, and with it transformers, vLLM and SGLang, know how a checkpoint is quantised.

One group a format, each with the exact names of its modules: nothing is quantised because of its class. Made and
checked by the library's own types; only what is said here is written, so that no release of it changes the file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bitladder.formats import COMPRESSED_TENSORS, get_format

_MIXED = "mixed-precision"  # `format` where groups are stored in different ways


def quantisation_config(layers: Mapping[str, str], excludes: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint.

    Args:
        layers: `{module: format}`, by every name that a reader may know a module by.
        excludes: exact names of what stays in 16 bits.
    """
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    groups = {}
    for index, name in enumerate(dict.fromkeys(layers.values())):
        layout = get_format(name).layouts[COMPRESSED_TENSORS]
        inputs = {} if layout.inputs is None else {"input_activations": QuantizationArgs(**layout.inputs)}
        groups[f"group_{index}"] = QuantizationScheme(
            targets=[module for module, own in layers.items() if own == name],
            weights=QuantizationArgs(**layout.weights),
            format=layout.compression,
            **inputs,
        )
    ways = list(dict.fromkeys(get_format(name).layouts[COMPRESSED_TENSORS].compression for name in layers.values()))
    content: dict[str, Any] = QuantizationConfig(
        config_groups=groups,
        quant_method=COMPRESSED_TENSORS,
        format=ways[0] if len(ways) == 1 else _MIXED,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(excludes),
    ).model_dump(mode="json", exclude_unset=True)
    return content
