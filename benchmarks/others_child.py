"""Quantises by llm-compressor or AutoRound, in an environment of its own: the child process of `others.py`.

    PYTHON benchmarks/others_child.py '{"tool": "llm-compressor", "model": DIR, "batches": FILE, "output": DIR, ...}'

`batches` holds, by `torch.save`, what the model is called with: a list of tensors by name. What it took and which
versions did it is written to `result`. Nothing of ours is imported. Both run in float32 on a CPU, as ours do there.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("llmcompressor", "auto-round", "compressed-tensors", "torch", "transformers")
USED = {"llm-compressor": PACKAGES[:1] + PACKAGES[2:], "AutoRound": PACKAGES[1:]}
LEFT_ALONE = ("lm_head", "re:.*visual.*")


def model_of(directory: str):
    """Return the model in float32, with its pictures' tower where it has one."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    pictures = hasattr(AutoConfig.from_pretrained(directory), "vision_config")
    loader = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
    return loader.from_pretrained(directory, dtype="float32")


def by_llm_compressor(job: dict, batches: list[dict]) -> None:
    """Quantise by `oneshot` with a preset scheme.

    `group_size` and `observer` are of its weights, where the preset's aren't used. `awq`: scales are searched first.
    """
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer

    IntermediatesCache.pin_memory = lambda *_, **__: None  # AWQ pins memory, which stops without a GPU
    scheme = preset_name_to_scheme(job["preset"], ["Linear"])
    for name in ("group_size", "observer"):
        if name in job:
            scheme.weights = scheme.weights.model_copy(update={name: job[name]})
    modifier = GPTQModifier if job["method"] == "gptq" else QuantizationModifier
    quantise = modifier(config_groups={"group_0": scheme}, ignore=list(LEFT_ALONE))
    oneshot(
        model=model_of(job["model"]),
        processor=AutoTokenizer.from_pretrained(job["model"]),
        dataset=DataLoader(batches, batch_size=None),
        recipe=[AWQModifier(), quantise] if job["method"] == "awq" else quantise,
        # Layers one after the other are traced by the first batch; with and without pictures they aren't alike.
        pipeline="sequential" if all(batch.keys() == batches[0].keys() for batch in batches) else "basic",
        output_dir=job["output"],
    )


def by_auto_round(job: dict, batches: list[dict]) -> None:
    """Quantise by AutoRound without tuning: `scheme`, or what its AutoScheme chooses of `options` at `average_bits`.

    AutoScheme takes names of data sets alone; what reads them is replaced by what gives our rows. Modules that a
    runtime fuses share a scheme.
    """
    os.environ["AR_AUTO_SCHEME_CACHE"] = str(Path(job["output"]).with_name("auto_scheme"))  # for all bits
    import auto_round.calib_dataset
    from auto_round import AutoRound, AutoScheme
    from auto_round.auto_scheme import delta_loss
    from transformers import AutoTokenizer

    auto_round.calib_dataset.get_dataloader = delta_loss.get_dataloader = lambda *_, **__: batches
    rows, length = batches[0]["input_ids"].shape
    common = {"nsamples": rows * len(batches), "seqlen": length, "batch_size": rows}
    scheme = job.get("scheme")
    if scheme is None:
        scheme = AutoScheme(
            avg_bits=job["average_bits"],
            options=job["options"],
            shared_layers=[["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]],
            **common,
        )
    AutoRound(
        model_of(job["model"]),
        AutoTokenizer.from_pretrained(job["model"]),
        scheme=scheme,
        dataset="rows",
        iters=0,
        device_map="cpu",
        **common,
    ).quantize_and_save(job["output"], format="llm_compressor")


def main() -> None:
    import torch

    job = json.loads(sys.argv[1])
    batches = torch.load(job["batches"], weights_only=True)
    start = time.perf_counter()
    {"llm-compressor": by_llm_compressor, "AutoRound": by_auto_round}[job["tool"]](job, batches)
    seconds = time.perf_counter() - start
    said = {"seconds": seconds, "versions": {name: version(name) for name in USED[job["tool"]]}}
    Path(job["result"]).write_text(json.dumps(said))


if __name__ == "__main__":
    main()
