// generation: one token more of several sequences at once, in five to seven launches a layer. What a sequence
// gets is the same in any company, bit for bit: every sum has an order that knows nothing of the others. Where
// the sequences stand is in the device's memory, so that all launches are one recording.
//
// Weights are read once for up to 64 sequences. With up to ALONE of them a launch makes ready what its product
// reads (LayerNorm, the parts of attention) in every block, else in a launch of its own.

enum { DECODE_THREADS = 256, DECODE_WARPS = DECODE_THREADS / 32, DECODE_ROWS = 16, DECODE_AHEAD = 3, ALONE = 4 };

// ----------------------------------------------------------------------------
// products of few rows
//
// A block takes 16 rows of the weights and COLUMNS sequences, its warps every 8th piece of K: of 32 numbers on
// tensor cores (bf16), else of 4·V. A lane has V of them, of rows lane/4 and lane/4 + 8, and its first
// DECODE_AHEAD pieces in registers before it waits for what the launches before have made.

// A lane's share of a piece of two rows
template <int V, typename X> struct alignas(V == 1 ? sizeof(X) : 16) WeightPair { X row[2][V]; };
template <int V, typename X> __device__ inline void load_some(X *to_, const X *from) {
    if constexpr (V == 1) *to_ = *from;
    else for (int i = 0; i < V * (int)sizeof(X) / 16; i++) ((uint4 *)to_)[i] = load_16_ahead((const uint4 *)from + i);
}

// Sums of the two rows with COLUMNS sequences, by lanes as mma_bf16 has them.
template <int COLUMNS> struct TensorSums {
    enum { V = 8 };
    float c[COLUMNS / 8][4] = {};
    // in: numbers k .. k+7 of sequence 0; there: whether they are; columns: sequences
    __device__ void add(const WeightPair<8, bf16> &w, const bf16 *in, int64_t ld, int there, int columns) {
        uint4 a[2] = {};
        if (there) for (int r = 0; r < 2; r++) a[r] = *(const uint4 *)w.row[r];
        uint32_t low[4] = {a[0].x, a[1].x, a[0].y, a[1].y}, high[4] = {a[0].z, a[1].z, a[0].w, a[1].w};
#pragma unroll
        for (int i = 0; i < COLUMNS / 8; i++) {
            if (8 * i >= columns) break;
            int column = 8 * i + threadIdx.x % 32 / 4;
            uint4 x = {};
            if (there && column < columns) x = *(const uint4 *)(in + column * ld);
            uint32_t b[4] = {x.x, x.y, x.z, x.w};
            mma_bf16(c[i], low, b);
            mma_bf16(c[i], high, b + 2);
        }
    }
    __device__ void store(float *sums) { // (16,COLUMNS)
        int lane = threadIdx.x % 32;
        for (int i = 0; i < COLUMNS / 8; i++)
            for (int e = 0; e < 4; e++)
                sums[(lane / 4 + e / 2 * 8) * COLUMNS + 8 * i + lane % 4 * 2 + e % 2] = c[i][e];
    }
};
template <int COLUMNS, int V_, typename X> struct PlainSums {
    enum { V = V_ };
    float c[2][COLUMNS] = {};
    __device__ void add(const WeightPair<V, X> &w, const X *in, int64_t ld, int there, int columns) {
        if (!there) return;
#pragma unroll
        for (int column = 0; column < COLUMNS; column++) {
            if (column >= columns) break;
            float x[V];
            read_some<V>(x, in + column * ld);
            for (int e = 0; e < V; e++)
                for (int r = 0; r < 2; r++) c[r][column] = fmaf(get(w.row[r][e]), x[e], c[r][column]);
        }
    }
    __device__ void store(float *sums) {
        int lane = threadIdx.x % 32;
        for (int r = 0; r < 2; r++)
            for (int column = 0; column < COLUMNS; column++) {
                float sum = c[r][column];
                for (int other = 1; other < 4; other *= 2) sum += __shfl_xor_sync(~0u, sum, other);
                if (lane % 4 == column % 4) sums[(lane / 4 + 8 * r) * COLUMNS + column] = sum;
            }
    }
};

