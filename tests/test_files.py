"""Files of our own, of PyTorch without PyTorch, and other layouts of weights.

The long versions of two tests, 300 kills and 5,000 mutated files of each kind, take some minutes:
``python -m pytest tests/test_files.py -m full``
"""

import argparse
import json
import os
import pickle
import random
import signal
import stat
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import same_bits

import fastlstm
from fastlstm import files, nn
from fastlstm._saved import digest

safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed: no test of files")

MODULES = {
    "lstm": lambda: fastlstm.LSTM(3, 5, 2, bidirectional=True, proj_size=2, zoneout=(0.1, 0.2), dropout=0.3, rng=0),
    "forget_bias": lambda: fastlstm.LSTM(3, 5, init="orthogonal", forget_bias=1.5, batch_first=True, rng=0),
    "gru": lambda: fastlstm.GRU(3, 4, reset_after=False, dtype=np.float64, activation="softsign", bias=False, rng=0),
    "rnn": lambda: fastlstm.RNN(3, 4, nonlinearity="relu", recurrent_dropout=0.25, rng=0),
    "linear": lambda: nn.Linear(3, 2, bias=False, rng=0),
    "stack": lambda: fastlstm.Stack([fastlstm.LSTM(3, 5, proj_size=2, rng=0), nn.Linear(2, 7, rng=1),
                                     fastlstm.GRU(7, 4, rng=2)]),
    "embedding": lambda: nn.Embedding(5, 3, rng=0),
    "layer_norm": lambda: nn.LayerNorm(3, eps=1e-3, dtype=np.float64),
    "recurrent": lambda: nn.Recurrent(fastlstm.SLSTM(3, 8, num_heads=2, rng=0), last=True),
    "sequential": lambda: nn.Sequential(
        nn.Embedding(11, 3, rng=0), fastlstm.GRU(3, 4, bidirectional=True, rng=1), nn.LayerNorm(8, eps=1e-3),
        nn.Dropout(0.3, rng=0),
        nn.Sequential(nn.Linear(8, 6, rng=2), nn.Recurrent(fastlstm.RNN(6, 5, rng=3), last=True)),
    ),
}  # fmt: skip


def options(module):
    """All that constructors took, of all parts."""
    parts = list(module) if isinstance(module, fastlstm.Stack | nn.Sequential) else []
    if isinstance(module, nn.Recurrent):
        return module.last, options(module.layer)
    return [(type(part), options(part)) for part in parts] or module.options


def assert_same(got, want):
    assert type(got) is type(want) and options(got) == options(want)
    assert got.params.keys() == want.params.keys()
    for name in want.params:
        assert same_bits(got.params[name], want.params[name]), name


# ---- save and load ----


@pytest.mark.parametrize("kind", MODULES)
def test_what_is_saved_comes_back(kind, tmp_path):
    module = MODULES[kind]()
    module.save(tmp_path / "file")
    back = fastlstm.load(str(tmp_path / "file"))
    assert_same(back, module)
    assert not any(grad.any() for grad in back.grads.values())
    for view in back.params.values():
        view += 1  # its own memory, and writeable


