"""A model of twice as many layers costs each step at most about twice as many opened files."""

import sys
from collections import Counter

import pytest
import transformers
import yaml
from typer.testing import CliRunner

from bitladder import cli
from conftest import llama_config, save_model

LAYERS = 8
STEPS = ("inspect", "measure", "plan", "export", "verify", "preflight", "evaluate", "report")
MOST_GROWTH = 2.2
_opened: Counter[str] = Counter()
_step: list[str] = []


def _count(event, arguments):
    if _step and event == "open":
        _opened[_step[0]] += 1


@pytest.fixture(scope="module")
def opened(text_file, tmp_path_factory):
    """For each number of layers the files that each step opened, run by the command line in this process."""
    sys.addaudithook(_count)  # for ever: it can't be taken away, so it counts only while a step runs
    found = {}
    for layers in (2, LAYERS, 2 * LAYERS):  # the first imports what the others find imported
        place = tmp_path_factory.mktemp(f"layers{layers}")
        config = llama_config(num_hidden_layers=layers)
        model = save_model(transformers.LlamaForCausalLM, config, place / "model", max_shard_size="100KB")
        data = {"kind": "text", "path": str(text_file)}
        recipe = {
            "model": {"path": str(model)},
            "calibration": {"data": data, "samples": 4, "sequence_length": 16, "batch_size": 2},
            "held_out": {"data": data, "samples": 2, "sequence_length": 16, "batch_size": 2},
            "measurement": {"engine": "native", "rounding": "compensated"},
            "schemes": [{"name": "half", "coverage": 0.5}, {"name": "full", "coverage": 1.0}],
            "output": "run",
        }
        (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        _opened.clear()
        for step in STEPS:
            _step[:] = [step]
            asked = model if step == "inspect" else place / "recipe.yaml"
            result = CliRunner().invoke(cli.app, [step, str(asked)])
            _step.clear()
            assert result.exit_code == 0, (step, result.output, result.exception)
        found[layers] = dict(_opened)
    return found


@pytest.mark.parametrize("step", STEPS)
def test_files_opened_grow_as_the_model_does(opened, step):
    few, many = opened[LAYERS][step], opened[2 * LAYERS][step]
    assert few > 0
    assert many <= MOST_GROWTH * few, opened


def test_a_key_twice_among_many_is_found_at_once():
    from bitladder.reading import _each_once

    pairs = [(str(index), index) for index in range(100_000)]
    with pytest.raises(ValueError, match="99999 is described twice"):
        _each_once([*pairs, pairs[-1]])
