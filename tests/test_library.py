"""Bitladder as a library, and the commands that plan and report: the same records, the same lock, nothing heavy."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from transformers.utils import logging as transformers_logging

import bitladder
from bitladder.errors import BitladderError, ModelError, OutputError, RecipeError, RecordError
from bitladder.formats import FORMATS
from bitladder.formats.targets import TARGETS
from bitladder.library import quiet_libraries
from bitladder.records import (
    BF16,
    CheckpointManifest,
    Evaluation,
    Evidence,
    Measurement,
    ProbeResult,
    Scheme,
    Verification,
)
from bitladder.steps.workspace import Workspace
from conftest import llama_config, make_text, save_model
from test_report import tables

MANIFEST = Path(__file__).parent / "data" / "qwen2_5_vl_3b_instruct_fp8_autoquant_manifest.json"
HEAVY = ("torch", "transformers", "modelopt", "scipy")


@pytest.fixture(scope="module")
def content(llama, text_file, tmp_path_factory):
    """What a recipe for the tiny Llama holds, without its output."""
    other = tmp_path_factory.mktemp("other") / "held_out.txt"
    other.write_text(make_text(300, seed=9))
    data = {"samples": 4, "sequence_length": 24, "batch_size": 2}
    return {
        "model": {"path": llama},
        "calibration": {"data": {"kind": "text", "path": text_file}, **data},
        "held_out": {"data": {"kind": "text", "path": other}, **data},
        "schemes": ({"name": "top50", "coverage": 0.5}, {"name": "full", "coverage": 1.0}),
        "controls": {"kinds": ["inverse"]},
    }


@pytest.fixture(scope="module")
def finished(content, tmp_path_factory):
    """A run, every step of which was done one by one, and what each returned."""
    run = bitladder.Run({**content, "output": tmp_path_factory.mktemp("library") / "out"})
    steps = ("measure", "plan", "export", "verify", "preflight", "evaluate", "controls", "report")
    return run, {step: getattr(run, step)() for step in steps}


def test_importing_the_package_imports_nothing_else_of_it():
    code = "import sys, bitladder; print(dir(bitladder)); print([m for m in sys.modules if m.startswith('bitladder.')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, loaded = result.stdout.splitlines()
    assert loaded == "[]"
    assert "'Run'" in names
    assert "'load'" in names
    with pytest.raises(AttributeError, match="no attribute 'Rum'"):
        _ = bitladder.Rum


def test_every_step_returns_the_records_that_it_writes(finished):
    run, found = finished
    schemes = ("top50", "full")
    assert found["measure"] == Measurement.read(run.output / "measurement.json")
    assert found["plan"] == tuple(Scheme.read(run.output / "schemes" / f"{name}.json") for name in schemes)
    for name in schemes:
        assert run.checkpoint(name) == run.output / "checkpoints" / name
        assert found["export"][name] == CheckpointManifest.read(run.checkpoint(name) / CheckpointManifest.FILE_NAME)
        assert found["evaluate"][name] == Evaluation.read(run.output / "evaluations" / f"{name}.json")
    assert found["verify"] == Verification.read(run.output / "verification.json")
    assert found["verify"].ok
    assert {(result.scheme, result.runtime) for result in found["preflight"]} >= {(name, "vllm") for name in schemes}
    assert all(isinstance(result, ProbeResult) for result in found["preflight"])
    assert found["controls"] == Evidence.read(run.output / "evidence.json")
    assert found["report"].schemes[0].name == "top50"
    assert (run.output / "report.html").is_file()


def test_the_command_line_finds_what_the_library_did(finished, content, tmp_path):
    run, _ = finished
    recipe = tmp_path / "recipe.yaml"
    plain = json.loads(json.dumps({**content, "output": run.output}, default=str))
    recipe.write_text(yaml.safe_dump(plain))
    again = bitladder.Run(recipe)
    assert again.recipe == run.recipe
    again.run()
    assert again.done == ()


def test_a_step_says_whether_it_had_to_be_done(content, tmp_path):
    run = bitladder.Run({**content, "output": tmp_path / "out"})
    run.measure()
    assert run.done == ("measure",)
    run.measure()
    assert run.done == ()


def test_a_changed_file_is_seen_by_the_next_call(content, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(make_text(200))
    changed = {**content, "calibration": {**content["calibration"], "data": {"kind": "text", "path": text}}}
    run = bitladder.Run({**changed, "output": tmp_path / "out"})
    first = run.measure()
    text.write_text(make_text(200, seed=5))
    assert run.measure().calibration.sha256 != first.calibration.sha256


def test_paths_of_a_mapping_are_relative_to_the_current_directory(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(make_text(20))
    near = {**content["calibration"], "data": {"kind": "text", "path": "text.txt"}}
    run = bitladder.Run({**content, "calibration": near, "output": "out"})
    assert run.output == tmp_path / "out"
    assert run.recipe.calibration[0].data.path == str(tmp_path / "text.txt")
    assert bitladder.Run({**content, "output": "out"}, output="elsewhere").output == tmp_path / "elsewhere"


def test_what_is_wrong_is_one_line(content, finished, tmp_path):
    with pytest.raises(RecipeError, match="recipe: unknown key 'shemes'; did you mean 'schemes'"):
        bitladder.Run({**content, "output": tmp_path, "shemes": []})
    with pytest.raises(RecipeError, match="does not exist"):
        bitladder.Run(tmp_path / "no.yaml")
    run = bitladder.Run({**content, "output": tmp_path / "out"})
    with pytest.raises(RecipeError, match="no scheme 'top5'; it has top50, full"):
        run.checkpoint("top5")
    with pytest.raises(RecordError, match="measurement.json does not exist"):
        run.plan()
    with pytest.raises(RecipeError, match="names no runtime"):
        finished[0].probe()
    with pytest.raises(RecipeError, match="probe: runtimes.vllm.stage: .*'load' or 'generate'.*got 'serve'"):
        finished[0].probe(python="python", stage="serve")
    with pytest.raises(BitladderError, match="no-such-python"):
        finished[0].probe(python="no-such-python", stage="load")
    with pytest.raises(RecipeError, match="dtype 'float64' is unknown"):
        bitladder.load(tmp_path, dtype="float64")
    with pytest.raises(ModelError, match="has neither"):
        bitladder.load(tmp_path)
    assert issubclass(RecipeError, bitladder.BitladderError)


@pytest.mark.parametrize("step", ["measure", "plan", "export", "verify", "preflight", "evaluate", "controls", "report"])
def test_every_step_is_locked(finished, step):
    run, _ = finished
    with (
        Workspace(run.recipe, run.output).locked(),
        pytest.raises(OutputError, match="another bitladder process is working"),
    ):
        getattr(run, step)()
    with (
        Workspace(run.recipe, run.output).locked(),
        pytest.raises(OutputError, match="another bitladder process is working"),
    ):
        run.run()


def test_a_checkpoint_is_the_model_that_it_was_exported_as(finished, llama):
    run, found = finished
    model = bitladder.load(run.checkpoint("top50"))
    original = bitladder.load(llama)
    names = {module.name for module in found["export"]["top50"].modules}
    assert names
    for name, module in original.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            same = torch.equal(module.weight, model.get_submodule(name).weight)
            assert same == (name not in names), name
    inputs = torch.tensor([[3, 5, 7]])
    assert not torch.equal(model(inputs).logits, original(inputs).logits)
    assert bitladder.load(run.checkpoint("top50"), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_nothing_is_printed_unless_asked_for(content, tmp_path):
    code = (
        "import json, sys, bitladder\n"
        "run = bitladder.Run(json.loads(sys.argv[1]))\n"
        "run.measure(), run.plan(), run.export(), bitladder.load(run.checkpoint('full'))\n"
    )
    told = json.dumps({**content, "output": tmp_path / "out"}, default=str)
    plain = {key: value for key, value in os.environ.items() if key != "TRANSFORMERS_VERBOSITY"}
    result = subprocess.run([sys.executable, "-c", code, told], capture_output=True, text=True, check=True, env=plain)
    assert result.stdout + result.stderr == ""


def test_progress_and_lines_are_told_to_who_asks(content, tmp_path):
    phases, lines = [], []
    run = bitladder.Run(
        {**content, "output": tmp_path / "out"}, progress=lambda *told: phases.append(told), tell=lines.append
    )
    run.measure()
    assert any(phase == "score" and done == total for phase, done, total in phases)
    changed = {**content["calibration"], "samples": 6}
    bitladder.Run({**content, "calibration": changed, "output": tmp_path / "out"}, tell=lines.append).measure()
    assert lines == ["measuring again: calibration.samples 4 → 6"]


def test_what_was_loud_before_is_loud_again():
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    try:
        with quiet_libraries():
            assert transformers_logging.get_verbosity() == transformers_logging.ERROR
            assert not transformers_logging.is_progress_bar_enabled()
            with warnings.catch_warnings(record=True) as caught:
                warnings.warn("other", stacklevel=1)
        assert not caught
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
        with pytest.warns(UserWarning, match="other"):
            warnings.warn("other", stacklevel=1)
    finally:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def test_the_code_of_the_guide_runs(llama, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "library.md").read_text()
    (recipe,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "model").symlink_to(llama)
    (tmp_path / "calibration.txt").write_text(make_text(300))
    (tmp_path / "held_out.txt").write_text(make_text(300, seed=9))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```python") > 5
    names = {}
    for block in blocks:
        exec(compile(block, "docs/library.md", "exec"), names)


def loaded_by(*arguments, among=HEAVY, opening=None):
    """Run a command, and return which of these packages it imported: in all, or until it opened a file."""
    code = (
        "import sys\n"
        "seen = []\n"
        "def loaded():\n"
        f"    return ' '.join(name for name in {among} if name in sys.modules)\n"
        "def opened(event, what):\n"
        f"    if event == 'open' and str(what[0]) == {str(opening)!r}:\n"
        "        seen.append(loaded())\n"
        "sys.addaudithook(opened)\n"
        "import bitladder.cli\n"
        "try:\n    bitladder.cli.main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('loaded:', loaded() if {opening is None} else seen[0])\n"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1].split()[1:]


@pytest.fixture(scope="module")
def recipe(finished, content, tmp_path_factory):
    """The recipe of the finished run, as a file."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps({**content, "output": finished[0].output}, default=str))))
    return path


