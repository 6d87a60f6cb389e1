"""Tests of the programs in dev/claims, the plots among them: dev/claims/test_claims.py, or pytest dev/claims/test_claims.py.
With --program ./train_sessa the program must also read what they write.
"""
import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.normpath(os.path.join(HERE, "..", ".."))
sys.path[:0] = [HERE, os.path.join(ROOT, "dev", "pytorch"), os.path.join(ROOT, "data")]
import curriculum
import knife
import match
import positions
import soup
import symbolsoup
import tail
import theory
from example_set import Stream
from runner import Skip, run_tests

PROGRAM = os.path.abspath(sys.argv[sys.argv.index("--program") + 1]) if "--program" in sys.argv else None


def likelihoods(model, n, start=()):
    """Of all blocks of n letters that begin with `start`, (16^…,styles)."""
    blocks = [[*start, *rest] for rest in itertools.product(range(16), repeat=n - len(start))]
    return np.exp(soup.in_chunks(model.log_likelihood, blocks, 2048))


def test_soup_likelihoods_sum_to_one():
    """Over all sequences of a length, in every style; and, in one of them, of five letters, the first length at which all motifs fit."""
    model = soup.Model()
    for n in (1, 2, 3, 4):
        assert np.abs(likelihoods(model, n).sum(0) - 1).max() < 1e-12, n
    model.T, model.w = model.T[6:7], model.w[6:7]
    assert abs(sum(likelihoods(model, 5, [first]).sum() for first in range(16)) - 1) < 1e-12


def test_soup_likelihood_against_enumeration():
    """Four letters: every way to write each clean block, followed event by event from the generator's own tables; then every way to
    replace letters, which is E along each axis."""
    model, p, n = soup.Model(), symbolsoup.Parameters(), 4
    for s, style in ((1, symbolsoup.make_styles(p)[0][1]), (8, symbolsoup.make_styles(p)[1][4])):
        clean = np.zeros((16,) * n)

        def write(out, probability):
            room = n - len(out)
            if not room:
                clean[tuple(out)] += probability
                return
            if room >= 3:
                fitting = style.motif_sums[:style.fitting[min(room, 5)]]
                for motif, weight in zip(style.motifs, np.diff(fitting, prepend=0)):
                    write(out + motif, probability * p.motif * weight / fitting[-1])
                probability *= 1 - p.motif
            sums = style.sums[out[-1] + 1 if out else 0]
            for c, weight in enumerate(np.diff(sums, prepend=0)):
                write(out + [c], probability * weight / sums[-1])

        write([], 1.0)
        E = np.full((16, 16), 0.03 / 15) + np.eye(16) * (0.97 - 0.03 / 15)
        seen = np.einsum("abcd,aw,bx,cy,dz->wxyz", clean, E, E, E, E, optimize=True)
        assert np.abs(likelihoods(model, n)[:, s] / seen.ravel() - 1).max() < 1e-12


def test_soup_likelihood_against_the_generator():
    """60,000 blocks of three letters that it wrote: χ² over the 4,096 that there are."""
    model, style, stream, n = soup.Model(), symbolsoup.make_styles(symbolsoup.Parameters())[0][2], Stream(3), 60000
    found = np.zeros(4096)
    for _ in range(n):
        a, b, c = style.block(stream, 3)
        found[256 * a + 16 * b + c] += 1
    expected = n * likelihoods(model, 3)[:, 2]
    chi = ((found - expected) ** 2 / expected).sum() / 4095
    assert abs(chi - 1) < 5 * (2 / 4095) ** 0.5, chi


def test_soup_is_calibrated():
    """Accuracy is the mean of the largest posterior, over all and for a third each where that is small, middling and large."""
    for tokens, n in (((400, 600), 3000), ((40, 80), 3000)):
        p = symbolsoup.Parameters(min_tokens=tokens[0], max_tokens=tokens[1])
        examples = symbolsoup.examples(n, 7, p)
        best = soup.exact(soup.Model(p), [parts for _, parts in examples])
        hit, top = best.argmax(1) == [label for label, _ in examples], best.max(1)
        by_size = np.argsort(top)
        for these in (by_size, *np.array_split(by_size, 3)):
            error = (top * (1 - top))[these].sum() ** 0.5 / len(these)
            assert abs(hit[these].mean() - top[these].mean()) < 4 * error, (tokens, hit[these].mean(), top[these].mean(), error)


