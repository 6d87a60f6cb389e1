/*
Several GPUs that train one model, a process each: what train_sessa.cu asks of the others. Included there, behind
the model; where the ranks come from stands in ranks.h, how they exchange in nccl.cuh.

    exchange_layers, exchange_embedding    gradients: each rank is given the sums of its share of every range
    exchange_squares                       their squares, so that the norm is one number
    exchange_weights                       what each rank has updated, for all
    gather_moments, take_moments           a block of all ranks' moments, for files
    wait_for_gpu                           no longer than --timeout
    run_gpus                               the program, in as many processes as it is told

A range is what goes at once: from the embedding on, as many layers as make 8 MiB; the layers whose new weights are
given late begin another. In the device's block it is padded to whole units of 64 numbers a rank, and rank r has
the r-th part of each. Everything between ranks goes in one stream, gpu.exchange, in the same order on all of them,
and nothing of it into a recording.
*/

// One way to exchange. All of it goes in gpu.exchange, all ranks call it, in the same order.
typedef struct {
    int (*prepare)(char *error); // this rank alone
    int (*open)(char *error);    // FAILED on all, or on none
    void (*close)(void);
    void (*check)(void);                     // ends the program if the exchange has failed
    int64_t (*room)(int64_t numbers);        // that reduce needs for shares of so many numbers
    int (*processors)(void);                 // of the GPU, that it takes
    // the ranks' numbers of a range, added up in their order: each is given its share of the sums
    void (*reduce)(float *block, int range, float *room);
    void (*spread)(float *block, int from, int end); // each one's share of these ranges, for all
    void (*tell)(double *rows);                      // (ranks) each one's number, for all; in the device's memory
} Exchange;
static const Exchange *exchange_by; // NULL: a build that knows none. Alone: job.ranks is 0

static int64_t share_of(int range) { return (division.begin[range + 1] - division.begin[range]) / job.ranks; }

#include "shared.h"
#ifdef SESSA_NCCL
#include "nccl.cuh"
#endif

// ----------------------------------------------------------------------------
// through the memory that processes of one machine share: for tests, where ranks share a card

static float *of_host; // a block

static int through_memory_prepare(char *error) {
    of_host = (float *)calloc((size_t)division.begin[division.n_ranges], sizeof(float));
    return of_host ? 0 : fail(error, NULL, "out of memory");
}
static int through_memory_open(char *error) { return make_shared(1, error); }
static void through_memory_close(void) {
    if (shared.memory) free_shared();
    free(of_host);
    of_host = NULL;
}
// Numbers of the device's block, to the host's or back, when all that was asked for before is done.
static void copy_part(float *block, int64_t from, int64_t count, cudaMemcpyKind way) {
    float *ends[] = {of_host + from, block + from};
    int back = way == cudaMemcpyDeviceToHost;
    CUDA(cudaMemcpyAsync(ends[!back], ends[back], sizeof(float) * (size_t)count, way, gpu.exchange));
    CUDA(cudaStreamSynchronize(gpu.exchange));
}
static void through_memory_reduce(float *block, int range, float *) {
    int64_t begin = division.begin[range], share = share_of(range);
    copy_part(block, begin, share * job.ranks, cudaMemcpyDeviceToHost);
    reduce_range(of_host, range);
    copy_part(block, begin + job.rank * share, share, cudaMemcpyHostToDevice);
}
static void through_memory_spread(float *block, int from, int end) {
    for (int range = from; range < end; range++) {
        int64_t begin = division.begin[range], share = share_of(range);
        copy_part(block, begin + job.rank * share, share, cudaMemcpyDeviceToHost);
        spread_range(of_host, range);
        copy_part(block, begin, share * job.ranks, cudaMemcpyHostToDevice);
    }
}
static void through_memory_tell(double *rows) {
    double *all = (double *)calloc((size_t)job.ranks, sizeof(double));
    if (!all) stop_program("out of memory");
    CUDA(cudaMemcpyAsync(all + job.rank, rows + job.rank, sizeof(double), cudaMemcpyDeviceToHost, gpu.exchange));
    CUDA(cudaStreamSynchronize(gpu.exchange));
    gather_rows(all, 1);
    size_t bytes = sizeof(double) * (size_t)job.ranks;
    CUDA(cudaMemcpyAsync(rows, all, bytes, cudaMemcpyHostToDevice, gpu.exchange));
    CUDA(cudaStreamSynchronize(gpu.exchange));
    free(all);
}
static void never_fails(void) {}
static int64_t no_room(int64_t) { return 0; }
static int no_processors(void) { return 0; }
static const Exchange through_memory = {through_memory_prepare, through_memory_open, through_memory_close,
                                        never_fails,            no_room,             no_processors,
                                        through_memory_reduce,  through_memory_spread, through_memory_tell};

