"""One MNIST training as three whole programs: the estimator, PyTorch, Keras 3; seconds per epoch, accuracy, ratios.

Each program runs in a process of its own, in turn (A B C A B C), with nothing beside it:

    python benchmarks/mnist_programs.py --epochs 3 --rounds 3 --threads 2

All train an LSTM of 128 units over 28 rows and a linear layer on its last hidden state, from the same normalised
float32 images, in batches of 128 drawn anew each epoch, with Adam at a constant rate and gradients clipped to norm 1.
The time of an epoch is that of the training alone; of each process the first epoch is left out where there are more
(Keras compiles in it). Keras runs on the backend that KERAS_BACKEND names, else on TensorFlow, or where that is not
installed on PyTorch.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

HIDDEN, BATCH, RATE = 128, 128, 2e-3
PROGRAMS = ("fastlstm", "torch", "keras")


def images(folder):
    """Training and test images as float32 (n, 28, 28) of mean 0 and deviation 1, and labels."""
    from fastlstm.datasets import load_mnist

    data = load_mnist(folder)
    pair = data.train_images, data.test_images
    x, x_test = (((a - 0.1307 * 255) / (0.3081 * 255)).astype(np.float32) for a in pair)
    return x, data.train_labels.astype(np.int64), x_test, data.test_labels.astype(np.int64)


def fastlstm(x, y, x_test, y_test, epochs):
    from fastlstm.sklearn import RecurrentClassifier

    model = RecurrentClassifier(
        "lstm", HIDDEN, standardize=False, epochs=epochs, batch_size=BATCH, learning_rate=RATE, schedule="constant",
        random_state=0,
    )  # fmt: skip
    model.fit(x, y)
    return [record["seconds"] for record in model.history_], model.score(x_test, y_test), ""


def torch(x, y, x_test, y_test, epochs):
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    lstm, head = torch.nn.LSTM(28, HIDDEN, batch_first=True), torch.nn.Linear(HIDDEN, 10)
    parameters = [*lstm.parameters(), *head.parameters()]
    adam, loss = torch.optim.Adam(parameters, RATE), torch.nn.CrossEntropyLoss()
    x, y, x_test, seconds = torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(x_test), []
    for _ in range(epochs):
        begin = time.perf_counter()
        order = torch.randperm(len(x))
        for rows in order.split(BATCH):
            adam.zero_grad()
            _, (h, _) = lstm(x[rows])
            loss(head(h[0]), y[rows]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
        seconds.append(time.perf_counter() - begin)
    with torch.inference_mode():
        found = [head(lstm(part)[1][0][0]).argmax(1).numpy() for part in x_test.split(500)]
    return seconds, float((np.concatenate(found) == y_test).mean()), torch.__version__


def keras(x, y, x_test, y_test, epochs):
    if importlib.util.find_spec("tensorflow") is None:
        os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    threads = int(os.environ["OMP_NUM_THREADS"])
    if keras.backend.backend() == "tensorflow":
        import tensorflow

        tensorflow.config.threading.set_intra_op_parallelism_threads(threads)
    elif keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(threads)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((28, 28)), keras.layers.LSTM(HIDDEN), keras.layers.Dense(10)])
    model.compile(
        keras.optimizers.Adam(RATE, global_clipnorm=1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    seconds = []
    for _ in range(epochs):
        begin = time.perf_counter()
        model.fit(x, y, batch_size=BATCH, epochs=1, shuffle=True, verbose=0)
        seconds.append(time.perf_counter() - begin)
    right = (model.predict(x_test, batch_size=500, verbose=0).argmax(1) == y_test).mean()
    return seconds, float(right), f"{keras.__version__} on {keras.backend.backend()}"


def work(program, epochs, data):
    """What a child does: train, and print one line of JSON."""
    seconds, accuracy, version = globals()[program](*images(data), epochs)
    print(json.dumps({"seconds": seconds, "accuracy": accuracy, "version": version}))


def run(program, args):
    """One process; its answer, or None where the library is not there."""
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    command = [sys.executable, __file__, "--work", program, "--epochs", str(args.epochs)]
    command += ["--data", args.data] if args.data else []
    begin = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    whole = time.perf_counter() - begin
    if done.returncode:
        print(f"{program}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"whole": whole}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--data", help="folder with the four idx files")
    parser.add_argument("--work", choices=PROGRAMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work, args.epochs, args.data)
    found = {program: [] for program in args.programs}
    for turn in range(args.rounds):
        for program in args.programs:
            if (answer := run(program, args)) is not None:
                found[program].append(answer)
                print(f"round {turn + 1} {program:9} {' '.join(f'{s:.2f}' for s in answer['seconds'])} s", flush=True)
    print(f"\n{'program':28} {'s per epoch':>12} {'ratio':>6} {'test %':>7} {'process, s':>11}")
    ours = None
    for program, answers in found.items():
        if not answers:
            continue
        epoch = statistics.median(s for a in answers for s in (a["seconds"][1:] or a["seconds"]))
        ours = epoch if program == "fastlstm" else ours
        ratio = f"{epoch / ours:.2f}" if ours else "-"
        accuracy = 100 * statistics.median(a["accuracy"] for a in answers)
        whole = statistics.median(a["whole"] for a in answers)
        print(f"{program + ' ' + answers[0]['version']:28} {epoch:12.2f} {ratio:>6} {accuracy:7.2f} {whole:11.1f}")
    return None


if __name__ == "__main__":
    main()
