/*
Where a training step's time goes: every layer of train_sessa.c, forward and backward, timed by itself on the buffers of a
real model, with what bounds it: the floating-point operations it must do (a causal half counted once, probabilities that
are computed again counted again) and the bytes it must move (each array read or written once).

    cc -O3 -march=native -ffast-math -fno-finite-math-only -fopenmp dev/speed/profile.c -o profile -lm
    ./profile [D L H V B T]            one shape; without arguments the default model
*/
#define SESSA_NO_MAIN
#include "../../train_sessa.c"

enum { REPEATS = 9 };
typedef struct { const char *name; double ms, gflop, gbyte; } Row;
static Row rows[64];
static int n_rows;
static double times[REPEATS];

static int by_time(const void *a, const void *b) { return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b); }

// Times a call as often as a training step makes it: `count` times the median of REPEATS.
#define LAYER(label, count, flops, numbers, call) do { \
    for (int repeat_ = 0; repeat_ < REPEATS; repeat_++) { double begin_ = seconds(); call; times[repeat_] = seconds() - begin_; } \
    qsort(times, REPEATS, sizeof(double), by_time); \
    Row row_ = {label, 1e3 * (count) * times[REPEATS / 2], 1e-9 * (count) * (double)(flops), 1e-9 * (count) * sizeof(real) * (double)(numbers)}; \
    rows[n_rows++] = row_; \
} while (0)

static double product_rate(void) {
    enum { N = 1536 };
    real *a = (real *)calloc(3 * (size_t)N * N, sizeof(real));
    for (size_t i = 0; i < 2 * (size_t)N * N; i++) a[i] = (real)(i % 7) - 3;
    for (int r = 0; r < REPEATS; r++) {
        double begin = seconds();
        matmul(a + 2 * (size_t)N * N, N, rows_of(a, N), rows_of(a + (size_t)N * N, N), N, N, N, 1, 0, NULL);
        times[r] = seconds() - begin;
    }
    free(a);
    qsort(times, REPEATS, sizeof(double), by_time);
    return 2e-9 * N * N * N / times[REPEATS / 2];
}

