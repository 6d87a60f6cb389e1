/*
Fuzzing of everything that train_sessa.c reads: whatever the bytes are, no access out of bounds, no undefined behaviour,
and what is accepted is what it says. TARGET in the environment chooses the reader.
fuzz.py beside it builds and runs it.

    safetensors  a file as it lies on the disk: parsed, every byte and name visited, written again and read back
    header       the same with a length of two bytes that is made to fit, so that changes of the header stay readable;
                 what is valid is taken as weights, as a resume state and as an example set
    metadata     lines key=value over the metadata of a tiny checkpoint, whose tensors fit the configuration if they can
    data         --data and --val: text, token shard or example set, read from a file in memory; every split and sequence
    options      a command line, one word a line, up to the size of the model; a settings's text gives the settings again
    prompt       a prompt, a vocabulary and logits of any bits: ids and samples are within the vocabulary
    log          --log of a resumed run: what is kept is a part of what was there
    words        the three tensors of words, and a text: its ids are those of its bytes

With libFuzzer: clang -fsanitize=fuzzer,address,undefined. With any compiler: -DREPLAY, which runs each file named once.
*/
#define SESSA_NO_MAIN
#include "../../train_sessa.c"

#define REQUIRE(condition) do { if (!(condition)) { fprintf(stderr, "%d: %s\n", __LINE__, #condition); abort(); } } while (0)
enum { MAX_NUMBERS = 1 << 16 }; // of a model or a split that is really walked through

static char error[ERROR_SIZE];
static volatile uint64_t sink; // keeps reads from being optimised away

static void *copy_of(const void *bytes, size_t size, size_t extra) { // in memory of exactly that size
    char *copy = (char *)malloc(size + extra + !(size + extra));
    if (size) memcpy(copy, bytes, size);
    memset(copy + size, 0, extra);
    return copy;
}

static void require_line(void) { // what a user sees: one line of UTF-8, not empty, no control character
    REQUIRE(*error && strlen(error) < ERROR_SIZE && utf8_valid((const unsigned char *)error, strlen(error)));
    for (const char *c = error; *c; c++) REQUIRE((unsigned char)*c >= 32 && *c != 127 && memcmp(c, "\xC2\x80", 2));
}

// A file in memory under a name in the file system. The name's end tells an example set.
static int memory[2] = {-1, -1};
static char path[2][2][64]; // [file][is an example set]
static void put_file(int file, const void *bytes, size_t size) {
    if (memory[file] < 0) {
        memory[file] = memfd_create("fuzz", 0);
        for (int set = 0; set < 2; set++) {
            char target[64];
            snprintf(target, sizeof(target), "/proc/%d/fd/%d", (int)getpid(), memory[file]);
            snprintf(path[file][set], sizeof(path[file][set]), "/tmp/fuzz.%d.%d%s", (int)getpid(), file, set ? ".safetensors" : "");
            unlink(path[file][set]);
            REQUIRE(!symlink(target, path[file][set]));
        }
    }
    REQUIRE(!ftruncate(memory[file], 0) && pwrite(memory[file], bytes, size, 0) == (ssize_t)size);
}
static void remove_links(void) {
    for (int i = 0; i < 4; i++) if (*path[i / 2][i % 2]) unlink(path[i / 2][i % 2]);
}

// A backend without layers: parameters are one block of real numbers, exactly as large as the table says.
static real *numbers;
static real *read_numbers(Model *model, Block block) { (void)model; (void)block; return numbers; }
static void write_numbers(Model *model, Block block) { (void)model; (void)block; }
static Backend backend;

static void start_run(Run *run) { // with the options' defaults
    static Settings settings;
    char *argv[] = {(char *)"fuzz"};
    if (!settings.values.out) REQUIRE(!parse_options(&settings, 1, argv, error));
    memset(run, 0, sizeof(*run));
    run->backend = &backend;
    run->order_epoch = -1;
    run->settings = settings;
}

