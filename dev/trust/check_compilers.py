"""What stays the same when the compiler, the processor or the number of threads changes.

    python3 dev/trust/check_compilers.py [--steps 100] [--also NAME=PROGRAM ...]

Builds train_sessa.c in several ways and trains the same small models with each; --also adds what another compiler built.
One binary must write the same bytes for any number of threads, of a shape, too, that fills no vector. Two binaries round
differently: their losses drift apart, slowly; the largest relative difference after 1, 10 and --steps steps is printed and
held against a bound.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
FAST = ["-ffast-math", "-fno-finite-math-only", "-Wno-unknown-pragmas"]
BUILDS = {"gcc -O3 native": ["gcc", "-O3", "-march=native", "-fopenmp"],
          "gcc -O3 x86-64-v3": ["gcc", "-O3", "-march=x86-64-v3", "-fopenmp"],
          "gcc -O3 x86-64": ["gcc", "-O3", "-march=x86-64", "-fopenmp"],
          "gcc -O1 native": ["gcc", "-O1", "-march=native", "-fopenmp"],
          "gcc without OpenMP": ["gcc", "-O3", "-march=native"],
          "clang -O3 native": ["clang", "-O3", "-march=native", "-fopenmp"],
          "clang -O3 x86-64-v3": ["clang", "-O3", "-march=x86-64-v3", "-fopenmp"],
          "gcc float64": ["gcc", "-O3", "-march=native", "-fopenmp", "-DREAL=double"]}
BOUNDS = {1: 5e-8, 10: 2e-7, None: 1e-6}  # of relative differences of the loss after so many steps; None: at the end
THREADS = ("1", "2", "3", "4", "7")
EVEN = ["--dim", "64", "--heads", "2", "--seq", "40", "--batch", "4"]
ODD = ["--dim", "62", "--heads", "1", "--seq", "41", "--batch", "3"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--also", action="append", default=[], metavar="NAME=PROGRAM")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        programs = {}
        for name, command in BUILDS.items():
            if shutil.which(command[0]):
                programs[name] = os.path.join(folder, name.replace(" ", "_"))
                subprocess.run(command + FAST + [os.path.join(ROOT, "train_sessa.c"), "-o", programs[name], "-lm"], check=True)
            else:
                print("%s: not here, left out" % command[0])

        several = ["gcc -O3 native", "clang -O3 native"] # those that are run with other numbers of threads
        for also in options.also:
            name, program = also.split("=", 1)
            programs[name] = os.path.abspath(program)
            several.append(name)

        def train(name, mixer, threads, shape=EVEN, steps=options.steps):
            """The losses, and the bytes of the run."""
            head = ["--head-dim", str(int(shape[1]) // 2)] if mixer == "mamba2" and shape is ODD else []
            subprocess.run([programs[name], "--data", os.path.join(ROOT, "train_sessa.c"), "--mixer", mixer, "--layers", "2",
                            *shape, *head, "--steps", str(steps), "--warmup", "20", "--dropout", "0.1", "--eval-every", "0", "--save-every", "100000",
                            "--log", folder + "/log", "--out", folder + "/out", "--overwrite"],
                           check=True, stdout=subprocess.DEVNULL, env=dict(os.environ, OMP_NUM_THREADS=threads, OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="1000"))
            with open(folder + "/log") as log, open(folder + "/out", "rb") as out:
                return [json.loads(line)["train_loss"] for line in log], out.read()

        for mixer in ("sessa", "attention", "mamba2"):
            reference, _ = train("gcc -O3 native", mixer, "2")
            for name in programs:
                losses, content = train(name, mixer, "1")
                same = []
                if name in several:
                    same = [train(name, mixer, threads)[1] == content for threads in THREADS[1:]]
                    odd = [train(name, mixer, threads, ODD, 6)[1] for threads in THREADS[:3]]
                    same.append(odd[0] == odd[1] == odd[2])
                drift, ok, worst = [], all(same), 0
                for i, (x, y) in enumerate(zip(losses, reference)):
                    worst = max(worst, abs(x - y) / y)
                    steps = i + 1
                    if steps in BOUNDS or steps == options.steps:
                        drift.append("%.1e after %d" % (worst, steps))
                        ok &= worst <= BOUNDS.get(steps, BOUNDS[None])
                print("%-10s %-20s losses off by %s%s  %s" % (mixer, name, ", ".join(drift), "; the same bytes with 1, 2, 3, 4 and 7 threads" if same and all(same) else
                                                            "; OTHER BYTES with other threads" if same else "", "ok" if ok else "FAIL"), flush=True)
                failed += not ok
    print("%d failed" % failed)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
