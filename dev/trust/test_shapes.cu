/*
Random shapes through the CUDA twin: every mixer and precision, sizes from 1 up, log-uniform, partial last batches,
and the shapes that once went wrong.

    ./test_shapes SEED FIRST COUNT            shapes FIRST .. FIRST+COUNT-1 of the seed's: [1 0 300]
    ./test_shapes SEED FIRST COUNT large      long ones: up to 65,536 tokens, and batches with B·T·T past 2^31
    ./test_shapes SEED FIRST COUNT small      short and narrow ones, for a GPU that is emulated

A shape is a model for B sequences of T tokens with random weights. Its losses, token by token, and gradients are
held against those of a plain model of the same precision, whose error is known from a plain one in float32; against
the CPU program's where that is quick, else against those of a model made for a smaller batch, which goes another
way; and always against the same model's own on parts of the batch: evaluation's last batch is one. Models for
generation read a text in pieces and at once. Every buffer of the device's memory has a guard band. The first
shapes are fixed; the others are dealt round the kinds of `draw`, so that each branch of what
chooses panels, tiles, the march, what is kept, is met: the standard range counts them and fails if one was not. A
line for each shape that fails, with the command that repeats it.
*/
#define SESSA_NO_MAIN
#define GUARD_BANDS
#include "../../train_sessa.cu"

typedef struct {
    Config c;
    int B, T, left; // left: sequences of a partial batch
    Precision precision;
    Mode mode;      // TRAIN, or GENERATE
    int refused;    // model_create says why it cannot be made
    int apart;      // without clusters, as on a part of a GPU
} Case;

static uint64_t chance;
static int between(int low, int high) { return low + (int)(random_u64(&chance) % (uint64_t)(high - low + 1)); }
static int log_between(int low, int high) { // log-uniform
    int n = (int)floor(low * pow((high + 1.0) / low, random_uniform(&chance)));
    return n < low ? low : n > high ? high : n;
}
static int at_most(int n, int64_t most) { return n < most ? n : most < 1 ? 1 : (int)most; }

// ----------------------------------------------------------------------------
// the branches, and how often each was met

enum { MOST_WAYS = 64 };
static struct { const char *name; int times; } met[MOST_WAYS];
static int n_met;
static void meet(const char *name, int here) {
    int i = 0;
    while (i < n_met && strcmp(met[i].name, name)) i++;
    if (i == n_met) met[n_met++] = {name, 0};
    met[i].times += here != 0;
}

// All branches are named each time, so that one that is never met is there with 0.
template <typename X> static void meet_ways(const ModelGPU<X> *m, const Case *s) {
    const Config *c = &s->c;
    int D = c->d_model, d = D / c->n_heads, B = s->B, T = s->T, sessa = c->mixer == SESSA,
        direct = c->mixer != MAMBA2, training = s->mode == TRAIN, bf16_ = sizeof(X) == 2,
        wide_row = c->mixer == MAMBA2 ? 2 * D : D;
    const Panels *p = &m->ways.feedback[1];
    const AttentionWay *way = &m->ways.attention;
    int several = p->R < T, fed = sessa && training, tiles = fed && p->tiles, plain = fed && !p->tiles,
        panels = direct && !way->tiles, ring = in_ring(T, c->n_heads, c->n_kv_heads),
        read = direct && training && way->tiles;
    int64_t blocks = (p->rows + 127) / 128 * ((D + 127) / 128) * B;
    Panels alone = feedback_panels<X>(s->left, T, D, 0, p->tiles, p->kept);
    int other_way = s->left < B && (alone.march != p->march || alone.R != p->R),
        fewer_than_heads = B >= c->n_heads && s->left < c->n_heads;
    if (gpu.tiles) {
        meet("feedback: tiles, blocks of 128", tiles && !p->march && p->P == 128);
        meet("feedback: tiles, blocks of 256", tiles && !p->march && p->P == 256);
        meet("feedback: tiles, blocks of 512", tiles && !p->march && p->P == 512);
        // on Hopper where there is no room for clusters
        meet("feedback: tiles, blocks of 1024", tiles && !p->march && p->P == 1024);
        meet("feedback: weights kept", tiles && p->kept);
        meet("feedback: weights computed again", tiles && !p->kept);
        meet("feedback: dq' of rows before a panel apart", tiles && p->apart);
        meet("feedback: product tiles of 128 columns", tiles && blocks > 80);
        meet("feedback: product tiles of 64 columns", tiles && blocks <= 80);
        meet("attention: tiles of 128 columns", read && d > 64);
    }
    if (gpu.tiles && !gpu.hopper) {
        meet("feedback: tiles, blocks in one panel", tiles && !several);
        meet("feedback: tiles, blocks in several panels", tiles && several);
        meet("attention: tiles of 64 columns", read && d <= 64);
    }
    if (gpu.hopper) {
        meet("feedback: march of one block, one panel", tiles && p->march == 1 && !several);
        meet("feedback: march of one block, several panels", tiles && p->march == 1 && several);
        meet("feedback: march of clusters, one panel", tiles && p->march == CLUSTER && !several);
        meet("feedback: march of clusters, several panels", tiles && p->march == CLUSTER && several);
        meet("feedback: logits in tiles of 256 columns", tiles && p->wide_logits);
        meet("feedback: dq', dk' in tiles of 192 columns", tiles && p->wide_sums == 192);
        meet("feedback: dq', dk' in tiles of 256 columns", tiles && p->wide_sums == 256);
        meet("attention: ring", read && d <= 64 && ring);
        meet("attention: tiles of 64 columns, two kernels", read && d <= 64 && !ring && gpu.clusters);
        meet("attention: two kernels (no room for clusters)", read && d <= 64 && !gpu.clusters && T <= 1024);
    }
    meet("feedback: no tiles, blocks of 128", plain && p->P == 128);
    meet("feedback: no tiles, blocks of 256", plain && p->P == 256);
    meet("feedback: no tiles, blocks of 512", plain && p->P == 512);
    meet("feedback: no tiles, blocks of 1024", plain && p->P == 1024);
    meet("feedback: no tiles, several panels", plain && several);
    meet("feedback: no tiles, several panels of short sequences", plain && several && T <= REACH);
    meet("feedback: bf16 without tiles", plain && bf16_);
    meet("feedback: a part of the batch would choose otherwise", fed && other_way);
    meet("attention: panels by head", panels && way->by_head && way->P >= T);
    meet("attention: panels by sequence", panels && !way->by_head);
    meet("attention: several panels", panels && way->P < T);
    meet("attention: panels by head, fewer sequences left than heads", panels && way->by_head && fewer_than_heads);
    meet("attention: panels in bf16", panels && bf16_);
    int rows_ = direct ? 0 : scan_rows(c->state_dim, c->head_dim, sizeof(X)),
        scan_eights = c->state_dim % 8 == 0 && c->head_dim % 8 == 0;
    meet("scan: chunks of 64", rows_ == 64);
    meet("scan: chunks of 32", rows_ == 32);
    meet("scan: bf16 in eights", rows_ && bf16_ && scan_eights);
    meet("scan: bf16 by ones", rows_ && bf16_ && !scan_eights);
    meet("scan: float32 in eights", rows_ && !bf16_ && scan_eights);
    meet("scan: float32 by ones", rows_ && !bf16_ && !scan_eights);
    meet("rows: eights, one piece", wide_row % 8 == 0 && wide_row <= 8 * ROW_BLOCK);
    meet("rows: eights, four pieces", wide_row % 8 == 0 && wide_row > 8 * ROW_BLOCK && wide_row <= MOST_IN_EIGHTS);
    meet("rows: by ones, one piece", wide_row % 8 != 0 && wide_row <= ROW_BLOCK);
    meet("rows: by ones, several pieces", wide_row % 8 != 0 && wide_row > ROW_BLOCK);
    meet("embedding's gradient: more segments than tokens", training && B * T > 64 * c->vocab_size);
    int generating = s->mode == GENERATE, eights = D % 8 == 0 && d % 8 == 0;
    meet("generation: decoder in eights, bf16", generating && m->decodes && eights && bf16_);
    meet("generation: decoder by ones, bf16", generating && m->decodes && !eights && bf16_);
    meet("generation: decoder, float32", generating && m->decodes && !bf16_);
    int parts = m->decodes ? decode_shape(c, 0, 0).head_parts : 0;
    meet("generation: decoder with more heads than parts", generating && parts == 1);
    meet("generation: no decoder, mamba2", generating && !m->decodes && !direct);
    meet("generation: no decoder, too wide", generating && !m->decodes && direct);
    static const char *const names[N_MIXERS][3] = {{"sessa, fp32", "sessa, tf32", "sessa, bf16"},
                                                   {"attention, fp32", "attention, tf32", "attention, bf16"},
                                                   {"mamba2, fp32", "mamba2, tf32", "mamba2, bf16"}};
    for (int mixer = 0; mixer < N_MIXERS; mixer++)
        for (int precision = FP32; precision <= BF16; precision++)
            meet(names[mixer][precision], c->mixer == mixer && s->precision == precision);
}

