"""What threads that wait for each other cost on two cores that are not theirs alone: a step of the default model, alone, beside
a second training, beside a busy loop, under a quota of one core and of half a core.

  dev/speed/waiting.py --before OLD_PROGRAM                     # a build of before against ./train_sessa
  dev/speed/waiting.py --set GOMP_SPINCOUNT=100 --only pair     # variables of libgomp's tried on the program

Everything is measured in rounds that alternate, and what counts is the median of the ratios within a round. A rate is the
number of lines that a log grows by in a window of time. A quota is a cgroup's where one can be made (as root); else the
process is bound to one core and, for half of one, stopped every other twentieth of a second, and the output says so.
"""
import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
USERS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


class Run:
    """A training that goes on until it is killed."""

    def __init__(self, program, folder, variables, cores, cgroup=None, stdout=subprocess.DEVNULL):
        self.folder = tempfile.mkdtemp(dir=folder)
        self.log = os.path.join(self.folder, "log")
        environment = {name: value for name, value in os.environ.items() if name not in USERS}

        def inside():
            os.sched_setaffinity(0, cores)
            if cgroup:
                with open(os.path.join(cgroup, "cgroup.procs"), "w") as procs:
                    procs.write(str(os.getpid()))
        command = [program, "--data", args.data, "--steps", "1000000", "--eval-every", "0", "--log", self.log, "--out",
                   os.path.join(self.folder, "x.safetensors")] + args.options.split()
        self.process = subprocess.Popen(command, env={**environment, **variables}, preexec_fn=inside, stdout=stdout)

    def lines(self):
        with contextlib.suppress(OSError), open(self.log, "rb") as log:
            return log.read().count(b"\n")
        return 0

    def begin(self):
        """Waits for the first steps."""
        until = time.monotonic() + 60
        while self.lines() < 3:
            if self.process.poll() is not None or time.monotonic() > until:
                sys.exit(f"{self.process.args[0]} does not train")
            time.sleep(0.01)

    def end(self):
        self.process.kill()
        self.process.wait()


def rates(runs, windows=1):
    """Steps a second of each, over the same time."""
    for run in runs:
        run.begin()
    before, start = [run.lines() for run in runs], time.monotonic()
    time.sleep(args.window * windows)
    after, taken = [run.lines() for run in runs], time.monotonic() - start
    for run in runs:
        run.end()
    return [max(b - a, 0.5) / taken for a, b in zip(before, after)]     # no step at all: not none, for a ratio


@contextlib.contextmanager
def quota(share):
    """A cgroup of this share of a core; None where none can be made."""
    name, path = f"sessa-waiting-{os.getpid()}", None
    with contextlib.suppress(OSError):
        if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
            path = f"/sys/fs/cgroup/{name}"
            os.mkdir(path)
            with open(f"{path}/cpu.max", "w") as file:
                file.write(f"{int(share * 100000)} 100000")
        else:
            path = f"/sys/fs/cgroup/cpu/{name}"
            os.mkdir(path)
            with open(f"{path}/cpu.cfs_quota_us", "w") as file:
                file.write(str(int(share * 100000)))
        yield path
        for _ in range(100):
            with contextlib.suppress(OSError):
                os.rmdir(path)
                return
            time.sleep(0.05)
        return
    with contextlib.suppress(OSError):
        os.rmdir(path)
    yield None


def under_quota(share, threads):
    """Steps a second of so many threads."""
    variables = {**own, "OMP_NUM_THREADS": str(threads)}
    with quota(share) as cgroup:
        if cgroup:
            return rates([Run(args.program, folder, variables, cores, cgroup)], 3)[0]
    stand_ins.add(share)
    run = Run(args.program, folder, variables, cores[:1])
    ended = threading.Event()

    def stop_and_go():
        while not ended.is_set():
            for number in (signal.SIGSTOP, signal.SIGCONT):
                with contextlib.suppress(ProcessLookupError):
                    run.process.send_signal(number)
                ended.wait(0.05)
    if share < 1:
        threading.Thread(target=stop_and_go, daemon=True).start()
    result = rates([run], 3)[0]
    ended.set()
    return result


def told_threads(share):
    """The number of threads that the program says it takes under a quota; None where there can be none."""
    with quota(share) as cgroup:
        if not cgroup:
            return None
        run = Run(args.program, folder, own, cores, cgroup, stdout=subprocess.PIPE)
        first = run.process.stdout.readline().decode()
        run.end()
    return int(first.split(" threads")[0].split()[-1])


def alone(program=None, variables=None):
    return rates([Run(program or args.program, folder, own if variables is None else variables, cores)])[0]


def idle():
    before = alone(args.before, {})
    return before / alone()


def pair():
    rate = alone()
    return min(rates([Run(args.program, folder, own, cores) for _ in range(2)])) / rate


def loop():
    rate = alone()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=lambda: os.sched_setaffinity(0, cores))
    try:
        return rate / alone()
    finally:
        busy.kill()
        busy.wait()


# what, the ratio, its bound, whether it must be at most or at least that
MEASURED = {
    "idle": ("alone: a step, in steps of the build before", idle, 1.05, "<="),
    "pair": ("two trainings: the rate of the slower one, in rates of one alone", pair, 0.28, ">="),
    "loop": ("a busy loop beside: a step, in steps of one alone", loop, 3.3, "<="),
    "core": ("a quota of one core: a step of two threads, in steps of one", lambda: under_quota(1, 1) / under_quota(1, 2), 1.3, "<="),
    "half": ("a quota of half a core: the same", lambda: under_quota(0.5, 1) / under_quota(0.5, 2), 1.3, "<="),
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--program", default="./train_sessa")
parser.add_argument("--before", help="a build of before; without one `idle` is not measured")
parser.add_argument("--data", default=os.path.join(HERE, "..", "..", "train_sessa.c"))
parser.add_argument("--options", default="", help="of the program: another model")
parser.add_argument("--only", nargs="+", choices=MEASURED, default=list(MEASURED))
parser.add_argument("--runs", type=int, default=10)
parser.add_argument("--window", type=float, default=2, help="seconds that a rate is taken over")
parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="for the program's environment")
args = parser.parse_args()

cores = sorted(os.sched_getaffinity(0))[:2]
own = dict(pair.split("=", 1) for pair in args.set)
stand_ins = set()
failed = 0
with tempfile.TemporaryDirectory() as folder:
    for key in args.only:
        what, measure, bound, sense = MEASURED[key]
        if key == "idle" and not args.before:
            continue
        ratios = sorted(measure() for _ in range(args.runs))
        median = statistics.median(ratios)
        held = median <= bound if sense == "<=" else median >= bound
        failed += not held
        note = " (no cgroup: bound to one core, stopped half of the time)" if {"half": 0.5, "core": 1}.get(key) in stand_ins else ""
        print(f"{'ok  ' if held else 'FAIL'} {what}: {median:.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f}), bound {sense} {bound}{note}",
              flush=True)
    told = told_threads(1)
    if told is not None:
        failed += told != 1
        print(f"{'ok  ' if told == 1 else 'FAIL'} a quota of one core, nothing said of threads: {told}")
sys.exit(failed > 0)
