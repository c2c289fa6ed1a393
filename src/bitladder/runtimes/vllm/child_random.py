"""For the child scripts: models with random weights in any format, without a file of weights. Loaded by its path.

Speed hangs on shapes and formats, hardly on values. Still they are random: a GPU that multiplies zeros takes less
power, and runs faster, than in service. Standard library, torch and vllm only.
"""

import zlib
from typing import Any

import torch

LOAD_FORMAT = "bitladder_random"  # as vLLM is asked for it (`load_format`)
_WIDTH = 0.02  # standard deviation of 16-bit weights, as models are initialised
_CODES = 64.0  # the same of FP8 codes: few of them are cut at 448
_SCALE = 2.0**-12  # so that codes times scales are as large as weights
_INPUT_SCALE = 2.0**-6  # so that inputs of about 1 use the codes' range and aren't cut
_E8M0_SCALE = 127 - 12  # the same as an exponent; OCP MX 1.0: 2 ** (code - 127)
_CACHE_SCALES = ("q_scale", "k_scale", "v_scale", "prob_scale")  # of a KV cache: vLLM's own initial values say "none"
_PACKED = (torch.uint8, torch.int8, torch.int32)


def fill(name: str, tensor: torch.Tensor) -> None:
    """Give a parameter random values: codes at random, scales all alike, so that nothing overflows.

    Args:
        name: of the parameter; it says what it is for.
        tensor: the parameter, which is changed.
    """
    leaf = name.rpartition(".")[2]
    data = tensor.data
    if leaf in _CACHE_SCALES or leaf.endswith("shape") or not data.numel():
        return
    random = torch.Generator(device=data.device)
    random.manual_seed(zlib.crc32(name.encode()))
    if "scale" in leaf:
        if data.is_floating_point():
            scale = _INPUT_SCALE if leaf.startswith("input") else 1.0 if data.element_size() == 1 else _SCALE
            data.copy_(torch.full_like(data, scale, dtype=torch.float32))
        elif data.dtype == torch.uint8:
            data.fill_(_E8M0_SCALE)
    elif data.is_floating_point() and data.element_size() == 1:
        codes = torch.randn(data.shape, generator=random, device=data.device) * _CODES
        data.copy_(codes.clamp_(-448, 448).to(data.dtype))
    elif data.is_floating_point():
        if data.ndim < 2 and leaf == "weight":  # of a norm
            data.fill_(1.0)
        else:
            data.normal_(0.0, _WIDTH, generator=random)
    elif leaf.startswith("weight") and data.dtype in _PACKED:
        info = torch.iinfo(data.dtype)
        data.copy_(torch.randint(info.min, info.max, data.shape, generator=random, device=data.device).to(data.dtype))


def register() -> str:
    """Tell vLLM of a loader that reads nothing, and return the `load_format` that asks for it."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class RandomLoader(BaseModelLoader):  # type: ignore[misc]
        """Fills every parameter as `fill` does."""

        def download_model(self, model_config: Any) -> None:
            """Do nothing: there is no file to fetch."""

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            """Fill the parameters, each from a seed of its own name."""
            for name, parameter in model.named_parameters():
                fill(name, parameter)

    register_model_loader(LOAD_FORMAT)(RandomLoader)
    return LOAD_FORMAT
