"""What the native engine compiles on a GPU, without one: by torch's own front end, and Triton's interpreter."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from bitladder.data.batches import IGNORED_LABEL, Batch
from bitladder.errors import EngineError
from bitladder.measuring import candidates as taps
from bitladder.measuring import decoder, gradient, kl, native
from bitladder.measuring.job import Job as Job_of_job
from bitladder.measuring.layers import DeviceMemory, Layers
from bitladder.models.loading import load_model
from bitladder.models.target import find_target
from bitladder.recipe import MeasureSpec
from conftest import compiling_with, llama_config, qwen2_5_vl_config, save_model

MODELS = {
    "llama": (transformers.LlamaForCausalLM, llama_config),
    "qwen2_5_vl": (transformers.Qwen2_5_VLForConditionalGeneration, qwen2_5_vl_config),
}
# Of a layer: tapped; or alone, with each of four groups in FP8, and for the four of a layer together.
FORMS = {"gradient": 1, "fisher": 1, "kl_div": 6}


@pytest.fixture(params=MODELS)
def model(request, tmp_path_factory):
    cls, config = MODELS[request.param]
    return save_model(cls, config(), tmp_path_factory.mktemp(request.param), tokenizer=False)


@pytest.fixture
def compiling(monkeypatch):
    """Compile for this CPU as for a GPU, but leave making kernels out; returns what counts the compiled functions."""
    with compiling_with(monkeypatch, "aot_eager") as counter:
        yield counter


def batch_of(seed, padding):
    """Return two rows of twelve token ids, the first so many of the second row padding."""
    ids = torch.randint(10, 34, (2, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return Batch({"input_ids": ids, "attention_mask": mask}, ids.masked_fill(mask == 0, IGNORED_LABEL))


class Job:
    """A model with its amax values, ready to be scored on two batches."""

    def __init__(self, directory, method, padding=0):
        self.batches = batch_of(0, padding), batch_of(1, padding)
        shapes = tuple(batch.labels.shape for batch in self.batches)
        target = find_target(directory)
        model = load_model(directory, torch.float32).requires_grad_(False)
        model.config.use_cache = False
        self.job = Job_of_job(target, self.batches, shapes, MeasureSpec(method=method), "cpu", lambda *_: None)
        self.layers = Layers.of(model, target, DeviceMemory("cpu", None), native.REMEDY)
        self.amax = native.calibrate(self.layers, self.job)

    def scores(self, monkeypatch, tokens, graphed=True):
        """Return each batch's scores, compiled if there are at least so many tokens, as in a CUDA graph (`graphed`)."""
        monkeypatch.setattr(gradient, "_COMPILED_FROM", tokens)
        monkeypatch.setattr(kl, "_COMPILED_FROM", tokens)
        with native.scorer(self.layers, self.job, self.amax, None) as scorer:
            if isinstance(scorer, gradient.GradientScorer):

                def replayed(batch, current):
                    scorer._seed(batch)
                    return scorer._at_once(current)

                monkeypatch.setattr(scorer, "_is_graphed", lambda _: graphed)
                monkeypatch.setattr(scorer, "_replayed", replayed)
            return [scorer.scores([batch])[0]() for batch in self.batches]


@pytest.mark.parametrize("method", FORMS)
def test_compiled_layers_give_the_same_scores(model, method, compiling, monkeypatch):
    monkeypatch.setattr(decoder, "ROWS_AT_ONCE", 7)  # of 22 rows of logits: the last part is shorter
    job = Job(model, method)
    single = job.scores(monkeypatch, tokens=49)
    assert compiling.frame_count == 0
    together = job.scores(monkeypatch, tokens=48)
    heads = {"gradient": 1, "fisher": 1, "kl_div": 0}[method]  # the gradient by the logits
    assert compiling.frame_count == FORMS[method] + heads  # not once for every layer
    for one, other in zip(single, together, strict=True):
        for group, formats in one.items():
            assert other[group]["fp8"] == pytest.approx(formats["fp8"], rel=1e-5), group
    assert not any(isinstance(module, taps.Tapped | taps.InForm) for module in job.layers.model.modules())
    assert not any("fp8" in module.__dict__ for module in job.layers.model.modules())


