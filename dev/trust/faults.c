// Runs a program and lets chosen system calls of it go wrong. faults.py and signals.py beside it drive it.
//
//     cc -O2 -Wall -Wextra dev/trust/faults.c -o faults
//     ./faults [-r REPORT] [-l] [-p] [-a ACTION]... -- PROGRAM ARGUMENTS...
//
// System calls are counted from 1, from the place where the program itself begins (behind the loader and the
// libraries' constructors); waiting for locks and reading clocks are left out. An action is one of
//
//     K:fail=ERRNO          the K-th call is not made, it returns this error
//     K:from=ERRNO          so does every later call of the same name (on standard output, or on all other files)
//     K:disk=ERRNO          so does every later call that asks something of a file (a disk that is gone)
//     K:after=ERRNO         the call is made, and returns this error nevertheless
//     K:short=N             a read or write is made with at most N bytes; N = 0: half of them
//     K:entry=SIGNAL[,SIGNAL2,MS]   a signal comes while the call is made, another one MS milliseconds after it
//     K:exit=SIGNAL[,SIGNAL2,MS]    the same as it returns
//
// The report has a line "call K NAME FD PATH" for each call with -l, "hit K NAME FD PATH" for each one that
// was disturbed, at last "exit CODE" or "signal NUMBER", and "calls N". With -p the program runs undisturbed
// and untraced; signals meant for a whole group of processes do not end the wrapper, so that the report is
// written.
//
// Linux on x86-64 or arm64: a seccomp filter stops the program at its calls alone, ptrace changes them.

#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

// ----------------------------------------------------------------------------
// registers

typedef struct user_regs_struct Registers;

static int registers_read(pid_t pid, Registers *r) {
    struct iovec block = {r, sizeof(*r)};
    return ptrace(PTRACE_GETREGSET, pid, NT_PRSTATUS, &block) != 0;
}
static void registers_write(pid_t pid, Registers *r) {
    struct iovec block = {r, sizeof(*r)};
    ptrace(PTRACE_SETREGSET, pid, NT_PRSTATUS, &block);
}

// number: the call's; -1 there means that it is not made. argument: a copy's address, i from 0 to 5.
#if defined(__x86_64__)
static const long breakpoint_mask = 0xFF, breakpoint = 0xCC;
static const int breakpoint_length = 1;
static long call_number(pid_t pid, const Registers *r) { (void)pid; return (long)r->orig_rax; }
static void call_skip(pid_t pid, Registers *r) {
    r->orig_rax = (unsigned long long)-1;
    registers_write(pid, r);
}
static unsigned long long *argument(Registers *r, int i) {
    unsigned long long *places[] = {&r->rdi, &r->rsi, &r->rdx, &r->r10, &r->r8, &r->r9};
    return places[i];
}
static unsigned long long *result_of(Registers *r) { return &r->rax; }
static unsigned long long *program_counter(Registers *r) { return &r->rip; }
#elif defined(__aarch64__)
static const long breakpoint_mask = 0xFFFFFFFF, breakpoint = 0xD4200000;
static const int breakpoint_length = 0;
static long call_number(pid_t pid, const Registers *r) { (void)pid; return (long)r->regs[8]; }
static void call_skip(pid_t pid, Registers *r) {
    int none = -1;
    struct iovec block = {&none, sizeof(none)};
    (void)r;
    ptrace(PTRACE_SETREGSET, pid, 0x404, &block); // NT_ARM_SYSTEM_CALL
}
static unsigned long long *argument(Registers *r, int i) { return &r->regs[i]; }
static unsigned long long *result_of(Registers *r) { return &r->regs[0]; }
static unsigned long long *program_counter(Registers *r) { return &r->pc; }
#else
#error "dev/trust/faults.c knows the registers of x86-64 and arm64"
#endif

// ----------------------------------------------------------------------------
// system calls

typedef enum { OTHER, FD, PATH, AT_PATH } Where; // what says which file: argument 0, or a path in argument 0 or 1
typedef struct { long number; const char *name; Where where; } Call;

