"""The native engine against ModelOpt, on text and pictures: the same amax values and scores; `fisher` against KL."""

import dataclasses
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bitladder.data.batches import Batch
from bitladder.data.processors import load_processor
from bitladder.data.samples import load_data
from bitladder.errors import EngineError, MeasurementError
from bitladder.formats import grids
from bitladder.measured import read_amax
from bitladder.measuring import kl, layers, native
from bitladder.measuring.calls import hidden_of
from bitladder.measuring.decoder import Decoder, Pass, _CutRecorder
from bitladder.measuring.gradient import GradientScorer
from bitladder.measuring.job import Job
from bitladder.measuring.layers import DeviceMemory, Layers
from bitladder.measuring.measure import measure
from bitladder.measuring.scores import gradient_score
from bitladder.models.loading import load_model
from bitladder.models.target import find_target
from bitladder.recipe import DataSpec, MeasureSpec
from bitladder.report.groups import rank_correlation
from conftest import (
    llama_config,
    llava_config,
    load_text,
    measure_text,
    qwen2_5_vl_config,
    qwen2_vl_config,
    qwen3_vl_config,
    save_model,
    source_of,
)
from test_positions import DEMO, MODEL

ROOT = Path(__file__).parents[1]
SMOLLM2 = ROOT / "models/smollm2_135m_instruct"
WITHIN = {"gradient": 0.02, "kl_div": 0.01}  # of ModelOpt's score, for every group
ARITHMETIC = 1e-4  # float32 in another order
ENGINES = ("native", "modelopt")
METHODS = (*WITHIN, "fisher")


def measured_by(engine, directory, data, output, **settings):
    output.mkdir(parents=True, exist_ok=True)
    spec = MeasureSpec(engine=engine, **settings)
    return measure(directory, source_of(directory), find_target(directory), data, spec, output)


def assert_same_scores(ours, theirs, tolerance):
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


def measured_by_both(directory, data, output, method="gradient", **settings):
    settings["method"] = method
    found = {engine: measured_by(engine, directory, data, output / engine, **settings) for engine in ENGINES}
    assert_same_amax(output / "native", output / "modelopt")
    assert found["native"].score_unit == found["modelopt"].score_unit
    return found["native"], found["modelopt"]


@pytest.mark.parametrize("shared", [True, False])
def test_text_scores_and_amax_equal_modelopts(llama, text_file, tmp_path, shared):
    data = load_text(llama, text_file)
    ours, theirs = measured_by_both(llama, data, tmp_path, share_fused_scales=shared)
    assert ours.engine == "native"
    assert_same_scores(ours, theirs, ARITHMETIC)


def test_a_module_that_runs_twice_scores_as_by_modelopt(llama, text_file, tmp_path, monkeypatch):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + self.up_proj(x / 2)))

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", forward)
    found = measured_by_both(llama, load_text(llama, text_file), tmp_path, dtype="float32")
    assert_same_scores(*found, 0.001)


@pytest.fixture
def exact_modelopt(monkeypatch):
    """ModelOpt's KL with log-probabilities in float64: in float32 they round a small KL by several per cent."""
    from modelopt.torch.quantization import algorithms

    monkeypatch.setattr(algorithms, "_get_log_prob", lambda logits, lm_head=None: logits.double().log_softmax(-1))


@pytest.mark.usefixtures("exact_modelopt")
def test_text_kl_equals_modelopts(llama, text_file, tmp_path):
    ours, theirs = measured_by_both(llama, load_text(llama, text_file), tmp_path, method="kl_div")
    assert_same_scores(ours, theirs, WITHIN["kl_div"])


def test_logits_in_several_parts_give_the_same(llama, text_file, tmp_path, monkeypatch):
    data = load_text(llama, text_file)
    for method in WITHIN:
        whole = measured_by("native", llama, data, tmp_path / method / "whole", method=method)
        with monkeypatch.context() as patch:
            for module in ("decoder", "kl"):
                patch.setattr(f"bitladder.measuring.{module}.ROWS_AT_ONCE", 7)  # of 46 rows: the last part is shorter
            parts = measured_by("native", llama, data, tmp_path / method / "parts", method=method)
        assert_same_scores(parts, whole, ARITHMETIC if method == "gradient" else WITHIN["kl_div"])