// ----------------------------------------------------------------------------
// what the twin asks

static int gpu_of_rank(int devices) { return job.local % devices; }
static int processors_of_exchange(void) { return exchange_by && job.ranks ? exchange_by->processors() : 0; }

// How many ranks share a model of this mode; 0: it is this one's alone.
static int sharers(Mode mode) { return mode == TRAIN && exchange_by ? job.ranks : 0; }

// Numbers that a range has at least. 8 MiB take NCCL's 8 channels 45 µs, a message 10 to 20.
static int64_t least_range(void) {
    int least = number_from("SESSA_TEST_RANGE"); // for tests
    return least > 0 ? least : 2 << 20;
}

// Waits for the device, whose work may wait for other ranks.
static void wait_for_gpu(cudaEvent_t event) {
    if (!job.ranks) return CUDA(cudaEventSynchronize(event));
    double last = seconds(), waited = 0;
    for (;;) {
        cudaError_t code = cudaEventQuery(event);
        if (code == cudaSuccess) return;
        if (code != cudaErrorNotReady) CUDA(code);
        cudaGetLastError(); // "not ready" is no error
        double now = seconds();
        waited += now - last < 1 ? now - last : 1; // a program that was stopped has not waited
        last = now;
        if (exchange_by) exchange_by->check();
        if (waited > job.timeout) call_roll();
        sched_yield();
    }
}
// For all that gpu.stream was given, where others take part in it.
static void wait_for_others(void) {
    static cudaEvent_t so_far;
    if (!job.ranks) return;
    if (!so_far) CUDA(cudaEventCreateWithFlags(&so_far, cudaEventDisableTiming));
    CUDA(cudaEventRecord(so_far, gpu.stream));
    wait_for_gpu(so_far);
}

// Numbers of memory of its own that the exchange of gradients takes: none where it fits into the logits, which are
// free by then.
template <typename X> static int64_t exchange_room(const ModelGPU<X> *m) {
    int64_t most = 0, logits = (int64_t)m->host.B * m->host.T * round_up(m->host.config.vocab_size, 8);
    for (int range = 0; m->ranks && range < m->n_ranges; range++) {
        int64_t share = (m->begins[range + 1] - m->begins[range]) / m->ranks;
        if (share > most) most = share;
    }
    int64_t room = m->ranks ? exchange_by->room(most) : 0;
    return room > logits * (int64_t)sizeof(X) / (int64_t)sizeof(float) ? room : 0;
}
template <typename X> static float *room_of_exchange(ModelGPU<X> *m) {
    return exchange_room(m) ? m->received : (float *)m->acts.logits;
}

