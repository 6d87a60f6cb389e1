/*
How far back a layer reaches: what a position's output owes to a position `lag` tokens before it, for one layer after another of
a model on a text, and for the case that the theory solves. Built on train_sessa.c, whose own layer functions do the work:

    cc -O3 -march=native -ffast-math -fno-finite-math-only -fopenmp dev/claims/influence.c -o influence -lm
    ./influence out.safetensors --load sessa.best.safetensors --data data/tinyshakespeare.txt --seq 1024
    ./influence out.safetensors --mixer attention --data my.txt --seq 512       # random weights
    ./influence --uniform 0.5 4096 uniform.safetensors
    ./influence --check

Options of its own: --sequences n, read from the validation split [1]; --sources n, the first positions, whose influence is
followed, 0 for all [16]; --targets n, positions whose Jacobian is taken, evenly spaced on a logarithmic axis [16]; --probes n,
random signs for each [2]; --map l, the layer whose matrices are written as pictures [the last], and --map-size n, their side
[256]. All others are train_sessa's. Written are, for each layer l, by lag ℓ = 0 .. T-1, means over the sources τ, t = τ + ℓ:

    layers.l.direct     α_tτ of attention [15], mean over heads: one hop
    layers.l.feedback   |γ_t α_tτ| [17, 18]: one hop of the feedback path
    layers.l.solve      |(I - diag(γ) α)^-1|_tτ [19-22], what s_t owes to f_τ with the weights held fixed: all hops
    layers.l.chain      Π_{τ<u≤t} exp(-exp(A_log) Δ_u) of a mamba2 layer, mean over heads: one chain
    layers.l.kernel     not by lag but by the ratio of positions, signed: the sum of α_tj γ_j over the j with
                        b ≤ 8 log2(t/(j + 1/2)) < b + 1, mean over the rows t ≥ T/16; tail.py makes the tail's
                        exponent of it
    layers.l.gain       one number: the mean of γ_t
    layers.l.jacobian   |∂s_t/∂ā_τ| / sqrt(D), Frobenius norm, root mean square: the whole mixer, its weights depending on ā as they
                        do. From backward passes: the mean of |J^T u|² over signs u is |J|². 0 at lags that no target has

and map.direct, map.feedback, map.solve (n,n) of the first sequence.
plot_influence.py and plot_maps.py beside it draw them.
*/
#define SESSA_NO_MAIN
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wformat-truncation" // a temporary file's name, which is checked for length
#endif
#ifndef REAL
#define REAL double // weights of both signs cancel: at gamma -0.9 float32 is off by 1.5e-4
#endif
#include "../../train_sessa.c"

static FileTensor *tensors; // to be written
static int n_tensors;

// A zeroed array; there is no going on without it.
static void *array(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size);
    if (!memory) {
        fprintf(stderr, "influence: out of memory\n");
        exit(1);
    }
    return memory;
}

// Keeps a copy of n rows of m numbers (n 0: one dimension) to be written under that name.
static void keep(const char *name, const double *x, int n, int m) {
    FileTensor t = {strdup(name), "F32", n ? 2 : 1, {n ? n : m, m}, (int64_t)(n ? n : 1) * m, 0, NULL};
    float *data = (float *)array((size_t)t.count, sizeof(float));
    for (int64_t i = 0; i < t.count; i++) data[i] = (float)x[i];
    t.size = (size_t)t.count * sizeof(float);
    t.data = (const unsigned char *)data;
    tensors = (FileTensor *)realloc(tensors, sizeof(FileTensor) * (size_t)(n_tensors + 1));
    if (!tensors || !t.name) abort(); // some kilobytes
    tensors[n_tensors++] = t;
}

// ----------------------------------------------------------------------------
// one layer's matrices, its weights held fixed. All are (T,T), row t and column τ, zero where they are zero by causality.

