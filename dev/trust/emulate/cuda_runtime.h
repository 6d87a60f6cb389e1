// CUDA's runtime for machines without a GPU, as far as the twin uses it: numbers, the device's memory,
// streams, events, graphs, launches. What a stream is given waits until somebody asks for it; then what no
// event keeps apart goes in an order drawn by lot, each piece at once and whole.
#ifndef EMULATE_CUDA_RUNTIME_H
#define EMULATE_CUDA_RUNTIME_H
#define SESSA_EMULATED
#define __CUDA_ARCH__ 860
#define CUDART_VERSION 13000
#include <functional>
#include <map>
#include <math.h>
#include <memory>
#include <signal.h>
#include <tuple>
#include <unistd.h>
#include <utility>
#include "threads.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict

// ----------------------------------------------------------------------------
// numbers

struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __uint_as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
inline uint32_t __float_as_uint(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
inline float __int_as_float(int bits) { return __uint_as_float((uint32_t)bits); }
inline int __float_as_int(float x) { return (int)__float_as_uint(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz((unsigned)bits) : 32; }
namespace emulate {
// Names that the C library's headers have taken for functions of its own.
inline float fast_exp(float x) { return expf(x); }
inline float fast_log(float x) { return logf(x); }
inline float fast_log2(float x) { return log2f(x); }
inline int find_first(int bits) { return __builtin_ffs(bits); }
} // namespace emulate
#define __expf emulate::fast_exp
#define __logf emulate::fast_log
#define __log2f emulate::fast_log2
#define __ffs emulate::find_first
template <typename V> inline V __ldg(const V *at) { return *at; }
template <typename V> inline V __ldcs(const V *at) { return *at; }
template <typename V> inline V __ldcg(const V *at) { return *at; }
template <typename V> inline void __stcs(V *at, V value) { *at = value; }
template <typename V> inline void __stcg(V *at, V value) { *at = value; }

// ----------------------------------------------------------------------------
// errors

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDeviceFunction = 98,
    cudaErrorNotReady = 600,
    cudaErrorLaunchOutOfResources = 701,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureUnjoined = 904,
    cudaErrorStreamCaptureIsolation = 905,
    cudaErrorStreamCaptureImplicit = 906,
};
inline const char *cudaGetErrorString(cudaError_t code) {
    switch (code) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureUnjoined: return "capture was not joined to the originating stream";
    case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
    case cudaErrorStreamCaptureImplicit:
        return "operation would make the legacy stream depend on a capturing stream";
    }
    return "unknown error";
}
namespace emulate {
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t with(cudaError_t code) {
    if (code != cudaSuccess) last_error = code;
    return code;
}
} // namespace emulate
inline cudaError_t cudaGetLastError(void) {
    cudaError_t code = emulate::last_error;
    emulate::last_error = cudaSuccess;
    return code;
}
inline cudaError_t cudaPeekAtLastError(void) { return emulate::last_error; }

// ----------------------------------------------------------------------------
// streams: what they were given, and in which order it may go