def test_a_sequential_comes_back_as_it_was(tmp_path):
    tied = nn.Linear(8, 8, rng=0)
    model = nn.Sequential(tied, fastlstm.LSTM(8, 8, rng=1), tied)
    model.save(tmp_path / "file")
    back = fastlstm.load(tmp_path / "file")
    assert back[0] is back[2] and back.num_params == model.num_params
    x = np.ones((4, 2, 8), np.float32)
    assert same_bits(back(x, [4, 2]), model(x, [4, 2]))
    y, tape = back.forward(x)
    back.backward(tape, y)
    assert back.flat_grads.any()
    layer = fastlstm.GRU(8, 8, rng=0)
    for wrong, error, text in (
        (nn.Sequential(nn.Recurrent(layer), nn.Recurrent(layer)), ValueError, "modules.1.: shares the parameters"),
        (nn.Sequential(type("Mine", (nn.Module,), {"__init__": lambda self: self._allocate({}, "f4") and None})()),
         TypeError, "Mine: a module of your own"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            wrong.save(tmp_path / "other")
    assert os.listdir(tmp_path) == ["file"]


def test_other_programs_read_the_weights(tmp_path):
    layer = MODULES["lstm"]()
    layer.save(tmp_path / "file")
    found = safetensors.load_file(tmp_path / "file")
    assert found.keys() == layer.params.keys()
    assert all(same_bits(found[name], layer.params[name]) for name in found)
    again = fastlstm.LSTM(3, 5, 2, bidirectional=True, proj_size=2)
    again.load_state_dict(fastlstm.read_state_dict(tmp_path / "file"))
    assert same_bits(again.flat_params, layer.flat_params)


def test_a_frozen_layer_is_saved_and_comes_back_thawed(tmp_path):
    layer = MODULES["gru"]().freeze()
    layer.save(tmp_path / "file")
    back = fastlstm.load(tmp_path / "file")
    back.forward(np.ones((2, 1, 3)))


def test_permissions_links_and_failures(tmp_path):
    target, link = tmp_path / "real", tmp_path / "link"
    layer = MODULES["rnn"]()
    layer.save(target)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask
    target.chmod(0o640)
    link.symlink_to(target)
    MODULES["gru"]().save(link)
    assert link.is_symlink() and stat.S_IMODE(target.stat().st_mode) == 0o640
    assert_same(fastlstm.load(target), MODULES["gru"]())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]
    with pytest.raises(OSError):
        layer.save(tmp_path / "no" / "folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        layer.save(tmp_path / "folder")
    with pytest.raises(TypeError, match="module: expected"):
        files.save({"a": 1}, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "link", "real"]
    assert_same(fastlstm.load(target), MODULES["gru"]())


def test_what_is_no_file_of_ours(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        fastlstm.load(path)
    with pytest.raises(IsADirectoryError):
        fastlstm.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for read in (fastlstm.load, fastlstm.read_state_dict):
        with pytest.raises(ValueError, match="regular file"):
            read(tmp_path / "pipe")
    for content in (b"", b"text", b"\xff" * 100, pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a whole file"):
            fastlstm.load(path)
        with pytest.raises(ValueError, match="expected a zip file of torch.save"):
            fastlstm.read_state_dict(path)
    safetensors.save_file({"a": np.ones(3)}, path)
    with pytest.raises(ValueError, match="description.*read_state_dict"):
        fastlstm.load(path)


def forged(described, tensors):
    """A file whose checksum is right and whose description is not."""
    text = json.dumps({"format": 1} | described)
    return safetensors.save(tensors, {"fastlstm": text, "sha256": digest(text, tensors)})


def test_hostile_descriptions_take_no_memory(tmp_path):
    path = tmp_path / "file"
    layer = fastlstm.RNN(3, 4, rng=0)
    good = layer.options | {"dtype": "float32"}
    descriptions = [
        {"class": "RNN", "options": good | change}
        for change in ({"hidden_size": 2**30}, {"input_size": 10**12}, {"num_layers": 2**16}, {"num_layers": 0},
                       {"dtype": "object"}, {"dtype": "float64"}, {"hidden_size": "4"}, {"hidden_size": [4]},
                       {"bias": False}, {"bidirectional": True}, {"unknown": 1}, {"rng": 1, "self": 2},
                       {"nonlinearity": "exec"}, {"dropout": float("nan")})
    ]  # fmt: skip
    descriptions += [
        {"class": "os.system", "options": {}}, {"class": ["LSTM"], "options": good}, {"class": "RNN"},
        {"class": "RNN", "options": None}, {"options": good}, {"class": "Stack", "layers": {}},
        {"class": "Stack", "layers": []}, {"class": "Stack", "layers": [{"class": "Stack", "layers": []}]},
        {"class": "Linear", "options": {"in_features": 10**9, "out_features": 10**9, "bias": True, "dtype": "float32"}},
        {"format": 2, "class": "RNN", "options": good},
        *({"class": "Sequential", "modules": modules} for modules in (
            [], {}, None, [{"same": 0}], [{"same": "0"}], ["Linear"], [3], [{"class": "Stack", "layers": []}],
            [{"class": "RNN", "options": good | {"hidden_size": 2**30}}],
            [{"class": "Embedding", "options": {"num_embeddings": 10**9, "embedding_dim": 9, "dtype": "float32"}}],
            [{"class": "Recurrent", "last": True, "layer": {"class": "Dropout", "options": {"dtype": "float32"}}}],
            [{"class": "Recurrent", "last": 1, "layer": {"class": "RNN", "options": good}}])),
    ]  # fmt: skip
    path.write_bytes(forged({"class": "RNN", "options": good}, dict(layer.params)))
    assert_same(fastlstm.load(path), layer)
    for described in descriptions:
        path.write_bytes(forged(described, dict(layer.params)))
        tracemalloc.start()
        with pytest.raises(ValueError, match="not a whole file"):
            fastlstm.load(path)
            pytest.fail(str(described))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 300_000, (described, peak)


def kills(count, path):
    """Processes that save over and over, killed at any moment: the file is one or the other."""
    layers = [fastlstm.LSTM(64, 64, rng=1), fastlstm.LSTM(50, 96, rng=2)]
    layers[0].save(path)
    rng = random.Random(0)
    seen = set()
    for turn in range(count):
        child = os.fork()
        if child == 0:
            try:
                for i in range(10**6):
                    layers[(i + turn) % 2].save(path)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.001, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        found = fastlstm.load(path)
        which = layers[found.hidden_size == 96]
        assert_same(found, which)
        seen.add(found.hidden_size)
    assert seen == {64, 96}
    assert {p.suffix for p in path.parent.iterdir()} <= {path.suffix, ".part"}


def test_what_killed_saves_left_is_taken_away(tmp_path):
    """The next save of the same name takes it; what is held, new, or another file's stays."""
    from fastlstm import _saved

    path = tmp_path / "a[1].safetensors"
    left = {
        name: tmp_path / f".{name}.part"
        for name in (
            "a[1].safetensors.00000000",
            "a[1].safetensors.11111111",
            "a[1].safetensors.22222222",
            "b.safetensors.00000000",
        )
    }
    for part in left.values():
        part.touch()
    for name in ("a[1].safetensors.00000000", "a[1].safetensors.11111111", "b.safetensors.00000000"):
        os.utime(left[name], (1e9, 1e9))
    with open(left["a[1].safetensors.11111111"], "ab") as held:
        _saved.hold(held)
        fastlstm.LSTM(2, 3).save(path)
    assert {p.name for p in tmp_path.iterdir()} == {path.name} | {part.name for part in list(left.values())[1:]}


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a)))
    fastlstm.LSTM(2, 3).save(tmp_path / "a.safetensors")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path):
    kills(20, tmp_path / "file.safetensors")


