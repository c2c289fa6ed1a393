"""Speculative decoding: what a step of it verifies in vLLM, how fast that is predicted to be, and what is refused."""

import dataclasses
import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from bitladder import planning, report
from bitladder.errors import PlanError, RecipeError
from bitladder.planning.speed import Load, SpeedModel
from bitladder.recipe import SpeedSpec, parse_recipe
from bitladder.records import BF16
from bitladder.runtimes.vllm import serve
from bitladder.runtimes.vllm.job import ServeJob, SpeedJob
from bitladder.steps.measure import measure
from bitladder.steps.plan import plan
from bitladder.steps.report import make_report
from conftest import same_kl, spec
from test_asking import measurement_of
from test_profile import MODEL
from test_report_speed import row_of
from test_speed import (
    ASKED,
    DEVICE,
    LAYERS,
    SHAPES,
    every_choice,
    layer_seconds,
    model_of,
    profile_like,
    profile_of,
    work_of,
)

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = ("fp8", "nvfp4")
DRAFTED = dataclasses.replace(ASKED, speculative_tokens=3)  # 64 requests: 256 tokens a step
# A step of an engine of random weights: tokens that were scheduled, and that layers, attention and output head had.
STEPS = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import speed_child
script = Path(sys.argv[2])
serving = speed_child.load(script)
serving.runtime_facts()
random = speed_child.load(script.with_name("child_random.py"))
random.fill = speed_child.saying_two(random.fill)
engine = {**json.loads(sys.argv[4]), "load_format": random.register()}
llm = serving.build({**json.loads(sys.argv[3]), "engine": engine}, False)
seen = []

def watch(model):
    layers = dict(model.named_modules())
    name = next(name for name in layers if name.endswith("layers.0.mlp.down_proj"))
    layers[name].register_forward_hook(lambda module, inputs, output: seen.append(["layer", inputs[0].shape[0]]))
    name = next(name for name in layers if name.endswith("layers.0.self_attn.attn"))
    layers[name].register_forward_hook(lambda module, inputs, output: seen.append(["attention", inputs[0].shape[0]]))
    plain = model.compute_logits
    model.compute_logits = lambda states: (seen.append(["head", states.shape[0]]), plain(states))[1]

