import copy
import functools
import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from bitladder import planning
from bitladder.data.batches import Batch, DataSet
from bitladder.errors import MeasurementError, ModelError, RecordError
from bitladder.measured import read_amax
from bitladder.measuring.measure import measure
from bitladder.measuring.modelopt import _Session
from bitladder.measuring.partial import Partial
from bitladder.models.loading import load_model
from bitladder.models.target import find_target
from bitladder.planning import controls
from bitladder.recipe import MeasureSpec, SchemeSpec
from bitladder.records import BF16, Measurement
from conftest import load_text, measure_text, qwen2_5_vl_config, save_model, source_of


def modelopt_steps(method):
    """What ModelOpt's `auto_quantize` is given to score by one method, as its documentation shows."""
    if method == "gradient":
        return {
            "forward_step": lambda m, batch: m(**batch.inputs, labels=batch.labels),
            "loss_func": lambda output, batch: output.loss,
        }
    return {"forward_step": lambda m, batch: m(**batch.inputs).logits[:, :-1]}


def direct_auto_quantize(directory, data, method):
    """ModelOpt called directly, as its documentation shows: its state."""
    import modelopt.torch.quantization as mtq

    model = load_model(directory, torch.float32)
    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": 12.0, "cost": {"excluded_module_name_patterns": ["*lm_head*"]}},
        quantization_formats=[mtq.FP8_DEFAULT_CFG],
        data_loader=list(data.batches),
        num_calib_steps=len(data.batches),
        num_score_steps=len(data.batches),
        method=method,
        disabled_layers=["*lm_head*"],
        verbose=False,
        **modelopt_steps(method),
    )
    return state


@pytest.fixture(scope="module", params=["gradient", "kl_div"])
def beside_modelopt(request, llama, text_file, tmp_path_factory):
    """(our measurement, ModelOpt's own state, {ModelOpt's name of a group: ours}), by one method."""
    output = tmp_path_factory.mktemp("beside_modelopt")
    ours = measure_text(llama, text_file, output, engine="modelopt", method=request.param, share_fused_scales=False)
    theirs = direct_auto_quantize(llama, load_text(llama, text_file), request.param)
    members = {min(module.name for module in group.modules): group.name for group in ours.groups}
    names = {
        name: members[min(stats["module_names"])]
        for name, stats in theirs["candidate_stats"].items()
        if "lm_head" not in stats["module_names"]
    }
    return ours, theirs, names


def test_scores_equal_modelopts_without_sharing(beside_modelopt):
    ours, theirs, names = beside_modelopt
    # its candidates are sorted by bits: FP8 first, unquantised last
    scores = {group: theirs["candidate_stats"][name]["scores"][0] for name, group in names.items()}
    assert len(scores) == len(ours.groups)
    for candidate in ours.candidates:
        assert sum(candidate.scores) == pytest.approx(scores[candidate.group], rel=1e-5)


def test_the_modelopt_control_is_the_choice_of_modelopts_own_solver(beside_modelopt):
    from modelopt.torch.quantization.algorithms import QuantRecipe, _resolve_best_recipe

    ours, theirs, names = beside_modelopt
    # Scores of 1e-6 are below the tolerance of its solver, which then takes any choice: in thousands they are not.
    theirs = copy.deepcopy(theirs)
    for stats in theirs["candidate_stats"].values():
        stats["scores"] = [1e9 * score for score in stats["scores"]]
    sizes = set()
    for bits in (9.0, 10.5, 12.0, 13.5, 15.0):
        recipes = _resolve_best_recipe(theirs, {"effective_bits": bits})
        chosen = {group for name, group in names.items() if recipes[name] != QuantRecipe(quant_cfg=None)}
        formats = {group.name: "fp8" if group.name in chosen else BF16 for group in ours.groups}
        scheme = planning.price(ours, f"at-{bits:g}", formats, SchemeSpec(name=f"at-{bits:g}", effective_bits=bits))
        assert controls._modelopt_choice(ours, scheme) == formats
        sizes.add(len(chosen))
    assert len(sizes) >= 3  # not one choice for all


