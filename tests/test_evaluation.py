"""Evaluation reads the files, and gives what ModelOpt's and transformers' own code give."""

import json
import math
import shutil
import statistics
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bitladder
from bitladder import planning
from bitladder.checkpoints.export import export
from bitladder.data.batches import Batch, DataSet
from bitladder.data.processors import load_processor
from bitladder.data.samples import load_data
from bitladder.errors import ModelError, StaleRecord
from bitladder.evaluation import evaluate, reading
from bitladder.evaluation import reference as reference_module
from bitladder.evaluation.evaluate import compare, evaluate_checkpoint
from bitladder.evaluation.metrics import Sums, _kl
from bitladder.evaluation.reading import FakeQuantLinear
from bitladder.evaluation.reference import Reference, compare_with
from bitladder.evaluation.task import Task
from bitladder.formats import grids
from bitladder.measured import read_amax
from bitladder.models import weights
from bitladder.models.loading import load_model
from bitladder.models.target import find_target
from bitladder.recipe import DataSpec
from bitladder.records import BF16, CheckpointManifest
from bitladder.runinfo import no_progress
from conftest import load_text, qwen2_5_vl_config, save_model, spec


@pytest.fixture(scope="module")
def ladder(llama, measured, tmp_path_factory):
    """{name: (scheme, directory)} of two checkpoints."""
    measurement, directory = measured
    amax = read_amax(measurement, directory)
    output = tmp_path_factory.mktemp("ladder")
    schemes = planning.plan_all(measurement, [spec("half", coverage=0.5), spec("full", coverage=1.0)])
    for scheme in schemes:
        export(scheme, measurement, amax, llama, output / scheme.name)
    return {scheme.name: (scheme, output / scheme.name) for scheme in schemes}


@pytest.fixture(scope="module")
def data(llama, text_file):
    return load_text(llama, text_file, samples=5, length=40)


@pytest.fixture(scope="module")
def reference(llama, data):
    with Reference.compute(llama, data) as computed:
        yield computed


def modelopt_fake_quant(llama, measured, scheme):
    """ModelOpt's own fake-quantised model for a scheme, with the measurement's amax values."""
    import modelopt.torch.quantization as mtq

    measurement, directory = measured
    amax = read_amax(measurement, directory)
    model = load_model(llama, torch.float32)
    modules = [m.name for g in measurement.groups if scheme.formats[g.name] != BF16 for m in g.modules]
    patterns = [{"quantizer_name": "*", "enable": False}]
    for name in modules:
        for kind in ("weight", "input"):
            cfg = {"num_bits": (4, 3), "axis": None}
            patterns.append({"quantizer_name": f"{name}.{kind}_quantizer", "cfg": cfg})
    ids = torch.arange(8).view(1, 8)
    mtq.quantize(model, {"quant_cfg": patterns, "algorithm": "max"}, forward_loop=lambda m: m(input_ids=ids))
    for name in modules:
        linear = model.get_submodule(name)
        linear.weight_quantizer.amax = amax[f"{name}.weight_amax"]
        linear.input_quantizer.amax = amax[f"{name}.input_amax"]
        assert linear.input_quantizer.is_enabled
    return model.eval()


@pytest.mark.parametrize("name", ["half", "full"])
def test_logits_equal_modelopts_fake_quantisation(name, ladder, llama, measured, data):
    """Within 1e-4 of what quantisation itself does (rms), as scales are stored as amax / 448 and products differ in
    the last bits; within 2% in a batch where an activation next to a rounding boundary falls on the other side."""
    ratios = []
    scheme, directory = ladder[name]
    ours = reading.load_checkpoint(directory)
    theirs = modelopt_fake_quant(llama, measured, scheme)
    plain = load_model(llama, torch.float32)
    with torch.no_grad():
        for batch in data.batches:
            a, b, c = (model(**batch.inputs).logits for model in (ours, theirs, plain))
            difference, effect = (a - b).pow(2).mean().sqrt(), (b - c).pow(2).mean().sqrt()
            ratios.append(float(difference / effect))
    assert max(ratios) < 0.02
    assert statistics.median(ratios) < 1e-4


