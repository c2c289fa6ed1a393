"""How a run is told: bars on a terminal, lines with the time elsewhere, and `run.log` in its output directory."""

import datetime
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from bitladder.runinfo import Progress

if TYPE_CHECKING:
    from rich.console import Console

Write = Callable[[str], None]  # takes a line
LINES_EVERY, LOG_EVERY = 10.0, 60.0  # seconds between two lines of one phase


def bars(console: "Console") -> tuple[Callable[[], None], Progress]:
    """Draw bars on a terminal; return what takes them away, and what moves them.

    Args:
        console: of the terminal.
    """
    from rich import progress

    drawn = progress.Progress(
        progress.TextColumn("{task.description:<34}"),
        progress.BarColumn(bar_width=30),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        console=console,
    )
    tasks: dict[str, progress.TaskID] = {}

    def move(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            tasks[phase] = drawn.add_task(phase, total=total)
        drawn.update(tasks[phase], completed=done, total=total)

    drawn.start()
    return drawn.stop, move


class Lines:
    """Progress in lines: the begin of a phase, now and then how far it is, its end."""

    def __init__(self, write: Write, every: float) -> None:
        """Write to `write`, of one phase at most a line in so many seconds between its begin and its end."""
        self._write, self._every = write, every
        self._running: dict[str, tuple[float, float]] = {}  # phase -> when it began, when it was last told of

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Take how far a phase is."""
        ended = bool(total) and done >= total
        if ended and phase not in self._running:  # told before, or there was nothing to do
            return
        now = time.monotonic()
        begun, told = self._running.get(phase, (now, None))
        took = f"{now - begun:.1f} s"
        of = f" {done:,} of {total:,}" if total > 1 else ""
        if ended:
            del self._running[phase]
            self._write(f"{phase}:{f' {total:,}' if total > 1 else ''} done in {took}")
            return
        if told is None:
            self._write(f"{phase}:{of or ' begun'}")
        elif now - told < self._every:
            return
        else:
            left = f", about {(now - begun) / done * (total - done):.0f} s left" if done and total else ""
            self._write(f"{phase}:{of} after {took}{left}")
        self._running[phase] = begun, now


class Log:
    """A file that lines are added to, each with its time; what comes before it may be written is kept until then."""

    def __init__(self, path: Path) -> None:
        """Write nothing yet."""
        self._path, self._kept, self._opened = path, "", False

    def begin(self) -> None:
        """Write from now on, and what was kept: the directory is known to be ours, and nobody else's now."""
        self._opened = True

    def write(self, text: str) -> None:
        """Take a text, of one line or several."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._kept += "".join(f"{now} {line}\n" for line in text.splitlines())
        if not self._opened:
            return
        with suppress(OSError):  # a full disk is told by what the run itself writes
            # Whole lines at once and to the end, whoever else writes; through no link.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self._path, flags, 0o666)
            try:
                os.write(descriptor, self._kept.encode(errors="backslashreplace"))
            finally:
                os.close(descriptor)
        self._kept = ""


def timed(write: Write) -> Write:
    """Return what writes a line with the time of day before it."""
    return lambda line: write(f"{datetime.datetime.now().astimezone():%H:%M:%S} {line}")


class Teller:
    """Tells a run's progress and remarks to the user and to the log; to be called by several threads."""

    def __init__(self, log: Log, shown: Callable[[], Progress], say: Write, detail: Write) -> None:
        """Tell nothing yet.

        Args:
            log: of the run.
            shown: makes what shows progress, once there is some: planning shows none.
            say: takes a remark.
            detail: takes what only some want to know.
        """
        self.log, self._say, self._detail = log, say, detail
        self._make_shown = shown
        self._shown: Progress | None = None
        self._logged = Lines(log.write, LOG_EVERY)
        self._telling = Lock()  # checkpoints are written by several threads

    def progress(self, phase: str, done: int, total: int) -> None:
        """Show how far a phase is."""
        with self._telling:
            if self._shown is None:
                self._shown = self._make_shown()
            self._logged(phase, done, total)
            self._shown(phase, done, total)

    def say(self, line: str) -> None:
        """Say a remark."""
        self.log.write(line)
        self._say(line)

    def detail(self, line: str) -> None:
        """Say what was done, by a process that has the output directory for itself."""
        self.log.begin()
        self.log.write(line)
        self._detail(line)
