"""Every kind of damage is found, named by file and tensor; an intact checkpoint passes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitladder import planning
from bitladder.checkpoints.export import export
from bitladder.measured import read_amax
from bitladder.records import CheckpointManifest
from bitladder.storage import sha256_of_file
from bitladder.verification import compare, examine, verify
from conftest import spec


@pytest.fixture(scope="module")
def ladder(llama, measured, tmp_path_factory):
    """(measurement, amax, schemes, {name: directory}) with two intact checkpoints."""
    measurement, directory = measured
    amax = read_amax(measurement, directory)
    output = tmp_path_factory.mktemp("ladder")
    schemes = planning.plan_all(measurement, [spec("low", coverage=0.3), spec("high", coverage=0.7)])
    directories = {scheme.name: output / scheme.name for scheme in schemes}
    for scheme in schemes:
        export(scheme, measurement, amax, llama, directories[scheme.name])
    return measurement, amax, schemes, directories


def test_intact_checkpoints_pass(ladder, llama):
    measurement, amax, schemes, directories = ladder
    result = verify(schemes, measurement, amax, llama, directories)
    assert result.ok
    for scheme, check in zip(schemes, result.checkpoints, strict=True):
        quantised = [g for g in measurement.groups if g.name in scheme.quantised_groups()]
        assert check.codes_checked == sum(group.weight_elements for group in quantised)
        assert check.bytes_identical > 0
    (pair,) = result.pairs
    changed = schemes[0].quantised_groups() ^ schemes[1].quantised_groups()
    assert pair.modules_expected == sum(len(g.modules) for g in measurement.groups if g.name in changed)
    assert pair.modules_differing == pair.modules_expected


@pytest.fixture
def broken(ladder, llama, tmp_path):
    """A function that damages a copy of the `high` checkpoint and returns the findings."""
    measurement, amax, schemes, directories = ladder
    directory = tmp_path / "high"
    shutil.copytree(directories["high"], directory)

    def check(damage, reseal=True):
        """Damage, then (so that not only the digest gives it away) correct the manifest's digests; verify."""
        damage(directory)
        if reseal:
            path = directory / CheckpointManifest.FILE_NAME
            manifest = CheckpointManifest.read(path)
            files = tuple(
                entry.model_copy(
                    update={
                        "sha256": sha256_of_file(directory / entry.name),
                        "bytes": (directory / entry.name).stat().st_size,
                    }
                )
                for entry in manifest.files
                if (directory / entry.name).exists()
            )
            manifest.model_copy(update={"files": files}).write(path)
        result = verify(schemes[1:], measurement, amax, llama, {"high": directory})
        assert result.ok == (not result.checkpoints[0].findings)
        return result.checkpoints[0].findings

    return check


def first_quantised(directory):
    return next(m.tensor for m in CheckpointManifest.read(directory / CheckpointManifest.FILE_NAME).modules)


def edit(change):
    """Return a damage that edits the dictionary of tensors."""

    def damage(directory):
        path = directory / "model.safetensors"
        tensors = load_file(path)
        change(tensors, first_quantised(directory))
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def mentions(findings, *words):
    return any(all(word in f"{f.file} {f.tensor} {f.problem} {f.remedy}" for word in words) for f in findings)


def prefix(name):
    return name.removesuffix("weight")


def move_one_code(tensors, name):
    codes = tensors[name].view(torch.uint8).clone()
    flat = codes.view(-1)
    index = int((flat & 0x7F).argmax())  # the largest: its neighbour is a whole step away
    flat[index] -= 1
    tensors[name] = codes.view(torch.float8_e4m3fn)


def turn_the_largest(tensors, name):
    codes = tensors[name].view(torch.uint8).clone()
    flat = codes.view(-1)
    flat[int((flat & 0x7F).argmax())] ^= 0x80
    tensors[name] = codes.view(torch.float8_e4m3fn)


def nan_code(tensors, name):
    codes = tensors[name].view(torch.uint8).clone()
    codes[0, 0] = 0x7F
    tensors[name] = codes.view(torch.float8_e4m3fn)


