"""Two formats in ModelOpt's two layouts, uniform and a mix: pre-flight by each runtime's rules, and vLLM's own loader.

The checkpoints are made here by hand, of the embedded model: nothing of ours writes them.
"""

import importlib.util
import json
import random
import subprocess

import pytest
import torch
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from safetensors.torch import load_file, save_file

import broken_checkpoints as broken
from bitladder.formats import COMPRESSED_TENSORS, FORMATS, MODELOPT
from bitladder.records import CheckpointManifest, ModuleRecord
from bitladder.runtimes.base import Rules, Support
from bitladder.runtimes.preflight import RUNTIMES, preflight
from bitladder.runtimes.registry import VERSIONS
from bitladder.runtimes.vllm.load import load_all
from bitladder.runtimes.vllm.rules import VllmRules
from bitladder.runtimes.vllm.serve import probed_layers
from bitladder.runtimes.vllm.served import Layer, Served

FP8, PC_PT, FP4, FP4_W = "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4"
NAMES = {FP8: "fp8", PC_PT: "fp8_pc_pt", FP4: "nvfp4", FP4_W: "nvfp4_w4a16"}
LINEARS = [name for layer in range(broken.LAYERS) for name in broken.linears_of(layer)]
UNIFORM = dict.fromkeys(LINEARS, PC_PT)
PER_ROW = ("q_proj", "k_proj", "v_proj", "down_proj")
# the second layer stays in BF16, unlisted, as ModelOpt leaves it
MIXED = {name: PC_PT if name.endswith(PER_ROW) else FP8 for name in LINEARS if not name.startswith("model.layers.1.")}
VISION = ["visual.blocks.*", "visual.merger.*", "visual.patch_embed.*"]
EIGHT_BIT = {"dynamic": False, "num_bits": 8, "type": "float"}
FOUR_BIT = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}


def quantise(tensors, algorithms):
    """Store modules in their formats; those that a runtime fuses share a scale where it is one number."""
    largest = {name: float(tensors[f"{name}.weight"].abs().max()) for name in algorithms}
    for name, algorithm in algorithms.items():
        weight = tensors[f"{name}.weight"].float()
        group = [other for other in largest if other.rpartition(".")[0] == name.rpartition(".")[0]]
        if algorithm in (FP4, FP4_W):
            above = torch.tensor(max(largest[other] for other in group) / (6 * broken.E4M3_MAX))
            packed, scale, _ = NVFP4QTensor.quantize(weight, 16, None, above)
            tensors |= {f"{name}.weight": packed._quantized_data, f"{name}.weight_scale": scale}
            tensors[f"{name}.weight_scale_2"] = above
            if algorithm == FP4:
                tensors[f"{name}.input_scale"] = torch.tensor(0.01)
            continue
        scale = torch.tensor(max(largest[other] for other in group) / broken.E4M3_MAX)
        if algorithm == PC_PT:
            scale = weight.abs().amax(1) / broken.E4M3_MAX
        else:
            tensors[f"{name}.input_scale"] = torch.tensor(0.01)
        tensors[f"{name}.weight"] = (weight / (scale[:, None] if scale.ndim else scale)).to(broken.E4M3)
        tensors[f"{name}.weight_scale"] = scale


def entry(algorithm):
    return {"quant_algo": algorithm, **({"group_size": 16} if algorithm in (FP4, FP4_W) else {})}


def config_group(algorithm):
    weights = {**EIGHT_BIT, "strategy": "channel"} if algorithm == PC_PT else EIGHT_BIT
    inputs = {"input_activations": EIGHT_BIT}
    if algorithm in (FP4, FP4_W):
        weights, inputs = FOUR_BIT, {"input_activations": FOUR_BIT} if algorithm == FP4 else {}
    return {"weights": weights, **inputs}


