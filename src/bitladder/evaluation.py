"""Evaluates exported checkpoints against the original, from the files, on held-out data.

`Reference.compute(original, data)` runs the original on one held-out set; `evaluate_checkpoint(references, directory)`
reads a checkpoint's files once and compares on every set. transformers' own loader would cast the FP8 codes and drop
the scales, so the files are read here: weights dequantised, and every quantised linear's input rounded through E4M3
with its *stored* scale.

Arithmetic is float32. The noise floor of each metric is that of the original loaded in BF16 (which keeps the rotary
frequencies in float32, as serving does; casting the float32 model would round them too). Over rows r with n_r
counted tokens and sums x_r, a mean is Σ x_r / Σ n_r and its standard error (tokens of one row are not independent)

    sqrt(R / (R - 1) · Σ (x_r - mean · n_r)²) / Σ n_r
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import nn

from bitladder import numerics
from bitladder.calibration import DataSet, Sample, prompt_inputs, tokenizer_of
from bitladder.errors import ModelError, StaleRecord
from bitladder.kv_cache import Fp8Cache, cache_inputs, layer_index
from bitladder.reading import check_regular, read_tensors
from bitladder.recipe import DEFAULT_SPLIT
from bitladder.records import CheckpointManifest, EvalResult, Evaluation
from bitladder.runinfo import Meter, Progress, no_progress
from bitladder.storage import scratch_directory
from bitladder.targets import checkpoint_tensor_names, load_model
from bitladder.weights import WeightFiles, all_finite, read_config

ARITHMETIC = (
    "float32; weights dequantised, inputs of quantised linears rounded to E4M3 with the stored scale; "
    "noise floor: the original loaded in BF16"
)
# The original's log-probabilities are kept in memory up to this size, and in a temporary directory beyond.
MAX_REFERENCE_BYTES_IN_MEMORY = 2 << 30
_EXPORT_AGAIN = "export this scheme again"
_SCALE_NAMES = ("weight_scale", "weight_scale_2", "weight_scale_inv", "input_scale")
_KV_SCALE_NAMES = ("k_scale", "v_scale")
_GPU_SHARE = 0.25  # of its free memory that the original's log-probabilities may take
_TOKENS_AT_ONCE = 256  # rows of [tokens, vocabulary] compared at a time
_MAX_MEAN_NLL = 300.0  # nats per token; chance is log(vocabulary), about 12. Keeps exp() finite
_PROMPTS_AT_ONCE = 50


class FakeQuantLinear(nn.Module):
    """A linear module with dequantised weights [out_features, in_features] and a static FP8 input."""

    def __init__(self, linear: nn.Linear, input_scale: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("input_scale", input_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of the rounded input [..., in_features]: [..., out_features]."""
        assert isinstance(self.input_scale, torch.Tensor)
        return nn.functional.linear(numerics.fake_quantise(x, self.input_scale), self.weight, self.bias)


def _fp8_tensors(files: WeightFiles) -> list[str]:
    return sorted(name for name, info in files.tensors.items() if info.dtype == "F8_E4M3")


def _scale(files: WeightFiles, weight: str, kind: str) -> torch.Tensor:
    """Return the scalar `kind` (weight_scale, input_scale) of an FP8 weight."""
    name = f"{weight.removesuffix('.weight')}.{kind}"
    if name not in files.tensors:
        file = files.directory / files.tensors[weight].file
        raise ModelError(f"{file}: {weight} is FP8, but its {name} is missing; {_EXPORT_AGAIN}")
    scale = files.load(name)
    if scale.dtype != torch.float32 or scale.numel() != 1 or not 0 < float(scale) < math.inf:
        file = files.directory / files.tensors[name].file
        raise ModelError(f"{file}: {name} is not one positive float32 number; {_EXPORT_AGAIN}")
    return scale.reshape(())


def _use_generation_config(model: Any, directory: Path) -> None:
    """Give the model the directory's generation_config.json, which a load from tensors passes over.

    Without it a checkpoint would stop at other tokens, and repeat itself more freely, than the original it is compared
    with.
    """
    path = directory / "generation_config.json"
    if not path.exists() or not model.can_generate():
        return
    from transformers import GenerationConfig

    try:
        check_regular(path)
        model.generation_config = GenerationConfig.from_pretrained(directory)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({str(error).strip().splitlines()[0]}); {_EXPORT_AGAIN}") from error


