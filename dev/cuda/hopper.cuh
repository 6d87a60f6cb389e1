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
// Waits until round number `round` (0, 1, ...) of arrivals is complete; no round may be two behind. So the next
// one may not complete before every thread that waits for this one has seen it: who lets others go on arrives
// after all for whom it arrives.
__device__ static inline void barrier_wait(uint64_t *barrier, int round) {
#ifdef LATE_WARPS // a build for tests: one wait in 64 begins some 20 microseconds late
    uint32_t now;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(now));
    if ((now + threadIdx.x / 32 * 7919) * 2654435761u >> 26 == 0) __nanosleep(20000);
#endif
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
// The way back: rows and columns past the edges of `map` stay as they are. What threads wrote to the tile
// goes through a fence and a barrier first.
__device__ static inline void store_tile(const CUtensorMap *map, int col, int row, int b, const bf16 *tile) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];"
                 :
                 : "l"(map), "r"(col), "r"(0), "r"(row), "r"(b), "r"(shared_at(tile))
                 : "memory");
}
__device__ static inline void stores_commit() {
    asm volatile("cp.async.bulk.commit_group;" : : : "memory");
}
template <int LATER> __device__ inline void stores_read() { // the tiles of all but the last LATER groups
    asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(LATER) : "memory");
}
__device__ static inline void stores_written() { asm volatile("cp.async.bulk.wait_group 0;" : : : "memory"); }
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
#define REGS_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86," \
                "%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define REGS_96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114," \
                "%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
template <int N, int A_COLUMNS, int B_COLUMNS>
__device__ inline void tensor_product(float (&c)[N / 8][4], uint64_t a, uint64_t b, int keep) {
    if constexpr (N == 64)
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
            "{" REGS_0 "}, %32, %33, p, 1, 1, %35, %36;\n}"
            : C32(c, 0)
            : "l"(a), "l"(b), "r"(keep), "n"(A_COLUMNS), "n"(B_COLUMNS));
    else if constexpr (N == 128)
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
            "{" REGS_0 REGS_32 "}, %64, %65, p, 1, 1, %67, %68;\n}"
            : C32(c, 0), C32(c, 8)
            : "l"(a), "l"(b), "r"(keep), "n"(A_COLUMNS), "n"(B_COLUMNS));
    else if constexpr (N == 192)
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\nwgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 "
            "{" REGS_0 REGS_32 REGS_64 "}, %96, %97, p, 1, 1, %99, %100;\n}"
            : C32(c, 0), C32(c, 8), C32(c, 16)
            : "l"(a), "l"(b), "r"(keep), "n"(A_COLUMNS), "n"(B_COLUMNS));
    else
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
            "{" REGS_0 REGS_32 REGS_64 REGS_96 "}, %128, %129, p, 1, 1, %131, %132;\n}"
            : C32(c, 0), C32(c, 8), C32(c, 16), C32(c, 24)
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
__host__ __device__ static inline int part_turns(PartPlace a, PartPlace b) { return 1 + (a.lo > 0) + (b.lo > 0); }
__device__ static inline int part_of_A(PartPlace a, int turn) { return turn == 1 ? a.lo : 0; }
__device__ static inline int part_of_B(PartPlace a, PartPlace b, int turn) {
    return turn == 1 + (a.lo > 0) ? b.lo : 0;
}
// 1: f wants a maximum and a sum of each tile's rows besides
template <typename F> constexpr int sums_rows = 0;
template <typename F> constexpr int sums_columns = 0; // 1: f wants the sums of each tile's columns besides
// 1: f also works two neighbours at a time, on rows about which it knows what row_of said, and its results
// are a matrix in bf16: its place(). Such a product may go in wide tiles.
template <typename F> constexpr int by_twos = 0;
__device__ static inline float low_of(uint32_t two) { return __uint_as_float(two << 16); }
__device__ static inline float high_of(uint32_t two) { return __uint_as_float(two & 0xFFFF0000u); }
template <typename F> constexpr int changes_its_place = 0; // 1: by twos it is given what lies there besides
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

// The same for large products, in tiles of 128 rows and 256 columns (or 192): these ask L2 for a quarter less
// than 128×128, and shared memory for a fifth less. Blocks stay, one a multiprocessor. A thread has the
// operands copied; the first and second four warps multiply, 64 rows each; and while these are at a tile's
// end, the next one's operands are on their way.
//
// Everything goes through one ring of slots: for each tile its steps, 64 of K each, then two pieces of 128
// columns of the result. In a piece f finds what lay at its place, if it wants that, and leaves its results,
// which the copy engine takes to memory.
//
// Which tile is next is asked of a counter, for another stream may have some of the multiprocessors. What is
// computed for a tile does not depend on it.
template <int BN> struct WideShared {
    enum { STAGES = BN == 256 ? 4 : 5 };
    bf16 slots[STAGES][2 * ATOM + BN][ATOM]; // a, b; or columns 0 .. 63, 64 .. 127 of a piece, 128 rows each
    float columns[8][BN];                    // a warp's sums
    int4 tile[STAGES];                       // the tile whose first step lies there: sequence (or -1), m0, n0
    uint64_t full[STAGES], free[STAGES];
};
#ifdef HOPPER
// Tiles taken, blocks done, of the product under way: products in wide tiles follow each other in one
// stream, and the last block clears both.
__device__ static unsigned wide_tiles[2];

