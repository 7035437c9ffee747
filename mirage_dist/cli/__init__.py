"""The command `mirage`: one subcommand a verb, parsing only. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

from mirage_dist import liveness, signals
from mirage_dist.cli.arguments import parser
from mirage_dist.disk import faults
from mirage_dist.progress import show
from mirage_dist.ranks import check_environment, exit_well, place
from mirage_dist.schema import ConfigError, RunError

INTERRUPTED = 130  # as a shell reports SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; 2 for bad input, 1 for a run that cannot go on, signals.STOPPED for one that a signal stopped in
    order: one paragraph each, without a traceback. A bug has status 1, its traceback, and a request to report it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # a descriptor that was exchanged meanwhile
                stream.reconfigure(errors="backslashreplace")  # a terminal may have no letter for what a path holds
    liveness.end_with_parents()
    # Each of torch's C++ warnings brings twenty lines of stack, such as on every rank when the first one has ended; its
    # errors stay. Read when torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        parsed = parse(arguments)
        check_environment()
        parsed.run(parsed)
    except (ConfigError, RunError) as error:
        show(f"mirage: {error}", error=True)
        return error.status
    except signals.StopRequested as stop:
        if place()[0] == 0:
            with suppress(RunError):  # that nobody reads it makes it no failure
                show(f"mirage: {stop}")
        exit_well(signals.STOPPED)
    except KeyboardInterrupt:
        show("mirage: interrupted; the same command does what is missing", error=True)
        return INTERRUPTED
    except Exception as error:
        if (sentence := faults.sentence(error)) is None:
            show(traceback.format_exc(), error=True)
            sentence = "this is a bug in mirage_dist; please report it with this traceback"
        show(f"mirage: {sentence}", error=True)
        return RunError.status
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as its verb takes it, `run` being the verb. Ends the process with 2 for one that is wrong."""
    parsed, rest = parser().parse_known_args(arguments)
    # key=value may stand anywhere; argparse takes positional arguments in one run only.
    if rest and (any(word.startswith("-") for word in rest) or not hasattr(parsed, "overrides")):
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed
