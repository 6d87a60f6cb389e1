"""Every system call and every allocation goes wrong once, and what is promised is checked each time.

    python3 dev/trust/faults.py [--program ./train_sessa] [--quick | --all] [--seed 1] [--only 'resume 57:fail=5']

Training with saves, validations, samples and a log, resuming, --overwrite, what is refused without it, --load,
--eval, --generate, and mamba2 with example sets run again and again.
In each run one call is disturbed (faults.c: errors, short reads and writes, errors that stay, a disk that is gone;
faults_shim.c: an allocation, or all from one on), or memory is limited. Afterwards, `judge`:

  - it ended as if nothing had happened, or with exit code 1 and one line on standard error; never otherwise
  - run and best weights are what was there before, or what an undisturbed run saves, byte for byte (a run
    that saves itself as it ends early may be of a moment that an undisturbed one does not save)
  - no temporary file and no lock is left, unless removing it was what failed
  - the log is whole: each line JSON, no step missing or twice; only a write of the log itself that failed may
    tear its last line
  - a plain --resume, or the same command where nothing was saved, goes through to the bytes of an undisturbed
    run, log and all

--quick, the default, is a seeded sample in which each kind of call, file and error comes before any comes twice.
OMP_NUM_THREADS is 1. Needs Linux on x86-64 or arm64, and cc. One failure is one line, with the command that
repeats it.
"""

import argparse
import collections
import concurrent.futures
import errno
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading

HERE = os.path.dirname(os.path.abspath(__file__))
LIBGOMP = re.compile(r"\s*libgomp: (Out of memory allocating \d+ bytes|Thread creation failed.*)\s*")


# ---------------------------------------------------------------------------
# files

def read(path):
    with open(path, "rb") as file:
        return file.read()


def write_files(folder, files):
    for name, content in files.items():
        with open(os.path.join(folder, name), "wb") as out:
            out.write(content)


def files_of(folder):
    """Name and content of each file; one that goes while this looks has never been there."""
    files = {}
    for name in os.listdir(folder):
        try:
            files[name] = read(os.path.join(folder, name))
        except FileNotFoundError:
            pass
    return files


def is_stray(name):
    """Whether a file should not outlive the run that made it."""
    return ".tmp." in name or name.endswith(".lock")


def safetensors(tensors, metadata):
    """The bytes of a file with these tensors: (name, dtype, shape, bytes)."""
    header, offset = {"__metadata__": metadata}, 0
    for name, dtype, shape, content in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(content)]}
        offset += len(content)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(content for _, _, _, content in tensors)


def step_of(content):
    """The step that a checkpoint holds, -1 if it is none."""
    try:
        return int(json.loads(content[8:8 + struct.unpack("<Q", content[:8])[0]])["__metadata__"]["step"])
    except (ValueError, KeyError, struct.error):
        return -1


def log_lines(content):
    """The log's lines without what depends on time, and what is wrong with it or "". A torn end is a line None."""
    lines, texts = [], content.split(b"\n")
    end = texts.pop()  # nothing, unless it is torn
    for number, text in enumerate(texts):
        try:
            line = json.loads(text, parse_constant=lambda word: {}[word])  # NaN and Infinity are no JSON
            step = line["step"]
        except (ValueError, KeyError, TypeError):
            return lines, "line %d is no JSON object with a step" % (number + 1)
        if step != number + 1:
            return lines, "line %d is of step %s" % (number + 1, step)
        line.pop("tok_per_s", None)
        line.pop("previous_loss", None)  # of a log that begins with a resumed run
        lines.append(line)
    return (lines + [None], "its end is torn") if end else (lines, "")


def as_far_as(lines, whole):
    """Whether a log is the beginning of another; its last line may lack the validation that was broken off."""
    if not lines or len(lines) > len(whole):
        return not lines
    last = {key: value for key, value in whole[len(lines) - 1].items() if not key.startswith(("val_", "accuracy_"))}
    return lines[:-1] == whole[:len(lines) - 1] and lines[-1] in (whole[len(lines) - 1], last)


def timeless(text):
    """What a program prints, without times and sizes that vary."""
    return re.sub(r"[\d.]+ ms|\d+ tok/s|\d+:\d\d left|\([\d.]+ s\)|[\d.]+ MiB", "_", text)


# ---------------------------------------------------------------------------
# running

