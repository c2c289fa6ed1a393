"""Text as files hold it: every encoding and container is read right, or refused in one line that says what to do."""

import bz2
import codecs
import gzip
import json
import lzma
import os
import shlex
import subprocess

import datasets
import pytest

from bitladder.data import files
from bitladder.data.files import data_set_rows, jsonl_rows, read_text
from bitladder.data.pairs import samples_of
from bitladder.data.processors import load_processor
from bitladder.errors import DataError
from bitladder.recipe import DataSpec
from bitladder.report.numbers import data_kind
from conftest import make_text, save_tokenizer
from test_calibration import load, text_spec

LINES = make_text(60).splitlines()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return load_processor(directory)


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(rows, **options):
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


def test_a_byte_order_mark_and_line_ends_leave_no_trace(tokenizer, tmp_path):
    plain = "\n".join(LINES)
    expected = load(text_spec(put(tmp_path / "plain", plain)), tokenizer).summary.sha256
    variants = (codecs.BOM_UTF8 + plain.encode(), plain.replace("\n", "\r\n"), plain.replace("\n", "\r"))
    for index, content in enumerate(variants):
        assert load(text_spec(put(tmp_path / str(index), content)), tokenizer).summary.sha256 == expected
    rows = jsonl({"text": line} for line in LINES)
    expected = load(text_spec(put(tmp_path / "rows", rows), kind="jsonl"), tokenizer).summary.sha256
    for content in (codecs.BOM_UTF8 + rows.encode(), rows.replace("\n", "\r\n"), rows.replace("\n", "\n\n  \n")):
        path = put(tmp_path / "other", content)
        assert load(text_spec(path, kind="jsonl"), tokenizer).summary.sha256 == expected


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_line(character, tmp_path):
    """JSON strings may hold U+2028 and NEL as they are; Python's splitlines would cut there."""
    rows = [{"text": f"a{character}b"}, {"text": "c"}]
    ascii_only = character < " "  # JSON escapes control characters
    path = put(tmp_path / "d.jsonl", jsonl(rows, ensure_ascii=ascii_only))
    assert list(jsonl_rows(path)) == [(1, rows[0]), (2, rows[1])]


@pytest.mark.parametrize("kind", ["text", "jsonl", "messages"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("hello".encode("utf-16"), "is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8"),
        ("hello there".encode("utf-16-le"), "is UTF-16"),
        (gzip.compress(b"hello", mtime=0), r"is compressed \(gzip\); unpack it: gunzip"),
        (b"\x28\xb5\x2f\xfd\x04", r"is compressed \(zstd\); unpack it: unzstd"),
        (bz2.compress(b"hello"), r"is compressed \(bzip2\); unpack it: bunzip2"),
        (lzma.compress(b"hello"), r"is compressed \(xz\); unpack it: unxz"),
        (b"PK\x03\x04\x14\x00", "is a ZIP archive, or an office document; unpack or convert it"),
        (b"%PDF-1.7\nhello", "is a PDF; take its text out: pdftotext"),
        (b"ARROW1\x00\x00", "is an Arrow file; .* kind: huggingface"),
        ("hello".encode("utf-32"), "is UTF-32, not UTF-8; convert it: iconv -f UTF-32 -t UTF-8"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), r"holds binary data \(byte 0x89 in line 1\); name a file of text"),
        (b"\x89PNG\r\n\x1a\n" + b"\x00\x00\x00\xff" * 100, "holds binary data"),
        (b"PAR1\x00\x01", "is a Parquet file; .* kind: huggingface"),
        ("ok\nok\ncaf\xe9".encode("latin-1"), r"line 3 is not UTF-8 \(byte 0xe9\); convert it"),
    ],
)
def test_other_encodings_and_containers_are_named(kind, content, words, tokenizer, tmp_path):
    tokenizer.chat_template = "x"
    with pytest.raises(DataError, match=words):
        load(text_spec(put(tmp_path / "d", content), kind=kind), tokenizer)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("d.jsonl", "use kind: jsonl, or messages"),
        ("d.NDJSON", "use kind: jsonl"),
        ("d.json", r"jq -c '\.\[\]'\), and use kind: jsonl"),
        ("d.csv", "kind: huggingface"),
    ],
)
def test_a_file_of_rows_is_not_taken_for_prose(name, words, tokenizer, tmp_path):
    """Its syntax would be calibrated on without a word."""
    content = jsonl({"text": line} for line in LINES)
    with pytest.raises(DataError, match=rf"holds rows .*{words}.*; renamed to \.txt it is taken as it is"):
        load(text_spec(put(tmp_path / name, content)), tokenizer)
    assert load(text_spec(put(tmp_path / "d.txt", content)), tokenizer).summary.samples


