/*
Several processes that train one model, the ranks: how they are started, how they meet, what they tell each
other while they train, how they end together, and which of them has which moments. Included behind
train_sessa.c. The page is ranks.md.

    run_in_ranks    the program, in as many processes as the command line or the starter's environment says
    launch          --gpus N: this process starts the ranks and waits for them
    job_from_environment, meet   torchrun, srun, mpirun have started them: they meet at rank 0 over TCP
    gather_bytes    what the ranks tell each other
    watch           a rank that dies ends the others
    divide          whose moments each parameter has

Every rank has two connections to rank 0: one for what they tell each other, which the program's own thread
reads, and one for their lives, which another thread watches: whatever the first one waits for, on a card or
on a network, the second one sees a connection that breaks.
*/
#ifndef RANKS_H
#define RANKS_H
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

typedef struct {
    int rank, ranks;
    int local;         // its number among the ranks of its machine, as the starter counts
    int launched;      // by --gpus: the process that started it tells who died
    double timeout;    // seconds
    double patience;   // how long one of them is waited for: as long, but in a roll call
    char address[256]; // of rank 0, where a starter started the ranks
    int port;
    uint64_t token[2];    // what only the processes of the job know
    char version[64];     // what must be equal for the ranks to understand each other
    char machine[96];     // this one, as no other is called
    char (*machines)[96]; // (ranks) all of them, known to all
    int *hosts, n_hosts;  // (ranks) machines numbered in the order of their first ranks
    int *talk, *life;     // (ranks) rank 0's connections; of the others [0] alone, to rank 0
    volatile int told;    // a rank has failed and told why
    volatile int leaving; // what happens to the others does not matter any more
    volatile double until; // seconds(): what this rank does, then it hangs; 0: as long as it likes
    const char *volatile doing; // what that is
    pthread_t watcher;    // the thread that watches their lives
    struct pollfd *lives; // (ranks) its list of them
} Job;
static Job job; // of this process

// ----------------------------------------------------------------------------
// starters: what their environment says

// A whole number from the environment, -1 if there is none.
static int number_from(const char *name) {
    int64_t number;
    const char *text = getenv(name);
    return text && !parse_integer(text, 0, 1 << 30, &number) ? (int)number : -1;
}

// The first node of a list as Slurm writes it: "a[01-03,7],b" is a01. 0, or -1 where it is none.
static int first_node(char *node, size_t room, const char *list) {
    size_t n = 0;
    while (*list) {
        if (*list == ',' || *list == ']') break;
        if (*list != '[') {
            if (n + 1 >= room) return -1;
            node[n++] = *list++;
            continue;
        }
        const char *number = list + 1, *close = strchr(list, ']'); // its first number
        size_t digits = strspn(number, "0123456789");
        if (!close || !digits || n + digits >= room) return -1;
        if (number[digits] != '-' && number[digits] != ',' && number[digits] != ']') return -1;
        memcpy(node + n, number, digits);
        n += digits;
        list = close + 1;
    }
    node[n] = 0;
    return n ? 0 : -1;
}

// What a starter calls the rank, their number and the number on its machine; what names the job, which makes
// the token.
typedef struct {
    const char *name, *rank, *ranks, *local, *job[3];
} Starter;

