"""The worked examples of CONTRIBUTING.md, followed to the letter."""

import re
from pathlib import Path

import pytest
import transformers
from safetensors import safe_open

from bitladder.models import families
from bitladder.models.families import architecture
from bitladder.reading import read_json
from bitladder.runtimes import preflight, registry
from conftest import save_model

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
EXAMPLES = dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```$", PAGE, re.M | re.S))


def follow(path):
    """Return what the example that belongs into `path` defines."""
    names = {"__name__": path}
    exec(compile(EXAMPLES[path], path, "exec"), names)
    return names


def test_an_architecture(tmp_path, monkeypatch):
    config = transformers.GraniteConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = save_model(transformers.GraniteForCausalLM, config, tmp_path / "granite")
    with safe_open(model / "model.safetensors", "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    content = read_json(model / "config.json")
    lacking = dict(list(stored.items())[:-1])
    assert set(architecture(content, lacking).tensors) == set(lacking)  # as it is: nothing can be missing
    for name, family in follow("models/families/granite.py")["FAMILIES"].items():
        monkeypatch.setitem(families.FAMILIES, name, family)
    assert architecture(content, lacking).tensors == stored  # what Granite has, whatever a file lacks


@pytest.fixture
def literal(monkeypatch):
    rules = follow("runtimes/literal.py")["LiteralRules"]
    monkeypatch.setitem(registry.VERSIONS, rules.runtime, rules)


@pytest.mark.parametrize("name", ["top50", "full"])
def test_a_runtime(good, literal, name):
    ours, vllms = preflight.preflight(good[name], ("literal", "vllm"))
    assert ours.findings == ()
    formats = {layer.name: layer.format for layer in ours.layers}
    assert formats == {layer.name: layer.format for layer in vllms.layers}
    assert {layer.method for layer in ours.layers if layer.format == "fp8"} == {"Fp8Linear"}
    assert set(formats.values()) == {"bf16", "fp8"}


def test_there_is_an_example_of_each():
    assert set(EXAMPLES) == {"models/families/granite.py", "runtimes/literal.py"}
