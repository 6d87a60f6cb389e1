/*
What the page asks of the program: every number that it shows comes from here. Built on train_sessa.c
and on the influence program, as they are; dev/page/build.py compiles it with emscripten.

Three slots, one a mixer, each hold a run as the command line would make it: its options, data, model
and files, which lie in the file system that emscripten keeps in memory. A call that fails changes
nothing, returns a negative number, and page_line() is the line that says why.
*/
#ifndef REAL
#define REAL float // what a user runs: influence.c alone would be float64
#endif
#define main influence_main // its parts are wanted, not its command line
#include "../claims/influence.c"
#undef main

#ifdef __EMSCRIPTEN__
#include <emscripten.h>
#define EXPORT EMSCRIPTEN_KEEPALIVE
#else
#define EXPORT __attribute__((used))
#endif

// A run and where it stands.
typedef struct {
    Run run;
    Training training;
    Step step;
    char *words, **argv; // its command line: the options point into it
} Slot;

static Slot *slots[N_MIXERS];
static char line[ERROR_SIZE];
static double *numbers; // what the last call that gives numbers gave
static Model *look;     // a model that has read the text to be looked at
static int look_slot, look_T;

EXPORT const char *page_line(void) { return line; }

// Room for n numbers to give, all zero.
static double *give(size_t n) {
    free(numbers);
    return numbers = (double *)array(n, sizeof(double));
}

// The slot, or NULL and the line.
static Slot *opened(int slot) {
    if (slot >= 0 && slot < N_MIXERS && slots[slot]) return slots[slot];
    fail(line, NULL, "there is no such model yet");
    return NULL;
}

// ----------------------------------------------------------------------------
// runs

static void forget_files(Run *run) {
    const char *paths[] = {run->settings.values.out, run->best_path, run->settings.values.log};
    for (int i = 0; i < 3; i++)
        if (paths[i] && *paths[i]) unlink(paths[i]);
}

static void slot_free(Slot *slot) {
    if (slot->training.sampler) model_free(slot->training.sampler);
    log_close(&slot->training.log);
    run_free(&slot->run);
    free(slot->argv);
    free(slot->words);
    free(slot);
}

// Whether a file is a text that can be trained on: the number of its bytes.
EXPORT int page_check(const char *path) {
    Dataset set;
    memset(&set, 0, sizeof(set));
    if (dataset_read(&set, path, 0, line)) return FAILED;
    int n = (int)set.count;
    if (set.kind != DATA_TEXT) n = fail(line, path, "it holds token ids: this page reads texts");
    dataset_free(&set);
    return n;
}

// Opens a run from the words of a command line, one a line. It takes the place of its mixer's: the number
// of that slot.
EXPORT int page_open(const char *words) {
    Slot *slot = (Slot *)array(1, sizeof(Slot));
    Run *run = &slot->run;
    size_t length = strlen(words);
    int argc = 1;
    slot->words = strdup(words);
    slot->argv = (char **)array(length + 3, sizeof(char *));
    slot->argv[0] = (char *)"train_sessa";
    for (char *word = strtok(slot->words, "\n"); word; word = strtok(NULL, "\n"))
        slot->argv[argc++] = word;
    run->backend = &cpu_backend;
    run->order_epoch = -1;
    interrupted = 0;
    int result = parse_options(&run->settings, argc, slot->argv, line);
    if (!result) result = prepare(run, line);
    if (!result) result = begin_training(run, &slot->training, line);
    remove_locks(); // a page is one process: nobody else writes its files
    run->out_place.lock = run->best_place.lock = -1;
    if (result) {
        slot_free(slot);
        return result < 0 ? result : FAILED;
    }
    slot->step = step_before(run);
    slot->training.start = slot->training.told = seconds();
    slot->training.first_step = slot->step.step;
    int mixer = run->config.mixer;
    if (slots[mixer]) {
        forget_files(&slots[mixer]->run);
        slot_free(slots[mixer]);
    }
    slots[mixer] = slot;
    return mixer;
}

// One step of training, as the program's loop makes it: the log gets its line, the files are written when
// they are due. 1 after the last one.
EXPORT int page_step(int index) {
    Slot *slot = opened(index);
    if (!slot) return FAILED;
    Run *run = &slot->run;
    const Options *o = &run->settings.values;
    Step *s = &slot->step;
    if (o->step >= o->steps) return 1;
    if (make_step(run, &slot->training, s, line)) return FAILED;
    if (o->step < o->steps) return 0;
    return conclude_run(run, &slot->training, s, line) ? FAILED : 1;
}

// Writes the run's file, whatever step it is at.
EXPORT int page_save(int index) {
    Slot *slot = opened(index);
    return slot ? save_stopped(&slot->run, &slot->training, line) : FAILED;
}

