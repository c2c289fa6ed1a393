"""Asking one measurement of several formats: candidates of a scheme, shares of a mix, floors, carriers, arms."""

import random
import re

import pytest

from bitladder import planning, report
from bitladder.errors import InfeasibleTarget, PlanError, RecipeError
from bitladder.formats import COMPRESSED_TENSORS, FORMATS, MODELOPT, get_format
from bitladder.planning import controls, ranges
from bitladder.planning.carrying import check_carrier, refuse_uncarried
from bitladder.planning.refinement import refine
from bitladder.recipe import CONTROL_KINDS, SchemeSpec, parse_recipe, parse_schemes
from bitladder.records import (
    BF16,
    CacheChoice,
    Candidate,
    Control,
    DataSummary,
    LeftOut,
    Measurement,
    ModelSource,
    QuantGroup,
    QuantModule,
    Scheme,
)
from bitladder.report.groups import edge_of
from bitladder.steps.kl_points import kl_point_schemes
from bitladder.steps.run import run
from bitladder.steps.workspace import Workspace
from conftest import same_kl, spec

MIXED = ("fp8", "fp8_block", "nvfp4", "int4_w4a16")
HARM = {"fp8": 1.0, "fp8_block": 0.8, "nvfp4": 30.0, "int4_w4a16": 25.0, "int8": 0.5, "nvfp4_w4a16": 20.0}
LAYERS = 12
CARRIED = {"carrier": COMPRESSED_TENSORS}
ODD = "model.layers.3.down"


def measurement_of(names=MIXED, layers=LAYERS, seed=0, batches=2, without=(), method="fisher", image=False):
    """Return a measurement with a wide and a narrow group a layer; `without`: (group, format) that can't be."""
    draw = random.Random(seed)
    groups, candidates = [], []
    for layer in range(layers):
        for kind, shape in (("qkv", (256, 256)), ("down", (256, 768))):
            name = f"model.layers.{layer}.{kind}"
            module = QuantModule(name=f"{name}_proj", tensor=f"{name}_proj.weight", shape=shape)
            groups.append(QuantGroup(name=name, modules=(module,), weight_elements=shape[0] * shape[1]))
            for form in names:
                scores = tuple(HARM[form] * draw.uniform(0.5, 1.5) * shape[1] * 1e-6 for _ in range(batches))
                if (name, form) not in without:
                    bits = get_format(form).bits(shape)
                    parts = tuple(0.25 * score for score in scores) if image else ()
                    candidates.append(
                        Candidate(group=name, format=form, weight_bits=bits, scores=scores, image_scores=parts)
                    )
    return Measurement(
        model=ModelSource(path="m", architecture="LlamaForCausalLM", model_type="llama", sha256="0" * 64),
        calibration=DataSummary(
            source="s", kind="text", sha256="0", samples=1, tokens=1, sequence_length=2, batch_size=1, seed=0
        ),
        engine="native",
        method=method,
        fused_scales_shared=True,
        compute_dtype="float32",
        score_unit="nats per token",
        score_weights=(1.0,) * batches,
        formats=names,
        groups=tuple(groups),
        candidates=tuple(candidates),
        left_out=tuple(LeftOut(group=g, format=f, reason="shape") for g, f in without),
        untouched=(),
        amax_sha256=None,
    )


@pytest.fixture(scope="module")
def mixed():
    return measurement_of()


def used(scheme):
    return set(scheme.formats.values()) - {BF16}


def test_no_less_may_be_excluded_than_the_smallest_formats_allow():
    """(9 - 4.5) / (16 - 4.5) is 39.1304%, rounded down."""
    measurement = measurement_of(("nvfp4", "fp8"))
    most = [group.name for group in measurement.groups[1:]]
    with pytest.raises(InfeasibleTarget, match=r"raise the target, or exclude at most 39\.13% of the weights$"):
        planning.plan(measurement, spec("x", effective_bits=9, exclude=most))


