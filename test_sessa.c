/*
The test of train_sessa.c: every layer against the plain loops of its equations, every gradient against
central differences (in float64), whole models against dumps of the PyTorch reference, and the program as a
user runs it.

    ./test_sessa                     everything, and the dumps data/ref_*.safetensors
    ./test_sessa --layers            the same without the program as it is run: for emulators and other slow
machines
    ./test_sessa my.safetensors ...  only these dumps: any model that you dumped, with the tensors that you
chose

Built twice: as it is (float32), and with -DREAL=double, where errors are rounding errors of float64 and so
tiny that a wrong term cannot hide behind them. Each line is one check: what, the error measured, its bound,
ok or FAIL. Errors are relative and of whole tensors, ‖x - ref‖/‖ref‖, unless the line says otherwise. The
program is run by starting this very binary again as `test_sessa --run OPTIONS`, in a folder of its own, so
that threads, signals and exit codes are real.
*/
#define SESSA_NO_MAIN
#ifdef TEST_CUDA
#define GUARD_BANDS
#include "train_sessa.cu"
#define TESTED_BACKEND (*backend_gpu())
enum { ON_GPU = 1 };
static Model *tested_create(const Config *config, int B, int T, Mode mode, char *error); // above main: the GPU's, and the
static void tested_free(Model *model);                                                   // CPU's Model to look at it
static void tested_forward(Model *model, const int *inputs, const int *targets, int B, int T, Dropout drop);
static double tested_loss(Model *model);
static void tested_backward(Model *model, double dloss);
static double tested_update(Model *model, AdamW options, double clip, int64_t step);
static int run_tested(int argc, char **argv);
#else
#include "train_sessa.c"
#define TESTED_BACKEND cpu_backend
enum { ON_GPU = 0 };
#define tested_create model_create
#define tested_free model_free
#define tested_forward model_forward
#define tested_loss model_loss
#define tested_backward model_backward
#define tested_update cpu_update
#define run_tested(argc, argv) run_program(argc, argv, &TESTED_BACKEND)
#endif
#include <dirent.h>
#include <glob.h>
#include <poll.h>
#include <sched.h>
#include <sys/wait.h>

enum { IS_DOUBLE = sizeof(real) == sizeof(double) };
static int passed, failed;

// A bound for float32 and one for float64.
static double bound_of(double in_float, double in_double) { return IS_DOUBLE ? in_double : in_float; }
static double dump_bound; // 0: the check's own

static void heading(const char *title) { printf("\n%s\n", title); }

static int count(int ok) {
    if (ok) passed++;
    else failed++;
    fflush(stdout);
    return ok;
}

__attribute__((format(printf, 3, 4)))
static int check_error(double error, double bound, const char *format, ...) {
    char name[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof(name), format, arguments);
    va_end(arguments);
    int ok = error <= bound; // false for NaN
    printf("  %-66s %9.2e  bound %7.1e  %s\n", name, error, bound, ok ? "ok" : "FAIL");
    return count(ok);
}

__attribute__((format(printf, 2, 3)))
static int check(int ok, const char *format, ...) {
    char name[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof(name), format, arguments);
    va_end(arguments);
    printf("  %-92s  %s\n", name, ok ? "ok" : "FAIL");
    return count(ok);
}

// ----------------------------------------------------------------------------
// memory and numbers of a test

static void *lent[8192];
static int n_lent;

static void *keep(void *memory) {
    if (!memory || n_lent == 8192) { printf("the test is out of memory\n"); exit(1); }
    return lent[n_lent++] = memory;
}
static void *lend(size_t bytes) { return keep(calloc(bytes ? bytes : 1, 1)); }
static void release(void) { while (n_lent) free(lent[--n_lent]); } // all that was lent, at the end of a test

static uint64_t chance = 20260424;
static int random_int(int low, int high) { return low + (int)(random_u64(&chance) % (uint64_t)(high - low + 1)); }

// What the program is held against is computed in these numbers. Each of them is read and written as the loop
// says, so that no optimiser sums in another order or makes vectors of it, whatever the flags that the tested
// code is compiled with.
typedef volatile double precise;

static precise *zeros(int64_t n) { return (precise *)lend((size_t)n * sizeof(double)); }
static real *noise(int64_t n, double scale) {
    real *x = (real *)lend((size_t)n * sizeof(real));
    for (int64_t i = 0; i < n; i++) x[i] = (real)(scale * random_normal(&chance));
    return x;
}
// Outputs start as NaN, so that an element which nobody writes shows.
static real *poison(int64_t n) {
    real *x = (real *)lend((size_t)n * sizeof(real));
    for (int64_t i = 0; i < n; i++) x[i] = (real)NAN;
    return x;
}
static real *copy_of(const real *x, int64_t n) {
    real *copy = (real *)lend((size_t)n * sizeof(real));
    memcpy(copy, x, (size_t)n * sizeof(real));
    return copy;
}
static int *random_ids(int64_t n, int V, int ignored) { // one in four is -1 where `ignored`
    int *ids = (int *)lend((size_t)n * sizeof(int));
    for (int64_t i = 0; i < n; i++) ids[i] = ignored && random_int(0, 3) == 0 ? -1 : random_int(0, V - 1);
    return ids;
}

// ‖x - ref‖ / max(‖ref‖, floor) over the first `width` of the ld columns of each row. Infinite if one of the other columns,
// NaN before, was written.
static double rows_error(const real *x, const precise *ref, int64_t rows, int width, int ld, double floor) {
    precise difference = 0, size = 0;
    for (int64_t n = 0; n < rows; n++)
        for (int i = 0; i < ld; i++) {
            double value = (double)x[n * ld + i], wanted = ref[n * ld + i];
            if (i >= width && !isnan(value)) return INFINITY;
            if (i >= width) continue;
            difference += (value - wanted) * (value - wanted);
            size += wanted * wanted;
        }
    return sqrt(difference) / fmax(sqrt(size), fmax(floor, 1e-200));
}
static double error_of(const real *x, const precise *ref, int64_t n, double floor) {
    return rows_error(x, ref, 1, (int)n, (int)n, floor);
}
static void worst_of(precise *worst, double error) { if (!(error <= *worst)) *worst = error; } // NaN stays
static double length_of(const real *x, int64_t n) {
    precise sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sqrt(sum);
}

// The row of this name, NULL if there is none.
static const Tensor *find_tensor(const Table *table, const char *name) {
    for (int i = 0; i < table->n; i++)
        if (!strcmp(table->rows[i].name, name)) return &table->rows[i];
    return NULL;
}

static Config config_with(int mixer, int V, int D, int L, int H, int G, int T) {
    int mamba2 = mixer == MAMBA2;
    Config c = {V, D, L, H, G, T, 0.999, mixer, mamba2 ? D / 2 : 0, mamba2 ? 5 : 0};
    return c;
}

static Model *create(const Config *c, int B, int T, Mode mode) {
    char error[ERROR_SIZE];
    Model *m = model_create(c, B, T, mode, error);
    if (!m) { printf("%s\n", error); exit(1); }
    return m;
}

// ----------------------------------------------------------------------------
// elementary functions, random numbers

static void test_numbers(void) {
    heading("elementary functions and random numbers");
    double worst = 0, worst_cdf = 0, worst_tail = 0;
    for (double x = -86.9; x < 87.9; x += 0.00137) {
        real rounded = (real)x;
        double exact = exp((double)rounded), bound = IS_DOUBLE ? 1e-15 : 2.5e-7 + 6e-8 * fabs(x); // half of it with fused multiply-add
        worst_of(&worst, fabs((double)exp_real(rounded) - exact) / exact / bound);
    }
    check_error(worst, 1, "exp_real: relative error, as a share of 2.5e-7 + 6e-8 |x|");
    for (double x = -12; x < 12; x += 0.00173) {
        real rounded = (real)x;
        double exact = 0.5 * erfc(-(double)rounded * 0.70710678118654752440), value = (double)normal_cdf(rounded, exp_real(-rounded * rounded / 2));
        worst_of(&worst_cdf, fabs(value - exact));
        if (x < 0 && x > -5) worst_of(&worst_tail, fabs(value - exact) / exact);
    }
    check_error(worst_cdf, bound_of(3e-7, 1e-15), "normal_cdf: absolute error, |x| < 12");
    check_error(worst_tail, bound_of(3e-6, 1e-12), "normal_cdf: relative error of the tail, -5 < x < 0");
    real huge = exp_real((real)1e30), tiny = exp_real((real)-1e30), at_zero = exp_real(0);
    check(huge > (real)1e38 && tiny == 0 && at_zero == 1 && isnan(exp_real((real)NAN)) &&
          exp_real((real)-INFINITY) == 0, "exp_real: 1 at 0, large at one end, 0 at the other, NaN stays NaN");
    check((double)normal_cdf(30, 0) == 1 && fabs((double)normal_cdf(-30, 0)) < 1e-37 && isnan(normal_cdf((real)NAN, (real)NAN)), "normal_cdf: 0 and 1 at the ends, NaN stays NaN");
    char line[ERROR_SIZE];
    fail(line, "caf\xC3\xA9", "%s", "\x1B[2J\n\xC2\x9B\xFF\xC3");
    check(!strcmp(line, "caf\xC3\xA9: ?[2J?????"), "messages: control characters and what is no UTF-8 become '?'");
    uint64_t state = 0;
    uint64_t first = random_u64(&state), second = random_u64(&state);
    check(first == 0xE220A8397B1DCDAFu && second == 0x6E789E6AA1B965F4u, "random_u64: the first two words of SplitMix64 from state 0");
}

// ----------------------------------------------------------------------------
// the matrix product and the triangular system, against three-line loops

static void test_matmul(void) {
    heading("matrix product and triangular system against plain loops");
    static const int Ms[] = {1, 2, TILE_ROWS, TILE_ROWS + 1, 61}, Ns[] = {1, 3, TILE_COLS, TILE_COLS + 1, BLOCK_N + 5}, Ks[] = {0, 1, 5, BLOCK_K, BLOCK_K + 3};
    static const real alphas[] = {1, (real)0.5, 1, (real)-0.25}, betas[] = {0, 1, (real)0.75, 0};
    double worst[2] = {0, 0};
    for (int i = 0; i < 500; i++) {
        int M = Ms[i % 5], N = Ns[i / 5 % 5], K = Ks[i / 25 % 5], form = i / 125, ld = N + random_int(0, 3);
        int kind_a = random_int(0, 2), kind_b = random_int(0, 2), pad = random_int(0, 3);
        real alpha = alphas[form], beta = betas[form];
        ptrdiff_t steps[3][2] = {{K + pad, 1}, {1, M + pad}, {2 * (K + pad), 2}}, steps_b[3][2] = {{N + pad, 1}, {1, K + pad}, {2 * (N + pad), 2}};
        Matrix a = {noise(2 * (M + pad) * (K + pad) + 1, 1), steps[kind_a][0], steps[kind_a][1]};
        Matrix b = {noise(2 * (K + pad) * (N + pad) + 1, 1), steps_b[kind_b][0], steps_b[kind_b][1]};
        const real *bias = random_int(0, 1) ? noise(N, 1) : NULL;
        real *out = poison((int64_t)M * ld), *before = noise((int64_t)M * ld, 1);
        precise *ref = zeros((int64_t)M * ld);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) {
                precise sum = 0;
                for (int k = 0; k < K; k++) sum += (double)a.at[m * a.row + k * a.col] * (double)b.at[k * b.row + n * b.col];
                ref[m * ld + n] = (double)alpha * sum + (beta == 0 ? 0 : (double)beta * (double)before[m * ld + n]) + (bias ? (double)bias[n] : 0);
                if (beta != 0) out[m * ld + n] = before[m * ld + n];
            }
        matmul(out, ld, a, b, M, N, K, alpha, beta, bias);
        worst_of(&worst[M == 1], rows_error(out, ref, M, N, ld, sqrt((double)M * N * K) / 4));
        release();
    }
    check_error(worst[0], bound_of(2e-6, 4e-15), "matmul, 400 shapes, strides, alpha, beta, bias: worst");
    check_error(worst[1], bound_of(2e-6, 4e-15), "matmul of one row, 100 shapes: worst");
    double worst_way[2] = {0, 0};
    static const int sizes[] = {1, 2, 5, TILE_ROWS, TILE_ROWS + 1, 31, PANEL_MAX - 1, PANEL_MAX}, widths[] = {1, 7, TILE_COLS, TILE_COLS + 1, 100};
    for (int i = 0; i < 80; i++) {
        int n = sizes[i % 8], D = widths[i / 8 % 5], backward = i / 40, ld = D + random_int(0, 3);
        real *lower = noise((int64_t)n * n, 0.7 / sqrt((double)n)), *x = poison((int64_t)n * ld);
        precise *ref = zeros((int64_t)n * ld);
        for (int t = 0; t < n; t++) {
            for (int j = t; j < n; j++) lower[t * n + j] = 0;
            for (int e = 0; e < D; e++) ref[t * ld + e] = (double)(x[t * ld + e] = (real)random_normal(&chance));
        }
        for (int step = 0; step < n; step++) { // forward row t takes from the rows before it; backward it gives to them
            int t = backward ? n - 1 - step : step;
            for (int j = 0; j < t; j++)
                for (int e = 0; e < D; e++) {
                    double weight = (double)lower[t * n + j];
                    if (backward) ref[j * ld + e] += weight * ref[t * ld + e];
                    else ref[t * ld + e] += weight * ref[j * ld + e];
                }
        }
        Matrix reversed = {lower + n * n - 1, -1, -n};
        if (backward) triangular_solve(x + (size_t)(n - 1) * ld, -ld, reversed, n, D);
        else triangular_solve(x, ld, rows_of(lower, n), n, D);
        worst_of(&worst_way[backward], rows_error(x, ref, n, D, ld, 0));
        release();
    }
    check_error(worst_way[0], bound_of(1e-6, 2e-15), "triangular_solve, 40 shapes: worst");
    check_error(worst_way[1], bound_of(1e-6, 2e-15), "triangular_solve of the transposed system, 40 shapes: worst");
}

// ----------------------------------------------------------------------------
// attention and feedback against the loops of their equations, number by number in double

static const int panel_heights[] = {0, 1, 3, 8}; // 0: the layer chooses
enum { N_HEIGHTS = 4 };

// [15, 16] o_t = Σ_{j≤t} p_tj v_j and, with dout, the gradients of Σ o·dout. Layouts are those of attention_forward.
static void plain_attention(precise *out, precise *dq, precise *dk, precise *dv, const real *dout,
                            const real *q, int ld, const real *k, const real *v, int ld_kv, int B, int T,
                            int H, int G, int d, int first) {
    precise *p = zeros(T), *dp = zeros(T);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++)
            for (int t = first; t < T; t++) {
                size_t row = (size_t)b * (T - first) + t - first, at = (row * H + h) * d, at_q = row * ld + h * d, sum_at = at;
                size_t kv = (size_t)b * T * ld_kv + h / (H / G) * d;
                precise sum = 0, mean = 0;
                for (int j = 0; j <= t; j++) {
                    precise logit = 0;
                    for (int i = 0; i < d; i++) logit += (double)q[at_q + i] * (double)k[kv + (size_t)j * ld_kv + i];
                    sum += p[j] = exp(logit / sqrt((double)d));
                }
                for (int j = 0; j <= t; j++)
                    for (int i = 0; i < d; i++) out[sum_at + i] += p[j] / sum * (double)v[kv + (size_t)j * ld_kv + i];
                if (!dout) continue;
                for (int j = 0; j <= t; j++) {
                    p[j] /= sum;
                    dp[j] = 0;
                    for (int i = 0; i < d; i++) {
                        dp[j] += (double)dout[at + i] * (double)v[kv + (size_t)j * ld_kv + i];
                        dv[kv + (size_t)j * ld_kv + i] += p[j] * (double)dout[at + i];
                    }
                    mean += p[j] * dp[j];
                }
                for (int j = 0; j <= t; j++)
                    for (int i = 0; i < d; i++) {
                        double dlogit = p[j] * (dp[j] - mean) / sqrt((double)d);
                        dq[at_q + i] += dlogit * (double)k[kv + (size_t)j * ld_kv + i];
                        dk[kv + (size_t)j * ld_kv + i] += dlogit * (double)q[at_q + i];
                    }
            }
}

// [17, 19-22] s_t = f_t + γ_t Σ_{j<t} α_tj s_j and, with ds, the gradients of Σ s·ds. The rows of s before first are given.
static void plain_feedback(precise *s, precise *df, precise *dq, precise *dk, precise *dgamma, const real *ds,
                           const real *f, const real *q, int ld, const real *k, int ld_k, const real *gamma,
                           int B, int T, int D, int first) {
    precise *alpha = zeros((int64_t)T * T), *dalpha = zeros(T);
    for (int b = 0; b < B; b++) {
        size_t row0 = (size_t)b * (T - first), all0 = (size_t)b * T;
        for (int t = first; t < T; t++) {
            size_t row = row0 + t - first;
            precise sum = 0;
            for (int j = 0; j < t; j++) {
                precise logit = 0;
                for (int i = 0; i < D; i++) logit += (double)q[row * ld + i] * (double)k[(all0 + j) * ld_k + i];
                sum += alpha[t * T + j] = exp(logit / sqrt((double)D));
            }
            for (int i = 0; i < D; i++) s[(all0 + t) * D + i] = (double)f[row * D + i];
            for (int j = 0; j < t; j++) {
                alpha[t * T + j] /= sum;
                for (int i = 0; i < D; i++) s[(all0 + t) * D + i] += (double)gamma[row] * alpha[t * T + j] * s[(all0 + j) * D + i];
            }
        }
        if (!ds) continue;
        for (size_t i = all0 * D; i < (all0 + T) * D; i++) df[i] = (double)ds[i];
        for (int t = T - 1; t >= 0; t--) { // df_t is complete when the rows after it have given
            precise mean = 0;
            for (int j = 0; j < t; j++) {
                dalpha[j] = 0;
                for (int i = 0; i < D; i++) {
                    df[(all0 + j) * D + i] += (double)gamma[all0 + t] * alpha[t * T + j] * df[(all0 + t) * D + i];
                    dalpha[j] += df[(all0 + t) * D + i] * s[(all0 + j) * D + i];
                }
                mean += alpha[t * T + j] * dalpha[j];
            }
            dgamma[all0 + t] = mean;
            for (int j = 0; j < t; j++)
                for (int i = 0; i < D; i++) {
                    double dlogit = (double)gamma[all0 + t] * alpha[t * T + j] * (dalpha[j] - mean) / sqrt((double)D);
                    dq[(all0 + t) * ld + i] += dlogit * (double)k[(all0 + j) * ld_k + i];
                    dk[(all0 + j) * ld_k + i] += dlogit * (double)q[(all0 + t) * ld + i];
                }
        }
    }
}

static const int lengths[] = {1, 2, 3, 5, 8, 9, 23, 24, 25, 49, 61, 97, 121, 150, 64, 33};
enum { N_LENGTHS = 16 };

static real *scratch_for(int T) { return (real *)lend(panel_scratch(T) * (size_t)omp_get_max_threads() * sizeof(real)); }

static void test_attention(void) {
    heading("attention and feedback against the loops of their equations: T from 1 to 150, poisoned outputs");
    for (int i = 0; i < N_HEIGHTS; i++) {
        double worst[5] = {0}; // out, with a cache, dq, dk, dv
        for (int c = 0; c < N_LENGTHS; c++) {
            int T = lengths[c], B = random_int(1, 3), G = random_int(1, 2), H = G * random_int(1, 3), d = 2 * random_int(1, 6), D = H * d;
            int first = random_int(0, T - 1), ld = D + random_int(0, 3), P = panel_heights[i];
            real *q = noise((int64_t)B * T * ld, 1.5), *k = noise((int64_t)B * T * ld, 1), *v = noise((int64_t)B * T * ld, 1), *dout = noise((int64_t)B * T * D, 1);
            real *out = poison((int64_t)B * T * D), *stats = poison((int64_t)B * H * T * 2), *scratch = scratch_for(T);
            precise *ref = zeros((int64_t)B * T * D), *dq = zeros((int64_t)B * T * ld),
                    *dk = zeros((int64_t)B * T * ld), *dv = zeros((int64_t)B * T * ld);
            plain_attention(ref, dq, dk, dv, dout, q, ld, k, v, ld, B, T, H, G, d, 0);
            attention_forward(out, stats, scratch, q, k, v, ld, B, T, H, G, d, 0, P);
            worst_of(&worst[0], error_of(out, ref, (int64_t)B * T * D, 0));
            real *dq_layer = poison((int64_t)B * T * ld), *dk_layer = poison((int64_t)B * T * ld), *dv_layer = poison((int64_t)B * T * ld);
            attention_backward(dq_layer, dk_layer, dv_layer, scratch, dout, stats, q, k, v, ld, B, T, H, G, d, P);
            double floor = 0.1 * length_of(dout, (int64_t)B * T * D);
            worst_of(&worst[2], rows_error(dq_layer, dq, (int64_t)B * T, D, ld, floor));
            worst_of(&worst[3], rows_error(dk_layer, dk, (int64_t)B * T, G * d, ld, floor));
            worst_of(&worst[4], rows_error(dv_layer, dv, (int64_t)B * T, G * d, ld, floor));
            int rows = B * (T - first); // the same with the positions before `first` known
            real *late = poison((int64_t)rows * D), *late_stats = poison((int64_t)rows * H * 2);
            precise *late_ref = zeros((int64_t)rows * D);
            plain_attention(late_ref, NULL, NULL, NULL, NULL, q, ld, k, v, ld, B, T, H, G, d, first);
            attention_forward(late, late_stats, scratch, q, k, v, ld, B, T, H, G, d, first, P);
            worst_of(&worst[1], error_of(late, late_ref, (int64_t)rows * D, 0));
            release();
        }
        static const char *names[] = {"out", "out after known positions", "dq", "dk", "dv"};
        for (int n = 0; n < 5; n++) check_error(worst[n], bound_of(3e-6, 1e-14), "attention, P %d, %s", panel_heights[i], names[n]);
    }
    for (int i = 0; i < N_HEIGHTS; i++) {
        double worst[6] = {0}; // s, with a cache, df, dq', dk', dgamma
        for (int c = 0; c < N_LENGTHS; c++) {
            int T = lengths[c], B = random_int(1, 3), D = random_int(2, 40), first = random_int(0, T - 1), ld = D + random_int(0, 3), P = panel_heights[i];
            int64_t n = (int64_t)B * T, wide = n * ld, size = n * D;
            real *f = noise(size, 1), *q = noise(wide, 1.5), *k = noise(wide, 1), *gamma = noise(n, 1), *ds = noise(size, 1), *scratch = scratch_for(T);
            for (int64_t r = 0; r < n; r++) gamma[r] = (real)(0.999 * tanh((double)gamma[r]));
            real *s = poison(size), *stats = poison(2 * n), *df_layer = poison(size), *dq_layer = poison(wide), *dk_layer = poison(wide), *dgamma_layer = poison(n);
            precise *ref = zeros(size), *df = zeros(size), *dq = zeros(wide), *dk = zeros(wide),
                    *dgamma = zeros(n), floor = 0.1 * length_of(ds, size);
            plain_feedback(ref, df, dq, dk, dgamma, ds, f, q, ld, k, ld, gamma, B, T, D, 0);
            feedback_forward(s, stats, scratch, f, q, k, ld, gamma, B, T, D, 0, P);
            worst_of(&worst[0], error_of(s, ref, size, 0));
            feedback_backward(df_layer, dq_layer, dk_layer, dgamma_layer, scratch, ds, s, stats, q, k, ld, gamma, B, T, D, P);
            worst_of(&worst[2], error_of(df_layer, df, size, 0));
            worst_of(&worst[3], rows_error(dq_layer, dq, n, D, ld, floor));
            worst_of(&worst[4], rows_error(dk_layer, dk, n, D, ld, floor));
            worst_of(&worst[5], error_of(dgamma_layer, dgamma, n, floor));
            precise *late_ref = zeros(size);
            real *late = poison(size), *late_stats = poison(2 * n);
            for (int b = 0; b < B; b++)
                for (int r = 0; r < first * D; r++) late_ref[b * T * D + r] = (double)(late[b * T * D + r] = (real)random_normal(&chance));
            plain_feedback(late_ref, NULL, NULL, NULL, NULL, NULL, f, q, ld, k, ld, gamma, B, T, D, first);
            feedback_forward(late, late_stats, scratch, f, q, k, ld, gamma, B, T, D, first, P);
            worst_of(&worst[1], error_of(late, late_ref, size, 0));
            release();
        }
        static const char *names[] = {"s", "s after known positions", "df", "dq'", "dk'", "dgamma"};
        for (int n = 0; n < 6; n++) check_error(worst[n], bound_of(3e-6, 1e-14), "feedback, P %d, %s", panel_heights[i], names[n]);
    }
}

// Gains at ±γ_max, and logits of exactly ±1e4: a softmax is then the mean over the keys with the query's sign, over all if
// there is none. The plain loops above would overflow.
static void test_extremes(void) {
    heading("the ends of the scales: gains of 0.999, logits of 1e4");
    enum { T = 150, D = 4 };
    uint64_t before = chance; // the tests behind this one see the numbers that they always saw
    static const double gains[] = {0.999, -0.999};
    for (int i = 0; i < 2; i++) {
        real *f = noise(T * D, 1), *q = noise(T * D, 0.5), *k = noise(T * D, 0.5), *gamma = noise(T, 0), *ds = noise(T * D, 1), *scratch = scratch_for(T);
        real *s = poison(T * D), *stats = poison(2 * T), *df_layer = poison(T * D), *dq_layer = poison(T * D), *dk_layer = poison(T * D), *dgamma_layer = poison(T);
        precise *ref = zeros(T * D), *df = zeros(T * D), *dq = zeros(T * D), *dk = zeros(T * D),
                *dgamma = zeros(T), largest = 0, largest_f = 0;
        for (int t = 0; t < T; t++) gamma[t] = (real)gains[i];
        plain_feedback(ref, df, dq, dk, dgamma, ds, f, q, D, k, D, gamma, 1, T, D, 0);
        feedback_forward(s, stats, scratch, f, q, k, D, gamma, 1, T, D, 0, 0);
        feedback_backward(df_layer, dq_layer, dk_layer, dgamma_layer, scratch, ds, s, stats, q, k, D, gamma, 1, T, D, 0);
        for (int e = 0; e < T * D; e++) {
            worst_of(&largest, fabs((double)s[e]));
            worst_of(&largest_f, fabs((double)f[e]));
        }
        check_error(error_of(s, ref, T * D, 0), bound_of(1e-5, 1e-13), "feedback, every gain %g: s", gains[i]);
        check_error(fmax(fmax(error_of(df_layer, df, T * D, 0), error_of(dgamma_layer, dgamma, T, 0)), fmax(error_of(dq_layer, dq, T * D, 0), error_of(dk_layer, dk, T * D, 0))),
                    bound_of(1e-4, 1e-12), "feedback, every gain %g: gradients", gains[i]);
        check_error(largest / (largest_f * 1000), 1, "|s| within max |f| / (1 - 0.999), as a share of it");
        release();
    }
    for (int strict = 0; strict < 2; strict++) { // attention, feedback
        real *f = noise(T * D, 1), *q = noise(T * D, 0), *k = noise(T * D, 0), *gamma = noise(T, 0.3), *out = poison(T * D), *stats = poison(2 * T), *scratch = scratch_for(T);
        precise *ref = zeros(T * D);
        for (int t = 0; t < T; t++) {
            q[t * D] = (real)(random_int(0, 1) ? 2e4 : -2e4); // times 1/sqrt(4)
            k[t * D] = (real)(t > T / 2 && random_int(0, 1) ? 1 : -1);
        }
        for (int t = 0; t < T; t++) {
            precise n = 0, all = strict ? t : t + 1, sum[D] = {0}, sum_all[D] = {0};
            for (int j = 0; j < all; j++) {
                int match = (q[t * D] > 0) == (k[j * D] > 0);
                n += match;
                for (int e = 0; e < D; e++) {
                    double value = strict ? ref[j * D + e] : (double)f[j * D + e];
                    sum[e] += match ? value : 0;
                    sum_all[e] += value;
                }
            }
            for (int e = 0; e < D; e++) {
                double mean = n ? sum[e] / n : all ? sum_all[e] / all : 0;
                ref[t * D + e] = strict ? (double)f[t * D + e] + (double)gamma[t] * mean : mean;
            }
        }
        if (strict) feedback_forward(out, stats, scratch, f, q, k, D, gamma, 1, T, D, 0, 0);
        else attention_forward(out, stats, scratch, q, k, f, D, 1, T, 1, 1, D, 0, 0);
        check_error(error_of(out, ref, T * D, 0), bound_of(3e-6, 1e-14), "%s with logits of 1e4 and -1e4", strict ? "feedback" : "attention");
        release();
    }
    enum { V = 5 };
    real logits[2 * V] = {(real)1e4, (real)-1e4, 0, (real)1e4, 0, (real)-1e4, (real)-1e4, (real)-1e4, (real)-1e4, (real)-1e4}, losses[2], sums[2], grads[2 * V];
    int targets[2] = {1, 4};
    crossentropy_forward(losses, sums, logits, targets, 2, V);
    crossentropy_backward(grads, logits, sums, targets, 1, 2, V);
    double wanted[2 * V] = {0.5, -1, 0, 0.5, 0, 0.2, 0.2, 0.2, 0.2, -0.8}, off = 0;
    for (int e = 0; e < 2 * V; e++) worst_of(&off, fabs((double)grads[e] - wanted[e]));
    check_error(fmax(fabs((double)losses[0] - 2e4 - log(2.0)) / 2e4, fabs((double)losses[1] - log(5.0)) / 1e4), bound_of(1e-7, 1e-12), "cross-entropy of logits of 1e4 and -1e4");
    check_error(off, bound_of(1e-3, 1e-11), "its gradient"); // a logit of 1e4 has a last digit of 1e-3
    chance = before;
}

// h_t = exp(-exp(A_log) Δ_t) h_{t-1} + Δ_t b_t x_t^T, y_t = c_t^T h_t + skip·x_t token by token, from the state h (B,S,E), and
// with dy the gradients of Σ y·dy: the states are remembered, and dh runs back over them.
static void plain_scan(precise *y, precise *h, precise *dxbc, precise *dstep, precise *dA, precise *dskip,
                       const real *dy, const real *xbc, const real *step, const real *A_log, const real *skip,
                       int B, int T, int E, int S, int heads) {
    int W = E + 2 * S, w = E / heads;
    precise *all = zeros((int64_t)(T + 1) * S), *dh = zeros(S);
    for (int b = 0; b < B; b++)
        for (int e = 0; e < E; e++) {
            double rate = exp((double)A_log[e / w]);
            for (int i = 0; i < S; i++) { all[i] = h[((int64_t)b * S + i) * E + e]; dh[i] = 0; }
            for (int t = 0; t < T; t++) {
                const real *x = xbc + (int64_t)(b * T + t) * W;
                double delta = (double)step[(b * T + t) * heads + e / w];
                precise sum = (double)skip[e / w] * (double)x[e];
                for (int i = 0; i < S; i++) {
                    all[(t + 1) * S + i] = exp(-rate * delta) * all[t * S + i] + delta * (double)x[E + i] * (double)x[e];
                    sum += (double)x[E + S + i] * all[(t + 1) * S + i];
                }
                y[(int64_t)(b * T + t) * E + e] = sum;
            }
            for (int i = 0; i < S; i++) h[((int64_t)b * S + i) * E + e] = all[T * S + i];
            for (int t = T - 1; dy && t >= 0; t--) {
                const real *x = xbc + (int64_t)(b * T + t) * W;
                precise *dx = dxbc + (int64_t)(b * T + t) * W, decay_gradient = 0;
                double g = (double)dy[(int64_t)(b * T + t) * E + e];
                double delta = (double)step[(b * T + t) * heads + e / w], decay = exp(-rate * delta);
                dskip[e / w] += g * (double)x[e];
                dx[e] += g * (double)skip[e / w];
                for (int i = 0; i < S; i++) {
                    dx[E + S + i] += g * all[(t + 1) * S + i];
                    dh[i] += g * (double)x[E + S + i];
                    dx[e] += dh[i] * delta * (double)x[E + i];
                    dx[E + i] += dh[i] * delta * (double)x[e];
                    dstep[(b * T + t) * heads + e / w] += dh[i] * (double)x[E + i] * (double)x[e];
                    decay_gradient += dh[i] * all[t * S + i];
                    dh[i] *= decay;
                }
                dstep[(b * T + t) * heads + e / w] -= decay_gradient * decay * rate;
                dA[e / w] -= decay_gradient * decay * rate * delta;
            }
        }
}

