"""Conversations as the model's own chat template writes them, and which of their tokens count.

A template may mark the assistant's turns (`{% generation %}`); their tokens count then. Most mark nothing: every token
counts but those that the tokenizer puts first.

Two ways to write a turn are read, as public data sets have them: {"role", "content"} (OpenAI) and {"from", "value"}
(ShareGPT).
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch

from bitladder.data.batches import IGNORED_LABEL, Batch, DataSet, fingerprint
from bitladder.data.files import data_set_rows, is_conversation, jsonl_rows, of_a_file, parsed_turns
from bitladder.data.processors import has_template, template_of, tokenizer_of
from bitladder.data.special import begun_once, check_ids, check_text, end_of_prefix, placeholders, prefix_of
from bitladder.data.text import pool_size
from bitladder.errors import DataError, reason_of
from bitladder.reading import parse_json
from bitladder.recipe import DataSpec
from bitladder.records import ALL_TOKENS, ASSISTANT_TURNS, Counted, DataSummary, digest_of

# Source: transformers, utils/chat_template_utils.py (render_jinja_template)
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_COLUMNS = ("messages", "conversations", "text")  # looked for in this order where the recipe names none
_DEFAULT_FIELD = "text"
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_SHAREGPT_ONLY = ("human", "gpt", "chatgpt")  # names that no chat template knows
_PROBE = "aardvark"  # a word that no template writes by itself


@dataclass(frozen=True)
class Conversation:
    """One conversation: turns as a chat template takes them, and the tools that it may call."""

    turns: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] | None = None
    where: str = field(default="", compare=False)  # file and line, for messages

    @property
    def digest(self) -> str:
        """SHA-256 over turns and tools."""
        return digest_of(json.dumps(part, sort_keys=True, default=str) for part in (self.turns, self.tools))


@dataclass(frozen=True)
class Encoded:
    """A conversation's token ids, and which of them count."""

    ids: tuple[int, ...]
    counted: tuple[bool, ...]


def _pruned(value: Any) -> Any:
    """Return a value without nulls in its objects: columns of a data set hold every key that any row has."""
    if isinstance(value, dict):
        return {key: _pruned(inner) for key, inner in value.items() if inner is not None}
    return [_pruned(inner) for inner in value] if isinstance(value, list | tuple) else value


