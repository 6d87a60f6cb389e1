"""Fuzzing of the readers of train_sessa.c: builds fuzz.c and runs it.

    python3 dev/trust/fuzz.py replay                      every input of corpus.tar.xz once (gcc, sanitizers; seconds)
    python3 dev/trust/fuzz.py run 50e6 [--targets ...]    that many new executions (clang's libFuzzer), over all targets by weight
    python3 dev/trust/fuzz.py merge                       corpus.tar.xz anew: the least inputs that reach all

Runs keep their inputs in --work; a run goes on from there, or from the archive and from seeds made of real files. The
executions of every run are added up in WORK/executions.json.
"""

import argparse
import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
ARCHIVE = os.path.join(HERE, "corpus.tar.xz")
# name: share of the executions, longest input
TARGETS = {"safetensors": (5, 1024), "header": (5, 2048), "metadata": (3, 1024), "data": (3, 1200), "options": (4, 512),
           "prompt": (1, 400), "log": (1, 800), "words": (2, 600)}
CHECKS = ["-g", "-O1", "-fno-omit-frame-pointer", "-Wno-unused-function", "-Wno-unknown-pragmas", "-fno-sanitize-recover=all"]


def build(work, replay):
    program = os.path.join(work, "replay" if replay else "fuzz")
    compiler = (["gcc", "-DREPLAY", "-fsanitize=address,undefined,float-cast-overflow"] if replay else
                ["clang", "-fsanitize=fuzzer,address,undefined,float-cast-overflow"])
    subprocess.run(compiler + CHECKS + [os.path.join(HERE, "fuzz.c"), "-o", program, "-lm"], check=True)
    return program


def unpack(work):
    """The archive's inputs into work/TARGET/; those that are there stay."""
    for target in TARGETS:
        os.makedirs(os.path.join(work, target), exist_ok=True)
    if os.path.exists(ARCHIVE):
        with tarfile.open(ARCHIVE) as archive:
            for member in archive:
                target, name = member.name.split("/")
                with open(os.path.join(work, target, name), "wb") as out:
                    out.write(archive.extractfile(member).read())