static void test_scan(void) {
    heading("the Mamba-2 scan in chunks against the recurrence, token by token: T from 1 to 150");
    for (int i = 0; i < N_HEIGHTS; i++) {
        double worst[8] = {0}; // y, last state, y from a state, dx b c, dstep, dA_log, dskip
        for (int c = 0; c < N_LENGTHS; c++) {
            int T = lengths[c], B = random_int(1, 3), heads = random_int(1, 3), E = heads * random_int(1, 20), S = random_int(1, 9), W = E + 2 * S, P = panel_heights[i];
            int first = random_int(0, T - 1), N = B * T, slots = (T + chunk_height(P) - 1) / chunk_height(P);
            real *xbc = noise((int64_t)N * W, 1), *step = noise(N * heads, 1), *A_log = noise(heads, 1), *skip = noise(heads, 1), *dy = noise((int64_t)N * E, 1);
            for (int n = 0; n < N * heads; n++) step[n] = (real)(c % 4 ? exp((double)step[n] - 2) : n % 3 ? exp((double)step[n]) : 0); // some decay at once, some never
            real *y = poison((int64_t)N * E), *states = poison((int64_t)B * slots * S * E), *dxbc = poison((int64_t)N * W), *dstep = poison(N * 3 * heads), *dA = noise(heads, 0), *dskip = noise(heads, 0);
            real *scratch = (real *)lend(scan_scratch(E, S, heads) * (size_t)omp_get_max_threads() * sizeof(real));
            precise *ref = zeros((int64_t)N * E), *h = zeros((int64_t)B * S * E),
                    *ref_x = zeros((int64_t)N * W), *ref_step = zeros(N * heads), *ref_A = zeros(heads),
                    *ref_skip = zeros(heads);
            plain_scan(ref, h, ref_x, ref_step, ref_A, ref_skip, dy, xbc, step, A_log, skip, B, T, E, S, heads);
            scan_forward(y, states, 1, scratch, xbc, step, A_log, skip, B, T, E, S, heads, P);
            worst_of(&worst[0], error_of(y, ref, (int64_t)N * E, 0));
            scan_backward(dxbc, dstep, dA, dskip, scratch, dy, states, xbc, step, A_log, skip, B, T, E, S, heads, P);
            double floor = 0.1 * length_of(dy, (int64_t)N * E);
            worst_of(&worst[3], error_of(dxbc, ref_x, (int64_t)N * W, 0));
            for (int n = 0; n < N * heads; n++) dstep[n] = dstep[n / heads * 3 * heads + n % heads];
            worst_of(&worst[4], error_of(dstep, ref_step, N * heads, floor));
            worst_of(&worst[5], error_of(dA, ref_A, heads, floor));
            worst_of(&worst[6], error_of(dskip, ref_skip, heads, floor));
            real *state = noise((int64_t)S * E, 0); // the first sequence in two calls, the state carried over
            precise *late = zeros((int64_t)T * E), *carried = zeros((int64_t)S * E);
            plain_scan(late, carried, NULL, NULL, NULL, NULL, NULL, xbc, step, A_log, skip, 1, T, E, S, heads);
            if (first) scan_forward(y, state, 0, scratch, xbc, step, A_log, skip, 1, first, E, S, heads, P);
            scan_forward(y + (int64_t)first * E, state, 0, scratch, xbc + (int64_t)first * W, step + first * heads, A_log, skip, 1, T - first, E, S, heads, P);
            worst_of(&worst[1], error_of(state, carried, (int64_t)S * E, 0));
            worst_of(&worst[2], error_of(y, late, (int64_t)T * E, 0));
            release();
        }
        static const char *names[] = {"y", "the state carried to a second call", "y of both calls", "dx, db, dc", "dstep", "dA_log", "dskip"};
        // dA_log sums numbers of both signs over all tokens, far larger than their sum. In float64 the sums over all tokens, dA_log
        // and dskip, come to 11.1 and 1.07 times 1e-14 with AVX2's vectors, to less with AVX-512's
        for (int n = 0; n < 7; n++)
            check_error(worst[n], (n == 5 ? 10 : 1) * bound_of(3e-6, 2e-14), "scan, P %d, %s", panel_heights[i], names[n]);
    }
}

// What the feedback path must do, known without any reference.
static void test_memory(void) {
    heading("the feedback path's memory, in closed form");
    enum { T = 300, D = 4, CHAIN = 150 };
    static const double gains[] = {0.5, 0.999, -0.999, 0.9, -0.3};
    for (int c = 0; c < 5; c++) { // equal logits: an impulse at τ fades as ℓ^(γ-1)
        double worst = 0, g = (double)(real)gains[c];
        for (int i = 0; i < N_HEIGHTS; i++) {
            real *f = poison(T * D), *q = poison(T * D), *k = noise(T * D, 3), *gamma = poison(T), *s = poison(T * D), *stats = poison(2 * T), *scratch = scratch_for(T);
            static const int places[D] = {0, 1, 59, 130};
            for (int t = 0; t < T; t++) {
                gamma[t] = (real)g;
                for (int e = 0; e < D; e++) { q[t * D + e] = 0; f[t * D + e] = t == places[e]; }
            }
            feedback_forward(s, stats, scratch, f, q, k, D, gamma, 1, T, D, 0, panel_heights[i]);
            for (int t = 0; t < T; t++)
                for (int e = 0; e < D; e++) {
                    double tau = places[e], exact = t < tau ? 0 : t == tau ? 1 : g * exp(lgamma(tau + 1) - lgamma(tau + 1 + g) + lgamma(t + g) - lgamma(t + 1.0));
                    worst_of(&worst, fabs((double)s[t * D + e] - exact) / fmax(fabs(exact), 1.0 / (t + 1))); // 1/t: what one weight gives
                }
            release();
        }
        check_error(worst, bound_of(2e-5, 1e-11), "impulse response at gamma %g, T 300, worst number of all panel heights", gains[c]);
    }
    double chain = 0; // α_t,t-1 = 1: a chain, s_t = f_t + γ s_{t-1}
    real *f = poison(CHAIN * CHAIN), *q = poison(CHAIN * CHAIN), *k = poison(CHAIN * CHAIN), *gamma = poison(CHAIN), *s = poison(CHAIN * CHAIN), *stats = poison(2 * CHAIN);
    for (int t = 0; t < CHAIN; t++) {
        gamma[t] = (real)0.875;
        for (int e = 0; e < CHAIN; e++) {
            f[t * CHAIN + e] = t == e;
            q[t * CHAIN + e] = e == t - 1 ? 60 : 0;
            k[t * CHAIN + e] = e == t ? 60 : 0;
        }
    }
    feedback_forward(s, stats, scratch_for(CHAIN), f, q, k, CHAIN, gamma, 1, CHAIN, CHAIN, 0, 0);
    for (int t = 0; t < CHAIN; t++)
        for (int e = 0; e < CHAIN; e++) worst_of(&chain, fabs((double)s[t * CHAIN + e] - (t < e ? 0 : pow(0.875, t - e))));
    check_error(chain, bound_of(1e-6, 1e-14), "peaked weights make a chain: s_{t+l} = gamma^l, absolute");
    memset(gamma, 0, sizeof(real) * CHAIN);
    feedback_forward(s, stats, scratch_for(CHAIN), f, q, k, CHAIN, gamma, 1, CHAIN, CHAIN, 0, 0);
    check(!memcmp(s, f, sizeof(real) * CHAIN * CHAIN), "gamma 0: s is f, bit for bit");
    release();
    double share = 0;
    for (int c = 0; c < 30; c++) { // |s| ≤ max|f| / (1 - max|γ|)
        real *fr = noise(T * D, 1), *qr = noise(T * D, c), *kr = noise(T * D, 1), *gr = noise(T, 2), *sr = poison(T * D);
        double most_f = 0, most_gamma = 0, most_s = 0, level = random_uniform(&chance);
        for (int t = 0; t < T; t++) {
            gr[t] = (real)(c % 3 ? 0.999 * level * tanh((double)gr[t]) : 0.99);
            if (c % 3 == 0) for (int e = 0; e < D; e++) fr[t * D + e] = 1;
            worst_of(&most_gamma, fabs((double)gr[t]));
        }
        feedback_forward(sr, poison(2 * T), scratch_for(T), fr, qr, kr, D, gr, 1, T, D, 0, 0);
        for (int t = 0; t < T * D; t++) {
            worst_of(&most_f, fabs((double)fr[t]));
            worst_of(&most_s, fabs((double)sr[t]));
        }
        worst_of(&share, most_s * (1 - most_gamma) / most_f);
        release();
    }
    check_error(share, 1 + bound_of(1e-4, 1e-12), "max|s| as a share of max|f|/(1 - max|gamma|), 30 systems: worst");
}

// ----------------------------------------------------------------------------
// gradients against central differences (float64)

// The derivative of f by *x from four values, exact up to terms of h^4: far less than the rounding here.
static double difference(double (*f)(void *), void *state, real *x) {
    const double h = 2e-4;
    double start = (double)*x, values[4];
    for (int i = 0; i < 4; i++) {
        *x = (real)(start + (i < 2 ? h : 2 * h) * (i % 2 ? -1 : 1));
        values[i] = f(state);
    }
    *x = (real)start;
    return (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * h);
}

// A layer by itself. The check is of Σ out·dout, dout random, by every number of every input. What backward adds to starts
// from random numbers, what it writes from NaN.
enum { LB = 2, LT = 11, LN = LB * LT, LD = 8, LH = 4, LG = 2, LW = 2, LE = (LH + 2 * LG) * LW, LV = 5, LS = 3, LM = LD + 2 * LS };
typedef struct {
    int P, *ids;
    real *out, *dout, *in[4], *grad[4], *mean, *rstd, *scratch, *cosine, *sine, *states, *step;
} LayerCase;
typedef struct {
    const char *name;
    void (*forward)(LayerCase *c), (*backward)(LayerCase *c);
    int n_out, n_inputs, sizes[4], added[4]; // added: backward adds to this gradient
} Layer;

static void embedding_f(LayerCase *c) { embedding_forward(c->out, c->ids, c->in[0], LB, LT, LD); }
static void embedding_b(LayerCase *c) { embedding_backward(c->grad[0], c->dout, c->ids, LB, LT, LD); }
static void layernorm_f(LayerCase *c) { layernorm_forward(c->out, c->mean, c->rstd, c->in[0], c->in[1], c->in[2], LN, LD); }
static void layernorm_b(LayerCase *c) { layernorm_backward(c->grad[0], c->grad[1], c->grad[2], c->dout, c->in[0], c->mean, c->rstd, c->in[1], LN, LD); }
static void linear_f(LayerCase *c) { linear_forward(c->out, LV, c->in[0], c->in[1], c->in[2], LN, LD, LV); }
static void linear_b(LayerCase *c) { linear_backward(c->grad[0], c->grad[1], c->grad[2], c->dout, LV, c->in[0], c->in[1], LN, LD, LV); }
static void gelu_f(LayerCase *c) { gelu_forward(c->out, c->in[0], LD, LN, LD); }
static void gelu_b(LayerCase *c) { gelu_backward(c->grad[0], c->dout, c->in[0], LD, LN, LD); }
static void rope_f(LayerCase *c) {
    memcpy(c->out, c->in[0], sizeof(real) * LN * LD);
    rope_forward(c->out, LD, c->cosine, c->sine, LN, LT, LD / 4, 4, 0, 1);
}
static void rope_b(LayerCase *c) {
    memcpy(c->grad[0], c->dout, sizeof(real) * LN * LD);
    rope_backward(c->grad[0], LD, c->cosine, c->sine, LN, LT, LD / 4, 4);
}
static void attention_f(LayerCase *c) {
    const real *q = c->in[0], *k = q + LH * LW, *v = k + LG * LW;
    attention_forward(c->out, c->mean, c->scratch, q, k, v, LE, LB, LT, LH, LG, LW, 0, c->P);
}
static void attention_b(LayerCase *c) {
    const real *q = c->in[0], *k = q + LH * LW, *v = k + LG * LW;
    real *dq = c->grad[0], *dk = dq + LH * LW, *dv = dk + LG * LW;
    attention_backward(dq, dk, dv, c->scratch, c->dout, c->mean, q, k, v, LE, LB, LT, LH, LG, LW, c->P);
}
static void gain_f(LayerCase *c) { gain_forward(c->out, c->in[0], c->in[1], c->in[2], (real)0.9, LN, LD); }
static void gain_b(LayerCase *c) {
    memcpy(c->scratch, c->dout, sizeof(real) * LN);
    gain_backward(c->grad[0], c->grad[1], c->grad[2], c->scratch, c->out, c->in[0], c->in[1], (real)0.9, LN, LD);
}
static void feedback_f(LayerCase *c) {
    feedback_forward(c->out, c->mean, c->scratch, c->in[0], c->in[1], c->in[1] + LD, 2 * LD, c->in[2], LB, LT, LD, 0, c->P);
}
static void feedback_b(LayerCase *c) {
    feedback_backward(c->grad[0], c->grad[1], c->grad[1] + LD, c->grad[2], c->scratch, c->dout, c->out, c->mean, c->in[1], c->in[1] + LD, 2 * LD,
                      c->in[2], LB, LT, LD, c->P);
}
static void gate_f(LayerCase *c) { gate_forward(c->out, c->in[0], c->in[1], LD, LN, LD); }
static void gate_b(LayerCase *c) { gate_backward(c->grad[0], c->grad[1], c->dout, c->in[0], c->in[1], LD, LN, LD); }
static void dropout_f(LayerCase *c) {
    Dropout drop = {0.3, 5, 7};
    memcpy(c->out, c->in[0], sizeof(real) * LN * LD);
    dropout(c->out, LN * LD, drop, 3);
}
static void dropout_b(LayerCase *c) {
    Dropout drop = {0.3, 5, 7};
    memcpy(c->grad[0], c->dout, sizeof(real) * LN * LD);
    dropout(c->grad[0], LN * LD, drop, 3);
}
static void crossentropy_f(LayerCase *c) { crossentropy_forward(c->out, c->mean, c->in[0], c->ids, LN, LV); }
static void crossentropy_b(LayerCase *c) { // takes one dloss for all rows
    for (int n = 1; n < LN; n++) c->dout[n] = c->dout[0];
    crossentropy_backward(c->grad[0], c->in[0], c->mean, c->ids, c->dout[0], LN, LV);
}

static void conv_f(LayerCase *c) { conv_forward(c->out, c->in[0] + 1, LM + 1, NULL, c->in[1], c->in[2], LB, LT, LM, 0); }
static void conv_b(LayerCase *c) {
    real *dout = copy_of(c->dout, LN * LM), keep_first[LN];
    for (int n = 0; n < LN; n++) keep_first[n] = 0; // the column that the convolution does not read
    conv_backward(c->grad[0] + 1, c->grad[1], c->grad[2], dout, c->in[0] + 1, LM + 1, c->in[1], c->in[2], LB, LT, LM);
    for (int n = 0; n < LN; n++) c->grad[0][n * (LM + 1)] = keep_first[n];
}
static void step_f(LayerCase *c) { step_forward(c->out, c->in[0], LD, c->in[1], LN, LD); }
static void step_b(LayerCase *c) { step_backward(c->grad[0], c->grad[1], c->dout, LD, c->in[0], LD, c->in[1], LN, LD); }
static void scan_f(LayerCase *c) { // two heads; |in[1]| is the step
    for (int i = 0; i < LN * 2; i++) c->step[i] = c->in[1][i] * c->in[1][i];
    scan_forward(c->out, c->states, 1, c->scratch, c->in[0], c->step, c->in[2], c->in[3], LB, LT, LD, LS, 2, c->P);
}
static void scan_b(LayerCase *c) {
    real *dstep = poison(LN * 6);
    scan_backward(c->grad[0], dstep, c->grad[2], c->grad[3], c->scratch, c->dout, c->states, c->in[0], c->step, c->in[2], c->in[3], LB, LT, LD, LS, 2, c->P);
    for (int i = 0; i < LN * 2; i++) c->grad[1][i] = 2 * c->in[1][i] * dstep[i / 2 * 6 + i % 2];
}
static void norm_f(LayerCase *c) { gated_rmsnorm_forward(c->out, c->rstd, c->in[0], c->in[1], LD, c->in[2], LN, LD); }
static void norm_b(LayerCase *c) { gated_rmsnorm_backward(c->grad[0], c->grad[1], c->grad[2], c->dout, c->in[0], c->in[1], LD, c->rstd, c->in[2], LN, LD); }

typedef struct { const Layer *layer; LayerCase c; } LayerSum;
static double layer_sum(void *state) {
    LayerSum *sum_of = (LayerSum *)state;
    precise sum = 0;
    sum_of->layer->forward(&sum_of->c);
    for (int i = 0; i < sum_of->layer->n_out; i++) sum += (double)sum_of->c.out[i] * (double)sum_of->c.dout[i];
    return sum;
}

static void check_layer(const Layer *layer, int P) {
    real *before[4], *start[4];
    LayerSum state;
    LayerCase *c = &state.c;
    state.layer = layer;
    c->P = P;
    c->ids = random_ids(LN, LV, layer->forward == crossentropy_f);
    c->out = poison(layer->n_out);
    c->dout = noise(layer->n_out, 1);
    c->mean = poison(2 * LN * LH);
    c->rstd = poison(LN);
    c->scratch = scratch_for(LT);
    c->states = poison(LB * LT * LS * LD);
    c->step = poison(LN * 2);
    c->cosine = poison(LT * 2);
    c->sine = poison(LT * 2);
    rope_table(c->cosine, c->sine, LT, 4);
    for (int i = 0; i < layer->n_inputs; i++) {
        int n = layer->sizes[i];
        before[i] = copy_of(c->in[i] = noise(n, 0.8), n);
        start[i] = copy_of(c->grad[i] = layer->added[i] ? noise(n, 1) : poison(n), n);
    }
    layer->forward(c);
    layer->backward(c);
    double worst = 0;
    for (int i = 0; i < layer->n_inputs; i++) {
        int n = layer->sizes[i];
        precise *ref = zeros(n);
        if (memcmp(c->in[i], before[i], sizeof(real) * (size_t)n)) worst = INFINITY; // inputs are const
        for (int e = 0; e < n; e++) {
            ref[e] = difference(layer_sum, &state, &c->in[i][e]);
            if (layer->added[i]) c->grad[i][e] -= start[i][e];
        }
        worst_of(&worst, error_of(c->grad[i], ref, n, 0));
    }
    check_error(worst, 1e-8, "%s%s: gradients of all its inputs", layer->name, P ? ", P 3" : "");
    release();
}

static void test_layers(void) {
    heading("every layer's gradients against central differences");
    static const Layer layers[] = {
        {"embedding", embedding_f, embedding_b, LN * LD, 1, {LV * LD}, {1}},
        {"layernorm", layernorm_f, layernorm_b, LN * LD, 3, {LN * LD, LD, LD}, {1, 1, 1}},
        {"linear", linear_f, linear_b, LN * LV, 3, {LN * LD, LV * LD, LV}, {0, 1, 1}},
        {"gelu", gelu_f, gelu_b, LN * LD, 1, {LN * LD}, {0}},
        {"rope", rope_f, rope_b, LN * LD, 1, {LN * LD}, {0}},
        {"attention", attention_f, attention_b, LN * LH * LW, 1, {LN * LE}, {0}},
        {"gain", gain_f, gain_b, LN, 3, {LN * LD, LD, 1}, {1, 1, 1}},
        {"feedback", feedback_f, feedback_b, LN * LD, 3, {LN * LD, LN * 2 * LD, LN}, {0}},
        {"gate", gate_f, gate_b, LN * LD, 2, {LN * LD, LN * LD}, {0}},
        {"dropout", dropout_f, dropout_b, LN * LD, 1, {LN * LD}, {0}},
        {"convolution", conv_f, conv_b, LN * LM, 3, {LN * (LM + 1), LM * TAPS, LM}, {0, 1, 1}},
        {"step", step_f, step_b, LN * LD, 2, {LN * LD, LD}, {0, 1}},
        {"scan", scan_f, scan_b, LN * LD, 4, {LN * LM, LN * 2, 2, 2}, {0, 0, 1, 1}},
        {"gated norm", norm_f, norm_b, LN * LD, 3, {LN * LD, LN * LD, LD}, {0, 0, 1}},
        {"crossentropy", crossentropy_f, crossentropy_b, LN, 1, {LN * LV}, {0}}};
    for (size_t i = 0; i < sizeof(layers) / sizeof(layers[0]); i++) {
        check_layer(&layers[i], 0);
        if (layers[i].forward == attention_f || layers[i].forward == feedback_f || layers[i].forward == scan_f) check_layer(&layers[i], 3);
    }
}

typedef struct { Model *model; const int *inputs, *targets; int B, T; Dropout drop; double dloss; } Loss;
static double loss_of(void *state) {
    Loss *l = (Loss *)state;
    model_forward(l->model, l->inputs, l->targets, l->B, l->T, l->drop);
    return l->dloss * model_loss(l->model);
}

// Weights as training leaves them: away from the zeros and ones of the start, and large enough for every path to matter.
static void shake_weights(Model *m, double size) {
    initialise(m->params, &m->table, 7);
    for (int64_t i = 0; i < m->table.count; i++) m->params[i] += (real)(size * random_normal(&chance));
}

static void check_model(const char *name, Config c, int B, int T, int P, double probability) {
    enum { ENTRIES = 24 };
    Model *m = create(&c, B + 1, T + 2, TRAIN); // a batch smaller than the model allows
    int n_tensors = m->table.n, counted = 0, worst_at = 0;
    int *inputs = random_ids(B * T, c.vocab_size, 0), *targets = random_ids(B * T, c.vocab_size, 1);
    targets[0] = 1;
    for (int i = 0; i < B * T; i++) counted += targets[i] >= 0;
    Loss loss = {m, inputs, targets, B, T, {probability, 3, 11}, 1.0 / counted};
    m->P = P;
    shake_weights(m, 0.15);
    real *start = noise(m->table.count, 0.1), *grads = copy_of(start, m->table.count);
    memcpy(m->grads, start, sizeof(real) * (size_t)m->table.count); // backward adds to what is there
    loss_of(&loss);
    model_backward(m, loss.dloss);
    for (int64_t i = 0; i < m->table.count; i++) grads[i] = m->grads[i] - start[i];
    precise mean = 0, worst = 0, *off = zeros(n_tensors), *size = zeros(n_tensors);
    for (int r = 0; r < n_tensors; r++) {
        const Tensor *t = &m->table.rows[r];
        int all = t->count <= ENTRIES, n = all ? (int)t->count : ENTRIES;
        for (int i = 0; i < n; i++) {
            int64_t at = t->offset + (all ? i : random_int(0, (int)t->count - 1));
            double ref = difference(loss_of, &loss, m->params + at), error = (double)grads[at] - ref;
            off[r] += error * error;
            size[r] += ref * ref;
        }
        mean += sqrt(size[r]) / n_tensors;
    }
    for (int r = 0; r < n_tensors; r++) {
        double error = sqrt(off[r]) / fmax(sqrt(size[r]), 1e-3 * mean);
        if (!(error <= worst)) { worst = error; worst_at = r; }
    }
    check_error(worst, 1e-6, "%s, dropout %g: worst of %d tensors (%s)", name, probability, n_tensors, m->table.rows[worst_at].name);
    model_free(m);
    release();
}

static void test_model_gradients(void) {
    heading("whole models' gradients against central differences, some targets ignored");
    for (int i = 0; i < 2; i++) {
        double p = i ? 0.3 : 0;
        check_model("sessa, H 4, G 2, P 3", config_with(SESSA, 11, 16, 2, 4, 2, 9), 2, 7, 3, p);
        check_model("sessa, one head", config_with(SESSA, 9, 6, 2, 1, 1, 30), 1, 28, 0, p);
        check_model("attention, H 4, G 1, P 3", config_with(ATTENTION, 11, 16, 2, 4, 1, 9), 2, 7, 3, p);
        check_model("attention, one head", config_with(ATTENTION, 7, 6, 2, 1, 1, 9), 2, 5, 0, p);
        check_model("mamba2, 4 heads, two chunks", config_with(MAMBA2, 11, 8, 2, 4, 2, 40), 2, 38, 0, p);
    }
    uint64_t before = chance;
    for (int mixer = 0; mixer < N_MIXERS; mixer++) {
        char name[64];
        snprintf(name, sizeof(name), "%s, T 1, B 1, D 2, V 2", mixers[mixer].name);
        check_model(name, config_with(mixer, 2, 2, 1, 1, 1, 1), 1, 1, 0, 0);
        snprintf(name, sizeof(name), "%s, V 65536", mixers[mixer].name);
        check_model(name, config_with(mixer, 65536, 8, 1, 1, 1, 3), 1, 3, 0, 0);
    }
    chance = before;
}

// ----------------------------------------------------------------------------
// AdamW, dropout's mask, the schedule, initial values, sampling

static void test_training_parts(void) {
    heading("optimiser, dropout, schedule, initial values, sampling");
    enum { N = 1000, STEPS = 12 };
    real *w = noise(N, 1), *g = poison(N), *m = noise(N, 0), *v = noise(N, 0);
    precise *w_ref = zeros(N), *m_ref = zeros(N), *v_ref = zeros(N);
    AdamW o = {0.01, 0.9, 0.97, 1e-6, 0.3};
    int cleared = 1;
    for (int i = 0; i < N; i++) w_ref[i] = (double)w[i];
    for (int step = 1; step <= STEPS; step++) {
        double scale = 1.0 / step;
        for (int i = 0; i < N; i++) {
            g[i] = (real)random_normal(&chance);
            double grad = scale * (double)g[i];
            m_ref[i] = o.beta1 * m_ref[i] + (1 - o.beta1) * grad;
            v_ref[i] = o.beta2 * v_ref[i] + (1 - o.beta2) * grad * grad;
            w_ref[i] -= o.lr * o.weight_decay * w_ref[i];
            w_ref[i] -= o.lr * m_ref[i] / (1 - pow(o.beta1, step)) / (sqrt(v_ref[i] / (1 - pow(o.beta2, step))) + o.eps);
        }
        adamw(w, g, m, v, N, o, scale, step);
        for (int i = 0; i < N; i++) cleared &= g[i] == 0;
    }
    check_error(error_of(w, w_ref, N, 0), bound_of(1e-6, 1e-14), "adamw, 12 steps: weights");
    check_error(fmax(error_of(m, m_ref, N, 0), error_of(v, v_ref, N, 0)), bound_of(1e-6, 1e-14), "adamw, 12 steps: moments");
    check(cleared, "adamw clears the gradient");
    check_error(fabs(norm(w, N) / length_of(w, N) - 1), 1e-13, "norm against a plain sum");

    enum { MASKED = 200000 };
    Dropout drop = {0.3, 42, 9}, later = {0.3, 42, 10};
    real *x = noise(MASKED, 0);
    for (int i = 0; i < MASKED; i++) x[i] = 1;
    real *again = copy_of(x, MASKED), *place = copy_of(x, MASKED), *step = copy_of(x, MASKED);
    dropout(x, MASKED, drop, 2);
    dropout(again, MASKED, drop, 2);
    dropout(place, MASKED, drop, 3);
    dropout(step, MASKED, later, 2);
    int zero = 0, both[2] = {0, 0}, scaled = 1;
    for (int i = 0; i < MASKED; i++) {
        zero += x[i] == 0;
        both[0] += x[i] == 0 && place[i] == 0;
        both[1] += x[i] == 0 && step[i] == 0;
        scaled &= x[i] == 0 || x[i] == (real)(1 / (1 - 0.3));
    }
    check_error(fabs(zero / (double)MASKED - 0.3), 0.0042, "dropout 0.3: rate of zeros off (4 standard deviations)");
    check_error(fmax(fabs(both[0] / (double)MASKED - 0.09), fabs(both[1] / (double)MASKED - 0.09)), 0.0026, "dropout: masks of two places and two steps are independent");
    check(scaled && !memcmp(x, again, sizeof(real) * MASKED), "dropout: scale 1/(1-p), the same mask when asked again");

    Options options;
    memset(&options, 0, sizeof(options));
    options.lr = 2;
    options.min_lr = 0.5;
    options.warmup = 4;
    options.decay_steps = 12;
    static const double rates[][2] = {{0, 0.5}, {1, 1}, {3, 2}, {4, 2}, {6, 0.5 + 1.5 * 0.85355339059327376}, {8, 1.25}, {12, 0.5}, {1000, 0.5}};
    double off = 0;
    for (int i = 0; i < 8; i++) worst_of(&off, fabs(learning_rate(&options, (int64_t)rates[i][0]) - rates[i][1]));
    check_error(off, 1e-14, "learning rate: warm-up, cosine, end, past the end");

    Config c = config_with(SESSA, 50, 64, 1, 4, 4, 8);
    Model *model = create(&c, 1, 8, EVALUATE);
    initialise(model->params, &model->table, 1);
    precise largest = 0, square = 0;
    const Tensor *t = find_tensor(&model->table, "layers.0.mixer.proj_fb.weight"), *e = find_tensor(&model->table, "wte.weight"), *b = find_tensor(&model->table, "layers.0.mixer.gamma_bias");
    for (int64_t i = 0; i < t->count; i++) worst_of(&largest, fabs((double)model->params[t->offset + i]));
    for (int64_t i = 0; i < e->count; i++) square += (double)model->params[e->offset + i] * (double)model->params[e->offset + i];
    check(largest <= 0.125 && largest > 0.1245 && fabs(sqrt(square / (double)e->count) / 0.02 - 1) < 0.05 && model->params[b->offset] == 1,
          "initial values: uniform within 1/sqrt(D), embedding 0.02, gamma_bias 1");
    model_free(model);

    enum { CHOICES = 6, DRAWS = 40000 };
    real *logits = noise(CHOICES, 1);
    Candidate *candidates = (Candidate *)lend(sizeof(Candidate) * CHOICES);
    precise total = 0, worst = 0, seen[CHOICES] = {0}, likely = 0;
    int best = 0, only_likely = 1;
    uint64_t random = 5;
    for (int i = 0; i < CHOICES; i++) { total += exp((double)logits[i] / 0.7); if (logits[i] > logits[best]) best = i; }
    for (int i = 0; i < DRAWS; i++) seen[sample_token(logits, candidates, CHOICES, 0.7, 0, 1, &random)] += 1.0 / DRAWS;
    for (int i = 0; i < CHOICES; i++) {
        double p = exp((double)logits[i] / 0.7) / total;
        worst_of(&worst, fabs(seen[i] - p) / sqrt(p * (1 - p) / DRAWS));
    }
    check_error(worst, 4, "sample_token at temperature 0.7: worst frequency, in standard deviations");
    for (int i = 0; i < DRAWS; i++) { // the two likeliest only, then as many as reach 60 %
        int id = sample_token(logits, candidates, CHOICES, 1, 2, 1, &random), before = 0;
        for (int j = 0; j < CHOICES; j++) before += logits[j] > logits[id];
        only_likely &= before < 2;
        id = sample_token(logits, candidates, CHOICES, 0.7, 0, 0.6, &random);
        likely = 0;
        for (int j = 0; j < CHOICES; j++) likely += logits[j] > logits[id] ? exp((double)logits[j] / 0.7) / total : 0;
        only_likely &= likely < 0.6;
    }
    check(only_likely && sample_token(logits, candidates, CHOICES, 0, 0, 1, &random) == best, "sample_token: top-k, top-p and temperature 0 cut where they should");
    release();
}

