/*
Sessa (Selective State Space Attention, arXiv 2604.18580) on the CPU: every layer's forward and backward pass, the
model, its files, its data, the training loop and the command line, in one file that reads from top to bottom.

A Sessa layer reads the past by attention, f = Attention(x), and then feeds its own past outputs back through a second
attention: s_t = f_t + gamma_t Σ_{j<t} alpha_tj s_j. Stacked over t this is a triangular system (I - diag(gamma) alpha)
s = f, whose inverse sums the paths of every number of hops from j to t: the memory fades as a power of the lag.

Letters: B sequences, T tokens each, D model width, H query heads, G key/value heads, d = D/H head width, L layers,
V vocabulary, P panel height. Arrays are row-major, (B,T,D) means index (b·T + t)·D + i; a linear layer's weight is
(out, in). Numbers in [ ] are the paper's equations. Gradients of parameters are accumulated (+=); gradients of
activations are written (=) unless the comment says +=. No layer allocates: scratch comes from the caller.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_max_threads(void) { return 1; }
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_threads(void) { return 1; }
#endif

#ifndef REAL
#define REAL float // -DREAL=double builds the whole program in float64: gradients are checked there
#endif
typedef REAL real;

// ----------------------------------------------------------------------------
// errors and numbers

enum { ERROR_SIZE = 512 };          // room for one line; every `char *error` below points to this much

// Writes "path: what" (only "what" if path is NULL) into error as one line and returns -1. Of a long path the end is
// shown. What stands in a file may be hostile: in "what", every byte that is not printable ASCII becomes '?'.
static int fail_line(char *error, const char *path, const char *format, va_list arguments) {
    size_t used = 0;
    if (path) {
        size_t length = strlen(path), cut = length > 300 ? length - 300 : 0;
        used = (size_t)snprintf(error, ERROR_SIZE, "%s%s: ", cut ? "..." : "", path + cut);
    }
    vsnprintf(error + used, ERROR_SIZE - used, format, arguments);
    for (size_t i = 0; error[i]; i++) {
        unsigned char c = (unsigned char)error[i];
        if (c < 32 || c == 127 || (c > 127 && i >= used)) error[i] = '?';
    }
    return -1;
}

// Formats one line into error and returns -1, so that callers write `return fail(error, "...")`.
__attribute__((format(printf, 2, 3)))
static int fail(char *error, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fail_line(error, NULL, format, arguments);
    va_end(arguments);
    return -1;
}

// The same with "path: " before it.
__attribute__((format(printf, 3, 4)))
static int file_fail(char *error, const char *path, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fail_line(error, path, format, arguments);
    va_end(arguments);
    return -1;
}

// 0 and the value if the whole text is one finite decimal number ("3e-4", "-1", ".5"), else -1: no spaces, hex or inf.
static int parse_number(const char *text, double *value) {
    if (text[strspn(text, "0123456789+-.eE")]) return -1;
    char *end;
    double number = strtod(text, &end);
    if (end == text || *end || !isfinite(number)) return -1;
    *value = number;
    return 0;
}

// 0 and the value if the text is an integer in low..high, however written ("128", "1.28e2", "128.0"), else -1.
// Plain digits are exact up to 2^63-1, other spellings as exact as a double.
static int parse_integer(const char *text, int64_t low, int64_t high, int64_t *value) {
    int64_t integer;
    const char *digits = text + (*text == '-' || *text == '+');
    if (*digits && !digits[strspn(digits, "0123456789")]) {
        errno = 0;
        integer = strtoll(text, NULL, 10);
        if (errno) return -1;
    } else {
        double number;
        if (parse_number(text, &number) || number != floor(number) || fabs(number) >= 9223372036854775808.0) return -1;
        integer = (int64_t)number;
    }
    if (integer < low || integer > high) return -1;
    *value = integer;
    return 0;
}

// Ends the program where a small allocation fails; what is large is allocated by functions that return errors.
static void exhausted(void) {
    fprintf(stderr, "train_sessa: out of memory\n");
    exit(1);
}

// ----------------------------------------------------------------------------
// elementary functions

static inline int min_int(int a, int b) { return a < b ? a : b; }

// e^x by 2^n · e^r with |r| ≤ ln2/2 and a polynomial for e^r, so that loops over it are vectorised.
// float: relative error below 2.5e-7 + 3e-8·|x|, and e^-87 for any x below -87. double: the library's.
static inline real exp_real(real x) {
    if (sizeof(real) == sizeof(double)) return (real)exp((double)x);
    float y = (float)x, low = y > -87.0f ? y : -87.0f, clamped = low < 88.0f ? low : 88.0f;
    int32_t n = (int32_t)(clamped * 1.44269504f + 128.5f) - 128; // the nearest integer
    float r = clamped - (float)n * 0.693147181f;
    float power = 1.0f + r * (1.0f + r * (0.49999988f + r * (0.16666512f + r * (0.041669644f + r * (0.0083696283f +
                  r * 0.0013748823f)))));
    int32_t bits = (n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof(scale));
    return y == y ? (real)(power * scale) : x;
}

// Φ(x) = (1 + erf(x/√2))/2, given gauss = e^(-x²/2). float: Φ(-|x|) = gauss · polynomial in 1/(1 + 0.3|x|), fitted here
// to a relative error of 1.2e-7 for |x| ≤ 13; absolute error in float arithmetic below 3e-7.
static inline real normal_cdf(real x, real gauss) {
    if (sizeof(real) == sizeof(double)) return (real)(0.5 * erfc(-(double)x * 0.70710678118654752440));
    real t = 1 / (1 + (real)0.3 * (x < 0 ? -x : x));
    real tail = gauss * t * ((real)0.11962327 + t * ((real)0.12084553 + t * ((real)0.099347115 + t * ((real)0.1304165 +
                t * ((real)-0.057167433 + t * ((real)0.21011846 + t * ((real)-0.15937835 + t * (real)0.036194865)))))));
    return x < 0 ? tail : 1 - tail;
}

// ----------------------------------------------------------------------------
// the matrix product, the one routine under every layer

// Element (i, j) of a matrix is at[i·row + j·col]: a transpose swaps the strides and costs nothing.
typedef struct { const real *at; ptrdiff_t row, col; } Matrix;

static inline Matrix rows_of(const real *at, ptrdiff_t row) { Matrix m = {at, row, 1}; return m; }
static inline Matrix transpose(Matrix a) { Matrix m = {a.at, a.col, a.row}; return m; }

// The register tile: TILE_ROWS × TILE_COLS sums, TILE_COLS two vectors wide, that stay in registers while k runs.
#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, TILE_ROWS = 12 };
#elif defined(__AVX__)
enum { VECTOR_BYTES = 32, TILE_ROWS = 6 };
#elif defined(__aarch64__)
enum { VECTOR_BYTES = 16, TILE_ROWS = 12 };
#else
enum { VECTOR_BYTES = 16, TILE_ROWS = 6 };
#endif
enum {
    LANES = VECTOR_BYTES / (int)sizeof(real),
    TILE_COLS = 2 * LANES,
    BLOCK_K = 256,               // a packed tile of A, TILE_ROWS × BLOCK_K, stays in the L1 cache
    BLOCK_N = 8 * TILE_COLS,     // a packed block of B, BLOCK_K × BLOCK_N, stays in the L2 cache
    PARALLEL_WORK = 1 << 15      // multiply-adds below which a product is not worth waking the threads
};
typedef real Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

// packed[k·width + r] = at[r·stride_r + k·stride_k] for r < n, and 0 for n ≤ r < width: a strip of A or B in the order
// in which the tile reads it.
static inline void pack(real *packed, int width, const real *at, ptrdiff_t stride_r, ptrdiff_t stride_k, int n, int K) {
    if (n < width) memset(packed, 0, sizeof(real) * (size_t)K * (size_t)width);
    if (stride_r == 1 && n == width) {
        for (int k = 0; k < K; k++) memcpy(packed + k * width, at + k * stride_k, sizeof(real) * (size_t)width);
        return;
    }
    enum { CHUNK = 16 }; // a strip that is transposed is written in chunks that stay in the L1 cache
    for (int k0 = 0; k0 < K; k0 += CHUNK)
        for (int r = 0; r < n; r++)
            for (int k = k0; k < min_int(k0 + CHUNK, K); k++)
                packed[k * width + r] = at[r * stride_r + k * stride_k];
}

// sum[i·TILE_COLS + j] = Σ_k a[k·TILE_ROWS + i] · b[k·TILE_COLS + j], a and b packed
static inline void tile_product(real *sum, const real *a, const real *b, int K) {
    Vector zero = {0}, left[TILE_ROWS], right[TILE_ROWS];
    for (int i = 0; i < TILE_ROWS; i++) left[i] = right[i] = zero;
    for (int k = 0; k < K; k++, a += TILE_ROWS, b += TILE_COLS) {
        Vector b_left = *(const Vector *)b, b_right = *(const Vector *)(b + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < TILE_ROWS; i++) {
            left[i] += a[i] * b_left;
            right[i] += a[i] * b_right;
        }
    }
    for (int i = 0; i < TILE_ROWS; i++) {
        *(Vector *)(sum + i * TILE_COLS) = left[i];
        *(Vector *)(sum + i * TILE_COLS + LANES) = right[i];
    }
}

// The threads that share a piece of work: this one's number, how many there are, and a block of scratch they have in common.
typedef struct { int thread, threads; real *packed; } Team;

static inline void barrier(Team team) {
    if (team.threads > 1) {
        #pragma omp barrier
    }
}

// The product with a single row, as in generation: bound by reading B once, so nothing is packed.
static void row_product(Team team, real *out, Matrix a, Matrix b, int N, int K, real alpha, real beta, const real *bias) {
    enum { COLUMNS = 64 };
    for (int n0 = team.thread * COLUMNS; n0 < N; n0 += team.threads * COLUMNS) {
        int n = min_int(COLUMNS, N - n0);
        const real *at = b.at + n0 * b.col;
        real sum[COLUMNS] = {0};
        if (b.row == 1) {
            for (int j = 0; j < n; j++)
                for (int k = 0; k < K; k++) sum[j] += a.at[k * a.col] * at[j * b.col + k];
        } else {
            for (int k = 0; k < K; k++)
                for (int j = 0; j < n; j++) sum[j] += a.at[k * a.col] * at[k * b.row + j * b.col];
        }
        for (int j = 0; j < n; j++)
            out[n0 + j] = alpha * sum[j] + (beta == 0 ? 0 : beta * out[n0 + j]) + (bias ? bias[n0 + j] : 0);
    }
    barrier(team);
}

// out = alpha·sum + keep·out + add for the m × n numbers of one tile
static inline void store_tile(real *out, ptrdiff_t ld, const real *sum, int m, int n, real alpha, real keep, const real *add) {
    for (int i = 0; i < m; i++, out += ld, sum += TILE_COLS) {
        if (keep == 0) for (int j = 0; j < n; j++) out[j] = alpha * sum[j];
        else for (int j = 0; j < n; j++) out[j] = keep * out[j] + alpha * sum[j];
        if (add) for (int j = 0; j < n; j++) out[j] += add[j];
    }
}

// out = alpha·A·B + beta·out + bias: A (M,K), B (K,N), out (M,N) with `ld` elements from row to row, bias (N) or NULL.
// beta 0 overwrites. It equals
//     for i < M: for j < N: out[i][j] = alpha · Σ_k A[i][k]·B[k][j] + beta · out[i][j] + bias[j]
// Every thread of the team calls it. Of each block of B a thread packs some strips; then, of the tiles of `out` over that
// block, counted row by row, it computes an equal share. The barriers keep the block whole while anyone reads it. Which
// thread takes a tile changes no sum: the bits do not depend on the number of threads.
static void team_matmul(Team team, real *out, ptrdiff_t ld, Matrix a, Matrix b, int M, int N, int K, real alpha, real beta,
                        const real *bias) {
    real packed_a[BLOCK_K * TILE_ROWS] __attribute__((aligned(64)));
    real sum[TILE_ROWS * TILE_COLS] __attribute__((aligned(64)));
    if (M == 1) { row_product(team, out, a, b, N, K, alpha, beta, bias); return; }
    for (int n0 = 0; n0 < N; n0 += BLOCK_N)
        for (int k0 = 0; k0 == 0 || k0 < K; k0 += BLOCK_K) {
            int block_n = min_int(BLOCK_N, N - n0), block_k = min_int(BLOCK_K, K - k0);
            int strips = (block_n + TILE_COLS - 1) / TILE_COLS;
            for (int j0 = team.thread * TILE_COLS; j0 < block_n; j0 += team.threads * TILE_COLS)
                pack(team.packed + j0 * block_k, TILE_COLS, b.at + k0 * b.row + (n0 + j0) * b.col, b.col, b.row,
                     min_int(TILE_COLS, block_n - j0), block_k);
            barrier(team);
            int64_t tiles = (int64_t)((M + TILE_ROWS - 1) / TILE_ROWS) * strips;
            int64_t first = tiles * team.thread / team.threads, last = tiles * (team.thread + 1) / team.threads;
            for (int64_t tile = first; tile < last; tile++) {
                int i0 = (int)(tile / strips) * TILE_ROWS, j0 = (int)(tile % strips) * TILE_COLS;
                int m = min_int(TILE_ROWS, M - i0), n = min_int(TILE_COLS, block_n - j0);
                if (tile == first || j0 == 0)
                    pack(packed_a, TILE_ROWS, a.at + i0 * a.row + k0 * a.col, a.row, a.col, m, block_k);
                tile_product(sum, packed_a, team.packed + j0 * block_k, block_k);
                const real *add = bias && k0 == 0 ? bias + n0 + j0 : NULL;
                real *to = out + i0 * ld + n0 + j0, keep = k0 ? 1 : beta;
                if (n == TILE_COLS) store_tile(to, ld, sum, m, TILE_COLS, alpha, keep, add); // a constant, for the compiler
                else store_tile(to, ld, sum, m, n, alpha, keep, add);
            }
            barrier(team);
        }
}

// The same by all threads, called from outside a parallel region.
static void matmul(real *out, ptrdiff_t ld, Matrix a, Matrix b, int M, int N, int K, real alpha, real beta, const real *bias) {
    real packed[BLOCK_K * BLOCK_N] __attribute__((aligned(64)));
    #pragma omp parallel if ((int64_t)M * N * K > PARALLEL_WORK)
    {
        Team team = {omp_get_thread_num(), omp_get_num_threads(), packed};
        team_matmul(team, out, ld, a, b, M, N, K, alpha, beta, bias);
    }
}

// Rows of a panel, the unit in which attention and the feedback solve work. 0 chooses: high panels make large
// products, low ones waste less above the diagonal and keep P·T numbers inside the L2 cache.
enum { PANEL_MAX = 60 };
static int panel_height(int P, int T) {
    if (P > 0) return min_int(P, PANEL_MAX);
    int height = T <= 128 ? 24 : T <= 2048 ? 60 : 36;
    return height;
}

// Solves (I - N) x = b for a strictly lower-triangular N (n,n), n ≤ PANEL_MAX: x (n,D) holds b before and x after, `ld`
// elements from row to row. It equals
//     for t < n: for j < t: x[t] += N[t][j] · x[j]
// in strips of TILE_COLS columns, which do not depend on each other: TILE_ROWS rows at a time take what the rows before
// them give as one tile product (the strip of x is the packed B), then what they give each other row by row.
// With negative strides it runs from the last row to the first: so the transposed system is solved.
static void triangular_solve(Team team, real *x, ptrdiff_t ld, Matrix N, int n, int D) {
    real packed[(PANEL_MAX + TILE_ROWS) * PANEL_MAX] __attribute__((aligned(64)));
    for (int t0 = 0; t0 < n; t0 += TILE_ROWS)
        pack(packed + t0 * PANEL_MAX, TILE_ROWS, N.at + t0 * N.row, N.row, N.col, min_int(TILE_ROWS, n - t0), t0);
    for (int d0 = team.thread * TILE_COLS; d0 < D; d0 += team.threads * TILE_COLS) {
        int width = min_int(TILE_COLS, D - d0);
        real strip[PANEL_MAX * TILE_COLS] __attribute__((aligned(64)));
        real sum[TILE_ROWS * TILE_COLS] __attribute__((aligned(64)));
        for (int t = 0; t < n; t++)
            for (int i = 0; i < TILE_COLS; i++) strip[t * TILE_COLS + i] = i < width ? x[t * ld + d0 + i] : 0;
        for (int t0 = 0; t0 < n; t0 += TILE_ROWS) {
            int rows = min_int(TILE_ROWS, n - t0);
            tile_product(sum, packed + t0 * PANEL_MAX, strip, t0);
            for (int r = 0; r < rows; r++) {
                real *row = strip + (t0 + r) * TILE_COLS;
                for (int i = 0; i < TILE_COLS; i++) row[i] += sum[r * TILE_COLS + i];
                for (int q = 0; q < r; q++) {
                    real weight = N.at[(t0 + r) * N.row + (t0 + q) * N.col];
                    for (int i = 0; i < TILE_COLS; i++) row[i] += weight * strip[(t0 + q) * TILE_COLS + i];
                }
            }
        }
        for (int t = 0; t < n; t++)
            for (int i = 0; i < width; i++) x[t * ld + d0 + i] = strip[t * TILE_COLS + i];
    }
    barrier(team);
}

// ----------------------------------------------------------------------------
// random numbers

// The SplitMix64 mixer (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014; constants by
// Vigna): a bijection of 64-bit words that passes for random.
static inline uint64_t splitmix64(uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// The generator's whole state is one word.
static uint64_t random_u64(uint64_t *state) {
    uint64_t out = splitmix64(*state);
    *state += 0x9E3779B97F4A7C15u;
    return out;
}
static double random_uniform(uint64_t *state) { return (double)(random_u64(state) >> 11) * 0x1p-53; } // [0, 1)
static double random_normal(uint64_t *state) { // Box and Muller
    double radius = sqrt(-2 * log(1 - random_uniform(state)));
    return radius * cos(6.28318530717958647692 * random_uniform(state));
}

// A dropout mask is a function of (seed, micro-batch, place, index), not stored: the backward pass asks it again.
// probability 0 is off.
typedef struct { double probability; uint64_t seed, micro_step; } Dropout;

// x_i *= mask_i, mask_i = 0 with the given probability p, else 1/(1-p). x (n). Its own backward pass, on the gradient.
static void dropout(real *x, int64_t n, Dropout drop, int place) {
    if (drop.probability <= 0) return;
    uint64_t key = splitmix64(splitmix64(splitmix64(drop.seed) ^ drop.micro_step) ^ (uint64_t)place);
    uint64_t threshold = (uint64_t)(drop.probability * 4294967296.0);
    real scale = (real)(1 / (1 - drop.probability));
    #pragma omp parallel for
    for (int64_t i = 0; i < n; i++) x[i] *= (splitmix64(key ^ (uint64_t)i) >> 32) >= threshold ? scale : 0;
}

// ----------------------------------------------------------------------------
// layers, in the order in which data meets them

// out[bt] = wte[inp[bt]]        inp (B,T) token ids, wte (V,D), out (B,T,D)
static void embedding_forward(real *out, const int *inp, const real *wte, int B, int T, int D) {
    #pragma omp parallel for
    for (int bt = 0; bt < B * T; bt++)
        memcpy(out + (size_t)bt * D, wte + (size_t)inp[bt] * D, sizeof(real) * (size_t)D);
}

// dwte[inp[bt]] += dout[bt]     A thread takes columns, so that no two write the same row of dwte.
static void embedding_backward(real *dwte, const real *dout, const int *inp, int B, int T, int D) {
    enum { COLUMNS = 64 };
    #pragma omp parallel for
    for (int d0 = 0; d0 < D; d0 += COLUMNS)
        for (int bt = 0; bt < B * T; bt++)
            for (int i = d0; i < min_int(d0 + COLUMNS, D); i++)
                dwte[(size_t)inp[bt] * D + i] += dout[(size_t)bt * D + i];
}

// [9]  out = (x - mean)·rstd ⊙ weight + bias, rstd = 1/sqrt(variance + 1e-5), over the D numbers of each row
// x, out (N,D), mean and rstd (N): kept for the backward pass, which needs no more than x beside them.
static void layernorm_forward(real *out, real *mean, real *rstd, const real *x, const real *weight, const real *bias,
                              int N, int D) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const real *row = x + (size_t)n * D;
        real sum = 0, squares = 0;
        for (int i = 0; i < D; i++) sum += row[i];
        real m = sum / D;
        for (int i = 0; i < D; i++) squares += (row[i] - m) * (row[i] - m);
        real r = 1 / (real)sqrt((double)(squares / D) + 1e-5);
        for (int i = 0; i < D; i++) out[(size_t)n * D + i] = (row[i] - m) * r * weight[i] + bias[i];
        mean[n] = m;
        rstd[n] = r;
    }
}

// With x̂ = (x - mean)·rstd and w = dout ⊙ weight:
//     dx += rstd·(w - mean(w) - x̂·mean(w ⊙ x̂))      += because x also goes past the layer, on the residual path
//     dweight += Σ_n dout ⊙ x̂,   dbias += Σ_n dout
static void layernorm_backward(real *dx, real *dweight, real *dbias, const real *dout, const real *x, const real *mean,
                               const real *rstd, const real *weight, int N, int D) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const real *row = x + (size_t)n * D, *drow = dout + (size_t)n * D;
        real sum = 0, dot = 0, m = mean[n], r = rstd[n];
        for (int i = 0; i < D; i++) {
            real w = drow[i] * weight[i];
            sum += w;
            dot += w * (row[i] - m);
        }
        sum /= D;
        dot *= r * r / D;
        for (int i = 0; i < D; i++) dx[(size_t)n * D + i] += r * (drow[i] * weight[i] - sum - (row[i] - m) * dot);
    }
    enum { COLUMNS = 64 };
    #pragma omp parallel for
    for (int d0 = 0; d0 < D; d0 += COLUMNS) {
        int width = min_int(COLUMNS, D - d0);
        real sum[COLUMNS] = {0}, dot[COLUMNS] = {0};
        for (int n = 0; n < N; n++) {
            const real *row = x + (size_t)n * D + d0, *drow = dout + (size_t)n * D + d0;
            for (int i = 0; i < width; i++) {
                sum[i] += drow[i];
                dot[i] += drow[i] * (row[i] - mean[n]) * rstd[n];
            }
        }
        for (int i = 0; i < width; i++) {
            dbias[d0 + i] += sum[i];
            dweight[d0 + i] += dot[i];
        }
    }
}

// out = inp·weight^T + bias     inp (N,in), weight (out_width,in), bias (out_width) or NULL, out (N,out_width)
// ld_out: elements from row to row of out, which may be some columns of a wider matrix.
static void linear_forward(real *out, int ld_out, const real *inp, const real *weight, const real *bias, int N, int in,
                           int out_width) {
    matmul(out, ld_out, rows_of(inp, in), transpose(rows_of(weight, in)), N, out_width, in, 1, 0, bias);
}

// dinp = dout·weight (NULL: not wanted),   dweight += dout^T·inp,   dbias += Σ_n dout (NULL: no bias)
static void linear_backward(real *dinp, real *dweight, real *dbias, const real *dout, int ld_dout, const real *inp,
                            const real *weight, int N, int in, int out_width) {
    if (dinp) matmul(dinp, in, rows_of(dout, ld_dout), rows_of(weight, in), N, in, out_width, 1, 0, NULL);
    matmul(dweight, in, transpose(rows_of(dout, ld_dout)), rows_of(inp, in), out_width, in, N, 1, 1, NULL);
    if (!dbias) return;
    enum { COLUMNS = 64 };
    #pragma omp parallel for
    for (int o = 0; o < out_width; o += COLUMNS) {
        int width = min_int(COLUMNS, out_width - o);
        real sum[COLUMNS] = {0};
        for (int n = 0; n < N; n++)
            for (int i = 0; i < width; i++) sum[i] += dout[(size_t)n * ld_dout + o + i];
        for (int i = 0; i < width; i++) dbias[o + i] += sum[i];
    }
}

// [11]  out = GELU(inp) = inp·Φ(inp), the exact one      inp: D of the ld columns of each of N rows, out (N,D)
static void gelu_forward(real *out, const real *inp, int ld, int N, int D) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++)
        for (int i = 0; i < D; i++) {
            real x = inp[(size_t)n * ld + i];
            out[(size_t)n * D + i] = x * normal_cdf(x, exp_real(-x * x / 2));
        }
}

// dinp = dout·(Φ(inp) + inp·φ(inp)), φ the normal density; dinp with the layout of inp
static void gelu_backward(real *dinp, const real *dout, const real *inp, int ld, int N, int D) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++)
        for (int i = 0; i < D; i++) {
            real x = inp[(size_t)n * ld + i], gauss = exp_real(-x * x / 2);
            dinp[(size_t)n * ld + i] =
                dout[(size_t)n * D + i] * (normal_cdf(x, gauss) + x * gauss * (real)0.39894228040143267794);
        }
}

// cosine and sine (T, d/2) of the angles t·10000^(-2i/d), computed in double
static void rope_table(real *cosine, real *sine, int T, int d) {
    #pragma omp parallel for
    for (int t = 0; t < T; t++)
        for (int i = 0; i < d / 2; i++) {
            double angle = t * pow(10000, -2.0 * i / d);
            cosine[(size_t)t * (d / 2) + i] = (real)cos(angle);
            sine[(size_t)t * (d / 2) + i] = (real)sin(angle);
        }
}

// RoPE: turns each pair (x_2i, x_2i+1) of each head by the angle of its position t, in place. x: the first heads·d of
// the ld columns of N rows, of which row n stands at position first + n mod T. direction -1 turns back.
static void rope_forward(real *x, int ld, const real *cosine, const real *sine, int N, int T, int heads, int d,
                         int first, real direction) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const real *c = cosine + (size_t)(first + n % T) * (d / 2), *s = sine + (size_t)(first + n % T) * (d / 2);
        for (int h = 0; h < heads; h++) {
            real *pair = x + (size_t)n * ld + h * d;
            for (int i = 0; i < d / 2; i++) {
                real even = pair[2 * i], odd = pair[2 * i + 1];
                pair[2 * i] = even * c[i] - direction * odd * s[i];
                pair[2 * i + 1] = direction * even * s[i] + odd * c[i];
            }
        }
    }
}

// A rotation's derivative is the rotation back, in place on the gradient.
static void rope_backward(real *dx, int ld, const real *cosine, const real *sine, int N, int T, int heads, int d) {
    rope_forward(dx, ld, cosine, sine, N, T, heads, d, 0, -1);
}

// Attention and feedback work on items, a head or a sequence each, that do not depend on each other: as many as can be
// dealt out evenly go to one thread each, the rest to all threads together, one after the other. A team's scratch is a
// packed block of a product, two panels and a square of weights; there is one for each thread and one for all together.
static size_t team_scratch(int T) { return BLOCK_K * BLOCK_N + 2 * (size_t)PANEL_MAX * (size_t)T + PANEL_MAX * PANEL_MAX; }
static size_t panel_scratch(int T) { return team_scratch(T) * (size_t)(omp_get_max_threads() + 1); }

static inline int dealt(int items) { return items - items % omp_get_num_threads(); }
static inline Team team_of(int item, int items, real *scratch, int T) {
    int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    Team alone = {0, 1, scratch + team_scratch(T) * (size_t)thread}, all = {thread, threads, scratch + team_scratch(T) * (size_t)threads};
    return item < dealt(items) ? alone : all;
}
static inline int first_item(int items) { return dealt(items) ? omp_get_thread_num() : 0; }
static inline int next_item(int item, int items) {
    if (item >= dealt(items)) return item + 1;
    return min_int(item + omp_get_num_threads(), dealt(items));
}

// Both need one thing: rows of softmax weights over the past. For the rows t = i0 .. i0+n-1
//     weights[t - i0][j] = gain_t · exp(σ(d) q_t·k_j - logsumexp_t) for the j that t sees (j ≤ t; strict: j < t), else 0
// q: n rows, k: i0+n rows, weights (n, i0+n), gain (n) or NULL for 1. The log-sum-exp of each row is all that is kept: the
// forward pass writes it, the backward pass gives it again as `known` and gets the same weights. Row 0 of a strict panel
// sees nothing: 0 and 0.
static void softmax_panel(Team team, real *weights, real *logsumexp, const real *known, const real *gain, const real *q,
                          int ld_q, const real *k, int ld_k, int i0, int n, int d, int strict) {
    int cols = i0 + n;
    team_matmul(team, weights, cols, rows_of(q, ld_q), transpose(rows_of(k, ld_k)), n, cols, d, 1 / (real)sqrt((double)d), 0, NULL);
    for (int r = team.thread; r < n; r += team.threads) {
        real *row = weights + (size_t)r * cols;
        int seen = i0 + r + !strict;
        if (known) {
            for (int j = 0; j < seen; j++) row[j] = exp_real(row[j] - known[r]);
        } else if (seen > 0) {
            real max = row[0], sum = 0;
            for (int j = 1; j < seen; j++) max = row[j] > max ? row[j] : max;
            for (int j = 0; j < seen; j++) sum += (row[j] = exp_real(row[j] - max));
            real scale = (gain ? gain[r] : 1) / sum;
            for (int j = 0; j < seen; j++) row[j] *= scale;
            logsumexp[r] = max + (real)log((double)sum);
        } else {
            logsumexp[r] = 0;
        }
        for (int j = seen; j < cols; j++) row[j] = 0;
    }
    barrier(team);
}

// Its backward pass, from dweights, the gradient of the weights without their gain:
//     delta_r = Σ_j weights_rj dweights_rj,   dlogits_rj = gain_r weights_rj (dweights_rj - delta_r)
// dlogits takes the place of dweights, gain_r weights_rj that of the weights. All (n, cols), delta and gain (n) or NULL.
static void softmax_panel_backward(Team team, real *dweights, real *weights, real *delta, const real *gain, int n, int cols) {
    for (int r = team.thread; r < n; r += team.threads) {
        real *w = weights + (size_t)r * cols, *dw = dweights + (size_t)r * cols, sum = 0;
        for (int j = 0; j < cols; j++) sum += w[j] * dw[j];
        for (int j = 0; j < cols; j++) {
            if (gain) w[j] *= gain[r];
            dw[j] = w[j] * (dw[j] - sum);
        }
        if (delta) delta[r] = sum;
    }
    barrier(team);
}

// [15, 16]  o_t = Σ_{j≤t} softmax_j(σ(d) q_t·k_j) v_j, head h with the keys and values of group h/(H/G)
// q: H heads of d columns, rows ld apart, for the positions first..T-1; k, v: G heads of d columns, rows ld_kv apart,
// for the positions 0..T-1 (a cache gives the ones before first); out (B, T-first, H·d); logsumexp (B,H,T-first) is
// kept for the backward pass, which recomputes the weights panel by panel: nothing of size T×T exists.
static void attention_forward(real *out, real *logsumexp, real *scratch, const real *q, int ld, const real *k,
                              const real *v, int ld_kv, int B, int T, int H, int G, int d, int first, int P) {
    int rows = T - first;
    P = panel_height(P, T);
    #pragma omp parallel
    for (int item = first_item(B * H); item < B * H; item = next_item(item, B * H)) {
        int b = item / H, h = item % H;
        Team team = team_of(item, B * H, scratch, T);
        real *weights = team.packed + BLOCK_K * BLOCK_N;
        size_t kv = (size_t)b * T * ld_kv + h / (H / G) * d;
        for (int i0 = 0; i0 < rows; i0 += P) {
            int n = min_int(P, rows - i0), cols = first + i0 + n;
            size_t row = (size_t)b * rows + i0;
            softmax_panel(team, weights, logsumexp + (size_t)item * rows + i0, NULL, NULL, q + row * ld + h * d, ld, k + kv, ld_kv,
                          first + i0, n, d, 0);
            team_matmul(team, out + (row * H + h) * d, H * d, rows_of(weights, cols), rows_of(v + kv, ld_kv), n, d, cols, 1, 0, NULL);
        }
    }
}

// With p the weights:  dv_j = Σ_t p_tj do_t,   dp_tj = do_t·v_j,   dlogit from it as above,
//     dq_t = σ(d) Σ_j dlogit_tj k_j,   dk_j = σ(d) Σ_t dlogit_tj q_t
// dq, dk, dv have the layout of q, k, v. Panels run from the last: it sees all keys, so it writes what the others add to.
static void attention_backward(real *dq, real *dk, real *dv, real *scratch, const real *dout, const real *logsumexp,
                               const real *q, const real *k, const real *v, int ld, int B, int T, int H, int G, int d, int P) {
    int D = H * d, ratio = H / G;
    real scale = 1 / (real)sqrt((double)d);
    P = panel_height(P, T);
    #pragma omp parallel
    for (int item = first_item(B * G); item < B * G; item = next_item(item, B * G)) {
        int b = item / G, group = item % G;
        Team team = team_of(item, B * G, scratch, T);
        real *weights = team.packed + BLOCK_K * BLOCK_N, *dlogits = weights + (size_t)PANEL_MAX * T;
        size_t kv = (size_t)b * T * ld + group * d;
        for (int h = group * ratio; h < (group + 1) * ratio; h++)
            for (int i0 = (T - 1) / P * P; i0 >= 0; i0 -= P) {
                int n = min_int(P, T - i0), cols = i0 + n;
                real beta = h == group * ratio && cols == T ? 0 : 1;
                size_t row = ((size_t)b * T + i0) * ld + h * d;
                const real *dout_I = dout + ((size_t)b * T + i0) * D + h * d;
                softmax_panel(team, weights, NULL, logsumexp + (size_t)(b * H + h) * T + i0, NULL, q + row, ld, k + kv, ld, i0, n, d, 0);
                team_matmul(team, dlogits, cols, rows_of(dout_I, D), transpose(rows_of(v + kv, ld)), n, cols, d, 1, 0, NULL);
                softmax_panel_backward(team, dlogits, weights, NULL, NULL, n, cols);
                team_matmul(team, dq + row, ld, rows_of(dlogits, cols), rows_of(k + kv, ld), n, d, cols, scale, 0, NULL);
                team_matmul(team, dk + kv, ld, transpose(rows_of(dlogits, cols)), rows_of(q + row, ld), cols, d, n, scale, beta, NULL);
                team_matmul(team, dv + kv, ld, transpose(rows_of(weights, cols)), rows_of(dout_I, D), cols, d, n, 1, beta, NULL);
            }
    }
}

// [18]  gamma_t = gamma_max · tanh(x_t·weight + bias)       x (N,D), weight (D), bias (1), gamma (N), |gamma| < gamma_max
static void gain_forward(real *gamma, const real *x, const real *weight, const real *bias, real gamma_max, int N, int D) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        real dot = bias[0];
        for (int i = 0; i < D; i++) dot += x[(size_t)n * D + i] * weight[i];
        gamma[n] = gamma_max * (real)tanh((double)dot);
    }
}

// With dpre_t = dgamma_t · gamma_max (1 - (gamma_t/gamma_max)²):
//     dx_t += dpre_t · weight,   dweight += Σ_t dpre_t x_t,   dbias += Σ_t dpre_t         dgamma becomes dpre
static void gain_backward(real *dx, real *dweight, real *dbias, real *dgamma, const real *gamma, const real *x,
                          const real *weight, real gamma_max, int N, int D) {
    double sum = 0;
    for (int n = 0; n < N; n++) {
        real ratio = gamma[n] / gamma_max;
        dgamma[n] *= gamma_max * (1 - ratio * ratio);
        sum += (double)dgamma[n];
    }
    dbias[0] += (real)sum;
    matmul(dx, D, transpose(rows_of(dgamma, N)), rows_of(weight, D), N, D, 1, 1, 1, NULL);
    matmul(dweight, D, rows_of(dgamma, N), rows_of(x, D), 1, D, N, 1, 1, NULL);
}

// [17, 19-22]  The feedback path: with the weights α_t = softmax_{j<t}(σ(D) q'_t·k'_j), one head, the strict past only,
//     s_t = f_t + gamma_t Σ_{j<t} α_tj s_j,       that is (I - A) s = f with A = diag(gamma) α
// f (B, T-first, D); q', k': D columns, rows ld and ld_k apart, q' for the positions first..T-1 and k' for 0..T-1; gamma
// and logsumexp (B, T-first); s (B,T,D), its rows before first given by a cache. It equals
//     for t: s[t] = f[t];  for j < t: s[t] += A[t][j] · s[j]
// In panels: rows i0..i1-1 first take what all earlier panels give, A_{I,<i0} s_{<i0}, as one matrix product; what is
// left is a small triangular system. Kept for the backward pass: q', k', gamma, logsumexp and s, all O(T).
static void feedback_forward(real *s, real *logsumexp, real *scratch, const real *f, const real *q, int ld, const real *k,
                             int ld_k, const real *gamma, int B, int T, int D, int first, int P) {
    int rows = T - first;
    P = panel_height(P, T);
    #pragma omp parallel
    for (int b = first_item(B); b < B; b = next_item(b, B)) {
        Team team = team_of(b, B, scratch, T);
        real *A = team.packed + BLOCK_K * BLOCK_N, *s_b = s + (size_t)b * T * D;
        for (int i0 = first; i0 < T; i0 += P) {
            int n = min_int(P, T - i0), cols = i0 + n;
            size_t row = (size_t)b * rows + (size_t)(i0 - first); // of f, q', gamma and logsumexp
            real *s_I = s_b + (size_t)i0 * D;
            if (team.thread == 0) memcpy(s_I, f + row * D, sizeof(real) * (size_t)n * (size_t)D);
            softmax_panel(team, A, logsumexp + row, NULL, gamma + row, q + row * ld, ld, k + (size_t)b * T * ld_k, ld_k, i0, n, D, 1);
            if (i0) team_matmul(team, s_I, D, rows_of(A, cols), rows_of(s_b, D), n, D, i0, 1, 1, NULL);
            triangular_solve(team, s_I, D, rows_of(A + i0, cols), n, D);
        }
    }
}

// The adjoint λ solves the transposed system (I - A)^T λ = ds: from the last row to the first,
//     λ[t] = ds[t];  for j < t: ds[j] += A[t][j] · λ[t]
// in panels from the last, and with it every gradient follows without a second solve:
//     df_t = λ_t,   δ_t = λ_t·(Σ_j α_tj s_j) = Σ_j α_tj (λ_t·s_j),   dgamma_t = δ_t,
//     dlogit_tj = gamma_t α_tj (λ_t·s_j - δ_t),   dq'_t = σ(D) Σ_j dlogit_tj k'_j,   dk'_j = σ(D) Σ_t dlogit_tj q'_t
// δ does two jobs, because the softmax's backward pass needs the same sum as dgamma.
// df, ds, s (B,T,D), dgamma (B,T); dq', dk' with the layout of q', k'.
static void feedback_backward(real *df, real *dq, real *dk, real *dgamma, real *scratch, const real *ds, const real *s,
                              const real *logsumexp, const real *q, const real *k, int ld, const real *gamma, int B, int T,
                              int D, int P) {
    real scale = 1 / (real)sqrt((double)D);
    P = panel_height(P, T);
    #pragma omp parallel
    for (int b = first_item(B); b < B; b = next_item(b, B)) {
        Team team = team_of(b, B, scratch, T);
        real *A = team.packed + BLOCK_K * BLOCK_N;              // α until gamma is multiplied in
        real *dlogits = A + (size_t)PANEL_MAX * T, *N = dlogits + (size_t)PANEL_MAX * T;
        const real *s_b = s + (size_t)b * T * D, *q_b = q + (size_t)b * T * ld, *k_b = k + (size_t)b * T * ld;
        real *lambda = df + (size_t)b * T * D;
        if (team.thread == 0) memcpy(lambda, ds + (size_t)b * T * D, sizeof(real) * (size_t)T * (size_t)D);
        for (int i0 = (T - 1) / P * P; i0 >= 0; i0 -= P) {
            int n = min_int(P, T - i0), cols = i0 + n;
            size_t row = (size_t)b * T + i0;
            real *lambda_I = lambda + (size_t)i0 * D;
            softmax_panel(team, A, NULL, logsumexp + row, NULL, q_b + (size_t)i0 * ld, ld, k_b, ld, i0, n, D, 1);
            for (int r = team.thread; r < n; r += team.threads)
                for (int j = 0; j < n; j++) N[r * n + j] = gamma[row + r] * A[(size_t)r * cols + i0 + j];
            barrier(team);
            Matrix reversed = {N + n * n - 1, -1, -n};          // rows and columns of N^T, counted from the last
            triangular_solve(team, lambda_I + (size_t)(n - 1) * D, -D, reversed, n, D);
            team_matmul(team, dlogits, cols, rows_of(lambda_I, D), transpose(rows_of(s_b, D)), n, cols, D, 1, 0, NULL);
            softmax_panel_backward(team, dlogits, A, dgamma + row, gamma + row, n, cols);
            if (i0) team_matmul(team, lambda, D, transpose(rows_of(A, cols)), rows_of(lambda_I, D), i0, D, n, 1, 1, NULL);
            team_matmul(team, dq + row * ld, ld, rows_of(dlogits, cols), rows_of(k_b, ld), n, D, cols, scale, 0, NULL);
            team_matmul(team, dk + (size_t)b * T * ld, ld, transpose(rows_of(dlogits, cols)), rows_of(q_b + (size_t)i0 * ld, ld), cols,
                        D, n, scale, cols == T ? 0 : 1, NULL);
        }
    }
}

// [13]  out = s ⊙ g       s, out (N,D), g: D of the ld columns of each row
static void gate_forward(real *out, const real *s, const real *g, int ld, int N, int D) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++)
        for (int i = 0; i < D; i++) out[(size_t)n * D + i] = s[(size_t)n * D + i] * g[(size_t)n * ld + i];
}

// ds = dout ⊙ g,   dg = dout ⊙ s       ds may be dout itself
static void gate_backward(real *ds, real *dg, const real *dout, const real *s, const real *g, int ld, int N, int D) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++)
        for (int i = 0; i < D; i++) {
            real grad = dout[(size_t)n * D + i];
            dg[(size_t)n * ld + i] = grad * s[(size_t)n * D + i];
            ds[(size_t)n * D + i] = grad * g[(size_t)n * ld + i];
        }
}

// [13]  out = x + branch  (n). Its backward pass hands dout to both.
static void residual_forward(real *out, const real *x, const real *branch, int64_t n) {
    #pragma omp parallel for
    for (int64_t i = 0; i < n; i++) out[i] = x[i] + branch[i];
}

// losses[n] = logsumexp_n - logits[n][target_n], in nats, 0 where target_n is -1. logits (N,V), logsumexp (N) is kept.
static void crossentropy_forward(real *losses, real *logsumexp, const real *logits, const int *targets, int N, int V) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const real *row = logits + (size_t)n * V;
        real max = row[0], sum = 0;
        for (int i = 1; i < V; i++) max = row[i] > max ? row[i] : max;
        for (int i = 0; i < V; i++) sum += exp_real(row[i] - max);
        logsumexp[n] = max + (real)log((double)sum);
        losses[n] = targets[n] < 0 ? 0 : logsumexp[n] - row[targets[n]];
    }
}

// dlogits = (softmax(logits) - onehot(target)) · dloss, 0 where the target is -1. dlogits may be logits itself.
static void crossentropy_backward(real *dlogits, const real *logits, const real *logsumexp, const int *targets, real dloss,
                                  int N, int V) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const real *row = logits + (size_t)n * V;
        real *drow = dlogits + (size_t)n * V, scale = targets[n] < 0 ? 0 : dloss;
        for (int i = 0; i < V; i++) drow[i] = scale * exp_real(row[i] - logsumexp[n]);
        if (targets[n] >= 0) drow[targets[n]] -= dloss;
    }
}

// ----------------------------------------------------------------------------
// tables of tensors: names, shapes and places in one allocation

typedef enum { INIT_CONSTANT, INIT_UNIFORM, INIT_NORMAL } Init; // the value; uniform in ± the value; the standard deviation

// One tensor of a block of numbers. An activation may be some columns of a wider one: its stride is then the wider row.
typedef struct {
    char name[64];
    int n_dims;
    int64_t shape[3], count, offset, stride;
    Init init;
    double init_value;
} Tensor;

typedef struct {
    Tensor *rows;
    int n;
    int64_t count; // numbers in the block; -1 when they are too many to be addressed
} Table;

static Tensor *new_row(Table *table, const char *name, int layer) {
    if (table->n % 64 == 0) {
        table->rows = (Tensor *)realloc(table->rows, sizeof(Tensor) * (size_t)(table->n + 64));
        if (!table->rows) exhausted();
    }
    Tensor *row = &table->rows[table->n++];
    memset(row, 0, sizeof(*row));
    if (layer < 0) snprintf(row->name, sizeof(row->name), "%s", name);
    else snprintf(row->name, sizeof(row->name), "layers.%d.%s", layer, name);
    return row;
}

// Adds a tensor (layer -1: of the whole model) and returns its place in the block, or NULL while block is NULL and only
// names and sizes are wanted.
static real *add_tensor(Table *table, real *block, int layer, const char *name, int n_dims, int64_t d0, int64_t d1, int64_t d2) {
    Tensor *row = new_row(table, name, layer);
    int64_t shape[3] = {d0, d1, d2};
    row->n_dims = n_dims;
    row->count = 1;
    row->stride = n_dims ? shape[n_dims - 1] : 1;
    row->offset = table->count;
    memcpy(row->shape, shape, sizeof(shape));
    int overflow = table->count < 0;
    for (int i = 0; i < n_dims; i++) overflow |= __builtin_mul_overflow(row->count, shape[i], &row->count);
    overflow |= __builtin_add_overflow(table->count, row->count, &table->count);
    if (overflow || table->count > PTRDIFF_MAX / 16) table->count = -1;
    return block ? block + row->offset : NULL;
}

static real *add_parameter(Table *table, real *block, int layer, const char *name, int n_dims, int64_t d0, int64_t d1,
                           Init init, double value) {
    real *place = add_tensor(table, block, layer, name, n_dims, d0, d1, 1);
    table->rows[table->n - 1].init = init;
    table->rows[table->n - 1].init_value = value;
    return place;
}

static const Tensor *find_tensor(const Table *table, const char *name) {
    for (int i = 0; i < table->n; i++)
        if (!strcmp(table->rows[i].name, name)) return &table->rows[i];
    return NULL;
}

// Names `width` columns, from `column` on, of a tensor of the same layer.
static void add_view(Table *table, int layer, const char *name, const char *whole, int64_t column, int64_t width) {
    Tensor named = *new_row(table, whole, layer);
    table->n--;
    Tensor view = *find_tensor(table, named.name), *row = new_row(table, name, layer);
    memcpy(view.name, row->name, sizeof(view.name));
    view.offset += column;
    view.shape[view.n_dims - 1] = width;
    *row = view;
}

// ----------------------------------------------------------------------------
// the model

typedef struct {
    int vocab_size, d_model, n_layers, n_heads, n_kv_heads, max_seq_len;
    double gamma_max;
    int mixer; // index into mixers[]
} Config;

// One layer's parameters. The projections stand next to each other, so that one product computes all of them:
// W_qkv holds q_proj (D,D), k_proj (G·d,D), v_proj (G·d,D) and, in a Sessa layer, proj_fb (2D,D): q' rows, then k' rows.
typedef struct {
    real *ln_weight, *ln_bias;  // (D)
    real *W_in, *b_in;          // (2D,D), (2D): a, then g
    real *W_qkv, *b_qkv;        // (E,D), (E)
    real *W_o;                  // (D,D), NULL with one head
    real *gamma_weight, *gamma_bias; // (1,D), ()
    real *W_out, *b_out;        // (D,D), (D)
} LayerWeights;

typedef struct {
    real *wte;                  // (V,D): embedding and head
    LayerWeights *layers;
    real *ln_f_weight, *ln_f_bias; // (D)
} Weights;

// One layer's activations. N = B·T rows. The ones marked * are one buffer for all layers: the backward pass computes them
// again, or never needs them.
typedef struct {
    real *x, *y;                // (N,D) the layer's input and output, the next one's input
    real *ln_mean, *ln_rstd;    // (N)
    real *n;                    // (N,D) * LayerNorm(x)
    real *ag;                   // (N,2D) a before GELU, then g
    real *abar;                 // (N,D) * GELU(a)
    real *proj;                 // (N,E) q, k (after RoPE), v, q', k'
    real *o, *logsumexp;        // (N,D), (B,H,T) the direct read
    real *f;                    // (N,D) * o W_o^T; with one head it is o
    real *gamma, *fb_logsumexp; // (N)
    real *s;                    // (N,D) the mixer's output
    real *gated, *branch;       // (N,D) * s ⊙ g, and what is added to x
} LayerActivations;

typedef struct {
    LayerActivations *layers;
    real *ln_mean, *ln_rstd, *ln_f; // (N), (N), (N,D) of the last layer's output
    real *logits;               // (N,V), which the backward pass turns into their gradient
    real *losses, *loss_logsumexp; // (N)
    real *dx;                   // (N,D) gradient on the residual path; the rest is scratch of the backward pass
    real *dbranch, *ds, *df, *dout, *dabar; // (N,D)
    real *dag, *dproj, *dgamma; // (N,2D), (N,E), (N)
} Activations;

// What generation keeps of every past position of a layer; rows as in proj and s.
typedef struct { real *k, *v, *fb_k, *s; } LayerCache; // (capacity, G·d), the same, (capacity, D), (capacity, D)

typedef struct {
    Config config;
    int B, T;                   // the largest batch
    double bytes;               // of memory that it needs
    Table table, acts_table;    // of the parameters (gradients and moments alike), of the activations
    real *params, *grads, *exp_avg, *exp_avg_sq, *acts_block; // one allocation each; the middle three only for training
    Weights weights, grad;
    Activations acts;
    int *inputs, *targets;      // (B,T), kept for the backward pass
    int batch_B, batch_T;       // of the last forward pass
    Dropout drop;               // of the last forward pass
    int P;                      // panel height of attention and feedback, 0: chosen by shape
    real *cosine, *sine;        // (positions, d/2)
    real *scratch;              // panel_scratch(positions)
    int positions;              // up to which rope table and scratch reach
    LayerCache *cache;          // (L) in generation, else NULL
    int cached, capacity;       // positions in the cache, and for how many there is room
} Model;

// ----------------------------------------------------------------------------
// mixers: what stands between GELU and gate, abar → s

enum { SESSA, ATTENTION, N_MIXERS };

// E, the width of the projections of abar: q, k, v and, in a Sessa layer, q', k'
static int proj_width(const Config *c) {
    int kv_width = c->n_kv_heads * (c->d_model / c->n_heads);
    return c->d_model + 2 * kv_width + (c->mixer == SESSA ? 2 * c->d_model : 0);
}

// The rows of W_qkv and b_qkv lie next to each other, whatever their names; W_o stands for the heads' mixing.
static void attention_weights(Table *t, real *block, const Config *c, int l, LayerWeights *w) {
    int D = c->d_model, kv_width = c->n_kv_heads * (D / c->n_heads), feedback = c->mixer == SESSA;
    double bound = 1 / sqrt((double)D);
    w->W_qkv = add_parameter(t, block, l, "mixer.q_proj.weight", 2, D, D, INIT_UNIFORM, bound);
    add_parameter(t, block, l, "mixer.k_proj.weight", 2, kv_width, D, INIT_UNIFORM, bound);
    add_parameter(t, block, l, "mixer.v_proj.weight", 2, kv_width, D, INIT_UNIFORM, bound);
    if (feedback) add_parameter(t, block, l, "mixer.proj_fb.weight", 2, 2 * D, D, INIT_UNIFORM, bound);
    w->b_qkv = add_parameter(t, block, l, "mixer.q_proj.bias", 1, D, 1, INIT_UNIFORM, bound);
    add_parameter(t, block, l, "mixer.k_proj.bias", 1, kv_width, 1, INIT_UNIFORM, bound);
    add_parameter(t, block, l, "mixer.v_proj.bias", 1, kv_width, 1, INIT_UNIFORM, bound);
    if (feedback) add_parameter(t, block, l, "mixer.proj_fb.bias", 1, 2 * D, 1, INIT_UNIFORM, bound);
    w->W_o = NULL;
    if (c->n_heads > 1) w->W_o = add_parameter(t, block, l, "mixer.out_proj.weight", 2, D, D, INIT_UNIFORM, bound);
}

static void sessa_weights(Table *t, real *block, const Config *c, int l, LayerWeights *w) {
    attention_weights(t, block, c, l, w);
    w->gamma_bias = add_parameter(t, block, l, "mixer.gamma_bias", 0, 1, 1, INIT_CONSTANT, 1);
    w->gamma_weight = add_parameter(t, block, l, "mixer.gamma_ctx.weight", 2, 1, c->d_model, INIT_UNIFORM,
                                    1 / sqrt((double)c->d_model));
}

// Where the keys, values, feedback keys and outputs of all positions lie: in the activations while training, where every
// position is new, else in the cache, which takes over the rows of the new ones.
typedef struct { const real *k, *v, *fb_k; real *s; int ld_kv, ld_fb; } Past;

static Past past_of(Model *model, int l, int N, int first) {
    const Config *c = &model->config;
    int D = c->d_model, kv_width = c->n_kv_heads * (D / c->n_heads), E = proj_width(c);
    LayerActivations *a = &model->acts.layers[l];
    if (!model->cache) {
        Past past = {a->proj + D, a->proj + D + kv_width, a->proj + 2 * D + 2 * kv_width, a->s, E, E};
        return past;
    }
    LayerCache *cache = &model->cache[l];
    for (int n = 0; n < N; n++) {
        const real *row = a->proj + (size_t)n * E;
        memcpy(cache->k + (size_t)(first + n) * kv_width, row + D, sizeof(real) * (size_t)kv_width);
        memcpy(cache->v + (size_t)(first + n) * kv_width, row + D + kv_width, sizeof(real) * (size_t)kv_width);
        if (cache->fb_k) memcpy(cache->fb_k + (size_t)(first + n) * D, row + 2 * D + 2 * kv_width, sizeof(real) * (size_t)D);
    }
    Past past = {cache->k, cache->v, cache->fb_k, cache->s, kv_width, D};
    return past;
}

// [14-16]  abar → f: projections, RoPE, attention, W_o. With the attention mixer this is all, and f is s.
static void attention_mixer_forward(Model *model, int l, int B, int T, int first) {
    const Config *c = &model->config;
    int D = c->d_model, H = c->n_heads, G = c->n_kv_heads, d = D / H, E = proj_width(c), N = B * (T - first);
    LayerWeights *w = &model->weights.layers[l];
    LayerActivations *a = &model->acts.layers[l];
    linear_forward(a->proj, E, a->abar, w->W_qkv, w->b_qkv, N, D, E);
    rope_forward(a->proj, E, model->cosine, model->sine, N, T - first, H + G, d, first, 1);
    Past past = past_of(model, l, N, first);
    attention_forward(a->o, a->logsumexp, model->scratch, a->proj, E, past.k, past.v, past.ld_kv, B, T, H, G, d, first,
                      model->P);
    if (w->W_o) linear_forward(a->f, D, a->o, w->W_o, NULL, N, D, D);
}

// df → dabar, through W_o, attention, RoPE and the projections; q' and k' have left their gradient in dproj before
static void attention_mixer_backward(Model *model, int l, int B, int T) {
    const Config *c = &model->config;
    int D = c->d_model, H = c->n_heads, G = c->n_kv_heads, d = D / H, E = proj_width(c), N = B * T;
    LayerWeights *w = &model->weights.layers[l], *dw = &model->grad.layers[l];
    LayerActivations *a = &model->acts.layers[l];
    Activations *back = &model->acts;
    const real *k = a->proj + D, *v = k + G * d, *dout = back->df;
    if (w->W_o) {
        linear_backward(back->dout, dw->W_o, NULL, back->df, D, a->o, w->W_o, N, D, D);
        dout = back->dout;
    }
    attention_backward(back->dproj, back->dproj + D, back->dproj + D + G * d, model->scratch, dout, a->logsumexp, a->proj, k, v, E,
                       B, T, H, G, d, model->P);
    rope_backward(back->dproj, E, model->cosine, model->sine, N, T, H + G, d);
    linear_backward(back->dabar, dw->W_qkv, dw->b_qkv, back->dproj, E, a->abar, w->W_qkv, N, D, E);
}

// [14-22]  abar → s: the direct read, the gain, the feedback path
static void sessa_forward(Model *model, int l, int B, int T, int first) {
    const Config *c = &model->config;
    int D = c->d_model, E = proj_width(c);
    LayerWeights *w = &model->weights.layers[l];
    LayerActivations *a = &model->acts.layers[l];
    attention_mixer_forward(model, l, B, T, first);
    gain_forward(a->gamma, a->abar, w->gamma_weight, w->gamma_bias, (real)c->gamma_max, B * (T - first), D);
    Past past = past_of(model, l, 0, first);
    feedback_forward(past.s, a->fb_logsumexp, model->scratch, a->f, a->proj + E - 2 * D, E, past.fb_k, past.ld_fb, a->gamma, B,
                     T, D, first, model->P);
    if (model->cache) memcpy(a->s, past.s + (size_t)first * D, sizeof(real) * (size_t)(T - first) * (size_t)D);
}

static void sessa_backward(Model *model, int l, int B, int T) {
    const Config *c = &model->config;
    int D = c->d_model, E = proj_width(c);
    LayerWeights *w = &model->weights.layers[l], *dw = &model->grad.layers[l];
    LayerActivations *a = &model->acts.layers[l];
    Activations *back = &model->acts;
    const real *q = a->proj + E - 2 * D, *k = q + D;
    feedback_backward(back->df, back->dproj + E - 2 * D, back->dproj + E - D, back->dgamma, model->scratch, back->ds, a->s,
                      a->fb_logsumexp, q, k, E, a->gamma, B, T, D, model->P);
    attention_mixer_backward(model, l, B, T);
    gain_backward(back->dabar, dw->gamma_weight, dw->gamma_bias, back->dgamma, a->gamma, a->abar, w->gamma_weight,
                  (real)c->gamma_max, B * T, D);
}

// A mixer is its rows in the parameter table, a forward pass over the new positions first..T-1, which also serves
// generation token by token, and a backward pass over all. Its buffers are those of LayerActivations and LayerCache.
typedef struct {
    const char *name;
    void (*weights)(Table *table, real *block, const Config *config, int layer, LayerWeights *weights);
    void (*forward)(Model *model, int layer, int B, int T, int first);  // acts.layers[layer].abar → .s
    void (*backward)(Model *model, int layer, int B, int T);            // acts.ds → acts.dabar, parameters' gradients +=
} Mixer;

static const Mixer mixers[N_MIXERS] = {
    {"sessa", sessa_weights, sessa_forward, sessa_backward},
    {"attention", attention_weights, attention_mixer_forward, attention_mixer_backward},
};

// ----------------------------------------------------------------------------
// the model's memory: the one list of parameters and the one list of activations

// Adds every parameter's row to the table, under its name in files, and points the weights into the block (if not NULL).
static void carve_weights(Weights *w, Table *t, real *block, const Config *c) {
    int D = c->d_model;
    double bound = 1 / sqrt((double)D);
    t->n = 0;
    t->count = 0;
    w->wte = add_parameter(t, block, -1, "wte.weight", 2, c->vocab_size, D, INIT_NORMAL, 0.02);
    for (int l = 0; l < c->n_layers; l++) {
        LayerWeights *layer = &w->layers[l];
        layer->ln_weight = add_parameter(t, block, l, "ln.weight", 1, D, 1, INIT_CONSTANT, 1);
        layer->ln_bias = add_parameter(t, block, l, "ln.bias", 1, D, 1, INIT_CONSTANT, 0);
        layer->W_in = add_parameter(t, block, l, "W_in.weight", 2, 2 * D, D, INIT_UNIFORM, bound);
        layer->b_in = add_parameter(t, block, l, "W_in.bias", 1, 2 * D, 1, INIT_UNIFORM, bound);
        mixers[c->mixer].weights(t, block, c, l, layer);
        layer->W_out = add_parameter(t, block, l, "W_out.weight", 2, D, D, INIT_UNIFORM, bound);
        layer->b_out = add_parameter(t, block, l, "W_out.bias", 1, D, 1, INIT_UNIFORM, bound);
    }
    w->ln_f_weight = add_parameter(t, block, -1, "ln_f.weight", 1, D, 1, INIT_CONSTANT, 1);
    w->ln_f_bias = add_parameter(t, block, -1, "ln_f.bias", 1, D, 1, INIT_CONSTANT, 0);
}

// The same for the activations of B sequences of T tokens; names are those of reference dumps, less "act.". training: with
// what the backward pass needs. keep_all: no buffer is shared between layers, so that a test can look at each of them.
static void carve_activations(Activations *acts, Table *t, real *block, const Config *c, int B, int T, int training,
                              int keep_all) {
    int D = c->d_model, H = c->n_heads, kv_width = c->n_kv_heads * (D / H), E = proj_width(c), sessa = c->mixer == SESSA;
    t->n = 0;
    t->count = 0;
    real *x = add_tensor(t, block, -1, "encoded", 3, B, T, D);
    for (int l = 0; l < c->n_layers; l++) {
        LayerActivations *a = &acts->layers[l];
        if (l > 0) *a = acts->layers[0]; // every buffer is shared but for those that follow
        a->x = x;
        if (l == 0 || training) {
            a->ln_mean = add_tensor(t, block, l, "ln_mean", 2, B, T, 1);
            a->ln_rstd = add_tensor(t, block, l, "ln_rstd", 2, B, T, 1);
            a->ag = add_tensor(t, block, l, "ag", 3, B, T, 2 * D);
            add_view(t, l, "a", "ag", 0, D);
            add_view(t, l, "g", "ag", D, D);
            a->proj = add_tensor(t, block, l, "proj", 3, B, T, E);
            add_view(t, l, "q", "proj", 0, D);
            add_view(t, l, "k", "proj", D, kv_width);
            add_view(t, l, "v", "proj", D + kv_width, kv_width);
            a->logsumexp = add_tensor(t, block, l, "logsumexp", 3, B, H, T);
            a->o = add_tensor(t, block, l, "o", 3, B, T, D);
            if (sessa) {
                add_view(t, l, "fb_q", "proj", E - 2 * D, D);
                add_view(t, l, "fb_k", "proj", E - D, D);
                a->gamma = add_tensor(t, block, l, "gamma", 2, B, T, 1);
                a->fb_logsumexp = add_tensor(t, block, l, "fb_logsumexp", 2, B, T, 1);
                a->s = add_tensor(t, block, l, "s", 3, B, T, D);
            }
        }
        if (l == 0 || keep_all) {
            a->n = add_tensor(t, block, l, "ln", 3, B, T, D);
            a->abar = add_tensor(t, block, l, "abar", 3, B, T, D);
            a->gated = add_tensor(t, block, l, "gated", 3, B, T, D);
            a->branch = add_tensor(t, block, l, "branch", 3, B, T, D);
        }
        // with one head f is o; without feedback s is f, and then a layer's own
        if (H == 1) a->f = a->o;
        else if (l == 0 || keep_all || (training && !sessa)) a->f = add_tensor(t, block, l, "f", 3, B, T, D);
        if (!sessa) a->s = a->f;
        if (keep_all && H == 1) add_view(t, l, "f", "o", 0, D);
        if (keep_all && !sessa) add_view(t, l, "s", "f", 0, D);
        x = a->y = training ? add_tensor(t, block, l, "residual", 3, B, T, D) : x;
    }
    acts->ln_mean = add_tensor(t, block, -1, "ln_f_mean", 2, B, T, 1);
    acts->ln_rstd = add_tensor(t, block, -1, "ln_f_rstd", 2, B, T, 1);
    acts->ln_f = add_tensor(t, block, -1, "ln_f", 3, B, T, D);
    acts->logits = add_tensor(t, block, -1, "logits", 3, B, T, c->vocab_size);
    acts->losses = add_tensor(t, block, -1, "losses", 2, B, T, 1);
    acts->loss_logsumexp = add_tensor(t, block, -1, "loss_logsumexp", 2, B, T, 1);
    if (!training) return;
    acts->dx = add_tensor(t, block, -1, "dx", 3, B, T, D);
    acts->dbranch = add_tensor(t, block, -1, "dbranch", 3, B, T, D);
    acts->ds = add_tensor(t, block, -1, "ds", 3, B, T, D);
    acts->df = sessa ? add_tensor(t, block, -1, "df", 3, B, T, D) : acts->ds;
    acts->dout = add_tensor(t, block, -1, "dout", 3, B, T, D);
    acts->dabar = add_tensor(t, block, -1, "dabar", 3, B, T, D);
    acts->dag = add_tensor(t, block, -1, "dag", 3, B, T, 2 * D);
    acts->dproj = add_tensor(t, block, -1, "dproj", 3, B, T, E);
    acts->dgamma = add_tensor(t, block, -1, "dgamma", 2, B, T, 1);
}

// The parameters' names and shapes alone.
static void make_table(Table *table, const Config *c) {
    Weights weights;
    weights.layers = (LayerWeights *)calloc((size_t)c->n_layers, sizeof(LayerWeights));
    if (!weights.layers) exhausted();
    carve_weights(&weights, table, NULL, c);
    free(weights.layers);
}

static real *allocate(int64_t count) {
    return count < 0 ? NULL : (real *)calloc((size_t)count + 1, sizeof(real));
}

// Makes rope table and scratch reach up to `positions`. Returns 0, or -1 without memory.
static int reserve_positions(Model *m, int positions) {
    int d = m->config.d_model / m->config.n_heads;
    if (positions <= m->positions) return 0;
    free(m->cosine);
    free(m->sine);
    free(m->scratch);
    m->cosine = allocate((int64_t)positions * (d / 2));
    m->sine = allocate((int64_t)positions * (d / 2));
    m->scratch = allocate((int64_t)panel_scratch(positions));
    m->positions = 0;
    if (!m->cosine || !m->sine || !m->scratch) return -1;
    m->positions = positions;
    rope_table(m->cosine, m->sine, positions, d);
    return 0;
}

static void model_free(Model *m) {
    void *blocks[] = {m->weights.layers, m->grad.layers, m->acts.layers, m->table.rows, m->acts_table.rows, m->params, m->grads,
                      m->exp_avg, m->exp_avg_sq, m->acts_block, m->inputs, m->targets, m->cosine, m->sine, m->scratch};
    for (int l = 0; m->cache && l < m->config.n_layers; l++) {
        free(m->cache[l].k);
        free(m->cache[l].v);
        free(m->cache[l].fb_k);
        free(m->cache[l].s);
    }
    free(m->cache);
    for (size_t i = 0; i < sizeof(blocks) / sizeof(blocks[0]); i++) free(blocks[i]);
    free(m);
}

// A model for batches of up to B sequences of T tokens, its parameters 0. NULL, and a line in error, if it does not fit.
static Model *model_create(const Config *c, int B, int T, int training, int keep_all, char *error) {
    size_t L = (size_t)c->n_layers;
    Model *m = (Model *)calloc(1, sizeof(Model));
    if (!m) { fail(error, "out of memory"); return NULL; }
    m->config = *c;
    m->B = B;
    m->T = T;
    m->weights.layers = (LayerWeights *)calloc(L, sizeof(LayerWeights));
    m->grad.layers = (LayerWeights *)calloc(L, sizeof(LayerWeights));
    m->acts.layers = (LayerActivations *)calloc(L, sizeof(LayerActivations));
    int whole = m->weights.layers && m->grad.layers && m->acts.layers;
    double needed = 0, present = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    if (whole) { // sizes first, then the blocks
        carve_weights(&m->weights, &m->table, NULL, c);
        carve_activations(&m->acts, &m->acts_table, NULL, c, B, T, training, keep_all);
        whole = m->table.count >= 0 && m->acts_table.count >= 0;
        needed = ((double)m->table.count * (training ? 4 : 1) + (double)m->acts_table.count +
                  (double)panel_scratch(T)) * sizeof(real);
        m->bytes = needed;
        whole = whole && needed < present && (m->params = allocate(m->table.count)) &&
                (m->acts_block = allocate(m->acts_table.count)) && (m->inputs = (int *)calloc((size_t)B * (size_t)T, sizeof(int))) &&
                (m->targets = (int *)calloc((size_t)B * (size_t)T, sizeof(int))) && !reserve_positions(m, T);
        if (training) whole = whole && (m->grads = allocate(m->table.count)) && (m->exp_avg = allocate(m->table.count)) &&
                              (m->exp_avg_sq = allocate(m->table.count));
    }
    if (!whole) {
        fail(error, "the model does not fit: it needs %.1f GiB of memory, this machine has %.1f", needed / 0x1p30, present / 0x1p30);
        model_free(m);
        return NULL;
    }
    carve_weights(&m->grad, &m->table, m->grads, c);
    carve_weights(&m->weights, &m->table, m->params, c);
    carve_activations(&m->acts, &m->acts_table, m->acts_block, c, B, T, training, keep_all);
    return m;
}

// ----------------------------------------------------------------------------
// forward, backward, update

// ids → the last layer's output, normalised, for the positions first..T-1 of B sequences. first > 0 only with a cache.
static void hidden_forward(Model *m, const int *inputs, int B, int T, int first, Dropout drop) {
    const Config *c = &m->config;
    int D = c->d_model, N = B * (T - first);
    Activations *acts = &m->acts;
    embedding_forward(acts->layers[0].x, inputs, m->weights.wte, B, T - first, D);
    dropout(acts->layers[0].x, (int64_t)N * D, drop, 0);
    for (int l = 0; l < c->n_layers; l++) {
        LayerWeights *w = &m->weights.layers[l];
        LayerActivations *a = &acts->layers[l];
        layernorm_forward(a->n, a->ln_mean, a->ln_rstd, a->x, w->ln_weight, w->ln_bias, N, D);     // [9]
        linear_forward(a->ag, 2 * D, a->n, w->W_in, w->b_in, N, D, 2 * D);                         // [10]
        gelu_forward(a->abar, a->ag, 2 * D, N, D);                                                 // [11]
        mixers[c->mixer].forward(m, l, B, T, first);                                               // [12]
        gate_forward(a->gated, a->s, a->ag + D, 2 * D, N, D);                                      // [13]
        dropout(a->gated, (int64_t)N * D, drop, 1 + 2 * l);
        linear_forward(a->branch, D, a->gated, w->W_out, w->b_out, N, D, D);
        dropout(a->branch, (int64_t)N * D, drop, 2 + 2 * l);
        residual_forward(a->y, a->x, a->branch, (int64_t)N * D);
    }
    layernorm_forward(acts->ln_f, acts->ln_mean, acts->ln_rstd, acts->layers[c->n_layers - 1].y, m->weights.ln_f_weight,
                      m->weights.ln_f_bias, N, D);
}

// The sum of the losses over the targets that are not -1. Keeps what model_backward needs.
static double model_forward(Model *m, const int *inputs, const int *targets, int B, int T, Dropout drop) {
    int D = m->config.d_model, V = m->config.vocab_size, N = B * T;
    memcpy(m->inputs, inputs, sizeof(int) * (size_t)N);
    memcpy(m->targets, targets, sizeof(int) * (size_t)N);
    m->batch_B = B;
    m->batch_T = T;
    m->drop = drop;
    hidden_forward(m, m->inputs, B, T, 0, drop);
    linear_forward(m->acts.logits, V, m->acts.ln_f, m->weights.wte, NULL, N, D, V);
    crossentropy_forward(m->acts.losses, m->acts.loss_logsumexp, m->acts.logits, m->targets, N, V);
    double sum = 0;
    for (int n = 0; n < N; n++) sum += (double)m->acts.losses[n];
    return sum;
}

// Gradients of dloss · (the sum that the last model_forward returned), added to those that are there.
static void model_backward(Model *m, double dloss) {
    const Config *c = &m->config;
    int D = c->d_model, V = c->vocab_size, B = m->batch_B, T = m->batch_T, N = B * T;
    Activations *acts = &m->acts;
    Weights *w = &m->weights, *dw = &m->grad;
    crossentropy_backward(acts->logits, acts->logits, acts->loss_logsumexp, m->targets, (real)dloss, N, V);
    linear_backward(acts->ds, dw->wte, NULL, acts->logits, V, acts->ln_f, w->wte, N, D, V);
    memset(acts->dx, 0, sizeof(real) * (size_t)N * (size_t)D);
    layernorm_backward(acts->dx, dw->ln_f_weight, dw->ln_f_bias, acts->ds, acts->layers[c->n_layers - 1].y, acts->ln_mean,
                       acts->ln_rstd, w->ln_f_weight, N, D);
    for (int l = c->n_layers - 1; l >= 0; l--) {
        LayerWeights *wl = &w->layers[l], *dwl = &dw->layers[l];
        LayerActivations *a = &acts->layers[l];
        // out through W_out and the gate; s ⊙ g is computed again
        const real *dbranch = acts->dx;
        if (m->drop.probability > 0) {
            memcpy(acts->dbranch, acts->dx, sizeof(real) * (size_t)N * (size_t)D);
            dropout(acts->dbranch, (int64_t)N * D, m->drop, 2 + 2 * l);
            dbranch = acts->dbranch;
        }
        gate_forward(a->gated, a->s, a->ag + D, 2 * D, N, D);
        dropout(a->gated, (int64_t)N * D, m->drop, 1 + 2 * l);
        linear_backward(acts->ds, dwl->W_out, dwl->b_out, dbranch, D, a->gated, wl->W_out, N, D, D);
        dropout(acts->ds, (int64_t)N * D, m->drop, 1 + 2 * l);
        gate_backward(acts->ds, acts->dag + D, acts->ds, a->s, a->ag + D, 2 * D, N, D);
        // through the mixer; ā is computed again
        gelu_forward(a->abar, a->ag, 2 * D, N, D);
        mixers[c->mixer].backward(m, l, B, T);
        gelu_backward(acts->dag, acts->dabar, a->ag, 2 * D, N, D);
        // through W_in and the LayerNorm; its output is computed again
        layernorm_forward(a->n, a->ln_mean, a->ln_rstd, a->x, wl->ln_weight, wl->ln_bias, N, D);
        linear_backward(acts->ds, dwl->W_in, dwl->b_in, acts->dag, 2 * D, a->n, wl->W_in, N, D, 2 * D);
        layernorm_backward(acts->dx, dwl->ln_weight, dwl->ln_bias, acts->ds, a->x, a->ln_mean, a->ln_rstd, wl->ln_weight, N, D);
    }
    dropout(acts->dx, (int64_t)N * D, m->drop, 0);
    embedding_backward(dw->wte, acts->dx, m->inputs, B, T, D);
}

// The global L2 norm of x (n): in double, in blocks that do not depend on the number of threads.
static double norm(const real *x, int64_t n) {
    enum { BLOCKS = 64 };
    double partial[BLOCKS], sum = 0;
    #pragma omp parallel for
    for (int block = 0; block < BLOCKS; block++) {
        double squares = 0;
        for (int64_t i = n / BLOCKS * block; i < (block == BLOCKS - 1 ? n : n / BLOCKS * (block + 1)); i++)
            squares += (double)x[i] * (double)x[i];
        partial[block] = squares;
    }
    for (int block = 0; block < BLOCKS; block++) sum += partial[block];
    return sqrt(sum);
}

typedef struct { double lr, beta1, beta2, eps, weight_decay; } AdamW;

// AdamW, with the gradient g scaled beforehand (clipping) and cleared afterwards, at step = 1, 2, ...:
//     m = β1 m + (1-β1) g,   v = β2 v + (1-β2) g²,   w -= lr·wd·w,   w -= lr · m/(1-β1^step) / (sqrt(v/(1-β2^step)) + eps)
// All (n). Loshchilov and Hutter: Decoupled weight decay regularization, ICLR 2019; the order is torch.optim.AdamW's.
static void adamw(real *w, real *g, real *exp_avg, real *exp_avg_sq, int64_t n, AdamW o, double grad_scale, int64_t step) {
    real beta1 = (real)o.beta1, beta2 = (real)o.beta2, scale = (real)grad_scale, eps = (real)o.eps;
    real rate1 = (real)(1 - o.beta1), rate2 = (real)(1 - o.beta2), keep = (real)(1 - o.lr * o.weight_decay);
    real step_size = (real)(o.lr / (1 - pow(o.beta1, (double)step)));
    real correction = (real)(1 / sqrt(1 - pow(o.beta2, (double)step)));
    #pragma omp parallel for simd if (n > PARALLEL_WORK / 4)
    for (int64_t i = 0; i < n; i++) {
        real grad = scale * g[i];
        real m = exp_avg[i] = beta1 * exp_avg[i] + rate1 * grad;
        real v = exp_avg_sq[i] = beta2 * exp_avg_sq[i] + rate2 * grad * grad;
        w[i] = keep * w[i] - step_size * m / ((real)sqrt(v) * correction + eps);
        g[i] = 0;
    }
}

// Weight decay is for parameters of two or more dimensions.
static void model_update(Model *m, AdamW o, double grad_scale, int64_t step) {
    for (int i = 0; i < m->table.n; i++) {
        const Tensor *t = &m->table.rows[i];
        AdamW options = o;
        if (t->n_dims < 2) options.weight_decay = 0;
        adamw(m->params + t->offset, m->grads + t->offset, m->exp_avg + t->offset, m->exp_avg_sq + t->offset, t->count, options,
              grad_scale, step);
    }
}

// Initial values of a block of parameters, drawn in the table's order.
static void initialise(real *params, const Table *table, uint64_t seed) {
    uint64_t state = splitmix64(seed);
    for (int r = 0; r < table->n; r++) {
        const Tensor *t = &table->rows[r];
        for (int64_t i = 0; i < t->count; i++)
            params[t->offset + i] = (real)(t->init_value * (t->init == INIT_CONSTANT ? 1 :
                                    t->init == INIT_UNIFORM ? 2 * random_uniform(&state) - 1 : random_normal(&state)));
    }
}

// ----------------------------------------------------------------------------
// generation: the same forward pass, with a cache of the past in place of the past's activations

// Makes the cache hold at least `positions`, keeping what it holds. Returns 0, or -1 without memory.
static int reserve_cache(Model *m, int positions) {
    const Config *c = &m->config;
    size_t D = (size_t)c->d_model, kv_width = (size_t)c->n_kv_heads * (D / (size_t)c->n_heads);
    if (!m->cache && !(m->cache = (LayerCache *)calloc((size_t)c->n_layers, sizeof(LayerCache)))) return -1;
    if (positions <= m->capacity) return 0;
    if (m->capacity < INT_MAX / 4 && positions < 2 * m->capacity) positions = 2 * m->capacity;
    for (int l = 0; l < c->n_layers; l++) {
        LayerCache *cache = &m->cache[l];
        real **rows[] = {&cache->k, &cache->v, &cache->fb_k, &cache->s};
        for (int i = 0; i < (c->mixer == SESSA ? 4 : 2); i++) {
            real *grown = (real *)realloc(*rows[i], sizeof(real) * (size_t)positions * (i < 2 ? kv_width : D));
            if (!grown) return -1;
            *rows[i] = grown;
        }
    }
    m->capacity = positions;
    return reserve_positions(m, positions);
}

// Appends n tokens to the cached sequence: logits (V) of the last. The model has B = 1; tokens are taken T at a time, so
// that a long prompt needs no more memory than its cache. O(cached·D) a token and layer. Returns 0, or -1 without memory.
static int model_extend(Model *m, const int *tokens, int n, real *logits) {
    Dropout off = {0, 0, 0};
    int D = m->config.d_model, last = 0;
    if (n > INT_MAX - m->cached || reserve_cache(m, m->cached + n)) return -1;
    for (int done = 0; done < n; done += last) {
        last = min_int(m->T, n - done);
        hidden_forward(m, tokens + done, 1, m->cached + last, m->cached, off);
        m->cached += last;
    }
    linear_forward(logits, m->config.vocab_size, m->acts.ln_f + (size_t)(last - 1) * D, m->weights.wte, NULL, 1, D, m->config.vocab_size);
    return 0;
}

static void model_reset(Model *m) { m->cached = 0; }

// ----------------------------------------------------------------------------
// the backend: all that the training loop and the command line know of the layers. The CUDA twin brings its own, with a
// Model of its own behind the pointer.

typedef enum { PARAMS, GRADS, EXP_AVG, EXP_AVG_SQ } Block;

typedef struct {
    const char *name;
    Model *(*create)(const Config *config, int B, int T, int training, int keep_all, char *error);
    void (*destroy)(Model *model);
    double (*bytes)(const Model *model);
    real *(*read)(Model *model, Block block);  // the block's numbers in the host's memory, in the parameter table's order
    void (*write)(Model *model, Block block);  // makes the numbers that stand there the model's
    double (*forward)(Model *model, const int *inputs, const int *targets, int B, int T, Dropout drop);
    void (*backward)(Model *model, double dloss);
    double (*grad_norm)(Model *model);
    void (*update)(Model *model, AdamW options, double grad_scale, int64_t step);
    void (*reset)(Model *model);               // empties the cache
    int (*extend)(Model *model, const int *tokens, int n, real *logits);
} Backend;

static double cpu_bytes(const Model *m) { return m->bytes; }
static real *cpu_read(Model *m, Block block) {
    return block == PARAMS ? m->params : block == GRADS ? m->grads : block == EXP_AVG ? m->exp_avg : m->exp_avg_sq;
}
static void cpu_write(Model *m, Block block) { (void)m; (void)block; } // the host's memory is the model's own
static double cpu_grad_norm(Model *m) { return norm(m->grads, m->table.count); }

static const Backend cpu_backend = {"CPU", model_create, model_free, cpu_bytes, cpu_read, cpu_write, model_forward, model_backward,
                                    cpu_grad_norm, model_update, model_reset, model_extend};

// ----------------------------------------------------------------------------
// safetensors: checkpoints, reference dumps and example sets are files of this one format
//
//     8 bytes             length of the header
//     header              JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...},
//                         and under "__metadata__" an object of strings; spaces may follow
//     data                the tensors' bytes, row-major; offsets count from here; no gaps
//
// Numbers are little-endian, as is every machine that this is built for. A file comes from anywhere, so nothing in it
// is trusted: what the reader returns has been checked, and any other file is refused with one line that says why.

enum { MAX_DIMS = 8, MAX_HEADER = 100000000 };

// One tensor of a file: count is in elements, size in bytes. The data need not be aligned: read it with memcpy.
typedef struct {
    char *name, dtype[8];
    int n_dims;
    int64_t shape[8], count;
    size_t size;
    const unsigned char *data;
} FileTensor;

typedef struct { char *key, *value; } Meta;

// A file in memory. Names, metadata and data point into bytes; tensors are sorted by name, metadata by key.
typedef struct {
    unsigned char *bytes;
    size_t size;
    FileTensor *tensors;
    int n_tensors;
    Meta *meta;
    int n_meta;
} Safetensors;

// Bytes an element of this dtype takes, 0 if the format has no such dtype.
static int dtype_size(const char *dtype) {
    static const char *names[] = {"BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16",
                                  "I32", "U32", "F32", "I64", "U64", "F64", "C64"};
    static const int sizes[] = {1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 8, 8, 8, 8};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
        if (!strcmp(dtype, names[i])) return sizes[i];
    return 0;
}

// Elements and bytes of a tensor from its dtype and shape (no dimensions: one element). -1 if they overflow 63 bits, or
// if there is no such dtype or shape.
static int tensor_size(const char *dtype, int n_dims, const int64_t *shape, int64_t *count, int64_t *size) {
    int64_t element = dtype_size(dtype);
    if (!element || n_dims < 0 || n_dims > MAX_DIMS) return -1;
    *count = 1;
    for (int i = 0; i < n_dims; i++) {
        if (shape[i] < 0 || (shape[i] && *count > INT64_MAX / shape[i])) return -1;
        *count *= shape[i];
    }
    if (*count > INT64_MAX / element) return -1;
    *size = *count * element;
    return 0;
}

// 1 if the text is valid UTF-8 without overlong forms and surrogates, else 0.
static int utf8_valid(const unsigned char *text, size_t length) {
    for (size_t i = 0; i < length;) {
        const unsigned char *s = text + i;
        int n = s[0] < 0x80 ? 1 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : 4;
        if ((n > 1 && s[0] < 0xC2) || s[0] > 0xF4 || (size_t)n > length - i) return 0;
        for (int j = 1; j < n; j++)
            if ((s[j] & 0xC0) != 0x80) return 0;
        if ((s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xF0 && s[1] < 0x90)) return 0;     // overlong
        if ((s[0] == 0xED && s[1] > 0x9F) || (s[0] == 0xF4 && s[1] > 0x8F)) return 0;     // surrogate, above U+10FFFF
        i += (size_t)n;
    }
    return 1;
}

// Reads a whole regular file into fresh memory, with a zero byte past its end. -1 and the line if there is no such
// file, if it is something else (a folder, a pipe), if it does not fit in memory or if its size changes meanwhile.
static int file_read(const char *path, unsigned char **bytes, size_t *size, char *error) {
    struct stat info;
    if (stat(path, &info)) return file_fail(error, path, "%s", strerror(errno));
    if (!S_ISREG(info.st_mode))
        return file_fail(error, path, S_ISDIR(info.st_mode) ? "a folder, not a file" : "not a regular file");
    FILE *in = fopen(path, "rb");
    if (!in) return file_fail(error, path, "%s", strerror(errno));
    size_t total = (size_t)info.st_size, got = 0;
    *bytes = (uint64_t)info.st_size < SIZE_MAX ? (unsigned char *)malloc(total + 1) : NULL;
    if (*bytes) got = fread(*bytes, 1, total + 1, in);                 // one byte more than there should be
    int broken = ferror(in);
    fclose(in);
    if (!*bytes) return file_fail(error, path, "its %lld bytes do not fit in memory", (long long)info.st_size);
    if (broken || got != total) {
        free(*bytes);
        return file_fail(error, path, broken ? "it cannot be read to its end" : "its size changed while it was read");
    }
    (*bytes)[total] = 0;
    *size = total;
    return 0;
}

// The header while it is read: its start, its end and the place reached.
typedef struct {
    const char *path;
    char *error;
    unsigned char *start, *at, *end;
} Header;

// Refuses the header at the place reached; returns -1.
static int json_fail(const Header *h, const char *what) {
    return file_fail(h->error, h->path, "header, byte %lld: %s", (long long)(h->at - h->start), what);
}

// Skips white space and returns the byte that follows without taking it, -1 at the end.
static int json_peek(Header *h) {
    while (h->at < h->end && (*h->at == ' ' || *h->at == '\t' || *h->at == '\n' || *h->at == '\r')) h->at++;
    return h->at < h->end ? *h->at : -1;
}

// Takes the byte c, after white space; -1 and the line if another stands there.
static int json_expect(Header *h, char c) {
    if (json_peek(h) != c)
        return file_fail(h->error, h->path, "header, byte %lld: expected '%c'", (long long)(h->at - h->start), c);
    h->at++;
    return 0;
}

// Inside an object or array that ends with `close`, having read n of its items: 1 if another follows (and its comma is
// taken), 0 if the end was taken, -1 and the line if neither is there.
static int json_more(Header *h, char close, int n) {
    if (json_peek(h) != close) return n > 0 && json_expect(h, ',') ? -1 : 1;
    h->at++;
    return 0;
}

// Reads what follows the \u of an escape; -1 if it is not four hexadecimal digits.
static int json_hex(Header *h) {
    int code = 0;
    for (int i = 0; i < 4; i++) {
        int c = h->at < h->end ? *h->at++ : 0;
        if (!isxdigit(c)) return -1;
        code = code * 16 + (c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
    }
    return code;
}

// Reads what follows a backslash, of a surrogate pair both halves; returns the character, -1 if it is no valid escape.
static int json_escape(Header *h) {
    static const char letters[] = "\"\\/bfnrt", meaning[] = "\"\\/\b\f\n\r\t";
    int c = h->at < h->end ? *h->at++ : 0;
    const char *letter = c ? strchr(letters, c) : NULL;
    if (letter) return meaning[letter - letters];
    int code = c == 'u' ? json_hex(h) : -1;
    if (code < 0xD800 || code > 0xDFFF) return code;
    if (code > 0xDBFF || h->end - h->at < 2 || h->at[0] != '\\' || h->at[1] != 'u') return -1;
    h->at += 2;
    int low = json_hex(h);
    return low < 0xDC00 || low > 0xDFFF ? -1 : 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
}

// Reads a string and decodes it where it stands: UTF-8 is never longer than the escape, and the closing quote leaves
// room for the zero byte. U+0000 becomes C0 80, which is no valid UTF-8, so that the text equals no other.
// NULL and the line on a control character, an invalid escape or a missing end.
static char *json_string(Header *h) {
    static const int lead[] = {0, 0xC0, 0xE0, 0xF0};
    if (json_expect(h, '"')) return NULL;
    unsigned char *text = h->at, *out = text;
    while (h->at < h->end) {
        int c = *h->at++;
        if (c == '"') {
            *out = 0;
            return (char *)text;
        }
        int code = c == '\\' ? json_escape(h) : c;
        if (c < 0x20 || code < 0) {
            json_fail(h, c < 0x20 ? "a control character in a string" : "an invalid escape in a string");
            return NULL;
        }
        int tail = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;          // UTF-8 bytes after the first
        if (c != '\\' || (code && code < 0x80)) tail = 0;
        *out++ = (unsigned char)(lead[tail] | (code >> (6 * tail)));
        while (tail-- > 0) *out++ = (unsigned char)(0x80 | ((code >> (6 * tail)) & 0x3F));
    }
    json_fail(h, "a string without an end");
    return NULL;
}

// Reads a key and its colon. NULL and the line if they are not there, or if the key holds a zero byte.
static char *json_key(Header *h) {
    char *key = json_string(h);
    if (!key || !strstr(key, "\xC0\x80")) return key && !json_expect(h, ':') ? key : NULL;
    json_fail(h, "a zero byte in a name");
    return NULL;
}

// Reads an array of up to `room` integers in 0..2^63-1; returns their number, -1 and the line if it is none.
static int json_integers(Header *h, int64_t *list, int room) {
    int n = 0, more;
    if (json_expect(h, '[')) return -1;
    for (; (more = json_more(h, ']', n)) != 0; n++) {
        int first = json_peek(h);
        if (more < 0) return -1;
        if (n == room) return json_fail(h, room == 2 ? "more than two offsets" : "more than 8 dimensions");
        if (first < '0' || first > '9') return json_fail(h, "expected a whole number, 0 or more");
        const unsigned char *start = h->at;
        for (list[n] = 0; h->at < h->end && isdigit(*h->at); h->at++) {
            int digit = *h->at - '0';
            if (list[n] > (INT64_MAX - digit) / 10) return json_fail(h, "a number above 2^63-1");
            list[n] = list[n] * 10 + digit;
        }
        if (first == '0' && h->at - start > 1) return json_fail(h, "a number with a leading zero");
    }
    return n;
}

// Reads the value of one tensor's entry: its three fields, in any order, each once. The data must lie inside the
// data_size bytes at data and be as long as dtype and shape say. -1 and the line otherwise.
static int read_tensor(Header *h, FileTensor *tensor, const unsigned char *data, int64_t data_size) {
    static const char *fields[] = {"dtype", "shape", "data_offsets"};
    int64_t offsets[2] = {0, 0}, size;
    int seen = 0, more;
    if (json_expect(h, '{')) return -1;
    for (int n = 0; (more = json_more(h, '}', n)) != 0; n++) {
        const char *key = more < 0 ? NULL : json_key(h), *dtype;
        int field = 0, length = 0;
        if (!key) return -1;
        while (field < 3 && strcmp(key, fields[field])) field++;
        if (field == 3) return json_fail(h, "a tensor has a field other than dtype, shape and data_offsets");
        if (seen & (1 << field)) return json_fail(h, "a tensor has the same field twice");
        seen |= 1 << field;
        if (field == 0) {
            if (!(dtype = json_string(h))) return -1;
            if (!dtype_size(dtype)) return json_fail(h, "an unknown dtype");
            snprintf(tensor->dtype, sizeof(tensor->dtype), "%s", dtype);
        } else {
            length = json_integers(h, field == 1 ? tensor->shape : offsets, field == 1 ? MAX_DIMS : 2);
            if (field == 1) tensor->n_dims = length;
            else if (length >= 0 && length < 2) return json_fail(h, "fewer than two offsets");
        }
        if (length < 0) return -1;
    }
    if (seen != 7) return json_fail(h, "a tensor lacks dtype, shape or data_offsets");
    if (tensor_size(tensor->dtype, tensor->n_dims, tensor->shape, &tensor->count, &size))
        return file_fail(h->error, h->path, "tensor '%.80s': its size overflows", tensor->name);
    if (offsets[0] > offsets[1] || offsets[1] > data_size)
        return file_fail(h->error, h->path, "tensor '%.80s': offsets %lld to %lld of %lld bytes: out of range, or the file "
                         "ends early", tensor->name, (long long)offsets[0], (long long)offsets[1], (long long)data_size);
    if (offsets[1] - offsets[0] != size)
        return file_fail(h->error, h->path, "tensor '%.80s': dtype and shape need %lld bytes, its offsets span %lld",
                         tensor->name, (long long)size, (long long)(offsets[1] - offsets[0]));
    tensor->data = data + offsets[0];
    tensor->size = (size_t)size;
    return 0;
}

// An array of n items with room for one more: it doubles whenever n is a power of two. NULL and the line when memory is
// exhausted; the old array is still there.
static void *grown(const Header *h, void *array, int n, size_t item) {
    if (n & (n - 1)) return array;
    size_t room = n ? (size_t)n * 2 : 1;
    void *larger = room <= SIZE_MAX / item ? realloc(array, room * item) : NULL;
    if (!larger) json_fail(h, "memory is exhausted");
    return larger;
}

// Reads the value of "__metadata__": an object of strings. -1 and the line if it is none.
static int read_metadata(Header *h, Safetensors *file) {
    int more;
    if (json_expect(h, '{')) return -1;
    for (int n = 0; (more = json_more(h, '}', n)) != 0; n++) {
        Meta *meta = more < 0 ? NULL : (Meta *)grown(h, file->meta, n, sizeof(Meta));
        if (!meta) return -1;
        file->meta = meta;
        file->n_meta = n + 1;
        meta[n].key = json_key(h);
        meta[n].value = meta[n].key ? json_string(h) : NULL;
        if (!meta[n].value) return -1;
    }
    return 0;
}

static int compare_places(const void *a, const void *b) {
    const FileTensor *s = (const FileTensor *)a, *t = (const FileTensor *)b;
    if (s->data != t->data) return s->data < t->data ? -1 : 1;
    return (s->size > t->size) - (s->size < t->size);                  // the empty ones first
}

// Of two FileTensor or two Meta: the name or key is the first member of both.
static int compare_names(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

// Sorts n FileTensor or Meta by name; returns a name that stands there twice, NULL if there is none.
static const char *sort_names(void *array, int n, size_t item) {
    char *items = (char *)array;
    if (n > 1) qsort(items, (size_t)n, item, compare_names);
    for (int i = 1; i < n; i++, items += item)
        if (!compare_names(items, items + item)) return *(char **)(void *)items;
    return NULL;
}

// Checks that the tensors cover the data exactly, each byte once, and that no name or key stands there twice; leaves
// tensors and metadata sorted for the search. -1 and the line otherwise.
static int check_layout(Safetensors *file, const unsigned char *data, const char *path, char *error) {
    FileTensor *tensors = file->tensors;
    const unsigned char *reached = data, *end = file->bytes + file->size;
    if (tensors) qsort(tensors, (size_t)file->n_tensors, sizeof(FileTensor), compare_places);
    for (int i = 0; i < file->n_tensors; reached += tensors[i++].size)
        if (tensors[i].data != reached)
            return file_fail(error, path, "tensor '%.80s' %s", tensors[i].name,
                             tensors[i].data < reached ? "overlaps another" : "has bytes before it that no tensor claims");
    if (reached != end)
        return file_fail(error, path, "no tensor claims the last %lld bytes", (long long)(end - reached));
    const char *twice = sort_names(tensors, file->n_tensors, sizeof(FileTensor));
    if (!twice) twice = sort_names(file->meta, file->n_meta, sizeof(Meta));
    return twice ? file_fail(error, path, "the name '%.80s' stands there twice", twice) : 0;
}

// Reads the header of the file whose bytes are in place. -1 and the line if it is no valid one.
static int read_header(Safetensors *file, const char *path, char *error) {
    uint64_t length;
    int more, metadata_seen = 0;
    if (file->size < 8) return file_fail(error, path, "%d bytes are no safetensors file", (int)file->size);
    memcpy(&length, file->bytes, 8);
    if (length > MAX_HEADER)
        return file_fail(error, path, "a header of %llu bytes (over 100 MB): no safetensors file", (unsigned long long)length);
    if (length > file->size - 8) return file_fail(error, path, "the file ends early, inside its header");
    unsigned char *start = file->bytes + 8, *data = start + length;
    Header header = {path, error, start, start, data}, *h = &header;
    if (!length || *start != '{') return json_fail(h, "it does not start with '{': no safetensors file");
    if (!utf8_valid(start, (size_t)length)) return json_fail(h, "not valid UTF-8");
    h->at++;
    for (int n = 0; (more = json_more(h, '}', n)) != 0; n++) {
        char *name = more < 0 ? NULL : json_key(h);
        if (!name) return -1;
        if (!strcmp(name, "__metadata__")) {
            if (metadata_seen++) return json_fail(h, "__metadata__ stands there twice");
            if (read_metadata(h, file)) return -1;
            continue;
        }
        FileTensor *tensors = (FileTensor *)grown(h, file->tensors, file->n_tensors, sizeof(FileTensor));
        if (!tensors) return -1;
        file->tensors = tensors;
        tensors += file->n_tensors++;
        memset(tensors, 0, sizeof(*tensors));
        tensors->name = name;
        if (read_tensor(h, tensors, data, file->bytes + file->size - data)) return -1;
    }
    while (h->at < data && *h->at == ' ') h->at++;
    if (h->at < data) return json_fail(h, "something other than spaces follows the last brace");
    return check_layout(file, data, path, error);
}

// Frees what a Safetensors holds; fine on one that is all zero.
static void safetensors_free(Safetensors *file) {
    free(file->bytes);
    free(file->tensors);
    free(file->meta);
    memset(file, 0, sizeof(*file));
}

// Makes a Safetensors of the bytes of a file; they must come from malloc and belong to it from now on. The path is for
// messages only. 0, or -1 with the line in error and nothing to free.
static int safetensors_parse(Safetensors *file, unsigned char *bytes, size_t size, const char *path, char *error) {
    memset(file, 0, sizeof(*file));
    file->bytes = bytes;
    file->size = size;
    if (!read_header(file, path, error)) return 0;
    safetensors_free(file);
    return -1;
}

// Reads a safetensors file. 0, or -1 with the line in error and nothing to free.
static int safetensors_read(Safetensors *file, const char *path, char *error) {
    unsigned char *bytes;
    size_t size;
    memset(file, 0, sizeof(*file));
    if (file_read(path, &bytes, &size, error)) return -1;
    return safetensors_parse(file, bytes, size, path, error);
}

// The tensor of this name, NULL if there is none.
static const FileTensor *safetensors_find(const Safetensors *file, const char *name) {
    if (!file->n_tensors) return NULL;
    size_t n = (size_t)file->n_tensors;
    return (const FileTensor *)bsearch(&name, file->tensors, n, sizeof(FileTensor), compare_names);
}

// The metadata's value for this key, NULL if there is none.
static const char *safetensors_meta(const Safetensors *file, const char *key) {
    if (!file->n_meta) return NULL;
    const Meta *meta = (const Meta *)bsearch(&key, file->meta, (size_t)file->n_meta, sizeof(Meta), compare_names);
    return meta ? meta->value : NULL;
}

// Writes text as a JSON string; returns -1 if it is not valid UTF-8.
static int json_write(FILE *out, const char *text) {
    if (!utf8_valid((const unsigned char *)text, strlen(text))) return -1;
    fputc('"', out);
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\') fprintf(out, "\\%c", c);
        else if (c < 0x20) fprintf(out, "\\u%04x", c);
        else fputc(c, out);
    }
    fputc('"', out);
    return 0;
}

// Writes the header of a file, its tensors laid out in the order given, and pads it with spaces to a multiple of 8.
// -1 and the line if a name or value is no UTF-8, or if a tensor's size is not that of its dtype and shape.
static int write_header(FILE *out, const char *path, const FileTensor *tensors, int n_tensors, const Meta *meta,
                        int n_meta, char *error) {
    int64_t offset = 0, count, size;
    fputc('{', out);
    for (int i = 0; i < n_meta; i++) {
        fputs(i ? "," : "\"__metadata__\":{", out);
        if (json_write(out, meta[i].key) || fputc(':', out) == EOF || json_write(out, meta[i].value))
            return file_fail(error, path, "'%.80s', '%.80s' cannot be stored: not UTF-8", meta[i].key, meta[i].value);
    }
    if (n_meta) fputc('}', out);
    for (int i = 0; i < n_tensors; i++) {
        const FileTensor *t = &tensors[i];
        if (i || n_meta) fputc(',', out);
        if (json_write(out, t->name) || tensor_size(t->dtype, t->n_dims, t->shape, &count, &size) ||
            (uint64_t)size != t->size || size > INT64_MAX - offset)
            return file_fail(error, path, "tensor '%.80s' cannot be stored: its size or name is wrong", t->name);
        fprintf(out, ":{\"dtype\":\"%s\",\"shape\":[", t->dtype);
        for (int j = 0; j < t->n_dims; j++) fprintf(out, "%s%lld", j ? "," : "", (long long)t->shape[j]);
        fprintf(out, "],\"data_offsets\":[%lld,%lld]}", (long long)offset, (long long)(offset + size));
        offset += size;
    }
    fputc('}', out);
    while (ftell(out) % 8) fputc(' ', out);
    return 0;
}

// Puts header and data into the file `temporary`, flushes it to the disk and only then gives it the name `target`: that
// is at any moment the old file or the new one, whole. 0, or the errno of what failed; the temporary file is then gone.
static int replace_file(char *temporary, const char *target, const char *header, uint64_t length,
                        const FileTensor *tensors, int n_tensors) {
    unlink(temporary);                                                 // left by a crash of a process with our number
    int fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL, 0666);
    if (fd < 0) return errno;
    FILE *out = fdopen(fd, "wb");
    int ok = out && fwrite(&length, 8, 1, out) == 1 && fwrite(header, 1, (size_t)length, out) == length;
    for (int i = 0; ok && i < n_tensors; i++)
        ok = !tensors[i].size || fwrite(tensors[i].data, 1, tensors[i].size, out) == tensors[i].size;
    ok = ok && !fflush(out) && !fsync(fd);
    int problem = ok ? 0 : errno ? errno : EIO;
    if ((out ? fclose(out) : close(fd)) && !problem) problem = errno;
    if (!problem && rename(temporary, target)) problem = errno;
    if (problem) {
        unlink(temporary);
        return problem;
    }
    char *slash = strrchr(temporary, '/');                             // the folder, too, so that the new name lasts
    if (slash) slash[1] = 0;
    fd = open(slash ? temporary : ".", O_RDONLY);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
    return 0;
}

// Writes a safetensors file with the tensors in the order given, atomically: a failure leaves an old file of that name
// as it was. A link is followed, so that it survives. 0, or -1 with the line in error.
static int safetensors_write(const char *path, const FileTensor *tensors, int n_tensors, const Meta *meta, int n_meta,
                             char *error) {
    struct stat info;
    char *header = NULL;
    size_t length = 0;
    if (!stat(path, &info) && !S_ISREG(info.st_mode))
        return file_fail(error, path, "cannot be written: not a regular file");
    FILE *out = open_memstream(&header, &length);
    if (!out) return file_fail(error, path, "cannot be written: %s", strerror(errno));
    int result = write_header(out, path, tensors, n_tensors, meta, n_meta, error), exhausted = ferror(out);
    exhausted |= fclose(out);
    if (!result && (exhausted || length > MAX_HEADER))
        result = file_fail(error, path, "cannot be written: its header does not fit in %s", exhausted ? "memory" : "100 MB");
    if (!result) {
        char *target = realpath(path, NULL);                           // NULL: there is no such file yet
        const char *name = target ? target : path;
        size_t room = strlen(name) + 32;
        char *temporary = (char *)malloc(room);
        if (temporary) snprintf(temporary, room, "%s.tmp.%ld", name, (long)getpid());
        int problem = temporary ? replace_file(temporary, name, header, length, tensors, n_tensors) : ENOMEM;
        if (problem) result = file_fail(error, path, "cannot be written: %s", strerror(problem));
        free(temporary);
        free(target);
    }
    free(header);
    return result;
}

// Tells before a long run whether path can be written, leaving no trace. 0, or -1 with the line in error.
static int safetensors_writable(const char *path, char *error) {
    struct stat info;
    char *temporary = (char *)malloc(strlen(path) + 32);
    if (!temporary) return file_fail(error, path, "memory is exhausted");
    snprintf(temporary, strlen(path) + 32, "%s.tmp.%ld", path, (long)getpid());
    int fd = -1, result = 0;
    if (!stat(path, &info) && !S_ISREG(info.st_mode)) result = file_fail(error, path, "cannot be written: not a regular file");
    else if ((fd = open(temporary, O_WRONLY | O_CREAT | O_CLOEXEC, 0666)) < 0) result = file_fail(error, path, "cannot be written: %s", strerror(errno));
    if (fd >= 0) {
        close(fd);
        unlink(temporary);
    }
    free(temporary);
    return result;
}

// ----------------------------------------------------------------------------
// data: text, token shards, example sets

// Text is any file of bytes, a token is a byte. A shard is llm.c's: 256 int32 (magic, version 1, number of tokens, the
// rest unused), then uint16 tokens. An example set is a safetensors file with `inputs` and `targets` (N,T).
typedef enum { DATA_TEXT, DATA_SHARD, DATA_EXAMPLES } DataKind;

typedef struct {
    DataKind kind;
    int64_t size;              // bytes of the file
    uint64_t hash;             // of the bytes of the file: see hash_bytes
    unsigned char *bytes;      // TEXT: its bytes
    uint16_t *tokens;          // SHARD, and TEXT after dataset_encode: token ids
    int64_t count;             // tokens (TEXT, SHARD) or examples (EXAMPLES)
    int width;                 // EXAMPLES: T of the file
    int32_t *inputs, *targets; // EXAMPLES: (count, width); a target of -1 is none
    int vocab_hint;            // EXAMPLES: the metadata's vocab_size, or 0
    int max_id;                // SHARD, EXAMPLES: the largest id, -1 if there is none
} Dataset;

// A 64-bit hash: FNV-1a's step (xor, then multiply by its prime), taken on 8 bytes at a time for speed and followed by a
// fold of the upper half into the lower, which the hash by bytes does not need. The last bytes are padded with zeros, so
// the size goes in first. It tells files apart that differ by accident, not by design.
static uint64_t hash_bytes(const unsigned char *bytes, size_t size) {
    const uint64_t prime = 0x100000001b3;
    uint64_t hash = (0xcbf29ce484222325 ^ size) * prime;
    for (size_t i = 0; i < size; i += 8) {
        uint64_t word = 0;
        memcpy(&word, bytes + i, size - i < 8 ? size - i : 8);
        hash = (hash ^ word) * prime;
        hash ^= hash >> 32;
    }
    return hash;
}

// Frees what a Dataset holds; fine on one that is all zero.
static void dataset_free(Dataset *data) {
    free(data->bytes);
    free(data->tokens);
    free(data->inputs);
    free(data->targets);
    memset(data, 0, sizeof(*data));
}

// Fills data from the bytes of a token shard. -1 and the line if version or length are wrong.
static int shard_read(Dataset *data, const unsigned char *bytes, size_t size, const char *path, char *error) {
    int32_t header[3];
    memcpy(header, bytes, sizeof(header));
    if (header[1] != 1) return file_fail(error, path, "a token shard of version %d; only 1 is known", header[1]);
    if (header[2] < 1 || (uint64_t)header[2] * 2 != size - 1024)
        return file_fail(error, path, "a token shard whose header says %d tokens; the file holds %lld bytes of them",
                         header[2], (long long)(size - 1024));
    data->kind = DATA_SHARD;
    data->count = header[2];
    data->tokens = (uint16_t *)malloc(size - 1024);
    if (!data->tokens) return file_fail(error, path, "its tokens do not fit in memory");
    memcpy(data->tokens, bytes + 1024, size - 1024);
    for (int64_t i = 0; i < data->count; i++)
        if (data->tokens[i] > data->max_id) data->max_id = data->tokens[i];
    return 0;
}

// Converts an integer tensor to int32 and raises max_id to its largest number. Every number must be `low` or more and
// leave room for a vocabulary size above it. NULL and the line if one is not, or if the dtype is no integer's.
static int32_t *ids_read(const FileTensor *tensor, int low, int *max_id, const char *path, char *error) {
    static const char *known[] = {"I8", "I16", "I32", "I64", "U8", "U16", "U32"};
    int kind = 0, element = dtype_size(tensor->dtype), shift = 64 - 8 * element;
    while (kind < 7 && strcmp(tensor->dtype, known[kind])) kind++;
    if (kind == 7) {
        file_fail(error, path, "'%s' is %s; ids are I8, I16, I32, I64, U8, U16 or U32", tensor->name, tensor->dtype);
        return NULL;
    }
    int32_t *ids = (uint64_t)tensor->count <= SIZE_MAX / 4 ? (int32_t *)malloc((size_t)tensor->count * 4) : NULL;
    if (!ids) file_fail(error, path, "'%s' does not fit in memory", tensor->name);
    for (int64_t i = 0; ids && i < tensor->count; i++) {
        uint64_t word = 0;                                             // little-endian: the element's bytes come lowest
        memcpy(&word, tensor->data + i * element, (size_t)element);
        int64_t id = kind < 4 ? (int64_t)(word << shift) >> shift : (int64_t)word;      // signed kinds: extend the sign
        if (id < low || id > INT32_MAX - 1) {
            file_fail(error, path, "'%s' holds %lld at [%lld,%lld]; ids are %d or more and below 2^31-1", tensor->name,
                      (long long)id, (long long)(i / tensor->shape[1]), (long long)(i % tensor->shape[1]), low);
            free(ids);
            return NULL;
        }
        if (id > *max_id) *max_id = (int)id;
        ids[i] = (int32_t)id;
    }
    return ids;
}

// Fills data from a safetensors file of examples. -1 and the line if it is none.
static int examples_read(Dataset *data, const Safetensors *file, const char *path, char *error) {
    const FileTensor *inputs = safetensors_find(file, "inputs"), *targets = safetensors_find(file, "targets");
    const char *vocab_size = safetensors_meta(file, "vocab_size");
    int64_t vocab = 0;
    if (!inputs || !targets)
        return file_fail(error, path, "not an example set: it has no '%s'", inputs ? "targets" : "inputs");
    if (inputs->n_dims != 2 || targets->n_dims != 2 || memcmp(inputs->shape, targets->shape, 2 * sizeof(int64_t)))
        return file_fail(error, path, "'inputs' and 'targets' must have the same shape (N,T)");
    if (!inputs->count) return file_fail(error, path, "the example set is empty");
    if (inputs->shape[1] > INT_MAX) return file_fail(error, path, "the examples are too long");
    if (vocab_size && parse_integer(vocab_size, 1, INT_MAX, &vocab))
        return file_fail(error, path, "its metadata's vocab_size is '%.40s', not a whole number", vocab_size);
    data->kind = DATA_EXAMPLES;
    data->count = inputs->shape[0];
    data->width = (int)inputs->shape[1];
    data->vocab_hint = (int)vocab;
    data->inputs = ids_read(inputs, 0, &data->max_id, path, error);
    if (data->inputs) data->targets = ids_read(targets, -1, &data->max_id, path, error);
    return data->targets ? 0 : -1;
}

// Reads a file of any of the three kinds: named *.safetensors it is an example set, with a shard's magic number at its
// start a shard, else text. 0, or -1 with the line in error and nothing to free.
static int dataset_read(Dataset *data, const char *path, char *error) {
    unsigned char *bytes;
    size_t size, length = strlen(path);
    int32_t magic = 0;
    int result = 0;
    memset(data, 0, sizeof(*data));
    if (file_read(path, &bytes, &size, error)) return -1;
    data->size = (int64_t)size;
    data->hash = hash_bytes(bytes, size);
    data->max_id = -1;
    if (size >= 1024) memcpy(&magic, bytes, sizeof(magic));
    if (length >= 12 && !strcmp(path + length - 12, ".safetensors")) {
        Safetensors file;
        if (safetensors_parse(&file, bytes, size, path, error)) return -1;
        result = examples_read(data, &file, path, error);
        safetensors_free(&file);
    } else if (magic == 20240520) {
        result = shard_read(data, bytes, size, path, error);
        free(bytes);
    } else {
        data->kind = DATA_TEXT;
        data->bytes = bytes;
        data->count = data->size;
        if (!size) result = file_fail(error, path, "the file is empty");
    }
    if (result) dataset_free(data);
    return result;
}

// The distinct bytes of one text, or of two, sorted. Fills vocab and returns their number.
static int text_vocabulary(unsigned char vocab[256], const Dataset *train, const Dataset *val_or_null) {
    int seen[256] = {0}, n = 0;
    for (int64_t i = 0; i < train->count; i++) seen[train->bytes[i]] = 1;
    if (val_or_null)
        for (int64_t i = 0; i < val_or_null->count; i++) seen[val_or_null->bytes[i]] = 1;
    for (int byte = 0; byte < 256; byte++)
        if (seen[byte]) vocab[n++] = (unsigned char)byte;
    return n;
}

// Fills the tokens of a text: a byte's id is its place in the vocabulary. -1 and the line if a byte has none, or if the
// ids do not fit in memory; the dataset is then as before.
static int dataset_encode(Dataset *data, const unsigned char *vocab, int vocab_size, const char *path, char *error) {
    int ids[256];
    for (int byte = 0; byte < 256; byte++) ids[byte] = -1;
    for (int id = 0; id < vocab_size; id++) ids[vocab[id]] = id;
    for (int64_t i = 0; i < data->count; i++) {
        int byte = data->bytes[i];
        char shown[8] = "";
        if (ids[byte] >= 0) continue;
        if (byte > 32 && byte < 127) snprintf(shown, sizeof(shown), "'%c', ", byte);
        return file_fail(error, path, "the vocabulary lacks %s0x%02X, the byte at offset %lld", shown, (unsigned)byte,
                         (long long)i);
    }
    uint16_t *tokens = (uint64_t)data->count <= SIZE_MAX / 2 ? (uint16_t *)malloc((size_t)data->count * 2) : NULL;
    if (!tokens) return file_fail(error, path, "its tokens do not fit in memory");
    for (int64_t i = 0; i < data->count; i++) tokens[i] = (uint16_t)ids[data->bytes[i]];
    free(data->tokens);
    data->tokens = tokens;
    return 0;
}

// ----------------------------------------------------------------------------
// options: one table drives the command line, its help, the metadata of files and what a resumed run must repeat

typedef struct {
    const char *data, *val, *mixer, *log, *out, *load, *resume, *prompt;
    int64_t vocab, dim, layers, heads, kv_heads, seq, steps, batch, accum, warmup, decay_steps, seed, eval_every, eval_batches,
        sample_every, save_every, generate, eval, top_k, window;
    double gamma_max, lr, min_lr, beta1, beta2, eps, weight_decay, clip, dropout, temperature, top_p;
} Options;

typedef enum { DATA, MODEL, TRAINING, WATCHING, FILES, INSTEAD, N_GROUPS } Group;
typedef enum { TEXT, INTEGER, NUMBER, FLAG } Type;
typedef struct {
    Group group;
    const char *name, *key;   // on the command line, and in the metadata (NULL: not stored)
    Type type;
    size_t offset;            // in Options
    const char *fallback;     // NULL: computed, as the help says
    double low, high;
    const char *help;
} Option;

#define FIELD(field) offsetof(Options, field)
static const Option option_table[] = {
    {DATA, "data", NULL, TEXT, FIELD(data), "data/tinyshakespeare.txt", 0, 0, "text, token shard (.bin) or examples (.safetensors)"},
    {DATA, "val", NULL, TEXT, FIELD(val), NULL, 0, 0, "validation data (else the last 10 % of --data)"},
    {DATA, "vocab", NULL, INTEGER, FIELD(vocab), NULL, 1, 1 << 24, "vocabulary of shards and examples (else from the data)"},
    {MODEL, "mixer", "mixer", TEXT, FIELD(mixer), "sessa", 0, 0, "sessa or attention (no feedback)"},
    {MODEL, "dim", "d_model", INTEGER, FIELD(dim), "128", 1, 1 << 16, "width D"},
    {MODEL, "layers", "n_layers", INTEGER, FIELD(layers), "5", 1, 4096, "layers L"},
    {MODEL, "heads", "n_heads", INTEGER, FIELD(heads), "4", 1, 1 << 16, "query heads H, a divisor of D; D/H is even"},
    {MODEL, "kv-heads", "n_kv_heads", INTEGER, FIELD(kv_heads), NULL, 1, 1 << 16, "key/value heads G, a divisor of H (else H)"},
    {MODEL, "seq", "max_seq_len", INTEGER, FIELD(seq), "64", 1, 1 << 24, "tokens T of a training sequence"},
    {MODEL, "gamma-max", "gamma_max", NUMBER, FIELD(gamma_max), "0.999", 1e-6, 0.999999, "bound of the feedback gain"},
    {TRAINING, "steps", "steps", INTEGER, FIELD(steps), "2000", 0, 1e12, "updates of the weights"},
    {TRAINING, "batch", "batch", INTEGER, FIELD(batch), "12", 1, 1 << 20, "sequences of a micro-batch"},
    {TRAINING, "accum", "accum", INTEGER, FIELD(accum), "1", 1, 1 << 20, "micro-batches of a step"},
    {TRAINING, "lr", "lr", NUMBER, FIELD(lr), "3e-3", 0, 1e3, "learning rate"},
    {TRAINING, "min-lr", "min_lr", NUMBER, FIELD(min_lr), NULL, 0, 1e3, "learning rate at the schedule's end (else lr/10)"},
    {TRAINING, "warmup", "warmup", INTEGER, FIELD(warmup), "100", 0, 1e12, "steps of linear warm-up"},
    {TRAINING, "decay-steps", "decay_steps", INTEGER, FIELD(decay_steps), NULL, 1, 1e12, "length of the cosine schedule (else --steps)"},
    {TRAINING, "beta1", "beta1", NUMBER, FIELD(beta1), "0.9", 0, 0.9999999, "AdamW"},
    {TRAINING, "beta2", "beta2", NUMBER, FIELD(beta2), "0.99", 0, 0.9999999, "AdamW"},
    {TRAINING, "eps", "eps", NUMBER, FIELD(eps), "1e-8", 1e-30, 1, "AdamW"},
    {TRAINING, "weight-decay", "weight_decay", NUMBER, FIELD(weight_decay), "0.1", 0, 1e3, "AdamW, on matrices"},
    {TRAINING, "clip", "clip", NUMBER, FIELD(clip), "1", 0, 1e30, "bound of the gradient's norm, 0: none"},
    {TRAINING, "dropout", "dropout", NUMBER, FIELD(dropout), "0", 0, 0.999, "probability"},
    {TRAINING, "seed", "seed", INTEGER, FIELD(seed), "1337", 0, 9e15, "of weights, data order, dropout and sampling"},
    {WATCHING, "eval-every", NULL, INTEGER, FIELD(eval_every), "250", 0, 1e12, "steps between validations, 0: only at the end"},
    {WATCHING, "eval-batches", NULL, INTEGER, FIELD(eval_batches), "20", 1, 1e9, "batches of a validation; the last takes all"},
    {WATCHING, "sample-every", NULL, INTEGER, FIELD(sample_every), "0", 0, 1e12, "steps between samples, 0: none"},
    {WATCHING, "log", NULL, TEXT, FIELD(log), NULL, 0, 0, "one JSON object a line, one line a step"},
    {FILES, "out", NULL, TEXT, FIELD(out), "sessa.safetensors", 0, 0, "the run, to resume; the best weights lie beside it"},
    {FILES, "save-every", NULL, INTEGER, FIELD(save_every), NULL, 1, 1e12, "steps between saves (else eval-every)"},
    {FILES, "load", NULL, TEXT, FIELD(load), NULL, 0, 0, "start from, evaluate or generate with these weights"},
    {FILES, "resume", NULL, TEXT, FIELD(resume), NULL, 0, 0, "go on exactly where this run stopped"},
    {INSTEAD, "generate", NULL, INTEGER, FIELD(generate), NULL, 1, 1e9, "write that many tokens with --load"},
    {INSTEAD, "prompt", NULL, TEXT, FIELD(prompt), "", 0, 0, "text (or token ids) to go on from"},
    {INSTEAD, "temperature", NULL, NUMBER, FIELD(temperature), "1", 0, 1e6, "0: always the likeliest token"},
    {INSTEAD, "top-k", NULL, INTEGER, FIELD(top_k), "0", 0, 1 << 24, "only the k likeliest tokens, 0: all"},
    {INSTEAD, "top-p", NULL, NUMBER, FIELD(top_p), "1", 1e-9, 1, "only the likeliest tokens of that total probability"},
    {INSTEAD, "window", NULL, INTEGER, FIELD(window), NULL, 0, 1 << 30, "positions remembered (else the model's seq), 0: all"},
    {INSTEAD, "eval", NULL, FLAG, FIELD(eval), "0", 0, 1, "validation loss of --load on the whole split"},
};
#undef FIELD
enum { N_OPTIONS = sizeof(option_table) / sizeof(option_table[0]) };

typedef struct { Options values; char given[N_OPTIONS]; } Settings;

// Sets one option from its text. Returns 0, or -1 with a line in error.
static int set_option(Options *o, const Option *option, const char *text, char *error) {
    char *field = (char *)o + option->offset;
    double number;
    int64_t integer;
    switch (option->type) {
    case TEXT:
        *(const char **)field = text;
        return 0;
    case NUMBER:
        if (parse_number(text, &number) || number < option->low || number > option->high)
            return fail(error, "--%s takes a number from %g to %g, not '%s'", option->name, option->low, option->high, text);
        *(double *)field = number;
        return 0;
    default:
        if (parse_integer(text, (int64_t)option->low, (int64_t)option->high, &integer))
            return fail(error, "--%s takes a whole number from %.0f to %.0f, not '%s'", option->name, option->low, option->high, text);
        *(int64_t *)field = integer;
        return 0;
    }
}

static const Option *find_option(const char *name, size_t length) {
    for (int i = 0; i < N_OPTIONS; i++)
        if (strlen(option_table[i].name) == length && !strncmp(option_table[i].name, name, length)) return &option_table[i];
    return NULL;
}
static int is_given(const Settings *s, const char *name) { return s->given[find_option(name, strlen(name)) - option_table]; }

// An option's value as text, a number with as many digits as give the same number again.
static const char *option_text(char text[96], const Options *o, const Option *option) {
    const char *field = (const char *)o + option->offset;
    if (option->type == TEXT) snprintf(text, 96, "%s", *(const char *const *)field);
    else if (option->type != NUMBER) snprintf(text, 96, "%lld", (long long)*(const int64_t *)field);
    else for (int digits = 6; digits <= 17; digits++) {
        snprintf(text, 96, "%.*g", digits, *(const double *)field);
        if (strtod(text, NULL) == *(const double *)field) break;
    }
    return text;
}

static void print_help(const char *program) {
    static const char *titles[N_GROUPS] = {"data", "model", "training", "watching", "files", "instead of training"};
    printf("Trains Sessa models, evaluates them and generates with them.\n\n"
           "  %s --data my.txt --dim 256 --layers 6 --seq 256 --out my.safetensors\n"
           "  %s --load my.best.safetensors --generate 500 --prompt \"Once upon\" --temperature 0.8\n", program, program);
    for (int group = 0; group < N_GROUPS; group++) {
        printf("\n%s\n", titles[group]);
        for (int i = 0; i < N_OPTIONS; i++) {
            const Option *o = &option_table[i];
            static const char *types[] = {"TEXT", "N", "X", ""};
            if ((int)o->group != group) continue;
            printf("  --%-13s %-5s %s", o->name, types[o->type], o->help);
            if (o->fallback && *o->fallback && o->type != FLAG) printf(" [%s]", o->fallback);
            printf("\n");
        }
    }
    printf("\nThreads: OMP_NUM_THREADS. Exit code 0: done, 1: failed, 2: wrong option, 130: stopped by Ctrl-C after saving.\n");
}

// Reads the command line: --name value or --name=value. Returns 0, 1 if help was asked for, or -1 with a line in error.
static int parse_options(Settings *s, int argc, char **argv, char *error) {
    memset(s, 0, sizeof(*s));
    for (int i = 0; i < N_OPTIONS; i++)
        if (option_table[i].fallback && set_option(&s->values, &option_table[i], option_table[i].fallback, error)) return -1;
    s->values.min_lr = s->values.window = -1;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) return 1;
        const char *name = argv[i] + 2, *equals = strchr(argv[i], '=');
        const Option *option = strncmp(argv[i], "--", 2) ? NULL : find_option(name, equals ? (size_t)(equals - name) : strlen(name));
        if (!option) return fail(error, "unknown option '%s' (--help lists them)", argv[i]);
        const char *value = equals ? equals + 1 : option->type == FLAG ? "1" : ++i < argc ? argv[i] : NULL;
        if (!value) return fail(error, "--%s takes a value", option->name);
        if (option->type == TEXT && !*value && strcmp(option->name, "prompt"))
            return fail(error, "--%s takes a value that is not empty", option->name);
        if (set_option(&s->values, option, value, error)) return -1;
        s->given[option - option_table] = 1;
    }
    return 0;
}

// The model that the options describe. Returns 0, or -1 with a line in error.
static int config_of(Config *c, const Options *o, int vocab_size, char *error) {
    int64_t kv_heads = o->kv_heads ? o->kv_heads : o->heads;
    if (o->dim % o->heads) return fail(error, "--heads %lld does not divide --dim %lld", (long long)o->heads, (long long)o->dim);
    if (o->dim / o->heads % 2) return fail(error, "a head's width --dim/--heads must be even, not %lld", (long long)(o->dim / o->heads));
    if (o->heads % kv_heads) return fail(error, "--kv-heads %lld does not divide --heads %lld", (long long)kv_heads, (long long)o->heads);
    if (o->batch * o->seq > INT_MAX / 64) return fail(error, "--batch times --seq must not exceed %d tokens", INT_MAX / 64);
    Config config = {vocab_size, (int)o->dim, (int)o->layers, (int)o->heads, (int)kv_heads, (int)o->seq, o->gamma_max, 0};
    while (config.mixer < N_MIXERS && strcmp(o->mixer, mixers[config.mixer].name)) config.mixer++;
    if (config.mixer == N_MIXERS) return fail(error, "--mixer takes sessa or attention, not '%s'", o->mixer);
    *c = config;
    return 0;
}

// ----------------------------------------------------------------------------
// a run: options, data, model and where training stands

typedef struct {
    uint64_t random;        // the generator of the data's order
    int64_t step;           // updates done
    int64_t epoch, place;   // of example sets: examples seen in this epoch
    double best_val;        // lowest validation loss so far, INFINITY before the first
} Progress;

typedef struct {
    const Backend *backend;
    Settings settings;
    Config config;
    unsigned char vocab[256]; // the bytes of a text model's tokens
    int vocab_bytes;          // their number, 0: tokens are ids
    Dataset train, val;       // val is unused when it is the rest of train
    int64_t train_end, val_begin, val_end; // tokens or examples of the two splits
    const Dataset *val_set;
    Model *model;
    Table table;              // of the parameters
    Progress progress;
    int *inputs, *targets;    // (accum·batch, seq)
    int32_t *order;           // example sets: this epoch's permutation
    int64_t order_epoch;
} Run;

// Metadata to be written; grows by one formatted value.
typedef struct { Meta rows[N_OPTIONS + 16]; int n; } MetaList;

static void add_meta(MetaList *list, const char *key, const char *format, ...) __attribute__((format(printf, 3, 4)));
static void add_meta(MetaList *list, const char *key, const char *format, ...) {
    Meta *row = &list->rows[list->n++];
    va_list args;
    va_start(args, format);
    row->key = strdup(key);
    if (!row->key || vasprintf(&row->value, format, args) < 0) exhausted();
    va_end(args);
}

// Kind, size and hash of a data file: what a resumed run must find again.
static const char *content_of(char text[96], const Dataset *data) {
    static const char *kinds[] = {"text", "token shard", "examples"};
    snprintf(text, 96, "%s, %lld bytes, hash %016llx", kinds[data->kind], (long long)data->size, (unsigned long long)data->hash);
    return text;
}

// Adds the rows of the parameter table, their values taken from the model, to the tensors of a file. numbers: (count) floats.
static int add_block(FileTensor *tensors, float *numbers, Run *run, const char *prefix, Block block) {
    const real *values = run->backend->read(run->model, block);
    for (int64_t i = 0; i < run->table.count; i++) numbers[i] = (float)values[i];
    for (int i = 0; i < run->table.n; i++) {
        const Tensor *row = &run->table.rows[i];
        FileTensor *t = &tensors[i];
        if (asprintf(&t->name, "%s%s", prefix, row->name) < 0) exhausted();
        strcpy(t->dtype, "F32");
        t->n_dims = row->n_dims;
        memcpy(t->shape, row->shape, sizeof(row->shape));
        t->size = (size_t)row->count * sizeof(float);
        t->data = (const unsigned char *)(numbers + row->offset);
    }
    return run->table.n;
}

// Writes the weights, and with `resume` all that a run needs to go on, to path. Returns 0, or -1 with a line in error.
static int save_checkpoint(Run *run, const char *path, int resume, char *error) {
    const Options *o = &run->settings.values;
    const Progress *p = &run->progress;
    int blocks = resume ? 3 : 1, n = 0;
    size_t count = (size_t)run->table.count;
    FileTensor *tensors = (FileTensor *)calloc((size_t)(blocks * run->table.n + 1), sizeof(FileTensor));
    float *numbers = (float *)malloc((size_t)blocks * count * sizeof(float));
    if (!tensors || !numbers) exhausted();
    n += add_block(tensors, numbers, run, "", PARAMS);
    if (resume) n += add_block(tensors + n, numbers + count, run, "exp_avg.", EXP_AVG);
    if (resume) n += add_block(tensors + n, numbers + 2 * count, run, "exp_avg_sq.", EXP_AVG_SQ);
    int named = n;
    if (run->vocab_bytes) {
        FileTensor t = {(char *)"tokenizer.bytes", "U8", 1, {run->vocab_bytes}, run->vocab_bytes, (size_t)run->vocab_bytes, run->vocab};
        tensors[n++] = t;
    }
    MetaList meta;
    char text[96];
    meta.n = 0;
    add_meta(&meta, "vocab_size", "%d", run->config.vocab_size);
    for (int i = 0; i < N_OPTIONS; i++) {
        const Option *option = &option_table[i];
        if (option->key && (option->group == MODEL || resume)) add_meta(&meta, option->key, "%s", option_text(text, o, option));
    }
    if (resume) {
        add_meta(&meta, "data", "%s", o->data);
        add_meta(&meta, "data_content", "%s", content_of(text, &run->train));
        if (o->val) add_meta(&meta, "val", "%s", o->val);
        if (o->val) add_meta(&meta, "val_content", "%s", content_of(text, &run->val));
        add_meta(&meta, "step", "%lld", (long long)p->step);
        add_meta(&meta, "random", "%lld", (long long)p->random);
        add_meta(&meta, "epoch", "%lld", (long long)p->epoch);
        add_meta(&meta, "place", "%lld", (long long)p->place);
        if (isfinite(p->best_val)) add_meta(&meta, "best_val_loss", "%.17g", p->best_val);
    }
    int result = safetensors_write(path, tensors, n, meta.rows, meta.n, error);
    for (int i = 0; i < meta.n; i++) { free(meta.rows[i].key); free(meta.rows[i].value); }
    for (int i = 0; i < named; i++) free(tensors[i].name);
    free(tensors);
    free(numbers);
    return result;
}

// Reads one block of the table's tensors, whose names in the file begin with prefix, into the model. Returns 0, or -1 with
// a line in error.
static int load_block(Run *run, const Safetensors *file, const char *path, const char *prefix, Block block, char *error) {
    real *values = run->backend->read(run->model, block);
    for (int i = 0; i < run->table.n; i++) {
        const Tensor *row = &run->table.rows[i];
        char name[96];
        snprintf(name, sizeof(name), "%s%s", prefix, row->name);
        const FileTensor *t = safetensors_find(file, name);
        if (!t) return file_fail(error, path, "tensor %s is missing", name);
        if (strcmp(t->dtype, "F32") || t->n_dims != row->n_dims || memcmp(t->shape, row->shape, sizeof(int64_t) * (size_t)row->n_dims))
            return file_fail(error, path, "tensor %s has another dtype or shape than the model's", name);
        for (int64_t k = 0; k < row->count; k++) {
            float value;
            memcpy(&value, t->data + k * (int64_t)sizeof(float), sizeof(float));
            values[row->offset + k] = (real)value;
        }
    }
    run->backend->write(run->model, block);
    return 0;
}

// Takes from a checkpoint the options of the groups MODEL to `last` and the vocabulary. What was given on the command line
// as well must agree, but for --steps and, loading weights, --seq. Returns 0, or -1 with a line in error.
static int settings_from_file(Run *run, const Safetensors *file, const char *path, Group last, char *error) {
    Options *o = &run->settings.values;
    for (int i = 0; i < N_OPTIONS; i++) {
        const Option *option = &option_table[i];
        if (!option->key || option->group > last) continue;
        const char *text = safetensors_meta(file, option->key), *may_differ = last == MODEL ? "seq" : "steps";
        char given[96], stored[96], line[ERROR_SIZE];
        Options other = *o;
        if (!text || set_option(&other, option, text, line))
            return file_fail(error, path, "metadata %s is %s", option->key, text ? "no valid value" : "missing");
        if (run->settings.given[i]) {
            if (strcmp(option->name, may_differ) && strcmp(option_text(given, o, option), option_text(stored, &other, option)))
                return fail(error, "--%s %s differs from %s, which has %s", option->name, given, path, stored);
        } else {
            *o = other;
        }
    }
    const char *text = safetensors_meta(file, "vocab_size");
    const FileTensor *bytes = safetensors_find(file, "tokenizer.bytes");
    int64_t size;
    char seen[256] = {0};
    if (!text || parse_integer(text, 1, 1 << 24, &size)) return file_fail(error, path, "metadata vocab_size is missing or no number");
    if (o->vocab && o->vocab != size) return fail(error, "--vocab differs from %s, which has %lld", path, (long long)size);
    run->config.vocab_size = (int)size;
    if (!bytes) return 0;
    int valid = !strcmp(bytes->dtype, "U8") && bytes->n_dims == 1 && bytes->count == size && size <= 256;
    for (int64_t i = 0; valid && i < size; i++) valid = !seen[bytes->data[i]]++;
    if (!valid) return file_fail(error, path, "tokenizer.bytes is not vocab_size distinct bytes");
    memcpy(run->vocab, bytes->data, (size_t)size);
    run->vocab_bytes = (int)size;
    return 0;
}

// Takes from a checkpoint where the run stood, and its files where none are given. Returns 0, or -1 with a line in error.
static int progress_from_file(Run *run, const Safetensors *file, const char *path, char *error) {
    Options *o = &run->settings.values;
    Progress *p = &run->progress;
    int64_t random = 0;
    struct { const char *key; int64_t low, *value; } numbers[] = {
        {"step", 0, &p->step}, {"epoch", 0, &p->epoch}, {"place", 0, &p->place}, {"random", INT64_MIN, &random}};
    for (int i = 0; i < 4; i++) {
        const char *text = safetensors_meta(file, numbers[i].key);
        if (!text || parse_integer(text, numbers[i].low, INT64_MAX, numbers[i].value))
            return file_fail(error, path, "metadata %s is missing or no number: this is no run to resume", numbers[i].key);
    }
    p->random = (uint64_t)random;
    const char *best = safetensors_meta(file, "best_val_loss"), *data = safetensors_meta(file, "data"), *val = safetensors_meta(file, "val");
    if (!data || (best && parse_number(best, &p->best_val))) return file_fail(error, path, "its metadata are not those of a run");
    if (!o->val != !val && (o->val || is_given(&run->settings, "data"))) return fail(error, "--val differs from %s, which has %s", path, val ? val : "none");
    if (!is_given(&run->settings, "data")) o->data = data;
    if (!o->val) o->val = val;
    if (!is_given(&run->settings, "out")) o->out = path;
    return 0;
}

// A resumed run must read what it read before. Returns 0, or -1 with a line in error.
static int check_content(const Safetensors *file, const char *key, const char *path, const Dataset *data, char *error) {
    const char *stored = safetensors_meta(file, key);
    char text[96];
    if (stored && !strcmp(stored, content_of(text, data))) return 0;
    return file_fail(error, path, "%s; the run being resumed read %.90s", text, stored ? stored : "nothing");
}

// Opens --data and --val, settles the vocabulary (unless a checkpoint has) and the splits. Returns 0, or -1 with a line in error.
static int open_data(Run *run, char *error) {
    Options *o = &run->settings.values;
    Dataset *sets[] = {&run->train, &run->val};
    const char *paths[] = {o->data, o->val};
    int n_sets = o->val ? 2 : 1, loaded = run->config.vocab_size > 0, max_id = -1;
    for (int i = 0; i < n_sets; i++)
        if (dataset_read(sets[i], paths[i], error)) return -1;
    if (o->val && run->val.kind != run->train.kind) return fail(error, "%s and %s are of different kinds", o->data, o->val);
    if (run->train.kind == DATA_TEXT) {
        if (loaded && !run->vocab_bytes) return fail(error, "%s is text, but the model's tokens are ids", o->data);
        if (!loaded) run->config.vocab_size = run->vocab_bytes = text_vocabulary(run->vocab, &run->train, o->val ? &run->val : NULL);
        for (int i = 0; i < n_sets; i++)
            if (dataset_encode(sets[i], run->vocab, run->vocab_bytes, paths[i], error)) return -1;
    } else {
        for (int i = 0; i < n_sets; i++) max_id = sets[i]->max_id > max_id ? sets[i]->max_id : max_id;
        int vocab = run->train.vocab_hint ? run->train.vocab_hint : max_id >= 50257 ? max_id + 1 : 50257;
        if (!loaded) run->config.vocab_size = o->vocab ? (int)o->vocab : vocab;
        if (max_id >= run->config.vocab_size)
            return fail(error, "%s: token id %d does not fit a vocabulary of %d", o->data, max_id, run->config.vocab_size);
    }
    run->val_set = o->val ? &run->val : &run->train;
    run->train_end = o->val ? run->train.count : (int64_t)((double)run->train.count * 0.9);
    if (!o->val && run->train.count < (1 << 30)) run->train_end = run->train.count * 9 / 10;
    run->val_begin = o->val ? 0 : run->train_end;
    run->val_end = run->val_set->count;
    if (run->train.kind == DATA_EXAMPLES) {
        for (int i = 0; i < n_sets; i++) {
            if (!is_given(&run->settings, "seq") && i == 0) o->seq = sets[i]->width;
            if (sets[i]->width != o->seq) return fail(error, "%s holds sequences of %d tokens, not of %lld", paths[i], sets[i]->width, (long long)o->seq);
        }
        if (run->train_end < 1 || run->val_begin == run->val_end) return fail(error, "%s holds too few examples to train and validate", o->data);
    } else {
        if (!o->eval && run->train_end < o->seq + 1)
            return fail(error, "%s: training takes %lld tokens, there are %lld", o->data, (long long)o->seq + 1, (long long)run->train_end);
        if (run->val_end - run->val_begin < o->seq + 1)
            return fail(error, "%s: validation takes %lld tokens, there are %lld", o->val ? o->val : o->data, (long long)o->seq + 1,
                        (long long)(run->val_end - run->val_begin));
    }
    return 0;
}

// Copies one sequence into inputs and targets (T): the example, or the tokens from `at` on and the ones that follow them.
static void copy_sequence(int *inputs, int *targets, const Dataset *set, int64_t at, int T) {
    for (int t = 0; t < T; t++) {
        inputs[t] = set->kind == DATA_EXAMPLES ? set->inputs[at * T + t] : set->tokens[at + t];
        targets[t] = set->kind == DATA_EXAMPLES ? set->targets[at * T + t] : set->tokens[at + t + 1];
    }
}

// The place of the next training sequence: anywhere in a stream of tokens, the next of a fresh permutation of examples.
static int64_t next_place(Run *run) {
    Progress *p = &run->progress;
    int64_t n = run->train_end;
    if (run->train.kind != DATA_EXAMPLES) return (int64_t)(random_u64(&p->random) % (uint64_t)(n - run->settings.values.seq));
    if (run->order_epoch != p->epoch) {
        uint64_t state = splitmix64((uint64_t)run->settings.values.seed) ^ splitmix64((uint64_t)p->epoch);
        for (int64_t i = 0; i < n; i++) { // Fisher and Yates
            int64_t j = (int64_t)(random_u64(&state) % (uint64_t)(i + 1));
            run->order[i] = run->order[j];
            run->order[j] = (int32_t)i;
        }
        run->order_epoch = p->epoch;
    }
    int64_t place = run->order[p->place++];
    if (p->place == n) { p->place = 0; p->epoch++; }
    return place;
}

static volatile sig_atomic_t interrupted = 0;
static void on_interrupt(int signal_number) { interrupted = signal_number; }

// Mean loss over consecutive windows of the validation split: all of them, or max_batches evenly spaced batches.
static double evaluate(Run *run, int64_t max_batches) {
    const Options *o = &run->settings.values;
    const Dataset *set = run->val_set;
    Dropout off = {0, 0, 0};
    int T = (int)o->seq, examples = set->kind == DATA_EXAMPLES;
    int64_t length = run->val_end - run->val_begin, windows = examples ? length : (length - 1) / T;
    int64_t batches = (windows + o->batch - 1) / o->batch, taken = max_batches && max_batches < batches ? max_batches : batches;
    double sum = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < taken && !(interrupted && !max_batches); i++) {
        int64_t first = batches * i / taken * o->batch;
        int B = (int)(windows - first < o->batch ? windows - first : o->batch);
        for (int b = 0; b < B; b++)
            copy_sequence(run->inputs + b * T, run->targets + b * T, set, run->val_begin + (first + b) * (examples ? 1 : T), T);
        for (int n = 0; n < B * T; n++) count += run->targets[n] >= 0;
        sum += run->backend->forward(run->model, run->inputs, run->targets, B, T, off);
    }
    return count ? sum / (double)count : 0;
}

// ----------------------------------------------------------------------------
// generation

typedef struct { real logit; int id; } Candidate;
static int by_logit(const void *a, const void *b) {
    const Candidate *x = (const Candidate *)a, *y = (const Candidate *)b;
    return x->logit != y->logit ? (x->logit < y->logit ? 1 : -1) : x->id - y->id;
}

// Draws a token from softmax(logits/temperature), cut to the top_k likeliest (0: all) and then to the fewest likeliest
// whose probabilities reach top_p. candidates: scratch (V).
static int sample_token(const real *logits, Candidate *candidates, int V, double temperature, int64_t top_k, double top_p,
                        uint64_t *random) {
    int n = V;
    double sum = 0, total = 0;
    for (int i = 0; i < V; i++) { candidates[i].logit = logits[i]; candidates[i].id = i; }
    qsort(candidates, (size_t)V, sizeof(Candidate), by_logit);
    if (temperature == 0) return candidates[0].id;
    if (top_k && top_k < n) n = (int)top_k;
    double max = (double)candidates[0].logit;
    for (int i = 0; i < n; i++) total += exp(((double)candidates[i].logit - max) / temperature);
    int kept = 0;
    while (kept < n && (kept == 0 || sum < top_p * total)) sum += exp(((double)candidates[kept++].logit - max) / temperature);
    double left = random_uniform(random) * sum;
    for (int i = 0; i < kept - 1; i++) {
        left -= exp(((double)candidates[i].logit - max) / temperature);
        if (left < 0) return candidates[i].id;
    }
    return candidates[kept - 1].id;
}

// Reads the prompt as token ids: its bytes' ids, or, without a vocabulary of bytes, numbers between spaces. Returns their
// number, or -1 with a line in error. ids has room for strlen(prompt) + 1.
static int encode_prompt(const Run *run, const char *prompt, int *ids, char *error) {
    int n = 0;
    if (run->vocab_bytes) {
        for (const char *c = prompt; *c; c++, n++) {
            const unsigned char *place = (const unsigned char *)memchr(run->vocab, (unsigned char)*c, (size_t)run->vocab_bytes);
            if (!place) return fail(error, "--prompt: the model's vocabulary lacks byte 0x%02x, at %d", (unsigned char)*c, n);
            ids[n] = (int)(place - run->vocab);
        }
        return n;
    }
    for (const char *c = prompt; *c;) {
        char *end;
        long id = strtol(c, &end, 10);
        if (end == c || id < 0 || id >= run->config.vocab_size || (*end && *end != ' '))
            return fail(error, "--prompt takes token ids from 0 to %d between spaces", run->config.vocab_size - 1);
        ids[n++] = (int)id;
        for (c = end; *c == ' ';) c++;
    }
    return n;
}

// Writes the prompt and n sampled tokens to standard output as they are made. `model` has B = 1 and holds the weights.
// Returns 0, or -1 with a line in error.
static int generate(Run *run, Model *model, const char *prompt, int64_t n, uint64_t random, char *error) {
    const Options *o = &run->settings.values;
    int V = run->config.vocab_size, result = -1;
    int64_t window = o->window < 0 ? o->seq : o->window;
    real *logits = (real *)malloc((size_t)V * sizeof(real));
    Candidate *candidates = (Candidate *)malloc((size_t)V * sizeof(Candidate));
    int *tokens = (int *)malloc((strlen(prompt) + 2 + (size_t)n) * sizeof(int));
    int count = tokens && candidates && logits ? encode_prompt(run, prompt, tokens, error) : fail(error, "out of memory");
    if (count < 0) goto done;
    fputs(prompt, stdout);
    if (count == 0) { // nothing to go on from: a new line, or token 0
        const unsigned char *newline = (const unsigned char *)memchr(run->vocab, '\n', (size_t)run->vocab_bytes);
        tokens[count++] = newline ? (int)(newline - run->vocab) : 0;
    }
    for (int64_t made = 0, fed = 0, cached = 0; made < n && !interrupted; made++) {
        if (window && (cached + count - fed > window)) { // go on from the last half of the window
            int64_t keep = !made ? window : window > 1 ? window / 2 : 1;
            run->backend->reset(model);
            fed = count - (keep < count ? keep : count);
            cached = 0;
        }
        if (run->backend->extend(model, tokens + fed, (int)(count - fed), logits)) { fail(error, "out of memory"); goto done; }
        cached += count - fed;
        fed = count;
        int id = sample_token(logits, candidates, V, o->temperature, o->top_k, o->top_p, &random);
        tokens[count++] = id;
        if (run->vocab_bytes) putchar(run->vocab[id]);
        else printf(made || *prompt ? " %d" : "%d", id);
        if (fflush(stdout)) { fail(error, "standard output: %s", strerror(errno)); goto done; }
    }
    result = putchar('\n') == EOF || fflush(stdout) ? fail(error, "standard output: %s", strerror(errno)) : 0;
done:
    run->backend->reset(model);
    free(logits);
    free(candidates);
    free(tokens);
    return result;
}

enum { GENERATION_CHUNK = 128 }; // tokens of a prompt that run through the layers at once

// A sample in the middle of training, by a model of its own that takes over the weights: training does not notice.
static int sample_while_training(Run *run, char *error) {
    Model *model = run->backend->create(&run->config, 1, GENERATION_CHUNK, 0, 0, error);
    if (!model) return -1;
    memcpy(run->backend->read(model, PARAMS), run->backend->read(run->model, PARAMS), (size_t)run->table.count * sizeof(real));
    run->backend->write(model, PARAMS);
    printf("---\n");
    int result = generate(run, model, "", 200, splitmix64((uint64_t)run->settings.values.seed + (uint64_t)run->progress.step), error);
    printf("---\n");
    run->backend->destroy(model);
    return result;
}

// ----------------------------------------------------------------------------
// training

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// Linear warm-up, then a cosine from lr to min_lr, then min_lr. step from 0.
static double learning_rate(const Options *o, int64_t step) {
    if (step < o->warmup) return o->lr * (double)(step + 1) / (double)o->warmup;
    if (step >= o->decay_steps) return o->min_lr;
    double progress = (double)(step - o->warmup) / (double)(o->decay_steps - o->warmup);
    return o->min_lr + (o->lr - o->min_lr) * (1 + cos(3.14159265358979323846 * progress)) / 2;
}

// One step: draws accum micro-batches, sums their gradients of the mean loss over all targets, clips, updates. Returns 0,
// or -1 with a line in error if loss or gradient are not finite: the weights are then still those of before.
static int train_step(Run *run, double *loss, double *grad_norm, char *error) {
    const Options *o = &run->settings.values;
    const Backend *backend = run->backend;
    Progress *p = &run->progress;
    int T = (int)o->seq, B = (int)o->batch;
    int64_t count = 0, sequences = o->accum * o->batch;
    for (int64_t i = 0; i < sequences; i++) copy_sequence(run->inputs + i * T, run->targets + i * T, &run->train, next_place(run), T);
    for (int64_t i = 0; i < sequences * T; i++) count += run->targets[i] >= 0;
    *loss = 0;
    for (int64_t a = 0; a < o->accum; a++) {
        Dropout drop = {o->dropout, (uint64_t)o->seed, (uint64_t)(p->step * o->accum + a)};
        *loss += backend->forward(run->model, run->inputs + a * B * T, run->targets + a * B * T, B, T, drop) / (double)(count ? count : 1);
        backend->backward(run->model, count ? 1 / (double)count : 0);
    }
    *grad_norm = backend->grad_norm(run->model);
    if (!isfinite(*loss) || !isfinite(*grad_norm))
        return fail(error, "step %lld: loss %g, gradient norm %g: stopped before the update; a lower --lr may help", (long long)p->step + 1,
                    *loss, *grad_norm);
    AdamW adam = {learning_rate(o, p->step), o->beta1, o->beta2, o->eps, o->weight_decay};
    double scale = o->clip > 0 && o->clip < *grad_norm + 1e-6 ? o->clip / (*grad_norm + 1e-6) : 1;
    p->step++;
    backend->update(run->model, adam, scale, p->step);
    return 0;
}

// Opens the log: anew, or cut back to the lines up to a resumed step. NULL with a line in error.
static FILE *open_log(const char *path, int64_t step, char *error) {
    FILE *log = fopen(path, step ? "r+" : "w");
    if (!log && step && errno == ENOENT) log = fopen(path, "w");
    if (!log) { fail(error, "%s: %s", path, strerror(errno)); return NULL; }
    char line[512];
    long kept = 0;
    long long logged;
    while (step && fgets(line, sizeof(line), log) && strchr(line, '\n') && sscanf(line, "{\"step\": %lld", &logged) == 1 && logged <= step)
        kept = ftell(log);
    if (step && (ftruncate(fileno(log), kept) || fseek(log, kept, SEEK_SET))) {
        fail(error, "%s: %s", path, strerror(errno));
        fclose(log);
        return NULL;
    }
    return log;
}

// Prints how to go on after Ctrl-C: --resume and what was given of the rows that a checkpoint does not hold.
static void print_resume_command(const Run *run, const char *program) {
    printf("go on with: %s --resume '%s'", program, run->settings.values.out);
    for (int i = 0; i < N_OPTIONS; i++) {
        const Option *option = &option_table[i];
        char text[96];
        if (!run->settings.given[i] || (option->group != WATCHING && strcmp(option->name, "save-every"))) continue;
        if (option->type == TEXT) printf(" --%s '%s'", option->name, *(const char *const *)((const char *)&run->settings.values + option->offset));
        else printf(" --%s %s", option->name, option_text(text, &run->settings.values, option));
    }
    printf("\n");
}

// Validates, and keeps the weights if they are the best so far. Returns 0, or -1 with a line in error.
static int validate(Run *run, const char *best_path, double *val_loss, char *error) {
    *val_loss = evaluate(run, run->settings.values.eval_batches);
    if (!(*val_loss < run->progress.best_val)) return 0;
    run->progress.best_val = *val_loss;
    return save_checkpoint(run, best_path, 0, error);
}

// The training loop. Returns 0, -1 with a line in error, or 130 after Ctrl-C.
static int train(Run *run, const char *program, char *error) {
    const Options *o = &run->settings.values;
    Progress *p = &run->progress;
    int terminal = isatty(STDOUT_FILENO), result = -1;
    size_t stem = strlen(o->out), suffix = strlen(".safetensors");
    if (stem > suffix && !strcmp(o->out + stem - suffix, ".safetensors")) stem -= suffix;
    char *best_path = (char *)malloc(stem + 32);
    if (!best_path) return fail(error, "out of memory");
    snprintf(best_path, stem + 32, "%.*s.best.safetensors", (int)stem, o->out);
    FILE *log = NULL;
    double start = seconds(), loss = 0, grad_norm = 0;
    int64_t first_step = p->step;
    if (safetensors_writable(o->out, error) || (o->log && !(log = open_log(o->log, p->step, error)))) goto done;
    while (p->step < o->steps && !interrupted) {
        double begin = seconds(), rate = learning_rate(o, p->step), val_loss = NAN;
        if (train_step(run, &loss, &grad_norm, error)) goto done;
        double elapsed = seconds() - begin, tokens_per_second = (double)(o->accum * o->batch * o->seq) / elapsed;
        int last = p->step == o->steps, evaluated = o->eval_every && p->step % o->eval_every == 0;
        if (evaluated && validate(run, best_path, &val_loss, error)) goto done;
        if (last || interrupted || (o->save_every && p->step % o->save_every == 0))
            if (save_checkpoint(run, o->out, 1, error)) goto done;
        if (last) {
            val_loss = evaluate(run, 0);
            if (!isfinite(p->best_val) && save_checkpoint(run, best_path, 0, error)) goto done;
        }
        double left = (seconds() - start) / (double)(p->step - first_step) * (double)(o->steps - p->step);
        if (terminal) printf("\r");
        if (terminal || evaluated || last || p->step == first_step + 1 || p->step % 100 == 0) {
            printf("step %lld/%lld | loss %.4f | norm %.3f | lr %.2e | %.1f ms | %.0f tok/s | %d:%02d left", (long long)p->step,
                   (long long)o->steps, loss, grad_norm, rate, elapsed * 1e3, tokens_per_second, (int)(left / 60), (int)left % 60);
            if (!isnan(val_loss)) printf(" | val %.4f%s", val_loss, last ? " (whole split)" : "");
            printf(!terminal || !isnan(val_loss) ? "\n" : "  ");
            fflush(stdout);
        }
        if (log) {
            fprintf(log, "{\"step\": %lld, \"train_loss\": %.9g", (long long)p->step, loss);
            if (!isnan(val_loss)) fprintf(log, ", \"val_loss\": %.9g", val_loss);
            fprintf(log, ", \"lr\": %.9g, \"grad_norm\": %.9g, \"tok_per_s\": %.6g}\n", rate, grad_norm, tokens_per_second);
            if (fflush(log)) { fail(error, "%s: %s", o->log, strerror(errno)); goto done; }
        }
        if (o->sample_every && p->step % o->sample_every == 0 && sample_while_training(run, error)) goto done;
    }
    result = 0;
    if (interrupted && p->step < o->steps) {
        printf("\nstopped after step %lld, saved to %s\n", (long long)p->step, o->out);
        print_resume_command(run, program);
        result = 130;
    } else {
        printf("saved to %s, the best weights to %s (%.1f s)\n", o->out, best_path, seconds() - start);
    }
done:
    if (log) fclose(log);
    free(best_path);
    return result;
}

// ----------------------------------------------------------------------------
// the program

enum { FAILED = -1, WRONG_OPTION = -2 };

static int wrong_option(char *error, const char *line) {
    fail(error, "%s", line);
    return WRONG_OPTION;
}

// Opens files and data and makes the model, ready to go. Returns 0, or FAILED or WRONG_OPTION with a line in error.
static int prepare(Run *run, Safetensors *file, char *error) {
    Options *o = &run->settings.values;
    const Backend *backend = run->backend;
    const char *path = o->resume ? o->resume : o->load;
    if (o->resume && (o->load || o->generate || o->eval)) return wrong_option(error, "--resume goes with neither --load, --generate nor --eval");
    if (o->generate && o->eval) return wrong_option(error, "--generate and --eval exclude each other");
    if ((o->generate || o->eval) && !o->load) return wrong_option(error, "--generate and --eval take the weights from --load FILE");
    if (path && safetensors_read(file, path, error)) return FAILED;
    if (path && settings_from_file(run, file, path, o->resume ? TRAINING : MODEL, error)) return error[0] == '-' ? WRONG_OPTION : FAILED;
    if (o->resume && progress_from_file(run, file, path, error)) return error[0] == '-' ? WRONG_OPTION : FAILED;
    // defaults that depend on other options
    if (!o->kv_heads) o->kv_heads = o->heads;
    if (o->min_lr < 0) o->min_lr = o->lr / 10;
    if (!o->decay_steps) o->decay_steps = o->steps > 0 ? o->steps : 1;
    if (!o->save_every) o->save_every = o->eval_every;
    if (config_of(&run->config, o, run->config.vocab_size, error)) return WRONG_OPTION;
    if (!o->generate && open_data(run, error)) return FAILED;
    if (config_of(&run->config, o, run->config.vocab_size, error)) return WRONG_OPTION; // now with the data's T and V
    if (o->resume && check_content(file, "data_content", o->data, &run->train, error)) return FAILED;
    if (o->resume && o->val && check_content(file, "val_content", o->val, &run->val, error)) return FAILED;

    int training = !o->generate && !o->eval;
    int B = o->generate ? 1 : (int)o->batch, T = o->generate ? GENERATION_CHUNK : (int)o->seq;
    run->model = backend->create(&run->config, B, T, training, 0, error);
    if (!run->model) return FAILED;
    make_table(&run->table, &run->config);
    size_t tokens = (size_t)B * (size_t)T * (size_t)(training ? o->accum : 1);
    run->inputs = (int *)malloc(tokens * sizeof(int));
    run->targets = (int *)malloc(tokens * sizeof(int));
    run->order = (int32_t *)malloc(((size_t)run->train_end + 1) * sizeof(int32_t));
    if (!run->inputs || !run->targets || !run->order) return fail(error, "out of memory");

    if (path && load_block(run, file, path, "", PARAMS, error)) return FAILED;
    if (o->resume) return load_block(run, file, path, "exp_avg.", EXP_AVG, error) || load_block(run, file, path, "exp_avg_sq.", EXP_AVG_SQ, error) ? FAILED : 0;
    run->progress.random = splitmix64((uint64_t)o->seed) ^ splitmix64(1); // another stream than the initial values'
    if (!path) {
        initialise(backend->read(run->model, PARAMS), &run->table, (uint64_t)o->seed);
        backend->write(run->model, PARAMS);
    }
    return 0;
}

static int act(Run *run, const char *program, char *error) {
    const Options *o = &run->settings.values;
    const Config *c = &run->config;
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_handler = on_interrupt;
    action.sa_flags = (int)SA_RESETHAND; // a second Ctrl-C ends the program at once
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    if (o->generate) return generate(run, run->model, o->prompt, o->generate, splitmix64((uint64_t)o->seed), error);
    if (o->eval) {
        printf("val_loss %.6f\n", evaluate(run, 0));
        return 0;
    }
    printf("%s: D %d, L %d, H %d, G %d, T %d, V %d, %.2fM parameters; %s, %d threads, %.0f MiB\n", o->mixer, c->d_model, c->n_layers,
           c->n_heads, c->n_kv_heads, c->max_seq_len, c->vocab_size, (double)run->table.count / 1e6, run->backend->name,
           omp_get_max_threads(), run->backend->bytes(run->model) / 0x1p20);
    return train(run, program, error);
}

// Everything between the command line and the exit code.
static int run_program(int argc, char **argv, const Backend *backend) {
    char error[ERROR_SIZE] = "";
    Run run;
    Safetensors file;
    memset(&run, 0, sizeof(run));
    memset(&file, 0, sizeof(file));
    run.backend = backend;
    run.progress.best_val = INFINITY;
    run.order_epoch = -1;
    int result = parse_options(&run.settings, argc, argv, error);
    if (result == 1) { print_help(argv[0]); return 0; }
    if (result < 0) result = WRONG_OPTION;
    else if (!(result = prepare(&run, &file, error))) result = act(&run, argv[0], error);
    if (result < 0) fprintf(stderr, "train_sessa: %s\n", error);
    if (run.model) backend->destroy(run.model);
    free(run.table.rows);
    free(run.inputs);
    free(run.targets);
    free(run.order);
    dataset_free(&run.train);
    dataset_free(&run.val);
    safetensors_free(&file);
    return result == WRONG_OPTION ? 2 : result == FAILED ? 1 : result;
}

#ifndef SESSA_NO_MAIN // the test and the CUDA twin include this file and bring their own
int main(int argc, char **argv) { return run_program(argc, argv, &cpu_backend); }
#endif
