"""Loss by position: what a longer context is worth to a model of a text.

  ./train_sessacu --data data/prose.txt --dim 768 --layers 4 --heads 12 --seq 8192 --batch 2 --out prose.safetensors
  dev/claims/positions.py prose.best.safetensors --data data/prose.txt --program ./train_sessacu --json positions.json

The validation part of the text, its last tenth, is cut into windows as long as the model's; of each window
the token at position t is predicted from t + 1 tokens. Printed is the mean loss over the positions of each
bin, 0 to 15, 16 to 31, 32 to 63 …, all models on the same windows.

The program tells one loss a data set, and so an example set is made for every bin, the same inputs with that
bin's targets alone; and a copy of the weights without the words, with which the program would take texts
only.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
sys.path.append(os.path.join(ROOT, "data"))
import average
from example_set import write_examples

FIRST = 16      # positions of the first bin; each later one begins where twice as much has been seen


def bins(T):
    """[(first position, the one behind the last)]"""
    edges = [0]
    while edges[-1] < T:
        edges.append(min(T, 2 * edges[-1] or FIRST))
    return list(zip(edges, edges[1:]))


WORDS = "tokenizer.bytes"


def read_model(path):
    """(its T, the bytes that its tokens stand for, its weights, the metadata that tells its shape) of a checkpoint
    trained on a text."""
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if WORDS not in file.keys():
                sys.exit(f"{path}: not a model of a text's bytes")
            names = [name for name in file.keys() if name != WORDS and not name.startswith("exp_avg")]
            weights = {name: file.get_tensor(name) for name in names}
            shape = {key: metadata[key] for key in average.SHAPE if key in metadata}
            return int(metadata["max_seq_len"]), file.get_tensor(WORDS), weights, shape
    except (OSError, SafetensorError, KeyError) as error:
        sys.exit(f"{path}: {error}")


def windows_of(path, words, T, n):
    """(inputs, targets) of n windows, evenly spaced over the last tenth of a text."""
    try:
        with open(path, "rb") as file:
            text = np.frombuffer(file.read(), np.uint8)
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")
    part = text[len(text) * 9 // 10:]
    there = (len(part) - 1) // T
    if not there:
        sys.exit(f"{path}: its last tenth has {len(part)} bytes, and a window {T}")
    ids = np.full(256, -1)
    ids[words] = np.arange(len(words))
    n = min(n, there)
    rows = np.stack([ids[part[there * i // n * T:][:T + 1]] for i in range(n)])
    if rows.min() < 0:
        sys.exit(f"{path}: holds bytes that the model does not know")
    return rows[:, :-1], rows[:, 1:]


def loss(program, weights, path):
    command = [program, "--eval", "--load", weights, "--val", path, "--batch", "4"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    found = re.search(r"^val_loss (\S+)", done.stdout, re.M)
    if done.returncode or not found:
        sys.exit((done.stderr.strip().splitlines() or [f"{program}: exit code {done.returncode}"])[-1])
    return float(found[1])


def by_position(weights, o):
    """{bin's first position: loss}"""
    T, words, tensors, shape = read_model(weights)
    inputs, targets = windows_of(o.data, words, T, o.windows)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(o.jobs) as pool:
        bare, paths = os.path.join(folder, "bare.safetensors"), []
        save_file(tensors, bare, shape)
        for low, high in bins(T):
            shown = np.full_like(targets, -1)
            shown[:, low:high] = targets[:, low:high]
            paths.append(os.path.join(folder, f"{low}.safetensors"))
            write_examples(paths[-1], {"vocab_size": shape["vocab_size"]}, inputs=inputs, targets=shown)
        return dict(zip((low for low, _ in bins(T)), pool.map(lambda path: loss(o.program, bare, path), paths)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+", help="checkpoints of equal T")
    parser.add_argument("--data", required=True, help="the text they were trained on")
    parser.add_argument("--windows", type=int, default=64, help="[64]")
    parser.add_argument("--jobs", type=int, default=1, help="evaluations at a time [1]")
    parser.add_argument("--program", default=os.path.join(ROOT, "train_sessa"), help="[./train_sessa]")
    parser.add_argument("--json", help="keep {checkpoint: {bin's first position: loss}}")
    o = parser.parse_args()
    if o.windows < 1 or o.jobs < 1:
        parser.error("--windows and --jobs take 1 or more")
    lengths = {read_model(path)[0] for path in o.weights}
    if len(lengths) > 1:
        parser.error("the checkpoints differ in T")
    found = {path: by_position(path, o) for path in o.weights}
    ends = dict(bins(lengths.pop()))
    print("| positions | " + " | ".join(os.path.basename(path).split(".")[0] for path in found) + " |")
    print("| --- |" + " --- |" * len(found))
    for low, high in ends.items():
        print(f"| {low:,}–{high - 1:,} | " + " | ".join(f"{losses[low]:.4f}" for losses in found.values()) + " |")
    if o.json:
        try:
            with open(o.json, "w") as file:
                json.dump(found, file, indent=1)
        except OSError as error:
            sys.exit(f"{o.json}: {error.strerror}")


if __name__ == "__main__":
    main()
