"""How layers and settings show themselves, and what they take from PyTorch."""

import numpy as np
import pytest
from conftest import same_bits

import fastlstm
from fastlstm import nn

X = np.ones((7, 2, 3), np.float32)
LAYERS = [fastlstm.LSTM, fastlstm.GRU, fastlstm.RNN, fastlstm.SLSTM]
# Everything with parameters, as a function of more arguments of the constructor.
THINGS = {
    **{kind.__name__: lambda kind=kind, **more: kind(3, 4, **more) for kind in LAYERS},
    "Linear": lambda **more: nn.Linear(3, 2, **more),
    "Embedding": lambda **more: nn.Embedding(5, 3, **more),
    "LayerNorm": lambda **more: nn.LayerNorm(3, **more),
    "Dropout": lambda **more: nn.Dropout(0.5, **more),
    "Recurrent": lambda **more: nn.Recurrent(fastlstm.GRU(3, 4), **more),
    "Sequential": lambda **more: nn.Sequential(fastlstm.GRU(3, 4), nn.Linear(4, 2), **more),
    "Stack": lambda **more: fastlstm.Stack([fastlstm.GRU(3, 4), nn.Linear(4, 2)], **more),
}


@pytest.mark.parametrize("name", THINGS)
def test_names_from_other_libraries_are_answered(name):
    thing = THINGS[name]()
    for attribute, text in (("train", "forward.* is training"), ("eval", "a call is inference"), ("to", "astype"),
                            ("parameters", "params are the arrays"), ("double", "astype"), ("cuda", "no device"),
                            ("fit", "fastlstm.nn.fit")):  # fmt: skip
        with pytest.raises(AttributeError, match=f"{name} has no attribute '{attribute}'; .*{text}"):
            getattr(thing, attribute)
        assert not hasattr(thing, attribute)
        assert attribute not in dir(thing)
    with pytest.raises(AttributeError, match=f"^'{name}' object has no attribute 'unheard_of'"):
        _ = thing.unheard_of


@pytest.mark.parametrize("name", THINGS)
def test_arguments_from_other_libraries_are_answered(name):
    draws = name in ("Linear", "Embedding", "Dropout") or name in [kind.__name__ for kind in LAYERS]
    rng = "write rng=" if draws else "leave it out"
    for argument, text in (("device", "leave it out: there is no device"), ("seed", rng), ("random_state", rng)):
        with pytest.raises(TypeError, match=f"^{argument}: {name} has no such argument; {text}"):
            THINGS[name](**{argument: 0})
    with pytest.raises(TypeError, match=f"^unheard_of: {name} has no such argument$"):
        THINGS[name](unheard_of=0)


@pytest.mark.parametrize("name", [*(kind.__name__ for kind in LAYERS), "Recurrent", "Sequential", "Stack"])
def test_arguments_of_calls_are_answered(name):
    thing = THINGS[name]()
    hint = "leave it out: it starts from zero states" if name in ("Recurrent", "Sequential") else "write state=$"
    for argument in ("hx", "initial_state", "h_0"):
        with pytest.raises(TypeError, match=f"^{argument}: {name} has no such argument; {hint}"):
            thing(X, **{argument: None})
        with pytest.raises(TypeError, match=f"^{argument}: {name}.forward has no such argument; {hint}"):
            thing.forward(X, **{argument: None})
    with pytest.raises(TypeError, match="^training: .* forward.* is training"):
        thing(X, training=True)
    with pytest.raises(TypeError, match="^sequence_lens: .* write lengths="):
        thing(X, sequence_lens=[7, 7])


@pytest.mark.parametrize("name", [*THINGS, "Adam"])
def test_arguments_of_methods_are_answered(name):
    thing = nn.Adam([nn.Linear(3, 2)]) if name == "Adam" else THINGS[name]()
    with pytest.raises(TypeError, match=f"^set_to_none: {name}.zero_grad has no such argument; leave it out: .* zero"):
        thing.zero_grad(set_to_none=True)
    if name != "Adam":
        with pytest.raises(TypeError, match=f"^strict: {name}.load_state_dict has no such argument; .*prefix"):
            thing.load_state_dict(thing.state_dict(), strict=False)


@pytest.mark.parametrize("name", THINGS)
def test_a_packed_sequence_is_answered(name):
    torch = pytest.importorskip("torch")
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(4, 3), torch.ones(2, 3)])
    with pytest.raises(TypeError, match="^x: got a PackedSequence; the layers of fastlstm.torch .*pad_packed_sequence"):
        THINGS[name]()(packed)


