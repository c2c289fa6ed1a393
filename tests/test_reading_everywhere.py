"""Whoever reads a foreign file waits for no pipe, and takes no text that is nested without end."""

import os
from types import SimpleNamespace

import pytest

from bitladder.data import messages
from bitladder.errors import DataError, ModelError
from bitladder.evaluation.reading import _use_generation_config
from bitladder.runtimes.files import _has_chat_template, _read_json
from bitladder.runtimes.findings import Findings

DEEP = "[" * 100_000


def test_preflight_waits_for_no_pipe(tmp_path):
    for name in ("config.json", "tokenizer_config.json"):
        os.mkfifo(tmp_path / name)
    findings = Findings()
    assert _read_json(tmp_path / "config.json", findings) is None
    assert len(findings.found) == 1
    assert not _has_chat_template(tmp_path)


def test_preflight_takes_no_text_nested_without_end(tmp_path):
    (tmp_path / "config.json").write_text(DEEP)
    findings = Findings()
    assert _read_json(tmp_path / "config.json", findings) is None
    assert len(findings.found) == 1


def test_evaluation_waits_for_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "generation_config.json")
    with pytest.raises(ModelError, match="generation_config.json is damaged"):
        _use_generation_config(SimpleNamespace(can_generate=lambda: True), tmp_path)


def test_a_conversation_in_a_string_is_nested_within_reason():
    with pytest.raises(DataError, match="row 1: 'tools' is a string, and not of JSON"):
        messages._parsed(DEEP, "row 1", "tools")
