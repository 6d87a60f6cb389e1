/*
The test of the CUDA twin, kernel by kernel: its layers against the C functions on the same numbers, its
passes and updates, its training against the CPU's, its decoder.

    ./test_kernels
    ./test_kernels layers               layers alone: enough for a GPU that is emulated
    ./test_kernels tiles            only attention and feedback in bf16, in shapes that have kernels of their own
    ./test_kernels tiles SEED COUNT     only attention and feedback in bf16: COUNT shapes that take tiles
*/
#define SESSA_NO_MAIN
#define GUARD_BANDS
#include "../../train_sessa.cu"
#include "check.h"

// ----------------------------------------------------------------------------
// the device's memory

static struct { void *at; size_t bytes; } gpu_lent[4096];
static int n_gpu_lent;

// Device memory of a test, a guard band behind each piece.
template <typename Y> static Y *gpu_lend(int64_t n) {
    size_t bytes = (size_t)n * sizeof(Y);
    char *memory;
    CUDA(cudaMalloc((void **)&memory, bytes + GUARD));
    guard(memory + bytes, memory + bytes + GUARD, "buffer lent to a test", n_gpu_lent);
    gpu_lent[n_gpu_lent++] = {memory, bytes + GUARD};
    return (Y *)memory;
}

// The end of a test: frees all that was lent there and here, and looks at the bands.
static void gpu_release(void) {
    CUDA(cudaStreamSynchronize(gpu.stream));
    while (n_gpu_lent) {
        n_gpu_lent--;
        unguard(gpu_lent[n_gpu_lent].at, gpu_lent[n_gpu_lent].bytes);
        CUDA(cudaFree(gpu_lent[n_gpu_lent].at));
    }
    release();
}

static float value_of(float x) { return x; }
static float value_of(bf16 x) { return __bfloat162float(x); }
static void set_value(float *x, float value) { *x = value; }
static void set_value(bf16 *x, float value) { *x = __float2bfloat16(value); }

// A copy; what the host and the device both read is rounded to X on either side.
template <typename X> static X *on_gpu(real *host, int64_t n) {
    X *device = gpu_lend<X>(n), *numbers = (X *)malloc((size_t)(n + 1) * sizeof(X));
    for (int64_t i = 0; i < n; i++) {
        set_value(&numbers[i], host[i]);
        host[i] = value_of(numbers[i]);
    }
    CUDA(cudaMemcpy(device, numbers, (size_t)n * sizeof(X), cudaMemcpyHostToDevice));
    free(numbers);
    return device;
}

// Outputs start as NaN there as well.
template <typename X> static X *gpu_poison(int64_t n) { return on_gpu<X>(poison(n), n); }

static int *ids_on_gpu(const int *ids, int64_t n) {
    int *device = gpu_lend<int>(n);
    CUDA(cudaMemcpy(device, ids, (size_t)n * sizeof(int), cudaMemcpyHostToDevice));
    return device;
}

static Scratch scratch_on_gpu(int64_t n) { return {gpu_poison<float>(n), n}; }

// rows_error of what lies on the device.
template <typename X>
static double gpu_error(const X *device, const real *ref, int64_t rows, int width, int ld, double floor) {
    int64_t n = rows * ld;
    X *numbers = (X *)lend((size_t)n * sizeof(X));
    real *x = (real *)lend((size_t)n * sizeof(real));
    precise *wanted = zeros(n);
    CUDA(cudaStreamSynchronize(gpu.stream));
    CUDA(cudaMemcpy(numbers, device, (size_t)n * sizeof(X), cudaMemcpyDeviceToHost));
    for (int64_t i = 0; i < n; i++) {
        x[i] = value_of(numbers[i]);
        wanted[i] = (double)ref[i];
    }
    return rows_error(x, wanted, rows, width, ld, floor);
}

// dout's rows summed: what a pass of the GPU gives as the gradient of the bias before it.
static void add_rows(real *sum, const real *dout, int N, int width, int ld) {
    for (int n = 0; n < N; n++)
        for (int i = 0; i < width; i++) sum[i] += dout[n * ld + i];
}

// Dropout's mask at a place, its key where the kernels read it.
static Mask mask_on_gpu(Dropout drop, int place) {
    Draw draw = draw_of(drop), *device = gpu_lend<Draw>(1);
    CUDA(cudaMemcpy(device, &draw, sizeof(draw), cudaMemcpyHostToDevice));
    return mask_of(device, drop.probability, place);
}

// ----------------------------------------------------------------------------
// layers against the C functions

// Those whose largest errors are kept.
enum {
    EMBEDDING,
    LAYERNORM,
    LINEAR,
    GELU,
    ROPE,
    GAIN,
    GATE,
    RESIDUAL,
    CROSSENTROPY,
    SUMS,
    CONVOLUTION,
    STEP,
    SCAN_F,
    SCAN_B,
    GATED_NORM,
    ATTENTION_F,
    ATTENTION_B,
    FEEDBACK_F,
    FEEDBACK_B,
    N_GPU_LAYERS
};
static const char *const layer_names[N_GPU_LAYERS] = {
    "embedding",
    "layernorm",
    "linear",
    "gelu",
    "rope",
    "gain",
    "gate",
    "residual",
    "crossentropy",
    "sums over rows",
    "convolution",
    "step",
    "scan",
    "scan, backward",
    "gated norm",
    "attention",
    "attention, backward",
    "feedback",
    "feedback, backward",
};

// Sums over rows, for a pass or two of up to `width` columns.
static ColumnSums sums_on_gpu(int B, int T, int width) {
    int64_t numbers = 8 * ((int64_t)BLOCKS_AT_ONCE * GROUP_COLUMNS + width) + 2 * tile_sums_room(width, B, T);
    float *room = gpu_poison<float>(numbers);
    return {{}, 0, 1, room, room, room + numbers};
}

// The feedback's memory for a way, with bands between its parts.
typedef struct { Panels p; Scratch weights, scratch; } Feedback;
static cudaEvent_t lists_gone; // the embedding's, to the device

template <typename X> static Feedback feedback_on_gpu(int B, int T, int D, int P, int in_eights, int keep) {
    Feedback f = {feedback_panels<X>(B, T, D, P, in_eights, keep), {NULL, 0}, {NULL, 0}};
    const Panels *p = &f.p;
    int64_t next[N_PARTS] = {p->inverse, p->weights, p->block, p->lambda,  p->merge,
                             p->dk,      p->partial, p->flags, p->product, p->total};
    static const char *const names[N_PARTS] = {"e",     "M",  "rhs",     "block", "lambda",
                                               "merge", "dk", "partial", "flags", "product"};
    f.weights = scratch_on_gpu(p->weights);
    f.scratch = scratch_on_gpu(p->total);
    for (int i = 0; i < N_PARTS && !plain; i++) {
        float *at = i < 2 ? f.weights.at : f.scratch.at;
        guard(at + p->ends[i], at + next[i], names[i], -1);
    }
    return f;
}

// Attention and feedback of a shape, on the GPU and in C on the same numbers, rounded to X already.
template <typename X> struct Mixers {
    double *worst;
    cudaStream_t st;
    int B, T, H, G, d, D, ld, N;
    int64_t size, wide_size;
    const real *x, *w, *y; // queries and keys in rows ld apart; what feedback reads
    real *dout;
    X *x_d, *w_d, *dout_d;
    double floor;
    int P, keep; // of the feedback: the height of panels, -1: a random one; whether weights are kept
    real *gamma, *f;
    float *gamma_d;
    X *f_d;

    void attention();
    void attention_beside();
    void feedback();
    void feedback_beside();
};

// From position 0, and with the positions before `first` known.
template <typename X> void Mixers<X>::attention() {
    int first = random_int(0, T - 1), late = B * (T - first);
    real *v = noise(wide_size, 1), *o = poison(size), *stats = poison(2 * (int64_t)N * H);
    real *scratch = scratch_for(T), *dq = poison(wide_size), *dk = poison(wide_size), *dv = poison(wide_size);
    X *v_d = on_gpu<X>(v, wide_size), *o_d = gpu_poison<X>(size), *dq_d = gpu_poison<X>(wide_size);
    X *dk_d = gpu_poison<X>(wide_size), *dv_d = gpu_poison<X>(wide_size);
    float *stats_d = gpu_poison<float>(2 * (int64_t)N * H);
    AttentionWay way = attention_way<X>(B, T, H, G, d, ld, 0);
    Scratch scratch_d = scratch_on_gpu(way.scratch);
    attention_forward(o, stats, work_with(scratch, 0), x, w, v, shape_of(B, T, first, H, G, d, ld));
    attention_forward_gpu(o_d, stats_d, scratch_d, x_d, w_d, v_d, shape_of(B, T, first, H, G, d, ld), &way,
                          st);
    worst_of(&worst[ATTENTION_F], gpu_error(o_d, o, late, D, D, 0));
    attention_forward(o, stats, work_with(scratch, 0), x, w, v, shape_of(B, T, 0, H, G, d, ld));
    attention_forward_gpu(o_d, stats_d, scratch_d, x_d, w_d, v_d, shape_of(B, T, 0, H, G, d, ld), &way, st);
    worst_of(&worst[ATTENTION_F], gpu_error(o_d, o, N, D, D, 0));
    attention_backward(dq, dk, dv, work_with(scratch, 0), dout, stats, x, w, v,
                       shape_of(B, T, 0, H, G, d, ld));
    attention_backward_gpu(dq_d, dk_d, dv_d, (float *)NULL, scratch_d, dout_d, (const X *)o_d, stats_d, x_d,
                           w_d, v_d, shape_of(B, T, 0, H, G, d, ld), &way, {}, (ColumnSums *)NULL, st);
    worst_of(&worst[ATTENTION_B], gpu_error(dq_d, dq, N, D, ld, floor));
    worst_of(&worst[ATTENTION_B], gpu_error(dk_d, dk, N, G * d, ld, floor));
    worst_of(&worst[ATTENTION_B], gpu_error(dv_d, dv, N, G * d, ld, floor));
}

