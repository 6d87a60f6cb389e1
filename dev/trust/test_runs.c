/*
The test of the program as a user runs it: stop and resume, threads, the order of the data, scores,
generation, the smallest models, limits of the system, terminals.

    ./test_runs                    everything
    ./test_runs ./test_sessacu     what the twin must do as well: that binary is the one started with --run

Built twice, as test_sessa is. A checkpoint is float32: what resumes from one is tested in float32 alone.
*/
#define SESSA_NO_MAIN
#include "../../train_sessa.c"
#include "check.h"
#include "run.h"
#include <poll.h>
#include <sched.h>

// ----------------------------------------------------------------------------
// stop and resume

// 20 steps at once, against 10 and 10, and against 10, 5 and 5.
static void check_resume(const char *name, const char *options) {
    int ok = !run("%s --steps 20 --out a.safetensors --log a.log", options);
    ok = ok && !run("%s --steps 10 --decay-steps 20 --out b.safetensors --log b.log", options);
    copy_file("b.safetensors", "half.safetensors");
    copy_file("b.best.safetensors", "half.best.safetensors");
    ok = ok && !run("--resume b.safetensors --steps 20 --log b.log " WATCH);
    int same = same_files("a.safetensors", "b.safetensors");
    int same_best = same_files("a.best.safetensors", "b.best.safetensors");
    check(ok && same && same_best, "%s: 10 steps and 10 resumed write the bytes of 20, best weights too",
          name);

    int logged = same_logs("a.log", "b.log", 20);
    double steps[64];
    ok = !run("--resume half.safetensors --out c.safetensors --overwrite --steps 15 --log b.log " WATCH);
    ok = ok && read_log("b.log", "step", steps, 64) == 15;
    ok = ok && !run("--resume c.safetensors --steps 20 --log b.log " WATCH);
    logged = logged && same_logs("a.log", "b.log", 20);
    check(ok && logged && same_files("a.safetensors", "c.safetensors"),
          "%s: the log goes on, and is cut back to the resumed step", name);
}

static void check_interrupt(void) {
    static const char endless[] = "--run --data text " SMALL "--steps 100000 --eval-every 0 --dropout 0.1 "
                                  "--log i.log --out i.safetensors";
    pid_t child = start_and_wait_for_log(endless, "i.log", 4);
    kill(child, SIGINT);
    int code = finish(child), step = step_of("i.safetensors"), steps = step + 5;
    check(code == 130 && said("--resume") && step > 0,
          "Ctrl-C: exit code 130, the run saved, the command that goes on printed");
    code = run("--resume i.safetensors --steps %d --eval-every 0", steps);
    code = code || run("--data text " SMALL "--steps %d --decay-steps 100000 --eval-every 0 --dropout 0.1 "
                       "--out j.safetensors",
                       steps);
    check(!code && same_files("i.safetensors", "j.safetensors"),
          "Ctrl-C, then resumed: the bytes of a run that was not stopped");
}

static void check_killed(void) {
    static const char saving[] = "--run --data text " SMALL "--steps 100000 --save-every 1 --log k.log "
                                 "--out i.safetensors";
    int whole = 0;
    for (int i = 0; i < 5; i++) { // killed while it saves at every step
        discard("i.safetensors");
        discard("k.log");
        pid_t child = start_and_wait_for_log(saving, "k.log", 3 + i);
        kill(child, SIGKILL);
        finish(child);
        whole += step_of("i.safetensors") >= 0;
    }
    check(whole == 5, "killed while saving, five times: the file is whole");
}

static void check_warmup(void) {
    Safetensors file;
    int ok = !run("--data text --overwrite --dim 16 --layers 1 --heads 2 --seq 12 --batch 2 --steps 20 "
                  "--eval-every 0 --out w.safetensors");
    ok = ok && open_tensors(&file, "w.safetensors");
    if (ok) {
        const char *warmup = safetensors_meta(&file, "warmup");
        const char *length = safetensors_meta(&file, "decay_steps");
        ok = warmup && length && !strcmp(warmup, "3") && !strcmp(length, "20");
        safetensors_free(&file);
    }
    check(ok, "a schedule of 20 steps warms up for 3 unless told otherwise, and the file says so");
}

static void test_resume(void) {
    heading("stop and resume, bit for bit");
    check_resume("text, dropout, two micro-batches", "--data text " SMALL WATCH "--dropout 0.2 --accum 2");
    check_resume("attention on tokens",
                 "--data tokens.bin --vocab 20 --mixer attention " SMALL WATCH "--kv-heads 1");
    check_resume("examples, epoch after epoch", "--data set.safetensors " SMALL WATCH);
    check_resume("mamba2", "--data text --mixer mamba2 --state-dim 8 " SMALL WATCH);
    check_interrupt();
    check_killed();
    check_warmup();
    release();
}

// ----------------------------------------------------------------------------
// what does not change the numbers: threads, micro-batches, plain loops

static void check_threads(const char *shape) {
    int ok = 1;
    static const char *counts[] = {"1", "2", "3"};
    for (int t = 0; t < 3; t++) {
        n_threads = counts[t];
        ok &= !run("--data text --overwrite --dim 48 --layers 2 --heads 4 --dropout 0.1 --eval-every 0 "
                   "--out t%d.safetensors %s",
                   t, shape);
    }
    n_threads = "2";
    ok = ok && same_files("t0.safetensors", "t1.safetensors");
    ok = ok && same_files("t0.safetensors", "t2.safetensors");
    check(ok, "the same bytes with 1, 2 and 3 threads: %s", shape);
}

static void check_micro_batches(const char *data) {
    static const char options[] = TINY "--seq 12 --steps 6 --eval-every 0";
    double x[8], y[8], worst = 0;
    int ok = !run("--data %s %s --batch 8 --log x.log", data, options);
    ok = ok && !run("--data %s %s --batch 4 --accum 2 --log y.log", data, options);
    ok = ok && read_log("x.log", "train_loss", x, 8) == 6 && read_log("y.log", "train_loss", y, 8) == 6;
    for (int s = 0; s < 6; s++) worst_of(&worst, ok ? fabs(x[s] - y[s]) / x[s] : NAN);
    check_error(worst, bound_of(1e-5, 1e-12), "%s: losses of --batch 4 --accum 2 against --batch 8", data);
}

static void test_threads(void) {
    static const char *shapes[] = {
        "--seq 150 --batch 1 --steps 3",
        "--seq 33 --batch 3 --steps 3 --accum 2 --mixer attention",
        "--seq 70 --batch 2 --steps 2 --kv-heads 1",
        "--seq 300 --batch 3 --steps 2 --kv-heads 1",
        "--seq 90 --batch 1 --steps 3 --mixer mamba2 --head-dim 24",
        "--seq 40 --batch 3 --steps 2 --mixer mamba2 --head-dim 96",
    };
    heading("threads and micro-batches");
    for (int i = 0; i < 6; i++) check_threads(shapes[i]);
    check_micro_batches("text");
    check_micro_batches("set.safetensors");
    release();
}

// --plain trains, evaluates, generates and resumes what the fast ways do, but for rounding.
static void check_plain(const char *mixer) {
    double fast[8], slow[8], mixed[8], worst = 0;
    double rounded = bound_of(0, 1e-7); // a checkpoint is float32, and the mixed run goes on from one
    char o[128];
    snprintf(o, sizeof(o), "--data text --overwrite --mixer %s %s", mixer,
             "--dim 32 --layers 2 --seq 70 --batch 3 --dropout 0.1");
    int ok = !run("%s --steps 6 --log x.log --out x.safetensors", o);
    ok = ok && !run("%s --steps 6 --log y.log --out y.safetensors --plain", o);
    ok = ok && !run("%s --steps 3 --decay-steps 6 --log z.log --out z.safetensors --plain", o);
    ok = ok && !run("--resume z.safetensors --steps 6 --log z.log --overwrite");
    ok = ok && read_log("x.log", "train_loss", fast, 8) == 6 && read_log("y.log", "train_loss", slow, 8) == 6;
    ok = ok && read_log("z.log", "train_loss", mixed, 8) == 6;
    for (int s = 0; s < 6; s++) {
        worst_of(&worst, ok ? fabs(slow[s] / fast[s] - 1) : NAN);
        worst_of(&worst, ok ? fabs(mixed[s] / fast[s] - 1) - rounded : NAN);
    }
    check_error(worst, bound_of(1e-5, 1e-12), "%s: losses of 6 steps by plain loops, and of 3 and 3 more",
                mixer);

    double scores[2];
    for (int way = 0; way < 2; way++) {
        ok = ok && !run("--load x.safetensors --eval --data text%s", way ? " --plain" : "");
        scores[way] = ok ? atof((char *)output + strlen("val_loss ")) : NAN;
    }
    check_error(fabs(scores[1] / scores[0] - 1), 1e-5, "%s: --eval", mixer);

    ok = !run("--load x.safetensors --generate 40 --temperature 0");
    const unsigned char *text = output;
    size_t n = output_size;
    ok = ok && !run("--load x.safetensors --generate 40 --temperature 0 --plain");
    check(ok && n > 0 && output_size == n && !memcmp(output, text, n), "%s: the same text", mixer);
}

static void test_plain_runs(void) {
    heading("--plain");
    for (int i = 0; i < N_MIXERS; i++) check_plain(mixers[i].name);
    release();
}