// ----------------------------------------------------------------------------
// one shape

static int failures;            // of this shape
// gradients past what is a bound for most: held to four times the plain way's own error
static int past_bounds;
static double nearest[3];       // the largest share of its bound that an error reached
static double furthest[3];      // the largest error of a fast way, in errors of the plain one
static char command[80], shape_text[160];

__attribute__((format(printf, 1, 2)))
static void fails(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    printf("FAIL  %s: ", shape_text);
    vprintf(format, arguments);
    printf("   %s\n", command);
    fflush(stdout);
    va_end(arguments);
    failures++;
}
static void hold(double error, double bound, const char *what, int sequences) {
    double share = error / bound;
    if (share > nearest[gpu.precision]) nearest[gpu.precision] = share;
    if (!(share <= 1)) fails("%s (%d sequences): error %.2e, bound %.1e", what, sequences, error, bound);
}
static double distance(const float *x, const float *ref, int64_t n,
                       double floor) { // ‖x - ref‖ / max(‖ref‖, floor); NaN: infinite
    double off = 0, all = 0;
    #pragma omp parallel for reduction(+ : off, all) if (n > 100000)
    for (int64_t i = 0; i < n; i++) {
        off += ((double)x[i] - (double)ref[i]) * ((double)x[i] - (double)ref[i]);
        all += (double)ref[i] * (double)ref[i];
    }
    double length = sqrt(all) > floor ? sqrt(all) : floor;
    return isfinite(off) && isfinite(all) ? (length > 0 ? sqrt(off) / length : off > 0 ? INFINITY : 0) : INFINITY;
}
// Whole gradients, then each tensor's against its own length or a fiftieth of the whole.
static double gradient_distance(const float *x, const float *ref, const Table *t) {
    double worst = distance(x, ref, t->count, 0), all = 0;
    for (int64_t i = 0; i < t->count; i++) all += (double)ref[i] * (double)ref[i];
    for (int r = 0; r < t->n; r++) {
        double one = distance(x + t->rows[r].offset, ref + t->rows[r].offset, t->rows[r].count, sqrt(all) / 50);
        if (!(one <= worst)) worst = one;
    }
    return worst;
}

