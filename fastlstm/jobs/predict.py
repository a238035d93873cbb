"""Predict by an estimator that `train` has saved."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

from . import JobError, tables
from .options import check_output, integer, write

HELP = "predict by what train has saved"
DESCRIPTION = """Predict for the sequences of a file by an estimator that `train` has saved, and write CSV: the
group (or the number of the sequence), with --per-step the time too, and the prediction. The
columns are those of the training; the target need not be there. MODEL is a joblib file, which
can run any program when it is read: use files that you trust."""
EPILOG = """examples:
  {0} walks.joblib new.csv
  {0} walks.joblib new.parquet --proba --out predicted.csv"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m fastlstm predict``."""
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="file that train --save has written")
    add("data", metavar="DATA", type=Path, help="a file that ends in .csv, .parquet or .npz")
    add("--proba", action="store_true", help="also the probability of each class")
    add("--out", metavar="FILE", type=Path, help="write there (default: standard output)")
    add("--threads", type=integer(1, 1024), help="threads (default: the processors this process may use)")


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Read, predict, write. Raises JobError with one line that says what to do."""
    check_output(parser, "--out", args.out)
    estimator, layout = _load(args.model)
    if args.proba and not hasattr(estimator, "predict_proba"):
        raise JobError(f"--proba: {args.model} is a regressor")
    samples = tables.read_samples(args.data, layout, with_target=False)
    estimator.set_params(n_jobs=args.threads)
    try:
        predicted = estimator.predict(samples.X)
        shares = estimator.predict_proba(samples.X) if args.proba else None
    except (ValueError, TypeError) as error:
        raise tables.as_job_error(error) from error
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    per_step = layout.per_step
    classes = [f"p({name})" for name in estimator.classes_] if args.proba else []
    step = [layout.time or "step"] if per_step else []
    rows.writerow([layout.group or "sequence", *step, layout.target, *classes])
    for i, name in enumerate(samples.names):
        if not per_step:
            rows.writerow([name, predicted[i], *(() if shares is None else shares[i])])
            continue
        times = samples.times[i] if samples.times else np.arange(len(predicted[i]))
        for t, time in enumerate(times):
            rows.writerow([name, time, predicted[i][t], *(() if shares is None else shares[i][t])])
    if args.out:
        write(args.out, file.getvalue().encode(), "--out")
    else:
        sys.stdout.write(file.getvalue())


def _load(path: Path) -> tuple[Any, tables.Layout]:
    try:
        import joblib
        import sklearn  # noqa: F401
    except ImportError as error:
        raise JobError(f"predict {tables.NEEDS}") from error
    try:
        found = joblib.load(path)
    except FileNotFoundError as error:
        raise JobError(f"{path}: no such file") from error
    except Exception as error:  # whatever a damaged pickle raises
        raise JobError(f"{path}: cannot be read: {type(error).__name__}") from error
    if not isinstance(found, dict) or found.get("fastlstm") != 1:
        raise JobError(f"{path}: expected a file that train --save has written")
    return found["estimator"], found["layout"]
