"""Whoever reads a foreign file waits for no pipe, and takes no text that is nested without end."""

import os
from types import SimpleNamespace

import pytest

from bitladder import evaluation
from bitladder.calibration import messages
from bitladder.errors import DataError, ModelError
from bitladder.runtimes import files

DEEP = "[" * 100_000


def test_preflight_waits_for_no_pipe(tmp_path):
    for name in ("config.json", "tokenizer_config.json"):
        os.mkfifo(tmp_path / name)
    findings = files.Findings()
    assert files._read_json(tmp_path / "config.json", findings) is None
    assert len(findings.found) == 1
    assert not files._has_chat_template(tmp_path)


def test_preflight_takes_no_text_nested_without_end(tmp_path):
    (tmp_path / "config.json").write_text(DEEP)
    findings = files.Findings()
    assert files._read_json(tmp_path / "config.json", findings) is None
    assert len(findings.found) == 1


def test_evaluation_waits_for_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "generation_config.json")
    with pytest.raises(ModelError, match="generation_config.json is damaged"):
        evaluation._use_generation_config(SimpleNamespace(can_generate=lambda: True), tmp_path)


def test_a_conversation_in_a_string_is_nested_within_reason():
    with pytest.raises(DataError, match="row 1: 'tools' is a string, and not of JSON"):
        messages._parsed(DEEP, "row 1", "tools")