@pytest.mark.parametrize("padding", [0, 5])
def test_groups_that_go_on_together_score_as_alone(model, padding, monkeypatch):
    job, found = Job(model, "kl_div", padding), {}
    for tokens in (0, 48, 96):  # alone; a layer's four groups in two pairs; all four
        monkeypatch.setattr(kl, "_TOKENS_TOGETHER", tokens)
        with native.scorer(job.layers, job.job, job.amax, None) as scorer:
            found[tokens] = [scorer.scores([batch])[0]() for batch in job.batches]
    for alone, pairs, four in zip(*found.values(), strict=True):
        for group, formats in alone.items():
            assert pairs[group]["fp8"] == pytest.approx(formats["fp8"], rel=1e-4), group
            assert four[group]["fp8"] == pytest.approx(formats["fp8"], rel=1e-4), group


def test_other_shapes_need_tokens_of_their_own(model, monkeypatch):
    job = Job(model, "kl_div").job
    monkeypatch.setattr(decoder, "can_compile", lambda _: True)
    layers = type("Resident", (), {"streamed": False})
    assert decoder.is_worth_compiling(layers, job, 48)
    assert not decoder.is_worth_compiling(layers, job, 49)
    mixed = Job_of_job(job.target, (), (*job.scored, torch.Size([2, 24])), job.spec, "cpu", job.progress)
    assert decoder.is_worth_compiling(layers, mixed, 48)
    assert not decoder.is_worth_compiling(layers, mixed, 49)
    layers.streamed = True
    assert not decoder.is_worth_compiling(layers, job, 48)


def test_what_torch_cannot_compile_is_said_with_the_remedy(model, compiling, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(
        decoder, "fused", lambda function, compiled: torch.compile(function, backend=broken) if compiled else function
    )
    refused = r"can't compile the layers of .*no such luck.* set TORCH_COMPILE_DISABLE=1"
    for method, padding in (("kl_div", 0), ("gradient", 0), ("gradient", 5)):
        job = Job(model, method, padding)
        with pytest.raises(EngineError, match=refused):
            job.scores(monkeypatch, tokens=1, graphed=not padding)


class Twice(nn.Module):
    """A gated MLP that makes up_proj's output in two runs, each of them half of it."""

    def __init__(self, inner):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            inner.gate_proj,
            inner.up_proj,
            inner.down_proj,
            inner.act_fn,
        )

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) / 2 + self.up_proj(x) / 2))


# A KL knows one error, that of both runs; ModelOpt's formula squares every gradient times error by itself.
@pytest.mark.parametrize(("method", "share"), [("fisher", 1.0), ("gradient", 0.5)])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_two_runs_of_a_module_add_is_one_score(method, share, tmp_path, compiled, compiling, monkeypatch):
    directory = save_model(transformers.LlamaForCausalLM, llama_config(), tmp_path, tokenizer=False)
    job = Job(directory, method)
    module = "model.layers.1.mlp.up_proj"
    groups = tuple(
        group.model_copy(update={"name": m.name, "modules": (m,)})
        for group in job.job.target.groups
        for m in group.modules
    )
    job.job = dataclasses.replace(job.job, target=dataclasses.replace(job.job.target, groups=groups))
    once = job.scores(monkeypatch, tokens=10**9)
    layer = job.layers.layers[1]
    layer.mlp = Twice(layer.mlp)
    twice = job.scores(monkeypatch, tokens=1 if compiled else 10**9)
    for one, other in zip(once, twice, strict=True):
        for group, formats in one.items():
            expected = formats["fp8"][0] * (share if group == module else 1)
            assert other[group]["fp8"][0] == pytest.approx(expected, rel=1e-4), group


def test_a_module_that_runs_in_another_layer_too_is_refused(tmp_path, monkeypatch):
    job = Job(save_model(transformers.LlamaForCausalLM, llama_config(), tmp_path, tokenizer=False), "fisher")
    first, second, *_ = (layer.mlp for layer in job.layers.layers)
    own = second.forward
    monkeypatch.setattr(second, "forward", lambda x: own(x) + first.up_proj(x).mean())
    with pytest.raises(EngineError, match=r"layers\.0\.mlp\.up_proj runs outside its own layer"):
        job.scores(monkeypatch, tokens=10**9, graphed=False)


@pytest.mark.parametrize("kernels", ["kl_kernels.py", "walk_kernels.py"])
def test_kernels_give_what_torch_gives(kernels):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, Path(__file__).with_name(kernels)], env=environment, check=True)
