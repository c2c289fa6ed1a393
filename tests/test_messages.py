"""Conversations: written by the model's template, BOS once, the right tokens count, and what isn't one is refused."""

import csv
import json

import datasets
import pytest

from bitladder.data.messages import chats_line
from bitladder.data.processors import load_processor
from bitladder.data.samples import load_data
from bitladder.errors import DataError
from bitladder.evaluation import logprobs
from bitladder.recipe import DataSpec, names_a_file, parse_recipe, read_recipe
from bitladder.records import DataSummary
from bitladder.report.numbers import data_names
from conftest import WORDS, put_first, save_tokenizer
from test_native import ARITHMETIC, assert_same_scores, measured_by, measured_by_both

PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
MARKED = (
    "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}{{ p.text }}{% endfor %}{{ '\n' }}{% endfor %}"
)
TOOLS = (
    "{% for t in tools or [] %}tool {{ t.function.name }}{{ '\n' }}{% endfor %}{% for m in messages %}{{ m['role'] }}: "
    "{{ m['content'] or '' }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}{{ '\n' }}"
    "{% endfor %}"
)


def chat(index, question="the cat sits", answer=None):
    answer = (
        " ".join(WORDS[(index * 3 + k) % len(WORDS)] for k in range(3 + index % 5)) + "." if answer is None else answer
    )
    return [{"role": "user", "content": f"{question} {index}"}, {"role": "assistant", "content": answer}]


def sharegpt(turns):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


