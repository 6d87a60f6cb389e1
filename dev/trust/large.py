"""Sizes past 2^31: logits, weights, text. Each is really run, in a build that stops at any integer overflow.

    python3 dev/trust/large.py [logits weights text]

Takes 20 GiB of memory, as much of the disk (sparse files, in the folder of --work) and some minutes.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
failed = 0


def check(ok, what, detail=""):
    global failed
    failed += not ok
    print("  %-100s %s" % (what, "ok" if ok else "FAIL\n" + detail), flush=True)


def run(program, line):
    done = subprocess.run([program] + line.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return done.returncode, done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")


def logits(program, folder):
    """33024 tokens of 65536 logits, in one batch and in two halves whose products stay below 2^31: the same step."""
    tokens = [(i * 48271) % 65536 for i in range(200000)]
    for name, n in (("train.bin", len(tokens)), ("val.bin", 100)):
        with open(folder + "/" + name, "wb") as out:
            out.write(struct.pack("<3i", 20240520, 1, n).ljust(1024, b"\0") + struct.pack("<%dH" % n, *tokens[:n]))
    logs = []
    for name, batch, accum in (("whole", 516, 1), ("halves", 258, 2)):
        code, text = run(program, "--data %s/train.bin --val %s/val.bin --vocab 65536 --dim 4 --heads 1 --layers 1 --seq 64 --batch %d --accum %d "
                         "--steps 2 --warmup 1 --eval-every 0 --overwrite --log %s/%s.log --out %s/l.safetensors" % (folder, folder, batch, accum, folder, name, folder))
        check(code == 0, "%d sequences of 64 tokens, V 65536: %.2f · 2^31 logits" % (batch, batch * 64 * 65536 / 2**31), text)
        logs.append([json.loads(line) for line in open("%s/%s.log" % (folder, name))] if code == 0 else [])
    off = max([abs(x[key] - y[key]) / x[key] for x, y in zip(*logs) for key in ("train_loss", "grad_norm")], default=1)
    check(off < 1e-5, "losses and gradient norms of both: off by %.1e" % off)


def weights(program, folder):
    """An embedding of 2^24 × 130 numbers, all zero but in the last row, which must win."""
    V, D = 1 << 24, 130
    shapes = {"wte.weight": [V, D], "layers.0.ln.weight": [D], "layers.0.ln.bias": [D], "layers.0.W_in.weight": [2 * D, D], "layers.0.W_in.bias": [2 * D],
              "layers.0.mixer.gamma_bias": [], "layers.0.mixer.gamma_ctx.weight": [1, D], "layers.0.W_out.weight": [D, D], "layers.0.W_out.bias": [D],
              "ln_f.weight": [D], "ln_f.bias": [D]}
    for name, rows in (("q_proj", D), ("k_proj", D), ("v_proj", D), ("proj_fb", 2 * D)):
        shapes["layers.0.mixer.%s.weight" % name], shapes["layers.0.mixer.%s.bias" % name] = [rows, D], [rows]
    header, at = {"__metadata__": {"vocab_size": str(V), "d_model": str(D), "n_layers": "1", "n_heads": "1", "n_kv_heads": "1",
                                   "max_seq_len": "8", "gamma_max": "0.999", "mixer": "sessa"}}, 0
    for name, shape in shapes.items():
        size = 4
        for d in shape:
            size *= d
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(folder + "/weights.safetensors", "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        base = out.tell()
        for name, row in (("wte.weight", (V - 1) * D * 4), ("ln_f.bias", 0)):
            out.seek(base + header[name]["data_offsets"][0] + row)
            out.write(struct.pack("<f", 1))
        out.truncate(base + at)
    code, text = run(program, "--load %s/weights.safetensors --generate 3 --temperature 0 --prompt 16777215" % folder)
    check(code == 0 and text.split() == ["16777215"] * 4, "an embedding of %.2f · 2^31 numbers, a file of %.1f GB: read, the last row is the likeliest" % (V * D / 2**31, at / 1e9), text)
    os.unlink(folder + "/weights.safetensors")


def text(program, folder):
    size = 2**31 + 10**8
    with open(folder + "/text", "wb") as out:
        out.seek(size - 100)
        out.write(b"ab" * 50)
    with open(folder + "/val", "wb") as out:
        out.write(b"ab" * 50)
    code, said = run(program, "--data %s/text --val %s/val --dim 4 --heads 1 --layers 1 --seq 16 --batch 64 --steps 3 --eval-every 0 --out %s/t.safetensors" % (folder, folder, folder))
    check(code == 0, "a text of %.2f · 2^31 bytes: trained on" % (size / 2**31), said)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["logits", "weights", "text"])
    parser.add_argument("--work", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        program = folder + "/train_sessa"
        subprocess.run(["gcc", "-O2", "-fsanitize=undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-march=native", "-fopenmp", "-ffast-math",
                        "-fno-finite-math-only", "-w", ROOT + "/train_sessa.c", "-o", program, "-lm"], check=True)
        for name in options.what:
            {"logits": logits, "weights": weights, "text": text}[name](program, folder)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
