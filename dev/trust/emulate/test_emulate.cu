/*
The emulation itself: its instructions against plain loops, and faults put in on purpose, each of which must
be found.

    ./test_emulate          all; a fault runs in a process of its own, whose last line is looked at
*/
#include <cuda.h>
#include <cuda_bf16.h>
#include <cublasLt.h>
#include <sys/wait.h>
#include <unistd.h>

static int passed, failed;
static void check(int ok, const char *what) {
    printf("  %-92s  %s\n", what, ok ? "ok" : "FAIL");
    if (ok) passed++;
    else failed++;
    fflush(stdout);
}
static uint64_t chance = 5;
static float random_number(void) {
    chance = chance * 6364136223846793005u + 1442695040888963407u;
    return (float)(int64_t)chance * 0x1p-63f;
}
template <typename Y> static Y *device_array(size_t n) {
    Y *at;
    if (cudaMalloc((void **)&at, n * sizeof(Y)) != cudaSuccess) exit(1);
    return at;
}
typedef __nv_bfloat16 bf16;

// ----------------------------------------------------------------------------
// instructions against plain loops

// out (16,8) = a (16,16) · b (16,8), operands through shared memory: a by rows, b by rows and turned on the
// way, or transposed, b (8,16), as it is
template <int B_COLUMNS> static __global__ void product_kernel(float *out, const bf16 *a, const bf16 *b) {
    __shared__ __align__(16) bf16 left[16][16];
    __shared__ __align__(16) bf16 right[16][16];
    int lane = threadIdx.x % 32;
    copy_async_16(&left[lane / 2][lane % 2 * 8], a + lane / 2 * 16 + lane % 2 * 8, 16);
    if (B_COLUMNS)
        copy_async_16(&right[lane / 2][lane % 2 * 8], b + lane / 2 * 8, lane % 2 ? 0 : 16); // the rest 0
    else copy_async_16(&right[lane / 2][lane % 2 * 8], lane / 2 < 8 ? b + lane / 2 * 16 + lane % 2 * 8 : b,
                       lane / 2 < 8 ? 16 : 0);
    copy_async_commit();
    copy_async_wait<0>();
    __syncwarp();
    uint32_t x[4], y[4];
    float c[4] = {0, 0, 0, 0};
    ldmatrix_x4(x, &left[lane % 16][lane / 16 * 8]);
    if (B_COLUMNS) ldmatrix_x4_trans(y, &right[lane % 16][lane / 16 * 8]);
    else ldmatrix_x4(y, &right[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
    mma_bf16(c, x, y);
    for (int e = 0; e < 4; e++) out[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = c[e];
    float zeros[4] = {0, 0, 0, 0}; // of what was filled with zeros
    mma_bf16(zeros, x, y + 2);
    for (int e = 0; e < 4; e++) if (zeros[e] != 0) out[0] = NAN;
}
static void test_products(void) {
    bf16 *a = device_array<bf16>(256), *b = device_array<bf16>(128);
    float *out = device_array<float>(128);
    for (int columns = 0; columns < 2; columns++) {
        for (int i = 0; i < 256; i++) a[i] = random_number();
        for (int i = 0; i < 128; i++) b[i] = random_number();
        auto kernel = columns ? product_kernel<1> : product_kernel<0>;
        (kernel)<<<1, 32, 0, NULL>>>(out, a, b);
        double worst = 0;
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++) {
                double sum = 0;
                for (int k = 0; k < 16; k++)
                    sum += (double)a[i * 16 + k] * (double)b[columns ? k * 8 + j : j * 16 + k];
                worst = fmax(worst, fabs(sum - (double)out[i * 8 + j]));
                if (isnan(out[i * 8 + j])) worst = INFINITY;
            }
        check(worst < 1e-5, columns ? "cp.async, ldmatrix.trans, mma: a product"
                                    : "cp.async, ldmatrix, mma: a product, b transposed");
    }
    cudaFree(a);
    cudaFree(b);
    cudaFree(out);
}

static __global__ void exchange_kernel(int *out) {
    int lane = threadIdx.x, *own = out + lane;
    own[0] = __shfl_sync(~0u, lane, 5);
    own[32] = __shfl_xor_sync(~0u, lane, 3);
    own[64] = __shfl_up_sync(~0u, lane, 4);
    own[96] = __shfl_down_sync(~0u, lane, 2, 8);
    own[128] = (int)__ballot_sync(~0u, lane % 3 == 0);
    own[160] = __any_sync(~0u, lane == 7) + 2 * __all_sync(~0u, lane < 31);
    own[192] = (int)__reduce_add_sync(~0u, (unsigned)lane);
    own[224] = __reduce_min_sync(~0u, lane - 40) + 1000 * __reduce_max_sync(~0u, -lane - 1);
    own[256] = __shfl_xor_sync(3u << (lane & ~1), lane, 1);
    own[288] = __syncthreads_count(lane % 2);
}
static void test_exchanges(void) {
    int *out = device_array<int>(320), ok = 1;
    (exchange_kernel)<<<1, 32, 0, NULL>>>(out);
    for (int lane = 0; lane < 32; lane++) {
        int *own = out + lane;
        ok &= own[0] == 5 && own[32] == (lane ^ 3) && own[64] == (lane < 4 ? lane : lane - 4) &&
              own[96] == (lane % 8 > 5 ? lane : lane + 2) && own[128] == 0x49249249 && own[160] == 1 &&
              own[192] == 496 && own[224] == -40 - 1000 && own[256] == (lane ^ 1) && own[288] == 16;
    }
    check(ok, "shuffles, votes, reductions");
    cudaFree(out);
}
static void test_numbers(void) {
    check((float)bf16(1.00390625f) == 1 && (float)bf16(1.01171875f) == 1.015625f &&
              (float)bf16(-INFINITY) == -INFINITY && isnan((float)bf16(NAN)) &&
              (float)bf16(3.4e38f) == INFINITY,
          "bfloat16: the nearest, ties to even");
    check(__uint_as_float(cvt_tf32(1 + 0x1p-11f)) == 1 + 0x1p-10f &&
              __uint_as_float(cvt_tf32(1 + 0x1p-12f)) == 1,
          "TensorFloat-32: ten bits, ties away from zero");
}

// ----------------------------------------------------------------------------
// faults

// What a neighbour wrote, three times: right with both barriers, wrong in some order without one.
template <int FIRST, int SECOND> static __global__ void neighbours_kernel(float *out) {
    __shared__ float x[128];
    float sum = 0;
    for (int round = 0; round < 3; round++) {
        x[threadIdx.x] = (float)(threadIdx.x + round);
        if (FIRST) __syncthreads();
        sum += x[(threadIdx.x + 37) % 128];
        if (SECOND) __syncthreads();
    }
    out[threadIdx.x] = sum / 3 + 1;
}
template <int WAITS> static __global__ void lanes_kernel(float *out) {
    __shared__ float x[32];
    x[threadIdx.x] = (float)(threadIdx.x + 2);
    if (WAITS) __syncwarp();
    out[threadIdx.x] = x[(threadIdx.x + 5) % 32];
}
static void check_order(const char *name, void (*kernel)(float *), int threads, int shift, int good) {
    float *out = device_array<float>(128);
    int wrong = 0;
    for (int run = 0; run < 20; run++) {
        (kernel)<<<1, threads, 0, NULL>>>(out);
        for (int i = 0; i < threads; i++) wrong |= out[i] != (float)((i + shift) % threads + 2);
    }
    check(wrong != good, name);
    cudaFree(out);
}

enum Fault {
    DIVERGED,
    ENDED,
    LANES,
    MASK,
    GROUP,
    STATIC_END,
    DYNAMIC_END,
    PAST_MEMORY,
    PAST_BYTES,
    MISALIGNED,
    TOO_MUCH_SHARED,
    BOUNDS,
    N_FAULTS
};
static const struct { const char *name, *line; } faults[N_FAULTS] = {
    {"__syncthreads at two lines", "__syncthreads meets __syncthreads"},
    {"a thread ends before a barrier", "not all threads reach it"},
    {"half a warp does not come to a shuffle", "not all threads reach it"},
    {"a mask without the lane", "is without lane"},
    {"a barrier for more threads than come", "not all threads reach it"},
    {"a write behind a shared array", "bytes behind this array"},
    {"a write behind the launch's shared memory", "bytes behind this array"},
    {"a read a page behind an allocation", "reaches outside of all memory"},
    {"a byte written behind an allocation", "written to behind its end"},
    {"cp.async to an address that is no multiple of 16", "no multiple of 16"},
    {"more shared memory than a block has", "bytes of shared memory"},
    {"more threads than __launch_bounds__ says", "for which the kernel says"},
};
template <int FAULT> static __global__ void faulty_kernel(float *out, int where) {
    __shared__ float x[64];
    int i = threadIdx.x;
    if (FAULT == DIVERGED) {
        if (i < 32) __syncthreads();
        else __syncthreads();
    }
    if (FAULT == ENDED) {
        if (i == 40) return;
        __syncthreads();
    }
    if (FAULT == LANES && i % 32 < 16) out[i] = __shfl_xor_sync(~0u, out[i], 1);
    if (FAULT == LANES) __syncthreads();
    if (FAULT == MASK) out[i] = __shfl_xor_sync(1, out[i], 0);
    if (FAULT == GROUP && i < 32) barrier_sync(1, 64);
    if (FAULT == STATIC_END) ((volatile float *)x)[i + where] = 1;
    if (FAULT == DYNAMIC_END) {
        extern __shared__ float dynamic[];
        dynamic[i + where] = 1;
    }
    if (FAULT == PAST_MEMORY) out[i] = out[i + 2048 * where];
    if (FAULT == PAST_BYTES) ((char *)out)[i + 193 * where] = 1;
    if (FAULT == MISALIGNED) copy_async_16(x + 1, out, 16);
}
static __global__ void large_kernel(float *out) {
    __shared__ float x[40000];
    x[threadIdx.x] = 0;
    out[threadIdx.x] = x[threadIdx.x];
}
static __global__ void __launch_bounds__(32) bounded_kernel(float *out) { out[threadIdx.x] = 0; }

template <int FAULT> static void run_fault(void) {
    float *out = device_array<float>(64); // 256 bytes
    if (FAULT == PAST_BYTES) out = (float *)device_array<char>(250);
    if (FAULT == TOO_MUCH_SHARED) (large_kernel)<<<1, 64, 0, NULL>>>(out);
    else if (FAULT == BOUNDS) (bounded_kernel)<<<1, 64, 0, NULL>>>(out);
    else {
        auto kernel = faulty_kernel<FAULT>;
        (kernel)<<<1, FAULT == PAST_BYTES ? 60 : 64, 256, NULL>>>(out, 1);
    }
    cudaFree(out);
}
template <int FAULT> static void check_fault(void) {
    int ends[2];
    fflush(stdout);
    if (pipe(ends)) exit(1);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        run_fault<FAULT>();
        _exit(0);
    }
    close(ends[1]);
    char text[4096];
    size_t n = 0;
    for (ssize_t got; n < sizeof(text) - 1 && (got = read(ends[0], text + n, sizeof(text) - 1 - n)) > 0;)
        n += (size_t)got;
    text[n] = 0;
    close(ends[0]);
    int status;
    waitpid(child, &status, 0);
    int found = WIFSIGNALED(status) && strstr(text, faults[FAULT].line);
    check(found, faults[FAULT].name);
    if (!found) printf("    %s\n", text);
}

static void test_limits(void) {
    float *out = device_array<float>(64);
    void (*kernel)(float *) = bounded_kernel;
    cudaGetLastError();
    (kernel)<<<dim3(1, 65536), 32, 0, NULL>>>(out);
    check(cudaGetLastError() == cudaErrorInvalidConfiguration, "65,536 blocks along y are refused");
    (kernel)<<<1, 1025, 0, NULL>>>(out);
    check(cudaGetLastError() == cudaErrorInvalidConfiguration, "1,025 threads are refused");
    (kernel)<<<1, 32, 50000, NULL>>>(out);
    check(cudaGetLastError() == cudaErrorInvalidValue, "more than 48 KiB of shared memory are refused");
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 50000);
    (kernel)<<<1, 32, 50000, NULL>>>(out);
    check(cudaGetLastError() == cudaSuccess, "unless the kernel was allowed them");
    cudaFree(out);
}