namespace emulate {

struct Event;
struct Work {
    std::shared_ptr<std::function<void()>> run; // none: only its order counts
    std::vector<std::shared_ptr<Work>> after;   // what has to be done before
    int done;
    std::function<int()> there;                 // none: always; whether what another process sends has come
    Event *event;                               // of a recording: a launch of it records the event
};
typedef std::shared_ptr<Work> Piece;
struct Stream;
struct Graph {
    std::vector<Piece> pieces;
    std::vector<Stream *> streams; // that are being recorded, the first of them began it
};
struct Stream { Piece last; Graph *recorded; };
struct Event { Piece work; Graph *recorded; };

inline std::vector<Piece> pending;
inline Stream legacy;
inline std::vector<Stream *> streams(1, &legacy);
inline uint64_t n_launches;

inline Lots &host_lots(void) {
    static Lots lots;
    if (!lots.state) lots.begin(7, 7);
    return lots;
}

// Does a piece of what was given. Of what can be done the last given goes first for a while, or the first, or
// any: streams run far ahead of each other. 0: all that can be done waits for other processes.
inline int perform_one(void) {
    std::vector<size_t> able;
    int waits = 0;
    for (size_t i = 0; i < pending.size(); i++) {
        int can = 1;
        for (const Piece &before : pending[i]->after) can &= before->done;
        if (can && pending[i]->there && !pending[i]->there()) {
            waits = 1;
            continue;
        }
        if (can) able.push_back(i);
        if (can && !seed) break;
    }
    if (able.empty() && !waits) fault({"streams", 0}, "nothing of what was given can be done");
    if (able.empty()) return 0;
    Lots &lots = host_lots();
    static int favoured;
    if (seed && lots.below(16) == 0) favoured = (int)lots.below(3);
    size_t at = favoured == 0   ? able.front()
                : favoured == 1 ? able.back()
                                : able[lots.below((unsigned)able.size())];
    Piece piece = pending[at];
    pending.erase(pending.begin() + (long)at);
    if (piece->run) (*piece->run)();
    piece->done = 1;
    piece->after.clear();
    return 1;
}
// Until `wanted` is done; NULL: all of it.
inline void perform(const Piece &wanted) {
    while (wanted ? !wanted->done : !pending.empty())
        if (!perform_one()) usleep(100);
}

inline Stream *stream_of(Stream *stream) { return stream ? stream : &legacy; }
inline int recording(void) {
    for (Stream *stream : streams) if (stream->recorded) return 1;
    return 0;
}

inline void follow_piece(Stream *stream, Piece piece) {
    if (stream->last && (stream->recorded || !stream->last->done)) piece->after.push_back(stream->last);
    stream->last = piece;
    (stream->recorded ? stream->recorded->pieces : pending).push_back(piece);
}
inline Piece new_piece(std::shared_ptr<std::function<void()>> run) {
    Piece piece = std::make_shared<Work>();
    piece->run = run;
    piece->done = 0;
    piece->event = NULL;
    return piece;
}
// In the stream's order. Streams wait for the legacy one and it for them: what is given to that is done at
// once.
inline void submit(Stream *stream, std::function<void()> run) {
    stream = stream_of(stream);
    if (stream == &legacy) {
        perform(NULL);
        run();
        return;
    }
    follow_piece(stream, new_piece(std::make_shared<std::function<void()>>(std::move(run))));
}

} // namespace emulate

typedef emulate::Stream *cudaStream_t;
typedef emulate::Event *cudaEvent_t;
typedef emulate::Graph *cudaGraph_t, *cudaGraphExec_t;
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventDisableTiming = 2 };
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum { cudaGraphInstantiateFlagUseNodePriority = 8 };

inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int) {
    *stream = new emulate::Stream();
    emulate::streams.push_back(*stream);
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    return cudaStreamCreateWithPriority(stream, 0, 0);
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    stream = emulate::stream_of(stream);
    if (stream->recorded) return emulate::with(cudaErrorStreamCaptureUnsupported);
    if (stream == &emulate::legacy) emulate::perform(NULL);
    else if (stream->last) emulate::perform(stream->last);
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize(void) {
    if (emulate::recording()) return emulate::with(cudaErrorStreamCaptureUnsupported);
    emulate::perform(NULL);
    return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = new emulate::Event();
    return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = NULL) {
    stream = emulate::stream_of(stream);
    event->work = stream->last;
    event->recorded = stream->recorded;
    return cudaSuccess;
}
enum { cudaEventRecordDefault = 0, cudaEventRecordExternal = 1 };
// External: a part of the recording, which every launch of it does anew.
inline cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    if (flags != cudaEventRecordExternal) return cudaEventRecord(event, stream);
    if (!stream || !stream->recorded) return emulate::with(cudaErrorInvalidValue);
    emulate::Piece piece = emulate::new_piece(NULL);
    piece->event = event;
    emulate::follow_piece(stream, piece);
    return cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (event->recorded) return emulate::with(cudaErrorStreamCaptureUnsupported);
    if (!event->work || event->work->done) return cudaSuccess;
    if (!emulate::perform_one()) usleep(100);
    return event->work->done ? cudaSuccess : emulate::with(cudaErrorNotReady);
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (event->recorded) return emulate::with(cudaErrorStreamCaptureUnsupported);
    if (event->work) emulate::perform(event->work);
    return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned = 0) {
    stream = emulate::stream_of(stream);
    if (stream->recorded && !event->recorded && event->work)
        return emulate::with(cudaErrorStreamCaptureIsolation);
    if (!event->work) return cudaSuccess;
    if (event->recorded && !stream->recorded) { // the stream joins those that are being recorded
        stream->recorded = event->recorded;
        stream->last = NULL;
        event->recorded->streams.push_back(stream);
    }
    emulate::Piece piece = emulate::new_piece(NULL);
    if (stream->recorded || !event->work->done) piece->after.push_back(event->work);
    emulate::follow_piece(stream, piece);
    return cudaSuccess;
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
    *status = emulate::stream_of(stream)->recorded ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (!stream || stream->recorded) return emulate::with(cudaErrorStreamCaptureUnsupported);
    emulate::perform(NULL); // what came before is not the graph's
    stream->recorded = new emulate::Graph();
    stream->recorded->streams.push_back(stream);
    stream->last = NULL;
    emulate::follow_piece(stream, emulate::new_piece(NULL));
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    *graph = stream->recorded;
    std::vector<emulate::Work *> reached(1, stream->last.get());
    auto has = [&](emulate::Work *work) {
        for (emulate::Work *one : reached) if (one == work) return 1;
        return 0;
    };
    for (size_t i = 0; i < reached.size(); i++)
        for (const emulate::Piece &before : reached[i]->after)
            if (!has(before.get())) reached.push_back(before.get());
    int joined = 1;
    for (emulate::Stream *one : (*graph)->streams) {
        joined &= has(one->last.get());
        one->recorded = NULL;
        one->last = NULL;
    }
    return joined ? cudaSuccess : emulate::with(cudaErrorStreamCaptureUnjoined);
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long = 0) {
    *made = new emulate::Graph(*graph);
    return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    delete graph;
    return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    stream = emulate::stream_of(stream);
    if (stream->recorded) return emulate::with(cudaErrorStreamCaptureUnsupported);
    std::map<emulate::Work *, emulate::Piece> copies;
    emulate::Piece before = stream->last, end = emulate::new_piece(NULL);
    for (const emulate::Piece &piece : graph->pieces) {
        emulate::Piece copy = copies[piece.get()] = emulate::new_piece(piece->run);
        for (const emulate::Piece &one : piece->after) copy->after.push_back(copies[one.get()]);
        if (piece->after.empty() && before && !before->done) copy->after.push_back(before);
        if (piece->event) piece->event->work = copy;
        end->after.push_back(copy);
        emulate::pending.push_back(copy);
    }
    stream->last = NULL;
    emulate::follow_piece(stream, end);
    return cudaSuccess;
}

// ----------------------------------------------------------------------------
// the device and its memory
//
// Each allocation lies between two MiB that nobody may touch, close to the second, and begins with numbers
// that are none.

