"""In vLLM's environment: has its own layers, as ranks hold them, load a weight's codes and scales, and says what came.

    python vllm_ranks.py CHILD_PROFILE < CASES      # prints a JSON list, one answer a case

A case names the layer's kind (`row`, `column`, `merged`, `qkv`), the `quantization_config`, the shapes of its modules
[out_features, in_features], the number of ranks, heads, and for every stored part its name, dtype and shape.
For each rank the layer is made as that rank makes it, then every part of every module is loaded through the parameter's
own loader. Scales hold the number of their place; what a rank got is spread over its weight's elements and compared
with that part of the whole. Answers: `whole`, `other scales`, or the error's text.
"""

import contextlib
import json
import math
import sys
import types
from typing import Any
from unittest import mock

import torch

DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
}


def numbered(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor whose neighbours differ; few numbers, so that any dtype holds them."""
    return (torch.arange(math.prod(shape)) % 13 + 1).to(torch.float32).to(dtype).reshape(shape)


def spread(scale: torch.Tensor, shape: tuple[int, int], group: tuple[int, int]) -> torch.Tensor:
    """Return the scale of each element of a weight, cut where it has more."""
    flat = scale.to(torch.float32).reshape(scale.shape[0], -1)
    return flat.repeat_interleave(group[0], 0).repeat_interleave(group[1], 1)[: shape[0], : shape[1]]


def on_a_gpu(stack: contextlib.ExitStack) -> None:
    """Have integers' weights choose the kernel that all NVIDIA GPUs have, whose shapes are asked for on any machine."""
    from vllm.model_executor.kernels.linear.mixed_precision import marlin
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    platform = mock.Mock(**{f"is_{name}.return_value": False for name in ("cpu", "xpu", "rocm")})
    platform.get_device_capability.return_value.to_int.return_value = 90
    stack.enter_context(mock.patch.object(marlin, "current_platform", platform))
    stack.enter_context(mock.patch.object(marlin_utils, "current_platform", platform))

    def choose(config: Any) -> Any:
        able, why = marlin.MarlinLinearKernel.can_implement(config)
        if not able:
            raise ValueError(why)
        return marlin.MarlinLinearKernel

    schemes = "vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16"
    stack.enter_context(mock.patch(f"{schemes}.choose_mp_linear_kernel", choose))


def as_rank(stack: contextlib.ExitStack, rank: int, ranks: int) -> None:
    """Have layers and parameters be those of a rank."""
    for place in ("vllm.model_executor.layers.linear", "vllm.model_executor.parameter", "vllm.distributed"):
        stack.enter_context(mock.patch(f"{place}.get_tensor_model_parallel_rank", return_value=rank))
        stack.enter_context(mock.patch(f"{place}.get_tensor_model_parallel_world_size", return_value=ranks))


def layer_of(case: dict[str, Any], config: Any) -> tuple[Any, list[Any]]:
    """Return the layer, and what the loaders call its modules."""
    from vllm.model_executor.layers import linear

    shapes, kind = case["shapes"], case["kind"]
    same = {"bias": False, "quant_config": config, "prefix": "model.layers.0.one"}
    if kind == "row":
        return linear.RowParallelLinear(shapes[0][1], shapes[0][0], **same), [None]
    if kind == "column":
        return linear.ColumnParallelLinear(shapes[0][1], shapes[0][0], **same), [None]
    if kind == "merged":
        return linear.MergedColumnParallelLinear(shapes[0][1], [rows for rows, _ in shapes], **same), [0, 1]
    size = shapes[0][0] // case["heads"]
    made = linear.QKVParallelLinear(shapes[0][1], size, case["heads"], case["key_heads"], **same)
    return made, ["q", "k", "v"]


def part_of(case: dict[str, Any], index: int, rank: int) -> tuple[slice, slice]:
    """Return the rows and columns of a module that a rank holds: as `linear.py` slices 16-bit weights."""
    rows, columns = case["shapes"][index]
    ranks = case["ranks"]
    if case["kind"] == "row":
        return slice(None), slice(rank * columns // ranks, (rank + 1) * columns // ranks)
    if case["kind"] == "qkv" and index and case["key_heads"] < ranks:
        size, own = rows // case["key_heads"], rank // (ranks // case["key_heads"])
        return slice(own * size, (own + 1) * size), slice(None)
    return slice(rank * rows // ranks, (rank + 1) * rows // ranks), slice(None)


def one_rank(case: dict[str, Any], config: Any, rank: int) -> str:
    """Return what this rank has."""
    with contextlib.ExitStack() as stack:
        as_rank(stack, rank, case["ranks"])
        layer, shards = layer_of(case, config)
        for index, shard in enumerate(shards):
            for name, dtype, shape in case["parts"][index]:
                parameter = getattr(layer, name)
                given = numbered(shape, DTYPES[dtype])
                parameter.weight_loader(parameter, given, *([] if shard is None else [shard]))
    scale, rows = getattr(layer, case["scale"]), 0
    for index in range(len(shards)):
        own = part_of(case, index, rank)
        name, dtype, shape = next(one for one in case["parts"][index] if one[0] == case["scale"])
        wanted = spread(numbered(shape, DTYPES[dtype]), tuple(case["shapes"][index]), tuple(case["group"]))[own]
        got = spread(scale, (1 << 30, wanted.shape[1]), tuple(case["group"]))[rows : rows + wanted.shape[0]]
        if got.shape != wanted.shape or not torch.equal(got, wanted):
            return "other scales"
        rows += wanted.shape[0]
    return "whole"


def answer(case: dict[str, Any], quantisation_of: Any) -> str:
    """Return what the ranks have: the first that isn't whole."""
    for rank in range(case["ranks"]):
        try:
            found = one_rank(case, quantisation_of(case["config"]), rank)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if found != "whole":
            return found
    return "whole"


def main() -> None:
    """Answer all cases."""
    import importlib.util

    from vllm.config import VllmConfig, set_current_vllm_config

    cases = json.load(sys.stdin)
    spec: Any = importlib.util.spec_from_file_location("child_profile", sys.argv[1])
    child = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(child)
    bench = object.__new__(child.Bench)
    bench.config, bench.dtype, bench.device = VllmConfig(), torch.bfloat16, torch.device("cpu")
    bench.kernels = child.serving._sibling("child_kernels")
    bench.config.model_config = types.SimpleNamespace(dtype=torch.bfloat16, hf_text_config=None, hf_config=None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(set_current_vllm_config(bench.config))
        stack.enter_context(bench.making())
        on_a_gpu(stack)
        print(json.dumps([answer(case, child.quantisation_of) for case in cases]))


if __name__ == "__main__":
    main()
