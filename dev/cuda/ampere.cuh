// Tensor cores as every card since Ampere has them (sm_80 to sm_120): a warp multiplies what it holds in its
// registers (mma.sync) and takes there what others have copied to shared memory meanwhile (cp.async,
// ldmatrix). Products, attention and its way back in bf16 where there is no Hopper, or one that hides.
//
// A block is four warps. It walks along a ring of `slots` slots of 16 KiB: all threads have what a step
// needs copied slots - 1 steps ahead. Three slots are 48 KiB, so that two blocks share a multiprocessor of
// 100 KiB; four where the card has room for two such blocks.
//
// A tile is rows of 64 numbers, 128 bytes; the 16 bytes number i of row r lie at place i ^ r % 8, so that
// the same 16 bytes of 8 rows that follow each other, which ldmatrix reads at once, lie in different banks.
// Wider tiles are several of them, one behind the other; in a tile of 32 columns two rows share a line.

enum { WARPS = 4, WARP_THREADS = 32 * WARPS, SLOT = 1 << 14 };

// Where the numbers 8·chunk .. 8·chunk+7 of a row are in a tile of ROWS rows and COLS columns
template <int COLS, int ROWS> __device__ inline bf16 *tile_place(bf16 *tile, int row, int chunk) {
    if constexpr (COLS == 32) return tile + row / 2 * 64 + (row % 2 * 4 + (chunk ^ row / 2 % 4)) * 8;
    else return tile + (chunk / 8 * ROWS + row) * 64 + (chunk % 8 ^ row % 8) * 8;
}
// Has a tile copied: `from` on, rows ld apart; what lies past `rows` and `cols` is 0.
template <int COLS, int ROWS>
__device__ inline void fetch_tile(bf16 *tile, const bf16 *from, int64_t ld, int rows, int cols) {
    enum { CHUNKS = COLS / 8, STEP = WARP_THREADS / CHUNKS };
    int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
    const bf16 *at = from + first * ld + chunk * 8;
#pragma unroll
    for (int r = 0; r < ROWS; r += STEP) {
        int inside = first + r < rows && chunk * 8 < cols;
        copy_async_16(tile_place<COLS, ROWS>(tile, first + r, chunk), inside ? at + r * ld : from,
                      16 * inside);
    }
}