@pytest.mark.parametrize("without", [("fp8", "nvfp4"), ("nvfp4",)])
def test_as_much_as_a_message_names_can_be_excluded_whatever_it_is(without):
    measurement = measurement_of(("fp8", "nvfp4"), without=[(ODD, name) for name in without])
    size, rng, tried = {group.name: group.weight_elements for group in measurement.groups}, random.Random(1), 0
    for _ in range(40):
        asked, order = rng.uniform(5, 12), rng.sample(sorted(size), len(size))
        with pytest.raises(InfeasibleTarget) as caught:
            planning.plan(measurement, spec("x", effective_bits=asked, exclude=order[: len(order) - 2]))
        named = re.search(r"exclude at most ([0-9.]+)% of the weights$", str(caught.value))
        if named is None:
            assert re.search(r"raise the target, or add .* to measurement\.formats|no known format", str(caught.value))
            continue
        while 100 * sum(size[name] for name in order) > float(named[1]) * sum(size.values()):
            order.pop()
        assert planning.plan(measurement, spec("x", effective_bits=asked, exclude=order)).effective_bits <= asked
        tried += len(order) > 0
    assert tried > 10


# --- candidates of a scheme -------------------------------------------------------------------------------------

WAYS = [
    {"coverage": 0.5},
    {"effective_bits": 10.0},
    {"max_predicted_score": 2e-2},
    {"max_kl": 2e-2},
    {"effective_bits": 12.0, "exclude": ["*.0.*"]},
    {"effective_bits": 10.0, "image_weight": 0.5},
    {"effective_bits": 10.0, "chosen_by": "kl"},
    {"coverage": 0.5, "chosen_by": "kl"},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way))
@pytest.mark.parametrize("formats", [("fp8", "fp8_block"), ("fp8", "nvfp4"), ("int4_w4a16",)], ids="+".join)
def test_a_scheme_is_that_of_a_measurement_of_its_own_formats(way, formats):
    """What `formats` leaves out might as well not have been measured."""
    whole = measurement_of(image=True)
    kl_map = same_kl(whole.formats)
    narrow = whole.only(formats)
    assert narrow.formats == formats
    with_all = planning.plan(whole, spec("x", formats=formats, **way), kl_map=kl_map)
    alone = planning.plan(narrow, spec("x", **way), kl_map=kl_map)
    assert with_all.formats == alone.formats
    assert with_all.predicted_score == alone.predicted_score
    assert used(with_all) <= set(formats)
    assert with_all.measurement_sha256 == whole.fingerprint()


def test_one_measurement_gives_a_hopper_and_a_blackwell_ladder(mixed):
    hopper, blackwell = ("fp8", "fp8_block"), ("nvfp4", "fp8", BF16)
    entries = [
        *({"name": f"hopper{bits}", "effective_bits": bits, "formats": hopper} for bits in (9, 12)),
        *({"name": f"blackwell{bits}", "effective_bits": bits, "formats": blackwell} for bits in (5.4, 9, 12)),
    ]
    schemes = planning.plan_all(mixed, parse_schemes(entries))
    for scheme in schemes:
        assert used(scheme) <= set(hopper if scheme.name.startswith("hopper") else blackwell)
    assert used(schemes[2]) == {"fp8", "nvfp4"}
    by_name = {scheme.name: scheme for scheme in schemes}
    whole = planning.plan(mixed, spec("all", effective_bits=9))
    assert whole.predicted_score <= min(by_name["hopper9"].predicted_score, by_name["blackwell9"].predicted_score)