// In this order: mpirun starts its own servants with srun, and torchrun may be started by any.
static const Starter starters[] = {
    {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", {"TORCHELASTIC_RUN_ID", "MASTER_PORT", NULL}},
    {"mpirun",
     "OMPI_COMM_WORLD_RANK",
     "OMPI_COMM_WORLD_SIZE",
     "OMPI_COMM_WORLD_LOCAL_RANK",
     {"PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", NULL}},
    {"srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", {"SLURM_JOB_ID", "SLURM_STEP_ID", NULL}},
};

// Where rank 0 is: MASTER_ADDR, of srun else the first node of the step, of mpirun else this machine, if it
// has all ranks.
static int find_address(Job *j, const Starter *s, char *error) {
    const char *address = getenv("MASTER_ADDR"), *list = getenv("SLURM_STEP_NODELIST");
    if (!list) list = getenv("SLURM_JOB_NODELIST");
    if (!list) list = getenv("SLURM_NODELIST");
    int is_srun = !strcmp(s->name, "srun"), is_mpirun = !strcmp(s->name, "mpirun");
    if (address && *address) snprintf(j->address, sizeof(j->address), "%s", address);
    else if (is_srun && list && !first_node(j->address, sizeof(j->address), list)) return 0;
    else if (is_mpirun && number_from("OMPI_COMM_WORLD_LOCAL_SIZE") == j->ranks)
        strcpy(j->address, "127.0.0.1");
    else
        return fail(error, NULL, "MASTER_ADDR is not set: it names the machine of rank 0 (%s)",
                    is_mpirun ? "mpirun -x MASTER_ADDR=node1" : "torchrun sets it");
    return 0;
}

// The job's token, and the port that follows from it where nobody names one.
static int find_port(Job *j, const Starter *s, char *error) {
    char text[1024] = "";
    const char *own = getenv("SESSA_TOKEN");
    for (int i = 0; !own && s->job[i]; i++) {
        const char *value = getenv(s->job[i]);
        size_t n = strlen(text);
        snprintf(text + n, sizeof(text) - n, "%s %.200s\n", s->name, value ? value : "");
    }
    if (own) snprintf(text, sizeof(text), "%s", own);
    j->token[0] = hash_bytes((const unsigned char *)text, strlen(text));
    j->token[1] = splitmix64(j->token[0] ^ (uint64_t)j->ranks);
    int port = number_from("SESSA_PORT"), master = number_from("MASTER_PORT");
    if (port < 0 && master >= 0) port = master + 1;          // torchrun's own store holds that one
    if (port < 0) port = (int)(20000 + j->token[1] % 10000); // below those that a system gives away
    j->port = port;
    if (port > 0 && port <= 65535) return 0;
    return fail(error, NULL, "SESSA_PORT, else MASTER_PORT and 1, is a port from 1 to 65535, not %d", port);
}

// Fills in the job from the environment of a starter. 0 if there is none, 1, or FAILED with the line.
static int job_from_environment(Job *j, char *error) {
    const Starter *s = starters, *end = starters + sizeof(starters) / sizeof(starters[0]);
    while (s < end && !(getenv(s->rank) && getenv(s->ranks))) s++;
    if (s == end) return 0;
    // the shell of a Slurm job has a rank of its own, but is no step
    if (!strcmp(s->name, "srun") && !getenv("SLURM_STEP_ID")) return 0;
    const char *ranks =
        !strcmp(s->name, "srun") && getenv("SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : s->ranks;
    j->rank = number_from(s->rank);
    j->ranks = number_from(ranks);
    j->local = number_from(s->local);
    if (j->rank < 0 || j->ranks < 1 || j->ranks > 1 << 16 || j->rank >= j->ranks)
        return fail(error, NULL, "%s says that this is rank %.20s of %.20s (%s, %s)", s->name,
                    getenv(s->rank), getenv(ranks), s->rank, ranks);
    if (j->local < 0) j->local = 0;
    if (j->ranks == 1) return 1;
    if (find_address(j, s, error) || find_port(j, s, error)) return FAILED;
    return 1;
}

// What this machine is called: containers of one machine have names of their own.
static void name_machine(Job *j) {
    char name[48] = "", boot[48] = "";
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "r");
    if (file && !fgets(boot, sizeof(boot), file)) boot[0] = 0;
    if (file) fclose(file);
    boot[strcspn(boot, "\n")] = 0;
    gethostname(name, sizeof(name) - 1);
    const char *given = getenv("SESSA_MACHINE"); // tests play several machines on one
    snprintf(j->machine, sizeof(j->machine), "%.45s %s", given ? given : name, boot);
}

// ----------------------------------------------------------------------------
// ending together

enum { ORDERLY = 'B', FAILING = 'F' }; // what a rank says on its second connection when it ends

// Says it to rank 0, or as rank 0 to all.
static void say_end(char word) {
    for (int r = 0; r < (job.rank ? 1 : job.ranks); r++)
        if (job.life && job.life[r] >= 0 && send(job.life[r], &word, 1, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
            continue;
}

// From here on this thread alone ends the process; the other one stops where it is.
static void begin_to_leave(void) {
    if (!__atomic_exchange_n(&job.leaving, 1, __ATOMIC_SEQ_CST)) return;
    if (pthread_equal(pthread_self(), job.watcher)) pthread_exit(NULL);
    for (;;) pause();
}

// Ends this process, and with it the others. The line, if this rank is the one to tell it.
static void end_all(int tells, const char *format, ...) {
    char line[ERROR_SIZE];
    va_list arguments;
    begin_to_leave();
    va_start(arguments, format);
    write_line(line, NULL, format, arguments);
    va_end(arguments);
    if (tells && !job.told) fprintf(stderr, "train_sessa: %s\n", line);
    say_end(FAILING);
    remove_locks();
    _exit(1);
}

// The name of a rank for a line: its number, and its machine if there are several.
static const char *rank_name(char text[160], int rank) {
    int known = job.n_hosts > 1 && job.machines;
    int length = known ? (int)strcspn(job.machines[rank], " ") : 0;
    snprintf(text, 160, "rank %d%s%.*s", rank, known ? " on " : "", length, known ? job.machines[rank] : "");
    return text;
}

// A connection broke without a word: whoever was there is dead. Rank 0 tells it, of itself rank 1.
static void end_of_dead(int rank) {
    char name[160];
    end_all(!job.launched && job.rank == (rank ? 0 : 1), "%s has ended, and so do the others",
            rank_name(name, rank));
}

// Watches the lives of the others, in a thread of its own. One that fails has told why; who waits for nobody
// then ends by itself, with lines of its own; the second is for those that wait.
static void *watch(void *unused) {
    int n = job.rank ? 1 : job.ranks, left = job.rank ? 1 : n - 1;
    struct pollfd *all = job.lives;
    (void)unused;
    for (int r = 0; r < n; r++) {
        all[r].fd = job.life[r];
        all[r].events = POLLIN;
    }
    while (left && !job.leaving) {
        int heard = poll(all, (nfds_t)n, 500);
        if (job.until > 0 && seconds() > job.until && !job.leaving)
            end_all(job.rank < 2, "%s has taken %.0f s (--timeout), and the ranks end", job.doing, job.timeout);
        if (heard <= 0) continue;
        for (int r = 0; r < n && !job.leaving; r++) {
            char word = 0;
            if (all[r].fd < 0 || !all[r].revents) continue;
            ssize_t got = recv(all[r].fd, &word, 1, MSG_DONTWAIT);
            if (got < 0 && (errno == EAGAIN || errno == EINTR)) continue;
            if (got == 1 && word == FAILING) {
                job.told = 1;
                if (!job.rank) say_end(FAILING);
                for (int i = 0; i < 100 && !job.leaving; i++) usleep(10000);
                end_all(0, " ");
            }
            if (got != 1 && !job.leaving) end_of_dead(r);
            all[r].fd = -1; // ended in order
            left--;
        }
    }
    return NULL;
}

// Signals are the program's own thread's.
static int start_watching(char *error) {
    pthread_attr_t attributes;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 256 << 10);
    int problem = pthread_create(&job.watcher, &attributes, watch, NULL);
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return problem ? fail(error, NULL, "no thread to watch the other ranks: %s", strerror(problem)) : 0;
}

// The last thing that a rank does.
static void leave(int code) {
    begin_to_leave();
    say_end(code == 0 || code == 130 ? ORDERLY : FAILING);
    for (int r = 0; r < (job.rank ? 1 : job.ranks); r++)
        if (job.life[r] >= 0) shutdown(job.life[r], SHUT_RD); // the watcher awakes
    pthread_join(job.watcher, NULL);
    void *lists[] = {job.machines, job.hosts, job.talk, job.life, job.lives};
    for (size_t i = 0; i < sizeof(lists) / sizeof(lists[0]); i++) free(lists[i]);
}

// ----------------------------------------------------------------------------
// what the ranks tell each other

// Where other ranks of the machine look whether this one still waits for rank 0, NULL: nowhere.
static volatile int64_t *waits_for_first;

// Waits in pieces, so that a program that was stopped (Ctrl-Z) has not waited meanwhile. Seconds waited; 0:
// there is something to read, or room to write (POLLIN, POLLOUT), or the end.
static double wait_for_peer(int fd, short what, double waited) {
    enum { PIECE = 100 };
    struct pollfd one = {fd, what, 0};
    int got = poll(&one, 1, PIECE);
    return got > 0 ? 0 : waited + PIECE * 1e-3;
}

// Waits for `peer` so long: a rank that does not come hangs. Rank 0 tells it; who waits for rank 0 waits a
// little longer, for it may wait itself. `got`: what reading or writing said before. Returns the bytes that
// went, 0 where it is to be tried again.
static size_t went(ssize_t got, int fd, short what, int peer) {
    char name[160];
    double waited = 0, most = job.patience + (peer ? 0.5 : 3);
    if (got > 0) return (size_t)got;
    if (!(got < 0 && (errno == EAGAIN || errno == EINTR))) { // dead: the other thread ends this process
        usleep(4000000);
        end_of_dead(peer);
    }
    do {
        if (waits_for_first && !peer) __atomic_add_fetch(waits_for_first, 1, __ATOMIC_RELAXED);
        waited = wait_for_peer(fd, what, waited);
    } while (waited > 0 && waited < most);
    if (waited >= most)
        end_all(peer || job.rank == 1, "%s has not come for %.0f s (--timeout), and the others end",
                rank_name(name, peer), job.timeout);
    return 0;
}
static void receive(int fd, void *bytes, size_t n, int peer) {
    for (size_t done = 0; done < n;)
        done += went(recv(fd, (char *)bytes + done, n - done, MSG_DONTWAIT), fd, POLLIN, peer);
}
static void transmit(int fd, const void *bytes, size_t n, int peer) {
    for (size_t done = 0; done < n;)
        done += went(send(fd, (const char *)bytes + done, n - done, MSG_NOSIGNAL | MSG_DONTWAIT), fd, POLLOUT,
                     peer);
}

// Each message says what it is, so that ranks that are not at the same point do not take one for another.
typedef struct {
    uint64_t number, bytes;
} Header;
static uint64_t n_messages[2]; // of all ranks, and of machines' first ranks
static void receive_message(int fd, void *bytes, size_t n, int peer, int of_hosts) {
    Header header;
    char name[160];
    receive(fd, &header, sizeof(header), peer);
    if (header.number != 2 * n_messages[of_hosts] + (uint64_t)of_hosts || header.bytes != n)
        end_all(1, "%s is not where rank %d is: message %llu of %llu bytes, not %llu of %zu",
                rank_name(name, peer), job.rank, (unsigned long long)header.number,
                (unsigned long long)header.bytes,
                (unsigned long long)(2 * n_messages[of_hosts] + (uint64_t)of_hosts), n);
    receive(fd, bytes, n, peer);
}
static void transmit_message(int fd, const void *bytes, size_t n, int peer, int of_hosts) {
    Header header = {2 * n_messages[of_hosts] + (uint64_t)of_hosts, n};
    transmit(fd, &header, sizeof(header), peer);
    transmit(fd, bytes, n, peer);
}

// Whether the rank is the first of its machine.
static int is_first_of_host(int rank) {
    int r = 0;
    while (job.hosts[r] != job.hosts[rank]) r++;
    return r == rank;
}

// rows: `each` bytes of every rank, or of the first ranks of the machines alone, who then call it alone. A
// rank fills in its own row, and then has all.
static void gather_bytes(void *rows, size_t each, int of_hosts) {
    size_t n = (size_t)(of_hosts ? job.n_hosts : job.ranks);
    char *row = (char *)rows;
    n_messages[of_hosts]++;
    if (job.rank) {
        size_t mine = (size_t)(of_hosts ? job.hosts[job.rank] : job.rank);
        transmit_message(job.talk[0], row + mine * each, each, 0, of_hosts);
        receive_message(job.talk[0], rows, n * each, 0, of_hosts);
        return;
    }
    for (int r = 1, i = 1; r < job.ranks; r++)
        if (!of_hosts || is_first_of_host(r))
            receive_message(job.talk[r], row + i++ * each, each, r, of_hosts);
    for (int r = 1; r < job.ranks; r++)
        if (!of_hosts || is_first_of_host(r)) transmit_message(job.talk[r], rows, n * each, r, of_hosts);
}

// Backend.gather: rows (ranks,n)
static void gather_rows(double *rows, int n) { gather_bytes(rows, sizeof(double) * (size_t)n, 0); }

// Gives all ranks rank 0's bytes: the 128 of NCCL's id.
__attribute__((unused)) // where NCCL is not
static void tell_all(void *bytes, size_t n) {
    n_messages[0]++;
    if (job.rank) receive_message(job.talk[0], bytes, n, 0, 0);
    for (int r = 1; !job.rank && r < job.ranks; r++) transmit_message(job.talk[r], bytes, n, r, 0);
}

// Waits until all are here.
__attribute__((unused)) // where there are no cards
static void meet_again(void) {
    double *rows = (double *)calloc((size_t)job.ranks, sizeof(double));
    if (!rows) end_all(1, "rank %d: out of memory", job.rank);
    gather_rows(rows, 1);
    free(rows);
}

// Whoever has waited for others on his card for --timeout calls it: who does not come then is the one that
// hangs. If all come, it is the exchange.
__attribute__((unused)) // where there are no cards
static void call_roll(void) {
    job.patience = 10; // all have waited
    meet_again();
    end_all(job.rank == 0, "the exchange between the GPUs does not end: %.0f s (--timeout)", job.timeout);
}

// ----------------------------------------------------------------------------
// meeting: the first words between ranks that a starter has started

// The first thing that a rank says on each of its connections, and what rank 0 answers on the first.
typedef struct {
    char magic[8];
    uint64_t token[2];
    int32_t rank, ranks, second, unused;
    char version[64], machine[96];
} Hello;
typedef struct {
    char magic[8];
    uint64_t token[2];
    int64_t refused; // rank 0 has told why
} Answer;
static const char MAGIC[8] = "sessa/1";

// Memory for what a job knows of its ranks.
static int job_allocate(Job *j, const char *backend, char *error) {
    size_t n = (size_t)j->ranks;
    j->machines = (char(*)[96])calloc(n, 96);
    j->hosts = (int *)calloc(n, sizeof(int));
    j->talk = (int *)calloc(n, sizeof(int));
    j->life = (int *)calloc(n, sizeof(int));
    j->lives = (struct pollfd *)calloc(n, sizeof(struct pollfd));
    if (!j->machines || !j->hosts || !j->talk || !j->life || !j->lives)
        return fail(error, NULL, "out of memory");
    for (size_t r = 0; r < n; r++) j->talk[r] = j->life[r] = -1;
    snprintf(j->version, sizeof(j->version), "%s, %s, float%d, %d options", VERSION, backend,
             (int)(8 * sizeof(real)), (int)N_OPTIONS);
    return 0;
}

// Two connections a rank, and their two ends where the ranks are started here: more files than a process is
// given unless it asks. FAILED where it may not have them.
static int allow_files(int ranks, char *error) {
    struct rlimit limit;
    rlim_t least = 4 * (rlim_t)ranks + 100, wanted = least + 900;
    if (getrlimit(RLIMIT_NOFILE, &limit) || limit.rlim_cur >= wanted) return 0;
    if (limit.rlim_max < least)
        return fail(error, NULL, "%d processes take %d open files, and here are at most %llu (ulimit -Hn)", ranks,
                    (int)least, (unsigned long long)limit.rlim_max);
    limit.rlim_cur = limit.rlim_max < wanted ? limit.rlim_max : wanted;
    if (!setrlimit(RLIMIT_NOFILE, &limit)) return 0;
    return fail(error, NULL, "%d open files for %d processes: %s", (int)least, ranks, strerror(errno));
}

// Small messages go at once; a machine that is gone, without a word from its kernel, is noticed in half a
// minute.
static void settle_connection(int fd) {
    int on = 1, idle = 10, between = 5, count = 4;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
#ifdef TCP_KEEPIDLE
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &between, sizeof(between));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof(count));
#endif
    (void)idle;
    (void)between;
    (void)count;
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
}

