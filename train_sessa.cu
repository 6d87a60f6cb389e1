/*
The CUDA twin of train_sessa.c: the same layers in the same order, name_gpu for name, on one GPU. All that is no layer
(files, data, training loop, command line) is taken from train_sessa.c itself, which this file includes.

    train_sessacu --precision bf16     bfloat16 operands, the default
    train_sessacu --precision tf32     float32 numbers, products on TensorFloat-32 tensor cores
    train_sessacu --precision fp32     float32 throughout: follows the CPU

X is the type of what products read and of the activations kept for the backward pass: bf16, or float. In float32 always:
the parameters and their moments and gradients, the residual stream, the softmax's statistics, sums within products, the
right-hand sides of the feedback system. Layers take the arguments of their C functions, and a stream. Their equations and
shapes stand there, above the function of the same name; here stands what differs: where one pass over the data does the
work of several C functions, and which part of their loops a block, a warp or a thread takes. Layers that go row by row or
number by number are a loop's body, given to one of three launchers: each, each_with_sums, rows. A step's launches
are recorded as CUDA graphs.
Everything is deterministic: no atomics, every sum in a fixed order, products chosen by cuBLASLt's heuristic and never by
timing.
*/
#include <cublasLt.h>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <initializer_list>
#include <utility>
#ifndef SESSA_NO_MAIN
#define SESSA_NO_MAIN
#define SESSA_CUDA_MAIN
#endif
#include "train_sessa.c"

static_assert(sizeof(real) == sizeof(float), "the CUDA twin is float32 and bf16");
typedef __nv_bfloat16 bf16;

// ----------------------------------------------------------------------------
// errors, the device, numbers of either type

typedef enum { FP32, TF32, BF16 } Precision;
static const char *const precision_names[] = {"fp32", "tf32", "bf16"};

// A matrix product that has been asked for before: its shape, and how cuBLASLt does it.
typedef struct {
    int M, N, K, batch, a_transposed, b_transposed, biased, scaled, tf32, in_bytes, out_bytes, a_align, b_align, out_align;
    int64_t a_ld, b_ld, out_ld, a_step, b_step, out_step;
} ProductKey;
typedef struct {
    ProductKey key;
    int known, plain; // plain: cuBLASLt has nothing for it
    cublasLtMatmulDescOpaque_t operation;
    cublasLtMatrixLayoutOpaque_t a, b, out;
    cublasLtMatmulAlgo_t algo;
    size_t workspace;
} Product;

enum { WORKSPACE = 32 << 20, N_PRODUCTS = 1 << 13 };
static struct {
    Precision precision;
    int ready, hopper, processors; // hopper: bf16 has kernels of its own for this GPU
    int clusters;                  // those in clusters too: not on every part of a GPU (MIG, MPS)
    CUresult (*encode_map)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                           const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                           CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    cudaStream_t stream, side; // side: what can wait, beside the stream's launches that wait for each other
    cudaStream_t late;         // the update of most layers, which goes on under the first ones' next forward pass
    cudaEvent_t so_far;
    cublasLtHandle_t lt;
    char *workspace; // of each stream, for cuBLASLt and for sums over rows, one at a time in the order of the stream
} gpu = {BF16, 0, 0, 0, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL};
static Product products[N_PRODUCTS]; // each at its key's hash, until another takes its place

// What fails here is a broken machine or a broken program: one line, exit code 1.
static void cuda_check(cudaError_t code, const char *what, int line) {
    if (code == cudaSuccess) return;
    fprintf(stderr, "train_sessa: CUDA: %s (%s, line %d)\n", cudaGetErrorString(code), what, line);
    exit(1);
}
static void lt_check(cublasStatus_t code, const char *what, int line) {
    if (code == CUBLAS_STATUS_SUCCESS) return;
    fprintf(stderr, "train_sessa: cuBLASLt: status %d (%s, line %d)\n", (int)code, what, line);
    exit(1);
}
#define CUDA(call) cuda_check(call, #call, __LINE__)
#define LT(call) lt_check(call, #call, __LINE__)

// A pass that would ask for more than there is stops before it writes past that.
static void must_fit(int64_t asked, int64_t room, const char *what) {
    if (asked <= room) return;
    fprintf(stderr, "train_sessa: CUDA: %s: %lld asked for, room for %lld\n", what, (long long)asked,
            (long long)room);
    exit(1);
}

// Memory of the device that layers use one after the other, and how much of it there is.
typedef struct { float *at; int64_t numbers; } Scratch;
static float *borrow(Scratch room, int64_t numbers) {
    must_fit(numbers, room.numbers, "a layer's scratch");
    return room.at;
}

// In a build for tests (-DGUARD_BANDS) GUARD known bytes lie behind every buffer of the device's memory; bands says
// where, and whose. Without, there are none. They are NaN as numbers: who reads there shows as well.
#ifdef GUARD_BANDS
enum { GUARD = 1024, GUARD_BYTE = 0xFF, MOST_BANDS = 1 << 16 };
typedef struct { const char *at; size_t bytes; char name[40]; } Band;
static Band bands[MOST_BANDS];
static int n_bands, n_broken; // bands there are; those found written to
static void guard(const void *from, const void *end, const char *name, int layer) {
    must_fit(n_bands + 1, MOST_BANDS, "guard bands");
    Band *band = &bands[n_bands++];
    band->at = (const char *)from;
    band->bytes = (size_t)((const char *)end - (const char *)from);
    snprintf(band->name, sizeof(band->name), layer < 0 ? "%.30s" : "%.25s %d", name, layer);
    CUDA(cudaMemset((void *)from, GUARD_BYTE, band->bytes));
}
static int broken(const Band *band) {
    unsigned char bytes[2 * GUARD];
    for (size_t at = 0; at < band->bytes; at += sizeof(bytes)) {
        size_t n = band->bytes - at < sizeof(bytes) ? band->bytes - at : sizeof(bytes);
        CUDA(cudaMemcpy(bytes, band->at + at, n, cudaMemcpyDeviceToHost));
        for (size_t b = 0; b < n; b++) if (bytes[b] != GUARD_BYTE) return 1;
    }
    return 0;
}
// The memory from .. from+bytes is given back: its bands are looked at, one line for each that was written to.
static void unguard(const void *from, size_t bytes) {
    int kept = 0;
    CUDA(cudaDeviceSynchronize());
    for (int i = 0; i < n_bands; i++) {
        if (bands[i].at < (const char *)from || bands[i].at >= (const char *)from + bytes) bands[kept++] = bands[i];
        else if (broken(&bands[i])) {
            n_broken++;
            fprintf(stderr, "train_sessa: CUDA: written behind %s\n", bands[i].name);
        }
    }
    n_bands = kept;
}
#else
enum { GUARD = 0 };
static void guard(const void *, const void *, const char *, int) {}
static void unguard(const void *, size_t) {}
#endif

// Starts a kernel, each `cluster` of whose blocks may reach each other's shared memory (0: none do). ahead: on Hopper it starts
// while the one before still works, makes ready what does not depend on it, and waits for its results. Every kernel has to: who
// comes next waits for this one alone.
static cudaLaunchConfig_t launch_config(cudaLaunchAttribute attributes[2], dim3 blocks, dim3 threads, size_t shared,
                                        cudaStream_t stream, int cluster, int ahead) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = ahead;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {(unsigned)cluster, 1, 1};
    return {blocks, threads, shared, stream, attributes, !gpu.hopper ? 0u : cluster ? 2u : 1u};
}
template <typename... P, typename... A>
static cudaError_t launch(void (*kernel)(P...), dim3 blocks, dim3 threads, size_t shared, cudaStream_t stream, int cluster,
                          int ahead, A &&...arguments) {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = launch_config(attributes, blocks, threads, shared, stream, cluster, ahead);
    return cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...);
}
#define LAUNCH_AS(cluster, ahead, kernel, blocks, threads, shared, stream, ...) \
    cuda_check(launch(kernel, blocks, threads, shared, stream, cluster, ahead, __VA_ARGS__), #kernel, __LINE__)
#define LAUNCH(...) LAUNCH_AS(0, 1, __VA_ARGS__)

// What `stream` is given from here on waits for all that `other` was given so far.
static void follow(cudaStream_t stream, cudaStream_t other) {
    if (stream == other) return;
    CUDA(cudaEventRecord(gpu.so_far, other));
    CUDA(cudaStreamWaitEvent(stream, gpu.so_far, 0));
}

// Its attributes say whether this program holds Hopper's own instructions.
enum { GROUP = 128 }; // threads of a warp group
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#define HOPPER
#endif
#ifdef HOPPER
__global__ static void __launch_bounds__(GROUP) built_for_hopper_kernel(void) {}
#else
__global__ static void __launch_bounds__(GROUP / 2) built_for_hopper_kernel(void) {}
#endif
// What every kernel begins with. crowd: the next one's blocks may come in, and wait, once all of this one have begun; not where it
// leaves multiprocessors to the other stream.
__device__ static inline void wait_for_results(int crowd = 1) {
#ifdef HOPPER
    if (crowd) asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

static int clusters_fit(void); // below the kernels that it asks about

// Opens the device once. FAILED and a line in error if there is none.
static int gpu_open(char *error) {
    if (gpu.ready) return 0;
    int devices = 0;
    cudaError_t code = cudaGetDeviceCount(&devices);
    if (code != cudaSuccess || devices == 0)
        return fail(error, NULL, "no CUDA device: %s", code == cudaSuccess ? "none is there" : cudaGetErrorString(code));
    if ((code = cudaSetDevice(0)) != cudaSuccess ||
        (code = cudaMalloc((void **)&gpu.workspace, 2 * (WORKSPACE + GUARD))) != cudaSuccess)
        return fail(error, NULL, "the CUDA device cannot be used: %s", cudaGetErrorString(code));
    for (int i = 0; i < 2; i++) {
        char *at = gpu.workspace + i * (WORKSPACE + GUARD);
        CUDA(cudaMemset(at, 0, WORKSPACE));
        guard(at + WORKSPACE, at + WORKSPACE + GUARD, "workspace", i);
    }
    cudaStream_t *streams[] = {&gpu.late, &gpu.side, &gpu.stream};
    for (int i = 0; i < 3; i++) CUDA(cudaStreamCreateWithPriority(streams[i], cudaStreamDefault, -i));
    CUDA(cudaEventCreateWithFlags(&gpu.so_far, cudaEventDisableTiming));
    LT(cublasLtCreate(&gpu.lt));
    cudaFuncAttributes built;
    cudaDriverEntryPointQueryResult found;
    int major = 0;
    CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    CUDA(cudaDeviceGetAttribute(&gpu.processors, cudaDevAttrMultiProcessorCount, 0));
    CUDA(cudaFuncGetAttributes(&built, built_for_hopper_kernel));
    CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&gpu.encode_map, 12000, cudaEnableDefault,
                                          &found));
    gpu.hopper = major == 9 && built.maxThreadsPerBlock == GROUP && found == cudaDriverEntryPointSuccess;
    gpu.clusters = gpu.hopper && clusters_fit();
    if (!gpu.hopper && gpu.precision == BF16)
        fprintf(stderr, "train_sessa: bf16 is fast on a Hopper GPU, built with CUDA_ARCH=sm_90a; elsewhere it is slower\n");
    gpu.ready = 1;
    return 0;
}

enum { MOST_SEQUENCES = 65535 }; // of a batch: the y and z of a grid

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

__device__ static inline float get(float x) { return x; }
__device__ static inline float get(bf16 x) { return __bfloat162float(x); }
template <typename X> __device__ inline X to(float x);
template <> __device__ inline float to<float>(float x) { return x; }
template <> __device__ inline bf16 to<bf16>(float x) { return __float2bfloat16(x); }

// V neighbours at once: 8 of them, 16 or 32 bytes, where everything is aligned, else 1.
template <int V> __device__ inline void read_some(float v[V], const float *at) {
    if constexpr (V == 1) v[0] = *at;
    else if constexpr (V == 2) *(float2 *)v = *(const float2 *)at;
    else for (int i = 0; i < V; i += 4) {
        float4 four = *(const float4 *)(at + i);
        v[i] = four.x; v[i + 1] = four.y; v[i + 2] = four.z; v[i + 3] = four.w;
    }
}
template <int V> __device__ inline void read_some(float v[V], const bf16 *at) {
    if constexpr (V == 1) v[0] = get(*at);
    else if constexpr (V == 2) for (int i = 0; i < 2; i++) v[i] = get(at[i]);
    else {
        union { uint4 whole; unsigned short part[8]; } u;
        u.whole = *(const uint4 *)at;
        for (int i = 0; i < V; i++) v[i] = __uint_as_float((uint32_t)u.part[i] << 16);
    }
}
// The same of what no other thread writes meanwhile: these reads may pass the writes before them, but nothing volatile.
template <int V, typename X> __device__ inline void read_ahead(float v[V], const X *at) {
    if constexpr (V == 1) v[0] = get(*at);
    else {
        uint4 all[V * sizeof(X) / 16];
        for (int i = 0; i < V * (int)sizeof(X) / 16; i++)
            asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(all[i].x), "=r"(all[i].y), "=r"(all[i].z),
                         "=r"(all[i].w) : "l"((const uint4 *)at + i));
        read_some<V>(v, (const X *)all);
    }
}
template <int V> __device__ inline void write_some(float *at, const float v[V]) {
    if constexpr (V == 1) *at = v[0];
    else if constexpr (V == 2) *(float2 *)at = make_float2(v[0], v[1]);
    else for (int i = 0; i < V; i += 4) *(float4 *)(at + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
}
__device__ static inline uint32_t pack_two(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *(uint32_t *)&pair;
}
template <int V> __device__ inline void write_some(bf16 *at, const float v[V]) {
    if constexpr (V == 1) *at = to<bf16>(v[0]);
    else if constexpr (V == 2) *(uint32_t *)at = pack_two(v[0], v[1]);
    else *(uint4 *)at = make_uint4(pack_two(v[0], v[1]), pack_two(v[2], v[3]), pack_two(v[4], v[5]), pack_two(v[6], v[7]));
}
static int wide(std::initializer_list<int64_t> strides, std::initializer_list<const void *> pointers) {
    int ok = 1;
    for (int64_t stride : strides) ok &= stride % 8 == 0;
    for (const void *pointer : pointers) ok &= (uintptr_t)pointer % 16 == 0;
    return ok;
}

// for n < rows: for i < width, in steps of V: f(V, n, i), which does the numbers i .. i+V-1 of row n, V a number that the
// compiler knows: 8, or 1. A thread takes one such piece. This pass and those below go from the last row to the first: products
// go the other way, and what was written last is still in the L2 cache.
const int64_t MOST_PIECES = 0xFFFFFF00;
template <int N> struct Known { __host__ __device__ constexpr operator int() const { return N; } };
template <int V, typename F> __global__ void each_kernel(F f, unsigned rows, unsigned pieces) {
    wait_for_results();
    unsigned item = blockIdx.x * blockDim.x + threadIdx.x; // there are at most MOST_PIECES
    if (item >= rows * pieces) return;
    item = rows * pieces - 1 - item;
    f(Known<V>(), (int)(item / pieces), (int)(item % pieces) * V);
}
template <typename F> static void each(int64_t rows, int width, int in_eights, cudaStream_t stream, F f) {
    int pieces = in_eights ? width / 8 : width;
    must_fit(rows * pieces, MOST_PIECES, "threads of a pass");
    unsigned blocks = (unsigned)((rows * pieces + 255) / 256);
    if (blocks) LAUNCH((in_eights ? each_kernel<8, F> : each_kernel<1, F>), blocks, 256, 0, stream, f, (unsigned)rows,
                       (unsigned)pieces);
}

// Sums and maxima over a block, the same on all threads; the order is fixed. shared: 32 numbers.
__device__ static inline float warp_sum(float x) {
    for (int lane = 16; lane; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    return x;
}
__device__ static inline float warp_max(float x) {
    for (int lane = 16; lane; lane /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lane));
    return x;
}
__device__ static inline float block_sum(float x, float *shared) {
    int warps = blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0;
    for (int w = 0; w < warps; w++) sum += shared[w];
    return sum;
}
__device__ static inline float block_max(float x, float *shared) {
    int warps = blockDim.x / 32;
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    float max = shared[0];
    for (int w = 1; w < warps; w++) max = fmaxf(max, shared[w]);
    return max;
}

// Sums over rows, on the way of a pass that reads them anyway: each chunk of rows leaves one partial sum a column, and
// one launch for a whole layer adds them up in the chunks' order, out[i] += Σ_c partial[c·stride + i].
typedef struct { float *out; const float *partial; int chunks, stride, width; } ColumnSum;
// add: to the gradients that are there, else over them, as all first passes behind an update do. The partial sums
// lie in room .. end, those of the next pass from `next` on; how much that takes says column_sums_room.
enum { MOST_SUMS = 16 };
typedef struct { ColumnSum list[MOST_SUMS]; int n, add; float *room, *next, *end; } ColumnSums;
enum { BLOCKS_AT_ONCE = 528, GROUP_COLUMNS = 128, ROW_BLOCK = 320, SUM_ROWS = 128 }; // 4 blocks a multiprocessor of an H100
static float *sums_place(ColumnSums *sums, int64_t numbers) {
    float *place = sums->next;
    must_fit(numbers, sums->end - place, "partial sums over rows");
    sums->next += numbers;
    return place;
}
static void column_sum(ColumnSums *sums, float *out, const float *partial, int chunks, int stride, int width) {
    if (!out) return;
    must_fit(sums->n + 1, MOST_SUMS, "sums over rows");
    sums->list[sums->n++] = {out, partial, chunks, stride, width};
}

// Where a product in tiles leaves the sums of `width` columns over each SUM_ROWS rows of a sequence. NULL: nowhere
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

// A block takes 32 columns of one sum, its warps every 8th chunk.
__global__ static void column_sums_kernel(ColumnSums sums) {
    __shared__ float parts[8][32];
    wait_for_results();
    int k = 0, block = blockIdx.x;
    while (block >= (sums.list[k].width + 31) / 32) block -= (sums.list[k++].width + 31) / 32;
    ColumnSum one = sums.list[k];
    int i = block * 32 + threadIdx.x;
    float sum = 0;
    if (i < one.width)
        for (int c = threadIdx.y; c < one.chunks; c += 8) sum += one.partial[(int64_t)c * one.stride + i];
    parts[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || i >= one.width) return;
    for (int y = 1; y < 8; y++) sum += parts[y][threadIdx.x];
    one.out[i] = sums.add ? one.out[i] + sum : sum;
}
static void column_sums_gpu(ColumnSums *sums, cudaStream_t stream) {
    int blocks = 0;
    for (int k = 0; k < sums->n; k++) blocks += (sums->list[k].width + 31) / 32;
    LAUNCH(column_sums_kernel, blocks, dim3(32, 8), 0, stream, *sums);
    sums->n = 0;
    sums->next = sums->room;
}

// The same loops with sums over the rows: f(V, n, i, sum) adds to sum[k][0 .. V-1]. A block takes 16 pieces of V columns of
// every gridDim.y-th 16 rows, its chunk, a thread a piece of one of these. outs[k] gets sum k, a third sum its first column
// alone: one that is the same for all columns.
template <int V, int SUMS, typename F>
__global__ void __launch_bounds__(256, 4) each_with_sums_kernel(F f, float *partial, int N, int width) {
    __shared__ float parts[16][16 * V];
    wait_for_results();
    int i = (blockIdx.x * 16 + threadIdx.x % 16) * V, y = threadIdx.x / 16;
    float sum[SUMS][V] = {};
    if (i < width)
        for (int n = N - 1 - (int)blockIdx.y * 16 - y; n >= 0; n -= 16 * gridDim.y) f(Known<V>(), n, i, sum);
    for (int k = 0; k < SUMS; k++) {
        for (int e = 0; e < V; e++) parts[y][threadIdx.x % 16 * V + e] = sum[k][e];
        __syncthreads();
        int column = blockIdx.x * 16 * V + threadIdx.x;
        if (threadIdx.x < 16 * V && column < width) {
            float all = 0;
            for (int row = 0; row < 16; row++) all += parts[row][threadIdx.x];
            partial[((int64_t)blockIdx.y * SUMS + k) * width + column] = all;
        }
        __syncthreads();
    }
}
static int sum_groups(int width, int in_eights) {
    int columns = in_eights ? GROUP_COLUMNS : 16;
    return (width + columns - 1) / columns;
}
static int sum_chunks(int N, int width, int in_eights) { // most in eights
    int chunks = BLOCKS_AT_ONCE / sum_groups(width, in_eights);
    return chunks < 1 ? 1 : min_int(chunks, (N + 15) / 16);
}
template <int SUMS, typename F>
static void each_with_sums(float *const (&outs)[SUMS], ColumnSums *sums, int N, int width, int in_eights, cudaStream_t stream,
                           F f) {
    int chunks = sum_chunks(N, width, in_eights);
    float *partial = sums_place(sums, (int64_t)chunks * SUMS * width);
    LAUNCH((in_eights ? each_with_sums_kernel<8, SUMS, F> : each_with_sums_kernel<1, SUMS, F>),
           dim3(sum_groups(width, in_eights), chunks), 256, 0, stream, f, partial, N, width);
    for (int k = 0; k < SUMS; k++)
        column_sum(sums, outs[k], partial + k * width, chunks, SUMS * width, k == 2 ? 1 : width);
}

// for n < N: f(V, PIECES), a pass with sums along row n: threadIdx.y takes a row, threadIdx.x a piece of V of its columns
// (PIECES of them, blockDim.x·V apart, where rows are that long). A row's threads are whole warps and wait for each other
// alone.
template <int V, int PIECES, typename F> __global__ void __launch_bounds__(ROW_BLOCK, 2) rows_kernel(F f) {
    wait_for_results();
    f(Known<V>(), Known<PIECES>());
}
__device__ static inline int last_first(void) { return (gridDim.x - 1 - blockIdx.x) * blockDim.y + threadIdx.y; } // the row
enum { MOST_COLUMNS = 64 * ROW_BLOCK, MOST_IN_EIGHTS = 4 * 8 * ROW_BLOCK }; // of a row
static dim3 row_threads(int D, int in_eights) {
    int x = (int)round_up(min_int(in_eights ? (D + 7) / 8 : D, ROW_BLOCK), 32);
    return dim3(x, ROW_BLOCK / x);
}
static int row_blocks(int N, int D, int in_eights, int most) { // most by ones
    int y = (int)row_threads(D, in_eights).y, blocks = (N + y - 1) / y;
    return most ? min_int(blocks, most) : blocks;
}
template <typename F> static void rows(int N, int D, int in_eights, int most_blocks, cudaStream_t stream, F f) {
    int eights = in_eights && D <= MOST_IN_EIGHTS, blocks = row_blocks(N, D, eights, most_blocks);
    must_fit(D, MOST_COLUMNS, "columns of a row");
    auto kernel = !eights ? rows_kernel<1, 64, F> : D <= 8 * ROW_BLOCK ? rows_kernel<8, 1, F> : rows_kernel<8, 4, F>;
    LAUNCH(kernel, blocks, row_threads(D, eights), 0, stream, f);
}
// (Σ x, Σ y) over the row's threads. shared: a number a warp, not the one of the sum before.
__device__ static inline float2 row_sum(float x, float y, float2 *shared) {
    int warps = blockDim.x / 32, first = threadIdx.y * warps;
    float2 sum = {warp_sum(x), warp_sum(y)};
    if (warps == 1) return sum;
    if (threadIdx.x % 32 == 0) shared[first + threadIdx.x / 32] = sum;
    asm volatile("bar.sync %0, %1;" : : "r"(threadIdx.y + 1), "r"(blockDim.x) : "memory");
    sum = shared[first];
#pragma unroll 1
    for (int w = 1; w < warps; w++) { sum.x += shared[first + w].x; sum.y += shared[first + w].y; }
    return sum;
}

// ----------------------------------------------------------------------------
// the matrix product, the one routine under every layer

// Element (i, j) of matrix number b is at[b·step + i·row + j·col]; one of the strides row and col is 1.
template <typename X> struct MatrixGPU { const X *at; int64_t row, col, step; };
template <typename X>
static MatrixGPU<X> rows_of_gpu(const X *at, int64_t row, int64_t step = 0) { return {at, row, 1, step}; }
template <typename X> static MatrixGPU<X> transpose_gpu(MatrixGPU<X> a) { return {a.at, a.col, a.row, a.step}; }

// Where a product goes: rows of `row` numbers, the next matrix `step` further.
template <typename O> struct MatrixOut { O *at; int64_t row, step; };
template <typename O> static MatrixOut<O> into(O *at, int64_t row, int64_t step = 0) { return {at, row, step}; }

// For shapes and alignments that cuBLASLt refuses: a thread takes one element of out.
template <typename O, typename X>
__global__ void product_kernel(MatrixOut<O> out, MatrixGPU<X> a, MatrixGPU<X> b, int M, int N, int K, float alpha,
                               float beta, const O *bias, const float *scale) {
    wait_for_results();
    int64_t item = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= (int64_t)M * N) return;
    int m = (int)(item / N), n = (int)(item % N);
    const X *row = a.at + blockIdx.y * a.step + m * a.row, *col = b.at + blockIdx.y * b.step + n * b.col;
    O *at = out.at + blockIdx.y * out.step + m * out.row + n;
    float sum = 0;
    for (int k = 0; k < K; k++) sum += get(row[k * a.col]) * get(col[k * b.row]);
    if (scale) alpha = *scale;
    *at = to<O>(alpha * sum + (beta == 0 ? 0 : beta * get(*at)) + (bias ? get(bias[n]) : 0));
}

static int alignment(const void *pointer, int64_t step_bytes) {
    uintptr_t bits = (uintptr_t)pointer | (uintptr_t)step_bytes | 256;
    return (int)(bits & (~bits + 1));
}

static void describe(cublasLtMatrixLayout_t layout, int bytes, int64_t rows, int64_t cols, int64_t ld, int batch, int64_t step) {
    LT(cublasLtMatrixLayoutInit(layout, bytes == 2 ? CUDA_R_16BF : CUDA_R_32F, (uint64_t)rows, (uint64_t)cols, ld));
    LT(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof(batch)));
    LT(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &step, sizeof(step)));
}
static void describe(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t what, int32_t value) {
    LT(cublasLtMatmulDescSetAttribute(operation, what, &value, sizeof(value)));
}

// The first algorithm of cuBLASLt's heuristic for this shape, without workspace (some that get one clear it first) unless that
// leaves much of the GPU idle: then a long sum is cut in pieces. Of short sums the first in tiles of 128×128. All measured:
// dev/speed/gpu_diary.md. cuBLASLt thinks in columns, out^T = B^T·A^T: its A is our B.
static void product_prepare(Product *p, const ProductKey *k) {
    int left_t = k->b_transposed, right_t = k->a_transposed, found = 0;
    enum { CHOICES = 8, SHORT_SUM = 1536 };
    struct { cublasLtMatmulPreferenceAttributes_t what; uint32_t value; } wanted[] = {
        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, (uint32_t)k->b_align},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, (uint32_t)k->a_align},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, (uint32_t)k->out_align},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, (uint32_t)k->out_align}};
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t results[CHOICES];
    memset(p, 0, sizeof(*p));
    p->key = *k;
    p->known = 1;
    LT(cublasLtMatmulDescInit(&p->operation, k->tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F));
    describe(&p->operation, CUBLASLT_MATMUL_DESC_TRANSA, left_t ? CUBLAS_OP_T : CUBLAS_OP_N);
    describe(&p->operation, CUBLASLT_MATMUL_DESC_TRANSB, right_t ? CUBLAS_OP_T : CUBLAS_OP_N);
    describe(&p->operation, CUBLASLT_MATMUL_DESC_EPILOGUE, k->biased ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT);
    if (k->scaled) describe(&p->operation, CUBLASLT_MATMUL_DESC_POINTER_MODE, CUBLASLT_POINTER_MODE_DEVICE);
    describe(&p->a, k->in_bytes, left_t ? k->K : k->N, left_t ? k->N : k->K, k->b_ld, k->batch, k->b_step);
    describe(&p->b, k->in_bytes, right_t ? k->M : k->K, right_t ? k->K : k->M, k->a_ld, k->batch, k->a_step);
    describe(&p->out, k->out_bytes, k->N, k->M, k->out_ld, k->batch, k->out_step);
    LT(cublasLtMatmulPreferenceInit(&preference));
    for (auto &one : wanted) LT(cublasLtMatmulPreferenceSetAttribute(&preference, one.what, &one.value, sizeof(one.value)));
    for (uint64_t room : {0, (int)WORKSPACE}) {
        if (found && results[0].wavesCount > 0.6f) break;
        LT(cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room, sizeof(room)));
        if (cublasLtMatmulAlgoGetHeuristic(gpu.lt, &p->operation, &p->a, &p->b, &p->out, &p->out, &preference, CHOICES, results,
                                           &found) != CUBLAS_STATUS_SUCCESS) found = 0;
    }
    p->plain = !found;
    cublasLtMatmulHeuristicResult_t *best = results;
    for (int i = 0; i < found && best == results && k->K <= SHORT_SUM && !k->a_transposed; i++) {
        int tile = 0;
        size_t size;
        LT(cublasLtMatmulAlgoConfigGetAttribute(&results[i].algo, CUBLASLT_ALGO_CONFIG_TILE_ID, &tile, sizeof(tile), &size));
        if (tile == CUBLASLT_MATMUL_TILE_128x128 && results[i].state == CUBLAS_STATUS_SUCCESS) best = &results[i];
    }
    if (found) p->algo = best->algo;
    if (found) p->workspace = best->workspaceSize;
}

// out = alpha·A·B + beta·out + bias for each of `batch` matrices: A (M,K), B (K,N), out (M,N), bias (N) or NULL.
// beta 0 overwrites. Sums are in float32. scale: alpha in the device's memory, in place of the argument, and 0 and 1.
template <typename O, typename X>
static void matmul_gpu(MatrixOut<O> out, MatrixGPU<X> a, MatrixGPU<X> b, int M, int N, int K, float alpha, float beta,
                       int batch, cudaStream_t stream, const O *bias = NULL, const float *scale = NULL) {
    if (M <= 0 || N <= 0 || batch <= 0) return;
    int64_t a_step = batch > 1 ? a.step : 0, b_step = batch > 1 ? b.step : 0, out_step = batch > 1 ? out.step : 0,
        in_bytes = sizeof(X), out_bytes = sizeof(O);
    ProductKey key = {M, N, K, batch, a.col != 1, b.col != 1, bias != NULL, scale != NULL, gpu.precision == TF32, (int)in_bytes,
                      (int)out_bytes, alignment(a.at, a_step * in_bytes), alignment(b.at, b_step * in_bytes),
                      alignment(out.at, out_step * out_bytes), a.col == 1 ? a.row : a.col, b.col == 1 ? b.row : b.col, out.row,
                      a_step, b_step, out_step};
    uint64_t hash = 0;
    for (size_t i = 0; i < sizeof(key) / 8; i++) hash = splitmix64(hash ^ ((const uint64_t *)(const void *)&key)[i]);
    Product *p = &products[hash % N_PRODUCTS];
    if (!p->known || memcmp(&p->key, &key, sizeof(key))) product_prepare(p, &key);
    if (p->plain) {
        LAUNCH((product_kernel<O, X>), dim3((unsigned)(((int64_t)M * N + 127) / 128), (unsigned)batch), 128, 0, stream,
               out, a, b, M, N, K, alpha, beta, bias, scale);
        return;
    }
    if (bias) LT(cublasLtMatmulDescSetAttribute(&p->operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof(bias)));
    const float *alpha_at = scale ? scale : &alpha, *beta_at = scale ? scale + (beta == 0 ? 1 : 2) : &beta;
    LT(cublasLtMatmul(gpu.lt, &p->operation, alpha_at, b.at, &p->a, a.at, &p->b, beta_at, out.at, &p->out, out.at,
                      &p->out, &p->algo, gpu.workspace + (stream == gpu.side ? WORKSPACE + GUARD : 0), p->workspace,
                      stream));
}

// ----------------------------------------------------------------------------
// random numbers

