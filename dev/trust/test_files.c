/*
The test of the program's files: what it writes is read again, what is damaged is refused with one line, and
nothing that is not its own is touched.

    ./test_files
*/
#define SESSA_NO_MAIN
#include "../../train_sessa.c"
#include "check.h"
#include "run.h"

// A file of the work folder, opened to be locked.
static int open_work(const char *name) { return open(in_work(name), O_RDWR | O_CLOEXEC); }

static int exists(const char *name) {
    size_t size;
    return slurp(name, &size) != NULL;
}

static char damaged[80];        // what is wrong with bad.safetensors
static const char *reason = ""; // what the line must say

// The program must end with this exit code and one line on standard error, and leave the folder as it was.
__attribute__((format(printf, 2, 3)))
static void refuse(int wanted, const char *format, ...) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    uint64_t before = folder_state(0);
    int code = run("%s", line), lines = 0, kept = folder_state(0) == before;
    for (size_t i = 0; i < complaint_size; i++) lines += complaint[i] == '\n';
    int one_line = lines == 1 && complaint[complaint_size - 1] == '\n';
    int ok = check(code == wanted && one_line && complained(reason) && kept, "%d: %.50s%s%s", wanted, line,
                   *damaged ? " with " : "", damaged);
    if (!ok) printf("    exit code %d, %d lines, files %s: %s\n", code, lines, kept ? "kept" : "changed",
                    (char *)complaint);
    release();
}

// The program must refuse with exit code 2, touch nothing and say these words.
__attribute__((format(printf, 2, 3)))
static void refuse_with(const char *words, const char *format, ...) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    reason = words;
    refuse(2, "%s", line);
    reason = "";
}

// Writes bad.safetensors: good.safetensors with the first `from` of its header replaced.
static void damage(const char *from, const char *to) {
    size_t size = 0;
    const unsigned char *good = slurp("good.safetensors", &size), *bad = with_header(good, &size, from, to);
    if (!bad) return;
    spill("bad.safetensors", bad, size);
    snprintf(damaged, sizeof(damaged), "%.30s for %.30s", to, from);
}

// ----------------------------------------------------------------------------
// what is damaged

// What is written is read: a step with learning rate 0 keeps every bit.
static void check_kept(const Safetensors *a) {
    Safetensors b;
    int read = 0, crossed = 0;
    int ok = !run("--data text --load good.safetensors --lr 0 --min-lr 0 --batch 2 --steps 1 "
                  "--out d.safetensors");
    if (!check(ok && open_tensors(&b, "d.safetensors"), "train, save, load, save")) return;
    for (int i = 0; i < a->n_tensors; i++) {
        const FileTensor *t = &a->tensors[i], *after = safetensors_find(&b, t->name);
        int moment = !strncmp(t->name, "exp_avg", 7);
        crossed += moment;
        read += !moment && after && after->size == t->size && !memcmp(after->data, t->data, t->size);
    }
    check(exists("good.best.safetensors") && exists("d.best.safetensors"),
          "a run that ends before its first validation keeps its last weights as the best");
    check(read + crossed == a->n_tensors && crossed == 2 * (read - 1),
          "the same bits of %d tensors after a step with learning rate 0", read);
    safetensors_free(&b);
}

// The reader alone, on memory that ends where the bytes end, so that the sanitizers see a read past them:
// whether it refuses them with a line. What it accepts can be freed.
static int is_refused(const void *bytes, size_t size) {
    char error[ERROR_SIZE] = "";
    Safetensors file;
    unsigned char *copy = (unsigned char *)malloc(size ? size : 1);
    memcpy(copy, bytes, size);
    if (safetensors_parse(&file, copy, size, "bytes", error)) return strlen(error) > 10;
    safetensors_free(&file);
    return 0;
}

static void check_reader(void) {
    static const char huge[] = "{\"__metadata__\":{\"a\":\"\\u0041\"},"
                               "\"x\":{\"shape\":[99999999999999999999,3],"
                               "\"dtype\":\"F32\",\"data_offsets\":[0,9223372036854775808]}}";
    size_t size;
    const unsigned char *good = slurp("good.safetensors", &size);
    unsigned char header[8 + sizeof(huge)], *flipped = (unsigned char *)lend(size);
    int refused = 0, tried = 0;
    for (size_t cut = 0; cut < size; cut += cut < 4000 ? 7 : 501, tried++) refused += is_refused(good, cut);
    check(refused == tried, "cut at %d places: refused each time", tried);
    refused = 0;
    memcpy(header + 8, huge, sizeof(huge));
    for (uint64_t length = 0; length < sizeof(huge); length++) {
        memcpy(header, &length, 8);
        refused += is_refused(header, 8 + (size_t)length);
    }
    check(refused == sizeof(huge), "headers that end at any byte, with numbers that overflow: refused");
    for (int i = 0; i < 3000; i++) { // whatever the answer: no crash
        memcpy(flipped, good, size);
        for (int flips = random_int(1, 4); flips > 0; flips--) {
            int at = random_int(0, 3000);
            flipped[at] = (unsigned char)random_int(0, 255);
        }
        is_refused(flipped, size);
    }
}

static void check_sizes(void) {
    static const size_t cuts[] = {0, 5, 8, 700};
    static const uint64_t header_lengths[] = {UINT64_MAX, (uint64_t)1 << 63, 100000001, 3};
    static const char evaluate[] = "--load bad.safetensors --data text --eval";
    size_t size;
    for (int i = 0; i < 6; i++) { // the last two: one byte less, one byte more, the zero behind the file
        const unsigned char *good = slurp("good.safetensors", &size);
        spill("bad.safetensors", good, i < 4 ? cuts[i] : i == 4 ? size - 1 : size + 1);
        snprintf(damaged, sizeof(damaged), "%s",
                 i < 4 ? "an early end" : i == 4 ? "one byte less" : "one byte more");
        refuse(1, "%s", evaluate);
    }
    for (int i = 0; i < 4; i++) {
        unsigned char *bytes = slurp("good.safetensors", &size);
        memcpy(bytes, &header_lengths[i], 8);
        spill("bad.safetensors", bytes, size);
        snprintf(damaged, sizeof(damaged), "a header of %llu bytes", (unsigned long long)header_lengths[i]);
        refuse(1, "--load bad.safetensors --generate 3");
    }
}

static void check_headers(void) {
    static const char *const edits[][2] = { // from, to
        {"\"dtype\":\"F32\"", "\"dtype\":\"I32\""},
        {"\"dtype\":\"F32\"", "\"dtype\":\"F64\""},
        {"\"dtype\":\"F32\"", "\"dtype\":\"F3\""},
        {"[16]", "[4,4]"},
        {"[16]", "[17]"},
        {"[16]", "[-16]"},
        {"[16]", "[4611686018427387904,4611686018427387904]"},
        {"ln_f.bias", "ln_f.bios"},
        {"exp_avg.ln_f.bias", "exp_avg.ln_f.weight"},
        {"\"beta1\"", "\"beta2\""},
        {"\"__metadata__\"", "\"metadata\""},
        {"{", "["},
        {"{", ""},
        {"\"d_model\":\"16\"", "\"d_model\":\"18\""},
        {"\"d_model\":\"16\"", "\"d_model\":\"x\""},
        {"\"n_heads\":\"2\"", "\"n_heads\":\"0\""},
        {"\"d_model\":", "\"d_modal\":"},
        {"\"mixer\":\"sessa\"", "\"mixer\":\"other\""},
        {"\"vocab_size\":\"12\"", "\"vocab_size\":\"13\""},
        {"\"d_model\":\"16\"", "\"d_model\":16"},
    };
    for (size_t i = 0; i < sizeof(edits) / sizeof(edits[0]); i++) {
        damage(edits[i][0], edits[i][1]);
        refuse(1, "--load bad.safetensors --data text --eval");
    }
    damage("\"max_seq_len\":\"12\"", "\"max_seq_len\":\"3000000\"");
    check(!run("--load bad.safetensors --generate 3 --window 8"),
          "a model of long sequences generates in a short window");
    damage("\"step\":\"2\"", "\"step\":\"two\"");
    refuse(1, "--resume bad.safetensors --steps 4");
    char endless[801]; // as long as would overrun a buffer for the message
    memset(endless, '7', 800);
    memcpy(endless, "\"d_model\":\"", 11);
    strcpy(endless + 799, "\"");
    damage("\"d_model\":\"16\"", endless);
    refuse(1, "--load bad.safetensors --data text --eval");
    reason = "tensor "; // no memory is taken for what the file does not hold
    damage("\"n_layers\":\"2\"", "\"n_layers\":\"4096\"");
    refuse(1, "--load bad.safetensors --generate 5");
    damage("\"d_model\":\"16\"", "\"d_model\":\"65536\"");
    refuse(1, "--resume bad.safetensors --steps 4");
    reason = "";
}

// Where a header says that a tensor of 64 bytes lies, behind the tensor that lies first.
static void place_in_header(char *text, size_t size, const Safetensors *file, const char *name) {
    const FileTensor *t = safetensors_find(file, name), *first = &file->tensors[0];
    for (int i = 0; i < file->n_tensors; i++)
        if (file->tensors[i].data < first->data) first = &file->tensors[i];
    long long begin = (long long)(t->data - first->data);
    snprintf(text, size, "[%lld,%lld]", begin, begin + 64);
}

static void check_overlap(const Safetensors *good) {
    char from[64], to[64];
    place_in_header(from, sizeof(from), good, "ln_f.bias");
    place_in_header(to, sizeof(to), good, "ln_f.weight");
    damage(from, to);
    refuse(1, "--load bad.safetensors --data text --eval"); // two tensors in one place
}