CHATS = [chat(index) for index in range(12)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def model(tmp_path):
    def make(template, *first):
        directory = tmp_path / f"tokenizer{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        save_tokenizer(directory)
        if first:
            put_first(directory, first)
        tokenizer = load_processor(directory)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def jsonl(tmp_path):
    return write(tmp_path / "chats.jsonl", [{"messages": turns} for turns in CHATS])


def load(path, tokenizer, samples=4, sequence_length=64, batch_size=2, **changes):
    options = {name: changes.pop(name) for name in ("avoid", "seed", "vocabulary") if name in changes}
    spec = DataSpec(**{"kind": "messages", "path": str(path), **changes})
    sizes = {"samples": samples, "sequence_length": sequence_length, "batch_size": batch_size}
    return load_data(spec, tokenizer, **{"seed": 0, **sizes, **options})


def texts(data, tokenizer):
    """What each row holds without its padding, and what of it counts."""
    return {
        tokenizer.decode(ids[mask == 1]): tokenizer.decode(ids[labels != -100])
        for batch in data.batches
        for ids, mask, labels in zip(
            batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.labels, strict=True
        )
    }


def test_rows_are_what_the_template_writes_and_all_of_it_counts(model, jsonl):
    tokenizer = model(PLAIN)
    data = load(jsonl, tokenizer, samples=12)
    expected = {tokenizer.apply_chat_template(turns, tokenize=False) for turns in CHATS}
    assert texts(data, tokenizer) == {text: text for text in expected}
    assert data.summary.counted == "all tokens"
    assert data.summary.tokens == sum(len(tokenizer(text)["input_ids"]) - 1 for text in expected)
    for batch in data.batches:
        mask = batch.inputs["attention_mask"]
        assert bool((mask.diff(dim=1) <= 0).all()), "padded on the right"
        assert bool((batch.labels[mask == 0] == -100).all())
    lengths = [int(n) for batch in data.batches for n in batch.inputs["attention_mask"].sum(1)]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_bos_comes_once_and_never_counts(template, writes, model, jsonl):
    tokenizer = model("{{ '<bos>' }}" * writes + template, "<bos>")
    data = load(jsonl, tokenizer, samples=12)
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    for batch in data.batches:
        assert bool((batch.inputs["input_ids"][:, 0] == bos).all())
        assert not bool((batch.inputs["input_ids"][:, 1:] == bos).any())
        assert bool((batch.labels[:, 0] == -100).all())
    answers = {turns[1]["content"] for turns in CHATS}
    if template == MARKED:
        assert set(texts(data, tokenizer).values()) == answers


def test_where_the_template_marks_them_the_assistants_turns_count(model, tmp_path):
    tokenizer = model(MARKED)
    turns = [*chat(0), *chat(1), {"role": "user", "content": "a dog"}]
    data = load(write(tmp_path / "c.jsonl", [{"messages": turns}]), tokenizer, samples=1)
    ((_, counted),) = texts(data, tokenizer).items()
    assert counted == chat(0)[1]["content"] + chat(1)[1]["content"]
    assert data.summary.counted == "assistant turns"
    assert data.summary.tokens == sum(len(tokenizer(turn["content"])["input_ids"]) for turn in turns[1:4:2])
    assert data_names(data.summary) == "c.jsonl (messages, assistant turns count)"


@pytest.mark.parametrize("row", ["sharegpt", "field", "parts", "system"])
def test_ways_to_write_a_conversation_give_the_same_rows(row, model, jsonl, tmp_path):
    tokenizer = model(PLAIN)
    chats = [[{"role": "system", "content": "a tree"}, *turns] for turns in CHATS]
    make = {
        "sharegpt": lambda turns: {"id": 1, "conversations": sharegpt(turns)},
        "field": lambda turns: {"messages": None, "chat": turns},
        "parts": lambda turns: {
            "messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        },
        "system": lambda turns: {"system": "a tree", "conversations": sharegpt(turns[1:])},
    }[row]
    path = write(tmp_path / "other.jsonl", [make(turns) for turns in chats])
    changes = {"text_field": "chat"} if row == "field" else {}
    expected = load(write(tmp_path / "plain.jsonl", [{"messages": turns} for turns in chats]), tokenizer)
    assert load(path, tokenizer, **changes).summary.sha256 == expected.summary.sha256


def test_a_template_that_takes_parts_alone_gets_them(model, jsonl):
    plain, parts = model(PLAIN), model(PARTS)
    assert load(jsonl, parts).summary.sha256 == load(jsonl, plain).summary.sha256


def test_tools_and_calls_reach_the_template(model, tmp_path):
    tokenizer = model(TOOLS)
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "red tree"}'}}
    turns = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    for value in (tools, json.dumps(tools)):
        data = load(write(tmp_path / "t.jsonl", [{"messages": turns, "tools": value}]), tokenizer, samples=1)
        assert list(texts(data, tokenizer)) == ["tool weather\nuser: a cat\nassistant: red tree\n"]


def test_what_is_too_long_is_cut_and_passed_over_where_nothing_counts(model, tmp_path):
    tokenizer = model(MARKED)
    long = chat(0, question="the small cat sits under the large tree " * 8)
    path = write(
        tmp_path / "c.jsonl", [{"messages": long}, {"messages": []}, *({"messages": turns} for turns in CHATS[:2])]
    )
    data = load(path, tokenizer, samples=2, sequence_length=32)
    assert all(
        turns[0]["content"] in text for turns, text in zip(CHATS[:2], sorted(texts(data, tokenizer)), strict=True)
    )
    whole = load(path, model(PLAIN), samples=3, batch_size=1)
    cut = load(path, model(PLAIN), samples=3, batch_size=1, sequence_length=32)
    assert [b.inputs["input_ids"].shape[1] for b in whole.batches][-1] == 64
    assert [b.inputs["input_ids"].shape[1] for b in cut.batches][-1] == 32
    assert bool((cut.batches[-1].inputs["input_ids"] == whole.batches[-1].inputs["input_ids"][:, :32]).all())
    with pytest.raises(DataError) as caught:
        load(path, tokenizer, samples=3, sequence_length=32)
    assert "holds 3 conversations; 1 have no assistant turn in their first 32 tokens" in str(caught.value)
    assert f"(the first is {path} line 1)" in str(caught.value)
    assert load(path, tokenizer, samples=3, sequence_length=512).summary.samples == 3


EMPTY = (
    [{"role": "user", "content": ""}, {"role": "assistant", "content": " \n"}],
    [{"role": "user", "content": [{"type": "text", "text": ""}]}],
    [{"from": "human", "value": ""}],
    [],
)


def test_conversations_in_which_nothing_is_said_are_left_out_and_alone_refused(model, tmp_path):
    rows = [{"messages": turns} for turns in EMPTY]
    with pytest.raises(DataError, match=r"holds no conversations: every one in it is empty; 4 were asked for: give"):
        load(write(tmp_path / "empty.jsonl", rows), model(PLAIN))
    tokenizer = model(PLAIN)
    some = load(write(tmp_path / "some.jsonl", [*rows, *({"messages": turns} for turns in CHATS[:4])]), tokenizer)
    assert all(":" in text and len(text) > 20 for text in texts(some, tokenizer))
    thought = [{"role": "assistant", "content": "", "reasoning_content": "hm"}]
    assert load(write(tmp_path / "thought.jsonl", [{"messages": thought}]), tokenizer, samples=1).summary.samples == 1


@pytest.mark.parametrize("template", ["", " \n"])
def test_an_empty_template_is_none(template, model, jsonl):
    tokenizer = model(template)
    with pytest.raises(DataError, match=r"has no chat template.* put one into chat_template\.jinja"):
        load(jsonl, tokenizer)
    assert chats_line(tokenizer).startswith("no chat template")


def test_a_longer_sequence_is_advised_only_where_conversations_were_cut(model, jsonl):
    with pytest.raises(DataError, match="have no token that counts.*ask for fewer samples, or give") as caught:
        load(jsonl, model("{# nothing #}"))
    assert "raise sequence_length" not in str(caught.value)
    with pytest.raises(DataError, match="ask for fewer samples, raise sequence_length, or give"):
        load(jsonl, model(MARKED), sequence_length=3)


def test_held_out_conversations_are_others(model, jsonl, llama):
    tokenizer = model(PLAIN)
    calibration = load(jsonl, tokenizer, samples=6).summary
    held_out = load(jsonl, tokenizer, samples=6, sequence_length=32, avoid=calibration)
    assert not set(calibration.sample_ids) & set(held_out.summary.sample_ids)
    with pytest.raises(DataError, match="holds 12 conversations, 6 of them not used by other sets; 7 were asked for"):
        load(jsonl, tokenizer, samples=7, avoid=calibration)
    sent = logprobs.sequences(held_out, "chats", llama)
    assert {tokenizer.decode(one.prompt_ids) for one in sent} == set(texts(held_out, tokenizer))
    assert all(one.counted == tuple(range(1, len(one.token_ids))) for one in sent)


def test_names_of_sharegpt_under_openais_keys_are_roles(model, tmp_path):
    """A template writes a role as it is given: "human" would be asked in words that the model never saw."""
    rows = [{"messages": turns} for turns in CHATS]
    odd = json.loads(json.dumps(rows).replace('"role": "user"', '"role": "human"').replace('"assistant"', '"gpt"'))
    paths = [write(tmp_path / f"{index}.jsonl", content) for index, content in enumerate((rows, odd))]
    first, second = (load(path, model(MARKED)).summary for path in paths)
    assert first.sha256 == second.sha256
    own = write(tmp_path / "own.jsonl", [{"messages": [{"role": "observation", "content": "a"}, *t]} for t in CHATS])
    tokenizer = model(PLAIN)
    assert all(text.startswith("observation: a") for text in texts(load(own, tokenizer), tokenizer))  # GLM's own name


@pytest.mark.parametrize("space", ["", "\n", " "])
def test_bos_behind_white_space_is_not_written_again(space, model, jsonl):
    tokenizer = model("{{ '" + space.replace("\n", "\\n") + "<bos>' }}" + PLAIN, "<bos>")
    number = tokenizer.convert_tokens_to_ids("<bos>")
    data = load(jsonl, tokenizer)
    for batch in data.batches:
        assert (batch.inputs["input_ids"] == number).sum(1).tolist() == [1] * len(batch.labels)
        assert not bool((batch.labels == number).any())


@pytest.mark.parametrize("stored", ["directory", "save_to_disk"])
def test_a_data_set_gives_the_rows_of_a_file(stored, model, jsonl, tmp_path):
    """The remedy that kind huggingface names for such a column works."""
    tokenizer, place = model(PLAIN), tmp_path / "set"
    if stored == "directory":
        place.mkdir()
        (place / "train.jsonl").write_text(jsonl.read_text() + json.dumps({"messages": None}) + "\n")
    else:
        datasets.Dataset.from_list([{"messages": turns} for turns in CHATS]).save_to_disk(str(place))
    assert load(place, tokenizer).summary.sha256 == load(jsonl, tokenizer).summary.sha256
    with pytest.raises(DataError, match=r"row 1 holds a list of turns \('messages'\), not a text; use kind: messages"):
        load(place, tokenizer, kind="huggingface")


def test_turns_may_be_json_in_a_string_or_in_the_other_column(model, jsonl, tmp_path):
    """CSV files hold them so; of data sets that were joined, each row has the other one's column too."""
    tokenizer = model(PLAIN)
    expected = load(jsonl, tokenizer, samples=12).summary.sha256
    shared = [[{"from": turn["role"], "value": turn["content"]} for turn in turns] for turns in CHATS]
    variants = {
        "string": [{"messages": json.dumps(turns)} for turns in CHATS],
        "text": [{"text": json.dumps(turns)} for turns in CHATS],
        "null": [{"messages": None, "conversations": turns} for turns in shared],
        "empty": [{"messages": [], "conversations": turns} for turns in shared],
    }
    for name, rows in variants.items():
        assert load(write(tmp_path / f"{name}.jsonl", rows), tokenizer, samples=12).summary.sha256 == expected, name
    (tmp_path / "set").mkdir()
    with (tmp_path / "set" / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], *([json.dumps(turns)] for turns in CHATS)])
    assert load(tmp_path / "set", tokenizer, samples=12).summary.sha256 == expected


