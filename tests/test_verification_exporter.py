"""What an exporter and its manifest agree about is not believed: every mutant is sealed again, and found all the same.

The checkpoint has several weight files, side files and an FP8 KV cache. After each change the manifest is written anew
from what lies there (names, digests, scales), so that only the comparison with source, scheme and measurement can tell.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitladder import planning
from bitladder.checkpoints.export import export
from bitladder.measured import read_amax
from bitladder.records import CheckpointManifest, FileDigest
from bitladder.storage import sha256_of_file
from bitladder.verification import verify
from conftest import measure_text, spec

CONFIG, LEGACY, INDEX = "config.json", "hf_quant_config.json", "model.safetensors.index.json"
ABSENT = object()


@pytest.fixture(scope="module")
def exported(sharded_llama, text_file, tmp_path_factory):
    """(function that verifies a directory, intact checkpoint)."""
    output = tmp_path_factory.mktemp("exported")
    measurement = measure_text(sharded_llama, text_file, output, samples=2)
    amax = read_amax(measurement, output)
    scheme = planning.plan(measurement, spec("half", coverage=0.5, kv_cache="fp8"))
    export(scheme, measurement, amax, sharded_llama, output / "half")

    def findings(directory):
        return verify([scheme], measurement, amax, sharded_llama, {"half": directory}).checkpoints[0].findings

    return findings, output / "half"


@pytest.fixture
def mutant(exported, tmp_path):
    """(function that seals and verifies, a copy of the checkpoint)."""
    findings, intact = exported
    shutil.copytree(intact, tmp_path / "half")
    return lambda: findings(sealed(tmp_path / "half")), tmp_path / "half"


def sealed(directory):
    """Write the manifest of what lies in a directory: the files, their digests, the scales of what it lists."""
    path = directory / CheckpointManifest.FILE_NAME
    manifest = CheckpointManifest.read(path)
    own = {path.name, CheckpointManifest.CARD_NAME}
    files = [p for p in sorted(directory.rglob("*")) if p.is_file() and p.name not in own]
    found = {}
    for file in files:
        if file.suffix == ".safetensors":
            found |= {name: float(value) for name, value in load_file(file).items() if value.numel() == 1}
    entries = tuple(
        FileDigest(name=f.relative_to(directory).as_posix(), sha256=sha256_of_file(f), bytes=f.stat().st_size)
        for f in files
    )
    modules = tuple(
        module.model_copy(
            update={kind: found[f"{module.tensor.removesuffix('.weight')}.{kind}"] for kind in KINDS_OF_SCALE}
        )
        for module in manifest.modules
    )
    scales = tuple(entry.model_copy(update={"scale": found[entry.tensor]}) for entry in manifest.kv_scales)
    manifest.model_copy(update={"files": entries, "modules": modules, "kv_scales": scales}).write(path)
    return directory


KINDS_OF_SCALE = ("weight_scale", "input_scale")


def told(findings):
    return [f"{f.file}: {f.tensor}: {f.problem}" for f in findings]


def one(findings, *words):
    """Return whether a finding holds all words."""
    return any(all(word in text for word in words) for text in told(findings))


def placed(directory):
    return json.loads((directory / INDEX).read_text())["weight_map"]


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_intact_one_passes_and_sealing_changes_nothing(exported, mutant):
    findings, intact = exported
    assert findings(intact) == ()
    check, directory = mutant
    assert check() == ()
    name = CheckpointManifest.FILE_NAME
    read = CheckpointManifest.read
    assert sorted(read(directory / name).files, key=str) == sorted(read(intact / name).files, key=str)
    assert len(set(placed(directory).values())) > 2


@pytest.mark.parametrize("kind", ["weight_scale", "input_scale", "k_scale", "v_scale"])
def test_a_scale_that_the_manifest_has_too(kind, mutant):
    check, directory = mutant
    tensor = next(name for name in sorted(placed(directory)) if name.endswith(f".{kind}"))
    edit_tensors(directory / placed(directory)[tensor], lambda t: t[tensor].mul_(2))
    origin = "the source's weights give" if kind == "weight_scale" else "what calibration saw gives"
    found = check()
    assert one(found, tensor, origin), told(found)
    assert one(found, CheckpointManifest.FILE_NAME, kind if kind.endswith("t_scale") else tensor)  # it lies as well


@pytest.mark.parametrize("how", ["nearest", "scaled with its codes"])
def test_a_weight_scale_and_codes_that_agree_are_still_not_the_source_s(how, mutant):
    """Codes of half the size at twice the scale restore nearly the same weights."""
    check, directory = mutant
    tensor = next(name for name in sorted(placed(directory)) if name.endswith(".weight_scale"))
    weight = f"{tensor.removesuffix('_scale')}"

    def change(tensors):
        tensors[tensor].mul_(2)
        if how == "scaled with its codes":
            tensors[weight] = (tensors[weight].float() / 2).to(torch.float8_e4m3fn)

    file = placed(directory)[tensor]
    assert placed(directory)[weight] == file
    edit_tensors(directory / file, change)
    assert one(check(), tensor, "the source's weights give")


def test_a_tensor_in_two_files(mutant):
    check, directory = mutant
    files = sorted(set(placed(directory).values()))
    tensor = next(name for name, file in placed(directory).items() if file == files[0])
    value = load_file(directory / files[0])[tensor]
    edit_tensors(directory / files[1], lambda t: t.update({tensor: value}))
    assert one(check(), files[1], tensor, f"lies in {files[0]} too")


def test_a_tensor_in_another_file_than_in_the_source(mutant):
    """The index says so as well, and the manifest lists both files as they are."""
    check, directory = mutant
    files = sorted(set(placed(directory).values()))
    tensor = next(name for name, file in placed(directory).items() if file == files[0])
    value = load_file(directory / files[0])[tensor]
    edit_tensors(directory / files[0], lambda t: t.pop(tensor))
    edit_tensors(directory / files[1], lambda t: t.update({tensor: value}))
    edit_json(directory / INDEX, lambda c: c["weight_map"].update({tensor: files[1]}))
    found = check()
    assert one(found, files[1], tensor, f"lies in {files[0]}"), told(found)
    assert one(found, INDEX, tensor, files[0])


INDICES = {
    "total_size": (lambda c: c["metadata"].update(total_size=c["metadata"]["total_size"] + 1), "metadata.total_size"),
    "no total_size": (lambda c: c["metadata"].pop("total_size"), "total_size is missing"),
    "metadata": (lambda c: c["metadata"].update(author="me"), "metadata.author"),
    "a tensor too many": (lambda c: c["weight_map"].update(spare="model-00001-of-00002.safetensors"), "spare"),
    "a tensor missing": (lambda c: c["weight_map"].pop("model.norm.weight"), "model.norm.weight is missing"),
    "elsewhere": (lambda c: c["weight_map"].update({"model.norm.weight": "x.safetensors"}), "x.safetensors"),
    "a key": (lambda c: c.update(note=1), "note is 1, it should not be there"),
}


@pytest.mark.parametrize("kind", INDICES)
def test_the_index(kind, mutant):
    check, directory = mutant
    change, words = INDICES[kind]
    edit_json(directory / INDEX, change)
    assert one(check(), INDEX, words)


@pytest.mark.parametrize("name", ["zz.safetensors", "notes.txt", "sub/notes.txt", "pytorch_model.bin"])
def test_a_file_too_many_though_the_manifest_lists_it(name, mutant):
    check, directory = mutant
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_bytes((directory / sorted(set(placed(directory).values()))[0]).read_bytes())
    found = check()
    assert one(found, f"{name}: None: listed in the manifest, but"), told(found)
    assert one(found, CheckpointManifest.FILE_NAME, name, "must not have")


def test_an_empty_directory_too_many(mutant):
    check, directory = mutant
    (directory / "empty").mkdir()
    assert one(check(), "empty: None: not listed")


def side_files(directory):
    named = {
        CONFIG,
        LEGACY,
        INDEX,
        CheckpointManifest.FILE_NAME,
        CheckpointManifest.CARD_NAME,
        *placed(directory).values(),
    }
    return sorted({path.name for path in directory.iterdir()} - named)


def test_a_side_file_that_the_manifest_knows_as_it_is(exported, mutant):
    check, directory = mutant
    names = side_files(directory)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE"} <= {
        *names
    }
    for name in names:
        original = (directory / name).read_bytes()
        (directory / name).write_bytes(bytes([original[0] ^ 1]) + original[1:])  # of the same length
        assert told(check()) == [f"{name}: None: differs from the source's, byte for byte"]
        (directory / name).write_bytes(original)


def test_a_side_file_missing_though_the_manifest_misses_none(mutant):
    check, directory = mutant
    (directory / "chat_template.jinja").unlink()
    found = check()
    assert one(found, "chat_template.jinja: None: missing")
    assert one(found, CheckpointManifest.FILE_NAME, "chat_template.jinja", "doesn't list")


def paths_of(content, path=()):
    """Yield the path of every value that is no object, and of every object."""
    for key, value in content.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from paths_of(value, (*path, key))


def holder_of(content, path):
    for key in path[:-1]:
        content = content[key]
    return content


def other(value):
    """Return a value of the same type (or near it) that isn't this one."""
    if isinstance(value, bool) or value is None:
        return 1
    if isinstance(value, str):
        return f"{value} "
    return value + 1 if isinstance(value, int | float) else [1] if value == [] else []


