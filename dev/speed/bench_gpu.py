"""Training steps on one GPU, side by side: train_sessacu in bf16 and TF32, the PyTorch model of sessa.py under torch.compile
in bf16 autocast, and the Transformer of gpt.py (FlashAttention through scaled_dot_product_attention) likewise.

  dev/speed/bench_gpu.py                            # all shapes, all programs
  dev/speed/bench_gpu.py --shapes small long8192    # some
  dev/speed/bench_gpu.py --no-torch                 # this program alone
  dev/speed/bench_gpu.py --generate                 # tokens a second, one sequence, behind prompts of 1000 and 8000 tokens

A step is forward, backward, clipping, AdamW. Tokens per second are of the median step, after the first ones. Memory is what
the program takes with cudaMalloc, workspaces included, against torch.cuda.max_memory_allocated. The share counts
6·parameters + 14·T·D·L floating-point operations a token (6·T·D·L + recomputation, 7·T·D·L, for the Transformer) of the rate of
a bf16 product of two 8192×8192 matrices, measured here.
"""
import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "pytorch"))

SHAPES = {  # D, L, H, V, B, T
    "small": (384, 8, 6, 65, 64, 256),
    "medium": (768, 16, 12, 50304, 16, 1024),
    "long8192": (768, 4, 12, 256, 1, 8192),
    "long16384": (768, 4, 12, 256, 1, 16384),
    "long65536": (768, 4, 12, 256, 1, 65536),
}
SKIPPED = 5


def parameters_of(D, L, V):
    return V * D + L * (9 * D * D + 9 * D + D + 1 + 2 * D) + 2 * D


def write_shard(path, V, count):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, count
    with open(path, "wb") as file:
        file.write(header.tobytes() + np.random.default_rng(0).integers(V, size=count).astype("<u2").tobytes())


def program_run(program, shape, precision, steps):
    """(median ms a step, GiB) of the CUDA program, or (None, the line it printed)"""
    D, L, H, V, B, T = shape
    with tempfile.TemporaryDirectory() as folder:
        path = lambda name: os.path.join(folder, name)
        write_shard(path("train.bin"), V, 4 * B * (T + 1))
        write_shard(path("val.bin"), V, B * T + 1)
        command = [program, "--precision", precision, "--data", path("train.bin"), "--val", path("val.bin"), "--vocab", V, "--dim", D, "--layers", L,
                   "--heads", H, "--seq", T, "--batch", B, "--steps", steps + SKIPPED, "--eval-every", 0, "--lr", 1e-4, "--log", path("log"), "--out",
                   path("out.safetensors"), "--save-every", 1000000]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode:
            return None, done.stderr.strip()
        with open(path("log")) as lines:
            times = [1e3 * B * T / json.loads(line)["tok_per_s"] for line in lines][SKIPPED:]
        mib = float(re.search(r"([0-9]+) MiB", done.stdout).group(1))
        return statistics.median(times), mib / 1024


def torch_run(make, shape, steps):
    """(median ms a step, GiB, ms to compile) of a PyTorch model under torch.compile in bf16 autocast"""
    import torch
    from sessa import configure_adamw
    _, _, _, V, B, T = shape
    torch.set_float32_matmul_precision("high")
    torch._dynamo.reset()
    try:
        with torch.device("cuda"):
            model = make()
        call, optimizer = torch.compile(model), configure_adamw(model, 1e-4, (0.9, 0.99), 1e-8, 0.1)
        ids = torch.randint(V, (B, T + 1), device="cuda")
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(steps + SKIPPED):
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.autocast("cuda", torch.bfloat16):
                out = call(inputs, targets)
            loss = out[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times[SKIPPED:]), torch.cuda.max_memory_allocated() / 2**30
    except Exception as error:  # out of memory, above all
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    finally:
        model = call = optimizer = out = loss = None
        gc.collect()
        torch.cuda.empty_cache()


def program_decode(program, shape, prompt, n):
    """ms a token of the program's --generate, the median of its tokens: the sampler is in it"""
    D, L, H, V, _, _ = shape
    with tempfile.TemporaryDirectory() as folder:
        path = lambda name: os.path.join(folder, name)
        write_shard(path("ids.bin"), V, 1000)
        train = [program, "--data", path("ids.bin"), "--vocab", V, "--dim", D, "--layers", L, "--heads", H, "--seq", 64,
                 "--batch", 1, "--steps", 1, "--eval-batches", 1, "--out", path("out.safetensors")]
        subprocess.run([str(word) for word in train], capture_output=True, check=True)
        ids = " ".join(str(i) for i in np.random.default_rng(1).integers(V, size=prompt))
        command = [program, "--load", path("out.safetensors"), "--generate", str(n), "--window", "0", "--prompt", ids]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
            times, size = [], 0
            while piece := os.read(run.stdout.fileno(), 1 << 20):
                size += len(piece)
                if size > len(ids):  # the prompt comes first
                    times.append(time.perf_counter())
        return 1e3 * statistics.median(b - a for a, b in zip(times, times[1:]))