def test_a_template_that_writes_the_date_gives_the_same_rows_tomorrow(model, jsonl):
    """Llama's and Mistral's do; a resumed run's data would be other data."""
    for call in ("strftime_now('%d %b %Y')", 'strftime_now( format = "%d %b %Y" )'):
        tokenizer = model("{% if strftime_now is defined %}{% set day = " + call + " %}{{ day }}{% endif %}" + PLAIN)
        assert all(row.startswith("01 Jan 2025") for row in texts(load(jsonl, tokenizer, samples=2), tokenizer))


def test_a_data_set_is_read_no_further_than_it_needs(model, tmp_path):
    tokenizer = model(PLAIN)
    rows = [{"messages": chat(index)} for index in range(20)]
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", [*rows[:16], {"messages": 3}])
    first = load(tmp_path / "set", tokenizer, samples=2)
    assert set(texts(first, tokenizer)) <= {tokenizer.apply_chat_template(r["messages"], tokenize=False) for r in rows}
    with pytest.raises(DataError):
        load(tmp_path / "set", tokenizer, samples=3)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"role": "user", "content": 3}]}, "the content of a turn by user is 3; it must be text"),
        ({"messages": [{"role": "user", "content": None}]}, "the content of a turn by user is null"),
        ({"messages": [{"from": "alien", "value": "a"}]}, 'a turn is from "alien"; known are human, user, gpt'),
        ({"messages": [{"role": None, "content": "a"}]}, "a turn's role is null"),
        ({"messages": [{"role": "User", "content": "a"}]}, 'a turn\'s role is "User"; write it in lower case'),
        ({"messages": chat(0), "system": ["a"]}, r"'system' is \[\"a\"\]; it must be text"),
        ({"messages": ["a"]}, 'a turn is "a", not an object'),
        (
            {"messages": "hello"},
            "'messages' is \"hello\", not a list of turns .* kinds jsonl and huggingface take texts",
        ),
        ({"messages": None}, "'messages' is null"),
        ({"text": "hello"}, "has no 'messages' and no 'conversations'; it has text: set data.text_field"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 'a part of type "image"; .*image_text'),
        ({"messages": [{"role": "user", "content": "a \ud83d"}]}, r"\\ud83d, half of a surrogate pair"),
        ({"messages": chat(0), "tools": "no"}, "'tools' is a string, and not of JSON"),
        ({"messages": chat(0), "tools": {}}, "'tools' is no list"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [3]}]}, "'tool_calls' is no list of objects"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_line(row, words, model, tmp_path):
    path = write(tmp_path / "c.jsonl", [{"messages": chat(0)}, row])
    with pytest.raises(DataError, match=words) as caught:
        load(path, model(PLAIN), samples=1)
    assert f"{path} line 2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_templates_that_fail_are_one_line(model, jsonl, tmp_path):
    with pytest.raises(DataError, match=r"no chat template.* chat_template\.jinja"):
        load(jsonl, model(None))
    with pytest.raises(
        DataError, match=r"line \d+: the model's chat template can't write this conversation \(no cats\)"
    ):
        load(jsonl, model("{{ raise_exception('no cats') }}"))
    broken = model("{% for m in %}")
    with pytest.raises(DataError, match=r"^the model's chat template is damaged \(.*\); mend chat_template\.jinja"):
        load(jsonl, broken)
    assert "can't be used: the model's chat template is damaged" in chats_line(broken)
    named = model({"default": MARKED, "tool_use": PLAIN})
    assert load(jsonl, named).summary.counted == "assistant turns"
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        load(tmp_path / "nowhere.jsonl", model(PLAIN))


