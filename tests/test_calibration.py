import base64
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import bitladder
from bitladder.data.batches import Batch, DataSet, interleaved
from bitladder.data.pairs import prompt_inputs
from bitladder.data.processors import load_processor
from bitladder.data.samples import load_data
from bitladder.errors import DataError, ModelError
from bitladder.recipe import DataSpec
from bitladder.records import DataSummary, digest_of
from conftest import make_text

DEMO = Path(bitladder.__file__).parent / "demo"


@pytest.fixture(scope="module")
def tokenizer(llama):
    return load_processor(llama)


@pytest.fixture(scope="module")
def processor():
    return load_processor(DEMO / "qwen2_5_vl_digits")


def load(spec, processor, **changes):
    options = {"samples": 4, "sequence_length": 16, "batch_size": 2, "seed": 0, **changes}
    return load_data(spec, processor, **options)


def text_spec(path, **changes):
    return DataSpec(**{"kind": "text", "path": str(path), **changes})


def test_rows_are_the_tokenised_stream(tokenizer, text_file):
    data = load(text_spec(text_file), tokenizer)
    stream = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]
    rows = [tuple(stream[i : i + 16]) for i in range(0, len(stream) - 15, 16)]
    got = [tuple(row) for batch in data.batches for row in batch.inputs["input_ids"].tolist()]
    assert len(got) == 4
    assert set(got) <= set(rows)
    for batch in data.batches:
        assert torch.equal(batch.labels, batch.inputs["input_ids"])
        assert bool(batch.inputs["attention_mask"].all())
    assert data.summary.tokens == 4 * 15


def test_same_seed_same_data_other_seed_other_data(tokenizer, text_file):
    first, again, other = (load(text_spec(text_file), tokenizer, seed=seed).summary for seed in (0, 0, 1))
    assert first == again
    assert first.sha256 != other.sha256


def test_held_out_rows_are_never_calibrated_on(tokenizer, text_file):
    calibration = load(text_spec(text_file), tokenizer, samples=20).summary
    held_out = load_data(
        text_spec(text_file), tokenizer, samples=20, sequence_length=16, batch_size=4, seed=0, avoid=calibration
    ).summary
    assert not set(calibration.sample_ids) & set(held_out.sample_ids)
    assert len(set(held_out.sample_ids)) == 20


def test_jsonl_documents_are_separated(tokenizer, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"body": line}) + "\n" for line in make_text(60).splitlines()))
    data = load(text_spec(path, kind="jsonl", text_field="body"), tokenizer)
    ids = torch.cat([batch.inputs["input_ids"] for batch in data.batches])
    assert bool((ids == tokenizer.eos_token_id).any())


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ("", "text", "holds no text: every text in it is empty"),
        ("short", "text", "holds 0 rows of 16 tokens; 4 were asked for"),
        ("too short", "text", "ask for fewer samples"),
        ('{"text": "a"', "jsonl", "line 1 is not JSON"),
        ("[1]", "jsonl", "not a JSON object"),
        ('{"body": "a"}', "jsonl", "set data.text_field"),
    ],
)
def test_bad_text(content, kind, words, tokenizer, tmp_path):
    path = tmp_path / "data"
    path.write_text(content)
    with pytest.raises(DataError, match=words):
        load(text_spec(path, kind=kind), tokenizer)


def test_missing_and_binary_files(tokenizer, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load(text_spec(tmp_path / "nowhere"), tokenizer)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match="UTF-8"):
        load(text_spec(tmp_path / "binary"), tokenizer)


def test_huggingface_needs_its_package(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"bitladder\[data\]"):
        load(text_spec("some/dataset", kind="huggingface"), tokenizer)


def test_a_data_set_directory(tokenizer, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in make_text(60).splitlines()))
    data = load(text_spec(tmp_path, kind="huggingface", text_field="body"), tokenizer)
    assert data.summary.samples == 4
    for changes, words in (
        ({"text_field": "text"}, "no column 'text'; it has body"),
        ({"split": "x"}, "can't be loaded"),
    ):
        with pytest.raises(DataError, match=words):
            load(text_spec(tmp_path, kind="huggingface", **{"text_field": "body", **changes}), tokenizer)


def test_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_processor(tmp_path)


def pairs(processor, **changes):
    spec = DataSpec(kind="image_text", path=str(DEMO / "data" / "calibration.jsonl"))
    return load(spec, processor, **{"samples": 12, "sequence_length": 64, "batch_size": 4, **changes})


