"""The loader check: judging by itself, the child's bookkeeping without vLLM, and vLLM's own loader on every case."""

import sys
from pathlib import Path

import pytest
import torch

import broken_checkpoints
from bitladder.errors import BitladderError, ModelError
from bitladder.records import CheckpointManifest, KvScale, ModuleRecord
from bitladder.runtimes.child import Outcome
from bitladder.runtimes.vllm import child_load, child_watch, load
from bitladder.runtimes.vllm.facts import Attention, Cast, Copy, Facts, Failure, Layer, Parameter, Tensor, Tokenizer
from bitladder.runtimes.vllm.load import judge, load_all, probe
from bitladder.runtimes.vllm.load_judging import findings, probed_layers

ATTENTION, FUSED = "model.layers.3.self_attn", "m.layers.3.self_attn.qkv_proj"
Q, K, V = (f"{ATTENTION}.{name}_proj" for name in "qkv")
STEPS = ("configuration", "processor", "loader", "model", "weights", "post-processing")


# --- judging ---------------------------------------------------------------------------------------------------------


def fused_parameter(kind, dtype, shape, edges, **fields):
    """Return a parameter of the fused layer whose three shards come from q, k and v."""
    copies = (Copy(tensor=f"{m}.{kind}", begin=a, end=b) for m, a, b in zip((Q, K, V), edges, edges[1:], strict=False))
    return Parameter(dtype=dtype, shape=shape, copies=tuple(copies), **fields)


def without(parameter, tensor, **fields):
    """Return the parameter as it is when one of its tensors wasn't there."""
    gone = next(copy for copy in parameter.copies if copy.tensor == tensor)
    copies = tuple(copy for copy in parameter.copies if copy is not gone)
    return parameter.model_copy(update={"copies": copies, "unloaded": ((gone.begin, gone.end),), **fields})


WEIGHT = fused_parameter("weight", "float8_e4m3fn", (8, 4), (0, 16, 24, 32))
WEIGHT_SCALE = fused_parameter("weight_scale", "float32", (3,), (0, 1, 2, 3), values=(0.5, 0.5, 0.5))
INPUT_SCALE = fused_parameter("input_scale", "float32", (3,), (0, 1, 2, 3), values=(0.25, 0.25, 0.25))
BIAS = fused_parameter("bias", "bfloat16", (8,), (0, 4, 6, 8))
NORM = Parameter(dtype="bfloat16", shape=(4,), copies=(Copy(tensor="model.norm.weight", begin=0, end=4),))
LAYER = Layer(
    name=FUSED,
    type="QKVParallelLinear",
    method="ModelOptLinearMethod",
    shards=("q_proj", "k_proj", "v_proj"),
    widths=(4, 2, 2),
    created_dtype="float8_e4m3fn",
    kernel="SomeFp8Kernel",
    dtype="float8_e4m3fn",
)


def facts(parameters=None, dtype="float8_e4m3fn", **fields):
    """Return what the child says of one fused FP8 layer and a norm that are as they should be, but for the changes."""
    known = {"weight": WEIGHT, "weight_scale": WEIGHT_SCALE, "input_scale": INPUT_SCALE, "bias": BIAS}
    stored = {f"{m}.weight": Tensor(dtype=dtype, shape=(rows, 4)) for m, rows in ((Q, 4), (K, 2), (V, 2))}
    defaults = {
        "directory": "x",
        "reached": "inspection",
        "done": True,
        "layers": (LAYER,),
        "parameters": {
            **{f"{FUSED}.{kind}": p for kind, p in {**known, **(parameters or {})}.items()},
            "m.norm.weight": NORM,
        },
        "tensors": {**stored, "model.norm.weight": Tensor(dtype="bfloat16", shape=(4,))},
        "tokenizer": Tokenizer(vocabulary=100, text_tokens=5),
        "seconds": dict.fromkeys(STEPS, 0.1),
    }
    return Facts(**{**defaults, **fields})


def manifest(formats=None, kv=False):
    """Return a manifest that promises q, k and v in FP8, or what is given."""
    formats = dict.fromkeys((Q, K, V), "fp8") if formats is None else formats
    modules = tuple(
        ModuleRecord(name=n, tensor=f"{n}.weight", format=f, dtype="F8_E4M3", weight_scale=0.5, input_scale=0.25)
        for n, f in formats.items()
    )
    return CheckpointManifest(
        scheme="half",
        scheme_sha256="a",
        measurement_sha256="b",
        source_sha256="c",
        files=(),
        modules=modules,
        kv_cache_format="fp8" if kv else None,
        kv_scales=(KvScale(tensor=f"{K}.k_scale", scale=0.1),) if kv else (),
    )


