"""Child script: times vLLM's own linear layers, and its engine in 16 bits. `python child_profile.py JOB RESULT`.

In steps, each written to RESULT as soon as it is finished:

1. `imported`: vLLM's version, the device, its driver, the versions that matter;
2. `built`: the engine of the 16-bit model, with random weights, as its files aren't read; its settings as they came
   out, and the shape of each of its linear layers, of one rank's part where several ranks share them;
3. `timed`: seconds of batches of requests, with one token of output and with many, as `child_serve.py` takes them;
4. one step a format: for every shape and number of tokens, the seconds of a layer that vLLM makes for that format
   (weights in the kernel's form), with the rounding of its input and, where that is an operation, of it alone.

A layer's seconds are those on the device. In service other layers' weights pass through the GPU's cache between two
calls of one layer, so a chain of layers of one shape is timed whose weights are some times larger than that cache, as
one CUDA graph, from which gaps of the host are absent. On a CPU the chain is timed by the clock. A layer that ranks
share is timed as the part that one of them holds, without what they tell one another, which the engine's seconds have.

Nothing is judged here; `profiling.py` does that, and says what JOB holds. Runs under vLLM's environment: the standard
library, torch and vllm only. Written for vLLM 0.25.1 and 0.32.0.
"""

import contextlib
import copy
import gc
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

# A script's directory comes first on the path; names of the modules beside this one must not hide installed ones.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

Facts = dict[str, Any]

_CACHES = 4  # the weights of a chain are so many times the GPU's cache
_MOST_LAYERS = 96  # of a chain
_CHAIN_SECONDS = 0.01  # a chain of slow calls is cut to about this
_REPEATS = 15  # of a chain; the 4th and the 12th of them bound the median with 96.5% (order statistics, n = 15)
_BOUNDS = (3, 11)
_WARM = 2


_spec: Any = importlib.util.spec_from_file_location("child_serve", Path(__file__).with_name("child_serve.py"))
serving = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(serving)

if __name__ == "__mp_main__":  # a rank that was spawned imports this script again: it needs the loader as well
    serving._sibling("child_random").register()


def device_facts(gpu: bool) -> Facts:
    """Return what the GPU is: compute capability, bytes of memory and of cache, driver; {} on a CPU."""
    import torch

    if not gpu:
        return {}
    found = torch.cuda.get_device_properties(0)
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = None
    return {
        "capability": [found.major, found.minor],
        "memory_bytes": found.total_memory,
        "cache_bytes": found.L2_cache_size,
        "driver": driver,
    }


def engine_facts(llm: Any) -> Facts:
    """Return how the engine runs: what is compiled, which batches have CUDA graphs, tokens of a step at most."""
    config = llm.llm_engine.vllm_config
    compilation, schedule = config.compilation_config, config.scheduler_config
    graphs = compilation.cudagraph_mode
    return {
        "compiled": int(compilation.mode or 0) > 0,
        "graphs": "NONE" if graphs is None else graphs.name,
        "graph_sizes": sorted(compilation.cudagraph_capture_sizes or ()),
        "tokens_a_step": schedule.max_num_batched_tokens,
        "requests_at_once": schedule.max_num_seqs,
    }


def linear_layers(model: Any) -> list[Facts]:
    """Return every linear layer: its name and shape as vLLM has it, fused; of a split one this rank's part."""
    from vllm.model_executor.layers.linear import LinearBase

    return [
        {
            "name": name,
            "out_features": getattr(module, "output_size_per_partition", module.output_size),
            "in_features": getattr(module, "input_size_per_partition", module.input_size),
        }
        for name, module in model.named_modules()
        if isinstance(module, LinearBase)
    ]