static void check_spoilt_numbers(const Safetensors *good) {
    static const struct {
        const char *tensor; // all of whose numbers are
        float value;
        const char *options, *reason;
    } cases[] = {
        {"layers.1.W_in.weight", NAN, "--load bad.safetensors --data text --eval", "not finite"},
        {"wte.weight", INFINITY, "--load bad.safetensors --generate 5", "not finite"},
        {"exp_avg_sq.ln_f.bias", -INFINITY, "--resume bad.safetensors --steps 4", "not finite"},
        {"ln_f.weight", 3e38f, "--load bad.safetensors --generate 5", "logit"},
        {"ln_f.weight", 3e38f, "--load bad.safetensors --data text --eval", "validation loss"},
        {"ln_f.weight", 3e38f,
         "--load bad.safetensors --data text --batch 2 --steps 4 --out new.safetensors", "nothing was saved"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        size_t size;
        unsigned char *bytes = slurp("good.safetensors", &size);
        const FileTensor *t = safetensors_find(good, cases[i].tensor);
        for (int64_t e = 0; e < t->count; e++)
            memcpy(bytes + (t->data - good->bytes) + 4 * e, &cases[i].value, 4);
        spill("bad.safetensors", bytes, size);
        snprintf(damaged, sizeof(damaged), "%g in %s", (double)cases[i].value, cases[i].tensor);
        reason = cases[i].reason;
        refuse(1, "%s", cases[i].options);
    }
    reason = "";
}

static void test_files(void) {
    heading("files: what is written is read, what is damaged is refused with one line, nothing is touched");
    Safetensors good;
    int ok = !run("--data text " SMALL "--steps 2 --out good.safetensors --log good.log");
    if (!ok || !open_tensors(&good, "good.safetensors")) {
        check(0, "no run of two steps");
        return;
    }
    check_kept(&good);
    check_reader();
    check_sizes();
    check_headers();
    check_overlap(&good);
    check_spoilt_numbers(&good);
    damaged[0] = 0;
    safetensors_free(&good);
    release();
}

// ----------------------------------------------------------------------------
// the command line

static void check_wrong_options(void) {
    static const char *const wrong[] = {
        "--colour red",
        "dim",
        "--steps ten",
        "--steps 1.5",
        "--lr 1e-3x",
        "--lr nan",
        "--steps",
        "--dropout 1",
        "--batch 0",
        "--data text --heads 3 --dim 16",
        "--data text --dim 16 --heads 16",
        "--data text --heads 4 --kv-heads 3",
        "--data text --mixer none",
        "--resume good.safetensors --load good.safetensors",
        "--generate 5",
        "--eval",
        "--load good.safetensors --generate 5 --eval",
        "--resume good.safetensors --dim 32",
        "--resume good.safetensors --eps 1e-3",
        "--resume good.safetensors --mixer attention",
        "--data text --out text",
        "--data text --log text",
        "--data text --val other --log other",
        "--load good.safetensors --data text --heads 4",
        "--load good.safetensors --generate 5 --prompt abZ",
    };
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) refuse(2, "%s", wrong[i]);
}

static void check_impossible_options(void) {
    static const char *const impossible[] = {
        "--data absent",
        "--data empty",
        "--data text --val empty",
        "--resume good.safetensors --val other --steps 4",
        "--data subfolder",
        "--data short",
        "--load absent --generate 5",
        "--load subfolder --generate 5",
        "--resume absent",
        "--load good.safetensors --data other --eval",
        "--resume good.safetensors --data other --steps 4",
        "--data text --out subfolder/no/x.safetensors",
        "--data text --out subfolder",
        "--data text --log subfolder/no/x.log",
        "--data set.safetensors --val text",
        "--data tokens.bin --vocab 5",
        "--load good.safetensors --data tokens.bin --eval",
        "--resume d.best.safetensors --steps 9",
        "--data text --dim 65536 --layers 4096 --heads 4",
    };
    mkdir(in_work("subfolder"), 0777);
    spill("empty", "", 0);
    for (size_t i = 0; i < sizeof(impossible) / sizeof(impossible[0]); i++) refuse(1, "%s", impossible[i]);
}

// A shard whose header says what is not so: how many tokens, or its version.
static void check_shard(int more, int version) {
    size_t size;
    unsigned char *bytes = slurp("tokens.bin", &size);
    int32_t header[3] = {20240520, version, (int32_t)((size - 1024) / 2) + more};
    memcpy(bytes, header, sizeof(header));
    spill("count.bin", bytes, size);
    reason = "token shard";
    refuse(1, "--data count.bin --vocab 20");
    reason = "";
}

static void check_help(void) {
    int ok = !run("--help"), told = 0, options = 0;
    for (int i = 0; i < N_OPTIONS && option_table[i].group != STATE; i++, options++) {
        char name[64];
        snprintf(name, sizeof(name), "--%s ", option_table[i].name);
        told += said(name) != NULL;
    }
    check(ok && told == options && !complaint_size, "--help names all %d options", options);
}

static void check_version(void) {
    int ok = !run("--version") && said("train_sessa ") == (char *)output && !complaint_size;
    check(ok && strchr((char *)output, '\n') == (char *)output + output_size - 1, "--version: one line");
}

static void test_command_line(void) {
    heading("the command line: what cannot work is refused");
    check_shard(1, 1);
    check_shard(-1, 1);
    check_shard(0, 2);
    check_shard(-500, 1); // none
    check_wrong_options();
    check_impossible_options();
    check_help();
    check_version();
    reason = "; nothing was saved before";
    refuse(1, "--data text " TINY "--seq 12 --batch 2 --lr 1000 --warmup 0 --clip 0 --steps 400 "
              "--eval-every 0 --save-every 1000000 --out never.safetensors");
    reason = "";
}

// ----------------------------------------------------------------------------
// runs that nobody watches

static int all_finite(const Safetensors *file) {
    int finite = 1;
    for (int i = 0; i < file->n_tensors; i++) {
        const FileTensor *t = &file->tensors[i];
        if (strcmp(t->dtype, "F32")) continue;
        for (int64_t e = 0; e < t->count; e++) finite &= isfinite(number_of(t, e)) != 0;
    }
    return finite;
}

static void check_divergence(void) {
    Safetensors file;
    char words[64];
    int finite = 0, step = -1;
    int code = run("--data text " TINY "--seq 12 --batch 2 --lr 1000 --warmup 0 --clip 0 --steps 400 "
                   "--eval-every 0 --save-every 2 --out diverged.safetensors");
    if (open_tensors(&file, "diverged.safetensors")) {
        step = atoi(safetensors_meta(&file, "step"));
        finite = all_finite(&file);
        safetensors_free(&file);
    }
    snprintf(words, sizeof(words), "; diverged.safetensors holds step %d\n", step);
    check(code == 1 && step > 0 && step % 2 == 0 && finite && complained(words),
          "a loss that is not finite stops the run and names the last checkpoint: step %d, all finite", step);
}

// What training cannot bring about: a weight that is not finite after a finite step.
static void check_spoilt_model(void) {
    char error[ERROR_SIZE], *argv[] = {self};
    Run r;
    Config c = config_with(SESSA, 11, 16, 1, 2, 2, 12);
    memset(&r, 0, sizeof(r));
    r.backend = &cpu_backend;
    r.model = create(&c, 1, 12, TRAIN);
    r.table = r.model->table;
    parse_options(&r.settings, 1, argv, error);
    r.settings.values.vocab = 11; // and what depends on other options
    r.settings.values.kv_heads = r.settings.values.decay_steps = 4;
    r.settings.values.warmup = 0;
    r.settings.values.min_lr = 0;
    Place place;
    int saved = !settle(&place, in_work("diverged.safetensors"), NULL, error);
    saved = saved && !save_checkpoint(&r, &place, RESUMABLE, 0, NULL, error);
    copy_file("diverged.safetensors", "before.safetensors");
    real *blocks[] = {r.model->params, r.model->exp_avg, r.model->exp_avg_sq};
    int refused = 0;
    for (int i = 0; i < 3; i++) {
        blocks[i][7] = (real)(i ? NAN : INFINITY);
        refused += save_checkpoint(&r, &place, RESUMABLE, 0, NULL, error) && strstr(error, "not finite");
        blocks[i][7] = 0;
    }
    check(saved && refused == 3 && same_files("before.safetensors", "diverged.safetensors"),
          "a weight or a moment that is not finite is never written: the old file stays");
    model_free(r.model);
}

// A log of two steps whose first line is 900 bytes longer, with two lines that a killed run left, and its
// other files.
static void check_left_behind(void) {
    static const char resume[] = "--resume good.safetensors --steps 3 --out e.safetensors --overwrite "
                                 "--log long.log";
    size_t known = 0, size;
    char line[4000] = "";
    const char *two = (const char *)slurp("good.log", &known);
    if (!check(two && known < 1000, "the log of two steps")) return;
    int first = (int)(strchr(two, '\n') - two);
    snprintf(line, sizeof(line), "%.*s%900s%s{\"step\": 3, \"train_loss\": 2}\n{\"st", first, two, "",
             two + first);
    spill("long.log", line, strlen(line));
    spill("e.safetensors.tmp.s99999999", "x", 1);
    spill("e.best.safetensors.tmp.s0a1b2c3d", "x", 1);
    spill("e.safetensors.tmp.mine", "x", 1);
    spill("e.safetensors.tmp.20261129", "x", 1);
    spill("e.safetensors.lock", "", 0);
    int lock = open_work("e.safetensors.lock");
    flock(lock, LOCK_EX);
    int code = run("%s", resume);
    check(code == 1 && complained("another run") && exists("e.safetensors.tmp.s99999999"),
          "a run whose file another one is writing is refused, and removes nothing of it");
    close(lock);
    code = run("%s", resume);
    const char *log = (char *)slurp("long.log", &size);
    check(!code && log && !memcmp(log, line, known + 900) && size > known + 960 &&
              !strncmp(log + known + 900, "{\"step\": 3, \"train_loss\"", 24),
          "a log with a line of 1000 bytes is continued behind the resumed step");
    check(!exists("e.safetensors.tmp.s99999999") && !exists("e.best.safetensors.tmp.s0a1b2c3d") &&
              !exists("e.safetensors.lock"),
          "what a killed run left, temporary files and locks, is gone after the next");
    check(exists("e.safetensors.tmp.mine") && exists("e.safetensors.tmp.20261129"), "and nothing else is");
}

