"""The model card of a checkpoint: a hub's metadata, and one scheme's part of the report."""

import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

from bitladder.errors import ModelError
from bitladder.formats import FORMATS, get_format
from bitladder.models.weights import commit_of, licence_of
from bitladder.records import ModelSource
from bitladder.report import build_report, closing_table, render_card, render_html, render_markdown
from conftest import source_of
from test_report import (
    make_evaluation,
    make_manifest,
    make_measurement,
    make_report,
    make_scheme,
    make_verification,
    section,
    tables,
)
from test_report_evidence import report_with as report_with_controls
from test_report_runtimes import make_probe
from test_report_runtimes import report_with as report_with_probes


def metadata_of(card):
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_is_about_one_scheme():
    report = make_report(task=True)
    card = render_card(report, "top50")
    assert "# tiny-lm, top50" in card
    assert "3 of the 8 searched linear modules" in card
    assert "top25" not in card
    assert "`full`" not in card
    rows = tables(section(card, "Evaluation"))[0][2:]
    assert {row[0] for row in rows} == {"top50"}
    assert [row[2] for row in rows] == ["7.10", "37.680", "97.12%", "94.40%"]
    assert "files against the scheme | checked: they match" in card
    assert card == render_card(report, "top50")


def test_a_card_names_the_formats_that_its_scheme_has_and_says_what_they_are():
    report = make_report()
    assert "of its language model in FP8 (E4M3, one scale a tensor for weights and one for inputs). Everything" in (
        render_card(report, "full")
    )
    scheme = next(scheme for scheme in report.schemes if scheme.name == "full")
    (fp8,) = (count for count in scheme.format_counts if count.format == "fp8")
    four = fp8.model_copy(update={"format": "nvfp4_w4a16"})
    none = fp8.model_copy(update={"groups": 0, "modules": 0})
    changed = scheme.model_copy(update={"format_counts": (none, four)})
    card = render_card(report.model_copy(update={"schemes": (changed,)}), "full")
    assert "model in NVFP4_W4A16 (E2M1, an E4M3 scale for 16 weights of a row; inputs in 16 bits). Everything" in card
    assert metadata_of(card)["tags"] == ["nvfp4", "mixed-precision", "modelopt", "vllm", "bitladder"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_card_says_of_every_format_what_it_is(name):
    report = make_report()
    scheme = next(scheme for scheme in report.schemes if scheme.name == "full")
    counts = tuple(count.model_copy(update={"format": name}) for count in scheme.format_counts if count.format == "fp8")
    card = render_card(
        report.model_copy(update={"schemes": (scheme.model_copy(update={"format_counts": counts}),)}), "full"
    )
    assert f"model in {name.upper()} ({get_format(name).title}). Everything" in card
    assert len({one.title for one in FORMATS.values()}) == len(FORMATS)


@pytest.mark.parametrize(
    ("formats", "says", "not_said"),
    [
        (("int8",), "loads it as it is", "dequantize"),
        (("int4_w4a16_asym",), "CompressedTensorsConfig(dequantize=True)", "aren't rounded"),
        (("int4_w4a16_asym", "int8"), "Inputs of INT8 aren't rounded then", "loads it as it is"),
    ],
)
def test_a_card_says_how_transformers_loads_zero_points(formats, says, not_said):
    report = make_report()
    scheme = next(scheme for scheme in report.schemes if scheme.name == "full")
    (count,) = (count for count in scheme.format_counts if count.format == "fp8")
    counts = tuple(count.model_copy(update={"format": name}) for name in formats)
    changed = scheme.model_copy(update={"format_counts": counts, "carrier": "compressed-tensors"})
    card = render_card(report.model_copy(update={"schemes": (changed,)}), "full")
    assert says in card
    assert not_said not in card


def test_what_was_not_done_is_said():
    assert "Not evaluated." in render_card(make_report({}), "full")
    assert "**they do not match**" in render_card(make_report(broken="full"), "full")
    assert "searched modules left in 16 bits" not in render_card(make_report(), "full")


def test_a_base_model_is_named_only_where_a_hub_knows_it():
    assert "base_model" not in metadata_of(render_card(make_report(), "full"))
    measurement = make_measurement(
        model=ModelSource(
            path="org/tiny-lm", revision="abc", architecture="A", model_type="tiny", sha256="c" * 64, files=()
        )
    )
    scheme = make_scheme(measurement, "full", set(range(8)))
    manifests = {"full": make_manifest(scheme)}
    evaluations = {"full": make_evaluation(manifests["full"], 1e-3, 1e-4)}
    said = {"card": {"base_model": "org/tiny-lm", "license": "apache-2.0"}}
    report = build_report(said, measurement, [scheme], manifests, make_verification(manifests), evaluations, [])
    found = metadata_of(render_card(report, "full"))
    assert (found["base_model"], found["base_model_relation"]) == ("org/tiny-lm", "quantized")
    assert found["license"] == "apache-2.0"


def test_a_hubs_library_reads_the_metadata():
    """huggingface_hub parses and checks it as the Hub does."""
    report = make_report(task=True)
    settings = {
        **report.settings,
        "card": {"base_model": "org/tiny-lm", "license": "mit"},
        "calibration": [
            {"data": {"kind": "huggingface", "path": "org/data"}},
            {"data": {"kind": "text", "path": "/home/me/private.txt"}},
        ],
    }
    card = render_card(report.model_copy(update={"settings": settings}), "top50")
    data = ModelCard(card).data
    assert (data.base_model, data.license, data.library_name) == ("org/tiny-lm", "mit", "vllm")
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["org/data"]
    assert "/home/me" not in card.split("---\n")[1]
    assert data.model_name == "tiny-lm-top50"
    results = {(result.metric_type, result.metric_name): result.metric_value for result in data.eval_results}
    scheme = next(scheme for scheme in report.schemes if scheme.name == "top50")
    assert set(results.values()) == {found.value for found in scheme.results}
    kl = next(found for found in scheme.results if found.metric == "kl")
    assert results["kl_divergence", "KL to the original, nats per token"] == kl.value


@pytest.mark.parametrize(
    ("architecture", "carrier", "task", "library"),
    [
        ("LlamaForCausalLM", "modelopt", "text-generation", "vllm"),
        ("LlamaForCausalLM", "compressed-tensors", "text-generation", "transformers"),
        ("Qwen2_5_VLForConditionalGeneration", "modelopt", "image-text-to-text", "vllm"),
    ],
)
def test_a_card_says_how_it_is_served_loaded_and_evaluated(architecture, carrier, task, library):
    report = make_report()
    schemes = tuple(scheme.model_copy(update={"carrier": carrier}) for scheme in report.schemes)
    model = report.model.model_copy(update={"architecture": architecture})
    card = render_card(report.model_copy(update={"schemes": schemes, "model": model}), "full")
    found = metadata_of(card)
    assert (found["pipeline_tag"], found["library_name"]) == (task, library)
    assert ("> [!WARNING]\n> transformers" in card) == (library == "vllm")
    assert f"lm_eval --model {'vllm-vlm' if task.startswith('image') else 'vllm'} --model_args pretrained=" in card


def test_sglang_is_named_only_where_its_rules_take_the_files():
    assert "sglang.launch_server" not in render_card(make_report(), "full")
    report = report_with_probes(("full", lambda m: make_probe(m, runtime="sglang")))
    assert "python -m sglang.launch_server --model-path" in render_card(report, "full")


def test_what_is_said_of_the_original_comes_from_the_recipe_or_its_files(tmp_path):
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\nlicense: none\n")
    assert licence_of(tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text("# Model\n\nlicense: mit\n---\n---\n")
    assert licence_of(tmp_path) is None
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    assert commit_of(snapshot) == "a" * 40
    assert commit_of(tmp_path) is None


def test_its_runtimes_and_controls_come_along():
    report = report_with_probes(("top25", make_probe), ("full", lambda m: make_probe(m, version="9")))
    served = section(render_card(report, "full"), "Serve it")
    assert "vLLM 9" in served
    assert "0.32.0" not in served
    evaluation = section(render_card(report_with_controls(), "top25"), "Evaluation")
    assert [row[0] for row in tables(evaluation)[1][2:]] == ["top25", "top25"]


def test_where_the_weights_come_from_stands_beside_the_numbers():
    plain = make_report()
    source = plain.model.model_copy(update={"provenance": "dequantised from a 4-bit GGUF"})
    report = plain.model_copy(update={"model": source})
    for text in (render_card(report, "top50"), render_markdown(report), render_html(report)):
        assert text.count("weights come from: dequantised from a 4-bit GGUF.") == 1
    assert "4-bit GGUF" in str(closing_table(report).caption)
    assert "weights come from" not in render_markdown(plain) + render_card(plain, "top50") + render_html(plain)


def test_the_provenance_of_a_model_is_what_its_file_says(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "model")
    assert source_of(tmp_path / "model").provenance is None
    (tmp_path / "model" / "PROVENANCE").write_text("dequantised\nfrom a GGUF\n")
    said = source_of(tmp_path / "model")
    assert said.provenance == "dequantised from a GGUF"
    assert said.sha256 == source_of(llama).sha256
    (tmp_path / "model" / "PROVENANCE").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match="PROVENANCE can't be read"):
        source_of(tmp_path / "model")