def test_the_order_of_the_names_and_bf16_say_nothing(mixed):
    plans = [
        planning.plan(mixed, spec("x", effective_bits=7, formats=names)).formats
        for names in (("nvfp4", "fp8"), ("fp8", "nvfp4"), ("bf16", "fp8", "nvfp4"))
    ]
    assert plans[0] == plans[1] == plans[2]
    assert spec("x", effective_bits=7, formats=("bf16", "fp8")).formats == ("fp8",)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"formats": []}, "names none to quantise to"),
        ({"formats": ["bf16"]}, "names none to quantise to"),
        ({"formats": ["fp8", "fp8"]}, "format fp8 is given twice"),
        ({"formats": ["fp8"], "format": "nvfp4"}, r"format nvfp4 is none of its formats \(fp8\)"),
        ({"formats": "fp8"}, "give a list"),
    ],
)
def test_formats_that_say_nothing_are_refused(entry, says):
    with pytest.raises(RecipeError, match=says):
        parse_schemes([{"name": "x", "coverage": 0.5, **entry}])


@pytest.mark.parametrize("way", [*WAYS, {"include": ["*"]}], ids=lambda way: "-".join(way))
@pytest.mark.parametrize("key", ["format", "formats"])
def test_a_format_that_is_not_measured_is_refused_with_those_that_are(mixed, way, key):
    measured = r"choose among those measured: fp8, fp8_block, nvfp4, int4_w4a16$"
    for name, remedy in (("mxfp8", "add it to measurement.formats, or "), ("fp7", "")):
        asked = spec("x", **way, **{key: name if key == "format" else ("fp8", name)})
        says = rf"scheme x asks for format {name}, which is not measured; {remedy}{measured}"
        with pytest.raises(PlanError, match=says):
            planning.plan(mixed, asked)
        with pytest.raises(PlanError, match=says):  # before hours of measuring
            planning.refuse_unattainable([asked], mixed.formats)


def test_a_scheme_without_formats_has_the_digest_that_it_had(mixed):
    """`formats` came later: a record that doesn't name it is what it was."""
    scheme = planning.plan(mixed, spec("x", effective_bits=9.0))
    assert scheme.model_dump(mode="json")["asked"] == {"name": "x", "effective_bits": 9.0}
    written = planning.plan(mixed, spec("y", effective_bits=9.0, formats=("fp8", "nvfp4"))).model_dump(mode="json")
    assert written["asked"] == {"name": "y", "effective_bits": 9.0, "formats": ["fp8", "nvfp4"]}
    again = Scheme.model_validate(written)
    assert again.asked.formats == ("fp8", "nvfp4")
    assert again.narrow(mixed).formats == ("fp8", "nvfp4")
    assert scheme.narrow(mixed) is mixed


def test_a_frontier_of_all_formats_does_not_answer_for_some(mixed):
    edge = planning.Solver(mixed)
    asked = spec("x", effective_bits=9.0, formats=("fp8", "nvfp4"))
    assert planning.plan(mixed, asked, frontier=edge).formats == planning.plan(mixed, asked).formats
    whole = spec("x", effective_bits=9.0)
    assert planning.plan(mixed, whole, frontier=edge).formats == planning.plan(mixed, whole).formats


def test_groups_that_none_of_the_formats_takes_stay_in_16_bits():
    without = [(f"model.layers.{layer}.qkv", "int4_w4a16") for layer in range(LAYERS)]
    measurement = measurement_of(("fp8", "int4_w4a16"), without=without)
    for way in ({"coverage": 1.0}, {"effective_bits": 9.0}, {"include": ["*"]}):
        scheme = planning.plan(measurement, spec("x", formats=("int4_w4a16",), **way))
        assert {scheme.formats[group] for group, _ in without} == {BF16}
        assert used(scheme) == {"int4_w4a16"}
    for way in ({"coverage": 1.0}, {"max_predicted_score": 1.0}, {"effective_bits": 9.0}):
        with pytest.raises(
            InfeasibleTarget, match="no group that exclude .* leaves can be in int4_w4a16; exclude less"
        ):
            planning.plan(measurement, spec("x", formats=("int4_w4a16",), exclude=["*.down"], **way))


# --- coverage ---------------------------------------------------------------------------------------------------

SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)


