// the feedback path
//
// In row panels of R rows, whose weights e (the softmax's, see above) lie in `weights`, and within them in
// blocks of P rows, whose inverses M = (I - A_II)^-1 turn the row by row step into products. α = e/z is
// never formed: γ/z is a float32 scale of rows, for in bf16 a γα of 0.999 would be 1. For a block I
//     g = f + (γ/z) ⊙ (e_{I,<} s_<),   s = M g
// Kept besides s: c = (e s)/z, for the backward pass' δ_t = λ_t·c_t.
//
// Rounded to bf16, M and g would each add to s's error about what rounding s costs. So with tiles
// each is the sum of two bf16 numbers, hi = X(v) and lo = X(v - hi), and the product is of three,
//     M g = M_hi g_hi + M_lo g_hi + M_hi g_lo
// Without tiles they are one number, and a refinement follows: r = g + (γ/z) ⊙ (e_II s) - s, s += M r.
//
// With tiles, in bf16, each line above is one product that ends in the functions below, and e comes
// out of the logits' product: e = exp(logit - m) needs no exact maximum, only one within the numbers'
// range, so m is 0 unless a row's maximum is beyond e^±40; those rows are done again. Without, products are
// cuBLASLt's, and m is the maximum.

enum { SEED = 64, BLOCK = 2 * SEED, REACH = 2048, CLUSTER = 8, N_PARTS = 10 };

// How the feedback goes, for all batches of up to B sequences of up to T tokens, and what `weights` and
// scratch hold for it: where each part begins, in floats, and its shape. Without tiles T ≤ 2048 is one
// panel and e has 256 MiB at most; with them, 512. A panel's rows take what is before it REACH rows at a
// time. keep: e takes no more than twice of what a layer keeps besides (28·D bytes a token), or is not
// kept. A smaller batch, or shorter sequences, leave parts of it unused.
typedef struct {
    int B, T, asked;  // asked: the height of panels that a test wants, or 0
    // R, P: heights of panels and of blocks; march: solved by one kernel, in clusters of so many blocks
    int tiles, march, R, P;
    int kept;         // weights stay as they are for the backward pass, in one panel
    int lo;           // columns from the first to the second part of M, 0: it has one
    // columns of the product's tiles, 192 or 256: of logits and their gradient, of dq' and dk'; 0: 128 or 64
    int wide_logits, wide_sums;
    // dq' of a panel is few tiles and long sums: what its rows get from those before is cuBLASLt's product,
    // which cuts the sums in pieces
    int apart;
    int64_t ld, lx;   // from row to row of e: in floats before the softmax (without tiles), in X
    int64_t ld_m;     // and of M, in X
    int64_t rows;     // of a panel: R, and T at most
    int64_t e_step, m_step; // from one sequence's e, M to the next: in X
    int64_t e;        // weights: (B,rows,ld)
    int64_t inverse;  // (B,rows,P) X, the blocks of M on its diagonal; in two parts (B,rows,2P)
    int64_t weights;  // both
    int64_t rhs;      // scratch: (B,T,D) the sum e_{I,<} s_<; backward λ's right-hand side h
    int64_t block;    // (B,P,D) X, what M multiplies; in two parts (B,P,2D)
    int64_t lambda;   // (B,P,D), D rounded up to tiles; the march's g on its way round, (B,2P,D) X
    int64_t merge;    // (B,R/P,P/2,P/2) X; in two parts (B,R/P,P/2,P)
    int64_t dk;       // (B,T,D) dk' while several panels add to it
    int64_t partial;  // tiles: (B,T/128,rows) maxima and sums of the tiles' rows
    int64_t flags;    // tiles: (B,rows/128) which rows to do again
    int64_t product;  // no tiles: (B,P,ld or D), a product before it is passed on
    int64_t total;
    // where each part's numbers end, in this order; behind them a band in a build for tests
    int64_t ends[N_PARTS];
} Panels;
// Wide tiles (hopper.cuh) where there are enough for most of the 132 multiprocessors, and sequences so long
// that little of them lies above the diagonal (measured: of 256 tokens a step is 0.5 % slower). Of their widths
// dq' and dk' take the one with which they are done first: the longest sum has one multiprocessor, or all
// sums, half as long where the panel is the whole, have all. 132 are an H200's, whatever else the exchange between
// GPUs takes of them: the choice is part of the bits.
static void feedback_wide_tiles(Panels *p, int D) {
    enum { MOST = 132, ENOUGH = 96, SHORT = 512 };
    if (p->T <= SHORT) return;
    int64_t logits = 0, rows = (p->rows + BLOCK - 1) / BLOCK;
    for (int64_t m0 = 0; m0 < p->rows; m0 += BLOCK) logits += (p->T - p->rows + m0 + BLOCK + 255) / 256;
    p->wide_logits = p->B * logits >= ENOUGH ? 256 : 0;
    double least = INFINITY;
    for (int columns = 256; columns >= 192; columns -= 64) {
        int64_t across = (D + columns - 1) / columns, tiles = p->B * rows * across;
        double each = tiles * (1 - 0.5 * (double)p->rows / p->T) / MOST, time = columns * (each > 1 ? each : 1);
        if (tiles < ENOUGH || 3 * across * columns > 4 * (int64_t)D || time >= least) continue;
        least = time;
        p->wide_sums = columns;
    }
}
template <typename X>
static Panels feedback_panels(int B, int T, int D, int P, int in_eights = 1, int keep = 0) {
    Panels p = {};
    p.B = B;
    p.T = T;
    p.asked = P;
    if (plain) {
        p.total = feedback_scratch_gpu(B, T, D);
        return p;
    }
    p.tiles = gpu.tiles && sizeof(X) == 2 && D % 8 == 0 && in_eights && P % 8 == 0;
    p.ld = round_up(T, 64);
    p.lx = p.tiles ? p.ld : p.ld * (int64_t)(sizeof(float) / sizeof(X));
    int alone = p.tiles && P <= 0;
    p.march = alone && gpu.hopper && (int64_t)B * ((D + 127) / 128) >= 48;
    if (alone && T > REACH) p.march = gpu.clusters ? CLUSTER : 0;
    // measured
    p.P = P > 0 || T <= BLOCK || p.march == 1 ? BLOCK
          : T <= 512                          ? 2 * BLOCK
          : T <= 2048                         ? 4 * BLOCK
                                              : 8 * BLOCK;
    while (P <= 0 && p.P > 2 * BLOCK && B * (int64_t)(p.P / (2 * BLOCK)) > MOST_SEQUENCES) // pairs that merge
        p.P /= 2;
    int most = 11 * D / p.P * p.P; // rows of e that a layer may need for a while
    p.kept = keep && alone && T <= 28 * D && (int64_t)B * T * p.ld <= 1 << 28;
    p.R = P > 0 ? min_int(P, BLOCK) : p.kept ? T : !p.tiles || most < REACH ? REACH : most;
    if (p.P < p.march * BLOCK) p.march = 0;
    p.lo = p.tiles ? p.P : 0;
    p.ld_m = p.P + p.lo;
    p.R = min_int(p.R, (int)round_up(T, p.P));
    while (P <= 0 && p.R > p.P && (int64_t)B * p.R * p.ld > (p.tiles ? 1 << 28 : 1 << 26))
        p.R = (int)round_up(p.R / 2, p.P);
    p.rows = min_int(p.R, T);
    if (alone && gpu.hopper) feedback_wide_tiles(&p, D);
    p.apart = p.tiles && p.R < T && few_tiles(p.rows, D, B);
    p.e_step = p.rows * p.lx;
    p.m_step = p.rows * p.ld_m;
    int64_t x = sizeof(X), rows = p.rows, block = min_int(p.P, T), wide_ = p.ld > D ? p.ld : D,
        all = (int64_t)T * D, tiles = (T + BLOCK - 1) / BLOCK, parts = p.lo ? 2 : 1;
    int64_t sizes[] = {p.tiles ? rows * p.ld / 2 : rows * p.ld,
                       rows * p.ld_m * x / 4,
                       all,
                       parts * block * D * x / 4,
                       block * round_up(D, ATOM),
                       parts * round_up(rows, 2 * p.P) * p.P / 4 * x / 4,
                       p.R < T ? all : 0,
                       p.tiles ? 2 * tiles * rows : 0,
                       p.tiles ? (rows + BLOCK - 1) / BLOCK : 0,
                       p.tiles ? 0 : block * wide_};
    int64_t *places[] = {&p.e,     &p.inverse, &p.rhs,     &p.block, &p.lambda,
                         &p.merge, &p.dk,      &p.partial, &p.flags, &p.product};
    for (int i = 0; i < N_PARTS; i++) {
        int64_t *end = i < 2 ? &p.weights : &p.total;
        *places[i] = *end;
        p.ends[i] = *end + B * sizes[i];
        *end += round_up(B * sizes[i] + 1, 64) + GUARD / (int64_t)sizeof(float);
    }
    return p;
}

