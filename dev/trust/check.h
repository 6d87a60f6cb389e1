// What the tests share: their checks, memory, numbers and models. Included behind the program that is tested.
#ifndef CHECK_H
#define CHECK_H

// ----------------------------------------------------------------------------
// checks

enum { IS_DOUBLE = sizeof(real) == sizeof(double) };
static int passed, failed;

// A bound for float32 and one for float64.
static inline double bound_of(double in_float, double in_double) { return IS_DOUBLE ? in_double : in_float; }

// A line above the checks of one subject.
static inline void heading(const char *title) { printf("\n%s\n", title); }

// One check more, passed or failed.
static inline int count(int ok) {
    if (ok) passed++;
    else failed++;
    fflush(stdout);
    return ok;
}

// A check of something measured: what it is, the error, its bound.
__attribute__((format(printf, 3, 4)))
static inline int check_error(double error, double bound, const char *format, ...) {
    char name[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof(name), format, arguments);
    va_end(arguments);
    int ok = error <= bound; // false for NaN
    printf("  %-66s %9.2e  bound %7.1e  %s\n", name, error, bound, ok ? "ok" : "FAIL");
    return count(ok);
}

// A check of something that is so or is not.
__attribute__((format(printf, 2, 3)))
static inline int check(int ok, const char *format, ...) {
    char name[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof(name), format, arguments);
    va_end(arguments);
    printf("  %-92s  %s\n", name, ok ? "ok" : "FAIL");
    return count(ok);
}

// The last line of a test; returns its exit code.
static inline int report(void) {
    printf("\n%d passed, %d failed\n", passed, failed);
    return failed > 0;
}

// ----------------------------------------------------------------------------
// the test as a process

static char self[PATH_MAX]; // this binary

// Finds this binary, and starts it again with threads that sleep while they wait: threads that spin at
// barriers starve each other on a busy machine. OpenMP reads its settings before main.
static inline void begin(char **argv) {
    if (!realpath("/proc/self/exe", self) && !realpath(argv[0], self)) exit(1);
    if (getenv("OMP_WAIT_POLICY")) return;
    setenv("OMP_WAIT_POLICY", "passive", 1); // a thousand rounds of waiting are less than what a core that
    setenv("GOMP_SPINCOUNT", "1000", 1);     // has gone idle takes to wake up
    execv(self, argv);
}

// Started from another folder: goes to this binary's, where data/ is.
static inline void go_to_data(void) {
    char *name = strrchr(self, '/');
    if (!access("data", F_OK)) return;
    *name = 0;
    if (chdir(self)) exit(1);
    *name = '/';
}

// ----------------------------------------------------------------------------
// memory and numbers

static void *lent[8192];
static int n_lent;

// Memory that a test has, to be freed at its end.
static inline void *keep(void *memory) {
    if (!memory || n_lent == 8192) { printf("the test is out of memory\n"); exit(1); }
    return lent[n_lent++] = memory;
}

// Zeroed memory until the end of a test.
static inline void *lend(size_t bytes) { return keep(calloc(bytes ? bytes : 1, 1)); }

// The end of a test: frees all that was lent.
static inline void release(void) { while (n_lent) free(lent[--n_lent]); }

static uint64_t chance = 20260424; // the state of the random numbers

// A random whole number, both ends included.
static inline int random_int(int low, int high) {
    return low + (int)(random_u64(&chance) % (uint64_t)(high - low + 1));
}

// What the program is held against is computed in these numbers. Each of them is read and written as the loop
// says, so that no optimiser sums in another order or makes vectors of it, whatever the flags that the tested
// code is compiled with.
typedef volatile double precise;

// What a plain loop adds to.
static inline precise *zeros(int64_t n) { return (precise *)lend((size_t)n * sizeof(double)); }

// Normal random numbers of this standard deviation.
static inline real *noise(int64_t n, double scale) {
    real *x = (real *)lend((size_t)n * sizeof(real));
    for (int64_t i = 0; i < n; i++) x[i] = (real)(scale * random_normal(&chance));
    return x;
}

// Outputs start as NaN, so that an element which nobody writes shows.
static inline real *poison(int64_t n) {
    real *x = (real *)lend((size_t)n * sizeof(real));
    for (int64_t i = 0; i < n; i++) x[i] = (real)NAN;
    return x;
}

// The same numbers once more, for what works in place.
static inline real *copy_of(const real *x, int64_t n) {
    real *copy = (real *)lend((size_t)n * sizeof(real));
    memcpy(copy, x, (size_t)n * sizeof(real));
    return copy;
}

// Random token ids; one in four is -1 where `ignored`.
static inline int *random_ids(int64_t n, int V, int ignored) {
    int *ids = (int *)lend((size_t)n * sizeof(int));
    for (int64_t i = 0; i < n; i++) ids[i] = ignored && random_int(0, 3) == 0 ? -1 : random_int(0, V - 1);
    return ids;
}

// ‖x - ref‖ / max(‖ref‖, floor) over the first `width` of the ld columns of each row. Infinite if one of the
// other columns, NaN before, was written.
static inline double rows_error(const real *x, const precise *ref, int64_t rows, int width, int ld,
                                double floor) {
    precise difference = 0, size = 0;
    for (int64_t n = 0; n < rows; n++)
        for (int i = 0; i < ld; i++) {
            double value = (double)x[n * ld + i], wanted = ref[n * ld + i];
            if (i >= width && !isnan(value)) return INFINITY;
            if (i >= width) continue;
            difference += (value - wanted) * (value - wanted);
            size += wanted * wanted;
        }
    return sqrt(difference) / fmax(sqrt(size), fmax(floor, 1e-200));
}

