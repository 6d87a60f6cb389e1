/*
The CUDA twin of train_sessa.c: the same layers in the same order, name_gpu for name, on one GPU. All
that is no layer (files, data, training loop, command line) is taken from train_sessa.c itself, which
this file includes.

    train_sessacu --precision bf16     bfloat16 operands, the default
    train_sessacu --precision tf32     float32 numbers, products on TensorFloat-32 tensor cores
    train_sessacu --precision fp32     float32 throughout: follows the CPU

What stands where, in this order:

    errors, the device, numbers, launchers      what every layer is written with
    the matrix product                          cuBLASLt's
    random numbers                              dropout's masks
    layers, attention, feedback, gate and loss  as in train_sessa.c; attention and feedback in panels of rows
    the model, mixers, memory                   its weights and activations on the device
    forward, backward, update                   to here the twin is the architecture again
    Mamba-2                                     the mixer that the paper compares with
    the backend, the program                    how train_sessa.c comes by all this

Plain is what a layer is, fast is how it is made fast. This file is complete: with --plain every layer
runs by what stands here, products by cuBLASLt, and what stands here is the oracle of every fast way.
What only speed needs (tiles on tensor cores, the solve by inverses, the scan in chunks, one token's
launches, what runs beside what) is in dev/cuda, a file for each:

    if (!plain) return feedback_forward_fast(...);        dev/cuda/feedback.cuh

Several GPUs that train one model, a process each, are dev/ranks': here stand the places where they exchange.
-DSESSA_PLAIN leaves dev/cuda and dev/ranks out. Attention has its fast way in bf16 alone, and says so by way->tiles.

X is the type of what products read and of the activations kept for the backward pass: bf16, or float.
In float32 always: the parameters and their moments and gradients, the residual stream, the softmax's
statistics, sums within products, the right-hand sides of the feedback system. Layers take the arguments
of their C functions, and a stream. Their equations and shapes stand there, above the function of the
same name; here stands what differs: where one pass over the data does the work of several C functions,
and which part of their loops a block, a warp or a thread takes. Layers that go row by row or number by
number are a loop's body, given to one of three launchers: each, each_with_sums, rows.

Where one pass over the data does what several C functions do, its name says so:

    embedding_forward, dropout              embedding_dropout_forward_gpu
    layernorm_forward, residual_forward     residual_layernorm_forward_gpu
    layernorm_backward                      residual_layernorm_backward_gpu
    gelu_forward, gain_forward              gelu_gain_forward_gpu
    gelu_backward, gain_backward            gelu_gain_backward_gpu
    rope_backward                           rope_bias_backward_gpu
    gate_forward, dropout                   gate_dropout_forward_gpu
    gate_backward, dropout                  gate_dropout_backward_gpu
    crossentropy_forward                    crossentropy_gpu, crossentropy_forward_gpu
    crossentropy_backward                   crossentropy_gpu, crossentropy_backward_gpu

Everything is deterministic: every sum has a fixed order and none goes by atomics (dev/cuda deals out tiles by
one, which no number depends on); products are chosen by cuBLASLt's heuristic and never by timing.
*/
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "train_sessa.cu needs a GPU of sm_80 (Ampere) or newer: no bf16 on the tensor cores of older ones"
#endif
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

#ifndef SESSA_PLAIN
#include "dev/ranks/ranks.h"
#endif

static_assert(sizeof(real) == sizeof(float), "the CUDA twin is float32 and bf16");
typedef __nv_bfloat16 bf16;

// ----------------------------------------------------------------------------
// errors, the device, numbers of either type

typedef enum { FP32, TF32, BF16 } Precision;
static const char *const precision_names[] = {"fp32", "tf32", "bf16"};

// A matrix product that has been asked for before: its shape, and how cuBLASLt does it.
typedef struct {
    int M, N, K, batch, a_transposed, b_transposed, biased, scaled, tf32, in_bytes, out_bytes, a_align,
        b_align, out_align;
    int64_t a_ld, b_ld, out_ld, a_step, b_step, out_step;
} ProductKey;
typedef struct {
    ProductKey key;
    int known, refused; // refused: cuBLASLt has nothing for it
    cublasLtMatmulDescOpaque_t operation;
    cublasLtMatrixLayoutOpaque_t a, b, out;
    cublasLtMatmulAlgo_t algo;
    size_t workspace;
} Product;

enum { WORKSPACE = 32 << 20, N_PRODUCTS = 1 << 13 };
static struct {
    Precision precision;
    int ready, device;
    int processors, spared; // multiprocessors: for launches that fill the GPU; the others are the exchange's
    // tiles: bf16 has kernels of its own; hopper: with Hopper's instructions, else what all have since Ampere
    int tiles, hopper;
    int clusters; // Hopper's kernels in clusters too: not on every part of a GPU (MIG, MPS)
    int shared, shared_together; // bytes of shared memory: of a block at most, of a multiprocessor's blocks
    cudaStream_t stream, side, late; // the launches; those beside them, see the schedule
    cudaStream_t exchange;           // of several GPUs
    cublasLtHandle_t lt;
    // two, of stream and of side: cuBLASLt's, and sum_gpu's partial sums, one at a time in the stream's order
    char *workspace;
} gpu = {BF16, 0, 0, 0, 0, 0, 0, 0, 0, 0, NULL, NULL, NULL, NULL, NULL, NULL};
static Product products[N_PRODUCTS]; // each at its key's hash, until another takes its place

// What fails here is a broken machine or a broken program: one line, exit code 1. Of several processes all end.
__attribute__((format(printf, 1, 2))) static void stop_program(const char *format, ...) {
    char line[ERROR_SIZE];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
#ifndef SESSA_PLAIN
    if (job.ranks > 1) end_all(1, "rank %d: %s", job.rank, line);
#endif
    fprintf(stderr, "train_sessa: %s\n", line);
    exit(1);
}
static void cuda_check(cudaError_t code, const char *what, int line) {
    if (code != cudaSuccess) stop_program("CUDA: %s (%s, line %d)", cudaGetErrorString(code), what, line);
}
static void lt_check(cublasStatus_t code, const char *what, int line) {
    if (code != CUBLAS_STATUS_SUCCESS) stop_program("cuBLASLt: status %d (%s, line %d)", (int)code, what, line);
}
#define CUDA(call) cuda_check(call, #call, __LINE__)
#define LT(call) lt_check(call, #call, __LINE__)

// A pass that would ask for more than there is stops before it writes past that.
static void must_fit(int64_t asked, int64_t room, const char *what) {
    if (asked > room)
        stop_program("CUDA: %s: %lld asked for, room for %lld", what, (long long)asked, (long long)room);
}

// Memory of the device that layers use one after the other, and how much of it there is.
typedef struct { float *at; int64_t numbers; } Scratch;
static float *borrow(Scratch room, int64_t numbers) {
    must_fit(numbers, room.numbers, "a layer's scratch");
    return room.at;
}

#ifdef GUARD_BANDS // a build for tests: known bytes behind every buffer of the device's memory
#include "dev/trust/guard.cuh"
#else
enum { GUARD = 0 };
static void guard(const void *, const void *, const char *, int) {}
static void unguard(const void *, size_t) {}
#endif

// What may go beside something else, and what is recorded as one: the schedule's words, see there.
typedef enum { DIRECT_READ, W_O_GRADIENT, W_OUT_GRADIENT, W_IN_GRADIENT, LATE_UPDATE, N_BRANCHES } Branch;
typedef enum { FORWARD_EARLY, FORWARD_LATE, FORWARD_LOSS, BACKWARD, BACKWARD_ADDS, ONE_TOKEN } Pass;

// What only speed needs stands in dev/cuda, and each of its files is included where the layer stands that
// it makes fast. -DSESSA_PLAIN leaves them out: then `plain` is always on, and launches go one behind the
// other, in one stream.
#ifndef SESSA_PLAIN
#include "dev/cuda/schedule.cuh"
#include "dev/cuda/instructions.cuh"
// Of several GPUs: dev/ranks/gpus.cuh
static int gpu_of_rank(int devices);
static int processors_of_exchange(void);
static void wait_for_gpu(cudaEvent_t event);
#else
// Every kernel begins with it: the schedule starts kernels early. Here there is nothing to wait for.
__device__ static inline void wait_for_results(void) {}
#define LAUNCH(kernel, blocks, threads, shared, stream, ...) \
    ((kernel)<<<blocks, threads, shared, stream>>>(__VA_ARGS__), \
     cuda_check(cudaGetLastError(), #kernel, __LINE__))
typedef struct {} Recordings;
static cudaStream_t beside(Branch, int = 1) { return gpu.stream; }
static void join(Branch) {}
template <typename M, typename F> static void replay(M *, Pass, int, int, double, F f) { f(); }
static void forget_recordings(Recordings *) {}
static int early_layers(const Config *) { return 0; }
static void tiles_open(int) {}
// One GPU has all.
template <typename X> struct ModelGPU;
static int gpu_of_rank(int) { return 0; }
static int processors_of_exchange(void) { return 0; }
static int sharers(Mode) { return 0; }
static int64_t least_range(void) { return 0; }
static void wait_for_gpu(cudaEvent_t event) { CUDA(cudaEventSynchronize(event)); }
template <typename X> static int64_t exchange_room(const ModelGPU<X> *) { return 0; }
template <typename X> static Model *share_out(ModelGPU<X> *, char *) { return NULL; }
static void wait_for_others(void) {}
static int run_gpus(int argc, char **argv, const Backend *one) { return run_program(argc, argv, one); }
template <typename... A> static void exchange_close(A...) {}
template <typename... A> static void layer_is_behind(A...) {}
template <typename... A> static void exchange_layers(A...) {}
template <typename... A> static void exchange_embedding(A...) {}
template <typename... A> static void exchange_squares(A...) {}
template <typename... A> static void exchange_weights(A...) {}
template <typename... A> static void gather_moments(A...) {}
template <typename... A> static void take_moments(A...) {}
// The fast ways, none of which is called.
template <typename... A> static void embedding_backward_fast(A &&...) {}
template <typename... A> static void attention_forward_fast(A &&...) {}
template <typename... A> static void attention_backward_fast(A &&...) {}
template <typename... A> static void feedback_forward_fast(A &&...) {}
template <typename... A> static void feedback_backward_fast(A &&...) {}
template <typename... A> static void scan_forward_fast(A &&...) {}
template <typename... A> static void scan_backward_fast(A &&...) {}
template <typename... A> static void hidden_decode_gpu(A &&...) {}
// What they would need.
typedef struct { int tiles, kept; int64_t weights, total; } Panels;
template <typename... A> static int64_t tile_sums_room(A...) { return 0; }
template <typename... A> static int64_t embedding_scratch(A...) { return 0; }
template <typename... A> static int64_t decode_numbers(A...) { return 0; }
template <typename... A> static int decodes(A...) { return 0; }
template <typename... A> static int scan_rows(A...) { return 0; }
static int feedback_shared(void) { return 0; }
static int in_ring(Shape) { return 0; }
#endif

// Opens the device once. FAILED and a line in error if there is none.
static int gpu_open(char *error) {
    if (gpu.ready) return 0;
    int devices = 0;
    cudaError_t code = cudaGetDeviceCount(&devices);
    if (code != cudaSuccess || devices == 0)
        return fail(error, NULL, "no CUDA device: %s",
                    code == cudaSuccess ? "none is there" : cudaGetErrorString(code));
    gpu.device = gpu_of_rank(devices);
    if ((code = cudaSetDevice(gpu.device)) != cudaSuccess ||
        (code = cudaMalloc((void **)&gpu.workspace, 2 * (WORKSPACE + GUARD))) != cudaSuccess)
        return fail(error, NULL, "the CUDA device cannot be used: %s", cudaGetErrorString(code));
    for (int i = 0; i < 2; i++) {
        char *at = gpu.workspace + i * (WORKSPACE + GUARD);
        CUDA(cudaMemset(at, 0, WORKSPACE));
        guard(at + WORKSPACE, at + WORKSPACE + GUARD, "workspace", i);
    }
    cudaStream_t *streams[] = {&gpu.late, &gpu.side, &gpu.stream, &gpu.exchange};
    for (int i = 0; i < 4; i++) CUDA(cudaStreamCreateWithPriority(streams[i], cudaStreamDefault, -i));
    LT(cublasLtCreate(&gpu.lt));
    int major = 0;
    CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, gpu.device));
    CUDA(cudaDeviceGetAttribute(&gpu.processors, cudaDevAttrMultiProcessorCount, gpu.device));
    CUDA(cudaDeviceGetAttribute(&gpu.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, gpu.device));
    CUDA(cudaDeviceGetAttribute(&gpu.shared_together, cudaDevAttrMaxSharedMemoryPerMultiprocessor, gpu.device));
    gpu.spared = processors_of_exchange();
    gpu.processors -= gpu.spared;
    tiles_open(major);
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
template <typename X> __device__ inline float rounded(float x) { return get(to<X>(x)); } // as memory holds it

// Instructions that CUDA has no word for. On a machine without a GPU dev/trust/emulate has them.
#ifndef SESSA_EMULATED
// 16 bytes that no other thread writes meanwhile
[[maybe_unused]] __device__ static inline uint4 load_16_ahead(const uint4 *at) {
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
}
// `threads` of the block wait for each other
__device__ static inline void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}
__device__ static inline uint32_t cvt_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}
#endif

