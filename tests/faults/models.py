"""Damaged models: weights, headers, index, configuration, tokenizer, side files.

A run refuses one in a line, or makes checkpoints of just this model: `reading.wrong_in_checkpoint`.
"""

import json
import math
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from faults import damage, reading
from faults.damage import Mutant
from faults.reading import Tensor
from faults.server import Server
from faults.verdict import REFUSED, WRONG, Failed, Result, Trial, judged
from faults.world import World

KIND = "model mutant"
_FILE, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
Make = Callable[[random.Random, World], Mutant]


def _whole_file(rng: random.Random, world: World) -> Mutant:
    name = rng.choice((_FILE, _FILE, _CONFIG, "tokenizer.json", "tokenizer_config.json", "generation_config.json"))
    how, seed = rng.choice(damage.WHOLE_FILE), rng.random()
    return Mutant(f"{how.__name__} {name}", lambda where: how(random.Random(seed), where / name))


def _header_bit(rng: random.Random, world: World) -> Mutant:
    at, bit = rng.random(), rng.randrange(8)

    def apply(where: Path) -> None:
        content = bytearray((where / _FILE).read_bytes())
        (length,) = struct.unpack("<Q", content[:8])
        content[8 + int(at * length)] ^= 1 << bit
        (where / _FILE).write_bytes(content)

    return Mutant(f"flip bit {bit} at {at:.4f} of the header", apply)


def _header_length(rng: random.Random, world: World) -> Mutant:
    value = rng.choice((0, 1, 2, 2**20, 2**31, 2**60, 2**63, 2**64 - 1, rng.randrange(5000)))

    def apply(where: Path) -> None:
        (where / _FILE).write_bytes(struct.pack("<Q", value) + (where / _FILE).read_bytes()[8:])

    return Mutant(f"header of {value} bytes", apply)


def _header_entry(rng: random.Random, world: World) -> Mutant:
    key, value = rng.choice(
        [("dtype", v) for v in ("F16", "I16", "XX", ["BF16"], "F4", 3, None, "F32")]
        + [("shape", v) for v in ([-16, -16], [2**62, 2**62], [0], "64", [[64], 64], [256], [], None, [8, 32], [True])]
        + [
            ("data_offsets", v)
            for v in ([-64, 0], [64, 0], [2**60, 2**60 + 8], [0.0, 512.0], ["0", "512"], [0], [0, 1, 2])
        ]
        + [("data_offsets", [2, 514]), ("extra", 1), ("data_offsets", None)]
    )
    name = _tensor_name(rng, world)

    def apply(where: Path) -> None:
        header, data = reading.split(where / _FILE)
        header[name][key] = value
        reading.join(where / _FILE, header, data)

    return Mutant(f"{name}: {key} = {value}", apply)


def _header_whole(rng: random.Random, world: World) -> Mutant:
    name, raw = rng.choice(
        (
            ("a list", b"[]"),
            ("nothing", b"{}"),
            ("deep", b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
            ("metadata no text", None),
            ("the same key twice", None),
            ("not UTF-8", b'{"\xff": 1}'),
        )
    )

    def apply(where: Path) -> None:
        header, data = reading.split(where / _FILE)
        content: Any = raw
        if name == "metadata no text":
            content = {**header, "__metadata__": {"format": 1}}
        elif name == "the same key twice":
            key = "model.layers.1.self_attn.q_proj.weight"
            twin = header["model.layers.0.self_attn.q_proj.weight"]
            content = (json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(twin)}}}").encode()
        reading.join(where / _FILE, content, data)

    return Mutant(f"header: {name}", apply, must_refuse=True)


def _tensor_name(rng: random.Random, world: World) -> str:
    return rng.choice(sorted(reading.tensors(world.model / _FILE)))


def _bfloat16(values: np.ndarray) -> bytes:
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def _special_value(rng: random.Random, world: World) -> Mutant:
    name = _tensor_name(rng, world)
    value = rng.choice((math.nan, math.inf, -math.inf, 3e38, 1e-40, 0.0))
    share = rng.choice((0.0, 0.0, 1.0))

    def apply(where: Path) -> None:
        content = reading.tensors(where / _FILE)
        values = content[name].values().ravel()
        values[: max(1, int(share * len(values)))] = value
        content[name] = replace(content[name], data=_bfloat16(values))
        reading.write(where / _FILE, content)

    return Mutant(f"{name}: {value} in {share:.0%}", apply, must_refuse=not math.isfinite(value))