// weight (rows,K) times the rows that begin(room, row, n0, columns) gives or makes in `room`, of sequences
// n0 .. n0+columns-1 and ld apart: end(row, n, sums, room) is given the products of rows `row` and row + 1.
template <int COLUMNS, typename Sums, typename X, typename Begin, typename End>
__global__ void __launch_bounds__(DECODE_THREADS)
    decode_kernel(const X *weight, int64_t ld, int rows, int K, int N, int groups, Begin begin, End end) {
    enum { V = Sums::V, PIECE = 4 * V };
    extern __shared__ __align__(16) char decode_room[];
    float *sums = (float *)decode_room;
    char *room = decode_room + DECODE_WARPS * DECODE_ROWS * COLUMNS * sizeof(float);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = (int)(blockIdx.x / groups) * DECODE_ROWS,
        n0 = (int)(blockIdx.x % groups) * COLUMNS, columns = min(COLUMNS, N - n0),
        k0 = warp * PIECE + lane % 4 * V;
    const X *from[2];
    for (int r = 0; r < 2; r++) from[r] = weight + (int64_t)min(row + lane / 4 + 8 * r, rows - 1) * K;
    WeightPair<V, X> ahead[DECODE_AHEAD];
#pragma unroll
    for (int i = 0; i < DECODE_AHEAD; i++)
        for (int r = 0; r < 2; r++) load_some<V>(ahead[i].row[r], from[r] + min(k0 + i * DECODE_WARPS * PIECE, K - V));
    wait_for_results();
    const X *in = begin(room, row, n0, columns);
    Sums all;
#pragma unroll
    for (int i = 0; i < DECODE_AHEAD; i++) {
        int k = k0 + i * DECODE_WARPS * PIECE;
        all.add(ahead[i], in + min(k, K - V), ld, k < K, columns);
    }
#pragma unroll 2
    for (int piece = DECODE_AHEAD * DECODE_WARPS * PIECE; piece < K; piece += DECODE_WARPS * PIECE) {
        int k = k0 + piece;
        WeightPair<V, X> w;
        for (int r = 0; r < 2; r++) load_some<V>(w.row[r], from[r] + min(k, K - V));
        all.add(w, in + min(k, K - V), ld, k < K, columns);
    }
    all.store(sums + warp * DECODE_ROWS * COLUMNS);
    __syncthreads();
    for (int item = threadIdx.x; item < DECODE_ROWS / 2 * columns; item += DECODE_THREADS) {
        int r = item % (DECODE_ROWS / 2) * 2, n = item / (DECODE_ROWS / 2);
        float2 sum = {0, 0};
        for (int w = 0; w < DECODE_WARPS; w++) {
            const float *of_warp = sums + (w * DECODE_ROWS + r) * COLUMNS + n;
            sum.x += of_warp[0];
            sum.y += of_warp[COLUMNS];
        }
        if (row + r < rows) end(row + r, n0 + n, sum, room);
    }
}
// more: bytes of room
template <int COLUMNS, typename Sums, typename X, typename Begin, typename End>
static void decode_columns(const X *weight, int64_t ld, int rows, int K, int N, int more, cudaStream_t stream,
                           Begin begin, End end) {
    int groups = (N + COLUMNS - 1) / COLUMNS, tiles = (rows + DECODE_ROWS - 1) / DECODE_ROWS;
    LAUNCH((decode_kernel<COLUMNS, Sums, X, Begin, End>), tiles * groups, DECODE_THREADS,
           DECODE_WARPS * DECODE_ROWS * COLUMNS * (int)sizeof(float) + more, stream, weight, ld, rows, K, N,
           groups, begin, end);
}
template <typename X, typename Begin, typename End>
static void decode(const X *weight, int64_t ld, int rows, int K, int N, int more, cudaStream_t stream,
                   Begin begin, End end) {
    constexpr int EIGHT = 16 / sizeof(X);
    if (wide({K, ld}, {weight})) {
        if constexpr (sizeof(X) == sizeof(bf16)) {
            if (N <= 8) decode_columns<8, TensorSums<8>>(weight, ld, rows, K, N, more, stream, begin, end);
            else decode_columns<64, TensorSums<64>>(weight, ld, rows, K, N, more, stream, begin, end);
        } else if (N == 1) decode_columns<1, PlainSums<1, EIGHT, X>>(weight, ld, rows, K, N, more, stream, begin, end);
        else decode_columns<8, PlainSums<8, EIGHT, X>>(weight, ld, rows, K, N, more, stream, begin, end);
    } else if (N == 1) decode_columns<1, PlainSums<1, 1, X>>(weight, ld, rows, K, N, more, stream, begin, end);
    else decode_columns<8, PlainSums<8, 1, X>>(weight, ld, rows, K, N, more, stream, begin, end);
}
// From one sequence's row to the next where blocks make them, so that the rows lie in different banks, and
// their bytes; whether they do.
static int64_t decode_ld(int K) { return round_up(K, 64) + 32; }
template <typename X> static int decode_room(int K, int N) { return N * (int)decode_ld(K) * (int)sizeof(X); }
template <typename X> static int decode_alone(int K, int N, int more) {
    return N <= ALONE && decode_room<X>(K, N) + N * more <= 24 << 10;
}

