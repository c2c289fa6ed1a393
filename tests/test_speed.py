"""Predicted speed: a profile of an invented device is given back, and schemes asked for by speed are the exact best."""

import itertools
import math
import random
from dataclasses import replace

import pytest

from bitladder import planning
from bitladder.errors import InfeasibleTarget, PlanError, RecordError
from bitladder.models.target import find_target
from bitladder.planning import shipped
from bitladder.planning.pricing import predicted_score
from bitladder.planning.speed import Load, SpeedModel, groups_of
from bitladder.recipe import SpeedSpec, parse_recipe
from bitladder.records import (
    BF16,
    EngineSettings,
    Profile,
    SearchedShape,
    TimedCell,
    TimedLayer,
    TimedLoad,
)
from bitladder.steps.look import look
from bitladder.steps.measure import measure
from bitladder.steps.plan import plan
from bitladder.steps.report import make_report
from bitladder.steps.run import run
from bitladder.steps.workspace import Workspace
from conftest import same_kl, spec
from test_asking import measurement_of

SHAPES = ((256, 256), (256, 768))
LAYERS = 4
STEP = 1024  # tokens of a step of prefill
GRAPHS = (1, 8, 64)
TOKENS = (1, 8, 64, 512, 1024)
# (seconds an element of weight to read, seconds an element and token to multiply): NVFP4 reads fast, multiplies slowly
DEVICE = {BF16: (1.6e-9, 8e-12), "fp8": (1e-9, 4e-12), "fp8_block": (1.1e-9, 4.4e-12), "nvfp4": (4e-10, 1.2e-11)}
ASKED = Load(64, 256, 33)


def layer_seconds(name, shape, tokens):
    """Return what the invented device takes: reading and multiplying one after the other, a straight line in tokens."""
    read, multiply = DEVICE[name]
    return shape[0] * shape[1] * (read + multiply * tokens)


def rest_of_prefill(requests, prompt):
    tokens = requests * prompt
    return 2e-3 + 1e-6 * tokens + 2e-10 * tokens * prompt + 3e-5 * requests


def rest_of_decode(requests, context):
    return 4e-4 + 2e-6 * requests + 3e-9 * requests * context


def padded(requests):
    return next(size for size in GRAPHS if size >= requests)


def served(formats, load):
    """Return the seconds of all prefill, and of a step of decoding, of formats in the order of the groups."""
    shapes = [SHAPES[place % 2] for place in range(2 * LAYERS)]
    whole, left = divmod(load.requests * load.prompt_tokens, STEP)
    pairs = list(zip(formats, shapes, strict=True))
    prefill = rest_of_prefill(load.requests, load.prompt_tokens)
    prefill += sum(whole * layer_seconds(f, s, STEP) + (layer_seconds(f, s, left) if left else 0) for f, s in pairs)
    decode = rest_of_decode(load.requests, load.prompt_tokens + (load.output_tokens + 1) / 2)
    return prefill, decode + sum(layer_seconds(f, s, padded(load.requests)) for f, s in pairs)


def timed_load(requests, prompt, output, host=0.0, graphs="FULL_DECODE_ONLY"):
    """Return a load's seconds; answers of the first requests take room in steps of prefill, and may need one more."""
    prefill, decode = served([BF16] * 2 * LAYERS, Load(requests, prompt, output))
    smallest, _ = served([BF16] * 2 * LAYERS, Load(1, 16, 2))
    in_graph = "PIECEWISE" in graphs and requests * prompt <= GRAPHS[-1]
    one, steps = prefill if in_graph else max(prefill, host), math.ceil(requests * prompt / STEP)
    more = math.ceil((requests * prompt + requests * (steps - 1) / 2) / STEP) - steps
    return TimedLoad(
        requests=requests,
        prompt_tokens=prompt,
        output_tokens=output,
        one_token=(one,) * 3,
        all_tokens=(one + decode * (output - 1 - more) + max(smallest, host) * more,) * 3,
    )