static void test_long_runs(void) {
    heading("long runs: divergence, spoilt weights, logs, what killed runs leave");
    check_divergence();
    check_spoilt_model();
    check_left_behind();
    release();
}

// ----------------------------------------------------------------------------
// what a run may replace

#define ONE_LAYER "--dim 16 --layers 1 --heads 2 "
#define OF_TEXT "--data text " ONE_LAYER "--seq 12 --batch 2 "
static const char run_of_text[] = OF_TEXT "--eval-every 5 --eval-batches 1";

// A run that is stopped when its log has three lines; returns its exit code.
static int stopped_run(const char *line, const char *log) {
    pid_t child = start_and_wait_for_log(line, log, 3);
    kill(child, SIGTERM);
    return finish(child);
}

// What is there stays, unless it is the run's own or the command line says so.
static void check_what_is_there(void) {
    static const char *const same[] = {
        "--out a --log a", "--out ./x --log x", "--out r --log r.best.safetensors",
        "--val text",      "--out text",        "--log text",
    };
    int ok = !run("%s --steps 10 --out p.safetensors --log p.log", run_of_text);
    check(ok && exists("p.best.safetensors"), "a run, its best weights and its log");
    refuse_with("p.safetensors is there: a run of step 10, validation loss",
                "%s --steps 3 --out p.safetensors", run_of_text);
    refuse_with("p.best.safetensors is there: weights of step 10", "%s --steps 3 --out p",
                run_of_text); // the same best weights
    refuse_with("p.log is there: a log up to step 10", "%s --steps 3 --out q.safetensors --log p.log",
                run_of_text);
    refuse_with("one file", "%s --load p.best.safetensors --steps 3 --out p.safetensors", run_of_text);
    refuse_with("one file", "%s --load p.safetensors --steps 3 --out p.safetensors --overwrite", run_of_text);
    spill("notes", "my notes\n", 9);
    refuse_with("is no log", "%s --steps 3 --out q.safetensors --log notes", run_of_text);
    refuse_with("it is no log", "--resume p.safetensors --steps 12 --log notes");
    refuse_with("notes is there: no checkpoint", "%s --steps 3 --out notes", run_of_text);
    for (int i = 0; i < 6; i++) refuse_with("one file", "%s --steps 3 %s", run_of_text, same[i]);
    refuse_with("one file", "--resume p.safetensors --steps 12 --log p.safetensors");
    refuse_with("one file", "--resume p.safetensors --steps 12 --log p.best.safetensors");
    run("%s --steps 4 --seed 5 --out other.safetensors --log other.log", run_of_text);
    refuse_with("nothing shows", "--resume p.safetensors --steps 12 --log other.log --eval-every 0");
    spill("void", "", 0);
    ok = !run("%s --steps 3 --out void --log void.log", run_of_text) && exists("void.best.safetensors");
    check(ok, "an empty file is nothing that could be lost");
}

// --again replaces a run of the same settings and data, and no other.
static void check_again(void) {
    static const char again[] = "--steps 10 --out again.safetensors --again";
    static const char endless[] = OF_TEXT "--eval-every 100000 --steps 100000 --out twice.safetensors";
    int ok = !run("%s %s", run_of_text, again) && !run("%s %s", run_of_text, again);
    ok = ok && said("again.safetensors of the same settings and data is replaced");
    check(ok && same_files("again.safetensors", "p.safetensors"),
          "--again replaces a run of the same settings and data, and says so");

    char line[256];
    snprintf(line, sizeof(line), "--run %s --log twice.log", endless);
    stopped_run(line, "twice.log");
    copy_file("p.best.safetensors", "twice.best.safetensors");
    snprintf(line, sizeof(line), "--run %s --again", endless);
    pid_t child = start(line);
    usleep(300000);
    kill(child, SIGTERM);
    finish(child);
    check(exists("twice.best.safetensors"),
          "--again: a run that is stopped early leaves the best weights that were there");

    static const struct { const char *data; int layers, steps; const char *more; } different[] = {
        {"text", 1, 10, "--seed 3"}, {"text", 1, 11, ""},  {"text", 1, 10, "--lr 1e-3"},
        {"text", 2, 10, ""},         {"other", 1, 10, ""},
    };
    for (int i = 0; i < 5; i++)
        refuse_with("is there",
                    "--data %s --dim 16 --layers %d --heads 2 --seq 12 --batch 2 --steps %d %s "
                    "--out again.safetensors --again",
                    different[i].data, different[i].layers, different[i].steps, different[i].more);
    double steps[64];
    ok = !run("%s --steps 4 --out p.safetensors --log p.log --overwrite", run_of_text);
    check(ok && read_log("p.log", "step", steps, 64) == 4, "--overwrite replaces run and log");
}

static void check_locks(void) {
    static const char busy[] = "another run is writing it";
    spill("r.safetensors.lock", "", 0); // as a run in another container would hold it
    int lock = open_work("r.safetensors.lock");
    flock(lock, LOCK_EX);
    uint64_t before = folder_state(0);
    int code = run("%s --steps 3 --out r.safetensors", run_of_text);
    check(code == 1 && complained(busy) && folder_state(0) == before, "two runs never share an --out");
    close(lock);
    int log = open_work("p.log");
    flock(log, LOCK_EX);
    code = run("--resume p.safetensors --steps 6 --log p.log");
    check(code == 1 && complained(busy), "nor a --log");
    close(log);
    int ok = !run("%s --steps 3 --out r.safetensors", run_of_text) && !exists("r.safetensors.lock");
    check(ok, "a lock that a killed run left is taken over, and removed");
}

// A run replaces a checkpoint, best weights or a log only if it wrote or resumed them, or is told to.
static void test_places(void) {
    heading("what a run replaces");
    check_what_is_there();
    check_again();
    check_locks();
    clean_folder();
    release();
}

// ----------------------------------------------------------------------------
// snapshots, and jobs that are started again

static const char kept[] = "--eval-every 5 --eval-batches 1 --keep-every 4";

static void check_snapshots_taken(void) {
    int ok = !run(OF_TEXT "--steps 10 %s --log k.log --out k.safetensors", kept);
    ok = ok && exists("k.step4.safetensors") && exists("k.step8.safetensors");
    check(ok && !exists("k.step10.safetensors"), "--keep-every 4: snapshots of steps 4 and 8 of 10");
    ok = !run("%s --steps 10 --out plain.safetensors", run_of_text);
    check(ok && same_files("k.safetensors", "plain.safetensors"), "they change no byte of the run");
    ok = !run("--resume k.step4.safetensors --out l.safetensors --eval-every 5 --eval-batches 1");
    check(ok && same_files("k.safetensors", "l.safetensors"), "a run goes on from one to the same bytes");
    refuse_with("a snapshot, which stays", "--resume k.step4.safetensors");
    ok = !run("--load k.step8.safetensors --data text --eval") && exists("k.step8.safetensors");
    check(ok, "one is evaluated");
}

// Whose snapshots may be replaced, and which are made later.
static void check_snapshots_there(void) {
    copy_file("k.step8.safetensors", "eight.safetensors");
    discard("k.safetensors");
    discard("k.best.safetensors");
    refuse_with("is there: a run of step", OF_TEXT "--steps 10 %s --out k.safetensors", kept);
    refuse_with("is there: a run of step", OF_TEXT "--steps 10 --seed 2 %s --out k.safetensors --again", kept);
    spill("k.step8.safetensors", "mine, not the run's", 19);
    refuse_with("k.step8.safetensors is there: no checkpoint",
                OF_TEXT "--steps 10 %s --out k.safetensors --again", kept);
    copy_file("text", "k.step8.safetensors");
    refuse_with("a file that the run is given",
                "--data k.step8.safetensors --format bytes " ONE_LAYER "--seq 12 --batch 2 --steps 10 %s "
                "--out k.safetensors --overwrite", kept);
    int ok = !run("--resume k.step4.safetensors --out n.safetensors --steps 8 %s", kept);
    check(ok && same_tensors("n.step8.safetensors", "eight.safetensors") && !exists("n.step4.safetensors"),
          "resumed under another name its snapshots get that name");
    discard("n.step8.safetensors");
    ok = !run("--resume n.safetensors %s", kept) && exists("n.step8.safetensors");
    check(ok && same_tensors("n.step8.safetensors", "eight.safetensors"),
          "one that a kill left out is made when the run is resumed");
    check(!run("--resume n.safetensors %s", kept) && said("nothing to do"), "and then there is nothing to do");
}

// A file that comes to a snapshot's place while the run trains.
static void check_snapshot_arrives(void) {
    static const char endless[] = "--run " OF_TEXT "--steps 100000 --eval-every 0 --keep-every 3000 "
                                  "--out s.safetensors --log s.log";
    pid_t child = start_and_wait_for_log(endless, "s.log", 3);
    spill("s.step3000.safetensors", "mine\n", 5);
    int code = finish(child);
    size_t size = 0;
    slurp("s.step3000.safetensors", &size);
    check(code == 1 && size == 5 && complained("s.step3000.safetensors: another file was put there") &&
              complained("s.safetensors holds step 3000"),
          "a file that comes to a snapshot's place stays, and the run is saved");
}