@pytest.mark.parametrize("file", [CONFIG, LEGACY])
def test_the_configurations_key_by_key(file, mutant):
    """Every key is changed, in another go dropped, and every object gets a key too many."""
    check, directory = mutant
    path = directory / file
    intact = path.read_text()
    keys = list(paths_of(json.loads(intact)))
    leaves = [key for key in keys if not isinstance(holder_of(json.loads(intact), key)[key[-1]], dict)]
    objects = [(), *(key for key in keys if key not in leaves)]
    assert len(leaves) > len(objects) > 1  # so that the loop leaves out no object
    for index, changed in enumerate(leaves):
        content = json.loads(intact)
        dropped, grown = leaves[index - 1], (*objects[index % len(objects)], "added")
        holder = holder_of(content, changed)
        holder[changed[-1]] = other(holder[changed[-1]])
        del holder_of(content, dropped)[dropped[-1]]
        holder_of(content, grown)["added"] = 1
        path.write_text(json.dumps(content))
        found = told(check())
        assert len(found) == 3, (changed, dropped, grown, found)
        for where, how in ((changed, ""), (dropped, "is missing"), (grown, "is 1, it should not be there")):
            assert any(text.startswith(f"{file}: None: {'.'.join(where)} {how}") for text in found), (where, how, found)