// ----------------------------------------------------------------------------
// the order of the data

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int by_size(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

// With learning rate 0 a step's loss tells which examples it saw, and under which mask. The losses of such a
// run's steps; whether there were so many.
__attribute__((format(printf, 3, 4)))
static int losses_of(double *losses, int steps, const char *format, ...) {
    static const char still[] = "--overwrite --dim 16 --layers 1 --heads 2 --lr 0 --min-lr 0 --eval-every 0";
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    return !run("%s --log o.log --steps %d %s", still, steps, line) &&
           read_log("o.log", "train_loss", losses, steps + 1) == steps;
}

static void check_epochs(void) {
    enum { N = 20 };
    static const char set[] = "--data set.safetensors --val copy.safetensors";
    double x[2 * N + 1], y[2], worst = 0, moved = 0;
    copy_file("set.safetensors", "copy.safetensors");
    int ok = losses_of(x, 1, "%s --batch 20", set) && read_log("o.log", "val_loss", y, 2) == 1;
    check_error(ok ? fabs(x[0] - y[0]) / y[0] : NAN, 1e-6,
                "all examples in one batch: the training loss is the validation loss");
    ok = losses_of(x, 2 * N, "%s --batch 1", set);
    for (int i = 0; i < N; i++) moved += x[i] != x[N + i];
    qsort(x, N, sizeof(double), by_value);
    qsort(x + N, N, sizeof(double), by_value);
    for (int i = 0; i < N; i++) worst_of(&worst, ok ? fabs(x[i] - x[N + i]) / x[i] : NAN);
    check_error(worst, 1e-6, "two epochs see each example once");
    check(moved > N / 2 && x[0] < x[N - 1], "in another order: %.0f of %d in another place", moved, N);
}

static void check_masks(void) {
    double x[4];
    const int *inputs = random_ids(12, 9, 0), *targets = random_ids(12, 9, 0);
    write_tensors("one.safetensors", 1, 12, inputs, targets, NULL);
    copy_file("one.safetensors", "copy.safetensors");
    int ok = losses_of(x, 3, "--data one.safetensors --val copy.safetensors --batch 1 --dropout 0.5");
    check(ok && x[0] != x[1] && x[1] != x[2], "dropout: every step has a mask of its own");
}

// Where the sequences of a long text begin: 1000 places, sorted; independent ones have gaps of 7 times the
// mean.
static void check_places(int seed) {
    enum { PLACES = 1000, LENGTH = 600000 };
    Run r;
    int at[PLACES + 1], gap = 0;
    memset(&r, 0, sizeof(r));
    r.train_end = LENGTH + 12;
    r.settings.values.seq = 12;
    r.settings.values.seed = seed;
    for (int i = 0; i < PLACES; i++) at[i] = (int)sequence_place(&r, i);
    int first = at[0];
    qsort(at, PLACES, sizeof(int), by_size);
    at[PLACES] = at[0] + LENGTH;
    for (int i = 0; i < PLACES; i++)
        if (at[i + 1] - at[i] > gap) gap = at[i + 1] - at[i];
    check(at[0] >= 0 && at[PLACES - 1] < LENGTH && gap < 3 * LENGTH / PLACES,
          "text, seed %d: 1000 places from %d on, the widest gap %.1f times the mean", seed, first,
          gap * (double)PLACES / LENGTH);
}

static void test_order(void) {
    enum { STEPS = 40 };
    heading("which data a step sees");
    check_epochs();
    check_masks();
    for (int seed = 1; seed < 4; seed++) check_places(seed);
    double x[STEPS + 1];
    int places = 1; // of 5388 where 12 tokens can start
    int ok = losses_of(x, STEPS, "--data text --seq 12 --batch 1");
    qsort(x, STEPS, sizeof(double), by_value);
    for (int i = 1; i < STEPS; i++) places += x[i] != x[i - 1];
    check(ok && places >= STEPS - 4, "text: %d steps start at %d places", STEPS, places);
    release();
}

// ----------------------------------------------------------------------------
// scores and generation, against this process's own forward passes

// The weights of a checkpoint in a model of this process; NULL after a failed check.
static Model *load(const char *name, int T, Safetensors *file) {
    int ok = 1;
    if (!open_tensors(file, name)) {
        check(0, "%s cannot be read", name);
        return NULL;
    }
    Config c = config_with(SESSA, (int)meta_number(file, "vocab_size", 1, 256, &ok), 16, 2, 2, 2, T);
    Model *m = create(&c, 1, T, EVALUATE);
    check(!take_weights(m, file), "%s: weights, their names and shapes", name);
    return m;
}

// The likeliest of n.
static int likeliest(const real *logits, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

// Accuracy over the targets of an example set, whole and by lag, against a count by hand.
static void test_scores(void) {
    enum { N = 30, T = 12, V = 9, NO_LAG = 7, BINS };
    heading("accuracy on example sets");
    Safetensors file;
    int32_t *inputs = random_ids(N * T, V, 0), *targets = random_ids(N * T, V, 1);
    const int32_t *lags = random_ids(N * T, 40, 0);
    for (int i = 0; i < N * T; i++)
        if (targets[i] > 2) targets[i] = inputs[i]; // something to learn
    write_tensors("lags.safetensors", N, T, inputs, targets, lags);
    copy_file("lags.safetensors", "seen.safetensors");
    int ok = !run("--data lags.safetensors --val seen.safetensors " TINY "--seq 12 --batch 8 --warmup 5 "
                  "--steps 80 --lr 1e-2 --eval-every 0 --out s.safetensors --log s.log");
    Model *m = load("s.safetensors", T, &file);
    if (!ok || !m) { check(0, "trained on an example set: %s", (char *)complaint); return; }

    double hits = 0, count = 0, lag_hits[BINS] = {0}, lag_count[BINS] = {0}, logged[128];
    for (int e = 0; e < N; e++) {
        model_forward(m, inputs + e * T, targets + e * T, 1, T, no_dropout);
        for (int t = 0; t < T; t++) {
            int target = targets[e * T + t], lag = lags[e * T + t];
            int hit = likeliest(m->acts.logits + t * V, V) == target;
            int bin = lag ? (int)log2((double)lag) : NO_LAG;
            if (target < 0) continue;
            hits += hit;
            count++;
            lag_hits[bin] += hit;
            lag_count[bin]++;
        }
    }
    double accuracy = hits / count;
    int lines = read_log("s.log", "val_accuracy", logged, 128);
    check(lines == 80 && count > 100 && accuracy > 0.3 && fabs(logged[79] - accuracy) < 1e-8,
          "val_accuracy in the log: %.4f", accuracy);

    ok = !run("--load s.safetensors --val lags.safetensors --batch 7 --eval");
    const char *line = ok ? said("val_accuracy ") : NULL;
    check(line && fabs(atof(line + 13) - accuracy) < 1e-6, "--eval prints it");
    for (int k = 0; k < 6 && line; k++) {
        char name[32];
        snprintf(name, sizeof(name), "lag %d to %d ", 1 << k, (2 << k) - 1);
        const char *place = strstr(line, name);
        double by_lag = place ? atof(place + strlen(name)) : NAN;
        ok &= lag_count[k] > 0 && fabs(by_lag - lag_hits[k] / lag_count[k]) < 1e-6;
    }
    size_t size;
    const char *log = (const char *)slurp("s.log", &size);
    check(ok && log && strstr(log, "\"accuracy_by_lag\": {\"1\": "),
          "and the accuracy by lag, as the log does");
    model_free(m);
    safetensors_free(&file);
    release();
}

// The model that is evaluated and generates: its window, its letters, and the text it was trained on.
enum { SEQ = 12, TEXT_SIZE = 6000 };
typedef struct {
    Model *model;
    Safetensors file;
    const unsigned char *letters, *text;
    int id_of[256];
} Writer;

// The last tenth, window after window.
static void check_evaluation(const Writer *w) {
    enum { BEGIN = TEXT_SIZE / 10 * 9, WINDOWS = (TEXT_SIZE / 10 - 1) / SEQ };
    double train_loss[64], val_loss[64], sum = 0;
    for (int at = BEGIN; at < BEGIN + WINDOWS * SEQ; at += SEQ) {
        int inputs[SEQ], targets[SEQ];
        for (int t = 0; t < SEQ; t++) {
            inputs[t] = w->id_of[w->text[at + t]];
            targets[t] = w->id_of[w->text[at + t + 1]];
        }
        model_forward(w->model, inputs, targets, 1, SEQ, no_dropout);
        sum += model_loss(w->model) / (WINDOWS * SEQ);
    }
    int lines = read_log("g.log", "train_loss", train_loss, 64);
    read_log("g.log", "val_loss", val_loss, 64);
    check_error(lines == 60 ? fabs(val_loss[59] - sum) / sum : NAN, 1e-5,
                "validation loss against windows counted by hand");
    int ok = !run("--load g.safetensors --data text --eval") && said("val_loss ") == (char *)output;
    check_error(ok ? fabs(atof((char *)output + 9) - sum) / sum : NAN, 1e-5, "--eval prints it");
    const char *perplexity = said("\nperplexity "), *bits = said("\nbits_per_byte ");
    ok = ok && perplexity && bits && fabs(atof(perplexity + 12) / exp(sum) - 1) < 1e-4;
    check(ok && fabs(atof(bits + 15) * log(2) / sum - 1) < 1e-5, "and perplexity and bits per byte");
    check(lines == 60 && train_loss[59] < train_loss[0] - 0.3, "60 steps lower the loss from %.3f to %.3f",
          train_loss[0], train_loss[lines - 1]);
}

// Weights three times as large make a text that hangs on every token of its window.
static void enlarge(Writer *w) {
    size_t size;
    unsigned char *bytes = slurp("g.safetensors", &size);
    for (int i = 0; i < w->file.n_tensors; i++) {
        const FileTensor *t = &w->file.tensors[i];
        for (int64_t e = 0; e < t->count && !strcmp(t->dtype, "F32"); e++) {
            float value = 3 * (float)number_of(t, e);
            memcpy(bytes + (t->data - w->file.bytes) + 4 * e, &value, 4);
        }
    }
    spill("g.safetensors", bytes, size);
    for (int64_t i = 0; i < w->model->table.count; i++) w->model->params[i] *= 3;
}

// At temperature 0, window 12: the prompt's last 12, later the last 6 when 12 are full.
static void check_greedy(const Writer *w) {
    enum { PROMPT = 30, NEW = 40 };
    int V = w->model->config.vocab_size, ids[PROMPT + NEW];
    char prompt[PROMPT + 1] = "", text[PROMPT + NEW + 2] = "";
    for (int i = 0; i < PROMPT; i++) {
        prompt[i] = w->text[i] == '\n' || w->text[i] == ' ' ? 'a' : (char)w->text[i];
        ids[i] = w->id_of[(unsigned char)prompt[i]];
    }
    for (int at = PROMPT, begin = PROMPT - SEQ; at < PROMPT + NEW; at++) {
        if (at - begin > SEQ) begin = at - SEQ / 2;
        model_forward(w->model, ids + begin, ids + begin, 1, at - begin, no_dropout);
        ids[at] = likeliest(w->model->acts.logits + (size_t)(at - begin - 1) * V, V);
    }
    for (int i = 0; i < PROMPT + NEW; i++) text[i] = (char)w->letters[ids[i]];
    text[PROMPT + NEW] = '\n';
    int ok = !run("--load g.safetensors --generate %d --temperature 0 --prompt %s", NEW, prompt);
    check(ok && output_size == PROMPT + NEW + 1 && !memcmp(output, text, output_size) && !complaint_size,
          "temperature 0, window %d: prompt and continuation, byte for byte as forward passes give it", SEQ);

    static const char *ways[] = {"--temperature 0 --seed 5", "--top-k 1", "--top-p 1e-9"};
    for (int i = 0; i < 3; i++) {
        ok = !run("--load g.safetensors --generate %d --prompt %s %s", NEW, prompt, ways[i]);
        check(ok && !strcmp((char *)output, text), "%s: the same text", ways[i]);
    }
}

// 200 tokens behind no prompt, almost evenly likely; NULL if there are not so many.
static const char *sample(int seed) {
    int code = run("--load g.safetensors --generate 200 --seed %d --window 0 --temperature 9", seed);
    return !code && output_size == 201 ? (char *)output : NULL;
}

static void check_seeds(void) {
    const char *first = sample(1), *again = sample(1), *other = sample(2);
    check(first && again && other && !strcmp(first, again) && strcmp(first, other),
          "sampling: a seed gives its text, another seed another");
}

static void check_ids(void) {
    run("--data tokens.bin --vocab 20 " SMALL "--steps 1 --out n.safetensors");
    int told = said("\nperplexity ") && !said("bits per byte");
    told = told && !run("--load n.safetensors --data tokens.bin --eval") && said("\nperplexity ");
    check(told && !said("bits_per_byte"), "tokens whose bytes are not known: perplexity alone");
    int ok = !run("--load n.safetensors --generate 5 --prompt 3~14~15"), numbers = 0;
    for (char *c = (char *)output; ok && (*c == ' ' || numbers == 0); numbers++) ok = strtol(c, &c, 10) < 20;
    check(ok && numbers == 8 && !strncmp((char *)output, "3 14 15 ", 8),
          "tokens without a vocabulary: ids in, ids out");
}

// A greedy text up to where some letters end that come in it, which are several tokens.
static void check_stop(void) {
    int ok = !run("--load g.safetensors --generate 60 --temperature 0 --prompt abc") && output_size == 64;
    char text[65] = "", letters[4] = "", wanted[65] = "", ids[65] = "";
    if (ok) memcpy(text, output, 64);
    for (int at = 23; at < 60 && !*letters; at++) {
        memcpy(letters, text + at, 3);
        if (strchr(letters, ' ')) *letters = 0; // at which a test's words are split
    }
    const char *found = ok && *letters ? strstr(text + 3, letters) : NULL;
    if (found) snprintf(wanted, sizeof(wanted), "%.*s\n", (int)(found + 3 - text), text);
    ok = found && !run("--load g.safetensors --generate 60 --temperature 0 --prompt abc --stop %s", letters);
    check(ok && !strcmp((char *)output, wanted), "--stop %s: the text ends behind it", letters);
    ok = !run("--load g.safetensors --generate 5 --temperature 0 --prompt abc --stop aaaaaaaaaaaa");
    check(ok && output_size == 9 && !memcmp(output, text, 8), "a text to stop at that does not come");

    ok = !run("--load n.safetensors --generate 20 --prompt 3") && output_size < 65;
    if (ok) memcpy(ids, output, output_size);
    char *second = ok ? strchr(ids + 2, ' ') : NULL, *end = second ? strchr(second + 1, ' ') : NULL;
    if (end) snprintf(wanted, sizeof(wanted), "%.*s\n", (int)(end - ids), ids);
    if (second) *second = '~';
    if (end) snprintf(text, sizeof(text), "%.*s", (int)(end - ids - 2), ids + 2);
    ok = end && !run("--load n.safetensors --generate 20 --prompt 3 --stop %s", text);
    check(ok && !strcmp((char *)output, wanted), "--stop with token ids: %s", text);
    check(run("--load g.safetensors --generate 5 --stop Z") == 2 && complained("--stop"),
          "a text to stop at that the model cannot write is refused");
}

// The i-th sample is the same of any number, and the first is that of no number.
static void check_many(void) {
    char one[64] = "", two[64] = "", three[128] = "";
    static const char many[] = "--load g.safetensors --generate 30 --temperature 9 --prompt abc";
    int ok = !run("%s", many) && output_size == 34;
    if (ok) memcpy(one, output, 34);
    ok = ok && !run("%s --samples 3", many) && output_size == 3 * 34 + 2 * 4;
    if (ok) memcpy(three, output, output_size);
    ok = ok && !run("%s --samples 2", many) && output_size == 2 * 34 + 4;
    if (ok) memcpy(two, output + 38, 30);
    check(ok && !memcmp(three, one, 34) && !memcmp(three, output, output_size) &&
              !memcmp(three + 34, "---\n", 4) && memcmp(one, two, 30) && memcmp(two, three + 76, 30),
          "--samples: lines of --- between them, each its own, the same in any number");
}

static void read_prompt_file(void) {
    if (!freopen("prompt", "rb", stdin)) _exit(126);
}

static void check_prompt_file(void) {
    static const char prompt[] = "ab cd\n\nefg hij abc\n", greedy[] = "--generate 9 --temperature 0";
    size_t n = strlen(prompt);
    spill("prompt", prompt, n);
    int ok = !run("--load g.safetensors %s --prompt ab~cd\n\nefg~hij~abc\n", greedy) && output_size == n + 10;
    const unsigned char *text = output;
    ok = ok && !run("--load g.safetensors %s --prompt-file prompt", greedy);
    check(ok && output_size == n + 10 && !memcmp(output, text, n + 10) && !memcmp(output, prompt, n),
          "--prompt-file: all of it, as --prompt gives it");
    prepare_child = read_prompt_file;
    ok = ok && !run("--load g.safetensors %s --prompt-file -", greedy);
    prepare_child = NULL;
    check(ok && output_size == n + 10 && !memcmp(output, text, n + 10), "--prompt-file -: standard input");
    spill("prompt", "ab\0c", 4);
    int zero = run("--load g.safetensors %s --prompt-file prompt", greedy) == 1 && complained("a byte 0");
    int absent = run("--load g.safetensors %s --prompt-file absent", greedy) == 1;
    int both = run("--load g.safetensors %s --prompt-file prompt --prompt a", greedy) == 2;
    check(zero && absent && both, "a file with a byte 0, none, and one beside --prompt are refused");
    spill("prompt", "3 14\n15\n", 8);
    ok = !run("--load n.safetensors --generate 2 --prompt-file prompt");
    check(ok && !strncmp((char *)output, "3 14\n15\n ", 9), "token ids from a file, on several lines");
}

// Texts of several prompts, of which a GPU makes many together, against each prompt's own.
static void check_company(const char *options) {
    static const char *const prompts[] = {"--prompt abc", "--prompt ab~cd", "", "--prompt abc",
                                          "--prompt efg~hij~abc~a"};
    static const char lines[] = "abc\nab cd\r\n\nabc\nefg hij abc a";
    static const char load[] = "--load g.safetensors --generate 40 --temperature 2 --samples 3";
    size_t n = 0;
    int ok = 1;
    spill("prompt", lines, strlen(lines));
    char *each = (char *)lend(1 << 14);
    for (int i = 0; i < 5 && ok; i++) {
        ok = !run("%s %s %s", load, options, prompts[i]) && n + output_size + 4 < 1 << 14;
        if (i && ok) n += (size_t)sprintf(each + n, "---\n");
        if (ok) memcpy(each + n, output, output_size);
        if (ok) n += output_size;
    }
    ok = ok && !run("%s %s --prompts prompt", load, options);
    check(ok && output_size == n && !memcmp(output, each, n), "--prompts, %s: each line's texts are those of --prompt",
          options);
    prepare_child = read_prompt_file;
    ok = ok && !run("%s %s --prompts -", load, options);
    prepare_child = NULL;
    check(ok && output_size == n && !memcmp(output, each, n), "--prompts -, %s: standard input", options);
}

static void check_prompts(void) {
    check_company("--window 16"); // positions run out, of each text at another token
    check_company("--stop e");    // texts end at different tokens
    int both = run("--load g.safetensors --generate 3 --prompts prompt --prompt a") == 2 && complained("--prompts");
    int neither = run("--load g.safetensors --generate 3 --prompts prompt --prompt-file prompt") == 2;
    spill("prompt", "", 0);
    int empty = run("--load g.safetensors --generate 3 --prompts prompt") == 1 && complained("no prompt");
    spill("prompt", "abc\nabZ\nabc\n", 12);
    int foreign = run("--load g.safetensors --generate 3 --prompts prompt") == 2 && complained("line 2");
    check(both && neither && empty && foreign && !output_size,
          "no prompts, a byte that the vocabulary lacks, --prompts beside another are refused");
    spill("prompt", "3 14\n15\n", 8);
    check(!run("--load n.safetensors --generate 2 --prompts prompt") && !strncmp((char *)output, "3 14 ", 5) &&
              strstr((char *)output, "---\n15 "),
          "token ids a line");
}

static void test_generation(void) {
    heading("evaluation and generation");
    Writer w;
    size_t size;
    memset(&w, 0, sizeof(w));
    run("--data text " SMALL "--steps 60 --lr 1e-2 --eval-every 0 --out g.safetensors --log g.log");
    w.model = load("g.safetensors", SEQ, &w.file);
    if (!w.model) return;
    w.letters = safetensors_find(&w.file, "tokenizer.bytes")->data;
    w.text = slurp("text", &size);
    for (int i = 0; i < w.model->config.vocab_size; i++) w.id_of[w.letters[i]] = i;
    check_evaluation(&w);
    enlarge(&w);
    check_greedy(&w);
    check_seeds();
    check_ids();
    check_stop();
    check_many();
    check_prompt_file();
    check_prompts();
    model_free(w.model);
    safetensors_free(&w.file);
    release();
}

// ----------------------------------------------------------------------------
// words

// Ids of the text, against the library's, and against its bytes.
static void check_ids_of_text(const Babel *b) {
    char error[ERROR_SIZE];
    int *ids = (int *)lend(b->text_size * sizeof(int)), same = 0;
    int n = encode_text(ids, &b->words, b->text, b->text_size, error);
    for (int i = 0; n == b->n_ids && i < n; i++) same += ids[i] == b->ids[i];
    check(n == b->n_ids && same == n && n > 200, "%d bytes of nine languages: the library's %d ids",
          (int)b->text_size, n);
    size_t at = 0;
    for (int i = 0; i < n; i++) {
        size_t length = (size_t)word_length(&b->words, ids[i]);
        if (at + length > b->text_size || memcmp(b->text + at, word_of(&b->words, ids[i]), length)) break;
        at += length;
    }
    check(at == b->text_size, "their words are the text");
}

// The rank of a pair, INT_MAX if it has none, and what it makes.
static int rank_of(const Words *w, int left, int right, int *product) {
    for (int i = 0; i < w->n_merges; i++) {
        if (w->merges[i].left != left || w->merges[i].right != right) continue;
        *product = w->merges[i].product;
        return w->merges[i].rank;
    }
    return INT_MAX;
}

// A piece's ids by the rule as it is said: again and again the pair of lowest rank, the leftmost.
static int plain_ids(int *ids, const Words *w, const unsigned char *piece, int n) {
    for (int i = 0; i < n; i++) ids[i] = w->of_byte[piece[i]];
    for (;;) {
        int best = -1, lowest = INT_MAX, product = 0, made = 0;
        for (int i = 0; i + 1 < n; i++) {
            int rank = rank_of(w, ids[i], ids[i + 1], &made);
            if (rank >= lowest) continue;
            lowest = rank;
            best = i;
            product = made;
        }
        if (best < 0) return n;
        ids[best] = product;
        memmove(ids + best + 1, ids + best + 2, (size_t)(n - best - 2) * sizeof(int));
        n--;
    }
}

// Words of up to five a and b, and all merges that make them, in random order: they get in each other's way.
enum { AB_LONGEST = 5, AB_WORDS = 256 + 60, AB_MERGES = 196 };
static int ab_words(Words *w) {
    char error[ERROR_SIZE];
    unsigned char *bytes = (unsigned char *)lend(256 + 60 * AB_LONGEST);
    int64_t *offsets = (int64_t *)lend((AB_WORDS + 1) * sizeof(int64_t)), V = 0, size = 0;
    int32_t *pairs = (int32_t *)lend(2 * AB_MERGES * sizeof(int32_t));
    int first[AB_LONGEST + 1] = {0, 'a'}, M = 0; // the id of the first word of a length; its bits say which
    for (; V < 256; V++) bytes[offsets[V] = size++] = (unsigned char)V;
    for (int length = 2; length <= AB_LONGEST; length++) {
        first[length] = (int)V;
        for (int bits = 0; bits < 1 << length; bits++, V++) {
            offsets[V] = size;
            for (int k = length - 1; k >= 0; k--) bytes[size++] = (unsigned char)('a' + (bits >> k & 1));
            for (int tail = 1; tail < length; tail++, M++) {
                int at = random_int(0, M); // Fisher and Yates
                memcpy(pairs + 2 * M, pairs + 2 * at, 8);
                pairs[2 * at] = first[length - tail] + (bits >> tail);
                pairs[2 * at + 1] = first[tail] + (bits & ((1 << tail) - 1));
            }
        }
    }
    offsets[V] = size;
    Words words = {(int)V, size, bytes, offsets, M, pairs, NULL, {0}};
    write_word_tensors("ab_words.safetensors", &words, 3);
    return !words_read_file(w, in_work("ab_words.safetensors"), error) && w->n_merges == AB_MERGES;
}

static void check_merges(void) {
    enum { PIECES = 300, LONGEST = 40 };
    Words words;
    unsigned char piece[LONGEST];
    Symbol symbols[LONGEST];
    Candidate heap[3 * LONGEST];
    int ids[LONGEST], wanted[LONGEST], same = 0, ok = ab_words(&words);
    for (int i = 0; ok && i < PIECES; i++) {
        int size = random_int(1, LONGEST);
        for (int k = 0; k < size; k++) piece[k] = (unsigned char)random_int('a', 'b');
        int n = encode_piece(ids, &words, piece, size, symbols, heap);
        int n_wanted = plain_ids(wanted, &words, piece, size);
        same += n == n_wanted && !memcmp(ids, wanted, (size_t)n * sizeof(int));
    }
    words_free(&words);
    check(ok && same == PIECES, "merges in each other's way: %d of %d pieces as the rule says", same, PIECES);
}

// Pieces, which a / ends.
static void check_pieces(void) {
    static const char *const texts[] = {
        "a/", "ab/ cd/", "ab/ / cd/", "ab/   / cd/", "ab/  /", "12/", "123/4/", " 123/456/ 7/",
        "a/1/b/.../ !?/x/", "don/'/t/", "\n/a/", "\n\n/a/", "\n/ a/", "\n  / a/", "a/ \n/b/",
        "a/ \t/b/", "\t/ b/", " \v\f\r\n/b/", "caf\xC3\xA9/ \xE4\xBA\xBA/1/", "\x80\xFF/ \xFF/",
        "\x01\x7F/ \x01/", " /", "[/a/_/B/]@/Z/`{/", "9/:/0//",
    };
    enum { N = sizeof(texts) / sizeof(texts[0]) };
    int right = 0;
    for (int i = 0; i < N; i++) {
        unsigned char text[64];
        size_t size = 0, begin = 0, ok = 1;
        for (const char *c = texts[i]; *c; c++)
            if (*c != '/') text[size++] = (unsigned char)*c;
        for (const char *c = texts[i], *end; begin < size && (end = strchr(c, '/')) != NULL; c = end + 1) {
            if (end == c) continue;
            ok = ok && piece_length(text + begin, size - begin) == (size_t)(end - c);
            begin += (size_t)(end - c);
        }
        right += ok && begin == size;
        if (!ok) printf("    %s\n", texts[i]);
    }
    check(right == N, "text is cut into pieces by its bytes: %d of %d", right, N);
}

// A piece of any length is encoded in a moment.
static void check_long_piece(const Babel *b) {
    enum { LENGTH = 1 << 20 };
    char error[ERROR_SIZE];
    unsigned char *text = (unsigned char *)lend(LENGTH);
    int *ids = (int *)lend(LENGTH * sizeof(int));
    for (int i = 0; i < LENGTH; i++) text[i] = "rights"[i % 6];
    double start = seconds();
    int n = encode_text(ids, &b->words, text, LENGTH, error);
    int quick = seconds() - start < 20;
    check(n > 0 && n < LENGTH && quick, "a piece of %d bytes is encoded in a moment", LENGTH);
}

#define OF_WORDS SMALL "--steps 4 --eval-every 0 "

// The ids that a model without words prints behind a prompt, and their number.
static int printed_ids(int *ids, int most, const char *options, const char *prompt) {
    int n = 0;
    char *at, *end;
    if (run("--load bare.safetensors %s%s", options, prompt)) return -1;
    for (at = (char *)output; n < most && *at && *at != '\n'; at = end + (*end == ' ')) {
        ids[n++] = (int)strtol(at, &end, 10);
        if (end == at) return -1;
    }
    return n;
}

// What a model prints behind "and right", given as text or as ids, is what the model of ids prints, in
// words.
static void check_printed(const Babel *b, const char *checkpoint, int by_ids, const char *what) {
    enum { MOST = 64 };
    static const char greedy[] = "--generate 30 --temperature 0 --prompt ";
    static unsigned char text[4096];
    char error[ERROR_SIZE], prompt[256] = "";
    int ids[MOST], size = 0;
    int n = encode_text(ids, &b->words, (const unsigned char *)"and right", 9, error);
    for (int i = 0; i < n; i++) snprintf(prompt + strlen(prompt), 16, i ? "~%d" : "%d", ids[i]);
    n = printed_ids(ids, MOST, greedy, prompt);
    for (int i = 0; i < n; i++) {
        int length = (int)word_length(&b->words, ids[i]);
        memcpy(text + size, word_of(&b->words, ids[i]), (size_t)length);
        size += length;
    }
    int ok = !run("--load %s %s%s", checkpoint, greedy, by_ids ? prompt : "and~right");
    // a character that the last token leaves unfinished is not printed
    int printed = (int)output_size - 1, left_out = size - printed;
    ok = ok && n > 30 && left_out >= 0 && left_out < 4 && output[printed] == '\n';
    check(ok && !memcmp(output, text, (size_t)printed), "%s", what);
}

// The bits per byte that --eval prints, and the loss; NAN: none.
static double evaluated(const char *checkpoint, const char *data, double *loss) {
    int ok = !run("--load %s --data %s --eval", checkpoint, data);
    const char *bits = ok ? said("bits_per_byte ") : NULL;
    *loss = ok ? atof((char *)output + strlen("val_loss ")) : NAN;
    return bits ? atof(bits + strlen("bits_per_byte ")) : NAN;
}

// Bits per byte of the validation part, whose targets are counted by hand.
static void check_bits(const Babel *b) {
    int begin = b->n_ids * 9 / 10, windows = (b->n_ids - begin - 1) / 12;
    int64_t bytes = 0;
    for (int i = 1; i <= windows * 12; i++) bytes += word_length(&b->words, b->ids[begin + i]);
    double logged[8], loss = 0, bits = evaluated("w.safetensors", "babel_train.bin", &loss);
    double expected = loss * windows * 12 / (log(2) * (double)bytes);
    check_error(fabs(bits / expected - 1), 1e-5, "bits per byte of words, %.3f", bits);
    int ok = read_log("w.log", "val_bits_per_byte", logged, 8) == 4;
    check_error(ok ? fabs(logged[3] / expected - 1) : NAN, 1e-5, "the log has them");
    run("--data text " OF_WORDS "--out t.safetensors");
    bits = evaluated("t.safetensors", "text", &loss);
    check_error(fabs(bits * log(2) / loss - 1), 1e-5, "and of single bytes");
    check(!run("--load bare.safetensors --data bare.bin --eval") && !said("bits_per_byte"), "none of ids");
}

// Whether a checkpoint has the words of the file, and as many of their tensors.
static int carries(const char *checkpoint, const Babel *b, int merges) {
    Safetensors file;
    Words words;
    char error[ERROR_SIZE];
    if (!open_tensors(&file, checkpoint)) return 0;
    int ok = !words_read(&words, &file, checkpoint, error);
    ok = ok && words.count == b->words.count && words.size == b->words.size && !words.pairs == !merges;
    ok = ok && !memcmp(words.bytes, b->words.bytes, (size_t)words.size);
    ok = ok && (!merges || same_words(&words, &b->words));
    words_free(&words);
    safetensors_free(&file);
    return ok;
}

static void check_words_resumed(const Babel *b) {
    int ok = !run("--data babel_train.bin " SMALL "--steps 2 --decay-steps 4 --eval-every 0 "
                  "--out v.safetensors");
    discard("babel_words.safetensors"); // the checkpoint has them
    ok = ok && !run("--resume v.safetensors --steps 4");
    check(ok && carries("v.safetensors", b, 1) && same_files("v.safetensors", "w.safetensors"),
          "resumed, without the file of the words: the same bytes");
    write_word_tensors("babel_words.safetensors", &b->words, 3);
}

// Words that are not the model's, and text.
static void check_other_words(const Babel *b) {
    write_word_tensors("babel_words.safetensors", &b->words, 2);
    int refused = run("--load w.safetensors --data babel_train.bin --eval") == 1;
    refused = refused && complained("not those of the model");
    write_word_tensors("babel_words.safetensors", &b->words, 3);
    write_word_tensors("other_words.safetensors", &b->words, 2);
    copy_file("babel_train.bin", "other_val.bin");
    refused += run("--data babel_train.bin --val other_val.bin " OF_WORDS "--out x.safetensors") == 1 &&
               complained("other_words.safetensors");
    discard("other_words.safetensors");
    refused += run("--data babel_train.bin --vocab 401 " OF_WORDS "--out x.safetensors") == 2 &&
               complained("--vocab 401");
    refused += run("--load w.safetensors --data text --eval") == 1 && complained("data/bpe.py");
    check(refused == 4,
          "other words than the model's or the other shard's, another --vocab, a text: refused");
    int ok = !run("--load w.safetensors --data bare.bin --eval") && said("bits_per_byte");
    ok = ok && !run("--load bare.safetensors --data babel_train.bin --eval") && !said("bits_per_byte");
    check(ok, "a model of words reads a shard without, a model of ids one with words");
}

static void test_words(void) {
    heading("words");
    Babel b;
    if (!check(open_babel(&b), "data/babel_words.safetensors")) return;
    check_ids_of_text(&b);
    check_merges();
    check_pieces();
    check_long_piece(&b);
    write_shard("babel_train.bin", b.ids, b.n_ids);
    write_shard("bare.bin", b.ids, b.n_ids);
    write_shard("mute_train.bin", b.ids, b.n_ids);
    write_word_tensors("babel_words.safetensors", &b.words, 3);
    write_word_tensors("mute_words.safetensors", &b.words, 2);
    int ok = !run("--data babel_train.bin " OF_WORDS "--out w.safetensors --log w.log");
    ok = ok && said("vocabulary: the 400 words of babel_words.safetensors");
    check(ok && carries("w.safetensors", &b, 1) && carries("w.best.safetensors", &b, 1),
          "a model of words carries them");
    ok = !run("--data mute_train.bin " OF_WORDS "--out mute.safetensors");
    check(ok && carries("mute.safetensors", &b, 0), "and those without merges");
    run("--data bare.bin --vocab 400 " OF_WORDS "--out bare.safetensors");
    check_printed(&b, "w.safetensors", 0, "a text prompt, and text behind it: those of the ids");
    check_printed(&b, "mute.safetensors", 1, "without merges ids are the prompt, and text is printed");
    ok = run("--load mute.safetensors --generate 3 --prompt and") == 2 && complained("token ids");
    check(ok && !run("--load w.safetensors --generate 3"),
          "without merges text is no prompt; no prompt at all is fine");
    check_bits(&b);
    if (!IS_DOUBLE) check_words_resumed(&b);
    check_other_words(&b);
    close_babel(&b);
    release();
}

// ----------------------------------------------------------------------------
// the smallest and the oddest runs, with every mixer

// A text of one distinct byte, tokens up to the largest, examples without a target.
static void write_odd_data(void) {
    enum { TOKENS = 400, N = 4, T = 6 };
    static char same[200];
    static unsigned char shard[1024 + 2 * TOKENS];
    int32_t header[3] = {20240520, 1, TOKENS};
    int32_t *inputs = random_ids(N * T, 9, 0), *targets = random_ids(N * T, 9, 0);
    memset(same, 'a', sizeof(same));
    spill("same", same, sizeof(same));
    memcpy(shard, header, sizeof(header));
    for (int i = 0; i < 2 * TOKENS; i++) shard[1024 + i] = (unsigned char)random_int(0, 255);
    shard[1024] = shard[1025] = 255;
    spill("wide.bin", shard, sizeof(shard));
    for (int i = 0; i < N * T; i++) targets[i] = -1;
    write_tensors("none.safetensors", N, T, inputs, targets, NULL);
    copy_file("none.safetensors", "nothing.safetensors");
}

// mamba2's state is a product of three projections: no more than 30 fits a float; nor does the exponential of
// a larger A_log.
static void check_large_weights(int mixer) {
    enum { T = 40, V = 11 };
    int factor = mixer == MAMBA2 ? 30 : 1000;
    Config c = config_with(mixer, V, 16, 2, 2, 1, T);
    Model *m = create(&c, 1, T, TRAIN);
    const int *ids = random_ids(T, V, 0);
    shake_weights(m, 0.1);
    for (int r = 0; r < m->table.n; r++) {
        const Tensor *t = &m->table.rows[r];
        if (strstr(t->name, "A_log")) continue;
        for (int64_t i = 0; i < t->count; i++) m->params[t->offset + i] *= (real)factor;
    }
    model_forward(m, ids, ids, 1, T, no_dropout);
    double loss = model_loss(m) / T;
    check(isfinite(loss), "%s, weights %d times as large: the loss is finite (%.3g)", mixers[mixer].name,
          factor, loss);
    model_free(m);
    release();
}

static void check_smallest(const char *mixer) {
    double loss[8];
    int ok = !run("--data text --overwrite --mixer %s --dim 2 --heads 1 --layers 1 --seq 1 --batch 1 "
                  "--steps 3 --eval-every 1 --out e.safetensors --log e.log",
                  mixer);
    ok = ok && read_log("e.log", "train_loss", loss, 8) == 3;
    check(ok && fabs(loss[0] - log(12)) < 0.5, "%s: T 1, B 1, D 2", mixer);
    ok = !run("--load e.safetensors --generate 5 --prompt c") && output_size == 7;
    ok = ok && !run("--load e.safetensors --generate 5 --prompt cdefghij") && output_size == 14;
    ok = ok && !run("--load e.safetensors --generate 5 --window 3 --prompt cdefghij") && output_size == 14;
    ok = ok && !run("--load e.safetensors --generate 5") && output_size == 6;
    check(ok, "%s: a prompt of one token, one longer than the window, none", mixer);
}

static void check_vocabularies(const char *mixer) {
    double loss[8], val[8];
    int ok = !run("--data same --overwrite --mixer %s --dim 2 --heads 1 --layers 2 --seq 5 --batch 2 "
                  "--steps 3 --eval-every 1 --out v.safetensors --log v.log",
                  mixer);
    ok = ok && read_log("v.log", "train_loss", loss, 8) == 3 && read_log("v.log", "val_loss", val, 8) == 3;
    ok = ok && loss[0] == 0 && loss[2] == 0 && val[2] == 0;
    ok = ok && !run("--load v.safetensors --generate 5") && !strcmp((char *)output, "aaaaa\n");
    check(ok, "%s: text of one distinct byte, V 1: loss 0", mixer);
    ok = !run("--data wide.bin --overwrite --vocab 65536 --mixer %s --dim 2 --heads 1 --layers 1 --seq 3 "
              "--batch 2 --steps 2 --eval-every 0 --out w.safetensors --log w.log",
              mixer);
    ok = ok && read_log("w.log", "train_loss", loss, 8) == 2 && fabs(loss[0] - log(65536)) < 0.05;
    ok = ok && !run("--load w.safetensors --generate 3 --prompt 65535") && said("65535 ") == (char *)output;
    check(ok, "%s: V 65536", mixer);
}

static void check_no_target(const char *mixer) {
    static const char options[] = "--data none.safetensors --val nothing.safetensors " TINY
                                  "--batch 2 --warmup 5 --seq 6 --weight-decay 0 --eval-every 0";
    double loss[8], length[8];
    int ok = !run("%s --mixer %s --steps 2 --out m.safetensors --log m.log", options, mixer);
    ok = ok && read_log("m.log", "train_loss", loss, 8) == 2 && loss[0] == 0 && loss[1] == 0;
    ok = ok && read_log("m.log", "grad_norm", length, 8) == 2 && length[0] == 0;
    ok = ok && !run("%s --mixer %s --steps 1 --out n.safetensors", options, mixer);
    check(ok && same_tensors("m.best.safetensors", "n.best.safetensors"),
          "%s: all targets ignored: loss and gradient 0, the weights do not move", mixer);
}

// The last sample is what the saved weights generate.
static void check_samples(const char *mixer) {
    int ok = !run("--data text --mixer %s " SMALL "--steps 6 --eval-every 0 --sample-every 2 "
                  "--out p.safetensors",
                  mixer);
    const char *last = (char *)output; // samples stand between lines of ---
    for (const char *at = last; ok && (at = strstr(at, "---\n")) != NULL; at += 4)
        if (strstr(at + 4, "---\n")) last = at + 4;
    ok = ok && !run("--load p.best.safetensors --generate 200 --seed 1343") && output_size == 201;
    ok = ok && !strncmp(last, (char *)output, output_size);
    ok = ok && !run("--data text --mixer %s " SMALL "--steps 6 --eval-every 0 --out q.safetensors", mixer);
    check(ok && same_files("p.safetensors", "q.safetensors"),
          "%s: samples while training are those of the saved weights, and change no bit of the run", mixer);
}

static void test_edges(void) {
    heading("edges: T 1, B 1, V 1 and 65536, D 2, one byte, no target");
    uint64_t before = chance;
    write_odd_data();
    for (int i = 0; i < N_MIXERS; i++) check_large_weights(i);
    for (int i = 0; i < N_MIXERS; i++) {
        check_smallest(mixers[i].name);
        check_vocabularies(mixers[i].name);
        check_no_target(mixers[i].name);
    }
    for (int i = 0; i < N_MIXERS; i++) check_samples(mixers[i].name);
    chance = before;
    release();
}

// ----------------------------------------------------------------------------
// what the system allows

// Writes a file of a machine that is not this one, in the work folder's subfolder `there`.
static void pretend(const char *name, const char *text) {
    char path[512];
    snprintf(path, sizeof(path), "%s/there/%s", work, name);
    for (char *slash = strchr(path + strlen(work) + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(path, 0777);
        *slash = '/';
    }
    snprintf(path, sizeof(path), "there/%s", name);
    spill(path, text, strlen(text));
}

// Removes a folder with all that it holds.
static void forget(const char *path) {
    char inner[600];
    DIR *dir = opendir(path);
    for (struct dirent *entry; dir && (entry = readdir(dir)) != NULL;) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        snprintf(inner, sizeof(inner), "%.300s/%.255s", path, entry->d_name);
        if (unlink(inner)) forget(inner);
    }
    if (dir) closedir(dir);
    rmdir(path);
}

// Files of a machine, and what is found of it.
enum { MOST_FILES = 5 };
typedef struct { const char *name, *text; } Pretended;

static void pretend_all(const Pretended *files) {
    for (int f = 0; f < MOST_FILES && files[f].name; f++) pretend(files[f].name, files[f].text);
}

#if defined(_OPENMP) && defined(__linux__)
// The environment of a user who wishes for nothing.
static void without_wishes(void) {
    static const char *const names[] = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT",
                                        "OMP_PROC_BIND",   "OMP_PLACES",      "KMP_BLOCKTIME"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) unsetenv(names[i]);
}

static void on_one_core(void) {
    without_wishes();
    cpu_set_t all, one;
    CPU_ZERO(&one);
    sched_getaffinity(0, sizeof(all), &all);
    for (int i = 0; i < CPU_SETSIZE && !CPU_COUNT(&one); i++)
        if (CPU_ISSET(i, &all)) CPU_SET(i, &one);
    sched_setaffinity(0, sizeof(one), &one);
}

static void check_number_of_threads(void) {
    static const char options[] = "--data text " TINY "--seq 12 --batch 2 --steps 1 --eval-every 0 "
                                  "--out u.safetensors";
    prepare_child = on_one_core;
    int ok = !run("%s", options);
    prepare_child = NULL;
    check(ok && said(", 1 threads,"), "bound to one core: 1 thread, told at the start");
    n_threads = "3";
    ok = !run("%s", options);
    n_threads = "2";
    check(ok && said(", 3 threads,"), "OMP_NUM_THREADS=3 rules");
}
#endif

#if defined(_OPENMP) && defined(__linux__) && !defined(KMP_VERSION_MAJOR)
// The test itself runs with OMP_WAIT_POLICY=passive: that stays.
static void with_a_policy(void) { unsetenv("GOMP_SPINCOUNT"); }

// Whether the environment with which a program was started last holds the text.
static int started_with(pid_t child, const char *text) {
    static char environment[1 << 16];
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/environ", (int)child);
    int fd = open(path, O_RDONLY);
    ssize_t n = fd < 0 ? 0 : read(fd, environment, sizeof(environment));
    if (fd >= 0) close(fd);
    return n > 0 && memmem(environment, (size_t)n, text, strlen(text)) != NULL;
}

// A program that is looked at while it trains, then stopped.
typedef struct {
    int code;
    int bounded; // its threads' waiting is
    int again;   // it started itself again
} Started;

static Started started(void (*prepare)(void)) {
    static const char line[] = "--run --data text " SMALL "--steps 100000 --eval-every 0 --out u.safetensors "
                               "--log u.log";
    Started found;
    discard("u.log");
    prepare_child = prepare;
    pid_t child = start_and_wait_for_log(line, "u.log", 2);
    prepare_child = NULL;
    found.bounded = started_with(child, "GOMP_SPINCOUNT=");
    found.again = started_with(child, "SESSA_STARTED_AGAIN=");
    kill(child, SIGINT);
    found.code = finish(child);
    return found;
}

// What has been started again, and what finds a mark that is not its own: 0 if the environment is as it was.
static int environment_code(void) {
    char mark[32], *none[] = {self, NULL};
    without_wishes();
    snprintf(mark, sizeof(mark), "%d", (int)getpid());
    setenv("GOMP_SPINCOUNT", "1000", 1);
    setenv("SESSA_STARTED_AGAIN", mark, 1);
    start_again(none);
    int clean = !getenv("GOMP_SPINCOUNT") && !getenv("SESSA_STARTED_AGAIN");
    setenv("GOMP_SPINCOUNT", "7", 1);
    setenv("SESSA_STARTED_AGAIN", "1", 1);
    start_again(none);
    return clean && getenv("GOMP_SPINCOUNT") && !getenv("SESSA_STARTED_AGAIN") ? 0 : 1;
}

static void check_waiting(void) {
    if (!access("/proc/self/exe", R_OK)) { // what is needed to start again and to look
        Started usual = started(without_wishes), told = started(with_a_policy);
        int one_core = omp_get_num_procs() == 1;
        check(usual.code == 130 && usual.bounded == usual.again && (usual.again || one_core),
              "waiting is bounded: started again, once, with GOMP_SPINCOUNT");
        check(told.code == 130 && !told.bounded && !told.again,
              "OMP_WAIT_POLICY set: that rules, the program is started once");
    }
    fflush(stdout);
    pid_t child = fork();
    if (!child) _exit(environment_code());
    check(!finish(child), "then its environment is as it was before");
}
#endif

static void test_threads_allowed(void) {
    heading("as many threads as the process may use, and how they wait");
    static const struct {
        const char *name;
        Pretended files[MOST_FILES];
        int threads; // of 8
    } cases[] = {
        {"no /sys, no /proc", {{NULL, NULL}}, 8},
        {
            "version 2, no quota",
            {{"proc/self/cgroup", "0::/a\n"}, {"sys/fs/cgroup/a/cpu.max", "max 100000\n"}},
            8,
        },
        {
            "version 2, 1.5 cores",
            {{"proc/self/cgroup", "0::/a\n"}, {"sys/fs/cgroup/a/cpu.max", "150000 100000\n"}},
            2,
        },
        {
            "version 2, half a core further up",
            {{"proc/self/cgroup", "0::/a/b/c\n"},
             {"sys/fs/cgroup/a/cpu.max", "10000 20000\n"},
             {"sys/fs/cgroup/a/b/c/cpu.max", "300000 100000\n"}},
            1,
        },
        {
            "version 2 in a container, 3 cores",
            {{"proc/self/cgroup", "0::/\n"}, {"sys/fs/cgroup/cpu.max", "300000 100000\n"}},
            3,
        },
        {
            "version 1 in a container, 2.2 cores",
            {{"proc/self/cgroup", "5:memory:/m\n3:cpuacct,cpu:/docker/0a1b\n"},
             {"sys/fs/cgroup/cpu/cpu.cfs_quota_us", "220000\n"},
             {"sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"}},
            3,
        },
        {
            "version 1, no quota",
            {{"proc/self/cgroup", "3:cpu:/a\n"},
             {"sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "-1\n"},
             {"sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n"}},
            8,
        },
        {
            "version 1, another controller's",
            {{"proc/self/cgroup", "3:cpuset:/a\n"},
             {"sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "100000\n"},
             {"sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n"}},
            8,
        },
    };
    char root[96];
    snprintf(root, sizeof(root), "%s/there", work);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        pretend_all(cases[i].files);
        int threads = threads_within(root, 8);
        check(threads == cases[i].threads, "%s: %d of 8 threads", cases[i].name, threads);
        forget(root);
    }
#if defined(_OPENMP) && defined(__linux__)
    check_number_of_threads();
#endif
#if defined(_OPENMP) && defined(__linux__) && !defined(KMP_VERSION_MAJOR)
    check_waiting();
#endif
    release();
}

static void on_small_stacks(void) {
    struct rlimit limit = {256 << 10, 256 << 10};
    setrlimit(RLIMIT_STACK, &limit);
    setenv("OMP_STACKSIZE", "128k", 1);
}

static void test_stacks(void) {
    heading("stacks of 128 KiB a thread, 256 KiB for the first");
    prepare_child = on_small_stacks;
    for (int i = 0; i < N_MIXERS; i++) { // threads at products together; each at whole sequences
        const char *name = mixers[i].name;
        int ok = !run("--data text --overwrite --mixer %s --dim 96 --layers 2 --heads 4 --seq 200 --batch 4 "
                      "--steps 2 --eval-every 1 --sample-every 2 --log s.log --out s.safetensors",
                      name);
        ok = ok && !run("--data text --overwrite --mixer %s --dim 96 --layers 1 --heads 1 --seq 300 "
                        "--batch 1 --steps 2 --eval-every 0 --out s.safetensors",
                        name);
        ok = ok && (IS_DOUBLE || !run("--resume s.safetensors --steps 3 --eval-every 0"));
        ok = ok && !run("--load s.best.safetensors --generate 20");
        check(ok, "%s: trains, saves, resumes and generates", name);
    }
    prepare_child = NULL;
    release();
}

// How much memory is left, by what the system says of it.
static void check_memory_left(void) {
    static const char meminfo[] = "MemTotal:  800000 kB\nMemFree:  3 kB\nMemAvailable:  409600 kB\n"
                                  "SwapFree:  0 kB\n";
    static const struct {
        const char *name;
        Pretended files[MOST_FILES];
        double mib;
        const char *who;
    } cases[] = {
        {"the machine", {{"proc/meminfo", meminfo}}, 400, "this machine"},
        {
            "the machine, 100 MiB of swap",
            {{"proc/meminfo", "MemAvailable:  409600 kB\nSwapFree:  102400 kB\n"}},
            500,
            "this machine",
        },
        {
            "version 2",
            {{"proc/meminfo", meminfo},
             {"proc/self/cgroup", "0::/a\n"},
             {"sys/fs/cgroup/a/memory.max", "104857600\n"},
             {"sys/fs/cgroup/a/memory.current", "62914560\n"}},
            40,
            "its cgroup",
        },
        {
            "version 2, half of it cache of files",
            {{"proc/meminfo", meminfo},
             {"proc/self/cgroup", "0::/a\n"},
             {"sys/fs/cgroup/a/memory.max", "104857600\n"},
             {"sys/fs/cgroup/a/memory.current", "62914560\n"},
             {"sys/fs/cgroup/a/memory.stat",
              "anon 31457280\ninactive_file 20971520\nactive_file 10485760\n"}},
            70,
            "its cgroup",
        },
        {
            "version 2, further up",
            {{"proc/meminfo", meminfo},
             {"proc/self/cgroup", "0::/a/b\n"},
             {"sys/fs/cgroup/a/b/memory.max", "max\n"},
             {"sys/fs/cgroup/a/memory.max", "104857600\n"},
             {"sys/fs/cgroup/a/memory.current", "94371840\n"}},
            10,
            "its cgroup",
        },
        {
            "version 1 in a container",
            {{"proc/meminfo", meminfo},
             {"proc/self/cgroup", "4:memory:/docker/0a1b\n"},
             {"sys/fs/cgroup/memory/memory.limit_in_bytes", "209715200\n"},
             {"sys/fs/cgroup/memory/memory.usage_in_bytes", "209715201\n"},
             {"sys/fs/cgroup/memory/memory.stat", "inactive_file 7\ntotal_inactive_file 1048577\n"}},
            1,
            "its cgroup",
        },
        {
            "version 1, no limit",
            {{"proc/meminfo", meminfo},
             {"proc/self/cgroup", "4:memory:/a\n"},
             {"sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712\n"},
             {"sys/fs/cgroup/memory/a/memory.usage_in_bytes", "1\n"}},
            400,
            "this machine",
        },
    };
    char root[96];
    snprintf(root, sizeof(root), "%s/there", work);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        pretend_all(cases[i].files);
        MemoryLeft left = memory_left(root);
        check(left.bytes == cases[i].mib * 0x1p20 && !strcmp(left.who, cases[i].who),
              "%s: %s leaves %.1f MiB", cases[i].name, left.who, left.bytes / 0x1p20);
        forget(root);
    }
}

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__) // whose shadow is larger than any limit
static int bounded_resource;
static void with_half_a_gib(void) {
    struct rlimit limit = {512 << 20, 512 << 20};
    setrlimit(bounded_resource, &limit);
}

