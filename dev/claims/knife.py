"""The knife: cuts one path of a trained model, in its file, without training; the same program then tells
what the path carried.

  dev/claims/knife.py sessa.best.safetensors --cut feedback 1 --out cut.safetensors
  ./train_sessa --load cut.safetensors --val far_test.safetensors --eval
  dev/claims/knife.py sessa.safetensors --try runs/curriculum/data/*_test.safetensors --json knife.json   # every cut, evaluated
  dev/claims/plot_recall.py knife.json --out knife.svg

Cuts, of a layer or of all layers (`all`), each exact, for what is set to zero is what the path multiplies by:

  feedback         γ_t = γ_max tanh(gamma_ctx ā_t + gamma_bias): both zero, so γ = 0 and s = f, attention alone
  even-feedback    q' = 0: every score is 0, and α_tj = 1/t for all j < t. Its gain stays: the path sums, and chooses nothing
  even-attention   q = 0: every score is 0, rotated or not, and position t attends to all j ≤ t alike

A trained model was never shown its cut self, so a loss says that the path is used, and not that it could not
be done without.
"""
import argparse
import json
import os
import re
import struct
import subprocess
import sys
import tempfile

import numpy as np

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
CUTS = {"feedback": ("gamma_ctx.weight", "gamma_bias"), "even-feedback": ("proj_fb.weight", "proj_fb.bias"),
        "even-attention": ("q_proj.weight", "q_proj.bias")}


class Checkpoint:
    """A safetensors file: its header and its bytes."""

    def __init__(self, path):
        try:
            with open(path, "rb") as file:
                raw = file.read()
            (n,) = struct.unpack("<Q", raw[:8])
            self.header, self.data = json.loads(raw[8:8 + n]), bytearray(raw[8 + n:])
            self.layers = 1 + max(int(m[1]) for m in (re.match(r"layers\.(\d+)\.mixer\.", name) for name in self.header) if m)
        except OSError as error:
            sys.exit(f"{path}: {error.strerror}")
        except (struct.error, ValueError, KeyError):
            sys.exit(f"{path}: not a checkpoint of train_sessa")

    def cut(self, kind, layer):
        """A copy of its bytes with that path cut, in one layer or in all (layer None). None if the mixer has no such path."""
        data = bytearray(self.data)
        for l in range(self.layers) if layer is None else (layer,):
            for name in CUTS[kind]:
                tensor = self.header.get(f"layers.{l}.mixer.{name}")
                if tensor is None:
                    return None
                begin, end = tensor["data_offsets"]
                data[begin:end] = bytes(end - begin)
        return data

    def write(self, path, data):
        text = json.dumps(self.header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        try:
            with open(path, "wb") as file:
                file.write(struct.pack("<Q", len(text)) + text + data)
        except OSError as error:
            sys.exit(f"{path}: {error.strerror}")


def evaluate(program, weights, sets):
    """{"accuracy" and "loss" of each set, in order; "by_lag": {bin's first lag: [accuracy, targets]} of all sets together}"""
    from safetensors.numpy import load_file
    out, hits, counts = {"accuracy": [], "loss": []}, {}, {}
    for path in sets:
        command = [program, "--eval", "--load", weights, "--val", path]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as error:
            sys.exit(f"{program}: {error.strerror}")
        if done.returncode:
            sys.exit((done.stderr.strip().splitlines() or [f"{program}: exit code {done.returncode}"])[-1])
        for key, name in (("loss", "val_loss"), ("accuracy", "val_accuracy")):
            found = re.search(rf"^{name} (\S+)", done.stdout, re.M)
            out[key].append(float(found[1]) if found else None)
        lags = load_file(path).get("lags", np.zeros(1)) if path.endswith(".safetensors") else np.zeros(1)
        for low, high, accuracy in re.findall(r"^lag (\d+) to (\d+) (\S+)$", done.stdout, re.M):
            n = int(((lags >= int(low)) & (lags <= int(high))).sum())       # the program prints no counts
            hits[low] = hits.get(low, 0) + n * float(accuracy)
            counts[low] = counts.get(low, 0) + n
    out["by_lag"] = {low: [hits[low] / counts[low], counts[low]] for low in sorted(hits, key=int)}
    return out


def try_all(checkpoint, o):
    """{name of the cut: what evaluate says}, printed as a table on the way."""
    tries = [("as it is", checkpoint.data)]
    for kind in CUTS:
        tries += [(f"{kind} {l}", checkpoint.cut(kind, l)) for l in range(checkpoint.layers)]
        tries += [(f"{kind} all", checkpoint.cut(kind, None))] if checkpoint.layers > 1 else []
    results = {}
    print("| cut | " + " | ".join(os.path.basename(path).removesuffix(".safetensors") for path in o.sets) + " |")
    print("| --- |" + " --- |" * len(o.sets))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "cut.safetensors")
        for name, data in tries:
            if data is None:
                continue
            checkpoint.write(path, data)
            results[name] = evaluate(o.program, path, o.sets)
            shown = [f"loss {loss:.3f}" if accuracy is None else f"{accuracy:.3f}"
                     for accuracy, loss in zip(results[name]["accuracy"], results[name]["loss"])]
            print(f"| {name} | " + " | ".join(shown) + " |", flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="a checkpoint, or a run's file")
    parser.add_argument("--cut", nargs=2, action="append", default=[], metavar=("KIND", "LAYER"),
                        help="one cut; may be given again")
    parser.add_argument("--out", help="the file with the cuts")
    parser.add_argument("--try", nargs="+", dest="sets", metavar="SET", help="evaluate every single cut on these")
    parser.add_argument("--json", help="keep what --try found, for plot_recall.py")
    parser.add_argument("--program", default=os.path.join(ROOT, "train_sessa"), help="[./train_sessa]")
    o = parser.parse_args()
    if not o.sets and not (o.cut and o.out):
        parser.error("give --cut and --out, or --try")
    if o.out and os.path.exists(o.out):
        parser.error(f"{o.out} is there already")
    checkpoint = Checkpoint(o.weights)
    for kind, layer in o.cut:
        if kind not in CUTS or not (layer == "all" or layer.isdigit() and int(layer) < checkpoint.layers):
            parser.error(f"--cut takes {', '.join(CUTS)}, and a layer from 0 to {checkpoint.layers - 1} or all")
        data = checkpoint.cut(kind, None if layer == "all" else int(layer))
        if data is None:
            sys.exit(f"{o.weights}: its mixer has no such path: {kind}")
        checkpoint.data = data
    if o.out:
        checkpoint.write(o.out, checkpoint.data)
    if o.sets:
        results = try_all(checkpoint, o)
        if o.json:
            with open(o.json, "w") as file:
                json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