// ----------------------------------------------------------------------------
// generation: prefill and single steps against one full forward pass

static void test_extend(void) {
    heading("prefill and single steps against one forward pass");
    enum { T = 150, V = 13 };
    static const int pieces[] = {20, 1, 1, 3, 1, 60, 1, 9, 1, 1, 30, 1, 20, 1}; // their sum is T
    Config configs[] = {config_with(SESSA, V, 16, 2, 4, 2, T), config_with(SESSA, V, 10, 2, 1, 1, T), config_with(ATTENTION, V, 16, 2, 4, 4, T),
                        config_with(ATTENTION, V, 8, 1, 1, 1, T), config_with(MAMBA2, V, 16, 2, 4, 4, T)};
    static const char *names[] = {"sessa, H 4, G 2", "sessa, one head", "attention, H 4", "attention, one head", "mamba2"};
    for (int i = 0; i < 5; i++) {
        char error[ERROR_SIZE];
        Model *whole = create(&configs[i], 1, T, EVALUATE), *stepwise = TESTED_BACKEND.create(&configs[i], 1, T, GENERATE, error);
        if (!stepwise) { check(0, "%s", error); return; }
        int *ids = random_ids(T, V, 0);
        Dropout off = {0, 0, 0};
        shake_weights(whole, 0.2);
        memcpy(TESTED_BACKEND.read(stepwise, PARAMS), whole->params, sizeof(real) * (size_t)whole->table.count);
        TESTED_BACKEND.write(stepwise, PARAMS);
        model_forward(whole, ids, ids, 1, T, off);
        precise worst = 0, *ref = zeros(V);
        real *logits = poison(V), *first = poison(V);
        for (int round = 0; round < 2; round++) { // the second from the start again
            for (int p = 0, at = 0; p < 14; p++) {
                TESTED_BACKEND.extend(stepwise, ids + at, pieces[p], at, logits);
                at += pieces[p];
                for (int n = 0; n < V; n++) ref[n] = (double)whole->acts.logits[(at - 1) * V + n];
                worst_of(&worst, error_of(logits, ref, V, 0));
            }
            if (!round) memcpy(first, logits, sizeof(real) * V);
        }
        check_error(worst, bound_of(1e-5, 1e-13), "%s: logits, pieces of 1 to 60 tokens", names[i]);
        check(!memcmp(first, logits, sizeof(real) * V), "%s: the same bits when it starts again", names[i]);
        model_free(whole);
        TESTED_BACKEND.destroy(stepwise);
        release();
    }
}

// ----------------------------------------------------------------------------
// dumps of the PyTorch reference

// One number of the metadata; clears *ok if it is missing or out of range.
static double meta_number(const Safetensors *file, const char *key, double low, double high, int *ok) {
    const char *text = safetensors_meta(file, key);
    double value = low;
    if (!text || parse_number(text, &value) || value < low || value > high) {
        check(0, "metadata %s is %s", key, text ? text : "missing");
        *ok = 0;
        return low;
    }
    return value;
}

static double number_of(const FileTensor *t, int64_t i) {
    float value;
    memcpy(&value, t->data + i * 4, 4);
    return (double)value;
}

// 1 if t is there and has this dtype and shape.
static int same_shape(const FileTensor *t, const char *dtype, int n_dims, const int64_t *shape) {
    if (!t || strcmp(t->dtype, dtype) || t->n_dims != n_dims) return 0;
    for (int i = 0; i < n_dims; i++)
        if (t->shape[i] != shape[i]) return 0;
    return 1;
}

// Puts the file's weights into the model. Returns NULL, or the name of one that is missing or has a wrong dtype or shape.
static const char *take_weights(Model *m, const Safetensors *file) {
    for (int r = 0; r < m->table.n; r++) {
        const Tensor *row = &m->table.rows[r];
        const FileTensor *t = safetensors_find(file, row->name);
        if (!same_shape(t, "F32", row->n_dims, row->shape)) return row->name;
        for (int64_t i = 0; i < row->count; i++) m->params[row->offset + i] = (real)number_of(t, i);
    }
    return NULL;
}

// Inputs (low 0) or targets (low -1) of a dump, NULL if they are missing or a number is out of range.
static int *take_ids(const Safetensors *file, const char *name, int B, int T, int low, int V) {
    const FileTensor *t = safetensors_find(file, name);
    int64_t shape[2] = {B, T};
    if (!same_shape(t, "I32", 2, shape)) return NULL;
    int *ids = (int *)lend(t->size);
    memcpy(ids, t->data, t->size);
    for (int64_t i = 0; i < t->count; i++)
        if (ids[i] < low || ids[i] >= V) return NULL;
    return ids;
}

static double tensor_norm(const FileTensor *t, int64_t from, int64_t to) {
    precise sum = 0;
    for (int64_t i = from; i < to; i++) sum += number_of(t, i) * number_of(t, i);
    return sqrt(sum);
}

// ‖x - t‖ over the elements from..to of t; x has rows of `width` numbers, `stride` apart.
static double tensor_distance(const FileTensor *t, const real *x, int64_t width, int64_t stride, int64_t from, int64_t to) {
    precise sum = 0;
    for (int64_t i = from; i < to; i++) {
        double error = (double)x[i / width * stride + i % width] - number_of(t, i);
        sum += error * error;
    }
    return sqrt(sum);
}

// A loss and the update after it, n times, on the same batch, as the dump's optimiser did.
static void check_losses(Model *m, const Safetensors *file, const FileTensor *losses, const int *inputs, const int *targets, int B, int T, double dloss) {
    int ok = losses->n_dims == 1 && !strcmp(losses->dtype, "F32");
    if (!check(ok, "losses is F32 and has one dimension")) return;
    AdamW o = {meta_number(file, "learning_rate", 0, 1e3, &ok), meta_number(file, "beta1", 0, 1, &ok), meta_number(file, "beta2", 0, 1, &ok),
               meta_number(file, "eps", 0, 1, &ok), meta_number(file, "weight_decay", 0, 1e3, &ok)};
    double clip = meta_number(file, "grad_clip", 0, 1e30, &ok), worst = 0, worst_length = 0;
    Dropout off = {0, 0, 0};
    if (!ok) return;
    take_weights(m, file);
    memset(m->grads, 0, sizeof(real) * (size_t)m->table.count);
    for (int64_t i = 0; i < losses->count; i++) {
        tested_forward(m, inputs, targets, B, T, off);
        double loss = dloss * tested_loss(m), ref = number_of(losses, i);
        worst_of(&worst, fabs(loss - ref) / fmax(fabs(ref), 1e-30));
        tested_backward(m, dloss);
        double length = norm(m->grads, m->table.count);
        worst_of(&worst_length, fabs(tested_update(m, o, clip, i + 1) / length - 1));
    }
    check_error(worst_length, 1e-6, "the gradients' norm that an update returns");
    check_error(worst, dump_bound > 0 ? dump_bound : bound_of(1e-5, 2e-7), "losses of %d AdamW steps: worst", (int)losses->count);
}

// Every tensor of the dump, at four panel heights. In float64 all that is left of the error is the dump's own rounding to
// float32: each number is off by at most 2^-24 of itself, so a tensor by at most 6e-8 of its norm.
static void check_tensors(Model *m, const Safetensors *file, const int *inputs, const int *targets, int B, int T, double dloss) {
    double bound = dump_bound > 0 ? dump_bound : bound_of(1e-5, 2e-7);
    precise means[2] = {0, 0}, *distance = zeros((int64_t)file->n_tensors * 2 * N_HEIGHTS);
    int counts[2] = {0, 0}, checked = 0;
    const Tensor **rows = (const Tensor **)lend(sizeof(Tensor *) * (size_t)(file->n_tensors + 1));
    for (int i = 0; i < file->n_tensors; i++) { // first: what is there, and is it what we have
        const FileTensor *t = &file->tensors[i];
        int act = !strncmp(t->name, "act.", 4), grad = !strncmp(t->name, "grad.", 5);
        if (!act && !grad) {
            if (!find_tensor(&m->table, t->name) && strcmp(t->name, "inputs") && strcmp(t->name, "targets") && strcmp(t->name, "losses"))
                check(0, "%.60s: no tensor that a dump may hold", t->name);
            continue;
        }
        const Tensor *row = act ? find_tensor(&m->acts_table, t->name + 4) : find_tensor(&m->table, t->name + 5);
        if (!row) { check(0, "%.60s: the model has no such tensor", t->name); continue; }
        if (!same_shape(t, "F32", row->n_dims, row->shape)) { check(0, "%.60s: not F32, or of another shape than the model's", t->name); continue; }
        rows[i] = row;
        means[grad] += tensor_norm(t, 0, t->count);
        counts[grad]++;
    }
    for (int p = 0; p < N_HEIGHTS; p++) {
        Dropout off = {0, 0, 0};
        m->P = panel_heights[p];
        memset(m->grads, 0, sizeof(real) * (size_t)m->table.count);
        tested_forward(m, inputs, targets, B, T, off);
        for (int pass = 0; pass < 2; pass++) { // activations before the backward pass, which overwrites the logits
            if (pass) tested_backward(m, dloss);
            for (int i = 0; i < file->n_tensors; i++) {
                const FileTensor *t = &file->tensors[i];
                const Tensor *row = rows[i];
                if (!row || (t->name[0] == 'g') != pass) continue;
                int64_t half = pass && strstr(t->name, "proj_fb.bias") ? t->count / 2 : t->count, width = row->n_dims ? row->shape[row->n_dims - 1] : 1;
                const real *x = (pass ? m->grads : m->acts_block) + row->offset;
                precise *place = distance + ((size_t)i * N_HEIGHTS + p) * 2;
                place[0] = tensor_distance(t, x, width, row->stride, 0, half);
                place[1] = tensor_distance(t, x, width, row->stride, half, t->count);
            }
        }
    }
    m->P = 0;
    printf("  %-50s %9s %9s %9s %9s  (bound %.1e)\n", "tensor, relative error at panel height", "auto", "1", "3", "8", bound);
    for (int i = 0; i < file->n_tensors; i++) {
        const FileTensor *t = &file->tensors[i];
        if (!rows[i]) continue;
        int grad = t->name[0] == 'g', halves = grad && strstr(t->name, "proj_fb.bias") ? 2 : 1;
        int64_t half = t->count / halves;
        // The keys' bias shifts all logits of a row alike: its gradient is 0 but for rounding, measured by the other half.
        // D's, a number a head, is a sum over all tokens and channels that nearly cancels once weights are trained (1e-4 to 5e-3 of the
        // mean of all norms, in four runs): in float32 what its terms lost may be more than 1e-5 of what is left.
        double least = grad && sizeof(real) == sizeof(float) && strstr(t->name, "mixer.D") ? 1e-2 : 1e-3;
        double size = fmax(tensor_norm(t, 0, half), least * means[grad] / counts[grad]);
        for (int part = 0; part < halves; part++) {
            double worst = 0, errors[N_HEIGHTS];
            for (int p = 0; p < N_HEIGHTS; p++) worst_of(&worst, errors[p] = distance[((size_t)i * N_HEIGHTS + p) * 2 + part] / fmax(size, 1e-30));
            printf("  %-40s %9s %9.2e %9.2e %9.2e %9.2e  %s\n", t->name, halves == 1 ? "" : part ? "k' half" : "q' half", errors[0], errors[1], errors[2],
                   errors[3], worst <= bound ? "ok" : "FAIL");
            count(worst <= bound);
            checked++;
        }
    }
    if (!checked) check(0, "the dump holds no activation and no gradient to check");
}

static void check_dump(const char *path) {
    char error[ERROR_SIZE];
    Safetensors file;
    int ok = 1;
    heading(path);
    if (safetensors_read(&file, path, error)) { check(0, "%s", error); return; }
    const char *mixer = safetensors_meta(&file, "mixer");
    Config c = config_with(0, (int)meta_number(&file, "vocab_size", 1, 1 << 20, &ok), (int)meta_number(&file, "d_model", 2, 1 << 14, &ok),
                           (int)meta_number(&file, "n_layers", 1, 1000, &ok), (int)meta_number(&file, "n_heads", 1, 1 << 14, &ok),
                           (int)meta_number(&file, "n_kv_heads", 1, 1 << 14, &ok), (int)meta_number(&file, "max_seq_len", 1, 1 << 24, &ok));
    int B = (int)meta_number(&file, "batch_size", 1, 1 << 14, &ok), T = (int)meta_number(&file, "seq_len", 1, 1 << 16, &ok);
    c.gamma_max = meta_number(&file, "gamma_max", 0, 1, &ok);
    if (!mixer || (c.mixer = find_mixer(mixer)) < 0) ok = check(0, "metadata mixer is %.40s", mixer ? mixer : "missing");
    if (c.mixer == MAMBA2) {
        c.head_dim = (int)meta_number(&file, "mamba_head_dim", 1, 1 << 15, &ok);
        c.state_dim = (int)meta_number(&file, "mamba_state_dim", 1, 1 << 12, &ok);
        if (ok && 2 * c.d_model % c.head_dim) ok = check(0, "mamba_head_dim does not divide twice d_model");
    }
    if (ok && (c.d_model % c.n_heads || c.d_model / c.n_heads % 2 || c.n_heads % c.n_kv_heads)) ok = check(0, "heads do not divide the width");
    Model *m = NULL;
    if (ok && !(m = tested_create(&c, B, T, KEEP_ALL, error))) ok = check(0, "%s", error);
    if (m) {
        const char *missing = take_weights(m, &file);
        int *inputs = take_ids(&file, "inputs", B, T, 0, c.vocab_size), *targets = take_ids(&file, "targets", B, T, -1, c.vocab_size), counted = 0;
        if (missing) check(0, "%s is missing, or is not F32 or of another shape", missing);
        else if (!inputs || !targets) check(0, "inputs or targets are missing, or not I32 (B,T) within the vocabulary");
        else {
            for (int i = 0; i < B * T; i++) counted += targets[i] >= 0;
            double dloss = counted ? 1.0 / counted : 0;
            const FileTensor *losses = safetensors_find(&file, "losses");
            check_tensors(m, &file, inputs, targets, B, T, dloss);
            if (losses) check_losses(m, &file, losses, inputs, targets, B, T, dloss);
        }
        tested_free(m);
    }
    safetensors_free(&file);
    release();
}

// ----------------------------------------------------------------------------
// the program as a user runs it

static char self[PATH_MAX], folder[64], work[80]; // this binary; stdout and stderr go to folder, the program works in folder/work
static unsigned char *output, *complaint;         // what the last run wrote there
static size_t output_size, complaint_size;
static const char *n_threads = "2";

// The bytes of a file of the work folder with a zero behind them, NULL if there is none.
static unsigned char *slurp(const char *name, size_t *size) {
    char path[PATH_MAX], error[ERROR_SIZE];
    unsigned char *bytes = NULL;
    snprintf(path, sizeof(path), "%s/%s", work, name);
    return file_read(path, &bytes, size, error) ? NULL : (unsigned char *)keep(bytes);
}

static void spill(const char *name, const void *bytes, size_t size) {
    char path[PATH_MAX];
    snprintf(path, sizeof(path), "%s/%s", work, name);
    FILE *out = fopen(path, "wb");
    if (!out || fwrite(bytes, 1, size, out) != size || fclose(out)) { printf("%s cannot be written\n", path); exit(1); }
}

static void discard(const char *name) {
    char path[512];
    snprintf(path, sizeof(path), "%s/%s", work, name);
    if (unlink(path)) rmdir(path);
}

static int same_files(const char *a, const char *b) {
    size_t size_a = 0, size_b = 0;
    const unsigned char *x = slurp(a, &size_a), *y = slurp(b, &size_b);
    return x && y && size_a == size_b && size_a > 0 && !memcmp(x, y, size_a);
}

// A file of the work folder, opened to be locked.
static int open_work(const char *name) {
    char path[512];
    snprintf(path, sizeof(path), "%s/%s", work, name);
    return open(path, O_RDWR | O_CLOEXEC);
}

// Whether two safetensors files hold the same tensors; their metadata may differ.
static int same_tensors(const char *a, const char *b) {
    Safetensors x, y;
    char path[512], error[ERROR_SIZE];
    memset(&y, 0, sizeof(y));
    snprintf(path, sizeof(path), "%s/%s", work, a);
    if (safetensors_read(&x, path, error)) return 0;
    snprintf(path, sizeof(path), "%s/%s", work, b);
    int same = !safetensors_read(&y, path, error) && x.n_tensors == y.n_tensors && x.n_tensors > 0;
    for (int i = 0; same && i < x.n_tensors; i++)
        same = !strcmp(x.tensors[i].name, y.tensors[i].name) && x.tensors[i].size == y.tensors[i].size &&
               !memcmp(x.tensors[i].data, y.tensors[i].data, x.tensors[i].size);
    safetensors_free(&x);
    safetensors_free(&y);
    return same;
}

static void copy_file(const char *from, const char *to) {
    size_t size = 0;
    const unsigned char *bytes = slurp(from, &size);
    if (bytes) spill(to, bytes, size);
}

// A hash of the names and contents of all files in the work folder; `remove`: and none is left.
static uint64_t folder_state(int remove) {
    uint64_t state = 0;
    DIR *dir = opendir(work);
    for (struct dirent *entry; dir && (entry = readdir(dir)) != NULL;) {
        size_t size = 0;
        if (entry->d_name[0] == '.') continue;
        const unsigned char *bytes = slurp(entry->d_name, &size);
        state += splitmix64(hash_bytes((const unsigned char *)entry->d_name, strlen(entry->d_name))) ^ (bytes ? hash_bytes(bytes, size) : 0);
        if (remove) discard(entry->d_name);
    }
    closedir(dir);
    return state;
}

static void (*prepare_child)(
    void); // what start() does in the child before it becomes the program, NULL: nothing

// Starts this binary in the work folder. Words are split at spaces, a ~ inside a word stands for a space.
static pid_t start(const char *line) {
    static char text[4096];
    char *words[80];
    int n = 0;
    words[n++] = self;
    snprintf(text, sizeof(text), "%s", line);
    for (char *word = strtok(text, " "); word && n < 79; word = strtok(NULL, " ")) {
        for (char *c = word; *c; c++) if (*c == '~') *c = ' ';
        words[n++] = word;
    }
    words[n] = NULL;
    setenv("OMP_NUM_THREADS", n_threads, 1);
    fflush(stdout); // what is buffered would be written by both
    pid_t child = fork();
    if (child) return child;
    alarm(120); // a program that hangs is a failure, not a test without an end
    if (chdir(work) || !freopen("../stdout", "wb", stdout) || !freopen("../stderr", "wb", stderr)) _exit(126);
    if (prepare_child) prepare_child();
    execv(self, words);
    _exit(127);
}

// Waits; returns the exit code, 128 + the signal that ended it, and keeps what it wrote.
static int finish(pid_t child) {
    int status = 0;
    waitpid(child, &status, 0);
    output = slurp("../stdout", &output_size);
    complaint = slurp("../stderr", &complaint_size);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

__attribute__((format(printf, 1, 2)))
static int run(const char *format, ...) { // the program with these options
    char line[4096] = "--run ";
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line + 6, sizeof(line) - 6, format, arguments);
    va_end(arguments);
    int code = finish(start(line));
    if (code && code != 1 && code != 2) printf("  exit code %d: %s\n%s", code, line, complaint ? (char *)complaint : "");
    return code;
}

// The numbers behind "key": in the lines of a log; returns the number of lines.
static int read_log(const char *name, const char *key, double *values, int max) {
    size_t size;
    int n = 0;
    char label[64];
    snprintf(label, sizeof(label), "\"%s\": ", key);
    for (char *line = (char *)slurp(name, &size); line && *line && n < max; n++) {
        char *end = strchr(line, '\n'), *at = strstr(line, label);
        values[n] = at && end && at < end ? strtod(at + strlen(label), NULL) : NAN;
        if (!end) return -1;
        line = end + 1;
    }
    return n;
}

static int same_logs(const char *a, const char *b, int lines) { // but for the times and where validation took place
    static const char *keys[] = {"step", "train_loss", "lr", "grad_norm"};
    double x[64], y[64];
    int same = 1;
    for (int k = 0; k < 4; k++) {
        same &= read_log(a, keys[k], x, 64) == lines && read_log(b, keys[k], y, 64) == lines;
        for (int i = 0; same && i < lines; i++) same &= x[i] == y[i];
    }
    return same;
}

#define TINY "--overwrite --dim 16 --layers 2 --heads 2 "
#define SMALL TINY "--seq 12 --batch 2 --warmup 5 "
#define WATCH "--eval-every 5 --eval-batches 2 "

static void write_tensors(const char *name, int N, int T, int32_t *inputs, int32_t *targets, int32_t *lags) { // an example set
    char path[256], error[ERROR_SIZE], names[3][8] = {"inputs", "targets", "lags"}, key[] = "vocab_size", value[] = "9";
    FileTensor tensors[3];
    Meta meta = {key, value};
    memset(tensors, 0, sizeof(tensors));
    for (int i = 0; i < 3; i++) {
        tensors[i].name = names[i];
        strcpy(tensors[i].dtype, "I32");
        tensors[i].n_dims = 2;
        tensors[i].shape[0] = N;
        tensors[i].shape[1] = T;
        tensors[i].count = (int64_t)N * T;
        tensors[i].size = (size_t)N * (size_t)T * 4;
        tensors[i].data = (const unsigned char *)(i == 2 ? lags : i ? targets : inputs);
    }
    snprintf(path, sizeof(path), "%s/%s", work, name);
    Place place;
    int written = !settle(&place, path, NULL, error);
    if (!written || safetensors_write(&place, tensors, lags ? 3 : 2, &meta, 1, 0, NULL, error)) {
        printf("%s\n", error);
        exit(1);
    }
}

// A text, a token shard and a set of 20 examples with some targets ignored.
static void write_data(void) {
    enum { TEXT_SIZE = 6000, TOKENS = 500, N = 20, T = 12 };
    static const char letters[] = "abcdefghij \n";
    static char text[TEXT_SIZE];
    static unsigned char shard[1024 + 2 * TOKENS];
    int32_t header[3] = {20240520, 1, TOKENS}, *inputs = random_ids(N * T, 9, 0), *targets = random_ids(N * T, 9, 1);
    for (int i = 0; i < TEXT_SIZE; i++) text[i] = letters[random_int(0, 3) ? (i ? (int)(strchr(letters, text[i - 1]) - letters) + 1 : 0) % 12 : random_int(0, 11)];
    memcpy(shard, header, sizeof(header));
    for (int i = 0; i < TOKENS; i++) shard[1024 + 2 * i] = (unsigned char)random_int(0, 19);
    spill("text", text, TEXT_SIZE);
    spill("tokens.bin", shard, sizeof(shard));
    write_tensors("set.safetensors", N, T, inputs, targets, NULL);
    spill("short", text, 20);
    text[4321] = 'Z';
    spill("other", text, TEXT_SIZE);
}

static void check_resume(const char *name, const char *options) {
    int ok = !run("%s --steps 20 --out a.safetensors --log a.log", options) && !run("%s --steps 10 --decay-steps 20 --out b.safetensors --log b.log", options);
    copy_file("b.safetensors", "half.safetensors");
    copy_file("b.best.safetensors", "half.best.safetensors");
    ok = ok && !run("--resume b.safetensors --steps 20 --log b.log " WATCH);
    check(ok && same_files("a.safetensors", "b.safetensors") && same_files("a.best.safetensors", "b.best.safetensors"),
          "%s: 10 steps and 10 resumed write the bytes of 20, best weights too", name);
    int logged = same_logs("a.log", "b.log", 20); // once more from the middle, in two parts: the log is cut back
    double steps[64];
    ok = !run("--resume half.safetensors --out c.safetensors --overwrite --steps 15 --log b.log " WATCH) &&
         read_log("b.log", "step", steps, 64) == 15;
    ok = ok && !run("--resume c.safetensors --steps 20 --log b.log " WATCH);
    check(ok && logged && same_logs("a.log", "b.log", 20) && same_files("a.safetensors", "c.safetensors"), "%s: the log goes on, and is cut back to the resumed step", name);
}

static pid_t start_and_wait_for_log(const char *line, const char *log, int lines) {
    double steps[64];
    pid_t child = start(line);
    for (int i = 0; i < 4000 && read_log(log, "step", steps, 64) < lines; i++) { release(); usleep(5000); }
    return child;
}

static void test_resume(void) {
    heading("stop and resume, bit for bit");
    check_resume("text, dropout, two micro-batches", "--data text " SMALL WATCH "--dropout 0.2 --accum 2");
    check_resume("attention on tokens", "--data tokens.bin --vocab 20 --mixer attention " SMALL WATCH "--kv-heads 1");
    check_resume("examples, epoch after epoch", "--data set.safetensors " SMALL WATCH);
    check_resume("mamba2", "--data text --mixer mamba2 --state-dim 8 " SMALL WATCH);
    pid_t child = start_and_wait_for_log("--run --data text " SMALL "--steps 100000 --eval-every 0 --dropout 0.1 --log i.log --out i.safetensors", "i.log", 4);
    kill(child, SIGINT);
    int code = finish(child), told = output && strstr((char *)output, "--resume"), steps = 0;
    char path[256], error[ERROR_SIZE];
    Safetensors file;
    snprintf(path, sizeof(path), "%s/i.safetensors", work);
    if (!safetensors_read(&file, path, error)) {
        steps = atoi(safetensors_meta(&file, "step")) + 5;
        safetensors_free(&file);
    }
    check(code == 130 && told && steps > 5, "Ctrl-C: exit code 130, the run saved, the command that goes on printed");
    code = run("--resume i.safetensors --steps %d --eval-every 0", steps) || run("--data text " SMALL "--steps %d --decay-steps 100000 --eval-every 0 --dropout 0.1 --out j.safetensors", steps);
    check(!code && same_files("i.safetensors", "j.safetensors"), "Ctrl-C, then resumed: the bytes of a run that was not stopped");
    int whole = 0;
    for (int i = 0; i < 5; i++) { // killed while it saves at every step
        discard("i.safetensors");
        discard("k.log");
        child = start_and_wait_for_log("--run --data text " SMALL "--steps 100000 --save-every 1 --log k.log --out i.safetensors", "k.log", 3 + i);
        kill(child, SIGKILL);
        finish(child);
        whole += !safetensors_read(&file, path, error);
        safetensors_free(&file);
    }
    check(whole == 5, "killed while saving, five times: the file is whole");
    code = run("--data text --overwrite --dim 16 --layers 1 --heads 2 --seq 12 --batch 2 --steps 20 "
               "--eval-every 0 --out w.safetensors");
    snprintf(path, sizeof(path), "%s/w.safetensors", work);
    if (!code && !(code = safetensors_read(&file, path, error))) {
        const char *warmup = safetensors_meta(&file, "warmup"), *length = safetensors_meta(&file, "decay_steps");
        code = !warmup || !length || strcmp(warmup, "3") || strcmp(length, "20");
        safetensors_free(&file);
    }
    check(!code, "a schedule of 20 steps warms up for 3 unless told otherwise, and the file says so");
    release();
}

static void test_threads(void) {
    heading("threads and micro-batches");
    static const char *shapes[] = {"--seq 150 --batch 1 --steps 3", "--seq 33 --batch 3 --steps 3 --accum 2 --mixer attention", "--seq 70 --batch 2 --steps 2 --kv-heads 1",
                                   "--seq 300 --batch 3 --steps 2 --kv-heads 1", "--seq 90 --batch 1 --steps 3 --mixer mamba2 --head-dim 24", "--seq 40 --batch 3 --steps 2 --mixer mamba2 --head-dim 96"};
    static const char *counts[] = {"1", "2", "3"};
    for (int i = 0; i < 6; i++) {
        int ok = 1;
        for (int t = 0; t < 3; t++) {
            n_threads = counts[t];
            ok &= !run("--data text --overwrite --dim 48 --layers 2 --heads 4 --dropout 0.1 --eval-every 0 "
                       "--out t%d.safetensors %s",
                       t, shapes[i]);
        }
        n_threads = "2";
        check(ok && same_files("t0.safetensors", "t1.safetensors") && same_files("t0.safetensors", "t2.safetensors"), "the same bytes with 1, 2 and 3 threads: %s", shapes[i]);
    }
    static const char *data[] = {"text", "set.safetensors"};
    for (int i = 0; i < 2; i++) {
        double x[8], y[8], worst = 0;
        int ok = !run("--data %s " TINY "--seq 12 --batch 8 --steps 6 --eval-every 0 --log x.log", data[i]) &&
                 !run("--data %s " TINY "--seq 12 --batch 4 --accum 2 --steps 6 --eval-every 0 --log y.log",
                      data[i]);
        ok = ok && read_log("x.log", "train_loss", x, 8) == 6 && read_log("y.log", "train_loss", y, 8) == 6;
        for (int s = 0; s < 6; s++) worst_of(&worst, ok ? fabs(x[s] - y[s]) / x[s] : NAN);
        check_error(worst, bound_of(1e-5, 1e-12), "%s: losses of --batch 4 --accum 2 against --batch 8", data[i]);
    }
    release();
}

static int by_value(const void *a, const void *b) { return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b); }