// Operands of a warp from a tile: 16 rows of the left one from r on, 16 columns of the right one from n on,
// 16 of K from k on. `down`: the tile has K down its rows, else across.
template <int COLS, int ROWS, int DOWN>
__device__ inline void left_operand(uint32_t a[4], bf16 *tile, int r, int k) {
    int lane = threadIdx.x % 32;
    if (DOWN) ldmatrix_x4_trans(a, tile_place<COLS, ROWS>(tile, k + lane / 16 * 8 + lane % 8,
                                                          r / 8 + lane / 8 % 2));
    else ldmatrix_x4(a, tile_place<COLS, ROWS>(tile, r + lane % 16, k / 8 + lane / 16));
}
// b[0], b[1]: the first 8 columns
template <int COLS, int ROWS, int DOWN>
__device__ inline void right_operand(uint32_t b[4], bf16 *tile, int n, int k) {
    int lane = threadIdx.x % 32;
    if (DOWN) ldmatrix_x4_trans(b, tile_place<COLS, ROWS>(tile, k + lane % 16, n / 8 + lane / 16));
    else ldmatrix_x4(b, tile_place<COLS, ROWS>(tile, n + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
}
// c (16M,N) += a (16M,16) · b (16,N): b's columns from n on, 16 of K from k on
template <int COLS, int ROWS, int DOWN, int M, int N>
__device__ inline void multiply(float (&c)[M][N / 8][4], const uint32_t (&a)[M][4], bf16 *tile, int n,
                                int k) {
#pragma unroll
    for (int i = 0; i < N / 16; i++) {
        uint32_t b[4];
        right_operand<COLS, ROWS, DOWN>(b, tile, n + 16 * i, k);
#pragma unroll
        for (int m = 0; m < M; m++) {
            mma_bf16(c[m][2 * i], a[m], b);
            mma_bf16(c[m][2 * i + 1], a[m], b + 2);
        }
    }
}

// for i < n: use(i, slot), once fetch(i, slot), slots - 1 steps before, has brought it what it needs. The first
// `begun` are under way, in a group each.
template <typename Fetch, typename Use>
__device__ inline void walk(int n, int slots, int begun, Fetch fetch, Use use) {
    for (int i = begun; i < slots - 1; i++) {
        if (i < n) fetch(i, i);
        copy_async_commit();
    }
    for (int i = 0, slot = 0, next = slots - 1; i < n; i++) {
        if (slots == 4) copy_async_wait<2>();
        else copy_async_wait<1>();
        __syncthreads(); // what all have had copied is there, and nobody reads the slot that is next
        if (i + slots - 1 < n) fetch(i + slots - 1, next);
        copy_async_commit();
        use(i, slot);
        slot = slot + 1 == slots ? 0 : slot + 1;
        next = next + 1 == slots ? 0 : next + 1;
    }
    copy_async_wait<0>();
    __syncthreads(); // the ring's memory is free
}
// How many slots a block has that needs `own` bytes besides
static int ring_slots(int own) {
    int room = min_int(gpu.shared, gpu.shared_together / 2 - 1024);
    return own + 4 * SLOT <= room ? 4 : 3;
}

// ----------------------------------------------------------------------------
// the product whose result goes through a function on its way, as in hopper.cuh

// A block takes ROWS rows and BN columns of one item, a warp half of each, STEP of K at a time. Then the
// sums go through shared memory, 32 rows of each warp's at a time, and a thread has 8 neighbours of a row. A
// product that is small goes in tiles of 64 rows, four times as many blocks, unless f sums over 128.
template <int BN, typename F> struct ProductTile {
    enum { ROWS = BN == 64 && !sums_columns<F> ? 64 : 128, STEP = ROWS == 64 ? 64 : 32 };
};
template <int BN, int A_COLUMNS, int B_COLUMNS, int SHAPE, typename F>
__global__ void __launch_bounds__(WARP_THREADS, 2)
    product_warps_kernel(Part<bf16> a, Part<bf16> b, F f, int M, int N, int K, int shift, int items,
                         int slots) {
    enum {
        ROWS = ProductTile<BN, F>::ROWS,
        STEP = ProductTile<BN, F>::STEP,
        WIDTH = BN / 2,
        TILES = ROWS / 32,
        PITCH = BN + 8,
        PIECES = BN / 8
    };
    extern __shared__ __align__(1024) unsigned char shared_tiles[];
    int m0 = (int)(SHAPE == A_LOWER ? gridDim.y - 1 - blockIdx.y : blockIdx.y) * ROWS,
        n0 = (int)blockIdx.x * BN, item = (int)blockIdx.z % items,
        sequence = (int)(SHAPE == A_LOWER ? gridDim.z - 1 - blockIdx.z : blockIdx.z) / items;
    int k0 = SHAPE == A_UPPER   ? m0
             : SHAPE == B_LOWER ? n0
                                : 0,
        k1 = SHAPE == A_LOWER ? min(K, shift + m0 + ROWS) : K, once = max(0, (k1 - k0 + STEP - 1) / STEP),
        steps = once * part_turns(a.place, b.place);
    wait_for_results();
    // in tiles of 128 even where these are of 64: so far reads who multiplies with the result
    if (SHAPE == OUT_LOWER && n0 >= shift + (m0 | 127) + 1) return;
    if constexpr (sums_rows<F>) if (!f.wanted(sequence, m0)) return;
    PartPlace p = a.place, q = b.place;
    int a_row = p.row + item * p.row_along + (A_COLUMNS ? k0 : m0),
        a_col = (p.col + item * p.col_along) % p.wrap + (A_COLUMNS ? m0 : k0),
        b_row = q.row + item * q.row_along + (B_COLUMNS ? k0 : n0),
        b_col = (q.col + item * q.col_along) % q.wrap + (B_COLUMNS ? n0 : k0);
    const bf16 *left = a.at + sequence * a.step + a_row * a.ld + a_col,
               *right = b.at + sequence * b.step + b_row * b.ld + b_col;
    int64_t a_next = STEP * (A_COLUMNS ? a.ld : 1), b_next = STEP * (B_COLUMNS ? b.ld : 1);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp % 2 * (ROWS / 2), col = warp / 2 * WIDTH;
    auto tile = [&](int slot) { return (bf16 *)(shared_tiles + slot * SLOT); };
    auto fetch = [&](int at, int slot) {
        int turn = at / once, i = at - turn * once, k = i * STEP, a_lo = part_of_A(p, turn),
            b_lo = part_of_B(p, q, turn), a_cols = a.cols - a_col - a_lo, b_cols = b.cols - b_col - b_lo;
        const bf16 *a_at = left + i * a_next + a_lo, *b_at = right + i * b_next + b_lo;
        bf16 *to = tile(slot) + ROWS * STEP;
        if (A_COLUMNS) fetch_tile<ROWS, STEP>(tile(slot), a_at, a.ld, a.rows - a_row - k, a_cols);
        else fetch_tile<STEP, ROWS>(tile(slot), a_at, a.ld, a.rows - a_row, a_cols - k);
        if (B_COLUMNS) fetch_tile<BN, STEP>(to, b_at, b.ld, b.rows - b_row - k, b_cols);
        else fetch_tile<STEP, BN>(to, b_at, b.ld, b.rows - b_row, b_cols - k);
    };
    float sum[TILES][WIDTH / 8][4] = {};
    walk(steps, slots, 0, fetch, [&](int, int slot) {
#pragma unroll
        for (int k = 0; k < STEP; k += 16) {
            uint32_t rows[TILES][4];
#pragma unroll
            for (int m = 0; m < TILES; m++)
                left_operand<A_COLUMNS ? ROWS : STEP, A_COLUMNS ? STEP : ROWS, A_COLUMNS>(
                    rows[m], tile(slot), row + 16 * m, k);
            multiply<B_COLUMNS ? BN : STEP, B_COLUMNS ? STEP : BN, B_COLUMNS, TILES, WIDTH>(
                sum, rows, tile(slot) + ROWS * STEP, col, k);
        }
    });
    float(*sums)[PITCH] = (float(*)[PITCH])shared_tiles, columns[8] = {};
#pragma unroll
    for (int half = 0; half < TILES / 2; half++) {
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n++)
#pragma unroll
                for (int low = 0; low < 2; low++)
                    write_some<2>(
                        &sums[warp % 2 * 32 + m * 16 + low * 8 + lane / 4][col + n * 8 + lane % 4 * 2],
                        &sum[2 * half + m][n][2 * low]);
        __syncthreads();
#pragma unroll 4
        for (int at = threadIdx.x; at < 64 * PIECES; at += WARP_THREADS) {
            int place = at / PIECES, r = m0 + place / 32 * (ROWS / 2) + half * 32 + place % 32,
                i = n0 + at % PIECES * 8;
            float v[8];
            read_some<8>(v, &sums[place][i - n0]);
            if constexpr (sums_rows<F>) {
                float2 two = r < M && i < N ? f.run_some(sequence, r, i, v) : make_float2(-INFINITY, 0);
                for (int other = PIECES / 2; other; other /= 2) {
                    two.x = fmaxf(two.x, __shfl_xor_sync(~0u, two.x, other));
                    two.y += __shfl_xor_sync(~0u, two.y, other);
                }
                if (lane % PIECES == 0 && r < M) f.row(sequence, r, n0 / BN, two);
            } else if (r < M && i < N) {
                f(Known<8>(), sequence, item, r, i, v);
                for (int e = 0; e < 8 * sums_columns<F>; e++) columns[e] += v[e];
            }
        }
        __syncthreads();
    }
    if constexpr (sums_columns<F>) {
        for (int e = 0; e < 8; e++)
            for (int other = PIECES; other < 32; other *= 2)
                columns[e] += __shfl_xor_sync(~0u, columns[e], other);
        if (lane < PIECES) write_some<8>(&sums[warp][lane * 8], columns);
        __syncthreads();
        int i = threadIdx.x;
        float all = 0;
        for (int w = 0; w < WARPS && i < BN; w++) all += sums[w][i];
        if (i < BN && n0 + i < N) f.column(sequence, m0, n0 + i, all);
    }
}
template <int A_COLUMNS, int B_COLUMNS, int SHAPE, int BN, typename F>
static void product_warps(F f, Part<bf16> a, Part<bf16> b, int M, int N, int K, int shift, int items, int B,
                          cudaStream_t stream) {
    auto kernel = product_warps_kernel<BN, A_COLUMNS, B_COLUMNS, SHAPE, F>;
    int rows = ProductTile<BN, F>::ROWS;
    dim3 blocks((N + BN - 1) / BN, (M + rows - 1) / rows, B * items);
    int slots = ring_slots(0);
    must_fit((int64_t)B * items, MOST_SEQUENCES, "items of a product");
    allow_shared(kernel, slots * SLOT);
    LAUNCH(kernel, blocks, WARP_THREADS, slots * SLOT, stream, a, b, f, M, N, K, shift, items, slots);
}

// ----------------------------------------------------------------------------
// attention
//
// As in attention.cuh: the weights stay in registers, and the way back is dq by rows, then dk and dv by
// keys. A warp keeps 16·M rows of one side, the walk is along the other, WALK rows of it and what belongs
// to them a slot. The blocks with most to do come first, some heads at a time, whose keys and values stay
// in the L2 cache.

template <int DH> struct WarpTiles {
    enum { M = DH == 64 ? 2 : 1, ROWS = 16 * M * WARPS, WALK = SLOT / 4 / DH };
};
typedef struct { int T, H, G, d, first, at_once, slots; int64_t ld; float scale, sigma; } HeadShape;

// The block's head, and as result its place among the head's `blocks`
__device__ static inline int place_of_block(int &head, int blocks, int at_once) {
    int turn = blockIdx.x % (blocks * at_once);
    head = blockIdx.x / (blocks * at_once) * at_once + turn % at_once;
    return turn / at_once;
}
// Head number h, d wide, of rows row .. row+ROWS-1 of `rows`, ld apart, as a tile
template <int DH, int ROWS>
__device__ inline void fetch_head(bf16 *tile, const bf16 *x, int64_t ld, int h, int d, int row, int rows) {
    fetch_tile<DH, ROWS>(tile, x + row * ld + h * d, ld, rows - row, d);
}
// A warp's rows from such a tile as left operands
template <int DH, int M>
__device__ inline void warp_rows(uint32_t (&a)[DH / 16][M][4], bf16 *tile) {
#pragma unroll
    for (int k = 0; k < DH / 16; k++)
#pragma unroll
        for (int m = 0; m < M; m++)
            left_operand<DH, 16 * M * WARPS, 0>(a[k][m], tile, (threadIdx.x / 32 * M + m) * 16, k * 16);
}
// X(w) as a left operand: 16 of its columns, the first of which is column 8n
template <int M, int N>
__device__ inline void as_left(uint32_t (&a)[M][4], const float (&w)[M][N][4], int n) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[m][i] = pack_two(w[m][n + i / 2][i % 2 * 2], w[m][n + i / 2][i % 2 * 2 + 1]);
}
// A warp's rows c, times factor, through its part of a tile that nobody reads any more to memory: columns
// below d, rows from the warp's first below `rows`. at: the block's first row
template <int DH, int M>
__device__ inline void write_rows(bf16 *at, int64_t ld, const float (&c)[M][DH / 8][4],
                                  const float (&factor)[M][2], int rows, int d, bf16 *tile) {
    enum { ROWS = 16 * M * WARPS };
    int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16 * M;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < DH / 8; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int r = first + m * 16 + half * 8 + lane / 4;
                *(uint32_t *)(tile_place<DH, ROWS>(tile, r, n) + lane % 4 * 2) =
                    pack_two(c[m][n][2 * half] * factor[m][half], c[m][n][2 * half + 1] * factor[m][half]);
            }
    __syncwarp();