// Rank 0's ear: for all networks, or where the ranks are on this machine alone for none (127.0.0.1, ::1).
enum { OUTSIDE, INSIDE, INSIDE_SIX };
static int listen_at(int port, int inside, char *error) {
    int on = 1, off = 0, fd = -1;
    if (inside != INSIDE) fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    struct sockaddr_in6 six;
    struct sockaddr_in four;
    memset(&six, 0, sizeof(six));
    memset(&four, 0, sizeof(four));
    six.sin6_family = AF_INET6;
    four.sin_family = AF_INET;
    six.sin6_port = four.sin_port = htons((uint16_t)port);
    if (inside == INSIDE_SIX) six.sin6_addr = in6addr_loopback;
    if (inside) four.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int is_six = fd >= 0;
    if (!is_six) fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) return fail(error, NULL, "no socket: %s", strerror(errno));
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (is_six) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
    int failed = is_six ? bind(fd, (struct sockaddr *)&six, sizeof(six))
                        : bind(fd, (struct sockaddr *)&four, sizeof(four));
    if (!failed && !listen(fd, 1024)) return fd;
    fail(error, NULL, "port %d, where the ranks meet: %s (SESSA_PORT names another)", port, strerror(errno));
    close(fd);
    return FAILED;
}

// Somebody on rank 0's port who has not said all of his hello.
typedef struct {
    int fd;
    size_t got;
    double waited;
    Hello hello;
} Guest;

