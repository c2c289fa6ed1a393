"""The FP8 KV cache, against ModelOpt's own: amax, exported scales, configuration, logits."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bitladder import planning
from bitladder.checkpoints.export import export
from bitladder.errors import MeasurementError, ModelError
from bitladder.evaluation.evaluate import compare
from bitladder.evaluation.reading import cached, load_checkpoint
from bitladder.evaluation.reference import Reference
from bitladder.measured import read_amax
from bitladder.models.kv_layers import cached_layers
from bitladder.models.loading import load_model
from bitladder.records import CheckpointManifest
from bitladder.verification import verify
from conftest import load_text, measure_text, qwen2_5_vl_config, save_model, spec

BATCHES = {"samples": 4, "length": 24, "batch": 2}


@pytest.fixture(scope="module", params=["llama", "qwen"])
def exported(request, llama, text_file, tmp_path_factory):
    """(source, measurement, amax, {name: (scheme, directory)}) with and without an FP8 KV cache."""
    output = tmp_path_factory.mktemp(f"kv-{request.param}")
    source = llama
    if request.param == "qwen":
        source = save_model(transformers.Qwen2_5_VLForConditionalGeneration, qwen2_5_vl_config(), output / "source")
    measurement = measure_text(source, text_file, output, samples=4)
    amax = read_amax(measurement, output)
    specs = [
        spec("half_kv", coverage=0.5, kv_cache="fp8"),
        spec("full", coverage=1.0),
        spec("full_kv", coverage=1.0, kv_cache="fp8"),
    ]
    ladder = {}
    for scheme in planning.plan_all(measurement, specs):
        directory = output / "checkpoints" / scheme.name
        export(scheme, measurement, amax, source, directory)
        ladder[scheme.name] = (scheme, directory)
    return source, measurement, amax, ladder


def modelopt_model(source, batches, modules):
    """ModelOpt's fake-quantised model: every searched module and the KV cache, calibrated by ModelOpt."""
    import modelopt.torch.quantization as mtq

    fp8 = {"num_bits": (4, 3), "axis": None}
    names = [f"{name}.{kind}_quantizer" for name in modules for kind in ("weight", "input")]
    config = [{"quantizer_name": "*", "enable": False}]
    config += [{"quantizer_name": name, "cfg": fp8, "enable": True} for name in [*names, "*[kv]_bmm_quantizer"]]
    config += [{"quantizer_name": "*visual*", "enable": False}]
    model = load_model(source, torch.float32)

    def run(model):
        for batch in batches:
            model(**batch.inputs)

    with torch.no_grad():
        mtq.quantize(model, {"quant_cfg": config, "algorithm": "max"}, forward_loop=run)
    return model.eval()


@pytest.fixture(scope="module")
def theirs(exported, llama, text_file):
    source, measurement, _, _ = exported
    batches = load_text(llama, text_file, **BATCHES).batches
    return modelopt_model(source, batches, [m.name for g in measurement.groups for m in g.modules])


def test_amax_equals_modelopts(exported, theirs):
    _, measurement, amax, _ = exported
    layers = cached_layers(measurement.groups)
    assert len(layers) == sum(group.name.endswith("qkv_proj") for group in measurement.groups) > 0
    for layer in layers:
        attention = theirs.get_submodule(layer.key.name.rpartition(".")[0])
        key, value = (amax[name] for name in layer.amax_names)
        assert float(key) == float(attention.k_bmm_quantizer.amax)
        assert float(value) == float(attention.v_bmm_quantizer.amax)


def test_scales_and_configs_equal_modelopts_export(exported, theirs, tmp_path):
    import copy

    from modelopt.torch.export import export_hf_checkpoint

    _, _, _, ladder = exported
    scheme, ours = ladder["full_kv"]
    export_hf_checkpoint(copy.deepcopy(theirs), dtype=torch.bfloat16, export_dir=tmp_path)
    mine, other = (
        {k: v for k, v in load_all(d).items() if k.endswith(("k_scale", "v_scale"))} for d in (ours, tmp_path)
    )
    assert set(mine) == set(other)
    assert len(mine) == 2 * sum(name.endswith("qkv_proj") for name in scheme.formats)
    for name, scale in mine.items():
        assert (scale.dtype, scale.shape) == (other[name].dtype, other[name].shape)
        assert float(scale) == float(other[name])
    quantisation = [json.loads((d / "hf_quant_config.json").read_text())["quantization"] for d in (ours, tmp_path)]
    assert quantisation[0]["kv_cache_quant_algo"] == quantisation[1]["kv_cache_quant_algo"] == "FP8"
    sections = [json.loads((d / "config.json").read_text())["quantization_config"] for d in (ours, tmp_path)]
    assert sections[0]["kv_cache_scheme"] == sections[1]["kv_cache_scheme"]


def load_all(directory):
    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


