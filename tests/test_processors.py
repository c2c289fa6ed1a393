"""Image+text pairs through the processors of other architectures, and through files that lack something."""

import base64
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import bitladder
import conftest
from bitladder.data.pairs import prompt_inputs
from bitladder.data.processors import has_template, load_processor, template_of
from bitladder.data.samples import load_data
from bitladder.errors import DataError, ModelError
from bitladder.recipe import DataSpec

DEMO = Path(bitladder.__file__).parent / "demo"
MODEL, PAIRS = DEMO / "qwen2_5_vl_digits", DEMO / "data" / "calibration.jsonl"
SQUARE = {"size": {"height": 28, "width": 28}}
QWEN = {"size": {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}}
QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
IDEFICS = {"size": {"longest_edge": 28}, "max_image_size": {"longest_edge": 28}, "do_image_splitting": False}
LLAVA = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
CLIP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
# processor, image processor, its settings, the processor's own settings, its tokens, what the template writes, tokens
# of a picture, named tokens of the tokenizer
CASES = {
    "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLImageProcessor", QWEN, {}, QWEN_TOKENS, "<|image_pad|>", 4, {}),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLImageProcessorFast", QWEN, {}, QWEN_TOKENS, "<|image_pad|>", 4, {}),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen2VLImageProcessor", QWEN, {}, QWEN_TOKENS, "<|image_pad|>", 4, {}),
    "llava": ("LlavaProcessor", "CLIPImageProcessor", CLIP, LLAVA, ("<image>",), "<image>", 4, {}),
    "gemma3": (
        "Gemma3Processor",
        "Gemma3ImageProcessor",
        SQUARE,
        {"image_seq_length": 3},
        (),
        "<start_of_image>",
        3,
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    ),
    "idefics3": (
        "Idefics3Processor",
        "Idefics3ImageProcessor",
        IDEFICS,
        {"image_seq_len": 2},
        ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
        "<image>",
        2,
        {},
    ),
    "internvl": (
        "InternVLProcessor",
        "GotOcr2ImageProcessor",
        {**SQUARE, "crop_to_patches": False},
        {"image_seq_length": 2},
        (),
        "<IMG_CONTEXT>",
        2,  # a crop: pictures of unlike shape have unlike numbers of crops
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
}
PALIGEMMA = (
    "PaliGemmaProcessor",
    "SiglipImageProcessor",
    {**SQUARE, "image_seq_length": 4},
    {},
    ("<image>",),
    "<image>",
    4,
    {},
)


def template(image: str) -> str:
    return (
        "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        + image
        + "{% else %} {{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
        + "{% if add_generation_prompt %}assistant:{% endif %}"
    )


def build(directory: Path, name: str) -> Path:
    """Write the tokenizer and processor files of an architecture, as its models have them."""
    processor, image_processor, settings, own, tokens, image, _, named = {**CASES, "paligemma": PALIGEMMA}[name]
    tokenizer = AutoTokenizer.from_pretrained(MODEL, extra_special_tokens=named)
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens, *named.values()]})
    tokenizer.bos_token = tokenizer.bos_token or tokenizer.eos_token
    tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": image_processor, "processor_class": processor, **settings})
    )
    (directory / "processor_config.json").write_text(json.dumps({"processor_class": processor, **own}))
    (directory / "config.json").write_text(json.dumps({"model_type": name}))
    (directory / "chat_template.jinja").write_text(template(image))
    return directory


def load(processor, path=PAIRS, samples=4, batch_size=2, length=200):
    spec = DataSpec(kind="image_text", path=str(path))
    return load_data(spec, processor, samples=samples, sequence_length=length, batch_size=batch_size, seed=0)