// e of the logits v, a row's maximum and sum, and from these m and 1/z. `again`: only rows that need
// another m.
struct LogitExp {
    bf16 *e;
    const float2 *stats;  // NULL: m is 0
    const int *flags;     // NULL: all rows
    float2 *partial;
    int64_t ld, e_step, stats_step;
    float scale;          // in units of log2
    int r0, R, tiles, blocks;
    __device__ int wanted(int b, int m0) const { return !flags || flags[b * blocks + m0 / BLOCK]; }
    __device__ float2 run_some(int b, int r, int i, float v[8]) const {
        float m = stats ? stats[b * stats_step + r].x : 0, top = -INFINITY, sum = 0;
        for (int c = 0; c < 8; c++) {
            float logit = v[c] * scale;
            int seen = i + c < r0 + r;
            top = seen ? fmaxf(top, logit) : top;
            v[c] = seen ? get(to<bf16>(exp2_fast(logit - m))) : 0;
            sum += v[c];
        }
        write_some<8>(e + b * e_step + r * ld + i, v);
        return {top, sum};
    }
    __device__ void row(int b, int r, int tile, float2 sums) const {
        if (partial) partial[((int64_t)b * tiles + tile) * R + r] = sums;
    }
    // By twos: sums are a maximum and a sum so far.
    struct Row { float m; float2 sums; };
    MatrixGPU<bf16> place() const { return {e, ld, 1, e_step}; }
    __device__ Row row_of(int b, int r) const {
        return {stats ? stats[b * stats_step + r].x : 0, {-INFINITY, 0}};
    }
    __device__ uint32_t two(Row &row, int r, int i, float2 &v, uint32_t) const {
        int seen = r0 + r - i; // 1: the first, more: both
        v.x *= scale;
        v.y *= scale;
        if (seen > 0) row.sums.x = fmaxf(row.sums.x, v.x);
        if (seen > 1) row.sums.x = fmaxf(row.sums.x, v.y);
        uint32_t both = pack_two(seen > 0 ? exp2_fast(v.x - row.m) : 0, seen > 1 ? exp2_fast(v.y - row.m) : 0);
        row.sums.y += low_of(both) + high_of(both);
        return both;
    }
};
template <> constexpr int sums_rows<LogitExp> = 1;
template <> constexpr int by_twos<LogitExp> = 1;
// A block takes 128 rows; of a row's tiles thread number `part` takes each STATS_PARTS-th, and the first adds
// up, part after part. Up to 1024 tokens that is the order of the tiles.
enum { STATS_PARTS = 8 };
__global__ static void __launch_bounds__(STATS_PARTS * BLOCK)
    feedback_stats_kernel(float2 *stats, int64_t stats_step, const float2 *partial, int *flags, int again,
                          int r0, int n, int R, int tiles) {
    __shared__ float2 parts[STATS_PARTS][BLOCK];
    wait_for_results();
    int own = threadIdx.x % BLOCK, part = threadIdx.x / BLOCK, r = blockIdx.x * BLOCK + own, far = 0,
        *flag = flags + blockIdx.y * gridDim.x + blockIdx.x;
    if (again && !*flag) return;
    float top = -INFINITY, z = 0;
    partial += (int64_t)blockIdx.y * tiles * R + r;
#pragma unroll 8
    for (int tile = part; r < n && tile * BLOCK < r0 + r; tile += STATS_PARTS) {
        float2 sums = partial[(int64_t)tile * R];
        top = fmaxf(top, sums.x);
        z += sums.y;
    }
    parts[part][own] = make_float2(top, z);
    __syncthreads();
    if (part == 0 && r < n) {
        for (int other = 1; other < (int)blockDim.x / BLOCK; other++) {
            top = fmaxf(top, parts[other][own].x);
            z += parts[other][own].y;
        }
        stats += blockIdx.y * stats_step + r;
        far = !again && r0 + r > 0 && fabsf(top) > 58;
        *stats = make_float2(again ? stats->x : far ? top : 0, z > 0 ? 1 / z : z); // NaN stays NaN
    }
    far = __syncthreads_or(far);
    if (!again && threadIdx.x == 0) *flag = far;
}

// Blocks of up to 128 rows of M, in float32; a thread block takes one. A warp takes 16 rows, a lane a
// column of their inverse by substitution; then neighbours of h rows merge, M21 = M2 (A21 M1), a thread
// h/16 rows and 4 columns. M takes A's place, from the diagonal on, unless APART: where a block has the
// shared memory for both.
enum { SEED_LD = BLOCK + 4, SEED_BYTES = BLOCK * SEED_LD * (int)sizeof(float) };
typedef float SeedRows[SEED_LD];
static int feedback_shared(void) { // bytes of a block's shared memory
    return plain ? 0 : gpu.shared < 2 * SEED_BYTES ? SEED_BYTES : 2 * SEED_BYTES;
}
template <int H>
__device__ inline void multiply_seeds(float sum[H / 16][4], const SeedRows *a, const SeedRows *b) {
#pragma unroll 4
    for (int k = 0; k < H; k += 4) { // a: the thread's first row, b: its columns
        float left[H / 16][4], right[4][4];
        for (int r = 0; r < H / 16; r++) read_some<4>(left[r], &a[r][k]);
        for (int i = 0; i < 4; i++) read_some<4>(right[i], &b[k + i][0]);
        for (int r = 0; r < H / 16; r++)
            for (int i = 0; i < 4; i++)
                for (int c = 0; c < 4; c++) sum[r][c] += left[r][i] * right[i][c];
    }
}
template <int H, int APART> __device__ inline void merge_seeds(SeedRows *A, SeedRows *M) {
    int at = threadIdx.x / (4 * H) * 2 * H, row = at + H + threadIdx.x % (4 * H) / (H / 4) * (H / 16),
        col = at + threadIdx.x % (H / 4) * 4;
    float left[H / 16][4] = {}, below[H / 16][4] = {};
    multiply_seeds<H>(left, (const SeedRows *)&A[row][at], (const SeedRows *)&M[at][col]);
    __syncthreads();
    for (int r = 0; r < H / 16; r++) write_some<4>(&A[row + r][col], left[r]);
    __syncthreads();
    multiply_seeds<H>(below, (const SeedRows *)&M[row][at + H], (const SeedRows *)&A[at + H][col]);
    if (!APART) __syncthreads();
    for (int r = 0; r < H / 16; r++) write_some<4>(&M[row + r][col], below[r]);
    __syncthreads();
}
// v to `at`, as X(v) and, `lo` numbers further unless that is 0, X(v - X(v))
template <int V, typename X> __device__ inline void write_parts(X *at, int64_t lo, const float *v) {
    write_some<V>(at, v);
    if (!lo) return;
    float rest[V];
    for (int i = 0; i < V; i++) rest[i] = v[i] - get(to<X>(v[i]));
    write_some<V>(at + lo, rest);
}
// e from the panel's own columns on; zeros to the right of a block as far as `zeros` columns of its block
// of P.
template <int APART, typename X>
__global__ void __launch_bounds__(256)
    inverse_seed_kernel(X *M_out, int P, int lo, int64_t step_m, const X *e, int64_t ld_e, int64_t step_e,
                        RowScale scale, int n, int zeros) {
    extern __shared__ float4 seeds[];
    wait_for_results();
    SeedRows *A = (SeedRows *)seeds, *M = APART ? A + BLOCK : A;
    int i0 = blockIdx.x * BLOCK, rows = min(BLOCK, n - i0), b = blockIdx.y;
    __shared__ float scales[BLOCK];
    e += b * step_e + (int64_t)i0 * ld_e + i0;
    M_out += b * step_m + (int64_t)i0 * (P + lo) + i0 % P;
    if (threadIdx.x < BLOCK)
        scales[threadIdx.x] = (int)threadIdx.x < rows ? scale.at(b, i0 + threadIdx.x) : 0;
    __syncthreads();
#pragma unroll 32
    for (int at = threadIdx.x; at < BLOCK * BLOCK; at += 256) {
        int r = at / BLOCK, c = at % BLOCK;
        A[r][c] = r < rows && c < r ? scales[r] * get(e[r * ld_e + c]) : 0;
        if (APART) M[r][c] = 0;
    }
    __syncthreads();
    if (threadIdx.x % 32 < 16) {
        int r0 = threadIdx.x / 32 * 16, c = threadIdx.x % 32;
        float x[16];
#pragma unroll
        for (int t = 0; t < 16; t++) {
            x[t] = t == c;
#pragma unroll
            for (int j = 0; j < t; j++) x[t] += A[r0 + t][r0 + j] * x[j];
            if (APART) M[r0 + t][r0 + c] = x[t];
        }
        if (!APART) {
            __syncwarp(0xFFFF); // all have read A
            for (int t = 0; t < 16; t++) M[r0 + t][r0 + c] = x[t];
        }
    }
    __syncthreads();
    merge_seeds<16, APART>(A, M);
    merge_seeds<32, APART>(A, M);
    merge_seeds<64, APART>(A, M);
    int pieces = max(BLOCK, zeros - i0 % P) / 8;
    for (int at = threadIdx.x; at < rows * pieces; at += 256) {
        int r = at / pieces, c = at % pieces * 8;
        float v[8] = {};
        if (c < BLOCK) read_some<8>(v, &M[r][c]);
        write_parts<8>(M_out + (int64_t)r * (P + lo) + c, lo, v);
    }
}

