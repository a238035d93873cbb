"""`fastlstm train` and `predict`: sequences from tables and arrays, models saved and used."""

import csv
import io
import os
import re
import sys

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")

import joblib  # noqa: E402
import pyarrow  # noqa: E402
from pyarrow import parquet  # noqa: E402

import fastlstm  # noqa: E402
from fastlstm import __main__ as cli  # noqa: E402
from fastlstm.jobs import JobError, tables  # noqa: E402

QUICK = ["--epochs", "15", "--hidden", "12", "--threads", "1"]


def walks(n=60, seed=0):
    """Columns: n walks of 5 to 9 steps, rows in any order; whether they drift up or down, and the sum so far."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        up, total = rng.random() < 0.5, 0.0
        for t in range(rng.integers(5, 10)):
            step = rng.normal(0.8 if up else -0.8)
            total += step
            rows.append((f"walk {i}", t, step, rng.normal(), "text", "up" if up else "down", total))
    order = rng.permutation(len(rows))
    names = ("walk", "t", "step", "noise", "remark", "drift", "sum")
    return {name: [rows[i][k] for i in order] for k, name in enumerate(names)}


def write_csv(path, columns):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return str(path)


def read_csv(text):
    return list(csv.DictReader(text.splitlines()))


TABLE = ["--group", "walk", "--time", "t", "--features", "step,noise"]


@pytest.mark.parametrize("kind", ["csv", "parquet", "npz"])
def test_classify_each_group(kind, tmp_path, capsys):
    columns, path, model = walks(), tmp_path / f"walks.{kind}", str(tmp_path / "model.joblib")
    if kind == "csv":
        write_csv(path, columns)
    elif kind == "parquet":
        parquet.write_table(pyarrow.table(columns), path)
    else:
        np.savez(path, **{name: np.array(values) for name, values in columns.items()})
    assert cli.main(["train", str(path), "--target", "drift", *TABLE, *QUICK, "--save", model]) == 0
    out = capsys.readouterr().out
    assert "classify, 2 classes" in out and "48 to train on, 12 to test on; 5 to 9 steps; from step, noise" in out
    assert float(re.search(r"test accuracy +([\d.]+)", out)[1]) >= 0.8
    assert len(re.findall(r"^epoch \d+/15", out, re.MULTILINE)) == 15

    del columns["drift"]
    fresh = write_csv(tmp_path / "fresh.csv", columns)
    assert cli.main(["predict", model, fresh, "--proba"]) == 0
    rows = read_csv(capsys.readouterr().out)
    assert [row["walk"] for row in rows] == list(dict.fromkeys(columns["walk"]))  # as they first occur
    saved = joblib.load(model)["estimator"]
    for row in rows:
        mine = sorted(
            (t, step, noise)
            for walk, t, step, noise in zip(*(columns[k] for k in ("walk", "t", "step", "noise")), strict=True)
            if walk == row["walk"]
        )
        x = np.array(mine, np.float32)[:, 1:]
        assert row["drift"] == saved.predict([x])[0]
        expected = saved.predict_proba([x])[0]
        np.testing.assert_allclose([float(row["p(down)"]), float(row["p(up)"])], expected, atol=1e-5)


def test_a_value_for_each_row(tmp_path, capsys):
    path, model, out = write_csv(tmp_path / "walks.csv", walks()), tmp_path / "m.joblib", tmp_path / "out.csv"
    args = ["train", path, "--target", "sum", *TABLE, *QUICK, "--cell", "gru", "--per-step", "--save", str(model)]
    assert cli.main([*args, "--plot", str(tmp_path / "curves.png")]) == 0
    printed = capsys.readouterr().out
    assert "regress" in printed and float(re.search(r"test R\^2 +([-\d.]+)", printed)[1]) > 0.5
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main(["predict", str(model), path, "--out", str(out)]) == 0
    rows = read_csv(out.read_text(encoding="utf-8"))
    columns = walks()
    truth = {
        (walk, str(t)): total for walk, t, total in zip(columns["walk"], columns["t"], columns["sum"], strict=True)
    }
    assert len(rows) == len(truth) and list(rows[0]) == ["walk", "t", "sum"]
    got = np.array([float(row["sum"]) for row in rows])
    want = np.array([truth[row["walk"], row["t"]] for row in rows])
    assert np.corrcoef(got, want)[0, 1] > 0.8
    assert cli.main(["predict", str(model), path, "--proba"]) == 1
    assert "is a regressor" in capsys.readouterr().err


@pytest.mark.parametrize("axes", [2, 3])
def test_arrays(axes, tmp_path, capsys):
    X = np.random.default_rng(0).normal(size=(80, 6, 2)[:axes])
    y = X.reshape(80, -1).sum(axis=1)
    np.savez(tmp_path / "d.npz", X=X, y=y)
    model = str(tmp_path / "m.joblib")
    assert cli.main(["train", str(tmp_path / "d.npz"), "--target", "y", *QUICK, "--test", "0", "--save", model]) == 0
    assert "80 to train on, 0 to test on; 6 steps; from X" in capsys.readouterr().out
    np.savez(tmp_path / "new.npz", X=X[:5])
    assert cli.main(["predict", model, str(tmp_path / "new.npz")]) == 0
    rows = read_csv(capsys.readouterr().out)
    predicted = joblib.load(model)["estimator"].predict(X[:5].astype(np.float32))
    np.testing.assert_allclose([float(row["y"]) for row in rows], predicted, rtol=1e-5)
    assert [row["sequence"] for row in rows] == list("01234")


def test_a_row_is_a_sequence_without_group(tmp_path, capsys):
    X = np.random.default_rng(0).normal(size=(40, 4))
    columns = {f"s{i}": X[:, i] for i in range(4)} | {"kind": np.where(X.sum(axis=1) > 0, "a", "b")}
    path = write_csv(tmp_path / "wide.csv", columns)
    samples = tables.read_samples(tmp_path / "wide.csv", tables.Layout(None, None, None, "kind", False), True)
    np.testing.assert_allclose(samples.X, X.astype(np.float32))
    assert samples.features == ["s0", "s1", "s2", "s3"] and list(samples.y) == list(columns["kind"])
    assert cli.main(["train", path, "--target", "kind", "--epochs", "2"]) == 0
    assert "4 steps; from s0, s1, s2, s3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "new", "status", "text"),
    [
        (["--target", "what", *TABLE], {}, 1, "no 'what', only 'walk', 't', 'step'"),
        (["--target", "drift", "--group", "who"], {}, 1, "no 'who', only"),
        (["--target", "drift", "--group", "walk", "--features", "remark"], {}, 1, "column 'remark': expected numbers"),
        (["--target", "sum", *TABLE], {}, 1, "sum varies within group walk .*: give --per-step"),
        (["--target", "drift", "--group", "walk", "--time", "noise"], {"noise": 0}, 1, "has two rows at noise 0"),
        (["--target", "drift", *TABLE], {"step": ""}, 1, r"column 'step': \d+ of \d+ values are missing"),
        (["--target", "drift", *TABLE], {"step": "nan"}, 1, "values are missing"),
        (["--target", "drift", *TABLE, "--task", "regress"], {}, 1, "drift: expected numbers with --task regress"),
        (["--target", "drift", *TABLE, "--test", "0.999"], {}, 1, "--test 0.999 of 60 sequences leaves too few"),
        (["--target", "sum", *TABLE[:-1], "step,sum", "--per-step"], {}, 2, "argument --target: 'sum' is in"),
        (["--target", "walk", *TABLE], {}, 2, "argument --target: 'walk' is in"),
        (["--target", "drift", "--time", "t"], {}, 2, "argument --time: needs --group"),
        (["--target", "sum", "--per-step"], {}, 2, "argument --per-step: needs --group"),
        (["--target", "drift", "--features", "a,,b"], {}, 2, "argument --features: expected names"),
        (["--target", "drift", "--test", "1"], {}, 2, "argument --test: expected a number from 0 to below 1"),
        ([], {}, 2, "the following arguments are required: --target"),
    ],
)
def test_errors_are_one_line(args, new, status, text, tmp_path, capsys):
    columns = walks()
    for name, value in new.items():
        columns[name] = [value] * len(columns["t"])
    path = write_csv(tmp_path / "walks.csv", columns)
    try:
        code = cli.main(["train", path, *args, "--epochs", "1"])
    except SystemExit as ended:
        code = ended.code
    err = capsys.readouterr().err
    assert code == status and re.search(text, err), err
    if status == 1:
        assert err.startswith("fastlstm train: ") and err.count("\n") == 1


def test_files_that_are_none(tmp_path, capsys):
    for name, content, text in (
        ("a.csv", b"", "a.csv: cannot be read: Empty CSV file"),
        ("b.csv", b"x,y\n", "b.csv: no rows"),
        ("c.csv", b"x,x\n1,2\n", "two columns have the same name"),
        ("d.parquet", b"PAR1 no", "d.parquet: cannot be read"),
        ("e.npz", b"PK no", "e.npz: cannot be read: it is not what numpy.savez writes"),
        ("i.csv", b"x,y\n1,caf\xe9\n", "column 'y': expected text in UTF-8"),
        ("f.txt", b"", "expected a file that ends in .csv, .parquet, .npz"),
    ):
        (tmp_path / name).write_bytes(content)
        assert cli.main(["train", str(tmp_path / name), "--target", "y"]) == 1
        err = capsys.readouterr().err
        assert text in err and err.count("\n") == 1, err
    assert cli.main(["train", str(tmp_path / "none.csv"), "--target", "y"]) == 1
    assert capsys.readouterr().err.endswith("none.csv: no such file\n")
    np.savez(tmp_path / "g.npz", X=np.zeros((4, 3)), y=np.zeros(3))
    assert cli.main(["train", str(tmp_path / "g.npz"), "--target", "y"]) == 1
    assert "y: expected shape (4,), got (3,)" in capsys.readouterr().err
    for X, y, name in ((np.full((4, 3), np.nan), np.zeros(4), "X"), (np.zeros((4, 3)), np.full(4, np.nan), "y")):
        np.savez(tmp_path / "g.npz", X=X, y=y)
        assert cli.main(["train", str(tmp_path / "g.npz"), "--target", "y"]) == 1
        assert f"'{name}': {X.size if name == 'X' else 4} of" in capsys.readouterr().err
    values = {"g": ["a", "a", "b", "b"], "x": [1.0, 2.0, 3.0, 4.0], "y": [1.5, np.nan, 2.5, 2.5]}
    parquet.write_table(pyarrow.table(values), tmp_path / "j.parquet")  # a NaN there is no null
    assert cli.main(["train", str(tmp_path / "j.parquet"), "--group", "g", "--target", "y"]) == 1
    assert "'y': 1 of 4 values are missing (NaN)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", str(tmp_path / "g.npz"), "--target", "y", "--features", "X,Z"])
    assert "argument --features: expected one array" in capsys.readouterr().err
    with pytest.raises(JobError, match="cannot be read: Object arrays cannot be loaded"):
        np.savez(tmp_path / "h.npz", X=np.array([1, "a", None], object))
        tables.read_columns(tmp_path / "h.npz")
    for name, content in (("none.joblib", None), ("bad.joblib", b"\x80no"), ("other.joblib", {"a": 1})):
        if isinstance(content, dict):
            joblib.dump(content, tmp_path / name)
        elif content:
            (tmp_path / name).write_bytes(content)
        assert cli.main(["predict", str(tmp_path / name), str(tmp_path / "b.csv")]) == 1
        err = capsys.readouterr().err
        assert re.search("no such file|cannot be read|expected a file that train --save", err), err


@pytest.mark.parametrize("package", ["sklearn.utils.multiclass", "pyarrow"])
def test_missing_extra(package, tmp_path, monkeypatch, capsys):
    path = write_csv(tmp_path / "walks.csv", walks(4))
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["train", path, "--target", "drift", *TABLE]) == 1
    assert "pip install 'fastlstm[table]'" in capsys.readouterr().err


def test_reader_that_goes_away(tmp_path, monkeypatch):
    """`predict ... | head -1` ends without a traceback, and nothing more is written."""
    np.savez(tmp_path / "d.npz", X=np.zeros((8, 3)), y=np.arange(8) % 2)
    model = str(tmp_path / "m.joblib")
    assert cli.main(["train", str(tmp_path / "d.npz"), "--target", "y", "--epochs", "1", "--save", model]) == 0

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return file.fileno()

    with open(tmp_path / "out", "w", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdout", Gone())
        assert cli.main(["predict", model, str(tmp_path / "d.npz")]) == 1
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(os.devnull))


def test_every_cell(tmp_path):
    path = write_csv(tmp_path / "walks.csv", walks(20))
    for cell in fastlstm.layers.CELLS:
        model = str(tmp_path / f"{cell}.joblib")
        assert (
            cli.main(["train", path, "--target", "drift", *TABLE, "--epochs", "1", "--cell", cell, "--save", model])
            == 0
        )
        assert type(joblib.load(model)["estimator"].model_[1].layer).__name__.lower() == cell
