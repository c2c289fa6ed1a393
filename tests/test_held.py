"""What several formats in one pass hold, over one: copies of weights, and what layers keep for the backward pass.

A GPU's ways are taken on the CPU: codes of FP8 are multiplied as they are, all other weights kept as files store them.
"""

import contextlib

import pytest
import torch
import transformers

from bitladder.data.batches import Batch
from bitladder.device import deterministic
from bitladder.formats import FORMATS
from bitladder.measuring import candidates, gradient, kl, native
from bitladder.measuring.job import Job
from bitladder.measuring.layers import DeviceMemory, Layers
from bitladder.models.loading import load_model
from bitladder.models.target import find_target
from bitladder.recipe import MeasureSpec
from conftest import compiling_with, llama_config, save_model

THREE = ("fp8", "nvfp4", "nvfp4_w4a16")
GOAL = 1.3  # issue 20: what three formats may take, over one
# Qwen2.5-VL-3B and a batch of 8 x 512 tokens, of which every size is divided by 32.
SMALL_3B = dict(hidden_size=64, intermediate_size=352, num_hidden_layers=1, num_attention_heads=8)
TOKENS = 128


def scorer_of(directory, method, formats, batches, dtype):
    model = load_model(directory, dtype).requires_grad_(False)
    model.config.use_cache = False
    target, shapes = find_target(directory), tuple(batch.labels.shape for batch in batches)
    job = Job(target, batches, shapes, MeasureSpec(method=method, formats=formats), "cpu", lambda *_: None)
    layers = Layers.of(model, target, DeviceMemory("cpu", None), native.REMEDY)
    return native.scorer(layers, job, native.calibrate(layers, job), None)


def batch_of(seed, rows, tokens):
    ids = torch.randint(10, 300, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids)


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Keep weights as on a GPU that multiplies FP8 numbers."""
    monkeypatch.setattr(candidates, "_kept", lambda format_, _: "multiplied" if format_.multiplies_codes else "stored")


@pytest.fixture
def counter(monkeypatch):
    """Compile as for a GPU, where torch chooses what is kept and what is made again, but make no kernels."""
    with compiling_with(monkeypatch, "aot_eager_decomp_partition") as found:
        yield found


def held_bytes(scorer, batch):
    """Return the bytes of a model's weights, of their copies, and of what its first layer keeps of a batch."""
    found = {}

    @torch._dynamo.disable
    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    layer = scorer.layers.layers[0]
    with scorer, deterministic() if scorer.decoder.compiled else contextlib.nullcontext():
        current = scorer._begun(batch) or scorer._pass(batch)
        scorer.decoder.begin(current)
        for module in layer.modules():
            for form in getattr(module, "forms", ()):
                for tensor in form.parts.values():
                    keep(tensor)
        for parameter in layer.parameters():
            keep(parameter)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scorer._run_kept(0, current, current.calls[0], current.output, scorer.decoder.call)
    return sum(found.values())


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("compiled", [False, True])
def test_three_formats_hold_little_more_than_one(tmp_path, compiled, counter, monkeypatch):
    directory = save_model(transformers.LlamaForCausalLM, llama_config(**SMALL_3B), tmp_path, tokenizer=False)
    monkeypatch.setattr(gradient, "_COMPILED_FROM", 1 if compiled else 10**9)
    batch, held = batch_of(0, 1, TOKENS), []
    for formats in (("fp8",), THREE):
        held.append(held_bytes(scorer_of(directory, "fisher", formats, (batch,), torch.bfloat16), batch))
        assert counter.frame_count == compiled * len(held)  # a layer in one piece
    assert held[0] < held[1] < GOAL * held[0]


# Of the two places where weights are restored: beside the original, and in its place.
@pytest.mark.parametrize("method", ["fisher", "kl_div"])
def test_codes_score_as_the_values_that_they_restore(wide_llama, method, monkeypatch):
    batches, found = (batch_of(0, 2, 12), batch_of(1, 2, 12)), []
    for kept in ("values", "stored"):
        monkeypatch.setattr(candidates, "_kept", lambda *_, kept=kept: kept)
        with scorer_of(wide_llama, method, tuple(FORMATS), batches, torch.float32) as scorer:
            found.append([scorer.scores([batch])[0]() for batch in batches])
    assert found[0] == found[1]
    assert {name for formats in found[0][0].values() for name in formats} == set(FORMATS)


# A layer, and the first gradient; alone, with each of four groups in either format, and for four of these at once.
@pytest.mark.parametrize(("method", "pieces"), [("fisher", 2), ("kl_div", 10)])
def test_codes_are_restored_within_a_compiled_layer(wide_llama, method, pieces, counter, monkeypatch):
    batches, found = (batch_of(0, 2, 12), batch_of(1, 2, 12)), []
    monkeypatch.setattr(candidates, "_kept", lambda *_: "stored")
    for tokens in (10**9, 1):
        monkeypatch.setattr(gradient, "_COMPILED_FROM", tokens)
        monkeypatch.setattr(kl, "_COMPILED_FROM", tokens)
        with scorer_of(wide_llama, method, ("nvfp4", "nvfp4_w4a16"), batches, torch.float32) as scorer:
            if method == "fisher":
                monkeypatch.setattr(scorer, "_is_graphed", lambda _: True)
                monkeypatch.setattr(scorer, "_replayed", lambda *given, own=scorer: graphed(own, *given))
            found.append([scorer.scores([batch])[0]() for batch in batches])
    assert counter.frame_count == pieces
    for one, other in zip(*found, strict=True):
        for group, formats in one.items():
            for name, score in formats.items():
                assert other[group][name] == pytest.approx(score, rel=1e-4), (group, name)


def graphed(scorer, batch, current):
    """Return a batch's scores as in a CUDA graph."""
    scorer._seed(batch)
    return scorer._at_once(current)
