/*
The test of several processes that train one model: what dev/ranks promises, with ranks that are processes of
the CPU and exchange through shared memory, and machines that are played on this one.

    ./test_ranks
    ./test_ranks PROGRAM shared     of the CUDA twin, whose ranks share a card and exchange through memory
    ./test_ranks PROGRAM nccl 2     and with a card each, by NCCL: two of them, not four
    ./test_ranks PROGRAM nccl short     what goes fast

The ranks' numbers are held against a plain loop of this process, `reference`: the gradients of each rank's
rows, one after the other, added in the order that is promised, and one update of all.
*/
#define SESSA_NO_MAIN
#include "../../train_sessa.c"
#include "../ranks/cpu.h"
#include "check.h"
#include "run.h"

// Set while the test plays a part itself.
static const char *const starter_names[] = {"RANK",
                                            "WORLD_SIZE",
                                            "LOCAL_RANK",
                                            "MASTER_ADDR",
                                            "MASTER_PORT",
                                            "TORCHELASTIC_RUN_ID",
                                            "SESSA_PORT",
                                            "SESSA_TOKEN",
                                            "SESSA_MACHINE",
                                            "SLURM_PROCID",
                                            "SLURM_NTASKS",
                                            "SLURM_LOCALID",
                                            "SLURM_JOB_ID",
                                            "SLURM_STEP_ID",
                                            "SLURM_STEP_NUM_TASKS",
                                            "SLURM_STEP_NODELIST",
                                            "SLURM_JOB_NODELIST",
                                            "SLURM_NODELIST",
                                            "OMPI_COMM_WORLD_RANK",
                                            "OMPI_COMM_WORLD_SIZE",
                                            "OMPI_COMM_WORLD_LOCAL_RANK",
                                            "OMPI_COMM_WORLD_LOCAL_SIZE",
                                            "PMIX_NAMESPACE",
                                            "OMPI_MCA_ess_base_jobid"};
static void forget_starters(void) {
    for (size_t i = 0; i < sizeof(starter_names) / sizeof(starter_names[0]); i++) unsetenv(starter_names[i]);
}

// ----------------------------------------------------------------------------
// starting ranks as a starter does

enum { MOST_RANKS = 4 };
static const char *const machine_names[] = {"alpha", "beta", "gamma"};

// How the ranks that are started next differ from what a starter gives them all.
static struct {
    int rank, ranks, per_machine, port;
    const char *address, *token, *folder;
} as;
static pid_t ranks_of_test[MOST_RANKS];
static char words_of[MOST_RANKS][2048]; // what each rank said on standard error

static int without_tcp; // there is no loopback here

// Whether a process of this machine can call another by TCP: in a container without networks it cannot.
static int has_loopback(void) {
    struct sockaddr_in at;
    socklen_t size = sizeof(at);
    int ear = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int caller = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memset(&at, 0, sizeof(at));
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int ok = ear >= 0 && caller >= 0 && !bind(ear, (struct sockaddr *)&at, sizeof(at)) && !listen(ear, 1) &&
             !getsockname(ear, (struct sockaddr *)&at, &size) &&
             !connect(caller, (struct sockaddr *)&at, sizeof(at));
    if (ear >= 0) close(ear);
    if (caller >= 0) close(caller);
    return ok;
}

// A port that is free now.
static int free_port(void) {
    if (without_tcp) return 1;
    struct sockaddr_in at;
    socklen_t size = sizeof(at);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memset(&at, 0, sizeof(at));
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || bind(fd, (struct sockaddr *)&at, sizeof(at)) ||
        getsockname(fd, (struct sockaddr *)&at, &size)) {
        printf("no port: %s\n", strerror(errno));
        exit(1);
    }
    close(fd);
    return ntohs(at.sin_port);
}

static void set_number(const char *name, int number) {
    char text[16];
    snprintf(text, sizeof(text), "%d", number);
    setenv(name, text, 1);
}

// In the child: torchrun's environment, and files of its own for what it says.
static void be_rank(void) {
    char path[100];
    set_number("RANK", as.rank);
    set_number("WORLD_SIZE", as.ranks);
    set_number("LOCAL_RANK", as.rank % as.per_machine);
    set_number("SESSA_PORT", as.port);
    setenv("MASTER_ADDR", as.address, 1);
    setenv("SESSA_TOKEN", as.token, 1);
    setenv("SESSA_MACHINE", machine_names[as.rank / as.per_machine], 1);
    snprintf(path, sizeof(path), "%s/out%d", folder, as.rank);
    if (!freopen(path, "wb", stdout)) _exit(126);
    snprintf(path, sizeof(path), "%s/err%d", folder, as.rank);
    if (!freopen(path, "wb", stderr)) _exit(126);
    if (as.folder && as.rank && chdir(as.folder)) _exit(126);
}

// What is usual: R ranks, so many on a machine, all here.
static void usual(int ranks, int per_machine) {
    as.ranks = ranks;
    as.per_machine = per_machine;
    as.port = free_port();
    as.address = "127.0.0.1";
    as.token = "of this test";
    as.folder = NULL;
}

static void start_rank(int rank, const char *options) {
    char line[4096];
    snprintf(line, sizeof(line), "--run %s", options);
    as.rank = rank;
    prepare_child = be_rank;
    ranks_of_test[rank] = start(line);
    prepare_child = NULL;
}

// A signal to one process: a pid of 0 or -1, of a start that failed, would mean many.
static void send_signal(pid_t child, int number) {
    if (child > 0) kill(child, number);
}