// Weights that let each layer matter: matrices keep a vector's length, about.
static void fill_weights(float *params, const Table *table, int D, uint64_t seed) {
    for (int r = 0; r < table->n; r++) {
        const Tensor *t = &table->rows[r];
        double scale = t->init == INIT_NORMAL    ? 2.6 / sqrt((double)D)
                       : t->init == INIT_UNIFORM ? 1.7 * t->init_value
                                                 : 0.1,
               middle = t->init == INIT_CONSTANT ? t->init_value : 0;
        uint64_t state = seed + (uint64_t)r;
        if (t->init > INIT_NORMAL) {
            for (int64_t i = 0; i < t->count; i++)
                params[t->offset + i] = (float)(t->init_value * initial_value(t->init, &state));
            continue;
        }
        #pragma omp parallel for if (t->count > 100000)
        for (int64_t i = 0; i < t->count; i++) {
            uint64_t bits = splitmix64(splitmix64(seed + (uint64_t)r) ^ (uint64_t)i);
            params[t->offset + i] = (float)(middle + scale * ((double)(bits >> 11) * 0x1p-52 - 1));
        }
    }
}

template <typename X> static float *losses_of(Model *m, int N) {
    float *losses = (float *)malloc(sizeof(float) * (size_t)N);
    backend_gpu()->loss(m);
    CUDA(cudaStreamSynchronize(gpu.stream));
    CUDA(cudaMemcpy(losses, ((ModelGPU<X> *)m)->acts.losses, sizeof(float) * (size_t)N, cudaMemcpyDeviceToHost));
    return losses;
}

// The way through a layer has 8 roundings, and so has the way back. float32 rounds at 2^-24, and more often than is
// counted here. LayerNorm of a few numbers leaves little more than signs: what comes back through it nearly cancels.
static double gradient_bound(const Case *s) {
    double rounding = s->precision == FP32 ? 0x1p-16 : s->precision == TF32 ? 0x1p-11 : 0x1p-8;
    return rounding * (8 * s->c.n_layers + 2) * (s->c.d_model < 8 ? 4 : 1);
}
static double loss_bound(const Case *s) { return gradient_bound(s) / 2; }
static double operations(const Case *s) { // of the CPU's forward and backward pass
    double N = (double)s->B * s->T, D = s->c.d_model,
           width = proj_width(&s->c) + 4 * D + (s->c.mixer == MAMBA2 ? 2 * D * s->c.state_dim / 4 : 0);
    return 6 * N * (D * width * s->c.n_layers + D * s->c.vocab_size) +
           (s->c.mixer == MAMBA2 ? 0 : s->c.n_layers * N * s->T * D * 20);
}

// The model of this shape for batches of B, with the weights that all models of the shape get.
static Model *make(const Backend *backend, const Case *s, int B, Mode mode) {
    char error[ERROR_SIZE] = "";
    Model *m = backend->create(&s->c, B, s->T, mode, error);
    if (!m) { fails("%s", error); return NULL; }
    fill_weights(backend->read(m, PARAMS), &m->table, s->c.d_model, 77);
    backend->write(m, PARAMS);
    return m;
}

// What a plain model of this shape makes of the batch, in this precision.
template <typename X>
static int answer(const Case *s, const int *ids, const int *targets, float *losses, float *grads) {
    const Backend *backend = backend_gpu();
    int N = s->B * s->T;
    Model *m = make(backend, s, s->B, TRAIN);
    if (!m) return 0;
    backend->forward(m, ids, targets, s->B, s->T, no_dropout);
    float *own = losses_of<X>(m, N);
    memcpy(losses, own, sizeof(float) * (size_t)N);
    free(own);
    backend->backward(m, 1.0 / N, 1);
    memcpy(grads, backend->read(m, GRADS), sizeof(float) * (size_t)m->table.count);
    backend->destroy(m);
    return 1;
}
static int plain_answer(const Case *s, Precision precision, const int *ids, const int *targets, float *losses,
                        float *grads) {
    gpu.precision = precision;
    plain = 1;
    int there = (precision == BF16 ? answer<bf16> : answer<float>)(s, ids, targets, losses, grads);
    plain = 0;
    gpu.precision = s->precision;
    return there;
}

// The losses and gradients of the fast ways against the plain ones', both measured in the plain ones' own error:
// how far they are from plain float32. Returns how far the gradients are from the plain ones'; *of_rounding is
// that error.
static double check_plain(double *of_rounding, const Case *s, const int *ids, const int *targets,
                          const float *losses, const float *grads, const Table *table) {
    int N = s->B * s->T;
    *of_rounding = 0;
    size_t rows = sizeof(float) * (size_t)N, numbers = sizeof(float) * (size_t)table->count;
    float *own[2] = {(float *)malloc(rows), (float *)malloc(numbers)};
    float *exact[2] = {(float *)malloc(rows), (float *)malloc(numbers)};
    double apart = 0;
    if (plain_answer(s, s->precision, ids, targets, own[0], own[1])) {
        hold(distance(losses, own[0], N, 0), loss_bound(s), "losses, plain", s->B);
        apart = gradient_distance(grads, own[1], table);
        meet("held against the plain ways", 1);
        if (s->precision != FP32 && plain_answer(s, FP32, ids, targets, exact[0], exact[1])) {
            double of_fast = gradient_distance(grads, exact[1], table);
            double of_plain = *of_rounding = gradient_distance(own[1], exact[1], table);
            double ratio = of_fast / fmax(of_plain, gradient_bound(s) / 8);
            furthest[s->precision] = fmax(furthest[s->precision], ratio);
            if (!(ratio <= 4))
                fails("gradients: %.2e from float32, the plain way's %.2e", of_fast, of_plain);
        }
    }
    for (int i = 0; i < 2; i++) {
        free(own[i]);
        free(exact[i]);
    }
    return apart;
}