namespace emulate {

struct Allocation { char *pages; size_t bytes, all; };
inline std::map<char *, Allocation> allocations;
inline std::map<char *, size_t> locked; // the host's page-locked memory
inline size_t allocated;
inline const size_t device_bytes = (size_t)number_from("EMULATE_MEMORY", 16) << 30;

inline const char *fault_place(void) {
    return current && current->place.file ? current->place.file : "a kernel";
}
inline void memory_fault(int, siginfo_t *info, void *) {
    char text[400];
    int n = snprintf(text, sizeof(text), "%s:%d: ", fault_place(), current ? current->place.line : 0);
    if (current)
        n += snprintf(text + n, sizeof(text) - (size_t)n,
                      "behind here, thread %u,%u,%u of block %u,%u,%u reaches outside of all memory, at %p: ",
                      current->index.x, current->index.y, current->index.z, runner->block.x, runner->block.y,
                      runner->block.z, info->si_addr);
    n += snprintf(text + n, sizeof(text) - (size_t)n, "invalid address; gdb shows where\n");
    ssize_t written = write(2, text, (size_t)n);
    (void)written;
    signal(SIGSEGV, SIG_DFL); // again, without this
}
inline void watch_memory(void) {
#ifndef __SANITIZE_ADDRESS__
    static int watched;
    if (watched++) return;
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_sigaction = memory_fault;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, NULL);
#endif
}

} // namespace emulate

inline cudaError_t cudaMalloc(void **memory, size_t bytes) {
    size_t part = (bytes + 255) / 256 * 256, page = emulate::PAGE_BYTES, band = 1 << 20;
    size_t room = (part + page - 1) / page * page;
    emulate::watch_memory();
    *memory = NULL;
    if (bytes == 0) return cudaSuccess;
    if (bytes > emulate::device_bytes - emulate::allocated) return emulate::with(cudaErrorMemoryAllocation);
#ifdef __SANITIZE_ADDRESS__
    char *pages = (char *)aligned_alloc(256, part), *at = pages; // with the sanitizer's own bands around it
    __asan_poison_memory_region(at + bytes, part - bytes);
    emulate::fill_unset(at, bytes);
    room = part;
#else
    char *pages = (char *)mmap(NULL, room + 2 * band, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == (char *)MAP_FAILED) return emulate::with(cudaErrorMemoryAllocation);
    mprotect(pages, band, PROT_NONE);
    mprotect(pages + band + room, band, PROT_NONE);
    char *at = pages + band + room - part;
    emulate::fill_unset(at, part);
#endif
    emulate::allocations[at] = {pages, bytes, room + 2 * band};
    emulate::allocated += bytes;
    *memory = at;
    return cudaSuccess;
}
template <typename V> inline cudaError_t cudaMalloc(V **memory, size_t bytes) {
    return cudaMalloc((void **)memory, bytes);
}
inline cudaError_t cudaFree(void *memory) {
    if (!memory) return cudaSuccess;
    emulate::perform(NULL);
    auto found = emulate::allocations.find((char *)memory);
    if (found == emulate::allocations.end()) return emulate::with(cudaErrorInvalidValue);
    emulate::Allocation a = found->second;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(found->first, a.all);
    free(a.pages);
#else
    for (char *at = found->first + a.bytes; (uintptr_t)at % 256; at++)
        if ((unsigned char)*at != emulate::NAN_BYTE)
            emulate::fault({"cudaFree", 0}, "an allocation of %zu bytes was written to behind its end",
                           a.bytes);
    munmap(a.pages, a.all);
#endif
    emulate::allocations.erase(found);
    emulate::allocated -= a.bytes;
    return cudaSuccess;
}
inline cudaError_t cudaMallocHost(void **memory, size_t bytes) {
    *memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!*memory) return emulate::with(cudaErrorMemoryAllocation);
    emulate::fill_unset((char *)*memory, bytes);
    emulate::locked[(char *)*memory] = bytes;
    return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void *memory) {
    if (!memory) return cudaSuccess;
    emulate::perform(NULL);
    if (!emulate::locked.erase((char *)memory)) return emulate::with(cudaErrorInvalidValue);
    free(memory);
    return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t *present, size_t *all) {
    *all = emulate::device_bytes;
    *present = emulate::device_bytes - emulate::allocated;
    return cudaSuccess;
}

enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};

