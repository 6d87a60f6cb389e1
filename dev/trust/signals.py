"""Signals at every system call, at random moments, twice, from closing terminals and `timeout`: nothing is lost.

    python3 dev/trust/signals.py [--program ./train_sessa] [--quick | --all] [--seed 1] [--only 'resume 57:entry=15']

From the moment that training has begun, the first INT, TERM, HUP, USR1, USR2 or XCPU ends the step and saves,
with exit code 130; resumed, the run leaves the bytes of one that was not stopped, log and all. A second one,
sent by kill, by `timeout` or by a shell whose terminal closes, loses nothing. Only a second Ctrl-C at a
terminal ends at once, after the line that told so, and during a save even that waits. Before training has
begun a signal may end the program as usual, and nothing has been replaced then.

Signals at system calls: faults.c sends them as the K-th call is made and as it returns, alone and in
pairs, the second at a later call or 0, 1, 20 ms later (one thread). Random moments: two threads. --quick, the
default, is a seeded sample. Needs Linux on x86-64 or arm64, cc, and for the terminals bash and dash; what is not
there is left out, and said.
"""

import concurrent.futures
import itertools
import os
import pty
import random
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import faults
from faults import (BEST, LOG, RUN, Scenario, Table, Tools, files_of, go_on, is_stray, log_lines, read,
                    said_but_missing, sample, step_of, write_files)

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]
PAIRS = list(itertools.product(SIGNALS, SIGNALS))
STOPPED = 130
passed = failed = 0


def name_of(number):
    return signal.Signals(number).name[3:]


def check(problems, what):
    """Counts a check and prints it; problems: an empty list, or what is wrong."""
    global passed, failed
    passed, failed = passed + (not problems), failed + bool(problems)
    print("  %-110s %s" % (what, "ok" if not problems else "FAIL\n    " + "; ".join(problems[:6])), flush=True)


def default(number):
    """Signals that are ignored where this runs would be ignored in children too."""
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


# ---------------------------------------------------------------------------
# what is promised

def judge(tools, scenario, folder, outcome, begun=True, must_stop=True):
    """What is wrong after a run was sent signals: a list of words. begun: training had begun when the first one came;
    must_stop: there were steps left, so that it may not just have gone on."""
    files, problems = files_of(folder), []
    if outcome.hung:
        return ["it hangs"]
    if outcome.signal and not begun:  # as any program: nothing may have been replaced
        changed = [name for name, old in scenario.before.items() if files.get(name) != old and not is_stray(name)]
        problems += ["ended by the signal before training began, and %s was changed" % name for name in changed]
        for name in files:
            if is_stray(name):  # the next run removes them
                continue
            if name not in scenario.before and not (name == LOG and not files[name]):
                problems.append("ended by the signal before training began, and %s was made" % name)
        return problems + (go_on(tools, scenario, folder, files) if scenario.trains else [])
    if outcome.signal:
        return ["ended by signal %d" % outcome.signal]
    if outcome.code not in (scenario.code, STOPPED) or (outcome.err and not scenario.code):
        problems.append("exit code %s: %r" % (outcome.code, outcome.err[:200]))
    if outcome.code == 0 and must_stop and begun:
        problems.append("exit code 0: it went on as if there had been no signal")
    if outcome.code == 0 and scenario.trains and any(files.get(n) != scenario.after[n] for n in (RUN, BEST)):
        problems.append("exit code 0, but run or best weights are not those of an undisturbed run")
    strays = sorted(name for name in files if is_stray(name) and name not in scenario.before)
    if strays:
        problems.append("left: " + " ".join(strays))
    if not scenario.trains:
        names = sorted(set(files) | set(scenario.before))
        return problems + ["%s was changed" % name for name in names if files.get(name) != scenario.before.get(name)]
    if outcome.code == STOPPED and RUN not in files:
        problems.append("exit code 130, and no run was saved")
    lines, torn = log_lines(files.get(LOG, b""))
    if torn or not faults.as_far_as(lines, scenario.lines):
        problems.append("the log: " + (torn or "other lines than those of an undisturbed run"))
    elif files.get(LOG) == scenario.before.get(LOG):
        pass  # stopped before there was a line to write: what a killed run left is cut off with the first one
    elif outcome.code == STOPPED and RUN in files and len(lines) > step_of(files[RUN]):
        words = "the log has %d lines, the run that was saved is of step %d"
        problems.append(words % (len(lines), step_of(files[RUN])))
    problems += ["%s is said to be there, and is not" % name for name in said_but_missing(outcome, files)]
    return problems + go_on(tools, scenario, folder, files)


