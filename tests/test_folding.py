"""Folded models compute what the original does, to the bit; channels become even; what can't be folded is refused."""

import copy
import shutil
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

import bitladder
import tiny_architectures
from bitladder.checkpoints.folded import write_folded
from bitladder.data.batches import Batch
from bitladder.errors import EngineError, ModelError, OutputError
from bitladder.formats import get_format
from bitladder.measuring.folding import fold_norms
from bitladder.models.loading import load_model
from bitladder.models.scaling import Scaling
from bitladder.models.weights import WeightFiles, read_config
from bitladder.recipe import resolve_path
from bitladder.runinfo import no_progress
from bitladder.steps import fold as folding
from conftest import make_text

DEMO = Path(bitladder.__file__).parent / "demo" / "qwen2_5_vl_digits"


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """The embedded model, trained by others than these tests: its directory, and what was done."""
    directory = tmp_path_factory.mktemp("folded")
    run = bitladder.Run(resolve_path("package:demo/recipe.yaml", Path()), output=directory / "run")
    return directory / "model", run.fold(directory / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_are_the_originals_to_the_bit(folded, dtype):
    ids = torch.randint(0, 1000, (4, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = (load_model(path, dtype)(input_ids=ids).logits for path in (DEMO, folded[0]))
    assert torch.equal(before, after)


def test_tensors_are_the_originals_times_powers_of_two_and_other_files_the_same(folded):
    directory, folds = folded
    before, after = load_file(DEMO / "model.safetensors"), load_file(directory / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {
        name: (t.shape, t.dtype) for name, t in after.items()
    }
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert len(changed) == len(folds) + sum(len(one.readers) for one in folds)
    for name in changed:
        ratio = (after[name].float() / before[name].float()).nan_to_num(1.0)
        assert bool((torch.frexp(ratio).mantissa == 0.5).all()), name
    assert {len(one.readers) for one in folds} == {2, 3}
    kept = {path.name for path in DEMO.iterdir()} - {"model.safetensors", "PROVENANCE"}
    for name in kept - {"README.md"}:
        assert (directory / name).read_bytes() == (DEMO / name).read_bytes()
    assert f"{len(folds)} norms were folded" in (directory / "PROVENANCE").read_text()


def test_what_isnt_multiplied_is_copied_shard_by_shard(sharded_llama, tmp_path):
    name = "model.norm.weight"
    write_folded(sharded_llama, tmp_path / "out", {name: Scaling(torch.full((64,), 0.5))}, "halved")
    before, after = WeightFiles.open(sharded_llama), WeightFiles.open(tmp_path / "out")
    assert before.files == after.files
    assert torch.equal(after.load(name) * 2, before.load(name))
    assert all(torch.equal(after.load(other), before.load(other)) for other in before.tensors if other != name)
    for file in ("config.json", "model.safetensors.index.json", "tokenizer.json", "chat_template.jinja", "LICENSE"):
        assert (tmp_path / "out" / file).read_bytes() == (sharded_llama / file).read_bytes()
    assert (tmp_path / "out" / "PROVENANCE").read_text() == "halved\n"


def test_a_product_that_a_dtype_rounds_is_refused(tmp_path):
    """Half of FP16's least number."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text("{}")
    save_file({"norm.weight": torch.full((4,), 2.0**-24, dtype=torch.float16)}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ModelError, match=r"norm\.weight times powers of two doesn't fit F16"):
        write_folded(tmp_path / "in", tmp_path / "out", {"norm.weight": Scaling(torch.full((4,), 0.5))}, "halved")
    assert not (tmp_path / "out").exists()


def test_a_raised_tensor_is_written_where_its_dtype_holds_it_and_refused_where_not(tmp_path):
    """(1 + 3) / 2 - 1 = 1; (1 + 1/512) / 2 - 1 = -511/1024 takes nine bits, BF16 has eight."""
    for name, value in (("held", 3.0), ("not", 2.0**-9)):
        source, out = tmp_path / name, tmp_path / f"{name} out"
        source.mkdir()
        (source / "config.json").write_text("{}")
        save_file({"norm.weight": torch.full((4,), value, dtype=torch.bfloat16)}, source / "model.safetensors")
        halved = {"norm.weight": Scaling(torch.full((4,), 0.5), offset=1.0)}
        if name == "held":
            write_folded(source, out, halved, "halved")
            assert WeightFiles.open(out).load("norm.weight").tolist() == [1.0] * 4
        else:
            with pytest.raises(ModelError, match=r"norm\.weight times powers of two doesn't fit BF16"):
                write_folded(source, out, halved, "halved")
            assert not out.exists()


def test_nothing_is_replaced(tmp_path):
    run = bitladder.Run(resolve_path("package:demo/recipe.yaml", Path()), output=tmp_path / "run")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "theirs.txt").write_text("theirs")
    for place in (tmp_path / "there", tmp_path / "there" / "theirs.txt"):
        with pytest.raises(OutputError, match="is there already"):
            run.fold(place)
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["theirs.txt"]


def test_nothing_is_written_into_the_original(tmp_path):
    model = shutil.copytree(DEMO, tmp_path / "model")
    content = yaml.safe_load((DEMO.parent / "recipe.yaml").read_text())
    run = bitladder.Run({**content, "model": {"path": str(model)}}, output=tmp_path / "run")
    with pytest.raises(OutputError, match=r"in_it lies in .*; name a place elsewhere"):
        run.fold(model / "in_it")
    assert not (model / "in_it").exists()


class Small(nn.Module):
    """One norm, two linear modules that read it, and what else is asked for."""

    def __init__(self, norm, *, also=None):
        super().__init__()
        self.norm, self.also = norm, also
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, input_ids, attention_mask):
        x = self.norm(torch.nn.functional.one_hot(input_ids, 16).float() + 1)
        return SimpleNamespace(
            logits=self.left(x) + self.right(x) + (0 if self.also is None else self.also(x)[..., :8])
        )


def norm_with(weight):
    """A norm whose third channel has this weight, the others 1."""
    norm = nn.RMSNorm(16)
    norm.weight.data[3] = weight
    return norm


def folds_of(model, searched=("left", "right"), *, mask=None, unknown=None, dtype=torch.float32):
    """Fold a model whose files hold this dtype; `unknown`: a parameter that isn't stored as it is."""
    torch.manual_seed(0)
    ids = torch.randint(0, 16, (2, 30) if mask is None else mask.shape)
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}, ids)
    files = {name: parameter.detach().to(dtype, copy=True) for name, parameter in model.named_parameters()}
    stored = {name: partial(files.get, name) for name in files if name != unknown}
    return fold_norms(model, [batch], searched, stored, no_progress)


def test_a_channel_four_times_as_large_is_halved():
    norm = norm_with(4.0)
    model = Small(norm)
    before = model.left.weight.detach().clone()
    (fold,) = folds_of(model)
    relative = fold.factors / fold.factors[0]
    assert relative[3] == 2.0
    assert set(relative.tolist()) == {1.0, 2.0}
    assert (norm.weight * fold.factors)[3] == 4.0
    assert torch.equal(model.left.weight[:, 3] / fold.factors[3], before[:, 3])


def test_inputs_of_four_bits_lose_less():
    """Neighbours of a channel 64 times as large keep nothing of their own before, and most of it after."""
    nvfp4, errors = get_format("nvfp4"), []
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    for folded in (False, True):
        norm = norm_with(64.0)
        model = Small(norm)
        if folded:
            folds_of(model)
        model.left.weight.data[:, 3] = 0.0  # so that the neighbours' errors are seen
        seen = norm(x).detach()
        lost = seen - nvfp4.round_input(seen, nvfp4.input_scale(seen.abs().amax()))
        errors.append(float((lost @ model.left.weight.detach().t()).norm()))
    assert errors[1] < errors[0] / 2


def test_a_norm_with_a_bias_is_folded_with_it():
    norm = nn.LayerNorm(16)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    (fold,) = folds_of(Small(norm))
    assert fold.readers == ("left", "right")


def test_a_norm_that_something_else_reads_is_refused():
    with pytest.raises(EngineError, match="changes this model's logits"):
        folds_of(Small(norm_with(16.0), also=lambda x: x))  # no module: only the logits tell
    with pytest.raises(EngineError, match="no norm of this model can be folded"):
        folds_of(Small(norm_with(16.0), also=nn.Softmax(-1)))
    with pytest.raises(EngineError, match="no norm of this model can be folded"):
        folds_of(Small(norm_with(16.0)), searched=("other",))


class Scaled(nn.Module):
    """What it is given times its weight, `of` that, and what else it is given added."""

    def __init__(self, weight, of=lambda x: x):
        super().__init__()
        self.weight, self.of = nn.Parameter(weight), of

    def forward(self, x, more=None):
        return self.of(x) * self.weight + (0 if more is None else more)


class TwoNorms(nn.Module):
    """A norm with an uneven channel that one linear module reads, and another norm, read by `right` and `also`."""

    def __init__(self, other, also=None, features=16):
        super().__init__()
        self.plain, self.other, self.also = norm_with(4.0), other, also
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(16, 8), nn.Linear(features, 8)

    def of_other(self, x):
        return self.other(x)

    def forward(self, input_ids, attention_mask):
        x = nn.functional.one_hot(input_ids, 16).float() + 1
        y = self.of_other(x)
        logits = self.left(self.plain(x)) + self.right(y).reshape(*x.shape[:2], -1)[..., :8]
        return SimpleNamespace(logits=logits + (0 if self.also is None else self.also(y)[..., :8]))


def test_a_norm_that_a_module_with_a_weight_reads_is_left_alone_where_that_is_not_linear():
    assert [fold.norm for fold in folds_of(TwoNorms(norm_with(4.0)))] == ["plain", "other"]
    (fold,) = folds_of(TwoNorms(norm_with(4.0), also=Scaled(torch.ones(16), of=torch.tanh)))
    assert (fold.norm, fold.readers) == ("plain", ("left",))


class Added(Scaled):
    def forward(self, x, more):
        return super().forward(x, more)


class TwoInputs(TwoNorms):
    def of_other(self, x):
        return self.other(x, x)


class NamedInputs(TwoNorms):
    def of_other(self, x):
        return self.other(x, more=x)


class Heads(TwoNorms):
    def of_other(self, x):
        return self.other((x * (1 + 99 * torch.eye(16)[0])).unflatten(-1, (4, 4)))  # unlike one another


@pytest.mark.parametrize(
    "model",
    [
        TwoInputs(Added(norm_with(4.0).weight.data)),
        NamedInputs(Scaled(norm_with(4.0).weight.data)),
        Heads(Scaled(torch.tensor([1.0, 4.0, 1.0, 1.0])), features=4),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_norm_of_more_or_other_than_hidden_states_is_left_alone(model):
    assert [fold.norm for fold in folds_of(model)] == ["plain"]


@pytest.mark.parametrize("unknown", ["norm.weight", "left.weight"])
@pytest.mark.parametrize("raised", [False, True])
def test_what_the_files_hold_otherwise_is_left_alone(unknown, raised):
    """A parameter that transformers makes of several tensors, say."""
    model = Small(gemma_norm(norm_with(7.0).weight) if raised else norm_with(4.0))
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(EngineError, match="no norm of this model can be folded"):
        folds_of(model, unknown=unknown)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


class Given(nn.Module):
    """Rows as they are, through weights of 1 that count as a norm, into a linear module."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.norm = rows, Scaled(torch.ones(rows.shape[-1]))
        self.left = nn.Linear(rows.shape[-1], 8)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.left(self.norm(self.rows)))


def test_each_token_counts_the_same_and_padding_not_at_all():
    """Sixteen tokens have their second channel sixteen times as large, a huge one its first, all padding its third."""
    rows = torch.ones(1, 40, 4)
    rows[0, :16, 1], rows[0, 16, 0], rows[0, 17:, 2] = 16.0, 1e6, 1e6
    mask = (torch.arange(40) < 17).long()[None]
    (fold,) = folds_of(Given(rows), mask=mask)
    mean = nn.functional.normalize(rows[0, :17], dim=-1).mean(0)
    expected = torch.exp2(torch.round(torch.log2(mean / mean.mean()) / 2))
    assert expected.tolist() == [0.5, 2.0, 0.5, 0.5]
    assert fold.factors.tolist() == expected.tolist()


def test_factors_are_bounded_on_either_side():
    """A thousand channels, one of which has all but nothing of every token: 1000 times the mean counts as 256."""
    rows = torch.full((1, 4, 1024), 1e-9)
    rows[..., 7] = 1.0
    (fold,) = folds_of(Given(rows), mask=torch.ones(1, 4, dtype=torch.long))
    assert set(fold.factors.tolist()) == {2.0**-4, 2.0**4}
    assert fold.factors[7] == 2.0**4


class Raised(nn.Module):
    """A norm with a bias that multiplies with 1 + weight, as Nemotron's."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x):
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight + 1, self.bias)


def gemma_norm(weight):
    norm = transformers.models.gemma3.modeling_gemma3.Gemma3RMSNorm(len(weight))
    norm.weight.data.copy_(weight)
    return norm


def in_bf16(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


RAISED = {
    "rms": gemma_norm(8 * in_bf16(16).abs()),
    "layer": Raised(8 * in_bf16(16).abs(), in_bf16(16, seed=1)),
}


@pytest.mark.parametrize("norm", RAISED.values(), ids=RAISED.keys())
def test_a_norm_that_adds_one_to_its_weight_keeps_its_products_to_the_bit_in_the_dtype_of_the_files(norm):
    """16 channels, whose weights BF16 holds before and after, in a model of float32."""
    norm = copy.deepcopy(norm)
    x = 5 * torch.randn(30, 16, generator=torch.Generator().manual_seed(2))
    model = Small(norm)
    before, columns = norm(x).detach(), model.left.weight.detach().clone()
    (fold,) = folds_of(model, dtype=torch.bfloat16)
    assert fold.raised == ("weight",)
    assert len(set(fold.factors.tolist())) > 1
    assert bool((torch.frexp(fold.factors).mantissa == 0.5).all())
    assert torch.equal(norm.weight, norm.weight.bfloat16().float())
    assert torch.equal(norm(x) * fold.factors, before)
    assert torch.equal(model.left.weight, columns * fold.factors)


def held_by_bf16(number: Fraction) -> bool:
    """Eight significant bits; far from the ends of its range here."""
    odd = abs(number.numerator)
    while odd and odd % 2 == 0:
        odd //= 2
    return odd < 2**8


def nearest(weights, wanted, shift):
    """For all channels the exponent that is nearest to the wanted one and a shift, of those that BF16 holds."""
    return [
        min(
            (k for k in range(-8, 9) if held_by_bf16((1 + Fraction(w)) / Fraction(2) ** k - 1)),
            key=lambda k: (k - (aim + shift)) ** 2,
        )
        for w, aim in zip(weights, wanted, strict=True)
    ]


@pytest.mark.parametrize(("files", "model"), [("float32", "float32"), ("float16", "float32"), ("float16", "bfloat16")])
def test_a_raised_weight_changes_as_bf16_and_its_files_both_hold_it(files, model):
    """Files of more bits may be loaded in BF16, where another w' is rounded otherwise than w was."""
    files, model = getattr(torch, files), getattr(torch, model)
    weights = (20 * torch.rand(64, generator=torch.Generator().manual_seed(0))).to(files)
    weights[::2] = weights[::2].bfloat16().to(files)
    given = Given(torch.ones(1, 16, 64)).to(model)
    given.rows, given.norm = given.rows.to(model), gemma_norm(weights.float()).to(model)
    ids = torch.zeros(1, 16, dtype=torch.long)
    batch = Batch({"input_ids": ids, "attention_mask": ids + 1}, ids)
    held = {name: parameter.detach().to(files) for name, parameter in given.named_parameters()}
    held["norm.weight"] = weights
    (fold,) = fold_norms(given, [batch], ["left"], {n: partial(held.get, n) for n in held}, no_progress)
    assert len(set(fold.factors.tolist())) > 1
    written = Scaling(1 / fold.factors, 1.0).applied(weights)
    for loaded in (files, torch.bfloat16, model):
        assert torch.equal((written.to(loaded).double() + 1) * fold.factors, weights.to(loaded).double() + 1)


def test_a_raised_weight_that_is_lost_in_the_sum_is_left_alone():
    """1 + 2^-25 is 1 in float32, and (1 + 2^-25) / 2 no half."""
    scaling = Scaling(torch.full((2,), 0.5), 1.0)
    assert scaling.kept(torch.tensor([3.0, 2.0**-25])).tolist() == [True, False]


def test_of_two_raised_parameters_both_have_to_hold_the_factors():
    """Of the second nothing but 1 + w itself is held."""

    class Both(Raised):
        def forward(self, x):
            return nn.functional.layer_norm(x, x.shape[-1:], self.weight + 1, self.bias + 1)

    full = torch.arange(1, 17) / 64 * (1 + 2.0**-23)
    for bias, count in ((torch.zeros(16), 1), (full, 0)):
        model = Small(Both(torch.tensor([255.0] + [3.0] * 15), bias))
        if count:
            (fold,) = folds_of(model)
            assert fold.raised == ("weight", "bias")
        else:
            with pytest.raises(EngineError, match="no norm of this model can be folded"):
                folds_of(model)


@pytest.mark.parametrize("seed", range(3))
def test_raised_weights_take_the_nearest_factors_that_bf16_holds_after_one_more_for_all(seed):
    """Rows of ones, so that the channels' magnitudes are those of 1 + weight; a quarter of the weights is negative."""
    generator = torch.Generator().manual_seed(seed)
    weights = (60 * torch.rand(48, generator=generator) ** 4 - 0.3).bfloat16().float()
    model = Given(torch.ones(1, 16, 48))
    model.norm = gemma_norm(weights)
    (fold,) = folds_of(model, mask=torch.ones(1, 16, dtype=torch.long), dtype=torch.bfloat16)
    size = (1 + weights).abs()
    wanted = (torch.log2(size / size.mean()) / 2).tolist()
    ways = [nearest(weights.tolist(), wanted, shift) for shift in range(-8, 9)]
    costs = [
        sum((k - aim - shift) ** 2 for k, aim in zip(way, wanted, strict=True))
        for shift, way in zip(range(-8, 9), ways, strict=True)
    ]
    exponents = torch.log2(fold.factors).tolist()
    assert exponents in [way for way, cost in zip(ways, costs, strict=True) if cost < min(costs) + 1e-3]
    assert max(exponents) > min(exponents)
    assert ways[8] != exponents  # without a shift


def test_a_raised_weight_that_no_factor_fits_is_left_alone():
    """Every bit of float32 is used, so that nothing but 1 + w itself can be held."""
    norm = gemma_norm(torch.full((16,), 1 + 2.0**-23) * torch.arange(1, 17) / 64)
    model = Small(norm)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(EngineError, match="no norm of this model can be folded"):
        folds_of(model)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gemma_is_folded_and_its_logits_are_the_originals_to_the_bit(tmp_path, dtype):
    """All norms before q/k/v and gate/up, of a model with weights such as Gemma's norms have."""
    (tmp_path / "model").mkdir()
    model = tiny_architectures.build("Gemma3ForCausalLM", tmp_path / "model")
    path = model / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensors[name] = (20 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0))).to(tensor)
    save_file(tensors, path, metadata={"format": "pt"})
    (tmp_path / "seen.txt").write_text(make_text(300, seed=0))
    rows = {"samples": 4, "sequence_length": 24, "batch_size": 2}
    content = {
        "model": {"path": str(model)},
        "calibration": {"data": {"kind": "text", "path": str(tmp_path / "seen.txt")}, **rows},
        "measurement": {"dtype": dtype},
        "schemes": [{"name": "full", "coverage": 1.0}],
        "output": str(tmp_path / "run"),
    }
    folds = bitladder.Run(content).fold(tmp_path / "folded")
    layers = read_config(model)["num_hidden_layers"]
    assert len(folds) == 2 * layers
    assert {fold.raised for fold in folds} == {("weight",)}
    ids = torch.randint(0, 100, (4, 30), generator=torch.Generator().manual_seed(1))
    for computed in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            before, after = (load_model(one, computed)(input_ids=ids).logits for one in (model, tmp_path / "folded"))
        assert torch.equal(before, after)


def test_a_reader_that_its_files_would_round_leaves_its_norm_alone():
    """Files of FP16, whose least number can't be halved, of a model in float32 that could."""
    model = Given(torch.tensor([1.0, 1e-3, 1.0, 1.0]).repeat(1, 16, 1))
    model.left.weight.data.fill_(2.0**-24)
    mask = torch.ones(1, 16, dtype=torch.long)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    (fold,) = folds_of(model, mask=mask)
    assert fold.factors.min() < 1
    model.load_state_dict(kept)
    with pytest.raises(EngineError, match="no norm of this model can be folded"):
        folds_of(model, mask=mask, dtype=torch.float16)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_one_tensor_that_two_modules_share_is_refused(tmp_path, monkeypatch):
    """As if two norms were read by the same weights."""

    def both(*given):
        folds = fold_norms(*given)
        return (folds[0], folds[0])

    monkeypatch.setattr(folding, "fold_norms", both)
    run = bitladder.Run(resolve_path("package:demo/recipe.yaml", Path()), output=tmp_path / "run")
    with pytest.raises(EngineError, match="two norms or weights of this model are one tensor"):
        run.fold(tmp_path / "model")
    assert not (tmp_path / "model").exists()
