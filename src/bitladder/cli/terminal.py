"""What the commands show: progress and tables, what was found, how a run ended.

rich is imported when there is something to draw, which is after a command's work.
"""

import gc
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from bitladder.errors import ProbeFailed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from bitladder.library import Run
    from bitladder.records import Measurement, ProbeResult, Scheme

_stdout = sys.stdout  # this very stream: ModelOpt's prints are silenced by replacing sys.stdout
_WIDE = 160  # columns
_debug = False  # whether all that libraries say, and tracebacks, are shown


@cache
def console() -> "Console":
    """Return what prints to standard output; without markup, since names hold brackets."""
    from rich.console import Console

    return Console(file=_stdout, markup=False)


@cache
def complaints() -> "Console":
    """Return what prints to standard error."""
    from rich.console import Console

    return Console(stderr=True)


class Interrupted(Exception):
    """The user pressed Ctrl-C."""


def set_up(*, debug: bool) -> None:
    """Show everything, or keep back what other libraries tell."""
    global _debug
    _debug = debug
    if not debug:
        # ModelOpt and transformers tell a lot that a user can't act on.
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@contextmanager
def started(recipe: Path, output: Path | None) -> Iterator["Run"]:
    """Yield the recipe's run, with progress bars."""
    from bitladder.library import Run

    run = Run(recipe, output=output, quiet=not _debug)
    tasks: dict[str, int] = {}
    asked_to_stop: list[int] = []
    telling = Lock()  # checkpoints are written by several threads

    def stop(number: int, _: object) -> None:
        asked_to_stop.append(number)
        raise KeyboardInterrupt

    with ExitStack() as shown:
        bars = cache(lambda: shown.enter_context(_bars()))  # from the first progress on: planning shows none

        def progress(phase: str, done: int, total: int) -> None:
            if asked_to_stop:  # a library swallowed the first KeyboardInterrupt
                raise KeyboardInterrupt
            with telling:
                if phase not in tasks:
                    tasks[phase] = bars().add_task(phase, total=total)
            bars().update(tasks[phase], completed=done, total=total)  # type: ignore[arg-type]

        before = signal.signal(signal.SIGINT, stop)
        try:
            print(f"Output: {run.output}", file=_stdout, flush=True)
            run.progress, run.tell = progress, say
            gc.freeze()
            gc.enable()
            yield run
        except KeyboardInterrupt as error:
            raise Interrupted from error
        finally:
            signal.signal(signal.SIGINT, before)
            if not tasks:
                print(file=_stdout, flush=True)  # where the bars would be


def _bars() -> "Progress":
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description:<34}"),
        progress.BarColumn(bar_width=30),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        console=console(),
    )


def quietly() -> AbstractContextManager[None]:
    """Keep other libraries quiet in the body, unless everything is to be seen."""
    from bitladder.library import quiet_libraries

    gc.freeze()
    gc.enable()
    return nullcontext() if _debug else quiet_libraries()


def print_table(table: "Table") -> None:
    """Print a table at the width it needs: a narrow terminal or a pipe must not swallow columns."""
    from rich.console import Console

    Console(file=sys.stdout, width=max(console().width, _WIDE), markup=False).print(table, crop=False)


def print_schemes(measurement: "Measurement", schemes: "tuple[Scheme, ...]") -> None:
    """Print what schemes of a measurement cost and are predicted to do."""
    from rich.table import Table

    from bitladder import planning

    table = Table("scheme", "coverage", "effective bits", "weight bytes", "predicted score", "± SE", "groups")
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
        )
    print_table(table)
    console().print(f"predicted score in {measurement.score_unit}")
    for scheme in schemes:
        smallest = planning.at_the_floor(measurement, scheme)
        if smallest:
            say(
                planning.floor_sentence(
                    scheme.name, scheme.effective_bits, scheme.narrow(measurement).formats, smallest
                )
            )


def say(text: str) -> None:
    """Print a line as it is, however long."""
    console().print(text, soft_wrap=True, highlight=False)


def close_probes(results: "Sequence[ProbeResult]") -> None:
    """Print what was found; raise ProbeFailed where a checkpoint doesn't pass."""
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
            beside = f", {speed.tokens_per_second / source:.2f} times the original's {source:,.0f}" if source else ""
            say(f"{result.checkpoint}: {speed.phase} {speed.tokens_per_second:,.0f} tokens/s{beside}")
        for item in result.log_probs:
            noise = item.source_mean_abs_difference
            beside = "" if noise is None else f"; the original's {noise:.4f}"
            say(
                f"{result.checkpoint}: mean |Δ log-prob| {item.mean_abs_difference:.4f} nats per token on {item.split} "
                f"({item.tokens} tokens{beside}; tolerance {item.tolerance:.4f})"
            )
        if result.traceback and _debug:
            say(result.traceback)
    failed = [f"{result.checkpoint} in {result.runtime}: {result.verdict}" for result in results if not result.ok]
    if failed:
        raise ProbeFailed(f"{len(failed)} of {len(results)} checks failed; the first: {failed[0]} (see above)")


def complain(error: Exception, line: str, status: int) -> None:
    """Say in a line how a command failed, under its traceback where that is asked for, and exit with this status."""
    if _debug:
        import traceback

        traceback.print_exception(error)
    # What people named, or a library says, may hold line ends.
    one = "\\n".join(line.splitlines())
    complaints().print(one, soft_wrap=True, highlight=False, markup=False)
    sys.exit(status)