# ---------------------------------------------------------------------------
# at system calls

def landmarks(scenario):
    """The call from which on all handlers stand, and the one from which on a signal may find no step left."""
    first = {str(int(number)) for number in SIGNALS}
    placed = [c.count for c in scenario.calls if c.name == "rt_sigaction" and c.path in first]
    written = [c.count for c in scenario.calls if c.name.startswith("write") and faults.kind_of(c.path) == "log"]
    return placed[-1] if placed else 0, written[-3] if len(written) > 2 else 0


def at_calls(tools, listed, options, rng):
    """Signals as a call is made and as it returns, alone and in pairs. Returns what passed and failed."""
    singles, pairs = [], []
    for scenario in listed:
        calls = faults.some_output(scenario.calls)
        for call in calls:
            kind = (call.name, faults.kind_of(call.path) if call.path != "-" else "")
            for form in ("entry", "exit") if call.name != "exit_group" else ("entry",):
                place = "%d:%s" % (call.count, form)
                singles += [(scenario, kind + (form,), ["%s=%d" % (place, number)]) for number in SIGNALS]
                for first, second in PAIRS:
                    later = max(call.count, rng.choice(calls).count)
                    ways = [["%s=%d,%d,%d" % (place, first, second, ms)] for ms in (0, 1, 20)]
                    ways.append(["%s=%d" % (place, first), "%d:entry=%d" % (later, second)])
                    pairs.append((scenario, kind + (name_of(first), name_of(second)), rng.choice(ways)))
    number = options.number // 2
    chosen = sample(singles, number, rng) + sample(pairs, number, rng)
    if options.all:
        chosen = singles + sample(pairs, 6000, rng)
    counts = len(singles), len(pairs), len(chosen)
    print("%d signals and %d pairs could come at system calls; %d do" % counts, flush=True)
    table, tally = Table(), faults.Tally(options, "signals.py")

    def one(row):
        return row, at_call(tools, row[0], row[2])

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for (scenario, kind, actions), (outcome, problems) in pool.map(one, chosen):
            group = "one signal" if len(actions) == 1 and "," not in actions[0] else "two signals"
            table.add(scenario.name, group, outcome, problems)
            table.add(scenario.name, "at " + kind[0], outcome, problems)
            case = "%s %s" % (scenario.name, " ".join(actions))
            tally.add(group, "%s at %s" % (scenario.name, kind[0]), problems, case)
    table.show("stopped")
    tally.more()
    return tally.passed, tally.failed


def at_call(tools, scenario, actions):
    """Runs a scenario with these signals: the outcome, and what is wrong."""
    stands, late = landmarks(scenario)
    place, form = actions[0].split("=")[0].split(":")
    place = int(place)
    begun = scenario.trains and (place > stands or (place == stands and form == "exit"))
    with tempfile.TemporaryDirectory(dir=tools.folder) as folder:
        write_files(folder, scenario.before)
        outcome = tools.run(folder, scenario.line, actions)
        if not outcome.hits:
            return outcome, []
        return outcome, judge(tools, scenario, folder, outcome, begun, place < late)


# ---------------------------------------------------------------------------
# at random moments

LONG_WATCH = "--save-every 40 --eval-every 30 --eval-batches 4 --sample-every 60 --log run.log "
LONG = ("--data text --dim 64 --layers 1 --heads 2 --seq 32 --batch 4 --dropout 0.1 --warmup 5 --steps 150 "
        "--out run.safetensors " + LONG_WATCH)
LONG_AGAIN = "--resume run.safetensors " + LONG_WATCH