def torch_decode(shape, prompt, n):
    """ms a token of sessa.py in bf16 with its cache, the likeliest token each time; the prompt in float32: PyTorch has no solve in bf16"""
    import torch
    from sessa import Cache, Config, Sessa
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length: 60 ms a token
    D, L, H, V, _, _ = shape
    with torch.no_grad(), torch.device("cuda"):
        model = Sessa(Config(V, D, L, H, max_seq_len=prompt + n + 1)).eval()
        caches = [Cache(prompt + n + 1) for _ in model.layers]
        logits, _ = model(torch.randint(V, (1, prompt)), caches=caches)
        model.to(torch.bfloat16)
        for cache in caches:
            cache.rows = {name: x.to(torch.bfloat16) for name, x in cache.rows.items()}
        times = []
        for _ in range(n):
            ids = logits[:, -1:].argmax(-1)
            ids.tolist()
            times.append(time.perf_counter())
            logits, _ = model(ids, caches=caches)
        return 1e3 * statistics.median(b - a for a, b in zip(times, times[1:]))


def bench_generation(program, no_torch):
    print("| shape | prompt | program | ms a token | tok/s |\n|---|---|---|---|---|")
    for name in ("small", "medium"):
        for prompt in (1000, 8000):
            runs = [("train_sessacu", lambda: program_decode(program, SHAPES[name], prompt, 256))]
            if not no_torch:
                runs.append(("sessa.py, bf16, cache", lambda: torch_decode(SHAPES[name], prompt, 64)))
            for what, run in runs:
                ms = run()
                print(f"| {name} | {prompt} | {what} | {ms:.3f} | {1e3 / ms:,.0f} |", flush=True)


def product_rate():
    """TFLOP/s of a bf16 product, and the card's name"""
    import torch
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * 8192**3 / statistics.median(times[3:]) / 1e12, torch.cuda.get_device_name()


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", default=["bf16", "tf32"])
    parser.add_argument("--steps", type=int, default=20, help="timed, of each program [20]")
    parser.add_argument("--no-torch", action="store_true", help="this program alone")
    parser.add_argument("--generate", action="store_true", help="time generation, not training")
    parser.add_argument("--program", default=os.path.join(here, "..", "..", "train_sessacu"))
    o = parser.parse_args()
    rate, card = 0, "a GPU"
    try:
        rate, card = product_rate()
    except ImportError:
        o.no_torch = True
    if o.generate:
        print(card)
        return bench_generation(o.program, o.no_torch)
    print(f"{card}, bf16 product {rate:.0f} TFLOP/s\n\n| shape | program | ms a step | tok/s | GiB | share of the product rate |\n|---|---|---|---|---|---|")
    for name in o.shapes:
        shape = D, L, H, V, B, T = SHAPES[name]
        parameters = parameters_of(D, L, V)
        work = 6 * parameters + 14 * T * D * L
        runs = [(f"train_sessacu {p}", lambda p=p: program_run(o.program, shape, p, o.steps), work) for p in o.precisions]
        if not o.no_torch:
            from gpt import GPT
            from sessa import Config, Sessa
            depth = max(1, round((parameters - V * D - T * D) / (12 * D * D)))
            runs.append(("sessa.py, compiled bf16", lambda: torch_run(lambda: Sessa(Config(V, D, L, H, max_seq_len=T)), shape, o.steps), work))
            runs.append((f"gpt.py, {depth} blocks, compiled bf16", lambda: torch_run(lambda: GPT(V, D, depth, H, T), shape, o.steps),
                         6 * (V * D + T * D + 12 * depth * D * D) + 7 * T * D * depth))
        for what, run, flops in runs:
            ms, memory = run()
            if ms is None:
                print(f"| {name} | {what} | {memory} | | | |", flush=True)
            else:
                share = f"{100 * flops * B * T / (1e9 * ms) / rate:.0f} %" if rate else ""
                print(f"| {name} | {what} | {ms:.2f} | {1e3 * B * T / ms:,.0f} | {memory:.2f} | {share} |", flush=True)


if __name__ == "__main__":
    main()