template <typename X> static void check_training(const Case *s, const int *ids, const int *targets) {
    const Backend *backend = backend_gpu();
    int B = s->B, T = s->T, N = B * T, lefts[] = {s->left, B - 1, 1};
    double dloss = 1.0 / N;
    Model *m = make(backend, s, B, TRAIN);
    if (!m) return;
    meet_ways((ModelGPU<X> *)m, s);
    backend->forward(m, ids, targets, B, T, no_dropout);
    float *losses = losses_of<X>(m, N);
    for (int i = 0; i < 3; i++) { // parts of the batch, as evaluation's last: at once, recorded, and again
        int left = lefts[i], repeated = 0;
        for (int j = 0; j < i; j++) repeated |= lefts[j] == left;
        if (left < 1 || left >= B || repeated) continue;
        for (int run = 0; run < (i ? 1 : 3); run++) {
            backend->forward(m, ids, targets, left, T, no_dropout);
            float *part = losses_of<X>(m, left * T);
            hold(distance(part, losses, (int64_t)left * T, 0), loss_bound(s), "losses, part of the batch", left);
            free(part);
        }
    }
    // gradients: of the whole batch, then of two parts of it
    const Table *table = &m->table;
    AdamW none = {0, 0.9, 0.99, 1e-8, 0.1};
    backend->forward(m, ids, targets, B, T, no_dropout);
    backend->backward(m, dloss, 1);
    float *grads = (float *)malloc(sizeof(float) * (size_t)table->count);
    memcpy(grads, backend->read(m, GRADS), sizeof(float) * (size_t)table->count);
    double in_parts = 0, against_cpu = 0, bound = gradient_bound(s);
    if (B > 1) {
        int left = s->left < B ? s->left : B - 1;
        backend->update(m, none, 0, 1);
        backend->forward(m, ids, targets, left, T, no_dropout);
        backend->backward(m, dloss, 1);
        backend->forward(m, ids + left * T, targets + left * T, B - left, T, no_dropout);
        backend->backward(m, dloss, 1);
        in_parts = gradient_distance(backend->read(m, GRADS), grads, table);
    }
    if (operations(s) < 2e9) {
        Model *cpu = make(&cpu_backend, s, B, TRAIN);
        cpu_backend.forward(cpu, ids, targets, B, T, no_dropout);
        hold(distance(losses, cpu->acts.losses, N, 0), loss_bound(s), "losses, CPU", B);
        cpu_backend.backward(cpu, dloss, 1);
        against_cpu = gradient_distance(grads, cpu->grads, table);
        meet("held against the CPU", 1);
        model_free(cpu);
    } else if (B > 1) {
        int few = at_most(B / 2, 1 + 4000 / T);
        Model *other = make(backend, s, few, EVALUATE);
        if (other) {
            backend->forward(other, ids, targets, few, T, no_dropout);
            float *part = losses_of<X>(other, few * T);
            hold(distance(part, losses, (int64_t)few * T, 0), loss_bound(s), "losses, another model", few);
            free(part);
            backend->destroy(other);
        }
        meet("held against a model made for other batches", 1);
    }
    double of_rounding, against_plain = check_plain(&of_rounding, s, ids, targets, losses, grads, table);
    if (in_parts > bound || against_cpu > bound || against_plain > bound) past_bounds++;
    bound = fmax(bound, 4 * of_rounding);
    hold(in_parts, bound, "gradients, two parts of the batch", s->left);
    hold(against_cpu, bound, "gradients, CPU", B);
    hold(against_plain, bound, "gradients, plain", B);
    free(losses);
    free(grads);
    backend->destroy(m);
}

// The logits of what a model reads behind `first` tokens
static void extend(const Backend *backend, Model *m, const int *ids, int n, int first, float *logits) {
    memcpy(logits, backend->extend(m, 0, ids, n, first), sizeof(float) * (size_t)m->config.vocab_size);
}
// The last logits of the text by a plain model of this precision, its prompt at once and then pieces of 7.
static int plain_text(const Case *s, Precision precision, const int *ids, int prompt, float *logits) {
    gpu.precision = precision;
    plain = 1;
    const Backend *backend = backend_gpu();
    Model *m = make(backend, s, 1, GENERATE);
    if (m) {
        extend(backend, m, ids, prompt, 0, logits);
        for (int at = prompt; at < s->T; at += 7) extend(backend, m, ids + at, at_most(7, s->T - at), at, logits);
        backend->destroy(m);
    }
    plain = 0;
    gpu.precision = s->precision;
    return m != NULL;
}
// Holds the fast ways' logits to them; returns how far those are from float32's.
static double check_plain_text(const Case *s, const int *ids, int prompt, const float *logits) {
    int V = s->c.vocab_size;
    float *own = (float *)malloc(sizeof(float) * (size_t)V), *exact = (float *)malloc(sizeof(float) * (size_t)V);
    double of_rounding = 0;
    int there = plain_text(s, s->precision, ids, prompt, own) && plain_text(s, FP32, ids, prompt, exact);
    if (there) {
        of_rounding = distance(own, exact, V, 0);
        double bound = fmax(gradient_bound(s), 4 * of_rounding);
        hold(distance(logits, own, V, 0), bound, "logits, plain", 1);
    }
    free(own);
    free(exact);
    return of_rounding;
}

