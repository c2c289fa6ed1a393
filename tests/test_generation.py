"""Rows that the model writes itself: drawn from its own distribution, written once, and kept."""

import dataclasses
import json
import shutil
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitladder.data import generation
from bitladder.data.processors import load_processor
from bitladder.data.samples import GENERATED_SOURCE, load_data
from bitladder.errors import DataError, ModelError, RecipeError, RecordError
from bitladder.models.loading import image_token_ids, load_model
from bitladder.recipe import DataSpec, parse_recipe
from bitladder.records import Measurement
from bitladder.steps.data import calibration_data, load_set, scored_calibration_data
from bitladder.steps.measure import measure, take_over
from bitladder.steps.workspace import Workspace
from conftest import source_of
from test_calibration import DEMO

WRITING = generation.Writing(
    samples=6,
    sequence_length=16,
    seed=0,
    temperature=1.0,
    start=(0,),
    kept=True,
    known_tokens=384,
    dtype="auto",
    device="cpu",
)


def changed(**fields):
    return dataclasses.replace(WRITING, **fields)


@pytest.fixture(scope="module")
def model(llama):
    return load_model(llama, torch.float32)


def test_rows_are_the_same_for_a_seed_and_more_keep_the_first(model):
    first = generation.rows(model, WRITING)
    assert first.shape == (6, 16)
    assert first.dtype == torch.int64
    assert bool((first[:, 0] == WRITING.start[0]).all())
    assert len({tuple(row) for row in first.tolist()}) == 6
    assert torch.equal(generation.rows(model, WRITING), first)
    assert torch.equal(generation.rows(model, changed(samples=4)), first[:4])
    assert not torch.equal(generation.rows(model, changed(seed=1)), first)
    assert not torch.equal(generation.rows(model, changed(temperature=2.0)), first)


def test_batches_that_are_written_at_once_change_nothing(model, monkeypatch):
    whole = generation.rows(model, WRITING)
    monkeypatch.setattr(generation, "_TOKENS_AT_ONCE", 2 * WRITING.sequence_length)
    steps = []
    assert torch.equal(generation.rows(model, WRITING, lambda phase, done, total: steps.append((done, total))), whole)
    assert steps == sorted(steps)
    assert steps[0] == (0, 90)
    assert steps[-1] == (90, 90)


def test_tokens_are_drawn_as_the_model_has_them():
    """Shares of 8,000 draws against the distribution that they are from: within four standard errors."""
    rows, logits = 8000, torch.tensor([1.0, 0.0, -1.0, 2.0, 3.0, 5.0])
    writing = changed(samples=rows, sequence_length=2, temperature=2.0, known_tokens=5)
    numbers = torch.stack([generation._random_numbers(0, row, 1) for row in range(rows)])
    draw = generation._Draw(numbers, writing, [3], lambda _: None)
    scores = draw(torch.zeros(rows, 1, dtype=torch.long), logits.expand(rows, -1))
    assert bool(((scores == 0).sum(-1) == 1).all())
    found = scores.argmax(-1).bincount(minlength=6) / rows
    wanted = torch.softmax(logits[[0, 1, 2, 4]] / 2.0, -1)
    assert found[3] == 0  # never drawn
    assert found[5] == 0  # not the tokenizer's
    errors = (wanted * (1 - wanted) / rows).sqrt()
    assert bool(((found[[0, 1, 2, 4]] - wanted).abs() < 4 * errors).all())


def test_a_model_s_own_settings_neither_stop_nor_bend_it(model, llama):
    wanted = generation.rows(model, WRITING)
    other = load_model(llama, torch.float32)
    other.generation_config.eos_token_id = list(range(384))
    other.generation_config.repetition_penalty = 5.0
    other.generation_config.top_k = 1
    assert torch.equal(generation.rows(other, WRITING), wanted)


def test_nan_logits_are_refused(llama):
    broken = load_model(llama, torch.float32)
    broken.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ModelError, match="NaN or Inf while it writes"):
        generation.rows(broken, WRITING)