__device__ static inline uint64_t splitmix64_gpu(uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// A mask of dropout, number by number that of the C function; the passes that need it compute it. Its key is in the
// device's memory: a recorded step finds that of its own time there.
typedef struct { const uint64_t *key; uint64_t place, threshold; float scale; } Mask;
static uint64_t dropout_key(Dropout drop) { return splitmix64(splitmix64(drop.seed) ^ drop.micro_step); }
static Mask mask_of(const uint64_t *key, double probability, int place) {
    return {key, (uint64_t)place, (uint64_t)(probability * 4294967296.0), (float)(1 / (1 - probability))};
}
// The factors of the numbers at, at + 1, ...
template <int V> __device__ inline void read_mask(float factor[V], const Mask &mask, int64_t at) {
    uint64_t key = mask.threshold ? splitmix64_gpu(*mask.key ^ mask.place) : 0;
    for (int e = 0; e < V; e++)
        factor[e] = !mask.threshold ? 1 : (splitmix64_gpu(key ^ (uint64_t)(at + e)) >> 32) >= mask.threshold ? mask.scale : 0;
}

// ----------------------------------------------------------------------------
// layers, in the order in which data meets them

// embedding_forward and dropout in one pass.
static void embedding_forward_gpu(float *out, const int *inp, const float *wte, Mask mask, int B, int T, int D,
                                  cudaStream_t stream) {
    each((int64_t)B * T, D, wide({D}, {out, wte}), stream, [=] __device__ (auto V, int n, int i) {
        float v[V], factor[V];
        int64_t at = (int64_t)n * D + i;
        read_some<V>(v, wte + (int64_t)inp[n] * D + i);
        read_mask<V>(factor, mask, at);
        for (int e = 0; e < V; e++) v[e] *= factor[e];
        write_some<V>(out + at, v);
    });
}

// Which rows a token's gradient sums, sorted by token and cut into segments of at most SEGMENT rows. `lists`, in the host's
// memory, holds 4N + 2 numbers: order (N), the segments' beginnings in it, the tokens, each token's first segment.
enum { SEGMENT = 32 };
typedef struct { int segments, tokens; } TokenLists;
static TokenLists sort_tokens(int *lists, int *starts, const int *inp, int N, int V) { // starts: scratch (V+1)
    TokenLists t = {0, 0};
    int *order = lists, *begins = lists + N, *tokens = begins + N + 1, *first = tokens + N;
    memset(starts, 0, sizeof(int) * (size_t)(V + 1));
    for (int n = 0; n < N; n++) starts[inp[n] + 1]++;
    for (int v = 0; v < V; v++) {
        int count = starts[v + 1];
        starts[v + 1] += starts[v];
        if (!count) continue;
        tokens[t.tokens] = v;
        first[t.tokens++] = t.segments;
        for (int at = 0; at < count; at += SEGMENT) begins[t.segments++] = starts[v] + at;
    }
    begins[t.segments] = N;
    first[t.tokens] = t.segments;
    for (int n = 0; n < N; n++) order[starts[inp[n]]++] = n;
    return t;
}

// Numbers for the segments' sums: no more segments than rows, and no more than one a token that is not full.
static int64_t embedding_scratch(int N, int V, int D) { return (int64_t)min_int(N, N / SEGMENT + V) * D; }

// embedding_backward: a thread takes 8 columns of a segment and sums its rows, then 8 columns of a token and sums its
// segments, whose sums lie in scratch: (segments,D). lists: those of sort_tokens in the device's memory.
static void embedding_backward_gpu(float *dwte, Scratch scratch, const float *dout, const int *lists, TokenLists t,
                                   int B, int T, int D, cudaStream_t stream) {
    float *partial = borrow(scratch, (int64_t)t.segments * D);
    const int *begins = lists + B * T, *tokens = begins + B * T + 1, *first = tokens + B * T;
    int in_eights = wide({D}, {dwte, partial, dout});
    auto add_row = [=] __device__ (auto V, float *sum, const float *row) {
        float v[V];
        read_some<V>(v, row);
        for (int e = 0; e < V; e++) sum[e] += v[e];
    };
    each(t.segments, D, in_eights, stream, [=] __device__ (auto V, int segment, int i) {
        float sum[V] = {};
        for (int n = begins[segment]; n < begins[segment + 1]; n++) add_row(V, sum, dout + (int64_t)lists[n] * D + i);
        write_some<V>(partial + (int64_t)segment * D + i, sum);
    });
    each(t.tokens, D, in_eights, stream, [=] __device__ (auto V, int token, int i) {
        float sum[V] = {}, *out = dwte + (int64_t)tokens[token] * D + i;
        for (int segment = first[token]; segment < first[token + 1]; segment++)
            add_row(V, sum, partial + (int64_t)segment * D + i);
        add_row(V, sum, out);
        write_some<V>(out, sum);
    });
}

// x += mask ⊙ branch, V numbers from place `at`
template <int V, typename X>
static __device__ inline void residual_forward_gpu(float x[V], const X *branch, const Mask &mask, int64_t at) {
    float add[V], factor[V];
    read_some<V>(add, branch + at);
    read_mask<V>(factor, mask, at);
    for (int e = 0; e < V; e++) x[e] += factor[e] * add[e];
}

// residual_forward and layernorm_forward in one pass:
//     x += mask ⊙ branch (branch NULL: none),   kept = X(x) (NULL: not wanted),   out = LayerNorm(x)
template <typename X>
static void layernorm_forward_gpu(X *out, X *kept, float *mean, float *rstd, float *x, const X *branch, Mask mask,
                                  const float *weight, const float *bias, int N, int D, cudaStream_t stream) {
    rows(N, D, wide({D}, {out, kept, x, branch, weight, bias}), 0, stream, [=] __device__ (auto V, auto PIECES) {
        __shared__ float2 shared[2][ROW_BLOCK / 32];
        int n = last_first();
        if (n >= N) return;
        float v[PIECES][V], sum = 0, squares = 0;
        for (int p = 0, i = threadIdx.x * V; p < PIECES && i < D; p++, i += blockDim.x * V) {
            int64_t at = (int64_t)n * D + i;
            read_some<V>(v[p], x + at);
            if (branch) {
                residual_forward_gpu<V>(v[p], branch, mask, at);
                write_some<V>(x + at, v[p]);
            }
            if (kept) write_some<V>(kept + at, v[p]);
            for (int e = 0; e < V; e++) sum += v[p][e];
        }
        float m = row_sum(sum, 0, shared[0]).x / D;
        for (int p = 0, i = threadIdx.x * V; p < PIECES && i < D; p++, i += blockDim.x * V)
            for (int e = 0; e < V; e++) squares += (v[p][e] - m) * (v[p][e] - m);
        float r = 1 / sqrtf(row_sum(squares, 0, shared[1]).x / D + 1e-5f);
        for (int p = 0, i = threadIdx.x * V; p < PIECES && i < D; p++, i += blockDim.x * V) {
            float w[V], b[V];
            read_some<V>(w, weight + i);
            read_some<V>(b, bias + i);
            for (int e = 0; e < V; e++) v[p][e] = (v[p][e] - m) * r * w[e] + b[e];
            write_some<V>(out + (int64_t)n * D + i, v[p]);
        }
        if (threadIdx.x == 0) { mean[n] = m; rstd[n] = r; }
    });
}

// layernorm_backward, and all that wants its operands or its result:
//     dx += ..., the sums dweight and dbias over the rows,
//     dbranch = X(mask ⊙ dx) with its sums dbranch_bias: the gradient of the branch added below; without one (NULL),
//     dx itself is masked
// fresh: dx starts from 0. A block keeps the sums of its rows in registers.
template <typename X>
static void layernorm_backward_gpu(float *dx, float *dweight, float *dbias, X *dbranch, float *dbranch_bias,
                                   Mask mask, int fresh, const X *dout, const X *x, const float *mean, const float *rstd,
                                   const float *weight, int N, int D, ColumnSums *sums, cudaStream_t stream) {
    int in_eights = wide({D}, {dx, dbranch, dout, x, weight}) && D <= MOST_IN_EIGHTS,
        chunks = row_blocks(N, D, in_eights, BLOCKS_AT_ONCE / 2);
    float *partial = sums_place(sums, (int64_t)chunks * 3 * D);
    rows(N, D, in_eights, BLOCKS_AT_ONCE / 2, stream, [=] __device__ (auto V, auto PIECES) {
        __shared__ float2 shared[2][ROW_BLOCK / 32];
        __shared__ float parts[ROW_BLOCK * V];
        float sums[3][PIECES][V] = {}, v[PIECES][V], g[PIECES][V], d[PIECES][V] = {};
        int turn = 0;
        for (int n = N - 1 - (int)(blockIdx.x * blockDim.y + threadIdx.y); n >= 0; n -= gridDim.x * blockDim.y) {
            float m = mean[n], r = rstd[n], sum = 0, dot = 0;
            for (int p = 0, i = threadIdx.x * V; p < PIECES && i < D; p++, i += blockDim.x * V) {
                float w[V];
                int64_t at = (int64_t)n * D + i;
                read_some<V>(v[p], x + at);
                read_some<V>(g[p], dout + at);
                if (!fresh) read_some<V>(d[p], dx + at);
                read_some<V>(w, weight + i);
                for (int e = 0; e < V; e++) {
                    v[p][e] = (v[p][e] - m) * r;
                    sums[0][p][e] += g[p][e] * v[p][e];
                    sums[1][p][e] += g[p][e];
                    g[p][e] *= w[e];
                    sum += g[p][e];
                    dot += g[p][e] * v[p][e];
                }
            }
            float2 both = row_sum(sum / D, dot / D, shared[turn]);
            turn = !turn;
            for (int p = 0, i = threadIdx.x * V; p < PIECES && i < D; p++, i += blockDim.x * V) {
                float factor[V];
                int64_t at = (int64_t)n * D + i;
                read_mask<V>(factor, mask, at);
                for (int e = 0; e < V; e++) {
                    d[p][e] = (fresh ? 0 : d[p][e]) + r * (g[p][e] - both.x - v[p][e] * both.y);
                    factor[e] *= d[p][e];
                    sums[2][p][e] += factor[e];
                    if (!dbranch) d[p][e] = factor[e];
                }
                write_some<V>(dx + at, d[p]);
                if (dbranch) write_some<V>(dbranch + at, factor);
            }
        }
#pragma unroll
        for (int k = 0; k < 3; k++)
            for (int p = 0; p < PIECES; p++) {
                int i = (p * blockDim.x + threadIdx.x) * V, at = threadIdx.y * blockDim.x + threadIdx.x;
                __syncthreads();
                for (int e = 0; e < V; e++) parts[e * ROW_BLOCK + at] = sums[k][p][e];
                __syncthreads();
                for (int e = 0; e < V && threadIdx.y == 0 && i < D; e++) {
                    float all = 0;
                    for (int y = 0; y < (int)blockDim.y; y++) all += parts[e * ROW_BLOCK + y * blockDim.x + threadIdx.x];
                    partial[(blockIdx.x * 3 + k) * D + i + e] = all;
                }
            }
    });
    column_sum(sums, dweight, partial, chunks, 3 * D, D);
    column_sum(sums, dbias, partial + D, chunks, 3 * D, D);
    column_sum(sums, dbranch_bias, partial + 2 * D, chunks, 3 * D, D);
}

// One product of cuBLASLt.
template <typename X>
static void linear_forward_gpu(X *out, int ld_out, const X *inp, const X *weight, const X *bias, int N, int in,
                               int out_width, cudaStream_t stream) {
    matmul_gpu(into(out, ld_out), rows_of_gpu(inp, in), transpose_gpu(rows_of_gpu(weight, in)), N, out_width, in, 1, 0,
               1, stream, bias);
}

// dinp NULL, or dweight NULL: the other one alone, dweight added to or overwritten, on `side`: what is given to the stream from
// here on must leave dout and inp as they are until it follows the side. The bias's gradient, a sum over rows of dout, comes
// from the pass that made dout. scale: of both, in the device's memory, see matmul_gpu.
template <typename X>
static void linear_backward_gpu(X *dinp, float *dweight, const X *dout, int ld_dout, const X *inp, const X *weight,
                                int N, int in, int out_width, int add, cudaStream_t stream, cudaStream_t side,
                                const float *scale = NULL) {
    if (dinp) matmul_gpu(into(dinp, in), rows_of_gpu(dout, ld_dout), rows_of_gpu(weight, in), N, in, out_width, 1, 0, 1,
                         stream, (const X *)NULL, scale);
    if (!dweight) return;
    follow(side, stream);
    matmul_gpu(into(dweight, in), transpose_gpu(rows_of_gpu(dout, ld_dout)), rows_of_gpu(inp, in), out_width, in, N, 1,
               (float)add, 1, side, (const float *)NULL, scale);
}

// Φ(x), with the polynomial of normal_cdf and gauss = e^(-x²/2)
__device__ static inline float normal_cdf_gpu(float x, float gauss) {
    float t = __fdividef(1, 1 + 0.3f * fabsf(x));
    float tail = gauss * t * (0.11962327f + t * (0.12084553f + t * (0.099347115f + t * (0.1304165f + t * (-0.057167433f
                              + t * (0.21011846f + t * (-0.15937835f + t * 0.036194865f)))))));
    return x < 0 ? tail : 1 - tail;
}
__device__ static inline float gelu_gpu(float x) { return x * normal_cdf_gpu(x, __expf(-x * x / 2)); }

// γ = γ_max tanh(w·ā + b), from the row's w·ā
static __device__ inline float gain_forward_gpu(float dot, float bias, float gamma_max) {
    return gamma_max * tanhf(dot + bias);
}
// the gradient of w·ā + b: dγ γ_max (1 - ratio²), ratio = γ/γ_max
static __device__ inline float gain_backward_gpu(float dgamma, float ratio, float gamma_max) {
    return dgamma * gamma_max * (1 - ratio * ratio);
}

// gelu_forward and, where there is a gain (weight not NULL), gain_forward of its output, in one pass.
template <typename X>
static void gelu_forward_gpu(X *out, float *gamma, const X *inp, int ld, const float *weight, const float *bias,
                             float gamma_max, int N, int D, cudaStream_t stream) {
    rows((N + 1) / 2, D, wide({D, ld}, {out, inp, weight}), 0, stream, [=] __device__ (auto V, auto PIECES) { // two rows at once
        __shared__ float2 shared[ROW_BLOCK / 32];
        int n = 2 * last_first(), both = n + 1 < N; // without both, n twice
        if (n >= N) return;
        float dot[2] = {};
        for (int p = 0, i = threadIdx.x * V; p < PIECES && i < D; p++, i += blockDim.x * V) {
            float v[2][V], w[V];
            for (int r = 0; r < 2; r++) read_some<V>(v[r], inp + (int64_t)(n + r * both) * ld + i);
            if (weight) read_some<V>(w, weight + i);
            for (int r = 0; r < 2; r++) {
                for (int e = 0; e < V; e++) {
                    v[r][e] = gelu_gpu(v[r][e]);
                    if (weight) dot[r] += get(to<X>(v[r][e])) * w[e];
                }
                write_some<V>(out + (int64_t)(n + r * both) * D + i, v[r]);
            }
        }
        if (!weight) return;
        float2 sum = row_sum(dot[0], dot[1], shared);
        if (threadIdx.x == 0) gamma[n] = gain_forward_gpu(sum.x, bias[0], gamma_max);
        if (threadIdx.x == 0 && both) gamma[n + 1] = gain_forward_gpu(sum.y, bias[0], gamma_max);
    });
}

// gain_backward, then gelu_backward: with pre the gradient of w·ā + b
//     dinp = (dout + pre·weight) GELU'(inp),   dweight += Σ_n pre_n GELU(inp_n),   dweight_bias += Σ_n pre_n
// and dinp_bias += Σ_n dinp_n for the layer before. dinp may be inp.
template <typename X>
static void gelu_backward_gpu(X *dinp, float *dinp_bias, float *dweight, float *dweight_bias, const X *dout, const X *inp,
                              int ld, const float *dgamma, const float *gamma, const float *weight, float gamma_max, int N,
                              int D, ColumnSums *sums, cudaStream_t stream) {
    int in_eights = wide({D, ld}, {dinp, dout, inp, weight});
    each_with_sums({dinp_bias, dweight, dweight_bias}, sums, N, D, in_eights, stream,
                   [=] __device__ (auto V, int n, int i, auto &sum) {
        float v[V], g[V], w[V], ratio = weight ? gamma[n] / gamma_max : 0,
            pre = weight ? gain_backward_gpu(dgamma[n], ratio, gamma_max) : 0;
        read_some<V>(v, inp + (int64_t)n * ld + i);
        read_some<V>(g, dout + (int64_t)n * D + i);
        if (weight) read_some<V>(w, weight + i);
        for (int e = 0; e < V; e++) {
            float gauss = __expf(-v[e] * v[e] / 2), cdf = normal_cdf_gpu(v[e], gauss);
            if (weight) g[e] += pre * w[e];
            sum[1][e] += pre * get(to<X>(v[e] * cdf));
            g[e] *= cdf + v[e] * gauss * 0.39894228040143267794f;
            sum[0][e] += g[e];
            sum[2][e] += pre;
        }
        write_some<V>(dinp + (int64_t)n * ld + i, g);
    });
}

// The pairs among the V numbers v of row n from column i on, turned.
typedef struct { const float *cosine, *sine; int T, half, first; float direction; } Rope;
template <int V> __device__ inline void turn_pairs(float v[V], const Rope &rope, int n, int i) {
    enum { PAIRS = V / 2 };
    int64_t at = (int64_t)(rope.first + n % rope.T) * rope.half + i / 2 % rope.half;
    float c[PAIRS], s[PAIRS];
    read_some<PAIRS>(c, rope.cosine + at);
    read_some<PAIRS>(s, rope.sine + at);
    for (int e = 0; e < PAIRS; e++) {
        float even = v[2 * e], odd = v[2 * e + 1];
        v[2 * e] = even * c[e] - odd * rope.direction * s[e];
        v[2 * e + 1] = even * rope.direction * s[e] + odd * c[e];
    }
}
// A thread takes 8 numbers, or one pair; i counts numbers, or pairs.
template <typename X>
static void rope_forward_gpu(X *x, int ld, const float *cosine, const float *sine, int N, int T, int heads, int d, int first,
                             float direction, cudaStream_t stream) {
    Rope rope = {cosine, sine, T, d / 2, first, direction};
    int in_eights = wide({d, ld}, {x, cosine, sine});
    each(N, heads * (in_eights ? d : d / 2), in_eights, stream, [=] __device__ (auto V, int n, int i) {
        constexpr int COUNT = V == 1 ? 2 : V;
        X *place = x + (int64_t)n * ld + (V == 1 ? 2 * i : i);
        float v[COUNT];
        for (int e = 0; e < COUNT; e += V) read_some<V>(v + e, place + e);
        turn_pairs<COUNT>(v, rope, n, V == 1 ? 2 * i : i);
        for (int e = 0; e < COUNT; e += V) write_some<V>(place + e, v + e);
    });
}

// rope_backward of the first `turned` columns, and the sums of all `width` columns over the rows: the gradient of the
// projections' bias. Where a thread takes one number, its neighbour has the other of the pair.
template <typename X>
static void rope_backward_gpu(X *dx, float *dbias, int ld, Rope rope, int N, int turned, int width, ColumnSums *sums,
                              cudaStream_t stream) {
    each_with_sums({dbias}, sums, N, width, wide({2 * rope.half, width, ld}, {dx, rope.cosine, rope.sine}), stream,
                   [=] __device__ (auto V, int n, int i, auto &sum) {
        constexpr int COUNT = V == 1 ? 2 : V;
        float v[COUNT];
        int lane = threadIdx.x % 32, odd = V == 1 && i % 2;
        read_some<V>(v + odd, dx + (int64_t)n * ld + i);
        if (i < turned) {
            if (V == 1) v[!odd] = __shfl_xor_sync(3u << (lane & ~1), v[odd], 1);
            turn_pairs<COUNT>(v, rope, n, i - odd);
            write_some<V>(dx + (int64_t)n * ld + i, v + odd);
        }
        for (int e = 0; e < V; e++) sum[0][e] += v[odd + e];
    });
}

// Softmax over the past. A block takes row r of one item (a sequence, or a head of one), which stands at position i0 + r and
// sees the keys below seen = i0 + r + !strict. Its logits are float32; e takes their place as X, ld_x<X>(ld) apart: what is
// written never passes what is still to be read. In the columns seen .. the end of the row's block of P rows, e is 0.
//     e_rj = X(exp(logit_rj - max_r)),   stats_r = (max_r, 1/Σ_j e_rj) with the sum of the rounded e
// known: stats are given and the same e follows. normalised: e/Σe is written instead. A row that sees nothing: 1/sum is 0.
template <typename X> static inline int64_t ld_x(int64_t ld) { return ld * (int64_t)(sizeof(float) / sizeof(X)); }
__device__ static inline float round_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
}
template <typename X>
__global__ void softmax_panel_kernel(float *logits, int64_t ld, int64_t step, float *stats, int64_t stats_step,
                                     int known, int normalised, int tf32, int i0, int n, int P, int strict) {
    __shared__ float shared[32];
    wait_for_results();
    int r = blockIdx.x, seen = i0 + r + !strict, end = i0 + min(n, (r / P + 1) * P);
    float *row = logits + blockIdx.y * step + r * ld;
    X *e = (X *)row;
    stats += blockIdx.y * stats_step + 2 * r;
    float max = known ? stats[0] : -INFINITY, inverse = known ? stats[1] : 0, sum = 0;
    if (!known) {
        for (int j = threadIdx.x; j < seen; j += blockDim.x) max = fmaxf(max, row[j]);
        max = block_max(max, shared);
        if (seen == 0) max = 0;
    }
    for (int j0 = 0; j0 < end; j0 += 4 * blockDim.x) {
        int j = j0 + 4 * threadIdx.x;
        float v[4] = {0, 0, 0, 0};
        if (j < end) *(float4 *)v = *(const float4 *)(row + j);
        __syncthreads();
        for (int i = 0; i < 4; i++) {
            v[i] = j + i < seen ? expf(v[i] - max) : 0;
            if (tf32) v[i] = round_tf32(v[i]);
            v[i] = get(to<X>(v[i]));
            sum += v[i];
            if (known && normalised) v[i] *= inverse;
            if (j + i < end) e[j + i] = to<X>(v[i]);
        }
    }
    if (known) return;
    sum = block_sum(sum, shared);
    inverse = sum > 0 ? 1 / sum : sum; // NaN stays NaN
    if (threadIdx.x == 0) { stats[0] = max; stats[1] = inverse; }
    if (!normalised) return;
    for (int j = threadIdx.x; j < seen; j += blockDim.x) e[j] = to<X>(get(e[j]) * inverse);
}
template <typename X>
static void softmax_panel_gpu(float *logits, int64_t ld, int64_t step, float *stats, int64_t stats_step, int known,
                              int normalised, int i0, int n, int P, int strict, int items, cudaStream_t stream) {
    LAUNCH(softmax_panel_kernel<X>, dim3(n, items), i0 + n > 512 ? 256 : 64, 0, stream, logits, ld, step, stats,
           stats_step, known, normalised, gpu.precision == TF32 && sizeof(X) == 4, i0, n, P, strict);
}

// γ_t/z_t, the float32 scale of row r of sequence b; without gamma 1/z_t, without stats 1
struct RowScale {
    const float *gamma, *stats;
    int64_t step;
    __device__ float at(int64_t b, int64_t r) const {
        return (gamma ? gamma[b * step + r] : 1) * (stats ? stats[2 * (b * step + r) + 1] : 1);
    }
};

// A block takes a row of dweights, the gradient of the weights w, and X(w_rj (dweights_rj - Σ_i w_ri dweights_ri)) takes
// its place as e takes that of the logits.
template <typename X>
__global__ void softmax_panel_backward_kernel(float *dweights, const X *weights, int64_t ld, int64_t step, int64_t w_ld,
                                              int64_t w_step, int i0, int n, int P) {
    __shared__ float shared[32];
    wait_for_results();
    int r = blockIdx.x, seen = i0 + r + 1, end = i0 + min(n, (r / P + 1) * P);
    float *row = dweights + blockIdx.y * step + r * ld, sum = 0;
    X *to_ = (X *)row;
    weights += blockIdx.y * w_step + r * w_ld;
    for (int j = threadIdx.x; j < seen; j += blockDim.x) sum += get(weights[j]) * row[j];
    sum = block_sum(sum, shared);
    for (int j0 = 0; j0 < end; j0 += 4 * blockDim.x) {
        int j = j0 + 4 * threadIdx.x;
        float v[4] = {0, 0, 0, 0};
        if (j < end) *(float4 *)v = *(const float4 *)(row + j);
        __syncthreads();
        for (int i = 0; i < 4; i++)
            if (j + i < end) to_[j + i] = to<X>(j + i < seen ? get(weights[j + i]) * (v[i] - sum) : 0);
    }
}
template <typename X>
static void softmax_panel_backward_gpu(float *dweights, const float *weights, int64_t ld, int64_t step, int i0, int n,
                                       int P, int items, cudaStream_t stream) {
    LAUNCH(softmax_panel_backward_kernel<X>, dim3(n, items), i0 + n > 512 ? 256 : 64, 0, stream, dweights,
           (const X *)weights, ld, step, ld_x<X>(ld), ld_x<X>(step), i0, n, P);
}

// ----------------------------------------------------------------------------
// Hopper's tensor cores (sm_90a): tiles come from memory by the copy engine (TMA) while warp groups of 128 threads
// multiply what has arrived (wgmma). On an older or another GPU attention and feedback go the way of float32: cuBLASLt.
//
// A tile is `rows` rows of 64 numbers, 128 bytes, at a multiple of 1024; the 16 bytes number i of row r lie at place
// i ^ r % 8 (the copy engine's 128-byte swizzle, which wgmma undoes). Wider tiles are several side by side.

enum { ATOM = 64 };

// A kernel with more than 48 KiB of shared memory says so.
template <typename K> static void allow_shared(K *kernel, int bytes) {
    CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// Tiles of `box` rows of a matrix (B,rows,ld) of bf16 with `heads` parts of d columns; what lies past its edges is 0.
static CUtensorMap tile_map(const bf16 *at, int d, int heads, int64_t rows, int64_t ld, int64_t step, int B, int box) {
    CUtensorMap map;
    cuuint64_t sizes[] = {(cuuint64_t)d, (cuuint64_t)heads, (cuuint64_t)rows, (cuuint64_t)B},
        strides[] = {2 * (cuuint64_t)d, 2 * (cuuint64_t)ld, 2 * (cuuint64_t)step};
    cuuint32_t boxes[] = {ATOM, 1, (cuuint32_t)box, 1}, each_one[] = {1, 1, 1, 1};
    CUresult code = gpu.encode_map(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, (void *)at, sizes, strides, boxes,
                                   each_one, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (code != CUDA_SUCCESS) cuda_check(cudaErrorInvalidValue, "a map of tiles", __LINE__);
    return map;
}
__device__ static inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#ifdef HOPPER
__device__ static inline uint32_t shared_at(const void *at) { return (uint32_t)__cvta_generic_to_shared(at); }
__device__ static inline void barrier_init(uint64_t *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(shared_at(barrier)), "r"(arrivals));
}
__device__ static inline void barrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(shared_at(barrier)) : "memory");
}
__device__ static inline void barrier_expect(uint64_t *barrier, int bytes) { // one arrival, and bytes on their way
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(shared_at(barrier)), "r"(bytes)
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
__device__ static inline void barrier_arrive_at(uint64_t *barrier, int rank) { // of the cluster's block number `rank`
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" : : "r"(shared_at(barrier)), "r"(rank) : "memory");
}
// four goes to the same place in the cluster's block number `rank`, whose barrier counts its bytes.
__device__ static inline void store_at(float4 *to, float4 four, uint64_t *barrier, int rank) {
    asm volatile("{\n.reg .b32 there, full;\nmapa.shared::cluster.u32 there, %0, %2;\nmapa.shared::cluster.u32 full, %1, %2;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %6}, [full];\n}"
                 : : "r"(shared_at(to)), "r"(shared_at(barrier)), "r"(rank), "f"(four.x), "f"(four.y), "f"(four.z), "f"(four.w)
                 : "memory");
}
// The tile of `map` at column col of head h, row `row` of sequence b; its bytes count for the barrier.
__device__ static inline void copy_tile(bf16 *tile, const CUtensorMap *map, int col, int h, int row, int b, uint64_t *barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];"
                 : : "r"(shared_at(tile)), "l"(map), "r"(col), "r"(h), "r"(row), "r"(b), "r"(shared_at(barrier))
                 : "memory");
}
#define KEEP_REGISTERS(more_or_less, n) asm volatile("setmaxnreg." more_or_less ".sync.aligned.u32 %0;" : : "n"(n))

// wgmma's operand: a tile from row 0 on; `across`: bytes from one tile to the next beside it, for operands by columns
__device__ static inline uint64_t operand(const bf16 *tile, int across = 16) {
    return (uint64_t)((shared_at(tile) & 0x3FFFF) >> 4) | (uint64_t)(across >> 4) << 16 | (uint64_t)(1024 >> 4) << 32
        | (uint64_t)1 << 62;
}
__device__ static inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
__device__ static inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }
template <int LATER> __device__ inline void products_wait() { // for all but the last LATER groups
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(LATER) : "memory");
}
// c (64,N) = a (64,16) · b (16,N) + (keep ? c : 0). A thread holds of c the rows r = 16 warp + lane/4 and r + 8, columns
// 2(lane%4) and the next of each 8. B_COLUMNS: b's tile holds 16 rows of N numbers, else N rows of 16; a likewise.
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
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                     "{" REGS_0 "}, %32, %33, p, 1, 1, %35, %36;\n}"
                     : C32(c, 0) : "l"(a), "l"(b), "r"(keep), "n"(A_COLUMNS), "n"(B_COLUMNS));
    else
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                     "{" REGS_0 REGS_32 "}, %64, %65, p, 1, 1, %67, %68;\n}"
                     : C32(c, 0), C32(c, 8) : "l"(a), "l"(b), "r"(keep), "n"(A_COLUMNS), "n"(B_COLUMNS));
}
// The same with a in registers, rows and columns as in c
template <int N, int B_COLUMNS>
__device__ inline void tensor_product(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int keep) {
    if constexpr (N == 64)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                     "{" REGS_0 "}, {%32,%33,%34,%35}, %36, p, 1, 1, %38;\n}"
                     : C32(c, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(B_COLUMNS));
    else
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                     "{" REGS_0 REGS_32 "}, {%64,%65,%66,%67}, %68, p, 1, 1, %70;\n}"
                     : C32(c, 0), C32(c, 8)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(B_COLUMNS));
}