// Whether the hello is of the job. What is wrong with it, else: rank 0 then tells it, and no rank starts.
static const char *check_hello(const Hello *h, char line[ERROR_SIZE]) {
    if (strncmp(h->version, job.version, sizeof(h->version)))
        format_line(line, NULL, "rank %d is version %.60s; rank 0 is %s", (int)h->rank, h->version,
                    job.version);
    else if (h->ranks != job.ranks)
        format_line(line, NULL, "rank %d counts %d ranks, rank 0 counts %d", (int)h->rank, (int)h->ranks,
                    job.ranks);
    else if (h->rank < 1 || h->rank >= job.ranks || h->second < 0 || h->second > 1)
        format_line(line, NULL, "there is no rank %d", (int)h->rank);
    else if ((h->second ? job.life : job.talk)[h->rank] >= 0)
        format_line(line, NULL, "two processes are rank %d", (int)h->rank);
    else return NULL;
    return line;
}

// Reads on. 1: the hello is there; 0: not yet; -1: it is a stranger, who is sent away.
static int hear(Guest *g) {
    ssize_t got = recv(g->fd, (char *)&g->hello + g->got, sizeof(Hello) - g->got, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
    if (got > 0) g->got += (size_t)got;
    size_t known = g->got < sizeof(MAGIC) ? g->got : sizeof(MAGIC);
    int stranger = got <= 0 || memcmp(g->hello.magic, MAGIC, known);
    if (!stranger && g->got < sizeof(Hello)) return 0;
    return stranger || memcmp(g->hello.token, job.token, sizeof(job.token)) ? -1 : 1;
}

// Takes one guest in who has said his hello.
static const char *take_in(Guest *g, char line[ERROR_SIZE]) {
    const Hello *h = &g->hello;
    const char *problem = check_hello(h, line);
    g->hello.version[sizeof(h->version) - 1] = g->hello.machine[sizeof(h->machine) - 1] = 0;
    if (problem) return problem;
    settle_connection(g->fd);
    (h->second ? job.life : job.talk)[h->rank] = g->fd;
    snprintf(job.machines[h->rank], sizeof(job.machines[0]), "%s", h->machine);
    return NULL;
}

// The line that says who has not come.
static int fail_missing(int strangers, char *error) {
    char list[100] = "", others[80] = "";
    int n = 0;
    for (int r = 1; r < job.ranks; r++) {
        size_t at = strlen(list);
        if (job.talk[r] >= 0 && job.life[r] >= 0) continue;
        if (n++ < 8) snprintf(list + at, sizeof(list) - at, "%s%d", at ? ", " : "", r);
    }
    if (strangers) snprintf(others, sizeof(others), "; %d connections were not of this job", strangers);
    return fail(error, NULL, "%d of %d ranks (%s%s) did not come to port %d within %.0f s (--timeout)%s", n,
                job.ranks, list, n > 8 ? ", ..." : "", job.port, job.timeout, others);
}

// Answers somebody. Who is refused may be a stranger, and does not hear the token.
static void answer(int fd, int refused) {
    Answer a;
    memset(&a, 0, sizeof(a));
    memcpy(a.magic, MAGIC, sizeof(MAGIC));
    if (!refused) memcpy(a.token, job.token, sizeof(a.token));
    a.refused = refused;
    if (send(fd, &a, sizeof(a), MSG_NOSIGNAL) < 0) shutdown(fd, SHUT_RDWR);
}

// Rank 0 waits for all the others.
static int wait_for_ranks(char *error) {
    enum { MOST = 64, PIECE = 100 };
    static Guest guests[MOST];
    struct pollfd all[MOST + 1];
    int n = 0, missing = 2 * (job.ranks - 1), strangers = 0;
    int is_four = !strncmp(job.address, "127.", 4) || !strcmp(job.address, "localhost");
    int inside = is_four ? INSIDE : !strcmp(job.address, "::1") ? INSIDE_SIX : OUTSIDE;
    int ear = listen_at(job.port, inside, error);
    const char *problem = NULL;
    double waited = 0;
    if (ear < 0) return FAILED;
    while (missing && !problem && waited < job.timeout) {
        double begin = seconds();
        for (int i = 0; i <= n; i++) {
            all[i].fd = i < n ? guests[i].fd : n < MOST ? ear : -1;
            all[i].events = POLLIN;
        }
        poll(all, (nfds_t)(n + 1), PIECE);
        double piece = seconds() - begin;
        waited += piece < 1 ? piece : 1;
        if (n < MOST) {
            int fd = accept(ear, NULL, NULL);
            memset(&guests[n], 0, sizeof(Guest));
            guests[n].fd = fd;
            n += fd >= 0;
        }
        for (int i = 0; i < n && !problem; i++) {
            int heard = hear(&guests[i]);
            guests[i].waited += piece;
            if (!heard && guests[i].waited < 10) continue;
            if (heard > 0) problem = take_in(&guests[i], error);
            if (heard > 0 && !problem) missing--;
            else if (heard <= 0) strangers++;
            if (problem) break; // it is still a guest
            if (heard <= 0) close(guests[i].fd);
            guests[i--] = guests[--n];
        }
    }
    close(ear);
    for (int i = 0; i < n; i++) {
        if (problem) answer(guests[i].fd, 1);
        close(guests[i].fd);
    }
    if (problem) return FAILED;
    return missing ? fail_missing(strangers, error) : 0;
}

// A connection to rank 0: its descriptor, or -1 and why not. *name_error: of looking up the name.
static int connect_once(int *name_error) {
    struct addrinfo wanted, *list = NULL;
    char port[16];
    int problem = 0;
    memset(&wanted, 0, sizeof(wanted));
    wanted.ai_socktype = SOCK_STREAM;
    snprintf(port, sizeof(port), "%d", job.port);
    *name_error = getaddrinfo(job.address, port, &wanted, &list);
    for (struct addrinfo *a = list; !*name_error && a; a = a->ai_next) {
        int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        struct pollfd one = {fd, POLLOUT, 0};
        socklen_t size = sizeof(problem);
        problem = fd < 0 || (connect(fd, a->ai_addr, a->ai_addrlen) && errno != EINPROGRESS) ? errno : 0;
        if (!problem && poll(&one, 1, 2000) <= 0) problem = ETIMEDOUT;
        if (!problem && getsockopt(fd, SOL_SOCKET, SO_ERROR, &problem, &size)) problem = errno;
        if (!problem) {
            freeaddrinfo(list);
            settle_connection(fd);
            return fd;
        }
        if (fd >= 0) close(fd);
    }
    if (list) freeaddrinfo(list);
    errno = problem;
    return -1;
}

// Reads rank 0's answer, for so long. 0, or FAILED and the line; an empty one where rank 0 tells it.
static int read_answer(int fd, double waited, char *error) {
    Answer answer;
    size_t got = 0;
    memset(&answer, 0, sizeof(answer));
    while (got < sizeof(answer) && waited < job.timeout + 3) {
        ssize_t n = recv(fd, (char *)&answer + got, sizeof(answer) - got, MSG_DONTWAIT);
        int nothing_yet = n < 0 && (errno == EAGAIN || errno == EINTR);
        if (n > 0) got += (size_t)n;
        size_t known = got < sizeof(MAGIC) ? got : sizeof(MAGIC);
        if ((n <= 0 && !nothing_yet) || memcmp(answer.magic, MAGIC, known))
            return fail(error, NULL, "rank %d: what answers at %.200s port %d is not rank 0 of this job",
                        job.rank, job.address, job.port);
        double before = waited;
        if (nothing_yet) waited = wait_for_peer(fd, POLLIN, waited);
        if (!waited) waited = before;
    }
    if (got < sizeof(answer))
        return fail(error, NULL, "rank %d: rank 0 at %.200s port %d says nothing within %.0f s (--timeout)",
                    job.rank, job.address, job.port, job.timeout);
    if (answer.refused) *error = 0;
    else if (memcmp(answer.token, job.token, sizeof(job.token)))
        return fail(error, NULL, "rank %d: rank 0 at %.200s port %d is of another job", job.rank, job.address,
                    job.port);
    return answer.refused ? FAILED : 0;
}

// Another rank looks for rank 0, which may not be there yet.
static int go_to_first(char *error) {
    double waited = 0;
    int name_error = 0, problem = 0;
    Hello hello;
    memset(&hello, 0, sizeof(hello));
    memcpy(hello.magic, MAGIC, sizeof(MAGIC));
    memcpy(hello.token, job.token, sizeof(job.token));
    memcpy(hello.version, job.version, sizeof(hello.version));
    memcpy(hello.machine, job.machine, sizeof(hello.machine));
    hello.rank = job.rank;
    hello.ranks = job.ranks;
    for (hello.second = 0; hello.second < 2; hello.second++) {
        int fd = -1;
        while (fd < 0 && waited < job.timeout) {
            double begin = seconds();
            fd = connect_once(&name_error);
            problem = errno;
            if (name_error && name_error != EAI_AGAIN)
                return fail(error, NULL, "rank %d: rank 0 is at MASTER_ADDR %.200s: %s", job.rank,
                            job.address, gai_strerror(name_error));
            if (fd < 0) usleep(50000);
            double piece = seconds() - begin;
            waited += piece < 3 ? piece : 3;
        }
        if (fd < 0)
            return fail(error, NULL, "rank %d: rank 0 is not at %.200s port %d within %.0f s (--timeout): %s",
                        job.rank, job.address, job.port, job.timeout,
                        name_error ? gai_strerror(name_error) : strerror(problem));
        if (send(fd, &hello, sizeof(hello), MSG_NOSIGNAL) != (ssize_t)sizeof(hello)) errno = 0;
        (hello.second ? job.life : job.talk)[0] = fd;
    }
    return read_answer(job.talk[0], waited, error);
}

// Machines by number, in the order of their first ranks.
static void number_hosts(void) {
    job.n_hosts = 0;
    for (int r = 0; r < job.ranks; r++) {
        int same = 0;
        while (strcmp(job.machines[same], job.machines[r])) same++;
        job.hosts[r] = same < r ? job.hosts[same] : job.n_hosts++;
    }
}

// The ranks of a starter meet. FAILED and the line, an empty one where another rank tells it.
static int meet(char *error) {
    snprintf(job.machines[job.rank], sizeof(job.machines[0]), "%s", job.machine);
    int result = job.rank ? go_to_first(error) : wait_for_ranks(error);
    for (int r = 1; !job.rank && r < job.ranks; r++) // all begin together, or none
        if (job.talk[r] >= 0) answer(job.talk[r], result != 0);
    if (result) return result;
    memset(&job.machines[job.rank], 0, sizeof(job.machines[0]));
    snprintf(job.machines[job.rank], sizeof(job.machines[0]), "%s", job.machine);
    gather_bytes(job.machines, sizeof(job.machines[0]), 0);
    number_hosts();
    return 0;
}

// ----------------------------------------------------------------------------
// --gpus N: the ranks of one machine, started here

// Ends the children that are there.
static void end_children(const pid_t *children, int n, int number) {
    for (int r = 0; r < n; r++)
        if (children[r] > 0) kill(children[r], number);
}

// Waits for the ranks, passes signals on to them, and once one has failed ends the others, which have three
// seconds for it. What a terminal sends, they have themselves. The exit code is rank 0's, if that is none,
// the first.
static int wait_for_children(pid_t *children, int n, const sigset_t *signals) {
    int left = n, codes[2] = {0, 0}, told = 0, killed = 0, asked = 0;
    double failed_at = 0;
    while (left) {
        siginfo_t info;
        struct timespec piece = {0, 100000000};
        int number = sigtimedwait(signals, &info, &piece);
        if (number > 0 && number != SIGCHLD) asked = number;
        if (number > 0 && number != SIGCHLD && info.si_code <= 0) end_children(children, n, number);
        for (int r = 0; r < n; r++) {
            int status = 0;
            pid_t ended = children[r] > 0 ? waitpid(children[r], &status, WNOHANG) : 0;
            int unknown = ended < 0 && errno == ECHILD; // ended, and nobody knows how
            if (ended <= 0 && !unknown) continue;
            children[r] = 0;
            left--;
            int ended_by = !unknown && WIFSIGNALED(status) ? WTERMSIG(status) : 0;
            int on_request = ended_by && ended_by == asked; // before it trained
            int code = on_request ? 128 + ended_by : ended_by || unknown ? 1 : WEXITSTATUS(status);
            if (r == 0) codes[0] = code;
            else if (!codes[1]) codes[1] = code;
            if (code && code != 130 && !failed_at) failed_at = seconds();
            if (!ended_by || on_request || killed || told++) continue;
            fprintf(stderr, "train_sessa: rank %d was ended by signal %d (%s), and so are the others\n", r,
                    ended_by, strsignal(ended_by));
        }
        killed |= failed_at && seconds() - failed_at > 3;
        if (killed) end_children(children, n, SIGKILL);
    }
    return codes[0] ? codes[0] : codes[1];
}

// What a child does first: its connections, and its end with that of the process that started it.
static void be_child(int rank, int (*talk)[2], int (*life)[2], pid_t parent) {
    job.rank = job.local = rank;
    for (int r = 1; r < job.ranks; r++) {
        int mine = rank == 0 ? 0 : 1, *pairs[2] = {talk[r], life[r]};
        for (int i = 0; i < 2; i++) {
            close(pairs[i][!mine]);
            if (rank && r != rank) close(pairs[i][1]);
            else (i ? job.life : job.talk)[rank ? 0 : r] = pairs[i][mine];
        }
    }
#ifdef __linux__
    prctl(PR_SET_PDEATHSIG, SIGTERM);
#endif
    if (getppid() != parent) _exit(1);
}

// Starts the ranks. In each of them -1 is returned and the job is filled in; in the process that starts them,
// once they have ended, the exit code.
static int launch(char *error) {
    static const int passed[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU, SIGCHLD};
    int n = job.ranks, result = 0;
    pid_t parent = getpid(), *children = (pid_t *)calloc((size_t)n, sizeof(pid_t));
    int(*talk)[2] = (int(*)[2])calloc((size_t)n, sizeof(int[2]));
    int(*life)[2] = (int(*)[2])calloc((size_t)n, sizeof(int[2]));
    sigset_t signals, before;
    job.launched = 1;
    if (!children || !talk || !life) return fail(error, NULL, "out of memory");
    for (int r = 1; r < n; r++)
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, talk[r]) ||
            socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, life[r]))
            return fail(error, NULL, "no connections for %d processes: %s", n, strerror(errno));
    sigemptyset(&signals);
    for (size_t i = 0; i < sizeof(passed) / sizeof(passed[0]); i++) sigaddset(&signals, passed[i]);
    sigprocmask(SIG_BLOCK, &signals, &before);
    signal(SIGCHLD, SIG_DFL); // who ignores it, as some starters do, cannot wait for a child
    fflush(stdout);
    for (int r = 0; r < n && !result; r++) {
        children[r] = fork();
        if (!children[r]) {
            be_child(r, talk, life, parent);
            sigprocmask(SIG_SETMASK, &before, NULL);
            result = -1;
        } else if (children[r] < 0) {
            end_children(children, r, SIGKILL);
            return fail(error, NULL, "rank %d cannot be started: %s", r, strerror(errno));
        }
    }
    for (int r = 1; !result && r < n; r++)
        for (int i = 0; i < 2; i++) {
            close(talk[r][i]);
            close(life[r][i]);
        }
    if (!result) result = wait_for_children(children, n, &signals);
    free(children);
    free(talk);
    free(life);
    return result;
}