static size_t snapshot_size;
static void limit_files(void) {
    struct rlimit limit = {snapshot_size - 1, snapshot_size - 1}; // the run's file, without that word, fits
    setrlimit(RLIMIT_FSIZE, &limit);
}

// As on a disk that becomes full.
static void check_snapshot_fails(void) {
    slurp("k.step4.safetensors", &snapshot_size);
    copy_file("k.safetensors", "whole.safetensors");
    prepare_child = limit_files;
    int code = run(OF_TEXT "--steps 10 %s --out w.safetensors", kept);
    prepare_child = NULL;
    check(code == 1 && complained("w.step4.safetensors: cannot be written: File too large") &&
              complained("w.safetensors holds step 4") && !exists("w.step4.safetensors"),
          "a snapshot that does not fit ends the run with one line; the run is saved");
    int ok = !run("--resume w.safetensors %s", kept) && exists("w.step4.safetensors");
    check(ok && same_files("w.safetensors", "whole.safetensors") &&
              same_files("w.step4.safetensors", "k.step4.safetensors"), "and it goes on as if nothing had been");
}

// Started again and again by the same command.
static void check_continue(void) {
    static const char job[] = OF_TEXT "--steps 300 --decay-steps 300 --eval-every 100 --log j.log "
                              "--out j.safetensors --continue";
    double steps[512];
    int killed = 0, ok;
    for (int i = 0; i < 3; i++) { // before its first save, and behind
        char line[512];
        snprintf(line, sizeof(line), "--run %s", job);
        pid_t child = start_and_wait_for_log(line, "j.log", 1 + 25 * i);
        kill(child, SIGKILL);
        killed += finish(child) == 128 + SIGKILL;
    }
    ok = !run("%s", job) && said("j.safetensors is there: its run goes on behind step");
    ok = ok && read_log("j.log", "step", steps, 512) == 300;
    ok = ok && !run(OF_TEXT "--steps 300 --eval-every 100 --log i.log --out i.safetensors");
    check(ok && same_files("i.safetensors", "j.safetensors") &&
              same_files("i.best.safetensors", "j.best.safetensors"),
          "--continue: killed %d times and started again, the bytes of one run", killed);
    check(!run("%s", job) && said("nothing to do"), "and at its end there is nothing to do");
    refuse_with("--seed 2 differs", "%s --seed 2", job);
    refuse_with("neither --resume", "%s --resume j.safetensors", job);
    ok = !run(OF_TEXT "--load i.best.safetensors --steps 6 --out t.safetensors --continue --eval-every 0");
    discard("i.best.safetensors");
    ok = ok && !run("--data text --load i.best.safetensors --steps 9 --out t.safetensors --continue");
    check(ok, "of a run that was started from weights, which are not read again");
    spill("void.safetensors", "text", 4);
    int code = run("%s --steps 3 --out void.safetensors --continue", run_of_text);
    size_t size = 0;
    slurp("void.safetensors", &size);
    check(code == 1 && complained("void.safetensors") && size == 4, "what lies there and is no run stays");
}

static void test_kept(void) {
    heading("snapshots, and jobs that are started again");
    check_snapshots_taken();
    check_snapshot_fails();
    check_snapshots_there();
    check_snapshot_arrives();
    check_continue();
    clean_folder();
    release();
}

// ----------------------------------------------------------------------------
// files of others beside a run

static void check_strange_names(void) {
    spill("poetry.lock", "precious\n", 9);
    uint64_t before = folder_state(0);
    int code = run("%s --steps 3 --out poetry", run_of_text);
    check(code == 1 && complained("is no lock") && folder_state(0) == before,
          "a lock file of another program stays, and the run is refused");
    spill("m.safetensors.tmp.s1234567", "base", 4);
    refuse_with("the run's own", "--data m.safetensors.tmp.s1234567 --dim 16 --heads 2 --out m.safetensors");
    refuse_with("the run's own", "%s --steps 3 --out m.safetensors --log m.safetensors.lock", run_of_text);
    spill("z.safetensors", "hi\n", 3);
    spill("z.safetensors.lock", "", 0);
    spill("z.safetensors.tmp.s0123cafe", "x", 1);
    run("%s --steps 3 --out z.safetensors", run_of_text);
    check(exists("z.safetensors.tmp.s0123cafe"), "a run that is refused removes nothing");
}

static void check_strange_log(const char *what, const char *bytes, size_t size) {
    spill("other.log", bytes, size);
    uint64_t before = folder_state(0);
    int code = run("--resume a.safetensors --steps 12 --log other.log");
    check(code == 2 && folder_state(0) == before, "at a resume a log of this kind is not touched: %s", what);
}

// a.safetensors is a run of ten steps, of which this is the log.
static void check_strange_logs(const char *log) {
    static const char eleventh[] = "{\"step\": 11, \"train_loss\": 2.5, \"lr\": 1}\n"
                                   "{\"step\": 12, \"train_loss\": 2.5}\n";
    static const char nine[] = "{\"step\": 8, \"train_loss\": 1.5}\n{\"step\": 9, \"train_loss\": 1.5}\n";
    static const char no_number[] = "{\"step\": \"first\", \"note\": 1}\n";
    static const char no_loss[] = "{\"step\": 1, \"loss\": 1.5}\n{\"step\": 2, \"loss\": 1.5}\n";
    static const char zeros[] = "\0\0\0\x18 ftypmp42\nmore\nlines\n";
    char noted[5000];
    snprintf(noted, sizeof(noted), "%.4000s{\"note\": 1}\n", log);
    check_strange_log("zeros", zeros, sizeof(zeros) - 1);
    check_strange_log("a first step that is no number", no_number, strlen(no_number));
    check_strange_log("lines without a train_loss", no_loss, strlen(no_loss));
    check_strange_log("another run's up to the step before", nine, strlen(nine));
    check_strange_log("another run's from the step behind on", eleventh, strlen(eleventh));
    check_strange_log("a torn first line", "{\"step\": ", 9);
    check_strange_log("a line of another kind", noted, strlen(noted));

    double steps[8];
    int ok = !run("--resume a.safetensors --steps 12 --out b.safetensors --log b.log");
    copy_file("b.log", "c.log");
    ok = ok && !run("--resume a.safetensors --steps 11 --out c.safetensors --log c.log");
    check(ok && read_log("c.log", "step", steps, 8) == 1 && steps[0] == 11,
          "a log that begins with a resumed run goes on");
}

// Best weights beside a run that are not its own.
static void check_strange_weights(void) {
    run("--data text --dim 32 --layers 1 --heads 2 --seq 12 --batch 2 --steps 40 --eval-every 5 "
        "--out wide.safetensors");
    copy_file("wide.best.safetensors", "a.best.safetensors");
    refuse_with("not the best weights", "--resume a.safetensors --steps 14");
    run("%s --steps 10 --lr 1e-2 --out own.safetensors", run_of_text);
    discard("own.safetensors");
    refuse_with("own.best.safetensors is there", "%s --steps 10 --out own.safetensors --again", run_of_text);
    run("%s --steps 10 --out base.safetensors", run_of_text);
    run("%s --steps 10 --load base.best.safetensors --out tuned.safetensors", run_of_text);
    refuse_with("tuned.safetensors is there", "%s --steps 10 --out tuned.safetensors --again", run_of_text);
}

// A file that comes to --out while the run trains.
static void check_arrival(void) {
    static const char endless[] = "--run " OF_TEXT "--steps 100000 --eval-every 0 --out s.safetensors "
                                  "--log s.log";
    pid_t child = start_and_wait_for_log(endless, "s.log", 3);
    spill("s.safetensors", "mine\n", 5);
    kill(child, SIGTERM);
    int code = finish(child);
    size_t size = 0;
    const char *kept = complained("its place is "), *mine = (const char *)slurp("s.safetensors", &size);
    int ok = code == 1 && kept && size == 5 && !strncmp(mine, "mine\n", 5);
    char path[512];
    snprintf(path, sizeof(path), "%.400s", kept ? kept + 13 : "");
    path[strcspn(path, "\n;")] = 0;
    struct stat info;
    check(ok && !stat(path, &info) && info.st_size > 1000,
          "a file that appears at --out stays, and the run is kept beside it");
}

static void check_umask(void) {
    mode_t mask = umask(0222);
    int ok = !run("%s --steps 12 --out u.safetensors", run_of_text);
    umask(mask);
    check(ok, "an umask that takes the right to write away");
}

static void check_log_is_output(void) {
    char line[2 * PATH_MAX];
    snprintf(line, sizeof(line), "cd %s && %s --run %s --steps 3 --out so.safetensors --log so.log %s", work,
             self, run_of_text, ">so.log 2>so.err");
    check(system(line) != 0 && exists("so.err"), "a log that is standard output is refused");
}

static void test_strangers(void) {
    heading("files of others stay");
    size_t size;
    check_strange_names();
    int ok = !run("%s --steps 10 --out a.safetensors --log a.log", run_of_text);
    const char *log = ok ? (const char *)slurp("a.log", &size) : NULL;
    if (!check(log != NULL, "a run of ten steps")) return;
    check_strange_logs(log);
    check_strange_weights();
    check_arrival();
    check_umask();
    check_log_is_output();
    clean_folder();
    release();
}

// ----------------------------------------------------------------------------
// what a stop or a kill left open is made when the run is resumed; what is said to be there is there

// Writes a log of 12 steps as a run leaves it that was killed in the validation of the whole split: the last
// line lacks it.
static void cut_validation(const char *log) {
    char cut[4096];
    const char *validation = NULL, *next = log;
    while ((next = strstr(next, ", \"val_loss\"")) != NULL) validation = next++;
    snprintf(cut, sizeof(cut), "%.*s%s", (int)(validation - log), log, strstr(validation, ", \"lr\""));
    spill("a.log", cut, strlen(cut));
}

