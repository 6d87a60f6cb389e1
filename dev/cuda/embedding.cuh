// Which rows a token's gradient sums, sorted by token and cut into segments of at most SEGMENT rows.
// `lists`, in the host's memory, holds 4N + 2 numbers: order (N), the segments' beginnings in it, the
// tokens, each token's first segment.
enum { SEGMENT = 32 };
typedef struct { int segments, tokens; } TokenLists;
// starts: scratch (V+1)
static TokenLists sort_tokens(int *lists, int *starts, const int *inp, int N, int V) {
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

// embedding_backward: a thread takes 8 columns of a segment and sums its rows, then 8 columns of a token
// and sums its segments, whose sums lie in scratch: (segments,D). The host sorts the tokens while the
// device is on its way back to them.
static void embedding_backward_fast(float *dwte, Scratch scratch, const float *dout, Tokens tokens, int D,
                                    cudaStream_t stream) {
    int N = tokens.N;
    size_t bytes = sizeof(int) * (4 * (size_t)N + 2);
    CUDA(cudaEventSynchronize(tokens.there)); // the lists of the batch before have gone
    TokenLists t = sort_tokens(tokens.host_lists, tokens.starts, tokens.host, N, tokens.V);
    CUDA(cudaMemcpyAsync(tokens.lists, tokens.host_lists, bytes, cudaMemcpyHostToDevice, stream));
    CUDA(cudaEventRecord(tokens.there, stream));
    float *partial = borrow(scratch, (int64_t)t.segments * D);
    const int *order = tokens.lists, *begins = order + N, *token = begins + N + 1, *first = token + N;
    int in_eights = wide({D}, {dwte, partial, dout});
    auto add_row = [=] __device__ (auto V, float *sum, const float *row) {
        float v[V];
        read_some<V>(v, row);
        for (int e = 0; e < V; e++) sum[e] += v[e];
    };
    each(t.segments, D, in_eights, stream, [=] __device__ (auto V, int segment, int i) {
        float sum[V] = {};
        for (int n = begins[segment]; n < begins[segment + 1]; n++)
            add_row(V, sum, dout + (int64_t)order[n] * D + i);
        write_some<V>(partial + (int64_t)segment * D + i, sum);
    });
    each(t.tokens, D, in_eights, stream, [=] __device__ (auto V, int which, int i) {
        float sum[V] = {}, *out = dwte + (int64_t)token[which] * D + i;
        for (int segment = first[which]; segment < first[which + 1]; segment++)
            add_row(V, sum, partial + (int64_t)segment * D + i);
        add_row(V, sum, out);
        write_some<V>(out, sum);
    });
}