def flip_embedding(tensors, name):
    tensors["model.embed_tokens.weight"].view(torch.int16)[0, 0] ^= 1


DAMAGE = {
    "one code moved by a step": (move_one_code, [".weight"], "1 of"),
    "largest code with the other sign": (turn_the_largest, [".weight"], "1 of"),
    "NaN code": (nan_code, ["weight"], "NaN"),
    "weight_scale missing": (lambda t, n: t.pop(prefix(n) + "weight_scale"), ["weight_scale"], "missing"),
    "input_scale missing": (lambda t, n: t.pop(prefix(n) + "input_scale"), ["input_scale"], "missing"),
    "weight missing": (lambda t, n: t.pop(n), ["weight"], "missing"),
    "weight_scale doubled": (
        lambda t, n: t[prefix(n) + "weight_scale"].mul_(2),
        ["weight_scale"],
        "the source's weights give",
    ),
    "input_scale zero": (lambda t, n: t[prefix(n) + "input_scale"].zero_(), ["input_scale"], "positive"),
    "scale in BF16": (
        lambda t, n: t.update({prefix(n) + "weight_scale": t[prefix(n) + "weight_scale"].bfloat16()}),
        ["weight_scale"],
        "not one float32",
    ),
    "scale per channel": (
        lambda t, n: t.update({prefix(n) + "weight_scale": t[prefix(n) + "weight_scale"].repeat(4)}),
        ["weight_scale"],
        "not one float32",
    ),
    "codes back in BF16": (lambda t, n: t.update({n: t[n].bfloat16()}), ["weight"], "FP8 codes"),
    "embedding changed by one bit": (flip_embedding, ["embed_tokens"], "differs from the source"),
    "norm in another dtype": (
        lambda t, n: t.update({"model.norm.weight": t["model.norm.weight"].float()}),
        ["model.norm"],
        "leaves it alone",
    ),
    "extra tensor": (lambda t, n: t.update({"spare": torch.ones(1)}), ["spare"], "neither"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_tensors(kind, broken):
    change, where, problem = DAMAGE[kind]
    findings = broken(edit(change))
    assert mentions(findings, *where, problem), findings
    assert all(finding.remedy for finding in findings)


def test_bf16_weight_inside_the_scheme_and_fp8_outside(broken, ladder):
    measurement, _, schemes, _ = ladder
    left = next(g for g in measurement.groups if g.name not in schemes[1].quantised_groups())
    name = left.modules[0].tensor

    def damage(tensors, _):
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    assert mentions(broken(edit(damage)), name, "the scheme leaves it alone")


def test_changed_file_is_seen_by_its_digest(broken):
    findings = broken(lambda d: (d / "tokenizer.json").write_text("{}"), reseal=False)
    assert mentions(findings, "tokenizer.json", "bytes")


def test_extra_and_missing_files(broken):
    def damage(directory):
        (directory / "extra.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
        (directory / "generation_config.json").unlink()

    findings = broken(damage, reseal=False)
    assert mentions(findings, "extra.safetensors", "not listed")
    assert mentions(findings, "generation_config.json", "missing")


def test_truncated_weights(broken):
    def damage(directory):
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-64])

    assert mentions(broken(damage), "model.safetensors", "not a readable safetensors file")


def edit_config(file, change):
    def damage(directory):
        content = json.loads((directory / file).read_text())
        change(content)
        (directory / file).write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        ("config.json", lambda c: c["quantization_config"]["ignore"].pop(), "lacks"),
        (
            "config.json",
            lambda c: c["quantization_config"]["ignore"].append("model.layers.1*"),
            "has 'model.layers.1*'",
        ),
        ("config.json", lambda c: c.pop("quantization_config"), "quantization_config is missing"),
        ("config.json", lambda c: c.update(hidden_size=63), "hidden_size is 63, it should be 64"),
        ("hf_quant_config.json", lambda c: c["quantization"]["exclude_modules"].pop(), "lacks"),
        ("hf_quant_config.json", lambda c: c["quantization"].update(quant_algo="INT8"), "INT8"),
    ],
)
def test_configs(file, change, problem, broken):
    assert mentions(broken(edit_config(file, change)), file, problem)