def test_a_vision_language_model_writes_text():
    directory = DEMO / "qwen2_5_vl_digits"
    model = load_model(directory, torch.float32)
    tokenizer = load_processor(directory).tokenizer
    writing = changed(
        samples=16,
        sequence_length=24,
        start=generation.start_of(tokenizer)[0],
        kept=False,
        known_tokens=10_000,
        temperature=50.0,
    )
    rows = generation.rows(model, writing)
    assert not bool(torch.isin(rows, torch.tensor(image_token_ids(model.config))).any())
    assert len(set(rows.flatten().tolist())) > 200  # so hot that a picture's token would be among them
    assert bool(torch.isfinite(model(input_ids=rows).logits).all())


class Tokenizer(types.SimpleNamespace):
    """Puts `prefix` before every text, and has these special tokens."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [*(self.prefix if add_special_tokens else []), 99]}


def tokenizer(**ids):
    return Tokenizer(**{"bos_token_id": None, "eos_token_id": None, "all_special_ids": [], "prefix": [], **ids})


def test_what_a_row_begins_with():
    """With what the tokenizer puts first by itself; else with nothing, after a token that the model alone sees."""
    assert generation.start_of(tokenizer(prefix=[3], bos_token_id=3, eos_token_id=7)) == ((3,), True)
    assert generation.start_of(tokenizer(prefix=[4, 3], bos_token_id=3)) == ((4, 3), True)
    assert generation.start_of(tokenizer(bos_token_id=0, eos_token_id=7, all_special_ids=[5])) == ((0,), False)
    assert generation.start_of(tokenizer(eos_token_id=7, all_special_ids=[5, 7])) == ((7,), False)
    assert generation.start_of(tokenizer(all_special_ids=[5, 6])) == ((5,), False)
    with pytest.raises(DataError, match="no special token"):
        generation.start_of(tokenizer())


def test_a_start_that_is_not_kept_leaves_whole_rows(model):
    kept = generation.rows(model, changed(start=(3, 0), sequence_length=10))
    assert kept.shape == (6, 10)
    assert bool((kept[:, :2] == torch.tensor([3, 0])).all())
    assert torch.equal(generation.rows(model, changed(start=(3, 0), sequence_length=8, kept=False)), kept[:, 2:])


def test_the_key_follows_model_and_settings():
    keys = {WRITING.key("a"), WRITING.key("b")}
    for field in dataclasses.fields(WRITING):
        value = getattr(WRITING, field.name)
        keys.add(
            changed(
                **{
                    field.name: f"{value}x"
                    if isinstance(value, str)
                    else (1,)
                    if isinstance(value, tuple)
                    else value + 1
                }
            ).key("a")
        )
    assert len(keys) == 2 + len(dataclasses.fields(WRITING))


def recipe_of(llama, text_file, output, **data):
    rows = {"samples": 4, "sequence_length": 24, "batch_size": 2}
    content = {
        "model": {"path": str(llama)},
        "calibration": {"data": {"kind": "generated", **data.pop("data", {})}, **rows, **data},
        "held_out": {"data": {"kind": "text", "path": str(text_file)}, **rows},
        "schemes": [{"name": "full", "coverage": 1.0}],
        "output": str(output),
    }
    return parse_recipe(content, "recipe")


@pytest.fixture
def calibrated(llama, text_file, tmp_path):
    """Give the calibration data of a recipe whose rows the model writes."""

    def data(model=llama, **changes):
        work = Workspace(recipe_of(model, text_file, tmp_path / "out", **changes), tmp_path / "out")
        return calibration_data(work), work.done

    data.files = lambda: sorted((tmp_path / "out" / "generated").iterdir())
    return data


def test_rows_are_written_once(calibrated, llama):
    data, done = calibrated()
    assert done == ["generate"]
    (path,) = calibrated.files()
    before = path.stat()
    again, done = calibrated()
    assert done == []
    assert again.summary == data.summary
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert (data.summary.kind, data.summary.source, data.summary.tokens) == ("generated", GENERATED_SOURCE, 4 * 23)
    kept = load_file(path)["tokens"].tolist()
    assert sorted(row for batch in data.batches for row in batch.inputs["input_ids"].tolist()) == sorted(kept)
    path.unlink()  # on a CPU they come out the same
    assert calibrated()[0].summary == data.summary


def test_rows_are_written_again_where_model_or_settings_differ(calibrated, llama, tmp_path):
    first = calibrated()[0].summary
    for changes in ({"seed": 1}, {"data": {"temperature": 0.5}}, {"samples": 5}, {"sequence_length": 25}):
        data, done = calibrated(**changes)
        assert done == ["generate"]
        assert data.summary.sha256 != first.sha256
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    data, done = calibrated(other)
    assert done == ["generate"]
    assert data.summary.sha256 != first.sha256
    data, done = calibrated(batch_size=4)  # the same rows in other batches
    assert done == []
    assert set(data.summary.sample_ids) == set(first.sample_ids)


@pytest.mark.parametrize("damage", ["cut", "garbled", "another's", "other rows"])
def test_a_damaged_file_is_named(damage, calibrated):
    calibrated()
    (path,) = calibrated.files()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "garbled":
        path.write_bytes(b"not safetensors")
    elif damage == "another's":
        calibrated(seed=1)
        (other,) = [found for found in calibrated.files() if found != path]
        shutil.copyfile(other, path)
    else:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file({"tokens": load_file(path)["tokens"].flip(0)}, path, metadata=metadata)
    with pytest.raises(RecordError, match=f"{path.name} .*; delete it, and the model writes its rows again") as caught:
        calibrated()
    assert "\n" not in str(caught.value)


def test_rows_that_are_used_already_are_refused(llama, text_file, tmp_path):
    same = recipe_of(llama, text_file, tmp_path / "out").model_dump(mode="json")
    two = {**same, "calibration": [same["calibration"], same["calibration"]]}
    with pytest.raises(RecipeError, match=r"calibration\.1 would have the rows .* for calibration\.0; give it another"):
        parse_recipe(two, "recipe")
    once = calibration_data(Workspace(parse_recipe(same, "recipe"), tmp_path / "out")).summary
    spec = parse_recipe(same, "recipe").calibration[0]
    with pytest.raises(DataError, match="what the model writes with seed 0 is used already; give this set another"):
        load_set(Workspace(parse_recipe(same, "recipe"), tmp_path / "out"), spec, spec.data, once)
    two["calibration"][1] = {**same["calibration"], "seed": 1}
    data = calibration_data(Workspace(parse_recipe(two, "recipe"), tmp_path / "out"))
    assert len(set(data.summary.sample_ids)) == 8


def test_rows_that_nobody_wrote(llama):
    sizes = {"samples": 1, "sequence_length": 8, "batch_size": 1, "seed": 0}
    with pytest.raises(DataError, match="written by the model"):
        load_data(DataSpec(kind="generated"), load_processor(llama), **sizes)


def test_a_measurement_takes_its_rows_along(llama, text_file, tmp_path):
    recipe = recipe_of(llama, text_file, tmp_path / "out")
    measured = measure(Workspace(recipe, tmp_path / "out"))
    work = Workspace(recipe, tmp_path / "out")
    assert measure(work) == measured  # nothing is written or measured again
    assert work.done == []
    work = Workspace(recipe, tmp_path / "next")
    take_over(work, tmp_path / "out" / "measurement.json")
    (kept,) = (tmp_path / "out" / "generated").iterdir()
    assert (tmp_path / "next" / "generated" / kept.name).read_bytes() == kept.read_bytes()
    assert scored_calibration_data(work, measured).summary == measured.calibration
    assert work.done == ["measure"]
    assert json.loads((tmp_path / "next" / "measurement.json").read_text())["calibration"]["kind"] == "generated"
    assert Measurement.read(tmp_path / "next" / "measurement.json").model.sha256 == source_of(llama).sha256