#pragma unroll
    for (int p = lane; p < 16 * M * DH / 8; p += 32) {
        int r = first + p / (DH / 8), chunk = p % (DH / 8);
        if (chunk * 8 < d && r < rows)
            *(uint4 *)(at + r * ld + chunk * 8) = *(const uint4 *)tile_place<DH, ROWS>(tile, r, chunk);
    }
}

template <int DH>
__global__ void __launch_bounds__(WARP_THREADS, 2)
    attention_warps_kernel(bf16 *out, float2 *stats, const bf16 *q, const bf16 *k, const bf16 *v,
                           HeadShape s) {
    enum { M = WarpTiles<DH>::M, ROWS = WarpTiles<DH>::ROWS, WALK = WarpTiles<DH>::WALK };
    extern __shared__ __align__(1024) unsigned char shared_tiles[];
    wait_for_results();
    int rows = s.T - s.first, lane = threadIdx.x % 32, head,
        end = rows - place_of_block(head, (rows + ROWS - 1) / ROWS, s.at_once) * ROWS,
        r0 = max(end - ROWS, 0), // pieces are cut off the end: the short one sees least
        b = head / s.H, h = head % s.H, g = h / (s.H / s.G), tiles = (s.first + end + WALK - 1) / WALK,
        warp_row = s.first + r0 + threadIdx.x / 32 * 16 * M; // position of the warp's first row
    k += b * s.T * s.ld;
    v += b * s.T * s.ld;
    auto tile = [&](int slot) { return (bf16 *)(shared_tiles + slot * SLOT); };
    auto fetch = [&](int i, int slot) {
        fetch_head<DH, WALK>(tile(slot), k, s.ld, g, s.d, i * WALK, s.T);
        fetch_head<DH, WALK>(tile(slot) + WALK * DH, v, s.ld, g, s.d, i * WALK, s.T);
    };
    fetch_head<DH, ROWS>(tile(1), q + (int64_t)b * rows * s.ld, s.ld, h, s.d, r0, rows);
    copy_async_commit();
    fetch(0, 0);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    uint32_t own[DH / 16][M][4];
    warp_rows<DH, M>(own, tile(1));
    __syncthreads();
    float sum[M][DH / 8][4] = {}, max[M][2], total[M][2] = {};
    for (int m = 0; m < M; m++) max[m][0] = max[m][1] = -INFINITY;
    walk(tiles, s.slots, 1, fetch, [&](int i, int slot) {
        int j0 = i * WALK;
        if (j0 > warp_row + 16 * M - 1) return;
        float w[M][WALK / 8][4] = {};
#pragma unroll
        for (int kk = 0; kk < DH / 16; kk++)
            multiply<DH, WALK, 0, M, WALK>(w, own[kk], tile(slot), 0, kk * 16);
        int masked = j0 + WALK - 1 > warp_row;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int seen = warp_row + m * 16 + half * 8 + lane / 4 - j0 - lane % 4 * 2; // the row's last key
                float top = -INFINITY;
#pragma unroll
                for (int n = 0; n < WALK / 8; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float &logit = w[m][n][2 * half + e];
                        if (masked && n * 8 + e > seen) logit = -INFINITY;
                        top = fmaxf(top, logit);
                    }
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
                top = fmaxf(max[m][half], s.scale * fmaxf(top, __shfl_xor_sync(~0u, top, 2)));
                float shrink = exp2_fast(max[m][half] - top);
                max[m][half] = top;
                total[m][half] *= shrink;
#pragma unroll
                for (int n = 0; n < DH / 8; n++)
                    for (int e = 2 * half; e < 2 * half + 2; e++) sum[m][n][e] *= shrink;
#pragma unroll
                for (int n = 0; n < WALK / 8; n++)
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        w[m][n][e] = exp2_fast(w[m][n][e] * s.scale - top);
                        total[m][half] += w[m][n][e];
                    }
            }
#pragma unroll
        for (int kk = 0; kk < WALK / 16; kk++) {
            uint32_t weights[M][4];
            as_left(weights, w, 2 * kk);
            multiply<DH, WALK, 1, M, DH>(sum, weights, tile(slot) + WALK * DH, 0, kk * 16);
        }
    });
    float inverse[M][2];
    for (int m = 0; m < M; m++)
        for (int half = 0; half < 2; half++) {
            float all = total[m][half];
            all += __shfl_xor_sync(~0u, all, 1);
            all += __shfl_xor_sync(~0u, all, 2);
            inverse[m][half] = 1 / all;
            int r = warp_row - s.first + m * 16 + half * 8 + lane / 4;
            if (lane % 4 == 0 && r < end)
                stats[(int64_t)head * rows + r] = {max[m][half] + log2f(all), 0};
        }
    int64_t D = (int64_t)s.H * s.d;
    write_rows<DH, M>(out + ((int64_t)b * rows + r0) * D + h * s.d, D, sum, inverse, end - r0, s.d, tile(0));
}

