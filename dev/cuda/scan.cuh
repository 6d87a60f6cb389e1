// A matrix in shared memory, its element (i, j) at[i·ld + j] or, transposed, at[j·ld + i]. With PARTS 2 it
// is the sum of two, `low` numbers apart, what bf16 keeps of each number and what it keeps of the rest:
// products of it are as exact as with 16 bits.
template <typename X, int PARTS = 1> struct SharedMatrix {
    X *at;
    int ld, low, triangle, transposed;
    __device__ X *operator()(int i, int j, int part = 0) const {
        return at + part * low + (transposed ? j * ld + i : i * ld + j);
    }
    __device__ SharedMatrix t() const { return {at, ld, low, triangle, !transposed}; }
    template <int V> __device__ void read(int i, int j, float v[V]) const {
        float more[V] = {};
        read_some<V>(v, (*this)(i, j));
        if (PARTS > 1) read_some<V>(more, (*this)(i, j, 1));
        for (int e = 0; e < V; e++) v[e] += more[e];
    }
    template <int V> __device__ void set(int i, int j, float v[V]) const {
        for (int part = 0; part < PARTS; part++) {
            write_some<V>((*this)(i, j, part), v);
            for (int e = 0; e < V; e++) v[e] -= get(to<X>(v[e]));
        }
    }
    // In rows i to i + 15, columns before first and from end on are 0.
    __device__ int first(int i) const { return triangle && transposed ? i : 0; }
    __device__ int end(int i, int all) const { return triangle && !transposed ? min(i + 16, all) : all; }
};

// 16 rows and columns of it, from (i, j), as mma wants them: a thread has two neighbours in row lane / 4,
// those 8 rows below, then the same 8 columns further.
template <int PARTS>
__device__ static inline void fragment(uint32_t x[4], SharedMatrix<bf16, PARTS> a, int i, int j, int part) {
    int lane = threadIdx.x % 32, down = lane / 8 % 2 * 8, right = lane / 16 * 8;
    bf16 *row =
        a.transposed ? a(i + down, j + right + lane % 8, part) : a(i + down + lane % 8, j + right, part);
    if (a.transposed) ldmatrix_x4_trans(x, row);
    else ldmatrix_x4(x, row);
}

// A warp: 16 rows from i and 32 columns from j of a·b, or of (a ⊙ scale)·b with a scale for each column of
// a, are added to sum, where [q][e] stands in row i + lane / 4 + e / 2 · 8 and column j + 8q + lane % 4 · 2
// + e % 2.
template <int SCALED = 0, int A, int B>
__device__ static inline void add_product(float sum[4][4], SharedMatrix<bf16, A> a, SharedMatrix<bf16, B> b,
                                          int i, int j, int K, const float *scale = NULL) {
    constexpr int parts = (SCALED ? 2 : A) * B;
    for (int k = a.first(i); k < a.end(i, K); k += 16) {
        uint32_t x[2][4], y[B][2][4];
        for (int part = 0; part < A; part++) fragment(x[part], a, i, k, part);
        for (int part = 0; part < B; part++)
            for (int half = 0; half < 2; half++) fragment(y[part][half], b.t(), j + 16 * half, k, part);
        for (int r = 0; r < 4 * SCALED; r++) { // two numbers in each
            float2 s = *(const float2 *)(scale + k + threadIdx.x % 4 * 2 + r / 2 * 8);
            float first = __uint_as_float(x[0][r] << 16) * s.x,
                  second = __uint_as_float(x[0][r] & 0xffff0000) * s.y;
            x[0][r] = pack_two(first, second);
            x[1][r] = pack_two(first - __uint_as_float(x[0][r] << 16),
                               second - __uint_as_float(x[0][r] & 0xffff0000));
        }
        for (int part = 0; part < parts; part++)
            for (int q = 0; q < 4; q++) {
                const uint32_t *v = y[part % B][q / 2] + q % 2, right[2] = {v[0], v[2]};
                mma_bf16(sum[q], x[part / B], right);
            }
    }
}
template <int SCALED = 0>
__device__ static inline void add_product(float sum[4][4], SharedMatrix<float> a, SharedMatrix<float> b,
                                          int i, int j, int K, const float *scale = NULL) {
    int row = i + threadIdx.x % 32 / 4, column = j + threadIdx.x % 4 * 2;
    for (int k = a.first(i); k < a.end(i, K); k++)
        for (int e = 0; e < 4; e++) {
            float x = *a(row + e / 2 * 8, k) * (SCALED ? scale[k] : 1);
            for (int q = 0; q < 4; q++) sum[q][e] += x * *b(k, column + q * 8 + e % 2);
        }
}