// The weights of one head of attention, or, strict, of the feedback path with gain gamma, from the statistics of the forward pass.
static void weight_matrix(double *out, const real *q, const real *k, int ld, real *stats, const real *gain, int T, int d, int strict,
                          double scale) {
    real *panel = (real *)array((size_t)PANEL_MAX * (size_t)T, sizeof(real));
    for (int i0 = 0; i0 < T; i0 += PANEL_MAX) {
        int n = min_int(PANEL_MAX, T - i0);
        softmax_panel(panel, stats + 2 * i0, 1, gain ? gain + i0 : NULL, q + (size_t)i0 * ld, k, ld, i0, n, d, strict);
        for (int r = 0; r < n; r++)
            for (int j = 0; j < i0 + n; j++) out[(size_t)(i0 + r) * T + j] += scale * (double)panel[(size_t)j * n + r];
    }
    free(panel);
}

static void direct_matrix(double *out, Model *m, int l, int T) {
    const Config *c = &m->config;
    LayerActivations *a = &m->acts.layers[l];
    int d = c->d_model / c->n_heads, E = proj_width(c), group = c->n_heads / c->n_kv_heads;
    for (int h = 0; h < c->n_heads; h++)
        weight_matrix(out, a->proj + h * d, a->proj + c->d_model + h / group * d, E, a->stats + 2 * (size_t)h * T, NULL, T, d, 0,
                      1.0 / c->n_heads);
}

// diag(γ) α, or without the gain: α.
static void feedback_matrix(double *out, Model *m, int l, int T, int with_gain) {
    int D = m->config.d_model, E = proj_width(&m->config);
    LayerActivations *a = &m->acts.layers[l];
    weight_matrix(out, a->proj + E - 2 * D, a->proj + E - D, E, a->fb_stats, with_gain ? a->gamma : NULL, T, D, 1, 1);
}

// The first n columns of (I - A)^-1, D of them at a time: the feedback path's answer to unit vectors.
static void solve_matrix(double *out, Model *m, int l, int T, int n) {
    int D = m->config.d_model, E = proj_width(&m->config);
    LayerActivations *a = &m->acts.layers[l];
    const real *fb_q = a->proj + E - 2 * D, *fb_k = fb_q + D;
    real *f = (real *)array((size_t)T * D, sizeof(real)), *s = (real *)array((size_t)T * D, sizeof(real));
    real *stats = (real *)array(2 * (size_t)T, sizeof(real));
    for (int c0 = 0; c0 < n; c0 += D) {
        memset(f, 0, sizeof(real) * (size_t)T * (size_t)D);
        for (int i = 0; i < D && c0 + i < n; i++) f[(size_t)(c0 + i) * D + i] = 1;
        feedback_forward(s, stats, work_of(m), f, fb_q, fb_k, a->gamma, feedback_shape(&m->config, 1, T, 0));
        for (int t = 0; t < T; t++)
            for (int i = 0; i < D && c0 + i < n; i++) out[(size_t)t * T + c0 + i] = (double)s[(size_t)t * D + i];
    }
    free(f);
    free(s);
    free(stats);
}

static void chain_matrix(double *out, Model *m, int l, int T) {
    const Config *c = &m->config;
    LayerActivations *a = &m->acts.layers[l];
    int heads = 2 * c->d_model / c->head_dim, ld = proj_width(c);
    step_forward(a->step, a->proj + ld - heads, ld, m->weights.layers[l].step_bias, T, heads); // again: layers share it
    for (int h = 0; h < heads; h++) {
        double rate = exp((double)m->weights.layers[l].A_log[h]);
        for (int t = 0; t < T; t++) {
            double sum = 0;
            for (int j = t; j >= 0; sum += (double)a->step[(size_t)j * heads + h], j--)
                out[(size_t)t * T + j] += exp(-rate * sum) / heads;
        }
    }
}

// ----------------------------------------------------------------------------
// by lag

typedef struct { int sequences, sources, targets, probes, map, map_size; } Measure;
typedef struct { double *sum, *count; } ByLag; // (T): their ratio is the mean

static void add_by_lag(ByLag to, const double *matrix, int T, int sources) {
    for (int t = 0; t < T; t++)
        for (int j = 0; j <= t && j < sources; j++) {
            to.sum[t - j] += fabs(matrix[(size_t)t * T + j]);
            to.count[t - j]++;
        }
}

enum { PER_OCTAVE = 8, KERNEL = 16 * PER_OCTAVE }; // t/(j + 1/2) ≤ 2 T