// c (64,N) = a (64,DH) · b (N,DH)^T: rows of a and b in tiles a_next and b_next numbers apart
template <int DH, int N>
__device__ inline void product_transposed(float (&c)[N / 8][4], const bf16 *a, int a_next, const bf16 *b, int b_next) {
#pragma unroll
    for (int k = 0; k < DH / 16; k++)
        tensor_product<N, 0, 0>(c, operand(a + k / 4 * a_next + k % 4 * 16), operand(b + k / 4 * b_next + k % 4 * 16), k > 0);
}
// c (64,N) += a (64,K) · b (K,N), a in registers
template <int N, int K>
__device__ inline void product_plain(float (&c)[N / 8][4], const uint32_t (&a)[K / 16][4], const bf16 *b) {
#pragma unroll
    for (int k = 0; k < K / 16; k++) tensor_product<N, 1>(c, a[k], operand(b + k * 16 * ATOM, K * ATOM * 2), 1);
}
// X(w) as a left operand
template <int K> __device__ inline void as_operand(uint32_t (&a)[K / 16][4], const float (&w)[K / 8][4]) {
#pragma unroll
    for (int k = 0; k < K / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) a[k][i] = pack_two(w[2 * k + i / 2][i % 2 * 2], w[2 * k + i / 2][i % 2 * 2 + 1]);
}
// A warp's 16 rows of a group's c (64,DH), times factor[0] (row lane/4) and [1] (+ 8), to memory: columns below d, rows
// below `rows`. tile: the group's rows of a tile that nobody reads any more, the next `next` numbers further.
template <int DH>
__device__ inline void store_rows(bf16 *at, int64_t ld, const float (&c)[DH / 8][4], int rows, int d, float factor0,
                                  float factor1, bf16 *tile, int next) {
    int lane = threadIdx.x % 32, first = threadIdx.x % GROUP / 32 * 16;
#pragma unroll
    for (int n = 0; n < DH / 8; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int r = first + half * 8 + lane / 4;
            *(uint32_t *)(tile + n / 8 * next + r * ATOM + (n % 8 ^ r % 8) * 8 + lane % 4 * 2) =
                pack_two(c[n][2 * half] * (half ? factor1 : factor0), c[n][2 * half + 1] * (half ? factor1 : factor0));
        }
    __syncwarp();
    for (int p = lane; p < 16 * DH / 8; p += 32) {
        int r = first + p / (DH / 8), n = p % (DH / 8);
        if (n * 8 < d && r < rows)
            *(uint4 *)(at + r * ld + n * 8) = *(const uint4 *)(tile + n / 8 * next + r * ATOM + (n % 8 ^ r % 8) * 8);
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
// a product whose result goes through a function of its own on the way to memory: f(V, b, p, r, i, v) is given the V sums v
// of row r, columns i .. i+V-1, of item p of sequence b, and writes what it makes of them.

// Numbers that a product reads: row r, column i of item p of sequence b is
// at[b·step + (row + p·row_along + r)·ld + (col + p·col_along) % wrap + i]; rows and cols are those of the whole.
struct PartPlace { int row, col, row_along, col_along, wrap; };
template <typename X> struct Part {
    const X *at;
    int64_t ld, step;
    int rows, cols;
    PartPlace place;
    MatrixGPU<X> item(int p) const {
        return {at + (place.row + p * place.row_along) * ld + (place.col + p * place.col_along) % place.wrap, ld, 1, step};
    }
};
template <typename X>
static Part<X> part_of(const X *at, int64_t ld, int64_t step, int rows, int cols, int row = 0, int col = 0) {
    return {at, ld, step, rows, cols, {row, col, 0, 0, INT_MAX}};
}
template <typename F> constexpr int sums_rows = 0;    // 1: f wants a maximum and a sum of each tile's rows besides
template <typename F> constexpr int sums_columns = 0; // 1: f wants the sums of each tile's columns besides
// What is known to be 0: A above the diagonal, A as it is multiplied (transposed) below it, B above it; OUT: nobody wants
// the result above it. The diagonal of A_LOWER and OUT_LOWER starts at column `shift`.
enum Triangle { FULL, A_LOWER, A_UPPER, B_LOWER, OUT_LOWER };

template <int BN> struct ProductShared {
    enum { STAGES = BN == 64 ? 4 : 3, PITCH = BN + 8 };
    union {
        struct { bf16 a[STAGES][2][ATOM][ATOM], b[STAGES][BN / ATOM][ATOM][ATOM]; };
        float sums[128][PITCH];
    };
    uint64_t full[STAGES], free[STAGES];
};

// A block takes 128 rows and BN columns of one item, its first and second four warps 64 rows each; the ninth warp has
// the operands copied, 64 of K at a time, three steps ahead. Two blocks share a multiprocessor: one multiplies while the
// other writes. Then the sums go through shared memory, and a thread has 8 neighbours of a row at a time. A_LOWER goes from the
// last sequence to the first: what the product before wrote last is still in the L2 cache.
template <int BN, int A_COLUMNS, int B_COLUMNS, int SHAPE, typename F>
__global__ void __launch_bounds__(2 * GROUP + 32, 2)
product_tiles_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map, PartPlace a,
                     PartPlace b, F f, int M, int N, int K, int shift, int items) {
#ifdef HOPPER
    typedef ProductShared<BN> Shared;
    enum { STAGES = Shared::STAGES };
    extern __shared__ __align__(1024) unsigned char shared_tiles[];
    Shared *s = (Shared *)shared_tiles;
    int m0 = (int)(SHAPE == A_LOWER ? gridDim.y - 1 - blockIdx.y : blockIdx.y) * 128, n0 = (int)blockIdx.x * BN,
        item = (int)blockIdx.z % items, sequence = (int)(SHAPE == A_LOWER ? gridDim.z - 1 - blockIdx.z : blockIdx.z) / items;
    int k0 = SHAPE == A_UPPER ? m0 : SHAPE == B_LOWER ? n0 : 0, k1 = SHAPE == A_LOWER ? min(K, shift + m0 + 128) : K,
        steps = max(0, (k1 - k0 + ATOM - 1) / ATOM);
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
            int slot = i % STAGES, k = k0 + i * ATOM;
            if (i >= STAGES) barrier_wait(&s->free[slot], i / STAGES - 1);
            barrier_expect(&s->full[slot], sizeof(s->a[0]) + sizeof(s->b[0]));
            for (int j = 0; j < 2; j++)
                copy_tile(s->a[slot][j][0], &a_map, a_col + (A_COLUMNS ? m0 + ATOM * j : k), 0,
                          a_row + (A_COLUMNS ? k : m0 + ATOM * j), sequence, &s->full[slot]);
            for (int j = 0; j < BN / ATOM; j++)
                copy_tile(s->b[slot][j][0], &b_map, b_col + (B_COLUMNS ? n0 + ATOM * j : k), 0,
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
                operand(s->b[slot][0][B_COLUMNS ? k * 16 : 0] + (B_COLUMNS ? 0 : k * 16), ATOM * ATOM * 2), i > 0 || k > 0);
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
            for (int other = BN / 8; other < 32; other *= 2) columns[e] += __shfl_xor_sync(~0u, columns[e], other);
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
// What follows cuBLASLt's product (B,M,N) where there are no tiles; NULL: a product over nothing. A thread takes V sums.
template <int V, typename F> __global__ void product_passed_on_kernel(F f, const float *product, int item, int B, int M,
                                                                      int N) {
    wait_for_results();
    int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (at >= (int64_t)B * M * N) return;
    float v[V] = {};
    if (product) read_some<V>(v, product + at);
    f(Known<V>(), (int)(at / N / M), item, (int)(at / N % M), (int)(at % N), v);
}

template <int A_COLUMNS, int B_COLUMNS, int SHAPE, int BN, typename F>
static void product_tiles(F f, Part<bf16> a, Part<bf16> b, int M, int N, int K, int shift, int items, int B,
                          cudaStream_t stream) {
    typedef ProductShared<BN> Shared;
    CUtensorMap a_map = tile_map(a.at, a.cols, 1, a.rows, a.ld, a.step, B, ATOM),
        b_map = tile_map(b.at, b.cols, 1, b.rows, b.ld, b.step, B, ATOM);
    auto kernel = product_tiles_kernel<BN, A_COLUMNS, B_COLUMNS, SHAPE, F>;
    dim3 blocks((N + BN - 1) / BN, (M + 127) / 128, B * items);
    int threads = 2 * GROUP + 32, bytes = sizeof(Shared);
    allow_shared(kernel, bytes);
    must_fit((int64_t)B * items, MOST_SEQUENCES, "items of a product");
    int ahead = BN == 64 || blocks.z > 1; // of one long sequence the large products lose by it: measured
    LAUNCH_AS(0, ahead, kernel, blocks, threads, bytes, stream, a_map, b_map, a.place, b.place, f, M, N, K, shift, items);
}
// What all products of a layer have in common. scratch: (B,M,N), NULL: there are tiles.
typedef struct { int B, in_eights; float *scratch; cudaStream_t stream; } ProductWay;
// f of A·B: A (M,K), or with A_COLUMNS its transpose (K,M); B (N,K) transposed, or with B_COLUMNS (K,N) as it is; for
// each of the items of all sequences.
template <int A_COLUMNS, int B_COLUMNS, int SHAPE, typename F, typename X>
static void product_gpu(F f, Part<X> a, Part<X> b, int M, int N, int K, int shift, int items, ProductWay way) {
    if (M <= 0) return;
    if constexpr (sizeof(X) == sizeof(bf16))
        if (!way.scratch) {
            int few = (int64_t)((M + 127) / 128) * ((N + 127) / 128) * way.B * items <= 80;
            auto tiles = few ? product_tiles<A_COLUMNS, B_COLUMNS, SHAPE, 64, F> : product_tiles<A_COLUMNS, B_COLUMNS, SHAPE, 128, F>;
            tiles(f, a, b, M, N, K, shift, items, way.B, way.stream);
            return;
        }
    for (int p = 0; p < items; p++) {
        MatrixGPU<X> left = a.item(p), right = b.item(p);
        if (K > 0) matmul_gpu(into(way.scratch, N, (int64_t)M * N), A_COLUMNS ? transpose_gpu(left) : left,
                              B_COLUMNS ? right : transpose_gpu(right), M, N, K, 1, 0, way.B, way.stream);
        int V = N % 8 || !way.in_eights ? 1 : 8;
        unsigned blocks = (unsigned)(((int64_t)way.B * M * N / V + 255) / 256);
        LAUNCH((V == 8 ? product_passed_on_kernel<8, F> : product_passed_on_kernel<1, F>), blocks, 256, 0, way.stream, f,
               K > 0 ? way.scratch : NULL, p, way.B, M, N);
    }
}

// ----------------------------------------------------------------------------
// attention in tiles: bf16 with heads of up to 128 columns. Weights never leave the registers; the backward pass
// computes them again from the row's log-sum-exp, once for dq and once for dk and dv, so that each sum has one owner.
//
// A block keeps 64 rows of one side for each of its groups of warps but the last, which has one thread at work: it has
// the other side's tiles copied into a ring of SLOTS, each as soon as all groups have done with what was there. A block a
// multiprocessor stays for many such pieces of work; the rows of the next one arrive, in the other of two places, while
// groups still work on this one.

// The block's next piece: its head, and as result its place among the head's `blocks` pieces, the longest first; -1: no more.
// Some heads at a time, whose keys and values stay in the L2 cache, take whole turns of all blocks; their pieces are in order
// of length, there and back, so that all blocks get as much.
[[maybe_unused]] __device__ static inline int next_piece(int &turn, int &head, int blocks, int heads, int at_once) {
    for (int turns = (blocks * at_once + gridDim.x - 1) / gridDim.x;; turn++) {
        int group = turn / turns, now = min(at_once, heads - group * at_once), backwards = (group + turn % turns) % 2,
            piece = turn % turns * gridDim.x + (backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        if (now <= 0) return -1;
        if (piece >= blocks * now) continue;
        turn++;
        head = group * at_once + piece % now;
        return piece / now;
    }
}
static int heads_at_once(int heads, int T, int d) { // 24 MiB of keys and values
    while (heads % 2 == 0 && (int64_t)heads * T * d > 6 << 20) heads /= 2;
    return heads;
}

// The rows stay, the walk is along the keys, 128 at a time; the ring holds K0 K1 V0 K2 V1 ..., for a group starts on the
// next tile's logits before it multiplies this tile's weights with the values, and works on the softmax meanwhile.
// stats: the logarithm of Σ exp in units of log2, and room for the backward pass.
enum { KEYS = 128, SLOTS = 5 };
template <int DH> struct ForwardShared {
    enum { GROUPS = DH == 64 ? 3 : 2, ROWS = 64 * GROUPS };
    bf16 q[2][DH / ATOM][ROWS][ATOM], ring[SLOTS][DH / ATOM][KEYS][ATOM];
    uint64_t q_full[2], q_free[2], full[SLOTS], free[SLOTS];
};
template <int DH>
__global__ void __launch_bounds__(GROUP * (ForwardShared<DH>::GROUPS + 1), 1)
attention_tile_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                      const __grid_constant__ CUtensorMap v_map, bf16 *out, float2 *stats, int B, int T, int H, int G, int d,
                      int first, int at_once, float scale) {
#ifdef HOPPER
    enum { GROUPS = ForwardShared<DH>::GROUPS, ROWS = 64 * GROUPS };
    extern __shared__ __align__(1024) unsigned char shared_tiles[];
    ForwardShared<DH> *s = (ForwardShared<DH> *)shared_tiles;
    int rows = T - first, group = threadIdx.x / GROUP, blocks = (rows + ROWS - 1) / ROWS, begun = 0, turn = 0, pieces = 0,
        piece, head;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) { barrier_init(&s->q_full[i], 1); barrier_init(&s->q_free[i], 4 * GROUPS); }
        for (int i = 0; i < SLOTS; i++) { barrier_init(&s->full[i], 1); barrier_init(&s->free[i], GROUPS); }
    }
    barriers_ready();
    wait_for_results(0);
    auto tiles_before = [&](int row) { return (first + row + KEYS - 1) / KEYS; };
    if (group == GROUPS) {
        KEEP_REGISTERS("dec", DH == 64 ? 32 : 40);
        if (threadIdx.x % GROUP) return;
        for (; (piece = next_piece(turn, head, blocks, B * H, at_once)) >= 0; pieces++) {
            int end = rows - piece * ROWS, r0 = end > ROWS ? end - ROWS : 0, b = head / H, h = head % H,
                tiles = tiles_before(end), own = pieces % 2;
            if (pieces > 1) barrier_wait(&s->q_free[own], pieces / 2 - 1);
            barrier_expect(&s->q_full[own], sizeof(s->q[0]));
            for (int c = 0; c < DH / ATOM; c++) copy_tile(s->q[own][c][0], &q_map, c * ATOM, h, r0, b, &s->q_full[own]);
            for (int n = 0; n < 2 * tiles; n++, begun++) {
                int slot = begun % SLOTS, is_key = n == 0 || (n % 2 && n < 2 * tiles - 1),
                    tile = is_key ? (n + 1) / 2 : n % 2 ? tiles - 1 : n / 2 - 1;
                if (begun >= SLOTS) barrier_wait(&s->free[slot], begun / SLOTS - 1);
                barrier_expect(&s->full[slot], sizeof(s->ring[slot]));
                for (int c = 0; c < DH / ATOM; c++)
                    copy_tile(s->ring[slot][c][0], is_key ? &k_map : &v_map, c * ATOM, h / (H / G), tile * KEYS, b,
                              &s->full[slot]);
            }
        }
        return;
    }
    KEEP_REGISTERS("inc", DH == 64 ? 160 : 232);
    int lane = threadIdx.x % 32, group_row, row;
    float sum[DH / 8][4], max[2], total[2], shrink[2];
    uint32_t weights[KEYS / 16][4];
    typedef float Logits[KEYS / 8][4];
    auto done_with = [&](int item) {
        if (threadIdx.x % GROUP == 0) barrier_arrive(&s->free[(begun + item) % SLOTS]);
    };
    auto logits = [&](Logits &w, int tile) {
        int item = begun + (tile ? 2 * tile - 1 : 0);
        barrier_wait(&s->full[item % SLOTS], item / SLOTS);
        products_begin();
        product_transposed<DH, KEYS>(w, s->q[pieces % 2][0][64 * group], ROWS * ATOM, s->ring[item % SLOTS][0][0], KEYS * ATOM);
        products_commit();
    };
    // logits to weights with the new maximum; shrink: what that does to what was summed
    auto softmax = [&](Logits &w, int tile) {
        int j0 = tile * KEYS;
        if (j0 + KEYS - 1 > first + group_row)
            for (int n = 0; n < KEYS / 8; n++)
                for (int e = 0; e < 4; e++)
                    if (j0 + n * 8 + lane % 4 * 2 + e % 2 > first + row + e / 2 * 8) w[n][e] = -INFINITY;
        for (int half = 0; half < 2; half++) {
            float top = -INFINITY;
            for (int n = 0; n < KEYS / 8; n++) top = fmaxf(top, fmaxf(w[n][2 * half], w[n][2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(max[half], scale * fmaxf(top, __shfl_xor_sync(~0u, top, 2)));
            shrink[half] = exp2_fast(max[half] - top);
            max[half] = top;
            total[half] *= shrink[half];
            for (int n = 0; n < KEYS / 8; n++)
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    w[n][e] = exp2_fast(w[n][e] * scale - top);
                    total[half] += w[n][e];
                }
        }
    };
    auto read = [&](int number) {
        int item = begun + number;
        barrier_wait(&s->full[item % SLOTS], item / SLOTS);
        products_begin();
        product_plain<DH, KEYS>(sum, weights, s->ring[item % SLOTS][0][0]);
        products_commit();
    };
    for (; (piece = next_piece(turn, head, blocks, B * H, at_once)) >= 0; pieces++) {
        int end = rows - piece * ROWS; // the piece is cut off the end: the short one sees least
        group_row = (end > ROWS ? end - ROWS : 0) + 64 * group;
        row = group_row + threadIdx.x % GROUP / 32 * 16 + lane / 4;
        int tiles = tiles_before(end), seen = min(tiles, tiles_before(group_row + 64)); // tiles that the group's rows see
        for (int half = 0; half < 2; half++) { max[half] = -INFINITY; total[half] = 0; }
        for (int n = 0; n < DH / 8; n++)
            for (int e = 0; e < 4; e++) sum[n][e] = 0;
        barrier_wait(&s->q_full[pieces % 2], pieces / 2);
        {
            Logits w;
            logits(w, 0);
            products_wait<0>();
            done_with(0);
            softmax(w, 0);
            as_operand<KEYS>(weights, w);
        }
        for (int tile = 1; tile < seen; tile++) {
            Logits w;
            logits(w, tile);
            read(2 * tile);
            products_wait<1>();
            done_with(2 * tile - 1);
            softmax(w, tile);
            products_wait<0>();
            done_with(2 * tile);
            for (int n = 0; n < DH / 8; n++)
                for (int e = 0; e < 4; e++) sum[n][e] *= shrink[e / 2];
            as_operand<KEYS>(weights, w);
        }
        int last = seen == tiles ? 2 * tiles - 1 : 2 * seen;
        read(last);
        products_wait<0>();
        done_with(last);
        for (int tile = seen; tile < tiles; tile++) // for the other groups
            for (int value = 0; value < 2; value++) {
                int item = !value ? 2 * tile - 1 : tile == tiles - 1 ? 2 * tiles - 1 : 2 * tile + 2;
                barrier_wait(&s->full[(begun + item) % SLOTS], (begun + item) / SLOTS);
                done_with(item);
            }
        for (int half = 0; half < 2; half++) {
            int r = row + half * 8;
            total[half] += __shfl_xor_sync(~0u, total[half], 1);
            total[half] += __shfl_xor_sync(~0u, total[half], 2);
            if (lane % 4 == 0 && r < end) stats[(int64_t)head * rows + r] = {max[half] + log2f(total[half]), 0};
        }
        group_barrier(group);
        store_rows<DH>(out + ((int64_t)(head / H) * rows + group_row) * H * d + head % H * d, H * d, sum, end - group_row, d,
                       1 / total[0], 1 / total[1], s->q[pieces % 2][0][64 * group], ROWS * ATOM);
        rows_stored(&s->q_free[pieces % 2]);
        begun += 2 * tiles;
    }
#endif
}

// stats' second number: delta_t = do_t·o_t = Σ_j p_tj dp_tj. 8 lanes take row n of one head.
__global__ static void attention_delta_kernel(float2 *stats, const bf16 *dout, const bf16 *out, int B, int T, int H,
                                              int d) {
    wait_for_results();
    int64_t item = (int64_t)(gridDim.x - 1 - blockIdx.x) * 32 + threadIdx.x / 8;
    float sum = 0;
    if (item < (int64_t)B * T * H)
        for (int i = threadIdx.x % 8 * 8; i < d; i += 64) {
            float v[8], w[8];
            read_some<8>(v, dout + item * d + i);
            read_some<8>(w, out + item * d + i);
            for (int e = 0; e < 8; e++) sum += v[e] * w[e];
        }
    for (int lane = 4; lane; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
    int n = (int)(item / H), h = (int)(item % H);
    if (item < (int64_t)B * T * H && threadIdx.x % 8 == 0) stats[((int64_t)(n / T) * H + h) * T + n % T].y = sum;
}

// dq: 128 rows stay, the walk is along the keys, WALK at a time; a slot of the ring holds keys and values. The groups
// take turns by themselves: one computes weights while the other multiplies.
template <int DH> struct BackwardShared { // dq: own are q and dout, ring keys and values; dk and dv the other way
    enum { WALK = DH == 64 ? 128 : 64, SLOTS = 3 };
    bf16 own[2][2][DH / ATOM][128][ATOM], ring[SLOTS][2][DH / ATOM][WALK][ATOM];
    float2 stats[SLOTS][WALK];
    uint64_t own_full[2], own_free[2], full[SLOTS], free[SLOTS];
};
template <int DH>
__global__ void __launch_bounds__(3 * GROUP, 1)
attention_dq_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap dout_map,
                    const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map, bf16 *dq,
                    const float2 *stats, int ld, int B, int T, int H, int G, int d, int at_once, float scale, float sigma) {
#ifdef HOPPER
    typedef BackwardShared<DH> Shared;
    enum { WALK = Shared::WALK, SLOTS = Shared::SLOTS, NEXT = WALK * ATOM };
    extern __shared__ __align__(1024) unsigned char shared_tiles[];
    Shared *s = (Shared *)shared_tiles;
    int group = threadIdx.x / GROUP, blocks = (T + 127) / 128, begun = 0, turn = 0, pieces = 0, piece, head;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) { barrier_init(&s->own_full[i], 1); barrier_init(&s->own_free[i], 8); }
        for (int i = 0; i < SLOTS; i++) { barrier_init(&s->full[i], 1); barrier_init(&s->free[i], 2); }
    }
    barriers_ready();
    wait_for_results(0);
    auto tiles_of = [&](int r0) { return (min(r0 + 128, T) + WALK - 1) / WALK; };
    if (group == 2) {
        KEEP_REGISTERS("dec", 40);
        if (threadIdx.x % GROUP) return;
        for (; (piece = next_piece(turn, head, blocks, B * H, at_once)) >= 0; pieces++) {
            int r0 = (blocks - 1 - piece) * 128, b = head / H, h = head % H, tiles = tiles_of(r0), own = pieces % 2;
            if (pieces > 1) barrier_wait(&s->own_free[own], pieces / 2 - 1);
            barrier_expect(&s->own_full[own], sizeof(s->own[0]));
            for (int c = 0; c < DH / ATOM; c++) {
                copy_tile(s->own[own][0][c][0], &q_map, c * ATOM, h, r0, b, &s->own_full[own]);
                copy_tile(s->own[own][1][c][0], &dout_map, c * ATOM, h, r0, b, &s->own_full[own]);
            }
            for (int n = 0; n < tiles; n++, begun++) {
                int slot = begun % SLOTS;
                if (begun >= SLOTS) barrier_wait(&s->free[slot], begun / SLOTS - 1);
                barrier_expect(&s->full[slot], sizeof(s->ring[slot]));
                for (int c = 0; c < DH / ATOM; c++) {
                    copy_tile(s->ring[slot][0][c][0], &k_map, c * ATOM, h / (H / G), n * WALK, b, &s->full[slot]);
                    copy_tile(s->ring[slot][1][c][0], &v_map, c * ATOM, h / (H / G), n * WALK, b, &s->full[slot]);
                }
            }
        }
        return;
    }
    KEEP_REGISTERS("inc", 232);
    int lane = threadIdx.x % 32;
    for (; (piece = next_piece(turn, head, blocks, B * H, at_once)) >= 0; pieces++) {
        int r0 = (blocks - 1 - piece) * 128, tiles = tiles_of(r0), group_row = r0 + 64 * group,
            row = group_row + threadIdx.x % GROUP / 32 * 16 + lane / 4;
        bf16 *own = s->own[pieces % 2][0][0][64 * group], *own_dout = s->own[pieces % 2][1][0][64 * group];
        float sum[DH / 8][4];
        uint32_t dlogits[WALK / 16][4];
        float2 known[2];
        for (int half = 0; half < 2; half++) known[half] = stats[(int64_t)head * T + min(row + half * 8, T - 1)];
        for (int n = 0; n < DH / 8; n++)
            for (int e = 0; e < 4; e++) sum[n][e] = 0;
        barrier_wait(&s->own_full[pieces % 2], pieces / 2);
        for (int tile = 0; tile < tiles; tile++, begun++) {
            int slot = begun % SLOTS, j0 = tile * WALK;
            barrier_wait(&s->full[slot], begun / SLOTS);
            const bf16 *keys = s->ring[slot][0][0][0], *values = s->ring[slot][1][0][0];
            float w[WALK / 8][4], dw[WALK / 8][4];
            products_begin();
            product_transposed<DH, WALK>(w, own, 128 * ATOM, keys, NEXT);
            products_commit();
            product_transposed<DH, WALK>(dw, own_dout, 128 * ATOM, values, NEXT);
            products_commit();
            products_wait<1>();
            if (tile && threadIdx.x % GROUP == 0) barrier_arrive(&s->free[(begun - 1) % SLOTS]);
            int masked = j0 + WALK - 1 > group_row;
            for (int n = 0; n < WALK / 8; n++)
                for (int e = 0; e < 4; e++) {
                    w[n][e] = exp2_fast(w[n][e] * scale - known[e / 2].x);
                    if (masked && j0 + n * 8 + lane % 4 * 2 + e % 2 > row + e / 2 * 8) w[n][e] = 0;
                }
            products_wait<0>();
            for (int n = 0; n < WALK / 8; n++)
                for (int e = 0; e < 4; e++) w[n][e] *= dw[n][e] - known[e / 2].y;
            as_operand<WALK>(dlogits, w);
            products_begin();
            product_plain<DH, WALK>(sum, dlogits, keys);
            products_commit();
        }
        products_wait<0>();
        group_barrier(group);
        if (threadIdx.x % GROUP == 0) barrier_arrive(&s->free[(begun - 1) % SLOTS]);
        store_rows<DH>(dq + ((int64_t)(head / H) * T + group_row) * ld + head % H * d, ld, sum, T - group_row, d, sigma, sigma, own,
                       128 * ATOM);
        rows_stored(&s->own_free[pieces % 2]);
    }
#endif
}

// A step of dk and dv. The matrices are those above transposed: keys down, rows across. A group has 64 keys and their values, a
// tile of WALK rows from r0 on: dv += w dout, and dlogits as left operand. free: the last step's tiles, if not NULL, whose
// products were still on their way.
template <int DH, int WALK>
__device__ inline void keys_step(float (&v_sum)[DH / 8][4], uint32_t (&dlogits)[WALK / 16][4], const bf16 *keys,
                                 const bf16 *values, const bf16 *queries, const bf16 *douts, const float2 *stats, int key,
                                 int r0, int masked, float scale, uint64_t *free) {
    enum { NEXT = WALK * ATOM };
    int lane = threadIdx.x % 32;
    float w[WALK / 8][4], dw[WALK / 8][4];
    products_begin();
    product_transposed<DH, WALK>(w, keys, 128 * ATOM, queries, NEXT);
    products_commit();
    products_wait<1>();
    if (free && threadIdx.x % GROUP == 0) barrier_arrive(free);
    products_begin();
    product_transposed<DH, WALK>(dw, values, 128 * ATOM, douts, NEXT);
    products_commit();
    products_wait<1>();
    for (int n = 0; n < WALK / 8; n++) {
        float4 rows = *(const float4 *)&stats[n * 8 + lane % 4 * 2];
        for (int e = 0; e < 4; e++) {
            w[n][e] = exp2_fast(w[n][e] * scale - (e % 2 ? rows.z : rows.x));
            if (masked && key + e / 2 * 8 > r0 + n * 8 + lane % 4 * 2 + e % 2) w[n][e] = 0;
        }
    }
    as_operand<WALK>(dlogits, w);
    products_begin();
    product_plain<DH, WALK>(v_sum, dlogits, douts);
    products_commit();
    products_wait<0>();
    for (int n = 0; n < WALK / 8; n++) { // the weights become the gradients of the logits
        float4 rows = *(const float4 *)&stats[n * 8 + lane % 4 * 2];
        for (int half = 0; half < 2; half++) {
            uint32_t *two = &dlogits[n / 2][n % 2 * 2 + half];
            *two = pack_two(__uint_as_float(*two << 16) * (dw[n][2 * half] - rows.y),
                            __uint_as_float(*two & 0xFFFF0000u) * (dw[n][2 * half + 1] - rows.w));
        }
    }
}

// dk and dv: 128 keys stay, the walk is along the rows of the group's heads that see them.
template <int DH>
__global__ void __launch_bounds__(3 * GROUP, 1)
attention_dkv_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap dout_map,
                     const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map, bf16 *dk,
                     bf16 *dv, const float2 *stats, int ld, int B, int T, int H, int G, int d, int at_once, float scale, float sigma) {
#ifdef HOPPER
    typedef BackwardShared<DH> Shared;
    enum { WALK = Shared::WALK, SLOTS = Shared::SLOTS };
    extern __shared__ __align__(1024) unsigned char shared_tiles[];
    Shared *s = (Shared *)shared_tiles;
    int group = threadIdx.x / GROUP, heads = H / G, blocks = (T + 127) / 128, begun = 0, turn = 0, pieces = 0, piece, head;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) { barrier_init(&s->own_full[i], 1); barrier_init(&s->own_free[i], 8); }
        for (int i = 0; i < SLOTS; i++) { barrier_init(&s->full[i], 32); barrier_init(&s->free[i], 2); }
    }
    barriers_ready();
    wait_for_results(0);
    auto tiles_of = [&](int j0) { return (T - j0 + WALK - 1) / WALK; };
    if (group == 2) {
        KEEP_REGISTERS("dec", 40);
        int lane = threadIdx.x % GROUP;
        if (lane >= 32) return;
        for (; (piece = next_piece(turn, head, blocks, B * G, at_once)) >= 0; pieces++) {
            int j0 = piece * 128, b = head / G, g = head % G, tiles = tiles_of(j0), own = pieces % 2;
            if (pieces > 1) barrier_wait(&s->own_free[own], pieces / 2 - 1);
            if (lane == 0) {
                barrier_expect(&s->own_full[own], sizeof(s->own[0]));
                for (int c = 0; c < DH / ATOM; c++) {
                    copy_tile(s->own[own][0][c][0], &k_map, c * ATOM, g, j0, b, &s->own_full[own]);
                    copy_tile(s->own[own][1][c][0], &v_map, c * ATOM, g, j0, b, &s->own_full[own]);
                }
            }
            for (int n = 0; n < heads * tiles; n++, begun++) {
                int slot = begun % SLOTS, h = g * heads + n / tiles, r0 = j0 + n % tiles * WALK;
                if (begun >= SLOTS) barrier_wait(&s->free[slot], begun / SLOTS - 1);
                for (int r = lane; r < WALK; r += 32) { // a row past the end has weights of 0
                    float2 known = {INFINITY, 0};
                    s->stats[slot][r] = r0 + r < T ? stats[((int64_t)b * H + h) * T + r0 + r] : known;
                }
                if (lane) { barrier_arrive(&s->full[slot]); continue; }
                barrier_expect(&s->full[slot], sizeof(s->ring[slot]));
                for (int c = 0; c < DH / ATOM; c++) {
                    copy_tile(s->ring[slot][0][c][0], &q_map, c * ATOM, h, r0, b, &s->full[slot]);
                    copy_tile(s->ring[slot][1][c][0], &dout_map, c * ATOM, h, r0, b, &s->full[slot]);
                }
            }
        }
        return;
    }
    KEEP_REGISTERS("inc", 232);
    int lane = threadIdx.x % 32;
    for (; (piece = next_piece(turn, head, blocks, B * G, at_once)) >= 0; pieces++) {
        int j0 = piece * 128, b = head / G, g = head % G, tiles = tiles_of(j0),
            key = j0 + 64 * group + threadIdx.x % GROUP / 32 * 16 + lane / 4;
        bf16 *own = s->own[pieces % 2][0][0][64 * group], *own_v = s->own[pieces % 2][1][0][64 * group];
        float k_sum[DH / 8][4], v_sum[DH / 8][4];
        uint32_t dlogits[WALK / 16][4];
        for (int n = 0; n < DH / 8; n++)
            for (int e = 0; e < 4; e++) k_sum[n][e] = v_sum[n][e] = 0;
        barrier_wait(&s->own_full[pieces % 2], pieces / 2);
        for (int step = 0; step < heads * tiles; step++, begun++) {
            int slot = begun % SLOTS, r0 = j0 + step % tiles * WALK, masked = r0 < j0 + 64 * group + 63;
            const bf16 *queries = s->ring[slot][0][0][0];
            barrier_wait(&s->full[slot], begun / SLOTS);
            keys_step<DH, WALK>(v_sum, dlogits, own, own_v, queries, s->ring[slot][1][0][0], s->stats[slot], key, r0, masked, scale,
                                step ? &s->free[(begun - 1) % SLOTS] : NULL);
            products_begin();
            product_plain<DH, WALK>(k_sum, dlogits, queries);
            products_commit();
        }
        products_wait<0>();
        group_barrier(group);
        if (threadIdx.x % GROUP == 0) barrier_arrive(&s->free[(begun - 1) % SLOTS]);
        int64_t place = ((int64_t)b * T + j0 + 64 * group) * ld + g * d;
        store_rows<DH>(dk + place, ld, k_sum, T - j0 - 64 * group, d, sigma, sigma, own, 128 * ATOM);
        store_rows<DH>(dv + place, ld, v_sum, T - j0 - 64 * group, d, 1, 1, own_v, 128 * ATOM);
        rows_stored(&s->own_free[pieces % 2]);
    }
#endif
}