def load_checkpoint(directory: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Return the model that an exported directory holds, with dequantised weights and fake-quantised inputs.

    Raises:
        ModelError: a scale or weight is missing or left over, or is not what it should be; names file and tensor.
    """
    files = WeightFiles.open(directory)
    codes = _fp8_tensors(files)
    if codes and "quantization_config" not in read_config(directory):
        raise ModelError(
            f"{directory / 'config.json'} has no quantization_config, but weights are FP8; {_EXPORT_AGAIN}"
        )
    state, input_scales, used = {}, {}, set()
    for name in codes:
        file = directory / files.tensors[name].file
        prefix = name.removesuffix(".weight")
        used |= {f"{prefix}.weight_scale", f"{prefix}.input_scale"}
        state[name] = numerics.dequantise(files.load(name), _scale(files, name, "weight_scale"), dtype)
        if not all_finite(state[name]):
            raise ModelError(f"{file}: {name} holds NaN or overflows {dtype}; {_EXPORT_AGAIN}")
        input_scales[name] = _scale(files, name, "input_scale")
    kv_scales = [name for name in files.tensors if name.rpartition(".")[2] in _KV_SCALE_NAMES]
    _check_kv_scales(directory, files, kv_scales)
    used.update(kv_scales)
    for name, info in files.tensors.items():
        if name in input_scales or name in used:
            continue
        if name.rpartition(".")[2] in _SCALE_NAMES:
            raise ModelError(f"{directory / info.file}: {name} belongs to no FP8 weight; {_EXPORT_AGAIN}")
        state[name] = files.load(name)
    names = sorted(state)
    model = load_model(directory, dtype, state_dict=state)
    _use_generation_config(model, directory)
    modules = checkpoint_tensor_names(model, names)
    for name, scale in input_scales.items():
        path = modules.get(name, "").removesuffix(".weight")
        linear = model.get_submodule(path) if path else None
        if not isinstance(linear, nn.Linear):
            file = directory / files.tensors[name].file
            raise ModelError(f"{file}: {name} is FP8, but it is no linear module's weight; {_EXPORT_AGAIN}")
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, FakeQuantLinear(linear, scale))
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name in kv_scales:
        weight, _, kind = name.rpartition(".")
        layer = layer_index(model, modules[f"{weight}.weight"].removesuffix(".weight"))
        layers.setdefault(layer, {})[kind] = _scale(files, f"{weight}.weight", kind).to(device)
    model.kv_scales = {layer: (pair["k_scale"], pair["v_scale"]) for layer, pair in layers.items()}
    return model.to(device).eval()


def _check_kv_scales(directory: Path, files: WeightFiles, kv_scales: list[str]) -> None:
    """Check that keys and values have scales exactly where config.json says that the KV cache is FP8."""
    asked = read_config(directory).get("quantization_config", {}).get("kv_cache_scheme") is not None
    if asked and not kv_scales:
        raise ModelError(
            f"{directory / 'config.json'} asks for an FP8 KV cache, but keys and values have no scales; {_EXPORT_AGAIN}"
        )
    for name in kv_scales:
        if not asked:
            file = directory / files.tensors[name].file
            raise ModelError(f"{file}: {name} is there, but config.json asks for no FP8 KV cache; {_EXPORT_AGAIN}")
        prefix, _, kind = name.rpartition(".")
        leaf, other = ("k_proj", "v_proj.v_scale") if kind == "k_scale" else ("v_proj", "k_proj.k_scale")
        partner = f"{prefix.removesuffix(leaf)}{other}"
        if not prefix.endswith(f".{leaf}") or partner not in files.tensors:
            file = directory / files.tensors[name].file
            raise ModelError(f"{file}: {name} has no partner {partner}; {_EXPORT_AGAIN}")


def cached(model: Any) -> dict[str, Any]:
    """Return what a loaded checkpoint is called with for its whole input to go through a new cache, as it asks for.

    That is an FP8 one, or none at all: what is in 16 bits isn't changed by being stored.
    """
    scales = getattr(model, "kv_scales", None)
    return cache_inputs(model, Fp8Cache(model.config, scales) if scales else None)


@dataclass(frozen=True)
class Task:
    """Questions about pictures, answered greedily; an answer counts when it is exactly the expected text."""

    samples: tuple[Sample, ...]
    prompts: Callable[[Sequence[Sample]], dict[str, torch.Tensor]]
    tokenizer: Any

    @classmethod
    def exact_match(cls, samples: Sequence[Sample], processor: Any) -> Self:
        """Return the task of answering every sample's prompt with its text."""
        return cls(tuple(samples), lambda some: prompt_inputs(some, processor), tokenizer_of(processor))

    @torch.no_grad()
    def correct(self, model: Any, device: str, progress: Progress, phase: str) -> int:
        """Return how many of the samples the model answers exactly."""
        longest = max(len(self.tokenizer(sample.text)["input_ids"]) for sample in self.samples)
        right = 0
        for start in range(0, len(self.samples), _PROMPTS_AT_ONCE):
            progress(phase, start, len(self.samples))
            some = self.samples[start : start + _PROMPTS_AT_ONCE]
            inputs = {key: value.to(device) for key, value in self.prompts(some).items()}
            output = model.generate(
                **inputs,
                **{**cached(model), "use_cache": True},  # token by token; without a cache of ours the model's own
                max_new_tokens=longest + 4,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            for sample, row in zip(some, output[:, inputs["input_ids"].shape[1] :], strict=True):
                answer = self.tokenizer.decode(row, skip_special_tokens=True)
                right += answer.strip() == sample.text.strip()
        progress(phase, len(self.samples), len(self.samples))
        return right


@dataclass
class _Sums:
    """Per row of the data: counted tokens, and sums over them."""

    tokens: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    agree: list[int] = field(default_factory=list)

    def ratio(self, values: Sequence[float]) -> tuple[float, float | None]:
        """Return Σ values / Σ tokens and its standard error (None with one row)."""
        total, rows = sum(self.tokens), len(self.tokens)
        mean = math.fsum(values) / total
        if rows < 2:
            return mean, None
        squares = math.fsum((v - mean * n) ** 2 for v, n in zip(values, self.tokens, strict=True))
        return mean, math.sqrt(rows / (rows - 1) * squares) / total

    def perplexity(self) -> tuple[float, float | None]:
        """Return exp(mean negative log-likelihood) and its standard error, to first order."""
        mean, error = self.ratio(self.nll)
        value = math.exp(mean)
        return value, None if error is None else value * error


def _log_probabilities(model: Any, batch: Any, device: str, what: str) -> torch.Tensor:
    """Return the log-probabilities [counted tokens, vocabulary] of a batch in float32, on the model's device.

    Raises:
        ModelError: NaN or Inf in the logits.
    """
    moved = batch.to(device)
    logits = model(**moved.inputs, **cached(model)).logits[:, :-1][moved.predicted].float()
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(f"{what} gives NaN or Inf; {_EXPORT_AGAIN}, or check the original")
    return torch.log_softmax(logits, -1)


def _on(split: str) -> str:
    """Return what the name of a phase adds for a held-out set with a name of its own."""
    return "" if split == DEFAULT_SPLIT else f" on {split}"


class _Store:
    """The original's log-probabilities, batch by batch: on the GPU where they fit, in memory, or in files."""

    def __init__(self, total_bytes: int, device: str) -> None:
        self.memory: list[torch.Tensor] = []
        self.count = 0
        on_gpu = device.startswith("cuda") and total_bytes < _GPU_SHARE * torch.cuda.mem_get_info(device)[0]
        self.device = device if on_gpu else "cpu"
        large = not on_gpu and total_bytes > MAX_REFERENCE_BYTES_IN_MEMORY
        self._stack = ExitStack()
        self.directory = self._stack.enter_context(scratch_directory()) if large else None

    def add(self, values: torch.Tensor) -> None:
        values = values.to(self.device)
        if self.directory is None:
            self.memory.append(values)
        else:
            save_file({"values": values}, self.directory / f"{self.count}.safetensors")
        self.count += 1

    def get(self, index: int) -> torch.Tensor:
        if self.directory is None:
            return self.memory[index]
        values: torch.Tensor = read_tensors(self.directory / f"{index}.safetensors")["values"]
        return values

    def close(self) -> None:
        self.memory = []
        self._stack.close()


def _compare(model: Any, data: DataSet, store: _Store, device: str, what: str, progress: Progress, phase: str) -> _Sums:
    """Return the sums of KL(original ‖ model), the model's own NLL and the agreement, row by row."""
    sums = _Sums()
    for index, batch in enumerate(data.batches):
        progress(phase, index, len(data.batches))
        ours = _log_probabilities(model, batch, device, f"{what}, batch {index},")
        _add_rows(sums, batch, store.get(index), ours)
    progress(phase, len(data.batches), len(data.batches))
    _check_nll(sums, what)
    return sums


def _check_nll(sums: _Sums, what: str) -> None:
    mean = sums.ratio(sums.nll)[0]
    if mean > _MAX_MEAN_NLL:
        raise ModelError(
            f"{what} gives the held-out tokens {mean:.0f} nats each, so that no perplexity can be stated: its weights "
            f"or scales are wrong; {_EXPORT_AGAIN}, or check the original"
        )


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return KL(p ‖ q) [tokens] in float64 nats, from float32 log-probabilities [tokens, vocabulary].

    Σ p · (log p - log q) - p + q: the last two cancel for exact distributions, and in float32 they take the rounding of
    the two normalisers out of the sum (relative error of a KL of 10⁻³ on SmolLM2: 10⁻⁵ instead of 5 · 10⁻⁴).
    """
    exp_p = p.exp()
    return (exp_p * (p - q)).sub_(exp_p).add_(q.exp()).sum(-1, dtype=torch.float64)


def _add_rows(sums: _Sums, batch: Any, reference: torch.Tensor, ours: torch.Tensor) -> None:
    """Add what a batch gives; the reference comes to the device of `ours` piece by piece."""
    mask = batch.predicted
    targets = batch.labels[:, 1:][mask].to(ours.device)
    kl, nll, agree = [], [], []
    for start in range(0, len(ours), _TOKENS_AT_ONCE):
        q = ours[start : start + _TOKENS_AT_ONCE]
        p = reference[start : start + _TOKENS_AT_ONCE].to(ours.device)
        kl.append(_kl(p, q))
        nll.append(-q.gather(-1, targets[start : start + _TOKENS_AT_ONCE, None])[:, 0].double())
        agree.append(p.argmax(-1) == q.argmax(-1))
    per_row = mask.sum(-1).tolist()
    columns = [torch.split(torch.cat(values).cpu(), per_row) for values in (kl, nll, agree)]
    for row_kl, row_nll, row_agree in zip(*columns, strict=True):
        if not len(row_kl):
            continue
        sums.tokens.append(len(row_kl))
        sums.kl.append(float(row_kl.sum()))
        sums.nll.append(float(row_nll.sum()))
        sums.agree.append(int(row_agree.sum()))


@dataclass
class Reference:
    """What the original gives on one held-out set, in float32 and (as the noise floor) in BF16 arithmetic.

    A context manager: leaving it frees what is kept of the original's outputs.
    """

    data: DataSet
    device: str
    task: Task | None
    store: _Store
    perplexity: float
    bf16: _Sums
    correct: int | None
    bf16_correct: int | None
    split: str = DEFAULT_SPLIT

    @classmethod
    @torch.no_grad()
    def compute(
        cls,
        directory: Path,
        data: DataSet,
        *,
        task: Task | None = None,
        split: str = DEFAULT_SPLIT,
        device: str = "cpu",
        progress: Progress = no_progress,
    ) -> Self:
        """Run the original on the data.

        Args:
            directory: the original.
            data: the samples of the set.
            task: what is answered beside.
            split: the name of the set.
            device: where everything runs.
            progress: told of every batch.

        Raises:
            ModelError: it can't be loaded, or gives NaN or Inf.
        """
        model = load_model(directory, torch.float32, device)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        store = _Store(4 * data.summary.tokens * vocabulary, device)
        on = _on(split)
        try:
            own = _Sums()
            for index, batch in enumerate(data.batches):
                progress(f"evaluate original{on}", index, len(data.batches))
                values = _log_probabilities(model, batch, device, f"the original {directory}, batch {index},")
                store.add(values)
                _add_rows(own, batch, values, values)
            progress(f"evaluate original{on}", len(data.batches), len(data.batches))
            _check_nll(own, f"the original {directory}")
            correct = task.correct(model, device, progress, f"answer: original{on}") if task else None
            del model  # one model in memory at a time
            model = load_model(directory, torch.bfloat16, device)
            phase = f"evaluate original in BF16{on}"
            bf16 = _compare(model, data, store, device, f"{directory} in BF16", progress, phase)
            bf16_correct = task.correct(model, device, progress, f"answer: original in BF16{on}") if task else None
        except BaseException:  # a kill too: gigabytes in the temporary directory
            store.close()
            raise
        return cls(data, device, task, store, own.perplexity()[0], bf16, correct, bf16_correct, split)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()


@torch.no_grad()
def compare(
    reference: Reference, directory: Path, name: str, progress: Progress = no_progress
) -> tuple[tuple[EvalResult, ...], int]:
    """Return the results of any FP8 checkpoint directory in ModelOpt's layout, and how many of its modules are FP8.

    Args:
        reference: the original on the same data.
        directory: the exported checkpoint; a manifest isn't needed.
        name: what it is called in the progress.
        progress: told of every batch.

    Raises:
        ModelError: the files are not a whole checkpoint, or give NaN or Inf.
    """
    model = load_checkpoint(directory, device=reference.device)
    quantised = sum(isinstance(module, FakeQuantLinear) for module in model.modules())
    return tuple(compare_loaded(reference, model, str(directory), name, progress)), quantised


@torch.no_grad()
def compare_loaded(
    reference: Reference, model: Any, origin: str, name: str, progress: Progress = no_progress, *, answer: bool = True
) -> list[EvalResult]:
    """Return the results of a loaded model on one held-out set.

    Args:
        reference: the original on the set.
        model: what `load_checkpoint` gives, on the reference's device.
        origin: where it comes from, for errors.
        name: what it is called in the progress.
        progress: told of every batch.
        answer: whether the set's task is done as well.

    Raises:
        ModelError: it gives NaN or Inf.
    """
    phase = f"{name}{_on(reference.split)}"
    sums = _compare(model, reference.data, reference.store, reference.device, origin, progress, f"evaluate {phase}")
    results = _results(reference, sums)
    if answer and reference.task is not None:
        right = reference.task.correct(model, reference.device, progress, f"answer: {phase}")
        results.append(_accuracy(reference, right))
    return results


def evaluate_checkpoint(
    references: Sequence[Reference], directory: Path, progress: Progress = no_progress
) -> Evaluation:
    """Return the checkpoint's KL to the original, perplexity, agreement, and task accuracy where there is a task.

    Args:
        references: the original on each held-out set, at least one, all on one device.
        directory: the exported checkpoint.
        progress: told of every batch.

    Raises:
        RecordError: no manifest. StaleRecord: the manifest is of other files. ModelError: see `compare`.
    """
    manifest = CheckpointManifest.read(directory / CheckpointManifest.FILE_NAME)
    differing = sorted(set(_fp8_tensors(WeightFiles.open(directory))) ^ {module.tensor for module in manifest.modules})
    if differing:
        raise StaleRecord(
            f"{directory}: the files and {CheckpointManifest.FILE_NAME} disagree whether {differing[0]} is FP8; "
            f"{_EXPORT_AGAIN}"
        )
    meter = Meter()
    with meter.phase(f"evaluate {manifest.scheme}"):
        model = load_checkpoint(directory, device=references[0].device)
        results = [
            result
            for reference in references
            for result in compare_loaded(reference, model, str(directory), manifest.scheme, progress)
        ]
    return Evaluation(
        scheme=manifest.scheme,
        manifest_sha256=manifest.fingerprint(),
        model_sha256=manifest.source_sha256,
        data={reference.split: reference.data.summary for reference in references},
        arithmetic=ARITHMETIC,
        results=tuple(results),
        run=meter.info(),
    )


def _results(reference: Reference, sums: _Sums) -> list[EvalResult]:
    rows, floor = len(sums.tokens), reference.bf16
    kl, kl_error = sums.ratio(sums.kl)
    perplexity, perplexity_error = sums.perplexity()
    agreement, agreement_error = sums.ratio(sums.agree)
    return [
        EvalResult(
            metric="kl",
            split=reference.split,
            unit="nats per token",
            value=kl,
            standard_error=kl_error,
            samples=rows,
            noise_floor=floor.ratio(floor.kl)[0],
        ),
        EvalResult(
            metric="perplexity",
            split=reference.split,
            unit="",
            value=perplexity,
            standard_error=perplexity_error,
            samples=rows,
            noise_floor=floor.perplexity()[0],
            reference=reference.perplexity,
        ),
        EvalResult(
            metric="top1_agreement",
            split=reference.split,
            unit="share of tokens",
            value=agreement,
            standard_error=agreement_error,
            samples=rows,
            noise_floor=floor.ratio(floor.agree)[0],
        ),
    ]


def _accuracy(reference: Reference, right: int) -> EvalResult:
    assert reference.task is not None
    assert reference.correct is not None
    assert reference.bf16_correct is not None
    count = len(reference.task.samples)
    share = right / count
    return EvalResult(
        metric="task_accuracy",
        split=reference.split,
        unit="share of samples",
        value=share,
        standard_error=math.sqrt(share * (1 - share) / count),
        samples=count,
        noise_floor=reference.bf16_correct / count,
        reference=reference.correct / count,
    )