def configure(directory, algorithms, mix):
    """Write what a runtime reads: both files, in the layouts of ModelOpt 0.47's export."""
    if mix:
        listed = {name: entry(algorithm) for name, algorithm in algorithms.items()}
        legacy = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": listed}
        section = {"config_groups": {}, "quantized_layers": listed, "ignore": [], "quant_algo": "MIXED_PRECISION"}
        for algorithm in dict.fromkeys(algorithms.values()):
            targets = sorted(name for name in algorithms if algorithms[name] == algorithm)
            group = {**config_group(algorithm), "targets": targets}
            section["config_groups"][f"group_{len(section['config_groups'])}"] = group
    else:
        (algorithm,) = set(algorithms.values())
        legacy = {**entry(algorithm), "kv_cache_quant_algo": None, "exclude_modules": ["lm_head", *VISION]}
        section = {"ignore": ["lm_head", *VISION], "quant_algo": algorithm}
        if algorithm in (FP4, FP4_W):
            section["config_groups"] = {"group_0": {**config_group(algorithm), "targets": ["Linear"]}}
    producer = {"name": "modelopt", "version": "0.47.0"}
    broken.write_json(directory, broken.QUANT_CONFIG, {"producer": producer, "quantization": legacy})
    config = broken.read_json(directory, broken.CONFIG)
    config["quantization_config"] = {**section, "producer": producer, "quant_method": "modelopt"}
    broken.write_json(directory, broken.CONFIG, config)


def make(directory, algorithms, *, mix, change=lambda tensors: None, listed=None):
    """Write a checkpoint: `algorithms` are stored, `listed` (or the same) are configured."""
    broken.copy(broken.SOURCE, directory)
    tensors = load_file(directory / broken.WEIGHTS)
    quantise(tensors, algorithms)
    change(tensors)
    save_file(tensors, directory / broken.WEIGHTS, metadata={"format": "pt"})
    configure(directory, algorithms if listed is None else listed, mix)
    return directory


def found(directory, runtime="vllm"):
    """Return the result, and `[(class, severity, where)]`."""
    (result,) = preflight(directory, (runtime,))
    return result, [(f.error_class, f.severity, f.where) for f in result.findings]


CAVEAT = ("unsupported_format", "warning", "config.json")
ROW = "model.layers.0.self_attn.q_proj"  # one scale a row in both checkpoints
PLAIN = "model.layers.0.self_attn.o_proj"  # one scale, in the mix


@pytest.mark.parametrize("runtime", ["vllm", "vllm==0.25.1", "tensorrt_llm"])
def test_a_uniform_checkpoint_passes_and_runs_in_its_format(tmp_path, runtime):
    result, seen = found(make(tmp_path / "x", UNIFORM, mix=False), runtime)
    assert seen == []
    formats = {layer.name: layer.format for layer in result.layers}
    assert {formats[name] for name in LINEARS} == {"fp8_pc_pt"}
    assert {form for name, form in formats.items() if name not in LINEARS} == {"bf16"}
    methods = {layer.method for layer in result.layers if layer.format == "fp8_pc_pt"}
    assert methods == {
        {
            "vllm": "ModelOptLinearMethod",
            "vllm==0.25.1": "ModelOptFp8PcPtLinearMethod",
            "tensorrt_llm": "FP8RowwiseLinearMethod",
        }[runtime]
    }


@pytest.mark.parametrize("runtime", ["vllm", "tensorrt_llm"])
def test_a_mix_passes_and_each_layer_runs_in_its_own_format(tmp_path, runtime):
    result, seen = found(make(tmp_path / "x", MIXED, mix=True), runtime)
    assert seen == ([CAVEAT] if runtime == "vllm" else [])
    assert "0.25.1" in result.findings[0].problem if seen else True
    assert {layer.name: layer.format for layer in result.layers} == {
        layer.name: NAMES[MIXED[layer.name]] if layer.name in MIXED else "bf16" for layer in result.layers
    }


def test_a_mix_may_be_listed_in_the_names_of_later_releases_of_transformers(tmp_path):
    listed = {broken.new_name(name): algorithm for name, algorithm in MIXED.items()}
    result, seen = found(make(tmp_path / "x", MIXED, mix=True, listed=listed))
    assert seen == [CAVEAT]
    assert sum(layer.format != "bf16" for layer in result.layers) == len(MIXED)