static int by_size(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

// With learning rate 0 a step's loss tells which examples it saw, and under which mask.
static void test_order(void) {
    heading("which data a step sees");
    enum { N = 20 };
    static const char same[] = "--data set.safetensors --val copy.safetensors", one[] = "--data "
                                                                                        "one.safetensors "
                                                                                        "--val "
                                                                                        "copy.safetensors";
    static const char still[] = "--overwrite --dim 16 --layers 1 --heads 2 --lr 0 --min-lr 0 --eval-every 0 "
                                "--log o.log";
    double x[2 * N], y[2 * N], worst = 0, moved = 0;
    copy_file("set.safetensors", "copy.safetensors");
    int ok = !run("%s %s --batch 20 --steps 1", same, still) &&
             read_log("o.log", "train_loss", x, 2 * N) == 1 && read_log("o.log", "val_loss", y, 2 * N) == 1;
    check_error(ok ? fabs(x[0] - y[0]) / y[0] : NAN, 1e-6, "all examples in one batch: the training loss is the validation loss");
    ok =
        !run("%s %s --batch 1 --steps 40", same, still) && read_log("o.log", "train_loss", x, 2 * N) == 2 * N;
    for (int i = 0; i < N; i++) moved += x[i] != x[N + i];
    qsort(x, N, sizeof(double), by_value);
    qsort(x + N, N, sizeof(double), by_value);
    for (int i = 0; i < N; i++) worst_of(&worst, ok ? fabs(x[i] - x[N + i]) / x[i] : NAN);
    check_error(worst, 1e-6, "two epochs see each example once");
    check(moved > N / 2 && x[0] < x[N - 1], "in another order: %.0f of %d in another place", moved, N);
    write_tensors("one.safetensors", 1, 12, random_ids(12, 9, 0), random_ids(12, 9, 0), NULL);
    copy_file("one.safetensors", "copy.safetensors");
    ok = !run("%s %s --batch 1 --steps 3 --dropout 0.5", one, still) &&
         read_log("o.log", "train_loss", y, 2 * N) == 3;
    check(ok && y[0] != y[1] && y[1] != y[2], "dropout: every step has a mask of its own");
    for (int seed = 1; seed < 4; seed++) { // 1000 places, sorted: independent ones have gaps of 7 times the mean
        Run r;
        int n = 600000, at[1001], gap = 0;
        memset(&r, 0, sizeof(r));
        r.train_end = n + 12;
        r.settings.values.seq = 12;
        r.settings.values.seed = seed;
        for (int i = 0; i < 1000; i++) at[i] = (int)sequence_place(&r, i);
        int first = at[0];
        qsort(at, 1000, sizeof(int), by_size);
        at[1000] = at[0] + n;
        for (int i = 0; i < 1000; i++) gap = at[i + 1] - at[i] > gap ? at[i + 1] - at[i] : gap;
        check(at[0] >= 0 && at[999] < n && gap < 3 * n / 1000, "text, seed %d: 1000 places from %d on, the widest gap %.1f times the mean", seed, first, gap * 1000.0 / n);
    }
    int places = 1; // of 5388 where 12 tokens can start
    ok = !run("--data text --seq 12 %s --batch 1 --steps 40", still);
    ok = ok && read_log("o.log", "train_loss", x, 2 * N) == 2 * N;
    qsort(x, 2 * N, sizeof(double), by_value);
    for (int i = 1; i < 2 * N; i++) places += x[i] != x[i - 1];
    check(ok && places >= 2 * N - 4, "text: 40 steps start at %d places", places);
    release();
}

// The weights of a checkpoint in a model of this process.
static Model *load(const char *name, int T, Safetensors *file) {
    char path[256], error[ERROR_SIZE];
    int ok = 1;
    snprintf(path, sizeof(path), "%s/%s", work, name);
    if (safetensors_read(file, path, error)) { check(0, "%s", error); return NULL; }
    Config c = config_with(SESSA, (int)meta_number(file, "vocab_size", 1, 256, &ok), 16, 2, 2, 2, T);
    Model *m = create(&c, 1, T, EVALUATE);
    check(!take_weights(m, file), "%s: weights, their names and shapes", name);
    return m;
}

// Accuracy over the targets of an example set, whole and by lag, against a count by hand.
static void test_scores(void) {
    heading("accuracy on example sets");
    enum { N = 30, T = 12 };
    Dropout off = {0, 0, 0};
    Safetensors file;
    int32_t *inputs = random_ids(N * T, 9, 0), *targets = random_ids(N * T, 9, 1), *lags = random_ids(N * T, 40, 0);
    for (int i = 0; i < N * T; i++) if (targets[i] > 2) targets[i] = inputs[i]; // something to learn
    write_tensors("lags.safetensors", N, T, inputs, targets, lags);
    copy_file("lags.safetensors", "seen.safetensors");
    int ok = !run("--data lags.safetensors --val seen.safetensors " TINY "--seq 12 --batch 8 --warmup 5 "
                                                                         "--steps 80 --lr 1e-2 --eval-every "
                                                                         "0 --out s.safetensors --log s.log");
    double hits[2][8] = {{0}}, counts[2][8] = {{0}}, logged[128], by_lag[8] = {0};
    Model *m = load("s.safetensors", T, &file);
    if (!ok || !m) { check(0, "trained on an example set: %s", (char *)complaint); return; }
    for (int e = 0; e < N; e++) {
        model_forward(m, inputs + e * T, targets + e * T, 1, T, off);
        for (int t = 0; t < T; t++) {
            int best = 0, target = targets[e * T + t], bin = lags[e * T + t] ? (int)log2((double)lags[e * T + t]) : 7;
            for (int v = 1; v < 9; v++) if (m->acts.logits[t * 9 + v] > m->acts.logits[t * 9 + best]) best = v;
            for (int i = 0; i < 2 && target >= 0; i++) { hits[i][i ? bin : 0] += best == target; counts[i][i ? bin : 0]++; }
        }
    }
    int lines = read_log("s.log", "val_accuracy", logged, 128);
    check(lines == 80 && counts[0][0] > 100 && hits[0][0] > 0.3 * counts[0][0] && fabs(logged[79] - hits[0][0] / counts[0][0]) < 1e-8, "val_accuracy in the log: %.4f", hits[0][0] / counts[0][0]);
    ok = !run("--load s.safetensors --val lags.safetensors --batch 7 --eval");
    const char *line = ok ? strstr((char *)output, "val_accuracy ") : NULL;
    check(line && fabs(atof(line + 13) - hits[0][0] / counts[0][0]) < 1e-6, "--eval prints it");
    for (int k = 0; k < 6 && line; k++) {
        char name[32];
        snprintf(name, sizeof(name), "lag %d to %d ", 1 << k, (2 << k) - 1);
        const char *place = strstr(line, name);
        by_lag[k] = place ? atof(place + strlen(name)) : NAN;
        ok &= counts[1][k] > 0 && fabs(by_lag[k] - hits[1][k] / counts[1][k]) < 1e-6;
    }
    size_t size;
    unsigned char *log = slurp("s.log", &size);
    check(ok && log && strstr((char *)log, "\"accuracy_by_lag\": {\"1\": "), "and the accuracy by lag, as the log does");
    model_free(m);
    safetensors_free(&file);
    release();
}

static void test_generation(void) {
    heading("evaluation and generation");
    enum { SEQ = 12, PROMPT = 30, NEW = 40, TEXT_SIZE = 6000 };
    Dropout off = {0, 0, 0};
    Safetensors file;
    double train_loss[64], val_loss[64];
    size_t size;
    run("--data text " SMALL "--steps 60 --lr 1e-2 --eval-every 0 --out g.safetensors --log g.log");
    Model *m = load("g.safetensors", SEQ, &file);
    if (!m) return;
    int V = m->config.vocab_size, ids[PROMPT + NEW], ok, id_of[256] = {0};
    const FileTensor *letters = safetensors_find(&file, "tokenizer.bytes");
    const unsigned char *text = slurp("text", &size);
    for (int i = 0; i < V; i++) id_of[letters->data[i]] = i;
    double sum = 0;
    for (int w = 0; w < (TEXT_SIZE / 10 - 1) / SEQ; w++) { // the last tenth, window after window
        int inputs[SEQ], targets[SEQ];
        for (int t = 0; t < SEQ; t++) {
            inputs[t] = id_of[text[TEXT_SIZE / 10 * 9 + w * SEQ + t]];
            targets[t] = id_of[text[TEXT_SIZE / 10 * 9 + w * SEQ + t + 1]];
        }
        model_forward(m, inputs, targets, 1, SEQ, off);
        sum += model_loss(m) / ((TEXT_SIZE / 10 - 1) / SEQ * SEQ);
    }
    int lines = read_log("g.log", "train_loss", train_loss, 64);
    read_log("g.log", "val_loss", val_loss, 64);
    check_error(lines == 60 ? fabs(val_loss[59] - sum) / sum : NAN, 1e-5, "validation loss against windows counted by hand");
    ok = !run("--load g.safetensors --data text --eval");
    check_error(ok && !strncmp((char *)output, "val_loss ", 9) ? fabs(atof((char *)output + 9) - sum) / sum : NAN, 1e-5, "--eval prints it");
    check(lines == 60 && train_loss[59] < train_loss[0] - 0.3, "60 steps lower the loss from %.3f to %.3f", train_loss[0], train_loss[lines - 1]);

    // Weights three times as large make a text that hangs on every token of its window. At temperature 0, window 12: the
    // prompt's last 12, later the last 6 when 12 are full.
    unsigned char *bytes = slurp("g.safetensors", &size);
    for (int i = 0; i < file.n_tensors; i++)
        for (int64_t e = 0; e < file.tensors[i].count && !strcmp(file.tensors[i].dtype, "F32"); e++) {
            float value = 3 * (float)number_of(&file.tensors[i], e);
            memcpy(bytes + (file.tensors[i].data - file.bytes) + 4 * e, &value, 4);
        }
    spill("g.safetensors", bytes, size);
    for (int64_t i = 0; i < m->table.count; i++) m->params[i] *= 3;
    char prompt[PROMPT + 1] = "";
    for (int i = 0; i < PROMPT; i++) prompt[i] = text[i] == '\n' || text[i] == ' ' ? 'a' : (char)text[i];
    for (int i = 0; i < PROMPT; i++) ids[i] = id_of[(unsigned char)prompt[i]];
    for (int at = PROMPT, begin = PROMPT - SEQ; at < PROMPT + NEW; at++) {
        if (at - begin > SEQ) begin = at - SEQ / 2;
        model_forward(m, ids + begin, ids + begin, 1, at - begin, off);
        const real *logits = m->acts.logits + (size_t)(at - begin - 1) * V;
        ids[at] = 0;
        for (int v = 1; v < V; v++) if (logits[v] > logits[ids[at]]) ids[at] = v;
    }
    ok = !run("--load g.safetensors --generate %d --temperature 0 --prompt %s", NEW, prompt);
    ok = ok && output_size == PROMPT + NEW + 1 && !memcmp(output, prompt, PROMPT) && output[PROMPT + NEW] == '\n';
    for (int i = 0; ok && i < NEW; i++) ok = output[PROMPT + i] == letters->data[ids[PROMPT + i]];
    check(ok && !complaint_size, "temperature 0, window %d: prompt and continuation, byte for byte as forward passes give it", SEQ);
    unsigned char *greedy = output;
    static const char *greedy_ways[] = {"--temperature 0 --seed 5", "--top-k 1", "--top-p 1e-9"};
    for (int i = 0; i < 3; i++)
        check(!run("--load g.safetensors --generate %d --prompt %s %s", NEW, prompt, greedy_ways[i]) && !strcmp((char *)output, (char *)greedy), "%s: the same text", greedy_ways[i]);
    run("--load g.safetensors --generate 200 --seed 1 --window 0 --temperature 9");
    unsigned char *first = output;
    ok = output_size == 201 && !run("--load g.safetensors --generate 200 --seed 1 --window 0 --temperature 9") && !strcmp((char *)output, (char *)first);
    check(ok && !run("--load g.safetensors --generate 200 --seed 2 --window 0 --temperature 9") && strcmp((char *)output, (char *)first), "sampling: a seed gives its text, another seed another");
    run("--data tokens.bin --vocab 20 " SMALL "--steps 1 --out n.safetensors");
    ok = !run("--load n.safetensors --generate 5 --prompt 3~14~15");
    int numbers = 0;
    for (char *c = (char *)output; ok && (*c == ' ' || numbers == 0); numbers++) ok = strtol(c, &c, 10) < 20;
    check(ok && numbers == 8 && !strncmp((char *)output, "3 14 15 ", 8), "tokens without a vocabulary: ids in, ids out");
    model_free(m);
    safetensors_free(&file);
    release();
}

static char damaged[80]; // what is wrong with bad.safetensors
static const char *reason = ""; // what the line must say

// The program must end with this exit code and one line on standard error, and leave the folder as it was.
__attribute__((format(printf, 2, 3)))
static void refuse(int wanted, const char *format, ...) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    uint64_t before = folder_state(0);
    int code = run("%s", line), lines = 0;
    for (size_t i = 0; i < complaint_size; i++) lines += complaint[i] == '\n';
    int ok = code == wanted && lines == 1 && complaint[complaint_size - 1] == '\n' && strstr((char *)complaint, reason) && folder_state(0) == before;
    if (!check(ok, "%d: %.50s%s%s", wanted, line, *damaged ? " with " : "", damaged)) printf("    exit code %d, %d lines%s: %s\n", code, lines, folder_state(0) == before ? "" : ", files changed", (char *)complaint);
    release();
}

// Writes bad.safetensors: good.safetensors with the first `from` of its header replaced.
static void damage(const char *from, const char *to) {
    size_t size = 0;
    unsigned char *good = slurp("good.safetensors", &size), *bad = (unsigned char *)lend(size + strlen(to));
    uint64_t length, longer;
    memcpy(&length, good, 8);
    char *at = (char *)memmem(good + 8, (size_t)length, from, strlen(from));
    if (!at) { check(0, "the header of a checkpoint does not hold %s", from); return; }
    size_t head = (size_t)((unsigned char *)at - good), tail = size - head - strlen(from);
    longer = length + strlen(to) - strlen(from);
    memcpy(bad, good, head);
    memcpy(bad, &longer, 8);
    memcpy(bad + head, to, strlen(to));
    memcpy(bad + head + strlen(to), at + strlen(from), tail);
    spill("bad.safetensors", bad, head + strlen(to) + tail);
    snprintf(damaged, sizeof(damaged), "%.30s for %.30s", to, from);
}

static void test_files(void) {
    heading("files: what is written is read, what is damaged is refused with one line and nothing is touched");
    int ok = !run("--data text " SMALL "--steps 2 --out good.safetensors --log good.log"), read = 0,
        crossed = 0;
    size_t size = 0;
    ok = ok && !run("--data text --load good.safetensors --lr 0 --min-lr 0 --batch 2 --steps 1 --out d.safetensors");
    Safetensors a, b;
    char path[256], error[ERROR_SIZE], from[64], to[64];
    snprintf(path, sizeof(path), "%s/good.safetensors", work);
    ok = ok && !safetensors_read(&a, path, error);
    snprintf(path, sizeof(path), "%s/d.safetensors", work);
    ok = ok && !safetensors_read(&b, path, error);
    if (!check(ok, "train, save, load, save")) return;
    for (int i = 0; i < a.n_tensors; i++) {
        const FileTensor *t = safetensors_find(&b, a.tensors[i].name);
        read += strncmp(a.tensors[i].name, "exp_avg", 7) && t && t->size == a.tensors[i].size && !memcmp(t->data, a.tensors[i].data, t->size);
        crossed += !strncmp(a.tensors[i].name, "exp_avg", 7);
    }
    check(slurp("good.best.safetensors", &size) && slurp("d.best.safetensors", &size), "a run that ends before its first validation keeps its last weights as the best");
    check(read + crossed == a.n_tensors && crossed == 2 * (read - 1), "the same bits of %d tensors after a step with learning rate 0", read);
    const unsigned char *good = slurp("good.safetensors", &size);
    int refused = 0, tried = 0;
    Safetensors file;
    for (size_t cut = 0; cut < size; cut += cut < 4000 ? 7 : 501, tried++) {
        unsigned char *bytes = (unsigned char *)malloc(cut + 1);
        memcpy(bytes, good, cut);
        refused += safetensors_parse(&file, bytes, cut, "cut", error) != 0 && strlen(error) > 10;
    }
    check(refused == tried, "cut at %d places: refused each time", tried);
    static const char huge[] = "{\"__metadata__\":{\"a\":\"\\u0041\"},\"x\":{\"shape\":[99999999999999999999,3],\"dtype\":\"F32\",\"data_offsets\":[0,9223372036854775808]}}";
    refused = 0;
    for (size_t length = 0; length < sizeof(huge); length++) { // a header that ends anywhere: the sanitizers see a read past it
        unsigned char *bytes = (unsigned char *)malloc(8 + length);
        uint64_t stored = length;
        memcpy(bytes, &stored, 8);
        memcpy(bytes + 8, huge, length);
        refused += safetensors_parse(&file, bytes, 8 + length, "huge", error) != 0;
    }
    check(refused == sizeof(huge), "headers that end at any byte, with numbers that overflow: refused");
    for (int i = 0; i < 3000; i++) { // whatever the answer: no crash, and what is accepted can be freed
        unsigned char *bytes = (unsigned char *)malloc(size);
        memcpy(bytes, good, size);
        for (int flips = random_int(1, 4); flips > 0; flips--) bytes[random_int(0, 3000)] = (unsigned char)random_int(0, 255);
        if (!safetensors_parse(&file, bytes, size, "flipped", error)) safetensors_free(&file);
    }
    static const size_t cuts[] = {0, 5, 8, 700};
    for (int i = 0; i < 6; i++) { // the last two: one byte less, one byte more
        spill("bad.safetensors", good, i < 4 ? cuts[i] : i == 4 ? size - 1 : size + 1);
        snprintf(damaged, sizeof(damaged), "%s", i == 5 ? "one byte more" : i == 4 ? "one byte less" : "an early end");
        refuse(1, "--load bad.safetensors --data text --eval");
        good = slurp("good.safetensors", &size);
    }
    static const uint64_t header_lengths[] = {UINT64_MAX, (uint64_t)1 << 63, 100000001, 3};
    for (int i = 0; i < 4; i++) {
        unsigned char *bytes = slurp("good.safetensors", &size);
        memcpy(bytes, &header_lengths[i], 8);
        spill("bad.safetensors", bytes, size);
        snprintf(damaged, sizeof(damaged), "a header of %llu bytes", (unsigned long long)header_lengths[i]);
        refuse(1, "--load bad.safetensors --generate 3");
    }
    static const char *edits[][2] = {
        {"\"dtype\":\"F32\"", "\"dtype\":\"I32\""}, {"\"dtype\":\"F32\"", "\"dtype\":\"F64\""}, {"\"dtype\":\"F32\"", "\"dtype\":\"F3\""}, {"[16]", "[4,4]"}, {"[16]", "[17]"}, {"[16]", "[-16]"},
        {"[16]", "[4611686018427387904,4611686018427387904]"}, {"ln_f.bias", "ln_f.bios"}, {"exp_avg.ln_f.bias", "exp_avg.ln_f.weight"}, {"\"beta1\"", "\"beta2\""}, {"\"__metadata__\"", "\"metadata\""}, {"{", "["}, {"{", ""},
        {"\"d_model\":\"16\"", "\"d_model\":\"18\""}, {"\"d_model\":\"16\"", "\"d_model\":\"x\""}, {"\"n_heads\":\"2\"", "\"n_heads\":\"0\""}, {"\"d_model\":", "\"d_modal\":"},
        {"\"mixer\":\"sessa\"", "\"mixer\":\"other\""}, {"\"vocab_size\":\"12\"", "\"vocab_size\":\"13\""}, {"\"d_model\":\"16\"", "\"d_model\":16"}};
    for (size_t i = 0; i < sizeof(edits) / sizeof(edits[0]); i++) {
        damage(edits[i][0], edits[i][1]);
        refuse(1, "--load bad.safetensors --data text --eval");
    }
    damage("\"max_seq_len\":\"12\"", "\"max_seq_len\":\"3000000\"");
    check(!run("--load bad.safetensors --generate 3 --window 8"), "a model of long sequences generates in a "
                                                                  "short window");
    const FileTensor *weight = safetensors_find(&a, "ln_f.weight"), *bias = safetensors_find(&a, "ln_f.bias"), *least = &a.tensors[0];
    for (int i = 0; i < a.n_tensors; i++) if (a.tensors[i].data < least->data) least = &a.tensors[i];
    snprintf(from, sizeof(from), "[%lld,%lld]", (long long)(bias->data - least->data), (long long)(bias->data - least->data) + 64);
    snprintf(to, sizeof(to), "[%lld,%lld]", (long long)(weight->data - least->data), (long long)(weight->data - least->data) + 64);
    damage(from, to);
    refuse(1, "--load bad.safetensors --data text --eval"); // two tensors in one place
    damage("\"step\":\"2\"", "\"step\":\"two\"");
    refuse(1, "--resume bad.safetensors --steps 4");
    char endless[801]; // as long as would overrun a buffer for the message
    memset(endless, '7', 800);
    endless[800] = 0;
    memcpy(endless, "\"d_model\":\"", 11);
    strcpy(endless + 799, "\"");
    damage("\"d_model\":\"16\"", endless);
    refuse(1, "--load bad.safetensors --data text --eval");
    reason = "tensor "; // no memory is taken for what the file does not hold
    damage("\"n_layers\":\"2\"", "\"n_layers\":\"4096\"");
    refuse(1, "--load bad.safetensors --generate 5");
    damage("\"d_model\":\"16\"", "\"d_model\":\"65536\"");
    refuse(1, "--resume bad.safetensors --steps 4");
    reason = "";
    static const struct { const char *tensor, *way, *reason; float value; } spoilt[] = {
        {"layers.1.W_in.weight", "--load bad.safetensors --data text --eval", "not finite", NAN}, {"wte.weight", "--load bad.safetensors --generate 5", "not finite", INFINITY},
        {"exp_avg_sq.ln_f.bias", "--resume bad.safetensors --steps 4", "not finite", -INFINITY}, {"ln_f.weight", "--load bad.safetensors --generate 5", "logit", 3e38f},
        {"ln_f.weight", "--load bad.safetensors --data text --eval", "validation loss", 3e38f}, {"ln_f.weight", "--load bad.safetensors --data text --batch 2 --steps 4 --out new.safetensors", "nothing was saved", 3e38f}};
    for (int i = 0; i < 6; i++) {
        unsigned char *bytes = slurp("good.safetensors", &size);
        const FileTensor *t = safetensors_find(&a, spoilt[i].tensor);
        for (int64_t e = 0; e < t->count; e++) memcpy(bytes + (t->data - a.bytes) + 4 * e, &spoilt[i].value, 4);
        spill("bad.safetensors", bytes, size);
        snprintf(damaged, sizeof(damaged), "%g in %s", (double)spoilt[i].value, spoilt[i].tensor);
        reason = spoilt[i].reason;
        refuse(1, "%s", spoilt[i].way);
    }
    reason = "";
    safetensors_free(&a);
    safetensors_free(&b);
    release();

    damaged[0] = 0;
    heading("the command line: what cannot work is refused");
    mkdir(strcat(strcpy(path, work), "/subfolder"), 0777);
    static const char *wrong[] = {"--colour red",
                                  "dim",
                                  "--steps ten",
                                  "--steps 1.5",
                                  "--lr 1e-3x",
                                  "--lr nan",
                                  "--steps",
                                  "--dropout 1",
                                  "--batch 0",
                                  "--data text --heads 3 --dim 16",
                                  "--data text --dim 16 --heads 16",
                                  "--data text --heads 4 --kv-heads 3",
                                  "--data text --mixer none",
                                  "--resume good.safetensors --load good.safetensors",
                                  "--generate 5",
                                  "--eval",
                                  "--load good.safetensors --generate 5 --eval",
                                  "--resume good.safetensors --dim 32",
                                  "--resume good.safetensors --eps 1e-3",
                                  "--resume good.safetensors --mixer attention",
                                  "--data text --out text",
                                  "--data text --log text",
                                  "--data text --val other --log other",
                                  "--load good.safetensors --data text --heads 4",
                                  "--load good.safetensors --generate 5 --prompt abZ"};
    for (int i = 0; i < 4; i++) { // a shard that says what is not so: one token more, one less, another version, none
        unsigned char *bytes = slurp("tokens.bin", &size);
        int32_t header[3] = {20240520, i == 2 ? 2 : 1, (int32_t)(i == 3 ? 0 : (int64_t)(size - 1024) / 2 + (i == 0) - (i == 1))};
        memcpy(bytes, header, sizeof(header));
        spill("count.bin", bytes, size);
        reason = "token shard";
        refuse(1, "--data count.bin --vocab 20");
    }
    reason = "";
    spill("empty", "", 0);
    static const char *impossible[] = {"--data absent", "--data empty", "--data text --val empty", "--resume good.safetensors --val other --steps 4", "--data subfolder", "--data short", "--load absent --generate 5", "--load subfolder --generate 5", "--resume absent",
        "--load good.safetensors --data other --eval", "--resume good.safetensors --data other --steps 4", "--data text --out subfolder/no/x.safetensors",
        "--data text --out subfolder", "--data text --log subfolder/no/x.log", "--data set.safetensors --val text", "--data tokens.bin --vocab 5", "--load good.safetensors --data tokens.bin --eval",
        "--resume d.best.safetensors --steps 9", "--data text --dim 65536 --layers 4096 --heads 4"};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) refuse(2, "%s", wrong[i]);
    for (size_t i = 0; i < sizeof(impossible) / sizeof(impossible[0]); i++) refuse(1, "%s", impossible[i]);
    int told = 0;
    ok = !run("--help");
    int options = 0;
    for (int i = 0; i < N_OPTIONS && option_table[i].group != STATE; i++, options++) {
        snprintf(from, sizeof(from), "--%s ", option_table[i].name);
        told += output && strstr((char *)output, from) != NULL;
    }
    check(ok && told == options && !complaint_size, "--help names all %d options", options);
    reason = "; nothing was saved before";
    refuse(1, "--data text " TINY "--seq 12 --batch 2 --lr 1000 --warmup 0 --clip 0 --steps 400 --eval-every "
                                  "0 --save-every 1000000 --out never.safetensors");
    reason = "";
}

// Runs that nobody watches.
static void test_long_runs(void) {
    heading("long runs: divergence, spoilt weights, logs, what killed runs leave");
    Safetensors file;
    char path[256], error[ERROR_SIZE], words[64];
    size_t size = 0, size_now = 0;
    int code = run("--data text " TINY "--seq 12 --batch 2 --lr 1000 --warmup 0 --clip 0 --steps 400 "
                                       "--eval-every 0 --save-every 2 --out diverged.safetensors"),
        finite = 1, step = -1;
    snprintf(path, sizeof(path), "%s/diverged.safetensors", work);
    if (!safetensors_read(&file, path, error)) {
        step = atoi(safetensors_meta(&file, "step"));
        for (int i = 0; i < file.n_tensors; i++)
            for (int64_t e = 0; e < file.tensors[i].count && !strcmp(file.tensors[i].dtype, "F32"); e++) finite &= isfinite(number_of(&file.tensors[i], e)) != 0;
        safetensors_free(&file);
    }
    snprintf(words, sizeof(words), "; diverged.safetensors holds step %d\n", step);
    check(code == 1 && step > 0 && step % 2 == 0 && finite && complaint && strstr((char *)complaint, words), "a loss that is not finite stops the run and names the last checkpoint: step %d, all finite", step);

    Run run_here; // what training cannot bring about: a weight that is not finite after a finite step
    char *argv[] = {self};
    Config c = config_with(SESSA, 11, 16, 1, 2, 2, 12);
    memset(&run_here, 0, sizeof(run_here));
    run_here.backend = &cpu_backend;
    run_here.model = create(&c, 1, 12, TRAIN);
    run_here.table = run_here.model->table;
    parse_options(&run_here.settings, 1, argv, error);
    run_here.settings.values.vocab = 11; // and what depends on other options
    run_here.settings.values.kv_heads = run_here.settings.values.decay_steps = 4;
    run_here.settings.values.warmup = 0;
    run_here.settings.values.min_lr = 0;
    Place place;
    int saved =
        !settle(&place, path, NULL, error) && !save_checkpoint(&run_here, &place, RESUMABLE, 0, NULL, error);
    int refused = 0;
    const unsigned char *before = slurp("diverged.safetensors", &size);
    real *spoilt[] = {run_here.model->params, run_here.model->exp_avg, run_here.model->exp_avg_sq};
    for (int i = 0; i < 3; i++) {
        spoilt[i][7] = (real)(i ? NAN : INFINITY);
        refused += save_checkpoint(&run_here, &place, RESUMABLE, 0, NULL, error) && strstr(error, "not "
                                                                                                  "finite");
        spoilt[i][7] = 0;
    }
    const unsigned char *now = slurp("diverged.safetensors", &size_now);
    check(saved && refused == 3 && size == size_now && !memcmp(before, now, size), "a weight or a moment that is not finite is never written: the old file stays");
    model_free(run_here.model);

    size_t first = 0, known = 0;
    char line[4000] =
        ""; // the log of the two steps, the first line 900 bytes longer, and two lines that a killed run left
    const char *two = (const char *)slurp("good.log", &known);
    if (!check(two && known < 1000, "the log of two steps")) return;
    first = (size_t)(strchr(two, '\n') - two);
    snprintf(line, sizeof(line), "%.*s%900s%s{\"step\": 3, \"train_loss\": 2}\n{\"st", (int)first, two, "",
             two + first);
    spill("long.log", line, strlen(line));
    spill("e.safetensors.tmp.s99999999", "x", 1);
    spill("e.best.safetensors.tmp.s0a1b2c3d", "x", 1);
    spill("e.safetensors.tmp.mine", "x", 1);
    spill("e.safetensors.tmp.20261129", "x", 1);
    spill("e.safetensors.lock", "", 0);
    int lock = open_work("e.safetensors.lock");
    flock(lock, LOCK_EX);
    code = run("--resume good.safetensors --steps 3 --out e.safetensors --overwrite --log long.log");
    check(code == 1 && complaint && strstr((char *)complaint, "another run") &&
              slurp("e.safetensors.tmp.s99999999", &size),
          "a run whose file another one is writing is refused, and removes nothing of it");
    close(lock);
    code = run("--resume good.safetensors --steps 3 --out e.safetensors --overwrite --log long.log");
    const char *log = (char *)slurp("long.log", &size);
    check(!code && log && !memcmp(log, line, known + 900) && size > known + 960 &&
              !strncmp(log + known + 900, "{\"step\": 3, \"train_loss\"", 24),
          "a log with a line of 1000 bytes is continued behind the resumed step");
    check(!slurp("e.safetensors.tmp.s99999999", &size) && !slurp("e.best.safetensors.tmp.s0a1b2c3d", &size) &&
              !slurp("e.safetensors.lock", &size),
          "what a killed run left, temporary files and locks, is gone after the next");
    check(slurp("e.safetensors.tmp.mine", &size) && slurp("e.safetensors.tmp.20261129", &size), "and nothing else is");
    release();
}

// ----------------------------------------------------------------------------
// what a run may replace, and what it may say

static const char run_of_text[] = "--data text --dim 16 --layers 1 --heads 2 --seq 12 --batch 2 --eval-every "
                                  "5 --eval-batches 1";

static int exists(const char *name) {
    size_t size;
    return slurp(name, &size) != NULL;
}

// The program must refuse with exit code 2, touch nothing and say these words.
__attribute__((format(printf, 2, 3)))
static void refuse_with(const char *words, const char *format, ...) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    reason = words;
    refuse(2, "%s", line);
    reason = "";
}

// A run replaces a checkpoint, best weights or a log only if it wrote or resumed them, or is told to.
static void test_places(void) {
    heading("what a run replaces");
    damaged[0] = 0;
    int ok = !run("%s --steps 10 --out p.safetensors --log p.log", run_of_text);
    check(ok && exists("p.best.safetensors"), "a run, its best weights and its log");
    refuse_with("p.safetensors is there: a run of step 10, validation loss",
                "%s --steps 3 --out p.safetensors", run_of_text);
    refuse_with("p.best.safetensors is there: weights of step 10", "%s --steps 3 --out p",
                run_of_text); // the same best weights
    refuse_with("p.log is there: a log up to step 10", "%s --steps 3 --out q.safetensors --log p.log",
                run_of_text);
    refuse_with("one file", "%s --load p.best.safetensors --steps 3 --out p.safetensors", run_of_text);
    refuse_with("one file", "%s --load p.safetensors --steps 3 --out p.safetensors --overwrite", run_of_text);
    spill("notes", "my notes\n", 9);
    refuse_with("is no log", "%s --steps 3 --out q.safetensors --log notes", run_of_text);
    refuse_with("it is no log", "--resume p.safetensors --steps 12 --log notes");
    refuse_with("notes is there: no checkpoint", "%s --steps 3 --out notes", run_of_text);
    static const char *same[] = {"--out a --log a", "--out ./x --log x", "--out r --log r.best.safetensors",
                                 "--val text",      "--out text",        "--log text"};
    for (int i = 0; i < 6; i++) refuse_with("one file", "%s --steps 3 %s", run_of_text, same[i]);
    refuse_with("one file", "--resume p.safetensors --steps 12 --log p.safetensors");
    refuse_with("one file", "--resume p.safetensors --steps 12 --log p.best.safetensors");
    run("%s --steps 4 --seed 5 --out other.safetensors --log other.log", run_of_text);
    refuse_with("nothing shows", "--resume p.safetensors --steps 12 --log other.log --eval-every 0");
    spill("void", "", 0);
    ok = !run("%s --steps 3 --out void --log void.log", run_of_text) && exists("void.best.safetensors");
    check(ok, "an empty file is nothing that could be lost");
    ok = !run("%s --steps 10 --out again.safetensors --again", run_of_text);
    ok = ok && !run("%s --steps 10 --out again.safetensors --again", run_of_text) &&
         strstr((char *)output, "again.safetensors of the same settings and data is replaced");
    check(ok && same_files("again.safetensors", "p.safetensors"), "--again replaces a run of the same "
                                                                  "settings and data, and says so");
    copy_file("again.safetensors", "whole.safetensors");
    pid_t child = start_and_wait_for_log("--run --data text --dim 16 --layers 1 --heads 2 --seq 12 --batch 2 "
                                         "--eval-every 100000 "
                                         "--steps 100000 --out twice.safetensors --log twice.log",
                                         "twice.log", 3);
    kill(child, SIGTERM);
    finish(child);
    copy_file("p.best.safetensors", "twice.best.safetensors");
    child = start("--run --data text --dim 16 --layers 1 --heads 2 --seq 12 --batch 2 --eval-every 100000 "
                  "--steps 100000 "
                  "--out twice.safetensors --again");
    usleep(300000);
    kill(child, SIGTERM);
    finish(child);
    check(exists("twice.best.safetensors"), "--again: a run that is stopped early leaves the best weights "
                                            "that were there");
    static const char *different[] = {"--seed 3", "--steps 11", "--lr 1e-3", "--layers 2", "--data other"};
    for (int i = 0; i < 5; i++) {
        char line[256];
        snprintf(line, sizeof(line),
                 "--data %s --dim 16 --layers %s --heads 2 --seq 12 --batch 2 --steps %s %s --out "
                 "again.safetensors --again",
                 i == 4 ? "other" : "text", i == 3 ? "2" : "1", i == 1 ? "11" : "10",
                 i == 0 || i == 2 ? different[i] : "");
        refuse_with("is there", "%s", line);
    }
    ok = !run("%s --steps 4 --out p.safetensors --log p.log --overwrite", run_of_text);
    double steps[64];
    check(ok && read_log("p.log", "step", steps, 64) == 4, "--overwrite replaces run and log");

    spill("r.safetensors.lock", "", 0); // as a run in another container would hold it
    int lock = open_work("r.safetensors.lock");
    flock(lock, LOCK_EX);
    uint64_t before = folder_state(0);
    int code = run("%s --steps 3 --out r.safetensors", run_of_text);
    check(code == 1 && strstr((char *)complaint, "another run is writing it") && folder_state(0) == before,
          "two runs never share an --out");
    close(lock);
    int log = open_work("p.log");
    flock(log, LOCK_EX);
    code = run("--resume p.safetensors --steps 6 --log p.log");
    check(code == 1 && strstr((char *)complaint, "another run is writing it"), "nor a --log");
    close(log);
    ok = !run("%s --steps 3 --out r.safetensors", run_of_text) && !exists("r.safetensors.lock");
    check(ok, "a lock that a killed run left is taken over, and removed");
    folder_state(1);
    write_data();
    release();
}

