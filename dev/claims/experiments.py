"""The paper's comparisons, run again: Sessa, a Transformer and Mamba-2 with equally many parameters, and
Sessa without its feedback path, on the same data for as many steps, two seeds each. One entry a table; it
writes FOLDER/NAME.md, and the curves beside it.

  dev/claims/experiments.py symbolsoup mqar --quick            # minutes on a CPU: shows that everything works, and no more
  dev/claims/experiments.py mqar --small                       # an hour or so on a CPU: small models that do learn
  dev/claims/experiments.py symbolsoup                         # the real thing, on a GPU
  dev/claims/experiments.py mqar --models mamba2 --seeds 1337 --program ./train_sessacu
  dev/claims/experiments.py symbolsoup-200k --models mamba2 --seeds 101 --lr 2e-3     # one point of a sweep; its runs have names of their own
  dev/claims/experiments.py symbolsoup-200k --jobs 3           # three runs at a time
  dev/claims/experiments.py tinyshakespeare-10m --models sessa --seeds 1 2 3 --set min-lr=1e-3 --average 1000-2000
  dev/claims/experiments.py tinyshakespeare --dry-run          # prints the commands

Entries: symbolsoup (accuracy on its test set), symbolsoup-200k (the same with 200,000 examples),
symbolsoup-long (100,000 of 900 to 1,024 tokens), mqar (accuracy by lag, up to four times the lags trained
on), simplestories (perplexity), tinyshakespeare and tinyshakespeare-10m (validation loss). Data that is not
there is made or fetched by the scripts of data/. Runs are kept in FOLDER: one that is finished is not run
again, one that was stopped goes on, and --table makes the tables of those that are finished. The programs are
built with make.

--average A-B …: with the mean of a run's snapshots of the steps A to B (dev/claims/average.py) evaluated
beside its best weights; the snapshots, one every --keep-every steps, are deleted then.
"""
import argparse
import glob
import json
import math
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import match

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.normpath(os.path.join(HERE, "..", ".."))

# lines behind SymbolSoup's curves: what can be had by whom (dev/claims/soup.py)
LADDER = (("0.447", "pairs of the text"), ("0.607", "blocks apart, letters"), ("0.791", "pairs"), ("0.820", "best possible"))