// What a product goes through: out = scale·v, added if `add`
template <typename O> struct Store {
    O *out;
    int64_t ld, step;
    float scale;
    int add;
    template <int V> __device__ void operator()(Known<V>, int b, int, int r, int i, float *v) const {
        O *at = out + b * step + r * ld + i;
        float old[V] = {};
        if (add) read_ahead<V>(old, at);
        for (int e = 0; e < V; e++) v[e] = old[e] + scale * v[e];
        write_some<V>(at, v);
    }
};
// The same, and the sums of its columns over the rows of a block. row: the first's
template <typename O> struct StoreSummed : Store<O> {
    TileSums sums;
    int row;
    __device__ void column(int b, int r, int i, float sum) const {
        if (sums.partial) *sums.at(b, row + r, i) = sum;
    }
    // by twos, nothing added
    struct Row {};
    MatrixGPU<O> place() const { return {this->out, this->ld, 1, this->step}; }
    __device__ Row row_of(int, int) const { return {}; }
    __device__ uint32_t two(Row &, int, int, float2 &v, uint32_t) const {
        v.x *= this->scale;
        v.y *= this->scale;
        return pack_two(v.x, v.y);
    }
};
template <typename O> constexpr int sums_columns<StoreSummed<O>> = 1;
template <> constexpr int by_twos<StoreSummed<bf16>> = 1;
// The same of v and what is known of the sum: a matrix in float32, D columns
template <typename O> struct StoreOnto : StoreSummed<O> {
    const float *known;
    int64_t known_step;
    int D;
    template <int V> __device__ void operator()(Known<V> some, int b, int item, int r, int i, float *v) const {
        float w[V];
        read_ahead<V>(w, known + b * known_step + (int64_t)r * D + i);
        for (int e = 0; e < V; e++) v[e] += w[e];
        StoreSummed<O>::operator()(some, b, item, r, i, v);
    }
};
template <typename O> constexpr int sums_columns<StoreOnto<O>> = 1;
// v = λ_t·s_j: the gradient of the logits, X((γ/z) e (v - δ)), in e's place. i0: the first row's position
template <typename X> struct LogitGradient {
    X *e;
    const float *delta;
    RowScale scale;
    int64_t ld, step;
    int i0, T;
    template <int V> __device__ void operator()(Known<V>, int b, int, int r, int i, float *v) const {
        X *at = e + b * step + r * ld + i;
        float w[V], factor = scale.at(b, r), dot = delta[(int64_t)b * T + r];
        read_ahead<V>(w, at);
        for (int j = 0; j < V; j++) v[j] = i + j < i0 + r ? factor * w[j] * (v[j] - dot) : 0;
        write_some<V>(at, v);
    }
    struct Row { float factor, dot; };
    MatrixGPU<X> place() const { return {e, ld, 1, step}; }
    __device__ Row row_of(int b, int r) const { return {scale.at(b, r), delta[(int64_t)b * T + r]}; }
    __device__ uint32_t two(Row &row, int r, int i, float2 &v, uint32_t there) const {
        int seen = i0 + r - i;
        return pack_two(seen > 0 ? row.factor * low_of(there) * (v.x - row.dot) : 0,
                        seen > 1 ? row.factor * high_of(there) * (v.y - row.dot) : 0);
    }
};
template <> constexpr int by_twos<LogitGradient<bf16>> = 1;
template <> constexpr int changes_its_place<LogitGradient<bf16>> = 1;
// e of the panel of rows r0 .. r0+n-1, with their m and 1/z (known: given), and the inverses M.
template <typename X>
static void feedback_panel(float *weights, float *scratch, const Panels *p, float *stats, int known,
                           const X *q, const X *k, int ld, const float *gamma, int B, int T, int D, int first,
                           int r0, int n, cudaStream_t stream) {
    int64_t rows = T - first, row = r0 - first, step = p->e_step, m_step = p->m_step;
    ProductWay way = {B, 1, 0, p->tiles ? NULL : scratch + p->product, stream};
    X *e = (X *)(weights + p->e), *M = (X *)(weights + p->inverse), *scaled = (X *)(scratch + p->merge);
    RowScale scale = {gamma + row, stats + 2 * row, rows};
    if constexpr (sizeof(X) == sizeof(bf16)) {
        int tiles = (T + BLOCK - 1) / BLOCK, blocks = (n + BLOCK - 1) / BLOCK,
            width = min_int((int)round_up(r0 + n + ATOM, BLOCK), (int)p->ld); // a step of K may reach past n
        float2 *partial = (float2 *)(scratch + p->partial), *known_stats = (float2 *)stats + row;
        int *flags = (int *)(scratch + p->flags);
        LogitExp f = {e, known ? known_stats : NULL, NULL, known ? NULL : partial, p->lx, step, rows,
                      1.44269504f / sqrtf((float)D), r0, (int)p->rows, tiles, blocks};
        for (int again = 0; p->tiles && again < 2 - known; again++) {
            if (again) { f.stats = known_stats; f.flags = flags; }
            Part<bf16> q_rows = part_of(q + row * ld, ld, rows * ld, (int)(rows - row), D),
                       k_rows = part_of(k, ld, (int64_t)T * ld, T, D);
            if (p->wide_logits)
                product_wide<0, 0, OUT_LOWER, 256>(f, q_rows, k_rows, n, width, D, r0, B, stream);
            else product_tiles<0, 0, OUT_LOWER, BLOCK>(f, q_rows, k_rows, n, width, D, r0, 1, B, stream);
            if (!known)
                LAUNCH(feedback_stats_kernel, dim3(blocks, B), min_int(tiles, STATS_PARTS) * BLOCK, 0, stream,
                       known_stats, rows, partial, flags, again, r0, n, f.R, tiles);
        }
    }
    if (!p->tiles) {
        float *logits = weights + p->e;
        int64_t floats = p->rows * p->ld;
        for (int i0 = r0; i0 < r0 + n; i0 += p->P) {
            int m = min_int(p->P, r0 + n - i0);
            matmul_gpu(into(logits + (i0 - r0) * p->ld, p->ld, floats),
                       rows_of_gpu(q + (i0 - first) * (int64_t)ld, ld, rows * ld),
                       transpose_gpu(rows_of_gpu(k, ld, (int64_t)T * ld)), m, i0 + m, D, 1 / sqrtf((float)D),
                       0, B, stream);
        }
        softmax_panel_gpu<X>(logits, p->ld, floats, stats + 2 * row, 2 * rows, known, 0, r0, n, p->P, 1, B,
                             stream);
    }
    int bytes = feedback_shared();
    auto seeds = bytes > SEED_BYTES ? inverse_seed_kernel<1, X> : inverse_seed_kernel<0, X>;
    allow_shared(seeds, bytes);
    LAUNCH(seeds, dim3((n + BLOCK - 1) / BLOCK, B), 256, bytes, stream, M, p->P, p->lo, m_step, e + r0, p->lx,
           step, scale, n, p->tiles ? 0 : p->P);
    for (int h = BLOCK; h < p->P && h < n; h *= 2) { // M21 = M2 ((γ/z) ⊙ (e21 M1))
        int pairs = (n + h - 1) / (2 * h), P = p->P, lo = p->lo, ld_m = (int)p->ld_m, h_lo = lo ? h : 0,
            width = h + h_lo;
        int64_t scaled_step = (int64_t)pairs * h * width;
        Part<X> e21 = {e, p->lx, step, n, (int)p->ld, {h, r0, 2 * h, 2 * h, INT_MAX, 0}},
                M1 = {M, ld_m, m_step, n, ld_m, {0, 0, 2 * h, 2 * h, P, lo}},
                M2 = {M, ld_m, m_step, n, ld_m, {h, h, 2 * h, 2 * h, P, lo}},
                right = {scaled, width, scaled_step, pairs * h, width, {0, 0, h, 0, INT_MAX, h_lo}};
        // X((γ/z) ⊙ (e21 M1))
        auto to_scaled = [=] __device__ (auto V, int b, int pair, int r, int i, float *v) {
            int row = (2 * pair + 1) * h + r;
            float factor = row < n ? scale.at(b, row) : 0;
            for (int j = 0; j < V; j++) v[j] = row < n ? v[j] * factor : 0;
            write_parts<V>(scaled + b * scaled_step + (int64_t)(pair * h + r) * width + i, h_lo, v);
        };
        auto to_M21 = [=] __device__ (auto V, int b, int pair, int r, int i, float *v) {
            int row = (2 * pair + 1) * h + r;
            if (row < n) write_parts<V>(M + b * m_step + (int64_t)row * ld_m + 2 * pair * h % P + i, lo, v);
        };
        product_gpu<0, 1, B_LOWER>(to_scaled, e21, M1, h, h, h, 0, pairs, way);
        product_gpu<0, 1, A_LOWER>(to_M21, M2, right, h, h, h, 0, pairs, way);
    }
}