Hit = collections.namedtuple("Hit", "count name fd path")


class Outcome:
    """How a run ended: exit code or signal, what it printed, which of its calls were disturbed."""

    def __init__(self):
        self.code, self.signal, self.out, self.err, self.hung = None, 0, "", "", False
        self.calls, self.hits = [], []

    def take(self, report):
        for line in report.splitlines():
            word = line.split(" ")
            if word[0] in ("call", "hit") and len(word) == 5:
                hit = Hit(int(word[1]), word[2], int(word[3]), word[4])
                (self.calls if word[0] == "call" else self.hits).append(hit)
            elif word[0] == "exit":
                self.code = int(word[1])
            elif word[0] == "signal":
                self.signal = int(word[1])


class Tools:
    """The program under test, and what disturbs it."""

    def __init__(self, program, folder, limit=15):
        self.program = shutil.copy(program, os.path.join(folder, "train_sessa"))
        self.folder, self.limit = folder, limit  # seconds, then it hangs
        self.faults, self.shim = os.path.join(folder, "faults"), os.path.join(folder, "shim.so")
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-O2", os.path.join(HERE, "faults.c"), "-o", self.faults], check=True)
        shared = ["-shared", "-fPIC", os.path.join(HERE, "faults_shim.c"), "-o", self.shim, "-ldl"]
        subprocess.run([compiler, "-O2"] + shared, check=True)
        self.counter, self.lock = 0, threading.Lock()
        spoken = subprocess.run([self.program, "--help"], capture_output=True, text=True).stdout
        self.overwrites = "--overwrite" in spoken

    def report(self):
        with self.lock:
            self.counter += 1
            return os.path.join(self.folder, "report%d" % self.counter)

    def wait(self, command, folder, env, options):
        outcome = Outcome()
        child = subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, **options)
        try:
            out, err = child.communicate(timeout=self.limit)
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            outcome.hung = True
        outcome.out, outcome.err = out.decode(errors="replace"), err.decode(errors="replace")
        outcome.code, outcome.signal = (child.returncode, 0) if child.returncode >= 0 else (None, -child.returncode)
        return outcome

    def run(self, folder, line, actions=(), listing=False, traced=True, env=None, **options):
        """Runs the program with this command line, its system calls disturbed."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        if not traced:
            return self.wait([self.program] + shlex.split(line), folder, env, options)
        report = self.report()
        command = [self.faults, "-r", report] + ["-l"] * listing
        for action in actions:
            command += ["-a", action]
        outcome = self.wait(command + ["--", self.program] + shlex.split(line), folder, env, options)
        outcome.code, outcome.signal = None, 0
        outcome.take(read(report).decode(errors="replace"))
        os.unlink(report)
        return outcome

    def allocate(self, folder, line, at=0, all_from=False, listing=False):
        """Runs it with an allocation that fails."""
        report = self.report()
        env = {"LD_PRELOAD": self.shim, "FAULT_REPORT": report}
        env.update(FAULT_AT=str(at), FAULT_FROM=str(int(all_from)))
        if listing:
            env["FAULT_LIST"] = "1"
        outcome = self.run(folder, line, traced=False, env=env)
        code, number = outcome.code, outcome.signal
        if os.path.exists(report):
            outcome.take(read(report).decode(errors="replace"))
            os.unlink(report)
        outcome.code, outcome.signal = code, number
        return outcome


# ---------------------------------------------------------------------------
# scenarios

SHAPE = "--dim 8 --layers 1 --heads 2 --seq 8 --batch 2 --dropout 0.1 --warmup 2 "
WATCH = "--save-every 2 --eval-every 2 --eval-batches 1 --sample-every 3 --log run.log "
TEXT = "--data text " + SHAPE + WATCH + "--steps 6 --out run.safetensors "
SETS = ("--data set.safetensors --val asked.safetensors --mixer mamba2 --dim 8 --layers 1 --heads 2 --head-dim 4 "
        "--state-dim 4 --batch 2 --warmup 2 --save-every 1 --eval-every 2 --eval-batches 1 --log run.log --steps 4 "
        "--out run.safetensors ")
AGAIN = "--resume run.safetensors " + WATCH
AGAIN_SETS = "--resume run.safetensors --save-every 1 --eval-every 2 --eval-batches 1 --log run.log "
RUN, BEST, LOG = "run.safetensors", "run.best.safetensors", "run.log"


def sources(rng):
    """A text and two example sets."""
    text = bytes(rng.choice(b"abcdefgh \n") for _ in range(1500))

    def examples(n, T=8):
        ids = [[rng.randrange(9) for _ in range(T)] for _ in range(n)]
        targets = [[-1 if t < 4 else row[t - 3] for t in range(T)] for row in ids]
        lags = [[0 if t < 4 else rng.randrange(1, 4) for t in range(T)] for _ in range(n)]
        rows = [(name, "I32", [n, T], struct.pack("<%di" % (n * T), *sum(table, [])))
                for name, table in (("inputs", ids), ("targets", targets), ("lags", lags))]
        return safetensors(rows, {"vocab_size": "10"})

    return {"text": text, "set.safetensors": examples(12), "asked.safetensors": examples(5)}


class Scenario:
    """One command, the files that lie there before it, and what an undisturbed run of it leaves."""

    def __init__(self, name, line, before, again="", trains=True, overwrite=False, code=0):
        self.name, self.line, self.before, self.again = name, line, before, again
        self.trains, self.overwrite, self.code = trains, overwrite, code
        self.after, self.out, self.calls, self.allocations = {}, "", [], []
        self.states = {RUN: set(), BEST: set()}  # what each file holds at some moment of an undisturbed run
        self.lines = []

    def measure(self, tools, reference=None):
        """Runs it undisturbed. Returns what is wrong already then, "" if nothing is."""
        with tempfile.TemporaryDirectory(dir=tools.folder) as folder:
            write_files(folder, self.before)
            outcome = tools.run(folder, self.line, listing=True)
            self.after, self.out, self.calls = files_of(folder), timeless(outcome.out), outcome.calls
        if outcome.code != self.code or outcome.err.count("\n") != (self.code > 0):
            return "exit code %s: %s" % (outcome.code, outcome.err.strip())
        with tempfile.TemporaryDirectory(dir=tools.folder) as folder:
            write_files(folder, self.before)
            self.allocations = tools.allocate(folder, self.line, listing=True).calls
        if not self.trains:
            return ""
        for name in (RUN, BEST):
            self.states[name] |= {self.before.get(name), self.after.get(name)}
        for call in self.calls:  # killed as a file has just got its name
            if not call.name.startswith(("rename", "link")):
                continue
            with tempfile.TemporaryDirectory(dir=tools.folder) as folder:
                write_files(folder, self.before)
                tools.run(folder, self.line, ["%d:exit=9" % call.count])
                for name in (RUN, BEST):
                    path = os.path.join(folder, name)
                    self.states[name].add(read(path) if os.path.exists(path) else None)
        self.lines, problem = log_lines(self.after.get(LOG, b""))
        if problem:
            return "its log: " + problem
        if reference is None:
            complete = self.lines and RUN in self.after and BEST in self.after
            return "" if complete else "run, best weights or log are missing"
        return differs(self, reference.after, reference.lines)


def differs(scenario, files, lines):
    """Which of the three files that a scenario leaves is not the one of an undisturbed run."""
    wrong = [name for name in (RUN, BEST) if scenario.after.get(name) != files.get(name)]
    return ", ".join(wrong + ["log (%d of %d lines)" % (len(scenario.lines), len(lines))] * (scenario.lines != lines))


def stopped(tools, line, before, times, number, form="exit", strays=False):
    """The files of a run that a signal stopped as it saved itself the n-th time: form "entry", just before it had;
    "exit", after. strays: with the locks and temporary files that SIGKILL leaves."""
    with tempfile.TemporaryDirectory(dir=tools.folder) as folder:
        write_files(folder, before)
        calls = tools.run(folder, line, listing=True).calls
    renames = [call for call in calls if call.name.startswith("rename")]
    saves = [call.count for call in renames if os.path.basename(call.path).startswith(RUN + ".tmp.")]
    with tempfile.TemporaryDirectory(dir=tools.folder) as folder:
        write_files(folder, before)
        tools.run(folder, line, ["%d:%s=%d" % (saves[times - 1], form, number)])
        return {name: content for name, content in files_of(folder).items() if strays or not is_stray(name)}


def scenarios(tools, rng):
    """All of them, measured; those that fail undisturbed are told and left out."""
    given = sources(rng)
    text = {"text": given["text"]}
    sets = {name: given[name] for name in ("set.safetensors", "asked.safetensors")}
    train, mamba2 = Scenario("train", TEXT, text, AGAIN), Scenario("mamba2", SETS, sets, AGAIN_SETS)
    listed, problems = [], {}

    def add(scenario, reference=None):
        problem = scenario.measure(tools, reference)
        if problem:
            problems[scenario.name] = problem
        if not problem or scenario.trains:
            listed.append(scenario)
        return scenario

    add(train)
    add(mamba2)
    weights = {"base.safetensors": train.after[BEST]}
    add(Scenario("resume", AGAIN, stopped(tools, TEXT, text, 2, signal.SIGTERM), AGAIN), train)
    add(Scenario("finished", AGAIN, stopped(tools, TEXT, text, 3, signal.SIGKILL), AGAIN), train)
    add(Scenario("killed", AGAIN, stopped(tools, TEXT, text, 2, signal.SIGKILL, "entry", True), AGAIN), train)
    add(Scenario("mamba2-resume", AGAIN_SETS, stopped(tools, SETS, sets, 2, signal.SIGTERM), AGAIN_SETS), mamba2)
    other = dict(text)
    with tempfile.TemporaryDirectory(dir=tools.folder) as folder:
        write_files(folder, text)
        tools.run(folder, TEXT + "--seed 7 ")
        other.update(files_of(folder))
    add(Scenario("overwrite", TEXT + "--overwrite" * tools.overwrites, other, AGAIN, overwrite=True), train)
    for name, kept in (("refused", (RUN, BEST, LOG)), ("refused-best", (BEST,)), ("refused-log", (LOG,))):
        there = {**text, **{file: other[file] for file in kept}}
        add(Scenario(name, TEXT, there, trains=False, code=2))  # without --overwrite nothing may be touched
    add(Scenario("load", TEXT + "--load base.safetensors", {**text, **weights}, AGAIN))
    add(Scenario("eval", "--load base.safetensors --data text --eval", {**text, **weights}, trains=False))
    line = "--load base.safetensors --generate 40 --prompt 'ab c' --temperature 0.8 --top-k 5"
    add(Scenario("generate", line, weights, trains=False))
    return listed, problems


# ---------------------------------------------------------------------------
# what is promised

def said_but_missing(outcome, files):
    """The files that the last line names, and that are not there."""
    named = re.search(r"saved to (\S+), (?:the )?best weights to (\S+)", outcome.out)
    return [name for name in (named.groups() if named else ()) if name not in files]


def judge(tools, scenario, folder, outcome, excused=""):
    """What is wrong after a disturbed run: a list of words, empty if all promises were kept. excused: what cannot be
    asked for, since that very thing was disturbed: "unlink", "log", "stderr", "stdout"."""
    files, problems = files_of(folder), []
    said = "".join(line for line in outcome.err.splitlines(True) if not line.startswith("train_sessa: warning: "))
    libgomp = bool(LIBGOMP.fullmatch(said)) and outcome.code == 1
    if outcome.hung:
        return ["it hangs"]
    if outcome.signal:
        problems.append("ended by signal %d" % outcome.signal)
    elif outcome.code == 0 == scenario.code:
        problems += ["exit code 0 with a line: " + said.strip()] * bool(said)
        problems += after_success(scenario, outcome, files)
    elif outcome.code not in (1, scenario.code):
        problems.append("exit code %s: %s" % (outcome.code, said.strip()))
    elif not libgomp:
        one = said.count("\n") == 1 and said.startswith("train_sessa: ") and len(said) > 20
        if not one and not ("stderr" in excused and not said):
            problems.append("not one line on standard error: %r" % said[:300])
    problems += ["%s is said to be there, and is not" % name for name in said_but_missing(outcome, files)]
    strays = sorted(name for name in files if is_stray(name) and name not in scenario.before)
    left = [name for name in strays if not ("stat" in excused and name.endswith(".lock"))]
    if left and "unlink" not in excused and not libgomp:
        problems.append("left: " + " ".join(left))
    for name, content in scenario.before.items():  # what it only reads
        written = scenario.trains and name in (RUN, BEST, LOG)
        if not written and not is_stray(name) and files.get(name) != content:
            problems.append("%s was changed" % name)
    if not scenario.trains:
        return problems + ["a file more: " + name for name in set(files) - set(scenario.before) - set(strays)]
    for name in (RUN, BEST):
        content = files.get(name)
        early = name == RUN and outcome.code == 1 and step_of(content or b"") > 0  # saved as it ended
        early = early or (name == BEST and content is None and scenario.overwrite)  # the other run's, which may go
        if content not in scenario.states[name] and not early:
            words = "neither the old one nor one that is saved" if name in files else "gone"
            problems.append("%s is %s" % (name, words))
    lines, torn = log_lines(files.get(LOG, b""))
    untouched = files.get(LOG) == scenario.before.get(LOG)
    if not untouched and torn and not ("log" in excused and torn == "its end is torn"):
        problems.append("the log: " + torn)
    lines = [line for line in lines if line is not None]
    if not untouched and not as_far_as(lines, scenario.lines):
        problems.append("the log holds other lines")
    complete = all(files.get(name) == scenario.after[name] for name in (RUN, BEST))
    if "stdout" in excused and outcome.code == 1 and not libgomp and not complete:
        problems.append("standard output failed, and training did not go on to its end")
    return problems + go_on(tools, scenario, folder, files)


def after_success(scenario, outcome, files):
    """What differs from an undisturbed run although the exit code says that nothing does."""
    problems = ["exit code 0, but it printed something else"] * (timeless(outcome.out) != scenario.out)
    more = sorted(set(files) - set(scenario.after))
    problems += ["exit code 0, it left " + name for name in more if not is_stray(name)]
    for name in sorted(scenario.after):
        if name == LOG and scenario.trains:
            if log_lines(files.get(LOG, b""))[0] != scenario.lines:
                problems.append("exit code 0, the log is not that of an undisturbed run")
        elif files.get(name) != scenario.after[name]:
            problems.append("exit code 0, but %s is %s" % (name, "another" if name in files else "missing"))
    return problems


def go_on(tools, scenario, folder, files):
    """A plain --resume, or the same command where nothing was saved: it leads to the files of an undisturbed run."""
    if RUN in files and not (scenario.overwrite and files[RUN] == scenario.before[RUN]):
        line = scenario.again
    else:
        line = scenario.line
        if tools.overwrites and (BEST in files or files.get(LOG)) and "--overwrite" not in line:
            line += " --overwrite"
    outcome = tools.run(folder, line, traced=False)
    if outcome.code != 0 or outcome.err:
        return ["going on: exit code %s, signal %d, %s" % (outcome.code, outcome.signal, outcome.err.strip())]
    files = files_of(folder)
    lines, torn = log_lines(files.get(LOG, b""))
    other = [name for name in (RUN, BEST) if files.get(name) != scenario.after[name]]
    problems = ["going on: %s is not that of an undisturbed run" % name for name in other]
    if torn or lines != scenario.lines:
        words = "%d of %d lines" % (len(lines), len(scenario.lines))
        problems.append("going on: the log is not whole, %s%s" % (words, ", " + torn if torn else ""))
    strays = [name for name in files if is_stray(name)]
    return problems + ["going on: left " + " ".join(sorted(strays))] * bool(strays)


# ---------------------------------------------------------------------------
# what is disturbed

ERRORS = {  # the last one is the one that stays
    "read": "EINTR EIO", "pread64": "EINTR EIO", "readv": "EINTR EIO", "write": "EINTR EIO EDQUOT ENOSPC",
    "writev": "EINTR EIO ENOSPC", "pwrite64": "EINTR EIO ENOSPC", "open": "EINTR ENOMEM EIO EMFILE EACCES",
    "openat": "EINTR ENOMEM EIO ENOSPC EMFILE EACCES", "close": "EINTR EIO", "fsync": "EINTR ENOSPC EIO",
    "fdatasync": "EINTR ENOSPC EIO", "ftruncate": "EINTR EIO", "fallocate": "EINTR EOPNOTSUPP ENOSPC",
    "flock": "EINTR ENOLCK", "fcntl": "EINTR EIO", "ioctl": "EIO", "lseek": "EIO", "fstat": "ENOMEM EIO",
    "newfstatat": "ENOMEM EACCES EIO", "stat": "ENOMEM EACCES EIO", "lstat": "EIO", "statx": "ENOSYS EIO",
    "access": "EIO EACCES", "faccessat": "EIO EACCES", "unlink": "EIO EACCES", "unlinkat": "EIO EACCES",
    "rename": "EINTR ENOSPC EACCES EIO", "renameat": "EIO", "renameat2": "EINVAL EIO", "link": "EPERM EIO",
    "linkat": "EPERM EIO", "readlink": "ENOMEM EIO", "readlinkat": "EIO", "getcwd": "ENOENT ENOMEM",
    "getdents64": "EIO", "getdents": "EIO", "fchmod": "EIO EPERM", "fchmodat": "EPERM", "chmod": "EPERM",
    "fchown": "EPERM", "fchownat": "EPERM", "chown": "EPERM", "utimensat": "EPERM", "statfs": "EIO",
    "fstatfs": "EIO", "dup": "EMFILE", "dup2": "EMFILE", "dup3": "EMFILE", "mmap": "ENOMEM", "brk": "ENOMEM",
    "mprotect": "ENOMEM", "mremap": "ENOMEM", "munmap": "ENOMEM", "madvise": "EINVAL", "clone": "EAGAIN",
    "fork": "EAGAIN", "execve": "ENOMEM EACCES", "getrandom": "EINTR ENOSYS", "sysinfo": "ENOSYS",
    "getrusage": "ENOSYS", "prlimit64": "EPERM", "sched_getaffinity": "ENOSYS", "nanosleep": "EINTR",
    "clock_nanosleep": "EINTR", "poll": "EINTR", "ppoll": "EINTR", "rt_sigaction": "EINVAL",
    "rt_sigprocmask": "EINVAL", "kill": "EPERM", "setitimer": "EINVAL", "uname": "ENOSYS",
    "sigaltstack": "ENOMEM", "mkdir": "EACCES",
}
STAYS_NOT = {"brk", "mprotect", "munmap", "madvise", "rt_sigaction", "rt_sigprocmask", "nanosleep", "clock_nanosleep"}


def kind_of(path):
    """Which of the files a path is, for the sample and the table."""
    name = os.path.basename(path)
    kinds = ((".tmp.", "temporary"), (".lock", "lock"), (".log", "log"), (BEST, "best"), (RUN, "run"),
             (".safetensors", "data"), ("text", "data"))
    for part, kind in kinds:
        if part in name:
            return kind
    return "folder" if "/" in path or path == "." else "other"


def some_output(calls):
    """Of the writes to standard output, one for each letter of a sample, every 20th is enough."""
    output = [call for call in calls if call.fd == 1 and call.name == "write"]
    return [call for call in calls if call not in output] + output[::20]


def disturbances(scenario):
    """All that can be done to a scenario's system calls: (kind for the sample, action)."""
    listed = []
    for call in some_output(scenario.calls):
        names = ERRORS.get(call.name, "ENOSYS").split()
        where = {1: "output", 2: "errors"}.get(call.fd, kind_of(call.path) if call.path != "-" else "")
        if call.name == "exit_group" or call.name.startswith("get") and call.name not in ERRORS:
            continue  # the end, or a number that is always there
        for name in names:
            form = "after" if call.name == "close" else "fail"  # a descriptor is gone even if closing it fails
            listed.append(((call.name, where, name), "%d:%s=%d" % (call.count, form, getattr(errno, name))))
        if call.name in ("read", "write", "readv", "writev", "pread64", "pwrite64"):
            listed += [((call.name, where, "short %d" % most), "%d:short=%d" % (call.count, most)) for most in (1, 0)]
        if call.name in ("fsync", "rename", "ftruncate"):
            listed.append(((call.name, where, "made"), "%d:after=%d" % (call.count, errno.EIO)))
        if names[-1] != "EINTR" and call.name not in STAYS_NOT and call.name != "close":
            listed.append(((call.name, where, "stays"), "%d:from=%d" % (call.count, getattr(errno, names[-1]))))
        if call.path != "-" and call.fd not in (1, 2):
            listed.append(((call.name, where, "disk"), "%d:disk=%d" % (call.count, errno.EIO)))
    return listed