// f(out, n) by a warp makes the row of K numbers that a product reads, of sequence n: in each of its blocks
// where that is worth it, else in `rows_` (N,K), in a launch before.
template <typename X, typename F> __global__ void decode_rows_kernel(X *out, int K, int N, F f) {
    wait_for_results();
    int n = blockIdx.x * DECODE_WARPS + threadIdx.x / 32;
    if (n < N) f(out + (int64_t)n * K, n);
}
template <typename X, typename F, typename End>
static void decode_behind(X *rows_, F f, const X *weight, int rows, int K, int N, cudaStream_t stream, End end) {
    int alone = decode_alone<X>(K, N, 0);
    int64_t ld = alone ? decode_ld(K) : K;
    if (!alone)
        LAUNCH((decode_rows_kernel<X, F>), (N + DECODE_WARPS - 1) / DECODE_WARPS, DECODE_THREADS, 0, stream, rows_,
               K, N, f);
    decode(weight, ld, rows, K, N, alone ? decode_room<X>(K, N) : 0, stream,
           [=] __device__ (char *room, int, int n0, int columns) {
        if (!alone) return (const X *)rows_ + (int64_t)n0 * K;
        for (int n = threadIdx.x / 32; n < columns; n += DECODE_WARPS) f((X *)room + n * ld, n0 + n);
        __syncthreads();
        return (const X *)room;
    }, [=] __device__ (int row, int n, float2 sum, const char *) { end(row, n, sum); });
}

// ----------------------------------------------------------------------------
// the launches of a layer

// [9, 10, 11], and the last LayerNorm with the head: out = W LayerNorm(x) + b, and GELU on the first `gelu`
// rows
template <typename X, typename O>
static void decode_in_gpu(O *out, X *rows_, const float *x, const float *ln_weight, const float *ln_bias,
                          const X *weight, const X *bias, int rows, int D, int gelu, int N,
                          cudaStream_t stream) {
    decode_behind(rows_, [=] __device__ (X *to_, int n) {
        const float *row = x + (int64_t)n * D;
        float sum = 0, squares = 0;
#pragma unroll 8
        for (int i = threadIdx.x % 32; i < D; i += 32) sum += row[i];
        float m = warp_sum(sum) / D;
#pragma unroll 8
        for (int i = threadIdx.x % 32; i < D; i += 32) squares = fmaf(row[i] - m, row[i] - m, squares);
        float r = 1 / sqrtf(warp_sum(squares) / D + 1e-5f);
#pragma unroll 8
        for (int i = threadIdx.x % 32; i < D; i += 32)
            to_[i] = to<X>(fmaf((row[i] - m) * r, ln_weight[i], ln_bias[i]));
    }, weight, rows, D, N, stream, [=] __device__ (int row, int n, float2 sum) {
        for (int r = row; r < row + 2 && r < rows; r++) {
            float v = (r == row ? sum.x : sum.y) + (bias ? get(bias[r]) : 0);
            out[(int64_t)n * rows + r] = to<O>(r < gelu ? gelu_gpu(get(to<X>(v))) : v);
        }
    });
}
// [14]: the projections of ā, turned by RoPE, to their place in the cache
template <typename X>
static void decode_projections_gpu(X *proj, int64_t step, const X *abar, const X *weight, const X *bias,
                                   Rope rope, const Next *next, int rows, int D, int turned, int N,
                                   cudaStream_t stream) {
    decode(weight, 2 * (int64_t)D, rows, D, N, 0, stream, [=] __device__ (char *, int, int n0, int) {
        return abar + (int64_t)n0 * 2 * D;
    }, [=] __device__ (int row, int n, float2 sum, const char *) {
        Next at = next[n];
        if (at.sequence < 0) return;
        float v[2] = {get(to<X>(sum.x + get(bias[row]))), get(to<X>(sum.y + get(bias[row + 1])))};
        if (row < turned) turn_pairs<2>(v, rope, at.first, row);
        X *out = proj + at.sequence * step + (int64_t)at.first * rows + row;
        out[0] = to<X>(v[0]);
        out[1] = to<X>(v[1]);
    });
}