// A run that this limit leaves no room for: one line says so, and little memory was touched.
static void check_limit(int resource, const char *name, const char *options) {
    struct rusage usage;
    char line[512];
    int status = 0;
    snprintf(line, sizeof(line), "--run %s", options);
    bounded_resource = resource;
    prepare_child = with_half_a_gib;
    pid_t child = start(line);
    prepare_child = NULL;
    wait4(child, &status, 0, &usage);
    complaint = slurp("../stderr", &complaint_size);
    char *end = complaint ? strchr((char *)complaint, '\n') : NULL;
    int told = end && !end[1] && complained("does not fit: it needs ") && complained(name);
    if (told) *end = 0;
    check(WIFEXITED(status) && WEXITSTATUS(status) == 1 && told && usage.ru_maxrss < 100 << 10,
          "%s of 512 MiB, %ld MiB touched: %.100s", name, (long)usage.ru_maxrss >> 10,
          told ? complained("it needs") : "not refused");
}

static void check_limits(void) {
    spill("sparse", "", 0);
    if (truncate(in_work("sparse"), 1 << 30)) check(0, "no file of 1 GiB: %s", strerror(errno));
    check_limit(RLIMIT_AS, "ulimit -v",
                "--data text --dim 2048 --layers 2 --seq 12 --batch 2 --steps 1 --out u.safetensors");
    check_limit(RLIMIT_DATA, "ulimit -d",
                "--data text --dim 16 --layers 1 --seq 500 --batch 4000 --steps 1 --out u.safetensors");
    check_limit(RLIMIT_AS, "ulimit -v", "--data sparse --format bytes " TINY "--steps 1 --out u.safetensors");
    check_limit(RLIMIT_DATA, "ulimit -d", "--load good.safetensors --generate 900000000");
    discard("sparse");
}
#endif