// The solve, or its adjoint (BACK), of positions begin .. end-1 in one go. C blocks, a cluster, have STRIP
// columns of one sequence and walk along its blocks of C·128 rows, from the last if BACK. Block `rank` has
// two tiles of 64 rows, the first and second four warps one each: tile rank and tile rank from the last, so
// that all have as much of the triangle. A thread more has the operands copied: e, M, and what was solved
// before, written to memory and read back. So it is with g in a cluster: each block writes its rows to
// memory, the first part of g and behind it the second, and all read what they need.
template <int C> struct MarchShared {
    enum { STRIP = C == 1 ? 128 : 64, ACROSS = STRIP / ATOM, SLOTS = C == 1 ? 4 : 8, OWN = C == 1 ? 3 : 2 };
    // own: the block's rows of g in two parts; of s in the last, which in a cluster nobody reads g from by then
    bf16 a[SLOTS][2][ATOM][ATOM], b[SLOTS][ACROSS][ATOM][ATOM], own[OWN][ACROSS][BLOCK][ATOM];
    uint64_t full[SLOTS], free[SLOTS], spread, written;
};
// f (BACK: ds), c (BACK: df) and known, the sum over rows beyond begin .. end if not NULL, have T rows of D
// a sequence; e and M begin with row r0; `map` is of s (BACK: of u), lo: columns from M's first part to its
// second. HEARS: known may be there. A cluster reads it ahead; one block, which has no registers left for
// that, when it adds it. A cluster's c is summed while g of the block after it goes round.
template <int BACK, int C, int HEARS>
__global__ void __launch_bounds__(3 * GROUP, 1)
    feedback_march_kernel(const __grid_constant__ CUtensorMap e_map,
                          const __grid_constant__ CUtensorMap M_map, const __grid_constant__ CUtensorMap map,
                          const __grid_constant__ CUtensorMap g_map, const bf16 *f, bf16 *c,
                          const float *known, RowScale scale, RowScale inverse, int T, int D, int r0,
                          int begin, int end, int lo) {
#ifdef HOPPER
    typedef MarchShared<C> Shared;
    enum { STRIP = Shared::STRIP, ACROSS = Shared::ACROSS, SLOTS = Shared::SLOTS, OWN = Shared::OWN };
    enum { ROWS = C * BLOCK, TILES = 2 * C };
    extern __shared__ __align__(1024) unsigned char shared_tiles[];
    Shared *s = (Shared *)shared_tiles;
    int rank = (int)blockIdx.x % C, n0 = (int)blockIdx.x / C * STRIP, sequence = (int)blockIdx.y,
        blocks = (end - begin + ROWS - 1) / ROWS, item = 0, group = threadIdx.x / GROUP,
        lane = threadIdx.x % 32, summed = !BACK && c;
    // of the triangle on the diagonal: the tiles that the block needs, and the first
    int wide = TILES - rank, lowest = BACK ? rank : 0;
    auto tile_of = [&](int group) { return group ? TILES - 1 - rank : rank; };
    auto place = [&](int step) { return begin + (BACK ? blocks - 1 - step : step) * ROWS; };
    if (threadIdx.x == 0) {
        barrier_init(&s->written, C);
        barrier_init(&s->spread, C);
        for (int i = 0; i < SLOTS; i++) { barrier_init(&s->full[i], 1); barrier_init(&s->free[i], 8); }
    }
    barriers_ready();
    if (C > 1) asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" : : : "memory");
    wait_for_results(0);
    if (group == 2) {
        KEEP_REGISTERS("dec", 40);
        if (threadIdx.x % GROUP) return;
        // An item: 64 of K from position K on, of the left operand the rows of both tiles, of the right one
        // (`solved`) the block's columns
        auto left = [&](int n, const CUtensorMap *from, int I, int col0, int K, int solved) {
            int slot = n % SLOTS, bytes = solved ? sizeof(s->b[0]) : 0, wanted[2];
            if (n >= SLOTS) barrier_wait(&s->free[slot], n / SLOTS - 1);
            for (int j = 0; j < 2; j++) {
                wanted[j] = BACK ? K >= I + ATOM * tile_of(j) : K <= I + ATOM * tile_of(j);
                bytes += wanted[j] * (int)sizeof(s->a[0][0]);
            }
            barrier_expect(&s->full[slot], bytes);
            for (int j = 0; j < 2; j++) {
                int row = I + ATOM * tile_of(j);
                if (wanted[j])
                    copy_tile(s->a[slot][j][0], from, (BACK ? row : K) - col0, 0, (BACK ? K : row) - r0,
                              sequence, &s->full[slot]);
            }
        };
        auto right = [&](int n, const CUtensorMap *from, int row) {
            for (int j = 0; j < ACROSS; j++)
                copy_tile(s->b[n % SLOTS][j][0], from, n0 + ATOM * j, 0, row, sequence, &s->full[n % SLOTS]);
        };
        // Right operands wait until all blocks have passed `barrier` round number `round` (-1: they are
        // there); the left ones of the first items do not.
        auto copy = [&](int count, uint64_t *barrier, int round, auto left_of, auto right_of) {
            int ahead = round < 0 ? 0 : min(count, SLOTS / 2);
            for (int i = 0; i < ahead; i++) left_of(item + i, i);
            if (round >= 0) {
                barrier_wait(barrier, round);
                if (C > 1) asm volatile("fence.acq_rel.cluster;\nfence.proxy.async.global;" : : : "memory");
            }
            for (int i = 0; i < count; i++) {
                if (i >= ahead) left_of(item + i, i);
                right_of(item + i, i);
            }
            item += count;
        };
        // e's rows I .. times what was solved of `count` tiles from K0 on
        auto copy_e = [&](int I, int K0, int count, int round) {
            copy(count, &s->written, round,
                 [&](int n, int i) { left(n, &e_map, I, 0, K0 + ATOM * i, 1); },
                 [&](int n, int i) { right(n, &map, K0 + ATOM * i); });
        };
        for (int step = 0; step < blocks; step++) {
            int I = place(step);
            for (int before = 0; before < step; before++)
                copy_e(I, place(before), TILES, before == step - 1 ? before : -1);
            if (C > 1 && summed && step) copy_e(place(step - 1), place(step - 1), wide, -1);
            // both parts of M, of g in turn
            copy(2 * wide, &s->spread, C > 1 ? step : -1,
                 [&](int n, int i) {
                     left(n, &M_map, I, I - i % 2 * lo, I + ATOM * (lowest + i / 2), C > 1);
                 },
                 [&](int n, int i) { if (C > 1) right(n, &g_map, i % 2 * ROWS + ATOM * (lowest + i / 2)); });
            for (int i = 0; i < (C == 1 && summed ? TILES : 0); i++, item++)
                left(item, &e_map, I, 0, I + ATOM * i, 0);
        }
        if (C > 1 && summed) copy_e(place(blocks - 1), place(blocks - 1), wide, blocks - 1);
        return;
    }
    KEEP_REGISTERS("inc", 232);
    typedef float Sums[STRIP / 8][4];
    int mine = tile_of(group), own_row = threadIdx.x / 32 * 16 + lane / 4,
        first = ATOM * (mine - group) + own_row;
    auto arrived = [&](int n) { barrier_wait(&s->full[n % SLOTS], n / SLOTS); };
    auto release = [&](int n) { if (lane == 0) barrier_arrive(&s->free[n % SLOTS]); };
    auto product = [&](Sums &sum, const bf16 *left, const bf16 *right, int across, int k, int keep) {
        tensor_product<STRIP, BACK, 1>(sum, operand(left + (BACK ? k * 16 * ATOM : k * 16)),
                                       operand(right + k * 16 * ATOM, across * ATOM * 2), keep);
    };
    // right: the block's own rows; NULL: what was copied
    auto multiply = [&](Sums &sum, const bf16 *right, int items) {
        for (int i = 0; i < items; i++, item++) {
            const bf16 *b = right ? right + i * ATOM * ATOM : s->b[item % SLOTS][0][0];
            arrived(item);
            products_begin();
#pragma unroll
            for (int k = 0; k < ATOM / 16; k++)
                product(sum, s->a[item % SLOTS][group][0], b, right ? BLOCK : ATOM, k, 1);
            products_commit();
            products_wait<1>();
            if (i) release(item - 1);
        }
        products_wait<0>();
        if (items) release(item - 1);
    };
    // M g, of the tiles of the triangle: M_hi g_hi + M_lo g_hi + M_hi g_lo
    auto multiply_parts = [&](Sums &sum) {
        int tile = BACK ? mine : 0, tiles = BACK ? TILES - mine : mine + 1;
        for (int i = 0; i < tiles; i++, item += 2) {
            const bf16 *M_hi = s->a[item % SLOTS][group][0], *M_lo = s->a[(item + 1) % SLOTS][group][0],
                       *g_hi = C == 1 ? s->own[0][0][(tile + i) * ATOM] : s->b[item % SLOTS][0][0],
                       *g_lo = C == 1 ? s->own[1][0][(tile + i) * ATOM] : s->b[(item + 1) % SLOTS][0][0];
            enum { STEP = C == 1 ? BLOCK : ATOM };
            arrived(item);
            arrived(item + 1);
            products_begin();
#pragma unroll
            for (int k = 0; k < ATOM / 16; k++) {
                product(sum, M_hi, g_hi, STEP, k, i > 0 || k > 0);
                product(sum, M_lo, g_hi, STEP, k, 1);
                product(sum, M_hi, g_lo, STEP, k, 1);
            }
            products_commit();
            products_wait<1>();
            if (i) { release(item - 2); release(item - 1); }
        }
        products_wait<0>();
        release(item - 2);
        release(item - 1);
    };
    auto pass = [&](int items) { // of the other group alone
        for (; items > 0; items--, item++) { arrived(item); __syncwarp(); release(item); }
    };
    auto put = [&](int part, int half, int n, uint32_t two) {
        int r = own_row + half * 8;
        *(uint32_t *)&s->own[part][n / 8][r][(n % 8 ^ r % 8) * 8 + lane % 4 * 2] = two;
    };
    auto low = [](uint32_t two) { return __uint_as_float(two << 16); };
    auto high = [](uint32_t two) { return __uint_as_float(two & 0xFFFF0000u); };
    auto put_parts = [&](int half, int n, float x, float y) {
        uint32_t two = pack_two(x, y);
        put(0, half, n, two);
        put(1, half, n, pack_two(x - low(two), y - high(two)));
    };
    auto all_put = [&]() { asm volatile("fence.proxy.async.shared::cta;\nbar.sync 1, 256;" : : : "memory"); };
    // Of one thread: the block's rows of one part go to rows row0 .. of what `to` is of
    auto hand_out = [&](const CUtensorMap *to, int part, int row0) {
        for (int j = 0; j < 2 * ACROSS; j++)
            asm volatile(
                "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];"
                :
                : "l"(to), "r"(n0 + j / 2 * ATOM), "r"(0), "r"(row0 + ATOM * tile_of(j % 2)), "r"(sequence),
                  "r"(shared_at(s->own[part][j / 2][ATOM * (j % 2)]))
                : "memory");
        asm volatile("cp.async.bulk.commit_group;" : : : "memory");
    };
    auto tell = [&](uint64_t *barrier) { // that all of it is there
        asm volatile("cp.async.bulk.wait_group 0;" : : : "memory");
        if (C == 1) { barrier_arrive(barrier); return; }
        asm volatile("fence.proxy.async.global;\nfence.acq_rel.cluster;" : : : "memory");
        for (int to = 0; to < C; to++) barrier_arrive_at(barrier, to);
    };
    // c of the block of a step, whose s is known: sum becomes e s
    auto finish = [&](Sums &sum, int step) {
        float z[2];
        for (int half = 0; half < 2; half++) {
            int r = place(step) + first + half * 8;
            z[half] = r < end ? inverse.at(sequence, r) : 0;
        }
        multiply(sum, C == 1 ? s->own[OWN - 1][0][0] : NULL, mine + 1);
        pass(wide - 1 - mine);
        if (C == 1 && threadIdx.x == 0) tell(&s->written);
        for (int half = 0; half < 2; half++) {
            int r = place(step) + first + half * 8;
            bf16 *row = c + ((int64_t)sequence * T + r) * D + n0 + lane % 4 * 2;
            for (int n = 0; n < STRIP / 8; n++)
                if (r < end && n0 + n * 8 < D)
                    *(uint32_t *)(row + n * 8) =
                        pack_two(sum[n][2 * half] * z[half], sum[n][2 * half + 1] * z[half]);
        }
    };
    Sums earlier; // the sum of the step before
    for (int step = 0; step < blocks; step++) {
        int I = place(step);
        Sums sum = {}, solved;
        float factor[2];
        int64_t at[2];
        for (int half = 0; half < 2; half++) {
            int r = I + first + half * 8, inside = r < end;
            at[half] = inside ? ((int64_t)sequence * T + r) * D + n0 + lane % 4 * 2 : -1;
            factor[half] = inside ? scale.at(sequence, r) : 0;
        }
        uint32_t given[STRIP / 8][2];
        float2 beyond[STRIP / 8][2];
        for (int n = 0; n < STRIP / 8; n++)
            for (int half = 0; half < 2; half++) {
                int inside = at[half] >= 0 && n0 + n * 8 < D;
                given[n][half] = inside ? *(const uint32_t *)(f + at[half] + n * 8) : 0;
                beyond[n][half] = C > 1 && known && inside ? *(const float2 *)(known + at[half] + n * 8)
                                                           : make_float2(0, 0);
            }
        multiply(sum, NULL, TILES * step);
        for (int n = 0; n < STRIP / 8; n++)
            for (int half = 0; half < 2; half++) {
                uint32_t two = given[n][half];
                float *v = &sum[n][2 * half], by = BACK ? 1 : factor[half];
                if (C > 1) { v[0] += beyond[n][half].x; v[1] += beyond[n][half].y; }
                if (C == 1 && HEARS && at[half] >= 0 && n0 + n * 8 < D) {
                    float2 more = *(const float2 *)(known + at[half] + n * 8);
                    v[0] += more.x;
                    v[1] += more.y;
                }
                put_parts(half, n, low(two) + by * v[0], high(two) + by * v[1]);
            }
        all_put();
        if (C > 1 && threadIdx.x == 0) {
            hand_out(&g_map, 0, 0);
            hand_out(&g_map, 1, ROWS);
            tell(&s->spread);
        }
        if (C > 1 && summed && step) finish(earlier, step - 1);
        if (BACK) pass(2 * (mine - rank));
        multiply_parts(solved);
        if (!BACK) pass(2 * (wide - 1 - mine));
        if (C == 1) asm volatile("bar.sync 1, 256;" : : : "memory");
        for (int n = 0; n < STRIP / 8; n++)
            for (int half = 0; half < 2; half++) {
                float x = solved[n][2 * half], y = solved[n][2 * half + 1];
                if (BACK) {
                    if (at[half] >= 0 && n0 + n * 8 < D)
                        *(uint32_t *)(c + at[half] + n * 8) = pack_two(x, y);
                    x *= factor[half];
                    y *= factor[half];
                }
                put(OWN - 1, half, n, pack_two(x, y));
            }
        all_put();
        if (threadIdx.x == 0) {
            hand_out(&map, OWN - 1, I);
            if (C > 1 || !summed) tell(&s->written);
        }
        if (C == 1 && summed) finish(sum, step);
        if (C > 1)
            for (int n = 0; n < STRIP / 8; n++)
                for (int i = 0; i < 4; i++) earlier[n][i] = sum[n][i];
    }
    if (C > 1 && summed) finish(earlier, blocks - 1);
    if (C > 1) barrier_wait(&s->written, blocks - 1); // nobody needs this block's memory any more
#endif
}
template <int BACK, int C, int HEARS>
static void feedback_march_as(float *weights, float *scratch, const Panels *p, const bf16 *out,
                              int64_t ld_out, const bf16 *f, bf16 *c, const float *known, RowScale scale,
                              RowScale inverse, int B, int T, int D, int r0, int n, int begin, int end,
                              cudaStream_t stream) {
    CUtensorMap e_map = tile_map((bf16 *)(weights + p->e), (int)p->lx, 1, n, p->lx, p->e_step, B, ATOM),
        M_map = tile_map((bf16 *)(weights + p->inverse), (int)p->ld_m, 1, n, p->ld_m, p->m_step, B, ATOM),
        map = tile_map(out, D, 1, T, ld_out, T * ld_out, B, ATOM);
    int bytes = sizeof(MarchShared<C>), strips = (D + MarchShared<C>::STRIP - 1) / MarchShared<C>::STRIP,
        width = strips * MarchShared<C>::STRIP, rows = 2 * C * BLOCK;
    CUtensorMap g_map = C == 1 ? map : tile_map((bf16 *)(scratch + p->lambda), width, 1, rows, width,
                                                (int64_t)rows * width, B, ATOM);
    allow_shared(feedback_march_kernel<BACK, C, HEARS>, bytes);
    LAUNCH_AS(C, 1, (feedback_march_kernel<BACK, C, HEARS>), dim3(C * strips, B), 3 * GROUP, bytes, stream,
              e_map, M_map, map, g_map, f, c, known, scale, inverse, T, D, r0, begin, end, p->lo);
}
template <int BACK>
static void feedback_march_gpu(float *weights, float *scratch, const Panels *p, const bf16 *out,
                               int64_t ld_out, const bf16 *f, bf16 *c, const float *known, RowScale scale,
                               RowScale inverse, int B, int T, int D, int r0, int n, int begin, int end,
                               cudaStream_t stream) {
    auto march = p->march == CLUSTER ? feedback_march_as<BACK, CLUSTER, 1>
               : known ? feedback_march_as<BACK, 1, 1> : feedback_march_as<BACK, 1, 0>;
    march(weights, scratch, p, out, ld_out, f, c, known, scale, inverse, B, T, D, r0, n, begin, end, stream);
}

