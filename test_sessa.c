/*
The test of train_sessa.c: every layer against the plain loops of its equations, every gradient against
central differences (in float64), and whole models against dumps of the PyTorch reference.

    ./test_sessa                     everything, and the dumps data/ref_*.safetensors
    ./test_sessa --layers            without what starts this test again: for emulators
    ./test_sessa my.safetensors ...  only these dumps: of any model, with the tensors that you chose

Built twice: as it is (float32), and with -DREAL=double, where errors are rounding errors of float64 and so
tiny that a wrong term cannot hide behind them. Each line is one check: what, the error measured, its bound,
ok or FAIL. Errors are relative and of whole tensors, ‖x - ref‖/‖ref‖, unless the line says otherwise.

The CUDA twin is held against the same dumps by the same code: test_sessacu is this file with -DTEST_CUDA. The
other tests are in dev/trust/: test_runs.c and test_files.c, the program as a user runs it; test_kernels.cu,
what the twin computes.
*/
#define SESSA_NO_MAIN
#ifdef TEST_CUDA
#define GUARD_BANDS
#include "train_sessa.cu"
#else
#include "train_sessa.c"
#endif
#include "dev/trust/check.h"
#include <glob.h>

// ----------------------------------------------------------------------------
// elementary functions, random numbers

static void check_exp(void) {
    double worst = 0;
    for (double x = -86.9; x < 87.9; x += 0.00137) {
        real rounded = (real)x;
        double exact = exp((double)rounded);
        double bound = IS_DOUBLE ? 1e-15 : 2.5e-7 + 6e-8 * fabs(x); // half of it with fused multiply-add
        worst_of(&worst, fabs((double)exp_real(rounded) - exact) / exact / bound);
    }
    check_error(worst, 1, "exp_real: relative error, as a share of 2.5e-7 + 6e-8 |x|");
    real huge = exp_real((real)1e30), tiny = exp_real((real)-1e30), at_zero = exp_real(0);
    check(huge > (real)1e38 && tiny == 0 && at_zero == 1 && isnan(exp_real((real)NAN)) &&
              exp_real((real)-INFINITY) == 0,
          "exp_real: 1 at 0, large at one end, 0 at the other, NaN stays NaN");
}

static void check_normal_cdf(void) {
    double worst = 0, worst_tail = 0;
    for (double x = -12; x < 12; x += 0.00173) {
        real rounded = (real)x;
        double exact = 0.5 * erfc(-(double)rounded * 0.70710678118654752440);
        double value = (double)normal_cdf(rounded, exp_real(-rounded * rounded / 2));
        worst_of(&worst, fabs(value - exact));
        if (x < 0 && x > -5) worst_of(&worst_tail, fabs(value - exact) / exact);
    }
    check_error(worst, bound_of(3e-7, 1e-15), "normal_cdf: absolute error, |x| < 12");
    check_error(worst_tail, bound_of(3e-6, 1e-12), "normal_cdf: relative error of the tail, -5 < x < 0");
    double below = (double)normal_cdf(-30, 0), above = (double)normal_cdf(30, 0);
    check(above == 1 && fabs(below) < 1e-37 && isnan(normal_cdf((real)NAN, (real)NAN)),
          "normal_cdf: 0 and 1 at the ends, NaN stays NaN");
}

static void test_numbers(void) {
    heading("elementary functions, messages and random numbers");
    check_exp();
    check_normal_cdf();
    char line[ERROR_SIZE];
    fail(line, "caf\xC3\xA9", "%s", "\x1B[2J\n\xC2\x9B\xFF\xC3");
    check(!strcmp(line, "caf\xC3\xA9: ?[2J?????"),
          "messages: control characters and what is no UTF-8 become '?'");
    uint64_t state = 0;
    uint64_t first = random_u64(&state), second = random_u64(&state);
    check(first == 0xE220A8397B1DCDAFu && second == 0x6E789E6AA1B965F4u,
          "random_u64: the first two words of SplitMix64 from state 0");
}

// ----------------------------------------------------------------------------
// the matrix product and the triangular system, against three-line loops

// ref = alpha a b + beta before + bias, in rows ld apart
static void plain_matmul(precise *ref, int ld, Matrix a, Matrix b, int M, int N, int K, real alpha, real beta,
                         const real *before, const real *bias) {
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            precise sum = 0;
            for (int k = 0; k < K; k++)
                sum += (double)a.at[m * a.row + k * a.col] * (double)b.at[k * b.row + n * b.col];
            double kept = beta == 0 ? 0 : (double)beta * (double)before[m * ld + n];
            ref[m * ld + n] = (double)alpha * sum + kept + (bias ? (double)bias[n] : 0);
        }
}

// Random numbers as a matrix of at most `rows` times `cols`: row after row, column after column, or every
// other number.
static Matrix random_matrix(int kind, int rows, int cols) {
    real *numbers = noise(2 * rows * cols + 1, 1);
    Matrix by_rows = {numbers, cols, 1}, by_columns = {numbers, 1, rows}, apart = {numbers, 2 * cols, 2};
    return kind == 0 ? by_rows : kind == 1 ? by_columns : apart;
}

static void test_matmul(void) {
    heading("matrix product against plain loops");
    static const int Ms[] = {1, 2, TILE_ROWS, TILE_ROWS + 1, 61};
    static const int Ns[] = {1, 3, TILE_COLS, TILE_COLS + 1, BLOCK_N + 5};
    static const int Ks[] = {0, 1, 5, BLOCK_K, BLOCK_K + 3};
    static const real alphas[] = {1, (real)0.5, 1, (real)-0.25}, betas[] = {0, 1, (real)0.75, 0};
    double worst = 0, worst_row = 0; // of one row: a product of its own
    for (int i = 0; i < 500; i++) {
        int M = Ms[i % 5], N = Ns[i / 5 % 5], K = Ks[i / 25 % 5], form = i / 125, ld = N + random_int(0, 3);
        int kind_a = random_int(0, 2), kind_b = random_int(0, 2), pad = random_int(0, 3);
        Matrix a = random_matrix(kind_a, M + pad, K + pad), b = random_matrix(kind_b, K + pad, N + pad);
        const real *bias = random_int(0, 1) ? noise(N, 1) : NULL;
        real *out = poison((int64_t)M * ld), *before = noise((int64_t)M * ld, 1);
        precise *ref = zeros((int64_t)M * ld);
        plain_matmul(ref, ld, a, b, M, N, K, alphas[form], betas[form], before, bias);
        for (int m = 0; m < M && betas[form] != 0; m++) // what beta 0 multiplies may be NaN
            memcpy(out + m * ld, before + m * ld, sizeof(real) * (size_t)N);
        matmul(out, ld, a, b, M, N, K, alphas[form], betas[form], bias);
        worst_of(M == 1 ? &worst_row : &worst, rows_error(out, ref, M, N, ld, sqrt((double)M * N * K) / 4));
        release();
    }
    check_error(worst, bound_of(2e-6, 4e-15), "matmul, 400 shapes, strides, alpha, beta, bias: worst");
    check_error(worst_row, bound_of(2e-6, 4e-15), "matmul of one row, 100 shapes: worst");
}

// Solves (I - lower) x = x for n rows ld apart, or with its transpose: forward row t takes from the rows
// before it, backward it gives to them.
static void plain_solve(precise *x, int ld, const real *lower, int n, int D, int backward) {
    for (int step = 0; step < n; step++) {
        int t = backward ? n - 1 - step : step;
        for (int j = 0; j < t; j++)
            for (int e = 0; e < D; e++) {
                double weight = (double)lower[t * n + j];
                if (backward) x[j * ld + e] += weight * x[t * ld + e];
                else x[t * ld + e] += weight * x[j * ld + e];
            }
    }
}

static void test_triangular(void) {
    heading("triangular system against plain loops");
    static const int sizes[] = {1, 2, 5, TILE_ROWS, TILE_ROWS + 1, 31, PANEL_MAX - 1, PANEL_MAX};
    static const int widths[] = {1, 7, TILE_COLS, TILE_COLS + 1, 100};
    double worst[2] = {0, 0}; // forward, backward
    for (int i = 0; i < 80; i++) {
        int n = sizes[i % 8], D = widths[i / 8 % 5], backward = i / 40, ld = D + random_int(0, 3);
        real *lower = noise((int64_t)n * n, 0.7 / sqrt((double)n)), *x = poison((int64_t)n * ld);
        precise *ref = zeros((int64_t)n * ld);
        for (int t = 0; t < n; t++) {
            for (int j = t; j < n; j++) lower[t * n + j] = 0;
            for (int e = 0; e < D; e++) {
                x[t * ld + e] = (real)random_normal(&chance);
                ref[t * ld + e] = (double)x[t * ld + e];
            }
        }
        plain_solve(ref, ld, lower, n, D, backward);
        Matrix reversed = {lower + n * n - 1, -1, -n};
        if (backward) triangular_solve(x + (size_t)(n - 1) * ld, -ld, reversed, n, D);
        else triangular_solve(x, ld, rows_of(lower, n), n, D);
        worst_of(&worst[backward], rows_error(x, ref, n, D, ld, 0));
        release();
    }
    check_error(worst[0], bound_of(1e-6, 2e-15), "triangular_solve, 40 shapes: worst");
    check_error(worst[1], bound_of(1e-6, 2e-15),
                "triangular_solve of the transposed system, 40 shapes: worst");
}

// ----------------------------------------------------------------------------
// attention and feedback against the loops of their equations, number by number in double