// Both ways back take 32 of the walk's rows at a time: more logits and their gradients than that, beside the
// sums, are too many for the registers.
enum { BACK_WALK = 32 };

// dq. The block's rows of q and dout stay in registers; a slot holds keys and their values.
template <int DH>
__global__ void __launch_bounds__(WARP_THREADS, 2)
    attention_dq_warps_kernel(bf16 *dq, const float2 *stats, const bf16 *q, const bf16 *dout, const bf16 *k,
                              const bf16 *v, HeadShape s) {
    enum { M = WarpTiles<DH>::M, ROWS = WarpTiles<DH>::ROWS, WALK = WarpTiles<DH>::WALK };
    extern __shared__ __align__(1024) unsigned char shared_tiles[];
    wait_for_results();
    int lane = threadIdx.x % 32, blocks = (s.T + ROWS - 1) / ROWS, head,
        r0 = (blocks - 1 - place_of_block(head, blocks, s.at_once)) * ROWS, b = head / s.H, h = head % s.H,
        g = h / (s.H / s.G), tiles = (min(r0 + ROWS, s.T) + WALK - 1) / WALK,
        warp_row = r0 + threadIdx.x / 32 * 16 * M;
    int64_t all = (int64_t)b * s.T * s.ld, D = (int64_t)s.H * s.d;
    auto tile = [&](int slot) { return (bf16 *)(shared_tiles + slot * SLOT); };
    auto fetch = [&](int i, int slot) {
        fetch_head<DH, WALK>(tile(slot), k + all, s.ld, g, s.d, i * WALK, s.T);
        fetch_head<DH, WALK>(tile(slot) + WALK * DH, v + all, s.ld, g, s.d, i * WALK, s.T);
    };
    fetch_head<DH, ROWS>(tile(1), q + all, s.ld, h, s.d, r0, s.T);
    fetch_head<DH, ROWS>(tile(2), dout + b * s.T * D, D, h, s.d, r0, s.T);
    copy_async_commit();
    fetch(0, 0);
    copy_async_commit();
    float2 known[M][2];
    for (int m = 0; m < M; m++)
        for (int half = 0; half < 2; half++) {
            int row = min(warp_row + m * 16 + half * 8 + lane / 4, s.T - 1);
            known[m][half] = stats[(int64_t)head * s.T + row];
        }
    copy_async_wait<1>();
    __syncthreads();
    uint32_t own[DH / 16][M][4], own_dout[DH / 16][M][4];
    warp_rows<DH, M>(own, tile(1));
    warp_rows<DH, M>(own_dout, tile(2));
    __syncthreads();
    float sum[M][DH / 8][4] = {};
    walk(tiles, s.slots, 1, fetch, [&](int i, int slot) {
        bf16 *keys = tile(slot), *values = keys + WALK * DH;
#pragma unroll 1
        for (int at = 0; at < WALK; at += BACK_WALK) {
            int j0 = i * WALK + at;
            if (j0 > warp_row + 16 * M - 1) return;
            float w[M][BACK_WALK / 8][4] = {}, dw[M][BACK_WALK / 8][4] = {};
#pragma unroll
            for (int kk = 0; kk < DH / 16; kk++) {
                multiply<DH, WALK, 0, M, BACK_WALK>(w, own[kk], keys, at, kk * 16);
                multiply<DH, WALK, 0, M, BACK_WALK>(dw, own_dout[kk], values, at, kk * 16);
            }
            int masked = j0 + BACK_WALK - 1 > warp_row;
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < BACK_WALK / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int row = warp_row + m * 16 + e / 2 * 8 + lane / 4,
                            j = j0 + n * 8 + lane % 4 * 2 + e % 2;
                        float weight = exp2_fast(w[m][n][e] * s.scale - known[m][e / 2].x);
                        if (masked && j > row) weight = 0;
                        w[m][n][e] = weight * (dw[m][n][e] - known[m][e / 2].y);
                    }
#pragma unroll
            for (int kk = 0; kk < BACK_WALK / 16; kk++) {
                uint32_t dlogits[M][4];
                as_left(dlogits, w, 2 * kk);
                multiply<DH, WALK, 1, M, DH>(sum, dlogits, keys, 0, at + kk * 16);
            }
        }
    });
    float sigma[M][2];
    for (int m = 0; m < M; m++) sigma[m][0] = sigma[m][1] = s.sigma;
    write_rows<DH, M>(dq + all + r0 * s.ld + h * s.d, s.ld, sum, sigma, s.T - r0, s.d, tile(0));
}

