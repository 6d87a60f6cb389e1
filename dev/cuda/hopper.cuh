// Hopper's tensor cores (sm_90a): tiles come from memory by the copy engine (TMA) while warp groups of 128
// threads multiply what has arrived (wgmma). What an older or another GPU does in its place is ampere.cuh.
//
// A tile is `rows` rows of 64 numbers, 128 bytes, at a multiple of 1024; the 16 bytes number i of row r lie
// at place i ^ r % 8 (the copy engine's 128-byte swizzle, which wgmma undoes). Wider tiles are several side
// by side.

enum { GROUP = 128, ATOM = 64 }; // threads of a warp group; columns of a tile

// Its attributes say whether this program holds Hopper's own instructions.
#ifdef HOPPER
__global__ static void __launch_bounds__(GROUP) built_for_hopper_kernel(void) {}
#else
__global__ static void __launch_bounds__(GROUP / 2) built_for_hopper_kernel(void) {}
#endif
static CUresult (*encode_map)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                              const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
static int clusters_fit(void); // below the kernels that it asks about
// The environment's SESSA_TEST_AS, for tests: Hopper hides, and a block has the shared memory of an sm_80, 163
// KiB of 164, or of whatever else it names, 99 KiB of 100.
static void tiles_open(int major) {
    const char *as = getenv("SESSA_TEST_AS");
    int hides = as && *as, least = hides && !strcmp(as, "sm_80") ? 163 : 99;
    cudaFuncAttributes built;
    cudaDriverEntryPointQueryResult found;
    CUDA(cudaFuncGetAttributes(&built, built_for_hopper_kernel));
#if CUDART_VERSION >= 12050
    CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode_map, 12000,
                                          cudaEnableDefault, &found));
#else
    CUDA(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", (void **)&encode_map, cudaEnableDefault, &found));
#endif
    if (hides) {
        gpu.shared = min_int(gpu.shared, least << 10);
        gpu.shared_together = min_int(gpu.shared_together, (least + 1) << 10);
    }
    gpu.hopper = !hides && major == 9 && built.maxThreadsPerBlock == GROUP &&
                 found == cudaDriverEntryPointSuccess;
    if (!hides && major == 9 && !gpu.hopper)
        fprintf(stderr, "train_sessa: built without Hopper's instructions, slower on this GPU than what "
                        "`make CUDA_ARCH=sm_90a train_sessacu` builds\n");
    gpu.clusters = gpu.hopper && clusters_fit();
    gpu.tiles = gpu.hopper || (major >= 8 && gpu.shared >= 99 << 10);
}