def allocation_faults(scenario):
    listed = []
    for call in scenario.allocations:
        library = os.path.basename(call.path)
        site = library if "gomp" in library else "%s %s" % (call.name, library)
        listed += [((site, "", form), "alloc %d%s" % (call.count, "+" * (form == "all"))) for form in ("one", "all")]
    return listed


def excuses(outcome, action):
    """What cannot be promised, since it was the thing that failed."""
    words = set()
    for hit in outcome.hits:
        if hit.name.startswith("unlink") or ":disk=" in action:
            words.add("unlink")
        if hit.name.startswith(("write", "pwrite")) and kind_of(hit.path) == "log" or ":disk=" in action:
            words.add("log")
        if "stat" in hit.name or ":disk=" in action:
            words.add("stat")  # a lock that cannot be looked at is not removed: it is empty, and the next run's
        if hit.fd == 2:
            words.add("stderr")
        if hit.fd == 1 and hit.name.startswith("write"):
            words.add("stdout")
    return " ".join(words)


def limited(tools, folder, line, limit):
    """Runs the program in an address space of so many bytes."""
    def set_limit():
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    return tools.run(folder, line, traced=False, preexec_fn=set_limit)


def memory_needed(tools, scenario, line):
    """The least limit of the address space, to 16 KiB, with which it runs as if there were none."""
    low, high = 1 << 20, 1 << 31
    while high - low > 1 << 14:
        middle = (low + high) // 2
        with tempfile.TemporaryDirectory(dir=tools.folder) as folder:
            write_files(folder, scenario.before)
            low, high = (low, middle) if limited(tools, folder, line, middle).code == 0 else (middle, high)
    return high


