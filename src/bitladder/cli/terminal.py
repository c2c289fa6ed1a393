"""What the commands show: what was found, as tables or as JSON, and how a run ended.

rich is imported when there is something to draw, which is after a command's work.
"""

import gc
import json
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitladder import __version__
from bitladder.errors import BitladderError, ProbeFailed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from bitladder.library import Run
    from bitladder.planning.prediction import Predicted
    from bitladder.records import Measurement, ProbeResult, Scheme
    from bitladder.runinfo import Progress
    from bitladder.steps.preview import Ahead

_stdout = sys.stdout  # this very stream: ModelOpt's prints are silenced by replacing sys.stdout
_WIDE = 160  # columns
LOG_FILE = "run.log"


@dataclass
class Mode:
    """How much is shown.

    Attributes:
        quiet: nothing but what was found.
        verbose: also what was done, and how long it took.
        debug: all that libraries say, and tracebacks.
        json: what was found is JSON on standard output, everything else goes to standard error.
    """

    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    json: bool = False


mode = Mode()


@cache
def console() -> "Console":
    """Return what prints for people: to standard output, unless JSON goes there. No markup: names hold brackets."""
    from rich.console import Console

    return Console(file=sys.stderr if mode.json else _stdout, markup=False)


@cache
def complaints() -> "Console":
    """Return what prints to standard error."""
    from rich.console import Console

    return Console(stderr=True)


class Interrupted(Exception):
    """The user pressed Ctrl-C."""


def set_up(asked: Mode) -> None:
    """Show as much as is asked for, and keep back what other libraries tell."""
    if mode.json != asked.json:
        console.cache_clear()
    vars(mode).update(vars(asked))
    if not mode.debug:
        # ModelOpt and transformers tell a lot that a user can't act on.
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def answered(**found: Any) -> bool:
    """Print what was found as JSON, where that is asked for, and return whether it is.

    Args:
        found: records, paths, and what JSON has, under their names.
    """
    if mode.json:
        print(json.dumps(_plain(found), indent=1, ensure_ascii=False), file=_stdout, flush=True)
    return mode.json


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@contextmanager
def started(recipe: Path, output: Path | None) -> Iterator["Run"]:
    """Yield the recipe's run, whose progress is shown and logged."""
    from bitladder.cli import telling
    from bitladder.library import Run

    run = Run(recipe, output=output, quiet=not mode.debug)
    log = telling.Log(run.output / LOG_FILE)
    log.write(f"bitladder {__version__}: {shlex.join(sys.argv[1:])}")
    asked_to_stop: list[int] = []

    def stop(number: int, _: object) -> None:
        asked_to_stop.append(number)
        raise KeyboardInterrupt

    with ExitStack() as ended:
        teller = telling.Teller(
            log,
            lambda: _shown(ended),
            (lambda line: None) if mode.quiet else say,
            say if mode.verbose or mode.debug else (lambda line: None),
        )

        def progress(phase: str, done: int, total: int) -> None:
            if asked_to_stop:  # a library swallowed the first KeyboardInterrupt
                raise KeyboardInterrupt
            teller.progress(phase, done, total)

        before = signal.signal(signal.SIGINT, stop)
        try:
            if not (mode.quiet or mode.json):
                _line(f"Output: {run.output}")
            run.progress, run.tell, run.detail = progress, teller.say, teller.detail
            gc.freeze()
            gc.enable()
            yield run
            log.write("ended")
        except KeyboardInterrupt as error:
            log.write("interrupted")
            raise Interrupted from error
        except Exception as error:
            log.write(f"error: {error}" if isinstance(error, BitladderError) else _traceback(error))
            raise
        finally:
            signal.signal(signal.SIGINT, before)


def _shown(ended: ExitStack) -> "Progress":
    """Return what shows progress; it is taken away at the end."""
    from bitladder.cli import telling
    from bitladder.runinfo import no_progress

    if mode.quiet:
        return no_progress
    if not (sys.stderr if mode.json else _stdout).isatty():
        return telling.Lines(telling.timed(_line), telling.LINES_EVERY)
    away, move = telling.bars(console())
    ended.callback(away)
    return move


def _line(text: str) -> None:
    """Print a line without rich, which takes its time to be imported."""
    print(text, file=sys.stderr if mode.json else _stdout, flush=True)


def _traceback(error: Exception) -> str:
    import traceback

    return "".join(traceback.format_exception(error))


def quietly() -> AbstractContextManager[None]:
    """Keep other libraries quiet in the body, unless everything is to be seen."""
    from bitladder.library import quiet_libraries

    gc.freeze()
    gc.enable()
    return nullcontext() if mode.debug else quiet_libraries()


def print_table(table: "Table") -> None:
    """Print a table at the width it needs: a narrow terminal or a pipe must not swallow columns."""
    from rich.console import Console

    Console(file=console().file, width=max(console().width, _WIDE), markup=False).print(table, crop=False)