static void test_memory_limits(void) {
    heading("what does not fit is refused before it is touched");
    check_memory_left();
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
    run("--data text " SMALL "--steps 2 --out good.safetensors");
    check_limits();
#endif
    release();
}

// ----------------------------------------------------------------------------
// terminals

// A terminal, as far as the program's lines go: a window of so many columns, the rows that went up included.
enum { SCREEN_ROWS = 400, SCREEN_COLUMNS = 256 };
typedef struct {
    char rows[SCREEN_ROWS][SCREEN_COLUMNS + 1];
    int columns, row, column; // its width; where the next character goes
    int wraps;                // of lines of steps
    int commands, in_command; // escape sequences
} Screen;

static void next_row(Screen *s) { s->row += s->row + 1 < SCREEN_ROWS; }

static int is_line_of_a_step(const char *row) {
    return !strncmp(row, "step", 4) || !strncmp(row, "val ", 4) || !strncmp(row, "loss", 4);
}

// One character; of all escape sequences only the one that clears what is behind does something.
static void show_character(Screen *s, char c) {
    char *row = s->rows[s->row];
    if (c == 27) s->in_command = 1;
    else if (s->in_command) {
        s->in_command = !isalpha((unsigned char)c);
        if (c != 'J') return;
        s->commands++;
        memset(row + s->column, 0, (size_t)(SCREEN_COLUMNS - s->column));
        memset(s->rows + s->row + 1, 0, sizeof(s->rows[0]) * (size_t)(SCREEN_ROWS - 1 - s->row));
    } else if (c == '\r') s->column = 0;
    else if (c == '\n') next_row(s);
    else {
        if (s->column == s->columns) {
            s->wraps += is_line_of_a_step(row);
            s->column = 0;
            next_row(s);
            row = s->rows[s->row];
        }
        for (int k = 0; k < s->column; k++)
            if (!row[k]) row[k] = ' ';
        row[s->column++] = c;
    }
}