// The exit code of a child, 128 + the signal that ended it; -1, and it is ended, if it takes longer.
static int end_within(pid_t child, double limit) {
    double begin = seconds();
    int status;
    if (child <= 0) return -1;
    while (waitpid(child, &status, WNOHANG) != child) {
        if (seconds() - begin > limit) {
            send_signal(child, SIGKILL);
            waitpid(child, &status, 0);
            return -1;
        }
        usleep(2000);
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// The same of a rank, and keeps what it said.
static int end_rank(int rank, double limit) {
    char name[32];
    size_t size = 0;
    int code = end_within(ranks_of_test[rank], limit);
    snprintf(name, sizeof(name), "../err%d", rank);
    const unsigned char *bytes = slurp(name, &size);
    snprintf(words_of[rank], sizeof(words_of[0]), "%s", bytes ? (const char *)bytes : "");
    return code;
}

// Lines on standard error, of ranks 0..n-1.
static int lines_told(int n) {
    int lines = 0;
    for (int r = 0; r < n; r++)
        for (const char *c = words_of[r]; *c; c++) lines += *c == '\n';
    return lines;
}

// R ranks, to their end: whether all returned 0.
static int run_ranks(int ranks, int per_machine, const char *options) {
    int ok = 1;
    usual(ranks, per_machine);
    for (int r = 0; r < ranks; r++) start_rank(r, options);
    for (int r = 0; r < ranks; r++) ok &= end_rank(r, 60) == 0;
    if (!ok)
        for (int r = 0; r < ranks; r++) printf("  rank %d: %s\n", r, words_of[r]);
    return ok;
}

// --gpus N, with what it said kept as run() keeps it.
static int run_gpus(int n, const char *options) { return run("%s --gpus %d", options, n); }

// ----------------------------------------------------------------------------
// the reference

// A run of this process, the model filled.
static int open_run(Run *r, const char *options) {
    static char text[2048];
    char *words[60] = {self}, error[ERROR_SIZE], here[PATH_MAX];
    int n = 1;
    snprintf(text, sizeof(text), "%s", options);
    for (char *word = strtok(text, " "); word && n < 60; word = strtok(NULL, " ")) words[n++] = word;
    memset(r, 0, sizeof(*r));
    r->backend = &cpu_backend;
    r->order_epoch = -1;
    if (!getcwd(here, sizeof(here)) || chdir(work)) return 0;
    int result = parse_options(&r->settings, n, words, error);
    if (!result) result = prepare(r, error);
    remove_locks();
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    if (chdir(here)) return 0;
    if (result) printf("  %s\n", error);
    return !result;
}

// One step of R ranks, so many on a machine: each one's micro-batches, then the sums of each machine in rank
// order, then the machines' in theirs. Returns the loss.
static double reference_step(Run *run, int ranks, int per_machine, int whole_batch_masks) {
    Options *o = &run->settings.values;
    Model *m = run->model;
    int T = (int)o->seq, B = (int)o->batch / ranks;
    int64_t n = m->table.count, sequences = o->accum * o->batch, count = 0;
    real *host = (real *)calloc((size_t)n, sizeof(real)), *all = (real *)calloc((size_t)n, sizeof(real));
    double loss = 0;
    for (int64_t i = 0; i < sequences; i++)
        copy_sequence(run->inputs + i * T, run->targets + i * T, &run->train,
                      sequence_place(run, o->step * sequences + i), T);
    for (int64_t i = 0; i < sequences * T; i++) count += run->targets[i] >= 0;
    for (int r = 0; r < ranks; r++) {
        double loss_of_rank = 0;
        memset(m->grads, 0, sizeof(real) * (size_t)n);
        for (int64_t a = 0; a < o->accum; a++) {
            uint64_t first = whole_batch_masks ? (uint64_t)(r * B) * (uint64_t)T * (uint64_t)o->dim : 0;
            Dropout drop = {o->dropout, (uint64_t)o->seed, (uint64_t)(o->step * o->accum + a), first};
            int64_t at = (a * o->batch + r * B) * T;
            model_forward(m, run->inputs + at, run->targets + at, B, T, drop);
            model_backward(m, 1 / (double)count);
            loss_of_rank += model_loss(m) * (1 / (double)count);
        }
        loss += loss_of_rank;
        int first_there = r % per_machine == 0, last_there = (r + 1) % per_machine == 0 || r == ranks - 1;
        for (int64_t i = 0; i < n; i++) host[i] = first_there ? m->grads[i] : host[i] + m->grads[i];
        for (int64_t i = 0; last_there && i < n; i++) all[i] = r < per_machine ? host[i] : all[i] + host[i];
    }
    memcpy(m->grads, all, sizeof(real) * (size_t)n);
    AdamW adam = {learning_rate(o, o->step), o->beta1, o->beta2, o->eps, o->weight_decay};
    cpu_update(m, adam, o->clip, ++o->step);
    free(host);
    free(all);
    return loss;
}

// Numbers of a checkpoint that differ from the model's, of all blocks; -1: it cannot be read.
static int64_t differing(Run *run, const char *name) {
    Safetensors file;
    int64_t n = 0;
    if (!open_tensors(&file, name)) return -1;
    for (int block = PARAMS; block <= EXP_AVG_SQ; block++)
        for (int i = 0; i < run->table.n; i++) {
            const Tensor *row = &run->table.rows[i];
            char text[96];
            snprintf(text, sizeof(text), "%s%s", block_prefixes[block], row->name);
            const FileTensor *t = safetensors_find(&file, text);
            const real *ours = cpu_read(run->model, (Block)block) + row->offset;
            for (int64_t k = 0; k < row->count; k++)
                n += !t || t->count != row->count || (real)float_at(t, k) != ours[k];
        }
    safetensors_free(&file);
    return n;
}

// Ranks of one machine (0: by --gpus) or of several against the reference, all numbers after the last step;
// the loss of every step from the log.
static void check_against_reference(const char *name, int ranks, int per_machine, int steps,
                                    const char *options) {
    char line[1024];
    static double losses[128];
    Run run;
    if (per_machine && without_tcp) return;
    snprintf(line, sizeof(line),
             "%s --steps %d --eval-every 0 --clip 0 --overwrite --log r.log --out r.safetensors", options,
             steps);
    int ok = per_machine ? run_ranks(ranks, per_machine, line) : !run_gpus(ranks, line);
    ok = ok && read_log("r.log", "train_loss", losses, 128) == steps;
    snprintf(line, sizeof(line), "%s --steps %d --clip 0 --overwrite --out other.safetensors", options,
             steps);
    int64_t wrong_numbers = -1, wrong_losses = 0;
    if (ok && open_run(&run, line)) {
        for (int s = 0; s < steps; s++) {
            double loss = reference_step(&run, ranks, per_machine ? per_machine : ranks, 1);
            wrong_losses += !(fabs(losses[s] - loss) <= 1e-8 * loss); // nine digits are written
        }
        wrong_numbers = differing(&run, "r.safetensors");
        run_free(&run);
    }
    check(ok && !wrong_numbers && !wrong_losses, "%s: all numbers after %d steps, and their losses", name,
          steps);
}

#define MODEL_OPTIONS "--data text --dim 32 --layers 2 --heads 4 --seq 20 --warmup 5 "

static void test_reference(void) {
    heading("the numbers of several ranks: those of a plain loop over the ranks, bit for bit");
    check_against_reference("2 ranks", 2, 0, 100, MODEL_OPTIONS "--batch 4");
    check_against_reference("4 ranks", 4, 0, 100, MODEL_OPTIONS "--batch 4");
    check_against_reference("3 ranks, 2 micro-batches, dropout", 3, 0, 10,
                            MODEL_OPTIONS "--batch 6 --accum 2 --dropout 0.2");
    check_against_reference("2 ranks on 2 machines", 2, 1, 100, MODEL_OPTIONS "--batch 4");
    check_against_reference("4 ranks on 2 machines", 4, 2, 20, MODEL_OPTIONS "--batch 8");
    check_against_reference("3 ranks on machines with 2 and 1", 3, 2, 20, MODEL_OPTIONS "--batch 3");
    check_against_reference(
        "attention, examples, 4 ranks", 4, 0, 10,
        "--data set.safetensors --dim 48 --heads 4 --kv-heads 1 --mixer attention --batch 8");
    check_against_reference("mamba2, 2 ranks", 2, 0, 10,
                            "--data text --dim 48 --head-dim 32 --layers 2 --seq 20 --mixer mamba2 "
                            "--state-dim 8 --batch 4");
    release();
}

// ----------------------------------------------------------------------------
// against one process

// Reads a tensor's numbers from a checkpoint; NULL where it is not there.
static float *numbers_of(const Safetensors *file, const char *name, int64_t *n) {
    const FileTensor *t = safetensors_find(file, name);
    float *x = (float *)lend(t ? (size_t)t->count * sizeof(float) : 1);
    for (int64_t k = 0; t && k < t->count; k++) x[k] = float_at(t, k);
    *n = t ? t->count : 0;
    return t ? x : NULL;
}

// The gradients whose sums another order has: rows are added to them one by one, or in blocks, so that it
// matters what stood there before. ranks.md names them.
static int is_named(const char *tensor) {
    return strstr(tensor, "wte.") || strstr(tensor, "mixer.conv1d.") || strstr(tensor, "mixer.norm.");
}

// The first step's gradients, as the first moments have them, of R ranks and of --batch B/R --accum R.
static void check_first_gradients(const char *options, int ranks, const char *mixer) {
    Safetensors a, b;
    int exact = 0, others = 0, ok = 1;
    double worst = 0;
    ok &= !run("%s --mixer %s --batch %d --steps 1 --clip 0 --overwrite --out a.safetensors --gpus %d", options,
               mixer, ranks, ranks);
    ok &= !run("%s --mixer %s --batch 1 --accum %d --steps 1 --clip 0 --overwrite --out b.safetensors", options,
               mixer, ranks);
    ok = ok && open_tensors(&a, "a.safetensors") && open_tensors(&b, "b.safetensors");
    for (int i = 0; ok && i < a.n_tensors; i++) {
        int64_t n, n_b;
        if (strncmp(a.tensors[i].name, "exp_avg.", 8)) continue;
        const float *x = numbers_of(&a, a.tensors[i].name, &n), *y = numbers_of(&b, a.tensors[i].name, &n_b);
        ok &= x && y && n == n_b;
        int same = ok && !memcmp(x, y, (size_t)n * sizeof(float));
        exact += same;
        others += !same && !is_named(a.tensors[i].name);
        if (!same && !is_named(a.tensors[i].name)) printf("    %s is not\n", a.tensors[i].name);
        double top = 0, error = 0;
        for (int64_t k = 0; ok && k < n; k++) {
            top = fmax(top, fabs(y[k]));
            error = fmax(error, fabs(x[k] - y[k]));
        }
        worst_of(&worst, error / top);
    }
    if (ok) {
        safetensors_free(&a);
        safetensors_free(&b);
    }
    check(ok && exact > 20 && !others,
          "%s: the gradients of %d ranks are those of --accum %d bit for bit, but named ones", mixer, ranks, ranks);
    check_error(ok ? worst : NAN, 1e-5, "%s: and all of them to rounding", mixer);
}

// How far losses, and a tenth of that norms, are from those of other options: the worst of so many steps, at most
// 100. NAN: a run failed.
static double losses_apart(int steps, int ranks, const char *options, const char *others) {
    static double x[128], y[128], u[128], v[128];
    double worst = 0;
    int ok = !run("%s --steps %d --overwrite --eval-every 20 --log x.log --out x.safetensors --gpus %d", options,
                  steps, ranks);
    ok = ok && !run("%s --steps %d --overwrite --eval-every 20 --log y.log --out y.safetensors", others, steps);
    ok = ok && read_log("x.log", "train_loss", x, 128) == steps &&
         read_log("y.log", "train_loss", y, 128) == steps;
    ok = ok && read_log("x.log", "grad_norm", u, 128) == steps &&
         read_log("y.log", "grad_norm", v, 128) == steps;
    for (int s = 0; s < steps; s++) {
        worst_of(&worst, ok ? fabs(x[s] - y[s]) / y[s] : NAN);
        worst_of(&worst, ok ? fabs(u[s] - v[s]) / v[s] / 10 : NAN);
    }
    return worst;
}
static void check_losses(const char *name, int steps, int ranks, const char *options, const char *others,
                         double bound) {
    check_error(losses_apart(steps, ranks, options, others), bound, "%s: losses, and norms, of %d steps", name,
                steps);
}

static void test_against_one(void) {
    heading("the numbers of one process");
    check_first_gradients(MODEL_OPTIONS, 4, "sessa");
    check_first_gradients(MODEL_OPTIONS, 4, "attention");
    check_first_gradients(MODEL_OPTIONS, 4, "mamba2");
    check_losses("2 ranks, --batch 4, against --batch 2 --accum 2", 100, 2,
                 MODEL_OPTIONS "--batch 4 --eval-batches 2",
                 MODEL_OPTIONS "--batch 2 --accum 2 --eval-batches 4", 1e-5);
    check_losses("4 ranks, dropout, --accum 2, against one with --batch 4", 100, 4,
                 MODEL_OPTIONS "--batch 4 --accum 2 --dropout 0.2",
                 MODEL_OPTIONS "--batch 4 --accum 2 --dropout 0.2", 1e-5);
    int ok = run_ranks(1, 1, MODEL_OPTIONS "--batch 4 --steps 5 --overwrite --out a.safetensors");
    ok = ok && !run(MODEL_OPTIONS "--batch 4 --steps 5 --overwrite --out b.safetensors");
    check(ok && same_files("a.safetensors", "b.safetensors"),
          "a starter's one rank: the bytes of no starter");
    ok = !run(MODEL_OPTIONS "--batch 4 --steps 5 --overwrite --out a.safetensors --gpus 1");
    check(ok && same_files("a.safetensors", "b.safetensors"), "--gpus 1: the same");
    release();
}

// ----------------------------------------------------------------------------
// validation

// The validations that two logs hold: loss, and of examples the accuracies, as nine digits say them.
static int same_validations(const char *a, const char *b, const char *key, int lines) {
    double x[64], y[64];
    int same = read_log(a, key, x, 64) == lines && read_log(b, key, y, 64) == lines, there = 0;
    for (int i = 0; same && i < lines; i++) {
        same = isnan(x[i]) == isnan(y[i]) && !(fabs(x[i] - y[i]) > 2e-9 * fabs(y[i]));
        there += !isnan(x[i]);
    }
    return same && there > 0;
}

static void test_validation(void) {
    enum { N = 21, T = 12 };
    heading("validation, divided: the windows, targets and hits of one process");
    int32_t lags[N * T];
    for (int i = 0; i < N * T; i++) lags[i] = i % 9;
    write_tensors("lags.safetensors", N, T, random_ids(N * T, 9, 0), random_ids(N * T, 9, 1), lags);
    // weights that stay where they began: what differs then is the validation
    static const char *sets[] = {"--data text --val other --seq 12",
                                 "--data set.safetensors --val lags.safetensors --accum 2"};
    for (int i = 0; i < 2; i++) {
        static const char frozen[] =
            "--dim 16 --layers 2 --heads 2 --batch 8 --lr 0 --weight-decay 0 --steps 4 "
            "--eval-every 1 --eval-batches 3 --overwrite";
        int ok = !run("%s %s --log x.log --out x.safetensors", sets[i], frozen);
        for (int ranks = 2; ranks <= 8; ranks *= 2) {
            ok = ok && !run("%s %s --log y.log --out y.safetensors --gpus %d", sets[i], frozen, ranks);
            ok = ok && same_validations("y.log", "x.log", "val_loss", 4);
            if (i == 0) ok = ok && same_validations("y.log", "x.log", "val_bits_per_byte", 4);
            else
                ok = ok && same_validations("y.log", "x.log", "val_accuracy", 4) &&
                     same_validations("y.log", "x.log", "8", 4) && same_validations("y.log", "x.log", "4", 4);
        }
        check(ok, "%s: of 2, 4 and 8 ranks, the last batch uneven", sets[i]);
    }
    int ok = !run("--load x.safetensors --eval --data set.safetensors --val lags.safetensors --batch 8");
    char alone[512];
    snprintf(alone, sizeof(alone), "%s", output ? (const char *)output : "");
    ok = ok &&
         !run("--load x.safetensors --eval --data set.safetensors --val lags.safetensors --batch 8 --gpus 4");
    check(ok && output && !strcmp(alone, (const char *)output), "--eval: the lines of one process");
    release();
}

// ----------------------------------------------------------------------------
// checkpoints know no ranks

static void check_other_ranks(const char *name, int before, int after) {
    char line[512];
    Run run_of_test;
    static const char o[] = MODEL_OPTIONS "--batch 4 --clip 0 --decay-steps 20";
    snprintf(line, sizeof(line), "%s --eval-every 0 --overwrite --steps 10 --out h.safetensors --gpus %d", o,
             before);
    int ok = !run("%s", line);
    ok = ok &&
         !run("--resume h.safetensors --out i.safetensors --overwrite --steps 10 --eval-every 0 --gpus %d",
              after);
    ok = ok && same_tensors("h.safetensors", "i.safetensors");
    ok = ok && !run("--resume h.safetensors --steps 20 --eval-every 0 --gpus %d", after);
    snprintf(line, sizeof(line), "%s --overwrite --steps 20 --out other.safetensors", o);
    int64_t wrong_numbers = -1;
    if (ok && open_run(&run_of_test, line)) {
        for (int s = 0; s < 20; s++) reference_step(&run_of_test, s < 10 ? before : after, 4, 1);
        wrong_numbers = differing(&run_of_test, "h.safetensors");
        run_free(&run_of_test);
    }
    check(ok && !wrong_numbers,
          "%s: the same bytes at once, and after ten more steps those of the plain loop", name);
}

static void test_resumed(void) {
    char line[256];
    heading("stop and resume with another number of ranks");
    check_other_ranks("4 ranks, then 4", 4, 4);
    check_other_ranks("4 ranks, then 2", 4, 2);
    check_other_ranks("4 ranks, then 1", 4, 1);
    check_other_ranks("1 rank, then 4", 1, 4);
    static const char o[] =
        MODEL_OPTIONS "--batch 4 --dropout 0.1 --eval-every 5 --eval-batches 2 --patience 9";
    int ok = !run("%s --overwrite --steps 20 --log a.log --out a.safetensors --gpus 2", o);
    ok = ok && !run("%s --overwrite --steps 10 --decay-steps 20 --log b.log --out b.safetensors --gpus 2", o);
    ok = ok && !run("--resume b.safetensors --steps 20 --log b.log --eval-every 5 --eval-batches 2 "
                    "--patience 9 --gpus 2");
    check(ok && same_files("a.safetensors", "b.safetensors") &&
              same_files("a.best.safetensors", "b.best.safetensors"),
          "2 ranks, 10 steps and 10 resumed: the bytes of 20, best weights too");
    check(ok && same_logs("a.log", "b.log", 20), "the log goes on");
    ok = !run("%s --overwrite --steps 9 --log c.log --out c.safetensors --gpus 2", o);
    discard("c.best.safetensors"); // which rank 0 alone sees
    ok = ok && !run("--resume c.safetensors --steps 12 --log c.log --eval-every 5 --eval-batches 2 --gpus 2");
    check(ok && said("counts anew"), "best weights that are gone: rank 0 says it, and all know");
    if (without_tcp) {
        release();
        return;
    }
    static const char again[] = "--resume c.safetensors --eval-every 5 --eval-batches 2 --overwrite";
    snprintf(line, sizeof(line), "%s --out d.safetensors", again);
    usual(2, 2);
    start_rank(0, line);
    start_rank(1, again);
    int codes[] = {end_rank(0, 30), end_rank(1, 30)};
    check(!codes[0] && !codes[1] && same_tensors("c.safetensors", "d.safetensors"),
          "--out of rank 0 alone: it saves there, and the other takes part");
    release();
}

// ----------------------------------------------------------------------------
// rank 0 alone writes, prints and locks

// Names in the folder of the test, but for the data.
static int count_files(const char *path) {
    int n = 0;
    DIR *dir = opendir(path);
    for (struct dirent *entry; dir && (entry = readdir(dir)) != NULL;) n += entry->d_name[0] != '.';
    if (dir) closedir(dir);
    return n;
}

static void test_one_writes(void) {
    static const char o[] = "--data /text.of.test --dim 16 --layers 1 --heads 2 --seq 12 --batch 4 --steps 6 "
                            "--eval-every 2 --eval-batches 2 --save-every 1 --keep-every 3 --sample-every 2 "
                            "--patience 5 --log w.log --overwrite --out sub/w.safetensors";
    char line[1024], elsewhere[100];
    size_t size = 0;
    heading("rank 0 alone writes, prints and locks");
    snprintf(line, sizeof(line), "--data %s/text %s", work, strchr(o + 7, ' ') + 1);
    snprintf(elsewhere, sizeof(elsewhere), "%s/elsewhere", folder);
    mkdir(elsewhere, 0777);
    mkdir(in_work("sub"), 0777); // which rank 1 does not have
    usual(2, 2);
    as.folder = elsewhere;
    int ok = 1;
    for (int r = 0; r < 2; r++) start_rank(r, line);
    for (int r = 0; r < 2; r++) ok &= end_rank(r, 60) == 0;
    if (!ok) printf("  %s%s", words_of[0], words_of[1]);
    check(ok && !count_files(elsewhere),
          "the folder where rank 1 works stays empty: of files, logs, locks, snapshots");
    const unsigned char *of_first = slurp("../out0", &size);
    ok =
        ok && of_first && strstr((const char *)of_first, "---") && strstr((const char *)of_first, "saved to");
    const unsigned char *of_second = slurp("../out1", &size);
    check(ok && of_second && !size && !lines_told(2),
          "rank 1 prints nothing, rank 0 its lines and its samples");
    double losses[16];
    check(read_log("w.log", "train_loss", losses, 16) == 6, "the log has a line for each step");
    check(slurp("sub/w.step3.safetensors", &size) && slurp("sub/w.step6.safetensors", &size) &&
              slurp("sub/w.best.safetensors", &size),
          "the snapshots and the best weights are there");
    static const char *const ends[] = {"", ".best", ".step3", ".step6"};
    for (int i = 0; i < 4; i++) {
        snprintf(line, sizeof(line), "sub/w%s.safetensors", ends[i]);
        discard(line);
    }
    check(!count_files(in_work("sub")), "and nothing else");
    rmdir(elsewhere);
    release();
}

// ----------------------------------------------------------------------------
// whose each parameter is

static void test_division(void) {
    heading("the division: every number has one rank, and each about as many");
    for (int ranks = 1; ranks <= 5; ranks++) {
        Config c = config_with(ranks % 3, 300, 96, 3, 4, 2, 16);
        Model *m = create(&c, 1, 16, EVALUATE);
        char *owners = (char *)lend((size_t)m->table.count);
        Division d;
        int ok = !divide(&d, &m->table, c.n_layers, ranks, 64);
        int64_t most = 0, sum = 0;
        for (int p = 0; ok && p < d.n; p++) {
            const Piece *piece = &d.pieces[p];
            for (int64_t i = 0; i < piece->count; i++) owners[piece->offset + i]++;
            ok &= piece->offset >= d.begin[piece->range] &&
                  piece->offset + piece->count <= d.begin[piece->range + 1];
        }
        for (int r = 0; ok && r < ranks; r++) {
            sum += d.held[r];
            if (d.held[r] > most) most = d.held[r];
        }
        for (int64_t i = 0; ok && i < m->table.count; i++) ok = owners[i] == 1;
        check(ok && sum == m->table.count && d.begin[d.n_ranges] == sum &&
                  most <= sum / ranks + sum / 50 + 64 * ranks,
              "%d ranks: of %lld numbers no rank has more than %lld", ranks, (long long)sum, (long long)most);
        division_free(&d);
        model_free(m);
        release();
    }
}

// ----------------------------------------------------------------------------
// starters

static void check_node(const char *list, const char *node) {
    char first[64] = "";
    int result = first_node(first, sizeof(first), list);
    check(node ? !result && !strcmp(first, node) : result != 0, "\"%s\": %s", list, node ? node : "none");
}

// The environment as a list of words NAME=VALUE; what the job is then.
static int job_of(Job *j, const char *words, char *error) {
    char text[1024];
    forget_starters();
    memset(j, 0, sizeof(*j));
    snprintf(text, sizeof(text), "%s", words);
    for (char *word = strtok(text, " "); word; word = strtok(NULL, " ")) {
        char *equals = strchr(word, '=');
        *equals = 0;
        setenv(word, equals + 1, 1);
    }
    int result = job_from_environment(j, error);
    forget_starters();
    return result;
}

static void test_starters(void) {
    char error[ERROR_SIZE];
    Job a, b;
    heading("what starters say");
    check_node("node7", "node7");
    check_node("node7,node9", "node7");
    check_node("node[003-012]", "node003");
    check_node("node[3,7-9],other", "node3");
    check_node("r[1-2]n[04-05,9].cluster", "r1n04.cluster");
    check_node("r3n[8].x,r4", "r3n8.x");
    check_node("node[", NULL);
    check_node("node[x-3]", NULL);
    check_node("", NULL);

    check(!job_of(&a, "MASTER_ADDR=x MASTER_PORT=3", error), "no rank, no starter");
    int ok = job_of(
        &a, "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 MASTER_ADDR=n1 MASTER_PORT=29500 TORCHELASTIC_RUN_ID=r", error);
    check(ok == 1 && a.rank == 5 && a.ranks == 8 && a.local == 1 && !strcmp(a.address, "n1") &&
              a.port == 29501,
          "torchrun: rank, ranks, local rank, address, the port behind its own");
    ok = job_of(&b, "RANK=0 WORLD_SIZE=8 LOCAL_RANK=0 MASTER_ADDR=n1 MASTER_PORT=29500 TORCHELASTIC_RUN_ID=r",
                error);
    check(ok == 1 && !memcmp(a.token, b.token, sizeof(a.token)), "its ranks have one token");
    ok = job_of(&b, "RANK=0 WORLD_SIZE=8 MASTER_ADDR=n1 MASTER_PORT=29500 TORCHELASTIC_RUN_ID=s", error);
    check(ok == 1 && memcmp(a.token, b.token, sizeof(a.token)), "another job has another");
    ok = job_of(&b, "RANK=0 WORLD_SIZE=8 MASTER_ADDR=n1 MASTER_PORT=1 SESSA_PORT=777 SESSA_TOKEN=t", error);
    check(ok == 1 && b.port == 777, "SESSA_PORT rules");
    check(job_of(&b, "RANK=0 WORLD_SIZE=8", error) == FAILED && strstr(error, "MASTER_ADDR"),
          "no MASTER_ADDR: a line");
    check(job_of(&b, "RANK=8 WORLD_SIZE=8 MASTER_ADDR=n1", error) == FAILED && strstr(error, "rank 8 of 8"),
          "a rank that cannot be: a line");
    check(job_of(&b, "RANK=0 WORLD_SIZE=8 MASTER_ADDR=n1 MASTER_PORT=65535", error) == FAILED &&
              strstr(error, "65536"),
          "a port that cannot be: a line");

    static const char slurm[] = "SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=1 SLURM_JOB_ID=77 ";
    char line[512];
    snprintf(line, sizeof(line), "%sSLURM_STEP_ID=0 SLURM_JOB_NODELIST=a[1-4] SLURM_STEP_NODELIST=a[3-4]",
             slurm);
    ok = job_of(&a, line, error);
    check(ok == 1 && a.rank == 3 && a.ranks == 4 && a.local == 1 && !strcmp(a.address, "a3") &&
              a.port >= 20000 && a.port < 30000,
          "srun: the first node of the step, a port of the job");
    snprintf(line, sizeof(line), "%sSLURM_STEP_ID=1 SLURM_JOB_NODELIST=a[1-4]", slurm);
    ok = job_of(&b, line, error);
    check(ok == 1 && !strcmp(b.address, "a1") && memcmp(a.token, b.token, sizeof(a.token)),
          "else the job's; another step has another token");
    check(!job_of(&a, slurm, error), "the shell of a job is no step");
    snprintf(line, sizeof(line), "%sSLURM_STEP_ID=1 MASTER_ADDR=b MASTER_PORT=100", slurm);
    check(job_of(&a, line, error) == 1 && !strcmp(a.address, "b") && a.port == 101, "MASTER_ADDR rules");
    snprintf(line, sizeof(line), "%sSLURM_STEP_ID=1 SLURM_JOB_NODELIST=[", slurm);
    check(job_of(&a, line, error) == FAILED && strstr(error, "MASTER_ADDR"), "a list that is none: a line");

    static const char ompi[] = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 ";
    snprintf(line, sizeof(line), "%sMASTER_ADDR=c PMIX_NAMESPACE=prterun-c-1@1", ompi);
    check(job_of(&a, line, error) == 1 && a.rank == 1 && a.ranks == 4 && a.local == 1 &&
              !strcmp(a.address, "c"),
          "mpirun, also inside a job of Slurm");
    snprintf(line, sizeof(line), "%s%s SLURM_STEP_ID=0 OMPI_COMM_WORLD_LOCAL_SIZE=4", ompi, slurm);
    check(job_of(&a, line, error) == 1 && a.rank == 1 && !strcmp(a.address, "127.0.0.1"),
          "all on one machine: it is here");
    snprintf(line, sizeof(line), "%sOMPI_COMM_WORLD_LOCAL_SIZE=2", ompi);
    check(job_of(&a, line, error) == FAILED && strstr(error, "mpirun -x MASTER_ADDR"),
          "on several, no MASTER_ADDR: a line");
}

// ----------------------------------------------------------------------------
// what goes wrong at the start

#define FEW MODEL_OPTIONS "--batch 4 --steps 3 --eval-every 0 --overwrite --out f.safetensors "

// Two ranks with options of their own: both fail, with one line in all, which says this.
static void check_refused(const char *name, const char *first, const char *second, const char *words) {
    usual(2, 2);
    start_rank(0, first);
    start_rank(1, second);
    int codes[] = {end_rank(0, 20), end_rank(1, 20)};
    int found = strstr(words_of[0], words) || strstr(words_of[1], words);
    int ok = codes[0] > 0 && codes[1] > 0 && codes[0] < 128 && codes[1] < 128 && lines_told(2) == 1 && found;
    if (!ok) printf("  codes %d %d: %s%s\n", codes[0], codes[1], words_of[0], words_of[1]);
    check(ok, "%s: both end, with one line", name);
}

// Somebody who talks to a port: connected, or -1.
static int call_port(int port) {
    struct sockaddr_in at;
    memset(&at, 0, sizeof(at));
    at.sin_family = AF_INET;
    at.sin_port = htons((uint16_t)port);
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int i = 0; i < 500; i++) {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (!connect(fd, (struct sockaddr *)&at, sizeof(at))) return fd;
        close(fd);
        usleep(10000);
    }
    return -1;
}

// Strangers come to rank 0 while it waits, and it waits on.
static void check_strangers(void) {
    usual(2, 2);
    start_rank(0, FEW);
    int silent = call_port(as.port), loud = call_port(as.port), other = call_port(as.port);
    int said_all = write(loud, "GET / HTTP/1.1\r\n\r\n", 18) == 18;
    Hello hello;
    memset(&hello, 0, sizeof(hello));
    memcpy(hello.magic, MAGIC, sizeof(MAGIC)); // of another job: another token
    hello.rank = 1;
    hello.ranks = 2;
    said_all &= write(other, &hello, sizeof(hello)) == (ssize_t)sizeof(hello);
    start_rank(1, FEW);
    int codes[] = {end_rank(0, 20), end_rank(1, 20)};
    check(said_all && !codes[0] && !codes[1] && !lines_told(2),
          "strangers at the port, silent, loud, of another job: the ranks meet all the same");
    close(silent);
    close(loud);
    close(other);
}

// Somebody else sits where rank 0 should be.
static void check_other_server(void) {
    usual(2, 2);
    int ear = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    struct sockaddr_in at;
    memset(&at, 0, sizeof(at));
    at.sin_family = AF_INET;
    at.sin_port = htons((uint16_t)as.port);
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(ear, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    int ok = !bind(ear, (struct sockaddr *)&at, sizeof(at)) && !listen(ear, 5);
    start_rank(0, FEW);
    int code = end_rank(0, 20);
    check(ok && code == 1 && lines_told(1) == 1 && strstr(words_of[0], "SESSA_PORT"),
          "the port is taken: rank 0 says so");
    start_rank(1, FEW);
    struct pollfd knock = {ear, POLLIN, 0};
    int guest = poll(&knock, 1, 20000) > 0 ? accept(ear, NULL, NULL) : -1;
    ok = ok && write(guest, "220 mail ready\r\n", 16) == 16;
    code = end_rank(1, 20);
    check(ok && code == 1 && strstr(words_of[1], "is not rank 0 of this job"),
          "a rank that finds somebody else there says so");
    close(guest);
    close(ear);
}

// This test plays a rank of another version.
static void check_other_version(void) {
    usual(2, 2);
    char text[] = "of this test", answer_bytes[sizeof(Answer)];
    start_rank(0, FEW);
    Hello hello;
    memset(&hello, 0, sizeof(hello));
    memcpy(hello.magic, MAGIC, sizeof(MAGIC));
    hello.token[0] = hash_bytes((const unsigned char *)text, strlen(text));
    hello.token[1] = splitmix64(hello.token[0] ^ 2);
    hello.rank = 1;
    hello.ranks = 2;
    snprintf(hello.version, sizeof(hello.version), "1.1, float32, 80 options");
    int fd = call_port(as.port);
    int ok = write(fd, &hello, sizeof(hello)) == (ssize_t)sizeof(hello);
    ok = ok && recv(fd, answer_bytes, sizeof(answer_bytes), MSG_WAITALL) == (ssize_t)sizeof(answer_bytes);
    Answer refusal;
    memcpy(&refusal, answer_bytes, sizeof(refusal));
    int code = end_rank(0, 20);
    check(ok && refusal.refused && !refusal.token[0] && code == 1 && lines_told(1) == 1 &&
              strstr(words_of[0], "rank 1 is version 1.1") && strstr(words_of[0], VERSION),
          "another version: rank 0 says it, and the other is refused");
    close(fd);
}

static rlim_t files_of_child;
static void allow_few_files(void) {
    struct rlimit few = {files_of_child, files_of_child};
    setrlimit(RLIMIT_NOFILE, &few);
}

static void test_refused(void) {
    heading("what goes wrong before the first step: one clear line, and no rank starts");
    check_refused("another seed", FEW "--seed 1", FEW "--seed 2", "--seed 2: rank 0 has another");
    static char other[512];
    snprintf(other, sizeof(other), "%s", FEW);
    memcpy(strstr(other, "--data text"), "--data othr", 11);
    size_t size = 0;
    unsigned char *text = slurp("text", &size);
    text[4321] = text[4321] == 'a' ? 'b' : 'a';
    spill("othr", text, size);
    check_refused("other data", FEW, other, "data_content");
    check_refused("data that is not there", FEW, "--data none --batch 4", "none: No such file");
    check_refused("another learning rate", FEW, FEW "--lr 1e-3", "--lr 0.001: rank 0 has another");
    check_refused("a log of rank 0 alone", FEW "--log e.log", FEW, "--log is not set: rank 0 has one");
    check_refused("a log of rank 1 alone", FEW, FEW "--log e.log", "--log e.log: rank 0 has none");
    check_refused("another width", FEW, FEW "--kv-heads 2", "--kv-heads 2: rank 0 has another");
    check_refused("a batch that does not divide", MODEL_OPTIONS "--batch 5", MODEL_OPTIONS "--batch 5",
                  "--batch 5 does not divide by the 2 processes");
    check_refused("a wrong option", "--data text --heads 3 --batch 4", "--data text --heads 3 --batch 4",
                  "--heads 3");
    check_refused("--gpus beside a starter", FEW "--gpus 2", FEW "--gpus 2", "a starter counts");
    int code = run(MODEL_OPTIONS "--batch 6 --gpus 4");
    check(code == 2 && complained("--batch 6 does not divide by the 4") &&
              !strchr((char *)complaint, '\n')[1],
          "--gpus: a batch that does not divide, exit code 2");
    set_number("SLURM_PROCID", 0);
    set_number("SLURM_NTASKS", 1);
    set_number("SLURM_STEP_ID", 0);
    code = run(FEW "--gpus 2");
    forget_starters();
    check(!code && said("in each of 2 processes"), "--gpus 2 inside a starter's one process: two");
    struct rlimit files, few = {60, 60};
    getrlimit(RLIMIT_NOFILE, &files);
    few.rlim_max = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &few);
    code = run(FEW "--gpus 4");
    check(!code, "few open files, and more allowed: they are asked for");
    files_of_child = 60;
    prepare_child = allow_few_files;
    code = run(MODEL_OPTIONS "--batch 64 --steps 3 --gpus 64");
    prepare_child = NULL;
    setrlimit(RLIMIT_NOFILE, &files);
    check(code == 1 && complained("64 processes take 356 open files, and here are at most 60 (ulimit -Hn)"),
          "no more allowed: a line");
    check(run("--load x --generate 9 --gpus 2") == 2 && complained("changes nothing"),
          "--gpus with --generate is refused");
    check_strangers();
    check_other_server();
    check_other_version();

    usual(2, 2);
    start_rank(0, FEW "--timeout 3");
    as.port = free_port(); // they look for each other at two places
    start_rank(1, FEW "--timeout 3");
    int codes[] = {end_rank(0, 30), end_rank(1, 30)};
    check(codes[0] == 1 && lines_told(1) == 1 && strstr(words_of[0], "1 of 2 ranks (1) did not come"),
          "a rank that never comes");
    check(codes[1] == 1 && strstr(words_of[1], "rank 0 is not at 127.0.0.1"), "a rank that finds nobody");
    as.address = "fe80::1%none"; // what is wrong with it no name server needs to be asked
    start_rank(1, FEW "--timeout 3");
    code = end_rank(1, 30);
    check(code == 1 && strstr(words_of[1], "fe80::1%none") && !strstr(words_of[1], "Success"),
          "an address that is none");
    usual(2, 2);
    start_rank(0, FEW "--timeout 3");
    as.token = "of another";
    start_rank(1, FEW "--timeout 3");
    codes[0] = end_rank(0, 30);
    codes[1] = end_rank(1, 30);
    check(codes[0] == 1 && codes[1] == 1 && strstr(words_of[0], "connections were not of this job") &&
              strstr(words_of[1], "is not rank 0 of this job"),
          "another token: both say what they saw");
    release();
}

// ----------------------------------------------------------------------------
// what goes wrong later

#define ENDLESS MODEL_OPTIONS "--batch 4 --steps 100000 --eval-every 0 --save-every 1 --overwrite "

// Waits until the log has so many lines.
static void wait_for_log(const char *log, int lines) {
    double steps[64];
    for (int i = 0; i < 4000 && read_log(log, "step", steps, 64) < lines; i++) {
        release();
        usleep(5000);
    }
}

// The children of a process, as many as are found.
static int children_of(pid_t parent, pid_t *children, int most) {
    char path[64], text[256] = "";
    snprintf(path, sizeof(path), "/proc/%d/task/%d/children", (int)parent, (int)parent);
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    if (!fgets(text, sizeof(text), file)) text[0] = 0;
    fclose(file);
    int n = 0;
    for (char *word = strtok(text, " "); word && n < most; word = strtok(NULL, " "))
        if (atoi(word) > 0) children[n++] = (pid_t)atoi(word);
    return n;
}

// Ranks of a starter, two machines of two; one gets a signal. The others end in time, one line names it, and
// the last save is whole.
static void check_lost(const char *name, int lost, int number, const char *options, const char *words,
                       double limit) {
    char line[512];
    usual(4, 2);
    discard("k.log");
    snprintf(line, sizeof(line), "%s --timeout 3 --log k.log --out k.safetensors", options);
    for (int r = 0; r < 4; r++) start_rank(r, line);
    wait_for_log("k.log", 5);
    double begin = seconds();
    send_signal(ranks_of_test[lost], number);
    int ok = 1;
    for (int r = 0; r < 4; r++)
        if (r != lost) ok &= end_rank(r, 20) == 1;
    double took = seconds() - begin;
    send_signal(ranks_of_test[lost], SIGKILL);
    end_rank(lost, 5);
    int found = 0;
    for (int r = 0; r < 4; r++) found |= strstr(words_of[r], words) != NULL;
    if (!ok || !found || lines_told(4) != 1)
        printf("  %s|%s|%s|%s\n", words_of[0], words_of[1], words_of[2], words_of[3]);
    check(ok && took < limit && found && lines_told(4) == 1 && step_of("k.safetensors") > 0,
          "%s: the others end within %.0f s, one line, the save is whole", name, limit);
    ok = !run("--resume k.safetensors --steps %d --eval-every 0 --gpus 2", step_of("k.safetensors") + 3);
    check(ok, "and the run goes on with 2 ranks");
}

// The same of ranks that --gpus has started.
static void check_lost_child(const char *name, int ranks, int lost, int number, const char *options,
                             const char *words, double limit) {
    pid_t children[8] = {0};
    char line[512];
    discard("k.log");
    snprintf(line, sizeof(line), "--run %s --timeout 3 --log k.log --out k.safetensors --gpus %d", options, ranks);
    pid_t parent = start_and_wait_for_log(line, "k.log", 3);
    int n = children_of(parent, children, 8);
    double begin = seconds();
    if (n > lost) send_signal(children[lost], number);
    else send_signal(parent, SIGKILL); // nothing to look at: the check fails
    int code = finish(parent);
    double took = seconds() - begin;
    int one_line = complaint && strchr((char *)complaint, '\n') && !strchr((char *)complaint, '\n')[1];
    int ended = 1;
    for (int r = 0; r < n; r++) ended &= kill(children[r], 0) != 0;
    if (!one_line) printf("  code %d: %s\n", code, complaint ? (char *)complaint : "");
    check(n == ranks && code == 1 && took < limit && complained(words) && one_line && ended &&
              step_of("k.safetensors") > 0,
          "%s: all end within %.0f s, one line, the save is whole", name, limit);
}

// A signal to the process that --gpus is, or to all, as a terminal sends it.
static void check_asked(const char *name, int number, int to_all, const char *machine_options) {
    pid_t children[8] = {0};
    char line[512];
    discard("k.log");
    snprintf(line, sizeof(line), "--run %s--log k.log --out k.safetensors --gpus 2", machine_options);
    pid_t parent = start_and_wait_for_log(line, "k.log", 5);
    int n = children_of(parent, children, 8);
    for (int r = 0; to_all && r < n; r++) send_signal(children[r], number);
    send_signal(parent, number);
    int code = finish(parent), step = step_of("k.safetensors"), stopped = said("stopped after step") != NULL;
    int once = stopped && !strstr(strstr((char *)output, "stopped after step") + 1, "stopped after step");
    static double steps[1 << 14];
    int lines = read_log("k.log", "step", steps, 1 << 14);
    check(n == 2 && code == 130 && once && step > 0 && !complaint_size && lines == step && said(" --gpus 2"),
          "%s: saved once, at the step of the log, exit code 130", name);
}

// The process that started them is killed: they end by themselves, saved.
static void check_orphans(void) {
    pid_t children[8] = {0};
    discard("k.log");
    prctl(PR_SET_CHILD_SUBREAPER, 1); // in a container process 1 may wait for nobody
    pid_t parent =
        start_and_wait_for_log("--run " ENDLESS "--log k.log --out k.safetensors --gpus 2", "k.log", 5);
    int n = children_of(parent, children, 8), left = n;
    send_signal(parent, SIGKILL);
    finish(parent);
    for (int i = 0; i < 2000 && left; i++) {
        int status;
        left = 0;
        for (int r = 0; r < n; r++)
            if (waitpid(children[r], &status, WNOHANG) != children[r]) left += !kill(children[r], 0);
        usleep(5000);
    }
    prctl(PR_SET_CHILD_SUBREAPER, 0);
    static double steps[1 << 14];
    int lines = read_log("k.log", "step", steps, 1 << 14);
    check(n == 2 && !left && lines >= 5 && step_of("k.safetensors") == lines,
          "the process that started them is killed: they end, saved");
}

static void test_lost(void) {
    heading("what goes wrong while they train, started by --gpus");
    check_lost_child("--gpus, rank 1 killed", 4, 1, SIGKILL, ENDLESS, "rank 1 was ended by signal 9", 8);
    check_lost_child("--gpus, rank 0 killed", 4, 0, SIGKILL, ENDLESS, "rank 0 was ended by signal 9", 8);
    check_lost_child("--gpus, rank 2 hangs", 4, 2, SIGSTOP, ENDLESS, "rank 2 has not come for 3 s", 16);
    check_orphans();
    check_asked("SIGTERM to the one who started them", SIGTERM, 0, ENDLESS);
    check_asked("SIGINT to all", SIGINT, 1,
                MODEL_OPTIONS "--batch 4 --steps 100000 --eval-every 3 --overwrite ");
    release();
}

#define WIDE "--data text --dim 256 --layers 1 --heads 4 --seq 4 --batch 4 --steps 100000 --eval-every 0 " \
             "--save-every 1 --overwrite "

static void test_lost_of_starter(void) {
    heading("what goes wrong while they train, started by a starter");
    check_lost("rank 3 killed", 3, SIGKILL, ENDLESS, "rank 3 on beta has ended", 8);
    check_lost("rank 0 killed", 0, SIGKILL, ENDLESS, "rank 0 on alpha has ended", 8);
    check_lost("rank 1 hangs (--timeout 3)", 1, SIGSTOP, ENDLESS, "rank 1 on alpha has not come for 3 s", 13);
    check_lost("rank 0 hangs", 0, SIGSTOP, ENDLESS, "rank 0 on alpha has not come for 3 s", 13);

    check_lost("rank 0 hangs, and is sent more than a connection holds", 0, SIGSTOP, WIDE,
               "rank 0 on alpha has not come for 3 s", 13);

    // one of them is asked
    usual(2, 1);
    discard("k.log");
    for (int r = 0; r < 2; r++) start_rank(r, ENDLESS "--log k.log --out k.safetensors");
    wait_for_log("k.log", 5);
    send_signal(ranks_of_test[1], SIGTERM);
    int codes[] = {end_rank(0, 20), end_rank(1, 20)};
    check(codes[0] == 130 && codes[1] == 130 && !lines_told(2) && step_of("k.safetensors") > 4,
          "SIGTERM to one rank of a starter: all end with it, saved");

    // rank 0 cannot write: its line, and the end of all
    usual(2, 2);
    discard("k.log");
    for (int r = 0; r < 2; r++) start_rank(r, ENDLESS "--log k.log --out k.safetensors");
    wait_for_log("k.log", 5);
    spill("k.safetensors", "another", 7);
    codes[0] = end_rank(0, 20);
    codes[1] = end_rank(1, 20);
    check(codes[0] == 1 && codes[1] == 1 && lines_told(2) == 1 &&
              strstr(words_of[0], "another file was put there"),
          "rank 0 cannot save: its line alone, and the end of all");
    for (int r = 0; r < 2; r++) {
        char log[] = "/dev/full";
        char line[512];
        snprintf(line, sizeof(line), ENDLESS "--log %s --out m.safetensors", log);
        if (r == 0) usual(2, 2);
        start_rank(r, line);
    }
    codes[0] = end_rank(0, 20);
    codes[1] = end_rank(1, 20);
    check(codes[0] == 1 && codes[1] == 1 && lines_told(2) == 1 && strstr(words_of[0], "/dev/full") &&
              step_of("m.safetensors") == 1,
          "a log that cannot be written: the step is saved by all, then the end");
    release();
}

// Removes what is left beside the work folder, and all of it.
static void clean_up(void) {
    glob_t left;
    char pattern[100];
    snprintf(pattern, sizeof(pattern), "%s/{out?,err?,nccl_*/*,nccl_*}", folder);
    if (!glob(pattern, GLOB_BRACE | GLOB_NOSORT, NULL, &left)) {
        for (int again = 0; again < 2; again++) // folders are empty the second time
            for (size_t i = 0; i < left.gl_pathc; i++)
                if (unlink(left.gl_pathv[i])) rmdir(left.gl_pathv[i]);
        globfree(&left);
    }
    remove_folder();
}

// ----------------------------------------------------------------------------
// the CUDA twin

#define TWIN_OPTIONS "--data few --dim 16 --layers 3 --heads 2 --seq 8 --warmup 2 "
#define TWIN_ENDLESS TWIN_OPTIONS "--batch 4 --steps 100000 --eval-every 0 --save-every 1 --overwrite "

static const char *twin;  // its binary
static int emulated;      // on a machine without a card: fewer steps
static int cards = 4;     // and so many ranks
static int fast_ones;     // alone

static void use_exchange(const char *name) {
    if (strcmp(name, "nccl")) setenv("SESSA_TEST_EXCHANGE", name, 1);
    else unsetenv("SESSA_TEST_EXCHANGE"); // as users have it
}

// By NCCL, and through memory, the bits of which the CPU's part of this test knows. apart: 0: both in the ranges
// that users have, here two; 1, 2: by NCCL, through memory every layer is a range of its own. The norm's sum has
// another order then.
static void check_same_exchange(const char *name, int ranks, int per_machine, const char *options, int apart) {
    char line[512];
    static const char *const names[] = {"nccl", "shared"}, *const files[] = {"a", "b"};
    int ok = 1;
    for (int i = 0; ok && i < 2; i++) {
        use_exchange(names[i]);
        if (apart == i + 1) setenv("SESSA_TEST_RANGE", "1", 1);
        snprintf(line, sizeof(line), "%s %s--steps 3 --overwrite --out %s.safetensors", options,
                 apart ? "--clip 0 " : "", files[i]);
        ok = per_machine ? run_ranks(ranks, per_machine, line) : !run_gpus(ranks, line);
        unsetenv("SESSA_TEST_RANGE");
    }
    use_exchange("nccl");
    check(ok && (apart ? same_tensors("a.safetensors", "b.safetensors")
                       : same_files("a.safetensors", "b.safetensors")),
          "%d ranks%s: the bits of sums in the promised order", ranks, name);
}

// One rank that exchanges: what is its own stays, or it sends all to itself.
static void check_one_that_exchanges(void) {
    static const char *const ways[] = {"nccl", "itself"}, *const files[] = {"a", "b"};
    int ok = 1;
    for (int i = 0; i < 2; i++) {
        setenv("SESSA_TEST_EXCHANGE", ways[i], 1);
        ok = ok && !run(TWIN_OPTIONS "--batch 2 --steps 3 --overwrite --out %s.safetensors", files[i]);
    }
    unsetenv("SESSA_TEST_EXCHANGE");
    ok = ok && !run(TWIN_OPTIONS "--batch 2 --steps 3 --overwrite --out c.safetensors");
    check(ok && same_files("a.safetensors", "c.safetensors") && same_files("b.safetensors", "c.safetensors"),
          "one rank, and one that sends to itself: the bytes of none");
}

static void test_twin_by_nccl(void) {
    int several_machines = emulated && !without_tcp;
    heading("the twin, by NCCL: the bits of the exchange through memory");
    check_one_that_exchanges();
    if (several_machines)
        check_same_exchange(" on machines with 2 and 1, dropout", 3, 2, TWIN_OPTIONS "--batch 3 --dropout 0.2", 1);
    if (emulated) check_same_exchange("", 3, 0, TWIN_OPTIONS "--batch 3", 0); // of two the order is none
    if (!fast_ones) {
        check_same_exchange("", 2, 0, TWIN_OPTIONS "--batch 4", 0);
        check_same_exchange(", dropout, 2 micro-batches, the other's layers apart", cards, 0,
                            TWIN_OPTIONS "--batch 4 --accum 2 --dropout 0.2", 2);
        check_same_exchange(", --plain", cards, 0, TWIN_OPTIONS "--batch 4 --plain", 0);
    }
    if (several_machines && !fast_ones) {
        check_same_exchange(" on 2 machines", 4, 2, TWIN_OPTIONS "--batch 4", 0);
        check_same_exchange(" on 2 machines, layers apart", 2, 1, TWIN_OPTIONS "--batch 4", 1);
    }
    if (emulated) {
        setenv("EMULATE_DEVICES", "1", 1);
        int code = run(TWIN_OPTIONS "--batch 4 --steps 3 --overwrite --out a.safetensors --gpus 2");
        setenv("EMULATE_DEVICES", "4", 1);
        check(code == 1 && complained("ranks 0 and 1 have one GPU") && !strchr((char *)complaint, '\n')[1],
              "more ranks than cards: one line");
    }
    release();
}

// In fp32 a hundred roundings, 2^-24 each, make 6e-6.
#define ROUNDINGS 1e-5
// In bf16 a rounding may turn another one over, 2^-8 of a number: so another order of sums goes its own way. How far
// is measured with one GPU, whose whole batch stands beside --accum: its sums are those of other products. That
// must be little in itself, else it bounds nothing.
static void check_bf16(int steps) {
    static const char halves[] = TWIN_OPTIONS "--lr 1e-3 --precision bf16 --batch 2 --accum 2",
                      whole[] = TWIN_OPTIONS "--lr 1e-3 --precision bf16 --batch 4";
    double apart = losses_apart(steps, 2, whole, halves), control = losses_apart(steps, 1, whole, halves);
    check_error(control, 1e-2, "bf16, one GPU, --batch 4, against --batch 2 --accum 2: %d steps", steps);
    // and what the log's nine digits leave
    check_error(apart, 3 * control + 1e-8, "bf16, 2 ranks, --batch 4, against the same: three times that");
}

static void test_twin(void) {
    int steps = emulated ? 4 : 100;
    heading("the twin: several ranks against one");
    check_first_gradients(TWIN_OPTIONS, fast_ones ? 2 : cards, "sessa");
    check_losses("fp32, dropout, --accum 2, against one GPU", steps, fast_ones ? 2 : cards,
                 TWIN_OPTIONS "--precision fp32 --batch 4 --accum 2 --dropout 0.2",
                 TWIN_OPTIONS "--precision fp32 --batch 4 --accum 2 --dropout 0.2", ROUNDINGS);
    if (!fast_ones) {
        check_losses("fp32, 2 ranks, --batch 4, against --batch 2 --accum 2", steps, 2,
                     TWIN_OPTIONS "--precision fp32 --batch 4",
                     TWIN_OPTIONS "--precision fp32 --batch 2 --accum 2", ROUNDINGS);
        check_losses("bf16, dropout, --accum 2, against one GPU", 4, cards,
                     TWIN_OPTIONS "--lr 1e-3 --batch 4 --accum 2 --dropout 0.2",
                     TWIN_OPTIONS "--lr 1e-3 --batch 4 --accum 2 --dropout 0.2", 1e-3);
        check_bf16(emulated ? 4 : 20);
    }

    heading("the twin: stop and resume, with other numbers of ranks, and on the CPU");
    static const char again[] = "--overwrite --eval-every 0 --steps 2";
    int ok = !run(TWIN_OPTIONS "--batch 4 --dropout 0.1 --decay-steps 9 %s --out a.safetensors --gpus 2", again);
    ok = ok && !run("--resume a.safetensors %s --out b.safetensors --gpus %d", again, fast_ones ? 1 : cards);
    if (fast_ones) {
        check(ok && same_tensors("a.safetensors", "b.safetensors"), "2 ranks, then 1: the same bytes");
    } else {
        ok = ok && !run("--resume b.safetensors %s --out c.safetensors", again);
        program = self;
        ok = ok && !run("--resume c.safetensors %s --out d.safetensors --gpus 2", again);
        program = twin;
        ok = ok && !run("--resume d.safetensors %s --out e.safetensors --gpus 2", again);
        check(ok && same_tensors("a.safetensors", "b.safetensors") &&
                  same_tensors("a.safetensors", "c.safetensors") &&
                  same_tensors("a.safetensors", "d.safetensors") && same_files("a.safetensors", "e.safetensors"),
              "2 ranks, %d, 1, 2 of the CPU, 2: the same bytes", cards);
        ok = !run(TWIN_OPTIONS "--batch 4 --dropout 0.1 --decay-steps 9 --overwrite --eval-every 0 --steps 4 "
                               "--out b.safetensors --gpus 2");
        ok = ok && !run("--resume e.safetensors --eval-every 0 --steps 4 --gpus 2");
        check(ok && same_tensors("b.safetensors", "e.safetensors"),
              "and on to the bytes of a run without a stop");
    }

    heading("the twin: a rank that is lost");
    int n = fast_ones ? 2 : cards;
    char words[64];
    check_lost_child("rank 1 killed", n, 1, SIGKILL, TWIN_ENDLESS, "rank 1 was ended by signal 9", 8);
    snprintf(words, sizeof(words), "rank %d has not come for 3 s", n - 1);
    if (!fast_ones) check_lost_child("the last rank hangs", n, n - 1, SIGSTOP, TWIN_ENDLESS, words, 24);
    release();
}

static void test_all_of_twin(const char *exchange) {
    forget_starters();
    without_tcp = !has_loopback();
    emulated = getenv("EMULATE_DEVICES") != NULL;
    open_folder();
    setenv("TMPDIR", folder, 1); // for the messages of an NCCL that is emulated
    copy_file("text", "few");
    check(!truncate(in_work("few"), 400), "a short text");
    program = twin;
    use_exchange(exchange);
    if (!strcmp(exchange, "nccl")) test_twin_by_nccl();
    test_twin();
    clean_up();
}

// ----------------------------------------------------------------------------

// Not a part of main: see test_runs.c.
__attribute__((noinline)) static void test_all(void) {
    forget_starters();
    without_tcp = !has_loopback();
    if (without_tcp) printf("no loopback here: parts over TCP are left out\n");
    open_folder();
    test_starters();
    test_division();
    test_reference();
    test_against_one();
    test_validation();
    test_resumed();
    test_lost();
    if (!without_tcp) test_one_writes();
    if (!without_tcp) test_refused();
    if (!without_tcp) test_lost_of_starter();
    clean_up();
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "--run")) {
        start_again(argv);
        argv[1] = argv[0];
        return run_in_ranks(argc - 1, argv + 1, &cpu_backend, ranks_backend);
    }
    static char path[PATH_MAX];
    int of_twin = argc > 2 && argc < 5 && (!strcmp(argv[2], "shared") || !strcmp(argv[2], "nccl"));
    fast_ones = argc == 4 && !strcmp(argv[3], "short");
    if (argc == 4 && !fast_ones) cards = atoi(argv[3]);
    if (argc > 1 && (!of_twin || cards < 2 || cards > 4 || cards == 3 || !realpath(argv[1], path))) {
        fprintf(stderr, "test_ranks: takes nothing, or a program, its exchange, shared or nccl, and 2 or 4 cards, "
                        "or short\n");
        return 1;
    }
    begin(argv);
    go_to_data();
    n_threads = "1";
    twin = path;
    if (of_twin) test_all_of_twin(argv[2]);
    else test_all();
    return report();
}