// A text in pieces, the last tokens one by one, and at once.
template <typename X> static void check_generation(const Case *s, const int *ids) {
    const Backend *backend = backend_gpu();
    int T = s->T, V = s->c.vocab_size, singles = T > 4 ? 4 : T - 1,
        prompt = at_most(log_between(1, T), T - singles);
    if (prompt >= 8 && between(0, 1)) prompt -= prompt % 8;
    int at = prompt;
    Model *m = make(backend, s, 1, GENERATE);
    if (!m) return;
    meet_ways((ModelGPU<X> *)m, s);
    float *pieces = (float *)malloc(sizeof(float) * (size_t)V), *whole = (float *)malloc(sizeof(float) * (size_t)V);
    extend(backend, m, ids, prompt, 0, pieces);
    int piece = at < T - singles, tiles = s->c.mixer == SESSA && ((ModelGPU<X> *)m)->ways.feedback[1].tiles;
    if (piece) extend(backend, m, ids + at, T - singles - at, at, pieces);
    if (gpu.tiles) meet("generation: a piece in tiles, behind others", piece && tiles && at % 8 == 0);
    if (gpu.tiles) meet("generation: a piece that begins where tiles cannot", piece && tiles && at % 8 != 0);
    for (at = T - singles; at < T; at++) extend(backend, m, ids + at, 1, at, pieces);
    extend(backend, m, ids, T, 0, whole);
    double apart = distance(pieces, whole, V, 0);
    double bound = fmax(gradient_bound(s), 4 * check_plain_text(s, ids, prompt, whole));
    hold(apart, bound, "logits, text in pieces", 1);
    if (operations(s) < 2e9) {
        Model *cpu = make(&cpu_backend, s, 1, GENERATE);
        extend(&cpu_backend, cpu, ids, T, 0, pieces);
        hold(distance(whole, pieces, V, 0), bound, "logits, CPU", 1);
        model_free(cpu);
    }
    free(pieces);
    free(whole);
    backend->destroy(m);
}

// Token i of text `number`, of which ids give T
static int token_of(const Case *s, const int *ids, int number, int i) {
    return ids[(i * (number + 1) + number) % s->T];
}

// Sequences in company, of which some are missing at times and whose first ones are copies, against each alone:
// the same bits.
template <typename X> static void check_company(const Case *s, const int *ids) {
    enum { STEPS = 3, MOST = 70 };
    const Backend *backend = backend_gpu();
    int T = s->T, V = s->c.vocab_size, N = T > STEPS ? between(0, 1) ? between(2, 8) : between(9, MOST) : 1;
    Model *m = N > 1 ? make(backend, s, N, GENERATE) : NULL;
    if (!m) return;
    N = m->B; // 1 where the decoder cannot
    int copies = between(0, N - 1), *first = (int *)malloc(sizeof(int) * N), *text = (int *)malloc(sizeof(int) * T);
    Next *next = (Next *)malloc(sizeof(Next) * N);
    float *logits = (float *)malloc(sizeof(float) * (size_t)N * STEPS * (size_t)V);
    memset(logits, 0, sizeof(float) * (size_t)N * STEPS * (size_t)V);
    auto number = [&](int n) { return n <= copies ? 0 : n; }; // of its text
    for (int n = 0; n < N; n++) {
        first[n] = n && n <= copies ? first[0] : log_between(1, T - STEPS);
        for (int i = 0; i < first[n]; i++) text[i] = token_of(s, ids, number(n), i);
        if (n == 0 || n > copies) backend->extend(m, n, text, first[n], 0);
        if (n == 0 && copies) backend->copy(m, 0, copies, first[0]);
    }
    for (int step = 0; step < STEPS; step++) {
        int there = 0, turn = between(0, N - 1);
        for (int i = 0; i < N; i++) {
            int n = (i + turn) % N, at = first[n] + step;
            if (n % 7 != 3 || step < 1) next[there++] = {n, token_of(s, ids, number(n), at), at};
        }
        const float *own = backend->extend_each(m, next, there);
        for (int i = 0; i < there; i++)
            memcpy(logits + ((size_t)next[i].sequence * STEPS + step) * V, own + (size_t)i * V, sizeof(float) * V);
    }
    backend->destroy(m);
    Model *alone = make(backend, s, 1, GENERATE);
    int apart = 0;
    for (int n = 0; n < N && alone; n++) {
        for (int i = 0; i < first[n]; i++) text[i] = token_of(s, ids, number(n), i);
        backend->extend(alone, 0, text, first[n], 0);
        for (int step = 0; step < (n % 7 != 3 ? STEPS : 1); step++) {
            Next one = {0, token_of(s, ids, number(n), first[n] + step), first[n] + step};
            const float *own = backend->extend_each(alone, &one, 1);
            apart += memcmp(own, logits + ((size_t)n * STEPS + step) * V, sizeof(float) * (size_t)V) != 0;
        }
    }
    if (apart) fails("%d of %d logits of a sequence change with its company of %d, %d copies", apart, N * STEPS, N,
                     copies);
    if (alone) backend->destroy(alone);
    int bf16_ = sizeof(X) == 2, wide_ = s->c.d_model % 8 == 0;
    meet("generation: 2 to 4 together", N >= 2 && N <= 4);
    meet("generation: 5 to 8 together, bf16 in eights", N > 4 && N <= 8 && bf16_ && wide_);
    meet("generation: more than 8 together, bf16 in eights", N > 8 && bf16_ && wide_);
    meet("generation: more than 4 together, rows not in eights", N > 4 && !wide_);
    meet("generation: more than 4 together in float32", N > 4 && !bf16_);
    meet("generation: copies of a sequence", N > 1 && copies);
    free(first);
    free(text);
    free(next);
    free(logits);
}