// The tables of a configuration that was accepted: sizes add up or are marked as too large. Loads the weights if they
// are few.
static void walk_model(Run *run, int resume) {
    const Config *c = &run->config;
    if (c->n_layers > 64) return; // for speed: every layer is alike
    Weights weights;
    Activations acts;
    Table table, acts_table;
    memset(&acts, 0, sizeof(acts));
    memset(&acts_table, 0, sizeof(acts_table));
    weights.layers = (LayerWeights *)calloc((size_t)c->n_layers, sizeof(LayerWeights));
    acts.layers = (LayerActivations *)calloc((size_t)c->n_layers, sizeof(LayerActivations));
    memset(&table, 0, sizeof(table));
    carve_weights(&weights, &table, NULL, c);
    carve_activations(&acts, &acts_table, NULL, c, (int)run->settings.values.batch, c->max_seq_len, TRAIN);
    double size = 0;
    for (int i = 0; i < table.n; i++) {
        double row = 1;
        for (int d = 0; d < table.rows[i].n_dims; d++) row *= (double)table.rows[i].shape[d];
        size += row;
    }
    REQUIRE(table.count < 0 ? size > 0x1p57 : (double)table.count == size);
    REQUIRE(acts_table.count != 0);
    if (table.count >= 0 && table.count < MAX_NUMBERS) {
        run->table = table;
        static Model model;
        int whole = 1;
        numbers = (real *)malloc((size_t)table.count * sizeof(real));
        int n_blocks = resume ? 3 : 1;
        run->model = &model;
        for (int i = 0; whole && i < 2 * n_blocks; i++) { // first that all is there, then the numbers
            Block block = (Block)(i % n_blocks);
            int result = i < n_blocks ? check_block(run, "fuzz", block, error) : load_block(run, "fuzz", block, error);
            if (result) { require_line(); whole = 0; }
        }
        for (int64_t i = 0; whole && i < table.count; i++) REQUIRE(isfinite(numbers[i]));
        free(numbers);
    }
    free(table.rows);
    free(acts_table.rows);
    free(weights.layers);
    free(acts.layers);
}

static void walk_examples(const Safetensors *file) {
    Dataset set;
    memset(&set, 0, sizeof(set));
    set.max_id = -1;
    if (examples_read(&set, file, "fuzz", error)) require_line();
    else {
        REQUIRE(set.count > 0 && set.width > 0 && set.max_id >= 0 && set.max_id < INT32_MAX);
        if (set.count * set.width < MAX_NUMBERS) {
            int *inputs = (int *)malloc((size_t)set.width * sizeof(int)), *targets = (int *)malloc((size_t)set.width * sizeof(int));
            for (int64_t i = 0; i < set.count; i++) {
                copy_sequence(inputs, targets, &set, i, set.width);
                for (int t = 0; t < set.width; t++)
                    REQUIRE(inputs[t] >= 0 && inputs[t] <= set.max_id && targets[t] >= -1 && targets[t] <= set.max_id &&
                            (!set.lags || set.lags[i * set.width + t] >= 0));
            }
            free(inputs);
            free(targets);
        }
    }
    dataset_free(&set);
}

// A safetensors file as safetensors_write writes it, in memory.
static unsigned char *write_in_memory(size_t *size, const FileTensor *tensors, int n_tensors,
                                      const Meta *meta, int n_meta) {
    Text header = {NULL, 0, 0, 0}, out = {NULL, 0, 0, 0};
    write_header(&header, tensors, n_tensors, meta, n_meta);
    uint64_t length = header.size;
    text_put(&out, (const char *)&length, 8);
    text_put(&out, header.text, header.size);
    for (int i = 0; i < n_tensors; i++)
        if (tensors[i].size) text_put(&out, (const char *)tensors[i].data, tensors[i].size);
    REQUIRE(!header.failed && !out.failed);
    free(header.text);
    *size = out.size;
    return (unsigned char *)out.text;
}

