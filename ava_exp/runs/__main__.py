"""The arguments of `python -m ava_exp.runs`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ava_exp.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from ava_exp.runs import commands
from ava_exp.runs.compare import compare

LOGS = ("training", "evaluation", "errors", "debug", "job")
EXIT_BROKEN_PIPE = 141


class OneLineParser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `python -m ava_exp.runs --help` shows what can be written.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer one question and return the exit code."""
    try:
        given = vars(parser().parse_args(arguments))
        command = given.pop("command")
        return int(command(**given))
    except UserError as error:
        print(f"ava_exp: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:  # while watching; the run goes on
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains
        return EXIT_BROKEN_PIPE


def parser() -> argparse.ArgumentParser:
    """Return the parser; what it parses are a command's keywords and the command itself."""
    common = OneLineParser(add_help=False)
    common.add_argument("--output-dir", type=Path, default=Path("outputs"), help="where the runs are (outputs)")
    named = OneLineParser(add_help=False, parents=[common])
    named.add_argument("name", help="a run, `latest`, or the id of a job")
    several = OneLineParser(add_help=False, parents=[common])
    several.add_argument("names", nargs="+", metavar="name", help="runs, two or more")
    top = OneLineParser(prog="python -m ava_exp.runs", description="Runs and jobs.")
    kinds = top.add_subparsers(required=True, metavar="COMMAND", parser_class=OneLineParser)
    for name, command, help_text, parent in (
        ("list", commands.list_runs, "every run, how it stands, how far it is", common),
        ("show", commands.show, "one run: results, what differs from the default, folders", named),
        ("watch", commands.watch, "a line whenever something changed, until it has ended", named),
        ("logs", commands.logs, "the last lines that it logged or printed", named),
        ("cancel", commands.cancel, "end its job, or let its process save and stop", named),
        ("resubmit", commands.resubmit, "give a job's command again, with the code as it is now", named),
        ("compare", compare, "several runs beside each other: results, settings that differ", several),
        ("verify", commands.verify, "read its checkpoints and compare them with their checksums", named),
    ):
        kind = kinds.add_parser(name, help=help_text, description=help_text, parents=[parent])
        kind.set_defaults(command=command)
        if name == "watch":
            kind.add_argument("--interval-s", type=float, default=5.0, help="seconds between two looks (5)")
        if name == "logs":
            kind.add_argument("-n", "--lines", dest="num_lines", type=int, default=20, help="how many (20)")
            kind.add_argument("--file", dest="which", choices=LOGS, help="which one (training, or job before that)")
    return top


if __name__ == "__main__":
    sys.exit(main())