def found_in(found, promised=None):
    return findings(found, promised, probed_layers(found, promised))


def judged(found, promised=None):
    """Return `[(class, severity, where)]`."""
    return [(f.error_class, f.severity, f.where) for f in found_in(found, promised)]


def test_nothing_is_found_where_nothing_is_wrong():
    assert judged(facts(), manifest()) == []
    assert judged(facts()) == []
    rows = probed_layers(facts(), manifest())
    assert [row.name for row in rows] == [Q, K, V]
    assert {(r.runtime_name, r.promised, r.format, r.kernel) for r in rows} == {(FUSED, "fp8", "fp8", "SomeFp8Kernel")}
    assert {row.promised for row in probed_layers(facts(), None)} == {None}


@pytest.mark.parametrize("kind", ["weight", "weight_scale", "input_scale", "bias"])
def test_one_missing_shard_of_a_fused_layer_is_named_as_the_checkpoint_would(kind):
    whole = facts().parameters[f"{FUSED}.{kind}"]
    found = facts({kind: without(whole, f"{K}.{kind}")})
    assert judged(found, manifest()) == [("missing_tensor", "error", f"{K}.{kind}")]


def test_a_parameter_that_nothing_reached_is_missing_under_the_runtimes_name():
    lost = NORM.model_copy(update={"copies": (), "unloaded": ((0, 4),)})
    parameters = {**facts().parameters, "m.norm.weight": lost}
    assert judged(facts().model_copy(update={"parameters": parameters})) == [
        ("missing_tensor", "error", "m.norm.weight")
    ]


def test_a_module_that_is_fused_on_disk_needs_one_scale():
    tensor = f"{ATTENTION}.qkv.weight"
    whole = Parameter(dtype="float8_e4m3fn", shape=(8, 4), copies=(Copy(tensor=tensor, begin=0, end=32),))
    scale = Copy(tensor=f"{ATTENTION}.qkv.weight_scale", begin=0, end=1)
    first = WEIGHT_SCALE.model_copy(update={"copies": (scale,), "unloaded": ((1, 3),), "values": (0.5, -9.0, -9.0)})
    assert judged(facts({"weight": whole, "weight_scale": first})) == []
    none = first.model_copy(update={"copies": (), "unloaded": ((0, 3),)})
    assert judged(facts({"weight": whole, "weight_scale": none})) == [
        ("missing_tensor", "error", f"{ATTENTION}.qkv.weight_scale")
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.5])
def test_scales_that_can_not_be(value):
    bad = WEIGHT_SCALE.model_copy(update={"values": (0.5, value, 0.5)})
    assert judged(facts({"weight_scale": bad}), manifest()) == [("bad_scale", "error", f"{K}.weight_scale")]


def test_unequal_weight_scales_fail_and_unequal_input_scales_are_warned_of():
    weight = WEIGHT_SCALE.model_copy(update={"values": (0.5, 0.4, 0.5)})
    inputs = INPUT_SCALE.model_copy(update={"values": (0.25, 0.4, 0.25)})
    assert judged(facts({"weight_scale": weight}), manifest()) == [("unequal_scales", "error", FUSED)]
    assert judged(facts({"input_scale": inputs}), manifest()) == [("unequal_scales", "warning", FUSED)]


def test_weights_that_are_not_finite():
    found = judged(facts({"bias": BIAS.model_copy(update={"nan": 2})}), manifest())
    assert found == [("bad_weight", "error", f"{Q}.bias, {K}.bias, {V}.bias")]


def test_casts_across_the_fp8_boundary_come_before_what_follows_from_them():
    cast = Cast(tensor=f"{K}.weight", parameter=f"{FUSED}.weight", before="bfloat16", after="float8_e4m3fn")
    scale = without(WEIGHT_SCALE, f"{K}.weight_scale")
    found = judged(facts({"weight_scale": scale}, casts=(cast,)), manifest({Q: "fp8", V: "fp8"}))
    assert [(error, where) for error, _, where in found] == [
        ("silent_cast", f"{K}.weight"),
        ("missing_tensor", f"{K}.weight_scale"),
        ("wrong_format", K),
    ]


