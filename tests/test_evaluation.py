"""Evaluation reads the files, and gives what ModelOpt's and transformers' own code give."""

import json
import math
import shutil
import statistics

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitladder import checkpoint, evaluation, planning, sensitivity, targets
from bitladder.calibration import Batch, DataSet
from bitladder.errors import ModelError
from bitladder.records import BF16
from conftest import load_text, spec


@pytest.fixture(scope="module")
def ladder(llama, measured, tmp_path_factory):
    """{name: (scheme, directory)} of two checkpoints."""
    measurement, directory = measured
    amax = sensitivity.read_amax(measurement, directory)
    output = tmp_path_factory.mktemp("ladder")
    schemes = planning.plan_all(measurement, [spec("half", coverage=0.5), spec("full", coverage=1.0)])
    for scheme in schemes:
        checkpoint.export(scheme, measurement, amax, llama, output / scheme.name)
    return {scheme.name: (scheme, output / scheme.name) for scheme in schemes}


@pytest.fixture(scope="module")
def data(llama, text_file):
    return load_text(llama, text_file, samples=5, length=40)


@pytest.fixture(scope="module")
def reference(llama, data):
    with evaluation.Reference.compute(llama, data) as computed:
        yield computed


def modelopt_fake_quant(llama, measured, scheme):
    """ModelOpt's own fake-quantised model for a scheme, with the measurement's amax values."""
    import modelopt.torch.quantization as mtq

    measurement, directory = measured
    amax = sensitivity.read_amax(measurement, directory)
    model = targets.load_model(llama, torch.float32)
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
    ours = evaluation.load_checkpoint(directory)
    theirs = modelopt_fake_quant(llama, measured, scheme)
    plain = targets.load_model(llama, torch.float32)
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
    ours = evaluation.load_checkpoint(directory)
    state = {
        name: tensor.to(torch.float32)
        for name, tensor in load_file(directory / "model.safetensors").items()
        if not name.endswith("_scale")
    }
    naive = targets.load_model(directory, torch.float32, state_dict=state)
    batch = data.batches[0]
    with torch.no_grad():
        assert not torch.allclose(ours(**batch.inputs).logits, naive(**batch.inputs).logits, atol=0.1)


def test_metrics_equal_an_independent_computation(reference, ladder, llama, data):
    _, directory = ladder["full"]
    result = evaluation.evaluate_checkpoint(reference, directory)
    quantised, original = evaluation.load_checkpoint(directory), targets.load_model(llama, torch.float32)
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
    assert result.result("kl").value == pytest.approx(kl / tokens, rel=1e-3)
    assert result.result("perplexity").value == pytest.approx(math.exp(nll / tokens), rel=1e-6)
    assert result.result("perplexity").value == pytest.approx(math.exp(losses / tokens), rel=1e-5)
    assert result.result("top1_agreement").value == pytest.approx(agree / tokens)
    assert result.result("kl").samples == 5


def test_kl_of_the_original_to_itself_is_zero(reference, llama, data):
    model = targets.load_model(llama, torch.float32)
    with torch.no_grad():
        sums = evaluation._compare(model, data, reference.store, "cpu", "itself", lambda *_: None, "x")
    assert sums.ratio(sums.kl) == (0.0, 0.0)
    assert sums.ratio(sums.agree)[0] == 1.0
    assert sums.perplexity()[0] == reference.perplexity


def test_more_fp8_is_further_away_and_bf16_is_the_floor(reference, ladder):
    half, full = (evaluation.evaluate_checkpoint(reference, ladder[name][1]) for name in ("half", "full"))
    assert 0 < half.result("kl").value < full.result("kl").value
    assert half.result("kl").noise_floor == full.result("kl").noise_floor > 0
    assert half.result("kl").standard_error > 0
    assert half.result("perplexity").reference == reference.perplexity


def test_standard_error_is_that_of_a_ratio_over_rows():
    sums = evaluation._Sums(tokens=[10, 20, 30], kl=[1.0, 4.0, 3.0])
    mean, error = sums.ratio(sums.kl)
    assert mean == pytest.approx(8 / 60)
    squares = sum((x - mean * n) ** 2 for x, n in zip(sums.kl, sums.tokens, strict=True))
    assert error == pytest.approx(math.sqrt(3 / 2 * squares) / 60)
    assert evaluation._Sums(tokens=[10], kl=[1.0]).ratio([1.0])[1] is None


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
        with evaluation.Reference.compute(llama, masked(token)) as reference:
            result = evaluation.evaluate_checkpoint(reference, ladder["half"][1])
            values.append([r.value for r in result.results])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_reference_on_disk_gives_the_same(llama, data, ladder, reference, monkeypatch):
    wanted = evaluation.evaluate_checkpoint(reference, ladder["half"][1]).results
    monkeypatch.setattr(evaluation, "MAX_REFERENCE_BYTES_IN_MEMORY", 0)
    with evaluation.Reference.compute(llama, data) as stored:
        directory = stored.store.directory
        assert directory is not None
        assert list(directory.iterdir())
        assert evaluation.evaluate_checkpoint(stored, ladder["half"][1]).results == wanted
    assert not directory.exists()


def edited(directory, destination, change):
    shutil.copytree(directory, destination)
    tensors = load_file(destination / "model.safetensors")
    change(tensors, next(name for name, t in tensors.items() if t.dtype == torch.float8_e4m3fn))
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


DAMAGE = {
    "weight_scale missing": (lambda t, n: t.pop(n.replace(".weight", ".weight_scale")), "weight_scale is missing"),
    "input_scale missing": (lambda t, n: t.pop(n.replace(".weight", ".input_scale")), "input_scale is missing"),
    "scale without codes": (lambda t, n: t.update({n: t[n].bfloat16()}), "belongs to no FP8 weight"),
    "weight missing": (lambda t, n: t.pop("model.norm.weight"), "missing"),
    "extra tensor": (lambda t, n: t.update(spare=torch.ones(2)), "left over"),
    "zero scale": (lambda t, n: t[n.replace(".weight", ".input_scale")].zero_(), "not one positive float32"),
    "NaN codes": (lambda t, n: t.update({n: (t[n].view(torch.uint8) | 0x7F).view(torch.float8_e4m3fn)}), "NaN"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused(kind, ladder, tmp_path):
    change, message = DAMAGE[kind]
    directory = edited(ladder["half"][1], tmp_path / "x", change)
    with pytest.raises(ModelError, match=message):
        evaluation.load_checkpoint(directory)


def test_missing_quantization_config_is_refused(ladder, tmp_path):
    shutil.copytree(ladder["half"][1], tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no quantization_config"):
        evaluation.load_checkpoint(tmp_path / "x")


def test_inf_in_the_outputs_is_refused(reference, ladder, tmp_path):
    def change(tensors, name):
        tensors[name.replace(".weight", ".weight_scale")].fill_(1e38)

    directory = edited(ladder["half"][1], tmp_path / "x", change)
    with pytest.raises(ModelError, match="NaN or Inf|holds NaN"):
        evaluation.evaluate_checkpoint(reference, directory)
