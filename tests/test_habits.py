"""How layers and settings show themselves, and what they take from PyTorch."""

import numpy as np
import pytest

import fastlstm


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
