"""Static analysers, the thread sanitizer and valgrind over train_sessa.c: clean but for the exceptions argued here.

    python3 dev/trust/analyse.py [gcc clang tidy cppcheck threads valgrind]

A tool that is not there is named and left out. Some minutes.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
SOURCE = os.path.join(ROOT, "train_sessa.c")

# (checker, a part of the source line, why it is wrong or wanted)
EXCEPTIONS = [
    ("-Wanalyzer-use-of-uninitialized-value", "__builtin_shuffle", "gcc 12 does not see that a loop over its lanes fills a vector"),
    ("core.UndefinedBinaryOperatorResult", "k->dstep[t * 3 * heads", "taken with a chunk of 2^31 tokens: a chunk has CHUNK = 32 at most"),
    ("core.UndefinedBinaryOperatorResult", "(word << (64 - bits)) >> (64 - bits)", "an integer's dtype has 8 to 64 bits, so the shift is 0 to 56"),
    ("core.NullDereference", "if (tensors[i].data != reached)", "n_tensors > 0 only after json_grow gave the array"),
    ("core.uninitialized.Assign", "first.weight", "taken with V = 0: a vocabulary has 1 token or more, and every candidate is set"),
    ("core.uninitialized.Assign", "left -= candidates[i].weight", "the same"),
    ("core.uninitialized.UndefReturn", "candidates[V - kept].id", "the same"),
    ("cert-flp30-c", "for (int t = n - 1; t >= 0; fade *=", "t counts, fade follows it"),
    ("deadcode.DeadStores", "size_t count = (size_t)run->table.count", "read where real is double"),
    ("invalidFunctionArg", "log((double)sum)", "V is 1 or more, and the largest term of the sum is 1"),
    ("memleak", "return larger ? larger : array", "the caller keeps what is returned"),
    ("bugprone-implicit-widening-of-multiplication-result", "", "each counts numbers in a row, a head, a chunk or a panel, below 2^31 by the options' limits; whole "
     "tensors are counted in 64 bits, which dev/trust/large.py runs"),
    ("bugprone-suspicious-string-compare", "", "!strcmp(a, b) and the truth of memcmp are the idiom here"),
    ("bugprone-macro-parentheses", "", "the argument is a statement: it is a loop's body"),
    ("bugprone-signed-char-misuse", "*j->at != c", "c is always one of JSON's ASCII characters"),
    ("bugprone-misplaced-widening-cast", "n_blocks * n_rows", "three times the rows of at most 4096 layers"),
    ("cert-err34-c", "atoi(digits)", "digits of a dtype in the list of the known ones"),
    ("cert-err34-c", "sscanf(line", "a line that gives no number ends the part of the log that is kept"),
    ("cert-err33-c", "", "what is written is checked once, by fflush and ferror or by the length; snprintf may cut a message"),
]
TIDY = ("-*,bugprone-*,cert-*,-bugprone-easily-swappable-parameters,-bugprone-reserved-identifier,-cert-dcl37-c,-cert-dcl51-cpp,"
        "-bugprone-narrowing-conversions")  # adjacent parameters of one type are the layers' style; _GNU_SOURCE; real is float
failed = 0
used = set()


def report(tool, text, lines, command_failed=False):
    """Counts the warnings of a tool's output that no exception names, and prints them."""
    global failed
    found, unknown = 0, []
    for match in re.finditer(r"train_sessa\.c:(\d+):\d+: (?:warning|error|portability|performance): (.*?)(?: \[CWE-\d+\])? \[([\w.,-]+)\]$", text, re.M):
        found += 1
        line = lines[int(match[1]) - 1]
        for exception in EXCEPTIONS:
            if match[3].split(",")[0] == exception[0] and exception[1] in line:
                used.add(exception)
                break
        else:
            unknown.append("    %s: %s [%s]\n      %s" % (match[1], match[2], match[3], line.strip()))
    failed += bool(unknown) or command_failed
    print("%-9s %d warnings, %d without an argument  %s" % (tool, found, len(unknown), "FAIL" if unknown or command_failed else "ok"), flush=True)
    print("".join(text[-2000:] if command_failed else "") + "\n".join(unknown[:20]), end="\n" if unknown or command_failed else "", flush=True)


def output(command, **options):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    return done.returncode, done.stdout.decode(errors="replace")