@pytest.mark.full
def test_300_kills(tmp_path):
    kills(300, tmp_path / "file.safetensors")


def mutated(content, rng):
    """Content with some damage of one of several kinds."""
    content = bytearray(content)
    kind = rng.randrange(7)
    size = len(content)
    header = min(size, 2000)
    if kind == 0:  # a bit anywhere
        content[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == 1:  # bits of the head, or of the tail, where zip files have theirs
        for _ in range(rng.randint(1, 8)):
            place = rng.randrange(header)
            content[place if rng.random() < 0.5 else size - 1 - place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del content[rng.randrange(size) :]
    elif kind == 3:
        place = rng.randrange(size)
        content[place:place] = rng.randbytes(rng.randint(1, 100))
    elif kind == 4:
        place = rng.randrange(size)
        del content[place : place + rng.randint(1, 100)]
    elif kind == 5:  # digits of sizes and offsets
        digits = [i for i in range(header) if 48 <= content[i] < 58]
        if digits:
            content[rng.choice(digits)] = rng.choice(b"0123456789")
    else:  # a number of eight bytes
        place = rng.randrange(header) if rng.random() < 0.7 else 0
        content[place : place + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**63, rng.getrandbits(64), size]))
    return bytes(content)


def survive(count, content, path, read, check, seed):
    """Read mutated files: a ValueError or what was written, in at most twice the file's size."""
    rng = random.Random(seed)
    refused, worst = 0, 0.0
    path.write_bytes(content)
    check(read(path))  # what is imported on the way is not the file's
    tracemalloc.start()
    try:
        for _ in range(count):
            damaged = mutated(content, rng)
            path.write_bytes(damaged)
            size = len(damaged)
            del damaged
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                found = read(path)
            except ValueError as error:
                refused += 1
                assert str(path) in str(error)
            else:
                check(found)
                del found
            worst = max(worst, (tracemalloc.get_traced_memory()[1] - before - 200_000) / max(size, 1))
    finally:
        tracemalloc.stop()
    assert refused > 0.8 * count
    assert worst <= 2, worst
    return refused, worst


