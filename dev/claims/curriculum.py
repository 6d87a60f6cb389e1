"""Diffuse recall, led there in stages: who matches keys at all, after how many steps, and how far from where
it was learned.

  dev/claims/curriculum.py --models sessa attention --seeds 1 2 3      # about 3 minutes a run on one CPU thread
  dev/claims/curriculum.py --first 1                                   # without stage 0
  dev/claims/curriculum.py --scales 0.5 1 2 --seeds 101                # the learning-rate sweep: every stage's rate times that
  dev/claims/curriculum.py --scales 0.5 1 2 --sweep 101 --jobs 8       # that, then five seeds at each model's best
  dev/claims/curriculum.py --table                                     # no training: the table of the runs that are there
  dev/claims/curriculum.py --plateau 4 4                               # pairs, queries: what can be had without matching keys

A stage starts from the weights of the one before:

  0  2 pairs, keys of one token, no noise      2  4 pairs, keys of three tokens, no noise
  1  2 pairs, keys of three tokens, no noise   3  4 pairs among noise, three quarters of it distractors

the last being claims.md's small setting. --setting large leads to that of the GPU's table, D 128, L 4: after
stage 2 come 8 and 16 pairs without noise, then 16 pairs among noise, 8 of them asked for.

The gate: a stage ends when its validation accuracy is --gate or more, and the next begins; one that has not
got there by its last step ends the run, "not matched". The last stage is trained to the end of its schedule
and tested at lags up to --far. A stage leaves a snapshot at every validation, and the next takes the first that
was at the gate, so that a stage ends at a step which depends on nothing but the run itself.

Folder runs/curriculum: data, one folder a run, its result.json (what is finished is not run again),
curriculum.md with the table.
"""
import argparse
import glob
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

import match

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

VOCAB = 147     # 3 marks, 16 key symbols, 128 values
EVERY = 250     # steps between two looks at the gate
ENVIRONMENT = {"OMP_NUM_THREADS": "1", **os.environ}


@dataclass
class Stage:
    pairs: int
    key_length: int
    lag: tuple
    train: int      # examples
    steps: int      # at most
    batch: int
    lr: float
    queries: int = 0    # as many as pairs

    def tokens(self):
        """Of the longest example."""
        queries = self.queries or self.pairs
        noise = self.lag[1] - (self.pairs + queries) * (self.key_length + 1) // 2 - 2
        return 3 + (self.pairs + queries) * (self.key_length + 1) + noise

    def data(self):
        return ["--pairs", self.pairs, "--queries", self.queries or self.pairs,
                "--key-length", self.key_length, "--shared", self.key_length - 1]


SMALL = [
    Stage(2, 1, (6, 6), 50000, 8000, 128, 5e-3),
    Stage(2, 3, (10, 10), 50000, 4000, 128, 4e-3),
    Stage(4, 3, (18, 18), 50000, 3000, 64, 3e-3),
    Stage(4, 3, (24, 64), 100000, 3000, 32, 2e-3),
]
LARGE = [
    Stage(2, 1, (6, 6), 50000, 8000, 128, 2e-3),
    Stage(2, 3, (10, 10), 50000, 4000, 128, 2e-3),
    Stage(4, 3, (18, 18), 50000, 4000, 128, 2e-3),
    Stage(8, 3, (34, 34), 100000, 4000, 128, 2e-3),
    Stage(16, 3, (66, 66), 100000, 6000, 128, 1e-3),
    Stage(16, 3, (64, 192), 100000, 8000, 128, 1e-3, queries=8),
]
SETTINGS = {"small": ((64, 2, 4), SMALL), "large": ((128, 4, 4), LARGE)}      # width, depth, heads of Sessa
# lags of the test sets and their sizes: the farther, the longer a text, and its attention grows with the square
TESTS = [((65, 256), 400), ((257, 512), 150), ((513, 1024), 100), ((1025, 2048), 50), ((2049, 4096), 30)]


def plateau(pairs, queries, symbols=128, repeat=False, n=20000):
    """Accuracy of who knows an example's values, strikes out those given, and matches no key: it says the commonest of
    those left, which is the best that can be done, for the order of the queries tells nothing."""
    random, hits = np.random.default_rng(0), 0
    for _ in range(n):
        values = random.integers(0, symbols, pairs)
        left = np.bincount(values, minlength=symbols)
        asked = random.integers(0, pairs, queries) if repeat else random.permutation(pairs)[:queries]
        for value in values[asked]:
            hits += left.argmax() == value
            left[value] -= not repeat
    return hits / n / queries