def profile_of(formats=tuple(DEVICE), host=1e-4, graphs="FULL_DECODE_ONLY", **others):
    layers = [
        TimedLayer(
            format=name,
            out_features=shape[0],
            in_features=shape[1],
            method="Method",
            kernel=None,
            chain=2,
            cells=tuple(TimedCell(tokens=t, seconds=layer_seconds(name, shape, t), low=0.0, high=1.0) for t in TOKENS),
        )
        for name in formats
        for shape in SHAPES
    ]
    loads = [(1, 16, 33), (1, 1000, 33), (8, 120, 33), (8, 1000, 33), (64, 100, 33), (64, 1000, 129), (3, 500, 9)]
    return Profile(
        model="Invented",
        searched=tuple(SearchedShape(out_features=s[0], in_features=s[1], groups=LAYERS) for s in SHAPES),
        device="Invented GPU",
        capability=(9, 0),
        driver="1",
        runtime="vllm",
        version="0.0",
        versions={},
        engine=EngineSettings(
            compiled=False, graphs=graphs, graph_sizes=GRAPHS, tokens_a_step=STEP, requests_at_once=64
        ),
        layers=tuple(layers),
        refused=others.pop("refused", {}),
        loads=tuple(timed_load(*load, host=host, graphs=graphs) for load in loads),
        **others,
    )


def measured(names=("fp8", "fp8_block", "nvfp4"), seed=0):
    return measurement_of(names, layers=LAYERS, seed=seed)


def model_of(measurement, load=ASKED, **profile):
    return SpeedModel(profile_of(**profile), measurement.groups, load)


@pytest.mark.parametrize("load", [Load(64, 512, 128), Load(1, 700, 50), Load(30, 900, 17), Load(64, 100, 9)])
def test_loads_and_mixes_that_were_never_timed_take_what_the_device_takes(load):
    measurement = measured()
    model, rng = model_of(measurement), random.Random(1)
    formats = [rng.choice(list(DEVICE)) for _ in measurement.groups]
    speed = model.predict(dict(zip((g.name for g in measurement.groups), formats, strict=True)), load)
    prefill, decode = served(formats, load)
    plain_prefill, plain_decode = served([BF16] * len(formats), load)
    assert speed.prefill == pytest.approx(load.requests * load.prompt_tokens / prefill, rel=1e-6)
    assert speed.decode == pytest.approx(load.requests / decode, rel=1e-6)
    assert speed.prefill_ratio == pytest.approx(plain_prefill / prefill, rel=1e-6)
    assert speed.decode_ratio == pytest.approx(plain_decode / decode, rel=1e-6)


def test_tokens_between_two_timed_numbers_lie_on_the_line_and_beyond_them_on_the_last():
    measurement = measured()
    model = model_of(measurement)
    group = measurement.groups[1]
    cost = model.cost_of("prefill", Load(1, 300, 2))(group, "fp8")
    assert cost == pytest.approx(layer_seconds("fp8", SHAPES[1], 300) * 1e12, abs=1)
    whole = model.cost_of("prefill", Load(3, 1024, 2))(group, "fp8")
    assert whole == pytest.approx(3 * layer_seconds("fp8", SHAPES[1], 1024) * 1e12, abs=2)


def test_few_tokens_take_the_seconds_of_the_host():
    measurement = measured()
    model = model_of(measurement, host=0.006)
    plain = dict.fromkeys((group.name for group in measurement.groups), BF16)
    assert model.seconds(plain, "prefill", Load(1, 64, 9)) == pytest.approx(0.006)
    # where many are prefilled the device's count, though the small loads said nothing of it
    assert model.seconds(plain, "prefill", Load(64, 1024, 64)) == pytest.approx(
        served([BF16] * 2 * LAYERS, Load(64, 1024, 64))[0], rel=1e-3
    )


def test_prefill_in_a_cuda_graph_says_nothing_of_the_host_and_is_not_held_by_it():
    measurement = measured()
    model = model_of(measurement, host=0.03, graphs="FULL_AND_PIECEWISE")
    plain = dict.fromkeys((group.name for group in measurement.groups), BF16)
    assert model.seconds(plain, "prefill", Load(1, 64, 9)) < 0.02
    assert model.seconds(plain, "prefill", Load(1, 65, 9)) == pytest.approx(0.03)


def test_a_profile_of_another_model_is_refused():
    with pytest.raises(
        PlanError, match=r"the profile is of Invented, whose layers are 4 of 256 x 256.*; these are 2 of"
    ):
        SpeedModel(profile_of(), measurement_of(layers=2).groups)


def every_choice(measurement, names):
    """Yield (formats by group, score) of every assignment."""
    table = measurement.by_group()
    rows = [
        [(BF16, 0.0), *((name, measurement.sensitivity(table[group.name][name])) for name in names)]
        for group in measurement.groups
    ]
    for chosen in itertools.product(*rows):
        yield [name for name, _ in chosen], math.fsum(score for _, score in chosen)