// kernel[b] += the sum of α_tj γ_j over the j of which t/(j + 1/2) is b to b + 1 eighths of an octave, mean over
// the rows t ≥ T/16. alpha (T,T) has the weights without their gain.
static void add_kernel(double *kernel, const double *alpha, const real *gain, int T) {
    int first = T < 32 ? 1 : T / 16;
    for (int t = first; t < T; t++)
        for (int j = 0; j < t; j++)
            kernel[(int)(PER_OCTAVE * log2(t / (j + 0.5)))] += alpha[(size_t)t * T + j] * (double)gain[j] / (T - first);
}

// rows[τ] += |J^T u|² / D over the rows τ ≤ t of ∂s_t/∂ā_τ, u one vector of signs: one backward pass of the mixer of layer l.
static void jacobian_rows(double *rows, Model *m, int l, int T, int t, const real *u) {
    int D = m->config.d_model;
    Activations *back = &m->acts;
    memset(back->ds, 0, sizeof(real) * (size_t)T * (size_t)D);
    memcpy(back->ds + (size_t)t * D, u, sizeof(real) * (size_t)D);
    mixers[m->config.mixer].backward(m, l, 1, T);
    for (int j = 0; j <= t; j++)
        for (int i = 0; i < D; i++) rows[j] += pow((double)back->dabar[(size_t)j * D + i], 2) / D;
}

// Everything of one layer, on the sequence that has just gone through the model.
static void measure_layer(Model *m, int l, int T, const Measure *o, int sequence, ByLag *by_lag, double *kernel,
                          uint64_t *random) {
    static const char *names[] = {"direct", "feedback", "solve", "chain"};
    int D = m->config.d_model, mixer = m->config.mixer, side = min_int(o->map_size, T), sources = o->sources ? min_int(o->sources, T) : T;
    double *matrix = (double *)array((size_t)T * T, sizeof(double)), *rows = (double *)array((size_t)T, sizeof(double));
    for (int k = 0; k < 4; k++) {
        if (mixer == MAMBA2 ? k != 3 : k == 3 || (k && mixer != SESSA)) continue;
        int drawn = !sequence && l == o->map;
        memset(matrix, 0, sizeof(double) * (size_t)T * (size_t)T);
        if (k == 0) direct_matrix(matrix, m, l, T);
        if (k == 1) feedback_matrix(matrix, m, l, T, 1);
        if (k == 2) solve_matrix(matrix, m, l, T, drawn && side > sources ? side : sources);
        if (k == 3) chain_matrix(matrix, m, l, T);
        add_by_lag(by_lag[k], matrix, T, sources);
        if (!drawn) continue;
        char name[32];
        snprintf(name, sizeof(name), "map.%s", names[k]);
        for (int t = 1; t < side; t++) memmove(matrix + (size_t)t * side, matrix + (size_t)t * T, sizeof(double) * (size_t)side);
        keep(name, matrix, side, side);
    }
    if (mixer == SESSA) {
        const real *gain = m->acts.layers[l].gamma;
        memset(matrix, 0, sizeof(double) * (size_t)T * (size_t)T);
        feedback_matrix(matrix, m, l, T, 0);
        add_kernel(kernel, matrix, gain, T);
        for (int t = 0; t < T; t++) kernel[KERNEL] += (double)gain[t] / T;
    }
    real *u = (real *)array((size_t)D, sizeof(real));
    for (int i = 0; i < o->targets; i++) { // from 1 to T-1, or to the last positions where all are sources
        int t = T - 1 - (int)((int64_t)i * (T / 2) / o->targets);
        if (sources < T && o->targets > 1) t = (int)lround(pow(T - 1.0, i / (o->targets - 1.0)));
        memset(rows, 0, sizeof(double) * (size_t)T);
        for (int p = 0; p < o->probes; p++) {
            for (int k = 0; k < D; k++) u[k] = random_u64(random) >> 63 ? 1 : -1;
            jacobian_rows(rows, m, l, T, t, u);
        }
        for (int j = 0; j <= t && j < sources; j++) {
            by_lag[4].sum[t - j] += rows[j] / o->probes;
            by_lag[4].count[t - j]++;
        }
    }
    free(matrix);
    free(rows);
    free(u);
}

