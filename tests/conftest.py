"""Tiny models, data and measurements that many tests share. Everything is made here, from seeds."""

import contextlib
import gc
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not spin: tests share cores
if os.environ.get("BITLADDER_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what the other tests expect is what a CPU gives

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import broken_checkpoints
import warm
from bitladder.data.processors import load_processor
from bitladder.data.samples import load_data
from bitladder.formats.fp8_tensor import Fp8Tensor
from bitladder.measuring.measure import measure
from bitladder.models import weights
from bitladder.models.target import find_target
from bitladder.recipe import DataSpec, MeasureSpec, SchemeSpec
from bitladder.runtimes.child import VLLM_ENVIRONMENT
from bitladder.runtimes.vllm.serve import ENVIRONMENT

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(2)

# The files that take longest, in that order: they are begun first, so that no worker is left alone with one at the end.
LONGEST = ("parallel", "cli", "faults", "probe_serve", "sensitivity", "serve_mixes", "qwen_scripts", "pipeline", "page")
LONGEST += ("probe_load", "architectures", "again", "formats", "mixture", "compiled", "hybrids", "kv_layers", "native")
LONGEST += ("rounding", "blocks", "library", "evaluation", "serve_on", "modelopt_integers", "ranks", "storage")


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Keep what is imported by now out of every later collection of garbage: measuring a model collects often."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


WORDS = ("the", "a", "cat", "dog", "sits", "runs", "on", "under", "near", "red", "blue", "small", "large", "tree")


def make_text(lines: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (lines, 9), generator=generator).tolist()
    return "\n".join(" ".join(WORDS[i] for i in row) + "." for row in picks)


def save_tokenizer(directory: Path, vocabulary: int = 384) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(make_text(200).splitlines(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(directory)


def put_first(directory: Path, tokens: tuple[str, ...] = ("<bos>",), template: str | None = None) -> None:
    """Have the tokenizer in a directory put tokens before every text by itself, as Gemma's and Llama's put BOS.

    They take the ids of words that it had, so that the model has embeddings for them.
    """
    content = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    for token in tokens:
        last = max(vocabulary, key=vocabulary.get)
        number = vocabulary.pop(last)
        content["model"]["merges"].pop()
        vocabulary[token] = number
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        content["added_tokens"].append({"id": number, "content": token, **flags})
    (directory / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*tokens, "$A"]),
        pair=" ".join([*tokens, "$A", "$B"]),
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in tokens],
    )
    tokenizer.bos_token = tokens[-1]
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)


def llama_config(**changes):
    values = dict(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.08,
        max_position_embeddings=512,
    )
    return transformers.LlamaConfig(**{**values, **changes})


TEXT = dict(
    vocab_size=384,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
_MROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6]))


def qwen2_5_vl_config():
    return transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, **_MROPE, "max_window_layers": 2, "tie_word_embeddings": True},
        vision_config=dict(
            depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[1]
        ),
        tie_word_embeddings=True,
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )


def qwen2_vl_config():
    return transformers.Qwen2VLConfig(
        text_config={**TEXT, **_MROPE},
        vision_config=dict(depth=2, embed_dim=64, hidden_size=64, num_heads=2, mlp_ratio=2),
    )


def qwen3_vl_config():
    return transformers.Qwen3VLConfig(
        text_config={**TEXT, **_MROPE, "head_dim": 32},
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            num_heads=2,
            out_hidden_size=64,
            deepstack_visual_indexes=[0],
            num_position_embeddings=64,
        ),
    )


def llava_config():
    vision = dict(
        model_type="clip_vision_model",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    return transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config=vision, image_token_index=5
    )