// q, k and v beside each other, on through RoPE, and their sums.
template <typename X> void Mixers<X>::attention_beside() {
    uint64_t before = chance; // the tests behind this one see the numbers that they always saw
    int E = (H + 2 * G) * d;
    int64_t wide_E = (int64_t)N * E, pairs = (int64_t)T * (d / 2);
    real *proj = noise(wide_E, 1), *dproj = poison(wide_E), *dbias = noise(E, 1), *cosine = poison(pairs);
    real *sine = poison(pairs), *o = poison(size), *stats = poison(2 * (int64_t)N * H);
    real *scratch = scratch_for(T);
    rope_table(cosine, sine, T, d);
    X *proj_d = on_gpu<X>(proj, wide_E), *dproj_d = gpu_poison<X>(wide_E), *o_d = gpu_poison<X>(size);
    float *stats_d = gpu_poison<float>(2 * (int64_t)N * H);
    float *dbias_d = on_gpu<float>(dbias, E), *cosine_d = on_gpu<float>(cosine, pairs);
    float *sine_d = on_gpu<float>(sine, pairs);
    ColumnSums sums = sums_on_gpu(B, T, E);
    AttentionWay way = attention_way<X>(B, T, H, G, d, E, 0);
    Scratch scratch_d = scratch_on_gpu(way.scratch);
    attention_forward(o, stats, work_with(scratch, 0), proj, proj + D, proj + D + G * d,
                      shape_of(B, T, 0, H, G, d, E));
    attention_forward_gpu(o_d, stats_d, scratch_d, proj_d, proj_d + D, proj_d + D + G * d, shape_of(B, T, 0,
        H, G, d, E), &way, st);
    attention_backward(dproj, dproj + D, dproj + D + G * d, work_with(scratch, 0), dout, stats, proj,
                       proj + D, proj + D + G * d, shape_of(B, T, 0, H, G, d, E));
    rope_backward(dproj, E, cosine, sine, N, T, H + G, d);
    add_rows(dbias, dproj, N, E, E);
    attention_backward_gpu(dproj_d, dproj_d + D, dproj_d + D + G * d, dbias_d, scratch_d, dout_d,
                           (const X *)o_d, stats_d, proj_d, proj_d + D, proj_d + D + G * d, shape_of(B, T,
                               0, H, G, d, E), &way, {cosine_d, sine_d, T, d / 2, 0, -1}, &sums, st);
    column_sums_gpu(&sums, st);
    chance = before;
    worst_of(&worst[ATTENTION_B], gpu_error(dproj_d, dproj, N, E, E, floor));
    // of N numbers about 1, each rounded
    worst_of(&worst[SUMS], gpu_error(dbias_d, dbias, 1, E, E, sqrt((double)wide_E)));
}

// From position 0, and of one sequence with the rows before `first` given.
template <typename X> void Mixers<X>::feedback() {
    int first = random_int(0, T - 1);
    if (P < 0) P = panel_heights[random_int(0, N_HEIGHTS - 1)];
    gamma = noise(N, 1);
    f = copy_of(y, size);
    real *s = poison(size), *late = noise(size, 1), *stats = poison(2 * N), *scratch = scratch_for(T);
    real *df = poison(size), *dq = poison(wide_size), *dk = poison(wide_size), *dgamma = poison(N);
    for (int n = 0; n < N; n++) gamma[n] = (real)(0.999 * tanh((double)gamma[n]));
    keep = T % 2;
    Feedback m = feedback_on_gpu<X>(B, T, D, P, ld % 8 == 0 && first % 8 == 0, keep);
    gamma_d = on_gpu<float>(gamma, N);
    f_d = on_gpu<X>(f, size);
    float *stats_d = gpu_poison<float>(2 * N), *dgamma_d = gpu_poison<float>(N);
    X *s_d = gpu_poison<X>(size), *late_d = on_gpu<X>(late, size), *df_d = gpu_poison<X>(size);
    X *dq_d = gpu_poison<X>(wide_size), *dk_d = gpu_poison<X>(wide_size), *c_d = gpu_poison<X>(size);
    if (B == 1) {
        feedback_forward(late, stats, work_with(scratch, 0), f, x, w, gamma,
                         shape_of(B, T, first, 1, 1, D, ld));
        feedback_forward_gpu(late_d, (X *)NULL, stats_d, m.weights, m.scratch, f_d, x_d, w_d, gamma_d,
                             shape_of(B, T, first, 1, 1, D, ld), &m.p, st);
        worst_of(&worst[FEEDBACK_F], gpu_error(late_d, late, N, D, D, 0));
    }
    feedback_forward(s, stats, work_with(scratch, 0), f, x, w, gamma, shape_of(B, T, 0, 1, 1, D, ld));
    m = feedback_on_gpu<X>(B, T, D, P, ld % 8 == 0, keep);
    feedback_forward_gpu(s_d, c_d, stats_d, m.weights, m.scratch, f_d, x_d, w_d, gamma_d, shape_of(B, T, 0,
        1, 1, D, ld), &m.p, st);
    worst_of(&worst[FEEDBACK_F], gpu_error(s_d, s, N, D, D, 0));
    memcpy(df, dout, sizeof(real) * (size_t)(B * T * D));
    feedback_backward(df, dq, dk, dgamma, work_with(scratch, 0), s, stats, x, w, gamma,
                      shape_of(B, T, 0, 1, 1, D, ld));
    feedback_backward_gpu(df_d, dq_d, dk_d, dgamma_d, (float *)NULL, m.weights, m.scratch, dout_d, s_d,
                          c_d, stats_d, x_d, w_d, gamma_d, shape_of(B, T, 0, 1, 1, D, ld), &m.p,
                              (ColumnSums *)NULL, st);
    worst_of(&worst[FEEDBACK_B], gpu_error(df_d, df, N, D, D, 0));
    worst_of(&worst[FEEDBACK_B], gpu_error(dq_d, dq, N, D, ld, floor));
    worst_of(&worst[FEEDBACK_B], gpu_error(dk_d, dk, N, D, ld, floor));
    worst_of(&worst[FEEDBACK_B], gpu_error(dgamma_d, dgamma, 1, N, N, floor));
}

// q and k beside each other, and their gradients' sums, with the gains of feedback().
template <typename X> void Mixers<X>::feedback_beside() {
    uint64_t before = chance;
    int64_t wide_2D = 2 * size;
    real *s = poison(size), *stats = poison(2 * N), *scratch = scratch_for(T), *df = poison(size);
    real *dgamma = poison(N);
    X *s_d = gpu_poison<X>(size), *c_d = gpu_poison<X>(size), *df_d = gpu_poison<X>(size);
    float *stats_d = gpu_poison<float>(2 * N), *dgamma_d = gpu_poison<float>(N);
    real *proj = noise(wide_2D, 1), *dproj = poison(wide_2D), *dbias = noise(2 * D, 1);
    X *proj_d = on_gpu<X>(proj, wide_2D), *dproj_d = gpu_poison<X>(wide_2D);
    float *dbias_d = on_gpu<float>(dbias, 2 * D);
    ColumnSums sums = sums_on_gpu(B, T, 2 * D);
    feedback_forward(s, stats, work_with(scratch, 0), f, proj, proj + D, gamma,
                     shape_of(B, T, 0, 1, 1, D, 2 * D));
    Feedback m = feedback_on_gpu<X>(B, T, D, P, 2 * D % 8 == 0, keep);
    feedback_forward_gpu(s_d, c_d, stats_d, m.weights, m.scratch, f_d, proj_d, proj_d + D, gamma_d,
                         shape_of(B, T, 0, 1, 1, D, 2 * D), &m.p, st);
    memcpy(df, dout, sizeof(real) * (size_t)(B * T * D));
    feedback_backward(df, dproj, dproj + D, dgamma, work_with(scratch, 0), s, stats, proj, proj + D,
                      gamma, shape_of(B, T, 0, 1, 1, D, 2 * D));
    add_rows(dbias, dproj, N, 2 * D, 2 * D);
    feedback_backward_gpu(df_d, dproj_d, dproj_d + D, dgamma_d, dbias_d, m.weights, m.scratch, dout_d,
                          s_d, c_d, stats_d, proj_d, proj_d + D, gamma_d, shape_of(B, T, 0, 1, 1, D, 2 * D),
                              &m.p, &sums,
                          st);
    column_sums_gpu(&sums, st);
    chance = before;
    worst_of(&worst[FEEDBACK_B], gpu_error(dproj_d, dproj, N, 2 * D, 2 * D, floor));
    Feedback other = feedback_on_gpu<X>(B, T, D, P, 2 * D % 8 == 0, !keep);
    if (m.p.R >= T && other.p.R >= T) { // weights kept or computed again: the same bits
        X *other_d = gpu_poison<X>(wide_2D), *parts[] = {dproj_d, other_d};
        real *numbers[2];
        feedback_forward_gpu(s_d, c_d, stats_d, other.weights, other.scratch, f_d, proj_d, proj_d + D,
                             gamma_d, shape_of(B, T, 0, 1, 1, D, 2 * D), &other.p, st);
        feedback_backward_gpu(df_d, other_d, other_d + D, dgamma_d, (float *)NULL, other.weights,
                              other.scratch, dout_d, s_d, c_d, stats_d, proj_d, proj_d + D, gamma_d,
                                  shape_of(B, T, 0, 1, 1, D, 2 * D), &other.p, (ColumnSums *)NULL, st);
        CUDA(cudaStreamSynchronize(st));
        size_t bytes = sizeof(X) * (size_t)wide_2D;
        for (int i = 0; i < 2; i++)
            CUDA(cudaMemcpy(numbers[i] = poison(wide_2D), parts[i], bytes, cudaMemcpyDeviceToHost));
        worst_of(&worst[FEEDBACK_B], memcmp(numbers[0], numbers[1], bytes) ? 1 : 0);
    }
    worst_of(&worst[SUMS], gpu_error(dbias_d, dbias, 1, 2 * D, 2 * D, sqrt((double)wide_2D)));
}