def lists_of(directory):
    config, legacy = (json.loads((directory / name).read_text()) for name in (CONFIG, LEGACY))
    return config, legacy, config["quantization_config"]["ignore"], legacy["quantization"]["exclude_modules"]


EXCLUDES = {
    "one less": (lambda names: names.pop(0), "lacks"),
    "one more": (lambda names: names.append("model.layers.9.mlp.up_proj"), "model.layers.9.mlp.up_proj"),
    "a wildcard": (lambda names: names.append("model.layers.1*"), "model.layers.1*"),
    "twice": (lambda names: names.append(names[0]), "another order or number"),
    "reversed": (lambda names: names.reverse(), "another order or number"),
    "empty": (lambda names: names.clear(), "lacks"),
}


@pytest.mark.parametrize("kind", EXCLUDES)
def test_the_exclude_lists(kind, mutant):
    """Changed in both files alike."""
    check, directory = mutant
    change, words = EXCLUDES[kind]
    config, legacy, ignored, excluded = lists_of(directory)
    assert ignored == excluded
    assert len(ignored) > 2
    change(ignored)
    change(excluded)
    (directory / CONFIG).write_text(json.dumps(config))
    (directory / LEGACY).write_text(json.dumps(legacy))
    found = check()
    assert one(found, CONFIG, "quantization_config.ignore", words), told(found)
    assert one(found, LEGACY, "quantization.exclude_modules", words)
