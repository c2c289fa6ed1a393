"""How fast a scheme is served, from a profile of the device: `SpeedModel(profile, groups).predict(formats, load)`.

A profile holds the seconds of every layer of the model in every format, and those of the engine in 16 bits. The rest of
a model (attention, norms, sampling, the host) takes what the engine took less its layers in 16 bits, and takes as long
whatever the formats are:

    seconds = rest(load) + Σ over groups of layer(shape, format, tokens)

A layer's seconds are interpolated between the numbers of tokens that were timed, and go on as they rise at the end. A
step of prefill has as many tokens as the engine puts into one; a step of decoding has one a request, padded to the next
CUDA graph. The rest of a step is fitted to the loads that were timed:

    prefill  a + b · tokens + c · tokens · prompt + d · requests
    decode   e + f · tokens + g · requests · context

with no factor below zero; what the fit of decoding leaves over is interpolated between numbers of tokens. Where few
tokens are prefilled the host takes longer to start the operations than the device to do them; then its seconds count,
those of the smallest load outside CUDA graphs, whatever the formats are.

With speculative decoding a step verifies a token of each request and all that were drafted after it, at once: the
layers, norms, output head and sampler have so many tokens, attention reads a request's keys and values once. Of them as
many are kept in any format, so that the factor cancels in a ratio; a step counts as one token of each request. What
takes time to draft them isn't a part of a profile, nor of what is predicted.

`benchmarks/speed.py` compares what is predicted with what vLLM serves.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import median

import numpy as np
from numpy.typing import NDArray

from bitladder.errors import PlanError
from bitladder.recipe import Phase, SpeedSpec
from bitladder.records import BF16, Profile, QuantGroup, QuantModule, TimedLayer, TimedLoad

PHASES: tuple[Phase, ...] = ("prefill", "decode")
PICOSECONDS = 10**12  # a cost is a whole number of them
_LEAST_STEPS = 16  # of decoding, for each step of prefill that answers may have added
_GRAPH_TOKENS = 512  # of the largest CUDA graph that vLLM makes unless it is told to (vllm 0.25.1, config/vllm.py)
_HOST_BOUND = 1.5  # prefill that takes less than so many times what the fewest tokens take says nothing of the device


@dataclass(frozen=True)
class Load:
    """Requests that are given at once, with so many tokens of prompt and of answer each."""

    requests: int = 64
    prompt_tokens: int = 512
    output_tokens: int = 128
    speculative_tokens: int = 0  # drafted for a request, which the next step of decoding verifies

    def __str__(self) -> str:
        drafted = f", {self.speculative_tokens} of each drafted a step" if self.speculative_tokens else ""
        requests = f"{self.requests} request{'' if self.requests == 1 else 's'}"
        return f"{requests} of {self.prompt_tokens} + {self.output_tokens} tokens{drafted}"

    @property
    def context(self) -> float:
        """Tokens that a request holds while it is decoded, on average."""
        return self.prompt_tokens + (self.output_tokens + 1) / 2

    @property
    def verified(self) -> int:
        """Tokens of a step of decoding: one of each request, and those that were drafted."""
        return self.requests * (self.speculative_tokens + 1)


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one scheme at one load, and how many times that of the model in 16 bits it is.

    Where tokens are drafted, `decode` is of one a request and step, as if drafting took no time and all were refused.
    """

    prefill: float
    decode: float
    prefill_ratio: float
    decode_ratio: float

    def ratio(self, phase: Phase) -> float:
        """Return a phase's ratio to 16 bits."""
        return self.prefill_ratio if phase == "prefill" else self.decode_ratio