// dq, dk and dv of sequences of up to 1024 rows, heads of up to 64 columns, each with keys of its own: 5 products where the two
// kernels above need 7. A cluster of C blocks, one for each 128 keys, takes heads in pairs. Block `rank` has
//     of the first head the keys of block rank, which meet the tiles of 128 rows rank, rank+1, .. C-1,
//     of the second those of block C-1-rank, which meet the tiles C-1, C-2, .. C-1-rank:
// C+1 tiles, as many as every other, and at no time two blocks the same one. So a tile's dq goes round: block rank+1 passes what
// it has summed to block rank, whose next tile that is, there to the second group, and this to the first, each thread to the
// thread of its number. Where the tile has met all its keys the first group writes dq. Each sum has one order.
struct RingShared {
    enum { SLOTS = 2 };
    bf16 own[2][2][128][ATOM], ring[SLOTS][2][128][ATOM], dlogits[2][2][64][ATOM]; // own: keys and values of both heads
    float4 sums[2][16][GROUP];                                                     // that came for each group
    float2 stats[SLOTS][128];
    uint64_t own_full[2], own_free[2], full[SLOTS], free[SLOTS], sums_full[2], sums_free[2];
};
__global__ void __launch_bounds__(3 * GROUP, 1)
attention_ring_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap dout_map,
                      const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map, bf16 *dq, bf16 *dk,
                      bf16 *dv, const float2 *stats, int ld, int B, int T, int H, int d, float scale, float sigma) {
#ifdef HOPPER
    enum { SLOTS = RingShared::SLOTS, BYTES = sizeof(float4) * 16 * GROUP };
    extern __shared__ __align__(1024) unsigned char shared_tiles[];
    RingShared *s = (RingShared *)shared_tiles;
    int group = threadIdx.x / GROUP, C = (T + 127) / 128, rank = blockIdx.x % C, clusters = gridDim.x / C, begun = 0, turn = 0;
    if (threadIdx.x == 0)
        for (int i = 0; i < 2; i++) { // of the second group's sums the bytes are counted, of the first's the four warps
            barrier_init(&s->own_full[i], 1);
            barrier_init(&s->own_free[i], 8);
            barrier_init(&s->full[i], 32);
            barrier_init(&s->free[i], 2);
            barrier_init(&s->sums_full[i], i ? 1 : 4);
            barrier_init(&s->sums_free[i], 4);
        }
    barriers_ready();
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" : : : "memory");
    wait_for_results(0);
    auto first_key = [&](int second) { return 128 * (second ? C - 1 - rank : rank); };
    auto first_row = [&](int second, int step) { return 128 * (second ? C - 1 - step : rank + step); };
    auto steps_of = [&](int second) { return second ? rank + 1 : C - rank; };
    if (group == 2) {
        KEEP_REGISTERS("dec", 40);
        int lane = threadIdx.x % GROUP;
        for (int head = 2 * (blockIdx.x / C); lane < 32 && head < B * H; head += turn % 2 ? 2 * clusters - 1 : 1, turn++) {
            int second = turn % 2, j0 = first_key(second), b = head / H, h = head % H;
            if (turn > 1) barrier_wait(&s->own_free[second], turn / 2 - 1);
            if (lane == 0) {
                barrier_expect(&s->own_full[second], sizeof(s->own[0]));
                copy_tile(s->own[second][0][0], &k_map, 0, h, j0, b, &s->own_full[second]);
                copy_tile(s->own[second][1][0], &v_map, 0, h, j0, b, &s->own_full[second]);
            }
            for (int step = 0; step < steps_of(second); step++, begun++) {
                int slot = begun % SLOTS, r0 = first_row(second, step);
                if (begun >= SLOTS) barrier_wait(&s->free[slot], begun / SLOTS - 1);
                for (int r = lane; r < 128; r += 32) { // a row past the end has weights of 0
                    float2 known = {INFINITY, 0};
                    s->stats[slot][r] = r0 + r < T ? stats[(int64_t)head * T + r0 + r] : known;
                }
                if (lane) { barrier_arrive(&s->full[slot]); continue; }
                barrier_expect(&s->full[slot], sizeof(s->ring[slot]));
                copy_tile(s->ring[slot][0][0], &q_map, 0, h, r0, b, &s->full[slot]);
                copy_tile(s->ring[slot][1][0], &dout_map, 0, h, r0, b, &s->full[slot]);
            }
        }
    } else {
        KEEP_REGISTERS("inc", 232);
        int lane = threadIdx.x % 32, thread = threadIdx.x % GROUP, first = thread / 32 * 16 + lane / 4, received = 0, sent = 0;
        for (int head = 2 * (blockIdx.x / C); head < B * H; head += turn % 2 ? 2 * clusters - 1 : 1, turn++) {
            int second = turn % 2, j0 = first_key(second) + 64 * group, b = head / H, h = head % H, steps = steps_of(second);
            bf16 *own = s->own[second][0][64 * group], *own_v = s->own[second][1][64 * group];
            float k_sum[8][4], v_sum[8][4];
            for (int n = 0; n < 8; n++)
                for (int e = 0; e < 4; e++) k_sum[n][e] = v_sum[n][e] = 0;
            barrier_wait(&s->own_full[second], turn / 2);
            for (int step = 0; step < steps; step++, begun++) {
                int slot = begun % SLOTS, r0 = first_row(second, step);
                uint32_t dlogits[8][4];
                barrier_wait(&s->full[slot], begun / SLOTS);
                keys_step<64, 128>(v_sum, dlogits, own, own_v, s->ring[slot][0][0], s->ring[slot][1][0], s->stats[slot],
                                   j0 + first, r0, r0 < j0 + 63, scale, NULL);
                for (int n = 0; n < 16; n++)
                    for (int half = 0; half < 2; half++) {
                        int r = first + half * 8, i = (n % 8 ^ r % 8) * 8 + lane % 4 * 2;
                        *(uint32_t *)&s->dlogits[group][n / 8][r][i] = dlogits[n / 2][n % 2 * 2 + half];
                    }
                products_begin();
                product_plain<64, 128>(k_sum, dlogits, s->ring[slot][0][0]);
                products_commit();
                asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
                float sum[2][8][4] = {};
                if (group == 0 || (second ? rank < C - 1 : step > 0)) {
                    if (threadIdx.x == GROUP) barrier_expect(&s->sums_full[1], BYTES);
                    barrier_wait(&s->sums_full[group], received++);
                    for (int i = 0; i < 16; i++) *(float4 *)sum[i / 8][i % 8] = s->sums[group][i][thread];
                    __syncwarp();
                    if (lane == 0 && group == 0) barrier_arrive(&s->sums_free[0]);
                    if (lane == 0 && group == 1) barrier_arrive_at(&s->sums_free[1], rank + 1);
                }
                group_barrier(group);
                products_begin();
                for (int half = 0; half < 2; half++)
                    for (int k = 0; k < 4; k++)
                        tensor_product<64, 1, 1>(sum[half], operand(s->dlogits[group][half][k * 16]),
                                                 operand(own + k * 16 * ATOM), 1);
                products_commit();
                products_wait<0>();
                group_barrier(group); // nobody reads the gradients of the logits any more
                if (thread == 0) barrier_arrive(&s->free[slot]);
                if (group == 0 && (second ? step == rank : rank == 0)) {
                    for (int half = 0; half < 2; half++)
                        store_rows<64>(dq + ((int64_t)b * T + r0 + 64 * half) * ld + h * d, ld, sum[half], T - r0 - 64 * half, d,
                                       sigma, sigma, s->dlogits[0][half][0], 0);
                    continue;
                }
                if (sent) barrier_wait(&s->sums_free[1 - group], sent - 1);
                sent++;
                for (int i = 0; i < 16; i++) {
                    float4 four = *(float4 *)sum[i / 8][i % 8], *to = &s->sums[1 - group][i][thread];
                    if (group) *to = four;
                    else store_at(to, four, &s->sums_full[1], rank - 1);
                }
                __syncwarp();
                if (group && lane == 0) barrier_arrive(&s->sums_full[0]);
            }
            int64_t place = ((int64_t)b * T + j0) * ld + h * d;
            store_rows<64>(dk + place, ld, k_sum, T - j0, d, sigma, sigma, own, 0);
            store_rows<64>(dv + place, ld, v_sum, T - j0, d, 1, 1, own_v, 0);
            rows_stored(&s->own_free[second]);
        }
    }
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" : : : "memory"); // nobody needs this block's memory any more
#endif
}

static int in_ring(int T, int H, int G) { return gpu.clusters && T <= 1024 && H == G; }
// How many clusters of C blocks the GPU takes at once.
template <typename K> static int clusters_at_once(K *kernel, int C, int bytes) {
    int most = 0;
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = launch_config(attributes, C, 3 * GROUP, bytes, gpu.stream, C, 1);
    allow_shared(kernel, bytes);
    if (cudaOccupancyMaxActiveClusters(&most, kernel, &config) == cudaSuccess) return most;
    cudaGetLastError();
    return 0;
}

template <int DH>
static void attention_tiles(bf16 *out, float *stats, const bf16 *q, const bf16 *k, const bf16 *v, int ld, int B, int T,
                            int H, int G, int d, int first, cudaStream_t stream) {
    typedef ForwardShared<DH> Shared;
    int64_t rows = T - first, all = (int64_t)T * ld;
    CUtensorMap q_map = tile_map(q, d, H, rows, ld, rows * ld, B, Shared::ROWS),
        k_map = tile_map(k, d, G, T, ld, all, B, KEYS), v_map = tile_map(v, d, G, T, ld, all, B, KEYS);
    allow_shared(attention_tile_kernel<DH>, sizeof(Shared));
    LAUNCH(attention_tile_kernel<DH>, gpu.processors, GROUP * (Shared::GROUPS + 1), sizeof(Shared), stream,
           q_map, k_map, v_map, out, (float2 *)stats, B, T, H, G, d, first, heads_at_once(B * H, T, DH),
           1.44269504f / sqrtf((float)d));
}

template <int DH>
static void attention_tiles_backward(bf16 *dq, bf16 *dk, bf16 *dv, const bf16 *dout, const bf16 *out, float2 *stats,
                                     const bf16 *q, const bf16 *k, const bf16 *v, int ld, int B, int T, int H, int G,
                                     int d, cudaStream_t stream) {
    typedef BackwardShared<DH> Shared;
    float sigma = 1 / sqrtf((float)d), scale = 1.44269504f * sigma;
    int64_t all = (int64_t)T * ld, D = (int64_t)H * d;
    CUtensorMap maps[2][4]; // q, dout, k, v: those that stay by 128 rows, those that walk by fewer
    for (int own = 0; own < 2; own++) {
        int rows = own ? 128 : Shared::WALK, keys = own ? Shared::WALK : 128;
        maps[own][0] = tile_map(q, d, H, T, ld, all, B, rows);
        maps[own][1] = tile_map(dout, d, H, T, D, T * D, B, rows);
        maps[own][2] = tile_map(k, d, G, T, ld, all, B, keys);
        maps[own][3] = tile_map(v, d, G, T, ld, all, B, keys);
    }
    allow_shared(attention_dq_kernel<DH>, sizeof(Shared));
    allow_shared(attention_dkv_kernel<DH>, sizeof(Shared));
    LAUNCH(attention_delta_kernel, (unsigned)(((int64_t)B * T * H + 31) / 32), 256, 0, stream, stats, dout, out, B, T, H,
           d);
    if (DH == 64 && in_ring(T, H, G)) {
        int C = (T + 127) / 128, bytes = sizeof(RingShared), most = clusters_at_once(attention_ring_kernel, C, bytes);
        LAUNCH_AS(C, 1, attention_ring_kernel, C * min_int(most, (B * H + 1) / 2), 3 * GROUP, bytes, stream,
                  maps[0][0], maps[0][1], maps[0][2], maps[0][3], dq, dk, dv, stats, ld, B, T, H, d, scale, sigma);
        return;
    }
    LAUNCH(attention_dq_kernel<DH>, gpu.processors, 3 * GROUP, sizeof(Shared), stream, maps[1][0], maps[1][1], maps[1][2],
           maps[1][3], dq, stats, ld, B, T, H, G, d, heads_at_once(B * H, T, DH), scale, sigma);
    LAUNCH(attention_dkv_kernel<DH>, gpu.processors, 3 * GROUP, sizeof(Shared), stream, maps[0][0], maps[0][1], maps[0][2],
           maps[0][3], dk, dv, stats, ld, B, T, H, G, d, heads_at_once(B * G, T, DH), scale, sigma);
}

// ----------------------------------------------------------------------------
// attention in panels: float32, and whatever the tiles do not take

// Several heads are one batched product: the same head of all sequences, or all heads of one that is short.
typedef struct Heads {
    int items, batch, by_head; // by_head: an item is a head, the batch its sequences; else the other way
    int64_t step(int64_t sequence, int64_t head) const { return by_head ? sequence : head; }
} Heads;

// How attention goes, for all batches of up to B sequences of up to T tokens: in tiles, or in panels of P rows. P
// asked for, 0: 128 MiB of weights, but 16 rows at least.
typedef struct {
    int tiles, by_head, P;
    int64_t scratch; // numbers: weights and their gradient
} AttentionWay;
template <typename X> static AttentionWay attention_way(int B, int T, int H, int G, int d, int ld, int P) {
    AttentionWay way = {gpu.hopper && sizeof(X) == sizeof(bf16) && d <= 128 && d % 8 == 0 && ld % 8 == 0,
                        B >= H || G != H || T > 1024, 0, 0};
    int batch = way.by_head ? B : H;
    int64_t lw = round_up(T, 64), height = (32 << 20) / (batch * lw);
    way.P = min_int(P > 0 ? P : height < 16 ? 16 : height > T ? T : (int)height, T);
    way.scratch = way.tiles ? 0 : 2 * (int64_t)batch * way.P * lw;
    return way;
}
static Heads heads_of(const AttentionWay *way, int B, int H) {
    return {way->by_head ? H : B, way->by_head ? B : H, way->by_head};
}
static float *attention_scratch(const AttentionWay *way, Heads heads, int T, Scratch scratch) {
    return borrow(scratch, 2 * (int64_t)heads.batch * way->P * round_up(T, 64));
}

// attention_head of a batch of heads.
template <typename X>
static void attention_head_gpu(int item, Heads heads, X *out, float *stats, float *weights, const X *q, const X *k, const X *v,
                               int ld, int T, int H, int G, int d, int first, int P, cudaStream_t stream) {
    int h = heads.by_head ? item : 0, b = heads.by_head ? 0 : item, D = H * d;
    int64_t rows = T - first, all = (int64_t)T * ld, kv = b * all + h / (H / G) * d, kv_step = heads.step(all, d),
        lw = round_up(T, 64), panel = P * lw;
    for (int i0 = first; i0 < T; i0 += P) {
        int n = min_int(P, T - i0);
        int64_t row = b * rows + i0 - first, of_head = (b * H + h) * rows + i0 - first;
        matmul_gpu(into(weights, lw, panel), rows_of_gpu(q + row * ld + h * d, ld, heads.step(rows * ld, d)),
                   transpose_gpu(rows_of_gpu(k + kv, ld, kv_step)), n, i0 + n, d, 1 / sqrtf((float)d), 0, heads.batch, stream);
        softmax_panel_gpu<X>(weights, lw, panel, stats + 2 * of_head, heads.step(2 * H * rows, 2 * rows), 0, 1, i0, n, P, 0,
                             heads.batch, stream);
        matmul_gpu(into(out + row * D + h * d, D, heads.step(rows * D, d)), rows_of_gpu((const X *)weights, ld_x<X>(lw),
                   ld_x<X>(panel)), rows_of_gpu(v + kv, ld, kv_step), n, d, i0 + n, 1, 0, heads.batch, stream);
    }
}

template <typename X>
static void attention_forward_gpu(X *out, float *stats, Scratch scratch, const X *q, const X *k, const X *v, int ld,
                                  int B, int T, int H, int G, int d, int first, const AttentionWay *way,
                                  cudaStream_t stream) {
    if constexpr (sizeof(X) == sizeof(bf16))
        if (way->tiles) {
            auto tiles = d <= 64 ? attention_tiles<64> : attention_tiles<128>;
            tiles(out, stats, q, k, v, ld, B, T, H, G, d, first, stream);
            return;
        }
    Heads heads = heads_of(way, B, H);
    float *weights = attention_scratch(way, heads, T, scratch);
    for (int item = 0; item < heads.items; item++)
        attention_head_gpu(item, heads, out, stats, weights, q, k, v, ld, T, H, G, d, first, way->P, stream);
}

// attention_group_backward of a batch of heads: the first head of a group writes dk and dv, the others add.
template <typename X>
static void attention_group_backward_gpu(int item, Heads heads, X *dq, X *dk, X *dv, float *scratch, const X *dout, float *stats,
                                         const X *q, const X *k, const X *v, int ld, int T, int H, int G, int d, int P,
                                         cudaStream_t stream) {
    int h = heads.by_head ? item : 0, b = heads.by_head ? 0 : item, D = H * d, batch = heads.batch;
    int64_t all = (int64_t)T * ld, kv = b * all + h / (H / G) * d, step = heads.step(all, d), lw = round_up(T, 64), panel = P * lw;
    float scale = 1 / sqrtf((float)d), *weights = scratch, *dlogits = scratch + batch * panel;
    MatrixGPU<X> k_h = rows_of_gpu(k + kv, ld, step), v_h = rows_of_gpu(v + kv, ld, step),
        w = rows_of_gpu((const X *)weights, ld_x<X>(lw), ld_x<X>(panel)),
        dl = rows_of_gpu((const X *)dlogits, ld_x<X>(lw), ld_x<X>(panel));
    for (int i0 = (T - 1) / P * P; i0 >= 0; i0 -= P) {
        int n = min_int(P, T - i0), cols = i0 + n;
        float beta = h % (H / G) == 0 && cols == T ? 0 : 1;
        int64_t row = (int64_t)b * T + i0, of_head = (int64_t)(b * H + h) * T + i0;
        MatrixGPU<X> q_I = rows_of_gpu(q + row * ld + h * d, ld, step),
            dout_I = rows_of_gpu(dout + row * D + h * d, D, heads.step((int64_t)T * D, d));
        matmul_gpu(into(weights, lw, panel), q_I, transpose_gpu(k_h), n, cols, d, scale, 0, batch, stream);
        softmax_panel_gpu<X>(weights, lw, panel, stats + 2 * of_head, heads.step(2 * (int64_t)H * T, 2 * T), 1, 1, i0, n, P, 0,
                             batch, stream);
        matmul_gpu(into(dlogits, lw, panel), dout_I, transpose_gpu(v_h), n, cols, d, 1, 0, batch, stream);
        softmax_panel_backward_gpu<X>(dlogits, weights, lw, panel, i0, n, P, batch, stream);
        matmul_gpu(into(dq + row * ld + h * d, ld, step), dl, k_h, n, d, cols, scale, 0, batch, stream);
        matmul_gpu(into(dk + kv, ld, step), transpose_gpu(dl), q_I, cols, d, n, scale, beta, batch, stream);
        matmul_gpu(into(dv + kv, ld, step), transpose_gpu(w), dout_I, cols, d, n, 1, beta, batch, stream);
    }
}

// out: what the forward pass gave, for the tiles' delta. dbias, unless NULL: dq, dk, dv, which follow each other, are taken on
// through RoPE, and their sums over the rows added to it.
template <typename X>
static void attention_backward_gpu(X *dq, X *dk, X *dv, float *dbias, Scratch scratch, const X *dout, const X *out,
                                   float *stats, const X *q, const X *k, const X *v, int ld, int B, int T, int H,
                                   int G, int d, const AttentionWay *way, Rope rope, ColumnSums *sums,
                                   cudaStream_t stream) {
    int width = (H + 2 * G) * d;
    if constexpr (sizeof(X) == sizeof(bf16))
        if (way->tiles) {
            auto tiles = d <= 64 ? attention_tiles_backward<64> : attention_tiles_backward<128>;
            tiles(dq, dk, dv, dout, out, (float2 *)stats, q, k, v, ld, B, T, H, G, d, stream);
        }
    if (!way->tiles) {
        Heads heads = heads_of(way, B, H);
        float *both = attention_scratch(way, heads, T, scratch);
        for (int item = 0; item < heads.items; item++)
            attention_group_backward_gpu(item, heads, dq, dk, dv, both, dout, stats, q, k, v, ld, T, H, G, d,
                                         way->P, stream);
    }
    if (dbias) rope_backward_gpu(dq, dbias, ld, rope, B * T, (H + G) * d, width, sums, stream);
}

// ----------------------------------------------------------------------------
// the feedback path
//
// In row panels of R rows, whose weights e (the softmax's, see above) lie in `weights`, and within them in blocks of P
// rows, whose inverses M = (I - A_II)^-1 turn the row by row step into products. α = e/z is never formed: γ/z is a
// float32 scale of rows, for in bf16 a γα of 0.999 would be 1. For a block I
//     g = f + (γ/z) ⊙ (e_{I,<} s_<),   s = M g,   then one refinement: r = g + (γ/z) ⊙ (e_II s) - s,   s += M r
// so that what rounding does to M and g costs nothing but a smaller step towards the same s. Kept besides s:
// c = (e s)/z, for the backward pass' δ_t = λ_t·c_t.
//
// With tiles, bf16 on Hopper, each line above is one product that ends in the functions below, and e comes out of the
// logits' product: e = exp(logit - m) needs no exact maximum, only one within the numbers' range, so m is 0 unless a
// row's maximum is beyond e^±40; those rows are done again. Without, products are cuBLASLt's, and m is the maximum.

enum { SEED = 64, BLOCK = 2 * SEED, REACH = 2048, CLUSTER = 8, N_PARTS = 10 };

// How the feedback goes, for all batches of up to B sequences of up to T tokens, and what `weights` and scratch
// hold for it: where each part begins, in floats, and its shape. Without tiles T ≤ 2048 is one panel and e has 256
// MiB at most; with them, 512. A panel's rows take what is before it REACH rows at a time. keep: e takes no more
// than twice of what a layer keeps besides (28·D bytes a token), or is not kept. A smaller batch, or shorter
// sequences, leave parts of it unused.
typedef struct {
    int B, T, asked;  // asked: the height of panels that a test wants, or 0
    int tiles, march, R, P; // R, P: heights of panels and of blocks; march: solved by one kernel, in clusters of so many blocks
    int kept;         // weights stay as they are for the backward pass, in one panel
    int64_t ld, lx;   // from row to row of e: in floats before the softmax (without tiles), in X
    int64_t rows;     // of a panel: R, and T at most
    int64_t e_step, m_step; // from one sequence's e, M to the next: in X
    int64_t e;        // weights: (B,rows,ld)
    int64_t inverse;  // (B,rows,P) X, the blocks of M on its diagonal
    int64_t weights;  // both
    int64_t rhs;      // scratch: (B,T,D) the sum e_{I,<} s_<; backward λ's right-hand side h
    int64_t block;    // (B,P,D) X, what M multiplies
    int64_t lambda;   // (B,P,D), D rounded up to tiles; the march's tiles on their way round
    int64_t merge;    // (B,R/2P,P/2,P/2) X
    int64_t dk;       // (B,T,D) dk' while several panels add to it
    int64_t partial;  // tiles: (B,T/128,rows) maxima and sums of the tiles' rows
    int64_t flags;    // tiles: (B,rows/128) which rows to do again
    int64_t product;  // no tiles: (B,P,ld or D), a product before it is passed on
    int64_t total;
    int64_t ends[N_PARTS]; // where each part's numbers end, in this order; behind them a band in a build for tests
} Panels;
template <typename X> static Panels feedback_panels(int B, int T, int D, int P, int in_eights = 1, int keep = 0) {
    Panels p = {};
    p.B = B;
    p.T = T;
    p.asked = P;
    p.tiles = gpu.hopper && sizeof(X) == 2 && D % 8 == 0 && in_eights && P % 8 == 0;
    p.ld = round_up(T, 64);
    p.lx = p.tiles ? p.ld : p.ld * (int64_t)(sizeof(float) / sizeof(X));
    int alone = p.tiles && P <= 0;
    p.march = alone && (int64_t)B * ((D + 127) / 128) >= 48;
    if (alone && T > REACH) p.march = gpu.clusters ? CLUSTER : 0;
    p.P = P > 0 || T <= BLOCK || p.march == 1 ? BLOCK : T <= 512 ? 2 * BLOCK : T <= 2048 ? 4 * BLOCK : 8 * BLOCK; // measured
    int most = 11 * D / p.P * p.P; // rows of e that a layer may need for a while
    p.kept = keep && alone && T <= 28 * D && (int64_t)B * T * p.ld <= 1 << 28;
    p.R = P > 0 ? min_int(P, BLOCK) : p.kept ? T : !p.tiles || most < REACH ? REACH : most;
    p.R = min_int(p.R, (int)round_up(T, p.P));
    while (P <= 0 && p.R > p.P && (int64_t)B * p.R * p.ld > (p.tiles ? 1 << 28 : 1 << 26))
        p.R = (int)round_up(p.R / 2, p.P);
    p.rows = min_int(p.R, T);
    p.e_step = p.rows * p.lx;
    p.m_step = p.rows * p.P;
    int64_t x = sizeof(X), rows = p.rows, block = min_int(p.P, T), wide_ = p.ld > D ? p.ld : D,
        all = (int64_t)T * D, tiles = (T + BLOCK - 1) / BLOCK;
    int64_t sizes[] = {p.tiles ? rows * p.ld / 2 : rows * p.ld,
                       rows * p.P * x / 4,
                       all,
                       block * D * x / 4,
                       block * round_up(D, ATOM),
                       round_up(rows, 2 * p.P) * p.P / 4 * x / 4,
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

// e of the logits v, a row's maximum and sum, and from these m and 1/z. `again`: only rows that need another m.
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
};
template <> constexpr int sums_rows<LogitExp> = 1;
// A thread takes a row, in the order of its tiles.
__global__ static void feedback_stats_kernel(float2 *stats, int64_t stats_step, const float2 *partial, int *flags,
                                             int again, int r0, int n, int R, int tiles) {
    wait_for_results();
    int r = blockIdx.x * BLOCK + threadIdx.x, far = 0, *flag = flags + blockIdx.y * gridDim.x + blockIdx.x;
    if (again && !*flag) return;
    if (r < n) {
        float top = -INFINITY, z = 0;
        partial += (int64_t)blockIdx.y * tiles * R + r;
        stats += blockIdx.y * stats_step + r;
#pragma unroll 4
        for (int tile = 0; tile * BLOCK < r0 + r; tile++) {
            float2 sums = partial[(int64_t)tile * R];
            top = fmaxf(top, sums.x);
            z += sums.y;
        }
        far = !again && r0 + r > 0 && fabsf(top) > 58;
        *stats = make_float2(again ? stats->x : far ? top : 0, z > 0 ? 1 / z : z); // NaN stays NaN
    }
    far = __syncthreads_or(far);
    if (!again && threadIdx.x == 0) *flag = far;
}

// Blocks of up to 128 rows of M, in float32; a thread block takes one. A warp takes 16 rows, a lane a column of their
// inverse by substitution; then neighbours of h rows merge, M21 = M2 (A21 M1), a thread h/16 rows and 4 columns.
enum { SEED_LD = BLOCK + 4 };
typedef float SeedRows[SEED_LD];
template <int H> __device__ inline void multiply_seeds(float sum[H / 16][4], const SeedRows *a, const SeedRows *b) {
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
template <int H> __device__ inline void merge_seeds(SeedRows *A, SeedRows *M) {
    int at = threadIdx.x / (4 * H) * 2 * H, row = at + H + threadIdx.x % (4 * H) / (H / 4) * (H / 16),
        col = at + threadIdx.x % (H / 4) * 4;
    float left[H / 16][4] = {}, below[H / 16][4] = {};
    multiply_seeds<H>(left, (const SeedRows *)&A[row][at], (const SeedRows *)&M[at][col]);
    __syncthreads();
    for (int r = 0; r < H / 16; r++) write_some<4>(&A[row + r][col], left[r]);
    __syncthreads();
    multiply_seeds<H>(below, (const SeedRows *)&M[row][at + H], (const SeedRows *)&A[at + H][col]);
    for (int r = 0; r < H / 16; r++) write_some<4>(&M[row + r][col], below[r]);
    __syncthreads();
}
// e from the panel's own columns on; zeros to the right of a block as far as `zeros` columns of its block of P.
template <typename X>
__global__ void __launch_bounds__(256)
inverse_seed_kernel(X *M_out, int P, int64_t step_m, const X *e, int64_t ld_e, int64_t step_e, RowScale scale, int n,
                    int zeros) {
    extern __shared__ float4 seeds[];
    wait_for_results();
    SeedRows *A = (SeedRows *)seeds, *M = A + BLOCK;
    int i0 = blockIdx.x * BLOCK, rows = min(BLOCK, n - i0), b = blockIdx.y;
    __shared__ float scales[BLOCK];
    e += b * step_e + (int64_t)i0 * ld_e + i0;
    M_out += b * step_m + (int64_t)i0 * P + i0 % P;
    if (threadIdx.x < BLOCK) scales[threadIdx.x] = (int)threadIdx.x < rows ? scale.at(b, i0 + threadIdx.x) : 0;
    __syncthreads();
#pragma unroll 32
    for (int at = threadIdx.x; at < BLOCK * BLOCK; at += 256) {
        int r = at / BLOCK, c = at % BLOCK;
        A[r][c] = r < rows && c < r ? scales[r] * get(e[r * ld_e + c]) : 0;
        M[r][c] = 0;
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
            M[r0 + t][r0 + c] = x[t];
        }
    }
    __syncthreads();
    merge_seeds<16>(A, M);
    merge_seeds<32>(A, M);
    merge_seeds<64>(A, M);
    int pieces = max(BLOCK, zeros - i0 % P) / 8;
    for (int at = threadIdx.x; at < rows * pieces; at += 256) {
        int r = at / pieces, c = at % pieces * 8;
        float v[8] = {};
        if (c < BLOCK) read_some<8>(v, &M[r][c]);
        write_some<8>(M_out + (int64_t)r * P + c, v);
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
};
template <typename O> constexpr int sums_columns<StoreSummed<O>> = 1;
// out = Y(x)       x (N,D), out: D of the ld columns of each row
template <typename Y, typename X>
static void copy_gpu(Y *out, int ld, const X *x, int N, int D, cudaStream_t stream) {
    each(N, D, wide({D, ld}, {out, x}), stream, [=] __device__ (auto V, int n, int i) {
        float v[V];
        read_some<V>(v, x + (int64_t)n * D + i);
        write_some<V>(out + (int64_t)n * ld + i, v);
    });
}

// e of the panel of rows r0 .. r0+n-1, with their m and 1/z (known: given), and the inverses M.
template <typename X>
static void feedback_panel(float *weights, float *scratch, const Panels *p, float *stats, int known, const X *q, const X *k, int ld,
                           const float *gamma, int B, int T, int D, int first, int r0, int n, cudaStream_t stream) {
    int64_t rows = T - first, row = r0 - first, step = p->e_step, m_step = p->m_step;
    ProductWay way = {B, 1, p->tiles ? NULL : scratch + p->product, stream};
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
            product_tiles<0, 0, OUT_LOWER, BLOCK>(f, part_of(q + row * ld, ld, rows * ld, (int)(rows - row), D),
                                                  part_of(k, ld, (int64_t)T * ld, T, D), n, width, D, r0, 1, B, stream);
            if (!known) LAUNCH(feedback_stats_kernel, dim3(blocks, B), BLOCK, 0, stream, known_stats, rows, partial, flags,
                               again, r0, n, f.R, tiles);
        }
    }
    if (!p->tiles) {
        float *logits = weights + p->e;
        int64_t floats = p->rows * p->ld;
        for (int i0 = r0; i0 < r0 + n; i0 += p->P) {
            int m = min_int(p->P, r0 + n - i0);
            matmul_gpu(into(logits + (i0 - r0) * p->ld, p->ld, floats), rows_of_gpu(q + (i0 - first) * (int64_t)ld, ld,
                       rows * ld), transpose_gpu(rows_of_gpu(k, ld, (int64_t)T * ld)), m, i0 + m, D,
                       1 / sqrtf((float)D), 0, B, stream);
        }
        softmax_panel_gpu<X>(logits, p->ld, floats, stats + 2 * row, 2 * rows, known, 0, r0, n, p->P, 1, B, stream);
    }
    int bytes = 2 * BLOCK * SEED_LD * (int)sizeof(float);
    allow_shared(inverse_seed_kernel<X>, bytes);
    LAUNCH(inverse_seed_kernel<X>, dim3((n + BLOCK - 1) / BLOCK, B), 256, bytes, stream, M, p->P, m_step, e + r0, p->lx,
           step, scale, n, p->tiles ? 0 : p->P);
    for (int h = BLOCK; h < p->P && h < n; h *= 2) { // M21 = M2 ((γ/z) ⊙ (e21 M1))
        int pairs = (n + h - 1) / (2 * h), P = p->P;
        int64_t scaled_step = (int64_t)pairs * h * h;
        Part<X> e21 = {e, p->lx, step, n, (int)p->ld, h, r0, 2 * h, 2 * h, INT_MAX},
            M1 = {M, p->P, m_step, n, p->P, 0, 0, 2 * h, 2 * h, p->P}, M2 = {M, p->P, m_step, n, p->P, h, h, 2 * h, 2 * h,
            p->P}, right = {scaled, h, scaled_step, pairs * h, h, 0, 0, h, 0, INT_MAX};
        auto to_scaled = [=] __device__ (auto V, int b, int pair, int r, int i, float *v) { // X((γ/z) ⊙ (e21 M1))
            int row = (2 * pair + 1) * h + r;
            float factor = row < n ? scale.at(b, row) : 0;
            for (int j = 0; j < V; j++) v[j] = row < n ? v[j] * factor : 0;
            write_some<V>(scaled + b * scaled_step + (int64_t)(pair * h + r) * h + i, v);
        };
        auto to_M21 = [=] __device__ (auto V, int b, int pair, int r, int i, float *v) {
            int row = (2 * pair + 1) * h + r;
            if (row < n) write_some<V>(M + b * m_step + (int64_t)row * P + 2 * pair * h % P + i, v);
        };
        product_gpu<0, 1, B_LOWER>(to_scaled, e21, M1, h, h, h, 0, pairs, way);
        product_gpu<0, 1, A_LOWER>(to_M21, M2, right, h, h, h, 0, pairs, way);
    }
}