// A block: out of between(a b) + (a2 ⊙ scale) b2, M by N and some rows and columns more, with K and K2
// numbers in each sum. Both get (r, i, j, v): v[0] and v[1] are those of row i in columns j and j + 1. Each
// row belongs to two warps of the eight and within them to the four threads that agree in lane / 4; a
// thread's rows of 64 are r = 0 and 1.
enum { SCAN_THREADS = 256, SCAN_ROWS = 64 };
template <int SCALED = 0, typename A, typename B, typename Between, typename A2, typename B2, typename Out>
__device__ inline void block_products(int M, int N, int K, A a, B b, Between between, int K2, A2 a2, B2 b2,
                                      Out out, const float *scale = NULL) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i0 = warp % 4 * 16; i0 < M; i0 += 64)
        for (int j0 = warp / 4 * 32; j0 < N; j0 += 64) {
            float sum[4][4] = {};
            auto all = [&](auto f) {
#pragma unroll
                for (int q = 0; q < 4; q++)
#pragma unroll
                    for (int r = 0; r < 2; r++)
                        f(r, i0 + lane / 4 + 8 * r, j0 + q * 8 + lane % 4 * 2, sum[q] + 2 * r);
            };
            add_product(sum, a, b, i0, j0, K);
            all(between);
            add_product<SCALED>(sum, a2, b2, i0, j0, K2, scale);
            all(out);
        }
}

// The scan. A block takes one head of one sequence and walks along its chunks. What a product reads of a
// chunk lies in shared memory as X, with zeros up to the next multiple of 32 rows and columns: inputs as
// they are, all else in two parts where X is bf16. Sums and gradients of L, decays and what is multiplied
// by them stay in float32 or more.
template <typename X> struct Scan {
    const X *xbc, *dy;
    const float *step, *A_log, *skip;
    int T, E, S, heads, P, rows, in_eights;
    // those of v that are there
    template <typename Y> __device__ void store(Y *at, const float v[2], int columns) const {
        if (in_eights && columns > 0) write_some<2>(at, v);
        else for (int e = 0; e < min(columns, 2); e++) at[e] = to<Y>(v[e]);
    }
};
// decay = exp(L), fade = exp(L_last - L), scale = fade Δ; 0 past the chunk's end. Below: parts of sums
struct ScanRows {
    double L[SCAN_ROWS];
    float delta[SCAN_ROWS], decay[SCAN_ROWS], fade[SCAN_ROWS], scale[SCAN_ROWS], diagonal[SCAN_ROWS],
        skip[SCAN_ROWS];
    float left[2][SCAN_ROWS], below[4][SCAN_ROWS], read[2][SCAN_ROWS], taken[2][SCAN_ROWS], shared[32];
};

static int scan_bytes(int S, int w, int rows, int number, int backward) {
    int pad = 16 / number, ld_s = (int)round_up(S, 32) + pad, ld_w = (int)round_up(w, 32) + pad,
        parts = number == 2 ? 2 : 1;
    return (int)sizeof(ScanRows) +
           number * (rows * (2 * ld_s + (1 + backward) * (ld_w + parts * (rows + pad))) +
                     (1 + backward) * parts * (int)round_up(S, 32) * ld_w);
}
// The most rows of a chunk for which the shared memory suffices. 0: it does not
static int scan_rows(int S, int w, int number) {
    for (int rows = SCAN_ROWS; rows; rows -= 32)
        if (scan_bytes(S, w, rows, number, 1) <= gpu.shared) return rows;
    return 0;
}

__device__ static inline void scale_pair(float v[2], float factor) {
    v[0] *= factor;
    v[1] *= factor;
}
// The sum of x over the lanes up to this one.
__device__ static inline double prefix_sum(double x) {
    for (int down = 1; down < 32; down *= 2) {
        double before = __shfl_up_sync(~0u, x, down);
        if ((int)threadIdx.x % 32 >= down) x += before;
    }
    return x;
}

