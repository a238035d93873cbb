"""Sparse arrays of SciPy and PyTorch are refused by the name of the argument, with what makes a dense one."""

import numpy as np
import pytest

import fastlstm
from fastlstm import nn

X = np.ones((7, 3), np.float32)
STATE = np.ones((1, 4), np.float32)


def scipy_csr(a):
    return pytest.importorskip("scipy.sparse").csr_matrix(a)


def scipy_coo(a):
    return pytest.importorskip("scipy.sparse").coo_array(a)


def torch_coo(a):
    return pytest.importorskip("torch").tensor(a).to_sparse()


def torch_csr(a):
    return pytest.importorskip("torch").tensor(a).to_sparse_csr()


def weights(layer, value):
    return {**layer.state_dict(), "weight_hh_l0": value}


CALLS = [
    ("x", lambda f, k: k(f(X))),
    ("x", lambda f, k: k.forward(f(X))),
    (r"x\[0\]", lambda f, k: k([f(X)])),
    ("h_0", lambda f, k: k(X, (f(STATE), None))),
    ("c_0", lambda f, k: k(X, (None, f(STATE)))),
    ("lengths", lambda f, k: k(X[:, None], None, f(np.array([[7]])))),
    ("mask", lambda f, k: k(X, mask=f(np.ones((7, 1), int)))),
    ("dy", lambda f, k: k.backward(k.forward(X)[2], f(np.ones((7, 4), np.float32)))),
    ("state", lambda f, k: setattr(k.stream(), "state", (f(STATE), None))),
    ("load_state_dict: weight_hh_l0", lambda f, k: k.load_state_dict(weights(k, f(k.params["weight_hh_l0"])))),
    ("weight_hh_l0", lambda f, k: k.params.update(weight_hh_l0=f(k.params["weight_hh_l0"]))),
    ("x", lambda f, k: k.stream().step(f(X[:1]))),
    ("x", lambda f, k: nn.Linear(3, 2)(f(X))),
    ("x", lambda f, k: nn.Embedding(3, 2)(f(X.astype(int)))),
    ("x", lambda f, k: fastlstm.Stack([k])(f(X))),
    ("x", lambda f, k: fastlstm.unpad(f(X), [7, 7, 7])),
    (r"sequences\[0\]", lambda f, k: fastlstm.pad([f(X)])),
    ("logits", lambda f, k: nn.softmax_cross_entropy(f(X), np.zeros(7, int))),
]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("make", [scipy_csr, scipy_coo, torch_coo, torch_csr])
@pytest.mark.parametrize(("name", "call"), CALLS)
def test_the_argument_is_named(name, call, make):
    way = "to_dense" if make.__name__.startswith("torch") else "toarray"
    with pytest.raises(TypeError, match=f"^{name}: expected .*[sS]parse.*{way}\\(\\)"):
        call(make, fastlstm.LSTM(3, 4))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("make", [torch_coo, torch_csr])
def test_modules_of_torch(make):
    torch = pytest.importorskip("torch")
    from fastlstm.torch import LSTM

    layer, x, h = LSTM(3, 4), torch.tensor(X), torch.tensor(STATE)
    for name, call in {
        "input": lambda: layer(make(X)),
        "h_0": lambda: layer(x, (make(STATE), h)),
        "c_0": lambda: layer(x, (h, make(STATE))),
        "lengths": lambda: layer(x[:, None], lengths=make(np.array([[7]]))),
        "mask": lambda: layer(x, mask=make(np.ones((7, 1), int))),
    }.items():
        with pytest.raises(TypeError, match=f"^{name}: expected a dense tensor, got .*torch.sparse.*to_dense"):
            call()