// P: of the feedback's panels, -1 for a random one.
template <typename X>
static void compare_mixers(double *worst, const real *x, const real *w, const real *y, real *dout, int B,
                           int T, int H, int G, int d, int ld, int P) {
    Mixers<X> c;
    c.worst = worst;
    c.st = gpu.stream;
    c.B = B;
    c.T = T;
    c.H = H;
    c.G = G;
    c.d = d;
    c.D = H * d;
    c.ld = ld;
    c.N = B * T;
    c.size = (int64_t)c.N * c.D;
    c.wide_size = (int64_t)c.N * ld;
    c.x = x;
    c.w = w;
    c.y = y;
    c.dout = dout;
    c.x_d = on_gpu<X>(copy_of(x, c.wide_size), c.wide_size);
    c.w_d = on_gpu<X>(copy_of(w, c.wide_size), c.wide_size);
    c.dout_d = on_gpu<X>(dout, c.size);
    // at T 2 and 3 the gradients of q and k are differences that nearly cancel: in bf16 the floor is what
    // does not
    c.floor = (sizeof(X) == sizeof(bf16) ? 0.3 : 0.1) * sqrt((double)c.size);
    c.P = P;
    c.attention();
    c.attention_beside();
    c.feedback();
    c.feedback_beside();
}

// A random shape, what its layers read, the same rounded to X on the device, and each layer's largest error
// so far. `even` shapes take the paths in eights and tiles.
template <typename X> struct Layers {
    double *worst;
    cudaStream_t st;
    int even, B, T, H, G, d, D, ld, N, V, out;
    int64_t size, wide_size;
    real *x, *w, *g;                    // (N,D) in rows ld apart
    real *y, *dout;                     // (N,D)
    real *weight, *bias, *rows, *wte;   // (D), (D), (N), (V,D)
    int *ids, *targets;
    X *x_d, *w_d, *y_d, *dout_d, *g_d;
    float *weight_d, *bias_d, *rows_d, *wte_d, *dout_f;
    double floor;
    Dropout drop;
    ColumnSums sums;

    void draw(int even, int T);
    void embedding();
    void layernorm();
    void layernorm_back();
    void linear();
    void gelu();
    void gate();
    void rope();
    void crossentropy();
    void scan(int eights);
    void gated_norm();
};

template <typename X> void Layers<X>::draw(int even_, int T_) {
    even = even_;
    T = T_;
    st = gpu.stream;
    B = random_int(1, 3);
    G = random_int(1, 2);
    H = G * random_int(1, 3);
    d = even ? 8 * random_int(1, 9) : 2 * random_int(1, 9);
    D = H * d;
    ld = even ? D + 8 * random_int(0, 2) : D + random_int(0, 3);
    N = B * T;
    V = random_int(2, 70);
    out = even ? 8 * random_int(1, 6) : random_int(1, 50);
    size = (int64_t)N * D;
    wide_size = (int64_t)N * ld;
    x = noise(wide_size, 1);
    w = noise(wide_size, 1);
    y = noise(size, 1);
    dout = noise(size, 1);
    g = noise(wide_size, 1);
    weight = noise(D, 1);
    bias = noise(D, 1);
    rows = noise(N, 1);
    wte = noise((int64_t)V * D, 1);
    ids = random_ids(N, V, 0);
    targets = random_ids(N, V, 1);
    x_d = on_gpu<X>(x, wide_size);
    w_d = on_gpu<X>(w, wide_size);
    y_d = on_gpu<X>(y, size);
    dout_d = on_gpu<X>(dout, size);
    g_d = on_gpu<X>(g, wide_size);
    weight_d = on_gpu<float>(weight, D);
    bias_d = on_gpu<float>(bias, D);
    rows_d = on_gpu<float>(rows, N);
    wte_d = on_gpu<float>(wte, (int64_t)V * D);
    dout_f = on_gpu<float>(dout, size);
    floor = 0.1 * sqrt((double)size);
    drop = {random_int(0, 1) ? 0.3 : 0, 11, 5, (uint64_t)random_int(0, 1) << 33};
    sums = sums_on_gpu(B, T, 3 * ld);
}

// The embedding, with dropout.
template <typename X> void Layers<X>::embedding() {
    real *o = poison(size), *dwte = noise((int64_t)V * D, 1);
    float *o_d = gpu_poison<float>(size), *dwte_d = on_gpu<float>(dwte, (int64_t)V * D);
    Scratch partial = scratch_on_gpu(embedding_scratch(N, V, D));
    int lists = 4 * N + 2, *host_lists = (int *)lend(sizeof(int) * (size_t)lists);
    int *starts = (int *)lend(sizeof(int) * (size_t)(V + 1)), *lists_d = ids_on_gpu(host_lists, lists);
    Tokens tokens = {ids_on_gpu(ids, N), ids, N, V, lists_d, host_lists, starts, lists_gone};
    embedding_forward(o, ids, wte, B, T, D);
    dropout(o, size, drop, 4);
    embedding_dropout_forward_gpu(o_d, ids_on_gpu(ids, N), wte_d, mask_on_gpu(drop, 4), B, T, D, st);
    worst_of(&worst[EMBEDDING], gpu_error(o_d, o, 1, (int)size, (int)size, 0));
    embedding_backward(dwte, dout, ids, B, T, D);
    embedding_backward_gpu(dwte_d, partial, dout_f, tokens, D, st);
    worst_of(&worst[EMBEDDING], gpu_error(dwte_d, dwte, V, D, D, 0));
}

// The residual with dropout, then LayerNorm.
template <typename X> void Layers<X>::layernorm() {
    real *o = poison(size), *mean = poison(N), *rstd = poison(N), *stream_ = noise(size, 1);
    real *added = copy_of(y, size);
    X *o_d = gpu_poison<X>(size), *kept = gpu_poison<X>(size);
    float *mean_d = gpu_poison<float>(N), *rstd_d = gpu_poison<float>(N);
    float *stream_d = on_gpu<float>(stream_, size);
    Mask mask = mask_on_gpu(drop, 3);
    layernorm_forward(o, mean, rstd, stream_, weight, bias, N, D);
    residual_layernorm_forward_gpu(o_d, (X *)NULL, mean_d, rstd_d, stream_d, (const X *)NULL, mask, weight_d,
                                   bias_d, N, D, st);
    worst_of(&worst[LAYERNORM], gpu_error(o_d, o, N, D, D, 0));
    dropout(added, size, drop, 3);
    residual_forward(stream_, stream_, added, size);
    layernorm_forward(o, mean, rstd, stream_, weight, bias, N, D);
    residual_layernorm_forward_gpu(o_d, kept, mean_d, rstd_d, stream_d, y_d, mask, weight_d, bias_d, N, D,
                                   st);
    worst_of(&worst[RESIDUAL], gpu_error(stream_d, stream_, N, D, D, 0));
    worst_of(&worst[RESIDUAL], gpu_error(kept, stream_, N, D, D, 0));
    worst_of(&worst[LAYERNORM], gpu_error(o_d, o, N, D, D, 0));
    worst_of(&worst[LAYERNORM], gpu_error(mean_d, mean, 1, N, N, sqrt((double)N)));
    worst_of(&worst[LAYERNORM], gpu_error(rstd_d, rstd, 1, N, N, 0));
}

// LayerNorm's backward pass goes on to a branch or to the embedding, adding to what is there or afresh.
template <typename X> void Layers<X>::layernorm_back() {
    real *o = poison(size), *mean = poison(N), *rstd = poison(N);
    Mask mask = mask_on_gpu(drop, 3);
    layernorm_forward(o, mean, rstd, y, weight, bias, N, D);
    for (int fresh = 0; fresh < 2; fresh++) {
        int on = random_int(0, 1);
        real *dx = noise(size, !fresh), *dweight = noise(D, 1), *dbias = noise(D, 1), *dadd = noise(D, 1);
        real *dbranch;
        X *dbranch_d = gpu_poison<X>(size);
        float *dx_d = fresh ? gpu_poison<float>(size) : on_gpu<float>(dx, size);
        float *dweight_d = on_gpu<float>(dweight, D), *dbias_d = on_gpu<float>(dbias, D);
        float *dadd_d = on_gpu<float>(dadd, D);
        layernorm_backward(dx, dweight, dbias, dout, y, mean, rstd, weight, N, D);
        residual_layernorm_backward_gpu(dx_d, dweight_d, dbias_d, on ? dbranch_d : (X *)NULL, dadd_d, mask,
                                        fresh, dout_d, y_d, on_gpu<float>(mean, N), on_gpu<float>(rstd, N),
                                        weight_d, N, D, &sums, st);
        column_sums_gpu(&sums, st);
        dropout(dbranch = copy_of(dx, size), size, drop, 3);
        add_rows(dadd, dbranch, N, D, D);
        if (on) worst_of(&worst[LAYERNORM], gpu_error(dbranch_d, dbranch, N, D, D, 0));
        worst_of(&worst[LAYERNORM], gpu_error(dx_d, on ? dx : dbranch, N, D, D, 0));
        worst_of(&worst[SUMS], gpu_error(dweight_d, dweight, 1, D, D, floor));
        worst_of(&worst[SUMS], gpu_error(dbias_d, dbias, 1, D, D, floor));
        worst_of(&worst[SUMS], gpu_error(dadd_d, dadd, 1, D, D, floor));
    }
}