// Files of others beside a run, and what happens to its places while it trains.
static void test_strangers(void) {
    heading("files of others stay");
    size_t size;
    char line[2 * PATH_MAX], path[512];
    damaged[0] = 0;
    spill("poetry.lock", "precious\n", 9);
    uint64_t before = folder_state(0);
    int code = run("%s --steps 3 --out poetry", run_of_text);
    check(code == 1 && strstr((char *)complaint, "is no lock") && folder_state(0) == before,
          "a lock file of another program stays, and the run is refused");
    spill("m.safetensors.tmp.s1234567", "base", 4);
    refuse_with("the run's own", "--data m.safetensors.tmp.s1234567 --dim 16 --heads 2 --out m.safetensors");
    refuse_with("the run's own", "%s --steps 3 --out m.safetensors --log m.safetensors.lock", run_of_text);
    spill("z.safetensors", "hi\n", 3);
    spill("z.safetensors.lock", "", 0);
    spill("z.safetensors.tmp.s0123cafe", "x", 1);
    run("%s --steps 3 --out z.safetensors", run_of_text);
    check(exists("z.safetensors.tmp.s0123cafe"), "a run that is refused removes nothing");

    int ok = !run("%s --steps 10 --out a.safetensors --log a.log", run_of_text);
    const char *log = ok ? (const char *)slurp("a.log", &size) : NULL;
    const char *eleventh = "{\"step\": 11, \"train_loss\": 2.5, \"lr\": 1}\n{\"step\": 12, \"train_loss\": "
                           "2.5}\n";
    static const char nine[] = "{\"step\": 8, \"train_loss\": 1.5}\n{\"step\": 9, \"train_loss\": 1.5}\n";
    static const char zeros[] = "\0\0\0\x18 ftypmp42\nmore\nlines\n";
    if (!check(log != NULL, "a run of ten steps")) return;
    snprintf(line, sizeof(line), "%.4000s{\"note\": 1}\n", log);
    const struct { const char *what, *bytes; size_t size; } logs[] = {
        {"zeros", zeros, sizeof(zeros) - 1},
        {"a first step that is no number", "{\"step\": \"first\", \"note\": 1}\n", 30},
        {"lines without a train_loss", "{\"step\": 1, \"loss\": 1.5}\n{\"step\": 2, \"loss\": 1.5}\n", 50},
        {"another run's up to the step before", nine, sizeof(nine) - 1},
        {"another run's from the step behind on", eleventh, strlen(eleventh)},
        {"a torn first line", "{\"step\": ", 9},
        {"a line of another kind", line, strlen(line)},
    };
    for (size_t i = 0; i < sizeof(logs) / sizeof(logs[0]); i++) {
        spill("other.log", logs[i].bytes, logs[i].size);
        before = folder_state(0);
        code = run("--resume a.safetensors --steps 12 --log other.log");
        check(code == 2 && folder_state(0) == before, "at a resume a log of this kind is not touched: %s",
              logs[i].what);
    }
    ok = !run("--resume a.safetensors --steps 12 --out b.safetensors --log b.log");
    copy_file("b.log", "c.log");
    ok = ok && !run("--resume a.safetensors --steps 11 --out c.safetensors --log c.log");
    double steps[8];
    check(ok && read_log("c.log", "step", steps, 8) == 1 && steps[0] == 11, "a log that begins with a "
                                                                            "resumed run goes on");

    run("--data text --dim 32 --layers 1 --heads 2 --seq 12 --batch 2 --steps 40 --eval-every 5 --out "
        "wide.safetensors");
    copy_file("wide.best.safetensors", "a.best.safetensors");
    refuse_with("not the best weights", "--resume a.safetensors --steps 14");
    run("%s --steps 10 --lr 1e-2 --out own.safetensors", run_of_text);
    discard("own.safetensors");
    refuse_with("own.best.safetensors is there", "%s --steps 10 --out own.safetensors --again", run_of_text);
    run("%s --steps 10 --out base.safetensors", run_of_text);
    run("%s --steps 10 --load base.best.safetensors --out tuned.safetensors", run_of_text);
    refuse_with("tuned.safetensors is there", "%s --steps 10 --out tuned.safetensors --again", run_of_text);

    static const char endless[] = "--run --data text --dim 16 --layers 1 --heads 2 --seq 12 --batch 2 "
                                  "--steps 100000 "
                                  "--eval-every 0 --out s.safetensors --log s.log";
    pid_t child = start_and_wait_for_log(endless, "s.log", 3);
    spill("s.safetensors", "mine\n", 5);
    kill(child, SIGTERM);
    code = finish(child);
    const char *kept = complaint ? strstr((char *)complaint, "its place is ") : NULL;
    const char *mine = (const char *)slurp("s.safetensors", &size);
    ok = code == 1 && kept && size == 5 && !strncmp(mine, "mine\n", 5);
    snprintf(path, sizeof(path), "%.400s", kept ? kept + 13 : "");
    path[strcspn(path, "\n;")] = 0;
    struct stat info;
    check(ok && !stat(path, &info) && info.st_size > 1000, "a file that appears at --out stays, and the run "
                                                           "is kept beside it");
    mode_t mask = umask(0222);
    ok = !run("%s --steps 12 --out u.safetensors", run_of_text);
    umask(mask);
    check(ok, "an umask that takes the right to write away");
    snprintf(line, sizeof(line),
             "cd %s && %s --run %s --steps 3 --out so.safetensors --log so.log >so.log 2>so.err", work, self,
             run_of_text);
    check(system(line) != 0 && exists("so.err"), "a log that is standard output is refused");
    folder_state(1);
    write_data();
    release();
}

// What a stop or a kill left open is made when the run is resumed; what is said to be there is there.
static void test_pieces(void) {
    heading("missing pieces of resumed runs");
    double steps[64], losses[64], scores[64];
    size_t size = 0;
    int ok = !run("%s --steps 12 --out a.safetensors --log a.log", run_of_text);
    const char *log = (const char *)slurp("a.log", &size);
    if (!check(ok && log, "a run of 12 steps")) return;
    char cut[4096]; // killed in the validation of the whole split: the last line lacks it
    const char *validation = NULL, *next = log;
    while ((next = strstr(next, ", \"val_loss\"")) != NULL) validation = next++;
    snprintf(cut, sizeof(cut), "%.*s%s", (int)(validation - log), log, strstr(validation, ", \"lr\""));
    spill("a.log", cut, strlen(cut));
    ok = !run("--resume a.safetensors --log a.log --eval-every 5 --eval-batches 1") &&
         read_log("a.log", "step", steps, 64) == 12;
    ok = ok && read_log("a.log", "val_loss", scores, 64) == 12 && isfinite(scores[11]) &&
         read_log("a.log", "train_loss", losses, 64) == 12;
    check(ok && steps[11] == 12 && isfinite(losses[11]), "a finished run's last validation is made at "
                                                         "resume, and stands in its log line");
    ok = !run("--resume a.safetensors --log a.log --eval-every 5 --eval-batches 1") &&
         strstr((char *)output, "nothing to do");
    check(ok, "and then there is nothing to do");
    copy_file("a.safetensors", "early.safetensors");
    copy_file("a.best.safetensors", "early.best.safetensors");
    ok = !run("--resume a.safetensors --steps 20 --log a.log");
    ok = ok && !run("--resume early.safetensors --log a.log") && read_log("a.log", "step", steps, 64) == 20;
    check(ok && strstr((char *)output, "nothing to do"), "a resume that has nothing to do cuts no log");
    copy_file("early.safetensors", "a.safetensors");
    copy_file("early.best.safetensors", "a.best.safetensors");
    copy_file("a.safetensors", "b.safetensors");
    copy_file("a.best.safetensors", "b.best.safetensors");
    ok = !run("--resume b.safetensors --steps 13 --eval-every 0 --out c.safetensors") &&
         same_files("c.best.safetensors", "a.best.safetensors");
    check(ok, "resumed under another name the best weights go along");
    discard("b.best.safetensors");
    ok = !run("--resume b.safetensors --steps 13 --eval-every 0") && strstr((char *)output, "counts anew") &&
         exists("b.best.safetensors");
    check(ok, "best weights that are gone count anew, and that is said");
    run("--data text --dim 16 --layers 1 --heads 2 --seq 12 --batch 2 --eval-every 0 --steps 6 --out "
        "d.safetensors");
    discard("d.best.safetensors"); // killed in the last validation
    ok = !run("--resume d.safetensors --eval-every 0") && exists("d.best.safetensors");
    check(ok, "best weights that a killed run never wrote are written");
    pid_t child = start_and_wait_for_log("--run --data text --dim 16 --layers 1 --heads 2 --seq 12 --batch 1 "
                                         "--eval-every 3 "
                                         "--eval-batches 1000000 --steps 30 --out v.safetensors --log v.log",
                                         "v.log", 2);
    kill(child, SIGTERM); // most of the time in the validation of step 3
    int code = finish(child);
    ok = code == 130 && !run("--resume v.safetensors --log v.log --eval-every 3 --eval-batches 1000000");
    ok = ok && !run("--data text --dim 16 --layers 1 --heads 2 --seq 12 --batch 1 --eval-every 3 "
                    "--eval-batches 1000000 "
                    "--steps 30 --out u.safetensors --log u.log");
    check(ok && same_files("u.safetensors", "v.safetensors") &&
              same_files("u.best.safetensors", "v.best.safetensors") && same_logs("u.log", "v.log", 30),
          "a validation that a signal broke off is made up for: the bytes of a run that was not stopped");
    run("%s --steps 12 --seed 4 --lr 1e-4 --out other.safetensors", run_of_text);
    copy_file("other.best.safetensors", "a.best.safetensors");
    refuse_with("not the best weights of the resumed run", "--resume a.safetensors --steps 14");
    ok = !run("--resume c.safetensors --steps 15") && strstr((char *)output, "the schedule ends at step 12");
    check(ok, "a schedule that is at its end is told");
    ok = !run("--resume c.safetensors --steps 16 --lr 1e-3 --decay-steps 20") &&
         strstr((char *)output, "--lr 0.001 in place of 0.003");
    check(ok && strstr((char *)output, "--decay-steps 20 in place of 12"), "so is one that is changed at a "
                                                                           "resume");
    refuse_with("stands there twice", "%s --steps 3 --out z.safetensors --seed 3 --seed 4", run_of_text);
    refuse_with("changes nothing", "%s --steps 3 --out z.safetensors --prompt a", run_of_text);
    refuse_with("changes nothing", "--load a.safetensors --generate 3 --steps 4");
    refuse_with("changes nothing", "--load a.safetensors --eval --data text --lr 1");
    refuse_with("its bytes", "%s --steps 3 --out z.safetensors --vocab 20", run_of_text);
    folder_state(1);
    write_data();
    release();
}

// Judged before it is saved: a validation that is not finite, or that had nothing to judge.
static void test_judgement(void) {
    heading("what is saved was judged");
    enum { N = 4, T = 6 };
    double scores[512];
    char words[64];
    static const char *wild[] = {"--eval-every 1", "--eval-every 0 --save-every 1"};
    for (int i = 0; i < 2; i++) {
        int code = run("--data text --overwrite --dim 16 --layers 1 --heads 2 --seq 32 --batch 4 --lr 1e3 "
                       "--clip 0 --warmup 3 --steps 400 %s --out w.safetensors --log w.log",
                       wild[i]);
        const char *held = complaint ? strstr((char *)complaint, "w.safetensors holds step ") : NULL;
        int step = held ? atoi(held + 25) : -1, lines = read_log("w.log", "val_loss", scores, 512);
        snprintf(words, sizeof(words), "holds step %d\n", step);
        int ok = code == 1 && step > 0 && step < 400 && lines >= step;
        size_t size;
        const char *log = (const char *)slurp("w.log", &size);
        ok = ok && log && !strstr(log, "nan") && !strstr(log, "inf");
        ok = ok && !run("--load w.safetensors --data text --eval") && isfinite(atof((char *)output + 9));
        check(ok, "%s: a run that diverges leaves the last step whose validation is finite: %d", wild[i],
              step);
    }
    int32_t *inputs = random_ids(N * T, 9, 0), *targets = random_ids(N * T, 9, 0),
            *none = random_ids(N * T, 9, 0);
    for (int i = 0; i < N * T; i++) none[i] = -1;
    write_tensors("some.safetensors", N, T, inputs, targets, NULL);
    write_tensors("none.safetensors", N, T, inputs, none, NULL);
    int ok = !run("--data some.safetensors --val none.safetensors --dim 16 --layers 1 --heads 2 --batch 2 "
                  "--steps 4 --eval-every 1 --out n.safetensors --log n.log");
    read_log("n.log", "val_loss", scores, 512);
    check(ok && isnan(scores[0]) && isnan(scores[3]) &&
              same_tensors("n.best.safetensors", "n.best.safetensors"),
          "a validation without a target gives no score, the last weights are kept as the best");
    int code = run("--load n.best.safetensors --val none.safetensors --eval");
    check(code == 1 && strstr((char *)complaint, "no targets"), "and --eval says so");
    folder_state(1);
    write_data();
    release();
}

// The split that a model was validated on is what --eval evaluates, or the result says that it is not.
static void test_split(void) {
    heading("what --eval evaluates");
    size_t size;
    const char *text = (const char *)slurp("text", &size);
    spill("held.txt", text + 3000, 1500);
    spill("half.txt", text, 3000);
    int ok = !run("--data half.txt --val held.txt --dim 16 --layers 1 --heads 2 --seq 12 --batch 4 --steps "
                  "30 --eval-every 10 --out e.safetensors");
    double of_val =
        ok && !run("--load e.best.safetensors --val held.txt --eval") ? atof((char *)output + 9) : NAN;
    static const char *ways[] = {"--data half.txt --val held.txt", "--data half.txt", "--data held.txt"};
    for (int i = 0; i < 3; i++) {
        ok = !run("--load e.best.safetensors %s --eval", ways[i]) && atof((char *)output + 9) == of_val &&
             !strstr((char *)output, "last tenth");
        check(ok, "%s: its validation text, %.6f", ways[i], of_val);
    }
    ok = !run("--load e.best.safetensors --data text --eval") && strstr((char *)output, "(the last tenth of "
                                                                                        "text: not the text "
                                                                                        "that the model was "
                                                                                        "trained on)");
    check(ok, "another text: the result says so");
    discard("held.txt");
    int code = run("--load e.best.safetensors --data half.txt --eval");
    check(code == 1 && strstr((char *)complaint, "held.txt"), "its validation text is gone: refused, not the "
                                                              "training text's loss");
    folder_state(1);
    write_data();
    release();
}

static void refuse_data(const char *looks, const void *bytes, size_t size) {
    spill("odd", bytes, size);
    reason = looks;
    refuse(1, "--data odd --dim 16 --layers 1 --heads 2 --seq 4 --batch 2 --steps 2 --overwrite --out "
              "odd.safetensors");
    reason = "";
    int ok = !run("--data odd --format bytes --dim 16 --layers 1 --heads 2 --seq 4 --batch 2 --steps 2 "
                  "--overwrite --out odd.safetensors");
    check(ok && !run("--resume odd.safetensors --steps 3"),
          "%s: --format bytes takes it, and a resumed run knows", looks);
    release();
}

// Formats are told by what a file holds.
static void test_formats(void) {
    heading("formats of data");
    enum { SIZE = 4000, N = 6, T = 8 };
    static unsigned char bytes[2 * SIZE];
    static const char words[] = "to be, or not to be: that is the question\n";
    damaged[0] = 0;
    for (int i = 0; i < SIZE; i++) bytes[2 * i] = (unsigned char)words[i % (sizeof(words) - 1)];
    refuse_data("UTF-16", bytes, sizeof(bytes));
    for (int i = 0; i < 2 * SIZE; i++) bytes[i] = (unsigned char)(i % 2 ? 0 : random_int(0, 64));
    refuse_data("16-bit", bytes, sizeof(bytes));
    for (int i = 0; i < 2 * SIZE; i++) bytes[i] = (unsigned char)random_int(0, i % 2 ? 196 : 255);
    refuse_data("numbers", bytes, sizeof(bytes));
    for (int i = 0; i < 2 * SIZE; i++) bytes[i] = (unsigned char)(i % 4 < 2 ? random_int(0, 255) : 0);
    refuse_data("32-bit", bytes, sizeof(bytes));
    memcpy(bytes, "PK\3\4", 4);
    refuse_data("zip", bytes, sizeof(bytes));
    memcpy(bytes, "\x89PNG", 4);
    refuse_data("PNG", bytes, sizeof(bytes));
    memcpy(bytes, "\xFF\xFE", 2);
    refuse_data("UTF-16", bytes, sizeof(bytes));
    static const char *texts[] = {"caf\xE9 au lait, s'il vous pla\xEEt; ",
                                  "\xE4\xBD\xA0\xE5\xA5\xBD\xE4\xB8\x96\xE7\x95\x8C ",
                                  "\x82\xB1\x82\xF1\x82\xC9\x82\xBF\x82\xCD ",
                                  "PK is no zip archive; GIF8 no picture. ",
                                  "e\bee\b",
                                  "\033[1mbold\033[0m "};
    for (int i = 0; i < 6; i++) { // Latin-1, UTF-8, Shift-JIS, letters of signatures, overstruck, escapes
        size_t length = strlen(texts[i]);
        for (int k = 0; k < 2 * SIZE; k++) bytes[k] = (unsigned char)texts[i][(size_t)k % length];
        spill("text8", bytes, sizeof(bytes));
        int ok = !run("--data text8 --dim 16 --layers 1 --heads 2 --seq 8 --batch 2 --steps 2 --overwrite "
                      "--out t.safetensors");
        check(ok && !complaint_size, "text number %d is taken without a word", i + 1);
    }
    for (int k = 0; k < SIZE; k++) bytes[k] = (unsigned char)(k % 37 == 36 ? 0 : 'a' + k % 5);
    spill("zeros", bytes, SIZE);
    int ok = !run("--data zeros --dim 16 --layers 1 --heads 2 --seq 8 --batch 2 --steps 2 --overwrite --out "
                  "t.safetensors");
    check(ok && complaint_size && strstr((char *)complaint, "108 bytes are 0"), "a text with zero bytes is "
                                                                                "taken with a warning");

    int32_t header[3] = {20240801, 7, 500};
    static unsigned char wide[1024 + 4 * 500], narrow[1024 + 2 * 500];
    for (int i = 0; i < 500; i++) {
        uint32_t id = (uint32_t)random_int(0, 60000);
        uint16_t half = (uint16_t)id;
        memcpy(wide + 1024 + 4 * i, &id, 4);
        memcpy(narrow + 1024 + 2 * i, &half, 2);
    }
    memcpy(wide, header, sizeof(header));
    header[0] = 20240520;
    header[1] = 1;
    memcpy(narrow, header, sizeof(header));
    spill("wide.bin", wide, sizeof(wide));
    spill("narrow.bin", narrow, sizeof(narrow));
    static const char shape[] = "--vocab 60001 --dim 4 --layers 1 --heads 2 --seq 8 --batch 2 --steps 3 "
                                "--eval-every 0 --overwrite";
    ok = !run("--data wide.bin %s --out a.safetensors", shape) &&
         !run("--data narrow.bin %s --out b.safetensors", shape);
    check(ok && same_tensors("a.safetensors", "b.safetensors"), "a Llama 3 shard of the same tokens as a "
                                                                "GPT-2 shard trains the same weights");
    ok = !run("--data narrow.bin --dim 2 --layers 1 --heads 1 --seq 4 --batch 1 --steps 0 --vocab 60001 "
              "--out c.safetensors");
    uint32_t large = 1 << 24;
    memcpy(wide + 1024 + 40, &large, 4);
    spill("large.bin", wide, sizeof(wide));
    reason = "below 2^24";
    refuse(1, "--data large.bin --dim 2 --layers 1 --heads 1 --seq 4 --batch 1 --steps 1 --out "
              "c.safetensors");

    int32_t *inputs = random_ids(N * T, 18, 0), *targets = random_ids(N * T, 18, 1);
    inputs[5] = 18;
    write_tensors("plain.safetensors", N, T, inputs, targets, NULL);
    copy_file("plain.safetensors", "plain.st");
    ok = !run("--data plain.st --dim 16 --layers 1 --heads 2 --batch 2 --steps 2 --overwrite --out "
              "s.safetensors") &&
         strstr((char *)output, "T 8, V 19,");
    check(ok, "an example set is known without its name; its vocabulary is the largest id + 1, as its "
              "metadata says less");
    inputs[5] = 1 << 24;
    write_tensors("far.safetensors", N, T, inputs, targets, NULL);
    refuse(1, "--data far.safetensors --dim 2 --layers 1 --heads 1 --batch 2 --steps 1 --out c.safetensors");
    reason = "";
    folder_state(1);
    write_data();
    release();
}

// Weights in half precision, names that a shell would take apart, descriptors that are closed, characters cut
// in two.
static void test_oddities(void) {
    heading("smaller things");
    Safetensors file;
    char path[512], error[ERROR_SIZE];
    size_t size = 0;
    int ok = !run("%s --steps 12 --out a.safetensors", run_of_text);
    snprintf(path, sizeof(path), "%s/a.best.safetensors", work);
    if (!check(ok && !safetensors_read(&file, path, error), "a checkpoint")) return;
    FileTensor *halves = (FileTensor *)lend(sizeof(FileTensor) * (size_t)file.n_tensors);
    for (int bf16 = 0; bf16 < 2; bf16++) {
        double worst = 0;
        for (int i = 0; i < file.n_tensors; i++) {
            FileTensor *t = &halves[i];
            *t = file.tensors[i];
            if (strcmp(t->dtype, "F32")) continue;
            uint16_t *numbers = (uint16_t *)lend(2 * (size_t)t->count + 2);
            for (int64_t k = 0; k < t->count; k++) {
                float value = (float)number_of(&file.tensors[i], k);
                uint32_t bits;
                memcpy(&bits, &value, 4);
                int exponent =
                    (int)(bits >> 23 & 255) - 127 + 15; // numbers that a half holds as normal ones, cut off
                uint16_t half =
                    (uint16_t)(bits >> 31 << 15 |
                               (exponent > 0 ? (uint32_t)exponent << 10 | (bits >> 13 & 1023) : 0));
                numbers[k] = bf16 ? (uint16_t)(bits >> 16) : half;
            }
            strcpy(t->dtype, bf16 ? "BF16" : "F16");
            t->size = 2 * (size_t)t->count;
            t->data = (const unsigned char *)numbers;
            for (int64_t k = 0; k < t->count; k++) {
                double value = number_of(&file.tensors[i], k), limit = bf16                   ? 1.0 / 128
                                                                       : fabs(value) < 6.2e-5 ? 1
                                                                                              : 1.0 / 1024;
                worst_of(&worst, fabs((double)float_at(t, k) - value) / (fabs(value) * limit + 1e-30));
            }
        }
        snprintf(path, sizeof(path), "%s/half.safetensors", work);
        Place place;
        ok = !settle(&place, path, NULL, error);
        ok = ok && !safetensors_write(&place, halves, file.n_tensors, file.meta, file.n_meta, 0, NULL, error);
        ok = ok && !run("--load half.safetensors --data text --eval") && isfinite(atof((char *)output + 9));
        check_error(ok ? worst : NAN, 1, "weights in %s are read, their error in units of its last place",
                    bf16 ? "BF16" : "F16");
    }
    static const unsigned char special[] = {
        0, 0x7C, 0, 0xFC, 1, 0x7C, 1, 0, 0xFF, 3, 0, 0x80, 0, 0x3C}; // ±∞, NaN, 2^-24, 1023·2^-24, -0, 1
    FileTensor t = {path, "F16", 1, {7}, 7, 14, special};
    float f[7];
    for (int i = 0; i < 7; i++) f[i] = float_at(&t, i);
    ok = isinf(f[0]) && f[0] > 0 && isinf(f[1]) && f[1] < 0 && isnan(f[2]) && f[3] == ldexpf(1, -24) &&
         f[4] == ldexpf(1023, -24) && f[5] == 0 && f[6] == 1;
    check(ok, "F16: infinities, NaN, the smallest numbers");
    safetensors_free(&file);

    pid_t child = start_and_wait_for_log("--run --data text --dim 16 --layers 1 --heads 2 --seq 12 --batch 2 "
                                         "--steps 100000 --out it's~$a.safetensors --log it's.log",
                                         "it's.log", 3);
    kill(child, SIGTERM);
    kill(child, SIGINT);
    usleep(20000);
    kill(child, SIGTERM);
    int code = finish(child);
    char *command = output ? strstr((char *)output, "go on with: ") : NULL;
    ok = code == 130 && command && strstr(command, " --resume 'it'\\''s $a.safetensors' ") &&
         exists("it's $a.safetensors");
    check(ok, "three signals, and a name that a shell takes apart: saved, and the command is quoted");
    char shell[1024];
    snprintf(shell, sizeof(shell), "cd %s && printf %%s %s", work, command ? strstr(command, "'it") : "");
    FILE *pipe = popen(shell, "r");
    char word[256] = "";
    if (pipe && !fgets(word, sizeof(word), pipe)) word[0] = 0;
    if (pipe) pclose(pipe);
    check(!strncmp(word, "it's $a.safetensors", 19), "a shell reads it as the same name");

    fflush(stdout);
    if (!(child = fork())) { // with 0, 1 and 2 closed
        char *words[] = {self,
                         (char *)"--run",
                         (char *)"--data",
                         (char *)"text",
                         (char *)"--dim",
                         (char *)"16",
                         (char *)"--layers",
                         (char *)"1",
                         (char *)"--heads",
                         (char *)"2",
                         (char *)"--seq",
                         (char *)"12",
                         (char *)"--batch",
                         (char *)"2",
                         (char *)"--steps",
                         (char *)"3",
                         (char *)"--out",
                         (char *)"z.safetensors",
                         (char *)"--log",
                         (char *)"z.log",
                         NULL};
        if (chdir(work)) _exit(126);
        close(0);
        close(1);
        close(2);
        execv(self, words);
        _exit(127);
    }
    int status = 0;
    waitpid(child, &status, 0);
    double steps[8];
    ok = WIFEXITED(status) && WEXITSTATUS(status) == 1 && read_log("z.log", "step", steps, 8) == 3;
    check(ok && !strncmp((char *)slurp("z.log", &size), "{\"step\": 1, ", 12), "descriptors 0 to 2 closed: "
                                                                               "the log holds the log alone");

    snprintf(path, sizeof(path), "%s/link.safetensors", work);
    ok = !symlink("there.safetensors", path) && !run("%s --steps 3 --out link.safetensors", run_of_text);
    struct stat info;
    check(ok && exists("there.safetensors") && !lstat(path, &info) && S_ISLNK(info.st_mode), "a link to a "
                                                                                             "file that is "
                                                                                             "not there yet "
                                                                                             "stays a link");

    static const unsigned char cut[] = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\xFF\x80"
                                       "b\xE2\x82"; // é, €, an emoji, no UTF-8, half a €
    snprintf(path, sizeof(path), "%s/print", work);
    fflush(stdout);
    int kept = dup(1), to = open(path, O_RDWR | O_CREAT | O_TRUNC, 0666);
    dup2(to, 1);
    Character character = {{0}, 0};
    int whole = 1;
    for (size_t i = 0; i < sizeof(cut) - 1; i++) {
        print_byte(&character, cut[i]);
        fflush(stdout);
        off_t at = lseek(to, 0, SEEK_END);
        whole = whole && (at == 0 || at == 1 || at == 3 || at == 6 || at >= 10);
    }
    dup2(kept, 1);
    close(kept);
    close(to);
    const unsigned char *printed = slurp("print", &size);
    check(whole && printed && size == sizeof(cut) - 3 && !memcmp(printed, cut, size), "generation prints "
                                                                                      "whole characters, and "
                                                                                      "what is no UTF-8 as "
                                                                                      "it is");
    folder_state(1);
    write_data();
    release();
}