def test_soup_ladder():
    """No rung comes near the exact posterior; and pairs of letters are as often as an endless block of the generator has them."""
    model, style, stream = soup.Model(), symbolsoup.make_styles(symbolsoup.Parameters())[0][3], Stream(5)
    x = np.array(style.block(stream, 100000))
    found, want = np.bincount(16 * x[:-1] + x[1:], minlength=256), model.pairs()[3].ravel() * (len(x) - 1)
    assert abs(want.sum() - len(x) + 1) < 1e-6 and ((found - want) ** 2 / want).sum() / 255 < 2     # neighbours depend on each other
    examples = symbolsoup.examples(1500, 8)
    labels, parts = np.array([label for label, _ in examples]), [x for _, x in examples]
    best = soup.score(soup.exact(model, parts), labels)
    for name, p in soup.ladder(model, parts).items():
        accuracy, _, _, loss = soup.score(p, labels)
        assert np.abs(p.sum(1) - 1).max() < 1e-9 and 0.2 < accuracy < best[0] and loss > best[3] + 0.05, (name, accuracy, loss)


def test_soup_on_the_authors_examples():
    folder = os.path.join(ROOT, "data", "symbol_soup_seed0")
    if not os.path.isdir(folder):
        raise Skip("data/symbol_soup_seed0 is not there")
    examples = soup.read_author(folder)
    best = soup.exact(soup.Model(), [parts for _, parts in examples])
    accuracy, error, expected, _ = soup.score(best, np.array([label for label, _ in examples]))
    assert len(examples) == 2400 and abs(accuracy - expected) < 4 * error and abs(accuracy - 0.82) < 4 * error, (accuracy, expected)


def test_plateau():
    """Against the closed form where no two values are alike, and the cases that can be counted by hand."""
    for K, Q in ((4, 4), (16, 8)):
        assert abs(curriculum.plateau(K, Q, 10000, n=5000) - sum(1 / (K - q) for q in range(Q)) / Q) < 0.01
        assert abs(curriculum.plateau(K, Q, 10000, repeat=True, n=5000) - 1 / K) < 0.01
    assert curriculum.plateau(5, 3, 1, n=10) == 1           # one value only
    assert curriculum.plateau(1, 1, n=10) == 1
    # two values among two: alike in half the examples; else a coin, then the other one
    assert abs(curriculum.plateau(2, 2, 2) - (0.5 + 0.5 * 0.75)) < 0.01


def test_theory():
    """The recursion is the inverse of I - γU; its closed form; the slopes of the stacks; and position, strictly rising."""
    T, gain = 60, 0.6
    U = np.tril(np.ones((T, T)), -1) / np.maximum(np.arange(T), 1)[:, None]
    S = np.linalg.inv(np.eye(T) - gain * U)
    for j in (0, 7):
        assert np.abs(theory.feedback(np.eye(T)[j], gain) - S[:, j]).max() < 1e-13
        for t in range(j + 1, T):
            closed = np.log(gain) + math.lgamma(j + 1) - math.lgamma(j + 1 + gain) + math.lgamma(t + gain) - math.lgamma(t + 1)
            assert abs(S[t, j] / np.exp(closed) - 1) < 1e-12
    layer = np.eye(T) + (S - np.eye(T)) * np.arange(1, T + 1) ** gain
    assert np.abs(theory.stack(3, gain, T, 7) - np.linalg.matrix_power(layer, 3)[:, 7]).max() < 1e-10
    for _, mixer, compensated, slope in theory.FAMILIES[:2]:
        for k in (1, 2, 3):
            for g in (0.4, 0.7):
                found = theory.slope(theory.stack(k, g, 16384, 0, mixer, compensated), 0, 500, 16384)
                assert abs(found - slope(k, g)) < 0.08, (mixer, k, g, found)   # lower powers of the lag fade slowly
    for g in (0.2, 0.8):
        s = theory.feedback(np.ones(2000), g)
        assert np.abs(s / theory.position(g, 2000) - 1).max() < 1e-11 and (np.diff(s) > 0).all() and s[-1] < 1 / (1 - g)
    try:
        import matplotlib   # noqa: F401
    except ImportError:
        raise Skip("the pictures: matplotlib is not installed")
    with tempfile.TemporaryDirectory() as folder:
        out = run("theory.py", "--length", 1000, "--profiles", os.path.join(folder, "a.svg"), "--position", os.path.join(folder, "b.png"))
        assert out.count("| feedback |") == 3 and os.path.getsize(os.path.join(folder, "a.svg")) > 5000


