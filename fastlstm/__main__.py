"""The command line: ``python -m fastlstm``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import __version__, _interrupt, datasets, threads
from .jobs import JobError, bench, mnist, predict, train

EPILOG = """examples:
  {0} mnist --epochs 8 --save lstm.safetensors
  {0} mnist --compare --plot compare.png
  {0} train walks.csv --group person --target activity --save walks.joblib
  {0} predict walks.joblib new.csv
  {0} bench
  {0} COMMAND --help"""


def _parser() -> tuple[argparse.ArgumentParser, dict[str, tuple[Callable[..., None], argparse.ArgumentParser]]]:
    """The parser, and by command what runs it with its own parser."""
    name = "fastlstm" if Path(sys.argv[0]).stem == "fastlstm" else "python -m fastlstm"
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        name, description="Recurrent layers for NumPy on the CPU.", epilog=EPILOG.format(name), allow_abbrev=False,
        formatter_class=form,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"fastlstm {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    jobs = {}
    for command, job in (("mnist", mnist), ("train", train), ("predict", predict), ("bench", bench)):
        own = commands.add_parser(
            command, help=job.HELP, description=job.DESCRIPTION, epilog=job.EPILOG.format(f"{name} {command}"),
            allow_abbrev=False, formatter_class=form,
        )  # fmt: skip
        job.add_arguments(own)
        jobs[command] = (job.run, own)
    own = commands.add_parser("config", help="show how fastlstm was built and what it found", allow_abbrev=False)
    jobs["config"] = (lambda *_: threads.show_config(), own)
    return parser, jobs


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
    command = ""
    try:
        _interrupt.hand_back()
        parser, jobs = _parser()
        args = parser.parse_args(argv)
        if args.command is None:
            parser.print_help()
            return 0
        command, (run, own) = args.command, jobs[args.command]
        run(own, args)
    except (JobError, datasets.DataError) as error:
        print(f"fastlstm {command}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who read the output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\nfastlstm: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