@pytest.mark.parametrize("formats", [None, ("fp8", "fp8_block"), ("nvfp4", "int4_w4a16"), ("nvfp4",)])
def test_shares_of_everything_quantised_are_nested(mixed, formats):
    specs = [spec(f"top{100 * share:g}", coverage=share, formats=formats) for share in SHARES]
    ladder = planning.plan_all(mixed, specs)
    for index, (scheme, share) in enumerate(zip(ladder, SHARES, strict=True)):
        assert scheme.coverage <= share
        assert set(scheme.nested_in) == {one.name for one in ladder[index + 1 :]}
    assert ladder[-1].coverage == 1.0
    if formats is None or len(formats) > 1:
        assert len(used(ladder[-1])) > 1  # a mix, though nested


def test_each_group_has_the_format_of_least_damage_per_bit_saved(mixed):
    scheme, table = planning.plan(mixed, spec("x", coverage=0.5)), mixed.by_group()
    size = {group.name: group.weight_elements for group in mixed.groups}

    def density(group, name):
        return mixed.sensitivity(table[group][name]) / (16 * size[group] - table[group][name].weight_bits)

    least = {group: min(density(group, name) for name in mixed.formats) for group in size}
    taken, left = scheme.quantised_groups(), set(size) - scheme.quantised_groups()
    assert all(density(group, scheme.formats[group]) == least[group] for group in taken)
    assert max(least[group] for group in taken) <= min(least[group] for group in left)


def test_a_share_of_one_format_is_that_format_alone(mixed):
    for name in mixed.formats:
        ladder = [planning.plan(mixed, spec("x", coverage=share, format=name)) for share in SHARES]
        assert all(used(scheme) == {name} for scheme in ladder)
        order = planning.density_order(mixed, name)
        for scheme in ladder:
            assert scheme.quantised_groups() == set(order[: len(scheme.quantised_groups())])
        assert ladder[2].formats == planning.plan(mixed, spec("x", coverage=0.5, formats=(name,))).formats


# --- floors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "bits", "smallest"),
    [
        (("nvfp4",), 4.5, {"nvfp4"}),
        (("fp8", "nvfp4"), 4.5, {"nvfp4"}),
        (("nvfp4", "nvfp4_w4a16"), 4.5, {"nvfp4", "nvfp4_w4a16"}),
        (("fp8", "nvfp4", "int4_w4a16"), 4.125, {"int4_w4a16"}),
        (("int4_w4a16", "int8"), 4.2, {"int4_w4a16"}),
    ],
)
def test_the_floor_is_said(names, bits, smallest):
    measurement = measurement_of(names)
    scheme = planning.plan(measurement, spec("x", effective_bits=bits))
    assert used(scheme) <= smallest
    assert BF16 not in scheme.formats.values()
    assert set(planning.at_the_floor(measurement, scheme)) == used(scheme)
    low = f"{ranges._hundredths(ranges.Fraction(str(scheme.effective_bits)))}"
    with pytest.raises(InfeasibleTarget, match=rf"below the minimum {low} .*bf16: attainable {low} to 16\.00"):
        planning.plan(measurement, spec("x", effective_bits=4.0))
    assert planning.plan(measurement, spec("x", effective_bits=float(low))).formats == scheme.formats


@pytest.mark.parametrize("bits", [4.8, 5.4, 6.0])
def test_above_the_floor_are_mixes(bits):
    measurement = measurement_of(("fp8", "nvfp4"))
    scheme = planning.plan(measurement, spec("x", effective_bits=bits))
    assert len(set(scheme.formats.values())) > 1
    assert scheme.effective_bits <= bits
    assert planning.at_the_floor(measurement, scheme) == ()