// Of a run, as JSON.
EXPORT const char *page_tell(int index) {
    static char text[2048];
    Slot *slot = opened(index);
    if (!slot) return "";
    const Run *run = &slot->run;
    const Options *o = &run->settings.values;
    const Config *c = &run->config;
    snprintf(text, sizeof(text),
             "{\"mixer\": \"%s\", \"dim\": %d, \"layers\": %d, \"heads\": %d, \"seq\": %d, \"vocab\": %d, "
             "\"parameters\": %lld, \"step\": %lld, \"steps\": %lld, \"batch\": %lld, "
             "\"out\": \"%s\", \"best\": \"%s\", \"log\": \"%s\"}",
             mixers[c->mixer].name, c->d_model, c->n_layers, c->n_heads, c->max_seq_len, c->vocab_size,
             (long long)run->table.count, (long long)o->step, (long long)o->steps, (long long)o->batch,
             o->out, run->best_path, o->log ? o->log : "");
    return text;
}

// Prints the prompt and n letters more: what the model writes now.
EXPORT int page_sample(int index, const char *prompt, int n, double temperature, int seed) {
    Slot *slot = opened(index);
    if (!slot) return FAILED;
    Run *run = &slot->run;
    Options *o = &run->settings.values;
    Model *trained = run->model, *sampler = model_create(&run->config, 1, run->model_T, GENERATE, line);
    if (!sampler) return FAILED;
    memcpy(sampler->params, trained->params, sizeof(real) * (size_t)run->table.count);
    double before = o->temperature;
    o->temperature = temperature;
    run->model = sampler;
    int result = generate(run, &prompt, 1, n, splitmix64((uint64_t)seed), line);
    run->model = trained;
    o->temperature = before;
    model_free(sampler);
    return result;
}

// ----------------------------------------------------------------------------
// look: a text, and who hears whom in it

// Lets a copy of the slot's model read the text, all of it at once: the number of its letters.
EXPORT int page_look(int index, const char *text) {
    enum { LONGEST = 512 }; // matrices of T x T are made
    Slot *slot = opened(index);
    if (!slot) return FAILED;
    Run *run = &slot->run;
    int *ids = (int *)array(strlen(text) + 1, sizeof(int));
    int T = encode_prompt(run, text, ids, line);
    if (!T) T = wrong(line, NULL, "there is no text to look at");
    if (T > LONGEST) T = wrong(line, NULL, "the text has %d letters, and %d are the most", T, LONGEST);
    Model *m = T < 0 ? NULL : model_create(&run->config, 1, T, KEEP_ALL, line);
    if (m) {
        memcpy(m->params, run->model->params, sizeof(real) * (size_t)run->table.count);
        model_forward(m, ids, ids, 1, T, no_dropout);
        if (look) model_free(look);
        look = m;
        look_slot = index;
        look_T = T;
    }
    free(ids);
    return m ? T : T < 0 ? T : FAILED;
}

// A head of attention as influence.c takes the mean of all.
static void head_matrix(double *out, Model *m, int l, int T, int h) {
    Shape shape = direct_shape(&m->config, 1, T, 0);
    LayerActivations *a = &m->acts.layers[l];
    const real *k = a->proj + m->config.d_model + h / (shape.H / shape.G) * shape.d;
    real *stats = a->stats + 2 * (size_t)h * T;
    weight_matrix(out, a->proj + h * shape.d, k, shape.ld, stats, NULL, T, shape.d, 0, 1);
}

// What arrives by any number of hops: (I - A)^-1
static void all_hops_matrix(double *out, Model *m, int l, int T) { solve_matrix(out, m, l, T, T); }

// What arrives by exactly two hops: A², A = diag(γ) α
static void two_hops_matrix(double *out, Model *m, int l, int T) {
    double *A = (double *)array((size_t)T * T, sizeof(double));
    feedback_matrix(A, m, l, T, 1);
    for (int t = 0; t < T; t++)
        for (int u = 0; u < t; u++)
            for (int j = 0; j < u; j++) out[(size_t)t * T + j] += A[(size_t)t * T + u] * A[(size_t)u * T + j];
    free(A);
}

// (T,T), row t and column j, of the text that was read last. NULL where the mixer has no such matrix.
enum { DIRECT, FEEDBACK, TWO_HOPS, SOLVE, CHAIN };
EXPORT double *page_matrix(int kind, int l, int head) {
    fail(line, NULL, "this model has no such matrix");
    if (!look || l < 0 || l >= look->config.n_layers || head >= look->config.n_heads) return NULL;
    int mixer = look->config.mixer, T = look_T;
    if (kind == CHAIN ? mixer != MAMBA2 : mixer == MAMBA2 || (kind != DIRECT && mixer != SESSA)) return NULL;
    double *out = give((size_t)T * T);
    if (kind == DIRECT && head >= 0) head_matrix(out, look, l, T, head);
    else if (kind == DIRECT) direct_matrix(out, look, l, T);
    else if (kind == FEEDBACK) feedback_matrix(out, look, l, T, 1);
    else if (kind == TWO_HOPS) two_hops_matrix(out, look, l, T);
    else if (kind == SOLVE) all_hops_matrix(out, look, l, T);
    else chain_matrix(out, look, l, T);
    return out;
}