def test_labels_are_the_answers_tokens(processor):
    data = pairs(processor)
    tokenizer = processor.tokenizer
    samples = iter(data.samples)
    for batch in data.batches:
        for row, mask, ids in zip(batch.labels, batch.inputs["attention_mask"], batch.inputs["input_ids"], strict=True):
            sample = next(samples)
            text = tokenizer.decode(row[row != -100])
            assert text == f"{sample.text}<|im_end|>\n"
            assert bool((row[mask == 0] == -100).all())
            assert sample.prompt in tokenizer.decode(ids)
            image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
            assert not bool((row == image_token).any())
            assert bool((ids == image_token).any())
    assert data.summary.tokens == sum(batch.loss_tokens for batch in data.batches)
    assert any(not bool(batch.inputs["attention_mask"].all()) for batch in data.batches), "no padding was tested"


def test_pixels_are_the_image_processors(processor):
    data = pairs(processor, samples=4)
    images = [sample.load_image() for sample in data.samples]
    wanted = processor.image_processor(images=images, return_tensors="pt")
    assert torch.equal(data.batches[0].inputs["pixel_values"], wanted["pixel_values"])


def test_prompts_end_at_the_assistants_turn(processor):
    samples = pairs(processor, samples=4).samples
    inputs = prompt_inputs(samples, processor)
    for ids in inputs["input_ids"]:
        assert processor.tokenizer.decode(ids).endswith("<|im_start|>assistant\n")


def test_image_files_and_default_prompt(processor, tmp_path):
    Image.new("RGB", (56, 56), "white").save(tmp_path / "white.png")
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"image": "white.png", "text": "nothing"}\n')
    data = load(DataSpec(kind="image_text", path=str(path), prompt="What?"), processor, samples=1, sequence_length=64)
    assert data.samples[0].prompt == "What?"