// The device's block as a table of ranges, shared out; and the list of this rank's units.
template <typename X> static int divide_gpu(ModelGPU<X> *m) {
    int L = m->host.config.n_layers;
    Table ranges;
    memset(&ranges, 0, sizeof(ranges));
    for (int range = 0; range < m->n_ranges; range++)
        add_tensor(&ranges, NULL, range - 1, range ? "all" : "wte.weight", 1,
                   m->begins[range + 1] - m->begins[range], 1, 1);
    int failed = ranges.incomplete || divide(&division, &ranges, m->n_ranges - 1, job.ranks, 64);
    free(ranges.rows);
    int *units = (int *)malloc(sizeof(int) * (size_t)(m->held / 64));
    m->layer_there = (cudaEvent_t *)calloc((size_t)L, sizeof(cudaEvent_t));
    if (failed || !units || !m->layer_there) {
        free(units);
        return FAILED;
    }
    for (int p = 0; p < division.n; p++) {
        const Piece *piece = &division.pieces[p];
        for (int64_t i = 0; piece->rank == job.rank && i < piece->count; i += 64)
            units[(piece->place + i) / 64] = (int)((piece->offset + i) / 64);
    }
    CUDA(cudaMemcpy((void *)m->units, units, sizeof(int) * (size_t)(m->held / 64), cudaMemcpyHostToDevice));
    free(units);
    for (int l = 0; l < L; l++)
        CUDA(cudaEventCreateWithFlags(&m->layer_there[l], cudaEventDisableTiming));
    return 0;
}

// Whether all ranks are ready: else the line of the first that is not, on all of them.
static int all_are_ready(int ready, char *error) {
    typedef struct {
        int ready;
        char line[400];
    } Row;
    Row *rows = (Row *)calloc((size_t)job.ranks, sizeof(Row));
    if (!rows) stop_program("out of memory");
    rows[job.rank].ready = ready;
    if (!ready) snprintf(rows[job.rank].line, sizeof(rows[0].line), "%s", error);
    gather_bytes(rows, sizeof(Row), 0);
    int first = 0, failed = 0;
    while (first < job.ranks && rows[first].ready) first++;
    if (first < job.ranks) failed = fail(error, NULL, "rank %d: %s", first, rows[first].line);
    free(rows);
    return !failed;
}

// Gives the ranks their model: all of them call it, with m NULL where there is none, and the line of that in
// `error`. Returns m, NULL on all of them where one has none.
template <typename X> static Model *share_out(ModelGPU<X> *m, char *error) {
    size_t before = 0, after = 0, all = 0;
    int ready = m != NULL;
    if (ready && divide_gpu(m)) ready = !fail(error, NULL, "out of memory");
    if (ready) ready = !exchange_by->prepare(error);
    if (ready) CUDA(cudaMemGetInfo(&before, &all));
    if (all_are_ready(ready, error) && !exchange_by->open(error)) {
        CUDA(cudaMemGetInfo(&after, &all));
        if (before > after && exchange_by != &through_memory) m->host.bytes += (double)(before - after);
        return &m->host;
    }
    if (m) model_free_gpu<X>(&m->host);
    return NULL;
}
template <typename X> static void exchange_close(ModelGPU<X> *m) {
    if (!m->ranks) return;
    for (int l = 0; m->layer_there && l < m->host.config.n_layers; l++)
        if (m->layer_there[l]) cudaEventDestroy(m->layer_there[l]);
    free(m->layer_there);
    exchange_by->close();
    division_free(&division);
}

// The gradients of layer l are there once these launches are done; also where they are recorded.
template <typename X> static void layer_is_behind(ModelGPU<X> *m, int l) {
    if (!m->ranks) return;
    cudaStreamCaptureStatus recorded;
    cudaStream_t stream = beside(W_IN_GRADIENT); // behind that branch too
    CUDA(cudaStreamIsCapturing(stream, &recorded));
    if (recorded == cudaStreamCaptureStatusNone) CUDA(cudaEventRecord(m->layer_there[l], stream));
    else CUDA(cudaEventRecordWithFlags(m->layer_there[l], stream, cudaEventRecordExternal));
}
// From the last range to the first but one, as soon as the layers of each are there.
template <typename X> static void exchange_layers(ModelGPU<X> *m) {
    for (int l = m->host.config.n_layers - 1; m->ranks && l >= 0 && m->ranges[l]; l--) {
        int is_first = !l || m->ranges[l - 1] < m->ranges[l];
        CUDA(cudaStreamWaitEvent(gpu.exchange, m->layer_there[l], 0));
        if (is_first) exchange_by->reduce(m->grads, m->ranges[l], room_of_exchange(m));
    }
}
// And the layers of its range.
template <typename X> static void exchange_embedding(ModelGPU<X> *m) {
    if (!m->ranks) return;
    follow(gpu.exchange, gpu.stream);
    exchange_by->reduce(m->grads, 0, room_of_exchange(m));
}