def run(script, *arguments, code=0):
    done = subprocess.run([sys.executable, os.path.join(HERE, script), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr, (script, arguments, done.returncode, done.stderr)
    assert not code or len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stdout


def test_curriculum():
    """Every stage of a tiny run, the table, a run that a gate stops; what is finished is not run again."""
    if not PROGRAM:
        raise Skip("--program is not given")
    with tempfile.TemporaryDirectory() as folder:
        options = ("--program", PROGRAM, "--folder", folder, "--train", 40, "--steps", 4, "--far", 300, "--seeds", 1)
        run("curriculum.py", *options, "--models", "sessa", "--gate", 0)
        with open(os.path.join(folder, "sessa_1_1_from0", "result.json")) as file:
            r = json.load(file)
        assert [s["stage"] for s in r["stages"]] == [0, 1, 2, 3] and {"64", "128", "256"} <= set(r["by_lag"])
        out = run("curriculum.py", *options, "--models", "sessa", "attention")
        assert out.count("stage 0") == 2 and "attention, seed 1" in out and "sessa, seed 1" not in out      # a line, and in the table
        assert "1 of 1" in out and "0 of 1 (seed 1 at stage 0 with" in out
        assert os.path.exists(os.path.join(folder, "curriculum.md"))
    run("curriculum.py", "--program", "/nowhere/train_sessa", code=1)


# A program that plays train_sessa: it keeps its calls, takes the longer the smaller the seed, and dies half way
# where it is told.
PLAYED = r"""#!{python}
import json, os, sys, time
words, folder = sys.argv[1:], {folder!r}
value = lambda name: words[words.index(name) + 1]
def call(what):
    with open(os.path.join(folder, "calls"), "a") as file:
        file.write(what + "\n")
if "--eval" in words:
    print("val_loss 1.5\nval_accuracy 0.5\nlag 16 to 31 0.5")
    sys.exit()
out = value("--resume" if "--resume" in words else "--out")
name = os.path.basename(out).split(".")[0]
seed = int(name.split("_")[2])
call(("resume " if "--resume" in words else "start ") + name)
time.sleep(0.8 / seed)
dies = os.path.exists(os.path.join(folder, "dies")) and name.endswith("sessa_2")
with open(value("--log"), "a") as file:
    for step in (50,) if dies else (100,):
        file.write(json.dumps(dict(step=step, train_loss=2, val_loss=seed, val_accuracy=seed / 10, tok_per_s=1)) + "\n")
for path in (out, out.replace(".safetensors", ".best.safetensors")):
    open(path, "w").close()
call("end " + name)
if dies:
    sys.exit("killed")
"""


def play(folder):
    path = os.path.join(folder, "program")
    with open(path, "w") as file:
        file.write(PLAYED.format(python=sys.executable, folder=folder))
    os.chmod(path, 0o755)
    return path


def calls(folder):
    with open(os.path.join(folder, "calls")) as file:
        return file.read().split("\n")[:-1]


def test_experiments_jobs():
    """Models side by side; --jobs at a time; the table in the order of the seeds, whoever ends first; a run that
    died goes on, alone."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, os.path.join(HERE, "experiments.py"), "mqar", "--quick", "--program", play(folder),
                   "--folder", folder, "--models", "sessa", "mamba2", "--seeds", "1", "2", "3"]
        open(os.path.join(folder, "dies"), "w").close()
        done = subprocess.run([*command, "--jobs", "2"], capture_output=True, text=True)
        assert done.returncode == 1 and "killed" in done.stderr and "Traceback" not in done.stderr, done.stderr
        begun = [line.split()[1] for line in calls(folder) if line.startswith("start")]
        assert {*begun[:2]} == {"mqar_sessa_1", "mqar_mamba2_1"} and len(begun) == 6, begun
        assert {*begun[2:4]} == {"mqar_sessa_2", "mqar_mamba2_2"}, begun
        running, most = 0, 0
        for line in calls(folder):
            running += 1 if not line.startswith("end") else -1
            most = max(most, running)
        assert most == 2, calls(folder)
        assert "| 0.2000 (0.1000, 0.3000) |" in done.stdout        # Sessa's without the one that died
        os.remove(os.path.join(folder, "dies"))
        before = len(calls(folder))
        done = subprocess.run([*command, "--jobs", "3"], capture_output=True, text=True)
        again = calls(folder)[before:]
        assert done.returncode == 0 and again == ["resume mqar_sessa_2", "end mqar_sessa_2"], (done.stderr, again)
        assert done.stdout.count("| 0.2000 (0.1000, 0.2000, 0.3000) |") == 2, done.stdout
        with open(os.path.join(folder, "quick", "mqar.md")) as file:
            first = file.read()
        subprocess.run([*command, "--table"], capture_output=True, check=True)
        with open(os.path.join(folder, "quick", "mqar.md")) as file:
            assert file.read() == first and len(calls(folder)) == before + 2


def test_curriculum_stage():
    """A stage's weights are those of the first validation at the gate, though the run has gone on; what an earlier,
    stopped run left is not read; and the sweep's choice counts a run that was stopped at a gate as nothing."""
    with tempfile.TemporaryDirectory() as folder:
        stem, program = os.path.join(folder, "stage0"), os.path.join(folder, "program")
        with open(program, "w") as file:
            file.write(f"""#!{sys.executable}
import json, sys
value = lambda name: sys.argv[sys.argv.index(name) + 1]
for step, accuracy in ((250, 0.5), (500, 0.96), (750, 0.97), (1000, 0.2)):
    open(value("--out").replace(".safetensors", f".step{{step}}.safetensors"), "w").write(str(step))
    open(value("--log"), "a").write(json.dumps(dict(step=step, val_accuracy=accuracy)) + "\\n")
open(value("--out"), "w").write("1000")
""")
        os.chmod(program, 0o755)
        stage = curriculum.Stage(2, 1, (6, 6), 10, 1000, 4, 1e-3)
        o = argparse.Namespace(stages=[stage, stage], steps=None, gate=0.95, program=program, dry_run=False)
        shape = match.Shape("sessa", 16, 1, 1)
        with open(stem + ".jsonl", "w") as file:
            file.write('{"step": 250, "val_accuracy": 0.99}\n')
        for gate, expected in ((0.95, (500, 0.96, 500)), (0.965, (750, 0.97, 750)), (0.98, (1000, 0.2, None))):
            o.gate = gate
            assert curriculum.train_stage(0, stem, None, shape, 1, 1, {0: "none"}, o) == expected, gate
            with open(stem + ".safetensors") as file:
                assert file.read() == str(expected[0])
            assert not [name for name in os.listdir(folder) if ".step" in name]
        os.rename(stem + ".jsonl", os.path.join(folder, "stage1.jsonl"))
        last = curriculum.train_stage(1, os.path.join(folder, "stage1"), None, shape, 1, 1, {1: "none"}, o)
        assert last[:2] == (1000, 0.2)      # to its end

        o = argparse.Namespace(folder=folder, scales=[2.0, 0.5, 1.0], sweep=[101, 102], first=0)
        found = {(0.5, 101): 0.97, (0.5, 102): None, (1.0, 101): 0.9, (1.0, 102): 0.9,
                 (2.0, 101): 0.8, (2.0, 102): 0.99, (2.0, 1): 1.0}
        for (scale, seed), accuracy in found.items():
            os.mkdir(os.path.join(folder, f"{scale}_{seed}"))
            result = {"model": "sessa", "seed": seed, "scale": scale, "first": 0}
            result["stages"] = [{"accuracy": accuracy or 0.94}]
            with open(os.path.join(folder, f"{scale}_{seed}", "result.json"), "w") as file:
                json.dump(result | ({"by_lag": {}} if accuracy else {}), file)
        assert curriculum.best_scale("sessa", o) == 1.0
        o.scales = [0.5, 2.0]
        assert curriculum.best_scale("sessa", o) == 2.0


def test_average():
    """The mean of weights, without moments and the run's state; snapshots by their step; files that do not go
    together are refused."""
    try:
        from safetensors import safe_open
        from safetensors.numpy import load_file, save_file
    except ImportError:
        raise Skip("safetensors is not installed")
    with tempfile.TemporaryDirectory() as folder:
        path = lambda name: os.path.join(folder, name)
        weights = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
        words = np.arange(4, dtype=np.uint8)
        for step, w in zip((100, 200, 300), weights):
            save_file({"wte.weight": w, "exp_avg.wte.weight": w, "tokenizer.bytes": words},
                      path(f"r.step{step}.safetensors"), {"mixer": "sessa", "step": str(step)})
        files = [path(f"r.step{step}.safetensors") for step in (100, 200, 300)]
        for steps, expected in (((), weights), (("--steps", 150, 300), weights[1:])):
            run("average.py", *files, *steps, "--out", path("mean.safetensors"))
            found = load_file(path("mean.safetensors"))
            assert set(found) == {"wte.weight", "tokenizer.bytes"} and np.array_equal(found["tokenizer.bytes"], words)
            assert np.abs(found["wte.weight"] - expected.astype(np.float64).mean(0)).max() < 1e-7
            with safe_open(path("mean.safetensors"), "np") as file:
                assert file.metadata() == {"mixer": "sessa"}
        save_file({"wte.weight": weights[0, :2], "tokenizer.bytes": words}, path("small.safetensors"))
        save_file({"wte.weight": weights[0], "tokenizer.bytes": words + 1}, path("words.safetensors"))
        for other in ("small.safetensors", "words.safetensors", "none.safetensors"):
            run("average.py", files[0], path(other), "--out", path("x.safetensors"), code=1)
        assert not os.path.exists(path("x.safetensors"))


def test_positions():
    """Bins cover each position once; weighed by their sizes their losses are the program's own loss of the text;
    where the text is chance, and only there, the loss is high."""
    for T in (1, 16, 17, 100, 8192):
        edges = positions.bins(T)
        assert [p for low, high in edges for p in range(low, high)] == list(range(T)), T
    if not PROGRAM:
        raise Skip("--program is not given")
    with tempfile.TemporaryDirectory() as folder:
        path = lambda name: os.path.join(folder, name)
        random = np.random.default_rng(1)
        place = np.arange(6000) % 50     # of a window, those of the last tenth beginning at a multiple of 50
        with open(path("a.txt"), "wb") as file:     # the alphabet, and from place 33 on chance
            file.write(bytes(np.where(place > 32, random.integers(97, 106, 6000), 97 + place % 9).astype(np.uint8)))
        options = "--dim 16 --layers 1 --heads 1 --seq 50 --steps 30 --lr 1e-2".split()
        subprocess.run([PROGRAM, "--data", path("a.txt"), *options, "--out", path("m.safetensors")], check=True,
                       capture_output=True)
        best = path("m.best.safetensors")
        o = argparse.Namespace(data=path("a.txt"), windows=1000, jobs=2, program=PROGRAM)
        found = positions.by_position(best, o)
        whole = subprocess.run([PROGRAM, "--load", best, "--data", path("a.txt"), "--eval"], check=True,
                               capture_output=True, text=True)
        whole = float(whole.stdout.split("val_loss ")[1].split()[0])
        mean = sum(found[low] * (high - low) for low, high in positions.bins(50)) / 50
        assert list(found) == [0, 16, 32] and abs(mean / whole - 1) < 1e-5, (found, whole)
        assert max(found[0], found[16]) + 0.5 < found[32], found
        out = run("positions.py", best, best, "--data", path("a.txt"), "--windows", 3, "--jobs", 3,
                  "--program", PROGRAM, "--json", path("p.json"))
        assert "| 0–15 |" in out and "| 32–49 |" in out
        run("positions.py", best, "--data", path("m.jsonl"), "--program", PROGRAM, code=1)
        try:
            import matplotlib   # noqa: F401
        except ImportError:
            raise Skip("the picture: matplotlib is not installed")
        run("plot_positions.py", path("p.json"), "--out", path("p.svg"))
        assert os.path.getsize(path("p.svg")) > 5000
        run("plot_positions.py", best, code=1)


def test_tail():
    """Even weights of either sign have the theory's exponent, 1-γ; near hops count for their loss alone; a kernel
    with more of the far past has that of the recursion it stands for."""
    T = 1024

    def kernel_of(row):
        """As influence.c makes it."""
        kernel, rows = np.zeros(128), range(T // 16, T)
        for t in rows:
            np.add.at(kernel, np.floor(8 * np.log2(t / (np.arange(t) + 0.5))).astype(int), row(t) / len(rows))
        return kernel

    def solved(row, sources=4):
        u = np.zeros((T, sources))
        for t in range(T):
            u[t] = row(t) @ u[:t]
            if t < sources:
                u[t, t] = 1
        return tail.exponent(np.mean([np.abs(np.pad(u[s:, s], (0, s))) for s in range(sources)], 0)[:T - sources])

    def share(t, gain, part, first, last):
        """Even weights, but for a part that is spread over the positions first to last."""
        row = np.full(t, gain * (1 - part) / max(t, 1))
        row[first:last] += gain * part / max(1, len(row[first:last]))
        return row

    for gain in (0.9, 0.5, -0.5):
        found = tail.exponent(tail.profile(kernel_of(lambda t: np.full(t, gain / t)), T, 4))
        assert abs(found - (1 - gain)) < 0.03, (gain, found)
    near = tail.exponent(tail.profile(kernel_of(lambda t: share(t, 0.6, 0.5, max(0, t - 4), t)), T, 4))
    assert abs(near - (1 - 0.6 * 0.5 / (1 - 0.6 * 0.5))) < 0.03, near
    far = lambda t: share(t, 0.6, 0.3, 0, max(1, t // 8))
    found, expected = tail.exponent(tail.profile(kernel_of(far), T, 4)), solved(far)
    assert abs(found - expected) < 0.02 and found < 0.35, (found, expected)      # even weights: 0.4

    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise Skip("safetensors is not installed")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "t.safetensors")
        solve = np.arange(1, T + 1) ** -0.5
        kernel = kernel_of(lambda t: np.full(t, 0.5 / t))
        save_file({"layers.0.kernel": kernel.astype(np.float32), "layers.0.gain": np.array([0.25], np.float32),
                   "layers.0.solve": solve.astype(np.float32)}, path)
        out = run("tail.py", path)
        assert "| t | 0 | 0.25 | 0.50 | 0.75 | 0.49 | 0.50 |" in out, out
        run("tail.py", os.path.join(folder, "none.safetensors"), code=1)
        save_file({"layers.0.direct": solve}, path)
        run("tail.py", path, code=1)


def test_knife():
    """Feedback cut in all layers is the attention mixer with the same weights. Where attention is even keys say nothing, and where
    feedback is even its keys do not. Each cut changes what it should alone."""
    if not PROGRAM:
        raise Skip("--program is not given")
    with tempfile.TemporaryDirectory() as folder:
        path = lambda name: os.path.join(folder, name)
        subprocess.run([sys.executable, os.path.join(ROOT, "data", "mqar.py"), "--train", "50", "--val", "20", "--test", "0", "--pairs", "4",
                        "--queries", "4", "--lag", "24", "64", "--prefix", path("d")], check=True, capture_output=True)
        subprocess.run([PROGRAM, "--data", path("d_train.safetensors"), "--val", path("d_val.safetensors"), "--dim", "16", "--layers", "2",
                        "--heads", "2", "--steps", "30", "--lr", "1e-2", "--out", path("s.safetensors")], check=True, capture_output=True)
        whole = knife.Checkpoint(path("s.best.safetensors"))

        def loss(name, header, data):
            checkpoint = knife.Checkpoint(path("s.best.safetensors"))
            checkpoint.header = header
            checkpoint.write(path(name), data)
            return knife.evaluate(PROGRAM, path(name), [path("d_val.safetensors")])["loss"][0]

        def noisy(data, names, rows=None):
            """The same with other numbers in these tensors of every layer."""
            data = bytearray(data)
            for l in range(2):
                for name in names:
                    begin, end = whole.header[f"layers.{l}.mixer.{name}"]["data_offsets"]
                    begin += (end - begin) // 2 if rows == "second half" else 0
                    data[begin:end] = np.random.default_rng(l).normal(size=(end - begin) // 4).astype("<f4").tobytes()
            return data

        before = loss("same.safetensors", whole.header, whole.data)
        uncut = {kind: loss(kind + ".safetensors", whole.header, whole.cut(kind, None)) for kind in knife.CUTS}
        assert len({round(x, 6) for x in (before, *uncut.values())}) == 4, (before, uncut)      # each does something

        feedback = ("proj_fb.weight", "proj_fb.bias", "gamma_ctx.weight", "gamma_bias")
        header = {name: x for name, x in whole.header.items() if not name.endswith(feedback)}
        header["__metadata__"] = {**header["__metadata__"], "mixer": "attention"}
        data, kept = bytearray(), {}
        for name, x in header.items():      # packed again: a reader may want no holes
            if name != "__metadata__":
                begin, end = x["data_offsets"]
                kept[name] = {**x, "data_offsets": [len(data), len(data) + end - begin]}
                data += whole.data[begin:end]
        kept["__metadata__"] = header["__metadata__"]
        assert abs(loss("attention.safetensors", kept, data) - uncut["feedback"]) < 2e-6

        keys = ("k_proj.weight", "k_proj.bias")
        assert loss("a.safetensors", whole.header, noisy(whole.cut("even-attention", None), keys)) == uncut["even-attention"]
        assert loss("b.safetensors", whole.header, noisy(whole.data, keys)) != before
        same = noisy(whole.cut("feedback", None), feedback[:2])
        assert loss("c.safetensors", whole.header, same) == uncut["feedback"]
        assert whole.cut("even-feedback", 0) != whole.cut("even-feedback", 1) != whole.data

        run("knife.py", path("s.best.safetensors"), "--cut", "feedback", 1, "--cut", "even-attention", "all", "--out", path("cut.safetensors"))
        assert sum(a != b for a, b in zip(knife.Checkpoint(path("cut.safetensors")).data, whole.data)) > 100
        out = run("knife.py", path("s.best.safetensors"), "--try", path("d_val.safetensors"), "--json", path("k.json"), "--program", PROGRAM)
        assert out.count("\n") == 2 + 1 + 3 * 3
        run("plot_recall.py", path("k.json"), "--fewest", 1, "--level", 0.25, "four", "--out", path("k.svg"))
        assert os.path.getsize(path("k.svg")) > 5000
        run("knife.py", path("attention.safetensors"), "--cut", "feedback", 0, "--out", path("x.safetensors"), code=1)
        run("knife.py", path("k.json"), "--cut", "feedback", 0, "--out", path("x.safetensors"), code=1)
        run("plot_recall.py", path("s.safetensors"), code=1)


def test_match():
    """The formulas against the PyTorch models' own counts, and the 2 % against the formulas."""
    try:
        import sessa
    except ImportError:
        raise Skip("torch is not installed")
    for V, D, L, H, G, w, N in ((65, 128, 5, 4, 4, 0, 64), (19, 12, 2, 1, 1, 8, 10), (50, 32, 3, 2, 2, 16, 5)):
        for mixer in ("sessa", "attention", "mamba2"):
            c = sessa.Config(V, D, L, H, mixer=mixer, mamba_head_dim=w, mamba_state_dim=N)
            shape = match.Shape(mixer, D, L, H, c.mamba_head_dim, N)
            assert match.parameters(shape, V) == sum(p.numel() for p in sessa.Sessa(c).parameters()), shape
    for V, D, L, H in ((65, 128, 5, 4), (43, 256, 4, 4), (147, 128, 4, 4), (4096, 512, 8, 8), (65, 384, 8, 6)):
        like = match.Shape("sessa", D, L, H)
        for name, shape in match.rows(V, like)[:3]:
            assert abs(match.parameters(shape, V) / match.parameters(like, V) - 1) <= 0.02
            assert abs(np.log2(shape.dim / D)) < 0.5 and abs(np.log2(shape.layers / L)) <= 1, shape
            sessa.Config(V, shape.dim, shape.layers, shape.heads, mixer=shape.mixer, mamba_head_dim=shape.head_dim)     # is one that exists


def test_plots():
    """Each makes its picture of a small file, the slope it prints is the right one, and bad input is one line."""
    try:
        import matplotlib   # noqa: F401
        from safetensors.numpy import save_file
    except ImportError:
        raise Skip("matplotlib or safetensors is not installed")
    with tempfile.TemporaryDirectory() as folder:
        path = lambda name: os.path.join(folder, name)

        def plot(script, *arguments, code=0):
            done = subprocess.run([sys.executable, os.path.join(HERE, script), *arguments], capture_output=True, text=True)
            assert done.returncode == code and "Traceback" not in done.stderr, (script, arguments, done.stderr)
            assert not code or len(done.stderr.strip().splitlines()) == 1
            return done.stdout

        lag = np.arange(1000.0)
        tail = np.where(lag % 3 == 0, 0, 0.2 * np.maximum(lag, 1) ** -0.7)      # 0: not measured
        save_file({"layers.0.solve": tail.astype(np.float32), "layers.0.direct": np.maximum(lag, 1) ** -1.0, "map.solve": np.eye(20)},
                  path("i.safetensors"), {"mixer": "sessa", "map_layer": "0"})
        out = plot("plot_influence.py", path("i.safetensors"), "--out", path("i.svg"))
        assert "slope -0.7000" in out and "slope -1.0000" in out
        assert "slope -0.7000" in plot("plot_influence.py", path("i.safetensors"), "--kind", "solve", "--fit", "20", "90", "--out", path("i.png"))
        plot("plot_maps.py", path("i.safetensors"), "--out", path("m.png"))
        with open(path("log.jsonl"), "w") as file:
            for step in range(1, 31):
                line = {"step": step, "train_loss": 3 / step, **({"val_loss": 2 / step, "val_accuracy": step / 40} if step % 10 == 0 else {})}
                file.write(json.dumps(line) + "\n")
        plot("plot_training.py", path("log.jsonl"), path("log.jsonl"), "--names", "a", "b", "--out", path("t.svg"))
        for name in ("i.svg", "i.png", "m.png", "t.svg"):
            assert os.path.getsize(path(name)) > 5000, name
        plot("plot_influence.py", path("log.jsonl"), code=1)
        plot("plot_influence.py", path("none.safetensors"), code=1)
        plot("plot_maps.py", path("log.jsonl"), code=1)
        plot("plot_training.py", path("i.safetensors"), code=1)
        plot("plot_training.py", path("log.jsonl"), "--out", path("t.xyz"), code=1)


if __name__ == "__main__":
    run_tests(globals())
