"""The embedded model answers questions about pictures that it never saw."""

import json
from pathlib import Path

import pytest
import torch

import bitladder
from bitladder.data.pairs import Sample
from bitladder.data.processors import load_processor
from bitladder.data.samples import load_data
from bitladder.evaluation.task import Task
from bitladder.models.loading import load_model
from bitladder.models.target import find_target
from bitladder.recipe import DataSpec

DEMO = Path(bitladder.__file__).parent / "demo"
MODEL = DEMO / "qwen2_5_vl_digits"


def lines(name):
    return [json.loads(line) for line in (DEMO / "data" / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def processor():
    return load_processor(MODEL)


def test_over_90_percent_on_held_out_pictures(processor):
    spec = DataSpec(kind="image_text", path=str(DEMO / "data" / "heldout.jsonl"))
    data = load_data(spec, processor, samples=400, sequence_length=64, batch_size=50, seed=0)
    task = Task.exact_match(data.samples, processor)
    model = load_model(MODEL, torch.float32)
    assert task.right(model, "cpu", lambda *_: None, "answer").count("1") > 0.9 * 400


def test_the_answer_depends_on_the_picture(processor):
    """With the pictures swapped among the samples, the same model is mostly wrong."""
    samples = [Sample(image=row["image"], prompt=row["prompt"], text=row["text"]) for row in lines("heldout.jsonl")][
        :100
    ]
    swapped = [
        Sample(image=other.image, prompt=sample.prompt, text=sample.text)
        for sample, other in zip(samples, samples[1:] + samples[:1], strict=True)
    ]
    model = load_model(MODEL, torch.float32)
    right = Task.exact_match(swapped, processor).right(model, "cpu", lambda *_: None, "answer").count("1")
    assert right < 30


def test_no_picture_is_in_both_sets():
    shown, held_out = ({row["image"] for row in lines(name)} for name in ("calibration.jsonl", "heldout.jsonl"))
    assert len(shown) == 96
    assert len(held_out) == 400
    assert not shown & held_out


def test_it_is_small_and_looks_like_a_qwen2_5_vl():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 9e6
    assert sum(path.stat().st_size for path in (DEMO / "data").iterdir()) < 1e6
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    target = find_target(MODEL)
    assert len(target.groups) == 24
    tensors = {module.tensor for group in target.groups for module in group.modules}
    # the names that the real Qwen2.5-VL-3B-Instruct has in its files
    assert "model.layers.0.self_attn.q_proj.weight" in tensors
    assert any(module.checkpoint_name.startswith("visual.blocks.") for module in target.untouched)
