/*
The exchange of gradients and weights between ranks that are processes of the CPU: for tests, which have no
cards. The ranks of one machine use memory that they share, machines the connections of ranks.h. What is added
up, in which order, who updates what and who gets it is as it will be between cards.

    reduce_range    every rank's gradients of a range, added up, for the rank whose they are
    spread_range    what each rank has of a range, for all
    ranks_backend   the CPU's, with both
*/
#ifndef SHARED_H
#define SHARED_H
#include "ranks.h"
#include <sched.h>

// The memory: how often each rank of the machine has come to a barrier, and how often it has looked whether
// rank 0 says something; a slot for each of them, and one for
// each machine, of as many numbers as the largest range has.
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
static Division division;
static Model *divided; // the model that trains: it has this rank's moments alone
static real *whole[3]; // a block of all ranks' moments, where it was asked for

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
    return all_ready ? 0 : fail(error, NULL, "the ranks have no memory to share");
}

// ----------------------------------------------------------------------------
// the backend of a rank

// The model that trains keeps this rank's share of the moments; others are the CPU's.
static Model *create_divided(const Config *c, int B, int T, Mode mode, char *error) {
    Model *m = model_create(c, B, T, mode, error);
    int ready = m != NULL;
    if (mode < TRAIN) return m;
    if (m) {
        ready = !divide(&division, &m->table, c->n_layers, job.ranks, 2048); // adamw's blocks: the same bits
        free(m->exp_avg);
        free(m->exp_avg_sq);
        size_t held = ready ? (size_t)division.held[job.rank] : 0;
        m->exp_avg = (real *)calloc(held + 1, sizeof(real));
        m->exp_avg_sq = (real *)calloc(held + 1, sizeof(real));
        ready = ready && m->exp_avg && m->exp_avg_sq;
        if (!ready) fail(error, NULL, "out of memory");
    }
    char problem[ERROR_SIZE];
    if (!make_shared(ready, problem)) return divided = m;
    if (ready) memcpy(error, problem, sizeof(problem));
    if (m) model_free(m);
    return NULL;
}

static void destroy_divided(Model *m) {
    if (m == divided) {
        for (int i = 0; i < 3; i++) free(whole[i]);
        memset(whole, 0, sizeof(whole));
        waits_for_first = NULL;
        munmap(shared.memory, shared.bytes);
        free(shared.members);
        division_free(&division);
        divided = NULL;
    }
    model_free(m);
}

// Copies this rank's moments between its share and a block of all.
static void copy_moments(real *share, real *block, int to_block) {
    for (int p = 0; p < division.n; p++) {
        const Piece *piece = &division.pieces[p];
        real *ends[] = {share + piece->place, block + piece->offset};
        if (piece->rank == job.rank)
            memcpy(ends[to_block], ends[!to_block], sizeof(real) * (size_t)piece->count);
    }
}

static real *read_divided(Model *m, Block block) {
    if (m != divided || block == PARAMS || block == GRADS) return cpu_read(m, block);
    if (!whole[block]) whole[block] = (real *)calloc((size_t)m->table.count + 1, sizeof(real));
    if (!whole[block]) end_all(1, "rank %d: out of memory", job.rank);
    copy_moments(cpu_read(m, block), whole[block], 1);
    for (int range = 0; range < division.n_ranges; range++) spread_range(whole[block], range);
    return whole[block];
}
static void write_divided(Model *m, Block block) {
    if (m == divided && (block == EXP_AVG || block == EXP_AVG_SQ))
        copy_moments(cpu_read(m, block), whole[block], 0);
}

// From the last layer to the embedding, as the backward pass leaves them.
static void backward_divided(Model *m, double dloss, int last) {
    model_backward(m, dloss);
    for (int range = division.n_ranges - 1; last && range >= 0; range--) reduce_range(m->grads, range);
}

// The norm over all shares, in rank order; each rank's update of its own; and the new weights for all.
static double update_divided(Model *m, AdamW options, double clip, int64_t step) {
    double *squares = (double *)calloc((size_t)job.ranks, sizeof(double));
    volatile double sum = 0; // added in rank order, whatever the compiler may
    if (!squares) end_all(1, "rank %d: out of memory", job.rank);
    for (int p = 0; p < division.n; p++) {
        const Piece *piece = &division.pieces[p];
        for (int64_t i = 0; piece->rank == job.rank && i < piece->count; i++) {
            double g = (double)m->grads[piece->offset + i];
            squares[job.rank] += g * g;
        }
    }
    gather_rows(squares, 1);
    for (int r = 0; r < job.ranks; r++) sum = sum + squares[r];
    free(squares);
    double length = sqrt(sum);
    if (!isfinite(length)) return length;
    for (int p = 0; p < division.n; p++) {
        const Piece *piece = &division.pieces[p];
        AdamW o = options;
        if (!piece->decays) o.weight_decay = 0;
        if (piece->rank == job.rank)
            adamw(m->params + piece->offset, m->grads + piece->offset, m->exp_avg + piece->place,
                  m->exp_avg_sq + piece->place, piece->count, o, clip_scale(length, clip), step);
    }
    memset(m->grads, 0, sizeof(real) * (size_t)m->table.count);
    for (int range = 0; range < division.n_ranges; range++) spread_range(m->params, range);
    return length;
}

static Backend ranks_backend(void) {
    Backend b = cpu_backend;
    b.create = create_divided;
    b.destroy = destroy_divided;
    b.read = read_divided;
    b.write = write_divided;
    b.backward = backward_divided;
    b.update = update_divided;
    return b;
}

#endif