class Bench:
    """Times linear layers."""

    def __init__(self, config: Any, gpu: bool, cache_bytes: int) -> None:
        """Make a bench.

        Args:
            config: the engine's, which vLLM's layers look at while they are made.
            gpu: whether they run on one.
            cache_bytes: of the GPU.
        """
        import torch

        self.config, self.gpu, self.cache_bytes = copy.copy(config), gpu, cache_bytes
        # alone and not compiled, inputs are rounded by vLLM's own kernels, not by many small ones of torch
        self.config.compilation_config = copy.copy(config.compilation_config)
        self.config.compilation_config.mode = type(config.compilation_config.mode)(0)
        self.config.compilation_config.custom_ops = ["all"]
        self.device = torch.device("cuda" if gpu else "cpu")
        self.dtype = config.model_config.dtype
        self.random, self.kernels = serving._sibling("child_random"), serving._sibling("child_kernels")

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        """Let vLLM's layers be made as its engine makes them."""
        from vllm.config import set_current_vllm_config
        from vllm.utils.torch_utils import set_default_torch_dtype

        with (
            set_current_vllm_config(self.config),
            set_default_torch_dtype(self.dtype),
            self.device,
            self.kernels.emulating(),
            self.kernels.lending_blocks(),
            self.kernels.quantising(),
        ):
            yield

    def layer(self, shape: tuple[int, int], quantisation: Any, index: int) -> Any:
        """Return a layer as it is after its weights were loaded; `shape`: [out_features, in_features]."""
        from vllm.model_executor.layers.linear import ReplicatedLinear

        made = ReplicatedLinear(
            shape[1],
            shape[0],
            bias=False,
            quant_config=quantisation,
            prefix=f"model.layers.{index}.profiled",
            return_bias=False,
        )
        for name, parameter in made.named_parameters():
            self.random.fill(f"{index}.{name}", parameter)
        made.quant_method.process_weights_after_loading(made)
        return made

    def chain(self, shape: tuple[int, int], quantisation: Any) -> list[Any]:
        """Return layers of one shape with more weights than the GPU's cache holds."""
        first = self.layer(shape, quantisation, 0)
        size = sum(one.nbytes for one in first.parameters())
        wanted = min(_MOST_LAYERS, 1 + _CACHES * self.cache_bytes // size) if self.gpu else 1
        return [first, *(self.layer(shape, quantisation, index) for index in range(1, wanted))]

    def wait(self) -> None:
        """Wait until the GPU has done all."""
        import torch

        if self.gpu:
            torch.cuda.synchronize()

    def seconds(self, layers: list[Any], x: Any) -> list[float]:
        """Return the seconds of a layer in each of `_REPEATS` runs of a chain, in ascending order."""
        for _ in range(_WARM):
            self._run(layers[:1], x)
        self.wait()
        start = time.perf_counter()
        self._run(layers[:1], x)
        self.wait()
        one = time.perf_counter() - start
        used = layers[: max(2, min(len(layers), int(_CHAIN_SECONDS / one)))]
        timed = self._on_gpu(used, x) if self.gpu else self._on_cpu(used, x)
        return sorted(timed)

    @staticmethod
    def _run(layers: list[Any], x: Any) -> None:
        for layer in layers:
            layer(x)

    def _on_cpu(self, layers: list[Any], x: Any) -> list[float]:
        found = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            self._run(layers, x)
            found.append((time.perf_counter() - start) / len(layers))
        return found

    def _on_gpu(self, layers: list[Any], x: Any) -> list[float]:
        import torch

        timing: Any = torch.cuda.Event
        graph = torch.cuda.CUDAGraph()
        self._run(layers, x)
        self.wait()
        with torch.cuda.graph(graph):
            self._run(layers, x)
        marks = [[timing(enable_timing=True) for _ in range(2)] for _ in range(_REPEATS)]
        for _ in range(_WARM):
            graph.replay()
        for begin, end in marks:
            begin.record()
            graph.replay()
            end.record()
        self.wait()
        return [begin.elapsed_time(end) / 1000 / len(layers) for begin, end in marks]


def quantisation_of(config: Facts | None) -> Any:
    """Return vLLM's reading of a `quantization_config`, by the class that it takes for it; None: 16 bits."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    if config is None:
        return None
    method = config["quant_method"]
    kinds = [get_quantization_config(name) for name in QUANTIZATION_METHODS if name.startswith(method)]
    taken = (one.override_quantization_method(config, None) for one in kinds)
    return get_quantization_config(next(filter(None, taken), method)).from_config(config)


def profile_format(bench: Bench, format_: Facts, shapes: list[list[int]], tokens: list[int]) -> list[Facts]:
    """Return the seconds of every shape that the format is asked for."""
    import torch

    quantisation = quantisation_of(format_["config"])
    found = []
    for shape in shapes:
        with bench.making():
            layers = bench.chain((shape[0], shape[1]), quantisation)
        cells = []
        with torch.inference_mode():
            rows = {c: torch.randn(c, shape[1], dtype=bench.dtype, device=bench.device) for c in tokens}
            for count, x in rows.items():
                taken = bench.seconds(layers, x)
                low, high = (taken[place] for place in _BOUNDS)
                cells.append({"tokens": count, "seconds": median(taken), "low": low, "high": high})
        method = serving._running(layers[0])
        found.append(
            {
                "out_features": shape[0],
                "in_features": shape[1],
                "method": type(method).__name__,
                "kernel": serving._kernel_of(method),
                "chain": len(layers),
                "cells": cells,
            }
        )
        del layers, rows
        gc.collect()
    return found


def check_ranks(ranks: int, gpu: bool) -> None:
    """See that a device is there for each rank.

    Raises:
        RuntimeError: there are fewer.
    """
    import torch

    if gpu and torch.cuda.device_count() < ranks:
        raise RuntimeError(
            f"the engine of tensor_parallel {ranks} runs on {ranks} GPUs, and {torch.cuda.device_count()} are here; "
            "profile on the machine that will serve"
        )
    if not gpu:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # of the ranks' processes: see `runtime_facts`


def alone(config: Any) -> Any:
    """Let layers be made in this process, where the ranks are others; return the engine's settings for one rank."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.utils.network_utils import get_distributed_init_method, get_open_port

    own = copy.copy(config)
    own.parallel_config = copy.copy(config.parallel_config)
    own.parallel_config.tensor_parallel_size = own.parallel_config.world_size = 1
    with set_current_vllm_config(own):
        place = get_distributed_init_method("127.0.0.1", get_open_port())
        parallel_state.init_distributed_environment(1, 0, place, 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
    return own


def profile(job: Facts, report: Any) -> None:
    """Do the job, step by step."""
    ranks = job["tensor_parallel"]
    with report.step("imported") as facts:
        facts["runtime"] = serving.runtime_facts()
        gpu = facts["runtime"]["gpu"]
        facts["gpu"] = device_facts(gpu)
    check_ranks(ranks, gpu)
    with report.step("built") as facts:
        load_format = serving._sibling("child_random").register()
        # a CPU's engine runs eagerly, whatever is asked of a GPU's
        engine = {**(job["engine"] if gpu else {}), "load_format": load_format, "tensor_parallel_size": ranks}
        llm = serving.build({**job, "engine": engine}, gpu)
        facts["engine"] = engine_facts(llm)
        facts["layers"] = llm.apply_model(linear_layers)[0]
    with report.step("timed") as facts:
        facts["loads"] = []
        for load in job["loads"]:
            shown = {key: load[key] for key in ("requests", "prompt_tokens", "output_tokens")}
            facts["loads"].append({**shown, **serving.timings(llm, load)})
    config = llm.llm_engine.vllm_config
    bench = Bench(config if ranks == 1 else alone(config), gpu, report.content["gpu"].get("cache_bytes", 0))
    report.content.update(linears={}, refused={})
    for name, one in job["formats"].items():
        with report.step(name) as facts:
            try:
                facts["linears"][name] = profile_format(bench, one, one["shapes"], job["tokens"])
            except Exception as error:  # a format that this device or release doesn't run is a result
                facts["refused"][name] = serving.error_facts(error)
        gc.collect()


if __name__ == "__main__":
    sys.exit(serving.done(profile))