def _parsed(value: Any, where: str, name: str) -> Any:
    """Return what a string of JSON holds; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except ValueError as error:
        raise DataError(f"{where}: '{name}' is a string, and not of JSON; correct or remove it") from error


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """Return a turn with `role` and `content`, whichever way it was written."""
    if not isinstance(turn, dict):
        raise DataError(f"{where}: a turn is {json.dumps(turn, default=str)[:40]}, not an object; correct the row")
    role, content = (turn["role"], turn.get("content")) if "role" in turn else (turn.get("from"), turn.get("value"))
    if "role" not in turn:
        if role not in _ROLES:
            known = ", ".join(_ROLES)
            raise DataError(f"{where}: a turn is from {json.dumps(role, default=str)[:40]}; known are {known}")
        turn = {"role": _ROLES[role], "content": content}
    if not isinstance(role, str):
        raise DataError(f"{where}: a turn's role is {json.dumps(role, default=str)[:40]}; it must be a string")
    if role in _SHAREGPT_ONLY:  # under OpenAI's key a template would write them as they are
        turn = {**turn, "role": _ROLES[role]}
    elif role not in _ROLES and role.lower() in _ROLES:
        raise DataError(f"{where}: a turn's role is {json.dumps(role)}; write it in lower case, as templates know it")
    calls = turn.get("tool_calls")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else part
                raise DataError(
                    f"{where}: a turn holds a part of type {json.dumps(kind, default=str)[:40]}; kind messages takes "
                    "text alone (kind image_text takes pictures)"
                )
    elif not isinstance(content, str) and not (content is None and calls):
        raise DataError(
            f"{where}: the content of a turn by {role} is {json.dumps(content, default=str)[:40]}; it must be text"
        )
    turn = {key: _pruned(value) for key, value in turn.items() if value is not None}
    if calls:  # arguments arrive as JSON; templates get them parsed, as in vLLM
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise DataError(f"{where}: 'tool_calls' is no list of objects; correct or remove it")
        turn["tool_calls"] = [_call(call, where) for call in turn["tool_calls"]]
    made: dict[str, Any] = turn
    return made


def _says(turn: dict[str, Any]) -> bool:
    """Return whether a turn holds anything: text, a call, or what only some templates know (reasoning)."""
    content = turn.get("content") or ""
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    others = [value for key, value in turn.items() if key not in ("role", "name", "content")]
    return any(text.strip() for text in texts) or any(others)


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    arguments = _parsed(function["arguments"], where, "tool_calls.function.arguments")
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}


def _column(spec: DataSpec, row: dict[str, Any], where: str) -> str:
    """Return the name of the column that holds a row's turns."""
    names = _COLUMNS if spec.text_field == _DEFAULT_FIELD else (spec.text_field,)
    held = [name for name in names if name in row and (name != "text" or is_conversation(parsed_turns(row[name])))]
    # Of data sets that were joined, each row has the other one's column too, null.
    name = next((name for name in held if row[name] not in (None, [])), held[0] if held else None)
    if name is None:
        missing = " and ".join(f"no '{name}'" for name in names[:2])
        raise DataError(
            f"{where} has {missing}; it has {', '.join(map(str, row))}: set data.text_field to what holds the turns"
        )
    return name


def _conversation(spec: DataSpec, row: dict[str, Any], where: str, *, nullable: bool) -> Conversation | None:
    """Return a row's conversation; None where it holds none, or one in which nobody says or calls anything."""
    name = _column(spec, row, where)
    turns = parsed_turns(row[name])
    if turns == [] or (turns is None and nullable):
        return None
    if not isinstance(turns, list):
        raise DataError(
            f"{where}: '{name}' is {json.dumps(turns, default=str)[:40]}, not a list of turns "
            '({"role", "content"} or {"from", "value"}); kinds jsonl and huggingface take texts'
        )
    made = [_turn(turn, where) for turn in turns]
    if not any(map(_says, made)):
        return None
    system = row.get("system")
    if not isinstance(system, str | None):
        raise DataError(f"{where}: 'system' is {json.dumps(system, default=str)[:40]}; it must be text")
    if system is not None and system.strip() and made[0]["role"] != "system":  # ShareGPT's own column
        made.insert(0, {"role": "system", "content": system})
    tools = _pruned(_parsed(row.get("tools"), where, "tools"))
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}: 'tools' is no list; correct or remove it")
    return Conversation(tuple(made), tuple(tools) if tools else None, where)


def conversations_of(spec: DataSpec, processor: Any, most: int | None = None) -> tuple[list[Conversation], int]:
    """Return a source's conversations, in its order, and how many nulls of a data set were left out, as empty ones are.

    Args:
        spec: where they come from.
        processor: the model's processor or tokenizer; its template is looked at first.
        most: after which reading ends; None: all.

    Raises:
        DataError: no chat template, or a row that isn't a conversation; it names file and line.
    """
    template_of(processor)
    file = of_a_file(spec)
    if file and (spec.split or spec.subset):
        given = "split" if spec.split else "subset"
        raise DataError(f"{spec.path} is a file, and has no {given} to choose; leave out data.{given}")
    rows = jsonl_rows(Path(spec.path)) if file else data_set_rows(spec)
    named = (
        (f"{spec.path} line {number}" if file else f"data set {spec.path} row {number}", row) for number, row in rows
    )
    found: list[Conversation] = []
    nulls = 0
    forbidden = placeholders(processor)
    for where, row in named:
        conversation = _conversation(spec, row, where, nullable=not file)
        if conversation is None:
            nulls += row[_column(spec, row, where)] is None
            continue
        for text in _strings([conversation.turns, conversation.tools]):
            check_text(text, where, forbidden)
        found.append(conversation)
        if most is not None and len(found) >= most:
            break
    return found, nulls


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def marks_assistant(processor: Any) -> bool:
    """Return whether the model's chat template marks the assistant's turns."""
    return bool(_MARK.search(template_of(processor)))