static const Call calls[] = {
#ifdef SYS_open // what newer machines have in the forms with a folder alone
    {SYS_open, "open", PATH}, {SYS_stat, "stat", PATH}, {SYS_lstat, "lstat", PATH},
    {SYS_access, "access", PATH}, {SYS_unlink, "unlink", PATH}, {SYS_rename, "rename", PATH},
    {SYS_readlink, "readlink", PATH}, {SYS_link, "link", PATH}, {SYS_mkdir, "mkdir", PATH},
    {SYS_chmod, "chmod", PATH}, {SYS_chown, "chown", PATH}, {SYS_getdents, "getdents", FD},
    {SYS_dup2, "dup2", FD}, {SYS_poll, "poll", OTHER}, {SYS_pipe, "pipe", OTHER}, {SYS_fork, "fork", OTHER},
    {SYS_vfork, "vfork", OTHER}, {SYS_alarm, "alarm", OTHER},
#endif
#ifdef SYS_renameat
    {SYS_renameat, "renameat", AT_PATH},
#endif
    {SYS_read, "read", FD}, {SYS_write, "write", FD}, {SYS_readv, "readv", FD}, {SYS_writev, "writev", FD},
    {SYS_pread64, "pread64", FD}, {SYS_pwrite64, "pwrite64", FD}, {SYS_openat, "openat", AT_PATH},
    {SYS_close, "close", FD}, {SYS_fstat, "fstat", FD}, {SYS_newfstatat, "newfstatat", AT_PATH},
    {SYS_statx, "statx", AT_PATH}, {SYS_lseek, "lseek", FD}, {SYS_fsync, "fsync", FD},
    {SYS_fdatasync, "fdatasync", FD}, {SYS_ftruncate, "ftruncate", FD}, {SYS_truncate, "truncate", PATH},
    {SYS_fallocate, "fallocate", FD}, {SYS_flock, "flock", FD}, {SYS_fcntl, "fcntl", FD},
    {SYS_ioctl, "ioctl", FD}, {SYS_fchmod, "fchmod", FD}, {SYS_fchown, "fchown", FD},
    {SYS_fchmodat, "fchmodat", AT_PATH}, {SYS_fchownat, "fchownat", AT_PATH},
    {SYS_faccessat, "faccessat", AT_PATH}, {SYS_unlinkat, "unlinkat", AT_PATH},
    {SYS_renameat2, "renameat2", AT_PATH}, {SYS_linkat, "linkat", AT_PATH}, {SYS_mkdirat, "mkdirat", AT_PATH},
    {SYS_readlinkat, "readlinkat", AT_PATH}, {SYS_getdents64, "getdents64", FD},
    {SYS_getcwd, "getcwd", OTHER}, {SYS_statfs, "statfs", PATH}, {SYS_fstatfs, "fstatfs", FD},
    {SYS_utimensat, "utimensat", AT_PATH}, {SYS_dup, "dup", FD}, {SYS_dup3, "dup3", FD},
    {SYS_pipe2, "pipe2", OTHER}, {SYS_ppoll, "ppoll", OTHER}, {SYS_mmap, "mmap", OTHER},
    {SYS_munmap, "munmap", OTHER}, {SYS_brk, "brk", OTHER}, {SYS_mprotect, "mprotect", OTHER},
    {SYS_mremap, "mremap", OTHER}, {SYS_madvise, "madvise", OTHER}, {SYS_clone, "clone", OTHER},
    {SYS_execve, "execve", PATH}, {SYS_exit_group, "exit_group", OTHER},
    {SYS_rt_sigaction, "rt_sigaction", OTHER}, {SYS_kill, "kill", OTHER},
    {SYS_rt_sigprocmask, "rt_sigprocmask", OTHER}, {SYS_tgkill, "tgkill", OTHER},
    {SYS_getrandom, "getrandom", OTHER}, {SYS_sysinfo, "sysinfo", OTHER}, {SYS_getrusage, "getrusage", OTHER},
    {SYS_prlimit64, "prlimit64", OTHER}, {SYS_sched_getaffinity, "sched_getaffinity", OTHER},
    {SYS_nanosleep, "nanosleep", OTHER}, {SYS_uname, "uname", OTHER},
    {SYS_clock_nanosleep, "clock_nanosleep", OTHER}, {SYS_setitimer, "setitimer", OTHER},
    {SYS_wait4, "wait4", OTHER}, {SYS_getuid, "getuid", OTHER}, {SYS_geteuid, "geteuid", OTHER},
    {SYS_getgid, "getgid", OTHER}, {SYS_getegid, "getegid", OTHER}, {SYS_getppid, "getppid", OTHER},
    {SYS_getpgid, "getpgid", OTHER}, {SYS_umask, "umask", OTHER}, {SYS_sigaltstack, "sigaltstack", OTHER},
};