static void check_last_validation(const char *log) {
    static const char finish_it[] = "--resume a.safetensors --log a.log --eval-every 5 --eval-batches 1";
    double steps[64], losses[64], scores[64];
    cut_validation(log);
    int ok = !run("%s", finish_it) && read_log("a.log", "step", steps, 64) == 12 && steps[11] == 12;
    ok = ok && read_log("a.log", "val_loss", scores, 64) == 12 && isfinite(scores[11]);
    ok = ok && read_log("a.log", "train_loss", losses, 64) == 12 && isfinite(losses[11]);
    check(ok, "a finished run's last validation is made at resume, and stands in its log line");
    check(!run("%s", finish_it) && said("nothing to do"), "and then there is nothing to do");
    copy_file("a.safetensors", "early.safetensors");
    copy_file("a.best.safetensors", "early.best.safetensors");
    ok = !run("--resume a.safetensors --steps 20 --log a.log");
    ok = ok && !run("--resume early.safetensors --log a.log");
    check(ok && read_log("a.log", "step", steps, 64) == 20 && said("nothing to do"),
          "a resume that has nothing to do cuts no log");
    copy_file("early.safetensors", "a.safetensors");
    copy_file("early.best.safetensors", "a.best.safetensors");
}

static void check_best_weights(void) {
    copy_file("a.safetensors", "b.safetensors");
    copy_file("a.best.safetensors", "b.best.safetensors");
    int ok = !run("--resume b.safetensors --steps 13 --eval-every 0 --out c.safetensors");
    check(ok && same_files("c.best.safetensors", "a.best.safetensors"),
          "resumed under another name the best weights go along");
    discard("b.best.safetensors");
    ok = !run("--resume b.safetensors --steps 13 --eval-every 0") && said("counts anew");
    check(ok && exists("b.best.safetensors"), "best weights that are gone count anew, and that is said");
    run(OF_TEXT "--eval-every 0 --steps 6 --out d.safetensors");
    discard("d.best.safetensors"); // killed in the last validation
    ok = !run("--resume d.safetensors --eval-every 0") && exists("d.best.safetensors");
    check(ok, "best weights that a killed run never wrote are written");
}

// Most of the time this run is in a validation of step 3, 6, ...
static void check_stopped_validation(void) {
    static const char often[] = "--eval-every 3 --eval-batches 1000000";
    char line[512];
    snprintf(line, sizeof(line), "--run --data text %s --seq 12 --batch 1 %s --steps 30 %s", ONE_LAYER, often,
             "--out v.safetensors --log v.log");
    pid_t child = start_and_wait_for_log(line, "v.log", 2);
    kill(child, SIGTERM);
    int ok = finish(child) == 130 && !run("--resume v.safetensors --log v.log %s", often);
    ok = ok && !run("--data text " ONE_LAYER "--seq 12 --batch 1 %s --steps 30 --out u.safetensors "
                    "--log u.log",
                    often);
    ok = ok && same_files("u.safetensors", "v.safetensors");
    ok = ok && same_files("u.best.safetensors", "v.best.safetensors");
    check(ok && same_logs("u.log", "v.log", 30),
          "a validation that a signal broke off is made up for: the bytes of a run that was not stopped");
}

static void check_what_is_said(void) {
    run("%s --steps 12 --seed 4 --lr 1e-4 --out other.safetensors", run_of_text);
    copy_file("other.best.safetensors", "a.best.safetensors");
    refuse_with("not the best weights of the resumed run", "--resume a.safetensors --steps 14");
    int ok = !run("--resume c.safetensors --steps 15") && said("the schedule ends at step 12");
    check(ok, "a schedule that is at its end is told");
    ok = !run("--resume c.safetensors --steps 16 --lr 1e-3 --decay-steps 20");
    check(ok && said("--lr 0.001 in place of 0.003") && said("--decay-steps 20 in place of 12"),
          "so is one that is changed at a resume");
    refuse_with("stands there twice", "%s --steps 3 --out z.safetensors --seed 3 --seed 4", run_of_text);
    refuse_with("changes nothing", "%s --steps 3 --out z.safetensors --prompt a", run_of_text);
    refuse_with("changes nothing", "--load a.safetensors --generate 3 --steps 4");
    refuse_with("trains on the CPU, in one process", "%s --steps 3 --out z.safetensors --gpus 2", run_of_text);
    refuse_with("changes nothing", "%s --steps 3 --out z.safetensors --timeout 9", run_of_text);
    refuse_with("changes nothing", "--load a.safetensors --generate 3 --gpus 2");
    refuse_with("changes nothing", "--load a.safetensors --eval --data text --lr 1");
    refuse_with("its bytes", "%s --steps 3 --out z.safetensors --vocab 20", run_of_text);
}

static void test_pieces(void) {
    heading("missing pieces of resumed runs");
    size_t size = 0;
    int ok = !run("%s --steps 12 --out a.safetensors --log a.log", run_of_text);
    const char *log = (const char *)slurp("a.log", &size);
    if (!check(ok && log, "a run of 12 steps")) return;
    check_last_validation(log);
    check_best_weights();
    check_stopped_validation();
    check_what_is_said();
    clean_folder();
    release();
}

// ----------------------------------------------------------------------------
// what is saved was judged: a validation that is not finite, or that had nothing to judge

static void check_wild(const char *options) {
    double scores[512];
    char words[64];
    size_t size;
    int code = run("--data text --overwrite " ONE_LAYER "--seq 32 --batch 4 --lr 1e3 --clip 0 --warmup 3 "
                   "--steps 400 %s --out w.safetensors --log w.log",
                   options);
    const char *held = complained("w.safetensors holds step ");
    int step = held ? atoi(held + 25) : -1, lines = read_log("w.log", "val_loss", scores, 512);
    snprintf(words, sizeof(words), "holds step %d\n", step);
    int ok = code == 1 && step > 0 && step < 400 && lines >= step && complained(words);
    const char *log = (const char *)slurp("w.log", &size);
    ok = ok && log && !strstr(log, "nan") && !strstr(log, "inf");
    ok = ok && !run("--load w.safetensors --data text --eval") && isfinite(atof((char *)output + 9));
    check(ok, "%s: a run that diverges leaves the last step whose validation is finite: %d", options, step);
}

// Whether all that one file holds is in the other as well.
static int holds_all(const char *larger, const char *smaller) {
    Safetensors all, some;
    if (!open_tensors(&some, smaller)) return 0;
    int same = open_tensors(&all, larger) && some.n_tensors > 0;
    for (int i = 0; same && i < some.n_tensors; i++) {
        const FileTensor *t = &some.tensors[i], *other = safetensors_find(&all, t->name);
        same = other && other->size == t->size && !memcmp(other->data, t->data, t->size);
    }
    safetensors_free(&all);
    safetensors_free(&some);
    return same;
}

static void check_nothing_to_judge(void) {
    enum { N = 4, T = 6 };
    double scores[8];
    const int32_t *inputs = random_ids(N * T, 9, 0), *targets = random_ids(N * T, 9, 0);
    int32_t none[N * T];
    for (int i = 0; i < N * T; i++) none[i] = -1;
    write_tensors("some.safetensors", N, T, inputs, targets, NULL);
    write_tensors("none.safetensors", N, T, inputs, none, NULL);
    int ok = !run("--data some.safetensors --val none.safetensors " ONE_LAYER "--batch 2 --steps 4 "
                  "--eval-every 1 --out n.safetensors --log n.log");
    ok = ok && read_log("n.log", "val_loss", scores, 8) == 4 && isnan(scores[0]) && isnan(scores[3]);
    check(ok && holds_all("n.safetensors", "n.best.safetensors"),
          "a validation without a target gives no score, the last weights are kept as the best");
    int code = run("--load n.best.safetensors --val none.safetensors --eval");
    check(code == 1 && complained("no targets"), "and --eval says so");
}

// With learning rate 0 no validation is better than the first.
static void check_patience(void) {
    static const char still[] = "--data text " ONE_LAYER "--seq 12 --batch 2 --lr 0 --min-lr 0 --warmup 5 "
                                "--decay-steps 20 --eval-every 2 --eval-batches 2";
    static const char watched[] = "--eval-every 2 --eval-batches 2 --log p.log";
    double scores[64];
    int ok = !run("%s --steps 20 --patience 2 --out p.safetensors --log p.log", still);
    ok = ok && said("no lower loss in 2 validations: the run ends before its 20 steps") && said("saved to");
    ok = ok && read_log("p.log", "val_loss", scores, 64) == 6 && isfinite(scores[5]);
    check(ok, "--patience 2: the third validation is no better, the run ends as one that is done");
    ok = !run("--resume p.safetensors --patience 2 %s", watched);
    check(ok && said("nothing to do: 6 of 20 steps are done, and 2 validations"), "and is done at a resume");
    ok = !run("--resume p.safetensors --patience 4 %s", watched);
    check(ok && read_log("p.log", "step", scores, 64) == 10, "a larger --patience goes on");
    ok = !run("%s --steps 20 --patience 4 --out q.safetensors", still);
    check(ok && same_files("p.safetensors", "q.safetensors"), "to the bytes of a run that had it all along");
    ok = !run("%s --steps 5 --patience 4 --out r.safetensors", still);
    ok = ok && !run("--resume r.safetensors --steps 20 --patience 4 %s", "--eval-every 2 --eval-batches 2");
    check(ok && same_files("r.safetensors", "q.safetensors"), "so does one that was stopped between");
    ok = !run("--resume p.safetensors %s", watched) && !run("%s --steps 20 --out s.safetensors", still);
    check(ok && same_files("p.safetensors", "s.safetensors"), "none goes on to the end, and leaves no trace");
    refuse_with("--eval-every 0 makes none", "%s --steps 3 --out t --patience 2 --eval-every=0",
                "--data text " ONE_LAYER);
}