def print_schemes(
    measurement: "Measurement", schemes: "tuple[Scheme, ...]", kls: "Mapping[str, Predicted | None]"
) -> None:
    """Print what schemes of a measurement cost and are predicted to do; `kls`: of their weights, where it is known."""
    from rich.table import Table

    from bitladder import planning
    from bitladder.planning.prediction import LEVEL

    table = Table("scheme", "coverage", "effective bits", "weight bytes", "predicted score", "± SE", "groups")
    if kls:
        table.add_column("predicted KL")
    for scheme in schemes:
        error = planning.standard_error(measurement, scheme.formats)
        table.add_row(
            scheme.name,
            f"{scheme.coverage:.2%}",
            f"{scheme.effective_bits:.3f}",
            f"{scheme.weight_bytes:,}",
            f"{scheme.predicted_score:.4g}",
            "-" if error is None else f"{error:.2g}",
            f"{len(scheme.quantised_groups())}/{len(scheme.formats)}",
            *([_with_interval(kls.get(scheme.name))] if kls else []),
        )
    print_table(table)
    console().print(f"predicted score in {measurement.score_unit}")
    if kls:
        console().print(
            "predicted KL of the weights in nats per token on text like the samples by which schemes are chosen, with "
            f"its {LEVEL:.0%} interval"
        )
    for scheme in schemes:
        smallest = planning.at_the_floor(measurement, scheme)
        if smallest:
            say(
                planning.floor_sentence(
                    scheme.name, scheme.effective_bits, scheme.narrow(measurement).formats, smallest
                )
            )


def _with_interval(kl: "Predicted | None") -> str:
    return "-" if kl is None else f"{kl.value:.3g} ({kl.low:.3g} to {kl.high:.3g})"


def print_preview(steps: "Sequence[Ahead]") -> None:
    """Print what a run would do."""
    from rich.table import Table

    table = Table("step", "would be done", "took before")
    for ahead in steps:
        took = "-" if ahead.seconds is None else f"{ahead.seconds:,.0f} s"
        table.add_row(ahead.step, "no, it is done and valid" if ahead.why is None else ahead.why, took)
    print_table(table)


def say(text: str) -> None:
    """Print a line as it is, however long."""
    console().print(text, soft_wrap=True, highlight=False)


def close_probes(results: "Sequence[ProbeResult]") -> None:
    """Print what was found; raise ProbeFailed where a checkpoint doesn't pass."""
    content = [{**result.model_dump(mode="json"), "ok": result.ok, "verdict": result.verdict} for result in results]
    if not answered(results=content):
        _print_probes(results)
    failed = [f"{result.checkpoint} in {result.runtime}: {result.verdict}" for result in results if not result.ok]
    if failed:
        raise ProbeFailed(f"{len(failed)} of {len(results)} checks failed; the first: {failed[0]} (see above)")


def _print_probes(results: "Sequence[ProbeResult]") -> None:
    from rich.table import Table
    from rich.text import Text

    from bitladder.report import STAGES

    table = Table("checkpoint", "runtime", "stage", "verdict", "linear modules run in", "as promised")
    for result in results:
        formats = [layer.format for layer in result.layers]
        counts = ", ".join(f"{formats.count(name)} {name.upper()}" for name in sorted(set(formats)))
        kept = [layer.format == layer.promised for layer in result.layers if layer.promised is not None]
        promised = f"{sum(kept)} of {len(kept)}" if kept else "-"
        runtime = f"{result.runtime} {result.version}"
        verdict = Text(result.verdict, style="" if result.ok else "bold red")
        table.add_row(result.checkpoint, runtime, STAGES[result.stage], verdict, counts or "-", promised)
    print_table(table)
    for result in results:
        for found in result.findings:
            say(
                f"{result.checkpoint}, {result.runtime}: {found.severity}, {found.error_class}: {found.where}: "
                f"{found.problem}; {found.remedy}"
            )
        for speed in result.throughput:
            source = speed.source_tokens_per_second
            beside = "" if speed.ratio is None else f", {speed.ratio:.2f} times the original's {source:,.0f}"
            say(f"{result.checkpoint}: {speed.phase} {speed.tokens_per_second:,.0f} tokens/s{beside}")
        for item in result.log_probs:
            noise = item.source_mean_abs_difference
            beside = "" if noise is None else f"; the original's {noise:.4f}"
            say(
                f"{result.checkpoint}: mean |Δ log-prob| {item.mean_abs_difference:.4f} nats per token on {item.split} "
                f"({item.tokens} tokens{beside}; tolerance {item.tolerance:.4f})"
            )
        if result.traceback and mode.debug:
            say(result.traceback)


def complain(error: Exception, line: str, status: int) -> None:
    """Say in a line how a command failed, under its traceback where that is asked for, and exit with this status."""
    if mode.debug:
        complaints().print(_traceback(error), soft_wrap=True, highlight=False, markup=False, end="")
    # What people named, or a library says, may hold line ends.
    one = "\\n".join(line.splitlines())
    complaints().print(one, soft_wrap=True, highlight=False, markup=False)
    sys.exit(status)