def test_logits_equal_modelopts_fake_quantisation(exported, theirs, llama, text_file):
    """Within 2% of what the KV cache's rounding itself does (rms); typically 10⁻⁴."""
    source, measurement, amax, ladder = exported
    for group in measurement.groups:
        for module in group.modules:
            linear = theirs.get_submodule(module.name)
            linear.weight_quantizer.amax = amax[f"{module.name}.weight_amax"]
            linear.input_quantizer.amax = amax[f"{module.name}.input_amax"]
    ours = load_checkpoint(ladder["full_kv"][1])
    without = load_checkpoint(ladder["full"][1])
    ratios = []
    with torch.no_grad():
        for batch in load_text(llama, text_file, samples=4, length=20, batch=1).batches:
            a = ours(**batch.inputs, **cached(ours)).logits
            b, c = theirs(**batch.inputs).logits, without(**batch.inputs).logits
            ratios.append(float((a - b).pow(2).mean().sqrt() / (b - c).pow(2).mean().sqrt()))
    assert sorted(ratios)[len(ratios) // 2] < 0.02


def test_evaluation_includes_the_cache(exported, llama, text_file):
    source, _, _, ladder = exported
    held_out = load_text(llama, text_file, samples=4, length=20)
    with Reference.compute(source, held_out) as reference:
        kl = {
            name: next(r for r in compare(reference, ladder[name][1], name)[0] if r.metric == "kl").value
            for name in ("full", "full_kv")
        }
    assert kl["full"] != kl["full_kv"]


def test_generating_step_by_step_reads_back_what_was_stored(exported):
    """Greedy generation with the cache gives the tokens that whole forwards with the cache give."""
    source, _, _, ladder = exported
    model = load_checkpoint(ladder["full_kv"][1])
    ids = torch.arange(7, 15).view(1, 8)
    with torch.no_grad():
        steps = model.generate(
            input_ids=ids,
            **cached(model),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
        )
        for _ in range(6):
            logits = model(input_ids=ids, **cached(model)).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(steps, ids)


def test_verification_accepts_all_and_tells_them_apart(exported):
    source, measurement, amax, ladder = exported
    result = verify([s for s, _ in ladder.values()], measurement, amax, source, {n: d for n, (_, d) in ladder.items()})
    assert result.ok, [f for c in result.checkpoints for f in c.findings] + [
        f for p in result.pairs for f in p.findings
    ]
    pair = next(p for p in result.pairs if (p.first, p.second) == ("full", "full_kv"))
    layers = sum(name.endswith("qkv_proj") for name in ladder["full"][0].formats)
    assert pair.modules_expected == pair.modules_differing == 2 * layers
    assert ladder["full"][0].nested_in == ("full_kv",)


def test_manifest_holds_the_scales(exported):
    _, _, _, ladder = exported
    _, directory = ladder["half_kv"]
    manifest = CheckpointManifest.read(directory / CheckpointManifest.FILE_NAME)
    stored = load_all(directory)
    assert manifest.kv_cache_format == "fp8"
    assert {s.tensor: s.scale for s in manifest.kv_scales} == {
        name: float(value) for name, value in stored.items() if name.endswith(("k_scale", "v_scale"))
    }


def change(directory, destination, edit):
    """Copy a checkpoint and change its (first) weight file's tensors."""
    shutil.copytree(directory, destination)
    path = sorted(destination.glob("*.safetensors"))[0]
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return destination


def first_key_scale(tensors):
    return next(name for name in sorted(tensors) if name.endswith("k_scale"))


@pytest.mark.parametrize(
    ("edit", "problem", "refusal"),
    [
        (lambda t: t.pop(first_key_scale(t)), "missing", "has no partner"),
        (lambda t: t[first_key_scale(t)].zero_(), "finite and positive", "not one positive float32"),
        (lambda t: t[first_key_scale(t)].mul_(2), "what calibration saw gives", None),
    ],
)
def test_damaged_scales_are_found(exported, tmp_path, edit, problem, refusal):
    source, measurement, amax, ladder = exported
    scheme, directory = ladder["full_kv"]
    damaged = change(directory, tmp_path / "damaged", edit)
    result = verify([scheme], measurement, amax, source, {"full_kv": damaged})
    assert any(problem in f.problem and (f.tensor or "").endswith("k_scale") for f in result.checkpoints[0].findings)
    if refusal:
        with pytest.raises(ModelError, match=refusal):
            load_checkpoint(damaged)


def test_scales_that_no_scheme_asked_for_are_found(exported, tmp_path):
    source, measurement, amax, ladder = exported
    scheme, _ = ladder["full"]
    result = verify([scheme], measurement, amax, source, {"full": ladder["full_kv"][1]})
    problems = [f.problem for f in result.checkpoints[0].findings]
    assert any("kv_cache_quant_algo is 'FP8'" in problem for problem in problems)
    assert any("kv_cache_scheme is" in problem for problem in problems)
    assert any("neither in the source nor asked for" in problem for problem in problems)


@pytest.mark.parametrize("setting", [{}, {"kv_cache_scheme": None}])
def test_a_checkpoint_without_its_cache_setting_is_refused(exported, tmp_path, setting):
    _, _, _, ladder = exported
    shutil.copytree(ladder["full_kv"][1], tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["kv_cache_scheme"]
    config["quantization_config"] |= setting
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="asks for no FP8 KV cache"):
        load_checkpoint(tmp_path / "x")


def test_a_measurement_without_cache_amax_is_refused(exported, tmp_path):
    source, measurement, amax, ladder = exported
    less = {name: value for name, value in amax.items() if not name.endswith(".v_amax")}
    with pytest.raises(MeasurementError, match="no amax of keys and values"):
        export(ladder["full_kv"][0], measurement, less, source, tmp_path / "x")
    assert not (tmp_path / "x").exists()