def disturb(tools, scenario, action):
    """Runs a scenario with one disturbance: the outcome, what is wrong, and what was hit in words."""
    with tempfile.TemporaryDirectory(dir=tools.folder) as folder:
        write_files(folder, scenario.before)
        if action.startswith("alloc "):
            outcome = tools.allocate(folder, scenario.line, int(action[6:].rstrip("+")), action.endswith("+"))
            words = "not reached"
            for hit in outcome.hits:
                words = "%s of %d bytes, called by %s" % (hit.name, hit.fd, os.path.basename(hit.path))
            return outcome, judge(tools, scenario, folder, outcome), words
        if action.startswith("limit "):
            limit = int(action[6:])
            outcome = limited(tools, folder, scenario.line, limit)
            return outcome, judge(tools, scenario, folder, outcome), "memory limited to %d bytes" % limit
        outcome = tools.run(folder, scenario.line, [action])
        words = "not reached"
        for hit in outcome.hits[:1]:
            words = "%s of %s" % (hit.name, "standard output" if hit.fd == 1 else os.path.basename(hit.path))
        return outcome, judge(tools, scenario, folder, outcome, excuses(outcome, action)), words


def sample(listed, number, rng):
    """A seeded sample in which every kind comes before any comes twice."""
    kinds = collections.defaultdict(list)
    for scenario, kind, action in listed:
        kinds[kind].append((scenario, kind, action))
    for group in kinds.values():
        rng.shuffle(group)
    chosen, groups = [], sorted(kinds.items())
    rng.shuffle(groups)
    while groups and len(chosen) < number:
        for name, group in groups:
            if group and len(chosen) < number:
                chosen.append(group.pop())
        groups = [(name, group) for name, group in groups if group]
    return chosen


