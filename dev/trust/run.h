// The program, run by a test as a user runs it: in a folder of its own, by starting this very binary again
// with --run, so that threads, signals and exit codes are real. Included behind check.h.
#ifndef RUN_H
#define RUN_H
#include <dirent.h>
#include <sys/wait.h>

static char folder[64], work[80];         // stdout and stderr go to folder, the program works in folder/work
static unsigned char *output, *complaint; // what the last run wrote there
static size_t output_size, complaint_size;
static const char *program = self;  // the binary that is the program when it is started with --run
static const char *n_threads = "2"; // and its OMP_NUM_THREADS

// The path of a file of the work folder, until the next call.
static inline const char *in_work(const char *name) {
    static char path[PATH_MAX];
    snprintf(path, sizeof(path), "%s/%s", work, name);
    return path;
}

// The bytes of a file of the work folder with a zero behind them, NULL if there is none.
static inline unsigned char *slurp(const char *name, size_t *size) {
    char error[ERROR_SIZE];
    unsigned char *bytes = NULL;
    return file_read(in_work(name), &bytes, size, error) ? NULL : (unsigned char *)keep(bytes);
}

// Writes a file of the work folder.
static inline void spill(const char *name, const void *bytes, size_t size) {
    FILE *out = fopen(in_work(name), "wb");
    if (!out || fwrite(bytes, 1, size, out) != size || fclose(out)) {
        printf("%s cannot be written\n", in_work(name));
        exit(1);
    }
}

// Removes a file or an empty folder of the work folder, if it is there.
static inline void discard(const char *name) {
    if (unlink(in_work(name))) rmdir(in_work(name));
}

// Whether two files hold the same bytes, and some.
static inline int same_files(const char *a, const char *b) {
    size_t size_a = 0, size_b = 0;
    const unsigned char *x = slurp(a, &size_a), *y = slurp(b, &size_b);
    return x && y && size_a == size_b && size_a > 0 && !memcmp(x, y, size_a);
}

// Reads a safetensors file of the work folder; returns whether that went well. To be freed then.
static inline int open_tensors(Safetensors *file, const char *name) {
    char error[ERROR_SIZE];
    memset(file, 0, sizeof(*file));
    return !safetensors_read(file, in_work(name), error);
}

// The step of a checkpoint, -1 if it cannot be read.
static inline int step_of(const char *name) {
    Safetensors file;
    if (!open_tensors(&file, name)) return -1;
    int step = atoi(safetensors_meta(&file, "step"));
    safetensors_free(&file);
    return step;
}

// Whether two safetensors files hold the same tensors; their metadata may differ.
static inline int same_tensors(const char *a, const char *b) {
    Safetensors x, y;
    if (!open_tensors(&x, a)) return 0;
    int same = open_tensors(&y, b) && x.n_tensors == y.n_tensors && x.n_tensors > 0;
    for (int i = 0; same && i < x.n_tensors; i++) {
        const FileTensor *t = &x.tensors[i], *other = &y.tensors[i];
        same = !strcmp(t->name, other->name) && t->size == other->size;
        same = same && !memcmp(t->data, other->data, t->size);
    }
    safetensors_free(&x);
    safetensors_free(&y);
    return same;
}

// Copies a file of the work folder, if it is there.
static inline void copy_file(const char *from, const char *to) {
    size_t size = 0;
    const unsigned char *bytes = slurp(from, &size);
    if (bytes) spill(to, bytes, size);
}

// A hash of the names and contents of all files in the work folder; `remove`: and none is left.
static inline uint64_t folder_state(int remove) {
    uint64_t state = 0;
    DIR *dir = opendir(work);
    for (struct dirent *entry; dir && (entry = readdir(dir)) != NULL;) {
        const char *name = entry->d_name;
        size_t size = 0;
        if (name[0] == '.') continue;
        const unsigned char *bytes = slurp(name, &size);
        uint64_t of_name = splitmix64(hash_bytes((const unsigned char *)name, strlen(name)));
        state += of_name ^ (bytes ? hash_bytes(bytes, size) : 0);
        if (remove) discard(name);
    }
    closedir(dir);
    return state;
}

// What start() does in the child before it becomes the program, NULL: nothing.
static void (*prepare_child)(void);