def _other_tensor(rng: random.Random, world: World) -> Mutant:
    name = _tensor_name(rng, world)
    how = rng.choice(
        [
            "missing",
            "transposed",
            "half",
            "F32",
            "F16",
            "F64",
            "I8",
            "BOOL",
            "F8_E4M3",
            "scalar",
            "3d",
            "noise",
            "prefix",
        ]
    )
    seed = rng.random()

    def apply(where: Path) -> None:
        content = reading.tensors(where / _FILE)
        tensor = content.pop(name)
        values, shape = tensor.values(), tensor.shape
        if how == "transposed":
            content[name] = Tensor("BF16", shape[::-1], _bfloat16(values.T.ravel()))
        elif how == "half":
            content[name] = Tensor("BF16", (shape[0] // 2, *shape[1:]), tensor.data[: len(tensor.data) // 2])
        elif how in ("F32", "F16", "F64"):
            content[name] = Tensor(how, shape, values.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[how]).tobytes())
        elif how in ("I8", "BOOL", "F8_E4M3"):
            content[name] = Tensor(how, shape, bytes(i % 2 for i in range(math.prod(shape))))
        elif how == "scalar":
            content[name] = Tensor("BF16", (), tensor.data[:2])
        elif how == "3d":
            content[name] = replace(tensor, shape=(1, *shape))
        elif how == "noise":
            content[name] = replace(tensor, data=random.Random(seed).randbytes(len(tensor.data)))
        elif how == "prefix":
            content["x." + name] = tensor
        reading.write(where / _FILE, content)

    wrong = ("missing", "half", "scalar", "3d", "prefix")
    return Mutant(f"{name}: {how}", apply, must_refuse=how in wrong)


def _more_tensors(rng: random.Random, world: World) -> Mutant:
    query = "model.layers.1.self_attn.q_proj."
    name = rng.choice(
        ("extra.weight", query + "weight_scale", query + "input_scale", "lm_head.weight", "a\nb", "", "é")
    )

    def apply(where: Path) -> None:
        content = reading.tensors(where / _FILE)
        content[name] = Tensor("BF16", (4, 4), bytes(32))
        reading.write(where / _FILE, content)

    return Mutant(f"one more tensor {name!r}", apply)


def _index(rng: random.Random, world: World) -> Mutant:
    table = json.loads((world.sharded / _INDEX).read_text())["weight_map"]
    name = rng.choice(sorted(table))
    other = rng.choice(sorted(set(table.values()) - {table[name]}))
    value = rng.choice(
        (
            "absent.safetensors",
            "../base/llama/model.safetensors",
            "../../around/another_model/model.safetensors",
            str(world.around / "another_model" / _FILE),
            str(world.around / "notes.safetensors"),
            "a/b.safetensors",
            3,
            None,
            "a\0b",
            "",
            ".",
            "..",
            other,
            "x" * 300,
            "config.json",
            [other],
        )
    )
    how = rng.choice(("value", "value", "value", "no map", "list map", "empty", "lost key", "total", "list", "extra"))

    def apply(where: Path) -> None:
        content = json.loads((where / _INDEX).read_text())
        if how == "value":
            content["weight_map"][name] = value
        elif how == "lost key":
            del content["weight_map"][name]
        elif how == "extra":
            content["weight_map"]["zz.weight"] = other
        elif how == "total":
            content["metadata"]["total_size"] = 1
        else:
            content = {"no map": {}, "list map": {"weight_map": []}, "empty": {"weight_map": {}}, "list": [1]}[how]
        (where / _INDEX).write_text(json.dumps(content))

    # Who reads a model reads whole files, whatever tensors the index says are in them; it may list more than there is.
    refuse = how not in ("total", "extra") and not (how == "value" and value == other)
    return Mutant(f"sharded: index {how} {name} -> {str(value)[:60]!r}", apply, must_refuse=refuse)


def _shards(rng: random.Random, world: World) -> Mutant:
    first, second = rng.sample(sorted(p.name for p in world.sharded.glob("*.safetensors")), 2)
    how = rng.choice(("exchanged", "twice", "missing", "flip", "index missing", "stray"))
    seed = rng.random()

    def apply(where: Path) -> None:
        a, b = where / first, where / second
        if how == "exchanged":
            content = a.read_bytes(), b.read_bytes()
            a.write_bytes(content[1])
            b.write_bytes(content[0])
        elif how == "twice":
            both = reading.tensors(a)
            name, tensor = next(iter(reading.tensors(b).items()))
            reading.write(a, {**both, name: replace(tensor, data=bytes(len(tensor.data)))})
        elif how == "stray":
            shutil.copy(a, where / "model-00099-of-00099.safetensors")
        else:
            path = where / _INDEX if how == "index missing" else a
            (damage.flip_bit if how == "flip" else damage.remove)(random.Random(seed), path)

    return Mutant(f"sharded: {how} {first} {second}", apply, must_refuse=how in ("twice", "missing"))


_VALUES: tuple[Any, ...] = (None, "x", -1, 0, [1], {"a": 1}, 10**12, math.nan, True, 3, 1e300, "../x", [], {})


def _config(rng: random.Random, world: World) -> Mutant:
    config = json.loads((world.model / _CONFIG).read_text())
    key = rng.choice(sorted(config))
    how = rng.choice(("set", "set", "set", "delete", "special"))
    value = rng.choice(_VALUES)
    special = rng.choice(
        (
            {"architectures": ["AutoModelForCausalLM"]},
            {"architectures": ["pipeline"]},
            {"architectures": "LlamaForCausalLM"},
            {"architectures": ["BertForMaskedLM"]},
            {"architectures": ["logging"]},
            {"model_type": "qwen2"},
            {"quantization_config": {"quant_method": "fp8"}},
            {"quantization_config": "x"},
            {"num_hidden_layers": 3},
            {"num_hidden_layers": 1},
            {"tie_word_embeddings": False},
            {"rope_parameters": {"rope_type": "zzz"}},
            {"attn_implementation": "evil/kernel"},
            {"_attn_implementation": "evil/kernel"},
            {"hidden_size": 32},
            {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
            {"torch_dtype": "float7"},
            {"vocab_size": 10},
            {"max_position_embeddings": 4},
            {"head_dim": 3},
            {"num_key_value_heads": 7},
        )
    )

    def apply(where: Path) -> None:
        content = json.loads((where / _CONFIG).read_text())
        if how == "set":
            content[key] = value
        elif how == "delete":
            del content[key]
        else:
            content.update(special)
        (where / _CONFIG).write_text(json.dumps(content))

    return Mutant(f"config: {special if how == 'special' else (how, key, value)}", apply)


def _tokenizer(rng: random.Random, world: World) -> Mutant:
    name, seed = rng.choice(("tokenizer.json", "tokenizer_config.json")), rng.random()
    return Mutant(f"edit {name} by {seed:.4f}", lambda where: damage.edit_json(random.Random(seed), where / name))


def _side_file(rng: random.Random, world: World) -> Mutant:
    name = rng.choice(
        (
            "LICENSE",
            "modeling_evil.py",
            "x.json",
            "a\nb.txt",
            "bitladder_manifest.json",
            "hf_quant_config.json",
            "preprocessor_config.json",
            "adapter_config.json",
            "chat_template.jinja",
            "pytorch_model.bin",
            "a.pkl",
            "special_tokens_map.json",
            "generation_config.json",
            "README.md",
        )
    )
    how = rng.choice(("text", "json", "link out", "dangling", "fifo", "directory", "large"))

    def apply(where: Path) -> None:
        path = where / name
        path.unlink(missing_ok=True)
        if how == "text":
            path.write_text("cposix\nsystem\n(S'touch evil'\ntR.")
        elif how == "json":
            path.write_text("{}")
        elif how == "link out":
            path.symlink_to(world.around / "private" / "key")
        elif how == "dangling":
            path.symlink_to("/absent/file")
        elif how == "fifo":
            os.mkfifo(path)
        elif how == "directory":
            path.mkdir()
        else:
            path.write_bytes(bytes(20 << 20))

    return Mutant(f"side file {name!r}: {how}", apply)


_MAKERS: tuple[Make, ...] = (
    _whole_file,
    _header_bit,
    _header_length,
    _header_entry,
    _header_whole,
    _special_value,
    _other_tensor,
    _more_tensors,
    _index,
    _index,
    _shards,
    _config,
    _config,
    _config,
    _tokenizer,
    _side_file,
)


def trial(server: Server, world: World, mutant: Mutant) -> Result:
    """Return the result of one damaged model."""
    world.clear()
    model = world.trial / "model"
    shutil.copytree(world.sharded if mutant.name.startswith("sharded") else world.model, model)
    mutant.apply(model)
    recipe = world.write(world.recipe(model={"path": str(model)}))
    results: list[Result] = []
    with judged(results, KIND, mutant.name) as held:
        trial_ = Trial(server, world)
        if trial_.refused(trial_.run("run", recipe)):
            held.append(REFUSED)
        else:
            _check(trial_, mutant, recipe, model)
    return results[0]


def _check(trial_: Trial, mutant: Mutant, recipe: Path, model: Path) -> None:
    """Raise `Failed` where what came of a damaged model isn't right."""
    if mutant.must_refuse:
        raise Failed(WRONG, "taken, though no result of it can be right")
    trial_.no_leftovers()
    if trial_.refused(trial_.run("verify", recipe)):
        raise Failed(WRONG, "`verify` refuses what `run` accepted")
    for name in ("half", "full"):
        checkpoint = trial_.world.out / "checkpoints" / name
        try:
            wrong = reading.wrong_in_checkpoint(model, checkpoint)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            wrong = f"the model can't be read: {error!r}"
        links = [path.name for path in checkpoint.rglob("*") if path.is_symlink()]
        if any(b"secret" in path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()):
            wrong = "a file from outside the model came along"
        scores = (trial_.world.out / "evaluations" / f"{name}.json").read_text()
        if wrong or links or "NaN" in scores or "Infinity" in scores:
            raise Failed(WRONG, wrong or f"links {links}, or numbers that are none")


def mutants(server: Server, world: World, seed: int, count: int) -> Iterator[Result]:
    """Yield the results of `count` damaged models."""
    rng = random.Random(f"model {seed}")
    for number in range(count):
        yield trial(server, world, _MAKERS[number % len(_MAKERS)](rng, world))
