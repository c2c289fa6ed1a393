"""Model directories as people bring them: what is the model in them, what comes along, what is refused and how."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bitladder
from bitladder import verification
from bitladder.data.processors import load_processor
from bitladder.errors import BitladderError, ModelError, UnsupportedModel
from bitladder.models.loading import load_config, load_model
from bitladder.models.sources import side_files
from bitladder.models.target import find_target
from bitladder.models.weights import INDEX_FILE, SINGLE_FILE, WeightFiles
from bitladder.steps.export import export
from bitladder.steps.measure import measure
from bitladder.steps.plan import plan
from bitladder.steps.verify import verify
from conftest import llama_config, llava_config, measure_text, save_model
from test_pipeline import work_of


@pytest.fixture
def model(llama, tmp_path):
    """A copy of the tiny Llama, to be changed."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture
def shards(sharded_llama, tmp_path):
    return Path(shutil.copytree(sharded_llama, tmp_path / "shards"))


def edit(directory, name="config.json", **changes):
    path = directory / name
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def refused(directory, *says, kind=ModelError):
    """Check that inspecting is refused in one line that says this."""
    with pytest.raises(kind) as caught:
        find_target(directory)
    message = str(caught.value)
    assert "\n" not in message
    for part in says:
        assert part in message
    return message