# (width, depth, heads of Sessa), vocabulary, how the data is made, files, options of every run, what is measured
ENTRIES = {
    "symbolsoup": {
        "metric": "accuracy", "vocab": 43, "real": (256, 4, 4), "quick": (32, 2, 2), "levels": LADDER,
        "make": {"real": ["symbolsoup.py"], "quick": ["symbolsoup.py", "--train", "600", "--val", "100", "--test", "200"]},
        "options": {
            "real": {"steps": 4368, "batch": 64, "lr": 3e-4, "warmup": 200, "beta2": 0.95, "dropout": 0.2, "eval-every": 312, "eval-batches": 32},
            "quick": {"steps": 60, "batch": 8, "lr": 1e-3, "warmup": 10, "eval-every": 30, "eval-batches": 4}}},
    "symbolsoup-200k": {
        "metric": "accuracy", "vocab": 43, "real": (256, 4, 4), "quick": (32, 2, 2), "levels": LADDER,
        "make": {"real": ["symbolsoup.py", "--train", "200000", "--val", "3200", "--test", "8000", "--seed", "11"],
                 "quick": ["symbolsoup.py", "--train", "600", "--val", "100", "--test", "200", "--seed", "11"]},
        "options": {
            "real": {"steps": 8000, "batch": 64, "lr": 5e-4, "warmup": 200, "beta2": 0.95, "eval-every": 500, "eval-batches": 10},
            "quick": {"steps": 60, "batch": 8, "lr": 1e-3, "warmup": 10, "eval-every": 30, "eval-batches": 4}}},
    "symbolsoup-long": {
        "metric": "accuracy", "vocab": 43, "real": (256, 4, 4), "quick": (32, 2, 2),
        "levels": (("0.773", "blocks apart, letters"), ("0.894", "pairs"), ("0.911", "best possible")),
        "make": {"real": ["symbolsoup.py", "--train", "100000", "--val", "3200", "--test", "8000", "--seed", "21",
                          "--min-tokens", "900", "--max-tokens", "1024"],
                 "quick": ["symbolsoup.py", "--train", "300", "--val", "50", "--test", "100", "--seed", "21",
                           "--min-tokens", "900", "--max-tokens", "1024"]},
        "options": {
            "real": {"steps": 5000, "batch": 64, "lr": 5e-4, "warmup": 200, "beta2": 0.95, "eval-every": 500, "eval-batches": 10},
            "quick": {"steps": 20, "batch": 4, "lr": 1e-3, "warmup": 10, "eval-every": 10, "eval-batches": 4}}},
    "mqar": {
        "metric": "lag", "vocab": 147, "real": (128, 4, 4), "small": (64, 2, 4), "quick": (32, 2, 2),
        "make": {"real": ["mqar.py", "--train", "100000"],
                 "small": ["mqar.py", "--train", "20000", "--val", "400", "--test", "400", "--pairs", "4", "--queries", "4", "--lag", "24", "64",
                           "--test-lag", "65", "256"],
                 "quick": ["mqar.py", "--train", "600", "--val", "100", "--test", "100", "--pairs", "4", "--queries", "4", "--lag", "24", "64",
                           "--test-lag", "65", "256"]},
        "options": {
            "real": {"steps": 8000, "batch": 128, "lr": 1e-3, "warmup": 500, "beta2": 0.99, "eval-every": 1000, "eval-batches": 8},
            "small": {"steps": 6000, "batch": 32, "lr": 2e-3, "warmup": 200, "eval-every": 500, "eval-batches": 8},
            "quick": {"steps": 100, "batch": 8, "lr": 2e-3, "warmup": 10, "eval-every": 50, "eval-batches": 4}}},
    "simplestories": {
        "metric": "perplexity", "vocab": 4096, "real": (512, 8, 8), "quick": (64, 2, 4),
        "make": {"real": ["simplestories.py"], "quick": ["simplestories.py"]}, "suffix": "bin",
        "options": {
            "real": {"seq": 512, "steps": 6000, "batch": 64, "lr": 1e-3, "warmup": 300, "beta2": 0.95, "eval-every": 500, "eval-batches": 16},
            "quick": {"seq": 64, "steps": 100, "batch": 8, "lr": 2e-3, "warmup": 10, "eval-every": 50, "eval-batches": 4}}},
    "tinyshakespeare": {
        "metric": "loss", "vocab": 65, "real": (128, 5, 4), "quick": (32, 2, 2), "suffix": "txt",
        "make": {"real": ["tinyshakespeare.sh"], "quick": ["tinyshakespeare.sh"]},
        "options": {"real": {"steps": 2000}, "quick": {"steps": 100, "warmup": 10, "eval-every": 50}}},
    "tinyshakespeare-10m": {
        "metric": "loss", "vocab": 65, "real": (384, 8, 6), "quick": (32, 2, 2), "suffix": "txt",
        "make": {"real": ["tinyshakespeare.sh"], "quick": ["tinyshakespeare.sh"]},
        "options": {
            "real": {"seq": 256, "steps": 2000, "batch": 64, "lr": 1e-3, "min-lr": 1e-5, "warmup": 100, "beta2": 0.95,
                     "weight-decay": 1.7, "dropout": 0.3, "eval-every": 100, "save-every": 1000},
            "quick": {"steps": 100, "warmup": 10, "dropout": 0.1, "eval-every": 50}}},
}


def call(command, dry):
    """The standard output of a command that must succeed. Its error stays one line."""
    print("$", " ".join(command), flush=True)
    if dry:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['no word said'])[-1]}")
    return done.stdout


def data_files(name, entry, setting, folder, dry):
    """{split: path}, made if they are not there."""
    suffix = entry.get("suffix", "safetensors")
    script = entry["make"][setting]
    if suffix == "txt":
        paths = {"train": os.path.join(ROOT, "data", "tinyshakespeare.txt")}
    else:   # what the smaller settings make differs, so it lies elsewhere
        prefix = os.path.join(os.path.join(ROOT, "data") if setting == "real" else folder, name)
        paths = {split: f"{prefix}_{split}.{suffix}" for split in ("train", "val") + (("test",) if suffix == "safetensors" else ())}
        script = script + ["--prefix", prefix]
    if not all(os.path.exists(path) for path in paths.values()):
        runner = "sh" if script[0].endswith(".sh") else sys.executable
        call([runner, os.path.join(ROOT, "data", script[0]), *script[1:]], dry)
    return paths


def log_lines(path):
    """The whole lines of a log; none if there is no such file."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def train(stem, shape, seed, data, options, o):
    """Trains one model with one seed, unless that is done: the log's lines."""
    log, out = stem + ".jsonl", stem + ".safetensors"
    lines = log_lines(log)
    watching = {key: value for key, value in options.items() if key.startswith(("eval", "save"))}
    if o.average:
        watching["keep-every"] = o.keep_every
    told = [word for key, value in watching.items() for word in ("--" + key, str(value))]
    if (not lines or lines[-1]["step"] < options["steps"]) and not o.table:
        if lines and os.path.exists(out):
            command = [o.program, "--resume", out, "--log", log, *told]     # all else is in the file
        else:
            command = [o.program, "--data", data["train"], *(("--val", data["val"]) if "val" in data else ()), *shape.options()]
            settings = {key: value for key, value in options.items() if key not in watching}
            command += [word for key, value in settings.items() for word in ("--" + key, str(value))]
            command += [*told, "--seed", str(seed), "--log", log, "--out", out, "--overwrite"]
        call(command, o.dry_run)
        lines = log_lines(log)
    return lines