def test_bad_pairs(processor, tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    spec = DataSpec(kind="image_text", path=str(path))
    for line, words in (
        ('{"text": "a"}', "has no 'image'"),
        ('{"image": "nowhere.png", "text": "a"}', "can't be read"),
        ('{"image": "data:image/png;base64,AAAA", "text": "a"}', "can't be read"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(DataError, match=words):
            load(spec, processor, samples=1, sequence_length=64)
    with pytest.raises(DataError, match="takes no images"):
        load(spec, tokenizer, samples=1)
    buffer = io.BytesIO()
    Image.new("L", (448, 448)).save(buffer, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    path.write_text(json.dumps({"image": uri, "text": "a"}) + "\n")
    with pytest.raises(DataError, match="sequence_length is 64"):
        load(spec, processor, samples=1, sequence_length=64)


@pytest.fixture
def coco(tmp_path):
    """A COCO directory: three images; two captions for the first, an empty one for the last."""
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    images = [{"id": number, "file_name": f"{number:012}.jpg"} for number in (7, 3, 5)]
    for entry in images:
        Image.new("RGB", (56, 56), (entry["id"] * 20, 0, 0)).save(tmp_path / "val2017" / entry["file_name"])
    captions = [(11, 3, "second"), (10, 3, " first \n"), (12, 7, "seven"), (13, 5, "  ")]
    annotations = [{"id": number, "image_id": image, "caption": text} for number, image, text in captions]
    path = tmp_path / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return tmp_path


def coco_spec(path, **changes):
    return DataSpec(**{"kind": "coco", "path": str(path), "split": "val2017", **changes})


def test_coco_gives_each_images_first_caption(coco, processor):
    data = load(coco_spec(coco, prompt="What is it?"), processor, samples=2, sequence_length=64)
    found = {Path(sample.image).name: (sample.prompt, sample.text) for sample in data.samples}
    assert found == {"000000000003.jpg": ("What is it?", "first"), "000000000007.jpg": ("What is it?", "seven")}
    assert data.summary.kind == "coco"
    assert "pixel_values" in data.batches[0].inputs
    with pytest.raises(
        DataError, match=r"holds 2 image\+text pairs; 3 were asked for: ask for fewer samples, or give more data"
    ):
        load(coco_spec(coco), processor, samples=3, sequence_length=64)


def test_another_annotations_file(coco, processor):
    path = coco / "annotations" / "captions_val2017.json"
    path.rename(coco / "mine.json")
    with pytest.raises(DataError, match=r"captions_val2017\.json does not exist"):
        load(coco_spec(coco), processor, samples=2, sequence_length=64)
    assert len(load(coco_spec(coco, annotations="mine.json"), processor, samples=2, sequence_length=64).samples) == 2


def test_bad_coco(coco, processor):
    with pytest.raises(DataError, match="COCO directory .* does not exist"):
        load(coco_spec(coco / "nowhere"), processor)
    path = coco / "annotations" / "captions_train2017.json"
    path.write_text((coco / "annotations" / "captions_val2017.json").read_text())
    with pytest.raises(DataError, match=r"no images in train2017/; it has annotations, val2017: set data\.split"):
        load(coco_spec(coco, split=None), processor)
    path.write_text('{"images": []}')
    with pytest.raises(DataError, match="not a file of COCO captions"):
        load(coco_spec(coco, split=None), processor)


def rows_of(name, sizes, length=8, first=0):
    """A data set of one row of `first`, `first` + 1, … a sample, in batches of these sizes."""
    rows = torch.arange(first, first + sum(sizes))[:, None].expand(-1, length).contiguous()
    batches = tuple(
        Batch({"input_ids": part, "attention_mask": torch.ones_like(part)}, part.clone()) for part in rows.split(sizes)
    )
    summary = DataSummary(
        source=name,
        kind="text",
        sha256=name,
        samples=sum(sizes),
        tokens=sum(sizes) * (length - 1),
        sequence_length=length,
        batch_size=max(sizes),
        seed=first,
        sample_ids=tuple(f"{name}{index}" for index in range(sum(sizes))),
    )
    return DataSet(batches, summary)


def firsts(data):
    return [int(batch.labels[0, 0]) for batch in data.batches]


def test_sets_are_interleaved_evenly():
    two, four, odd = rows_of("a", [2, 2]), rows_of("b", [1] * 4, first=100), rows_of("c", [4, 4, 1], 12, first=200)
    assert firsts(interleaved([two, four])) == [100, 0, 101, 102, 2, 103]
    assert firsts(interleaved([four, two])) == [100, 0, 101, 102, 2, 103]
    assert firsts(interleaved([two, two])) == [0, 0, 2, 2]
    sets = [two, four, odd]
    data = interleaved(sets)
    assert sorted(firsts(data)) == [0, 2, 100, 101, 102, 103, 200, 204, 208]
    for count in range(1, len(data.batches) + 1):  # no set is ahead of the whole by more than a batch of its own
        held = [sum(len(b.labels) for b in data.batches[:count] if any(b is own for own in s.batches)) for s in sets]
        share = sum(held) / data.summary.samples
        for one, rows in zip(sets, held, strict=True):
            assert abs(rows - share * one.summary.samples) <= one.summary.batch_size


def test_a_mixture_says_what_is_in_it():
    first, second = rows_of("a", [2, 1], first=3), rows_of("b", [4], 12, first=100)
    data = interleaved([first, second])
    assert data.summary == DataSummary(
        source="a + b",
        kind="mixed",
        sha256=data.summary.sha256,
        samples=7,
        tokens=3 * 7 + 4 * 11,
        sequence_length=12,
        batch_size=4,
        seed=3,
        sample_ids=("a0", "a1", "a2", "b0", "b1", "b2", "b3"),
        parts=tuple(one.summary.model_copy(update={"sample_ids": ()}) for one in (first, second)),
    )
    assert interleaved([second, first]).summary.sha256 != interleaved([first, second, second]).summary.sha256
    assert interleaved([first]) is first


def test_a_single_set_keeps_bytes_and_digests(processor):
    """Numbers of before there were mixtures: measurements that are on disk stay valid."""
    for kind, name, sha256, record in (
        (
            "text",
            "captions.txt",
            "9951c7335988700e41bb70b231215e9ec4d624c336238f1937b058c97a491a38",
            "388e9faafc73772fba2936c26966666e17a27393a327301fad7a7e2268660504",
        ),
        (
            "image_text",
            "calibration.jsonl",
            "a0ed20dfd2f8c7a49fc62c05b55e1cd61e386486459123684b8a47e9b09c33b7",
            "1c85c7d6e9e8fb540945c4fb51621d0cf5f211d696e84940616b64c19bfde074",
        ),
    ):
        spec = DataSpec(kind=kind, path=str(DEMO / "data" / name))
        data = load_data(spec, processor, samples=5, sequence_length=64, batch_size=2, seed=3)
        summary = interleaved([data]).summary
        assert summary.sha256 == sha256
        assert digest_of([summary.model_copy(update={"source": "s"}).model_dump_json()]) == record
        assert "parts" not in json.loads(summary.model_dump_json())
        assert "parts" not in summary.model_dump(exclude={"sample_ids"})