// The tiles of a product by number. What is not wanted has no number, and longer sums come first.
template <int BN, int SHAPE> struct WideTiles {
    int rows, columns, shift, sequences, line, before; // lines of tiles that are through, the tiles in them
    __device__ WideTiles(int M, int N, int shift, int sequences)
        : rows((M + 127) / 128), columns((N + BN - 1) / BN), shift(shift), sequences(sequences), line(0),
          before(0) {}
    // x: sequence, or -1 where there is none any more; y: m0, z: n0. The number is larger than the one before.
    __device__ int4 at(int number) {
        for (; line < (SHAPE == OUT_LOWER ? columns : rows) * sequences; line++) {
            if (SHAPE == OUT_LOWER) { // a line goes down a column, from the first row that sees it
                int n0 = line % columns * BN, first = n0 > shift ? (n0 - shift) / 128 : 0,
                    count = max(0, rows - first);
                if (number < before + count)
                    return make_int4(line / columns, (first + number - before) * 128, n0, 0);
                before += count;
            } else {
                int row = line / sequences, sequence = line % sequences;
                if (number < before + columns)
                    return SHAPE == A_LOWER ? make_int4(sequences - 1 - sequence, (rows - 1 - row) * 128,
                                                        (number - before) * BN, 0)
                                            : make_int4(sequence, row * 128, (number - before) * BN, 0);
                before += columns;
            }
        }
        return make_int4(-1, 0, 0, 0);
    }
};
#endif
template <int BN, int A_COLUMNS, int B_COLUMNS, int SHAPE, typename F>
__global__ void __launch_bounds__(3 * GROUP, 1)
    product_wide_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                        const __grid_constant__ CUtensorMap place_map, PartPlace a, PartPlace b, F f, int M,
                        int N, int K, int shift, int sequences) {
#ifdef HOPPER
    typedef WideShared<BN> Shared;
    enum { STAGES = Shared::STAGES, PIECES = 2 };
    extern __shared__ __align__(1024) unsigned char shared_tiles[];
    Shared *s = (Shared *)shared_tiles;
    int group = threadIdx.x / GROUP, lane = threadIdx.x % 32, item = 0;
    auto k_begin = [&](int m0) { return SHAPE == A_UPPER ? m0 : 0; };
    auto steps_of = [&](int m0) {
        int k1 = SHAPE == A_LOWER ? min(K, shift + m0 + 128) : K;
        return (k1 - k_begin(m0) + ATOM - 1) / ATOM;
    };
    if (threadIdx.x == 0)
        for (int i = 0; i < STAGES; i++) { barrier_init(&s->full[i], 1); barrier_init(&s->free[i], 2); }
    barriers_ready();
    wait_for_results();
    if constexpr (sums_rows<F>) {
        int rows = (M + 127) / 128, any = 0;
        for (int i = threadIdx.x; i < rows * sequences; i += 3 * GROUP)
            any |= f.wanted(i / rows, i % rows * 128);
        if (!__syncthreads_or(any)) return;
    }
    if (group == 2) {
        KEEP_REGISTERS("dec", 40);
        if (threadIdx.x % GROUP) return;
        WideTiles<BN, SHAPE> tiles(M, N, shift, sequences);
        auto next_slot = [&] { // free again
            int slot = item % STAGES;
            if (item >= STAGES) barrier_wait(&s->free[slot], item / STAGES - 1);
            item++;
            return slot;
        };
        for (int number = blockIdx.x;;) {
            int4 tile = tiles.at(number);
            int sequence = tile.x, m0 = tile.y, n0 = tile.z;
            if (sequence < 0) break;
            number = (int)(gridDim.x + atomicAdd(&wide_tiles[0], 1));
            if constexpr (sums_rows<F>) if (!f.wanted(sequence, m0)) continue;
            for (int i = 0; i < steps_of(m0); i++) {
                int slot = next_slot(), k = k_begin(m0) + i * ATOM;
                bf16 *left = s->slots[slot][0], *right = s->slots[slot][2 * ATOM];
                uint64_t *full = &s->full[slot];
                if (i == 0) s->tile[slot] = tile;
                barrier_expect(full, sizeof(s->slots[0]));
                if (A_COLUMNS)
                    for (int j = 0; j < 2; j++)
                        copy_tile(left + j * ATOM * ATOM, &a_map, a.col + m0 + ATOM * j, 0, a.row + k,
                                  sequence, full);
                else copy_tile(left, &a_map, a.col + k, 0, a.row + m0, sequence, full);
                if (B_COLUMNS)
                    for (int j = 0; j < BN / ATOM; j++)
                        copy_tile(right + j * ATOM * ATOM, &b_map, b.col + n0 + ATOM * j, 0, b.row + k,
                                  sequence, full);
                else copy_tile(right, &b_map, b.col + k, 0, b.row + n0, sequence, full);
            }
            for (int piece = 0; piece < PIECES; piece++) {
                int slot = next_slot(), across = min(2, BN / ATOM - 2 * piece);
                if (!changes_its_place<F>) { barrier_arrive(&s->full[slot]); continue; }
                barrier_expect(&s->full[slot], across * 2 * ATOM * ATOM * (int)sizeof(bf16));
                for (int j = 0; j < 2 * across; j++)
                    copy_tile(s->slots[slot][j * ATOM], &place_map, n0 + 128 * piece + j / 2 * ATOM, 0,
                              m0 + j % 2 * ATOM, sequence, &s->full[slot]);
            }
        }
        int slot = next_slot();
        s->tile[slot].x = -1;
        barrier_arrive(&s->full[slot]);
        __threadfence();
        if (atomicAdd(&wide_tiles[1], 1) == gridDim.x - 1) wide_tiles[0] = wide_tiles[1] = 0;
        return;
    }
    KEEP_REGISTERS("inc", 232);
    int first = threadIdx.x % GROUP / 32 * 16 + lane / 4, leads = threadIdx.x % GROUP == 0;
    for (;;) {
        barrier_wait(&s->full[item % STAGES], item / STAGES);
        int4 tile = s->tile[item % STAGES];
        int sequence = tile.x, m0 = tile.y, n0 = tile.z, steps = steps_of(m0);
        if (sequence < 0) break;
        float sum[BN / 8][4];
        for (int i = 0; i < steps; i++, item++) {
            int slot = item % STAGES;
            const bf16 *left = s->slots[slot][group * ATOM], *right = s->slots[slot][2 * ATOM];
            barrier_wait(&s->full[slot], item / STAGES);
            products_begin();
#pragma unroll
            for (int k = 0; k < ATOM / 16; k++)
                tensor_product<BN, A_COLUMNS, B_COLUMNS>(
                    sum, operand(left + k * 16 * (A_COLUMNS ? ATOM : 1)),
                    operand(right + k * 16 * (B_COLUMNS ? ATOM : 1), ATOM * ATOM * 2), i > 0 || k > 0);
            products_commit();
            products_wait<1>();
            if (leads && item) { // what was before this step: another, or the last piece of a result
                if (i == 0) stores_read<0>();
                barrier_arrive(&s->free[(item - 1) % STAGES]);
            }
        }
        products_wait<0>();
        if (leads) barrier_arrive(&s->free[(item - 1) % STAGES]);
        typename F::Row row[2];
        for (int half = 0; half < 2; half++) {
            int r = m0 + group * ATOM + first + half * 8;
            row[half] = f.row_of(sequence, min(r, M - 1));
        }
        if constexpr (sums_columns<F>) // the last tile's are read
            asm volatile("bar.sync 3, 256;" : : : "memory");
        auto finish = [&](auto piece) {
            int slot = item % STAGES;
            bf16 *out = s->slots[slot][group * ATOM];
            barrier_wait(&s->full[slot], item / STAGES);
#pragma unroll
            for (int eighth = 0; eighth < min(16, BN / 8 - 16 * piece); eighth++) {
                int n = 16 * piece + eighth;
                float2 below = {0, 0};
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int r = m0 + group * ATOM + first + half * 8, i = n0 + n * 8 + lane % 4 * 2;
                    uint32_t *place = (uint32_t *)(out + eighth / 8 * (2 * ATOM * ATOM) +
                                                   (first + half * 8) * ATOM + (n % 8 ^ first % 8) * 8 +
                                                   lane % 4 * 2);
                    float2 v = {sum[n][2 * half], sum[n][2 * half + 1]};
                    *place = f.two(row[half], r, i, v, changes_its_place<F> ? *place : 0);
                    if (sums_columns<F> && r < M) { below.x += v.x; below.y += v.y; }
                }
                if constexpr (sums_columns<F>) {
                    for (int other = 4; other < 32; other *= 2) {
                        below.x += __shfl_xor_sync(~0u, below.x, other);
                        below.y += __shfl_xor_sync(~0u, below.y, other);
                    }
                    if (lane < 4) *(float2 *)&s->columns[threadIdx.x / 32][n * 8 + lane * 2] = below;
                }
            }
            asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
            group_barrier(group);
            if (leads) {
                for (int j = 0; j < min(2, BN / ATOM - 2 * piece); j++)
                    store_tile(&place_map, n0 + 128 * piece + ATOM * j, m0 + ATOM * group, sequence,
                               out + j * (2 * ATOM * ATOM));
                stores_commit();
                if (piece) { stores_read<1>(); barrier_arrive(&s->free[(item - 1) % STAGES]); }
            }
            if constexpr (sums_rows<F>) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int r = m0 + group * ATOM + first + half * 8, i = n0 + 128 * piece;
                    float2 sums = row[half].sums;
#pragma unroll
                    for (int other = 2; other; other /= 2) {
                        sums.x = fmaxf(sums.x, __shfl_xor_sync(~0u, sums.x, other));
                        sums.y += __shfl_xor_sync(~0u, sums.y, other);
                    }
                    if (lane % 4 == 0 && r < M && i < N) f.row(sequence, r, i / 128, sums);
                    row[half].sums = make_float2(-INFINITY, 0);
                }
            }
            item++;
        };
        finish(Known<0>());
        finish(Known<1>());
        if constexpr (sums_columns<F>) {
            asm volatile("bar.sync 3, 256;" : : : "memory");
            int i = threadIdx.x;
            float all = 0;
            for (int w = 0; w < 8 && i < BN; w++) all += s->columns[w][i];
            if (i < BN && n0 + i < N) f.column(sequence, m0, n0 + i, all);
        }
    }
    if (leads) stores_written();
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
// K > 0; of one item, and of operands that are one bf16 number each
template <int A_COLUMNS, int B_COLUMNS, int SHAPE, int BN, typename F>
static void product_wide(F f, Part<bf16> a, Part<bf16> b, int M, int N, int K, int shift, int B,
                         cudaStream_t stream) {
    must_fit(part_turns(a.place, b.place), 1, "turns of a product in wide tiles");
    MatrixGPU<bf16> place = f.place();
    CUtensorMap a_map = tile_map(a.at, a.cols, 1, a.rows, a.ld, a.step, B, A_COLUMNS ? ATOM : 128),
        b_map = tile_map(b.at, b.cols, 1, b.rows, b.ld, b.step, B, B_COLUMNS ? ATOM : BN),
        place_map = tile_map(place.at, N, 1, M, place.row, place.step, B, ATOM);
    auto kernel = product_wide_kernel<BN, A_COLUMNS, B_COLUMNS, SHAPE, F>;
    int64_t most = (int64_t)B * ((M + 127) / 128) * ((N + BN - 1) / BN);
    int blocks = most < gpu.processors ? (int)most : gpu.processors, bytes = sizeof(WideShared<BN>);
    allow_shared(kernel, bytes);
    LAUNCH(kernel, blocks, 3 * GROUP, bytes, stream, a_map, b_map, place_map, a.place, b.place, f, M, N, K,
           shift, B);
}
// What all products of a layer have in common. scratch: (B,M,N), NULL: there are tiles. wide: columns of the
// tiles of its large products (192 or 256; 0: 128).
typedef struct { int B, in_eights, wide; float *scratch; cudaStream_t stream; } ProductWay;
// Of 128×128: narrower ones are better then.
static int few_tiles(int64_t M, int64_t N, int64_t products) {
    return (M + 127) / 128 * ((N + 127) / 128) * products <= 80;
}
// f of A·B: A (M,K), or with A_COLUMNS its transpose (K,M); B (N,K) transposed, or with B_COLUMNS (K,N) as
// it is; for each of the items of all sequences.
template <int A_COLUMNS, int B_COLUMNS, int SHAPE, typename F, typename X>
static void product_gpu(F f, Part<X> a, Part<X> b, int M, int N, int K, int shift, int items,
                        ProductWay way) {
    if (M <= 0) return;
    if constexpr (sizeof(X) == sizeof(bf16))
        if (!way.scratch) {
            if constexpr (by_twos<F>)
                if (way.wide) {
                    enum { LESS = SHAPE == OUT_LOWER ? 256 : 192 };
                    auto wide = way.wide < 256 ? product_wide<A_COLUMNS, B_COLUMNS, SHAPE, LESS, F>
                                               : product_wide<A_COLUMNS, B_COLUMNS, SHAPE, 256, F>;
                    wide(f, a, b, M, N, K, shift, way.B, way.stream);
                    return;
                }
            auto tiles = few_tiles(M, N, (int64_t)way.B * items)
                             ? product_tiles<A_COLUMNS, B_COLUMNS, SHAPE, 64, F>
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