static void test_judgement(void) {
    heading("what is saved was judged");
    check_patience();
    check_wild("--eval-every 1");
    check_wild("--eval-every 0 --save-every 1");
    check_nothing_to_judge();
    clean_folder();
    release();
}

// The split that a model was validated on is what --eval evaluates, or the result says that it is not.
static void test_split(void) {
    static const char *const ways[] = {
        "--data half.txt --val held.txt",
        "--data half.txt",
        "--data held.txt",
    };
    heading("what --eval evaluates");
    size_t size;
    const char *text = (const char *)slurp("text", &size);
    spill("held.txt", text + 3000, 1500);
    spill("half.txt", text, 3000);
    int ok = !run("--data half.txt --val held.txt " ONE_LAYER "--seq 12 --batch 4 --steps 30 "
                  "--eval-every 10 --out e.safetensors");
    ok = ok && !run("--load e.best.safetensors --val held.txt --eval");
    double of_val = ok ? atof((char *)output + 9) : NAN;
    for (int i = 0; i < 3; i++) {
        ok = !run("--load e.best.safetensors %s --eval", ways[i]) && atof((char *)output + 9) == of_val;
        check(ok && !said("last tenth"), "%s: its validation text, %.6f", ways[i], of_val);
    }
    ok = !run("--load e.best.safetensors --data text --eval");
    check(ok && said("(the last tenth of text: not the text that the model was trained on)"),
          "another text: the result says so");
    discard("held.txt");
    int code = run("--load e.best.safetensors --data half.txt --eval");
    check(code == 1 && complained("held.txt"),
          "its validation text is gone: refused, not the training text's loss");
    clean_folder();
    release();
}

// ----------------------------------------------------------------------------
// formats are told by what a file holds

#define TWO_STEPS ONE_LAYER "--batch 2 --steps 2 --overwrite "

// Data that look like no text: refused with this word, and taken where --format says so.
static void refuse_data(const char *looks, const void *bytes, size_t size) {
    spill("odd", bytes, size);
    reason = looks;
    refuse(1, "--data odd " TWO_STEPS "--seq 4 --out odd.safetensors");
    reason = "";
    int ok = !run("--data odd --format bytes " TWO_STEPS "--seq 4 --out odd.safetensors");
    check(ok && !run("--resume odd.safetensors --steps 3"),
          "%s: --format bytes takes it, and a resumed run knows", looks);
    release();
}

static void check_odd_bytes(void) {
    enum { SIZE = 8000 };
    static unsigned char bytes[SIZE];
    static const char words[] = "to be, or not to be: that is the question\n";
    for (int i = 0; i < SIZE / 2; i++) bytes[2 * i] = (unsigned char)words[i % (sizeof(words) - 1)];
    refuse_data("UTF-16", bytes, SIZE);
    for (int i = 0; i < SIZE; i++) bytes[i] = (unsigned char)(i % 2 ? 0 : random_int(0, 64));
    refuse_data("16-bit", bytes, SIZE);
    for (int i = 0; i < SIZE; i++) bytes[i] = (unsigned char)random_int(0, i % 2 ? 196 : 255);
    refuse_data("numbers", bytes, SIZE);
    for (int i = 0; i < SIZE; i++) bytes[i] = (unsigned char)(i % 4 < 2 ? random_int(0, 255) : 0);
    refuse_data("32-bit", bytes, SIZE);
    memcpy(bytes, "PK\3\4", 4);
    refuse_data("zip", bytes, SIZE);
    memcpy(bytes, "\x89PNG", 4);
    refuse_data("PNG", bytes, SIZE);
    memcpy(bytes, "\xFF\xFE", 2);
    refuse_data("UTF-16", bytes, SIZE);
}

static void check_texts(void) {
    enum { SIZE = 8000 };
    static const char *const texts[] = {
        "caf\xE9 au lait, s'il vous pla\xEEt; ",              // Latin-1
        "\xE4\xBD\xA0\xE5\xA5\xBD\xE4\xB8\x96\xE7\x95\x8C ",  // UTF-8
        "\x82\xB1\x82\xF1\x82\xC9\x82\xBF\x82\xCD ",          // Shift-JIS
        "PK is no zip archive; GIF8 no picture. ",            // letters of signatures
        "e\bee\b",                                            // overstruck
        "\033[1mbold\033[0m ",                                // escapes
    };
    static char bytes[SIZE];
    for (int i = 0; i < 6; i++) {
        size_t length = strlen(texts[i]);
        for (size_t k = 0; k < SIZE; k++) bytes[k] = texts[i][k % length];
        spill("text8", bytes, SIZE);
        int ok = !run("--data text8 " TWO_STEPS "--seq 8 --out t.safetensors");
        check(ok && !complaint_size, "text number %d is taken without a word", i + 1);
    }
    for (int k = 0; k < SIZE / 2; k++) bytes[k] = (char)(k % 37 == 36 ? 0 : 'a' + k % 5);
    spill("zeros", bytes, SIZE / 2);
    int ok = !run("--data zeros " TWO_STEPS "--seq 8 --out t.safetensors");
    check(ok && complained("108 bytes are 0"), "a text with zero bytes is taken with a warning");
}

// Shards of GPT-2's and of Llama 3's kind, with the same tokens.
static void check_shards(void) {
    enum { TOKENS = 500 };
    static const char shape[] = "--vocab 60001 --dim 4 --layers 1 --heads 2 --seq 8 --batch 2 --steps 3 "
                                "--eval-every 0 --overwrite";
    static const int32_t gpt2[3] = {20240520, 1, TOKENS}, llama3[3] = {20240801, 7, TOKENS};
    static unsigned char wide[1024 + 4 * TOKENS], narrow[1024 + 2 * TOKENS];
    memcpy(wide, llama3, sizeof(llama3));
    memcpy(narrow, gpt2, sizeof(gpt2));
    for (int i = 0; i < TOKENS; i++) {
        uint32_t id = (uint32_t)random_int(0, 60000);
        uint16_t half = (uint16_t)id;
        memcpy(wide + 1024 + 4 * i, &id, 4);
        memcpy(narrow + 1024 + 2 * i, &half, 2);
    }
    spill("wide.bin", wide, sizeof(wide));
    spill("narrow.bin", narrow, sizeof(narrow));
    int ok = !run("--data wide.bin %s --out a.safetensors", shape);
    ok = ok && !run("--data narrow.bin %s --out b.safetensors", shape);
    check(ok && same_tensors("a.safetensors", "b.safetensors"),
          "a Llama 3 shard of the same tokens as a GPT-2 shard trains the same weights");
    uint32_t large = 1 << 24;
    memcpy(wide + 1024 + 40, &large, 4);
    spill("large.bin", wide, sizeof(wide));
    reason = "below 2^24";
    refuse(1, "--data large.bin --dim 2 --layers 1 --heads 1 --seq 4 --batch 1 --steps 1 "
              "--out c.safetensors");
    reason = "";
}

static void check_example_sets(void) {
    enum { N = 6, T = 8 };
    int32_t *inputs = random_ids(N * T, 18, 0), *targets = random_ids(N * T, 18, 1);
    inputs[5] = 18;
    write_tensors("plain.safetensors", N, T, inputs, targets, NULL);
    copy_file("plain.safetensors", "plain.st");
    int ok = !run("--data plain.st " TWO_STEPS "--out s.safetensors");
    check(ok && said("T 8, V 19,"),
          "an example set is known without its name; its vocabulary is the largest id + 1, as its metadata "
          "says less");
    inputs[5] = 1 << 24;
    write_tensors("far.safetensors", N, T, inputs, targets, NULL);
    reason = "below 2^24";
    refuse(1, "--data far.safetensors --dim 2 --layers 1 --heads 1 --batch 2 --steps 1 --out c.safetensors");
    reason = "";
}

static void test_formats(void) {
    heading("formats of data");
    check_odd_bytes();
    check_texts();
    check_shards();
    check_example_sets();
    clean_folder();
    release();
}

// ----------------------------------------------------------------------------
// words that are damaged

// What is done to the words of a file, and what the line must say.
typedef enum { AS_IT_IS, OFFSET, PAIR, BYTE } Damaged;
typedef struct { Damaged what; int64_t at, value; const char *says; } WordDamage;

// Whether words of these three tensors are refused with a line that says this; NULL: they are taken.
static int words_are_refused(FileTensor *tensors, int n, const char *says) {
    char error[ERROR_SIZE] = "";
    Safetensors file;
    Words words;
    memset(&file, 0, sizeof(file));
    file.tensors = tensors;
    file.n_tensors = n;
    sort_names(tensors, n, sizeof(FileTensor));
    int result = words_read(&words, &file, "words", error);
    int ok = says ? result == FAILED && strstr(error, says) && !words.bytes : !result && words.count > 0;
    words_free(&words);
    if (!ok) printf("    %s: %s\n", says ? says : "taken", error);
    return ok;
}