// `out` columns of rows out + 3 apart.
template <typename X> void Layers<X>::linear() {
    int ld_out = even ? out + 8 : out + 3;
    real *m = noise((int64_t)out * D, 1), *mb = noise(out, 1), *o = poison((int64_t)N * ld_out);
    real *dinp = poison(size), *dweight = noise((int64_t)out * D, 1), *dbias = noise(out, 1);
    real *grad = noise((int64_t)N * ld_out, 1);
    X *m_d = on_gpu<X>(m, (int64_t)out * D), *mb_d = on_gpu<X>(mb, out);
    X *o_d = gpu_poison<X>((int64_t)N * ld_out), *dinp_d = gpu_poison<X>(size);
    X *grad_d = on_gpu<X>(grad, (int64_t)N * ld_out);
    float *dweight_d = on_gpu<float>(dweight, (int64_t)out * D), scales[3] = {0.25f, 0, 1};
    linear_forward(o, ld_out, y, m, mb, N, D, out);
    linear_forward_gpu(o_d, ld_out, y_d, m_d, mb_d, N, D, out, st);
    worst_of(&worst[LINEAR], gpu_error(o_d, o, N, out, ld_out, 0));
    linear_backward(dinp, dweight, dbias, grad, ld_out, y, m, N, D, out);
    linear_weight_gpu(dweight_d, grad_d, ld_out, y_d, N, D, out, 1, st);
    linear_backward_gpu(dinp_d, NULL, grad_d, ld_out, y_d, m_d, N, D, out, 0, st);
    worst_of(&worst[LINEAR], gpu_error(dinp_d, dinp, N, D, D, 0));
    worst_of(&worst[LINEAR], gpu_error(dweight_d, dweight, out, D, D, 0));
    // the same once more, of four times the gradient, scaled by 0.25
    linear_backward(dinp, dweight, dbias, copy_of(grad, (int64_t)N * ld_out), ld_out, y, m, N, D, out);
    real *fourfold = noise((int64_t)N * ld_out, 0);
    for (int64_t i = 0; i < (int64_t)N * ld_out; i++) fourfold[i] = 4 * grad[i];
    linear_backward_gpu(dinp_d, dweight_d, on_gpu<X>(fourfold, (int64_t)N * ld_out), ld_out, y_d, m_d, N, D,
                        out, 1, st, on_gpu<float>(scales, 3));
    worst_of(&worst[LINEAR], gpu_error(dinp_d, dinp, N, D, D, 0));
    worst_of(&worst[LINEAR], gpu_error(dweight_d, dweight, out, D, D, 0));
}

// GELU, with and without the gain that reads it.
template <typename X> void Layers<X>::gelu() {
    int gain = random_int(0, 1);
    real *o = poison(size), *dinp = poison(wide_size), *gamma = poison(N), *dgamma = copy_of(rows, N);
    real *dabar = copy_of(dout, size), *dweight = noise(D, 1), *dbias = noise(1, 1), *dinp_bias = noise(D, 1);
    X *o_d = gpu_poison<X>(size), *dinp_d = gpu_poison<X>(wide_size);
    float *gamma_d = gpu_poison<float>(N), *dweight_d = on_gpu<float>(dweight, D);
    float *dbias_d = on_gpu<float>(dbias, 1), *dinp_bias_d = on_gpu<float>(dinp_bias, D);
    float *w_gain = gain ? weight_d : NULL;
    gelu_forward(o, x, ld, N, D);
    gelu_gain_forward_gpu(o_d, gamma_d, x_d, ld, w_gain, bias_d, 0.9f, N, D, st);
    worst_of(&worst[GELU], gpu_error(o_d, o, N, D, D, 0));
    on_gpu<X>(o, size); // rounded: the gain is that of what is written
    gain_forward(gamma, o, weight, bias, (real)0.9, N, D);
    if (gain) worst_of(&worst[GAIN], gpu_error(gamma_d, gamma, 1, N, N, 0));
    CUDA(cudaMemcpyAsync(gamma_d, gamma, sizeof(real) * (size_t)N, cudaMemcpyHostToDevice, st));
    if (gain) gain_backward(dabar, dweight, dbias, dgamma, gamma, o, weight, (real)0.9, N, D);
    gelu_backward(dinp, dabar, x, ld, N, D);
    add_rows(dinp_bias, dinp, N, D, ld);
    gelu_gain_backward_gpu(dinp_d, dinp_bias_d, gain ? dweight_d : NULL, gain ? dbias_d : NULL, dout_d, x_d,
                           ld, rows_d, gamma_d, w_gain, 0.9f, N, D, &sums, st);
    column_sums_gpu(&sums, st);
    worst_of(&worst[GELU], gpu_error(dinp_d, dinp, N, D, ld, 0));
    worst_of(&worst[SUMS], gpu_error(dinp_bias_d, dinp_bias, 1, D, D, floor));
    worst_of(&worst[GAIN], gpu_error(dweight_d, dweight, 1, D, D, floor));
    worst_of(&worst[GAIN], gpu_error(dbias_d, dbias, 1, 1, 1, sqrt((double)N)));
}

// The gate, with dropout.
template <typename X> void Layers<X>::gate() {
    real *gated = poison(size), *ds = poison(size), *dg = poison(wide_size), *dg_bias = noise(D, 1);
    real *dgated = copy_of(dout, size);
    X *gated_d = gpu_poison<X>(size), *ds_d = gpu_poison<X>(size), *dg_d = gpu_poison<X>(wide_size);
    float *dg_bias_d = on_gpu<float>(dg_bias, D);
    Mask mask = mask_on_gpu(drop, 5);
    gate_forward(gated, y, g, ld, N, D);
    dropout(gated, size, drop, 5);
    gate_dropout_forward_gpu(gated_d, y_d, g_d, ld, mask, N, D, st);
    worst_of(&worst[GATE], gpu_error(gated_d, gated, N, D, D, 0));
    dropout(dgated, size, drop, 5);
    gate_backward(ds, dg, dgated, y, g, ld, N, D);
    add_rows(dg_bias, dg, N, D, ld);
    gate_dropout_backward_gpu(ds_d, dg_d, dg_bias_d, dout_d, y_d, g_d, ld, mask, N, D, &sums, st);
    column_sums_gpu(&sums, st);
    worst_of(&worst[GATE], gpu_error(ds_d, ds, N, D, D, 0));
    worst_of(&worst[GATE], gpu_error(dg_d, dg, N, D, ld, 0));
    worst_of(&worst[SUMS], gpu_error(dg_bias_d, dg_bias, 1, D, D, floor));
}

// RoPE works in place.
template <typename X> void Layers<X>::rope() {
    real *cosine = poison((int64_t)T * (d / 2)), *sine = poison((int64_t)T * (d / 2));
    real *turned = copy_of(x, wide_size), *back = copy_of(w, wide_size), *dbias = noise(ld, 1);
    X *turned_d = on_gpu<X>(turned, wide_size), *back_d = on_gpu<X>(back, wide_size);
    rope_table(cosine, sine, T, d);
    float *cosine_d = on_gpu<float>(cosine, (int64_t)T * (d / 2));
    float *sine_d = on_gpu<float>(sine, (int64_t)T * (d / 2)), *dbias_d = on_gpu<float>(dbias, ld);
    rope_forward(turned, ld, cosine, sine, N, T, H, d, 0, 1);
    rope_forward_gpu(turned_d, ld, cosine_d, sine_d, N, T, H, d, 0, 1, st);
    worst_of(&worst[ROPE], gpu_error(turned_d, turned, N, ld, ld, 0));
    rope_backward(back, ld, cosine, sine, N, T, H, d);
    add_rows(dbias, back, N, ld, ld);
    rope_bias_backward_gpu(back_d, dbias_d, ld, {cosine_d, sine_d, T, d / 2, 0, -1}, N, H * d, ld, &sums, st);
    column_sums_gpu(&sums, st);
    worst_of(&worst[ROPE], gpu_error(back_d, back, N, ld, ld, 0));
    worst_of(&worst[SUMS], gpu_error(dbias_d, dbias, 1, ld, ld, floor));
}

// The loss, whether the target was the likeliest, and the gradient in place of the logits.
template <typename X> void Layers<X>::crossentropy() {
    int ld_v = (int)round_up(V, 8);
    real *logits = noise((int64_t)N * V, 2), *padded = poison((int64_t)N * ld_v), *losses = poison(N);
    real *logsumexp = poison(N), *dlogits = poison((int64_t)N * V);
    for (int n = 0; n < N; n++)
        for (int i = 0; i < V; i++) padded[n * ld_v + i] = logits[n * V + i];
    X *logits_d = on_gpu<X>(padded, (int64_t)N * ld_v);
    float *losses_d = gpu_poison<float>(N);
    char *hits_d = (char *)gpu_poison<float>(N), *hits = (char *)lend((size_t)N);
    int hits_wrong = 0;
    for (int n = 0; n < N; n++)
        for (int i = 0; i < V; i++) logits[n * V + i] = padded[n * ld_v + i];
    int *targets_d = ids_on_gpu(targets, N);
    crossentropy_forward(losses, logsumexp, logits, targets, N, V);
    crossentropy_backward(dlogits, logits, logsumexp, targets, 1, N, V);
    crossentropy_gpu(losses_d, hits_d, (X *)NULL, logits_d, ld_v, targets_d, N, V, st);
    worst_of(&worst[CROSSENTROPY], gpu_error(losses_d, losses, 1, N, N, sqrt((double)N)));
    worst_of(&worst[CROSSENTROPY], gpu_error(logits_d, padded, N, V, ld_v, 0));
    CUDA(cudaStreamSynchronize(st));
    CUDA(cudaMemcpy(hits, hits_d, (size_t)N, cudaMemcpyDeviceToHost));
    for (int n = 0; n < N; n++) {
        int hit = targets[n] >= 0;
        for (int i = 0; i < V && hit; i++) hit = logits[n * V + i] <= logits[n * V + targets[n]];
        hits_wrong += hit != hits[n];
    }
    worst_of(&worst[CROSSENTROPY], hits_wrong);
    crossentropy_gpu(losses_d, hits_d, logits_d, logits_d, ld_v, targets_d, N, V, st);
    for (int n = 0; n < N; n++) // 0 where a piece of 8 reaches past V
        for (int i = 0; i < ld_v; i++) padded[n * ld_v + i] = i < V ? dlogits[n * V + i] : 0;
    worst_of(&worst[CROSSENTROPY], gpu_error(losses_d, losses, 1, N, N, sqrt((double)N)));
    worst_of(&worst[CROSSENTROPY], gpu_error(logits_d, padded, N, ld_v, ld_v, 0.1 * sqrt((double)N)));
}