def test_transformers_own_loader_would_be_wrong(ladder, llama, data):
    """The reason for a loader of our own: scales dropped without a word."""
    scheme, directory = ladder["full"]
    assert scheme.coverage == 1.0
    ours = reading.load_checkpoint(directory)
    state = {
        name: tensor.to(torch.float32)
        for name, tensor in load_file(directory / "model.safetensors").items()
        if not name.endswith("_scale")
    }
    naive = load_model(directory, torch.float32, state_dict=state)
    batch = data.batches[0]
    with torch.no_grad():
        assert not torch.allclose(ours(**batch.inputs).logits, naive(**batch.inputs).logits, atol=0.1)


def test_metrics_equal_an_independent_computation(reference, ladder, llama, data):
    _, directory = ladder["full"]
    result = evaluate_checkpoint([reference], directory)
    quantised, original = reading.load_checkpoint(directory), load_model(llama, torch.float32)
    kl, nll, agree, losses, tokens = 0.0, 0.0, 0, 0.0, 0
    with torch.no_grad():
        for batch in data.batches:
            p = original(**batch.inputs).logits[:, :-1].double().log_softmax(-1)
            output = quantised(**batch.inputs, labels=batch.labels)
            q = output.logits[:, :-1].double().log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum())
            nll -= float(q.gather(-1, batch.labels[:, 1:, None]).sum())
            agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            losses += float(output.loss) * batch.loss_tokens
            tokens += batch.loss_tokens
    assert result.result("kl").value == pytest.approx(kl / tokens, rel=1e-4)
    assert result.result("perplexity").value == pytest.approx(math.exp(nll / tokens), rel=1e-6)
    assert result.result("perplexity").value == pytest.approx(math.exp(losses / tokens), rel=1e-5)
    assert result.result("top1_agreement").value == pytest.approx(agree / tokens)
    assert result.result("kl").samples == 5


def test_kl_of_the_original_to_itself_is_zero(reference, llama, data):
    model = load_model(llama, torch.float32)
    with torch.no_grad():
        sums = compare_with(model, data, reference.store, "cpu", "itself", lambda *_: None, "x")
    assert sums.ratio(sums.kl) == (0.0, 0.0)
    assert sums.ratio(sums.agree)[0] == 1.0
    assert sums.perplexity()[0] == reference.perplexity


def test_every_held_out_set_is_evaluated_on_one_read_of_the_files(llama, text_file, reference, ladder, monkeypatch):
    directory, loaded, phases = ladder["half"][1], [], []
    alone = evaluate_checkpoint([reference], directory)
    other = load_text(llama, text_file, samples=3, length=24)
    load = reading.load_checkpoint

    def note(phase, *_):
        assert phase.startswith("load ") or not torch.is_grad_enabled()
        phases.append(phase)

    with Reference.compute(llama, other, split="short") as short:
        wanted = compare(short, directory, "half")[0]
        monkeypatch.setattr(evaluate, "load_checkpoint", lambda *a, **k: loaded.append(a) or load(*a, **k))
        both = evaluate_checkpoint([reference, short], directory, note)
    assert len(loaded) == 1
    assert list(both.data) == ["held_out", "short"]
    assert both.data["short"] == other.summary
    assert {result.split for result in wanted} == {"short"}
    assert both.results == (*alone.results, *wanted)
    assert both.result("kl").value != both.result("kl", "short").value
    assert list(dict.fromkeys(phases)) == ["load half", "evaluate half", "evaluate half on short"]


def test_more_fp8_is_further_away_and_bf16_is_the_floor(reference, ladder):
    half, full = (evaluate_checkpoint([reference], ladder[name][1]) for name in ("half", "full"))
    assert 0 < half.result("kl").value < full.result("kl").value
    assert half.result("kl").noise_floor == full.result("kl").noise_floor > 0
    assert half.result("kl").standard_error > 0
    assert half.result("perplexity").reference == reference.perplexity


def test_standard_error_is_that_of_a_ratio_over_rows():
    sums = Sums(tokens=[10, 20, 30], kl=[1.0, 4.0, 3.0])
    mean, error = sums.ratio(sums.kl)
    assert mean == pytest.approx(8 / 60)
    squares = sum((x - mean * n) ** 2 for x, n in zip(sums.kl, sums.tokens, strict=True))
    assert error == pytest.approx(math.sqrt(3 / 2 * squares) / 60)
    assert Sums(tokens=[10], kl=[1.0]).ratio([1.0])[1] is None


