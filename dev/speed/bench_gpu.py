"""Training steps on one GPU, or several, side by side: train_sessacu in bf16 and TF32, the PyTorch model of sessa.py under torch.compile
in bf16 autocast, and the Transformer of gpt.py (FlashAttention through scaled_dot_product_attention) likewise.

  dev/speed/bench_gpu.py                            # all shapes, all programs
  dev/speed/bench_gpu.py --shapes small long8192    # some
  dev/speed/bench_gpu.py --no-torch                 # this program alone
  dev/speed/bench_gpu.py --gpus 1 2 4 --shapes medium   # the PyTorch models under DistributedDataParallel
  dev/speed/bench_gpu.py --generate                 # tokens a second behind prompts of 1000 and 8000 tokens, of one text and of several
  dev/speed/bench_gpu.py --generate --samples 1 --prompts 1000

A step is forward, backward, clipping, AdamW. Tokens per second are of the median step, after the first ones. Memory is what
the program takes with cudaMalloc, workspaces included, against torch.cuda.max_memory_allocated. The share counts
6·parameters + 14·T·D·L floating-point operations a token (6·T·D·L + recomputation, 7·T·D·L, for the Transformer) of the rate of
a bf16 product of two 8192×8192 matrices, measured here. On n GPUs the batch is n times as large (--scaling weak), or the same
(strong), and the share is that of n such rates.
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


def program_run(program, shape, precision, steps, gpus=1):
    """(median ms a step, GiB of a GPU) of the CUDA program, or (None, the line it printed)"""
    D, L, H, V, B, T = shape
    with tempfile.TemporaryDirectory() as folder:
        path = lambda name: os.path.join(folder, name)
        write_shard(path("train.bin"), V, 4 * B * (T + 1))
        write_shard(path("val.bin"), V, B * T + 1)
        command = [program, "--precision", precision, "--data", path("train.bin"), "--val", path("val.bin"), "--vocab", V, "--dim", D, "--layers", L,
                   "--heads", H, "--seq", T, "--batch", B, "--steps", steps + SKIPPED, "--eval-every", 0, "--lr", 1e-4, "--log", path("log"), "--out",
                   path("out.safetensors"), "--save-every", 1000000] + (["--gpus", gpus] if gpus > 1 else [])
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode:
            return None, done.stderr.strip()
        with open(path("log")) as lines:
            times = [1e3 * B * T / json.loads(line)["tok_per_s"] for line in lines][SKIPPED:]
        mib = float(re.search(r"([0-9]+) MiB", done.stdout).group(1))
        return statistics.median(times), mib / 1024


def depth_of(shape):
    """blocks of the Transformer with about as many parameters"""
    D, L, _, V, _, T = shape
    return max(1, round((parameters_of(D, L, V) - V * D - T * D) / (12 * D * D)))


def torch_model(kind, shape):
    from gpt import GPT
    from sessa import Config, Sessa
    D, L, H, V, _, T = shape
    return GPT(V, D, depth_of(shape), H, T) if kind == "gpt" else Sessa(Config(V, D, L, H, max_seq_len=T))


def torch_run(kind, shape, steps, wrap=lambda model: model):
    """(median ms a step, GiB) of a PyTorch model under torch.compile in bf16 autocast; wrap: makes it one of several"""
    import torch
    from sessa import configure_adamw
    _, _, _, V, B, T = shape
    torch.set_float32_matmul_precision("high")
    torch._dynamo.reset()
    try:
        with torch.device("cuda"):
            model = torch_model(kind, shape)
        call, optimizer = torch.compile(wrap(model)), configure_adamw(model, 1e-4, (0.9, 0.99), 1e-8, 0.1)
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


def torch_rank(kind, name, batch, steps):
    """One process of several, which torchrun has started; rank 0 prints what torch_run returns."""
    import torch
    from torch.nn.parallel import DistributedDataParallel
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    shape = SHAPES[name][:4] + (batch, SHAPES[name][5])
    result = torch_run(kind, shape, steps, lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True))
    if torch.distributed.get_rank() == 0:
        print("result", json.dumps(result), flush=True)
    torch.distributed.destroy_process_group()


def ddp_run(kind, name, shape, steps, gpus):
    """torch_run's of `gpus` processes that share the batch"""
    if shape[4] % gpus:
        return None, f"a batch of {shape[4]} does not divide"
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", gpus, __file__, "--steps", steps, "--rank", kind, name,
             shape[4] // gpus]
    done = subprocess.run([sys.executable] + [str(word) for word in words], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    errors = [line.strip() for line in done.stderr.splitlines() if "Error" in line] or ["no result"]
    return json.loads(lines[-1][7:]) if lines else (None, errors[0][:80])


def untrained(program, shape, folder):
    """path of a checkpoint of this shape, after one step"""
    D, L, H, V, _, _ = shape
    data, out = os.path.join(folder, "ids.bin"), os.path.join(folder, "out.safetensors")
    write_shard(data, V, 1000)
    train = [program, "--data", data, "--vocab", V, "--dim", D, "--layers", L, "--heads", H, "--seq", 64, "--batch", 1, "--steps", 1,
             "--eval-batches", 1, "--out", out]
    subprocess.run([str(word) for word in train], capture_output=True, check=True)
    return out


def program_decode(program, checkpoint, V, prompt, n, samples=1):
    """(ms, texts) of a step of the program's --generate, a token of each of so many texts; the median: the sampler is in it"""
    ids = " ".join(str(i) for i in np.random.default_rng(1).integers(V, size=prompt))
    command = [program, "--load", checkpoint, "--generate", str(n), "--window", "0", "--prompt", ids, "--samples", str(samples)]
    with tempfile.TemporaryFile() as told, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told) as run:
        times, size, of_first = [], 0, 0
        while piece := os.read(run.stdout.fileno(), 1 << 20):
            size += len(piece)
            of_first = of_first or b"\n" in piece  # the first text is printed as it grows, the others are there when it ends
            if size > len(ids) and not of_first:  # the prompt comes first
                times.append(time.perf_counter())
        told.seek(0)
        fewer = re.search(rb"([0-9]+) of [0-9]+ texts are generated together", told.read())
    return 1e3 * statistics.median(b - a for a, b in zip(times, times[1:])), int(fewer.group(1)) if fewer else samples


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