@pytest.mark.parametrize("scale", [1.0, 1e12])  # ModelOpt bounds what a product of gradient and error may be
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_a_modules_score_is_modelopts_own(scale, dtype, tolerance):
    from modelopt.torch.quantization.algorithms import _get_auto_quantize_score

    generator = torch.Generator().manual_seed(0)
    gradient, difference = torch.randn(2, 3, 50, 40, generator=generator).mul(scale**0.5).to(dtype)
    images = torch.zeros(3, 50, dtype=torch.bool)
    images[1:, :20] = True
    whole, part = gradient_score(gradient, difference, images).tolist()
    assert whole == pytest.approx(float(_get_auto_quantize_score(gradient, difference)), rel=tolerance)
    theirs = _get_auto_quantize_score(gradient[images], difference[images])
    assert part == pytest.approx(float(theirs), rel=tolerance)


def pairs(samples, batch_size):
    spec = DataSpec(kind="image_text", path=str(DEMO / "data" / "calibration.jsonl"))
    processor = load_processor(MODEL)
    return load_data(spec, processor, samples=samples, sequence_length=64, batch_size=batch_size, seed=0)


def test_scores_after_pictures_equal_modelopts_in_both_parts(tmp_path):
    ours, theirs = measured_by_both(MODEL, pairs(8, 4), tmp_path)
    assert all(candidate.image_scores for candidate in ours.candidates)
    assert_same_scores(ours, theirs, WITHIN["gradient"])


@pytest.mark.usefixtures("exact_modelopt")
def test_kl_after_pictures_equals_modelopts(tmp_path):
    ours, theirs = measured_by_both(MODEL, pairs(4, 2), tmp_path, method="kl_div")
    assert_same_scores(ours, theirs, WITHIN["kl_div"])


@pytest.mark.usefixtures("exact_modelopt")
@pytest.mark.parametrize("method", WITHIN)
def test_a_real_model_scores_as_with_modelopt(tmp_path, method):
    if not SMOLLM2.exists():
        pytest.skip(f"no model at {SMOLLM2}: run `bitladder fetch smollm2 {SMOLLM2.relative_to(ROOT)}`")
    captions = ROOT / "recipes/data/coco2017_captions.txt"
    samples = 2 if method == "gradient" else 1  # ModelOpt runs the model 121 times for each
    data = load_text(SMOLLM2, captions, samples=samples, length=32, batch=1)
    ours, theirs = measured_by_both(SMOLLM2, data, tmp_path, method=method)
    assert len(ours.groups) == 120
    assert_same_scores(ours, theirs, WITHIN[method])


def decoder_of(cls, config, directory):
    """Return the native decoder of a tiny random model in float32, and one batch of token ids on its way."""
    save_model(cls, config, directory, tokenizer=False)
    target = find_target(directory)
    job = Job(target, (), (), MeasureSpec(engine="native"), "cpu", lambda *_: None)
    model = load_model(directory, torch.float32, "cpu").requires_grad_(False)
    ids = torch.arange(10, 34).view(2, 12)
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids)
    return Decoder(Layers.of(model, target, DeviceMemory("cpu", None), native.REMEDY), job), Pass(batch)


