"""What happens to a machine: kills, a full disk, folders and files that cannot be written, closed pipes, broken data.

    python3 dev/trust/crash.py [--kills 300] [--seed 1] [--program ./train_sessa]

Each line is one check. A kill (SIGKILL) strikes at a random moment, half of them while a save is under way; what is on the
disk must load, and resumed it must give the bytes of a run that nobody killed. Needs Linux; mounting a small disk needs
root (else that check is left out, and says so). About two minutes for 300 kills.
"""

import argparse
import glob
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
passed = failed = 0


def check(ok, what, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    print("  %-100s %s" % (what, "ok" if ok else "FAIL\n    %s" % detail), flush=True)


def read(path):
    with open(path, "rb") as file:
        return file.read()


def step_of(path):
    """The step that a checkpoint holds, -1 if there is none or it is no checkpoint."""
    try:
        content = read(path)
        return int(json.loads(content[8:8 + struct.unpack("<Q", content[:8])[0]])["__metadata__"]["step"])
    except (OSError, ValueError, KeyError, struct.error):
        return -1


class Program:
    def __init__(self, path, folder):
        self.path, self.folder = path, folder

    def start(self, line, **options):
        options.setdefault("stdout", subprocess.DEVNULL)
        return subprocess.Popen([self.path] + line.split(), cwd=self.folder, stderr=subprocess.PIPE, **options)

    def run(self, line, **options):
        """Exit code and what stands on standard error."""
        child = self.start(line, **options)
        error = child.communicate()[1].decode()
        return child.returncode, error


MODEL = "--data text --dim 32 --layers 3 --heads 2 --seq 16 --batch 2 --dropout 0.1 --warmup 5 --eval-batches 1 "
SHAPE = MODEL + "--eval-every 7 "
ONE_LINE = "exit code 1 and one line on standard error"


def one_line(code, error, wanted=1):
    return code == wanted and error.count("\n") == 1 and error.startswith("train_sessa: ") and len(error) > 25


def kills(program, number, rng):
    """A run is killed and resumed until it is at its end, again and again."""
    folder, steps, saving, resumed, loaded, done, leftovers = program.folder, 120, 0, 0, 0, 0, 0
    out, whole = os.path.join(folder, "run.safetensors"), os.path.join(folder, "whole.safetensors")
    program.run(SHAPE + "--steps %d --out whole.safetensors --save-every 1" % steps)
    start = time.time()
    program.run(SHAPE + "--steps %d --out other.safetensors --save-every 1" % steps)
    duration, killed, problem = time.time() - start, 0, ""
    first = SHAPE + "--steps %d --out run.safetensors --save-every 1 --overwrite" % steps  # best weights may lie there alone
    again = "--resume run.safetensors --save-every 1 --eval-every 7 --eval-batches 1"
    while killed < number:
        exists = os.path.exists(out)
        child = program.start(again if exists else first)
        deadline = time.time() + rng.random() * duration * 0.3
        if killed % 2:  # inside a save: its temporary file is there
            while time.time() < deadline + 1 and child.poll() is None:
                if time.time() > deadline and glob.glob(out + ".tmp.*"):
                    break
        else:
            time.sleep(max(0, deadline - time.time()))
        child.kill()
        code = child.wait()
        error = child.stderr.read().decode()
        child.stderr.close()
        if code == -signal.SIGKILL:
            killed += 1
            saving += bool(glob.glob(out + ".tmp.*"))
        elif code:
            problem = problem or error or "exit code %d" % code
        leftovers = max(leftovers, len(glob.glob(os.path.join(folder, "*.tmp.*"))))
        if os.path.exists(out):
            resumed += 1
            step = step_of(out)
            loaded += 0 < step <= steps
            if step == steps or code == 0:
                done += read(out) == read(whole) and read(out.replace("run.", "run.best.")) == read(whole.replace("whole.", "whole.best."))
                for name in glob.glob(os.path.join(folder, "run.*")):
                    os.unlink(name)
    ends = 0
    if os.path.exists(out):  # what is left is resumed to the end as well
        code, error = program.run(again)
        ends = code == 0 and read(out) == read(whole)
        problem = problem or error
    else:
        ends = True
    check(not problem and loaded == resumed, "%d kills: the file on the disk is whole and its metadata readable, each time" % killed, problem)
    check(saving > number // 4, "%d of them while the temporary file of a save lay there" % saving)
    check((done > 0 or number < 40) and ends, "%d runs came to their end between the kills: run and best weights are those of a run not killed" % done)
    check(leftovers <= 3, "each run removes what killed ones left: at most %d temporary files lay there" % leftovers)
    program.run(again if os.path.exists(out) else first)
    check(not glob.glob(os.path.join(folder, "*.tmp.*")), "none is left after the next run")


# Between the program and the C library: writes down what is flushed and renamed.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
static void note(const char *what) {
    FILE *out = fopen(getenv("TRACE"), "a");
    fputs(what, out);
    fclose(out);
}
int fsync(int fd) {
    struct stat info;
    fstat(fd, &info);
    note(S_ISDIR(info.st_mode) ? "folder " : "file ");
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
int rename(const char *from, const char *to) {
    note("rename ");
    return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename"))(from, to);
}
"""


def power(program, folder):
    """A power cut cannot be staged here; what makes it harmless can be seen: the order of flushes and renames."""
    source, shim, trace = folder + "/shim.c", folder + "/shim.so", folder + "/trace"
    with open(source, "w") as out:
        out.write(SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-w", source, "-o", shim, "-ldl"], check=True)
    code, error = program.run(SHAPE + "--steps 14 --save-every 7 --out power.safetensors", env=dict(os.environ, LD_PRELOAD=shim, TRACE=trace))
    saves = read(trace).decode().strip()  # two trials; the run twice, the best weights once or twice
    check(code == 0 and saves in ("file file " + " ".join(["file rename folder"] * n) for n in (3, 4)),
          "each save flushes the file, renames it, then flushes the folder; before the first step both are tried", saves)


def full_disk(program, folder):
    disk = os.path.join(folder, "disk")
    os.makedirs(disk)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], stderr=subprocess.DEVNULL).returncode:
        print("  a full disk: left out, no right to mount one")
        return
    try:
        shutil.copy(os.path.join(program.folder, "text"), disk)
        on_disk = Program(program.path, disk)
        code, error = on_disk.run(SHAPE + "--steps 4 --out run.safetensors")
        before, names = read(disk + "/run.safetensors"), set(os.listdir(disk))
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        with open(disk + "/filler", "wb") as out:
            out.write(bytes(free - len(before) // 2))
        code, error = on_disk.run("--resume run.safetensors --steps 9")
        check(one_line(code, error) and "No space left" in error and "holds step 4" in error, "a full disk: " + ONE_LINE + ", it names the last good checkpoint", error)
        check(read(disk + "/run.safetensors") == before and set(os.listdir(disk)) == names | {"filler"}, "the old checkpoint is as it was, no temporary file is left")
        os.unlink(disk + "/filler")
        code, error = on_disk.run("--resume run.safetensors --steps 9")
        check(code == 0 and step_of(disk + "/run.safetensors") == 9, "with room again it goes on", error)
    finally:
        subprocess.run(["umount", disk])


def unwritable(program, folder):
    root = os.geteuid() == 0
    user = {"user": 65534, "group": 65534} if root else {}  # root may write everything
    place = os.path.join(folder, "place")
    os.makedirs(place)
    shutil.copy(os.path.join(program.folder, "text"), place)
    os.chmod(folder, 0o755)
    os.chmod(place, 0o777)
    here = Program(program.path, place)
    code, error = here.run(SHAPE + "--steps 4 --out run.safetensors", **user)
    check(code == 0, "a run of a user without rights", error)
    before = read(place + "/run.safetensors")
    os.chmod(place, 0o555)
    for line in ("--resume run.safetensors --steps 9", SHAPE + "--steps 4 --out new.safetensors"):
        code, error = here.run(line, **user)
        check(one_line(code, error) and "Permission denied" in error, "a read-only folder: " + ONE_LINE, error)
    os.chmod(place, 0o777)
    os.chmod(place + "/run.safetensors", 0o444)
    code, error = here.run("--resume run.safetensors --steps 9", **user)
    check(one_line(code, error) and "Permission denied" in error, "an unwritable file: " + ONE_LINE, error)
    os.chmod(place + "/run.safetensors", 0o600)
    check(read(place + "/run.safetensors") == before, "the old checkpoint is as it was")
    code, error = here.run("--resume run.safetensors --steps 5", **user)
    check(code == 0 and os.stat(place + "/run.safetensors").st_mode & 0o777 == 0o600, "a file that only its owner may read stays one", error)
    for name in ("way.safetensors", "path.best.safetensors"):
        os.makedirs(os.path.join(place, name))
    for name in ("way", "path"):
        code, error = here.run(SHAPE + "--steps 4 --out %s.safetensors" % name, **user)
        check(one_line(code, error) and "not a regular file" in error, "a directory in the way of %s: " % ("the run" if name == "way" else "the best weights") + ONE_LINE, error)
    os.chmod(place + "/text", 0)
    code, error = here.run(SHAPE + "--steps 4 --out new.safetensors", **user)
    check(one_line(code, error), "data that must not be read: " + ONE_LINE, error)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))
    program.run(SHAPE + "--steps 4 --out limit.safetensors")
    before = read(os.path.join(program.folder, "limit.safetensors"))
    code, error = program.run("--resume limit.safetensors --steps 9", preexec_fn=limit)
    check(one_line(code, error) and "File too large" in error and read(os.path.join(program.folder, "limit.safetensors")) == before and
          not glob.glob(os.path.join(program.folder, "*.tmp.*")), "a file size beyond its limit: " + ONE_LINE + ", the old checkpoint as it was", error)


def pipes(program):
    folder = program.folder
    program.run(SHAPE + "--steps 4 --out four.safetensors")

    def closed(line):
        reader, writer = os.pipe()
        os.close(reader)
        result = program.run(line, stdout=writer)
        os.close(writer)
        return result

    def full(line):
        with open("/dev/full", "wb") as out:
            return program.run(line, stdout=out)

    for name, way in (("a closed pipe", closed), ("a full disk", full)):
        code, error = way(SHAPE + "--steps 30 --sample-every 3 --out pipe.safetensors --overwrite")
        check(one_line(code, error) and "standard output" in error and step_of(folder + "/pipe.safetensors") == 30,
              name + " as standard output: training goes on to its end, then " + ONE_LINE, error)
        for line in ("--load four.safetensors --generate 50", "--load four.safetensors --data text --eval", "--help"):
            code, error = way(line)
            if line == "--help" and way is closed:  # "--help | head" ends as any program does
                check(code == -signal.SIGPIPE and not error, "--help into a closed pipe ends without a word", error)
                continue
            check(one_line(code, error) and "standard output" in error, name + " as standard output of %s: " % line.split()[-2 if "gen" in line else -1] + ONE_LINE, error)


def ended(child):
    """What stands on the standard error of a child that was sent a signal; it is killed if it has not ended within a minute."""
    try:
        return child.communicate(timeout=60)[1].decode()
    except subprocess.TimeoutExpired:
        child.kill()
        return child.communicate()[1].decode()


def signals(program):
    folder = program.folder
    for number, name in ((signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "a closed terminal")):
        child = program.start(MODEL + "--steps 100000000 --decay-steps 200 --save-every 100000000 --eval-every 0 --out signal.safetensors --log signal.log")
        while child.poll() is None and (not os.path.exists(folder + "/signal.log") or read(folder + "/signal.log").count(b"\n") < 5):
            time.sleep(0.002)
        child.send_signal(number)
        error = ended(child)
        steps = read(folder + "/signal.log").count(b"\n")
        saved = step_of(folder + "/signal.safetensors")
        check(child.returncode == 130 and not error and saved == steps, "%s: the step is ended and saved, exit code 130" % name, "%d, step %d of %d: %s" % (child.returncode, saved, steps, error))
        for leftover in glob.glob(folder + "/signal.*"):
            os.unlink(leftover)
    whole = 0
    for _ in range(10):  # behind the place where a step is saved
        child = program.start(MODEL + "--steps 1000000 --decay-steps 200 --save-every 1000000 --eval-every 0 --sample-every 2 --out signal.safetensors --log signal.log", stdout=subprocess.PIPE)
        while child.stdout.readline() not in (b"---\n", b""):
            pass
        child.send_signal(signal.SIGINT)
        ended(child)
        whole += child.returncode == 130 and step_of(folder + "/signal.safetensors") == read(folder + "/signal.log").count(b"\n") > 0
        for leftover in glob.glob(folder + "/signal.*"):
            os.unlink(leftover)
    check(whole == 10, "Ctrl-C while a sample is printed: saved each time (%d of 10)" % whole)
    child = program.start(MODEL + "--steps 400 --eval-every 0 --out signal.safetensors", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    time.sleep(0.1)
    child.send_signal(signal.SIGHUP)
    ended(child)
    check(child.returncode == 0, "under nohup a closed terminal changes nothing")


def data(program):
    """Data that changes under a run and between runs."""
    folder = program.folder
    text = read(folder + "/text")
    program.run(MODEL + "--steps 300 --eval-every 100 --overwrite --out whole.safetensors")
    for name, content in (("cut to nothing", b""), ("written over", b"x" * len(text))):
        with open(folder + "/moving", "wb") as out:
            out.write(text)
        child = program.start(MODEL.replace("text", "moving") + "--steps 300 --eval-every 100 --overwrite --out moved.safetensors --log moved.log")
        while child.poll() is None and (not os.path.exists(folder + "/moved.log") or not read(folder + "/moved.log")):
            time.sleep(0.001)
        with open(folder + "/moving", "wb") as out:
            out.write(content)
        error = child.communicate()[1].decode()
        same = read(folder + "/moved.safetensors")[-1000:] == read(folder + "/whole.safetensors")[-1000:]
        check(child.returncode == 0 and not error and same, "data %s while the run trains: nothing changes, it was read whole before" % name, error)
        code, error = program.run("--resume moved.safetensors --steps 400")
        check(one_line(code, error) and ("hash" in error or "empty" in error), "the run resumed on it: refused, " + ONE_LINE, error)
        for leftover in glob.glob(folder + "/moved.*"):
            os.unlink(leftover)
    with open(folder + "/moving", "wb") as out:
        out.write(text[:-1] + bytes([text[-1] ^ 1]))
    code, error = program.run("--resume whole.safetensors --steps 400 --data moving")
    check(one_line(code, error) and "the run being resumed read" in error, "one bit changed, the size the same: refused, " + ONE_LINE, error)
    for given in ("--mixer attention", "--dim 16", "--layers 2", "--heads 4", "--seq 8", "--batch 3", "--dropout 0", "--eps 1e-3", "--seed 3", "--accum 2"):
        code, error = program.run("--resume whole.safetensors --steps 400 " + given)
        check(one_line(code, error, 2) and given.split()[0] in error and "which has" in error, "resumed with %s: exit code 2 and the line says what differs" % given, error)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--program", default=os.path.join(HERE, "..", "..", "train_sessa"))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # ignored under nohup or in the background, and then in children too
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = os.path.join(folder, "work")
        os.makedirs(work)
        program = Program(shutil.copy(options.program, folder), work)
        with open(work + "/text", "wb") as out:
            out.write(bytes(rng.choice(b"abcdefgh \n") for _ in range(5000)))
        kills(program, options.kills, rng)
        power(program, folder)
        full_disk(program, folder)
        unwritable(program, folder)
        pipes(program)
        signals(program)
        data(program)
    print("%d passed, %d failed" % (passed, failed))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