def bench_generation(program, no_torch, names, prompts, samples):
    print("| shape | prompt | program | texts | ms a step | tok/s |\n|---|---|---|---|---|---|")
    row = lambda name, prompt, what, texts, ms: print(f"| {name} | {prompt} | {what} | {texts} | {ms:.3f} | {1e3 * texts / ms:,.0f} |", flush=True)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = untrained(program, SHAPES[name], folder)
            for prompt in prompts:
                for asked in samples:
                    ms, texts = program_decode(program, checkpoint, SHAPES[name][3], prompt, 256 if asked == 1 else 64, asked)
                    row(name, prompt, os.path.basename(program), texts, ms)
                if not no_torch:
                    row(name, prompt, "sessa.py, bf16, cache", 1, torch_decode(SHAPES[name], prompt, 64))


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
    parser.add_argument("--gpus", nargs="+", type=int, default=[1], help="how many take part [1]")
    parser.add_argument("--scaling", choices=["weak", "strong"], default="weak", help="the batch is a GPU's, or that of all [weak]")
    parser.add_argument("--rank", nargs=3, metavar=("MODEL", "SHAPE", "BATCH"), help="one process of several, for torchrun")
    parser.add_argument("--no-torch", action="store_true", help="this program alone")
    parser.add_argument("--generate", action="store_true", help="time generation, not training")
    parser.add_argument("--samples", nargs="+", type=int, default=[1, 8, 64, 256], help="with --generate: texts together [1 8 64 256]")
    parser.add_argument("--prompts", nargs="+", type=int, default=[1000, 8000], help="with --generate: tokens behind which they go on [1000 8000]")
    parser.add_argument("--program", default=os.path.join(here, "..", "..", "train_sessacu"))
    o = parser.parse_args()
    if o.rank:
        return torch_rank(o.rank[0], o.rank[1], int(o.rank[2]), o.steps)
    rate, card = 0, "a GPU"
    try:
        rate, card = product_rate()
    except ImportError:
        o.no_torch = True
    if o.generate:
        print(card)
        names = [name for name in o.shapes if name in ("small", "medium")]
        return bench_generation(o.program, o.no_torch, names, o.prompts, o.samples)
    print(f"{card}, bf16 product {rate:.0f} TFLOP/s\n\n| shape | program | ms a step | tok/s | GiB | share of the product rate |\n|---|---|---|---|---|---|")
    for name in o.shapes:
        for gpus in o.gpus:
            bench_shape(o, name, gpus, rate)


def bench_shape(o, name, gpus, rate):
    D, L, H, V, B, T = SHAPES[name]
    B *= gpus if o.scaling == "weak" else 1
    shape, parameters, depth = (D, L, H, V, B, T), parameters_of(D, L, V), depth_of(SHAPES[name])
    work = 6 * parameters + 14 * T * D * L
    peer = lambda kind: torch_run(kind, shape, o.steps) if gpus == 1 else ddp_run(kind, name, shape, o.steps, gpus)
    runs = [(f"train_sessacu {p}", lambda p=p: program_run(o.program, shape, p, o.steps, gpus), work) for p in o.precisions]
    if not o.no_torch:
        runs.append(("sessa.py, compiled bf16", lambda: peer("sessa"), work))
        runs.append((f"gpt.py, {depth} blocks, compiled bf16", lambda: peer("gpt"),
                     6 * (V * D + T * D + 12 * depth * D * D) + 7 * T * D * depth))
    for what, run, flops in runs:
        what += f", {gpus} GPUs" if gpus > 1 else ""
        ms, memory = run()
        if ms is None:
            print(f"| {name} | {what} | {memory} | | | |", flush=True)
        else:
            share = f"{100 * flops * B * T / (1e9 * ms) / rate / gpus:.0f} %" if rate else ""
            print(f"| {name} | {what} | {ms:.2f} | {1e3 * B * T / ms:,.0f} | {memory:.2f} | {share} |", flush=True)


if __name__ == "__main__":
    main()