def scores(output):
    """{measure: value} of what --eval prints."""
    return {name: float(x) for name, x in re.findall(r"^(val_loss|val_accuracy|lag \d+ to \d+) (\S+)$", output, re.M)}


def evaluate(stem, data, o):
    """{measure: value} of the best weights on the test set; kept beside them."""
    path = stem + ".test.json"
    if os.path.exists(path) and (o.table or os.path.getmtime(path) >= os.path.getmtime(stem + ".best.safetensors")):
        with open(path) as file:
            return json.load(file)
    found = scores(call([o.program, "--eval", "--load", stem + ".best.safetensors", "--val", data["test"]], o.dry_run))
    if not o.dry_run:
        with open(path, "w") as file:
            json.dump(found, file)
    return found


def averages(stem, data, o):
    """{"A-B": validation loss of the mean of the run's snapshots of these steps}; kept beside it, the snapshots
    are deleted."""
    path = stem + ".average.json"
    if os.path.exists(path):
        with open(path) as file:
            return json.load(file)
    found, out, snapshots = {}, stem + ".averaged.safetensors", glob.glob(glob.escape(stem) + ".step*.safetensors")
    where = ("--val", data["val"]) if "val" in data else ("--data", data["train"])
    for steps in o.average:
        script = os.path.join(HERE, "average.py")
        call([sys.executable, script, *snapshots, "--steps", *steps.split("-"), "--out", out], False)
        found[steps] = scores(call([o.program, "--eval", "--load", out, *where], False))["val_loss"]
    with open(path, "w") as file:
        json.dump(found, file)
    for snapshot in snapshots:
        os.remove(snapshot)
    return found


def spread(values, digits=4):
    """Two seeds as their mean and both values; one as it is."""
    values = [v for v in values if v is not None and not math.isnan(v)]
    if not values:
        return ""
    parts = ", ".join(f"{v:.{digits}f}" for v in values)
    return parts if len(values) == 1 else f"{statistics.mean(values):.{digits}f} ({parts})"