llm.apply_model(watch)
steps = speed_child.scheduled(llm)
load = {"requests": 2, "prompt_tokens": 16, "output_tokens": 4, "repeats": 1, "untimed": 0}
serving.timings(llm, {**load, "opening": speed_child.SAID})
print(json.dumps([steps, seen]))
"""


def verified(formats, load):
    """Return what a step takes on the invented device: by vLLM's rule its graphs hold whole requests."""
    of_one = load.speculative_tokens + 1
    graphs = [-(-size // of_one) * of_one for size in (1, 8, 64)]
    tokens = load.requests * of_one
    rest = 4e-4 + 2e-6 * tokens + 3e-9 * load.requests * load.context
    tokens = next((size for size in graphs if size >= tokens), tokens)
    return rest + sum(layer_seconds(name, SHAPES[place % 2], tokens) for place, name in enumerate(formats))


@pytest.mark.slow
def test_vllm_verifies_all_drafted_tokens_of_all_requests_at_once(vllm_warm, tmp_path):
    """By vLLM's own `ngram`: linear layers, attention and the output head have requests x (drafted + 1) rows."""
    job = serve.child_job(MODEL, ServeJob(speed=SpeedJob(2, 16, 4)))
    engine = {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 1,
        },
    }
    done = subprocess.run(
        [vllm_warm, "-c", STEPS, BENCHMARKS, serve.SCRIPT, json.dumps(job), json.dumps(engine)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **serve.ENVIRONMENT},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    steps, seen = json.loads(done.stdout.splitlines()[-1])
    assert steps == [32, 32, 8, 8, 8]  # a prompt's prefill alone; with it three steps, each of which keeps one token
    for what in ("layer", "attention", "head"):
        rows = [count for name, count in seen if name == what]
        assert rows[-3:] == [8, 8, 8], what


@pytest.mark.parametrize("requests", [1, 5, 30, 64])
@pytest.mark.parametrize("drafted", [1, 3, 7])
def test_a_step_takes_what_so_many_tokens_take(requests, drafted):
    measurement = measurement_of(tuple(DEVICE)[1:], layers=LAYERS)
    load, rng = Load(requests, 300, 33, drafted), random.Random(requests)
    formats = [rng.choice(list(DEVICE)) for _ in measurement.groups]
    speed = model_of(measurement).predict(dict(zip((g.name for g in measurement.groups), formats, strict=True)), load)
    plain = [BF16] * len(formats)
    assert speed.decode == pytest.approx(requests / verified(formats, load), rel=1e-6)  # one kept token of each
    assert speed.decode_ratio == pytest.approx(verified(plain, load) / verified(formats, load), rel=1e-6)
    before = model_of(measurement).predict(
        dict(zip((g.name for g in measurement.groups), formats, strict=True)), Load(requests, 300, 33)
    )
    assert (speed.prefill, speed.prefill_ratio) == (before.prefill, before.prefill_ratio)


def test_a_scheme_for_drafted_tokens_does_the_least_damage_of_all_that_are_so_fast():
    measurement = measurement_of(NAMES, layers=LAYERS, seed=3)
    model, names = model_of(measurement), [group.name for group in measurement.groups]
    scheme = planning.plan(measurement, spec("fast", speed=SpeedSpec(decode=1.5, speculative_tokens=3)), speed=model)
    limit = verified([BF16] * 2 * LAYERS, DRAFTED) / 1.5
    choices = [(verified(formats, DRAFTED), score) for formats, score in every_choice(measurement, NAMES)]
    best = min(score for seconds, score in choices if seconds <= limit * (1 + 1e-9))
    assert scheme.predicted_score == pytest.approx(best, rel=1e-12)
    assert verified([scheme.formats[name] for name in names], DRAFTED) <= limit * (1 + 1e-6)
    usual = planning.plan(measurement, spec("fast", speed=SpeedSpec(decode=1.5)), speed=model)
    assert "nvfp4" in usual.formats.values()  # which multiplies slowly, and of many tokens isn't worth its damage
    assert "nvfp4" not in scheme.formats.values()
    of_recipe = planning.plan(
        measurement, spec("fast", speed=SpeedSpec(decode=1.5)), speed=model_of(measurement, DRAFTED)
    )
    assert of_recipe.formats == scheme.formats
    without = SpeedSpec(decode=1.5, speculative_tokens=0)
    again = planning.plan(measurement, spec("fast", speed=without), speed=model_of(measurement, DRAFTED))
    assert again.formats == usual.formats


def test_the_fewest_seconds_within_a_damage_are_those_of_drafted_tokens():
    measurement = measurement_of(NAMES, layers=LAYERS, seed=5)
    choices = [(verified(formats, DRAFTED), score) for formats, score in every_choice(measurement, NAMES)]
    most = sorted(score for _, score in choices)[len(choices) // 2]
    model, same = model_of(measurement, DRAFTED), same_kl(NAMES)
    for asked in ({"max_predicted_score": most}, {"max_kl": most}):
        scheme = planning.plan(measurement, spec("a", prefer="decode", **asked), speed=model, kl_map=same)
        own = verified(list(scheme.formats.values()), DRAFTED)
        assert own == pytest.approx(min(seconds for seconds, score in choices if score <= most), rel=1e-9)


def test_beyond_the_largest_cuda_graph_of_vllm_a_step_takes_the_host_its_time():
    """vLLM 0.25.1 (`config/vllm.py`): at most 512 tokens, or what it is told, here 64 without drafts."""
    measurement = measurement_of(NAMES, layers=LAYERS)
    model = model_of(measurement, host=0.02)
    assert verified(["fp8"] * 2 * LAYERS, Load(64, 256, 33, 7)) < 0.02
    fp8 = {group.name: "fp8" for group in measurement.groups}
    assert model.predict(fp8, Load(64, 256, 33, 7)).decode_ratio > 1.2  # 512 tokens
    beyond = model.predict(fp8, Load(64, 256, 33, 8))
    assert beyond.decode == pytest.approx(64 / 0.02, rel=1e-6)
    assert beyond.decode_ratio == 1


def test_what_the_fit_leaves_over_is_that_of_as_many_tokens():
    """As the invented engine takes more for 64 requests than a straight line gives, it does for 16 that drafted 3."""
    profile = profile_of()
    loads = [
        one.model_copy(update={"all_tokens": tuple(2 * seconds for seconds in one.all_tokens)})
        if one.requests == 8
        else one
        for one in profile.loads
    ]
    model = SpeedModel(
        profile.model_copy(update={"loads": tuple(loads)}), measurement_of(NAMES, layers=LAYERS).groups, ASKED
    )
    load = Load(64, 100, 33)
    of_a_token = (model.rest("decode", Load(64, 200, 33)) - model.rest("decode", load)) / 6400  # in each context
    drafted = model.rest("decode", Load(16, 100, 33, 3))
    assert drafted == pytest.approx(model.rest("decode", load) - of_a_token * 48 * load.context, rel=1e-9)


def with_graphs(measurement, *sizes):
    profile = profile_of(host=0.02)
    engine = profile.engine.model_copy(update={"graph_sizes": sizes})
    return SpeedModel(profile.model_copy(update={"engine": engine}), measurement.groups, ASKED)


def test_cuda_graphs_reach_as_many_requests_and_tokens_as_the_engine_was_told():
    measurement = measurement_of(NAMES, layers=LAYERS)
    fp8 = {group.name: "fp8" for group in measurement.groups}
    few = with_graphs(measurement, 8, 1)
    for load, in_graph in ((Load(8, 256, 33, 3), True), (Load(9, 256, 33, 3), False), (Load(9, 256, 33), False)):
        rate = few.predict(fp8, load).decode
        assert rate > load.requests / 0.01 if in_graph else rate == pytest.approx(load.requests / 0.02, rel=1e-6)
    many = with_graphs(measurement, 1, 8, 64, 1024)
    assert many.predict(fp8, Load(64, 256, 33, 8)).decode > 64 / 0.02  # 576 tokens
    # in whatever order a profile names them
    for load in (Load(5, 256, 33, 3), Load(8, 256, 33, 3)):
        assert few.predict(fp8, load) == with_graphs(measurement, 1, 8).predict(fp8, load)


def test_more_tokens_than_were_timed_are_not_guessed():
    measurement = measurement_of(NAMES, layers=LAYERS)
    told = "a step would verify 1088 tokens, and the profile of Invented GPU has times of at most 1024; ask for fewer"
    with pytest.raises(PlanError, match=rf"speed at 64 requests of 256 \+ 33 tokens, 16 of each drafted .*{told}"):
        planning.plan(
            measurement, spec("a", speed=SpeedSpec(decode=1.1, speculative_tokens=16)), speed=model_of(measurement)
        )
    model_of(measurement, dataclasses.replace(ASKED, speculative_tokens=15))
    small = profile_of()
    small = small.model_copy(update={"engine": small.engine.model_copy(update={"tokens_a_step": 512})})
    few = profile_of()
    layers = [*few.layers[1:], few.layers[0].model_copy(update={"cells": few.layers[0].cells[:-1]})]
    few = few.model_copy(update={"layers": tuple(layers)})
    for profile in (small, few):
        with pytest.raises(PlanError, match="of at most 512; ask for fewer speculative_tokens or requests"):
            SpeedModel(profile, measurement.groups, dataclasses.replace(ASKED, speculative_tokens=8))


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("speed", {"decode": 1.2, "speculative_tokens": -1}, "greater than or equal to 0"),
        ("speed", {"decode": 1.2, "speculative_tokens": 1000}, "less than or equal to 100"),
        ("speed", {"decode": 1.2, "speculative_tokens": 2.5}, "valid integer"),
        ("speed", {"decode": 1.2, "speculative_tokens": True}, "give a value, not true"),
        ("speed", {"decode": 1.2, "speculative_tokens": "3"}, "give a number, not the text '3'"),
        ("speed", {"speculative_tokens": 3}, "give either prefill or decode"),
        ("speed", {"prefill": 1.2, "speculative_tokens": 3}, "verified in steps of decoding, and prefill has none"),
        ("load", {"speculative_tokens": -1}, "greater than or equal to 0"),
        ("load", {"speculative_tokens": 1000}, "less than or equal to 100"),
        ("load", {"num_speculative_tokens": 3}, "num_speculative_tokens"),
    ],
)
def test_what_cannot_be_drafted_is_refused_in_one_line(tmp_path, place, value, told):
    own = {"speed": value} if place == "speed" else {"coverage": 0.5}
    content = {
        "model": {"path": "m"},
        "calibration": {"data": {"kind": "text", "path": "t"}},
        "profile": "p.json",
        "schemes": [{"name": "x", **own}],
        "output": str(tmp_path),
        **({"load": value} if place == "load" else {}),
    }
    with pytest.raises(RecipeError, match=told) as caught:
        parse_recipe(content, "recipe")
    assert "\n" not in str(caught.value)


def test_a_report_says_of_what_steps_its_speeds_are():
    measurement = measurement_of(NAMES, layers=LAYERS, seed=4)
    model = model_of(measurement, DRAFTED)
    asked = [
        spec("all_fp8", coverage=1.0, format="fp8"),
        spec("alone", speed=SpeedSpec(decode=1.25, requests=1, speculative_tokens=0)),
    ]
    schemes = planning.plan_all(measurement, asked, speed=model)
    found = report.build_report({}, measurement, schemes, {}, None, {}, [], speed=model)
    plain = verified([BF16] * 2 * LAYERS, DRAFTED)
    fp8 = verified(list(schemes[0].formats.values()), DRAFTED)
    assert found.speeds.speculative_tokens == 3
    assert found.speeds.original_decode == pytest.approx(64 / plain, rel=1e-6)
    ratios = {one.scheme: one.decode_ratio for one in found.speeds.schemes}
    assert ratios["all_fp8"] == pytest.approx(plain / fp8, rel=1e-6)
    own = Load(1, 256, 33)
    ratio = verified([BF16] * 2 * LAYERS, own) / verified(list(schemes[1].formats.values()), own)
    assert [(one.scheme, one.phase) for one in found.speeds.asked] == [("alone", "decode")]
    assert found.speeds.asked[0].ratio == pytest.approx(ratio, rel=1e-6)
    markdown, page = report.render_markdown(found), report.render_html(found)
    for told in (
        "On Invented GPU with 3 drafted tokens, as predicted, `all_fp8` is",
        f"{plain / fp8 - 1:.0%} faster than 16 bits at decoding",
        "a step verifies 3 drafted tokens of each request and one more",
        f"At the load that it was asked for, 1 request of 256 + 33 tokens, `alone` is {ratio - 1:.0%} faster than",
        "neither is predicted",
    ):
        assert told in markdown, told
    assert "3 drafted tokens of each request" in page
    for name, shown in (("original", "1.00"), ("all_fp8", f"{plain / fp8:.2f}")):
        assert row_of(markdown, name)[-2:] == ["–", shown]  # no tokens per second
    assert '"speedDevice": "Invented GPU with 3 drafted tokens"' in page
    curve = next(one for one in found.frontier.curves if one.along == "decode")
    for point in curve.points:
        formats = [found.frontier.letters[letter] for letter in point.formats]
        assert point.decode_ratio == pytest.approx(plain / verified(formats, DRAFTED), rel=1e-6)
    point = next(one for one in found.speeds.frontier if one.phase == "decode")
    assert point.ratio <= max(one.decode_ratio for one in curve.points) * (1 + 1e-6)


def test_a_recipe_for_drafted_tokens_is_planned_and_reported(tmp_path, llama, text_file):
    profile_like(llama, (BF16, "fp8")).write(tmp_path / "own.json")
    asked = {"decode": 1.02, "speculative_tokens": 3}
    work = work_of(tmp_path, llama, text_file, ["fp8"], {"speed": asked}, tmp_path / "own.json")
    with work.locked():
        measure(work)
        (scheme,) = plan(work)
        made = make_report(work)
    load = Load(speculative_tokens=3)
    predicted = work.speed_model(work.measurement().groups).predict(scheme.formats, load).decode_ratio
    assert predicted >= 1.02
    assert scheme.model_dump(mode="json")["asked"]["speed"] == asked
    assert made.speeds.speculative_tokens == 0  # the recipe's load drafts none
    assert made.speeds.asked[0].ratio == pytest.approx(predicted)


def test_the_benchmark_takes_no_steps_with_fewer_tokens(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import speed

    load, prefill = Load(4, 100, 9, 3), [200, 200]
    speed.check_steps(load, [*prefill, *prefill, *[16] * 6, 8, 4], tokens_a_step=200)  # requests end one by one
    with pytest.raises(SystemExit, match="5 of 6 steps verified 16 tokens"):
        speed.check_steps(load, [*prefill, *prefill, *[16] * 5, 13, 8, 4], tokens_a_step=200)