def test_a_scheme_s_own_formats_and_exclusions_have_a_floor_of_their_own(mixed):
    scheme = planning.plan(mixed, spec("x", effective_bits=8.0, formats=("fp8",)))
    assert planning.at_the_floor(mixed, scheme) == ("fp8",)
    scheme = planning.plan(mixed, spec("x", effective_bits=8.0))
    assert planning.at_the_floor(mixed, scheme) == ()
    half = planning.plan(mixed, spec("x", effective_bits=12.0, formats=("fp8",), exclude=["*.[0-5].*"]))
    assert half.effective_bits == 12.0
    assert planning.at_the_floor(mixed, half) == ("fp8",)
    assert planning.at_the_floor(mixed, planning.plan(mixed, spec("x", coverage=1.0, format="fp8"))) == ()


@pytest.mark.parametrize("names", [("fp8_block",), ("int4_w4a16",), ("int8_w8a16",), ("fp8", "mxfp8")], ids="+".join)
def test_the_minimum_that_is_named_before_measuring_can_be_asked_for(names):
    """4.125 and 8.00195 were named as 4.12 and 8.00, which are below the minimum themselves."""
    with pytest.raises(InfeasibleTarget) as caught:
        planning.refuse_unattainable([spec("x", effective_bits=2.0)], names)
    named = float(str(caught.value).split("minimum ")[1].split()[0])
    planning.refuse_unattainable([spec("x", effective_bits=named)], names)


def test_the_remedy_names_where_a_format_goes_and_the_carrier_that_it_needs():
    fp8 = measurement_of(("fp8",))
    by_hand = spec("x", effective_bits=4.5)
    says = (
        r"raise the target, or add nvfp4 or nvfp4_w4a16 to measurement\.formats, or add int4_w4a16 or int4_w4a16_g64 "
        r"or int4_w4a16_asym or int4_w4a16_asym_g64 "
        r"to measurement\.formats with export\.carrier: compressed-tensors \(Bitladder knows"
    )
    with pytest.raises(InfeasibleTarget, match=says):
        planning.plan(fp8, by_hand)
    with pytest.raises(InfeasibleTarget, match=says):
        planning.refuse_unattainable([by_hand], ("fp8",))
    with pytest.raises(
        InfeasibleTarget, match=r"add int4_w4a16 or int4_w4a16_asym to measurement\.formats with export\.carrier: compr"
    ):
        planning.plan(fp8, spec("x", effective_bits=4.2))
    narrowed = spec("x", effective_bits=4.5, formats=("fp8",))
    both = measurement_of(("fp8", "nvfp4"))
    for refuse in (
        lambda: planning.plan(both, narrowed),
        lambda: planning.refuse_unattainable([narrowed], both.formats),
    ):
        with pytest.raises(
            InfeasibleTarget, match=r"of these formats \(fp8, bf16: attainable 8\.00 .*add nvfp4 to the fo"
        ):
            refuse()
    with pytest.raises(
        InfeasibleTarget,
        match="int4_w4a16 or int4_w4a16_asym to measurement.formats and the scheme's with export.carrier",
    ):
        planning.plan(both, spec("x", effective_bits=4.2, formats=("fp8",)))


def test_the_report_says_the_floor(mixed):
    entries = [
        {"name": "blackwell", "effective_bits": 4.5, "formats": ["nvfp4", "fp8"]},
        {"name": "all", "effective_bits": 4.5},
        {"name": "half", "coverage": 0.5, "formats": ["fp8", "nvfp4"]},
    ]
    schemes = planning.plan_all(mixed, parse_schemes(entries))
    found = report.build_report({}, mixed, schemes, {}, None, {}, ())
    said = (
        "At the floor: {}: 4.50 effective bits is the floor of these formats (fp8, nvfp4): every group is in the "
        "smallest that it can have (nvfp4); a mix needs more."
    )
    markdown, page = report.render_markdown(found), report.render_html(found)
    assert said.format("`blackwell`") in markdown
    assert said.format("<code>blackwell</code>") in page
    assert markdown.count("At the floor") == 1
    assert "effective bits ≤ 4.5; formats `nvfp4`, `fp8`" in markdown
    assert [scheme.candidates for scheme in found.schemes if scheme.name == "all"] == [mixed.formats]