// norm[2 + r]: the squares of rank r's share.
template <typename X> static void exchange_squares(ModelGPU<X> *m) {
    if (!m->ranks) return;
    follow(gpu.stream, gpu.exchange);
    sum_gpu<1>(m->norm + 2 + job.rank, m->grads, m->units, m->held, gpu.stream);
    follow(gpu.exchange, gpu.stream);
    exchange_by->tell(m->norm + 2);
    follow(gpu.stream, gpu.exchange);
}

// What each rank has updated of the ranges from .. end-1 in `stream`, which goes on with the weights of all.
template <typename X> static void exchange_weights(ModelGPU<X> *m, int from, int end, cudaStream_t stream) {
    if (!m->ranks) return;
    int64_t begin = m->begins[from], count = m->begins[end] - begin;
    follow(gpu.exchange, stream);
    exchange_by->spread(m->params, from, end);
    if (sizeof(X) == sizeof(bf16))
        copy_gpu(m->copy + begin, 64, m->params + begin, (int)(count / 64), 64, gpu.exchange);
    follow(stream, gpu.exchange);
}

// All ranks' moments, in the place of the gradients; and back.
template <typename X> static void copy_share(ModelGPU<X> *m, float *share, int back) {
    for (int p = 0; p < division.n; p++) {
        const Piece *piece = &division.pieces[p];
        float *ends[] = {m->grads + piece->offset, share + piece->place};
        if (piece->rank == job.rank)
            CUDA(cudaMemcpyAsync(ends[back], ends[!back], sizeof(float) * (size_t)piece->count,
                                 cudaMemcpyDeviceToDevice, gpu.stream));
    }
}
template <typename X> static void gather_moments(ModelGPU<X> *m, float *share) {
    copy_share(m, share, 0);
    follow(gpu.exchange, gpu.stream);
    exchange_by->spread(m->grads, 0, division.n_ranges);
    follow(gpu.stream, gpu.exchange);
    wait_for_others();
    if (job.ranks > 1) meet_again(); // nobody's process ends while another still reads from its card
}
template <typename X> static void take_moments(ModelGPU<X> *m, float *share) { copy_share(m, share, 1); }

// ----------------------------------------------------------------------------
// the program

static const Backend *of_one_gpu;
static Backend of_a_rank(void) { return *of_one_gpu; }

// SESSA_TEST_EXCHANGE, for tests: "shared", ranks share a card; "nccl", the one rank that there is exchanges, and
// what is its own stays; "itself", it sends all of it to itself.
static int run_gpus(int argc, char **argv, const Backend *backend) {
    const char *test = getenv("SESSA_TEST_EXCHANGE");
    of_one_gpu = backend;
    if (test && !strcmp(test, "shared")) exchange_by = &through_memory;
#ifdef SESSA_NCCL
    else exchange_by = &through_nccl;
    nccl.to_itself = test && !strcmp(test, "itself");
    if (test && (nccl.to_itself || !strcmp(test, "nccl"))) {
        char error[ERROR_SIZE];
        job.ranks = 1;
        job.timeout = job.patience = 600;
        if (!job_allocate(&job, backend->name, error)) {
            number_hosts();
            return run_program(argc, argv, backend);
        }
    }
#endif
    return exchange_by ? run_in_ranks(argc, argv, backend, of_a_rank) : run_program(argc, argv, backend);
}