// The same of n numbers beside each other.
static inline double error_of(const real *x, const precise *ref, int64_t n, double floor) {
    return rows_error(x, ref, 1, (int)n, (int)n, floor);
}

// Keeps the larger of two errors; NaN stays.
static inline void worst_of(precise *worst, double error) { // NaN stays
    if (!(error <= *worst) && *worst == *worst) *worst = error;
}

// ‖x‖
static inline double length_of(const real *x, int64_t n) {
    precise sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sqrt(sum);
}

// ----------------------------------------------------------------------------
// models

static const int panel_heights[] = {0, 1, 3, 8}; // 0: the layer chooses
enum { N_HEIGHTS = 4 };

// What a layer that works in panels computes in, for all threads.
static inline real *scratch_for(int T) {
    return (real *)lend(panel_scratch(T) * (size_t)omp_get_max_threads() * sizeof(real));
}

// The shapes and the scratch of a layer's call.
static inline Work work_with(real *scratch, int P) {
    Work work = {scratch, P};
    return work;
}
static inline Shape shape_of(int B, int T, int first, int H, int G, int d, int ld) {
    Shape shape = {B, T, first, H, G, d, ld};
    return shape;
}
static inline ScanShape scan_with(int B, int T, int E, int S, int heads, const real *A_log,
                                  const real *skip) {
    ScanShape scan = {B, T, E, S, heads, A_log, skip};
    return scan;
}

// The row of this name, NULL if there is none.
static inline const Tensor *find_tensor(const Table *table, const char *name) {
    for (int i = 0; i < table->n; i++)
        if (!strcmp(table->rows[i].name, name)) return &table->rows[i];
    return NULL;
}

// A model's shape from what all mixers have; mamba2's own sizes are made of D.
static inline Config config_with(int mixer, int V, int D, int L, int H, int G, int T) {
    int mamba2 = mixer == MAMBA2;
    Config c = {V, D, L, H, G, T, 0.999, mixer, mamba2 ? D / 2 : 0, mamba2 ? 5 : 0, 0};
    return c;
}

// A model on the CPU, of a shape that is known to fit.
static inline Model *create(const Config *c, int B, int T, Mode mode) {
    char error[ERROR_SIZE];
    Model *m = model_create(c, B, T, mode, error);
    if (!m) { printf("%s\n", error); exit(1); }
    return m;
}

// Weights as training leaves them: away from the zeros and ones of the start, and large enough for every path
// to matter.
static inline void shake_weights(Model *m, double size) {
    initialise(m->params, &m->table, 7);
    for (int64_t i = 0; i < m->table.count; i++) m->params[i] += (real)(size * random_normal(&chance));
}

// ----------------------------------------------------------------------------
// files

// One number of a file's metadata; clears *ok if it is missing or out of range.
static inline double meta_number(const Safetensors *file, const char *key, double low, double high, int *ok) {
    const char *text = safetensors_meta(file, key);
    double value = low;
    if (!text || parse_number(text, &value) || value < low || value > high) {
        check(0, "metadata %s is %s", key, text ? text : "missing");
        *ok = 0;
        return low;
    }
    return value;
}

// Number i of a tensor in float32.
static inline double number_of(const FileTensor *t, int64_t i) {
    float value;
    memcpy(&value, t->data + i * 4, 4);
    return (double)value;
}

// 1 if t is there and has this dtype and shape.
static inline int same_shape(const FileTensor *t, const char *dtype, int n_dims, const int64_t *shape) {
    if (!t || strcmp(t->dtype, dtype) || t->n_dims != n_dims) return 0;
    for (int i = 0; i < n_dims; i++)
        if (t->shape[i] != shape[i]) return 0;
    return 1;
}

// Puts the file's weights into the model. Returns NULL, or the name of one that is missing or has a wrong
// dtype or shape.
static inline const char *take_weights(Model *m, const Safetensors *file) {
    for (int r = 0; r < m->table.n; r++) {
        const Tensor *row = &m->table.rows[r];
        const FileTensor *t = safetensors_find(file, row->name);
        if (!same_shape(t, "F32", row->n_dims, row->shape)) return row->name;
        for (int64_t i = 0; i < row->count; i++) m->params[row->offset + i] = (real)number_of(t, i);
    }
    return NULL;
}

// A copy of a safetensors file with the first `from` of its header replaced; *size is that of the file, then
// the copy's. NULL after a failed check if the header does not hold `from`.
static inline unsigned char *with_header(const unsigned char *good, size_t *size, const char *from,
                                         const char *to) {
    uint64_t length;
    memcpy(&length, good, 8);
    const unsigned char *at = (const unsigned char *)memmem(good + 8, (size_t)length, from, strlen(from));
    if (!at) { check(0, "the header of a file does not hold %s", from); return NULL; }
    size_t head = (size_t)(at - good), before = strlen(from), after = strlen(to);
    size_t tail = *size - head - before;
    unsigned char *bad = (unsigned char *)lend(head + after + tail);
    length += after - before;
    memcpy(bad, good, head);
    memcpy(bad, &length, 8);
    memcpy(bad + head, to, after);
    memcpy(bad + head + after, at + before, tail);
    *size = head + after + tail;
    return bad;
}

// A safetensors file, whole.
static inline int safetensors_read(Safetensors *file, const char *path, char *error) {
    unsigned char *bytes;
    size_t size;
    if (file_read(path, &bytes, &size, error)) return FAILED;
    return safetensors_parse(file, bytes, size, path, error);
}

#endif
