"""What rows begin with: BOS exactly once where the tokenizer puts it by itself, and nothing else changes."""

import json
import shutil

import pytest
import torch
import transformers

from bitladder.data import pairs
from bitladder.data.processors import load_processor
from bitladder.data.samples import load_data
from bitladder.data.special import begun_once, prefix_of
from bitladder.errors import DataError
from bitladder.evaluation import logprobs
from bitladder.recipe import DataSpec
from conftest import make_text, put_first, save_tokenizer
from test_calibration import DEMO, load, text_spec

WRITES_BOS = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("bos")
    save_tokenizer(path)
    put_first(path, template=WRITES_BOS)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_processor(directory)


def ids_of(data):
    return torch.cat([batch.inputs["input_ids"] for batch in data.batches])


def test_the_prefix_is_what_the_tokenizer_does(directory, tokenizer, tmp_path):
    bos = tokenizer.bos_token_id
    assert prefix_of(tokenizer) == (bos,)
    save_tokenizer(tmp_path)
    assert prefix_of(load_processor(tmp_path)) == ()
    named = load_processor(tmp_path)
    named.bos_token = "<eos>"  # a name alone puts nothing
    assert prefix_of(named) == ()
    put_first(tmp_path, ("<mask>", "<sop>"))
    two = load_processor(tmp_path)
    assert prefix_of(two) == tuple(two.convert_tokens_to_ids(["<mask>", "<sop>"]))


def test_every_row_begins_with_bos_once(tokenizer, text_file):
    data = load(text_spec(text_file), tokenizer, samples=20)
    ids = ids_of(data)
    stream = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]
    slices = {tuple(stream[i : i + 15]) for i in range(0, len(stream) - 14, 15)}
    assert ids.shape == (20, 16)
    assert bool((ids[:, 0] == tokenizer.bos_token_id).all())
    assert int((ids == tokenizer.bos_token_id).sum()) == 20
    assert {tuple(row) for row in ids[:, 1:].tolist()} <= slices
    assert data.summary.tokens == 20 * 15


@pytest.mark.parametrize("kind", ["jsonl", "huggingface"])
def test_documents_are_separated_by_eos_alone(kind, tokenizer, tmp_path):
    """A text that begins with BOS itself, as chats rendered beforehand do, doesn't give it twice."""
    begins, ends = ("", "<bos>", "<bos><bos>", "\n <bos>"), ("", "<eos>")
    texts = [begins[i % 4] + line + ends[i % 3 == 0] for i, line in enumerate(make_text(60).splitlines())]
    lines = [json.dumps({"text": text}) for text in texts]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines))
    ids = ids_of(load(text_spec(tmp_path if kind == "huggingface" else path, kind=kind), tokenizer, samples=30))
    assert bool((ids[:, 0] == tokenizer.bos_token_id).all())
    assert not bool((ids[:, 1:] == tokenizer.bos_token_id).any())
    ended = ids == tokenizer.eos_token_id
    assert bool(ended[:, 1:].any())
    assert not bool((ended[:, 1:] & ended[:, :-1]).any()), "nor EOS, which some end with by themselves"


def test_of_several_tokens_that_are_put_first_none_counts(text_file, tmp_path):
    save_tokenizer(tmp_path)
    put_first(tmp_path, ("<mask>", "<sop>"))
    two = load_processor(tmp_path)
    data = load(text_spec(text_file), two)
    assert bool((ids_of(data)[:, :2] == torch.tensor(prefix_of(two))).all())
    assert data.summary.tokens == 4 * 14
    with pytest.raises(DataError, match="sequence_length 2 holds only what the tokenizer puts first; use at least 3"):
        load(text_spec(text_file), two, sequence_length=2)


def test_held_out_rows_and_what_vllm_is_sent_begin_alike(directory, tokenizer, text_file):
    calibration = load(text_spec(text_file), tokenizer, samples=20).summary
    held_out = load(text_spec(text_file), tokenizer, samples=8, avoid=calibration)
    assert not set(calibration.sample_ids) & set(held_out.summary.sample_ids)
    sequences = logprobs.sequences(held_out, "x", directory)
    assert [list(one.prompt_ids) for one in sequences] == ids_of(held_out).tolist()
    assert {one.prompt_ids[0] for one in sequences} == {tokenizer.bos_token_id}
    assert {one.counted for one in sequences} == {tuple(range(1, 16))}


@pytest.mark.parametrize("writes", [True, False])
def test_a_chat_template_and_the_tokenizer_give_bos_once(writes, tmp_path):
    """Gemma 3's, Pixtral's and Llama 3.2 Vision's templates write what their tokenizers add too."""
    shutil.copytree(DEMO / "qwen2_5_vl_digits", tmp_path / "model")
    processor = load_processor(tmp_path / "model")
    tokenizer, bos = processor.tokenizer, "<|endoftext|>"
    template = transformers.AutoTokenizer.from_pretrained(tmp_path / "model").chat_template or processor.chat_template
    number = tokenizer.convert_tokens_to_ids(bos)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    processor.chat_template = ("<|endoftext|>" if writes else "") + template
    spec = DataSpec(kind="image_text", path=str(DEMO / "data" / "calibration.jsonl"))
    data = load_data(spec, processor, samples=4, sequence_length=64, batch_size=2, seed=0)
    for ids, mask in ((b.inputs["input_ids"], b.inputs["attention_mask"]) for b in data.batches):
        assert bool((ids[:, 0] == number).all())
        assert not bool(((ids[:, 1:] == number) & (mask[:, 1:] == 1)).any())
    prompts = pairs.prompt_inputs(data.samples, processor)
    assert [
        int(((row == number) & (m == 1)).sum())
        for row, m in zip(prompts["input_ids"], prompts["attention_mask"], strict=True)
    ] == [1] * 4


def test_a_rendered_chat_begins_once(tokenizer):
    assert begun_once(tokenizer, "<bos>hello") == "<bos>hello"
    assert begun_once(tokenizer, "hello") == "<bos>hello"


def test_a_first_token_that_no_text_can_hold_is_refused_for_chats(tmp_path):
    """Its name would stand there in letters, and the row begin without it."""
    save_tokenizer(tmp_path)
    put_first(tmp_path, template=WRITES_BOS)
    for name, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", None)):
        content = json.loads((tmp_path / name).read_text())
        if key:
            content[key] = [token for token in content[key] if token["content"] != "<bos>"]
        content.pop("bos_token", None)
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = load_processor(tmp_path)
    assert len(prefix_of(tokenizer)) == 1
    with pytest.raises(DataError, match="puts <bos> before a text, but takes it for letters .* added_tokens"):
        begun_once(tokenizer, "hello")


def test_a_token_beyond_the_embedding_is_named(tokenizer, text_file):
    load(text_spec(text_file), tokenizer, vocabulary=306)
    with pytest.raises(DataError, match=r"token 305 \('<bos>'\) is beyond the model's embedding of 305 tokens; remove"):
        load(text_spec(text_file), tokenizer, vocabulary=305)
