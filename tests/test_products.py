"""Products by BLAS: the same results, another way. The whole ladder runs on it under FASTLSTM_PRODUCTS=blas."""

import os
import pickle
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import CELLS, close, make, problem, same_bits, teams, train
from threadpoolctl import ThreadpoolController, threadpool_limits

import fastlstm
from fastlstm import engine

ROOT = Path(fastlstm.__file__).resolve().parents[1]


@pytest.mark.parametrize("products", ["BLAS", "", None, 1])
def test_other_words_are_refused(products):
    before = engine.products()
    with pytest.raises(ValueError, match="products: expected 'own' or 'blas', got"):
        fastlstm.set_products(products)
    assert engine.products() == before


def test_config_names_the_choice(capsys):
    for products in ("blas", "own"):
        fastlstm.set_products(products)
        fastlstm.show_config()
        assert f"products: {products} " in capsys.readouterr().out


WITHOUT = """
import sys
sys.modules["scipy.linalg"] = None
import fastlstm
from fastlstm import engine
try:
    fastlstm.set_products("blas")
except ImportError as error:
    assert "SciPy" in str(error) and "pip install" in str(error), error
    assert engine.products() == "own"
    print("refused")
"""


def test_without_scipy():
    run = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"FASTLSTM_PRODUCTS": ""})  # fmt: skip
    assert run.stdout.strip() == "refused", run.stderr


def results(products, cell, lengths, **options):
    fastlstm.set_products(products)
    layer = make(cell, 37, 70, num_layers=2, bidirectional=True, dtype=np.float64, **options)
    p = problem(layer, 23, 9, lengths)
    return train(layer, p)[0]


@pytest.mark.parametrize("lengths", [None, [23, 0, 7, 23, 1, 12, 5, 5, 22]])
@pytest.mark.parametrize("cell", CELLS)
def test_blas_and_own_agree(cell, lengths):
    """And not to the bit, or the test would compare a thing with itself."""
    own, blas = (results(products, cell, lengths) for products in ("own", "blas"))
    close(blas, own)
    assert any(not same_bits(own[name], blas[name]) for name in own)


@pytest.mark.parametrize("cell", CELLS)
def test_sizes_that_32_bits_cannot_count_are_cut(cell):
    whole = results("blas", cell, None)
    before = engine.cut_products(5)
    try:
        cut = results("blas", cell, None)
    finally:
        assert engine.cut_products(before) == 5
    close(cut, whole)
    assert any(not same_bits(cut[name], whole[name]) for name in whole)


@pytest.mark.parametrize("cell", CELLS)
def test_streams_and_frozen_layers_keep_their_weights_and_their_products(cell):
    fastlstm.set_products("blas")
    layer = make(cell, 5, 8, num_layers=2)
    x = problem(layer, 4, 3).x
    y = layer(x)[0]
    stream = layer.stream(3)
    assert all(panels.blas for panels in layer.freeze()._frozen.values())
    fastlstm.set_products("own")
    assert same_bits(layer(x)[0], y)  # frozen
    layer.unfreeze()
    layer.flat_params[:] = 0
    np.testing.assert_allclose(np.stack([stream.step(row).copy() for row in x]), y, atol=1e-6)
    assert not any(panels.blas for panels in layer.freeze()._frozen.values())


@pytest.mark.parametrize("by_units", (False, True))
@pytest.mark.parametrize("cell", CELLS)
def test_a_large_step_by_a_team(cell, by_units):
    """By BLAS its sequences are shared out, however the team would be."""
    steps = []
    fastlstm.set_num_threads(3)
    x = np.random.default_rng(0).standard_normal((2, 353, 270))
    for products in ("own", "blas"):
        fastlstm.set_products(products)
        stream = make(cell, 270, 270, dtype=np.float64).stream(353)
        with teams(by_units):
            steps.append([stream.step(part) for part in x])
    np.testing.assert_allclose(steps[1], steps[0], rtol=0, atol=1e-12)


def test_streams_that_share_weights_copy_none():
    """Another thread may be reading them."""
    fastlstm.set_products("blas")
    layer = make("lstm", 200, 256)
    stream = layer.stream()
    for frozen in (False, True):
        if frozen:
            layer.freeze()
        tracemalloc.start()
        try:
            layer.stream(share=None if frozen else stream)
            assert tracemalloc.get_traced_memory()[1] < layer.flat_params.nbytes / 4
        finally:
            tracemalloc.stop()