def test_a_file_is_no_data_set(tokenizer, tmp_path):
    rows = jsonl({"text": line} for line in LINES)
    (tmp_path / "own").mkdir()
    for name in ("d.jsonl", "own/d.jsonl"):
        put(tmp_path / name, rows)
    with pytest.raises(DataError, match="it is a file; put it into a directory of its own, and name that with kind"):
        load(text_spec(tmp_path / "d.jsonl", kind="huggingface"), tokenizer)
    assert load(text_spec(tmp_path / "own", kind="huggingface"), tokenizer).summary.samples


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_what_is_no_file(kind, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"is a directory; name a file in it \(kind huggingface reads directories\)"):
        load(text_spec(tmp_path, kind=kind), tokenizer)
    os.mkfifo(tmp_path / "pipe")  # nobody writes to it: to open it would wait for ever
    with pytest.raises(DataError, match="is no regular file, and data is read more than once; save it to a file"):
        load(text_spec(tmp_path / "pipe", kind=kind), tokenizer)
    with pytest.raises(DataError, match="does not exist; check the recipe"):
        read_text(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (jsonl([{"text": "a"}, {"text": "b \ud83d"}]), r"line 2 holds \\ud83d, half of a surrogate pair"),
        (jsonl([{"text": "a"}, {"text": None}]), "line 2 has null in 'text', not text; correct the row"),
        (jsonl([{"text": "a"}, {"text": 3}]), "line 2 has int in 'text'"),
        (jsonl([{"text": ""}, {"text": " \n"}]), "holds no text: every text in it is empty"),
        (jsonl([{"text": ["a", "b"]}]), r"line 1 holds a list \('text'\), not a text; join its texts"),
        (jsonl([{"messages": [{"role": "user", "content": "a"}]}]), r"\('messages'\), not a text; use kind: messages"),
        (jsonl([{"conversations": [{"from": "gpt", "value": "a"}]}]), r"\('conversations'\).*use kind: messages"),
        (json.dumps([{"text": "a"}]), "line 1 is a JSON array; write one object a line: jq -c"),
        (json.dumps([{"text": "a"}], indent=1), "is a JSON array; write one object a line: jq -c"),
        ('{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("[" * 100000, "is a JSON array"),
        (jsonl(["a"]), "line 1 is not a JSON object"),
        ('{"text": "a"}\n{"text": "b", "text": "c"}', r"line 2 can't be taken \(text is described twice\); correct or"),
        ('{"text": "a", "x": ' + "[" * 100000 + "]" * 100000 + "}", r"can't be taken \(nested too deeply\)"),
    ],
)
def test_rows_that_hold_no_text_are_refused_with_their_line(content, words, tokenizer, tmp_path):
    with pytest.raises(DataError, match=words) as caught:
        load(text_spec(put(tmp_path / "d.jsonl", content), kind="jsonl"), tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("between", ["", "\n"])
def test_joined_files_with_byte_order_marks_are_mended_by_the_command_that_is_printed(between, tokenizer, tmp_path):
    half = codecs.BOM_UTF8 + jsonl({"text": line} for line in LINES[:30]).rstrip().encode()
    path = put(tmp_path / "joined.jsonl", half + between.encode() + half.replace(codecs.BOM_UTF8, codecs.BOM_UTF8 * 2))
    with pytest.raises(DataError, match=r"line 3[01] is not JSON: a byte order mark .*; remove it: sed -i") as caught:
        load(text_spec(path, kind="jsonl"), tokenizer)
    command = str(caught.value).rpartition("remove it: ")[2]
    subprocess.run([*shlex.split(command), path], check=True)
    assert codecs.BOM_UTF8 not in path.read_bytes()
    held = jsonl([{"text": "a \ufeff b"}] * 60, ensure_ascii=False)  # in a string it is a character
    assert load(text_spec(put(tmp_path / "held.jsonl", held), kind="jsonl"), tokenizer).summary.samples


def test_nulls_and_empty_texts_of_a_data_set_are_left_out(tokenizer, tmp_path):
    texts = [line for index, line in enumerate(LINES) for line in ((line, None) if index % 2 else (line, ""))]
    for name, rows in (("holes", [None, *texts]), ("whole", LINES)):
        datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(tmp_path / name))
    holes, whole = (load(text_spec(tmp_path / name, kind="huggingface"), tokenizer) for name in ("holes", "whole"))
    assert holes.summary.sha256 == whole.summary.sha256
    assert (holes.summary.null_rows, whole.summary.null_rows) == (24, 0)  # as far as it was read
    assert data_kind(holes.summary) == "huggingface, 24 null rows left out"
    assert "null_rows" not in whole.summary.model_dump()  # digests of before it was counted stay
    datasets.Dataset.from_dict({"text": ["", None, " "]}).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="holds no text: every text in it is empty or null"):
        load(text_spec(tmp_path / "empty", kind="huggingface"), tokenizer)