int main(int argc, char **argv) {
    (void)run_program; // only its layers are wanted here
    int shape[6] = {128, 5, 4, 65, 12, 64};
    for (int i = 0; i < 6 && i + 1 < argc; i++) shape[i] = atoi(argv[i + 1]);
    int D = shape[0], L = shape[1], H = shape[2], V = shape[3], B = shape[4], T = shape[5], N = B * T, d = D / H, E = 5 * D;
    char error[ERROR_SIZE];
    Config config = {.vocab_size = V, .d_model = D, .n_layers = L, .n_heads = H, .n_kv_heads = H, .max_seq_len = T,
                     .gamma_max = 0.999, .mixer = SESSA};
    const Config *c = &config;
    Model *m = model_create(c, B, T, TRAIN, error);
    if (!m) { fprintf(stderr, "%s\n", error); return 1; }
    int *ids = (int *)malloc(sizeof(int) * (size_t)N);
    uint64_t random = 1;
    for (int i = 0; i < N; i++) ids[i] = (int)(random_u64(&random) % (uint64_t)V);
    initialise(m->params, &m->table, 1);
    Dropout off = {0, 0, 0, 0};
    AdamW adam = {1e-6, 0.9, 0.99, 1e-8, 0.1};
    double step[REPEATS];
    for (int i = 0; i < REPEATS; i++) {
        double begin = seconds();
        model_forward(m, ids, ids, B, T, off);
        model_backward(m, 1.0 / N);
        model_update(m, adam, 1 / (norm(m->grads, m->table.count) + 1), i + 1);
        step[i] = 1e3 * (seconds() - begin);
    }
    qsort(step, REPEATS, sizeof(double), by_time);

    Activations *acts = &m->acts;
    LayerActivations *a = &acts->layers[0];
    LayerWeights *w = &m->weights.layers[0], *dw = &m->grad.layers[0];
    double ND = (double)N * D, half = (double)N * T / 2, P = (double)m->table.count; // half: pairs of a causal attention
    Work work = work_of(m);
    Shape direct = direct_shape(c, B, T, 0), feedback = feedback_shape(c, B, T, 0);
    real *q = a->proj, *k = q + D, *v = k + D, *fb_q = v + D, *fb_k = fb_q + D;
    real *dq = acts->dproj, *dk = dq + D, *dv = dk + D, *dfb_q = dv + D, *dfb_k = dfb_q + D;
    LAYER("embedding_forward", 1, 0, 2 * ND, embedding_forward(a->x, ids, m->weights.wte, B, T, D));
    LAYER("layernorm_forward", 2 * L + 1, 0, 2 * ND,
          layernorm_forward(a->ln, a->ln_mean, a->ln_rstd, a->x, w->ln_weight, w->ln_bias, N, D));
    LAYER("linear_forward, W_in", L, 4 * ND * D, 3 * ND,
          linear_forward(a->ag, 2 * D, a->ln, w->W_in, w->b_in, N, D, 2 * D));
    LAYER("gelu_forward", 2 * L, 0, 2 * ND, gelu_forward(a->abar, a->ag, 2 * D, N, D));
    LAYER("linear_forward, q k v q' k'", L, 10 * ND * D, 6 * ND,
          linear_forward(a->proj, E, a->abar, w->W_proj, w->b_proj, N, D, E));
    LAYER("rope_forward", L, 0, 4 * ND,
          rope_forward(a->proj, E, acts->cosine, acts->sine, N, T, 2 * H, d, 0, 1));
    LAYER("attention_forward", L, 4 * half * D, 4 * ND,
          attention_forward(a->o, a->stats, work, q, k, v, direct));
    LAYER("linear_forward, W_o", L, 2 * ND * D, 2 * ND, linear_forward(a->f, D, a->o, w->W_o, NULL, N, D, D));
    LAYER("gain_forward", L, 0, ND,
          gain_forward(a->gamma, a->abar, w->gamma_weight, w->gamma_bias, (real)0.999, N, D));
    LAYER("feedback_forward", L, 4 * half * D, 4 * ND,
          feedback_forward(a->s, a->fb_stats, work, a->f, fb_q, fb_k, a->gamma, feedback));
    LAYER("gate_forward", 2 * L, 0, 3 * ND, gate_forward(a->gated, a->s, a->ag + D, 2 * D, N, D));
    LAYER("linear_forward, W_out", L, 2 * ND * D, 2 * ND,
          linear_forward(a->branch, D, a->gated, w->W_out, w->b_out, N, D, D));
    LAYER("residual_forward", L, 0, 3 * ND, residual_forward(a->y, a->x, a->branch, (int64_t)N * D));
    LAYER("linear_forward, head", 1, 2 * ND * V, ND + (double)N * V,
          linear_forward(acts->logits, V, acts->ln_f, m->weights.wte, NULL, N, D, V));
    LAYER("crossentropy_forward", 1, 0, (double)N * V,
          crossentropy_forward(acts->losses, acts->loss_logsumexp, acts->logits, ids, N, V));
    LAYER("crossentropy_backward", 1, 0, 2.0 * N * V,
          crossentropy_backward(acts->logits, acts->logits, acts->loss_logsumexp, ids, (real)1e-3, N, V));
    LAYER("linear_backward, head", 1, 4 * ND * V, 2 * ND + (double)N * V,
          linear_backward(acts->ds, m->grad.wte, NULL, acts->logits, V, acts->ln_f, m->weights.wte, N, D, V));
    LAYER("layernorm_backward", L + 1, 0, 4 * ND,
          layernorm_backward(acts->dx, dw->ln_weight, dw->ln_bias, acts->ds, a->x, a->ln_mean, a->ln_rstd,
              w->ln_weight, N, D));
    LAYER("linear_backward, W_out", L, 4 * ND * D, 3 * ND,
          linear_backward(acts->ds, dw->W_out, dw->b_out, acts->dx, D, a->gated, w->W_out, N, D, D));
    LAYER("gate_backward", L, 0, 5 * ND,
          gate_backward(acts->ds, acts->dag + D, acts->ds, a->s, a->ag + D, 2 * D, N, D));
    LAYER("feedback_backward", L, 10 * half * D, 7 * ND,
          feedback_backward(acts->ds, dfb_q, dfb_k, acts->dgamma, work, a->s, a->fb_stats, fb_q, fb_k, a->gamma, feedback));
    LAYER("linear_backward, W_o", L, 4 * ND * D, 3 * ND,
          linear_backward(acts->dout, dw->W_o, NULL, acts->ds, D, a->o, w->W_o, N, D, D));
    LAYER("attention_backward", L, 10 * half * D, 7 * ND,
          attention_backward(dq, dk, dv, work, acts->dout, a->stats, q, k, v, direct));
    LAYER("rope_backward", L, 0, 4 * ND,
          rope_backward(acts->dproj, E, acts->cosine, acts->sine, N, T, 2 * H, d));
    LAYER("linear_backward, q k v q' k'", L, 20 * ND * D, 7 * ND,
          linear_backward(acts->dabar, dw->W_proj, dw->b_proj, acts->dproj, E, a->abar, w->W_proj, N, D, E));
    LAYER("gain_backward", L, 0, 3 * ND,
          gain_backward(acts->dabar, dw->gamma_weight, dw->gamma_bias, acts->dgamma, a->gamma, a->abar,
              w->gamma_weight, (real)0.999, N, D));
    LAYER("gelu_backward", L, 0, 3 * ND, gelu_backward(acts->dag, acts->dabar, a->ag, 2 * D, N, D));
    LAYER("linear_backward, W_in", L, 8 * ND * D, 4 * ND,
          linear_backward(acts->ds, dw->W_in, dw->b_in, acts->dag, 2 * D, a->ln, w->W_in, N, D, 2 * D));
    LAYER("embedding_backward", 1, 0, 2 * ND, embedding_backward(m->grad.wte, acts->dx, ids, B, T, D));
    LAYER("norm", 1, 0, P, norm(m->grads, m->table.count));
    LAYER("adamw", 1, 0, 8 * P, model_update(m, adam, 1, 100));

    double sum = 0, flop = 0, rate = product_rate();
    for (int i = 0; i < n_rows; i++) { sum += rows[i].ms; flop += rows[i].gflop; }
    printf("D %d, L %d, H %d, V %d, B %d, T %d, %d threads; product 1536^3: %.0f GFLOP/s\n", D, L, H, V, B, T, omp_get_max_threads(), rate);
    printf("%-30s %8s %6s %9s %7s\n", "a step", "ms", "share", "GFLOP/s", "GB/s");
    for (int i = 0; i < n_rows; i++) {
        printf("%-30s %8.3f %5.1f%%", rows[i].name, rows[i].ms, 100 * rows[i].ms / sum);
        if (rows[i].gflop > 0) printf(" %9.1f", 1e3 * rows[i].gflop / rows[i].ms);
        else printf(" %9s", "");
        printf(" %7.1f\n", 1e3 * rows[i].gbyte / rows[i].ms);
    }
    double counted = 1e-9 * N * (6 * P + 12.0 * T * D * L);
    printf("sum %.2f ms, a whole step %.2f ms: %.1f GFLOP/s, %.0f %% of the product's rate (6·parameters + 12·T·D·L a token)\n", sum, step[REPEATS / 2],
           1e3 * counted / step[REPEATS / 2], 1e5 * counted / step[REPEATS / 2] / rate);
    printf("at the product's rate that takes %.2f ms, with the probabilities that are computed again %.2f ms\n", 1e3 * counted / rate, 1e3 * flop / rate);
    model_free(m);
    free(ids);
    return 0;
}
