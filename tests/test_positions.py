"""Scores of text-token and image-token positions apart, and what a plan makes of them."""

from pathlib import Path

import pytest
import torch

import bitladder
from bitladder import planning
from bitladder.data.processors import load_processor
from bitladder.data.samples import load_data
from bitladder.errors import MeasurementError
from bitladder.formats import grids
from bitladder.measured import read_amax
from bitladder.measuring.measure import measure
from bitladder.measuring.modelopt import freeze_outside
from bitladder.models.loading import load_model
from bitladder.models.target import find_target
from bitladder.recipe import DataSpec, MeasureSpec, SchemeSpec
from conftest import measure_text, source_of, spec

DEMO = Path(bitladder.__file__).parent / "demo"
MODEL = DEMO / "qwen2_5_vl_digits"


@pytest.fixture(scope="module")
def data():
    processor = load_processor(MODEL)
    source = DataSpec(kind="image_text", path=str(DEMO / "data" / "calibration.jsonl"))
    return load_data(source, processor, samples=8, sequence_length=64, batch_size=4, seed=0)


@pytest.fixture(scope="module")
def measured(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("positions")
    target, spec = find_target(MODEL), MeasureSpec(engine="modelopt", method="gradient")
    measurement = measure(MODEL, source_of(MODEL), target, data, spec, output)
    return measurement, read_amax(measurement, output)


def by_hand(data, amax, name):
    """Σ (∂loss/∂y · Δy)² of one module in each batch: everywhere, and at positions that hold a piece of a picture."""
    model = load_model(MODEL, torch.float32)
    linear = model.get_submodule(name)
    weight_scale, input_scale = (grids.scale_of(amax[f"{name}.{kind}"]) for kind in ("weight_amax", "input_amax"))
    kept = {}

    def keep(module, inputs, output):
        kept["input"], kept["output"] = inputs[0].detach(), output
        output.retain_grad()

    linear.register_forward_hook(keep)
    totals = []
    for batch in data.batches:
        model(**batch.inputs, labels=batch.labels).loss.backward()
        rounded = torch.nn.functional.linear(
            grids.fake_quantise(kept["input"], input_scale),
            grids.fake_quantise(linear.weight, weight_scale),
            linear.bias,
        )
        squares = (kept["output"].grad * (rounded - kept["output"])).detach().square().sum(-1)
        images = batch.inputs["input_ids"] == model.config.image_token_id
        totals.append((float(squares.sum()), float(squares[images].sum())))
        model.zero_grad()
    return totals


@pytest.mark.parametrize(
    "name", ["model.language_model.layers.0.mlp.down_proj", "model.language_model.layers.2.self_attn.o_proj"]
)
def test_scores_of_image_positions_equal_a_computation_by_hand(measured, data, name):
    measurement, amax = measured
    candidate = measurement.by_group()[name]["fp8"]
    for score, image, (total, of_images) in zip(
        candidate.scores, candidate.image_scores, by_hand(data, amax, name), strict=True
    ):
        assert score == pytest.approx(total, rel=1e-3)
        assert image == pytest.approx(of_images, rel=1e-3)
        assert 0 < image < score


def test_the_last_layers_outputs_after_attention_matter_at_text_positions_only(measured):
    """Nothing reads the last layer's output at a picture's positions: no token is predicted there."""
    measurement, _ = measured
    last = [group.name for group in measurement.groups if group.name.endswith("down_proj")][-1]
    assert measurement.by_group()[last]["fp8"].image_scores == (0.0, 0.0)


def test_text_has_no_scores_apart(llama, text_file, tmp_path):
    measurement = measure_text(llama, text_file, tmp_path, samples=2)
    assert all(candidate.image_scores == () for candidate in measurement.candidates)
    with pytest.raises(MeasurementError, match="image_weight 0 was asked for"):
        planning.plan(measurement, spec("half", coverage=0.5, image_weight=0.0))


def test_kl_scores_are_not_told_apart(data, tmp_path):
    measurement = measure(
        MODEL,
        source_of(MODEL),
        find_target(MODEL),
        data,
        MeasureSpec(engine="modelopt", method="kl_div", score_samples=4),
        tmp_path,
    )
    assert all(candidate.image_scores == () for candidate in measurement.candidates)


def test_a_plan_weighs_positions(measured):
    measurement, _ = measured
    weights = (0.0, 1.0, 3.0)
    for weight in weights:
        order = planning.density_order(measurement.weigh_images(weight), "fp8")

        def density(name, weight=weight):
            candidate = measurement.by_group()[name]["fp8"]
            total = sum(
                w * (score - image + weight * image)
                for w, score, image in zip(
                    measurement.score_weights, candidate.scores, candidate.image_scores, strict=True
                )
            )
            return total / candidate.weight_bits

        assert order == sorted(order, key=density)
    text, both = (planning.plan(measurement, spec("x", coverage=0.5, image_weight=weight)) for weight in (0.0, 1.0))
    assert text.formats != both.formats
    assert text.measurement_sha256 == both.measurement_sha256 == measurement.fingerprint()
    assert text.asked == SchemeSpec(name="x", coverage=0.5, image_weight=0.0)
    assert text.predicted_score == pytest.approx(
        sum(measurement.sensitivity(measurement.by_group()[g]["fp8"], 0.0) for g in text.quantised_groups())
    )


def test_bits_schemes_weigh_positions_too(measured):
    measurement, _ = measured
    schemes = planning.plan_all(
        measurement, [spec("both", effective_bits=11.0), spec("text", effective_bits=11.0, image_weight=0.0)]
    )
    table = measurement.by_group()
    text_damage = [
        sum(measurement.sensitivity(table[g]["fp8"], 0.0) for g in scheme.quantised_groups()) for scheme in schemes
    ]
    assert text_damage[1] < text_damage[0]
    assert schemes[0].predicted_score < sum(
        measurement.sensitivity(table[g]["fp8"]) for g in schemes[1].quantised_groups()
    )


def test_no_gradient_enters_the_vision_tower(data):
    """The scores need none; ModelOpt would run its backward pass through the tower for the patch embedding's sake."""
    model = load_model(MODEL, torch.float32)
    freeze_outside(model, find_target(MODEL).language_model)
    batch = data.batches[0]
    model(**batch.inputs, labels=batch.labels).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert not any("visual" in name for name in with_gradient)
    assert "model.language_model.embed_tokens.weight" in with_gradient
    assert "model.language_model.layers.0.mlp.down_proj.weight" in with_gradient