// ----------------------------------------------------------------------------
// the program

// A rank's share of the machine's cores, unless the user or the starter has given it some.
static void share_cores(void) {
    const char *wanted = getenv("OMP_NUM_THREADS");
    int here = 0, cores = (int)sysconf(_SC_NPROCESSORS_ONLN),
        most = threads_within("", omp_get_max_threads());
    for (int r = 0; r < job.ranks; r++) here += job.hosts[r] == job.hosts[job.rank];
    if ((wanted && *wanted) || (!job.launched && omp_get_max_threads() < cores)) return;
    omp_set_num_threads(most / here > 1 ? most / here : 1);
}

// Rank 0 alone is heard: what the others print goes nowhere, their errors are errors.
static void be_quiet(void) {
    int nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC);
    if (!job.rank || nowhere < 0) return;
    fflush(stdout);
    dup2(nowhere, STDOUT_FILENO);
    terminal = nowhere; // and a second Ctrl-C ends them, as it ends rank 0
}

// Fills in the job: 1: this is a rank of several, 0: the program is alone, else FAILED or WRONG_OPTION.
static int find_job(const Settings *s, char *error) {
    int started = job_from_environment(&job, error);
    job.timeout = job.patience = (double)s->values.timeout;
    if (started < 0) return started;
    if (started && job.ranks == 1) started = 0; // srun -n1 with --gpus: they are started here
    if (started && s->values.gpus > 1)
        return wrong(error, NULL, "--gpus %lld: here a starter counts the processes (its environment has %d)",
                     (long long)s->values.gpus, job.ranks);
    if (!started) job.ranks = (int)s->values.gpus;
    return job.ranks > 1;
}

