"""Child script: what vLLM's own loader makes of checkpoints, without an engine. `python child_load.py JOB RESULT`.

It goes the engine's way as far as the weights lie in their final form: configuration -> tokenizer and processor ->
model class -> weight loader -> process_weights_after_loading. Nothing is judged here; `load.py` does that. What is
written down is what vLLM itself doesn't say:

- which checkpoint tensor was copied into which elements of which parameter, seen below torch's dispatcher. Elements
  that no copy reached and that still hold the poison (NaN) or vLLM's initial value were never loaded;
- copies and casts across the FP8 boundary, which torch does without a scale;
- the scales of each shard, before vLLM merges those of a fused layer.

Job: `{"directories": [path, ...]}`. Result: `{"runtime": {...}, "checkpoints": [facts, ...]}`, written after every
step. Runs under vLLM's environment: the standard library, torch and vllm only.

Source of the order of steps: vllm v1/engine/llm_engine.py (LLMEngine.__init__) and
model_executor/model_loader/base_loader.py (BaseModelLoader.load_model), vLLM 0.25.1 and 0.32.0.
"""

import gc
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

KV_SKIPS = "kv_cache_dtype_skip_layers"  # vLLM's argument, and the key of a checkpoint's quantization_config
TEXT = "List the digits."  # that any tokenizer makes tokens of
# Where a quant method keeps the kernel it chose: vLLM 0.32 `kernel`, earlier releases `fp8_linear[.kernel]`, and of
# square blocks a name of its own.
KERNEL_ATTRIBUTES = ("kernel", "fp8_linear", "fp8_linear_op", "w8a8_block_fp8_linear")

Facts = dict[str, Any]


def sibling(name: str) -> Any:
    """Return the module in a file beside this one, whose directory isn't on the path."""
    spec: Any = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


watching = sibling("child_watch")
kernels = sibling("child_kernels")


class Report:
    """The result file, rewritten whole after each step; what was finished is put into JSON only once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runtime: Facts = {}
        self.error: Facts | None = None
        self._current: Facts | None = None
        self._finished: list[str] = []

    def begin(self) -> Facts:
        """Return the place for the next checkpoint's facts."""
        self._current = {}
        return self._current

    def finish(self) -> None:
        """Close the current checkpoint."""
        self._finished.append(json.dumps(self._current))
        self._current = None
        self.write()

    def write(self) -> None:
        """Replace the file in one step, so that a killed child leaves a whole one."""
        entries = [*self._finished, *([] if self._current is None else [json.dumps(self._current)])]
        head = json.dumps({"runtime": self.runtime, "error": self.error})
        temporary = self.path.with_suffix(".new")
        temporary.write_text(f'{head[:-1]}, "checkpoints": [{", ".join(entries)}]}}', encoding="utf-8")
        os.replace(temporary, self.path)


def error_facts(step: str, error: BaseException) -> Facts:
    """Return an exception as JSON: its type, text, whole traceback, and the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "step": step,
        "type": type(error).__name__,
        "message": str(error),
        "line": (frames[-1].line or "") if frames else "",
        "traceback": "".join(traceback.format_exception(error)),
    }


def class_name(value: Any) -> str:
    """Return the name of a value's class."""
    return type(value).__name__


def kernel_of(method: Any) -> str | None:
    """Return the class of the kernel that a quant method chose, or None where it has none of its own."""
    found = None
    for _ in KERNEL_ATTRIBUTES:  # e.g. method.fp8_linear.kernel: as deep as there are names
        inner = next((getattr(method, a) for a in KERNEL_ATTRIBUTES if getattr(method, a, None) is not None), None)
        if inner is None:
            break
        found, method = class_name(inner), inner
    return found


def running(module: Any) -> Any:
    """Return what runs a layer: its quant method, or compressed-tensors' scheme for it."""
    scheme = getattr(module, "scheme", None)
    return module.quant_method if scheme is None else scheme


def codes_of(module: Any) -> torch.Tensor | None:
    """Return a layer's weight, or its packed codes."""
    found: torch.Tensor | None = getattr(module, "weight", getattr(module, "weight_packed", None))
    return found


def rounds_input(method: Any) -> bool:
    """Return whether a quant method does anything to inputs: vLLM 0.32 says it in `spec`, 0.25.1 has another class."""
    if hasattr(method, "use_a16"):  # compressed-tensors' FP4 scheme
        return not method.use_a16
    if hasattr(method, "spec"):
        return method.spec.activation is not None
    return "A16" not in class_name(method) and not class_name(method).startswith("Unquantized")


