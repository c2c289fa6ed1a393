"""Checkpoints in compressed-tensors' layout before runtimes: pre-flight by vLLM's rules, and vLLM's own loader."""

import json
import re
import shutil

import pytest
import torch

from bitladder.records import BF16
from bitladder.runtimes.preflight import preflight
from bitladder.runtimes.registry import VERSIONS
from bitladder.runtimes.vllm.load import load_all
from bitladder.runtimes.vllm.rules import VllmRules
from test_carriers import (  # noqa: F401  (fixtures)
    DOWN,
    EACH,
    MIX,
    NOT_ON_CPUS,
    ON_CPUS,
    UP,
    WRONG_ZEROS,
    ZERO,
    ZEROS,
    damaged,
    directories,
    llama,
    measured,
    schemes,
    section_of,
)

OTHERS = [name for name, rules in VERSIONS.items() if not rules.CARRIED]
Q = "model.layers.0.self_attn.q_proj"


def asked_of(measured, scheme):  # noqa: F811
    return {module.name: scheme.formats[group.name] for group in measured[0].groups for module in group.modules}


def errors(directory, runtime="vllm", **options):
    (result,) = preflight(directory, [runtime], **options)
    return [(f.error_class, f.where, f.problem) for f in result.findings if f.severity == "error"]


@pytest.mark.parametrize("name", [*EACH, MIX])
def test_preflight_finds_every_layer_in_its_format(directories, measured, schemes, name):  # noqa: F811
    (result,) = preflight(directories[name], ["vllm"], read_weights=True)
    assert [f for f in result.findings if f.severity == "error"] == []
    assert result.reached == "weights"
    wanted = asked_of(measured, schemes[name])
    assert {layer.name: layer.format for layer in result.layers if layer.name in wanted} == wanted
    assert {layer.name for layer in result.layers} >= wanted.keys()
    for layer in result.layers:
        assert layer.promised == layer.format
        if layer.format != BF16:
            assert layer.method == VllmRules.CARRIED[layer.format].method


@pytest.mark.parametrize("runtime", OTHERS)
def test_a_runtime_whose_rules_are_unknown_says_that_nothing_was_checked(directories, runtime):  # noqa: F811
    (result,) = preflight(directories[MIX], [runtime])
    assert (result.reached, result.layers) == ("configuration", ())
    said = [f.problem for f in result.findings if f.error_class == "unsupported_format"]
    assert len(said) == 1
    assert "compressed-tensors" in said[0]
    assert "no layer was checked" in said[0]
    assert errors(directories[MIX], runtime) == []


def changed(directory, destination, change):
    shutil.copytree(directory, destination)
    (destination / "bitladder_manifest.json").unlink()
    path = destination / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    return destination


def test_targets_are_read_as_vllm_reads_them(directories, tmp_path):  # noqa: F811
    """A class, a pattern, a module that is ignored by its name."""

    def by_class(section):
        section["config_groups"]["group_0"]["targets"] = ["Linear"]

    def by_pattern(section):
        section["config_groups"]["group_0"]["targets"] = ["re:.*self_attn", "re:.*mlp.*"]

    for index, change in enumerate((by_class, by_pattern)):
        assert errors(changed(directories["fp8"], tmp_path / str(index), change)) == []

    def some_ignored(section):
        section["ignore"].append(Q)

    found = errors(changed(directories["fp8"], tmp_path / "ignored", some_ignored))
    assert ("mixed_group", Q) in [(kind, where) for kind, where, _ in found]
    assert "only some are ignored" in found[0][2]


def move(name, first, second):
    def change(section):
        groups = section["config_groups"]
        groups[first]["targets"].remove(name)
        groups[second]["targets"].append(name)

    return change


def test_a_fused_layer_in_two_groups_is_found(directories, tmp_path):  # noqa: F811
    group = next(n for n, g in section_of(directories[MIX])["config_groups"].items() if Q in g["targets"])
    other = "group_1" if group != "group_1" else "group_0"
    found = errors(changed(directories[MIX], tmp_path / "x", move(Q, group, other)))
    assert any(kind == "mixed_group" and "different config groups" in problem for kind, _, problem in found)


def test_a_module_that_no_group_names_is_found(directories, tmp_path):  # noqa: F811
    def change(section):
        section["config_groups"]["group_0"]["targets"].remove(DOWN)

    found = errors(changed(directories["fp8"], tmp_path / "x", change))
    assert [(kind, where) for kind, where, _ in found if where == DOWN] == [("wrong_format", DOWN)]
    assert "no config group names it" in found[0][2]


BROKEN = [
    ("nvfp4", lambda t: t.pop(f"{DOWN}.weight_global_scale"), "missing_tensor", f"{DOWN}.weight_global_scale"),
    ("nvfp4", lambda t: t.pop(f"{DOWN}.weight_packed"), "missing_tensor", f"{DOWN}.weight_packed"),
    (
        "nvfp4",
        lambda t: t.update({f"{DOWN}.input_global_scale": t[f"{DOWN}.input_global_scale"] * 0}),
        "bad_scale",
        f"{DOWN}.input_global_scale",
    ),
    (
        "nvfp4",
        lambda t: t.update({f"{Q}.weight_global_scale": t[f"{Q}.weight_global_scale"] * 2}),
        "unequal_scales",
        f"{Q}.weight_global_scale",
    ),
    ("fp8", lambda t: t.update({f"{DOWN}.extra": torch.zeros(2)}), "unexpected_tensor", f"{DOWN}.extra"),
    (
        "fp8_pc_pt",
        lambda t: t.update({f"{DOWN}.weight_scale": t[f"{DOWN}.weight_scale"][1:].clone()}),
        "bad_scale",
        f"{DOWN}.weight_scale",
    ),
    ("int4_w4a16_asym", lambda t: t.pop(ZERO), "missing_tensor", ZERO),
    ("int4_w4a16_asym", WRONG_ZEROS["along_the_columns"][0], "bad_scale", ZERO),
    ("int4_w4a16_asym", WRONG_ZEROS["transposed"][0], "bad_scale", ZERO),
    ("int4_w4a16_asym", WRONG_ZEROS["not_packed"][0], "bad_scale", ZERO),
    ("int4_w4a16", lambda t: t.update({ZERO: torch.zeros(16, 2, dtype=torch.int32)}), "unexpected_tensor", ZERO),
]


