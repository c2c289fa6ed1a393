"""The command line. Each command imports what it needs inside itself, so that `--help` is quick.

The only place that catches our errors: one line on standard error, exit status 2; `--debug` shows the traceback.
"""

import sys

# Each adds its commands to the program, in this order.
from bitladder.cli import steps, checks, others, models, profiling  # isort: skip
from bitladder.cli.app import app, moved_to_the_front
from bitladder.cli.terminal import Interrupted, complain
from bitladder.errors import BitladderError, lacks_memory, reason_of

__all__ = ["app", "checks", "main", "models", "others", "profiling", "steps"]


def main() -> None:
    """Run the command line; exit status 0, 2 for an error with a remedy, 130 where interrupted, 1 for a bug."""
    try:
        app(moved_to_the_front(sys.argv[1:]))  # exits by itself, with status 2 where a command or an option is unknown
    except BitladderError as error:
        complain(error, f"error: {error}", 2)
    except Interrupted as error:
        complain(error, "interrupted; run the same command again to go on where it stopped", 130)
    except OSError as error:  # what the system says of a file or the disk is no bug of ours
        where = "" if error.filename is None else f"{error.filename}: "
        complain(error, f"error: {where}{error.strerror or reason_of(error)}; see that it can be read and written", 2)
    except Exception as error:
        if lacks_memory(error):
            complain(error, "error: out of memory; close other programs, or lower batch_size and sequence_length", 2)
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        kind = type(error).__name__
        complain(error, f"unexpected {kind}: {first} (a bug: please report it with --debug's output)", 1)