// Σ a_i b_i
static double dot_of(const real *a, const real *b, int n) {
    precise sum = 0;
    for (int i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

// [15, 16] o_t = Σ_{j≤t} p_tj v_j and, with dout, the gradients of Σ o·dout. Layouts are those of
// attention_forward.
static void plain_attention(precise *out, precise *dq, precise *dk, precise *dv, const real *dout,
                            const real *q, int ld, const real *k, const real *v, int ld_kv, int B, int T,
                            int H, int G, int d, int first) {
    precise *p = zeros(T), *dp = zeros(T);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++)
            for (int t = first; t < T; t++) {
                size_t row = (size_t)b * (T - first) + t - first;
                size_t at = (row * H + h) * d, at_q = row * ld + h * d;
                size_t kv = (size_t)b * T * ld_kv + h / (H / G) * d;
                precise sum = 0, mean = 0;
                for (int j = 0; j <= t; j++)
                    sum += p[j] = exp(dot_of(q + at_q, k + kv + (size_t)j * ld_kv, d) / sqrt((double)d));
                for (int j = 0; j <= t; j++) {
                    const real *value = v + kv + (size_t)j * ld_kv;
                    for (int i = 0; i < d; i++) out[at + i] += p[j] / sum * (double)value[i];
                }
                if (!dout) continue;
                for (int j = 0; j <= t; j++) {
                    size_t at_v = kv + (size_t)j * ld_kv;
                    p[j] /= sum;
                    dp[j] = dot_of(dout + at, v + at_v, d);
                    for (int i = 0; i < d; i++) dv[at_v + i] += p[j] * (double)dout[at + i];
                    mean += p[j] * dp[j];
                }
                for (int j = 0; j <= t; j++) {
                    size_t at_k = kv + (size_t)j * ld_kv;
                    double dlogit = p[j] * (dp[j] - mean) / sqrt((double)d);
                    for (int i = 0; i < d; i++) {
                        dq[at_q + i] += dlogit * (double)k[at_k + i];
                        dk[at_k + i] += dlogit * (double)q[at_q + i];
                    }
                }
            }
}

// [17, 19-22] s_t = f_t + γ_t Σ_{j<t} α_tj s_j and, with ds, the gradients of Σ s·ds. The rows of s before
// first are given.
static void plain_feedback(precise *s, precise *df, precise *dq, precise *dk, precise *dgamma, const real *ds,
                           const real *f, const real *q, int ld, const real *k, int ld_k, const real *gamma,
                           int B, int T, int D, int first) {
    precise *alpha = zeros((int64_t)T * T), *dalpha = zeros(T);
    for (int b = 0; b < B; b++) {
        size_t row0 = (size_t)b * (T - first), all0 = (size_t)b * T;
        for (int t = first; t < T; t++) {
            size_t row = row0 + t - first, at = (all0 + t) * D;
            precise *weights = alpha + t * T, sum = 0;
            for (int j = 0; j < t; j++)
                sum += weights[j] = exp(dot_of(q + row * ld, k + (all0 + j) * ld_k, D) / sqrt((double)D));
            for (int i = 0; i < D; i++) s[at + i] = (double)f[row * D + i];
            for (int j = 0; j < t; j++) {
                weights[j] /= sum;
                for (int i = 0; i < D; i++)
                    s[at + i] += (double)gamma[row] * weights[j] * s[(all0 + j) * D + i];
            }
        }
        if (!ds) continue;
        for (size_t i = all0 * D; i < (all0 + T) * D; i++) df[i] = (double)ds[i];
        for (int t = T - 1; t >= 0; t--) { // df_t is complete when the rows after it have given
            size_t row = all0 + t;
            const precise *weights = alpha + t * T;
            double gain = (double)gamma[row];
            precise mean = 0;
            for (int j = 0; j < t; j++) {
                size_t at = (all0 + j) * D;
                dalpha[j] = 0;
                for (int i = 0; i < D; i++) {
                    df[at + i] += gain * weights[j] * df[row * D + i];
                    dalpha[j] += df[row * D + i] * s[at + i];
                }
                mean += weights[j] * dalpha[j];
            }
            dgamma[row] = mean;
            for (int j = 0; j < t; j++) {
                size_t at_k = (all0 + j) * ld_k;
                double dlogit = gain * weights[j] * (dalpha[j] - mean) / sqrt((double)D);
                for (int i = 0; i < D; i++) {
                    dq[row * ld + i] += dlogit * (double)k[at_k + i];
                    dk[at_k + i] += dlogit * (double)q[row * ld + i];
                }
            }
        }
    }
}

static const int lengths[] = {1, 2, 3, 5, 8, 9, 23, 24, 25, 49, 61, 97, 121, 150, 64, 33};
enum { N_LENGTHS = 16 };

// A random shape of T rows in panels of height P; worst: out, out after known positions, dq, dk, dv
static void compare_attention(double worst[5], int T, int P) {
    int B = random_int(1, 3), G = random_int(1, 2), H = G * random_int(1, 3), d = 2 * random_int(1, 6);
    int D = H * d, first = random_int(0, T - 1), ld = D + random_int(0, 3);
    int64_t rows = (int64_t)B * T, size = rows * D, wide = rows * ld;
    real *q = noise(wide, 1.5), *k = noise(wide, 1), *v = noise(wide, 1), *dout = noise(size, 1);
    real *out = poison(size), *stats = poison(rows * H * 2), *scratch = scratch_for(T);
    precise *ref = zeros(size), *dq = zeros(wide), *dk = zeros(wide), *dv = zeros(wide);
    plain_attention(ref, dq, dk, dv, dout, q, ld, k, v, ld, B, T, H, G, d, 0);
    attention_forward(out, stats, work_with(scratch, P), q, k, v, shape_of(B, T, 0, H, G, d, ld));
    worst_of(&worst[0], error_of(out, ref, size, 0));

    real *dq_layer = poison(wide), *dk_layer = poison(wide), *dv_layer = poison(wide);
    attention_backward(dq_layer, dk_layer, dv_layer, work_with(scratch, P), dout, stats, q, k, v,
                       shape_of(B, T, 0, H, G, d, ld));
    double floor = 0.1 * length_of(dout, size);
    worst_of(&worst[2], rows_error(dq_layer, dq, rows, D, ld, floor));
    worst_of(&worst[3], rows_error(dk_layer, dk, rows, G * d, ld, floor));
    worst_of(&worst[4], rows_error(dv_layer, dv, rows, G * d, ld, floor));

    int64_t late_rows = (int64_t)B * (T - first); // the same with the positions before `first` known
    real *late = poison(late_rows * D), *late_stats = poison(late_rows * H * 2);
    precise *late_ref = zeros(late_rows * D);
    plain_attention(late_ref, NULL, NULL, NULL, NULL, q, ld, k, v, ld, B, T, H, G, d, first);
    attention_forward(late, late_stats, work_with(scratch, P), q, k, v, shape_of(B, T, first, H, G, d, ld));
    worst_of(&worst[1], error_of(late, late_ref, late_rows * D, 0));
    release();
}

// A random shape of T rows in panels of height P; worst: s, s after known positions, df, dq', dk', dgamma
static void compare_feedback(double worst[6], int T, int P) {
    int B = random_int(1, 3), D = random_int(2, 40), first = random_int(0, T - 1), ld = D + random_int(0, 3);
    int64_t n = (int64_t)B * T, wide = n * ld, size = n * D;
    real *f = noise(size, 1), *q = noise(wide, 1.5), *k = noise(wide, 1), *gamma = noise(n, 1);
    real *ds = noise(size, 1), *scratch = scratch_for(T);
    for (int64_t r = 0; r < n; r++) gamma[r] = (real)(0.999 * tanh((double)gamma[r]));
    real *s = poison(size), *stats = poison(2 * n);
    precise *ref = zeros(size), *df = zeros(size), *dq = zeros(wide), *dk = zeros(wide), *dgamma = zeros(n);
    plain_feedback(ref, df, dq, dk, dgamma, ds, f, q, ld, k, ld, gamma, B, T, D, 0);
    feedback_forward(s, stats, work_with(scratch, P), f, q, k, gamma, shape_of(B, T, 0, 1, 1, D, ld));
    worst_of(&worst[0], error_of(s, ref, size, 0));

    real *df_layer = copy_of(ds, size), *dq_layer = poison(wide), *dk_layer = poison(wide);
    real *dgamma_layer = poison(n);
    feedback_backward(df_layer, dq_layer, dk_layer, dgamma_layer, work_with(scratch, P), s, stats, q, k,
                      gamma, shape_of(B, T, 0, 1, 1, D, ld));
    double floor = 0.1 * length_of(ds, size);
    worst_of(&worst[2], error_of(df_layer, df, size, 0));
    worst_of(&worst[3], rows_error(dq_layer, dq, n, D, ld, floor));
    worst_of(&worst[4], rows_error(dk_layer, dk, n, D, ld, floor));
    worst_of(&worst[5], error_of(dgamma_layer, dgamma, n, floor));

    precise *late_ref = zeros(size); // the same with the rows before `first` given
    real *late = poison(size), *late_stats = poison(2 * n);
    for (int b = 0; b < B; b++)
        for (int at = b * T * D; at < (b * T + first) * D; at++)
            late_ref[at] = (double)(late[at] = (real)random_normal(&chance));
    plain_feedback(late_ref, NULL, NULL, NULL, NULL, NULL, f, q, ld, k, ld, gamma, B, T, D, first);
    feedback_forward(late, late_stats, work_with(scratch, P), f, q, k, gamma,
                     shape_of(B, T, first, 1, 1, D, ld));
    worst_of(&worst[1], error_of(late, late_ref, size, 0));
    release();
}

static void test_attention(void) {
    static const char *names[] = {"out", "out after known positions", "dq", "dk", "dv"};
    heading("attention against the loops of its equations: T from 1 to 150, poisoned outputs");
    for (int i = 0; i < N_HEIGHTS; i++) {
        double worst[5] = {0};
        int P = panel_heights[i];
        for (int c = 0; c < N_LENGTHS; c++) compare_attention(worst, lengths[c], P);
        for (int n = 0; n < 5; n++)
            check_error(worst[n], bound_of(3e-6, 1e-14), "attention, P %d, %s", P, names[n]);
    }
}

static void test_feedback(void) {
    static const char *names[] = {"s", "s after known positions", "df", "dq'", "dk'", "dgamma"};
    heading("feedback against the loops of its equations: T from 1 to 150, poisoned outputs");
    for (int i = 0; i < N_HEIGHTS; i++) {
        double worst[6] = {0};
        int P = panel_heights[i];
        for (int c = 0; c < N_LENGTHS; c++) compare_feedback(worst, lengths[c], P);
        for (int n = 0; n < 6; n++)
            check_error(worst[n], bound_of(3e-6, 1e-14), "feedback, P %d, %s", P, names[n]);
    }
}

// Every gain at ±γ_max.
static void check_gain(double gain) {
    enum { T = 150, D = 4, SIZE = T * D };
    real *f = noise(SIZE, 1), *q = noise(SIZE, 0.5), *k = noise(SIZE, 0.5), *gamma = noise(T, 0);
    real *ds = noise(SIZE, 1), *scratch = scratch_for(T), *s = poison(SIZE), *stats = poison(2 * T);
    real *df_layer = copy_of(ds, SIZE), *dq_layer = poison(SIZE), *dk_layer = poison(SIZE);
    real *dgamma_layer = poison(T);
    precise *ref = zeros(SIZE), *df = zeros(SIZE), *dq = zeros(SIZE), *dk = zeros(SIZE), *dgamma = zeros(T);
    precise largest = 0, largest_f = 0, worst = 0;
    for (int t = 0; t < T; t++) gamma[t] = (real)gain;
    plain_feedback(ref, df, dq, dk, dgamma, ds, f, q, D, k, D, gamma, 1, T, D, 0);
    feedback_forward(s, stats, work_with(scratch, 0), f, q, k, gamma, shape_of(1, T, 0, 1, 1, D, D));
    feedback_backward(df_layer, dq_layer, dk_layer, dgamma_layer, work_with(scratch, 0), s, stats, q, k,
                      gamma, shape_of(1, T, 0, 1, 1, D, D));
    check_error(error_of(s, ref, SIZE, 0), bound_of(1e-5, 1e-13), "feedback, every gain %g: s", gain);
    worst_of(&worst, error_of(df_layer, df, SIZE, 0));
    worst_of(&worst, error_of(dgamma_layer, dgamma, T, 0));
    worst_of(&worst, error_of(dq_layer, dq, SIZE, 0));
    worst_of(&worst, error_of(dk_layer, dk, SIZE, 0));
    check_error(worst, bound_of(1e-4, 1e-12), "feedback, every gain %g: gradients", gain);
    for (int i = 0; i < SIZE; i++) {
        worst_of(&largest, fabs((double)s[i]));
        worst_of(&largest_f, fabs((double)f[i]));
    }
    check_error(largest / (largest_f * 1000), 1, "|s| within max |f| / (1 - 0.999), as a share of it");
    release();
}

// Logits of exactly ±1e4 in attention, or in feedback: a softmax is then the mean over the keys with the
// query's sign, over all if there is none. The plain loops above would overflow.
static void check_large_logits(int feedback) {
    enum { T = 150, D = 4, SIZE = T * D };
    real *f = noise(SIZE, 1), *q = noise(SIZE, 0), *k = noise(SIZE, 0), *gamma = noise(T, 0.3);
    real *out = poison(SIZE), *stats = poison(2 * T), *scratch = scratch_for(T);
    precise *ref = zeros(SIZE);
    for (int t = 0; t < T; t++) {
        q[t * D] = (real)(random_int(0, 1) ? 2e4 : -2e4); // times 1/sqrt(4)
        k[t * D] = (real)(t > T / 2 && random_int(0, 1) ? 1 : -1);
    }
    for (int t = 0; t < T; t++) {
        precise n = 0, all = feedback ? t : t + 1, sum[D] = {0}, sum_all[D] = {0};
        for (int j = 0; j < all; j++) {
            int match = (q[t * D] > 0) == (k[j * D] > 0);
            n += match;
            for (int e = 0; e < D; e++) {
                double value = feedback ? ref[j * D + e] : (double)f[j * D + e];
                sum[e] += match ? value : 0;
                sum_all[e] += value;
            }
        }
        for (int e = 0; e < D; e++) {
            double mean = n ? sum[e] / n : all ? sum_all[e] / all : 0;
            ref[t * D + e] = feedback ? (double)f[t * D + e] + (double)gamma[t] * mean : mean;
        }
    }
    if (feedback)
        feedback_forward(out, stats, work_with(scratch, 0), f, q, k, gamma, shape_of(1, T, 0, 1, 1, D, D));
    else attention_forward(out, stats, work_with(scratch, 0), q, k, f, shape_of(1, T, 0, 1, 1, D, D));
    check_error(error_of(out, ref, SIZE, 0), bound_of(3e-6, 1e-14), "%s with logits of 1e4 and -1e4",
                feedback ? "feedback" : "attention");
    release();
}

static void check_large_losses(void) {
    enum { V = 5 };
    const real high = (real)1e4, low = (real)-1e4;
    const real logits[2 * V] = {high, low, 0, high, 0, low, low, low, low, low};
    static const int targets[2] = {1, 4};
    static const double wanted[2 * V] = {0.5, -1, 0, 0.5, 0, 0.2, 0.2, 0.2, 0.2, -0.8};
    real losses[2], sums[2], grads[2 * V];
    precise worst = 0, off = 0;
    crossentropy_forward(losses, sums, logits, targets, 2, V);
    crossentropy_backward(grads, logits, sums, targets, 1, 2, V);
    worst_of(&worst, fabs((double)losses[0] - 2e4 - log(2.0)) / 2e4);
    worst_of(&worst, fabs((double)losses[1] - log(5.0)) / 1e4);
    for (int e = 0; e < 2 * V; e++) worst_of(&off, fabs((double)grads[e] - wanted[e]));
    check_error(worst, bound_of(1e-7, 1e-12), "cross-entropy of logits of 1e4 and -1e4");
    check_error(off, bound_of(1e-3, 1e-11), "its gradient"); // a logit of 1e4 has a last digit of 1e-3
}

static void test_extremes(void) {
    heading("the ends of the scales: gains of 0.999, logits of 1e4");
    uint64_t before = chance; // the tests behind this one see the numbers that they always saw
    check_gain(0.999);
    check_gain(-0.999);
    check_large_logits(0);
    check_large_logits(1);
    check_large_losses();
    chance = before;
}

// h_t = exp(-exp(A_log) Δ_t) h_{t-1} + Δ_t b_t x_t^T, y_t = c_t^T h_t + skip·x_t token by token, from the
// state h (B,S,E), and with dy the gradients of Σ y·dy: the states are remembered, and dh runs back over
// them. Behind dA (heads): of what a head's sum adds up, the absolute values.
static void plain_scan(precise *y, precise *h, precise *dxbc, precise *dstep, precise *dA, precise *dskip,
                       const real *dy, const real *xbc, const real *step, const real *A_log, const real *skip,
                       int B, int T, int E, int S, int heads) {
    int W = E + 2 * S, w = E / heads;
    precise *all = zeros((int64_t)(T + 1) * S), *dh = zeros(S);
    for (int b = 0; b < B; b++)
        for (int e = 0; e < E; e++) {
            int head = e / w;
            double rate = exp((double)A_log[head]);
            for (int i = 0; i < S; i++) {
                all[i] = h[((int64_t)b * S + i) * E + e];
                dh[i] = 0;
            }
            for (int t = 0; t < T; t++) {
                const real *x = xbc + (int64_t)(b * T + t) * W;
                const precise *before = all + t * S;
                precise *after = all + (t + 1) * S, sum = (double)skip[head] * (double)x[e];
                double delta = (double)step[(b * T + t) * heads + head];
                for (int i = 0; i < S; i++) {
                    after[i] = exp(-rate * delta) * before[i] + delta * (double)x[E + i] * (double)x[e];
                    sum += (double)x[E + S + i] * after[i];
                }
                y[(int64_t)(b * T + t) * E + e] = sum;
            }
            for (int i = 0; i < S; i++) h[((int64_t)b * S + i) * E + e] = all[T * S + i];
            for (int t = T - 1; dy && t >= 0; t--) {
                const real *x = xbc + (int64_t)(b * T + t) * W;
                precise *dx = dxbc + (int64_t)(b * T + t) * W, decay_gradient = 0, absolute = 0;
                double g = (double)dy[(int64_t)(b * T + t) * E + e];
                double delta = (double)step[(b * T + t) * heads + head], decay = exp(-rate * delta);
                dskip[head] += g * (double)x[e];
                dx[e] += g * (double)skip[head];
                for (int i = 0; i < S; i++) {
                    dx[E + S + i] += g * all[(t + 1) * S + i];
                    dh[i] += g * (double)x[E + S + i];
                    dx[e] += dh[i] * delta * (double)x[E + i];
                    dx[E + i] += dh[i] * delta * (double)x[e];
                    dstep[(b * T + t) * heads + head] += dh[i] * (double)x[E + i] * (double)x[e];
                    decay_gradient += dh[i] * all[t * S + i];
                    absolute += dh[i] * all[t * S + i] > 0 ? dh[i] * all[t * S + i] : -dh[i] * all[t * S + i];
                    dh[i] *= decay;
                }
                dstep[(b * T + t) * heads + head] -= decay_gradient * decay * rate;
                dA[head] -= decay_gradient * decay * rate * delta;
                dA[heads + head] += absolute * decay * rate * delta;
            }
        }
}

// A random shape of T tokens in chunks of height P, where `uneven` some states decay at once, some never.
// worst: y, the state carried to a second call, y of both calls, dx b c, dstep, dA_log, dskip
static void compare_scan(double worst[7], int T, int P, int uneven) {
    int B = random_int(1, 3), heads = random_int(1, 3), E = heads * random_int(1, 20), S = random_int(1, 9);
    int first = random_int(0, T - 1), N = B * T, W = E + 2 * S, n_steps = N * heads;
    int64_t size = (int64_t)N * E, wide = (int64_t)N * W, state_size = (int64_t)S * E;
    int slots = (T + chunk_height(P) - 1) / chunk_height(P);
    real *xbc = noise(wide, 1), *step = noise(n_steps, 1), *A_log = noise(heads, 1), *skip = noise(heads, 1);
    real *dy = noise(size, 1);
    for (int n = 0; n < n_steps; n++) {
        if (!uneven) step[n] = (real)exp((double)step[n] - 2);
        else step[n] = n % 3 ? (real)exp((double)step[n]) : 0;
    }
    real *y = poison(size), *states = poison(B * slots * state_size), *dxbc = poison(wide);
    real *dstep = poison(3 * n_steps), *dA = noise(heads, 0), *dskip = noise(heads, 0);
    real *scratch = (real *)lend(scan_scratch(E, S, heads) * (size_t)omp_get_max_threads() * sizeof(real));
    precise *ref = zeros(size), *h = zeros(B * state_size), *ref_x = zeros(wide), *ref_step = zeros(n_steps);
    precise *ref_A = zeros(2 * heads), *ref_skip = zeros(heads), absolute = 0;
    plain_scan(ref, h, ref_x, ref_step, ref_A, ref_skip, dy, xbc, step, A_log, skip, B, T, E, S, heads);
    scan_forward(y, states, 1, work_with(scratch, P), xbc, step, scan_with(B, T, E, S, heads, A_log, skip));
    worst_of(&worst[0], error_of(y, ref, size, 0));

    scan_backward(dxbc, dstep, dA, dskip, work_with(scratch, P), dy, states, xbc, step,
                  scan_with(B, T, E, S, heads, A_log, skip));
    double floor = 0.1 * length_of(dy, size);
    worst_of(&worst[3], error_of(dxbc, ref_x, wide, 0));
    for (int n = 0; n < n_steps; n++) dstep[n] = dstep[n / heads * 3 * heads + n % heads];
    worst_of(&worst[4], error_of(dstep, ref_step, n_steps, floor));
    for (int n = 0; n < heads; n++) absolute += ref_A[heads + n] * ref_A[heads + n];
    worst_of(&worst[5], error_of(dA, ref_A, heads, fmax(floor, sqrt((double)absolute))));
    worst_of(&worst[6], error_of(dskip, ref_skip, heads, floor));

    real *state = noise(state_size, 0); // the first sequence in two calls, the state carried over
    precise *late = zeros((int64_t)T * E), *carried = zeros(state_size);
    plain_scan(late, carried, NULL, NULL, NULL, NULL, NULL, xbc, step, A_log, skip, 1, T, E, S, heads);
    if (first)
        scan_forward(y, state, 0, work_with(scratch, P), xbc, step,
                     scan_with(1, first, E, S, heads, A_log, skip));
    scan_forward(y + (int64_t)first * E, state, 0, work_with(scratch, P), xbc + (int64_t)first * W,
                 step + first * heads, scan_with(1, T - first, E, S, heads, A_log, skip));
    worst_of(&worst[1], error_of(state, carried, state_size, 0));
    worst_of(&worst[2], error_of(y, late, (int64_t)T * E, 0));
    release();
}

static void test_scan(void) {
    static const char *names[] = {"y", "the state carried to a second call",
                                  "y of both calls", "dx, db, dc", "dstep", "dA_log", "dskip"};
    heading("the Mamba-2 scan in chunks against the recurrence, token by token: T from 1 to 150");
    for (int i = 0; i < N_HEIGHTS; i++) {
        double worst[7] = {0};
        int P = panel_heights[i];
        for (int c = 0; c < N_LENGTHS; c++) compare_scan(worst, lengths[c], P, c % 4 == 0);
        // Over 7,680 such shapes in each type y to dstep come to 1.7e-6 and 4.1e-15, dA_log, whose decays are
        // differences of sums over a chunk, to 2.1e-7 and 2.1e-13, dskip, a sum over all tokens, to 2.4e-6
        // and 3.5e-14.
        for (int n = 0; n < 5; n++)
            check_error(worst[n], bound_of(3e-6, 2e-14), "scan, P %d, %s", P, names[n]);
        check_error(worst[5], bound_of(3e-6, 4e-13), "scan, P %d, %s", P, names[5]);
        check_error(worst[6], bound_of(6e-6, 7e-14), "scan, P %d, %s", P, names[6]);
    }
}

// ----------------------------------------------------------------------------
// what the feedback path must do, known without any reference

// Equal logits: an impulse at τ fades as ℓ^(γ-1).
static void check_impulse(double gamma_exact) {
    enum { T = 300, D = 4, SIZE = T * D };
    static const int places[D] = {0, 1, 59, 130};
    double worst = 0, g = (double)(real)gamma_exact;
    for (int i = 0; i < N_HEIGHTS; i++) {
        real *f = poison(SIZE), *q = poison(SIZE), *k = noise(SIZE, 3), *gamma = poison(T);
        real *s = poison(SIZE), *stats = poison(2 * T), *scratch = scratch_for(T);
        for (int t = 0; t < T; t++) {
            gamma[t] = (real)g;
            for (int e = 0; e < D; e++) {
                q[t * D + e] = 0;
                f[t * D + e] = t == places[e];
            }
        }
        feedback_forward(s, stats, work_with(scratch, panel_heights[i]), f, q, k, gamma,
                         shape_of(1, T, 0, 1, 1, D, D));
        for (int t = 0; t < T; t++)
            for (int e = 0; e < D; e++) {
                double tau = places[e], exact = t == tau, one_weight = 1.0 / (t + 1);
                if (t > tau)
                    exact = g * exp(lgamma(tau + 1) - lgamma(tau + 1 + g) + lgamma(t + g) - lgamma(t + 1.0));
                double error = fabs((double)s[t * D + e] - exact);
                worst_of(&worst, error / fmax(fabs(exact), one_weight));
            }
        release();
    }
    check_error(worst, bound_of(2e-5, 1e-11),
                "impulse response at gamma %g, T 300, worst number of all panel heights", gamma_exact);
}

// α_t,t-1 = 1: a chain, s_t = f_t + γ s_{t-1}
static void check_chain(void) {
    enum { T = 150, D = T, SIZE = T * D };
    double worst = 0;
    real *f = poison(SIZE), *q = poison(SIZE), *k = poison(SIZE), *gamma = poison(T);
    real *s = poison(SIZE), *stats = poison(2 * T);
    for (int t = 0; t < T; t++) {
        gamma[t] = (real)0.875;
        for (int e = 0; e < D; e++) {
            f[t * D + e] = t == e;
            q[t * D + e] = e == t - 1 ? 60 : 0;
            k[t * D + e] = e == t ? 60 : 0;
        }
    }
    feedback_forward(s, stats, work_with(scratch_for(T), 0), f, q, k, gamma, shape_of(1, T, 0, 1, 1, D, D));
    for (int t = 0; t < T; t++)
        for (int e = 0; e < D; e++) {
            double exact = t < e ? 0 : pow(0.875, t - e);
            worst_of(&worst, fabs((double)s[t * D + e] - exact));
        }
    check_error(worst, bound_of(1e-6, 1e-14), "peaked weights make a chain: s_{t+l} = gamma^l, absolute");
    memset(gamma, 0, sizeof(real) * T);
    feedback_forward(s, stats, work_with(scratch_for(T), 0), f, q, k, gamma, shape_of(1, T, 0, 1, 1, D, D));
    check(!memcmp(s, f, sizeof(real) * SIZE), "gamma 0: s is f, bit for bit");
    release();
}

// |s| ≤ max|f| / (1 - max|γ|)
static void check_largest(void) {
    enum { T = 300, D = 4, SIZE = T * D };
    double share = 0;
    for (int c = 0; c < 30; c++) {
        int steady = c % 3 == 0; // all gains 0.99, all f 1
        real *f = noise(SIZE, 1), *q = noise(SIZE, c), *k = noise(SIZE, 1), *gamma = noise(T, 2);
        real *s = poison(SIZE);
        double most_f = 0, most_gamma = 0, most_s = 0, level = random_uniform(&chance);
        for (int t = 0; t < T; t++) {
            gamma[t] = (real)(steady ? 0.99 : 0.999 * level * tanh((double)gamma[t]));
            for (int e = 0; e < D && steady; e++) f[t * D + e] = 1;
            worst_of(&most_gamma, fabs((double)gamma[t]));
        }
        feedback_forward(s, poison(2 * T), work_with(scratch_for(T), 0), f, q, k, gamma,
                         shape_of(1, T, 0, 1, 1, D, D));
        for (int i = 0; i < SIZE; i++) {
            worst_of(&most_f, fabs((double)f[i]));
            worst_of(&most_s, fabs((double)s[i]));
        }
        worst_of(&share, most_s * (1 - most_gamma) / most_f);
        release();
    }
    check_error(share, 1 + bound_of(1e-4, 1e-12),
                "max|s| as a share of max|f|/(1 - max|gamma|), 30 systems: worst");
}

static void test_memory(void) {
    static const double gains[] = {0.5, 0.999, -0.999, 0.9, -0.3};
    heading("the feedback path's memory, in closed form");
    for (int i = 0; i < 5; i++) check_impulse(gains[i]);
    check_chain();
    check_largest();
}

// ----------------------------------------------------------------------------
// plain against fast: both ways of every layer on the same random shapes and numbers
//
// Each function below draws a shape, lets the layer run both ways and returns the largest error of what they
// wrote. The error of a float32 sum of n terms of either sign is about √n · 6e-8 of its length, n up to a few
// hundred here, and a softmax's backward pass takes one such sum from another: bounds 1e-5, and 1e-13 in
// float64.

// What a layer writes, once for each way.
typedef struct {
    real *ways[2];
    int64_t n;
} Twice;

// Of these numbers; of NaN, which the layer writes; of random numbers, which it adds to.
static Twice twice(real *x, int64_t n) {
    Twice both = {{x, copy_of(x, n)}, n};
    return both;
}
static Twice written(int64_t n) { return twice(poison(n), n); }
static Twice added_to(int64_t n) { return twice(noise(n, 1), n); }

// The way that is being run.
static real *of(Twice both) { return both.ways[plain]; }

// ‖plain - fast‖ / max(‖fast‖, floor). Infinite where one of the two was not written.
static double apart(Twice both, double floor) {
    precise difference = 0, size = 0;
    for (int64_t i = 0; i < both.n; i++) {
        double fast = (double)both.ways[0][i], slow = (double)both.ways[1][i];
        if (isnan(fast) != isnan(slow)) return INFINITY;
        if (isnan(fast)) continue; // between the columns of wider rows
        difference += (fast - slow) * (fast - slow);
        size += fast * fast;
    }
    return sqrt(difference) / fmax(sqrt(size), fmax(floor, 1e-200));
}

static double worst_apart(const Twice *outputs, int n, double floor) {
    precise worst = 0;
    for (int i = 0; i < n; i++) worst_of(&worst, apart(outputs[i], floor));
    return worst;
}

static double embedding_ways(void) {
    int B = random_int(1, 4), T = random_int(1, 40), D = random_int(1, 150), V = random_int(1, 20);
    const int *ids = random_ids(B * T, V, 0);
    const real *dout = noise(B * T * D, 1);
    Twice dwte = added_to(V * D);
    for (plain = 0; plain < 2; plain++) embedding_backward(of(dwte), dout, ids, B, T, D);
    return apart(dwte, 0);
}

static double layernorm_ways(void) {
    int N = random_int(1, 60), D = random_int(2, 150);
    const real *x = noise(N * D, 2), *dout = noise(N * D, 1), *weight = noise(D, 1), *bias = noise(D, 1);
    real *out = poison(N * D), *mean = poison(N), *rstd = poison(N);
    Twice to[] = {added_to(N * D), added_to(D), added_to(D)};
    layernorm_forward(out, mean, rstd, x, weight, bias, N, D);
    for (plain = 0; plain < 2; plain++)
        layernorm_backward(of(to[0]), of(to[1]), of(to[2]), dout, x, mean, rstd, weight, N, D);
    return worst_apart(to, 3, 0);
}

static double linear_ways(void) {
    int N = random_int(1, 70), in = random_int(1, 300), width = random_int(1, 90);
    int ld = width + random_int(0, 3), biased = random_int(0, 1);
    const real *inp = noise(N * in, 1), *weight = noise(width * in, 1);
    const real *bias = biased ? noise(width, 1) : NULL;
    const real *dout = noise(N * ld, 1);
    Twice to[] = {written(N * ld), written(N * in), added_to(width * in), added_to(width)};
    for (plain = 0; plain < 2; plain++) {
        linear_forward(of(to[0]), ld, inp, weight, bias, N, in, width);
        linear_backward(of(to[1]), of(to[2]), biased ? of(to[3]) : NULL, dout, ld, inp, weight, N, in, width);
    }
    return worst_apart(to, 4, 0);
}

static double gelu_ways(void) {
    int N = random_int(1, 30), D = random_int(1, 90), ld = D + random_int(0, 5);
    const real *inp = noise(N * ld, 3), *dout = noise(N * D, 1);
    Twice to[] = {written(N * D), written(N * ld)};
    for (plain = 0; plain < 2; plain++) {
        gelu_forward(of(to[0]), inp, ld, N, D);
        gelu_backward(of(to[1]), dout, inp, ld, N, D);
    }
    return worst_apart(to, 2, 0);
}

// Attention, or with `strict` the feedback path: over all rows, then over those from `first` on.
static double attention_ways(void) {
    int longest = random_int(0, 7) ? 150 : 2 * KEYS + 90; // attention takes KEYS at a time
    int T = random_int(1, longest), B = random_int(1, 3), G = random_int(1, 2), H = G * random_int(1, 3);
    int d = 2 * random_int(1, 12), D = H * d, ld = D + 2 * G * d + random_int(0, 3);
    int first = random_int(0, T - 1);
    int64_t wide = (int64_t)B * T * ld, size = (int64_t)B * T * D;
    Shape all = {B, T, 0, H, G, d, ld}, late = {B, T, first, H, G, d, ld};
    Work work = {scratch_for(T), panel_heights[random_int(0, N_HEIGHTS - 1)]};
    const real *q = noise(wide, 1.5), *k = q + D, *v = k + G * d, *dout = noise(size, 1);
    int64_t rows = (int64_t)B * (T - first), stats = 2 * (int64_t)B * H * T;
    Twice to[] = {written(size), written(stats), written(rows * D), written(wide)};
    for (plain = 0; plain < 2; plain++) {
        real *late_stats = poison(2 * rows * H), *dq = of(to[3]), *dk = dq + D, *dv = dk + G * d;
        attention_forward(of(to[2]), late_stats, work, q, k, v, late);
        attention_forward(of(to[0]), of(to[1]), work, q, k, v, all);
        attention_backward(dq, dk, dv, work, dout, of(to[1]), q, k, v, all);
    }
    return worst_apart(to, 4, 0);
}

static double feedback_ways(void) {
    int T = random_int(1, 150), B = random_int(1, 3), D = random_int(1, 60), ld = 2 * D + random_int(0, 3);
    int first = random_int(0, T - 1);
    int64_t wide = (int64_t)B * T * ld, size = (int64_t)B * T * D, rows = (int64_t)B * T;
    Shape all = {B, T, 0, 1, 1, D, ld}, late = {B, T, first, 1, 1, D, ld};
    Work work = {scratch_for(T), panel_heights[random_int(0, N_HEIGHTS - 1)]};
    const real *q = noise(wide, 1.5), *k = q + D, *f = noise(size, 1);
    real *gamma = noise(rows, 1), *known = noise(size, 1), *ds = noise(size, 1);
    for (int64_t n = 0; n < rows; n++) gamma[n] = (real)(0.999 * tanh((double)gamma[n]));
    Twice to[] = {written(size), twice(known, size), twice(ds, size), written(wide), written(rows)};
    for (plain = 0; plain < 2; plain++) {
        real *stats = poison(2 * rows), *dq = of(to[3]);
        feedback_forward(of(to[1]), stats, work, f, q, k, gamma, late);
        feedback_forward(of(to[0]), stats, work, f, q, k, gamma, all);
        feedback_backward(of(to[2]), dq, dq + D, of(to[4]), work, of(to[0]), stats, q, k, gamma, all);
    }
    double floor = 0.1 * length_of(ds, size); // with two rows α is 1, and its gradient rounding alone
    return worst_apart(to, 5, floor);
}

static double gain_ways(void) {
    int N = random_int(1, 60), D = random_int(1, 150);
    const real *x = noise(N * D, 1), *weight = noise(D, 0.1), *bias = noise(1, 1);
    real *gamma = poison(N);
    gain_forward(gamma, x, weight, bias, (real)0.999, N, D);
    Twice to[] = {added_to(N * D), added_to(D), added_to(1), added_to(N)};
    for (plain = 0; plain < 2; plain++)
        gain_backward(of(to[0]), of(to[1]), of(to[2]), of(to[3]), gamma, x, weight, (real)0.999, N, D);
    return worst_apart(to, 4, 1);
}

static double crossentropy_ways(void) {
    int N = random_int(1, 40), V = random_int(2, 300);
    const int *targets = random_ids(N, V, 1);
    const real *logits = noise(N * V, 4);
    Twice to[] = {written(N), written(N), written(N * V)};
    for (plain = 0; plain < 2; plain++) {
        crossentropy_forward(of(to[0]), of(to[1]), logits, targets, N, V);
        crossentropy_backward(of(to[2]), logits, of(to[1]), targets, (real)0.25, N, V);
    }
    return worst_apart(to, 3, 0);
}

static double norm_ways(void) {
    int n = random_int(1, 5000);
    const real *x = noise(n, 1);
    double lengths[2];
    for (plain = 0; plain < 2; plain++) lengths[plain] = norm(x, n);
    return fabs(lengths[0] / lengths[1] - 1);
}

static double conv_ways(void) {
    int T = random_int(1, 50), B = random_int(1, 3), W = random_int(1, 90), ld = W + random_int(0, 5);
    int first = random_int(0, T - 1), N = B * T, late = T - first;
    const real *inp = noise(N * ld, 1), *weight = noise(W * TAPS, 0.5), *bias = noise(W, 0.5);
    real *dout = noise(N * W, 1), *tail = noise((TAPS - 1) * W, 1);
    Twice to[] = {written(N * W), twice(dout, N * W), written(N * ld), added_to(W * TAPS),
                  added_to(W), written(late * W), twice(tail, (TAPS - 1) * W)};
    for (plain = 0; plain < 2; plain++) {
        conv_forward(of(to[0]), inp, ld, NULL, weight, bias, B, T, W, 0);
        conv_forward(of(to[5]), inp, ld, of(to[6]), weight, bias, 1, T, W, first);
        conv_backward(of(to[2]), of(to[3]), of(to[4]), of(to[1]), inp, ld, weight, bias, B, T, W);
    }
    return worst_apart(to, 7, 0);
}

static double step_ways(void) {
    int N = random_int(1, 60), heads = random_int(1, 8), ld = heads + random_int(0, 3);
    const real *inp = noise(N * ld, 2), *bias = noise(heads, 1), *dstep = noise(3 * N * heads, 1);
    Twice to[] = {written(N * ld), added_to(heads)};
    for (plain = 0; plain < 2; plain++)
        step_backward(of(to[0]), of(to[1]), dstep, 3 * heads, inp, ld, bias, N, heads);
    return worst_apart(to, 2, 1);
}

static double scan_ways(void) {
    int T = random_int(1, 150), B = random_int(1, 3), heads = random_int(1, 4), E = heads * random_int(1, 12);
    int S = random_int(1, 9), W = E + 2 * S, N = B * T, chunks = (T + CHUNK - 1) / CHUNK, size = B * S * E;
    real *step = noise(N * heads, 1), *dA[2], *dskip[2];
    for (int i = 0; i < N * heads; i++) step[i] = (real)exp((double)step[i] - 2);
    ScanShape scan = {B, T, E, S, heads, noise(heads, 1), noise(heads, 1)};
    Work work = {(real *)lend(sizeof(real) * scan_scratch(E, S, heads) * (size_t)omp_get_max_threads()), 0};
    const real *xbc = noise(N * W, 1), *dy = noise(N * E, 1);
    Twice to[] = {written(N * E), written(size * chunks), added_to(size), written(N * W),
                  added_to(heads), added_to(heads), written(N * heads)};
    for (plain = 0; plain < 2; plain++) {
        real *dstep = poison(3 * N * heads), *late = poison(N * E);
        dA[plain] = of(to[4]), dskip[plain] = of(to[5]);
        scan_forward(late, of(to[2]), 0, work, xbc, step, scan); // from a state that is given
        scan_forward(of(to[0]), of(to[1]), 1, work, xbc, step, scan);
        scan_backward(of(to[3]), dstep, dA[plain], dskip[plain], work, dy, of(to[1]), xbc, step, scan);
        for (int n = 0; n < N; n++)
            for (int h = 0; h < heads; h++) of(to[6])[n * heads + h] = dstep[n * 3 * heads + h];
    }
    return worst_apart(to, 7, length_of(dy, N * E)); // A's and step's are differences of larger sums
}

static double gated_rmsnorm_ways(void) {
    int N = random_int(1, 60), E = random_int(1, 150), ld = E + random_int(0, 5);
    const real *y = noise(N * E, 1), *z = noise(N * ld, 2), *weight = noise(E, 1), *dout = noise(N * E, 1);
    Twice to[] = {written(N * E), written(N), written(N * E), written(N * ld), added_to(E)};
    for (plain = 0; plain < 2; plain++) {
        gated_rmsnorm_forward(of(to[0]), of(to[1]), y, z, ld, weight, N, E);
        gated_rmsnorm_backward(of(to[2]), of(to[3]), of(to[4]), dout, y, z, ld, of(to[1]), weight, N, E);
    }
    return worst_apart(to, 5, 0.1 * length_of(dout, N * E)); // of one number the norm is ±1, and dv rounding
}

// A whole model: the loss, every parameter's gradient, and the logits of a prefix and one token more.
static double model_ways(int mixer) {
    int G = random_int(1, 2), H = G * random_int(1, 2), V = random_int(2, 30);
    int D = H * 2 * random_int(2, 6); // over two numbers a LayerNorm's gradient is rounding alone
    int B = random_int(1, 3), T = random_int(2, 70), L = random_int(1, 3);
    Config c = config_with(mixer, V, D, L, H, G, T);
    int *inputs = random_ids(B * T, V, 0), *targets = random_ids(B * T, V, 1);
    Model *m = create(&c, B, T, TRAIN), *g = create(&c, 1, T, GENERATE);
    shake_weights(m, 0.05);
    memcpy(g->params, m->params, sizeof(real) * (size_t)m->table.count);
    Dropout drop = {random_int(0, 1) * 0.1, 3, 7, 0};
    Twice to[] = {written(B * T), written(m->table.count), written(V), written(V)};
    for (plain = 0; plain < 2; plain++) {
        memset(m->grads, 0, sizeof(real) * (size_t)m->table.count);
        model_forward(m, inputs, targets, B, T, drop);
        memcpy(of(to[0]), m->acts.losses, sizeof(real) * (size_t)(B * T));
        model_backward(m, 1.0 / (B * T));
        memcpy(of(to[1]), m->grads, sizeof(real) * (size_t)m->table.count);
        memcpy(of(to[2]), model_extend(g, 0, inputs, T - 1, 0), sizeof(real) * (size_t)V);
        memcpy(of(to[3]), model_extend(g, 0, inputs + T - 1, 1, T - 1), sizeof(real) * (size_t)V);
    }
    model_free(m);
    model_free(g);
    return worst_apart(to, 4, 1e-3);
}

static double sessa_ways(void) { return model_ways(SESSA); }
static double attention_model_ways(void) { return model_ways(ATTENTION); }
static double mamba2_ways(void) { return model_ways(MAMBA2); }

static void test_plain(void) {
    static const struct {
        const char *name;
        double (*ways)(void);
    } layers[] = {
        {"embedding", embedding_ways},
        {"layernorm", layernorm_ways},
        {"linear", linear_ways},
        {"gelu", gelu_ways},
        {"attention", attention_ways},
        {"gain", gain_ways},
        {"feedback", feedback_ways},
        {"crossentropy", crossentropy_ways},
        {"norm", norm_ways},
        {"mamba2's convolution", conv_ways},
        {"mamba2's step", step_ways},
        {"mamba2's scan", scan_ways},
        {"mamba2's gated norm", gated_rmsnorm_ways},
        {"a sessa model", sessa_ways},
        {"an attention model", attention_model_ways},
        {"a mamba2 model", mamba2_ways},
    };
    heading("plain against fast, 40 random shapes each");
    for (size_t i = 0; i < sizeof(layers) / sizeof(layers[0]); i++) {
        precise worst = 0;
        for (int shape = 0; shape < 40; shape++) {
            worst_of(&worst, layers[i].ways());
            plain = 0;
            release();
        }
        check_error(worst, bound_of(1e-5, 1e-13), "%s", layers[i].name);
    }
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

// A layer by itself. The check is of Σ out·dout, dout random, by every number of every input. What backward
// adds to starts from random numbers, what it writes from NaN.
enum {
    LB = 2,                     // sequences
    LT = 11,                    // tokens of each
    LN = LB * LT,
    LD = 8,                     // width
    LH = 4,                     // heads
    LG = 2,                     // of keys and values
    LW = 2,                     // columns of a head
    LE = (LH + 2 * LG) * LW,    // q, k and v beside each other
    LV = 5,                     // vocabulary
    LS = 3,                     // numbers of mamba2's state
    LM = LD + 2 * LS            // x, b and c beside each other
};
typedef struct {
    int P, *ids;
    real *in[4], *out;           // inputs, output
    real *grad[4], *dout;        // their gradients
    real *mean, *rstd;           // what forward keeps for backward: of attention its statistics
    real *states, *step;         // of the scan
    real *scratch, *cosine, *sine;
} LayerCase;
typedef struct {
    const char *name;
    void (*forward)(LayerCase *c), (*backward)(LayerCase *c);
    int n_out, n_inputs, sizes[4], added[4]; // added: backward adds to this gradient
} Layer;

static void embedding_f(LayerCase *c) { embedding_forward(c->out, c->ids, c->in[0], LB, LT, LD); }
static void embedding_b(LayerCase *c) { embedding_backward(c->grad[0], c->dout, c->ids, LB, LT, LD); }
static void layernorm_f(LayerCase *c) {
    layernorm_forward(c->out, c->mean, c->rstd, c->in[0], c->in[1], c->in[2], LN, LD);
}
static void layernorm_b(LayerCase *c) {
    layernorm_backward(c->grad[0], c->grad[1], c->grad[2], c->dout, c->in[0], c->mean, c->rstd, c->in[1], LN,
                       LD);
}
static void linear_f(LayerCase *c) {
    linear_forward(c->out, LV, c->in[0], c->in[1], c->in[2], LN, LD, LV);
}
static void linear_b(LayerCase *c) {
    linear_backward(c->grad[0], c->grad[1], c->grad[2], c->dout, LV, c->in[0], c->in[1], LN, LD, LV);
}
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
    attention_forward(c->out, c->mean, work_with(c->scratch, c->P), q, k, v,
                      shape_of(LB, LT, 0, LH, LG, LW, LE));
}
static void attention_b(LayerCase *c) {
    const real *q = c->in[0], *k = q + LH * LW, *v = k + LG * LW;
    real *dq = c->grad[0], *dk = dq + LH * LW, *dv = dk + LG * LW;
    attention_backward(dq, dk, dv, work_with(c->scratch, c->P), c->dout, c->mean, q, k, v,
                       shape_of(LB, LT, 0, LH, LG, LW, LE));
}
static void gain_f(LayerCase *c) { gain_forward(c->out, c->in[0], c->in[1], c->in[2], (real)0.9, LN, LD); }
static void gain_b(LayerCase *c) {
    memcpy(c->scratch, c->dout, sizeof(real) * LN);
    gain_backward(c->grad[0], c->grad[1], c->grad[2], c->scratch, c->out, c->in[0], c->in[1], (real)0.9, LN,
                  LD);
}
static void feedback_f(LayerCase *c) {
    feedback_forward(c->out, c->mean, work_with(c->scratch, c->P), c->in[0], c->in[1], c->in[1] + LD,
                     c->in[2], shape_of(LB, LT, 0, 1, 1, LD, 2 * LD));
}
static void feedback_b(LayerCase *c) {
    memcpy(c->grad[0], c->dout, sizeof(real) * (size_t)(LB * LT * LD));
    feedback_backward(c->grad[0], c->grad[1], c->grad[1] + LD, c->grad[2], work_with(c->scratch, c->P),
                      c->out, c->mean, c->in[1], c->in[1] + LD, c->in[2],
                      shape_of(LB, LT, 0, 1, 1, LD, 2 * LD));
}
static void gate_f(LayerCase *c) { gate_forward(c->out, c->in[0], c->in[1], LD, LN, LD); }
static void gate_b(LayerCase *c) {
    gate_backward(c->grad[0], c->grad[1], c->dout, c->in[0], c->in[1], LD, LN, LD);
}
static void dropout_f(LayerCase *c) {
    Dropout drop = {0.3, 5, 7, 0};
    memcpy(c->out, c->in[0], sizeof(real) * LN * LD);
    dropout(c->out, LN * LD, drop, 3);
}
static void dropout_b(LayerCase *c) {
    Dropout drop = {0.3, 5, 7, 0};
    memcpy(c->grad[0], c->dout, sizeof(real) * LN * LD);
    dropout(c->grad[0], LN * LD, drop, 3);
}
static void crossentropy_f(LayerCase *c) { crossentropy_forward(c->out, c->mean, c->in[0], c->ids, LN, LV); }
static void crossentropy_b(LayerCase *c) { // takes one dloss for all rows
    for (int n = 1; n < LN; n++) c->dout[n] = c->dout[0];
    crossentropy_backward(c->grad[0], c->in[0], c->mean, c->ids, c->dout[0], LN, LV);
}

static void conv_f(LayerCase *c) { // reads all columns but the first
    conv_forward(c->out, c->in[0] + 1, LM + 1, NULL, c->in[1], c->in[2], LB, LT, LM, 0);
}
static void conv_b(LayerCase *c) {
    real *dout = copy_of(c->dout, LN * LM);
    conv_backward(c->grad[0] + 1, c->grad[1], c->grad[2], dout, c->in[0] + 1, LM + 1, c->in[1], c->in[2], LB,
                  LT, LM);
    for (int n = 0; n < LN; n++) c->grad[0][n * (LM + 1)] = 0;
}
static void step_f(LayerCase *c) { step_forward(c->out, c->in[0], LD, c->in[1], LN, LD); }
static void step_b(LayerCase *c) {
    step_backward(c->grad[0], c->grad[1], c->dout, LD, c->in[0], LD, c->in[1], LN, LD);
}
static void scan_f(LayerCase *c) { // two heads; |in[1]| is the step
    for (int i = 0; i < LN * 2; i++) c->step[i] = c->in[1][i] * c->in[1][i];
    scan_forward(c->out, c->states, 1, work_with(c->scratch, c->P), c->in[0], c->step,
                 scan_with(LB, LT, LD, LS, 2, c->in[2], c->in[3]));
}
static void scan_b(LayerCase *c) {
    real *dstep = poison(LN * 6);
    scan_backward(c->grad[0], dstep, c->grad[2], c->grad[3], work_with(c->scratch, c->P), c->dout, c->states,
                  c->in[0], c->step, scan_with(LB, LT, LD, LS, 2, c->in[2], c->in[3]));
    for (int i = 0; i < LN * 2; i++) c->grad[1][i] = 2 * c->in[1][i] * dstep[i / 2 * 6 + i % 2];
}
static void norm_f(LayerCase *c) {
    gated_rmsnorm_forward(c->out, c->rstd, c->in[0], c->in[1], LD, c->in[2], LN, LD);
}
static void norm_b(LayerCase *c) {
    gated_rmsnorm_backward(c->grad[0], c->grad[1], c->grad[2], c->dout, c->in[0], c->in[1], LD, c->rstd,
                           c->in[2], LN, LD);
}

// Σ out·dout after another forward pass.
typedef struct { const Layer *layer; LayerCase c; } LayerSum;
static double layer_sum(void *state) {
    LayerSum *sum_of = (LayerSum *)state;
    sum_of->layer->forward(&sum_of->c);
    return dot_of(sum_of->c.out, sum_of->c.dout, sum_of->layer->n_out);
}

// Room for a layer's call; rope's table.
static void lend_case(LayerCase *c, const Layer *layer, int P) {
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
}

static void check_layer(const Layer *layer, int P) {
    real *before[4], *start[4];
    LayerSum state;
    LayerCase *c = &state.c;
    state.layer = layer;
    lend_case(c, layer, P);
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
        // name, forward, backward, numbers of the output, inputs, their sizes, whether backward adds to the
        // gradient
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
        {"crossentropy", crossentropy_f, crossentropy_b, LN, 1, {LN * LV}, {0}},
    };
    for (size_t i = 0; i < sizeof(layers) / sizeof(layers[0]); i++) {
        const Layer *layer = &layers[i];
        void (*forward)(LayerCase *) = layer->forward;
        check_layer(layer, 0);
        if (forward == attention_f || forward == feedback_f || forward == scan_f) check_layer(layer, 3);
    }
}