// The solve, or its adjoint (BACK), of positions begin .. end-1 in one go. C blocks, a cluster, have STRIP columns of one
// sequence and walk along its blocks of C·128 rows, from the last if BACK, each in the four products that the section begins
// with (or those of feedback_sequence_backward_gpu). Block `rank` has two tiles of 64 rows, the first and second four warps one
// each: tile rank and tile rank from the last, so that all have as much of the triangle. A thread more has the operands
// copied: e, M, and what was solved before, written to memory and read back. What M and e_II multiply goes round: a block
// writes its tiles to memory and has them copied from there to all blocks of the cluster whose rows see them, at once.
enum { MARCH_SLOTS = 4 };
template <int C> struct MarchShared {
    enum { STRIP = C == 1 ? 128 : 64, BUFFERS = C == 1 ? 2 : 1 };
    bf16 a[MARCH_SLOTS][2][ATOM][ATOM], b[MARCH_SLOTS][STRIP / ATOM][ATOM][ATOM], right[BUFFERS][STRIP / ATOM][C * BLOCK][ATOM];
    uint64_t full[MARCH_SLOTS], free[MARCH_SLOTS], written, handed, done;
};
// f (BACK: ds), c (BACK: df) and known, the sum over rows beyond begin .. end if not NULL, have T rows of D a
// sequence; e and M begin with row r0; `map` is of s (BACK: of u). round: two places for each tile of a cluster, in
// turn. HEARS: known may be there. A cluster reads it ahead; one block, which has no registers left for that, when
// it adds it.
template <int BACK, int C, int HEARS>
__global__ void __launch_bounds__(3 * GROUP, 1)
feedback_march_kernel(const __grid_constant__ CUtensorMap e_map, const __grid_constant__ CUtensorMap M_map,
                      const __grid_constant__ CUtensorMap map, const bf16 *f, bf16 *c, const float *known, bf16 *round,
                      RowScale scale, RowScale inverse, int T, int D, int r0, int begin, int end) {
#ifdef HOPPER
    typedef MarchShared<C> Shared;
    enum { STRIP = Shared::STRIP, ROWS = C * BLOCK, TILES = 2 * C, ACROSS = STRIP / ATOM };
    extern __shared__ __align__(1024) unsigned char shared_tiles[];
    Shared *s = (Shared *)shared_tiles;
    int rank = (int)blockIdx.x % C, n0 = (int)blockIdx.x / C * STRIP, sequence = (int)blockIdx.y,
        blocks = (end - begin + ROWS - 1) / ROWS, item = 0, group = threadIdx.x / GROUP, lane = threadIdx.x % 32;
    auto tile_of = [&](int group) { return group ? TILES - 1 - rank : rank; };
    auto place = [&](int step) { return begin + (BACK ? blocks - 1 - step : step) * ROWS; };
    if (threadIdx.x == 0) {
        barrier_init(&s->written, C);
        barrier_init(&s->handed, 1);
        barrier_init(&s->done, 2 * C);
        for (int i = 0; i < MARCH_SLOTS; i++) { barrier_init(&s->full[i], 1); barrier_init(&s->free[i], 8); }
    }
    barriers_ready();
    if (C > 1) asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" : : : "memory");
    wait_for_results(0);
    if (group == 2) {
        KEEP_REGISTERS("dec", 40);
        if (threadIdx.x % GROUP) return;
        auto copy = [&](const CUtensorMap *left, int I, int col0, int K, int solved) { // 64 of K from position K on
            int slot = item % MARCH_SLOTS, bytes = solved ? sizeof(s->b[0]) : 0, wanted[2];
            if (item >= MARCH_SLOTS) barrier_wait(&s->free[slot], item / MARCH_SLOTS - 1);
            for (int j = 0; j < 2; j++) {
                wanted[j] = C == 1 || (BACK ? K >= I + ATOM * tile_of(j) : K <= I + ATOM * tile_of(j));
                bytes += wanted[j] * (int)sizeof(s->a[0][0]);
            }
            barrier_expect(&s->full[slot], bytes);
            for (int j = 0; j < 2; j++) {
                int row = I + ATOM * tile_of(j);
                if (wanted[j]) copy_tile(s->a[slot][j][0], left, (BACK ? row : K) - col0, 0, (BACK ? K : row) - r0, sequence,
                                         &s->full[slot]);
            }
            for (int j = 0; j < ACROSS * solved; j++)
                copy_tile(s->b[slot][j][0], &map, n0 + ATOM * j, 0, K, sequence, &s->full[slot]);
            item++;
        };
        for (int step = 0; step < blocks; step++) {
            int I = place(step);
            for (int before = 0; before < step; before++) {
                if (before == step - 1) barrier_wait(&s->written, before);
                if (C > 1 && before == step - 1) asm volatile("fence.acq_rel.cluster;\nfence.proxy.async.global;" : : : "memory");
                for (int k = 0; k < ROWS; k += ATOM) copy(&e_map, I, 0, place(before) + k, 1);
            }
            for (int turn = 0; turn < 3; turn++)
                for (int tile = BACK ? rank : 0; tile < (BACK ? TILES : TILES - rank); tile++)
                    copy(turn == 1 ? &e_map : &M_map, I, turn == 1 ? 0 : I, I + ATOM * tile, 0);
        }
        return;
    }
    KEEP_REGISTERS("inc", 232);
    typedef float Sums[STRIP / 8][4];
    int mine = C == 1 ? group : tile_of(group), first = ATOM * (mine - group) + threadIdx.x / 32 * 16 + lane / 4;
    auto multiply = [&](Sums &sum, const bf16 *right, int items, int keep) { // right NULL: what was copied
        for (int i = 0; i < items; i++, item++) {
            int slot = item % MARCH_SLOTS, across = (right ? ROWS : ATOM) * ATOM * 2;
            const bf16 *b = right ? right + i * ATOM * ATOM : s->b[slot][0][0];
            barrier_wait(&s->full[slot], item / MARCH_SLOTS);
            products_begin();
#pragma unroll
            for (int k = 0; k < ATOM / 16; k++)
                tensor_product<STRIP, BACK, 1>(sum, operand(s->a[slot][group][BACK ? k * 16 : 0] + (BACK ? 0 : k * 16)),
                                               operand(b + k * 16 * ATOM, across), keep || i > 0 || k > 0);
            products_commit();
            products_wait<1>();
            if (i && lane == 0) barrier_arrive(&s->free[(item - 1) % MARCH_SLOTS]);
        }
        products_wait<0>();
        if (items && lane == 0) barrier_arrive(&s->free[(item - 1) % MARCH_SLOTS]);
    };
    auto pass = [&](int items) { // of the other group alone
        for (; items > 0; items--, item++) {
            barrier_wait(&s->full[item % MARCH_SLOTS], item / MARCH_SLOTS);
            if (lane == 0) barrier_arrive(&s->free[item % MARCH_SLOTS]);
        }
    };
    auto put = [&](int turn, int half, int n, uint32_t two) {
        int r = first + half * 8;
        *(uint32_t *)&s->right[turn % Shared::BUFFERS][n / 8][r][(n % 8 ^ r % 8) * 8 + lane % 4 * 2] = two;
    };
    auto share = [&](int turn, int step) { // what was put is for the products of all
        asm volatile("fence.proxy.async.shared::cta;\nbar.sync 1, 256;" : : : "memory");
        if (C == 1) return;
        int number = 3 * step + turn, last = BACK ? mine : TILES - 1 - mine, bytes = sizeof(bf16) * STRIP * ATOM,
            ranks = ((2 << min(last, C - 1)) - 1) & ~(1 << rank);
        const bf16 *own = s->right[0][0][ATOM * mine];
        int64_t strip = sequence * (gridDim.x / C) + blockIdx.x / C;
        bf16 *between = round + (strip * 2 + number % 2) * (STRIP * ROWS) + mine * STRIP * ATOM;
        if (threadIdx.x == 0) barrier_expect(&s->handed, (TILES - rank - 2) * bytes);
        if (threadIdx.x % GROUP == 0 && ranks) {
            asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;\n"
                         "cp.async.bulk.wait_group 0;\nfence.proxy.async.global;"
                         : : "l"(between), "r"(shared_at(own)), "r"(bytes) : "memory");
            if (number) barrier_wait(&s->done, number - 1);
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
                         : : "r"(shared_at(own)), "l"(between), "r"(bytes), "r"(shared_at(&s->handed)), "h"((uint16_t)ranks)
                         : "memory");
        }
        barrier_wait(&s->handed, number);
    };
    auto multiply_shared = [&](Sums &sum, int turn, int keep) {
        const bf16 *right = s->right[turn % Shared::BUFFERS][0][0];
        if (C == 1) { multiply(sum, right, TILES, keep); return; }
        if (BACK) pass(mine - rank);
        multiply(sum, right + (BACK ? mine : 0) * ATOM * ATOM, BACK ? TILES - mine : mine + 1, keep);
        if (!BACK) pass(TILES - 1 - rank - mine);
        if (threadIdx.x % GROUP < C) barrier_arrive_at(&s->done, threadIdx.x % GROUP);
        asm volatile("bar.sync 1, 256;" : : : "memory"); // the rows' own places are free
    };
    auto low = [](uint32_t two) { return __uint_as_float(two << 16); };
    auto high = [](uint32_t two) { return __uint_as_float(two & 0xFFFF0000u); };
    for (int step = 0; step < blocks; step++) {
        int I = place(step);
        Sums sum = {}, solved;
        uint32_t base[STRIP / 8][2]; // s before its refinement, BACK: u, or λ where γ is 0
        float factor[2], z[2];
        int64_t at[2];
        for (int half = 0; half < 2; half++) {
            int r = I + first + half * 8, inside = r < end;
            at[half] = inside ? ((int64_t)sequence * T + r) * D + n0 + lane % 4 * 2 : -1;
            factor[half] = inside ? scale.at(sequence, r) : 0;
            if (BACK && fabsf(factor[half]) < 1e-30f) factor[half] = 0; // its inverse is a number
            z[half] = BACK ? (factor[half] != 0 ? 1 / factor[half] : 1) : inside ? inverse.at(sequence, r) : 0;
        }
        uint32_t given[STRIP / 8][2];
        float2 beyond[STRIP / 8][2];
        for (int n = 0; n < STRIP / 8; n++)
            for (int half = 0; half < 2; half++) {
                int inside = at[half] >= 0 && n0 + n * 8 < D;
                given[n][half] = inside ? *(const uint32_t *)(f + at[half] + n * 8) : 0;
                beyond[n][half] = C > 1 && known && inside ? *(const float2 *)(known + at[half] + n * 8) : make_float2(0, 0);
            }
        auto keep = [&](int half, int n, uint32_t two) {
            if (c && at[half] >= 0 && n0 + n * 8 < D) *(uint32_t *)(c + at[half] + n * 8) = two;
        };
        multiply(sum, NULL, TILES * step, 0);
        for (int n = 0; n < STRIP / 8; n++)
            for (int half = 0; half < 2; half++) {
                uint32_t two = given[n][half];
                float *v = &sum[n][2 * half];
                if (C > 1) { v[0] += beyond[n][half].x; v[1] += beyond[n][half].y; }
                if (C == 1 && HEARS && at[half] >= 0 && n0 + n * 8 < D) {
                    float2 more = *(const float2 *)(known + at[half] + n * 8);
                    v[0] += more.x;
                    v[1] += more.y;
                }
                if (BACK) { v[0] += low(two); v[1] += high(two); put(0, half, n, pack_two(v[0], v[1])); }
                else put(0, half, n, pack_two(low(two) + factor[half] * v[0], high(two) + factor[half] * v[1]));
            }
        share(0, step);
        multiply_shared(solved, 0, 0);
        for (int n = 0; n < STRIP / 8; n++)
            for (int half = 0; half < 2; half++) {
                float *v = &solved[n][2 * half];
                uint32_t two = BACK ? pack_two(factor[half] * v[0], factor[half] * v[1]) : pack_two(v[0], v[1]);
                base[n][half] = BACK && factor[half] == 0 ? pack_two(v[0], v[1]) : two;
                put(1, half, n, two);
            }
        share(1, step);
        multiply_shared(sum, 1, 1);
        for (int n = 0; n < STRIP / 8; n++)
            for (int half = 0; half < 2; half++) {
                float *v = &sum[n][2 * half], x = low(base[n][half]), y = high(base[n][half]);
                if (BACK) { put(2, half, n, pack_two(v[0] - x * z[half], v[1] - y * z[half])); continue; }
                uint32_t two = given[n][half];
                keep(half, n, pack_two(v[0] * z[half], v[1] * z[half]));
                put(2, half, n, pack_two(low(two) + factor[half] * v[0] - x, high(two) + factor[half] * v[1] - y));
            }
        share(2, step);
        Sums refinement;
        multiply_shared(refinement, 2, 0);
        for (int n = 0; n < STRIP / 8; n++)
            for (int half = 0; half < 2; half++) {
                float x = low(base[n][half]) * (BACK ? z[half] : 1) + refinement[n][2 * half],
                      y = high(base[n][half]) * (BACK ? z[half] : 1) + refinement[n][2 * half + 1];
                if (BACK) { keep(half, n, pack_two(x, y)); x *= factor[half]; y *= factor[half]; }
                put(3, half, n, pack_two(x, y));
            }
        asm volatile("fence.proxy.async.shared::cta;\nbar.sync 1, 256;" : : : "memory");
        if (threadIdx.x) continue;
        for (int j = 0; j < 2 * ACROSS; j++)
            asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];"
                         : : "l"(&map), "r"(n0 + j / 2 * ATOM), "r"(0), "r"(I + ATOM * tile_of(j % 2)), "r"(sequence),
                             "r"(shared_at(s->right[Shared::BUFFERS - 1][j / 2][ATOM * tile_of(j % 2)])) : "memory");
        asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" : : : "memory");
        if (C == 1) { barrier_arrive(&s->written); continue; }
        asm volatile("fence.proxy.async.global;\nfence.acq_rel.cluster;" : : : "memory");
        for (int to = 0; to < C; to++) barrier_arrive_at(&s->written, to);
    }
    if (C > 1) barrier_wait(&s->written, blocks - 1); // nobody needs this block's memory any more
#endif
}
template <int BACK, int C, int HEARS>
static void feedback_march_as(float *weights, float *scratch, const Panels *p, const bf16 *out, int64_t ld_out,
                              const bf16 *f, bf16 *c, const float *known, RowScale scale, RowScale inverse, int B,
                              int T, int D, int r0, int n, int begin, int end, cudaStream_t stream) {
    CUtensorMap e_map = tile_map((bf16 *)(weights + p->e), (int)p->lx, 1, n, p->lx, p->e_step, B, ATOM),
        M_map = tile_map((bf16 *)(weights + p->inverse), p->P, 1, n, p->P, p->m_step, B, ATOM),
        map = tile_map(out, D, 1, T, ld_out, T * ld_out, B, ATOM);
    int bytes = sizeof(MarchShared<C>), strips = (D + MarchShared<C>::STRIP - 1) / MarchShared<C>::STRIP;
    allow_shared(feedback_march_kernel<BACK, C, HEARS>, bytes);
    LAUNCH_AS(C, 1, (feedback_march_kernel<BACK, C, HEARS>), dim3(C * strips, B), 3 * GROUP, bytes, stream, e_map,
              M_map, map, f, c, known, (bf16 *)(scratch + p->lambda), scale, inverse, T, D, r0, begin, end);
}
template <int BACK>
static void feedback_march_gpu(float *weights, float *scratch, const Panels *p, const bf16 *out, int64_t ld_out, const bf16 *f,
                               bf16 *c, const float *known, RowScale scale, RowScale inverse, int B, int T, int D, int r0,
                               int n, int begin, int end, cudaStream_t stream) {
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

// c: (B,T,D) kept for the backward pass, or NULL; so are weights where p says so. f comes from `side` if not NULL.
template <typename X>
static void feedback_forward_gpu(X *s, X *c, float *stats, Scratch weights_room, Scratch scratch_room, const X *f,
                                 const X *q, const X *k, int ld, const float *gamma, int B, int T, int D, int first,
                                 const Panels *panels, cudaStream_t stream, cudaStream_t side = NULL) {
    feedback_fits(panels, B, T, weights_room, scratch_room);
    Panels p = *panels;
    float *weights = weights_room.at, *scratch = scratch_room.at;
    int64_t rows = T - first, step = p.e_step, all = (int64_t)T * D, m_step = p.m_step;
    X *e = (X *)(weights + p.e), *M = (X *)(weights + p.inverse), *block = (X *)(scratch + p.block);
    ProductWay way = {B, wide({D}, {s, c, f, scratch}), p.tiles ? NULL : scratch + p.product, stream};
    for (int r0 = first; r0 < T; r0 += p.R) {
        int n = min_int(p.R, T - r0);
        feedback_panel(weights, scratch, &p, stats, 0, q, k, ld, gamma, B, T, D, first, r0, n, stream);
        if (side) follow(stream, side);
        for (int reach = r0; reach < r0 + n; reach += REACH) {
            int end = min_int(reach + REACH, r0 + n);
            if (reach) matmul_gpu(into(scratch + p.rhs + (int64_t)(reach - first) * D, D, all),
                                  rows_of_gpu(e + (reach - r0) * p.lx, p.lx, step), rows_of_gpu(s, D, all), end - reach, D, reach,
                                  1, 0, B, stream);
            if constexpr (sizeof(X) == sizeof(bf16))
                if (p.march && !first) {
                    feedback_march_gpu<0>(weights, scratch, &p, s, D, f, c, reach ? scratch + p.rhs : NULL,
                                          {gamma, stats, T}, {NULL, stats, T}, B, T, D, r0, n, reach, end, stream);
                    continue;
                }
            for (int i0 = reach; i0 < end; i0 += p.P) {
                int m = min_int(p.P, end - i0), at = i0 - r0;
                int64_t row = i0 - first, f_step = rows * D;
                float *sum = i0 ? scratch + p.rhs + row * D : NULL;
                X *s_I = s + (int64_t)i0 * D, *c_I = c ? c + (int64_t)i0 * D : NULL;
                const X *f_I = f + row * D;
                RowScale scale = {gamma + row, stats + 2 * row, rows}, inverse = {NULL, stats + 2 * row, rows};
                Part<X> rhs = part_of(i0 ? block : f, D, i0 ? (int64_t)m * D : rows * D, m, D),
                    e_II = part_of(e, p.lx, step, n, (int)p.ld, at, i0),
                    M_I = part_of(M, p.P, m_step, at + m, p.P, at, 0), residual = part_of(block, D, (int64_t)m * D, m, D);
                // the sum e_{I,<} s_<, and X(g)
                auto to_g = [sum, block, f_I, scale, all, f_step, m, D, reach] __device__ (auto V, int b, int, int r, int i, float *v) {
                    int64_t at = (int64_t)r * D + i;
                    float w[V] = {}, factor = scale.at(b, r);
                    if (reach) read_ahead<V>(w, sum + b * all + at);
                    for (int j = 0; j < V; j++) v[j] += w[j];
                    write_some<V>(sum + b * all + at, v);
                    read_ahead<V>(w, f_I + b * f_step + at);
                    for (int j = 0; j < V; j++) v[j] = w[j] + factor * v[j];
                    write_some<V>(block + (int64_t)b * m * D + at, v);
                };
                if (i0) product_gpu<0, 1, FULL>(to_g, part_of(e, p.lx, step, n, (int)p.ld, at, reach),
                                                part_of(s, D, all, i0, D, reach), m, D, i0 - reach, 0, 1, way);
                // X(r), and c = (e s)/z
                auto to_r = [block, c_I, sum, f_I, s_I, scale, inverse, all, f_step, m, D] __device__ (auto V, int b, int, int r, int i,
                                                                                                       float *v) {
                    int64_t at = (int64_t)r * D + i;
                    float w[V] = {}, x[V], factor = scale.at(b, r), z = inverse.at(b, r);
                    if (sum) read_ahead<V>(w, sum + b * all + at);
                    for (int j = 0; j < V; j++) { v[j] += w[j]; w[j] = z * v[j]; }
                    if (c_I) write_some<V>(c_I + b * all + at, w);
                    read_ahead<V>(w, f_I + b * f_step + at);
                    read_ahead<V>(x, s_I + b * all + at);
                    for (int j = 0; j < V; j++) v[j] = w[j] + factor * v[j] - x[j];
                    write_some<V>(block + (int64_t)b * m * D + at, v);
                };
                Store<X> solve = {s_I, D, all, 1, 0}, refine = {s_I, D, all, 1, 1};
                product_gpu<0, 1, A_LOWER>(solve, M_I, rhs, m, D, m, 0, 1, way);
                product_gpu<0, 1, A_LOWER>(to_r, e_II, part_of((const X *)s_I, D, all, m, D), m, D, m, 0, 1, way);
                product_gpu<0, 1, A_LOWER>(refine, M_I, residual, m, D, m, 0, 1, way);
            }
        }
    }
}

// δ_t = λ_t·c_t. A warp takes a row.
template <int V, typename X>
__global__ void feedback_delta_kernel(float *delta, const X *df, const X *c, int64_t all, int T, int n, int D) {
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

// One panel of the adjoint, of all sequences: λ of its rows from the last block to the first, each solving with M^T and one
// refinement,
//     λ = M^T h,   r = h + e_II^T u - λ with u = (γ/z) ⊙ λ,   λ += M^T r
// where λ stays float32, for X(γ X(λ)) would be X(λ) and the loop no contraction. Then what the panel gives the rows
// before it, h_< += e_{R,<}^T u, and the gradients of q' and k'. u lies where dq' will.
template <typename X>
static void feedback_sequence_backward_gpu(X *df, X *dq, X *dk, float *dgamma, float *weights, float *scratch, const Panels *p,
                                           const X *ds, const X *s, const X *c, float *stats, const X *q, const X *k, int ld,
                                           const float *gamma, int B, int T, int D, int r0, TileSums dq_sums, TileSums dk_sums,
                                           cudaStream_t stream) {
    int n = min_int(p->R, T - r0);
    int64_t step = p->e_step, all = (int64_t)T * D, wide_step = (int64_t)T * ld, m_step = p->m_step;
    float *lambda = scratch + p->lambda, *dk_sum = scratch + p->dk, sigma = 1 / sqrtf((float)D);
    ProductWay way = {B, wide({D, ld}, {df, dq, dk, ds, s, c, scratch}), p->tiles ? NULL : scratch + p->product, stream};
    X *e = (X *)(weights + p->e), *M = (X *)(weights + p->inverse), *block = (X *)(scratch + p->block);
    if (!p->kept) feedback_panel(weights, scratch, p, stats, 1, q, k, ld, gamma, B, T, D, 0, r0, n, stream);
    for (int low = (n - 1) / REACH * REACH; low >= 0; low -= REACH) {
        int end = min_int(low + REACH, n), heard = r0 + end < T;
        float *h_all = scratch + p->rhs;
        if constexpr (sizeof(X) == sizeof(bf16))
            if (p->march)
                feedback_march_gpu<1>(weights, scratch, p, dq, ld, ds, df, heard ? h_all : NULL, {gamma, stats, T},
                                      {NULL, stats, T}, B, T, D, r0, n, r0 + low, r0 + end, stream);
        for (int at = p->march ? -1 : (end - 1) / p->P * p->P; at >= low; at -= p->P) {
            int m = min_int(p->P, end - at), i0 = r0 + at, alone = i0 + m == T;
            float *h = alone ? NULL : h_all + (int64_t)i0 * D;
            const X *ds_I = ds + (int64_t)i0 * D;
            X *u = dq + (int64_t)i0 * ld, *df_I = df + (int64_t)i0 * D;
            RowScale scale = {gamma + i0, stats + 2 * i0, T};
            Part<X> e_II = part_of(e, p->lx, step, n, (int)p->ld, at, i0),
                M_I = part_of(M, p->P, m_step, at + m, p->P, at, 0), residual = part_of(block, D, (int64_t)m * D, m, D),
                rhs = alone ? part_of(ds_I, D, all, m, D) : residual;
            // h = X'(ds) + what later rows give, and X(h)
            auto to_h = [=] __device__ (auto V, int b, int, int r, int i, float *v) {
                int64_t at = b * all + (int64_t)r * D + i;
                float w[V], old[V] = {};
                read_ahead<V>(w, ds_I + at);
                if (heard) read_ahead<V>(old, h + at);
                for (int j = 0; j < V; j++) v[j] += w[j] + old[j];
                write_some<V>(h + at, v);
                write_some<V>(block + ((int64_t)b * m + r) * D + i, v);
            };
            // v = λ: u = X((γ/z) ⊙ λ), and λ becomes u/(γ/z), so that the residual is that of a λ whose u is exact
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
            auto to_r = [block, h, lambda, ds_I, all, m, D] __device__ (auto V, int b, int, int r, int i, float *v) {
                int64_t at = b * all + (int64_t)r * D + i, own = ((int64_t)b * m + r) * D + i;
                float w[V], x[V];
                if (h) read_ahead<V>(w, h + at);
                else read_ahead<V>(w, ds_I + at);
                read_ahead<V>(x, lambda + own);
                for (int j = 0; j < V; j++) v[j] += w[j] - x[j];
                write_some<V>(block + own, v);
            };
            // v = M^T r: λ += v, df = X(λ), u = X((γ/z) ⊙ λ)
            auto to_df = [=] __device__ (auto V, int b, int, int r, int i, float *v) {
                float w[V], factor = scale.at(b, r);
                read_ahead<V>(w, lambda + ((int64_t)b * m + r) * D + i);
                for (int j = 0; j < V; j++) v[j] += w[j];
                write_some<V>(df_I + b * all + (int64_t)r * D + i, v);
                for (int j = 0; j < V; j++) v[j] *= factor;
                write_some<V>(u + b * wide_step + (int64_t)r * ld + i, v);
            };
            if (!alone) product_gpu<1, 1, FULL>(to_h, part_of(e, p->lx, step, n, (int)p->ld, at + m, i0),
                                                part_of(dq, ld, wide_step, r0 + end, D, i0 + m), m, D, end - at - m, 0, 1, way);
            product_gpu<1, 1, A_UPPER>(to_u, M_I, rhs, m, D, m, 0, 1, way);
            product_gpu<1, 1, A_UPPER>(to_r, e_II, part_of((const X *)u, ld, wide_step, m, D), m, D, m, 0, 1, way);
            product_gpu<1, 1, A_UPPER>(to_df, M_I, residual, m, D, m, 0, 1, way);
        }
        matmul_gpu(into(h_all, D, all), transpose_gpu(rows_of_gpu(e + low * p->lx, p->lx, step)), // to all rows before these
                   rows_of_gpu(dq + (int64_t)(r0 + low) * ld, ld, wide_step), r0 + low, D, end - low, 1, heard ? 1 : 0, B, stream);
    }
    LAUNCH((way.in_eights ? feedback_delta_kernel<8, X> : feedback_delta_kernel<1, X>), dim3((n + 3) / 4, B), 128, 0,
           stream, dgamma + r0, df + (int64_t)r0 * D, c + (int64_t)r0 * D, all, T, n, D);
    int height = p->tiles ? n : p->P;
    for (int at = 0; at < n; at += height) { // tiles know the triangle, blocks of rows follow it roughly
        int m = min_int(height, n - at), i0 = r0 + at;
        int64_t wide_row = (int64_t)i0 * ld, lx = p->lx;
        RowScale scale = {gamma + i0, stats + 2 * i0, T};
        X *e_I = e + at * p->lx;
        const float *delta = dgamma + i0;
        // v = λ_t·s_j: the gradient of the logits, X((γ/z) e (v - δ)), in e's place
        auto to_logits = [e_I, delta, scale, lx, step, i0, T] __device__ (auto V, int b, int, int r, int i, float *v) {
            X *place = e_I + b * step + r * lx + i;
            float w[V], factor = scale.at(b, r), dot = delta[(int64_t)b * T + r];
            read_ahead<V>(w, place);
            for (int j = 0; j < V; j++) v[j] = i + j < i0 + r ? factor * w[j] * (v[j] - dot) : 0;
            write_some<V>(place, v);
        };
        StoreSummed<X> to_dq = {{dq + wide_row, ld, wide_step, sigma, 0}, dq_sums, i0};
        Part<X> lambda_I = part_of((const X *)df, D, all, T, D, i0), dl = part_of((const X *)e, p->lx, step, n, (int)p->ld,
                                                                                 at, 0);
        product_gpu<0, 0, OUT_LOWER>(to_logits, lambda_I, part_of(s, D, all, T, D), m,
                                     p->tiles ? min_int((int)round_up(i0 + m, BLOCK), (int)p->ld) : i0 + m, D, i0, 1, way);
        product_gpu<0, 1, A_LOWER>(to_dq, dl, part_of(k, ld, wide_step, i0 + m, D), m, D, i0 + m, i0, 1, way);
    }
    for (int at = 0; at < n; at += height) {
        int m = min_int(height, n - at), last = r0 + n == T;
        Part<X> dl = part_of((const X *)e, p->lx, step, n, (int)p->ld, at, r0 + at),
            q_I = part_of(q, ld, wide_step, T, D, r0 + at);
        StoreSummed<X> to_dk = {{dk + (int64_t)at * ld, ld, wide_step, sigma, 0}, dk_sums, at};
        Store<float> to_sum = {dk_sum + (int64_t)(r0 + at) * D, D, all, sigma, !last};
        if (p->R >= T) product_gpu<1, 1, A_UPPER>(to_dk, dl, q_I, m, D, n - at, 0, 1, way);
        else product_gpu<1, 1, A_UPPER>(to_sum, dl, q_I, m, D, n - at, 0, 1, way);
    }
    if (p->R < T) matmul_gpu(into(dk_sum, D, all), transpose_gpu(rows_of_gpu((const X *)e, p->lx, step)),
                             rows_of_gpu(q + (int64_t)r0 * ld, ld, wide_step), r0, D, n, sigma, r0 + n < T ? 1 : 0, B,
                             stream);
}

// dbias, unless NULL: the sums of dq and dk, which follow each other, over the rows are added to it.
template <typename X>
static void feedback_backward_gpu(X *df, X *dq, X *dk, float *dgamma, float *dbias, Scratch weights_room,
                                  Scratch scratch_room, const X *ds, const X *s, const X *c, float *stats,
                                  const X *q, const X *k, int ld, const float *gamma, int B, int T, int D,
                                  const Panels *panels, ColumnSums *sums, cudaStream_t stream) {
    feedback_fits(panels, B, T, weights_room, scratch_room);
    Panels p = *panels;
    float *weights = weights_room.at, *scratch = scratch_room.at;
    TileSums dq_sums = {}, dk_sums = {}; // on the way to memory: with tiles, and dk' where one panel holds the whole of it
    int summed = dbias && p.tiles && p.asked <= 0, dk_summed = summed && p.R >= T;
    if (summed) dq_sums = tile_sums(sums, dbias, D, B, T);
    if (dk_summed) dk_sums = tile_sums(sums, dbias + D, D, B, T);
    for (int r0 = (T - 1) / p.R * p.R; r0 >= 0; r0 -= p.R)
        feedback_sequence_backward_gpu(df, dq, dk, dgamma, weights, scratch, &p, ds, s, c, stats, q, k, ld, gamma, B, T, D, r0,
                                       dq_sums, dk_sums, stream);
    if (p.R < T) copy_gpu(dk, ld, scratch + p.dk, B * T, D, stream);
    if (!dbias || dk_summed) return; // else the sums of what has none yet; no column is turned
    rope_backward_gpu(summed ? dk : dq, summed ? dbias + D : dbias, ld, {}, B * T, 0, summed ? D : 2 * D, sums, stream);
}

// gate_forward and dropout in one pass.
template <typename X>
static void gate_forward_gpu(X *out, const X *s, const X *g, int ld, Mask mask, int N, int D, cudaStream_t stream) {
    each(N, D, wide({D, ld}, {out, s, g}), stream, [=] __device__ (auto V, int n, int i) {
        float v[V], w[V], factor[V];
        int64_t at = (int64_t)n * D + i;
        read_some<V>(v, s + at);
        read_some<V>(w, g + (int64_t)n * ld + i);
        read_mask<V>(factor, mask, at);
        for (int e = 0; e < V; e++) v[e] *= w[e] * factor[e];
        write_some<V>(out + at, v);
    });
}

// gate_backward, with dropout: ds = mask ⊙ dout ⊙ g,   dg = mask ⊙ dout ⊙ s with its sums dg_bias
// ds may be dout, and dg may be g.
template <typename X>
static void gate_backward_gpu(X *ds, X *dg, float *dg_bias, const X *dout, const X *s, const X *g, int ld, Mask mask, int N, int D,
                              ColumnSums *sums, cudaStream_t stream) {
    each_with_sums({dg_bias}, sums, N, D, wide({D, ld}, {ds, dg, dout, s, g}), stream,
                   [=] __device__ (auto V, int n, int i, auto &sum) {
        float grad[V], v[V], w[V], factor[V];
        int64_t at = (int64_t)n * D + i, at_wide = (int64_t)n * ld + i;
        read_some<V>(grad, dout + at);
        read_some<V>(v, s + at);
        read_some<V>(w, g + at_wide);
        read_mask<V>(factor, mask, at);
        for (int e = 0; e < V; e++) {
            grad[e] *= factor[e];
            v[e] *= grad[e];
            w[e] *= grad[e];
            sum[0][e] += v[e];
        }
        write_some<V>(dg + at_wide, v);
        write_some<V>(ds + at, w);
    });
}

// A block takes a row of V logits, a thread every blockDim-th piece, with a running maximum: the row's loss logsumexp -
// logit of the target (0 if there is none), whether the target is the likeliest, and the logsumexp on all threads.
template <int V_, typename X>
static __device__ inline float crossentropy_forward_gpu(float *loss, char *hit, const X *row, int target, int V) {
    __shared__ float shared[32];
    float max = -1e30f, sum = 0, logit = target < 0 ? 0 : get(row[target]), counts = target >= 0;
    for (int i = threadIdx.x * V_; i < V; i += blockDim.x * V_) {
        float v[V_], top = max;
        read_some<V_>(v, row + i);
        if (i + V_ > V) for (int e = 0; e < V_; e++) v[e] = i + e < V ? v[e] : -INFINITY;
        for (int e = 0; e < V_; e++) top = fmaxf(top, v[e]);
        sum *= __expf(max - top);
        max = top;
        for (int e = 0; e < V_; e++) sum += __expf(v[e] - max);
    }
    float top = block_max(max, shared);
    sum = block_sum(sum * __expf(max - top), shared);
    float logsumexp = top + logf(sum);
    if (threadIdx.x == 0) {
        *loss = counts * (logsumexp - logit);
        *hit = target >= 0 && top <= logit && sum == sum;
    }
    return logsumexp;
}
// The row's gradient with dloss 1, softmax - 1 at the target: the products behind it scale. The second reading of the row
// comes from the L2 cache. The piece at the end of the row may reach past V, not past ld; there drow is 0. drow may be row.
template <int V_, typename X>
static __device__ inline void crossentropy_backward_gpu(X *drow, const X *row, float logsumexp, int target, int V) {
    if (target < 0) logsumexp = INFINITY; // all 0
    for (int i = threadIdx.x * V_; i < V; i += blockDim.x * V_) {
        float v[V_];
        read_some<V_>(v, row + i);
        for (int e = 0; e < V_; e++) v[e] = __expf(v[e] - logsumexp);
        if (target / V_ == i / V_ && target >= 0) for (int e = 0; e < V_; e++) v[e] -= i + e == target;
        if (i + V_ > V) for (int e = 0; e < V_; e++) v[e] = i + e < V ? v[e] : 0;
        write_some<V_>(drow + i, v);
    }
}
// Both, the second unless dlogits is NULL. Rows are ld apart.
template <int V_, typename X>
__global__ void crossentropy_kernel(float *losses, char *hits, X *dlogits, const X *logits, int64_t ld,
                                    const int *targets, int V) {
    wait_for_results();
    int target = targets[blockIdx.x];
    const X *row = logits + blockIdx.x * ld;
    float logsumexp = crossentropy_forward_gpu<V_>(losses + blockIdx.x, hits + blockIdx.x, row, target, V);
    if (dlogits) crossentropy_backward_gpu<V_>(dlogits + blockIdx.x * ld, row, logsumexp, target, V);
}
template <typename X>
static void crossentropy_gpu(float *losses, char *hits, X *dlogits, const X *logits, int64_t ld, const int *targets,
                             int N, int V, cudaStream_t stream) {
    int threads = V > 4096 ? 1024 : V > 1024 ? 256 : 32;
    LAUNCH((wide({ld}, {logits}) ? crossentropy_kernel<8, X> : crossentropy_kernel<1, X>), N, threads, 0, stream, losses, hits,
           dlogits, logits, ld, targets, V);
}

// ----------------------------------------------------------------------------
// layers of the Mamba-2 mixer

__device__ static inline float sigmoid_gpu(float x) { return 1 / (1 + __expf(-x)); }

// A thread takes one channel of CONV_ROWS positions in turn, the latest inputs in registers: last[lag] is that of `lag` before. Reads
// for CONV_AHEAD positions are on their way at once.
enum { CONV_AHEAD = 8, CONV_ROWS = 4 * CONV_AHEAD - (TAPS - 1) };
template <typename X> struct Conv {
    const X *inp, *tail;
    const float *weight, *bias;
    int ld, T, W, first, pieces; // of CONV_ROWS positions in a sequence
    __device__ float input(int b, int t, int c) const {
        if (t < 0 || t >= T) return 0;
        return get(t < first ? tail[t % (TAPS - 1) * W + c] : __ldg(inp + ((int64_t)b * (T - first) + t - first) * ld + c));
    }
    __device__ void start(float taps[TAPS], float last[TAPS], int b, int t, int c) const {
        for (int lag = 0; lag < TAPS; lag++) {
            taps[lag] = weight[c * TAPS + TAPS - 1 - lag];
            last[lag] = input(b, t - 1 - lag, c);
        }
    }
    __device__ float next(float last[TAPS], const float taps[TAPS], float x, int c) const { // u, before SiLU
        for (int lag = TAPS - 1; lag > 0; lag--) last[lag] = last[lag - 1];
        last[0] = x;
        float sum = __ldg(bias + c);
        for (int lag = 0; lag < TAPS; lag++) sum += taps[lag] * last[lag];
        return sum;
    }
};
template <typename X>
static void conv_forward_gpu(X *out, const X *inp, int ld, X *tail, const float *weight, const float *bias, int B, int T,
                             int W, int first, cudaStream_t stream) {
    int rows = T - first, from = rows > TAPS - 1 ? rows - (TAPS - 1) : 0;
    Conv<X> f = {inp, tail, weight, bias, ld, T, W, first, (rows + CONV_ROWS - 1) / CONV_ROWS};
    each((int64_t)B * f.pieces, W, 0, stream, [=] __device__ (auto, int item, int c) {
        int b = item / f.pieces, t0 = first + item % f.pieces * CONV_ROWS, end = min(T, t0 + CONV_ROWS);
        float taps[TAPS], last[TAPS], x[CONV_AHEAD];
        f.start(taps, last, b, t0, c);
        for (int t = t0; t < end; t += CONV_AHEAD) {
            for (int i = 0; i < CONV_AHEAD; i++) x[i] = f.input(b, t + i, c);
            for (int i = 0; i < CONV_AHEAD; i++) {
                float u = f.next(last, taps, x[i], c);
                if (t + i < end) out[((int64_t)b * rows + t + i - first) * W + c] = to<X>(u * sigmoid_gpu(u));
            }
        }
    });
    if (tail) each(rows - from, W, 0, stream, [=] __device__ (auto, int n, int c) { // row n of those to remember
        tail[(first + from + n) % (TAPS - 1) * W + c] = inp[(int64_t)(from + n) * ld + c];
    });
}

// dinp, and partial sums of dweight and dbias: the warps of a block take pieces of a sequence, du_t of which is known three
// positions before dinp_{t-3} can be written.
template <typename X>
__global__ void __launch_bounds__(256, 3) conv_backward_kernel(X *dinp, float *partial, const X *dout, Conv<X> f, int items) {
    __shared__ float parts[8][TAPS + 1][32];
    wait_for_results();
    int c = blockIdx.x * 32 + threadIdx.x;
    float sums[TAPS + 1] = {};
    for (int item = blockIdx.y * 8 + threadIdx.y; item < items && c < f.W; item += gridDim.y * 8) {
        int b = item / f.pieces, t0 = item % f.pieces * CONV_ROWS;
        float taps[TAPS], last[TAPS], du[TAPS] = {}, x[CONV_AHEAD], grad[CONV_AHEAD];
        f.start(taps, last, b, t0, c);
#pragma unroll 1
        for (int ahead = t0; ahead < min(f.T, t0 + CONV_ROWS) + TAPS - 1; ahead += CONV_AHEAD) {
            for (int i = 0; i < CONV_AHEAD; i++) {
                x[i] = f.input(b, ahead + i, c);
                grad[i] = ahead + i < f.T ? get(__ldg(dout + ((int64_t)b * f.T + ahead + i) * f.W + c)) : 0;
            }
            for (int i = 0; i < CONV_AHEAD; i++) {
                int own = ahead + i < t0 + CONV_ROWS, at = ahead + i - (TAPS - 1);
                float u = f.next(last, taps, x[i], c), s = sigmoid_gpu(u), sum = 0;
                for (int lag = TAPS - 1; lag > 0; lag--) du[lag] = du[lag - 1];
                du[0] = grad[i] * s * (1 + u * (1 - s));
                for (int lag = 0; lag < TAPS; lag++) {
                    sum += taps[lag] * du[TAPS - 1 - lag];
                    sums[TAPS - 1 - lag] += own ? du[0] * last[lag] : 0;
                }
                sums[TAPS] += own ? du[0] : 0;
                if (at >= t0 && at < min(f.T, t0 + CONV_ROWS)) dinp[((int64_t)b * f.T + at) * f.ld + c] = to<X>(sum);
            }
        }
    }
    for (int k = 0; k <= TAPS; k++) parts[threadIdx.y][k][threadIdx.x] = sums[k];
    __syncthreads();
    int k = threadIdx.y;
    if (k > TAPS || c >= f.W) return;
    float sum = 0;
    for (int y = 0; y < 8; y++) sum += parts[y][k][threadIdx.x];
    partial[(int64_t)blockIdx.y * (TAPS + 1) * f.W + (k < TAPS ? c * TAPS + k : f.W * TAPS + c)] = sum;
}
static int conv_chunks(int B, int T, int W) {
    int pieces = (T + CONV_ROWS - 1) / CONV_ROWS;
    return min_int((B * pieces + 7) / 8, 1 + BLOCKS_AT_ONCE * GROUP_COLUMNS / W);
}
template <typename X>
static void conv_backward_gpu(X *dinp, float *dweight, float *dbias, const X *dout, const X *inp, int ld, const float *weight,
                              const float *bias, int B, int T, int W, ColumnSums *sums, cudaStream_t stream) {
    int pieces = (T + CONV_ROWS - 1) / CONV_ROWS, stride = (TAPS + 1) * W, chunks = conv_chunks(B, T, W);
    float *partial = sums_place(sums, (int64_t)chunks * stride);
    Conv<X> f = {inp, NULL, weight, bias, ld, T, W, 0, pieces};
    LAUNCH(conv_backward_kernel<X>, dim3((W + 31) / 32, chunks), dim3(32, 8), 0, stream, dinp, partial, dout, f,
           B * pieces);
    column_sum(sums, dweight, partial, chunks, stride, TAPS * W);
    column_sum(sums, dbias, partial + TAPS * W, chunks, stride, W);
}

// A thread takes one head of one row, forward and backward.
template <typename X>
static void step_forward_gpu(float *step, const X *inp, int ld, const float *bias, int N, int heads, cudaStream_t stream) {
    each(N, heads, 0, stream, [=] __device__ (auto, int n, int h) {
        float x = get(inp[(int64_t)n * ld + h]) + bias[h];
        step[(int64_t)n * heads + h] = x > 30 ? x : log1pf(expf(x));
    });
}

template <typename X>
static void step_backward_gpu(X *dinp, float *dbias, const float *dstep, int ld_dstep, const X *inp, int ld, const float *bias,
                              int N, int heads, ColumnSums *sums, cudaStream_t stream) {
    each_with_sums({dbias}, sums, N, heads, 0, stream, [=] __device__ (auto, int n, int h, auto &sum) {
        float grad = dstep[(int64_t)n * ld_dstep + h] * sigmoid_gpu(get(inp[(int64_t)n * ld + h]) + bias[h]);
        dinp[(int64_t)n * ld + h] = to<X>(grad);
        sum[0][0] += grad;
    });
}

// A matrix in shared memory, its element (i, j) at[i·ld + j] or, transposed, at[j·ld + i]. With PARTS 2 it is the sum of two, `low`
// numbers apart, what bf16 keeps of each number and what it keeps of the rest: products of it are as exact as with 16 bits.
template <typename X, int PARTS = 1> struct SharedMatrix {
    X *at;
    int ld, low, triangle, transposed;
    __device__ X *operator()(int i, int j, int part = 0) const { return at + part * low + (transposed ? j * ld + i : i * ld + j); }
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

// 16 rows and columns of it, from (i, j), as mma wants them: a thread has two neighbours in row lane / 4, those 8 rows below,
// then the same 8 columns further.
template <int PARTS>
__device__ static inline void fragment(uint32_t x[4], SharedMatrix<bf16, PARTS> a, int i, int j, int part) {
    int lane = threadIdx.x % 32, down = lane / 8 % 2 * 8, right = lane / 16 * 8;
    bf16 *row = a.transposed ? a(i + down, j + right + lane % 8, part) : a(i + down + lane % 8, j + right, part);
    uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    if (a.transposed) asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]),
                                   "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at) : "memory");
    else asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]),
                      "=r"(x[2]), "=r"(x[3]) : "r"(at) : "memory");
}

