"""The layers: LSTM, SLSTM, GRU, RNN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _activations, _checks
from ._activations import Activation
from ._layer import Layer
from ._types import Array, Four, One, Pair, Several

if TYPE_CHECKING:
    from numpy.typing import DTypeLike


class LSTM(Layer[Pair, Several]):
    r"""Long short-term memory.

    Parameters
    ----------
    input_size : int
        Features D of a step.
    hidden_size : int
        Units H.
    num_layers : int
        Layers on top of each other.
    bias : bool
        Whether the gates have biases; as in PyTorch there are two that add up.
    batch_first : bool
        x and y are (N, T, .) instead of (T, N, .); states are not affected.
    dropout : float
        Probability with which an output of a layer but the last is zeroed in `forward`.
    bidirectional : bool
        A second set of weights reads each sequence from its last valid step; y holds both side by side.
    proj_size : int
        If not 0, h is projected to this size (Sak 2014).
    direction : {"forward", "reverse"}
        "reverse": the one direction reads each sequence from its last valid step; y stands in the order of x.
    peepholes : bool
        The gates look at the cell (Gers and Schmidhuber 2000), see the notes.
    coupled : bool
        The input gate is 1 - f (Greff et al. 2017): three gates, f, g, o in the weights' rows.
    layer_norm : bool
        Layer normalisation (Ba et al. 2016) of the gates' sums and of the cell on its way out, see the notes. One of
        peepholes, coupled and layer_norm at a time.
    layer_norm_eps : float
        What it adds to a variance.
    activation : str or tuple
        Of the candidate g and of the cell on its way out: "tanh", "relu", "softsign", "hard_tanh", "identity",
        "sigmoid", "hard_sigmoid", "elu", "leaky_relu", "softplus" or "scaled_tanh". Some take numbers, as in ONNX:
        ("elu", alpha), alpha (exp(x) - 1) below 0, alpha 1 if not given; ("leaky_relu", alpha), 0.01;
        ("scaled_tanh", alpha, beta), alpha tanh(beta x); ("hard_sigmoid", alpha, beta), clip(alpha x + beta, 0, 1).
    output_activation : str, tuple or None
        Of the cell on its way out, where it is not `activation`.
    recurrent_activation : "sigmoid", "hard_sigmoid" or ("hard_sigmoid", alpha, beta)
        Of the gates: "hard_sigmoid" alone is relu6(x + 3) / 6, the choice of Keras 3; ONNX's default and old Keras's is
        ("hard_sigmoid", 0.2, 0.5). A gate wants an activation that saturates at 0 and 1: it is a factor between "none"
        and "all", and only where it can rest on 1 does the cell keep its content over many steps; beyond 1 the cell
        would grow without bound.
    clip : float or None
        Limit of what goes into the activations of the candidate and the gates, as in ONNX: a becomes
        min(max(a, -clip), clip). As for the other limits, no gradient passes where it cuts.
    cell_clip, proj_clip : float or None
        The same limit for the new cell, before it goes on and out, and for h after the projection, as in TensorFlow.
    recurrent_dropout : float
        Variational dropout (Gal and Ghahramani 2016): one mask per sequence on h_{t-1} in the recurrent product.
    zoneout : (float, float)
        Probabilities with which an element of h and of c keeps its old value (Krueger 2017); at inference the
        expectation is used.
    init : {"pytorch", "orthogonal", "zeros"}
        Uniform in +-1/sqrt(H); Glorot for the input and orthogonal for the recurrent weights, with zero biases and
        peepholes; all zero, for weights that are loaded afterwards.
    forget_bias : float or None
        Added to the forget gate's bias at initialisation (Jozefowicz 2015 found 1 to help).
    dtype : float32 or float64
    rng : int, numpy.random.Generator or None
        Source of the initial weights and of the masks.

    Notes
    -----
    Hochreiter and Schmidhuber 1997 with the forget gate of Gers 2000, in PyTorch's notation::

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)        c = f * c + i * g
        f = sigmoid(W_if x + b_if + W_hf h + b_hf)        h = o * tanh(c)
        g = tanh(W_ig x + b_ig + W_hg h + b_hg)           h = W_hr h  (with proj_size)
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)

    With peepholes i and f get p_i * c and p_f * c of the step before inside the sigmoid, o gets p_o * c of its own step
    (before zoneout): weight_ci_l0, weight_cf_l0, weight_co_l0, each (H).

    With layer_norm the sum a of each gate, before its activation, becomes gain * (a - mean) / sqrt(variance + eps)
    + bias, mean and variance over the H units of the gate, and so does c inside tanh(c), while the c that is carried on
    stays as it is:
    weight_ln_i_l0, _f, _g, _o, _c are the gains (1 at first), bias_ln_i_l0, ... the biases (0), each (H).

    Names and shapes of the other parameters are PyTorch's: weight_ih_l0 (4H, D), weight_hh_l0 (4H, P), bias_ih_l0 (4H),
    bias_hh_l0 (4H), weight_hr_l0 (P, H), gates in the order i, f, g, o, suffix _reverse for the second direction.

    Examples
    --------
    >>> import numpy as np, fastlstm
    >>> lstm = fastlstm.LSTM(3, 5, rng=0)
    >>> y, (h_n, c_n) = lstm(np.ones((7, 2, 3), np.float32))
    >>> y.shape, h_n.shape
    ((7, 2, 5), (1, 2, 5))
    """

    _cell = "lstm"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0, *, direction: str = "forward",
        peepholes: bool = False, coupled: bool = False, layer_norm: bool = False, layer_norm_eps: float = 1e-5,
        activation: Activation = "tanh", output_activation: Activation | None = None,
        recurrent_activation: Activation = "sigmoid", clip: float | None = None, cell_clip: float | None = None,
        proj_clip: float | None = None, recurrent_dropout: float = 0.0, zoneout: tuple[float, float] = (0.0, 0.0),
        init: str = "pytorch", forget_bias: float | None = None, dtype: DTypeLike = np.float32, rng: Any = None,
    ) -> None:  # fmt: skip
        self.peepholes = _checks.flag("peepholes", peepholes)
        self.coupled, self.layer_norm = _checks.flag("coupled", coupled), _checks.flag("layer_norm", layer_norm)
        self.layer_norm_eps = _checks.number("layer_norm_eps", layer_norm_eps, float(np.finfo(np.float32).tiny))
        if self.layer_norm_eps != 1e-5 and not self.layer_norm:
            raise ValueError(f"layer_norm_eps: expected 1e-5 with layer_norm=False, got {layer_norm_eps}")
        variants = {"peepholes": self.peepholes, "coupled": self.coupled, "layer_norm": self.layer_norm}
        chosen = [name for name, value in variants.items() if value]
        if len(chosen) > 1:
            raise ValueError(f"{chosen[1]}: expected False with {chosen[0]}=True, got True")
        if output_activation is not None:
            output_activation = _activations.check("output_activation", output_activation, _activations.CANDIDATES)
        self.output_activation = output_activation
        self.cell_clip, self.proj_clip = _checks.bound("cell_clip", cell_clip), _checks.bound("proj_clip", proj_clip)
        if self.proj_clip and not proj_size:
            raise ValueError(f"proj_clip: expected None with proj_size=0, got {proj_clip}")
        kinds = {"peepholes": "lstm_peephole", "coupled": "lstm_coupled", "layer_norm": "lstm_norm"}
        self._cell = kinds[chosen[0]] if chosen else "lstm"
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            direction=direction, activation=activation, recurrent_activation=recurrent_activation, clip=clip,
            recurrent_dropout=recurrent_dropout, zoneout=zoneout, init=init, forget_bias=forget_bias,
            dtype=dtype, rng=rng,
        )  # fmt: skip

    def _check_zoneout(self, value: Any) -> tuple[float, float]:
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise TypeError(f"zoneout: expected a pair (h, c) of probabilities, got {value!r}")
        return _checks.probability("zoneout", value[0]), _checks.probability("zoneout", value[1])


class SLSTM(Layer[Four, Several]):
    r"""sLSTM, the scalar LSTM of xLSTM (Beck et al. 2024): exponential gates, a normaliser, heads.

    Parameters
    ----------
    input_size : int
        Features D of a step.
    hidden_size : int
        Units H.
    num_layers : int
        Layers on top of each other.
    bias : bool
        Whether there are biases; as in PyTorch two that add up.
    batch_first : bool
        x and y are (N, T, .) instead of (T, N, .); states are not affected.
    dropout : float
        Probability with which an output of a layer but the last is zeroed in `forward`.
    bidirectional : bool
        A second set of weights reads each sequence from its last valid step; y holds both side by side.
    direction : {"forward", "reverse"}
        "reverse": the one direction reads each sequence from its last valid step; y stands in the order of x.
    num_heads : int
        Parts of the H units that do not see each other in the recurrent product; a divisor of hidden_size. Heads of
        fewer units than a vector has (8 float32 with AVX2, 16 with AVX-512) take the time of a whole one.
    forget_gate : {"sigmoid", "exponential"}
    forget_bias : float or None
        Added to the forget gate's bias at initialisation.
    zoneout : float
        Probability with which an element of h keeps its old value.
    recurrent_dropout : float
        Variational dropout (Gal and Ghahramani 2016): one mask per sequence on h_{t-1} in the recurrent product.
    init : {"pytorch", "orthogonal", "zeros"}
        Uniform in +-1/sqrt(H); Glorot for the input and orthogonal for the recurrent weights, with zero biases; all
        zero, for weights that are loaded afterwards.
    dtype : float32 or float64
    rng : int, numpy.random.Generator or None
        Source of the initial weights and of the masks.

    Notes
    -----
    The state is (h, c, n, m): hidden state, cell, normaliser, stabiliser, each (num_layers*dirs, N, H); zeros are the
    beginning. In the notation of `LSTM`::

        i~, f~, z~, o~ = W x + b_ih + R h + b_hh      z = tanh(z~)    o = sigmoid(o~)
        k = log(sigmoid(f~)) + m, or f~ + m           m = max(k, i~)  (i~ where n = 0: there is nothing yet)
        i = exp(i~ - m)    f = exp(k - m)             c = f * c + i * z    n = f * n + i    h = o * c / n

    The stabiliser m keeps the exponentials in range and drops out of h. At n = 0 the states jump (m is i~ there), so
    gradients of a first state of zeros are those of that branch: of c and n they have the factor exp(k - i~), which no
    stabiliser bounds. Past the range of the dtype they are huge or infinite, of the right sign and never NaN; all other
    gradients stay right. weight_ih_l0 (4H, D), weight_hh_l0 (4H, H/num_heads), bias_ih_l0 (4H), bias_hh_l0 (4H), suffix
    _reverse for the second direction; the rows go head by head, in each i, f, z, o. The paper's block has more around
    it (convolution, group norm, projections).

    Examples
    --------
    >>> import numpy as np, fastlstm
    >>> slstm = fastlstm.SLSTM(3, 8, num_heads=2, rng=0)
    >>> y, (h, c, n, m) = slstm(np.ones((7, 2, 3), np.float32))
    >>> y.shape, m.shape
    ((7, 2, 8), (1, 2, 8))
    """

    _cell = "slstm"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, *, num_heads: int = 1, forget_gate: str = "sigmoid",
        direction: str = "forward", recurrent_dropout: float = 0.0, zoneout: float = 0.0, init: str = "pytorch",
        forget_bias: float | None = None, dtype: DTypeLike = np.float32, rng: Any = None,
    ) -> None:  # fmt: skip
        self.num_heads = _checks.integer("num_heads", num_heads, 1)
        if _checks.integer("hidden_size", hidden_size, 1) % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size ({hidden_size}), got {num_heads}")
        self.forget_gate = _checks.choice("forget_gate", forget_gate, ("sigmoid", "exponential"))
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0,
            direction=direction, activation="tanh", recurrent_activation="sigmoid", clip=None,
            recurrent_dropout=recurrent_dropout, zoneout=zoneout, init=init, forget_bias=forget_bias,
            dtype=dtype, rng=rng,
        )  # fmt: skip

    @property
    def _gate_activation(self) -> Activation:
        """Of the forget gate as its page has it: the logarithm of a sigmoid, or of an exponential, which is nothing."""
        return "sigmoid" if self.forget_gate == "sigmoid" else "identity"


class GRU(Layer[Array, One]):
    r"""Gated recurrent unit (Cho 2014). The state is h alone.

    Parameters
    ----------
    input_size : int
        Features D of a step.
    hidden_size : int
        Units H.
    num_layers : int
        Layers on top of each other.
    bias : bool
        Whether there are biases; as in PyTorch two that add up, but see `reset_after`.
    batch_first : bool
        x and y are (N, T, .) instead of (T, N, .); states are not affected.
    dropout : float
        Probability with which an output of a layer but the last is zeroed in `forward`.
    bidirectional : bool
        A second set of weights reads each sequence from its last valid step; y holds both side by side.
    direction : {"forward", "reverse"}
        "reverse": the one direction reads each sequence from its last valid step; y stands in the order of x.
    reset_after : bool
        True: the reset gate acts after the recurrent product, as in PyTorch and cuDNN. False: before it, as first
        published (and ONNX's linear_before_reset=0); then bias_ih and bias_hh of every gate simply add up.
    activation : str or tuple
        Of the candidate n: "tanh", "relu" or another, as for `LSTM`.
    recurrent_activation : "sigmoid", "hard_sigmoid" or ("hard_sigmoid", alpha, beta)
        Of the gates: "hard_sigmoid" alone is relu6(x + 3) / 6, with its numbers clip(alpha x + beta, 0, 1).
    clip : float or None
        Limit of what goes into the activations of the candidate and the gates, as in ONNX: a becomes
        min(max(a, -clip), clip). No gradient passes where it cuts.
    recurrent_dropout : float
        Variational dropout (Gal and Ghahramani 2016): one mask per sequence on h_{t-1} in the recurrent product.
    zoneout : float
        Probability with which an element of h keeps its old value (Krueger 2017); at inference the expectation is used.
    init : {"pytorch", "orthogonal", "zeros"}
        Uniform in +-1/sqrt(H); Glorot for the input and orthogonal for the recurrent weights, with zero biases; all
        zero, for weights that are loaded afterwards.
    dtype : float32 or float64
    rng : int, numpy.random.Generator or None
        Source of the initial weights and of the masks.

    Notes
    -----
    In PyTorch's notation, gates in the order r, z, n::

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))        reset_after=True
        n = tanh(W_in x + b_in + W_hn (r * h) + b_hn)        reset_after=False
        h = (1 - z) * n + z * h

    It differs from the LSTM in having no cell beside h and one gate less: what z keeps of h it takes from n, so keeping
    and writing add up to 1, and all of h is open to the outside at every step.

    Names and shapes of the parameters are PyTorch's: weight_ih_l0 (3H, D), weight_hh_l0 (3H, H), bias_ih_l0 (3H),
    bias_hh_l0 (3H), suffix _reverse for the second direction.

    Examples
    --------
    >>> import numpy as np, fastlstm
    >>> gru = fastlstm.GRU(3, 5, rng=0)
    >>> y, h_n = gru(np.ones((7, 2, 3), np.float32))
    >>> y.shape, h_n.shape
    ((7, 2, 5), (1, 2, 5))
    """

    _cell = "gru"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, *, direction: str = "forward", reset_after: bool = True,
        activation: Activation = "tanh", recurrent_activation: Activation = "sigmoid", clip: float | None = None,
        recurrent_dropout: float = 0.0, zoneout: float = 0.0, init: str = "pytorch",
        dtype: DTypeLike = np.float32, rng: Any = None,
    ) -> None:  # fmt: skip
        self.reset_after = _checks.flag("reset_after", reset_after)
        self._cell = "gru" if reset_after else "gru_reset_before"
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0,
            direction=direction, activation=activation, recurrent_activation=recurrent_activation, clip=clip,
            recurrent_dropout=recurrent_dropout, zoneout=zoneout,
            init=init, forget_bias=None, dtype=dtype, rng=rng,
        )  # fmt: skip


class RNN(Layer[Array, One]):
    r"""Plain recurrent layer (Elman 1990). The state is h.

    Parameters
    ----------
    input_size : int
        Features D of a step.
    hidden_size : int
        Units H.
    num_layers : int
        Layers on top of each other.
    nonlinearity : str or tuple
        "tanh", "relu" or another activation, as for `LSTM`: "softsign", "hard_tanh", "identity", "sigmoid",
        "hard_sigmoid", "elu", "leaky_relu", "softplus" or "scaled_tanh", with their numbers as a tuple.
    bias : bool
        Whether there are biases; as in PyTorch two that add up.
    batch_first : bool
        x and y are (N, T, .) instead of (T, N, .); states are not affected.
    dropout : float
        Probability with which an output of a layer but the last is zeroed in `forward`.
    bidirectional : bool
        A second set of weights reads each sequence from its last valid step; y holds both side by side.
    direction : {"forward", "reverse"}
        "reverse": the one direction reads each sequence from its last valid step; y stands in the order of x.
    clip : float or None
        Limit of what goes into the activation, as in ONNX: a becomes min(max(a, -clip), clip). No gradient passes
        where it cuts.
    recurrent_dropout : float
        Variational dropout (Gal and Ghahramani 2016): one mask per sequence on h_{t-1} in the recurrent product.
    zoneout : float
        Probability with which an element of h keeps its old value (Krueger 2017); at inference the expectation is used.
    init : {"pytorch", "orthogonal", "zeros"}
        Uniform in +-1/sqrt(H); Glorot for the input and orthogonal for the recurrent weights, with zero biases; all
        zero, for weights that are loaded afterwards.
    dtype : float32 or float64
    rng : int, numpy.random.Generator or None
        Source of the initial weights and of the masks.

    Notes
    -----
    In PyTorch's notation::

        h = tanh(W_ih x + b_ih + W_hh h + b_hh)

    or the other activation in place of tanh. All of its memory is rewritten at every step; over more than some ten
    steps its gradient vanishes or grows without bound, where LSTM and GRU carry it on.

    Names and shapes of the parameters are PyTorch's: weight_ih_l0 (H, D), weight_hh_l0 (H, H), bias_ih_l0 (H),
    bias_hh_l0 (H), suffix _reverse for the second direction.

    Examples
    --------
    >>> import numpy as np, fastlstm
    >>> rnn = fastlstm.RNN(3, 5, nonlinearity="relu", rng=0)
    >>> y, h_n = rnn(np.ones((7, 2, 3), np.float32))
    >>> y.shape, h_n.shape
    ((7, 2, 5), (1, 2, 5))
    """

    _cell = "rnn"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: Activation = "tanh",
        bias: bool = True, batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, *,
        direction: str = "forward", clip: float | None = None, recurrent_dropout: float = 0.0, zoneout: float = 0.0,
        init: str = "pytorch", dtype: DTypeLike = np.float32, rng: Any = None,
    ) -> None:  # fmt: skip
        self.nonlinearity = _activations.check("nonlinearity", nonlinearity, _activations.CANDIDATES)
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0,
            direction=direction, activation=nonlinearity, recurrent_activation="sigmoid", clip=clip,
            recurrent_dropout=recurrent_dropout, zoneout=zoneout,
            init=init, forget_bias=None, dtype=dtype, rng=rng,
        )  # fmt: skip


# By the names that estimators and commands take.
CELLS = {"lstm": LSTM, "slstm": SLSTM, "gru": GRU, "rnn": RNN}