def mutations(count, tmp_path):
    """What is damaged of each kind of file, and how often it was refused."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: it writes the files that are damaged here")
    layer = fastlstm.LSTM(128, 128, 2, rng=0)
    path = tmp_path / "file"
    layer.save(path)
    content = path.read_bytes()
    results = {"own": survive(count, content, path, fastlstm.load, lambda found: assert_same(found, layer), 1)}
    stack = fastlstm.Stack([fastlstm.GRU(100, 128, rng=0), nn.Linear(128, 90, rng=1), fastlstm.RNN(90, 200, rng=2)])
    stack.save(path)
    content = path.read_bytes()
    results["stack"] = survive(count, content, path, fastlstm.load, lambda found: assert_same(found, stack), 2)

    model = nn.Sequential(nn.Embedding(100, 128, rng=0), fastlstm.GRU(128, 128, rng=1), nn.Linear(128, 99, rng=2))
    model.save(path)
    content = path.read_bytes()
    results["sequential"] = survive(count, content, path, fastlstm.load, lambda found: assert_same(found, model), 4)

    def equal(found):
        assert found.keys() == layer.params.keys()
        assert all(same_bits(np.ascontiguousarray(found[name]), layer.params[name]) for name in found)

    torch.save({name: torch.from_numpy(view) for name, view in layer.params.items()}, path)
    content = path.read_bytes()
    results["torch"] = survive(count, content, path, fastlstm.read_state_dict, equal, 3)
    return results


def test_mutated_files(tmp_path):
    mutations(150, tmp_path)


@pytest.mark.full
def test_5000_mutated_files(tmp_path, capsys):
    results = mutations(5000, tmp_path)
    with capsys.disabled():
        print("\nrefused, most memory in sizes of the file:", results)


# ---- PyTorch's files ----


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed: nothing writes its files")


def test_a_state_dict_of_torch(torch, tmp_path):
    theirs = torch.nn.LSTM(3, 5, 2, bidirectional=True)
    torch.save(theirs.state_dict(), tmp_path / "a.pt")
    ours = fastlstm.LSTM(3, 5, 2, bidirectional=True)
    ours.load_state_dict(fastlstm.read_state_dict(tmp_path / "a.pt"))
    for name, value in theirs.state_dict().items():
        assert same_bits(ours.params[name], value.numpy())


def test_a_checkpoint_of_torch(torch, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.GRU(3, 4))
    optimizer = torch.optim.Adam(model.parameters())
    base = torch.arange(12.0)
    whole = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "big": 2**80, "name": "x",
        "none": None, "list": [1.5, (1, 2), True], "size": torch.Size([1, 2]),
        "parameter": torch.nn.Parameter(torch.ones(2)), "views": [base[2:8].reshape(2, 3).T, base],
        "wide": torch.ones(1).expand(5, 7), "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3), "bool": torch.tensor([True, False]), "names": {"a", "b"},
    }  # fmt: skip
    for kind in (torch.bfloat16, torch.float16, torch.int8, torch.uint8):
        whole[str(kind)] = torch.linspace(0, 3, 7).to(kind)
    for protocol in (2, 3, 4, 5):
        path = tmp_path / f"{protocol}.pth"
        torch.save(whole, path, pickle_protocol=protocol)
        found = fastlstm.read_state_dict(path)
        compare(found, whole, torch)
    gru = fastlstm.GRU(3, 4)
    gru.load_state_dict(found["model"], prefix="1.")
    assert same_bits(gru.params["weight_hh_l0"], model[1].weight_hh_l0.detach().numpy())


def test_numpy_in_a_checkpoint(torch, tmp_path):
    """What training scripts keep beside the weights: losses as NumPy's numbers, arrays, the generator's state."""
    ones, path = np.ones(3), tmp_path / "a.pt"
    whole = {
        "loss": np.float64(0.1), "step": np.int64(-7), "best": np.float32(1e-3), "done": np.bool_(True), "arr": ones,
        "again": [ones, {"x": ones}], "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "none": np.zeros((0, 2)), "scalar": np.array(2.5),
        "random": np.random.get_state(), "long": np.arange(10**5, dtype=np.uint16),
        "bytes": [b"", b"abc", bytes(300)], "tensor": torch.arange(3),
        "kinds": [np.arange(7).astype(kind) for kind in ("?", "i1", "i2", "i4", "u1", "u4", "u8", "f2", "f4", "f8")],
    }  # fmt: skip
    for protocol in (2, 3, 4, 5):
        torch.save(whole, path, pickle_protocol=protocol)
        found = fastlstm.read_state_dict(path)
        compare(found, whole, torch)
        assert type(found["loss"]) is np.float64 and type(found["step"]) is np.int64
        assert [a.dtype for a in found["kinds"]] == [a.dtype for a in whole["kinds"]]
        assert found["again"][0] is found["again"][1]["x"] is found["arr"]
        for thing in (np.array(["a"]), np.array([None, {}]), np.zeros(2, "i4,f4"), np.array(["2020-01-01"], "M8[D]"),
                      np.ones(2, ">f4"), np.ones(2, "c8"), np.str_("a"), np.ma.ones(2),
                      np.random.default_rng(0)):  # fmt: skip
            torch.save({"a": thing}, path, pickle_protocol=protocol)
            with pytest.raises(ValueError, match="only tensors, arrays of numbers|little-endian|plain numbers"):
                fastlstm.read_state_dict(path)
                pytest.fail(repr(thing))


def numpy_pickle(shape=b"K\x02\x85", text=b"f8", build=None, content=bytes(16), order=b"<"):
    """An array as protocol 3 has it, in parts."""
    short = [b"C" + bytes([len(content)]) + content, b"X" + struct.pack("<I", len(text)) + text]
    built = b"(K\x03X\x01\0\0\0" + order + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    dtype = b"cnumpy\ndtype\n" + short[1] + b"\x89\x88\x87R" + built
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87R"
    state = b"(K\x01" + shape + dtype + b"\x89" + short[0] + b"tb"
    return b"\x80\x03}X\x01\0\0\0x" + made + (state if build is None else build) + b"s."


def test_hostile_arrays(tmp_path):
    path = tmp_path / "a.pt"
    archive(path, numpy_pickle())
    assert same_bits(fastlstm.read_state_dict(path)["x"], np.zeros(2))
    f8, endless = b"cnumpy\ndtype\nX\x02\0\0\0f8\x89\x88\x87R", b"\x8a\x08" + b"\xff" * 7 + b"\x7f"
    again = numpy_pickle()[numpy_pickle().index(b"(K\x01") : -2]  # what builds
    scalar = b"\x80\x03}X\x01\0\0\0xcnumpy.core.multiarray\nscalar\n"
    for name, pickled, text in (
        ("too large a shape", numpy_pickle(b"K\x03\x85"), "expected 24 bytes"),
        ("a negative one", numpy_pickle(b"J\xff\xff\xff\xff\x85"), "expected the shape"),
        ("an endless one", numpy_pickle(endless + b"\x85"), "expected the shape"),
        ("an empty endless one", numpy_pickle(b"K\0" + endless + b"\x86", content=b""), "expected the shape"),
        ("a shape of truths", numpy_pickle(b"\x88\x85", content=bytes(8)), "expected the shape"),
        ("no tuple", numpy_pickle(b"K\x02"), "expected a tuple"),
        ("objects", numpy_pickle(text=b"O8"), "plain numbers"),
        ("a record", numpy_pickle(text=b"f8,f8"), "plain numbers"),
        ("text", numpy_pickle(text=b"U4"), "plain numbers"),
        ("other order", numpy_pickle(order=b">"), "little-endian"),
        ("a list for bytes", numpy_pickle(build=b"(K\x01K\0\x85" + f8 + b"\x89]tb"), "and the bytes"),
        ("a name for a type", numpy_pickle(build=b"(K\x01K\x02\x85X\x02\0\0\0f8\x89C\x00tb"), "expected a type"),
        ("built twice", numpy_pickle()[:-2] + again + b"s.", "filled once"),
        ("of another class", numpy_pickle().replace(b"cnumpy\nndarray", b"cnumpy\nmatrix"), "holds numpy.matrix"),
        ("a dtype called", numpy_pickle().replace(b"cnumpy\nndarray\nK\0\x85C\x01b\x87R", b"]\x85R"), "a plain array"),
        ("a list called", b"\x80\x03}K\x01])Rs.", "expected a tensor, an array or a dict"),
        ("a scalar of no bytes", scalar + f8 + b"C\x00\x86Rs.", "expected 8 bytes"),
        ("a scalar of objects", scalar + f8.replace(b"f8", b"O8") + b"C\x08" + bytes(8) + b"\x86Rs.", "plain numbers"),
        ("another codec", b"\x80\x03}K\x01c_codecs\nencode\nX\x01\0\0\0aX\x04\0\0\0zlib\x86Rs.", "latin1"),
        ("bytes of a number", b"\x80\x03}K\x01c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85Rs.", "not a whole"),
        ("left unbuilt", numpy_pickle(build=b""), None),
    ):  # fmt: skip
        archive(path, pickled)
        if text is None:
            assert fastlstm.read_state_dict(path)["x"].size == 0
            continue
        with pytest.raises(ValueError, match=text):
            fastlstm.read_state_dict(path)
            pytest.fail(name)


def compare(found, want, torch):
    if isinstance(want, np.ndarray | np.generic):
        assert type(found) is type(want) and same_bits(np.asarray(found), np.asarray(want))
    elif isinstance(want, torch.Tensor):
        assert isinstance(found, np.ndarray) and found.shape == tuple(want.shape)
        want = want.detach()
        assert np.array_equal(found, (want.float() if want.dtype == torch.bfloat16 else want).numpy())
    elif isinstance(want, dict):
        assert found.keys() == want.keys()
        for key in want:
            compare(found[key], want[key], torch)
    elif isinstance(want, list | tuple):
        assert len(found) == len(want)
        for a, b in zip(found, want, strict=True):
            compare(a, b, torch)
    else:
        assert found == want


def test_what_else_torch_can_write_is_refused(torch, tmp_path):
    path = tmp_path / "a.pt"
    for thing, text in (
        (torch.nn.LSTM(3, 5), "holds torch.nn.modules.rnn.LSTM.*state_dict"),
        ({"args": argparse.Namespace(lr=0.1)}, r"holds argparse\.Namespace: only .* save vars\(args\)"),
        ({"path": Path("a")}, r"holds pathlib\.PosixPath: .*model alone"),
        ({"a": slice(2)}, "holds .*slice"),
        (torch.ones(3), "expected a dict in the checkpoint"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "ComplexFloatStorage"),
        ({"a": torch.zeros(2, dtype=torch.complex64).conj().imag}, r"resolve_neg\(\)"),
    ):
        torch.save(thing, path)
        with pytest.raises(ValueError, match=text):
            fastlstm.read_state_dict(path)
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="PyTorch 1.6 or later"):
        fastlstm.read_state_dict(path)


class Touch:
    """Its pickle makes a file when it is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def archive(path, pickled, records=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr("a/data.pkl", pickled)
        for name, content in records:
            out.writestr(f"a/{name}", content)


def test_hostile_pickles_do_nothing(tmp_path):
    path, touched = tmp_path / "a.pt", str(tmp_path / "touched")
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"

    def tensor(offset, size, stride, of=storage):
        return b"}X\x01\x00\x00\x00x" + rebuild + b"(" + of + offset + size + stride + b"\x89NtRs."

    wide = rebuild + b"(" + storage + b"K\x00M\xff\xff\x85K\x00\x85\x89NtR"  # a tensor that repeats one element

    cases = {
        "a call": (pickle.dumps({"a": Touch(touched)}), "holds (io|_io).open"),
        "a call, old": (pickle.dumps({"a": Touch(touched)}, 0), "holds|instruction"),
        "an import": (b"cos\nsystem\n(S'true'\ntR.", "holds os.system|instruction"),
        "no end": (b"}", "not a whole"),
        "nothing": (b"", "not a whole"),
        "too much popped": (b"}ss.", "not a whole"),
        "memory never set": (b"h\x05.", "not a whole"),
        "place in memory": (b"}r\xff\xff\xff\x7f.", None),
        "a long string": (b"}X\xff\xff\xff\x7fabc", "not a whole"),
        "many bytes": (b"\x96\xff\xff\xff\xff\xff\xff\x00\x00.", "not a whole"),
        "a list as a key": (b"}(]K\x01u.", "not a whole"),
        "right": (b"\x80\x02" + tensor(b"K\x00", b"K\x02K\x02\x86", b"K\x02K\x01\x86"), None),
        "past the end": (b"\x80\x02" + tensor(b"K\x01", b"K\x02K\x02\x86", b"K\x02K\x01\x86"), "reaches past"),
        "backwards": (b"\x80\x02" + tensor(b"K\x03", b"K\x02\x85", b"J\xff\xff\xff\xff\x85"), "sizes and strides"),
        "other rank": (b"\x80\x02" + tensor(b"K\x00", b"K\x02\x85", b")"), "sizes and strides"),
        "a tensor twice": (b"\x80\x02" + tensor(b"K\x00", b"M\xff\xff\x85", b"K\x01\x85", wide), "a storage of"),
        "endless": (b"\x80\x02" + tensor(b"K\x00", b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85", b"K\x00\x85"), "sizes"),
    }  # fmt: skip
    for name, (pickled, text) in cases.items():
        archive(path, pickled, [("data/0", np.arange(4, dtype="f4").tobytes())])
        if text is None:
            assert isinstance(fastlstm.read_state_dict(path), dict)
            continue
        with pytest.raises(ValueError, match=text):
            fastlstm.read_state_dict(path)
            pytest.fail(name)
    assert not os.path.exists(touched)


def test_hostile_archives(tmp_path):
    path = tmp_path / "a.pt"
    archive(path, b"}.", [("data/0", b"\0" * 10**6)], zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="not compressed"):
        fastlstm.read_state_dict(path)
    archive(path, b"}.", [("data/0", b"\0" * 100)])
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"data/0"))  # its size in the archive, in the directory
    content[entry + 20 : entry + 24] = struct.pack("<I", 1 << 26)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not compressed"):
        fastlstm.read_state_dict(path)
    archive(path, b"}.", [("byteorder", b"big")])
    with pytest.raises(ValueError, match="little-endian"):
        fastlstm.read_state_dict(path)
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("model/code.py", "1")
    with pytest.raises(ValueError, match="data.pkl"):
        fastlstm.read_state_dict(path)


# ---- foreign layouts ----


def test_gate_order():
    H, D = 3, 2
    rng = np.random.default_rng(0)
    blocks = {letter: rng.standard_normal((H, D)) for letter in "ifgo"}

    def laid(order):
        return np.concatenate([blocks[letter] for letter in order])

    for name, order in (("iofc", "iofg"), ("ifco", "ifgo"), ("ijfo", "igfo"), ("fico", "figo")):
        assert np.array_equal(fastlstm.gate_order(laid(order), name, "ifgo"), laid("ifgo"))
        assert np.array_equal(fastlstm.gate_order(laid("ifgo"), "ifgo", name), laid(order))
        assert np.array_equal(fastlstm.gate_order(laid(order).T, name, "ifgo", axis=-1), laid("ifgo").T)
    assert fastlstm.gate_order([1, 2, 3], "zrh", "rzn").tolist() == [2, 1, 3]
    assert fastlstm.gate_order([1, 2, 3], "ruc", "rzn").tolist() == [1, 2, 3]
    for arguments, text in (
        (([1, 2, 3, 4], "ifgo", "rzn"), "same gates"), (([1, 2, 3, 4], "iifo", "iifo"), "each once"),
        (([1, 2, 3], "ifgo", "iofc"), "multiple of 4"), (([1, 2, 3, 4], "ifgo", "iofc", 1), "axis"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            fastlstm.gate_order(*arguments)
    with pytest.raises(TypeError, match="source"):
        fastlstm.gate_order([1], 3, "a")


def test_prefixes():
    layer = fastlstm.LSTM(3, 4, rng=0)
    inside = {"SequenceModeling.0." + name: value for name, value in layer.state_dict().items()}
    other = fastlstm.LSTM(3, 4, rng=1)
    before = other.flat_params.copy()
    with pytest.raises(ValueError, match=r"behind 'SequenceModeling\.0\.': give prefix='SequenceModeling\.0\.'"):
        other.load_state_dict(inside | {"head.weight": np.ones(3)})
    with pytest.raises(ValueError, match="no key begins with 'SequenceModelling'.*'SequenceModeling.0.weight_ih_l0'"):
        other.load_state_dict(inside, prefix="SequenceModelling")
    with pytest.raises(ValueError, match="unexpected keys"):
        other.load_state_dict(inside | {"SequenceModeling.0.more": np.ones(3)}, prefix="SequenceModeling.0.")
    with pytest.raises(TypeError, match="prefix"):
        other.load_state_dict(inside, prefix=3)
    assert same_bits(other.flat_params, before)
    other.load_state_dict(inside | {"head.weight": np.ones(3)}, prefix="SequenceModeling.0.")
    assert same_bits(other.flat_params, layer.flat_params)
    linear = nn.Linear(3, 2, rng=0)
    nn.Linear(3, 2).load_state_dict({"a." + k: v for k, v in linear.params.items()}, prefix="a.")


def test_names_of_cells_and_one_bias():
    layer, other = fastlstm.GRU(3, 4, rng=0), fastlstm.GRU(3, 4, rng=1)
    cell = {name.removesuffix("_l0"): value for name, value in layer.state_dict().items()}
    other.load_state_dict(cell)
    assert same_bits(other.flat_params, layer.flat_params)
    other.load_state_dict({"cell." + name: value for name, value in cell.items()}, prefix="cell.")
    with pytest.raises(ValueError, match="weight_ih_l1"):
        fastlstm.GRU(3, 4, 2).load_state_dict(cell)
    one = {name: value for name, value in layer.state_dict().items() if name != "bias_hh_l0"}
    other.load_state_dict(one)
    assert not other.params["bias_hh_l0"].any() and same_bits(other.params["bias_ih_l0"], layer.params["bias_ih_l0"])
    two = fastlstm.GRU(3, 4, 2, rng=0)
    some = {name: value for name, value in two.state_dict().items() if name != "bias_hh_l1"}
    with pytest.raises(ValueError, match="missing keys.*bias_hh_l1"):  # the first has its second bias: damage
        two.load_state_dict(some)