static int measure(Run *run, const Measure *given, const char *path, char *error) {
    static const char *names[] = {"direct", "feedback", "solve", "chain", "jacobian"};
    const Options *options = &run->settings.values;
    Model *m = run->model;
    Measure o = *given;
    Dropout off = {0, 0, 0, 0};
    int T = (int)options->seq, L = m->config.n_layers;
    int64_t windows = run->val_set->kind == DATA_EXAMPLES ? run->val_end - run->val_begin : (run->val_end - run->val_begin - 1) / T;
    uint64_t random = 1;
    if (o.map < 0) o.map = L - 1;
    if (o.map >= L) return fail(error, NULL, "--map %d: the model has layers 0 to %d", o.map, L - 1);
    if (o.sequences > windows) o.sequences = (int)windows;
    double *numbers = (double *)array((size_t)L * 5 * 2 * T, sizeof(double));
    ByLag *by_lag = (ByLag *)array((size_t)L * 5, sizeof(ByLag));
    double *kernels = (double *)array((size_t)L * (KERNEL + 1), sizeof(double)); // and the mean gain behind each
    for (int i = 0; i < L * 5; i++) {
        by_lag[i].sum = numbers + (size_t)i * 2 * T;
        by_lag[i].count = by_lag[i].sum + T;
    }
    for (int i = 0; i < o.sequences; i++) {
        int64_t window = windows * i / o.sequences;
        int64_t place = run->val_begin + window * (run->val_set->kind == DATA_EXAMPLES ? 1 : T);
        copy_sequence(run->inputs, run->targets, run->val_set, place, T);
        model_forward(m, run->inputs, run->targets, 1, T, off);
        for (int l = 0; l < L; l++) measure_layer(m, l, T, &o, i, by_lag + l * 5, kernels + l * (KERNEL + 1), &random);
    }
    for (int l = 0; l < L; l++)
        for (int k = 0; k < 5; k++) {
            double *x = by_lag[l * 5 + k].sum, *count = by_lag[l * 5 + k].count;
            char name[64];
            if (!count[0] && !count[T - 1]) continue; // not of this mixer
            for (int lag = 0; lag < T; lag++) x[lag] = count[lag] ? x[lag] / count[lag] : 0;
            for (int lag = 0; k == 4 && lag < T; lag++) x[lag] = sqrt(x[lag]);
            snprintf(name, sizeof(name), "layers.%d.%s", l, names[k]);
            keep(name, x, 0, T);
        }
    for (int l = 0; l < L && m->config.mixer == SESSA; l++) {
        double *kernel = kernels + l * (KERNEL + 1);
        char name[64];
        for (int b = 0; b <= KERNEL; b++) kernel[b] /= o.sequences;
        snprintf(name, sizeof(name), "layers.%d.kernel", l);
        keep(name, kernel, 0, KERNEL);
        snprintf(name, sizeof(name), "layers.%d.gain", l);
        keep(name, kernel + KERNEL, 0, 1);
    }
    free(by_lag);
    free(kernels);
    free(numbers);
    char texts[2][32];
    snprintf(texts[0], 32, "%d", T);
    snprintf(texts[1], 32, "%d", o.map);
    Meta meta[] = {{(char *)"mixer", (char *)options->mixer}, {(char *)"seq_len", texts[0]}, {(char *)"map_layer", texts[1]},
                   {(char *)"weights", (char *)(options->load ? options->load : "random")}, {(char *)"data", (char *)options->data}};
    Place place;
    int result = settle(&place, path, NULL, error) || safetensors_write(&place, tensors, n_tensors, meta, 5, 0, NULL, error);
    if (!result) printf("%s: %s, %d layers, T %d, %d sequences\n", path, options->mixer, L, T, o.sequences);
    return result;
}

// ----------------------------------------------------------------------------
// what the theory solves: even weights

static int failed;

static void hold(double error, double bound, const char *format, double x, double y) {
    char what[128];
    snprintf(what, sizeof(what), format, x, y);
    printf("  %-76s %9.2e  bound %.0e  %s\n", what, error, bound, error <= bound ? "ok" : "FAIL");
    failed += !(error <= bound);
}