@pytest.mark.parametrize(
    ("name", "change", "kind", "where"), BROKEN, ids=[f"{i}-{b[0]}-{b[2]}" for i, b in enumerate(BROKEN)]
)
def test_broken_tensors_are_found(directories, tmp_path, name, change, kind, where):  # noqa: F811
    copy = damaged(directories[name], tmp_path / "x", change)
    assert (kind, where) in [(found, place) for found, place, _ in errors(copy)]


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_that_denies_zero_points_is_found(directories, tmp_path, symmetric):  # noqa: F811
    """Or one that has them, of a checkpoint without."""

    def change(section):
        section["config_groups"]["group_0"]["weights"]["symmetric"] = symmetric

    stored = "int4_w4a16_asym" if symmetric else "int4_w4a16"
    found = errors(changed(directories[stored], tmp_path / "x", change))
    says = {
        True: (
            "wrong_format",
            Q,
            "is stored as int4_w4a16_asym, but its config group makes it int4_w4a16; the same in 20",
        ),
        False: ("missing_tensor", f"{Q}.weight_zero_point", "isn't there: vllm would use"),
    }[symmetric]
    assert any((kind, where) == says[:2] and problem.startswith(says[2]) for kind, where, problem in found), found


@pytest.fixture(scope="module")
def loaded(directories, vllm_warm, tmp_path_factory):  # noqa: F811
    made = dict(directories)
    unequal = tmp_path_factory.mktemp("unequal") / "x"
    made["unequal"] = damaged(directories["nvfp4"], unequal, BROKEN[3][1])
    made["no_scale"] = damaged(directories["fp8"], unequal.with_name("y"), lambda t: t.pop(f"{DOWN}.weight_scale"))
    for name in ("missing", "along_the_columns", "not_packed"):
        made[name] = damaged(directories["int4_w4a16_asym"], unequal.with_name(name), WRONG_ZEROS[name][0])
    made["shard"] = damaged(
        directories["int4_w4a16_asym_g64"], unequal.with_name("shard"), lambda t: t.pop(f"{UP}.weight_zero_point")
    )
    made["denied"] = changed(
        directories["int4_w4a16_asym"],
        unequal.with_name("denied"),
        lambda section: section["config_groups"]["group_0"]["weights"].update(symmetric=True),
    )
    results = load_all([*made.values()], vllm_warm, isolated=False, timeout=60)
    return dict(zip(made, results, strict=True))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in (*EACH, ON_CPUS) if name not in NOT_ON_CPUS])
def test_vllms_loader_runs_each_layer_as_promised(loaded, measured, schemes, name):  # noqa: F811
    result = loaded[name]
    assert [(f.error_class, f.where, f.problem) for f in result.findings] == []
    assert result.reached == "inspection"
    wanted = asked_of(measured, schemes[name])
    assert {layer.name: layer.format for layer in result.layers if layer.name in wanted} == wanted
    methods = {layer.method for layer in result.layers if layer.format != BF16}
    assert methods == {VllmRules.CARRIED[one].method for one in wanted.values() if one != BF16}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NOT_ON_CPUS)
def test_what_vllm_has_no_kernel_for_on_a_cpu_is_said(loaded, name):
    (finding,) = loaded[name].findings
    assert finding.error_class == "unsupported_format"
    assert "Failed to find a kernel that can implement the WNA16 linear layer" in finding.problem


@pytest.mark.timeout(600)
def test_vllms_loader_shows_what_it_does_silently(loaded):
    unequal = [f for f in loaded["unequal"].findings if f.error_class == "unequal_scales"]
    assert [re.search("takes the largest above all", f.problem) is not None for f in unequal] == [True]
    missing = [f.where for f in loaded["no_scale"].findings if f.error_class == "missing_tensor"]
    assert missing == [f"{DOWN}.weight_scale"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ZEROS)
def test_zero_points_run_in_vllms_kernel_for_them(loaded, name):
    layers = [layer for layer in loaded[name].layers if layer.format != BF16]
    assert {layer.method for layer in layers} == {"CompressedTensorsWNA16"}
    # with AVX-512, and without
    assert {layer.kernel for layer in layers} < {"CPUWNA16LinearKernel", "EmulationWNA16LinearKernel"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("case", "where"), [("missing", ZERO), ("shard", f"{UP}.weight_zero_point")])
def test_zero_points_that_vllm_never_loads_are_found(loaded, case, where):
    """vLLM takes -8 for all of them, and doesn't say so: a place for a shard's alone is seen by its poison."""
    missing = [f for f in loaded[case].findings if f.error_class == "missing_tensor"]
    assert [f.where for f in missing] == [where]
    assert "vLLM never loads" in missing[0].problem


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", ["along_the_columns", "not_packed"])
def test_vllm_stops_at_zero_points_of_another_shape(loaded, case):
    assert [f.where for f in loaded[case].findings if f.severity == "error"][:1] == [ZERO]


@pytest.mark.timeout(600)
def test_vllm_has_no_place_for_zero_points_of_symmetric_codes(loaded):
    assert loaded["denied"].findings
    assert any("weight_zero_point" in f"{f.where} {f.problem}" for f in loaded["denied"].findings)