// mamba2's convolution, step and scan: D channels in H heads, S numbers of state, W columns of rows ld_w
// apart.
template <typename X> void Layers<X>::scan(int eights) {
    int S = eights ? 8 * random_int(1, 16) : random_int(2, 20);
    while (!plain && S > 8 && !scan_rows(S, d, sizeof(X))) S -= eights ? 8 : 1; // what a card's shared memory takes
    int W = D + 2 * S;
    int ld_w = W + (eights ? 8 : 1) * random_int(0, 3), first = random_int(0, T - 1);
    int P = panel_heights[random_int(0, N_HEIGHTS - 1)], height = plain ? CHUNK : chunk_height(P),
        slots = (T + height - 1) / height;
    int64_t wide_w = (int64_t)N * ld_w, size_w = (int64_t)N * W, states = (int64_t)B * slots * S * D;
    real *inp = noise(wide_w, 1), *taps = noise(W * TAPS, 0.5), *shift = noise(W, 0.5), *xbc = poison(size_w);
    real *dxbc = noise(size_w, 1), *dinp = poison(wide_w), *dtaps = noise(W * TAPS, 1), *dshift = noise(W, 1);
    X *inp_d = on_gpu<X>(inp, wide_w), *xbc_d = gpu_poison<X>(size_w), *dxbc_d = on_gpu<X>(dxbc, size_w);
    X *dinp_d = gpu_poison<X>(wide_w), *tail_d = on_gpu<X>(noise((TAPS - 1) * W, 0), (TAPS - 1) * W);
    float *taps_d = on_gpu<float>(taps, W * TAPS), *shift_d = on_gpu<float>(shift, W);
    float *dtaps_d = on_gpu<float>(dtaps, W * TAPS), *dshift_d = on_gpu<float>(dshift, W);
    conv_forward(xbc, inp, ld_w, NULL, taps, shift, B, T, W, 0);
    if (first) // the first sequence in two calls
        conv_forward_gpu(xbc_d, inp_d, ld_w, tail_d, taps_d, shift_d, 1, first, W, 0, st);
    conv_forward_gpu(xbc_d + (int64_t)first * W, inp_d + (int64_t)first * ld_w, ld_w, tail_d, taps_d, shift_d,
                     1, T, W, first, st);
    worst_of(&worst[CONVOLUTION], gpu_error(xbc_d, xbc, T, W, W, 0));
    conv_forward_gpu(xbc_d, inp_d, ld_w, (X *)NULL, taps_d, shift_d, B, T, W, 0, st);
    worst_of(&worst[CONVOLUTION], gpu_error(xbc_d, xbc, N, W, W, 0));
    conv_backward(dinp, dtaps, dshift, dxbc, inp, ld_w, taps, shift, B, T, W);
    conv_backward_gpu(dinp_d, dtaps_d, dshift_d, dxbc_d, inp_d, ld_w, taps_d, shift_d, B, T, W, &sums, st);
    column_sums_gpu(&sums, st);
    worst_of(&worst[CONVOLUTION], gpu_error(dinp_d, dinp, N, W, ld_w, 0));
    worst_of(&worst[CONVOLUTION],
             gpu_error(dtaps_d, dtaps, 1, W * TAPS, W * TAPS, 0.1 * sqrt((double)size_w)));
    worst_of(&worst[CONVOLUTION], gpu_error(dshift_d, dshift, 1, W, W, 0.1 * sqrt((double)size_w)));

    real *step = poison(N * H), *shifts = noise(H, 1), *dshifts = noise(H, 1), *dstep = poison(N * 3 * H);
    real *dstep_inp = poison(wide_w);
    float *step_d = gpu_poison<float>(N * H), *shifts_d = on_gpu<float>(shifts, H);
    float *dshifts_d = on_gpu<float>(dshifts, H), *dstep_d = gpu_poison<float>(N * 3 * H);
    X *dstep_inp_d = gpu_poison<X>(wide_w);
    step_forward(step, inp, ld_w, shifts, N, H);
    step_forward_gpu(step_d, inp_d, ld_w, shifts_d, N, H, st);
    worst_of(&worst[STEP], gpu_error(step_d, step, N, H, H, 0));

    xbc_d = on_gpu<X>(xbc, size_w); // both read the same
    real *A_log = noise(H, 1), *skip = noise(H, 1), *dA = noise(H, 1), *dskip = noise(H, 1);
    real *y_scan = poison(size), *kept = poison(states);
    real *scan_room = (real *)lend(scan_scratch(D, S, H) * (size_t)omp_get_max_threads() * sizeof(real));
    float *A_d = on_gpu<float>(A_log, H), *skip_d = on_gpu<float>(skip, H), *dA_d = on_gpu<float>(dA, H);
    float *dskip_d = on_gpu<float>(dskip, H), *kept_d = gpu_poison<float>(states);
    float *carried_d = on_gpu<float>(noise((int64_t)S * D, 0), (int64_t)S * D);
    ScanShape scan = scan_with(B, T, D, S, H, A_d, skip_d), early = scan, late = scan;
    early.B = late.B = 1;
    early.T = first;
    late.T = T - first;
    Scratch scan_d = scratch_on_gpu(scan_scratch_gpu(scan));
    X *y_scan_d = gpu_poison<X>(size);
    auto forward = [&](int at, float *carried, ScanShape part) {
        X *y_at = y_scan_d + (int64_t)at * D, *xbc_at = xbc_d + (int64_t)at * W;
        float *step_at = step_d + (int64_t)at * H;
        if (plain) scan_forward_gpu(y_at, kept_d, carried, scan_d, xbc_at, step_at, part, st);
        else scan_forward_fast(y_at, kept_d, carried, xbc_at, step_at, part, P, st);
    };
    scan_forward(y_scan, kept, 1, work_with(scan_room, P), xbc, step, scan_with(B, T, D, S, H, A_log, skip));
    if (first) forward(0, carried_d, early);
    forward(first, carried_d, late);
    worst_of(&worst[SCAN_F], gpu_error(y_scan_d, y_scan, T, D, D, 0));
    forward(0, NULL, scan);
    worst_of(&worst[SCAN_F], gpu_error(y_scan_d, y_scan, N, D, D, 0));
    scan_backward(dxbc, dstep, dA, dskip, work_with(scan_room, P), dout, kept, xbc, step,
                  scan_with(B, T, D, S, H, A_log, skip));
    if (plain)
        scan_backward_gpu(dxbc_d, dstep_d, dA_d, dskip_d, scan_d, dout_d, kept_d, xbc_d, step_d, scan,
                          &sums, st);
    else
        scan_backward_fast(dxbc_d, dstep_d, dA_d, dskip_d, scan_d, dout_d, kept_d, xbc_d, step_d, scan, P,
                           &sums, st);
    column_sums_gpu(&sums, st);
    worst_of(&worst[SCAN_B], gpu_error(dxbc_d, dxbc, N, W, W, 0));
    worst_of(&worst[SCAN_B], gpu_error(dA_d, dA, 1, H, H, floor));
    worst_of(&worst[SCAN_B], gpu_error(dskip_d, dskip, 1, H, H, floor));
    // behind the first H columns the plain loops of the C program write nothing; these step_backward reads
    if (!plain) worst_of(&worst[SCAN_B], gpu_error(dstep_d, dstep, N, 3 * H, 3 * H, floor));
    step_backward(dstep_inp, dshifts, dstep, 3 * H, inp, ld_w, shifts, N, H);
    step_backward_gpu(dstep_inp_d, dshifts_d, dstep_d, 3 * H, inp_d, ld_w, shifts_d, N, H, &sums, st);
    column_sums_gpu(&sums, st);
    worst_of(&worst[STEP], gpu_error(dstep_inp_d, dstep_inp, N, H, ld_w, floor));
    worst_of(&worst[STEP], gpu_error(dshifts_d, dshifts, 1, H, H, floor));
}

// mamba2's norm.
template <typename X> void Layers<X>::gated_norm() {
    real *o = poison(size), *rms = poison(N), *dy = poison(size), *dz = poison(wide_size);
    real *dweight = noise(D, 1);
    X *o_d = gpu_poison<X>(size), *dy_d = gpu_poison<X>(size), *dz_d = gpu_poison<X>(wide_size);
    float *rms_d = gpu_poison<float>(N), *dweight_d = on_gpu<float>(dweight, D);
    gated_rmsnorm_forward(o, rms, y, g, ld, weight, N, D);
    gated_rmsnorm_forward_gpu(o_d, rms_d, y_d, g_d, ld, weight_d, N, D, st);
    worst_of(&worst[GATED_NORM], gpu_error(o_d, o, N, D, D, 0));
    gated_rmsnorm_backward(dy, dz, dweight, dout, y, g, ld, rms, weight, N, D);
    gated_rmsnorm_backward_gpu(dy_d, dz_d, dweight_d, dout_d, y_d, g_d, ld, rms_d, weight_d, N, D, &sums, st);
    column_sums_gpu(&sums, st);
    worst_of(&worst[GATED_NORM], gpu_error(dy_d, dy, N, D, D, 0));
    worst_of(&worst[GATED_NORM], gpu_error(dz_d, dz, N, D, ld, 0));
    worst_of(&worst[GATED_NORM], gpu_error(dweight_d, dweight, 1, D, D, 0.1 * sqrt((double)size)));
}