// A file that was accepted: all that it names is there, and writing it gives a file that says the same.
static void walk_file(const Safetensors *file) {
    char line[ERROR_SIZE];
    uint64_t sum = 0;
    int again = 1;
    for (int i = 0; i < file->n_tensors; i++) {
        const FileTensor *t = &file->tensors[i];
        for (size_t k = 0; k < t->size; k++) sum += t->data[k];
        REQUIRE(safetensors_find(file, t->name) == t && (size_t)t->count <= t->size * 2);
        again &= t->n_dims <= MAX_DIMS && utf8_valid((const unsigned char *)t->name, strlen(t->name));
    }
    for (int i = 0; i < file->n_meta; i++) {
        REQUIRE(safetensors_meta(file, file->meta[i].key) == file->meta[i].value);
        again &= utf8_valid((const unsigned char *)file->meta[i].key, strlen(file->meta[i].key)) &&
                 utf8_valid((const unsigned char *)file->meta[i].value, strlen(file->meta[i].value));
    }
    sink += sum;
    if (!again) return; // shapes that are not kept; U+0000, which stands in memory as no valid UTF-8
    size_t size = 0;
    unsigned char *bytes = write_in_memory(&size, file->tensors, file->n_tensors, file->meta, file->n_meta);
    Safetensors copy;
    REQUIRE(!safetensors_parse(&copy, bytes, size, "copy", line));
    REQUIRE(copy.n_tensors == file->n_tensors && copy.n_meta == file->n_meta);
    for (int i = 0; i < file->n_tensors; i++) {
        const FileTensor *s = &file->tensors[i], *t = &copy.tensors[i];
        REQUIRE(!strcmp(s->name, t->name) && !strcmp(s->dtype, t->dtype) && s->n_dims == t->n_dims && s->size == t->size &&
                !memcmp(s->shape, t->shape, sizeof(s->shape)) && !memcmp(s->data, t->data, s->size));
    }
    for (int i = 0; i < file->n_meta; i++)
        REQUIRE(!strcmp(file->meta[i].key, copy.meta[i].key) && !strcmp(file->meta[i].value, copy.meta[i].value));
    safetensors_free(&copy);
}

// What can be done with the bytes of a safetensors file: as they are, as weights, as a resume state, as an example set.
static void use_file(const void *bytes, size_t size, int load) {
    Run run;
    start_run(&run);
    if (safetensors_parse(&run.file, (unsigned char *)copy_of(bytes, size, 0), size, "fuzz", error)) { require_line(); return; }
    walk_file(&run.file);
    for (int resume = 0; load && resume < 2; resume++) {
        Safetensors file = run.file;
        start_run(&run);
        run.file = file;
        if (settings_from_file(&run, "fuzz", resume, error)) require_line();
        else walk_model(&run, resume);
        words_free(&run.words);
    }
    if (load) walk_examples(&run.file);
    safetensors_free(&run.file);
}

static void fuzz_safetensors(const uint8_t *data, size_t size) { use_file(data, size, 0); }

static void fuzz_header(const uint8_t *data, size_t size) {
    if (size < 2) return;
    uint64_t length = (uint64_t)data[0] + 256u * data[1];
    if (length > size - 2) length = size - 2;
    unsigned char *bytes = (unsigned char *)malloc(size + 6);
    memcpy(bytes, &length, 8);
    memcpy(bytes + 8, data + 2, size - 2);
    use_file(bytes, size + 6, 1);
    free(bytes);
}