def test_an_older_vllm_leaves_one_format_of_a_mix_in_16_bits(tmp_path):
    result, seen = found(make(tmp_path / "x", MIXED, mix=True), "vllm==0.25.1")
    assert (result.version, result.verdict) == ("0.25.1", "wrong_format")
    assert "vllm 0.25.1 leaves fp8_pc_pt in 16 bits" in result.findings[0].problem
    formats = {layer.name: layer.format for layer in result.layers}
    assert {formats[name] for name in MIXED if MIXED[name] == PC_PT} == {"bf16"}
    assert {formats[name] for name in MIXED if MIXED[name] == FP8} == {"fp8"}
    assert all(where in ("model.layers.0.self_attn.q_proj",) for kind, _, where in seen if kind == "wrong_format")


@pytest.mark.parametrize("mix", [False, True])
def test_sglang_refuses_both(tmp_path, mix):
    result, seen = found(make(tmp_path / "x", MIXED if mix else UNIFORM, mix=mix), "sglang")
    assert [(kind, severity) for kind, severity, _ in seen] == [("unsupported_format", "error")]
    assert ("W4AFP8" if mix else "one scale a tensor") in result.findings[0].problem


def test_every_runtime_has_a_row_or_a_reason_for_every_format():
    for name, rules in VERSIONS.items():
        assert rules.SUPPORT.keys() == {one.name for one in FORMATS.values() if MODELOPT in one.layouts}, name
        carried = {one.name for one in FORMATS.values() if COMPRESSED_TENSORS in one.layouts}
        assert not rules.CARRIED or rules.CARRIED.keys() == carried, name
        for row in rules.SUPPORT.values():
            assert row.method.endswith("LinearMethod") and row.source if isinstance(row, Support) else row
    assert set(RUNTIMES) <= set(VERSIONS)
    assert issubclass(VllmRules, Rules)


def put(name, value):
    return lambda tensors: tensors.update({name: value(tensors.get(name))})


BROKEN = [
    ("one_scale", False, put(f"{ROW}.weight_scale", lambda s: s.max()), "bad_scale", f"{ROW}.weight_scale"),
    ("a_column", True, put(f"{ROW}.weight_scale", lambda s: s[:, None]), "bad_scale", f"{ROW}.weight_scale"),
    ("a_row_less", True, put(f"{ROW}.weight_scale", lambda s: s[1:]), "bad_scale", f"{ROW}.weight_scale"),
    ("half_precision", True, put(f"{ROW}.weight_scale", lambda s: s.to(torch.int32)), "bad_scale", None),
    (
        "nan",
        False,
        put(f"{ROW}.weight_scale", lambda s: s.index_fill(0, torch.tensor(5), float("nan"))),
        "bad_scale",
        None,
    ),
    ("zero", True, put(f"{ROW}.weight_scale", lambda s: s.index_fill(0, torch.tensor([3]), 0.0)), "bad_scale", None),
    ("rows_for_one", True, put(f"{PLAIN}.weight_scale", lambda s: s.repeat(192)), "bad_scale", f"{PLAIN}.weight_scale"),
    (
        "input_scale",
        False,
        put(f"{ROW}.input_scale", lambda _: torch.tensor(0.1)),
        "unexpected_tensor",
        f"{ROW}.input_scale",
    ),
    ("input_scale_in_mix", True, put(f"{ROW}.input_scale", lambda _: torch.tensor(0.1)), "unexpected_tensor", None),
    ("no_input_scale", True, lambda t: t.pop(f"{PLAIN}.input_scale"), "missing_tensor", f"{PLAIN}.input_scale"),
    ("no_scale", True, lambda t: t.pop(f"{ROW}.weight_scale"), "missing_tensor", f"{ROW}.weight_scale"),
    (
        "unequal_in_mix",
        True,
        put("model.layers.0.mlp.up_proj.weight_scale", lambda s: s * 2),
        "unequal_scales",
        "model.layers.0.mlp.gate_proj.weight_scale",
    ),
]


