// Between a program and the C library: lets allocations fail and flushes take long.
// faults.py and signals.py beside it use it.
//
//     cc -O2 -Wall -Wextra -shared -fPIC dev/trust/faults_shim.c -o faults_shim.so -ldl
//     FAULT_AT=7 FAULT_FROM=1 FAULT_REPORT=report LD_PRELOAD=./faults_shim.so PROGRAM ARGUMENTS...
//
// FAULT_AT: the allocation that fails, counted from 1; with FAULT_FROM all that follow fail as well. The
// report gets a line "hit K NAME BYTES CALLER" for the first one, with FAULT_LIST a line "call ..." for each,
// and "calls N" at the end. FAULT_SLOW_FSYNC: every fsync takes so many milliseconds more.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

// What dlsym takes while it finds the real functions, before there is a malloc.
static _Alignas(16) char early[1 << 16];
static size_t early_used;

static void *(*real_malloc)(size_t), *(*real_calloc)(size_t, size_t), *(*real_realloc)(void *, size_t);
static void *(*real_memalign)(size_t, size_t), (*real_free)(void *);
static long count, at, from, list;
static int finding;

static void find(void) {
    if (finding) return;
    finding = 1;
    real_calloc = (void *(*)(size_t, size_t))dlsym(RTLD_NEXT, "calloc");
    real_malloc = (void *(*)(size_t))dlsym(RTLD_NEXT, "malloc");
    real_realloc = (void *(*)(void *, size_t))dlsym(RTLD_NEXT, "realloc");
    real_memalign = (void *(*)(size_t, size_t))dlsym(RTLD_NEXT, "memalign");
    real_free = (void (*)(void *))dlsym(RTLD_NEXT, "free");
    const char *k = getenv("FAULT_AT"), *all = getenv("FAULT_FROM");
    at = k ? atol(k) : 0;
    from = all && *all == '1';
    list = getenv("FAULT_LIST") != NULL;
}

static void write_report(const char *line) {
    const char *path = getenv("FAULT_REPORT");
    int fd = path ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666) : -1;
    if (fd < 0) return;
    if (write(fd, line, strlen(line)) < 0) {}
    close(fd);
}

static void note(const char *what, long number, const char *name, size_t bytes, const void *caller) {
    Dl_info info;
    char line[400]; // snprintf takes no memory for such texts
    memset(&info, 0, sizeof(info));
    int known = dladdr(caller, &info) && info.dli_fname;
    unsigned long place = (unsigned long)((const char *)caller - (const char *)(known ? info.dli_fbase : NULL));
    const char *library = known ? info.dli_fname : "?";
    snprintf(line, sizeof(line), "%s %ld %s %zu %.200s+0x%lx\n", what, number, name, bytes, library, place);
    write_report(line);
}

// Counts an allocation: 1 if it is to fail.
static int fails(const char *name, size_t bytes, const void *caller) {
    long now = __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED);
    if (list) note("call", now, name, bytes, caller);
    if (!at || now < at || (now > at && !from)) return 0;
    if (now == at) note("hit", now, name, bytes, caller);
    errno = ENOMEM;
    return 1;
}

#define CALLER __builtin_extract_return_addr(__builtin_return_address(0))

void *malloc(size_t size) {
    if (!real_malloc) find();
    if (!real_malloc) {
        void *place = early + early_used;
        early_used += (size + 15) / 16 * 16;
        return early_used <= sizeof(early) ? place : NULL;
    }
    return fails("malloc", size, CALLER) ? NULL : real_malloc(size);
}
void *calloc(size_t n, size_t size) {
    if (!real_malloc) find();
    if (!real_malloc) return malloc(n * size); // fresh, and so zero
    return fails("calloc", n * size, CALLER) ? NULL : real_calloc(n, size);
}
void *realloc(void *old, size_t size) {
    if (!real_malloc) find();
    return fails("realloc", size, CALLER) ? NULL : real_realloc(old, size);
}
void *memalign(size_t alignment, size_t size) {
    if (!real_malloc) find();
    return fails("memalign", size, CALLER) ? NULL : real_memalign(alignment, size);
}
void *aligned_alloc(size_t alignment, size_t size) {
    if (!real_malloc) find();
    return fails("aligned_alloc", size, CALLER) ? NULL : real_memalign(alignment, size);
}
int posix_memalign(void **out, size_t alignment, size_t size) {
    if (!real_malloc) find();
    void *place = fails("posix_memalign", size, CALLER) ? NULL : real_memalign(alignment, size);
    if (place) *out = place;
    return place ? 0 : ENOMEM;
}
void free(void *place) {
    if ((char *)place >= early && (char *)place < early + sizeof(early)) return;
    if (real_free) real_free(place);
}

int fsync(int fd) {
    static int (*real_fsync)(int);
    const char *text = getenv("FAULT_SLOW_FSYNC");
    long ms = text ? atol(text) : 0;
    struct timespec left = {ms / 1000, ms % 1000 * 1000000};
    while (ms && nanosleep(&left, &left) && errno == EINTR) {}
    if (!real_fsync) real_fsync = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    return real_fsync(fd);
}

__attribute__((destructor)) static void finish(void) {
    char line[40];
    snprintf(line, sizeof(line), "calls %ld\n", count);
    write_report(line);
}