static void fuzz_metadata(const uint8_t *data, size_t size) {
    char *text = (char *)copy_of(data, size, 1), line[ERROR_SIZE];
    Meta meta[64];
    int n = 0;
    for (char *row = strtok(text, "\n"); row && n < 64; row = strtok(NULL, "\n")) {
        char *equals = strchr(row, '=');
        Meta pair = {row, equals ? equals + 1 : (char *)""};
        if (equals) *equals = 0;
        meta[n++] = pair;
    }
    Run run;
    FileTensor tensors[256];
    static const unsigned char zeros[4 * MAX_NUMBERS];
    size_t out_size = 0, n_tensors = 0;
    Config c;
    for (int resume = 0; resume < 2; resume++) {
        start_run(&run); // the settings alone, to know the shapes
        run.file.meta = (Meta *)copy_of(meta, sizeof(Meta) * (size_t)n, 0);
        run.file.n_meta = n;
        if (sort_names(run.file.meta, n, sizeof(Meta))) { free(run.file.meta); break; }
        if (settings_from_file(&run, "fuzz", resume, error)) require_line();
        else if (run.config.n_layers <= 3) {
            Weights weights;
            LayerWeights layers[3];
            c = run.config;
            weights.layers = layers;
            carve_weights(&weights, &run.table, NULL, &c);
            n_tensors = 0;
            for (int i = 0; run.table.count >= 0 && run.table.count < MAX_NUMBERS / 4 && i < run.table.n * (resume ? 3 : 1); i++) {
                const Tensor *row = &run.table.rows[i % run.table.n];
                static const char *prefixes[] = {"", "exp_avg.", "exp_avg_sq."};
                static char names[256][96];
                FileTensor t = {names[i], "F32", row->n_dims, {0}, row->count, (size_t)row->count * 4, zeros};
                snprintf(names[i], 96, "%s%s", prefixes[i / run.table.n], row->name);
                memcpy(t.shape, row->shape, sizeof(row->shape));
                tensors[n_tensors++] = t;
            }
            free(run.table.rows);
            if (n_tensors) {
                unsigned char *out = write_in_memory(&out_size, tensors, (int)n_tensors, meta, n);
                Safetensors file;
                if (!safetensors_parse(&file, out, out_size, "fuzz", line)) {
                    Run again;
                    start_run(&again);
                    again.file = file;
                    REQUIRE(!settings_from_file(&again, "fuzz", resume, error) && again.config.d_model == c.d_model);
                    walk_model(&again, resume);
                    safetensors_free(&file);
                }
            }
        }
        free(run.file.meta);
    }
    free(text);
}

// The first byte: which of --data and --val are example sets, whether there is --val, and --seq; the second: where one
// ends and the other begins, or --vocab. A shard's header is three numbers that stand at the start, so that they are near.
static void fuzz_data(const uint8_t *data, size_t size) {
    if (size < 2) return;
    int flags = data[0], has_val = flags & 1, sets = flags >> 1 & 1;
    size_t cut = has_val ? (size - 2) * data[1] / 256 : size - 2;
    const uint8_t *part = data + 2;
    char *bytes = NULL;
    for (int i = 0; i < 1 + has_val; i++) {
        size_t n = i ? size - 2 - cut : cut;
        int32_t magic = 0;
        if (n >= 12) memcpy(&magic, part, 4);
        if (magic == GPT2_SHARD || magic == LLAMA3_SHARD) {
            bytes = (char *)calloc(1, n + 1012);
            memcpy(bytes, part, 12);
            memcpy(bytes + 1024, part + 12, n - 12);
            put_file(i, bytes, n + 1012);
            free(bytes);
        } else put_file(i, part, n);
        part += n;
    }
    Run run;
    start_run(&run);
    Options *o = &run.settings.values;
    o->data = path[0][sets];
    o->val = has_val ? path[1][sets] : NULL;
    o->seq = flags >> 4 ? flags >> 4 : 1;
    o->eval = flags >> 2 & 1;
    if (!has_val) o->vocab = data[1]; // 0: not set
    if (flags & 8) run.settings.given[find_option("seq", 3) - option_table] = 1;
    if (open_data(&run, error)) require_line();
    else if (o->seq < MAX_NUMBERS) {
        int T = (int)o->seq, examples = run.train.kind == DATA_EXAMPLES, *inputs = (int *)malloc((size_t)T * sizeof(int)), *targets = (int *)malloc((size_t)T * sizeof(int));
        run.order = (int32_t *)malloc((size_t)(examples ? run.train_end : 1) * sizeof(int32_t));
        REQUIRE(o->vocab > 0 && run.train.max_id < o->vocab && run.val_set->max_id < o->vocab);
        for (int64_t i = 0; i < 20 && !o->eval; i++) {
            copy_sequence(inputs, targets, &run.train, sequence_place(&run, i), T);
            for (int t = 0; t < T; t++) REQUIRE(inputs[t] >= 0 && inputs[t] < o->vocab && targets[t] >= -1 && targets[t] < o->vocab);
        }
        int64_t length = run.val_end - run.val_begin, windows = examples ? length : (length - 1) / T;
        for (int64_t w = 0; w < windows; w += windows > 40 ? windows - 1 : 1) { // as evaluate does
            copy_sequence(inputs, targets, run.val_set, run.val_begin + w * (examples ? 1 : T), T);
            for (int t = 0; t < T; t++) REQUIRE(inputs[t] >= 0 && inputs[t] < o->vocab && targets[t] >= -1 && targets[t] < o->vocab);
        }
        free(inputs);
        free(targets);
        free(run.order);
    }
    dataset_free(&run.train);
    dataset_free(&run.val);
    words_free(&run.words);
}