def test_positions_without_a_label_do_not_count(llama, data, ladder):
    def masked(token):
        batches = []
        for batch in data.batches:
            inputs, labels = dict(batch.inputs), batch.labels.clone()
            labels[:, 20:] = -100
            inputs["input_ids"] = inputs["input_ids"].clone()
            inputs["input_ids"][:, 21:] = token  # after the last counted position: causal, so without effect
            batches.append(Batch(inputs, labels))
        return DataSet(tuple(batches), data.summary)

    values = []
    for token in (3, 7):
        with Reference.compute(llama, masked(token)) as reference:
            result = evaluate_checkpoint([reference], ladder["half"][1])
            values.append([r.value for r in result.results])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_reference_on_disk_gives_the_same(llama, data, ladder, reference, monkeypatch):
    wanted = evaluate_checkpoint([reference], ladder["half"][1]).results
    monkeypatch.setattr(reference_module, "MAX_REFERENCE_BYTES_IN_MEMORY", 0)
    with Reference.compute(llama, data) as stored:
        directory = stored.store.directory
        assert directory is not None
        assert list(directory.iterdir())
        assert evaluate_checkpoint([stored], ladder["half"][1]).results == wanted
    assert not directory.exists()


def edited(directory, destination, change):
    shutil.copytree(directory, destination)
    tensors = load_file(destination / "model.safetensors")
    change(tensors, next(name for name, t in tensors.items() if t.dtype == torch.float8_e4m3fn))
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


def fp8_embedding(tensors):
    name = "model.embed_tokens"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    tensors.update({f"{name}.weight_scale": torch.ones(()), f"{name}.input_scale": torch.ones(())})