def call(command, o):
    """Its output. One line and exit code 1 if it fails."""
    command = [str(word) for word in command]
    if o.dry_run:
        print("$", " ".join(command))
        return ""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=ENVIRONMENT)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word said"])[-1]
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}: {said}")
    return done.stdout


def make_data(o):
    """({stage: prefix of its files}, [(path, lags) of the tests])"""
    prefixes, tests = {}, []
    script, extra = [sys.executable, os.path.join(ROOT, "data", "mqar.py")], ["--repeat"] if o.repeat else []
    for i, stage in enumerate(o.stages):
        prefixes[i] = os.path.join(o.folder, "data", f"stage{i}")
        if i >= o.first and not os.path.exists(prefixes[i] + "_val.safetensors"):
            call([*script, *stage.data(), *extra, "--lag", *stage.lag, "--train", o.train or stage.train, "--val", 400,
                  "--test", 0, "--prefix", prefixes[i]], o)
    for lags, n in TESTS:
        if lags[0] > o.far:
            continue
        prefix = os.path.join(o.folder, "data", f"far{lags[1]}")
        tests.append(prefix + "_test.safetensors")
        if not os.path.exists(tests[-1]):
            last = o.stages[-1]
            call([*script, *last.data(), *extra, "--lag", *last.lag, "--test-lag", *lags, "--train", 0, "--val", 0,
                  "--test", n, "--prefix", prefix], o)
    return prefixes, tests


def accuracies(log):
    """[(step, validation accuracy)] of a log, whole lines only; none if there is no such file."""
    if not os.path.exists(log):
        return []
    with open(log) as file:
        lines = [json.loads(line) for line in file if '"val_accuracy"' in line and line.endswith("\n")]
    return [(line["step"], line["val_accuracy"]) for line in lines]


def at_gate(log, gate):
    """The first step at which a log's validation accuracy is at the gate, or None."""
    return next((step for step, accuracy in accuracies(log) if accuracy >= gate), None)


def train_until(command, passed, o):
    """Runs the program until it ends, or until passed() is true, which ends it."""
    command = [str(word) for word in command]
    if o.dry_run:
        print("$", " ".join(command))
        return
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=ENVIRONMENT)
        stopped = False
        while process.poll() is None:
            if not stopped and passed():
                process.terminate()
                stopped = True
            time.sleep(0.1)
        if process.returncode and not stopped:
            said.seek(0)
            words = (said.read().strip().splitlines() or ["no word said"])[-1]
            sys.exit(f"{' '.join(command)}: exit code {process.returncode}: {words}")