// The smallest and the oddest runs, with every mixer.
static void test_edges(void) {
    heading("edges: T 1, B 1, V 1 and 65536, D 2, one byte, no target");
    enum { TOKENS = 400, N = 4, T = 6 };
    uint64_t before = chance;
    static char same[200];
    static unsigned char shard[1024 + 2 * TOKENS];
    int32_t header[3] = {20240520, 1, TOKENS}, *inputs = random_ids(N * T, 9, 0), *targets = random_ids(N * T, 9, 0);
    memset(same, 'a', sizeof(same));
    spill("same", same, sizeof(same));
    memcpy(shard, header, sizeof(header));
    for (int i = 0; i < TOKENS; i++) { shard[1024 + 2 * i] = (unsigned char)random_int(0, 255); shard[1025 + 2 * i] = (unsigned char)random_int(0, 255); }
    shard[1024] = shard[1025] = 255;
    spill("wide.bin", shard, sizeof(shard));
    for (int i = 0; i < N * T; i++) targets[i] = -1;
    write_tensors("none.safetensors", N, T, inputs, targets, NULL);
    copy_file("none.safetensors", "nothing.safetensors");
    for (int mixer = 0; mixer < N_MIXERS; mixer++) {
        Config c = config_with(mixer, 11, 16, 2, 2, 1, 40);
        Model *m = create(&c, 1, 40, TRAIN);
        int *ids = random_ids(40, 11, 0);
        Dropout none = {0, 0, 0};
        shake_weights(m, 0.1);
        int factor = mixer == MAMBA2 ? 30 : 1000; // its state is a product of three projections: no more fits a float
        for (int r = 0; r < m->table.n; r++) // nor does the exponential of a larger A_log
            for (int64_t i = 0; i < m->table.rows[r].count && !strstr(m->table.rows[r].name, "A_log"); i++) m->params[m->table.rows[r].offset + i] *= (real)factor;
        model_forward(m, ids, ids, 1, 40, none);
        double loss = model_loss(m) / 40;
        check(isfinite(loss), "%s, weights %d times as large: the loss is finite (%.3g)", mixers[mixer].name, factor, loss);
        model_free(m);
        release();
    }
    for (int i = 0; i < N_MIXERS; i++) {
        const char *name = mixers[i].name;
        double loss[8], val[8];
        int ok = !run("--data text --overwrite --mixer %s --dim 2 --heads 1 --layers 1 --seq 1 --batch 1 "
                      "--steps 3 --eval-every 1 --out e.safetensors --log e.log",
                      name);
        check(ok && read_log("e.log", "train_loss", loss, 8) == 3 && fabs(loss[0] - log(12)) < 0.5, "%s: T 1, B 1, D 2", name);
        ok = !run("--load e.safetensors --generate 5 --prompt c") && output_size == 7 && !run("--load e.safetensors --generate 5 --prompt cdefghij") && output_size == 14;
        ok = ok && !run("--load e.safetensors --generate 5 --window 3 --prompt cdefghij") && output_size == 14 && !run("--load e.safetensors --generate 5") && output_size == 6;
        check(ok, "%s: a prompt of one token, one longer than the window, none", name);
        ok = !run("--data same --overwrite --mixer %s --dim 2 --heads 1 --layers 2 --seq 5 --batch 2 --steps "
                  "3 --eval-every 1 --out v.safetensors --log v.log",
                  name);
        ok = ok && read_log("v.log", "train_loss", loss, 8) == 3 && read_log("v.log", "val_loss", val, 8) == 3 && loss[0] == 0 && loss[2] == 0 && val[2] == 0;
        check(ok && !run("--load v.safetensors --generate 5") && !strcmp((char *)output, "aaaaa\n"), "%s: text of one distinct byte, V 1: loss 0", name);
        ok = !run("--data wide.bin --overwrite --vocab 65536 --mixer %s --dim 2 --heads 1 --layers 1 --seq 3 "
                  "--batch 2 --steps 2 --eval-every 0 --out w.safetensors --log w.log",
                  name);
        ok = ok && read_log("w.log", "train_loss", loss, 8) == 2 && fabs(loss[0] - log(65536)) < 0.05;
        check(ok && !run("--load w.safetensors --generate 3 --prompt 65535") && !strncmp((char *)output, "65535 ", 6), "%s: V 65536", name);
        ok = !run("--data none.safetensors --val nothing.safetensors --mixer %s " TINY "--batch 2 --warmup 5 "
                                                                                       "--seq 6 --steps 2 "
                                                                                       "--weight-decay 0 "
                                                                                       "--eval-every 0 --out "
                                                                                       "m.safetensors --log "
                                                                                       "m.log",
                  name);
        ok = ok && read_log("m.log", "train_loss", loss, 8) == 2 && loss[0] == 0 && loss[1] == 0 && read_log("m.log", "grad_norm", loss, 8) == 2 && loss[0] == 0;
        ok = ok && !run("--data none.safetensors --val nothing.safetensors --mixer %s " TINY
                        "--batch 2 --warmup 5 --seq 6 --steps 1 --weight-decay 0 --eval-every 0 --out "
                        "n.safetensors",
                        name);
        check(ok && same_tensors("m.best.safetensors", "n.best.safetensors"),
              "%s: all targets ignored: loss and gradient 0, the weights do not move", name);
    }
    for (int i = 0; i < N_MIXERS; i++) { // the last sample is what the saved weights generate
        const char *name = mixers[i].name;
        int ok = !run("--data text --mixer %s " SMALL "--steps 6 --eval-every 0 --sample-every 2 --out p.safetensors", name);
        const char *said = (char *)output, *last = said;
        for (const char *at = said; ok && (at = strstr(at, "---\n")); at += 4) if (strstr(at + 4, "---\n")) last = at + 4;
        ok = ok && !run("--load p.best.safetensors --generate 200 --seed 1343") && !strncmp(last, (char *)output, output_size) && output_size == 201;
        ok = ok && !run("--data text --mixer %s " SMALL "--steps 6 --eval-every 0 --out q.safetensors", name) && same_files("p.safetensors", "q.safetensors");
        check(ok, "%s: samples while training are those of the saved weights, and change no bit of the run", name);
    }
    chance = before;
    release();
}

// Writes a file of a machine that is not this one, in the work folder's subfolder `there`.
static void pretend(const char *name, const char *text) {
    char path[512];
    snprintf(path, sizeof(path), "%s/there/%s", work, name);
    for (char *slash = strchr(path + strlen(work) + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(path, 0777);
        *slash = '/';
    }
    snprintf(path, sizeof(path), "there/%s", name);
    spill(path, text, strlen(text));
}

static void forget(const char *path) { // removes a folder with all that it holds
    char inner[600];
    DIR *dir = opendir(path);
    for (struct dirent *entry; dir && (entry = readdir(dir)) != NULL;) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        snprintf(inner, sizeof(inner), "%.300s/%.255s", path, entry->d_name);
        if (unlink(inner)) forget(inner);
    }
    if (dir) closedir(dir);
    rmdir(path);
}

#if defined(_OPENMP) && defined(__linux__)
static void without_wishes(void) { // the environment of a user who wishes for nothing
    static const char *const names[] = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT",
                                        "OMP_PROC_BIND",   "OMP_PLACES",      "KMP_BLOCKTIME"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) unsetenv(names[i]);
}
static void on_one_core(void) {
    without_wishes();
    cpu_set_t all, one;
    CPU_ZERO(&one);
    sched_getaffinity(0, sizeof(all), &all);
    for (int i = 0; i < CPU_SETSIZE && !CPU_COUNT(&one); i++)
        if (CPU_ISSET(i, &all)) CPU_SET(i, &one);
    sched_setaffinity(0, sizeof(one), &one);
}
#endif

#if defined(_OPENMP) && defined(__linux__) && !defined(KMP_VERSION_MAJOR)
static void with_a_policy(void) { unsetenv("GOMP_SPINCOUNT"); } // and OMP_WAIT_POLICY=passive, as the test itself

// Whether the environment with which a program was started last holds the text.
static int started_with(pid_t child, const char *text) {
    static char environment[1 << 16];
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/environ", (int)child);
    int fd = open(path, O_RDONLY);
    ssize_t n = fd < 0 ? 0 : read(fd, environment, sizeof(environment));
    if (fd >= 0) close(fd);
    return n > 0 && memmem(environment, (size_t)n, text, strlen(text)) != NULL;
}
#endif

static void test_threads_allowed(void) {
    heading("as many threads as the process may use, and how they wait");
    static const struct { const char *name, *files[4][2]; int threads;
    } cases[] = {
        {"no /sys, no /proc", {{NULL, NULL}}, 8},
        {"version 2, no quota",
         {{"proc/self/cgroup", "0::/a\n"}, {"sys/fs/cgroup/a/cpu.max", "max 100000\n"}},
         8},
        {"version 2, 1.5 cores",
         {{"proc/self/cgroup", "0::/a\n"}, {"sys/fs/cgroup/a/cpu.max", "150000 100000\n"}},
         2},
        {"version 2, half a core further up",
         {{"proc/self/cgroup", "0::/a/b/c\n"},
          {"sys/fs/cgroup/a/cpu.max", "10000 20000\n"},
          {"sys/fs/cgroup/a/b/c/cpu.max", "300000 100000\n"}},
         1},
        {"version 2 in a container, 3 cores",
         {{"proc/self/cgroup", "0::/\n"}, {"sys/fs/cgroup/cpu.max", "300000 100000\n"}},
         3},
        {"version 1 in a container, 2.2 cores",
         {{"proc/self/cgroup", "5:memory:/m\n3:cpuacct,cpu:/docker/0a1b\n"},
          {"sys/fs/cgroup/cpu/cpu.cfs_quota_us", "220000\n"},
          {"sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"}},
         3},
        {"version 1, no quota",
         {{"proc/self/cgroup", "3:cpu:/a\n"},
          {"sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "-1\n"},
          {"sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n"}},
         8},
        {"version 1, another controller's",
         {{"proc/self/cgroup", "3:cpuset:/a\n"},
          {"sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "100000\n"},
          {"sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n"}},
         8},
    };
    char root[96];
    snprintf(root, sizeof(root), "%s/there", work);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        for (int f = 0; f < 4 && cases[i].files[f][0]; f++)
            pretend(cases[i].files[f][0], cases[i].files[f][1]);
        int threads = threads_within(root, 8);
        check(threads == cases[i].threads, "%s: %d of 8 threads", cases[i].name, threads);
        forget(root);
    }
#if defined(_OPENMP) && defined(__linux__)
    prepare_child = on_one_core;
    int code = run("--data text " TINY "--seq 12 --batch 2 --steps 1 --eval-every 0 --out u.safetensors");
    check(!code && output && strstr((char *)output, ", 1 threads,"), "bound to one core: 1 thread, told at "
                                                                     "the start");
    prepare_child = NULL;
    n_threads = "3";
    code = run("--data text " TINY "--seq 12 --batch 2 --steps 1 --eval-every 0 --out u.safetensors");
    check(!code && output && strstr((char *)output, ", 3 threads,"), "OMP_NUM_THREADS=3 rules");
    n_threads = "2";
#endif
#if defined(_OPENMP) && defined(__linux__) && !defined(KMP_VERSION_MAJOR)
    static const char line[] = "--run --data text " SMALL "--steps 100000 --eval-every 0 --out u.safetensors "
                                                          "--log u.log";
    for (int wishes = 0; wishes < 2 && !access("/proc/self/exe", R_OK); wishes++) { // needs /proc
        discard("u.log");
        prepare_child = wishes ? with_a_policy : without_wishes; // the test itself runs with OMP_WAIT_POLICY=passive
        pid_t child = start_and_wait_for_log(line, "u.log", 2);
        int bounded = started_with(child, "GOMP_SPINCOUNT=");
        int again = started_with(child, "SESSA_STARTED_AGAIN=");
        kill(child, SIGINT);
        code = finish(child);
        if (wishes)
            check(code == 130 && !bounded && !again, "OMP_WAIT_POLICY set: that rules, the program is "
                                                     "started once");
        else
            check(code == 130 && bounded == again && (again || omp_get_num_procs() == 1), "waiting is "
                                                                                          "bounded: started "
                                                                                          "again, once, with "
                                                                                          "GOMP_SPINCOUNT");
    }
    prepare_child = NULL;
    fflush(stdout);
    pid_t child = fork();
    if (!child) { // what has been started again, and what finds a mark that is not its own
        char mark[32], *none[] = {self, NULL};
        without_wishes();
        snprintf(mark, sizeof(mark), "%d", (int)getpid());
        setenv("GOMP_SPINCOUNT", "1000", 1);
        setenv("SESSA_STARTED_AGAIN", mark, 1);
        start_again(none);
        int clean = !getenv("GOMP_SPINCOUNT") && !getenv("SESSA_STARTED_AGAIN");
        setenv("GOMP_SPINCOUNT", "7", 1);
        setenv("SESSA_STARTED_AGAIN", "1", 1);
        start_again(none);
        _exit(clean && getenv("GOMP_SPINCOUNT") && !getenv("SESSA_STARTED_AGAIN") ? 0 : 1);
    }
    check(!finish(child), "then its environment is as it was before");
#endif
    release();
}

static void on_small_stacks(void) {
    struct rlimit limit = {256 << 10, 256 << 10};
    setrlimit(RLIMIT_STACK, &limit);
    setenv("OMP_STACKSIZE", "128k", 1);
}

static void test_stacks(void) {
    heading("stacks of 128 KiB a thread, 256 KiB for the first");
    prepare_child = on_small_stacks;
    for (int i = 0; i < N_MIXERS; i++) { // threads at products together; each at whole sequences
        const char *name = mixers[i].name;
        int ok = !run("--data text --overwrite --mixer %s --dim 96 --layers 2 --heads 4 --seq 200 --batch 4 "
                      "--steps 2 --eval-every 1 --sample-every 2 --log s.log --out s.safetensors",
                      name);
        ok = ok && !run("--data text --overwrite --mixer %s --dim 96 --layers 1 --heads 1 --seq 300 --batch "
                        "1 --steps 2 --eval-every 0 --out s.safetensors",
                        name);
        ok = ok && (IS_DOUBLE || !run("--resume s.safetensors --steps 3 --eval-every 0")) &&
             !run("--load s.best.safetensors --generate 20");
        check(ok, "%s: trains, saves, resumes and generates", name);
    }
    prepare_child = NULL;
    release();
}

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
static int bounded_resource;
static void with_half_a_gib(void) {
    struct rlimit limit = {512 << 20, 512 << 20};
    setrlimit(bounded_resource, &limit);
}
#endif

static void test_memory_limits(void) {
    heading("what does not fit is refused before it is touched");
    run("--data text " SMALL "--steps 2 --out good.safetensors");
    static const char meminfo[] = "MemTotal:  800000 kB\nMemFree:  3 kB\nMemAvailable:  409600 kB\nSwapFree: "
                                  " 0 kB\n";
    static const struct { const char *name, *files[5][2]; double mib; const char *who;
    } cases[] = {
        {"the machine", {{"proc/meminfo", meminfo}}, 400, "this machine"},
        {"the machine, 100 MiB of swap",
         {{"proc/meminfo", "MemAvailable:  409600 kB\nSwapFree:  102400 kB\n"}},
         500,
         "this machine"},
        {"version 2",
         {{"proc/meminfo", meminfo},
          {"proc/self/cgroup", "0::/a\n"},
          {"sys/fs/cgroup/a/memory.max", "104857600\n"},
          {"sys/fs/cgroup/a/memory.current", "62914560\n"}},
         40,
         "its cgroup"},
        {"version 2, half of it cache of files",
         {{"proc/meminfo", meminfo},
          {"proc/self/cgroup", "0::/a\n"},
          {"sys/fs/cgroup/a/memory.max", "104857600\n"},
          {"sys/fs/cgroup/a/memory.current", "62914560\n"},
          {"sys/fs/cgroup/a/memory.stat", "anon 31457280\ninactive_file 20971520\nactive_file 10485760\n"}},
         70,
         "its cgroup"},
        {"version 2, further up",
         {{"proc/meminfo", meminfo},
          {"proc/self/cgroup", "0::/a/b\n"},
          {"sys/fs/cgroup/a/b/memory.max", "max\n"},
          {"sys/fs/cgroup/a/memory.max", "104857600\n"},
          {"sys/fs/cgroup/a/memory.current", "94371840\n"}},
         10,
         "its cgroup"},
        {"version 1 in a container",
         {{"proc/meminfo", meminfo},
          {"proc/self/cgroup", "4:memory:/docker/0a1b\n"},
          {"sys/fs/cgroup/memory/memory.limit_in_bytes", "209715200\n"},
          {"sys/fs/cgroup/memory/memory.usage_in_bytes", "209715201\n"},
          {"sys/fs/cgroup/memory/memory.stat", "inactive_file 7\ntotal_inactive_file 1048577\n"}},
         1,
         "its cgroup"},
        {"version 1, no limit",
         {{"proc/meminfo", meminfo},
          {"proc/self/cgroup", "4:memory:/a\n"},
          {"sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712\n"},
          {"sys/fs/cgroup/memory/a/memory.usage_in_bytes", "1\n"}},
         400,
         "this machine"},
    };
    char root[96];
    snprintf(root, sizeof(root), "%s/there", work);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        for (int f = 0; f < 5 && cases[i].files[f][0]; f++)
            pretend(cases[i].files[f][0], cases[i].files[f][1]);
        MemoryLeft left = memory_left(root);
        check(left.bytes == cases[i].mib * 0x1p20 && !strcmp(left.who, cases[i].who),
              "%s: %s leaves %.1f MiB", cases[i].name, left.who, left.bytes / 0x1p20);
        forget(root);
    }
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__) // whose shadow is larger than any limit
    static const struct { int resource; const char *name, *options;
    } limits[] = {
        {RLIMIT_AS, "ulimit -v",
         "--data text --dim 2048 --layers 2 --seq 12 --batch 2 --steps 1 --out u.safetensors"},
        {RLIMIT_DATA, "ulimit -d",
         "--data text --dim 16 --layers 1 --seq 500 --batch 4000 --steps 1 --out u.safetensors"},
        {RLIMIT_AS, "ulimit -v", "--data sparse --format bytes " TINY "--steps 1 --out u.safetensors"},
        {RLIMIT_DATA, "ulimit -d", "--load good.safetensors --generate 900000000"},
    };
    char path[256];
    spill("sparse", "", 0);
    snprintf(path, sizeof(path), "%s/sparse", work);
    int made = !truncate(path, 1 << 30);
    prepare_child = with_half_a_gib;
    for (int i = 0; i < 4; i++) {
        struct rusage usage;
        char line[512];
        int status = 0;
        bounded_resource = limits[i].resource;
        snprintf(line, sizeof(line), "--run %s", limits[i].options);
        pid_t child = start(line);
        wait4(child, &status, 0, &usage);
        complaint = slurp("../stderr", &complaint_size);
        const char *first = (const char *)complaint, *end = first ? strchr(first, '\n') : NULL;
        int told =
            end && !end[1] && strstr(first, "does not fit: it needs ") && strstr(first, limits[i].name);
        if (told) complaint[end - first] = 0;
        check(made && WIFEXITED(status) && WEXITSTATUS(status) == 1 && told && usage.ru_maxrss < 100 << 10,
              "%s of 512 MiB, %ld MiB touched: %.100s", limits[i].name, (long)usage.ru_maxrss >> 10,
              told ? strstr(first, "it needs") : "not refused");
    }
    prepare_child = NULL;
    discard("sparse");
#endif
    release();
}

// A terminal, as far as the program's lines go: a window of so many columns, the rows that went up included.
enum { SCREEN_ROWS = 400, SCREEN_COLUMNS = 256 };
typedef struct {
    char rows[SCREEN_ROWS][SCREEN_COLUMNS + 1];
    int columns, row, column, wraps, in_command,
        commands; // wraps: of lines of steps; commands: escape sequences
} Screen;

static void show(Screen *s, const char *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) {
        char c = bytes[i], *row = s->rows[s->row];
        if (c == 27) s->in_command = 1;
        else if (s->in_command) {
            s->in_command = !isalpha((unsigned char)c);
            if (c != 'J') continue;
            s->commands++;
            memset(row + s->column, 0, (size_t)(SCREEN_COLUMNS - s->column));
            memset(s->rows + s->row + 1, 0, sizeof(s->rows[0]) * (size_t)(SCREEN_ROWS - 1 - s->row));
        } else if (c == '\r') s->column = 0;
        else if (c == '\n') s->row += s->row + 1 < SCREEN_ROWS;
        else {
            if (s->column == s->columns) {
                s->wraps += !strncmp(row, "step", 4) || !strncmp(row, "val", 3) || !strncmp(row, "loss", 4);
                s->column = 0;
                s->row += s->row + 1 < SCREEN_ROWS;
            }
            for (int k = 0; k < s->column; k++) if (!s->rows[s->row][k]) s->rows[s->row][k] = ' ';
            s->rows[s->row][s->column++] = c;
        }
    }
}

static int terminal_fd;
static const char *terminal_name, *terminal_type;
static void at_terminal(void) {
    setsid();
    int fd = open(terminal_name, O_RDWR);
#ifdef TIOCSCTTY
    ioctl(fd, TIOCSCTTY, 0);
#endif
    dup2(fd, 0);
    dup2(fd, 1);
    dup2(fd, 2);
    close(terminal_fd);
    setenv("TERM", terminal_type, 1);
    unsetenv("COLUMNS");
}

static void resize(Screen *s, int columns) {
    struct winsize size;
    memset(&size, 0, sizeof(size));
    size.ws_col = (unsigned short)columns;
    size.ws_row = 24;
    ioctl(terminal_fd, TIOCSWINSZ, &size);
    s->columns = columns ? columns : 80;
}

// Shows what comes within so many milliseconds of silence, or up to the text; 0 at the end of it all.
static int watch(Screen *s, int patience, const char *text) {
    static char bytes[1 << 16];
    struct pollfd ready = {terminal_fd, POLLIN, 0};
    while (poll(&ready, 1, patience) > 0) {
        ssize_t n = read(terminal_fd, bytes, sizeof(bytes));
        if (n <= 0) return 0;
        show(s, bytes, (size_t)n);
        if (text && memmem(bytes, (size_t)n, text, strlen(text))) break;
    }
    return 1;
}

static pid_t start_at_terminal(Screen *s, int columns, const char *type, const char *line) {
    memset(s, 0, sizeof(*s));
    terminal_fd = posix_openpt(O_RDWR | O_NOCTTY);
    if (terminal_fd < 0 || grantpt(terminal_fd) || unlockpt(terminal_fd) ||
        !(terminal_name = ptsname(terminal_fd)))
        return -1;
    int slave = open(terminal_name, O_RDWR | O_NOCTTY); // macOS takes a size only while someone has it open
    resize(s, columns);
    terminal_type = type;
    prepare_child = at_terminal;
    pid_t child = start(line);
    prepare_child = NULL;
    close(slave);
    return child;
}

static void test_terminal(void) {
    heading("the line of a step: in place on a terminal of any width, often enough in a file");
    static const struct { int columns; const char *type, *row;
    } cases[] = {{20, "xterm", "val "},
                 {40, "xterm", "step 10/30 | loss "},
                 {80, "xterm", "step 10/30 | loss "},
                 {200, "xterm", "step 10/30 | loss "},
                 {0, "xterm", "step 10/30 | loss "},
                 {40, "dumb", "step 10/30 | loss "}};
    static Screen s;
    int status = 0;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        pid_t child = start_at_terminal(&s, cases[i].columns, cases[i].type,
                                        "--run --data text " SMALL "--steps 30 --eval-every 10 "
                                                                   "--eval-batches 2 --out y.safetensors");
        if (child < 0) {
            printf("  no pseudo-terminal here: left out\n");
            release();
            return;
        }
        while (watch(&s, 60000, NULL)) continue;
        waitpid(child, &status, 0);
        close(terminal_fd);
        int rows = 0, whole = 0, spaces = 0;
        const char *first = "";
        for (int r = 0; r < SCREEN_ROWS; r++) {
            char *row = s.rows[r], *val = strstr(row, "val "), *end = row + strlen(row);
            while (end > row && end[-1] == ' ') *--end = 0;
            if (strncmp(row, "step", 4) && strncmp(row, "val ", 4) && strncmp(row, "loss", 4)) continue;
            if (!rows++) first = row;
            strtod(val ? val + 4 : row, &end);
            whole += val && (!*end || (rows == 3 && end[0] == ' ' &&
                                       end[1] == '(')); // nothing of a longer line behind it
            spaces += strstr(row, "  ") != NULL;
        }
        int dumb = !strcmp(cases[i].type, "dumb");
        check(!status && rows == 3 && whole == 3 && !spaces && !s.wraps &&
                  !strncmp(first, cases[i].row, strlen(cases[i].row)) && (s.commands == 0) == dumb,
              "%d columns, %s: three validations, nothing else stays: %s", cases[i].columns, cases[i].type,
              first);
    }
    pid_t child = start_at_terminal(&s, 80, "xterm",
                                    "--run --data text " SMALL "--steps 100000 --eval-every 0 --out "
                                                               "y.safetensors");
    watch(&s, 60000, "step 5/");
    kill(child, SIGSTOP);
    waitpid(child, &status, WUNTRACED);
    watch(&s, 100, NULL);
    int before = s.wraps, left = (int)strlen(s.rows[s.row]);
    resize(&s, 40);
    kill(child, SIGCONT);
    for (int i = 0; i < 30; i++) watch(&s, 60000, "step");
    int narrow = (int)strlen(s.rows[s.row]), more = s.wraps - before;
    check(!before && left > 60 && left < 80 && narrow > 20 && narrow < 40 && more <= 1,
          "made narrower, from 80 to 40 columns: the next line fits, %d and then %d wide", left, narrow);
    if (write(terminal_fd, "\3", 1) != 1) check(0, "Ctrl-C cannot be typed");
    while (watch(&s, 60000, NULL)) continue;
    waitpid(child, &status, 0);
    close(terminal_fd);
    int ending = 0, hint = 0;
    for (int r = 0; r < SCREEN_ROWS; r++) {
        ending += !strncmp(s.rows[r], "ending after this step", 22);
        hint += !strncmp(s.rows[r], "go on with: ", 12);
    }
    check(WIFEXITED(status) && WEXITSTATUS(status) == 130 && ending == 1 && hint == 1, "Ctrl-C: what is said "
                                                                                       "of it begins a row");
    int code = run("--data text " SMALL "--steps 250 --eval-every 120 --eval-batches 1 --out y.safetensors"),
        lines = 0;
    for (const char *at = (char *)output; at && (at = strstr(at, "step ")); at++)
        lines += at == (char *)output || at[-1] == '\n';
    check(!code && lines == 6 && !memchr(output, 27, output_size) && !memchr(output, '\r', output_size),
          "a file: steps 1, 100, 120, 200, 240, 250, and no command of a terminal");
    Options o;
    Training t;
    memset(&o, 0, sizeof(o));
    memset(&t, 0, sizeof(t));
    Step quick = {7, 1, 1, 1, 1, 0.1}, slow = {7, 1, 1, 1, 1, 4}, slower = {7, 1, 1, 1, 1, 11},
         of_before = {7, 1, 1, 1, 1, NAN};
    int standard_output = dup(STDOUT_FILENO), null = open("/dev/null", O_WRONLY);
    fflush(stdout);
    dup2(null, STDOUT_FILENO); // no terminal
    o.step = 7;
    int often = !is_printed(&o, &t, &quick, 9.8) && is_printed(&o, &t, &quick, 9.95) &&
                !is_printed(&o, &t, &slow, 4) && is_printed(&o, &t, &slow, 8) &&
                is_printed(&o, &t, &slower, 11) && !is_printed(&o, &t, &of_before, 3);
    dup2(standard_output, STDOUT_FILENO);
    close(standard_output);
    close(null);
    check(often, "a file: silent for ten seconds at most, where no step takes longer");
    release();
}

// The check of dumps must fail where it should: on copies of a dump with one thing wrong.
static void test_bad_dumps(const char *dump) {
    heading("damaged copies of a dump are refused");
    static const char *edits[][2] = {{"\"act.encoded\"", "\"act.encodet\""}, {"\"act.encoded\"", "\"extra\""}, {"\"grad.wte.weight\"", "\"grad.wte.waight\""}, {"\"d_model\"", "\"d_modal\""},
                                     {"\"inputs\"", "\"imputs\""}, {"\"ln_f.bias\"", "\"ln_f.bios\""}};
    char error[ERROR_SIZE];
    unsigned char *bytes;
    size_t size;
    if (file_read(dump, &bytes, &size, error)) { check(0, "%s", error); return; }
    spill("good.safetensors", keep(bytes), size);
    for (int i = 0; i < 6; i++) {
        damage(edits[i][0], edits[i][1]);
        int code = finish(start("bad.safetensors"));
        check(code == 1 && output && strstr((char *)output, "FAIL"), "%s in place of %s: fails", edits[i][1], edits[i][0]);
    }
    Safetensors file;
    if (safetensors_read(&file, dump, error)) return;
    const FileTensor *t = safetensors_find(&file, "grad.ln_f.bias");
    float value;
    if (t) {
        memcpy(&value, t->data, 4);
        value *= 1.01f;
        memcpy(bytes + (t->data - file.bytes), &value, 4);
        spill("bad.safetensors", bytes, size);
        check(finish(start("bad.safetensors")) == 1, "one gradient off by a hundredth: fails");
    }
    spill("bad.safetensors", bytes, size / 2);
    check(finish(start("bad.safetensors")) == 1, "half a file: fails");
    safetensors_free(&file);
    release();
}

static void test_program(const glob_t *dumps) {
    snprintf(folder, sizeof(folder), "/tmp/test_sessa_XXXXXX");
    if (!mkdtemp(folder) || snprintf(work, sizeof(work), "%s/work", folder) < 0 || mkdir(work, 0777)) { check(0, "no folder to work in: %s", strerror(errno)); return; }
    write_data();
    if (!IS_DOUBLE) { // a checkpoint is float32
        test_resume();
        if (!ON_GPU) test_files();
        if (!ON_GPU) test_long_runs();
        if (!ON_GPU) test_places();
        if (!ON_GPU) test_strangers();
        if (!ON_GPU) test_pieces();
        if (!ON_GPU) test_judgement();
        if (!ON_GPU) test_split();
        if (!ON_GPU) test_formats();
        if (!ON_GPU) test_oddities();
        if (!ON_GPU) test_edges();
        if (!ON_GPU) test_memory_limits();
        if (!ON_GPU) test_terminal();
    }
    if (!ON_GPU) test_threads_allowed();
    if (!ON_GPU) test_stacks();
    if (!ON_GPU) test_threads();
    if (!ON_GPU) test_order();
    setenv("TEST_PRECISION", "fp32", 1); // for texts that the CPU's forward passes give
    test_scores();
    test_generation();
    if (dumps->gl_pathc && !ON_GPU) test_bad_dumps(dumps->gl_pathv[0]);
    folder_state(1);
    discard("../stdout");
    discard("../stderr");
    rmdir(work);
    rmdir(folder);
    release();
}

#ifdef TEST_CUDA
// ----------------------------------------------------------------------------
// the CUDA twin: its layers against the C functions, its models against the dumps, its training against the CPU's

// the model under test; the CPU's Model beside it has the names, the parameters and room for activations
static Model *tested_gpu;

template <typename X> static void fetch_activations(ModelGPU<X> *g, Model *m) {
    for (int r = 0; r < m->acts_table.n; r++) {
        const Tensor *to_row = &m->acts_table.rows[r], *in_x = find_tensor(&g->x_table, to_row->name),
            *in_f = find_tensor(&g->f_table, to_row->name);
        const Tensor *from = in_x ? in_x : in_f;
        if (!from || from->count < to_row->count || !strcmp(to_row->name, "scratch")) continue;
        int64_t width = to_row->n_dims ? to_row->shape[to_row->n_dims - 1] : 1, rows = to_row->count / width,
            size = (int64_t)(in_x ? sizeof(X) : sizeof(float));
        char *bytes = (char *)malloc((size_t)(rows * from->stride * size));
        const char *device = in_x ? (const char *)(g->x_block + from->offset) : (const char *)(g->f_block
                + from->offset);
        int64_t last = (rows - 1) * from->stride + width;
        CUDA(cudaMemcpy(bytes, device, (size_t)(last * size), cudaMemcpyDeviceToHost));
        for (int64_t n = 0; n < rows; n++)
            for (int64_t i = 0; i < width; i++) {
                int64_t at = n * from->stride + i;
                m->acts_block[to_row->offset + n * to_row->stride + i] =
                    in_x && sizeof(X) == sizeof(bf16) ? __bfloat162float(((const bf16 *)(const void *)bytes)[at]) : ((const float *)(const void *)bytes)[at];
            }
        free(bytes);
    }
}

// Panels of height P, 0: as the model chose them
template <typename X> static void ask_height(ModelGPU<X> *g, int P) {
    g->ways = ways_of<X>(&g->host.config, g->host.B, g->host.T, P, P == 0);
    g->host.P = P;
}
static Model *tested_create(const Config *c, int B, int T, Mode mode, char *error) {
    tested_gpu = backend_gpu()->create(c, B, T, mode, error);
    return tested_gpu ? model_create(c, B, T, mode, error) : NULL;
}
static void tested_free(Model *m) {
    backend_gpu()->destroy(tested_gpu);
    model_free(m);
}
static void hand_over(Model *m, Block block, const real *from) {
    memcpy(backend_gpu()->read(tested_gpu, block), from, sizeof(real) * (size_t)m->table.count);
    backend_gpu()->write(tested_gpu, block);
}
static void tested_forward(Model *m, const int *inputs, const int *targets, int B, int T, Dropout drop) {
    hand_over(m, PARAMS, m->params);
    if (gpu.precision == BF16) ask_height((ModelGPU<bf16> *)tested_gpu, m->P);
    else ask_height((ModelGPU<float> *)tested_gpu, m->P);
    backend_gpu()->forward(tested_gpu, inputs, targets, B, T, drop);
    if (gpu.precision == BF16) fetch_activations((ModelGPU<bf16> *)tested_gpu, m);
    else fetch_activations((ModelGPU<float> *)tested_gpu, m);
}
static double tested_loss(Model *m) {
    (void)m;
    return backend_gpu()->loss(tested_gpu);
}
static void tested_backward(Model *m, double dloss) {
    hand_over(m, GRADS, m->grads);
    backend_gpu()->backward(tested_gpu, dloss);
    memcpy(m->grads, backend_gpu()->read(tested_gpu, GRADS), sizeof(real) * (size_t)m->table.count);
}
static double tested_update(Model *m, AdamW o, double clip, int64_t step) {
    double length = backend_gpu()->update(tested_gpu, o, clip, step);
    memcpy(m->params, backend_gpu()->read(tested_gpu, PARAMS), sizeof(real) * (size_t)m->table.count);
    memset(m->grads, 0, sizeof(real) * (size_t)m->table.count);
    return length;
}

