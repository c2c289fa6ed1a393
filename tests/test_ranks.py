"""What ranks hold of a layer: which part, whether a format takes it, and what vLLM's own loaders make of it."""

import ast
import json
import re
import subprocess
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import pytest
import transformers

import bitladder
from bitladder import planning
from bitladder.checkpoints.export import export
from bitladder.errors import InfeasibleTarget, PlanError, RecipeError, UnsupportedModel
from bitladder.formats import COMPRESSED_TENSORS, MODELOPT, WEIGHT_SCALE, get_format
from bitladder.measured import read_amax
from bitladder.models import splitting
from bitladder.models.families.base import Architecture
from bitladder.models.splitting import Split
from bitladder.planning import shipped
from bitladder.planning.sharing import cut_words
from bitladder.recipe import parse_schemes
from bitladder.records import (
    BF16,
    EngineSettings,
    LeftOut,
    Profile,
    QuantGroup,
    QuantModule,
    SearchedShape,
    TimedCell,
    TimedLayer,
    TimedLoad,
)
from bitladder.report import build_report
from bitladder.report.frontier import spec_of
from bitladder.report.speeds import speeds_of
from bitladder.runtimes.checks.ranks import Ranks
from bitladder.runtimes.findings import Findings
from bitladder.runtimes.preflight import preflight
from bitladder.runtimes.vllm import profiling
from bitladder.runtimes.vllm.rules import VllmRules
from bitladder.steps.workspace import Workspace
from conftest import llama_config, measure_text, save_model
from test_formats import assigned

SCRIPT = Path(__file__).with_name("vllm_ranks.py")
LAYERS = {
    "row": (("down_proj",), lambda wide: [(256, wide)]),
    "column": (("fc1",), lambda wide: [(wide, 256)]),
    "merged": (("gate_proj", "up_proj"), lambda wide: [(wide, 256), (wide, 256)]),
}
WIDE = (128, 160, 192, 256, 352, 384, 512, 1024)
HEADS = ((4, 1, 64), (4, 2, 64), (8, 2, 128), (4, 4, 32))  # of queries, of keys and values, their width
RANKS = (2, 4)


class Carried(VllmRules):
    """vLLM's rules of compressed-tensors' layout alone, so that `layer_config` asks for that."""

    SUPPORT: ClassVar = {}


def cases():
    """Every layer in every format that has scales of parts, in every layout that vLLM reads."""
    layers = [
        (kind, modules, shapes(wide), ranks, 4, 4)
        for kind, (modules, shapes) in LAYERS.items()
        for wide in WIDE
        for ranks in RANKS
    ]
    layers += [
        ("qkv", ("q_proj", "k_proj", "v_proj"), [(h * d, 256), (k * d, 256), (k * d, 256)], ranks, h, k)
        for h, k, d in HEADS
        for ranks in RANKS
    ]
    for rules, carrier, names in (
        (VllmRules, MODELOPT, VllmRules.SUPPORT),
        (Carried, COMPRESSED_TENSORS, VllmRules.CARRIED),
    ):
        for name in names:
            form = get_format(name)
            for kind, modules, shapes, ranks, heads, keys in layers:
                if form.spread == "tensor" or any(form.why_not(shape) for shape in shapes):
                    continue
                layout = form.layouts[carrier]
                yield {
                    "format": name,
                    "config": profiling.layer_config(name, rules),
                    "kind": kind,
                    "modules": modules,
                    "shapes": shapes,
                    "ranks": ranks,
                    "heads": heads,
                    "key_heads": keys,
                    "scale": layout.name(WEIGHT_SCALE),
                    "group": [form.square or 1, form.square or form.group_size or shapes[0][1]],
                    "parts": [
                        [(layout.name(part.name), part.dtype, list(layout.shape(part))) for part in form.stored(shape)]
                        for shape in shapes
                    ],
                }