// cp.async: what is read before it is waited for is no number; wait_group lets the last groups be.
static __global__ void copies_kernel(float *out, const float *from) {
    __shared__ float4 x[2];
    copy_async_16(&x[0], from, 16);
    copy_async_commit();
    copy_async_16(&x[1], from + 4, 16);
    copy_async_commit();
    out[0] = x[0].x;
    copy_async_wait<1>();
    out[1] = x[0].x;
    out[2] = x[1].x;
    copy_async_wait<0>();
    out[3] = x[1].w;
}
static void test_copies(void) {
    float *out = device_array<float>(4), *from = device_array<float>(8);
    for (int i = 0; i < 8; i++) from[i] = (float)i;
    (copies_kernel)<<<1, 1, 0, NULL>>>(out, from);
    check(isnan(out[0]) && out[1] == 0 && isnan(out[2]) && out[3] == 7,
          "cp.async arrives when it is waited for");
    cudaFree(out);
    cudaFree(from);
}

// Two streams, with and without the event that keeps them in order; and the same recorded.
static __global__ void set_kernel(float *out, float value) { *out = value; }
static __global__ void add_kernel(float *out, const float *from) { *out = *from + 1; }
static void test_streams(void) {
    cudaStream_t a, b;
    cudaEvent_t event, back;
    float *x = device_array<float>(2), *y = x + 1;
    cudaStreamCreate(&a);
    cudaStreamCreate(&b);
    cudaEventCreate(&event);
    cudaEventCreate(&back);
    for (int recorded = 0; recorded < 2; recorded++)
        for (int kept = 0; kept < 2; kept++) {
            int wrong = 0;
            auto all = [&] {
                cudaEventRecord(back, a);
                if (recorded) cudaStreamWaitEvent(b, back);
                (set_kernel)<<<1, 1, 0, a>>>(x, 5.0f);
                cudaEventRecord(event, a);
                if (kept) cudaStreamWaitEvent(b, event);
                (add_kernel)<<<1, 1, 0, b>>>(y, x);
                cudaEventRecord(back, b);
                cudaStreamWaitEvent(a, back);
            };
            cudaGraph_t graph = NULL;
            if (recorded) {
                cudaStreamBeginCapture(a, cudaStreamCaptureModeThreadLocal);
                all();
                wrong |= cudaStreamEndCapture(a, &graph) != cudaSuccess;
            }
            for (int run = 0; run < 200; run++) {
                cudaMemset(x, 0, 8);
                if (recorded) cudaGraphLaunch(graph, a);
                else all();
                cudaStreamSynchronize(a);
                wrong |= *y != 6;
            }
            check(wrong != kept,
                  recorded ? kept ? "recorded streams in order" : "recorded streams without their event: seen"
                  : kept   ? "streams in order"
                           : "streams without their event: seen");
            if (graph) cudaGraphDestroy(graph);
        }
    cudaGraph_t graph;
    cudaStreamBeginCapture(a, cudaStreamCaptureModeThreadLocal);
    cudaEventRecord(event, a);
    cudaStreamWaitEvent(b, event);
    (set_kernel)<<<1, 1, 0, b>>>(x, 5.0f);
    check(cudaStreamEndCapture(a, &graph) == cudaErrorStreamCaptureUnjoined,
          "a recorded stream that does not come back");
    cudaGraphDestroy(graph);
    cudaFree(x);
}

int main(void) {
    printf("\ninstructions\n");
    test_numbers();
    test_products();
    test_exchanges();
    test_copies();
    printf("\nfaults\n");
    check_order("neighbours, in order", neighbours_kernel<1, 1>, 128, 37, 1);
    check_order("without the barrier before the read: seen", neighbours_kernel<0, 1>, 128, 37, 0);
    check_order("without the barrier behind the read: seen", neighbours_kernel<1, 0>, 128, 37, 0);
    check_order("lanes, in order", lanes_kernel<1>, 32, 5, 1);
    check_order("without __syncwarp: seen", lanes_kernel<0>, 32, 5, 0);
    check_fault<DIVERGED>();
    check_fault<ENDED>();
    check_fault<LANES>();
    check_fault<MASK>();
    check_fault<GROUP>();
    check_fault<STATIC_END>();
    check_fault<DYNAMIC_END>();
    check_fault<PAST_MEMORY>();
    check_fault<PAST_BYTES>();
    check_fault<MISALIGNED>();
    check_fault<TOO_MUCH_SHARED>();
    check_fault<BOUNDS>();
    printf("\nlaunches and streams\n");
    test_limits();
    test_streams();
    printf("\n%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
