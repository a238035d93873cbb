"""g2p-en (2.1.0): how an English word is pronounced; a GRU reads the letters, a second one says the phonemes.

    pip download g2p-en==2.1.0 --no-deps
    python examples/models/g2p_en.py g2p_en-2.1.0-py3-none-any.whl

The weights are an .npz in the wheel, with PyTorch's shapes and gate order under names of its own. What it is compared
with is the package's class G2p (NumPy), taken from its source without the dictionary and the tagger that it wants
besides. The words are those of the wheel's own list of homographs, each spoken as if it were in no dictionary.

Word by word is how the package works: the encoder is a call, the decoder a stream, as each phoneme asks for the next.
All words at once is the same with `lengths`, and a stream of as many sequences. Phonemes are the same, logits that
range over 50 differ by less than 1e-4; the last line gives the error and the times on one core.
"""

import ast
import io
import sys
import time
import types
import warnings
import zipfile

import numpy as np
from threadpoolctl import threadpool_limits

import fastlstm
from fastlstm import nn

BEGIN, END, LONGEST = 2, 3, 20  # phonemes <s> and </s>; the package stops after 20


def letter_numbers(word):
    """The letters as the package numbers them, and </s>."""
    return [ord(letter) - ord("a") + 3 if "a" <= letter <= "z" else 1 for letter in word] + [2]


class Speaker:
    """The two GRUs on fastlstm."""

    def __init__(self, weights):
        self.letters, self.phonemes = weights["enc_emb"], weights["dec_emb"]
        units = weights["fc_w"].shape[1]
        named = {key.replace("w", "weight").replace("_b", "_bias"): array for key, array in weights.items()}
        del named["enc_emb"], named["dec_emb"]
        self.encoder = fastlstm.GRU(self.letters.shape[1], units, init="zeros")
        self.encoder.load_state_dict(named, prefix="enc_")
        decoder = fastlstm.GRU(self.phonemes.shape[1], units, init="zeros")
        decoder.load_state_dict(named, prefix="dec_")
        last = nn.Linear(units, len(self.phonemes))
        last.load_state_dict(named, prefix="fc_")
        self.encoder.freeze()
        self.decoder = fastlstm.Stack([decoder, last])
        self.stream = self.decoder.stream()

    def speak(self, word):
        """The phonemes of one word, and the logits that they are the largest of."""
        _, h = self.encoder(self.letters[letter_numbers(word)])
        self.stream.state = h, None
        phoneme, spoken, logits = BEGIN, [], []
        for _ in range(LONGEST):
            logits.append(self.stream.step(self.phonemes[phoneme]))
            phoneme = int(logits[-1].argmax())
            if phoneme == END:
                break
            spoken.append(phoneme)
        return spoken, np.array(logits)

    def speak_all(self, words):
        """The phonemes of many words at once."""
        lengths = [len(word) + 1 for word in words]
        numbers = np.zeros((max(lengths), len(words)), int)
        for n, word in enumerate(words):
            numbers[: lengths[n], n] = letter_numbers(word)
        _, h = self.encoder(self.letters[numbers], lengths=lengths)
        stream = self.decoder.stream(len(words))
        stream.state = h, None
        steps = [np.full(len(words), BEGIN)]
        ended = np.zeros(len(words), bool)
        while len(steps) <= LONGEST and not ended.all():
            steps.append(stream.step(self.phonemes[steps[-1]]).argmax(1))
            ended |= steps[-1] == END
        said = [[*map(int, row), END] for row in np.transpose(steps[1:])]
        return [row[: row.index(END)] for row in said]


def original(source, weights):
    """The package's own G2p, without cmudict and nltk, which only look up what they know."""
    with warnings.catch_warnings(action="ignore"):  # about an escape in one of its strings
        (found,) = [part for part in ast.parse(source).body if isinstance(part, ast.ClassDef)]
    names = {"np": np, "cmudict": types.SimpleNamespace(dict=dict), "construct_homograph_dictionary": dict}
    exec(compile(ast.Module([found], []), "g2p.py", "exec"), names)

    class Original(names["G2p"]):
        def load_variables(self):
            vars(self).update(weights)

    return Original()


def logits_of(theirs, word):
    """What the package's decoder computes on its way to the phonemes of a word."""
    cell, logits = theirs.grucell, []

    def seen(*arguments):
        h = cell(*arguments)
        logits.append(h[0] @ theirs.fc_w.T + theirs.fc_b)
        return h

    theirs.grucell = seen
    theirs.predict(word)
    del theirs.grucell
    return np.array(logits[len(word) + 1 :])


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


def main(path, count=None, rounds=5):
    with zipfile.ZipFile(path) as wheel:
        with np.load(io.BytesIO(wheel.read("g2p_en/checkpoint20.npz"))) as file:
            weights = dict(file)
        theirs = original(wheel.read("g2p_en/g2p.py").decode(), weights)
        lines = wheel.read("g2p_en/homographs.en").decode().splitlines()
    words = sorted({line.split("|")[0].lower() for line in lines if line and line[0] != "#"})[:count]
    ours = Speaker(weights)
    fastlstm.set_num_threads(1)
    spoken, ours_logits = zip(*map(ours.speak, words), strict=True)
    expected = list(map(theirs.predict, words))
    same = [[theirs.idx2p[n] for n in said] for said in spoken] == expected and ours.speak_all(words) == [*spoken]
    their_logits = [logits_of(theirs, word) for word in words]
    error = max(abs(a - b).max() for a, b in zip(ours_logits, their_logits, strict=True)) if same else np.inf
    spread = max(map(np.ptp, their_logits))
    by_word, at_once, their_time = race(
        rounds,
        lambda: [ours.speak(word) for word in words],
        lambda: ours.speak_all(words),
        lambda: [theirs.predict(word) for word in words],
    )
    print(f"{len(words)} words, the last one {words[-1]}: {' '.join(expected[-1])}; "
          f"fastlstm {by_word:.3f} s, all at once {at_once:.3f} s, g2p-en's own {their_time:.3f} s; "
          f"logits range over {spread:.0f} and differ by {error:.1e}, "
          f"phonemes {'same' if same else 'DIFFER'}")  # fmt: skip
    return error, spread


if __name__ == "__main__":
    main(sys.argv[1])
