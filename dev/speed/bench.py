"""Training steps of the C program and of PyTorch, side by side in alternating rounds, since a time on a shared machine means
little and a ratio within one run means something.

  dev/speed/bench.py --threads 2 --rounds 3                  # all shapes, and generation
  dev/speed/bench.py --shapes 128,5,4,65,12,64 --no-compile  # D,L,H,V,B,T
  dev/speed/bench.py --shapes --generate 128,5,4 768,12,12   # generation alone: D,L,H

A PyTorch step is forward, backward, clipping, fused AdamW and zero_grad; the C program's is what its log calls a step. The
Transformer (gpt.py) has the width of the Sessa model and the depth whose parameters come closest. Shares are of the rate
that a float32 product of two 1536×1536 matrices attains here, PyTorch's or ours (profile.c), whichever is faster, and
count 6·parameters + 12·T·D·L floating-point operations a token (6·T·D·L for the Transformer, which has one attention a
layer). Generation is timed as what 500 tokens after a prompt of 500 take beyond the first one.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "pytorch"))
from gpt import GPT
from sessa import Config, Sessa, configure_adamw, generate, load_checkpoint

SHAPES = "128,5,4,65,12,64 256,6,4,256,8,256 384,8,6,65,8,256 256,2,4,256,1,2048"
SKIPPED = 3     # first steps of every run


def cpu_name():
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform
        return platform.processor() or platform.machine()


def product_rate(n=1536, repeats=5):
    """GFLOP/s of PyTorch's float32 product."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(times[1:]) / 1e9


def read_rate(n=100_000_000):
    """GB/s at which memory is read."""
    a = torch.ones(n)
    a.sum()
    start = time.perf_counter()
    a.sum()
    return 4e-9 * n / (time.perf_counter() - start)