@pytest.mark.parametrize("file", ["/etc/passwd", "../other/model.safetensors", "deep/x.safetensors", "x.bin", 7, ""])
def test_an_index_names_plain_files_beside_it(shards, file):
    index = json.loads((shards / INDEX_FILE).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (shards / INDEX_FILE).write_text(json.dumps(index))
    refused(shards, INDEX_FILE)


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_damaged_index_is_refused(shards, content):
    (shards / INDEX_FILE).write_text(content)
    refused(shards, "damaged", "fetch it again")


def test_an_index_needs_no_metadata(shards, sharded_llama):
    index = json.loads((shards / INDEX_FILE).read_text())
    (shards / INDEX_FILE).write_text(json.dumps({"weight_map": index["weight_map"]}))
    assert find_target(shards) == find_target(sharded_llama)
    loaded, right = (load_model(directory, torch.bfloat16).state_dict() for directory in (shards, sharded_llama))
    assert all(torch.equal(loaded[name], value) for name, value in right.items())


def test_an_index_may_list_what_no_file_holds_and_the_model_does_not_need(shards, sharded_llama):
    index = json.loads((shards / INDEX_FILE).read_text())
    shard = next(iter(index["weight_map"].values()))
    index["weight_map"]["mtp.fc.weight"] = shard
    (shards / INDEX_FILE).write_text(json.dumps(index))
    assert find_target(shards) == find_target(sharded_llama)
    lost = load_file(shards / shard)
    name = next(name for name in lost if name.endswith("weight"))
    save_file({key: value for key, value in lost.items() if key != name}, shards / shard, metadata={"format": "pt"})
    refused(shards, "tensors are missing")


def test_a_shard_may_have_the_name_of_a_single_file(shards, sharded_llama):
    index = json.loads((shards / INDEX_FILE).read_text())
    first = min(index["weight_map"].values())
    (shards / first).rename(shards / SINGLE_FILE)
    index["weight_map"] = {k: SINGLE_FILE if v == first else v for k, v in index["weight_map"].items()}
    (shards / INDEX_FILE).write_text(json.dumps(index))
    loaded, right = (load_model(directory, torch.bfloat16).state_dict() for directory in (shards, sharded_llama))
    assert all(torch.equal(loaded[name], value) for name, value in right.items())


def test_a_tensor_in_two_files_is_refused(shards):
    files = sorted(shards.glob("model-*.safetensors"))
    one, two = load_file(files[0]), load_file(files[1])
    name = next(iter(one))
    save_file({**two, name: one[name] + 1}, files[1], metadata={"format": "pt"})
    refused(shards, name, files[0].name, files[1].name)


STRAYS = ("consolidated.safetensors", SINGLE_FILE, "adapter_model.safetensors", "zz.safetensors")


@pytest.mark.parametrize("stray", STRAYS)
def test_only_what_the_index_names_is_the_model(shards, sharded_llama, text_file, tmp_path, stray):
    right = {name: WeightFiles.open(shards).load(name) for name in WeightFiles.open(shards).tensors}
    save_file({name: value + 1 for name, value in right.items()}, shards / stray, metadata={"format": "pt"})
    (shards / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/nowhere"})
    )
    assert find_target(shards) == find_target(sharded_llama)
    loaded = load_model(shards, torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in right.items() if name in loaded)
    work = work_of((shards, text_file, text_file), tmp_path / "out", held_out={"samples": 4, "sequence_length": 24})
    for step in (measure, plan, export, verify):
        result = step(work)
    assert result.ok
    written = {path.name for path in (tmp_path / "out/checkpoints/full").iterdir()}
    assert not written & {stray, "adapter_config.json"}


def test_side_files_come_along_and_strangers_do_not(model, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (model / "tokenizer_extra.json").symlink_to(tmp_path / "secret")
    for name in ("LICENSE", "NOTICE", "GEMMA_TERMS.html", "merges.txt", "tekken.json", "chat_template.jinja"):
        (model / name).write_text("x")
    for name in ("optimizer.pt", "events.out.tfevents", "notes.txt", ".env", "training_args.json", "README.md"):
        (model / name).write_text("x")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").write_text("x")
    found = side_files(model)
    assert {"LICENSE", "NOTICE", "GEMMA_TERMS.html", "merges.txt", "tekken.json", "chat_template.jinja"} < set(found)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} < set(found)
    assert "additional_chat_templates/tool.jinja" in found
    assert not {
        name for name in found if name.startswith(("opt", "events", "notes", ".", "training", "README", "config"))
    }
    assert "tokenizer_extra.json" not in found


def test_the_links_of_a_hubs_cache_are_followed(llama, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in llama.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert side_files(snapshot) == side_files(llama)
    assert find_target(snapshot) == find_target(llama)


@pytest.mark.parametrize("changes", [{"quantization_config": None}, {"compression_config": None}])
def test_a_null_section_about_quantisation_is_none(model, llama, text_file, tmp_path, changes):
    edit(model, **changes)
    assert find_target(model) == find_target(llama)
    work = work_of((model, text_file, text_file), tmp_path / "out", held_out={"samples": 4, "sequence_length": 24})
    for step in (measure, plan, export, verify):
        step(work)


@pytest.mark.parametrize("value", [None, [], "configuration_my.py"])
def test_an_odd_note_of_code_is_named_and_not_the_code(model, value):
    edit(model, auto_map=value)
    refused(model, "auto_map is no JSON object; remove it")


def test_quantised_models_are_refused_wherever_they_say_so(model, tmp_path):
    edit(model, quantization_config={"quant_method": "awq"})
    refused(model, "already quantised (awq)", kind=UnsupportedModel)
    edit(model, quantization_config=["fp8"])
    refused(model, "quantization_config is no JSON object")
    edit(model, quantization_config=None, compression_config={"quant_method": "compressed-tensors"})
    refused(model, "already quantised (compressed-tensors)", kind=UnsupportedModel)
    edit(model, compression_config=None)
    (model / "hf_quant_config.json").write_text("{}")
    refused(model, "already quantised (hf_quant_config.json)", kind=UnsupportedModel)
    vlm = save_model(transformers.LlavaForConditionalGeneration, llava_config(), tmp_path / "vlm", tokenizer=False)
    content = json.loads((vlm / "config.json").read_text())
    content["text_config"]["quantization_config"] = {"quant_method": "gptq"}
    (vlm / "config.json").write_text(json.dumps(content))
    refused(vlm, "already quantised (gptq)", kind=UnsupportedModel)


def mlx(name, value):
    rows, bare = len(value), name.removesuffix(".weight")
    ones = torch.ones(rows, 1).bfloat16()
    return {name: torch.zeros(rows, 8, dtype=torch.uint32), f"{bare}.scales": ones, f"{bare}.biases": ones.clone()}


def awq(name, value):
    bare = name.removesuffix(".weight")
    return {f"{bare}.qweight": torch.zeros(4, 4, dtype=torch.int32), f"{bare}.scales": torch.ones(4).half()}


def packed(name, value):
    bare = name.removesuffix(".weight")
    return {f"{bare}.weight_packed": torch.zeros(4, 4, dtype=torch.int32)}


def with_scale(name, value):
    return {name: value, f"{name}_scale": torch.ones(1)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (mlx, "MLX"),
        (awq, "AWQ"),
        (packed, "compressed-tensors"),
        (with_scale, "FP8"),
        (lambda name, value: {name: value.to(torch.float8_e4m3fn)}, "F8_E4M3"),
        (lambda name, value: {name: (10 * value).to(torch.int8)}, "I8"),
        (lambda name, value: {name: torch.zeros(len(value), 4, dtype=torch.uint8)}, "U8"),
    ],
)
def test_quantised_tensors_are_refused_where_the_configuration_does_not_say_so(model, change, says):
    changed = {}
    for name, value in load_file(model / SINGLE_FILE).items():
        changed |= change(name, value) if value.ndim == 2 and ".layers.1." in name else {name: value}
    save_file(changed, model / SINGLE_FILE, metadata={"format": "pt"})
    refused(model, "already quantised (model.layers.1.", says, "start from the original", kind=UnsupportedModel)


@pytest.mark.parametrize("content", ["[]", "7", '"x"', "{", ""])
def test_an_odd_config_is_refused(model, content):
    (model / "config.json").write_text(content)
    refused(model, "config.json")


@pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM", ["LlamaModel"], 7])
def test_odd_architectures_are_refused(model, architectures):
    edit(model, architectures=architectures)
    with pytest.raises(BitladderError) as caught:
        find_target(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", "flash_attention_2"),
        ("_attn_implementation", "flash_attention_2"),
        ("attn_implementation", {"": "kernels-community/x"}),
        ("_attn_implementation", 3),
        ("return_dict", False),
    ],
)
def test_a_key_that_a_model_cannot_be_run_with_is_to_be_removed(model, key, value):
    edit(model, **{key: value})
    refused(model, "config.json", f"Remove {key} from it", kind=UnsupportedModel)
    edit(model, **{key: {"return_dict": True}.get(key, "eager")})
    find_target(model)