// The program in as many processes as it is told. `alone`: for one; make: a rank's backend, with what follows
// from job.
static int run_in_ranks(int argc, char **argv, const Backend *alone, Backend (*make)(void)) {
    char error[ERROR_SIZE] = "";
    Settings settings;
    int parsed = parse_options(&settings, argc, argv, error), code = 0;
    memset(&job, 0, sizeof(job));
    int several = parsed ? 0 : find_job(&settings, error);
    int by_one = parsed || settings.values.generate; // a help, a wrong option, a text
    if (by_one && job_from_environment(&job, error) > 0 && job.rank) return parsed < 0 ? 2 : 0;
    if (by_one || !several) {
        memset(&job, 0, sizeof(job));
        return run_program(argc, argv, alone);
    }
    int result = several < 0 ? several : 0;
    name_machine(&job);
    if (!result) result = job_allocate(&job, alone->name, error);
    if (!result) result = allow_files(job.ranks, error);
    if (!result && settings.values.gpus > 1) {
        code = launch(error);
        if (code >= 0) return code;
        if (*error) result = FAILED;
        number_hosts(); // one
    } else if (!result) result = meet(error);
    if (!result) result = start_watching(error);
    int tells = several > 0 || !job.local; // an environment is a machine's
    if (result && *error && tells) fprintf(stderr, "train_sessa: %s\n", error);
    if (result) return result == WRONG_OPTION ? 2 : 1;
    be_quiet();
    share_cores();
    Backend backend = make();
    backend.rank = job.rank;
    backend.ranks = job.ranks;
    backend.gather = gather_rows;
    code = run_program(argc, argv, &backend);
    leave(code);
    return code;
}