class Table:
    """What was done how often, and how it ended."""

    def __init__(self):
        self.rows = collections.defaultdict(lambda: [0, 0, 0, 0])

    def add(self, scenario, name, outcome, problems):
        for key in (name, "  in " + scenario):
            row = self.rows[key]
            row[0] += 1
            row[1 if problems else 2 if outcome.code == 0 else 3] += 1

    def show(self, third="one line"):
        print("%-26s %9s %12s %9s %9s" % ("", "disturbed", "went through", third, "failed"))
        for name in sorted(self.rows):
            total, failed, through, line = self.rows[name]
            print("%-26s %9d %12d %9d %9d" % (name, total, through, line, failed))


def default_signals():
    """Signals that are ignored under nohup or in the background would be ignored in children too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def arguments(description):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=os.path.join(HERE, "..", "..", "train_sessa"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a seeded sample, of --number (the default)")
    parser.add_argument("--all", action="store_true", help="everything")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", help="one case, as a failure's line names it")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    parser.add_argument("--work", default=memory, help="where the runs' files lie")
    return parser


def group_of(kind, action):
    """The table's row."""
    if ":" in action:
        return kind[0]
    if "limit" in action:
        return "memory limit"
    return "allocation, " + ("libgomp" if "gomp" in kind[0] else "program" if "train" in kind[0] else "library")