static void show(Screen *s, const char *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) show_character(s, bytes[i]);
}

static int terminal_fd; // the test's end
static const char *terminal_name, *terminal_type;

// What start() does for a child at the other end.
static void at_terminal(void) {
    setsid();
    int fd = open(terminal_name, O_RDWR);
#ifdef TIOCSCTTY
    ioctl(fd, TIOCSCTTY, 0);
#endif
    dup2(fd, 0);
    dup2(fd, 1);
    dup2(fd, 2);
    close(terminal_fd);
    setenv("TERM", terminal_type, 1);
    unsetenv("COLUMNS");
}

// A window of so many columns, 0: it does not say.
static void resize(Screen *s, int columns) {
    struct winsize size;
    memset(&size, 0, sizeof(size));
    size.ws_col = (unsigned short)columns;
    size.ws_row = 24;
    ioctl(terminal_fd, TIOCSWINSZ, &size);
    s->columns = columns ? columns : 80;
}

// Shows what comes within so many milliseconds of silence, or up to the text; 0 at the end of it all.
static int watch(Screen *s, int patience, const char *text) {
    static char bytes[1 << 16];
    struct pollfd ready = {terminal_fd, POLLIN, 0};
    while (poll(&ready, 1, patience) > 0) {
        ssize_t n = read(terminal_fd, bytes, sizeof(bytes));
        if (n <= 0) return 0;
        show(s, bytes, (size_t)n);
        if (text && memmem(bytes, (size_t)n, text, strlen(text))) break;
    }
    return 1;
}