// A warp: 16 rows from i and 32 columns from j of a·b, or of (a ⊙ scale)·b with a scale for each column of a, are added to sum,
// where [q][e] stands in row i + lane / 4 + e / 2 · 8 and column j + 8q + lane % 4 · 2 + e % 2.
template <int SCALED = 0, int A, int B>
__device__ static inline void add_product(float sum[4][4], SharedMatrix<bf16, A> a, SharedMatrix<bf16, B> b, int i, int j, int K,
                                          const float *scale = NULL) {
    constexpr int parts = (SCALED ? 2 : A) * B;
    for (int k = a.first(i); k < a.end(i, K); k += 16) {
        uint32_t x[2][4], y[B][2][4];
        for (int part = 0; part < A; part++) fragment(x[part], a, i, k, part);
        for (int part = 0; part < B; part++)
            for (int half = 0; half < 2; half++) fragment(y[part][half], b.t(), j + 16 * half, k, part);
        for (int r = 0; r < 4 * SCALED; r++) { // two numbers in each
            float2 s = *(const float2 *)(scale + k + threadIdx.x % 4 * 2 + r / 2 * 8);
            float first = __uint_as_float(x[0][r] << 16) * s.x, second = __uint_as_float(x[0][r] & 0xffff0000) * s.y;
            x[0][r] = pack_two(first, second);
            x[1][r] = pack_two(first - __uint_as_float(x[0][r] << 16), second - __uint_as_float(x[0][r] & 0xffff0000));
        }
        for (int part = 0; part < parts; part++)
            for (int q = 0; q < 4; q++) {
                const uint32_t *u = x[part / B], *v = y[part % B][q / 2] + q % 2;
                asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                    "{%0, %1, %2, %3};" : "+f"(sum[q][0]), "+f"(sum[q][1]), "+f"(sum[q][2]), "+f"(sum[q][3])
                    : "r"(u[0]), "r"(u[1]), "r"(u[2]), "r"(u[3]), "r"(v[0]), "r"(v[2]));
            }
    }
}
template <int SCALED = 0>
__device__ static inline void add_product(float sum[4][4], SharedMatrix<float> a, SharedMatrix<float> b, int i, int j, int K,
                                          const float *scale = NULL) {
    int row = i + threadIdx.x % 32 / 4, column = j + threadIdx.x % 4 * 2;
    for (int k = a.first(i); k < a.end(i, K); k++)
        for (int e = 0; e < 4; e++) {
            float x = *a(row + e / 2 * 8, k) * (SCALED ? scale[k] : 1);
            for (int q = 0; q < 4; q++) sum[q][e] += x * *b(k, column + q * 8 + e % 2);
        }
}

// A block: out of between(a b) + (a2 ⊙ scale) b2, M by N and some rows and columns more, with K and K2 numbers in each sum. Both get
// (r, i, j, v): v[0] and v[1] are those of row i in columns j and j + 1. Each row belongs to two warps of the eight and within them
// to the four threads that agree in lane / 4; a thread's rows of 64 are r = 0 and 1.
enum { SCAN_THREADS = 256, SCAN_ROWS = 64 };
template <int SCALED = 0, typename A, typename B, typename Between, typename A2, typename B2, typename Out>
__device__ inline void block_products(int M, int N, int K, A a, B b, Between between, int K2, A2 a2, B2 b2, Out out,
                                      const float *scale = NULL) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i0 = warp % 4 * 16; i0 < M; i0 += 64)
        for (int j0 = warp / 4 * 32; j0 < N; j0 += 64) {
            float sum[4][4] = {};
            auto all = [&](auto f) {
#pragma unroll
                for (int q = 0; q < 4; q++)
#pragma unroll
                    for (int r = 0; r < 2; r++) f(r, i0 + lane / 4 + 8 * r, j0 + q * 8 + lane % 4 * 2, sum[q] + 2 * r);
            };
            add_product(sum, a, b, i0, j0, K);
            all(between);
            add_product<SCALED>(sum, a2, b2, i0, j0, K2, scale);
            all(out);
        }
}

// The scan. A block takes one head of one sequence and walks along its chunks. What a product reads of a chunk lies in shared
// memory as X, with zeros up to the next multiple of 32 rows and columns: inputs as they are, all else in two parts where X is
// bf16. Sums and gradients of L, decays and what is multiplied by them stay in float32 or more.
template <typename X> struct Scan {
    const X *xbc, *dy;
    const float *step, *A_log, *skip;
    int T, E, S, heads, P, rows, in_eights;
    template <typename Y> __device__ void store(Y *at, const float v[2], int columns) const { // those of v that are there
        if (in_eights && columns > 0) write_some<2>(at, v);
        else for (int e = 0; e < min(columns, 2); e++) at[e] = to<Y>(v[e]);
    }
};
struct ScanRows { // decay = exp(L), fade = exp(L_last - L), scale = fade Δ; 0 past the chunk's end. Below: parts of sums
    double L[SCAN_ROWS];
    float delta[SCAN_ROWS], decay[SCAN_ROWS], fade[SCAN_ROWS], scale[SCAN_ROWS], diagonal[SCAN_ROWS], skip[SCAN_ROWS];
    float left[2][SCAN_ROWS], below[4][SCAN_ROWS], read[2][SCAN_ROWS], taken[2][SCAN_ROWS], shared[32];
};