def test_formats_are_compared_with_the_manifest_or_else_with_the_files():
    bf16 = LAYER.model_copy(update={"method": "UnquantizedLinearMethod", "created_dtype": "bfloat16"})
    assert [f[0] for f in judged(facts(layers=(bf16,)), manifest())] == ["wrong_format"] * 3
    assert judged(facts(layers=(bf16,)), manifest({})) == []
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        assert judged(facts(layers=(bf16,), dtype=dtype)) == []
    assert [f[0] for f in judged(facts(layers=(bf16,)))] == ["wrong_format"] * 3
    # a 16-bit source may be float16
    half = bf16.model_copy(update={"created_dtype": "float16"})
    assert judged(facts(layers=(half,), dtype="float16"), manifest({})) == []


def test_a_manifest_with_other_spellings_of_the_names_still_counts():
    spelled = {m.replace("model.layers", "model.language_model.layers"): "fp8" for m in (Q, K, V)}
    assert judged(facts(), manifest(spelled)) == []
    other = {m.replace("layers.3", "layers.4"): "fp8" for m in (Q, K, V)}
    assert [f[0] for f in judged(facts(), manifest(other))] == ["wrong_format"] * 3


def test_tensors_that_go_nowhere():
    extra = {"model.extra.weight": Tensor(dtype="bfloat16", shape=(2,))}
    head = {"lm_head.weight": Tensor(dtype="bfloat16", shape=(2, 4))}
    buffer = {"model.layers.3.rotary_emb.inv_freq": Tensor(dtype="float32", shape=(2,))}
    tensors = {**facts().tensors, **extra, **head, **buffer}
    found = facts(tensors=tensors, unused=(*extra, *head, *buffer))
    assert judged(found)[0] == ("unexpected_tensor", "error", "model.extra.weight")
    assert judged(found)[1] == ("unexpected_tensor", "error", "lm_head.weight")
    assert len(judged(found)) == 2
    tied = found.model_copy(update={"config": {"tied": True}})
    assert judged(tied)[1] == ("unexpected_tensor", "warning", "lm_head.weight")


def attention(dtype, k_loaded, v_loaded):
    """Return facts with one attention layer."""
    name = "m.layers.3.self_attn.attn"
    parameters = {
        f"{name}.{kind}": Parameter(
            dtype="bfloat16",
            shape=(),
            copies=(Copy(tensor=f"{ATTENTION}.{kind[0]}_proj.{kind}", begin=0, end=1),) if loaded else (),
            unloaded=() if loaded else ((0, 1),),
            values=(0.5 if loaded else -1.0,),
        )
        for kind, loaded in (("k_scale", k_loaded), ("v_scale", v_loaded), ("q_scale", False), ("prob_scale", False))
    }
    layer = Attention(name=name, kv_cache_dtype=dtype, k_scale=0.5, v_scale=0.5)
    return facts(attention=(layer,)).model_copy(update={"parameters": {**facts().parameters, **parameters}})


def test_the_kv_cache_is_what_the_manifest_promises():
    name = "m.layers.3.self_attn.attn"
    assert judged(attention("fp8_e4m3", True, True), manifest(kv=True)) == []
    assert judged(attention("auto", False, False), manifest()) == []
    assert judged(attention("auto", True, True), manifest(kv=True)) == [("wrong_format", "error", name)]
    assert judged(attention("fp8", True, True), manifest()) == [("wrong_format", "error", name)]
    assert judged(attention("auto", True, True), manifest()) == [("unexpected_tensor", "warning", name)]
    assert judged(attention("fp8", True, False), manifest(kv=True)) == [("missing_tensor", "error", f"{name}.v_scale")]
    assert [f[2] for f in judged(attention("fp8", False, False), manifest(kv=True))] == [
        f"{name}.k_scale",
        f"{name}.v_scale",
    ]
    # without a manifest vLLM's reading of the configuration is the promise
    asked = attention("fp8", True, True).model_copy(update={"config": {"kv_cache_promised": "FP8"}})
    assert judged(asked) == []


def failure(kind, message="", line="", step="weights"):
    return Failure(step=step, type=kind, message=message, line=line, traceback=f"Traceback\n{kind}: {message}")