// Neither counted nor disturbed: they wait for threads, read clocks, or cannot fail.
static const long silent[] = {SYS_futex, SYS_clock_gettime, SYS_gettimeofday, SYS_sched_yield, SYS_rt_sigreturn,
                              SYS_exit, SYS_restart_syscall, SYS_getpid, SYS_gettid, SYS_set_tid_address,
                              SYS_set_robust_list};
enum { N_CALLS = sizeof(calls) / sizeof(calls[0]), N_SILENT = sizeof(silent) / sizeof(silent[0]) };

// In the child: stops at every system call but the silent ones.
static int filter_calls(void) {
    struct sock_filter program[2 * N_SILENT + 2];
    int n = 0;
    program[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < N_SILENT; i++) {
        program[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)silent[i], 0, 1);
        program[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    }
    program[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRACE);
    struct sock_fprog whole = {(unsigned short)n, program};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &whole, 0, 0);
}

// One call as it is made: its place in the count and which file it is about.
typedef struct {
    long count;
    const Call *call;   // NULL: none that the table knows
    long number, fd;    // fd -1: none
    char path[PATH_MAX];
} Made;

// The string at an address of the program's memory, its spaces and new lines made visible.
static void read_string(pid_t pid, unsigned long long address, char *text, size_t room) {
    char name[64];
    snprintf(name, sizeof(name), "/proc/%d/mem", (int)pid);
    int memory = open(name, O_RDONLY | O_CLOEXEC);
    ssize_t got = memory < 0 ? 0 : pread(memory, text, room - 1, (off_t)address);
    text[got > 0 ? got : 0] = 0;
    if (memory >= 0) close(memory);
    for (char *c = text; *c; c++)
        if (*c <= ' ') *c = '?';
}

static void describe(pid_t pid, Registers *r, Made *made) {
    made->number = call_number(pid, r);
    made->call = NULL;
    made->fd = -1;
    made->path[0] = 0;
    for (int i = 0; i < N_CALLS; i++)
        if (calls[i].number == made->number) made->call = &calls[i];
    Where where = made->call ? made->call->where : OTHER;
    if (where == PATH || where == AT_PATH)
        read_string(pid, *argument(r, where == AT_PATH), made->path, sizeof(made->path));
    if (where == FD || (where == AT_PATH && !made->path[0])) {
        char link[64];
        made->fd = (long)*argument(r, 0);
        snprintf(link, sizeof(link), "/proc/%d/fd/%ld", (int)pid, made->fd);
        ssize_t length = readlink(link, made->path, sizeof(made->path) - 1);
        made->path[length > 0 ? length : 0] = 0;
        for (char *c = made->path; *c; c++)
            if (*c <= ' ') *c = '?';
    }
    if (made->number == SYS_rt_sigaction || made->number == SYS_kill)
        snprintf(made->path, sizeof(made->path), "%lld", (long long)*argument(r, made->number == SYS_kill));
}

static void report(FILE *out, const char *what, const Made *made) {
    if (!out) return;
    fprintf(out, "%s %ld ", what, made->count);
    if (made->call) fprintf(out, "%s", made->call->name);
    else fprintf(out, "call_%ld", made->number);
    fprintf(out, " %ld %s\n", made->fd, made->path[0] ? made->path : "-");
}

// How the program ended; returns its exit code, or 128 and the signal's number.
static int report_end(FILE *out, int status) {
    int by_signal = WIFSIGNALED(status), number = by_signal ? WTERMSIG(status) : WEXITSTATUS(status);
    if (out) fprintf(out, by_signal ? "signal %d\n" : "exit %d\n", number);
    return by_signal ? 128 + number : number;
}

// ----------------------------------------------------------------------------
// actions

enum { MAX_ACTIONS = 64 };
typedef enum { FAIL, FROM, DISK, AFTER, SHORT, ENTRY, EXIT } Kind;
typedef struct {
    Kind kind;
    long at, value, second, delay; // value: errno, bytes or signal; second: another signal, delay ms later
    const Call *call;              // of FROM, once it has begun
    int output;                    // whether that was about standard output
} Action;

static int parse_action(Action *a, const char *text) {
    static const char *names[] = {"fail", "from", "disk", "after", "short", "entry", "exit"};
    char name[8];
    memset(a, 0, sizeof(*a));
    if (sscanf(text, "%ld:%7[a-z]=%ld,%ld,%ld", &a->at, name, &a->value, &a->second, &a->delay) < 3) return 1;
    for (int i = 0; i < (int)(sizeof(names) / sizeof(names[0])); i++)
        if (!strcmp(name, names[i])) {
            a->kind = (Kind)i;
            return 0;
        }
    return 1;
}

