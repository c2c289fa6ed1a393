"""What profiling takes with vLLM on this machine: the layers that vLLM makes, their kernels, and what is refused."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import bitladder
from bitladder import cli
from bitladder.errors import ProbeFailed, RecipeError
from bitladder.models.splitting import Split
from bitladder.models.target import find_target
from bitladder.planning.speed import Load, SpeedModel
from bitladder.records import BF16, Profile
from bitladder.runinfo import Meter
from bitladder.runtimes.vllm import kernels, profiling
from bitladder.runtimes.vllm.job import SpeedJob
from bitladder.runtimes.vllm.rules import VllmRules, VllmRules0251
from bitladder.steps.profile import profile
from conftest import llama_config, save_model

MODEL = Path(bitladder.__file__).parent / "demo" / "qwen2_5_vl_digits"
FORMATS = ("fp8", "nvfp4", "int8", "fp8_block")
LOADS = (SpeedJob(1, 16, 5, 2), SpeedJob(2, 64, 5, 2), SpeedJob(4, 32, 5, 2))


@pytest.fixture(scope="module")
def taken(vllm_warm, tmp_path_factory) -> Profile:
    """A profile of the embedded model, from a copy without a byte of its weights but the header."""
    directory = tmp_path_factory.mktemp("profiled") / "model"
    shutil.copytree(MODEL, directory)
    groups = find_target(MODEL, FORMATS).groups
    (directory / "model.safetensors").unlink()
    return profiling.profile(
        directory, groups, vllm_warm, model="Qwen2.5-VL", formats=FORMATS, loads=LOADS, tokens=(1, 8, 32)
    )


@pytest.mark.slow
def test_every_fused_layer_is_timed_in_every_format_that_it_can_have(taken):
    config = json.loads((MODEL / "config.json").read_text())["text_config"]
    hidden, wide, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    keys = 2 * config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    shapes = {(hidden + keys, hidden), (hidden, hidden), (2 * wide, hidden), (hidden, wide)}
    assert {(one.out_features, one.in_features): one.groups for one in taken.searched} == dict.fromkeys(shapes, layers)
    for name in (BF16, "fp8", "nvfp4", "int8"):
        timed = [one for one in taken.layers if one.format == name]
        assert {(one.out_features, one.in_features) for one in timed} == shapes
        assert all([cell.tokens for cell in one.cells] == [1, 8, 32] for one in timed)
        assert all(0 < cell.low <= cell.seconds <= cell.high for one in timed for cell in one.cells)
    assert taken.refused == {"fp8_block": "shape: none of the model's layers has a shape that it takes"}
    assert [(one.requests, one.prompt_tokens, len(one.one_token)) for one in taken.loads] == [
        (1, 16, 2),
        (2, 64, 2),
        (4, 32, 2),
    ]
    assert all(all_ > one for load in taken.loads for one, all_ in zip(load.one_token, load.all_tokens, strict=True))


@pytest.mark.slow
def test_the_kernels_are_those_that_vllm_chooses_here(taken):
    own = {one.format: one.kernel for one in taken.layers}
    generation = "cpu"
    for name in ("fp8", "int8"):
        cell = kernels.KERNELS["0.32.0"][name].cells[generation]
        assert own[name].startswith(cell.kernel), name
    assert own["nvfp4"] == "EmulationNvFp4LinearKernel"  # which `emulating` lends CPUs
    assert own[BF16] is None


@pytest.mark.slow
def test_a_profile_predicts_16_bits_as_they_were_timed(taken, tmp_path):
    taken.write(tmp_path / "profile.json")
    model = SpeedModel(Profile.read(tmp_path / "profile.json"), find_target(MODEL, FORMATS).groups, Load(4, 32, 5))
    speed = model.predict(model.uniform(BF16), Load(4, 32, 5))
    assert speed.prefill_ratio == speed.decode_ratio == 1.0
    assert (
        model.predict(model.uniform("nvfp4"), Load(4, 32, 5)).decode_ratio < 1
    )  # emulated, in many operations of torch


@pytest.mark.slow
def test_an_engine_that_does_not_come_up_is_told_in_one_line(vllm_warm, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(MODEL, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(
        ProbeFailed, match=r"vLLM \S+ can't be profiled \(last step finished: imported\): .*NoSuchModel"
    ):
        profiling.profile(
            directory, find_target(MODEL).groups, vllm_warm, model="m", formats=("fp8",), loads=LOADS, tokens=(1,)
        )


def test_a_format_is_asked_for_as_a_checkpoint_of_it_says():
    fp8 = profiling.layer_config("fp8", VllmRules)
    assert (fp8["quant_method"], fp8["quant_algo"]) == ("modelopt", "FP8")
    assert profiling.layer_config("nvfp4", VllmRules0251)["group_size"] == 16
    packed = profiling.layer_config("int4_w4a16", VllmRules)
    assert packed["quant_method"] == "compressed-tensors"
    assert packed["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    for version in ("0.32.0", "0.25.1"):  # of 0.25.1 the rules of ModelOpt's layout alone are known
        assert {"int8", "int4_w4a16", "fp8"} <= {*profiling.servable(version)}
    assert profiling.layer_config("int4_w4a16", VllmRules0251) == packed
    assert profiling.layer_config("fp8", VllmRules0251)["quant_method"] == "modelopt"


def test_layers_that_vllm_fuses_otherwise_are_refused():
    groups = find_target(MODEL).groups
    found = {
        "refused": {},
        "linears": {BF16: []},
        "runtime": {"version": "0.0"},
        "gpu": {},
        "layers": [{"out_features": 1, "in_features": 2}],
    }
    with pytest.raises(ProbeFailed, match=r"vLLM 0\.0 has 0 layers of 320 x 192, the model 6 groups: it fuses other"):
        profiling.profile_of(found, groups, "m", Meter())
    with pytest.raises(ProbeFailed, match="16 bits themselves couldn't be timed: OutOfMemoryError: no room"):
        profiling.profile_of(
            {**found, "refused": {BF16: {"type": "OutOfMemoryError", "message": "no room", "line": ""}}},
            groups,
            "m",
            Meter(),
        )


def test_what_cannot_be_profiled_is_refused_before_anything_runs(tmp_path, capsys, monkeypatch):
    python = tmp_path / "python"
    with pytest.raises(RecipeError, match="nvfp8"):
        profile(MODEL, python, formats=["nvfp8"])
    for arguments, told in (
        (["--engine", "[1]"], "--engine '[1]' is no JSON object"),
        (["--engine", '{"tensor_parallel_size": 2}'], "--engine names tensor_parallel_size"),
        (["--engine", '{"speculative_config": {"method": "ngram"}}'], "--engine names speculative_config"),
        (["--engine", "{"], "--engine '{' is no JSON ("),
        (["--formats", "bf16"], "names no format to quantise to"),
        (["--python", str(python)], f"no Python interpreter at {python}"),
    ):
        monkeypatch.setattr("sys.argv", ["bitladder", "profile", str(MODEL), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert told in capsys.readouterr().err


@pytest.mark.slow
def test_layers_are_timed_as_one_of_two_ranks_holds_them(vllm_python, tmp_path, monkeypatch):
    """With a real engine of two ranks: its layers have the shapes that are timed, or the profile would be refused."""
    config = llama_config(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_hidden_layers=1)
    source = save_model(transformers.LlamaForCausalLM, config, tmp_path / "model")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or else vLLM wants a part of the machine for each
    found = profiling.profile(
        source,
        find_target(source).groups,
        vllm_python,
        model="Llama",
        formats=("fp8",),
        loads=LOADS[:1],
        tokens=(1, 8),
        tensor_parallel=2,
        timeout=400,
    )
    own = {(128, 128), (128, 64), (256, 128), (128, 128)}  # qkv: two heads of 32, and one of keys and of values: 2 x 32
    assert {(one.out_features, one.in_features) for one in found.searched} == own
    for name in (BF16, "fp8"):
        assert {(one.out_features, one.in_features) for one in found.layers if one.format == name} == own
    assert found.tensor_parallel == 2
    assert found.place == "2 x cpu"


def test_a_format_is_timed_where_each_rank_has_whole_blocks_of_it(tmp_path):
    config = llama_config(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_hidden_layers=1)
    source = save_model(transformers.LlamaForCausalLM, config, tmp_path / "model")
    split = Split.of(config.to_dict(), 2)
    groups = [split.group(group) for group in find_target(source).groups]
    job = profiling.profile_job(source, groups, ("fp8_block", "nvfp4"), rules=VllmRules, loads=LOADS, tensor_parallel=2)
    assert job["tensor_parallel"] == 2
    assert job["formats"]["fp8_block"]["shapes"] == [(256, 128), (128, 128)]  # of q, k and o no rank has whole squares
    assert job["formats"]["nvfp4"]["shapes"] == job["formats"][BF16]["shapes"] == [(128, 128), (128, 64), (256, 128)]


def test_more_ranks_than_gpus_are_refused_in_one_line(monkeypatch):
    """What the child asks of the machine, in its own words."""
    spec = importlib.util.spec_from_file_location("child_profile", profiling.SCRIPT)
    child = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(child)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RuntimeError, match="the engine of tensor_parallel 2 runs on 2 GPUs, and 1 are here; profile"):
        child.check_ranks(2, gpu=True)
    child.check_ranks(1, gpu=True)
