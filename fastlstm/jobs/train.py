"""Train an estimator on the sequences of a file."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np

from .. import layers, plot
from .._types import Array
from . import JobError, tables
from .options import check_output, check_picture, integer, rate, write, write_picture

HELP = "train on sequences from CSV, Parquet or .npz"
DESCRIPTION = """Train a recurrent classifier or regressor on the sequences of a file and save it for
`predict`. A table in CSV or Parquet with --group: the rows of a group are a sequence, in the order
of --time, else as they stand. Without --group each row is a sequence, its features the steps. An
.npz without --group: the arrays X, (n, T) or (n, T, D), and y."""
EPILOG = """examples:
  {0} walks.csv --group person --target activity --save walks.joblib
  {0} load.parquet --group day --time hour --target load --per-step
  {0} spectra.csv --target kind --cell gru --epochs 100 --plot curves.png
  {0} data.npz --target y --test 0.3"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m fastlstm train``."""
    add = parser.add_argument
    add("data", metavar="DATA", type=Path, help="a file that ends in .csv, .parquet or .npz")
    add("--target", metavar="NAME", required=True, help="column, or array of an .npz, to predict")
    add("--group", metavar="NAME", help="column that says which sequence a row belongs to")
    add("--time", metavar="NAME", help="column by which the rows of a group are ordered")
    add("--features", metavar="A,B", type=tables.columns_of, help="columns to predict from (all others of numbers)")
    add("--per-step", action="store_true", help="predict the target of each row, not one of each sequence")
    add("--task", choices=("classify", "regress"), help="(regress if the target has fractions, else classify)")
    add("--cell", choices=layers.CELLS, default="lstm", help="recurrent layer (%(default)s)")
    add("--hidden", type=integer(1, 8192), default=64, help="units of the recurrent layer (%(default)s)")
    add("--epochs", type=integer(1, 100_000), default=50, help="passes over the training sequences (%(default)s)")
    add("--batch", type=integer(1, 100_000), default=32, help="sequences per step (%(default)s)")
    add("--lr", type=rate, default=1e-2, help="highest learning rate (%(default)s)")
    add("--test", type=_share, default=0.2, help="share of the sequences put aside to test on (%(default)s)")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="of weights, order and the part put aside (%(default)s)")
    add("--threads", type=integer(1, 1024), help="threads (default: the processors this process may use)")
    add("--save", metavar="FILE", type=Path, help="write the estimator there, for predict and for joblib.load")
    add("--plot", metavar="FILE", type=Path, help="draw the loss over the epochs there")


def _share(text: str) -> float:
    value = rate(text) if text.strip("0.") else 0.0
    if value >= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")
    return value


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Read, train, test, save. Raises JobError with one line that says what to do."""
    check_output(parser, "--save", args.save)
    check_picture(parser, args.plot)
    _check_names(parser, args)
    try:
        import joblib
        from sklearn.utils.multiclass import type_of_target
    except ImportError as error:
        raise JobError(f"train {tables.NEEDS}") from error
    layout = tables.Layout(args.group, args.time, args.features, args.target, args.per_step)
    samples = tables.read_samples(args.data, layout, with_target=True)
    flat = np.concatenate(samples.y) if isinstance(samples.y, list) else np.ravel(samples.y)
    try:
        fractions = type_of_target(flat) == "continuous"
        task = args.task or ("regress" if fractions else "classify")
        if task == "regress" and flat.dtype.kind not in "iufb":
            raise ValueError(f"{args.target}: expected numbers with --task regress, got {flat.dtype}")
        train, test = _split(samples, args, task)
        estimator = _estimator(args, task)
        print(_about(task, flat, samples, train, test))
        estimator.fit(*_take(samples, train))
        if len(test):
            name = "test accuracy" if task == "classify" else "test R^2"
            print(f"{name:<15} {estimator.score(*_take(samples, test)):.4f}")
    except (ValueError, TypeError, FloatingPointError) as error:
        raise tables.as_job_error(error) from error
    except MemoryError as error:
        raise JobError("not enough memory; try a smaller --hidden or --batch") from error
    if args.save:
        file = io.BytesIO()
        joblib.dump({"fastlstm": 1, "estimator": estimator, "layout": layout}, file)
        write(args.save, file.getvalue(), "--save")
        print(f"model           {args.save}")
    if args.plot:
        write_picture(args.plot, plot.learning_curves(estimator.history_))
        print(f"curves          {args.plot}")


def _check_names(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What --group, --time, --features, --target and --per-step cannot be together."""
    features, arrays = args.features or [], args.data.suffix == ".npz" and not args.group
    if args.time and not args.group:
        parser.error("argument --time: needs --group")
    if args.per_step and not args.group and not arrays:
        parser.error("argument --per-step: needs --group, or an .npz with arrays")
    if args.target in (args.group, args.time, *features):
        parser.error(f"argument --target: {args.target!r} is in --group, --time or --features already")
    if arrays and len(features) > 1:
        parser.error("argument --features: expected one array of an .npz without --group")


def _estimator(args: argparse.Namespace, task: str) -> Any:
    from ..sklearn import RecurrentClassifier, RecurrentRegressor

    return (RecurrentClassifier if task == "classify" else RecurrentRegressor)(
        args.cell, args.hidden, many_to_many=args.per_step, epochs=args.epochs, batch_size=args.batch,
        learning_rate=args.lr, random_state=args.seed, n_jobs=args.threads, verbose=1,
    )  # fmt: skip


def _split(samples: tables.Samples, args: argparse.Namespace, task: str) -> tuple[Array, Array]:
    """Numbers of the sequences to train and to test on, classes in equal shares."""
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(samples.names))
    if not args.test:
        return rows, rows[:0]
    stratify = samples.y if task == "classify" and not args.per_step else None
    if stratify is not None and np.unique(stratify, return_counts=True)[1].min() < 2:
        raise ValueError(f"{args.target}: a class has one sequence only; --test 0 trains on all")
    try:
        train, test = train_test_split(rows, test_size=args.test, random_state=args.seed, stratify=stratify)
    except ValueError:
        raise ValueError(f"--test {args.test:g} of {len(rows)} sequences leaves too few on one side") from None
    return train, test


def _take(samples: tables.Samples, rows: Array) -> tuple[Any, Any]:
    """X and y of these sequences."""
    X, y = ([a[i] for i in rows] if isinstance(a, list) else a[rows] for a in (samples.X, samples.y))
    return X, y


def _about(task: str, flat: Array, samples: tables.Samples, train: Array, test: Array) -> str:
    """What there is, in two lines."""
    lengths = [len(x) for x in samples.X]
    steps = f"{min(lengths)} to {max(lengths)} steps" if min(lengths) < max(lengths) else f"{lengths[0]} steps"
    kind = f"classify, {len(np.unique(flat))} classes" if task == "classify" else "regress"
    features = ", ".join(samples.features[:5]) + ", ..." * (len(samples.features) > 5)
    return (
        f"task            {kind}\n"
        f"sequences       {len(train):,} to train on, {len(test):,} to test on; {steps}; from {features}"
    )