@pytest.mark.parametrize(("name", "mix", "change", "error", "where"), BROKEN, ids=[case[0] for case in BROKEN])
def test_scales_that_are_not_those_of_the_format(tmp_path, name, mix, change, error, where):
    _, seen = found(make(tmp_path / "x", MIXED if mix else UNIFORM, mix=mix, change=change))
    errors = [(kind, place) for kind, severity, place in seen if severity == "error"]
    assert errors
    assert {kind for kind, _ in errors} == {error}
    assert where in (None, errors[0][1])


def without(*names):
    return {name: algorithm for name, algorithm in MIXED.items() if name not in names}


BF16_MODULE = "model.layers.1.self_attn.o_proj"
LISTS = [
    ("not_listed", without(PLAIN), ("wrong_format", "error", PLAIN)),
    ("group_not_listed", without(broken.Q, broken.K, broken.V), ("wrong_format", "error", broken.Q)),
    ("sixteen_bits_listed", {**MIXED, BF16_MODULE: FP8}, ("wrong_format", "error", BF16_MODULE)),
    ("as_the_other", {**MIXED, PLAIN: PC_PT}, ("wrong_format", "error", PLAIN)),
    ("as_the_other_of_rows", {**MIXED, broken.DOWN: FP8}, ("wrong_format", "error", broken.DOWN)),
    ("two_in_a_group", {**MIXED, broken.K: FP8}, ("mixed_group", "error", broken.Q)),
    ("k_not_listed", without(broken.K), ("ambiguous_exclude", "warning", broken.Q)),
    ("of_nothing", {**MIXED, f"{PLAIN}x": FP8}, ("ambiguous_exclude", "warning", f"{PLAIN}x")),
    ("unknown", {**MIXED, PLAIN: "FP9"}, ("unsupported_format", "error", "config.json")),
    ("empty", {}, ("unsupported_format", "error", "config.json")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "listed", "expected"), LISTS, ids=[case[0] for case in LISTS])
def test_lists_of_a_mix_that_are_not_what_is_stored(tmp_path, name, listed, expected):
    result, seen = found(make(tmp_path / "x", MIXED, mix=True, listed=listed))
    assert expected in seen
    assert result.verdict == (expected[0] if expected[1] == "error" else "ok")


@pytest.mark.parametrize("listed", [None, [], {"x": 1}, {"x": {}}, {"x": {"quant_algo": 3}}, "x", {"x": {"a": {}}}])
def test_nonsense_for_a_list_is_one_error(tmp_path, listed):
    directory = make(tmp_path / "x", MIXED, mix=True)
    for file, section in ((broken.CONFIG, "quantization_config"), (broken.QUANT_CONFIG, "quantization")):
        content = broken.read_json(directory, file)
        content[section]["quantized_layers"] = listed
        broken.write_json(directory, file, content)
    for runtime in VERSIONS:
        assert found(directory, runtime)[0].verdict == "unsupported_format"


def test_files_that_list_different_layers_disagree(tmp_path):
    directory = make(tmp_path / "x", MIXED, mix=True)
    legacy = broken.read_json(directory, broken.QUANT_CONFIG)
    legacy["quantization"]["quantized_layers"][PLAIN] = {"quant_algo": PC_PT}
    broken.write_json(directory, broken.QUANT_CONFIG, legacy)
    assert ("config_mismatch", "warning", broken.QUANT_CONFIG) in found(directory)[1]
    assert found(directory)[0].verdict == "ok"
    assert found(directory, "tensorrt_llm")[0].verdict == "wrong_format"  # reads the other file


def manifest(directory, formats):
    """Write a manifest that promises formats; its scales are nobody's business here."""
    modules = tuple(
        ModuleRecord(
            name=name, tensor=f"{name}.weight", format=form, dtype="F8_E4M3", weight_scale=0.5, input_scale=0.25
        )
        for name, form in formats.items()
    )
    path = directory / CheckpointManifest.FILE_NAME
    record = CheckpointManifest(
        scheme="x", scheme_sha256="a", measurement_sha256="b", source_sha256="c", files=(), modules=modules
    )
    record.write(path)
    broken.list_again(directory)