// Starts the program's binary in the work folder. Words are split at spaces, a ~ inside a word stands for a
// space.
static inline pid_t start(const char *line) {
    static char text[4096];
    char *words[80];
    int n = 0;
    words[n++] = (char *)program;
    snprintf(text, sizeof(text), "%s", line);
    for (char *word = strtok(text, " "); word && n < 79; word = strtok(NULL, " ")) {
        for (char *c = word; *c; c++)
            if (*c == '~') *c = ' ';
        words[n++] = word;
    }
    words[n] = NULL;
    setenv("OMP_NUM_THREADS", n_threads, 1);
    fflush(stdout); // what is buffered would be written by both
    pid_t child = fork();
    if (child) return child;
    alarm(120); // a program that hangs is a failure, not a test without an end
    if (chdir(work) || !freopen("../stdout", "wb", stdout) || !freopen("../stderr", "wb", stderr)) _exit(126);
    if (prepare_child) prepare_child();
    execv(program, words);
    _exit(127);
}

// Waits; returns the exit code, 128 + the signal that ended it, and keeps what it wrote.
static inline int finish(pid_t child) {
    int status = 0;
    waitpid(child, &status, 0);
    output = slurp("../stdout", &output_size);
    complaint = slurp("../stderr", &complaint_size);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// Runs the program with these options, to its end; returns the exit code.
__attribute__((format(printf, 1, 2)))
static inline int run(const char *format, ...) {
    char line[4096] = "--run ";
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line + 6, sizeof(line) - 6, format, arguments);
    va_end(arguments);
    int code = finish(start(line));
    if (code && code != 1 && code != 2)
        printf("  exit code %d: %s\n%s", code, line, complaint ? (char *)complaint : "");
    return code;
}

// Where the last run printed these words, on standard output or in its complaint; NULL: it did not.
static inline const char *said(const char *words) { return output ? strstr((char *)output, words) : NULL; }
static inline const char *complained(const char *words) {
    return complaint ? strstr((char *)complaint, words) : NULL;
}

// The numbers behind "key": in the lines of a log; returns the number of lines.
static inline int read_log(const char *name, const char *key, double *values, int max) {
    size_t size;
    int n = 0;
    char label[64];
    snprintf(label, sizeof(label), "\"%s\": ", key);
    for (char *line = (char *)slurp(name, &size); line && *line && n < max; n++) {
        char *end = strchr(line, '\n'), *at = strstr(line, label);
        values[n] = at && end && at < end ? strtod(at + strlen(label), NULL) : NAN;
        if (!end) return -1;
        line = end + 1;
    }
    return n;
}

// Whether two logs say the same of so many steps, but for the times and where validation took place.
static inline int same_logs(const char *a, const char *b, int lines) {
    static const char *keys[] = {"step", "train_loss", "lr", "grad_norm"};
    double x[64], y[64];
    int same = 1;
    for (int k = 0; k < 4; k++) {
        same &= read_log(a, keys[k], x, 64) == lines && read_log(b, keys[k], y, 64) == lines;
        for (int i = 0; same && i < lines; i++) same &= x[i] == y[i];
    }
    return same;
}

// The options of small runs.
#define TINY "--overwrite --dim 16 --layers 2 --heads 2 "
#define SMALL TINY "--seq 12 --batch 2 --warmup 5 "
#define WATCH "--eval-every 5 --eval-batches 2 "

// Writes an example set; lags may be NULL.
static inline void write_tensors(const char *name, int N, int T, const int32_t *inputs,
                                 const int32_t *targets, const int32_t *lags) {
    char error[ERROR_SIZE], names[3][8] = {"inputs", "targets", "lags"}, key[] = "vocab_size", value[] = "9";
    const int32_t *numbers[] = {inputs, targets, lags};
    FileTensor tensors[3];
    Meta meta = {key, value};
    memset(tensors, 0, sizeof(tensors));
    for (int i = 0; i < 3; i++) {
        tensors[i].name = names[i];
        strcpy(tensors[i].dtype, "I32");
        tensors[i].n_dims = 2;
        tensors[i].shape[0] = N;
        tensors[i].shape[1] = T;
        tensors[i].count = (int64_t)N * T;
        tensors[i].size = (size_t)N * (size_t)T * 4;
        tensors[i].data = (const unsigned char *)numbers[i];
    }
    Place place;
    int settled = !settle(&place, in_work(name), NULL, error);
    if (!settled || safetensors_write(&place, tensors, lags ? 3 : 2, &meta, 1, 0, NULL, error)) {
        printf("%s\n", error);
        exit(1);
    }
}

