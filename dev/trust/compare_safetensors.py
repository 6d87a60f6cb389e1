"""The reader of train_sessa.c against the safetensors library of Python, on files mutated from real ones: both must agree
on what is valid. Where they differ, ours must be the stricter one, and the reason one of the four named below.

    dev/.venv/bin/python dev/trust/compare_safetensors.py [--files 10000] [--seed 1]
"""

import argparse
import collections
import json
import os
import random
import struct
import subprocess
import sys
import tempfile

import safetensors
from safetensors import deserialize

HERE = os.path.dirname(os.path.abspath(__file__))

TWICE = "a name stands there twice: the library takes the last one and forgets the rest, another reader would take the first"
SPACE = "the header does not begin with '{': the format asks for it, the library's JSON reader skips white space"
FIELD = "a tensor has a field of an unknown name, which may change what its data means: the library ignores it"
LARGE = "an empty tensor has a dimension above 2^63-1, which no signed 64-bit number holds"


def difference(content):
    """Why ours refuses what the library takes, found without either of them; None: no reason is known."""
    header, twice = content[8:8 + struct.unpack("<Q", content[:8])[0]], []

    def pairs(items):
        if len({key for key, _ in items}) < len(items):
            twice.append(items)
        return dict(items)

    entries = json.loads(header, object_pairs_hook=pairs)
    fields = {field for name, entry in entries.items() if name != "__metadata__" for field in entry}
    large = [d for name, entry in entries.items() if name != "__metadata__" for d in entry["shape"] if d >= 2**63]
    return (TWICE if twice else SPACE if header[:1] != b"{" else FIELD if fields - {"dtype", "shape", "data_offsets"}
            else LARGE if large else None)


def pack(entries, data, metadata=None, text=None):
    header = {}
    if metadata is not None:
        header["__metadata__"] = metadata
    header.update(entries)
    text = (json.dumps(header) if text is None else text).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def originals():
    size = {"F32": 4, "I32": 4, "U8": 1, "BF16": 2, "I64": 8, "F8_E4M3": 1, "BOOL": 1, "C64": 8, "F8_E8M0": 1}
    shapes = [("F32", [2, 3]), ("F32", []), ("I32", [4]), ("U8", [5]), ("BF16", [2, 2]), ("I64", [1]), ("F32", [0]), ("F32", [3, 0, 2]),
              ("F8_E4M3", [3]), ("BOOL", [2])]
    for n in range(1, len(shapes) + 1):
        entries, at = {}, 0
        for i, (dtype, shape) in enumerate(shapes[:n]):
            count = size[dtype]
            for d in shape:
                count *= d
            entries["layers.%d.weight" % i] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + count]}
            at += count
        yield entries, bytes(at), {"d_model": "16", "mixer": "sessa"} if n % 2 else None