@pytest.mark.parametrize("key", ["split", "subset"])
def test_a_file_has_no_parts_to_choose(key, model, jsonl):
    with pytest.raises(DataError, match=rf"is a file, and has no {key} to choose; leave out data\.{key}"):
        load(jsonl, model(PLAIN), **{key: "test"})


def test_a_padding_token_without_an_embedding_is_not_used(model, jsonl):
    tokenizer = model(PLAIN)
    expected = load(jsonl, tokenizer, samples=12).summary.tokens
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    data = load(jsonl, tokenizer, samples=12, vocabulary=size)
    assert max(int(batch.inputs["input_ids"].max()) for batch in data.batches) < size
    assert data.summary.tokens == expected


def test_which_paths_are_files(tmp_path):
    (tmp_path / "local").mkdir()
    content = {
        "model": {"path": "a/b"},
        "calibration": {"data": {"kind": "messages", "path": "some/chats"}},
        "held_out": {"data": {"kind": "messages", "path": "chats.jsonl"}},
        "schemes": [{"name": "x", "coverage": 0.5}],
        "output": "out",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(content))
    recipe = read_recipe(path)
    assert recipe.calibration[0].data.path == "some/chats"
    assert recipe.held_out[0].data.path == str(tmp_path / "chats.jsonl")
    content["calibration"]["data"]["path"] = "local"
    path.write_text(json.dumps(content))
    assert read_recipe(path).calibration[0].data.path == str(tmp_path / "local")
    assert parse_recipe(content, "x").calibration[0].data.kind == "messages"
    assert names_a_file("./a")
    assert not names_a_file("a/b")