def test_sharing_moves_only_fused_groups_scales(llama, text_file, tmp_path, measured):
    shared, directory = measured
    apart = measure_text(llama, text_file, tmp_path, engine="modelopt", share_fused_scales=False)
    own, common = load_file(tmp_path / "measurement.safetensors"), load_file(directory / "measurement.safetensors")
    moved = set()
    for group in shared.groups:
        for kind in ("weight_amax", "input_amax"):
            values = [float(own[f"{module.name}.{kind}"]) for module in group.modules]
            together = {float(common[f"{module.name}.{kind}"]) for module in group.modules}
            assert together == {max(values)}
            if len(set(values)) > 1:
                moved.add(group.name)
    assert moved == {group.name for group in shared.groups if len(group.modules) > 1}
    weights = load_model(llama, torch.float32)
    for group in shared.groups:
        for module in group.modules:
            assert float(own[f"{module.name}.weight_amax"]) == float(
                weights.get_parameter(f"{module.name}.weight").abs().max()
            )
    singles = [c for c in shared.candidates if c.group not in moved]
    before = {c.group: c.scores for c in apart.candidates}
    # a group's own scores depend on its own scales only
    assert all(c.scores == before[c.group] for c in singles)


def test_input_amax_is_the_largest_activation(llama, text_file, measured):
    measurement, directory = measured
    amax = load_file(directory / "measurement.safetensors")
    model = load_model(llama, torch.float32)
    seen: dict[str, float] = {}

    def watch(name):
        def hook(_, inputs):
            seen[name] = max(seen.get(name, 0.0), float(inputs[0].abs().max()))

        return hook

    for group in measurement.groups:
        for module in group.modules:
            model.get_submodule(module.name).register_forward_pre_hook(watch(module.name))
    with torch.no_grad():
        for batch in load_text(llama, text_file).batches:
            model(**batch.inputs)
    for name, value in seen.items():
        assert float(amax[f"{name}.input_amax"]) == pytest.approx(value, rel=1e-6)


def test_scores_are_kept_per_batch_and_weighted_by_tokens(measured):
    measurement, _ = measured
    tokens = 2 * 23  # two rows of 24 tokens, the first of each isn't predicted
    assert measurement.score_weights == tuple([tokens**2 / (3 * tokens)] * 3)
    candidate = measurement.candidates[0]
    assert len(candidate.scores) == 3
    assert len(set(candidate.scores)) == 3
    assert measurement.sensitivity(candidate) == pytest.approx(sum(candidate.scores) * tokens / 3)


def test_padding_changes_nothing(llama, text_file, tmp_path):
    plain = load_text(llama, text_file, samples=2)
    batch = plain.batches[0]
    extra = torch.zeros(2, 7, dtype=torch.long)
    padded = Batch(
        {
            "input_ids": torch.cat([batch.inputs["input_ids"], extra], 1),
            "attention_mask": torch.cat([batch.inputs["attention_mask"], extra], 1),
        },
        torch.cat([batch.labels, extra - 100], 1),
    )
    assert padded.loss_tokens == batch.loss_tokens
    results = []
    for name, data in (("plain", plain), ("padded", DataSet((padded,), plain.summary))):
        for method in ("gradient", "kl_div"):
            results.append(
                measure(
                    llama,
                    source_of(llama),
                    find_target(llama),
                    data,
                    MeasureSpec(engine="modelopt", method=method),
                    tmp_path / name / method,
                )
            )
    for method in (0, 1):
        without, with_pads = results[method], results[method + 2]
        assert with_pads.score_weights == without.score_weights
        # the calibration's amax sees the pads too, so a few scales move; the masks keep the scores together
        ratios = [b.scores[0] / a.scores[0] for a, b in zip(without.candidates, with_pads.candidates, strict=True)]
        assert all(0.5 < ratio < 2 for ratio in ratios)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def wholes(llama, text_file, tmp_path_factory):
    """What gives (measurement, its directory) of one that wasn't killed, once for all tests of the same settings."""

    @functools.cache
    def whole(**settings):
        output = tmp_path_factory.mktemp("whole")
        return measure_text(llama, text_file, output, **settings), output

    return whole


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
@pytest.mark.parametrize("moment", [("calibrate", 2), ("score", 0), ("score", 2), ("score", 3)])
def test_a_killed_run_resumes_with_the_same_bytes(method, moment, llama, text_file, wholes, tmp_path, monkeypatch):
    settings = {"engine": "modelopt", "method": method}
    whole, directory = wholes(**settings)

    def kill(phase, done, total):
        if (phase, done) == moment:
            raise Killed

    with pytest.raises(Killed):
        measure_text(llama, text_file, tmp_path / "killed", progress=kill, **settings)
    scored = []
    monkeypatch.setattr(
        _Session,
        "_read_scores",
        lambda self, groups, real=_Session._read_scores: scored.append(1) or real(self, groups),
    )
    again = measure_text(llama, text_file, tmp_path / "killed", **settings)
    assert len(scored) == 3 - (moment[1] if moment[0] == "score" else 0)
    assert again.fingerprint() == whole.fingerprint()
    amax = "measurement.safetensors"
    assert (tmp_path / "killed" / amax).read_bytes() == (directory / amax).read_bytes()
    assert not (tmp_path / "killed" / "measuring").exists()


