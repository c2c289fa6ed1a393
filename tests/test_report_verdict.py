"""The sentence at the top: which scheme to take for which aim, and when none can be advised."""

import pytest

from bitladder.records import ControlArm, Paired, Throughput
from bitladder.report import build_report, render_markdown
from bitladder.report.damage import NEARLY_LOSSLESS_KL, bound_in_words, damage_of
from test_report import make_evaluation, make_manifest, make_measurement, make_report, make_scheme, make_verification
from test_report_evidence import make_evidence
from test_report_runtimes import MISSING, make_probe

CHOSEN = {"top25": {0, 1}, "top50": {0, 1, 2}, "full": set(range(8))}


def verdict_of(kls, probes=(), errors=1e-4, broken=None, tasks=None, names=CHOSEN, **changes):
    measurement = make_measurement()
    schemes = [make_scheme(measurement, name, names[name]) for name in names]
    manifests = {scheme.name: make_manifest(scheme) for scheme in schemes}
    evaluations = {
        name: make_evaluation(manifests[name], kl, errors, task=(tasks or {}).get(name), **changes)
        for name, kl in kls.items()
    }
    verification = make_verification(manifests, broken)
    found = [make_probe(manifests[name], **fields) for name, fields in probes]
    return build_report({}, measurement, schemes, manifests, verification, evaluations, [], probes=found).verdict


def test_it_stands_at_the_top_and_in_the_record():
    report = make_report()
    assert f"**{report.verdict}**" in render_markdown(report).split("\n## ")[0]
    assert report.verdict.startswith("Take `top50`")
    assert report.verdict.endswith(".")


def test_the_smallest_that_is_nearly_lossless_and_the_smallest_of_all():
    said = verdict_of({"top25": 2e-3, "top50": 7e-3, "full": 30e-3})
    assert said.startswith("Take `top50` (KL 7.0 × 10⁻³ nats a token, ")
    assert "or `full` (KL 30 × 10⁻³ nats a token, " in said
    assert NEARLY_LOSSLESS_KL == 0.01
    assert "KL at most 10 × 10⁻³ nats a token" in said


def test_uniform_fp8_is_good_enough_where_it_is():
    said = verdict_of({"top25": 1e-3, "top50": 2e-3, "full": 5e-3})
    assert said.startswith("Uniform FP8 is good enough: take `full` (KL 5.0 × 10⁻³ nats a token, ")
    partial = verdict_of({"top25": 1e-3, "top50": 2e-3}, names={name: CHOSEN[name] for name in ("top25", "top50")})
    assert partial.startswith("Take `top50` (KL 2.0 × 10⁻³ nats a token, ")
    assert "Uniform" not in partial


def test_a_bound_within_the_error_is_not_kept():
    kls = {"top25": 2e-3, "full": 0.95 * NEARLY_LOSSLESS_KL}
    names = {name: CHOSEN[name] for name in ("top25", "full")}
    assert "Uniform" in verdict_of(kls, errors=0.02 * NEARLY_LOSSLESS_KL, names=names)
    assert verdict_of(kls, errors=0.03 * NEARLY_LOSSLESS_KL, names=names).startswith("Take `top25`")


def test_a_task_suffers_where_questions_are_lost_that_chance_would_not_lose():
    """0.93 is within two standard errors of 0.948; nine questions lost of 500, and none gained, are no chance."""
    *others, result = make_evaluation(
        make_manifest(make_scheme(make_measurement(), "full", set())), 1e-3, 1e-4, task=0.93
    ).results
    kept = "1" * 465
    pairs = {lost: Paired(right=kept + "0" * lost + "1" * (35 - lost), reference=kept + "1" * 35) for lost in (3, 9)}
    assert damage_of([*others, result]) == "nearly_lossless"
    assert damage_of([*others, result.model_copy(update={"paired": pairs[9]})]) == "noticeable"
    assert damage_of([*others, result.model_copy(update={"paired": pairs[3]})]) == "nearly_lossless"


def test_the_least_damage_is_that_of_a_scheme_that_loses_no_task():
    kls = {"top25": 90e-3, "top50": 30e-3, "full": 60e-3}  # none is nearly lossless
    assert "take `top50`" in verdict_of(kls, tasks=dict.fromkeys(CHOSEN, 0.94))
    said = verdict_of(kls, tasks={"top25": 0.94, "top50": 0.80, "full": 0.80})
    assert "take `top25` (KL 90 × 10⁻³ nats a token, " in said
    assert "surely worse than the original on held_out: `top50` (80.0% against 94.8%), `full` (80.0%" in said
    assert "take `top50`" in verdict_of(kls, tasks=dict.fromkeys(CHOSEN, 0.80))  # all lose it: by KL again


