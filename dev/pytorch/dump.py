"""Writes a reference dump: weights, one batch, every activation, every gradient and the losses of a few AdamW steps,
computed in float64 from weights that float32 holds exactly and rounded once, for ./test_sessa FILE to check.

  dev/pytorch/dump.py my_dump.safetensors --dim 64 --heads 4 --kv-heads 2 --layers 3 --seq 100
  dev/pytorch/dump.py my_dump.safetensors --mixer mamba2 --mamba-head-dim 16 --mamba-state-dim 8
  dev/pytorch/dump.py --committed        # data/ref_sessa, ref_one_head, ref_no_rope, ref_attention, ref_mamba2
"""
import argparse
import copy
import json
import os
import struct

import torch

from sessa import Config, Sessa, configure_adamw, metadata_of

HYPER = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "grad_clip": 2.5}


def save(path, tensors, metadata):
    """A safetensors file of F32 and I32 tensors. Unlike the library's, its bytes depend on nothing but its content."""
    header, offset = {"__metadata__": {key: str(value) for key, value in sorted(metadata.items())}}, 0
    for name, x in sorted(tensors.items()):
        header[name] = {"dtype": {torch.float32: "F32", torch.int32: "I32"}[x.dtype], "shape": list(x.shape),
                        "data_offsets": [offset, offset + 4 * x.numel()]}
        offset += 4 * x.numel()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)     # so that the data is aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, x in sorted(tensors.items()):
            array = x.numpy()
            file.write(array.astype(array.dtype.newbyteorder("<")).tobytes())


def write_dump(path, model, inputs, targets, hyper=HYPER, n_losses=5):
    """Dumps `model`, which is left as it was, on inputs and targets (B,T). n_losses 0: no optimiser steps, and no `losses`."""
    c = model.config
    tensors = {name: p.detach().float().clone() for name, p in model.state_dict().items()}
    model = copy.deepcopy(model).float().double().eval()        # the weights as float32 holds them
    model.make_rope(c.max_seq_len)                              # and tables that were never rounded
    optimizer = configure_adamw(model, hyper["learning_rate"], (hyper["beta1"], hyper["beta2"]), hyper["eps"], hyper["weight_decay"])
    acts, losses = {}, []
    for step in range(max(n_losses, 1)):
        _, loss = model(inputs, targets, acts=acts if step == 0 else None)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            tensors.update({f"grad.{name}": p.grad.clone() for name, p in model.named_parameters()})
        if hyper["grad_clip"] > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), hyper["grad_clip"])
        optimizer.step()
    tensors.update({f"act.{name}": x.detach() for name, x in acts.items()})
    if n_losses:
        tensors["losses"] = torch.stack(losses)
    tensors = {name: x.float() for name, x in tensors.items()}
    if not all(x.isfinite().all() for x in tensors.values()):
        raise ValueError("the dump would hold a number that is not finite")
    tensors.update(inputs=inputs.int(), targets=targets.int())
    metadata = {**metadata_of(c), **hyper, "batch_size": inputs.shape[0], "seq_len": inputs.shape[1]}
    save(path, tensors, metadata)
    return losses


