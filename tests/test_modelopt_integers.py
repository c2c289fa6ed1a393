"""ModelOpt's engine in formats of integers: its quantisers, told the scales that our files have, and its search."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bitladder.errors import EngineError
from bitladder.formats import FORMATS, MODELOPT, get_format
from bitladder.measuring.measure import check_engine
from bitladder.models.loading import load_model
from bitladder.models.target import find_target
from bitladder.recipe import MeasureSpec
from conftest import llama_config, load_text, measure_text, save_model
from test_sensitivity import modelopt_steps

INTEGERS = sorted(name for name, one in FORMATS.items() if MODELOPT not in one.layouts)
TOLD = sorted(name for name, one in FORMATS.items() if not one.modelopt_calibrates)
ZEROS = "int4_w4a16_asym"
TOKENS = "int8"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama of one layer whose widths 128 divides."""
    config = llama_config(hidden_size=128, intermediate_size=256, num_key_value_heads=2, num_hidden_layers=1)
    return save_model(transformers.LlamaForCausalLM, config, tmp_path_factory.mktemp("llama"))


def calibrated(name, dtype):
    """(format, a linear that ModelOpt has quantised and calibrated in it, an input)."""
    import modelopt.torch.quantization as mtq

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 256, generator=generator).to(dtype)
    linear = torch.nn.Linear(256, 128, bias=False, dtype=dtype)
    with torch.no_grad():
        spread = torch.randn(128, 256, generator=generator) + 0.5
        linear.weight.copy_(spread * torch.logspace(-2, 1, 128)[:, None])
    model = torch.nn.Sequential(linear)
    mtq.quantize(model, get_format(name).modelopt_quantisation(), forward_loop=lambda m: m(x))
    return get_format(name), linear, x


def tell(linear, format_):
    """Give ModelOpt's quantiser the format's scales, as its own attributes."""
    quantiser = linear.weight_quantizer
    amax, bias = format_.modelopt_grid(linear.weight)
    quantiser.reset_amax()
    quantiser.amax = amax
    if bias is not None:
        quantiser.bias_value = bias


def test_these_are_the_formats_that_it_must_be_told():
    assert TOLD == INTEGERS
    assert len(TOLD) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", TOLD)
