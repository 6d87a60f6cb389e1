"""The mean of several checkpoints' weights, as one checkpoint: of the snapshots that a run leaves
(--keep-every), say.

  ./train_sessa --steps 2000 --keep-every 100 --out run.safetensors
  dev/claims/average.py run.step*.safetensors --steps 1000 2000 --out averaged.safetensors
  ./train_sessa --load averaged.safetensors --eval

θ̄ = (θ_1 + … + θ_n) / n, of every weight, summed in float64. An optimiser that goes on at a large rate
wanders about a minimum; the mean of where it was lies nearer to it than any of these places. That holds along
one run, and not between runs.
"""
import argparse
import re
import sys

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

# of the metadata: what tells the model's shape, and what it was trained on. The rest is a run's state
SHAPE = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "gamma_max", "no_rope",
         "mixer", "mamba_head_dim", "mamba_state_dim")
DATA = ("data", "data_format", "val", "data_content", "val_content")


def step_of(path):
    """Of a snapshot's name; -1 if it has none."""
    found = re.search(r"\.step(\d+)\.safetensors$", path)
    return int(found[1]) if found else -1


def average(paths):
    """({name: tensor}, metadata) of the mean. The optimiser's moments, exp_avg and exp_avg_sq, are left out."""
    sums, told = {}, None
    for path in paths:
        try:
            with safe_open(path, "np") as file:
                names = [name for name in file.keys() if not name.startswith("exp_avg")]
                tensors = {name: file.get_tensor(name) for name in names}
                metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            sys.exit(f"{path}: {error}")
        if told is None:
            told = {key: metadata[key] for key in SHAPE + DATA if key in metadata}
            sums = {name: np.array(x, np.float64) if x.dtype == np.float32 else x for name, x in tensors.items()}
            continue
        shapes = {name: x.shape for name, x in tensors.items()}
        if shapes != {name: x.shape for name, x in sums.items()}:
            sys.exit(f"{path}: not of the same model as {paths[0]}")
        for name, x in tensors.items():
            if x.dtype == np.float32:
                sums[name] += x
            elif not np.array_equal(x, sums[name]):         # the words
                sys.exit(f"{path}: {name} differs from that of {paths[0]}")
    means = {name: np.asarray(x / len(paths), np.float32) if x.dtype == np.float64 else x for name, x in sums.items()}
    return means, told


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="checkpoints")
    parser.add_argument("--steps", nargs=2, type=int, metavar=("FIRST", "LAST"),
                        help="only the snapshots of these steps")
    parser.add_argument("--out", required=True)
    o = parser.parse_args()
    files = [path for path in o.files if not o.steps or o.steps[0] <= step_of(path) <= o.steps[1]]
    if not files:
        parser.error(f"none of the files is a snapshot of step {o.steps[0]} to {o.steps[1]}")
    tensors, metadata = average(files)
    try:
        save_file(tensors, o.out, metadata)
    except (OSError, SafetensorError) as error:
        sys.exit(f"{o.out}: {error}")
    print(f"{o.out}: the mean of {len(files)} checkpoints")


if __name__ == "__main__":
    main()
