"""Whether the CUDA twin is a mirror: every layer function of train_sessa.c has its counterpart in
train_sessa.cu, by name and in the same order.

  dev/trust/mirror.py

A layer function is one whose name ends in _forward or _backward and that stands before the C file's "the
same, fast". Its counterpart is name_gpu. Where one pass over the data does the work of several, the table in
the head of train_sessa.cu says so: a line of C names, two spaces or more, and what does their work. The check
reads that table; a line of it that names what does not exist fails too.
"""
import os
import re
import sys

TOP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
TABLE = re.compile(r"^    ([a-z0-9_]+(?:, [a-z0-9_]+)*)  +([a-z0-9_]+_gpu(?:, [a-z0-9_]+_gpu)*)$", re.M)


def read(name):
    with open(os.path.join(TOP, name)) as file:
        return file.read()


def functions(text):
    """Names of the functions that are defined in the text, in order."""
    return re.findall(r"^(?:static |__device__ |inline |__global__ )*[\w<>]+ [*]?(\w+)\([^;{]*\) {", text, re.M)


def main():
    layers = read("train_sessa.c").split("// the same, fast: ")[0]
    twin = read("train_sessa.cu")
    head = twin[:twin.index("*/")]
    ours = [name for name in functions(layers) if re.search("_(forward|backward)$", name)]
    theirs = functions(re.sub(r"template <[^{;]*?>\s(?=static|__device__|__global__)", "", twin))
    fused = {}
    problems = []
    for left, right in TABLE.findall(head):
        for name in left.split(", "):
            fused[name] = right.split(", ")
            if name not in functions(layers):
                problems.append("the table names %s, which is no layer function" % name)
        problems += ["the table names %s, which is not there" % one for one in right.split(", ") if one not in theirs]
    places = []
    for name in ours:
        counterpart = name + "_gpu"
        if counterpart in theirs:
            if name not in fused: # within a pass that does several, its place is that pass's
                places.append((theirs.index(counterpart), name))
        elif name not in fused:
            problems.append("%s has no counterpart, and is not in the table" % name)
    for before, after in zip(places, places[1:]):
        if before[0] > after[0]:
            problems.append("%s stands behind %s in train_sessa.c, before it in the twin" % (after[1], before[1]))
    for line in problems:
        print(line)
    counts = len(ours), len(places), len(fused)
    print("%d layer functions: %d with a counterpart of their name, %d lines' names in the table" % counts)
    return len(problems) > 0 or len(ours) < 20


if __name__ == "__main__":
    sys.exit(main())