// A model's mean loss over the targets that count.
typedef struct {
    Model *model;
    const int *inputs, *targets;
    int B, T;
    Dropout drop;
    double dloss;
} Loss;
static double loss_of(void *state) {
    Loss *l = (Loss *)state;
    model_forward(l->model, l->inputs, l->targets, l->B, l->T, l->drop);
    return l->dloss * model_loss(l->model);
}

// Up to 24 numbers of every tensor of a model.
static void check_model(const char *name, Config c, int B, int T, int P, double probability) {
    enum { ENTRIES = 24 };
    Model *m = create(&c, B + 1, T + 2, TRAIN); // a batch smaller than the model allows
    int n_tensors = m->table.n, counted = 0, worst_at = 0;
    int *inputs = random_ids(B * T, c.vocab_size, 0), *targets = random_ids(B * T, c.vocab_size, 1);
    targets[0] = 1;
    for (int i = 0; i < B * T; i++) counted += targets[i] >= 0;
    Loss loss = {m, inputs, targets, B, T, {probability, 3, 11, 0}, 1.0 / counted};
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
        if (!(error <= worst)) worst_at = r;
        worst_of(&worst, error);
    }
    check_error(worst, 1e-6, "%s, dropout %g: worst of %d tensors (%s)", name, probability, n_tensors,
                m->table.rows[worst_at].name);
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
        Config no_rope = config_with(SESSA, 11, 16, 2, 4, 2, 9);
        no_rope.no_rope = 1;
        check_model("sessa without RoPE", no_rope, 2, 7, 0, p);
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