def our_product_rate(root, threads):
    """GFLOP/s of the C routine, printed by dev/speed/profile.c; 0 where there is no compiler."""
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "profile")
        command = [os.environ.get("CC", "cc"), "-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fopenmp",
                   os.path.join(root, "dev", "speed", "profile.c"), "-o", program, "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True)
            out = subprocess.run([program, "64", "1", "2", "65", "1", "32"], env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                                 check=True, capture_output=True, text=True).stdout
            return float(out.split("product 1536^3:")[1].split()[0])
        except (OSError, subprocess.CalledProcessError, IndexError):
            return 0.0


class TorchRun:
    """A model with its optimiser and one batch."""

    def __init__(self, model, V, B, T, compiled):
        self.model, self.parameters = model, sum(p.numel() for p in model.parameters())
        self.call = torch.compile(model) if compiled else model
        self.optimizer = configure_adamw(model, 1e-3, (0.9, 0.99), 1e-8, 0.1)
        ids = torch.randint(V, (B, T + 1))
        self.inputs, self.targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step(self):
        _, loss = self.call(self.inputs, self.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def times(self, steps):
        """ms of each step"""
        out = []
        for _ in range(SKIPPED + steps):
            start = time.perf_counter()
            self.step()
            out.append(1e3 * (time.perf_counter() - start))
        return out[SKIPPED:]


def write_shard(path, V, count):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, count
    with open(path, "wb") as file:
        file.write(header.tobytes() + np.random.default_rng(0).integers(V, size=count).astype("<u2").tobytes())


def c_times(program, folder, shape, steps, threads):
    """ms of each step of the C program"""
    D, L, H, V, B, T = shape
    train, val, log = (os.path.join(folder, name) for name in ("train.bin", "val.bin", "log.jsonl"))
    write_shard(train, V, 100 * (T + 1))
    write_shard(val, V, B * T + 1)
    options = dict(data=train, val=val, vocab=V, dim=D, layers=L, heads=H, seq=T, batch=B, steps=SKIPPED + steps, eval_every=0, lr=1e-3,
                   log=log, out=os.path.join(folder, "out.safetensors"))
    command = [program, "--overwrite"]
    command += [text for name, value in options.items() for text in ("--" + name.replace("_", "-"), str(value))]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
    with open(log) as lines:
        return [1e3 * B * T / json.loads(line)["tok_per_s"] for line in lines][SKIPPED:]


def transformer_like(shape, parameters):
    """The GPT of this width whose number of parameters comes closest."""
    D, _, H, V, _, T = shape
    depth = max(1, round((parameters - V * D - T * D) / (12 * D * D)))
    return GPT(V, D, depth, H, T), depth


def measure(shape, o):
    """{name: (parameters, layers, attentions a layer, [ms a step])} and the product rates seen meanwhile"""
    D, L, H, V, B, T = shape
    sessa = lambda: Sessa(Config(V, D, L, H, max_seq_len=T))
    parameters = sum(p.numel() for p in sessa().parameters())
    depth = transformer_like(shape, parameters)[1]
    runs, rows, rates = {}, {}, []
    for name, make, layers, attentions in (("Sessa", sessa, L, 2), ("Transformer", lambda: transformer_like(shape, parameters)[0], depth, 1)):
        for compiled in (False, True)[:1 if o.no_compile else 2]:
            key = f"{name}, {'compiled' if compiled else 'eager'}"
            try:
                run = TorchRun(make(), V, B, T, compiled)
                start = time.perf_counter()
                for _ in range(SKIPPED):
                    run.step()
                print(f"  {key}: ready after {time.perf_counter() - start:.1f} s", file=sys.stderr)
            except Exception as error:      # no compiler here, say: report it and go on without
                print(f"  {key}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            runs[key] = run
            rows[key] = (run.parameters, layers, attentions, [])
    if o.program:
        rows = {"C": (parameters, L, 2, []), **rows}
    work = (6 * parameters + 12 * T * D * L) * B * T
    steps = int(min(max(o.seconds * 5e10 * o.threads / work, 5), 300))
    for _ in range(o.rounds):
        rates.append(product_rate())
        time.sleep(0.5)     # PyTorch's threads stop spinning
        if o.program:
            with tempfile.TemporaryDirectory() as folder:
                rows["C"][3].extend(c_times(o.program, folder, shape, steps, o.threads))
        for key, run in runs.items():
            rows[key][3].extend(run.times(steps))
    return rows, statistics.median(rates)


def generation(shape, o, root):
    """Prints what a token costs, in C and in PyTorch, both with a cache that costs O(t·D)."""
    D, L, H = shape
    text = os.path.join(root, "data", "tinyshakespeare.txt")
    text = text if os.path.exists(text) else os.path.join(root, "train_sessa.c")
    with open(text, errors="replace") as file:
        prompt = "".join(c for c in file.read(4000) if c.isascii())[:500]
    environment = {**os.environ, "OMP_NUM_THREADS": str(o.threads)}
    times = {"C": ([], []), "PyTorch": ([], [])}    # of 1 and of 501 tokens
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = os.path.join(folder, "out.safetensors")
        subprocess.run([o.program, "--data", text, "--dim", str(D), "--layers", str(L), "--heads", str(H), "--steps", "1", "--batch", "1",
                        "--eval-every", "0", "--out", checkpoint], check=True, capture_output=True, env=environment)
        model, _, _ = load_checkpoint(checkpoint)
        ids = torch.tensor([[model.tokenizer.index(c) for c in prompt.encode()]])
        rate = read_rate()
        for _ in range(o.rounds):
            for i, n in enumerate((1, 501)):
                start = time.perf_counter()
                subprocess.run([o.program, "--load", checkpoint, "--generate", str(n), "--prompt", prompt, "--window", "0"],
                               check=True, stdout=subprocess.DEVNULL, env=environment)
                times["C"][i].append(time.perf_counter() - start)
                start = time.perf_counter()
                generate(model, ids, n, window=0)
                times["PyTorch"][i].append(time.perf_counter() - start)
    # read for a token: the weights, and k, v, k', s of about 750 positions
    gigabytes = 4e-9 * (sum(p.numel() for p in model.parameters()) + 750 * L * 4 * D)
    token = {name: (statistics.median(long) - statistics.median(short)) / 500 for name, (short, long) in times.items()}
    for name, t in token.items():
        print(f"| D {D}, L {L}, H {H} | {name} | {1e3 * t:.3f} | {1 / t:,.0f} | {t / token['C']:.2f} | "
              f"{100 * gigabytes / t / rate:.0f} % of {rate:.0f} GB/s |", flush=True)


def main():
    root = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=SHAPES.split(), help=f"D,L,H,V,B,T ... [{SHAPES}]")
    parser.add_argument("--generate", nargs="*", default=["128,5,4", "768,12,12"], help="D,L,H ... [128,5,4 768,12,12]")
    parser.add_argument("--threads", type=int, default=2, help="of each program [2]")
    parser.add_argument("--rounds", type=int, default=3, help="[3]")
    parser.add_argument("--seconds", type=float, default=5, help="about, of a program in a round [5]")
    parser.add_argument("--no-compile", action="store_true", help="eager PyTorch only")
    parser.add_argument("--program", default=os.path.join(root, "train_sessa"), help="'' for PyTorch alone [./train_sessa]")
    o = parser.parse_args()
    if o.program and not os.access(o.program, os.X_OK):
        parser.error(f"{o.program} is not there: make train_sessa, or --program ''")
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    ours = our_product_rate(root, o.threads)
    print(f"{cpu_name()}, {o.threads} threads, PyTorch {torch.__version__}, {o.rounds} rounds; product: ours {ours:.0f} GFLOP/s\n")
    if o.shapes:
        print("| shape | program | parameters | ms a step | tok/s | time / C's | share of the product rate |\n|---|---|---|---|---|---|---|")
    for text in o.shapes:
        shape = D, L, H, V, B, T = tuple(int(n) for n in text.split(","))
        rows, rate = measure(shape, o)
        rate = max(rate, ours)
        base = statistics.median(rows["C"][3]) if "C" in rows else None
        for name, (parameters, layers, attentions, times) in rows.items():
            ms = statistics.median(times)
            work = (6 * parameters + 6 * attentions * T * D * layers) * B * T
            print(f"| D {D}, L {layers}, H {H}, V {V}, B {B}, T {T} | {name} | {parameters / 1e6:.2f}M | {ms:.1f} | {1e3 * B * T / ms:,.0f} | "
                  f"{f'{ms / base:.2f}' if base else ''} | {100 * work / (1e6 * ms) / rate:.0f} % of {rate:.0f} GFLOP/s |", flush=True)
    if o.generate and o.program:
        print("\n| generation | program | ms a token | tok/s | time / C's | share of the rate at which memory is read |\n|---|---|---|---|---|---|")
        for text in o.generate:
            generation(tuple(int(n) for n in text.split(",")), o, root)


if __name__ == "__main__":
    main()