static int clusters_fit(void) {
    int ring = clusters_at_once(attention_ring_kernel, CLUSTER, sizeof(RingShared));
    int bytes = sizeof(MarchShared<CLUSTER>);
    return ring && clusters_at_once(feedback_march_kernel<0, CLUSTER, 1>, CLUSTER, bytes)
                && clusters_at_once(feedback_march_kernel<1, CLUSTER, 1>, CLUSTER, bytes);
}

// A batch that fits what p was chosen for, and the memory for it.
static void feedback_fits(const Panels *p, int B, int T, Scratch weights, Scratch scratch) {
    must_fit(B, p->B, "sequences of the feedback");
    must_fit(T, p->T, "tokens of the feedback");
    borrow(weights, p->weights);
    borrow(scratch, p->total);
}

// c: (B,T,D) kept for the backward pass, or NULL; so are weights where p says so.
template <typename X>
static void feedback_forward_fast(X *s, X *c, float *stats, Scratch weights_room, Scratch scratch_room,
                                  const X *f, const X *q, const X *k, const float *gamma, Shape shape,
                                  const Panels *panels, cudaStream_t stream) {
    int B = shape.B, T = shape.T, D = shape.d, ld = shape.ld, first = shape.first;
    feedback_fits(panels, B, T, weights_room, scratch_room);
    Panels p = *panels;
    int lo = p.lo;
    float *weights = weights_room.at, *scratch = scratch_room.at;
    int64_t rows = T - first, step = p.e_step, all = (int64_t)T * D, m_step = p.m_step;
    X *e = (X *)(weights + p.e), *M = (X *)(weights + p.inverse), *block = (X *)(scratch + p.block);
    ProductWay way = {B, wide({D}, {s, c, f, scratch}), 0, p.tiles ? NULL : scratch + p.product, stream};
    for (int r0 = first; r0 < T; r0 += p.R) {
        int n = min_int(p.R, T - r0);
        feedback_panel(weights, scratch, &p, stats, 0, q, k, ld, gamma, B, T, D, first, r0, n, stream);
        join(DIRECT_READ); // f
        for (int reach = r0; reach < r0 + n; reach += REACH) {
            int end = min_int(reach + REACH, r0 + n);
            if (reach)
                matmul_gpu(into(scratch + p.rhs + (int64_t)(reach - first) * D, D, all),
                           rows_of_gpu(e + (reach - r0) * p.lx, p.lx, step), rows_of_gpu(s, D, all),
                           end - reach, D, reach, 1, 0, B, stream);
            if constexpr (sizeof(X) == sizeof(bf16))
                if (p.march && !first) {
                    feedback_march_gpu<0>(weights, scratch, &p, s, D, f, c, reach ? scratch + p.rhs : NULL,
                                          {gamma, stats, T}, {NULL, stats, T}, B, T, D, r0, n, reach, end,
                                          stream);
                    continue;
                }
            for (int i0 = reach; i0 < end; i0 += p.P) {
                int m = min_int(p.P, end - i0), at = i0 - r0;
                int64_t row = i0 - first, f_step = rows * D;
                float *sum = i0 ? scratch + p.rhs + row * D : NULL;
                X *s_I = s + (int64_t)i0 * D, *c_I = c ? c + (int64_t)i0 * D : NULL;
                const X *f_I = f + row * D;
                RowScale scale = {gamma + row, stats + 2 * row, rows},
                         inverse = {NULL, stats + 2 * row, rows};
                int wide = lo ? 2 * D : D; // of block
                Part<X> residual = part_of(block, wide, (int64_t)m * wide, m, wide, 0, 0, lo ? D : 0),
                        rhs = i0 ? residual : part_of(f, D, rows * D, m, D),
                        e_II = part_of(e, p.lx, step, n, (int)p.ld, at, i0),
                        M_I = part_of(M, p.ld_m, m_step, at + m, (int)p.ld_m, at, 0, lo);
                // the sum e_{I,<} s_<, and g
                auto to_g = [sum, block, f_I, scale, all, f_step, m, D, wide,
                             reach] __device__ (auto V, int b, int, int r, int i, float *v) {
                    int64_t at = (int64_t)r * D + i;
                    float w[V] = {}, factor = scale.at(b, r);
                    if (reach) read_ahead<V>(w, sum + b * all + at);
                    for (int j = 0; j < V; j++) v[j] += w[j];
                    write_some<V>(sum + b * all + at, v);
                    read_ahead<V>(w, f_I + b * f_step + at);
                    for (int j = 0; j < V; j++) v[j] = w[j] + factor * v[j];
                    write_parts<V>(block + ((int64_t)b * m + r) * wide + i, wide - D, v);
                };
                if (i0)
                    product_gpu<0, 1, FULL>(to_g, part_of(e, p.lx, step, n, (int)p.ld, at, reach),
                                            part_of(s, D, all, i0, D, reach), m, D, i0 - reach, 0, 1, way);
                // c = (e s)/z, and X(r) if there is a refinement
                auto to_r = [block, c_I, sum, f_I, s_I, scale, inverse, all, f_step, m, D,
                             lo] __device__ (auto V, int b, int, int r, int i, float *v) {
                    int64_t at = (int64_t)r * D + i;
                    float w[V] = {}, x[V], factor = scale.at(b, r), z = inverse.at(b, r);
                    if (sum) read_ahead<V>(w, sum + b * all + at);
                    for (int j = 0; j < V; j++) {
                        v[j] += w[j];
                        w[j] = z * v[j];
                    }
                    if (c_I) write_some<V>(c_I + b * all + at, w);
                    if (lo) return;
                    read_ahead<V>(w, f_I + b * f_step + at);
                    read_ahead<V>(x, s_I + b * all + at);
                    for (int j = 0; j < V; j++) v[j] = w[j] + factor * v[j] - x[j];
                    write_some<V>(block + (int64_t)b * m * D + at, v);
                };
                Store<X> solve = {s_I, D, all, 1, 0}, refine = {s_I, D, all, 1, 1};
                product_gpu<0, 1, A_LOWER>(solve, M_I, rhs, m, D, m, 0, 1, way);
                if (c || !lo)
                    product_gpu<0, 1, A_LOWER>(to_r, e_II, part_of((const X *)s_I, D, all, m, D), m, D, m, 0,
                                               1, way);
                if (!lo) product_gpu<0, 1, A_LOWER>(refine, M_I, residual, m, D, m, 0, 1, way);
            }
        }
    }
}