// The words, copied to memory that ends where they end.
static void lay_out(FileTensor tensors[3], const Words *w) {
    int64_t V = w->count, M = w->n_merges;
    size_t ends = 8 * (size_t)(V + 1), pairs = 8 * (size_t)M, bytes = (size_t)w->size;
    FileTensor merges = {(char *)"tokenizer.merges", "I32", 2, {M, 2}, 2 * M, pairs, NULL};
    FileTensor offsets = {(char *)"tokenizer.offsets", "I64", 1, {V + 1}, V + 1, ends, NULL};
    FileTensor tokens = {(char *)"tokenizer.tokens", "U8", 1, {w->size}, w->size, bytes, NULL};
    const void *from[] = {w->pairs, w->offsets, w->bytes};
    tensors[0] = merges;
    tensors[1] = offsets;
    tensors[2] = tokens;
    for (int i = 0; i < 3; i++) {
        void *copy = keep(malloc(tensors[i].size));
        tensors[i].data = (const unsigned char *)memcpy(copy, from[i], tensors[i].size);
    }
}

static void check_damaged_words(const Words *w) {
    const int64_t V = w->count, M = w->n_merges;
    const WordDamage damages[] = {
        {AS_IT_IS, 0, 0, NULL},
        {OFFSET, 0, 1, "from 0 to the end"},
        {OFFSET, 0, -1, "from 0 to the end"},
        {OFFSET, V, w->size - 1, "from 0 to the end"},
        {OFFSET, V, INT64_MAX, "from 0 to the end"},
        {OFFSET, 5, INT64_MAX, "falls behind token 4"},
        {OFFSET, 5, INT64_MIN, "falls behind token 4"},
        {OFFSET, 5, w->offsets[7], "falls behind token 5"},
        {OFFSET, 300, w->offsets[299] - 1, "falls behind token 299"},
        {OFFSET, V - 1, w->size + 1, "falls behind token"},
        {PAIR, 0, -1, "ids are 0 to"},
        {PAIR, 3, V, "ids are 0 to"},
        {PAIR, 2 * M - 1, INT32_MAX, "ids are 0 to"},
        {PAIR, 2 * M - 2, INT32_MIN, "ids are 0 to"},
        {PAIR, 2, w->pairs[3] == 0, "makes no token"},
        {BYTE, 0, w->bytes[1], "no token that is the byte"},
        {BYTE, w->offsets[V] - 1, 255, "makes no token"},
    };
    int n = (int)(sizeof(damages) / sizeof(damages[0])), right = 0;
    for (int i = 0; i < n; i++) {
        const WordDamage *d = &damages[i];
        FileTensor tensors[3];
        lay_out(tensors, w);
        int32_t id = (int32_t)d->value;
        unsigned char byte = (unsigned char)d->value;
        if (d->what == OFFSET) memcpy((char *)tensors[1].data + 8 * d->at, &d->value, 8);
        if (d->what == PAIR) memcpy((char *)tensors[0].data + 4 * d->at, &id, 4);
        if (d->what == BYTE) memcpy((char *)tensors[2].data + d->at, &byte, 1);
        right += words_are_refused(tensors, 3, d->says);
    }
    check(right == n, "numbers of a file of words, damaged in %d ways: %d refused", n - 1, right - 1);
}

// A merge that stands there twice; two tokens that are the same bytes, with merges and without.
static void check_doubles(const Words *w) {
    FileTensor tensors[3];
    lay_out(tensors, w);
    memcpy((char *)tensors[0].data + 8, w->pairs, 8);
    int right = words_are_refused(tensors, 3, "stands there twice");
    lay_out(tensors, w);
    int at = w->count - 1;
    while (word_length(w, at) != word_length(w, at - 1)) at--;
    memcpy((char *)tensors[2].data + w->offsets[at - 1], word_of(w, at), (size_t)word_length(w, at));
    right += words_are_refused(tensors, 3, "are the same bytes");
    right += words_are_refused(tensors + 1, 2, NULL);
    check(right == 3, "words or merges that stand there twice: refused; without merges words may");
}

// Tensors that are not there, or of another dtype or shape.
static void check_shapes_of_words(const Words *w) {
    FileTensor tensors[3], fewer[3];
    int right = 0;
    lay_out(tensors, w);
    for (int leave_out = 1; leave_out < 3; leave_out++) {
        int n = 0;
        for (int i = 0; i < 3; i++)
            if (i != leave_out) fewer[n++] = tensors[i];
        right += words_are_refused(fewer, n, leave_out == 1 ? "tokenizer.offsets is" : "tokenizer.tokens is");
    }
    static const char *const says[] = {"merges is not", "offsets is", "tokens is"};
    for (int i = 0; i < 3; i++) {
        memcpy(fewer, tensors, sizeof(tensors));
        strcpy(fewer[i].dtype, "U64");
        right += words_are_refused(fewer, 3, says[i]);
        memcpy(fewer, tensors, sizeof(tensors));
        fewer[i].n_dims = 3;
        right += words_are_refused(fewer, 3, says[i]);
    }
    memcpy(fewer, tensors, sizeof(tensors));
    fewer[0].shape[1] = 3;
    right += words_are_refused(fewer, 3, says[0]);
    memcpy(fewer, tensors, sizeof(tensors));
    fewer[1].count = 1;
    right += words_are_refused(fewer, 3, says[1]);
    fewer[1].count = MAX_VOCAB + 2;
    right += words_are_refused(fewer, 3, says[1]);
    check(right == 11, "tensors of words that are missing, or of another dtype or shape: refused");
}

// A file beside a shard that is no file of words.
static void refuse_words(const char *says, const void *bytes, size_t size) {
    spill("babel_words.safetensors", bytes, size);
    reason = says;
    refuse(1, "--data babel_train.bin " TWO_STEPS "--seq 8 --out x.safetensors");
}

// The same through the program: a checkpoint and the file beside a shard.
static void check_words_of_files(const Words *w) {
    static const char train[] = "--data babel_train.bin " TWO_STEPS "--seq 8";
    Safetensors file;
    size_t size = 0;
    run("%s --out good.safetensors", train);
    int there = open_tensors(&file, "good.safetensors");
    unsigned char *bytes = slurp("good.safetensors", &size);
    if (!check(there && bytes, "a checkpoint with words")) return;
    int64_t far = w->size + 1;
    memcpy(bytes + (safetensors_find(&file, "tokenizer.offsets")->data - file.bytes) + 80, &far, 8);
    spill("bad.safetensors", bytes, size);
    safetensors_free(&file);
    snprintf(damaged, sizeof(damaged), "an offset behind the end");
    reason = "tokenizer.offsets falls behind token 9";
    refuse(1, "--load bad.safetensors --generate 3");
    damage("tokenizer.merges", "tokenizer.mergers"); // unknown: the words are without merges
    check(!run("--load bad.safetensors --generate 3 --prompt 5"), "tensors of unknown names are left alone");
    damage("tokenizer.tokens", "tokenizer.bytes");
    reason = "tokenizer.tokens is missing";
    refuse(1, "--load bad.safetensors --generate 3");
    damage("\"vocab_size\":\"400\"", "\"vocab_size\":\"401\"");
    reason = "vocab_size words";
    refuse(1, "--load bad.safetensors --generate 3");
    *damaged = 0;
    refuse_words("ends early", "short", 5);
    bytes = slurp("set.safetensors", &size);
    refuse_words("tokenizer.tokens is missing", bytes, size);
}

static void test_damaged_words(void) {
    heading("words that are damaged");
    Babel b;
    if (!check(open_babel(&b), "data/babel_words.safetensors")) return;
    check_damaged_words(&b.words);
    check_doubles(&b.words);
    check_shapes_of_words(&b.words);
    write_shard("babel_train.bin", b.ids, b.n_ids);
    write_word_tensors("babel_words.safetensors", &b.words, 3);
    check_words_of_files(&b.words);
    close_babel(&b);
    *damaged = 0;
    reason = "";
    clean_folder();
    release();
}

// ----------------------------------------------------------------------------
// smaller things

// A float32 cut off to an F16, whose normal numbers are right: smaller ones become 0.
static uint16_t half_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    int exponent = (int)(bits >> 23 & 255) - 127 + 15;
    uint32_t sign = bits >> 31 << 15;
    return (uint16_t)(exponent > 0 ? sign | (uint32_t)exponent << 10 | (bits >> 13 & 1023) : sign);
}

static uint16_t bf16_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)(bits >> 16);
}

// A tensor in one of the two; returns how far off it is read, in units of the last place.
static double halve(FileTensor *t, int bf16) {
    const FileTensor whole = *t;
    uint16_t *numbers = (uint16_t *)lend(2 * (size_t)t->count + 2);
    double worst = 0;
    strcpy(t->dtype, bf16 ? "BF16" : "F16");
    t->size = 2 * (size_t)t->count;
    t->data = (const unsigned char *)numbers;
    for (int64_t k = 0; k < t->count; k++) {
        float value = (float)number_of(&whole, k);
        numbers[k] = bf16 ? bf16_of(value) : half_of(value);
        double size = fabs((double)value), unit = bf16 ? 1.0 / 128 : size < 6.2e-5 ? 1 : 1.0 / 1024;
        worst_of(&worst, fabs((double)float_at(t, k) - (double)value) / (size * unit + 1e-30));
    }
    return worst;
}

// A checkpoint's weights in half precision.
static void check_half(const Safetensors *file, int bf16) {
    char error[ERROR_SIZE];
    double worst = 0;
    FileTensor *halves = (FileTensor *)lend(sizeof(FileTensor) * (size_t)file->n_tensors);
    for (int i = 0; i < file->n_tensors; i++) {
        halves[i] = file->tensors[i];
        if (!strcmp(halves[i].dtype, "F32")) worst_of(&worst, halve(&halves[i], bf16));
    }
    Place place;
    int ok = !settle(&place, in_work("half.safetensors"), NULL, error);
    ok = ok && !safetensors_write(&place, halves, file->n_tensors, file->meta, file->n_meta, 0, NULL, error);
    ok = ok && !run("--load half.safetensors --data text --eval") && isfinite(atof((char *)output + 9));
    check_error(ok ? worst : NAN, 1, "weights in %s are read, their error in units of its last place",
                bf16 ? "BF16" : "F16");
}