// Device memory of a test, freed at its end, a guard band behind each piece. What the host and the device
// both read is rounded to X on either side.
static struct { void *at; size_t bytes; } gpu_lent[4096];
static int n_gpu_lent;
template <typename Y> static Y *gpu_lend(int64_t n) {
    size_t bytes = (size_t)n * sizeof(Y);
    char *memory;
    CUDA(cudaMalloc((void **)&memory, bytes + GUARD));
    guard(memory + bytes, memory + bytes + GUARD, "buffer lent to a test", n_gpu_lent);
    gpu_lent[n_gpu_lent++] = {memory, bytes + GUARD};
    return (Y *)memory;
}
static void gpu_release(void) {
    CUDA(cudaStreamSynchronize(gpu.stream));
    while (n_gpu_lent) {
        n_gpu_lent--;
        unguard(gpu_lent[n_gpu_lent].at, gpu_lent[n_gpu_lent].bytes);
        CUDA(cudaFree(gpu_lent[n_gpu_lent].at));
    }
    release();
}
static float value_of(float x) { return x; }
static float value_of(bf16 x) { return __bfloat162float(x); }
static void set_value(float *x, float value) { *x = value; }
static void set_value(bf16 *x, float value) { *x = __float2bfloat16(value); }
template <typename X> static X *on_gpu(real *host, int64_t n) { // a copy; host is rounded
    X *device = gpu_lend<X>(n), *numbers = (X *)malloc((size_t)(n + 1) * sizeof(X));
    for (int64_t i = 0; i < n; i++) {
        set_value(&numbers[i], host[i]);
        host[i] = value_of(numbers[i]);
    }
    CUDA(cudaMemcpy(device, numbers, (size_t)n * sizeof(X), cudaMemcpyHostToDevice));
    free(numbers);
    return device;
}
template <typename X> static X *gpu_poison(int64_t n) { return on_gpu<X>(poison(n), n); }
static int *ids_on_gpu(const int *ids, int64_t n) {
    int *device = gpu_lend<int>(n);
    CUDA(cudaMemcpy(device, ids, (size_t)n * sizeof(int), cudaMemcpyHostToDevice));
    return device;
}
static Scratch scratch_on_gpu(int64_t n) { return {gpu_poison<float>(n), n}; }
template <typename X>
static double gpu_error(const X *device, const real *ref, int64_t rows, int width, int ld, double floor) {
    int64_t n = rows * ld;
    X *numbers = (X *)lend((size_t)n * sizeof(X));
    real *x = (real *)lend((size_t)n * sizeof(real));
    precise *wanted = zeros(n);
    CUDA(cudaStreamSynchronize(gpu.stream));
    CUDA(cudaMemcpy(numbers, device, (size_t)n * sizeof(X), cudaMemcpyDeviceToHost));
    for (int64_t i = 0; i < n; i++) { x[i] = value_of(numbers[i]); wanted[i] = (double)ref[i]; }
    return rows_error(x, wanted, rows, width, ld, floor);
}

// dout's rows summed: what a pass of the GPU gives as the gradient of the bias before it
static void add_rows(real *sum, const real *dout, int N, int width, int ld) {
    for (int n = 0; n < N; n++)
        for (int i = 0; i < width; i++) sum[i] += dout[n * ld + i];
}
static Mask mask_on_gpu(Dropout drop, int place) {
    uint64_t key = dropout_key(drop), *device = gpu_lend<uint64_t>(1);
    CUDA(cudaMemcpy(device, &key, sizeof(key), cudaMemcpyHostToDevice));
    return mask_of(device, drop.probability, place);
}

enum { EMBEDDING, LAYERNORM, LINEAR, GELU, ROPE, GAIN, GATE, RESIDUAL, CROSSENTROPY, SUMS, CONVOLUTION, STEP, SCAN_F, SCAN_B, GATED_NORM,
       ATTENTION_F, ATTENTION_B,
       FEEDBACK_F, FEEDBACK_B, N_GPU_LAYERS };

static ColumnSums sums_on_gpu(int B, int T, int width) { // for a pass or two of up to `width` columns
    int64_t numbers = 8 * ((int64_t)BLOCKS_AT_ONCE * GROUP_COLUMNS + width) + 2 * tile_sums_room(width, B, T);
    float *room = gpu_poison<float>(numbers);
    return {{}, 0, 1, room, room, room + numbers};
}
// The feedback's memory for a way, with bands between its parts.
typedef struct { Panels p; Scratch weights, scratch; } Feedback;
template <typename X> static Feedback feedback_on_gpu(int B, int T, int D, int P, int in_eights, int keep) {
    Feedback f = {feedback_panels<X>(B, T, D, P, in_eights, keep), {NULL, 0}, {NULL, 0}};
    const Panels *p = &f.p;
    int64_t next[N_PARTS] = {p->inverse, p->weights, p->block, p->lambda,  p->merge,
                             p->dk,      p->partial, p->flags, p->product, p->total};
    static const char *const names[N_PARTS] = {"e",     "M",  "rhs",     "block", "lambda",
                                               "merge", "dk", "partial", "flags", "product"};
    f.weights = scratch_on_gpu(p->weights);
    f.scratch = scratch_on_gpu(p->total);
    for (int i = 0; i < N_PARTS; i++) {
        float *at = i < 2 ? f.weights.at : f.scratch.at;
        guard(at + p->ends[i], at + next[i], names[i], -1);
    }
    return f;
}

// Attention and feedback on the GPU and in C on the same numbers, rounded to X already; P < 0: a random height of panels
template <typename X>
static void compare_mixers(double *worst, const real *x, const real *w, const real *y, real *dout, int B, int T, int H,
                           int G, int d, int ld, int P) {
    cudaStream_t st = gpu.stream;
    int D = H * d, N = B * T;
    int64_t size = (int64_t)N * D, wide_size = (int64_t)N * ld;
    // at T 2 and 3 the gradients of q and k are differences that nearly cancel: in bf16 the floor is what does not
    double floor = (sizeof(X) == sizeof(bf16) ? 0.3 : 0.1) * sqrt((double)size);
    X *x_d = on_gpu<X>(copy_of(x, wide_size), wide_size), *w_d = on_gpu<X>(copy_of(w, wide_size), wide_size),
        *dout_d = on_gpu<X>(dout, size);
    { // attention, from position 0 and with the positions before `first` known
        int first = random_int(0, T - 1), late = B * (T - first);
        real *v = noise(wide_size, 1), *o = poison(size), *stats = poison(2 * (int64_t)N * H),
            *scratch = scratch_for(T), *dq = poison(wide_size), *dk = poison(wide_size), *dv = poison(wide_size);
        X *v_d = on_gpu<X>(v, wide_size), *o_d = gpu_poison<X>(size), *dq_d = gpu_poison<X>(wide_size),
            *dk_d = gpu_poison<X>(wide_size), *dv_d = gpu_poison<X>(wide_size);
        float *stats_d = gpu_poison<float>(2 * (int64_t)N * H);
        AttentionWay way = attention_way<X>(B, T, H, G, d, ld, 0);
        Scratch scratch_d = scratch_on_gpu(way.scratch);
        attention_forward(o, stats, scratch, x, w, v, ld, B, T, H, G, d, first, 0);
        attention_forward_gpu(o_d, stats_d, scratch_d, x_d, w_d, v_d, ld, B, T, H, G, d, first, &way, st);
        worst_of(&worst[ATTENTION_F], gpu_error(o_d, o, late, D, D, 0));
        attention_forward(o, stats, scratch, x, w, v, ld, B, T, H, G, d, 0, 0);
        attention_forward_gpu(o_d, stats_d, scratch_d, x_d, w_d, v_d, ld, B, T, H, G, d, 0, &way, st);
        worst_of(&worst[ATTENTION_F], gpu_error(o_d, o, N, D, D, 0));
        attention_backward(dq, dk, dv, scratch, dout, stats, x, w, v, ld, B, T, H, G, d, 0);
        attention_backward_gpu(dq_d, dk_d, dv_d, (float *)NULL, scratch_d, dout_d, (const X *)o_d, stats_d, x_d, w_d, v_d, ld, B, T, H,
                               G, d, &way, {}, (ColumnSums *)NULL, st);
        worst_of(&worst[ATTENTION_B], gpu_error(dq_d, dq, N, D, ld, floor));
        worst_of(&worst[ATTENTION_B], gpu_error(dk_d, dk, N, G * d, ld, floor));
        worst_of(&worst[ATTENTION_B], gpu_error(dv_d, dv, N, G * d, ld, floor));
        // q, k and v beside each other, on through RoPE, and their sums
        uint64_t before = chance; // the tests behind this one see the numbers that they always saw
        int E = (H + 2 * G) * d;
        int64_t wide_E = (int64_t)N * E, pairs = (int64_t)T * (d / 2);
        real *proj = noise(wide_E, 1), *dproj = poison(wide_E), *dbias = noise(E, 1), *cosine = poison(pairs), *sine = poison(pairs);
        rope_table(cosine, sine, T, d);
        X *proj_d = on_gpu<X>(proj, wide_E), *dproj_d = gpu_poison<X>(wide_E);
        float *dbias_d = on_gpu<float>(dbias, E), *cosine_d = on_gpu<float>(cosine, pairs), *sine_d = on_gpu<float>(sine, pairs);
        ColumnSums sums = sums_on_gpu(B, T, E);
        way = attention_way<X>(B, T, H, G, d, E, 0);
        scratch_d = scratch_on_gpu(way.scratch);
        attention_forward(o, stats, scratch, proj, proj + D, proj + D + G * d, E, B, T, H, G, d, 0, 0);
        attention_forward_gpu(o_d, stats_d, scratch_d, proj_d, proj_d + D, proj_d + D + G * d, E, B, T, H, G,
                              d, 0, &way, st);
        attention_backward(dproj, dproj + D, dproj + D + G * d, scratch, dout, stats, proj, proj + D, proj + D + G * d, E, B, T, H, G, d, 0);
        rope_backward(dproj, E, cosine, sine, N, T, H + G, d);
        add_rows(dbias, dproj, N, E, E);
        attention_backward_gpu(dproj_d, dproj_d + D, dproj_d + D + G * d, dbias_d, scratch_d, dout_d,
                               (const X *)o_d, stats_d, proj_d, proj_d + D, proj_d + D + G * d, E, B, T, H, G,
                               d, &way, {cosine_d, sine_d, T, d / 2, 0, -1}, &sums, st);
        column_sums_gpu(&sums, st);
        chance = before;
        worst_of(&worst[ATTENTION_B], gpu_error(dproj_d, dproj, N, E, E, floor));
        worst_of(&worst[SUMS], gpu_error(dbias_d, dbias, 1, E, E, sqrt((double)wide_E))); // of N numbers about 1, each rounded
    }
    { // feedback
        int first = random_int(0, T - 1);
        if (P < 0) P = panel_heights[random_int(0, N_HEIGHTS - 1)];
        real *gamma = noise(N, 1), *f = copy_of(y, size), *s = poison(size), *late = noise(size, 1),
            *stats = poison(2 * N), *scratch = scratch_for(T), *df = poison(size);
        real *dq = poison(wide_size), *dk = poison(wide_size), *dgamma = poison(N);
        for (int n = 0; n < N; n++) gamma[n] = (real)(0.999 * tanh((double)gamma[n]));
        int keep = T % 2;
        Feedback m = feedback_on_gpu<X>(B, T, D, P, ld % 8 == 0 && first % 8 == 0, keep);
        float *gamma_d = on_gpu<float>(gamma, N), *stats_d = gpu_poison<float>(2 * N),
              *dgamma_d = gpu_poison<float>(N);
        X *f_d = on_gpu<X>(f, size), *s_d = gpu_poison<X>(size), *late_d = on_gpu<X>(late, size),
            *df_d = gpu_poison<X>(size), *dq_d = gpu_poison<X>(wide_size), *dk_d = gpu_poison<X>(wide_size),
          *c_d = gpu_poison<X>(size);
        if (B == 1) {
            feedback_forward(late, stats, scratch, f, x, w, ld, gamma, B, T, D, first, 0);
            feedback_forward_gpu(late_d, (X *)NULL, stats_d, m.weights, m.scratch, f_d, x_d, w_d, ld, gamma_d,
                                 B, T, D, first, &m.p, st);
            worst_of(&worst[FEEDBACK_F], gpu_error(late_d, late, N, D, D, 0));
        }
        feedback_forward(s, stats, scratch, f, x, w, ld, gamma, B, T, D, 0, 0);
        m = feedback_on_gpu<X>(B, T, D, P, ld % 8 == 0, keep);
        feedback_forward_gpu(s_d, c_d, stats_d, m.weights, m.scratch, f_d, x_d, w_d, ld, gamma_d, B, T, D, 0,
                             &m.p, st);
        worst_of(&worst[FEEDBACK_F], gpu_error(s_d, s, N, D, D, 0));
        feedback_backward(df, dq, dk, dgamma, scratch, dout, s, stats, x, w, ld, gamma, B, T, D, 0);
        feedback_backward_gpu(df_d, dq_d, dk_d, dgamma_d, (float *)NULL, m.weights, m.scratch, dout_d, s_d,
                              c_d, stats_d, x_d, w_d, ld, gamma_d, B, T, D, &m.p, (ColumnSums *)NULL, st);
        worst_of(&worst[FEEDBACK_B], gpu_error(df_d, df, N, D, D, 0));
        worst_of(&worst[FEEDBACK_B], gpu_error(dq_d, dq, N, D, ld, floor));
        worst_of(&worst[FEEDBACK_B], gpu_error(dk_d, dk, N, D, ld, floor));
        worst_of(&worst[FEEDBACK_B], gpu_error(dgamma_d, dgamma, 1, N, N, floor));
        // q and k beside each other, and their gradients' sums
        uint64_t before = chance;
        int64_t wide_2D = 2 * size;
        real *proj = noise(wide_2D, 1), *dproj = poison(wide_2D), *dbias = noise(2 * D, 1);
        X *proj_d = on_gpu<X>(proj, wide_2D), *dproj_d = gpu_poison<X>(wide_2D);
        float *dbias_d = on_gpu<float>(dbias, 2 * D);
        ColumnSums sums = sums_on_gpu(B, T, 2 * D);
        feedback_forward(s, stats, scratch, f, proj, proj + D, 2 * D, gamma, B, T, D, 0, 0);
        m = feedback_on_gpu<X>(B, T, D, P, 2 * D % 8 == 0, keep);
        feedback_forward_gpu(s_d, c_d, stats_d, m.weights, m.scratch, f_d, proj_d, proj_d + D, 2 * D, gamma_d,
                             B, T, D, 0, &m.p, st);
        feedback_backward(df, dproj, dproj + D, dgamma, scratch, dout, s, stats, proj, proj + D, 2 * D, gamma, B, T, D, 0);
        add_rows(dbias, dproj, N, 2 * D, 2 * D);
        feedback_backward_gpu(df_d, dproj_d, dproj_d + D, dgamma_d, dbias_d, m.weights, m.scratch, dout_d,
                              s_d, c_d, stats_d, proj_d, proj_d + D, 2 * D, gamma_d, B, T, D, &m.p, &sums,
                              st);
        column_sums_gpu(&sums, st);
        chance = before;
        worst_of(&worst[FEEDBACK_B], gpu_error(dproj_d, dproj, N, 2 * D, 2 * D, floor));
        Feedback other = feedback_on_gpu<X>(B, T, D, P, 2 * D % 8 == 0, !keep);
        if (m.p.R >= T && other.p.R >= T) { // weights kept or computed again: the same bits
            X *other_d = gpu_poison<X>(wide_2D), *parts[] = {dproj_d, other_d};
            real *numbers[2];
            feedback_forward_gpu(s_d, c_d, stats_d, other.weights, other.scratch, f_d, proj_d, proj_d + D,
                                 2 * D, gamma_d, B, T, D, 0, &other.p, st);
            feedback_backward_gpu(df_d, other_d, other_d + D, dgamma_d, (float *)NULL, other.weights,
                                  other.scratch, dout_d, s_d, c_d, stats_d, proj_d, proj_d + D, 2 * D,
                                  gamma_d, B, T, D, &other.p, (ColumnSums *)NULL, st);
            CUDA(cudaStreamSynchronize(st));
            for (int i = 0; i < 2; i++)
                CUDA(cudaMemcpy(numbers[i] = poison(wide_2D), parts[i], sizeof(X) * (size_t)wide_2D, cudaMemcpyDeviceToHost));
            worst_of(&worst[FEEDBACK_B], memcmp(numbers[0], numbers[1], sizeof(X) * (size_t)wide_2D) ? 1 : 0);
        }
        worst_of(&worst[SUMS], gpu_error(dbias_d, dbias, 1, 2 * D, 2 * D, sqrt((double)wide_2D)));
    }
}

// mamba2's convolution, step and scan: E = D channels in H heads, S numbers of state, W columns of rows ld_w apart
template <typename X>
static void compare_scan(double *worst, int eights, real *dout, X *dout_d, int B, int T, int D, int H, ColumnSums *sums) {
    cudaStream_t st = gpu.stream;
    int S = eights ? 8 * random_int(1, 16) : random_int(2, 20), W = D + 2 * S, ld_w = W + (eights ? 8 : 1) * random_int(0, 3), first = random_int(0, T - 1), P = panel_heights[random_int(0, N_HEIGHTS - 1)];
    int N = B * T, slots = (T + chunk_height(P) - 1) / chunk_height(P);
    double floor = 0.1 * sqrt((double)N * D);
    int64_t size = (int64_t)N * D, wide_w = (int64_t)N * ld_w, size_w = (int64_t)N * W, states = (int64_t)B * slots * S * D;
    real *inp = noise(wide_w, 1), *taps = noise(W * TAPS, 0.5), *shift = noise(W, 0.5), *xbc = poison(size_w), *dxbc = noise(size_w, 1), *dinp = poison(wide_w), *dtaps = noise(W * TAPS, 1), *dshift = noise(W, 1);
    X *inp_d = on_gpu<X>(inp, wide_w), *xbc_d = gpu_poison<X>(size_w), *dxbc_d = on_gpu<X>(dxbc, size_w), *dinp_d = gpu_poison<X>(wide_w), *tail_d = on_gpu<X>(noise((TAPS - 1) * W, 0), (TAPS - 1) * W);
    float *taps_d = on_gpu<float>(taps, W * TAPS), *shift_d = on_gpu<float>(shift, W), *dtaps_d = on_gpu<float>(dtaps, W * TAPS), *dshift_d = on_gpu<float>(dshift, W);
    conv_forward(xbc, inp, ld_w, NULL, taps, shift, B, T, W, 0);
    if (first) conv_forward_gpu(xbc_d, inp_d, ld_w, tail_d, taps_d, shift_d, 1, first, W, 0, st); // the first sequence in two calls
    conv_forward_gpu(xbc_d + (int64_t)first * W, inp_d + (int64_t)first * ld_w, ld_w, tail_d, taps_d, shift_d, 1, T, W, first, st);
    worst_of(&worst[CONVOLUTION], gpu_error(xbc_d, xbc, T, W, W, 0));
    conv_forward_gpu(xbc_d, inp_d, ld_w, (X *)NULL, taps_d, shift_d, B, T, W, 0, st);
    worst_of(&worst[CONVOLUTION], gpu_error(xbc_d, xbc, N, W, W, 0));
    conv_backward(dinp, dtaps, dshift, dxbc, inp, ld_w, taps, shift, B, T, W);
    conv_backward_gpu(dinp_d, dtaps_d, dshift_d, dxbc_d, inp_d, ld_w, taps_d, shift_d, B, T, W, sums, st);
    column_sums_gpu(sums, st);
    worst_of(&worst[CONVOLUTION], gpu_error(dinp_d, dinp, N, W, ld_w, 0));
    worst_of(&worst[CONVOLUTION], gpu_error(dtaps_d, dtaps, 1, W * TAPS, W * TAPS, 0.1 * sqrt((double)size_w)));
    worst_of(&worst[CONVOLUTION], gpu_error(dshift_d, dshift, 1, W, W, 0.1 * sqrt((double)size_w)));

    real *step = poison(N * H), *shifts = noise(H, 1), *dshifts = noise(H, 1), *dstep = poison(N * 3 * H), *dstep_inp = poison(wide_w);
    float *step_d = gpu_poison<float>(N * H), *shifts_d = on_gpu<float>(shifts, H), *dshifts_d = on_gpu<float>(dshifts, H), *dstep_d = gpu_poison<float>(N * 3 * H);
    X *dstep_inp_d = gpu_poison<X>(wide_w);
    step_forward(step, inp, ld_w, shifts, N, H);
    step_forward_gpu(step_d, inp_d, ld_w, shifts_d, N, H, st);
    worst_of(&worst[STEP], gpu_error(step_d, step, N, H, H, 0));

    xbc_d = on_gpu<X>(xbc, size_w); // both read the same
    real *A_log = noise(H, 1), *skip = noise(H, 1), *dA = noise(H, 1), *dskip = noise(H, 1), *y_scan = poison(size), *kept = poison(states);
    real *scan = (real *)lend(scan_scratch(D, S, H) * (size_t)omp_get_max_threads() * sizeof(real));
    float *A_d = on_gpu<float>(A_log, H), *skip_d = on_gpu<float>(skip, H), *dA_d = on_gpu<float>(dA, H), *dskip_d = on_gpu<float>(dskip, H), *kept_d = gpu_poison<float>(states);
    float *carried_d = on_gpu<float>(noise((int64_t)S * D, 0), (int64_t)S * D);
    Scratch scan_d = scratch_on_gpu(scan_scratch_gpu(B, T, S, H));
    X *y_scan_d = gpu_poison<X>(size);
    scan_forward(y_scan, kept, 1, scan, xbc, step, A_log, skip, B, T, D, S, H, P);
    if (first) scan_forward_gpu(y_scan_d, kept_d, carried_d, xbc_d, step_d, A_d, skip_d, 1, first, D, S, H, P, st);
    scan_forward_gpu(y_scan_d + (int64_t)first * D, kept_d, carried_d, xbc_d + (int64_t)first * W, step_d + (int64_t)first * H, A_d, skip_d, 1, T - first, D, S, H, P, st);
    worst_of(&worst[SCAN_F], gpu_error(y_scan_d, y_scan, T, D, D, 0));
    scan_forward_gpu(y_scan_d, kept_d, (float *)NULL, xbc_d, step_d, A_d, skip_d, B, T, D, S, H, P, st);
    worst_of(&worst[SCAN_F], gpu_error(y_scan_d, y_scan, N, D, D, 0));
    scan_backward(dxbc, dstep, dA, dskip, scan, dout, kept, xbc, step, A_log, skip, B, T, D, S, H, P);
    scan_backward_gpu(dxbc_d, dstep_d, dA_d, dskip_d, scan_d, dout_d, kept_d, xbc_d, step_d, A_d, skip_d, B, T, D, S, H, P, sums, st);
    column_sums_gpu(sums, st);
    worst_of(&worst[SCAN_B], gpu_error(dxbc_d, dxbc, N, W, W, 0));
    worst_of(&worst[SCAN_B], gpu_error(dA_d, dA, 1, H, H, floor));
    worst_of(&worst[SCAN_B], gpu_error(dskip_d, dskip, 1, H, H, floor));
    worst_of(&worst[SCAN_B], gpu_error(dstep_d, dstep, N, 3 * H, 3 * H, floor));
    step_backward(dstep_inp, dshifts, dstep, 3 * H, inp, ld_w, shifts, N, H);
    step_backward_gpu(dstep_inp_d, dshifts_d, dstep_d, 3 * H, inp_d, ld_w, shifts_d, N, H, sums, st);
    column_sums_gpu(sums, st);
    worst_of(&worst[STEP], gpu_error(dstep_inp_d, dstep_inp, N, H, ld_w, floor));
    worst_of(&worst[STEP], gpu_error(dshifts_d, dshifts, 1, H, H, floor));
}