static void check_shape(const Case *s) {
    const Config *c = &s->c;
    int clusters = gpu.clusters;
    gpu.precision = s->precision;
    gpu.clusters = clusters && !s->apart;
    snprintf(shape_text, sizeof(shape_text), "%s %s%s B %d T %d D %d H %d/%d L %d V %d state %d/%d left %d",
             mixers[c->mixer].name, precision_names[s->precision], s->mode == GENERATE ? " generation" : "", s->B,
             s->T, c->d_model, c->n_heads, c->n_kv_heads, c->n_layers, c->vocab_size, c->state_dim, c->head_dim,
             s->left);
    int N = s->B * s->T, broken_before = n_broken, *ids = (int *)malloc(sizeof(int) * (size_t)N),
        *targets = (int *)malloc(sizeof(int) * (size_t)N);
    for (int n = 0; n < N; n++) {
        ids[n] = (int)(splitmix64(chance + 2 * (uint64_t)n) % (uint64_t)c->vocab_size);
        targets[n] = splitmix64(chance + 2 * (uint64_t)n + 1) % 8
                         ? (int)(splitmix64(chance ^ (uint64_t)n) % (uint64_t)c->vocab_size)
                         : -1;
    }
    if (s->refused) {
        char error[ERROR_SIZE] = "";
        Model *m = backend_gpu()->create(c, s->B, s->T, s->mode, error);
        if (m || !error[0] || strstr(error, "GiB")) fails("made, or refused without the reason: '%s'", error);
        if (m) backend_gpu()->destroy(m);
        meet("refused: past a launch's limits", 1);
    } else if (s->mode == GENERATE) {
        (s->precision == BF16 ? check_generation<bf16> : check_generation<float>)(s, ids);
        (s->precision == BF16 ? check_company<bf16> : check_company<float>)(s, ids);
    } else (s->precision == BF16 ? check_training<bf16> : check_training<float>)(s, ids, targets);
    gpu.clusters = clusters;
    if (n_broken > broken_before) fails("%d guard bands written to", n_broken - broken_before);
    free(ids);
    free(targets);
}

// ----------------------------------------------------------------------------
// the shapes

static Case shape(int mixer, Precision precision, int B, int T, int D, int H, int G, int L, int V, int left) {
    Case s = {{V, D, L, H, G, T, 0.999, mixer, mixer == MAMBA2 ? (D % 32 ? D : 64) : 0,
               mixer == MAMBA2 ? 64 : 0, 0},
               B, T, left, precision, TRAIN, 0, 0};
    return s;
}

// What went wrong once: partial batches that chose another way, and more memory, than their model; short sequences
// in several panels; sums over rows past their room; partial sums of the embedding's gradient; attention's panels
// of a smaller batch; a decoder's shared memory; what no launch takes.
static int fixed_shape(Case *s, int i) {
    const Case all[] = {shape(SESSA, BF16, 8, 1024, 768, 12, 12, 2, 256, 7),
                         shape(SESSA, BF16, 8, 1024, 768, 12, 12, 4, 256, 6),
                         shape(SESSA, BF16, 8, 512, 768, 12, 12, 2, 256, 7),
                         shape(SESSA, BF16, 16, 1024, 384, 6, 6, 2, 256, 13),
                         shape(SESSA, BF16, 24, 600, 256, 4, 4, 2, 256, 22),
                         shape(SESSA, FP32, 65, 1024, 384, 6, 6, 1, 256, 40),
                         shape(SESSA, BF16, 257, 1024, 64, 4, 4, 2, 256, 100),
                         shape(SESSA, BF16, 65, 2048, 64, 4, 4, 2, 256, 64),
                         shape(SESSA, BF16, 1025, 512, 64, 4, 4, 2, 256, 1),
                         shape(MAMBA2, BF16, 16, 1024, 384, 1, 1, 2, 256, 9),
                         shape(MAMBA2, BF16, 4, 4096, 384, 1, 1, 2, 256, 3),
                         shape(MAMBA2, BF16, 12, 1024, 512, 1, 1, 2, 256, 5),
                         shape(MAMBA2, BF16, 1, 8192, 1024, 1, 1, 2, 256, 1),
                         shape(ATTENTION, BF16, 8, 1024, 512, 8, 1, 1, 30000, 5),
                         shape(ATTENTION, FP32, 33, 1024, 64, 4, 4, 1, 256, 32),
                         shape(SESSA, BF16, 1, 40, 7000, 3500, 3500, 1, 50, 1),
                         shape(SESSA, BF16, 70000, 1, 8, 1, 1, 1, 9, 1),
                         shape(ATTENTION, FP32, 70000, 1, 8, 1, 1, 1, 9, 1),
                         shape(SESSA, BF16, 1, 16, 20488, 1, 1, 1, 9, 1),
                         shape(MAMBA2, FP32, 1, 16, 10248, 1, 1, 1, 9, 1),
                         shape(ATTENTION, TF32, 60000, 500, 160, 4, 4, 1, 9, 1),
                         shape(SESSA, BF16, 65535, 2, 8, 4, 4, 1, 9, 30000),
                         shape(SESSA, FP32, 65535, 2, 8, 4, 4, 1, 9, 30000),
                         shape(MAMBA2, BF16, 65535, 2, 8, 1, 1, 1, 9, 30000),
                         shape(ATTENTION, TF32, 16, 1024, 1024, 512, 512, 1, 64, 9)};
    int n = sizeof(all) / sizeof(all[0]);
    if (i >= n) return 0;
    *s = all[i];
    if (i == 15) s->mode = GENERATE;
    s->refused = i >= 16 && i <= 20;
    return 1;
}

// heads of d columns, so many that D comes near `width`
static void take_heads(Config *c, int d, int width, int shared) {
    c->n_heads = at_most(1 << 12, (width + d - 1) / d);
    c->d_model = c->n_heads * d;
    c->n_kv_heads = c->n_heads;
    for (int tries = shared ? 20 : 0; tries; tries--) {
        int G = between(1, c->n_heads);
        if (c->n_heads % G == 0 && G < c->n_heads) { c->n_kv_heads = G; break; }
    }
}
static int even_columns(void) { return 2 * log_between(1, 40); }
static int eight_columns(int most) { return 8 * log_between(1, most / 8); }

