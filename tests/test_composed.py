"""PyTorch as another opinion where it has no layer: its cells and functions, put together by hand, with autograd."""

import numpy as np
import pytest
from conftest import make, problem

torch = pytest.importorskip("torch", reason="PyTorch is not installed: no parity test with it")

T, N, D, H = 11, 4, 5, 9


def leaves(layer, p):
    """Parameters, x and states as tensors that gather gradients."""
    params = {name: torch.tensor(value, requires_grad=True) for name, value in layer.params.items()}
    states = [torch.tensor(s, requires_grad=True) for s in (p.state if isinstance(p.state, tuple) else (p.state,))]
    return params, torch.tensor(p.x, requires_grad=True), states


def check(layer, p, by_hand, given):
    """Outputs, states and every gradient of a layer against ``by_hand(params, x, states)``."""
    params, x, states = leaves(layer, p)
    y, ends = by_hand(params, x, states)
    dstate = p.dstate if isinstance(p.dstate, tuple) else (p.dstate,)
    torch.autograd.backward([y, *ends], [torch.tensor(a) for a in (p.dy, *dstate)])
    found, state, tape = layer.forward(p.x, p.state, **given)
    dx, dstate_0 = layer.backward(tape, p.dy, p.dstate)
    state, dstate_0 = (s if isinstance(s, tuple) else (s,) for s in (state, dstate_0))
    pairs = [(found, y.detach()), (dx, x.grad)]
    pairs += [(ours, theirs.detach()) for ours, theirs in zip(state, ends, strict=True)]
    pairs += [(ours, theirs.grad) for ours, theirs in zip(dstate_0, states, strict=True)]
    pairs += [(layer.grads[name], tensor.grad) for name, tensor in params.items()]
    for ours, theirs in pairs:
        scale = float(abs(theirs).max())
        assert scale > 0 and abs(ours - theirs.numpy()).max() < 1e-12 * scale


# ---- layer normalisation


def norm(params, gate, value):
    gain, bias = params[f"weight_ln_{gate}_l0"], params[f"bias_ln_{gate}_l0"]
    return torch.nn.functional.layer_norm(value, value.shape[-1:], gain, bias, 1e-5)


@pytest.mark.parametrize("proj", (0, 4))
def test_layer_norm(isa, proj):
    layer = make("lstm_norm", D, H, proj_size=proj, dtype=np.float64)

    def by_hand(params, x, states):
        h, c = (s[0] for s in states)
        out = []
        for x_t in x:
            sums = x_t @ params["weight_ih_l0"].T + params["bias_ih_l0"]
            sums = sums + h @ params["weight_hh_l0"].T + params["bias_hh_l0"]
            i, f, g, o = (norm(params, gate, part) for gate, part in zip("ifgo", sums.chunk(4, 1), strict=True))
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(norm(params, "c", c))
            h = h @ params["weight_hr_l0"].T if proj else h
            out.append(h)
        return torch.stack(out), (h[None], c[None])

    check(layer, problem(layer, T, N), by_hand, {})


# ---- masks and resets


CELLS = {"lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell, "rnn": torch.nn.RNNCell}


def by_cell(cell, mask, resets):
    """A loop over the steps with PyTorch's cell, as its users write it."""
    module = CELLS[cell](D, H, dtype=torch.float64)

    def run(params, x, states):
        params = {name.removesuffix("_l0"): value for name, value in params.items()}
        states, out = [s[0] for s in states], []
        for t in range(T):
            fresh = torch.tensor(~resets[t], dtype=torch.float64)[:, None]
            states = [s * fresh for s in states]
            given = tuple(states) if cell == "lstm" else states[0]
            new = torch.func.functional_call(module, params, (x[t], given))
            valid = torch.tensor(mask[t])[:, None]
            states = [torch.where(valid, b, a) for a, b in zip(states, new if cell == "lstm" else (new,), strict=True)]
            out.append(torch.where(valid, states[0], 0.0))
        return torch.stack(out), [s[None] for s in states]

    return run


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cell", CELLS)
def test_masks_and_resets(isa, cell, seed):
    rng = np.random.default_rng(seed)
    mask, resets = rng.random((T, N)) < 0.7, rng.random((T, N)) < 0.25
    if seed % 3 == 1:
        mask[:] = True
    elif seed % 3 == 2:
        resets[:] = False
    layer = make(cell, D, H, dtype=np.float64)
    check(layer, problem(layer, T, N, seed=seed), by_cell(cell, mask, resets), {"mask": mask, "resets": resets})