// Least-squares slope of log|y| over log(x) or, plain, over x, for x = first .. n-1.
static double slope(const double *y, int first, int n, int plain) {
    double sx = 0, sy = 0, sxx = 0, sxy = 0, count = n - first;
    for (int x = first; x < n; x++) {
        double u = plain ? x : log((double)x), v = log(fabs(y[x]));
        sx += u;
        sy += v;
        sxx += u * u;
        sxy += u * v;
    }
    return (count * sxy - sx * sy) / (count * sxx - sx * sx);
}

// The responses to a unit impulse at τ = 0, by lag, of the three mixers with even weights: the feedback path with q' = k' = 0
// and constant gamma, attention with q = k = 0, the scan with constant steps. The first is
//     s_ℓ = γ Γ(τ+1)/Γ(τ+1+γ) Γ(τ+ℓ+γ)/Γ(τ+ℓ+1),  which falls as ℓ^(γ-1);
// the second 1/(τ+ℓ+1), the third Δ exp(-exp(A_log) Δ ℓ).
static void uniform(double gamma, int T, int report) {
    enum { D = 2, W = D + 2 }; // the scan: E = D, one head, one number of state
    size_t n = (size_t)T * W;
    real *zero = (real *)array(n, sizeof(real)), *impulse = (real *)array(n, sizeof(real)), *out = (real *)array(n, sizeof(real));
    real *gain = (real *)array((size_t)T, sizeof(real)), *steps = (real *)array((size_t)T, sizeof(real));
    real *stats = (real *)array(2 * (size_t)T, sizeof(real));
    size_t room = panel_scratch(T) > scan_scratch(D, 1, 1) ? panel_scratch(T) : scan_scratch(D, 1, 1);
    real *scratch = (real *)array((size_t)omp_get_max_threads() * room, sizeof(real));
    double *solve = (double *)array((size_t)T, sizeof(double)), *closed = (double *)array((size_t)T, sizeof(double));
    double *direct = (double *)array((size_t)T, sizeof(double)), *chain = (double *)array((size_t)T, sizeof(double));
    double worst = 0, hop = 0, fade = 0;
    real states[2] = {0, 0}, A_log = (real)log(2.0), skip = 0;
    const double step = 0.005, rate = 2 * step; // a chain that loses 1 % a token
    impulse[0] = 1;
    for (int t = 0; t < T; t++) {
        gain[t] = (real)gamma;
        steps[t] = (real)step;
    }
    Work work = {scratch, 0};
    Shape one_head = {1, T, 0, 1, 1, D, D};
    feedback_forward(out, stats, work, impulse, zero, zero, gain, one_head);
    for (int t = 0; t < T; t++) {
        solve[t] = (double)out[(size_t)t * D];
        closed[t] = t ? gamma * exp(lgamma(t + gamma) - lgamma(t + 1.0) - lgamma(1 + gamma)) : 1; // 1 + γ and t + γ are positive
        worst = fmax(worst, fabs(solve[t] / closed[t] - 1));
    }
    attention_forward(out, stats, work, zero, zero, impulse, one_head);
    for (int t = 0; t < T; t++) {
        direct[t] = (double)out[(size_t)t * D];
        hop = fmax(hop, fabs(direct[t] * (t + 1) - 1));
    }
    real *xbc = impulse; // rows of x (2), b, c; x is the impulse, b and c are 1
    for (int t = 0; t < T; t++) xbc[(size_t)t * W + 2] = xbc[(size_t)t * W + 3] = 1;
    ScanShape scan = {1, T, D, 1, 1, &A_log, &skip};
    scan_forward(out, states, 0, work, xbc, steps, scan);
    int visible = 0; // float32's exponent ends
    for (int t = 0; t < T; t++) {
        chain[t] = (double)out[(size_t)t * D] / step;
        if (exp(-rate * t) < 1e-30) continue;
        visible = t + 1;
        fade = fmax(fade, fabs(chain[t] / exp(-rate * t) - 1));
    }
    double fitted = slope(solve, T / 100, T, 0), chained = slope(chain, 1, visible, 1);
    hold(worst, 1e-4, "feedback, gamma %g, T %.0f: worst point against the closed form", gamma, T);
    hold(fabs(fitted / (gamma - 1) - 1), 0.01, "  its slope from T/100 to T is %.5f, to be gamma - 1 = %g", fitted, gamma - 1);
    hold(hop, 1e-12, "attention: worst point against 1/(lag + 1)%.0s%.0s", 0, 0);
    hold(fabs(slope(direct, T / 100, T, 0) + 1), 0.01, "  its slope from T/100 to T is %.5f, to be -1%.0s", slope(direct, T / 100, T, 0), 0);
    hold(fade, 1e-4, "chain: worst point against exp(-%g lag)%.0s", rate, 0);
    hold(fabs(chained / rate + 1), 0.001, "  the logarithm's slope over the lag is %.6f, to be %g", chained, -rate);
    if (report) {
        keep("uniform.solve", solve, 0, T);
        keep("uniform.closed", closed, 0, T);
        keep("uniform.direct", direct, 0, T);
        keep("uniform.chain", chain, 0, T);
    }
    void *arrays[] = {zero, impulse, out, gain, stats, steps, scratch, solve, closed, direct, chain};
    for (size_t i = 0; i < sizeof(arrays) / sizeof(arrays[0]); i++) free(arrays[i]);
}

