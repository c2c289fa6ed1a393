"""Checkpoints in FP8 blocks and MXFP8: pre-flight by each runtime's rules, and vLLM's own loader."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bitladder.checkpoints.export import export
from bitladder.measured import read_amax
from bitladder.records import BF16, CheckpointManifest
from bitladder.runtimes.preflight import preflight
from bitladder.runtimes.registry import VERSIONS
from bitladder.runtimes.vllm.load import load_all
from conftest import llama_config, measure_text, save_model
from test_formats import assigned

SQUARES, MX = BOTH = ("fp8_block", "mxfp8")
LAYER = "model.layers.0"
Q, OUT, GATE, DOWN = (
    f"{LAYER}.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
)
# the first layer; the second one stays in 16 bits
MIX = {"qkv_proj": SQUARES, "o_proj": "nvfp4", "gate_up_proj": MX, "down_proj": "fp8"}


@pytest.fixture(scope="module")
def made(tmp_path_factory, text_file):
    """`{name: directory}`: all in one format, and a mix."""
    root = tmp_path_factory.mktemp("blocks")
    config = llama_config(hidden_size=256, intermediate_size=384, num_hidden_layers=2)
    source = save_model(transformers.LlamaForCausalLM, config, root / "source")
    measurement = measure_text(source, text_file, root, formats=(*BOTH, "fp8", "nvfp4"), samples=2)

    def mix(_, group):
        return MIX[group.name.rpartition(".")[2]] if group.name.startswith(f"{LAYER}.") else BF16

    chosen = {SQUARES: lambda *_: SQUARES, MX: lambda *_: MX, "mix": mix}
    for name, formats in chosen.items():
        scheme = assigned(measurement, name, formats)
        export(scheme, measurement, read_amax(measurement, root), source, root / name)
    return {name: root / name for name in chosen}


def changed(directory, destination, change, listed=None):
    shutil.copytree(directory, destination)
    (destination / CheckpointManifest.FILE_NAME).unlink(missing_ok=True)
    tensors = load_file(destination / "model.safetensors")
    change(tensors)
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    for file, section in (("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")):
        if listed is not None:
            content = json.loads((destination / file).read_text())
            listed(content[section])
            (destination / file).write_text(json.dumps(content))
    return destination


def found(directory, runtime="vllm"):
    (result,) = preflight(directory, (runtime,))
    return result, [(f.error_class, f.where, f.problem) for f in result.findings if f.severity == "error"]


@pytest.mark.parametrize("runtime", [*VERSIONS])
@pytest.mark.parametrize("name", BOTH)
def test_a_uniform_checkpoint_passes_where_the_runtime_has_the_format(made, runtime, name):
    result, errors = found(made[name], runtime)
    support = VERSIONS[runtime].support(name)
    if support is None:
        assert [kind for kind, _, _ in errors] == ["unsupported_format"]
        assert VERSIONS[runtime].why_not(name) in errors[0][2]
        return
    assert errors == []
    assert {(layer.format, layer.method) for layer in result.layers if layer.format != BF16} == {(name, support.method)}
    assert sum(layer.format == name for layer in result.layers) == 14


def test_a_mix_runs_as_it_is_stored_where_the_runtime_has_it(made):
    result, errors = found(made["mix"])
    assert errors == []
    assert any("vLLM 0.25.1 takes these layers of a mix" in finding.problem for finding in result.findings)
    formats = {layer.name: layer.format for layer in result.layers}
    assert [formats[name] for name in (Q, OUT, GATE, DOWN)] == [SQUARES, "nvfp4", MX, "fp8"]
    old = found(made["mix"], "vllm==0.25.1")[1]
    assert {where for _, where, _ in old} == {Q}
    assert "0.25.1 leaves fp8_block in 16 bits where" in old[0][2]
    for runtime, words in (("sglang", "named weight_scale_inv"), ("tensorrt_llm", "MXFP8 is no algorithm of what was")):
        ((kind, _, problem),) = found(made["mix"], runtime)[1]
        assert kind == "unsupported_format"
        assert words in problem


def test_what_each_runtime_says_of_one_of_them_in_a_mix(made, tmp_path):
    """A list is all that decides, whatever is stored."""

    def listed(algorithm):
        def change(section):
            for name, entry in section["quantized_layers"].items():
                if entry["quant_algo"] in ("MXFP8", "fp8_pb_wo"):
                    section["quantized_layers"][name] = {"quant_algo": algorithm}

        return change

    squares = changed(made["mix"], tmp_path / "squares", lambda _: None, listed("fp8_pb_wo"))
    assert any("a whole checkpoint, not of a module" in text for _, _, text in found(squares, "tensorrt_llm")[1])
    exponents = changed(made["mix"], tmp_path / "exponents", lambda _: None, listed("MXFP8"))
    assert any("named weight_scale_inv" in text for _, _, text in found(exponents, "sglang")[1])


def put(name, value):
    return lambda tensors: tensors.update({name: value(tensors.get(name))})


def lost(name):
    return lambda tensors: tensors.pop(name)


def one(value, place, number):
    value = value.clone()
    value[place] = number
    return value


Q_SCALE, GATE_SCALE = f"{Q}.weight_scale", f"{GATE}.weight_scale"
BROKEN = {
    "no_square": (lost(Q_SCALE), "missing_tensor", Q_SCALE),
    "no_exponents": (lost(GATE_SCALE), "missing_tensor", GATE_SCALE),
    "two_dimensions": (put(Q_SCALE, lambda s: s[:, 0, :, 0].contiguous()), "bad_scale", Q_SCALE),
    "a_square_less": (put(Q_SCALE, lambda s: s[:1].contiguous()), "bad_scale", Q_SCALE),
    "nan_square": (put(Q_SCALE, lambda s: one(s, (1, 0, 0, 0), torch.nan)), "bad_scale", Q_SCALE),
    "negative_square": (put(Q_SCALE, torch.neg), "bad_scale", Q_SCALE),
    "inverted_name": (lambda t: t.update({f"{Q}.weight_scale_inv": t.pop(Q_SCALE)}), "missing_tensor", Q_SCALE),
    "one_scale": (put(Q_SCALE, lambda s: s.max()), None, None),
    "an_exponent_less": (put(GATE_SCALE, lambda s: s[:, 1:].contiguous()), "bad_scale", GATE_SCALE),
    "transposed": (put(GATE_SCALE, lambda s: s.t().contiguous()), "bad_scale", GATE_SCALE),
    "nan_exponent": (put(GATE_SCALE, lambda s: one(s, (3, 2), 255)), "bad_scale", GATE_SCALE),
    "powers": (put(GATE_SCALE, lambda s: torch.exp2(s.float() - 127)), None, None),
    "an_input_scale": (put(f"{Q}.input_scale", lambda _: torch.tensor(1.0)), "unexpected_tensor", f"{Q}.input_scale"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_as_the_format_has_it(made, tmp_path, name):
    change, error, where = BROKEN[name]
    _, errors = found(changed(made["mix"], tmp_path / "x", change))
    assert errors
    assert error is None or (error, where) in {(kind, place) for kind, place, _ in errors}, errors


def test_a_mix_that_calls_squares_mxfp8_or_the_other_way(made, tmp_path):
    def swap(section):
        section["quantized_layers"][DOWN.replace("down", "gate")] = {"quant_algo": "fp8_pb_wo"}
        section["quantized_layers"][DOWN.replace("down", "up")] = {"quant_algo": "fp8_pb_wo"}

    _, errors = found(changed(made["mix"], tmp_path / "x", lambda _: None, swap))
    assert ("wrong_format", GATE) in {(kind, where) for kind, where, _ in errors}, errors


# --- vLLM itself -----------------------------------------------------------------------------------------------------

OF_LOADER = ("no_square", "no_exponents", "one_scale", "an_exponent_less", "nan_square")


@pytest.fixture(scope="module")
def loaded(made, tmp_path_factory, vllm_warm):
    """`{name: result of vLLM's loader}`, through one child."""
    root = tmp_path_factory.mktemp("broken")
    directories = made | {name: changed(made["mix"], root / name, BROKEN[name][0]) for name in OF_LOADER}
    results = load_all([*directories.values()], vllm_warm, isolated=False, timeout=60)
    return dict(zip(directories, results, strict=True))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*BOTH, "mix"])
def test_vllms_loader_runs_each_layer_in_its_format(made, loaded, name):
    result = loaded[name]
    assert [(f.error_class, f.where, f.problem) for f in result.findings] == []
    assert result.reached == "inspection"
    assert {one.format for one in result.layers if one.promised != one.format} == set()
    assert {layer.name: layer.format for layer in result.layers} == {
        layer.name: layer.format for layer in found(made[name])[0].layers
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", OF_LOADER)
def test_vllms_loader_and_what_is_wrong(loaded, name):
    result = loaded[name]
    assert result.verdict != "ok"
    where = BROKEN[name][2]
    assert where is None or where in {f.where for f in result.findings}, [(f.where, f.problem) for f in result.findings]