class SpeedModel:
    """Predicts speeds of one model's schemes.

    Raises:
        PlanError: the profile is of a model with other layers, or timed no such load.
    """

    def __init__(self, profile: Profile, groups: Sequence[QuantGroup], load: Load | None = None) -> None:
        """Make a model.

        Args:
            profile: of the device that serves.
            groups: of the model that is planned, as one rank holds them.
            load: what speeds are predicted for where nothing else is said.
        """
        self.profile = profile
        self.load = load or Load()
        self.check(self.load)
        self.groups = tuple(groups)
        shapes = [group.fused_shape for group in groups]
        own = {shape: shapes.count(shape) for shape in shapes}
        known: dict[tuple[int, int] | None, int] = {
            (one.out_features, one.in_features): one.groups for one in profile.searched
        }
        if own != known:
            raise PlanError(
                f"the profile is of {profile.model}, whose layers are {_listed(known)}; these are {_listed(own)}: run "
                "`bitladder profile` on this model"
            )
        self._shapes = {group.name: group.fused_shape for group in groups}
        self._layers = {(one.format, one.out_features, one.in_features): one for one in profile.layers}
        self._taken: dict[tuple[str, tuple[int, int] | None, Phase, Load], float] = {}
        started = self._started_by_host()
        least = min(started, key=lambda one: one.requests * one.prompt_tokens)
        self._host = median(least.one_token) / self._steps(least)
        self._prefill = _fitted([self._rest_of_prefill(load) for load in self._device_bound()])
        steps = [self._rest_of_decode(load) for load in self._answered()]
        self._decode = _fitted(steps)
        self._left = _left_over(steps, self._decode)
        self._plain = dict.fromkeys((group.name for group in groups), BF16)

    def predict(self, formats: Mapping[str, str], load: Load) -> Speed:
        """Return the speed of a scheme.

        Args:
            formats: group -> format, of all groups.
            load: what is served.

        Raises:
            PlanError: the profile has no times of a format.
        """
        own, plain = ({phase: self.seconds(one, phase, load) for phase in PHASES} for one in (formats, self._plain))
        return Speed(
            prefill=load.requests * load.prompt_tokens / own["prefill"],
            decode=load.requests / own["decode"],
            prefill_ratio=plain["prefill"] / own["prefill"],
            decode_ratio=plain["decode"] / own["decode"],
        )

    def asked(self, spec: SpeedSpec) -> Load:
        """Return the load at which a scheme is to be fast: its own, as far as it names one."""
        own = {one.name: getattr(spec, one.name) for one in fields(Load)}
        return replace(self.load, **{name: value for name, value in own.items() if value is not None})

    def check(self, load: Load) -> None:
        """Raise for a load beyond those that were timed: what more requests or tokens take isn't known.

        Raises:
            PlanError: names what was timed at most.
        """
        most = max(one.requests for one in self.profile.loads)
        longest = max(one.prompt_tokens + one.output_tokens for one in self.profile.loads)
        if load.requests > most or load.prompt_tokens + load.output_tokens > longest:
            raise PlanError(
                f"speed at {load} isn't known: the profile of {self.profile.place} has times of at most {most} "
                f"requests, and of {longest} tokens each; ask for no more"
            )
        timed = min(self.profile.engine.tokens_a_step, *(one.cells[-1].tokens for one in self.profile.layers))
        if load.speculative_tokens and load.verified > timed:
            raise PlanError(
                f"speed at {load} isn't known: a step would verify {load.verified} tokens, and the profile of "
                f"{self.profile.place} has times of at most {timed}; ask for fewer speculative_tokens or requests"
            )

    def uniform(self, format_name: str) -> dict[str, str]:
        """Return the scheme that has a format wherever the profile has times of it."""
        return {
            group.name: format_name if (format_name, *(group.fused_shape or ())) in self._layers else BF16
            for group in self.groups
        }

    def seconds(self, formats: Mapping[str, str], phase: Phase, load: Load) -> float:
        """Return the seconds of all prefill, or of a step of decoding."""
        layers = math.fsum(self._seconds_of(group, formats[group.name], phase, load) for group in self.groups)
        device = self.rest(phase, load) + layers
        return max(device, self._host_seconds(phase, load))

    def rest(self, phase: Phase, load: Load) -> float:
        """Return the seconds of what isn't a searched layer."""
        if phase == "prefill":
            return float(np.dot(self._prefill, self._prefill_terms(load)))
        fitted = float(np.dot(self._decode, _decode_terms(load)))
        return fitted + float(np.interp(load.verified, list(self._left), list(self._left.values())))

    def cost_of(self, phase: Phase, load: Load | None = None) -> Callable[[QuantGroup, str], int]:
        """Return what gives a group's part of `seconds` in a format, in whole picoseconds; see `planning.options`.

        It raises `PlanError` where the profile has no times of the format.
        """
        asked = self.load if load is None else load
        return lambda group, name: round(self._seconds_of(group, name, phase, asked) * PICOSECONDS)

    def budget(self, ratio: float, phase: Phase, load: Load) -> int:
        """Return the most picoseconds that all groups may take together where a phase is `ratio` times as fast."""
        return math.floor((self.seconds(self._plain, phase, load) / ratio - self.rest(phase, load)) * PICOSECONDS)

    def missing(self, formats: Sequence[str]) -> dict[str, str]:
        """Return those of the formats that the profile has no times of, and why."""
        gone = [name for name in formats if name not in self.profile.formats]
        return {name: self.profile.refused.get(name, "wasn't profiled") for name in gone}

    def _seconds_of(self, group: QuantGroup, format_name: str, phase: Phase, load: Load) -> float:
        """Return a group's seconds in a format; groups of one shape take the same."""
        key = format_name, self._shapes[group.name], phase, load
        if key not in self._taken:
            self._taken[key] = self._time(self._layer(group, format_name), phase, load)
        return self._taken[key]

    def _layer(self, group: QuantGroup, format_name: str) -> TimedLayer:
        shape = self._shapes[group.name]
        assert shape is not None
        found = self._layers.get((format_name, *shape))
        if found is None:
            why = self.profile.refused.get(format_name, "wasn't profiled")
            raise PlanError(
                f"the profile of {self.profile.place} has no times of {format_name} for {group.name} ({why}); leave "
                "the format out, or run `bitladder profile`"
            )
        return found

    def _time(self, layer: TimedLayer, phase: Phase, load: Load) -> float:
        """Return the seconds of a layer in all prefill, or in a step of decoding."""
        if phase == "decode":
            return _seconds(layer, self._padded(load))
        most = self.profile.engine.tokens_a_step
        whole, left = divmod(load.requests * load.prompt_tokens, most)
        return whole * _seconds(layer, most) + (_seconds(layer, left) if left else 0.0)

    def _padded(self, load: Load) -> int:
        """Return the tokens of a step of decoding: those of the next CUDA graph, where there is one.

        A graph holds whole requests, so that vLLM rounds its size up where tokens are drafted.
        """
        of_one = load.speculative_tokens + 1
        sizes = (math.ceil(size / of_one) * of_one for size in sorted(self.profile.engine.graph_sizes))
        return next((size for size in sizes if size >= load.verified), load.verified)

    def _steps(self, load: Load | TimedLoad) -> int:
        return math.ceil(load.requests * load.prompt_tokens / self.profile.engine.tokens_a_step)

    def _host_seconds(self, phase: Phase, load: Load) -> float:
        """Return the seconds that the host takes at least to start all operations; those of a CUDA graph are one."""
        if phase == "decode":
            return 0.0 if self._decodes_in_graph(load) else self._host
        return 0.0 if self._prefills_in_graph(load) else self._host * self._steps(load)

    def _decodes_in_graph(self, load: Load) -> bool:
        """Return whether steps of decoding run as CUDA graphs.

        An engine that speculates has them of as many requests as one that doesn't, up to vLLM's bound of tokens.
        """
        most = max(self.profile.engine.graph_sizes, default=0)
        return load.requests <= most and load.verified <= max(most, _GRAPH_TOKENS)

    def _prefills_in_graph(self, load: Load | TimedLoad) -> bool:
        """Return whether prefill runs as CUDA graphs of a model's pieces."""
        engine = self.profile.engine
        most = max(engine.graph_sizes, default=0)
        return "PIECEWISE" in engine.graphs and load.requests * load.prompt_tokens <= most

    def _device_bound(self) -> list[TimedLoad]:
        """Return the loads whose prefill the device takes its time for."""
        started = self._started_by_host()
        least = min(median(one.one_token) / self._steps(one) for one in started)
        found = [one for one in started if median(one.one_token) > _HOST_BOUND * least * self._steps(one)]
        return found or list(self.profile.loads)

    def _started_by_host(self) -> Sequence[TimedLoad]:
        """Return the loads whose prefill the host starts operation by operation; all, where there are none."""
        return [one for one in self.profile.loads if not self._prefills_in_graph(one)] or self.profile.loads

    def _spilled(self, timed: TimedLoad) -> int:
        """Return how many steps of prefill more it takes where answers are longer than a token.

        The first answers go on while the last prompts are prefilled, and take room in those steps.
        """
        steps, most = self._steps(timed), self.profile.engine.tokens_a_step
        answers = timed.requests * (steps - 1) / 2  # requests come in evenly
        return math.ceil((timed.requests * timed.prompt_tokens + answers) / most) - steps

    def _answered(self) -> list[TimedLoad]:
        """Return the loads with so many tokens of output that their steps can be told from those of prefill."""
        found = [one for one in self.profile.loads if one.output_tokens > _LEAST_STEPS * (1 + self._spilled(one))]
        return found or list(self.profile.loads)

    def _prefill_terms(self, load: Load) -> NDArray[np.float64]:
        tokens = load.requests * load.prompt_tokens
        return np.array([1.0, tokens, tokens * load.prompt_tokens, load.requests], dtype=np.float64)

    def _rest_of_prefill(self, timed: TimedLoad) -> "_Seen":
        load, whole = _load_of(timed), median(timed.one_token)
        own = math.fsum(self._seconds_of(group, BF16, "prefill", load) for group in self.groups)
        return _Seen(self._prefill_terms(load), whole - own, whole)

    def _rest_of_decode(self, timed: TimedLoad) -> "_Seen":
        load, spilled = _load_of(timed), self._spilled(timed)
        taken = median(timed.all_tokens) - median(timed.one_token) - spilled * self._host
        whole = taken / (timed.output_tokens - 1 - spilled)
        own = math.fsum(self._seconds_of(group, BF16, "decode", load) for group in self.groups)
        return _Seen(_decode_terms(load), whole - own, whole)