@pytest.fixture(scope="module")
def answers(vllm_warm):
    """The cases, and what vLLM's layers made of them."""
    asked = list(cases())
    job = json.dumps(asked)
    done = subprocess.run(
        [str(vllm_warm), str(SCRIPT), str(profiling.SCRIPT)], input=job, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(zip(asked, json.loads(done.stdout.splitlines()[-1]), strict=True))


def fits(case):
    """Whether each rank's part of each module is one that the format takes."""
    split, form = Split(case["ranks"], case["heads"], case["key_heads"]), get_format(case["format"])
    parts = [split.part(name, tuple(shape)) for name, shape in zip(case["modules"], case["shapes"], strict=True)]
    return all(form.why_no_part(part) is None for part in parts)


@pytest.mark.slow
def test_a_part_fits_just_where_vllms_loaders_give_each_rank_its_own_scales(answers):
    told = [(fits(case), answer == "whole") for case, answer in answers]
    wrong = [
        (case["format"], case["config"]["quant_method"], case["kind"], case["shapes"], case["ranks"], answer)
        for (case, answer), (ours, theirs) in zip(answers, told, strict=True)
        if ours != theirs
    ]
    assert not wrong, "\n".join(map(str, [len(wrong), *wrong[:40]]))
    assert {(True, True), (False, False)} == set(told)


def test_vllm_splits_modules_of_these_names_so(vllm_python):
    """By the classes of which vLLM's language models make the attributes of these names."""
    (models,) = vllm_python.parents[1].glob("lib/python*/site-packages/vllm/model_executor/models")
    found = {}
    for path in models.glob("*.py"):
        text = path.read_text()
        if "ParallelLMHead" not in text or "Encoder" in text:  # nor what hears or sees
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                made = getattr(node.value.func, "id", "")
                if made.endswith("Linear"):
                    for target in node.targets:
                        found.setdefault(getattr(target, "attr", ""), Counter())[made] += 1
    by_rows = splitting.BY_ROWS | splitting.BY_KEY_HEADS | splitting.BY_ALL_HEADS
    for names, kinds in (
        (splitting.BY_COLUMNS, {"RowParallelLinear"}),
        (by_rows, {"ColumnParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear"}),
    ):
        for name in names & found.keys():
            others = found[name].keys() - kinds
            assert sum(found[name][kind] for kind in others) <= 0.02 * found[name].total(), (name, found[name])
    assert {"o_proj", "down_proj", "qkv_proj", "gate_up_proj", "q_proj", "out_proj", "fc1", "fc2"} <= found.keys()


CONFIG = {"num_attention_heads": 16, "num_key_value_heads": 2}  # of Qwen2.5-VL-3B, with hidden size 2048


@pytest.mark.parametrize(
    ("ranks", "key_rows", "fused"), [(1, 256, (2560, 2048)), (2, 128, (1280, 2048)), (4, 128, (768, 2048))]
)
def test_keys_and_values_are_repeated_where_ranks_outnumber_their_heads(ranks, key_rows, fused):
    split = Split.of({"text_config": CONFIG}, ranks)
    assert split.part("model.layers.0.self_attn.k_proj", (256, 2048)) == (key_rows, 2048)
    assert split.part("model.layers.0.self_attn.o_proj", (2048, 2048)) == (2048, 2048 // ranks)
    modules = [
        QuantModule(name=f"{leaf}_proj", shape=(rows, 2048)) for leaf, rows in zip("qkv", (2048, 256, 256), strict=True)
    ]
    group = QuantGroup(name="qkv", modules=tuple(modules), weight_elements=2560 * 2048)
    assert split.group(group).fused_shape == split.part("qkv_proj", (2560, 2048)) == fused


def test_what_cannot_be_split_is_told():
    split = Split.of(CONFIG, 3)
    assert split.why_not == "16 attention heads can't be split among 3 ranks"  # vLLM: ... must be divisible by ...
    assert Split.of({**CONFIG, "num_key_value_heads": 6}, 4).why_not == (
        "6 heads of keys and values can't be split among 4 ranks, nor repeated"
    )
    with pytest.raises(UnsupportedModel, match="351 features of down_proj can't be split among 2 ranks"):
        Split.of(CONFIG, 2).part("down_proj", (64, 351))
    odd = QuantGroup(name="g", modules=(QuantModule(name="a.down_proj", shape=(64, 351)),), weight_elements=64 * 351)
    with pytest.raises(UnsupportedModel, match="tensor_parallel: 351 features .* 2 ranks; name another number"):
        Split.of(CONFIG, 2).group(odd)
    assert Split.of(CONFIG, 2).part("kv_b_proj", (64, 64)) is None
    group = QuantGroup(name="g", modules=(QuantModule(name="a.kv_b_proj", shape=(64, 64)),), weight_elements=4096)
    with pytest.raises(UnsupportedModel, match=r"how a\.kv_b_proj is split among ranks isn't known; use"):
        Split.of(CONFIG, 2).group(group)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, text_file):
    """A model with rows of 352, which 16 and 32 divide, halves that 16 divides, and quarters that neither does."""
    root = tmp_path_factory.mktemp("ranks")
    config = llama_config(hidden_size=128, intermediate_size=352, num_attention_heads=8, num_key_value_heads=8)
    source = save_model(transformers.LlamaForCausalLM, config, root / "source")
    return source, measure_text(source, text_file, root, formats=("fp8", "nvfp4", "mxfp8"), samples=2), root


@pytest.fixture(scope="module")
def made(measured):
    """`{name: directory}`."""
    source, measurement, root = measured
    for name, carrier in (("nvfp4", MODELOPT), ("mxfp8", MODELOPT), ("nvfp4", COMPRESSED_TENSORS)):
        scheme = assigned(measurement, name, lambda _, group, name=name: name)
        export(scheme, measurement, read_amax(measurement, root), source, root / f"{name}-{carrier}", carrier=carrier)
    return {path.name: path for path in root.iterdir() if path.is_dir()}


def found(directory, ranks, runtime="vllm"):
    (result,) = preflight(directory, (runtime,), tensor_parallel=ranks)
    assert result.tensor_parallel == ranks
    told = [(f.severity, f.error_class, f.where, f.problem, f.remedy) for f in result.findings]
    return [one for one in told if one[1] != "missing_file"]  # a chat template


DOWN = "model.layers.0.mlp.down_proj"
MORE = "; the same in 2 more, the last model.layers.2.mlp.down_proj"


@pytest.mark.parametrize("runtime", ["vllm", "vllm==0.25.1"])
def test_preflight_finds_the_layers_whose_blocks_are_cut(made, runtime):
    assert found(made["nvfp4-modelopt"], 1, runtime) == found(made["nvfp4-modelopt"], 2, runtime) == []
    ((*told, problem, remedy),) = found(made["nvfp4-modelopt"], 4, runtime)
    assert told == ["error", "unsupported_format", DOWN]
    why = get_format("nvfp4").why_not((128, 88))
    assert problem == f"is nvfp4, and of down_proj each of 4 ranks holds [128, 88], which {why}{MORE}"
    assert remedy == "serve it with tensor_parallel 2, or leave this layer in bf16"
    ((*told, problem, remedy),) = found(made["mxfp8-modelopt"], 2, runtime)
    assert told == ["error", "unsupported_format", DOWN]
    assert "each of 2 ranks holds [128, 176], which has rows that are not divisible by 32" in problem
    assert remedy.startswith("serve it with tensor_parallel 1, or leave this layer in ")


def test_preflight_finds_them_in_compressed_tensors_layout(made):
    directory = made["nvfp4-compressed-tensors"]
    assert found(directory, 2) == []
    ((*told, problem, _),) = found(directory, 4)
    assert told == ["error", "unsupported_format", DOWN]
    assert "each of 4 ranks holds [128, 88]" in problem


def test_preflight_finds_heads_that_cannot_be_split_and_says_what_it_does_not_know(made):
    ((*told, problem, remedy),) = found(made["nvfp4-modelopt"], 6)
    assert told == ["error", "unsupported_model", "config.json"]
    assert problem == "8 attention heads can't be split among 6 ranks"
    assert remedy == "serve it with tensor_parallel 2"  # 4 cuts blocks
    ((*told, problem, _),) = found(made["nvfp4-modelopt"], 2, "sglang")
    assert told == ["warning", "unsupported_model", "config.json"]
    assert problem == "how sglang shares a model among 2 ranks isn't known here, so that wasn't checked"


def test_a_remedy_names_only_what_the_release_runs_in_a_mix(made):
    """vLLM 0.25.1 leaves layers with a scale a channel in 16 bits where a checkpoint mixes formats."""
    told = {}
    for runtime in ("vllm", "vllm==0.25.1"):
        ((*_, told[runtime]),) = found(made["mxfp8-modelopt"], 2, runtime)
    before = "serve it with tensor_parallel 1, or leave this layer in "
    assert told == {"vllm": f"{before}fp8_pc_pt or bf16", "vllm==0.25.1": f"{before}bf16"}


def told_of(shapes, formats, split, *, carried=False, **need):
    """What is found of linears, `{module: shape}`, in formats, `{module: format}`."""
    model = Architecture(**need)
    for name, shape in shapes.items():
        model.linear(name, *shape, bias=False)
    findings = Findings()
    Ranks(model, VllmRules(model, (), {}), formats, carried, str).check(split, findings)
    return [(one.where, one.problem, one.remedy) for one in findings.records()]


def test_of_an_architecture_that_is_not_known_two_codes_a_byte_are_two_weights():
    """A rank has 8 of 16 bytes of a row: 16 weights, which are a block."""
    formats, split = {DOWN: "nvfp4"}, Split(2, 4, 4)
    assert told_of({DOWN: (64, 16)}, formats, split, open_prefixes=("",)) == []
    ((_, problem, _),) = told_of({DOWN: (64, 16)}, formats, split)
    assert "of down_proj each of 2 ranks holds [64, 8]" in problem


def test_what_sees_is_not_asked_whether_ranks_can_share_it():
    shapes = {DOWN: (64, 128), "visual.blocks.0.mlp.down_proj": (64, 351)}
    assert told_of(shapes, {}, Split(2, 4, 4)) == []
    ((where, problem, _),) = told_of({DOWN: (64, 351)}, {}, Split(2, 4, 4))
    assert (where, problem) == (DOWN, "351 features of down_proj can't be split among 2 ranks")


@pytest.mark.parametrize(("carried", "named"), [(True, "int4_w4a16_asym_g64 or bf16"), (False, "bf16")])
def test_a_remedy_names_what_the_checkpoints_own_layout_carries(carried, named):
    formats = {DOWN: "int4_w4a16_asym"}  # a row of 192 has no whole blocks of 128, and three of 64
    ((_, problem, remedy),) = told_of({DOWN: (128, 384)}, formats, Split(2, 4, 4), carried=carried)
    assert "holds [128, 192]" in problem
    assert remedy == f"serve it with tensor_parallel 1, or leave this layer in {named}"


def test_every_module_of_a_fused_layer_has_to_fit():
    """A rank of four has 128 rows of the queries, and 64 of keys: half of a square of 128."""
    names = [f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv"]
    shapes = dict(zip(names, ((512, 256), (256, 256), (256, 256)), strict=True))
    ((where, problem, _),) = told_of(shapes, dict.fromkeys(names, "fp8_block"), Split(4, 8, 4))
    assert where == names[0]
    assert "of k_proj each of 4 ranks holds [64, 256]" in problem


def plan_of(measured, text_file, tell=lambda line: None, **changes):
    source, _, root = measured
    data = {"data": {"kind": "text", "path": text_file}, "samples": 2, "sequence_length": 24, "batch_size": 2}
    schemes = [{"name": "four", "coverage": 1.0, "formats": ["nvfp4"]}]
    content = {"model": {"path": source}, "calibration": data, "held_out": data, "output": root / "run"}
    formats = {"formats": ["fp8", "nvfp4", "mxfp8"], "method": "gradient"}
    return bitladder.Run({**content, "measurement": formats, "schemes": schemes, **changes}, tell=tell)


def test_a_scheme_that_names_a_format_of_which_ranks_would_hold_parts_is_refused(measured, text_file, tmp_path):
    schemes = [{"name": "four", "coverage": 1.0, "format": "nvfp4"}]
    run = plan_of(measured, text_file, tensor_parallel=2, schemes=schemes)
    run.measure()
    assert run.plan()[0].formats["model.layers.0.mlp.down_proj"] == "nvfp4"
    told = r"scheme four: model\.layers\.0\.mlp\.down_proj is nvfp4, and of down_proj each .*give the scheme `formats`"
    with pytest.raises(PlanError, match=told):
        plan_of(measured, text_file, tensor_parallel=4, schemes=schemes).plan()
    included = [{"name": "four", "include": ["*.down_proj"], "format": "nvfp4"}]
    with pytest.raises(PlanError, match=r"scheme four: .* set exclude: \['\*\.down_proj'\], or set another"):
        plan_of(measured, text_file, tensor_parallel=4, schemes=included).plan()
    # and before anything is measured, where every plan would have it
    for asked, told in (
        (schemes, "give the scheme `formats`"),
        (included, "set another tensor_parallel"),
        ([{**included[0], "exclude": ["*.down_proj"], "include": ["*"]}], None),
        ([{"name": "four", "coverage": 0.9, "format": "nvfp4"}], None),
        ([{"name": "four", "coverage": 1.0, "format": "nvfp4", "exclude": ["*.down_proj"]}], None),
    ):
        run = plan_of(measured, text_file, tensor_parallel=4, schemes=asked, output=tmp_path)
        with pytest.raises(PlanError, match=told) if told else nullcontext():
            run.preview()
    # what it names as remedies are some
    for schemes in (
        [{"name": "four", "coverage": 0.6, "format": "nvfp4", "exclude": ["*.down_proj"]}],
        [{"name": "four", "coverage": 1.0, "formats": ["nvfp4"]}],
    ):
        (scheme,) = plan_of(measured, text_file, tensor_parallel=4, schemes=schemes).plan()
        assert scheme.formats["model.layers.0.mlp.down_proj"] == BF16
        assert "nvfp4" in scheme.formats.values()
    with pytest.raises(RecipeError, match="tensor_parallel: 8 attention heads can't be split among 3 ranks; name"):
        plan_of(measured, text_file, tensor_parallel=3).measure()


def test_a_format_is_left_out_where_ranks_would_hold_parts_of_its_blocks(measured, text_file):
    measurement = plan_of(measured, text_file).measure()
    cut = {(f"model.layers.{layer}.mlp.down_proj", name) for layer in range(3) for name in ("nvfp4", "mxfp8")}
    left = [one for one in measurement.candidates if (one.group, one.format) in cut]
    known = measurement.model_copy(
        update={
            "candidates": tuple(one for one in measurement.candidates if one not in left),
            "left_out": tuple(LeftOut(group=one.group, format=one.format, reason="cut") for one in left),
        }
    )
    said = []
    asked = [{"name": "mix", "effective_bits": 6.5}, {"name": "most", "coverage": 1.0}]
    schemes = plan_of(measured, text_file, said.append, tensor_parallel=4, schemes=asked).plan()
    for scheme, spec in zip(schemes, parse_schemes(asked), strict=True):
        assert scheme.formats == planning.plan(known, spec).formats
        assert not cut & set(scheme.formats.items())
        assert scheme.measurement_sha256 == measurement.fingerprint()
    assert {schemes[1].formats[group] for group, _ in cut} == {"fp8"}
    where = "mxfp8 in 3 of 12 groups, nvfp4 in 3 of 12 groups"
    assert said == [f"tensor_parallel 4: plans leave out {where}, as ranks would hold parts of blocks there"]
    split = Split(4, 8, 8)
    assert cut_words(known, split) is None  # what was no candidate before isn't left out
    # the planner of the page makes what the recipe's line makes
    found = build_report({}, measurement, schemes, {}, None, {}, [], split=split)
    letters, names = found.frontier.letters, [group.name for group in measurement.groups]
    for curve in found.frontier.curves:
        for point in curve.points:
            chosen = dict(zip(names, (letters[letter] for letter in point.formats), strict=True))
            assert not cut & set(chosen.items())
            (spec,) = parse_schemes([spec_of(curve, point.target, measurement.formats)])
            assert planning.plan(measurement, spec, split=split).formats == chosen
    # formats are advised where ranks can hold them in enough groups: of down_proj no rank has whole blocks
    (spec,) = parse_schemes([{"name": "few", "effective_bits": 4.6, "formats": ["mxfp8"]}])
    with pytest.raises(InfeasibleTarget, match=r"minimum [0-9.]+ .*; raise the target, or add nvfp4 to the formats"):
        planning.plan(measurement, spec)
    with pytest.raises(InfeasibleTarget, match=r"minimum [0-9.]+ .*; raise the target; no known format reaches so"):
        planning.plan(measurement, spec, split=split)
    (spec,) = parse_schemes([{"name": "some", "effective_bits": 8.2, "formats": ["mxfp8"]}])
    with pytest.raises(InfeasibleTarget, match=r"raise the target, or add ([a-z0-9]+) ") as refused:
        planning.plan(measurement, spec, split=split)
    added = re.search(r"or add (\w+) ", str(refused.value))[1]
    enough = spec.model_copy(update={"formats": ("mxfp8", added)})
    assert planning.plan(measurement, enough, split=split).effective_bits <= 8.2
    # nothing is left, nothing is left out
    only = [
        {"name": "all", "effective_bits": 9, "formats": ["mxfp8"], "exclude": ["*.qkv_proj", "*.o_proj", "*.gate*"]}
    ]
    with pytest.raises(InfeasibleTarget, match=r"scheme all would quantise nothing: no group .* can be in mxfp8"):
        plan_of(measured, text_file, tensor_parallel=4, schemes=only).plan()
    down = measurement.model_copy(
        update={
            "groups": tuple(one for one in measurement.groups if one.name.endswith("down_proj")),
            "candidates": tuple(one for one in measurement.candidates if one.group.endswith("down_proj")),
        }
    )
    (spec,) = parse_schemes([{"name": "all", "effective_bits": 9, "formats": ["mxfp8"]}])
    with pytest.raises(InfeasibleTarget, match="nothing: of every group in mxfp8 each of 4 ranks would hold"):
        planning.plan(down, spec, split=split)
    said.clear()
    plan_of(measured, text_file, said.append, tensor_parallel=1, schemes=asked).plan()
    assert said == []


def profile_of(groups, ranks, formats=(BF16, "fp8")):
    """A profile of groups as one rank holds them."""
    shapes = Counter(group.fused_shape for group in groups)
    cells = (TimedCell(tokens=1, seconds=1e-6, low=1e-6, high=1e-6),)
    shape = [{"out_features": rows, "in_features": columns} for rows, columns in shapes]
    timed = {"method": "M", "kernel": None, "chain": 1, "cells": cells}
    engine = {"compiled": False, "graphs": "NONE", "graph_sizes": (), "tokens_a_step": 8192, "requests_at_once": 64}
    loads = [(1, 16, 33), (8, 200, 33), (64, 700, 33)]
    return Profile(
        model="Llama",
        searched=tuple(SearchedShape(**one, groups=n) for one, n in zip(shape, shapes.values(), strict=True)),
        device="Invented GPU",
        capability=(9, 0),
        driver="1",
        runtime="vllm",
        version="0.0",
        versions={},
        tensor_parallel=ranks,
        engine=EngineSettings(**engine),
        layers=tuple(TimedLayer(format=name, **one, **timed) for name in formats for one in shape),
        refused={},
        loads=tuple(
            TimedLoad(
                requests=r, prompt_tokens=p, output_tokens=o, one_token=(r * p * 1e-4,), all_tokens=(r * p * 2e-4,)
            )
            for r, p, o in loads
        ),
    )


def test_speeds_are_predicted_from_a_profile_of_as_many_ranks(measured, text_file):
    _, measurement, root = measured
    split = Split(2, 8, 8)
    path = root / "profile.json"
    profile_of([split.group(group) for group in measurement.groups], 2).write(path)
    assert Profile.read(path).tensor_parallel == 2
    asked = {"profile": str(path), "schemes": [{"name": "eight", "coverage": 1.0, "formats": ["fp8"]}]}
    with pytest.raises(
        PlanError, match=r"the recipe's tensor_parallel is 1, its profile is of 2: run `bitladder profile"
    ):
        plan_of(measured, text_file, **asked).plan()
    run = plan_of(measured, text_file, tensor_parallel=2, **asked)
    (scheme,) = run.plan()
    speeds = speeds_of(measurement, (scheme,), Workspace(run.recipe, run.output).speed_model(measurement.groups))
    assert (speeds.device, speeds.tensor_parallel, speeds.unknown) == ("2 x Invented GPU", 2, {})
    # what ranks can't hold was never timed for them, and isn't asked for
    schemes = [{"name": "mix", "max_predicted_score": 1e9, "prefer": "decode"}]
    groups = [split.group(group) for group in measurement.groups]
    slow, fast = ({"seconds": s, "low": s, "high": s} for s in (2e-6, 1e-6))
    mixed = profile_of(groups, 2, (BF16, "fp8", "nvfp4", "mxfp8"))
    layers = [one for one in mixed.layers if one.format != "mxfp8" or one.in_features != 176]
    times = [(TimedCell(tokens=1, **(slow if one.format == BF16 else fast)),) for one in layers]
    layers = [one.model_copy(update={"cells": cells}) for one, cells in zip(layers, times, strict=True)]
    mixed.model_copy(update={"layers": tuple(layers)}).write(path)
    run = plan_of(measured, text_file, tensor_parallel=2, profile=str(path), schemes=schemes)
    (scheme,) = run.plan()
    assert set(scheme.formats.values()) - {BF16}
    assert "mxfp8" not in {scheme.formats[f"model.layers.{layer}.mlp.down_proj"] for layer in range(3)}
    work = Workspace(run.recipe, run.output)
    planning.refuse_too_fast(
        run.recipe.schemes, measurement.formats, work.target, work.speed_model(measurement.groups), work.split
    )
    # a profile of the whole model's shapes isn't one of the parts
    profile_of(measurement.groups, 2).write(path)
    with pytest.raises(PlanError, match="the profile is of Llama, whose layers are 3 of 384 x 128"):
        plan_of(measured, text_file, tensor_parallel=2, **asked).plan()


def test_a_profile_of_one_gpu_is_written_as_before():
    groups = [QuantGroup(name="g", modules=(QuantModule(name="o_proj", shape=(64, 64)),), weight_elements=4096)]
    one, two = profile_of(groups, 1), profile_of(groups, 2)
    assert "tensor_parallel" not in one.model_dump(mode="json")
    assert one.fingerprint() != two.fingerprint()
    assert {shipped.profile_named(name).tensor_parallel for name in shipped.names()} == {1}