def attention_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers with a KV cache."""
    for name, module in model.named_modules():
        if hasattr(module, "kv_cache_dtype") and hasattr(module, "_k_scale"):
            yield name, module


def quantised_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers with a quant method (linear ones, experts, a language head), without attention, embeddings."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    attention = {name for name, _ in attention_layers(model)}
    for name, module in model.named_modules():
        if name in attention or not isinstance(getattr(module, "quant_method", None), QuantizeMethodBase):
            continue
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            continue
        yield name, module


def packed_modules(model: torch.nn.Module) -> dict[str, list[str]]:
    """Return the checkpoint's names of the modules that a layer fuses, in order, by the layer's own name."""
    packed: dict[str, list[str]] = {}
    for module in model.modules():
        packed.update(getattr(module, "packed_modules_mapping", None) or {})
    return {layer: list(names) for layer, names in packed.items() if len(names) > 1}


def layer_facts(model: torch.nn.Module) -> list[Facts]:
    """Return how each layer will be run: quant method, type, the modules that it fuses and their output features."""
    found, packed = [], packed_modules(model)
    for name, module in quantised_layers(model):
        widths = getattr(module, "logical_widths", None) or getattr(module, "output_sizes", None) or []
        weight = codes_of(module)
        found.append(
            {
                "name": name,
                "type": class_name(module),
                "method": class_name(running(module)),
                "shards": packed.get(name.rpartition(".")[2], []),
                "widths": [int(width) for width in widths],
                "created_dtype": None if weight is None else watching.dtype_name(weight.dtype),
                "rounds_input": rounds_input(running(module)),
                "bits": getattr(running(module), "num_bits", None),
                "group_size": getattr(running(module), "group_size", None),
                "symmetric": getattr(running(module), "symmetric", None),
                "kernel": None,
                "dtype": None,
            }
        )
    return found


def finish_layers(model: torch.nn.Module, layers: list[Facts]) -> None:
    """Add kernel and dtype as they are after vLLM's post-processing."""
    modules = dict(model.named_modules())
    for facts in layers:
        weight = codes_of(modules[facts["name"]])
        facts["kernel"] = kernel_of(running(modules[facts["name"]]))
        facts["dtype"] = None if weight is None else watching.dtype_name(weight.dtype)


def kv_skips(directory: str) -> list[str]:
    """Return the numbers of the layers whose KV cache a checkpoint wants in 16 bits, which vLLM has to be told."""
    content = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    return list((content.get("quantization_config") or {}).get(KV_SKIPS) or ())


def attention_facts(model: torch.nn.Module) -> list[Facts]:
    """Return the KV cache's dtype and scales of each attention layer, as they will be used."""
    return [
        {
            "name": name,
            "kv_cache_dtype": str(module.kv_cache_dtype),
            "k_scale": float(module._k_scale.max()),
            "v_scale": float(module._v_scale.max()),
        }
        for name, module in attention_layers(model)
    ]


def start_process_group(store: Path) -> None:
    """Make the process group of one process that vLLM's layers ask for their rank; once a process.

    Args:
        store: a file that doesn't exist yet, through which the group's processes would meet.
    """
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import model_parallel_is_initialized
    from vllm.platforms import current_platform

    if model_parallel_is_initialized():
        return
    if current_platform.is_cuda_alike():
        torch.cuda.set_device(0)
    init_distributed_environment(1, 0, f"file://{store}", 0, current_platform.dist_backend)
    initialize_model_parallel(1, 1)