// δ_t = λ_t·c_t. A warp takes a row.
template <int V, typename X>
__global__ void feedback_delta_kernel(float *delta, const X *df, const X *c, int64_t all, int T, int n,
                                      int D) {
    wait_for_results();
    int r = blockIdx.x * 4 + threadIdx.x / 32, b = gridDim.y - 1 - blockIdx.y;
    if (r >= n) return;
    int64_t row = b * all + (int64_t)r * D;
    float dot = 0;
    for (int i = threadIdx.x % 32 * V; i < D; i += 32 * V) {
        float v[V], w[V];
        read_some<V>(v, df + row + i);
        read_some<V>(w, c + row + i);
        for (int e = 0; e < V; e++) dot += v[e] * w[e];
    }
    dot = warp_sum(dot);
    if (threadIdx.x % 32 == 0) delta[(int64_t)b * T + r] = dot;
}

// One panel of the adjoint, of all sequences: λ of its rows from the last block to the first, each solving
// with M^T, λ = M^T h and u = (γ/z) ⊙ λ; in two parts as forward, or with one refinement,
//     r = h + e_II^T u - λ,   λ += M^T r
// where λ stays float32, for X(γ X(λ)) would be X(λ) and the loop no contraction. Then what the panel gives
// the rows before it, h_< += e_{R,<}^T u, and the gradients of q' and k'. u lies where dq' will.
template <typename X>
static void feedback_panel_backward_gpu(X *df, X *dq, X *dk, float *dgamma, float *weights, float *scratch,
                                           const Panels *p, const X *ds, const X *s, const X *c, float *stats,
                                           const X *q, const X *k, int ld, const float *gamma, int B, int T,
                                           int D, int r0, TileSums dq_sums, TileSums dk_sums,
                                           cudaStream_t stream) {
    int n = min_int(p->R, T - r0), lo = p->lo;
    int64_t step = p->e_step, all = (int64_t)T * D, wide_step = (int64_t)T * ld, m_step = p->m_step;
    float *lambda = scratch + p->lambda, *dk_sum = scratch + p->dk, sigma = 1 / sqrtf((float)D);
    ProductWay way = {B, wide({D, ld}, {df, dq, dk, ds, s, c, scratch}), 0,
                      p->tiles ? NULL : scratch + p->product, stream},
               logits_way = way, sums_way = way;
    logits_way.wide = p->wide_logits;
    sums_way.wide = p->wide_sums;
    X *e = (X *)(weights + p->e), *M = (X *)(weights + p->inverse), *block = (X *)(scratch + p->block);
    if (!p->kept) feedback_panel(weights, scratch, p, stats, 1, q, k, ld, gamma, B, T, D, 0, r0, n, stream);
    for (int low = (n - 1) / REACH * REACH; low >= 0; low -= REACH) {
        int end = min_int(low + REACH, n), heard = r0 + end < T;
        float *h_all = scratch + p->rhs;
        if constexpr (sizeof(X) == sizeof(bf16))
            if (p->march)
                feedback_march_gpu<1>(weights, scratch, p, dq, ld, ds, df, heard ? h_all : NULL,
                                      {gamma, stats, T}, {NULL, stats, T}, B, T, D, r0, n, r0 + low, r0 + end,
                                      stream);
        for (int at = p->march ? -1 : (end - 1) / p->P * p->P; at >= low; at -= p->P) {
            // df may be ds: in two parts λ is written while other blocks read what it comes from
            int m = min_int(p->P, end - at), i0 = r0 + at, alone = i0 + m == T && !lo;
            float *h = alone ? NULL : h_all + (int64_t)i0 * D;
            const X *ds_I = ds + (int64_t)i0 * D;
            X *u = dq + (int64_t)i0 * ld, *df_I = df + (int64_t)i0 * D;
            RowScale scale = {gamma + i0, stats + 2 * i0, T};
            int wide = lo ? 2 * D : D; // of block
            Part<X> e_II = part_of(e, p->lx, step, n, (int)p->ld, at, i0),
                    M_I = part_of(M, p->ld_m, m_step, at + m, (int)p->ld_m, at, 0, lo),
                    residual = part_of(block, wide, (int64_t)m * wide, m, wide, 0, 0, lo ? D : 0),
                    rhs = alone ? part_of(ds_I, D, all, m, D) : residual;
            // h = X'(ds) + what later rows give
            auto to_h = [=] __device__ (auto V, int b, int, int r, int i, float *v) {
                int64_t at = b * all + (int64_t)r * D + i;
                float w[V], old[V] = {};
                read_ahead<V>(w, ds_I + at);
                if (heard) read_ahead<V>(old, h + at);
                for (int j = 0; j < V; j++) v[j] += w[j] + old[j];
                if (!lo) write_some<V>(h + at, v);
                write_parts<V>(block + ((int64_t)b * m + r) * wide + i, wide - D, v);
            };
            // v = λ: u = X((γ/z) ⊙ λ), and λ becomes u/(γ/z), so that the residual is that of a λ whose u
            // is exact
            auto to_u = [=] __device__ (auto V, int b, int, int r, int i, float *v) {
                float w[V], factor = scale.at(b, r);
                for (int j = 0; j < V; j++) {
                    w[j] = get(to<X>(factor * v[j]));
                    v[j] = w[j] == 0 ? v[j] : w[j] / factor;
                }
                write_some<V>(lambda + ((int64_t)b * m + r) * D + i, v);
                write_some<V>(u + b * wide_step + (int64_t)r * ld + i, w);
            };
            // v = e_II^T u: X(r)
            auto to_r = [block, h, lambda, ds_I, all, m, D] __device__ (auto V, int b, int, int r, int i,
                                                                       float *v) {
                int64_t at = b * all + (int64_t)r * D + i, own = ((int64_t)b * m + r) * D + i;
                float w[V], x[V];
                if (h)
                    read_ahead<V>(w, h + at);
                else
                    read_ahead<V>(w, ds_I + at);
                read_ahead<V>(x, lambda + own);
                for (int j = 0; j < V; j++) v[j] += w[j] - x[j];
                write_some<V>(block + own, v);
            };
            // v = M^T r: λ += v, df = X(λ), u = X((γ/z) ⊙ λ). In two parts v is λ itself.
            auto to_df = [=] __device__ (auto V, int b, int, int r, int i, float *v) {
                float w[V] = {}, factor = scale.at(b, r);
                if (!lo) read_ahead<V>(w, lambda + ((int64_t)b * m + r) * D + i);
                for (int j = 0; j < V; j++) v[j] += w[j];
                write_some<V>(df_I + b * all + (int64_t)r * D + i, v);
                for (int j = 0; j < V; j++) v[j] *= factor;
                write_some<V>(u + b * wide_step + (int64_t)r * ld + i, v);
            };
            if (!alone)
                product_gpu<1, 1, FULL>(to_h, part_of(e, p->lx, step, n, (int)p->ld, at + m, i0),
                                        part_of(dq, ld, wide_step, r0 + end, D, i0 + m), m, D, end - at - m,
                                        0, 1, way);
            if (lo) {
                product_gpu<1, 1, A_UPPER>(to_df, M_I, rhs, m, D, m, 0, 1, way);
                continue;
            }
            product_gpu<1, 1, A_UPPER>(to_u, M_I, rhs, m, D, m, 0, 1, way);
            product_gpu<1, 1, A_UPPER>(to_r, e_II, part_of((const X *)u, ld, wide_step, m, D), m, D, m, 0, 1,
                                       way);
            product_gpu<1, 1, A_UPPER>(to_df, M_I, residual, m, D, m, 0, 1, way);
        }
        // to all rows before these
        matmul_gpu(into(h_all, D, all), transpose_gpu(rows_of_gpu(e + low * p->lx, p->lx, step)),
                   rows_of_gpu(dq + (int64_t)(r0 + low) * ld, ld, wide_step), r0 + low, D, end - low, 1,
                   heard ? 1 : 0, B, stream);
    }
    LAUNCH((way.in_eights ? feedback_delta_kernel<8, X> : feedback_delta_kernel<1, X>), dim3((n + 3) / 4, B),
           128, 0, stream, dgamma + r0, df + (int64_t)r0 * D, c + (int64_t)r0 * D, all, T, n, D);
    int height = p->tiles ? n : p->P;
    for (int at = 0; at < n; at += height) { // tiles know the triangle, blocks of rows follow it roughly
        int m = min_int(height, n - at), i0 = r0 + at;
        int64_t wide_row = (int64_t)i0 * ld;
        RowScale scale = {gamma + i0, stats + 2 * i0, T};
        LogitGradient<X> to_logits = {e + at * p->lx, dgamma + i0, scale, p->lx, step, i0, T};
        StoreSummed<X> to_dq = {{dq + wide_row, ld, wide_step, sigma, 0}, dq_sums, i0};
        Part<X> lambda_I = part_of((const X *)df, D, all, T, D, i0),
                dl = part_of((const X *)e, p->lx, step, n, (int)p->ld, at, 0);
        product_gpu<0, 0, OUT_LOWER>(to_logits, lambda_I, part_of(s, D, all, T, D), m,
                                     p->tiles ? min_int((int)round_up(i0 + m, BLOCK), (int)p->ld) : i0 + m, D,
                                     i0, 1, logits_way);
        Part<X> keys = part_of(k, ld, wide_step, i0 + m, D);
        if (!p->apart || !r0) {
            product_gpu<0, 1, A_LOWER>(to_dq, dl, keys, m, D, i0 + m, i0, 1, sums_way);
            continue;
        }
        float *known = scratch + p->rhs + (int64_t)i0 * D; // where h was
        StoreOnto<X> onto = {to_dq, known, all, D};
        matmul_gpu(into(known, D, all), rows_of_gpu((const X *)e, p->lx, step), rows_of_gpu(k, ld, wide_step), m,
                   D, r0, 1, 0, B, stream);
        dl.place.col = keys.place.row = r0;
        product_gpu<0, 1, A_LOWER>(onto, dl, keys, m, D, m, 0, 1, way);
    }
    for (int at = 0; at < n; at += height) {
        int m = min_int(height, n - at), last = r0 + n == T;
        Part<X> dl = part_of((const X *)e, p->lx, step, n, (int)p->ld, at, r0 + at),
            q_I = part_of(q, ld, wide_step, T, D, r0 + at);
        StoreSummed<X> to_dk = {{dk + (int64_t)at * ld, ld, wide_step, sigma, 0}, dk_sums, at};
        Store<float> to_sum = {dk_sum + (int64_t)(r0 + at) * D, D, all, sigma, !last};
        if (p->R >= T) product_gpu<1, 1, A_UPPER>(to_dk, dl, q_I, m, D, n - at, 0, 1, sums_way);
        else product_gpu<1, 1, A_UPPER>(to_sum, dl, q_I, m, D, n - at, 0, 1, way);
    }
    if (p->R < T)
        matmul_gpu(into(dk_sum, D, all), transpose_gpu(rows_of_gpu((const X *)e, p->lx, step)),
                   rows_of_gpu(q + (int64_t)r0 * ld, ld, wide_step), r0, D, n, sigma, r0 + n < T ? 1 : 0, B,
                   stream);
}