// ----------------------------------------------------------------------------
// whose each parameter is
//
// ZeRO's first stage (Rajbhandari, Rasley, Ruwase, He: ZeRO, SC 2020): each rank has all weights and all
// gradients, but a share of the moments, and updates that share. Ranges, the embedding's first, are shared out
// each by itself, so that the backward pass can exchange one as soon as it is behind it. On the CPU each layer is
// one; the CUDA twin hands in a table of its own, whose "layers" are ranges of several (divide_gpu).
// Within a range every tensor is padded to whole units, the range to whole units a rank, and rank r has the
// r-th part.

// Some numbers of one tensor, of one rank: where in the parameters' block, and where among that rank's
// moments.
typedef struct {
    int range, rank, decays;
    int64_t offset, count, place;
} Piece;
typedef struct {
    Piece *pieces; // in the order of the block
    int n, n_ranges;
    int64_t *begin;  // (n_ranges+1) of the ranges in the block
    int64_t *held;   // (ranks) numbers that each rank has
    int64_t *padded; // (n_ranges) a rank's part with what pads it
} Division;
static Division division; // of the model that trains

// Which range a row of the table is in: 0 the embedding, 1 + l layer l, the last one with the LayerNorm
// behind it.
static int range_of(const Tensor *t, int n_layers) {
    int layer;
    if (!strcmp(t->name, "wte.weight")) return 0;
    return sscanf(t->name, "layers.%d.", &layer) == 1 ? 1 + layer : n_layers;
}