// A kernel with more than 48 KiB of shared memory says so.
template <typename K> static void allow_shared(K *kernel, int bytes) {
    must_fit(bytes, gpu.shared, "shared memory of a block");
    CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// Tiles of `box` rows of a matrix (B,rows,ld) of bf16 with `heads` parts of d columns; what lies past its
// edges is 0.
static CUtensorMap tile_map(const bf16 *at, int d, int heads, int64_t rows, int64_t ld, int64_t step, int B,
                            int box) {
    CUtensorMap map;
    cuuint64_t sizes[] = {(cuuint64_t)d, (cuuint64_t)heads, (cuuint64_t)rows, (cuuint64_t)B},
        strides[] = {2 * (cuuint64_t)d, 2 * (cuuint64_t)ld, 2 * (cuuint64_t)step};
    cuuint32_t boxes[] = {ATOM, 1, (cuuint32_t)box, 1}, each_one[] = {1, 1, 1, 1};
    CUresult code = encode_map(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, (void *)at, sizes, strides, boxes,
                                   each_one, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (code != CUDA_SUCCESS) cuda_check(cudaErrorInvalidValue, "a map of tiles", __LINE__);
    return map;
}
#ifndef SESSA_EMULATED
__device__ static inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

#ifdef HOPPER
__device__ static inline uint32_t shared_at(const void *at) { return (uint32_t)__cvta_generic_to_shared(at); }
__device__ static inline void barrier_init(uint64_t *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(shared_at(barrier)), "r"(arrivals));
}
__device__ static inline void barrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(shared_at(barrier)) : "memory");
}
// one arrival, and bytes on their way
__device__ static inline void barrier_expect(uint64_t *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :
                 : "r"(shared_at(barrier)), "r"(bytes)
                 : "memory");
}
// Waits until round number `round` (0, 1, ...) of arrivals is complete; no round may be two behind.
__device__ static inline void barrier_wait(uint64_t *barrier, int round) {
    asm volatile("{\n.reg .pred done;\nagain:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}"
                 : : "r"(shared_at(barrier)), "r"(round & 1) : "memory");
}
__device__ static inline void barriers_ready() { // after their init
    asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
    __syncthreads();
}
// of the cluster's block number `rank`
__device__ static inline void barrier_arrive_at(uint64_t *barrier, int rank) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n}"
                 :
                 : "r"(shared_at(barrier)), "r"(rank)
                 : "memory");
}
// four goes to the same place in the cluster's block number `rank`, whose barrier counts its bytes.
__device__ static inline void store_at(float4 *to, float4 four, uint64_t *barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 there, full;\nmapa.shared::cluster.u32 there, %0, %2;\nmapa.shared::cluster.u32 full, "
        "%1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %6}, [full];\n}"
        :
        : "r"(shared_at(to)), "r"(shared_at(barrier)), "r"(rank), "f"(four.x), "f"(four.y), "f"(four.z),
          "f"(four.w)
        : "memory");
}
// The tile of `map` at column col of head h, row `row` of sequence b; its bytes count for the barrier.
__device__ static inline void copy_tile(bf16 *tile, const CUtensorMap *map, int col, int h, int row, int b,
                                        uint64_t *barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];"
                 :
                 : "r"(shared_at(tile)), "l"(map), "r"(col), "r"(h), "r"(row), "r"(b), "r"(shared_at(barrier))
                 : "memory");
}
#define KEEP_REGISTERS(more_or_less, n) \
    asm volatile("setmaxnreg." more_or_less ".sync.aligned.u32 %0;" : : "n"(n))

// wgmma's operand: a tile from row 0 on; `across`: bytes from one tile to the next beside it, for operands
// by columns
__device__ static inline uint64_t operand(const bf16 *tile, int across = 16) {
    return (uint64_t)((shared_at(tile) & 0x3FFFF) >> 4) | (uint64_t)(across >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
__device__ static inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
__device__ static inline void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
}
template <int LATER> __device__ inline void products_wait() { // for all but the last LATER groups
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(LATER) : "memory");
}
// c (64,N) = a (64,16) · b (16,N) + (keep ? c : 0). A thread holds of c the rows r = 16 warp + lane/4 and r
// + 8, columns 2(lane%4) and the next of each 8. B_COLUMNS: b's tile holds 16 rows of N numbers, else N
// rows of 16; a likewise.
#define C4(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define C32(c, n) C4(c, n), C4(c, n + 1), C4(c, n + 2), C4(c, n + 3), C4(c, n + 4), C4(c, n + 5), C4(c, n + 6), \
                  C4(c, n + 7)
#define REGS_0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
               "%27,%28,%29,%30,%31"
#define REGS_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
                "%56,%57,%58,%59,%60,%61,%62,%63"
template <int N, int A_COLUMNS, int B_COLUMNS>
__device__ inline void tensor_product(float (&c)[N / 8][4], uint64_t a, uint64_t b, int keep) {
    if constexpr (N == 64)
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
            "{" REGS_0 "}, %32, %33, p, 1, 1, %35, %36;\n}"
            : C32(c, 0)
            : "l"(a), "l"(b), "r"(keep), "n"(A_COLUMNS), "n"(B_COLUMNS));
    else
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
            "{" REGS_0 REGS_32 "}, %64, %65, p, 1, 1, %67, %68;\n}"
            : C32(c, 0), C32(c, 8)
            : "l"(a), "l"(b), "r"(keep), "n"(A_COLUMNS), "n"(B_COLUMNS));
}
// The same with a in registers, rows and columns as in c
template <int N, int B_COLUMNS>
__device__ inline void tensor_product(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int keep) {
    if constexpr (N == 64)
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
            "{" REGS_0 "}, {%32,%33,%34,%35}, %36, p, 1, 1, %38;\n}"
            : C32(c, 0)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(B_COLUMNS));
    else
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
            "{" REGS_0 REGS_32 "}, {%64,%65,%66,%67}, %68, p, 1, 1, %70;\n}"
            : C32(c, 0), C32(c, 8)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(B_COLUMNS));
}