class Moment:
    """A run that goes on while this looks: started in a folder, waited for, and judged like one at system calls."""

    def __init__(self, tools, scenario, command=None, threads=2, env=None, **options):
        self.tools, self.scenario, self.began = tools, scenario, time.time()
        self.place = tempfile.TemporaryDirectory(dir=tools.folder)
        self.folder = self.place.name
        write_files(self.folder, scenario.before)
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "1000", **(env or {})}
        command = command or [tools.program] + shlex.split(scenario.line)
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        self.child = subprocess.Popen(command, cwd=self.folder, env=env, **options)

    def lines(self):
        try:
            return read(os.path.join(self.folder, LOG)).count(b"\n")
        except FileNotFoundError:
            return 0

    def wait_for(self, ready, seconds=60):
        """Until ready() holds, the run has ended or the time is over."""
        end = time.time() + seconds
        while not ready() and self.child.poll() is None and time.time() < end:
            time.sleep(0.001)
        return ready()

    def send(self, number):
        if self.child.poll() is None:
            self.child.send_signal(number)

    def end(self, report=None, seconds=60):
        """The outcome, from the run itself or from the wrapper's report."""
        outcome = faults.Outcome()
        try:
            out, err = self.child.communicate(timeout=seconds)
            outcome.out, outcome.err = ((text or b"").decode(errors="replace") for text in (out, err))
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.communicate()
            outcome.hung = True
        code = self.child.returncode
        outcome.code, outcome.signal = (code, 0) if code >= 0 else (None, -code)
        if report:
            end = time.time() + seconds
            while time.time() < end and not (os.path.exists(report) and read(report).endswith(b"\n")):
                time.sleep(0.002)
            outcome.code, outcome.signal, outcome.hung = None, 0, False
            outcome.take(read(report).decode() if os.path.exists(report) else "")
            outcome.hung = outcome.code is None and not outcome.signal
        return outcome

    def judged(self, outcome, must_stop=True):
        """What is wrong; the folder is removed."""
        problems = judge(self.tools, self.scenario, self.folder, outcome, True, must_stop)
        self.place.cleanup()
        return problems


class Tally:
    """Runs that signals stopped, those that had come to their end before, and those that lost something."""

    def __init__(self):
        self.stopped, self.total, self.lost = 0, 0, []

    def add(self, run, outcome, words="", **more):
        problems = run.judged(outcome, **more)
        self.stopped, self.total = self.stopped + (outcome.code == STOPPED), self.total + 1
        self.lost += [words + "; ".join(problems)] * bool(problems)

    def check(self, words):
        none = [] if self.stopped else ["none of them was stopped"]
        counts = words, self.total, self.stopped, len(self.lost)
        check(self.lost + none, "%s: %d runs, %d of them stopped, %d lost" % counts)


def after_some_steps(run, rng, look=lambda: None):
    """Waits until a random step of a long run; whether that came."""
    lines = rng.randrange(1, 120)

    def ready():
        look()
        return run.lines() >= lines

    run.wait_for(ready)
    time.sleep(rng.random() * 0.004)
    return run.lines() < 140  # there is something left to do


def random_moments(tools, scenario, options, rng):
    """Two threads, two signals: all pairs, at any time after the first step."""
    tally = Tally()
    for first, second in PAIRS * (3 if options.all else 1):
        for ms in (0, 1, 20) if options.all else (rng.choice((0, 1, 20)),):
            run = Moment(tools, scenario)
            early = after_some_steps(run, rng)
            run.send(first)
            if ms:
                time.sleep(ms / 1000)
            run.send(second)
            words = "%s, then %s after %d ms: " % (name_of(first), name_of(second), ms)
            tally.add(run, run.end(), words, must_stop=early)
    tally.check("two threads, two signals at random moments, all pairs")