template <typename X> struct ScanBlock {
    enum { PARTS = sizeof(X) == sizeof(bf16) ? 2 : 1 };
    Scan<X> s;
    ScanRows *r;
    SharedMatrix<X> b, c, x, dy;
    SharedMatrix<X, PARTS> M, h, dM, dh;
    int head, w, n, rows_h;
    double rate;
    int64_t row; // of the chunk's first token
    __device__ ScanBlock(const Scan<X> &scan, uint4 *memory, int backward)
        : s(scan), head(blockIdx.x), w(s.E / s.heads) {
        r = (ScanRows *)memory;
        X *at = (X *)(r + 1);
        rows_h = (s.S + 31) / 32 * 32;
        rate = expf(s.A_log[head]);
        auto take = [&](auto matrix, int parts, int rows, int width, int triangle = 0) {
            int ld = (width + 31) / 32 * 32 + 16 / (int)sizeof(X);
            matrix = {at, ld, rows * ld, triangle, 0};
            at += parts * rows * ld;
            return matrix;
        };
        b = take(b, 1, s.rows, s.S);
        c = take(c, 1, s.rows, s.S);
        x = take(x, 1, s.rows, w);
        M = take(M, PARTS, s.rows, s.rows, 1);
        h = take(h, PARTS, rows_h, w);
        if (!backward) return;
        dy = take(dy, 1, s.rows, w);
        dM = take(dM, PARTS, s.rows, s.rows, 1);
        dh = take(dh, PARTS, rows_h, w);
    }
    template <int V, int N, typename Y>
    __device__ void fetch_pieces(SharedMatrix<X, N> m, const Y *from, int64_t ld, int rows, int width,
                                 int all_rows) const {
        int pieces = (width + 31) / 32 * 32 / V;
#pragma unroll 4
        for (int item = threadIdx.x; item < all_rows * pieces; item += SCAN_THREADS) {
            int i = item / pieces, j = item % pieces * V, inside = i < rows && j < width;
            const Y *at = inside ? from + i * ld + j : from;
            if constexpr (V == 8 && sizeof(X) == 2 && sizeof(Y) == 2)
                copy_async_16(m(i, j), at, inside * 16);
            else {
                float v[V] = {};
                if (inside) read_some<V>(v, at);
                m.template set<V>(i, j, v);
            }
        }
    }
    template <int N, typename Y>
    __device__ void fetch(SharedMatrix<X, N> m, const Y *from, int64_t ld, int rows, int width,
                          int all_rows) const {
        if (s.in_eights) fetch_pieces<8>(m, from, ld, rows, width, all_rows);
        else fetch_pieces<1>(m, from, ld, rows, width, all_rows);
    }
    // The chunk of row t0: its inputs and the first six lines of ScanRows, backward with the state before
    // it. Lane l of the first warp takes rows 2l and 2l + 1.
    __device__ void begin(int t0, const float *state) {
        int W = s.E + 2 * s.S;
        n = min(s.P, s.T - t0);
        row = (int64_t)blockIdx.y * s.T + t0;
        __syncthreads(); // the chunk before is done
        const X *xbc = s.xbc + row * W;
        fetch(b, xbc + s.E, W, n, s.S, s.rows);
        fetch(c, xbc + s.E + s.S, W, n, s.S, s.rows);
        fetch(x, xbc + head * w, W, n, w, s.rows);
        if (state) fetch(dy, s.dy + row * s.E + head * w, s.E, n, w, s.rows);
        if (state) fetch(h, state, s.E, s.S, w, rows_h);
        if (threadIdx.x < 32) { // L in double: differences of sums that may be large
            int t = 2 * threadIdx.x;
            double L[2];
            float delta[2];
            for (int i = 0; i < 2; i++) delta[i] = t + i < n ? s.step[(row + t + i) * s.heads + head] : 0;
            L[1] = prefix_sum(-rate * delta[0] - rate * delta[1]);
            L[0] = L[1] + rate * delta[1];
            double last = __shfl_sync(~0u, L[1], 31);
            for (int i = 0; i < 2; i++, t++) {
                r->L[t] = L[i];
                r->delta[t] = delta[i];
                r->decay[t] = t < n ? __expf((float)L[i]) : 0;
                r->fade[t] = t < n ? __expf((float)(last - L[i])) : 0;
                r->scale[t] = r->fade[t] * delta[i];
            }
        }
        copy_async_wait_all();
        __syncthreads();
    }
    // Of row t of a product, to[.][t] gets what this warp has of sum.
    __device__ void row_parts(float (*to)[SCAN_ROWS], const float sum[2]) const {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        for (int i = 0; i < 2; i++) {
            float part = sum[i] + __shfl_xor_sync(~0u, sum[i], 1);
            part += __shfl_xor_sync(~0u, part, 2);
            if (lane % 4 == 0) to[warp / 4][warp % 4 * 16 + lane / 4 + i * 8] = part;
        }
    }
    // M = (c b^T) ⊙ fades ⊙ Δ + skip·I, backward dM = (dy x^T) ⊙ fades ⊙ Δ; of (c b^T) ⊙ fades ⊙ (dy x^T)
    // the diagonal, what lies below it in each column, and, times Δ, left of it in each row.
    __device__ void weights(float skip, int backward) const {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32, i0 = warp % 4 * 16, j0 = warp / 4 * 32;
        float cb[4][4] = {}, product[4][4] = {}, left[2] = {}, below[8] = {};
        if (i0 < s.rows && j0 < i0 + 16) { // else beside the chunk or above the diagonal
            add_product(cb, c, b.t(), i0, j0, s.S);
            if (backward) add_product(product, dy, x.t(), i0, j0, w);
        }
        if (i0 < s.rows && j0 < s.rows)
#pragma unroll
            for (int q = 0; q < 4; q++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int t = i0 + lane / 4 + e / 2 * 8, j = j0 + q * 8 + lane % 4 * 2 + e % 2;
                    float fade = __expf(fminf((float)(r->L[t] - r->L[j]), 0)), delta = r->delta[j];
                    if (j > t || t >= n) fade = 0;
                    float term = cb[q][e] * fade * product[q][e];
                    left[e / 2] += j < t ? term * delta : 0;
                    below[2 * q + e % 2] += j < t ? term : 0;
                    if (backward && j == t) r->diagonal[t] = term;
                    if (backward && j == t) r->skip[t] = product[q][e];
                    cb[q][e] = cb[q][e] * fade * delta + (j == t ? skip : 0);
                    product[q][e] *= fade * delta;
                    if (e % 2 == 0) continue;
                    M.template set<2>(t, j - 1, cb[q] + e - 1);
                    if (backward) dM.template set<2>(t, j - 1, product[q] + e - 1);
                }
        if (backward) {
            row_parts(r->left, left);
            for (int i = 0; i < 8; i++) {
                for (int down = 4; down < 32; down *= 2) below[i] += __shfl_xor_sync(~0u, below[i], down);
                if (lane < 4) r->below[warp % 4][j0 + i / 2 * 8 + lane * 2 + i % 2] = below[i];
            }
        }
        __syncthreads();
    }
};