def train_stage(i, stem, before, shape, seed, scale, prefixes, o):
    """(steps made, accuracy at the end, first step at which it was at the gate or None); the weights are in stem.safetensors."""
    stage, last = o.stages[i], i == len(o.stages) - 1
    steps, rate = min(stage.steps, o.steps or stage.steps), stage.lr * scale
    log, out = stem + ".jsonl", stem + ".safetensors"

    def snapshot(step):
        return f"{stem}.step{step}.safetensors"

    def passed():
        step = None if last else at_gate(log, o.gate)
        return step and os.path.exists(snapshot(step))

    for path in glob.glob(glob.escape(stem) + ".*"):        # of a run that was stopped
        os.remove(path)
    start = ["--load", before] if before else shape.options()
    train_until([o.program, "--data", prefixes[i] + "_train.safetensors", "--val", prefixes[i] + "_val.safetensors",
                 *start, "--seq", stage.tokens(), "--steps", steps, "--batch", stage.batch,
                 "--lr", rate, "--min-lr", rate / 10,
                 "--warmup", min(200, steps // 10), "--beta2", "0.95", "--seed", seed, "--out", out, "--log", log,
                 "--eval-every", EVERY, "--eval-batches", -(-400 // stage.batch), "--save-every", 1000000,
                 *(() if last else ("--keep-every", EVERY))], passed, o)
    if o.dry_run:
        return steps, 1.0, steps
    found, gate = dict(accuracies(log)), at_gate(log, o.gate)
    step = max(found) if last or not gate else gate
    if step < steps:    # it went on while the log was read
        os.replace(snapshot(step), out)
    for path in glob.glob(glob.escape(stem) + ".step*"):
        os.remove(path)
    return step, found[step], gate


def far_accuracy(weights, tests, o):
    """{bin's first lag: [accuracy, targets]}, over all the tests; and the accuracy on the first one, claims.md's."""
    from safetensors.numpy import load_file
    hits, counts, near = {}, {}, None
    for path in tests:
        output = call([o.program, "--eval", "--load", weights, "--val", path], o)
        if o.dry_run:
            return None, {}
        near = float(re.search(r"^val_accuracy (\S+)", output, re.M)[1]) if near is None else near
        lags = load_file(path)["lags"]
        for low, high, accuracy in re.findall(r"^lag (\d+) to (\d+) (\S+)$", output, re.M):
            n = int(((lags >= int(low)) & (lags <= int(high))).sum())
            hits[low] = hits.get(low, 0) + n * float(accuracy)
            counts[low] = counts.get(low, 0) + n
    return near, {low: [hits[low] / counts[low], counts[low]] for low in sorted(hits, key=int)}


def one_run(model, shape, seed, scale, prefixes, tests, o):
    """Trains and tests one model; the result is kept in its folder."""
    folder = os.path.join(o.folder, f"{model}_{seed}_{scale:g}_from{o.first}")
    result_path = os.path.join(folder, "result.json")
    if os.path.exists(result_path):
        return
    os.makedirs(folder, exist_ok=True)
    before, stages = None, []
    for i in range(o.first, len(o.stages)):
        stem = os.path.join(folder, f"stage{i}")
        steps, accuracy, passed = train_stage(i, stem, before, shape, seed, scale, prefixes, o)
        stages.append({"stage": i, "steps": steps, "accuracy": accuracy, "passed": passed})
        if not o.dry_run:
            print(f"{model}, seed {seed}, rates × {scale:g}, stage {i}: {steps} steps, accuracy {accuracy:.4f}", flush=True)
        before = stem + ".safetensors"
        if passed is None and i < len(o.stages) - 1:
            break
    result = {"model": model, "seed": seed, "scale": scale, "first": o.first, "gate": o.gate, "stages": stages}
    if stages[-1]["stage"] == len(o.stages) - 1:
        result["test"], result["by_lag"] = far_accuracy(before, tests, o)
    if not o.dry_run:
        with open(result_path, "w") as file:
            json.dump(result, file, indent=1)


def attempt(run):
    """Whether this run came to its end; if not, a line says why."""
    try:
        one_run(*run)
        return True
    except SystemExit as error:
        print(error, file=sys.stderr, flush=True)
        return False


def results(o):
    """Those of the folder's runs."""
    found = []
    for name in sorted(os.listdir(o.folder)):
        path = os.path.join(o.folder, name, "result.json")
        if os.path.exists(path):
            with open(path) as file:
                found.append(json.load(file))
    return found


def best_scale(model, o):
    """The factor with the highest accuracy in the last stage, mean over the sweep's seeds, where a run that did
    not come to it counts as 0; of equal ones the smallest."""
    of = {scale: [] for scale in sorted(o.scales)}
    for r in results(o):
        if r["model"] == model and r["seed"] in o.sweep and r["scale"] in of and r["first"] == o.first:
            of[r["scale"]].append(r["stages"][-1]["accuracy"] if "by_lag" in r else 0)
    return max(of, key=lambda scale: statistics.mean(of[scale] or [0]))


def mean_and_each(values, digits=3):
    values = [v for v in values if v is not None]
    if not values:
        return ""
    each = ", ".join(f"{v:.{digits}f}" for v in values)
    return each if len(values) == 1 else f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} ({each})"


def table(o):
    """One row a model, scale and first stage, over its seeds; those that stopped at a gate are counted, and in no mean."""
    groups = {}
    for r in results(o):
        groups.setdefault((r["model"], r["first"], r["scale"]), []).append(r)
    order = ["sessa", "attention", "mamba2", "nofeedback"]
    bins = sorted({low for rows in groups.values() for r in rows for low in r.get("by_lag", {}) if int(low) >= 64}, key=int)
    head = ["model", "stages", "rates ×", "seeds", "came to the last stage", "steps to it", "lags trained on", "test"]
    head += [f"lag {low} to {2 * int(low) - 1}" for low in bins]
    lines = [head, ["---"] * len(head)]
    for model, first, scale in sorted(groups, key=lambda k: (order.index(k[0]), k[1:])):
        rows = sorted(groups[model, first, scale], key=lambda r: r["seed"])
        done = [r for r in rows if "by_lag" in r]
        stopped = ", ".join(f"seed {r['seed']} at stage {r['stages'][-1]['stage']} with {r['stages'][-1]['accuracy']:.2f}"
                            for r in rows if "by_lag" not in r)
        line = [model, f"{first}–{len(o.stages) - 1}", f"{scale:g}", ", ".join(str(r["seed"]) for r in rows),
                f"{len(done)} of {len(rows)}" + (f" ({stopped})" if stopped else ""),
                ", ".join(str(sum(s["steps"] for s in r["stages"][:-1])) for r in done),
                mean_and_each([r["stages"][-1]["accuracy"] for r in done]), mean_and_each([r["test"] for r in done])]
        line += [mean_and_each([r["by_lag"].get(low, [None])[0] for r in done], 2) for low in bins]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sessa", "attention", "mamba2", "nofeedback"],
                        choices=("sessa", "attention", "mamba2", "nofeedback"), help="[all four]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="[1 2 3 4 5]")
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0], help="factors of the learning rates [1]")
    parser.add_argument("--sweep", nargs="+", type=int, metavar="SEED",
                        help="these seeds at all factors first, then --seeds at each model's best")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time [1]")
    parser.add_argument("--setting", choices=SETTINGS, default="small", help="[small]")
    parser.add_argument("--first", type=int, choices=(0, 1), default=0, help="the first stage [0]")
    parser.add_argument("--gate", type=float, default=0.95, help="accuracy that ends a stage [0.95]")
    parser.add_argument("--repeat", action="store_true", help="queries with replacement")
    parser.add_argument("--far", type=int, default=4096, help="longest lag of the tests [4096]")
    parser.add_argument("--steps", type=int, help="at most, of every stage: to try it out")
    parser.add_argument("--train", type=int, help="examples of every stage: to try it out")
    parser.add_argument("--program", default=os.path.join(ROOT, "train_sessa"), help="[./train_sessa]")
    parser.add_argument("--folder", help="[runs/curriculum, -large and -repeat after it as it is asked]")
    parser.add_argument("--table", action="store_true", help="only make the table again")
    parser.add_argument("--plateau", nargs=2, type=int, metavar=("PAIRS", "QUERIES"), help="print the accuracy without matching")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    o = parser.parse_args()
    if o.jobs < 1:
        parser.error("--jobs takes 1 or more")
    shape, o.stages = SETTINGS[o.setting]
    o.folder = o.folder or os.path.join(ROOT, "runs", "curriculum" + "-large" * (o.setting == "large") + "-repeat" * o.repeat)
    if o.plateau:
        print(f"{plateau(*o.plateau):.4f}, with --repeat {plateau(*o.plateau, repeat=True):.4f}")
        return
    if not o.table and not o.dry_run and not os.path.exists(o.program):
        sys.exit(f"{o.program} is not there: make {os.path.basename(o.program)}")
    os.makedirs(os.path.join(o.folder, "data"), exist_ok=True)
    complete = []   # of each run, whether it is
    if not o.table:
        prefixes, tests = make_data(o)
        shapes = dict(zip(("sessa", "attention", "mamba2", "nofeedback"),
                          (shape for _, shape in match.rows(VOCAB, match.Shape("sessa", *shape)))))

        def run_all(seeds, scales_of):      # the models side by side, should it be stopped early
            runs = [(model, shapes[model], seed, scale, prefixes, tests, o)
                    for seed in seeds for model in o.models for scale in scales_of(model)]
            with ThreadPoolExecutor(o.jobs) as pool:
                return list(pool.map(attempt, runs))

        if o.sweep:
            complete += run_all(o.sweep, lambda model: o.scales)
        complete += run_all(o.seeds, lambda model: [best_scale(model, o)] if o.sweep else o.scales)
    if not o.dry_run:
        text = table(o)
        with open(os.path.join(o.folder, "curriculum.md"), "w") as file:
            file.write(text)
        print("\n" + text)
    sys.exit(not all(complete))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped: the same command goes on with the runs that are not finished", file=sys.stderr)
        sys.exit(130)