// dk and dv. The matrices are those above transposed: keys down, rows across. The block's keys and values
// stay in shared memory, a slot holds rows of q and dout. The rows' statistics go round in two places.
template <int DH> struct KeysShared {
    bf16 own[2][SLOT / 2]; // ROWS keys, and their values
    float2 stats[2][WarpTiles<DH>::WALK];
};
template <int DH>
__global__ void __launch_bounds__(WARP_THREADS, 2)
    attention_dkv_warps_kernel(bf16 *dk, bf16 *dv, const float2 *stats, const bf16 *q, const bf16 *dout,
                               const bf16 *k, const bf16 *v, HeadShape s) {
    enum { M = WarpTiles<DH>::M, ROWS = WarpTiles<DH>::ROWS, WALK = WarpTiles<DH>::WALK };
    extern __shared__ __align__(1024) unsigned char shared_tiles[];
    KeysShared<DH> *shared = (KeysShared<DH> *)(shared_tiles + s.slots * SLOT);
    wait_for_results();
    int lane = threadIdx.x % 32, blocks = (s.T + ROWS - 1) / ROWS, head,
        j0 = place_of_block(head, blocks, s.at_once) * ROWS, b = head / s.G, g = head % s.G,
        heads = s.H / s.G, tiles = (s.T - j0 + WALK - 1) / WALK, // of one head
        warp_key = j0 + threadIdx.x / 32 * 16 * M;
    int64_t all = (int64_t)b * s.T * s.ld, D = (int64_t)s.H * s.d;
    auto tile = [&](int slot) { return (bf16 *)(shared_tiles + slot * SLOT); };
    auto fetch = [&](int i, int slot) {
        int h = g * heads + i / tiles, r0 = j0 + i % tiles * WALK;
        fetch_head<DH, WALK>(tile(slot), q + all, s.ld, h, s.d, r0, s.T);
        fetch_head<DH, WALK>(tile(slot) + WALK * DH, dout + b * s.T * D, D, h, s.d, r0, s.T);
    };
    auto known = [&](int i) { // a row past the end has weights of 0
        int h = g * heads + i / tiles, r = j0 + i % tiles * WALK + threadIdx.x;
        return r < s.T ? stats[((int64_t)b * s.H + h) * s.T + r] : make_float2(INFINITY, 0);
    };
    fetch_head<DH, ROWS>(shared->own[0], k + all, s.ld, g, s.d, j0, s.T);
    fetch_head<DH, ROWS>(shared->own[1], v + all, s.ld, g, s.d, j0, s.T);
    fetch(0, 0);
    copy_async_commit();
    if (threadIdx.x < WALK) shared->stats[0][threadIdx.x] = known(0);
    // out = the warp's own keys, or values, times the rows of a tile from `at` on
    auto times_own = [&](float (&out)[M][BACK_WALK / 8][4], bf16 *own, bf16 *rows, int at) {
        uint32_t left[M][4];
#pragma unroll 2
        for (int kk = 0; kk < DH / 16; kk++) {
            for (int m = 0; m < M; m++)
                left_operand<DH, ROWS, 0>(left[m], own, warp_key - j0 + m * 16, kk * 16);
            multiply<DH, WALK, 0, M, BACK_WALK>(out, left, rows, at, kk * 16);
        }
    };
    float k_sum[M][DH / 8][4] = {}, v_sum[M][DH / 8][4] = {};
    walk(heads * tiles, s.slots, 1, fetch, [&](int i, int slot) {
        bf16 *queries = tile(slot), *douts = queries + WALK * DH;
        int comes = threadIdx.x < WALK && i + 1 < heads * tiles, first = j0 + i % tiles * WALK;
        float2 next = comes ? known(i + 1) : make_float2(0, 0);
#pragma unroll 1
        for (int at = 0; at < WALK; at += BACK_WALK) {
            int r0 = first + at, masked = r0 < warp_key + 16 * M - 1;
            if (r0 + BACK_WALK - 1 < warp_key) continue;
            uint32_t weights[BACK_WALK / 16][M][4];
            {
                float w[M][BACK_WALK / 8][4] = {};
                times_own(w, shared->own[0], queries, at);
#pragma unroll
                for (int n = 0; n < BACK_WALK / 8; n++) {
                    int r = n * 8 + lane % 4 * 2;
                    float4 two = *(const float4 *)&shared->stats[i % 2][at + r];
#pragma unroll
                    for (int m = 0; m < M; m++)
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            int key = warp_key + m * 16 + e / 2 * 8 + lane / 4;
                            float weight = exp2_fast(w[m][n][e] * s.scale - (e % 2 ? two.z : two.x));
                            w[m][n][e] = masked && key > r0 + r + e % 2 ? 0 : weight;
                        }
                }
#pragma unroll
                for (int kk = 0; kk < BACK_WALK / 16; kk++) as_left(weights[kk], w, 2 * kk);
            }
#pragma unroll
            for (int kk = 0; kk < BACK_WALK / 16; kk++)
                multiply<DH, WALK, 1, M, DH>(v_sum, weights[kk], douts, 0, at + kk * 16);
            float dw[M][BACK_WALK / 8][4] = {};
            times_own(dw, shared->own[1], douts, at);
#pragma unroll
            for (int n = 0; n < BACK_WALK / 8; n++) { // the weights become the gradients of the logits
                float4 two = *(const float4 *)&shared->stats[i % 2][at + n * 8 + lane % 4 * 2];
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        uint32_t *both = &weights[n / 2][m][n % 2 * 2 + half];
                        *both = pack_two(__uint_as_float(*both << 16) * (dw[m][n][2 * half] - two.y),
                                         __uint_as_float(*both & 0xFFFF0000u) *
                                             (dw[m][n][2 * half + 1] - two.w));
                    }
            }
#pragma unroll
            for (int kk = 0; kk < BACK_WALK / 16; kk++)
                multiply<DH, WALK, 1, M, DH>(k_sum, weights[kk], queries, 0, at + kk * 16);
        }
        if (comes) shared->stats[(i + 1) % 2][threadIdx.x] = next;
    });
    float factor[M][2];
    int64_t place = all + j0 * s.ld + g * s.d;
    for (int m = 0; m < M; m++) factor[m][0] = factor[m][1] = s.sigma;
    write_rows<DH, M>(dk + place, s.ld, k_sum, factor, s.T - j0, s.d, tile(0));
    for (int m = 0; m < M; m++) factor[m][0] = factor[m][1] = 1;
    write_rows<DH, M>(dv + place, s.ld, v_sum, factor, s.T - j0, s.d, tile(1));
}