static void check_adamw(void) {
    enum { N = 1000, STEPS = 12 };
    real *w = noise(N, 1), *g = poison(N), *m = noise(N, 0), *v = noise(N, 0);
    precise *w_ref = zeros(N), *m_ref = zeros(N), *v_ref = zeros(N), worst = 0;
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
            double mean = m_ref[i] / (1 - pow(o.beta1, step)), square = v_ref[i] / (1 - pow(o.beta2, step));
            w_ref[i] -= o.lr * o.weight_decay * w_ref[i];
            w_ref[i] -= o.lr * mean / (sqrt(square) + o.eps);
        }
        adamw(w, g, m, v, N, o, scale, step);
        for (int i = 0; i < N; i++) cleared &= g[i] == 0;
    }
    check_error(error_of(w, w_ref, N, 0), bound_of(1e-6, 1e-14), "adamw, 12 steps: weights");
    worst_of(&worst, error_of(m, m_ref, N, 0));
    worst_of(&worst, error_of(v, v_ref, N, 0));
    check_error(worst, bound_of(1e-6, 1e-14), "adamw, 12 steps: moments");
    check(cleared, "adamw clears the gradient");
    check_error(fabs(norm(w, N) / length_of(w, N) - 1), 1e-13, "norm against a plain sum");
}

