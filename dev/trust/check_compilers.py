"""What stays the same when the compiler, the processor or the number of threads changes.

    python3 dev/trust/check_compilers.py [--steps 100] [--also NAME=PROGRAM ...]

Builds train_sessa.c in several ways and trains the same small models with each; --also adds what another compiler built.
One binary must write the same bytes for any number of threads, of a shape, too, that fills no vector. Two binaries
round differently: their losses drift apart, slowly. The largest relative difference from the losses in float64 after
1, 10 and --steps steps is printed and held against a bound, by the median of three seeds: AdamW's first step is
lr·g / (|g| + 1e-8), so a single weight whose gradient is no larger than its rounding may go either way, and the losses of such a run lie
1e-6 apart without a fault. About one run in thirty has such a weight.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
FAST = ["-ffast-math", "-fno-finite-math-only", "-Wno-unknown-pragmas"]
REFERENCE = "gcc float64"
BUILDS = {REFERENCE: ["gcc", "-O3", "-march=native", "-fopenmp", "-DREAL=double"],
          "gcc -O3 native": ["gcc", "-O3", "-march=native", "-fopenmp"],
          "gcc -O3 x86-64-v3": ["gcc", "-O3", "-march=x86-64-v3", "-fopenmp"],
          "gcc -O3 x86-64": ["gcc", "-O3", "-march=x86-64", "-fopenmp"],
          "gcc -O1 native": ["gcc", "-O1", "-march=native", "-fopenmp"],
          "gcc without OpenMP": ["gcc", "-O3", "-march=native"],
          "clang -O3 native": ["clang", "-O3", "-march=native", "-fopenmp"],
          "clang -O3 x86-64-v3": ["clang", "-O3", "-march=x86-64-v3", "-fopenmp"]}
SEVERAL = ["gcc -O3 native", "clang -O3 native"]  # those that are run with other numbers of threads
BOUNDS = {1: 2e-8, 10: 1e-7, None: 1e-6}  # of the loss after so many steps; None: at the end
SEEDS = (1, 2, 3)
THREADS = ("1", "2", "3", "4", "7")
THREADS_STEPS = 6
EVEN = ["--dim", "64", "--heads", "2", "--seq", "40", "--batch", "4"]
ODD = ["--dim", "62", "--heads", "1", "--seq", "41", "--batch", "3"]


def build(folder, also):
    """The programs by their names."""
    programs, building = {}, []
    for name, command in BUILDS.items():
        if not shutil.which(command[0]):
            print("%s: not here, left out" % name)
            continue
        programs[name] = os.path.join(folder, name.replace(" ", "_"))
        building.append(command + FAST + [os.path.join(ROOT, "train_sessa.c"), "-o", programs[name], "-lm"])
    with ThreadPoolExecutor(2) as two:  # at a time
        list(two.map(lambda command: subprocess.run(command, check=True), building))
    for pair in also:
        name, program = pair.split("=", 1)
        programs[name] = os.path.abspath(program)
    return programs


def write_text(path):
    """Words drawn with repetition, the same on every machine."""
    draw = random.Random(1)
    words = ["".join(chr(97 + int(26 * draw.random())) for _ in range(1 + int(8 * draw.random()))) for _ in range(400)]
    with open(path, "w") as text:
        for _ in range(12000):
            text.write(words[int(len(words) * draw.random() ** 2)] + " ")


def train(folder, program, mixer, threads, shape, steps, seed=1):
    """The losses, and the bytes of the run."""
    command = [program, "--data", folder + "/text", "--mixer", mixer, "--layers", "2", *shape]
    if mixer == "mamba2" and shape is ODD:
        command += ["--head-dim", "31"]
    command += ["--steps", str(steps), "--warmup", "20", "--dropout", "0.1", "--seed", str(seed)]
    command += ["--eval-every", "0", "--save-every", "100000"]
    command += ["--log", folder + "/log", "--out", folder + "/out", "--overwrite"]
    environment = dict(os.environ, OMP_NUM_THREADS=threads, OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="1000")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    with open(folder + "/log") as log, open(folder + "/out", "rb") as out:
        return [json.loads(line)["train_loss"] for line in log], out.read()


def drift(losses, reference):
    """The largest relative difference up to each step."""
    worst = [0.0]
    for ours, theirs in zip(losses, reference):
        worst.append(max(worst[-1], abs(ours - theirs) / theirs))
    return worst[1:]


def same_bytes(folder, program, mixer):
    """Whether the number of threads changes no byte, of both shapes."""
    for shape in (EVEN, ODD):
        contents = [train(folder, program, mixer, threads, shape, THREADS_STEPS)[1] for threads in THREADS]
        if contents.count(contents[0]) != len(contents):
            return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--also", action="append", default=[], metavar="NAME=PROGRAM")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        write_text(folder + "/text")
        programs = build(folder, options.also)
        several = SEVERAL + [pair.split("=", 1)[0] for pair in options.also]
        for mixer in ("sessa", "attention", "mamba2"):
            reference = {}
            for name, program in programs.items():
                drifts = []
                for seed in SEEDS:
                    losses, _ = train(folder, program, mixer, "1", EVEN, options.steps, seed)
                    reference.setdefault(seed, losses)  # the first build's
                    drifts.append(drift(losses, reference[seed]))
                told, ok = [], True
                for step in sorted({1, 10, options.steps}):
                    if step <= options.steps:
                        middle = statistics.median(one[step - 1] for one in drifts)
                        told.append("%.1e after %d" % (middle, step))
                        ok &= middle <= BOUNDS.get(step, BOUNDS[None])
                line = "%-10s %-20s losses off by %s" % (mixer, name, ", ".join(told))
                if name in several:
                    same = same_bytes(folder, program, mixer)
                    ok &= same
                    line += "; the same bytes" if same else "; OTHER BYTES"
                    line += " with 1, 2, 3, 4 and 7 threads"
                print("%s  %s" % (line, "ok" if ok else "FAIL"), flush=True)
                failed += not ok
    print("%d failed" % failed)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