def lively_model(config, seed=0):
    """A model at its initial values, shaken so that no parameter sits at 0 or 1 and every gradient matters."""
    torch.manual_seed(seed)
    model = Sessa(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "wte.weight":
                p.normal_(std=2 / config.d_model ** 0.5)
            elif ".ln." in name or name.startswith("ln_f.") or name.endswith(("mixer.D", "norm.weight")):
                p.add_(0.2 * torch.randn_like(p))
            elif name.endswith("gamma_ctx.weight"):     # γ of both signs and many sizes
                p.copy_(4 * torch.randn_like(p) / config.d_model ** 0.5)
            elif name.endswith("gamma_bias"):
                p.fill_(0.7 + 0.1 * torch.randn(()).item())
            elif name.endswith(("q_proj.weight", "k_proj.weight", "proj_fb.weight")):   # looks at some positions more than at others
                p.mul_(3)
            elif name.endswith("in_proj.weight"):       # steps that depend on the input, products of both signs
                p.mul_(2)
            elif name.endswith("dt_bias"):              # long steps: much is forgotten within the sequence, and some is not
                p.add_(2)
    return model


def random_batch(config, B, T, ignored, seed=1):
    """Random ids (B,T); a part `ignored` of the targets is -1."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (B, T + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[torch.rand(B, T, generator=generator) < ignored] = -1
    return ids[:, :-1].contiguous(), targets


COMMITTED = {   # name: (configuration, B, T, part of the targets that is ignored, clip: some steps' norms are above, some below)
    "ref_sessa": (Config(23, 16, 2, n_heads=4, n_kv_heads=2, max_seq_len=40), 2, 29, 0.2, 3.0),
    "ref_one_head": (Config(17, 12, 2, n_heads=1, max_seq_len=19, gamma_max=0.9), 2, 19, 0.0, 2.25),
    "ref_no_rope": (Config(13, 12, 2, n_heads=2, n_kv_heads=1, max_seq_len=21, no_rope=True), 2, 21, 0.1, 2.5),
    "ref_attention": (Config(19, 16, 2, n_heads=2, n_kv_heads=1, max_seq_len=18, mixer="attention"), 2, 18, 0.3, 3.1),
    # three heads; T is no multiple of a chunk, whatever the chunk
    "ref_mamba2": (Config(21, 12, 2, n_heads=1, max_seq_len=37, mixer="mamba2", mamba_head_dim=8, mamba_state_dim=10), 2, 37, 0.2, 3.0),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--committed", action="store_true", help="write the dumps of data/")
    for name, default in (("vocab", 23), ("dim", 16), ("layers", 2), ("heads", 4), ("kv-heads", 0), ("seq", 37), ("batch", 2),
                          ("losses", 5), ("seed", 0), ("mamba-head-dim", 0), ("mamba-state-dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    parser.add_argument("--mixer", default="sessa", choices=("sessa", "attention", "mamba2"))
    parser.add_argument("--no-rope", action="store_true", help="attention without RoPE")
    parser.add_argument("--gamma-max", type=float, default=0.999)
    parser.add_argument("--ignored", type=float, default=0.2, help="part of the targets that is -1 [0.2]")
    for name, value in {**HYPER, "learning_rate": 0.003}.items():   # wide models at 0.01 would magnify rounding errors
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=value, help=f"[{value}]")
    o = parser.parse_args()
    if o.committed == bool(o.file):
        parser.error("give a file to write, or --committed")
    if o.committed:
        here = os.path.dirname(os.path.abspath(__file__))
        folder = os.path.normpath(os.path.join(here, "..", "..", "data"))
        jobs = {os.path.join(folder, f"{name}.safetensors"): job for name, job in COMMITTED.items()}
        hyper, n_losses, seed = HYPER, 5, 0
    else:
        config = Config(o.vocab, o.dim, o.layers, o.heads, o.kv_heads, o.seq, o.gamma_max, o.mixer,
                        mamba_head_dim=o.mamba_head_dim, mamba_state_dim=o.mamba_state_dim, no_rope=o.no_rope)
        jobs = {o.file: (config, o.batch, o.seq, o.ignored, o.grad_clip)}
        hyper, n_losses, seed = {name: getattr(o, name) for name in HYPER}, o.losses, o.seed
    for path, (config, B, T, ignored, clip) in jobs.items():
        batch = random_batch(config, B, T, ignored, seed + 1)
        losses = write_dump(path, lively_model(config, seed), *batch, {**hyper, "grad_clip": clip}, n_losses)
        print(f"{path}: {os.path.getsize(path)} bytes, losses", " ".join(f"{x.item():.6f}" for x in losses))


if __name__ == "__main__":
    main()