def test_the_manifest_promises_a_format_and_not_only_that_there_is_one(tmp_path):
    directory = make(tmp_path / "x", MIXED, mix=True)
    promised = {name: NAMES[algorithm] for name, algorithm in MIXED.items()}
    manifest(directory, promised)
    assert found(directory)[1] == [CAVEAT]
    manifest(directory, {**promised, PLAIN: "fp8_pc_pt"})
    result, seen = found(directory)
    assert ("wrong_format", "error", PLAIN) in seen
    assert "stored in fp8, but the manifest promises fp8_pc_pt" in " ".join(f.problem for f in result.findings)


def test_the_layout_is_that_of_modelopts_own_export(tmp_path):
    origin = importlib.util.find_spec("modelopt").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("convert", f"{origin}/torch/export/convert_hf_config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, algorithms, mix in (("uniform", UNIFORM, False), ("mix", MIXED, True)):
        directory = make(tmp_path / name, algorithms, mix=mix)
        legacy = broken.read_json(directory, broken.QUANT_CONFIG)
        section = broken.read_json(directory, broken.CONFIG)["quantization_config"]
        assert module.convert_hf_quant_config_format(legacy) == section


@pytest.mark.parametrize(
    ("dtype", "spread", "dynamic", "expected"),
    [
        ("float8_e4m3fn", "tensor", False, "fp8"),
        ("float8_e4m3fn", "row", True, "fp8_pc_pt"),
        ("float8_e4m3fn", "square", True, "fp8_block"),
        ("float8_e4m3fn", "block", True, "mxfp8"),
        ("bfloat16", "tensor", False, "bf16"),
        ("float8_e4m3fn", "row", False, "float8_e4m3fn with other scales than any known format's"),
        ("uint8", "block", False, "nvfp4"),
        ("uint8", "block", True, "nvfp4_w4a16"),
        ("int8", "row", True, "int8"),
        ("int8", "tensor", False, "int8 with other scales than any known format's"),
        ("int16", "tensor", False, "int16"),
    ],
)
def test_a_served_layer_is_told_by_dtype_and_scales(dtype, spread, dynamic, expected):
    layer = Layer(method="m", kernel=None, dtype=dtype, spread=spread, dynamic_input=dynamic)
    served = Served(reached="built", layers={"x": layer}, names={"x": "x"}, returncode=0, timed_out=False, output="")
    assert [row.format for row in probed_layers(served, None)] == [expected]


# --- vLLM itself -----------------------------------------------------------------------------------------------------


RESOLVE = """
import json, sys
from vllm.model_executor.layers.quantization.modelopt import ModelOptMixedPrecisionConfig as Mix
answers = []
for job in json.load(sys.stdin):
    listed = {name: {"quant_algo": algorithm} for name, algorithm in job["listed"].items()}
    config = Mix.from_config({"quant_algo": "MIXED_PRECISION", "quantized_layers": listed, "ignore": []})
    config.packed_modules_mapping = job["packed"]
    found = []
    for layer in job["layers"]:
        try:
            found.append(config._resolve_quant_algo(layer))
        except ValueError:
            found.append("mixed")
    answers.append(found)
print("ANSWERS" + json.dumps(answers))
"""


def test_a_mix_is_looked_up_as_by_vllm_itself(vllm_warm, tmp_path):
    """Random lists, in the checkpoint's names as vLLM's mapper leaves them, in part or whole."""
    from bitladder.models.families import architecture

    pick = random.Random(3)
    need = architecture(broken.read_json(broken.SOURCE, broken.CONFIG), {})
    layers = VllmRules(need, []).layers
    packed = {
        layer.name.rpartition(".")[2]: [shard.rpartition(".")[2] for shard in layer.shards]
        for layer in layers
        if layer.shards
    }
    jobs, ours = [], []
    for _ in range(60):
        names = [layer.name for layer in layers] + [module for layer in layers for module in layer.modules]
        listed = {name: pick.choice([FP8, PC_PT]) for name in pick.sample(names, pick.choice([3, 30, 60]))}
        rules = VllmRules(need, [], listed)
        decided = [rules.decide(layer) for layer in rules.layers]
        ours.append(["mixed" if one.outcome == "mixed" else one.format for one in decided])
        jobs.append({"listed": rules_keys(rules, listed), "packed": packed, "layers": [one.name for one in layers]})
    done = subprocess.run(
        [str(vllm_warm), "-c", RESOLVE], input=json.dumps(jobs), capture_output=True, text=True, check=False
    )
    assert "ANSWERS" in done.stdout, done.stderr[-3000:]
    theirs = json.loads(done.stdout.rpartition("ANSWERS")[2])
    for job, mine, real in zip(jobs, ours, theirs, strict=True):
        assert mine == [NAMES.get(one, one) or "bf16" for one in real], job["listed"]
    assert {one for row in ours for one in row} == {"fp8", "fp8_pc_pt", "bf16", "mixed"}


def rules_keys(rules, listed):
    """Return a list as vLLM's mapper leaves it."""
    return {rules.entry(name): algorithm for name, algorithm in listed.items()}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, vllm_warm):
    """`{name: result of vLLM's loader}`, through one child."""
    root = tmp_path_factory.mktemp("formats")
    new = {broken.new_name(name): algorithm for name, algorithm in MIXED.items()}
    changes = {case[0]: case[2] for case in BROKEN}
    made = {
        "uniform": make(root / "uniform", UNIFORM, mix=False),
        "mix": make(root / "mix", MIXED, mix=True),
        "new_names": make(root / "new_names", MIXED, mix=True, listed=new),
        "promised": make(root / "promised", MIXED, mix=True),
        "k_not_listed": make(root / "k_not_listed", MIXED, mix=True, listed=without(broken.K)),
    }
    manifest(made["promised"], {**{name: NAMES[one] for name, one in MIXED.items()}, PLAIN: "fp8_pc_pt"})
    for name, mix in (("one_scale", False), ("input_scale", False), ("nan", False), ("no_scale", True)):
        made[name] = make(root / name, MIXED if mix else UNIFORM, mix=mix, change=changes[name])
    made["not_listed"] = make(root / "not_listed", MIXED, mix=True, listed=without(PLAIN))
    results = load_all([*made.values()], vllm_warm, isolated=False, timeout=60)
    return dict(zip(made, results, strict=True))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["uniform", "mix", "new_names", "k_not_listed"])