def test_planning_and_reporting_commands_import_nothing_heavy(finished, recipe, tmp_path):
    output = finished[0].output
    (output / "schemes" / "full.json").unlink()
    assert loaded_by("plan", recipe) == []
    assert (output / "schemes" / "full.json").is_file()
    assert loaded_by("plan", "--measurement", output / "measurement.json", "--coverage", "0.5") == []
    assert loaded_by("frontier", output / "measurement.json") == []
    (output / "report.html").unlink()
    assert loaded_by("report", recipe) == []
    assert (output / "report.html").is_file()
    assert loaded_by("compare", output, output) == []
    assert loaded_by("import", MANIFEST, tmp_path / "measurement.json") == []


def test_the_test_above_can_fail(recipe):
    assert "torch" in loaded_by("export", recipe)


def test_a_command_begins_before_it_imports_what_it_needs_later(finished, recipe, tmp_path):
    """What computes, what draws and what makes pages: a record that can't be read is told of without them."""
    late = ("numpy", "rich", "jinja2", *HEAVY)
    measurement, report = (finished[0].output / name for name in ("measurement.json", "report.json"))
    assert loaded_by("plan", recipe, among=late, opening=measurement) == []
    assert loaded_by("report", recipe, among=late, opening=measurement) == []
    late = (*late, "yaml")  # only recipes are YAML
    assert loaded_by("frontier", measurement, among=late, opening=measurement) == []
    assert loaded_by("compare", report.parent, report.parent, among=late, opening=report) == []
    assert loaded_by("import", MANIFEST, tmp_path / "measurement.json", among=late, opening=MANIFEST) == []