DAMAGE = {
    "weight_scale missing": (lambda t, n: t.pop(n.replace(".weight", ".weight_scale")), "weight_scale is missing"),
    "input_scale missing": (lambda t, n: t.pop(n.replace(".weight", ".input_scale")), "input_scale is missing"),
    "scale without codes": (lambda t, n: t.update({n: t[n].bfloat16()}), "belongs to no weight whose format has it"),
    "weight missing": (lambda t, n: t.pop("model.norm.weight"), "missing"),
    "extra tensor": (lambda t, n: t.update(spare=torch.ones(2)), "left over"),
    "zero scale": (lambda t, n: t[n.replace(".weight", ".input_scale")].zero_(), "not one positive float32"),
    "scale of the KV cache": (
        lambda t, n: t.update({"model.layers.0.self_attn.k_scale": torch.ones(())}),
        "asks for no FP8 KV cache",
    ),
    "FP8 embedding": (lambda t, n: fp8_embedding(t), "no linear module's weight"),
    "NaN codes": (lambda t, n: t.update({n: (t[n].view(torch.uint8) | 0x7F).view(torch.float8_e4m3fn)}), "NaN"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused(kind, ladder, tmp_path):
    change, message = DAMAGE[kind]
    directory = edited(ladder["half"][1], tmp_path / "x", change)
    with pytest.raises(ModelError, match=message) as caught:
        reading.load_checkpoint(directory)
    assert str(directory) in str(caught.value)
    if kind not in ("weight missing", "extra tensor"):  # those two are found by transformers
        assert f"{directory / 'model.safetensors'}: model." in str(caught.value)
        assert "export this scheme again" in str(caught.value)


@pytest.mark.parametrize("content", [None, "{"])
def test_missing_or_damaged_config_is_refused(content, ladder, tmp_path):
    shutil.copytree(ladder["half"][1], tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        reading.load_checkpoint(tmp_path / "x")


def test_manifest_of_other_files_is_refused(reference, ladder, tmp_path):
    """Before the run, and although the number of modules is right."""
    shutil.copytree(ladder["half"][1], tmp_path / "x")
    path = tmp_path / "x" / CheckpointManifest.FILE_NAME
    manifest = CheckpointManifest.read(path)
    other = manifest.modules[0].model_copy(update={"tensor": "model.layers.9.mlp.down_proj.weight"})
    manifest.model_copy(update={"modules": (other, *manifest.modules[1:])}).write(path)
    with pytest.raises(StaleRecord, match="disagree whether"):
        evaluate_checkpoint([reference], tmp_path / "x")


def test_outputs_without_a_finite_perplexity_are_refused(reference, ladder, tmp_path):
    directory = edited(ladder["half"][1], tmp_path / "x", lambda t, n: t["model.norm.weight"].fill_(3e4))
    with pytest.raises(ModelError, match="no perplexity can be stated"):
        evaluate_checkpoint([reference], directory)


def test_missing_quantization_config_is_refused(ladder, tmp_path):
    shutil.copytree(ladder["half"][1], tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no quantization_config"):
        reading.load_checkpoint(tmp_path / "x")


def test_inf_in_the_outputs_is_refused(reference, ladder, tmp_path):
    def change(tensors, name):
        tensors[name.replace(".weight", ".weight_scale")].fill_(1e38)

    directory = edited(ladder["half"][1], tmp_path / "x", change)
    with pytest.raises(ModelError, match="NaN or Inf|holds NaN"):
        evaluate_checkpoint([reference], directory)


def by_hand(source, destination, amax):
    """A checkpoint as ModelOpt lays it out, shard by shard, from `{module: (tensor, weight amax, input amax)}`."""
    shutil.copytree(source, destination)
    of_tensor = {tensor: (w, x) for tensor, w, x in amax.values()}
    placed = {}
    for file in weights.WeightFiles.open(source).files:
        tensors = load_file(destination / file)
        for name in list(tensors):
            if name in of_tensor:
                weight_amax, input_amax = of_tensor[name]
                prefix = name.removesuffix(".weight")
                tensors[name] = grids.quantise(tensors[name], weight_amax)
                tensors[f"{prefix}.weight_scale"] = grids.scale_of(weight_amax)
                tensors[f"{prefix}.input_scale"] = grids.scale_of(input_amax)
        save_file(tensors, destination / file, metadata={"format": "pt"})
        placed.update(dict.fromkeys(tensors, file))
    if (source / weights.INDEX_FILE).exists():
        (destination / weights.INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    config = json.loads((destination / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    (destination / "config.json").write_text(json.dumps(config))
    return destination


def modelopt_with_shared_amax(source, batches):
    """ModelOpt's FP8_DEFAULT_CFG on the language model alone, amax shared in groups: (model, amax for `by_hand`)."""
    import modelopt.torch.quantization as mtq

    model, groups = load_model(source, torch.float32), find_target(source).groups
    wanted = {f"{m.name}.{kind}_quantizer" for g in groups for m in g.modules for kind in ("weight", "input")}

    def run(model):
        for batch in batches:
            model(**batch.inputs)

    with torch.no_grad():
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, forward_loop=run)
    mtq.disable_quantizer(model, lambda name: name not in wanted)
    amax = {}
    for group in groups:
        linears = [model.get_submodule(m.name) for m in group.modules]
        values = [torch.stack([getattr(x, f"{k}_quantizer").amax for x in linears]).max() for k in ("weight", "input")]
        for module, linear in zip(group.modules, linears, strict=True):
            # as a scale stores it: amax / 448 · 448 may differ in the last bit
            stored = [grids.scale_of(value) * grids.E4M3_MAX for value in values]
            linear.weight_quantizer.amax, linear.input_quantizer.amax = stored
            amax[module.name] = (module.tensor, *values)
    return model.eval(), amax


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_model(
        transformers.Qwen2_5_VLForConditionalGeneration, qwen2_5_vl_config(), tmp_path_factory.mktemp("qwen")
    )


@pytest.mark.parametrize("name", ["sharded_llama", "qwen"])
def test_files_made_by_hand_equal_modelopts_fake_quantisation(name, request, text_file, tmp_path):
    """Typically within 1e-5 of the largest logit; at most 2% where an activation rounds to the other side."""
    source = request.getfixturevalue(name)
    batches = load_text(request.getfixturevalue("llama"), text_file, samples=5, length=32, batch=1).batches
    theirs, amax = modelopt_with_shared_amax(source, batches)
    ours = reading.load_checkpoint(by_hand(source, tmp_path / "x", amax))
    quantised = {path for path, module in ours.named_modules() if isinstance(module, FakeQuantLinear)}
    assert quantised == set(amax)
    differences = []
    with torch.no_grad():
        for path in quantised:
            linear = theirs.get_submodule(path)
            torch.testing.assert_close(
                ours.get_submodule(path).weight, linear.weight_quantizer(linear.weight), rtol=3e-7, atol=0
            )
        for batch in batches:
            a, b = ours(**batch.inputs).logits, theirs(**batch.inputs).logits
            differences.append(float((a - b).abs().max() / b.abs().max()))
    assert statistics.median(differences) < 1e-5
    assert max(differences) < 0.02


def test_a_checkpoint_generates_with_the_settings_of_the_original(ladder, llama, tmp_path):
    settings = {"eos_token_id": [0, 3], "repetition_penalty": 1.05}
    models = []
    for directory, load in ((llama, lambda d: load_model(d, torch.float32)), (ladder["half"][1], None)):
        copy = tmp_path / str(len(models))
        shutil.copytree(directory, copy)
        (copy / "generation_config.json").write_text(json.dumps(settings))
        models.append((load or reading.load_checkpoint)(copy))
    original, quantised = (model.generation_config for model in models)
    assert quantised.to_diff_dict() == original.to_diff_dict()
    assert quantised.repetition_penalty == 1.05
    assert quantised.eos_token_id == [0, 3]
    (tmp_path / "1" / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="generation_config"):
        reading.load_checkpoint(tmp_path / "1")


def test_answers_are_greedy_whatever_the_model_says_of_generation():
    """A least length would make every answer wrong, beams another one, stop strings an error after the long work."""
    demo = Path(bitladder.__file__).parent / "demo"
    directory = demo / "qwen2_5_vl_digits"
    processor = load_processor(directory)
    spec = DataSpec(kind="image_text", path=str(demo / "data" / "heldout.jsonl"))
    data = load_data(spec, processor, samples=4, sequence_length=64, batch_size=4, seed=0)
    task = Task.exact_match(data.samples, processor)
    model = load_model(directory, torch.float32)

    def right(**settings):
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
        model.generation_config.update(**settings)
        return task.right(model, "cpu", no_progress, "answers").count("1")

    greedy = right()
    assert greedy >= 2
    odd = {"min_new_tokens": 50, "num_beams": 3, "guidance_scale": 2.0, "stop_strings": ["e"], "bad_words_ids": "x"}
    assert right(**odd, forced_eos_token_id="x", suppress_tokens=list(range(300)), max_time="x") == greedy
    assert right(repetition_penalty=1e6) < greedy, "servers take the penalty"
    assert right(eos_token_id=[0, 1, *range(2, 300)]) < greedy, "and where to stop"


def test_noise_floor_is_the_original_loaded_in_bf16(reference, llama, data):
    """Not the float32 model cast: that would round the rotary frequencies, which serving keeps in float32."""
    low, high = load_model(llama, torch.bfloat16), load_model(llama, torch.float32)
    kl, tokens = 0.0, 0
    with torch.no_grad():
        for batch in data.batches:
            p, q = (m(**batch.inputs).logits[:, :-1].double().log_softmax(-1) for m in (high, low))
            kl, tokens = kl + float((p.exp() * (p - q)).sum()), tokens + batch.loss_tokens
    assert reference.bf16.ratio(reference.bf16.kl)[0] == pytest.approx(kl / tokens, rel=1e-3)


@pytest.mark.parametrize("offset", [0.0, 2.0**-18])  # a multiple of the float32 step of these log-probabilities
def test_small_kl_survives_the_rounding_of_the_normalisers(offset):
    """Σ p · (log p - log q) alone would be off by the whole error of a normaliser: 8% of this KL."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(50, 5_000)
    other = logits + 0.01 * torch.randn_like(logits)
    p, q = (x.double().log_softmax(-1) for x in (logits, other))
    exact = float((p.exp() * (p - q)).sum(-1).mean())
    assert 2e-5 < exact < 1e-4
    ours = _kl(logits.log_softmax(-1), other.log_softmax(-1) + offset)
    assert float(ours.mean()) == pytest.approx(exact, rel=1e-3)
    assert _kl(p.float(), p.float()).abs().max() == 0


def test_an_interrupted_reference_leaves_no_files(llama, data, monkeypatch, tmp_path):
    def stop(phase, *_):
        if "BF16" in phase:
            assert list(tmp_path.iterdir())
            raise KeyboardInterrupt

    monkeypatch.setattr(reference_module, "MAX_REFERENCE_BYTES_IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        Reference.compute(llama, data, progress=stop)
    assert not list(tmp_path.iterdir())
