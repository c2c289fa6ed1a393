"""Decoders that ModelOpt itself stumbles over, through its engine: what is scored is the model as it is."""

import pytest
import torch
import transformers

from bitladder import planning
from bitladder.checkpoints.export import export
from bitladder.evaluation.evaluate import compare
from bitladder.evaluation.reference import Reference
from bitladder.formats import grids
from bitladder.measured import read_amax
from bitladder.models.loading import load_model
from bitladder.verification import verify
from conftest import TEXT, load_text, measure_text, save_model, spec

FALCON = {"ffn_hidden_size": 128, "alibi": False}
ODD = {
    "falcon": ("Falcon", {**FALCON, "new_decoder_architecture": False, "multi_query": True}),
    "falcon_new": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "mpt": ("Mpt", {"d_model": 64, "n_layers": 2, "n_heads": 2, "expansion_ratio": 2, "max_seq_len": 128}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 2}),
}


def odd_model(name, directory):
    family, changes = ODD[name]
    config = getattr(transformers, f"{family}Config")(**{**TEXT, "initializer_range": 0.1, **changes})
    return save_model(getattr(transformers, f"{family}ForCausalLM"), config, directory)


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
@pytest.mark.parametrize("name", ODD)
def test_modelopts_engine_takes_them(name, method, text_file, tmp_path):
    source = odd_model(name, tmp_path / "source")
    measurement = measure_text(source, text_file, tmp_path, samples=4, engine="modelopt", method=method)
    assert len(measurement.groups) == 8  # query_key_value, dense and two of the MLP in both layers
    assert all(score > 0 for candidate in measurement.candidates for score in candidate.scores)
    amax = read_amax(measurement, tmp_path)
    (scheme,) = planning.plan_all(measurement, [spec("full", coverage=1.0)])
    export(scheme, measurement, amax, source, tmp_path / "full")
    assert verify([scheme], measurement, amax, source, {"full": tmp_path / "full"}).ok
    with Reference.compute(source, load_text(source, text_file, samples=2)) as reference:
        kl = compare(reference, tmp_path / "full", "full")[0][0]
    assert kl.noise_floor < kl.value < 1


def test_the_gradient_is_that_of_an_output_before_the_model_adds_to_it(text_file, tmp_path):
    """Falcon adds to the MLP's output in place. Here the gradient is taken at a copy that nothing is added to."""
    source = odd_model("falcon_new", tmp_path / "source")
    measurement = measure_text(source, text_file, tmp_path, samples=2, engine="modelopt", method="gradient")
    amax = read_amax(measurement, tmp_path)
    (batch,) = load_text(source, text_file, samples=2).batches
    model = load_model(source, torch.float32)
    module = "transformer.h.0.mlp.dense_4h_to_h"
    linear, kept = model.get_submodule(module), {}

    def keep(_, inputs, output):
        kept["input"], kept["output"] = inputs[0].detach(), output
        output.retain_grad()
        return output.clone()

    linear.register_forward_hook(keep)
    model(**batch.inputs, labels=batch.labels).loss.backward()
    weight_scale, input_scale = (grids.scale_of(amax[f"{module}.{kind}_amax"]) for kind in ("weight", "input"))
    weight = grids.fake_quantise(linear.weight.detach(), weight_scale)
    rounded = torch.nn.functional.linear(grids.fake_quantise(kept["input"], input_scale), weight, linear.bias)
    expected = (kept["output"].grad * (rounded - kept["output"].detach())).square().sum()
    (score,) = next(candidate.scores for candidate in measurement.candidates if candidate.group == module)
    assert score == pytest.approx(float(expected), rel=1e-3)