def static(which, folder):
    original = open(SOURCE).read()
    # The analysers do not look into functions with variable arguments: in their copy, fail's value can be seen.
    visible = os.path.join(folder, "train_sessa.c")
    with open(visible, "w") as out:
        out.write(re.sub(r"^#define wrong\(.*", "#define fail(...) (fail_(__VA_ARGS__), FAILED)\\n#define wrong(...) (fail_(__VA_ARGS__), WRONG_OPTION)",
                         original, flags=re.M).replace("static int fail(", "static int fail_("))
    text_of, lines = {}, {False: original.split("\n"), True: open(visible).read().split("\n")}
    if "gcc" in which and shutil.which("gcc"):
        text_of["gcc"] = output(["gcc", "-fanalyzer", "-O1", "-ffast-math", "-fno-finite-math-only", "-fopenmp", "-c", SOURCE, "-o", "/dev/null"])[1], False
    if "clang" in which and shutil.which("clang"):
        text_of["clang"] = output(["clang", "--analyze", "-Wno-unknown-pragmas", "-Wno-unused-value", visible, "-o", folder + "/report"])[1], True
    if "tidy" in which and shutil.which("clang-tidy"):
        text_of["tidy"] = output(["clang-tidy", "-quiet", "-checks=" + TIDY, visible, "--", "-Wno-unknown-pragmas", "-Wno-unused-value"])[1], True
    if "cppcheck" in which and shutil.which("cppcheck"):
        text_of["cppcheck"] = output(["cppcheck", "--enable=warning,performance,portability", "--std=c11", "-q",
                                      "--template={file}:{line}:{column}: {severity}: {message} [{id}]", SOURCE])[1], False
    for tool, (text, is_visible) in text_of.items():
        report(tool, text, lines[is_visible])
    for tool in which & {"gcc", "clang", "tidy", "cppcheck"} - set(text_of):
        print("%-9s not here, left out" % tool)


def runs(folder):
    """Command lines that pass through every layer of each mixer, forward, backward, evaluation and generation."""
    with open(folder + "/text", "w") as out:
        out.write(open(SOURCE).read()[:4000])
    for mixer in ("sessa", "attention", "mamba2"):
        yield mixer, ("--data text --mixer %s --dim 16 --layers 2 --heads 2 --kv-heads 1 --seq 70 --batch 2 --accum 2 --steps 2 --dropout 0.1 "
                      "--eval-every 1 --eval-batches 1 --sample-every 2 --log log --out %s.safetensors" % (mixer, mixer))
        yield mixer + ", resumed", "--resume %s.safetensors --steps 3 --log log" % mixer
        yield mixer + ", generation", "--load %s.safetensors --generate 60 --prompt Sessa --top-k 5 --window 32" % mixer


def threads(folder):
    """clang's thread sanitizer, with the OpenMP runtime's archer, which tells it of the barriers."""
    global failed
    archer = next(iter(sorted(p for base in ("/usr/lib/llvm-%d/lib" % n for n in range(10, 30)) for p in [base + "/libarcher.so"] if os.path.exists(p))), None)
    if not archer or not shutil.which("clang"):
        print("threads   clang or libarcher.so (libomp) are not here, left out")
        return
    program = folder + "/threads"
    flags = ["clang", "-O1", "-g", "-fsanitize=thread", "-fopenmp", "-march=x86-64-v3", "-ffast-math", "-fno-finite-math-only", "-w"]
    environment = dict(os.environ, OMP_NUM_THREADS="3", OMP_TOOL_LIBRARIES=archer, TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66")
    subprocess.run(flags + [SOURCE, "-o", program, "-lm"], check=True)
    for name, line in runs(folder):
        code, text = output([program] + line.split(), cwd=folder, env=environment)
        failed += code != 0
        print("threads   %-24s %s" % (name, "ok" if not code else "FAIL\n" + text[-3000:]), flush=True)
    source = open(SOURCE).read()  # the same with a race: it must be seen
    place = "    #pragma omp parallel for if (n > PARALLEL_WORK / 16)\n    for (int64_t i = 0; i < n; i++) out[i] = x[i] + branch[i];"
    assert source.count(place) == 1
    with open(folder + "/race.c", "w") as out:
        out.write(source.replace(place, "    #pragma omp parallel for schedule(static, 1)\n    for (int64_t i = 0; i < n; i++) out[i & ~1] = x[i] + branch[i];"))
    subprocess.run(flags + [folder + "/race.c", "-o", program, "-lm"], check=True)
    code, _ = output([program] + next(runs(folder))[1].split(), cwd=folder, env=environment)
    failed += code != 66
    print("threads   %-24s %s" % ("a race put in is seen", "ok" if code == 66 else "FAIL"), flush=True)


def valgrind(folder):
    global failed
    if not shutil.which("valgrind"):
        print("valgrind  not here, left out")
        return
    program = folder + "/plain"
    subprocess.run(["gcc", "-O1", "-g", "-march=x86-64-v3", "-w", SOURCE, "-o", program, "-lm"], check=True)
    for name, line in runs(folder):
        code, text = output(["valgrind", "-q", "--error-exitcode=9", "--leak-check=full", program] + line.split(), cwd=folder)
        failed += code != 0
        print("valgrind  %-24s %s" % (name, "ok" if not code else "FAIL\n" + text[-3000:]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["gcc", "clang", "tidy", "cppcheck", "threads", "valgrind"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        static(set(options.what), folder)
        if "threads" in options.what:
            threads(folder)
        if "valgrind" in options.what:
            valgrind(folder)
    for checker, part, why in EXCEPTIONS:
        if (checker, part, why) in used:
            print("  %s%s: %s" % (checker, " at '%s'" % part if part else "", why))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