// A text, one letter after the other of a row of twelve but for one in four; the same with one letter
// changed, and its beginning; a token shard; a set of 20 examples with some targets ignored.
static inline void write_data(void) {
    enum { TEXT_SIZE = 6000, TOKENS = 500, N = 20, T = 12 };
    static const char letters[] = "abcdefghij \n";
    static char text[TEXT_SIZE];
    static unsigned char shard[1024 + 2 * TOKENS];
    int32_t header[3] = {20240520, 1, TOKENS};
    const int32_t *inputs = random_ids(N * T, 9, 0), *targets = random_ids(N * T, 9, 1);
    for (int i = 0, next = 0; i < TEXT_SIZE; i++) {
        int letter = random_int(0, 3) ? next : random_int(0, 11);
        text[i] = letters[letter];
        next = (letter + 1) % 12;
    }
    memcpy(shard, header, sizeof(header));
    for (int i = 0; i < TOKENS; i++) shard[1024 + 2 * i] = (unsigned char)random_int(0, 19);
    spill("text", text, TEXT_SIZE);
    spill("tokens.bin", shard, sizeof(shard));
    write_tensors("set.safetensors", N, T, inputs, targets, NULL);
    spill("short", text, 20);
    text[4321] = 'Z';
    spill("other", text, TEXT_SIZE);
}

// The words of data/babel_words.safetensors, with a text and its ids as the library has them.
typedef struct {
    Safetensors file;
    Words words;
    const unsigned char *text;
    size_t text_size;
    int *ids, n_ids;
} Babel;

// Whether they could be read. To be freed then.
static inline int open_babel(Babel *b) {
    char error[ERROR_SIZE];
    memset(b, 0, sizeof(*b));
    if (safetensors_read(&b->file, "data/babel_words.safetensors", error)) return 0;
    const FileTensor *text = safetensors_find(&b->file, "text"), *ids = safetensors_find(&b->file, "ids");
    if (words_read(&b->words, &b->file, "babel", error) || !text || !ids) return 0;
    b->text = text->data;
    b->text_size = text->size;
    b->n_ids = (int)ids->count;
    b->ids = (int *)lend((size_t)b->n_ids * sizeof(int));
    for (int i = 0; i < b->n_ids; i++) b->ids[i] = (int)integer_at(ids, 16, i);
    return 1;
}

static inline void close_babel(Babel *b) {
    words_free(&b->words);
    safetensors_free(&b->file);
}

// Writes a token shard.
static inline void write_shard(const char *name, const int *ids, int n) {
    unsigned char *bytes = (unsigned char *)lend(1024 + 2 * (size_t)n);
    int32_t header[3] = {GPT2_SHARD, 1, n};
    memcpy(bytes, header, sizeof(header));
    for (int i = 0; i < n; i++) {
        uint16_t id = (uint16_t)ids[i];
        memcpy(bytes + 1024 + 2 * i, &id, 2);
    }
    spill(name, bytes, 1024 + 2 * (size_t)n);
}

// Writes the first n of these tensors of words: tokens, offsets, merges.
static inline void write_word_tensors(const char *name, const Words *w, int n) {
    char error[ERROR_SIZE];
    int64_t V = w->count, M = w->n_merges;
    const unsigned char *offsets = (const unsigned char *)w->offsets;
    const unsigned char *merges = (const unsigned char *)w->pairs;
    FileTensor tensors[] = {
        {(char *)"tokenizer.tokens", "U8", 1, {w->size}, w->size, (size_t)w->size, w->bytes},
        {(char *)"tokenizer.offsets", "I64", 1, {V + 1}, V + 1, 8 * (size_t)(V + 1), offsets},
        {(char *)"tokenizer.merges", "I32", 2, {M, 2}, 2 * M, 8 * (size_t)M, merges}};
    Place place;
    int settled = !settle(&place, in_work(name), NULL, error);
    if (settled && !safetensors_write(&place, tensors, n, NULL, 0, 0, NULL, error)) return;
    printf("%s\n", error);
    exit(1);
}

// Starts the program and waits until its log has so many lines.
static inline pid_t start_and_wait_for_log(const char *line, const char *log, int lines) {
    double steps[64];
    pid_t child = start(line);
    for (int i = 0; i < 4000 && read_log(log, "step", steps, 64) < lines; i++) {
        release();
        usleep(5000);
    }
    return child;
}

// A folder for the runs of this test, with data in it.
static inline void open_folder(void) {
    snprintf(folder, sizeof(folder), "/tmp/test_sessa_XXXXXX");
    if (!mkdtemp(folder) || snprintf(work, sizeof(work), "%s/work", folder) < 0 || mkdir(work, 0777)) {
        printf("no folder to work in: %s\n", strerror(errno));
        exit(1);
    }
    write_data();
}

// For the next test: the same data, and nothing else.
static inline void clean_folder(void) {
    folder_state(1);
    write_data();
}

// The end of the runs: nothing is left of them.
static inline void remove_folder(void) {
    folder_state(1);
    discard("../stdout");
    discard("../stderr");
    rmdir(work);
    rmdir(folder);
    release();
}

// This binary as the program, when start() has started it with --run; returns the exit code.
static inline int be_the_program(int argc, char **argv) {
    start_again(argv);
    argv[1] = argv[0];
    return run_program(argc - 1, argv + 1, &cpu_backend);
}

#endif
