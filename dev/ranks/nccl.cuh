/*
The exchange between GPUs by NCCL, which carries and does not add: a rank sends each share of its gradients to the
one who adds it up, in rank order, in a kernel of ours. So the bits of a sum depend on the ranks and their machines
alone, not on NCCL's version, algorithm, channels or topology. Its reduce-scatter carries the same bytes.

Of the ranks of a machine one, the porter, adds up what they have of a share; of the rank's own machine that is the
rank itself. It then sends the machine's sum to the rank, who adds the machines' sums in their order: a network
carries each number once a machine, and all of its adapters have as much.

What a machine's rank i carries of 2 machines with 2 ranks, shares by number of their rank:

    machine 0:   rank 0 adds up 0 and 2, rank 1 adds up 1 and 3         then 2 → rank 2, 3 → rank 3
    machine 1:   rank 2 adds up 0 and 2, rank 3 adds up 1 and 3         then 0 → rank 0, 1 → rank 1
*/
#include <dlfcn.h>
#include <nccl.h>

// Its functions are looked for when they are needed: a program on one GPU does without the library.
#define NCCL_FUNCTIONS(F)                                                                                       \
    F(GetVersion) F(GetErrorString) F(GetUniqueId) F(CommInitRankConfig) F(CommGetAsyncError) F(GroupStart)     \
    F(GroupEnd) F(Send) F(Recv) F(AllGather)
static struct {
#define FUNCTION(name) decltype(&nccl##name) name;
    NCCL_FUNCTIONS(FUNCTION)
#undef FUNCTION
    ncclComm_t all;
    int to_itself;           // a test's one rank sends to itself what is its own
    int *members, n, mine;   // (n) the ranks of this machine, this one's number among them
    int *porters;            // (ranks) of each rank's share on this machine
    int *carried, n_carried; // shares that this rank adds up for its machine, its own among them
    int *of_hosts;           // (n_hosts) the porters of this rank's share
    double checked;          // seconds() when
} nccl;

static void nccl_check(ncclResult_t code, const char *what, int line) {
    if (code != ncclSuccess) stop_program("NCCL: %s (%s, line %d)", nccl.GetErrorString(code), what, line);
}
#define NCCL(call) nccl_check(nccl.call, #call, __LINE__)