def test_the_record_says_what_counted_and_other_records_keep_their_bytes(model, jsonl):
    summary = load(jsonl, model(MARKED)).summary
    assert DataSummary.model_validate_json(summary.model_dump_json()).counted == "assistant turns"
    assert "counted" not in summary.model_copy(update={"counted": None}).model_dump()


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
def test_both_engines_score_padded_conversations_alike(method, llama, model, jsonl, tmp_path):
    data = load(jsonl, model(MARKED), samples=8, batch_size=4)
    assert not bool(data.batches[0].inputs["attention_mask"].all())
    ours, theirs = measured_by_both(llama, data, tmp_path, method=method)
    assert_same_scores(ours, theirs, ARITHMETIC if method == "gradient" else 0.05)
    assert ours.calibration.counted == "assistant turns"
    fisher = measured_by("native", llama, data, tmp_path / "fisher", method="fisher")
    assert all(score > 0 for candidate in fisher.candidates for score in candidate.scores)


def test_inspect_says_what_counts(model):
    for template, words in (
        (None, "no chat template: data of kind messages can't be used"),
        (PLAIN, "data of kind messages: all tokens count (the chat template marks no turns)"),
        (MARKED, "data of kind messages: assistant turns count"),
    ):
        assert chats_line(model(template)) == words


def test_null_conversations_of_a_data_set_are_left_out_and_counted(model, tmp_path):
    rows = [turns for index, turns in enumerate(CHATS) for turns in ((turns, None) if index < 3 else (turns, []))]
    datasets.Dataset.from_dict({"messages": rows}).save_to_disk(str(tmp_path / "holes"))
    datasets.Dataset.from_dict({"messages": CHATS}).save_to_disk(str(tmp_path / "whole"))
    tokenizer = model(PLAIN)
    options = {"samples": 12, "sequence_length": 64, "batch_size": 2, "seed": 0}
    holes, whole = (
        load_data(DataSpec(kind="messages", path=str(tmp_path / name)), tokenizer, **options).summary
        for name in ("holes", "whole")
    )
    assert (holes.null_rows, whole.null_rows) == (3, 0)
    assert holes.sha256 == whole.sha256
