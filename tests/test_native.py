"""The native engine against ModelOpt: the same amax values, the same scores, on text and on pictures."""

import pytest
import torch
from safetensors.torch import load_file

from bitladder import calibration, sensitivity, targets
from bitladder.errors import MeasurementError, RecipeError
from bitladder.recipe import DataSpec, MeasureSpec, parse_recipe
from bitladder.report.content import rank_correlation
from bitladder.sensitivity import native
from conftest import load_text, measure_text, source_of
from test_positions import DEMO, MODEL

WITHIN = 0.02  # of ModelOpt's score, for every group
ARITHMETIC = 1e-4  # float32 in another order


def measured_by(engine, directory, data, output, **settings):
    output.mkdir(parents=True, exist_ok=True)
    spec = MeasureSpec(engine=engine, **settings)
    return sensitivity.measure(directory, source_of(directory), targets.find_target(directory), data, spec, output)


def assert_same_scores(ours, theirs, tolerance=WITHIN):
    assert [(c.group, c.format) for c in ours.candidates] == [(c.group, c.format) for c in theirs.candidates]
    for mine, other in zip(ours.candidates, theirs.candidates, strict=True):
        assert mine.scores == pytest.approx(other.scores, rel=tolerance), mine.group
        assert mine.image_scores == pytest.approx(other.image_scores, rel=tolerance), mine.group
    totals = [[m.sensitivity(candidate) for candidate in m.candidates] for m in (ours, theirs)]
    assert rank_correlation(*totals) >= 0.999


def assert_same_amax(first, second):
    ours, theirs = (load_file(path / "measurement.safetensors") for path in (first, second))
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert float(value) == pytest.approx(float(theirs[name]), rel=ARITHMETIC), name


@pytest.mark.parametrize("shared", [True, False])
def test_text_scores_and_amax_equal_modelopts(llama, text_file, tmp_path, shared):
    data = load_text(llama, text_file)
    found = {
        engine: measured_by(engine, llama, data, tmp_path / engine, share_fused_scales=shared)
        for engine in ("native", "modelopt")
    }
    assert found["native"].engine == "native"
    assert_same_scores(found["native"], found["modelopt"], ARITHMETIC)
    assert_same_amax(tmp_path / "native", tmp_path / "modelopt")


def test_scores_after_pictures_equal_modelopts_in_both_parts(tmp_path):
    pairs = DataSpec(kind="image_text", path=str(DEMO / "data" / "calibration.jsonl"))
    processor = calibration.load_processor(MODEL)
    data = calibration.load_data(pairs, processor, samples=8, sequence_length=64, batch_size=4, seed=0)
    found = {engine: measured_by(engine, MODEL, data, tmp_path / engine) for engine in ("native", "modelopt")}
    assert all(candidate.image_scores for candidate in found["native"].candidates)
    assert_same_scores(found["native"], found["modelopt"])
    assert_same_amax(tmp_path / "native", tmp_path / "modelopt")


def test_a_killed_measurement_goes_on_with_the_same_numbers(llama, text_file, tmp_path, monkeypatch):
    data = load_text(llama, text_file)
    whole = measured_by("native", llama, data, tmp_path / "whole")
    backward, calls = native._backward, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        backward(*args)

    monkeypatch.setattr(native, "_backward", killed)
    with pytest.raises(KeyboardInterrupt):
        measured_by("native", llama, data, tmp_path / "killed")
    monkeypatch.setattr(native, "_backward", backward)
    monkeypatch.setattr(native, "calibrate", None)  # done already
    resumed = measured_by("native", llama, data, tmp_path / "killed")
    assert resumed.fingerprint() == whole.fingerprint()


def test_no_weight_gets_a_gradient_and_hooks_are_gone(llama, text_file, tmp_path, monkeypatch):
    kept = {}
    load = sensitivity.load_model
    monkeypatch.setattr(sensitivity, "load_model", lambda *args: kept.setdefault("model", load(*args)))
    measured_by("native", llama, load_text(llama, text_file), tmp_path)
    model = kept["model"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()


def test_nan_is_refused_as_by_the_reference(llama, text_file, tmp_path, monkeypatch):
    seen = {}
    calibrate = native.calibrate

    def broken(model, job):
        name = job.target.groups[0].modules[0].name
        seen["name"] = name
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: (inputs[0] * float("nan"),))
        return calibrate(model, job)

    monkeypatch.setattr(native, "calibrate", broken)
    with pytest.raises(MeasurementError, match="hold NaN or Inf during calibration"):
        measured_by("native", llama, load_text(llama, text_file), tmp_path)


def test_other_methods_are_refused_before_anything_runs():
    content = {
        "model": {"path": "m"},
        "calibration": {"data": {"kind": "text", "path": "t"}},
        "held_out": {},
        "measurement": {"engine": "native", "method": "kl_div"},
        "schemes": [{"name": "a", "coverage": 0.5}],
        "output": "o",
    }
    with pytest.raises(RecipeError, match="engine native scores by gradient, not by kl_div; use engine: modelopt"):
        parse_recipe(content, "recipe")


def test_measuring_through_the_helper_is_the_same(llama, text_file, tmp_path, measured):
    ours = measure_text(llama, text_file, tmp_path, engine="native")
    assert_same_scores(ours, measured[0], ARITHMETIC)