def counted_by(processor: Any) -> Counted:
    """Return which tokens of a conversation count with this model: `records.ASSISTANT_TURNS` or `ALL_TOKENS`."""
    return ASSISTANT_TURNS if marks_assistant(processor) else ALL_TOKENS


def chats_line(processor: Any) -> str:
    """Return one line on what the model's template does with conversations, for `inspect`."""
    if not has_template(processor):
        return "no chat template: data of kind messages can't be used"
    try:
        counted = counted_by(processor)
        Writer(processor)
    except DataError as error:
        return f"data of kind messages can't be used: {error}"
    return f"data of kind messages: {counted} count{' (the chat template marks no turns)' * (counted == ALL_TOKENS)}"


class Writer:
    """Writes conversations by a model's chat template, and finds the tokens that count."""

    def __init__(self, processor: Any) -> None:
        self._tokenizer = tokenizer_of(processor)
        self._template = template_of(processor)
        self.marks = marks_assistant(processor)
        self._prefix = prefix_of(self._tokenizer)
        self._takes_parts = self._shows([{"type": "text", "text": _PROBE}])
        self._takes_strings = self._shows(_PROBE)

    def _shows(self, content: Any) -> bool:
        """Return whether the template writes a turn's text that is given in this way, as it is."""
        try:
            text = self._render(({"role": "user", "content": content},), None)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"the model's chat template is damaged ({reason_of(error).rstrip('.')}); mend chat_template.jinja "
                "beside its weights, or calibrate it on text"
            ) from error
        except Exception:  # a template is a program: it raises what it likes
            return False
        return _PROBE in text and "'type'" not in text and '"type"' not in text

    def _render(self, turns: Sequence[dict[str, Any]], tools: Any) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(turns), tools=tools, chat_template=self._template, tokenize=False, add_generation_prompt=False
            )
        )

    def _shaped(self, turn: dict[str, Any]) -> dict[str, Any]:
        """Return a turn with its content as the template takes it: as it is, or else as text, or in parts.

        Source: vLLM, entrypoints/chat_utils.py: parts become lines of a text where the template takes texts.
        """
        content = turn.get("content")
        if isinstance(content, list) and not self._takes_parts:
            return {**turn, "content": "\n".join(part["text"] for part in content)}
        if isinstance(content, str) and not self._takes_strings and self._takes_parts:
            return {**turn, "content": [{"type": "text", "text": content}]}
        return turn

    def encode(self, conversation: Conversation, length: int) -> Encoded:
        """Return a conversation's first `length` tokens, beginning once with what the tokenizer puts first.

        Raises:
            DataError: the template can't write it; it names file and line.
        """
        turns = [self._shaped(turn) for turn in conversation.turns]
        tools = None if conversation.tools is None else list(conversation.tools)
        try:
            text = self._render(turns, tools)
            added = begun_once(self._tokenizer, text).removesuffix(text)
            # Written by the template, BOS doesn't move the marks that it sets.
            template = "{{ " + json.dumps(added) + " }}" + self._template if added else self._template
            encoded = self._tokenizer.apply_chat_template(
                turns,
                tools=tools,
                chat_template=template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=self.marks,
                add_generation_prompt=False,
            )
        except Exception as error:  # a template is a program: it raises what it likes
            reason = reason_of(error)
            raise DataError(
                f"{conversation.where}: the model's chat template can't write this conversation "
                f"({reason.rstrip('.')}); correct or remove it"
            ) from error
        ids = tuple(encoded["input_ids"])
        begin = end_of_prefix(ids, self._prefix)
        marks = encoded["assistant_masks"] if self.marks else [1] * len(ids)
        counted = tuple(bool(mark) and place >= begin for place, mark in enumerate(marks))
        return Encoded(ids[:length], counted[:length])