// ----------------------------------------------------------------------------
// --check: the Jacobians against differences, the solve against the system it solves

static void check_model(int mixer) {
    enum { T = 45 };
    Config config = {.vocab_size = 11, .d_model = 12, .n_layers = 2, .n_heads = 2, .n_kv_heads = 1, .max_seq_len = T,
                     .gamma_max = 0.999, .mixer = mixer};
    if (mixer == MAMBA2) {
        config.head_dim = 8;
        config.state_dim = 5;
    }
    char error[ERROR_SIZE];
    Model *m = model_create(&config, 1, T, TRAIN, error);
    if (!m) { fprintf(stderr, "influence: %s\n", error); exit(1); }
    int D = config.d_model, l = 1, ids[T];
    uint64_t random = 5;
    Dropout off = {0, 0, 0, 0};
    initialise(m->params, &m->table, 3);
    for (int64_t i = 0; i < m->table.count; i++) m->params[i] *= 3; // uneven weights
    for (int t = 0; t < T; t++) ids[t] = (int)(random_u64(&random) % 11);
    model_forward(m, ids, ids, 1, T, off);
    LayerActivations *a = &m->acts.layers[l];

    // |∂s_t/∂ā_τ| by unit vectors and by differences
    double rows[T] = {0}, differences[T] = {0}, total = 0, wrong = 0, h = 1e-5;
    int t = T - 1;
    real *u = (real *)array((size_t)D, sizeof(real)), *after = (real *)array((size_t)D, sizeof(real));
    for (int i = 0; i < D; i++) {
        memset(u, 0, sizeof(real) * (size_t)D);
        u[i] = 1;
        jacobian_rows(rows, m, l, T, t, u);
    }
    for (int j = 0; j < T; j++)
        for (int i = 0; i < D; i++) {
            for (int side = 1; side >= -1; side -= 2) {
                gelu_forward(a->abar, a->ag, 2 * D, T, D);
                a->abar[(size_t)j * D + i] += (real)(side * h);
                mixers[mixer].forward(m, l, 1, T, 0);
                for (int k = 0; k < D; k++) after[k] = side > 0 ? a->s[(size_t)t * D + k] : after[k] - a->s[(size_t)t * D + k];
            }
            for (int k = 0; k < D; k++) differences[j] += pow((double)after[k] / (2 * h), 2) / D;
        }
    for (int j = 0; j < T; j++) {
        total += rows[j];
        wrong += fabs(rows[j] - differences[j]);
    }
    char what[128];
    snprintf(what, sizeof(what), "%s: squared Jacobian against central differences%%.0s%%.0s", mixers[mixer].name);
    hold(wrong / total, 1e-7, what, 0, 0);

    // signs in the place of unit vectors: the same on the average
    double guess[T] = {0};
    enum { PROBES = 4000 };
    model_forward(m, ids, ids, 1, T, off);
    for (int p = 0; p < PROBES; p++) {
        for (int k = 0; k < D; k++) u[k] = random_u64(&random) >> 63 ? 1 : -1;
        jacobian_rows(guess, m, l, T, t, u);
    }
    for (int j = 0; j < T; j++) wrong = j ? fmax(wrong, fabs(guess[j] / PROBES - rows[j]) / rows[j]) : 0;
    snprintf(what, sizeof(what), "%s: its estimate from %d random signs%%.0s%%.0s", mixers[mixer].name, PROBES);
    hold(wrong, 0.1, what, 0, 0);

    double *A = (double *)array((size_t)T * T, sizeof(double)), *R = (double *)array((size_t)T * T, sizeof(double));
    wrong = 0;
    if (mixer != MAMBA2) { // rows of attention sum to 1
        direct_matrix(A, m, l, T);
        for (int i = 0; i < T; i++) {
            double sum = 0;
            for (int j = 0; j < T; j++) sum += A[(size_t)i * T + j];
            wrong = fmax(wrong, fabs(sum - 1));
        }
        snprintf(what, sizeof(what), "%s: rows of attention sum to 1%%.0s%%.0s", mixers[mixer].name);
        hold(wrong, 1e-12, what, 0, 0);
    } else { // the chain's products, against one step after the other
        chain_matrix(R, m, l, T);
        int heads = 2 * D / config.head_dim;
        for (int j = 0; j < T; j++)
            for (int head = 0; head < heads; head++) {
                double x = 1;
                for (int i = j; i < T; i++) {
                    if (i > j) x *= exp(-exp((double)m->weights.layers[l].A_log[head]) * (double)a->step[i * heads + head]);
                    R[(size_t)i * T + j] -= x / heads;
                }
            }
        for (int i = 0; i < T * T; i++) wrong = fmax(wrong, fabs(R[i]));
        hold(wrong, 1e-12, "mamba2: products of the chain%.0s%.0s", 0, 0);
    }
    if (mixer == SESSA) { // (I - A) R = I; and the adjoint solve of a unit vector is a row of R
        // a moment of the kernel, against (I - A)'s own: its row t is γ_t α_tj
        memset(A, 0, sizeof(double) * T * T);
        feedback_matrix(A, m, l, T, 0);
        double kernel[KERNEL] = {0}, moment = 0, to_be = 0, beta = 0.6;
        add_kernel(kernel, A, a->gamma, T);
        memset(A, 0, sizeof(double) * T * T);
        feedback_matrix(A, m, l, T, 1);
        for (int b = 0; b < KERNEL; b++) moment += kernel[b] * pow(2, beta * (b + 0.5) / PER_OCTAVE);
        for (int i = T / 16; i < T; i++)
            for (int j = 0; j < i; j++) {
                double ratio = (double)a->gamma[j] / (double)a->gamma[i];
                to_be += A[(size_t)i * T + j] * ratio * pow(i / (j + 0.5), beta) / (T - T / 16);
            }
        hold(fabs(moment / to_be - 1), 0.01, "sessa: a moment of the kernel, %.5f, against the matrix' own, %.5f",
             moment, to_be);
        solve_matrix(R, m, l, T, T);
        wrong = 0;
        for (int i = 0; i < T; i++)
            for (int j = 0; j < T; j++) {
                double x = R[(size_t)i * T + j] - (i == j);
                for (int k = 0; k < i; k++) x -= A[(size_t)i * T + k] * R[(size_t)k * T + j];
                wrong = fmax(wrong, fabs(x));
            }
        hold(wrong, 1e-12, "sessa: (I - A) times the solve's matrix is I%.0s%.0s", 0, 0);
        memset(m->acts.ds, 0, sizeof(real) * (size_t)T * (size_t)D);
        m->acts.ds[(size_t)t * D] = 1;
        int E = proj_width(&config);
        const real *fb_q = a->proj + E - 2 * D, *fb_k = fb_q + D;
        real *dfb_q = m->acts.dproj + E - 2 * D, *dfb_k = dfb_q + D;
        feedback_backward(m->acts.ds, dfb_q, dfb_k, m->acts.dgamma, work_of(m), a->s, a->fb_stats, fb_q, fb_k, a->gamma,
                          feedback_shape(&config, 1, T, 0));
        wrong = 0;
        for (int j = 0; j < T; j++) wrong = fmax(wrong, fabs((double)m->acts.ds[(size_t)j * D] - R[(size_t)t * T + j]));
        hold(wrong, 1e-12, "sessa: its last row is the adjoint's answer to a unit vector%.0s%.0s", 0, 0);
    }
    free(A);
    free(R);
    free(u);
    free(after);
    model_free(m);
}