static void check_dropout(void) {
    enum { N = 200000 };
    Dropout drop = {0.3, 42, 9, 0}, later = {0.3, 42, 10, 0};
    real *x = noise(N, 0);
    for (int i = 0; i < N; i++) x[i] = 1;
    real *again = copy_of(x, N), *place = copy_of(x, N), *step = copy_of(x, N);
    dropout(x, N, drop, 2);
    dropout(again, N, drop, 2);
    dropout(place, N, drop, 3);
    dropout(step, N, later, 2);
    double zero = 0, with_place = 0, with_step = 0, off = 0;
    int scaled = 1;
    for (int i = 0; i < N; i++) {
        zero += x[i] == 0;
        with_place += x[i] == 0 && place[i] == 0;
        with_step += x[i] == 0 && step[i] == 0;
        scaled &= x[i] == 0 || x[i] == (real)(1 / (1 - 0.3));
    }
    check_error(fabs(zero / N - 0.3), 0.0042, "dropout 0.3: rate of zeros off (4 standard deviations)");
    worst_of(&off, fabs(with_place / N - 0.09));
    worst_of(&off, fabs(with_step / N - 0.09));
    check_error(off, 0.0026, "dropout: masks of two places and two steps are independent");
    check(scaled && !memcmp(x, again, sizeof(real) * N),
          "dropout: scale 1/(1-p), the same mask when asked again");
}