namespace emulate {
inline int inside(const std::map<char *, size_t> &list, const void *at, size_t bytes) {
    auto next = list.upper_bound((char *)(uintptr_t)at);
    return next != list.begin() &&
           (const char *)at + bytes <= std::prev(next)->first + std::prev(next)->second;
}
inline int on_device(const void *at, size_t bytes) {
    auto next = allocations.upper_bound((char *)(uintptr_t)at);
    return next != allocations.begin() &&
           (const char *)at + bytes <= std::prev(next)->first + std::prev(next)->second.bytes;
}
// Whether the ends of a copy lie where it says; the host's page-locked memory passes for the device's.
inline int ends_are(const void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    int to_device = on_device(to, bytes), from_device = on_device(from, bytes);
    if (!bytes || kind == cudaMemcpyDefault) return 1;
    if ((kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) && !to_device &&
        !inside(locked, to, bytes))
        return 0;
    if ((kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice) && !from_device &&
        !inside(locked, from, bytes))
        return 0;
    return 1;
}
} // namespace emulate

inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream = NULL) {
    using namespace emulate;
    if (!ends_are(to, from, bytes, kind)) return with(cudaErrorInvalidValue);
    int paged_to = kind == cudaMemcpyDeviceToHost && !inside(locked, to, bytes);
    int paged_from = kind == cudaMemcpyHostToDevice && !inside(locked, from, bytes);
    if ((paged_to || paged_from) && stream_of(stream)->recorded)
        return with(cudaErrorStreamCaptureUnsupported);
    if (paged_from) { // the host may write there again as soon as this returns
        std::vector<char> kept((const char *)from, (const char *)from + bytes);
        submit(stream, [=] { memcpy(to, kept.data(), bytes); });
    } else submit(stream, [=] { memmove(to, from, bytes); });
    return paged_to ? cudaStreamSynchronize(stream) : cudaSuccess;
}
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    if (emulate::recording()) return emulate::with(cudaErrorStreamCaptureImplicit);
    return cudaMemcpyAsync(to, from, bytes, kind, NULL);
}
inline cudaError_t cudaMemsetAsync(void *at, int value, size_t bytes, cudaStream_t stream = NULL) {
    if (bytes && !emulate::on_device(at, bytes)) return emulate::with(cudaErrorInvalidValue);
    emulate::submit(stream, [=] { memset(at, value, bytes); });
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void *at, int value, size_t bytes) {
    if (emulate::recording()) return emulate::with(cudaErrorStreamCaptureImplicit);
    return cudaMemsetAsync(at, value, bytes, NULL);
}

enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
inline cudaError_t cudaGetDeviceCount(int *count) {
    *count = (int)emulate::number_from("EMULATE_DEVICES", 1);
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    int count;
    cudaGetDeviceCount(&count);
    return device >= 0 && device < count ? cudaSuccess : emulate::with(cudaErrorInvalidValue);
}
inline cudaError_t cudaDeviceGetPCIBusId(char *name, int size, int device) {
    snprintf(name, (size_t)size, "0000:%02x:00.0", device);
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int) {
    switch (what) {
    case cudaDevAttrMaxThreadsPerBlock: *value = emulate::MOST_THREADS; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMultiProcessorCount: *value = (int)emulate::number_from("EMULATE_PROCESSORS", 6); break;
    case cudaDevAttrComputeCapabilityMajor: *value = 8; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 6; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)emulate::most_shared + 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)emulate::most_shared; break;
    }
    return cudaSuccess;
}

// ----------------------------------------------------------------------------
// launches

enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
struct cudaFuncAttributes { int maxThreadsPerBlock; size_t sharedSizeBytes; };
struct cudaLaunchAttributeValue {
    struct { unsigned x, y, z; } clusterDim;
    int programmaticStreamSerializationAllowed;
};
enum cudaLaunchAttributeID {
    cudaLaunchAttributeClusterDimension = 4,
    cudaLaunchAttributeProgrammaticStreamSerialization = 6
};
struct cudaLaunchAttribute { cudaLaunchAttributeID id; cudaLaunchAttributeValue val; };
struct cudaLaunchConfig_t {
    dim3 gridDim_, blockDim_;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};