def test_leftovers_of_other_settings_are_not_reused(llama, text_file, tmp_path):
    partial = Partial(tmp_path / "measuring", "a key of other settings")
    partial.keep_scores(0, {})
    measured = measure_text(llama, text_file, tmp_path)
    assert all(score > 0 for candidate in measured.candidates for score in candidate.scores)


UNFINISHED = {"engine": "native", "method": "gradient", "rounding": "compensated"}


@pytest.fixture(scope="module")
def unfinished(llama, text_file, tmp_path_factory):
    """What a killed measurement left; to be copied, not changed."""

    def kill(phase, done, total):
        if (phase, done) == ("score", 2):
            raise Killed

    output = tmp_path_factory.mktemp("unfinished")
    with pytest.raises(Killed):
        measure_text(llama, text_file, output, progress=kill, **UNFINISHED)
    return output


@pytest.mark.parametrize("how", ["cut", "a flipped bit", "a directory", "a link", "no seal", "a stray"])
@pytest.mark.parametrize("name", ["key.json", "amax.safetensors", "scores-00001.json", "codes/layer-00000.safetensors"])
def test_what_is_damaged_of_an_unfinished_measurement_is_made_again(
    name, how, llama, text_file, wholes, unfinished, tmp_path
):
    whole, directory = wholes(**UNFINISHED)
    shutil.copytree(unfinished, tmp_path / "killed")
    path = tmp_path / "killed" / "measuring" / name
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "a flipped bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "no seal":
        path.with_name(f"{path.name}.sha256").unlink()
    elif how == "a stray":
        path.with_name(f"0-{path.name}").write_bytes(content)
    else:
        path.unlink()
        path.mkdir() if how == "a directory" else path.symlink_to(directory / "measurement.json")
    again = measure_text(llama, text_file, tmp_path / "killed", **UNFINISHED)
    assert again.fingerprint() == whole.fingerprint()
    assert {p.name for p in (tmp_path / "killed").iterdir()} == {p.name for p in directory.iterdir()}