def test_a_task_that_suffers_is_damage_whatever_the_kl():
    kls = {"top25": 1e-3, "top50": 1e-3, "full": 1e-3}  # the original's accuracy is 94.8%, its error 1.01%
    assert "Uniform" in verdict_of(kls, tasks={"full": 0.93})
    said = verdict_of(kls, tasks={"full": 0.92, "top50": 0.94})
    assert said.startswith(
        "Take `top50` (KL 1.0 × 10⁻³ nats a token, task accuracy 94.0% against the original's 94.8%, "
    )
    every = verdict_of(kls, tasks=dict.fromkeys(CHOSEN, 0.92))  # the KL is kept: the task is why
    assert every.startswith("No scheme is nearly lossless (KL at most 10 × 10⁻³ nats a token on every held-out set, ")
    assert "and no task's accuracy surely below the original's)" in every


def test_where_nothing_is_nearly_lossless_the_gentlest_is_named():
    said = verdict_of({"top25": 12e-3, "top50": 20e-3, "full": 40e-3})
    assert said.startswith("No scheme is nearly lossless")
    assert "take `top25` (KL 12 × 10⁻³" in said
    assert "or `full` (KL 40" in said
    alone = verdict_of({"full": 40e-3}, names={"full": CHOSEN["full"]})
    assert "`full` (KL 40 × 10⁻³ nats a token, " in alone
    assert "does the least damage too" in alone


def test_a_checkpoint_that_is_not_what_it_says_is_not_advised():
    kls = {"top25": 1e-3, "top50": 2e-3, "full": 5e-3}
    said = verdict_of(kls, broken="full")
    assert said.startswith("Take `top50`")
    assert "`full` is left out: its files don't match it" in said
    said = verdict_of(kls, [("full", {"findings": (MISSING,)})])
    assert "`full` is left out: vLLM 0.32.0: missing_tensor" in said
    every = [(name, {"findings": (MISSING,)}) for name in CHOSEN]
    assert verdict_of(kls, every).startswith("No scheme can be advised: `top25` is left out: ")


def test_a_runtime_that_nobody_asked_leaves_no_scheme_out():
    kls = {"top25": 1e-3, "top50": 2e-3, "full": 5e-3}
    rules = {"stage": "preflight", "reached": "preflight", "device": None}
    loaded = ("full", {"stage": "load", "reached": "load"})
    refused = ("full", {**rules, "runtime": "sglang", "version": "0.5", "findings": (MISSING,)})
    for probes in ([loaded, refused], [("full", rules), refused]):
        said = verdict_of(kls, probes)
        assert said.startswith("Uniform FP8 is good enough: take `full`")
        assert "`full`: not for SGLang 0.5 (missing_tensor)" in said
        assert "left out" not in said
    # Asked, it decides, whatever the rules of others say; by rules alone one that takes it suffices.
    said = verdict_of(
        kls, [("full", {**loaded[1], "findings": (MISSING,)}), (refused[0], {**refused[1], "findings": ()})]
    )
    assert "`full` is left out: vLLM 0.32.0: missing_tensor" in said
    assert "`full` is left out: SGLang 0.5: missing_tensor" in verdict_of(kls, [refused])


def speeds(prefill, decode):
    rates = {"prefill": prefill, "decode": decode}
    return {
        "stage": "generate",
        "device": "GPU X",
        "throughput": tuple(
            Throughput(phase=phase, requests=64, tokens_per_second=100 * rate, source_tokens_per_second=100)
            for phase, rate in rates.items()
        ),
    }


def test_the_fastest_is_named_and_that_none_is():
    kls = {"top25": 1e-3, "top50": 2e-3, "full": 5e-3}
    said = verdict_of(kls, [("top50", speeds(1.2, 1.1)), ("full", speeds(1.4, 1.05))])
    assert said.endswith(
        "; served fastest on GPU X is `full`, 1.40 times at prefill and 1.05 times at decode "
        "the original's tokens per second."
    )
    said = verdict_of(kls, [("top50", speeds(0.7, 0.8)), ("full", speeds(0.5, 0.4))])
    assert said.endswith(
        "; none is faster than the original on GPU X: `top50` comes nearest with 0.70 times at prefill and 0.80 times "
        "at decode."
    )


