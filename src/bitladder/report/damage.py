"""How much damage a scheme does, in words: `damage_of(results)`, and the bounds of the words."""

from collections.abc import Iterable
from typing import Literal

from bitladder.records import KL, TASK_ACCURACY, EvalResult

Damage = Literal["nearly_lossless", "small", "noticeable", "large"]

# Nats per token. llama.cpp's README of `perplexity` has 0.0055 for q6_K and 0.0108 for q5_K_M of LLaMA 3 8B, which its
# users take for nearly lossless; q4_K_M, which they serve too, has 0.031. At the last bound lies what
# rounding everything to four bits does to a small model: 0.196 and 0.219 for NVFP4 weights of SmolLM2-135M.
NEARLY_LOSSLESS_KL = 0.01
SMALL_KL = 0.05
NOTICEABLE_KL = 0.2
CONFIDENT_ERRORS = 2.0  # a bound counts as kept if the value plus so many standard errors does
_BOUNDS: tuple[tuple[Damage, float], ...] = (
    ("nearly_lossless", NEARLY_LOSSLESS_KL),
    ("small", SMALL_KL),
    ("noticeable", NOTICEABLE_KL),
)
WORDS: dict[Damage, str] = {
    "nearly_lossless": "nearly lossless",
    "small": "small damage",
    "noticeable": "noticeable damage",
    "large": "large damage",
}


def damage_of(results: Iterable[EvalResult]) -> Damage | None:
    """Return the word for what a checkpoint's evaluation says; None: it has no KL.

    The largest KL over the held-out sets decides, two standard errors included. A task's accuracy that is
    surely below the original's (the 95% interval of their difference; where answers weren't kept, two standard errors)
    is noticeable, however small the KL.
    """
    results = tuple(results)
    worst = max((_with_margin(result) for result in results if result.metric == KL), default=None)
    if worst is None:
        return None
    by_kl = damage_by_kl(worst)
    return "noticeable" if by_kl in ("nearly_lossless", "small") and lost_tasks(results) else by_kl


def lost_tasks(results: Iterable[EvalResult]) -> list[EvalResult]:
    """Return the results of tasks whose accuracy is surely below the original's; see `damage_of`."""
    return [result for result in results if _is_worse(result)]


def worst_task(results: Iterable[EvalResult]) -> EvalResult | None:
    """Return the result of the task that loses most beside the original; None: there is none."""
    found = [result for result in results if result.metric == TASK_ACCURACY]
    return min(found, key=beside_the_original, default=None)


def beside_the_original(result: EvalResult) -> float:
    """Return a share less the original's; 0 where that isn't known."""
    return 0.0 if result.reference is None else result.value - result.reference


def damage_by_kl(kl: float) -> Damage:
    """Return the word for a KL in nats per token."""
    return next((word for word, bound in _BOUNDS if kl <= bound), "large")


def bound_in_words(damage: Damage) -> str:
    """Return what a word stands for, in 10⁻³ nats a token."""
    names = [word for word, _ in _BOUNDS]
    if damage == "large":
        return f"KL above {_BOUNDS[-1][1] * 1e3:g} × 10⁻³ nats a token"
    index = names.index(damage)
    upper = f"{_BOUNDS[index][1] * 1e3:g} × 10⁻³ nats a token"
    accuracy = ", and no task's accuracy surely below the original's" if index < names.index("noticeable") else ""
    return f"KL at most {upper} on every held-out set, two standard errors included{accuracy}"


def _with_margin(result: EvalResult) -> float:
    return result.value + CONFIDENT_ERRORS * (result.standard_error or 0.0)


def _is_worse(result: EvalResult) -> bool:
    if result.paired is not None:
        return result.paired.interval[1] < 0
    return result.metric == TASK_ACCURACY and result.reference is not None and _with_margin(result) < result.reference