def with_poison(llama, directory, tensor, value):
    for path in llama.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    tensors[tensor][0] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_inf_in_weights(value, llama, text_file, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    broken = with_poison(llama, tmp_path, name, value)
    for engine in ("modelopt", "native"):
        with pytest.raises(ModelError, match=name):
            measure_text(broken, text_file, tmp_path / engine, engine=engine)


def test_overflow_in_activations(llama, text_file, tmp_path):
    broken = with_poison(llama, tmp_path, "model.layers.1.mlp.up_proj.weight", 3e38)  # finite, but its sums aren't
    for engine in ("modelopt", "native"):
        with pytest.raises(MeasurementError, match="NaN or Inf"):
            measure_text(broken, text_file, tmp_path / engine, engine=engine)


def test_nan_in_scores_names_the_group(llama, text_file, tmp_path, monkeypatch):
    real = _Session._read_scores

    def poisoned(self, groups):
        scores = real(self, groups)
        scores["model.layers.0.mlp.down_proj"]["fp8"] = (float("nan"), 0.0)
        return scores

    monkeypatch.setattr(_Session, "_read_scores", poisoned)
    with pytest.raises(MeasurementError, match=r"model\.layers\.0\.mlp\.down_proj in fp8 is nan"):
        measure_text(llama, text_file, tmp_path, engine="modelopt")


def test_all_zero_scores_are_refused(llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(_Session, "_read_scores", lambda self, groups: {g: {"fp8": (0.0, 0.0)} for g in groups})
    with pytest.raises(MeasurementError, match="all scores are zero"):
        measure_text(llama, text_file, tmp_path, engine="modelopt")


def test_a_dead_module_stays_in_sixteen_bits_and_is_named(llama, text_file, tmp_path):
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.self_attn.o_proj.weight"].zero_()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    measured = measure_text(tmp_path, text_file, tmp_path / "out")
    name = "model.layers.2.self_attn.o_proj"
    assert name not in {group.name for group in measured.groups}
    assert "zero" in next(module.reason for module in measured.untouched if module.name == name)


def test_score_samples(llama, text_file, tmp_path):
    measured = measure_text(llama, text_file, tmp_path / "a", score_samples=4)
    assert len(measured.score_weights) == 2
    with pytest.raises(MeasurementError, match="score_samples is 7"):
        measure_text(llama, text_file, tmp_path / "b", score_samples=7)


def test_gpu_asked_for_but_absent(llama, text_file, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MeasurementError, match="no GPU"):
        measure_text(llama, text_file, tmp_path, device="cuda")


def test_amax_must_belong_to_the_measurement(measured, tmp_path):
    measurement, directory = measured
    kinds = {"k_proj": ("k_amax",), "v_proj": ("v_amax",)}
    assert set(read_amax(measurement, directory)) == {
        f"{module.name}.{kind}"
        for group in measurement.groups
        for module in group.modules
        for kind in ("weight_amax", "input_amax", *kinds.get(module.name.rpartition(".")[2], ()))
    }
    with pytest.raises(RecordError, match="missing"):
        read_amax(measurement, tmp_path)
    tensors = load_file(directory / "measurement.safetensors")
    save_file({name: value * 2 for name, value in tensors.items()}, tmp_path / "measurement.safetensors")
    with pytest.raises(RecordError, match="not the file"):
        read_amax(measurement, tmp_path)
    with pytest.raises(MeasurementError, match="planning"):
        read_amax(measurement.model_copy(update={"amax_sha256": None}), directory)
    with pytest.raises(MeasurementError, match="share_fused_scales"):
        read_amax(measurement.model_copy(update={"fused_scales_shared": False}), directory)


def test_measurement_file_is_plain_json(measured):
    measurement, directory = measured
    content = json.loads((directory / "measurement.json").read_text())
    assert content["schema_version"] == 2
    assert Measurement.read(directory / "measurement.json") == measurement


def test_a_vision_tower_is_left_alone(text_file, tmp_path):
    directory = save_model(Qwen2_5_VLForConditionalGeneration, qwen2_5_vl_config(), tmp_path / "vl")
    measured = measure_text(directory, text_file, tmp_path / "out")
    assert len(measured.groups) == 8
    assert not any("visual" in group.name for group in measured.groups)
    assert sum("vision tower" in module.reason for module in measured.untouched) > 8


def test_a_groups_score_does_not_depend_on_the_order_that_modelopt_keeps_modules_in():
    """ModelOpt keeps them in sets, whose order is that of addresses: sums of three floats then differ by a bit."""
    session = _Session.__new__(_Session)
    session.job = SimpleNamespace(spec=MeasureSpec(engine="modelopt", method="gradient"))
    modules = [torch.nn.Linear(1, 1) for _ in range(3)]
    session.places = {module: place for place, module in enumerate(modules)}
    values = dict(
        zip(modules, (torch.tensor([part, 2 * part], dtype=torch.float64) for part in (0.1, 0.2, 0.3)), strict=True)
    )
    found = set()
    for order in itertools.permutations(modules):
        hparam = SimpleNamespace(_importance_dict={"fp8": {module: values[module] for module in order}})
        found.add(session._read_score(hparam, "fp8"))
    assert found == {(0.1 + 0.2 + 0.3, 0.2 + 0.4 + 0.6)}


def test_modelopts_backward_pass_adds_up_in_a_fixed_order(llama, text_file, tmp_path, monkeypatch):
    settings = []
    real = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor,
        "backward",
        lambda self, *args, **kwargs: (
            settings.append(torch.are_deterministic_algorithms_enabled()) or real(self, *args, **kwargs)
        ),
    )
    measure_text(llama, text_file, tmp_path, samples=2, engine="modelopt", method="gradient")
    assert settings == [True]
    assert not torch.are_deterministic_algorithms_enabled()
