"""What runtimes fuse: the table against vLLM's own sources, and what becomes of modules' names."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bitladder.models import fusing
from bitladder.models.fusing import Fusing

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "src" / "bitladder" / "models" / "fusing.json"
SCRIPT = ROOT / "scripts" / "fusing_table.py"


def of(architecture, **config):
    return Fusing.of({"architectures": [architecture], **config})


def layers(found, *modules, at="model.layers.0"):
    return {
        layer.name.removeprefix(f"{at}."): tuple(module.removeprefix(f"{at}.") for module in layer.modules)
        for layer in found.layers(f"{at}.{module}" for module in modules)
    }


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def version_of(package):
    return re.search(r"__version__ = version = '([0-9.]+)", (Path(package) / "_version.py").read_text())[1].rstrip(".")


def test_the_table_is_what_vllm_says(vllm_python):
    package = subprocess.run(
        [vllm_python, "-c", "import importlib.util as u; print(u.find_spec('vllm').submodule_search_locations[0])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if f'"vllm": "{version_of(package)}"' not in TABLE.read_text(encoding="utf-8"):
        pytest.skip(f"the table is not that of vLLM {version_of(package)}")
    printed = subprocess.run([sys.executable, SCRIPT, package], capture_output=True, text=True, check=True).stdout
    assert printed == TABLE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("architecture", "multimodal"),
    [
        ("Qwen3_5ForCausalLM", False),
        ("Qwen3_5MoeForCausalLM", False),
        ("Qwen3_5ForConditionalGeneration", True),
        ("Qwen3_5MoeForConditionalGeneration", True),
    ],
)
def test_the_rows_of_qwen3_5_are_there(architecture, multimodal):
    """Checked by hand: vLLM, models/qwen3_5.py, `stacked_params_mapping`. A guess by names would hide a lost row."""
    row = fusing._table()[architecture]
    assert row.multimodal is multimodal
    assert {fusion.name: fusion.members for fusion in row.fusions} == {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
        "in_proj_ba": ("in_proj_b", "in_proj_a"),
        "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    }


def test_a_wrong_directory_is_refused(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "name the directory of an installed vllm package" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("architecture", "modules", "expected"),
    [
        ("LlamaForCausalLM", QKV, {"self_attn.qkv_proj": QKV}),
        (
            "Qwen2ForCausalLM",
            ("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"),
            {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj": ("mlp.down_proj",)},
        ),
        (
            "Qwen3_5ForCausalLM",
            ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b"),
            {"in_proj_qkvz": ("in_proj_qkv", "in_proj_z"), "in_proj_ba": ("in_proj_b", "in_proj_a")},
        ),
        (  # fused on disk
            "Qwen3NextForCausalLM",
            ("in_proj_qkvz", "in_proj_ba"),
            {"in_proj_qkvz": ("in_proj_qkvz",), "in_proj_ba": ("in_proj_ba",)},
        ),
        ("Lfm2ForCausalLM", ("w1", "w2", "w3"), {"w13": ("w1", "w3"), "w2": ("w2",)}),
        ("InternLM2ForCausalLM", ("w1", "w2", "w3"), {"gate_up_proj": ("w1", "w3"), "w2": ("w2",)}),
        (
            "DeepseekV3ForCausalLM",
            ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
            {
                "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
                "q_b_proj": ("q_b_proj",),
                "kv_b_proj": ("kv_b_proj",),
            },
        ),
        (  # vLLM keeps these apart in MiniCPM3
            "MiniCPM3ForCausalLM",
            ("q_a_proj", "kv_a_proj_with_mqa"),
            {"q_a_proj": ("q_a_proj",), "kv_a_proj_with_mqa": ("kv_a_proj_with_mqa",)},
        ),
        ("DeepseekV3ForCausalLM", ("q_proj", "kv_a_proj_with_mqa"), None),  # without a query rank
        ("ApertusForCausalLM", ("mlp.up_proj", "mlp.down_proj"), None),  # no gate
        ("ApertusForCausalLM", ("mlp.gate_proj", "mlp.up_proj"), None),  # vLLM's row has no gate_up_proj
        ("Gemma4ForCausalLM", QKV[:2], {"self_attn.qkv_proj": QKV[:2]}),  # values are the keys
        ("Gemma4ForCausalLM", QKV[:1], None),  # keys and values are those of another layer
        (
            "OlmoHybridForCausalLM",
            ("linear_attn.q_proj", "linear_attn.k_proj", "linear_attn.v_proj", "linear_attn.g_proj", *QKV),
            {
                "linear_attn.in_proj_qkvg": tuple(f"linear_attn.{name}_proj" for name in "qkvg"),
                "self_attn.qkv_proj": QKV,
            },
        ),
        ("Zamba2ForCausalLM", QKV, {"self_attn.qkv_proj": QKV}),
        ("Zamba2ForCausalLM", ("cross.q_proj", "cross.k_proj", "cross.v_proj"), None),  # only below self_attn
        ("Phi3ForCausalLM", ("qkv_proj", "gate_up_proj", "o_proj"), None),
        ("NobodysForCausalLM", QKV, {"self_attn.qkv_proj": QKV}),
        ("NobodysForCausalLM", ("in_proj_qkv", "in_proj_z"), {"in_proj_qkvz": ("in_proj_qkv", "in_proj_z")}),
        ("NobodysForCausalLM", ("wq", "wk", "wv"), {"merged_qkv": ("wq", "wk", "wv")}),
        ("NobodysForCausalLM", ("not_q_proj", "not_k_proj"), None),
    ],
)
def test_modules_are_fused_as_the_architecture_has_it(architecture, modules, expected):
    assert layers(of(architecture), *modules) == (expected or {name: (name,) for name in modules})


def test_modules_below_other_parents_stay_apart():
    found = Fusing.usual().layers(["a.q_proj", "b.k_proj", "a.k_proj", "q_proj", "k_proj"])
    assert [layer.modules for layer in found] == [("a.q_proj", "a.k_proj"), ("b.k_proj",), ("q_proj", "k_proj")]
    assert [layer.name for layer in found] == ["a.qkv_proj", "b.k_proj", "qkv_proj"]


def test_a_layer_tells_what_it_lacks_and_whether_quantisation_knows_its_members():
    gemma = of("Gemma4ForCausalLM").layers(["a.q_proj", "a.k_proj"])[0]
    assert gemma.shards == ("a.q_proj", "a.k_proj", "a.v_proj")
    assert gemma.packed
    assert not of("StableLmForCausalLM").layers(["a.q_proj", "a.k_proj", "a.v_proj"])[0].packed


def test_a_module_that_vllm_builds_under_another_name_asks_by_that():
    assert of("GraniteMoeHybridForCausalLM").asked_as("layers.0.mamba.in_proj") == "layers.0.mixer.in_proj"
    assert of("LlamaForCausalLM").asked_as("layers.0.mamba.in_proj") == "layers.0.mamba.in_proj"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"text_config": {"model_type": "lfm2"}}, "feed_forward.w13"),
        ({"text_config": {"model_type": "internlm2"}}, "feed_forward.gate_up_proj"),
        ({"text_config": None}, "feed_forward.gate_up_proj"),
        ({}, "feed_forward.gate_up_proj"),
    ],
)
def test_the_language_model_inside_has_a_row_of_its_own(config, name):
    found = of("Lfm2VlForConditionalGeneration", **config)
    assert set(layers(found, "feed_forward.w1", "feed_forward.w3")) == {name}


def test_a_multimodal_model_has_its_own_row_first():
    config = {"text_config": {"model_type": "qwen3_5_text"}}
    found = of("Qwen3_5ForConditionalGeneration", **config)
    assert set(layers(found, "in_proj_qkv", "in_proj_z", *QKV)) == {"in_proj_qkvz", "self_attn.qkv_proj"}
    assert set(layers(of("MolmoForCausalLM"), "gate_proj", "up_proj")) == {"merged_linear"}


@pytest.mark.parametrize("config", [{}, {"architectures": []}, {"architectures": None}, {"architectures": [None]}])
def test_a_configuration_that_names_nothing_gets_the_usual(config):
    assert Fusing.of(config) == replace(Fusing.usual(), guessed=True)


def test_a_guess_needs_all_members():
    rwkv = Fusing.of({"architectures": ["RwkvForCausalLM"]})
    assert [layer.name for layer in rwkv.layers(["a.key", "a.value"])] == ["a.key", "a.value"]
    assert [layer.name for layer in rwkv.layers(["a.query", "a.key", "a.value"])] == ["a.qkv_proj"]


def test_no_usual_fusion_lies_within_another():
    members = [set(fusion.members) for fusion in fusing.usual()]
    assert all(not a <= b for a in members for b in members if a is not b)