def groups_of(profile: Profile) -> tuple[QuantGroup, ...]:
    """Return groups of a model like the profile's: of their shapes, under names of their own."""
    shapes = [(one.out_features, one.in_features) for one in profile.searched for _ in range(one.groups)]
    return tuple(
        QuantGroup(
            name=str(place),
            modules=(QuantModule(name=str(place), shape=shape),),
            weight_elements=shape[0] * shape[1],
        )
        for place, shape in enumerate(shapes)
    )


@dataclass(frozen=True)
class _Seen:
    """What a timed load says of the rest: its terms, its seconds, and the seconds of the whole, by which it weighs."""

    terms: NDArray[np.float64]
    rest: float
    whole: float


def _load_of(timed: TimedLoad) -> Load:
    return Load(timed.requests, timed.prompt_tokens, timed.output_tokens)


def _decode_terms(load: Load) -> NDArray[np.float64]:
    return np.array([1.0, load.verified, load.requests * load.context], dtype=np.float64)


def _fitted(seen: Sequence[_Seen]) -> NDArray[np.float64]:
    """Return the factors of the terms, none below zero, by least squares of the errors over the whole's seconds.

    With so few terms every set of them that stay above zero can be tried: the best feasible one is the answer.
    """
    count = len(seen[0].terms)
    matrix = np.array([one.terms / one.whole for one in seen])
    wanted = np.array([one.rest / one.whole for one in seen])
    best, least = np.zeros(count), float(np.sum(wanted**2))
    for used in range(1, 2**count):
        columns = [place for place in range(count) if used >> place & 1]
        scale = np.abs(matrix[:, columns]).max(axis=0)
        scale[scale == 0] = 1.0
        found = np.linalg.lstsq(matrix[:, columns] / scale, wanted, rcond=None)[0] / scale
        error = float(np.sum((matrix[:, columns] @ found - wanted) ** 2))
        if (found >= 0).all() and error < least * (1 - 1e-9):
            best, least = np.zeros(count), error
            best[columns] = found
    return best