static void fuzz_options(const uint8_t *data, size_t size) {
    char *text = (char *)copy_of(data, size, 1), *argv[64] = {(char *)"fuzz"}, shown[96], again[96];
    int argc = 1;
    for (char *row = text; row && argc < 64; argc++) {
        argv[argc] = row;
        row = strchr(row, '\n');
        if (row) *row++ = 0;
    }
    Run run;
    memset(&run, 0, sizeof(run));
    run.backend = &backend;
    int result = parse_options(&run.settings, argc, argv, error);
    if (result < 0) require_line();
    if (!result) {
        Options *o = &run.settings.values;
        for (int i = 0; i < N_OPTIONS; i++) { // as a checkpoint stores them
            Options other = *o;
            const char *value = option_text(shown, o, &option_table[i]);
            if (!value || (!option_table[i].fallback && !strcmp(value, "-1"))) continue; // not set
            REQUIRE(!set_option(&other, &option_table[i], value, error));
            REQUIRE(!strcmp(value, option_text(again, &other, &option_table[i])));
        }
        if (!o->kv_heads) o->kv_heads = o->heads;
        if (!o->head_dim && find_mixer(o->mixer) == MAMBA2) o->head_dim = 2 * o->dim < 64 ? 2 * o->dim : 64;
        if (!o->state_dim && find_mixer(o->mixer) == MAMBA2) o->state_dim = 64;
        if (o->min_lr < 0) o->min_lr = o->lr / 10;
        if (!o->decay_steps) o->decay_steps = o->steps > 0 ? o->steps : 1;
        if (o->warmup < 0) o->warmup = 100;
        if (!o->vocab) o->vocab = 50257;
        for (int64_t step = o->steps; step > 0; step = step > 20 ? step / 7 : step - 1) {
            double rate = learning_rate(o, step - 1);
            REQUIRE(rate >= 0 && rate <= 1e3 * (1 + 1e-12));
        }
        if (config_of(&run.config, o, error)) require_line();
        else walk_model(&run, 0);
    }
    free(text);
}