// SPAN neighbours of a row at once: 8 of them, 16 or 32 bytes, where everything is aligned, else 1.
template <int SPAN> __device__ inline void read_some(float v[SPAN], const float *at) {
    if constexpr (SPAN == 1) v[0] = *at;
    else if constexpr (SPAN == 2) *(float2 *)v = *(const float2 *)at;
    else for (int i = 0; i < SPAN; i += 4) {
        float4 four = *(const float4 *)(at + i);
        v[i] = four.x; v[i + 1] = four.y; v[i + 2] = four.z; v[i + 3] = four.w;
    }
}
template <int SPAN> __device__ inline void read_some(float v[SPAN], const bf16 *at) {
    if constexpr (SPAN == 1) v[0] = get(*at);
    else if constexpr (SPAN == 2) for (int i = 0; i < 2; i++) v[i] = get(at[i]);
    else {
        union { uint4 whole; unsigned short part[8]; } u;
        u.whole = *(const uint4 *)at;
        for (int i = 0; i < SPAN; i++) v[i] = __uint_as_float((uint32_t)u.part[i] << 16);
    }
}
// The same of what no other thread writes meanwhile: these reads may pass the writes before them, but nothing
// volatile.
template <int SPAN, typename X> __device__ inline void read_ahead(float v[SPAN], const X *at) {
    if constexpr (SPAN == 1) v[0] = get(*at);
    else {
        uint4 all[SPAN * sizeof(X) / 16];
        for (int i = 0; i < SPAN * (int)sizeof(X) / 16; i++) all[i] = load_16_ahead((const uint4 *)at + i);
        read_some<SPAN>(v, (const X *)all);
    }
}
template <int SPAN> __device__ inline void write_some(float *at, const float v[SPAN]) {
    if constexpr (SPAN == 1) *at = v[0];
    else if constexpr (SPAN == 2) *(float2 *)at = make_float2(v[0], v[1]);
    else for (int i = 0; i < SPAN; i += 4)
        *(float4 *)(at + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
}
__device__ static inline uint32_t pack_two(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *(uint32_t *)&pair;
}
template <int SPAN> __device__ inline void write_some(bf16 *at, const float v[SPAN]) {
    if constexpr (SPAN == 1) *at = to<bf16>(v[0]);
    else if constexpr (SPAN == 2) *(uint32_t *)at = pack_two(v[0], v[1]);
    else *(uint4 *)at = make_uint4(pack_two(v[0], v[1]), pack_two(v[2], v[3]), pack_two(v[4], v[5]),
                                   pack_two(v[6], v[7]));
}

// SPAN numbers as a value: a formula of packs is that of each number; a float in it is SPAN equal ones.
template <int SPAN> struct Pack {
    float v[SPAN];
    Pack() = default;
    __device__ Pack(float x) { for (int i = 0; i < SPAN; i++) v[i] = x; }
    __device__ float &operator[](int i) { return v[i]; }
    __device__ void operator+=(Pack b) { for (int i = 0; i < SPAN; i++) v[i] += b[i]; }
    __device__ void operator-=(Pack b) { for (int i = 0; i < SPAN; i++) v[i] -= b[i]; }
    __device__ void operator*=(Pack b) { for (int i = 0; i < SPAN; i++) v[i] *= b[i]; }
    __device__ friend Pack operator+(Pack a, Pack b) { a += b; return a; }
    __device__ friend Pack operator-(Pack a, Pack b) { a -= b; return a; }
    __device__ friend Pack operator*(Pack a, Pack b) { a *= b; return a; }
};
template <int SPAN, typename X> __device__ inline Pack<SPAN> read(const X *at) {
    Pack<SPAN> x;
    read_some<SPAN>(x.v, at);
    return x;
}
template <int SPAN, typename X> __device__ inline void write(X *at, Pack<SPAN> x) {
    write_some<SPAN>(at, x.v);
}
// f(x), number by number
template <int SPAN, typename F> __device__ inline Pack<SPAN> each_of(Pack<SPAN> x, F f) {
    for (int i = 0; i < SPAN; i++) x[i] = f(x[i]);
    return x;
}
// sum + x_0 + x_1 + ..., in this order
template <int SPAN> __device__ inline float add_up(float sum, Pack<SPAN> x) {
    for (int i = 0; i < SPAN; i++) sum += x[i];
    return sum;
}
// Whether what has these strides and begins at these addresses can be read 8 at once.
static int wide(std::initializer_list<int64_t> strides, std::initializer_list<const void *> pointers) {
    int ok = 1;
    for (int64_t stride : strides) ok &= stride % 8 == 0;
    for (const void *pointer : pointers) ok &= (uintptr_t)pointer % 16 == 0;
    return ok;
}

// for n < rows: for i < width, in steps of SPAN: f(SPAN, n, i), which does the numbers i .. i+SPAN-1 of row
// n; the compiler knows SPAN, 8 or 1. A thread takes one such piece. This pass and those below go from the
// last row to the first: products go the other way, and what was written last is still in the L2 cache.
const int64_t MOST_PIECES = 0xFFFFFF00;
template <int N> struct Known { __host__ __device__ constexpr operator int() const { return N; } };
template <int SPAN, typename F> __global__ void each_kernel(F f, unsigned rows, unsigned pieces) {
    wait_for_results();
    unsigned item = blockIdx.x * blockDim.x + threadIdx.x; // there are at most MOST_PIECES
    if (item >= rows * pieces) return;
    item = rows * pieces - 1 - item;
    f(Known<SPAN>(), (int)(item / pieces), (int)(item % pieces) * SPAN);
}
template <typename F> static void each(int64_t rows, int width, int in_eights, cudaStream_t stream, F f) {
    int pieces = in_eights ? width / 8 : width;
    must_fit(rows * pieces, MOST_PIECES, "threads of a pass");
    unsigned blocks = (unsigned)((rows * pieces + 255) / 256);
    if (blocks) LAUNCH((in_eights ? each_kernel<8, F> : each_kernel<1, F>), blocks, 256, 0, stream, f,
                       (unsigned)rows, (unsigned)pieces);
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

// Sums over rows, on the way of a pass that reads them anyway: each chunk of rows leaves one partial sum a
// column, and one launch for a whole layer adds them up in the chunks' order, out[i] += Σ_c
// partial[c·stride + i].
typedef struct { float *out; const float *partial; int chunks, stride, width; } ColumnSum;
// add: to the gradients that are there, else over them, as all first passes behind an update do. The
// partial sums lie in room .. end, those of the next pass from `next` on; how much that takes says
// column_sums_room.
enum { MOST_SUMS = 16 };
typedef struct { ColumnSum list[MOST_SUMS]; int n, add; float *room, *next, *end; } ColumnSums;
// BLOCKS_AT_ONCE: 4 a multiprocessor of an H100. GROUP_COLUMNS: of a block, in eights. ROW_BLOCK: threads of
// a pass by rows. SUM_ROWS: of a partial sum that a product in tiles leaves.
enum { BLOCKS_AT_ONCE = 528, GROUP_COLUMNS = 128, ROW_BLOCK = 320, SUM_ROWS = 128 };
static float *sums_place(ColumnSums *sums, int64_t numbers) {
    float *place = sums->next;
    must_fit(numbers, sums->end - place, "partial sums over rows");
    sums->next += numbers;
    return place;
}
static void column_sum(ColumnSums *sums, float *out, const float *partial, int chunks, int stride,
                       int width) {
    if (!out) return;
    must_fit(sums->n + 1, MOST_SUMS, "sums over rows");
    sums->list[sums->n++] = {out, partial, chunks, stride, width};
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

// The same loops with sums over the rows: f(SPAN, n, i, sum) adds to the packs sum[k]. A block takes 16
// pieces of SPAN columns of every gridDim.y-th 16 rows, its chunk, a thread a piece of one of these.
// outs[k] gets sum k, a third sum its first column alone: one that is the same for all columns.
template <int SPAN, int SUMS, typename F>
__global__ void __launch_bounds__(256, 4) each_with_sums_kernel(F f, float *partial, int N, int width) {
    __shared__ float parts[16][16 * SPAN];
    wait_for_results();
    int i = (blockIdx.x * 16 + threadIdx.x % 16) * SPAN, y = threadIdx.x / 16;
    Pack<SPAN> sum[SUMS] = {};
    if (i < width)
        for (int n = N - 1 - (int)blockIdx.y * 16 - y; n >= 0; n -= 16 * gridDim.y)
            f(Known<SPAN>(), n, i, sum);
    for (int k = 0; k < SUMS; k++) {
        for (int c = 0; c < SPAN; c++) parts[y][threadIdx.x % 16 * SPAN + c] = sum[k][c];
        __syncthreads();
        int column = blockIdx.x * 16 * SPAN + threadIdx.x;
        if (threadIdx.x < 16 * SPAN && column < width) {
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
static void each_with_sums(float *const (&outs)[SUMS], ColumnSums *sums, int N, int width, int in_eights,
                           cudaStream_t stream, F f) {
    int chunks = sum_chunks(N, width, in_eights);
    float *partial = sums_place(sums, (int64_t)chunks * SUMS * width);
    LAUNCH((in_eights ? each_with_sums_kernel<8, SUMS, F> : each_with_sums_kernel<1, SUMS, F>),
           dim3(sum_groups(width, in_eights), chunks), 256, 0, stream, f, partial, N, width);
    for (int k = 0; k < SUMS; k++)
        column_sum(sums, outs[k], partial + k * width, chunks, SUMS * width, k == 2 ? 1 : width);
}

// for n < N: f(SPAN, PIECES), a pass with sums along row n: threadIdx.y takes a row, threadIdx.x a piece of
// SPAN of its columns (PIECES of them, blockDim.x·SPAN apart, where rows are that long). A row's threads are
// whole warps and wait for each other alone.
template <int SPAN, int PIECES, typename F> __global__ void __launch_bounds__(ROW_BLOCK, 2) rows_kernel(F f) {
    wait_for_results();
    f(Known<SPAN>(), Known<PIECES>());
}
// for (auto [p, i] : pieces<SPAN, PIECES>(D)): the thread's pieces of a row of D numbers, piece p from i
template <int SPAN, int PIECES> struct pieces {
    int D, p, i;
    __device__ pieces(int columns) : D(columns), p(0), i(threadIdx.x * SPAN) {}
    __device__ pieces begin() const { return *this; }
    __device__ pieces end() const { return *this; }
    __device__ bool operator!=(const pieces &) const { return p < PIECES && i < D; }
    __device__ void operator++() { p++; i += blockDim.x * SPAN; }
    __device__ int2 operator*() const { return {p, i}; }
};
// The row of this thread, the last rows first: see each.
__device__ static inline int last_first(void) {
    return (gridDim.x - 1 - blockIdx.x) * blockDim.y + threadIdx.y;
}
enum { MOST_COLUMNS = 64 * ROW_BLOCK, MOST_IN_EIGHTS = 4 * 8 * ROW_BLOCK }; // of a row
static dim3 row_threads(int D, int in_eights) {
    int x = (int)round_up(min_int(in_eights ? (D + 7) / 8 : D, ROW_BLOCK), 32);
    return dim3(x, ROW_BLOCK / x);
}
static int row_blocks(int N, int D, int in_eights, int most) { // most by ones
    int y = (int)row_threads(D, in_eights).y, blocks = (N + y - 1) / y;
    return most ? min_int(blocks, most) : blocks;
}
template <typename F>
static void rows(int N, int D, int in_eights, int most_blocks, cudaStream_t stream, F f) {
    int eights = in_eights && D <= MOST_IN_EIGHTS, blocks = row_blocks(N, D, eights, most_blocks);
    must_fit(D, MOST_COLUMNS, "columns of a row");
    auto kernel = !eights              ? rows_kernel<1, 64, F>
                  : D <= 8 * ROW_BLOCK ? rows_kernel<8, 1, F>
                                       : rows_kernel<8, 4, F>;
    LAUNCH(kernel, blocks, row_threads(D, eights), 0, stream, f);
}
// (Σ x, Σ y) over the row's threads. shared: a number a warp, not the one of the sum before.
__device__ static inline float2 row_sum(float x, float y, float2 *shared) {
    int warps = blockDim.x / 32, first = threadIdx.y * warps;
    float2 sum = {warp_sum(x), warp_sum(y)};
    if (warps == 1) return sum;
    if (threadIdx.x % 32 == 0) shared[first + threadIdx.x / 32] = sum;
    barrier_sync(threadIdx.y + 1, blockDim.x);
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
template <typename X> static MatrixGPU<X> transpose_gpu(MatrixGPU<X> a) {
    return {a.at, a.col, a.row, a.step};
}

// Where a product goes: rows of `row` numbers, the next matrix `step` further.
template <typename O> struct MatrixOut { O *at; int64_t row, step; };
template <typename O> static MatrixOut<O> into(O *at, int64_t row, int64_t step = 0) {
    return {at, row, step};
}

// For shapes and alignments that cuBLASLt refuses: a thread takes one element of out.
template <typename O, typename X>
__global__ void product_kernel(MatrixOut<O> out, MatrixGPU<X> a, MatrixGPU<X> b, int M, int N, int K,
                               float alpha, float beta, const O *bias, const float *scale) {
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

static void describe(cublasLtMatrixLayout_t layout, int bytes, int64_t rows, int64_t cols, int64_t ld,
                     int batch, int64_t step) {
    LT(cublasLtMatrixLayoutInit(layout, bytes == 2 ? CUDA_R_16BF : CUDA_R_32F, (uint64_t)rows, (uint64_t)cols,
                                ld));
    LT(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof(batch)));
    LT(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &step,
                                        sizeof(step)));
}
static void describe(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t what, int32_t value) {
    LT(cublasLtMatmulDescSetAttribute(operation, what, &value, sizeof(value)));
}

// The first algorithm of cuBLASLt's heuristic for this shape, without workspace (some that get one clear it
// first) unless that leaves much of the GPU idle: then a long sum is cut in pieces. Of short sums the first
// in tiles of 128×128. All measured: dev/speed/gpu_diary.md. cuBLASLt thinks in columns, out^T = B^T·A^T:
// its A is our B.
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
    LT(cublasLtMatmulDescInit(&p->operation, k->tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F,
                              CUDA_R_32F));
    describe(&p->operation, CUBLASLT_MATMUL_DESC_TRANSA, left_t ? CUBLAS_OP_T : CUBLAS_OP_N);
    describe(&p->operation, CUBLASLT_MATMUL_DESC_TRANSB, right_t ? CUBLAS_OP_T : CUBLAS_OP_N);
    describe(&p->operation, CUBLASLT_MATMUL_DESC_EPILOGUE,
             k->biased ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT);
    if (k->scaled) describe(&p->operation, CUBLASLT_MATMUL_DESC_POINTER_MODE, CUBLASLT_POINTER_MODE_DEVICE);
    describe(&p->a, k->in_bytes, left_t ? k->K : k->N, left_t ? k->N : k->K, k->b_ld, k->batch, k->b_step);
    describe(&p->b, k->in_bytes, right_t ? k->M : k->K, right_t ? k->K : k->M, k->a_ld, k->batch, k->a_step);
    describe(&p->out, k->out_bytes, k->N, k->M, k->out_ld, k->batch, k->out_step);
    LT(cublasLtMatmulPreferenceInit(&preference));
    for (auto &one : wanted)
        LT(cublasLtMatmulPreferenceSetAttribute(&preference, one.what, &one.value, sizeof(one.value)));
    for (uint64_t room : {0, (int)WORKSPACE}) {
        if (found && results[0].wavesCount > 0.6f) break;
        LT(cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room,
                                                sizeof(room)));
        if (cublasLtMatmulAlgoGetHeuristic(gpu.lt, &p->operation, &p->a, &p->b, &p->out, &p->out, &preference,
                                           CHOICES, results, &found) != CUBLAS_STATUS_SUCCESS)
            found = 0;
    }
    p->refused = !found;
    cublasLtMatmulHeuristicResult_t *best = results;
    for (int i = 0; i < found && best == results && k->K <= SHORT_SUM && !k->a_transposed; i++) {
        int tile = 0;
        size_t size;
        LT(cublasLtMatmulAlgoConfigGetAttribute(&results[i].algo, CUBLASLT_ALGO_CONFIG_TILE_ID, &tile,
                                                sizeof(tile), &size));
        if (tile == CUBLASLT_MATMUL_TILE_128x128 && results[i].state == CUBLAS_STATUS_SUCCESS)
            best = &results[i];
    }
    if (found) p->algo = best->algo;
    if (found) p->workspace = best->workspaceSize;
}

// out = alpha·A·B + beta·out + bias for each of `batch` matrices: A (M,K), B (K,N), out (M,N), bias (N) or
// NULL. beta 0 overwrites. Sums are in float32. scale: alpha in the device's memory, in place of the
// argument, and 0 and 1.
template <typename O, typename X>
static void matmul_gpu(MatrixOut<O> out, MatrixGPU<X> a, MatrixGPU<X> b, int M, int N, int K, float alpha,
                       float beta, int batch, cudaStream_t stream, const O *bias = NULL,
                       const float *scale = NULL) {
    if (M <= 0 || N <= 0 || batch <= 0) return;
    int64_t a_step = batch > 1 ? a.step : 0, b_step = batch > 1 ? b.step : 0,
            out_step = batch > 1 ? out.step : 0, in_bytes = sizeof(X), out_bytes = sizeof(O);
    int a_align = alignment(a.at, a_step * in_bytes), b_align = alignment(b.at, b_step * in_bytes),
        out_align = alignment(out.at, out_step * out_bytes);
    int64_t a_ld = a.col == 1 ? a.row : a.col, b_ld = b.col == 1 ? b.row : b.col;
    ProductKey key = {M,
                      N,
                      K,
                      batch,
                      a.col != 1,
                      b.col != 1,
                      bias != NULL,
                      scale != NULL,
                      gpu.precision == TF32,
                      (int)in_bytes,
                      (int)out_bytes,
                      a_align,
                      b_align,
                      out_align,
                      a_ld,
                      b_ld,
                      out.row,
                      a_step,
                      b_step,
                      out_step};
    uint64_t hash = 0;
    for (size_t i = 0; i < sizeof(key) / 8; i++)
        hash = splitmix64(hash ^ ((const uint64_t *)(const void *)&key)[i]);
    Product *p = &products[hash % N_PRODUCTS];
    if (!p->known || memcmp(&p->key, &key, sizeof(key))) product_prepare(p, &key);
    if (p->refused) {
        LAUNCH((product_kernel<O, X>), dim3((unsigned)(((int64_t)M * N + 127) / 128), (unsigned)batch), 128,
               0, stream, out, a, b, M, N, K, alpha, beta, bias, scale);
        return;
    }
    if (bias)
        LT(cublasLtMatmulDescSetAttribute(&p->operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias,
                                          sizeof(bias)));
    const float *alpha_at = scale ? scale : &alpha, *beta_at = scale ? scale + (beta == 0 ? 1 : 2) : &beta;
    LT(cublasLtMatmul(gpu.lt, &p->operation, alpha_at, b.at, &p->a, a.at, &p->b, beta_at, out.at, &p->out,
                      out.at, &p->out, &p->algo, gpu.workspace + (stream == gpu.side ? WORKSPACE + GUARD : 0),
                      p->workspace, stream));
}

// ----------------------------------------------------------------------------
// random numbers

__device__ static inline uint64_t splitmix64_gpu(uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// A mask of dropout, number by number that of the C function; the passes that need it compute it. What is drawn,
// its key and the index of the first number, is in the device's memory: a recorded step finds that of its own
// time there.
typedef struct { uint64_t key, first; } Draw;
typedef struct { const Draw *draw; uint64_t place, threshold; float scale; } Mask;
static Draw draw_of(Dropout drop) {
    return {splitmix64(splitmix64(drop.seed) ^ drop.micro_step), drop.first};
}
static Mask mask_of(const Draw *draw, double probability, int place) {
    return {draw, (uint64_t)place, (uint64_t)(probability * 4294967296.0), (float)(1 / (1 - probability))};
}
// The factors of the numbers at, at + 1, ...
template <int SPAN> __device__ inline Pack<SPAN> mask_at(const Mask &mask, int64_t at) {
    Pack<SPAN> factor;
    uint64_t key = mask.threshold ? splitmix64_gpu(mask.draw->key ^ mask.place) : 0,
             index = mask.threshold ? mask.draw->first + (uint64_t)at : 0;
    for (int c = 0; c < SPAN; c++)
        factor[c] = !mask.threshold ? 1
                    : (splitmix64_gpu(key ^ (index + c)) >> 32) >= mask.threshold ? mask.scale : 0;
    return factor;
}

// ----------------------------------------------------------------------------
// layers, in the order in which data meets them

// embedding_forward and dropout in one pass: out[n] = mask ⊙ wte[inp[n]]
static void embedding_dropout_forward_gpu(float *out, const int *inp, const float *wte, Mask mask, int B,
                                          int T, int D, cudaStream_t stream) {
    each((int64_t)B * T, D, wide({D}, {out, wte}), stream, [=] __device__ (auto SPAN, int n, int i) {
        int64_t at = (int64_t)n * D + i;
        write(out + at, read<SPAN>(wte + (int64_t)inp[n] * D + i) * mask_at<SPAN>(mask, at));
    });
}

// What the gradient of the embedding reads: the batch's N tokens, of a vocabulary of V, in the device's
// memory and in the host's. The rest is the fast way's: room for the lists of sort_tokens in both, scratch
// (V+1), when the host may write again.
typedef struct {
    const int *device, *host;
    int N, V;
    int *lists, *host_lists, *starts;
    cudaEvent_t there;
} Tokens;

#ifndef SESSA_PLAIN
#include "dev/cuda/embedding.cuh"
#endif

// dwte[v] += Σ dout_n over the rows n with token v. A block takes token v, a lane of its warps a column i; 32
// tokens are looked at at once.
[[maybe_unused]]
static __global__ void embedding_backward_kernel(float *dwte, const float *dout, const int *inp, int N,
                                                 int D) {
    wait_for_results();
    int v = blockIdx.x, lane = threadIdx.x % 32;
    for (int i = threadIdx.x; i < (D + 31) / 32 * 32; i += blockDim.x) {
        float sum = 0;
        for (int n0 = 0; n0 < N; n0 += 32) {
            int here = n0 + lane < N && inp[n0 + lane] == v;
            for (unsigned hits = __ballot_sync(~0u, here); hits; hits &= hits - 1)
                if (i < D) sum += dout[(int64_t)(n0 + __ffs(hits) - 1) * D + i];
        }
        if (i < D) dwte[(int64_t)v * D + i] += sum;
    }
}
static void embedding_backward_gpu(float *dwte, Scratch scratch, const float *dout, Tokens tokens, int D,
                                   cudaStream_t stream) {
    if (!plain) return embedding_backward_fast(dwte, scratch, dout, tokens, D, stream);
    int threads = min_int((D + 31) / 32 * 32, 256);
    LAUNCH(embedding_backward_kernel, tokens.V, threads, 0, stream, dwte, dout, tokens.device, tokens.N, D);
}

// residual_forward and layernorm_forward in one pass:
//     x += mask ⊙ branch (branch NULL: none),   kept = X(x) (NULL: not wanted),   out = LayerNorm(x)
template <typename X>
static void residual_layernorm_forward_gpu(X *out, X *kept, float *mean, float *rstd, float *x,
                                           const X *branch, Mask mask, const float *weight, const float *bias,
                                           int N, int D, cudaStream_t stream) {
    int in_eights = wide({D}, {out, kept, x, branch, weight, bias});
    rows(N, D, in_eights, 0, stream, [=] __device__ (auto SPAN, auto PIECES) {
        __shared__ float2 shared[2][ROW_BLOCK / 32];
        int n = last_first();
        if (n >= N) return;
        int64_t row = (int64_t)n * D;
        Pack<SPAN> v[PIECES];
        float sum = 0, squares = 0;
        for (auto [p, i] : pieces<SPAN, PIECES>(D)) {
            v[p] = read<SPAN>(x + row + i);
            if (branch) {
                v[p] += read<SPAN>(branch + row + i) * mask_at<SPAN>(mask, row + i);
                write(x + row + i, v[p]);
            }
            if (kept) write(kept + row + i, v[p]);
            sum = add_up(sum, v[p]);
        }
        float m = row_sum(sum, 0, shared[0]).x / D;
        for (auto [p, i] : pieces<SPAN, PIECES>(D)) squares = add_up(squares, (v[p] - m) * (v[p] - m));
        float r = 1 / sqrtf(row_sum(squares, 0, shared[1]).x / D + 1e-5f);
        for (auto [p, i] : pieces<SPAN, PIECES>(D))
            write(out + row + i, (v[p] - m) * r * read<SPAN>(weight + i) + read<SPAN>(bias + i));
        if (threadIdx.x == 0) { mean[n] = m; rstd[n] = r; }
    });
}

// layernorm_backward, and all that wants its operands or its result:
//     dx += ..., the sums dweight and dbias over the rows,
//     dbranch = X(mask ⊙ dx) with its sums dbranch_bias: the gradient of the branch added below; without one
//     (NULL) dx itself is masked
// fresh: dx starts from 0. A block keeps the sums of its rows in registers.
template <typename X>
static void residual_layernorm_backward_gpu(float *dx, float *dweight, float *dbias, X *dbranch,
                                            float *dbranch_bias, Mask mask, int fresh, const X *dout,
                                            const X *x, const float *mean, const float *rstd,
                                            const float *weight, int N, int D, ColumnSums *sums,
                                            cudaStream_t stream) {
    int in_eights = wide({D}, {dx, dbranch, dout, x, weight}) && D <= MOST_IN_EIGHTS,
        chunks = row_blocks(N, D, in_eights, BLOCKS_AT_ONCE / 2);
    float *partial = sums_place(sums, (int64_t)chunks * 3 * D);
    rows(N, D, in_eights, BLOCKS_AT_ONCE / 2, stream, [=] __device__ (auto SPAN, auto PIECES) {
        __shared__ float2 shared[2][ROW_BLOCK / 32];
        __shared__ float parts[ROW_BLOCK * SPAN];
        Pack<SPAN> sums[3][PIECES] = {}, v[PIECES], g[PIECES], d[PIECES] = {};
        int turn = 0, last = N - 1 - (int)(blockIdx.x * blockDim.y + threadIdx.y);
        for (int n = last; n >= 0; n -= gridDim.x * blockDim.y) {
            int64_t row = (int64_t)n * D;
            float m = mean[n], r = rstd[n], sum = 0, dot = 0;
            for (auto [p, i] : pieces<SPAN, PIECES>(D)) {
                v[p] = read<SPAN>(x + row + i);
                g[p] = read<SPAN>(dout + row + i);
                if (!fresh) d[p] = read<SPAN>(dx + row + i);
                Pack<SPAN> w = read<SPAN>(weight + i);
                v[p] = (v[p] - m) * r;
                sums[0][p] += g[p] * v[p];
                sums[1][p] += g[p];
                g[p] *= w;
                sum = add_up(sum, g[p]);
                dot = add_up(dot, g[p] * v[p]);
            }
            float2 both = row_sum(sum / D, dot / D, shared[turn]);
            turn = !turn;
            for (auto [p, i] : pieces<SPAN, PIECES>(D)) {
                Pack<SPAN> masked = mask_at<SPAN>(mask, row + i);
                for (int c = 0; c < SPAN; c++) { // number by number: of packs it would fuse one product more
                    d[p][c] = (fresh ? 0 : d[p][c]) + r * (g[p][c] - both.x - v[p][c] * both.y);
                    masked[c] *= d[p][c];
                    sums[2][p][c] += masked[c];
                    if (!dbranch) d[p][c] = masked[c];
                }
                write(dx + row + i, d[p]);
                if (dbranch) write(dbranch + row + i, masked);
            }
        }
#pragma unroll
        for (int k = 0; k < 3; k++)
            for (int p = 0; p < PIECES; p++) {
                int i = (p * blockDim.x + threadIdx.x) * SPAN, at = threadIdx.y * blockDim.x + threadIdx.x;
                __syncthreads();
                for (int c = 0; c < SPAN; c++) parts[c * ROW_BLOCK + at] = sums[k][p][c];
                __syncthreads();
                for (int c = 0; c < SPAN && threadIdx.y == 0 && i < D; c++) {
                    float all = 0;
                    for (int y = 0; y < (int)blockDim.y; y++)
                        all += parts[c * ROW_BLOCK + y * blockDim.x + threadIdx.x];
                    partial[(blockIdx.x * 3 + k) * D + i + c] = all;
                }
            }
    });
    column_sum(sums, dweight, partial, chunks, 3 * D, D);
    column_sum(sums, dbias, partial + D, chunks, 3 * D, D);
    column_sum(sums, dbranch_bias, partial + 2 * D, chunks, 3 * D, D);
}

// One product of cuBLASLt.
template <typename X>
static void linear_forward_gpu(X *out, int ld_out, const X *inp, const X *weight, const X *bias, int N,
                               int in, int out_width, cudaStream_t stream) {
    matmul_gpu(into(out, ld_out), rows_of_gpu(inp, in), transpose_gpu(rows_of_gpu(weight, in)), N, out_width,
               in, 1, 0, 1, stream, bias);
}

// linear_backward's second product: dweight = dout^T inp, added to what is there, or written. What goes on
// beside it must leave dout and inp as they are. scale: in the device's memory, see matmul_gpu.
template <typename X>
static void linear_weight_gpu(float *dweight, const X *dout, int ld_dout, const X *inp, int N, int in,
                              int out_width, int add, cudaStream_t stream, const float *scale = NULL) {
    matmul_gpu(into(dweight, in), transpose_gpu(rows_of_gpu(dout, ld_dout)), rows_of_gpu(inp, in), out_width,
               in, N, 1, (float)add, 1, stream, (const float *)NULL, scale);
}
// Both products; dweight NULL: dinp alone. The bias's gradient, a sum over rows of dout, comes from the
// pass that made dout.
template <typename X>
static void linear_backward_gpu(X *dinp, float *dweight, const X *dout, int ld_dout, const X *inp,
                                const X *weight, int N, int in, int out_width, int add, cudaStream_t stream,
                                const float *scale = NULL) {
    matmul_gpu(into(dinp, in), rows_of_gpu(dout, ld_dout), rows_of_gpu(weight, in), N, in, out_width, 1, 0, 1,
               stream, (const X *)NULL, scale);
    if (dweight) linear_weight_gpu(dweight, dout, ld_dout, inp, N, in, out_width, add, stream, scale);
}

// Φ(x), with the polynomial of normal_cdf and gauss = e^(-x²/2)
__device__ static inline float normal_cdf_gpu(float x, float gauss) {
    float t = __fdividef(1, 1 + 0.3f * fabsf(x));
    float tail = gauss * t * (0.11962327f + t * (0.12084553f + t * (0.099347115f + t * (0.1304165f
                 + t * (-0.057167433f + t * (0.21011846f + t * (-0.15937835f + t * 0.036194865f)))))));
    return x < 0 ? tail : 1 - tail;
}
__device__ static inline float gauss_gpu(float x) { return __expf(-x * x / 2); }
__device__ static inline float gelu_gpu(float x) { return x * normal_cdf_gpu(x, gauss_gpu(x)); }

// γ = γ_max tanh(w·ā + b), from the row's w·ā
static __device__ inline float gain_forward_gpu(float dot, float bias, float gamma_max) {
    return gamma_max * tanhf(dot + bias);
}
// the gradient of w·ā + b: dγ γ_max (1 - ratio²), ratio = γ/γ_max
static __device__ inline float gain_backward_gpu(float dgamma, float ratio, float gamma_max) {
    return dgamma * gamma_max * (1 - ratio * ratio);
}

// gelu_forward and, where there is a gain (weight not NULL), gain_forward of its output, in one pass. A row's
// threads take two rows at once.
template <typename X>
static void gelu_gain_forward_gpu(X *out, float *gamma, const X *inp, int ld, const float *weight,
                                  const float *bias, float gamma_max, int N, int D, cudaStream_t stream) {
    int in_eights = wide({D, ld}, {out, inp, weight});
    rows((N + 1) / 2, D, in_eights, 0, stream, [=] __device__ (auto SPAN, auto PIECES) {
        __shared__ float2 shared[ROW_BLOCK / 32];
        int n = 2 * last_first(), both = n + 1 < N; // without both, n twice
        if (n >= N) return;
        float dot[2] = {};
        for (auto [p, i] : pieces<SPAN, PIECES>(D)) {
            Pack<SPAN> v[2], w;
            for (int r = 0; r < 2; r++) v[r] = read<SPAN>(inp + (int64_t)(n + r * both) * ld + i);
            if (weight) w = read<SPAN>(weight + i);
            for (int r = 0; r < 2; r++) {
                v[r] = each_of(v[r], gelu_gpu);
                if (weight) dot[r] = add_up(dot[r], each_of(v[r], rounded<X>) * w);
                write(out + (int64_t)(n + r * both) * D + i, v[r]);
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
static void gelu_gain_backward_gpu(X *dinp, float *dinp_bias, float *dweight, float *dweight_bias,
                                   const X *dout, const X *inp, int ld, const float *dgamma,
                                   const float *gamma, const float *weight, float gamma_max, int N, int D,
                                   ColumnSums *sums, cudaStream_t stream) {
    int in_eights = wide({D, ld}, {dinp, dout, inp, weight});
    each_with_sums({dinp_bias, dweight, dweight_bias}, sums, N, D, in_eights, stream,
                   [=] __device__ (auto SPAN, int n, int i, auto &sum) {
        float ratio = weight ? gamma[n] / gamma_max : 0,
            pre = weight ? gain_backward_gpu(dgamma[n], ratio, gamma_max) : 0;
        Pack<SPAN> v = read<SPAN>(inp + (int64_t)n * ld + i), grad = read<SPAN>(dout + (int64_t)n * D + i);
        if (weight) grad += pre * read<SPAN>(weight + i);
        Pack<SPAN> gauss = each_of(v, gauss_gpu), cdf;
        for (int c = 0; c < SPAN; c++) cdf[c] = normal_cdf_gpu(v[c], gauss[c]);
        sum[1] += pre * each_of(v * cdf, rounded<X>);
        grad *= cdf + v * gauss * 0.39894228040143267794f;
        sum[0] += grad;
        sum[2] += pre;
        write(dinp + (int64_t)n * ld + i, grad);
    });
}

// The pairs among the SPAN numbers v of row n from column i on, turned.
typedef struct { const float *cosine, *sine; int T, half, first; float direction; } Rope;
template <int SPAN> __device__ inline void turn_pairs(float v[SPAN], const Rope &rope, int n, int i) {
    int64_t at = (int64_t)(rope.first + n % rope.T) * rope.half + i / 2 % rope.half;
    Pack<SPAN / 2> cosine = read<SPAN / 2>(rope.cosine + at), sine = read<SPAN / 2>(rope.sine + at);
    for (int c = 0; c < SPAN / 2; c++) {
        float even = v[2 * c], odd = v[2 * c + 1];
        v[2 * c] = even * cosine[c] - odd * rope.direction * sine[c];
        v[2 * c + 1] = even * rope.direction * sine[c] + odd * cosine[c];
    }
}
// A thread takes 8 numbers, or one pair; i counts numbers, or pairs.
template <typename X>
static void rope_forward_gpu(X *x, int ld, const float *cosine, const float *sine, int N, int T, int heads,
                             int d, int first, float direction, cudaStream_t stream) {
    Rope rope = {cosine, sine, T, d / 2, first, direction};
    int in_eights = wide({d, ld}, {x, cosine, sine});
    each(N, heads * (in_eights ? d : d / 2), in_eights, stream, [=] __device__ (auto SPAN, int n, int i) {
        constexpr int COUNT = SPAN == 1 ? 2 : SPAN;
        int first_one = SPAN == 1 ? 2 * i : i;
        X *place = x + (int64_t)n * ld + first_one;
        float v[COUNT];
        for (int c = 0; c < COUNT; c += SPAN) read_some<SPAN>(v + c, place + c);
        turn_pairs<COUNT>(v, rope, n, first_one);
        for (int c = 0; c < COUNT; c += SPAN) write_some<SPAN>(place + c, v + c);
    });
}

// rope_backward of the first `turned` columns, and the sums of all `width` columns over the rows: the
// gradient of the projections' bias. Where a thread takes one number, its neighbour has the other of the
// pair.
template <typename X>
static void rope_bias_backward_gpu(X *dx, float *dbias, int ld, Rope rope, int N, int turned, int width,
                                   ColumnSums *sums, cudaStream_t stream) {
    each_with_sums({dbias}, sums, N, width, wide({2 * rope.half, width, ld}, {dx, rope.cosine, rope.sine}),
                   stream, [=] __device__ (auto SPAN, int n, int i, auto &sum) {
        constexpr int COUNT = SPAN == 1 ? 2 : SPAN;
        float v[COUNT];
        int lane = threadIdx.x % 32, odd = SPAN == 1 && i % 2;
        read_some<SPAN>(v + odd, dx + (int64_t)n * ld + i);
        if (i < turned) {
            if (SPAN == 1) v[!odd] = __shfl_xor_sync(3u << (lane & ~1), v[odd], 1);
            turn_pairs<COUNT>(v, rope, n, i - odd);
            write_some<SPAN>(dx + (int64_t)n * ld + i, v + odd);
        }
        for (int c = 0; c < SPAN; c++) sum[0][c] += v[odd + c];
    });
}

// Softmax over the past. A block takes row r of one item (a sequence, or a head of one), which stands at
// position i0 + r and sees the keys below seen = i0 + r + !strict. Its logits are float32; e takes their
// place as X, ld_x<X>(ld) apart: what is written never passes what is still to be read. In the columns seen
// .. the end of the row's block of P rows, e is 0.
//     e_rj = X(exp(logit_rj - max_r)),   stats_r = (max_r, 1/Σ_j e_rj) with the sum of the rounded e
// known: stats are given and the same e follows. normalised: e/Σe is written instead. A row that sees
// nothing: 1/sum is 0.
template <typename X> static inline int64_t ld_x(int64_t ld) {
    return ld * (int64_t)(sizeof(float) / sizeof(X));
}
__device__ static inline float round_tf32(float x) { return __uint_as_float(cvt_tf32(x)); }
template <typename X>
__global__ void softmax_panel_kernel(float *logits, int64_t ld, int64_t step, float *stats,
                                     int64_t stats_step, int known, int normalised, int tf32, int i0, int n,
                                     int P, int strict) {
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
static void softmax_panel_gpu(float *logits, int64_t ld, int64_t step, float *stats, int64_t stats_step,
                              int known, int normalised, int i0, int n, int P, int strict, int items,
                              cudaStream_t stream) {
    LAUNCH(softmax_panel_kernel<X>, dim3(n, items), i0 + n > 512 ? 256 : 64, 0, stream, logits, ld, step,
           stats, stats_step, known, normalised, gpu.precision == TF32 && sizeof(X) == 4, i0, n, P, strict);
}

// γ_t/z_t, the float32 scale of row r of sequence b; without gamma 1/z_t, without stats 1
struct RowScale {
    const float *gamma, *stats;
    int64_t step;
    __device__ float at(int64_t b, int64_t r) const {
        return (gamma ? gamma[b * step + r] : 1) * (stats ? stats[2 * (b * step + r) + 1] : 1);
    }
};

// A block takes a row of dweights, the gradient of the weights w, and X(w_rj (dweights_rj - Σ_i w_ri
// dweights_ri)) takes its place as e takes that of the logits.
template <typename X>
__global__ void softmax_panel_backward_kernel(float *dweights, const X *weights, int64_t ld, int64_t step,
                                              int64_t w_ld, int64_t w_step, int i0, int n, int P) {
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
static void softmax_panel_backward_gpu(float *dweights, const float *weights, int64_t ld, int64_t step,
                                       int i0, int n, int P, int items, cudaStream_t stream) {
    LAUNCH(softmax_panel_backward_kernel<X>, dim3(n, items), i0 + n > 512 ? 256 : 64, 0, stream, dweights,
           (const X *)weights, ld, step, ld_x<X>(ld), ld_x<X>(step), i0, n, P);
}

// ----------------------------------------------------------------------------
// attention
//
// The weights of a panel of P rows against all columns are one product, Q_I K^T; a kernel makes the softmax
// of them in their place; what the panel reads is one product more. Of the (T,T) weights no more than a
// panel is ever there: the backward pass computes it again.

#ifndef SESSA_PLAIN
#include "dev/cuda/hopper.cuh"
#include "dev/cuda/attention.cuh"
#include "dev/cuda/ampere.cuh"
#endif

// Several heads are one batched product: the same head of all sequences, or all heads of one that is short.
typedef struct Heads {
    int items, batch, by_head; // by_head: an item is a head, the batch its sequences; else the other way
    int64_t step(int64_t sequence, int64_t head) const { return by_head ? sequence : head; }
} Heads;

// How attention goes, for all batches of up to B sequences of up to T tokens: in tiles (fast), or in panels
// of P rows. P asked for, 0: 128 MiB of weights, but 16 rows at least.
typedef struct {
    int tiles, by_head, P;
    int64_t scratch; // numbers: weights and their gradient
} AttentionWay;
template <typename X> static AttentionWay attention_way(int B, int T, int H, int G, int d, int ld, int P) {
    AttentionWay way = {!plain && gpu.tiles && sizeof(X) == sizeof(bf16) && d <= 128 && d % 8 == 0 &&
                            ld % 8 == 0,
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
static void attention_head_gpu(int item, Heads heads, X *out, float *stats, float *weights, const X *q,
                               const X *k, const X *v, Shape shape, int P, cudaStream_t stream) {
    int T = shape.T, H = shape.H, G = shape.G, d = shape.d, ld = shape.ld, first = shape.first, D = H * d;
    int h = heads.by_head ? item : 0, b = heads.by_head ? 0 : item;
    int64_t rows = T - first, all = (int64_t)T * ld, kv = b * all + h / (H / G) * d,
            kv_step = heads.step(all, d), lw = round_up(T, 64), panel = P * lw;
    for (int i0 = first; i0 < T; i0 += P) {
        int n = min_int(P, T - i0);
        int64_t row = b * rows + i0 - first, of_head = (b * H + h) * rows + i0 - first;
        matmul_gpu(into(weights, lw, panel), rows_of_gpu(q + row * ld + h * d, ld, heads.step(rows * ld, d)),
                   transpose_gpu(rows_of_gpu(k + kv, ld, kv_step)), n, i0 + n, d, 1 / sqrtf((float)d), 0,
                   heads.batch, stream);
        softmax_panel_gpu<X>(weights, lw, panel, stats + 2 * of_head, heads.step(2 * H * rows, 2 * rows), 0,
                             1, i0, n, P, 0, heads.batch, stream);
        matmul_gpu(into(out + row * D + h * d, D, heads.step(rows * D, d)),
                   rows_of_gpu((const X *)weights, ld_x<X>(lw), ld_x<X>(panel)),
                   rows_of_gpu(v + kv, ld, kv_step), n, d, i0 + n, 1, 0, heads.batch, stream);
    }
}

template <typename X>
static void attention_forward_gpu(X *out, float *stats, Scratch scratch, const X *q, const X *k, const X *v,
                                  Shape shape, const AttentionWay *way, cudaStream_t stream) {
    if (way->tiles) return attention_forward_fast(out, stats, q, k, v, shape, stream);
    Heads heads = heads_of(way, shape.B, shape.H);
    float *weights = attention_scratch(way, heads, shape.T, scratch);
    for (int item = 0; item < heads.items; item++)
        attention_head_gpu(item, heads, out, stats, weights, q, k, v, shape, way->P, stream);
}

// attention_group_backward of a batch of heads: the first head of a group writes dk and dv, the others add.
template <typename X>
static void attention_group_backward_gpu(int item, Heads heads, X *dq, X *dk, X *dv, float *scratch,
                                         const X *dout, float *stats, const X *q, const X *k, const X *v,
                                         Shape shape, int P, cudaStream_t stream) {
    int T = shape.T, H = shape.H, G = shape.G, d = shape.d, ld = shape.ld, D = H * d;
    int h = heads.by_head ? item : 0, b = heads.by_head ? 0 : item, batch = heads.batch;
    int64_t all = (int64_t)T * ld, kv = b * all + h / (H / G) * d, step = heads.step(all, d),
            lw = round_up(T, 64), panel = P * lw;
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
        softmax_panel_gpu<X>(weights, lw, panel, stats + 2 * of_head, heads.step(2 * (int64_t)H * T, 2 * T),
                             1, 1, i0, n, P, 0, batch, stream);
        matmul_gpu(into(dlogits, lw, panel), dout_I, transpose_gpu(v_h), n, cols, d, 1, 0, batch, stream);
        softmax_panel_backward_gpu<X>(dlogits, weights, lw, panel, i0, n, P, batch, stream);
        matmul_gpu(into(dq + row * ld + h * d, ld, step), dl, k_h, n, d, cols, scale, 0, batch, stream);
        matmul_gpu(into(dk + kv, ld, step), transpose_gpu(dl), q_I, cols, d, n, scale, beta, batch, stream);
        matmul_gpu(into(dv + kv, ld, step), transpose_gpu(w), dout_I, cols, d, n, 1, beta, batch, stream);
    }
}

// out: what the forward pass gave; the fast way takes its sums from it. dbias, unless NULL: dq, dk, dv,
// which follow each other, are taken on through RoPE, and their sums over the rows added to it.
template <typename X>
static void attention_backward_gpu(X *dq, X *dk, X *dv, float *dbias, Scratch scratch, const X *dout,
                                   const X *out, float *stats, const X *q, const X *k, const X *v,
                                   Shape shape, const AttentionWay *way, Rope rope, ColumnSums *sums,
                                   cudaStream_t stream) {
    int turned = (shape.H + shape.G) * shape.d, width = turned + shape.G * shape.d;
    if (way->tiles) attention_backward_fast(dq, dk, dv, dout, out, stats, q, k, v, shape, stream);
    else {
        Heads heads = heads_of(way, shape.B, shape.H);
        float *both = attention_scratch(way, heads, shape.T, scratch);
        for (int item = 0; item < heads.items; item++)
            attention_group_backward_gpu(item, heads, dq, dk, dv, both, dout, stats, q, k, v, shape, way->P,
                                         stream);
    }
    if (!rope.half) turned = 0; // --no-rope
    if (dbias)
        rope_bias_backward_gpu(dq, dbias, shape.ld, rope, shape.B * shape.T, turned, width, sums, stream);
}

// out = Y(x)       x (N,D), out: D of the ld columns of each row
template <typename Y, typename X>
static void copy_gpu(Y *out, int ld, const X *x, int N, int D, cudaStream_t stream) {
    each(N, D, wide({D, ld}, {out, x}), stream, [=] __device__ (auto SPAN, int n, int i) {
        write(out + (int64_t)n * ld + i, read<SPAN>(x + (int64_t)n * D + i));
    });
}

// ----------------------------------------------------------------------------
// the feedback path
//
// s_t = f_t + γ_t Σ_{j<t} α_tj s_j, panel after panel of PANEL rows. What the rows before the panel give is
// one product; within the panel every row waits for those above it, so a thread takes a column and goes
// down the rows: that is the substitution of the C function, with the columns side by side. Of a row's
// logits m is the largest, e_tj = exp(logit_tj - m_t) and z_t = Σ_j e_tj; stats keeps m and 1/z. α = e/z is
// never formed: γ/z is a float32 scale of rows, for in bf16 a γα of 0.999 would be 1.

enum { PANEL = 64 };

// The scratch, in this order; weights, dA and dlogits have `row` numbers a row.
typedef struct {
    int64_t row;
    float *weights; // (B,PANEL,row) the logits, e in their place
    float *dA;      // (B,PANEL,row)
    float *dlogits; // (B,PANEL,row) X
    float *part;    // (B,PANEL,D) forward: what the rows before the panel give; backward: u
    float *all;     // (B,T,D) forward: s; backward: what the rows behind have handed to a row
    float *dk;      // (B,T,D)
} FeedbackScratch;
static int64_t feedback_scratch_gpu(int B, int T, int D) {
    int64_t panel = PANEL * round_up(T, 64), columns = PANEL * (int64_t)D, all = (int64_t)T * D;
    return B * (3 * panel + columns + 2 * all);
}
#ifndef SESSA_PLAIN
#include "dev/cuda/feedback.cuh"
#endif

static FeedbackScratch feedback_scratch_of(Scratch scratch, int B, int T, int D) {
    int64_t row = round_up(T, 64), panel = B * PANEL * row, columns = B * PANEL * (int64_t)D,
            all = (int64_t)B * T * D;
    float *at = borrow(scratch, feedback_scratch_gpu(B, T, D)), *part = at + 3 * panel;
    return {row, at, at + panel, at + 2 * panel, part, part + columns, part + columns + all};
}

// e of the panel of rows i0 .. i0+n-1, in the place of their logits, with m and 1/z (known: given).
template <typename X>
static void feedback_weights_gpu(FeedbackScratch at, float *stats, int known, const X *q, const X *k,
                                 Shape shape, int i0, int n, cudaStream_t stream) {
    int64_t rows = shape.T - shape.first, row = i0 - shape.first, ld = shape.ld, panel = PANEL * at.row;
    MatrixGPU<X> q_I = rows_of_gpu(q + row * ld, ld, rows * ld), k_all = rows_of_gpu(k, ld, shape.T * ld);
    float scale = 1 / sqrtf((float)shape.d);
    matmul_gpu(into(at.weights, at.row, panel), q_I, transpose_gpu(k_all), n, i0 + n, shape.d, scale, 0,
               shape.B, stream);
    softmax_panel_gpu<float>(at.weights, at.row, panel, stats + 2 * row, 2 * rows, known, 0, i0, n, PANEL, 1,
                             shape.B, stream);
}

// What the kernels read of the panel of rows i0 .. i0+n-1, each for the sequence b = blockIdx.y: e_rj is
// weights(r)[j], rows of gamma and stats follow each other, `rows` to the next sequence.
struct PanelRows {
    const float *e, *gamma, *stats;
    int64_t row, rows;
    int T, D, i0, n;
    __device__ const float *weights(int r) const { return e + ((int64_t)blockIdx.y * PANEL + r) * row; }
    __device__ float inverse(int r) const { return stats[2 * (blockIdx.y * rows + r) + 1]; }  // 1/z
    __device__ float scale(int r) const { return gamma[blockIdx.y * rows + r] * inverse(r); } // γ/z
};
static PanelRows panel_rows(FeedbackScratch at, const float *gamma, const float *stats, Shape shape, int i0,
                            int n) {
    int64_t rows = shape.T - shape.first, row = i0 - shape.first;
    return {at.weights, gamma + row, stats + 2 * row, at.row, rows, shape.T, shape.d, i0, n};
}

// s_t = f_t + (γ_t/z_t) (before_t + Σ_{i0≤j<t} e_tj s_j) for the panel's rows, from the first to the last.
// A thread takes column i. exact (B,T,D) is s in float32: s rounded to X and read again, row after row,
// would wander off.
template <typename X>
__global__ void feedback_solve_kernel(X *s, float *exact, const X *f, int64_t f_step, const float *before,
                                      PanelRows p) {
    wait_for_results();
    int D = p.D, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= D) return;
    int64_t place = ((int64_t)blockIdx.y * p.T + p.i0) * D + i;
    before += (int64_t)blockIdx.y * PANEL * D + i;
    for (int r = 0; r < p.n; r++) {
        const float *e = p.weights(r) + p.i0;
        int64_t row = (int64_t)r * D;
        float sum = p.i0 ? before[row] : 0;
        for (int j = 0; j < r; j++) sum += e[j] * exact[place + (int64_t)j * D];
        exact[place + row] = get(f[blockIdx.y * f_step + row + i]) + p.scale(r) * sum;
        s[place + row] = to<X>(exact[place + row]);
    }
}

// weights and c are the fast way's: what it keeps for the backward pass.
template <typename X>
static void feedback_forward_gpu(X *s, X *c, float *stats, Scratch weights, Scratch scratch, const X *f,
                                 const X *q, const X *k, const float *gamma, Shape shape,
                                 const Panels *panels, cudaStream_t stream) {
    if (!plain)
        return feedback_forward_fast(s, c, stats, weights, scratch, f, q, k, gamma, shape, panels, stream);
    int B = shape.B, T = shape.T, D = shape.d, first = shape.first;
    int64_t all = (int64_t)T * D, columns = PANEL * (int64_t)D, f_step = (int64_t)(T - first) * D;
    FeedbackScratch at = feedback_scratch_of(scratch, B, T, D);
    dim3 blocks((D + 63) / 64, B);
    copy_gpu(at.all, D, s, first, D, stream);
    for (int i0 = first; i0 < T; i0 += PANEL) {
        int n = min_int(PANEL, T - i0);
        const X *f_I = f + (int64_t)(i0 - first) * D;
        feedback_weights_gpu(at, stats, 0, q, k, shape, i0, n, stream);
        MatrixGPU<float> e = rows_of_gpu<float>(at.weights, at.row, PANEL * at.row),
                         s_all = rows_of_gpu<float>(at.all, D, all);
        if (i0) matmul_gpu(into(at.part, D, columns), e, s_all, n, D, i0, 1, 0, B, stream);
        PanelRows p = panel_rows(at, gamma, stats, shape, i0, n);
        LAUNCH(feedback_solve_kernel<X>, blocks, 64, 0, stream, s, at.all, f_I, f_step, at.part, p);
    }
}

// λ_t = ds_t + handed_t + Σ_{t<j<i0+n} e_jt u_j with u_j = (γ_j/z_j) λ_j, from the panel's last row to its
// first. A thread takes column i. df = X(λ), u stays float32.
template <typename X>
__global__ void feedback_adjoint_kernel(X *df, float *u, const X *ds, const float *handed, PanelRows p) {
    wait_for_results();
    int D = p.D, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= D) return;
    int64_t place = ((int64_t)blockIdx.y * p.T + p.i0) * D + i;
    u += (int64_t)blockIdx.y * PANEL * D + i;
    for (int r = p.n - 1; r >= 0; r--) {
        int64_t row = (int64_t)r * D;
        float lambda = get(ds[place + row]) + (p.i0 + p.n < p.T ? handed[place + row] : 0);
        for (int j = r + 1; j < p.n; j++) lambda += p.weights(j)[p.i0 + r] * u[(int64_t)j * D];
        df[place + row] = to<X>(lambda);
        u[row] = p.scale(r) * lambda;
    }
}

// Row t of the panel, with dA_tj = λ_t·s_j: dgamma_t = δ_t = Σ_j α_tj dA_tj, dlogits_tj = (γ_t/z_t) e_tj
// (dA_tj - δ_t), as X. A block takes a row; dlogits has the layout of e.
template <typename X>
__global__ void feedback_dlogits_kernel(float *dgamma, X *dlogits, const float *dA, PanelRows p) {
    __shared__ float shared[32];
    wait_for_results();
    int r = blockIdx.x, t = p.i0 + r;
    const float *e = p.weights(r);
    float sum = 0, scale = p.scale(r);
    dA += e - p.e;
    dlogits += e - p.e;
    for (int j = threadIdx.x; j < t; j += blockDim.x) sum += e[j] * dA[j];
    float delta = p.inverse(r) * block_sum(sum, shared);
    if (threadIdx.x == 0) dgamma[(int64_t)blockIdx.y * p.T + t] = delta;
    for (int j = threadIdx.x; j < p.i0 + p.n; j += blockDim.x)
        dlogits[j] = to<X>(j < t ? scale * e[j] * (dA[j] - delta) : 0);
}

// df may be ds. dbias, unless NULL: the sums of dq and dk, which follow each other, over the rows are added
// to it.
template <typename X>
static void feedback_backward_gpu(X *df, X *dq, X *dk, float *dgamma, float *dbias, Scratch weights,
                                  Scratch scratch, const X *ds, const X *s, const X *c, float *stats,
                                  const X *q, const X *k, const float *gamma, Shape shape,
                                  const Panels *panels, ColumnSums *sums, cudaStream_t stream) {
    if (!plain)
        return feedback_backward_fast(df, dq, dk, dgamma, dbias, weights, scratch, ds, s, c, stats, q, k,
                                      gamma, shape, panels, sums, stream);
    int B = shape.B, T = shape.T, D = shape.d, ld = shape.ld;
    int64_t all = (int64_t)T * D, columns = PANEL * (int64_t)D, wide_all = (int64_t)T * ld;
    float scale = 1 / sqrtf((float)D);
    FeedbackScratch at = feedback_scratch_of(scratch, B, T, D);
    int64_t panel = PANEL * at.row;
    X *dlogits = (X *)at.dlogits;
    for (int i0 = (T - 1) / PANEL * PANEL; i0 >= 0; i0 -= PANEL) {
        int n = min_int(PANEL, T - i0), end = i0 + n, last = end == T;
        X *dq_I = dq + (int64_t)i0 * ld;
        feedback_weights_gpu(at, stats, 1, q, k, shape, i0, n, stream);
        PanelRows p = panel_rows(at, gamma, stats, shape, i0, n);
        MatrixGPU<float> e = rows_of_gpu<float>(at.weights, at.row, panel),
                         u = rows_of_gpu<float>(at.part, D, columns);
        MatrixGPU<X> lambda_I = rows_of_gpu<X>(df + (int64_t)i0 * D, D, all), s_all = rows_of_gpu(s, D, all),
            q_I = rows_of_gpu(q + (int64_t)i0 * ld, ld, wide_all), k_all = rows_of_gpu(k, ld, wide_all),
            dl = rows_of_gpu<X>(dlogits, at.row, panel);
        // λ of the panel, and what it hands to the rows before it
        LAUNCH(feedback_adjoint_kernel<X>, dim3((D + 63) / 64, B), 64, 0, stream, df, at.part, ds, at.all, p);
        matmul_gpu(into(at.all, D, all), transpose_gpu(e), u, i0, D, n, 1, (float)!last, B, stream);
        // from λ the gradients
        matmul_gpu(into(at.dA, at.row, panel), lambda_I, transpose_gpu(s_all), n, end, D, 1, 0, B, stream);
        LAUNCH(feedback_dlogits_kernel<X>, dim3(n, B), 128, 0, stream, dgamma, dlogits, at.dA, p);
        matmul_gpu(into(dq_I, ld, wide_all), dl, k_all, n, D, end, scale, 0, B, stream);
        matmul_gpu(into(at.dk, D, all), transpose_gpu(dl), q_I, end, D, n, scale, (float)!last, B, stream);
    }
    copy_gpu(dk, ld, at.dk, B * T, D, stream);
    if (dbias) rope_bias_backward_gpu(dq, dbias, ld, {}, B * T, 0, 2 * D, sums, stream);
}

// ----------------------------------------------------------------------------
// gate and loss

// gate_forward and dropout in one pass: out = mask ⊙ s ⊙ g
template <typename X>
static void gate_dropout_forward_gpu(X *out, const X *s, const X *g, int ld, Mask mask, int N, int D,
                                     cudaStream_t stream) {
    each(N, D, wide({D, ld}, {out, s, g}), stream, [=] __device__ (auto SPAN, int n, int i) {
        int64_t at = (int64_t)n * D + i;
        write(out + at, read<SPAN>(s + at) * (read<SPAN>(g + (int64_t)n * ld + i) * mask_at<SPAN>(mask, at)));
    });
}

// gate_backward, with dropout: ds = mask ⊙ dout ⊙ g,   dg = mask ⊙ dout ⊙ s with its sums dg_bias
// ds may be dout, and dg may be g.
template <typename X>
static void gate_dropout_backward_gpu(X *ds, X *dg, float *dg_bias, const X *dout, const X *s, const X *g,
                                      int ld, Mask mask, int N, int D, ColumnSums *sums,
                                      cudaStream_t stream) {
    each_with_sums({dg_bias}, sums, N, D, wide({D, ld}, {ds, dg, dout, s, g}), stream,
                   [=] __device__ (auto SPAN, int n, int i, auto &sum) {
        int64_t at = (int64_t)n * D + i, wide_at = (int64_t)n * ld + i;
        Pack<SPAN> grad = read<SPAN>(dout + at), v = read<SPAN>(s + at), w = read<SPAN>(g + wide_at);
        grad *= mask_at<SPAN>(mask, at);
        sum[0] += grad * v;
        write(dg + wide_at, grad * v);
        write(ds + at, grad * w);
    });
}

// A block takes a row of V logits, a thread every blockDim-th piece, with a running maximum: the row's loss
// logsumexp - logit of the target (0 if there is none), whether the target is the likeliest, and the
// logsumexp on all threads.
template <int SPAN, typename X>
static __device__ inline float crossentropy_forward_gpu(float *loss, char *hit, const X *row, int target,
                                                        int V) {
    __shared__ float shared[32];
    float max = -1e30f, sum = 0, logit = target < 0 ? 0 : get(row[target]), counts = target >= 0;
    for (int i = threadIdx.x * SPAN; i < V; i += blockDim.x * SPAN) {
        float top = max;
        Pack<SPAN> v = read<SPAN>(row + i);
        if (i + SPAN > V) for (int c = 0; c < SPAN; c++) v[c] = i + c < V ? v[c] : -INFINITY;
        for (int c = 0; c < SPAN; c++) top = fmaxf(top, v[c]);
        sum *= __expf(max - top);
        max = top;
        sum = add_up(sum, each_of(v - max, __expf));
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
// The row's gradient with dloss 1, softmax - 1 at the target: the products behind it scale. The second
// reading of the row comes from the L2 cache. The piece at the end of the row may reach past V, not past
// ld; there drow is 0. drow may be row.
template <int SPAN, typename X>
static __device__ inline void crossentropy_backward_gpu(X *drow, const X *row, float logsumexp, int target,
                                                        int V) {
    if (target < 0) logsumexp = INFINITY; // all 0
    for (int i = threadIdx.x * SPAN; i < V; i += blockDim.x * SPAN) {
        Pack<SPAN> v = each_of(read<SPAN>(row + i) - logsumexp, __expf);
        if (target / SPAN == i / SPAN && target >= 0) for (int c = 0; c < SPAN; c++) v[c] -= i + c == target;
        if (i + SPAN > V) for (int c = 0; c < SPAN; c++) v[c] = i + c < V ? v[c] : 0;
        write(drow + i, v);
    }
}
// Both, the second unless dlogits is NULL. Rows are ld apart.
template <int SPAN, typename X>
__global__ void crossentropy_kernel(float *losses, char *hits, X *dlogits, const X *logits, int64_t ld,
                                    const int *targets, int V) {
    wait_for_results();
    int target = targets[blockIdx.x];
    const X *row = logits + blockIdx.x * ld;
    float logsumexp = crossentropy_forward_gpu<SPAN>(losses + blockIdx.x, hits + blockIdx.x, row, target, V);
    if (dlogits) crossentropy_backward_gpu<SPAN>(dlogits + blockIdx.x * ld, row, logsumexp, target, V);
}
template <typename X>
static void crossentropy_gpu(float *losses, char *hits, X *dlogits, const X *logits, int64_t ld,
                             const int *targets, int N, int V, cudaStream_t stream) {
    int threads = V > 4096 ? 1024 : V > 1024 ? 256 : 32;
    auto kernel = wide({ld}, {logits}) ? crossentropy_kernel<8, X> : crossentropy_kernel<1, X>;
    LAUNCH(kernel, N, threads, 0, stream, losses, hits, dlogits, logits, ld, targets, V);
}

// ----------------------------------------------------------------------------
// the model

// As in train_sessa.c. x, rounded to X, is what the layer read from the residual stream, kept for the
// backward pass only.
template <typename X> struct LayerActivationsGPU {
    X *x;                       // (N,D)
    float *ln_mean, *ln_rstd;   // (N)
    // dag takes the place of ag; c: feedback's (e s)/z
    X *ln, *ag, *abar, *proj, *o, *f, *s, *c, *gated, *branch;
    float *stats, *gamma, *fb_stats;
    Scratch fb_weights;
    X *xbc, *y_scan, *normed, *tail; // mamba2
    float *step, *rms, *states, *carried;
};
// Of generation, one token of each of N sequences; a layer's caches begin with the first sequence's.
template <typename X> struct DecodeGPU {
    int64_t proj_step, s_step;    // numbers from one sequence's cache to the next
    float *x, *gamma, *c, *parts; // (N,D), (N), (N,D), and see dev/cuda/decode.cuh
    X *row, *ag, *gated;          // (N,D), (N,2D), (N,D)
    float *logits, *host_logits;  // (N,V), the second page-locked
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
    DecodeGPU<X> decode;
};

// What a step reads from the device's memory, because it changes from step to step; room for ids behind it:
// inputs, targets, the lists of sort_tokens.
typedef struct {
    Draw draw;
    float scale[4]; // dloss, 0, 1: what products scale by
    int ids[];      // generation: a Next each
} Inputs;

// What all passes of a model do: chosen when it is made, by its largest batch, and with it the memory that
// they take. A smaller batch, as evaluation's last, goes the same way. Generation chooses for each text that it
// reads: see ways_of_text.
typedef struct {
    AttentionWay attention;
    Panels feedback[2]; // 1: where positions begin at a multiple of 8, so that tiles can
} Ways;
#ifdef SESSA_PLAIN
template <typename X> static Panels feedback_panels(int B, int T, int D, int, int = 1, int = 0) {
    return {0, 0, 0, feedback_scratch_gpu(B, T, D)};
}
#endif
template <typename X> static Ways ways_of(const Config *c, int B, int T, int P, int keep) {
    int D = c->d_model, d = D / c->n_heads, ld = proj_width(c);
    Ways ways = {attention_way<X>(B, T, c->n_heads, c->n_kv_heads, d, ld, P),
                 {feedback_panels<X>(B, T, D, P, 0, keep), feedback_panels<X>(B, T, D, P, ld % 8 == 0, keep)}};
    return ways;
}

// Generation chooses by what is read alone, rounded up to three bits: the same for a text in any company.
static int ways_length(int n) {
    int unit = 1;
    while (n > 8 * unit) unit *= 2;
    return (int)round_up(n, unit);
}
template <typename X> static Ways ways_of_text(const Config *c, int n) {
    return ways_of<X>(c, 1, ways_length(n), 0, 0);
}

// The first member is a Model as the other parts know it: configuration, table of parameters, and in the
// host's memory a copy of the parameters or of what belongs to them, made when asked for. The device's
// blocks have their tensors at the table's `places`: multiples of 64 numbers, but for what follows another
// within one product.
template <typename X> struct ModelGPU {
    Model host;
    char *memory;                                // all of the model, one allocation
    int64_t count;                               // numbers in a block
    // processes that share it, each with `held` numbers of the moments; 0: this one has all. Which they are, in
    // units of 64: NULL: all
    int ranks;
    int64_t held;
    const int *units;
    // the block's ranges (dev/ranks/gpus.cuh): where they begin, and the end; of each layer, in which it is
    int64_t *begins;                             // (n_ranges+1)
    int n_ranges, *ranges;                       // (L)
    cudaEvent_t *layer_there;                    // its gradients; with ranks
    float *received;                             // exchange_room
    float *params, *exp_avg, *exp_avg_sq, *grads; // in the order of Block
    // the parameters as X: products read them; float: params itself
    X *copy;
    unsigned char *decayed;                      // for each 64 numbers
    Weights weights, grad;                       // in the device's memory
    ActivationsGPU<X> acts;
    Table x_table, f_table;                      // activations of type X, of type float
    X *x_block;
    float *f_block;
    // in the device's memory; page-locked, as is the result of sums
    Inputs *inputs, *host_inputs;
    // in the device's memory: its square, what clipping makes of the gradients, and the ranks' squares
    double *norm;
    double *host_sum;                            // of losses; of squares of gradients
    int plain;                                   // made for the plain ways
    // when the host may read, or write again, what the device was asked for
    cudaEvent_t loss_there, lists_there, norm_there;
    int *host_lists, *starts;                    // of sort_tokens: page-locked; (V+1)
    ColumnSums sums;
    int trains, dlogits_ready, decodes; // ready: the last forward pass left dlogits in place of the logits
    Ways ways;
    Recordings recordings;
};

// The ModelGPU behind a Model. Whether its passes are plain was settled when it was made.
template <typename X> static ModelGPU<X> *of(const Model *model) {
    ModelGPU<X> *m = (ModelGPU<X> *)(void *)model;
    plain = m->plain;
    return m;
}

template <typename X> static const X *as_x(const ModelGPU<X> *m, const float *weight) {
    return weight ? m->copy + (weight - m->params) : NULL;
}

// ----------------------------------------------------------------------------
// mixers: what stands between GELU and gate, abar → s. The gain γ comes from the GELU's pass over the same
// numbers, and backward dgamma goes into the GELU's.

template <typename X>
static void projections_forward_gpu(ModelGPU<X> *m, int l, int B, int T, int first, cudaStream_t stream) {
    int D = m->host.config.d_model, ld = proj_width(&m->host.config), N = B * (T - first);
    LayerWeights *w = &m->weights.layers[l];
    LayerActivationsGPU<X> *a = &m->acts.layers[l];
    linear_forward_gpu(a->proj + (size_t)first * ld, ld, a->abar, as_x(m, w->W_proj), as_x(m, w->b_proj), N, D,
                       ld, stream);
}

// What follows from q, k and v.
template <typename X>
static void direct_read_forward_gpu(ModelGPU<X> *m, int l, int B, int T, int first, X *f,
                                    cudaStream_t stream) {
    const Config *c = &m->host.config;
    int D = c->d_model, H = c->n_heads, G = c->n_kv_heads, d = D / H, ld = proj_width(c), N = B * (T - first);
    Shape shape = direct_shape(c, B, T, first);
    LayerWeights *w = &m->weights.layers[l];
    LayerActivationsGPU<X> *a = &m->acts.layers[l];
    X *q = a->proj + (size_t)first * ld, *k = a->proj + D, *v = k + G * d, *o = w->W_o ? a->o : f;
    if (!c->no_rope)
        rope_forward_gpu(q, ld, m->acts.cosine, m->acts.sine, N, T - first, H + G, d, first, 1, stream);
    attention_forward_gpu(o, a->stats, m->acts.scratch, q, k, v, shape, &m->ways.attention, stream);
    if (w->W_o) linear_forward_gpu(f, D, o, as_x(m, w->W_o), (const X *)NULL, N, D, D, stream);
}

template <typename X>
static void direct_read_backward_gpu(ModelGPU<X> *m, int l, int B, int T, cudaStream_t stream) {
    const Config *c = &m->host.config;
    int D = c->d_model, G = c->n_kv_heads, d = D / c->n_heads, ld = proj_width(c), N = B * T,
        add = m->sums.add;
    Shape shape = direct_shape(c, B, T, 0);
    LayerWeights *w = &m->weights.layers[l], *dw = &m->grad.layers[l];
    LayerActivationsGPU<X> *a = &m->acts.layers[l];
    ActivationsGPU<X> *back = &m->acts;
    const X *k = a->proj + D, *v = k + G * d, *out = w->W_o ? a->o : a->f;
    Rope back_turned = {back->cosine, back->sine, T, c->no_rope ? 0 : d / 2, 0, -1};
    X *dk = back->dproj + D, *dv = dk + G * d, *dout = w->W_o ? back->dout : back->ds;
    if (w->W_o) {
        linear_backward_gpu(dout, NULL, back->ds, D, a->o, as_x(m, w->W_o), N, D, D, add, stream);
        linear_weight_gpu(dw->W_o, back->ds, D, a->o, N, D, D, add, beside(W_O_GRADIENT, in_ring(shape)));
    }
    attention_backward_gpu(back->dproj, dk, dv, dw->b_proj, back->scratch, dout, out, a->stats, a->proj, k, v,
                           shape, &m->ways.attention, back_turned, &m->sums, stream);
    linear_backward_gpu(back->dabar, dw->W_proj, back->dproj, ld, a->abar, as_x(m, w->W_proj), N, D, ld, add,
                        stream);
}

template <typename X>
static void attention_mixer_forward_gpu(ModelGPU<X> *m, int l, int B, int T, int first, cudaStream_t stream) {
    X *s = m->acts.layers[l].s + (size_t)first * m->host.config.d_model;
    projections_forward_gpu(m, l, B, T, first, stream);
    direct_read_forward_gpu(m, l, B, T, first, s, stream);
}

// With tiles, neither attention nor the feedback's weights and inverses need scratch or workspace of the
// other's: they go beside each other.
template <typename X>
static void sessa_forward_gpu(ModelGPU<X> *m, int l, int B, int T, int first, cudaStream_t stream) {
    int D = m->host.config.d_model, ld = proj_width(&m->host.config);
    LayerActivationsGPU<X> *a = &m->acts.layers[l];
    const X *q = a->proj + (size_t)first * ld + ld - 2 * D, *k = a->proj + ld - D;
    const Panels *panels = &m->ways.feedback[first % 8 == 0];
    projections_forward_gpu(m, l, B, T, first, stream);
    direct_read_forward_gpu(m, l, B, T, first, a->f,
                            beside(DIRECT_READ, m->ways.attention.tiles && panels->tiles));
    feedback_forward_gpu(a->s, a->c, a->fb_stats, a->fb_weights, m->acts.scratch, a->f, q, k, a->gamma,
                         feedback_shape(&m->host.config, B, T, first), panels, stream);
}

template <typename X>
static void sessa_backward_gpu(ModelGPU<X> *m, int l, int B, int T, cudaStream_t stream) {
    int D = m->host.config.d_model, ld = proj_width(&m->host.config);
    LayerActivationsGPU<X> *a = &m->acts.layers[l];
    ActivationsGPU<X> *back = &m->acts;
    const X *q = a->proj + ld - 2 * D, *k = q + D;
    X *dq = back->dproj + ld - 2 * D, *dk = dq + D;
    float *dbias = m->grad.layers[l].b_proj + ld - 2 * D;
    feedback_backward_gpu(back->ds, dq, dk, back->dgamma, dbias, a->fb_weights, back->scratch, back->ds, a->s,
                          a->c, a->fb_stats, q, k, a->gamma, feedback_shape(&m->host.config, B, T, 0),
                          &m->ways.feedback[1], &m->sums, stream);
    direct_read_backward_gpu(m, l, B, T, stream);
}

// Mamba-2 stands behind the update.
template <typename X>
static void mamba2_forward_gpu(ModelGPU<X> *m, int l, int B, int T, int first, cudaStream_t stream);
template <typename X>
static void mamba2_backward_gpu(ModelGPU<X> *m, int l, int B, int T, cudaStream_t stream);

template <typename X> struct MixerGPU {
    void (*forward)(ModelGPU<X> *model, int layer, int B, int T, int first, cudaStream_t stream);
    void (*backward)(ModelGPU<X> *model, int layer, int B, int T, cudaStream_t stream);
};
template <typename X> static const MixerGPU<X> mixers_gpu[N_MIXERS] = {
    {sessa_forward_gpu<X>, sessa_backward_gpu<X>},
    {attention_mixer_forward_gpu<X>, direct_read_backward_gpu<X>},
    {mamba2_forward_gpu<X>, mamba2_backward_gpu<X>},
};

#ifndef SESSA_PLAIN
#include "dev/cuda/decode.cuh"
#endif

#ifndef SESSA_PLAIN
template <typename X> static void model_free_gpu(Model *model);
template <int SQUARES>
static void sum_gpu(double *out, const float *x, const int *units, int64_t n, cudaStream_t stream);
#include "dev/ranks/gpus.cuh"
#endif

// ----------------------------------------------------------------------------
// the model's memory

// Rows of the projections are padded to multiples of 8 numbers: tensor cores ask for it.
static int proj_ld(const Config *c) {
    return c->mixer == MAMBA2 ? (int)round_up(proj_width(c), 8) : proj_width(c);
}

// What Mamba-2 takes, which stands behind the update.
template <typename X>
static void mamba2_activations_gpu(ModelGPU<X> *m, ActivationList *list, int l, Mode mode);
static int64_t mamba2_sums_room(const Config *c, int B, int T);
static int64_t scan_scratch_gpu(ScanShape scan);
static int scan_fits(const Config *c, size_t number);
template <typename X> static int scan_chunk(const Config *c);

// The list of train_sessa.c. What differs here: rows are padded, and the scan's chunks are of
// another height.
template <typename X> static ActivationList list_activations_gpu(const Config *c, int B, int T, Mode mode) {
    ActivationList list = list_activations(c, B, T, mode);
    find_activation(&list, "proj")->shape[2] = find_activation(&list, "dproj")->shape[2] = proj_ld(c);
    find_activation(&list, "logits")->shape[2] = round_up(c->vocab_size, 8);
    if (c->mixer == MAMBA2) {
        int chunk = scan_chunk<X>(c);
        find_activation(&list, "states")->shape[0] = (int64_t)B * ((T + chunk - 1) / chunk);
    }
    return list;
}

// A buffer of the twin's own.
template <typename Y>
static Y *add_activation(Table *table, Y *block, int layer, const char *name, int n_dims, int64_t d0,
                         int64_t d1, int64_t d2) {
    if (table->count >= 0) table->count = round_up(table->count, 64);
    add_tensor(table, NULL, layer, name, n_dims, d0, d1, d2);
    const Tensor *row = table->last;
    if (table->count >= 0) table->count += GUARD / (int64_t)sizeof(Y);
    if (block) guard(block + row->offset + row->count, block + round_up(table->count, 64), name, layer);
    return block ? block + row->offset : NULL;
}

// A tensor of the list, and its views.
template <typename Y>
static Y *activation_gpu(Table *table, Y *block, ActivationList *list, int layer, const char *name) {
    const Activation *a = find_activation(list, name);
    Y *place = add_activation(table, block, layer, name, a->n_dims, a->shape[0], a->shape[1], a->shape[2]);
    add_views(table, list, layer, name);
    return place;
}

// Numbers for the partial sums of a layer's passes, and of ln_f's, which come before the first layer's.
static int64_t column_sums_room(const Config *c, int B, int T) {
    int D = c->d_model, N = B * T, kv_width = c->n_kv_heads * (D / c->n_heads);
    auto pass = [&](int sums, int width) { return (int64_t)sums * sum_chunks(N, width, 1) * width; };
    int64_t norm = 3 * (int64_t)row_blocks(N, D, 0, BLOCKS_AT_ONCE / 2) * D,
            layer = 2 * norm + pass(1, D) + pass(3, D); // gate, GELU
    if (c->mixer == MAMBA2) return layer + mamba2_sums_room(c, B, T);
    layer += pass(1, D + 2 * kv_width);
    return c->mixer == SESSA ? layer + (plain ? 0 : 2 * tile_sums_room(D, B, T)) + pass(1, 2 * D) : layer;
}

// What the model's passes share: numbers of the feedback's weights, of scratch, of partial sums. A test may
// ask for panels of any height.
typedef struct { int64_t weights, scratch, sums; } Room;
template <typename X> static Room room_of(const Config *c, int B, int T, Mode mode, const Ways *ways) {
    int D = c->d_model;
    Room room = {0, 0, column_sums_room(c, B, T)};
    auto at_least = [](int64_t &size, int64_t numbers) { if (size < numbers) size = numbers; };
    auto add = [&](const Ways &w, int tiles) {
        at_least(room.scratch, w.attention.scratch);
        if (c->mixer != SESSA) return;
        at_least(room.scratch, w.feedback[tiles].total);
        at_least(room.weights, w.feedback[tiles].weights);
    };
    LayerWeights none = {};
    if (c->mixer == MAMBA2) at_least(room.scratch, scan_scratch_gpu(scan_of(c, &none, B, T)));
    else add(*ways, 1);
    for (int P = 1; P <= min_int(T, 128) && mode == KEEP_ALL && c->mixer != MAMBA2; P++)
        add(ways_of<X>(c, B, T, P, 0), 1);
    for (int n = 1; n < T && mode == GENERATE && c->mixer != MAMBA2; n = ways_length(n) + 1)
        for (int tiles = 0; tiles < 2; tiles++) add(ways_of_text<X>(c, n), tiles);
    for (int tiles = 0; tiles < 2 && mode == GENERATE && c->mixer != MAMBA2; tiles++)
        add(ways_of_text<X>(c, T), tiles);
    if (mode >= TRAIN && !plain) at_least(room.scratch, embedding_scratch(B * T, c->vocab_size, D));
    return room;
}

// As carve_activations, in two blocks. The outputs of LayerNorm, GELU and gate are not shared as
// there, but kept for the backward pass; a KEEP_ALL model shares nothing but f and the branch.
template <typename X> static void carve_activations_gpu(ModelGPU<X> *m, int B, int T, Mode mode) {
    const Config *c = &m->host.config;
    int D = c->d_model, H = c->n_heads;
    int sessa = c->mixer == SESSA, mamba2 = c->mixer == MAMBA2, training = mode >= TRAIN,
        keep_all = mode == KEEP_ALL;
    ActivationsGPU<X> *acts = &m->acts;
    Table *t = &m->x_table, *f = &m->f_table;
    X *x = m->x_block;
    float *fb = m->f_block;
    int sequences = mode == GENERATE ? B : 1; // whose caches are kept; they are read one by one
    if (mode == GENERATE) B = 1;
    ActivationList list = list_activations_gpu<X>(c, B, T, mode);
    auto in_x = [&](int l, const char *name) { return activation_gpu(t, x, &list, l, name); };
    auto in_f = [&](int l, const char *name) { return activation_gpu(f, fb, &list, l, name); };
    DecodeGPU<X> *decode = &acts->decode;
    decode->proj_step = round_up((int64_t)T * proj_ld(c), 128);
    decode->s_step = round_up((int64_t)T * D, 128);
    t->n = f->n = 0;
    t->count = f->count = 0;
    Room room = room_of<X>(c, B, T, mode, &m->ways);
    X *read = training ? in_x(-1, "encoded") : NULL; // by the next layer
    for (int l = 0; l < c->n_layers; l++) {
        LayerActivationsGPU<X> *a = &acts->layers[l];
        if (l > 0) *a = acts->layers[0];
        a->x = read;
        if (mamba2) mamba2_activations_gpu(m, &list, l, mode);
        else if (sequences > 1) {
            a->proj = add_activation(t, x, l, "proj", 2, sequences, decode->proj_step, 1);
            a->s = add_activation(t, x, l, "s", 2, sequences, decode->s_step, 1);
        } else {
            a->proj = in_x(l, "proj");
            a->s = in_x(l, "s");
        }
        if (l == 0 || training) {
            a->ln_mean = in_f(l, "ln_mean");
            a->ln_rstd = in_f(l, "ln_rstd");
            a->ag = in_x(l, "ag");
            if (H > 1 && !mamba2) a->o = in_x(l, "o");
            if (!mamba2) a->stats = in_f(l, "stats");
            if (sessa) a->gamma = in_f(l, "gamma");
            a->c = sessa && training && !plain ? add_activation(t, x, l, "fb_c", 3, B, T, D) : NULL;
            if (sessa) a->fb_stats = in_f(l, "fb_stats");
            if (sessa && !plain && (l == 0 || m->ways.feedback[1].kept))
                a->fb_weights = {add_activation(f, fb, l, "fb_weights", 1, room.weights, 1, 1), room.weights};
            a->ln = in_x(l, "ln");
            a->abar = in_x(l, "abar");
            a->gated = in_x(l, "gated");
        }
        if (l == 0) a->f = a->branch = add_activation(t, x, l, "branch", 3, B, T, D);
        // H 1: attention's own output
        if (sessa && (keep_all || (H == 1 && training))) a->f = in_x(l, "f");
        if (!sessa && H == 1) a->f = a->s;
        if (training) read = in_x(l, "residual");
    }
    acts->y = read;
    acts->residual = add_activation(f, fb, -1, "stream", 3, B, T, D);
    acts->ln_mean = in_f(-1, "ln_f_mean");
    acts->ln_rstd = in_f(-1, "ln_f_rstd");
    acts->ln_f = in_x(-1, "ln_f");
    acts->logits = in_x(-1, "logits");
    acts->ld_logits = t->last->stride;
    t->last->shape[2] = c->vocab_size;
    acts->losses = in_f(-1, "losses");
    acts->hits = (char *)add_activation(f, fb, -1, "hits", 1, B * (int64_t)T / 4 + 1, 1, 1);
    acts->cosine = in_f(-1, "cosine");
    acts->sine = in_f(-1, "sine");
    acts->scratch = {add_activation(f, fb, -1, "scratch", 1, room.scratch, 1, 1), room.scratch};
    m->decodes = mode == GENERATE && !mamba2 && !plain && decodes(c);
    if (mode == GENERATE) {
        int64_t parts = m->decodes ? decode_numbers(c) : 0;
        decode->x = add_activation(f, fb, -1, "next_x", 2, sequences, D, 1);
        decode->gamma = add_activation(f, fb, -1, "next_gamma", 1, sequences, 1, 1);
        decode->c = add_activation(f, fb, -1, "next_c", 2, sequences, D, 1);
        decode->parts = add_activation(f, fb, -1, "next_parts", 2, sequences, parts, 1);
        decode->logits = add_activation(f, fb, -1, "next_logits", 2, sequences, c->vocab_size, 1);
        decode->row = add_activation(t, x, -1, "next_row", 2, sequences, D, 1);
        decode->ag = add_activation(t, x, -1, "next_ag", 2, sequences, 2 * D, 1);
        decode->gated = add_activation(t, x, -1, "next_gated", 2, sequences, D, 1);
    }
    if (!training) return;
    acts->dout = acts->layers[0].branch; // free by then
    acts->ds = in_x(-1, "ds");
    acts->dabar = acts->ln_f; // likewise
    acts->dbranch = add_activation(t, x, -1, "dbranch", 3, B, T, D);
    acts->dproj = in_x(-1, "dproj");
    acts->dgamma = in_f(-1, "dgamma");
    m->sums.room = m->sums.next = add_activation(f, fb, -1, "sums", 1, room.sums, 1, 1);
    m->sums.end = m->sums.room + room.sums;
}

template <typename X> static void model_free_gpu(Model *model) {
    ModelGPU<X> *m = of<X>(model);
    if (gpu.ready) cudaDeviceSynchronize();
    exchange_close(m);
    unguard(m->memory, m->memory ? (size_t)(m->host.bytes - 2 * WORKSPACE) : 0);
    cudaFree(m->memory);
    cudaFreeHost(m->host_inputs);
    cudaFreeHost(m->acts.decode.host_logits);
    for (cudaEvent_t *event : {&m->loss_there, &m->lists_there, &m->norm_there})
        if (*event) cudaEventDestroy(*event);
    forget_recordings(&m->recordings);
    void *blocks[] = {m->weights.layers, m->grad.layers, m->acts.layers, m->host.table.rows,
                      m->x_table.rows, m->f_table.rows, m->host.params,
                      m->host.grads, m->host.exp_avg, m->host.exp_avg_sq, m->host.table.places, m->starts,
                      m->begins, m->ranges, m};
    for (size_t i = 0; i < sizeof(blocks) / sizeof(blocks[0]); i++) free(blocks[i]);
}

// The parts of the model's memory, one after the other; there 0: only their sizes.
template <typename Y> static Y *take(char **memory, int64_t count, const char *name, int there) {
    char *at = *memory, *end = at + count * (int64_t)sizeof(Y);
    *memory += round_up(count * (int64_t)sizeof(Y), 256) + GUARD;
    if (there) guard(end, *memory, name, -1);
    return (Y *)at;
}
// Bytes for a batch's ids and lists, or for what a sequence reads and what all of them are given next
static int64_t ids_room(int B, int T, Mode mode) {
    int64_t batch = (6 * (mode == GENERATE ? 1 : (int64_t)B) * T + 2) * (int64_t)sizeof(int),
            each = mode == GENERATE ? B * (int64_t)sizeof(Next) : 0;
    return batch > each ? batch : each;
}
template <typename X> static int64_t carve_memory(ModelGPU<X> *m, char *memory, int B, int T, Mode mode) {
    static const char *const names[] = {"parameters", "first moments", "second moments", "gradients"};
    char *at = memory;
    int there = memory != NULL;
    float **blocks[] = {&m->params, &m->exp_avg, &m->exp_avg_sq, &m->grads};
    int64_t numbers[] = {m->count, m->held, m->held, m->count}; // as Block
    for (int i = 0; i < 4; i++)
        *blocks[i] = take<float>(&at, i == PARAMS || mode >= TRAIN ? numbers[i] : 0, names[i], there);
    m->copy =
        sizeof(X) == sizeof(bf16) ? take<X>(&at, m->count, "copy of the parameters", there) : (X *)m->params;
    m->decayed = take<unsigned char>(&at, m->count / 64, "decayed", there);
    m->units = m->ranks ? take<int>(&at, m->held / 64, "units", there) : NULL;
    m->received = take<float>(&at, exchange_room(m), "received", there);
    m->norm = take<double>(&at, 2 + m->ranks, "norm", there);
    m->inputs = (Inputs *)take<char>(&at, (int64_t)sizeof(Inputs) + ids_room(B, T, mode), "inputs", there);
    m->x_block = take<X>(&at, m->x_table.count, "activations", there);
    m->f_block = take<float>(&at, m->f_table.count, "activations in float32", there);
    return at - memory;
}

// Bytes of the device's memory for such a batch or so many sequences, INFINITY: more than can be addressed
template <typename X> static double model_bytes(ModelGPU<X> *m, int B, int T, Mode mode) {
    m->x_block = NULL; // no place yet, sizes alone
    m->f_block = NULL;
    carve_activations_gpu(m, B, T, mode);
    if (m->host.table.count < 0 || m->x_table.count < 0 || m->f_table.count < 0 ||
        m->host.table.count >= PTRDIFF_MAX / 64)
        return INFINITY;
    return (double)carve_memory(m, NULL, B, T, mode);
}

// What the launches cannot take is said before anything is allocated. FAILED and a line in error
static int within_launches(const Config *c, int B, int T, size_t number, char *error) {
    int64_t D = c->d_model, widest = c->mixer == MAMBA2 ? 2 * D + 2 * c->state_dim : D,
            row = c->mixer == MAMBA2 ? 2 * D : D;
    int most = gpu.shared, seeds = c->mixer == SESSA ? feedback_shared() : 0;
    if (B > MOST_SEQUENCES)
        return fail(error, NULL,
                    "--batch %d: the GPU takes at most %d sequences at once; --accum makes a step of more", B,
                    MOST_SEQUENCES);
    if (row > MOST_COLUMNS)
        return fail(error, NULL, "--dim %d: the GPU takes rows of at most %d numbers, here they have %lld",
                    c->d_model, MOST_COLUMNS, (long long)row);
    if ((int64_t)B * T * widest > MOST_PIECES)
        return fail(error, NULL,
                    "--batch %d times --seq %d: the GPU takes at most %lld tokens of this width at once", B,
                    T, (long long)(MOST_PIECES / widest));
    if (c->mixer == MAMBA2 && !scan_fits(c, number))
        return fail(
            error, NULL,
            "--head-dim %d with --state-dim %d: too large for the GPU's shared memory; --plain goes without",
            c->head_dim, c->state_dim);
    if (most < seeds)
        return fail(
            error, NULL,
            "the mixer sessa needs %d KiB of shared memory a block, this GPU has %d; --plain goes without",
            seeds >> 10, most >> 10);
    return 0;
}

template <typename X> static Model *create_whole_gpu(const Config *c, int B, int T, Mode mode, char *error) {
#ifdef SESSA_PLAIN
    plain = 1;
#endif
    int at_once = mode == GENERATE ? 1 : B; // sequences that hidden_forward_gpu reads
    if (gpu_open(error) || within_launches(c, at_once, T, sizeof(X), error)) return NULL;
    int whole = 1, d = c->d_model / c->n_heads;
    ModelGPU<X> *m = (ModelGPU<X> *)allocate(1, sizeof(ModelGPU<X>), &whole);
    if (!m) { fail(error, NULL, "out of memory"); return NULL; }
    m->plain = plain;
    m->ranks = sharers(mode);
    m->host.config = *c;
    m->host.B = B;
    m->host.T = T;
    m->trains = mode == TRAIN;
    int64_t pairs = (int64_t)T * (d / 2);
    real *tables = (real *)allocate(2 * pairs, sizeof(real), &whole); // cosine and sine
    for (Weights *w : {&m->weights, &m->grad})
        w->layers = (LayerWeights *)allocate(c->n_layers, sizeof(LayerWeights), &whole);
    m->acts.layers = (LayerActivationsGPU<X> *)allocate(c->n_layers, sizeof(LayerActivationsGPU<X>), &whole);
    m->starts = (int *)allocate((int64_t)c->vocab_size + 1, sizeof(int), &whole);
    if (whole) carve_weights(&m->weights, &m->host.table, NULL, c);
    m->begins = (int64_t *)allocate(c->n_layers + 2, sizeof(int64_t), &whole);
    m->ranges = (int *)allocate(c->n_layers, sizeof(int), &whole);
    int64_t *places = m->host.table.places = (int64_t *)allocate(m->host.table.n, sizeof(int64_t), &whole);
    if (!whole || m->host.table.incomplete) {
        fail(error, NULL, "out of memory");
        free(tables);
        model_free_gpu<X>(&m->host);
        return NULL;
    }
    m->n_ranges = 1;
    for (int i = 0, l = 0; i < m->host.table.n; i++) { // the projections stay together: they are one product
        const Tensor *row = &m->host.table.rows[i];
        int follows =
            strstr(row->name, ".k_proj.") || strstr(row->name, ".v_proj.") || strstr(row->name, ".proj_fb.");
        int begins_layer = strstr(row->name, ".ln.weight") != NULL;
        // a range, of which each rank has as many units; late layers have their own
        int begins = begins_layer && (l == early_layers(c) || m->count - m->begins[m->n_ranges - 1] >= least_range());
        if (!follows) m->count = round_up(m->count, begins && m->ranks ? 64 * m->ranks : 64);
        if (begins) m->begins[m->n_ranges++] = m->count;
        if (begins_layer) m->ranges[l++] = m->n_ranges - 1;
        places[i] = m->count;
        // wte: rows more, of zeros that stay zeros
        m->count += i ? row->count : round_up(c->vocab_size, 8) * c->d_model;
    }
    m->count = round_up(m->count, m->ranks ? 64 * m->ranks : 64);
    m->held = m->ranks ? m->count / m->ranks : m->count;
    m->begins[m->n_ranges] = m->count;
    double needed = INFINITY;
    size_t present = 0, all = 0;
    CUDA(cudaMemGetInfo(&present, &all));
    for (int keep = mode >= TRAIN;; keep = 0) { // without, the feedback's weights are computed again
        m->ways = ways_of<X>(c, at_once, T, 0, keep);
        needed = model_bytes(m, B, T, mode);
        if (!keep || needed < 0.9 * (double)present) break;
    }
    if (mode == GENERATE) {
        int wanted = B, fewer = 1; // of which it is known that they fit, or nothing does
        if (!m->decodes) B = 1;
        else if (B > 1 && needed > 0.9 * (double)present) {
            while (B - fewer > 1) {
                int half = fewer + (B - fewer) / 2;
                *(model_bytes(m, half, T, mode) > 0.9 * (double)present ? &B : &fewer) = half;
            }
            B = fewer;
            fprintf(stderr, "train_sessa: %d of %d texts are generated together: for more the GPU lacks memory\n", B,
                    wanted);
        }
        needed = model_bytes(m, B, T, mode);
        m->host.B = B;
    }
    int64_t ids = ids_room(B, T, mode);
    cudaError_t code = cudaErrorMemoryAllocation;
    if (needed <= (double)present) code = cudaMalloc((void **)&m->memory, (size_t)needed);
    if (code == cudaSuccess)
        code = cudaMallocHost((void **)&m->host_inputs, sizeof(Inputs) + (size_t)ids + 2 * sizeof(double));
    if (code == cudaSuccess && mode == GENERATE)
        code = cudaMallocHost((void **)&m->acts.decode.host_logits,
                              sizeof(float) * (size_t)B * (size_t)c->vocab_size);
    if (code != cudaSuccess) {
        cudaGetLastError();
        fail(error, NULL,
             "the model does not fit: it needs %.2f GiB of the GPU's memory, of whose %.1f GiB %.2f are free",
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
    carve_weights(&m->weights, &m->host.table, m->params, c);
    carve_weights(&m->grad, &m->host.table, m->grads, c);
    m->host_inputs->scale[1] = 0;
    m->host_inputs->scale[2] = 1;
    m->host_lists = m->host_inputs->ids + 2 * (int64_t)B * T; // not of generation
    m->host_sum =
        (double *)((char *)m->host_inputs + round_up((int64_t)sizeof(Inputs) + ids, sizeof(double)));
    for (int i = 0; i < m->host.table.n; i++) {
        const Tensor *row = &m->host.table.rows[i];
        int64_t from = places[i] / 64, end = (places[i] + row->count + 63) / 64;
        if (row->n_dims >= 2) CUDA(cudaMemset(m->decayed + from, 1, (size_t)(end - from)));
    }
    rope_table(tables, tables + pairs, T, d);
    CUDA(cudaMemcpy(m->acts.cosine, tables, (size_t)pairs * sizeof(real), cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(m->acts.sine, tables + pairs, (size_t)pairs * sizeof(real), cudaMemcpyHostToDevice));
    free(tables);
    return &m->host;
}
template <typename X> static Model *model_create_gpu(const Config *c, int B, int T, Mode mode, char *error) {
    Model *model = create_whole_gpu<X>(c, B, T, mode, error);
    return sharers(mode) ? share_out((ModelGPU<X> *)(void *)model, error) : model;
}

// ----------------------------------------------------------------------------
// forward, backward, update

// hidden_forward, of the layers from .. end-1. inputs: in the device's memory, NULL: x is what the layers
// before made of them. The branch of a layer is added where the next one reads it, before its LayerNorm.
template <typename X>
static void hidden_forward_gpu(ModelGPU<X> *m, const int *inputs, int B, int T, int first, double dropout,
                               int from, int end, cudaStream_t stream) {
    const Config *c = &m->host.config;
    int D = c->d_model, N = B * (T - first), last = c->n_layers - 1;
    const Weights *w = &m->weights;
    ActivationsGPU<X> *acts = &m->acts;
    float *x = acts->residual, gamma_max = (float)c->gamma_max;
    auto mask = [&](int place) { return mask_of(&m->inputs->draw, dropout, place); };
    if (inputs) embedding_dropout_forward_gpu(x, inputs, w->wte, mask(0), B, T - first, D, stream);
    for (int l = from; l < end; l++) {
        const LayerWeights *wl = &w->layers[l];
        LayerActivationsGPU<X> *a = &acts->layers[l];
        const X *before = l ? acts->layers[l - 1].branch : NULL, *g = a->ag + D,
                *s = a->s + (int64_t)first * D;
        // [9]
        residual_layernorm_forward_gpu(a->ln, a->x, a->ln_mean, a->ln_rstd, x, before, mask(2 * l),
                                       wl->ln_weight, wl->ln_bias, N, D, stream);
        // [10]
        linear_forward_gpu(a->ag, 2 * D, a->ln, as_x(m, wl->W_in), as_x(m, wl->b_in), N, D, 2 * D, stream);
        // [11], and [18] on the way
        gelu_gain_forward_gpu(a->abar, a->gamma, a->ag, 2 * D, wl->gamma_weight, wl->gamma_bias, gamma_max,
                              N, D, stream);
        // [12]
        mixers_gpu<X>[c->mixer].forward(m, l, B, T, first, stream);
        // [13]
        gate_dropout_forward_gpu(a->gated, s, g, 2 * D, mask(1 + 2 * l), N, D, stream);
        linear_forward_gpu(a->branch, D, a->gated, as_x(m, wl->W_out), as_x(m, wl->b_out), N, D, D, stream);
    }
    if (end <= last) return;
    residual_layernorm_forward_gpu(acts->ln_f, acts->y, acts->ln_mean, acts->ln_rstd, x,
                                   acts->layers[last].branch, mask(2 + 2 * last), w->ln_f_weight,
                                   w->ln_f_bias, N, D, stream);
}

// Where number i of a rank's share is in the block. units: of 64 numbers, which of the block's they are; NULL: the
// first ones.
static __device__ inline int64_t place_of(const int *units, int64_t i) {
    return units ? 64 * (int64_t)units[i / 64] + i % 64 : i;
}
// out = Σ x_i, or Σ x_i², in double: a block takes its share, then one block those of the blocks. units: see
// place_of.
template <int SQUARES, typename Y>
__global__ void sum_kernel(double *out, const Y *x, const int *units, int64_t n) {
    __shared__ double sums[256];
    wait_for_results();
    double sum = 0;
    int64_t end = n * (blockIdx.x + 1) / gridDim.x;
    for (int64_t i = n * blockIdx.x / gridDim.x + threadIdx.x; i < end; i += 256) {
        double one = (double)x[place_of(units, i)];
        sum += SQUARES ? one * one : one;
    }
    sums[threadIdx.x] = sum;
    for (int half = 128; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) out[blockIdx.x] = sums[0];
}
template <int SQUARES>
static void sum_gpu(double *out, const float *x, const int *units, int64_t n, cudaStream_t stream) {
    int blocks = n < 1 << 19 ? 64 : 1056;
    double *partial = (double *)gpu.workspace;
    LAUNCH((sum_kernel<SQUARES, float>), blocks, 256, 0, stream, partial, x, units, n);
    LAUNCH((sum_kernel<0, double>), 1, 256, 0, stream, out, partial, (const int *)NULL, blocks);
}

template <typename X>
static void model_forward_gpu(Model *model, const int *inputs, const int *targets, int B, int T,
                              Dropout drop) {
    ModelGPU<X> *m = of<X>(model);
    cudaStream_t stream = gpu.stream;
    int D = m->host.config.d_model, V = m->host.config.vocab_size, N = B * T,
        early = early_layers(&m->host.config);
    ActivationsGPU<X> *acts = &m->acts;
    Inputs *host = m->host_inputs;
    must_fit(B, m->host.B, "sequences of a batch");
    must_fit(T, m->host.T, "tokens of a sequence");
    wait_for_gpu(m->loss_there); // nothing reads the last batch there any more
    host->draw = draw_of(drop);
    memcpy(host->ids, inputs, sizeof(int) * (size_t)N);
    memcpy(host->ids + N, targets, sizeof(int) * (size_t)N);
    CUDA(cudaMemcpyAsync(m->inputs, host, sizeof(Inputs) + sizeof(int) * 2 * (size_t)N,
                         cudaMemcpyHostToDevice, stream));
    m->host.batch_B = B;
    m->host.batch_T = T;
    m->host.drop = drop;
    m->dlogits_ready = m->trains && !model->loss_alone;
    replay(m, FORWARD_EARLY, B, T, drop.probability,
           [&] { hidden_forward_gpu(m, m->inputs->ids, B, T, 0, drop.probability, 0, early, stream); });
    join(LATE_UPDATE);
    replay(m, m->dlogits_ready ? FORWARD_LATE : FORWARD_LOSS, B, T, drop.probability, [&] {
        hidden_forward_gpu(m, (const int *)NULL, B, T, 0, drop.probability, early, m->host.config.n_layers,
                           stream);
        linear_forward_gpu(acts->logits, (int)acts->ld_logits, acts->ln_f, as_x(m, m->weights.wte),
                           (const X *)NULL, N, D, (int)acts->ld_logits, stream);
        crossentropy_gpu(acts->losses, acts->hits, m->dlogits_ready ? acts->logits : NULL, acts->logits,
                         acts->ld_logits, m->inputs->ids + N, N, V, stream);
        sum_gpu<0>(m->host_sum, acts->losses, NULL, N, stream);
    });
    CUDA(cudaEventRecord(m->loss_there, stream));
}

template <typename X> static double model_loss_gpu(Model *model) {
    ModelGPU<X> *m = of<X>(model);
    wait_for_gpu(m->loss_there);
    return m->host_sum[0];
}

template <typename X> static void model_hits_gpu(Model *m, char *hits) {
    wait_for_others();
    CUDA(cudaMemcpyAsync(hits, ((ModelGPU<X> *)m)->acts.hits, (size_t)(m->batch_B * m->batch_T),
                         cudaMemcpyDeviceToHost, gpu.stream));
    CUDA(cudaStreamSynchronize(gpu.stream));
}

// layer_backward: from dbranch, the gradient of the layer's branch, to that of the layer below, and dx on
// the way. The gradients of a and g take their place. The products that only weights wait for go beside
// what follows.
template <typename X>
static void layer_backward_gpu(ModelGPU<X> *m, int l, int B, int T, Mask mask, Mask mask_below,
                               cudaStream_t stream) {
    const Config *c = &m->host.config;
    int D = c->d_model, N = B * T, add = m->sums.add;
    const LayerWeights *w = &m->weights.layers[l], *dw = &m->grad.layers[l];
    LayerActivationsGPU<X> *a = &m->acts.layers[l];
    ActivationsGPU<X> *acts = &m->acts;
    ColumnSums *sums = &m->sums;
    X *g = a->ag + D, *dag = a->ag, *dg = g, *dbranch = acts->dbranch;
    X *dgated = acts->ds, *ds = dgated, *dln = ds; // one buffer, one after the other
    float *dx = acts->residual, gamma_max = (float)c->gamma_max,
          *db_below = l ? m->grad.layers[l - 1].b_out : NULL;
    // through W_out and the gate
    linear_backward_gpu(dgated, NULL, dbranch, D, a->gated, as_x(m, w->W_out), N, D, D, add, stream);
    gate_dropout_backward_gpu(ds, dg, dw->b_in + D, dgated, a->s, g, 2 * D, mask, N, D, sums, stream);
    linear_weight_gpu(dw->W_out, dbranch, D, a->gated, N, D, D, add, beside(W_OUT_GRADIENT));
    // through the mixer, from ds to dabar
    mixers_gpu<X>[c->mixer].backward(m, l, B, T, stream);
    gelu_gain_backward_gpu(dag, dw->b_in, dw->gamma_weight, dw->gamma_bias, acts->dabar, a->ag, 2 * D,
                           acts->dgamma, a->gamma, w->gamma_weight, gamma_max, N, D, sums, stream);
    join(W_OUT_GRADIENT);
    join(W_O_GRADIENT);
    // through W_in and the LayerNorm, on to the branch of the layer below
    linear_backward_gpu(dln, NULL, dag, 2 * D, a->ln, as_x(m, w->W_in), N, D, 2 * D, add, stream);
    linear_weight_gpu(dw->W_in, dag, 2 * D, a->ln, N, D, 2 * D, add, beside(W_IN_GRADIENT));
    residual_layernorm_backward_gpu(dx, dw->ln_weight, dw->ln_bias, l ? dbranch : (X *)NULL, db_below,
                                    mask_below, 0, dln, a->x, a->ln_mean, a->ln_rstd, w->ln_weight, N, D,
                                    sums, stream);
    column_sums_gpu(sums, stream);
    layer_is_behind(m, l);
}

// model_backward, all but its last line: down to dx, the gradient of the embedding's output.
template <typename X>
static void backward_launches_gpu(ModelGPU<X> *m, int B, int T, double dropout, cudaStream_t stream) {
    const Config *c = &m->host.config;
    int D = c->d_model, N = B * T, last = c->n_layers - 1, ld = (int)m->acts.ld_logits;
    ActivationsGPU<X> *acts = &m->acts;
    const Weights *w = &m->weights, *dw = &m->grad;
    X *dlogits = acts->logits, *dln_f = acts->ds;
    auto mask = [&](int place) { return mask_of(&m->inputs->draw, dropout, place); };
    linear_backward_gpu(dln_f, dw->wte, dlogits, ld, acts->ln_f, as_x(m, w->wte), N, D, ld, m->sums.add,
                        stream, m->inputs->scale);
    residual_layernorm_backward_gpu(acts->residual, dw->ln_f_weight, dw->ln_f_bias, acts->dbranch,
                                    dw->layers[last].b_out, mask(2 + 2 * last), 1, dln_f, acts->y,
                                    acts->ln_mean, acts->ln_rstd, w->ln_f_weight, N, D, &m->sums, stream);
    for (int l = last; l >= 0; l--) layer_backward_gpu(m, l, B, T, mask(1 + 2 * l), mask(2 * l), stream);
    join(W_IN_GRADIENT);
}

// last: of the step's micro-batches; then ranks exchange what they have, layer by layer beside the way back.
template <typename X> static void model_backward_gpu(Model *model, double dloss, int last) {
    ModelGPU<X> *m = of<X>(model);
    cudaStream_t stream = gpu.stream;
    int B = m->host.batch_B, T = m->host.batch_T, N = B * T, V = m->host.config.vocab_size;
    Inputs *host = m->host_inputs, *device = m->inputs;
    float scale = (float)dloss;
    each(1, 1, 0, stream, [=] __device__ (auto, int, int) { device->scale[0] = scale; });
    X *logits = m->acts.logits;
    if (!m->dlogits_ready) // not recorded: whether they are depends on the forward pass
        crossentropy_gpu(m->acts.losses, m->acts.hits, logits, logits, m->acts.ld_logits, device->ids + N, N, V,
                         stream);
    m->dlogits_ready = 1;
    replay(m, m->sums.add ? BACKWARD_ADDS : BACKWARD, B, T, m->host.drop.probability,
           [&] { backward_launches_gpu(m, B, T, m->host.drop.probability, stream); });
    if (last) exchange_layers(m);
    int *lists = device->ids + (m->host_lists - host->ids);
    Tokens tokens = {device->ids, host->ids, N, V, lists, m->host_lists, m->starts, m->lists_there};
    embedding_backward_gpu(m->grad.wte, m->acts.scratch, m->acts.residual, tokens, m->host.config.d_model,
                           stream);
    if (last) exchange_embedding(m);
    m->sums.add = 1;
}

// adamw of the numbers from .. end-1 that this rank has moments of (units: see place_of); a thread takes 4.
// Tensors' ends rounded up hold zeros that stay zeros. It does not clear the gradient: the next backward pass
// overwrites it. scale: in the device's memory; NaN: nothing is updated.
template <typename X>
__global__ void adamw_kernel(float *w, const float *g, float *exp_avg, float *exp_avg_sq, X *copy,
                             const unsigned char *decayed, const int *units, int64_t from, int64_t end,
                             float beta1, float beta2, float rate1,
                             float rate2, float keep, float step_size, float correction, float eps,
                             const double *scale) {
    wait_for_results();
    int64_t i = from + 4 * ((int64_t)blockIdx.x * blockDim.x + threadIdx.x);
    float factor = (float)*scale;
    if (i >= end || isnan(factor)) return;
    int64_t at = place_of(units, i);
    float p[4], grad[4], m[4], v[4];
    read_some<4>(p, w + at);
    read_some<4>(grad, g + at);
    read_some<4>(m, exp_avg + i);
    read_some<4>(v, exp_avg_sq + i);
    if (!decayed[at / 64]) keep = 1;
    for (int e = 0; e < 4; e++) {
        grad[e] *= factor;
        m[e] = beta1 * m[e] + rate1 * grad[e];
        v[e] = beta2 * v[e] + rate2 * grad[e] * grad[e];
        p[e] = keep * p[e] - step_size * m[e] / (sqrtf(v[e]) * correction + eps);
    }
    write_some<4>(w + at, p);
    write_some<4>(exp_avg + i, m);
    write_some<4>(exp_avg_sq + i, v);
    if constexpr (sizeof(X) == 2)
        *(uint2 *)(copy + at) = make_uint2(pack_two(p[0], p[1]), pack_two(p[2], p[3]));
}
// The host goes on as soon as it has the norm. What the next forward pass needs first, embedding and early
// layers, comes first.
template <typename X> static double model_update_gpu(Model *model, AdamW o, double clip, int64_t step) {
    ModelGPU<X> *m = of<X>(model);
    double *norm = m->norm; // the next batch's inputs are on their way while late layers read it
    int ranks = m->ranks, early_end = m->ranges[early_layers(&m->host.config)];
    join(LATE_UPDATE);
    exchange_squares(m);
    if (!ranks) sum_gpu<1>(norm, m->grads, m->units, m->held, gpu.stream);
    each(1, 1, 0, gpu.stream, [=] __device__ (auto, int, int) { // clip_scale
        if (ranks) norm[0] = 0;
        for (int r = 0; r < ranks; r++) norm[0] += norm[2 + r];
        double length = sqrt(norm[0]);
        norm[1] = !isfinite(length) ? NAN : clip > 0 && clip < length + 1e-6 ? clip / (length + 1e-6) : 1;
    });
    CUDA(cudaMemcpyAsync(m->host_sum + 1, norm, sizeof(double), cudaMemcpyDeviceToHost, gpu.stream));
    CUDA(cudaEventRecord(m->norm_there, gpu.stream));
    auto adamw = [&](int64_t from, int64_t end, cudaStream_t stream) {
        LAUNCH(adamw_kernel<X>, (unsigned)(((end - from) / 4 + 255) / 256), 256, 0, stream, m->params, m->grads,
               m->exp_avg, m->exp_avg_sq, m->copy, m->decayed, m->units, from, end, (float)o.beta1,
               (float)o.beta2, (float)(1 - o.beta1), (float)(1 - o.beta2), (float)(1 - o.lr * o.weight_decay),
               (float)(o.lr / (1 - pow(o.beta1, (double)step))),
               (float)(1 / sqrt(1 - pow(o.beta2, (double)step))), (float)o.eps, norm + 1);
    };
    int64_t early = m->begins[early_end] / (ranks ? ranks : 1);
    adamw(0, early, gpu.stream);
    cudaStream_t late = beside(LATE_UPDATE);
    adamw(early, m->held, late);
    exchange_weights(m, 0, early_end, gpu.stream);
    exchange_weights(m, early_end, m->n_ranges, late);
    wait_for_gpu(m->norm_there);
    if (isfinite(m->host_sum[1])) m->sums.add = 0;
    return sqrt(m->host_sum[1]);
}

// The layers' caches are those of another sequence, so many further. mamba2 has one sequence.
template <typename X> static void shift_caches(ModelGPU<X> *m, int sequences) {
    const DecodeGPU<X> *a = &m->acts.decode;
    for (int l = 0; l < m->host.config.n_layers; l++) {
        LayerActivationsGPU<X> *layer = &m->acts.layers[l];
        int same = layer->f == layer->s;
        layer->proj += sequences * a->proj_step;
        layer->s += sequences * a->s_step;
        if (same) layer->f = layer->s;
    }
}

// Logits (n,V), once they are there
template <typename X> static const real *read_logits(ModelGPU<X> *m, int n) {
    DecodeGPU<X> *a = &m->acts.decode;
    size_t bytes = sizeof(float) * (size_t)n * (size_t)m->host.config.vocab_size;
    CUDA(cudaMemcpyAsync(a->host_logits, a->logits, bytes, cudaMemcpyDeviceToHost, gpu.stream));
    CUDA(cudaStreamSynchronize(gpu.stream));
    return a->host_logits;
}

template <typename X> static const real *extend_gpu(ModelGPU<X> *m, const int *tokens, int n, int first);
// Sequences are told apart by the decoder alone: else there is one, and the next token is read as any text.
// Launches are recorded for 1, 2, 4, ... of them; those that are not there have the number -1.
template <typename X> static const real *model_extend_each_gpu(Model *model, const Next *next, int n) {
    ModelGPU<X> *m = of<X>(model);
    if (!m->decodes) return extend_gpu(m, &next->token, 1, next->first);
    int N = 1, B = m->host.B;
    while (N < n) N *= 2;
    N = min_int(N, B);
    must_fit(n, B, "sequences");
    Next *host = (Next *)m->host_inputs->ids, none = {-1, 0, 0};
    for (int i = 0; i < n; i++) {
        must_fit(next[i].first + 1, m->host.T, "tokens of a sequence");
        host[i] = next[i];
    }
    for (int i = n; i < N; i++) host[i] = none;
    CUDA(cudaMemcpyAsync(m->inputs->ids, host, sizeof(Next) * (size_t)N, cudaMemcpyHostToDevice, gpu.stream));
    replay(m, ONE_TOKEN, N, 0, 0, [&] { hidden_decode_gpu(m, N, gpu.stream); });
    return read_logits(m, n);
}

// A text, or its next piece, at once.
template <typename X> static const real *extend_gpu(ModelGPU<X> *m, const int *tokens, int n, int first) {
    cudaStream_t stream = gpu.stream;
    const Config *c = &m->host.config;
    int D = c->d_model, V = c->vocab_size;
    must_fit(first + n, m->host.T, "tokens of a sequence");
    m->ways = ways_of_text<X>(c, first + n);
    memcpy(m->host_inputs->ids, tokens, sizeof(int) * (size_t)n);
    CUDA(cudaMemcpyAsync(m->inputs->ids, m->host_inputs->ids, sizeof(int) * (size_t)n, cudaMemcpyHostToDevice,
                         stream));
    hidden_forward_gpu(m, m->inputs->ids, 1, first + n, first, 0, 0, c->n_layers, stream);
    linear_forward_gpu(m->acts.logits, V, m->acts.ln_f + (size_t)(n - 1) * D, as_x(m, m->weights.wte),
                       (const X *)NULL, 1, D, V, stream);
    copy_gpu(m->acts.decode.logits, V, m->acts.logits, 1, V, stream);
    return read_logits(m, 1);
}
template <typename X>
static const real *model_extend_gpu(Model *model, int sequence, const int *tokens, int n, int first) {
    ModelGPU<X> *m = of<X>(model);
    Next next = {sequence, *tokens, first};
    must_fit(sequence + 1, m->host.B, "sequences");
    if (n == 1 && m->decodes) return model_extend_each_gpu<X>(model, &next, 1);
    shift_caches(m, sequence);
    const real *logits = extend_gpu(m, tokens, n, first);
    shift_caches(m, -sequence);
    return logits;
}

// What is known of a sequence's first n positions, rows of `width`, to `copies` sequences behind it.
template <typename Y>
static void copy_cache_gpu(Y *cache, int64_t step, int sequence, int copies, int n, int width,
                           cudaStream_t stream) {
    Y *from = cache + sequence * step, *to_ = from + step;
    int some = (int)(MOST_PIECES / ((int64_t)n * width)); // copies of a pass
    if (some < 1) some = 1;
    for (int first = 0; first < copies; first += some)
        each(min_int(some, copies - first) * (int64_t)n, width, wide({step, width}, {from}), stream,
             [=] __device__ (auto SPAN, int row, int i) {
            int64_t at = (int64_t)(row % n) * width + i;
            write(to_ + (first + row / n) * step + at, read<SPAN>(from + at));
        });
}
template <typename X> static void model_copy_gpu(Model *model, int sequence, int copies, int n) {
    ModelGPU<X> *m = of<X>(model);
    const Config *c = &m->host.config;
    const DecodeGPU<X> *a = &m->acts.decode;
    must_fit(sequence + copies + 1, m->host.B, "sequences");
    for (int l = 0; l < c->n_layers; l++) {
        LayerActivationsGPU<X> *layer = &m->acts.layers[l];
        copy_cache_gpu(layer->proj, a->proj_step, sequence, copies, n, proj_ld(c), gpu.stream);
        copy_cache_gpu(layer->s, a->s_step, sequence, copies, n, c->d_model, gpu.stream);
    }
}

// ----------------------------------------------------------------------------
// Mamba-2, the mixer that the paper compares with

__device__ static inline float sigmoid_gpu(float x) { return 1 / (1 + __expf(-x)); }
__device__ static inline float silu_gpu(float x) { return x * sigmoid_gpu(x); }

// A thread takes one channel of CONV_ROWS positions in turn, the latest inputs in registers: last[lag] is
// that of `lag` before. Reads for CONV_AHEAD positions are on their way at once.
enum { CONV_AHEAD = 8, CONV_ROWS = 4 * CONV_AHEAD - (TAPS - 1) };
template <typename X> struct Conv {
    const X *inp, *tail;
    const float *weight, *bias;
    int ld, T, W, first, pieces; // of CONV_ROWS positions in a sequence
    __device__ float input(int b, int t, int c) const {
        if (t < 0 || t >= T) return 0;
        return get(t < first ? tail[t % (TAPS - 1) * W + c]
                             : __ldg(inp + ((int64_t)b * (T - first) + t - first) * ld + c));
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
static void conv_forward_gpu(X *out, const X *inp, int ld, X *tail, const float *weight, const float *bias,
                             int B, int T, int W, int first, cudaStream_t stream) {
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
                if (t + i < end) out[((int64_t)b * rows + t + i - first) * W + c] = to<X>(silu_gpu(u));
            }
        }
    });
    // row n of those to remember
    if (tail) each(rows - from, W, 0, stream, [=] __device__ (auto, int n, int c) {
        tail[(first + from + n) % (TAPS - 1) * W + c] = inp[(int64_t)(from + n) * ld + c];
    });
}

// dinp, and partial sums of dweight and dbias: the warps of a block take pieces of a sequence, du_t of
// which is known three positions before dinp_{t-3} can be written.
template <typename X>
__global__ void __launch_bounds__(256, 3)
    conv_backward_kernel(X *dinp, float *partial, const X *dout, Conv<X> f, int items) {
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
                if (at >= t0 && at < min(f.T, t0 + CONV_ROWS))
                    dinp[((int64_t)b * f.T + at) * f.ld + c] = to<X>(sum);
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
static void conv_backward_gpu(X *dinp, float *dweight, float *dbias, const X *dout, const X *inp, int ld,
                              const float *weight, const float *bias, int B, int T, int W, ColumnSums *sums,
                              cudaStream_t stream) {
    int pieces = (T + CONV_ROWS - 1) / CONV_ROWS, stride = (TAPS + 1) * W, chunks = conv_chunks(B, T, W);
    float *partial = sums_place(sums, (int64_t)chunks * stride);
    Conv<X> f = {inp, NULL, weight, bias, ld, T, W, 0, pieces};
    LAUNCH(conv_backward_kernel<X>, dim3((W + 31) / 32, chunks), dim3(32, 8), 0, stream, dinp, partial, dout,
           f, B * pieces);
    column_sum(sums, dweight, partial, chunks, stride, TAPS * W);
    column_sum(sums, dbias, partial + TAPS * W, chunks, stride, W);
}

// A thread takes one head of one row, forward and backward.
template <typename X>
static void step_forward_gpu(float *step, const X *inp, int ld, const float *bias, int N, int heads,
                             cudaStream_t stream) {
    each(N, heads, 0, stream, [=] __device__ (auto, int n, int h) {
        float x = get(inp[(int64_t)n * ld + h]) + bias[h];
        step[(int64_t)n * heads + h] = x > 30 ? x : log1pf(expf(x));
    });
}

template <typename X>
static void step_backward_gpu(X *dinp, float *dbias, const float *dstep, int ld_dstep, const X *inp, int ld,
                              const float *bias, int N, int heads, ColumnSums *sums, cudaStream_t stream) {
    each_with_sums({dbias}, sums, N, heads, 0, stream, [=] __device__ (auto, int n, int h, auto &sum) {
        float grad = dstep[(int64_t)n * ld_dstep + h] * sigmoid_gpu(get(inp[(int64_t)n * ld + h]) + bias[h]);
        dinp[(int64_t)n * ld + h] = to<X>(grad);
        sum[0][0] += grad;
    });
}

#ifndef SESSA_PLAIN
#include "dev/cuda/scan.cuh"
#endif

// Positions from one kept state to the next, and numbers of scratch: the state and its gradient, with
// backward the states of a chunk for each of at most `processors` blocks, and the heads' parts of db and
// dc.
template <typename X> static int scan_chunk(const Config *c) {
    return plain ? CHUNK : scan_rows(c->state_dim, c->head_dim, sizeof(X));
}
static int64_t scan_scratch_gpu(ScanShape scan) {
    int64_t parts = (int64_t)scan.B * scan.T * scan.heads * 2 * scan.S;
    int64_t states = (int64_t)scan.B * scan.S * scan.E,
            chunk = (CHUNK + 1) * (int64_t)scan.S * (scan.E / scan.heads);
    return plain ? parts + 2 * states + gpu.processors * chunk : parts;
}

// scan_row: a thread takes column i of the head's state (S,w), whose rows are ld apart.
template <typename X>
static __device__ inline void scan_row_gpu(float *state, int64_t ld, const X *xbc_t, float step,
                                           ScanShape scan, int h, int i) {
    int w = scan.E / scan.heads;
    const X *b = xbc_t + scan.E;
    float x = get(xbc_t[h * w + i]), keep = (float)exp(-exp((double)scan.A_log[h]) * (double)step);
    for (int s = 0; s < scan.S; s++) state[s * ld + i] = keep * state[s * ld + i] + step * get(b[s]) * x;
}
// A block takes head h of sequence b, a thread a column i of its state, and both go from the first token to
// the last. state (B,S,E): 0, or what the call before left there. states (B,chunks,S,E) gets the state
// before each chunk.
template <typename X>
__global__ void scan_forward_kernel(X *y, float *states, float *state, const X *xbc, const float *step,
                                    ScanShape scan) {
    wait_for_results();
    int h = blockIdx.x, b = blockIdx.y, T = scan.T, E = scan.E, S = scan.S, W = E + 2 * S, w = E / scan.heads;
    int64_t size = (int64_t)S * E, chunks = (T + CHUNK - 1) / CHUNK;
    state += b * size + h * w;
    states += b * chunks * size + h * w;
    for (int i = threadIdx.x; i < w; i += blockDim.x)
        for (int t = 0; t < T; t++) {
            int64_t row = (int64_t)b * T + t;
            const X *xbc_t = xbc + row * W, *c = xbc_t + E + S;
            float sum = scan.skip[h] * get(xbc_t[h * w + i]);
            for (int s = 0; s < S && t % CHUNK == 0; s++)
                states[t / CHUNK * size + s * E + i] = state[s * E + i];
            scan_row_gpu(state, E, xbc_t, step[row * scan.heads + h], scan, h, i);
            for (int s = 0; s < S; s++) sum += get(c[s]) * state[s * E + i];
            y[row * E + h * w + i] = to<X>(sum);
        }
}
// carried (B,S,E): the state before position 0 of this call, then after its last; NULL: 0, and nothing is
// wanted.
template <typename X>
static void scan_forward_gpu(X *y, float *states, float *carried, Scratch scratch, const X *xbc,
                             const float *step, ScanShape scan, cudaStream_t stream) {
    if (!plain) return scan_forward_fast(y, states, carried, xbc, step, scan, 0, stream);
    float *state = carried ? carried : borrow(scratch, scan_scratch_gpu(scan));
    size_t bytes = sizeof(float) * (size_t)scan.B * (size_t)scan.S * (size_t)scan.E;
    if (!carried) CUDA(cudaMemsetAsync(state, 0, bytes, stream));
    LAUNCH(scan_forward_kernel<X>, dim3(scan.heads, scan.B), 64, 0, stream, y, states, state, xbc, step,
           scan);
}

// From the last token to the first, see scan_backward. A block takes a head of a sequence, then the next
// that is its own: the states of a chunk, computed again, are a block's. Three times a token its threads
// wait for each other: a thread takes columns i of the state for what is summed over its rows s, and rows s
// for what is summed over columns. part (N,heads,2S): the head's part of db and dc.
template <typename X>
__global__ void scan_backward_kernel(X *dxbc, float *dstep, float *part, float *dstate, float *chunk_states,
                                     const X *dy, const float *states, const X *xbc, const float *step,
                                     ScanShape scan) {
    __shared__ float shared[32];
    wait_for_results();
    int T = scan.T, E = scan.E, S = scan.S, W = E + 2 * S, heads = scan.heads, w = E / heads;
    int64_t size = (int64_t)S * w, chunks = (T + CHUNK - 1) / CHUNK; // of one head's state
    float *state = chunk_states + blockIdx.x * (CHUNK + 1) * size;
    for (int item = blockIdx.x; item < scan.B * heads; item += gridDim.x) {
        int b = item / heads, h = item % heads;
        float rate = (float)exp((double)scan.A_log[h]), *d = dstate + item * size;
        for (int64_t i = threadIdx.x; i < size; i += blockDim.x) d[i] = 0;
        for (int t = T - 1; t >= 0; t--) {
            int64_t row = (int64_t)b * T + t, chunk = t / CHUNK, first = chunk * CHUNK;
            if (t == T - 1 || t % CHUNK == CHUNK - 1) // the last token of a chunk: its states
                for (int i = threadIdx.x; i < w; i += blockDim.x) {
                    const float *kept = states + (b * chunks + chunk) * S * E + h * w + i;
                    for (int s = 0; s < S; s++) state[s * w + i] = kept[(int64_t)s * E];
                    for (int64_t j = first; j <= t; j++) {
                        float *before = state + (j - first) * size, *now = before + size;
                        for (int s = 0; s < S; s++) now[s * w + i] = before[s * w + i];
                        scan_row_gpu(now, w, xbc + (b * (int64_t)T + j) * W,
                                     step[(b * (int64_t)T + j) * heads + h], scan, h, i);
                    }
                }
            __syncthreads();
            const float *before = state + (t - first) * size, *now = before + size;
            const X *x = xbc + row * W + h * w, *bt = xbc + row * W + E, *c = bt + S,
                    *dy_t = dy + row * E + h * w;
            float delta = step[row * heads + h], keep = (float)exp(-(double)(rate * delta)), taken = 0,
                  faded = 0, skipped = 0;
            for (int i = threadIdx.x; i < w; i += blockDim.x) {
                float sum = 0;
                for (int s = 0; s < S; s++) {
                    float *at = &d[s * w + i];
                    *at += get(c[s]) * get(dy_t[i]);
                    sum += *at * get(bt[s]);
                    faded += keep * *at * before[s * w + i];
                }
                dxbc[row * W + h * w + i] = to<X>(scan.skip[h] * get(dy_t[i]) + delta * sum);
                skipped += get(dy_t[i]) * get(x[i]);
            }
            __syncthreads();
            for (int s = threadIdx.x; s < S; s += blockDim.x) {
                float db = 0, dc = 0;
                for (int i = 0; i < w; i++) {
                    db += d[s * w + i] * get(x[i]);
                    dc += now[s * w + i] * get(dy_t[i]);
                }
                taken += get(bt[s]) * db;
                part[(row * heads + h) * 2 * S + s] = delta * db;
                part[(row * heads + h) * 2 * S + S + s] = dc;
            }
            taken = block_sum(taken, shared);
            faded = block_sum(faded, shared);
            skipped = block_sum(skipped, shared);
            if (threadIdx.x == 0) {
                float *to_row = dstep + row * 3 * heads + h;
                to_row[0] = taken - rate * faded;
                to_row[heads] = -rate * delta * faded;
                to_row[2 * heads] = skipped;
            }
            for (int64_t i = threadIdx.x; i < size; i += blockDim.x) d[i] *= keep;
            __syncthreads();
        }
    }
}
// db and dc from the heads' parts, in their order; dA_log and dskip from the rows of dstep.
template <typename X>
static void scan_sums_gpu(X *dxbc, const float *part, float *dA_log, float *dskip, const float *dstep,
                          ScanShape scan, int in_eights, ColumnSums *sums, cudaStream_t stream) {
    int heads = scan.heads, E = scan.E, S = scan.S;
    each((int64_t)scan.B * scan.T, 2 * S, in_eights, stream, [=] __device__ (auto SPAN, int n, int i) {
        Pack<SPAN> sum = {};
        for (int h = 0; h < heads; h++) sum += read<SPAN>(part + ((int64_t)n * heads + h) * 2 * S + i);
        write(dxbc + (int64_t)n * (E + 2 * S) + E + i, sum);
    });
    each_with_sums({dA_log, dskip}, sums, scan.B * scan.T, heads, 0, stream,
                   [=] __device__ (auto, int n, int h, auto &sum) {
        const float *row = dstep + (int64_t)n * 3 * heads + heads + h;
        sum[0][0] += row[0];
        sum[1][0] += row[heads];
    });
}
template <typename X>
static void scan_backward_gpu(X *dxbc, float *dstep, float *dA_log, float *dskip, Scratch scratch,
                              const X *dy, const float *states, const X *xbc, const float *step,
                              ScanShape scan, ColumnSums *sums, cudaStream_t stream) {
    if (!plain)
        return scan_backward_fast(dxbc, dstep, dA_log, dskip, scratch, dy, states, xbc, step, scan, 0, sums,
                                  stream);
    int items = scan.B * scan.heads, blocks = min_int(items, gpu.processors);
    float *part = borrow(scratch, scan_scratch_gpu(scan)),
          *dstate = part + (int64_t)scan.B * scan.T * scan.heads * 2 * scan.S;
    float *chunk_states = dstate + (int64_t)scan.B * scan.S * scan.E;
    LAUNCH(scan_backward_kernel<X>, blocks, 64, 0, stream, dxbc, dstep, part, dstate, chunk_states, dy,
           states, xbc, step, scan);
    scan_sums_gpu(dxbc, part, dA_log, dskip, dstep, scan, 0, sums, stream);
}

// threadIdx.y takes a row, threadIdx.x pieces of its columns. Backward has a pass of its own for dweight.
template <typename X>
static void gated_rmsnorm_forward_gpu(X *out, float *rstd, const X *y, const X *z, int ld,
                                      const float *weight, int N, int E, cudaStream_t stream) {
    rows(N, E, wide({E, ld}, {out, y, z, weight}), 0, stream, [=] __device__ (auto SPAN, auto PIECES) {
        __shared__ float2 shared[ROW_BLOCK / 32];
        int n = last_first();
        if (n >= N) return;
        int64_t row = (int64_t)n * E, wide_row = (int64_t)n * ld;
        Pack<SPAN> v[PIECES];
        float squares = 0;
        for (auto [p, i] : pieces<SPAN, PIECES>(E)) {
            v[p] = read<SPAN>(y + row + i) * each_of(read<SPAN>(z + wide_row + i), silu_gpu);
            squares = add_up(squares, v[p] * v[p]);
        }
        float r = rsqrtf(row_sum(squares, 0, shared).x / E + 1e-5f);
        for (auto [p, i] : pieces<SPAN, PIECES>(E))
            write(out + row + i, v[p] * (r * read<SPAN>(weight + i)));
        if (threadIdx.x == 0) rstd[n] = r;
    });
}

template <typename X>
static void gated_rmsnorm_backward_gpu(X *dy, X *dz, float *dweight, const X *dout, const X *y, const X *z,
                                       int ld, const float *rstd, const float *weight, int N, int E,
                                       ColumnSums *sums, cudaStream_t stream) {
    int in_eights = wide({E, ld}, {dy, dz, dout, y, z, weight});
    each_with_sums({dweight}, sums, N, E, in_eights, stream,
                   [=] __device__ (auto SPAN, int n, int i, auto &sum) {
        Pack<SPAN> g = read<SPAN>(dout + (int64_t)n * E + i), v = read<SPAN>(y + (int64_t)n * E + i),
                   gate = read<SPAN>(z + (int64_t)n * ld + i);
        sum[0] += g * v * gate * each_of(gate, sigmoid_gpu) * rstd[n];
    });
    rows(N, E, in_eights, 0, stream, [=] __device__ (auto SPAN, auto PIECES) {
        __shared__ float2 shared[ROW_BLOCK / 32];
        int n = last_first();
        if (n >= N) return;
        int64_t row = (int64_t)n * E, wide_row = (int64_t)n * ld;
        Pack<SPAN> g[PIECES], v[PIECES], gate[PIECES];
        float dot = 0, r = rstd[n];
        for (auto [p, i] : pieces<SPAN, PIECES>(E)) {
            g[p] = read<SPAN>(weight + i) * read<SPAN>(dout + row + i);
            v[p] = read<SPAN>(y + row + i);
            gate[p] = read<SPAN>(z + wide_row + i);
            dot = add_up(dot, g[p] * v[p] * gate[p] * each_of(gate[p], sigmoid_gpu));
        }
        dot = row_sum(dot, 0, shared).x * r * r / E;
        for (auto [p, i] : pieces<SPAN, PIECES>(E)) {
            Pack<SPAN> s = each_of(gate[p], sigmoid_gpu), silu = gate[p] * s;
            Pack<SPAN> dv = r * (g[p] - v[p] * silu * dot);
            write(dz + wide_row + i, v[p] * (dv * s * (1 + gate[p] * (1 - s))));
            write(dy + row + i, dv * silu);
        }
    });
}

template <typename X>
static void mamba2_activations_gpu(ModelGPU<X> *m, ActivationList *list, int l, Mode mode) {
    const Config *c = &m->host.config;
    int E = 2 * c->d_model, S = c->state_dim, training = mode >= TRAIN;
    LayerActivationsGPU<X> *a = &m->acts.layers[l];
    Table *t = &m->x_table, *f = &m->f_table;
    auto in_x = [&](int l, const char *name) { return activation_gpu(t, m->x_block, list, l, name); };
    auto in_f = [&](int l, const char *name) { return activation_gpu(f, m->f_block, list, l, name); };
    if (l == 0 || training) {
        a->proj = in_x(l, "proj");
        a->y_scan = in_x(l, "y");
        a->rms = in_f(l, "rms");
        a->s = in_x(l, "s");
        a->states = in_f(l, "states");
    }
    if (mode == GENERATE) a->carried = add_activation(f, m->f_block, l, "carried", 2, S, E, 1);
    if (mode == GENERATE) a->tail = in_x(l, "tail");
    if (l == 0 || mode == KEEP_ALL) {
        a->xbc = in_x(l, "conv");
        a->step = in_f(l, "dt");
        a->normed = in_x(l, "normed");
    }
    if (l || !training) return;
    m->acts.dy = in_x(-1, "dy");
    m->acts.dxbc = in_x(-1, "dxbc");
    m->acts.dstep = in_f(-1, "dstep");
}

static int64_t mamba2_sums_room(const Config *c, int B, int T) {
    int E = 2 * c->d_model, heads = E / c->head_dim, W = E + 2 * c->state_dim;
    auto pass = [&](int sums, int width) { return (int64_t)sums * sum_chunks(B * T, width, 1) * width; };
    return pass(1, E) + pass(2, heads) + pass(1, heads) + (int64_t)conv_chunks(B, T, W) * (TAPS + 1) * W;
}
// Whether the GPU's shared memory suffices for the fast way's chunks.
static int scan_fits(const Config *c, size_t number) {
    return plain || scan_rows(c->state_dim, c->head_dim, (int)number);
}

template <typename X>
static void mamba2_forward_gpu(ModelGPU<X> *m, int l, int B, int T, int first, cudaStream_t stream) {
    const Config *c = &m->host.config;
    int D = c->d_model, E = 2 * D, S = c->state_dim, heads = E / c->head_dim, width = proj_width(c),
        ld = proj_ld(c), N = B * (T - first);
    LayerWeights *w = &m->weights.layers[l];
    ScanShape scan = scan_of(c, w, B, T - first);
    LayerActivationsGPU<X> *a = &m->acts.layers[l];
    if (a->carried && !first)
        CUDA(cudaMemsetAsync(a->carried, 0, sizeof(float) * (size_t)S * (size_t)E, stream));
    linear_forward_gpu(a->proj, ld, a->abar, as_x(m, w->in_proj), (const X *)NULL, N, D, width, stream);
    conv_forward_gpu(a->xbc, a->proj + E, ld, a->tail, w->conv_weight, w->conv_bias, B, T, E + 2 * S, first,
                     stream);
    step_forward_gpu(a->step, a->proj + width - heads, ld, w->step_bias, N, heads, stream);
    scan_forward_gpu(a->y_scan, a->states, a->carried, m->acts.scratch, a->xbc, a->step, scan, stream);
    gated_rmsnorm_forward_gpu(a->normed, a->rms, a->y_scan, a->proj, ld, w->norm_weight, N, E, stream);
    linear_forward_gpu(a->s + (size_t)first * D, D, a->normed, as_x(m, w->out_proj), (const X *)NULL, N, E, D,
                       stream);
}

template <typename X>
static void mamba2_backward_gpu(ModelGPU<X> *m, int l, int B, int T, cudaStream_t stream) {
    const Config *c = &m->host.config;
    int D = c->d_model, E = 2 * D, S = c->state_dim, W = E + 2 * S, heads = E / c->head_dim,
        width = proj_width(c), ld = proj_ld(c), N = B * T;
    LayerWeights *w = &m->weights.layers[l], *dw = &m->grad.layers[l];
    LayerActivationsGPU<X> *a = &m->acts.layers[l];
    ActivationsGPU<X> *back = &m->acts;
    const X *x = a->proj + E, *step = a->proj + width - heads;
    // again
    gated_rmsnorm_forward_gpu(a->normed, a->rms, a->y_scan, a->proj, ld, w->norm_weight, N, E, stream);
    linear_backward_gpu(back->dy, dw->out_proj, back->ds, D, a->normed, as_x(m, w->out_proj), N, E, D,
                        m->sums.add, stream);
    gated_rmsnorm_backward_gpu(back->dy, back->dproj, dw->norm_weight, back->dy, a->y_scan, a->proj, ld,
                               a->rms, w->norm_weight, N, E, &m->sums, stream);
    // again
    conv_forward_gpu(a->xbc, x, ld, (X *)NULL, w->conv_weight, w->conv_bias, B, T, W, 0, stream);
    step_forward_gpu(a->step, step, ld, w->step_bias, N, heads, stream);
    scan_backward_gpu(back->dxbc, back->dstep, dw->A_log, dw->skip, back->scratch, back->dy, a->states,
                      a->xbc, a->step, scan_of(c, w, B, T), &m->sums, stream);
    conv_backward_gpu(back->dproj + E, dw->conv_weight, dw->conv_bias, back->dxbc, x, ld, w->conv_weight,
                      w->conv_bias, B, T, W, &m->sums, stream);
    step_backward_gpu(back->dproj + width - heads, dw->step_bias, back->dstep, 3 * heads, step, ld,
                      w->step_bias, N, heads, &m->sums, stream);
    linear_backward_gpu(back->dabar, dw->in_proj, back->dproj, ld, a->abar, as_x(m, w->in_proj), N, D, width,
                        m->sums.add, stream);
}

// ----------------------------------------------------------------------------
// the backend

static_assert(PARAMS == 0 && EXP_AVG == 1 && EXP_AVG_SQ == 2 && GRADS == 3,
              "the lists here and in carve_memory follow Block");
// Whether ranks share the block.
template <typename X> static int is_shared(const ModelGPU<X> *m, Block block) {
    return m->ranks && (block == EXP_AVG || block == EXP_AVG_SQ);
}
// Tensor by tensor between the device's block and the host's, which follows the table. A shared one stands in the
// place of the gradients, which nobody needs between two steps.
template <typename X> static real *copy_block(ModelGPU<X> *m, Block block, cudaMemcpyKind way) {
    real **hosts[] = {&m->host.params, &m->host.exp_avg, &m->host.exp_avg_sq, &m->host.grads},
         *host = *hosts[block];
    float *blocks[] = {m->params, m->exp_avg, m->exp_avg_sq, m->grads},
          *device = is_shared(m, block) ? m->grads : blocks[block];
    if (!host) host = *hosts[block] = (real *)calloc((size_t)m->host.table.count + 1, sizeof(real));
    if (!host)
        stop_program("no %.2f GiB of memory for a copy of the parameters",
                     (double)m->host.table.count * sizeof(real) / 0x1p30);
    for (int i = 0; i < m->host.table.n; i++) {
        void *ends[] = {host + m->host.table.rows[i].offset, device + m->host.table.places[i]};
        int back = way == cudaMemcpyDeviceToHost;
        CUDA(cudaMemcpyAsync(ends[!back], ends[back], sizeof(real) * (size_t)m->host.table.rows[i].count, way,
                             gpu.stream));
    }
    return host;
}
template <typename X> static real *read_gpu(Model *model, Block block) {
    ModelGPU<X> *m = of<X>(model);
    join(LATE_UPDATE);
    wait_for_others();
    if (block == GRADS && !m->sums.add)
        CUDA(cudaMemsetAsync(m->grads, 0, sizeof(float) * (size_t)m->count, gpu.stream));
    if (is_shared(m, block)) gather_moments(m, block == EXP_AVG ? m->exp_avg : m->exp_avg_sq);
    real *host = copy_block(m, block, cudaMemcpyDeviceToHost);
    CUDA(cudaStreamSynchronize(gpu.stream));
    return host;
}
template <typename X> static void write_gpu(Model *model, Block block) {
    ModelGPU<X> *m = of<X>(model);
    join(LATE_UPDATE);
    copy_block(m, block, cudaMemcpyHostToDevice);
    if (is_shared(m, block)) take_moments(m, block == EXP_AVG ? m->exp_avg : m->exp_avg_sq);
    if (block == GRADS) m->sums.add = 1;
    if (block == PARAMS && sizeof(X) == sizeof(bf16))
        copy_gpu(m->copy, 64, m->params, (int)(m->count / 64), 64, gpu.stream);
    CUDA(cudaStreamSynchronize(gpu.stream));
}
static double bytes_gpu(const Model *m) { return m->bytes; }

// The Model behind the pointer is a ModelGPU<X>.
template <typename X>
static const Backend backend_of = {"CUDA",
                                   model_create_gpu<X>,
                                   model_free_gpu<X>,
                                   bytes_gpu,
                                   read_gpu<X>,
                                   write_gpu<X>,
                                   model_forward_gpu<X>,
                                   model_loss_gpu<X>,
                                   model_hits_gpu<X>,
                                   model_backward_gpu<X>,
                                   model_update_gpu<X>,
                                   model_extend_gpu<X>,
                                   model_extend_each_gpu<X>,
                                   model_copy_gpu<X>,
                                   0,
                                   1,
                                   NULL};
static const Backend *backend_gpu(void) {
    return gpu.precision == BF16 ? &backend_of<bf16> : &backend_of<float>;
}

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
    if (!code) code = run_gpus(argc, argv, &backend);
    if (!code && help)
        printf(
            "\nCUDA\n  --precision   TEXT  fp32, tf32 or bf16: of products and of what they read [bf16]\n");
    return code;
}

#ifdef SESSA_CUDA_MAIN
int main(int argc, char **argv) {
    start_again(argv);
    return run_cuda_program(argc, argv);
}
#endif