// Whether the call is one that this action disturbs.
static int concerns(Action *a, const Made *made) {
    if (a->kind == FROM && a->call)
        return made->call == a->call && (made->fd == 1) == a->output && made->fd != 2;
    if (a->kind == DISK && made->count > a->at) {
        int of_file = made->call && made->call->where != OTHER && made->number != SYS_close;
        return of_file && (made->fd < 0 || made->fd > 2);
    }
    if (made->count != a->at) return 0;
    a->call = made->call;
    a->output = made->fd == 1;
    return 1;
}

// Sends a signal now, and the other one from a process of its own when its time has come.
static void send_signals(pid_t pid, const Action *a) {
    kill(pid, (int)a->value);
    if (!a->second || fork()) return;
    struct timespec pause = {a->delay / 1000, a->delay % 1000 * 1000000};
    nanosleep(&pause, NULL);
    kill(pid, (int)a->second);
    _exit(0);
}

// ----------------------------------------------------------------------------
// the program and its tracer

typedef struct {
    pid_t pid;
    unsigned long long entry; // where the program begins
    long instruction;         // what stands there
    long count;               // calls so far
    int counting, listing, n_actions;
    Action actions[MAX_ACTIONS];
    FILE *out;
} Trace;

// A program has been loaded: stops it where it begins.
static void break_at_entry(Trace *t, pid_t pid) {
    char name[64];
    unsigned long pair[2] = {0, 0};
    snprintf(name, sizeof(name), "/proc/%d/auxv", (int)pid);
    FILE *vector = fopen(name, "rb");
    while (vector && fread(pair, sizeof(pair), 1, vector) == 1 && pair[0] != AT_ENTRY) {}
    if (vector) fclose(vector);
    t->entry = pair[0] == AT_ENTRY ? pair[1] : 0;
    t->counting = 0;
    t->instruction = ptrace(PTRACE_PEEKTEXT, pid, t->entry, 0);
    ptrace(PTRACE_POKETEXT, pid, t->entry, (t->instruction & ~breakpoint_mask) | breakpoint);
}

// It stands there: from now on its calls count. 0 if it stands elsewhere.
static int begin(Trace *t, pid_t pid) {
    Registers r;
    if (t->counting || registers_read(pid, &r)) return 0;
    if (*program_counter(&r) != t->entry + (unsigned)breakpoint_length) return 0;
    *program_counter(&r) = t->entry;
    registers_write(pid, &r);
    ptrace(PTRACE_POKETEXT, pid, t->entry, t->instruction);
    return t->counting = 1;
}

// Makes the process run to its next stop of this kind (PTRACE_CONT, PTRACE_SYSCALL).
static void go_on(int how, pid_t pid, int number) { ptrace((enum __ptrace_request)how, pid, 0, number); }

// Makes a call that has been disturbed and sets what it returns (0: as it is), its arguments as they were: a
// program may count on finding them in their registers. `late`: a signal to send as it returns.
static void finish_call(Trace *t, pid_t pid, Registers *before, long result, const Action *late) {
    Registers r;
    int status, number = 0;
    go_on(PTRACE_SYSCALL, pid, 0);
    if (waitpid(pid, &status, __WALL) < 0 || !WIFSTOPPED(status)) {
        report_end(t->out, status);
        t->pid = 0;
        return;
    }
    if (WSTOPSIG(status) != (SIGTRAP | 0x80)) number = WSTOPSIG(status);
    else if (!registers_read(pid, &r)) {
        unsigned long long returned = *result_of(&r);
        for (int i = 0; i < 6; i++) *argument(&r, i) = *argument(before, i);
        *result_of(&r) = result ? (unsigned long long)result : returned; // on arm64 the first argument's place
        registers_write(pid, &r);
    }
    if (late) send_signals(pid, late);
    go_on(PTRACE_CONT, pid, number);
}