static void fuzz_prompt(const uint8_t *data, size_t size) {
    if (size < 8) return;
    Run run;
    start_run(&run);
    int V = data[0] % 64 + 1, n_bytes = data[1] % 2 ? V : 0, ids[4096];
    int64_t top_k = data[2];
    double temperature = data[3] / 16.0, top_p = (data[4] + 1) / 256.0;
    uint64_t random = data[5];
    size_t at = 6, n_logits = (size - at) / sizeof(real) < (size_t)V ? (size - at) / sizeof(real) : (size_t)V;
    real *logits = (real *)calloc((size_t)V, sizeof(real));
    Candidate *candidates = (Candidate *)malloc((size_t)V * sizeof(Candidate));
    memcpy(logits, data + at, n_logits * sizeof(real));
    for (int i = 0; i < 4; i++) {
        int id = sample_token(logits, candidates, V, temperature, top_k, top_p, &random), finite = 1;
        for (int v = 0; v < V; v++) finite &= isfinite(logits[v]) != 0;
        REQUIRE(finite ? id >= 0 && id < V : id == -1);
    }
    free(candidates);
    free(logits);
    run.config.vocab_size = V;
    run.vocab_bytes = n_bytes;
    for (int i = 0; i < n_bytes; i++) run.vocab[i] = (unsigned char)(data[1] + i * 3);
    at += n_logits * sizeof(real);
    if (size - at >= 4096) return;
    char *prompt = (char *)copy_of(data + at, size - at, 1);
    int n = encode_prompt(&run, prompt, ids, error);
    if (n < 0) require_line();
    for (int i = 0; i < n; i++) REQUIRE(ids[i] >= 0 && ids[i] < V);
    free(prompt);
}

static void fuzz_log(const uint8_t *data, size_t size) {
    if (!size) return;
    Run run;
    Log log;
    struct stat info;
    start_run(&run);
    Options *o = &run.settings.values;
    put_file(0, data + 1, size - 1);
    o->log = path[0][0];
    o->step = data[0] >> 2;
    o->overwrite = data[0] >> 1 & 1;
    o->resume = o->step ? "fuzz" : NULL;
    int opened = !log_open(&log, o, error);
    if (!opened) require_line();
    // what is refused is not touched; what is taken is cut once there is a line to write, behind a whole line
    long kept = opened ? log.cut_at : (long)size - 1;
    Step step = {o->step + 1, 1, 1, 1, 1, 1};
    REQUIRE(kept >= 0 && (size_t)kept < size && (!opened || !kept || data[kept] == '\n') && (opened || !o->overwrite));
    if (opened) REQUIRE(!log_line(&log, &step, NULL, error));
    log_close(&log);
    REQUIRE(!stat(path[0][0], &info) && (opened ? info.st_size > kept : info.st_size == kept));
    unsigned char *now = (unsigned char *)malloc(size);
    REQUIRE(pread(memory[0], now, (size_t)kept, 0) == kept && !memcmp(now, data + 1, (size_t)kept));
    free(now);
}