// carried (B,S,E): the state before position 0 of this call, then after its last; NULL: 0, and nothing is
// wanted.
template <typename X>
__global__ void __launch_bounds__(SCAN_THREADS, 3)
    scan_sequence_kernel(X *y, float *states, float *carried, Scan<X> s) {
    extern __shared__ uint4 scan_memory[];
    wait_for_results();
    ScanBlock<X> k(s, scan_memory, 0);
    int64_t size = (int64_t)s.S * s.E, own = k.head * k.w, chunks = (s.T + s.P - 1) / s.P;
    float *state = states + blockIdx.y * chunks * size + own,
          *last = carried ? carried + blockIdx.y * size + own : NULL;
    for (int i = threadIdx.x; i < s.S * k.w; i += SCAN_THREADS) {
        int64_t at = (int64_t)(i / k.w) * s.E + i % k.w;
        state[at] = last ? last[at] : 0;
    }
    __syncthreads();
    k.fetch(k.h, state, s.E, s.S, k.w, k.rows_h);
    for (int t0 = 0; t0 < s.T; t0 += s.P) {
        float *next = t0 + s.P < s.T ? state + size : last;
        k.begin(t0, NULL);
        k.weights(s.skip[k.head], 0);
        block_products(
            k.n, k.w, s.S, k.c, k.h, [&](int, int t, int, float *v) { scale_pair(v, k.r->decay[t]); }, k.n,
            k.M, k.x,
            [&](int, int t, int e, float *v) {
                s.store(y + (k.row + t) * s.E + own + e, v, t < k.n ? k.w - e : 0);
            });
        __syncthreads();
        if (next) block_products<1>(s.S, k.w, 0, k.b, k.x, [&](int, int i, int e, float *v) {
                                        k.h.template read<2>(i, e, v);
                                        scale_pair(v, k.r->decay[k.n - 1]);
                                    }, k.n, k.b.t(), k.x, [&](int, int i, int e, float *v) {
                                        s.store(next + (int64_t)i * s.E + e, v, i < s.S ? k.w - e : 0);
                                        k.h.template set<2>(i, e, v);
                                    }, k.r->scale);
        state = next;
    }
}

