"""A published manifest is imported as it is, or refused by name."""

import copy
import json
from pathlib import Path

import pytest

from bitladder.errors import RecordError
from bitladder.planning import importing
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
    assert all("visual" in module.name.split(".") for module in imported.untouched)
    assert {module.reason for module in imported.untouched} == {"vision tower: not searched"}
    # the patch embedding was searched by ModelOpt, but isn't among the 414 layers: it is a convolution
    assert len(imported.untouched) == 414 - sum(len(group.modules) for group in imported.groups) + 1
    assert imported.untouched[-1].name == "visual.patch_embed.proj"


def test_it_has_no_amax_and_round_trips(imported, tmp_path):
    assert imported.amax_sha256 is None
    assert all(module.tensor is None for group in imported.groups for module in group.modules)
    assert imported.method == "gradient"
    assert imported.score_weights == (1.0,)
    assert imported.calibration.samples == 128
    assert "doesn't say" in imported.calibration.source
    assert imported.calibration.tokens == 0  # unknown
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
        # of 8 bits as well, but with other scales, or without quantised inputs
        ("FP8_PER_CHANNEL_PER_TOKEN_CFG(effective-bits: 8.0)", "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
        ("FP8_WEIGHT_ONLY_CFG(effective-bits: 8.0)", "FP8_WEIGHT_ONLY_CFG"),
        ("INT8_DEFAULT_CFG(effective-bits: 8.0)", "INT8_DEFAULT_CFG"),
        ("FP8_DEFAULT_CFG(effective-bits: 4.0)", "FP8_DEFAULT_CFG"),
        ("FP8_DEFAULT_CFG(effective-bits: ...)", "form"),
    ],
)
def test_unknown_formats_are_refused_by_name(spelled, words, tmp_path):
    content = json.loads(MANIFEST.read_text())
    for entry in content["layer_sensitivity"].values():
        entry["formats"][0] = spelled
    (tmp_path / "m.json").write_text(json.dumps(content))
    with pytest.raises(RecordError, match=words):
        importing.import_manifest(tmp_path / "m.json")


FIRST = "language_model.layers.0.self_attn.q_proj.quant_recipe"


def changed(path, change):
    """Write the manifest with one change and return its path."""
    content = copy.deepcopy(json.loads(MANIFEST.read_text()))
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_modelopts_own_configuration_is_known(tmp_path):
    def change(content):
        for entry in content["layer_sensitivity"].values():
            entry["formats"] = entry["formats"][::-1]
            entry["scores"] = entry["scores"][::-1]
            entry["costs"] = entry["costs"][::-1]
        content["scheme"]["quant_formats"] = ["FP8_DEFAULT_CFG"]
        content["model"] = {"id": "Qwen/Qwen2.5-VL-3B-Instruct"}

    measurement = importing.import_manifest(changed(tmp_path / "m.json", change))
    original = importing.import_manifest(MANIFEST)
    assert measurement.candidates == original.candidates
    assert measurement.model.path == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_a_custom_weight_only_format_is_refused(tmp_path):
    def change(content):
        content["scheme"]["quant_formats"] = ["FP8_WEIGHT_ONLY_CFG"]

    with pytest.raises(RecordError, match="FP8_WEIGHT_ONLY_CFG"):
        importing.import_manifest(changed(tmp_path / "m.json", change))


def test_the_vocabulary_head_is_untouched_where_it_is_listed(tmp_path):
    path = changed(tmp_path / "m.json", lambda content: content["layers"].update({"lm_head": {"quantized": True}}))
    head = importing.import_manifest(path).untouched[-2]
    assert (head.name, head.reason) == ("lm_head", "vocabulary head: not searched")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["layer_sensitivity"].clear(), "no quantised format"),
        (lambda c: c["layer_sensitivity"][FIRST]["scores"].pop(), "shorter"),
        (lambda c: c["layer_sensitivity"][FIRST].pop("costs"), "lacks 'costs'"),
        (lambda c: c["layer_sensitivity"][FIRST].update(scores=[float("nan"), 0.0]), "finite"),
        (lambda c: c["layer_sensitivity"][FIRST].update(scores=[1.0, 0.5]), "unquantised score is 0.5"),
        (lambda c: c["layer_sensitivity"][FIRST].update(costs=[1.0, 5242880.0]), "a cost of 1.0"),
        (lambda c: c["layer_sensitivity"][FIRST].update(costs=[0.25, 0.5]), "no number of weights"),
        (
            lambda c: c["layer_sensitivity"][FIRST].update(
                formats=["FP8_DEFAULT_CFG(effective-bits: 8.0)"], scores=[1.0], costs=[1.0]
            ),
            "no unquantised format",
        ),
        (lambda c: c["layers"].pop("language_model.layers.0.self_attn.v_proj"), "not all"),
        (lambda c: c["layers"].clear(), "doesn't list language_model.layers.0.self_attn.q_proj"),
        (lambda c: c["scheme"].pop("quant_formats"), "lacks 'quant_formats'"),
        (lambda c: c["scheme"].update(auto_quantize_score_size="many"), "samples"),
        (lambda c: c.update(layers=[]), "needs the objects"),
    ],
)
def test_a_malformed_manifest_is_refused_in_one_line(change, words, tmp_path):
    path = changed(tmp_path / "m.json", change)
    with pytest.raises(RecordError) as caught:
        importing.import_manifest(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_is_not_a_manifest(tmp_path):
    with pytest.raises(RecordError, match="not a ModelOpt"):
        importing.import_manifest(tmp_path)