def test_an_exception_is_classified_and_names_the_tensor_it_stopped_at():
    error = failure("AssertionError", line="assert self.data.shape == loaded_weight.shape")
    found = facts(errors=(error,), last_tensor=f"{K}.weight_scale", reached="model")
    assert judged(found, manifest()) == [("shape", "error", f"{K}.weight_scale")]
    assert "assert self.data.shape" in found_in(found)[0].problem
    assert not found.loaded


def test_what_was_never_loaded_says_nothing_where_loading_stopped():
    error = failure("ValueError", "There is no module or parameter named 'x' in Model")
    lost = without(WEIGHT, f"{V}.weight")
    found = judged(facts({"weight": lost}, errors=(error,), unused=(f"{V}.weight",), reached="model"))
    assert [f[0] for f in found] == ["unexpected_tensor"]


def test_facts_explain_an_exception_that_no_rule_knows():
    error = failure("AssertionError", line="assert layer.k_scale > 0.0", step="post-processing")
    found = attention("fp8", False, True).model_copy(update={"errors": (error,), "reached": "weights"})
    assert [f[0] for f in judged(found, manifest(kv=True))] == ["missing_tensor", "runtime_bug"]
    assert [f[0] for f in judged(facts(errors=(failure("ZeroDivisionError", "x"),)))] == ["runtime_bug"]


def test_a_tokenizer_of_nothing():
    empty = Tokenizer(vocabulary=1, text_tokens=0)
    assert judged(facts(tokenizer=empty), manifest()) == [("missing_file", "error", "tokenizer.json")]


def test_a_damaged_manifest_is_a_finding(tmp_path):
    (tmp_path / CheckpointManifest.FILE_NAME).write_text("{")
    result = judge(tmp_path, facts(), version="0", device="cpu")
    assert (result.verdict, result.scheme, result.manifest_sha256) == ("missing_file", None, None)
    manifest().write(tmp_path / CheckpointManifest.FILE_NAME)
    result = judge(tmp_path, facts(), version="0", device="cpu")
    assert (result.verdict, result.scheme) == ("ok", "half")
    assert result.manifest_sha256 == manifest().fingerprint()
    (tmp_path / "zz.safetensors").touch()
    result = judge(tmp_path, facts(), version="0", device="cpu")
    assert [(f.error_class, f.where, f.severity) for f in result.findings] == [
        ("unexpected_file", "zz.safetensors", "error")
    ]


# --- the child, from outside -----------------------------------------------------------------------------------------


def outcome(*found, returncode=0, timed_out=False, error=None, output=""):
    entries = [f.model_dump(mode="json") for f in found]
    result = {"runtime": {"version": "0.32.0", "device": "cpu"}, "error": error, "checkpoints": entries}
    return Outcome(result=result, returncode=returncode, timed_out=timed_out, output=output)


@pytest.fixture
def children(monkeypatch):
    """Children whose outcomes are given; returns `(outcomes to come, jobs that were asked for)`."""
    waiting, asked = [], []

    def run(python, script, job, *, timeout, environment):
        asked.append(([Path(d).name for d in job["directories"]], timeout))
        return waiting.pop(0)

    monkeypatch.setattr(load, "run_child", run)
    monkeypatch.setattr(load, "installed_version", lambda python: "0.32.0")
    return waiting, asked


