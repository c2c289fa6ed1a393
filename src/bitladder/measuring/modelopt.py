"""The reference engine: NVIDIA ModelOpt's AutoQuantize, called once.

`mtq.auto_quantize` calibrates and scores in one call and adds the scores of all batches up in the model's
hyperparameters. We give it a data loader that knows when a batch is done: there it reads that batch's scores, stores
them, and clears them. Before the first batch is scored it makes fused modules share their scales, as the runtime will.
ModelOpt's own solver runs at the end too; its choice, its clamped scores and its pickled state are not used.

Source: modelopt.torch.quantization.algorithms, version 0.47: `_AutoQuantizeBaseSearcher.before_search` iterates the
loader once per format to calibrate, then once to score; `QuantRecipeHparam._importance_dict` holds the running scores.
"""

import contextlib
import functools
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from bitladder.data.batches import Batch
from bitladder.device import OUT_OF_MEMORY, deterministic, without_cudnn_attention
from bitladder.errors import EngineError, MeasurementError
from bitladder.formats import FORMATS, Format, get_format, grids
from bitladder.formats.fp8_block import Fp8Block
from bitladder.measured import Amax
from bitladder.measuring.amax import shared
from bitladder.measuring.checks import with_scales
from bitladder.measuring.job import BatchScores, Job, RawScore
from bitladder.measuring.kv_amax import AmaxCache, kv_cache_amax
from bitladder.measuring.partial import Partial
from bitladder.measuring.scores import gradient_score, image_positions
from bitladder.models.kv_layers import cache_inputs
from bitladder.models.loading import image_token_ids
from bitladder.runinfo import Meter

_ONE_NUMBER = Format.amax_name  # what a weight's amax is called where it is one number
_ATTENTION_PLUGIN = "register_hf_attentions_on_the_fly"
# What ModelOpt and a model's own code raise; what stops a run from outside (a caller's progress) is none of these.
_RAISED = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)
_KEEP_EVERYTHING_BITS = 16.0  # a budget that ModelOpt's own solver, whose result we don't use, always meets