def conversation_batch(rows: Sequence[Encoded], pad: int) -> Batch:
    """Return right-padded rows as a batch; only tokens that count carry a label."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED_LABEL)
    for index, row in enumerate(rows):
        own = torch.tensor(row.ids, dtype=torch.long)
        ids[index, : len(own)] = own
        mask[index, : len(own)] = 1
        labels[index, : len(own)] = torch.where(torch.tensor(row.counted), own, IGNORED_LABEL)
    return Batch({"input_ids": ids, "attention_mask": mask}, labels)


def padding_of(processor: Any, vocabulary: int | None) -> int:
    """Return the id that rows are padded with: any that the model has an embedding for, as it is masked."""
    tokenizer = tokenizer_of(processor)
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int) and (vocabulary is None or token < vocabulary):
            return token
    return 0


def load_conversations(
    spec: DataSpec,
    processor: Any,
    *,
    samples: int,
    sequence_length: int,
    batch_size: int,
    seed: int,
    avoided: frozenset[str],
    vocabulary: int | None,
) -> DataSet:
    """Return `samples` conversations as batches; see `data.samples.load_data`.

    A conversation is cut to `sequence_length` tokens. One of which no token then counts is passed over.

    Raises:
        DataError: no template, malformed data, or too few conversations.
    """
    found, nulls = conversations_of(spec, processor, pool_size(spec, samples, len(avoided)))
    if not found:
        raise DataError(
            f"{spec.path} holds no conversations: every one in it is empty{' or null' * bool(nulls)}; {samples} were "
            "asked for: give data in which something is said"
        )
    random.Random(seed).shuffle(found)
    writer = Writer(processor)
    chosen: list[tuple[Conversation, Encoded]] = []
    passed: list[str] = []
    cut = False  # whether one of these goes on
    left = [conversation for conversation in found if conversation.digest not in avoided]
    for conversation in left:
        encoded = writer.encode(conversation, sequence_length)
        if any(encoded.counted[1:]):
            chosen.append((conversation, encoded))
        else:
            passed.append(conversation.where)
            cut = cut or len(encoded.ids) == sequence_length
        if len(chosen) == samples:
            break
    if len(chosen) < samples:
        unused = f", {len(left)} of them not used by other sets" if avoided else ""
        nothing = (
            f"; {len(passed)} have no {'assistant turn' if writer.marks else 'token that counts'} in their first "
            f"{sequence_length} tokens (the first is {passed[0]})"
            if passed
            else ""
        )
        raise DataError(
            f"{spec.path} holds {len(found)} conversations{unused}{nothing}; {samples} were asked for: ask for fewer "
            f"samples, {'raise sequence_length, ' if cut else ''}or give more data"
        )
    # Conversations of similar length share a batch: less padding, and padding is calibrated on too.
    chosen.sort(key=lambda one: len(one[1].ids))
    pad = padding_of(processor, vocabulary)
    rows = [encoded for _, encoded in chosen]
    batches = tuple(
        conversation_batch(rows[start : start + batch_size], pad) for start in range(0, samples, batch_size)
    )
    for batch in batches:
        check_ids(batch.inputs["input_ids"], vocabulary, tokenizer_of(processor), spec.path)
    summary = DataSummary(
        source=spec.path,
        kind=spec.kind,
        sha256=fingerprint(batches),
        samples=samples,
        tokens=sum(batch.loss_tokens for batch in batches),
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        sample_ids=tuple(conversation.digest for conversation, _ in chosen),
        counted=counted_by(processor),
        null_rows=nulls,
    )
    return DataSet(batches, summary)