def report_with_random_arms(count):
    measurement = make_measurement()
    names = {"top25": {0, 1}, "full": set(range(8))}
    schemes = [make_scheme(measurement, name, chosen) for name, chosen in names.items()]
    manifests = {scheme.name: make_manifest(scheme) for scheme in schemes}
    evaluations = {name: make_evaluation(manifests[name], kl, 1e-4) for name, kl in (("top25", 3e-3), ("full", 30e-3))}
    arms = [
        ControlArm(
            scheme=make_scheme(
                measurement, f"top25.random{i}", {i + 2, i + 3}, asked={"control": "random", "beside": "top25"}
            ),
            results=make_evaluation(manifests["top25"], 6e-3, 1e-4).results,
        )
        for i in range(count)
    ]
    evidence = make_evidence(measurement, manifests["top25"], arms=tuple(arms), left_out=())
    return build_report({}, measurement, schemes, manifests, None, evaluations, [], evidence=evidence)


def test_what_the_search_is_worth_is_said_of_the_scheme_that_is_advised_from_three_random_arms_on():
    assert " at 0.50 times the KL of 3 random choices, or `full`" in report_with_random_arms(3).verdict
    said = report_with_random_arms(2).verdict
    assert said.startswith("Take `top25`")
    assert "random" not in said


@pytest.mark.parametrize(
    ("kl", "error", "word"),
    [
        (10e-3, None, "nearly_lossless"),
        (9e-3, 0.6e-3, "small"),  # two errors more are above the bound
        (50e-3, None, "small"),
        (51e-3, None, "noticeable"),
        (200e-3, None, "noticeable"),
        (201e-3, None, "large"),
    ],
)
def test_damage_in_a_word(kl, error, word):
    report = make_report({"full": (kl, error)})
    assert {scheme.name: scheme.damage for scheme in report.schemes} == {"top25": None, "top50": None, "full": word}


def test_accuracy_below_the_originals_is_noticeable_whatever_the_kl():
    manifest = make_manifest(make_scheme(make_measurement(), "full", set(range(8))))
    # the original's accuracy is 94.8%, the error 1.01%
    for task, word in ((0.93, "nearly_lossless"), (0.92, "noticeable")):
        assert damage_of(make_evaluation(manifest, 1e-3, 1e-4, task=task).results) == word
    assert damage_of(make_evaluation(manifest, 300e-3, 1e-4, task=0.92).results) == "large"
    assert damage_of(()) is None


def test_every_word_says_its_bound():
    for word, bound in (
        ("nearly_lossless", "at most 10 ×"),
        ("small", "at most 50 ×"),
        ("noticeable", "at most 200 ×"),
    ):
        assert bound in bound_in_words(word)
        surely = "no task's accuracy surely below the original's" in bound_in_words(word)
        assert surely == (word != "noticeable")  # as the guide's table has it
    assert "above 200 ×" in bound_in_words("large")


def test_the_decision_is_in_the_record():
    report = make_report()
    assert (report.decision.take, report.decision.aim, report.decision.smallest) == ("top50", "nearly_lossless", "full")
    assert report.verdict.startswith(f"{report.decision.advice}, or {report.decision.alternative}")
    assert make_report({}).decision.take is None


def two_formats():
    """The measurement with INT4 of half the bits and four times the score."""
    measurement = make_measurement()
    smaller = tuple(
        c.model_copy(
            update={"format": "int4_w4a16", "weight_bits": c.weight_bits // 2, "scores": tuple(4 * s for s in c.scores)}
        )
        for c in measurement.candidates
    )
    return measurement.model_copy(
        update={"formats": ("fp8", "int4_w4a16"), "candidates": (*measurement.candidates, *smaller)}
    )


@pytest.mark.parametrize(("kl", "said"), [(15e-3, True), (29.9e-3, False), (40e-3, False)])
def test_a_mix_that_beats_a_uniform_scheme_of_its_size_is_named(kl, said):
    measurement = two_formats()
    uniform = make_scheme(measurement, "uniform", set(range(8)))
    formats = dict(uniform.formats)
    first, second, *_ = formats
    formats |= {first: "int4_w4a16", second: "bf16"}
    mix = uniform.model_copy(
        update={"name": "mix", "formats": formats, "coverage": 0.9, "weight_bytes": uniform.weight_bytes}
    )
    manifests = {scheme.name: make_manifest(scheme) for scheme in (uniform, mix)}
    evaluations = {
        "uniform": make_evaluation(manifests["uniform"], 30e-3, 1e-4),
        "mix": make_evaluation(manifests["mix"], kl, 1e-4),
    }
    found = build_report({}, measurement, [uniform, mix], manifests, None, evaluations, []).verdict
    assert ("`mix` is no larger than `uniform`, uniform FP8, and has 0.50 times its KL" in found) == said


@pytest.mark.parametrize("kls", [{}, {"top25": 1e-3}])
def test_only_what_was_evaluated_is_advised(kls):
    said = verdict_of(kls)
    assert ("run `bitladder evaluate`" in said) == (not kls)
    assert ("`top25`" in said) == bool(kls)