def test_a_scheme_of_one_of_several_formats_has_an_edge():
    """Its order is that of its own format; a mix has none."""
    without = [("model.layers.0.qkv", "nvfp4")]
    measurement = measurement_of(("fp8", "nvfp4"), without=without)
    for entry in ({"format": "nvfp4"}, {"formats": ["nvfp4"]}):
        (scheme,) = planning.plan_all(measurement, parse_schemes([{"name": "x", "coverage": 0.5, **entry}]))
        edge = edge_of(scheme, measurement)
        order = planning.density_order(measurement, "nvfp4")
        last = len(scheme.quantised_groups())
        assert (edge.taken, edge.left) == (order[last - 1], order[last])
    assert edge_of(planning.plan(measurement, spec("x", coverage=0.5)), measurement) is None


# --- carriers ---------------------------------------------------------------------------------------------------


def scheme_in(*names, kv_cache=None):
    measurement = measurement_of(tuple(names))
    formats = {group.name: names[i % len(names)] for i, group in enumerate(measurement.groups)}
    return planning.price(measurement, "x", formats, spec("x", coverage=1.0), cache=CacheChoice(kv_cache))


@pytest.mark.parametrize("cached", [None, "fp8"])
@pytest.mark.parametrize("carrier", [MODELOPT, COMPRESSED_TENSORS])
@pytest.mark.parametrize("names", [("fp8",), ("fp8", "nvfp4"), ("fp8", "int8"), ("int4_w4a16", "int8")], ids="+".join)
def test_the_carrier_that_a_refusal_names_holds_all_of_the_scheme(names, carrier, cached):
    scheme = scheme_in(*names, kv_cache=cached)
    held = all(carrier in FORMATS[name].layouts for name in names) and (cached is None or carrier == MODELOPT)
    if held:
        check_carrier(scheme, carrier)
        return
    with pytest.raises(PlanError) as caught:
        check_carrier(scheme, carrier)
    message = str(caught.value)
    remedy = message.partition("; ")[2]
    if "kv_cache: none" in remedy:
        scheme = scheme.model_copy(update={"kv_cache_format": None})
    check_carrier(scheme, remedy.partition("export.carrier: ")[2] or carrier)
    asked = SchemeSpec(name="x", coverage=1.0, kv_cache=cached)
    unavoidable = not any(carrier in FORMATS[name].layouts for name in names) or (cached and carrier != MODELOPT)
    if unavoidable:
        with pytest.raises(PlanError) as before:
            refuse_uncarried([asked], names, carrier)
        assert str(before.value).partition("; ")[2]
    else:
        refuse_uncarried([asked], names, carrier)  # a plan may do without what the carrier lacks


def test_no_carrier_has_integers_and_a_cache():
    with pytest.raises(
        PlanError, match=r"int8 is no format of modelopt checkpoints, and no carrier has both int8 and an "
    ):
        check_carrier(scheme_in("fp8", "int8", kv_cache="fp8"), MODELOPT)


# --- control arms of mixes, and what mixes have none of ---------------------------------------------------------


@pytest.mark.parametrize("bits", [5.0, 6.5, 9.0])
@pytest.mark.parametrize("names", [("fp8", "nvfp4"), ("fp8", "nvfp4", "int4_w4a16")], ids="+".join)
def test_arms_of_a_mix_have_its_bits_and_its_formats(names, bits):
    measurement = measurement_of(names)
    size = {group.name: group.weight_elements for group in measurement.groups}
    scheme = planning.plan(measurement, spec("x", effective_bits=bits))
    arms = controls.arms(measurement, scheme, kinds=CONTROL_KINDS, seeds=3)
    kinds = [arm.asked.control for arm in arms]
    assert {"random", "inverse", "first_last"} <= set(kinds)
    assert kinds.count("random") == 3
    for arm in arms:
        assert arm.asked == Control(control=arm.asked.control, beside="x", seed=arm.asked.seed)
        assert used(arm) <= used(scheme)
        assert arm.predicted_score >= scheme.predicted_score
        assert 0 <= arm.weight_bits - scheme.weight_bits < 12 * max(size.values())
        for name in used(scheme):  # the same mix in other groups
            shares = [sum(size[g] for g, f in one.formats.items() if f == name) for one in (scheme, arm)]
            assert abs(shares[0] - shares[1]) <= 2 * max(size.values())
    assert len({tuple(arm.formats.items()) for arm in (scheme, *arms)}) == len(arms) + 1
    again = controls.arms(measurement, scheme, kinds=CONTROL_KINDS, seeds=3)
    assert again == arms


