/*
The exchange of gradients and weights between ranks of one machine through memory that they share, and between
machines through the connections of ranks.h: for tests. The CPU's ranks use it, and those of the CUDA twin that
share a card. What is added up, in which order, who updates what and who gets it is as between cards.

    reduce_range    every rank's gradients of a range, added up, for the rank whose they are
    spread_range    what each rank has of a range, for all
    make_shared     the memory
*/
#ifndef SHARED_H
#define SHARED_H
#include "ranks.h"
#include <sched.h>

// The memory: how often each rank of the machine has come to a barrier, and how often it has looked whether
// rank 0 says something; a slot for each of them, and one for each machine, of as many numbers as the largest
// range has.
typedef struct {
    volatile int64_t *arrived;
    real *slots, *of_hosts;
    int64_t most; // numbers of a slot
    int n, mine;  // ranks of this machine, this one's number among them
    int *members; // (n) which they are
    void *memory;
    size_t bytes;
} Shared;

static Shared shared;

// Waits until all ranks of the machine are here. Which one hangs is told once: by the machine's first rank,
// who may itself wait for other machines, so that the others wait longer for it; of rank 0 by rank 1. One
// that is not here because it waits for rank 0 does not hang: then rank 0 does.
static void wait_for_host(void) {
    char name[160];
    int64_t turn = __atomic_add_fetch(&shared.arrived[shared.mine * 8], 1, __ATOMIC_ACQ_REL);
    for (int i = 0; i < shared.n; i++) {
        double last = seconds(), waited = 0, more = i == 0 ? 4.5 : shared.mine ? 1.5 : 0;
        int tells = i == 0 ? job.rank == 1 : shared.mine == 0, peer = shared.members[i];
        int64_t looked = 0;
        for (int looks = 0; __atomic_load_n(&shared.arrived[i * 8], __ATOMIC_ACQUIRE) < turn; looks++) {
            if (looks < 20) sched_yield(); // on a busy machine the others are let through first
            else usleep(looks < 200 ? 50 : 500);
            double now = seconds();
            waited += now - last < 1 ? now - last : 1; // a program that was stopped has not waited
            last = now;
            int64_t looks_there = __atomic_load_n(&shared.arrived[i * 8 + 1], __ATOMIC_RELAXED);
            if (i && job.rank && looks_there != looked && waited > job.timeout - 0.5) {
                more = 4.5;
                tells = job.rank == 1;
                peer = 0;
            }
            looked = looks_there;
            if (waited > job.timeout + more)
                end_all(tells, "%s has not come for %.0f s (--timeout), and the others end",
                        rank_name(name, peer), job.timeout);
        }
    }
}

// A function of its own, which the compiler does not merge with its caller's loop: under -ffast-math it might
// add the ranks in another order.
ONE_COPY static void add_numbers(real *sums, const real *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) sums[i] += x[i];
}

// The range's numbers in rank order within a machine, then the machines' sums in their order.
static void reduce_range(real *grads, int range) {
    int64_t begin = division.begin[range], count = division.begin[range + 1] - begin;
    memcpy(shared.slots + shared.mine * shared.most, grads + begin, sizeof(real) * (size_t)count);
    wait_for_host();
    int host = job.hosts[job.rank];
    if (job.n_hosts > 1 && shared.mine == 0) { // a network carries each machine's sums once
        real *sums = shared.of_hosts + host * count;
        memcpy(sums, shared.slots, sizeof(real) * (size_t)count);
        for (int r = 1; r < shared.n; r++) add_numbers(sums, shared.slots + r * shared.most, count);
        gather_bytes(shared.of_hosts, sizeof(real) * (size_t)count, 1);
    }
    if (job.n_hosts > 1) wait_for_host();
    int64_t step = job.n_hosts > 1 ? count : shared.most;
    const real *from = job.n_hosts > 1 ? shared.of_hosts : shared.slots;
    for (int p = 0; p < division.n; p++) {
        const Piece *piece = &division.pieces[p];
        if (piece->range != range || piece->rank != job.rank) continue;
        real *sums = grads + piece->offset;
        const real *x = from + piece->offset - begin;
        memcpy(sums, x, sizeof(real) * (size_t)piece->count);
        for (int r = 1; r < (job.n_hosts > 1 ? job.n_hosts : shared.n); r++)
            add_numbers(sums, x + r * step, piece->count);
    }
    wait_for_host(); // before the slots are another range's
}

