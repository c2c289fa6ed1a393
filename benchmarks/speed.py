"""Predicted against served speed: a profile of this device, then schemes served by vLLM beside BF16, in one run.

    PYTHONPATH=src python benchmarks/speed.py serve --scratch DIR [--vllm-site DIR] [--seconds 450] [--out served.json]
    ... --tiny --arms fp8,nvfp4 --python .venv-vllm/bin/python            # a trial without a GPU
    PYTHONPATH=src python benchmarks/speed.py compare served.json         # writes benchmarks/results/speed.json

The model is Qwen2.5-VL-3B at full size with random weights, which are made on the device: no checkpoint is written but
its configuration. `serve` takes the profile with `child_profile.py`, on a GPU that does nothing else, then serves every
arm (all engines up at once in processes of their own, idle while another one is timed) and times the loads in rounds
that go from engine to engine. What is known is written after each step.

An arm is a format, or several joined with `+`, which take the groups in turn, beginning with the next one in every
layer; `A/B` has A in attention and B in the MLP.

Without `--compiled` the engines lack torch.compile: decoding runs in CUDA graphs, prefill eagerly with vLLM's own fused
operators. The profile's engine has the same settings.

With `--speculative N` the engines speculate by `ngram`, N tokens a request and step, every one of which is refused
(`speed_child.py` says how): a step keeps one token of each request, and its time is that of verification and drafting.
The profile's engine doesn't speculate. `compare` takes nothing but steps of `requests` x (N + 1) tokens.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import full_size
from served_mixes_engine import Engine, Results, in_turn, vllm_python

RESULT = full_size.RESULTS / "speed.json"
CHILD = Path(__file__).with_name("speed_child.py")
SOURCE = "bf16"
ARMS = "fp8,fp8_pc_pt,fp8_block,nvfp4,nvfp4_w4a16,fp8+nvfp4_w4a16,fp8+bf16,fp8+nvfp4_w4a16+bf16,bf16/fp8"
# requests, prompt tokens, output tokens. The second fills four steps of prefill but for what the first answers take.
LOADS = ((1, 512, 128), (64, 508, 128), (16, 2040, 33))
SPECULATIVE_LOADS = ((1, 512, 128), (64, 500, 128), (16, 2030, 33))  # first answers take several times the room
TINY_LOADS = ((1, 64, 9), (4, 16, 9))
LEAST_OUTPUT = 33  # tokens, from which on decoding can be told from prefill, which differs from one time to the next
KV_CACHE_BYTES = 6 * 2**28  # 43,680 tokens of this model; the largest load needs 40,960
PROFILE_KV_CACHE_BYTES = 3 * 2**30
GRAPH_SIZES = [1, 8, 16, 32, 64]
STEP_TOKENS = 8192  # of a step, as vLLM's server has it on such a GPU
KINDS = {  # of a layer: modules, and whether they are the attention's
    "self_attn.qkv_proj": (("q_proj", "k_proj", "v_proj"), True),
    "self_attn.o_proj": (("o_proj",), True),
    "mlp.gate_up_proj": (("gate_proj", "up_proj"), False),
    "mlp.down_proj": (("down_proj",), False),
}


def model_files(directory: Path, tiny: bool) -> dict[str, Any]:
    """Write the model's files but weights; return its configuration as JSON."""
    config = full_size.config_of(layers=2 if tiny else None)
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    for path in full_size.DEMO.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            shutil.copy(path, directory / path.name)
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