// A call is about to be made.
static void disturb(Trace *t, pid_t pid) {
    Registers r;
    Made made;
    if (!t->counting || registers_read(pid, &r)) {
        go_on(PTRACE_CONT, pid, 0);
        return;
    }
    Registers before = r;
    made.count = ++t->count;
    describe(pid, &r, &made);
    if (t->listing) report(t->out, "call", &made);
    long result = 0;
    int to_end = 0;
    const Action *late = NULL;
    for (int i = 0; i < t->n_actions; i++) {
        Action *a = &t->actions[i];
        if (!concerns(a, &made)) continue;
        report(t->out, "hit", &made);
        if (a->kind == ENTRY) send_signals(pid, a);
        else to_end = 1;
        if (a->kind == EXIT) late = a;
        if (a->kind == AFTER) result = -a->value;
        if (a->kind == SHORT) {
            unsigned long long *length = argument(&r, 2), most = (unsigned long long)a->value;
            if (!most) most = (*length + 1) / 2;
            if (*length > most) *length = most;
            registers_write(pid, &r);
        }
        if (a->kind == FAIL || a->kind == FROM || a->kind == DISK) {
            if (made.number == SYS_brk) { // it has no errors: it returns the old end
                *argument(&r, 0) = 0;
                registers_write(pid, &r);
            } else {
                call_skip(pid, &r);
                result = -a->value;
            }
        }
    }
    if (to_end) finish_call(t, pid, &before, result, late);
    else go_on(PTRACE_CONT, pid, 0);
}

// Follows the program and its threads to the end. Returns its exit code, 128 and the number after a signal.
static int follow(Trace *t) {
    int status, code = 0;
    while (t->pid) {
        pid_t pid = waitpid(-1, &status, __WALL);
        if (pid < 0) break;
        if (!WIFSTOPPED(status)) {
            if (pid != t->pid) continue; // a thread, or what sent a signal
            code = report_end(t->out, status);
            break;
        }
        int event = status >> 16, number = WSTOPSIG(status);
        if (event == PTRACE_EVENT_SECCOMP) disturb(t, pid);
        else if (event == PTRACE_EVENT_EXEC) {
            break_at_entry(t, pid);
            go_on(PTRACE_CONT, pid, 0);
        } else if (event || number == (SIGTRAP | 0x80) || (number == SIGSTOP && pid != t->pid)) {
            go_on(PTRACE_CONT, pid, 0); // a new thread, or the end of a call
        } else go_on(PTRACE_CONT, pid, number == SIGTRAP && begin(t, pid) ? 0 : number);
    }
    if (t->out) fprintf(t->out, "calls %ld\n", t->count);
    return code;
}

static int plain(Trace *t, char **command) {
    int status = 0, groups[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};
    void (*before[4])(int);
    for (int i = 0; i < 4; i++) before[i] = signal(groups[i], SIG_IGN);
    t->pid = fork();
    if (!t->pid) {
        for (int i = 0; i < 4; i++) signal(groups[i], before[i]);
        execvp(command[0], command);
        _exit(127);
    }
    while (waitpid(t->pid, &status, 0) < 0 && errno == EINTR) {}
    return report_end(t->out, status);
}

int main(int argc, char **argv) {
    Trace t;
    int option, untraced = 0, status;
    memset(&t, 0, sizeof(t));
    while ((option = getopt(argc, argv, "+r:lpa:")) != -1) {
        if (option == 'r') t.out = fopen(optarg, "we");
        if (option == 'l') t.listing = 1;
        if (option == 'p') untraced = 1;
        int wrong = option == '?' || (option == 'r' && !t.out);
        if (option == 'a') wrong = t.n_actions == MAX_ACTIONS || parse_action(&t.actions[t.n_actions++], optarg);
        if (!wrong) continue;
        fprintf(stderr, "faults: wrong option %s (the source's first lines list them)\n", optarg ? optarg : "");
        return 2;
    }
    if (optind == argc) return 2;
    if (untraced) return plain(&t, argv + optind);
    t.pid = fork();
    if (!t.pid) {
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGSTOP);
        if (filter_calls()) _exit(126);
        execvp(argv[optind], argv + optind);
        _exit(127);
    }
    waitpid(t.pid, &status, 0);
    long options = PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACESECCOMP | PTRACE_O_TRACEEXEC | PTRACE_O_TRACECLONE |
                   PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_EXITKILL;
    if (!WIFSTOPPED(status) || ptrace(PTRACE_SETOPTIONS, t.pid, 0, options)) {
        fprintf(stderr, "faults: this system lets no process be traced\n");
        return 126;
    }
    go_on(PTRACE_CONT, t.pid, 0);
    return follow(&t);
}