// [15, 16, 17, 19]: the keys are dealt to parts, whose number follows from that of the keys alone; a block takes
// one, of a head or of the feedback, a head of its own, D wide, over the strict past, with s for values. It
// leaves its Σ e v, and its maximum and Σ e.
enum { DECODE_KEYS = 128, HEAD_PART = 64, FEEDBACK_PART = 16, FEEDBACK_PARTS = 128 };
typedef struct {
    int E, D, H, G, head_parts, feedback_parts; // at most: of a head, of the feedback
    int64_t proj_step, s_step;                  // from one sequence's cache to the next
    int64_t size;                               // numbers of parts a sequence
} DecodeShape;
static DecodeShape decode_shape(const Config *c, int64_t proj_step, int64_t s_step) {
    int H = c->n_heads, D = c->d_model, head_parts = H > 192 ? 1 : min_int(32, 192 / H),
        feedback_parts = c->mixer == SESSA ? FEEDBACK_PARTS : 0;
    return {proj_width(c), D, H, c->n_kv_heads, head_parts, feedback_parts, proj_step, s_step,
            round_up((int64_t)(head_parts + feedback_parts) * D + 2 * (H * head_parts + feedback_parts), 64)};
}
__device__ static inline int parts_of(int keys, int size, int most) { // size: a power of two
    return max(1, min(most, (keys + size - 1) / size));
}
// How a block's threads share a part of rows `width` wide: 2^lanes threads a key's product; sums over values by
// `groups` of `across` threads, each every groups-th row.
typedef struct { int lanes, across, groups; } DecodeThreads;
template <int V> static DecodeThreads decode_threads(int width) {
    int pieces = width / V, lanes = 5;
    auto idle = [&](int n) { return ((pieces + (1 << n) - 1) >> n << n) - pieces; }; // of lanes, a key
    while (lanes > 0 && 1 << (lanes - 1) >= pieces) lanes--;
    while (lanes > 3 && idle(lanes - 1) < idle(lanes)) lanes--;
    int across = min_int(pieces, DECODE_THREADS);
    return {lanes, across, DECODE_THREADS / across};
}
// Where the parts of head h (H: the feedback) begin: their sums, their maxima with Σ e
__device__ static inline int64_t part_sums(const DecodeShape &s, int h) {
    return h < s.H ? (int64_t)h * s.head_parts * (s.D / s.H) : (int64_t)s.head_parts * s.D;
}
__device__ static inline int64_t part_stats(const DecodeShape &s, int h) {
    return (int64_t)(s.head_parts + s.feedback_parts) * s.D + 2 * (int64_t)h * s.head_parts;
}

// V numbers as they are in memory, so that many on their way take few registers
template <int V, typename X> struct alignas(V == 1 ? sizeof(X) : 16) Raw { X x[V]; };
template <int V, typename X> __device__ inline void read_raw(Raw<V, X> &raw, const X *from) {
    if constexpr (V == 1) raw.x[0] = *from;
    else for (int i = 0; i < V * (int)sizeof(X) / 16; i++) ((uint4 *)raw.x)[i] = ((const uint4 *)from)[i];
}