// All gradients of a head; the equations stand above scan_head_backward in train_sessa.c. partial
// (N,heads,2S) is the head's part of db and dc.
// The sum of dL from t to the chunk's end is that of dM ⊙ M over rows from t on and columns before t, with
// what was read of the state from t on, what it took before t, and what was carried. It is taken from sums
// of rows and of columns without the diagonal, which is in neither: where states decay at once the rest is
// small beside it, and rounding the whole would leave little of the rest.
template <typename X>
__global__ void __launch_bounds__(SCAN_THREADS, 2)
    scan_sequence_backward_kernel(X *dxbc, float *dstep, float *partial, const float *states, Scan<X> s) {
    extern __shared__ uint4 scan_memory[];
    wait_for_results();
    ScanBlock<X> k(s, scan_memory, 1);
    ScanRows *r = k.r;
    int S = s.S, w = k.w, W = s.E + 2 * S, chunks = (s.T + s.P - 1) / s.P;
    int64_t size = (int64_t)S * s.E, own = k.head * w;
    float rate = expf(s.A_log[k.head]), skip = s.skip[k.head];
    k.fetch(k.dh, states, 0, 0, w, k.rows_h); // 0
    for (int chunk = chunks - 1; chunk >= 0; chunk--) {
        k.begin(chunk * s.P, states + ((int64_t)blockIdx.y * chunks + chunk) * size + own);
        k.weights(skip, 1);
        int n = k.n;
        X *dx = dxbc + k.row * W + own;
        float *part = partial + (k.row * s.heads + k.head) * 2 * S, read[2] = {}, taken[2] = {}, carried = 0;
        int64_t next = (int64_t)s.heads * 2 * S; // from row to row of part
        block_products(
            n, w, S, k.b, k.dh, [&](int, int j, int, float *v) { scale_pair(v, r->scale[j]); }, n, k.M.t(),
            k.dy,
            [&](int, int j, int e, float *v) { s.store(dx + (int64_t)j * W + e, v, j < n ? w - e : 0); });
        block_products(
            n, S, w, k.x, k.dh.t(),
            [&](int q, int j, int i, float *v) {
                float b[2];
                k.b.template read<2>(j, i, b);
                taken[q] += b[0] * v[0] + b[1] * v[1];
                scale_pair(v, r->scale[j]);
            },
            n, k.dM.t(), k.c,
            [&](int, int j, int i, float *v) { s.store(part + j * next + i, v, j < n ? S - i : 0); });
        block_products(
            n, S, w, k.dy, k.h.t(),
            [&](int q, int t, int i, float *v) {
                float c[2];
                k.c.template read<2>(t, i, c);
                scale_pair(v, r->decay[t]);
                read[q] += c[0] * v[0] + c[1] * v[1];
            },
            n, k.dM, k.b,
            [&](int, int t, int i, float *v) { s.store(part + t * next + S + i, v, t < n ? S - i : 0); });
        k.row_parts(r->taken, taken);
        k.row_parts(r->read, read);
        __syncthreads();
        block_products<1>(
            S, w, 0, k.c, k.dy,
            [&](int, int i, int e, float *v) {
                float h[2];
                k.h.template read<2>(i, e, h);
                k.dh.template read<2>(i, e, v);
                scale_pair(v, r->decay[n - 1]);
                carried += h[0] * v[0] + h[1] * v[1];
            },
            n, k.c.t(), k.dy, [&](int, int i, int e, float *v) { k.dh.template set<2>(i, e, v); }, r->decay);
        carried = block_sum(carried, r->shared);
        if (threadIdx.x >= 32) continue;
        double of_row[2] = {}, of_taken[2] = {}, ddelta[2] = {}; // of rows 2·lane and 2·lane + 1
        for (int i = 0, t = 2 * threadIdx.x; i < 2; i++, t++) {
            if (t >= n) continue;
            float below = r->below[0][t] + r->below[1][t] + r->below[2][t] + r->below[3][t],
                  taken = r->taken[0][t] + r->taken[1][t];
            of_row[i] = (double)(r->left[0][t] + r->left[1][t] + r->read[0][t] + r->read[1][t]) -
                        (double)(below * r->delta[t]);
            of_taken[i] = r->scale[t] * taken;
            ddelta[i] = below + r->diagonal[t] + r->fade[t] * taken;
        }
        double rows = prefix_sum(of_row[0] + of_row[1]), takes = prefix_sum(of_taken[0] + of_taken[1]),
               all = __shfl_sync(~0u, rows, 31);
        for (int i = 1, t = 2 * threadIdx.x + 1; i >= 0; i--, t--) {
            rows -= of_row[i]; // of the rows before t
            takes -= of_taken[i];
            if (t >= n) continue;
            float *row = dstep + (k.row + t) * 3 * s.heads + k.head,
                  sum = (float)(carried + all - rows + takes);
            row[0] = (float)ddelta[i] - rate * sum;
            row[s.heads] = -rate * r->delta[t] * sum;
            row[2 * s.heads] = r->skip[t];
        }
    }
}
// P 0: chunks as large as the shared memory allows
template <typename X>
static Scan<X> scan_in_chunks(const X *xbc, const X *dy, const float *step, ScanShape scan, int P) {
    int S = scan.S, w = scan.E / scan.heads, rows = scan_rows(S, w, sizeof(X));
    return {xbc,        dy,
            step,       scan.A_log,
            scan.skip,  scan.T,
            scan.E,     S,
            scan.heads, P > 0 ? min_int(P, rows) : rows,
            rows,       wide({S, w}, {xbc, dy})};
}
template <typename X>
static void scan_forward_fast(X *y, float *states, float *carried, const X *xbc, const float *step,
                              ScanShape scan, int P, cudaStream_t stream) {
    Scan<X> s = scan_in_chunks(xbc, (const X *)NULL, step, scan, P);
    int bytes = scan_bytes(scan.S, scan.E / scan.heads, s.rows, sizeof(X), 0);
    allow_shared(scan_sequence_kernel<X>, bytes);
    LAUNCH(scan_sequence_kernel<X>, dim3(scan.heads, scan.B), SCAN_THREADS, bytes, stream, y, states, carried,
           s);
}
// db and dc from the heads' parts: scan_sums_gpu, of the plain way.
template <typename X>
static void scan_sums_gpu(X *dxbc, const float *part, float *dA_log, float *dskip, const float *dstep,
                          ScanShape scan, int in_eights, ColumnSums *sums, cudaStream_t stream);
template <typename X>
static void scan_backward_fast(X *dxbc, float *dstep, float *dA_log, float *dskip, Scratch scratch,
                               const X *dy, const float *states, const X *xbc, const float *step,
                               ScanShape scan, int P, ColumnSums *sums, cudaStream_t stream) {
    Scan<X> s = scan_in_chunks(xbc, dy, step, scan, P);
    int bytes = scan_bytes(scan.S, scan.E / scan.heads, s.rows, sizeof(X), 1);
    float *parts = borrow(scratch, (int64_t)scan.B * scan.T * scan.heads * 2 * scan.S);
    allow_shared(scan_sequence_backward_kernel<X>, bytes);
    LAUNCH(scan_sequence_backward_kernel<X>, dim3(scan.heads, scan.B), SCAN_THREADS, bytes, stream, dxbc,
           dstep, parts, states, s);
    scan_sums_gpu(dxbc, parts, dA_log, dskip, dstep, scan, s.in_eights, sums, stream);
}
