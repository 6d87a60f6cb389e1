// The schedule: launches that begin ahead of the one before's end, what goes beside what, and recordings.
// Nothing here changes a number. Plain passes use none of it: one launch behind the other, in one stream.

// ----------------------------------------------------------------------------
// launches ahead

// Starts a kernel, each `cluster` of whose blocks may reach each other's shared memory (0: none do). ahead:
// on Hopper it starts while the one before still works, makes ready what does not depend on it, and waits
// for its results. Every kernel has to: who comes next waits for this one alone.
static cudaLaunchConfig_t launch_config(cudaLaunchAttribute attributes[2], dim3 blocks, dim3 threads,
                                        size_t shared, cudaStream_t stream, int cluster, int ahead) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = ahead;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {(unsigned)cluster, 1, 1};
    return {blocks, threads, shared, stream, attributes, plain || !gpu.hopper ? 0u : cluster ? 2u : 1u};
}
template <typename... P, typename... A>
static cudaError_t launch(void (*kernel)(P...), dim3 blocks, dim3 threads, size_t shared, cudaStream_t stream,
                          int cluster, int ahead, A &&...arguments) {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = launch_config(attributes, blocks, threads, shared, stream, cluster, ahead);
    return cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...);
}
#define LAUNCH_AS(cluster, ahead, kernel, blocks, threads, shared, stream, ...) \
    cuda_check(launch(kernel, blocks, threads, shared, stream, cluster, ahead, __VA_ARGS__), #kernel, \
               __LINE__)
#define LAUNCH(...) LAUNCH_AS(0, 1, __VA_ARGS__)

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#define HOPPER
#endif
// What every kernel begins with. crowd: the next one's blocks may come in, and wait, once all of this one
// have begun; not where it leaves multiprocessors to another stream.
__device__ static inline void wait_for_results(int crowd = 1) {
#ifdef HOPPER
    if (crowd) asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

// ----------------------------------------------------------------------------
// what goes beside what
//
// A branch leaves gpu.stream where beside() gives the stream for it, and is back where join() says so.
//
//     DIRECT_READ       RoPE, attention and W_o, beside the feedback's weights and inverses, until the solve
//                       reads f
//     W_O_GRADIENT      a product, beside attention's way back in the ring (two kernels need the
//                       multiprocessors), until its inputs are overwritten
//     W_OUT_GRADIENT    a product, beside the solve's way back, which leaves multiprocessors free, until its
//                       inputs are overwritten
//     W_IN_GRADIENT     a product, beside what comes for the layers below, until the pass ends
//     LATE_UPDATE       AdamW of all layers but the early ones, beside the next forward pass through these

static int branched[N_BRANCHES];

static cudaStream_t stream_of(Branch branch) { return branch == LATE_UPDATE ? gpu.late : gpu.side; }

// What `stream` is given from here on waits for all that `other` was given so far.
static void follow(cudaStream_t stream, cudaStream_t other) {
    static cudaEvent_t so_far;
    if (!so_far) CUDA(cudaEventCreateWithFlags(&so_far, cudaEventDisableTiming));
    CUDA(cudaEventRecord(so_far, other));
    CUDA(cudaStreamWaitEvent(stream, so_far, 0));
}
// The stream for a branch that needs all that gpu.stream was given so far. worthwhile 0: it goes with the
// others.
static cudaStream_t beside(Branch branch, int worthwhile = 1) {
    if (plain || !worthwhile) return gpu.stream;
    follow(stream_of(branch), gpu.stream);
    branched[branch] = 1;
    return stream_of(branch);
}
static void join(Branch branch) {
    if (branched[branch]) follow(gpu.stream, stream_of(branch));
    branched[branch] = 0;
}

// So many layers are updated before the next forward pass begins, the others while it goes through these.
static int early_layers(const Config *c) { return min_int((c->n_layers + 7) / 8, c->n_layers - 1); }

// ----------------------------------------------------------------------------
// recordings: the launches of one pass over a batch shape are a CUDA graph, and cost the host one launch

typedef struct {
    struct { int64_t pass, B, T, P; double dropout; } shape;
    int runs;
    cudaGraphExec_t graph;
} Recording;
enum { N_RECORDINGS = 12 };
typedef struct { Recording list[N_RECORDINGS]; int oldest; } Recordings;

// The launches of f, which reads nothing but the device's memory. The first time for a shape they are made
// one by one (products ask for their algorithm then), the second time recorded, from then on replayed.
template <typename M, typename F> static void replay(M *m, Pass pass, int B, int T, double dropout, F f) {
    if (plain) return f();
    Recording what = {{pass, B, T, m->host.P, dropout}, 0, NULL}, *r = NULL;
    Recordings *all = &m->recordings;
    for (int i = 0; i < N_RECORDINGS && !r; i++) {
        Recording *one = &all->list[i];
        if (one->runs && !memcmp(&one->shape, &what.shape, sizeof(what.shape))) r = one;
    }
    if (!r) {
        r = &all->list[all->oldest];
        all->oldest = (all->oldest + 1) % N_RECORDINGS;
        if (r->graph) CUDA(cudaGraphExecDestroy(r->graph));
        *r = what;
    }
    if (!r->runs++) return f();
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
static void forget_recordings(Recordings *all) {
    for (int i = 0; i < N_RECORDINGS; i++)
        if (all->list[i].graph) cudaGraphExecDestroy(all->list[i].graph);
}

// gpu.tiles, gpu.hopper and gpu.clusters: behind the kernels that it asks about
static void tiles_open(int major);
