"""The twin's CUDA for a C++ compiler: copies of the files, with the same lines, in which shared arrays,
bounds of launches and launches are C++. All else is done by the headers beside this file.

  dev/trust/emulate/prepare.py INTO [FILE ...]      [the twin, its tests, dev/cuda]

    __shared__ float x[8][32];           a reference to the block's array
    extern __shared__ float4 x[];        a pointer to what the launch asked for
    __launch_bounds__(256, 2)            a check, where the kernel begins
    (kernel)<<<a, b, c, d>>>(...)        emulate::launch(kernel, a, b, c, d)(...)
"""
import glob
import os
import re
import sys

TOP = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", ".."))
USUAL = ["train_sessa.cu", "test_sessa.c", "dev/cuda/*.cuh", "dev/ranks/*.cuh", "dev/ranks/*.h", "dev/trust/*.cu", "dev/trust/*.cuh",
         "dev/trust/emulate/*.cu"]
ALIGN = r"(?:__align__\((?P<align>[^()]*)\)\s*)?"
DYNAMIC = re.compile(r"extern\s+__shared__\s+" + ALIGN +
                     r"(?P<type>[\w:<>, ]+?)\s+(?P<name>\w+)\[\];")
STATIC = re.compile(r"__shared__\s+" + ALIGN +
                    r"(?P<type>[\w:<>, ]+?)\s+(?P<name>\w+)(?P<dims>(?:\[[^;]*\])?);")
LAUNCH = re.compile(r"\((\w+)\)<<<(.*?)>>>\(")


def dynamic_array(match):
    return "%(type)s *%(name)s = (%(type)s *)emulate::dynamic_shared({__FILE__, __LINE__});" % match.groupdict()


def static_array(match):
    parts = dict(match.groupdict(), align=match["align"] or "1")
    return ("typedef %(type)s %(name)s_type%(dims)s; static char %(name)s_tag; %(name)s_type &%(name)s = "
            "*(%(name)s_type *)emulate::static_shared(&%(name)s_tag, sizeof(%(name)s_type), %(align)s, "
            "{__FILE__, __LINE__});" % parts)


def closing(text, at):
    """The place behind the bracket that closes the one at `at`."""
    depth = 0
    for place in range(at, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    raise ValueError("an open bracket")


def with_bounds(text):
    """__launch_bounds__(n, m) goes from a kernel's head to its first line."""
    word = "__launch_bounds__("
    while word in text:
        at = text.index(word)
        open_ = at + len(word) - 1
        end = closing(text, open_)
        most = text[open_ + 1:end - 1]
        most = most.rsplit(",", 1)[0] if re.search(r",\s*\w+\s*$", most) else most
        parameters = text.index("(", end)
        body = text.index("{", closing(text, parameters)) + 1
        lines = "\n" * text[at:end].count("\n") # of the head: those behind it stay where they are
        text = text[:at] + lines + text[end:body] + " emulate::launch_bound(%s);" % most + text[body:]
    return text


def prepare(text, name):
    text = DYNAMIC.sub(dynamic_array, text)
    text = STATIC.sub(static_array, text)
    text = with_bounds(text)
    text = LAUNCH.sub(r"emulate::launch(\1, \2)(", text)
    left = re.search(r"^(?!\s*//).*(__shared__|<<<)", text, re.M)
    if left:
        raise SystemExit("%s: prepare.py does not know this: %s" % (name, left.group(0).strip()))
    return '#line 1 "%s"\n%s' % (name, text)


def main(into, *names):
    if not names:
        paths = [path for one in USUAL for path in glob.glob(os.path.join(TOP, one))]
        names = sorted(os.path.relpath(path, TOP) for path in paths)
    for name in names:
        with open(os.path.join(TOP, name)) as file:
            text = prepare(file.read(), name)
        path = os.path.join(into, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