def test_splits_that_were_saved_to_disk(tokenizer, tmp_path):
    first, second = (datasets.Dataset.from_dict({"text": rows}) for rows in (LINES[:30], LINES[30:]))
    datasets.DatasetDict({"train": first, "test": second}).save_to_disk(str(tmp_path / "both"))
    spec = DataSpec(kind="huggingface", path=str(tmp_path / "both"), split="test")
    assert [row["text"] for _, row in data_set_rows(spec)] == LINES[30:]
    with pytest.raises(DataError, match=r"\(split validation\) can't be loaded"):
        load(text_spec(tmp_path / "both", kind="huggingface", split="validation"), tokenizer)


@pytest.mark.parametrize(("saved", "asked"), [(None, "test"), ("train", "validation"), ("test", "train")])
def test_a_set_that_was_saved_alone_has_no_other_split(saved, asked, tokenizer, tmp_path):
    """Its rows would be held out, or calibrated on, under the name of others."""
    rows = datasets.Dataset.from_dict({"text": LINES}, split=saved and datasets.NamedSplit(saved))
    rows.save_to_disk(str(tmp_path / "one"))
    for split in (None, saved or "train"):
        assert load(text_spec(tmp_path / "one", kind="huggingface", split=split), tokenizer).summary.samples
    with pytest.raises(DataError, match=f"saved as one set.* has no split {asked}; leave out data.split") as caught:
        load(text_spec(tmp_path / "one", kind="huggingface", split=asked), tokenizer)
    assert "can't be loaded" not in str(caught.value)
    with pytest.raises(DataError, match="no subsets; leave out data.subset"):
        load(text_spec(tmp_path / "one", kind="huggingface", subset="en"), tokenizer)


@pytest.mark.parametrize("kind", ["jsonl", "huggingface"])
def test_turns_that_are_written_as_json_in_a_string_are_no_text(kind, tokenizer, tmp_path):
    """CSV files hold them so; their syntax would be calibrated on."""
    turns = json.dumps([{"role": "user", "content": "a cat"}])
    rows = jsonl({"text": line, "messages": turns} for line in LINES)
    path = put(tmp_path / "train.jsonl", rows)
    spec = text_spec(tmp_path if kind == "huggingface" else path, kind=kind)
    assert load(spec, tokenizer).summary.samples
    with pytest.raises(DataError, match=r"1 holds a list of turns \('messages'\), not a text; use kind: messages"):
        load(spec.model_copy(update={"text_field": "messages"}), tokenizer)


def test_a_data_set_is_streamed_as_far_as_it_is_needed(tokenizer, tmp_path, monkeypatch):
    """8 rows of tokens a sample, and those that calibration has; what lies beyond is never read."""
    put(tmp_path / "train.jsonl", jsonl({"text": line} for line in make_text(4000).splitlines()))
    read, rows = [], data_set_rows

    def counted(spec):
        for number, row in rows(spec):
            read.append(number)
            yield number, row

    monkeypatch.setattr(files, "data_set_rows", counted)
    calibration = load(text_spec(tmp_path, kind="huggingface"), tokenizer, samples=2).summary
    few = len(read)
    tokens = sum(len(tokenizer(line)["input_ids"]) + 1 for line in make_text(4000).splitlines()[: few - 1])
    assert tokens <= 8 * 2 * 16 + 1
    read.clear()
    held_out = load(text_spec(tmp_path, kind="huggingface"), tokenizer, samples=2, avoid=calibration).summary
    assert few <= len(read) < 100
    assert not set(held_out.sample_ids) & set(calibration.sample_ids)


@pytest.mark.parametrize("field", ["image", "prompt", "text"])
def test_half_a_character_in_a_pair_is_refused(tmp_path, field):
    path = tmp_path / "pairs.jsonl"
    row = {"image": "a.png", "prompt": "Q", "text": "A"}
    path.write_text(json.dumps({**row, field: "x\ud83d"}) + "\n")
    with pytest.raises(DataError, match=r"line 1 holds \\ud83d, half of a surrogate pair"):
        samples_of(DataSpec(kind="image_text", path=str(path)))


@pytest.mark.parametrize("kind", ["huggingface", "messages"])
@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", None])
def test_a_hub_that_does_not_answer_is_one_line_with_a_remedy(tokenizer, monkeypatch, kind, variable):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'wikitext' on the Hub (OfflineModeIsEnabled)\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    if variable:
        monkeypatch.setenv(variable, "1")
    tokenizer.chat_template = "x"
    with pytest.raises(DataError) as caught:
        load(text_spec("wikitext", kind=kind), tokenizer)
    local = "text or jsonl" if kind == "huggingface" else "messages, a JSONL file"
    remedy = f"unset {variable}" if variable else "set HF_ENDPOINT to a mirror that answers"
    assert str(caught.value) == (
        "data set wikitext (split train) can't be fetched from the Hub (Couldn't reach 'wikitext' on the Hub "
        f"(OfflineModeIsEnabled)); name a local file (kind {local}), or {remedy}"
    )