// The program at a new terminal, -1 where there is none to be had.
static pid_t start_at_terminal(Screen *s, int columns, const char *type, const char *line) {
    memset(s, 0, sizeof(*s));
    terminal_fd = posix_openpt(O_RDWR | O_NOCTTY);
    if (terminal_fd < 0 || grantpt(terminal_fd) || unlockpt(terminal_fd) ||
        !(terminal_name = ptsname(terminal_fd)))
        return -1;
    int slave = open(terminal_name, O_RDWR | O_NOCTTY); // macOS takes a size only while someone has it open
    resize(s, columns);
    terminal_type = type;
    prepare_child = at_terminal;
    pid_t child = start(line);
    prepare_child = NULL;
    close(slave);
    return child;
}

// What it shows until it ends; returns its status.
static int watch_to_the_end(Screen *s, pid_t child) {
    int status = 0;
    while (watch(s, 60000, NULL)) continue;
    waitpid(child, &status, 0);
    close(terminal_fd);
    return status;
}

// 30 steps, three validations: their lines stay, in rows that begin with these words, and nothing else does.
static void check_rows(const char *type, int columns, const char *begin) {
    static const char line[] = "--run --data text " SMALL "--steps 30 --eval-every 10 --eval-batches 2 "
                               "--out y.safetensors";
    static Screen s;
    pid_t child = start_at_terminal(&s, columns, type, line);
    int status = watch_to_the_end(&s, child), rows = 0, whole = 0, spaces = 0, dumb = !strcmp(type, "dumb");
    const char *first = "";
    for (int r = 0; r < SCREEN_ROWS; r++) {
        char *row = s.rows[r], *end = row + strlen(row);
        const char *val = strstr(row, "val ");
        while (end > row && end[-1] == ' ') *--end = 0;
        if (!is_line_of_a_step(row)) continue;
        if (!rows++) first = row;
        strtod(val ? val + 4 : row, &end);
        int last = rows == 3 && end[0] == ' ' && end[1] == '('; // says of which step the best weights are
        whole += val && (!*end || last);                        // nothing of a longer line behind it
        spaces += strstr(row, "  ") != NULL;
    }
    int in_place = !spaces && !s.wraps && (s.commands == 0) == dumb;
    check(!status && rows == 3 && whole == 3 && in_place && !strncmp(first, begin, strlen(begin)),
          "%d columns, %s: three validations, nothing else stays: %s", columns, type, first);
}