static void check_schedule(void) {
    static const struct { int64_t step; double rate; } schedule[] = {
        {0, 0.5}, // warm-up
        {1, 1},
        {3, 2},
        {4, 2},
        {6, 0.5 + 1.5 * 0.85355339059327376}, // a quarter of the cosine
        {8, 1.25},
        {12, 0.5},
        {1000, 0.5},
    };
    Options options;
    memset(&options, 0, sizeof(options));
    options.lr = 2;
    options.min_lr = 0.5;
    options.warmup = 4;
    options.decay_steps = 12;
    double off = 0;
    for (int i = 0; i < 8; i++)
        worst_of(&off, fabs(learning_rate(&options, schedule[i].step) - schedule[i].rate));
    check_error(off, 1e-14, "learning rate: warm-up, cosine, end, past the end");
}

static void check_initial_values(void) {
    Config c = config_with(SESSA, 50, 64, 1, 4, 4, 8);
    Model *m = create(&c, 1, 8, EVALUATE);
    initialise(m->params, &m->table, 1);
    precise largest = 0;
    const Tensor *proj = find_tensor(&m->table, "layers.0.mixer.proj_fb.weight");
    const Tensor *wte = find_tensor(&m->table, "wte.weight");
    const Tensor *gamma_bias = find_tensor(&m->table, "layers.0.mixer.gamma_bias");
    for (int64_t i = 0; i < proj->count; i++)
        worst_of(&largest, fabs((double)m->params[proj->offset + i]));
    double deviation = length_of(m->params + wte->offset, wte->count) / sqrt((double)wte->count);
    check(largest <= 0.125 && largest > 0.1245 && fabs(deviation / 0.02 - 1) < 0.05 &&
              m->params[gamma_bias->offset] == 1,
          "initial values: uniform within 1/sqrt(D), embedding 0.02, gamma_bias 1");
    model_free(m);
}

// How likely, by the logits, what is likelier than `id` is together; how many they are.
static double likelier(const real *logits, int n, int id, double temperature, int *many) {
    precise sum = 0, total = 0;
    *many = 0;
    for (int i = 0; i < n; i++) {
        double weight = exp((double)logits[i] / temperature);
        total += weight;
        if (logits[i] <= logits[id]) continue;
        sum += weight;
        ++*many;
    }
    return sum / total;
}

static int by_weight(const void *a, const void *b) {
    const Candidate *x = (const Candidate *)a, *y = (const Candidate *)b;
    return comes_first(*x, *y) ? -1 : comes_first(*y, *x);
}

// sample_token with a full sort, whatever the cut.
static int plain_token(const real *logits, Candidate *sorted, int V, double temperature, int top_k, double top_p,
                       uint64_t *random) {
    double total = 0, sum = 0;
    int n = top_k && top_k < V ? top_k : V, kept = 0, cut = n < V || top_p < 1, best = 0;
    for (int i = 0; i < V; i++)
        if (logits[i] > logits[best]) best = i;
    for (int i = 0; i < V; i++) {
        sorted[i].weight = exp(((double)logits[i] - (double)logits[best]) / temperature);
        sorted[i].id = i;
    }
    if (cut) qsort(sorted, (size_t)V, sizeof(Candidate), by_weight);
    for (int i = 0; i < n; i++) total += sorted[i].weight;
    while (kept < n && (!cut || kept == 0 || sum < top_p * total)) sum += sorted[kept++].weight;
    double left = random_uniform(random) * (cut ? sum : total);
    for (int i = 0; i < kept; i++) { // without a cut from the last id on
        Candidate c = sorted[cut ? i : V - 1 - i];
        if ((left -= c.weight) < 0) return c.id;
    }
    return sorted[cut ? kept - 1 : 0].id;
}

// Cuts of many sizes, of peaked and flat distributions with equal logits among them.
static void check_cuts(void) {
    enum { MOST = 3000, DRAWS = 30 };
    static const int sizes[] = {1, 2, 63, 64, 65, 700, MOST}, top_k[] = {0, 1, 7, 40, 600};
    static const double top_p[] = {1, 0.95, 0.5, 0.01}, temperatures[] = {0.05, 1, 30};
    Candidate *candidates = (Candidate *)lend(sizeof(Candidate) * MOST);
    real *logits = poison(MOST);
    uint64_t random = 9, again = 9;
    int apart = 0, draws = 0;
    for (int i = 0; i < 7 * 5 * 4 * 3; i++) {
        int V = sizes[i % 7], k = top_k[i / 7 % 5];
        double p = top_p[i / 35 % 4], temperature = temperatures[i / 140];
        for (int n = 0; n < V; n++) logits[n] = (real)(floor(-8 * log(random_uniform(&random) + 1e-9)) / 4);
        again = random;
        for (int n = 0; n < DRAWS; n++, draws++)
            apart += sample_token(logits, candidates, V, temperature, k, p, &random) !=
                     plain_token(logits, candidates, V, temperature, k, p, &again);
    }
    check(!apart && draws > 10000, "sample_token: %d tokens of %d cuts are those of a full sort", draws, 7 * 5 * 4 * 3);
}