@pytest.mark.parametrize("name", CASES)
def test_several_pictures_a_batch_in_every_architecture(tmp_path, name):
    processor = load_processor(build(tmp_path, name))
    _, _, _, _, _, word, count, _ = CASES[name]
    together, alone = load(processor), load(processor, batch_size=1)
    assert together.samples == alone.samples
    rows = [(batch, row) for batch in together.batches for row in range(2)]
    # Gemma 3's template writes the start of a picture, and its processor the tokens of the picture after it.
    image = processor.tokenizer.convert_tokens_to_ids("<image_soft_token>" if name == "gemma3" else word)
    for (batch, row), single, sample in zip(rows, alone.batches, together.samples, strict=True):
        length = int(batch.inputs["attention_mask"][row].sum())
        ids = batch.inputs["input_ids"][row, :length]
        assert torch.equal(ids, single.inputs["input_ids"][0]), "a row depends on its neighbour"
        found = int((ids == image).sum())
        assert found == count or (name == "internvl" and found % count == 0), "as many tokens as crops ask for"
        kept = batch.labels[row] != -100
        assert processor.tokenizer.decode(batch.inputs["input_ids"][row][kept]).strip() == sample.text
    for index, batch in enumerate(together.batches):  # the pictures in the order of their rows, crops beside each other
        singles = alone.batches[2 * index : 2 * index + 2]
        assert torch.equal(batch.inputs["pixel_values"], torch.cat([one.inputs["pixel_values"] for one in singles]))
    moved = together.batches[0].to("cpu")
    assert set(moved.inputs) == set(together.batches[0].inputs)
    prompts = prompt_inputs(together.samples, processor)
    assert all(processor.tokenizer.decode(ids).endswith("assistant:") for ids in prompts["input_ids"])


def test_a_processor_that_writes_between_prompt_and_answer_is_refused(tmp_path):
    processor = load_processor(build(tmp_path, "paligemma"))
    with pytest.raises(DataError, match=r"changes the prompt .* calibrate the model on text"):
        load(processor)


def test_no_template_is_asked_for_that_would_not_help(tmp_path):
    """With one, PaliGemma's processor is refused all the same (the test above); others' labels are placed."""
    for name, words in (("paligemma", "no template could .*; calibrate the model on text"), ("llava", "put one into")):
        directory = build(tmp_path / name, name)
        (directory / "chat_template.jinja").unlink()
        with pytest.raises(DataError, match=f"no chat template.*{words}") as caught:
            load(load_processor(directory))
        assert ("chat_template.jinja" in str(caught.value)) == (name == "llava")


def variant(tmp_path, edit) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(MODEL, directory)
    edit(directory)
    return directory


def change(directory: Path, name: str, **changes) -> None:
    content = json.loads((directory / name).read_text()) | changes
    (directory / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def moved_template(directory: Path) -> str:
    text = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").unlink()
    return text


def only_processor_config(directory: Path) -> None:
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    (directory / "preprocessor_config.json").unlink()
    content = {
        "processor_class": settings.pop("processor_class"),
        "image_processor": settings,
        "video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"},
    }
    (directory / "processor_config.json").write_text(json.dumps(content))


def no_class(directory: Path) -> None:
    change(directory, "preprocessor_config.json", processor_class=None)


def fast(directory: Path) -> None:
    change(directory, "preprocessor_config.json", image_processor_type="Qwen2VLImageProcessorFast")


def template_json(directory: Path) -> None:
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": moved_template(directory)}))


def template_in_tokenizer(directory: Path) -> None:
    change(directory, "tokenizer_config.json", chat_template=moved_template(directory))


def named_templates(directory: Path) -> None:
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": moved_template(directory)}]
    change(directory, "tokenizer_config.json", chat_template=named)


def no_pad(directory: Path) -> None:
    change(directory, "tokenizer_config.json", pad_token=None)


def left(directory: Path) -> None:
    change(directory, "tokenizer_config.json", padding_side="left")


@pytest.mark.parametrize(
    "edit",
    [only_processor_config, no_class, fast, template_json, template_in_tokenizer, named_templates, no_pad, left],
)
def test_files_that_say_the_same_in_another_way(tmp_path, edit):
    wanted = load(load_processor(MODEL)).batches
    processor = load_processor(variant(tmp_path, edit))
    assert has_template(processor)
    for batch, other in zip(load(processor).batches, wanted, strict=True):
        mask = other.inputs["attention_mask"].bool()
        assert torch.equal(batch.inputs["attention_mask"].bool(), mask)
        assert torch.equal(batch.inputs["input_ids"][mask], other.inputs["input_ids"][mask])
        assert torch.equal(batch.labels, other.labels)
        assert torch.equal(batch.inputs["pixel_values"], other.inputs["pixel_values"])