// One random shape: every layer on the GPU and in C on the same numbers.
template <typename X> static void compare_layers(double *worst, int even, int T) {
    Layers<X> c;
    c.worst = worst;
    c.draw(even, T);
    c.embedding();
    c.layernorm();
    c.layernorm_back();
    c.linear();
    c.gelu();
    c.gate();
    c.rope();
    c.crossentropy();
    c.scan(0);
    if (even) { // again in eights, from numbers that the shapes below do not depend on
        uint64_t before = chance;
        c.scan(1);
        chance = before;
    }
    c.gated_norm();
    compare_mixers<X>(worst, c.x, c.w, c.y, c.dout, c.B, T, c.H, c.G, c.d, c.ld, -1);
    gpu_release();
}

// A layer's result in bf16 is off from that of the C function on the same operands by one rounding, at most
// 2^-8 of each number. Attention rounds its weights besides, and backward their gradient: twice that;
// feedback solves with what it has rounded, block by block, with gains up to 0.999: four times.
template <typename X> static double bound_of_layer(int layer) {
    // the C program's plain scan adds thousands of float32 numbers one behind the other
    if (plain && layer == SCAN_B && sizeof(X) == sizeof(float)) return 4e-5;
    if (sizeof(X) == sizeof(float)) return layer >= FEEDBACK_F ? 1e-4 : 1e-5;
    return 0x1p-8 * (layer >= FEEDBACK_F ? 4 : layer >= ATTENTION_F ? 2 : 1);
}

template <typename X> static void test_gpu_layers(const char *name) {
    static const int Ts[] = {1, 2, 3, 17, 64, 65, 130, 200, 257, 300, 520, 2500};
    double worst[N_GPU_LAYERS] = {0};
    heading(name);
    for (int i = 0; i < 23; i++) compare_layers<X>(worst, i % 2, Ts[i / 2]);
    for (int l = 0; l < N_GPU_LAYERS; l++) check_error(worst[l], bound_of_layer<X>(l), "%s", layer_names[l]);
}

// Attention and feedback of one shape. P: of the feedback's panels, 0: as a model has them
static void check_tiles(int B, int T, int H, int G, int d, int ld, int P) {
    int64_t size = (int64_t)B * T * H * d, wide_size = (int64_t)B * T * ld;
    real *x = noise(wide_size, 1), *w = noise(wide_size, 1), *y = noise(size, 1), *dout = noise(size, 1);
    double worst[N_GPU_LAYERS] = {0}, most = 0;
    on_gpu<bf16>(x, wide_size); // rounded
    on_gpu<bf16>(w, wide_size);
    compare_mixers<bf16>(worst, x, w, y, dout, B, T, H, G, d, ld, P);
    gpu_release();
    for (int l = ATTENTION_F; l < N_GPU_LAYERS; l++) worst_of(&most, worst[l] * (l < FEEDBACK_F ? 2 : 1));
    worst_of(&most, worst[SUMS]);
    check_error(most, 4 * 0x1p-8, "B %d, T %d, %d of %d heads of %d columns, ld %d, panels %d", B, T, G, H, d,
                ld, P);
}
static void test_random_tiles(uint64_t seed, int count) {
    // products in large tiles, of one and of two rows of them; blocks of 512; panels of 2048 rows
    static const int first[][5] = {
        {90, 40, 1, 1, 8}, {41, 130, 2, 1, 16}, {2, 600, 1, 1, 16}, {1, 2100, 1, 1, 8}};
    heading("bf16: random shapes in tiles");
    gpu.precision = BF16;
    for (int i = 0; i < 4 && i < count; i++) {
        const int *s = first[i];
        check_tiles(s[0], s[1], s[2], s[3], s[4], s[2] * s[4] + 8, 0);
    }
    for (int i = 4; i < count; i++) {
        chance = splitmix64(seed + 1000 * (uint64_t)i);
        int wide_heads = random_int(0, 2) == 0, G = random_int(1, 2);
        int H = G * random_int(1, wide_heads ? 2 : 3);
        int d = 8 * random_int(wide_heads ? 9 : 1, wide_heads ? 16 : 8);
        int T = random_int(1, 300), B = random_int(1, 3);
        if (random_int(0, 3) == 0) { T = 8 * random_int(1, 37); B = 1; } // a late start may be in tiles, too
        if (H * d > 256) H = G = 256 / d;
        int P = random_int(0, 2) ? 0 : 8 * random_int(1, 20);
        check_tiles(B, T, H, G, d, H * d + 8 * random_int(0, 2), P);
    }
}

// Shapes of bf16 for which kernels of their own exist: heads of 64 and 128 columns and others, sequences of
// many tiles, more blocks than the GPU takes at once, a whole cluster and an odd number of heads; feedback of
// many short sequences, of one with several panels' reach.
static void test_gpu_tiles(void) {
    static const struct { int B, T, H, G, d; } shapes[] = {
        {1, 1, 1, 1, 64},
        {2, 127, 1, 1, 128},
        {1, 129, 2, 1, 96},
        {2, 193, 3, 3, 32},
        {1, 700, 6, 2, 128},
        {2, 1100, 12, 12, 64},
        {50, 128, 3, 3, 40},
        {64, 300, 2, 1, 48},
        {24, 513, 4, 4, 64},
        {1, 2305, 2, 2, 64},
        {6, 1000, 5, 5, 64},
    };
    heading("bf16: attention and feedback in tiles");
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        int B = shapes[i].B, T = shapes[i].T, H = shapes[i].H, G = shapes[i].G, d = shapes[i].d;
        check_tiles(B, T, H, G, d, H * d + 8, 0);
    }
}

// bf16 at the edge of what the loop bears: α on the row before alone, γ 0.999 rounds to 1 in bf16. s_t = f_t
// + γ s_{t-1}.
static void test_peaked(void) {
    enum { T = 3000, D = 64, SIZE = T * D };
    heading(plain ? "bf16, plain: alpha on one token, gamma 0.999" : "bf16: alpha on one token, gamma 0.999");
    real *f = noise(SIZE, 1), *q = noise(SIZE, 0), *k = noise(SIZE, 0), *ds = noise(SIZE, 1);
    real *gamma = poison(T), *s = poison(SIZE), *lambda = poison(SIZE);
    for (int t = 0; t < T; t++) { // a code of ±6 for each position, which q_t has in common with k_{t-1}
        gamma[t] = (real)0.999;
        for (int i = 0; i < D; i++) {
            k[t * D + i] = splitmix64((uint64_t)(t * D + i)) >> 63 ? 6 : -6;
            q[t * D + i] = t ? k[(t - 1) * D + i] : 0;
        }
    }
    bf16 *f_d = on_gpu<bf16>(f, SIZE), *q_d = on_gpu<bf16>(q, SIZE), *k_d = on_gpu<bf16>(k, SIZE);
    bf16 *s_d = gpu_poison<bf16>(SIZE), *ds_d = on_gpu<bf16>(ds, SIZE), *c_d = gpu_poison<bf16>(SIZE);
    bf16 *dq_d = gpu_poison<bf16>(SIZE), *dk_d = gpu_poison<bf16>(SIZE);
    float *gamma_d = on_gpu<float>(gamma, T), *stats_d = gpu_poison<float>(2 * T);
    float *dgamma_d = gpu_poison<float>(T);
    Feedback m = feedback_on_gpu<bf16>(1, T, D, 0, 1, 0);
    for (int i = 0; i < D; i++) { // forth, and back, of what is rounded to bf16
        double last = 0;
        for (int t = 0; t < T; t++) s[t * D + i] = (real)(last = (double)f[t * D + i] + 0.999 * last);
        last = 0;
        for (int t = T - 1; t >= 0; t--)
            lambda[t * D + i] = (real)(last = (double)ds[t * D + i] + 0.999 * last);
    }
    feedback_forward_gpu(s_d, c_d, stats_d, m.weights, m.scratch, f_d, q_d, k_d, gamma_d, shape_of(1, T, 0,
        1, 1, D, D), &m.p,
                         gpu.stream);
    check_error(gpu_error(s_d, s, T, D, D, 0), 0x1p-8, "s of a chain of 3000 rows: one rounding at most");
    feedback_backward_gpu(ds_d, dq_d, dk_d, dgamma_d, (float *)NULL, m.weights, m.scratch, ds_d, s_d, c_d,
                          stats_d, q_d, k_d, gamma_d, shape_of(1, T, 0, 1, 1, D, D), &m.p,
                              (ColumnSums *)NULL, gpu.stream);
    check_error(gpu_error(ds_d, lambda, T, D, D, 0), 0x1p-7, "its adjoint: two, of u and of the result");
    gpu_release();
}

static void from_gpu(real *host, const bf16 *device, int64_t n) {
    bf16 *numbers = (bf16 *)lend((size_t)n * sizeof(bf16));
    CUDA(cudaStreamSynchronize(gpu.stream));
    CUDA(cudaMemcpy(numbers, device, (size_t)n * sizeof(bf16), cudaMemcpyDeviceToHost));
    for (int64_t i = 0; i < n; i++) host[i] = value_of(numbers[i]);
}

static int is_nearest(double exact, real found) {
    bf16 nearest;
    set_value(&nearest, (float)exact);
    return value_of(nearest) == found;
}