@pytest.mark.parametrize(("phase", "ratio"), [("decode", 1.1), ("decode", 1.25), ("prefill", 1.2), ("prefill", 1.35)])
@pytest.mark.parametrize("names", [("fp8", "nvfp4"), ("fp8", "fp8_block", "nvfp4")])
def test_a_scheme_asked_for_by_speed_does_the_least_damage_of_all_that_are_so_fast(phase, ratio, names):
    measurement = measurement_of(names, layers=LAYERS, seed=3)
    asked = spec("fast", speed=SpeedSpec(**{phase: ratio}))
    scheme = planning.plan(measurement, asked, speed=model_of(measurement))
    place = 0 if phase == "prefill" else 1
    limit = served([BF16] * 2 * LAYERS, ASKED)[place] / ratio
    best = min(
        score
        for formats, score in every_choice(measurement, names)
        if served(formats, ASKED)[place] <= limit * (1 + 1e-9)
    )
    assert scheme.predicted_score == pytest.approx(best, rel=1e-12)
    assert served(list(scheme.formats.values()), ASKED)[place] <= limit * (1 + 1e-6)
    assert scheme.asked == asked


def test_a_format_that_is_slow_in_a_phase_is_not_taken_for_it():
    measurement = measurement_of(("nvfp4", "fp8"), layers=LAYERS)
    model = model_of(measurement)
    for phase, ratio in (("prefill", 1.3), ("decode", 1.3)):
        scheme = planning.plan(measurement, spec("fast", speed=SpeedSpec(**{phase: ratio})), speed=model)
        assert ("nvfp4" in scheme.formats.values()) <= (phase == "decode")