def test_vllms_loader_runs_each_layer_in_its_format(loaded, name):
    result = loaded[name]
    assert [(f.error_class, f.where, f.problem) for f in result.findings] == []
    assert result.reached == "inspection"
    expected = UNIFORM if name == "uniform" else MIXED
    assert {layer.name: layer.format for layer in result.layers} == {
        layer.name: NAMES[expected[layer.name]] if layer.name in expected else "bf16" for layer in result.layers
    }
    assert len(result.layers) > len(LINEARS)
    kernels = {form: {layer.kernel for layer in result.layers if layer.format == form} for form in NAMES.values()}
    assert kernels["fp8_pc_pt"] != kernels["fp8"]
    methods = {layer.method for layer in result.layers if layer.format != "bf16"}
    assert methods == {VllmRules.SUPPORT["fp8_pc_pt"].method}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "verdict", "where"),
    [
        ("promised", "wrong_format", PLAIN),
        ("one_scale", "shape", None),
        ("input_scale", "unexpected_tensor", f"{ROW}.input_scale"),
        ("nan", "bad_scale", f"{ROW}.weight_scale"),
        ("no_scale", "missing_tensor", f"{ROW}.weight_scale"),
        ("not_listed", None, None),
    ],
)
def test_vllms_loader_and_what_is_wrong(loaded, name, verdict, where):
    result = loaded[name]
    assert result.verdict in ((verdict,) if verdict else ("silent_cast", "unexpected_tensor"))
    assert where in (None, result.findings[0].where)