class Library:
    """A BLAS that Ctrl-C finds while its threads are set, once."""

    num_threads = 2

    def __init__(self, amid):
        self.amid, self.counts = amid, []

    def set_num_threads(self, count):
        if count == self.amid:
            self.amid = None
            raise KeyboardInterrupt
        self.counts.append(count)


@pytest.mark.parametrize("amid", (1, 2))
def test_ctrl_c_while_blas_is_given_its_threads(amid, monkeypatch):
    """A step was not made, and BLAS has its threads."""
    fastlstm.set_products("blas")
    layer = make("lstm", 7, 5)
    x = problem(layer, 3, 4).x
    stream, other = layer.stream(4), layer.stream(4)
    for s in (stream, other):
        s.step(x[0])
    state, library = stream.state, Library(amid)
    with monkeypatch.context() as patch:
        patch.setattr(engine.blas, "_libraries", [library])
        with pytest.raises(KeyboardInterrupt):
            stream.step(x[1], reset=[True, False, False, True])
        assert library.counts[-1] == 2 and engine.blas._held == 0
    assert all(map(same_bits, stream.state, state))
    assert same_bits(stream.step(x[2]), other.step(x[2]))


def test_a_handler_may_call_while_blas_is_given_its_threads(monkeypatch):
    fastlstm.set_products("blas")
    layer = make("lstm", 7, 5)
    x, inside = problem(layer, 3, 4).x, []

    class Handler(Library):
        def set_num_threads(self, count):
            self.counts.append(count)
            if len(inside) < 2:
                inside.append(None)
                inside[-1] = layer(x)[0]

    library = Handler(None)
    monkeypatch.setattr(engine.blas, "_libraries", [library])
    y = layer(x)[0]
    assert len(inside) == 2 and all(same_bits(part, y) for part in inside)
    assert library.counts == [1, 2] and engine.blas._held == 0


def test_a_frozen_layer_in_another_process(tmp_path):
    """What was frozen with products by BLAS looks for BLAS where it is read."""
    fastlstm.set_products("blas")
    layer = make("lstm", 7, 5).freeze()
    x = problem(layer, 3, 4).x
    (tmp_path / "both").write_bytes(pickle.dumps((layer, x)))
    code = "import pickle, sys; layer, x = pickle.load(open(sys.argv[1], 'rb')); print(layer(x)[0].sum())"
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "both"], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"FASTLSTM_PRODUCTS": ""})  # fmt: skip
    assert run.returncode == 0, run.stderr
    np.testing.assert_allclose(float(run.stdout), layer(x)[0].sum(), rtol=1e-5)


def test_bfloat16_is_refused():
    fastlstm.set_products("blas")
    layer = make("lstm", 5, 8)
    for call in (layer.freeze, layer.stream):
        with pytest.raises(ValueError, match="weights: 'bfloat16' needs products 'own', got 'blas'"):
            call(weights="bfloat16")
    layer.forward(problem(layer, 3, 2).x)  # not frozen


@pytest.mark.parametrize("threads", [1, 2])
def test_blas_works_on_one_thread_and_gets_its_threads_back(threads):
    """While calls of two threads overlap, and after them."""
    fastlstm.set_products("blas")
    fastlstm.set_num_threads(threads)
    libraries = ThreadpoolController().select(user_api="blas").lib_controllers
    scipy = [library for library in libraries if "scipy" in Path(library.filepath).parent.name] or libraries

    def counts():
        return [library.num_threads for library in scipy]

    layer = make("lstm", 64, 128)
    p = problem(layer, 200, 32)
    with threadpool_limits(3, user_api="blas"):
        asked, seen = counts(), []
        workers = [threading.Thread(target=lambda: [layer(p.x) for _ in range(20)]) for _ in range(2)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            seen.append(counts())
        for worker in workers:
            worker.join()
        assert [1] * len(scipy) in seen and counts() == asked
        with pytest.raises(ValueError):
            layer(p.x[:, :, 1:])
        assert counts() == asked