// Case i of a seed: what is not settled by its kind is log-uniform, and small enough to take a moment.
enum { KINDS = 30 };
static void draw(Case *s, int i) {
    int kind = i % KINDS, any = kind == 29 ? between(0, 2) : 0;
    memset(s, 0, sizeof(*s));
    Config *c = &s->c;
    s->mode = TRAIN;
    s->B = log_between(1, 40);
    s->T = log_between(1, 1200);
    c->n_layers = log_between(1, 3);
    c->gamma_max = 0.999;
    c->vocab_size = log_between(2, 20000);
    c->mixer = kind >= 18 && kind <= 22 ? MAMBA2 : (kind >= 11 && kind <= 17) || kind == 26 ? ATTENTION : SESSA;
    c->no_rope = c->mixer != MAMBA2 && kind % 10 == 5;
    s->precision = kind == 0 || kind == 11 || kind == 17 || kind == 18 ? FP32
                   : kind == 1 || kind == 12 || kind == 19             ? TF32
                                                                       : BF16;
    if (kind == 9 || kind == 10 || kind == 26) s->precision = between(0, 1) ? FP32 : TF32;
    take_heads(c, between(0, 1) ? even_columns() : eight_columns(128), log_between(2, 500), between(0, 1));
    int64_t ld = round_up(s->T, 64);
    switch (kind) {
    case 2: take_heads(c, 2 * between(1, 15), log_between(2, 300), 1); break;
    case 3: take_heads(c, eight_columns(64), 8 * log_between(1, 60), 1); s->T = log_between(1, 128); break;
    case 4:
        take_heads(c, eight_columns(64), 8 * log_between(1, 60), 1);
        s->T = log_between(129, 2048);
        s->B = log_between(1, 8);
        break;
    case 5: // many short sequences: the march
        take_heads(c, eight_columns(128), 8 * log_between(4, 60), between(0, 1));
        s->B = at_most(47 / ((c->d_model + 127) / 128) + log_between(1, 30), 1 << 20);
        break;
    case 6: // so many that they take several panels
        take_heads(c, 8 * between(1, 2), 8 * between(1, 3), 0);
        s->T = log_between(300, 2048);
        ld = round_up(s->T, 64);
        s->B = (int)((1 << 28) / (s->T * ld)) + log_between(1, 40);
        c->n_layers = 1;
        c->vocab_size = log_between(2, 60);
        break;
    case 7:
        take_heads(c, 64, between(160, 300), between(0, 1));
        s->T = log_between(2049, 4000);
        s->B = between(1, 3);
        break;
    case 8:
        take_heads(c, eight_columns(64), 8 * between(1, 9), 1);
        s->T = log_between(2049, 6000);
        s->B = between(1, 3);
        break;
    case 9:
        take_heads(c, even_columns(), log_between(2, 64), 1);
        s->T = log_between(2049, 5000);
        s->B = between(1, 2);
        break;
    case 10: // e in fewer rows
        take_heads(c, even_columns(), log_between(2, 32), 1);
        s->T = log_between(300, 1024);
        ld = round_up(s->T, 64);
        s->B = (int)((1 << 26) / (s->T * ld)) + log_between(1, 100);
        c->n_layers = 1;
        c->vocab_size = log_between(2, 60);
        break;
    case 13: take_heads(c, eight_columns(64), log_between(8, 400), 0); s->T = log_between(1, 1024); break;
    case 14:
        take_heads(c, eight_columns(64), log_between(8, 400), between(0, 1));
        s->T = log_between(1025, 3000);
        s->B = between(1, 6);
        break;
    case 15: take_heads(c, 64 + eight_columns(64), log_between(72, 500), between(0, 1)); break;
    case 16:
        take_heads(c, between(0, 1) ? 128 + even_columns() : 2 * between(1, 15), log_between(8, 500),
                   between(0, 1));
        break;
    case 17:
        take_heads(c, even_columns(), log_between(2, 40), 0);
        s->T = log_between(1025, 3000);
        s->B = (40 << 20) / (s->T * s->T) + between(1, 4);
        break;
    case 18: case 19: case 20: case 21: case 22: case 29: case 23: break;
    case 24: take_heads(c, eight_columns(128), 8 * log_between(1, 60), between(0, 1)); break;
    case 25:
        take_heads(c, between(0, 1) ? 8 : 2, between(322, 3000), 1);
        s->T = log_between(1, 64);
        s->B = log_between(1, 6);
        c->n_layers = 1;
        break;
    case 26:
        take_heads(c, even_columns(), log_between(40, 500), 0);
        c->n_heads > 1 ? s->B = between(1, at_most(c->n_heads - 1, 8)) : 0;
        break;
    case 27:
        take_heads(c, 2 * (2 * between(0, 9) + 1), log_between(2, 80), 1);
        s->T = log_between(2049, 4000);
        s->B = between(1, 2);
        break;
    case 28:
        take_heads(c, even_columns(), log_between(2, 64), 1);
        s->B = log_between(400, 65535);
        s->T = log_between(1, 4);
        c->n_layers = 1;
        break;
    }
    s->apart = (kind == 7 || kind == 8 || kind == 13) && i / KINDS % 2;
    if (kind == 29) { c->mixer = any; s->precision = (Precision)between(FP32, BF16); }
    if (kind == 23 || kind == 24) {
        c->mixer = kind == 24 ? between(SESSA, ATTENTION) : i / KINDS % 3;
        s->precision = kind == 24 ? BF16 : (Precision)between(FP32, BF16);
        if (i / KINDS % 4 == 1) {
            c->mixer = between(SESSA, ATTENTION);
            take_heads(c, 2, between(390, 600), 1);
        } // more heads than splits
        s->mode = GENERATE;
        s->T = log_between(2, 2500);
        s->B = 1;
    }
    if (c->mixer == MAMBA2) {
        c->state_dim = kind == 20 ? 8 * log_between(1, 16) : kind == 22 ? 128 : log_between(1, 100);
        c->head_dim = kind == 22 ? 128 : kind == 20 ? 8 * log_between(1, 16) : log_between(1, 64);
        int heads = at_most(log_between(1, 8), 600 / c->head_dim + 1);
        if (kind == 22) s->precision = FP32;
        int number = s->precision == BF16 ? 2 : 4; // what a card's shared memory takes
        while (c->head_dim > 1 && !scan_rows(c->state_dim, c->head_dim, number)) {
            if (c->state_dim > c->head_dim) c->state_dim -= c->state_dim > 8 ? 8 : 1;
            else c->head_dim -= c->head_dim > 8 ? 8 : 1;
        }
        c->d_model = heads * c->head_dim;      // 2D has twice as many
        c->n_heads = c->n_kv_heads = 1;
        if (c->d_model % 2) c->d_model *= 2;
    }
    int small = kind == 6 || kind == 10 || kind == 17; // these are what they are
    if (!small && s->mode == TRAIN) s->B = at_most(s->B, (int64_t)(60e6 / ((double)s->T * (c->d_model + 64))) + 1);
    if (!small) c->vocab_size = at_most(c->vocab_size, 400000000 / ((int64_t)s->B * s->T) + 2);
    c->max_seq_len = s->T;
    s->left = log_between(1, at_most(s->B, s->B - 1));
    if (between(0, 1) && s->B > 1) s->left = s->B - s->left;
}