class Tally:
    """Counts what passed and failed; shows failures with the command that repeats them, of a kind the first three."""

    def __init__(self, options, tool):
        self.passed, self.failed, self.shown = 0, 0, collections.Counter()
        self.again = "python3 dev/trust/%s --program %s --only" % (tool, os.path.relpath(options.program))
        self.all = options.all

    def add(self, group, words, problems, case):
        self.passed, self.failed = self.passed + (not problems), self.failed + bool(problems)
        if not problems:
            return
        kind = (group, problems[0][:40])
        self.shown[kind] += 1
        if self.shown[kind] <= 3 or self.all:
            print("FAIL %s: %s | again: %s '%s'" % (words, "; ".join(problems), self.again, case), flush=True)

    def more(self):
        for (group, text), count in sorted(self.shown.items()):
            if count > 3 and not self.all:
                print("  %s: %d times '%s...'" % (group, count, text))


def choose(tools, listed, options, rng):
    """What is to be done: rows of scenario, kind and action."""
    calls, allocations, limits = [], [], []
    for scenario in listed:
        calls += [(scenario, kind, action) for kind, action in disturbances(scenario)]
        allocations += [(scenario, kind, action) for kind, action in allocation_faults(scenario)]
        least, need = (memory_needed(tools, scenario, line) for line in ("--help", scenario.line))
        values = {rng.randrange(least, need) for _ in range(200 if options.all else 8)} if least < need else ()
        limits += [(scenario, ("memory", "", "limit"), "limit %d" % value) for value in sorted(values)]
    print("%d disturbances of system calls, %d of allocations are there" % (len(calls), len(allocations)), flush=True)
    if not options.all:
        return sample(calls, options.number * 2 // 3, rng) + sample(allocations, options.number // 3, rng) + limits
    of_libgomp = [row for row in allocations if "gomp" in row[1][0]]  # the same few bytes thousands of times
    others = [row for row in allocations if "gomp" not in row[1][0]]
    return calls + others + sample(of_libgomp, 500, rng) + limits


def main():
    parser = arguments(__doc__)
    parser.add_argument("--number", type=int, default=1200, help="disturbed runs of the sample")
    parser.add_argument("--scenario", help="this one alone")
    options = parser.parse_args()
    default_signals()
    rng, table, tally = random.Random(options.seed), Table(), Tally(options, "faults.py")
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        tools = Tools(options.program, folder)
        listed, problems = scenarios(tools, random.Random(5))
        if options.only:
            name, action = options.only.split(" ", 1)
            if name in problems:
                print("%s undisturbed: %s" % (name, problems[name]))
            scenario = {scenario.name: scenario for scenario in listed}.get(name)
            if not scenario:
                return True
            outcome, problems, words = disturb(tools, scenario, action)
            print("%s: %s\nexit code %s, signal %d" % (options.only, words, outcome.code, outcome.signal))
            print(outcome.err + ("\n".join(problems) or "nothing wrong"))
            return bool(problems)
        for scenario in listed:
            counts = scenario.name, len(scenario.calls), len(scenario.allocations)
            print("%-14s %5d system calls, %5d allocations" % counts)
            if scenario.name not in problems:
                tally.add("undisturbed", scenario.name, [], "")
        for name, wrong in problems.items():
            tally.add("undisturbed", name + " undisturbed", [wrong], name + " 0:fail=0")
        chosen = choose(tools, [s for s in listed if options.scenario in (None, s.name)], options, rng)

        def one(row):
            return row, disturb(tools, row[0], row[2])

        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            for (scenario, kind, action), (outcome, problems, words) in pool.map(one, chosen):
                if words == "not reached" and not problems:
                    continue
                group, case = group_of(kind, action), "%s %s" % (scenario.name, action)
                table.add(scenario.name, group, outcome, problems)
                tally.add(group, "%s, %s (%s)" % (scenario.name, kind[2], words), problems, case)
        table.show()
        tally.more()
    print("%d passed, %d failed" % (tally.passed, tally.failed))
    return tally.failed > 0


if __name__ == "__main__":
    sys.exit(main())