// own: bytes beside the ring; heads: over which the blocks go
static HeadShape head_shape(Shape shape, int heads, int DH, int own) {
    float sigma = 1 / sqrtf((float)shape.d);
    return {shape.T,
            shape.H,
            shape.G,
            shape.d,
            shape.first,
            heads_at_once(shape.B * heads, shape.T, DH),
            ring_slots(own),
            shape.ld,
            1.44269504f * sigma,
            sigma};
}
template <int DH>
static void attention_warps(bf16 *out, float *stats, const bf16 *q, const bf16 *k, const bf16 *v, Shape shape,
                            cudaStream_t stream) {
    enum { ROWS = WarpTiles<DH>::ROWS };
    HeadShape s = head_shape(shape, shape.H, DH, 0);
    int64_t blocks = (int64_t)((s.T - s.first + ROWS - 1) / ROWS) * shape.B * s.H;
    must_fit(blocks, INT_MAX, "blocks of attention");
    allow_shared(attention_warps_kernel<DH>, s.slots * SLOT);
    LAUNCH(attention_warps_kernel<DH>, (unsigned)blocks, WARP_THREADS, s.slots * SLOT, stream, out,
           (float2 *)stats, q, k, v, s);
}
template <int DH>
static void attention_warps_backward(bf16 *dq, bf16 *dk, bf16 *dv, const bf16 *dout, const bf16 *out,
                                     float2 *stats, const bf16 *q, const bf16 *k, const bf16 *v, Shape shape,
                                     cudaStream_t stream) {
    enum { ROWS = WarpTiles<DH>::ROWS };
    int own = sizeof(KeysShared<DH>), pieces = (shape.T + ROWS - 1) / ROWS;
    HeadShape s = head_shape(shape, shape.H, DH, 0), by_keys = head_shape(shape, shape.G, DH, own);
    int64_t blocks = (int64_t)pieces * shape.B * s.H;
    must_fit(blocks, INT_MAX, "blocks of attention");
    LAUNCH(attention_delta_kernel, (unsigned)(((int64_t)shape.B * s.T * s.H + 31) / 32), 256, 0, stream,
           stats, dout, out, shape.B, s.T, s.H, s.d);
    allow_shared(attention_dq_warps_kernel<DH>, s.slots * SLOT);
    allow_shared(attention_dkv_warps_kernel<DH>, by_keys.slots * SLOT + own);
    LAUNCH(attention_dq_warps_kernel<DH>, (unsigned)blocks, WARP_THREADS, s.slots * SLOT, stream, dq, stats,
           q, dout, k, v, s);
    LAUNCH(attention_dkv_warps_kernel<DH>, (unsigned)(blocks / s.H * s.G), WARP_THREADS,
           by_keys.slots * SLOT + own, stream, dk, dv, stats, q, dout, k, v, by_keys);
}
