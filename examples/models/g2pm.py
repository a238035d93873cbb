"""g2pM (0.1.2.5): how Chinese characters are read that can be read in several ways; a bidirectional LSTM and two
linear layers choose among 876 syllables.

    pip download g2pM==0.1.2.5 --no-deps
    python examples/models/g2pm.py g2pM-0.1.2.5-py3-none-any.whl

The weights are a pickle of arrays with PyTorch's names; it is read here by an unpickler that knows arrays alone, and
loads with ``prefix="lstm."``. What it is compared with is the package's class G2pM (NumPy, one step at a time), run
from its source; ours is the same class with one method replaced. The package computes in float64 from float32 weights,
we in float32: all syllables are the same, and the logits, which range over 127, differ by less than 1e-4. The last line
gives error and times, on one core.
"""

import pickle
import sys
import time
import types
import zipfile

import numpy as np
from threadpoolctl import threadpool_limits

import fastlstm

SENTENCES = """今天银行的人都很忙，我们还得再等一会儿。
他长得很高，头发也很长，是我们班的班长。
这只小鸟一只脚站在树上，只是不想飞。
音乐老师教我们唱歌，大家都觉得很快乐。
你要好好学习，不要因为爱好影响了重要的事。
行李太重了，请不要重复地搬来搬去，路上行人很多。
会计正在开会，他说这个月的账目数不清楚，要再数一遍。
我差点儿忘了，他今天要去上海出差，成绩也不差。
为了大家的方便，这里的水果又便宜又好吃。
孩子还没睡着，奶奶着急地看着表。
他假装生病请了假，其实去看了一场电影，回来得也晚。
种子种下去以后，各种各样的花都开了。""".splitlines()


class Reader(pickle.Unpickler):
    """Arrays, dicts, lists, numbers and strings; anything else in the file is an error."""

    def find_class(self, module, name):
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct")):
            return getattr(np, name) if module == "numpy" else np.ndarray(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"{module}.{name}: expected arrays")


def readers(path):
    """The package's own class, and the same with its LSTM on fastlstm, both with their weights."""
    with zipfile.ZipFile(path) as wheel:
        module = types.ModuleType("g2pM")
        exec(wheel.read("g2pM/g2pM.py"), module.__dict__)
        names = ("np_ckpt", "char2idx", "class2idx", "digest_cedict")
        weights, char2idx, class2idx, cedict = (Reader(wheel.open(f"g2pM/{name}.pkl")).load() for name in names)

    class Theirs(module.G2pM):
        def __init__(self):
            self.char2idx, self.cedict = char2idx, cedict
            self.idx2class = {number: syllable for syllable, number in class2idx.items()}
            self.load_variable(weights)

    class Ours(Theirs):
        def __init__(self):
            super().__init__()
            rows, features = weights["lstm.weight_ih_l0"].shape
            self.lstm = fastlstm.LSTM(features, rows // 4, bidirectional=True, init="zeros")
            self.lstm.load_state_dict(weights, prefix="lstm.")
            self.lstm.freeze()

        def predict(self, inputs, target_idx):  # inputs: (1, T), the characters of one sentence
            y, _ = self.lstm(self.embeddings[inputs[0]])
            return self.fc_layer(y[target_idx]).argmax(1)

    return Theirs(), Ours()


def read(reader, sentences):
    """The syllables of each sentence, and the logits that they were chosen by."""
    layer, logits = reader.fc_layer, []
    reader.fc_layer = lambda hidden: logits.append(layer(hidden)) or logits[-1]
    syllables = [reader(sentence) for sentence in sentences]
    del reader.fc_layer
    return syllables, np.concatenate(logits)


def race(rounds, *functions):
    """The least processor time of each in seconds, run in turn on one core: others on the machine matter little."""
    times = []
    with threadpool_limits(1):
        for _ in range(rounds):
            for function in functions:
                begin = time.process_time()
                function()
                times.append(time.process_time() - begin)
    return [min(times[i :: len(functions)]) for i in range(len(functions))]


def main(path, sentences=SENTENCES, rounds=20):
    theirs, ours = readers(path)
    fastlstm.set_num_threads(1)
    (expected, their_logits), (found, our_logits) = (read(reader, sentences) for reader in (theirs, ours))
    error = abs(our_logits - their_logits).max() if found == expected else np.inf
    spread = np.ptp(their_logits)
    our_time, their_time = race(rounds, *(lambda r=r: [r(sentence) for sentence in sentences] for r in (ours, theirs)))
    print(f"{len(sentences)} sentences, {len(our_logits)} characters of several readings, the first "
          f"{' '.join(expected[0][:4])}; fastlstm {1e3 * our_time:.2f} ms, g2pM's own {1e3 * their_time:.1f} ms; "
          f"logits range over {spread:.0f} and differ by {error:.1e}, "
          f"syllables {'same' if found == expected else 'DIFFER'}")  # fmt: skip
    return error, spread


if __name__ == "__main__":
    main(sys.argv[1])