// dbias, unless NULL: the sums of dq and dk, which follow each other, over the rows are added to it.
template <typename X>
static void feedback_backward_fast(X *df, X *dq, X *dk, float *dgamma, float *dbias, Scratch weights_room,
                                   Scratch scratch_room, const X *ds, const X *s, const X *c, float *stats,
                                   const X *q, const X *k, const float *gamma, Shape shape,
                                   const Panels *panels, ColumnSums *sums, cudaStream_t stream) {
    int B = shape.B, T = shape.T, D = shape.d, ld = shape.ld;
    feedback_fits(panels, B, T, weights_room, scratch_room);
    Panels p = *panels;
    float *weights = weights_room.at, *scratch = scratch_room.at;
    // on the way to memory: with tiles, and dk' where one panel holds the whole of it
    TileSums dq_sums = {}, dk_sums = {};
    int summed = dbias && p.tiles && p.asked <= 0, dk_summed = summed && p.R >= T;
    if (summed) dq_sums = tile_sums(sums, dbias, D, B, T);
    if (dk_summed) dk_sums = tile_sums(sums, dbias + D, D, B, T);
    for (int r0 = (T - 1) / p.R * p.R; r0 >= 0; r0 -= p.R)
        feedback_panel_backward_gpu(df, dq, dk, dgamma, weights, scratch, &p, ds, s, c, stats, q, k, ld,
                                       gamma, B, T, D, r0, dq_sums, dk_sums, stream);
    if (p.R < T) copy_gpu(dk, ld, scratch + p.dk, B * T, D, stream);
    if (!dbias || dk_summed) return; // else the sums of what has none yet; no column is turned
    rope_bias_backward_gpu(summed ? dk : dq, summed ? dbias + D : dbias, ld, {}, B * T, 0, summed ? D : 2 * D,
                           sums, stream);
}