static int check(void) {
    const double gammas[] = {0.9, 0.5, 0.1, -0.5, -0.9};
    for (size_t i = 0; i < sizeof(gammas) / sizeof(gammas[0]); i++) uniform(gammas[i], i % 2 ? 5000 : 4096, 0);
    for (int mixer = 0; mixer < N_MIXERS; mixer++) check_model(mixer);
    printf("%s\n", failed ? "FAIL" : "OK");
    return failed > 0;
}

// ----------------------------------------------------------------------------

static int usage(void) {
    fprintf(stderr, "influence: takes OUT.safetensors and train_sessa's options, or --uniform GAMMA T [OUT.safetensors] with "
                    "0 < |GAMMA| <= 0.9 and 4096 <= T <= 65536, or --check; "
                    "see the head of dev/claims/influence.c\n");
    return 2;
}

int main(int argc, char **argv) {
    (void)run_program; // only its parts are wanted here
    char error[ERROR_SIZE] = "";
    if (argc == 2 && !strcmp(argv[1], "--check")) return check();
    if (argc >= 4 && argc <= 5 && !strcmp(argv[1], "--uniform")) {
        double gamma = 0;
        int64_t T = 0;
        if (parse_number(argv[2], &gamma) || parse_integer(argv[3], 4096, 65536, &T) || !(fabs(gamma) > 0 && fabs(gamma) <= 0.9)) return usage();
        uniform(gamma, (int)T, argc == 5);
        Meta meta[] = {{(char *)"gamma", argv[2]}, {(char *)"seq_len", argv[3]}};
        Place place;
        if (argc == 5 && (settle(&place, argv[4], NULL, error) ||
                          safetensors_write(&place, tensors, n_tensors, meta, 2, 0, NULL, error))) {
            fprintf(stderr, "influence: %s\n", error);
            return 1;
        }
        return failed > 0;
    }
    if (argc < 2 || argv[1][0] == '-') return usage();

    // its own options are taken out, the others go to the program's parser
    Measure o = {1, 16, 16, 2, -1, 256};
    struct { const char *name; int *value, low; } own[] = {{"--sequences", &o.sequences, 1}, {"--sources", &o.sources, 0},
        {"--targets", &o.targets, 1}, {"--probes", &o.probes, 1}, {"--map", &o.map, 0}, {"--map-size", &o.map_size, 2}};
    int n_own = sizeof(own) / sizeof(own[0]);
    char **rest = (char **)array((size_t)argc + 4, sizeof(char *));
    int n = 0;
    rest[n++] = argv[0];
    for (int i = 2; i < argc; i++) {
        int k = 0;
        while (k < n_own && strcmp(argv[i], own[k].name)) k++;
        int64_t value;
        if (k == n_own) rest[n++] = argv[i];
        else if (i + 1 < argc && !parse_integer(argv[i + 1], own[k].low, 1 << 20, &value)) *own[k].value = (int)value, i++;
        else {
            fprintf(stderr, "influence: %s takes a whole number, %d or more\n", argv[i], own[k].low);
            return 2;
        }
    }
    rest[n++] = (char *)"--batch=1";
    rest[n++] = (char *)"--accum=1";
    Run run;
    memset(&run, 0, sizeof(run));
    run.backend = &cpu_backend;
    run.order_epoch = -1;
    int result = parse_options(&run.settings, n, rest, error);
    if (result > 0) return usage();
    if (!result && (run.settings.values.generate || run.settings.values.eval || run.settings.values.resume))
        result = wrong(error, NULL, "--generate, --eval and --resume have no place here");
    if (!result && run.settings.values.seq > 16384) result = wrong(error, NULL, "--seq must not exceed 16384: matrices of T x T are made");
    if (!result) result = prepare(&run, error);
    if (!result) result = measure(&run, &o, argv[1], error);
    if (result) fprintf(stderr, "influence: %s\n", error);
    return result == WRONG_OPTION ? 2 : result ? 1 : 0;
}