// Case i of a seed's long shapes: in every second one of attention and feedback B·T·T is past 2^31.
static void draw_large(Case *s, int i) {
    int mixer = i % 4 == 3 ? MAMBA2 : i % 4 == 2 ? ATTENTION : SESSA, many = i / 4 % 2 == 0, d = 8 * between(1, 8);
    Precision precision = i % 5 == 4 ? (Precision)between(FP32, TF32) : BF16;
    int T = log_between(4000, many ? 30000 : 65536), D = d * between(1, 4);
    int past = (int)(((int64_t)1 << 31) / ((int64_t)T * T)) + 1;
    int B = at_most(many ? past + between(0, 3) : log_between(1, 4), ((int64_t)1 << 26) / ((int64_t)T * D));
    *s = {{log_between(2, 300), D, between(1, 2), D / d, D / d, T, 0.999, mixer, d, 8 * between(1, 8), 0},
          B, T, between(1, at_most(B, B - 1)), precision, TRAIN, 0, 0};
    if (mixer != MAMBA2) s->c.head_dim = s->c.state_dim = 0;
    else s->c.n_heads = s->c.n_kv_heads = 1;
}

// Case i of a seed's small shapes: mixers and precisions in turn, every fourth round generates. Some are just long
// enough for two blocks of rows, some just wide enough for several warps a row of logits or of a state.
static void draw_small(Case *s, int i) {
    int mixer = i % 3, round = i / 9;
    memset(s, 0, sizeof(*s));
    Config *c = &s->c;
    s->precision = (Precision)(i / 3 % 3);
    s->mode = round % 4 == 3 ? GENERATE : TRAIN;
    s->T = i % 2 ? log_between(1, 40) : log_between(41, 200);
    s->B = s->mode == GENERATE ? 1 : at_most(between(1, 5), 1 + 200 / s->T);
    c->mixer = mixer;
    c->gamma_max = 0.999;
    c->n_layers = log_between(1, 2);
    c->vocab_size = i % 7 == 5 ? between(1025, 1200) : log_between(2, 70);
    c->max_seq_len = s->T;
    c->no_rope = mixer != MAMBA2 && round % 5 == 4;
    take_heads(c, between(0, 1) ? 2 * log_between(1, 12) : 8 * log_between(1, 3), log_between(2, 72), between(0, 1));
    if (mixer == MAMBA2) {
        int eights = between(0, 1);
        c->state_dim = eights ? 8 * log_between(1, 5) : log_between(1, 40);
        c->head_dim = eights ? 8 * log_between(1, 6) : log_between(1, 50);
        c->d_model = c->head_dim * log_between(1, 2) * (c->head_dim % 2 ? 2 : 1);
        c->n_heads = c->n_kv_heads = 1;
    }
    s->left = log_between(1, at_most(s->B, s->B - 1));
}

int main(int argc, char **argv) {
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    int first = argc > 2 ? atoi(argv[2]) : 0, count = argc > 3 ? atoi(argv[3]) : 300, passed = 0, failed = 0;
    int large = argc > 4 && !strcmp(argv[4], "large"), small = argc > 4 && !strcmp(argv[4], "small");
    char error[ERROR_SIZE];
    if (gpu_open(error)) { fprintf(stderr, "test_shapes: %s\n", error); return 1; }
    double begun = omp_get_wtime();
    for (int i = first; i < first + count; i++) {
        Case s;
        chance = splitmix64(splitmix64(seed) + (uint64_t)i);
        if (large) draw_large(&s, i);
        else if (small) draw_small(&s, i);
        else if (!fixed_shape(&s, i)) draw(&s, i);
        const char *kind = large ? " large" : small ? " small" : "";
        snprintf(command, sizeof(command), "./test_shapes %llu %d 1%s", (unsigned long long)seed, i, kind);
        failures = 0;
        double before = omp_get_wtime();
        check_shape(&s);
        if (getenv("SHAPES_SHOWN")) printf("%d  %s  %.2f s\n", i, shape_text, omp_get_wtime() - before);
        fflush(stdout);
        if (failures) failed++;
        else passed++;
    }
    printf("\n%-64s times\n", "branch");
    for (int i = 0; i < n_met; i++) {
        int missed = first == 0 && count >= 300 && !large && !small && !met[i].times;
        printf("%-64s %5d%s\n", met[i].name, met[i].times, missed ? "  FAIL: never met" : "");
        failed += missed;
    }
    printf("\nheld to four times the plain way's own error: gradients of %d\n", past_bounds);
    printf("largest distance of the fast ways' gradients from float32, in the plain ways': tf32 %.2f, bf16 %.2f\n",
           furthest[TF32], furthest[BF16]);
    printf("largest error as a share of its bound: fp32 %.3f, tf32 %.3f, bf16 %.3f; %.0f s\n", nearest[FP32],
           nearest[TF32], nearest[BF16], omp_get_wtime() - begun);
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