static void check_sampling(void) {
    enum { N = 6, DRAWS = 40000 };
    real *logits = noise(N, 1);
    Candidate *candidates = (Candidate *)lend(sizeof(Candidate) * N);
    precise total = 0, worst = 0, seen[N] = {0};
    int best = 0, only_likely = 1;
    uint64_t random = 5;
    for (int i = 0; i < N; i++) {
        total += exp((double)logits[i] / 0.7);
        if (logits[i] > logits[best]) best = i;
    }
    for (int i = 0; i < DRAWS; i++)
        seen[sample_token(logits, candidates, N, 0.7, 0, 1, &random)] += 1.0 / DRAWS;
    for (int i = 0; i < N; i++) {
        double p = exp((double)logits[i] / 0.7) / total;
        worst_of(&worst, fabs(seen[i] - p) / sqrt(p * (1 - p) / DRAWS));
    }
    check_error(worst, 4, "sample_token at temperature 0.7: worst frequency, in standard deviations");
    for (int i = 0; i < DRAWS; i++) { // the two likeliest only, then as many as reach 60 %
        int many, id = sample_token(logits, candidates, N, 1, 2, 1, &random);
        likelier(logits, N, id, 1, &many);
        only_likely &= many < 2;
        id = sample_token(logits, candidates, N, 0.7, 0, 0.6, &random);
        only_likely &= likelier(logits, N, id, 0.7, &many) < 0.6;
    }
    check(only_likely && sample_token(logits, candidates, N, 0, 0, 1, &random) == best,
          "sample_token: top-k, top-p and temperature 0 cut where they should");
}

static void test_training_parts(void) {
    heading("optimiser, dropout, schedule, initial values, sampling");
    check_adamw();
    check_dropout();
    check_schedule();
    check_initial_values();
    check_sampling();
    check_cuts();
    release();
}

// ----------------------------------------------------------------------------
// what is tested from here on: the CPU's models, or with -DTEST_CUDA the twin's, by the same names

#ifdef TEST_CUDA
enum { ON_GPU = 1 };
#define TESTED_BACKEND (*backend_gpu())

// The model under test; the CPU's Model beside it has the names, the parameters and room for activations.
static Model *tested_gpu;

// One tensor of the device's memory into the CPU's block of activations, row after row.
template <typename Y>
static void fetch_rows(real *to, const Tensor *to_row, const Y *device, const Tensor *from) {
    int64_t width = to_row->n_dims ? to_row->shape[to_row->n_dims - 1] : 1, rows = to_row->count / width;
    int64_t n = (rows - 1) * from->stride + width;
    Y *numbers = (Y *)malloc((size_t)n * sizeof(Y));
    CUDA(cudaMemcpy(numbers, device + from->offset, (size_t)n * sizeof(Y), cudaMemcpyDeviceToHost));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < width; i++)
            to[to_row->offset + r * to_row->stride + i] = (float)numbers[r * from->stride + i];
    free(numbers);
}

// All activations that the twin keeps under a name that the CPU's model knows.
template <typename X> static void fetch_activations(ModelGPU<X> *g, Model *m) {
    for (int r = 0; r < m->acts_table.n; r++) {
        const Tensor *to_row = &m->acts_table.rows[r];
        const Tensor *in_x = find_tensor(&g->x_table, to_row->name);
        const Tensor *in_f = find_tensor(&g->f_table, to_row->name), *from = in_x ? in_x : in_f;
        if (!from || from->count < to_row->count || !strcmp(to_row->name, "scratch")) continue;
        if (in_x) fetch_rows(m->acts_block, to_row, g->x_block, from);
        else fetch_rows(m->acts_block, to_row, g->f_block, from);
    }
}

// Panels of height P, 0: as the model chose them.
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

// Numbers of the CPU's model into a block of the twin's.
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
    backend_gpu()->backward(tested_gpu, dloss, 1);
    memcpy(m->grads, backend_gpu()->read(tested_gpu, GRADS), sizeof(real) * (size_t)m->table.count);
}

static double tested_update(Model *m, AdamW o, double clip, int64_t step) {
    double length = backend_gpu()->update(tested_gpu, o, clip, step);
    memcpy(m->params, backend_gpu()->read(tested_gpu, PARAMS), sizeof(real) * (size_t)m->table.count);
    memset(m->grads, 0, sizeof(real) * (size_t)m->table.count);
    return length;
}

// The program, with the precision that a test may ask for.
static int run_tested(int argc, char **argv) {
    const char *wanted = getenv("TEST_PRECISION");
    for (int p = FP32; wanted && p <= BF16; p++)
        if (!strcmp(wanted, precision_names[p])) gpu.precision = (Precision)p;
    int code = run_cuda_program(argc, argv);
    unguard(gpu.workspace, 2 * (WORKSPACE + GUARD));
    return n_broken ? 1 : code;
}

#else
enum { ON_GPU = 0 };
#define TESTED_BACKEND cpu_backend
#define tested_create model_create
#define tested_free model_free
#define tested_forward model_forward
#define tested_loss model_loss
#define tested_backward model_backward
#define tested_update cpu_update
#define run_tested(argc, argv) run_program(argc, argv, &cpu_backend)
#endif

// ----------------------------------------------------------------------------
// generation: prefill and single steps against one full forward pass

// A model that reads a text in pieces, twice, against one that reads it at once.
static void check_extend(const char *name, Config c) {
    enum { T = 150, PIECES = 14 };
    static const int pieces[PIECES] = {20, 1, 1, 3, 1, 60, 1, 9, 1, 1, 30, 1, 20, 1}; // their sum is T
    char error[ERROR_SIZE];
    int V = c.vocab_size;
    Model *whole = create(&c, 1, T, EVALUATE), *stepwise = TESTED_BACKEND.create(&c, 1, T, GENERATE, error);
    if (!stepwise) { check(0, "%s", error); return; }
    int *ids = random_ids(T, V, 0);
    shake_weights(whole, 0.2);
    memcpy(TESTED_BACKEND.read(stepwise, PARAMS), whole->params, sizeof(real) * (size_t)whole->table.count);
    TESTED_BACKEND.write(stepwise, PARAMS);
    model_forward(whole, ids, ids, 1, T, no_dropout);
    precise worst = 0, *ref = zeros(V);
    real *logits = poison(V), *first = poison(V);
    for (int round = 0; round < 2; round++) { // the second from the start again
        for (int p = 0, at = 0; p < PIECES; p++) {
            memcpy(logits, TESTED_BACKEND.extend(stepwise, 0, ids + at, pieces[p], at), sizeof(real) * (size_t)V);
            at += pieces[p];
            for (int n = 0; n < V; n++) ref[n] = (double)whole->acts.logits[(at - 1) * V + n];
            worst_of(&worst, error_of(logits, ref, V, 0));
        }
        if (round == 0) memcpy(first, logits, sizeof(real) * (size_t)V);
    }
    check_error(worst, bound_of(1e-5, 1e-13), "%s: logits, pieces of 1 to 60 tokens", name);
    check(!memcmp(first, logits, sizeof(real) * (size_t)V), "%s: the same bits when it starts again", name);
    model_free(whole);
    TESTED_BACKEND.destroy(stepwise);
    release();
}

static void test_extend(void) {
    heading("prefill and single steps against one forward pass");
    check_extend("sessa, H 4, G 2", config_with(SESSA, 13, 16, 2, 4, 2, 150));
    check_extend("sessa, one head", config_with(SESSA, 13, 10, 2, 1, 1, 150));
    check_extend("attention, H 4", config_with(ATTENTION, 13, 16, 2, 4, 4, 150));
    check_extend("attention, one head", config_with(ATTENTION, 13, 8, 1, 1, 1, 150));
    check_extend("mamba2", config_with(MAMBA2, 13, 16, 2, 4, 4, 150));
}

// ----------------------------------------------------------------------------
// dumps of the PyTorch reference

static double dump_bound; // 0: the check's own

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

// ‖t‖ over the elements from..to.
static double tensor_norm(const FileTensor *t, int64_t from, int64_t to) {
    precise sum = 0;
    for (int64_t i = from; i < to; i++) sum += number_of(t, i) * number_of(t, i);
    return sqrt(sum);
}

// ‖x - t‖ over the elements from..to of t; x has rows of `width` numbers, `stride` apart.
static double tensor_distance(const FileTensor *t, const real *x, int64_t width, int64_t stride, int64_t from,
                              int64_t to) {
    precise sum = 0;
    for (int64_t i = from; i < to; i++) {
        double error = (double)x[i / width * stride + i % width] - number_of(t, i);
        sum += error * error;
    }
    return sqrt(sum);
}

// A dump's model and batch.
typedef struct {
    const Safetensors *file;
    Model *model;
    const int *inputs, *targets;
    int B, T;
    double dloss; // 1 / the number of targets that count
} Dump;

// In float64 all that is left of the error is the dump's own rounding to float32: each number is off by at
// most 2^-24 of itself, so a tensor by at most 6e-8 of its norm.
static double bound_of_dump(void) { return dump_bound > 0 ? dump_bound : bound_of(1e-5, 2e-7); }

// A loss and the update after it, n times, on the same batch, as the dump's optimiser did.
static void check_losses(const Dump *dump, const FileTensor *losses) {
    const Safetensors *file = dump->file;
    Model *m = dump->model;
    int ok = losses->n_dims == 1 && !strcmp(losses->dtype, "F32");
    if (!check(ok, "losses is F32 and has one dimension")) return;
    double lr = meta_number(file, "learning_rate", 0, 1e3, &ok);
    double beta1 = meta_number(file, "beta1", 0, 1, &ok), beta2 = meta_number(file, "beta2", 0, 1, &ok);
    double eps = meta_number(file, "eps", 0, 1, &ok), decay = meta_number(file, "weight_decay", 0, 1e3, &ok);
    double clip = meta_number(file, "grad_clip", 0, 1e30, &ok), worst = 0, worst_length = 0;
    AdamW adam = {lr, beta1, beta2, eps, decay};
    if (!ok) return;
    take_weights(m, file);
    memset(m->grads, 0, sizeof(real) * (size_t)m->table.count);
    for (int64_t i = 0; i < losses->count; i++) {
        tested_forward(m, dump->inputs, dump->targets, dump->B, dump->T, no_dropout);
        double loss = dump->dloss * tested_loss(m), ref = number_of(losses, i);
        worst_of(&worst, fabs(loss - ref) / fmax(fabs(ref), 1e-30));
        tested_backward(m, dump->dloss);
        double length = norm(m->grads, m->table.count);
        worst_of(&worst_length, fabs(tested_update(m, adam, clip, i + 1) / length - 1));
    }
    check_error(worst_length, 1e-6, "the gradients' norm that an update returns");
    check_error(worst, bound_of_dump(), "losses of %d AdamW steps: worst", (int)losses->count);
}

static int is_gradient(const FileTensor *t) { return !strncmp(t->name, "grad.", 5); }

// The keys' bias shifts all logits of a row alike: its gradient is 0 but for rounding, measured by the other
// half, the queries'.
static int in_halves(const FileTensor *t) {
    return is_gradient(t) && strstr(t->name, "proj_fb.bias") != NULL;
}

// The model's row of a dump's activation or gradient; NULL for the dump's other tensors, and after a failed
// check.
static const Tensor *row_of(const Model *m, const FileTensor *t) {
    static const char *const others[] = {"inputs", "targets", "losses"};
    int act = !strncmp(t->name, "act.", 4), known = find_tensor(&m->table, t->name) != NULL;
    for (int i = 0; i < 3; i++) known |= !strcmp(t->name, others[i]);
    if (!act && !is_gradient(t)) {
        if (!known) check(0, "%.60s: no tensor that a dump may hold", t->name);
        return NULL;
    }
    const Tensor *row = act ? find_tensor(&m->acts_table, t->name + 4) : find_tensor(&m->table, t->name + 5);
    if (!row) {
        check(0, "%.60s: the model has no such tensor", t->name);
        return NULL;
    }
    if (same_shape(t, "F32", row->n_dims, row->shape)) return row;
    check(0, "%.60s: not F32, or of another shape than the model's", t->name);
    return NULL;
}

// What a tensor is off by at each panel height: all of it, or its first and its second half.
typedef struct { double off[2][N_HEIGHTS]; } Distances;