def test_missing_manifest(broken):
    findings = broken(lambda d: (d / CheckpointManifest.FILE_NAME).unlink(), reseal=False)
    assert mentions(findings, CheckpointManifest.FILE_NAME, "does not exist")


def test_another_schemes_checkpoint(ladder, llama):
    measurement, amax, schemes, directories = ladder
    swapped = {"low": directories["high"], "high": directories["low"]}
    result = verify(schemes, measurement, amax, llama, swapped)
    assert not result.ok
    assert mentions(result.checkpoints[0].findings, "written for another scheme")


def test_two_schemes_with_the_same_tensors_are_named(ladder, llama):
    measurement, amax, schemes, directories = ladder
    _, digests = examine(schemes[1], measurement, amax, llama, directories["high"])
    pair = compare(*schemes, measurement, {"low": digests, "high": digests})
    assert mentions(pair.findings, "low", "high", "hold the same weights")
    intact = verify(schemes, measurement, amax, llama, directories)
    result = intact.model_copy(update={"pairs": (pair,)})  # neither has findings of its own: both are to blame
    assert [result.matches(name) for name in ("low", "high", "other")] == [False, False, None]


def test_only_the_damaged_one_of_a_pair_is_blamed(ladder, llama, tmp_path):
    measurement, amax, schemes, directories = ladder
    shutil.copytree(directories["high"], tmp_path / "high")
    edit(flip_embedding)(tmp_path / "high")
    edit(move_one_code)(tmp_path / "high")
    low = {m.name for g in measurement.groups if g.name in schemes[0].quantised_groups() for m in g.modules}
    edit(
        lambda t, n: t.update({m.tensor: t[m.tensor].float().bfloat16() for m in modules_of(tmp_path) if m.name in low})
    )(tmp_path / "high")
    result = verify(schemes, measurement, amax, llama, {**directories, "high": tmp_path / "high"})
    (pair,) = result.pairs
    assert pair.modules_differing != pair.modules_expected  # the pair isn't what it should be
    assert pair.findings == ()
    assert [(c.scheme, c.ok) for c in result.checkpoints] == [("low", True), ("high", False)]
    assert [result.matches(name) for name in ("low", "high")] == [True, False]
    assert not result.ok


def modules_of(directory):
    return CheckpointManifest.read(directory / "high" / CheckpointManifest.FILE_NAME).modules


def side_file(directory):
    path = directory / "tokenizer.json"
    path.write_text(path.read_text() + " ")


EXPORTER = {
    "input_scale doubled": (edit(lambda t, n: t[prefix(n) + "input_scale"].mul_(2)), "what calibration saw gives"),
    "weight_scale a bit off": (edit(lambda t, n: t[prefix(n) + "weight_scale"].mul_(1.000001)), "weights give"),
    "tokenizer": (side_file, "byte for byte"),
    "generation_config": (edit_config("generation_config.json", lambda c: c.update(do_sample=True)), "byte for byte"),
    "num_bits": (
        edit_config(
            "config.json", lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=4)
        ),
        "num_bits is 4",
    ),
    "true for 1": (edit_config("config.json", lambda c: c.update(num_key_value_heads=True)), "it should be 1"),
    "producer": (
        edit_config("config.json", lambda c: c["quantization_config"]["producer"].update(version="0.1")),
        "producer.version",
    ),
    "legacy producer": (edit_config("hf_quant_config.json", lambda c: c.pop("producer")), "producer is missing"),
    "metadata": (
        lambda d: save_file(load_file(d / "model.safetensors"), d / "model.safetensors", metadata={"format": "np"}),
        "not the format pt",
    ),
}


@pytest.mark.parametrize("kind", EXPORTER)
def test_what_the_exporter_and_its_manifest_agree_about_is_not_believed(kind, broken):
    damage, problem = EXPORTER[kind]
    assert mentions(broken(damage), problem)
