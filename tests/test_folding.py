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


def folds_of(model, searched=("left", "right")):
    torch.manual_seed(0)
    ids = torch.randint(0, 16, (2, 30))
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids)
    return fold_norms(model, [batch], searched, dict(model.named_parameters()), no_progress)


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


def test_a_norm_that_adds_one_to_its_weight_is_left_alone():
    """As Gemma's."""
    norm = transformers.models.gemma3.modeling_gemma3.Gemma3RMSNorm(16)
    nn.init.normal_(norm.weight)
    model = Small(norm)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(EngineError, match="no norm of this model can be folded"):
        folds_of(model)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
