/*
A rank of the CPU: for tests, which have no cards. It exchanges by shared.h.

    ranks_backend   the CPU's backend of one rank of several
*/
#ifndef CPU_H
#define CPU_H
#include "shared.h"

static Model *divided; // the model that trains: it has this rank's moments alone
static real *whole[3]; // a block of all ranks' moments, where it was asked for

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
        free_shared();
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
