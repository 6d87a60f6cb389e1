// generation: one token behind those that every layer knows, in five launches a layer. Its place is in the
// device's memory, so that all launches are one recording.

// weight (rows,D) times vec, which begin(vec, shared) puts into shared memory once a block. A warp takes
// two neighbouring rows; end(row, sum, vec, shared) is given their products. more: bytes behind vec.
template <int V, typename X, typename Begin, typename End>
__global__ void __launch_bounds__(128) decode_kernel(const X *weight, int rows, int D, Begin begin, End end) {
    extern __shared__ float vec[];
    __shared__ float shared[32];
    int row = 2 * (blockIdx.x * 4 + threadIdx.x / 32);
    for (int r = row; r < row + 2 && r < rows; r++) // on their way to the L2 cache
        for (int i = threadIdx.x % 32 * 64; i < D; i += 32 * 64)
            prefetch_l2(weight + (int64_t)r * D + i);
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
static void decode(const X *weight, int rows, int D, int more, int extra_blocks, cudaStream_t stream,
                   Begin begin, End end) {
    int blocks = (rows + 7) / 8 + extra_blocks, bytes = D * (int)sizeof(float) + more;
    LAUNCH((wide({D}, {weight}) ? decode_kernel<8, X, Begin, End> : decode_kernel<1, X, Begin, End>), blocks,
           128, bytes, stream, weight, rows, D, begin, end);
}

// [9, 10, 11], and the last LayerNorm with the head: out = W LayerNorm(x) + b, and GELU on the first `gelu`
// rows
template <typename X, typename O>
static void decode_in_gpu(O *out, const float *x, const float *ln_weight, const float *ln_bias,
                          const X *weight, const X *bias, int rows, int D, int gelu, cudaStream_t stream) {
    decode(weight, rows, D, 0, 0, stream, [=] __device__ (float *vec, float *shared) {
        float sum = 0, squares = 0;
        for (int i = threadIdx.x; i < D; i += 128) sum += vec[i] = x[i];
        float m = block_sum(sum, shared) / D;
        for (int i = threadIdx.x; i < D; i += 128) squares += (vec[i] - m) * (vec[i] - m);
        float r = 1 / sqrtf(block_sum(squares, shared) / D + 1e-5f);
        for (int i = threadIdx.x; i < D; i += 128)
            vec[i] = get(to<X>((vec[i] - m) * r * ln_weight[i] + ln_bias[i]));
    }, [=] __device__ (int row, float2 sum, const float *, const float *) {
        for (int r = row; r < row + 2 && r < rows; r++) {
            float v = (r == row ? sum.x : sum.y) + (bias ? get(bias[r]) : 0);
            out[r] = to<O>(r < gelu ? gelu_gpu(get(to<X>(v))) : v);
        }
    });
}
// [14, 18]: the projections of ā, turned by RoPE, to their place in the cache; the block after the last
// row: the gain
template <typename X>
static void decode_projections_gpu(X *proj, float *gamma, const X *abar, const X *weight, const X *bias,
                                   const float *gamma_weight, const float *gamma_bias, float gamma_max,
                                   Rope rope, const int *first, int rows, int D, int turned,
                                   cudaStream_t stream) {
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

// [15, 16, 17, 19]: the rows are dealt to `splits` blocks a head, and to as many blocks as all heads have
// for the feedback, a head of its own, D wide, over the strict past, with s for values. A block leaves its
// maximum, its Σ e and its Σ e v, part_size numbers.
enum { DECODE_KEYS = 64, DECODE_THREADS = 256 };
static int decode_splits(int H) { return H > 192 ? 1 : 192 / H; }

// weight[j] = scale q·k_j of n keys, the others -INFINITY: `lanes` threads a key, ROUNDS keys of theirs at
// once
template <int V, int ROUNDS, typename X>
__device__ inline void decode_logits(float *weight, const X *q, const X *k, int64_t ld, int n, int width,
                                     int lanes, float scale) {
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
__global__ void decode_attention_kernel(float *parts, const X *proj, const X *s, const int *first, int E,
                                        int D, int H, int G, int splits) {
    extern __shared__ float sums[]; // for each group of threads that spans the width
    __shared__ float weight[DECODE_KEYS];
    wait_for_results();
    int d = D / H, head = blockIdx.x / splits, feedback = head >= H, width = feedback ? D : d, lanes = 1,
        part = feedback ? blockIdx.x - H * splits : blockIdx.x % splits, all = feedback ? H * splits : splits,
        t = *first, keys = t + !feedback, ld = feedback ? D : E, kv = head / (H / G) * d;
    const X *q = proj + (int64_t)t * E + (feedback ? E - 2 * D : head * d),
            *k = proj + (feedback ? E - D : D + kv), *v = feedback ? s : proj + D + G * d + kv;
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
                 group = threadIdx.x / (pieces < DECODE_THREADS ? pieces : DECODE_THREADS);
             piece < pieces && group < groups; piece += DECODE_THREADS) {
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
static void decode_attention_gpu(float *parts, const X *proj, const X *s, const int *first, int E, int D,
                                 int H, int G, int feedback, int splits, cudaStream_t stream) {
    int width = feedback ? D : D / H, floats = width > 8 * DECODE_THREADS ? width : 8 * DECODE_THREADS;
    LAUNCH((wide({D, D / H, E}, {proj, s}) ? decode_attention_kernel<8, X> : decode_attention_kernel<1, X>),
           (1 + feedback) * H * splits, DECODE_THREADS, floats * (int)sizeof(float), stream, parts, proj, s,
           first, E, D, H, G, splits);
}

// The direct read f = W_o o, [19-22] s = f + γ c and the gate: the parts of o, and of c, come together on
// the way. plain: no W_o, f = o
template <typename X>
static void decode_mix_gpu(X *s, X *gated, const float *parts, const float *gamma, const X *weight,
                           const X *g, const int *first, int D, int H, int splits, int feedback, int plain,
                           cudaStream_t stream) {
    int more = (1 + feedback) * H * splits * (int)sizeof(float);
    decode(weight, D, D, more, 0, stream, [=] __device__ (float *vec, float *shared) {
        float *factor = vec + D;
        int d = D / H, all = H * splits;
        // a warp: e^(max - top)/Σ of a head's parts
        for (int head = threadIdx.x / 32; head < H + feedback; head += 4) {
            int begin = head * splits, n = head < H ? splits : all;
            float top = -INFINITY, sum = 0;
            for (int p = threadIdx.x % 32; p < n; p += 32)
                top = fmaxf(top, parts[(int64_t)(begin + p) * (D + 2)]);
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
        // c of the warp's rows, to be read by its first lane
        int row = 2 * (blockIdx.x * 4 + threadIdx.x / 32);
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
static void decode_out_gpu(float *x, const X *gated, const X *weight, const X *bias, int D,
                           cudaStream_t stream) {
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

template <typename X> static void hidden_decode_gpu(ModelGPU<X> *m, cudaStream_t stream) {
    const Config *c = &m->host.config;
    int D = c->d_model, H = c->n_heads, G = c->n_kv_heads, d = D / H, E = proj_width(c),
        feedback = c->mixer == SESSA, splits = decode_splits(H);
    const int *first = &m->inputs->first;
    float *x = m->acts.residual, *parts = borrow(m->acts.scratch, decode_parts(D, H) + c->vocab_size);
    Rope rope = {m->acts.cosine, m->acts.sine, m->host.T, d / 2, 0, 1};
    embedding_dropout_forward_gpu(x, m->inputs->ids, m->weights.wte, mask_of(NULL, 0, 0), 1, 1, D, stream);
    for (int l = 0; l < c->n_layers; l++) {
        LayerWeights *w = &m->weights.layers[l];
        LayerActivationsGPU<X> *a = &m->acts.layers[l];
        decode_in_gpu(a->ag, x, w->ln_weight, w->ln_bias, as_x(m, w->W_in), as_x(m, w->b_in), 2 * D, D, D,
                      stream);
        decode_projections_gpu(a->proj, a->gamma, a->ag, as_x(m, w->W_proj), as_x(m, w->b_proj),
                               w->gamma_weight, w->gamma_bias, (float)c->gamma_max, rope, first, E, D,
                               c->no_rope ? 0 : (H + G) * d, stream);
        decode_attention_gpu(parts, a->proj, a->s, first, E, D, H, G, feedback, splits, stream);
        decode_mix_gpu(a->s, a->gated, parts, a->gamma, as_x(m, w->W_o ? w->W_o : w->W_out), a->ag + D, first,
                       D, H, splits, feedback, !w->W_o, stream);
        decode_out_gpu(x, a->gated, as_x(m, w->W_out), as_x(m, w->b_out), D, stream);
    }
    decode_in_gpu(parts + decode_parts(D, H), x, m->weights.ln_f_weight, m->weights.ln_f_bias,
                  as_x(m, m->weights.wte), (const X *)NULL, c->vocab_size, D, 0, stream);
}
