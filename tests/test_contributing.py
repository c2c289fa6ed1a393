"""The worked examples of CONTRIBUTING.md, followed to the letter."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

import bitladder
from bitladder.formats import FORMATS
from bitladder.models import families
from bitladder.models.families import architecture
from bitladder.reading import read_json
from bitladder.runtimes import preflight, registry
from conftest import LONGEST, save_model

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


def test_a_format(llama, text_file, tmp_path, monkeypatch):
    format_ = follow("formats/fp8_w8a16.py")["Fp8W8a16"]()
    monkeypatch.setitem(FORMATS, format_.name, format_)
    samples = {"samples": 4, "sequence_length": 24, "batch_size": 2}
    run = bitladder.Run(
        {
            "model": {"path": str(llama)},
            "calibration": {"data": {"kind": "text", "path": str(text_file)}, **samples},
            "measurement": {"method": "kl_div", "formats": ["fp8_pc_pt", format_.name]},
            "schemes": [{"name": "all", "coverage": 1.0, "format": format_.name}],
            "output": str(tmp_path / "out"),
        }
    )
    scores = {(one.group, one.format): sum(one.scores) for one in run.measure().candidates}
    groups = [group for group, name in scores if name == format_.name]
    gentler = [scores[group, format_.name] < scores[group, "fp8_pc_pt"] for group in groups]
    assert sum(gentler) > len(groups) / 2  # inputs are left alone
    (scheme,) = run.plan()
    assert set(scheme.formats.values()) == {format_.name}
    run.export()
    loaded, source = bitladder.load(tmp_path / "out/checkpoints/all"), bitladder.load(llama)
    weight = source.get_parameter("model.layers.0.mlp.down_proj.weight")
    stored = format_.encode(weight.bfloat16(), format_.amax_of(weight.bfloat16()))
    assert torch.equal(loaded.get_parameter("model.layers.0.mlp.down_proj.weight"), format_.decode(stored))


def test_there_is_an_example_of_each():
    assert set(EXAMPLES) == {"formats/fp8_w8a16.py", "models/families/granite.py", "runtimes/literal.py"}


def test_the_files_that_are_begun_first_are_there():
    assert [name for name in LONGEST if not Path(__file__).with_name(f"test_{name}.py").exists()] == []