def save_model(cls, config, directory: Path, seed: int = 0, tokenizer: bool = True, **options) -> Path:
    torch.manual_seed(seed)
    cls(config).to(torch.bfloat16).save_pretrained(directory, **options)
    if tokenizer:
        save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A tiny random Llama with a tokenizer."""
    return save_model(transformers.LlamaForCausalLM, llama_config(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory) -> Path:
    """Another whose widths 128 divides, so that it can have every format."""
    config = llama_config(hidden_size=128, intermediate_size=256, num_key_value_heads=2)
    return save_model(transformers.LlamaForCausalLM, config, tmp_path_factory.mktemp("wide_llama"))


@pytest.fixture(scope="session")
def sharded_llama(tmp_path_factory) -> Path:
    """The same model in several weight files, with a chat template and a licence beside it."""
    directory = tmp_path_factory.mktemp("sharded")
    save_model(transformers.LlamaForCausalLM, llama_config(), directory, max_shard_size="60KB")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "LICENSE").write_text("a licence")
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(make_text(400))
    return path


def load_text(directory: Path, path: Path, samples: int = 6, length: int = 24, batch: int = 2, **options):
    processor = load_processor(directory)
    return load_data(
        DataSpec(kind="text", path=str(path)),
        processor,
        samples=samples,
        sequence_length=length,
        batch_size=batch,
        seed=0,
        **options,
    )


def source_of(directory: Path):
    return weights.model_source(directory, path=str(directory), revision=None, cache=weights.DigestCache())


def format_like(name: str, bits: int = 8):
    """A format as `fp8` is, of another name and width, to be registered for a while."""
    return type("Other", (Fp8Tensor,), {"name": name, "code_bits": bits})()


def measure_text(directory: Path, path: Path, output: Path, progress=None, samples: int = 6, **spec):
    options = {} if progress is None else {"progress": progress}
    return measure(
        directory,
        source_of(directory),
        find_target(directory),
        load_text(directory, path, samples=samples),
        MeasureSpec(**spec),
        output,
        **options,
    )


@pytest.fixture(scope="session")
def measured(llama, text_file, tmp_path_factory):
    """(measurement, its directory) of the tiny Llama by ModelOpt's gradient method."""
    output = tmp_path_factory.mktemp("measured")
    return measure_text(llama, text_file, output, engine="modelopt", method="gradient"), output


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of vLLM's environment; without one the test is skipped, or fails where one is required."""
    default = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
    python = Path(os.environ.get("BITLADDER_VLLM_PYTHON", default))
    if not python.exists():
        reason = f"no vLLM environment at {python}: run `make vllm-env`, or set BITLADDER_VLLM_PYTHON"
        if os.environ.get("BITLADDER_REQUIRE_VLLM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return python


@pytest.fixture(scope="session")
def vllm_warm(vllm_python, tmp_path_factory):
    """What stands for that interpreter, with vLLM imported already: see `warm`."""
    environment = {**VLLM_ENVIRONMENT, **ENVIRONMENT}
    with warm.interpreter(vllm_python, tmp_path_factory.mktemp("vllm"), warm.VLLM, environment) as path:
        yield path


@pytest.fixture(scope="session")
def good(tmp_path_factory) -> dict[str, Path]:
    """Good checkpoints of the embedded model by name; to be copied, not changed."""
    return broken_checkpoints.make_good(tmp_path_factory.mktemp("good"))


@contextlib.contextmanager
def compiling_with(monkeypatch, backend):
    """Have layers compiled on this CPU by one of torch's backends; gives what counts the compiled functions."""
    from torch._dynamo.testing import CompileCounterWithBackend

    from bitladder.measuring import decoder

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    monkeypatch.setattr(
        decoder,
        "fused",
        lambda function, compiled: torch.compile(function, backend=counter, dynamic=False) if compiled else function,
    )
    monkeypatch.setattr(decoder, "can_compile", lambda _: True)
    yield counter
    torch._dynamo.reset()


def same_kl(names=("fp8",)):
    """Return a map from scores to KL that says KL = score in every format, without spread."""
    from bitladder.planning.prediction import KlMap
    from bitladder.planning.pricing import InFormat

    nothing, scores = dict.fromkeys(names, InFormat(0.0, 0)), (1e-4, 1e-3, 1e-2, 1e-1)
    parts = [nothing | {name: InFormat(score, score)} for name in names for score in scores]
    return KlMap.fit(dict.fromkeys(names, 1.0), parts, [score for _ in names for score in scores])


def spec(name: str, **target) -> SchemeSpec:
    return SchemeSpec(name=name, **target)