def _left_over(seen: Sequence[_Seen], factors: NDArray[np.float64]) -> dict[float, float]:
    """Return what the fit leaves over by the number of tokens, ascending: between two it is on the line."""
    found: dict[float, list[float]] = {}
    for one in sorted(seen, key=lambda one: one.terms[1]):
        found.setdefault(float(one.terms[1]), []).append(one.rest - float(np.dot(factors, one.terms)))
    return {tokens: math.fsum(rests) / len(rests) for tokens, rests in found.items()}


def _seconds(layer: TimedLayer, tokens: int) -> float:
    """Return a layer's seconds for so many tokens: on the line between the timed numbers, beyond them on the last."""
    cells = layer.cells
    times = [cell.seconds for cell in cells]
    if tokens <= cells[0].tokens or len(cells) == 1:
        return times[0]
    place = next((index for index, one in enumerate(cells) if one.tokens >= tokens), len(cells) - 1)
    slope = (times[place] - times[place - 1]) / (cells[place].tokens - cells[place - 1].tokens)
    return max(times[place - 1] + slope * (tokens - cells[place - 1].tokens), 0.0)


def _listed(shapes: Mapping[tuple[int, int] | None, int]) -> str:
    """Return shapes and how many groups have each."""
    words = [
        f"{count} of {'unknown shape' if shape is None else f'{shape[0]} x {shape[1]}'}"
        for shape, count in shapes.items()
    ]
    return ", ".join(words)