def no_template(directory: Path) -> None:
    moved_template(directory)


def no_default(directory: Path) -> None:
    change(directory, "tokenizer_config.json", chat_template=[{"name": "rag", "template": moved_template(directory)}])


def odd_template(directory: Path) -> None:
    moved_template(directory)
    change(directory, "tokenizer_config.json", chat_template=5)


def text_template(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] | trim }}{% endfor %}")


def blind_template(directory: Path) -> None:
    text = "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
    (directory / "chat_template.jinja").write_text(text)


def refusing_template(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ raise_exception('only users') }}")


def only_tokenizer(directory: Path) -> None:
    (directory / "preprocessor_config.json").unlink()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (no_template, r"no chat template.*chat_template\.jinja"),
        (no_default, r"named rag, and none named default"),
        (odd_template, r"chat template is 5, not text; .*chat_template\.jinja"),
        (text_template, "writes nothing for a picture"),
        (blind_template, "writes nothing for a picture"),
        (refusing_template, r"line \d+: .*only users"),
        (only_tokenizer, r"preprocessor_config\.json is missing"),
    ],
)
def test_files_that_lack_something(tmp_path, edit, words):
    with pytest.raises(DataError, match=words) as caught:
        load(load_processor(variant(tmp_path, edit)))
    assert "\n" not in str(caught.value)


def test_code_of_a_models_own_is_never_run(tmp_path):
    def remote(directory: Path) -> None:
        auto = {"AutoProcessor": "mine.Mine", "AutoImageProcessor": "mine.Images"}
        change(
            directory, "preprocessor_config.json", auto_map=auto, processor_class="Mine", image_processor_type="Images"
        )
        change(directory, "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"})
        (directory / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")

    with pytest.raises(ModelError, match="code of its own .* never run"):
        load_processor(variant(tmp_path, remote))
    assert not (tmp_path / "ran").exists()


def test_the_processors_template_is_the_one_that_counts():
    class Owner:
        chat_template = None

    tokenizer, processor = Owner(), Owner()
    processor.tokenizer = tokenizer
    tokenizer.chat_template = {"default": "b", "rag": "c"}
    assert template_of(processor) == "b"
    processor.chat_template = "a"
    assert template_of(processor) == "a"
    processor.chat_template = "{{ strftime_now('%Y-%m-%d') }}"
    assert template_of(processor) == '{{ "2025-01-01" }}', "the same day always, in pairs too"


TEKKEN = {
    "config": {"pattern": r"\p{L}+|.", "default_vocab_size": 270, "default_num_special_tokens": 14, "version": "v3"},
    "vocab": [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)],
    "special_tokens": [
        {"rank": rank, "token_str": text, "is_control": True}
        for rank, text in enumerate(["<unk>", "<s>", "</s>", *(f"<SPECIAL_{k}>" for k in range(3, 14))])
    ],
}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tekken.json": json.dumps(TEKKEN)}, "in tekken.json alone, which transformers reads without BOS"),
        ({"tekken.json": "{}"}, r"tekken.json is damaged \(.*\); fetch it again"),
        ({"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}, "a tokenizer without a vocabulary"),
        ({}, "fetch the tokenizer's files"),
    ],
)
def test_a_tokenizer_that_is_not_whole_is_refused(tmp_path, files, words):
    conftest.llama_config().save_pretrained(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=words) as caught:
        load_processor(tmp_path)
    assert "\n" not in str(caught.value)
    conftest.save_tokenizer(tmp_path)  # the remedy
    assert load_processor(tmp_path)("the cat")["input_ids"]


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
@pytest.mark.parametrize("config", [{}, {"tokenizer_class": "LlamaTokenizer"}])
def test_a_vocabulary_of_sentencepiece_alone_names_its_package(tmp_path, config):
    """transformers itself names tiktoken, with which it can't read the file either."""
    conftest.llama_config().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(ModelError, match="pip install sentencepiece$"):
        load_processor(tmp_path)
