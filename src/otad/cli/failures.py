"""What a command does when it cannot do its work: one line, an exit code, no traceback."""

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from otad.errors import OTADError

__all__ = ["FAILED", "INTERRUPTED", "PIPE_CLOSED", "Interrupted", "job"]

FAILED = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells count
PIPE_CLOSED = 141  # 128 + SIGPIPE

# Errors whose message was written for the user; any other is unexpected and says its type.
EXPECTED = (OTADError, ValueError, OSError)


class Interrupted(Exception):
    """Ctrl-C, with what was kept and how to go on."""


def job(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command turn errors into one line on stderr and an exit code.

    The command has the parameters `quiet` and `debug`.
    """

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        with_log(options.get("quiet", False))
        try:
            command(*args, **options)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader has gone (`otad predict ... | head`): stop quietly, and flush no more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(PIPE_CLOSED) from None
        except (Interrupted, KeyboardInterrupt) as error:
            say(f"otad: {one_line(error) or 'interrupted'}")
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if options.get("debug"):
                raise
            say(f"otad: error: {explained(error)}")
            raise typer.Exit(FAILED) from None

    inspect.signature(run)  # typer reads the options from the wrapped signature
    return run


def explained(error: Exception) -> str:
    """One line for the user."""
    if isinstance(error, OSError) and error.strerror:
        return one_line(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    if isinstance(error, EXPECTED) and str(error):
        return one_line(error)
    return one_line(f"{type(error).__name__}: {error} (unexpected; run again with --debug to see where)")


def one_line(message: object) -> str:
    """The message without line breaks."""
    return " ".join(str(message).split())


def say(line: str) -> None:
    """One line on stderr."""
    typer.echo(line, err=True)


def with_log(quiet: bool) -> None:
    """Log lines of the library on stderr; warnings only when quiet."""
    logger = logging.getLogger("otad")
    for old in [h for h in logger.handlers if isinstance(h, _Stderr)]:
        logger.removeHandler(old)
    logger.addHandler(_Stderr())
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


class _Stderr(logging.Handler):
    """Writes to what stderr is now, which tests and progress bars replace."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else "otad: warning: "
        say(prefix + one_line(record.getMessage()))