def groups_of(config: dict[str, Any]) -> list[Any]:
    """Return the model's quant groups, by its configuration."""
    from bitladder.records import QuantGroup, QuantModule

    text = config["text_config"]
    hidden, wide, head = (
        text["hidden_size"],
        text["intermediate_size"],
        text["hidden_size"] // text["num_attention_heads"],
    )
    keys = text["num_key_value_heads"] * head
    shapes = {
        "q_proj": (hidden, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, hidden),
    }
    shapes |= {"gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide)}
    groups = []
    for layer in range(text["num_hidden_layers"]):
        for kind, (modules, _) in KINDS.items():
            parent = f"model.layers.{layer}.{kind.partition('.')[0]}"
            found = tuple(QuantModule(name=f"{parent}.{leaf}", shape=shapes[leaf]) for leaf in modules)
            size = sum(one.shape[0] * one.shape[1] for one in found)
            groups.append(QuantGroup(name=f"{parent}.{kind.partition('.')[2]}", modules=found, weight_elements=size))
    return groups


def formats_of(arm: str, groups: Sequence[Any]) -> dict[str, str]:
    """Return group -> format of an arm."""
    if "/" in arm:
        attention, mlp = arm.split("/")
        return {group.name: attention if ".self_attn." in group.name else mlp for group in groups}
    return in_turn(arm.split("+"), groups)


def quantised(config: dict[str, Any], groups: Sequence[Any], formats: dict[str, str]) -> dict[str, Any]:
    """Return the configuration of a checkpoint with these formats, as our exporter writes it."""
    from bitladder.checkpoints.config import config_with_quantisation
    from bitladder.recipe import SchemeSpec
    from bitladder.records import BF16, Scheme

    layers = {m.name: formats[g.name] for g in groups for m in g.modules if formats[g.name] != BF16}
    mixed = len(set(layers.values())) > 1
    left = [module.name for group in groups for module in group.modules if module.name not in layers]
    left += ["lm_head", "visual*"]
    scheme = Scheme(
        name="arm",
        measurement_sha256="",
        asked=SchemeSpec(name="arm", coverage=1.0),
        formats=formats,
        effective_bits=0,
        coverage=1,
        searched_weights=0,
        weight_bits=0,
        weight_bytes=0,
        predicted_score=0,
        score_unit="none",
        exclude_modules=() if mixed else tuple(left),
    )
    return config_with_quantisation(config, scheme, layers)


def bits_of(groups: Sequence[Any], formats: dict[str, str]) -> float:
    """Return effective bits."""
    from bitladder.formats import group_bits

    total = sum(group.weight_elements for group in groups)
    return sum(group_bits(group, formats[group.name]) for group in groups) / total


def arm_directory(model: Path, config: dict[str, Any], place: Path) -> Path:
    """Write a checkpoint's files but weights."""
    shutil.copytree(model, place)
    (place / "config.json").write_text(json.dumps(config, indent=1))
    return place


def profiled(flags: argparse.Namespace, results: Results, model: Path, groups: Sequence[Any], python: Path) -> None:
    """Take the profile, and keep it."""
    from bitladder.runtimes.child import run_child, vllm_version
    from bitladder.runtimes.vllm import profiling, serve
    from bitladder.runtimes.vllm.job import SpeedJob

    formats = flags.formats.split(",")
    loads = [SpeedJob(*one) for one in TINY_LOADS] if flags.tiny else profiling.LOADS
    tokens = (1, 8, 64) if flags.tiny else profiling.TOKENS
    rules, ranks = profiling.rules_of(vllm_version(python)), flags.tensor_parallel
    job = profiling.profile_job(
        model,
        groups,
        formats,
        rules=rules,
        engine=flags.engine,
        loads=loads,
        tokens=tokens,
        tensor_parallel=ranks,
    )
    job |= {"kv_cache_bytes": PROFILE_KV_CACHE_BYTES, "gpu_memory_utilization": serve.SHARED_GPU_UTILIZATION}
    outcome = run_child(python, profiling.SCRIPT, job, timeout=results.left - 60, environment=serve.ENVIRONMENT)
    results.content["profile"] = outcome.result
    results.content["groups"] = [[one.name, *one.fused_shape, one.weight_elements] for one in groups]
    if outcome.returncode or outcome.timed_out:
        results.content["profile_failed"] = outcome.output[-4000:]
    results.say("profile taken" if not outcome.returncode else "profile failed")


def loads_of(flags: argparse.Namespace) -> tuple[tuple[int, int, int], ...]:
    """Return what the engines are given."""
    return TINY_LOADS if flags.tiny else SPECULATIVE_LOADS if flags.speculative else LOADS


def start(flags: argparse.Namespace, results: Results, places: dict[str, Path], python: Path, scratch: Path) -> Any:
    """Start the engines' processes, which import and wait."""
    from bitladder.runtimes.vllm.job import ServeJob, SpeedJob

    loads = loads_of(flags)
    longest = max(prompt + output for _, prompt, output in loads)
    speed = SpeedJob(max(requests for requests, _, _ in loads), longest - 1, 1)
    job = ServeJob(speed=speed, kv_cache_bytes=KV_CACHE_BYTES)
    engine = {**flags.engine, "tensor_parallel_size": flags.tensor_parallel, **speculation(flags)}
    return {
        name: Engine(python, place, job, engine, scratch / f"engine-{index}", CHILD)
        for index, (name, place) in enumerate(places.items())
    }


def speculation(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments by which an engine speculates, with CUDA graphs of as many requests as without."""
    drafted = flags.speculative
    if not drafted:
        return {}
    ngram = {"method": "ngram", "num_speculative_tokens": drafted, "prompt_lookup_min": 1, "prompt_lookup_max": 1}
    graphs = {**flags.engine["compilation_config"], "cudagraph_capture_sizes": [n * (drafted + 1) for n in GRAPH_SIZES]}
    return {"speculative_config": ngram, "compilation_config": graphs}


def drop(results: Results, engines: dict[str, Engine], name: str, step: str) -> None:
    """Keep why an engine is no more."""
    served = engines[name].served(timed_out=engines[name].alive)
    told = served.error.traceback if served.error else served.output
    engines.pop(name).close()
    results.failed(name, step, told[-3000:] or served.reached)


def build(results: Results, engines: dict[str, Engine], seconds: float) -> None:
    """Have all engines come up."""
    for name in list(engines):
        if engines[name].reply(max(1.0, results.left)) != "imported":
            drop(results, engines, name, "import")
    for engine in engines.values():
        assert engine.process.stdin is not None
        engine.process.stdin.write(b"go\n")
        engine.process.stdin.flush()
    limit = time.monotonic() + min(seconds, results.left - 20)
    for name in list(engines):
        if engines[name].reply(limit - time.monotonic()) != "ready":
            drop(results, engines, name, "engine")
            continue
        served = engines[name].served()
        kernels: dict[str, int] = {}
        for layer in served.layers.values():  # none where ranks are processes of their own
            key = f"{layer.method}: {layer.kernel}"
            kernels[key] = kernels.get(key, 0) + 1
        results.content["arms"][name] |= {"kernels": kernels, "weight_bytes": served.weight_bytes}
        results.say(f"engine of {name} up, {sum(phase.seconds for phase in served.phases):.0f} s")


def rounds(flags: argparse.Namespace, results: Results, engines: dict[str, Engine]) -> None:
    """Time all engines in turn."""
    loads = loads_of(flags)
    for number in range(flags.rounds):
        asked = [
            dict(requests=r, prompt_tokens=p, output_tokens=o, repeats=1, untimed=0 if number else 1)
            for r, p, o in loads
        ]
        for name in list(engines):
            if results.left < 8:
                results.say(f"no time for round {number} of {name} and on")
                return
            timings = engines[name].ask(asked, max(8.0, results.left))
            if timings is None:
                drop(results, engines, name, "timing")
                continue
            kept = results.content["arms"][name].setdefault("timings", [[] for _ in loads])
            for place, one in zip(kept, timings, strict=True):
                place.append([one["one_token"][0], one["all_tokens"][0]])
            results.content["arms"][name]["steps"] = [one["steps"] for one in timings]
        results.say(f"round {number} of {', '.join(engines)}")


def serve_arms(flags: argparse.Namespace) -> None:
    """Take the profile and serve the arms."""
    from bitladder.models.splitting import Split
    from bitladder.runinfo import hardware, versions

    arms = [name for name in flags.arms.split(",") if name]
    content: dict[str, Any] = {
        "model": "Qwen2.5-VL-3B, full size, random weights" if not flags.tiny else "two narrow layers",
        "hardware": hardware(),
        "versions": versions(),
        "engine": flags.engine,
        "tensor_parallel": flags.tensor_parallel,
        "speculative_tokens": flags.speculative,
        "loads": loads_of(flags),
        "done": {},
        "profile": {},
        "arms": {},
    }
    results = Results(flags.out, time.monotonic(), flags.seconds, content)
    with tempfile.TemporaryDirectory(prefix="speed-", dir=flags.scratch) as directory:
        scratch = Path(directory)
        python = vllm_python(flags.python, flags.vllm_site, scratch)
        model = scratch / "model"
        config = model_files(model, flags.tiny)
        groups = groups_of(config)
        places = {SOURCE: model}
        content["arms"][SOURCE] = {"effective_bits": 16.0}
        for index, arm in enumerate(arms):
            formats = formats_of(arm, groups)
            places[arm] = arm_directory(model, quantised(config, groups, formats), scratch / f"arm-{index}")
            content["arms"][arm] = {"effective_bits": bits_of(groups, formats), "formats": formats}
        engines = start(flags, results, places, python, scratch)
        results.say("started")
        try:
            if not flags.no_profile:
                split = Split.of(config, flags.tensor_parallel)
                profiled(flags, results, model, [split.group(group) for group in groups], python)
            build(results, engines, flags.start_seconds)
            rounds(flags, results, engines)
        finally:
            for engine in engines.values():
                engine.close()
            results.say("end")


def profile_in(content: dict[str, Any]) -> tuple[Any, Any]:
    """Return the profile that a served file holds, and the groups, as one rank holds them."""
    from bitladder.records import QuantGroup, QuantModule
    from bitladder.runinfo import Meter
    from bitladder.runtimes.vllm.profiling import profile_of

    groups = [
        QuantGroup(name=name, modules=(QuantModule(name=name, shape=(rows, columns)),), weight_elements=size)
        for name, rows, columns, size in content["groups"]
    ]
    taken = content["profile"]
    for layers in taken["linears"].values():
        for layer in layers:
            layer.pop("host_seconds", None)  # which an earlier script took, and nothing was predicted better with
    ranks = content.get("tensor_parallel", 1)
    found = profile_of(taken, groups, "Qwen2_5_VLForConditionalGeneration", Meter(), ranks)
    return found.model_copy(update={"run": None}), groups  # where it ran is in the file


def check_steps(load: Any, steps: list[int], tokens_a_step: int) -> None:
    """Refuse times of steps that verified other than all tokens that can be drafted.

    Requests are prefilled one after the other, and end so: in as many steps as that takes the batch isn't whole.
    """
    ragged = math.ceil(load.requests * load.prompt_tokens / tokens_a_step)
    whole, wanted = steps.count(load.verified), load.output_tokens - 1 - ragged
    if whole < wanted:
        raise SystemExit(f"{load}: {whole} of {wanted} steps verified {load.verified} tokens: {steps}")


def compared(content: dict[str, Any]) -> dict[str, Any]:
    """Return what was served of every arm and load beside what the profile predicts.

    Served rates are medians over the rounds: prefill of the seconds with one token of output, decode of what the others
    took on top. Of speculation they are as predicted ones are: a token a request and step, whatever was drafted.
    """
    from bitladder.planning.speed import Load, SpeedModel
    from bitladder.records import BF16

    profile, groups = profile_in(content)
    model = SpeedModel(profile, groups, Load(*content["loads"][0]))
    drafted = content.get("speculative_tokens", 0)
    found: dict[str, Any] = {}
    for name, arm in content["arms"].items():
        formats = arm.get("formats") or {group.name: BF16 for group in groups}
        found[name] = {"effective_bits": arm["effective_bits"], "kernels": arm.get("kernels"), "loads": {}}
        for place, (shape, times) in enumerate(zip(content["loads"], arm.get("timings", []), strict=False)):
            requests, prompt, output = shape
            load = Load(*shape, drafted)
            if drafted:
                check_steps(load, arm["steps"][place], profile.engine.tokens_a_step)
            predicted = model.predict(formats, load)
            rows = {}
            for phase, tokens, seconds in (
                ("prefill", requests * prompt, [one for one, _ in times]),
                ("decode", requests * (output - 1), [many - one for one, many in times]),
            ):
                if phase == "decode" and output < LEAST_OUTPUT:
                    continue
                served, said = tokens / median(seconds), getattr(predicted, phase)
                rows[phase] = {
                    "served": round(served, 1),
                    "predicted": round(said, 1),
                    "error": round(said / served - 1, 4),
                    "spread": round((max(seconds) - min(seconds)) / median(seconds), 4),
                }
            found[name]["loads"]["{} x {} + {}".format(*shape)] = rows
    for arm in found.values():
        for load, rows in arm["loads"].items():
            for phase, row in rows.items():
                own = found[SOURCE]["loads"][load][phase]
                row["served_ratio"] = round(row["served"] / own["served"], 4)
                row["predicted_ratio"] = round(row["predicted"] / own["predicted"], 4)
                row["ratio_error"] = round(row["predicted_ratio"] / row["served_ratio"] - 1, 4)
    return found


def compare(flags: argparse.Namespace) -> None:
    """Write predicted beside served, and the profile as a record where that is asked for."""
    content = json.loads(flags.file.read_text())
    arms = compared(content)
    errors: dict[str, dict[str, list[float]]] = {}
    for name, arm in arms.items():
        for load, rows in arm["loads"].items():
            for phase, row in rows.items():
                errors.setdefault(f"{load}, {phase}", {"speed": [], "ratio": []})["speed"].append(abs(row["error"]))
                if name != SOURCE:
                    errors[f"{load}, {phase}"]["ratio"].append(abs(row["ratio_error"]))
    kept = {
        "claim": "speeds predicted from a profile beside those that vLLM serves in the same run",
        **{key: content[key] for key in ("model", "hardware", "versions", "engine", "loads")},
        "tensor_parallel": content.get("tensor_parallel", 1),
        "speculative_tokens": content.get("speculative_tokens", 0),
        "profile": {key: content["profile"][key] for key in ("runtime", "gpu", "engine", "phases")},
        "errors": {
            load: {what: {"median": round(median(e), 4), "worst": round(max(e), 4)} for what, e in both.items()}
            for load, both in errors.items()
        },
        "arms": arms,
        "seconds_of_rounds": {name: arm.get("timings") for name, arm in content["arms"].items()},
    }
    flags.out.write_text(json.dumps(kept, indent=1) + "\n")
    if flags.profile is not None:
        flags.profile.parent.mkdir(parents=True, exist_ok=True)
        profile_in(content)[0].write(flags.profile)
    for name, arm in arms.items():
        parts = [f"{name:<22} {arm['effective_bits']:5.2f}"]
        for load, rows in arm["loads"].items():
            told = (
                f"{p} {r['served']:.0f} {r['error']:+.1%} ({r['served_ratio']:.2f}, {r['predicted_ratio']:.2f})"
                for p, r in rows.items()
            )
            parts.append(f"{load}: {', '.join(told)}")
        print("  ".join(parts))
    print(json.dumps(kept["errors"], indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve")
    serving.add_argument("--scratch", type=Path, required=True, help="some 100 MB")
    serving.add_argument("--arms", default=ARMS)
    serving.add_argument("--formats", default="fp8,fp8_pc_pt,fp8_block,mxfp8,nvfp4,nvfp4_w4a16", help="profiled")
    serving.add_argument("--vllm-site", help="the PYTHONPATH under which vLLM lies")
    serving.add_argument("--python", type=Path, default=Path(sys.executable), help="of vLLM's environment")
    serving.add_argument("--seconds", type=float, default=450.0, help="for everything")
    serving.add_argument("--start-seconds", type=float, default=200.0, help="until the engines are up")
    serving.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that share each engine's model")
    serving.add_argument("--speculative", type=int, default=0, metavar="N", help="tokens drafted a request and step")
    serving.add_argument("--rounds", type=int, default=3)
    serving.add_argument("--no-profile", action="store_true")
    serving.add_argument("--compiled", action="store_true", help="engines with torch.compile, as vLLM's default is")
    serving.add_argument("--tiny", action="store_true", help="a model of two narrow layers: a trial without a GPU")
    serving.add_argument("--out", type=Path, default=Path("served.json"))
    comparing = commands.add_parser("compare")
    comparing.add_argument("file", type=Path, help="what `serve` wrote")
    comparing.add_argument("--profile", type=Path, help="write the profile's record here")
    comparing.add_argument("--out", type=Path, default=RESULT)
    flags = parser.parse_args()
    if flags.command == "compare":
        return flags
    if flags.speculative and flags.tensor_parallel > 1:
        parser.error("--speculative is for one GPU: the rows of the embedding that it sets lie on one of several")
    graphs: dict[str, Any] = {"cudagraph_capture_sizes": GRAPH_SIZES}
    if not flags.compiled:
        graphs |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "custom_ops": ["all"]}
    elif flags.tensor_parallel > 1:  # one of FlashInfer's takes NVLink multicast, which not every host may use
        graphs["pass_config"] = {"fuse_allreduce_rms": False}
    flags.engine = {
        "compilation_config": graphs,
        "max_num_batched_tokens": STEP_TOKENS,
        "limit_mm_per_prompt": {"image": 0, "video": 0},
    }
    return flags


def main() -> None:
    flags = parse()
    if flags.command == "compare":
        compare(flags)
        return
    flags.scratch.mkdir(parents=True, exist_ok=True)
    serve_arms(flags)


if __name__ == "__main__":
    main()