namespace emulate {

// Bytes of dynamic shared memory that a kernel has asked to be allowed.
inline std::map<const void *, int> allowed_shared;

// A kernel's __launch_bounds__, looked at when its first thread begins.
inline void launch_bound(int threads, const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (runner->n_threads > threads)
        fault({file, line}, "a block of %d threads, for which the kernel says that it has %d at most",
              runner->n_threads, threads);
}

inline cudaError_t within_limits(const void *kernel, dim3 blocks, dim3 threads, size_t shared) {
    uint64_t all = (uint64_t)threads.x * threads.y * threads.z;
    if (!blocks.x || !blocks.y || !blocks.z || !all || blocks.x > 0x7FFFFFFF || blocks.y > 65535 ||
        blocks.z > 65535)
        return cudaErrorInvalidConfiguration;
    if (all > MOST_THREADS || threads.x > 1024 || threads.y > 1024 || threads.z > 64)
        return cudaErrorInvalidConfiguration;
    auto asked = allowed_shared.find(kernel);
    size_t most = asked == allowed_shared.end() ? 48 << 10 : (size_t)asked->second;
    return shared > (most > 48 << 10 ? most : 48 << 10) || shared > most_shared ? cudaErrorInvalidValue
                                                                                : cudaSuccess;
}

template <typename... P> struct Call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> arguments;
    static void thread(const void *self) { // each thread gets copies of the arguments, as there
        const Call *call = (const Call *)self;
        std::apply([call](const auto &...argument) { call->kernel(argument...); }, call->arguments);
    }
};

template <typename... P, typename... A> inline cudaError_t give(void (*kernel)(P...), dim3 blocks,
                                                                dim3 threads, size_t shared, Stream *stream,
                                                                A &&...arguments) {
    cudaError_t code = within_limits((const void *)kernel, blocks, threads, shared);
    if (code != cudaSuccess) return with(code);
    Call<P...> call = {kernel, {static_cast<P>(std::forward<A>(arguments))...}};
    submit(stream, [=] {
        Grid grid = {blocks, threads, shared, ++n_launches, Call<P...>::thread, &call};
        run_grid(&grid);
    });
    return cudaSuccess;
}

// kernel<<<...>>>(...), as prepare.py writes it: launch(kernel, ...)(...)
template <typename... P> struct Launch {
    void (*kernel)(P...);
    dim3 blocks, threads;
    size_t shared;
    Stream *stream;
    template <typename... A> void operator()(A &&...arguments) const {
        give(kernel, blocks, threads, shared, stream, std::forward<A>(arguments)...);
    }
};
template <typename... P> inline Launch<P...> launch(void (*kernel)(P...), dim3 blocks, dim3 threads,
                                                    size_t shared = 0, Stream *stream = NULL) {
    return {kernel, blocks, threads, shared, stream};
}

} // namespace emulate

template <typename... P, typename... A>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *c, void (*kernel)(P...), A &&...arguments) {
    return emulate::give(kernel, c->gridDim_, c->blockDim_, c->dynamicSmemBytes, c->stream,
                         std::forward<A>(arguments)...);
}
template <typename K> inline cudaError_t cudaFuncSetAttribute(K *kernel, cudaFuncAttribute what, int value) {
    if (what != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || (size_t)value > emulate::most_shared) return emulate::with(cudaErrorInvalidValue);
    emulate::allowed_shared[(const void *)kernel] = value;
    return cudaSuccess;
}
template <typename K> inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *found, K *) {
    *found = {emulate::MOST_THREADS, 0};
    return cudaSuccess;
}
template <typename K>
inline cudaError_t cudaOccupancyMaxActiveClusters(int *most, K *, const cudaLaunchConfig_t *) {
    *most = 0; // clusters are Hopper's
    return cudaSuccess;
}
inline cudaError_t cudaFuncSetCacheConfig(const void *, int) { return cudaSuccess; }

#include "instructions.h"
#endif