// A window that is made narrower while the program stands still; then Ctrl-C, typed.
static void check_narrower(void) {
    static const char endless[] = "--run --data text " SMALL "--steps 100000 --eval-every 0 "
                                  "--out y.safetensors";
    static Screen s;
    int status = 0;
    pid_t child = start_at_terminal(&s, 80, "xterm", endless);
    watch(&s, 60000, "step 5/");
    kill(child, SIGSTOP);
    waitpid(child, &status, WUNTRACED);
    watch(&s, 100, NULL);
    int before = s.wraps, left = (int)strlen(s.rows[s.row]);
    resize(&s, 40);
    kill(child, SIGCONT);
    for (int i = 0; i < 30; i++) watch(&s, 60000, "step");
    int narrow = (int)strlen(s.rows[s.row]), more = s.wraps - before;
    check(!before && left > 60 && left < 80 && narrow > 20 && narrow < 40 && more <= 1,
          "made narrower, from 80 to 40 columns: the next line fits, %d and then %d wide", left, narrow);

    if (write(terminal_fd, "\3", 1) != 1) check(0, "Ctrl-C cannot be typed");
    status = watch_to_the_end(&s, child);
    int ending = 0, hint = 0;
    for (int r = 0; r < SCREEN_ROWS; r++) {
        ending += !strncmp(s.rows[r], "ending after this step", 22);
        hint += !strncmp(s.rows[r], "go on with: ", 12);
    }
    check(WIFEXITED(status) && WEXITSTATUS(status) == 130 && ending == 1 && hint == 1,
          "Ctrl-C: what is said of it begins a row");
}