// γ (T) of a layer of that text. NULL where there is none.
EXPORT double *page_gamma(int l) {
    fail(line, NULL, "this model has no γ");
    if (!look || look->config.mixer != SESSA || l < 0 || l >= look->config.n_layers) return NULL;
    double *out = give((size_t)look_T);
    for (int t = 0; t < look_T; t++) out[t] = (double)look->acts.layers[l].gamma[t];
    return out;
}

// The memory of each layer by lag: means of |weight| over windows of T letters of the validation text,
// whose first `sources` letters are followed, as influence.c takes them. The weight is the solve's,
// attention's or the chain's. For each layer T numbers and then the slopes of their logarithm, over the
// lag's logarithm and over the lag, fitted from lag `from` to `to`.
EXPORT double *page_tail(int index, int T, int sources, int from, int to) {
    static void (*const matrices[N_MIXERS])(double *, Model *, int, int) = {
        all_hops_matrix, direct_matrix, chain_matrix};
    Slot *slot = opened(index);
    if (!slot) return NULL;
    Run *run = &slot->run;
    int64_t n = run->val_end - run->val_begin, windows = (n - 1) / T;
    int L = run->config.n_layers, taken = windows < 4 ? (int)windows : 4;
    if (windows < 1) {
        fail(line, NULL, "the validation text has %lld letters, and %d are needed", (long long)n, T + 1);
        return NULL;
    }
    Model *m = model_create(&run->config, 1, T, KEEP_ALL, line);
    if (!m) return NULL;
    memcpy(m->params, run->model->params, sizeof(real) * (size_t)run->table.count);
    double *out = give((size_t)L * (T + 2)), *matrix = (double *)array((size_t)T * T, sizeof(double));
    double *count = (double *)array((size_t)L * T, sizeof(double));
    int *ids = (int *)array(2 * (size_t)T, sizeof(int));
    for (int i = 0; i < taken; i++) {
        copy_sequence(ids, ids + T, run->val_set, run->val_begin + windows * i / taken * T, T);
        model_forward(m, ids, ids + T, 1, T, no_dropout);
        for (int l = 0; l < L; l++) {
            ByLag by_lag = {out + (size_t)l * (T + 2), count + (size_t)l * T};
            memset(matrix, 0, sizeof(double) * (size_t)T * (size_t)T);
            matrices[run->config.mixer](matrix, m, l, T);
            add_by_lag(by_lag, matrix, T, sources);
        }
    }
    for (int l = 0; l < L; l++) {
        double *mean = out + (size_t)l * (T + 2);
        for (int lag = 0; lag < T; lag++) mean[lag] /= count[(size_t)l * T + lag];
        int last = from;
        while (last < to && mean[last] > 1e-30) last++; // float32's exponent ends
        mean[T] = last > from + 1 ? slope(mean, from, last, 0) : NAN;
        mean[T + 1] = last > from + 1 ? slope(mean, from, last, 1) : NAN;
    }
    free(matrix);
    free(count);
    free(ids);
    model_free(m);
    return out;
}

// ----------------------------------------------------------------------------
// the knife: what a path multiplies by is set to zero, as dev/claims/knife.py does it in a file

enum { WHOLE, CUT_FEEDBACK, EVEN_FEEDBACK, EVEN_ATTENTION };

static void zero_tensor(Run *run, int l, const char *name) {
    char full[64];
    snprintf(full, sizeof(full), "layers.%d.mixer.%s", l, name);
    for (int i = 0; i < run->table.n; i++) {
        const Tensor *t = &run->table.rows[i];
        if (!strcmp(t->name, full))
            memset(run->model->params + t->offset, 0, sizeof(real) * (size_t)t->count);
    }
}

// Cuts layer l by cuts[l] (a digit), validates on that many batches and prints a sample; then all is as
// before. The number given: the loss.
EXPORT double *page_knife(int index, const char *cuts, int batches, const char *prompt, int n, int seed) {
    static const char *const names[][2] = {[WHOLE] = {"", ""},
                                           [CUT_FEEDBACK] = {"gamma_ctx.weight", "gamma_bias"},
                                           [EVEN_FEEDBACK] = {"proj_fb.weight", "proj_fb.bias"},
                                           [EVEN_ATTENTION] = {"q_proj.weight", "q_proj.bias"}};
    Slot *slot = opened(index);
    if (!slot) return NULL;
    Run *run = &slot->run;
    size_t bytes = sizeof(real) * (size_t)run->table.count;
    real *whole = (real *)array(1, bytes);
    memcpy(whole, run->model->params, bytes);
    for (int l = 0; l < run->config.n_layers && cuts[l]; l++) {
        int cut = cuts[l] - '0';
        for (int i = 0; i < 2 && cut >= WHOLE && cut <= EVEN_ATTENTION; i++)
            zero_tensor(run, l, names[cut][i]);
    }
    Score score = evaluate(run, batches, 1);
    int result = n ? page_sample(index, prompt, n, 0.8, seed) : 0;
    memcpy(run->model->params, whole, bytes);
    free(whole);
    if (result) return NULL;
    give(1)[0] = score.loss;
    return numbers;
}