def test_outputs_without_names_are_refused_in_the_language_models_section_too(tmp_path):
    save_model(transformers.LlavaForConditionalGeneration, llava_config(), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    edit(tmp_path, text_config={**content["text_config"], "return_dict": False})
    refused(tmp_path, "Remove return_dict from it", kind=UnsupportedModel)
    edit(tmp_path, text_config=content["text_config"])
    find_target(tmp_path)


def test_a_head_that_is_stored_beside_tied_embeddings(tmp_path):
    untied = llama_config(tie_word_embeddings=False)
    model = save_model(transformers.LlamaForCausalLM, untied, tmp_path / "model", tokenizer=False)
    edit(model, tie_word_embeddings=True)
    message = refused(model, "lm_head.weight has other values than model.embed_tokens.weight", "tie_word_embeddings")
    assert "remove lm_head.weight" in message
    edit(model, tie_word_embeddings=False)
    assert find_target(model).groups  # one remedy
    edit(model, tie_word_embeddings=True)
    tensors = load_file(model / SINGLE_FILE)
    head = tensors.pop("lm_head.weight")
    save_file(tensors, model / SINGLE_FILE, metadata={"format": "pt"})
    assert find_target(model).groups  # the other
    assert not torch.equal(head, tensors["model.embed_tokens.weight"])
    equal = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(equal, model / SINGLE_FILE, metadata={"format": "pt"})
    assert find_target(model).groups  # stored twice, and the same


def test_configuration_and_weights_that_do_not_belong_together_are_found_by_inspect(model):
    for changes in ({"num_hidden_layers": 2}, {"num_hidden_layers": 4}, {"intermediate_size": 256}):
        before = (model / "config.json").read_text()
        edit(model, **changes)
        refused(model, "don't belong together")
        (model / "config.json").write_text(before)


def test_the_cast_that_is_printed_for_float32_weights_works(llama, text_file, tmp_path):
    wide = tmp_path / "it's wide"
    transformers.LlamaForCausalLM(llama_config()).save_pretrained(wide)
    message = refused(wide, "stored in F32", kind=UnsupportedModel)
    command = re.search(r"Cast it: python (-c .+), copy", message)[1].replace("NEW", str(tmp_path / "new"))
    subprocess.run([sys.executable, *shlex.split(command)], check=True, capture_output=True)
    assert find_target(tmp_path / "new").groups == find_target(llama).groups


def test_norms_in_float32_stay_as_they_are(model):
    tensors = load_file(model / SINGLE_FILE)
    wide = {name: value.float() if "norm" in name else value for name, value in tensors.items()}
    save_file(wide, model / SINGLE_FILE, metadata={"format": "pt"})
    assert find_target(model).groups


def test_an_adapter_alone_is_refused(model):
    (model / SINGLE_FILE).unlink()
    (model / "adapter_config.json").write_text("{}")
    save_file({"lora_A.weight": torch.zeros(2, 2)}, model / "adapter_model.safetensors")
    refused(model, "merge it into its base model first", kind=UnsupportedModel)
    (model / "config.json").unlink()
    refused(model, "merge it into its base model first", kind=UnsupportedModel)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "chat_template.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_side_file_is_found_by_inspect(model, name, content):
    (model / name).write_text(content)
    refused(model, name)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cache_implementation", "foo"),
        ("compile_config", 3),
        ("watermarking_config", "x"),
        ("watermarking_config", {"a": 1}),
        ("max_new_tokens", "x"),
        ("num_return_sequences", 3),
        ("self", 3),
    ],
)
def test_a_value_for_generation_that_transformers_refuses_is_named_by_inspect(model, key, value):
    wanted = {"eos_token_id": 0, key: value, "temperature": 0.7, "do_sample": False}
    (model / "generation_config.json").write_text(json.dumps(wanted))
    refused(model, "generation_config.json", f"; remove {key} from it")
    del wanted[key]
    (model / "generation_config.json").write_text(json.dumps(wanted))
    find_target(model)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("eos_token_id", "abc", 'eos_token_id is "abc"; it must be a token\'s number'),
        ("eos_token_id", [1, "x"], "eos_token_id is"),
        ("eos_token_id", True, "eos_token_id is true"),
        ("repetition_penalty", "1.1", 'repetition_penalty is "1.1"; it must be a positive number'),
        ("repetition_penalty", 0, "repetition_penalty is 0"),
    ],
)
def test_what_fails_only_when_answers_are_generated_is_found_by_inspect(model, key, value, words):
    (model / "generation_config.json").write_text(json.dumps({key: value}))
    refused(model, "generation_config.json", words)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "repetition_penalty": 1.1}))
    find_target(model)