// FAILED and the line where it is not there.
static int nccl_load(char *error) {
#ifdef SESSA_EMULATED
#define FUNCTION(name) nccl.name = &nccl##name;
    NCCL_FUNCTIONS(FUNCTION)
#undef FUNCTION
    (void)error;
#else
    static const char name_of_library[] = "libnccl.so.2";
    void *library = dlopen(name_of_library, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return fail(error, NULL, "NCCL, which several GPUs need, is not found: %.300s (LD_LIBRARY_PATH)", dlerror());
#define FUNCTION(name) \
    if (!(nccl.name = (decltype(&nccl##name))dlsym(library, "nccl" #name))) \
        return fail(error, NULL, "%s has no nccl" #name, name_of_library);
    NCCL_FUNCTIONS(FUNCTION)
#undef FUNCTION
#endif
    return 0;
}

// Who adds up what `host` has of the share of rank `owner`.
static int porter(int host, int owner) {
    int place = 0, n = 0;
    for (int r = 0; r < owner; r++) place += job.hosts[r] == job.hosts[owner];
    for (int r = 0; r < job.ranks; r++) n += job.hosts[r] == host;
    int wanted = place % n, r = 0;
    for (;; r++)
        if (job.hosts[r] == host && wanted-- == 0) return r;
}

// Who sends what to whom. FAILED: no memory.
static int nccl_plan(void) {
    int host = job.hosts[job.rank], **lists[] = {&nccl.members, &nccl.porters, &nccl.carried, &nccl.of_hosts};
    if (nccl.n) return 0;
    for (int i = 0; i < 4; i++)
        if (!(*lists[i] = (int *)calloc((size_t)job.ranks, sizeof(int)))) return FAILED;
    for (int r = 0; r < job.ranks; r++) {
        nccl.porters[r] = porter(host, r);
        if (nccl.porters[r] == job.rank) nccl.carried[nccl.n_carried++] = r;
        if (r == job.rank) nccl.mine = nccl.n;
        if (job.hosts[r] == host) nccl.members[nccl.n++] = r;
    }
    for (int h = 0; h < job.n_hosts; h++) nccl.of_hosts[h] = porter(h, job.rank);
    return 0;
}

// NCCL connects ranks when they first send to each other, and waits for them: not for ever. Rank 0 tells it.
static void nccl_limit(const char *doing) {
    job.doing = doing;
    job.until = seconds() + job.timeout + (job.rank ? 12 : 10);
}
static void nccl_group_end(void) {
    nccl_limit("what NCCL sends");
    NCCL(GroupEnd());
    job.until = 0;
}

// Multiprocessors: NCCL's channels are blocks that stay. 8 carry about 180 GB/s over NVLink.
static int nccl_processors(void) {
    int most = number_from("NCCL_MAX_CTAS"), channels = number_from("NCCL_MAX_NCHANNELS");
    return most > 0 ? most : channels > 0 ? channels : 8;
}

// What the ranks must know of each other before NCCL connects them.
typedef struct {
    int version;
    char device[32];
} Card;

// Two ranks of a machine on one GPU: NCCL does not take them. FAILED and the line.
static int nccl_check_cards(const Card *cards, char *error) {
    for (int r = 0; r < job.ranks; r++)
        for (int other = 0; other < r; other++)
            if (job.hosts[r] == job.hosts[other] && !strcmp(cards[r].device, cards[other].device))
                return fail(error, NULL, "ranks %d and %d have one GPU, %s: a machine takes as many ranks as it "
                            "has GPUs", other, r, cards[r].device);
    for (int r = 1; r < job.ranks; r++)
        if (cards[r].version != cards[0].version)
            return fail(error, NULL, "rank %d has version %d of NCCL, rank 0 has %d", r, (int)cards[r].version,
                        (int)cards[0].version);
    return 0;
}

static int nccl_prepare(char *error) {
    if (nccl_load(error)) return FAILED;
    return nccl_plan() ? fail(error, NULL, "out of memory") : 0;
}
static int nccl_open(char *error) {
    ncclUniqueId id;
    Card *cards = (Card *)calloc((size_t)job.ranks, sizeof(Card));
    if (!cards) stop_program("out of memory");
    CUDA(cudaDeviceGetPCIBusId(cards[job.rank].device, sizeof(cards->device), gpu.device));
    NCCL(GetVersion(&cards[job.rank].version));
    gather_bytes(cards, sizeof(Card), 0);
    int failed = nccl_check_cards(cards, error);
    free(cards);
    if (failed) return FAILED;
    memset(&id, 0, sizeof(id));
    if (!job.rank) NCCL(GetUniqueId(&id));
    tell_all(&id, sizeof(id));
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.maxCTAs = nccl_processors();
    nccl_limit("NCCL's meeting of the ranks");
    NCCL(CommInitRankConfig(&nccl.all, job.ranks, id, job.rank, &config));
    job.until = 0;
    return 0;
}
// The communicator ends with the process: ncclCommDestroy waits for the machine's other ranks, and one that has
// failed may be the only one that comes here.
static void nccl_close(void) {
    int **lists[] = {&nccl.members, &nccl.porters, &nccl.carried, &nccl.of_hosts};
    for (int i = 0; i < 4; i++) {
        free(*lists[i]);
        *lists[i] = NULL;
    }
    nccl.n = nccl.n_carried = 0;
}

// A network that fails says so while others wait.
static void nccl_look(void) {
    ncclResult_t problem = ncclSuccess;
    double now = seconds();
    if (!nccl.all || now - nccl.checked < 0.1) return;
    nccl.checked = now;
    NCCL(CommGetAsyncError(nccl.all, &problem));
    if (problem != ncclInProgress) nccl_check(problem, "the exchange", __LINE__);
}

// Whether a machine's ranks add up at all. Of one rank alone the gradients are the machine's sums, where they are.
static int nccl_adds(void) { return nccl.n > 1 || nccl.to_itself; }

// The room for reduce, in shares: what each member has of each share that this rank carries; the machine's sums of
// these; and the machines' sums of its own.
static int64_t nccl_room(int64_t share) {
    if (nccl_plan()) stop_program("out of memory");
    int several = job.n_hosts > 1, of_members = nccl_adds() ? nccl.n + several : 0;
    return share * ((int64_t)nccl.n_carried * of_members + (several ? job.n_hosts : 0));
}

// out = x_0 + x_1 + ... + x_n-1, in this order. x_r (share) is the r-th of parts, x_mine is own. out may be own.
static void add_ranks_gpu(float *out, const float *own, const float *parts, int n, int mine, int64_t share,
                          cudaStream_t stream) {
    each(share / 64, 64, 1, stream, [=] __device__ (auto SPAN, int row, int i) {
        int64_t at = 64 * (int64_t)row + i;
        auto part = [&](int r) { return read<SPAN>((r == mine ? own : parts + r * share) + at); };
        Pack<SPAN> sum = part(0);
        for (int r = 1; r < n; r++) sum += part(r);
        write(out + at, sum);
    });
}

// Where the machine's sum of the c-th share is that this rank carries: in the gradients, where it is the only one
// or there is but one machine; else in `sums`.
static float *nccl_sum(float *begin, float *sums, int c, int64_t share) {
    return nccl_adds() && job.n_hosts > 1 ? sums + c * share : begin + nccl.carried[c] * share;
}

// Each machine's sums of its ranks, at their porters.
static void nccl_reduce_members(float *begin, float *parts, float *sums, int64_t share) {
    int mine = nccl.to_itself ? -1 : nccl.mine;
    size_t n = (size_t)share;
    NCCL(GroupStart());
    for (int r = 0; r < job.ranks; r++)
        if (nccl.porters[r] != job.rank || nccl.to_itself)
            NCCL(Send(begin + r * share, n, ncclFloat, nccl.porters[r], nccl.all, gpu.exchange));
    for (int c = 0; c < nccl.n_carried; c++)
        for (int i = 0; i < nccl.n; i++)
            if (i != mine)
                NCCL(Recv(parts + ((int64_t)c * nccl.n + i) * share, n, ncclFloat, nccl.members[i], nccl.all,
                          gpu.exchange));
    nccl_group_end();
    for (int c = 0; c < nccl.n_carried; c++)
        add_ranks_gpu(nccl_sum(begin, sums, c, share), begin + nccl.carried[c] * share,
                      parts + (int64_t)c * nccl.n * share, nccl.n, mine, share, gpu.exchange);
}

// The machines' sums, at the ranks whose they are.
static void nccl_reduce_hosts(float *begin, float *sums, float *of_hosts, int64_t share) {
    int host = job.hosts[job.rank];
    size_t n = (size_t)share;
    float *own = begin + job.rank * share, *own_sum = own;
    NCCL(GroupStart());
    for (int c = 0; c < nccl.n_carried; c++) {
        float *sum = nccl_sum(begin, sums, c, share);
        if (nccl.carried[c] == job.rank) own_sum = sum;
        else NCCL(Send(sum, n, ncclFloat, nccl.carried[c], nccl.all, gpu.exchange));
    }
    for (int h = 0; h < job.n_hosts; h++)
        if (h != host)
            NCCL(Recv(of_hosts + h * share, n, ncclFloat, nccl.of_hosts[h], nccl.all, gpu.exchange));
    nccl_group_end();
    add_ranks_gpu(own, own_sum, of_hosts, job.n_hosts, host, share, gpu.exchange);
}

static void nccl_reduce(float *block, int range, float *room) {
    float *begin = block + division.begin[range];
    int64_t share = share_of(range);
    int several = job.n_hosts > 1, adds = nccl_adds();
    float *sums = room + (adds ? (int64_t)nccl.n_carried * nccl.n * share : 0);
    float *of_hosts = sums + (adds ? nccl.n_carried * share : 0);
    if (adds) nccl_reduce_members(begin, room, sums, share);
    if (several) nccl_reduce_hosts(begin, sums, of_hosts, share);
}

static void nccl_spread(float *block, int from, int end) {
    NCCL(GroupStart());
    for (int range = from; range < end; range++) {
        float *begin = block + division.begin[range];
        int64_t share = share_of(range);
        NCCL(AllGather(begin + job.rank * share, begin, (size_t)share, ncclFloat, nccl.all, gpu.exchange));
    }
    nccl_group_end();
}
static void nccl_tell(double *rows) {
    NCCL(GroupStart());
    NCCL(AllGather(rows + job.rank, rows, 1, ncclDouble, nccl.all, gpu.exchange));
    nccl_group_end();
}

static const Exchange through_nccl = {nccl_prepare,    nccl_open,   nccl_close,  nccl_look, nccl_room,
                                      nccl_processors, nccl_reduce, nccl_spread, nccl_tell};