static void division_free(Division *d) {
    free(d->pieces);
    free(d->begin);
    free(d->held);
    free(d->padded);
    memset(d, 0, sizeof(*d));
}

// Shares the table's rows out. unit: numbers that stay together.
static int divide(Division *d, const Table *table, int n_layers, int ranks, int unit) {
    memset(d, 0, sizeof(*d));
    d->n_ranges = n_layers + 1;
    d->pieces = (Piece *)calloc((size_t)table->n + (size_t)d->n_ranges * (size_t)ranks, sizeof(Piece));
    d->begin = (int64_t *)calloc((size_t)d->n_ranges + 1, sizeof(int64_t));
    d->held = (int64_t *)calloc((size_t)ranks, sizeof(int64_t));
    d->padded = (int64_t *)calloc((size_t)d->n_ranges, sizeof(int64_t));
    if (!d->pieces || !d->begin || !d->held || !d->padded) return FAILED;
    for (int i = 0; i < table->n; i++) { // units of each range; then of a rank
        const Tensor *t = &table->rows[i];
        d->padded[range_of(t, n_layers)] += (t->count + unit - 1) / unit;
        d->begin[range_of(t, n_layers) + 1] = t->offset + t->count;
    }
    for (int range = 0; range < d->n_ranges; range++)
        d->padded[range] = (d->padded[range] + ranks - 1) / ranks * unit;
    int64_t at = 0; // in the padded range
    for (int i = 0, before = -1; i < table->n; i++) {
        const Tensor *t = &table->rows[i];
        int range = range_of(t, n_layers);
        if (range != before) at = 0;
        before = range;
        for (int64_t done = 0; done < t->count;) {
            int rank = (int)(at / d->padded[range]);
            int64_t room = (rank + 1) * d->padded[range] - at, rest = t->count - done;
            int64_t count = rest < room ? rest : room;
            Piece piece = {range, rank, t->n_dims >= 2, t->offset + done, count, d->held[rank]};
            d->pieces[d->n++] = piece;
            d->held[rank] += count;
            done += count;
            at += (count + unit - 1) / unit * unit;
        }
    }
    return 0;
}

#endif