@pytest.mark.parametrize("prefer", ["prefill", "decode"])
def test_within_a_damage_the_fewest_seconds_are_preferred(prefer):
    names = ("fp8", "nvfp4")
    measurement = measurement_of(names, layers=LAYERS, seed=5)
    scores = sorted(score for _, score in every_choice(measurement, names))
    most, place = scores[len(scores) // 2], ("prefill", "decode").index(prefer)
    model = model_of(measurement)
    scheme = planning.plan(measurement, spec("least", max_predicted_score=most, prefer=prefer), speed=model)
    best = min(served(formats, ASKED)[place] for formats, score in every_choice(measurement, names) if score <= most)
    assert scheme.predicted_score <= most
    assert served(list(scheme.formats.values()), ASKED)[place] == pytest.approx(best, rel=1e-9)
    # the same through a map from scores to KL that says KL = score
    same = same_kl(names)
    by_kl = planning.plan(measurement, spec("least", max_kl=most, prefer=prefer), speed=model, kl_map=same)
    assert by_kl.formats == scheme.formats


def test_within_a_time_the_least_kl_is_chosen():
    names = ("fp8", "nvfp4")
    measurement = measurement_of(names, layers=LAYERS, seed=5)
    model, kl_map = model_of(measurement), replace(same_kl(names), weights={"fp8": 7.0, "nvfp4": 0.14})
    asked = {"speed": {"decode": 1.1}}
    by_score = planning.plan(measurement, spec("fast", **asked), speed=model)
    by_kl = planning.plan(measurement, spec("fast", chosen_by="kl", **asked), speed=model, kl_map=kl_map)
    assert by_kl.formats != by_score.formats
    assert model.predict(by_kl.formats, ASKED).decode >= 1.1 * (1 - 1e-9)
    weighed = kl_map.weigh(measurement)
    assert predicted_score(weighed, by_kl.formats) < predicted_score(weighed, by_score.formats)


@pytest.mark.parametrize("asked", [{"max_predicted_score": 1.0}, {"max_kl": 1.0}])
def test_seconds_that_no_format_saves_are_refused(asked):
    measurement = measured()
    profile = profile_of()
    plain = {(one.out_features, one.in_features): one.cells for one in profile.layers if one.format == BF16}
    layers = tuple(one.model_copy(update={"cells": plain[one.out_features, one.in_features]}) for one in profile.layers)
    model = SpeedModel(profile.model_copy(update={"layers": layers}), measurement.groups, ASKED)
    with pytest.raises(InfeasibleTarget, match=r"a: prefer: decode .* is faster there than 16 bits; leave prefer out"):
        planning.plan(
            measurement, spec("a", prefer="decode", **asked), speed=model, kl_map=same_kl(measurement.formats)
        )


def test_a_load_of_its_own_counts_for_a_scheme():
    measurement = measured()
    usual = planning.plan(measurement, spec("a", speed=SpeedSpec(decode=1.2)), speed=model_of(measurement))
    one = planning.plan(measurement, spec("a", speed=SpeedSpec(decode=1.2, requests=1)), speed=model_of(measurement))
    alone = planning.plan(
        measurement, spec("a", speed=SpeedSpec(decode=1.2)), speed=model_of(measurement, Load(1, 256, 33))
    )
    assert one.formats == alone.formats != usual.formats


def test_what_cannot_be_reached_says_what_can():
    measurement = measurement_of(("fp8",), layers=LAYERS)
    model = model_of(measurement)
    fastest = served(["fp8"] * 2 * LAYERS, ASKED)[1]
    most = served([BF16] * 2 * LAYERS, ASKED)[1] / fastest
    with pytest.raises(InfeasibleTarget, match=rf"attainable up to {most:.3f} \(fp8\); ask for at most") as caught:
        planning.plan(measurement, spec("dash", speed=SpeedSpec(decode=5)), speed=model)
    attainable = float(str(caught.value).rpartition(" ")[2])
    assert planning.plan(measurement, spec("dash", speed=SpeedSpec(decode=attainable)), speed=model)
    with pytest.raises(InfeasibleTarget, match="would quantise nothing"):
        planning.plan(measurement, spec("lame", speed=SpeedSpec(decode=1.0)), speed=model)


@pytest.mark.parametrize(("gain", "told"), [(5e-4, "ask for fewer bits instead"), (1.5e-3, "ask for at most 1.001")])
def test_what_is_named_quantises_something(gain, told, monkeypatch):
    whole, shapes = served([BF16] * 2 * LAYERS, ASKED)[1], LAYERS * SHAPES
    of_layers = sum(layer_seconds(BF16, shape, padded(ASKED.requests)) for shape in shapes)
    less = whole * gain / (1 + gain) / of_layers
    monkeypatch.setitem(DEVICE, "fp8", tuple(seconds * (1 - less) for seconds in DEVICE[BF16]))
    measurement = measurement_of(("fp8",), layers=LAYERS)
    model = model_of(measurement)
    with pytest.raises(InfeasibleTarget, match=f"attainable up to {1 + gain:.3f} .*; {told}$"):
        planning.plan(measurement, spec("dash", speed=SpeedSpec(decode=5)), speed=model)
    named = told.rpartition(" ")[2]
    way = {"effective_bits": 10} if named == "instead" else {"speed": SpeedSpec(decode=float(named))}
    assert planning.plan(measurement, spec("dash", **way), speed=model).quantised_groups()


def test_the_host_limits_what_prefill_reaches():
    measurement = measurement_of(("fp8",), layers=LAYERS)
    load = Load(1, 300, 9)  # in which the host is busy for longer than the device would be in FP8
    model = model_of(measurement, load, host=0.006)
    with pytest.raises(InfeasibleTarget, match=r"attainable up to 1\.0"):
        planning.plan(measurement, spec("fast", speed=SpeedSpec(prefill=1.3)), speed=model)


def test_a_load_that_was_not_timed_is_not_guessed():
    measurement = measured()
    told = "times of at most 64 requests, and of 1129 tokens each; ask for no more"
    for load in (Load(65, 100, 9), Load(1, 1000, 130)):
        with pytest.raises(PlanError, match=told):
            model_of(measurement, load)
    asked = spec("a", speed=SpeedSpec(decode=1.1, requests=128))
    with pytest.raises(PlanError, match=f"speed at 128 requests of 256 .* {told}"):
        planning.plan(measurement, asked, speed=model_of(measurement))


def test_a_format_without_times_is_not_guessed():
    measurement = measured()
    model = model_of(measurement, formats=(BF16, "fp8", "fp8_block"), refused={"nvfp4": "ValueError: no kernel"})
    asked = {"speed": SpeedSpec(decode=1.1)}
    with pytest.raises(PlanError, match=r"no times of nvfp4 \(ValueError: no kernel\).*formats: \[fp8, fp8_block\]"):
        planning.plan(measurement, spec("a", **asked), speed=model)
    assert planning.plan(measurement, spec("a", **asked, formats=("fp8", "fp8_block")), speed=model)
    mix = dict.fromkeys((group.name for group in measurement.groups), "nvfp4")
    with pytest.raises(PlanError, match="Invented GPU has no times of nvfp4"):
        model.predict(mix, ASKED)


def test_without_a_profile_no_speed_is_promised():
    with pytest.raises(PlanError, match="speed needs a profile of the device that serves"):
        planning.plan(measured(), spec("a", speed=SpeedSpec(decode=1.1)))


def test_other_schemes_are_planned_as_they_were():
    measurement = measured()
    specs = [spec("bits", effective_bits=7.0), spec("half", coverage=0.5), spec("fast", speed=SpeedSpec(decode=1.2))]
    with_it = planning.plan_all(measurement, specs, speed=model_of(measurement))
    assert with_it[:2] == planning.plan_all(measurement, specs[:2])


def test_what_text_alone_changes_is_asked_at_the_same_speed():
    measurement = measurement_of(("fp8", "nvfp4"), layers=LAYERS, image=True)
    model = model_of(measurement)
    schemes = [planning.plan(measurement, spec("fast", speed=SpeedSpec(decode=1.2)), speed=model)]
    same = same_kl(measurement.formats)
    schemes.append(planning.plan(measurement, spec("near", max_kl=2e-3, prefer="decode"), speed=model, kl_map=same))
    # image positions carry a quarter of every score: which groups are chosen doesn't hang on them
    assert [one.text_only_changes for one in planning.remarked(measurement, schemes, model)] == [0, 0]


def test_groups_like_a_profiles_have_its_layers():
    profile = profile_of()
    model = SpeedModel(profile, groups_of(profile))
    assert set(model.uniform("fp8").values()) == {"fp8"}
    assert model.predict(model.uniform("fp8"), ASKED).decode_ratio > 1


def test_a_profile_is_named_or_a_file(tmp_path):
    profile_of().write(tmp_path / "profile.json")
    assert shipped.profile_named(str(tmp_path / "profile.json")) == profile_of()
    with pytest.raises(RecordError, match="no profile h99 comes with Bitladder"):
        shipped.profile_named("h99")
    for name in shipped.names():
        assert SpeedModel(shipped.profile_named(name), groups_of(shipped.profile_named(name)))


def profile_like(directory, formats):
    """Return a profile of the invented device for a model's own shapes."""
    shapes = [group.fused_shape for group in find_target(directory).groups]
    each, own = list(dict.fromkeys(shapes)), profile_of(formats=formats)
    return own.model_copy(
        update={
            "searched": tuple(SearchedShape(out_features=s[0], in_features=s[1], groups=shapes.count(s)) for s in each),
            "layers": tuple(
                one.model_copy(update={"out_features": s[0], "in_features": s[1]})
                for one in own.layers
                if (one.out_features, one.in_features) == SHAPES[0]
                for s in each
            ),
        }
    )


def work_of(tmp_path, model, text, formats, scheme, profile):
    content = {
        "model": {"path": str(model)},
        "calibration": {"data": {"kind": "text", "path": str(text)}, "samples": 4, "sequence_length": 16},
        "measurement": {"formats": formats},
        "profile": str(profile),
        "schemes": [{"name": "x", **scheme}],
        "output": str(tmp_path / "out"),
    }
    return Workspace(parse_recipe(content, "recipe"), tmp_path / "out")


@pytest.mark.parametrize(
    ("profile", "formats", "scheme", "told"),
    [
        ("own", ["fp8"], {"speed": {"decode": 9.0}}, "9 times 16 bits at decode is more than these formats reach"),
        ("own", ["fp8", "nvfp4"], {"speed": {"decode": 1.1}}, r"no times of nvfp4 \(wasn't profiled\)"),
        ("other", ["fp8"], {"coverage": 0.5}, "the profile is of Invented, whose layers are"),
        ("none", ["fp8"], {"coverage": 0.5}, "none.json does not exist"),
    ],
)
def test_a_run_refuses_what_cannot_be_had_before_it_measures(
    tmp_path, llama, text_file, profile, formats, scheme, told
):
    profile_like(llama, (BF16, "fp8")).write(tmp_path / "own.json")
    profile_of().write(tmp_path / "other.json")
    work = work_of(tmp_path, llama, text_file, formats, scheme, tmp_path / f"{profile}.json")
    with pytest.raises((PlanError, InfeasibleTarget, RecordError), match=told):
        run(work)
    assert work.done == []


def test_a_recipe_that_asks_for_speed_is_planned_and_reported(tmp_path, llama, text_file):
    profile_like(llama, (BF16, "fp8")).write(tmp_path / "own.json")
    work = work_of(tmp_path, llama, text_file, ["fp8"], {"speed": {"decode": 1.02}}, tmp_path / "own.json")
    with work.locked():
        look(work)
        measure(work)
        (scheme,) = plan(work)
        made = make_report(work)
    predicted = work.speed_model(work.measurement().groups).predict(scheme.formats, Load())
    assert predicted.decode_ratio >= 1.02
    assert BF16 in scheme.formats.values()  # no more than that
    assert made.speeds.schemes[0].decode_ratio == pytest.approx(predicted.decode_ratio)
    assert made.settings["profile"] == str(tmp_path / "own.json")