def test_an_arm_of_a_mix_is_drawn_from_what_its_groups_can_have():
    without = [(f"model.layers.{layer}.qkv", "nvfp4") for layer in range(0, LAYERS, 2)]
    measurement = measurement_of(("fp8", "nvfp4", "int4_w4a16"), without=without)
    scheme = planning.plan(measurement, spec("x", effective_bits=6.0, formats=("fp8", "nvfp4")))
    arms = controls.arms(measurement, scheme, kinds=CONTROL_KINDS, seeds=4)
    assert len([arm for arm in arms if arm.asked.control == "random"]) == 4
    for arm in arms:
        assert "int4_w4a16" not in used(arm)
        assert all(arm.formats[group] != "nvfp4" for group, _ in without)
    assert any(arm.formats[group] == "fp8" for arm in arms for group, _ in without)


def test_the_inverse_of_a_mix_is_predicted_to_be_the_worst():
    measurement = measurement_of(("fp8", "nvfp4"))
    scheme = planning.plan(measurement, spec("x", effective_bits=6.5))
    scores = {a.name: a.predicted_score for a in controls.arms(measurement, scheme, kinds=CONTROL_KINDS, seeds=3)}
    assert max(scores, key=scores.get) == "x.inverse"


def test_a_full_mix_has_arms_and_a_full_scheme_of_one_format_has_none():
    measurement = measurement_of(("fp8", "nvfp4"))
    mix = planning.plan(measurement, spec("x", effective_bits=6.0))
    assert BF16 not in mix.formats.values()
    assert controls.arms(measurement, mix, kinds=("random",), seeds=2)
    full = planning.plan(measurement, spec("x", effective_bits=4.5))
    assert controls.arms(measurement, full, kinds=CONTROL_KINDS, seeds=2) == ()


def test_modelopts_choice_of_a_mix_counts_every_batch_alike_and_keeps_the_bits():
    measurement = measurement_of(("fp8", "nvfp4", "int4_w4a16")).model_copy(update={"score_weights": (1.0, 0.01)})
    scheme = planning.plan(measurement, spec("x", effective_bits=6.0, formats=("fp8", "nvfp4")))
    (arm,) = controls.arms(measurement, scheme, kinds=("modelopt",), seeds=1)
    assert used(arm) == {"fp8", "nvfp4"}
    plain = measurement.model_copy(update={"score_weights": (1.0, 1.0)})
    best = planning.plan(plain, spec("y", effective_bits=6.0, formats=("fp8", "nvfp4")))
    assert arm.formats != scheme.formats
    assert arm.weight_bits <= scheme.weight_bits
    if best.weight_bits <= scheme.weight_bits:
        assert arm.formats == best.formats


