"""The jobs that are timed: shapes, their inputs from a seed, their flops and bytes.  NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NAMES = {
    "28,128,28,128": "images by rows",
    "100,32,64,128": "sensor windows",
    "100,64,256,256": "medium",
    "50,20,200,200": "text, small",
    "35,20,650,650": "text, medium",
    "50,64,512,512": "text, large batch",
    "25,64,1024,1024": "wide",
    "25,16,1024,1024": "wide, small batch",
    "15,1,250,200": "short query",
    "150,1,256,256": "one sequence",
    "100,1,64,128": "one sequence, small",
    "100,1,512,512": "one sequence, wide",
    "25,4,1024,1024": "wide, four sequences",
    "1000,1,1,32": "one long signal",
    "256,256,1,64": "long and thin",
    "300,16,80,320,bi": "speech",
    "60,32,293,128,bi,2": "two layers, both directions",
}
SHAPES = list(NAMES)
GROUPS = {"all": SHAPES, "basic": SHAPES[:3], "third": SHAPES[1::3]}
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


@dataclass(frozen=True)
class Case:
    """One job: ``shape`` is "T,N,D,H", with ",bi" for bidirectional and ",2" for two layers after it."""

    shape: str
    mode: str = "forward"  # forward | training | stream
    cell: str = "lstm"
    dtype: str = "float32"
    ragged: bool = False
    weights: str = ""  # "bfloat16": packed weights of a stream
    seed: int = 1

    def __post_init__(self):
        try:
            t, n, d, h, *rest = self.shape.split(",")
            sizes = {"T": int(t), "N": int(n), "D": int(d), "H": int(h), "dirs": 1 + ("bi" in rest)}
            layers = [int(word) for word in rest if word != "bi"] or [1]
            if min(*sizes.values(), *layers) < 1 or len(layers) > 1:
                raise ValueError
        except ValueError:
            raise ValueError(f"shape: expected T,N,D,H[,bi][,layers], got {self.shape!r}") from None
        for name, value in dict(sizes, layers=layers[0], G=GATES[self.cell]).items():
            object.__setattr__(self, name, value)

    @property
    def lengths(self):
        """None, or N lengths uniform in 1..T."""
        return np.random.default_rng(self.seed).integers(1, self.T + 1, self.N) if self.ragged else None

    @property
    def rows(self):
        """Time steps that one call computes, over the whole batch."""
        if self.mode == "stream":
            return self.N
        return int(self.lengths.sum()) if self.ragged else self.T * self.N

    @property
    def flops(self):
        """Two per multiply-add of the gate products, forward; three times that with backward."""
        widths = self.D + self.H + (self.layers - 1) * (self.dirs + 1) * self.H
        return 2 * self.G * self.rows * self.H * widths * self.dirs * (3 if self.mode == "training" else 1)

    @property
    def steps(self):
        """Steps of one call, of one layer and direction."""
        return 1 if self.mode == "stream" else int(self.lengths.max()) if self.ragged else self.T

    @property
    def step_width(self):
        """Columns of the weights that every step must read again: weight_hh's, in a stream weight_ih's too."""
        return self.H + (self.D if self.mode == "stream" else 0)

    @property
    def step_bytes(self):
        """What a step reads again, over all layers and directions."""
        item = 2 if self.weights else np.dtype(self.dtype).itemsize
        return self.G * self.H * self.step_width * item * self.layers * self.dirs

    @property
    def step_flops(self):
        """Two per multiply-add of the products with these weights, forward alone."""
        return 2 * self.G * self.rows * self.H * self.step_width * self.layers * self.dirs

    def inputs(self):
        """x (T,N,D), dy (T,N,dirs*H) with zeros past each length, and the weights by PyTorch's names."""
        rng = np.random.default_rng(self.seed)
        params, bound, gh = {}, self.H**-0.5, self.G * self.H
        for layer in range(self.layers):
            width = self.D if layer == 0 else self.dirs * self.H
            for end in ("", "_reverse")[: self.dirs]:
                shapes = {
                    "weight_ih": (gh, width),
                    "weight_hh": (gh, self.H),
                    "bias_ih": (gh,),
                    "bias_hh": (gh,),
                }
                for name, shape in shapes.items():
                    params[f"{name}_l{layer}{end}"] = rng.uniform(-bound, bound, shape).astype(self.dtype)
        x = rng.standard_normal((self.T, self.N, self.D)).astype(self.dtype)
        dy = rng.standard_normal((self.T, self.N, self.dirs * self.H)).astype(self.dtype)
        return x, self.zero_padding(dy), params

    def zero_padding(self, y):
        """y (T,N,...) with everything past a row's length set to zero."""
        if not self.ragged:
            return y
        return np.where((np.arange(self.T)[:, None] < self.lengths)[..., None], y, y.dtype.type(0))
