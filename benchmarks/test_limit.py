"""The model behind "share of the limit", held to values computed by hand, and the picture made from it."""

import json
from dataclasses import replace

import pytest
from cases import Case
from limit import Core, least_time

ONE = Core(peak=1, read=1, sigmoid=1, tanh=1)

# T,N,D,H = 2,3,5,4: 6 rows of 4 units; 4 gates x 4 units x 9 columns of weights x 2 x 6 rows = 1728 operations;
# 4 x 4 x 4 x 2 x 6 = 768 of them wait for the step before; 64 weights of 4 bytes, read at 2 steps: 512; 24 updates.
HAND = {
    "inference: products, of which 768 operations against 512 bytes; 3 sigmoids, 2 tanhs": (
        Case("2,3,5,4"), 1, ONE, 960 + 768 + 24 * 5),
    "slow reading holds up the steps": (Case("2,3,5,4"), 1, replace(ONE, read=0.5), 960 + 1024 + 24 * 5),
    "sigmoids at a third, tanhs at a quarter of the speed": (
        Case("2,3,5,4"), 1, replace(ONE, sigmoid=1 / 3, tanh=1 / 4), 960 + 768 + 24 * (9 + 8)),
    "cores share everything": (Case("2,3,5,4"), 4, ONE, (960 + 768 + 24 * 5) / 4),
    "training: three times the products, two of the steps, tanh(c) again": (
        Case("2,3,5,4", "training"), 1, ONE, (3 * 1728 - 2 * 768) + 2 * 768 + 24 * 6),
    "training reads the weights going and coming": (
        Case("2,3,5,4", "training"), 1, replace(ONE, read=0.5), (3 * 1728 - 2 * 768) + 2 * 1024 + 24 * 6),
    # 3 gates x 4 units x (5 + 4 columns below, 8 + 4 above) x 2 directions = 504 weights x 2 x 6 rows
    "GRU, two layers in both directions: 3 gates, 2 sigmoids, 1 tanh": (
        Case("2,3,5,4,bi,2", cell="gru"), 1, ONE, (6048 - 2304) + 2304 + 96 * 3),
    "float64: twice the bytes": (Case("2,3,5,4", dtype="float64"), 1, replace(ONE, read=0.5), 960 + 2048 + 24 * 5),
    "a tanh layer": (Case("2,3,5,4", "training", "rnn"), 1, ONE, 3 * 432 + 24),
    "a stream reads all weights at its one step": (Case("9,1,4,4", "stream"), 1, ONE, 512 + 4 * 5),
    "a stream with weights of two bytes": (Case("9,1,4,4", "stream", weights="bfloat16"), 1, ONE, 256 + 4 * 5),
}  # fmt: skip


@pytest.mark.parametrize("what", HAND)
def test_by_hand(what):
    case, threads, core, nanoseconds = HAND[what]
    assert least_time(case, threads, core) == pytest.approx(1e-9 * nanoseconds, rel=1e-12)


def test_ragged_counts_what_is_there():
    case = Case("7,5,2,3", ragged=True)
    rows, steps = int(case.lengths.sum()), int(case.lengths.max())
    assert rows < 35
    slow = replace(ONE, read=1e-3)
    assert least_time(case, 1, ONE) == pytest.approx(1e-9 * rows * (2 * 12 * 5 + 3 * 5), rel=1e-12)
    assert least_time(case, 1, slow) == pytest.approx(1e-9 * (rows * (2 * 12 * 2 + 15) + 1e3 * steps * 144), rel=1e-12)


def test_picture_and_tables_come_from_a_file(tmp_path, capsys):
    """--from-json measures nothing, and draws every library in both styles."""
    pytest.importorskip("matplotlib")
    import peers

    records = []
    for mode, threads in (("forward", 1), ("forward", 2), ("training", 1)):
        for shape in ("28,128,28,128", "3,2,4,5"):
            base = {"shape": shape, "mode": mode, "cell": "lstm", "dtype": "float32", "ragged": False, "weights": ""}
            base["threads"] = threads
            records.append(base | {"peer": "fastlstm", "ms": 2.0, "fma_share": 0.5, "limit_share": 0.75})
            records += [base | {"peer": "torch", "ms": 3.0, "ratio": 1.5}, base | {"peer": "ort", "skip": "why"}]
    machine = {"cpu": "any", "cpus": 2, "python": "3", "numpy": "2", "command": "none", "subject": "fastlstm"}
    source, png, table = tmp_path / "run.json", tmp_path / "run.png", tmp_path / "run.md"
    source.write_text(json.dumps({"machine": machine, "records": records}))
    assert peers.main(["--from-json", str(source), "--plot", str(png), "--markdown", str(table)]) == 0
    assert "1 thread, share of the limit    geometric mean  0.75" in capsys.readouterr().out
    assert "| images by rows | 28,128,28,128 | 2 | 50 | 75 | 1.50 |" in table.read_text()
    light, dark = png.read_bytes(), (tmp_path / "run-dark.png").read_bytes()
    assert light[:4] == dark[:4] == b"\x89PNG" and light != dark


def test_no_dot_hides_another():
    """Libraries of the same speed stand beside each other, in the row of their shape."""
    pytest.importorskip("matplotlib")
    import dots

    base = {"shape": "3,2,4,5", "mode": "forward", "cell": "lstm", "dtype": "float32", "ragged": False, "threads": 1}
    timed = [base | {"peer": "fastlstm", "ms": 2.0, "limit_share": 0.5}]
    timed += [base | {"peer": peer, "ms": 3.0, "ratio": 1.5} for peer in ("torch", "ort", "jax", "keras")]
    (ax,) = dots.picture(timed, "fastlstm", "dark").axes
    curves = {line.get_label(): line for line in ax.get_lines()}
    points = [curves[dots.name_of(peer)].get_xydata()[0] for peer in ("torch", "ort", "jax", "keras")]
    assert {x for x, _ in points} == {1.5} and len({y for _, y in points}) == 4
    assert all(-0.5 < y < 0.5 for _, y in points)
    assert list(curves["fastlstm"].get_xdata()) == [1, 1]
    assert list(curves["the machine's limit"].get_xdata()) == [0.5, 0.5]
