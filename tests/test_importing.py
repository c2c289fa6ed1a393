import json
from pathlib import Path

import pytest

from bitladder import importing
from bitladder.errors import RecordError
from bitladder.records import Measurement

MANIFEST = Path(__file__).parent / "data" / "qwen2_5_vl_3b_instruct_fp8_autoquant_manifest.json"


@pytest.fixture(scope="module")
def imported():
    return importing.import_manifest(MANIFEST)


def test_the_language_models_groups(imported):
    assert len(imported.groups) == 144
    kinds = {group.name.rpartition(".")[2] for group in imported.groups}
    assert kinds == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    first = imported.groups[0]
    assert first.name == "language_model.layers.0.self_attn.qkv_proj"
    assert [module.name.rpartition(".")[2] for module in first.modules] == ["q_proj", "k_proj", "v_proj"]
    # 36 layers: hidden 2048, q 2048, k and v 256 each, intermediate 11008
    assert first.weight_elements == 2048 * (2048 + 256 + 256)
    assert imported.searched_weights == 36 * (2048 * (2048 + 512) + 2048 * 2048 + 3 * 2048 * 11008)


def test_scores_and_bits_are_the_manifests(imported):
    content = json.loads(MANIFEST.read_text())["layer_sensitivity"]
    for candidate in imported.candidates:
        parent, _, leaf = candidate.group.rpartition(".")
        first = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}.get(leaf, leaf)
        entry = content[f"{parent}.{first}.quant_recipe"]
        assert candidate.scores == (entry["scores"][0],)
        assert candidate.weight_bits == entry["costs"][0] * 16
        assert candidate.format == "fp8"


def test_the_vision_tower_is_untouched(imported):
    assert all("visual" in module.name for module in imported.untouched)
    assert len(imported.untouched) == 414 - sum(len(group.modules) for group in imported.groups)


def test_it_has_no_amax_and_round_trips(imported, tmp_path):
    assert imported.amax_sha256 is None
    imported.write(tmp_path / "m.json")
    assert Measurement.read(tmp_path / "m.json") == imported


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"scheme": {}, "layers": {}}', "\x00"])
def test_not_a_manifest(content, tmp_path):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(RecordError, match="not a"):
        importing.import_manifest(tmp_path / "m.json")


def test_missing(tmp_path):
    with pytest.raises(RecordError, match="does not exist"):
        importing.import_manifest(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("spelled", "words"),
    [
        ("NVFP4_DEFAULT_CFG(effective-bits: 4.5)", "NVFP4"),
        ("FP8", "form"),
        ("CUSTOM_7(effective-bits: 8.0)", "CUSTOM_7"),
    ],
)
def test_unknown_formats_are_refused_by_name(spelled, words, tmp_path):
    content = json.loads(MANIFEST.read_text())
    for entry in content["layer_sensitivity"].values():
        entry["formats"][0] = spelled
    (tmp_path / "m.json").write_text(json.dumps(content))
    with pytest.raises(RecordError, match=words):
        importing.import_manifest(tmp_path / "m.json")