def run_entry(name, entry, o):
    """Whether all of its runs have come to their end. Of those that have, the table is made."""
    setting = "quick" if o.quick else "small" if o.small else "real"
    if setting not in entry:
        sys.exit(f"{name} has no {setting} setting")
    folder = os.path.join(o.folder, setting)
    os.makedirs(folder, exist_ok=True)
    data = data_files(name, entry, setting, folder, o.dry_run)
    options = dict(entry["options"][setting])
    if o.steps:
        options["steps"] = o.steps
    if o.batch:
        options["batch"] = o.batch
    tag = ""
    if o.lr:
        options["lr"], tag = o.lr, f"_lr{o.lr:g}"
    if o.warmup is not None:
        options["warmup"], tag = o.warmup, f"{tag}_warmup{o.warmup}"
    for word in o.set:
        key, value = word.split("=", 1)
        options[key], tag = value, f"{tag}_{key}{value}"
    D, L, H = entry[setting]
    rows_of = []    # (title, shape, [a run of each seed])
    for title, shape in match.rows(entry["vocab"], match.Shape("sessa", D, L, H), state_dim=16 if o.quick else 64):
        key = "nofeedback" if title.endswith("feedback") else shape.mixer
        if not o.models or key in o.models:
            runs = [(os.path.join(folder, f"{name}_{key}_{seed}{tag}"), shape, seed) for seed in o.seeds]
            rows_of.append((title, shape, runs))

    def one(run):
        """(the log's lines, the test, the averages), or None if it failed or, with --table, has not ended."""
        stem, shape, seed = run
        try:
            lines = train(stem, shape, seed, data, options, o)
            if not o.dry_run and (not lines or lines[-1]["step"] < int(options["steps"])):
                return None
            test = evaluate(stem, data, o) if "test" in data else {}
            return lines, test, averages(stem, data, o) if o.average and not o.dry_run else {}
        except SystemExit as error:
            print(error, file=sys.stderr)
            return None

    # the models side by side, should it be stopped early
    runs = [run for of_seed in zip(*(runs for _, _, runs in rows_of)) for run in of_seed]
    with ThreadPoolExecutor(o.jobs) as pool:
        done = dict(zip((stem for stem, _, _ in runs), pool.map(one, runs)))
    if o.dry_run or not any(done.values()):
        return all(done.values())
    results, logs, columns = [], [], []
    for title, shape, runs in rows_of:
        last, tests, means = [], [], []
        for stem, _, seed in runs:
            if done[stem]:
                lines, test, mean = done[stem]
                last.append({**lines[-1], "best": min(line["val_loss"] for line in lines if "val_loss" in line)})
                logs.append((stem + ".jsonl", f"{title}, {seed}"))
                tests.append(test)
                means.append(mean)
        results.append((title, shape, last, tests, means))
        columns = sorted({lag for test in tests for lag in test if lag.startswith("lag")} | set(columns), key=lambda lag: int(lag.split()[1]))

    metric = entry["metric"]
    head = ["model", "shape", "parameters"]
    head += {"accuracy": ["test accuracy", "test loss"], "lag": ["validation accuracy", "test accuracy", *columns],
             "perplexity": ["validation perplexity"], "loss": ["validation loss"]}[metric]
    head += ["validation loss at the end"] + [f"the mean of steps {steps}" for steps in o.average] + ["tokens/s"]
    rows = [head, ["---"] * len(head)]
    for title, shape, last, tests, means in results:
        row = [title, f"D {shape.dim}, L {shape.layers}" + (f", w {shape.head_dim}" if shape.head_dim else f", H {shape.heads}"),
               f"{match.parameters(shape, entry['vocab']):,}"]
        best = [line["best"] for line in last]
        if metric == "lag":     # of the lags trained on
            row.append(spread([line.get("val_accuracy") for line in last]))
        if metric in ("accuracy", "lag"):
            row.append(spread([test.get("val_accuracy") for test in tests]))
            row += [spread([test.get(name) for test in tests], 3) for name in (columns if metric == "lag" else ["val_loss"])]
        else:
            row.append(spread([math.exp(x) for x in best], 3) if metric == "perplexity" else spread(best))
        row.append(spread([line["val_loss"] for line in last]))
        row += [spread([mean.get(steps) for mean in means]) for steps in o.average]
        row.append(f"{statistics.median(line['tok_per_s'] or 0 for line in last):,.0f}" if last else "")
        rows.append(row)
    told = " ".join(f"--{key} {value}" for key, value in options.items())
    seeds = " and ".join(map(str, o.seeds))
    text = f"### {name}\n\nSeeds {seeds}: mean (each); the weights of the lowest validation loss. `{told}`\n\n"
    text += "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
    path = os.path.join(folder, name + tag + ".md")
    with open(path, "w") as file:
        file.write(text)
    print("\n" + text)
    try:
        import matplotlib   # noqa: F401  the picture is an extra
    except ImportError:
        print("no curves: matplotlib is not installed")
        return all(done.values())
    call([sys.executable, os.path.join(HERE, "plot_training.py"), *(path for path, _ in logs), "--names",
          *(label for _, label in logs), *(word for level in entry.get("levels", ()) for word in ("--level", *level)),
          "--title", name, "--out", os.path.join(folder, name + tag + ".svg")], False)
    return all(done.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="+", choices=ENTRIES)
    parser.add_argument("--quick", action="store_true", help="tiny models, few steps")
    parser.add_argument("--small", action="store_true", help="mqar only: small models that learn on a CPU")
    parser.add_argument("--models", nargs="+", choices=("sessa", "attention", "mamba2", "nofeedback"), help="[all four]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337, 1338], help="[1337 1338]")
    parser.add_argument("--steps", type=int, help="in place of the entry's")
    parser.add_argument("--batch", type=int, help="in place of the entry's")
    parser.add_argument("--lr", type=float, help="in place of the entry's; such runs have names of their own")
    parser.add_argument("--warmup", type=int, help="the same for the steps of warm-up")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE",
                        help="and for any other option of the program")
    parser.add_argument("--average", nargs="+", default=[], metavar="A-B",
                        help="evaluate the mean of the snapshots of these steps too")
    parser.add_argument("--keep-every", type=int, default=50, help="steps between two of them [50]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time [1]")
    parser.add_argument("--table", action="store_true", help="no training: only the tables of what is there")
    parser.add_argument("--program", help="[./train_sessa with --quick or --small, else ./train_sessacu]")
    parser.add_argument("--folder", default=os.path.join(ROOT, "runs"), help="[runs]")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    o = parser.parse_args()
    if not all("=" in word for word in o.set) or o.jobs < 1:
        parser.error("--set takes NAME=VALUE, --jobs 1 or more")
    if not all(re.fullmatch(r"\d+-\d+", word) for word in o.average):
        parser.error("--average takes two steps, as in 1000-2000")
    o.program = o.program or os.path.join(ROOT, "train_sessa" if o.quick or o.small else "train_sessacu")
    if not o.dry_run and not os.path.exists(o.program):
        sys.exit(f"{o.program} is not there: make {os.path.basename(o.program)}")
    try:
        complete = [run_entry(name, ENTRIES[name], o) for name in o.entries]
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        sys.exit(130)
    sys.exit(not all(complete))


if __name__ == "__main__":
    main()