FAMILIES = {
    "llama": (transformers.LlamaForCausalLM, llama_config),
    "qwen2_vl": (transformers.Qwen2VLForConditionalGeneration, qwen2_vl_config),
    "qwen2_5_vl": (transformers.Qwen2_5_VLForConditionalGeneration, qwen2_5_vl_config),
    "qwen3_vl": (transformers.Qwen3VLForConditionalGeneration, qwen3_vl_config),
    "llava": (transformers.LlavaForConditionalGeneration, llava_config),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_gradient_are_the_models_own_in_every_family(family, tmp_path):
    cls, config = FAMILIES[family]
    decoder, current = decoder_of(cls, config(), tmp_path)
    decoder.record(current)
    again = Pass(current.batch)
    decoder.begin(again)
    for index, layer in enumerate(decoder.layers.layers):
        again.output = decoder.run(layer, again.output, again.calls[index])
    torch.testing.assert_close(again.output, current.output, rtol=0, atol=0)

    def keep(_, __, output):
        leaves.append(hidden_of(output))
        leaves[-1].retain_grad()

    leaves = []
    with torch.enable_grad():
        decoder.model.requires_grad_(True)
        handle = decoder.layers.layers[-1].register_forward_hook(keep)
        decoder.model(**current.batch.inputs, labels=current.batch.labels).loss.backward()
        handle.remove()
    torch.testing.assert_close(decoder.loss_gradient(current), leaves[0].grad, rtol=1e-4, atol=1e-8)


def test_what_is_kept_and_what_runs_again_give_the_same(llama, text_file, tmp_path, monkeypatch):
    data, found, kept = load_text(llama, text_file), {}, {}  # `fisher`, whose draws must not differ either
    backward = GradientScorer._backward

    def counted(scorer, layer, index, current, gradient):
        kept.setdefault(name, []).append(index in current.kept)
        return backward(scorer, layer, index, current, gradient)

    monkeypatch.setattr(GradientScorer, "_backward", counted)
    for name, room, left in (("kept", True, 0.0), ("again", False, 0.0), ("without copies", True, 1e18)):
        monkeypatch.setattr(_CutRecorder, "_has_room", lambda *_, room=room: room)
        monkeypatch.setattr("bitladder.measuring.decoder._COPIES_LEFT", left)  # bytes of memory
        found[name] = measured_by("native", llama, data, tmp_path / name)
    assert all(kept["kept"])
    assert not any(kept["again"] + kept["without copies"])
    assert len({measurement.fingerprint() for measurement in found.values()}) == 1


def test_what_is_added_between_layers_is_refused(tmp_path):
    decoder, current = decoder_of(transformers.LlamaForCausalLM, llama_config(), tmp_path)
    decoder.layers.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    decoder.record(current)  # for gradients it doesn't matter
    with pytest.raises(EngineError, match=r"changes the hidden states before decoder layer 1 .* use method: fisher"):
        decoder.begin(Pass(current.batch))


def test_only_layers_that_run_one_after_another_make_a_graph(llama, text_file, tmp_path):
    amax = read_amax(measured_by("native", llama, load_text(llama, text_file), tmp_path), tmp_path)
    target = find_target(llama)
    (batch, *_) = load_text(llama, text_file).batches
    model = load_model(llama, torch.float32).requires_grad_(False)
    opened = Layers.of(model, target, DeviceMemory("cpu", None), native.REMEDY)
    job = Job(target, (), 4 * (batch.labels.shape,), MeasureSpec(), "cpu", lambda *_: None)
    with native.scorer(opened, job, amax, None) as scorer:
        opened.memory.is_gpu = True  # what is asked doesn't need one
        assert scorer._begun(batch) is not None
        padded = {**batch.inputs, "attention_mask": batch.inputs["attention_mask"].clone()}
        padded["attention_mask"][0, 0] = 0
        assert scorer._begun(Batch(padded, batch.labels)) is None
        opened.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
        assert scorer._begun(batch) is None


@pytest.mark.parametrize("difference", [1e-4, 1e-2, 1.0, 200.0])
def test_kl_is_exact_for_near_and_far_distributions(difference):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(300, 50, generator=generator)
    others = logits + difference * torch.randn(300, 50, generator=generator)
    p, q = (torch.log_softmax(values.double(), -1) for values in (logits, others))
    expected = float((p.exp() * (p - q)).sum())
    decoder = SimpleNamespace(logits=lambda hidden: hidden)
    scorer = SimpleNamespace(layers=SimpleNamespace(device="cpu"), decoder=decoder, rows=256)
    scorer.normalisers, scorer.kl = kl._normalisers, kl._kl_of_rows
    (found,) = kl.KlScorer._kl(scorer, logits, [others])
    assert float(found) == pytest.approx(expected, rel=2e-3)
    (back,) = kl.KlScorer._kl(scorer, others, [logits])
    assert float(back) == pytest.approx(float((q.exp() * (q - p)).sum()), rel=2e-3)


def test_a_model_that_does_more_behind_its_layers_is_refused(tmp_path):
    decoder, current = decoder_of(transformers.LlamaForCausalLM, llama_config(), tmp_path)
    decoder.model.register_forward_hook(lambda _, __, output: dataclasses.replace(output, logits=output.logits.tanh()))
    for step in (decoder.record, decoder.begin):
        with pytest.raises(EngineError, match="makes its logits from more than the last decoder layer's hidden"):
            step(current)


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_measurement_goes_on_with_the_same_numbers(llama, text_file, tmp_path, monkeypatch, method):
    data = load_text(llama, text_file)
    whole = measured_by("native", llama, data, tmp_path / "whole", method=method)
    step = "begin" if method == "kl_div" else "record"
    original, calls = getattr(Decoder, step), []

    def killed(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(*args, **options)

    monkeypatch.setattr(Decoder, step, killed)
    with pytest.raises(KeyboardInterrupt):
        measured_by("native", llama, data, tmp_path / "killed", method=method)
    monkeypatch.setattr(Decoder, step, original)
    monkeypatch.setattr(native, "calibrate", None)  # done already
    resumed = measured_by("native", llama, data, tmp_path / "killed", method=method)
    assert resumed.fingerprint() == whole.fingerprint()


def test_no_weight_gets_a_gradient_and_hooks_are_gone(llama, text_file, tmp_path, monkeypatch):
    kept = {}
    load = layers.load_model
    monkeypatch.setattr(layers, "load_model", lambda *args: kept.setdefault("model", load(*args)))
    measured_by("native", llama, load_text(llama, text_file), tmp_path)
    model = kept["model"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()


def test_nan_is_refused_as_by_the_reference(llama, text_file, tmp_path, monkeypatch):
    seen = {}
    calibrate = native.calibrate

    def broken(layers, job):
        name = job.target.groups[0].modules[0].name
        seen["name"] = name
        layers.model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: (inputs[0] * float("nan"),))
        return calibrate(layers, job)

    monkeypatch.setattr(native, "calibrate", broken)
    with pytest.raises(MeasurementError, match="hold NaN or Inf during calibration"):
        measured_by("native", llama, load_text(llama, text_file), tmp_path)


def test_measuring_through_the_helper_is_the_same(llama, text_file, tmp_path, measured):
    ours = measure_text(llama, text_file, tmp_path, engine="native", method="gradient")
    assert_same_scores(ours, measured[0], ARITHMETIC)


def test_fisher_scores_are_nats_added_up_over_tokens(llama, text_file, tmp_path):
    data = load_text(llama, text_file, samples=5)  # batches of 2, 2 and 1 rows of 24 tokens
    found = measured_by("native", llama, data, tmp_path, method="fisher")
    assert found.score_unit == "nats per token"
    assert found.score_weights == pytest.approx([1 / (5 * 23)] * 3)
    assert all(score > 0 for candidate in found.candidates for score in candidate.scores)
    assert not any(candidate.image_scores for candidate in found.candidates)


def test_fisher_scores_of_image_positions_are_apart(tmp_path):
    found = measured_by("native", MODEL, pairs(8, 4), tmp_path, method="fisher")
    assert found.score_unit == "nats per token"
    for candidate in found.candidates:
        assert len(candidate.image_scores) == len(candidate.scores) == 2
        assert all(0 <= part < whole for part, whole in zip(candidate.image_scores, candidate.scores, strict=True))
    unread = [c.group for c in found.candidates if c.image_scores == (0.0, 0.0)]
    last = found.groups[-1].name.rpartition(".mlp.")[0]
    assert unread == [f"{last}.self_attn.o_proj", f"{last}.mlp.gate_up_proj", f"{last}.mlp.down_proj"]


@pytest.fixture(scope="module")
def sure_llama(tmp_path_factory):
    """A tiny Llama whose predictions are far from uniform, so that their probabilities count in a score."""
    directory = tmp_path_factory.mktemp("sure")
    return save_model(transformers.LlamaForCausalLM, llama_config(initializer_range=0.3), directory)


def errors_of(model, group, amax, batch):
    """Return what FP8 changes in the outputs of each of a group's modules: name -> [rows, tokens, features]."""
    errors, handles = {}, []

    def keep(name):
        def hook(linear, inputs, output):
            weight_scale, input_scale = (
                grids.scale_of(amax[f"{name}.{kind}"]) for kind in ("weight_amax", "input_amax")
            )
            weight = grids.fake_quantise(linear.weight, weight_scale)
            errors[name] = torch.nn.functional.linear(grids.fake_quantise(inputs[0], input_scale), weight) - output

        return hook

    for module in group.modules:
        handles.append(model.get_submodule(module.name).register_forward_hook(keep(module.name)))
    with torch.no_grad():
        model(**batch.inputs)
    for handle in handles:
        handle.remove()
    return errors


def copies_of(batch, count):
    """Return a batch that holds each row so many times: all rows, then all rows again, ..."""
    inputs = {key: value.repeat(count, 1) for key, value in batch.inputs.items()}
    return Batch(inputs, batch.labels.repeat(count, 1))


def second_order_kl(model, errors, batch, share=1e-3):
    """Return KL to second order in nats, each token's output changed alone and added up: by finite differences.

    `share` of the change of one position goes into the forward pass, once forwards and once backwards; every position
    and direction is a copy of the batch's rows.
    """
    rows, tokens = batch.labels.shape
    many = copies_of(batch, 2 * tokens)
    steps = torch.stack([share * torch.eye(tokens), -share * torch.eye(tokens)]).view(-1, 1, tokens, 1)

    def log_probabilities():
        with torch.no_grad():
            return model(**many.inputs).logits[:, :-1][many.predicted].log_softmax(-1)

    original, handles = log_probabilities(), []
    for name, error in errors.items():  # a group's modules together
        change = (steps * error).flatten(0, 1)  # [copies x rows, tokens, features]
        linear = model.get_submodule(name)
        handles.append(linear.register_forward_hook(lambda _, __, output, change=change: output + change))
    difference = log_probabilities() - original
    for handle in handles:
        handle.remove()
    return float((original.exp() * (difference.expm1() - difference)).sum()) / share**2 / 2


DRAWS, COPIES = 16, 32  # batches, and rows of each that have the same tokens but signs of their own


def test_fisher_is_the_kl_to_second_order(sure_llama, text_file, tmp_path, monkeypatch):
    """The mean of many draws, for each kind of group, against the model's own KL in float64."""
    data, target = load_text(sure_llama, text_file, samples=2, length=12, batch=2), find_target(sure_llama)
    amax = read_amax(measured_by("native", sure_llama, data, tmp_path), tmp_path)
    model = load_model(sure_llama, torch.float32).requires_grad_(False)
    (batch,) = data.batches
    many = copies_of(batch, COPIES)
    job = Job(target, (many,), (many.labels.shape,), MeasureSpec(method="fisher"), "cpu", lambda *_: None)
    opened = Layers.of(model, target, DeviceMemory("cpu", None), native.REMEDY)
    draws = []
    with native.scorer(opened, job, amax, None) as scorer:
        for draw in range(DRAWS):
            monkeypatch.setattr("bitladder.measuring.decoder.sha256_of_bytes", lambda _, draw=draw: f"{draw:015x}")
            draws += [wait() for wait in scorer.scores([many])]
    exactly = load_model(sure_llama, torch.float64)
    for group in target.groups[4:8]:  # the second layer's: two of one module, two that the runtime fuses
        found = [scores[group.name]["fp8"][0] / COPIES for scores in draws]
        error = statistics.stdev(found) / math.sqrt(DRAWS)
        exact = second_order_kl(exactly, errors_of(model, group, amax, batch), batch)
        assert error < 0.03 * exact, group.name
        assert statistics.mean(found) == pytest.approx(exact, abs=4 * error), group.name


def test_the_same_tokens_have_the_same_signs_and_others_have_others(tmp_path):
    decoder, current = decoder_of(transformers.LlamaForCausalLM, llama_config(), tmp_path)
    decoder.record(current)

    def probed(one):
        decoder.seed(one.batch)
        return decoder.probe_gradient(one)

    first = probed(current)
    torch.testing.assert_close(probed(current), first, rtol=0, atol=0)
    inputs = {**current.batch.inputs, "input_ids": current.batch.inputs["input_ids"] + 1}
    other = Pass(Batch(inputs, current.batch.labels), output=current.output)
    assert not torch.allclose(probed(other), first)
    repeated = probed(Pass(current.batch, output=current.output[:, :1].expand(-1, 12, -1)))
    assert not torch.allclose(repeated[:, 0], repeated[:, 1])  # nor do two tokens share theirs


def test_fisher_ranks_as_kl_better_than_gradient(tmp_path):
    data = pairs(32, 16)
    found = {method: measured_by("native", MODEL, data, tmp_path / method, method=method) for method in METHODS}
    scores = {method: [m.sensitivity(candidate) for candidate in m.candidates] for method, m in found.items()}
    # 0.88 to 0.98 by other draws, gradient 0.81
    assert rank_correlation(scores["fisher"], scores["kl_div"]) > rank_correlation(scores["gradient"], scores["kl_div"])
    quotients = [one / exact for one, exact in zip(scores["fisher"], scores["kl_div"], strict=True)]
    assert 0.5 < statistics.median(quotients) < 2  # nats, as they are