@pytest.fixture
def three(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    return [tmp_path / name for name in "abc"]


def test_one_child_for_all_and_a_new_one_for_the_rest_when_it_dies(children, three):
    waiting, asked = children
    waiting += [
        outcome(facts(), facts(done=False, reached="model", seconds={}), returncode=-11, output="segmentation fault"),
        outcome(facts()),
    ]
    results = load_all(three, Path("python"), isolated=False, timeout=10)
    assert asked == [(["a", "b", "c"], 30), (["c"], 10)]
    assert [(r.checkpoint, r.verdict) for r in results] == [("a", "ok"), ("b", "runtime_bug"), ("c", "ok")]
    assert "signal 11" in results[1].findings[0].problem
    assert results[1].traceback == "segmentation fault"
    assert results[0].device == "cpu"


def test_a_child_each(children, three):
    waiting, asked = children
    waiting += [
        outcome(facts(done=False, reached="weights", seconds={}), returncode=-9),
        outcome(timed_out=True, returncode=-9, output="slow"),
        outcome(returncode=1, error=failure("ModuleNotFoundError", "No module named 'vllm'").model_dump()),
    ]
    results = load_all(three, Path("python"), timeout=10)
    assert asked == [(["a"], 10), (["b"], 10), (["c"], 10)]
    assert [r.verdict for r in results] == ["out_of_memory", "timeout", "no_runtime"]
    assert results[1].reached == "nothing"


def test_wrong_directories_and_interpreters(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        probe(tmp_path / "none", Path(sys.executable))
    with pytest.raises(BitladderError, match="no Python interpreter"):
        probe(tmp_path, tmp_path / "python")


def test_an_environment_without_vllm_is_a_result(tmp_path):
    result = probe(tmp_path, Path(sys.executable))
    assert (result.verdict, result.version, result.layers) == ("no_runtime", "none", ())
    assert "make vllm-env" in result.findings[0].remedy


# --- the child, from inside, without vLLM ----------------------------------------------------------------------------


def test_every_copy_and_cast_below_the_dispatcher_is_seen():
    model = torch.nn.Linear(4, 6, bias=True, dtype=torch.bfloat16)
    scale = torch.nn.Parameter(torch.full((3,), -1.0), requires_grad=False)
    model.register_parameter("weight_scale", scale)
    codes = torch.nn.Parameter(torch.zeros(2, 2).to(torch.float8_e4m3fn), requires_grad=False)
    model.register_parameter("codes", codes)
    child_watch.poison(model)
    parameters = child_watch.Parameters(model)
    watch = child_watch.Watch(parameters)
    tensors = {"q": torch.ones(2, 4), "v": torch.ones(3, 4), "s": torch.tensor(0.5), "c": torch.ones(2, 2)}
    tensors["unused"] = torch.ones(1)
    with torch.no_grad(), watch:
        for name, tensor in watch.follow(tensors.items()):
            if name == "q":
                model.weight.data.narrow(0, 0, 2).copy_(tensor)
            elif name == "v":
                model.weight[3:6] = tensor
            elif name == "s":
                model.weight_scale.data[1].copy_(tensor)
            elif name == "c":
                model.codes.data.copy_(tensor.to(torch.bfloat16))
    child_watch.inspect_parameters(model, parameters)
    seen = parameters.facts
    assert [(c["tensor"], c["begin"], c["end"]) for c in seen["weight"]["copies"]] == [("q", 0, 8), ("v", 12, 24)]
    assert seen["weight"]["unloaded"] == [(8, 12)]
    assert (seen["weight"]["nan"], seen["weight"]["inf"]) == (0, 0)
    assert seen["bias"]["unloaded"] == [(0, 6)]
    assert seen["weight_scale"]["unloaded"] == [(0, 1), (2, 3)]
    assert seen["weight_scale"]["values"] == ["-1.0", "0.5", "-1.0"]
    assert seen["codes"]["unloaded"] == []
    assert watch.casts == [{"tensor": "c", "parameter": "codes", "before": "bfloat16", "after": "float8_e4m3fn"}]
    assert [name for name in watch.tensors if name not in watch.used] == ["unused"]


def test_loaded_values_that_are_not_finite_are_counted_apart_from_what_was_never_loaded():
    model = torch.nn.Linear(4, 2, bias=False)
    child_watch.poison(model)
    parameters = child_watch.Parameters(model)
    watch = child_watch.Watch(parameters)
    with torch.no_grad(), watch:
        for _, tensor in watch.follow([("w", torch.tensor([[1.0, float("nan"), float("inf"), 2.0]]))]):
            model.weight.data[0:1].copy_(tensor)
    child_watch.inspect_parameters(model, parameters)
    assert parameters.facts["weight"]["unloaded"] == [(4, 8)]
    assert (parameters.facts["weight"]["nan"], parameters.facts["weight"]["inf"]) == (1, 1)


def test_both_signs_of_the_e4m3_nan_are_seen():
    codes = torch.tensor([0x00, 0x7E, 0x7F, 0xFE, 0xFF], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert child_watch.is_nan(codes).tolist() == [False, False, True, False, True]


def test_the_result_file_is_whole_after_each_step(tmp_path):
    import json

    report = child_load.Report(tmp_path / "result.json")
    report.write()
    assert json.loads(report.path.read_text()) == {"runtime": {}, "error": None, "checkpoints": []}
    report.begin()["reached"] = "start"
    report.write()
    assert json.loads(report.path.read_text())["checkpoints"] == [{"reached": "start"}]
    report.finish()
    report.begin()["reached"] = "model"
    report.write()
    assert [c["reached"] for c in json.loads(report.path.read_text())["checkpoints"]] == ["start", "model"]


# --- vLLM's own loader -----------------------------------------------------------------------------------------------


ALL = (*broken_checkpoints.GOOD, *broken_checkpoints.CASES)


@pytest.fixture(scope="module")
def results(tmp_path_factory, vllm_warm, good):
    """`{case: result}` of all cases and of the untouched checkpoints, through one child."""
    directory = tmp_path_factory.mktemp("cases")
    made = {}
    for case in ALL:
        made[case.name] = directory / case.name
        case.make(good[case.base], made[case.name])
    found = load_all([*made.values(), *good.values()], vllm_warm, isolated=False, timeout=60)
    return dict(zip([*made, *(f"good {name}" for name in good)], found, strict=True))


vllm = pytest.mark.timeout(900)  # the first test to run waits for all hundred checkpoints


@vllm
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_each_case_gets_its_class(case, results):
    result = results[case.name]
    assert result.verdict == (case.load or "ok"), [f"{f.error_class} {f.where}: {f.problem}" for f in result.findings]
    warned = {finding.error_class for finding in result.findings if finding.severity == "warning"}
    assert set(case.load_warnings) <= warned
    assert (result.runtime, result.stage, result.device) == ("vllm", "load", "cpu")


@vllm
def test_untouched_checkpoints_pass_and_run_what_they_promise(results, good):
    for name in good:
        result = results[f"good {name}"]
        assert result.findings == (), name
        assert result.traceback is None
        assert result.reached == "inspection"
        linears = [layer for layer in result.layers if ".layers." in layer.name]
        assert len(linears) == 7 * broken_checkpoints.LAYERS
        for layer in result.layers:
            assert layer.promised in (None, layer.format)
            assert (layer.kernel is not None) == (layer.format == "fp8")
            assert layer.dtype == ("float8_e4m3fn" if layer.format == "fp8" else "bfloat16")
    formats = {name: sum(layer.format == "fp8" for layer in results[f"good {name}"].layers) for name in good}
    assert formats["source"] == 0
    assert formats["full"] == formats["kv_full"] == 7 * broken_checkpoints.LAYERS
    assert 0 < formats["top25"] < formats["top50"] < formats["full"]
    assert results["good top50"].scheme == "top50"


@vllm
def test_fused_modules_share_the_runtimes_layer(results):
    layers = {layer.name: layer for layer in results["good full"].layers}
    fused = {layers[f"model.layers.0.self_attn.{name}_proj"].runtime_name for name in "qkv"}
    assert fused == {"language_model.model.layers.0.self_attn.qkv_proj"}
    assert layers["model.layers.0.self_attn.q_proj"].method.startswith("ModelOpt")
    assert layers["visual.blocks.0.attn.qkv"].method == "UnquantizedLinearMethod"


@vllm
def test_an_exception_keeps_its_whole_traceback(results):
    result = results["k_bf16_excluded"]
    assert result.verdict == "mixed_group"
    assert result.traceback.startswith("Traceback (most recent call last)")
    assert "some but not all shards" in result.traceback


@vllm
def test_the_missing_tensor_is_named(results):
    for case, tensor in (
        ("k_scale_missing", "model.layers.0.self_attn.k_proj.weight_scale"),
        ("k_weight_missing", "model.layers.0.self_attn.k_proj.weight"),
        ("bias_missing", "model.layers.0.self_attn.k_proj.bias"),
    ):
        assert [f.where for f in results[case].findings if f.error_class == "missing_tensor"] == [tensor], case


@vllm
def test_alone_a_checkpoint_is_judged_as_among_others(vllm_python, good, results):
    alone = probe(good["top50"], vllm_python)
    assert alone.fingerprint() == results["good top50"].fingerprint()
    assert alone.run.phases[0].seconds > 0


@vllm
def test_a_time_limit_is_a_result(vllm_python, good):
    result = probe(good["top50"], vllm_python, timeout=0.5)
    assert (result.verdict, result.reached) == ("timeout", "nothing")