// Inverses and right-hand sides of blocks are kept in two parts. So what a block is solved to is the bf16
// number next to the exact one, but for few (emulated: 0.8 in 100 at most; without the second part of
// either, 5 and more). On test_peaked's chain a block hangs on one row of its neighbour, here by a gain that
// rounds nothing: 1/2. And c is s of the row before, in every bit. df takes the place of ds, as in a model.
static void test_nearest(int B, int T) {
    enum { D = 64 };
    int64_t rows = (int64_t)B * T, size = rows * D, s_others = 0, df_others = 0, c_others = 0;
    heading("bf16: each block of the feedback is solved to the nearest number");
    real *f = noise(size, 1), *q = noise(size, 0), *k = noise(size, 0), *ds = noise(size, 1);
    real *gamma = poison(rows), *s = poison(size), *c = poison(size), *df = poison(size);
    Feedback m = feedback_on_gpu<bf16>(B, T, D, 0, 1, 0);
    int P = m.p.P;
    for (int64_t n = 0; n < rows; n++) {
        gamma[n] = n % T % P ? (real)0.999 : (real)0.5;
        for (int i = 0; i < D; i++) {
            k[n * D + i] = splitmix64((uint64_t)(n * D + i)) >> 63 ? 6 : -6;
            q[n * D + i] = n % T ? k[(n - 1) * D + i] : 0;
        }
    }
    bf16 *f_d = on_gpu<bf16>(f, size), *q_d = on_gpu<bf16>(q, size), *k_d = on_gpu<bf16>(k, size);
    bf16 *s_d = gpu_poison<bf16>(size), *ds_d = on_gpu<bf16>(ds, size), *c_d = gpu_poison<bf16>(size);
    bf16 *dq_d = gpu_poison<bf16>(size), *dk_d = gpu_poison<bf16>(size);
    float *gamma_d = on_gpu<float>(gamma, rows), *stats_d = gpu_poison<float>(2 * rows);
    float *dgamma_d = gpu_poison<float>(rows);
    Shape shape = shape_of(B, T, 0, 1, 1, D, D);
    feedback_forward_gpu(s_d, c_d, stats_d, m.weights, m.scratch, f_d, q_d, k_d, gamma_d, shape, &m.p,
                         gpu.stream);
    feedback_backward_gpu(ds_d, dq_d, dk_d, dgamma_d, (float *)NULL, m.weights, m.scratch, ds_d, s_d, c_d,
                          stats_d, q_d, k_d, gamma_d, shape, &m.p, (ColumnSums *)NULL, gpu.stream);
    from_gpu(s, s_d, size);
    from_gpu(c, c_d, size);
    from_gpu(df, ds_d, size);
    for (int64_t column = 0; column < (int64_t)B * D; column++) {
        int64_t first = column / D * T * D + column % D;
        const float *gains = gamma + column / D * T;
        double last = 0;
        for (int t = 0; t < T; t++) {
            int64_t at = first + (int64_t)t * D;
            double before = t ? (double)s[at - D] : 0;
            last = (double)f[at] + (double)gains[t] * (t % P ? last : before);
            s_others += !is_nearest(last, s[at]);
            c_others += (double)c[at] != before;
        }
        for (int t = T - 1; t >= 0; t--) {
            int64_t at = first + (int64_t)t * D;
            double behind = (t + 1) % P ? last : t + 1 < T ? (double)df[at + D] : 0;
            last = (double)ds[at] + (t + 1 < T ? (double)gains[t + 1] * behind : 0);
            df_others += !is_nearest(last, df[at]);
        }
    }
    check_error((double)s_others / (double)size, 0.03, "B %d, T %d, blocks of %d rows: s, share of others", B, T,
                P);
    check_error((double)df_others / (double)size, 0.03, "its adjoint");
    check(!c_others, "c is s of the row before");
    gpu_release();
}

// ----------------------------------------------------------------------------
// models

// A model with seeded weights; NULL after a failed check.
static Model *model_on(const Backend *backend, const Config *c, int B, int T) {
    char error[ERROR_SIZE];
    Model *m = backend->create(c, B, T, TRAIN, error);
    if (!m) { check(0, "%s", error); return NULL; }
    initialise(backend->read(m, PARAMS), &m->table, 3);
    backend->write(m, PARAMS);
    return m;
}

// Two backward passes, then an update that changes nothing and one pass of twice the loss: the same
// gradients, for passes add to what is there and start again after an update. Each mixer has buffers of its
// own that this goes through.
static void check_passes(const char *name, const Backend *backend, int mixer) {
    enum { B = 3, T = 70, V = 50 };
    Config c = config_with(mixer, V, 64, 2, 4, 2, T);
    int ids[B * T];
    Model *m = model_on(backend, &c, B, T);
    if (!m) return;
    for (int n = 0; n < B * T; n++) ids[n] = random_int(0, V - 1);
    AdamW none = {0, 0.9, 0.99, 1e-8, 0.1};
    real *grads[2];
    for (int pass = 0; pass < 2; pass++) {
        for (int i = pass; i < 2; i++) {
            backend->forward(m, ids, ids, B, T, no_dropout);
            backend->backward(m, pass + 1, 1);
        }
        grads[pass] = copy_of(backend->read(m, GRADS), m->table.count);
        backend->update(m, none, 1, 1);
    }
    precise *twice = zeros(m->table.count);
    for (int64_t i = 0; i < m->table.count; i++) twice[i] = (double)grads[0][i];
    check_error(error_of(grads[1], twice, m->table.count, 0), 1e-5, "%s, %s", mixers[mixer].name, name);
    backend->destroy(m);
}

static void test_gpu_passes(void) {
    static const Precision precisions[] = {FP32, TF32, BF16};
    heading("gradients add up, and start again after an update");
    for (int mixer = 0; mixer < N_MIXERS; mixer++) {
        check_passes("CPU", &cpu_backend, mixer);
        for (int i = 0; i < 3; i++) {
            gpu.precision = precisions[i];
            check_passes(precision_names[gpu.precision], backend_gpu(), mixer);
        }
    }
    release();
}

// A forward pass for its loss alone: the bits of one that a backward pass follows, at once, recorded and
// replayed; and the backward pass that follows it nevertheless has its own.
template <typename X> static void check_loss_alone(int mixer) {
    enum { B = 3, T = 70, V = 50, N = B * T };
    Config c = config_with(mixer, V, 64, 2, 4, 2, T);
    const Backend *backend = backend_gpu();
    AdamW none = {0, 0.9, 0.99, 1e-8, 0.1};
    int ids[N], same = 1;
    double loss[2];
    float losses[2][N];
    real *grads[2];
    Model *m = model_on(backend, &c, B, T);
    if (!m) return;
    for (int n = 0; n < N; n++) ids[n] = random_int(0, V - 1);
    for (int turn = 0; turn < 8; turn++) {
        int alone = turn % 2;
        m->loss_alone = alone;
        backend->forward(m, ids, ids, B, T, no_dropout);
        loss[alone] = backend->loss(m);
        CUDA(cudaMemcpy(losses[alone], ((ModelGPU<X> *)m)->acts.losses, sizeof(losses[0]), cudaMemcpyDeviceToHost));
        backend->backward(m, 1, 1);
        grads[alone] = copy_of(backend->read(m, GRADS), m->table.count);
        backend->update(m, none, 1, 1);
        if (!alone) continue;
        same &= loss[0] == loss[1] && !memcmp(losses[0], losses[1], sizeof(losses[0]))
                && !memcmp(grads[0], grads[1], sizeof(real) * (size_t)m->table.count);
    }
    check(same, "%s, %s", mixers[mixer].name, precision_names[gpu.precision]);
    backend->destroy(m);
}
static void test_gpu_loss_alone(void) {
    heading("a forward pass for its loss alone has the same losses");
    for (int mixer = 0; mixer < N_MIXERS; mixer++) {
        gpu.precision = FP32;
        check_loss_alone<float>(mixer);
        gpu.precision = BF16;
        check_loss_alone<bf16>(mixer);
    }
    release();
}

// Weights after some steps, the next one begun at once, or after a look at them, or at the gradients: the
// same bits, though the update of most layers goes on under what follows. They are large enough for it to
// take as long as that needs to get there.
static void test_gpu_update(void) {
    enum { B = 2, T = 16, V = 20, STEPS = 4 };
    heading("the next step need not wait for the update");
    Config c = config_with(SESSA, V, 768, 5, 4, 4, T);
    real *weights[3];
    gpu.precision = BF16;
    const Backend *backend = backend_gpu();
    for (int look = 0; look < 3; look++) {
        Model *m = model_on(backend, &c, B, T);
        if (!m) return;
        for (int step = 0; step < STEPS; step++) {
            int ids[B * T];
            AdamW adam = {1e-3, 0.9, 0.99, 1e-8, 0.1};
            for (int n = 0; n < B * T; n++) ids[n] = (7 * n * n + step) % V;
            backend->forward(m, ids, ids, B, T, no_dropout);
            backend->backward(m, 1, 1);
            backend->update(m, adam, 1, step + 1);
            if (look) backend->read(m, look == 1 ? PARAMS : GRADS);
        }
        weights[look] = copy_of(backend->read(m, PARAMS), m->table.count);
        int same = !memcmp(weights[0], weights[look], sizeof(real) * (size_t)m->table.count);
        if (look)
            check(same, "weights after 4 steps, %s read after each", look == 1 ? "weights" : "gradients");
        backend->destroy(m);
    }
    release();
}

// ----------------------------------------------------------------------------
// training: 100 steps on the same batches of this program's own text, the CPU's losses and the GPU's

enum { TRAIN_B = 8, TRAIN_T = 96, TRAIN_V = 128, STEPS = 100 };