def test_its_quantiser_makes_of_a_weight_what_files_restore(name, dtype):
    format_, linear, x = calibrated(name, dtype)
    weight = linear.weight.detach()
    parts = format_.encode(weight, format_.amax_of(weight))
    ours = format_.decode(parts, dtype).float()
    steps = parts["weight_scale"].float().reshape(128, -1).repeat_interleave(256 // parts["weight_scale"][0].numel(), 1)

    def differing():
        found = linear.weight_quantizer(weight).float()
        return ((found - ours).abs() > 0.1 * steps).float().mean(), (found - ours).abs().div(steps).max()

    untold, _ = differing()
    tell(linear, format_)
    told, furthest = differing()
    assert untold > 0.03  # its own grid is another one
    assert told < 0.01  # ModelOpt multiplies by 1 / scale: a value halfway between two codes may get the other one
    assert furthest < (1.6 if dtype == torch.bfloat16 else 1.001)  # BF16 is coarser than a step of INT8's greatest
    if name == TOKENS:
        torch.testing.assert_close(linear.input_quantizer(x), format_.round_input(x, None), rtol=1e-6, atol=0)
    else:
        assert not linear.input_quantizer.is_enabled


def direct_call(directory, data, method, names):
    """Scores {format: {module names: score}} of ModelOpt called directly, with quantisers told our scales by hand."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.opt.utils import named_hparams
    from modelopt.torch.quantization.algorithms import QuantRecipe, QuantRecipeHparam

    model = load_model(directory, torch.float32)
    configs = {name: get_format(name).modelopt_quantisation() for name in names}

    class Loader:
        rounds = 0

        def __iter__(self):
            self.rounds += 1
            if self.rounds > len(names):  # it is calibrated, and scored next
                for _, hparam in named_hparams(model, unique=True):
                    if isinstance(hparam, QuantRecipeHparam) and hparam.is_configurable:
                        before = hparam.active
                        for name in names:
                            hparam.active = QuantRecipe(configs[name], name=name)
                            for linear in hparam.quant_modules:
                                tell(linear, get_format(name))
                        hparam.active = before
            return iter(data.batches)

    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": 16.0, "cost": {"excluded_module_name_patterns": ["*lm_head*"]}},
        quantization_formats=list(configs.values()),
        data_loader=Loader(),
        num_calib_steps=len(data.batches),
        num_score_steps=len(data.batches),
        method=method,
        disabled_layers=["*lm_head*"],
        verbose=False,
        **modelopt_steps(method),
    )
    found = {}
    for stats in state["candidate_stats"].values():
        for recipe, score in zip(stats["formats"], stats["scores"], strict=True):
            for name in names:
                if recipe == QuantRecipe(configs[name], name=name):
                    found[frozenset(stats["module_names"]), name] = score
    return found


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
def test_scores_equal_a_direct_call(llama, text_file, tmp_path, method):
    names = ("int4_w4a16", TOKENS)
    settings = {"engine": "modelopt", "method": method, "formats": names, "samples": 4}
    ours = measure_text(llama, text_file, tmp_path, **settings)
    theirs = direct_call(llama, load_text(llama, text_file, samples=4), method, names)
    members = {group.name: frozenset(module.name for module in group.modules) for group in ours.groups}
    assert len(ours.candidates) == 2 * len(ours.groups) == len(theirs)
    for candidate in ours.candidates:
        assert sum(candidate.scores) == pytest.approx(theirs[members[candidate.group], candidate.format], rel=1e-5)


@pytest.mark.parametrize(("method", "names"), [("gradient", ("fp8", *TOLD)), ("kl_div", ("fp8", ZEROS, TOKENS))])
def test_our_engine_agrees_in_every_format(llama, text_file, tmp_path, method, names):
    found, amax = [], []
    for engine in ("native", "modelopt"):
        settings = {"engine": engine, "method": method, "formats": names, "samples": 2}
        measurement = measure_text(llama, text_file, tmp_path / engine, **settings)
        found.append({(c.group, c.format): sum(c.scores) for c in measurement.candidates})
        amax.append(load_file(tmp_path / engine / "measurement.safetensors"))
    assert {name for _, name in found[0]} == set(names)
    assert found[0].keys() == found[1].keys()
    for key, score in found[0].items():
        assert score == pytest.approx(found[1][key], rel=2e-2), key  # ties: see above
    assert amax[0].keys() == amax[1].keys()
    for key, value in amax[0].items():
        torch.testing.assert_close(value, amax[1][key], rtol=1e-6, atol=0)


def test_zero_points_are_measured_in_bfloat16_too(llama, text_file, tmp_path):
    settings = {"method": "gradient", "formats": (ZEROS,), "dtype": "bfloat16", "samples": 2}
    found = [
        measure_text(llama, text_file, tmp_path / engine, engine=engine, **settings)
        for engine in ("native", "modelopt")
    ]
    for ours, theirs in zip(*(measurement.candidates for measurement in found), strict=True):
        assert sum(ours.scores) == pytest.approx(sum(theirs.scores), rel=2e-2)
    native, modelopt = (load_file(tmp_path / engine / "measurement.safetensors") for engine in ("native", "modelopt"))
    weights = {key for key in native if key.endswith(".weight_amax")}
    assert weights <= modelopt.keys()
    assert {modelopt[key].dtype for key in weights} == {torch.float32}
    assert all(torch.equal(native[key], modelopt[key]) for key in weights)  # fused ones share it here as well


@pytest.mark.parametrize("name", [ZEROS, TOKENS])
def test_a_killed_run_resumes_with_the_same_bytes(name, llama, text_file, tmp_path):
    class Killed(Exception):
        pass

    def kill(phase, done, total):
        if (phase, done) == ("score", 1):
            raise Killed

    settings = {"engine": "modelopt", "method": "gradient", "formats": (name,), "samples": 4}
    whole = measure_text(llama, text_file, tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        measure_text(llama, text_file, tmp_path / "killed", progress=kill, **settings)
    again = measure_text(llama, text_file, tmp_path / "killed", **settings)
    assert again.fingerprint() == whole.fingerprint()
    kept = "measurement.safetensors"
    assert (tmp_path / "killed" / kept).read_bytes() == (tmp_path / "whole" / kept).read_bytes()


@pytest.mark.parametrize("name", [name for name in FORMATS if not FORMATS[name].modelopt_on_cpu])
def test_a_refusal_names_the_formats_that_it_measures(name, llama):
    able = ", ".join(one for one in FORMATS if FORMATS[one].modelopt_on_cpu)
    spec = MeasureSpec(engine="modelopt", formats=("fp8", name))
    with pytest.raises(EngineError, match=rf"{name}.*; use engine: native, or formats .* measures here: {able}$"):
        check_engine(spec, find_target(llama), "cpu")
    check_engine(MeasureSpec(engine="modelopt", formats=tuple(able.split(", "))), find_target(llama), "cpu")
    if FORMATS[name].modelopt_searches:
        check_engine(spec, find_target(llama), "cuda:0")
