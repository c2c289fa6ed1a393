"""Decoders of all kinds, tiny and random: each ends with verified checkpoints, or is refused by `inspect` in one line.

The whole table is docs/architectures.md, made by benchmarks/architectures.py; this is a representative part of it.
"""

import json
from pathlib import Path

import pytest
from transformers.models.auto import modeling_auto as auto

import tiny_architectures
from bitladder.errors import BitladderError, UnsupportedModel
from bitladder.models.target import find_target
from bitladder.steps.export import export
from bitladder.steps.measure import measure
from bitladder.steps.plan import plan
from bitladder.steps.preflight import preflight
from bitladder.steps.verify import verify
from bitladder.steps.workspace import Workspace

ROOT = Path(__file__).parents[1]
REMEDY = "use engine: modelopt"

VERIFIED = (
    # like Llama: biases, shapes that FP8 products can't take, windows, norms of query and key, soft caps
    "LlamaForCausalLM",
    "LlamaForCausalLM:biases",
    "LlamaForCausalLM:odd-heads",
    "LlamaForCausalLM:odd-mlp",
    "MistralForCausalLM",
    "Qwen3ForCausalLM",
    "Olmo2ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "DiffLlamaForCausalLM",
    # without a gate in the MLP
    "NemotronForCausalLM",
    "ArceeForCausalLM",
    "ApertusForCausalLM",
    # fused on disk
    "Phi3ForCausalLM",
    "GlmForCausalLM",
    # attention and MLP side by side, other names of blocks, norms and heads, scaled logits
    "CohereForCausalLM",
    "Cohere2ForCausalLM",
    "PhiForCausalLM",
    "ProphetNetForCausalLM",  # a linear called relative_pos_embeddings
    "RwkvForCausalLM",  # key and value without a query
    "GPTNeoXForCausalLM",
    "GPTJForCausalLM",
    "OPTForCausalLM",
    "FalconForCausalLM",
    "FalconForCausalLM:new",
    # latent attention
    "MiniCPM3ForCausalLM",
    "DeepseekV3ForCausalLM:dense",
    # hybrids
    "Qwen3_5ForCausalLM",
    "Qwen3NextForCausalLM:dense",
    "Lfm2ForCausalLM",
    "BambaForCausalLM",
    "FalconH1ForCausalLM",
    "GraniteMoeHybridForCausalLM:dense",
    "JambaForCausalLM:dense",
    "NemotronHForCausalLM:dense",
    # that see
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "ChameleonForConditionalGeneration",
    "Emu3ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "AyaVisionForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "Molmo2ForConditionalGeneration",  # q/k/v and gate/up fused on disk, split on loading
    "Lfm2VlForConditionalGeneration",
)
# Shapes of their own: carried, or refused by `inspect`.
EITHER = (
    "BloomForCausalLM",
    "CodeGenForCausalLM",
    "FalconForCausalLM:alibi",
    "FuyuForCausalLM",
    "Gemma3nForCausalLM",
    "MambaForCausalLM",
    "MptForCausalLM",
    "Qwen2AudioForConditionalGeneration",
    "RecurrentGemmaForCausalLM",
    "Zamba2ForCausalLM",
    "xLSTMForCausalLM",  # a cache class of its own
)
EXPERTS, DECODERS_ONLY = "mixtures of experts are not supported", "decoder-only language models"
REFUSED = {
    "BertLMHeadModel": DECODERS_ONLY,
    "DeepseekV3ForCausalLM": EXPERTS,
    "GPT2LMHeadModel": "no torch.nn.Linear",
    "GptOssForCausalLM": EXPERTS,
    "JambaForCausalLM": EXPERTS,
    "MixtralForCausalLM": EXPERTS,
    "Qwen3MoeForCausalLM": EXPERTS,
    "Qwen3VLMoeForConditionalGeneration": EXPERTS,
    "T5Gemma2ForConditionalGeneration": "is an encoder-decoder",
    "UdopForConditionalGeneration": "is an encoder-decoder",
}


def measured(model: Path, output: Path) -> Workspace:
    """Return the workspace with a measurement: by the native engine, or by the one that it says to use."""
    work = tiny_architectures.workspace(model, output / "native", "native")
    try:
        measure(work)
    except BitladderError as error:
        assert REMEDY in str(error), error
        work = tiny_architectures.workspace(model, output / "modelopt", "modelopt")
        measure(work)
    return work


def ends_verified(model: Path, output: Path) -> None:
    work = measured(model, output)
    schemes = plan(work)
    export(work)
    verification = verify(work)
    assert {c.scheme: c.ok for c in verification.checkpoints} == {scheme.name: True for scheme in schemes}
    assert all(c.codes_checked for c in verification.checkpoints)
    errors = [(r.runtime, f) for r in preflight(work) for f in r.findings if f.severity == "error"]
    assert not errors, errors[0]


@pytest.mark.parametrize("name", VERIFIED)
def test_this_architecture_ends_with_verified_checkpoints(name, tmp_path):
    ends_verified(tiny_architectures.build(name, tmp_path / "model"), tmp_path)


@pytest.mark.parametrize("name", EITHER)
def test_this_architecture_ends_verified_or_is_refused_by_inspect(name, tmp_path):
    model = tiny_architectures.build(name, tmp_path / "model")
    try:
        find_target(model)
    except UnsupportedModel as error:
        assert "\n" not in str(error)
        assert REMEDY not in str(error)
    else:
        ends_verified(model, tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_this_architecture_is_refused_by_inspect(name, tmp_path):
    model = tiny_architectures.build(name, tmp_path / "model")
    with pytest.raises(UnsupportedModel, match=REFUSED[name]) as caught:
        find_target(model)
    assert "\n" not in str(caught.value)


def test_the_list_has_every_decoder_that_transformers_names():
    listed = {model_type for entry in tiny_architectures.architectures().values() for model_type in entry.model_types}
    assert listed >= set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) | set(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    tables = {*tiny_architectures.VARIANTS, *tiny_architectures.OVERRIDES, *tiny_architectures.NOT_DECODERS}
    # classes that another release of transformers may not have
    assert len(tables - set(tiny_architectures.architectures())) < len(tables) / 4


def test_the_page_shows_what_was_measured():
    result = json.loads((ROOT / "benchmarks" / "results" / "architectures.json").read_text())
    page = (ROOT / "docs" / "architectures.md").read_text()
    for name, entry in result["architectures"].items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert row.count(" ok |") == sum(cell == "ok" for cell in entry["cells"].values()), name