def timeouts(tools, scenario, duration, options, rng):
    """`timeout` sends its signal to the program and to its group: twice. A run that comes to its end before says how
    long one takes now: the machine may have been busier when `duration` was measured."""
    found = shutil.which("timeout")
    if not found or b"preserve-status" not in subprocess.run([found, "--help"], capture_output=True).stdout:
        print("  timeout: left out, there is no GNU timeout")
        return
    for words in ([], ["-s", "INT"], ["-s", "HUP"], ["-k", "20"]):
        tally = Tally()
        while tally.stopped + len(tally.lost) < (20 if options.all else 3) and tally.total < 60:
            seconds = max(0.05, duration * (0.2 + 0.5 * rng.random()))
            command = ["timeout", "--preserve-status"] + words + ["%.3f" % seconds, tools.program]
            run = Moment(tools, scenario, command + shlex.split(scenario.line))
            outcome = run.end()
            if outcome.code == 0:
                duration = min(duration, time.time() - run.began)
            tally.add(run, outcome, must_stop=False)
        tally.check(" ".join(["timeout"] + words))


def nohup(tools, scenario):
    run = Moment(tools, scenario, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    run.wait_for(lambda: run.lines() > 0)
    for _ in range(2):
        run.send(signal.SIGHUP)
        time.sleep(0.02)
    outcome = run.end()
    problems = ["exit code %s, signal %d" % (outcome.code, outcome.signal)] * (outcome.code != 0)
    check(problems + run.judged(outcome, must_stop=False), "under nohup SIGHUP changes nothing")
    run = Moment(tools, scenario, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    run.wait_for(lambda: run.lines() > 0)
    run.send(signal.SIGHUP)
    run.send(signal.SIGTERM)
    check(run.judged(run.end()), "and SIGTERM after it stops and saves")


def validations(tools, options, given, rng):
    """A long validation is broken off: after a step, and at the end, over the whole split."""
    folder = tempfile.mkdtemp(dir=tools.folder)
    letters = given["text"]
    write_files(folder, {"text": letters, "asked": bytes(rng.choice(letters) for _ in range(20000))})
    shape = "--data text --val asked --dim 32 --layers 2 --heads 2 --seq 16 --batch 4 "
    tools.run(folder, shape + "--steps 1 --eval-every 0 --out base.safetensors", traced=False)
    start = time.time()
    tools.run(folder, "--load base.best.safetensors --data text --val asked --eval", traced=False)
    size = int(20000 * max(1.0, 1.5 / max(0.01, time.time() - start)))
    before = {"text": letters, "asked": bytes(rng.choice(letters) for _ in range(size))}
    start = time.time()
    write_files(folder, before)
    tools.run(folder, "--load base.best.safetensors --data text --val asked --eval", traced=False)
    whole = time.time() - start
    shutil.rmtree(folder)
    for every, steps, lines, words in ((2, 3, 1, "after a step"), (0, 2, 1, "at the end, over the whole split")):
        watch = "--eval-batches 1000000000 --eval-every %d --save-every 1 --log run.log " % every
        line, again = shape + watch + "--steps %d --out run.safetensors" % steps, "--resume run.safetensors " + watch
        scenario = Scenario("validation", line, before, again)
        with tempfile.TemporaryDirectory(dir=tools.folder) as folder:
            write_files(folder, before)
            tools.run(folder, line, traced=False)
            scenario.after = files_of(folder)
            scenario.lines = log_lines(scenario.after[LOG])[0]
        for number in SIGNALS if options.all else rng.sample(SIGNALS, 2):
            run = Moment(tools, scenario, threads=1)
            run.wait_for(lambda: run.lines() >= lines)
            time.sleep(whole * 0.3)
            sent = time.time()
            run.send(number)
            outcome = run.end()
            took = time.time() - sent
            problems = ["it went on for %.2f s" % took] * (took > whole * 0.4)
            text = "%s in a validation of %.1f s %s: broken off (%.2f s), saved, resumed to the same bytes"
            check(problems + run.judged(outcome, must_stop=True), text % (name_of(number), whole, words, took))


# ---------------------------------------------------------------------------
# terminals

class Terminal:
    """A pseudo terminal, its far end a child's."""

    def __init__(self):
        self.master, self.slave = pty.openpty()
        self.text = b""

    def options(self):
        """For Popen: a session of its own, with this as its terminal."""
        def take():
            import fcntl
            import termios
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        return {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave, "preexec_fn": take}

    def started(self):
        os.close(self.slave)

    def look(self, seconds=0.0):
        """Reads what the terminal shows by now."""
        while select.select([self.master], [], [], seconds)[0]:
            try:
                more = os.read(self.master, 65536)
            except OSError:
                return self.text
            if not more:
                return self.text
            self.text += more
            seconds = 0
        return self.text

    def type(self, text):
        os.write(self.master, text)

    def close(self):
        os.close(self.master)


def closing_terminals(tools, scenario, options, rng):
    """The window of an interactive shell closes: the kernel and the shell both send SIGHUP."""
    for shell in ("bash", "dash"):
        if not shutil.which(shell):
            print("  a terminal that closes under %s: left out, it is not there" % shell)
            continue
        tally = Tally()
        for _ in range(25 if options.all else 4):
            terminal = Terminal()
            report = tools.report()
            plain = [shell, "--norc", "--noprofile", "-i"] if shell == "bash" else [shell, "-i"]
            run = Moment(tools, scenario, plain, **terminal.options())
            terminal.started()
            terminal.look(0.2)
            words = [tools.faults, "-p", "-r", report, "--", tools.program] + shlex.split(scenario.line)
            terminal.type(shlex.join(words).encode() + b"\n")
            early = after_some_steps(run, rng, terminal.look)
            terminal.close()
            tally.add(run, run.end(report), must_stop=early)
        tally.check("a terminal that closes under %s" % shell)


def control_c(tools, scenario, given):
    """Ctrl-C at a terminal: once, twice within a long step, twice within a save."""
    def begin(scenario, lines, **more):
        terminal = Terminal()
        run = Moment(tools, scenario, **{**terminal.options(), **more})
        terminal.started()
        end = time.time() + 60
        while run.lines() < lines and time.time() < end and run.child.poll() is None:
            terminal.look(0.002)
        return terminal, run

    def told(terminal, run, seconds=10):
        """Until the line is there that says what a second one does."""
        end = time.time() + seconds
        while b"again ends at once" not in terminal.look(0.002) and time.time() < end and run.child.poll() is None:
            pass
        return b"again ends at once" in terminal.text

    def drained(terminal, run, seconds=60):
        end = time.time() + seconds
        while run.child.poll() is None and time.time() < end:
            terminal.look(0.005)
        terminal.look(0.01)
        terminal.close()
        return run.end()

    terminal, run = begin(scenario, 5)
    terminal.type(b"\x03")
    line = told(terminal, run)
    outcome = drained(terminal, run)
    problems = [] if line else ["nothing on the terminal tells what a second Ctrl-C does"]
    problems += [] if outcome.code == STOPPED else ["exit code %s, signal %d" % (outcome.code, outcome.signal)]
    text = "Ctrl-C at a terminal: told what a second one does, saved, resumed to the same bytes"
    check(problems + run.judged(outcome), text)

    # a step of over a second, made of many micro-batches
    watch = "--eval-every 0 --save-every 1 --log run.log "
    shape = "--data text --dim 32 --layers 2 --heads 2 --seq 16 --batch 4 --out run.safetensors --steps 3 " + watch
    with tempfile.TemporaryDirectory(dir=tools.folder) as folder:
        write_files(folder, {"text": given["text"]})
        start = time.time()
        threads = {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000"}
        tools.run(folder, shape + "--accum 200", traced=False, env=threads)
        accum = int(200 * 1.5 / ((time.time() - start) / 3)) + 1
    for times in (2, 1):
        line, again = shape + "--accum %d" % accum, "--resume run.safetensors " + watch
        long_step = Scenario("step", line, {"text": given["text"]}, again)
        start = time.time()
        terminal, run = begin(long_step, 1)
        step = time.time() - start
        time.sleep(step * 0.2)
        before = files_of(run.folder)
        terminal.type(b"\x03")
        line = told(terminal, run, 5)
        typed = time.time()
        if times == 2:
            terminal.type(b"\x03")
        else:
            run.send(signal.SIGINT)  # the same signal, but not the keyboard's
        outcome = drained(terminal, run)
        took, after = time.time() - typed, files_of(run.folder)
        problems = [] if line else ["nothing on the terminal tells what a second Ctrl-C does"]
        problems += [] if outcome.code == STOPPED else ["exit code %s, signal %d" % (outcome.code, outcome.signal)]
        if times == 2:
            problems += ["it took %.2f s of a step of %.2f s" % (took, step)] * (took > step * 0.3)
            changed = [name for name in before if after.get(name) != before[name] and not is_stray(name)]
            problems += ["%s was changed" % name for name in changed]
            problems += ["left: " + name for name in after if is_stray(name)]
            text = "a second Ctrl-C within a step of %.1f s ends at once (%.2f s): exit code 130, nothing changed"
            check(problems, text % (step, took))
        else:
            problems += ["the step was not saved"] * (step_of(after.get(RUN, b"")) != 2)
            check(problems, "Ctrl-C and then SIGINT from kill within a step: the step is ended and saved")
        run.place.cleanup()

    # flushes of the disk take long: both come while the save waits for one
    env = {"LD_PRELOAD": tools.shim, "FAULT_SLOW_FSYNC": "400"}
    terminal, run = begin(scenario, 1, env=env)
    end = time.time() + 60

    def inside():
        return any(name.startswith(RUN + ".tmp.") and content for name, content in files_of(run.folder).items())

    while not inside() and time.time() < end and run.child.poll() is None:
        terminal.look(0.001)
    time.sleep(0.02)
    terminal.type(b"\x03")
    told(terminal, run, 1)
    terminal.type(b"\x03")
    time.sleep(0.05)
    terminal.type(b"\x03")
    outcome = drained(terminal, run)
    problems = [] if outcome.code == STOPPED else ["exit code %s, signal %d" % (outcome.code, outcome.signal)]
    text = "Ctrl-C three times within a save: the save is ended first, resumed to the same bytes"
    check(problems + run.judged(outcome), text)


def main():
    parser = faults.arguments(__doc__)
    parser.add_argument("--number", type=int, default=600, help="signals at system calls, of the sample")
    options = parser.parse_args()
    for number in SIGNALS + [signal.SIGQUIT]:
        default(number)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        tools = Tools(options.program, folder, 60)
        listed, problems = faults.scenarios(tools, random.Random(5))
        given = faults.sources(random.Random(5))
        if options.only:
            name, actions = options.only.split(" ", 1)
            scenario = {scenario.name: scenario for scenario in listed}[name]
            outcome, problems = at_call(tools, scenario, actions.split())
            print("%s\nexit code %s, signal %d" % (options.only, outcome.code, outcome.signal))
            print(outcome.out[-500:] + outcome.err + ("\n".join(problems) or "nothing wrong"))
            return bool(problems)
        good, bad = at_calls(tools, listed, options, rng)
        for name, wrong in problems.items():
            check([wrong], "%s, undisturbed" % name)
        long_run = Scenario("long", LONG, {"text": given["text"]}, LONG_AGAIN)
        with tempfile.TemporaryDirectory(dir=tools.folder) as place:
            write_files(place, long_run.before)
            outcome = tools.run(place, LONG, traced=False, env={"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000"})
            long_run.after = files_of(place)
            long_run.lines = log_lines(long_run.after[LOG])[0]
        durations = []
        for _ in range(3):
            start = time.time()
            Moment(tools, long_run).end()
            durations.append(time.time() - start)
        duration = sorted(durations)[1]
        check([outcome.err] * (outcome.code != 0), "a run of %.1f s with two threads, undisturbed" % duration)
        random_moments(tools, long_run, options, rng)
        timeouts(tools, long_run, duration, options, rng)
        closing_terminals(tools, long_run, options, rng)
        control_c(tools, long_run, given)
        nohup(tools, long_run)
        validations(tools, options, given, rng)
    print("%d passed, %d failed" % (passed + good, failed + bad))
    return failed + bad > 0


if __name__ == "__main__":
    sys.exit(main())