static int scan_bytes(int S, int w, int rows, int number, int backward) {
    int pad = 16 / number, ld_s = (int)round_up(S, 32) + pad, ld_w = (int)round_up(w, 32) + pad, parts = number == 2 ? 2 : 1;
    return (int)sizeof(ScanRows) + number * (rows * (2 * ld_s + (1 + backward) * (ld_w + parts * (rows + pad)))
                                             + (1 + backward) * parts * (int)round_up(S, 32) * ld_w);
}
// The most rows of a chunk for which the shared memory suffices. 0: it does not
static int scan_rows(int S, int w, int number) {
    int most = 0;
    CUDA(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    for (int rows = SCAN_ROWS; rows; rows -= 32)
        if (scan_bytes(S, w, rows, number, 1) <= most) return rows;
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
    __device__ ScanBlock(const Scan<X> &scan, uint4 *memory, int backward) : s(scan), head(blockIdx.x), w(s.E / s.heads) {
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
    __device__ void fetch_pieces(SharedMatrix<X, N> m, const Y *from, int64_t ld, int rows, int width, int all_rows) const {
        int pieces = (width + 31) / 32 * 32 / V;
#pragma unroll 4
        for (int item = threadIdx.x; item < all_rows * pieces; item += SCAN_THREADS) {
            int i = item / pieces, j = item % pieces * V, inside = i < rows && j < width;
            const Y *at = inside ? from + i * ld + j : from;
            if constexpr (V == 8 && sizeof(X) == 2 && sizeof(Y) == 2)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"((uint32_t)__cvta_generic_to_shared(m(i, j))),
                             "l"(at), "r"(inside * 16) : "memory");
            else {
                float v[V] = {};
                if (inside) read_some<V>(v, at);
                m.template set<V>(i, j, v);
            }
        }
    }
    template <int N, typename Y>
    __device__ void fetch(SharedMatrix<X, N> m, const Y *from, int64_t ld, int rows, int width, int all_rows) const {
        if (s.in_eights) fetch_pieces<8>(m, from, ld, rows, width, all_rows);
        else fetch_pieces<1>(m, from, ld, rows, width, all_rows);
    }
    // The chunk of row t0: its inputs and the first six lines of ScanRows, backward with the state before it. Lane l of the
    // first warp takes rows 2l and 2l + 1.
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
        asm volatile("cp.async.wait_all;" : : : "memory");
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
    // M = (c b^T) ⊙ fades ⊙ Δ + skip·I, backward dM = (dy x^T) ⊙ fades ⊙ Δ; of (c b^T) ⊙ fades ⊙ (dy x^T) the diagonal, what lies
    // below it in each column, and, times Δ, left of it in each row.
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

// carried (B,S,E): the state before position 0 of this call, then after its last; NULL: 0, and nothing is wanted.
template <typename X>
__global__ void __launch_bounds__(SCAN_THREADS, 3) scan_sequence_kernel(X *y, float *states, float *carried, Scan<X> s) {
    extern __shared__ uint4 scan_memory[];
    wait_for_results();
    ScanBlock<X> k(s, scan_memory, 0);
    int64_t size = (int64_t)s.S * s.E, own = k.head * k.w, chunks = (s.T + s.P - 1) / s.P;
    float *state = states + blockIdx.y * chunks * size + own, *last = carried ? carried + blockIdx.y * size + own : NULL;
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
        block_products(k.n, k.w, s.S, k.c, k.h, [&](int, int t, int, float *v) { scale_pair(v, k.r->decay[t]); },
                       k.n, k.M, k.x, [&](int, int t, int e, float *v) {
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

// All gradients of a head, see scan_head_backward; partial (N,heads,2S) is the head's part of db and dc. The sum of dL from t to the
// chunk's end is that of dM ⊙ M over rows from t on and columns before t, with what was read of the state from t on, what it took
// before t, and what was carried. It is taken from sums of rows and of columns without the diagonal, which is in neither: where
// states decay at once the rest is small beside it, and rounding the whole would leave little of the rest.
template <typename X>
__global__ void __launch_bounds__(SCAN_THREADS, 2) scan_sequence_backward_kernel(X *dxbc, float *dstep, float *partial,
                                                                                 const float *states, Scan<X> s) {
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
        block_products(n, w, S, k.b, k.dh, [&](int, int j, int, float *v) { scale_pair(v, r->scale[j]); },
                       n, k.M.t(), k.dy, [&](int, int j, int e, float *v) { s.store(dx + (int64_t)j * W + e, v, j < n ? w - e : 0); });
        block_products(n, S, w, k.x, k.dh.t(), [&](int q, int j, int i, float *v) {
                           float b[2];
                           k.b.template read<2>(j, i, b);
                           taken[q] += b[0] * v[0] + b[1] * v[1];
                           scale_pair(v, r->scale[j]);
                       }, n, k.dM.t(), k.c, [&](int, int j, int i, float *v) { s.store(part + j * next + i, v, j < n ? S - i : 0); });
        block_products(n, S, w, k.dy, k.h.t(), [&](int q, int t, int i, float *v) {
                           float c[2];
                           k.c.template read<2>(t, i, c);
                           scale_pair(v, r->decay[t]);
                           read[q] += c[0] * v[0] + c[1] * v[1];
                       }, n, k.dM, k.b, [&](int, int t, int i, float *v) { s.store(part + t * next + S + i, v, t < n ? S - i : 0); });
        k.row_parts(r->taken, taken);
        k.row_parts(r->read, read);
        __syncthreads();
        block_products<1>(S, w, 0, k.c, k.dy, [&](int, int i, int e, float *v) {
                              float h[2];
                              k.h.template read<2>(i, e, h);
                              k.dh.template read<2>(i, e, v);
                              scale_pair(v, r->decay[n - 1]);
                              carried += h[0] * v[0] + h[1] * v[1];
                          }, n, k.c.t(), k.dy, [&](int, int i, int e, float *v) { k.dh.template set<2>(i, e, v); }, r->decay);
        carried = block_sum(carried, r->shared);
        if (threadIdx.x >= 32) continue;
        double of_row[2] = {}, of_taken[2] = {}, ddelta[2] = {}; // of rows 2·lane and 2·lane + 1
        for (int i = 0, t = 2 * threadIdx.x; i < 2; i++, t++) {
            if (t >= n) continue;
            float below = r->below[0][t] + r->below[1][t] + r->below[2][t] + r->below[3][t], taken = r->taken[0][t] + r->taken[1][t];
            of_row[i] = (double)(r->left[0][t] + r->left[1][t] + r->read[0][t] + r->read[1][t]) - (double)(below * r->delta[t]);
            of_taken[i] = r->scale[t] * taken;
            ddelta[i] = below + r->diagonal[t] + r->fade[t] * taken;
        }
        double rows = prefix_sum(of_row[0] + of_row[1]), takes = prefix_sum(of_taken[0] + of_taken[1]), all = __shfl_sync(~0u, rows, 31);
        for (int i = 1, t = 2 * threadIdx.x + 1; i >= 0; i--, t--) {
            rows -= of_row[i]; // of the rows before t
            takes -= of_taken[i];
            if (t >= n) continue;
            float *row = dstep + (k.row + t) * 3 * s.heads + k.head, sum = (float)(carried + all - rows + takes);
            row[0] = (float)ddelta[i] - rate * sum;
            row[s.heads] = -rate * r->delta[t] * sum;
            row[2 * s.heads] = r->skip[t];
        }
    }
}
// Numbers of scratch: partial gradients of b and c of each head.
static int64_t scan_scratch_gpu(int B, int T, int S, int heads) { return (int64_t)B * T * heads * 2 * S; }

// states (B,chunks,S,E) is kept for the backward pass. P 0: chunks as large as the shared memory allows
template <typename X>
static Scan<X> scan_of(const X *xbc, const X *dy, const float *step, const float *A_log, const float *skip, int T, int E, int S,
                       int heads, int P) {
    int w = E / heads, rows = scan_rows(S, w, sizeof(X));
    return {xbc, dy, step, A_log, skip, T, E, S, heads, P > 0 ? min_int(P, rows) : rows, rows, wide({S, w}, {xbc, dy})};
}
template <typename X>
static void scan_forward_gpu(X *y, float *states, float *carried, const X *xbc, const float *step, const float *A_log,
                             const float *skip, int B, int T, int E, int S, int heads, int P, cudaStream_t stream) {
    Scan<X> s = scan_of(xbc, (const X *)NULL, step, A_log, skip, T, E, S, heads, P);
    int bytes = scan_bytes(S, E / heads, s.rows, sizeof(X), 0);
    allow_shared(scan_sequence_kernel<X>, bytes);
    LAUNCH(scan_sequence_kernel<X>, dim3(heads, B), SCAN_THREADS, bytes, stream, y, states, carried, s);
}
template <typename X>
static void scan_backward_gpu(X *dxbc, float *dstep, float *dA_log, float *dskip, Scratch scratch, const X *dy,
                              const float *states, const X *xbc, const float *step, const float *A_log,
                              const float *skip, int B, int T, int E, int S, int heads, int P, ColumnSums *sums,
                              cudaStream_t stream) {
    Scan<X> s = scan_of(xbc, dy, step, A_log, skip, T, E, S, heads, P);
    int bytes = scan_bytes(S, E / heads, s.rows, sizeof(X), 1);
    float *parts = borrow(scratch, scan_scratch_gpu(B, T, S, heads));
    allow_shared(scan_sequence_backward_kernel<X>, bytes);
    LAUNCH(scan_sequence_backward_kernel<X>, dim3(heads, B), SCAN_THREADS, bytes, stream, dxbc, dstep, parts,
           states, s);
    each((int64_t)B * T, 2 * S, s.in_eights, stream, [=] __device__ (auto V, int n, int i) { // db and dc: the heads' in their order
        float sum[V] = {}, part[V];
        for (int h = 0; h < heads; h++) {
            read_some<V>(part, parts + ((int64_t)n * heads + h) * 2 * S + i);
            for (int e = 0; e < V; e++) sum[e] += part[e];
        }
        write_some<V>(dxbc + (int64_t)n * (E + 2 * S) + E + i, sum);
    });
    each_with_sums({dA_log, dskip}, sums, B * T, heads, 0, stream, [=] __device__ (auto, int n, int h, auto &sum) {
        const float *row = dstep + (int64_t)n * 3 * heads + heads + h;
        sum[0][0] += row[0];
        sum[1][0] += row[heads];
    });
}

template <typename X>
static void gated_rmsnorm_forward_gpu(X *out, float *rstd, const X *y, const X *z, int ld, const float *weight, int N, int E,
                                      cudaStream_t stream) {
    rows(N, E, wide({E, ld}, {out, y, z, weight}), 0, stream, [=] __device__ (auto V, auto PIECES) {
        __shared__ float2 shared[ROW_BLOCK / 32];
        int n = last_first();
        if (n >= N) return;
        float v[PIECES][V], squares = 0;
        for (int p = 0, i = threadIdx.x * V; p < PIECES && i < E; p++, i += blockDim.x * V) {
            float gate[V];
            read_some<V>(v[p], y + (int64_t)n * E + i);
            read_some<V>(gate, z + (int64_t)n * ld + i);
            for (int e = 0; e < V; e++) {
                v[p][e] *= gate[e] * sigmoid_gpu(gate[e]);
                squares += v[p][e] * v[p][e];
            }
        }
        float r = rsqrtf(row_sum(squares, 0, shared).x / E + 1e-5f);
        for (int p = 0, i = threadIdx.x * V; p < PIECES && i < E; p++, i += blockDim.x * V) {
            float w[V];
            read_some<V>(w, weight + i);
            for (int e = 0; e < V; e++) v[p][e] *= r * w[e];
            write_some<V>(out + (int64_t)n * E + i, v[p]);
        }
        if (threadIdx.x == 0) rstd[n] = r;
    });
}

template <typename X>
static void gated_rmsnorm_backward_gpu(X *dy, X *dz, float *dweight, const X *dout, const X *y, const X *z, int ld,
                                       const float *rstd, const float *weight, int N, int E, ColumnSums *sums, cudaStream_t stream) {
    int in_eights = wide({E, ld}, {dy, dz, dout, y, z, weight});
    each_with_sums({dweight}, sums, N, E, in_eights, stream, [=] __device__ (auto V, int n, int i, auto &sum) {
        float g[V], v[V], gate[V];
        read_some<V>(g, dout + (int64_t)n * E + i);
        read_some<V>(v, y + (int64_t)n * E + i);
        read_some<V>(gate, z + (int64_t)n * ld + i);
        for (int e = 0; e < V; e++) sum[0][e] += g[e] * v[e] * gate[e] * sigmoid_gpu(gate[e]) * rstd[n];
    });
    rows(N, E, in_eights, 0, stream, [=] __device__ (auto V, auto PIECES) {
        __shared__ float2 shared[ROW_BLOCK / 32];
        int n = last_first();
        if (n >= N) return;
        float g[PIECES][V], v[PIECES][V], gate[PIECES][V], dot = 0, r = rstd[n];
        for (int p = 0, i = threadIdx.x * V; p < PIECES && i < E; p++, i += blockDim.x * V) {
            float w[V];
            read_some<V>(w, weight + i);
            read_some<V>(g[p], dout + (int64_t)n * E + i);
            read_some<V>(v[p], y + (int64_t)n * E + i);
            read_some<V>(gate[p], z + (int64_t)n * ld + i);
            for (int e = 0; e < V; e++) dot += (g[p][e] *= w[e]) * v[p][e] * gate[p][e] * sigmoid_gpu(gate[p][e]);
        }
        dot = row_sum(dot, 0, shared).x * r * r / E;
        for (int p = 0, i = threadIdx.x * V; p < PIECES && i < E; p++, i += blockDim.x * V) {
            for (int e = 0; e < V; e++) {
                float s = sigmoid_gpu(gate[p][e]), silu = gate[p][e] * s, dv = r * (g[p][e] - v[p][e] * silu * dot);
                v[p][e] *= dv * s * (1 + gate[p][e] * (1 - s));
                g[p][e] = dv * silu;
            }
            write_some<V>(dz + (int64_t)n * ld + i, v[p]);
            write_some<V>(dy + (int64_t)n * E + i, g[p]);
        }
    });
}

// ----------------------------------------------------------------------------
// generation: one token behind those that every layer knows, in five launches a layer. Its place is in the device's
// memory, so that all launches are one recording.

// weight (rows,D) times vec, which begin(vec, shared) puts into shared memory once a block. A warp takes two neighbouring
// rows; end(row, sum, vec, shared) is given their products. more: bytes behind vec.
template <int V, typename X, typename Begin, typename End>
__global__ void __launch_bounds__(128) decode_kernel(const X *weight, int rows, int D, Begin begin, End end) {
    extern __shared__ float vec[];
    __shared__ float shared[32];
    int row = 2 * (blockIdx.x * 4 + threadIdx.x / 32);
    for (int r = row; r < row + 2 && r < rows; r++) // on their way to the L2 cache
        for (int i = threadIdx.x % 32 * 64; i < D; i += 32 * 64)
            asm volatile("prefetch.global.L2 [%0];" : : "l"(weight + (int64_t)r * D + i));
    wait_for_results();
    begin(vec, shared);
    __syncthreads();
    if (row >= rows) return;
    float2 sum = {0, 0};
    const X *first = weight + (int64_t)row * D, *second = row + 1 < rows ? first + D : first;
#pragma unroll 4
    for (int i = threadIdx.x % 32 * V; i < D; i += 32 * V) {
        float a[V], b[V], x[V];
        read_some<V>(a, first + i);
        read_some<V>(b, second + i);
        read_some<V>(x, vec + i);
        for (int e = 0; e < V; e++) { sum.x += a[e] * x[e]; sum.y += b[e] * x[e]; }
    }
    sum = {warp_sum(sum.x), warp_sum(sum.y)};
    if (threadIdx.x % 32 == 0) end(row, sum, vec, shared);
}
template <typename X, typename Begin, typename End>
static void decode(const X *weight, int rows, int D, int more, int extra_blocks, cudaStream_t stream, Begin begin, End end) {
    int blocks = (rows + 7) / 8 + extra_blocks, bytes = D * (int)sizeof(float) + more;
    LAUNCH((wide({D}, {weight}) ? decode_kernel<8, X, Begin, End> : decode_kernel<1, X, Begin, End>), blocks, 128, bytes, stream,
           weight, rows, D, begin, end);
}

// [9, 10, 11], and the last LayerNorm with the head: out = W LayerNorm(x) + b, and GELU on the first `gelu` rows
template <typename X, typename O>
static void decode_in_gpu(O *out, const float *x, const float *ln_weight, const float *ln_bias, const X *weight, const X *bias,
                          int rows, int D, int gelu, cudaStream_t stream) {
    decode(weight, rows, D, 0, 0, stream, [=] __device__ (float *vec, float *shared) {
        float sum = 0, squares = 0;
        for (int i = threadIdx.x; i < D; i += 128) sum += vec[i] = x[i];
        float m = block_sum(sum, shared) / D;
        for (int i = threadIdx.x; i < D; i += 128) squares += (vec[i] - m) * (vec[i] - m);
        float r = 1 / sqrtf(block_sum(squares, shared) / D + 1e-5f);
        for (int i = threadIdx.x; i < D; i += 128) vec[i] = get(to<X>((vec[i] - m) * r * ln_weight[i] + ln_bias[i]));
    }, [=] __device__ (int row, float2 sum, const float *, const float *) {
        for (int r = row; r < row + 2 && r < rows; r++) {
            float v = (r == row ? sum.x : sum.y) + (bias ? get(bias[r]) : 0);
            out[r] = to<O>(r < gelu ? gelu_gpu(get(to<X>(v))) : v);
        }
    });
}
// [14, 18]: the projections of ā, turned by RoPE, to their place in the cache; the block after the last row: the gain
template <typename X>
static void decode_projections_gpu(X *proj, float *gamma, const X *abar, const X *weight, const X *bias,
                                   const float *gamma_weight, const float *gamma_bias, float gamma_max, Rope rope,
                                   const int *first, int rows, int D, int turned, cudaStream_t stream) {
    decode(weight, rows, D, 0, 1, stream, [=] __device__ (float *vec, float *shared) {
        float dot = 0;
        int gain = blockIdx.x == gridDim.x - 1 && gamma_weight;
        for (int i = threadIdx.x; i < D; i += 128) {
            vec[i] = get(abar[i]);
            if (gain) dot += vec[i] * gamma_weight[i];
        }
        if (gain) dot = block_sum(dot, shared);
        if (gain && threadIdx.x == 0) gamma[0] = gain_forward_gpu(dot, gamma_bias[0], gamma_max);
    }, [=] __device__ (int row, float2 sum, const float *, const float *) {
        float v[2] = {get(to<X>(sum.x + get(bias[row]))), get(to<X>(sum.y + get(bias[row + 1])))};
        if (row < turned) turn_pairs<2>(v, rope, *first, row);
        X *out = proj + (int64_t)*first * rows + row;
        out[0] = to<X>(v[0]);
        out[1] = to<X>(v[1]);
    });
}

// [15, 16, 17, 19]: the rows are dealt to `splits` blocks a head, and to as many blocks as all heads have for the
// feedback, a head of its own, D wide, over the strict past, with s for values. A block leaves its maximum, its Σ e and
// its Σ e v, part_size numbers.
enum { DECODE_KEYS = 64, DECODE_THREADS = 256 };
static int decode_splits(int H) { return H > 192 ? 1 : 192 / H; }

// weight[j] = scale q·k_j of n keys, the others -INFINITY: `lanes` threads a key, ROUNDS keys of theirs at once
template <int V, int ROUNDS, typename X>
__device__ inline void decode_logits(float *weight, const X *q, const X *k, int64_t ld, int n, int width, int lanes,
                                     float scale) {
    int first = threadIdx.x / lanes, apart = DECODE_THREADS / lanes;
    float dot[ROUNDS] = {}, a[V], b[ROUNDS][V];
    for (int i = threadIdx.x % lanes * V; i < width; i += lanes * V) {
        read_some<V>(a, q + i);
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) read_some<V>(b[r], k + min(first + r * apart, n - 1) * ld + i);
#pragma unroll
        for (int r = 0; r < ROUNDS; r++)
            for (int e = 0; e < V; e++) dot[r] += a[e] * b[r][e];
    }
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        int j = first + r * apart;
        for (int lane = lanes / 2; lane; lane /= 2) dot[r] += __shfl_xor_sync(~0u, dot[r], lane);
        if (threadIdx.x % lanes == 0 && j < DECODE_KEYS) weight[j] = j < n ? scale * dot[r] : -INFINITY;
    }
}
template <int V, typename X>
__global__ void decode_attention_kernel(float *parts, const X *proj, const X *s, const int *first, int E, int D, int H,
                                        int G, int splits) {
    extern __shared__ float sums[]; // for each group of threads that spans the width
    __shared__ float weight[DECODE_KEYS];
    wait_for_results();
    int d = D / H, head = blockIdx.x / splits, feedback = head >= H, width = feedback ? D : d, lanes = 1,
        part = feedback ? blockIdx.x - H * splits : blockIdx.x % splits, all = feedback ? H * splits : splits,
        t = *first, keys = t + !feedback, ld = feedback ? D : E, kv = head / (H / G) * d;
    const X *q = proj + (int64_t)t * E + (feedback ? E - 2 * D : head * d), *k = proj + (feedback ? E - D : D + kv),
        *v = feedback ? s : proj + D + G * d + kv;
    int from = (int)((int64_t)keys * part / all), end = (int)((int64_t)keys * (part + 1) / all);
    int pieces = width / V, groups = pieces < DECODE_THREADS ? DECODE_THREADS / pieces : 1;
    while (lanes < 32 && lanes * V < width) lanes *= 2; // of a key's product
    float max = -INFINITY, total = 0, scale = 1 / sqrtf((float)width);
    for (int i = threadIdx.x; i < groups * width; i += DECODE_THREADS) sums[i] = 0;
    for (int j0 = from; j0 < end; j0 += DECODE_KEYS) {
        int n = min(DECODE_KEYS, end - j0);
        if (lanes == 32) decode_logits<V, 8>(weight, q, k + (int64_t)j0 * E, E, n, width, lanes, scale);
        else if (lanes == 16) decode_logits<V, 4>(weight, q, k + (int64_t)j0 * E, E, n, width, lanes, scale);
        else decode_logits<V, 2>(weight, q, k + (int64_t)j0 * E, E, n, width, lanes, scale);
        __syncthreads();
        float top = max, sum = 0;
        for (int j = 0; j < n; j++) top = fmaxf(top, weight[j]);
        float shrink = __expf(max - top);
        max = top;
        for (int j = 0; j < n; j++) sum += __expf(weight[j] - max);
        total = total * shrink + sum;
        for (int piece = threadIdx.x % (pieces < DECODE_THREADS ? pieces : DECODE_THREADS),
             group = threadIdx.x / (pieces < DECODE_THREADS ? pieces : DECODE_THREADS); piece < pieces && group < groups;
             piece += DECODE_THREADS) {
            float *sum_at = sums + group * width + piece * V, acc[V], x[V];
            read_some<V>(acc, sum_at);
            for (int e = 0; e < V; e++) acc[e] *= shrink;
            for (int j1 = group; j1 < n; j1 += 4 * groups)
#pragma unroll
                for (int j = j1; j < j1 + 4 * groups; j += groups) { // four rows on their way at once
                    float e_j = j < n ? __expf(weight[j] - max) : 0;
                    read_some<V>(x, v + (int64_t)(j0 + min(j, n - 1)) * ld + piece * V);
                    for (int e = 0; e < V; e++) acc[e] += e_j * x[e];
                }
            write_some<V>(sum_at, acc);
        }
        __syncthreads();
    }
    __syncthreads();
    parts += (int64_t)blockIdx.x * (D + 2);
    if (threadIdx.x == 0) { parts[0] = max; parts[1] = total; }
    for (int i = threadIdx.x; i < width; i += DECODE_THREADS) {
        float sum = 0;
        for (int g = 0; g < groups; g++) sum += sums[g * width + i];
        parts[2 + i] = sum;
    }
}
template <typename X>
static void decode_attention_gpu(float *parts, const X *proj, const X *s, const int *first, int E, int D, int H, int G,
                                 int feedback, int splits, cudaStream_t stream) {
    int width = feedback ? D : D / H, floats = width > 8 * DECODE_THREADS ? width : 8 * DECODE_THREADS;
    LAUNCH((wide({D, D / H, E}, {proj, s}) ? decode_attention_kernel<8, X> : decode_attention_kernel<1, X>),
           (1 + feedback) * H * splits, DECODE_THREADS, floats * (int)sizeof(float), stream, parts, proj, s, first, E, D, H, G,
           splits);
}

// The direct read f = W_o o, [19-22] s = f + γ c and the gate: the parts of o, and of c, come together on the way.
// plain: no W_o, f = o
template <typename X>
static void decode_mix_gpu(X *s, X *gated, const float *parts, const float *gamma, const X *weight, const X *g,
                           const int *first, int D, int H, int splits, int feedback, int plain, cudaStream_t stream) {
    int more = (1 + feedback) * H * splits * (int)sizeof(float);
    decode(weight, D, D, more, 0, stream, [=] __device__ (float *vec, float *shared) {
        float *factor = vec + D;
        int d = D / H, all = H * splits;
        for (int head = threadIdx.x / 32; head < H + feedback; head += 4) { // a warp: e^(max - top)/Σ of a head's parts
            int begin = head * splits, n = head < H ? splits : all;
            float top = -INFINITY, sum = 0;
            for (int p = threadIdx.x % 32; p < n; p += 32) top = fmaxf(top, parts[(int64_t)(begin + p) * (D + 2)]);
            top = warp_max(top);
            for (int p = threadIdx.x % 32; p < n; p += 32) {
                const float *part = parts + (int64_t)(begin + p) * (D + 2);
                factor[begin + p] = top == -INFINITY ? 0 : __expf(part[0] - top);
                sum += factor[begin + p] * part[1];
            }
            sum = warp_sum(sum);
            for (int p = threadIdx.x % 32; p < n; p += 32) factor[begin + p] *= sum == 0 ? 0 : 1 / sum;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < D; i += 128) {
            float sum = 0;
#pragma unroll 8
            for (int p = i / d * splits; p < i / d * splits + splits; p++)
                sum += factor[p] * parts[(int64_t)p * (D + 2) + 2 + i % d];
            vec[i] = get(to<X>(sum));
        }
        __syncthreads();
        int row = 2 * (blockIdx.x * 4 + threadIdx.x / 32); // c of the warp's rows, to be read by its first lane
        float2 sum = {0, 0};
        for (int p = all + threadIdx.x % 32; p < 2 * all && feedback && row < D; p += 32) {
            const float *part = parts + (int64_t)p * (D + 2) + 2 + row;
            sum.x += factor[p] * part[0];
            sum.y += factor[p] * part[1];
        }
        sum = {warp_sum(sum.x), warp_sum(sum.y)};
        if (threadIdx.x % 32 == 0) ((float2 *)shared)[threadIdx.x / 32] = sum;
    }, [=] __device__ (int row, float2 f, const float *vec, const float *shared) {
        float2 c = ((const float2 *)shared)[threadIdx.x / 32];
        float both[2] = {plain ? vec[row] : f.x, plain ? vec[row + 1] : f.y}, past[2] = {c.x, c.y};
        for (int e = 0; e < 2; e++) {
            float v = get(to<X>(both[e])) + (feedback ? gamma[0] * past[e] : 0);
            s[(int64_t)*first * D + row + e] = to<X>(v);
            gated[row + e] = to<X>(get(to<X>(v)) * get(g[row + e]));
        }
    });
}
// [13]: the residual
template <typename X>
static void decode_out_gpu(float *x, const X *gated, const X *weight, const X *bias, int D, cudaStream_t stream) {
    decode(weight, D, D, 0, 0, stream, [=] __device__ (float *vec, float *) {
        for (int i = threadIdx.x; i < D; i += 128) vec[i] = get(gated[i]);
    }, [=] __device__ (int row, float2 sum, const float *, const float *) {
        x[row] += sum.x + get(bias[row]);
        x[row + 1] += sum.y + get(bias[row + 1]);
    });
}

// Numbers of scratch: the parts, then the logits.
static int64_t decode_parts(int D, int H) { return 2 * (int64_t)H * decode_splits(H) * (D + 2); }
// Whether the launches' shared memory suffices: a row and a factor for each part.
static int decodes(int D, int H) { return 4 * (int64_t)D + 8 * (int64_t)H * decode_splits(H) <= 40 << 10; }

// ----------------------------------------------------------------------------
// the model

// As in train_sessa.c. x, rounded to X, is what the layer read from the residual stream, kept for the backward pass only.
template <typename X> struct LayerActivationsGPU {
    X *x;                       // (N,D)
    float *ln_mean, *ln_rstd;   // (N)
    X *n, *ag, *abar, *proj, *o, *f, *s, *c, *gated, *branch; // dag takes the place of ag; c: feedback's (e s)/z
    float *stats, *gamma, *fb_stats;
    Scratch fb_weights;
    X *xbc, *y_scan, *normed, *tail; // mamba2
    float *step, *rms, *states, *carried;
};
template <typename X> struct ActivationsGPU {
    LayerActivationsGPU<X> *layers;
    float *residual;                // (N,D) the stream between the layers; backward its gradient, dx
    X *y;                           // (N,D) its end, kept for the backward pass only
    float *ln_mean, *ln_rstd;       // (N)
    X *ln_f, *logits;               // (N,D), (N,V) with ld_logits numbers from row to row
    int64_t ld_logits;
    float *losses;                  // (N)
    char *hits;                     // (N) 1: no other logit was larger than the target's
    X *ds, *dout, *dbranch, *dabar, *dproj, *dy, *dxbc;
    float *dgamma, *dstep, *cosine, *sine;
    Scratch scratch;
};

// What a step reads from the device's memory, because it changes from step to step; room for ids behind it: inputs,
// targets, the lists of sort_tokens.
typedef struct {
    uint64_t dropout_key;
    float scale[4]; // dloss, 0, 1: what products scale by
    int first;      // generation: positions known
    int ids[];
} Inputs;

// The launches of one pass over a batch shape, recorded as a CUDA graph: then they cost the host one launch.
typedef struct {
    struct { int64_t pass, B, T, P; double dropout; } shape; // pass 0: forward, 1: backward, 2: that adds, 3: a token,
                                                              // 4: the forward pass behind the early layers
    int runs;
    cudaGraphExec_t graph;
} Recording;
enum { N_RECORDINGS = 12 };

// What all passes of a model do: chosen when it is made, by its largest batch, and with it the memory that they
// take. A smaller batch, as evaluation's last, and generation behind a short prompt go the same way.
typedef struct {
    AttentionWay attention;
    Panels feedback[2]; // 1: where positions begin at a multiple of 8, so that tiles can
} Ways;
template <typename X> static Ways ways_of(const Config *c, int B, int T, int P, int keep) {
    int D = c->d_model, d = D / c->n_heads, E = proj_width(c);
    Ways ways = {attention_way<X>(B, T, c->n_heads, c->n_kv_heads, d, E, P),
                 {feedback_panels<X>(B, T, D, P, 0, keep), feedback_panels<X>(B, T, D, P, E % 8 == 0, keep)}};
    return ways;
}

// The first member is a Model as the other parts know it: configuration, table of parameters, and in the host's memory
// a copy of the parameters or of what belongs to them, made when asked for. The device's blocks have their tensors at
// `places`: at multiples of 64 numbers, but for those that follow another within one product.
template <typename X> struct ModelGPU {
    Model host;
    char *memory;                                // all of the model, one allocation
    int64_t count, *places;                      // numbers in a block; (rows of the table)
    float *params, *exp_avg, *exp_avg_sq, *grads; // in the order of Block
    X *copy;                                     // the parameters as X: products read them; float: params itself
    unsigned char *decayed;                      // for each 64 numbers
    Weights weights, grad;                       // in the device's memory
    ActivationsGPU<X> acts;
    Table x_table, f_table;                      // activations of type X, of type float
    X *x_block;
    float *f_block;
    Inputs *inputs, *host_inputs;                // in the device's memory; page-locked, as is the result of sums
    double *norm;                                // in the device's memory: its square, and what clipping makes of the gradients
    double *host_sum;                            // of losses; of squares of gradients
    cudaEvent_t loss_there, lists_there, norm_there; // when the host may read, or write again, what the device was asked for
    int *host_lists, *starts;                    // of sort_tokens: page-locked; (V+1)
    ColumnSums sums;
    Recording recordings[N_RECORDINGS];
    int oldest, dlogits_ready, decodes;
    Ways ways;
};

// So many layers are updated before the next forward pass begins, the others while it goes through these.
static int early_layers(const Config *c) { return min_int((c->n_layers + 7) / 8, c->n_layers - 1); }

template <typename X> static const X *as_x(const ModelGPU<X> *m, const float *weight) {
    return weight ? m->copy + (weight - m->params) : NULL;
}

// ----------------------------------------------------------------------------
// mixers: what stands between GELU and gate, abar → s. The gain γ comes from the GELU's pass over the same numbers, and
// backward dgamma goes into the GELU's.

// The projections, then on stream `side` what follows from q, k and v.
template <typename X>
static void direct_read_forward_gpu(ModelGPU<X> *m, int l, int B, int T, int first, X *f, cudaStream_t stream,
                                    cudaStream_t side) {
    const Config *c = &m->host.config;
    int D = c->d_model, H = c->n_heads, G = c->n_kv_heads, d = D / H, E = proj_width(c), N = B * (T - first);
    LayerWeights *w = &m->weights.layers[l];
    LayerActivationsGPU<X> *a = &m->acts.layers[l];
    X *q = a->proj + (size_t)first * E, *k = a->proj + D, *v = k + G * d;
    linear_forward_gpu(q, E, a->abar, as_x(m, w->W_proj), as_x(m, w->b_proj), N, D, E, stream);
    follow(side, stream);
    rope_forward_gpu(q, E, m->acts.cosine, m->acts.sine, N, T - first, H + G, d, first, 1, side);
    attention_forward_gpu(w->W_o ? a->o : f, a->stats, m->acts.scratch, q, k, v, E, B, T, H, G, d, first,
                          &m->ways.attention, side);
    if (w->W_o) linear_forward_gpu(f, D, a->o, as_x(m, w->W_o), (const X *)NULL, N, D, D, side);
}

template <typename X> static void direct_read_backward_gpu(ModelGPU<X> *m, int l, int B, int T, cudaStream_t stream) {
    const Config *c = &m->host.config;
    int D = c->d_model, H = c->n_heads, G = c->n_kv_heads, d = D / H, E = proj_width(c), N = B * T;
    LayerWeights *w = &m->weights.layers[l], *dw = &m->grad.layers[l];
    LayerActivationsGPU<X> *a = &m->acts.layers[l];
    ActivationsGPU<X> *back = &m->acts;
    const X *k = a->proj + D, *v = k + G * d, *out = w->W_o ? a->o : a->f;
    X *dk = back->dproj + D, *dv = dk + G * d, *dout = w->W_o ? back->dout : back->ds;
    // W_o's gradient beside the ring; it would take multiprocessors from the two kernels of longer sequences
    if (w->W_o) linear_backward_gpu(dout, dw->W_o, back->ds, D, a->o, as_x(m, w->W_o), N, D, D, m->sums.add, stream,
                                   in_ring(T, H, G) ? gpu.side : stream);
    attention_backward_gpu(back->dproj, dk, dv, dw->b_proj, back->scratch, dout, out, a->stats, a->proj, k, v, E, B, T, H, G, d,
                           &m->ways.attention, {back->cosine, back->sine, T, d / 2, 0, -1}, &m->sums, stream);
    linear_backward_gpu(back->dabar, dw->W_proj, back->dproj, E, a->abar, as_x(m, w->W_proj), N, D, E, m->sums.add, stream, stream);
}

template <typename X>
static void attention_mixer_forward_gpu(ModelGPU<X> *m, int l, int B, int T, int first, cudaStream_t stream) {
    direct_read_forward_gpu(m, l, B, T, first, m->acts.layers[l].s + (size_t)first * m->host.config.d_model, stream, stream);
}

// With tiles, neither attention nor the feedback's weights and inverses need scratch or workspace of the other's: they go
// beside each other.
template <typename X>
static void sessa_forward_gpu(ModelGPU<X> *m, int l, int B, int T, int first, cudaStream_t stream) {
    int D = m->host.config.d_model, E = proj_width(&m->host.config);
    LayerActivationsGPU<X> *a = &m->acts.layers[l];
    const X *q = a->proj + (size_t)first * E + E - 2 * D, *k = a->proj + E - D;
    const Panels *panels = &m->ways.feedback[first % 8 == 0];
    cudaStream_t side = m->ways.attention.tiles && panels->tiles ? gpu.side : stream;
    direct_read_forward_gpu(m, l, B, T, first, a->f, stream, side);
    feedback_forward_gpu(a->s, a->c, a->fb_stats, a->fb_weights, m->acts.scratch, a->f, q, k, E, a->gamma, B, T, D,
                         first, panels, stream, side);
}

template <typename X> static void sessa_backward_gpu(ModelGPU<X> *m, int l, int B, int T, cudaStream_t stream) {
    int D = m->host.config.d_model, E = proj_width(&m->host.config);
    LayerActivationsGPU<X> *a = &m->acts.layers[l];
    ActivationsGPU<X> *back = &m->acts;
    const X *q = a->proj + E - 2 * D, *k = q + D;
    feedback_backward_gpu(back->ds, back->dproj + E - 2 * D, back->dproj + E - D, back->dgamma,
                          m->grad.layers[l].b_proj + E - 2 * D, a->fb_weights, back->scratch, back->ds, a->s, a->c,
                          a->fb_stats, q, k, E, a->gamma, B, T, D, &m->ways.feedback[1], &m->sums, stream);
    direct_read_backward_gpu(m, l, B, T, stream);
}

// Rows of the projections are padded to multiples of 8 numbers: tensor cores ask for it.
static int proj_ld(const Config *c) { return c->mixer == MAMBA2 ? (int)round_up(proj_width(c), 8) : proj_width(c); }

template <typename X>
static void mamba2_forward_gpu(ModelGPU<X> *m, int l, int B, int T, int first, cudaStream_t stream) {
    const Config *c = &m->host.config;
    int D = c->d_model, E = 2 * D, S = c->state_dim, heads = E / c->head_dim, width = proj_width(c), ld = proj_ld(c), N = B * (T - first);
    LayerWeights *w = &m->weights.layers[l];
    LayerActivationsGPU<X> *a = &m->acts.layers[l];
    if (a->carried && !first) CUDA(cudaMemsetAsync(a->carried, 0, sizeof(float) * (size_t)S * (size_t)E, stream));
    linear_forward_gpu(a->proj, ld, a->abar, as_x(m, w->in_proj), (const X *)NULL, N, D, width, stream);
    conv_forward_gpu(a->xbc, a->proj + E, ld, a->tail, w->conv_weight, w->conv_bias, B, T, E + 2 * S, first, stream);
    step_forward_gpu(a->step, a->proj + width - heads, ld, w->step_bias, N, heads, stream);
    scan_forward_gpu(a->y_scan, a->states, a->carried, a->xbc, a->step, w->A_log, w->skip, B, T - first, E, S, heads, 0, stream);
    gated_rmsnorm_forward_gpu(a->normed, a->rms, a->y_scan, a->proj, ld, w->norm_weight, N, E, stream);
    linear_forward_gpu(a->s + (size_t)first * D, D, a->normed, as_x(m, w->out_proj), (const X *)NULL, N, E, D, stream);
}

template <typename X> static void mamba2_backward_gpu(ModelGPU<X> *m, int l, int B, int T, cudaStream_t stream) {
    const Config *c = &m->host.config;
    int D = c->d_model, E = 2 * D, S = c->state_dim, W = E + 2 * S, heads = E / c->head_dim, width = proj_width(c),
        ld = proj_ld(c), N = B * T;
    LayerWeights *w = &m->weights.layers[l], *dw = &m->grad.layers[l];
    LayerActivationsGPU<X> *a = &m->acts.layers[l];
    ActivationsGPU<X> *back = &m->acts;
    const X *x = a->proj + E, *step = a->proj + width - heads;
    gated_rmsnorm_forward_gpu(a->normed, a->rms, a->y_scan, a->proj, ld, w->norm_weight, N, E, stream); // again
    linear_backward_gpu(back->dy, dw->out_proj, back->ds, D, a->normed, as_x(m, w->out_proj), N, E, D, m->sums.add, stream, stream);
    gated_rmsnorm_backward_gpu(back->dy, back->dproj, dw->norm_weight, back->dy, a->y_scan, a->proj, ld, a->rms, w->norm_weight,
                               N, E, &m->sums, stream);
    conv_forward_gpu(a->xbc, x, ld, (X *)NULL, w->conv_weight, w->conv_bias, B, T, W, 0, stream);        // again
    step_forward_gpu(a->step, step, ld, w->step_bias, N, heads, stream);
    scan_backward_gpu(back->dxbc, back->dstep, dw->A_log, dw->skip, back->scratch, back->dy, a->states, a->xbc, a->step,
                      w->A_log, w->skip, B, T, E, S, heads, 0, &m->sums, stream);
    conv_backward_gpu(back->dproj + E, dw->conv_weight, dw->conv_bias, back->dxbc, x, ld, w->conv_weight, w->conv_bias, B, T, W,
                      &m->sums, stream);
    step_backward_gpu(back->dproj + width - heads, dw->step_bias, back->dstep, 3 * heads, step, ld, w->step_bias, N, heads,
                      &m->sums, stream);
    linear_backward_gpu(back->dabar, dw->in_proj, back->dproj, ld, a->abar, as_x(m, w->in_proj), N, D, width, m->sums.add, stream,
                        stream);
}

template <typename X> struct MixerGPU {
    void (*forward)(ModelGPU<X> *model, int layer, int B, int T, int first, cudaStream_t stream);
    void (*backward)(ModelGPU<X> *model, int layer, int B, int T, cudaStream_t stream);
};
template <typename X> static const MixerGPU<X> mixers_gpu[N_MIXERS] = {
    {sessa_forward_gpu<X>, sessa_backward_gpu<X>},
    {attention_mixer_forward_gpu<X>, direct_read_backward_gpu<X>},
    {mamba2_forward_gpu<X>, mamba2_backward_gpu<X>},
};

// ----------------------------------------------------------------------------
// the model's memory

template <typename Y>
static Y *add_activation(Table *table, Y *block, int layer, const char *name, int n_dims, int64_t d0, int64_t d1, int64_t d2) {
    if (table->count >= 0) table->count = round_up(table->count, 64);
    add_tensor(table, NULL, layer, name, n_dims, d0, d1, d2);
    const Tensor *row = &table->rows[table->n - 1];
    if (table->count >= 0) table->count += GUARD / (int64_t)sizeof(Y);
    if (block) guard(block + row->offset + row->count, block + round_up(table->count, 64), name, layer);
    return block ? block + row->offset : NULL;
}

template <typename X> static void mamba2_activations_gpu(ModelGPU<X> *m, int l, int B, int T, Mode mode) {
    const Config *c = &m->host.config;
    int D = c->d_model, E = 2 * D, S = c->state_dim, W = E + 2 * S, heads = E / c->head_dim, training = mode >= TRAIN;
    int P = scan_rows(S, c->head_dim, sizeof(X));
    LayerActivationsGPU<X> *a = &m->acts.layers[l];
    Table *t = &m->x_table, *f = &m->f_table;
    X *x = m->x_block;
    float *fb = m->f_block;
    if (l == 0 || training) {
        a->proj = add_activation(t, x, l, "proj", 3, B, T, proj_ld(c));
        add_view(t, l, "z", "proj", 0, E);
        a->y_scan = add_activation(t, x, l, "y", 3, B, T, E);
        a->rms = add_activation(f, fb, l, "rms", 2, B, T, 1);
        a->s = add_activation(t, x, l, "s", 3, B, T, D);
        a->states = add_activation(f, fb, l, "states", 3, (int64_t)B * ((T + P - 1) / P), S, E);
    }
    if (mode == GENERATE) a->carried = add_activation(f, fb, l, "carried", 2, S, E, 1);
    if (mode == GENERATE) a->tail = add_activation(t, x, l, "tail", 2, TAPS - 1, W, 1);
    if (l == 0 || mode == KEEP_ALL) {
        a->xbc = add_activation(t, x, l, "conv", 3, B, T, W);
        a->step = add_activation(f, fb, l, "dt", 3, B, T, heads);
        a->normed = add_activation(t, x, l, "normed", 3, B, T, E);
    }
    if (l || !training) return;
    m->acts.dy = add_activation(t, x, -1, "dy", 3, B, T, E);
    m->acts.dxbc = add_activation(t, x, -1, "dxbc", 3, B, T, W);
    m->acts.dstep = add_activation(f, fb, -1, "dstep", 3, B, T, 3 * heads);
}

// Numbers for the partial sums of a layer's passes, and of ln_f's, which come before the first layer's.
static int64_t column_sums_room(const Config *c, int B, int T) {
    int D = c->d_model, E = 2 * D, W = E + 2 * c->state_dim, N = B * T, kv_width = c->n_kv_heads * (D / c->n_heads);
    auto pass = [&](int sums, int width) { return (int64_t)sums * sum_chunks(N, width, 1) * width; };
    int64_t norm = 3 * (int64_t)row_blocks(N, D, 0, BLOCKS_AT_ONCE / 2) * D,
            layer = 2 * norm + pass(1, D) + pass(3, D); // gate, GELU
    if (c->mixer == MAMBA2) {
        int heads = E / c->head_dim;
        return layer + pass(1, E) + pass(2, heads) + pass(1, heads) +
               (int64_t)conv_chunks(B, T, W) * (TAPS + 1) * W;
    }
    layer += pass(1, D + 2 * kv_width);
    return c->mixer == SESSA ? layer + 2 * tile_sums_room(D, B, T) + pass(1, 2 * D) : layer;
}

// What the model's passes share: numbers of the feedback's weights, of scratch, of partial sums. A test may ask for
// panels of any height.
typedef struct { int64_t weights, scratch, sums; } Room;
template <typename X> static Room room_of(const Config *c, int B, int T, Mode mode, const Ways *ways) {
    int D = c->d_model, H = c->n_heads;
    Room room = {0, 0, column_sums_room(c, B, T)};
    auto at_least = [](int64_t &size, int64_t numbers) { if (size < numbers) size = numbers; };
    auto add = [&](const Ways &w, int tiles) {
        at_least(room.scratch, w.attention.scratch);
        if (c->mixer != SESSA) return;
        at_least(room.scratch, w.feedback[tiles].total);
        at_least(room.weights, w.feedback[tiles].weights);
    };
    if (c->mixer == MAMBA2) at_least(room.scratch, scan_scratch_gpu(B, T, c->state_dim, 2 * D / c->head_dim));
    else add(*ways, 1);
    if (c->mixer != MAMBA2 && mode == GENERATE) add(*ways, 0);
    for (int P = 1; P <= min_int(T, BLOCK) && mode == KEEP_ALL && c->mixer != MAMBA2; P++)
        add(ways_of<X>(c, B, T, P, 0), 1);
    if (mode == GENERATE) at_least(room.scratch, decode_parts(D, H) + c->vocab_size);
    if (mode >= TRAIN) at_least(room.scratch, embedding_scratch(B * T, c->vocab_size, D));
    return room;
}

// The list of carve_activations, in two blocks. The outputs of LayerNorm, GELU and gate are not shared as there, but kept for the
// backward pass; a KEEP_ALL model shares nothing but f and the branch.
template <typename X> static void carve_activations_gpu(ModelGPU<X> *m, int B, int T, Mode mode) {
    const Config *c = &m->host.config;
    int D = c->d_model, H = c->n_heads, d = D / H, kv_width = c->n_kv_heads * d, E = proj_ld(c);
    int sessa = c->mixer == SESSA, mamba2 = c->mixer == MAMBA2, training = mode >= TRAIN, keep_all = mode == KEEP_ALL;
    ActivationsGPU<X> *acts = &m->acts;
    Table *t = &m->x_table, *f = &m->f_table;
    X *x = m->x_block;
    float *fb = m->f_block;
    t->n = f->n = 0;
    t->count = f->count = 0;
    Room room = room_of<X>(c, B, T, mode, &m->ways);
    X *read = training ? add_activation(t, x, -1, "encoded", 3, B, T, D) : NULL; // by the next layer
    for (int l = 0; l < c->n_layers; l++) {
        LayerActivationsGPU<X> *a = &acts->layers[l];
        if (l > 0) *a = acts->layers[0];
        a->x = read;
        if (mamba2) mamba2_activations_gpu(m, l, B, T, mode);
        else {
            a->proj = add_activation(t, x, l, "proj", 3, B, T, E);
            add_view(t, l, "q", "proj", 0, D);
            add_view(t, l, "k", "proj", D, kv_width);
            add_view(t, l, "v", "proj", D + kv_width, kv_width);
            a->s = add_activation(t, x, l, "s", 3, B, T, D);
        }
        if (sessa) add_view(t, l, "fb_q", "proj", E - 2 * D, D);
        if (sessa) add_view(t, l, "fb_k", "proj", E - D, D);
        if (c->mixer == ATTENTION) add_view(t, l, "f", "s", 0, D);
        if (l == 0 || training) {
            a->ln_mean = add_activation(f, fb, l, "ln_mean", 2, B, T, 1);
            a->ln_rstd = add_activation(f, fb, l, "ln_rstd", 2, B, T, 1);
            a->ag = add_activation(t, x, l, "ag", 3, B, T, 2 * D);
            add_view(t, l, "a", "ag", 0, D);
            add_view(t, l, "g", "ag", D, D);
            if (H > 1 && !mamba2) a->o = add_activation(t, x, l, "o", 3, B, T, D);
            if (!mamba2) a->stats = add_activation(f, fb, l, "stats", 3, B * H, T, 2);
            if (sessa) a->gamma = add_activation(f, fb, l, "gamma", 2, B, T, 1);
            a->c = sessa && training ? add_activation(t, x, l, "fb_c", 3, B, T, D) : NULL;
            if (sessa) a->fb_stats = add_activation(f, fb, l, "fb_stats", 3, B, T, 2);
            if (sessa && (l == 0 || m->ways.feedback[1].kept))
                a->fb_weights = {add_activation(f, fb, l, "fb_weights", 1, room.weights, 1, 1), room.weights};
            a->n = add_activation(t, x, l, "ln", 3, B, T, D);
            a->abar = add_activation(t, x, l, "abar", 3, B, T, D);
            a->gated = add_activation(t, x, l, "gated", 3, B, T, D);
        }
        if (l == 0) a->f = a->branch = add_activation(t, x, l, "branch", 3, B, T, D);
        // H 1: attention's own output
        if (sessa && (keep_all || (H == 1 && training))) a->f = add_activation(t, x, l, "f", 3, B, T, D);
        if (!sessa && H == 1) a->f = a->s;
        if (training) read = add_activation(t, x, l, "residual", 3, B, T, D);
    }
    acts->y = read;
    acts->residual = add_activation(f, fb, -1, "stream", 3, B, T, D);
    acts->ln_mean = add_activation(f, fb, -1, "ln_f_mean", 2, B, T, 1);
    acts->ln_rstd = add_activation(f, fb, -1, "ln_f_rstd", 2, B, T, 1);
    acts->ln_f = add_activation(t, x, -1, "ln_f", 3, B, T, D);
    acts->ld_logits = round_up(c->vocab_size, 8);
    acts->logits = add_activation(t, x, -1, "logits", 3, B, mode == GENERATE ? 1 : T, acts->ld_logits);
    t->rows[t->n - 1].shape[2] = c->vocab_size;
    acts->losses = add_activation(f, fb, -1, "losses", 2, B, T, 1);
    acts->hits = (char *)add_activation(f, fb, -1, "hits", 1, B * (int64_t)T / 4 + 1, 1, 1);
    acts->cosine = add_activation(f, fb, -1, "cosine", 2, T, d / 2, 1);
    acts->sine = add_activation(f, fb, -1, "sine", 2, T, d / 2, 1);
    acts->scratch = {add_activation(f, fb, -1, "scratch", 1, room.scratch, 1, 1), room.scratch};
    m->decodes = mode == GENERATE && !mamba2 && decodes(D, H);
    if (!training) return;
    acts->dout = acts->layers[0].branch; // free by then
    acts->ds = add_activation(t, x, -1, "ds", 3, B, T, D);
    acts->dabar = acts->ln_f; // likewise
    acts->dbranch = add_activation(t, x, -1, "dbranch", 3, B, T, D);
    acts->dproj = add_activation(t, x, -1, "dproj", 3, B, T, E);
    acts->dgamma = add_activation(f, fb, -1, "dgamma", 2, B, T, 1);
    m->sums.room = m->sums.next = add_activation(f, fb, -1, "sums", 1, room.sums, 1, 1);
    m->sums.end = m->sums.room + room.sums;
}

// Points the weights into a block of the device: first to addresses of a block that is nowhere and follows the table, then
// to the places of the tensors that stand there.
template <typename X> static void device_weights(const ModelGPU<X> *m, Weights *w, float *block) {
    Table table;
    memset(&table, 0, sizeof(table));
    real *nowhere = (real *)sizeof(real), **fields = (real **)(void *)w->layers;
    size_t n = (size_t)m->host.config.n_layers * sizeof(LayerWeights) / sizeof(real *);
    auto move = [&](real **field) {
        int i = 0;
        if (!*field) return;
        while (m->host.table.rows[i].offset != *field - nowhere) i++;
        *field = block + m->places[i];
    };
    carve_weights(w, &table, nowhere, &m->host.config);
    free(table.rows);
    for (size_t i = 0; i < n; i++) move(&fields[i]);
    for (real **field : {&w->wte, &w->ln_f_weight, &w->ln_f_bias}) move(field);
}

template <typename X> static void model_free_gpu(Model *model) {
    ModelGPU<X> *m = (ModelGPU<X> *)model;
    if (gpu.ready) cudaDeviceSynchronize();
    unguard(m->memory, m->memory ? (size_t)(m->host.bytes - 2 * WORKSPACE) : 0);
    cudaFree(m->memory);
    cudaFreeHost(m->host_inputs);
    for (cudaEvent_t *event : {&m->loss_there, &m->lists_there, &m->norm_there})
        if (*event) cudaEventDestroy(*event);
    for (int i = 0; i < N_RECORDINGS; i++)
        if (m->recordings[i].graph) cudaGraphExecDestroy(m->recordings[i].graph);
    void *blocks[] = {m->host.weights.layers, m->weights.layers, m->grad.layers, m->acts.layers, m->host.table.rows,
                      m->x_table.rows, m->f_table.rows, m->host.params,
                      m->host.grads, m->host.exp_avg, m->host.exp_avg_sq, m->places, m->starts, m};
    for (size_t i = 0; i < sizeof(blocks) / sizeof(blocks[0]); i++) free(blocks[i]);
}

// The parts of the model's memory, one after the other; there 0: only their sizes.
template <typename Y> static Y *take(char **memory, int64_t count, const char *name, int there) {
    char *at = *memory, *end = at + count * (int64_t)sizeof(Y);
    *memory += round_up(count * (int64_t)sizeof(Y), 256) + GUARD;
    if (there) guard(end, *memory, name, -1);
    return (Y *)at;
}
template <typename X> static int64_t carve_memory(ModelGPU<X> *m, char *memory, int B, int T, Mode mode) {
    static const char *const names[] = {"parameters", "first moments", "second moments", "gradients"};
    char *at = memory;
    int64_t tokens = (int64_t)B * T;
    int there = memory != NULL;
    float **blocks[] = {&m->params, &m->exp_avg, &m->exp_avg_sq, &m->grads};
    for (int i = 0; i < 4; i++)
        *blocks[i] = take<float>(&at, i == PARAMS || mode >= TRAIN ? m->count : 0, names[i], there);
    m->copy = sizeof(X) == sizeof(bf16) ? take<X>(&at, m->count, "copy of the parameters", there) : (X *)m->params;
    m->decayed = take<unsigned char>(&at, m->count / 64, "decayed", there);
    m->norm = take<double>(&at, 2, "norm", there);
    m->inputs = (Inputs *)take<char>(&at, (int64_t)sizeof(Inputs) + (6 * tokens + 2) * (int64_t)sizeof(int),
                                     "inputs", there);
    m->x_block = take<X>(&at, m->x_table.count, "activations", there);
    m->f_block = take<float>(&at, m->f_table.count, "activations in float32", there);
    return at - memory;
}

// What the launches cannot take is said before anything is allocated. FAILED and a line in error
static int within_launches(const Config *c, int B, int T, size_t number, char *error) {
    int64_t D = c->d_model, widest = c->mixer == MAMBA2 ? 2 * D + 2 * c->state_dim : D,
            row = c->mixer == MAMBA2 ? 2 * D : D;
    int most = 0, seeds = 2 * BLOCK * SEED_LD * (int)sizeof(float);
    CUDA(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    if (B > MOST_SEQUENCES)
        return fail(error, NULL,
                    "--batch %d: the GPU takes at most %d sequences at once; --accum makes a step of more", B,
                    MOST_SEQUENCES);
    if (row > MOST_COLUMNS)
        return fail(error, NULL, "--dim %d: the GPU takes rows of at most %d numbers, here they have %lld",
                    c->d_model, MOST_COLUMNS, (long long)row);
    if ((int64_t)B * T * widest > MOST_PIECES)
        return fail(error, NULL,
                    "--batch %d times --seq %d: the GPU takes at most %lld tokens of this width at once", B, T,
                    (long long)(MOST_PIECES / widest));
    if (c->mixer == MAMBA2 && !scan_rows(c->state_dim, c->head_dim, (int)number))
        return fail(error, NULL, "--head-dim %d with --state-dim %d: too large for the GPU's shared memory",
                    c->head_dim, c->state_dim);
    if (c->mixer == SESSA && most < seeds)
        return fail(error, NULL, "the mixer sessa needs %d KiB of shared memory a block, this GPU has %d",
                    seeds >> 10, most >> 10);
    return 0;
}

template <typename X> static Model *model_create_gpu(const Config *c, int B, int T, Mode mode, char *error) {
    if (gpu_open(error) || within_launches(c, B, T, sizeof(X), error)) return NULL;
    int whole = 1, d = c->d_model / c->n_heads;
    ModelGPU<X> *m = (ModelGPU<X> *)allocate(1, sizeof(ModelGPU<X>), &whole);
    if (!m) { fail(error, NULL, "out of memory"); return NULL; }
    m->host.config = *c;
    m->host.B = B;
    m->host.T = T;
    m->dlogits_ready = mode == TRAIN;
    int64_t tokens = (int64_t)B * T, ids = (6 * tokens + 2) * (int64_t)sizeof(int), pairs = (int64_t)T * (d / 2);
    real *tables = (real *)allocate(2 * pairs, sizeof(real), &whole); // cosine and sine
    for (Weights *w : {&m->host.weights, &m->weights, &m->grad})
        w->layers = (LayerWeights *)allocate(c->n_layers, sizeof(LayerWeights), &whole);
    m->acts.layers = (LayerActivationsGPU<X> *)allocate(c->n_layers, sizeof(LayerActivationsGPU<X>), &whole);
    m->starts = (int *)allocate((int64_t)c->vocab_size + 1, sizeof(int), &whole);
    if (whole) carve_weights(&m->host.weights, &m->host.table, NULL, c);
    m->places = (int64_t *)allocate(m->host.table.n, sizeof(int64_t), &whole);
    if (!whole) { fail(error, NULL, "out of memory"); free(tables); model_free_gpu<X>(&m->host); return NULL; }
    for (int i = 0; i < m->host.table.n; i++) { // the projections stay together: they are one product
        const Tensor *row = &m->host.table.rows[i];
        int follows = strstr(row->name, ".k_proj.") || strstr(row->name, ".v_proj.") || strstr(row->name, ".proj_fb.");
        if (!follows) m->count = round_up(m->count, 64);
        m->places[i] = m->count;
        m->count += i ? row->count : round_up(c->vocab_size, 8) * c->d_model; // wte: rows more, of zeros that stay zeros
    }
    m->count = round_up(m->count, 64);
    double needed = INFINITY;
    size_t present = 0, all = 0;
    CUDA(cudaMemGetInfo(&present, &all));
    for (int keep = mode >= TRAIN;; keep = 0) { // without, the feedback's weights are computed again
        m->ways = ways_of<X>(c, B, T, 0, keep);
        m->x_block = NULL; // no place yet, sizes alone
        m->f_block = NULL;
        carve_activations_gpu(m, B, T, mode);
        if (m->host.table.count >= 0 && m->x_table.count >= 0 && m->f_table.count >= 0 && m->host.table.count < PTRDIFF_MAX / 64)
            needed = (double)carve_memory(m, NULL, B, T, mode);
        if (!keep || needed < 0.9 * (double)present) break;
    }
    cudaError_t code = cudaErrorMemoryAllocation;
    if (needed <= (double)present) code = cudaMalloc((void **)&m->memory, (size_t)needed);
    if (code == cudaSuccess) code = cudaMallocHost((void **)&m->host_inputs, sizeof(Inputs) + (size_t)ids + 2 * sizeof(double));
    if (code != cudaSuccess) {
        cudaGetLastError();
        fail(error, NULL, "the model does not fit: it needs %.2f GiB of the GPU's memory, of whose %.1f GiB %.2f are free",
             needed / 0x1p30, (double)all / 0x1p30, (double)present / 0x1p30);
        free(tables);
        model_free_gpu<X>(&m->host);
        return NULL;
    }
    m->host.bytes = needed + 2 * WORKSPACE;
    for (cudaEvent_t *event : {&m->loss_there, &m->lists_there, &m->norm_there})
        CUDA(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
    CUDA(cudaMemset(m->memory, 0, (size_t)needed));
    carve_memory(m, m->memory, B, T, mode);
    carve_activations_gpu(m, B, T, mode);
    device_weights(m, &m->weights, m->params);
    device_weights(m, &m->grad, m->grads);
    m->host_inputs->scale[1] = 0;
    m->host_inputs->scale[2] = 1;
    m->host_lists = m->host_inputs->ids + 2 * tokens;
    m->host_sum = (double *)((char *)m->host_inputs + round_up((int64_t)sizeof(Inputs) + ids, sizeof(double)));
    for (int i = 0; i < m->host.table.n; i++) {
        const Tensor *row = &m->host.table.rows[i];
        int64_t from = m->places[i] / 64, end = (m->places[i] + row->count + 63) / 64;
        if (row->n_dims >= 2) CUDA(cudaMemset(m->decayed + from, 1, (size_t)(end - from)));
    }
    rope_table(tables, tables + pairs, T, d);
    CUDA(cudaMemcpy(m->acts.cosine, tables, (size_t)pairs * sizeof(real), cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(m->acts.sine, tables + pairs, (size_t)pairs * sizeof(real), cudaMemcpyHostToDevice));
    free(tables);
    return &m->host;
}

// ----------------------------------------------------------------------------
// forward, backward, update

// The launches of f, which reads nothing but the device's memory. The first time for a shape they are made one by one
// (products ask for their algorithm then), the second time recorded, from then on replayed.
template <typename X, typename F> static void replay(ModelGPU<X> *m, Recording what, F f) {
    Recording *r = NULL;
    for (int i = 0; i < N_RECORDINGS && !r; i++) {
        Recording *one = &m->recordings[i];
        if (one->runs && !memcmp(&one->shape, &what.shape, sizeof(what.shape))) r = one;
    }
    if (!r) {
        r = &m->recordings[m->oldest];
        m->oldest = (m->oldest + 1) % N_RECORDINGS;
        if (r->graph) CUDA(cudaGraphExecDestroy(r->graph));
        *r = what;
    }
    if (!r->runs++) { f(); return; }
    if (!r->graph) {
        cudaGraph_t graph;
        CUDA(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeThreadLocal));
        f();
        CUDA(cudaStreamEndCapture(gpu.stream, &graph));
        CUDA(cudaGraphInstantiate(&r->graph, graph, cudaGraphInstantiateFlagUseNodePriority));
        CUDA(cudaGraphDestroy(graph));
    }
    CUDA(cudaGraphLaunch(r->graph, gpu.stream));
}

// hidden_forward, of the layers from .. end-1. inputs: in the device's memory, NULL: x is what the layers before made of them
template <typename X>
static void hidden_forward_gpu(ModelGPU<X> *m, const int *inputs, int B, int T, int first, double dropout, int from, int end,
                               cudaStream_t stream) {
    const Config *c = &m->host.config;
    int D = c->d_model, N = B * (T - first), last = c->n_layers - 1;
    ActivationsGPU<X> *acts = &m->acts;
    auto mask = [&](int place) { return mask_of(&m->inputs->dropout_key, dropout, place); };
    if (inputs) embedding_forward_gpu(acts->residual, inputs, m->weights.wte, mask(0), B, T - first, D, stream);
    for (int l = from; l < end; l++) {
        LayerWeights *w = &m->weights.layers[l];
        LayerActivationsGPU<X> *a = &acts->layers[l];
        const X *branch = l ? acts->layers[l - 1].branch : NULL;
        layernorm_forward_gpu(a->n, a->x, a->ln_mean, a->ln_rstd, acts->residual, branch, mask(2 * l), w->ln_weight, w->ln_bias,
                              N, D, stream);                                                       // [13] of the layer before, [9]
        linear_forward_gpu(a->ag, 2 * D, a->n, as_x(m, w->W_in), as_x(m, w->b_in), N, D, 2 * D, stream);                    // [10]
        gelu_forward_gpu(a->abar, a->gamma, a->ag, 2 * D, w->gamma_weight, w->gamma_bias, (float)c->gamma_max, N, D,
                         stream);                                                                                     // [11, 18]
        mixers_gpu<X>[c->mixer].forward(m, l, B, T, first, stream);                                                         // [12]
        gate_forward_gpu(a->gated, a->s + (size_t)first * D, a->ag + D, 2 * D, mask(1 + 2 * l), N, D, stream);              // [13]
        linear_forward_gpu(a->branch, D, a->gated, as_x(m, w->W_out), as_x(m, w->b_out), N, D, D, stream);
    }
    if (end > last) layernorm_forward_gpu(acts->ln_f, acts->y, acts->ln_mean, acts->ln_rstd, acts->residual,
                                          acts->layers[last].branch, mask(2 + 2 * last), m->weights.ln_f_weight,
                                          m->weights.ln_f_bias, N, D, stream);
}

// out = Σ x_i, or Σ x_i², in double: a block takes its share, then one block those of the blocks.
template <int SQUARES, typename Y> __global__ void sum_kernel(double *out, const Y *x, int64_t n) {
    __shared__ double sums[256];
    wait_for_results();
    double sum = 0;
    int64_t end = n * (blockIdx.x + 1) / gridDim.x;
    for (int64_t i = n * blockIdx.x / gridDim.x + threadIdx.x; i < end;
         i += 256) sum += SQUARES ? (double)x[i] * (double)x[i] : (double)x[i];
    sums[threadIdx.x] = sum;
    for (int half = 128; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) out[blockIdx.x] = sums[0];
}
template <int SQUARES> static void sum_gpu(double *out, const float *x, int64_t n, cudaStream_t stream) {
    int blocks = n < 1 << 19 ? 64 : 1056;
    double *partial = (double *)gpu.workspace;
    LAUNCH((sum_kernel<SQUARES, float>), blocks, 256, 0, stream, partial, x, n);
    LAUNCH((sum_kernel<0, double>), 1, 256, 0, stream, out, partial, blocks);
}

template <typename X>
static void model_forward_gpu(Model *model, const int *inputs, const int *targets, int B, int T, Dropout drop) {
    ModelGPU<X> *m = (ModelGPU<X> *)model;
    cudaStream_t stream = gpu.stream;
    int D = m->host.config.d_model, V = m->host.config.vocab_size, N = B * T, early = early_layers(&m->host.config);
    ActivationsGPU<X> *acts = &m->acts;
    Inputs *host = m->host_inputs;
    must_fit(B, m->host.B, "sequences of a batch");
    must_fit(T, m->host.T, "tokens of a sequence");
    CUDA(cudaEventSynchronize(m->loss_there)); // nothing reads the last batch there any more
    host->dropout_key = dropout_key(drop);
    memcpy(host->ids, inputs, sizeof(int) * (size_t)N);
    memcpy(host->ids + N, targets, sizeof(int) * (size_t)N);
    CUDA(cudaMemcpyAsync(m->inputs, host, sizeof(Inputs) + sizeof(int) * 2 * (size_t)N, cudaMemcpyHostToDevice, stream));
    m->host.batch_B = B;
    m->host.batch_T = T;
    m->host.drop = drop;
    replay(m, {{0, B, T, m->host.P, drop.probability}, 0, NULL},
           [&] { hidden_forward_gpu(m, m->inputs->ids, B, T, 0, drop.probability, 0, early, stream); });
    follow(stream, gpu.late); // the other layers' update
    replay(m, {{4, B, T, m->host.P, drop.probability}, 0, NULL}, [&] {
        hidden_forward_gpu(m, (const int *)NULL, B, T, 0, drop.probability, early, m->host.config.n_layers, stream);
        linear_forward_gpu(acts->logits, (int)acts->ld_logits, acts->ln_f, as_x(m, m->weights.wte), (const X *)NULL, N,
                           D, (int)acts->ld_logits, stream);
        crossentropy_gpu(acts->losses, acts->hits, m->dlogits_ready ? acts->logits : NULL, acts->logits, acts->ld_logits,
                         m->inputs->ids + N, N, V, stream);
        sum_gpu<0>(m->host_sum, acts->losses, N, stream);
    });
    CUDA(cudaEventRecord(m->loss_there, stream));
}

template <typename X> static double model_loss_gpu(Model *model) {
    ModelGPU<X> *m = (ModelGPU<X> *)model;
    CUDA(cudaEventSynchronize(m->loss_there));
    return m->host_sum[0];
}

template <typename X> static void model_hits_gpu(Model *m, char *hits) {
    CUDA(cudaMemcpyAsync(hits, ((ModelGPU<X> *)m)->acts.hits, (size_t)(m->batch_B * m->batch_T), cudaMemcpyDeviceToHost,
                         gpu.stream));
    CUDA(cudaStreamSynchronize(gpu.stream));
}

// model_backward, all but its last line: down to dx, the gradient of the embedding's output.
template <typename X> static void backward_launches_gpu(ModelGPU<X> *m, int B, int T, double dropout, cudaStream_t stream) {
    const Config *c = &m->host.config;
    int D = c->d_model, V = c->vocab_size, N = B * T, last = c->n_layers - 1, ld_logits = (int)m->acts.ld_logits;
    ActivationsGPU<X> *acts = &m->acts;
    Weights *w = &m->weights, *dw = &m->grad;
    float *dx = acts->residual;
    auto mask = [&](int place) { return mask_of(&m->inputs->dropout_key, dropout, place); };
    if (!m->dlogits_ready)
        crossentropy_gpu(acts->losses, acts->hits, acts->logits, acts->logits, ld_logits, m->inputs->ids + N, N, V, stream);
    linear_backward_gpu(acts->ds, dw->wte, acts->logits, ld_logits, acts->ln_f, as_x(m, w->wte), N, D, ld_logits, m->sums.add,
                        stream, stream, m->inputs->scale);
    layernorm_backward_gpu(dx, dw->ln_f_weight, dw->ln_f_bias, acts->dbranch, dw->layers[last].b_out, mask(2 + 2 * last), 1,
                           acts->ds, acts->y, acts->ln_mean, acts->ln_rstd, w->ln_f_weight, N, D, &m->sums, stream);
    for (int l = last; l >= 0; l--) {
        LayerWeights *wl = &w->layers[l], *dwl = &dw->layers[l];
        LayerActivationsGPU<X> *a = &acts->layers[l];
        // out through W_out and the gate; the gradients of a and g take their place
        linear_backward_gpu(acts->ds, (float *)NULL, acts->dbranch, D, a->gated, as_x(m, wl->W_out), N, D, D, 0, stream, stream);
        gate_backward_gpu(acts->ds, a->ag + D, dwl->b_in + D, acts->ds, a->s, a->ag + D, 2 * D, mask(1 + 2 * l), N, D, &m->sums,
                          stream);
        linear_backward_gpu((X *)NULL, dwl->W_out, acts->dbranch, D, a->gated, as_x(m, wl->W_out), N, D, D, m->sums.add, stream,
                            gpu.side); // beside the solve, which leaves multiprocessors free
        // through the mixer
        mixers_gpu<X>[c->mixer].backward(m, l, B, T, stream);
        gelu_backward_gpu(a->ag, dwl->b_in, dwl->gamma_weight, dwl->gamma_bias, acts->dabar, a->ag, 2 * D, acts->dgamma, a->gamma,
                          wl->gamma_weight, (float)c->gamma_max, N, D, &m->sums, stream);
        follow(stream, gpu.side); // W_out's and W_o's inputs are overwritten from here on
        // through W_in and the LayerNorm, on to the branch of the layer below
        linear_backward_gpu(acts->ds, dwl->W_in, a->ag, 2 * D, a->n, as_x(m, wl->W_in), N, D, 2 * D, m->sums.add, stream,
                            gpu.side);
        layernorm_backward_gpu(dx, dwl->ln_weight, dwl->ln_bias, l ? acts->dbranch : (X *)NULL,
                               l ? dw->layers[l - 1].b_out : (float *)NULL, mask(2 * l), 0, acts->ds, a->x, a->ln_mean,
                               a->ln_rstd, wl->ln_weight, N, D, &m->sums, stream);
        column_sums_gpu(&m->sums, stream);
    }
    follow(stream, gpu.side);
}

// The host sorts the tokens while the device is on its way back to them.
template <typename X> static void model_backward_gpu(Model *model, double dloss) {
    ModelGPU<X> *m = (ModelGPU<X> *)model;
    cudaStream_t stream = gpu.stream;
    int B = m->host.batch_B, T = m->host.batch_T, N = B * T, D = m->host.config.d_model;
    Inputs *host = m->host_inputs, *device = m->inputs;
    int *lists = m->inputs->ids + (m->host_lists - host->ids);
    float scale = (float)dloss;
    each(1, 1, 0, stream, [=] __device__ (auto, int, int) { device->scale[0] = scale; });
    replay(m, {{m->sums.add ? 2 : 1, B, T, m->host.P, m->host.drop.probability}, 0, NULL},
           [&] { backward_launches_gpu(m, B, T, m->host.drop.probability, stream); });
    CUDA(cudaEventSynchronize(m->lists_there)); // those of the batch before
    TokenLists t = sort_tokens(m->host_lists, m->starts, host->ids, N, m->host.config.vocab_size);
    CUDA(cudaMemcpyAsync(lists, m->host_lists, sizeof(int) * (4 * (size_t)N + 2), cudaMemcpyHostToDevice, stream));
    CUDA(cudaEventRecord(m->lists_there, stream));
    embedding_backward_gpu(m->grad.wte, m->acts.scratch, m->acts.residual, lists, t, B, T, D, stream);
    m->sums.add = 1;
}

// adamw: a thread takes 4 numbers; all parameters in one launch, the tensors' ends rounded up hold zeros that stay zeros.
// It does not clear the gradient: the next backward pass overwrites it.
// scale: in the device's memory; NaN: nothing is updated.
template <typename X>
__global__ void adamw_kernel(float *w, const float *g, float *exp_avg, float *exp_avg_sq, X *copy,
                             const unsigned char *decayed, int64_t n, float beta1, float beta2, float rate1,
                             float rate2, float keep, float step_size, float correction, float eps, const double *scale) {
    wait_for_results();
    int64_t i = 4 * ((int64_t)blockIdx.x * blockDim.x + threadIdx.x);
    float factor = (float)*scale;
    if (i >= n || isnan(factor)) return;
    float p[4], grad[4], m[4], v[4];
    read_some<4>(p, w + i);
    read_some<4>(grad, g + i);
    read_some<4>(m, exp_avg + i);
    read_some<4>(v, exp_avg_sq + i);
    if (!decayed[i / 64]) keep = 1;
    for (int e = 0; e < 4; e++) {
        grad[e] *= factor;
        m[e] = beta1 * m[e] + rate1 * grad[e];
        v[e] = beta2 * v[e] + rate2 * grad[e] * grad[e];
        p[e] = keep * p[e] - step_size * m[e] / (sqrtf(v[e]) * correction + eps);
    }
    write_some<4>(w + i, p);
    write_some<4>(exp_avg + i, m);
    write_some<4>(exp_avg_sq + i, v);
    if constexpr (sizeof(X) == 2) *(uint2 *)(copy + i) = make_uint2(pack_two(p[0], p[1]), pack_two(p[2], p[3]));
}
// The host goes on as soon as it has the norm. What the next forward pass needs first, embedding and early layers, comes first.
template <typename X> static double model_update_gpu(Model *model, AdamW o, double clip, int64_t step) {
    ModelGPU<X> *m = (ModelGPU<X> *)model;
    double *norm = m->norm; // the next batch's inputs are on their way while late layers read it
    follow(gpu.stream, gpu.late);
    sum_gpu<1>(norm, m->grads, m->count, gpu.stream);
    each(1, 1, 0, gpu.stream, [=] __device__ (auto, int, int) { // clip_scale
        double length = sqrt(norm[0]);
        norm[1] = !isfinite(length) ? NAN : clip > 0 && clip < length + 1e-6 ? clip / (length + 1e-6) : 1;
    });
    CUDA(cudaMemcpyAsync(m->host_sum + 1, norm, sizeof(double), cudaMemcpyDeviceToHost, gpu.stream));
    CUDA(cudaEventRecord(m->norm_there, gpu.stream));
    auto adamw = [&](int64_t from, int64_t end, cudaStream_t stream) {
        LAUNCH(adamw_kernel<X>, (unsigned)(((end - from) / 4 + 255) / 256), 256, 0, stream, m->params + from,
               m->grads + from, m->exp_avg + from, m->exp_avg_sq + from, m->copy + from, m->decayed + from / 64, end - from,
               (float)o.beta1, (float)o.beta2, (float)(1 - o.beta1), (float)(1 - o.beta2), (float)(1 - o.lr * o.weight_decay),
               (float)(o.lr / (1 - pow(o.beta1, (double)step))), (float)(1 / sqrt(1 - pow(o.beta2, (double)step))), (float)o.eps,
               norm + 1);
    };
    int64_t early = m->weights.layers[early_layers(&m->host.config)].ln_weight - m->params;
    adamw(0, early, gpu.stream);
    follow(gpu.late, gpu.stream);
    adamw(early, m->count, gpu.late);
    CUDA(cudaEventSynchronize(m->norm_there));
    if (isfinite(m->host_sum[1])) m->sums.add = 0;
    return sqrt(m->host_sum[1]);
}

template <typename X> static void hidden_decode_gpu(ModelGPU<X> *m, cudaStream_t stream) {
    const Config *c = &m->host.config;
    int D = c->d_model, H = c->n_heads, G = c->n_kv_heads, d = D / H, E = proj_width(c), feedback = c->mixer == SESSA,
        splits = decode_splits(H);
    const int *first = &m->inputs->first;
    float *x = m->acts.residual, *parts = borrow(m->acts.scratch, decode_parts(D, H) + c->vocab_size);
    Rope rope = {m->acts.cosine, m->acts.sine, m->host.T, d / 2, 0, 1};
    embedding_forward_gpu(x, m->inputs->ids, m->weights.wte, mask_of(NULL, 0, 0), 1, 1, D, stream);
    for (int l = 0; l < c->n_layers; l++) {
        LayerWeights *w = &m->weights.layers[l];
        LayerActivationsGPU<X> *a = &m->acts.layers[l];
        decode_in_gpu(a->ag, x, w->ln_weight, w->ln_bias, as_x(m, w->W_in), as_x(m, w->b_in), 2 * D, D, D, stream);
        decode_projections_gpu(a->proj, a->gamma, a->ag, as_x(m, w->W_proj), as_x(m, w->b_proj), w->gamma_weight, w->gamma_bias,
                               (float)c->gamma_max, rope, first, E, D, (H + G) * d, stream);
        decode_attention_gpu(parts, a->proj, a->s, first, E, D, H, G, feedback, splits, stream);
        decode_mix_gpu(a->s, a->gated, parts, a->gamma, as_x(m, w->W_o ? w->W_o : w->W_out), a->ag + D, first, D, H, splits,
                       feedback, !w->W_o, stream);
        decode_out_gpu(x, a->gated, as_x(m, w->W_out), as_x(m, w->b_out), D, stream);
    }
    decode_in_gpu(parts + decode_parts(D, H), x, m->weights.ln_f_weight, m->weights.ln_f_bias, as_x(m, m->weights.wte),
                  (const X *)NULL, c->vocab_size, D, 0, stream);
}

template <typename X> static void model_extend_gpu(Model *model, const int *tokens, int n, int first, real *logits) {
    ModelGPU<X> *m = (ModelGPU<X> *)model;
    cudaStream_t stream = gpu.stream;
    int D = m->host.config.d_model, V = m->host.config.vocab_size;
    int64_t parts = decode_parts(D, m->host.config.n_heads);
    float *row = borrow(m->acts.scratch, parts + V) + parts;
    must_fit(first + n, m->host.T, "tokens of a sequence");
    m->host_inputs->first = first;
    memcpy(m->host_inputs->ids, tokens, sizeof(int) * (size_t)n);
    CUDA(cudaMemcpyAsync(m->inputs, m->host_inputs, sizeof(Inputs) + sizeof(int) * (size_t)n, cudaMemcpyHostToDevice, stream));
    if (n == 1 && m->decodes) replay(m, {{3, 0, 0, 0, 0}, 0, NULL}, [&] { hidden_decode_gpu(m, stream); });
    else {
        hidden_forward_gpu(m, m->inputs->ids, 1, first + n, first, 0, 0, m->host.config.n_layers, stream);
        linear_forward_gpu(m->acts.logits, V, m->acts.ln_f + (size_t)(n - 1) * D, as_x(m, m->weights.wte), (const X *)NULL, 1, D,
                           V, stream);
        copy_gpu(row, V, m->acts.logits, 1, V, stream);
    }
    CUDA(cudaMemcpyAsync(logits, row, sizeof(float) * (size_t)V, cudaMemcpyDeviceToHost, stream));
    CUDA(cudaStreamSynchronize(stream));
}

// ----------------------------------------------------------------------------
// the backend

static_assert(PARAMS == 0 && EXP_AVG == 1 && EXP_AVG_SQ == 2 && GRADS == 3, "the lists here and in carve_memory follow Block");
// Tensor by tensor between the device's block and the host's, which follows the table.
template <typename X> static real *copy_block(ModelGPU<X> *m, Block block, cudaMemcpyKind way) {
    real **hosts[] = {&m->host.params, &m->host.exp_avg, &m->host.exp_avg_sq, &m->host.grads}, *host = *hosts[block];
    float *blocks[] = {m->params, m->exp_avg, m->exp_avg_sq, m->grads}, *device = blocks[block];
    if (!host) host = *hosts[block] = (real *)calloc((size_t)m->host.table.count + 1, sizeof(real));
    if (!host) {
        fprintf(stderr, "train_sessa: no %.2f GiB of memory for a copy of the parameters\n",
                (double)m->host.table.count * sizeof(real) / 0x1p30);
        exit(1);
    }
    for (int i = 0; i < m->host.table.n; i++) {
        void *ends[] = {host + m->host.table.rows[i].offset, device + m->places[i]};
        int back = way == cudaMemcpyDeviceToHost;
        CUDA(cudaMemcpyAsync(ends[!back], ends[back], sizeof(real) * (size_t)m->host.table.rows[i].count, way, gpu.stream));
    }
    return host;
}
template <typename X> static real *read_gpu(Model *model, Block block) {
    ModelGPU<X> *m = (ModelGPU<X> *)model;
    follow(gpu.stream, gpu.late);
    if (block == GRADS && !m->sums.add) CUDA(cudaMemsetAsync(m->grads, 0, sizeof(float) * (size_t)m->count, gpu.stream));
    real *host = copy_block(m, block, cudaMemcpyDeviceToHost);
    CUDA(cudaStreamSynchronize(gpu.stream));
    return host;
}
template <typename X> static void write_gpu(Model *model, Block block) {
    ModelGPU<X> *m = (ModelGPU<X> *)model;
    follow(gpu.stream, gpu.late);
    copy_block(m, block, cudaMemcpyHostToDevice);
    if (block == GRADS) m->sums.add = 1;
    if (block == PARAMS && sizeof(X) == sizeof(bf16)) copy_gpu(m->copy, 64, m->params, (int)(m->count / 64), 64, gpu.stream);
    CUDA(cudaStreamSynchronize(gpu.stream));
}
static double bytes_gpu(const Model *m) { return m->bytes; }

// The Model behind the pointer is a ModelGPU<X>.
template <typename X> static const Backend backend_of = {
    "CUDA", model_create_gpu<X>, model_free_gpu<X>, bytes_gpu, read_gpu<X>, write_gpu<X>, model_forward_gpu<X>,
    model_loss_gpu<X>, model_hits_gpu<X>, model_backward_gpu<X>, model_update_gpu<X>, model_extend_gpu<X>};
static const Backend *backend_gpu(void) { return gpu.precision == BF16 ? &backend_of<bf16> : &backend_of<float>; }

// ----------------------------------------------------------------------------
// the program

// Takes --precision out of the command line. Returns 0, or 2 after a line on standard error.
static int take_precision(int *argc, char **argv) {
    int kept = 1;
    for (int i = 1; i < *argc; i++) {
        const char *value;
        if (!strcmp(argv[i], "--precision")) value = i + 1 < *argc ? argv[++i] : "";
        else if (!strncmp(argv[i], "--precision=", 12)) value = argv[i] + 12;
        else { argv[kept++] = argv[i]; continue; }
        int found = FP32;
        while (found <= BF16 && strcmp(value, precision_names[found])) found++;
        if (found > BF16) {
            fprintf(stderr, "train_sessa: --precision takes fp32, tf32 or bf16, not '%.100s'\n", value);
            return 2;
        }
        gpu.precision = (Precision)found;
    }
    *argc = kept;
    return 0;
}

static int run_cuda_program(int argc, char **argv) {
    int code = take_precision(&argc, argv), help = 0;
    for (int i = 1; i < argc; i++) help |= !strcmp(argv[i], "--help") || !strcmp(argv[i], "-h");
    static const char *const names[] = {"CUDA fp32", "CUDA tf32", "CUDA bf16"};
    Backend backend = *backend_gpu();
    backend.name = names[gpu.precision];
    if (!code) code = run_program(argc, argv, &backend);
    if (!code && help)
        printf("\nCUDA\n  --precision   TEXT  fp32, tf32 or bf16: of products and of what they read [bf16]\n");
    return code;
}

#ifdef SESSA_CUDA_MAIN
int main(int argc, char **argv) {
    start_again(argv);
    return run_cuda_program(argc, argv);
}
#endif