def mutate(rng, entries, data, metadata):
    """One mutated file: of the header's meaning, its text, or the bytes."""
    entries = json.loads(json.dumps(entries))
    metadata = dict(metadata) if metadata else metadata
    text = None
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        name = rng.choice(list(entries))
        entry, what = entries[name], rng.randrange(12)
        if what == 0:
            entry["dtype"] = rng.choice(["F32", "F64", "f32", "I8", "U16", "F16", "C64", "F4", "F8_E5M2", "F6_E2M3", "", "X", "F32 ", "U32"])
        elif what == 1:
            entry["shape"] = [rng.choice([0, 1, 2, 3, 6, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, -1]) for _ in range(rng.randrange(0, 12))]
        elif what == 2 and isinstance(entry["data_offsets"], list):
            entry["data_offsets"] = [max(0, x + rng.choice([-8, -4, -1, 0, 1, 4, 8])) if isinstance(x, int) else x for x in entry["data_offsets"]]
        elif what == 3:
            entry[rng.choice(["dtype", "shape", "data_offsets", "extra"])] = rng.choice([None, 1, "F32", [], [1, 2], {}, 1.5, True])
        elif what == 4:
            entry.pop(rng.choice(list(entry)))
            if not entry:
                break
            if "data_offsets" not in entry:
                break
        elif what == 5:
            data = data + bytes(rng.randrange(0, 9))
        elif what == 6:
            data = data[:rng.randrange(0, len(data) + 1)]
        elif what == 7:
            metadata = rng.choice([{}, {"a": ""}, {"a": "\u00e9\U0001F600"}, {"": "x"}, {"a": "b" * 50}])
        elif what == 8 and metadata is not None:
            metadata = rng.choice([{"a": 1}, {"a": None}, {"a": ["b"]}, [], "x", 1])
            break
        elif what == 9:
            names = list(entries)
            rng.shuffle(names)
            entries = {k: entries[k] for k in names}
        elif what == 10:
            entries[rng.choice(["", "\u00e9", "x" * 300, "a b", "\"", "__metadata", "\u0000", "\ud7ff", "new\nline"])] = entries.pop(name)
        elif what == 11:
            entries[name + "'"] = json.loads(json.dumps(entry))
    header = dict({"__metadata__": metadata} if metadata is not None else {}, **entries)
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5, separators=rng.choice([(",", ":"), (", ", ": ")]), indent=rng.choice([None, None, 1]))
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        at, what = rng.randrange(len(text) + 1), rng.randrange(8)
        if what == 0:
            text = text[:at] + rng.choice(list(' \t\n\r\v{}[]",:0123456789-+.eE\\/u\x00\x1f\x7f') + ["\u00a0", "\\u0041", "\\ud800", "\\udc00", "\\x", "null"]) + text[at:]
        elif what == 1:
            text = text[:at] + text[at + 1:]
        elif what == 2:
            text = text + " " * rng.randrange(9)
        elif what == 3:
            text = " " + text
        elif what == 4:
            text = text.replace('"F32"', rng.choice(['"F\\u00332"', "'F32'", "F32", '"F32"']), 1)
        elif what == 5:
            text = text.replace(rng.choice("0123456789"), rng.choice(["00", "1.0", "1e1", "-1", "99999999999999999999", "18446744073709551615", "-0"]), 1)
        elif what == 6 and len(entries) > 1:  # a name twice
            first, second = rng.sample(list(entries), 2)
            text = text.replace(json.dumps(first), json.dumps(second), 1)
        elif what == 7:
            text = text[:-1] + rng.choice(["", ",}", "}}", "}{", "}x", "} \n", ",\"z\":{}}"])
    content = pack({}, data, text=text)
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        at, what = rng.randrange(len(content)), rng.randrange(5)
        if what == 0:
            content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1:]
        elif what == 1:
            content = content[:at]
        elif what == 2:
            content = content[:at] + bytes([rng.randrange(256)]) + content[at:]
        elif what == 3:
            content = struct.pack("<Q", rng.choice([0, 1, 2, 8, len(content), max(0, len(content) - 8), 10**8, 10**8 + 1, 2**63, 2**64 - 1])) + content[8:]
        elif what == 4:
            length = struct.unpack("<Q", content[:8].ljust(8, b"\0"))[0]
            content = struct.pack("<Q", max(0, min(2**64 - 1, length + rng.choice([-2, -1, 1, 2])))) + content[8:]
        if not content:
            break
    return content


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", type=int, default=3, help="unexplained differences to print")
    options = parser.parse_args()
    rng, sources = random.Random(options.seed), list(originals())
    counts, unexplained = collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "replay")
        subprocess.run(["cc", "-O1", "-w", "-DREPLAY", os.path.join(HERE, "fuzz.c"), "-o", program, "-lm"], check=True)
        contents = [pack(*source) if i < len(sources) else mutate(rng, *source) for i, source in
                    enumerate(sources + [rng.choice(sources) for _ in range(options.files)])]
        for first in range(0, len(contents), 500):
            names = []
            for i, content in enumerate(contents[first:first + 500]):
                names.append(os.path.join(folder, str(i)))
                with open(names[-1], "wb") as out:
                    out.write(content)
            ours = subprocess.run([program, "--verdict"] + names, stdout=subprocess.PIPE, check=True).stdout.decode().splitlines()
            assert len(ours) == len(names)
            for content, verdict in zip(contents[first:first + 500], ours):
                try:
                    deserialize(content)
                    theirs = "valid"
                except Exception as problem:  # the library's own and those of its JSON and UTF-8 readers
                    theirs = str(problem)
                same = (verdict == "valid") == (theirs == "valid")
                if same:
                    counts["both " + ("valid" if theirs == "valid" else "refuse")] += 1
                elif theirs == "valid" and difference(content):
                    counts["only ours refuses: " + difference(content)] += 1
                else:
                    unexplained.append((content, verdict, theirs))
    print("safetensors %s, %d files" % (safetensors.__version__, len(contents)))
    for what, number in sorted(counts.items()):
        print("%6d  %s" % (number, what))
    print("%6d  unexplained" % len(unexplained))
    for content, verdict, theirs in unexplained[:options.show]:
        print("  ours: %s\n  theirs: %s\n  %r" % (verdict, theirs, content))
    sys.exit(1 if unexplained else 0)


if __name__ == "__main__":
    main()