def test_a_list_of_two_is_two_sequences():
    x = [X[:6, 0], X[:6, 1]]
    for kind in LAYERS:
        y, _ = kind(3, 4)(x)
        assert isinstance(y, list) and [part.shape for part in y] == [(6, 4), (6, 4)]
    last = nn.Sequential(nn.Recurrent(fastlstm.GRU(3, 4), last=True), nn.Linear(4, 2))
    assert last(x).shape == (2, 2)
    y, _ = THINGS["Stack"]()(x)
    assert isinstance(y, list) and [len(part) for part in y] == [6, 6]
    thing = THINGS["Sequential"]()  # stacked on the way, they would be two steps
    for call in (thing, thing.forward):
        with pytest.raises(TypeError, match="^x: expected one array, got a list of 2 arrays; .*fastlstm.pad"):
            call(x)
    with pytest.raises(TypeError, match="fastlstm.pad"):
        nn.Sequential(nn.LayerNorm(3), fastlstm.GRU(3, 4))(x)


def test_what_sizes_hang_on_stays():
    linear, drop = nn.Linear(3, 2), nn.Dropout(0.5)
    for name, attribute in (("Linear", "out_features"), ("Linear", "dtype"), ("Embedding", "num_embeddings"),
                            ("LayerNorm", "features"), ("Recurrent", "layer"), ("Sequential", "modules"),
                            ("Stack", "layers"), ("LSTM", "hidden_size")):  # fmt: skip
        thing = THINGS[name]()
        with pytest.raises(AttributeError, match=f"^{attribute}: cannot change, make another {name}"):
            setattr(thing, attribute, 7)
    with pytest.raises(AttributeError, match=r"^weight: write into the array, params\['weight'\]"):
        linear.weight = np.ones((2, 3))
    with pytest.raises(AttributeError, match=r"^Linear has no attribute 'bias'; params\['bias'\] has it"):
        _ = linear.bias
    with pytest.raises(ValueError, match="p: expected"):
        drop.p = 9
    assert drop.p == 0.5
    with pytest.raises(TypeError, match="rng: expected an int"):
        nn.Linear(3, 2, rng="seed")


@pytest.mark.parametrize("name", THINGS)
def test_copies_of_another_type(name):
    thing = THINGS[name]()
    other = thing.astype(np.float64)
    assert type(other) is type(thing) and other.dtype == np.float64 and thing.dtype == np.float32
    assert all(same_bits(other.params[key], value.astype(np.float64)) for key, value in thing.params.items())


def test_repr_is_the_call():
    for layer in (
        fastlstm.LSTM(3, 4, init="zeros", forget_bias=1.0, zoneout=(0.1, 0.0)), fastlstm.GRU(3, 4, 2),
        fastlstm.RNN(3, 4, nonlinearity="relu"), fastlstm.SLSTM(3, 4, num_heads=2, forget_bias=2.0),
    ):  # fmt: skip
        text = repr(layer)
        kind = getattr(fastlstm, text.partition("(")[0])
        again = eval(text, {kind.__name__: kind, "float32": np.float32})
        assert again.options == layer.options
    assert repr(fastlstm.GRU(3, 4)) == "GRU(3, 4, dtype=float32)"


def test_a_layer_shows_itself_in_a_notebook():
    html = fastlstm.LSTM(3, 5)._repr_html_()
    assert "<tr><td>weight_ih_l0</td><td>(20, 3)</td><td>60</td></tr>" in html and "<td>200</td>" in html


def test_a_type_of_torch_is_answered_with_one_of_numpy():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="dtype: .*got torch.float32, write np.float32"):
        fastlstm.LSTM(3, 5, dtype=torch.float32)


def test_half_precision_state_dicts_load():
    torch = pytest.importorskip("torch")
    theirs, ours = torch.nn.LSTM(3, 5), fastlstm.LSTM(3, 5)
    for dtype in (torch.bfloat16, torch.float16):
        ours.load_state_dict(theirs.to(dtype).state_dict())
        for name, value in theirs.state_dict().items():
            assert np.array_equal(ours.params[name], value.float().numpy())


def test_show_config_returns_what_it_prints(capsys):
    found = fastlstm.show_config(mode="dicts")
    assert capsys.readouterr().out == ""
    assert found["isa"] in found["available_isas"] and found["threads"] == fastlstm.get_num_threads()
    assert fastlstm.show_config() is None and f"[{found['isa']}]" in capsys.readouterr().out
    with pytest.raises(ValueError, match="mode: expected"):
        fastlstm.show_config("json")