def example_set(path, dtype="I32", n=3, t=4, lags=False, meta=None):
    names = ["inputs", "targets"] + (["lags"] if lags else [])
    code = {"I8": "b", "U8": "B", "I16": "h", "U16": "H", "I32": "i", "U32": "I", "I64": "q", "U64": "Q"}[dtype]
    header, data = ({"__metadata__": meta} if meta else {}), b""
    for k, name in enumerate(names):
        values = [(i * 7 + k) % 5 for i in range(n * t)]
        if name == "targets" and dtype[0] == "I":
            values[::3] = [-1] * len(values[::3])
        raw = struct.pack("<%d%s" % (n * t, code), *values)
        header[name] = {"dtype": dtype, "shape": [n, t], "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text + data)


def make_seeds(work):
    """Seeds of real files: tiny checkpoints and logs of the program itself, example sets, shards, texts, command lines."""
    subprocess.run(["make", "-s", "train_sessa"], cwd=ROOT, check=True)
    program, here = os.path.join(ROOT, "train_sessa"), os.path.join(work, "seeds")
    os.makedirs(here, exist_ok=True)

    def put(target, name, content):
        with open(os.path.join(work, target, "seed-" + name), "wb") as out:
            out.write(content)

    text = b"ab\nab b" * 6
    with open(os.path.join(here, "text"), "wb") as out:
        out.write(text)
    files = {}
    for mixer in ("sessa", "attention", "mamba2"):
        extra = ["--head-dim", "2", "--state-dim", "1"] if mixer == "mamba2" else []
        model = ["--mixer", mixer, "--dim", "2", "--heads", "1", "--layers", "1", "--seq", "3"] + extra
        run = ["--batch", "1", "--steps", "2", "--overwrite", "--out", mixer + ".safetensors", "--log", "log"]
        command = [program, "--data", "text"] + model + run
        subprocess.run(command, cwd=here, check=True, stdout=subprocess.DEVNULL)
        for kind in ("", ".best"):
            files[mixer + kind] = open(os.path.join(here, mixer + kind + ".safetensors"), "rb").read()
    for dtype in ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"):
        name = os.path.join(here, dtype + ".safetensors")
        example_set(name, dtype, lags=dtype == "I16", meta={"vocab_size": "9"} if dtype == "U8" else None)
        files[dtype] = open(name, "rb").read()
    for name, content in files.items():
        length = struct.unpack("<Q", content[:8])[0]
        put("header", name, struct.pack("<H", length) + content[8:])
        if length < 1000:
            put("safetensors", name, content)
        if name[0] in "IU":
            put("data", name, bytes([2 + 8, 0]) + content)
            put("data", name + "-two", bytes([1 + 2, 128]) + content + content)
        else:
            meta = json.loads(content[8:8 + length])["__metadata__"]
            put("metadata", name, "\n".join("%s=%s" % pair for pair in sorted(meta.items())).encode())
    shard = struct.pack("<3i", 20240520, 1, 30) + struct.pack("<30H", *range(30))
    put("data", "shard", b"\0\0" + shard)
    put("data", "shard-vocab", b"\x10\5" + shard)
    put("data", "shard-two", b"\x41\x80" + shard + shard)
    wide = struct.pack("<3i", 20240801, 7, 30) + struct.pack("<30I", *range(30))
    put("data", "shard-wide", b"\0\0" + wide)
    put("data", "shard-wide-two", b"\x41\x80" + wide + wide)
    put("data", "text", b"\x20\0" + text)
    put("data", "text-two", b"\x21\x80" + text + text)
    put("log", "log", b"\4" + open(os.path.join(here, "log"), "rb").read())
    put("prompt", "text", b"\x08\1\3\x10\x80\7" + struct.pack("<8f", *range(8)) + b"\1\4\7")
    put("prompt", "ids", b"\x3f\0\0\x10\xff\7" + struct.pack("<64f", *range(64)) + b"3 14 15")
    merges = struct.pack("<6h", 97, 98, 256, 99, 32, 97)
    put("words", "words", b"\3\3\3" + b"\2\3\2" + merges + b"ababc a" * 2 + b" 12345 ...\n\n  x")
    put("words", "bare", b"\0\3\0" + b"\2\0\3" + b"ababc")
    lines = ["--data my.txt --dim 256 --layers 6 --seq 256 --out my.safetensors", "--load x --generate 500 --prompt Once --temperature 0.8",
             "--resume x --steps 4000", "--mixer mamba2 --head-dim 32 --state-dim 16 --dim 64", "--seq=1 --batch=1 --vocab=1 --dim=2 --heads=1",
             "--load x --data y --eval", "--lr 3e-3 --min-lr 1e-4 --warmup 100 --decay-steps 1000 --beta1 .9 --beta2 .99 --eps 1e-8",
             "--weight-decay 0.1 --clip 1 --dropout 0.2 --seed 1337 --accum 2 --kv-heads 1", "--top-k 5 --top-p 0.9 --window 0",
             "--eval-every 250 --eval-batches 20 --sample-every 0 --log l --save-every 7", "--vocab 16777216 --dim 65536 --layers 64 --heads 32768"]
    for i, line in enumerate(lines):
        put("options", str(i), line.replace(" ", "\n").encode())
    help_text = subprocess.run([program, "--help"], stdout=subprocess.PIPE, check=True).stdout.decode()
    words = {"options": re.findall(r"^  (--[a-z0-9-]+)", help_text, re.M) + ["sessa", "attention", "mamba2", "1e9", "nan", "-1"],
             "header": ['"__metadata__":{', '"dtype":"', '"shape":[', '"data_offsets":[', '"inputs":{', '"targets":{', '"lags":{', "\\u0000",
                        "\\ud83d\\ude00", '"tokenizer.bytes"', "9223372036854775807", "4611686018427387904", "F32", "BF16", "U8", "I64", "F4",
                        '"vocab_size":"', "exp_avg."],
             "metadata": sorted({key + "=" for name in files if name[0] not in "IU" for key in
                                 json.loads(files[name][8:8 + struct.unpack("<Q", files[name][:8])[0]])["__metadata__"]}) + ["1e12", "16777216", "mamba2"],
             "log": ['{"step": ', "\n", "9223372036854775808"],
             "data": [struct.pack("<i", 20240520).decode("latin1")], "prompt": [" "], "words": [" "]}
    words["safetensors"] = words["header"]
    for target, list_of in words.items():
        with open(os.path.join(here, target + ".dict"), "w") as out:
            for word in list_of:
                out.write('"%s"\n' % "".join("\\x%02x" % ord(c) for c in word))


def executions(work, target, log):
    """Adds what the run in this log executed to the tally; returns the number."""
    text = open(log, errors="replace").read()
    numbers = re.findall(r"^#(\d+)\s", text, re.M) + re.findall(r"number_of_executed_units:\s*(\d+)", text)
    done = max(map(int, numbers), default=0)
    path = os.path.join(work, "executions.json")
    tally = json.load(open(path)) if os.path.exists(path) else {}
    tally[target] = tally.get(target, 0) + done
    json.dump(tally, open(path, "w"))
    return done


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["replay", "run", "merge"])
    parser.add_argument("executions", nargs="?", type=float, default=1e6)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--work", default="/tmp/sessa-fuzz")
    options = parser.parse_args()
    work, targets = os.path.abspath(options.work), options.targets.split(",")
    os.makedirs(work, exist_ok=True)
    unpack(work)
    program = build(work, options.what == "replay")
    environment = dict(os.environ, ASAN_OPTIONS="detect_leaks=1:allocator_may_return_null=1:malloc_context_size=3:quarantine_size_mb=16", UBSAN_OPTIONS="print_stacktrace=1")
    failed = 0

    if options.what == "replay":
        for target in targets:
            folder = os.path.join(work, target)
            inputs = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
            for first in range(0, len(inputs), 1000):
                failed |= subprocess.run([program] + inputs[first:first + 1000], env=dict(environment, TARGET=target)).returncode
        sys.exit(1 if failed else 0)

    make_seeds(work)
    total = sum(TARGETS[target][0] for target in targets)
    for target in targets:
        environment["TARGET"] = target
        folder, log = os.path.join(work, target), os.path.join(work, target + ".log")
        if options.what == "merge":
            merged = folder + ".merged"
            subprocess.run(["rm", "-rf", merged])
            os.makedirs(merged)
            subprocess.run([program, "-merge=1", "-max_len=%d" % TARGETS[target][1], merged, folder], env=environment, check=True,
                           stdout=subprocess.DEVNULL, stderr=open(log, "w"))
            print("%-12s %d inputs of %d" % (target, len(os.listdir(merged)), len(os.listdir(folder))), flush=True)
            continue
        runs = int(options.executions * TARGETS[target][0] / total)
        with open(log, "w") as out:
            code = subprocess.run([program, "-runs=%d" % runs, "-max_len=%d" % TARGETS[target][1], "-timeout=5", "-rss_limit_mb=2000",
                                   "-malloc_limit_mb=1000", "-print_final_stats=1", "-reload=0", "-artifact_prefix=%s/found-%s-" % (work, target),
                                   "-dict=%s/seeds/%s.dict" % (work, target), folder], env=environment, stdout=out, stderr=out).returncode
        failed |= code
        print("%-12s %11d executions%s" % (target, executions(work, target, log), ", A FINDING: " + log if code else ""), flush=True)

    if options.what == "merge":
        with tarfile.open(ARCHIVE, "w:xz") as archive:
            for target in TARGETS:
                merged = os.path.join(work, target + ".merged")
                for name in sorted(os.listdir(merged)) if os.path.isdir(merged) else []:
                    content = open(os.path.join(merged, name), "rb").read()
                    member = tarfile.TarInfo(target + "/" + name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        print("%s: %d bytes" % (os.path.basename(ARCHIVE), os.path.getsize(ARCHIVE)))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