// The first byte: whether there are merges, and whether the tokens begin with all 256 bytes, as merges need; then
// the number of further tokens, their lengths, the number of merges and their ids (two bytes each). The rest are
// the tokens' bytes, and once more the text.
static void fuzz_words(const uint8_t *data, size_t size) {
    if (size < 3) return;
    static int64_t offsets[256 + 256 + 1];
    static int32_t pairs[2 * 256];
    static unsigned char bytes[256 + 65536];
    int begin = data[0] & 2 ? 256 : 0, more = data[1], n_pairs = data[2], V = begin + more;
    const uint8_t *at = data + 3, *end = data + size;
    if (end - at < more + 4 * n_pairs) return;
    for (int i = 0; i < begin; i++) { bytes[i] = (unsigned char)i; offsets[i] = i; }
    offsets[begin] = begin;
    for (int i = 0; i < more; i++) offsets[begin + i + 1] = offsets[begin + i] + (int8_t)*at++;
    for (int i = 0; i < 2 * n_pairs; i++, at += 2) pairs[i] = (int16_t)(at[0] + 256 * at[1]);
    int64_t rest = end - at, total = begin + (rest < 4096 ? rest : 4096);
    memcpy(bytes + begin, at, (size_t)(total - begin));
    if (data[0] & 4) offsets[V] = total;
    if (total > offsets[V] && offsets[V] >= 0) total = offsets[V];
    char names[3][24] = {"tokenizer.merges", "tokenizer.offsets", "tokenizer.tokens"};
    FileTensor tensors[3] = {{names[0], "I32", 2, {n_pairs, 2}, 2 * n_pairs, 8 * (size_t)n_pairs, NULL},
                             {names[1], "I64", 1, {V + 1}, V + 1, 8 * (size_t)(V + 1), NULL},
                             {names[2], "U8", 1, {total}, total, (size_t)total, NULL}};
    const void *from[3] = {pairs, offsets, bytes};
    for (int i = 0; i < 3; i++) tensors[i].data = (const unsigned char *)copy_of(from[i], tensors[i].size, 0);
    Safetensors file;
    Words words;
    memset(&file, 0, sizeof(file));
    int skip = data[0] & 1 ? 0 : 1;
    file.tensors = tensors + skip;
    file.n_tensors = 3 - skip;
    if (words_read(&words, &file, "fuzz", error)) { require_line(); REQUIRE(!words.bytes && !words.merges); }
    else if (words.pairs) {
        int *ids = (int *)malloc((size_t)rest * sizeof(int) + 1);
        int n = encode_text(ids, &words, at, (size_t)rest, error);
        const uint8_t *text = at;
        REQUIRE(n >= 0 && n <= rest);
        for (int i = 0; i < n; i++) {
            REQUIRE(ids[i] >= 0 && ids[i] < V && word_length(&words, ids[i]) <= end - text);
            REQUIRE(!memcmp(text, word_of(&words, ids[i]), (size_t)word_length(&words, ids[i])));
            text += word_length(&words, ids[i]);
        }
        REQUIRE(text == end);
        free(ids);
    } else for (int id = 0; id < V; id++) {
        int64_t length = word_length(&words, id);
        REQUIRE(length >= 0 && words.offsets[id] + length <= total);
    }
    words_free(&words);
    for (int i = 0; i < 3; i++) free((void *)tensors[i].data);
}

typedef struct { const char *name; void (*run)(const uint8_t *data, size_t size); } Target;
static const Target targets[] = {{"safetensors", fuzz_safetensors}, {"header", fuzz_header}, {"metadata", fuzz_metadata}, {"data", fuzz_data},
                                 {"options", fuzz_options}, {"prompt", fuzz_prompt}, {"log", fuzz_log},
                                 {"words", fuzz_words}};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const Target *target;
    if (!target) {
        const char *name = getenv("TARGET");
        for (size_t i = 0; i < sizeof(targets) / sizeof(targets[0]); i++) if (name && !strcmp(targets[i].name, name)) target = &targets[i];
        if (!target) { fprintf(stderr, "TARGET=safetensors|header|metadata|data|options|prompt|log|words\n"); exit(2); }
        backend = cpu_backend;
        backend.read = read_numbers;
        backend.write = write_numbers;
        atexit(remove_links);
    }
    target->run(data, size);
    return 0;
}

#ifdef REPLAY
int main(int argc, char **argv) {
    int verdict = argc > 1 && !strcmp(argv[1], "--verdict"); // only says what the safetensors reader finds, a line a file
    for (int i = 1 + verdict; i < argc; i++) {
        unsigned char *bytes;
        size_t size;
        if (file_read(argv[i], &bytes, &size, error)) { fprintf(stderr, "%s\n", error); return 1; }
        unsigned char *exact = (unsigned char *)copy_of(bytes, size, 0); // without the zero that file_read adds
        free(bytes);
        if (verdict) { // the bytes are the parser's from here on
            Safetensors file;
            puts(safetensors_parse(&file, exact, size, NULL, error) ? error : "valid");
            safetensors_free(&file);
        } else {
            LLVMFuzzerTestOneInput(exact, size);
            free(exact);
        }
    }
    if (!verdict) printf("%d inputs\n", argc - 1);
    return 0;
}
#endif