// logit[j] = scale q·k_j of n keys: 2^lanes threads a key, of which each has ROUNDS keys with PIECES of their
// columns on their way at once
template <int V, int ROUNDS, int PIECES, typename X>
__device__ inline void decode_logits(float *logit, const X *q, const X *k, int ld, int n, int width,
                                     int lanes, float scale) {
    int apart = DECODE_THREADS >> lanes, lane = threadIdx.x & ((1 << lanes) - 1), own = threadIdx.x >> lanes;
    for (int j0 = 0; j0 < n; j0 += ROUNDS * apart) {
        float dot[ROUNDS] = {};
        for (int i0 = lane * V; i0 < width; i0 += PIECES * V << lanes) {
            float a[V];
            Raw<V, X> b[PIECES][ROUNDS];
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                int i = i0 + (p * V << lanes);
#pragma unroll
                for (int r = 0; r < ROUNDS; r++)
                    if (i < width) read_raw<V>(b[p][r], k + min(j0 + own + r * apart, n - 1) * ld + i);
            }
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                int i = i0 + (p * V << lanes);
                if (i >= width) break;
                read_some<V>(a, q + i);
#pragma unroll
                for (int r = 0; r < ROUNDS; r++)
                    for (int e = 0; e < V; e++) dot[r] += a[e] * get(b[p][r].x[e]);
            }
        }
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            int j = j0 + own + r * apart;
            for (int other = 1 << lanes >> 1; other; other /= 2) dot[r] += __shfl_xor_sync(~0u, dot[r], other);
            if (lane == 0 && j < n) logit[j] = scale * dot[r];
        }
    }
}
// acc += Σ_j e_j v_j over every groups-th of n rows from `group` on, ROUNDS of them on their way at once
template <int V, int ROUNDS, typename X>
__device__ inline void decode_values(float acc[V], const float *e, const X *v, int ld, int n, int group,
                                     int groups) {
    for (int j0 = group; j0 < n; j0 += ROUNDS * groups) {
        Raw<V, X> rows[ROUNDS];
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) read_raw<V>(rows[r], v + min(j0 + r * groups, n - 1) * ld);
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            float e_j = j0 + r * groups < n ? e[j0 + r * groups] : 0;
            for (int i = 0; i < V; i++) acc[i] += e_j * get(rows[r].x[i]);
        }
    }
}
// One part: keys k and values v, n of each, ld_k and ld_v apart; `out` (width): Σ e v, stats: the maximum, Σ e.
// sums: shared, for each group of threads that spans the width
template <int V, typename X>
__device__ inline void decode_part(float *out, float *stats, float *sums, const X *q, const X *k, int ld_k,
                                   const X *v, int ld_v, int n, int width, DecodeThreads by) {
    __shared__ float logit[DECODE_KEYS];
    __shared__ float e[DECODE_KEYS];
    int lane = threadIdx.x % 32, pieces = width / V, apart = DECODE_THREADS >> by.lanes,
        group = threadIdx.x / by.across, first = threadIdx.x - group * by.across;
    float max_ = -INFINITY, total = 0, scale = 1 / sqrtf((float)width);
    for (int j0 = 0; j0 < n; j0 += DECODE_KEYS) {
        int some = min(DECODE_KEYS, n - j0);
        const X *keys = k + (int64_t)j0 * ld_k;
        int two = some <= 2 * apart, deep = pieces > 1 << by.lanes;
        if (two && deep) decode_logits<V, 1, 3>(logit, q, keys, ld_k, some, width, by.lanes, scale);
        else if (two) decode_logits<V, 2, 1>(logit, q, keys, ld_k, some, width, by.lanes, scale);
        else decode_logits<V, 4, 1>(logit, q, keys, ld_k, some, width, by.lanes, scale);
        __syncthreads();
        float own[DECODE_KEYS / 32], top = max_, sum = 0;
#pragma unroll
        for (int i = 0; i < DECODE_KEYS / 32; i++) {
            own[i] = lane + 32 * i < some ? logit[lane + 32 * i] : -INFINITY;
            top = fmaxf(top, own[i]);
        }
        top = warp_max(top);
        float shrink = __expf(max_ - top);
        max_ = top;
#pragma unroll
        for (int i = 0; i < DECODE_KEYS / 32; i++) {
            if (32 * i >= some) break;
            own[i] = __expf(own[i] - max_);
            sum += own[i];
            if (threadIdx.x < 32) e[lane + 32 * i] = own[i];
        }
        total = total * shrink + warp_sum(sum);
        __syncthreads();
        for (int piece = first; piece < pieces && group < by.groups; piece += by.across) {
            float *sum_at = sums + group * width + piece * V, acc[V] = {};
            if (j0) read_some<V>(acc, sum_at);
            for (int i = 0; i < V; i++) acc[i] *= shrink;
            const X *values = v + (int64_t)j0 * ld_v + piece * V;
            if (some <= 2 * by.groups) decode_values<V, 2>(acc, e, values, ld_v, some, group, by.groups);
            else decode_values<V, 4>(acc, e, values, ld_v, some, group, by.groups);
            write_some<V>(sum_at, acc);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) { stats[0] = max_; stats[1] = total; }
    for (int i = threadIdx.x; i < width; i += DECODE_THREADS) {
        float sum = 0;
        for (int g = 0; g < by.groups && n; g++) sum += sums[g * width + i];
        out[i] = sum;
    }
}
// A block takes parts block, block + blocks, ... of its head's; those of heads come before those of the feedback.
// BLOCKS: of a multiprocessor, which its registers suffice for
template <int V, int BLOCKS, typename X>
__global__ void __launch_bounds__(DECODE_THREADS, BLOCKS)
    decode_attention_kernel(float *parts, float *gamma, const X *proj, const X *s, const X *abar,
                            const float *gamma_weight, const float *gamma_bias, float gamma_max,
                            const Next *next, DecodeShape shape, DecodeThreads of_head, DecodeThreads of_feedback,
                            int head_blocks, int feedback_blocks, int few) {
    extern __shared__ __align__(16) float sums[];
    int D = shape.D, H = shape.H, E = shape.E, d = D / H, n_seq = blockIdx.y, place = blockIdx.x,
        feedback = place >= H * head_blocks, head = feedback ? H : place / head_blocks,
        block = place - head * head_blocks,
        blocks = feedback ? feedback_blocks : head_blocks, width = feedback ? D : d;
    Next at = next[n_seq];
    int keys = at.first + !feedback, ld = feedback ? D : E, kv = feedback ? 0 : head / (H / shape.G) * d,
        all = feedback ? parts_of(keys, FEEDBACK_PART, shape.feedback_parts)
                       : parts_of(keys, HEAD_PART, shape.head_parts),
        size = keys / all, more = keys - size * all; // the first `more` parts have a key more
    int idle = at.sequence < 0 || block >= all, gains = feedback && block == feedback_blocks;
    proj += at.sequence * shape.proj_step;
    s += at.sequence * shape.s_step;
    const X *q = proj + (int64_t)at.first * E + (feedback ? E - 2 * D : head * d),
            *k = proj + (feedback ? E - D : D + kv), *v = feedback ? s : proj + D + shape.G * d + kv;
    if (few && !idle && !gains) { // on their way to the L2 cache
        int lines = (width * (int)sizeof(X) + 127) / 128, n = size + (block < more);
        int64_t from = (int64_t)block * size + min(block, more);
        for (int i = threadIdx.x; i < 2 * lines * n; i += DECODE_THREADS) {
            int64_t j = from + i / (2 * lines);
            prefetch_l2((const char *)(i / lines % 2 ? v + j * ld : k + j * E) + i % lines * 128);
        }
    }
    wait_for_results();
    if (gains) { // [18]: the block after those of the feedback's parts
        if (at.sequence < 0 || threadIdx.x >= 32) return;
        float dot = 0;
        for (int i = threadIdx.x; i < D; i += 32)
            dot = fmaf(get(abar[(int64_t)n_seq * 2 * D + i]), gamma_weight[i], dot);
        dot = warp_sum(dot);
        if (threadIdx.x == 0) gamma[n_seq] = gain_forward_gpu(dot, gamma_bias[0], gamma_max);
        return;
    }
    if (idle) return;
    parts += n_seq * shape.size;
    float *stats = parts + part_stats(shape, head), *out = parts + part_sums(shape, head);
    for (int part = block; part < all; part += blocks) {
        int64_t from = (int64_t)part * size + min(part, more);
        decode_part<V>(out + (int64_t)part * width, stats + 2 * part, sums, q, k + from * E, E, v + from * ld, ld,
                       size + (part < more), width, feedback ? of_feedback : of_head);
    }
}
template <typename X>
static void decode_attention_gpu(float *parts, float *gamma, const X *proj, const X *s, const X *abar,
                                 const float *gamma_weight, const float *gamma_bias, float gamma_max,
                                 const Next *next, DecodeShape shape, int N, cudaStream_t stream) {
    int D = shape.D, d = D / shape.H, widest = shape.feedback_parts ? D : d,
        floats = widest > 8 * DECODE_THREADS ? widest : 8 * DECODE_THREADS,
        in_eights = wide({D, d, shape.E, shape.proj_step, shape.s_step}, {proj, s}),
        turns = N <= 8 ? 1 : 4, // parts a block, where all are there: blocks enough, and fewer that find none
        head_blocks = (shape.head_parts + turns - 1) / turns,
        feedback_blocks = (shape.feedback_parts + turns - 1) / turns,
        blocks = shape.H * head_blocks + (feedback_blocks ? feedback_blocks + 1 : 0);
    constexpr int BLOCKS = sizeof(X) == sizeof(bf16) ? 4 : 2;
    DecodeThreads of_head = in_eights ? decode_threads<8>(d) : decode_threads<1>(d),
                  of_feedback = in_eights ? decode_threads<8>(D) : decode_threads<1>(D);
    LAUNCH((in_eights ? decode_attention_kernel<8, BLOCKS, X> : decode_attention_kernel<1, BLOCKS, X>),
           dim3(blocks, N), DECODE_THREADS, floats * (int)sizeof(float), stream, parts, gamma, proj, s, abar,
           gamma_weight, gamma_bias, gamma_max, next, shape, of_head, of_feedback, head_blocks, feedback_blocks,
           N <= ALONE);
}

// The parts come together: factor e^(max - top)/Σ of each of a head's, by a warp
__device__ static inline void decode_factors(float *factor, const float *parts, const DecodeShape &shape, int h,
                                             int n) {
    const float2 *stats = (const float2 *)(parts + part_stats(shape, h));
    float top = -INFINITY, sum = 0;
    for (int p = threadIdx.x % 32; p < n; p += 32) top = fmaxf(top, stats[p].x);
    top = warp_max(top);
    for (int p = threadIdx.x % 32; p < n; p += 32) {
        factor[p] = top == -INFINITY ? 0 : __expf(stats[p].x - top);
        sum = fmaf(factor[p], stats[p].y, sum);
    }
    sum = warp_sum(sum);
    for (int p = threadIdx.x % 32; p < n; p += 32) factor[p] *= sum == 0 ? 0 : 1 / sum;
}
// Σ_p factor_p part_p of one column, of every PART_SUMS-th part from p0 on, and of all: sums of these in order
enum { PART_SUMS = 16 };
__device__ static inline float every_part(const float *column, int64_t ld, const float *factor, int n, int p0) {
    float sum = 0;
    for (int p = p0; p < n; p += PART_SUMS) sum = fmaf(factor[p], column[p * ld], sum);
    return sum;
}
__device__ static inline float all_parts(const float *column, int64_t ld, const float *factor, int n) {
    float sums[PART_SUMS] = {}, all = 0;
    for (int p = 0; p < n; p += PART_SUMS)
#pragma unroll
        for (int i = 0; i < PART_SUMS; i++)
            if (p + i < n) sums[i] = fmaf(factor[p + i], column[(p + i) * ld], sums[i]);
    for (int i = 0; i < PART_SUMS; i++) all += sums[i];
    return all;
}
// o (D), and c (D), of a sequence from its parts, by blocks of some columns
template <typename X>
__global__ void decode_combine_kernel(X *o, float *c, const float *parts, const Next *next, DecodeShape shape) {
    extern __shared__ float factor[];
    wait_for_results();
    int n = blockIdx.y, D = shape.D, H = shape.H, d = D / H, i = blockIdx.x * DECODE_THREADS + threadIdx.x,
        first_head = (int)blockIdx.x * DECODE_THREADS / d,
        last_head = min(H - 1, ((int)blockIdx.x * DECODE_THREADS + DECODE_THREADS - 1) / d);
    Next at = next[n];
    if (at.sequence < 0) return;
    parts += n * shape.size;
    int of_head = parts_of(at.first + 1, HEAD_PART, shape.head_parts),
        of_feedback = parts_of(at.first, FEEDBACK_PART, shape.feedback_parts);
    float *feedback = factor + (int64_t)H * shape.head_parts;
    for (int h = first_head + (int)threadIdx.x / 32; h <= last_head; h += DECODE_WARPS)
        decode_factors(factor + h * shape.head_parts, parts, shape, h, of_head);
    if (shape.feedback_parts && threadIdx.x < 32) decode_factors(feedback, parts, shape, H, of_feedback);
    __syncthreads();
    if (i >= D) return;
    o[(int64_t)n * D + i] = to<X>(all_parts(parts + part_sums(shape, i / d) + i % d, d,
                                            factor + i / d * shape.head_parts, of_head));
    if (shape.feedback_parts)
        c[(int64_t)n * D + i] = all_parts(parts + part_sums(shape, H) + i, D, feedback, of_feedback);
}

// The direct read f = W_o o, [19-22] s = f + γ c and the gate. plain_: no W_o, f = o
template <typename X>
static void decode_mix_gpu(X *s, X *gated, X *o, float *c, const float *parts, const float *gamma,
                           const X *weight, const X *g, const Next *next, DecodeShape shape, int plain_, int N,
                           cudaStream_t stream) {
    int D = shape.D, H = shape.H, d = D / H, factors = H * shape.head_parts + shape.feedback_parts,
        feedback = shape.feedback_parts > 0, more = (factors + PART_SUMS * DECODE_ROWS) * (int)sizeof(float),
        alone = decode_alone<X>(D, N, more), rows_bytes = decode_room<X>(D, N);
    int64_t ld = alone ? decode_ld(D) : D;
    if (!alone)
        LAUNCH(decode_combine_kernel<X>, dim3((D + DECODE_THREADS - 1) / DECODE_THREADS, N), DECODE_THREADS,
               factors * (int)sizeof(float), stream, o, c, parts, next, shape);
    decode(weight, ld, D, D, N, alone ? rows_bytes + N * more : 0, stream,
           [=] __device__ (char *room, int row, int n0, int columns) {
        if (!alone) return (const X *)o + (int64_t)n0 * D;
        float *factor = (float *)(room + rows_bytes);
        for (int item = threadIdx.x / 32; item < columns * (H + feedback); item += DECODE_WARPS) {
            int n = item / (H + feedback), h = item % (H + feedback), first = next[n].first;
            if (next[n].sequence >= 0)
                decode_factors(factor + n * factors + h * shape.head_parts, parts + n * shape.size, shape, h,
                               h < H ? parts_of(first + 1, HEAD_PART, shape.head_parts)
                                     : parts_of(first, FEEDBACK_PART, shape.feedback_parts));
        }
        __syncthreads();
        for (int n = 0; n < columns; n++) {
            const float *of_n = parts + n * shape.size, *own = factor + n * factors;
            int first = next[n].first, of_head = parts_of(first + 1, HEAD_PART, shape.head_parts),
                of_feedback = parts_of(first, FEEDBACK_PART, shape.feedback_parts);
            if (next[n].sequence < 0) continue;
            for (int i = threadIdx.x; i < D; i += DECODE_THREADS)
                ((X *)room)[n * ld + i] = to<X>(all_parts(of_n + part_sums(shape, i / d) + i % d, d,
                                                          own + i / d * shape.head_parts, of_head));
            // c of the block's rows, every PART_SUMS-th part a thread
            int r = threadIdx.x % DECODE_ROWS, p0 = threadIdx.x / DECODE_ROWS;
            float *partial = factor + columns * factors + n * PART_SUMS * DECODE_ROWS;
            if (feedback)
                partial[p0 * DECODE_ROWS + r] =
                    every_part(of_n + part_sums(shape, H) + min(row + r, D - 1), D, own + H * shape.head_parts,
                               of_feedback, p0);
        }
        __syncthreads();
        return (const X *)room;
    }, [=] __device__ (int row, int n, float2 f, const char *room) {
        Next at = next[n];
        if (at.sequence < 0) return;
        const float *partial = (const float *)(room + rows_bytes) + N * factors + n * PART_SUMS * DECODE_ROWS;
        const X *own = alone ? (const X *)room + n * ld : o + (int64_t)n * D;
        for (int i = row; i < row + 2; i++) {
            float past = 0, direct = plain_ ? get(own[i]) : i == row ? f.x : f.y;
            if (feedback && alone)
                for (int p = 0; p < PART_SUMS; p++) past += partial[p * DECODE_ROWS + i % DECODE_ROWS];
            else if (feedback) past = c[(int64_t)n * D + i];
            float v = get(to<X>(direct));
            if (feedback) v = fmaf(gamma[n], past, v);
            s[at.sequence * shape.s_step + (int64_t)at.first * D + i] = to<X>(v);
            gated[(int64_t)n * D + i] = to<X>(get(to<X>(v)) * get(g[(int64_t)n * 2 * D + i]));
        }
    });
}
// [13]: the residual
template <typename X>
static void decode_out_gpu(float *x, const X *gated, const X *weight, const X *bias, int D, int N,
                           cudaStream_t stream) {
    decode(weight, D, D, D, N, 0, stream, [=] __device__ (char *, int, int n0, int) {
        return gated + (int64_t)n0 * D;
    }, [=] __device__ (int row, int n, float2 sum, const char *) {
        float *out = x + (int64_t)n * D + row;
        out[0] += sum.x + get(bias[row]);
        out[1] += sum.y + get(bias[row + 1]);
    });
}

// Whether the launches' shared memory suffices: a row of sums, a factor for each part.
static int decodes(const Config *c) {
    DecodeShape shape = decode_shape(c, 0, 0);
    return 4 * (int64_t)c->d_model <= 40 << 10 &&
           4 * ((int64_t)shape.H * shape.head_parts + shape.feedback_parts) <= 40 << 10;
}

// Numbers of parts a sequence
static int64_t decode_numbers(const Config *c) { return decode_shape(c, 0, 0).size; }

// One token more of N sequences, of whom `next` says where they are.
template <typename X> static void hidden_decode_gpu(ModelGPU<X> *m, int N, cudaStream_t stream) {
    const Config *c = &m->host.config;
    int D = c->d_model, H = c->n_heads, G = c->n_kv_heads, d = D / H, E = proj_width(c);
    const Next *next = (const Next *)m->inputs->ids;
    DecodeGPU<X> *a = &m->acts.decode;
    DecodeShape shape = decode_shape(c, a->proj_step, a->s_step);
    Rope rope = {m->acts.cosine, m->acts.sine, m->host.T, d / 2, 0, 1};
    const float *wte = m->weights.wte;
    float *x = a->x;
    each(N, D, wide({D}, {x, wte}), stream, [=] __device__ (auto SPAN, int n, int i) {
        write(x + (int64_t)n * D + i, read<SPAN>(wte + (int64_t)next[n].token * D + i));
    });
    for (int l = 0; l < c->n_layers; l++) {
        LayerWeights *w = &m->weights.layers[l];
        LayerActivationsGPU<X> *cache = &m->acts.layers[l];
        decode_in_gpu(a->ag, a->row, x, w->ln_weight, w->ln_bias, as_x(m, w->W_in), as_x(m, w->b_in), 2 * D, D,
                      D, N, stream);
        decode_projections_gpu(cache->proj, a->proj_step, a->ag, as_x(m, w->W_proj), as_x(m, w->b_proj), rope,
                               next, E, D, c->no_rope ? 0 : (H + G) * d, N, stream);
        decode_attention_gpu(a->parts, a->gamma, cache->proj, cache->s, a->ag, w->gamma_weight, w->gamma_bias,
                             (float)c->gamma_max, next, shape, N, stream);
        decode_mix_gpu(cache->s, a->gated, a->row, a->c, a->parts, a->gamma, as_x(m, w->W_o ? w->W_o : w->W_out),
                       a->ag + D, next, shape, !w->W_o, N, stream);
        decode_out_gpu(x, a->gated, as_x(m, w->W_out), as_x(m, w->b_out), D, N, stream);
    }
    decode_in_gpu(a->logits, a->row, x, m->weights.ln_f_weight, m->weights.ln_f_bias, as_x(m, m->weights.wte),
                  (const X *)NULL, c->vocab_size, D, 0, N, stream);
}