static void check_special_halves(void) {
    static const unsigned char special[] = {0, 0x7C, 0, 0xFC, 1, 0x7C, 1, 0, 0xFF, 3, 0, 0x80, 0, 0x3C};
    char name[] = "special";
    FileTensor t = {name, "F16", 1, {7}, 7, 14, special};
    float f[7]; // ±∞, NaN, 2^-24, 1023·2^-24, -0, 1
    for (int i = 0; i < 7; i++) f[i] = float_at(&t, i);
    int large = isinf(f[0]) && f[0] > 0 && isinf(f[1]) && f[1] < 0 && isnan(f[2]);
    int small = f[3] == ldexpf(1, -24) && f[4] == ldexpf(1023, -24) && f[5] == 0;
    check(large && small && f[6] == 1, "F16: infinities, NaN, the smallest numbers");
}

// Names that a shell takes apart: the command that goes on quotes them.
static void check_quotes(void) {
    static const char endless[] = "--run " OF_TEXT "--steps 100000 --out it's~$a.safetensors --log it's.log";
    pid_t child = start_and_wait_for_log(endless, "it's.log", 3);
    kill(child, SIGTERM);
    kill(child, SIGINT);
    usleep(20000);
    kill(child, SIGTERM);
    int code = finish(child);
    const char *command = said("go on with: ");
    int ok = code == 130 && command && strstr(command, " --resume 'it'\\''s $a.safetensors' ");
    check(ok && exists("it's $a.safetensors"),
          "three signals, and a name that a shell takes apart: saved, and the command is quoted");
    char shell[1024], word[256] = "";
    snprintf(shell, sizeof(shell), "cd %s && printf %%s %s", work, command ? strstr(command, "'it") : "");
    FILE *pipe = popen(shell, "r");
    if (pipe && !fgets(word, sizeof(word), pipe)) word[0] = 0;
    if (pipe) pclose(pipe);
    check(!strncmp(word, "it's $a.safetensors", 19), "a shell reads it as the same name");
}

// What start() does for a child without standard input, output and error.
static void close_all(void) {
    for (int fd = 0; fd <= 2; fd++) close(fd);
}

static void check_closed_descriptors(void) {
    double steps[8];
    size_t size;
    prepare_child = close_all;
    int code = run(OF_TEXT "--steps 3 --out z.safetensors --log z.log");
    prepare_child = NULL;
    int ok = code == 1 && read_log("z.log", "step", steps, 8) == 3;
    check(ok && !strncmp((char *)slurp("z.log", &size), "{\"step\": 1, ", 12),
          "descriptors 0 to 2 closed: the log holds the log alone");
}

static void check_link(void) {
    struct stat info;
    int ok = !symlink("there.safetensors", in_work("link.safetensors"));
    ok = ok && !run("%s --steps 3 --out link.safetensors", run_of_text) && exists("there.safetensors");
    check(ok && !lstat(in_work("link.safetensors"), &info) && S_ISLNK(info.st_mode),
          "a link to a file that is not there yet stays a link");
}

// Several shards, or texts, are one stream in the order of their names: what is trained is what one file with
// all of them gives.
static void check_parts(void) {
    static const char o[] = ONE_LAYER "--vocab 20 --seq 12 --batch 2 --eval-every 5";
    enum { TOKENS = 500, SECOND = 100, THIRD = 350 };
    static const int begins[] = {0, SECOND, THIRD, TOKENS};
    static const char *const names[] = {"part_1.bin", "part_10.bin", "part_2.bin"};
    size_t size;
    unsigned char *whole = slurp("tokens.bin", &size), part[1024 + 2 * TOKENS];
    const unsigned char *text = slurp("text", &size);
    for (int i = 0; i < 3; i++) {
        int32_t n = begins[i + 1] - begins[i];
        memcpy(part, whole, 1024);
        memcpy(part + 8, &n, 4);
        memcpy(part + 1024, whole + 1024 + 2 * begins[i], 2 * (size_t)n);
        spill(names[i], part, 1024 + 2 * (size_t)n);
    }
    int ok = !run("--data tokens.bin %s --steps 10 --out p.safetensors", o);
    ok = ok && !run("--data part_*.bin %s --steps 10 --out q.safetensors", o);
    check(ok && same_tensors("p.safetensors", "q.safetensors"), "three token shards as one: the same weights");
    ok = !run("--data part_*.bin %s --steps 4 --decay-steps 10 --out r.safetensors", o);
    ok = ok && !run("--resume r.safetensors --steps 10 --eval-every 5");
    check(ok && same_files("q.safetensors", "r.safetensors"), "and resumed");
    check(!run("--resume p.safetensors --data part_*.bin --steps 12"), "the content is what is compared");
    spill("half_1.txt", text, 2500);
    spill("half_2.txt", text + 2500, 6000 - 2500);
    ok = !run("%s --steps 10 --out whole.safetensors", run_of_text);
    ok = ok && !run("--data half_?.txt " ONE_LAYER "--seq 12 --batch 2 --eval-every 5 --eval-batches 1 --steps 10 "
                    "--out halves.safetensors");
    check(ok && same_tensors("whole.safetensors", "halves.safetensors"), "two texts as one");
    refuse_with("one file", "--data part_*.bin %s --out part_2.bin --overwrite", o);
    refuse_with("one file", "--data part_*.bin --val part_2.bin %s --out s", o);
    refuse_with("one file", "--data part_2.bin --val part_*.bin %s --out s", o);
    spill("part_3.bin", part, size = 1024 + 2 * (TOKENS - THIRD));
    reason = "the run being resumed read";
    refuse(1, "--resume q.safetensors --steps 12");
    copy_file("text", "part_3.bin");
    reason = "part_3.bin: of another kind";
    refuse(1, "--data part_*.bin %s --out s", o);
    reason = "No such file";
    refuse(1, "--data none_*.bin %s --out s", o);
    copy_file("set.safetensors", "part_1.set");
    reason = "a pattern is for";
    refuse(1, "--data part_?.set %s --out s", o);
    reason = "";
}

static void check_no_rope(void) {
    static const char o[] = OF_TEXT "--eval-every 5 --eval-batches 1 --decay-steps 10";
    Safetensors file;
    char text[32] = "";
    int ok = !run("%s --no-rope --steps 10 --out n.safetensors", o) && !run("%s --steps 10 --out m.safetensors", o);
    check(ok && !same_tensors("n.safetensors", "m.safetensors"), "--no-rope: another model");
    int stored = ok && open_tensors(&file, "n.best.safetensors") && safetensors_meta(&file, "no_rope");
    if (ok) safetensors_free(&file);
    stored = stored && open_tensors(&file, "m.safetensors") && !safetensors_meta(&file, "no_rope");
    if (ok) safetensors_free(&file);
    check(stored, "its files say so, and those of others do not");
    ok = !run("%s --no-rope --steps 4 --out l.safetensors", o);
    ok = ok && !run("--resume l.safetensors --steps 10 --eval-every 5 --eval-batches 1");
    check(ok && same_files("n.safetensors", "l.safetensors"), "resumed: the bytes of a run that was not stopped");
    ok = !run("--load n.safetensors --generate 9 --temperature 0 --prompt abc") && output_size < 32;
    if (ok) memcpy(text, output, output_size);
    ok = ok && !run("--load n.safetensors --no-rope --plain --generate 9 --temperature 0 --prompt abc");
    check(ok && !strcmp((char *)output, text), "it generates, fast and plain");
    refuse_with("--no-rope differs", "--load m.safetensors --generate 3 --no-rope");
    refuse_with("--no-rope differs", "--resume m.safetensors --steps 12 --no-rope");
    refuse_with("mamba2 has none", "--data text --mixer mamba2 --no-rope --out s");
}

// Bytes of generated text come one by one; of é, €, an emoji, two bytes that are no UTF-8, and half a € at
// the end.
static void check_characters(void) {
    static const unsigned char bytes[] = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\xFF\x80"
                                         "b\xE2\x82";
    size_t size;
    fflush(stdout);
    int kept = dup(1), to = open(in_work("print"), O_RDWR | O_CREAT | O_TRUNC, 0666), whole = 1;
    dup2(to, 1);
    Character character = {{0}, 0};
    for (size_t i = 0; i < sizeof(bytes) - 1; i++) {
        print_byte(&character, bytes[i]);
        fflush(stdout);
        off_t at = lseek(to, 0, SEEK_END);
        whole = whole && (at == 0 || at == 1 || at == 3 || at == 6 || at >= 10);
    }
    dup2(kept, 1);
    close(kept);
    close(to);
    const unsigned char *printed = slurp("print", &size);
    check(whole && printed && size == sizeof(bytes) - 3 && !memcmp(printed, bytes, size),
          "generation prints whole characters, and what is no UTF-8 as it is");
}

static void test_oddities(void) {
    heading("smaller things");
    Safetensors file;
    int ok = !run("%s --steps 12 --out a.safetensors", run_of_text);
    if (!check(ok && open_tensors(&file, "a.best.safetensors"), "a checkpoint")) return;
    check_half(&file, 0);
    check_half(&file, 1);
    check_special_halves();
    check_quotes();
    check_closed_descriptors();
    check_link();
    check_characters();
    check_parts();
    check_no_rope();
    safetensors_free(&file);
    clean_folder();
    release();
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "--run")) return be_the_program(argc, argv);
    begin(argv);
    go_to_data();
    open_folder();
    test_files();
    test_command_line();
    test_long_runs();
    test_places();
    test_kept();
    test_strangers();
    test_pieces();
    test_judgement();
    test_split();
    test_formats();
    test_damaged_words();
    test_oddities();
    remove_folder();
    return report();
}
