/*
The mixer at its smallest, for the page's step by step: one head, two numbers wide, three tokens. It is
train_sessa.c itself, run by its plain loops, in which every assignment has been given a note (build.py):
the line, where the number went, and the number. Two numbers are too few for a LayerNorm, which makes ±1 of
any two: so the inputs are the mixer's, ā.
*/
#include <stddef.h>

enum { ENTER = -1, ROW = -2 }; // what is noted besides: a function begins; a loop comes to row t
typedef struct { int line, kind; double value; const void *at; } Note;
static Note *notes;
static int n_notes, room_for_notes, noting;
static void note(int line, int kind, double value, const void *at);
#define NOTE(line, variable, number) note(line, number, (double)(variable), &(variable))
#define NOTE_ROW(line, t) note(line, ROW, (double)(t), NULL)
#define NOTE_ENTER(line) note(line, ENTER, 0, NULL)

#define SESSA_NO_MAIN
#include "noted_sessa.c"

#ifdef __EMSCRIPTEN__
#include <emscripten.h>
#define EXPORT EMSCRIPTEN_KEEPALIVE
#else
#define EXPORT __attribute__((used))
#endif

static void note(int line, int kind, double value, const void *at) {
    if (!noting) return;
    if (n_notes == room_for_notes) {
        room_for_notes = 2 * room_for_notes + 1024;
        notes = (Note *)realloc(notes, sizeof(Note) * (size_t)room_for_notes);
        if (!notes) abort(); // some kilobytes
    }
    Note new_note = {line, kind, value, at};
    notes[n_notes++] = new_note;
}

static Model *three;
static char three_text[16384];

// Makes the model, its weights uniform in ±1/√2 from the seed.
EXPORT int three_begin(int seed) {
    char error[ERROR_SIZE];
    Config config = {.vocab_size = 3, .d_model = 2, .n_layers = 1, .n_heads = 1, .n_kv_heads = 1,
                     .max_seq_len = 3, .gamma_max = 0.999, .mixer = SESSA};
    (void)run_program;
    plain = 1;
    if (!three) three = model_create(&config, 1, 3, KEEP_ALL, error);
    if (!three) return FAILED;
    initialise(three->params, &three->table, (uint64_t)seed);
    return 0;
}

// Where the parameters are, to be read and to be changed; the activations; the gradients.
EXPORT real *three_block(int which) {
    return which == 0 ? three->params : which == 1 ? three->acts_block : three->grads;
}

// The tables of parameters and activations as JSON: name, offset, shape, stride of a row
EXPORT const char *three_tables(void) {
    const Table *tables[2] = {&three->table, &three->acts_table};
    int n = 0, room = (int)sizeof(three_text);
    n += snprintf(three_text + n, (size_t)(room - n), "[");
    for (int i = 0; i < 2; i++) {
        n += snprintf(three_text + n, (size_t)(room - n), "%s[", i ? ", " : "");
        for (int k = 0; k < tables[i]->n && n < room; k++) {
            const Tensor *t = &tables[i]->rows[k];
            n += snprintf(three_text + n, (size_t)(room - n),
                          "%s{\"name\": \"%s\", \"offset\": %lld, \"count\": %lld, \"stride\": %lld, "
                          "\"shape\": [", k ? ", " : "", t->name, (long long)t->offset,
                          (long long)t->count, (long long)t->stride);
            for (int d = 0; d < t->n_dims && n < room; d++)
                n += snprintf(three_text + n, (size_t)(room - n), "%s%lld", d ? ", " : "",
                              (long long)t->shape[d]);
            n += snprintf(three_text + n, (size_t)(room - n), "]}");
        }
        n += snprintf(three_text + n, (size_t)(room - n), "]");
    }
    snprintf(three_text + n, (size_t)(room - n), "]");
    return three_text;
}

// The mixer forward and backward once, noted: ā → s, and the gradient of s → that of ā. Returns the number
// of notes.
static real three_inputs[12]; // ā, then ds
EXPORT real *three_input(void) { return three_inputs; }
EXPORT int three_run(void) {
    memset(three->grads, 0, sizeof(real) * (size_t)three->table.count);
    memcpy(three->acts.layers[0].abar, three_inputs, sizeof(real) * 6);
    n_notes = 0;
    plain = noting = 1;
    mixers[SESSA].forward(three, 0, 1, 3, 0);
    memcpy(three->acts.ds, three_inputs + 6, sizeof(real) * 6);
    mixers[SESSA].backward(three, 0, 1, 3);
    noting = 0;
    return n_notes;
}
EXPORT const Note *three_notes(void) { return notes; }
EXPORT int three_note_size(void) { return (int)sizeof(Note); }
