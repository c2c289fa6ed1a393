"""Folded models compute what the original does, to the bit; channels become even; what can't be folded is refused."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

import bitladder
from bitladder.checkpoints.folded import write_folded
from bitladder.data.batches import Batch
from bitladder.errors import EngineError, ModelError, OutputError
from bitladder.formats import get_format
from bitladder.measuring.folding import fold_norms
from bitladder.models.loading import load_model
from bitladder.models.weights import WeightFiles
from bitladder.recipe import resolve_path
from bitladder.runinfo import no_progress

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
    write_folded(sharded_llama, tmp_path / "out", {name: torch.full((64,), 0.5)}, "halved")
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
        write_folded(tmp_path / "in", tmp_path / "out", {"norm.weight": torch.full((4,), 0.5)}, "halved")
    assert not (tmp_path / "out").exists()


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


def folds_of(model, searched=("left", "right"), *, mask=None, unknown=None):
    """Fold a model; `unknown`: a parameter that isn't stored as it is."""
    torch.manual_seed(0)
    ids = torch.randint(0, 16, (2, 30) if mask is None else mask.shape)
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}, ids)
    stored = dict(model.named_parameters()).keys() - {unknown}
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
def test_what_the_files_hold_otherwise_is_left_alone(unknown):
    """A parameter that transformers makes of several tensors, say."""
    model = Small(norm_with(4.0))
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


def test_a_norm_that_adds_one_to_its_weight_is_left_alone():
    """As Gemma's."""
    norm = transformers.models.gemma3.modeling_gemma3.Gemma3RMSNorm(16)
    nn.init.normal_(norm.weight)
    model = Small(norm)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(EngineError, match="no norm of this model can be folded"):
        folds_of(model)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