def test_what_computes_nothing_imports_no_numpy(finished, recipe, tmp_path):
    output = finished[0].output
    assert loaded_by("compare", output, output, among=("numpy", "yaml")) == []
    assert loaded_by("import", MANIFEST, tmp_path / "measurement.json", among=("numpy", "yaml")) == []
    assert loaded_by("plan", recipe, among=("numpy", "yaml", "rich")) == ["numpy", "yaml", "rich"]  # it is seen


def _check_devices(page, formats):
    """Check that the table of devices says of each uniform scheme what they make of its own format, and of no other."""
    rows = {generation.title: {} for generation in TARGETS.values()}
    for header, _, *lines in tables(page):
        if header[:2] == ["device", "scored and evaluated so"]:
            for line in lines:
                rows[line[0]] |= dict(zip(header, line, strict=True))
    for generation in TARGETS.values():
        for name in formats:
            how, says = generation.arithmetic.get(name), "as stored"
            if name in generation.unsupported:
                says = f"no {name.upper()}"
            elif how is not None:
                says = f"{name.upper()} {how}"
            assert rows[generation.title][name] == says


@pytest.mark.parametrize("carrier", ["modelopt", "compressed-tensors"])
def test_every_format_goes_through_a_whole_run(carrier, text_file, tmp_path):
    """Alone and in a mix of all, from the measurement to the report and the model cards: integers in their carrier."""
    formats = [name for name, one in FORMATS.items() if next(iter(one.layouts)) == carrier]
    config = llama_config(hidden_size=256, intermediate_size=256, num_attention_heads=4, head_dim=64)
    model = save_model(transformers.LlamaForCausalLM, config, tmp_path / "model")
    samples = {"samples": 4, "sequence_length": 24, "batch_size": 4}
    run = bitladder.Run(
        {
            "model": {"path": str(model)},
            "calibration": {"data": {"kind": "text", "path": str(text_file)}, **samples},
            "held_out": {"name": "text", **samples},
            "measurement": {"formats": formats},
            "export": {"carrier": carrier},
            "schemes": [
                *({"name": name, "coverage": 1.0, "format": name} for name in formats),
                {"name": "mix", "effective_bits": 7.0},
            ],
            "controls": {"kinds": []},
            "output": str(tmp_path / "out"),
        }
    )
    report = run.run()
    assert {scheme.name: scheme.verified for scheme in report.schemes} == dict.fromkeys([*formats, "mix"], True)
    assert all(scheme.results for scheme in report.schemes)
    for name in formats:
        directory = tmp_path / "out" / "checkpoints" / name
        assert f"{name.upper()} ({FORMATS[name].title})" in (directory / "README.md").read_text()
        assert bitladder.load(directory).get_parameter("model.layers.0.mlp.up_proj.weight").isfinite().all()
    mix = next(scheme for scheme in report.schemes if scheme.name == "mix")
    assert len(mix.format_counts) > 2
    for scheme in report.schemes:
        *counts, rest = scheme.format_counts
        assert rest.format == BF16
        assert all(count.groups for count in counts)
    _check_devices((tmp_path / "out" / "report.md").read_text(), formats)