class _Session:
    """The state of one `auto_quantize` call, shared by the callbacks that ModelOpt is given."""

    def __init__(self, model: nn.Module, job: Job, partial: Partial) -> None:
        from modelopt.torch.quantization.algorithms import QuantRecipe

        self.model, self.job, self.partial = model, job, partial
        self.no_quant = QuantRecipe(quant_cfg=None)
        self._recipes: dict[str, QuantRecipe] = {}  # format -> ModelOpt's own
        self.known_amax = partial.amax()
        self.iterations = 0
        self.calibrating = False
        self.cache = AmaxCache(model.config)
        self.image_tokens = image_token_ids(model.config)
        self.images: torch.Tensor | None = None  # of the batch being scored
        self.group_of = {module.name: group.name for group in job.target.groups for module in group.modules}
        self.places: dict[nn.Module, int] = {}  # module -> its place in the model, once ModelOpt has converted it

    def __iter__(self) -> Iterator[Batch]:
        """Called once per format for calibration, then once for scoring."""
        self.iterations += 1
        if self.iterations <= len(self.job.spec.formats):
            return self._calibration()
        return self._scoring()

    def _calibration(self) -> Iterator[Batch]:
        if self.known_amax is not None:
            return  # a run that was killed while scoring: the amax values are installed before it goes on
        self.calibrating = True
        total = len(self.job.batches)
        self.job.progress("calibrate", 0, total)
        for index, batch in enumerate(self.job.batches):
            yield batch.to(self.job.device)
            self.job.progress("calibrate", index + 1, total)
        self.calibrating = False

    def _scoring(self) -> Iterator[Batch]:
        groups = self.searched()
        everything = dict(groups)
        self.places = {module: place for place, module in enumerate(self.model.modules())}
        amax = self.known_amax
        if amax is None:
            amax = self._weight_amax(groups) | self._read_amax(groups)
        sharing = self.job.spec.share_fused_scales
        common = shared(amax, self.job.target.groups) if sharing else {}
        target = with_scales(self.job.target, amax | common, self.job.spec)
        for group in self.job.target.groups:
            if group not in target.groups:
                self._disable(groups.pop(group.name))
        if self.known_amax is None:
            if sharing:
                self._share_fused_scales(groups)
                searched = [group for group in self.job.target.groups if group.name in groups]
                amax |= {key: value.clone() for key, value in shared(amax, searched).items()}  # files alias nothing
            amax |= self._read_amax(groups)
            self.partial.keep_amax(amax | kv_cache_amax(self.model, self.job.target, self.cache))
        else:
            self._install_amax(groups, self.known_amax)
        self._install_grids(groups)
        total = self.job.score_batches
        for index in range(total):
            self.job.progress("score", index, total)
            if self.partial.scores(index) is not None:
                continue
            batch = self.job.batches[index].to(self.job.device)
            self.images = image_positions(batch, self.image_tokens)
            yield batch
            self.partial.keep_scores(index, self._read_scores(groups))
            self._forget(everything)
        self.job.progress("score", total, total)

    def searched(self) -> dict[str, Any]:
        """Return ModelOpt's hyperparameter of each of our groups.

        Raises:
            EngineError: ModelOpt groups the modules differently.
        """
        from modelopt.torch.opt.utils import named_hparams
        from modelopt.torch.quantization.algorithms import QuantRecipeHparam

        theirs = {
            frozenset(hparam.quant_module_names): hparam
            for _, hparam in named_hparams(self.model, unique=True)
            if isinstance(hparam, QuantRecipeHparam) and hparam.is_configurable
        }
        ours = {frozenset(module.name for module in group.modules): group.name for group in self.job.target.groups}
        if set(theirs) != set(ours):
            odd = sorted(min(names) for names in set(theirs) ^ set(ours))[0]
            raise EngineError(
                f"ModelOpt and Bitladder group the modules differently around {odd}; this version of ModelOpt is "
                "not supported for this model"
            )
        return {name: theirs[members] for members, name in ours.items()}

    def recipe(self, hparam: Any, format_name: str) -> Any:
        """Return what ModelOpt computes one of our formats with, as this hyperparameter knows it."""
        if format_name not in self._recipes:
            from modelopt.torch.quantization.algorithms import QuantRecipe

            config = get_format(format_name).modelopt_quantisation()
            self._recipes[format_name] = QuantRecipe(config, name=format_name)
        return next(choice for choice in hparam.choices if choice == self._recipes[format_name])

    @contextlib.contextmanager
    def _active(self, hparam: Any, recipe: Any) -> Iterator[None]:
        """Make the recipe's quantisers those of the group's modules for a while."""
        before = hparam.active
        hparam.active = recipe
        try:
            yield
        finally:
            hparam.active = before

    def _share_fused_scales(self, groups: dict[str, Any]) -> None:
        from modelopt.torch.export.quant_utils import preprocess_linear_fusion

        for hparam in groups.values():
            for name in self.job.spec.formats:
                format_ = get_format(name)
                one = format_.amax_name == _ONE_NUMBER and format_.modelopt_calibrates
                if not one and not format_.has_input_scale:
                    continue  # nothing of it is shared
                with self._active(hparam, self.recipe(hparam, name)):
                    preprocess_linear_fusion(hparam.quant_modules)

    def _disable(self, hparam: Any) -> None:
        """Let a group that stays in 16 bits be what it is under every recipe."""
        for name in self.job.spec.formats:
            with self._active(hparam, self.recipe(hparam, name)):
                for linear in hparam.quant_modules:
                    linear.weight_quantizer.disable()
                    linear.input_quantizer.disable()

    def _modules(self, groups: dict[str, Any]) -> Iterator[tuple[str, Any, Format]]:
        """Yield (name, module, format) of every format that a module can have, with that format's quantisers."""
        for group in self.job.target.groups:
            hparam = groups.get(group.name)
            for name in self.job.formats_of(group) if hparam is not None else ():
                with self._active(hparam, self.recipe(hparam, name)):
                    for module in group.modules:
                        yield module.name, self.model.get_submodule(module.name), get_format(name)

    def _quantisers(self, groups: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield ("<module>.weight_amax" or "<module>.input_amax", quantiser) of all that ModelOpt calibrates."""
        for name, linear, format_ in self._modules(groups):
            if format_.modelopt_calibrates:
                yield format_.weight_key(name), linear.weight_quantizer
            if format_.has_input_scale:
                yield f"{name}.input_amax", linear.input_quantizer

    def _weight_amax(self, groups: dict[str, Any]) -> Amax:
        """Return the amax of the weights in formats whose scales ModelOpt's calibration doesn't find."""
        return {
            format_.weight_key(name): format_.amax_of(linear.weight).float().cpu()
            for name, linear, format_ in self._modules(groups)
            if not format_.modelopt_calibrates and linear.weight_quantizer.amax is not None
        }

    def _read_amax(self, groups: dict[str, Any]) -> Amax:
        return {
            key: _as_kept(key, quantiser.amax.detach().float()).cpu().clone()
            for key, quantiser in self._quantisers(groups)
            if quantiser.amax is not None
        }

    def _install_amax(self, groups: dict[str, Any], amax: Amax) -> None:
        for key, quantiser in self._quantisers(groups):
            kept = amax[key].to(self.job.device)
            kept = kept.reshape(()) if kept.numel() == 1 else kept  # one block, too
            quantiser.amax = kept[:, None, :, None] if kept.dim() == 2 else kept[:, None] if kept.dim() else kept

    def _install_grids(self, groups: dict[str, Any]) -> None:
        """Have weights rounded to what files hold where ModelOpt's calibration finds other scales."""
        for _, linear, format_ in self._modules(groups):
            if format_.modelopt_calibrates:
                continue
            quantiser = linear.weight_quantizer
            amax, bias = format_.modelopt_grid(linear.weight)
            quantiser.reset_amax()  # its dtype too, which may be too coarse
            quantiser.amax = amax
            if bias is not None:
                quantiser.bias_value = bias
                quantiser.register_forward_hook(_in_its_dtype)

    def score(self, gradient: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
        """Stand in for ModelOpt's score of one module's output, with image-token positions apart: [2]."""
        return gradient_score(gradient, difference, self.images)

    def _forget(self, groups: dict[str, Any]) -> None:
        """Drop ModelOpt's running scores, and the outputs that it leaves on every module that it scored."""
        for hparam in groups.values():
            for scores in hparam._importance_dict.values():
                for module in scores:
                    scores[module] = None
                    if getattr(module, "output_diff_dict", None):
                        module.output_diff_dict = {}

    def _read_scores(self, groups: dict[str, Any]) -> BatchScores:
        return {
            group.name: {
                name: self._read_score(groups[group.name], self.recipe(groups[group.name], name))
                for name in self.job.formats_of(group)
            }
            for group in self.job.target.groups
            if group.name in groups
        }

    def _read_score(self, hparam: Any, recipe: Any) -> RawScore:
        """Return a group's score of this batch: (total, image positions), or (total,) where those aren't known apart.

        Source: QuantRecipeHparam.get_score, which adds up Python floats in the order of a set of modules: that of their
        addresses, another one in every process. We add up in the order of the model.
        """
        by_module = hparam._importance_dict[recipe]
        in_order = sorted(by_module, key=self.places.__getitem__)
        parts = [part.cpu().tolist() for module in in_order if (part := by_module[module]) is not None]
        if self.job.spec.method != "gradient":
            return (sum(parts),)
        return sum(total for total, _ in parts), sum(image for _, image in parts)

    def forward_step(self, model: nn.Module, batch: Batch) -> Any:
        """Return the model's output with the loss, or its logits [tokens that count, vocabulary] for `kl_div`."""
        if self.calibrating:
            self.cache.forget()
            return model(**batch.inputs, **cache_inputs(model, self.cache))
        if self.job.spec.method == "kl_div":
            return model(**batch.inputs).logits[:, :-1][batch.predicted]
        return model(**batch.inputs, labels=batch.labels)

    def forward_backward_step(self, model: nn.Module, batch: Batch) -> None:
        """Run the model and its backward pass, whose sums have a fixed order."""
        loss = self.forward_step(model, batch).loss
        with deterministic():
            loss.backward()


def _as_kept(key: str, amax: torch.Tensor) -> torch.Tensor:
    """Return an amax of ModelOpt's as measurements keep it: a scalar, [out_features] of rows, or one a square block."""
    if key.endswith(f".{Fp8Block.amax_name}") and amax.dim() == 0:
        amax = amax[None, None, None, None]  # ModelOpt has no dimensions where there is one block
    if key.endswith(f".{_ONE_NUMBER}") or amax.dim() == 0:
        return amax.reshape(())
    kept = amax[:, 0, :, 0] if amax.dim() == 4 else amax.reshape(-1)
    return kept.clamp_min(grids.LEAST_AMAX)  # of a row or block of zeros, too, a scale is made


def _in_its_dtype(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """Return a weight in the dtype that it came in: what a bias in float32 is added to is float32."""
    return output.to(inputs[0].dtype)


@contextlib.contextmanager
def _changed(session: _Session) -> Iterator[None]:
    """Let ModelOpt group the modules as we do and score in two parts, and silence its progress bars and chatter.

    Nothing is dropped out: to run decoder layers again in the backward pass, ModelOpt has them in training mode.

    Attention is left as it is: to quantise keys and values, which we never ask for, ModelOpt would rewrite its source,
    and fails at that of some models (Bloom, MPT).
    """
    from modelopt.torch.quantization import algorithms
    from modelopt.torch.quantization.plugins.custom import CUSTOM_MODEL_PLUGINS

    def add(gradient: torch.Tensor, difference: torch.Tensor, score: torch.Tensor) -> None:
        score += session.score(gradient, difference)

    def group(model: nn.Module, name: str) -> str | None:
        return session.group_of.get(name)

    changes: list[tuple[Any, str, Any]] = [
        (algorithms, "tqdm", functools.partial(algorithms.tqdm, disable=True)),
        (algorithms, "_get_auto_quantize_score", session.score),
        (algorithms, "_add_auto_quantize_score", add),
        (algorithms._AutoQuantizeBaseSearcher, "quant_grouping_rules", [group]),
        (nn.Module, "register_full_backward_hook", _on_output_gradient),
        (nn.functional, "dropout", lambda x, *_, **__: x),
    ]
    before = [(place, name, getattr(place, name)) for place, name, _ in changes]
    rewriting = {plugin for plugin in CUSTOM_MODEL_PLUGINS if plugin.__name__ == _ATTENTION_PLUGIN}
    CUSTOM_MODEL_PLUGINS.difference_update(rewriting)
    for place, name, value in changes:
        setattr(place, name, value)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)
        CUSTOM_MODEL_PLUGINS.update(rewriting)


def _on_output_gradient(module: nn.Module, hook: Callable[[nn.Module, Any, Any], None], prepend: bool = False) -> Any:
    """Call `hook` with the gradient of the module's output, as torch's own hook does that this one stands in for.

    Torch's makes a view of the output, which a model can't add to in place (Falcon's decoder layers do). Of a module
    that runs several times, ModelOpt knows the last run's error only: each run's gradient meets its own here.
    """

    def watch(_: nn.Module, __: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        errors: Any = getattr(module, "output_diff_dict", None)

        def meet(gradient: torch.Tensor) -> None:
            module.output_diff_dict = errors
            hook(module, (), (gradient,))

        if tensor.requires_grad:
            tensor.register_hook(meet)

    return module.register_forward_hook(watch, prepend=prepend)


def freeze_outside(model: nn.Module, language_model: str) -> None:
    """Let no gradient into the vision tower and the projector: ModelOpt asks for one at every parameter whose name has
    "embed" in it, a vision tower's patch embedding included, and the backward pass would run through all of it.

    Args:
        model: the whole model; its modules' `forward` is replaced.
        language_model: dotted path of the language model in it.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    parts = language_model.split(".")
    for depth, part in enumerate(parts):
        parent = model.get_submodule(".".join(parts[:depth]))
        for name, child in parent.named_children():
            if name != part and child is not head:
                child.forward = torch.no_grad()(child.forward)


def measurable(device: str) -> tuple[str, ...]:
    """Return the formats that ModelOpt's search can measure on a device."""
    searched = (one for one in FORMATS.values() if one.modelopt_searches)
    return tuple(one.name for one in searched if one.modelopt_on_cpu or device.startswith("cuda"))


def check_formats(names: Sequence[str], device: str, *, or_native: bool = True) -> None:
    """Look whether ModelOpt's search can measure these formats on a device.

    Args:
        names: of formats.
        device: where.
        or_native: whether the native engine can measure the model.

    Raises:
        EngineError: it can't; the message names those that it can.
    """
    formats = [get_format(name) for name in names]
    unknown = [one.name for one in formats if not one.modelopt_searches]
    off_cpu = [one.name for one in formats if not one.modelopt_on_cpu and not device.startswith("cuda")]
    if unknown:
        problem = f"ModelOpt's search keeps no amax of {', '.join(unknown)}, without which nothing can be exported"
    elif off_cpu:
        problem = f"ModelOpt computes {', '.join(off_cpu)} on NVIDIA GPUs alone, and this is {device}"
    else:
        return
    others = "use engine: native, or" if or_native else "use"
    raise EngineError(f"{problem}; {others} formats that ModelOpt measures here: {', '.join(measurable(device))}")


def run(model: nn.Module, job: Job, partial: Partial, meter: Meter) -> None:
    """Calibrate and score; amax values and each batch's scores go to `partial`. The model is not usable afterwards.

    Raises:
        MeasurementError: NaN or Inf in activations. EngineError: ModelOpt failed or behaves otherwise than known.
    """
    import modelopt.torch.quantization as mtq

    session = _Session(model, job, partial)
    searched = {module.name for group in job.target.groups for module in group.modules}
    model.config.use_cache = False  # type: ignore[union-attr]
    dropped: list[Any] = [module for module in model.modules() if hasattr(module, "layerdrop")]
    for module in dropped:
        module.layerdrop = 0.0  # see `_changed`
    if session.image_tokens:  # else what lies outside may be a part of the head (ModernBERT's)
        freeze_outside(model, job.target.language_model)
    with meter.phase("calibrate and score"), without_cudnn_attention(), _changed(session):
        try:
            mtq.auto_quantize(
                model,
                constraints={"effective_bits": _KEEP_EVERYTHING_BITS},
                quantization_formats=[get_format(name).modelopt_quantisation() for name in job.spec.formats],
                data_loader=session,
                forward_step=session.forward_step,
                forward_backward_step=session.forward_backward_step if job.spec.method == "gradient" else None,
                disabled_layers=[name for name, _ in model.named_modules() if name and name not in searched],
                num_calib_steps=len(job.batches) + 1,  # one more than there are, so that the last one's end is seen
                num_score_steps=job.score_batches + 1,
                method=job.spec.method,
                verbose=False,
            )
        except _RAISED as error:
            _explain(error)
    if session.iterations != len(job.spec.formats) + 1:
        raise EngineError(
            f"ModelOpt read the data {session.iterations} times, {len(job.spec.formats) + 1} were expected; "
            "this version of ModelOpt is not supported"
        )


def _explain(error: Exception) -> None:
    """Raise what went wrong inside ModelOpt as one of our errors."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        raise MeasurementError(OUT_OF_MEMORY) from error
    if "nan" in text.lower() or "inf " in text.lower():
        raise MeasurementError(
            f"NaN or Inf in activations during calibration ({text[:200]}); check the model and the data"
        ) from error
    raise EngineError(f"ModelOpt failed: {type(error).__name__}: {text[:300]}; use engine: native") from error