def test_of_several_refused_values_for_generation_one_is_named_after_the_other(model):
    wanted = {"cache_implementation": "foo", "compile_config": 3, "top_k": 5}
    (model / "generation_config.json").write_text(json.dumps(wanted))
    for key in ("cache_implementation", "compile_config"):
        refused(model, f"; remove {key} from it")
        del wanted[key]
        (model / "generation_config.json").write_text(json.dumps(wanted))
    find_target(model)


@pytest.mark.parametrize("known", [True, False])
def test_code_that_comes_with_a_model_is_never_run(model, known, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    ran = model / "ran"
    for name in ("configuration_my.py", "modeling_my.py", "tokenization_my.py"):
        (model / name).write_text(f"open({str(ran)!r}, 'w')")
    edit(model, auto_map={"AutoConfig": "configuration_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyLLM"})
    edit(model, "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_my.MyTokenizer", None]})
    if known:
        assert find_target(model).groups
        load_model(model, torch.float32)
    else:
        edit(model, model_type="my_llm", architectures=["MyLLMForCausalLM"])
        refused(model, "code of its own", "isn't run", kind=UnsupportedModel)
    assert not ran.exists()


def test_verification_reads_the_originals_own_files(shards):
    save_file({"stray": torch.zeros(1)}, shards / "consolidated.safetensors")
    assert {path.name for path in verification.weight_files(shards)} == set(WeightFiles.open(shards).files)


def test_a_projection_of_tiny_weights_stays_in_sixteen_bits(model, text_file, tmp_path):
    tensors = load_file(model / SINGLE_FILE)
    name = "model.layers.1.mlp.down_proj"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"] * 1e-36
    save_file(tensors, model / SINGLE_FILE, metadata={"format": "pt"})
    measured = measure_text(model, text_file, tmp_path / "out")
    assert name not in {group.name for group in measured.groups}
    assert "too small" in next(module.reason for module in measured.untouched if module.name == name)


def test_a_tokenizer_that_is_not_there_is_said_so(model):
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer.json.*fetch the tokenizer's files"):
        load_processor(model)


def test_every_loader_that_could_run_a_models_own_code_is_told_not_to():
    """Left to its default, transformers asks at a terminal whether to run it."""
    loaders = []
    for path in sorted(Path(bitladder.__file__).parent.rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)):
            owner = getattr(getattr(call.func, "value", None), "id", "")
            if owner.startswith("Auto") and call.func.attr in ("from_pretrained", "from_config"):
                options = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
                assert options.get("trust_remote_code") is False, f"{path.name} line {call.lineno}"
                loaders.append(path.name)
    assert {"loading.py", "processors.py", "packaged.py"} <= set(loaders)


@pytest.mark.parametrize("read", [load_config, load_processor])
def test_nobody_is_asked_whether_to_run_a_models_own_code(tmp_path, monkeypatch, read):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what a user at a terminal may answer
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    content = {"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    tokenizer = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="code of its own"):
        read(tmp_path)
    assert not (tmp_path / "ran").exists()