// A forward and a backward pass at a panel height.
static void measure(const Dump *dump, const Tensor **rows, int height, Distances *distances) {
    const Safetensors *file = dump->file;
    Model *m = dump->model;
    m->P = panel_heights[height];
    memset(m->grads, 0, sizeof(real) * (size_t)m->table.count);
    tested_forward(m, dump->inputs, dump->targets, dump->B, dump->T, no_dropout);
    for (int pass = 0; pass < 2; pass++) { // the backward pass overwrites the logits: activations first
        if (pass) tested_backward(m, dump->dloss);
        for (int i = 0; i < file->n_tensors; i++) {
            const FileTensor *t = &file->tensors[i];
            const Tensor *row = rows[i];
            if (!row || is_gradient(t) != pass) continue;
            int64_t half = in_halves(t) ? t->count / 2 : t->count;
            int64_t width = row->n_dims ? row->shape[row->n_dims - 1] : 1;
            const real *x = (pass ? m->grads : m->acts_block) + row->offset;
            distances[i].off[0][height] = tensor_distance(t, x, width, row->stride, 0, half);
            distances[i].off[1][height] = tensor_distance(t, x, width, row->stride, half, t->count);
        }
    }
    m->P = 0;
}

// A line for a tensor, or for each of its halves; size: what its error is a share of.
static void check_tensor(const FileTensor *t, const Distances *distances, double size) {
    int halves = in_halves(t) ? 2 : 1;
    for (int half = 0; half < halves; half++) {
        double worst = 0, errors[N_HEIGHTS];
        for (int p = 0; p < N_HEIGHTS; p++) {
            errors[p] = distances->off[half][p] / fmax(size, 1e-30);
            worst_of(&worst, errors[p]);
        }
        int ok = worst <= bound_of_dump(); // false for NaN
        printf("  %-40s %9s", t->name, halves == 1 ? "" : half ? "k' half" : "q' half");
        for (int p = 0; p < N_HEIGHTS; p++) printf(" %9.2e", errors[p]);
        printf("  %s\n", ok ? "ok" : "FAIL");
        count(ok);
    }
}

// Every activation and gradient of the dump, at four panel heights.
static void check_tensors(const Dump *dump) {
    const Safetensors *file = dump->file;
    const Tensor **rows = (const Tensor **)lend(sizeof(Tensor *) * (size_t)(file->n_tensors + 1));
    Distances *distances = (Distances *)lend(sizeof(Distances) * (size_t)(file->n_tensors + 1));
    precise norms[2] = {0, 0}; // of all activations, of all gradients
    int counts[2] = {0, 0};
    for (int i = 0; i < file->n_tensors; i++) {
        const FileTensor *t = &file->tensors[i];
        rows[i] = row_of(dump->model, t);
        if (!rows[i]) continue;
        norms[is_gradient(t)] += tensor_norm(t, 0, t->count);
        counts[is_gradient(t)]++;
    }
    for (int p = 0; p < N_HEIGHTS; p++) measure(dump, rows, p, distances);
    printf("  %-50s %9s %9s %9s %9s  (bound %.1e)\n", "tensor, relative error at panel height", "auto", "1",
           "3", "8", bound_of_dump());
    for (int i = 0; i < file->n_tensors; i++) {
        const FileTensor *t = &file->tensors[i];
        if (!rows[i]) continue;
        // The gradient of mamba2's D, a number a head, is a sum over all tokens and channels that nearly
        // cancels once weights are trained (1e-4 to 5e-3 of the mean of all norms, in four runs): in float32
        // what its terms lost may be more than 1e-5 of what is left.
        double least = is_gradient(t) && !IS_DOUBLE && strstr(t->name, "mixer.D") ? 1e-2 : 1e-3;
        // Without RoPE the bias of the keys, too, shifts all logits of a row alike.
        int no_rope = dump->model->config.no_rope;
        if (no_rope && is_gradient(t) && strstr(t->name, "k_proj.bias")) least = 1;
        double mean = norms[is_gradient(t)] / counts[is_gradient(t)];
        double size = tensor_norm(t, 0, in_halves(t) ? t->count / 2 : t->count);
        check_tensor(t, &distances[i], fmax(size, least * mean));
    }
    if (!counts[0] && !counts[1]) check(0, "the dump holds no activation and no gradient to check");
}

// The model that a dump's metadata describe; clears *ok after a failed check.
static Config config_in(const Safetensors *file, int *ok) {
    int V = (int)meta_number(file, "vocab_size", 1, 1 << 20, ok);
    int D = (int)meta_number(file, "d_model", 2, 1 << 14, ok);
    int L = (int)meta_number(file, "n_layers", 1, 1000, ok);
    int H = (int)meta_number(file, "n_heads", 1, 1 << 14, ok);
    int G = (int)meta_number(file, "n_kv_heads", 1, 1 << 14, ok);
    int T = (int)meta_number(file, "max_seq_len", 1, 1 << 24, ok);
    Config c = config_with(0, V, D, L, H, G, T);
    c.gamma_max = meta_number(file, "gamma_max", 0, 1, ok);
    c.no_rope = safetensors_meta(file, "no_rope") != NULL;
    const char *mixer = safetensors_meta(file, "mixer");
    c.mixer = mixer ? find_mixer(mixer) : -1;
    if (c.mixer < 0) *ok = check(0, "metadata mixer is %.40s", mixer ? mixer : "missing");
    if (c.mixer == MAMBA2) {
        c.head_dim = (int)meta_number(file, "mamba_head_dim", 1, 1 << 15, ok);
        c.state_dim = (int)meta_number(file, "mamba_state_dim", 1, 1 << 12, ok);
        if (*ok && 2 * D % c.head_dim) *ok = check(0, "mamba_head_dim does not divide twice d_model");
    }
    if (*ok && (D % H || D / H % 2 || H % G)) *ok = check(0, "heads do not divide the width");
    return c;
}

// All that a dump holds, by a model that has just been made.
static void check_contents(Model *m, const Safetensors *file, int B, int T) {
    int V = m->config.vocab_size, counted = 0;
    const char *missing = take_weights(m, file);
    const int *inputs = take_ids(file, "inputs", B, T, 0, V);
    const int *targets = take_ids(file, "targets", B, T, -1, V);
    if (missing) {
        check(0, "%s is missing, or is not F32 or of another shape", missing);
        return;
    }
    if (!inputs || !targets) {
        check(0, "inputs or targets are missing, or not I32 (B,T) within the vocabulary");
        return;
    }
    for (int i = 0; i < B * T; i++) counted += targets[i] >= 0;
    Dump dump = {file, m, inputs, targets, B, T, counted ? 1.0 / counted : 0};
    const FileTensor *losses = safetensors_find(file, "losses");
    check_tensors(&dump);
    if (losses) check_losses(&dump, losses);
}

static void check_dump(const char *path) {
    char error[ERROR_SIZE];
    Safetensors file;
    int ok = 1;
    heading(path);
    if (safetensors_read(&file, path, error)) { check(0, "%s", error); return; }
    Config c = config_in(&file, &ok);
    int B = (int)meta_number(&file, "batch_size", 1, 1 << 14, &ok);
    int T = (int)meta_number(&file, "seq_len", 1, 1 << 16, &ok);
    Model *m = ok ? tested_create(&c, B, T, KEEP_ALL, error) : NULL;
    if (ok && !m) check(0, "%s", error);
    if (m) {
        check_contents(m, &file, B, T);
        tested_free(m);
    }
    safetensors_free(&file);
    release();
}

// Whether this very test, started with a dump of these bytes, says FAIL and ends with 1.
static int fails_on(const unsigned char *bytes, size_t size) {
    char path[] = "/tmp/test_sessa_XXXXXX", line[ERROR_SIZE];
    int fd = mkstemp(path), told = 0;
    if (fd < 0 || write(fd, bytes, size) != (ssize_t)size) return check(0, "%s cannot be written", path);
    close(fd);
    setenv("TEST", self, 1);
    setenv("DUMP", path, 1);
    fflush(stdout);
    FILE *said = popen("exec \"$TEST\" \"$DUMP\"", "r");
    while (said && fgets(line, sizeof(line), said)) told |= strstr(line, "FAIL") != NULL;
    int status = said ? pclose(said) : -1;
    unlink(path);
    return told && WIFEXITED(status) && WEXITSTATUS(status) == 1;
}

// The check of dumps must fail where it should: on copies of a dump with one thing wrong.
static void test_bad_dumps(const char *dump) {
    heading("damaged copies of a dump are refused");
    static const char *const edits[][2] = { // of the header: from, to
        {"\"act.encoded\"", "\"act.encodet\""},
        {"\"act.encoded\"", "\"extra\""},
        {"\"grad.wte.weight\"", "\"grad.wte.waight\""},
        {"\"d_model\"", "\"d_modal\""},
        {"\"inputs\"", "\"imputs\""},
        {"\"ln_f.bias\"", "\"ln_f.bios\""},
    };
    char error[ERROR_SIZE];
    Safetensors file;
    unsigned char *bytes;
    size_t size;
    if (safetensors_read(&file, dump, error) || file_read(dump, &bytes, &size, error)) {
        check(0, "%s", error);
        return;
    }
    keep(bytes);
    for (int i = 0; i < 6; i++) {
        size_t size_bad = size;
        const unsigned char *bad = with_header(bytes, &size_bad, edits[i][0], edits[i][1]);
        check(bad && fails_on(bad, size_bad), "%s in place of %s: fails", edits[i][1], edits[i][0]);
    }
    const FileTensor *t = safetensors_find(&file, "grad.ln_f.bias");
    float value;
    if (t) {
        memcpy(&value, t->data, 4);
        value *= 1.01f;
        memcpy(bytes + (t->data - file.bytes), &value, 4);
        check(fails_on(bytes, size), "one gradient off by a hundredth: fails");
    }
    check(fails_on(bytes, size / 2), "half a file: fails");
    safetensors_free(&file);
    release();
}

#ifdef TEST_CUDA
// A bf16 number is off by 2^-8 of itself at most; the way through a layer has 8 roundings, and so has the way
// back.
static void check_dumps_in_bf16(const glob_t *dumps) {
    gpu.precision = BF16;
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

static void test_everything(int only_layers) {
    glob_t dumps;
    memset(&dumps, 0, sizeof(dumps));
    go_to_data();
    glob("data/ref_*.safetensors", 0, NULL, &dumps);
#ifdef TEST_CUDA
    check_dumps_in_bf16(&dumps);
#endif
    test_numbers();
    test_matmul();
    test_triangular();
    test_plain();
    test_attention();
    test_feedback();
    test_extremes();
    test_scan();
    test_memory();
    if (IS_DOUBLE) {
        test_layers();
        test_model_gradients();
    }
    test_training_parts();
    test_extend();
    if (!dumps.gl_pathc) check(0, "no dump data/ref_*.safetensors (dev/ makes them)");
    else if (!only_layers && !ON_GPU) test_bad_dumps(dumps.gl_pathv[0]);
    for (size_t i = 0; i < dumps.gl_pathc; i++) check_dump(dumps.gl_pathv[i]);
    if (!ON_GPU) heading("the same, every layer by its plain loops");
    plain = !ON_GPU;
    for (size_t i = 0; i < dumps.gl_pathc && plain; i++) check_dump(dumps.gl_pathv[i]);
    plain = 0;
    globfree(&dumps);
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "--run")) { // the program, for tests that run it
        start_again(argv);
        argv[1] = argv[0];
        return run_tested(argc - 1, argv + 1);
    }
    begin(argv);
#ifdef TEST_CUDA
    char no_gpu[ERROR_SIZE];
    if (gpu_open(no_gpu)) { fprintf(stderr, "test_sessa: %s\n", no_gpu); return 1; }
    gpu.precision = FP32; // 1e-4 in float32
    dump_bound = 1e-4;
#endif
    // A trained checkpoint's rows of s are alike, and what α's gradient keeps of dA - δ is their difference:
    // float32 has lost up to two of its digits there. In float64 the bound is the dump's own.
    int trained = argc == 3 && !strcmp(argv[1], "--trained");
    if (trained) {
        dump_bound = bound_of(1e-4, 0);
        argv++;
        argc--;
    }
    int only_layers = argc == 2 && !strcmp(argv[1], "--layers");
    if (argc == 1 || only_layers) test_everything(only_layers);
    else for (int i = 1; i < argc; i++) check_dump(argv[i]);
    return report();
}