def processor_facts(model_config: Any) -> Facts:
    """Make the tokenizer, and for a model that takes images its processor, as the engine does before it loads weights.

    Returns:
        How many tokens the tokenizer knows, and how many it makes of `TEXT`: without its files transformers may build
        one that knows none.

    Raises:
        Exception: whatever vLLM or transformers raise.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model_config)
    if model_config.is_multimodal_model:
        MULTIMODAL_REGISTRY.create_processor(model_config).info.get_hf_processor()
    return {"vocabulary": len(tokenizer), "text_tokens": len(tokenizer.encode(TEXT))}


class Probe:
    """Takes one checkpoint through vLLM's steps."""

    def __init__(self, directory: str, facts: Facts, save: Callable[[], None], scratch: Path) -> None:
        self.directory = directory
        self.scratch = scratch
        self.facts = facts
        self._save = save
        facts.update(
            directory=directory, reached="start", errors=[], layers=[], parameters={}, tensors={}, unused=[],
            casts=[], requantised=[], attention=[], config={}, seconds={}, last_tensor=None, tokenizer=None,
        )  # fmt: skip

    def run(self) -> None:
        """Do every step; a step that fails ends it, but for the processor, whose failure hides nothing behind it."""
        config = self._step("configuration", self._configure)
        if config is None:
            return
        self.facts["tokenizer"] = self._step("processor", lambda: processor_facts(config.model_config))
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(config):
            self._load(config)

    def _step(self, name: str, body: Callable[[], Any]) -> Any:
        """Return what a step returns, or None when it raised, which is noted."""
        start = time.perf_counter()
        try:
            value = body()
            self.facts["reached"] = name
        except Exception as error:
            self.facts["errors"].append(error_facts(name, error))
            value = None
        self.facts["seconds"][name] = round(time.perf_counter() - start, 3)
        self._save()
        return value

    def _configure(self) -> Any:
        from vllm.engine.arg_utils import EngineArgs

        skips = kv_skips(self.directory)
        # by name only where there are some: not every release has the argument
        arguments: Facts = {KV_SKIPS: skips} if skips else {}
        config = EngineArgs(model=self.directory, enforce_eager=True, **arguments).create_engine_config()
        model = config.model_config
        self.facts["config"] = {
            "quantization": model.quantization,
            "quant_config": None if config.quant_config is None else class_name(config.quant_config),
            "architectures": list(model.architectures or []),
            "dtype": watching.dtype_name(model.dtype),
            "kv_cache_dtype": str(config.cache_config.cache_dtype),
            "tied": bool(getattr(model.hf_config, "tie_word_embeddings", False)),
            "kv_cache_promised": getattr(config.quant_config, "kv_cache_quant_method", None),
            "kv_cache_skips": skips,
        }
        return config

    def _load(self, config: Any) -> None:
        from vllm.model_executor.model_loader import get_model_loader
        from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
        from vllm.utils.torch_utils import set_default_torch_dtype

        model_config = config.model_config
        device = torch.device(config.load_config.device or config.device_config.device)

        def create() -> Any:
            start_process_group(self.scratch / "group")
            with set_default_torch_dtype(model_config.dtype), device, kernels.emulating(), kernels.lending_blocks():
                return initialize_model(vllm_config=config, model_config=model_config)

        def note(weight: torch.Tensor) -> None:
            self.facts["requantised"].append(list(weight.shape))

        def post_process() -> bool:
            with set_default_torch_dtype(model_config.dtype), kernels.quantising(note):
                process_weights_after_loading(model, model_config, device)
            return True

        loader = self._step("loader", lambda: get_model_loader(config.load_config))
        model = None if loader is None else self._step("model", create)
        if model is None:
            return
        self.facts.update(layers=layer_facts(model), attention=attention_facts(model))
        if self._load_weights(loader, model, model_config) and self._step("post-processing", post_process):
            finish_layers(model, self.facts["layers"])
            self.facts["attention"] = attention_facts(model)
            self.facts["reached"] = "inspection"

    def _load_weights(self, loader: Any, model: torch.nn.Module, model_config: Any) -> bool:
        from vllm.utils.torch_utils import set_default_torch_dtype

        watching.poison(model)
        parameters = watching.Parameters(model)
        watch = watching.Watch(parameters)
        original: Any = model.load_weights

        def load(weights: Any) -> Any:
            with watch:
                return original(watch.follow(weights))

        def body() -> bool:
            with set_default_torch_dtype(model_config.dtype):
                loader.load_weights(model, model_config)
            return True

        object.__setattr__(model, "load_weights", load)
        done = bool(self._step("weights", body))
        object.__delattr__(model, "load_weights")
        self.facts.update(
            tensors=watch.tensors, casts=watch.casts, unused=[n for n in watch.tensors if n not in watch.used]
        )
        if not done:
            self.facts["last_tensor"] = next(reversed(watch.tensors), None)
        watching.inspect_parameters(model, parameters)
        self.facts["parameters"] = parameters.facts
        return done


def runtime_facts() -> Facts:
    """Return vLLM's version and the device that it chose."""
    import vllm
    from vllm.platforms import current_platform

    return {
        "version": vllm.__version__,
        "torch": torch.__version__,
        "device": str(current_platform.device_type),
        "device_name": str(current_platform.get_device_name()),
    }


def main(job: Path, result: Path) -> None:
    """Probe the job's directories one after the other, and write what was found after each step."""
    # A script's directory comes first on the path; the modules beside this one must not hide installed ones.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    directories = json.loads(job.read_text(encoding="utf-8"))["directories"]
    report = Report(result)
    report.write()
    try:
        report.runtime = runtime_facts()
    except Exception as error:
        report.error = error_facts("import", error)
        report.write()
        return
    for directory in directories:
        facts = report.begin()
        Probe(directory, facts, report.write, result.parent).run()
        facts["done"] = True
        report.finish()
        gc.collect()  # a model refers to itself in places
        gc.freeze()  # what is left is modules: the next collection needn't look at them


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
