"""The C program's first training steps, done again in PyTorch in float64 from the same weights: order of the data, dropout,
accumulation, learning rates, clipping and AdamW must give the losses and gradient norms of its log.

  dev/pytorch/check_training.py sessa.safetensors --data data/tinyshakespeare.txt --program ./train_sessa
"""
import argparse
import json
import math
import os
import subprocess
import sys
import tempfile

import numpy as np
import torch

from sessa import GOLDEN, WORD, configure_adamw, load_checkpoint, splitmix

SETTINGS = {"steps": 8, "batch": 4, "accum": 2, "warmup": 3, "lr": 3e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8,
            "weight-decay": 0.1, "clip": 0.7, "dropout": 0.2, "seed": 77}


def program_log(program, checkpoint, data):
    """The lines of the C program's log."""
    with tempfile.TemporaryDirectory() as folder:
        log = os.path.join(folder, "log.jsonl")
        command = [program, "--load", checkpoint, "--data", data, "--eval-every", "0", "--log", log, "--out",
                   os.path.join(folder, "out.safetensors")]
        command += [text for name, value in SETTINGS.items() for text in ("--" + name, str(value))]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            sys.exit(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}\nFAIL")
        with open(log) as lines:
            return [json.loads(line) for line in lines]


def places(seed, n):
    """Where the training sequences start, in 0..n-1: a random start, then steps of the golden ratio."""
    state = splitmix(seed) ^ splitmix(1)
    while True:
        yield int((state >> 11) * 2.0**-53 * n)
        state = (state + GOLDEN) & WORD


def learning_rate(step, lr, warmup, steps):
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr / 10 + (lr - lr / 10) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def train(model, tokens):
    """(loss, gradient norm, learning rate) of each step"""
    o, T = SETTINGS, model.config.max_seq_len
    start = places(o["seed"], len(tokens) * 9 // 10 - T)
    optimizer = configure_adamw(model, o["lr"], (o["beta1"], o["beta2"]), o["eps"], o["weight-decay"])
    for step in range(o["steps"]):
        lr, total = learning_rate(step, o["lr"], o["warmup"], o["steps"]), 0.0
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        windows = torch.stack([tokens[i:i + T + 1] for _, i in zip(range(o["batch"] * o["accum"]), start)])
        for micro, ids in enumerate(windows.split(o["batch"])):     # equal numbers of targets: the mean of means is the mean
            loss = model(ids[:, :-1], ids[:, 1:], micro_step=step * o["accum"] + micro)[1] / o["accum"]
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o["clip"]).item()
        optimizer.step()
        yield total, norm, lr


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of a character model")
    parser.add_argument("--data", required=True, help="text")
    parser.add_argument("--program", required=True)
    o = parser.parse_args()
    model, config, _ = load_checkpoint(o.checkpoint)
    model.double().train()
    config.dropout, config.seed = SETTINGS["dropout"], SETTINGS["seed"]
    ids = np.full(256, -1, dtype=np.int64)
    ids[list(model.tokenizer or b"")] = np.arange(len(model.tokenizer or b""))
    tokens = torch.from_numpy(ids[np.fromfile(o.data, dtype=np.uint8)])
    if tokens.min() < 0:
        sys.exit(f"{o.data} is no text of the model's vocabulary\nFAIL")
    worst = 0.0
    print("step        loss      in C        norm      in C          lr      in C")
    for step, (row, ours) in enumerate(zip(program_log(o.program, o.checkpoint, o.data), train(model, tokens), strict=True), 1):
        theirs = row["train_loss"], row["grad_norm"], row["lr"]
        worst = max([worst] + [abs(a - b) / abs(b) for a, b in zip(theirs, ours)])
        print(f"{step:4d}  " + "  ".join(f"{b:10.7f} {a:10.7f}" for a, b in zip(theirs, ours)))
    ok = worst <= 1e-4
    print(f"{'OK' if ok else 'FAIL'}: worst relative error {worst:.1e}, bound 1e-4")
    sys.exit(not ok)


if __name__ == "__main__":
    main()