// Without a terminal: so many lines, and no silence of more than ten seconds.
static void check_lines_in_a_file(void) {
    int code = run("--data text " SMALL "--steps 250 --eval-every 120 --eval-batches 1 --out y.safetensors");
    int lines = 0;
    for (const char *at = (char *)output; at && (at = strstr(at, "step ")); at++)
        lines += at == (char *)output || at[-1] == '\n';
    check(!code && lines == 6 && !memchr(output, 27, output_size) && !memchr(output, '\r', output_size),
          "a file: steps 1, 100, 120, 200, 240, 250, and no command of a terminal");

    Options o;
    Training t;
    memset(&o, 0, sizeof(o));
    memset(&t, 0, sizeof(t));
    Step quick = {7, 1, 1, 1, 1, 0.1}, slow = {7, 1, 1, 1, 1, 4}, slower = {7, 1, 1, 1, 1, 11};
    Step of_before = {7, 1, 1, 1, 1, NAN};
    int standard_output = dup(STDOUT_FILENO), null = open("/dev/null", O_WRONLY);
    fflush(stdout);
    dup2(null, STDOUT_FILENO); // no terminal
    o.step = 7;
    int often = !is_printed(&o, &t, &quick, 9.8) && is_printed(&o, &t, &quick, 9.95) &&
                !is_printed(&o, &t, &slow, 4) && is_printed(&o, &t, &slow, 8) &&
                is_printed(&o, &t, &slower, 11) && !is_printed(&o, &t, &of_before, 3);
    dup2(standard_output, STDOUT_FILENO);
    close(standard_output);
    close(null);
    check(often, "a file: silent for ten seconds at most, where no step takes longer");
}

static int there_are_terminals(void) {
    int fd = posix_openpt(O_RDWR | O_NOCTTY), ok = fd >= 0 && !grantpt(fd) && !unlockpt(fd) && ptsname(fd);
    if (fd >= 0) close(fd);
    return ok;
}

static void test_terminal(void) {
    static const char row[] = "step 10/30 | loss ";
    heading("the line of a step: in place on a terminal of any width, often enough in a file");
    if (there_are_terminals()) {
        check_rows("xterm", 20, "val ");
        check_rows("xterm", 40, row);
        check_rows("xterm", 80, row);
        check_rows("xterm", 200, row);
        check_rows("xterm", 0, row);
        check_rows("dumb", 40, row);
        check_narrower();
    } else printf("  no pseudo-terminal here: left out\n");
    check_lines_in_a_file();
    release();
}

// Not a part of main: what stands on its stack would be taken from the program's, which start() starts there.
__attribute__((noinline)) static void test_all(void) {
    open_folder();
    if (!IS_DOUBLE) test_resume();
    if (program == self) {
        if (!IS_DOUBLE) {
            test_edges();
            test_memory_limits();
            test_terminal();
        }
        test_threads_allowed();
        test_stacks();
        test_threads();
        test_order();
    }
    // a twin's: its plain ways to the bound of float32, texts as the CPU gives them
    setenv("TEST_PRECISION", "fp32", 1);
    test_plain_runs();
    test_scores();
    test_generation();
    test_words();
    remove_folder();
}

int main(int argc, char **argv) {
    static char twin[PATH_MAX];
    if (argc > 1 && !strcmp(argv[1], "--run")) return be_the_program(argc, argv);
    if (argc > 1 && !realpath(argv[1], twin)) {
        fprintf(stderr, "test_runs: no %s\n", argv[1]);
        return 1;
    }
    begin(argv);
    go_to_data();
    if (argc > 1) program = twin;
    test_all();
    return report();
}
