/*
Sessa (Selective State Space Attention, arXiv 2604.18580) on the CPU: every layer's forward and backward
pass, the model, its files, its data, the training loop and the command line, in one file that reads from top
to bottom.

The model is an embedding, L layers, a LayerNorm and the embedding again as the head. One layer makes y of x,
(B,T,D):

    ln      = LayerNorm(x)                                 [9]
    a, g    = ln W_in^T + b_in                             [10]
    ā       = GELU(a)                                      [11]      `abar`
    q, k, v = ā W_q^T + b_q, ā W_k^T + b_k, ā W_v^T + b_v  [14]      then q, k = RoPE(q), RoPE(k)
    o_t     = Σ_{j≤t} softmax_j(q_t·k_j / √d) v_j          [15, 16]  in each head
    f       = o W_o^T                                                one hop: the direct read of the past
    q', k'  = ā W_fb^T + b_fb                              [14]      `fb_q`, `fb_k`: one head, D wide, no RoPE
    α_tj    = softmax_{j<t}(q'_t·k'_j / √D)                [17]      a second attention, over the strict past
    γ_t     = γ_max tanh(ā_t·w_γ + b_γ)                    [18]      `gamma`: how much of it comes back
    s_t     = f_t + γ_t Σ_{j<t} α_tj s_j                   [19-22]   many hops: the layer reads its outputs
    y       = x + (s ⊙ g) W_out^T + b_out                  [13]

The line for s, over all t, is a triangular system, (I - A) s = f with A = diag(γ) α. Its inverse, I + A + A²
+ ..., sums the paths of every number of hops from j to t: the memory fades as a power of the lag. From ā to
s it is the mixer, [12], in the place of which two others can stand. hidden_forward is this list,
sessa_forward its middle, feedback_forward the line for s.

What stands where, in this order:

    what the layers share  plain or fast, shapes, scratch
    layers                 each forward and backward, in the order in which data meets them
    the model              its weights and activations
    mixers                 ā → s: Sessa's, and attention alone
    forward, backward, update                       to here the architecture is told: read this first
    Mamba-2                the mixer that the paper compares with, plain; nothing else needs it
    the same, fast         panels, tiles, vectors: how the layers above are made fast
    tables, random numbers, errors, the machine, memory, the backend, signals
    files, safetensors, data, words, options
    a run                  its checkpoints, data, ranks, validation, and the places that it writes
    generation, what a run tells, training, the program

Plain is what a layer is, fast is how it is made fast. The functions down to "the same, fast" are plain:
explicit loops, with no more memory than O(T) for a sequence. Where there is a faster way the function
begins with

    if (!plain) return attention_forward_fast(...);

and a test holds the two together. `--plain` turns the fast ways off.

Letters: B sequences, T tokens each, N = B·T rows, D model width, H query heads, G key/value heads, d = D/H
head width, L layers, V vocabulary; `ld` is the number of elements from one row of a matrix to the next,
where it may be some columns of a wider one. Generation calls the same forward passes with the positions
before `first` known and the rows first..T-1 new; in training first is 0.

Arrays are row-major, (B,T,D) means index (b·T + t)·D + i; a linear layer's weight is (out, in). Numbers like
[9] are the paper's equations. Gradients of parameters are accumulated (+=); gradients of activations are
written (=) unless the comment says +=. A layer checks nothing and cannot fail, and none allocates: scratch
comes from the caller. What can fail takes a `char *error` and returns 0, or FAILED (WRONG_OPTION for what
the user typed) with one line there.
*/
#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "-Ofast and -ffast-math hide a loss that is not finite: add -fno-finite-math-only"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "safetensors, token shards and checkpoints are little-endian, and are copied as they are: this is not"
#endif
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64 // files and folders of any size on 32-bit machines too
#endif
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_max_threads(void) { return 1; }
static inline int omp_get_num_threads(void) { return 1; }
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_in_parallel(void) { return 0; }
static inline void omp_set_num_threads(int threads) { (void)threads; }
#endif

#ifndef REAL
#define REAL float // -DREAL=double builds the whole program in float64: gradients are checked there
#endif
typedef REAL real;

// ----------------------------------------------------------------------------
// what the layers share
//
// The switch between plain and fast, and the shapes and the scratch that attention and feedback are given.

static int plain; // 1: every layer by its plain loops. --plain and the tests set it.

static inline int min_int(int a, int b) { return a < b ? a : b; }

// What an attention reads: B sequences whose rows first..T-1 are new; H query heads, of which each group of
// H/G shares one of G heads of keys and values, all d wide; rows of q, k and v lie ld elements apart.
typedef struct { int B, T, first, H, G, d, ld; } Shape;

// Scratch for all threads, and P, the height of the fast way's panels (0: it chooses).
typedef struct { real *scratch; int P; } Work;

// Two rows of T numbers for the calling thread.
static real *two_rows(Work work, int T) { return work.scratch + (int64_t)2 * T * omp_get_thread_num(); }

// The fast ways of the layers below, each with the arguments of the plain one. They stand in "the same,
// fast".
static void embedding_backward_fast(real *dwte, const real *dout, const int *inp, int B, int T, int D);
static void layernorm_backward_fast(real *dx, real *dweight, real *dbias, const real *dout, const real *x,
                                    const real *mean, const real *rstd, const real *weight, int N, int D);
static void linear_forward_fast(real *out, int ld_out, const real *inp, const real *weight, const real *bias,
                                int N, int in, int out_width);
static void linear_backward_fast(real *dinp, real *dweight, real *dbias, const real *dout, int ld_dout,
                                 const real *inp, const real *weight, int N, int in, int out_width);
static void gelu_forward_fast(real *out, const real *inp, int ld, int N, int D);
static void gelu_backward_fast(real *dinp, const real *dout, const real *inp, int ld, int N, int D);
static void attention_forward_fast(real *out, real *stats, Work work, const real *q, const real *k,
                                   const real *v, Shape shape);
static void attention_backward_fast(real *dq, real *dk, real *dv, Work work, const real *dout, real *stats,
                                    const real *q, const real *k, const real *v, Shape shape);
static void gain_backward_fast(real *dx, real *dweight, real *dbias, real *dgamma, const real *gamma,
                               const real *x, const real *weight, real gamma_max, int N, int D);
static void feedback_forward_fast(real *s, real *stats, Work work, const real *f, const real *q,
                                  const real *k, const real *gamma, Shape shape);
static void feedback_backward_fast(real *ds, real *dq, real *dk, real *dgamma, Work work, const real *s,
                                   real *stats, const real *q, const real *k, const real *gamma, Shape shape);
static void crossentropy_forward_fast(real *losses, real *logsumexp, const real *logits, const int *targets,
                                      int N, int V);
static void crossentropy_backward_fast(real *dlogits, const real *logits, const real *logsumexp,
                                       const int *targets, real dloss, int N, int V);
static double norm_fast(const real *x, int64_t n);

// ----------------------------------------------------------------------------
// layers, in the order in which data meets them
//
// A `parallel for` shares out rows, heads or sequences, which do not depend on each other.

// out[bt] = wte[inp[bt]]        inp (B,T) token ids, wte (V,D), out (B,T,D)
static void embedding_forward(real *out, const int *inp, const real *wte, int B, int T, int D) {
    #pragma omp parallel for if (B * T > 1)
    for (int64_t bt = 0; bt < B * T; bt++)
        for (int i = 0; i < D; i++)
            out[bt * D + i] = wte[(int64_t)inp[bt] * D + i];
}

// dwte[inp[bt]] += dout[bt]
static void embedding_backward(real *dwte, const real *dout, const int *inp, int B, int T, int D) {
    if (!plain) return embedding_backward_fast(dwte, dout, inp, B, T, D);
    for (int64_t bt = 0; bt < B * T; bt++)
        for (int i = 0; i < D; i++)
            dwte[(int64_t)inp[bt] * D + i] += dout[bt * D + i];
}

// The SplitMix64 mixer: a bijection of 64-bit words that passes for random (Steele, Lea, Flood: Fast
// splittable pseudorandom number generators, OOPSLA 2014; constants by Vigna).
static inline uint64_t splitmix64(uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// A dropout mask is a function of (seed, micro-batch, place, index), not stored: the backward pass asks it
// again. probability 0 is off. first: the index of the first number, where these rows are not a micro-batch's
// first.
typedef struct { double probability; uint64_t seed, micro_step, first; } Dropout;
static const Dropout no_dropout = {0, 0, 0, 0};

// x_i *= mask_i, mask_i = 0 with the given probability p, else 1/(1-p). x (n). Its own backward pass, on the
// gradient.
static void dropout(real *x, int64_t n, Dropout drop, int place) {
    if (drop.probability <= 0) return;
    uint64_t key = splitmix64(splitmix64(splitmix64(drop.seed) ^ drop.micro_step) ^ (uint64_t)place);
    uint64_t threshold = (uint64_t)(drop.probability * 4294967296.0);
    real scale = (real)(1 / (1 - drop.probability));
    #pragma omp parallel for
    for (int64_t i = 0; i < n; i++) {
        int kept = (splitmix64(key ^ (drop.first + (uint64_t)i)) >> 32) >= threshold;
        x[i] *= kept ? scale : 0;
    }
}

// [9]  out = (x - mean)·rstd ⊙ weight + bias, rstd = 1/√(variance + 1e-5), over the D numbers of each row
// x, out (N,D), mean and rstd (N): kept for the backward pass, which needs no more than x beside them.
static void layernorm_forward(real *out, real *mean, real *rstd, const real *x, const real *weight,
                              const real *bias, int N, int D) {
    #pragma omp parallel for if (N > 1)
    for (int64_t n = 0; n < N; n++) {
        const real *row = x + n * D;
        real sum = 0, squares = 0;
        for (int i = 0; i < D; i++) sum += row[i];
        real m = sum / D;
        for (int i = 0; i < D; i++)
            squares += (row[i] - m) * (row[i] - m);
        real r = 1 / (real)sqrt((double)(squares / D) + 1e-5);
        for (int i = 0; i < D; i++)
            out[n * D + i] = (row[i] - m) * r * weight[i] + bias[i];
        mean[n] = m;
        rstd[n] = r;
    }
}

// With x̂ = (x - mean)·rstd and w = dout ⊙ weight:
//     dx += rstd·(w - mean(w) - x̂·mean(w ⊙ x̂))      += because x also goes past the layer
//     dweight += Σ_n dout ⊙ x̂,   dbias += Σ_n dout
static void layernorm_backward(real *dx, real *dweight, real *dbias, const real *dout, const real *x,
                               const real *mean, const real *rstd, const real *weight, int N, int D) {
    if (!plain) return layernorm_backward_fast(dx, dweight, dbias, dout, x, mean, rstd, weight, N, D);
    for (int64_t n = 0; n < N; n++) {
        real mean_w = 0, mean_wx = 0;
        for (int i = 0; i < D; i++) {
            real xhat = (x[n * D + i] - mean[n]) * rstd[n], w = dout[n * D + i] * weight[i];
            mean_w += w / D;
            mean_wx += w * xhat / D;
        }
        for (int i = 0; i < D; i++) {
            real xhat = (x[n * D + i] - mean[n]) * rstd[n], w = dout[n * D + i] * weight[i];
            dx[n * D + i] += rstd[n] * (w - mean_w - xhat * mean_wx);
            dweight[i] += dout[n * D + i] * xhat;
            dbias[i] += dout[n * D + i];
        }
    }
}

// out = inp·weight^T + bias     inp (N,in), weight (out_width,in), bias (out_width) or NULL, out
// (N,out_width) ld_out: elements from row to row of out, which may be some columns of a wider matrix.
static void linear_forward(real *out, int ld_out, const real *inp, const real *weight, const real *bias,
                           int N, int in, int out_width) {
    if (!plain) return linear_forward_fast(out, ld_out, inp, weight, bias, N, in, out_width);
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++)
        for (int64_t o = 0; o < out_width; o++) {
            real sum = bias ? bias[o] : 0;
            for (int i = 0; i < in; i++)
                sum += inp[n * in + i] * weight[o * in + i];
            out[n * ld_out + o] = sum;
        }
}

// dinp = dout·weight,   dweight += dout^T·inp,   dbias += Σ_n dout (NULL: no bias)
static void linear_backward(real *dinp, real *dweight, real *dbias, const real *dout, int ld_dout,
                            const real *inp, const real *weight, int N, int in, int out_width) {
    if (!plain)
        return linear_backward_fast(dinp, dweight, dbias, dout, ld_dout, inp, weight, N, in, out_width);
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        for (int i = 0; i < in; i++) dinp[n * in + i] = 0;
        for (int64_t o = 0; o < out_width; o++)
            for (int i = 0; i < in; i++)
                dinp[n * in + i] += dout[n * ld_dout + o] * weight[o * in + i];
    }
    #pragma omp parallel for
    for (int64_t o = 0; o < out_width; o++)
        for (int64_t n = 0; n < N; n++) {
            for (int i = 0; i < in; i++)
                dweight[o * in + i] += dout[n * ld_dout + o] * inp[n * in + i];
            if (dbias) dbias[o] += dout[n * ld_dout + o];
        }
}

// [11]  out = GELU(inp) = inp·Φ(inp), the exact one, with Φ(x) = (1 + erf(x/√2))/2, the normal distribution
// inp: D of the ld columns of each of N rows, out (N,D)
static void gelu_forward(real *out, const real *inp, int ld, int N, int D) {
    if (!plain) return gelu_forward_fast(out, inp, ld, N, D);
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++)
        for (int i = 0; i < D; i++) {
            double x = (double)inp[n * ld + i];
            out[n * D + i] = (real)(x * 0.5 * erfc(-x / sqrt(2)));
        }
}

// dinp = dout·(Φ(inp) + inp·φ(inp)), φ(x) = e^(-x²/2)/√(2π) the normal density; dinp with the layout of inp
static void gelu_backward(real *dinp, const real *dout, const real *inp, int ld, int N, int D) {
    if (!plain) return gelu_backward_fast(dinp, dout, inp, ld, N, D);
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++)
        for (int i = 0; i < D; i++) {
            double x = (double)inp[n * ld + i];
            double cdf = 0.5 * erfc(-x / sqrt(2));
            double density = exp(-x * x / 2) / sqrt(2 * 3.14159265358979323846);
            dinp[n * ld + i] = dout[n * D + i] * (real)(cdf + x * density);
        }
}

// cosine and sine (T, d/2) of the angles t·10000^(-2i/d), computed in double
static void rope_table(real *cosine, real *sine, int T, int d) {
    #pragma omp parallel for
    for (int64_t t = 0; t < T; t++)
        for (int i = 0; i < d / 2; i++) {
            double angle = (double)t * pow(10000, -2.0 * i / d);
            cosine[t * (d / 2) + i] = (real)cos(angle);
            sine[t * (d / 2) + i] = (real)sin(angle);
        }
}

// RoPE: turns each pair (x_2i, x_2i+1) of each head by the angle of its position t, in place. x: the first
// heads·d of the ld columns of N rows, of which row n stands at position first + n mod T. direction 1, or -1
// to turn back. The scores q_t·k_j then depend on t - j: that is how attention knows the order of its tokens.
static void rope_forward(real *x, int ld, const real *cosine, const real *sine, int N, int T, int heads,
                         int d, int first, real direction) {
    #pragma omp parallel for if (N > 1)
    for (int64_t n = 0; n < N; n++) {
        int64_t t = first + n % T;
        const real *c = cosine + t * (d / 2), *s = sine + t * (d / 2);
        for (int h = 0; h < heads; h++) {
            real *pair = x + n * ld + h * d;
            for (int i = 0; i < d / 2; i++) {
                real even = pair[2 * i], odd = pair[2 * i + 1];
                pair[2 * i] = even * c[i] - direction * odd * s[i];
                pair[2 * i + 1] = direction * even * s[i] + odd * c[i];
            }
        }
    }
}

// A rotation's derivative is the rotation back, in place on the gradient.
static void rope_backward(real *dx, int ld, const real *cosine, const real *sine, int N, int T, int heads,
                          int d) {
    rope_forward(dx, ld, cosine, sine, N, T, heads, d, 0, -1);
}

// weights[j] = softmax_j(q·k_j / √d) for the keys j < n, the rows of k, ld elements apart
// stats keeps the row's largest logit and 1/Σ_j e^(logit - largest): all that it takes to compute a weight
// again. With no key there is no weight, and 1/Σ is 0.
static void softmax_row(real *weights, real stats[2], const real *q, const real *k, int ld, int d, int n) {
    real scale = 1 / (real)sqrt((double)d), largest = 0, sum = 0;
    for (int64_t j = 0; j < n; j++) {
        real dot = 0;
        for (int i = 0; i < d; i++) dot += q[i] * k[j * ld + i];
        weights[j] = scale * dot;
        if (j == 0 || weights[j] > largest) largest = weights[j];
    }
    for (int j = 0; j < n; j++) {
        weights[j] = (real)exp((double)(weights[j] - largest));
        sum += weights[j];
    }
    for (int j = 0; j < n; j++) weights[j] /= sum;
    stats[0] = largest;
    stats[1] = n ? 1 / sum : 0;
}

// [15, 16]  o_t = Σ_{j≤t} p_tj v_j with p_tj = softmax_{j≤t}(q_t·k_j / √d), head h with the keys and values
// of group h/(H/G). q: H heads of d columns for the positions first..T-1; k, v: G heads for the positions
// 0..T-1. out (B,T-first,H·d). stats (B,H,T-first,2) is kept for the backward pass, see softmax_row.
// O(T²·H·d) a sequence.
static void attention_forward(real *out, real *stats, Work work, const real *q, const real *k, const real *v,
                              Shape shape) {
    if (!plain) return attention_forward_fast(out, stats, work, q, k, v, shape);
    int T = shape.T, H = shape.H, d = shape.d, ld = shape.ld, first = shape.first, rows = T - first;
    #pragma omp parallel for
    for (int item = 0; item < shape.B * H; item++) {
        int64_t b = item / H, h = item % H, group = h / (H / shape.G);
        const real *k_b = k + b * T * ld + group * d, *v_b = v + b * T * ld + group * d;
        real *p = two_rows(work, T), *stats_h = stats + (int64_t)2 * item * rows;
        for (int64_t t = first; t < T; t++) {
            int64_t row = b * rows + t - first;
            real *o_t = out + (row * H + h) * d;
            softmax_row(p, stats_h + 2 * (t - first), q + row * ld + h * d, k_b, ld, d, (int)t + 1);
            for (int i = 0; i < d; i++) o_t[i] = 0;
            for (int64_t j = 0; j <= t; j++)
                for (int i = 0; i < d; i++)
                    o_t[i] += p[j] * v_b[j * ld + i];
        }
    }
}

// With the weights p_tj of the forward pass, and dout_t the gradient of o_t:
//     dv_j = Σ_t p_tj dout_t,   dp_tj = dout_t·v_j,   dlogit_tj = p_tj (dp_tj - Σ_i p_ti dp_ti),
//     dq_t = Σ_j dlogit_tj k_j / √d,   dk_j = Σ_t dlogit_tj q_t / √d
// dq, dk, dv have the layout of q, k, v. The heads of a group add to the same dk and dv: one thread takes
// them all.
static void attention_backward(real *dq, real *dk, real *dv, Work work, const real *dout, real *stats,
                               const real *q, const real *k, const real *v, Shape shape) {
    if (!plain) return attention_backward_fast(dq, dk, dv, work, dout, stats, q, k, v, shape);
    int T = shape.T, H = shape.H, G = shape.G, d = shape.d, ld = shape.ld;
    real scale = 1 / (real)sqrt((double)d);
    #pragma omp parallel for
    for (int item = 0; item < shape.B * G; item++) {
        int64_t b = item / G, group = item % G;
        int64_t keys = b * T * ld + group * d; // where this group's columns begin
        const real *k_b = k + keys, *v_b = v + keys;
        real *dk_b = dk + keys, *dv_b = dv + keys, *p = two_rows(work, T), *dp = p + T;
        for (int64_t j = 0; j < T; j++)
            for (int i = 0; i < d; i++)
                dk_b[j * ld + i] = dv_b[j * ld + i] = 0;
        for (int64_t h = group * (H / G); h < (group + 1) * (H / G); h++)
            for (int64_t t = 0; t < T; t++) {
                int64_t row = b * T + t;
                const real *q_t = q + row * ld + h * d, *dout_t = dout + (row * H + h) * d;
                real *dq_t = dq + row * ld + h * d, sum = 0;
                softmax_row(p, stats + 2 * ((b * H + h) * T + t), q_t, k_b, ld, d, (int)t + 1);
                for (int64_t j = 0; j <= t; j++) {
                    dp[j] = 0;
                    for (int i = 0; i < d; i++)
                        dp[j] += dout_t[i] * v_b[j * ld + i];
                    for (int i = 0; i < d; i++)
                        dv_b[j * ld + i] += p[j] * dout_t[i];
                    sum += p[j] * dp[j];
                }
                for (int i = 0; i < d; i++) dq_t[i] = 0;
                for (int64_t j = 0; j <= t; j++) {
                    real dlogit = p[j] * (dp[j] - sum);
                    for (int i = 0; i < d; i++)
                        dq_t[i] += scale * dlogit * k_b[j * ld + i];
                    for (int i = 0; i < d; i++)
                        dk_b[j * ld + i] += scale * dlogit * q_t[i];
                }
            }
    }
}

// [18]  gamma_t = gamma_max · tanh(x_t·weight + bias)      x (N,D), weight (D), bias (1), gamma (N)
// |gamma| < gamma_max. bias starts at 1: a new layer listens to its past outputs, with 0.76 gamma_max, before
// it has learnt when to.
static void gain_forward(real *gamma, const real *x, const real *weight, const real *bias, real gamma_max,
                         int N, int D) {
    #pragma omp parallel for if (N > 1)
    for (int64_t n = 0; n < N; n++) {
        real dot = bias[0];
        for (int i = 0; i < D; i++) dot += x[n * D + i] * weight[i];
        gamma[n] = gamma_max * (real)tanh((double)dot);
    }
}

// With dpre_t = dgamma_t · gamma_max (1 - (gamma_t/gamma_max)²):
//     dx_t += dpre_t · weight,   dweight += Σ_t dpre_t x_t,   dbias += Σ_t dpre_t         dgamma becomes dpre
static void gain_backward(real *dx, real *dweight, real *dbias, real *dgamma, const real *gamma,
                          const real *x, const real *weight, real gamma_max, int N, int D) {
    if (!plain) return gain_backward_fast(dx, dweight, dbias, dgamma, gamma, x, weight, gamma_max, N, D);
    for (int64_t n = 0; n < N; n++) {
        real ratio = gamma[n] / gamma_max;
        dgamma[n] *= gamma_max * (1 - ratio * ratio);
        dbias[0] += dgamma[n];
        for (int i = 0; i < D; i++) {
            dx[n * D + i] += dgamma[n] * weight[i];
            dweight[i] += dgamma[n] * x[n * D + i];
        }
    }
}

// [17, 19-22]  The feedback path:
//     s_t = f_t + gamma_t Σ_{j<t} α_tj s_j   with   α_tj = softmax_{j<t}(q'_t·k'_j / √D)
//
// Every row reads the rows of s above it, which have read those above them. The first three, written out:
//     s_0 = f_0                                           row 0 has no past
//     s_1 = f_1 + γ_1 s_0                                 one past row: α_10 is 1
//         = f_1 + γ_1 f_0
//     s_2 = f_2 + γ_2 (α_20 s_0 + α_21 s_1)
//         = f_2 + γ_2 α_21 f_1 + (γ_2 α_20 + γ_2 α_21 γ_1) f_0
// so s_2 hears f_1 by the path 2→1, and f_0 by two: 2→0 in one hop, and 2→1→0 in two. Over a lag of t there
// are 2^(t-1) paths, and the solve sums them all: (I - A) s = f with A_tj = gamma_t α_tj, strictly
// lower-triangular, solved from the first row to the last by substitution. |gamma| < 1 keeps s bounded: |s| ≤
// max|f| / (1 - max|gamma|).
//
// q' and k' are one head of all D columns and not one a head, since one s comes back. They have no RoPE (the
// paper, 3.3): a row chooses by content which outputs it hears again. Order comes in by the triangle itself:
// even of a constant f the solve makes an s that rises with t (Corollary I.8). It costs what one more
// attention of one head costs, O(T²·D) a sequence; only that the rows must come one after the other is new.
//
// shape: H = G = 1 and d = D. f (B,T-first,D); q', k': D columns of rows ld apart, q' for the positions
// first..T-1 and k' for 0..T-1; gamma (B,T-first), stats (B,T-first,2); s (B,T,D), its rows before first
// known. Kept for the backward pass: q', k', gamma, stats and s, all O(T).
static void feedback_forward(real *s, real *stats, Work work, const real *f, const real *q, const real *k,
                             const real *gamma, Shape shape) {
    if (!plain) return feedback_forward_fast(s, stats, work, f, q, k, gamma, shape);
    int T = shape.T, D = shape.d, ld = shape.ld, first = shape.first;
    #pragma omp parallel for
    for (int64_t b = 0; b < shape.B; b++) {
        real *s_b = s + b * T * D, *alpha = two_rows(work, T);
        for (int64_t t = first; t < T; t++) {
            int64_t row = b * (T - first) + t - first; // of f, q', gamma and stats
            real *s_t = s_b + t * D;
            softmax_row(alpha, stats + 2 * row, q + row * ld, k + b * T * ld, ld, D, (int)t);
            for (int i = 0; i < D; i++) s_t[i] = f[row * D + i];
            for (int64_t j = 0; j < t; j++)
                for (int i = 0; i < D; i++)
                    s_t[i] += gamma[row] * alpha[j] * s_b[j * D + i];
        }
    }
}

// The gradient of f is λ with (I - A)^T λ = ds, for s = (I - A)^-1 f: the same system transposed, solved from
// the last row to the first, where each row hands to the rows above it what it took from them. When the loop
// comes to row t, all rows below have handed it theirs, so λ_t is whole, and every gradient follows from A_tj
// = gamma_t α_tj and dA_tj = λ_t·s_j without a second solve:
//     df_t       = λ_t
//     dgamma_t   = Σ_j α_tj dA_tj = δ_t
//     dlogit_tj  = gamma_t α_tj (dA_tj - δ_t)      the softmax's backward pass needs the same sum δ_t
//     dq'_t      = Σ_j dlogit_tj k'_j / √D,   dk'_j = Σ_t dlogit_tj q'_t / √D
//     λ_j       += gamma_t α_tj λ_t
// ds (B,T,D) becomes df; s (B,T,D); dgamma (B,T); dq', dk' with the layout of q', k'.
static void feedback_backward(real *ds, real *dq, real *dk, real *dgamma, Work work, const real *s,
                              real *stats, const real *q, const real *k, const real *gamma, Shape shape) {
    if (!plain) return feedback_backward_fast(ds, dq, dk, dgamma, work, s, stats, q, k, gamma, shape);
    int T = shape.T, D = shape.d, ld = shape.ld;
    real scale = 1 / (real)sqrt((double)D);
    #pragma omp parallel for
    for (int64_t b = 0; b < shape.B; b++) {
        const real *s_b = s + b * T * D, *k_b = k + b * T * ld;
        real *lambda = ds + b * T * D, *dk_b = dk + b * T * ld, *alpha = two_rows(work, T), *dA = alpha + T;
        for (int64_t j = 0; j < T; j++)
            for (int i = 0; i < D; i++) dk_b[j * ld + i] = 0;
        for (int64_t t = T - 1; t >= 0; t--) {
            int64_t row = b * T + t;
            const real *q_t = q + row * ld, *lambda_t = lambda + t * D;
            real *dq_t = dq + row * ld, delta = 0;
            softmax_row(alpha, stats + 2 * row, q_t, k_b, ld, D, (int)t);
            for (int64_t j = 0; j < t; j++) {
                dA[j] = 0;
                for (int i = 0; i < D; i++)
                    dA[j] += lambda_t[i] * s_b[j * D + i];
                delta += alpha[j] * dA[j];
            }
            dgamma[row] = delta;
            for (int i = 0; i < D; i++) dq_t[i] = 0;
            for (int64_t j = 0; j < t; j++) {
                real A = gamma[row] * alpha[j], dlogit = A * (dA[j] - delta);
                for (int i = 0; i < D; i++)
                    dq_t[i] += scale * dlogit * k_b[j * ld + i];
                for (int i = 0; i < D; i++)
                    dk_b[j * ld + i] += scale * dlogit * q_t[i];
                for (int i = 0; i < D; i++)
                    lambda[j * D + i] += A * lambda_t[i];
            }
        }
    }
}

// [13]  out = s ⊙ g       s, out (N,D), g: D of the ld columns of each row
static void gate_forward(real *out, const real *s, const real *g, int ld, int N, int D) {
    #pragma omp parallel for if (N > 1)
    for (int64_t n = 0; n < N; n++)
        for (int i = 0; i < D; i++)
            out[n * D + i] = s[n * D + i] * g[n * ld + i];
}

// ds = dout ⊙ g,   dg = dout ⊙ s       ds may be dout itself
static void gate_backward(real *ds, real *dg, const real *dout, const real *s, const real *g, int ld, int N,
                          int D) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++)
        for (int i = 0; i < D; i++) {
            real grad = dout[n * D + i];
            dg[n * ld + i] = grad * s[n * D + i];
            ds[n * D + i] = grad * g[n * ld + i];
        }
}

// [13]  out = x + branch  (n). Its backward pass hands dout to both.
static void residual_forward(real *out, const real *x, const real *branch, int64_t n) {
    #pragma omp parallel for if (n > 8192)
    for (int64_t i = 0; i < n; i++) out[i] = x[i] + branch[i];
}

// losses[n] = logsumexp_n - logits[n][target_n], in nats, 0 where target_n is -1. logits (N,V), logsumexp (N)
// is kept.
static void crossentropy_forward(real *losses, real *logsumexp, const real *logits, const int *targets, int N,
                                 int V) {
    if (!plain) return crossentropy_forward_fast(losses, logsumexp, logits, targets, N, V);
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const real *row = logits + n * V;
        real largest = row[0], sum = 0;
        for (int i = 1; i < V; i++)
            largest = row[i] > largest ? row[i] : largest;
        for (int i = 0; i < V; i++)
            sum += (real)exp((double)(row[i] - largest));
        logsumexp[n] = largest + (real)log((double)sum);
        losses[n] = targets[n] < 0 ? 0 : logsumexp[n] - row[targets[n]];
    }
}

// dlogits = (softmax(logits) - onehot(target)) · dloss, 0 where the target is -1. dlogits may be logits
// itself.
static void crossentropy_backward(real *dlogits, const real *logits, const real *logsumexp,
                                  const int *targets, real dloss, int N, int V) {
    if (!plain) return crossentropy_backward_fast(dlogits, logits, logsumexp, targets, dloss, N, V);
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++)
        for (int i = 0; i < V; i++) {
            real p = (real)exp((double)(logits[n * V + i] - logsumexp[n]));
            real counted = targets[n] < 0 ? 0 : dloss;
            dlogits[n * V + i] = (p - (i == targets[n])) * counted;
        }
}

// ----------------------------------------------------------------------------
// the model: names, shapes and places of its tensors
//
// All parameters lie in one block of numbers and all activations in another; a table says what stands where.
// Files, initial values, AdamW and the tests go through the tables.

// The value; uniform in ± the value; of that standard deviation; with e^x uniform in 1..16; with softplus(x)
// log-uniform in 0.001..0.1.
typedef enum { INIT_CONSTANT, INIT_UNIFORM, INIT_NORMAL, INIT_LOG_DECAY, INIT_STEP_BIAS } Init;

// One tensor of a block of numbers. An activation may be some columns of a wider one: its stride is the wider
// row.
typedef struct {
    char name[64];
    int n_dims;
    int64_t shape[3], count, offset, stride;
    Init init;
    double init_value;
} Tensor;

typedef struct {
    Tensor *rows;
    int n, room;
    int64_t count;   // numbers in the block; -1 when they are too many to be addressed
    int64_t *places; // of the rows in the block, where they are not their offsets; else NULL
    Tensor *last;    // the row added last
    Tensor nowhere;  // where rows go once memory is exhausted; the table is then `incomplete`
    int incomplete;
} Table;

typedef struct {
    int vocab_size, d_model, n_layers, n_heads, n_kv_heads, max_seq_len;
    double gamma_max;
    int mixer;               // index into mixers[]
    int head_dim, state_dim; // mamba2: width of a head, numbers of state for a channel
    int no_rope;             // 1: q and k as they are; the author's use_forward_rope=False
} Config;

// One layer's parameters. The projections stand next to each other, so that one product computes all of them:
// W_proj holds q_proj (D,D), k_proj (G·d,D), v_proj (G·d,D) and, in a Sessa layer, proj_fb (2D,D): q' rows,
// then k'.
typedef struct {
    real *ln_weight, *ln_bias;       // (D)
    real *W_in, *b_in;               // (2D,D), (2D): a, then g
    real *W_proj, *b_proj;           // (proj_width,D), (proj_width)
    real *W_o;                       // (D,D), NULL with one head
    real *gamma_weight, *gamma_bias; // (1,D), ()
    real *W_out, *b_out;             // (D,D), (D)
    // mamba2, see there
    real *in_proj, *out_proj;
    real *conv_weight, *conv_bias;
    real *step_bias, *A_log, *skip;
    real *norm_weight;
} LayerWeights;

typedef struct {
    real *wte; // (V,D): embedding and head
    LayerWeights *layers;
    real *ln_f_weight, *ln_f_bias; // (D)
} Weights;

// One layer's activations, of N = B·T rows. Some share a buffer, or one of all layers: see carve_activations.
typedef struct {
    real *x, *y;             // (N,D) the layer's input and output, the next one's input
    real *ln_mean, *ln_rstd; // (N)
    real *ln;                // (N,D) LayerNorm(x)
    real *ag;                // (N,2D) a before GELU, then g
    real *abar;              // (N,D) GELU(a)
    real *proj;              // (N,proj_width) q, k (after RoPE), v, q', k'
    real *o, *stats;         // (N,D), (B,H,T,2) the direct read; no o with one head, where it is f
    real *f;                 // (N,D) o W_o^T
    real *gamma, *fb_stats;  // (N), (N,2)
    real *s;                 // (N,D) the mixer's output
    real *gated, *branch;    // (N,D) s ⊙ g, and what is added to x
    // mamba2, see there
    real *xbc, *step, *normed;
    real *states, *y_scan, *rms;
    real *tail;
} LayerActivations;

typedef struct {
    LayerActivations *layers;
    real *ln_mean, *ln_rstd, *ln_f; // (N), (N), (N,D) of the last layer's output
    real *logits;                   // (N,V), which the backward pass turns into their gradient
    real *losses, *loss_logsumexp;  // (N)
    real *dx;                       // (N,D) gradient on the residual path; from here on: backward pass
    real *ds, *dout, *dabar;        // (N,D), each of several gradients in turn: see model_backward
    real *dag, *dproj, *dgamma;     // (N,2D), (N,proj_width), (N)
    real *dy, *dxbc, *dstep;        // mamba2
    real *cosine, *sine;            // (T,d/2)
    real *scratch;                  // of attention and feedback, or of the scan, for each thread
} Activations;

// What the memory is for. GENERATE keeps every layer's projections and outputs of all T positions: they are
// the cache.
typedef enum { GENERATE, EVALUATE, TRAIN, KEEP_ALL } Mode; // KEEP_ALL: TRAIN, no buffer shared, for tests

typedef struct {
    Config config;
    int B, T;                   // the largest batch
    double bytes;               // of memory that it takes
    Table table, acts_table;    // of the parameters (gradients and moments alike), of the activations
    real *params;               // one allocation each; the next three only for training
    real *grads, *exp_avg, *exp_avg_sq;
    real *acts_block;
    Weights weights, grad;
    Activations acts;
    int *inputs, *targets;      // (B,T), kept for the backward pass
    int batch_B, batch_T;       // of the last forward pass
    Dropout drop;               // of the last forward pass
    int loss_alone;             // no backward pass follows the forward passes: nothing is made for it alone
    int P;                      // panel height of the fast attention and feedback, 0: chosen by shape
} Model;

// ----------------------------------------------------------------------------
// mixers: what stands between GELU and gate, abar → s
//
// Sessa's is direct_read_forward and then the feedback path. The mixer "attention" is the direct read alone.

enum { SESSA, ATTENTION, MAMBA2, N_MIXERS };

// The width of the projections of abar: q, k, v and, in a Sessa layer, q', k'; z, x, b, c, step in a mamba2
// layer
static int proj_width(const Config *c) {
    int kv_width = c->n_kv_heads * (c->d_model / c->n_heads);
    if (c->mixer == MAMBA2) return 4 * c->d_model + 2 * c->state_dim + 2 * c->d_model / c->head_dim;
    return c->d_model + 2 * kv_width + (c->mixer == SESSA ? 2 * c->d_model : 0);
}

// The shapes of a model's two attentions, over B sequences whose rows first..T-1 are new.
static Shape direct_shape(const Config *c, int B, int T, int first) {
    int d = c->d_model / c->n_heads;
    Shape shape = {B, T, first, c->n_heads, c->n_kv_heads, d, proj_width(c)};
    return shape;
}
static Shape feedback_shape(const Config *c, int B, int T, int first) {
    Shape shape = {B, T, first, 1, 1, c->d_model, proj_width(c)};
    return shape;
}

static Work work_of(const Model *m) {
    Work work = {m->acts.scratch, m->P};
    return work;
}

// [14-16]  abar → f: projections, RoPE, attention, W_o. In a Sessa layer the same product gives q' and k'.
static void direct_read_forward(Model *m, int l, int B, int T, int first, real *f) {
    const Config *c = &m->config;
    Shape shape = direct_shape(c, B, T, first);
    int D = c->d_model, d = shape.d, ld = shape.ld, N = B * (T - first);
    int qk_heads = shape.H + shape.G; // the heads of q and of k lie side by side
    LayerWeights *w = &m->weights.layers[l];
    LayerActivations *a = &m->acts.layers[l];
    real *q = a->proj + (int64_t)first * ld, *k = a->proj + D, *v = k + shape.G * d;
    real *o = w->W_o ? a->o : f;
    linear_forward(q, ld, a->abar, w->W_proj, w->b_proj, N, D, ld); // [14]
    if (!c->no_rope)
        rope_forward(q, ld, m->acts.cosine, m->acts.sine, N, T - first, qk_heads, d, first, 1);
    attention_forward(o, a->stats, work_of(m), q, k, v, shape); // [15, 16]
    if (w->W_o) linear_forward(f, D, o, w->W_o, NULL, N, D, D);
}

// df (in acts.ds) → dabar, through W_o, attention, RoPE and the projections; q' and k' have left theirs in
// dproj before
static void direct_read_backward(Model *m, int l, int B, int T) {
    const Config *c = &m->config;
    Shape shape = direct_shape(c, B, T, 0);
    int D = c->d_model, d = shape.d, ld = shape.ld, N = B * T, qk_heads = shape.H + shape.G;
    LayerWeights *w = &m->weights.layers[l], *dw = &m->grad.layers[l];
    LayerActivations *a = &m->acts.layers[l];
    Activations *acts = &m->acts;
    const real *q = a->proj, *k = q + D, *v = k + shape.G * d;
    real *dq = acts->dproj, *dk = dq + D, *dv = dk + shape.G * d;
    real *df = acts->ds, *dout = w->W_o ? acts->dout : df;
    if (w->W_o) linear_backward(dout, dw->W_o, NULL, df, D, a->o, w->W_o, N, D, D);
    attention_backward(dq, dk, dv, work_of(m), dout, a->stats, q, k, v, shape);
    if (!c->no_rope) rope_backward(dq, ld, acts->cosine, acts->sine, N, T, qk_heads, d);
    linear_backward(acts->dabar, dw->W_proj, dw->b_proj, acts->dproj, ld, a->abar, w->W_proj, N, D, ld);
}

// Without the feedback path s is f.
static void attention_mixer_forward(Model *m, int l, int B, int T, int first) {
    real *s = m->acts.layers[l].s + (int64_t)first * m->config.d_model;
    direct_read_forward(m, l, B, T, first, s);
}

// [14-22]  abar → s: the direct read, the gain, the feedback path
static void sessa_forward(Model *m, int l, int B, int T, int first) {
    Shape shape = feedback_shape(&m->config, B, T, first);
    int D = shape.d, ld = shape.ld, N = B * (T - first);
    real gamma_max = (real)m->config.gamma_max;
    LayerWeights *w = &m->weights.layers[l];
    LayerActivations *a = &m->acts.layers[l];
    const real *fb_q = a->proj + (int64_t)first * ld + ld - 2 * D, *fb_k = a->proj + ld - D;
    direct_read_forward(m, l, B, T, first, a->f); // [14-16]
    gain_forward(a->gamma, a->abar, w->gamma_weight, w->gamma_bias, gamma_max, N, D); // [18]
    feedback_forward(a->s, a->fb_stats, work_of(m), a->f, fb_q, fb_k, a->gamma, shape); // [17, 19-22]
}

// ds (in acts.ds, where it becomes df) → dabar
static void sessa_backward(Model *m, int l, int B, int T) {
    Shape shape = feedback_shape(&m->config, B, T, 0);
    int D = shape.d, ld = shape.ld, N = B * T;
    real gamma_max = (real)m->config.gamma_max;
    LayerWeights *w = &m->weights.layers[l], *dw = &m->grad.layers[l];
    LayerActivations *a = &m->acts.layers[l];
    Activations *acts = &m->acts;
    const real *fb_q = a->proj + ld - 2 * D, *fb_k = a->proj + ld - D;
    real *dfb_q = acts->dproj + ld - 2 * D, *dfb_k = acts->dproj + ld - D;
    feedback_backward(acts->ds, dfb_q, dfb_k, acts->dgamma, work_of(m), a->s, a->fb_stats, fb_q, fb_k,
                      a->gamma, shape);
    direct_read_backward(m, l, B, T);
    gain_backward(acts->dabar, dw->gamma_weight, dw->gamma_bias, acts->dgamma, a->gamma, a->abar,
                  w->gamma_weight, gamma_max, N, D);
}

// Mamba-2's stand in a section of their own, behind AdamW.
static void mamba2_forward(Model *m, int l, int B, int T, int first);
static void mamba2_backward(Model *m, int l, int B, int T);

// A mixer is a forward pass over the new positions first..T-1, which also serves generation token by token,
// and a backward pass over all.
typedef struct {
    const char *name;
    void (*forward)(Model *model, int layer, int B, int T, int first); // acts.layers[layer].abar → .s
    void (*backward)(Model *model, int layer, int B, int T);           // acts.ds → acts.dabar, gradients +=
} Mixer;

static const Mixer mixers[N_MIXERS] = {
    {"sessa", sessa_forward, sessa_backward},
    {"attention", attention_mixer_forward, direct_read_backward},
    {"mamba2", mamba2_forward, mamba2_backward},
};

// The index of a mixer, -1 if there is none of this name.
static int find_mixer(const char *name) {
    for (int i = 0; i < N_MIXERS; i++)
        if (!strcmp(mixers[i].name, name)) return i;
    return -1;
}

// ----------------------------------------------------------------------------
// forward, backward, update

// ids → the last layer's output, normalised, for the positions first..T-1 of B sequences. first > 0: B is 1,
// and every layer still holds the projections and outputs of the positions before.
static void hidden_forward(Model *m, const int *inputs, int B, int T, int first, Dropout drop) {
    const Config *c = &m->config;
    int D = c->d_model, N = B * (T - first), last = c->n_layers - 1;
    int64_t numbers = (int64_t)N * D;
    const Weights *w = &m->weights;
    Activations *acts = &m->acts;
    embedding_forward(acts->layers[0].x, inputs, w->wte, B, T - first, D);
    dropout(acts->layers[0].x, numbers, drop, 0);
    for (int l = 0; l <= last; l++) {
        const LayerWeights *wl = &w->layers[l];
        LayerActivations *a = &acts->layers[l];
        const real *s = a->s + (int64_t)first * D, *g = a->ag + D;
        layernorm_forward(a->ln, a->ln_mean, a->ln_rstd, a->x, wl->ln_weight, wl->ln_bias, N, D);     // [9]
        linear_forward(a->ag, 2 * D, a->ln, wl->W_in, wl->b_in, N, D, 2 * D);                         // [10]
        gelu_forward(a->abar, a->ag, 2 * D, N, D);                                                    // [11]
        mixers[c->mixer].forward(m, l, B, T, first);                                                  // [12]
        gate_forward(a->gated, s, g, 2 * D, N, D);                                                    // [13]
        dropout(a->gated, numbers, drop, 1 + 2 * l);
        linear_forward(a->branch, D, a->gated, wl->W_out, wl->b_out, N, D, D);
        dropout(a->branch, numbers, drop, 2 + 2 * l);
        residual_forward(a->y, a->x, a->branch, numbers);
    }
    const real *y = acts->layers[last].y;
    layernorm_forward(acts->ln_f, acts->ln_mean, acts->ln_rstd, y, w->ln_f_weight, w->ln_f_bias, N, D);
}

// The losses of all targets that are not -1, and what model_backward needs.
static void model_forward(Model *m, const int *inputs, const int *targets, int B, int T, Dropout drop) {
    int D = m->config.d_model, V = m->config.vocab_size, N = B * T;
    memcpy(m->inputs, inputs, sizeof(int) * (size_t)N);
    memcpy(m->targets, targets, sizeof(int) * (size_t)N);
    m->batch_B = B;
    m->batch_T = T;
    m->drop = drop;
    hidden_forward(m, m->inputs, B, T, 0, drop);
    linear_forward(m->acts.logits, V, m->acts.ln_f, m->weights.wte, NULL, N, D, V);
    crossentropy_forward(m->acts.losses, m->acts.loss_logsumexp, m->acts.logits, m->targets, N, V);
}

// The sum of the losses of the last model_forward.
static double model_loss(Model *m) {
    double sum = 0;
    for (int n = 0; n < m->batch_B * m->batch_T; n++)
        sum += (double)m->acts.losses[n];
    return sum;
}

// Generation is the same forward pass over n new tokens behind `first` known ones, first + n ≤ T: logits (V)
// of the last, there until the next call. O((first + n)·D) for each token and layer, for nothing that is known
// is computed again. A model may keep several sequences apart; this one keeps one, number 0.
static const real *model_extend(Model *m, int sequence, const int *tokens, int n, int first) {
    int D = m->config.d_model, V = m->config.vocab_size;
    (void)sequence;
    hidden_forward(m, tokens, 1, first + n, first, no_dropout);
    linear_forward(m->acts.logits, V, m->acts.ln_f + (int64_t)(n - 1) * D, m->weights.wte, NULL, 1, D, V);
    return m->acts.logits;
}

// One token more of each of n sequences, no two the same: logits (n,V).
typedef struct { int sequence, token, first; } Next;
static const real *model_extend_each(Model *m, const Next *next, int n) {
    (void)n; // 1
    return model_extend(m, next->sequence, &next->token, 1, next->first);
}

// One layer's part of model_backward: acts.dx holds the gradient of its output y before, and of its input x
// after.
static void layer_backward(Model *m, int l) {
    const Config *c = &m->config;
    int D = c->d_model, B = m->batch_B, T = m->batch_T, N = B * T;
    int64_t numbers = (int64_t)N * D;
    const LayerWeights *w = &m->weights.layers[l], *dw = &m->grad.layers[l];
    LayerActivations *a = &m->acts.layers[l];
    Activations *acts = &m->acts;
    const real *g = a->ag + D;
    real *dx = acts->dx, *dag = acts->dag, *dg = dag + D, *dabar = acts->dabar;
    real *dbranch = dx;                                 // y = x + branch: both have y's gradient
    real *dgated = acts->ds, *ds = dgated, *dln = ds;   // one buffer, one after the other
    if (m->drop.probability > 0) {                      // unless dropout takes some of the branch's
        dbranch = dabar;                                // not needed yet
        memcpy(dbranch, dx, sizeof(real) * (size_t)numbers);
        dropout(dbranch, numbers, m->drop, 2 + 2 * l);
    }
    // through W_out and the gate; s ⊙ g is computed again
    gate_forward(a->gated, a->s, g, 2 * D, N, D);
    dropout(a->gated, numbers, m->drop, 1 + 2 * l);
    linear_backward(dgated, dw->W_out, dw->b_out, dbranch, D, a->gated, w->W_out, N, D, D);
    dropout(dgated, numbers, m->drop, 1 + 2 * l);
    gate_backward(ds, dg, dgated, a->s, g, 2 * D, N, D);
    // through the mixer, from ds to dabar; abar is computed again
    gelu_forward(a->abar, a->ag, 2 * D, N, D);
    mixers[c->mixer].backward(m, l, B, T);
    gelu_backward(dag, dabar, a->ag, 2 * D, N, D);
    // through W_in and the LayerNorm, whose output is computed again
    layernorm_forward(a->ln, a->ln_mean, a->ln_rstd, a->x, w->ln_weight, w->ln_bias, N, D);
    linear_backward(dln, dw->W_in, dw->b_in, dag, 2 * D, a->ln, w->W_in, N, D, 2 * D);
    layernorm_backward(dx, dw->ln_weight, dw->ln_bias, dln, a->x, a->ln_mean, a->ln_rstd, w->ln_weight, N, D);
}

// Gradients of dloss · model_loss, added to those that are there.
static void model_backward(Model *m, double dloss) {
    int D = m->config.d_model, V = m->config.vocab_size, N = m->batch_B * m->batch_T;
    int last = m->config.n_layers - 1;
    int64_t numbers = (int64_t)N * D;
    Activations *acts = &m->acts;
    const Weights *w = &m->weights, *dw = &m->grad;
    const real *y = acts->layers[last].y;
    real *dlogits = acts->logits, *dln_f = acts->ds, *dx = acts->dx;
    crossentropy_backward(dlogits, acts->logits, acts->loss_logsumexp, m->targets, (real)dloss, N, V);
    linear_backward(dln_f, dw->wte, NULL, dlogits, V, acts->ln_f, w->wte, N, D, V);
    memset(dx, 0, sizeof(real) * (size_t)numbers);
    layernorm_backward(dx, dw->ln_f_weight, dw->ln_f_bias, dln_f, y, acts->ln_mean, acts->ln_rstd,
                       w->ln_f_weight, N, D);
    for (int l = last; l >= 0; l--) layer_backward(m, l);
    dropout(dx, numbers, m->drop, 0);
    embedding_backward(dw->wte, dx, m->inputs, m->batch_B, m->batch_T, D);
}

// The L2 norm of x (n), summed in double
static double norm(const real *x, int64_t n) {
    if (!plain) return norm_fast(x, n);
    double squares = 0;
    for (int64_t i = 0; i < n; i++)
        squares += (double)x[i] * (double)x[i];
    return sqrt(squares);
}

// What the gradients are multiplied by so that their norm is at most `clip`; 0: 1
static double clip_scale(double norm, double clip) {
    return clip > 0 && clip < norm + 1e-6 ? clip / (norm + 1e-6) : 1;
}

typedef struct { double lr, beta1, beta2, eps, weight_decay; } AdamW;

// AdamW, with the gradient g scaled beforehand (clipping) and cleared afterwards, at step = 1, 2, ...:
//     m = β1 m + (1-β1) g,   v = β2 v + (1-β2) g²
//     w = w - lr·wd·w,       w = w - lr · m/(1-β1^step) / (√(v/(1-β2^step)) + eps)
// All (n), m and v are exp_avg and exp_avg_sq. Loshchilov and Hutter: Decoupled weight decay regularization,
// ICLR 2019; the order is torch.optim.AdamW's. Threads take blocks of numbers, whole vectors of them: a
// compiler rounds what is left of a vector in other ways, and where that is must not depend on the number of
// threads.
static void adamw(real *w, real *g, real *exp_avg, real *exp_avg_sq, int64_t n, AdamW o, double grad_scale,
                  int64_t step) {
    enum { NUMBERS = 2048 };
    real beta1 = (real)o.beta1, beta2 = (real)o.beta2, scale = (real)grad_scale, eps = (real)o.eps;
    real rate1 = (real)(1 - o.beta1), rate2 = (real)(1 - o.beta2), keep = (real)(1 - o.lr * o.weight_decay);
    real step_size = (real)(o.lr / (1 - pow(o.beta1, (double)step)));
    real correction = (real)(1 / sqrt(1 - pow(o.beta2, (double)step)));
    #pragma omp parallel for if (n > 4 * NUMBERS)
    for (int64_t from = 0; from < n; from += NUMBERS) {
        int64_t to = n - from < NUMBERS ? n : from + NUMBERS;
        #pragma omp simd
        for (int64_t i = from; i < to; i++) {
            real grad = scale * g[i];
            real m = exp_avg[i] = beta1 * exp_avg[i] + rate1 * grad;
            real v = exp_avg_sq[i] = beta2 * exp_avg_sq[i] + rate2 * grad * grad;
            w[i] = keep * w[i] - step_size * m / ((real)sqrt(v) * correction + eps);
            g[i] = 0;
        }
    }
}

// Weight decay is for parameters of two or more dimensions.
static void model_update(Model *m, AdamW o, double grad_scale, int64_t step) {
    for (int i = 0; i < m->table.n; i++) {
        const Tensor *t = &m->table.rows[i];
        AdamW options = o;
        if (t->n_dims < 2) options.weight_decay = 0;
        adamw(m->params + t->offset, m->grads + t->offset, m->exp_avg + t->offset, m->exp_avg_sq + t->offset,
              t->count, options, grad_scale, step);
    }
}

// ----------------------------------------------------------------------------
// Mamba-2, the mixer that the paper compares with: one chain of states, many hops
//
// Sessa needs none of this section. Dao and Gu: Transformers are SSMs, ICML 2024. Letters besides: E = 2D,
// the inner width, in heads of width w; S numbers of state for each of its channels; W = E + 2S, the width of
// [x, b, c].
//
// Its weights: in_proj (E + W + heads,D), whose rows give z, x, b, c, step; conv_weight (W,1,TAPS), conv_bias
// (W); step_bias, A_log, skip (heads); norm_weight (E); out_proj (D,E). Its activations: proj (N,E + W +
// heads); xbc (N,W) after the convolution; step (N,heads); states (B,chunks,S,E), the state before each
// chunk; y_scan (N,E), the scan's output; rms (N); normed (N,E), what out_proj reads. Generation keeps the
// last state alone and tail (TAPS-1,W), the convolution's last inputs.

enum { TAPS = 4, CHUNK = 32 }; // a state is kept each CHUNK rows for the backward pass

// The scan's shape and its parameters: A_log and skip (heads).
typedef struct { int B, T, E, S, heads; const real *A_log, *skip; } ScanShape;

// The fast ways of this section's layers, see "the same, fast".
static void conv_forward_fast(real *out, const real *inp, int ld, real *tail, const real *weight,
                              const real *bias, int B, int T, int W, int first);
static void conv_backward_fast(real *dinp, real *dweight, real *dbias, real *dout, const real *inp, int ld,
                               const real *weight, const real *bias, int B, int T, int W);
static void step_backward_fast(real *dinp, real *dbias, const real *dstep, int ld_dstep, const real *inp,
                               int ld, const real *bias, int N, int heads);
static void scan_forward_fast(real *y, real *states, int kept, Work work, const real *xbc, const real *step,
                              ScanShape scan);
static void scan_backward_fast(real *dxbc, real *dstep, real *dA_log, real *dskip, Work work, const real *dy,
                               const real *states, const real *xbc, const real *step, ScanShape scan);
static void gated_rmsnorm_forward_fast(real *out, real *rstd, const real *y, const real *z, int ld,
                                       const real *weight, int N, int E);
static void gated_rmsnorm_backward_fast(real *dy, real *dz, real *dweight, const real *dout, const real *y,
                                        const real *z, int ld, const real *rstd, const real *weight, int N,
                                        int E);

static inline real sigmoid(real x) { return 1 / (1 + (real)exp(-(double)x)); }

// SiLU(u) = u·sigmoid(u), and its derivative
static inline real silu(real u) { return u * sigmoid(u); }
static inline real silu_derivative(real u) { return sigmoid(u) * (1 + u * (1 - sigmoid(u))); }

// One row of the convolution before its SiLU: u (W) = bias + Σ_{lag<TAPS} weight[:,TAPS-1-lag] ⊙ inp_{t-lag}.
// Row n of inp, rows ld apart, stands at position t = first + n mod (T-first). The rows of the three
// positions before first lie in tail, position t in its row t mod 3.
static inline void conv_row(real *u, const real *inp, int ld, const real *tail, const real *weight,
                            const real *bias, int64_t n, int T, int W, int first) {
    int t = first + (int)(n % (T - first));
    for (int c = 0; c < W; c++) u[c] = bias[c];
    for (int lag = 0; lag < TAPS && lag <= t; lag++) {
        int is_new = t - lag >= first;
        const real *row = is_new ? inp + (n - lag) * ld : tail + (int64_t)((t - lag) % (TAPS - 1)) * W;
        for (int c = 0; c < W; c++)
            u[c] += weight[c * TAPS + TAPS - 1 - lag] * row[c];
    }
}

// Keeps the last positions' inputs for the rows to come; tail NULL: none will come.
static void conv_remember(real *tail, const real *inp, int ld, int T, int W, int first) {
    for (int t = first > T - TAPS + 1 ? first : T - TAPS + 1; tail && t < T; t++)
        if (t >= 0) {
            real *to = tail + (int64_t)(t % (TAPS - 1)) * W;
            memcpy(to, inp + (int64_t)(t - first) * ld, sizeof(real) * (size_t)W);
        }
}

// out = SiLU(conv(inp)); depthwise and causal. inp: W of the ld columns of rows for the positions first..T-1,
// out as many rows of W, weight (W,TAPS), bias (W). tail (TAPS-1,W) remembers the last positions; NULL: first
// is 0 and nothing needs to be remembered.
static void conv_forward(real *out, const real *inp, int ld, real *tail, const real *weight, const real *bias,
                         int B, int T, int W, int first) {
    if (!plain) return conv_forward_fast(out, inp, ld, tail, weight, bias, B, T, W, first);
    for (int64_t n = 0; n < B * (T - first); n++) {
        real *u = out + n * W;
        conv_row(u, inp, ld, tail, weight, bias, n, T, W, first);
        for (int c = 0; c < W; c++) u[c] = silu(u[c]);
    }
    conv_remember(tail, inp, ld, T, W, first);
}

// With u computed again and du = dout ⊙ SiLU'(u), which takes the place of dout:
//     dinp_t = Σ_lag weight[:,TAPS-1-lag] ⊙ du_{t+lag}
//     dweight[:,TAPS-1-lag] += Σ_t du_t ⊙ inp_{t-lag},   dbias += Σ_t du_t
static void conv_backward(real *dinp, real *dweight, real *dbias, real *dout, const real *inp, int ld,
                          const real *weight, const real *bias, int B, int T, int W) {
    if (!plain) return conv_backward_fast(dinp, dweight, dbias, dout, inp, ld, weight, bias, B, T, W);
    for (int64_t n = 0; n < B * T; n++) {
        real *u = dinp + n * ld; // until its own gradient is written there, below
        conv_row(u, inp, ld, NULL, weight, bias, n, T, W, 0);
        for (int c = 0; c < W; c++)
            dout[n * W + c] *= silu_derivative(u[c]);
    }
    for (int64_t n = 0; n < B * T; n++)
        for (int c = 0; c < W; c++) {
            int t = (int)(n % T);
            real sum = 0, du = dout[n * W + c];
            for (int lag = 0; lag < TAPS && t + lag < T; lag++)
                sum += weight[c * TAPS + TAPS - 1 - lag] * dout[(n + lag) * W + c];
            for (int lag = 0; lag < TAPS && lag <= t; lag++)
                dweight[c * TAPS + TAPS - 1 - lag] += du * inp[(n - lag) * ld + c];
            dinp[n * ld + c] = sum;
            dbias[c] += du;
        }
}

// step = softplus(inp + bias) = log(1 + e^(inp + bias)), one a head     inp: `heads` of the ld columns, step
// (N,heads)
static void step_forward(real *step, const real *inp, int ld, const real *bias, int N, int heads) {
    #pragma omp parallel for if (N > 1)
    for (int64_t n = 0; n < N; n++)
        for (int h = 0; h < heads; h++) {
            double x = (double)(inp[n * ld + h] + bias[h]);
            step[n * heads + h] = (real)(x > 30 ? x : log1p(exp(x)));
        }
}

// dinp = dstep · sigmoid(inp + bias),   dbias += Σ_n dinp       dstep: rows ld_dstep apart
static void step_backward(real *dinp, real *dbias, const real *dstep, int ld_dstep, const real *inp, int ld,
                          const real *bias, int N, int heads) {
    if (!plain) return step_backward_fast(dinp, dbias, dstep, ld_dstep, inp, ld, bias, N, heads);
    for (int h = 0; h < heads; h++) {
        double sum = 0;
        for (int64_t n = 0; n < N; n++) {
            dinp[n * ld + h] = dstep[n * ld_dstep + h] * sigmoid(inp[n * ld + h] + bias[h]);
            sum += (double)dinp[n * ld + h];
        }
        dbias[h] += (real)sum;
    }
}

// One row of the scan for head h, whose state (S,w) it takes from row t-1 to row t: with Δ = step, x, b, c of
// xbc_t and keep_t = exp(-exp(A_log) Δ_t)
//     state = keep_t state + Δ_t b_t x_t^T
static void scan_row(real *state, const real *xbc_t, real step, ScanShape scan, int h) {
    int w = scan.E / scan.heads, S = scan.S;
    const real *x = xbc_t + h * w, *b = xbc_t + scan.E;
    real keep = (real)exp(-exp((double)scan.A_log[h]) * (double)step);
    for (int s = 0; s < S; s++)
        for (int i = 0; i < w; i++)
            state[s * w + i] = keep * state[s * w + i] + step * b[s] * x[i];
}

// A head's columns of a state (S,E), and back.
static void take_head(real *state, const real *all, ScanShape scan, int h) {
    int w = scan.E / scan.heads;
    for (int64_t s = 0; s < scan.S; s++)
        memcpy(state + s * w, all + s * scan.E + h * w, sizeof(real) * (size_t)w);
}
static void put_head(real *all, const real *state, ScanShape scan, int h) {
    int w = scan.E / scan.heads;
    for (int64_t s = 0; s < scan.S; s++)
        memcpy(all + s * scan.E + h * w, state + s * w, sizeof(real) * (size_t)w);
}

// The scan. Each head has a state (S,w), 0 at first, that decays and takes in one outer product a token:
//     for t = 0 .. T-1:   state = keep_t state + Δ_t b_t x_t^T,   y_t = state^T c_t + skip · x_t
// xbc (B,T,W), step (B,T,heads), y (B,T,E). `kept`: states (B,chunks,S,E) holds the state before each chunk
// of CHUNK rows for the backward pass; else (B,S,E) the state to begin with, and afterwards the last one,
// from which the next call goes on.
static void scan_forward(real *y, real *states, int kept, Work work, const real *xbc, const real *step,
                         ScanShape scan) {
    if (!plain) return scan_forward_fast(y, states, kept, work, xbc, step, scan);
    int T = scan.T, E = scan.E, S = scan.S, W = E + 2 * S, heads = scan.heads, w = E / heads;
    int64_t chunks = kept ? (T + CHUNK - 1) / CHUNK : 1, size = (int64_t)S * E;
    real *state = work.scratch;
    for (int64_t b = 0; b < scan.B; b++)
        for (int h = 0; h < heads; h++) {
            real *states_b = states + b * chunks * size;
            if (kept) memset(state, 0, sizeof(real) * (size_t)(S * w));
            else take_head(state, states_b, scan, h);
            for (int64_t t = 0; t < T; t++) {
                const real *xbc_t = xbc + (b * T + t) * W, *c = xbc_t + E + S;
                real *y_t = y + (b * T + t) * E + h * w;
                if (kept && t % CHUNK == 0) put_head(states_b + t / CHUNK * size, state, scan, h);
                scan_row(state, xbc_t, step[(b * T + t) * heads + h], scan, h);
                for (int i = 0; i < w; i++)
                    y_t[i] = scan.skip[h] * xbc_t[h * w + i];
                for (int s = 0; s < S; s++)
                    for (int i = 0; i < w; i++)
                        y_t[i] += c[s] * state[s * w + i];
            }
            if (!kept) put_head(states_b, state, scan, h);
        }
}

// From the last row to the first, with dstate the gradient of the state behind row t:
//     dc_t += state_t dy_t,    dstate += c_t dy_t^T
//     dx_t  = skip dy_t + Δ_t dstate^T b_t,   db_t += Δ_t dstate x_t,   dskip += dy_t·x_t
//     dΔ_t  = b_t^T dstate x_t - exp(A_log) r_t,   dA_log -= exp(A_log) Δ_t r_t
//             with r_t = keep_t Σ dstate ⊙ state_{t-1}
//     dstate = keep_t dstate
// The states of a chunk are computed again from the one before it. dxbc (B,T,W) is written, dA_log and dskip
// (heads) are +=, dstep (B,T,3·heads) holds the gradient of step in its first `heads` columns; the others are
// scratch.
static void scan_backward(real *dxbc, real *dstep, real *dA_log, real *dskip, Work work, const real *dy,
                          const real *states, const real *xbc, const real *step, ScanShape scan) {
    if (!plain) return scan_backward_fast(dxbc, dstep, dA_log, dskip, work, dy, states, xbc, step, scan);
    int T = scan.T, E = scan.E, S = scan.S, W = E + 2 * S, heads = scan.heads, w = E / heads;
    int64_t chunks = (T + CHUNK - 1) / CHUNK, size = (int64_t)S * w; // of one head's state
    real *dstate = work.scratch;
    real *state = dstate + size; // before a chunk, then behind each of its rows
    memset(dxbc, 0, sizeof(real) * (size_t)scan.B * (size_t)T * (size_t)W);
    for (int64_t b = 0; b < scan.B; b++)
        for (int h = 0; h < heads; h++) {
            real rate = (real)exp((double)scan.A_log[h]);
            memset(dstate, 0, sizeof(real) * (size_t)size);
            for (int64_t t = T - 1; t >= 0; t--) {
                int64_t row = b * T + t, chunk = t / CHUNK, first = chunk * CHUNK;
                if (t == T - 1 || t % CHUNK == CHUNK - 1) { // the last row of a chunk: its states
                    take_head(state, states + (b * chunks + chunk) * S * E, scan, h);
                    for (int64_t j = b * T + first; j <= row; j++) {
                        real *before = state + (j - b * T - first) * size, *now = before + size;
                        memcpy(now, before, sizeof(real) * (size_t)size);
                        scan_row(now, xbc + j * W, step[j * heads + h], scan, h);
                    }
                }
                const real *before = state + (t - first) * size, *now = before + size;
                const real *x = xbc + row * W + h * w, *bt = xbc + row * W + E, *c = bt + S;
                const real *dy_t = dy + row * E + h * w;
                real *dx = dxbc + row * W + h * w, *db = dxbc + row * W + E, *dc = db + S;
                real delta = step[row * heads + h], keep = (real)exp(-(double)(rate * delta));
                real taken = 0, faded = 0;
                for (int i = 0; i < w; i++) {
                    dx[i] = scan.skip[h] * dy_t[i];
                    dskip[h] += dy_t[i] * x[i];
                }
                for (int s = 0; s < S; s++)
                    for (int i = 0; i < w; i++) {
                        real *d = &dstate[s * w + i];
                        dc[s] += now[s * w + i] * dy_t[i];
                        *d += c[s] * dy_t[i];
                        dx[i] += delta * *d * bt[s];
                        db[s] += delta * *d * x[i];
                        taken += bt[s] * *d * x[i];
                        faded += keep * *d * before[s * w + i];
                        *d *= keep;
                    }
                dstep[row * 3 * heads + h] = taken - rate * faded;
                dA_log[h] -= rate * delta * faded;
            }
        }
}

// out = v · rstd ⊙ weight, v = y ⊙ SiLU(z), rstd = 1/√(mean(v²) + 1e-5)     y, out (N,E), z: E of the ld
// columns
static void gated_rmsnorm_forward(real *out, real *rstd, const real *y, const real *z, int ld,
                                  const real *weight, int N, int E) {
    if (!plain) return gated_rmsnorm_forward_fast(out, rstd, y, z, ld, weight, N, E);
    for (int64_t n = 0; n < N; n++) {
        real *v = out + n * E, squares = 0;
        for (int i = 0; i < E; i++) {
            v[i] = y[n * E + i] * silu(z[n * ld + i]);
            squares += v[i] * v[i];
        }
        rstd[n] = 1 / (real)sqrt((double)(squares / E) + 1e-5);
        for (int i = 0; i < E; i++) v[i] *= rstd[n] * weight[i];
    }
}

// With g = dout ⊙ weight:  dv = rstd·(g - v·rstd²·mean(g ⊙ v)),   dy = dv ⊙ SiLU(z),   dz = dv ⊙ y ⊙
// SiLU'(z),
//     dweight += Σ_n dout ⊙ v·rstd             dy may be dout itself
static void gated_rmsnorm_backward(real *dy, real *dz, real *dweight, const real *dout, const real *y,
                                   const real *z, int ld, const real *rstd, const real *weight, int N,
                                   int E) {
    if (!plain) return gated_rmsnorm_backward_fast(dy, dz, dweight, dout, y, z, ld, rstd, weight, N, E);
    for (int64_t n = 0; n < N; n++) {
        const real *dout_n = dout + n * E, *y_n = y + n * E, *z_n = z + n * ld;
        real r = rstd[n], mean = 0;
        for (int i = 0; i < E; i++) {
            real v = y_n[i] * silu(z_n[i]);
            mean += dout_n[i] * weight[i] * v / E;
            dweight[i] += dout_n[i] * v * r;
        }
        for (int i = 0; i < E; i++) {
            real v = y_n[i] * silu(z_n[i]), dv = r * (dout_n[i] * weight[i] - v * r * r * mean);
            dz[n * ld + i] = dv * y_n[i] * silu_derivative(z_n[i]);
            dy[n * E + i] = dv * silu(z_n[i]);
        }
    }
}

static ScanShape scan_of(const Config *c, const LayerWeights *w, int B, int T) {
    int E = 2 * c->d_model;
    ScanShape scan = {B, T, E, c->state_dim, E / c->head_dim, w->A_log, w->skip};
    return scan;
}

// abar → s: [z, x, b, c, step] = abar in_proj^T, the convolution over x, b and c, the scan, the gated norm,
// out_proj
static void mamba2_forward(Model *m, int l, int B, int T, int first) {
    const LayerWeights *w = &m->weights.layers[l];
    ScanShape scan = scan_of(&m->config, w, B, T - first);
    int D = m->config.d_model, E = scan.E, W = E + 2 * scan.S, heads = scan.heads, ld = E + W + heads;
    int N = B * (T - first), kept = m->grads != NULL;
    Work work = {m->acts.scratch, 0};
    LayerActivations *a = &m->acts.layers[l];
    const real *z = a->proj, *x = z + E, *step = x + W;
    real *tail = B == 1 ? a->tail : NULL, *s = a->s + (int64_t)first * D;
    if (!kept && !first) memset(a->states, 0, sizeof(real) * (size_t)B * (size_t)scan.S * (size_t)E);
    linear_forward(a->proj, ld, a->abar, w->in_proj, NULL, N, D, ld);
    conv_forward(a->xbc, x, ld, tail, w->conv_weight, w->conv_bias, B, T, W, first);
    step_forward(a->step, step, ld, w->step_bias, N, heads);
    scan_forward(a->y_scan, a->states, kept, work, a->xbc, a->step, scan);
    gated_rmsnorm_forward(a->normed, a->rms, a->y_scan, z, ld, w->norm_weight, N, E);
    linear_forward(s, D, a->normed, w->out_proj, NULL, N, E, D);
}

static void mamba2_backward(Model *m, int l, int B, int T) {
    const LayerWeights *w = &m->weights.layers[l], *dw = &m->grad.layers[l];
    ScanShape scan = scan_of(&m->config, w, B, T);
    int D = m->config.d_model, E = scan.E, W = E + 2 * scan.S, heads = scan.heads, ld = E + W + heads;
    int N = B * T;
    LayerActivations *a = &m->acts.layers[l];
    Activations *acts = &m->acts;
    const real *z = a->proj, *x = z + E, *step = x + W;
    real *dz = acts->dproj, *dx = dz + E, *dstep = dx + W;
    Work work = {acts->scratch, 0};
    real *dnormed = acts->dy, *dy = dnormed; // one buffer, one after the other
    gated_rmsnorm_forward(a->normed, a->rms, a->y_scan, z, ld, w->norm_weight, N, E);       // again
    linear_backward(dnormed, dw->out_proj, NULL, acts->ds, D, a->normed, w->out_proj, N, E, D);
    gated_rmsnorm_backward(dy, dz, dw->norm_weight, dnormed, a->y_scan, z, ld, a->rms, w->norm_weight, N, E);
    conv_forward(a->xbc, x, ld, NULL, w->conv_weight, w->conv_bias, B, T, W, 0);            // again
    step_forward(a->step, step, ld, w->step_bias, N, heads);                                // again
    scan_backward(acts->dxbc, acts->dstep, dw->A_log, dw->skip, work, dy, a->states, a->xbc, a->step, scan);
    conv_backward(dx, dw->conv_weight, dw->conv_bias, acts->dxbc, x, ld, w->conv_weight, w->conv_bias,
                  B, T, W);
    step_backward(dstep, dw->step_bias, acts->dstep, 3 * heads, step, ld, w->step_bias, N, heads);
    linear_backward(acts->dabar, dw->in_proj, NULL, acts->dproj, ld, a->abar, w->in_proj, N, D, ld);
}

// ----------------------------------------------------------------------------
// the same, fast: elementary functions
//
// From here to the tables of tensors: how the layers above are made fast, each function named after the plain
// one that it equals. Three means do most of it: matrix products whose sums stay in registers; a softmax over
// the past in panels of rows, so that attention and feedback become matrix products; and elementary functions
// that vectors can compute. A thread's share never changes a sum, so results do not depend, to the bit, on
// the number of threads.

#ifdef __clang__ // up to version 14 it is deaf to GCC's pragma; it knows no noclone, and makes no clones
#define UNROLL _Pragma("clang loop unroll(full)")
#define ONE_COPY __attribute__((noinline))
#else
#define UNROLL _Pragma("GCC unroll 12")
#define ONE_COPY __attribute__((noinline, noclone))
#endif

// e^x by 2^n · e^r with |r| ≤ ln2/2 and a polynomial for e^r, so that loops over it are vectorised.
// float: relative error below 2.5e-7 + 3e-8·|x| for x from -87.33 to 88, e^88 for larger x, 0 for x below
// -87.7 and, where denormals are flushed, below -87.34; NaN for NaN. double: the library's.
// The bits of a float are in the order of its magnitude: they, not x, are held below those of 88. Where x
// itself is compared with a constant, gcc makes a way of its own for that constant, and selects.
static inline real exp_real(real x) {
    if (sizeof(real) == sizeof(double)) return (real)exp((double)x);
    float y = (float)x, clamped;
    uint32_t bits, magnitude;
    memcpy(&bits, &y, sizeof(bits));
    magnitude = bits & 0x7FFFFFFF;
    magnitude = magnitude < 0x42B00000 ? magnitude : 0x42B00000;
    bits = magnitude | (bits & 0x80000000);
    memcpy(&clamped, &bits, sizeof(clamped));
    int32_t n = (int32_t)(clamped * 1.44269504f + 128.5f) - 128; // the nearest integer
    float r = clamped - (float)n * 0.693147181f;
    float power = 0.041669644f + r * (0.0083696283f + r * 0.0013748823f);
    power = 1.0f + r * (1.0f + r * (0.49999988f + r * (0.16666512f + r * power)));
    int32_t exponent = (n + 127) << 23; // n ≥ -127, whose 2^n is 0 here
    float scale;
    memcpy(&scale, &exponent, sizeof(scale));
    return y == y ? (real)(power * scale) : x;
}

// Φ(x) = (1 + erf(x/√2))/2, given gauss = e^(-x²/2). float: Φ(-|x|) = gauss · polynomial in 1/(1 + 0.3|x|),
// fitted here to a relative error of 1.2e-7 for |x| ≤ 13; absolute error in float arithmetic below 3e-7.
static inline real normal_cdf(real x, real gauss) {
    if (sizeof(real) == sizeof(double)) return (real)(0.5 * erfc(-(double)x * 0.70710678118654752440));
    real t = 1 / (1 + (real)0.3 * (x < 0 ? -x : x));
    real high = (real)-0.057167433 + t * ((real)0.21011846 + t * ((real)-0.15937835 + t * (real)0.036194865));
    real low = (real)0.12084553 + t * ((real)0.099347115 + t * ((real)0.1304165 + t * high));
    real tail = gauss * t * ((real)0.11962327 + t * low);
    return x < 0 ? tail : 1 - tail;
}

static inline real sigmoid_fast(real x) { return 1 / (1 + exp_real(-x)); }

// Does work(call, item) for item = 0 .. items-1: one item a thread where `parallel` says so and the threads
// are free, else one after the other. (An `if` clause would open a region of one thread, inside which no
// threads can be had without starting them.) `work` is ONE_COPY: two copies of a function may round
// differently.
static void for_items(int items, int parallel, void (*work)(const void *call, int item), const void *call) {
    if (omp_in_parallel() || items == 1 || !parallel) {
        for (int item = 0; item < items; item++) work(call, item);
        return;
    }
    #pragma omp parallel for
    for (int item = 0; item < items; item++) work(call, item);
}

// ----------------------------------------------------------------------------
// the same, fast: the matrix product and the triangular solve
//
// matmul and triangular_solve stand at the end of this section, with the plain loops that they equal.

// Element (i, j) of a matrix is at[i·row + j·col]: a transpose swaps the strides and costs nothing.
typedef struct { const real *at; ptrdiff_t row, col; } Matrix;

static inline Matrix rows_of(const real *at, ptrdiff_t row) { Matrix m = {at, row, 1}; return m; }
static inline Matrix transpose(Matrix a) { Matrix m = {a.at, a.col, a.row}; return m; }

// The register tile: TILE_ROWS × TILE_COLS sums, TILE_COLS two vectors wide, that stay in registers while k
// runs.
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
    LOW_ROWS = TILE_ROWS / 3, // a lower tile for what is left below the full ones
    BLOCK_K = 256,            // a packed strip of B, BLOCK_K × TILE_COLS, comes from the L2 cache
    BLOCK_N = 8 * TILE_COLS,  // a packed block of B, BLOCK_K × BLOCK_N, stays there
    NARROW_N = 2 * TILE_COLS, // one that a thread alone packs, 64 KiB at most: threads may have 128 of stack
    PARALLEL_WORK = 1 << 17   // multiply-adds below which a product is not worth waking the threads
};
typedef real Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

// to[k·width + r] = at[r·stride + k] for r, k < LANES. Vectors a and b of n numbers are interleaved to a0 b0
// a1 b1 ..., the first of the upper half with the first of the lower one: that turns the bits of (row,
// column) by one place, and log2 n turns exchange them. (clang shuffles by constants only: it takes the plain
// loop.)
static inline void transpose_block(real *to, int width, const real *at, ptrdiff_t stride) {
#ifdef __clang__
    for (int r = 0; r < LANES; r++)
        for (int k = 0; k < LANES; k++) to[k * width + r] = at[r * stride + k];
#else
    Vector x[LANES], y[LANES];
    __typeof__(x[0] == x[0]) first, second;
    for (int i = 0; i < LANES; i++) {
        first[i] = i / 2 + i % 2 * LANES;
        second[i] = first[i] + LANES / 2;
        x[i] = *(const Vector *)(at + i * stride);
    }
#pragma GCC unroll 4
    for (int turn = 1; turn < LANES; turn *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = __builtin_shuffle(x[i], x[i + LANES / 2], first);
            y[2 * i + 1] = __builtin_shuffle(x[i], x[i + LANES / 2], second);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
    for (int i = 0; i < LANES; i++) *(Vector *)(to + i * width) = x[i];
#endif
}

// packed[k·width + r] = at[r·stride_r + k·stride_k] for r < n, and 0 for n ≤ r < width: a strip of A or B in
// the order in which the tile reads it.
__attribute__((noinline)) // the tile below keeps all the registers
static void pack(real *packed, int width, const real *at, ptrdiff_t stride_r, ptrdiff_t stride_k, int n,
                 int K) {
    if (n < width) memset(packed, 0, sizeof(real) * (size_t)K * (size_t)width);
    if (stride_r == 1 && n == width) {
        for (int k = 0; k < K; k++)
            memcpy(packed + k * width, at + k * stride_k, sizeof(real) * (size_t)width);
        return;
    }
    for (int k0 = 0; k0 < K; k0 += LANES)
        for (int r0 = 0; r0 < n; r0 += LANES) {
            real *to = packed + k0 * width + r0;
            const real *from = at + r0 * stride_r + k0 * stride_k;
            if (stride_k == 1 && k0 + LANES <= K && r0 + LANES <= n)
                transpose_block(to, width, from, stride_r);
            else for (int k = 0; k < min_int(LANES, K - k0); k++)
                    for (int r = 0; r < min_int(LANES, n - r0); r++)
                        to[k * width + r] = from[r * stride_r + k * stride_k];
        }
}

// out[i][j] = alpha · Σ_k A[i][k]·b[k·TILE_COLS + j] + keep · out[i][j] + add[j] for i < rows, a constant,
// and j < TILE_COLS; out of rows ld apart, A as it lies in memory, b packed, add or NULL. Three rows of A
// share a base address, for want of registers that hold twelve.
__attribute__((always_inline))
static inline void tile_product(real *out, ptrdiff_t ld, Matrix a, const real *b, int K, real alpha,
                                real keep, const real *add, const int rows) {
    Vector zero = {0}, left[TILE_ROWS], right[TILE_ROWS];
    const real *base[TILE_ROWS / 3 + 1];
    for (int i = 0; i < rows; i++) left[i] = right[i] = zero;
    for (int i = 0; i < rows; i += 3) base[i / 3] = a.at + i * a.row;
    for (int k = 0; k < K; k++, b += TILE_COLS) {
        Vector b_left = *(const Vector *)b, b_right = *(const Vector *)(b + LANES);
        UNROLL
        for (int i = 0; i < rows; i++) {
            real x = base[i / 3][i % 3 * a.row];
            left[i] += x * b_left;
            right[i] += x * b_right;
        }
        UNROLL
        for (int i = 0; i < rows; i += 3) base[i / 3] += a.col;
    }
    Vector add_left = add ? *(const Vector *)add : zero;
    Vector add_right = add ? *(const Vector *)(add + LANES) : zero;
    UNROLL
    for (int i = 0; i < rows; i++) {
        Vector *to_left = (Vector *)(out + i * ld), *to_right = (Vector *)(out + i * ld + LANES);
        left[i] = alpha * left[i] + add_left;
        right[i] = alpha * right[i] + add_right;
        if (keep != 0) {
            left[i] += keep * *to_left;
            right[i] += keep * *to_right;
        }
        *to_left = left[i];
        *to_right = right[i];
    }
}

// out = alpha·A·B + beta·out + bias: A (M,K), B (K,N), out (M,N) with `ld` elements from row to row, bias (N)
// or NULL.
typedef struct {
    real *out;
    ptrdiff_t ld;
    Matrix a, b;
    int M, N, K;
    real alpha, beta;
    const real *bias;
} MatrixProduct;

// One tile of it: the rows from i0 and the columns from n0 + j0 on, over block_k terms from k0 on. strip:
// those columns of B, packed. high: of TILE_ROWS rows, else of LOW_ROWS.
typedef struct { int i0, high, n0, j0, block_n, k0, block_k; } Tile;

__attribute__((always_inline))
static inline void product_tile(const MatrixProduct *p, Tile t, const real *strip) {
    real edge[LOW_ROWS * BLOCK_K], sum[TILE_ROWS * TILE_COLS], zeros[TILE_COLS] = {0};
    int m = t.high ? (int)TILE_ROWS : min_int(LOW_ROWS, p->M - t.i0);
    int n = min_int(TILE_COLS, t.block_n - t.j0);
    ptrdiff_t ld = p->ld;
    Matrix rows = {p->a.at + t.i0 * p->a.row + t.k0 * p->a.col, p->a.row, p->a.col};
    if (m < LOW_ROWS) { // the last rows of A, filled up with zeros
        pack(edge, LOW_ROWS, rows.at, p->a.row, p->a.col, m, t.block_k);
        Matrix filled = {edge, 1, LOW_ROWS};
        rows = filled;
    }
    const real *add = p->bias && t.k0 == 0 ? p->bias + t.n0 + t.j0 : zeros;
    real *out = p->out + t.i0 * ld + t.n0 + t.j0;
    real keep = t.k0 ? 1 : p->beta;
    // a tile that reaches over the edge goes by way of a whole one
    int over = n < TILE_COLS || m < LOW_ROWS;
    real *to = over ? sum : out, to_keep = over ? 0 : keep;
    ptrdiff_t to_ld = over ? (ptrdiff_t)TILE_COLS : ld;
    const real *to_add = over ? NULL : add;
    if (t.high) tile_product(to, to_ld, rows, strip, t.block_k, p->alpha, to_keep, to_add, TILE_ROWS);
    else tile_product(to, to_ld, rows, strip, t.block_k, p->alpha, to_keep, to_add, LOW_ROWS);
    for (int i = 0; over && i < m; i++)
        for (int j = 0; j < n; j++) {
            real kept = keep == 0 ? 0 : keep * out[i * ld + j];
            out[i * ld + j] = sum[i * TILE_COLS + j] + add[j] + kept;
        }
}

// A thread's part of a product. Of each block of B every thread packs some strips; then, of the tiles of
// `out` over that block, counted row by row, it computes an equal share. The barriers keep the block whole
// while anyone reads it. Which thread takes a tile changes no sum: the bits do not depend on the number of
// threads.
ONE_COPY static void matmul_share(const MatrixProduct *product, real *packed, int thread, int threads) {
    MatrixProduct p = *product;
    int high = p.M / TILE_ROWS, low = (p.M % TILE_ROWS + LOW_ROWS - 1) / LOW_ROWS; // rows of tiles
    for (int n0 = 0; n0 < p.N; n0 += BLOCK_N)
        for (int k0 = 0; k0 == 0 || k0 < p.K; k0 += BLOCK_K) {
            int block_n = min_int(BLOCK_N, p.N - n0), block_k = min_int(BLOCK_K, p.K - k0);
            int strips = (block_n + TILE_COLS - 1) / TILE_COLS;
            for (int j0 = thread * TILE_COLS; j0 < block_n; j0 += threads * TILE_COLS) {
                const real *from = p.b.at + k0 * p.b.row + (n0 + j0) * p.b.col;
                pack(packed + j0 * block_k, TILE_COLS, from, p.b.col, p.b.row,
                     min_int(TILE_COLS, block_n - j0), block_k);
            }
            if (threads > 1) {
                #pragma omp barrier
            }
            // shares of equal work, a low tile's being 1 and a high one's 3; then the tiles that they are
            int64_t full = (int64_t)high * strips, work = 3 * full + (int64_t)low * strips;
            int64_t from = work * thread / threads, to = work * (thread + 1) / threads;
            from = from < 3 * full ? from / 3 : from - 2 * full;
            to = to < 3 * full ? to / 3 : to - 2 * full;
            for (int64_t tile = from; tile < to; tile++) {
                int row = (int)(tile / strips), j0 = (int)(tile % strips) * TILE_COLS, is_high = row < high;
                int i0 = is_high ? row * TILE_ROWS : high * TILE_ROWS + (row - high) * LOW_ROWS;
                Tile t = {i0, is_high, n0, j0, block_n, k0, block_k};
                product_tile(&p, t, packed + j0 * block_k);
            }
            if (threads > 1) {
                #pragma omp barrier
            }
        }
}

// The product with a single row, as in generation: bound by reading B once, so nothing is packed. Here at
// most TILE_COLS columns of it, a constant where it can be: the compiler keeps their sums in registers then.
__attribute__((always_inline))
static inline void row_product(real *out, Matrix a, Matrix b, int N, int K, real alpha, real beta,
                               const real *bias) {
    real sum[TILE_COLS] = {0};
    if (b.row == 1 && a.col == 1) {
        for (int j = 0; j < N; j++)
            for (int k = 0; k < K; k++) sum[j] += a.at[k] * b.at[j * b.col + k];
    } else {
        for (int k = 0; k < K; k++)
            for (int j = 0; j < N; j++) sum[j] += a.at[k * a.col] * b.at[k * b.row + j * b.col];
    }
    for (int j = 0; j < N; j++)
        out[j] = alpha * sum[j] + (beta == 0 ? 0 : beta * out[j]) + (bias ? bias[j] : 0);
}

ONE_COPY static void row_strip(const void *call, int item) {
    const MatrixProduct *p = (const MatrixProduct *)call;
    int j0 = item * TILE_COLS, N = p->N - j0;
    Matrix strip = {p->b.at + j0 * p->b.col, p->b.row, p->b.col};
    const real *bias = p->bias ? p->bias + j0 : NULL;
    if (N >= TILE_COLS) row_product(p->out + j0, p->a, strip, TILE_COLS, p->K, p->alpha, p->beta, bias);
    else row_product(p->out + j0, p->a, strip, N, p->K, p->alpha, p->beta, bias);
}

// The calling thread does all of it, NARROW_N columns at a time: the same tiles, so the same sums.
__attribute__((noinline)) // what it packs is on no other function's stack
static void matmul_alone(const MatrixProduct *product) {
    real packed[BLOCK_K * NARROW_N] __attribute__((aligned(64)));
    for (int j = 0; j < product->N; j += NARROW_N) {
        MatrixProduct p = *product;
        p.out += j;
        p.b.at += j * p.b.col;
        p.N = min_int(NARROW_N, p.N - j);
        if (p.bias) p.bias += j;
        matmul_share(&p, packed, 0, 1);
    }
}

// out = alpha·A·B + beta·out + bias, see MatrixProduct. beta 0 overwrites. It equals
//     for i < M: for j < N: out[i][j] = alpha · Σ_k A[i][k]·B[k][j] + beta · out[i][j] + bias[j]
// All threads share the work, unless they are at work already: then the calling thread does all of it.
static void matmul(real *out, ptrdiff_t ld, Matrix a, Matrix b, int M, int N, int K, real alpha, real beta,
                   const real *bias) {
    // of the one product that all threads are at
    static real packed[BLOCK_K * BLOCK_N] __attribute__((aligned(64)));
    if (K == 0 && beta == 1 && !bias) return;
    MatrixProduct p = {out, ld, a, b, M, N, K, alpha, beta, bias};
    if (M > 1 && N == 1 && ld == 1 && !bias) { // a column: the same as a row, transposed
        MatrixProduct transposed = {out, M, transpose(b), transpose(a), 1, M, K, alpha, beta, NULL};
        p = transposed;
    }
    if (p.M == 1) {
        int strips = (p.N + TILE_COLS - 1) / TILE_COLS;
        for_items(strips, (int64_t)p.N * K > PARALLEL_WORK / 8, row_strip, &p);
        return;
    }
    if (omp_in_parallel() || (int64_t)M * N * K < PARALLEL_WORK) {
        matmul_alone(&p);
        return;
    }
    #pragma omp parallel
    matmul_share(&p, packed, omp_get_thread_num(), omp_get_num_threads());
}

// Solves (I - A) x = b for a strictly lower-triangular A (n,n), n ≤ PANEL_MAX: x (n,D) holds b before and x
// after, `ld` elements from row to row.
typedef struct { real *x; ptrdiff_t ld; Matrix A; int n, D; } Solve;

// A strip of TILE_COLS columns of x; strips do not depend on each other. LOW_ROWS rows at a time take what
// the rows before them give as one tile product (the strip of x is the packed B), then what they give each
// other row by row.
enum { PANEL_MAX = 96 };
ONE_COPY static void solve_strip(const void *call, int item) {
    const Solve *p = (const Solve *)call;
    real strip[PANEL_MAX * TILE_COLS] __attribute__((aligned(64))), *x = p->x + item * TILE_COLS;
    int n = p->n, width = min_int(TILE_COLS, p->D - item * TILE_COLS);
    ptrdiff_t ld = p->ld;
    Matrix A = p->A;
    for (int t = 0; t < n; t++)
        for (int i = 0; i < TILE_COLS; i++) strip[t * TILE_COLS + i] = i < width ? x[t * ld + i] : 0;
    for (int t0 = 0; t0 < n; t0 += LOW_ROWS) {
        int rows = min_int(LOW_ROWS, n - t0);
        Matrix earlier = {A.at + t0 * A.row, A.row, A.col};
        real *row = strip + t0 * TILE_COLS;
        if (rows == LOW_ROWS) tile_product(row, TILE_COLS, earlier, strip, t0, 1, 1, NULL, LOW_ROWS);
        else for (int r = 0; r < rows; r++, earlier.at += A.row)
            tile_product(row + r * TILE_COLS, TILE_COLS, earlier, strip, t0, 1, 1, NULL, 1);
        for (int r = 1; r < rows; r++) {
            row += TILE_COLS;
            for (int q = 0; q < r; q++) {
                real weight = A.at[(t0 + r) * A.row + (t0 + q) * A.col];
                for (int i = 0; i < TILE_COLS; i++) row[i] += weight * strip[(t0 + q) * TILE_COLS + i];
            }
        }
    }
    for (int t = 0; t < n; t++)
        for (int i = 0; i < width; i++) x[t * ld + i] = strip[t * TILE_COLS + i];
}

// See Solve. It equals
//     for t = 0 .. n-1: for j < t: x[t] += A[t][j] · x[j]
// The transposed system, an upper triangle, is the same loop from the last row to the first: A and x are then
// given from their last element on, with negative strides.
static void triangular_solve(real *x, ptrdiff_t ld, Matrix A, int n, int D) {
    Solve solve = {x, ld, A, n, D};
    for_items((D + TILE_COLS - 1) / TILE_COLS, n * n * D > PARALLEL_WORK / 4, solve_strip, &solve);
}

// ----------------------------------------------------------------------------
// the same, fast: layers

enum { COLUMNS = 64 }; // where rows are summed a thread takes so many columns: a sum has one owner

static void embedding_backward_fast(real *dwte, const real *dout, const int *inp, int B, int T, int D) {
    #pragma omp parallel for
    for (int d0 = 0; d0 < D; d0 += COLUMNS)
        for (int64_t bt = 0; bt < B * T; bt++)
            for (int i = d0; i < min_int(d0 + COLUMNS, D); i++)
                dwte[(int64_t)inp[bt] * D + i] += dout[bt * D + i];
}

static void layernorm_backward_fast(real *dx, real *dweight, real *dbias, const real *dout, const real *x,
                                    const real *mean, const real *rstd, const real *weight, int N, int D) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const real *row = x + n * D, *drow = dout + n * D;
        real sum = 0, dot = 0, m = mean[n], r = rstd[n];
        for (int i = 0; i < D; i++) {
            real w = drow[i] * weight[i];
            sum += w;
            dot += w * (row[i] - m);
        }
        sum /= D;
        dot *= r * r / D;
        for (int i = 0; i < D; i++) dx[n * D + i] += r * (drow[i] * weight[i] - sum - (row[i] - m) * dot);
    }
    #pragma omp parallel for
    for (int d0 = 0; d0 < D; d0 += COLUMNS) {
        int width = min_int(COLUMNS, D - d0);
        real sum[COLUMNS] = {0}, dot[COLUMNS] = {0};
        for (int64_t n = 0; n < N; n++) {
            const real *row = x + n * D + d0, *drow = dout + n * D + d0;
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

static void linear_forward_fast(real *out, int ld_out, const real *inp, const real *weight, const real *bias,
                                int N, int in, int out_width) {
    matmul(out, ld_out, rows_of(inp, in), transpose(rows_of(weight, in)), N, out_width, in, 1, 0, bias);
}

static void linear_backward_fast(real *dinp, real *dweight, real *dbias, const real *dout, int ld_dout,
                                 const real *inp, const real *weight, int N, int in, int out_width) {
    matmul(dinp, in, rows_of(dout, ld_dout), rows_of(weight, in), N, in, out_width, 1, 0, NULL);
    matmul(dweight, in, transpose(rows_of(dout, ld_dout)), rows_of(inp, in), out_width, in, N, 1, 1, NULL);
    if (!dbias) return;
    #pragma omp parallel for
    for (int o = 0; o < out_width; o += COLUMNS) {
        int width = min_int(COLUMNS, out_width - o);
        real sum[COLUMNS] = {0};
        for (int64_t n = 0; n < N; n++)
            for (int i = 0; i < width; i++) sum[i] += dout[n * ld_dout + o + i];
        for (int i = 0; i < width; i++) dbias[o + i] += sum[i];
    }
}

static void gelu_forward_fast(real *out, const real *inp, int ld, int N, int D) {
    #pragma omp parallel for if (N > 1)
    for (int64_t n = 0; n < N; n++)
        for (int i = 0; i < D; i++) {
            real x = inp[n * ld + i];
            out[n * D + i] = x * normal_cdf(x, exp_real(-x * x / 2));
        }
}

static void gelu_backward_fast(real *dinp, const real *dout, const real *inp, int ld, int N, int D) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++)
        for (int i = 0; i < D; i++) {
            real x = inp[n * ld + i], gauss = exp_real(-x * x / 2);
            real slope = normal_cdf(x, gauss) + x * gauss * (real)0.39894228040143267794;
            dinp[n * ld + i] = dout[n * D + i] * slope;
        }
}

static void gain_backward_fast(real *dx, real *dweight, real *dbias, real *dgamma, const real *gamma,
                               const real *x, const real *weight, real gamma_max, int N, int D) {
    double sum = 0;
    for (int n = 0; n < N; n++) {
        real ratio = gamma[n] / gamma_max;
        dgamma[n] *= gamma_max * (1 - ratio * ratio);
        sum += (double)dgamma[n];
    }
    dbias[0] += (real)sum;
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++)
        for (int i = 0; i < D; i++) dx[n * D + i] += dgamma[n] * weight[i];
    matmul(dweight, D, rows_of(dgamma, N), rows_of(x, D), 1, D, N, 1, 1, NULL);
}

static void crossentropy_forward_fast(real *losses, real *logsumexp, const real *logits, const int *targets,
                                      int N, int V) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const real *row = logits + n * V;
        real max = row[0], sum = 0;
        for (int i = 1; i < V; i++) max = row[i] > max ? row[i] : max;
        for (int i = 0; i < V; i++) sum += exp_real(row[i] - max);
        logsumexp[n] = max + (real)log((double)sum);
        losses[n] = targets[n] < 0 ? 0 : logsumexp[n] - row[targets[n]];
    }
}

static void crossentropy_backward_fast(real *dlogits, const real *logits, const real *logsumexp,
                                       const int *targets, real dloss, int N, int V) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const real *row = logits + n * V;
        real *drow = dlogits + n * V, scale = targets[n] < 0 ? 0 : dloss;
        for (int i = 0; i < V; i++) drow[i] = scale * exp_real(row[i] - logsumexp[n]);
        if (targets[n] >= 0) drow[targets[n]] -= dloss;
    }
}

// In blocks that do not depend on the number of threads.
static double norm_fast(const real *x, int64_t n) {
    enum { BLOCKS = 64 };
    double partial[BLOCKS], sum = 0;
    #pragma omp parallel for
    for (int block = 0; block < BLOCKS; block++) {
        int64_t from = n / BLOCKS * block, to = block == BLOCKS - 1 ? n : from + n / BLOCKS;
        double squares = 0;
        for (int64_t i = from; i < to; i++) squares += (double)x[i] * (double)x[i];
        partial[block] = squares;
    }
    for (int block = 0; block < BLOCKS; block++) sum += partial[block];
    return sqrt(sum);
}

// ----------------------------------------------------------------------------
// the same, fast: attention and feedback in panels of rows
//
// Both compute a softmax over the past for every row, T×T weights. They work on panels of P rows, so that no
// more than P×T of them exist at once: with the keys before the panel's first row i0 a panel is a full
// rectangle, at its end stands a triangle,
//
//                keys 0 ................ i0 ........ i0+n
//     row i0     [ x  x  x  x  x  x  x  x | .          ]       x: weights; .: inside the panel
//     ...        [ x  x  x  x  x  x  x  x | .  .       ]
//     row i0+n-1 [ x  x  x  x  x  x  x  x | .  .  .    ]
//
// and what a panel does with it are matrix products. Its weights are stored transposed, the weight of row r
// for key j at [j·n + r]: a vector holds one key for many rows, and the softmax runs without a sum across
// lanes.

static inline Matrix panel_rows(const real *weights, int n) { Matrix m = {weights, 1, n}; return m; }

// P 0 chooses: low panels waste less above the diagonal, high ones make larger products.
static int panel_height(int P, int T) {
    return P > 0 ? min_int(P, PANEL_MAX) : T <= 256 ? 32 : T <= 1024 ? 64 : PANEL_MAX;
}

enum { KEYS = 256 }; // that attention takes at a time

// Numbers of scratch that a thread needs: weights of a panel, their gradient, and the weights inside the
// panel. It is more than the two rows of the plain loops.
static size_t panel_scratch(int T) { return PANEL_MAX * (2 * (size_t)T + PANEL_MAX); }

// Heads and sequences do not depend on each other: where they can be shared out evenly a thread takes whole
// ones, else all threads work on one after the other, inside the products.
static int shared_out(int items) {
    int threads = omp_get_max_threads();
    return threads == 1 || items % threads == 0 || items >= 4 * threads;
}

// w_jr = -∞ for the keys j from seen + r on, which row r does not see
__attribute__((always_inline))
static inline void hide_future(real *w, int n, int seen, int cols, int m) {
    for (int64_t j = seen > 0 ? seen : 0; j < cols; j++)
        for (int r = 0; r < min_int(m, (int)j - seen + 1); r++) w[j * n + r] = -INFINITY;
}

// max_r = max(max_r, w_0r, w_1r, ...),   w_jr = exp(w_jr - max_r),   sum_r += Σ_j w_jr
__attribute__((always_inline))
static inline void exponentials(real *w, real *max, real *sum, int n, int cols, int m) {
    for (int64_t j = 0; j < cols; j++) {
        #pragma omp simd
        for (int r = 0; r < m; r++) max[r] = w[j * n + r] > max[r] ? w[j * n + r] : max[r];
    }
    for (int64_t j = 0; j < cols; j++)
        for (int r = 0; r < m; r++) {
            real e = exp_real(w[j * n + r] - max[r]);
            w[j * n + r] = e;
            sum[r] += e;
        }
}

// Softmax down the columns of logits, m ≤ TILE_COLS columns of rows n apart; see softmax_panel. Row r sees
// the keys j below seen + r. m is a constant where it can be: the compiler keeps maximum and sum in registers
// then.
__attribute__((always_inline))
static inline void softmax_columns(real *w, real *stats, int recompute, const real *gain, int n, int seen,
                                   int cols, int m) {
    real max[TILE_COLS], sum[TILE_COLS];
    hide_future(w, n, seen, cols, m);
    if (recompute) {
        for (int r = 0; r < m; r++) max[r] = stats[2 * r];
        for (int r = 0; r < m; r++) sum[r] = stats[2 * r + 1] * (gain ? gain[r] : 1);
        for (int64_t j = 0; j < cols; j++)
            for (int r = 0; r < m; r++) w[j * n + r] = sum[r] * exp_real(w[j * n + r] - max[r]);
        return;
    }
    for (int r = 0; r < m; r++) {
        max[r] = (real)-1e30; // finite: a row that sees nothing has no NaN
        sum[r] = 0;
    }
    exponentials(w, max, sum, n, cols, m);
    for (int r = 0; r < m; r++) {
        real scale = sum[r] > 0 ? 1 / sum[r] : sum[r]; // NaN stays NaN
        stats[2 * r] = max[r];
        stats[2 * r + 1] = scale;
        sum[r] = scale * (gain ? gain[r] : 1);
    }
    for (int64_t j = 0; j < cols; j++)
        for (int r = 0; r < m; r++) w[j * n + r] *= sum[r];
}

ONE_COPY static void softmax_block(real *w, real *stats, int recompute, const real *gain, int n, int seen,
                                   int cols, int m) {
    if (m == TILE_COLS) softmax_columns(w, stats, recompute, gain, n, seen, cols, TILE_COLS);
    else if (n == 1) softmax_columns(w, stats, recompute, gain, 1, seen, cols, 1); // generation
    else softmax_columns(w, stats, recompute, gain, n, seen, cols, m);
}

// The arguments of softmax_block for a whole panel of n rows, of which an item is TILE_COLS.
typedef struct {
    real *weights, *stats;
    int recompute;
    const real *gain;
    int n, seen, cols;
} Softmax;

static void softmax_item(const void *call, int item) {
    const Softmax *p = (const Softmax *)call;
    int from = item * TILE_COLS, m = min_int(TILE_COLS, p->n - from);
    const real *gain = p->gain ? p->gain + from : NULL;
    real *weights = p->weights + from, *stats = p->stats + 2 * from;
    softmax_block(weights, stats, p->recompute, gain, p->n, p->seen + from, p->cols, m);
}

// Rows of softmax weights over the past. For the rows t = i0 .. i0+n-1
//     weights[j·n + t-i0] = gain_t · exp(q_t·k_j/√d - max_t) / sum_t
// for the keys j that t sees (j ≤ t; strict: j < t), else 0.
// q: n rows, k: i0+n rows, gain (n) or NULL for 1. stats (n,2) keeps each row's maximum and 1/sum. Who says
// `recompute` has them from before: the feedback's backward pass, whose forward pass wrote them here, gets
// the same weights, bit for bit; attention's, with those of attention_panel, gets its weights to rounding. A
// row that sees nothing (row 0, strict) has no weights: 1/sum is 0.
static void softmax_panel(real *weights, real *stats, int recompute, const real *gain, const real *q,
                          const real *k, int ld, int i0, int n, int d, int strict) {
    int cols = i0 + n;
    real scale = 1 / (real)sqrt((double)d);
    matmul(weights, n, rows_of(k, ld), transpose(rows_of(q, ld)), cols, n, d, scale, 0, NULL);
    Softmax softmax = {weights, stats, recompute, gain, n, i0 + !strict, cols};
    for_items((n + TILE_COLS - 1) / TILE_COLS, cols > 256, softmax_item, &softmax);
}

// Its backward pass, from dweights, the gradient of the weights without their gain:
//     delta_r = Σ_j weights_rj dweights_rj,   dlogits_rj = gain_r weights_rj (dweights_rj - delta_r)
// dlogits takes the place of dweights, gain_r weights_rj that of the weights. Both (cols,n), delta and gain
// (n) or NULL.
static void softmax_panel_backward(real *dweights, real *weights, real *delta, const real *gain, int n,
                                   int cols) {
    real sum[PANEL_MAX] = {0}, g[PANEL_MAX];
    for (int r = 0; r < n; r++) g[r] = gain ? gain[r] : 1;
    for (int64_t j = 0; j < cols; j++)
        for (int r = 0; r < n; r++) sum[r] += weights[j * n + r] * dweights[j * n + r];
    for (int64_t j = 0; j < cols; j++)
        for (int r = 0; r < n; r++) {
            real w = g[r] * weights[j * n + r];
            weights[j * n + r] = w;
            dweights[j * n + r] = w * (dweights[j * n + r] - sum[r]);
        }
    for (int r = 0; delta && r < n; r++) delta[r] = sum[r];
}

// The arguments of attention_forward, of which an item is one head of one sequence.
typedef struct {
    real *out, *stats, *scratch;
    const real *q, *k, *v;
    Shape shape;
    int P;
} AttentionForward;

// KEYS keys more for the rows of a panel whose maximum and Σ exp(logit - maximum) over those before stand in
// stats: both take them in, and weights are exp(logit - maximum). What was summed up with the old maximum
// shrinks by `shrink` (n). Other arguments as in Softmax; an item is TILE_COLS rows.
typedef struct {
    real *weights, *stats, *shrink;
    int n, seen, cols;
} MoreKeys;

__attribute__((always_inline))
static inline void more_keys_columns(real *w, real *stats, real *shrink, int n, int seen, int cols, int m) {
    real max[TILE_COLS], sum[TILE_COLS] = {0};
    hide_future(w, n, seen, cols, m);
    for (int r = 0; r < m; r++) max[r] = stats[2 * r];
    exponentials(w, max, sum, n, cols, m);
    for (int r = 0; r < m; r++) {
        shrink[r] = exp_real(stats[2 * r] - max[r]);
        stats[2 * r] = max[r];
        stats[2 * r + 1] = shrink[r] * stats[2 * r + 1] + sum[r];
    }
}

ONE_COPY static void more_keys_item(const void *call, int item) {
    const MoreKeys *p = (const MoreKeys *)call;
    int from = item * TILE_COLS, m = min_int(TILE_COLS, p->n - from), seen = p->seen + from;
    real *w = p->weights + from, *stats = p->stats + 2 * from, *shrink = p->shrink + from;
    if (m == TILE_COLS) more_keys_columns(w, stats, shrink, p->n, seen, p->cols, TILE_COLS);
    else if (p->n == 1) more_keys_columns(w, stats, shrink, 1, seen, p->cols, 1); // generation
    else more_keys_columns(w, stats, shrink, p->n, seen, p->cols, m);
}

static void scale_rows(real *x, int ld, const real *scale, int step, int n, int width) {
    for (int64_t r = 0; r < n; r++)
        for (int i = 0; i < width; i++) x[r * ld + i] *= scale[r * step];
}

// The rows i0 .. i0+n-1 of a head, KEYS keys at a time, so that their weights e stay in the cache:
//     out_I = ((e_0 v_0) · shrink_1 + e_1 v_1) · shrink_2 + ... + e_m v_m,   then divided by the rows' sums
// q: the panel's rows; out and stats likewise. k and v: the head's rows from position 0 on. weights: room for
// n·KEYS numbers.
static void attention_panel(real *out, real *stats, real *weights, const real *q, const real *k,
                            const real *v, Shape shape, int i0, int n) {
    int d = shape.d, ld = shape.ld, D = shape.H * d, cols = i0 + n;
    real shrink[PANEL_MAX], scale = 1 / (real)sqrt((double)d);
    for (int r = 0; r < n; r++) {
        stats[2 * r] = (real)-1e30; // as in softmax_columns
        stats[2 * r + 1] = 0;
    }
    for (int j0 = 0; j0 < cols; j0 += KEYS) {
        int m = min_int(KEYS, cols - j0);
        Matrix k_J = rows_of(k + (int64_t)j0 * ld, ld), v_J = rows_of(v + (int64_t)j0 * ld, ld);
        MoreKeys more = {weights, stats, shrink, n, i0 + 1 - j0, m};
        matmul(weights, n, k_J, transpose(rows_of(q, ld)), m, n, d, scale, 0, NULL);
        for_items((n + TILE_COLS - 1) / TILE_COLS, n * m > 8192, more_keys_item, &more);
        if (j0) scale_rows(out, D, shrink, 1, n, d);
        matmul(out, D, panel_rows(weights, n), v_J, n, d, m, 1, j0 > 0, NULL);
    }
    for (int r = 0; r < n; r++)
        if (stats[2 * r + 1] > 0) stats[2 * r + 1] = 1 / stats[2 * r + 1]; // NaN stays NaN
    scale_rows(out, D, stats + 1, 2, n, d);
}

// Item b·H + h is head h of sequence b, panel after panel.
ONE_COPY static void attention_head(const void *call, int item) {
    const AttentionForward *p = (const AttentionForward *)call;
    int T = p->shape.T, H = p->shape.H, d = p->shape.d, ld = p->shape.ld;
    int first = p->shape.first, rows = T - first;
    int64_t b = item / H, h = item % H, group = h / (H / p->shape.G);
    const real *k = p->k + b * T * ld + group * d, *v = p->v + b * T * ld + group * d;
    real *weights = p->scratch + panel_scratch(T) * (size_t)omp_get_thread_num();
    for (int i0 = first; i0 < T; i0 += p->P) {
        int64_t row = b * rows + i0 - first;
        real *stats = p->stats + 2 * ((int64_t)item * rows + i0 - first), *out = p->out + (row * H + h) * d;
        int n = min_int(p->P, T - i0);
        attention_panel(out, stats, weights, p->q + row * ld + h * d, k, v, p->shape, i0, n);
    }
}

static void attention_forward_fast(real *out, real *stats, Work work, const real *q, const real *k,
                                   const real *v, Shape shape) {
    int P = panel_height(work.P, shape.T);
    AttentionForward call = {.out = out, .stats = stats, .scratch = work.scratch, .q = q, .k = k, .v = v,
                             .shape = shape, .P = P};
    int items = shape.B * shape.H;
    for_items(items, shared_out(items), attention_head, &call);
}

// The arguments of attention_backward, of which an item is one group of heads of one sequence.
typedef struct {
    real *dq, *dk, *dv, *stats, *scratch;
    const real *dout, *q, *k, *v;
    Shape shape;
    int P;
} AttentionBackward;

// Each line of attention_backward's equations is a matrix product for a panel of rows t. Item b·G + g is the
// heads of one group: they add to the same dk and dv. Panels run from the last: it sees all keys, so it
// writes what the others add to.
ONE_COPY static void attention_group_backward(const void *call, int item) {
    const AttentionBackward *p = (const AttentionBackward *)call;
    int T = p->shape.T, H = p->shape.H, G = p->shape.G, d = p->shape.d, ld = p->shape.ld, P = p->P;
    real *weights = p->scratch + panel_scratch(T) * (size_t)omp_get_thread_num();
    real *dlogits = weights + PANEL_MAX * (int64_t)T, scale = 1 / (real)sqrt((double)d);
    int64_t b = item / G, group = item % G, keys = b * T * ld + group * d, first_head = group * (H / G);
    const real *k = p->k + keys, *v = p->v + keys;
    real *dk = p->dk + keys, *dv = p->dv + keys;
    for (int64_t h = first_head; h < first_head + H / G; h++)
        for (int i0 = (T - 1) / P * P; i0 >= 0; i0 -= P) {
            int n = min_int(P, T - i0), cols = i0 + n;
            real beta = h == first_head && cols == T ? 0 : 1;
            int64_t row = b * T + i0;
            const real *q = p->q + row * ld + h * d, *dout = p->dout + (row * H + h) * d;
            real *dq = p->dq + row * ld + h * d, *stats = p->stats + 2 * ((b * H + h) * T + i0);
            softmax_panel(weights, stats, 1, NULL, q, k, ld, i0, n, d, 0);
            matmul(dlogits, n, rows_of(v, ld), transpose(rows_of(dout, H * d)), cols, n, d, 1, 0, NULL);
            softmax_panel_backward(dlogits, weights, NULL, NULL, n, cols);
            matmul(dq, ld, panel_rows(dlogits, n), rows_of(k, ld), n, d, cols, scale, 0, NULL);
            matmul(dk, ld, rows_of(dlogits, n), rows_of(q, ld), cols, d, n, scale, beta, NULL);
            matmul(dv, ld, rows_of(weights, n), rows_of(dout, H * d), cols, d, n, 1, beta, NULL);
        }
}

static void attention_backward_fast(real *dq, real *dk, real *dv, Work work, const real *dout, real *stats,
                                    const real *q, const real *k, const real *v, Shape shape) {
    int P = panel_height(work.P, shape.T);
    AttentionBackward call = {.dq = dq, .dk = dk, .dv = dv, .stats = stats, .scratch = work.scratch,
                              .dout = dout, .q = q, .k = k, .v = v, .shape = shape, .P = P};
    int items = shape.B * shape.G;
    for_items(items, shared_out(items), attention_group_backward, &call);
}

// The arguments of feedback_forward, of which an item is one sequence.
typedef struct {
    real *s, *stats, *scratch;
    const real *f, *q, *k, *gamma;
    Shape shape;
    int P;
} FeedbackForward;

// A panel, the rows i0..i0+n-1, is done in three steps, the first two of them matrix products:
//     A_I = softmax_panel(q'_I, k'), its rows times gamma
//     s_I = f_I + A_I,before s_before        what all rows before the panel give
//     s_I := (I - A_I,inside)^-1 s_I         what its rows give each other: a small triangle, row by row
ONE_COPY static void feedback_sequence(const void *call, int item) {
    const FeedbackForward *p = (const FeedbackForward *)call;
    int T = p->shape.T, D = p->shape.d, ld = p->shape.ld, first = p->shape.first;
    int64_t b = item;
    const real *k = p->k + b * T * ld;
    real *A = p->scratch + panel_scratch(T) * (size_t)omp_get_thread_num(), *s = p->s + b * T * D;
    for (int i0 = first; i0 < T; i0 += p->P) {
        int n = min_int(p->P, T - i0);
        int64_t row = b * (T - first) + i0 - first; // of f, q', gamma and stats
        real *s_I = s + (int64_t)i0 * D;
        // the weights of the keys before i0, and of the panel's own
        Matrix before = panel_rows(A, n), inside = panel_rows(A + (int64_t)i0 * n, n);
        softmax_panel(A, p->stats + 2 * row, 0, p->gamma + row, p->q + row * ld, k, ld, i0, n, D, 1);
        memcpy(s_I, p->f + row * D, sizeof(real) * (size_t)n * (size_t)D);
        matmul(s_I, D, before, rows_of(s, D), n, D, i0, 1, 1, NULL);
        triangular_solve(s_I, D, inside, n, D);
    }
}

static void feedback_forward_fast(real *s, real *stats, Work work, const real *f, const real *q,
                                  const real *k, const real *gamma, Shape shape) {
    int P = panel_height(work.P, shape.T);
    FeedbackForward call = {.s = s, .stats = stats, .scratch = work.scratch, .f = f, .q = q, .k = k,
                            .gamma = gamma, .shape = shape, .P = P};
    for_items(shape.B, shared_out(shape.B), feedback_sequence, &call);
}

// The arguments of feedback_backward, of which an item is one sequence.
typedef struct {
    real *ds, *dq, *dk, *dgamma, *stats, *scratch;
    const real *s, *q, *k, *gamma;
    Shape shape;
    int P;
} FeedbackBackward;

// Panels from the last, in which α is computed again; λ is ds before and df after.
ONE_COPY static void feedback_sequence_backward(const void *call, int item) {
    const FeedbackBackward *p = (const FeedbackBackward *)call;
    int T = p->shape.T, D = p->shape.d, ld = p->shape.ld, P = p->P;
    int64_t b = item;
    real *A = p->scratch + panel_scratch(T) * (size_t)omp_get_thread_num(), scale = 1 / (real)sqrt((double)D);
    real *dlogits = A + PANEL_MAX * (int64_t)T, *inside = dlogits + PANEL_MAX * (int64_t)T;
    real *lambda = p->ds + b * T * D, *dk = p->dk + b * T * ld;
    const real *s = p->s + b * T * D, *k = p->k + b * T * ld;
    for (int i0 = (T - 1) / P * P; i0 >= 0; i0 -= P) {
        int n = min_int(P, T - i0), cols = i0 + n;
        int64_t row = b * T + i0;
        const real *q = p->q + row * ld, *gamma = p->gamma + row;
        real *lambda_I = lambda + (int64_t)i0 * D, *dq = p->dq + row * ld, *delta = p->dgamma + row;
        Matrix reversed = {inside + n * n - 1, -n, -1}; // transposed, from its last element
        softmax_panel(A, p->stats + 2 * row, 1, NULL, q, k, ld, i0, n, D, 1); // α_I
        for (int64_t j = 0; j < n; j++)
            for (int r = 0; r < n; r++) inside[j * n + r] = gamma[r] * A[(i0 + j) * n + r];
        triangular_solve(lambda_I + (int64_t)(n - 1) * D, -D, reversed, n, D); // λ_I, now whole
        matmul(dlogits, n, rows_of(s, D), transpose(rows_of(lambda_I, D)), cols, n, D, 1, 0, NULL); // dA_I
        softmax_panel_backward(dlogits, A, delta, gamma, n, cols); // dlogit_I, A_I
        matmul(lambda, D, rows_of(A, n), rows_of(lambda_I, D), i0, D, n, 1, 1, NULL); // λ_before
        matmul(dq, ld, panel_rows(dlogits, n), rows_of(k, ld), n, D, cols, scale, 0, NULL);
        matmul(dk, ld, rows_of(dlogits, n), rows_of(q, ld), cols, D, n, scale, cols == T ? 0 : 1, NULL);
    }
}

static void feedback_backward_fast(real *ds, real *dq, real *dk, real *dgamma, Work work, const real *s,
                                   real *stats, const real *q, const real *k, const real *gamma,
                                   Shape shape) {
    int P = panel_height(work.P, shape.T);
    FeedbackBackward call = {.ds = ds, .dq = dq, .dk = dk, .dgamma = dgamma, .stats = stats,
                             .scratch = work.scratch, .s = s, .q = q, .k = k, .gamma = gamma, .shape = shape,
                             .P = P};
    for_items(shape.B, shared_out(shape.B), feedback_sequence_backward, &call);
}

// ----------------------------------------------------------------------------
// the same, fast: Mamba-2

static void conv_forward_fast(real *out, const real *inp, int ld, real *tail, const real *weight,
                              const real *bias, int B, int T, int W, int first) {
    int N = B * (T - first);
    #pragma omp parallel for if (N > 1)
    for (int64_t n = 0; n < N; n++) {
        real *u = out + n * W;
        conv_row(u, inp, ld, tail, weight, bias, n, T, W, first);
        for (int c = 0; c < W; c++) u[c] *= sigmoid_fast(u[c]);
    }
    conv_remember(tail, inp, ld, T, W, first);
}

static void conv_backward_fast(real *dinp, real *dweight, real *dbias, real *dout, const real *inp, int ld,
                               const real *weight, const real *bias, int B, int T, int W) {
    #pragma omp parallel for
    for (int64_t n = 0; n < B * T; n++) {
        real *u = dinp + n * ld, *du = dout + n * W;
        conv_row(u, inp, ld, NULL, weight, bias, n, T, W, 0);
        for (int c = 0; c < W; c++) {
            real s = sigmoid_fast(u[c]);
            du[c] *= s * (1 + u[c] * (1 - s));
        }
    }
    #pragma omp parallel for
    for (int64_t n = 0; n < B * T; n++) {
        real *sum = dinp + n * ld;
        memset(sum, 0, sizeof(real) * (size_t)W);
        for (int lag = 0; lag < min_int(TAPS, T - (int)(n % T)); lag++)
            for (int c = 0; c < W; c++) sum[c] += weight[c * TAPS + TAPS - 1 - lag] * dout[(n + lag) * W + c];
    }
    #pragma omp parallel for
    for (int c0 = 0; c0 < W; c0 += COLUMNS)
        for (int64_t n = 0; n < B * T; n++)
            for (int c = c0; c < min_int(c0 + COLUMNS, W); c++) {
                real du = dout[n * W + c];
                dbias[c] += du;
                for (int lag = 0; lag < min_int(TAPS, (int)(n % T) + 1); lag++)
                    dweight[c * TAPS + TAPS - 1 - lag] += du * inp[(n - lag) * ld + c];
            }
}

static void step_backward_fast(real *dinp, real *dbias, const real *dstep, int ld_dstep, const real *inp,
                               int ld, const real *bias, int N, int heads) {
    for (int h = 0; h < heads; h++) {
        double sum = 0;
        for (int64_t n = 0; n < N; n++) {
            dinp[n * ld + h] = dstep[n * ld_dstep + h] * sigmoid_fast(inp[n * ld + h] + bias[h]);
            sum += (double)dinp[n * ld + h];
        }
        dbias[h] += (real)sum;
    }
}

// The scan in chunks of P rows: with fade_tj the product of keep from j+1 to t, decay_t that from the chunk's
// first row to t, and h the state before the chunk,
//     y_t = decay_t c_t^T h + Σ_{j≤t} (c_t·b_j) fade_tj Δ_j x_j + skip · x_t
//     h  := decay_last h + Σ_j fade_last,j Δ_j b_j x_j^T
// so that all but scales are matrix products, over all heads at once where the head only scales.
static int chunk_height(int P) { return P > 0 ? min_int(P, CHUNK) : CHUNK; }

// Numbers of scratch that a thread needs; or, plain, the one that works: see scan_backward.
static size_t scan_scratch(int E, int S, int heads) {
    size_t fast =
        (size_t)CHUNK * ((size_t)heads * (CHUNK + 1) + 2 * CHUNK + 4 * (size_t)E) + (size_t)S * (size_t)E;
    size_t of_loops = (size_t)(CHUNK + 2) * (size_t)S * (size_t)(E / heads);
    return fast > of_loops ? fast : of_loops;
}

static void scan_keep(real *keep, const real *step, const real *A_log, int n, int heads) {
    for (int t = 0; t < n; t++)
        for (int h = 0; h < heads; h++)
            keep[t * heads + h] = exp_real(-exp_real(A_log[h]) * step[t * heads + h]);
}

// Of head h: fades (n,n), 0 for j > t, and M = (c b^T) ⊙ fades ⊙ Δ_j, given cb = c b^T.
static void chunk_weights(real *M, real *fades, real *delta, const real *cb, const real *keep,
                          const real *step, int n, int heads, int h) {
    for (int t = 0; t < n; t++) {
        real *row = fades + t * n, kept = keep[t * heads + h];
        delta[t] = step[t * heads + h];
        for (int j = 0; j < n; j++) row[j] = j < t ? kept * row[j - n] : j == t;
        for (int j = 0; j < n; j++) M[t * n + j] = j <= t ? row[j] * cb[t * n + j] * delta[j] : 0;
    }
}

// The arguments of scan_forward, and of one chunk of it, in which y, next = decay_last · state, fresh (n,E),
// x and step begin at the chunk's first row.
typedef struct {
    real *y, *states;
    int kept;
    real *scratch;
    const real *xbc, *step;
    ScanShape scan;
    int P;
} ScanForward;
typedef struct {
    real *y, *next, *fresh;
    const real *state, *cb, *keep, *x, *step;
    ScanShape scan;
    int n;
} ScanChunk;

// Head h of a chunk: y = decay ⊙ y + (M + skip·I) x, and what it adds to the state: fresh.
ONE_COPY static void scan_head(const void *call, int h) {
    const ScanChunk *p = (const ScanChunk *)call;
    int n = p->n, E = p->scan.E, S = p->scan.S, heads = p->scan.heads, w = E / heads, W = E + 2 * S;
    real *y = p->y, *next = p->next, *fresh = p->fresh;
    const real *x = p->x, *state = p->state, *keep = p->keep;
    real M[CHUNK * CHUNK], fades[CHUNK * CHUNK], delta[CHUNK], decay = 1;
    chunk_weights(M, fades, delta, p->cb, keep, p->step, n, heads, h);
    for (int64_t t = 0; t < n; t++) {
        real scale = fades[(n - 1) * n + t] * delta[t];
        decay *= keep[t * heads + h];
        M[t * n + t] += p->scan.skip[h];
        for (int i = h * w; i < (h + 1) * w; i++) {
            y[t * E + i] *= decay;
            fresh[t * E + i] = scale * x[t * W + i];
        }
    }
    matmul(y + h * w, E, rows_of(M, n), rows_of(x + h * w, W), n, w, n, 1, 1, NULL);
    for (int64_t s = 0; next && s < S; s++)
        for (int i = h * w; i < (h + 1) * w; i++) next[s * E + i] = decay * state[s * E + i];
}

ONE_COPY static void scan_sequence(const void *call, int item) {
    const ScanForward *p = (const ScanForward *)call;
    ScanShape scan = p->scan;
    int T = scan.T, E = scan.E, S = scan.S, heads = scan.heads, W = E + 2 * S, P = p->P;
    int64_t b = item, size = (int64_t)S * E, slots = p->kept ? (T + P - 1) / P : 1;
    real *keep = p->scratch + scan_scratch(E, S, heads) * (size_t)omp_get_thread_num();
    real *cb = keep + CHUNK * heads;
    real *fresh = cb + CHUNK * CHUNK, *state = p->states + b * slots * size;
    if (p->kept) memset(state, 0, sizeof(real) * (size_t)size);
    for (int i0 = 0; i0 < T; i0 += P) {
        int n = min_int(P, T - i0);
        int64_t row = b * T + i0;
        const real *x = p->xbc + row * W, *b_I = x + E, *c_I = b_I + S, *step = p->step + row * heads;
        real *y = p->y + row * E, *next = !p->kept ? state : i0 + n < T ? state + size : NULL;
        scan_keep(keep, step, scan.A_log, n, heads);
        matmul(cb, n, rows_of(c_I, W), transpose(rows_of(b_I, W)), n, n, S, 1, 0, NULL);
        matmul(y, E, rows_of(c_I, W), rows_of(state, E), n, E, S, 1, 0, NULL);
        ScanChunk chunk = {.y = y, .next = next, .fresh = fresh, .state = state, .cb = cb, .keep = keep,
                           .x = x, .step = step, .scan = scan, .n = n};
        for_items(heads, n * E > PARALLEL_WORK / 32, scan_head, &chunk);
        if (next) matmul(next, E, transpose(rows_of(b_I, W)), rows_of(fresh, E), S, E, n, 1, 1, NULL);
        state += p->kept ? size : 0;
    }
}

static void scan_forward_fast(real *y, real *states, int kept, Work work, const real *xbc, const real *step,
                              ScanShape scan) {
    ScanForward call = {.y = y, .states = states, .kept = kept, .scratch = work.scratch, .xbc = xbc,
                        .step = step, .scan = scan, .P = chunk_height(work.P)};
    for_items(scan.B, shared_out(scan.B), scan_sequence, &call);
}

// Backward, chunks from the last. With M = (c b^T) ⊙ fades ⊙ Δ as above, dh (S,E) the gradient of the state
// after the chunk and faded = decay ⊙ dy, fresh = fade_last Δ ⊙ x, read = c h, pulled = b dh:
//     dM = dy x^T a head,   d(cb) = Σ_heads dM ⊙ fades ⊙ Δ,   dx = (M + skip·I)^T dy + fade_last Δ ⊙ pulled
//     dc = faded h^T + d(cb) b,   db = fresh dh^T + d(cb)^T c,   dh := decay_last dh + c^T faded
// With L_t the logarithm of decay_t, fade_tj = exp(L_t - L_j): the gradients of fades and decays go to dL,
// and as L sums -exp(A_log) Δ, the sum of dL from t to the chunk's end gives dΔ_t and dA_log. Columns h,
// heads + h and 2·heads + h of dstep are the gradients of Δ, A_log and skip from that row.
typedef struct {
    real *dxbc, *dstep;
    real *scratch;
    const real *dy, *states, *xbc, *step;
    ScanShape scan;
    int P;
} ScanBackward;
typedef struct {
    const real *state, *keep, *cb, *x, *step, *dy, *faded, *read, *pulled;
    real *dh, *dx, *dstep, *dcb;
    ScanShape scan;
    int n;
} ScanChunkBackward;

ONE_COPY static void scan_head_backward(const void *call, int h) {
    const ScanChunkBackward *k = (const ScanChunkBackward *)call;
    int n = k->n, E = k->scan.E, S = k->scan.S, heads = k->scan.heads, w = E / heads, W = E + 2 * S;
    int last = n - 1;
    real *dcb = k->dcb + h * n * n;
    real M[CHUNK * CHUNK], fades[CHUNK * CHUNK], dM[CHUNK * CHUNK], ddelta[CHUNK] = {0}, delta[CHUNK];
    double dL[CHUNK] = {0}; // in double what is added here is taken away there without a trace
    chunk_weights(M, fades, delta, k->cb, k->keep, k->step, n, heads, h);
    matmul(dM, n, rows_of(k->dy + h * w, E), transpose(rows_of(k->x + h * w, W)), n, n, w, 1, 0, NULL);
    for (int t = 0; t < n; t++) {
        for (int j = 0; j <= t; j++) {
            real term = dM[t * n + j] * fades[t * n + j] * k->cb[t * n + j], product = term * delta[j];
            ddelta[j] += term;
            dL[j] -= (double)product;
            dL[t] += (double)product;
        }
        for (int j = 0; j < n; j++) dcb[t * n + j] = dM[t * n + j] * fades[t * n + j] * delta[j];
        k->dstep[t * 3 * heads + 2 * heads + h] = dM[t * n + t];
        M[t * n + t] += k->scan.skip[h];
    }
    matmul(k->dx + h * w, W, transpose(rows_of(M, n)), rows_of(k->dy + h * w, E), n, w, n, 1, 0, NULL);
    real decay = 1;
    for (int64_t t = 0; t < n; t++) {
        real scale = fades[last * n + t] * delta[t], read = 0, taken = 0;
        decay *= k->keep[t * heads + h];
        for (int i = h * w; i < (h + 1) * w; i++) {
            read += k->faded[t * E + i] * k->read[t * E + i];
            taken += k->x[t * W + i] * k->pulled[t * E + i];
            k->dx[t * W + i] += scale * k->pulled[t * E + i];
        }
        real product = scale * taken;
        ddelta[t] += fades[last * n + t] * taken;
        dL[t] += (double)read - (double)product;
        dL[last] += (double)product;
    }
    real carried = 0;
    for (int64_t s = 0; s < S; s++)
        for (int i = h * w; i < (h + 1) * w; i++) {
            carried += decay * k->state[s * E + i] * k->dh[s * E + i];
            k->dh[s * E + i] *= decay;
        }
    double sum = (double)carried;
    real rate = exp_real(k->scan.A_log[h]);
    for (int t = last; t >= 0; t--) {
        sum += dL[t];
        k->dstep[t * 3 * heads + h] = ddelta[t] - rate * (real)sum;
        k->dstep[t * 3 * heads + heads + h] = -rate * delta[t] * (real)sum;
    }
}

// faded = decay ⊙ dy, decay_t from the chunk's first row to t; fresh = fade ⊙ Δ ⊙ x, fade_t from t to its
// last row
static void scan_fades(real *faded, real *fresh, const ScanChunkBackward *k) {
    int n = k->n, E = k->scan.E, heads = k->scan.heads, w = E / heads, W = E + 2 * k->scan.S;
    for (int h = 0; h < heads; h++) {
        real decay = 1, fade = 1;
        for (int64_t t = 0; t < n; t++) {
            decay *= k->keep[t * heads + h];
            for (int i = h * w; i < (h + 1) * w; i++) faded[t * E + i] = decay * k->dy[t * E + i];
        }
        for (int64_t t = n - 1; t >= 0; t--) {
            for (int i = h * w; i < (h + 1) * w; i++)
                fresh[t * E + i] = fade * k->step[t * heads + h] * k->x[t * W + i];
            fade *= k->keep[t * heads + h];
        }
    }
}

ONE_COPY static void scan_sequence_backward(const void *call, int item) {
    const ScanBackward *p = (const ScanBackward *)call;
    ScanShape scan = p->scan;
    int T = scan.T, E = scan.E, S = scan.S, heads = scan.heads, W = E + 2 * S, P = p->P;
    int64_t b = item, size = (int64_t)S * E, slots = (T + P - 1) / P;
    real *keep = p->scratch + scan_scratch(E, S, heads) * (size_t)omp_get_thread_num();
    real *cb = keep + CHUNK * heads, *dcb = cb + CHUNK * CHUNK, *dcb_heads = dcb + CHUNK * CHUNK;
    real *faded = dcb_heads + CHUNK * CHUNK * heads, *read = faded + CHUNK * E, *pulled = read + CHUNK * E;
    real *fresh = pulled + CHUNK * E, *dh = fresh + CHUNK * E;
    memset(dh, 0, sizeof(real) * (size_t)size);
    for (int i0 = (T - 1) / P * P; i0 >= 0; i0 -= P) {
        int n = min_int(P, T - i0);
        int64_t row = b * T + i0;
        const real *x = p->xbc + row * W, *b_I = x + E, *c_I = b_I + S, *step = p->step + row * heads;
        const real *dy = p->dy + row * E, *state = p->states + (b * slots + i0 / P) * size;
        real *dx = p->dxbc + row * W, *db = dx + E, *dc = db + S, *dstep = p->dstep + row * 3 * heads;
        ScanChunkBackward chunk = {
            .state = state, .keep = keep, .cb = cb, .x = x, .step = step, .dy = dy, .faded = faded,
            .read = read, .pulled = pulled, .dh = dh, .dx = dx, .dstep = dstep, .dcb = dcb_heads,
            .scan = scan, .n = n};
        scan_keep(keep, step, scan.A_log, n, heads);
        scan_fades(faded, fresh, &chunk);
        matmul(cb, n, rows_of(c_I, W), transpose(rows_of(b_I, W)), n, n, S, 1, 0, NULL);
        matmul(read, E, rows_of(c_I, W), rows_of(state, E), n, E, S, 1, 0, NULL);
        matmul(pulled, E, rows_of(b_I, W), rows_of(dh, E), n, E, S, 1, 0, NULL);
        matmul(dc, W, rows_of(faded, E), transpose(rows_of(state, E)), n, S, E, 1, 0, NULL);
        matmul(db, W, rows_of(fresh, E), transpose(rows_of(dh, E)), n, S, E, 1, 0, NULL);
        for_items(heads, n * E > PARALLEL_WORK / 32, scan_head_backward, &chunk);
        matmul(dh, E, transpose(rows_of(c_I, W)), rows_of(faded, E), S, E, n, 1, 1, NULL);
        memcpy(dcb, dcb_heads, sizeof(real) * (size_t)(n * n));
        for (int h = 1; h < heads; h++)
            for (int i = 0; i < n * n; i++) dcb[i] += dcb_heads[h * n * n + i];
        matmul(dc, W, rows_of(dcb, n), rows_of(b_I, W), n, S, n, 1, 1, NULL);
        matmul(db, W, transpose(rows_of(dcb, n)), rows_of(c_I, W), n, S, n, 1, 1, NULL);
    }
}

static void scan_backward_fast(real *dxbc, real *dstep, real *dA_log, real *dskip, Work work, const real *dy,
                               const real *states, const real *xbc, const real *step, ScanShape scan) {
    ScanBackward call = {.dxbc = dxbc, .dstep = dstep, .scratch = work.scratch, .dy = dy, .states = states,
                         .xbc = xbc, .step = step, .scan = scan, .P = chunk_height(work.P)};
    for_items(scan.B, shared_out(scan.B), scan_sequence_backward, &call);
    for (int h = 0; h < scan.heads; h++) {
        double sum[2] = {0, 0};
        for (int64_t n = 0; n < scan.B * scan.T; n++)
            for (int i = 0; i < 2; i++) sum[i] += (double)dstep[(n * 3 + i + 1) * scan.heads + h];
        dA_log[h] += (real)sum[0];
        dskip[h] += (real)sum[1];
    }
}

static void gated_rmsnorm_forward_fast(real *out, real *rstd, const real *y, const real *z, int ld,
                                       const real *weight, int N, int E) {
    #pragma omp parallel for if (N > 1)
    for (int64_t n = 0; n < N; n++) {
        real *v = out + n * E, squares = 0;
        const real *z_n = z + n * ld;
        for (int i = 0; i < E; i++) {
            v[i] = y[n * E + i] * z_n[i] * sigmoid_fast(z_n[i]);
            squares += v[i] * v[i];
        }
        rstd[n] = 1 / (real)sqrt((double)(squares / E) + 1e-5);
        for (int i = 0; i < E; i++) v[i] *= rstd[n] * weight[i];
    }
}

static void gated_rmsnorm_backward_fast(real *dy, real *dz, real *dweight, const real *dout, const real *y,
                                        const real *z, int ld, const real *rstd, const real *weight, int N,
                                        int E) {
    #pragma omp parallel for
    for (int d0 = 0; d0 < E; d0 += COLUMNS)
        for (int64_t n = 0; n < N; n++)
            for (int i = d0; i < min_int(d0 + COLUMNS, E); i++) {
                real gate = z[n * ld + i];
                dweight[i] += dout[n * E + i] * y[n * E + i] * gate * sigmoid_fast(gate) * rstd[n];
            }
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const real *y_n = y + n * E, *z_n = z + n * ld, *dout_n = dout + n * E;
        real dot = 0, r = rstd[n];
        for (int i = 0; i < E; i++) dot += dout_n[i] * weight[i] * y_n[i] * z_n[i] * sigmoid_fast(z_n[i]);
        dot *= r * r / E;
        for (int i = 0; i < E; i++) {
            real s = sigmoid_fast(z_n[i]), silu = z_n[i] * s;
            real dv = r * (dout_n[i] * weight[i] - y_n[i] * silu * dot);
            dz[n * ld + i] = dv * y_n[i] * s * (1 + z_n[i] * (1 - s));
            dy[n * E + i] = dv * silu;
        }
    }
}

// ----------------------------------------------------------------------------
// tables of tensors: every parameter and every activation, by name, shape and place

static Tensor *new_row(Table *table, const char *name, int layer) {
    if (table->n == table->room) {
        Tensor *larger = (Tensor *)realloc(table->rows, sizeof(Tensor) * (size_t)(table->room + 64));
        if (larger) {
            table->rows = larger;
            table->room += 64;
        } else {
            table->incomplete = 1;
        }
    }
    Tensor *row = table->last = table->incomplete ? &table->nowhere : &table->rows[table->n++];
    memset(row, 0, sizeof(*row));
    if (layer < 0) snprintf(row->name, sizeof(row->name), "%s", name);
    else snprintf(row->name, sizeof(row->name), "layers.%d.%s", layer, name);
    return row;
}

// Adds a tensor (layer -1: of the whole model) and returns its place in the block, or NULL while block is
// NULL and only names and sizes are wanted.
static real *add_tensor(Table *table, real *block, int layer, const char *name, int n_dims, int64_t d0,
                        int64_t d1, int64_t d2) {
    Tensor *row = new_row(table, name, layer);
    int64_t shape[3] = {d0, d1, d2};
    double size = 1;
    for (int i = 0; i < n_dims; i++) size *= (double)shape[i];
    row->n_dims = n_dims;
    row->stride = n_dims ? shape[n_dims - 1] : 1;
    row->offset = table->count;
    memcpy(row->shape, shape, sizeof(shape));
    if (table->count >= 0 && (double)table->count + size < 0x1p58) row->count = (int64_t)size;
    table->count = row->count || !size ? table->count + row->count : -1;
    if (!block) return NULL;
    return block + (table->places ? table->places[table->n - 1] : row->offset);
}

// A third dimension is that of the convolution's taps.
static real *add_parameter(Table *table, real *block, int layer, const char *name, int n_dims, int64_t d0,
                           int64_t d1, Init init, double value) {
    real *place = add_tensor(table, block, layer, name, n_dims, d0, d1, TAPS);
    table->last->init = init;
    table->last->init_value = value;
    return place;
}

// What the activations are. A tensor has its name in reference dumps, less "act.", and its shape; a
// view is `width` columns, from `column` on, of the tensor `whole`, if the model has it.
typedef struct { const char *name; int n_dims; int64_t shape[3]; } Activation;
typedef struct { const char *name, *whole; int64_t column, width; int there; } View;

// Behind the last row of both is one without a name.
typedef struct { Activation tensors[48]; View views[12]; } ActivationList;

// The activations of B sequences of T tokens: the one list, which the CUDA twin reads too. How many
// there are of each and where they lie is said by carve_activations.
static ActivationList list_activations(const Config *c, int B, int T, Mode mode) {
    int D = c->d_model, H = c->n_heads, d = D / H, kv_width = c->n_kv_heads * d, ld = proj_width(c);
    int sessa = c->mixer == SESSA, mamba2 = c->mixer == MAMBA2, attention = c->mixer == ATTENTION;
    int E = 2 * D, S = c->state_dim, W = E + 2 * S, heads = mamba2 ? E / c->head_dim : 0;
    int64_t states = mode >= TRAIN ? (int64_t)B * ((T + CHUNK - 1) / CHUNK) : B;
    ActivationList list = {
        {
            // of every layer
            {"ln_mean", 2, {B, T}},
            {"ln_rstd", 2, {B, T}},
            {"ln", 3, {B, T, D}},
            {"ag", 3, {B, T, 2 * D}},
            {"abar", 3, {B, T, D}},
            {"proj", 3, {B, T, ld}},
            {"s", 3, {B, T, D}},
            {"gated", 3, {B, T, D}},
            {"residual", 3, {B, T, D}},
            // of the direct read and the feedback path
            {"stats", 3, {(int64_t)B * H, T, 2}},
            {"o", 3, {B, T, D}},
            {"f", 3, {B, T, D}},
            {"gamma", 2, {B, T}},
            {"fb_stats", 3, {B, T, 2}},
            // of mamba2
            {"conv", 3, {B, T, W}},
            {"tail", 2, {TAPS - 1, W}},
            {"dt", 3, {B, T, heads}},
            {"states", 3, {states, S, E}},
            {"y", 3, {B, T, E}},
            {"rms", 2, {B, T}},
            {"normed", 3, {B, T, E}},
            // of the whole model
            {"encoded", 3, {B, T, D}},
            {"ln_f_mean", 2, {B, T}},
            {"ln_f_rstd", 2, {B, T}},
            {"ln_f", 3, {B, T, D}},
            {"logits", 3, {B, mode == GENERATE ? 1 : T, c->vocab_size}},
            {"losses", 2, {B, T}},
            {"loss_logsumexp", 2, {B, T}},
            {"cosine", 2, {T, d / 2}},
            {"sine", 2, {T, d / 2}},
            // of the backward pass
            {"dx", 3, {B, T, D}},
            {"ds", 3, {B, T, D}},
            {"dabar", 3, {B, T, D}},
            {"dag", 3, {B, T, 2 * D}},
            {"dproj", 3, {B, T, ld}},
            {"dgamma", 2, {B, T}},
            {"dy", 3, {B, T, E}},
            {"dxbc", 3, {B, T, W}},
            {"dstep", 3, {B, T, 3 * heads}},
        },
        {
            {"a", "ag", 0, D, 1},
            {"g", "ag", D, D, 1},
            {"q", "proj", 0, D, !mamba2},
            {"k", "proj", D, kv_width, !mamba2},
            {"v", "proj", D + kv_width, kv_width, !mamba2},
            {"fb_q", "proj", ld - 2 * D, D, sessa},
            {"fb_k", "proj", ld - D, D, sessa},
            {"z", "proj", 0, E, mamba2},
            {"f", "s", 0, D, attention},
        },
    };
    return list;
}

// The row of this name. That there is none can only be a mistake in the program.
static Activation *find_activation(ActivationList *list, const char *name) {
    for (Activation *a = list->tensors; a->name; a++)
        if (!strcmp(a->name, name)) return a;
    fprintf(stderr, "train_sessa: no activation is called %s\n", name);
    exit(1);
}

// Adds the views of the tensor that was added last.
static void add_views(Table *table, const ActivationList *list, int layer, const char *whole) {
    Tensor tensor = *table->last;
    for (const View *v = list->views; v->name; v++) {
        if (!v->there || strcmp(v->whole, whole)) continue;
        Tensor *row = new_row(table, v->name, layer), view = tensor;
        memcpy(view.name, row->name, sizeof(view.name));
        view.offset += v->column;
        view.count = tensor.count / tensor.stride * v->width;
        view.shape[tensor.n_dims - 1] = v->width;
        *row = view;
    }
}

// add_tensor for a tensor of the list, and for its views.
static real *activation(Table *table, real *block, ActivationList *list, int layer, const char *name) {
    const Activation *a = find_activation(list, name);
    real *place = add_tensor(table, block, layer, name, a->n_dims, a->shape[0], a->shape[1], a->shape[2]);
    add_views(table, list, layer, name);
    return place;
}

// Of Sessa, and of attention, which lacks the rows of the feedback path. The rows of W_proj and b_proj lie
// next to each other, whatever their names.
static void attention_weights(Table *t, real *block, const Config *c, int l, LayerWeights *w) {
    int D = c->d_model, kv_width = c->n_kv_heads * (D / c->n_heads), feedback = c->mixer == SESSA;
    double bound = 1 / sqrt((double)D);
    w->W_proj = add_parameter(t, block, l, "mixer.q_proj.weight", 2, D, D, INIT_UNIFORM, bound);
    add_parameter(t, block, l, "mixer.k_proj.weight", 2, kv_width, D, INIT_UNIFORM, bound);
    add_parameter(t, block, l, "mixer.v_proj.weight", 2, kv_width, D, INIT_UNIFORM, bound);
    if (feedback) add_parameter(t, block, l, "mixer.proj_fb.weight", 2, 2 * D, D, INIT_UNIFORM, bound);
    w->b_proj = add_parameter(t, block, l, "mixer.q_proj.bias", 1, D, 1, INIT_UNIFORM, bound);
    add_parameter(t, block, l, "mixer.k_proj.bias", 1, kv_width, 1, INIT_UNIFORM, bound);
    add_parameter(t, block, l, "mixer.v_proj.bias", 1, kv_width, 1, INIT_UNIFORM, bound);
    if (feedback) add_parameter(t, block, l, "mixer.proj_fb.bias", 1, 2 * D, 1, INIT_UNIFORM, bound);
    w->W_o = NULL;
    if (c->n_heads > 1)
        w->W_o = add_parameter(t, block, l, "mixer.out_proj.weight", 2, D, D, INIT_UNIFORM, bound);
    if (!feedback) return;
    w->gamma_bias = add_parameter(t, block, l, "mixer.gamma_bias", 0, 1, 1, INIT_CONSTANT, 1);
    w->gamma_weight = add_parameter(t, block, l, "mixer.gamma_ctx.weight", 2, 1, D, INIT_UNIFORM, bound);
}

// q, k and v of every layer are kept: for the backward pass, and in generation as the cache.
static void attention_activations(Table *t, real *block, ActivationList *list, const Config *c, int l,
                                  Activations *acts, int T, Mode mode) {
    int sessa = c->mixer == SESSA;
    LayerActivations *a = &acts->layers[l];
    a->proj = activation(t, block, list, l, "proj");
    a->s = activation(t, block, list, l, "s");
    if (sessa && mode == KEEP_ALL) a->f = activation(t, block, list, l, "f");
    if (l == 0 || mode >= TRAIN) {
        if (c->n_heads > 1) a->o = activation(t, block, list, l, "o");
        a->stats = activation(t, block, list, l, "stats");
        if (sessa) a->gamma = activation(t, block, list, l, "gamma");
        if (sessa) a->fb_stats = activation(t, block, list, l, "fb_stats");
    }
    if (l) return;
    int threads = omp_get_max_threads();
    acts->scratch = add_tensor(t, block, -1, "scratch", 2, threads, (int64_t)panel_scratch(T), 1);
    if (mode < TRAIN) return;
    acts->dproj = activation(t, block, list, -1, "dproj");
    if (sessa) acts->dgamma = activation(t, block, list, -1, "dgamma");
}

static void mamba2_weights(Table *t, real *block, const Config *c, int l, LayerWeights *w) {
    int D = c->d_model, E = 2 * D, W = E + 2 * c->state_dim, heads = E / c->head_dim;
    w->in_proj = add_parameter(t, block, l, "mixer.in_proj.weight", 2, proj_width(c), D, INIT_UNIFORM,
                               1 / sqrt((double)D));
    w->conv_weight = add_parameter(t, block, l, "mixer.conv1d.weight", 3, W, 1, INIT_UNIFORM, 0.5);
    w->conv_bias = add_parameter(t, block, l, "mixer.conv1d.bias", 1, W, 1, INIT_UNIFORM, 0.5);
    w->step_bias = add_parameter(t, block, l, "mixer.dt_bias", 1, heads, 1, INIT_STEP_BIAS, 1);
    w->A_log = add_parameter(t, block, l, "mixer.A_log", 1, heads, 1, INIT_LOG_DECAY, 1);
    w->skip = add_parameter(t, block, l, "mixer.D", 1, heads, 1, INIT_CONSTANT, 1);
    w->norm_weight = add_parameter(t, block, l, "mixer.norm.weight", 1, E, 1, INIT_CONSTANT, 1);
    w->out_proj =
        add_parameter(t, block, l, "mixer.out_proj.weight", 2, D, E, INIT_UNIFORM, 1 / sqrt((double)E));
}

// Kept for the backward pass: the projections, the state before each chunk, the scan's output. In generation
// the cache is the last state and the convolution's last inputs, however long the past is.
static void mamba2_activations(Table *t, real *block, ActivationList *list, const Config *c, int l,
                               Activations *acts, Mode mode) {
    int E = 2 * c->d_model, S = c->state_dim, heads = E / c->head_dim, training = mode >= TRAIN;
    LayerActivations *a = &acts->layers[l];
    if (l == 0 || training) {
        a->proj = activation(t, block, list, l, "proj");
        a->y_scan = activation(t, block, list, l, "y");
        a->rms = activation(t, block, list, l, "rms");
        a->s = activation(t, block, list, l, "s");
    }
    a->states = activation(t, block, list, l, "states");
    if (!training) a->tail = activation(t, block, list, l, "tail");
    if (l == 0 || mode == KEEP_ALL) {
        a->xbc = activation(t, block, list, l, "conv");
        a->step = activation(t, block, list, l, "dt");
        a->normed = activation(t, block, list, l, "normed");
    }
    if (l) return;
    int threads = omp_get_max_threads();
    acts->scratch = add_tensor(t, block, -1, "scratch", 2, threads, (int64_t)scan_scratch(E, S, heads), 1);
    if (!training) return;
    acts->dproj = activation(t, block, list, -1, "dproj");
    acts->dy = activation(t, block, list, -1, "dy");
    acts->dxbc = activation(t, block, list, -1, "dxbc");
    acts->dstep = activation(t, block, list, -1, "dstep");
}

// Adds every parameter's row to the table, under its name in files, and points the weights into the block (if
// not NULL).
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
        if (c->mixer == MAMBA2) mamba2_weights(t, block, c, l, layer);
        else attention_weights(t, block, c, l, layer);
        layer->W_out = add_parameter(t, block, l, "W_out.weight", 2, D, D, INIT_UNIFORM, bound);
        layer->b_out = add_parameter(t, block, l, "W_out.bias", 1, D, 1, INIT_UNIFORM, bound);
    }
    w->ln_f_weight = add_parameter(t, block, -1, "ln_f.weight", 1, D, 1, INIT_CONSTANT, 1);
    w->ln_f_bias = add_parameter(t, block, -1, "ln_f.bias", 1, D, 1, INIT_CONSTANT, 0);
}

// The same for the activations of B sequences of T tokens. How many there are of a buffer, and
// which of them are one:
//
//                                 GENERATE, EVALUATE    TRAIN                 KEEP_ALL
//     x, y                        one of all layers     one a layer           one a layer
//     ln_mean, ln_rstd, ag        one                   one a layer           one a layer
//     ln, f, gated                one of all three      one of all three      one a layer, each its own
//     abar, branch                one of both           one of both           one of both a layer
//     proj, s (the cache)         one a layer           one a layer           one a layer
//     o, stats, gamma, fb_stats   one                   one a layer           one a layer
//     dx, ds, dabar, dag, dproj   none                  one                   one
//
// What a layer shares in training the backward pass computes again, or never needs. With the mixer
// "attention" f is s; dout is layer 0's ln, which is free by then. Of mamba2's buffers see
// mamba2_activations.
static void carve_activations(Activations *acts, Table *t, real *block, const Config *c, int B, int T,
                              Mode mode) {
    int training = mode >= TRAIN, keep_all = mode == KEEP_ALL;
    ActivationList list = list_activations(c, B, T, mode);
    t->n = 0;
    t->count = 0;
    real *x = activation(t, block, &list, -1, "encoded");
    for (int l = 0; l < c->n_layers; l++) {
        LayerActivations *a = &acts->layers[l];
        if (l > 0) *a = acts->layers[0]; // every buffer is shared but for those that follow
        a->x = x;
        if (l == 0 || training) {
            a->ln_mean = activation(t, block, &list, l, "ln_mean");
            a->ln_rstd = activation(t, block, &list, l, "ln_rstd");
            a->ag = activation(t, block, &list, l, "ag");
        }
        if (l == 0 || keep_all) {
            a->ln = a->f = a->gated = activation(t, block, &list, l, "ln");
            a->abar = a->branch = activation(t, block, &list, l, "abar");
        }
        if (c->mixer == MAMBA2) mamba2_activations(t, block, &list, c, l, acts, mode);
        else attention_activations(t, block, &list, c, l, acts, T, mode);
        if (keep_all) a->gated = activation(t, block, &list, l, "gated");
        x = a->y = training ? activation(t, block, &list, l, "residual") : x;
    }
    acts->ln_mean = activation(t, block, &list, -1, "ln_f_mean");
    acts->ln_rstd = activation(t, block, &list, -1, "ln_f_rstd");
    acts->ln_f = activation(t, block, &list, -1, "ln_f");
    acts->logits = activation(t, block, &list, -1, "logits");
    acts->losses = activation(t, block, &list, -1, "losses");
    acts->loss_logsumexp = activation(t, block, &list, -1, "loss_logsumexp");
    acts->cosine = activation(t, block, &list, -1, "cosine");
    acts->sine = activation(t, block, &list, -1, "sine");
    if (!training) return;
    acts->dout = acts->layers[0].ln; // free by then
    acts->dx = activation(t, block, &list, -1, "dx");
    acts->ds = activation(t, block, &list, -1, "ds");
    acts->dabar = activation(t, block, &list, -1, "dabar");
    acts->dag = activation(t, block, &list, -1, "dag");
}

// ----------------------------------------------------------------------------
// random numbers and initial values
//
// Initial values, the order of the data and what is sampled are drawn from one small generator, so
// that a seed repeats a run. (Dropout draws nothing: it hashes the place of an element.)

// The generator's whole state is one word.
static uint64_t random_u64(uint64_t *state) {
    uint64_t out = splitmix64(*state);
    *state += 0x9E3779B97F4A7C15u;
    return out;
}
static double random_uniform(uint64_t *state) { // [0, 1)
    return (double)(random_u64(state) >> 11) * 0x1p-53;
}
static double random_normal(uint64_t *state) { // Box and Muller
    double radius = sqrt(-2 * log(1 - random_uniform(state)));
    return radius * cos(6.28318530717958647692 * random_uniform(state));
}

static double initial_value(Init init, uint64_t *state) {
    if (init == INIT_CONSTANT) return 1;
    if (init == INIT_NORMAL) return random_normal(state);
    double uniform = random_uniform(state);
    if (init == INIT_UNIFORM) return 2 * uniform - 1;
    if (init == INIT_LOG_DECAY) return log(1 + 15 * uniform);
    return log(expm1(0.001 * pow(100, uniform))); // the step that softplus makes of it
}

// Initial values of a block of parameters, drawn in the table's order.
static void initialise(real *params, const Table *table, uint64_t seed) {
    uint64_t state = splitmix64(seed);
    for (int r = 0; r < table->n; r++) {
        const Tensor *t = &table->rows[r];
        for (int64_t i = 0; i < t->count; i++)
            params[t->offset + i] = (real)(t->init_value * initial_value(t->init, &state));
    }
}

// ----------------------------------------------------------------------------
// errors and numbers
//
// An error is one line of text and a negative result; the caller hands both on, up to run_program,
// which prints the line. Text from outside is read strictly here, a number as well as a character:
// whatever a file or a command line holds, what is printed stays one harmless line.

// Every `char *error` points to ERROR_SIZE bytes.
enum { ERROR_SIZE = 512, FAILED = -1, WRONG_OPTION = -2 };

// The bytes of the UTF-8 character at s, of which at most n are there; 0 if it is none: overlong, a
// surrogate, or too large.
static size_t utf8_length(const unsigned char *s, size_t n) {
    size_t length = s[0] < 0x80 ? 1 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : 4;
    if ((length > 1 && s[0] < 0xC2) || s[0] > 0xF4 || length > n) return 0;
    for (size_t i = 1; i < length; i++)
        if ((s[i] & 0xC0) != 0x80) return 0;
    if ((s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xF0 && s[1] < 0x90)) return 0; // overlong
    if (s[0] == 0xED && s[1] > 0x9F) return 0; // a surrogate
    if (s[0] == 0xF4 && s[1] > 0x8F) return 0; // above U+10FFFF
    return length;
}

static int utf8_valid(const unsigned char *text, size_t length) {
    size_t n = 1;
    for (size_t i = 0; n && i < length; i += n) n = utf8_length(text + i, length - i);
    return n > 0;
}

// Writes "path: what" (only "what" if path is NULL) into `line`, ERROR_SIZE bytes, as one line.
// What stands in a file may be hostile: a control character (also U+0080 to U+009F), and what is no
// UTF-8, becomes '?', so that no file commands the terminal.
__attribute__((format(printf, 3, 0)))
static void write_line(char *line, const char *path, const char *format, va_list arguments) {
    int used = path ? snprintf(line, ERROR_SIZE, "%.300s: ", path) : 0;
    vsnprintf(line + used, (size_t)(ERROR_SIZE - used), format, arguments);
    for (size_t n; *line; line += n) {
        const unsigned char *c = (const unsigned char *)line;
        n = utf8_length(c, 4); // the zero at the end is no continuation
        if (n && c[0] >= 32 && c[0] != 127 && !(c[0] == 0xC2 && c[1] < 0xA0)) continue;
        *line = '?';
        n = 1;
    }
}

// Such a line where it is no error.
__attribute__((format(printf, 3, 4)))
static void format_line(char *line, const char *path, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    write_line(line, path, format, arguments);
    va_end(arguments);
}

// Such a line on standard error: the program goes on.
__attribute__((format(printf, 2, 3)))
static void print_warning(const char *path, const char *format, ...) {
    char line[ERROR_SIZE];
    va_list arguments;
    va_start(arguments, format);
    write_line(line, path, format, arguments);
    va_end(arguments);
    fprintf(stderr, "train_sessa: warning: %s\n", line);
}

// Such a line as the error that the caller hands on: `return fail(...)`.
__attribute__((format(printf, 3, 4)))
static int fail(char *error, const char *path, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    write_line(error, path, format, arguments);
    va_end(arguments);
    return FAILED;
}
#define wrong(...) (fail(__VA_ARGS__), WRONG_OPTION)

// 0 and the value if the whole text is one finite decimal number ("3e-4", "-1", ".5"), else -1: no
// spaces, hex or inf.
static int parse_number(const char *text, double *value) {
    char *end;
    double number = strtod(text, &end);
    if (!*text || *end || text[strspn(text, "0123456789+-.eE")] || !isfinite(number)) return -1;
    *value = number;
    return 0;
}

// The same for an integer in low..high, however written ("128", "1.28e2", "128.0"). Exact up to
// 2^53.
static int parse_integer(const char *text, double low, double high, int64_t *value) {
    double number;
    if (parse_number(text, &number) || number != floor(number) || number < low || number > high)
        return -1;
    *value = (int64_t)number;
    return 0;
}

// ----------------------------------------------------------------------------
// the machine: the threads and the memory that this process may use
//
// `root` is where /proc and /sys lie: "", but in tests. Where there are none nothing bounds.

// A number in a file: number `field` of the line that begins with `key`. NAN if there is none.
static double number_in(const char *path, const char *key, int field) {
    char text[8192] = "\n", line[64], *end;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, text + 1, sizeof(text) - 2);
    if (fd >= 0) close(fd);
    text[n > 0 ? n + 1 : 1] = 0;
    snprintf(line, sizeof(line), "\n%s", key);
    const char *at = strstr(text, line);
    if (at) at += strlen(line);
    for (; at && field > 0; field--) at = strchr(at, ' ') ? strchr(at, ' ') + 1 : NULL;
    double number = at ? strtod(at, &end) : NAN;
    return at && end > at ? number : NAN;
}
static double number_of_cgroup(const char *folder, const char *file, const char *key, int field) {
    char path[PATH_MAX];
    int fits = snprintf(path, sizeof(path), "%s/%s", folder, file) < PATH_MAX;
    return fits ? number_in(path, key, field) : NAN;
}

// The cores that a cgroup may keep busy, and the bytes that it may still take: the cache of files
// makes room. Its files have the names of version 2 or those of version 1. INFINITY: it sets no
// bound.
static double cgroup_cores(const char *folder) {
    double quota = number_of_cgroup(folder, "cpu.max", "", 0);
    double period = number_of_cgroup(folder, "cpu.max", "", 1);
    if (isnan(period)) {
        quota = number_of_cgroup(folder, "cpu.cfs_quota_us", "", 0);
        period = number_of_cgroup(folder, "cpu.cfs_period_us", "", 0);
    }
    return quota > 0 && period > 0 ? quota / period : INFINITY;
}
static double cgroup_memory(const char *folder) {
    static const char *names[2][4] = {
        {"memory.max", "memory.current", "inactive_file ", "active_file "},
        {"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ",
         "total_active_file "},
    };
    double least = INFINITY;
    for (int i = 0; i < 2; i++) {
        double limit = number_of_cgroup(folder, names[i][0], "", 0);
        double left = limit - number_of_cgroup(folder, names[i][1], "", 0);
        for (int k = 2; k < 4; k++) {
            double cache = number_of_cgroup(folder, "memory.stat", names[i][k], 0);
            if (cache > 0) left += cache;
        }
        if (left < least) least = left > 0 ? left : 0;
    }
    return least;
}

// The least that `bound` gives for the folders of this process's cgroup of a controller and of all
// cgroups above. A line of /proc/self/cgroup is "4:memory:/path" in version 1, "0::/path" in
// version 2. In a container the path may be the host's: then only the last folder on the way up,
// where the container's own cgroup is mounted, is there.
static double cgroup_least(const char *root, const char *controller,
                           double (*bound)(const char *)) {
    char line[PATH_MAX], folder[2 * PATH_MAX];
    double least = INFINITY;
    snprintf(folder, sizeof(folder), "%s/proc/self/cgroup", root);
    FILE *file = fopen(folder, "r");
    while (file && fgets(line, sizeof(line), file)) {
        char wanted[32], names[256];
        char *list = strchr(line, ':'), *path = list ? strchr(list + 1, ':') : NULL;
        if (!path) continue;
        *path++ = 0;
        path[strcspn(path, "\n")] = 0;
        snprintf(wanted, sizeof(wanted), ",%s,", controller);
        snprintf(names, sizeof(names), ",%s,", list + 1);
        int second = !list[1];
        if (!second && !strstr(names, wanted)) continue;
        // version 2, beside version 1, may be mounted one folder lower
        for (int i = 0; i < 1 + second; i++) {
            snprintf(folder, sizeof(folder), "%s/sys/fs/cgroup%s%s", root, second ? "" : "/",
                     second ? (i ? "/unified" : "") : controller);
            size_t top = strlen(folder);
            snprintf(folder + top, sizeof(folder) - top, "%s", path);
            for (size_t length = strlen(folder); length >= top; length--) {
                int whole = !folder[length] || folder[length] == '/' || length == top;
                folder[length] = 0;
                double here = whole ? bound(folder) : INFINITY;
                if (here < least) least = here;
            }
        }
    }
    if (file) fclose(file);
    return least;
}

// How many of `threads` the quota of the cgroup lets run at once, a part of a core as a whole one.
static int threads_within(const char *root, int threads) {
    double cores = ceil(cgroup_least(root, "cpu", cgroup_cores));
    return cores < threads ? (int)cores : threads;
}

// OpenMP counts the cores that this process may run on, and heeds what the user set; of quotas it
// knows nothing. How long its threads spin at a barrier before they sleep is bounded: on a core
// that another program wants they spin in the way of the thread they wait for. Of GNU's,
// start_again sees to that.
enum { SPINS = 3000, SPIN_MILLISECONDS = 0 };
static void use_allowed_threads(void) {
    const char *wanted = getenv("OMP_NUM_THREADS");
    int most = omp_get_max_threads();
    int threads = wanted && *wanted ? most : threads_within("", most);
    if (threads < most) omp_set_num_threads(threads);
#ifdef KMP_VERSION_MAJOR // LLVM's and Intel's
    if (!getenv("KMP_BLOCKTIME") && !getenv("OMP_WAIT_POLICY"))
        kmp_set_blocktime(SPIN_MILLISECONDS);
#endif
}

// What of memory is left, and what leaves no more: a line says it.
typedef struct { double bytes; const char *who; } MemoryLeft;

static MemoryLeft memory_left(const char *root) {
    char path[PATH_MAX];
    struct rlimit limit;
    snprintf(path, sizeof(path), "%.4000s/proc/meminfo", root);
    double swap = number_in(path, "SwapFree:", 0);
    MemoryLeft left = {NAN, "this machine"};
    left.bytes = number_in(path, "MemAvailable:", 0) * 1024 + (swap > 0 ? swap * 1024 : 0);
    double page = (double)sysconf(_SC_PAGESIZE);
    double within = cgroup_least(root, "memory", cgroup_memory);
    if (isnan(left.bytes)) left.bytes = (double)sysconf(_SC_PHYS_PAGES) * page;
    if (within < left.bytes) {
        left.bytes = within;
        left.who = "its cgroup";
    }
    static const struct {
        int limit, field;
        const char *name;
    } limits[] = {{RLIMIT_AS, 0, "ulimit -v"}, {RLIMIT_DATA, 5, "ulimit -d"}};
    snprintf(path, sizeof(path), "%.4000s/proc/self/statm", root);
    for (int i = 0; i < 2; i++) {
        double used = number_in(path, "", limits[i].field) * page;
        if (getrlimit(limits[i].limit, &limit) || limit.rlim_cur == RLIM_INFINITY) continue;
        double rest = (double)limit.rlim_cur - (used > 0 ? used : 0);
        if (rest >= left.bytes) continue;
        left.bytes = rest > 0 ? rest : 0;
        left.who = limits[i].name;
    }
    return left;
}

// 0 if so many bytes can be had; else FAILED and the line, which begins with the path (NULL: none)
// and `what`. Linux gives memory out that is not there, and ends the program when it is touched, so
// whatever grows with a file or an option asks before it is allocated; what is smaller than LARGE
// need not.
enum { LARGE = 1 << 20 };
static int check_room(double bytes, const char *path, const char *what, char *error) {
    if (bytes < LARGE) return 0;
    MemoryLeft left = memory_left("");
    if (bytes <= left.bytes) return 0;
    return fail(error, path, "%.200s does not fit: it needs %.1f MiB of memory, %s leaves %.1f",
                what, bytes / 0x1p20, left.who, left.bytes / 0x1p20);
}

// realloc for what grows: NULL, and the old memory stays, also where so much would not fit.
static void *grow(void *old, size_t bytes) {
    return bytes >= LARGE && (double)bytes > memory_left("").bytes ? NULL : realloc(old, bytes);
}

// ----------------------------------------------------------------------------
// the model's memory
//
// One block holds the parameters and one each their gradients and the two moments of AdamW; another
// holds the activations. The tables are made twice: first without memory, to know the sizes, then
// over it. What does not fit is known before anything large is touched.

static void model_free(Model *m) {
    void *blocks[] = {m->weights.layers, m->grad.layers, m->acts.layers, m->table.rows,
                      m->acts_table.rows, m->params, m->grads, m->exp_avg, m->exp_avg_sq,
                      m->acts_block, m->inputs, m->targets, m};
    for (size_t i = 0; i < sizeof(blocks) / sizeof(blocks[0]); i++) free(blocks[i]);
}

// A zeroed array, a large one in huge pages where the system has them: rows far apart then cost no
// table walks. Clears *whole where it cannot be had. count < 0: too large to be addressed.
static void *allocate(int64_t count, size_t size, int *whole) {
    enum { HUGE_PAGE = 1 << 21 };
    void *memory = NULL;
    size_t bytes = count < 0 || !*whole ? 0 : ((size_t)count + 1) * size;
    *whole = bytes && (!posix_memalign(&memory, bytes < HUGE_PAGE ? 64 : HUGE_PAGE, bytes) ||
                       !posix_memalign(&memory, 64, bytes));
    if (!*whole) return NULL;
#ifdef MADV_HUGEPAGE
    if (bytes >= HUGE_PAGE) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return memset(memory, 0, bytes);
}

// Makes the tables of a model, which tell its size.
static int model_measure(Model *m, Mode mode, char *error) {
    const Config *c = &m->config;
    int whole = 1, n_blocks = mode >= TRAIN ? 4 : 1;
    m->weights.layers = (LayerWeights *)allocate(c->n_layers, sizeof(LayerWeights), &whole);
    m->grad.layers = (LayerWeights *)allocate(c->n_layers, sizeof(LayerWeights), &whole);
    m->acts.layers = (LayerActivations *)allocate(c->n_layers, sizeof(LayerActivations), &whole);
    if (whole) {
        carve_weights(&m->weights, &m->table, NULL, c);
        carve_activations(&m->acts, &m->acts_table, NULL, c, m->B, m->T, mode);
    }
    if (!whole || m->table.incomplete || m->acts_table.incomplete)
        return fail(error, NULL, "out of memory");
    int64_t n = m->table.count, n_acts = m->acts_table.count;
    m->bytes = ((double)n * n_blocks + (double)n_acts) * sizeof(real);
    if (n < 0 || n_acts < 0) m->bytes = INFINITY;
    return 0;
}

// Takes the memory that the tables ask for, if there is so much.
static int model_allocate(Model *m, Mode mode, char *error) {
    int whole = 1, threads = 0;
    int64_t tokens = (int64_t)m->B * m->T;
    double bytes = m->bytes + 2.0 * (double)tokens * sizeof(int) + LARGE; // and what else is small
    #pragma omp parallel reduction(+ : threads)
    threads++; // they are started here: what their stacks take is not left for the model
    (void)threads; // built without OpenMP, nothing reads it
    if (check_room(bytes, NULL, "the model", error)) return FAILED;
    m->acts_block = (real *)allocate(m->acts_table.count, sizeof(real), &whole);
    m->inputs = (int *)allocate(tokens, sizeof(int), &whole);
    m->targets = (int *)allocate(tokens, sizeof(int), &whole);
    real **blocks[] = {&m->params, &m->grads, &m->exp_avg, &m->exp_avg_sq};
    for (int i = 0; i < (mode >= TRAIN ? 4 : 1); i++)
        *blocks[i] = (real *)allocate(m->table.count, sizeof(real), &whole);
    if (whole) return 0;
    return fail(error, NULL, "the model does not fit: the system refuses %.1f MiB of memory",
                bytes / 0x1p20);
}

// A model for batches of up to B sequences of T tokens, its parameters 0. NULL, and a line in
// error, if it does not fit: that is known before anything large is touched, and all of it is
// touched here, so no later step can run out of memory.
static Model *model_create(const Config *c, int B, int T, Mode mode, char *error) {
    int whole = 1;
    Model *m = (Model *)allocate(1, sizeof(Model), &whole);
    if (!m) {
        fail(error, NULL, "out of memory");
        return NULL;
    }
    m->config = *c;
    m->B = B = mode == GENERATE ? 1 : B;
    m->T = T;
    if (model_measure(m, mode, error) || model_allocate(m, mode, error)) {
        model_free(m);
        return NULL;
    }
    carve_weights(&m->grad, &m->table, m->grads, c);
    carve_weights(&m->weights, &m->table, m->params, c);
    carve_activations(&m->acts, &m->acts_table, m->acts_block, c, B, T, mode);
    rope_table(m->acts.cosine, m->acts.sine, T, c->d_model / c->n_heads);
    return m;
}

// ----------------------------------------------------------------------------
// the backend
//
// All that the training loop and the command line know of the layers. The CUDA twin brings its own,
// with a Model of its own behind the pointer.
//
// Where several processes train together, the ranks, each has the whole of options, data and weights
// and takes its rows of every micro-batch; the functions marked `all` are then called by all ranks,
// in the same order. How they are started, meet and exchange stands in dev/ranks.

typedef enum { PARAMS, EXP_AVG, EXP_AVG_SQ, GRADS } Block;
// Of the tensors' names in files, which hold no gradients.
static const char *block_prefixes[] = {"", "exp_avg.", "exp_avg_sq."};

typedef struct {
    const char *name;
    // GENERATE: for B sequences at most, the model's own B says how many
    Model *(*create)(const Config *config, int B, int T, Mode mode, char *error);
    void (*destroy)(Model *model);
    double (*bytes)(const Model *model);
    // the block's numbers, in the parameter table's order, in memory of their own; of the moments
    // every rank may have a part alone: all
    real *(*read)(Model *model, Block block);
    // makes the numbers that stand there the model's
    void (*write)(Model *model, Block block);
    void (*forward)(Model *model, const int *inputs, const int *targets, int B, int T,
                    Dropout drop);
    // of the last forward pass, the sum; the GPU may be at work until it is asked for
    double (*loss)(Model *model);
    void (*hits)(Model *model, char *hits);
    // last: of the step's micro-batches; what each rank has is then added up: all
    void (*backward)(Model *model, double dloss, int last);
    // the gradients' norm; not finite: no update. all
    double (*update)(Model *model, AdamW options, double clip, int64_t step);
    // generation, see model_extend; of `copies` sequences behind this one, the first n positions
    const real *(*extend)(Model *model, int sequence, const int *tokens, int n, int first);
    const real *(*extend_each)(Model *model, const Next *next, int n);
    void (*copy)(Model *model, int sequence, int copies, int n);
    int rank, ranks; // 0 and 1: alone
    // rows (ranks,n): a rank fills in its own, and then has all of them. all
    void (*gather)(double *rows, int n);
} Backend;

// hits[n] = 1 where the target of token n has the largest logit of its row, else 0, of the last
// model_forward. hits (N)
static void model_hits(Model *m, char *hits) {
    int V = m->config.vocab_size;
    #pragma omp parallel for
    for (int n = 0; n < m->batch_B * m->batch_T; n++) {
        const real *row = m->acts.logits + (size_t)n * V;
        int target = m->targets[n], larger = 0;
        for (int v = 0; target >= 0 && v < V; v++) larger += !(row[v] <= row[target]);
        hits[n] = target >= 0 && !larger;
    }
}

// What the process takes by now, data and program included: no step takes more.
static double cpu_bytes(const Model *m) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    double unit = 1;
#else
    double unit = 1024;
#endif
    return (double)usage.ru_maxrss * unit > m->bytes ? (double)usage.ru_maxrss * unit : m->bytes;
}
static real *cpu_read(Model *m, Block block) {
    return block == PARAMS    ? m->params
           : block == GRADS   ? m->grads
           : block == EXP_AVG ? m->exp_avg
                              : m->exp_avg_sq;
}
// The host's memory is the model's own.
static void cpu_write(Model *m, Block block) { (void)m; (void)block; }
static void cpu_backward(Model *m, double dloss, int last) {
    (void)last;
    model_backward(m, dloss);
}
// Of one sequence there are no copies.
static void cpu_copy(Model *m, int sequence, int copies, int n) {
    (void)m; (void)sequence; (void)copies; (void)n;
}
static double cpu_update(Model *m, AdamW options, double clip, int64_t step) {
    double length = norm(m->grads, m->table.count);
    if (isfinite(length)) model_update(m, options, clip_scale(length, clip), step);
    return length;
}

static const Backend cpu_backend = {"CPU",        model_create, model_free,   cpu_bytes,
                                    cpu_read,     cpu_write,    model_forward, model_loss,
                                    model_hits,   cpu_backward, cpu_update,   model_extend,
                                    model_extend_each, cpu_copy, 0,           1,
                                    NULL};

// ----------------------------------------------------------------------------
// signals: what asks for an end lets the step end and be saved
//
// A handler only notes the signal in `interrupted`; the loops of training, evaluation and
// generation look at it. What a signal does depends on the phase the program is in, see
// install_handlers. The lock files that the process holds are kept here too: they go at any end,
// also at one that a handler brings about.

// Of this process; the handler reads and writes them. `interrupted`: the signal that asked for an
// end, 0: none. While `saving`, nothing ends the program. `told`: the terminal has been told what a
// second Ctrl-C does.
static volatile sig_atomic_t interrupted, saving, told;
static int terminal = -1; // a descriptor on which Ctrl-C is answered, -1: there is none

enum { MAX_LOCKS = 3 };
// Of the lock files that this process holds, see take_lock.
static char lock_paths[MAX_LOCKS][PATH_MAX + 8];
static int lock_files[MAX_LOCKS];
static volatile sig_atomic_t n_locks;

// Whether two files are one.
static int same_place(const struct stat *a, const struct stat *b) {
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

// Nothing but system calls: it runs in signal handlers and at exit. The locks themselves end with
// the process. What has taken the name of a lock file meanwhile stays.
static void remove_locks(void) {
    while (n_locks > 0) {
        struct stat mine, there;
        int i = n_locks - 1;
        n_locks = i;
        int named = !fstat(lock_files[i], &mine) && !lstat(lock_paths[i], &there);
        if (named && same_place(&mine, &there) && !there.st_size) unlink(lock_paths[i]);
        close(lock_files[i]);
    }
}

// While training: the first of these signals ends the step, which is then saved, and so does any
// later one. Only a second Ctrl-C typed at a terminal, once that has been told, ends the program at
// once; one that another program sends does not.
static void on_signal(int number, siginfo_t *info, void *context) {
    static const char line[] =
        "\nending after this step, to save it; Ctrl-C again ends at once, without saving\n";
    int problem = errno;
    (void)context;
#ifdef __linux__
    int typed = number == SIGINT && info->si_code > 0; // the kernel's, of the terminal
#else
    int typed = number == SIGINT && info->si_code != SI_USER && info->si_code != SI_QUEUE;
#endif
    if (typed && told && !saving) {
        remove_locks();
        _exit(130);
    }
    if (typed && !told && terminal >= 0) told = write(terminal, line, sizeof(line) - 1) > 0;
    interrupted = number;
    errno = problem;
}

// Before training there is nothing to save: what the signal does by default, less the lock files.
static void on_early_signal(int number) {
    remove_locks();
    raise(number); // the default action, once the handler has returned
}

// While generating or evaluating: the first one ends it in order, the second at once.
static void on_interrupt(int number) { interrupted = number; }

// A descriptor of the terminal that this process belongs to, -1 if there is none.
static int open_terminal(void) {
    if (isatty(STDERR_FILENO)) return STDERR_FILENO;
    if (isatty(STDOUT_FILENO)) return STDOUT_FILENO;
    return open("/dev/tty", O_WRONLY | O_NOCTTY | O_CLOEXEC);
}

// Whether the signal is ignored, as SIGHUP is under nohup.
static int is_ignored(int number) {
    struct sigaction now;
    if (sigaction(number, NULL, &now)) return 0;
    return !(now.sa_flags & SA_SIGINFO) && now.sa_handler == SIG_IGN;
}

// READING: generating or evaluating.
typedef enum { BEFORE_TRAINING, WHILE_TRAINING, WHILE_READING } Phase;

// Sets what the signals do from here on.
static void install_handlers(Phase phase) {
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU};
    int n = phase == WHILE_READING ? 3 : (int)(sizeof(numbers) / sizeof(numbers[0]));
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    for (int i = 0; i < n; i++) sigaddset(&action.sa_mask, numbers[i]);
    if (phase == WHILE_TRAINING) {
        action.sa_flags = SA_SIGINFO | SA_RESTART;
        action.sa_sigaction = on_signal;
    } else {
        action.sa_flags = (int)SA_RESETHAND;
        action.sa_handler = phase == BEFORE_TRAINING ? on_early_signal : on_interrupt;
    }
    for (int i = 0; i < n; i++) {
        if (numbers[i] == SIGHUP && is_ignored(SIGHUP)) continue;
        sigaction(numbers[i], &action, NULL);
    }
    // a closed pipe and a file size beyond its limit are errors of the write
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    if (phase == WHILE_TRAINING && terminal < 0) terminal = open_terminal();
}

// ----------------------------------------------------------------------------
// files: read whole; written whole, into a temporary file that then takes the place of the old one
//
// A Place is where a file is written: settled once, locked against other runs, and checked before
// anything there is replaced. A Replacement is the file on its way there. So at any moment the old
// file or the new one lies there, whole, and nothing is lost by a crash, by a second run, or by a
// file put there meanwhile.

// A 64-bit hash: FNV-1a's step (xor, then multiply by its prime), taken on 8 bytes at a time for
// speed and followed by a fold of the upper half into the lower, which the hash by bytes does not
// need. The last bytes are padded with zeros, so the size goes in first. It tells files apart that
// differ by accident, not by design.
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

// Reads up to n bytes; how many there were, or -1 with errno.
static int64_t read_bytes(int fd, unsigned char *bytes, size_t n) {
    size_t got = 0;
    while (got < n) {
        ssize_t now = read(fd, bytes + got, n - got < 1 << 30 ? n - got : 1 << 30);
        if (now < 0 && errno == EINTR) continue;
        if (now < 0) return -1;
        if (now == 0) break;
        got += (size_t)now;
    }
    return (int64_t)got;
}

// The part of file_read and header_read for a file that is open.
static int read_open_file(int fd, const char *path, int only_header, unsigned char **bytes,
                          size_t *size, char *error) {
    struct stat info;
    if (fstat(fd, &info)) return fail(error, path, "%s", strerror(errno));
    if (!S_ISREG(info.st_mode)) return fail(error, path, "a folder or a device, not a file");
    size_t expected = (size_t)info.st_size, asked = expected + 1; // one more than there should be
    if (check_room((double)asked, path, "it", error)) return FAILED;
    unsigned char *memory = (unsigned char *)malloc(asked);
    if (!memory) return fail(error, path, "it does not fit in memory");
    uint64_t header = 0; // its length
    if (only_header && pread(fd, &header, 8, 0) == 8 && expected > 8 && header < expected - 8)
        asked = 8 + (size_t)header;
    int64_t got = read_bytes(fd, memory, asked);
    if (got == (int64_t)(asked < expected ? asked : expected)) {
        memory[expected] = 0;
        *bytes = memory;
        *size = expected;
        return 0;
    }
    if (got < 0) fail(error, path, "%s", strerror(errno));
    else fail(error, path, "it cannot be read to its end, or its size changed meanwhile");
    free(memory);
    return FAILED;
}

static int open_and_read(const char *path, int only_header, unsigned char **bytes, size_t *size,
                         char *error) {
    *bytes = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // a pipe without a writer: no waiting
    if (fd < 0) return fail(error, path, "%s", strerror(errno));
    int result = read_open_file(fd, path, only_header, bytes, size, error);
    close(fd);
    return result;
}

// Reads a whole regular file into fresh memory, with a zero byte past its end. *bytes is NULL when
// it fails.
static int file_read(const char *path, unsigned char **bytes, size_t *size, char *error) {
    return open_and_read(path, 0, bytes, size, error);
}

// The same for a safetensors file of which only the header is wanted: there is memory for all of
// it, but what follows the header is not read.
static int header_read(const char *path, unsigned char **bytes, size_t *size, char *error) {
    return open_and_read(path, 1, bytes, size, error);
}

// Writes n bytes; 0, or -1 with errno.
static int write_all(int fd, const void *bytes, size_t n) {
    const char *at = (const char *)bytes;
    while (n > 0) {
        ssize_t written = write(fd, at, n < 1 << 30 ? n : 1 << 30);
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0) return -1;
        at += written;
        n -= (size_t)written;
    }
    return 0;
}

// Makes what was written survive a power cut; 0, or -1 with errno. Not every file system can flush:
// that is no error.
static int flush_to_disk(int fd) {
    int result;
#ifdef F_FULLFSYNC
    if (!fcntl(fd, F_FULLFSYNC)) return 0; // macOS: fsync leaves it in the drive's cache
#endif
    do result = fsync(fd);
    while (result && errno == EINTR);
    int cannot = errno == EINVAL || errno == ENOSYS || errno == ENOTSUP;
    return result && !cannot ? -1 : 0;
}

// Puts folder and name together; 0, or -1 when they are too long. path: PATH_MAX bytes.
static int join_path(char *path, const char *folder, size_t folder_length, const char *name) {
    int needs_slash = folder_length > 0 && folder[folder_length - 1] != '/';
    const char *slash = needs_slash ? "/" : "";
    int length = snprintf(path, PATH_MAX, "%.*s%s%s", (int)folder_length, folder, slash, name);
    return length < PATH_MAX ? 0 : -1;
}

// The folder of a settled path, with the slash at its end.
static void folder_of(char folder[PATH_MAX], const char *target) {
    snprintf(folder, PATH_MAX, "%.*s", (int)(strrchr(target, '/') + 1 - target), target);
}

// The place that path names once all links are followed, also where there is no file yet. target:
// PATH_MAX bytes.
static int resolve(const char *path, char *target, char *error) {
    char next[PATH_MAX], link[PATH_MAX], folder[PATH_MAX];
    int fits = snprintf(next, sizeof(next), "%s", path) < PATH_MAX;
    for (int links = 0; fits && links < 40; links++) {
        if (realpath(next, target)) return 0;
        if (errno != ENOENT) return fail(error, path, "cannot be written: %s", strerror(errno));
        const char *slash = strrchr(next, '/');
        const char *name = slash ? slash + 1 : next;
        size_t head = (size_t)(name - next);
        ssize_t length = readlink(next, link, sizeof(link) - 1);
        if (length >= 0) {
            link[length] = 0;
            memcpy(folder, next, head);
            fits = !join_path(next, folder, link[0] == '/' ? 0 : head, link);
            continue;
        }
        // no link: a name that is free, in a folder that must be there
        snprintf(link, sizeof(link), "%s", name);
        snprintf(folder, sizeof(folder), "%.*s", head ? (int)head : 1, head ? next : ".");
        if (!realpath(folder, next) || !*link)
            return fail(error, path, "cannot be written: %s", strerror(errno));
        fits = !join_path(target, next, strlen(next), link);
        if (fits) return 0;
    }
    const char *problem = fits ? "its links lead in a circle" : "the path is too long";
    return fail(error, path, "cannot be written: %s", problem);
}

// Locks an open file for this process, until it ends, in whatever way, and in whatever container: 1
// if that is done, 0 if another one holds the lock, -1 with errno if the file system knows no
// locks.
static int lock_descriptor(int fd) {
    int result;
    do result = flock(fd, LOCK_EX | LOCK_NB);
    while (result && errno == EINTR);
    if (!result) return 1;
    return errno == EWOULDBLOCK ? 0 : -1;
}

// Said once.
static void warn_of_no_locks(const char *path) {
    static int said = 0;
    if (said++) return;
    print_warning(path,
                  "the file system knows no locks: nothing keeps two runs from writing it at once");
}

// A place where a file is written: what its path names, settled once, and what may be replaced
// there: nothing, the file that lay there when the run began, or the one that the run left last.
typedef struct {
    const char *path;      // as the user named it
    const char *like;      // the file whose rights a new one gets, NULL: none
    char target[PATH_MAX]; // what path names once links are followed
    int lock;              // the index of its lock, -1: none
    int there;             // a file lies there that may be replaced, which is
    struct stat known;
    uint64_t head;         // a hash of how it begins: metadata tell a checkpoint from any other
} Place;

// A hash of the first bytes of a file, 0 if it cannot be read.
static uint64_t head_of(const char *path) {
    unsigned char bytes[4096];
    int fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t n = read(fd, bytes, sizeof(bytes));
    close(fd);
    return n < 0 ? 0 : hash_bytes(bytes, (size_t)n);
}

// Makes a place of a path: what lies there now may be replaced. FAILED if nothing can be written
// there.
static int settle(Place *p, const char *path, const char *like, char *error) {
    memset(p, 0, sizeof(*p));
    p->path = path;
    p->like = like;
    p->lock = -1;
    if (resolve(path, p->target, error)) return FAILED;
    p->there = !lstat(p->target, &p->known);
    if (!p->there)
        return errno == ENOENT ? 0 : fail(error, path, "cannot be written: %s", strerror(errno));
    p->head = head_of(p->target);
    int unread = S_ISREG(p->known.st_mode) && !p->head;
    return unread ? fail(error, path, "cannot be written: %s", strerror(errno)) : 0;
}

// Opens the lock file of a place and locks it: its descriptor, or -1 with the line. *locked: see
// lock_descriptor. A file of that name that is no lock, which is empty, is another program's, and
// stays.
static int open_lock(const char *path, const char *name, int flags, int *locked, char *error) {
    struct stat info;
    int fd = open(name, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC | flags, 0666);
    int problem = errno;
    if (fd < 0 && problem == EACCES) // another user's
        fd = open(name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) return fail(error, path, "cannot be locked, %.250s: %s", name, strerror(problem));
    int is_lock = !fstat(fd, &info) && S_ISREG(info.st_mode) && !info.st_size;
    *locked = is_lock ? lock_descriptor(fd) : 0;
    if (*locked) return fd;
    close(fd);
    if (is_lock) return fail(error, path, "another run is writing it");
    return fail(error, path, "cannot be locked: %.250s is there and is no lock", name);
}

// Locks a place by a file beside it: the file itself gets another inode with each save. What killed
// runs left, the lock file or temporary ones, belongs to whoever holds the lock. A lock file is
// removed by its holder: whoever opened it before that, and locks it after, sees that the name now
// means another file, or none, and begins again.
static int take_lock(Place *p, char *error) {
    char *name = lock_paths[n_locks];
    struct stat mine, there;
    snprintf(name, sizeof(lock_paths[0]), "%s.lock", p->target);
    for (;;) {
        int locked;
        int fd = open_lock(p->path, name, O_CREAT, &locked, error);
        if (fd < 0) return FAILED;
        int named = !fstat(fd, &mine) && !lstat(name, &there);
        int problem = errno;
        if (locked > 0 && named && same_place(&mine, &there)) {
            p->lock = n_locks;
            lock_files[n_locks] = fd;
            n_locks = n_locks + 1;
            return 0;
        }
        close(fd);
        if (locked > 0 && (named || problem == ENOENT)) continue; // its holder removed it meanwhile
        unlink(name);
        if (locked > 0) return fail(error, p->path, "cannot be written: %s", strerror(problem));
        warn_of_no_locks(p->path);
        return 0;
    }
}

// The lock of a place must still be this run's. A lock file that somebody removed, or that stayed
// behind when the folder was moved, is made again.
static int hold_lock(Place *p, char *error) {
    const char *name = lock_paths[p->lock];
    struct stat mine, there;
    if (!lstat(name, &there)) {
        if (!fstat(lock_files[p->lock], &mine) && same_place(&mine, &there)) return 0;
        return fail(error, p->path, "another run has taken it over");
    }
    if (errno != ENOENT) return fail(error, p->path, "cannot be written: %s", strerror(errno));
    int locked;
    int fd = open_lock(p->path, name, O_CREAT | O_EXCL, &locked, error);
    if (fd < 0) return FAILED;
    close(lock_files[p->lock]);
    lock_files[p->lock] = fd;
    return 0;
}

// Before something is replaced: the lock must still be ours, and what lies there the file that may
// be replaced.
static int check_ours(Place *p, char *error) {
    struct stat now;
    if (p->lock >= 0 && hold_lock(p, error)) return FAILED;
    if (lstat(p->target, &now))
        return errno == ENOENT ? 0 : fail(error, p->path, "cannot be written: %s", strerror(errno));
    // whose it is neither its time says, which a touch changes, nor its inode, which some file
    // systems invent: its size and its beginning do
    if (p->there && now.st_size == p->known.st_size && head_of(p->target) == p->head) return 0;
    return fail(error, p->path, "another file was put there meanwhile, which stays");
}

// Whether `name` is that of a temporary file of the file `of`: <of>.tmp.s<eight hexadecimal
// digits>.
static int is_temporary_name(const char *name, const char *of) {
    size_t length = strlen(of);
    if (strncmp(name, of, length) || strncmp(name + length, ".tmp.s", 6)) return 0;
    const char *digits = name + length + 6;
    return strspn(digits, "0123456789abcdef") == 8 && !digits[8];
}

// Removes the temporary files of target that killed runs left. The lock must be held.
static void remove_leftovers(const char *target) {
    char folder[PATH_MAX];
    struct stat info;
    folder_of(folder, target);
    DIR *dir = opendir(folder);
    if (!dir) return;
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
        if (!is_temporary_name(entry->d_name, strrchr(target, '/') + 1)) continue;
        int found = !fstatat(dirfd(dir), entry->d_name, &info, AT_SYMLINK_NOFOLLOW);
        if (found && S_ISREG(info.st_mode)) unlinkat(dirfd(dir), entry->d_name, 0);
    }
    closedir(dir);
}

// A file on its way: the temporary file that will take its place.
typedef struct {
    Place *place;
    char temporary[PATH_MAX + 32];
    int fd;
} Replacement;

// Whether the rename at the end of a save will be allowed, as far as that can be known beforehand.
static int check_replaceable(const Replacement *r, char *error) {
    const Place *p = r->place;
    struct stat folder;
    char folder_path[PATH_MAX];
    folder_of(folder_path, p->target);
    if (!S_ISREG(p->known.st_mode))
        return fail(error, p->path, "cannot be written: not a regular file");
    // one that is read-only or append-only stays
    int fd = access(p->target, W_OK) ? -1 : open(p->target, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return fail(error, p->path, "cannot be written: %s", strerror(errno));
    close(fd);
    uid_t user = geteuid();
    int sticky = !stat(folder_path, &folder) && (folder.st_mode & S_ISVTX);
    if (sticky && user && p->known.st_uid != user && folder.st_uid != user)
        return fail(error, p->path,
                    "cannot be replaced: it is another user's, in a folder where only owners may");
    if (!link(p->target, r->temporary)) {
        unlink(r->temporary);
        return 0;
    }
    if (errno != EXDEV) return 0;
    return fail(error, p->path, "cannot be replaced: it is a mount point of its own");
}

// Makes up a name for the temporary file.
static void name_temporary(Replacement *r) {
    static unsigned n_made = 0;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t process = (uint64_t)getpid() << 32;
    uint64_t name = splitmix64((uint64_t)now.tv_nsec ^ process ^ splitmix64(++n_made));
    snprintf(r->temporary, sizeof(r->temporary), "%s.tmp.s%08x", r->place->target, (unsigned)name);
}

// Creates the temporary file that will take a place. It gets owner and rights of the file that is
// there, or else of `like`, so that what only its owner may read stays so; what is new can be
// written by its owner, or it could not be replaced again.
static int replacement_open(Replacement *r, Place *p, char *error) {
    struct stat old = p->known;
    int there = p->there && !lstat(p->target, &old);
    int known = there || (p->like && !stat(p->like, &old));
    r->place = p;
    r->fd = -1;
    for (int tries = 0; r->fd < 0 && tries < 100; tries++) { // O_EXCL: two names cannot meet
        name_temporary(r);
        if (there && !tries && check_replaceable(r, error)) return FAILED;
        r->fd = open(r->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, known ? 0600 : 0666);
        if (r->fd < 0 && errno != EEXIST && errno != EINTR) break;
    }
    if (r->fd < 0) return fail(error, p->path, "cannot be written: %s", strerror(errno));
    // root, going on with a user's run, may give it away; where that is refused it stays as it is:
    // no error
    int owned = known && old.st_uid == geteuid() && old.st_gid == getegid();
    if (known && !owned && fchown(r->fd, old.st_uid, old.st_gid)) errno = 0;
    if (!known && fstat(r->fd, &old)) errno = 0;
    mode_t mode = old.st_mode & 0777;
    if (!known) mode |= 0600;
    if (fchmod(r->fd, mode)) errno = 0;
    return 0;
}

// A finished temporary file whose place is another file's by now: it is kept under a name that no
// run removes.
static void keep_aside(const Replacement *r, char *error) {
    char kept[PATH_MAX + 32], problem[ERROR_SIZE];
    snprintf(kept, sizeof(kept), "%s.kept.%s", r->place->target, strrchr(r->temporary, '.') + 1);
    memcpy(problem, error, sizeof(problem));
    if (rename(r->temporary, kept)) unlink(r->temporary);
    else fail(error, NULL, "%.250s; what was to take its place is %.200s", problem, kept);
}

// Flushes and closes the temporary file, into which `size` bytes were written if `ok`. Returns 0 or
// an errno.
static int finish_temporary(Replacement *r, int ok, uint64_t size, struct stat *written) {
    int problem = 0;
    if (!ok || flush_to_disk(r->fd) || fstat(r->fd, written)) problem = errno;
    else if ((uint64_t)written->st_size != size) problem = EIO;
    if (close(r->fd) && !problem && errno != EINTR) problem = errno;
    return problem;
}

// The folder that holds the file has changed: that survives a power cut, too.
static void flush_folder(const char *target) {
    char path[PATH_MAX];
    folder_of(path, target);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;
    flush_to_disk(fd);
    close(fd);
}

// Ends what replacement_open began. ok: all `size` bytes were written; they are flushed to the
// disk, only then get their name, and then the folder is flushed, too: there is at any moment the
// old file or the new one, whole. Not ok, or `trial`: the temporary file is removed, and the old
// one stays.
static int replacement_close(Replacement *r, int ok, uint64_t size, int trial, char *error) {
    Place *p = r->place;
    struct stat written;
    int problem = finish_temporary(r, ok, size, &written);
    if (!problem && !trial) {
        if (check_ours(p, error)) {
            keep_aside(r, error);
            return FAILED;
        }
        if (rename(r->temporary, p->target)) problem = errno;
    }
    if ((problem || trial) && unlink(r->temporary) && !problem) problem = errno;
    if (problem) return fail(error, p->path, "cannot be written: %s", strerror(problem));
    if (trial) return 0;
    p->there = 1;
    p->known = written;
    p->head = head_of(p->target);
    flush_folder(p->target);
    return 0;
}

// Writes the bytes to a place, whole or not at all.
static int write_whole(Place *place, const unsigned char *bytes, size_t size, char *error) {
    Replacement file;
    if (replacement_open(&file, place, error)) return FAILED;
    int ok = !write_all(file.fd, bytes, size);
    return replacement_close(&file, ok, size, 0, error);
}

// ----------------------------------------------------------------------------
// safetensors: checkpoints, reference dumps and example sets are files of this one format
//
//     8 bytes             length of the header
//     header              JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
//                         ...}, and under "__metadata__" an object of strings; spaces may follow
//     data                the tensors' bytes, row-major; offsets count from here; no gaps
//
// Numbers are little-endian, as is every machine that this is built for. A file comes from
// anywhere, so nothing in it is trusted: what the reader returns has been checked, and any other
// file is refused with one line that says why.

enum { MAX_DIMS = 8, MAX_HEADER = 100000000 };

// One tensor of a file: count is in elements, size in bytes. The data need not be aligned: read it
// with memcpy.
typedef struct {
    char *name, dtype[16];
    int n_dims;              // may be larger than MAX_DIMS; shape then holds the first ones
    int64_t shape[MAX_DIMS], count;
    size_t size;
    const unsigned char *data;
} FileTensor;

typedef struct { char *key, *value; } Meta;

// A file in memory. Names, metadata and data point into bytes; tensors are sorted by name, metadata
// by key.
typedef struct {
    unsigned char *bytes;
    size_t size;
    FileTensor *tensors;
    int n_tensors;
    Meta *meta;
    int n_meta;
} Safetensors;

// Bits that an element of this dtype takes, 0 if the format has no such dtype: they are the number
// in its name.
static int dtype_bits(const char *dtype) {
    static const char known[] =
        " BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F4 F6_E2M3 F6_E3M2 I16 U16 F16 BF16 I32 U32 F32 "
        "I64 U64 F64 C64 ";
    char word[24];
    snprintf(word, sizeof(word), " %s ", dtype);
    if (!*dtype || strchr(dtype, ' ') || !strstr(known, word)) return 0;
    const char *digits = strpbrk(dtype, "0123456789");
    return digits ? atoi(digits) : 8; // BOOL
}

// The header while it is read. The first problem stays and moves the place to the end, so that
// whatever is read after it reads nothing, and only the end asks whether there was one.
typedef struct {
    unsigned char *at, *end;
    const unsigned char *place; // of the problem
    const char *problem;        // NULL: none so far
} Json;

static void json_fail(Json *j, const char *problem) {
    if (j->problem) return;
    j->problem = problem;
    j->place = j->at;
    j->at = j->end;
}

// Skips white space.
static void json_space(Json *j) {
    while (j->at < j->end && (*j->at == ' ' || *j->at == '\t' || *j->at == '\n' || *j->at == '\r'))
        j->at++;
}

// Takes the byte c, after white space: 1, or 0 if another stands there.
static int json_take(Json *j, char c) {
    json_space(j);
    if (j->at == j->end || *j->at != c) return 0;
    j->at++;
    return 1;
}

// Takes the byte c, which must stand there.
static void json_expect(Json *j, char c) {
    if (json_take(j, c)) return;
    if (c == '"') json_fail(j, "expected a string");
    else if (c == ':') json_fail(j, "expected ':'");
    else if (c == ',') json_fail(j, "expected ',' or an end");
    else json_fail(j, "expected '{' or '['");
}

// Inside an object or array that ends with `close`, having read n of its items: 1 if another one
// follows.
static int json_next(Json *j, char close, int n) {
    if (json_take(j, close)) return 0;
    if (n) json_expect(j, ',');
    return !j->problem;
}

// What follows the \u of an escape, -1 if it is not four hexadecimal digits.
static int json_hex(Json *j) {
    char digits[5] = "";
    if (j->end - j->at >= 4) memcpy(digits, j->at, 4);
    if (strspn(digits, "0123456789abcdefABCDEF") != 4) return -1;
    j->at += 4;
    return (int)strtol(digits, NULL, 16);
}

// The character that an escape stands for, of a surrogate pair both halves; -1 if it is no valid
// escape.
static int json_escape(Json *j) {
    static const char letters[] = "\"\\/bfnrt", meaning[] = "\"\\/\b\f\n\r\t";
    int c = j->at < j->end ? *j->at++ : 0;
    const char *letter = c ? strchr(letters, c) : NULL;
    if (letter) return meaning[letter - letters];
    int code = c == 'u' ? json_hex(j) : -1;
    if (code < 0xD800 || code > 0xDFFF) return code;
    int low = -1; // the second half
    if (j->end - j->at >= 2 && j->at[0] == '\\' && j->at[1] == 'u') {
        j->at += 2;
        low = json_hex(j);
    }
    if (code > 0xDBFF || low < 0xDC00 || low > 0xDFFF) return -1;
    return 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
}

// Reads a string and decodes it where it stands: UTF-8 is never longer than the escape, and the
// closing quote leaves room for the zero byte. U+0000 becomes C0 80, which is no valid UTF-8, so
// that the text equals no other.
static char *json_string(Json *j) {
    static const int lead[] = {0, 0xC0, 0xE0, 0xF0};
    static char nothing[] = "";
    json_expect(j, '"');
    unsigned char *text = j->at, *out = text;
    while (j->at < j->end) {
        int c = *j->at++;
        if (c == '"') {
            *out = 0;
            return (char *)text;
        }
        int code = c == '\\' ? json_escape(j) : c;
        if (c < 0x20) json_fail(j, "a control character in a string");
        if (code < 0) json_fail(j, "an invalid escape in a string");
        if (j->problem) break;
        int tail = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3; // UTF-8 bytes after the first
        if (c != '\\' || (code && code < 0x80)) tail = 0;
        *out++ = (unsigned char)(lead[tail] | (code >> (6 * tail)));
        while (tail-- > 0) *out++ = (unsigned char)(0x80 | ((code >> (6 * tail)) & 0x3F));
    }
    json_fail(j, "a string without an end");
    return nothing;
}

static char *json_key(Json *j) {
    char *key = json_string(j);
    json_expect(j, ':');
    return key;
}

// Reads a whole number in 0..2^63-1.
static int64_t json_integer(Json *j) {
    int64_t number = 0;
    json_space(j);
    const unsigned char *start = j->at;
    for (; j->at < j->end && *j->at >= '0' && *j->at <= '9'; j->at++) {
        int digit = *j->at - '0';
        if (__builtin_mul_overflow(number, 10, &number) ||
            __builtin_add_overflow(number, digit, &number)) {
            json_fail(j, "a number above 2^63-1");
            return 0;
        }
    }
    if (j->at == start) json_fail(j, "expected a whole number, 0 or more");
    if (j->at - start > 1 && *start == '0') json_fail(j, "a number with a leading zero");
    return number;
}

// Reads an array of integers, of which the first `room` are kept. Returns their number and, in
// *product, their product, -1 if it overflows.
static int json_integers(Json *j, int64_t *list, int room, int64_t *product) {
    int n = 0;
    *product = 1;
    json_expect(j, '[');
    for (; json_next(j, ']', n); n++) {
        int64_t number = json_integer(j);
        if (n < room) list[n] = number;
        if (*product < 0 || __builtin_mul_overflow(*product, number, product)) *product = -1;
    }
    return n;
}

// Reads the value of one tensor's entry: its three fields, in any order, each once. The data must
// lie inside the data_size bytes at data and be as long as dtype and shape say.
static void json_tensor(Json *j, FileTensor *t, const unsigned char *data, int64_t data_size) {
    int64_t offsets[2] = {0, 0}, bits = 0, unused;
    int dtypes = 0, shapes = 0, places = 0; // how often each field was seen
    int n_offsets = 0;
    json_expect(j, '{');
    for (int n = 0; json_next(j, '}', n); n++) {
        const char *key = json_key(j);
        if (!strcmp(key, "dtype") && !dtypes++)
            snprintf(t->dtype, sizeof(t->dtype), "%s", json_string(j));
        else if (!strcmp(key, "shape") && !shapes++)
            t->n_dims = json_integers(j, t->shape, MAX_DIMS, &t->count);
        else if (!strcmp(key, "data_offsets") && !places++)
            n_offsets = json_integers(j, offsets, 2, &unused);
        else
            json_fail(j, "a tensor's field is unknown, or stands there twice");
    }
    if (!dtypes || !shapes || n_offsets != 2)
        json_fail(j, "a tensor lacks dtype, shape or two data_offsets");
    if (j->problem) return;
    int of_element = dtype_bits(t->dtype);
    if (!of_element)
        json_fail(j, "a tensor's dtype is unknown");
    else if (t->count < 0 || __builtin_mul_overflow(t->count, of_element, &bits) || bits % 8)
        json_fail(j, "a tensor's size overflows, or is no number of bytes");
    else if (offsets[0] > offsets[1] || offsets[1] > data_size)
        json_fail(j, "a tensor's offsets are out of range, or the file ends early");
    else if (offsets[1] - offsets[0] != bits / 8)
        json_fail(j, "a tensor's offsets do not fit its dtype and shape");
    if (j->problem) return;
    t->data = data + offsets[0];
    t->size = (size_t)(bits / 8);
}

// An array of n items with room for one more: it doubles whenever n is a power of two. The old one
// when memory is exhausted.
static void *json_grow(Json *j, void *array, int n, size_t item) {
    if (n & (n - 1)) return array;
    void *larger = grow(array, (n ? (size_t)n * 2 : 1) * item);
    if (!larger) json_fail(j, "memory is exhausted");
    return larger ? larger : array;
}

// Reads the object of the metadata into file.
static void json_metadata(Json *j, Safetensors *file) {
    json_expect(j, '{');
    for (int n = 0; json_next(j, '}', n); n++) {
        file->meta = (Meta *)json_grow(j, file->meta, n, sizeof(Meta));
        Meta meta = {json_key(j), NULL};
        meta.value = json_string(j);
        if (!j->problem) file->meta[file->n_meta++] = meta;
    }
}

// Reads the header's object into file.
static void json_header(Json *j, Safetensors *file, const unsigned char *data) {
    int metadata_seen = 0;
    int64_t data_size = file->bytes + file->size - data;
    for (int n = 0; json_next(j, '}', n); n++) {
        char *name = json_key(j);
        if (!strcmp(name, "__metadata__")) {
            if (metadata_seen++) json_fail(j, "__metadata__ stands there twice");
            json_metadata(j, file);
            continue;
        }
        FileTensor tensor;
        memset(&tensor, 0, sizeof(tensor));
        tensor.name = name;
        file->tensors = (FileTensor *)json_grow(j, file->tensors, file->n_tensors,
                                                sizeof(FileTensor));
        json_tensor(j, &tensor, data, data_size);
        if (!j->problem) file->tensors[file->n_tensors++] = tensor;
    }
    json_space(j);
    if (j->at < j->end) json_fail(j, "something follows the last brace");
}

static int compare_places(const void *a, const void *b) {
    const FileTensor *s = (const FileTensor *)a, *t = (const FileTensor *)b;
    if (s->data != t->data) return s->data < t->data ? -1 : 1;
    return (s->size > t->size) - (s->size < t->size); // the empty ones first
}

// Of two FileTensor or two Meta: the name or key is the first member of both.
static int compare_names(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

// Sorts n FileTensor or Meta by name; returns a name that stands there twice, NULL if there is
// none.
static const char *sort_names(void *array, int n, size_t item) {
    char *items = (char *)array;
    if (n > 1) qsort(items, (size_t)n, item, compare_names);
    for (int i = 1; i < n; i++, items += item)
        if (!compare_names(items, items + item)) return *(char **)(void *)items;
    return NULL;
}

// Checks that the tensors cover the data exactly, each byte once, and that no name or key stands
// there twice; leaves tensors and metadata sorted for the search.
static int check_layout(Safetensors *file, const unsigned char *data, const char *path,
                        char *error) {
    FileTensor *tensors = file->tensors;
    const unsigned char *reached = data, *end = file->bytes + file->size;
    if (tensors) qsort(tensors, (size_t)file->n_tensors, sizeof(FileTensor), compare_places);
    for (int i = 0; i < file->n_tensors; i++) {
        if (tensors[i].data != reached) {
            const char *what = "has bytes before it that no tensor claims";
            if (tensors[i].data < reached) what = "overlaps another";
            return fail(error, path, "tensor '%.80s' %s", tensors[i].name, what);
        }
        reached += tensors[i].size;
    }
    if (reached != end)
        return fail(error, path, "no tensor claims the last %lld bytes",
                    (long long)(end - reached));
    const char *twice = sort_names(tensors, file->n_tensors, sizeof(FileTensor));
    if (!twice) twice = sort_names(file->meta, file->n_meta, sizeof(Meta));
    return twice ? fail(error, path, "the name '%.80s' stands there twice", twice) : 0;
}

// Frees what a Safetensors holds; fine on one that is all zero.
static void safetensors_free(Safetensors *file) {
    free(file->bytes);
    free(file->tensors);
    free(file->meta);
    memset(file, 0, sizeof(*file));
}

// The part of safetensors_parse for a file that holds a header of that length.
static int parse_header(Safetensors *file, size_t length, const char *path, char *error) {
    unsigned char *start = file->bytes + 8, *data = start + length;
    Json json = {.at = start, .end = data, .place = start, .problem = NULL};
    if (!length || *start != '{')
        json_fail(&json, "it does not start with '{': no safetensors file");
    if (!utf8_valid(start, length)) json_fail(&json, "not valid UTF-8");
    json_expect(&json, '{');
    json_header(&json, file, data);
    if (!json.problem) return check_layout(file, data, path, error);
    return fail(error, path, "header, byte %lld: %s", (long long)(json.place - start),
                json.problem);
}

// Makes a Safetensors of the bytes of a file; they must come from malloc and belong to it from now
// on, also when it fails. The path is for messages only.
static int safetensors_parse(Safetensors *file, unsigned char *bytes, size_t size, const char *path,
                             char *error) {
    uint64_t length = 0;
    int result;
    memset(file, 0, sizeof(*file));
    file->bytes = bytes;
    file->size = size;
    memcpy(&length, bytes, size < 8 ? size : 8);
    if (size < 8 || length > size - 8)
        result = fail(error, path, "no safetensors file, or one that ends early");
    else if (length > MAX_HEADER)
        result = fail(error, path, "a header of over 100 MB: no safetensors file");
    else
        result = parse_header(file, (size_t)length, path, error);
    if (result) safetensors_free(file);
    return result;
}

// Reads a file's header: metadata, and names and shapes of tensors whose data may not be looked at.
static int safetensors_read_header(Safetensors *file, const char *path, char *error) {
    unsigned char *bytes;
    size_t size;
    if (header_read(path, &bytes, &size, error)) return FAILED;
    return safetensors_parse(file, bytes, size, path, error);
}

// The tensor of this name, and the metadata's value for this key; NULL if there is none.
static const FileTensor *safetensors_find(const Safetensors *file, const char *name) {
    if (!file->n_tensors) return NULL;
    size_t n = (size_t)file->n_tensors;
    return (const FileTensor *)bsearch(&name, file->tensors, n, sizeof(FileTensor), compare_names);
}
static const char *safetensors_meta(const Safetensors *file, const char *key) {
    if (!file->n_meta) return NULL;
    size_t n = (size_t)file->n_meta;
    const Meta *meta = (const Meta *)bsearch(&key, file->meta, n, sizeof(Meta), compare_names);
    return meta ? meta->value : NULL;
}

// The number that the bits of an F16 mean.
static float float_of_half(uint16_t half) {
    int exponent = half >> 10 & 31, mantissa = half & 1023;
    float value;
    if (exponent == 31) value = mantissa ? NAN : INFINITY;
    else if (!exponent) value = ldexpf((float)mantissa, -24);
    else value = ldexpf((float)(1024 + mantissa), exponent - 25);
    return half >> 15 ? -value : value;
}

// An element of a tensor of F32, F16 or BF16.
static float float_at(const FileTensor *t, int64_t i) {
    float value;
    uint16_t half;
    if (!strcmp(t->dtype, "F32")) {
        memcpy(&value, t->data + 4 * i, 4);
        return value;
    }
    memcpy(&half, t->data + 2 * i, 2);
    if (!strcmp(t->dtype, "F16")) return float_of_half(half);
    uint32_t bits = (uint32_t)half << 16; // BF16: the upper half of an F32
    memcpy(&value, &bits, 4);
    return value;
}

// Text that grows. Once memory is exhausted it stays as it is, and says so.
typedef struct {
    char *text;
    size_t size, room;
    int failed;
} Text;

static void text_put(Text *t, const char *bytes, size_t n) {
    if (t->size + n > t->room && !t->failed) {
        size_t room = 2 * t->room + n;
        char *larger = (char *)grow(t->text, room);
        if (larger) {
            t->text = larger;
            t->room = room;
        } else {
            t->failed = 1;
        }
    }
    if (t->failed) return;
    memcpy(t->text + t->size, bytes, n);
    t->size += n;
}
static void text_add(Text *t, const char *text) { text_put(t, text, strlen(text)); }

// Adds text as a JSON string.
static void json_write(Text *out, const char *text) {
    text_add(out, "\"");
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\') text_add(out, "\\");
        if (c < 0x20) {
            char code[8];
            snprintf(code, sizeof(code), "\\u%04x", c);
            text_add(out, code);
        } else {
            text_put(out, text, 1);
        }
    }
    text_add(out, "\"");
}

static void text_numbers(Text *out, const int64_t *numbers, int n) { // "[2,3]"
    text_add(out, "[");
    for (int i = 0; i < n; i++) {
        char digits[24];
        snprintf(digits, sizeof(digits), "%s%lld", i ? "," : "", (long long)numbers[i]);
        text_add(out, digits);
    }
    text_add(out, "]");
}

// Adds the header of a file, its tensors laid out in the order given, padded with spaces to a
// multiple of 8.
static void write_header(Text *out, const FileTensor *tensors, int n_tensors, const Meta *meta,
                         int n_meta) {
    int64_t offset = 0;
    text_add(out, "{");
    for (int i = 0; i < n_meta; i++) {
        text_add(out, i ? "," : "\"__metadata__\":{");
        json_write(out, meta[i].key);
        text_add(out, ":");
        json_write(out, meta[i].value);
    }
    text_add(out, n_meta ? "}" : "");
    for (int i = 0; i < n_tensors; i++) {
        const FileTensor *t = &tensors[i];
        int64_t offsets[2] = {offset, offset + (int64_t)t->size};
        if (i || n_meta) text_add(out, ",");
        json_write(out, t->name);
        text_add(out, ":{\"dtype\":");
        json_write(out, t->dtype);
        text_add(out, ",\"shape\":");
        text_numbers(out, t->shape, t->n_dims);
        text_add(out, ",\"data_offsets\":");
        text_numbers(out, offsets, 2);
        text_add(out, "}");
        offset = offsets[1];
    }
    text_add(out, "}");
    while (!out->failed && out->size % 8) text_add(out, " ");
}

// Writes a safetensors file with the tensors in the order given, whole or not at all (see
// replacement_close). trial: all of it is done but for the last step, and nothing is left: tells
// before a long run whether the place can be written. *total: the bytes of the file, or NULL.
static int safetensors_write(Place *place, const FileTensor *tensors, int n_tensors,
                             const Meta *meta, int n_meta, int trial, uint64_t *total,
                             char *error) {
    Text header = {NULL, 0, 0, 0};
    for (int i = 0; i < n_meta; i++) {
        const char *key = meta[i].key, *value = meta[i].value;
        if (!utf8_valid((const unsigned char *)value, strlen(value)))
            return fail(error, place->path, "'%.80s', '%.80s' cannot be stored: not UTF-8", key,
                        value);
    }
    write_header(&header, tensors, n_tensors, meta, n_meta);
    uint64_t length = header.size, size = 8 + length;
    Replacement file;
    int result = header.failed ? fail(error, place->path, "cannot be written: out of memory")
                               : replacement_open(&file, place, error);
    if (!result) {
        int ok = !write_all(file.fd, &length, 8) && !write_all(file.fd, header.text, header.size);
        for (int i = 0; i < n_tensors; i++) {
            ok = ok && !write_all(file.fd, tensors[i].data, tensors[i].size);
            size += tensors[i].size;
        }
        result = replacement_close(&file, ok, size, trial, error);
    }
    if (total) *total = size;
    free(header.text);
    return result;
}

// ----------------------------------------------------------------------------
// data: text, token shards, example sets
//
// Text is any file of bytes, a token is a byte's place in the vocabulary. A shard is llm.c's: 256
// int32 (magic, version, number of tokens, the rest unused), then the tokens: uint16 of GPT-2
// (magic 20240520, version 1) or uint32 of Llama 3 (20240801, 7). An example set is a safetensors
// file with `inputs` and `targets` (N,T), and maybe `lags` (N,T): how far back lies what each
// target asks for. What a file is, is told by what it holds; what looks like anything else is
// refused.

typedef enum { DATA_TEXT, DATA_SHARD, DATA_EXAMPLES } DataKind;

typedef struct {
    DataKind kind;
    unsigned char *bytes;      // TEXT, SHARD: the file; dataset_encode makes a text token ids
    const uint16_t *tokens;    // SHARD: inside bytes
    const uint32_t *tokens32;  // a SHARD of wider tokens: inside bytes
    int32_t *inputs, *targets; // EXAMPLES: (count, width); a target of -1 is none
    int32_t *lags;             // EXAMPLES: (count, width) or NULL
    int64_t count;             // tokens or examples
    int64_t of_shards;         // SHARD: the tokens of several as one, 0: it is one
    int width;                 // EXAMPLES: T of the file
    int vocab_hint;            // EXAMPLES: the metadata's vocab_size, or 0; SHARD: its tokenizer's
    int max_id;                // SHARD, EXAMPLES: the largest id, -1 if there is none
    int64_t zeros;             // TEXT: bytes that are 0
    char content[96];          // kind, size and hash: what a resumed run must find again
} Dataset;

// Frees what a Dataset holds; fine on one that is all zero.
static void dataset_free(Dataset *data) {
    free(data->bytes);
    free(data->inputs);
    free(data->targets);
    free(data->lags);
    memset(data, 0, sizeof(*data));
}

enum { SHARD_HEADER = 1024, MAX_VOCAB = 1 << 24 };
enum { GPT2_SHARD = 20240520, LLAMA3_SHARD = 20240801 };

// Makes a token shard of the file's bytes, of which there are SHARD_HEADER or more.
static int shard_read(Dataset *data, size_t size, const char *path, char *error) {
    int32_t header[3];
    memcpy(header, data->bytes, sizeof(header));
    int wide = header[0] == LLAMA3_SHARD, version = wide ? 7 : 1;
    const void *tokens = data->bytes + SHARD_HEADER;
    size_t held = size - SHARD_HEADER, width = wide ? 4 : 2;
    int64_t count = data->of_shards ? data->of_shards : header[2];
    if (header[1] != version)
        return fail(error, path, "a token shard of version %d; only %d is known", header[1],
                    version);
    if (count < 1 || (uint64_t)count * width != held)
        return fail(error, path,
                    "a token shard whose header says %d tokens; the file holds %zu bytes of them",
                    header[2], held);
    data->count = count;
    data->vocab_hint = wide ? 128256 : 50257;
    if (wide) data->tokens32 = (const uint32_t *)tokens;
    else data->tokens = (const uint16_t *)tokens;
    for (int64_t i = 0; i < data->count; i++) {
        uint32_t id = wide ? data->tokens32[i] : data->tokens[i];
        if (id >= MAX_VOCAB)
            return fail(error, path, "its token %lld is %u; ids are below 2^24", (long long)i,
                        (unsigned)id);
        if ((int)id > data->max_id) data->max_id = (int)id;
    }
    return 0;
}

// An element of a tensor of integers of that many bits; one of U64 that is too large becomes
// negative.
static int64_t integer_at(const FileTensor *t, int bits, int64_t i) {
    uint64_t word = 0; // little-endian: the element's bytes come lowest
    memcpy(&word, t->data + i * bits / 8, (size_t)bits / 8);
    if (*t->dtype == 'U') return (int64_t)word;
    return (int64_t)(word << (64 - bits)) >> (64 - bits); // extend the sign
}

// An integer tensor as int32; raises max_id to its largest number. Every number must be `low` or
// more and below 2^24, the largest vocabulary. NULL and the line if one is not, or if the dtype is
// no integer's.
static int32_t *ids_read(const FileTensor *tensor, int low, int *max_id, const char *path,
                         char *error) {
    char what[80];
    if (*tensor->dtype != 'I' && *tensor->dtype != 'U') {
        fail(error, path, "'%s' is no tensor of integers", tensor->name);
        return NULL;
    }
    snprintf(what, sizeof(what), "'%.60s'", tensor->name);
    int32_t *ids = NULL;
    if ((uint64_t)tensor->count < SIZE_MAX / 4) {
        if (check_room((double)tensor->count * 4, path, what, error)) return NULL;
        ids = (int32_t *)malloc((size_t)tensor->count * 4 + 1);
    }
    if (!ids) {
        fail(error, path, "'%s' does not fit in memory", tensor->name);
        return NULL;
    }
    int bits = dtype_bits(tensor->dtype);
    for (int64_t i = 0; i < tensor->count; i++) {
        int64_t id = integer_at(tensor, bits, i);
        if (id < low || id >= MAX_VOCAB) {
            long long example = (long long)(i / tensor->shape[1]);
            long long t = (long long)(i % tensor->shape[1]);
            fail(error, path,
                 "'%s' holds %lld at [%lld,%lld]; what it holds is %d or more and below 2^24",
                 tensor->name, (long long)id, example, t, low);
            free(ids);
            return NULL;
        }
        ids[i] = (int32_t)id;
        if (id > *max_id) *max_id = (int)id;
    }
    return ids;
}

// Whether the tensors of an example set are there, of one shape, and not too large.
static int check_examples(const FileTensor *tensors[3], const char *path, char *error) {
    static const char *names[] = {"inputs", "targets", "lags"};
    const FileTensor *inputs = tensors[0];
    for (int i = 0; i < 3; i++) {
        const FileTensor *t = tensors[i];
        if (!t && i < 2) return fail(error, path, "not an example set: it has no '%s'", names[i]);
        if (t && (t->n_dims != 2 || memcmp(t->shape, inputs->shape, 2 * sizeof(int64_t))))
            return fail(error, path, "'%s' must have two dimensions, (N,T), and the shape of "
                                     "'inputs'", names[i]);
    }
    if (!inputs->count || inputs->shape[1] > 1 << 24 || inputs->shape[0] > INT_MAX)
        return fail(error, path, "the example set is empty, or too large");
    return 0;
}

// Fills data from a safetensors file of examples.
static int examples_read(Dataset *data, const Safetensors *file, const char *path, char *error) {
    const FileTensor *inputs = safetensors_find(file, "inputs");
    const FileTensor *targets = safetensors_find(file, "targets");
    const FileTensor *lags = safetensors_find(file, "lags");
    const FileTensor *tensors[] = {inputs, targets, lags};
    if (check_examples(tensors, path, error)) return FAILED;
    const char *vocab_size = safetensors_meta(file, "vocab_size");
    int64_t vocab = 0;
    if (vocab_size && parse_integer(vocab_size, 1, MAX_VOCAB, &vocab))
        return fail(error, path, "its metadata's vocab_size is '%.40s', not a whole number up to "
                                 "2^24", vocab_size);
    data->count = inputs->shape[0];
    data->width = (int)inputs->shape[1];
    data->vocab_hint = (int)vocab;
    data->inputs = ids_read(inputs, 0, &data->max_id, path, error);
    if (!data->inputs) return FAILED;
    data->targets = ids_read(targets, -1, &data->max_id, path, error);
    if (!data->targets) return FAILED;
    if (!lags) return 0;
    int longest = 0;
    data->lags = ids_read(lags, 0, &longest, path, error);
    return data->lags ? 0 : FAILED;
}

// What the first bytes say that a file is, where it is neither text nor one of the formats above.
typedef struct { const char *bytes; int n, at; const char *what; } Signature;
static const Signature signatures[] = {
    {"PK\3\4", 4, 0, "a zip archive (as .pt, .npz and .docx are)"},
    {"\x1F\x8B", 2, 0, "a gzip archive"},
    {"1AY&SY", 6, 4, "a bzip2 archive"},
    {"\xFD" "7zXZ", 5, 0, "an xz archive"},
    {"\x28\xB5\x2F\xFD", 4, 0, "a zstd archive"},
    {"7z\xBC\xAF\x27\x1C", 6, 0, "a 7z archive"},
    {"Rar!\x1A", 5, 0, "a rar archive"},
    {"\x04\x22\x4D\x18", 4, 0, "an lz4 archive"},
    {"ustar", 5, 257, "a tar archive"},
    {"\x89PNG", 4, 0, "a PNG image"},
    {"\xFF\xD8\xFF", 3, 0, "a JPEG image"},
    {"GIF8", 4, 0, "a GIF image"},
    {"II*\0", 4, 0, "a TIFF image"},
    {"MM\0*", 4, 0, "a TIFF image"},
    {"WEBP", 4, 8, "a WebP image"},
    {"WAVE", 4, 8, "a WAV file"},
    {"ftyp", 4, 4, "a video or an image of the MPEG-4 family"},
    {"OggS", 4, 0, "an Ogg file"},
    {"fLaC", 4, 0, "a FLAC file"},
    {"ID3", 3, 0, "an MP3 file"},
    {"%PDF-", 5, 0, "a PDF document"},
    {"\xD0\xCF\x11\xE0", 4, 0, "an old Office document"},
    {"\x7F" "ELF", 4, 0, "a program"},
    {"SQLite format 3", 16, 0, "an SQLite database"},
    {"PAR1", 4, 0, "a Parquet file"},
    {"ARROW1", 6, 0, "an Arrow file"},
    {"\x89HDF", 4, 0, "an HDF5 file"},
    {"\x93NUMPY", 6, 0, "a NumPy array (.npy)"},
    {"\x80\2", 2, 0, "a Python pickle"},
    {"\x80\3", 2, 0, "a Python pickle"},
    {"\x80\4", 2, 0, "a Python pickle"},
    {"\x80\5", 2, 0, "a Python pickle"},
    {"!<arch>\n", 8, 0, "an ar archive"},
    {"070701", 6, 0, "a cpio archive"},
    {"BM", 2, 0, "a BMP image"},
    {"P5\n", 3, 0, "a PGM image"},
    {"P6\n", 3, 0, "a PPM image"},
    {"MThd", 4, 0, "a MIDI file"},
    {"GGUF", 4, 0, "a GGUF model"},
    {"\xC6\xD7\x34\x01", 4, 0, "a model of llm.c (magic 20240326)"},
    {"\xC7\xD7\x34\x01", 4, 0, "a state of llm.c (magic 20240327)"},
    {"\x8A\xD8\x34\x01", 4, 0, "an evaluation set of llm.c (magic 20240522)"},
    {"\xFF\xFE\0\0", 4, 0, "UTF-32 text (convert it: iconv -f UTF-32 -t UTF-8)"},
    {"\0\0\xFE\xFF", 4, 0, "UTF-32 text (convert it: iconv -f UTF-32 -t UTF-8)"},
    {"\xFF\xFE", 2, 0, "UTF-16 text (convert it: iconv -f UTF-16 -t UTF-8)"},
    {"\xFE\xFF", 2, 0, "UTF-16 text (convert it: iconv -f UTF-16 -t UTF-8)"},
};

// Whether the signature stands in the bytes. Letters alone may begin a text as well.
static int is_signed_by(const Signature *s, const unsigned char *bytes, size_t size,
                        int only_letters) {
    int printable = 1;
    for (int i = 0; i < s->n; i++) printable = printable && s->bytes[i] >= 32 && s->bytes[i] < 127;
    if (printable && only_letters && strcmp(s->bytes, "%PDF-")) return 0;
    return size >= (size_t)(s->at + s->n) && !memcmp(bytes + s->at, s->bytes, (size_t)s->n);
}

// Of a file: how often each byte stands at each place of a number of 32 bits, and what follows from
// it. letters: at each place of a number of 16 bits what is no control character, or is white
// space. controls: those that texts of no encoding hold, which are all but white space, escape and
// zero.
typedef struct {
    size_t size, of[4][256];
    size_t zeros[4], all_zeros;
    size_t letters[2], controls;
} ByteCounts;

static void count_bytes(ByteCounts *c, const unsigned char *bytes, size_t size) {
    memset(c, 0, sizeof(*c));
    c->size = size;
    for (size_t i = 0; i < size; i++) c->of[i % 4][bytes[i]]++;
    for (int place = 0; place < 4; place++) {
        c->zeros[place] = c->of[place][0];
        c->all_zeros += c->of[place][0];
        for (int byte = 1; byte < 256; byte++) {
            int space = byte >= '\b' && byte <= '\r';
            if (byte >= 32 || space) c->letters[place % 2] += c->of[place][byte];
            else if (byte != 27) c->controls += c->of[place][byte];
        }
    }
}

static const char utf16[] = "UTF-16 text (convert it: iconv -f UTF-16 -t UTF-8)";

// Whether every other byte is one of few, as in UTF-16 of an alphabet that is not Latin, and
// control characters stand between them, which no text with a byte for a letter holds.
static int is_utf16(const ByteCounts *c) {
    size_t most[2] = {0}, controls = 0, half = c->size / 2;
    for (int parity = 0; parity < 2; parity++) {
        for (int byte = 0; byte < 256; byte++) {
            size_t n = c->of[parity][byte] + c->of[parity + 2][byte];
            if (n > most[parity]) most[parity] = n;
            if (byte < 32 && byte != '\n' && byte != '\r' && byte != '\t') controls += n;
        }
    }
    int high = most[0] < most[1]; // where the alphabet's number stands
    return c->size >= 64 && most[high] > half / 5 * 3 && most[1 - high] < half / 5 * 2 &&
           controls > c->size / 50;
}

// What the zeros look like: NULL where they may be a text's. Numbers of 16 or 32 bits, token ids or
// the letters of UTF-16, leave zeros at the same place of each number.
static const char *zeros_look_like(const ByteCounts *c) {
    const size_t *zeros = c->zeros;
    size_t half = c->size / 2, quarter = c->size / 4;
    if (c->size % 4 == 0 && zeros[3] > quarter - quarter / 100 - 1 && zeros[2] > quarter / 2)
        return "raw 32-bit numbers, token ids maybe";
    for (int odd = 0; odd < 2 && c->size % 2 == 0; odd++) {
        size_t here = zeros[odd] + zeros[odd + 2], there = zeros[1 - odd] + zeros[3 - odd];
        if (here < half / 4 || here < 8 * there) continue;
        if (c->letters[1 - odd] > half - half / 50 - 1) return utf16;
        return "raw 16-bit numbers, token ids maybe";
    }
    return c->all_zeros > quarter ? "numbers, or UTF-32: a quarter of its bytes are 0" : NULL;
}

// What bytes look like that are no text: NULL where they may be one. Other numbers than those of
// zeros_look_like and packed data leave control characters everywhere, which texts of no encoding
// hold (but for those of white space, backspace, escape and a zero as a separator).
static const char *looks_like(const unsigned char *bytes, size_t size) {
    ByteCounts counts;
    count_bytes(&counts, bytes, size);
    int only_letters = !counts.controls && !counts.all_zeros;
    for (size_t i = 0; i < sizeof(signatures) / sizeof(signatures[0]); i++)
        if (is_signed_by(&signatures[i], bytes, size, only_letters)) return signatures[i].what;
    if (size < 8) return NULL;
    const char *what = zeros_look_like(&counts);
    if (what) return what;
    if (is_utf16(&counts)) return utf16;
    if (counts.controls > size / 10 || (counts.controls > size / 50 && !utf8_valid(bytes, size)))
        return "numbers or packed data, no text";
    return NULL;
}

static int is_safetensors(const unsigned char *bytes, size_t size) {
    uint64_t length = 0;
    if (size < 10) return 0;
    memcpy(&length, bytes, 8);
    return length >= 2 && length <= size - 8 && length <= MAX_HEADER && bytes[8] == '{';
}

// Tells the kind of a file by what it holds; a file named *.safetensors must be one. as_bytes: any
// file is text.
static int data_kind(DataKind *kind, const unsigned char *bytes, size_t size, int as_bytes,
                     const char *path, char *error) {
    *kind = DATA_TEXT;
    if (as_bytes) return 0;
    size_t length = strlen(path);
    int named = length >= 12 && !strcmp(path + length - 12, ".safetensors");
    int32_t magic = 0;
    if (size >= SHARD_HEADER) memcpy(&magic, bytes, sizeof(magic));
    if (named || is_safetensors(bytes, size)) *kind = DATA_EXAMPLES;
    else if (magic == GPT2_SHARD || magic == LLAMA3_SHARD) *kind = DATA_SHARD;
    if (*kind != DATA_TEXT) return 0;
    const char *what = looks_like(bytes, size);
    return what ? fail(error, path, "it looks like %s; --format bytes takes it as it is", what) : 0;
}

// The part of dataset_read for a file whose bytes and kind are known.
static int dataset_fill(Dataset *data, size_t size, const char *path, char *error) {
    if (data->kind == DATA_SHARD) return shard_read(data, size, path, error);
    if (data->kind == DATA_EXAMPLES) {
        Safetensors file;
        unsigned char *bytes = data->bytes;
        data->bytes = NULL; // the parser's now
        if (safetensors_parse(&file, bytes, size, path, error)) return FAILED;
        int result = examples_read(data, &file, path, error);
        safetensors_free(&file);
        return result;
    }
    if (!size) return fail(error, path, "the file is empty");
    for (size_t i = 0; i < size; i++) data->zeros += !data->bytes[i];
    return 0;
}

// Puts the tokens of a shard, or the bytes of a text, behind those that are there. The header of
// the first shard becomes that of all; its count is right while one shard could hold as many.
static int dataset_append(Dataset *all, size_t *size, const unsigned char *bytes, size_t more,
                          DataKind kind, const char *path, char *error) {
    size_t skipped = kind == DATA_SHARD && *size ? SHARD_HEADER : 0;
    if (kind == DATA_EXAMPLES)
        return fail(error, path, "an example set: a pattern is for token shards or texts");
    if (*size && (kind != all->kind || (skipped && memcmp(all->bytes, bytes, 8))))
        return fail(error, path, "of another kind than the files before it");
    unsigned char *larger = (unsigned char *)grow(all->bytes, *size + more - skipped + 1);
    if (!larger) return fail(error, path, "it does not fit in memory");
    memcpy(larger + *size, bytes + skipped, more - skipped);
    all->bytes = larger;
    all->kind = kind;
    *size += more - skipped;
    larger[*size] = 0;
    return 0;
}

// Reads the files that a pattern matches, in sorted order, into one that holds all of them.
static int dataset_read_parts(Dataset *all, size_t *size, const glob_t *parts, int as_bytes,
                              char *error) {
    int64_t tokens = 0;
    *size = 0;
    for (size_t i = 0; i < parts->gl_pathc; i++) {
        const char *path = parts->gl_pathv[i];
        Dataset part;
        size_t more;
        memset(&part, 0, sizeof(part));
        if (file_read(path, &part.bytes, &more, error)) return FAILED;
        int result = data_kind(&part.kind, part.bytes, more, as_bytes, path, error);
        if (!result && part.kind == DATA_SHARD) result = shard_read(&part, more, path, error);
        if (!result) result = dataset_append(all, size, part.bytes, more, part.kind, path, error);
        tokens += part.count;
        dataset_free(&part);
        if (result) return result;
    }
    int32_t count = tokens < INT32_MAX ? (int32_t)tokens : INT32_MAX;
    if (all->kind == DATA_SHARD) memcpy(all->bytes + 8, &count, sizeof(count));
    if (all->kind == DATA_SHARD) all->of_shards = tokens;
    return 0;
}

// The files that a path means: one of that name, or what it matches as a pattern, sorted by name.
static int expand(glob_t *parts, const char *path) {
    struct stat info;
    memset(parts, 0, sizeof(*parts));
    return strpbrk(path, "*?[") && stat(path, &info) && !glob(path, 0, NULL, parts);
}

// Reads a file, or what a pattern matches, whole, and tells its kind.
static int dataset_load(Dataset *data, size_t *size, const char *path, int as_bytes, char *error) {
    glob_t parts;
    if (expand(&parts, path)) {
        int result = dataset_read_parts(data, size, &parts, as_bytes, error);
        globfree(&parts);
        return result;
    }
    if (file_read(path, &data->bytes, size, error)) return FAILED;
    return data_kind(&data->kind, data->bytes, *size, as_bytes, path, error);
}

// Reads a file of any of the three kinds, or several of a kind as one.
static int dataset_read(Dataset *data, const char *path, int as_bytes, char *error) {
    static const char *kinds[] = {"text", "token shard", "examples"};
    size_t size;
    memset(data, 0, sizeof(*data));
    int result = dataset_load(data, &size, path, as_bytes, error);
    if (!result) {
        snprintf(data->content, sizeof(data->content), "%s, %zu bytes, hash %016llx",
                 kinds[data->kind], size, (unsigned long long)hash_bytes(data->bytes, size));
        data->max_id = -1;
        data->count = (int64_t)size;
        result = dataset_fill(data, size, path, error);
    }
    if (result) dataset_free(data);
    return result;
}

// Puts a text's token ids in the place of its bytes.
static int dataset_encode(Dataset *data, const unsigned char *vocab, int vocab_size,
                          const char *path, char *error) {
    int ids[256];
    for (int byte = 0; byte < 256; byte++) ids[byte] = -1;
    for (int id = 0; id < vocab_size; id++) ids[vocab[id]] = id;
    for (int64_t i = 0; i < data->count; i++) {
        int byte = data->bytes[i];
        if (ids[byte] < 0)
            return fail(error, path, "the vocabulary lacks the byte 0x%02X at offset %lld",
                        (unsigned)byte, (long long)i);
        data->bytes[i] = (unsigned char)ids[byte];
    }
    return 0;
}

// The i-th token of a stream.
static inline int token_at(const Dataset *set, int64_t i) {
    if (set->tokens) return set->tokens[i];
    if (set->tokens32) return (int)set->tokens32[i];
    return set->bytes[i];
}

// Copies one sequence into inputs and targets (T): the example, or the tokens from `at` on and the
// ones that follow them.
static void copy_sequence(int *inputs, int *targets, const Dataset *set, int64_t at, int T) {
    for (int t = 0; t < T; t++) {
        int64_t element = at * T + t; // of the examples' arrays
        inputs[t] = set->inputs ? set->inputs[element] : token_at(set, at + t);
        targets[t] = set->targets ? set->targets[element] : token_at(set, at + t + 1);
    }
}

// ----------------------------------------------------------------------------
// words: tokens of any number of bytes
//
// Beside token shards may lie the words that their ids stand for, a safetensors file that
// data/bpe.py writes; a model trained on them has the same tensors in its checkpoint:
//
//     tokenizer.tokens    U8 (n)     the bytes of all tokens, one token behind the other
//     tokenizer.offsets   I64 (V+1)  where each begins, and where the last ends
//     tokenizer.merges    I32 (M,2)  pairs of ids, in order of rank
//
// With merges a text becomes ids by byte pair encoding. It is cut into pieces by its bytes alone. A
// piece is the first of these that fits:
//
//     1. a space or none, then a run of letters: A to Z, a to z, and all bytes from 0x80 on
//     2. a space or none, then one to three digits
//     3. a space or none, then a run of other bytes that are no white space
//     4. a run of white space (space, \t, \n, \v, \f, \r); where it is longer than one byte, ends
//        with a space and something follows, without that space
//
// A piece begins as the tokens of its bytes. The pair of neighbours with the lowest rank, the
// leftmost of equal ones, becomes the token of both their bytes, until no pair has a rank. Without
// merges, as for the words of another program's tokenizer, ids are printed as text, but the ids of a
// text are not known.

// A pair of neighbours and the token that takes their place.
typedef struct { int left, right, rank, product; } Merge;

typedef struct {
    int count;            // of the tokens, V; 0: there are no words
    int64_t size;         // of all their bytes
    unsigned char *bytes;
    int64_t *offsets;     // (count + 1)
    int n_merges;
    int32_t *pairs;       // (n_merges, 2) by rank, as they are stored; NULL: text has no ids
    Merge *merges;        // (n_merges) in order of left and right
    int of_byte[256];     // the token that is this byte alone, -1: there is none
} Words;

// Frees what a Words holds; fine on one that is all zero.
static void words_free(Words *w) {
    free(w->bytes);
    free(w->offsets);
    free(w->pairs);
    free(w->merges);
    memset(w, 0, sizeof(*w));
}

// The bytes of a token, and their number.
static const unsigned char *word_of(const Words *w, int id) { return w->bytes + w->offsets[id]; }
static int64_t word_length(const Words *w, int id) { return w->offsets[id + 1] - w->offsets[id]; }

// Copies a tensor's data; NULL when memory is exhausted.
static void *copy_of_tensor(const FileTensor *t) {
    void *copy = grow(NULL, t->size + 1); // never 0 bytes
    if (copy) memcpy(copy, t->data, t->size);
    return copy;
}

// Copies the three tensors, whose dtypes and shapes must be right. merges may be NULL.
static int copy_words(Words *w, const FileTensor *tokens, const FileTensor *offsets,
                      const FileTensor *merges, const char *path, char *error) {
    if (!tokens || strcmp(tokens->dtype, "U8") || tokens->n_dims != 1)
        return fail(error, path, "tokenizer.tokens is missing, or not U8 of one dimension");
    if (!offsets || strcmp(offsets->dtype, "I64") || offsets->n_dims != 1 || offsets->count < 2 ||
        offsets->count > MAX_VOCAB + 1)
        return fail(error, path, "tokenizer.offsets is missing, or not I64 (V+1), V up to 2^24");
    if (merges && (strcmp(merges->dtype, "I32") || merges->n_dims != 2 || merges->shape[1] != 2 ||
                   merges->shape[0] > MAX_VOCAB))
        return fail(error, path, "tokenizer.merges is not I32 (M,2), M up to 2^24");
    w->count = (int)(offsets->count - 1);
    w->size = tokens->count;
    w->n_merges = merges ? (int)merges->shape[0] : 0;
    w->bytes = (unsigned char *)copy_of_tensor(tokens);
    w->offsets = (int64_t *)copy_of_tensor(offsets);
    w->pairs = merges ? (int32_t *)copy_of_tensor(merges) : NULL;
    w->merges = (Merge *)grow(NULL, ((size_t)w->n_merges + 1) * sizeof(Merge));
    if (w->bytes && w->offsets && w->merges && (w->pairs || !merges)) return 0;
    return fail(error, path, "its words do not fit in memory");
}

// Checks that the offsets cut the bytes into words, and finds those of one byte.
static int check_offsets(Words *w, const char *path, char *error) {
    for (int byte = 0; byte < 256; byte++) w->of_byte[byte] = -1;
    if (w->offsets[0] || w->offsets[w->count] != w->size)
        return fail(error, path, "tokenizer.offsets does not lead from 0 to the end of the tokens");
    for (int id = 0; id < w->count; id++)
        if (w->offsets[id + 1] < w->offsets[id] || w->offsets[id + 1] > w->size)
            return fail(error, path, "tokenizer.offsets falls behind token %d", id);
    for (int id = w->count - 1; id >= 0; id--)
        if (word_length(w, id) == 1) w->of_byte[*word_of(w, id)] = id;
    return 0;
}

// A word, or one put together from two.
typedef struct { const unsigned char *bytes, *tail; int64_t length, tail_length; int id; } Word;

// Orders words by length, then by their bytes. b is in one part.
static int compare_words(const void *a, const void *b) {
    const Word *x = (const Word *)a, *y = (const Word *)b;
    int64_t length = x->length + x->tail_length;
    if (length != y->length) return length < y->length ? -1 : 1;
    int order = memcmp(x->bytes, y->bytes, (size_t)x->length);
    if (order || !x->tail_length) return order;
    return memcmp(x->tail, y->bytes + x->length, (size_t)x->tail_length);
}

static int compare_merges(const void *a, const void *b) {
    const Merge *x = (const Merge *)a, *y = (const Merge *)b;
    if (x->left != y->left) return x->left < y->left ? -1 : 1;
    return (x->right > y->right) - (x->right < y->right);
}

// Finds the token that each merge makes, among the words in their order.
static int find_products(Words *w, const Word *sorted, const char *path, char *error) {
    size_t V = (size_t)w->count;
    for (int rank = 0; rank < w->n_merges; rank++) {
        Merge m = {w->pairs[2 * rank], w->pairs[2 * rank + 1], rank, 0};
        if (m.left < 0 || m.right < 0 || m.left >= w->count || m.right >= w->count)
            return fail(error, path, "merge %d is of %d and %d, ids are 0 to %d", rank, m.left,
                        m.right, w->count - 1);
        Word both = {word_of(w, m.left), word_of(w, m.right), word_length(w, m.left),
                     word_length(w, m.right), 0};
        const Word *product = (const Word *)bsearch(&both, sorted, V, sizeof(Word), compare_words);
        if (!product || !both.length || !both.tail_length)
            return fail(error, path, "merge %d, of %d and %d, makes no token", rank, m.left,
                        m.right);
        m.product = product->id;
        w->merges[rank] = m;
    }
    return 0;
}

// Makes the merges ready to encode: any text must have ids, and no more than one way to them.
static int settle_merges(Words *w, const char *path, char *error) {
    for (int byte = 0; byte < 256; byte++)
        if (w->of_byte[byte] < 0)
            return fail(error, path, "it has merges, but no token that is the byte 0x%02X", byte);
    Word *sorted = (Word *)grow(NULL, (size_t)w->count * sizeof(Word));
    if (!sorted) return fail(error, path, "its words do not fit in memory");
    for (int id = 0; id < w->count; id++) {
        Word word = {word_of(w, id), NULL, word_length(w, id), 0, id};
        sorted[id] = word;
    }
    qsort(sorted, (size_t)w->count, sizeof(Word), compare_words);
    int result = 0;
    for (int i = 1; !result && i < w->count; i++)
        if (!compare_words(&sorted[i - 1], &sorted[i]))
            result = fail(error, path, "it has merges, but tokens %d and %d are the same bytes",
                          sorted[i - 1].id, sorted[i].id);
    if (!result) result = find_products(w, sorted, path, error);
    free(sorted);
    if (result) return FAILED;
    qsort(w->merges, (size_t)w->n_merges, sizeof(Merge), compare_merges);
    for (int i = 1; i < w->n_merges; i++)
        if (!compare_merges(&w->merges[i - 1], &w->merges[i]))
            return fail(error, path, "the merge of %d and %d stands there twice", w->merges[i].left,
                        w->merges[i].right);
    return 0;
}

// Takes the words from a file; none (count 0) from one that has none. A file comes from anywhere:
// what is returned has been checked.
static int words_read(Words *w, const Safetensors *file, const char *path, char *error) {
    const FileTensor *tokens = safetensors_find(file, "tokenizer.tokens");
    const FileTensor *offsets = safetensors_find(file, "tokenizer.offsets");
    const FileTensor *merges = safetensors_find(file, "tokenizer.merges");
    memset(w, 0, sizeof(*w));
    if (!tokens && !offsets && !merges) return 0;
    int result = copy_words(w, tokens, offsets, merges, path, error);
    if (!result) result = check_offsets(w, path, error);
    if (!result && w->pairs) result = settle_merges(w, path, error);
    if (result) words_free(w);
    return result;
}

// The same for a file that lies beside a shard, which must have some.
static int words_read_file(Words *w, const char *path, char *error) {
    Safetensors file;
    unsigned char *bytes;
    size_t size;
    memset(w, 0, sizeof(*w));
    if (file_read(path, &bytes, &size, error)) return FAILED;
    if (safetensors_parse(&file, bytes, size, path, error)) return FAILED;
    int result = words_read(w, &file, path, error);
    safetensors_free(&file);
    if (!result && !w->count) return fail(error, path, "tokenizer.tokens is missing");
    return result;
}

// Whether ids mean the same in both.
static int same_words(const Words *a, const Words *b) {
    if (a->count != b->count || a->size != b->size || a->n_merges != b->n_merges) return 0;
    if (memcmp(a->bytes, b->bytes, (size_t)a->size)) return 0;
    if (memcmp(a->offsets, b->offsets, ((size_t)a->count + 1) * sizeof(int64_t))) return 0;
    if (!a->pairs || !b->pairs) return a->pairs == b->pairs;
    return !memcmp(a->pairs, b->pairs, 2 * (size_t)a->n_merges * sizeof(int32_t));
}

// The place of a shard's words beside it, whether there is such a file: of x_train.bin it is
// x_words.safetensors, the name up to its last _ being the same. path: PATH_MAX bytes
static int words_beside(char *path, const char *shard) {
    const char *slash = strrchr(shard, '/'), *name = slash ? slash + 1 : shard;
    const char *end = strrchr(name, '_');
    size_t length = strlen(name);
    if (!end) end = name + length - (length > 4 && !strcmp(name + length - 4, ".bin") ? 4 : 0);
    int written = snprintf(path, PATH_MAX, "%.*s_words.safetensors", (int)(end - shard), shard);
    return written < PATH_MAX && !access(path, F_OK);
}

// ----------------------------------------------------------------------------
// options
//
// One table drives everything that is done with an option: the command line and its help, the
// metadata of a checkpoint, what a resumed run repeats and what it may change. A new option is a
// field of Options and a row of the table. What the table cannot say stands behind it: the defaults
// that depend on other options, and which options go together.

// The value of every option, and what is stored with them of where a run stands.
typedef struct {
    // data
    const char *data, *val, *format;
    // model
    const char *mixer;
    int64_t vocab, dim, layers, heads, kv_heads, head_dim, state_dim, seq, no_rope;
    double gamma_max;
    // training
    int64_t steps, batch, accum, warmup, decay_steps, seed;
    double lr, min_lr, beta1, beta2, eps, weight_decay, clip, dropout;
    // watching
    int64_t eval_every, eval_batches, sample_every, patience;
    const char *log;
    // files
    const char *out, *load, *resume;
    int64_t save_every, keep_every, overwrite, again, go_on;
    // instead of training
    int64_t generate, eval, top_k, window, samples;
    const char *prompt, *prompt_file, *prompts, *stop;
    double temperature, top_p;
    // computing
    int64_t plain, gpus, timeout;
    // state
    int64_t step, validated, since_best;
    double best_val, train_loss, previous_loss, grad_norm;
    const char *data_content, *val_content, *started_from;
} Options;

typedef enum {
    DATA,
    MODEL,
    TRAINING,
    WATCHING,
    FILES,
    INSTEAD,
    COMPUTING,
    STATE // in files, not on the command line
} Group;
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
    {DATA, "data", "data", TEXT, FIELD(data), "data/tinyshakespeare.txt", 0, 0,
     "text, token shard or example set, told by what it holds; 'part_*.bin': several as one"},
    {DATA, "val", "val", TEXT, FIELD(val), NULL, 0, 0,
     "validation data (else the last 10 % of --data)"},
    {DATA, "format", "data_format", TEXT, FIELD(format), "auto", 0, 0,
     "auto: told by what the file holds; bytes: any file as text"},
    {MODEL, "vocab", "vocab_size", INTEGER, FIELD(vocab), NULL, 1, MAX_VOCAB,
     "of shards (else their words', 50257, 128256), of examples (else from them)"},
    {MODEL, "mixer", "mixer", TEXT, FIELD(mixer), "sessa", 0, 0,
     "sessa, attention (no feedback) or mamba2"},
    {MODEL, "dim", "d_model", INTEGER, FIELD(dim), "128", 1, 1 << 16, "width D"},
    {MODEL, "layers", "n_layers", INTEGER, FIELD(layers), "5", 1, 4096, "layers L"},
    {MODEL, "heads", "n_heads", INTEGER, FIELD(heads), "4", 1, 1 << 16,
     "query heads H, a divisor of D; D/H is even"},
    {MODEL, "kv-heads", "n_kv_heads", INTEGER, FIELD(kv_heads), NULL, 1, 1 << 16,
     "key/value heads G, a divisor of H (else H)"},
    {MODEL, "head-dim", "mamba_head_dim", INTEGER, FIELD(head_dim), NULL, 1, 1 << 17,
     "mamba2: width w of a head, a divisor of 2D (else 64, or 2D)"},
    {MODEL, "state-dim", "mamba_state_dim", INTEGER, FIELD(state_dim), NULL, 1, 1024,
     "mamba2: state of a channel (else 64)"},
    {MODEL, "seq", "max_seq_len", INTEGER, FIELD(seq), "64", 1, 1 << 24,
     "tokens T of a training sequence"},
    {MODEL, "gamma-max", "gamma_max", NUMBER, FIELD(gamma_max), "0.999", 1e-6, 0.999999,
     "bound of the feedback gain"},
    {MODEL, "no-rope", "no_rope", FLAG, FIELD(no_rope), NULL, 1, 1,
     "attention without RoPE: the author's use_forward_rope=False"},
    {TRAINING, "steps", "steps", INTEGER, FIELD(steps), "2000", 0, 1e11, "updates of the weights"},
    {TRAINING, "batch", "batch", INTEGER, FIELD(batch), "12", 1, 1 << 20,
     "sequences of a micro-batch"},
    {TRAINING, "accum", "accum", INTEGER, FIELD(accum), "1", 1, 1 << 20, "micro-batches of a step"},
    {TRAINING, "lr", "lr", NUMBER, FIELD(lr), "3e-3", 0, 1e3, "learning rate"},
    {TRAINING, "min-lr", "min_lr", NUMBER, FIELD(min_lr), NULL, 0, 1e3,
     "learning rate at the schedule's end (else lr/10)"},
    {TRAINING, "warmup", "warmup", INTEGER, FIELD(warmup), NULL, 0, 1e12,
     "steps of linear warm-up (else 15 % of --decay-steps, up to 300)"},
    {TRAINING, "decay-steps", "decay_steps", INTEGER, FIELD(decay_steps), NULL, 1, 1e12,
     "length of the schedule (else --steps)"},
    {TRAINING, "beta1", "beta1", NUMBER, FIELD(beta1), "0.9", 0, 0.9999999, "AdamW"},
    {TRAINING, "beta2", "beta2", NUMBER, FIELD(beta2), "0.99", 0, 0.9999999, "AdamW"},
    {TRAINING, "eps", "eps", NUMBER, FIELD(eps), "1e-8", 1e-30, 1, "AdamW"},
    {TRAINING, "weight-decay", "weight_decay", NUMBER, FIELD(weight_decay), "0.1", 0, 1e3,
     "AdamW, on matrices"},
    {TRAINING, "clip", "clip", NUMBER, FIELD(clip), "1", 0, 1e30,
     "bound of the gradient's norm, 0: none"},
    {TRAINING, "dropout", "dropout", NUMBER, FIELD(dropout), "0", 0, 0.999, "probability"},
    {TRAINING, "seed", "seed", INTEGER, FIELD(seed), "1337", 0, 9e15,
     "of weights, data order, dropout and sampling"},
    {WATCHING, "eval-every", NULL, INTEGER, FIELD(eval_every), "250", 0, 1e12,
     "steps between validations, 0: only at the end"},
    {WATCHING, "eval-batches", NULL, INTEGER, FIELD(eval_batches), "20", 1, 1e9,
     "batches of a validation; the last takes all"},
    {WATCHING, "sample-every", NULL, INTEGER, FIELD(sample_every), "0", 0, 1e12,
     "steps between samples, 0: none"},
    {WATCHING, "patience", NULL, INTEGER, FIELD(patience), "0", 0, 1e9,
     "validations in a row without a lower loss that end the run, 0: none do"},
    {WATCHING, "log", NULL, TEXT, FIELD(log), NULL, 0, 0,
     "one JSON object a line, one line a step"},
    {FILES, "out", NULL, TEXT, FIELD(out), "sessa.safetensors", 0, 0,
     "the run, to resume; the best weights lie beside it"},
    {FILES, "save-every", NULL, INTEGER, FIELD(save_every), NULL, 1, 1e12,
     "steps between saves (else eval-every)"},
    {FILES, "keep-every", NULL, INTEGER, FIELD(keep_every), "0", 0, 1e12,
     "steps between snapshots of the run beside --out, which stay, 0: none"},
    {FILES, "overwrite", NULL, FLAG, FIELD(overwrite), "0", 0, 1,
     "replace what lies at --out, beside it and at --log"},
    {FILES, "again", NULL, FLAG, FIELD(again), "0", 0, 1,
     "replace a run of the same settings and data, as make train does"},
    {FILES, "continue", NULL, FLAG, FIELD(go_on), "0", 0, 1,
     "resume --out if it is there, else start: for jobs that are started again"},
    {FILES, "load", NULL, TEXT, FIELD(load), NULL, 0, 0,
     "start from, evaluate or generate with these weights"},
    {FILES, "resume", NULL, TEXT, FIELD(resume), NULL, 0, 0,
     "go on exactly where this run stopped"},
    {INSTEAD, "generate", NULL, INTEGER, FIELD(generate), NULL, 1, 1e9,
     "write that many tokens with --load"},
    {INSTEAD, "prompt", NULL, TEXT, FIELD(prompt), "", 0, 0, "text (or token ids) to go on from"},
    {INSTEAD, "prompt-file", NULL, TEXT, FIELD(prompt_file), NULL, 0, 0,
     "the same from a file, all of it; -: standard input"},
    {INSTEAD, "prompts", NULL, TEXT, FIELD(prompts), NULL, 0, 0,
     "a file of prompts, one a line, each of which is gone on from; -: standard input"},
    {INSTEAD, "samples", NULL, INTEGER, FIELD(samples), "1", 1, 1e9,
     "texts to write of each prompt; the i-th is the same of any number"},
    {INSTEAD, "stop", NULL, TEXT, FIELD(stop), NULL, 0, 0,
     "a text (or token ids) behind which a sample ends, if it comes"},
    {INSTEAD, "temperature", NULL, NUMBER, FIELD(temperature), "1", 0, 1e6,
     "0: always the likeliest token"},
    {INSTEAD, "top-k", NULL, INTEGER, FIELD(top_k), "0", 0, 1 << 24,
     "only the k likeliest tokens, 0: all"},
    {INSTEAD, "top-p", NULL, NUMBER, FIELD(top_p), "1", 1e-9, 1,
     "only the likeliest tokens of that total probability"},
    {INSTEAD, "window", NULL, INTEGER, FIELD(window), NULL, 0, 1 << 30,
     "positions remembered (else the model's seq), 0: all"},
    {INSTEAD, "eval", NULL, FLAG, FIELD(eval), "0", 0, 1,
     "validation loss of --load on the whole split"},
    {COMPUTING, "plain", NULL, FLAG, FIELD(plain), "0", 0, 1,
     "every layer as it stands first in the source, no faster way: to compare and to learn from"},
    {COMPUTING, "gpus", NULL, INTEGER, FIELD(gpus), "1", 1, 4096,
     "GPUs of this machine that train together, each in a process of its own"},
    {COMPUTING, "timeout", NULL, INTEGER, FIELD(timeout), "600", 1, 1e6,
     "seconds that they wait for one of them that does not come"},
    {STATE, "step", "step", INTEGER, FIELD(step), "0", 0, 1e11, "updates done"},
    {STATE, "best_val_loss", "best_val_loss", NUMBER, FIELD(best_val), "1e300", 0, 1e300,
     "lowest validation loss so far"},
    {STATE, "data_content", "data_content", TEXT, FIELD(data_content), "", 0, 0,
     "kind, size and hash of --data"},
    {STATE, "val_content", "val_content", TEXT, FIELD(val_content), "", 0, 0, "of --val"},
    {STATE, "started_from", "started_from", TEXT, FIELD(started_from), "", 0, 0,
     "kind, size and hash of --load"},
    {STATE, "validated", "validated", INTEGER, FIELD(validated), "-1", -1, 1e11,
     "step of the last validation, -1: not known"},
    {STATE, "since_best", "since_best", INTEGER, FIELD(since_best), NULL, 1, 1e11,
     "with --patience: validations since the lowest loss"},
    {STATE, "train_loss", "train_loss", NUMBER, FIELD(train_loss), "-1", -1, 1e300,
     "of the last step, -1: not known"},
    {STATE, "previous_loss", "previous_loss", NUMBER, FIELD(previous_loss), "-1", -1, 1e300,
     "of the step before it"},
    {STATE, "grad_norm", "grad_norm", NUMBER, FIELD(grad_norm), "-1", -1, 1e300,
     "of the last step, -1: not known"},
};
#undef FIELD
enum { N_OPTIONS = sizeof(option_table) / sizeof(option_table[0]) };

typedef struct { Options values; char given[N_OPTIONS]; } Settings;

// The defaults. Most stand in the table. An option without one there is not set, 0, or -1 where 0
// is a value, until the command line, a checkpoint or the data sets it; what is left then follows
// from other options, as settle_defaults says and no other place does.
static void clear_options(Options *o) {
    memset(o, 0, sizeof(*o));
    o->min_lr = -1;
    o->warmup = -1;
    o->window = -1;
}
static void settle_defaults(Options *o) {
    int mamba2 = find_mixer(o->mixer) == MAMBA2;
    if (!o->kv_heads) o->kv_heads = o->heads;
    if (mamba2 && !o->head_dim) o->head_dim = 2 * o->dim < 64 ? 2 * o->dim : 64;
    if (mamba2 && !o->state_dim) o->state_dim = 64;
    if (o->min_lr < 0) o->min_lr = o->lr / 10;
    if (!o->decay_steps) o->decay_steps = o->steps > 0 ? o->steps : 1;
    if (o->warmup < 0) o->warmup = o->decay_steps < 2000 ? o->decay_steps * 3 / 20 : 300;
    if (!o->save_every) o->save_every = o->eval_every;
    if (o->window < 0) o->window = o->seq;
    if (!o->resume) o->validated = 0;
    if (!o->patience) o->since_best = 0; // it is not counted, and not stored
}

// Sets one option from its text.
static int set_option(Options *o, const Option *option, const char *text, char *error) {
    void *field = (char *)o + option->offset;
    double low = option->low, high = option->high, number;
    int is_number = option->type == NUMBER;
    if (option->type == TEXT) {
        *(const char **)field = text;
        return 0;
    }
    if (is_number && !parse_number(text, &number) && number >= low && number <= high) {
        *(double *)field = number;
        return 0;
    }
    if (!is_number && !parse_integer(text, low, high, (int64_t *)field)) return 0;
    const char *kind = is_number ? "" : "whole ";
    return wrong(error, NULL, "--%s takes a %snumber from %.9g to %.9g, not '%s'", option->name,
                 kind, low, high, text);
}

// An option's value as text, a number with as many digits as give the same number again. NULL: not
// set.
static const char *option_text(char text[96], const Options *o, const Option *option) {
    const void *field = (const char *)o + option->offset;
    if (option->type == TEXT) return *(const char *const *)field;
    if (option->type == NUMBER) {
        double number = *(const double *)field;
        for (int digits = 6; digits <= 17; digits++) {
            snprintf(text, 96, "%.*g", digits, number);
            if (strtod(text, NULL) == number) break;
        }
        return text;
    }
    int64_t number = *(const int64_t *)field;
    if (!number && !option->fallback && option->low > 0) return NULL;
    snprintf(text, 96, "%lld", (long long)number);
    return text;
}

// The row of the table with this name, NULL if there is none, or none for the command line.
static const Option *find_option(const char *name, size_t length) {
    for (int i = 0; i < N_OPTIONS && option_table[i].group < STATE; i++) {
        const Option *option = &option_table[i];
        if (strlen(option->name) == length && !strncmp(option->name, name, length)) return option;
    }
    return NULL;
}
// Whether it stands on the command line.
static int is_given(const Settings *s, const char *name) {
    return s->given[find_option(name, strlen(name)) - option_table];
}

// Whether the option's name is one of those in a list of words, " like this ".
static int is_among(const Option *option, const char *list) {
    char word[24];
    snprintf(word, sizeof(word), " %s ", option->name);
    return strstr(list, word) != NULL;
}

// Whether a run's file may lack it: it is not always set, or came later.
static int may_lack(const Option *option) {
    return is_among(option,
                    " val format validated train_loss previous_loss grad_norm started_from "
                    "since_best no-rope ");
}

// What may be given at a resume and differ from what the run stores: the data's content is compared
// instead.
static int may_differ_at_resume(const Option *option) {
    return option->group == DATA || is_among(option, " steps lr min-lr decay-steps ");
}

static const char VERSION[] = "1.0";

static void print_help(const char *program) {
    static const char *titles[] = {
        "data", "model", "training", "watching", "files", "instead of training", "computing"};
    static const char *types[] = {"TEXT", "N", "X", ""};
    printf("Trains Sessa models, evaluates them and generates with them.\n\n"
           "  %s --data my.txt --dim 256 --layers 6 --seq 256 --out my.safetensors\n"
           "  %s --load my.best.safetensors --generate 500 --prompt \"Once upon\" "
           "--temperature 0.8\n",
           program, program);
    for (int i = 0; i < N_OPTIONS && option_table[i].group < STATE; i++) {
        const Option *o = &option_table[i];
        if (i == 0 || o->group != o[-1].group) printf("\n%s\n", titles[o->group]);
        printf("  --%-13s %-5s %s", o->name, types[o->type], o->help);
        if (o->fallback && *o->fallback && o->type != FLAG) printf(" [%s]", o->fallback);
        printf("\n");
    }
    printf("\n--help prints this, --version what was built.\n"
           "Threads: OMP_NUM_THREADS. Exit code 0: done, 1: failed, 2: wrong option, 130: stopped "
           "by Ctrl-C\nor a signal, saved; a second Ctrl-C ends it at once.\n");
}

// What was built, by which compiler.
static void print_version(const Backend *backend) {
    const char *number = sizeof(real) == sizeof(float) ? "float32" : "float64";
    const char *threads = "one thread";
#ifdef _OPENMP
    threads = "OpenMP";
#endif
#ifdef __clang__
    const char *compiler = __VERSION__; // names itself
#else
    const char *compiler = "GCC " __VERSION__;
#endif
    printf("train_sessa %s (%s, %s, %s, %s)\n", VERSION, backend->name, number, threads, compiler);
}

// Reads the command line: --name value or --name=value. HELP or TELL_VERSION if that was asked for.
enum { HELP = 1, TELL_VERSION = 2 };
static int parse_options(Settings *s, int argc, char **argv, char *error) {
    memset(s, 0, sizeof(*s));
    clear_options(&s->values);
    for (int i = 0; i < N_OPTIONS; i++) {
        const char *fallback = option_table[i].fallback;
        if (fallback) set_option(&s->values, &option_table[i], fallback, error);
    }
    for (int i = 1; i < argc; i++) {
        const char *word = argv[i], *equals = strchr(word, '=');
        if (!strcmp(word, "--help") || !strcmp(word, "-h")) return HELP;
        if (!strcmp(word, "--version")) return TELL_VERSION;
        size_t length = equals ? (size_t)(equals - word) : strlen(word);
        const Option *option = strncmp(word, "--", 2) ? NULL : find_option(word + 2, length - 2);
        if (!option) return wrong(error, NULL, "unknown option '%s' (--help lists them)", word);
        const char *value = "1"; // of a flag
        if (equals) value = equals + 1;
        else if (option->type != FLAG) value = ++i < argc ? argv[i] : "";
        if (!*value && strcmp(option->name, "prompt"))
            return wrong(error, NULL, "--%s takes a value", option->name);
        if (s->given[option - option_table])
            return wrong(error, NULL, "--%s stands there twice", option->name);
        if (set_option(&s->values, option, value, error)) return WRONG_OPTION;
        s->given[option - option_table] = 1;
    }
    return 0;
}

// Whether as many validations as --patience says were no better than one before.
static int is_out_of_patience(const Options *o) {
    return o->patience && o->since_best >= o->patience;
}
// Whether no step of the run follows.
static int is_last(const Options *o) { return o->step == o->steps || is_out_of_patience(o); }

// Whether the model is trained; else it generates or is evaluated.
static int is_training(const Options *o) { return !o->generate && !o->eval; }

// Whether the option changes anything in what the program was asked to do.
static int is_of_use(const Options *o, const Option *option) {
    Group group = option->group;
    if (group == COMPUTING) return !o->generate || !is_among(option, " gpus timeout ");
    if (o->generate) return group == MODEL || group == INSTEAD || is_among(option, " load seed ");
    if (o->eval) return group == MODEL || group == DATA || is_among(option, " load eval batch ");
    if (group != INSTEAD) return 1;
    return o->sample_every && is_among(option, " temperature top-k top-p ");
}

// An option that would change nothing is refused: whoever wrote it expects something of it.
static int check_use(const Settings *s, char *error) {
    const Options *o = &s->values;
    for (int i = 0; i < N_OPTIONS; i++) {
        const Option *option = &option_table[i];
        if (!s->given[i] || is_of_use(o, option)) continue;
        const char *when = "without --generate";
        if (is_among(option, " temperature top-k top-p "))
            when = "without --sample-every or --generate";
        if (o->eval) when = "with --eval";
        if (o->generate) when = "with --generate";
        return wrong(error, NULL, "--%s changes nothing %s", option->name, when);
    }
    if (is_given(s, "gamma-max") && strcmp(o->mixer, "sessa"))
        return wrong(error, NULL, "--gamma-max changes nothing with --mixer %s", o->mixer);
    return 0;
}

// Whether the options of the command line go together, and with what was built.
static int check_options(const Settings *s, const Backend *backend, char *error) {
    const Options *o = &s->values;
    int ranks = backend->ranks;
    if (o->resume && (o->load || !is_training(o)))
        return wrong(error, NULL, "--resume goes with neither --load, --generate nor --eval");
    if (o->generate && o->eval)
        return wrong(error, NULL, "--generate and --eval exclude each other");
    if (!is_training(o) && !o->load)
        return wrong(error, NULL, "--generate and --eval take the weights from --load FILE");
    if (check_use(s, error)) return WRONG_OPTION;
    if (ranks == 1 && o->gpus > 1)
        return wrong(error, NULL, "--gpus %lld: this build trains on %s", (long long)o->gpus,
                     strcmp(backend->name, "CPU") ? "one GPU" : "the CPU, in one process");
    if (ranks == 1 && is_given(s, "timeout"))
        return wrong(error, NULL, "--timeout changes nothing where one process trains");
    if (o->go_on && (o->resume || o->again))
        return wrong(error, NULL, "--continue goes with neither --resume nor --again");
    if (o->again && (o->resume || o->overwrite))
        return wrong(error, NULL, "--again goes with neither --resume nor --overwrite");
    if (o->patience && !o->eval_every)
        return wrong(error, NULL, "--patience takes validations: --eval-every 0 makes none");
    if (is_given(s, "prompt") + !!o->prompt_file + !!o->prompts > 1)
        return wrong(error, NULL, "--prompt, --prompt-file and --prompts exclude each other");
    if (strcmp(o->format, "auto") && strcmp(o->format, "bytes"))
        return wrong(error, NULL, "--format takes auto or bytes, not '%s'", o->format);
    return 0;
}

// ----------------------------------------------------------------------------
// a run: options, data, model and where training stands
//
// One struct holds all that the program knows of what it was asked to do, whether that is to train,
// to evaluate or to generate; nothing of it is global. The sections after this one fill it in: from
// checkpoints, from data, and with the places where files may be written.

typedef struct {
    const Backend *backend;
    Settings settings;
    Options stored;           // of a resumed run: the options as its file has them
    Config config;            // the model that the options describe

    // files
    char best_path[PATH_MAX]; // beside --out: the weights with the lowest validation loss
    Place out_place, best_place, log_place;
    int replaces_best;        // another run's best weights lie at best_path, and may go
    unsigned char *old_best;  // of a run resumed under another name: its best weights so far,
    size_t n_old_best;        // until the first save
    Safetensors file;         // of --load or --resume; options may point into it
    char started_from[96];    // kind, size and hash of --load

    // data
    Dataset train, val;       // val is unused when it is the rest of train
    const Dataset *val_set;   // the one of them that is validated on
    int64_t train_end, val_begin, val_end; // tokens or examples of the two splits
    char val_note[ERROR_SIZE]; // what --eval says of a text that the model was not validated on
    unsigned char vocab[256]; // the bytes of a text model's tokens
    int vocab_bytes;          // their number, 0: tokens are ids
    Words words;              // what the ids stand for, where that is known
    int32_t *order;           // example sets: this epoch's permutation
    int64_t order_epoch;

    // model
    unsigned char *prompt_text; // of --prompt-file or --prompts
    const char **prompts;     // what is gone on from
    int n_prompts;
    Model *model;
    int model_T;              // its longest sequence: of a batch, or what generation remembers
    Table table;              // of the parameters
    int *inputs, *targets;    // (accum·batch, seq)
    char *hits;               // (batch, seq)

    int in_place;             // the line of a step stands on the terminal, the cursor on it

    // several ranks
    double *rows;             // (ranks,MEETING): what they tell each other
    int stopped;              // a signal has asked one of them for an end, and all know it
} Run;

// The model that the options describe.
static int config_of(Config *c, const Options *o, char *error) {
    Config config = {.vocab_size = (int)o->vocab,
                     .d_model = (int)o->dim,
                     .n_layers = (int)o->layers,
                     .n_heads = (int)o->heads,
                     .n_kv_heads = (int)o->kv_heads,
                     .max_seq_len = (int)o->seq,
                     .gamma_max = o->gamma_max,
                     .mixer = find_mixer(o->mixer),
                     .head_dim = (int)o->head_dim,
                     .state_dim = (int)o->state_dim,
                     .no_rope = (int)o->no_rope};
    *c = config;
    if (c->mixer < 0)
        return wrong(error, NULL, "--mixer takes sessa, attention or mamba2, not '%s'", o->mixer);
    if (c->mixer == MAMBA2 && 2 * o->dim % o->head_dim)
        return wrong(error, NULL, "--head-dim %d does not divide twice --dim %d", c->head_dim,
                     c->d_model);
    if (c->mixer != MAMBA2 && o->head_dim + o->state_dim)
        return wrong(error, NULL, "--head-dim and --state-dim are for mamba2");
    if (c->mixer == MAMBA2 && c->no_rope)
        return wrong(error, NULL, "--no-rope is for sessa and attention: mamba2 has none");
    if (o->dim % o->heads)
        return wrong(error, NULL, "--heads %d does not divide --dim %d", c->n_heads, c->d_model);
    if (o->dim / o->heads % 2)
        return wrong(error, NULL, "--dim / --heads must be even, not %d", c->d_model / c->n_heads);
    if (o->heads % o->kv_heads)
        return wrong(error, NULL, "--kv-heads %d does not divide --heads %d", c->n_kv_heads,
                     c->n_heads);
    int most = INT_MAX / 64; // tokens of a step
    if (!o->generate && o->batch * o->accum > most / o->seq)
        return wrong(error, NULL, "--batch times --accum times --seq must not exceed %d tokens",
                     most);
    return 0;
}

// ----------------------------------------------------------------------------
// a run's checkpoints
//
// A checkpoint is a safetensors file: the parameters, and in RESUMABLE ones AdamW's moments, by the
// names of the parameter table; as metadata the options, by the table of options; of a model of
// bytes or of words its vocabulary. A resumed run goes on with the same bits: what it needs beside
// the file is its data, whose hash is compared.

typedef enum { WEIGHTS, RESUMABLE, SNAPSHOT } Content; // a snapshot says that it is one, and stays

// The options that a file stores, as its metadata; each as text that reads back as the same value.
// Returns their number. Weights alone do not say how many steps the run has: it may go on without a
// change of them.
static int metadata_of(const Run *run, Content content, Meta *meta, char texts[][96], char *error) {
    static char format[] = "format", pt[] = "pt"; // readers of the transformers family ask for it
    static char snapshot[] = "snapshot", yes[] = "1";
    Meta first = {format, pt}, second = {snapshot, yes};
    int n = 0;
    meta[n++] = first;
    if (content == SNAPSHOT) meta[n++] = second;
    for (int i = 0; i < N_OPTIONS; i++) {
        const Option *option = &option_table[i];
        int stored = option->key && (content != WEIGHTS || !is_among(option, " steps "));
        const char *text = stored ? option_text(texts[i], &run->settings.values, option) : NULL;
        Options copy;
        if (!text) continue;
        if (set_option(&copy, option, text, error)) return FAILED; // what is written can be read
        Meta row = {(char *)option->key, (char *)text};
        meta[n++] = row;
    }
    return n;
}

// What a checkpoint is made of, while it is written.
typedef struct {
    FileTensor *tensors;
    int n;
    char (*names)[96];
    float *numbers; // of a build in float64: rounded, block by block
} CheckpointFile;

// Adds the tensors of a block of the model. Their numbers are written from where they are, unless
// they must be rounded first.
static int add_block(CheckpointFile *file, const Run *run, Block block, const char *path,
                     char *error) {
    const Table *table = &run->table;
    const real *values = run->backend->read(run->model, block);
    const unsigned char *data = (const unsigned char *)values;
    const char *what = block == PARAMS ? "a weight" : "a moment";
    if (!isfinite(norm(values, table->count)))
        return fail(error, path, "not written: %s is not finite", what);
    if (sizeof(real) != sizeof(float)) {
        float *rounded = file->numbers + (int)block * table->count;
        for (int64_t k = 0; k < table->count; k++) rounded[k] = (float)values[k];
        data = (const unsigned char *)rounded;
    }
    for (int i = 0; i < table->n; i++) {
        const Tensor *row = &table->rows[i];
        char *name = file->names[file->n];
        snprintf(name, 96, "%s%s", block_prefixes[block], row->name);
        FileTensor *t = &file->tensors[file->n++];
        t->name = name;
        strcpy(t->dtype, "F32");
        t->n_dims = row->n_dims;
        memcpy(t->shape, row->shape, sizeof(row->shape));
        t->count = row->count;
        t->size = (size_t)row->count * 4;
        t->data = data + row->offset * 4;
    }
    return 0;
}

// Adds the vocabulary of a model of bytes or of words: up to VOCABULARY tensors.
enum { VOCABULARY = 3 };
static void add_vocabulary(CheckpointFile *file, const Run *run) {
    const Words *w = &run->words;
    int64_t size = run->vocab_bytes, ends = w->count + 1, n = w->n_merges;
    FileTensor t = {(char *)"tokenizer.bytes", "U8", 1, {size}, size, (size_t)size, run->vocab};
    if (size) file->tensors[file->n++] = t;
    if (!w->count) return;
    FileTensor offsets = {(char *)"tokenizer.offsets", "I64", 1, {ends}, ends, 8 * (size_t)ends,
                          (const unsigned char *)w->offsets};
    FileTensor merges = {(char *)"tokenizer.merges", "I32", 2, {n, 2}, 2 * n, 8 * (size_t)n,
                         (const unsigned char *)w->pairs};
    FileTensor tokens = {(char *)"tokenizer.tokens", "U8", 1, {w->size}, w->size, (size_t)w->size,
                         w->bytes};
    file->tensors[file->n++] = offsets;
    if (w->pairs) file->tensors[file->n++] = merges;
    file->tensors[file->n++] = tokens;
}

// Writes the weights, and but for WEIGHTS all that a run needs to go on, to a place. trial, total: see
// safetensors_write.
static int save_checkpoint(Run *run, Place *place, Content content, int trial, uint64_t *total,
                           char *error) {
    int n_blocks = content == WEIGHTS ? 1 : 3;
    for (int block = EXP_AVG; run->backend->rank && block < n_blocks; block++)
        run->backend->read(run->model, (Block)block); // rank 0 writes them
    if (run->backend->rank) return 0;
    size_t n_tensors = (size_t)(n_blocks * run->table.n);
    size_t count = (size_t)n_blocks * (size_t)run->table.count;
    CheckpointFile file;
    file.n = 0;
    file.tensors = (FileTensor *)calloc(n_tensors + VOCABULARY, sizeof(FileTensor));
    file.names = (char (*)[96])malloc(n_tensors * 96);
    file.numbers = (float *)grow(NULL, (sizeof(real) == sizeof(float) ? 1 : count) * sizeof(float));
    Meta meta[N_OPTIONS + 2];
    char texts[N_OPTIONS][96];
    int result = 0, n_meta = 0;
    if (!file.tensors || !file.names || !file.numbers)
        result = fail(error, place->path, "cannot be written: out of memory");
    for (int block = 0; !result && block < n_blocks; block++)
        result = add_block(&file, run, (Block)block, place->path, error);
    if (!result) {
        add_vocabulary(&file, run);
        n_meta = metadata_of(run, content, meta, texts, error);
        if (n_meta < 0) result = FAILED;
    }
    if (!result)
        result = safetensors_write(place, file.tensors, file.n, meta, n_meta, trial, total, error);
    free(file.tensors);
    free(file.names);
    free(file.numbers);
    return result;
}

// The best weights beside the run's file.
static int save_best(Run *run, char *error) {
    if (save_checkpoint(run, &run->best_place, WEIGHTS, 0, NULL, error)) return FAILED;
    run->n_old_best = run->replaces_best = 0;
    return 0;
}

// The run. One resumed under another name takes the best weights so far with it; one that replaces
// another run, as it was told to, takes that one's best weights away: they would not be its own.
static int save_run(Run *run, char *error) {
    if (run->n_old_best) {
        if (write_whole(&run->best_place, run->old_best, run->n_old_best, error)) return FAILED;
        run->n_old_best = run->replaces_best = 0;
    }
    if (save_checkpoint(run, &run->out_place, RESUMABLE, 0, NULL, error)) return FAILED;
    Place *best = &run->best_place;
    if (run->replaces_best && best->there && !check_ours(best, error))
        best->there = unlink(best->target) != 0;
    run->replaces_best = 0;
    return 0;
}

// The tensor of the run's file that is a row of the table in that block. NULL and the line if there
// is none of this shape, of numbers that can be read.
static const FileTensor *find_row(const Run *run, const Tensor *row, const char *path, Block block,
                                  char *error) {
    char name[96];
    snprintf(name, sizeof(name), "%s%s", block_prefixes[block], row->name);
    const FileTensor *t = safetensors_find(&run->file, name);
    if (!t) {
        fail(error, path, "tensor %s is missing", name);
        return NULL;
    }
    size_t shape_size = sizeof(int64_t) * (size_t)row->n_dims;
    int known = !strcmp(t->dtype, "F32") || !strcmp(t->dtype, "F16") || !strcmp(t->dtype, "BF16");
    if (known && t->n_dims == row->n_dims && !memcmp(t->shape, row->shape, shape_size)) return t;
    fail(error, path, "tensor %s has another dtype or shape than the model's", name);
    return NULL;
}

// Whether the run's file has all tensors of a block: known before memory is taken for the model.
static int check_block(const Run *run, const char *path, Block block, char *error) {
    for (int i = 0; i < run->table.n; i++)
        if (!find_row(run, &run->table.rows[i], path, block, error)) return FAILED;
    return 0;
}

// What is wrong with a number of a block, NULL: nothing.
static const char *wrong_number(Block block, float number) {
    if (!isfinite(number)) return "a number that is not finite";
    if (block == EXP_AVG_SQ && number < 0) return "a square below 0";
    return NULL;
}

// Reads a block from the run's file into the model. check_block has been there.
static int load_block(Run *run, const char *path, Block block, char *error) {
    real *values = run->backend->read(run->model, block);
    for (int i = 0; i < run->table.n; i++) {
        const Tensor *row = &run->table.rows[i];
        const FileTensor *t = find_row(run, row, path, block, error);
        if (!t) return FAILED;
        for (int64_t k = 0; k < row->count; k++) {
            float number = float_at(t, k);
            const char *problem = wrong_number(block, number);
            if (problem) return fail(error, path, "tensor %s holds %s", t->name, problem);
            values[row->offset + k] = (real)number;
        }
    }
    run->backend->write(run->model, block);
    return 0;
}

// Takes one option from a checkpoint. What was given on the command line as well must agree, but
// for --seq of a model and, of a run, --steps, the schedule's rates and length (print_changes tells
// what changes), and --data and --val, whose content is compared later.
static int option_from_file(Run *run, const Option *option, const char *path, int resume,
                            char *error) {
    Settings *s = &run->settings;
    char given[96], stored[96], problem[ERROR_SIZE];
    const char *text = safetensors_meta(&run->file, option->key);
    if (!text) {
        int of_mamba2 = !strncmp(option->key, "mamba_", 6);
        if (s->given[option - option_table] && is_among(option, " no-rope "))
            return wrong(error, NULL, "--no-rope differs from %s, which has RoPE", path);
        if (may_lack(option) || (of_mamba2 && strcmp(s->values.mixer, "mamba2"))) return 0;
        return fail(error, path, "metadata %s is missing", option->key);
    }
    if (set_option(&run->stored, option, text, problem))
        return fail(error, path, "metadata %s is no valid value", option->key);
    if (!s->given[option - option_table]) return set_option(&s->values, option, text, error);
    if (resume ? may_differ_at_resume(option) : is_among(option, " seq ")) return 0;
    const char *ours = option_text(given, &s->values, option);
    const char *theirs = option_text(stored, &run->stored, option);
    if (!strcmp(ours, theirs)) return 0;
    return wrong(error, NULL, "--%s %s differs from %s, which has %s", option->name, ours, path,
                 theirs);
}

// Takes the vocabulary from a checkpoint; one of ids has none.
static int vocabulary_from_file(Run *run, const char *path, char *error) {
    char seen[256] = {0};
    const FileTensor *bytes = safetensors_find(&run->file, "tokenizer.bytes");
    if (words_read(&run->words, &run->file, path, error)) return FAILED;
    if (run->words.count && (bytes || run->words.count != run->settings.values.vocab))
        return fail(error, path, "tokenizer.offsets is not that of vocab_size words alone");
    if (!bytes) return 0;
    int valid = !strcmp(bytes->dtype, "U8") && bytes->n_dims == 1;
    valid = valid && bytes->count == run->settings.values.vocab && bytes->count <= 256;
    for (int64_t i = 0; valid && i < bytes->count; i++) valid = !seen[bytes->data[i]]++;
    if (!valid) return fail(error, path, "tokenizer.bytes is not vocab_size distinct bytes");
    memcpy(run->vocab, bytes->data, (size_t)bytes->count);
    run->vocab_bytes = (int)bytes->count;
    return 0;
}

// Takes the options from a checkpoint, those of the model or, to resume, all that are stored, and
// the vocabulary.
static int settings_from_file(Run *run, const char *path, int resume, char *error) {
    const Options *o = &run->settings.values;
    char problem[ERROR_SIZE];
    for (int i = 0; i < N_OPTIONS; i++) {
        const Option *option = &option_table[i];
        if (!option->key || (!resume && option->group != MODEL)) continue;
        int result = option_from_file(run, option, path, resume, error);
        if (result) return result;
    }
    if (find_mixer(o->mixer) < 0)
        return fail(error, path, "its mixer '%.40s' is unknown", o->mixer);
    if (config_of(&run->config, o, problem)) return fail(error, path, "%.200s", problem);
    return vocabulary_from_file(run, path, error);
}

// Reads the file of --load or --resume; what a run was started from is stored with it.
static int read_checkpoint(Run *run, const char *path, char *error) {
    static const char no_best[] =
        "%.400s (a run has no best weights before its first validation: its own file can be "
        "loaded)";
    unsigned char *bytes;
    size_t size;
    if (file_read(path, &bytes, &size, error)) {
        char problem[ERROR_SIZE];
        memcpy(problem, error, sizeof(problem));
        if (access(path, F_OK) && strstr(path, ".best.")) fail(error, NULL, no_best, problem);
        return FAILED;
    }
    unsigned long long hash = (unsigned long long)hash_bytes(bytes, size);
    snprintf(run->started_from, sizeof(run->started_from), "checkpoint, %zu bytes, hash %016llx",
             size, hash);
    if (run->settings.values.load) run->settings.values.started_from = run->started_from;
    return safetensors_parse(&run->file, bytes, size, path, error);
}

// The checkpoint that is gone on with or started from, NULL: none; and how many blocks of the model
// it gives.
static const char *checkpoint_path(const Options *o) { return o->resume ? o->resume : o->load; }
static int checkpoint_blocks(const Options *o) { return o->resume ? 3 : o->load ? 1 : 0; }

// A run that goes on where a snapshot of it was taken has a file of its own.
static int check_no_snapshot(const Run *run, char *error) {
    const Options *o = &run->settings.values;
    int in_place = o->resume && !strcmp(o->resume, o->out) && !o->overwrite;
    if (!in_place || !safetensors_meta(&run->file, "snapshot")) return 0;
    return wrong(error, o->resume, "a snapshot, which stays: --out names where the run goes on, "
                                   "--overwrite goes on in it");
}

// Opens that file and takes from it what it says of the model or the run.
static int open_checkpoint(Run *run, char *error) {
    const Options *o = &run->settings.values;
    const char *path = checkpoint_path(o);
    if (!path) return 0;
    if (read_checkpoint(run, path, error)) return FAILED;
    int is_run = safetensors_find(&run->file, "exp_avg.wte.weight") != NULL;
    int has_weights = safetensors_find(&run->file, "wte.weight") != NULL;
    if (o->resume && has_weights && !is_run)
        return fail(error, path, "it holds weights alone, no run that could be resumed; --load "
                                 "starts from them");
    if (check_no_snapshot(run, error)) return WRONG_OPTION;
    return settings_from_file(run, path, o->resume != NULL, error);
}

// ----------------------------------------------------------------------------
// a run's data
//
// Which sets are read, where training ends and validation begins, which tokens there are, how long
// a sequence is, and in which order the sequences come: sequence_place is the one to read.

// Reads one data file into its place.
static int read_set(Run *run, Dataset *set, const char *path, char *error) {
    return dataset_read(set, path, !strcmp(run->settings.values.format, "bytes"), error);
}

// What --eval without --val evaluates: of the text that the model was trained on its validation
// part, which may be a file of its own, or the text that it was validated on; of another text the
// last tenth, and the result says so.
static int find_validation(Run *run, char *error) {
    Options *o = &run->settings.values;
    const char *trained_on = safetensors_meta(&run->file, "data_content");
    const char *validated_on = safetensors_meta(&run->file, "val_content");
    const char *val = safetensors_meta(&run->file, "val");
    char problem[ERROR_SIZE];
    static const char note[] = " (the last tenth of %.200s: %s)";
    if (!trained_on) { // another program's weights, or an earlier version's
        format_line(run->val_note, NULL, note, o->data,
                    "the weights do not say what they were trained on");
        return 0;
    }
    int has_file = validated_on && *validated_on;
    if (has_file && !strcmp(run->train.content, validated_on)) {
        run->val_begin = 0;
        return 0;
    }
    if (strcmp(run->train.content, trained_on)) {
        format_line(run->val_note, NULL, note, o->data,
                    "not the text that the model was trained on");
        return 0;
    }
    if (!has_file) return 0;
    o->val = val;
    if (val && !read_set(run, &run->val, val, problem) && !strcmp(run->val.content, validated_on))
        return 0;
    return fail(error, o->data,
                "the model was trained on all of it and validated on another file, %.200s: give "
                "that as --val",
                val ? val : "not named");
}

// The vocabulary of texts: their distinct bytes, sorted.
static void vocabulary_of_texts(Run *run, Dataset **sets, int n_sets) {
    char seen[256] = {0};
    for (int i = 0; i < n_sets; i++)
        for (int64_t k = 0; k < sets[i]->count; k++) seen[sets[i]->bytes[k]] = 1;
    for (int byte = 0; byte < 256; byte++)
        if (seen[byte]) run->vocab[run->vocab_bytes++] = (unsigned char)byte;
    run->settings.values.vocab = run->vocab_bytes;
}

// Takes the words from beside the shards, unless a checkpoint has said what ids mean: then they
// must be the same.
static int find_words(Run *run, Dataset **sets, const char **paths, int n_sets, char *error) {
    Options *o = &run->settings.values;
    char path[PATH_MAX];
    int of_ids = (o->load || o->resume) && !run->words.count;
    for (int i = 0; i < n_sets && !of_ids; i++) {
        Words words;
        if (sets[i]->kind != DATA_SHARD || !words_beside(path, paths[i])) continue;
        if (words_read_file(&words, path, error)) return FAILED;
        int first = !run->words.count, same = first || same_words(&run->words, &words);
        if (first) run->words = words;
        else words_free(&words);
        if (!same)
            return fail(error, paths[i], "its words, %.200s, are not those of the model", path);
        if (first && o->vocab && o->vocab != run->words.count)
            return wrong(error, NULL, "--vocab %d is not the number of words in %.200s, %d",
                         (int)o->vocab, path, run->words.count);
        o->vocab = run->words.count;
    }
    return 0;
}

// Settles the vocabulary, unless a checkpoint has, from the sets that are there, and makes texts
// token ids.
static int settle_vocabulary(Run *run, Dataset **sets, const char **paths, int n_sets,
                             char *error) {
    Options *o = &run->settings.values;
    int loaded = o->load || o->resume, text = sets[0]->kind == DATA_TEXT;
    if (text && !loaded) {
        if (is_given(&run->settings, "vocab"))
            return wrong(error, NULL,
                         "--vocab is for token shards and example sets: the vocabulary of a text "
                         "is its bytes");
        vocabulary_of_texts(run, sets, n_sets);
    }
    if (text && !run->vocab_bytes)
        return fail(error, paths[0], "it is text, but the model's tokens are %s",
                    run->words.count ? "words: data/bpe.py writes shards" : "ids");
    if (!text && run->vocab_bytes)
        return fail(error, paths[0], "it holds token ids, but the model's tokens are bytes");
    int result = find_words(run, sets, paths, n_sets, error);
    if (result) return result;
    int max_id = -1, hint = 0;
    for (int i = 0; i < n_sets; i++) {
        if (text && dataset_encode(sets[i], run->vocab, run->vocab_bytes, paths[i], error))
            return FAILED;
        if (sets[i]->max_id > max_id) max_id = sets[i]->max_id;
        if (sets[i]->vocab_hint > hint) hint = sets[i]->vocab_hint;
    }
    if (!o->vocab) o->vocab = hint > max_id ? hint : max_id + 1;
    if (max_id < o->vocab) return 0;
    return fail(error, paths[0], "token id %d does not fit a vocabulary of %d", max_id,
                (int)o->vocab);
}

// Reads --data and --val. To evaluate --val, --data is not needed. A resumed run must find what it
// read.
static int read_data(Run *run, char *error) {
    Options *o = &run->settings.values;
    Dataset *sets[] = {&run->train, &run->val};
    const char *paths[] = {o->data, o->val}, **contents[] = {&o->data_content, &o->val_content};
    int val_alone = o->eval && o->val;
    for (int i = val_alone; i < (o->val ? 2 : 1); i++) {
        if (read_set(run, sets[i], paths[i], error)) return FAILED;
        const char *now = sets[i]->content, *before = *contents[i];
        if (o->resume && strcmp(before, now))
            return fail(error, paths[i], "%s; the run being resumed read %.90s", now,
                        *before ? before : "none");
        *contents[i] = now;
    }
    return 0;
}

// Settles what is trained on and what is validated on: two files, or the last tenth of one.
static int settle_splits(Run *run, char *error) {
    Options *o = &run->settings.values;
    run->train_end = o->val ? run->train.count : run->train.count * 9 / 10;
    run->val_begin = run->train_end;
    if (o->eval && !o->val && find_validation(run, error)) return FAILED;
    if (o->val) run->val_begin = 0;
    run->val_set = o->val ? &run->val : &run->train;
    run->val_end = run->val_set->count;
    return 0;
}

// Sequences are as long as the examples; of both splits there is one at least.
static int check_lengths(Run *run, Dataset **sets, const char **paths, int n_sets, char *error) {
    static const char too_short[] = "%s takes %lld of its tokens or examples, there are %lld";
    Options *o = &run->settings.values;
    int examples = sets[0]->kind == DATA_EXAMPLES;
    if (examples && !is_given(&run->settings, "seq")) o->seq = sets[0]->width;
    for (int i = 0; examples && i < n_sets; i++) {
        int width = sets[i]->width;
        if (width != o->seq)
            return fail(error, paths[i], "it holds sequences of %d tokens, not of %d", width,
                        (int)o->seq);
    }
    long long least = examples ? 1 : o->seq + 1, n_train = run->train_end;
    long long n_val = run->val_end - run->val_begin;
    if (!o->eval && n_train < least)
        return fail(error, o->data, too_short, "training", least, n_train);
    if (n_val < least) return fail(error, paths[n_sets - 1], too_short, "validation", least, n_val);
    return 0;
}

// Opens --data and --val, settles the splits, the vocabulary and the length of a sequence.
static int open_data(Run *run, char *error) {
    Options *o = &run->settings.values;
    if (read_data(run, error) || settle_splits(run, error)) return FAILED;
    Dataset *sets[2] = {NULL, NULL}; // those that are there
    const char *paths[2];
    int n_sets = 0;
    if (run->train.count) {
        paths[n_sets] = o->data;
        sets[n_sets++] = &run->train;
    }
    if (o->val) {
        paths[n_sets] = o->val;
        sets[n_sets++] = &run->val;
    }
    if (n_sets == 2 && run->val.kind != run->train.kind)
        return fail(error, NULL, "%.200s and %.200s are of different kinds", o->data, o->val);
    int result = settle_vocabulary(run, sets, paths, n_sets, error);
    return result ? result : check_lengths(run, sets, paths, n_sets, error);
}

// The place of the run's i-th training sequence. In a stream of tokens it is the fraction u + i/φ
// (mod 1) of all places, u drawn from the seed, φ the golden ratio: any place is as likely as any
// other, and those of a run, or of a batch, spread as evenly as can be, where independent draws
// leave a fifth of the text unread after an epoch and a half (2000 steps on TinyShakespeare end
// 0.006 to 0.014 nats lower). Of examples it is the next of a fresh permutation. It follows from
// seed and i alone, so that a resumed run needs to know nothing but its step.
static int64_t sequence_place(Run *run, int64_t i) {
    uint64_t seed = (uint64_t)run->settings.values.seed, state = splitmix64(seed) ^ splitmix64(1);
    int64_t n = run->train_end, epoch = i / n;
    if (run->train.kind != DATA_EXAMPLES) {
        state += (uint64_t)i * 0x9E3779B97F4A7C15u; // in units of 2^-64
        return (int64_t)((double)(state >> 11) * 0x1p-53 * (double)(n - run->settings.values.seq));
    }
    if (run->order_epoch != epoch) {
        state = splitmix64(seed) ^ splitmix64((uint64_t)epoch);
        for (int64_t k = 0; k < n; k++) { // Fisher and Yates
            int64_t j = (int64_t)(random_u64(&state) % (uint64_t)(k + 1));
            run->order[k] = run->order[j];
            run->order[j] = (int32_t)k;
        }
        run->order_epoch = epoch;
    }
    return run->order[i % n];
}

// ----------------------------------------------------------------------------
// a run's ranks
//
// Several processes that train one model do the same steps, each on its rows, and so take every
// decision together: on sums over the ranks, added in their order, which are the same numbers
// everywhere. Rank 0 alone writes, locks and prints. Of one process all this does nothing.

// Makes n numbers their sums over the ranks, on every one of them, and tells it whether any has been
// asked for an end. MEETING: the most numbers.
enum { MEETING = N_OPTIONS + 100 };
static void add_up(Run *run, double *numbers, int n) {
    int rank = run->backend->rank, ranks = run->backend->ranks, row = n + 1;
    if (ranks == 1) return;
    memcpy(run->rows + rank * row, numbers, sizeof(double) * (size_t)n);
    run->rows[rank * row + n] = interrupted != 0;
    run->backend->gather(run->rows, row);
    memset(numbers, 0, sizeof(double) * (size_t)n);
    for (int r = 0; r < ranks; r++) {
        for (int i = 0; i < n; i++) numbers[i] += run->rows[r * row + i];
        run->stopped |= run->rows[r * row + n] > 0;
    }
}

// Makes them those of rank 0.
static void take_first(Run *run, double *numbers, int n) {
    if (run->backend->rank) memset(numbers, 0, sizeof(double) * (size_t)n);
    add_up(run, numbers, n);
}

// Whether a signal has asked for an end: of several ranks, when they last met.
static int is_stopped(const Run *run) {
    return run->backend->ranks > 1 ? run->stopped : interrupted != 0;
}

// The result of all: that of the first rank that failed, the one to tell why. The others' lines are
// taken away.
static int agree(Run *run, int result, char *error) {
    int rank = run->backend->rank, ranks = run->backend->ranks, first = 0;
    char problem[ERROR_SIZE];
    if (ranks == 1) return result;
    run->rows[rank] = result;
    run->backend->gather(run->rows, 1);
    while (first < ranks - 1 && !run->rows[first]) first++;
    if (first != rank) *error = 0;
    memcpy(problem, error, sizeof(problem));
    if (*error && rank) format_line(error, NULL, "rank %d: %.480s", rank, problem);
    return (int)run->rows[first];
}

// Whether this rank was given what rank 0 was: options, and the content of data and checkpoint. How
// a path reads there is its own affair, but not whether there is one; the lowest loss follows from
// rank 0's files.
static int check_same(Run *run, char *error) {
    static const char paths[] = " data val log out load resume ";
    Options *o = &run->settings.values;
    double ours[N_OPTIONS + 1], first[N_OPTIONS + 1];
    char text[96];
    if (run->backend->ranks == 1) return 0;
    for (int i = 0; i <= N_OPTIONS; i++) {
        const char *value = i < N_OPTIONS ? option_text(text, o, &option_table[i]) : run->started_from;
        if (value && i < N_OPTIONS && is_among(&option_table[i], paths)) value = "given";
        if (!value) value = "";
        first[i] = ours[i] = (double)(hash_bytes((const unsigned char *)value, strlen(value)) >> 12);
    }
    take_first(run, first, N_OPTIONS + 1);
    take_first(run, &o->best_val, 1);
    if (first[N_OPTIONS] != ours[N_OPTIONS] && !*run->started_from)
        return fail(error, NULL, "rank 0 goes on with a checkpoint; here none is found");
    if (first[N_OPTIONS] != ours[N_OPTIONS])
        return fail(error, NULL, "the checkpoint, %s, is not that of rank 0", run->started_from);
    for (int i = 0; i < N_OPTIONS; i++) {
        const Option *option = &option_table[i];
        if (first[i] == ours[i] || is_among(option, " best_val_loss ")) continue;
        const char *dashes = option->group < STATE ? "--" : "", *value = option_text(text, o, option);
        const char *theirs = !is_among(option, paths) ? "another" : value ? "none" : "one";
        return fail(error, NULL, "%s%s %.200s: rank 0 has %s", dashes, option->name,
                    value ? value : "is not set", theirs);
    }
    return 0;
}

// ----------------------------------------------------------------------------
// validation
//
// The mean loss over the validation split, and of example sets the share of the targets that the
// model would have chosen, also by how far back lies what they ask for.

// What a validation finds: the mean loss in nats and, of example sets, the share of the targets
// that are the likeliest token; of those that say their lag also by lag, from 2^k to 2^(k+1) - 1.
// NAN: no such target.
enum { LAG_BINS = 31 };
typedef struct {
    double loss, accuracy, by_lag[LAG_BINS];
    double bits_per_byte; // of text whose tokens' bytes are known, else NAN
    int64_t count; // targets that were seen
    int broken;    // a signal broke it off: it says nothing
} Score;

// What evaluate counts: targets, those that are the likeliest token, both by lag, and the bytes of
// text that the targets are.
typedef struct { int64_t targets, hits, of_bin[LAG_BINS], hits_of[LAG_BINS], bytes; } Tally;

// How many bytes of text a token is, 0 where that is not known: words without merges may leave out
// or add some.
static int64_t bytes_of_token(const Run *run, int id) {
    if (run->words.pairs) return word_length(&run->words, id);
    return run->vocab_bytes > 0;
}

// Counts the n targets of the batch that was evaluated last; lags (n), or NULL.
static void count_targets(Tally *tally, const Run *run, const int32_t *lags, int n) {
    int examples = run->val_set->kind == DATA_EXAMPLES;
    for (int i = 0; i < n; i++) {
        if (run->targets[i] < 0) continue;
        tally->targets++;
        tally->bytes += bytes_of_token(run, run->targets[i]);
        tally->hits += examples && run->hits[i];
        int lag = lags ? lags[i] : 0, bin = 0;
        if (!lag) continue;
        while (lag >> (bin + 1)) bin++;
        tally->of_bin[bin]++;
        tally->hits_of[bin] += run->hits[i];
    }
}

// Of nothing it is NAN.
static double fraction(int64_t part, int64_t whole) {
    return whole ? (double)part / (double)whole : NAN;
}

// The sum of the losses of B windows from `first` on, and counts their targets.
static double evaluate_windows(Run *run, Tally *tally, int64_t first, int B) {
    const Dataset *set = run->val_set;
    int T = (int)run->settings.values.seq, examples = set->kind == DATA_EXAMPLES;
    for (int b = 0; b < B; b++) {
        int64_t at = run->val_begin + (first + b) * (examples ? 1 : T);
        copy_sequence(run->inputs + b * T, run->targets + b * T, set, at, T);
    }
    run->model->loss_alone = 1;
    run->backend->forward(run->model, run->inputs, run->targets, B, T, no_dropout);
    run->model->loss_alone = 0;
    double sum = run->backend->loss(run->model);
    if (examples) run->backend->hits(run->model, run->hits);
    const int32_t *lags = set->lags ? set->lags + (run->val_begin + first) * T : NULL;
    count_targets(tally, run, lags, B * T);
    return sum;
}

// Adds up what the ranks found.
static void add_scores(Run *run, double *sum, int *broken, Tally *tally) {
    enum { COUNTS = sizeof(Tally) / sizeof(int64_t) };
    double numbers[2 + COUNTS] = {*sum, (double)*broken};
    int64_t counts[COUNTS];
    memcpy(counts, tally, sizeof(counts));
    for (int i = 0; i < COUNTS; i++) numbers[2 + i] = (double)counts[i];
    add_up(run, numbers, 2 + COUNTS);
    *sum = numbers[0];
    *broken = numbers[1] > 0;
    for (int i = 0; i < COUNTS; i++) counts[i] = (int64_t)numbers[2 + i];
    memcpy(tally, counts, sizeof(counts));
}

// Over consecutive windows of the validation split: all of them, or max_batches evenly spaced
// batches, of which each rank takes its rows. A signal that asks for an end breaks it off, unless it
// `lasts`.
static Score evaluate(Run *run, int64_t max_batches, int lasts) {
    const Options *o = &run->settings.values;
    int T = (int)o->seq, examples = run->val_set->kind == DATA_EXAMPLES;
    int64_t length = run->val_end - run->val_begin, windows = examples ? length : (length - 1) / T;
    int64_t batches = (windows + o->batch - 1) / o->batch, rows = o->batch / run->backend->ranks;
    int64_t taken = max_batches && max_batches < batches ? max_batches : batches;
    double sum = 0;
    Tally tally;
    Score score;
    memset(&tally, 0, sizeof(tally));
    memset(&score, 0, sizeof(score));
    for (int64_t i = 0; i < taken && !score.broken; i++) {
        // batches·i/taken, where the product may overflow
        int64_t batch = batches / taken * i + batches % taken * i / taken;
        int64_t first = batch * o->batch + run->backend->rank * rows;
        int B = (int)(windows - first < rows ? windows - first : rows);
        if (B > 0) sum += evaluate_windows(run, &tally, first, B); // of the last batch some have none
        score.broken = interrupted && !lasts && i + 1 < taken;
    }
    add_scores(run, &sum, &score.broken, &tally);
    score.count = tally.targets;
    score.loss = tally.targets ? sum / (double)tally.targets : NAN;
    score.bits_per_byte = tally.bytes ? sum / (log(2) * (double)tally.bytes) : NAN;
    score.accuracy = examples ? fraction(tally.hits, tally.targets) : NAN;
    for (int k = 0; k < LAG_BINS; k++)
        score.by_lag[k] = fraction(tally.hits_of[k], tally.of_bin[k]);
    return score;
}

// "name": number as a member of a JSON object, which knows no NaN and no infinity: null in their
// place.
static void print_member(FILE *out, const char *name, double number, int digits) {
    if (isfinite(number)) fprintf(out, ", \"%s\": %.*g", name, digits, number);
    else fprintf(out, ", \"%s\": null", name);
}

// The score as members of a JSON object.
static void print_score(FILE *out, const Score *score) {
    int bins = 0;
    print_member(out, "val_loss", score->loss, 9);
    if (!isnan(score->bits_per_byte))
        print_member(out, "val_bits_per_byte", score->bits_per_byte, 9);
    if (!isnan(score->accuracy)) print_member(out, "val_accuracy", score->accuracy, 9);
    for (int k = 0; k < LAG_BINS; k++) {
        if (isnan(score->by_lag[k])) continue;
        const char *before = bins++ ? ", " : ", \"accuracy_by_lag\": {";
        fprintf(out, "%s\"%d\": %.9g", before, 1 << k, score->by_lag[k]);
    }
    if (bins) fprintf(out, "}");
}

// ----------------------------------------------------------------------------
// what a run writes: its places, and whose files lie there
//
// A run replaces what it wrote itself, and nothing else unless it is told to. Here stands how it
// tells: a checkpoint by the settings and the hash of the data in its metadata, a log by the losses
// in its lines.

// Prints a word so that a shell reads it as one, and a terminal is not commanded by it.
static void print_quoted(const char *word) {
    int plain = *word != 0, hostile = 0;
    for (const char *c = word; *c; c++) {
        plain = plain && (isalnum((unsigned char)*c) || strchr("-_./=:,+@%", *c));
        unsigned char byte = (unsigned char)c[0], next = (unsigned char)c[1];
        int c1 = byte == 0xC2 && next >= 0x80 && next < 0xA0; // U+0080 to U+009F
        hostile = hostile || c1 || byte < 32 || byte == 127;
    }
    hostile = hostile || !utf8_valid((const unsigned char *)word, strlen(word));
    if (!plain) fputs(hostile ? "$'" : "'", stdout);
    for (const char *c = word; *c; c++) {
        unsigned char byte = (unsigned char)*c;
        if (hostile && (byte < 32 || byte > 126)) printf("\\%03o", byte);
        else if (byte == '\'') fputs(hostile ? "\\'" : "'\\''", stdout);
        else if (byte == '\\' && hostile) fputs("\\\\", stdout);
        else putchar(byte);
    }
    if (!plain) putchar('\'');
}

// Whether a file with something in it lies there: 1 or 0, FAILED where that cannot be told.
static int lies_there(const char *path, char *error) {
    struct stat info;
    if (!path) return 0;
    if (!stat(path, &info)) return S_ISREG(info.st_mode) && info.st_size > 0;
    return errno == ENOENT || errno == ENOTDIR ? 0 : fail(error, path, "%s", strerror(errno));
}

// Whether two paths name one file, or would: the same name in the same folder, however that is
// reached.
static int same_file(const char *a, const char *b) {
    struct stat s, t;
    char one[PATH_MAX], other[PATH_MAX], problem[ERROR_SIZE];
    if (!a || !b) return 0;
    int a_there = !stat(a, &s), b_there = !stat(b, &t);
    if (a_there || b_there) return a_there && b_there && same_place(&s, &t);
    if (resolve(a, one, problem) || resolve(b, other, problem)) return 0;
    char *one_name = strrchr(one, '/'), *other_name = strrchr(other, '/');
    if (strcmp(one_name, other_name)) return 0;
    one_name[1] = other_name[1] = 0;
    return !stat(one, &s) && !stat(other, &t) && same_place(&s, &t);
}

// A place beside a run's file: x.best.safetensors beside x.safetensors.
static int place_beside(char place[PATH_MAX], const char *out, const char *word, char *error) {
    int stem = (int)strlen(out);
    if (stem > 12 && !strcmp(out + stem - 12, ".safetensors")) stem -= 12;
    if (snprintf(place, PATH_MAX, "%.*s.%s.safetensors", stem, out, word) < PATH_MAX) return 0;
    return fail(error, out, "cannot be written: the path is too long");
}
static int best_beside(char best[PATH_MAX], const char *out, char *error) {
    return place_beside(best, out, "best", error);
}

// The place of the snapshot of a step: x.step500.safetensors.
static int snapshot_beside(char path[PATH_MAX], const char *out, int64_t step, char *error) {
    char word[32];
    snprintf(word, sizeof(word), "step%lld", (long long)step);
    return place_beside(path, out, word, error);
}

// Whether path names a lock or a temporary file of the place.
static int is_servant(const char *path, const Place *place) {
    char target[PATH_MAX], problem[ERROR_SIZE];
    size_t length = strlen(place->target);
    if (!path || resolve(path, target, problem) || strncmp(target, place->target, length)) return 0;
    return !strcmp(target + length, ".lock") || !strncmp(target + length, ".tmp.", 5);
}

// Whether a file is the one that standard output or error goes to: its name, NULL if it is neither.
static const char *standard_stream(const char *path) {
    static const char *const names[] = {NULL, "output", "error"};
    struct stat file, standard;
    if (!path || stat(path, &file)) return NULL;
    for (int fd = 1; fd <= 2; fd++)
        if (!fstat(fd, &standard) && S_ISREG(standard.st_mode) && same_place(&file, &standard))
            return names[fd];
    return NULL;
}

// Whether two paths share a file, where each may be a pattern of data.
static int share_file(const char *a, const char *b) {
    glob_t parts;
    int shared = 0, expanded = a && expand(&parts, a);
    const char *other = expanded ? b : a;
    if (!expanded) expanded = b && expand(&parts, b);
    if (!expanded) return same_file(a, b);
    for (size_t i = 0; i < parts.gl_pathc; i++)
        shared = shared || share_file(other, parts.gl_pathv[i]);
    globfree(&parts);
    return shared;
}

// Two of a run's files that are one file would destroy each other; so would what is printed.
static int check_distinct(const Run *run, char *error) {
    enum { RESUME = 3, OUT = 4, N_PATHS = 7 };
    const Options *o = &run->settings.values;
    const char *names[] = {"--data", "--val", "--load", "--resume",
                           "--out", "the best weights", "--log"};
    const char *paths[] = {o->data, o->val, o->load, o->resume, o->out, run->best_path, o->log};
    for (int i = 0; i < N_PATHS; i++) {
        for (int j = 0; j < i; j++) {
            int resumed = i == OUT && j == RESUME; // a run goes on in its own file
            if (resumed || !share_file(paths[j], paths[i])) continue;
            return wrong(error, NULL, "%s and %s are one file: %.200s", names[j], names[i],
                         paths[i]);
        }
        if (is_servant(paths[i], &run->out_place) || is_servant(paths[i], &run->best_place))
            return wrong(error, NULL,
                         "%s, %.200s: names that end in .lock or .tmp.* are the run's own",
                         names[i], paths[i]);
        const char *stream = i >= OUT ? standard_stream(paths[i]) : NULL;
        if (stream)
            return wrong(error, NULL, "%s and standard %s are one file: %.200s", names[i], stream,
                         paths[i]);
    }
    return 0;
}

// Settles where the run's file, its best weights and its log lie, and locks these places.
static int claim_places(Run *run, char *error) {
    const Options *o = &run->settings.values;
    Place *out = &run->out_place, *best = &run->best_place, *log = &run->log_place;
    struct stat info;
    char folder[PATH_MAX];
    int stream = o->log && !stat(o->log, &info) && !S_ISREG(info.st_mode);
    // who may read the run, or the one that goes on, may read what is written
    const char *like = !stat(o->out, &info) ? o->out : o->resume;
    if (best_beside(run->best_path, o->out, error)) return FAILED;
    if (settle(out, o->out, like, error) || settle(best, run->best_path, like, error))
        return FAILED;
    int result = check_distinct(run, error);
    if (result) return result;
    if (take_lock(out, error) || take_lock(best, error)) return FAILED;
    if (!o->log || stream) return 0;
    if (settle(log, o->log, NULL, error)) return FAILED;
    folder_of(folder, log->target);
    if (access(folder, W_OK)) return 0; // a log that lies there needs no file beside it
    return take_lock(log, error);
}

// What lies at path and how one goes on with it, for the line that refuses to replace it. text:
// ERROR_SIZE bytes
static void describe(char *text, const char *path) {
    Safetensors file;
    char problem[ERROR_SIZE], state[96] = "";
    if (safetensors_read_header(&file, path, problem)) memset(&file, 0, sizeof(file)); // it is none
    const char *step = safetensors_meta(&file, "step");
    const char *loss = safetensors_meta(&file, "best_val_loss");
    double best = loss && strlen(loss) < 40 ? strtod(loss, NULL) : 1e300;
    if (step && best < 1e300)
        snprintf(state, sizeof(state), " of step %.20s, validation loss %.4f", step, best);
    else if (step)
        snprintf(state, sizeof(state), " of step %.20s", step);
    if (safetensors_find(&file, "exp_avg.wte.weight"))
        format_line(text, NULL, "a run%s; --resume %.150s goes on with it,", state, path);
    else if (safetensors_find(&file, "wte.weight"))
        format_line(text, NULL, "weights%s; --load %.150s starts from them,", state, path);
    else
        format_line(text, NULL, "no checkpoint;");
    safetensors_free(&file);
}

// Whether a checkpoint stores this run's settings and data. going_on: as far as a resumed run may
// not change them, and what an earlier version did not store counts as equal.
static int is_same_run(const Run *run, const Safetensors *file, int going_on) {
    char text[96];
    int weights_alone = !safetensors_find(file, "exp_avg.wte.weight");
    if (!safetensors_find(file, "wte.weight")) return 0;
    for (int i = 0; i < N_OPTIONS; i++) {
        const Option *option = &option_table[i];
        int content = is_among(option, " data_content val_content started_from ");
        if (!content && option->group != MODEL && option->group != TRAINING) continue;
        int any_steps = weights_alone || safetensors_meta(file, "snapshot");
        if (any_steps && is_among(option, " steps ")) continue;
        if (going_on && may_differ_at_resume(option)) continue;
        const char *theirs = safetensors_meta(file, option->key);
        const char *ours = option_text(text, &run->settings.values, option);
        if (going_on && !theirs && option->group != MODEL) continue; // by an earlier version
        int equal = theirs && ours ? !strcmp(theirs, ours) : !theirs == !ours;
        if (!equal) return 0;
    }
    return 1;
}

// What a log holds.
typedef struct {
    long before, upto;  // where the lines of the steps before a certain one end, and its own
    long size;
    int64_t last;       // the last step up to that one
    int is_log;         // all its lines are a log's
    int own;            // it is this run's
    int validated;      // the step's line has a validation
    int failed;         // it could not be read
} LogScan;

// Reads the next line of a log that is not empty, with its step, which must be above `last`, and
// its loss: 1. 0: the end, torn maybe by what killed the run. -1: it is no log's line.
static int log_next(FILE *file, char line[4096], long long last, long long *step, char loss[32]) {
    do {
        if (!fgets(line, 4096, file)) return 0;
    } while (*line == '\n');
    size_t length = strlen(line);
    int whole = length > 0 && line[length - 1] == '\n';
    if (!whole && last) return 0;
    int fields = sscanf(line, "{\"step\": %lld, \"train_loss\": %30[^,}]", step, loss);
    return whole && fields == 2 && *step > last ? 1 : -1;
}

// Reads a log, of which `step` was the last that the run's file knows, with this loss and that of
// the step before, -1: not known. It is the run's if it is empty, if the step's line has that loss,
// if it ends with the line before, which has its loss, or if it begins right behind the step and
// says so (previous_loss).
static LogScan log_scan(FILE *file, int64_t step, double loss, double before) {
    char line[4096], expected[32], earlier[32], previous[64], stands[32];
    LogScan scan;
    long long logged = 0, first = 0, last = 0;
    int found;
    memset(&scan, 0, sizeof(scan));
    snprintf(expected, sizeof(expected), "%.9g", loss);
    snprintf(earlier, sizeof(earlier), "%.9g", before);
    snprintf(previous, sizeof(previous), "\"previous_loss\": %s}", loss < 0 ? "null" : expected);
    while ((found = log_next(file, line, last, &logged, stands)) > 0) {
        last = logged;
        if (!first) first = logged;
        if (logged == first && logged - 1 == step) scan.own = strstr(line, previous) != NULL;
        if (logged > step) continue;
        scan.last = logged;
        scan.upto = ftell(file);
        if (logged < step) scan.before = scan.upto;
        scan.own = logged == step - 1 && before >= 0 && !strcmp(stands, earlier);
        if (logged < step) continue;
        scan.own = loss < 0 || !strcmp(stands, expected);
        scan.validated = strstr(line, "\"val_loss\"") != NULL;
    }
    scan.is_log = found == 0;
    scan.failed = ferror(file) || fseek(file, 0, SEEK_END) || (scan.size = ftell(file)) < 0;
    // an earlier version's run: nothing is cut off unproved
    if (loss < 0 && last > step && first <= step) scan.own = 0;
    if (scan.last == step - 1 && last > step) scan.own = 0;
    if (!scan.size) scan.own = 1;
    return scan;
}

// A new run begins no log where one lies.
static int check_log_free(const Options *o, char *error) {
    if (o->resume || o->overwrite) return 0;
    int there = lies_there(o->log, error);
    if (there <= 0) return there;
    FILE *file = fopen(o->log, "r");
    if (!file) return fail(error, o->log, "%s", strerror(errno));
    LogScan scan = log_scan(file, INT64_MAX, -1, -1);
    fclose(file);
    if (!scan.is_log)
        return wrong(error, NULL,
                     "%.250s is there, and is no log; --log names another place, --overwrite "
                     "replaces it",
                     o->log);
    return wrong(error, NULL,
                 "%.250s is there: a log up to step %lld; --resume goes on with its run, --log "
                 "names another place, --overwrite replaces it",
                 o->log, (long long)scan.last);
}

// Whether what lies at path may be replaced by --again: a run of the same settings and data, or its
// weights.
static int is_again(const Run *run, const char *path) {
    Safetensors file;
    char problem[ERROR_SIZE];
    if (!run->settings.values.again || safetensors_read_header(&file, path, problem)) return 0;
    int same = is_same_run(run, &file, 0);
    safetensors_free(&file);
    return same;
}

// A run replaces what it wrote or resumed and nothing else, unless it is told to.
static int check_free(Run *run, char *error) {
    const Options *o = &run->settings.values;
    const char *paths[] = {o->out, run->best_path};
    int own = o->resume && same_file(o->out, o->resume), there[2];
    int result = check_log_free(o, error);
    if (result) return result;
    run->replaces_best = !own && o->overwrite;
    if (own || o->overwrite) return 0;
    for (int i = 0; i < 2; i++) {
        char what[ERROR_SIZE];
        there[i] = lies_there(paths[i], error);
        if (there[i] < 0) return FAILED;
        if (!there[i] || is_again(run, paths[i])) continue;
        describe(what, paths[i]);
        return wrong(error, NULL,
                     "%.150s is there: %.250s --out names another place, --overwrite replaces it",
                     paths[i], what);
    }
    for (int i = 0; i < 2; i++) {
        if (!there[i]) continue;
        print_quoted(paths[i]);
        printf(" of the same settings and data is replaced\n");
    }
    return 0;
}

// Whether a snapshot is taken at the step where the run is.
static int is_kept(const Options *o) {
    return o->keep_every && o->step > 0 && o->step % o->keep_every == 0;
}

// Whether what lies at path may give way to a snapshot: one that this run, or the same run before,
// wrote at that step.
static int is_own_snapshot(const Run *run, const char *path) {
    const Options *o = &run->settings.values;
    Safetensors file;
    char problem[ERROR_SIZE];
    if (o->overwrite) return 1;
    if (!(o->resume || o->again) || safetensors_read_header(&file, path, problem)) return 0;
    int own = safetensors_meta(&file, "snapshot") && is_same_run(run, &file, 0);
    safetensors_free(&file);
    return own;
}

// The snapshot of the step where the run is. What came to its place meanwhile stays.
static int save_snapshot(Run *run, char *error) {
    const Options *o = &run->settings.values;
    Place place;
    char path[PATH_MAX], problem[ERROR_SIZE];
    if (run->backend->rank) return save_checkpoint(run, NULL, SNAPSHOT, 0, NULL, error); // no files
    if (snapshot_beside(path, o->out, o->step, error)) return FAILED;
    if (lies_there(path, problem) && !is_own_snapshot(run, path))
        return fail(error, path, "another file was put there meanwhile, which stays");
    if (settle(&place, path, o->out, error)) return FAILED;
    return save_checkpoint(run, &place, SNAPSHOT, 0, NULL, error);
}

// The step in the name of a snapshot beside `out`, a path without folders; 0 if it is none. *behind:
// what follows in the name.
static int64_t snapshot_step(const char *name, const char *out, const char **behind) {
    char expected[PATH_MAX], problem[ERROR_SIZE];
    const char *digits = NULL;
    for (const char *at = name; (at = strstr(at, ".step")) != NULL;) digits = at += 5;
    if (!digits || *digits < '1' || *digits > '9') return 0;
    int64_t step = strtoll(digits, NULL, 10);
    if (snapshot_beside(expected, out, step, problem)) return 0;
    size_t length = strlen(expected);
    *behind = name + length;
    return strncmp(name, expected, length) ? 0 : step;
}

// What lies at a place where a snapshot will be written: 0 if it may be replaced.
static int check_snapshot(const Run *run, const char *path, char *error) {
    const Options *o = &run->settings.values;
    const char *inputs[] = {o->data, o->val, o->load, o->resume, o->log};
    char what[ERROR_SIZE];
    for (int i = 0; i < 5; i++)
        if (share_file(inputs[i], path))
            return wrong(error, path, "the snapshot would replace a file that the run is given");
    if (is_own_snapshot(run, path)) {
        print_quoted(path);
        printf(" is replaced when its step comes\n");
        return 0;
    }
    describe(what, path);
    return wrong(error, NULL,
                 "%.150s is there: %.250s --out names another place, --overwrite replaces it", path,
                 what);
}

// Looks where snapshots of the steps to come will lie, and removes what killed runs left of theirs.
static int check_snapshots(const Run *run, char *error) {
    const Options *o = &run->settings.values;
    char folder[PATH_MAX], path[PATH_MAX];
    const char *slash = strrchr(o->out, '/'), *out = slash ? slash + 1 : o->out, *behind = "";
    int length = slash ? (int)(slash + 1 - o->out) : 1;
    snprintf(folder, sizeof(folder), "%.*s", length, slash ? o->out : ".");
    DIR *dir = o->keep_every ? opendir(folder) : NULL;
    int result = 0;
    if (!dir) return 0;
    for (struct dirent *entry; !result && (entry = readdir(dir)) != NULL;) {
        int64_t step = snapshot_step(entry->d_name, out, &behind);
        if (step && run->out_place.lock >= 0 && is_temporary_name(behind, ""))
            unlinkat(dirfd(dir), entry->d_name, 0);
        if (step <= o->step || step > o->steps || step % o->keep_every || *behind) continue;
        if (!snapshot_beside(path, o->out, step, error)) result = check_snapshot(run, path, error);
    }
    closedir(dir);
    return result;
}

// Whether the best weights at path are the resumed run's: 1 or 0, FAILED with the line where they
// are damaged. They are its own if they have its settings and data and, of a run that knows a
// lowest loss, none above it. A lower one is taken over: the run was killed before it knew.
static int is_own_best(Run *run, const char *path, char *error) {
    Options *o = &run->settings.values;
    unsigned char *bytes;
    size_t size;
    Safetensors file;
    char problem[ERROR_SIZE];
    if (header_read(path, &bytes, &size, error)) return FAILED;
    if (safetensors_parse(&file, bytes, size, path, problem)) {
        if (o->overwrite) return 0;
        return fail(error, NULL, "%.400s; move it away, or --overwrite replaces it", problem);
    }
    const char *loss = safetensors_meta(&file, "best_val_loss");
    int compared = loss && o->best_val < 1e300;
    double theirs = compared ? strtod(loss, NULL) : o->best_val;
    int own = is_same_run(run, &file, 1) && !(theirs > o->best_val);
    if (own) o->best_val = theirs;
    safetensors_free(&file);
    return own;
}

// Of a resumed run: the best weights so far lie beside its file. Where they do not, the lowest loss
// counts anew, and that is said; where another run's lie there, they are not touched. One that goes
// on under another name takes its best weights with it.
static int check_best(Run *run, char *error) {
    Options *o = &run->settings.values;
    char path[PATH_MAX], line[ERROR_SIZE];
    if (best_beside(path, o->resume, error)) return FAILED;
    int there = lies_there(path, error), none_so_far = o->best_val >= 1e300;
    if (there < 0) return FAILED;
    if (!there && !none_so_far) {
        format_line(line, NULL,
                    "%.200s is not there: the lowest validation loss, %.4f, counts anew", path,
                    o->best_val);
        printf("%s\n", line);
        o->best_val = 1e300;
    }
    if (!there) return 0;
    int own = is_own_best(run, path, error), in_place = same_file(path, run->best_path);
    if (own == FAILED) return FAILED;
    if (!own && !o->overwrite)
        return wrong(error, path, "not the best weights of the resumed run: move it away, or "
                                  "--overwrite replaces it");
    if (!own) {
        o->best_val = 1e300;
        if (in_place) run->replaces_best = 1;
        return 0;
    }
    if (none_so_far || in_place) return 0;
    return file_read(path, &run->old_best, &run->n_old_best, error);
}

static void print_zeros(const char *path, const Dataset *set) {
    if (set->zeros) print_warning(path, "a text of which %lld bytes are 0", (long long)set->zeros);
}

// Tells what a resumed run does otherwise than its file says, and that a schedule has come to its
// end.
static void print_changes(const Run *run) {
    const Options *o = &run->settings.values;
    char ours[96], theirs[96];
    if (!o->resume) return;
    for (int i = 0; i < N_OPTIONS; i++) {
        const Option *option = &option_table[i];
        if (option->group != TRAINING || !run->settings.given[i] || is_among(option, " steps "))
            continue;
        const char *now = option_text(ours, o, option);
        const char *before = option_text(theirs, &run->stored, option);
        if (!strcmp(now, before)) continue;
        printf("from step %lld on: --%s %s in place of %s\n", (long long)o->step + 1, option->name,
               now, before);
    }
    int64_t first = o->step > o->decay_steps ? o->step : o->decay_steps;
    if (o->steps > first)
        printf("the schedule ends at step %lld: the steps after it are made with the lowest rate, "
               "%g; --decay-steps %lld stretches it\n",
               (long long)o->decay_steps, o->min_lr, (long long)o->steps);
}

// ----------------------------------------------------------------------------
// generation
//
// A token at a time: the model gives logits, a token is drawn from them, and the forward pass goes
// on with it. What is worth reading is sample_token, and how make_tokens goes on when the positions
// are full.

typedef struct { double weight; int id; } Candidate;
static int comes_first(Candidate a, Candidate b) {
    return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
}

// Lets the candidate at i of a heap of n, the first of each subtree at its top, sink to its place.
static void sift_down(Candidate *heap, int n, int i) {
    Candidate c = heap[i];
    for (int child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && comes_first(heap[child + 1], heap[child])) child++;
        if (!comes_first(heap[child], c)) break;
        heap[i] = heap[child];
    }
    heap[i] = c;
}

static Candidate turned(Candidate c) {
    Candidate back = {-c.weight, -c.id};
    return back;
}

// Brings the `most` likeliest of V candidates to the front, in no order: a heap of the likeliest so far with
// the last of them at its top, by turned signs.
static void select_likeliest(Candidate *candidates, int V, int most) {
    for (int i = 0; i < most; i++) candidates[i] = turned(candidates[i]);
    for (int i = most / 2; i >= 0; i--) sift_down(candidates, most, i);
    for (int i = most; i < V; i++) {
        Candidate c = turned(candidates[i]);
        if (!comes_first(candidates[0], c)) continue;
        candidates[0] = c;
        sift_down(candidates, most, 0);
    }
    for (int i = 0; i < most; i++) candidates[i] = turned(candidates[i]);
}

// Brings those of V candidates to the front that the fewest likeliest which reach top_p can be among. The
// others are below half of what 1 - top_p leaves each of V: all of them together leave more than top_p.
// Returns how many there are.
static int drop_unlikely(Candidate *candidates, int V, double top_p, double total) {
    double least = (1 - top_p) * total / (2 * (double)V);
    int n = 0;
    for (int i = 0; i < V; i++) {
        candidates[n] = candidates[i];
        n += candidates[i].weight >= least;
    }
    return n;
}

// Puts the likeliest of n candidates, `most` (0: as few as reach top_p), in order from the end. Returns the
// number of those that are kept; *total, the sum of all weights, becomes theirs.
static int keep_likeliest(Candidate *candidates, int n, int most, double top_p, double *total) {
    int ordered = 0, kept = 0;
    double sum = 0;
    for (int i = n / 2; i >= 0; i--) sift_down(candidates, n, i);
    while (ordered < (most ? most : n) && (most || sum < top_p * *total)) {
        int last = n - 1 - ordered++;
        Candidate first = candidates[0];
        candidates[0] = candidates[last];
        sift_down(candidates, last, 0);
        candidates[last] = first;
        sum += first.weight;
    }
    if (most) *total = sum;
    for (sum = 0; kept < ordered && (kept == 0 || sum < top_p * *total); kept++)
        sum += candidates[n - 1 - kept].weight;
    *total = sum;
    return kept;
}

// e^x of x from -700 to 0, as exp_real: relative error below 1e-15 + 2e-16·|x|
static inline double exp_weight(double x) {
    int32_t n = (int32_t)(x * 1.4426950408889634 - 0.5); // the nearest integer
    double r = x - (double)n * 0.6931471805599453, power = 1;
    UNROLL
    for (int i = 12; i > 0; i--) power = 1 + power * (r * (1.0 / i));
    int64_t exponent = (int64_t)(n + 1023) << 52;
    double scale;
    memcpy(&scale, &exponent, sizeof(scale));
    return power * scale;
}

// Draws a token from softmax(logits/temperature), cut to the top_k likeliest (0: all) and then to
// the fewest likeliest whose probabilities reach top_p. candidates: scratch (V). -1 if a logit is
// not finite.
static int sample_token(const real *logits, Candidate *candidates, int V, double temperature,
                        int64_t top_k, double top_p, uint64_t *random) {
    enum { PIECE = 64 };
    int best = 0, finite = 1, n = V, kept = V, most = top_k < V ? (int)top_k : 0;
    double total = 0, weights[PIECE], least = -700 * temperature; // e^-700 is no weight beside 1
    real largest = logits[0], tops[PIECE];
    for (int i = 0; i < PIECE; i++) tops[i] = logits[0];
    for (int i = 0; i < V; i++) finite &= isfinite(logits[i]) != 0;
    if (!finite) return -1;
    for (int from = 0; from < V; from += PIECE) {
        int size = V - from < PIECE ? V - from : PIECE;
        for (int i = 0; i < size; i++) tops[i] = logits[from + i] > tops[i] ? logits[from + i] : tops[i];
    }
    for (int i = 0; i < PIECE; i++) largest = tops[i] > largest ? tops[i] : largest;
    while (logits[best] != largest) best++;
    if (temperature == 0) return best;
    for (int from = 0, size; from < V; from += size) {
        size = V - from < PIECE ? V - from : PIECE;
        for (int i = 0; i < size; i++) {
            double below = (double)logits[from + i] - (double)largest;
            weights[i] = exp_weight((below > least ? below : least) / temperature);
        }
        for (int i = 0; i < size; i++) {
            Candidate c = {weights[i], from + i};
            candidates[from + i] = c;
            total += weights[i];
        }
    }
    if (most && most < V / 16) select_likeliest(candidates, V, n = most); // else one heap is cheaper than two
    if (!most && top_p < 1) n = drop_unlikely(candidates, V, top_p, total);
    if (most || top_p < 1) kept = keep_likeliest(candidates, n, most, top_p, &total);
    double left = random_uniform(random) * total;
    for (int i = n - 1; i > n - kept; i--)
        if ((left -= candidates[i].weight) < 0) return candidates[i].id;
    return candidates[n - kept].id;
}

// What a byte is, to the rule that cuts text into pieces (see "words").
typedef enum { LETTER, DIGIT, SPACE, OTHER } ByteKind;
static ByteKind kind_of(unsigned char byte) {
    int letter = byte | 32; // in lower case
    if (byte >= 0x80 || (letter >= 'a' && letter <= 'z')) return LETTER;
    if (byte >= '0' && byte <= '9') return DIGIT;
    return byte == ' ' || (byte >= '\t' && byte <= '\r') ? SPACE : OTHER;
}

// The length of the piece that text, of `size` bytes, begins with.
static size_t piece_length(const unsigned char *text, size_t size) {
    size_t n = 1, first = size > 1 && text[0] == ' ' && kind_of(text[1]) != SPACE;
    ByteKind kind = kind_of(text[first]);
    size_t most = kind == DIGIT ? first + 3 : size;
    while (n < size && n < most && kind_of(text[n]) == kind) n++;
    // white space leaves its last space to the piece behind it
    int leaves = kind == SPACE && n > 1 && n < size && text[n - 1] == ' ';
    return leaves ? n - 1 : n;
}

// A token of a piece while it is merged with its neighbours, whose places are -1 where there is
// none. One that its left neighbour has taken in has the id -1.
typedef struct { int id, left, right; } Symbol;

// The merge of the symbol at i with its right neighbour, NULL if there is none.
static const Merge *merge_at(const Words *w, const Symbol *symbols, int i) {
    if (i < 0 || symbols[i].id < 0 || symbols[i].right < 0) return NULL;
    Merge key = {symbols[i].id, symbols[symbols[i].right].id, 0, 0};
    size_t n = (size_t)w->n_merges;
    return (const Merge *)bsearch(&key, w->merges, n, sizeof(Merge), compare_merges);
}

// Puts the merge at i, if there is one, into the heap of those to be made: the lowest rank comes
// first, then the leftmost. Returns how many the heap holds.
static int propose_merge(Candidate *heap, int n, const Words *w, const Symbol *symbols, int i) {
    const Merge *merge = merge_at(w, symbols, i);
    if (!merge) return n;
    Candidate c = {-(double)merge->rank, i};
    int at = n;
    for (; at && comes_first(c, heap[(at - 1) / 2]); at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
    heap[at] = c;
    return n + 1;
}

// Writes the ids of a piece of n bytes; returns their number. symbols (n) and heap (3n) are
// scratch: each of the n - 1 merges at most proposes two more.
static int encode_piece(int *ids, const Words *w, const unsigned char *bytes, int n,
                        Symbol *symbols, Candidate *heap) {
    int waiting = 0, count = 0;
    for (int i = 0; i < n; i++) {
        Symbol symbol = {w->of_byte[bytes[i]], i - 1, i + 1 < n ? i + 1 : -1};
        symbols[i] = symbol;
    }
    for (int i = 0; i < n; i++) waiting = propose_merge(heap, waiting, w, symbols, i);
    while (waiting) {
        Candidate first = heap[0];
        heap[0] = heap[--waiting];
        sift_down(heap, waiting, 0);
        const Merge *merge = merge_at(w, symbols, first.id);
        if (!merge || -(double)merge->rank != first.weight) continue; // one of the two is gone
        Symbol *left = &symbols[first.id], *right = &symbols[left->right];
        left->id = merge->product;
        left->right = right->right;
        right->id = -1;
        if (left->right >= 0) symbols[left->right].left = first.id;
        waiting = propose_merge(heap, waiting, w, symbols, left->left);
        waiting = propose_merge(heap, waiting, w, symbols, first.id);
    }
    for (int i = 0; i >= 0; i = symbols[i].right) ids[count++] = symbols[i].id;
    return count;
}

// Writes the ids of a text, of which there are at most as many as bytes; returns their number, or
// FAILED.
static int encode_text(int *ids, const Words *w, const unsigned char *text, size_t size,
                       char *error) {
    size_t longest = 0, length;
    int count = 0;
    for (size_t at = 0; at < size; at += length) {
        length = piece_length(text + at, size - at);
        if (length > longest) longest = length;
    }
    if (size > INT_MAX / 4) return fail(error, NULL, "a text of %zu bytes is too long", size);
    Symbol *symbols = (Symbol *)grow(NULL, (longest + 1) * sizeof(Symbol));
    Candidate *heap = (Candidate *)grow(NULL, (3 * longest + 1) * sizeof(Candidate));
    int result = symbols && heap ? 0 : fail(error, NULL, "out of memory");
    for (size_t at = 0; !result && at < size; at += length) {
        length = piece_length(text + at, size - at);
        count += encode_piece(ids + count, w, text + at, (int)length, symbols, heap);
    }
    free(symbols);
    free(heap);
    return result ? result : count;
}

// The id of a byte, -1 if the vocabulary lacks it.
static int id_of_byte(const Run *run, char byte) {
    if (run->words.count) return run->words.of_byte[(unsigned char)byte];
    const void *place = memchr(run->vocab, byte, (size_t)run->vocab_bytes);
    return place ? (int)((const unsigned char *)place - run->vocab) : -1;
}

// Reads a stream to its end into fresh memory with a zero behind it: a pipe does not tell its size.
static int read_stream(int fd, const char *path, unsigned char **bytes, size_t *size, char *error) {
    size_t room = 1 << 16;
    *size = 0;
    *bytes = NULL;
    for (;; room *= 2) {
        unsigned char *larger = room > 1 << 30 ? NULL : (unsigned char *)grow(*bytes, room + 1);
        if (!larger) return fail(error, path, "it does not fit in memory, or is no prompt");
        *bytes = larger;
        int64_t got = read_bytes(fd, *bytes + *size, room - *size);
        if (got < 0) return fail(error, path, "%s", strerror(errno));
        *size += (size_t)got;
        (*bytes)[*size] = 0;
        if (*size < room) return 0;
    }
}

// Cuts the text of --prompts into its lines, each a prompt; a line may end as on Windows.
static int cut_prompts(Run *run, size_t size, const char *name, char *error) {
    char *at = (char *)run->prompt_text, *end = at + size;
    size_t lines = size && end[-1] != '\n';
    for (char *c = at; c < end; c++) lines += *c == '\n';
    if (!lines) return fail(error, name, "it holds no prompt"); // and fewer than 2^30 others: see read_stream
    run->prompts = (const char **)grow(NULL, lines * sizeof(char *));
    if (!run->prompts) return fail(error, name, "its %zu prompts do not fit in memory", lines);
    for (run->n_prompts = 0; at < end; run->n_prompts++) {
        char *line_end = at + strcspn(at, "\n");
        run->prompts[run->n_prompts] = at;
        at = line_end + 1;
        if (line_end > run->prompts[run->n_prompts] && line_end[-1] == '\r') line_end--;
        *line_end = 0;
    }
    return 0;
}

// Takes what is gone on from: the lines of --prompts, all of --prompt-file, or --prompt.
static int read_prompts(Run *run, char *error) {
    const Options *o = &run->settings.values;
    const char *path = o->prompts ? o->prompts : o->prompt_file;
    size_t size = 0;
    int result = 0, standard = path && !strcmp(path, "-");
    const char *name = standard ? "standard input" : path;
    if (path) {
        int fd = standard ? STDIN_FILENO : open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) return fail(error, path, "%s", strerror(errno));
        result = read_stream(fd, name, &run->prompt_text, &size, error);
        if (!standard) close(fd);
    }
    if (result) return result;
    if (path && strlen((char *)run->prompt_text) < size)
        return fail(error, name, "it holds a byte 0, which no prompt may");
    if (o->prompts) return cut_prompts(run, size, name, error);
    run->prompts = (const char **)malloc(sizeof(char *));
    if (!run->prompts) return fail(error, NULL, "out of memory");
    run->prompts[0] = path ? (char *)run->prompt_text : o->prompt;
    run->n_prompts = 1;
    return 0;
}

// Where a prompt comes from, for a line of error
static const char *prompt_name(char name[64], const Run *run, const char *prompt) {
    const Options *o = &run->settings.values;
    int line = 0;
    if (!o->prompts) return o->prompt_file ? "--prompt-file" : "--prompt";
    while (line < run->n_prompts && run->prompts[line] != prompt) line++;
    snprintf(name, 64, "--prompts, line %d", line + 1);
    return name;
}

// Reads a prompt as token ids: those of its bytes or words, or, where these are not known, numbers
// between spaces. Returns their number, WRONG_OPTION or FAILED. ids has room for strlen(prompt) + 1.
static int encode_prompt(const Run *run, const char *prompt, int *ids, char *error) {
    int n = 0, V = run->config.vocab_size;
    char name[64];
    const char *from = prompt;
    if (run->words.pairs)
        return encode_text(ids, &run->words, (const unsigned char *)prompt, strlen(prompt), error);
    for (; run->vocab_bytes && prompt[n]; n++) {
        ids[n] = id_of_byte(run, prompt[n]);
        if (ids[n] < 0)
            return wrong(error, NULL, "%s: the vocabulary lacks its byte %d, 0x%02X",
                         prompt_name(name, run, prompt), n, (unsigned char)prompt[n]);
    }
    while (!run->vocab_bytes && *prompt) {
        char *end;
        long id = strtol(prompt, &end, 10);
        if (end == prompt || id < 0 || id >= V || (*end && !isspace((unsigned char)*end)))
            return wrong(error, NULL, "%s takes token ids from 0 to %d between spaces",
                         run->settings.values.prompts ? prompt_name(name, run, from) : "--prompt", V - 1);
        ids[n++] = (int)id;
        prompt = end + strspn(end, " \t\n\v\f\r");
    }
    return n;
}

// A character of UTF-8 whose bytes are still to come.
typedef struct { unsigned char bytes[4]; int n; } Character;

// Prints a byte, or keeps it while it begins a character of UTF-8: what is read as text is whole at
// any moment, and what the last token leaves unfinished is not printed. Bytes that are no UTF-8 are
// printed as they are.
static void print_byte(Character *c, unsigned char byte) {
    c->bytes[c->n++] = byte;
    while (c->n > 0) {
        unsigned char first = c->bytes[0];
        int length = 1, follow = 1;
        if (first >= 0xC2 && first < 0xE0) length = 2;
        if (first >= 0xE0 && first < 0xF0) length = 3;
        if (first >= 0xF0 && first <= 0xF4) length = 4;
        while (follow < c->n && follow < length && (c->bytes[follow] & 0xC0) == 0x80) follow++;
        if (follow == c->n && follow < length) return; // it may go on
        int printed = follow == length ? length : 1;
        fwrite(c->bytes, 1, (size_t)printed, stdout);
        c->n -= printed;
        memmove(c->bytes, c->bytes + printed, (size_t)c->n);
    }
}

// What --stop waits for: the bytes of a text or, without a vocabulary of bytes, token ids.
typedef struct { int *wanted, n; } Stop;

// Takes the byte or id behind `last`, the n that came before: whether that completes what is waited
// for.
static int stop_reached(const Stop *stop, int *last, int next) {
    if (!stop->n) return 0;
    size_t size = (size_t)stop->n * sizeof(int);
    memmove(last, last + 1, size - sizeof(int));
    last[stop->n - 1] = next;
    return !memcmp(last, stop->wanted, size);
}

// What is gone on from. None of its own: a new line, or token 0.
typedef struct { const char *text; int *ids, count; } Prompt;

// A text on its way.
typedef struct {
    const Prompt *prompt;
    int *tokens, count;  // the prompt's, then those that were drawn
    int fed, begin;      // the model has seen `fed` of them and remembers them from `begin` on
    uint64_t random;
    int *last;           // what --stop compares
    int complete, broken;
    int written;         // tokens that stand on standard output, or are the prompt's
    int64_t last_length; // bytes of its last token that are written: up to the end of --stop's text
} Sequence;

// What generation needs beside the model. Several sequences are on their way together, and the
// first that is not complete is printed as it grows; those behind it wait for their turn.
typedef struct {
    Prompt *prompts;
    Sequence *sequences;
    int *memory;         // of the sequences' tokens, of what --stop compares
    int count, front;    // sequences of this group, the one that is printed
    Next *next;
    Stop stop;
    Character character; // the one that is being printed
    Candidate *candidates; // (threads,V)
} Generation;

// Whether the bytes of the model's tokens are known, so that text comes of them.
static int writes_bytes(const Run *run) { return run->vocab_bytes || run->words.count; }

// The number i of what a token stands for: a byte or, where these are not known, its id
static int64_t token_length(const Run *run, int id) {
    return run->words.count ? word_length(&run->words, id) : 1;
}
static int part_of_token(const Run *run, int id, int64_t i) {
    if (!writes_bytes(run)) return id;
    return run->words.count ? word_of(&run->words, id)[i] : run->vocab[id];
}

// Appends a token, and finds out whether the sequence ends with it.
static void take_token(const Run *run, const Stop *stop, Sequence *s, int id, int64_t n) {
    int64_t length = token_length(run, id), i = 0;
    while (i < length && !s->complete)
        s->complete = stop_reached(stop, s->last, part_of_token(run, id, i++));
    s->last_length = i;
    s->tokens[s->count++] = id;
    if (s->count - s->prompt->count == n) s->complete = 1;
}

// Writes the first `length` bytes of a token or, where these are not known, its id, behind a space
// unless it is the first.
static void write_token(const Run *run, Character *character, int id, int64_t length, int first) {
    if (!writes_bytes(run)) printf(first ? "%d" : " %d", id);
    else
        for (int64_t i = 0; i < length; i++)
            print_byte(character, (unsigned char)part_of_token(run, id, i));
}

// Writes a prompt as text; that of words without merges was given as ids.
static void write_prompt(const Run *run, Character *character, const Prompt *prompt) {
    int as_ids = run->words.count && !run->words.pairs;
    for (const char *byte = prompt->text; *byte && !as_ids; byte++)
        print_byte(character, (unsigned char)*byte);
    for (int i = 0; i < prompt->count && as_ids && *prompt->text; i++)
        write_token(run, character, prompt->ids[i], token_length(run, prompt->ids[i]), !i);
}

// Writes what is there of the sequences in their order, up to the first that is not complete. Lines
// of --- stand between them.
static int write_sequences(const Run *run, Generation *g, char *error) {
    while (g->front < g->count) {
        Sequence *s = &g->sequences[g->front];
        while (s->written < s->count) {
            int id = s->tokens[s->written], first = s->written == s->prompt->count && !*s->prompt->text;
            int last = s->written + 1 == s->count;
            write_token(run, &g->character, id, last ? s->last_length : token_length(run, id), first);
            s->written++;
        }
        if (!s->complete) break;
        putchar('\n');
        g->character.n = 0;
        if (++g->front == g->count) break;
        printf("---\n");
        write_prompt(run, &g->character, g->sequences[g->front].prompt);
    }
    return fflush(stdout) ? fail(error, "standard output", "%s", strerror(errno)) : 0;
}

// A token behind those of a sequence, drawn from their logits
static void draw_token(const Run *run, const Generation *g, Sequence *s, const real *logits, int64_t n) {
    const Options *o = &run->settings.values;
    int V = run->config.vocab_size;
    Candidate *candidates = g->candidates + (size_t)omp_get_thread_num() * (size_t)V;
    int id = sample_token(logits, candidates, V, o->temperature, o->top_k, o->top_p, &s->random);
    s->fed = s->count;
    if (id < 0) s->broken = s->complete = 1;
    else take_token(run, &g->stop, s, id, n);
}

// Has the model read several tokens of a sequence, a prompt or what is read afresh, and draws the
// next. Those behind it that go on from the same prompt, and have read nothing yet, have that in
// common: returns how many it was done for.
static int read_tokens(Run *run, Generation *g, Sequence *s, int64_t n) {
    const Backend *backend = run->backend;
    int number = (int)(s - g->sequences), known = s->fed - s->begin, same = 1;
    const real *logits = backend->extend(run->model, number, s->tokens + s->fed, s->count - s->fed, known);
    while (s->count == s->prompt->count && number + same < g->count && s[same].prompt == s->prompt) {
        s[same].begin = s->begin;
        same++;
    }
    if (same > 1) backend->copy(run->model, number, same - 1, s->count - s->begin);
    #pragma omp parallel for schedule(static) if (same > 1)
    for (int i = 0; i < same; i++) draw_token(run, g, s + i, logits, n);
    return same;
}

// One token more for every sequence. When the positions that the model remembers are full, the last
// half is read afresh.
static int make_tokens(Run *run, Generation *g, int64_t n, char *error) {
    int T = run->model_T, waiting = 0, V = run->config.vocab_size, broken = 0;
    for (int i = 0, same; i < g->count; i += same) {
        Sequence *s = &g->sequences[i];
        same = 1;
        if (s->complete) continue;
        if (s->count - s->begin > T) {
            int half = T > 1 ? T / 2 : 1;
            s->fed = s->begin = s->count - (s->count > s->prompt->count ? half : T);
        }
        Next next = {i, s->tokens[s->fed], s->fed - s->begin};
        if (s->count - s->fed > 1) same = read_tokens(run, g, s, n);
        else g->next[waiting++] = next;
    }
    if (waiting) {
        const real *logits = run->backend->extend_each(run->model, g->next, waiting);
        #pragma omp parallel for schedule(static) if (waiting > 1)
        for (int i = 0; i < waiting; i++)
            draw_token(run, g, &g->sequences[g->next[i].sequence], logits + (size_t)i * (size_t)V, n);
    }
    for (int i = 0; i < g->count; i++) broken |= g->sequences[i].broken;
    return broken ? fail(error, NULL, "a logit is not finite: the weights are spoilt") : 0;
}

// Writes the sequences of a group, as they are made: each its prompt and behind it n sampled tokens,
// or as many as --stop asks for.
static int generate_group(Run *run, Generation *g, int64_t n, char *error) {
    int result = 0;
    g->front = 0;
    g->character.n = 0;
    write_prompt(run, &g->character, g->sequences->prompt);
    while (g->front < g->count && !result && !interrupted) {
        result = make_tokens(run, g, n, error);
        if (!result) result = write_sequences(run, g, error);
    }
    if (g->front < g->count && !result && (putchar('\n') == EOF || fflush(stdout)))
        result = fail(error, "standard output", "%s", strerror(errno));
    return result;
}

// Makes a prompt tokens.
static int make_prompt(const Run *run, Prompt *prompt, char *error) {
    int n = encode_prompt(run, prompt->text, prompt->ids, error);
    if (n < 0) return n;
    if (!n) {
        int newline = id_of_byte(run, '\n');
        prompt->ids[n++] = newline < 0 ? 0 : newline;
    }
    prompt->count = n;
    return 0;
}

// Makes --stop bytes or tokens.
static int make_stop(const Run *run, Stop *stop, const char *text, char *error) {
    for (; writes_bytes(run) && text[stop->n]; stop->n++) {
        char byte = text[stop->n];
        if (run->vocab_bytes && id_of_byte(run, byte) < 0)
            return wrong(error, NULL, "--stop: the vocabulary lacks its byte %d, 0x%02X", stop->n,
                         (unsigned char)byte);
        stop->wanted[stop->n] = (unsigned char)byte;
    }
    if (writes_bytes(run)) return 0;
    stop->n = encode_prompt(run, text, stop->wanted, error);
    if (stop->n < 0)
        return wrong(error, NULL, "--stop takes token ids from 0 to %d between spaces",
                     run->config.vocab_size - 1);
    return 0;
}

// The texts number `from` on of all that are asked for, as many as a group has: those of a prompt
// follow each other. The i-th of each follows from `random` and i alone.
static void begin_group(const Run *run, Generation *g, int64_t from, int64_t n, uint64_t random) {
    int *memory = g->memory;
    for (int i = 0; i < g->count; i++) {
        Sequence *s = &g->sequences[i];
        int64_t number = (from + i) % run->settings.values.samples;
        memset(s, 0, sizeof(*s));
        s->prompt = &g->prompts[(from + i) / run->settings.values.samples];
        s->random = number ? splitmix64(random ^ splitmix64((uint64_t)number)) : random;
        s->count = s->written = s->prompt->count;
        s->last = memory;
        s->tokens = memory + g->stop.n;
        memory = s->tokens + s->count + n;
        for (int k = 0; k < g->stop.n; k++) s->last[k] = -1; // nothing of what is waited for
        memcpy(s->tokens, s->prompt->ids, sizeof(int) * (size_t)s->count);
    }
}

// Numbers of memory for a group's sequences, of which each begins with the longest prompt at most
static double group_numbers(const Generation *g, int n_prompts, int64_t n) {
    int longest = 0;
    for (int i = 0; i < n_prompts; i++)
        if (g->prompts[i].count > longest) longest = g->prompts[i].count;
    return (double)g->count * ((double)longest + (double)n + (double)g->stop.n);
}

// The memory for groups of as many sequences as the model keeps apart, or fewer, if they do not fit.
static int make_room(const Run *run, Generation *g, int n_prompts, int64_t n, char *error) {
    int64_t texts = n_prompts * run->settings.values.samples;
    size_t V = (size_t)run->config.vocab_size, threads = (size_t)omp_get_max_threads();
    g->count = texts < run->model->B ? (int)texts : run->model->B;
    if (g->count == 1) threads = 1;
    double drawn = (double)V * sizeof(Candidate) * (double)threads;
    while (check_room(drawn + group_numbers(g, n_prompts, n) * sizeof(int), NULL, "what is generated",
                      error)) {
        if (g->count == 1) return FAILED;
        g->count /= 2;
    }
    size_t count = (size_t)g->count;
    g->candidates = (Candidate *)malloc(V * threads * sizeof(Candidate));
    g->sequences = (Sequence *)malloc(count * sizeof(Sequence));
    g->next = (Next *)malloc(count * sizeof(Next));
    g->memory = (int *)malloc((size_t)group_numbers(g, n_prompts, n) * sizeof(int));
    return g->candidates && g->sequences && g->next && g->memory ? 0 : fail(error, NULL, "out of memory");
}

// Makes the prompts and --stop tokens, all of them before anything is written. ids: memory for them
static int begin_generation(const Run *run, Generation *g, const char *const *prompts, int n_prompts,
                            int *ids, char *error) {
    const char *stop = run->settings.values.stop ? run->settings.values.stop : "";
    int result = 0;
    for (int i = 0; i < n_prompts && !result; i++) {
        g->prompts[i].text = prompts[i];
        g->prompts[i].ids = ids;
        ids += strlen(prompts[i]) + 1;
        result = make_prompt(run, &g->prompts[i], error);
    }
    g->stop.wanted = ids;
    return result ? result : make_stop(run, &g->stop, stop, error);
}

// Writes texts to standard output, --samples of each prompt, each the prompt and n tokens. They are
// made in groups of as many as the model keeps apart; which of them are made together changes none.
static int generate(Run *run, const char *const *prompts, int n_prompts, int64_t n, uint64_t random,
                    char *error) {
    const Options *o = &run->settings.values;
    int64_t texts = n_prompts * o->samples;
    size_t numbers = (o->stop ? strlen(o->stop) : 0) + 1;
    for (int i = 0; i < n_prompts; i++) numbers += strlen(prompts[i]) + 1;
    size_t bytes = numbers * sizeof(int) + (size_t)n_prompts * sizeof(Prompt);
    if (check_room((double)bytes, NULL, "the prompts", error)) return FAILED;
    Generation g;
    memset(&g, 0, sizeof(g));
    g.prompts = (Prompt *)malloc((size_t)n_prompts * sizeof(Prompt));
    int *ids = (int *)malloc(numbers * sizeof(int));
    int result = g.prompts && ids ? 0 : fail(error, NULL, "out of memory");
    if (!result) result = begin_generation(run, &g, prompts, n_prompts, ids, error);
    if (!result) result = make_room(run, &g, n_prompts, n, error);
    for (int64_t from = 0; from < texts && !result && !interrupted; from += g.count) {
        if (g.count > texts - from) g.count = (int)(texts - from);
        begin_group(run, &g, from, n, random);
        if (from) printf("---\n");
        result = generate_group(run, &g, n, error);
    }
    void *blocks[] = {g.prompts, ids, g.candidates, g.sequences, g.next, g.memory};
    for (size_t i = 0; i < sizeof(blocks) / sizeof(blocks[0]); i++) free(blocks[i]);
    return result;
}

// ----------------------------------------------------------------------------
// what a run tells: its log, and its lines on standard output
//
// The log has a line for every step, of which a reader may be a program, so that it stays whole
// whatever happens: a line that cannot be written is taken back, and a resumed run cuts off what
// lies behind its step. On a terminal one line is written over and over, as wide as the window is.

// What a step found. elapsed: seconds, NAN if it was made before the run was resumed
typedef struct { int64_t step; double loss, grad_norm, rate, tokens, elapsed; } Step;

// The log of a run: one JSON object a line, one line a step.
typedef struct {
    const char *path;
    FILE *file;         // NULL: none was asked for
    int stream;         // a pipe or a device: what is written there stays
    int created, lines; // it was not there before; lines written since
    int64_t last;       // the step of its last line, 0: none
    long last_line;     // where that line begins
    int complete;       // that line holds a validation
    long cut_at;        // what lies behind goes when the next line is written; -1: nothing
    int begins;         // it begins with a resumed run: its first line names the loss before it
    double previous;
} Log;

// Opens the log's file and locks it. A pipe or a device is written as it is.
static int log_open_file(Log *log, char *error) {
    struct stat info;
    int there = !stat(log->path, &info);
    log->created = !there;
    log->stream = there && !S_ISREG(info.st_mode);
    int flags = log->stream ? O_WRONLY | O_NONBLOCK : O_RDWR | O_CREAT;
    int fd = open(log->path, flags | O_CLOEXEC, 0666);
    if (fd < 0)
        return fail(error, log->path, "%s",
                    errno == ENXIO ? "nobody reads this pipe" : strerror(errno));
    int locked = log->stream ? 1 : lock_descriptor(fd);
    if (log->stream) fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
    if (locked < 0) warn_of_no_locks(log->path);
    log->file = locked ? fdopen(fd, log->stream ? "w" : "r+") : NULL;
    if (log->file) return 0;
    fail(error, log->path, "%s", locked ? strerror(errno) : "another run is writing it");
    close(fd);
    return FAILED;
}

// Why a log that lies there is not gone on with, NULL: it is.
static const char *log_refusal(const LogScan *scan, const Options *o) {
    if (o->overwrite) return NULL; // it is the run's: the user says so
    if (!o->resume) return scan->size ? "it was written meanwhile" : NULL;
    if (!scan->is_log) return "it is no log: another --log, or --overwrite";
    if (scan->own) return NULL;
    return "nothing shows that it is the log of this run: another --log, or --overwrite goes on in "
           "it";
}

// Finds where the log goes on: a new run's at its begin; a resumed one's is cut back to the resumed
// step, once there is a line to write. A file that is no log of this run is not touched, unless
// --overwrite says so.
static int log_find_end(Log *log, const Options *o, char *error) {
    LogScan scan = log_scan(log->file, o->resume ? o->step : 0, o->train_loss, o->previous_loss);
    if (scan.failed) return fail(error, log->path, "%s", strerror(errno));
    const char *refusal = log_refusal(&scan, o);
    if (refusal) return wrong(error, log->path, "%s", refusal);
    if (!o->resume || !scan.is_log) memset(&scan, 0, sizeof(scan)); // it begins anew
    log->last = scan.last;
    log->last_line = scan.before;
    log->complete = scan.validated;
    log->begins = log->begins && !scan.last;
    log->cut_at = scan.upto;
    if (o->resume) return 0;
    if (!ftruncate(fileno(log->file), 0) && !fseek(log->file, 0, SEEK_SET)) return 0;
    return fail(error, log->path, "%s", strerror(errno));
}

// Opens the log, if one is asked for.
static int log_open(Log *log, const Options *o, char *error) {
    memset(log, 0, sizeof(*log));
    log->path = o->log;
    log->cut_at = -1;
    log->begins = o->resume || o->go_on;
    log->previous = o->train_loss >= 0 ? o->train_loss : NAN;
    if (!o->log) return 0;
    if (log_open_file(log, error)) return FAILED;
    if (log->stream) return 0;
    int result = log_find_end(log, o, error);
    if (!result) return 0;
    fclose(log->file);
    log->file = NULL;
    return result;
}

// Goes to where a line is written: the end, or `again` the begin of the last line. 0, or -1 with
// errno.
static int log_seek(Log *log, int again) {
    if (log->cut_at >= 0) {
        if (ftruncate(fileno(log->file), log->cut_at)) return -1;
        if (fseek(log->file, log->cut_at, SEEK_SET)) return -1;
    }
    log->cut_at = -1;
    if (again) return fseek(log->file, log->last_line, SEEK_SET);
    log->last_line = ftell(log->file);
    return log->last_line < 0 && !log->stream ? -1 : 0;
}

// Takes back a line that did not reach its file, that the log stays whole. 0, or -1 where that is
// not done.
static int log_take_back(Log *log, int64_t step) {
    clearerr(log->file);
    if (log->stream || ftruncate(fileno(log->file), log->last_line)) return -1;
    fseek(log->file, log->last_line, SEEK_SET);
    log->last = step - 1;
    return 0;
}

// Writes the line of a step; score: of the validation there, NULL: none. The line that stands there
// is written again if it lacks the validation. FAILED if the line is not on its way to the disk.
static int log_line(Log *log, const Step *s, const Score *score, char *error) {
    int again = s->step == log->last;
    if (!log->file || s->step < log->last) return 0;
    if (again && (!score || log->complete || log->stream)) return 0;
    if (log_seek(log, again)) return fail(error, log->path, "%s", strerror(errno));
    fprintf(log->file, "{\"step\": %lld", (long long)s->step);
    print_member(log->file, "train_loss", s->loss, 9);
    if (score) print_score(log->file, score);
    print_member(log->file, "lr", s->rate, 9);
    print_member(log->file, "grad_norm", s->grad_norm, 9);
    print_member(log->file, "tok_per_s", s->tokens / s->elapsed, 6);
    if (log->begins && !log->last_line) print_member(log->file, "previous_loss", log->previous, 9);
    fprintf(log->file, "}\n");
    log->last = s->step;
    log->complete = score != NULL;
    if (fflush(log->file) || ferror(log->file)) {
        char ignored[ERROR_SIZE];
        fail(error, log->path, "%s", strerror(errno));
        int taken_back = !log_take_back(log, s->step);
        if (taken_back && again) log_line(log, s, NULL, ignored); // as it stood there
        return FAILED;
    }
    log->lines++;
    // what stood there may have been longer
    if (again && ftruncate(fileno(log->file), ftell(log->file)))
        return fail(error, log->path, "%s", strerror(errno));
    return 0;
}

// A log that was made for nothing is removed.
static void log_close(Log *log) {
    if (!log->file) return;
    fclose(log->file);
    if (log->created && !log->lines) unlink(log->path);
    log->file = NULL;
}

// Prints how to go on after a stop: --resume and what was given of the rows that a checkpoint does
// not hold.
static void print_resume_command(Run *run, const char *program) {
    const Settings *s = &run->settings;
    run->in_place = 0;
    printf("\nstopped after step %lld, saved to ", (long long)s->values.step);
    print_quoted(s->values.out);
    printf("\ngo on with: ");
    print_quoted(program);
    printf(" --resume ");
    print_quoted(s->values.out);
    for (int i = 0; i < N_OPTIONS; i++) {
        const Option *option = &option_table[i];
        char text[96];
        int needed = option->group == WATCHING || is_among(option, " save-every keep-every gpus timeout ");
        if (!s->given[i] || !needed) continue;
        printf(" --%s ", option->name);
        print_quoted(option_text(text, &s->values, option));
    }
    printf("\n");
}

// The columns of the terminal that standard output is, 0: it is none.
static int terminal_columns(void) {
    struct winsize size;
    int64_t wished = 0;
    const char *columns = getenv("COLUMNS");
    if (!isatty(STDOUT_FILENO)) return 0;
    if (!ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) && size.ws_col > 0) return size.ws_col;
    return columns && !parse_integer(columns, 1, 10000, &wished) ? (int)wished : 80;
}

// Moves to the next row where a line stands in place: what is printed then begins there.
static void end_line(Run *run) {
    if (run->in_place) printf("\n");
    run->in_place = 0;
}

// The fields of a step's line.
enum {
    OF_STEP, OF_LOSS, OF_NORM, OF_RATE, OF_TIME, OF_SPEED, OF_LEFT, OF_VALIDATION, OF_ACCURACY,
    N_FIELDS
};

// Writes them as text; what is not known stays empty.
static void fill_fields(char fields[][80], const Options *o, const Step *s, double left,
                        const Score *score) {
    for (int i = 0; i < N_FIELDS; i++) fields[i][0] = 0;
    snprintf(fields[OF_STEP], 80, "step %lld/%lld", (long long)o->step, (long long)o->steps);
    snprintf(fields[OF_LOSS], 80, "loss %.4f", s->loss);
    snprintf(fields[OF_NORM], 80, "norm %.3f", s->grad_norm);
    snprintf(fields[OF_RATE], 80, "lr %.2e", s->rate);
    if (isfinite(s->elapsed)) { // else the step was made before the run was resumed
        long long minutes = (long long)left / 60;
        int rest = (int)((long long)left % 60);
        snprintf(fields[OF_TIME], 80, "%.1f ms", s->elapsed * 1e3);
        snprintf(fields[OF_SPEED], 80, "%.0f tok/s", s->tokens / s->elapsed);
        snprintf(fields[OF_LEFT], 80, "%lld:%02d left", minutes, rest);
    }
    if (!score) return;
    int has_accuracy = !isnan(score->accuracy), last = is_last(o);
    snprintf(fields[OF_VALIDATION], 80, "val %.4f", score->loss);
    if (has_accuracy) snprintf(fields[OF_ACCURACY], 80, "accuracy %.4f", score->accuracy);
    if (last) strcat(fields[has_accuracy ? OF_ACCURACY : OF_VALIDATION], " (whole split)");
}

// Makes them a line; returns its length.
static int join_fields(char line[N_FIELDS * 80], char fields[][80]) {
    int length = 0;
    line[0] = 0;
    for (int i = 0; i < N_FIELDS; i++) {
        if (!fields[i][0]) continue;
        const char *between = i == OF_ACCURACY ? ", " : " | ";
        size_t room = (size_t)(N_FIELDS * 80 - length);
        length += snprintf(line + length, room, "%s%s", length ? between : "", fields[i]);
    }
    return length;
}

// The line of a step. A file gets it whole. A terminal gets the fields that fit, over the line
// before, and unless it stays, as a validation does, the cursor goes back to its begin: when the
// window is made narrower, and the line is broken in two, that is still the begin, and all behind
// it is cleared.
static void print_step(Run *run, const Step *s, double left, const Score *score) {
    static const int first_to_go[] = {OF_NORM, OF_RATE,     OF_SPEED, OF_TIME,
                                      OF_LEFT, OF_ACCURACY, OF_LOSS,  OF_STEP};
    enum { N_TO_GO = sizeof(first_to_go) / sizeof(first_to_go[0]) };
    const Options *o = &run->settings.values;
    char fields[N_FIELDS][80], line[N_FIELDS * 80];
    int columns = terminal_columns();
    fill_fields(fields, o, s, left, score);
    int length = join_fields(line, fields);
    for (int i = 0; i < N_TO_GO && columns && length >= columns; i++) {
        if (first_to_go[i] == OF_STEP && !score) continue; // such a line has its step
        fields[first_to_go[i]][0] = 0;
        length = join_fields(line, fields);
    }
    const char *terminal_type = getenv("TERM");
    int commands = terminal_type && strcmp(terminal_type, "dumb");
    int stays = !columns || score || is_last(o);
    int room = columns > 1 ? columns - 1 : 0; // a full row would be left at once
    if (columns && length > room) length = room;
    printf("%s%.*s", columns ? "\r" : "", length, line);
    if (columns && commands) printf("\033[J");
    else if (columns) printf("%*s", room - length, "");
    printf(stays ? "\n" : "\r");
    fflush(stdout);
    run->in_place = !stays;
}

// ----------------------------------------------------------------------------
// training
//
// train_step is the algorithm, learning_rate its schedule, and train_steps the loop. What surrounds
// them is what a long run needs: after each step conclude_step validates, logs and saves, so that a
// kill at any moment leaves what can be gone on with; a resumed run first does what the last one
// left open.

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

// One step: reads accum micro-batches, sums their gradients of the mean loss over all targets,
// clips, updates. FAILED if loss or gradient are not finite: the weights are then still those of
// before.
static int train_step(Run *run, double *loss, double *grad_norm, char *error) {
    Options *o = &run->settings.values;
    const Backend *backend = run->backend;
    int T = (int)o->seq, B = (int)o->batch / backend->ranks; // a rank's rows
    int64_t count = 0, sequences = o->accum * o->batch, row = (int64_t)backend->rank * B;
    for (int64_t i = 0; i < sequences; i++) {
        int64_t place = sequence_place(run, o->step * sequences + i);
        copy_sequence(run->inputs + i * T, run->targets + i * T, &run->train, place, T);
    }
    for (int64_t i = 0; i < sequences * T; i++) count += run->targets[i] >= 0;
    double dloss = count ? 1 / (double)count : 0;
    *loss = 0;
    for (int64_t a = 0; a < o->accum; a++) {
        uint64_t micro_step = (uint64_t)(o->step * o->accum + a);
        Dropout drop = {o->dropout, (uint64_t)o->seed, micro_step, (uint64_t)(row * T * o->dim)};
        int64_t at = (a * o->batch + row) * T;
        backend->forward(run->model, run->inputs + at, run->targets + at, B, T, drop);
        backend->backward(run->model, dloss, a + 1 == o->accum);
        *loss += backend->loss(run->model) * dloss;
    }
    add_up(run, loss, 1);
    AdamW adam = {learning_rate(o, o->step), o->beta1, o->beta2, o->eps, o->weight_decay};
    *grad_norm = isfinite(*loss) ? backend->update(run->model, adam, o->clip, o->step + 1) : NAN;
    if (!isfinite(*loss) || !isfinite(*grad_norm))
        return fail(error, NULL, "step %lld: loss %g, gradient norm %g: stopped before the update; "
                                 "a lower --lr may help",
                    (long long)o->step + 1, *loss, *grad_norm);
    o->step++;
    return 0;
}

// Prints a sample, with a model made for generation: the one that trains keeps no cache of the
// past.
static int print_sample(Run *run, Model *sampler, char *error) {
    const Options *o = &run->settings.values;
    Model *trained = run->model;
    real *params = run->backend->read(sampler, PARAMS);
    memcpy(params, run->backend->read(trained, PARAMS), sizeof(real) * (size_t)run->table.count);
    run->backend->write(sampler, PARAMS);
    run->model = sampler;
    end_line(run);
    printf("---\n");
    static const char *const nothing[] = {""};
    int result = generate(run, nothing, 1, 200, splitmix64((uint64_t)(o->seed + o->step)), error);
    printf("---\n");
    run->model = trained;
    return result;
}

// The training loop's own state.
typedef struct {
    Log log;
    Model *sampler;         // prints samples; NULL: none are asked for
    double start, told;     // seconds; when the last line was printed
    int64_t first_step;     // that it began with
    const char *saved;      // the file that holds saved_step, NULL: none yet
    int64_t saved_step;
    int complete;           // the run's last step is concluded
    int idle;               // there was nothing to do
} Training;

// Validates: as --eval-every asks, if `due`, else, before a save, one batch, so that what is saved
// is not only finite but has a finite loss. FAILED, with the line, if it has none: then nothing may
// be saved.
static int judge(Run *run, int due, int to_save, Score *score, char *error) {
    const Options *o = &run->settings.values;
    memset(score, 0, sizeof(*score));
    if (due) *score = evaluate(run, o->eval_batches, 0);
    Score quick = *score;
    if (!due || score->broken) {
        score->count = 0; // no score
        if (to_save) quick = evaluate(run, 1, 1);
    }
    if (!quick.count || isfinite(quick.loss)) return 0;
    *score = quick;
    static const char why[] = "stopped, this step is not saved; a lower --lr may help";
    return fail(error, NULL, "step %lld: the validation loss is %g: %s", (long long)o->step,
                quick.loss, why);
}

// Whether a step without a validation gets its line: on a terminal each; in a file the first, every
// hundredth, and one that would leave the file silent for over ten seconds, if the next step takes
// as long. silent: seconds since a line.
static int is_printed(const Options *o, const Training *t, const Step *s, double silent) {
    return isatty(STDOUT_FILENO) || o->step == t->first_step + 1 || o->step % 100 == 0 ||
           silent + s->elapsed > 10;
}

// Saves the run. A power cut must not leave it ahead of its log.
static int store_run(Run *run, Training *t, char *error) {
    const Options *o = &run->settings.values;
    if (t->log.file) flush_to_disk(fileno(t->log.file));
    if (save_run(run, error)) return FAILED;
    t->saved = o->out;
    t->saved_step = o->step;
    return 0;
}

// Writes what a step leaves, in this order: the log's line, the best weights, the run's file; so
// whatever ends the program in between, nothing is named that is not there. The line of the run's
// last step gets the validation of the whole split from conclude_run. A log that fails, or best
// weights, do not keep the run from being saved, and end it; the resumed run makes up for the
// validation. score->count 0: there is none.
static int store_step(Run *run, Training *t, const Step *s, const Score *score, int validated,
                      int to_save, char *error) {
    Options *o = &run->settings.values;
    int scored = score->count > 0, result = 0;
    int64_t validated_before = o->validated, since_before = o->since_best;
    double best_before = o->best_val;
    if (validated) o->validated = o->step;
    if (validated && scored && o->patience)
        o->since_best = score->loss < o->best_val ? 0 : o->since_best + 1;
    int last = is_last(o), lower = scored && score->loss < o->best_val;
    if (!last || !t->log.stream)
        result = log_line(&t->log, s, scored && !last ? score : NULL, error);
    if (!result && lower) {
        o->best_val = score->loss;
        result = save_best(run, error);
    }
    if (o->log || lower) result = agree(run, result, error);
    if (result) {
        o->validated = validated_before;
        o->best_val = best_before;
        o->since_best = since_before;
    }
    if (!result && !to_save && !last) return 0;
    char second[ERROR_SIZE]; // the first problem is what is told
    int saved = store_run(run, t, result ? second : error);
    if (!result && !saved && is_kept(o)) saved = save_snapshot(run, error);
    return result ? result : saved;
}

// What follows an update: the step is judged, stored and printed.
static int conclude_step(Run *run, Training *t, const Step *s, char *error) {
    Options *o = &run->settings.values;
    int due = o->eval_every && o->step % o->eval_every == 0;
    int to_save = is_last(o) || is_stopped(run) || (o->save_every && o->step % o->save_every == 0);
    to_save = to_save || is_kept(o);
    Score score;
    o->train_loss = s->loss;
    o->grad_norm = s->grad_norm;
    if (judge(run, due, to_save, &score, error)) {
        char second[ERROR_SIZE];
        log_line(&t->log, s, &score, second); // the first problem is what is told
        return FAILED;
    }
    saving = 1;
    int result = store_step(run, t, s, &score, due && !score.broken, to_save, error);
    saving = 0;
    if (result || is_last(o)) return result;
    double now = seconds(), so_far = now - t->start;
    double left = so_far / (double)(o->step - t->first_step) * (double)(o->steps - o->step);
    int scored = score.count > 0;
    if (!scored && !is_printed(o, t, s, now - t->told)) return 0;
    print_step(run, s, left, scored ? &score : NULL);
    t->told = now;
    return 0;
}

// The loss of the whole split as others tell it.
static void print_perplexity(const Score *score) {
    printf("perplexity %.4g", exp(score->loss));
    if (!isnan(score->bits_per_byte)) printf(", %.4f bits per byte", score->bits_per_byte);
    printf(" (whole split)\n");
}

// The end of the last step: the whole split, the log's last line, and, if no validation came
// before, the last weights as the best. A signal that breaks the validation off leaves this to a
// resumed run.
static int conclude_run(Run *run, Training *t, const Step *s, char *error) {
    Options *o = &run->settings.values;
    Score score = evaluate(run, 0, 0);
    const Score *whole = score.count > 0 && !score.broken ? &score : NULL;
    int result = 0;
    if (whole && !isfinite(score.loss))
        result = fail(error, NULL, "step %lld: the validation loss of the whole split is %g",
                      (long long)o->step, score.loss);
    saving = 1;
    int logged = log_line(&t->log, s, whole, error);
    if (!result) result = logged;
    if (!result && !score.broken && o->best_val >= 1e300) {
        if (whole) o->best_val = score.loss; // the weights say it; the run has had no validation
        result = save_best(run, error);
        o->best_val = 1e300;
    }
    saving = 0;
    if (!result) print_step(run, s, 0, whole);
    if (!result && whole) print_perplexity(whole);
    if (!result && is_out_of_patience(o) && o->step < o->steps)
        printf("no lower loss in %lld validations: the run ends before its %lld steps; "
               "--resume goes on\n", (long long)o->since_best, (long long)o->steps);
    t->complete = !result && !score.broken;
    return result;
}

// Whether the file system has room for what a run keeps there: its file, the best weights, and a
// temporary file beside them.
static int check_disk(const Run *run, uint64_t run_size, uint64_t best_size, char *error) {
    const Options *o = &run->settings.values;
    struct statvfs disk;
    char folder[PATH_MAX];
    const Place *out = &run->out_place, *best = &run->best_place;
    folder_of(folder, out->target);
    if (statvfs(folder, &disk) || !disk.f_blocks) return 0; // it does not tell, the saves will
    double needed = (double)run_size + (double)best_size + (double)run_size;
    if (out->there) needed -= (double)out->known.st_size;
    if (best->there) needed -= (double)best->known.st_size;
    double left = (double)disk.f_bavail * (double)disk.f_frsize, kept = 0;
    int64_t every = o->keep_every;
    if (every) kept = (double)run_size * (double)(o->steps / every - o->step / every);
    if (needed <= left && needed + kept > left)
        print_warning(out->path, "the snapshots take another %.1f MiB, %.1f are left",
                      (needed + kept) / 0x1p20, left / 0x1p20);
    if (needed <= left) return 0;
    return fail(error, out->path,
                "No space left on device: the run's files take another %.1f MiB, %.1f are left",
                needed / 0x1p20, left / 0x1p20);
}

// Makes what a run needs while it trains, and tries everything that a save will ask for, the way
// the save does it.
static int begin_training(Run *run, Training *t, char *error) {
    Options *o = &run->settings.values;
    Place *out = &run->out_place, *best = &run->best_place;
    uint64_t run_size = 0, best_size = 0;
    int writes = !run->backend->rank;
    if (writes && out->lock >= 0) remove_leftovers(out->target);
    if (writes && best->lock >= 0) remove_leftovers(best->target);
    if (save_checkpoint(run, out, RESUMABLE, 1, &run_size, error)) return FAILED;
    if (save_checkpoint(run, best, WEIGHTS, 1, &best_size, error)) return FAILED;
    if (writes && check_disk(run, run_size, best_size, error)) return FAILED;
    if (writes && o->sample_every) {
        t->sampler = run->backend->create(&run->config, 1, (int)o->seq, GENERATE, error);
        if (!t->sampler) return FAILED;
    }
    int result = writes ? log_open(&t->log, o, error) : 0;
    if (result || !o->go_on || o->resume) return result;
    saving = 1; // whatever ends the program, --continue finds its run and knows its log
    result = store_run(run, t, error);
    saving = 0;
    return result;
}

// One step, timed and concluded.
static int make_step(Run *run, Training *t, Step *s, char *error) {
    Options *o = &run->settings.values;
    double begin = seconds();
    s->rate = learning_rate(o, o->step);
    if (train_step(run, &s->loss, &s->grad_norm, error)) return FAILED;
    s->elapsed = seconds() - begin;
    s->step = o->step;
    o->previous_loss = o->train_loss;
    return conclude_step(run, t, s, error);
}

// The steps up to the last one, or to a signal.
static int train_steps(Run *run, Training *t, Step *s, char *error) {
    const Options *o = &run->settings.values;
    while (o->step < o->steps && !is_out_of_patience(o) && !is_stopped(run)) {
        if (make_step(run, t, s, error)) return FAILED;
        if (!t->sampler || o->step % o->sample_every) continue;
        // if it is standard output that fails, nobody reads any more: no reason to stop
        if (print_sample(run, t->sampler, error) && !ferror(stdout)) return FAILED;
    }
    return 0;
}

// A signal came: what is not saved yet is judged and saved.
static int save_stopped(Run *run, Training *t, char *error) {
    const Options *o = &run->settings.values;
    Score score;
    if (t->saved == o->out && t->saved_step == o->step) return 0;
    if (judge(run, 0, 1, &score, error)) return FAILED;
    saving = 1;
    int result = store_run(run, t, error);
    saving = 0;
    return result;
}

// The step that a run begins behind: of a resumed one what its file says of it.
static Step step_before(const Run *run) {
    const Options *o = &run->settings.values;
    int known = o->resume && o->step > 0 && o->train_loss >= 0;
    Step s = {.step = o->step,
              .loss = known ? o->train_loss : NAN,
              .grad_norm = known ? o->grad_norm : NAN,
              .rate = learning_rate(o->resume ? &run->stored : o, o->step - 1),
              .tokens = (double)(o->accum * o->batch * o->seq),
              .elapsed = NAN};
    return s;
}

// What a stop or a kill left open of the resumed step: its line in the log, its validation, of the
// last step the end, and its snapshot.
typedef struct { int line, validation, end, snapshot; } Unfinished;

static Unfinished find_unfinished(const Run *run, const Log *log, int renamed) {
    const Options *o = &run->settings.values;
    char path[PATH_MAX], ignored[ERROR_SIZE];
    Unfinished open = {0, 0, 0, 0};
    if (!o->resume) return open;
    if (is_kept(o) && !renamed && !snapshot_beside(path, o->out, o->step, ignored))
        open.snapshot = !lies_there(path, ignored);
    int known = o->step > 0 && o->train_loss >= 0;
    int due = o->eval_every && o->step % o->eval_every == 0;
    int logged = log->file && !log->stream;
    open.line = known && logged && log->last == o->step - 1;
    open.validation = known && due && o->validated >= 0 && o->validated < o->step;
    if (!is_last(o)) return open;
    open.end = open.validation || renamed || (known && logged && !log->complete);
    open.end = open.end || open.snapshot || !lies_there(run->best_path, ignored);
    return open;
}

// Everything from what was left open to the end of the run, or to a signal.
static int train_to_end(Run *run, Training *t, char *error) {
    const Options *o = &run->settings.values;
    int renamed = o->resume && strcmp(o->out, o->resume), result = 0;
    Unfinished open = find_unfinished(run, &t->log, renamed);
    double found[] = {(double)open.line, (double)open.validation, (double)open.end,
                      (double)open.snapshot, (double)renamed, (double)(t->saved == o->out)};
    take_first(run, found, 6); // rank 0 has the files
    Unfinished of_all = {found[0] > 0, found[1] > 0, found[2] > 0, found[3] > 0};
    open = of_all;
    renamed = found[4] > 0;
    if (run->backend->rank) t->saved = found[5] > 0 ? o->out : NULL;
    Step s = step_before(run);
    t->idle = (o->step >= o->steps || is_out_of_patience(o)) && !open.end;
    if (t->idle) {
        printf("nothing to do: %lld of %lld steps are done", (long long)o->step,
               (long long)o->steps);
        if (o->step < o->steps)
            printf(", and %lld validations were no better: a larger --patience goes on, or none",
                   (long long)o->since_best);
        printf("\n");
        return 0;
    }
    if (open.line) result = log_line(&t->log, &s, NULL, error);
    if (!result && open.validation) result = conclude_step(run, t, &s, error);
    else if (!result && open.snapshot) result = save_snapshot(run, error);
    if (!result) result = train_steps(run, t, &s, error);
    if (!result && (is_stopped(run) || renamed)) result = save_stopped(run, t, error);
    if (!result && is_last(o)) result = conclude_run(run, t, &s, error);
    return result;
}

// Adds to the line of an error what of the run is saved.
static void tell_what_is_saved(const Run *run, const Training *t, char *error) {
    char problem[ERROR_SIZE], ignored[ERROR_SIZE];
    memcpy(problem, error, sizeof(problem));
    int has_best = run->settings.values.best_val < 1e300;
    has_best = has_best && lies_there(run->best_path, ignored) == 1;
    if (t->saved && lies_there(t->saved, ignored) == 1)
        format_line(error, NULL, "%.290s; %.180s holds step %lld", problem, t->saved,
                    (long long)t->saved_step);
    else if (t->saved)
        format_line(error, NULL, "%.290s; %.180s is not there any more", problem, t->saved);
    else if (has_best)
        format_line(error, NULL, "%.290s; only the best weights were saved before, %.160s", problem,
                    run->best_path);
    else
        format_line(error, NULL, "%.290s; nothing was saved before", problem);
}

// Says where the files of a complete run lie. They must be there.
static int tell_files(const Run *run, const Training *t, int log_is_gone, char *error) {
    const Options *o = &run->settings.values;
    char ignored[ERROR_SIZE];
    if (lies_there(o->out, ignored) != 1) return fail(error, o->out, "it is not there any more");
    if (lies_there(run->best_path, ignored) != 1)
        return fail(error, run->best_path,
                    "the best weights are not there any more; the run is saved");
    if (log_is_gone) return fail(error, o->log, "the log is not there any more; the run is saved");
    printf("saved to ");
    print_quoted(o->out);
    printf(", the best weights to ");
    print_quoted(run->best_path);
    printf(" (%.1f s)\n", seconds() - t->start);
    return 0;
}

// Trains. 130 after a signal that asked for an end.
static int train(Run *run, const char *program, char *error) {
    const Options *o = &run->settings.values;
    struct stat logged;
    Training t;
    memset(&t, 0, sizeof(t));
    t.start = t.told = seconds();
    t.first_step = t.saved_step = o->step;
    t.saved = o->resume;
    install_handlers(WHILE_TRAINING);
    int result = begin_training(run, &t, error);
    if (!result) result = train_to_end(run, &t, error);
    int log_is_gone = t.log.file && !fstat(fileno(t.log.file), &logged) && !logged.st_nlink;
    log_close(&t.log);
    if (t.sampler) run->backend->destroy(t.sampler);
    if (result == FAILED) tell_what_is_saved(run, &t, error);
    if (result || t.idle) return result;
    if (t.complete) return run->backend->rank ? 0 : tell_files(run, &t, log_is_gone, error);
    print_resume_command(run, program);
    return 130;
}

// ----------------------------------------------------------------------------
// the program
//
// prepare opens what the options name and makes the model, perform does what was asked for, and
// run_program stands around them with the exit code. Read it backwards, from main.

// Makes the table of the parameters, their names and shapes alone, and finds them in the
// checkpoint: memory is taken later, and only for what a file really holds.
static int make_table(Run *run, char *error) {
    const Options *o = &run->settings.values;
    Weights weights;
    weights.layers = (LayerWeights *)calloc((size_t)run->config.n_layers, sizeof(LayerWeights));
    if (!weights.layers) return fail(error, NULL, "out of memory");
    carve_weights(&weights, &run->table, NULL, &run->config);
    free(weights.layers);
    if (run->table.incomplete) return fail(error, NULL, "out of memory");
    for (int block = 0; block < checkpoint_blocks(o); block++)
        if (check_block(run, checkpoint_path(o), (Block)block, error)) return FAILED;
    return 0;
}

// Makes the model, for the longest sequence that it will see, and the arrays for the tokens of a
// step.
enum { MOST_TEXTS = 256 }; // that are generated together, where the model keeps several apart
static int make_model(Run *run, char *error) {
    const Options *o = &run->settings.values;
    // positions of what is generated: all of them, or those that are remembered
    int64_t prompt = 0, texts = run->n_prompts * o->samples;
    for (int i = 0; i < run->n_prompts; i++)
        if ((int64_t)strlen(run->prompts[i]) > prompt) prompt = (int64_t)strlen(run->prompts[i]);
    int64_t needed = prompt + 1 + o->generate;
    int64_t longest = o->window && o->window < needed ? o->window : needed;
    Mode mode = o->generate ? GENERATE : o->eval ? EVALUATE : TRAIN;
    int together = texts < MOST_TEXTS ? (int)texts : MOST_TEXTS;
    int B = o->generate ? together : (int)o->batch / run->backend->ranks;
    int T = o->generate ? (int)longest : (int)o->seq;
    run->model_T = T;
    run->model = run->backend->create(&run->config, B, T, mode, error);
    if (!run->model) return FAILED;
    size_t rows = mode == GENERATE ? 1 : (size_t)(mode == TRAIN ? o->accum * o->batch : o->batch);
    size_t tokens = rows * (size_t)T;
    size_t examples = run->train.kind == DATA_EXAMPLES ? (size_t)run->train_end : 1;
    double bytes = (double)tokens * (2 * sizeof(int) + 1) + (double)examples * sizeof(int32_t);
    if (check_room(bytes, NULL, "a step's data", error)) return FAILED;
    run->inputs = (int *)malloc(tokens * sizeof(int));
    run->targets = (int *)malloc(tokens * sizeof(int));
    run->hits = (char *)malloc(tokens);
    run->order = (int32_t *)malloc(examples * sizeof(int32_t));
    if (!run->inputs || !run->targets || !run->hits || !run->order)
        return fail(error, NULL, "out of memory");
    // touched: what is asked for later is told what is left
    memset(run->order, 0, examples * sizeof(int32_t));
    return 0;
}

// Gives the model its numbers: those of the checkpoint, or fresh ones, drawn from the seed.
static int fill_model(Run *run, char *error) {
    const Options *o = &run->settings.values;
    for (int block = 0; block < checkpoint_blocks(o); block++)
        if (load_block(run, checkpoint_path(o), (Block)block, error)) return FAILED;
    if (checkpoint_blocks(o)) return 0;
    initialise(run->backend->read(run->model, PARAMS), &run->table, (uint64_t)o->seed);
    run->backend->write(run->model, PARAMS);
    return 0;
}

// With --continue: a run that lies at --out is resumed, whatever it was started from.
static int find_run(Options *o, char *error) {
    int there = o->go_on ? lies_there(o->out, error) : 0;
    if (there > 0) {
        o->resume = o->out;
        o->load = NULL;
    }
    return there < 0 ? FAILED : 0;
}

// Opens files and data. What can be refused is refused as early as it is known: options that do not
// go together before anything is read, what may not be replaced before the data, a file that lacks a
// tensor before memory is taken for the model. What is written is rank 0's affair.
static int open_files(Run *run, char *error) {
    Options *o = &run->settings.values;
    int training = is_training(o), ranks = run->backend->ranks, result;
    int writes = training && !run->backend->rank;
    if (check_options(&run->settings, run->backend, error)) return WRONG_OPTION;
    plain = (int)o->plain;
    if (find_run(o, error)) return FAILED;

    // a run goes on in its own file; its places are locked before anything is read that another run
    // might be writing
    if (o->resume && !is_given(&run->settings, "out")) o->out = o->resume;
    if (training) install_handlers(BEFORE_TRAINING);
    if (writes && (result = claim_places(run, error))) return result;

    if ((result = open_checkpoint(run, error))) return result;
    settle_defaults(o);
    if (config_of(&run->config, o, error)) return WRONG_OPTION;
    if (!o->generate && o->batch % ranks)
        return wrong(error, NULL, "--batch %lld does not divide by the %d processes that train",
                     (long long)o->batch, ranks);
    if ((result = read_prompts(run, error))) return result;

    // --again compares the data's hash as well: it looks at what is there once the data is read
    if (writes && (result = check_distinct(run, error))) return result;
    if (writes && !o->again && (result = check_free(run, error))) return result;
    if (!o->generate && (result = open_data(run, error))) return result;
    if (writes && o->again && (result = check_free(run, error))) return result;
    if (writes && o->resume && (result = check_best(run, error))) return result;
    if (writes && (result = check_snapshots(run, error))) return result;
    if (config_of(&run->config, o, error)) return WRONG_OPTION; // now with the data's T and V
    return make_table(run, error);
}

// Makes all of it ready to go, on all ranks or on none.
static int prepare(Run *run, char *error) {
    int result = agree(run, open_files(run, error), error);
    if (!result) result = agree(run, check_same(run, error), error);
    if (!result) result = agree(run, make_model(run, error), error);
    if (!result) result = agree(run, fill_model(run, error), error);
    return result;
}

// The validation loss of the whole split, for --eval.
static int print_evaluation(Run *run, char *error) {
    Score score = evaluate(run, 0, 0);
    if (score.broken) return 130;
    if (!score.count)
        return fail(error, NULL, "no validation loss: the validation part has no targets");
    if (!isfinite(score.loss)) return fail(error, NULL, "the validation loss is %g", score.loss);
    printf("val_loss %.6f%s\n", score.loss, run->val_note);
    printf("perplexity %.6g\n", exp(score.loss));
    if (!isnan(score.bits_per_byte)) printf("bits_per_byte %.6f\n", score.bits_per_byte);
    if (!isnan(score.accuracy)) printf("val_accuracy %.6f\n", score.accuracy);
    for (int k = 0; k < LAG_BINS; k++) {
        if (isnan(score.by_lag[k])) continue;
        printf("lag %d to %lld %.6f\n", 1 << k, (2LL << k) - 1, score.by_lag[k]);
    }
    return 0;
}

// What is trained, and on what.
static void print_model(const Run *run) {
    const Options *o = &run->settings.values;
    const Config *c = &run->config;
    printf("%s: D %d, L %d, H %d, G %d, T %d, V %d, %.2fM parameters; ", o->mixer, c->d_model,
           c->n_layers, c->n_heads, c->n_kv_heads, c->max_seq_len, c->vocab_size,
           (double)run->table.count / 1e6);
    printf("%s%s, %d threads, %.0f MiB", run->backend->name, plain ? ", plain" : "",
           omp_get_max_threads(), run->backend->bytes(run->model) / 0x1p20);
    if (run->backend->ranks > 1) printf(" in each of %d processes", run->backend->ranks);
    printf("\n");
    int from_file = o->load || o->resume;
    char words[PATH_MAX];
    if (run->words.count && !from_file && words_beside(words, o->data))
        printf("vocabulary: the %d words of %s\n", run->words.count, words);
    else if (run->train.kind == DATA_SHARD && !from_file && !is_given(&run->settings, "vocab"))
        printf("vocabulary: %d, that of the tokenizer of such shards; --vocab names another\n",
               c->vocab_size);
    if (o->go_on && o->resume) {
        print_quoted(o->out);
        printf(" is there: its run goes on behind step %lld\n", (long long)o->step);
    }
    print_changes(run);
}

// Generates, evaluates or trains, as the options say. Returns 0, the exit code 130 after a signal,
// or an error.
static int perform(Run *run, const char *program, char *error) {
    const Options *o = &run->settings.values;
    if (!is_training(o)) install_handlers(WHILE_READING);
    if (!run->backend->rank) print_zeros(o->data, &run->train);
    if (!run->backend->rank) print_zeros(o->val, &run->val);
    if (o->eval) return print_evaluation(run, error);
    if (!o->generate) {
        print_model(run);
        return train(run, program, error);
    }
    int result = generate(run, run->prompts, run->n_prompts, o->generate, splitmix64((uint64_t)o->seed),
                          error);
    return result ? result : interrupted ? 130 : 0;
}

// Gives 0, 1 and 2 back to standard input, output and error where they were closed: else the first
// file that is opened takes the number, and gets what is printed. They read and write nothing, and
// printing still fails.
static void open_closed(void) {
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) < 0 && errno == EBADF &&
            open("/dev/null", fd ? O_RDONLY : O_WRONLY) != fd)
            return;
}

// Takes the stack that the deepest call will need: where memory is limited, the system kills a
// program whose stack cannot grow, and here an allocation fails later instead, which ends in a
// line.
__attribute__((noinline)) static void take_stack(void) {
    enum { PAGE = 4096, STACK = 176 << 10 };
    volatile char stack[STACK];
    for (int i = 0; i < STACK; i += PAGE) stack[i] = 0;
    (void)stack[0];
}

// Frees what a run holds.
static void run_free(Run *run) {
    if (run->model) run->backend->destroy(run->model);
    free(run->table.rows);
    free(run->inputs);
    free(run->targets);
    free(run->hits);
    free(run->order);
    free(run->prompt_text);
    free(run->prompts);
    free(run->old_best);
    free(run->rows);
    dataset_free(&run->train);
    dataset_free(&run->val);
    words_free(&run->words);
    safetensors_free(&run->file);
}

// Everything between the command line and the exit code.
static int run_program(int argc, char **argv, const Backend *backend) {
    char error[ERROR_SIZE] = "";
    Run run;
    memset(&run, 0, sizeof(run));
    run.backend = backend;
    run.order_epoch = -1;
    take_stack();
    open_closed();
    use_allowed_threads();
    atexit(remove_locks);
    int result = parse_options(&run.settings, argc, argv, error), told = result > 0;
    if (result == HELP) print_help(argv[0]);
    if (result == TELL_VERSION) print_version(backend);
    if (told) result = 0;
    size_t rows = sizeof(double) * MEETING * (size_t)backend->ranks;
    if (backend->ranks > 1 && !(run.rows = (double *)grow(NULL, rows)))
        result = fail(error, NULL, "out of memory");
    if (!result && !told) result = prepare(&run, error);
    if (!result && !told) {
        result = perform(&run, argv[0], error);
        if (backend->rank) *error = 0; // what can fail there fails on all, or where files are written
    }
    end_line(&run);
    if (!result && (fflush(stdout) || ferror(stdout)))
        result = fail(error, "standard output", "closed, or on a full disk");
    if (result) fflush(stdout); // before the line of the error
    if (result < 0 && *error) fprintf(stderr, "train_sessa: %s\n", error);
    remove_locks();
    run_free(&run);
    return result == WRONG_OPTION ? 2 : result == FAILED ? 1 : result;
}

// GNU's OpenMP reads before main how often a waiting thread looks before it sleeps, 300,000 times
// by default; so the program starts itself again, once, with that bounded. What the user says of
// it, and of the cores that threads are bound to, rules: a thread that OpenMP has bound would hand
// that on. Valgrind follows no program into its next start. Where it cannot be done the program
// goes on as it is; a program that it starts finds the environment as it was.
__attribute__((unused)) // by programs that include this file
static void start_again(char **argv) {
#if defined(_OPENMP) && defined(__linux__) && !defined(KMP_VERSION_MAJOR)
    static const char spins[] = "GOMP_SPINCOUNT", mark[] = "SESSA_STARTED_AGAIN";
    static const char *const of_user[] = {spins, "OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES",
                                          "GOMP_CPU_AFFINITY"};
    char path[PATH_MAX], text[32];
    const char *marked = getenv(mark), *preloaded = getenv("LD_PRELOAD");
    snprintf(text, sizeof(text), "%d", (int)getpid()); // the same after an exec
    if (marked) {
        if (!strcmp(marked, text)) unsetenv(spins);
        unsetenv(mark);
        return;
    }
    for (size_t i = 0; i < sizeof(of_user) / sizeof(of_user[0]); i++)
        if (getenv(of_user[i])) return;
    ssize_t length = readlink("/proc/self/exe", path, sizeof(path) - 1);
    int in_valgrind = preloaded && strstr(preloaded, "vgpreload");
    if (length < 0 || omp_get_max_threads() == 1 || in_valgrind) return;
    path[length] = 0;
    if (setenv(mark, text, 1)) return;
    snprintf(text, sizeof(text), "%d", SPINS);
    if (!setenv(spins, text, 1)) execv(path, argv);
    unsetenv(spins);
    unsetenv(mark);
#else
    (void)argv;
#endif
}

#ifndef SESSA_NO_MAIN // the test and the CUDA twin include this file and bring their own
int main(int argc, char **argv) {
    start_again(argv);
    return run_program(argc, argv, &cpu_backend);
}
#endif
