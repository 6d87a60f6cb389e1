"""Holds a checkpoint of the C program against PyTorch: it must load there as it is, give the validation loss that the program
prints, and, through a dump made of its own weights, every activation, logit and gradient.

  dev/pytorch/check_checkpoint.py sessa.safetensors --data data/tinyshakespeare.txt --program ./train_sessa --test ./test_sessa
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile

import numpy as np
import torch
from safetensors.numpy import load_file

from dump import write_dump
from sessa import load_checkpoint

SHARD_MAGIC, SHARD_HEADER = 20240520, 256


def read_windows(path, whole, tokenizer, T):
    """(inputs, targets), each (N,T): the validation sequences of a text, a token shard or a set of examples, the last tenth of
    it unless `whole`."""
    if path.endswith(".safetensors"):
        examples = load_file(path)
        inputs, targets = (torch.from_numpy(examples[name].astype(np.int64)) for name in ("inputs", "targets"))
        start = 0 if whole else len(inputs) * 9 // 10
        return inputs[start:], targets[start:]
    raw = np.fromfile(path, dtype=np.uint8)
    header = raw[:4 * SHARD_HEADER]
    if header.size == 4 * SHARD_HEADER and header.view("<i4")[0] == SHARD_MAGIC:
        tokens = raw[4 * SHARD_HEADER:].view("<u2")[:header.view("<i4")[2]].astype(np.int64)
    else:
        if tokenizer is None:
            sys.exit(f"{path} is text, but the model's tokens are ids")
        ids = np.full(256, -1, dtype=np.int64)
        ids[list(tokenizer)] = np.arange(len(tokenizer))
        tokens = ids[raw]
        if tokens.min() < 0:
            sys.exit(f"{path}: the model's vocabulary lacks byte {raw[tokens.argmin()]}, at {tokens.argmin()}")
    tokens = torch.from_numpy(tokens[0 if whole else len(tokens) * 9 // 10:])
    n = (len(tokens) - 1) // T
    if n < 1:
        sys.exit(f"{path}: the validation split holds {len(tokens)} tokens, fewer than {T + 1}")
    return tokens[:n * T].view(n, T), tokens[1:n * T + 1].view(n, T)


@torch.no_grad()
def validation_loss(model, inputs, targets, tokens_at_once=4096):
    """Mean loss over all targets ≥ 0, in float64."""
    total, count = 0.0, 0
    rows = max(tokens_at_once // inputs.shape[1], 1)
    for x, y in zip(inputs.split(rows), targets.split(rows)):
        n = int((y >= 0).sum())
        total += model(x, y)[1].item() * n
        count += n
    return total / max(count, 1)


def run(*command):
    """The standard output of a program that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        sys.stdout.write(done.stdout[-4000:])
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}\nFAIL")
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, help="text, token shard or examples; the last tenth validates")
    parser.add_argument("--val", help="validation data, all of it")
    parser.add_argument("--program", help="./train_sessa: compare its validation loss")
    parser.add_argument("--test", action="append", default=[],
                        help="./test_sessa, ./test_sessa64 or both: compare every activation and gradient")
    o = parser.parse_args()

    model, config, _ = load_checkpoint(o.checkpoint)
    model.double().eval()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{o.checkpoint}: {config.mixer}, D {config.d_model}, L {config.n_layers}, H {config.n_heads}, G {config.n_kv_heads}, "
          f"V {config.vocab_size}, T {config.max_seq_len}, {parameters} parameters")
    if not all(p.isfinite().all() for p in model.parameters()):
        sys.exit("FAIL: a weight is not finite")

    inputs, targets = read_windows(o.val or o.data, bool(o.val), model.tokenizer, config.max_seq_len)
    ours = validation_loss(model, inputs, targets)
    print(f"validation loss in PyTorch, float64: {ours:.8f} over {len(inputs)} sequences")
    ok = True
    if o.program:
        val = ("--val", o.val) if o.val else ()
        said = run(o.program, "--eval", "--load", o.checkpoint, "--data", o.data, *val)
        theirs = float(re.search(r"^val_loss (\S+)", said, re.M)[1])
        error = abs(theirs - ours) / max(abs(ours), 1e-30)
        ok = error <= 1e-5
        print(f"validation loss of {o.program}: {theirs:.8f}, relative error {error:.1e}, bound 1e-5: {'ok' if ok else 'FAIL'}")
    if o.test:
        T = min(64, inputs.shape[1])
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "checkpoint_dump.safetensors")
            write_dump(path, model, inputs[:2, :T], targets[:2, :T], n_losses=0)
            for test in o.test:
                print(f"{test}:", run(test, "--trained", path).strip().splitlines()[-1])
    print("OK: the checkpoint is the same model in PyTorch" if ok else "FAIL")
    sys.exit(not ok)


if __name__ == "__main__":
    main()