static void train_on(const Backend *backend, Model *m, const unsigned char *text, size_t size,
                     double *losses) {
    enum { B = TRAIN_B, T = TRAIN_T, V = TRAIN_V };
    uint64_t state = 9;
    for (int step = 0; step < STEPS; step++) {
        int inputs[B * T], targets[B * T];
        for (int b = 0; b < B; b++) {
            size_t at = (size_t)(random_uniform(&state) * (double)(size - T - 1));
            for (int t = 0; t < T; t++) {
                inputs[b * T + t] = text[at + t] % V;
                targets[b * T + t] = text[at + t + 1] % V;
            }
        }
        AdamW adam = {3e-3 * fmin(1, (step + 1) / 20.0), 0.9, 0.99, 1e-8, 0.1};
        backend->forward(m, inputs, targets, B, T, no_dropout);
        backend->backward(m, 1.0 / (B * T), 1);
        losses[step] = backend->loss(m) / (B * T);
        backend->update(m, adam, 1, step + 1);
    }
    check(norm(backend->read(m, GRADS), m->table.count) == 0, "no gradient after an update");
}

static void check_nan_update(const Backend *backend, Model *m) {
    AdamW any = {1e-3, 0.9, 0.99, 1e-8, 0.1};
    real *kept = copy_of(backend->read(m, PARAMS), m->table.count);
    backend->read(m, GRADS)[7] = NAN;
    backend->write(m, GRADS);
    double length = backend->update(m, any, 1, STEPS + 1);
    const real *now = backend->read(m, PARAMS);
    check(!isfinite(length) && !memcmp(kept, now, sizeof(real) * (size_t)m->table.count),
          "%s: no update with a gradient of NaN", backend->name);
}

// A model's losses, and its weights at the end.
typedef struct {
    double losses[STEPS];
    real *weights;
    int64_t count;
} Trained;

static Trained trained_on(const Backend *backend, const unsigned char *text, size_t size) {
    Config c = config_with(SESSA, TRAIN_V, 64, 3, 4, 2, TRAIN_T);
    Trained result;
    memset(&result, 0, sizeof(result));
    Model *m = model_on(backend, &c, TRAIN_B, TRAIN_T);
    if (!m) return result;
    train_on(backend, m, text, size, result.losses);
    check_nan_update(backend, m);
    result.count = m->table.count;
    result.weights = copy_of(backend->read(m, PARAMS), m->table.count);
    backend->destroy(m);
    return result;
}

static Trained trained_on_gpu(Precision precision, const unsigned char *text, size_t size) {
    gpu.precision = precision;
    return trained_on(backend_gpu(), text, size);
}

static void check_again(const Trained *a, const Trained *b) {
    check(a->count && a->count == b->count &&
              !memcmp(a->weights, b->weights, sizeof(real) * (size_t)a->count),
          "%s: the same weights, bit for bit, in a second run of 100 steps", precision_names[gpu.precision]);
}

// The largest relative difference of the losses of steps from..to.
static double losses_apart(const Trained *a, const Trained *ref, int from, int to) {
    double worst = 0;
    for (int step = from; step < to; step++) worst_of(&worst, fabs(a->losses[step] / ref->losses[step] - 1));
    return worst;
}

static void print_losses(const char *name, const Trained *a) {
    const double *l = a->losses;
    printf("  %s: loss of steps 1, 10, 50, 100: %.4f %.4f %.4f %.4f\n", name, l[0], l[9], l[49], l[99]);
}

static void test_gpu_training(void) {
    heading("training on the GPU");
    char error[ERROR_SIZE];
    size_t size = 0;
    unsigned char *text;
    if (file_read("train_sessa.c", &text, &size, error)) { check(0, "%s", error); return; }
    Trained cpu = trained_on(&cpu_backend, text, size);
    Trained fp32 = trained_on_gpu(FP32, text, size), fp32_again = trained_on_gpu(FP32, text, size);
    check_again(&fp32, &fp32_again);
    Trained tf32 = trained_on_gpu(TF32, text, size);
    Trained bf16_ = trained_on_gpu(BF16, text, size), bf16_again = trained_on_gpu(BF16, text, size);
    check_again(&bf16_, &bf16_again);
    print_losses("CPU", &cpu);
    print_losses("bf16", &bf16_);
    check_error(losses_apart(&fp32, &cpu, 0, 10), 1e-5,
                "fp32: losses of the first 10 steps against the CPU's");
    check_error(losses_apart(&fp32, &cpu, 10, STEPS), 1e-3, "fp32: losses up to step 100");
    check_error(losses_apart(&tf32, &cpu, 0, STEPS), 1e-2, "tf32: losses up to step 100");
    check_error(losses_apart(&bf16_, &cpu, 0, STEPS), 3e-2, "bf16: losses up to step 100");
    free(text);
    release();
}

// Memory grows as T, and what does not fit is refused.
static void test_gpu_memory(void) {
    heading("memory of the GPU");
    char error[ERROR_SIZE];
    double mib[5]; // at T 1024, 2048, .. 16384
    gpu.precision = BF16;
    for (int i = 0; i < 5; i++) {
        Config c = config_with(SESSA, 256, 128, 2, 4, 4, 1024 << i);
        Model *m = backend_gpu()->create(&c, 1, 1024 << i, TRAIN, error);
        mib[i] = m ? (m->bytes - 2 * WORKSPACE) / 0x1p20 : NAN;
        if (m) backend_gpu()->destroy(m);
    }
    printf("  MiB at T 1024, 2048, .. 16384: %.1f %.1f %.1f %.1f %.1f\n", mib[0], mib[1], mib[2], mib[3],
           mib[4]);
    if (gpu.tiles) // without tiles a panel holds all rows before
        check(mib[2] <= 2 * mib[1], "T doubled from 2048: memory at most doubled");
    check(mib[4] <= 2 * mib[3], "T doubled from 8192: memory at most doubled");
    Config huge = config_with(SESSA, 50000, 4096, 200, 4, 4, 8192);
    check(!backend_gpu()->create(&huge, 64, 8192, TRAIN, error) && strstr(error, "GiB"), "too large: %.90s",
          error);
}

// Token by token behind a prompt, wide enough for all paths of the decoder, against the C forward pass.
static void check_decode(Config c) {
    enum { PROMPT_LENGTH = 7 };
    char error[ERROR_SIZE];
    const Backend *backend = backend_gpu();
    int T = c.max_seq_len, V = c.vocab_size;
    Model *whole = create(&c, 1, T, EVALUATE), *stepwise = backend->create(&c, 1, T, GENERATE, error);
    if (!stepwise) { check(0, "%s", error); return; }
    int *ids = random_ids(T, V, 0);
    shake_weights(whole, 0.05);
    memcpy(backend->read(stepwise, PARAMS), whole->params, sizeof(real) * (size_t)whole->table.count);
    backend->write(stepwise, PARAMS);
    model_forward(whole, ids, ids, 1, T, no_dropout);
    precise worst = 0, *ref = zeros(V);
    real *logits = poison(V);
    for (int t = PROMPT_LENGTH - 1; t < T; t++) {
        Next next = {0, ids[t], t};
        const real *there = t == PROMPT_LENGTH - 1 ? backend->extend(stepwise, 0, ids, PROMPT_LENGTH, 0)
                                                   : backend->extend_each(stepwise, &next, 1);
        memcpy(logits, there, sizeof(real) * (size_t)V);
        for (int n = 0; n < V; n++) ref[n] = (double)whole->acts.logits[t * V + n];
        worst_of(&worst, error_of(logits, ref, V, 0));
    }
    check_error(worst, 0x1p-8 * (8 * 2 + 2), "D %d, H %d, G %d: logits of %d tokens, worst", c.d_model,
                c.n_heads, c.n_kv_heads, T - PROMPT_LENGTH);
    model_free(whole);
    backend->destroy(stepwise);
    release();
}

static void test_gpu_decode(void) {
    heading("bf16: token by token against one forward pass");
    check_decode(config_with(SESSA, 70, 128, 2, 4, 2, 300));
    check_decode(config_with(SESSA, 70, 66, 2, 3, 3, 300));
    check_decode(config_with(SESSA, 70, 64, 2, 1, 1, 300));
    check_decode(config_with(ATTENTION, 70, 96, 2, 4, 1, 300));
}

int main(int argc, char **argv) {
    char no_gpu[ERROR_SIZE];
    int layers_alone = argc == 2 && !strcmp(argv[1], "layers");
    begin(argv);
    go_to_data();
    if (gpu_open(no_gpu)) { fprintf(stderr, "test_kernels: %s\n", no_gpu); return 1; }
#ifdef LATE_WARPS
    gpu.processors = 2; // blocks that stay have many pieces of work, one behind the other
#endif
    gpu.precision = FP32;
    CUDA(cudaEventCreate(&lists_gone));
    if (argc == 4 && !strcmp(argv[1], "tiles")) {
        test_random_tiles((uint64_t)atoll(argv[2]), atoi(argv[3]));
        test_nearest(gpu.hopper ? 48 : 2, 300); // on Hopper one block's march, and a cluster's
        test_nearest(1, gpu.hopper ? 2500 : 600);
        test_gpu_loss_alone();
        return report();
    }
    if (argc == 2 && !strcmp(argv[1], "tiles")) {
        gpu.precision = BF16;
        test_gpu_tiles();
        return report();
    }
    test_gpu_layers<float>("fp32: layers against the C functions, shapes odd and even");
    plain = 1;
    test_gpu_layers<float>("fp32: plain layers");
    gpu.precision = BF16;
    test_gpu_layers<bf16>("bf16: plain layers");
    test_peaked();
    plain = 0;
    test_gpu_layers<bf16>("bf16: layers against the C functions, shapes odd and even");
    if (layers_alone) return report();
    test_gpu_tiles();
    test_peaked();
    test_nearest(48, 300);
    test_nearest(1, 3000);
    test_gpu_passes();
    test_gpu_loss_alone();
    test_gpu_update();
    test_gpu_training();
    test_gpu_memory();
    test_gpu_decode();
    check(n_broken == 0 && n_bands > 0, "nothing was written behind any buffer");
    return report();
}