// c (64,N) = a (64,DH) · b (N,DH)^T: rows of a and b in tiles a_next and b_next numbers apart
template <int DH, int N>
__device__ inline void product_transposed(float (&c)[N / 8][4], const bf16 *a, int a_next, const bf16 *b,
                                          int b_next) {
#pragma unroll
    for (int k = 0; k < DH / 16; k++)
        tensor_product<N, 0, 0>(c, operand(a + k / 4 * a_next + k % 4 * 16),
                                operand(b + k / 4 * b_next + k % 4 * 16), k > 0);
}
// c (64,N) += a (64,K) · b (K,N), a in registers
template <int N, int K>
__device__ inline void product_plain(float (&c)[N / 8][4], const uint32_t (&a)[K / 16][4], const bf16 *b) {
#pragma unroll
    for (int k = 0; k < K / 16; k++)
        tensor_product<N, 1>(c, a[k], operand(b + k * 16 * ATOM, K * ATOM * 2), 1);
}
// X(w) as a left operand
template <int K> __device__ inline void as_operand(uint32_t (&a)[K / 16][4], const float (&w)[K / 8][4]) {
#pragma unroll
    for (int k = 0; k < K / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[k][i] = pack_two(w[2 * k + i / 2][i % 2 * 2], w[2 * k + i / 2][i % 2 * 2 + 1]);
}
// A warp's 16 rows of a group's c (64,DH), times factor[0] (row lane/4) and [1] (+ 8), to memory: columns
// below d, rows below `rows`. tile: the group's rows of a tile that nobody reads any more, the next `next`
// numbers further.
template <int DH>
__device__ inline void store_rows(bf16 *at, int64_t ld, const float (&c)[DH / 8][4], int rows, int d,
                                  float factor0, float factor1, bf16 *tile, int next) {
    int lane = threadIdx.x % 32, first = threadIdx.x % GROUP / 32 * 16;
#pragma unroll
    for (int n = 0; n < DH / 8; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int r = first + half * 8 + lane / 4;
            *(uint32_t *)(tile + n / 8 * next + r * ATOM + (n % 8 ^ r % 8) * 8 + lane % 4 * 2) = pack_two(
                c[n][2 * half] * (half ? factor1 : factor0), c[n][2 * half + 1] * (half ? factor1 : factor0));
        }
    __syncwarp();
    for (int p = lane; p < 16 * DH / 8; p += 32) {
        int r = first + p / (DH / 8), n = p % (DH / 8);
        if (n * 8 < d && r < rows)
            *(uint4 *)(at + r * ld + n * 8) =
                *(const uint4 *)(tile + n / 8 * next + r * ATOM + (n % 8 ^ r % 8) * 8);
    }
    __syncwarp();
}
// A warp has done with the tile that it stored its rows from: something else may be copied there.
__device__ static inline void rows_stored(uint64_t *barrier) {
    asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}
__device__ static inline void group_barrier(int group) { // of the 128 threads of a warp group
    asm volatile("bar.sync %0, 128;" : : "r"(group + 1) : "memory");
}
#endif

// ----------------------------------------------------------------------------
// a product whose result goes through a function of its own on the way to memory: f(V, b, p, r, i, v) is
// given the V sums v of row r, columns i .. i+V-1, of item p of sequence b, and writes what it makes of
// them.

// Numbers that a product reads: row r, column i of item p of sequence b is at[b·step + (row + p·row_along +
// r)·ld + (col + p·col_along) % wrap + i]; rows and cols are those of the whole. Unless lo is 0 the number
// that is meant is the sum of two bf16 numbers, and the second of them lies lo columns further.
struct PartPlace { int row, col, row_along, col_along, wrap, lo; };
template <typename X> struct Part {
    const X *at;
    int64_t ld, step;
    int rows, cols;
    PartPlace place;
    MatrixGPU<X> item(int p) const {
        return {at + (place.row + p * place.row_along) * ld + (place.col + p * place.col_along) % place.wrap,
                ld, 1, step};
    }
};
template <typename X>
static Part<X> part_of(const X *at, int64_t ld, int64_t step, int rows, int cols, int row = 0, int col = 0,
                       int lo = 0) {
    return {at, ld, step, rows, cols, {row, col, 0, 0, INT_MAX, lo}};
}
// A product of such sums goes along K up to three times: A·B, then A_lo·B, then A·B_lo. What is left out is
// 2^-18 of the whole.
__device__ static inline int part_turns(PartPlace a, PartPlace b) { return 1 + (a.lo > 0) + (b.lo > 0); }
__device__ static inline int part_of_A(PartPlace a, int turn) { return turn == 1 ? a.lo : 0; }
__device__ static inline int part_of_B(PartPlace a, PartPlace b, int turn) {
    return turn == 1 + (a.lo > 0) ? b.lo : 0;
}
// 1: f wants a maximum and a sum of each tile's rows besides
template <typename F> constexpr int sums_rows = 0;
template <typename F> constexpr int sums_columns = 0; // 1: f wants the sums of each tile's columns besides
// What is known to be 0: A above the diagonal, A as it is multiplied (transposed) below it, B above it;
// OUT: nobody wants the result above it. The diagonal of A_LOWER and OUT_LOWER starts at column `shift`.
enum Triangle { FULL, A_LOWER, A_UPPER, B_LOWER, OUT_LOWER };

template <int BN> struct ProductShared {
    enum { STAGES = BN == 64 ? 4 : 3, PITCH = BN + 8 };
    union {
        struct { bf16 a[STAGES][2][ATOM][ATOM], b[STAGES][BN / ATOM][ATOM][ATOM]; };
        float sums[128][PITCH];
    };
    uint64_t full[STAGES], free[STAGES];
};

// A block takes 128 rows and BN columns of one item, its first and second four warps 64 rows each; the
// ninth warp has the operands copied, 64 of K at a time, three steps ahead. Two blocks share a
// multiprocessor: one multiplies while the other writes. Then the sums go through shared memory, and a
// thread has 8 neighbours of a row at a time. A_LOWER goes from the last sequence to the first: what the
// product before wrote last is still in the L2 cache.
template <int BN, int A_COLUMNS, int B_COLUMNS, int SHAPE, typename F>
__global__ void __launch_bounds__(2 * GROUP + 32, 2)
    product_tiles_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                         PartPlace a, PartPlace b, F f, int M, int N, int K, int shift, int items) {
#ifdef HOPPER
    typedef ProductShared<BN> Shared;
    enum { STAGES = Shared::STAGES };
    extern __shared__ __align__(1024) unsigned char shared_tiles[];
    Shared *s = (Shared *)shared_tiles;
    int m0 = (int)(SHAPE == A_LOWER ? gridDim.y - 1 - blockIdx.y : blockIdx.y) * 128,
        n0 = (int)blockIdx.x * BN, item = (int)blockIdx.z % items,
        sequence = (int)(SHAPE == A_LOWER ? gridDim.z - 1 - blockIdx.z : blockIdx.z) / items;
    int k0 = SHAPE == A_UPPER   ? m0
             : SHAPE == B_LOWER ? n0
                                : 0,
        k1 = SHAPE == A_LOWER ? min(K, shift + m0 + 128) : K, once = max(0, (k1 - k0 + ATOM - 1) / ATOM),
        steps = once * part_turns(a, b);
    if (threadIdx.x == 0)
        for (int i = 0; i < STAGES; i++) { barrier_init(&s->full[i], 1); barrier_init(&s->free[i], 2); }
    barriers_ready();
    wait_for_results();
    if (SHAPE == OUT_LOWER && n0 >= shift + m0 + 128) return;
    if constexpr (sums_rows<F>) if (!f.wanted(sequence, m0)) return;
    if (threadIdx.x >= 2 * GROUP) {
        if (threadIdx.x % 32) return;
        int a_row = a.row + item * a.row_along, a_col = (a.col + item * a.col_along) % a.wrap,
            b_row = b.row + item * b.row_along, b_col = (b.col + item * b.col_along) % b.wrap;
        for (int i = 0; i < steps; i++) {
            int slot = i % STAGES, turn = i / once, k = k0 + (i - turn * once) * ATOM,
                a_at = a_col + part_of_A(a, turn), b_at = b_col + part_of_B(a, b, turn);
            if (i >= STAGES) barrier_wait(&s->free[slot], i / STAGES - 1);
            barrier_expect(&s->full[slot], sizeof(s->a[0]) + sizeof(s->b[0]));
            for (int j = 0; j < 2; j++)
                copy_tile(s->a[slot][j][0], &a_map, a_at + (A_COLUMNS ? m0 + ATOM * j : k), 0,
                          a_row + (A_COLUMNS ? k : m0 + ATOM * j), sequence, &s->full[slot]);
            for (int j = 0; j < BN / ATOM; j++)
                copy_tile(s->b[slot][j][0], &b_map, b_at + (B_COLUMNS ? n0 + ATOM * j : k), 0,
                          b_row + (B_COLUMNS ? k : n0 + ATOM * j), sequence, &s->full[slot]);
        }
        return;
    }
    int group = threadIdx.x / GROUP, lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;
    float sum[BN / 8][4];
    for (int i = 0; i < steps; i++) {
        int slot = i % STAGES;
        barrier_wait(&s->full[slot], i / STAGES);
        products_begin();
#pragma unroll
        for (int k = 0; k < ATOM / 16; k++)
            tensor_product<BN, A_COLUMNS, B_COLUMNS>(
                sum, operand(s->a[slot][group][A_COLUMNS ? k * 16 : 0] + (A_COLUMNS ? 0 : k * 16)),
                operand(s->b[slot][0][B_COLUMNS ? k * 16 : 0] + (B_COLUMNS ? 0 : k * 16), ATOM * ATOM * 2),
                i > 0 || k > 0);
        products_commit();
        products_wait<1>();
        if (i && threadIdx.x % GROUP == 0) barrier_arrive(&s->free[(i - 1) % STAGES]);
    }
    products_wait<0>();
    asm volatile("bar.sync 1, 256;" : : : "memory"); // nobody reads operands any more
#pragma unroll
    for (int n = 0; n < BN / 8; n++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            *(float2 *)&s->sums[first + half * 8 + lane / 4][n * 8 + lane % 4 * 2] =
                steps ? make_float2(sum[n][2 * half], sum[n][2 * half + 1]) : make_float2(0, 0);
    __syncwarp();
    float columns[8] = {};
#pragma unroll 4
    for (int p = lane; p < 16 * BN / 8; p += 32) {
        int r = m0 + first + p / (BN / 8), i = n0 + p % (BN / 8) * 8;
        float v[8];
        read_some<8>(v, &s->sums[r - m0][i - n0]);
        if constexpr (sums_rows<F>) {
            float2 row = r < M && i < N ? f.run_some(sequence, r, i, v) : make_float2(-INFINITY, 0);
            for (int other = BN / 16; other; other /= 2) {
                row.x = fmaxf(row.x, __shfl_xor_sync(~0u, row.x, other));
                row.y += __shfl_xor_sync(~0u, row.y, other);
            }
            if (lane % (BN / 8) == 0 && r < M) f.row(sequence, r, n0 / BN, row);
        } else if (r < M && i < N) {
            f(Known<8>(), sequence, item, r, i, v);
            for (int e = 0; e < 8 * sums_columns<F>; e++) columns[e] += v[e];
        }
    }
    if constexpr (sums_columns<F>) {
        for (int e = 0; e < 8; e++)
            for (int other = BN / 8; other < 32; other *= 2)
                columns[e] += __shfl_xor_sync(~0u, columns[e], other);
        __syncwarp();
        if (lane < BN / 8) write_some<8>(&s->sums[first][lane * 8], columns); // a warp's in its first row
        asm volatile("bar.sync 1, 256;" : : : "memory");
        int i = threadIdx.x;
        float sum = 0;
        for (int w = 0; w < 8 && i < BN; w++) sum += s->sums[16 * w][i];
        if (i < BN && n0 + i < N) f.column(sequence, m0, n0 + i, sum);
    }
#endif
}
// What follows cuBLASLt's product (B,M,N) where there are no tiles; NULL: a product over nothing. A thread
// takes V sums.
template <int V, typename F>
__global__ void product_passed_on_kernel(F f, const float *product, int item, int B, int M, int N) {
    wait_for_results();
    int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (at >= (int64_t)B * M * N) return;
    float v[V] = {};
    if (product) read_some<V>(v, product + at);
    f(Known<V>(), (int)(at / N / M), item, (int)(at / N % M), (int)(at % N), v);
}

// The same without Hopper: ampere.cuh
template <int A_COLUMNS, int B_COLUMNS, int SHAPE, int BN, typename F>
static void product_warps(F f, Part<bf16> a, Part<bf16> b, int M, int N, int K, int shift, int items, int B,
                          cudaStream_t stream);
template <int A_COLUMNS, int B_COLUMNS, int SHAPE, int BN, typename F>
static void product_tiles(F f, Part<bf16> a, Part<bf16> b, int M, int N, int K, int shift, int items, int B,
                          cudaStream_t stream) {
    if (!gpu.hopper)
        return product_warps<A_COLUMNS, B_COLUMNS, SHAPE, BN>(f, a, b, M, N, K, shift, items, B, stream);
    typedef ProductShared<BN> Shared;
    CUtensorMap a_map = tile_map(a.at, a.cols, 1, a.rows, a.ld, a.step, B, ATOM),
        b_map = tile_map(b.at, b.cols, 1, b.rows, b.ld, b.step, B, ATOM);
    auto kernel = product_tiles_kernel<BN, A_COLUMNS, B_COLUMNS, SHAPE, F>;
    dim3 blocks((N + BN - 1) / BN, (M + 127) / 128, B * items);
    int threads = 2 * GROUP + 32, bytes = sizeof(Shared);
    allow_shared(kernel, bytes);
    must_fit((int64_t)B * items, MOST_SEQUENCES, "items of a product");
    int ahead = BN == 64 || blocks.z > 1; // of one long sequence the large products lose by it: measured
    LAUNCH_AS(0, ahead, kernel, blocks, threads, bytes, stream, a_map, b_map, a.place, b.place, f, M, N, K,
              shift, items);
}
// What all products of a layer have in common. scratch: (B,M,N), NULL: there are tiles.
typedef struct { int B, in_eights; float *scratch; cudaStream_t stream; } ProductWay;
// f of A·B: A (M,K), or with A_COLUMNS its transpose (K,M); B (N,K) transposed, or with B_COLUMNS (K,N) as
// it is; for each of the items of all sequences.
template <int A_COLUMNS, int B_COLUMNS, int SHAPE, typename F, typename X>
static void product_gpu(F f, Part<X> a, Part<X> b, int M, int N, int K, int shift, int items,
                        ProductWay way) {
    if (M <= 0) return;
    if constexpr (sizeof(X) == sizeof(bf16))
        if (!way.scratch) {
            int few = (int64_t)((M + 127) / 128) * ((N + 127) / 128) * way.B * items <= 80;
            auto tiles = few ? product_tiles<A_COLUMNS, B_COLUMNS, SHAPE, 64, F>
                             : product_tiles<A_COLUMNS, B_COLUMNS, SHAPE, 128, F>;
            tiles(f, a, b, M, N, K, shift, items, way.B, way.stream);
            return;
        }
    for (int p = 0; p < items; p++) {
        MatrixGPU<X> left = a.item(p), right = b.item(p);
        // the last item may have fewer rows; f drops what it is given of the others
        int there = A_COLUMNS ? M : min_int(M, a.rows - a.place.row - p * a.place.row_along);
        if (K > 0) matmul_gpu(into(way.scratch, N, (int64_t)M * N), A_COLUMNS ? transpose_gpu(left) : left,
                              B_COLUMNS ? right : transpose_gpu(right), there, N, K, 1, 0, way.B, way.stream);
        int V = N % 8 || !way.in_eights ? 1 : 8;
        unsigned blocks = (unsigned)(((int64_t)way.B * M * N / V + 255) / 256);
        LAUNCH((V == 8 ? product_passed_on_kernel<8, F> : product_passed_on_kernel<1, F>), blocks, 256, 0,
               way.stream, f, K > 0 ? way.scratch : NULL, p, way.B, M, N);
    }
}

// Where a product in tiles leaves the sums of `width` columns over each SUM_ROWS rows of a sequence. NULL:
// nowhere
typedef struct {
    float *partial;
    int width, chunks; // chunks of a sequence
    __device__ float *at(int b, int row, int column) const {
        return partial + ((int64_t)b * chunks + row / SUM_ROWS) * width + column;
    }
} TileSums;
static int64_t tile_sums_room(int width, int B, int T) {
    return (int64_t)B * ((T + SUM_ROWS - 1) / SUM_ROWS) * width;
}
static TileSums tile_sums(ColumnSums *sums, float *out, int width, int B, int T) {
    TileSums place = {sums_place(sums, tile_sums_room(width, B, T)), width, (T + SUM_ROWS - 1) / SUM_ROWS};
    column_sum(sums, out, place.partial, B * place.chunks, width, width);
    return place;
}