def test_modelopts_kl_threshold_over_several_formats():
    """As its searcher: the first format, smallest first, whose score is at most a threshold common to all groups."""
    measurement = measurement_of(("fp8", "nvfp4"), method="kl_div")
    least = 1e-6  # a group that its smaller format happens to suit better
    candidates = [
        one.model_copy(update={"scores": (least, least)}) if (one.group, one.format) == (ODD, "nvfp4") else one
        for one in measurement.candidates
    ]
    measurement = measurement.model_copy(update={"candidates": tuple(candidates)})
    scheme = planning.plan(measurement, spec("x", effective_bits=7.0))
    (arm,) = controls.arms(measurement, scheme, kinds=("modelopt",), seeds=1)
    table = measurement.by_group()

    def at(threshold):
        chosen = {}
        for group, row in table.items():
            able = [name for name in ("nvfp4", "fp8") if measurement.sensitivity(row[name]) <= threshold]
            chosen[group] = able[0] if able else BF16
        return chosen

    low, high = 0.0, max(measurement.sensitivity(one) for one in measurement.candidates)
    for _ in range(100):  # its bisection
        middle = (low + high) / 2
        priced = (
            planning.price(measurement, "y", {**at(middle)}, spec("y", coverage=1))
            if any(name != BF16 for name in at(middle).values())
            else None
        )
        if priced is not None and priced.weight_bits <= scheme.weight_bits:
            high = middle
        else:
            low = middle
    assert arm.formats == at(high)
    assert arm.formats[ODD] == "nvfp4"
    assert arm.weight_bits <= scheme.weight_bits


def test_a_mix_cannot_be_refined_and_says_what_to_do():
    measurement = measurement_of(("fp8", "nvfp4"))
    scheme = planning.plan(measurement, spec("x", effective_bits=6.0))
    with pytest.raises(PlanError, match=r"mixes 2 formats \(fp8, nvfp4\).*refine\.evaluations: 0, or give.*`formats`"):
        refine(measurement, scheme, lambda _: 0.0, evaluations=20, marginal=2)
    one = planning.plan(measurement, spec("x", effective_bits=9.0, formats=("nvfp4",)))
    assert used(refine(measurement, one, lambda s: s.predicted_score, evaluations=20, marginal=2).scheme) == {"nvfp4"}


def test_the_map_to_kl_is_fitted_on_every_format(mixed):
    points = kl_point_schemes(mixed)
    for name in mixed.formats:
        assert [point for point in points if used(point) == {name}]
    assert [point for point in points if len(used(point)) > 1]
    assert len(points) <= 5 + 2 * 3 + 3 + 2 * 3
    scores = [point.predicted_score for point in points]
    assert max(scores) >= planning.plan(mixed, spec("x", coverage=1, format="nvfp4")).predicted_score
    one = measurement_of(("fp8",))
    assert [point.name for point in kl_point_schemes(one)] == [
        *("top10", "top25", "top50", "top75", "top100"),
        *("top50.random0", "top50.random1", "top50.inverse"),
    ]


# --- before anything is read or measured ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "settings", "says"),
    [
        (
            {"coverage": 0.5, "format": "nvfp4"},
            {},
            "format nvfp4, which is not measured; add it to measurement.formats",
        ),
        ({"effective_bits": 8.0, "formats": ["fp7"]}, {}, "format fp7, which is not measured; choose among"),
        (
            {"coverage": 0.5},
            {"measurement": {"formats": ["int8"]}},
            "int8 is no format of modelopt checkpoints; set exp",
        ),
        (
            {"coverage": 0.5},
            {"kv_cache": "fp8", "export": CARRIED},
            "compressed-tensors has no FP8 KV cache; set export",
        ),
        (
            {"effective_bits": 4.5},
            {"export": CARRIED},
            r"below the minimum 8\.00 .*attainable 8\.00 to 16\.00\); raise",
        ),
    ],
)
def test_a_run_refuses_what_no_measurement_would_change(tmp_path, entry, settings, says):
    """The model isn't even looked for."""
    content = {
        "model": {"path": str(tmp_path / "nowhere")},
        "calibration": {"data": {"kind": "text", "path": str(tmp_path / "nowhere.txt")}},
        "schemes": [{"name": "x", **entry}],
        "output": str(tmp_path / "out"),
        **settings,
    }
    with pytest.raises((PlanError, InfeasibleTarget), match=says):
        run(Workspace(parse_recipe(content, "recipe"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()