// One random shape: every layer on the GPU and in C on the same numbers. `even` shapes take the paths in eights and
// tiles.
template <typename X> static void compare_layers(double *worst, int even, int T) {
    cudaStream_t st = gpu.stream;
    int B = random_int(1, 3), G = random_int(1, 2), H = G * random_int(1, 3), d = even ? 8 * random_int(1,
            9) : 2 * random_int(1, 9), D = H * d;
    int ld = even ? D + 8 * random_int(0, 2) : D + random_int(0, 3), N = B * T, V = random_int(2, 70),
        out = even ? 8 * random_int(1, 6) : random_int(1, 50);
    int64_t size = (int64_t)N * D, wide_size = (int64_t)N * ld;
    real *x = noise(wide_size, 1), *w = noise(wide_size, 1), *y = noise(size, 1), *dout = noise(size, 1),
        *g = noise(wide_size, 1);
    real *weight = noise(D, 1), *bias = noise(D, 1), *rows = noise(N, 1), *wte = noise((int64_t)V * D, 1);
    int *ids = random_ids(N, V, 0), *targets = random_ids(N, V, 1);
    X *x_d = on_gpu<X>(x, wide_size), *w_d = on_gpu<X>(w, wide_size), *y_d = on_gpu<X>(y, size),
        *dout_d = on_gpu<X>(dout, size), *g_d = on_gpu<X>(g, wide_size);
    float *weight_d = on_gpu<float>(weight, D), *bias_d = on_gpu<float>(bias, D), *rows_d = on_gpu<float>(rows, N),
        *wte_d = on_gpu<float>(wte, (int64_t)V * D);
    float *dout_f = on_gpu<float>(dout, size);
    double floor = 0.1 * sqrt((double)size);
    Dropout drop = {random_int(0, 1) ? 0.3 : 0, 11, 5};
    ColumnSums sums = sums_on_gpu(B, T, 3 * ld);
    { // embedding, with dropout
        real *o = poison(size), *dwte = noise((int64_t)V * D, 1);
        float *o_d = gpu_poison<float>(size), *dwte_d = on_gpu<float>(dwte, (int64_t)V * D);
        Scratch partial = scratch_on_gpu(embedding_scratch(N, V, D));
        int *lists = (int *)lend(sizeof(int) * (size_t)(4 * N + 2)), *starts = (int *)lend(sizeof(int) * (size_t)(V
                + 1));
        TokenLists t = sort_tokens(lists, starts, ids, N, V);
        embedding_forward(o, ids, wte, B, T, D);
        dropout(o, size, drop, 4);
        embedding_forward_gpu(o_d, ids_on_gpu(ids, N), wte_d, mask_on_gpu(drop, 4), B, T, D, st);
        worst_of(&worst[EMBEDDING], gpu_error(o_d, o, 1, (int)size, (int)size, 0));
        embedding_backward(dwte, dout, ids, B, T, D);
        embedding_backward_gpu(dwte_d, partial, dout_f, ids_on_gpu(lists, 4 * N + 2), t, B, T, D, st);
        worst_of(&worst[EMBEDDING], gpu_error(dwte_d, dwte, V, D, D, 0));
    }
    { // residual with dropout, layernorm
        real *o = poison(size), *mean = poison(N), *rstd = poison(N), *stream_ = noise(size, 1), *added = copy_of(y, size);
        X *o_d = gpu_poison<X>(size), *kept = gpu_poison<X>(size);
        float *mean_d = gpu_poison<float>(N), *rstd_d = gpu_poison<float>(N), *stream_d = on_gpu<float>(stream_, size);
        Mask mask = mask_on_gpu(drop, 3);
        layernorm_forward(o, mean, rstd, stream_, weight, bias, N, D);
        layernorm_forward_gpu(o_d, (X *)NULL, mean_d, rstd_d, stream_d, (const X *)NULL, mask, weight_d, bias_d, N, D, st);
        worst_of(&worst[LAYERNORM], gpu_error(o_d, o, N, D, D, 0));
        dropout(added, size, drop, 3);
        residual_forward(stream_, stream_, added, size);
        layernorm_forward(o, mean, rstd, stream_, weight, bias, N, D);
        layernorm_forward_gpu(o_d, kept, mean_d, rstd_d, stream_d, y_d, mask, weight_d, bias_d, N, D, st);
        worst_of(&worst[RESIDUAL], gpu_error(stream_d, stream_, N, D, D, 0));
        worst_of(&worst[RESIDUAL], gpu_error(kept, stream_, N, D, D, 0));
        worst_of(&worst[LAYERNORM], gpu_error(o_d, o, N, D, D, 0));
        worst_of(&worst[LAYERNORM], gpu_error(mean_d, mean, 1, N, N, sqrt((double)N)));
        worst_of(&worst[LAYERNORM], gpu_error(rstd_d, rstd, 1, N, N, 0));
        // backward, on to a branch or to the embedding
        layernorm_forward(o, mean, rstd, y, weight, bias, N, D);
        for (int fresh = 0; fresh < 2; fresh++) {
            int on = random_int(0, 1);
            real *dx = noise(size, !fresh), *dweight = noise(D, 1), *dbias = noise(D, 1), *dadd = noise(D, 1), *dbranch;
            X *dbranch_d = gpu_poison<X>(size);
            float *dx_d = fresh ? gpu_poison<float>(size) : on_gpu<float>(dx, size), *dweight_d = on_gpu<float>(dweight, D),
                *dbias_d = on_gpu<float>(dbias, D), *dadd_d = on_gpu<float>(dadd, D);
            layernorm_backward(dx, dweight, dbias, dout, y, mean, rstd, weight, N, D);
            layernorm_backward_gpu(dx_d, dweight_d, dbias_d, on ? dbranch_d : (X *)NULL, dadd_d, mask, fresh, dout_d, y_d,
                                   on_gpu<float>(mean, N), on_gpu<float>(rstd, N), weight_d, N, D, &sums, st);
            column_sums_gpu(&sums, st);
            dropout(dbranch = copy_of(dx, size), size, drop, 3);
            add_rows(dadd, dbranch, N, D, D);
            if (on) worst_of(&worst[LAYERNORM], gpu_error(dbranch_d, dbranch, N, D, D, 0));
            worst_of(&worst[LAYERNORM], gpu_error(dx_d, on ? dx : dbranch, N, D, D, 0));
            worst_of(&worst[SUMS], gpu_error(dweight_d, dweight, 1, D, D, floor));
            worst_of(&worst[SUMS], gpu_error(dbias_d, dbias, 1, D, D, floor));
            worst_of(&worst[SUMS], gpu_error(dadd_d, dadd, 1, D, D, floor));
        }
    }
    { // linear: `out` columns of rows out + 3 apart
        int ld_out = even ? out + 8 : out + 3;
        real *m = noise((int64_t)out * D, 1), *mb = noise(out, 1), *o = poison((int64_t)N * ld_out),
            *dinp = poison(size), *dweight = noise((int64_t)out * D, 1), *dbias = noise(out, 1);
        real *grad = noise((int64_t)N * ld_out, 1);
        X *m_d = on_gpu<X>(m, (int64_t)out * D), *mb_d = on_gpu<X>(mb, out), *o_d = gpu_poison<X>((int64_t)N * ld_out),
            *dinp_d = gpu_poison<X>(size), *grad_d = on_gpu<X>(grad, (int64_t)N * ld_out);
        float *dweight_d = on_gpu<float>(dweight, (int64_t)out * D), scales[3] = {0.25f, 0, 1};
        linear_forward(o, ld_out, y, m, mb, N, D, out);
        linear_forward_gpu(o_d, ld_out, y_d, m_d, mb_d, N, D, out, st);
        worst_of(&worst[LINEAR], gpu_error(o_d, o, N, out, ld_out, 0));
        linear_backward(dinp, dweight, dbias, grad, ld_out, y, m, N, D, out);
        linear_backward_gpu((X *)NULL, dweight_d, grad_d, ld_out, y_d, m_d, N, D, out, 1, st, st);
        linear_backward_gpu(dinp_d, (float *)NULL, grad_d, ld_out, y_d, m_d, N, D, out, 0, st, st);
        worst_of(&worst[LINEAR], gpu_error(dinp_d, dinp, N, D, D, 0));
        worst_of(&worst[LINEAR], gpu_error(dweight_d, dweight, out, D, D, 0));
        linear_backward(dinp, dweight, dbias, copy_of(grad, (int64_t)N * ld_out), ld_out, y, m, N, D, out); // times 4 · 0.25
        real *quarter = noise((int64_t)N * ld_out, 0);
        for (int64_t i = 0; i < (int64_t)N * ld_out; i++) quarter[i] = 4 * grad[i];
        linear_backward_gpu(dinp_d, dweight_d, on_gpu<X>(quarter, (int64_t)N * ld_out), ld_out, y_d, m_d, N, D, out, 1, st, st,
                            on_gpu<float>(scales, 3));
        worst_of(&worst[LINEAR], gpu_error(dinp_d, dinp, N, D, D, 0));
        worst_of(&worst[LINEAR], gpu_error(dweight_d, dweight, out, D, D, 0));
    }
    { // gelu with and without gain
        int gain = random_int(0, 1);
        real *o = poison(size), *dinp = poison(wide_size), *gamma = poison(N), *dgamma = copy_of(rows, N),
            *dabar = copy_of(dout, size), *dweight = noise(D, 1), *dbias = noise(1, 1), *dinp_bias = noise(D, 1);
        X *o_d = gpu_poison<X>(size), *dinp_d = gpu_poison<X>(wide_size);
        float *gamma_d = gpu_poison<float>(N), *dweight_d = on_gpu<float>(dweight, D), *dbias_d = on_gpu<float>(dbias, 1),
            *dinp_bias_d = on_gpu<float>(dinp_bias, D), *w_gain = gain ? weight_d : NULL;
        gelu_forward(o, x, ld, N, D);
        gelu_forward_gpu(o_d, gamma_d, x_d, ld, w_gain, bias_d, 0.9f, N, D, st);
        worst_of(&worst[GELU], gpu_error(o_d, o, N, D, D, 0));
        on_gpu<X>(o, size); // rounded: the gain is that of what is written
        gain_forward(gamma, o, weight, bias, (real)0.9, N, D);
        if (gain) worst_of(&worst[GAIN], gpu_error(gamma_d, gamma, 1, N, N, 0));
        CUDA(cudaMemcpyAsync(gamma_d, gamma, sizeof(real) * (size_t)N, cudaMemcpyHostToDevice, st));
        if (gain) gain_backward(dabar, dweight, dbias, dgamma, gamma, o, weight, (real)0.9, N, D);
        gelu_backward(dinp, dabar, x, ld, N, D);
        add_rows(dinp_bias, dinp, N, D, ld);
        gelu_backward_gpu(dinp_d, dinp_bias_d, gain ? dweight_d : NULL, gain ? dbias_d : NULL, dout_d, x_d, ld, rows_d,
                          gamma_d, w_gain, 0.9f, N, D, &sums, st);
        column_sums_gpu(&sums, st);
        worst_of(&worst[GELU], gpu_error(dinp_d, dinp, N, D, ld, 0));
        worst_of(&worst[SUMS], gpu_error(dinp_bias_d, dinp_bias, 1, D, D, floor));
        worst_of(&worst[GAIN], gpu_error(dweight_d, dweight, 1, D, D, floor));
        worst_of(&worst[GAIN], gpu_error(dbias_d, dbias, 1, 1, 1, sqrt((double)N)));
    }
    { // gate with dropout
        real *gated = poison(size), *ds = poison(size), *dg = poison(wide_size), *dg_bias = noise(D, 1),
            *dgated = copy_of(dout, size);
        X *gated_d = gpu_poison<X>(size), *ds_d = gpu_poison<X>(size), *dg_d = gpu_poison<X>(wide_size);
        float *dg_bias_d = on_gpu<float>(dg_bias, D);
        Mask mask = mask_on_gpu(drop, 5);
        gate_forward(gated, y, g, ld, N, D);
        dropout(gated, size, drop, 5);
        gate_forward_gpu(gated_d, y_d, g_d, ld, mask, N, D, st);
        worst_of(&worst[GATE], gpu_error(gated_d, gated, N, D, D, 0));
        dropout(dgated, size, drop, 5);
        gate_backward(ds, dg, dgated, y, g, ld, N, D);
        add_rows(dg_bias, dg, N, D, ld);
        gate_backward_gpu(ds_d, dg_d, dg_bias_d, dout_d, y_d, g_d, ld, mask, N, D, &sums, st);
        column_sums_gpu(&sums, st);
        worst_of(&worst[GATE], gpu_error(ds_d, ds, N, D, D, 0));
        worst_of(&worst[GATE], gpu_error(dg_d, dg, N, D, ld, 0));
        worst_of(&worst[SUMS], gpu_error(dg_bias_d, dg_bias, 1, D, D, floor));
    }
    { // rope: in place
        real *cosine = poison((int64_t)T * (d / 2)), *sine = poison((int64_t)T * (d / 2)), *turned = copy_of(x,
                wide_size), *back = copy_of(w, wide_size), *dbias = noise(ld, 1);
        X *turned_d = on_gpu<X>(turned, wide_size), *back_d = on_gpu<X>(back, wide_size);
        rope_table(cosine, sine, T, d);
        float *cosine_d = on_gpu<float>(cosine, (int64_t)T * (d / 2)), *sine_d = on_gpu<float>(sine,
                (int64_t)T * (d / 2)), *dbias_d = on_gpu<float>(dbias, ld);
        rope_forward(turned, ld, cosine, sine, N, T, H, d, 0, 1);
        rope_forward_gpu(turned_d, ld, cosine_d, sine_d, N, T, H, d, 0, 1, st);
        worst_of(&worst[ROPE], gpu_error(turned_d, turned, N, ld, ld, 0));
        rope_backward(back, ld, cosine, sine, N, T, H, d);
        add_rows(dbias, back, N, ld, ld);
        rope_backward_gpu(back_d, dbias_d, ld, {cosine_d, sine_d, T, d / 2, 0, -1}, N, H * d, ld, &sums, st);
        column_sums_gpu(&sums, st);
        worst_of(&worst[ROPE], gpu_error(back_d, back, N, ld, ld, 0));
        worst_of(&worst[SUMS], gpu_error(dbias_d, dbias, 1, ld, ld, floor));
    }
    { // cross-entropy
        int ld_v = (int)round_up(V, 8);
        real *logits = noise((int64_t)N * V, 2), *padded = poison((int64_t)N * ld_v), *losses = poison(N),
            *logsumexp = poison(N), *dlogits = poison((int64_t)N * V);
        for (int n = 0; n < N; n++)
            for (int i = 0; i < V; i++) padded[n * ld_v + i] = logits[n * V + i];
        X *logits_d = on_gpu<X>(padded, (int64_t)N * ld_v);
        float *losses_d = gpu_poison<float>(N);
        char *hits_d = (char *)gpu_poison<float>(N), *hits = (char *)lend((size_t)N);
        int hits_wrong = 0;
        for (int n = 0; n < N; n++)
            for (int i = 0; i < V; i++) logits[n * V + i] = padded[n * ld_v + i];
        int *targets_d = ids_on_gpu(targets, N);
        crossentropy_forward(losses, logsumexp, logits, targets, N, V);
        crossentropy_backward(dlogits, logits, logsumexp, targets, 1, N, V);
        crossentropy_gpu(losses_d, hits_d, (X *)NULL, logits_d, ld_v, targets_d, N, V, st);
        worst_of(&worst[CROSSENTROPY], gpu_error(losses_d, losses, 1, N, N, sqrt((double)N)));
        worst_of(&worst[CROSSENTROPY], gpu_error(logits_d, padded, N, V, ld_v, 0));
        CUDA(cudaStreamSynchronize(st));
        CUDA(cudaMemcpy(hits, hits_d, (size_t)N, cudaMemcpyDeviceToHost));
        for (int n = 0; n < N; n++) {
            int hit = targets[n] >= 0;
            for (int i = 0; i < V && hit; i++) hit = logits[n * V + i] <= logits[n * V + targets[n]];
            hits_wrong += hit != hits[n];
        }
        worst_of(&worst[CROSSENTROPY], hits_wrong);
        crossentropy_gpu(losses_d, hits_d, logits_d, logits_d, ld_v, targets_d, N, V, st);
        for (int n = 0; n < N; n++) // 0 where a piece of 8 reaches past V
            for (int i = 0; i < ld_v; i++) padded[n * ld_v + i] = i < V ? dlogits[n * V + i] : 0;
        worst_of(&worst[CROSSENTROPY], gpu_error(losses_d, losses, 1, N, N, sqrt((double)N)));
        worst_of(&worst[CROSSENTROPY], gpu_error(logits_d, padded, N, ld_v, ld_v, 0.1 * sqrt((double)N)));
    }
    compare_scan<X>(worst, 0, dout, dout_d, B, T, D, H, &sums);
    if (even) { // again in eights, from numbers that the shapes below do not depend on
        uint64_t before = chance;
        compare_scan<X>(worst, 1, dout, dout_d, B, T, D, H, &sums);
        chance = before;
    }
    { // gated norm
        real *o = poison(size), *rms = poison(N), *dy = poison(size), *dz = poison(wide_size), *dweight = noise(D, 1);
        X *o_d = gpu_poison<X>(size), *dy_d = gpu_poison<X>(size), *dz_d = gpu_poison<X>(wide_size);
        float *rms_d = gpu_poison<float>(N), *dweight_d = on_gpu<float>(dweight, D);
        gated_rmsnorm_forward(o, rms, y, g, ld, weight, N, D);
        gated_rmsnorm_forward_gpu(o_d, rms_d, y_d, g_d, ld, weight_d, N, D, st);
        worst_of(&worst[GATED_NORM], gpu_error(o_d, o, N, D, D, 0));
        gated_rmsnorm_backward(dy, dz, dweight, dout, y, g, ld, rms, weight, N, D);
        gated_rmsnorm_backward_gpu(dy_d, dz_d, dweight_d, dout_d, y_d, g_d, ld, rms_d, weight_d, N, D, &sums, st);
        column_sums_gpu(&sums, st);
        worst_of(&worst[GATED_NORM], gpu_error(dy_d, dy, N, D, D, 0));
        worst_of(&worst[GATED_NORM], gpu_error(dz_d, dz, N, D, ld, 0));
        worst_of(&worst[GATED_NORM], gpu_error(dweight_d, dweight, 1, D, D, 0.1 * sqrt((double)size)));
    }
    compare_mixers<X>(worst, x, w, y, dout, B, T, H, G, d, ld, -1);
    gpu_release();
}

// A layer's result in bf16 is off from that of the C function on the same operands by one rounding, at most 2^-8 of
// each number. Attention rounds its weights besides, and backward their gradient: twice that; feedback solves with what
// it has rounded, block by block, with gains up to 0.999: four times.
template <typename X> static void test_gpu_layers(const char *name) {
    static const char *layers[] = {"embedding", "layernorm", "linear", "gelu", "rope", "gain", "gate", "residual",
                                   "crossentropy", "sums over rows", "convolution", "step", "scan", "scan, backward", "gated norm",
                                   "attention", "attention, backward", "feedback", "feedback, backward"};
    static const int Ts[] = {1, 2, 3, 17, 64, 65, 130, 200, 257, 300, 520, 2500};
    double worst[N_GPU_LAYERS] = {0}, u = 0x1p-8;
    heading(name);
    for (int i = 0; i < 23; i++) compare_layers<X>(worst, i % 2, Ts[i / 2]);
    for (int l = 0; l < N_GPU_LAYERS; l++) {
        double rounded = l >= FEEDBACK_F ? 4 * u : l >= ATTENTION_F ? 2 * u : u;
        check_error(worst[l], sizeof(X) == sizeof(bf16) ? rounded : l >= FEEDBACK_F ? 1e-4 : 1e-5, "%s", layers[l]);
    }
}

// Shapes of bf16 for which kernels of their own exist: heads of 64 and 128 columns and others, sequences of many tiles,
// more blocks than the GPU takes at once, a whole cluster and an odd number of heads; feedback of many short sequences, of one
// with several panels' reach.
static void test_gpu_tiles(void) {
    static const int shapes[][5] = { // B, T, H, G, d
        {1, 1, 1, 1, 64}, {2, 127, 1, 1, 128}, {1, 129, 2, 1, 96}, {2, 193, 3, 3, 32}, {1, 700, 6, 2, 128},
        {2, 1100, 12, 12, 64}, {50, 128, 3, 3, 40}, {64, 300, 2, 1, 48}, {24, 513, 4, 4, 64}, {1, 2305, 2, 2, 64},
        {3, 1000, 5, 5, 64}};
    heading("bf16: attention and feedback in tiles");
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        const int *s = shapes[i];
        int64_t size = (int64_t)s[0] * s[1] * s[2] * s[4], wide_size = size + 8 * (int64_t)s[0] * s[1];
        real *x = noise(wide_size, 1), *w = noise(wide_size, 1), *y = noise(size, 1), *dout = noise(size, 1);
        double worst[N_GPU_LAYERS] = {0}, most = 0;
        on_gpu<bf16>(x, wide_size);
        on_gpu<bf16>(w, wide_size);
        compare_mixers<bf16>(worst, x, w, y, dout, s[0], s[1], s[2], s[3], s[4], s[2] * s[4] + 8, 0);
        gpu_release();
        for (int l = ATTENTION_F; l < N_GPU_LAYERS; l++) worst_of(&most, worst[l] * (l < FEEDBACK_F ? 2 : 1));
        worst_of(&most, worst[SUMS]);
        check_error(most, 4 * 0x1p-8, "B %d, T %d, %d of %d heads of %d columns", s[0], s[1], s[3], s[2], s[4]);
    }
}

// bf16 at the edge of what the loop bears: α on the row before alone, γ 0.999 rounds to 1 in bf16. s_t = f_t + γ
// s_{t-1}.
static void test_peaked(void) {
    heading("bf16: alpha on one token, gamma 0.999");
    enum { T = 3000, D = 64 };
    real *f = noise((int64_t)T * D, 1), *q = noise((int64_t)T * D, 0), *k = noise((int64_t)T * D, 0),
        *gamma = poison(T), *s = poison((int64_t)T * D), *lambda = poison((int64_t)T * D);
    real *ds = noise((int64_t)T * D, 1);
    for (int t = 0; t < T; t++) { // a code of ±6 for each position, which q_t has in common with k_{t-1}
        gamma[t] = (real)0.999;
        for (int i = 0; i < D; i++) {
            k[t * D + i] = splitmix64((uint64_t)(t * D + i)) >> 63 ? 6 : -6;
            q[t * D + i] = t ? k[(t - 1) * D + i] : 0;
        }
    }
    bf16 *f_d = on_gpu<bf16>(f, (int64_t)T * D), *q_d = on_gpu<bf16>(q, (int64_t)T * D), *k_d = on_gpu<bf16>(k,
            (int64_t)T * D), *s_d = gpu_poison<bf16>((int64_t)T * D), *ds_d = on_gpu<bf16>(ds, (int64_t)T * D);
    bf16 *dq_d = gpu_poison<bf16>((int64_t)T * D), *dk_d = gpu_poison<bf16>((int64_t)T * D),
         *c_d = gpu_poison<bf16>((int64_t)T * D);
    float *gamma_d = on_gpu<float>(gamma, T), *stats_d = gpu_poison<float>(2 * T),
          *dgamma_d = gpu_poison<float>(T);
    Feedback m = feedback_on_gpu<bf16>(1, T, D, 0, 1, 0);
    double last[D] = {0};
    for (int t = 0; t < T; t++)
        for (int i = 0; i < D; i++) s[t * D + i] = (real)(last[i] = (double)f[t * D + i] + (t ? 0.999 * last[i] : 0));
    memset(last, 0, sizeof(last));
    for (int t = T - 1; t >= 0; t--)
        for (int i = 0; i < D; i++) lambda[t * D + i] = (real)(last[i] = (double)ds[t * D + i]
                + (t < T - 1 ? 0.999 * last[i] : 0));
    feedback_forward_gpu(s_d, c_d, stats_d, m.weights, m.scratch, f_d, q_d, k_d, D, gamma_d, 1, T, D, 0, &m.p,
                         gpu.stream);
    check_error(gpu_error(s_d, s, T, D, D, 0), 0x1p-8, "s of a chain of 3000 rows: one rounding at most");
    feedback_backward_gpu(ds_d, dq_d, dk_d, dgamma_d, (float *)NULL, m.weights, m.scratch, ds_d, s_d, c_d,
                          stats_d, q_d, k_d, D, gamma_d, 1, T, D, &m.p, (ColumnSums *)NULL, gpu.stream);
    check_error(gpu_error(ds_d, lambda, T, D, D, 0), 0x1p-7, "its adjoint: two, of u and of the result");
    gpu_release();
}

// A model with seeded weights; NULL after a failed check.
static Model *model_on(const Backend *backend, const Config *c, int B, int T) {
    char error[ERROR_SIZE];
    Model *m = backend->create(c, B, T, TRAIN, error);
    if (!m) { check(0, "%s", error); return NULL; }
    initialise(backend->read(m, PARAMS), &m->table, 3);
    backend->write(m, PARAMS);
    return m;
}

// Two backward passes, then an update that changes nothing and one pass of twice the loss: the same gradients, for passes add to
// what is there and start again after an update. Each mixer has buffers of its own that this goes through.
static void test_gpu_passes(void) {
    heading("gradients add up, and start again after an update");
    enum { B = 3, T = 70, V = 50 };
    static const Precision precisions[] = {FP32, FP32, TF32, BF16};
    for (int mixer = 0; mixer < N_MIXERS; mixer++)
        for (int way = 0; way < 4; way++) { // CPU, then the GPU
            Config c = config_with(mixer, V, 64, 2, 4, 2, T);
            int ids[B * T];
            gpu.precision = precisions[way];
            const Backend *backend = way ? backend_gpu() : &cpu_backend;
            Model *m = model_on(backend, &c, B, T);
            if (!m) return;
            for (int n = 0; n < B * T; n++) ids[n] = random_int(0, V - 1);
            real *grads[2];
            for (int pass = 0; pass < 2; pass++) {
                AdamW none = {0, 0.9, 0.99, 1e-8, 0.1};
                for (int i = pass; i < 2; i++) {
                    backend->forward(m, ids, ids, B, T, no_dropout);
                    backend->backward(m, pass + 1);
                }
                grads[pass] = copy_of(backend->read(m, GRADS), m->table.count);
                backend->update(m, none, 1, 1);
            }
            precise *twice = zeros(m->table.count);
            for (int64_t i = 0; i < m->table.count; i++) twice[i] = (double)grads[0][i];
            check_error(error_of(grads[1], twice, m->table.count, 0), 1e-5, "%s, %s", mixers[mixer].name,
                        way ? precision_names[gpu.precision] : "CPU");
            backend->destroy(m);
        }
    release();
}

// Weights after some steps, the next one begun at once, or after a look at them, or at the gradients: the same bits, though the
// update of most layers goes on under what follows. They are large enough for it to take as long as that needs to get there.
static void test_gpu_update(void) {
    heading("the next step need not wait for the update");
    enum { B = 2, T = 16, V = 20, STEPS = 4 };
    Config c = config_with(SESSA, V, 768, 5, 4, 4, T);
    real *weights[3];
    gpu.precision = BF16;
    const Backend *backend = backend_gpu();
    for (int look = 0; look < 3; look++) {
        Model *m = model_on(backend, &c, B, T);
        if (!m) return;
        for (int step = 0; step < STEPS; step++) {
            int ids[B * T];
            AdamW adam = {1e-3, 0.9, 0.99, 1e-8, 0.1};
            for (int n = 0; n < B * T; n++) ids[n] = (7 * n * n + step) % V;
            backend->forward(m, ids, ids, B, T, no_dropout);
            backend->backward(m, 1);
            backend->update(m, adam, 1, step + 1);
            if (look) backend->read(m, look == 1 ? PARAMS : GRADS);
        }
        weights[look] = copy_of(backend->read(m, PARAMS), m->table.count);
        if (look) check(!memcmp(weights[0], weights[look], sizeof(real) * (size_t)m->table.count), "weights after 4 steps, %s read after each",
                        look == 1 ? "weights" : "gradients");
        backend->destroy(m);
    }
    release();
}

// 100 steps on the same batches of this program's own text: losses of GPU and CPU, the same bits twice, memory as T.
static void test_gpu_training(void) {
    heading("training on the GPU");
    enum { B = 8, T = 96, STEPS = 100, V = 128 };
    Config c = config_with(SESSA, V, 64, 3, 4, 2, T);
    char error[ERROR_SIZE];
    size_t size;
    unsigned char *text;
    if (file_read("train_sessa.c", &text, &size, error)) { check(0, "%s", error); return; }
    double losses[4][STEPS] = {{0}}, early = 0, late = 0, tf32_late = 0, bf16_late = 0;
    real *weights[2] = {NULL, NULL};
    static const Precision precisions[] = {FP32, FP32, TF32, BF16, BF16};
    for (int way = 0; way < 6; way++) { // CPU, then the GPU: float32, again, TF32, bf16, again
        gpu.precision = way ? precisions[way - 1] : FP32;
        const Backend *backend = way ? backend_gpu() : &cpu_backend;
        Model *m = model_on(backend, &c, B, T);
        if (!m) return;
        uint64_t state = 9;
        for (int step = 0; step < STEPS; step++) {
            int inputs[B * T], targets[B * T];
            for (int b = 0; b < B; b++) {
                size_t at = (size_t)(random_uniform(&state) * (double)(size - T - 1));
                for (int t = 0; t < T; t++) { inputs[b * T + t] = text[at + t] % V;
                                              targets[b * T + t] = text[at + t + 1] % V; }
            }
            Dropout off = {0, 0, 0};
            AdamW adam = {3e-3 * fmin(1, (step + 1) / 20.0), 0.9, 0.99, 1e-8, 0.1};
            backend->forward(m, inputs, targets, B, T, off);
            backend->backward(m, 1.0 / (B * T));
            double loss = backend->loss(m) / (B * T);
            backend->update(m, adam, 1, step + 1);
            int row = way == 0 ? 0 : way <= 2 ? 1 : way == 3 ? 2 : 3;
            losses[row][step] = loss;
        }
        int twin = way == 2 || way == 5;
        real *kept = copy_of(backend->read(m, PARAMS), m->table.count);
        check(norm(backend->read(m, GRADS), m->table.count) == 0, "no gradient after an update");
        backend->read(m, GRADS)[7] = NAN;
        backend->write(m, GRADS);
        AdamW any = {1e-3, 0.9, 0.99, 1e-8, 0.1};
        double length = backend->update(m, any, 1, STEPS + 1);
        const real *now = backend->read(m, PARAMS);
        check(!isfinite(length) && !memcmp(kept, now, sizeof(real) * (size_t)m->table.count), "%s: no update with a gradient of NaN",
              backend->name);
        if (way == 1 || way == 4) { weights[way == 4] = copy_of(now, m->table.count); }
        if (twin) check(!memcmp(weights[way == 5], now, sizeof(real) * (size_t)m->table.count),
                        "%s: the same weights, bit for bit, in a second run of 100 steps",
                        precision_names[gpu.precision]);
        backend->destroy(m);
    }
    for (int step = 0; step < STEPS; step++) {
        worst_of(step < 10 ? &early : &late, fabs(losses[1][step] / losses[0][step] - 1));
        worst_of(&tf32_late, fabs(losses[2][step] / losses[0][step] - 1));
        worst_of(&bf16_late, fabs(losses[3][step] / losses[0][step] - 1));
    }
    printf("  loss of steps 1, 10, 50, 100: CPU %.4f %.4f %.4f %.4f, bf16 %.4f %.4f %.4f %.4f\n", losses[0][0],
           losses[0][9], losses[0][49], losses[0][99], losses[3][0], losses[3][9], losses[3][49], losses[3][99]);
    check_error(early, 1e-5, "fp32: losses of the first 10 steps against the CPU's");
    check_error(late, 1e-3, "fp32: losses up to step 100");
    check_error(tf32_late, 1e-2, "tf32: losses up to step 100");
    check_error(bf16_late, 3e-2, "bf16: losses up to step 100");
    gpu.precision = BF16;
    double bytes[5];
    for (int i = 0; i < 5; i++) {
        Config long_one = config_with(SESSA, 256, 128, 2, 4, 4, 1024 << i);
        Model *m = backend_gpu()->create(&long_one, 1, 1024 << i, TRAIN, error);
        bytes[i] = m ? m->bytes - 2 * WORKSPACE : NAN;
        if (m) backend_gpu()->destroy(m);
    }
    printf("  MiB at T 1024, 2048, .. 16384: %.1f %.1f %.1f %.1f %.1f\n", bytes[0] / 0x1p20, bytes[1] / 0x1p20, bytes[2] / 0x1p20,
           bytes[3] / 0x1p20, bytes[4] / 0x1p20);
    if (gpu.hopper) check(bytes[2] <= 2 * bytes[1], "T doubled from 2048: memory at most doubled");
    check(bytes[4] <= 2 * bytes[3], "T doubled from 8192: memory at most doubled"); // without tiles a panel holds all rows before
    Config huge = config_with(SESSA, 50000, 4096, 200, 4, 4, 8192);
    check(!backend_gpu()->create(&huge, 64, 8192, TRAIN, error) && strstr(error, "GiB"), "too large: %.90s",
          error);
    free(text);
    release();
}

// Token by token behind a prompt, wide enough for all paths of the decoder, against the C forward pass.
static void test_gpu_decode(void) {
    heading("bf16: token by token against one forward pass");
    enum { T = 300, PROMPT_LENGTH = 7, V = 70 };
    Config configs[] = {config_with(SESSA, V, 128, 2, 4, 2, T), config_with(SESSA, V, 66, 2, 3, 3, T),
                        config_with(SESSA, V, 64, 2, 1, 1, T), config_with(ATTENTION, V, 96, 2, 4, 1, T)};
    for (int i = 0; i < 4; i++) {
        char error[ERROR_SIZE];
        Model *whole = create(&configs[i], 1, T, EVALUATE), *stepwise = backend_gpu()->create(&configs[i], 1, T, GENERATE, error);
        if (!stepwise) { check(0, "%s", error); return; }
        int *ids = random_ids(T, V, 0);
        shake_weights(whole, 0.05);
        memcpy(backend_gpu()->read(stepwise, PARAMS), whole->params, sizeof(real) * (size_t)whole->table.count);
        backend_gpu()->write(stepwise, PARAMS);
        model_forward(whole, ids, ids, 1, T, {0, 0, 0});
        precise worst = 0, *ref = zeros(V);
        real *logits = poison(V);
        for (int t = 0; t < T; t++) {
            if (t < PROMPT_LENGTH - 1) continue;
            if (t == PROMPT_LENGTH - 1) backend_gpu()->extend(stepwise, ids, PROMPT_LENGTH, 0, logits);
            else backend_gpu()->extend(stepwise, ids + t, 1, t, logits);
            for (int n = 0; n < V; n++) ref[n] = (double)whole->acts.logits[t * V + n];
            worst_of(&worst, error_of(logits, ref, V, 0));
        }
        check_error(worst, 0x1p-8 * (8 * 2 + 2), "D %d, H %d, G %d: logits of %d tokens, worst", configs[i].d_model,
                    configs[i].n_heads, configs[i].n_kv_heads, T - PROMPT_LENGTH);
        model_free(whole);
        backend_gpu()->destroy(stepwise);
        release();
    }
}

static int run_tested(int argc, char **argv) {
    const char *wanted = getenv("TEST_PRECISION");
    for (int p = FP32; wanted && p <= BF16; p++)
        if (!strcmp(wanted, precision_names[p])) gpu.precision = (Precision)p;
    int code = run_cuda_program(argc, argv);
    unguard(gpu.workspace, 2 * (WORKSPACE + GUARD));
    return n_broken ? 1 : code;
}

static void test_cuda(const glob_t *dumps) {
    static const char *titles[] = {"fp32: layers against the C functions, shapes odd and even", "tf32",
                                   "bf16: layers against the C functions, shapes odd and even"};
    gpu.precision = FP32;
    test_gpu_layers<float>(titles[FP32]);
    gpu.precision = BF16;
    test_gpu_layers<bf16>(titles[BF16]);
    test_gpu_tiles();
    test_peaked();
    test_gpu_passes();
    test_gpu_update();
    test_gpu_training();
    test_gpu_decode();
    // A bf16 number is off by 2^-8 of itself at most; the way through a layer has 8 roundings, and so has the way back.
    for (size_t i = 0; i < dumps->gl_pathc; i++) {
        Safetensors file;
        char error[ERROR_SIZE];
        if (safetensors_read(&file, dumps->gl_pathv[i], error)) continue;
        dump_bound = 0x1p-8 * (8 * atof(safetensors_meta(&file, "n_layers")) + 2);
        safetensors_free(&file);
        printf("\nbf16:");
        check_dump(dumps->gl_pathv[i]);
    }
    gpu.precision = FP32;
    dump_bound = 1e-4;
    check(n_broken == 0 && n_bands > 0, "nothing was written behind any buffer so far");
}
#endif

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "--run")) { // the program, started by start()
        start_again(argv);
        argv[1] = argv[0];
        return run_tested(argc - 1, argv + 1);
    }
#ifdef TEST_CUDA
    char no_gpu[ERROR_SIZE];
    if (gpu_open(no_gpu)) { fprintf(stderr, "test_sessa: %s\n", no_gpu); return 1; }
#endif
    if (!realpath("/proc/self/exe", self) && !realpath(argv[0], self)) return 1;
    if (!getenv("OMP_WAIT_POLICY")) { // threads that spin at barriers starve each other on a busy machine; OpenMP reads
        setenv("OMP_WAIT_POLICY", "passive", 1); // this before main, so start again. A thousand rounds of waiting are
        setenv("GOMP_SPINCOUNT", "1000", 1);     // less than what a core that has gone idle takes to wake up
        execv(self, argv);
    }
#ifdef TEST_CUDA
    gpu.precision = FP32; // 1e-4 in float32
    dump_bound = 1e-4;
#endif
    int only_layers = argc == 2 && !strcmp(argv[1], "--layers"), everything = argc == 1 || only_layers;
    for (int i = 1; i < argc && !everything; i++) check_dump(argv[i]);
    if (everything) {
        glob_t dumps;
        char *name = strrchr(self, '/');
        memset(&dumps, 0, sizeof(dumps));
        if (access("data", F_OK)) { // started from another folder: the dumps are beside the test
            *name = 0;
            if (chdir(self)) return 1;
            *name = '/';
        }
        glob("data/ref_*.safetensors", 0, NULL, &dumps);
#ifdef TEST_CUDA
        uint64_t before = chance; // what follows draws the numbers that it draws without a GPU
        test_cuda(&dumps);
        chance = before;
#endif
        test_numbers();
        test_matmul();
        test_attention();
        test_extremes();
        test_scan();
        test_memory();
        if (IS_DOUBLE) {
            test_layers();
            test_model_gradients();
        }
        test_training_parts();
        test_extend();
        if (!only_layers) test_program(&dumps);
        if (!dumps.gl_pathc) check(0, "no dump data/ref_*.safetensors (dev/ makes them)");
        for (size_t i = 0; i < dumps.gl_pathc; i++) check_dump(dumps.gl_pathv[i]);
        globfree(&dumps);
    }
    printf("\n%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