// Copies the pieces of a rank between a range's numbers and an array of as many.
static void copy_pieces(real *to, const real *from, int range, int rank) {
    for (int p = 0; p < division.n; p++) {
        const Piece *piece = &division.pieces[p];
        int64_t at = piece->offset - division.begin[range];
        if (piece->range == range && piece->rank == rank)
            memcpy(to + at, from + at, sizeof(real) * (size_t)piece->count);
    }
}

// Each rank's pieces of a range, for all ranks.
static void spread_range(real *values, int range) {
    int64_t begin = division.begin[range], count = division.begin[range + 1] - begin;
    int host = job.hosts[job.rank];
    real *all = job.n_hosts > 1 ? shared.of_hosts + host * count : shared.slots;
    copy_pieces(all, values + begin, range, job.rank);
    wait_for_host();
    if (job.n_hosts > 1) {
        if (shared.mine == 0) gather_bytes(shared.of_hosts, (size_t)count * sizeof(real), 1);
        wait_for_host();
    }
    for (int r = 0; r < job.ranks; r++)
        if (r != job.rank)
            copy_pieces(values + begin, job.n_hosts > 1 ? shared.of_hosts + job.hosts[r] * count : all, range,
                        r);
    wait_for_host();
}

// ----------------------------------------------------------------------------
// the shared memory: made by the first rank of each machine, without a name that could stay behind; the
// others find it by that rank's descriptor

// Finds out who shares it; returns the bytes it takes.
static size_t measure_shared(int n_ranges) {
    for (int range = 0; range < n_ranges; range++) {
        int64_t count = division.begin[range + 1] - division.begin[range];
        if (count > shared.most) shared.most = count;
    }
    shared.members = (int *)calloc((size_t)job.ranks, sizeof(int));
    for (int r = 0; shared.members && r < job.ranks; r++) {
        if (job.hosts[r] != job.hosts[job.rank]) continue;
        if (r == job.rank) shared.mine = shared.n;
        shared.members[shared.n++] = r;
    }
    size_t counters = 64 * (size_t)shared.n;
    return counters + sizeof(real) * (size_t)shared.most * (size_t)(shared.n + job.n_hosts);
}

// All ranks call it, whatever went wrong before: `ready` says it. FAILED where one of them is not.
static int make_shared(int ready, char *error) {
    typedef struct {
        int64_t ready, pid, fd;
    } Place;
    Place *places = (Place *)calloc((size_t)job.ranks, sizeof(Place));
    char path[64];
    if (!places) end_all(1, "rank %d: out of memory", job.rank);
    memset(&shared, 0, sizeof(shared));
    shared.bytes = ready ? measure_shared(division.n_ranges) : 0;
    int fd = ready && shared.mine == 0 ? memfd_create("sessa ranks", MFD_CLOEXEC) : -1;
    int made = !ready || shared.mine || (fd >= 0 && !ftruncate(fd, (off_t)shared.bytes));
    Place place = {ready && made, (int64_t)getpid(), fd};
    places[job.rank] = place;
    gather_bytes(places, sizeof(Place), 0);
    int all_ready = 1, is_there = 0;
    for (int r = 0; r < job.ranks; r++) all_ready &= places[r].ready != 0;
    if (all_ready) {
        const Place *first = &places[shared.members[0]];
        snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)first->pid, (int)first->fd);
        int mapped = fd >= 0 ? fd : open(path, O_RDWR | O_CLOEXEC);
        shared.memory = mmap(NULL, shared.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, mapped, 0);
        is_there = mapped >= 0 && shared.memory != MAP_FAILED;
        if (mapped >= 0 && mapped != fd) close(mapped);
    }
    memset(&place, 0, sizeof(place));
    place.ready = is_there;
    places[job.rank] = place;
    gather_bytes(places, sizeof(Place), 0);
    for (int r = 0; r < job.ranks; r++) all_ready &= places[r].ready != 0;
    if (fd >= 0) close(fd);
    free(places);
    if (is_there) {
        shared.arrived = (volatile int64_t *)shared.memory;
        waits_for_first = shared.arrived + shared.mine * 8 + 1;
        shared.slots = (real *)((char *)shared.memory + 64 * (size_t)shared.n);
        shared.of_hosts = shared.slots + (int64_t)shared.n * shared.most;
    }
    if (!is_there) shared.memory = NULL;
    return all_ready ? 0 : fail(error, NULL, "the ranks have no memory to share");
}

static void free_shared(void) {
    waits_for_first = NULL;
    munmap(shared.memory, shared.bytes);
    free(shared.members);
    memset(&shared, 0, sizeof(shared));
}

#endif
