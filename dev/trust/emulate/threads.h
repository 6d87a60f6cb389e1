// The threads of a block, as fibers of one thread of the host: each runs until it has to wait for others, and
// who is next is drawn by lot, so that what no barrier keeps apart happens in another order each time.
//
//     EMULATE_SEED          of the lots: [1]; 0: blocks, threads and streams go in order
//     EMULATE_SHARED        bytes of shared memory that a block may have: [101376], an sm_86's
//     EMULATE_MEMORY        GiB of the device's memory: [16]
//     EMULATE_PROCESSORS    multiprocessors that the device says it has: [6]
//
// A fault ends the program with a line that says which thread of which block, and where.
#ifndef EMULATE_THREADS_H
#define EMULATE_THREADS_H
#include "fibers.h"
#include <pthread.h>
#include <stdarg.h>
#include <string.h>
#include <type_traits>
#include <unistd.h>
#include <vector>

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

namespace emulate {

enum { WARP = 32, MOST_THREADS = 1024, BARRIERS = 16, MOST_STATICS = 32, BAND = 64, NAN_BYTE = 0xFF };

inline uint64_t number_from(const char *name, uint64_t usual) {
    const char *value = getenv(name);
    return value && *value ? strtoull(value, NULL, 10) : usual;
}
inline const uint64_t seed = number_from("EMULATE_SEED", 1);
inline const size_t most_shared = (size_t)number_from("EMULATE_SHARED", 101376);

// xorshift: the lots of one block, or of the host
struct Lots {
    uint64_t state;
    void begin(uint64_t a, uint64_t b) {
        state = (a * 0x9E3779B97F4A7C15u) ^ (b * 0xD1B54A32D192ED03u) ^ (seed * 0x94D049BB133111EBu);
        state ^= state >> 31;
        state = state * 0xBF58476D1CE4E5B9u + 1;
        state += !state;
    }
    uint64_t next(void) {
        state ^= state << 13;
        state ^= state >> 7;
        return state ^= state << 17;
    }
    unsigned below(unsigned n) { return (unsigned)((next() >> 32) * n >> 32); }
};

// ----------------------------------------------------------------------------
// what there is of a block

struct Place { const char *file; int line; };

// A copy to shared memory that is on its way.
struct Copy { char *to; const char *from; int bytes, group; };

struct Thread {
    uint3 index;        // threadIdx
    int number, lane, ended;
    Fiber *fiber;       // NULL: not begun
    Thread *next;       // of those that wait at the same barrier
    // what it waits for, or waited for last: its name, the place, the lanes or threads meant, what it brought
    const char *what;
    Place place;
    uint32_t mask;
    void *brought;
    int waits;
    int groups;         // of copies, committed
    std::vector<Copy> copies;
};

struct Barrier { int there, wanted, yes; Thread *first; };
// Lanes: those there are, that have not ended, that wait for others of the warp, that can go on.
struct Warp { uint32_t all, here, waiting, ready; };
struct Static { const void *tag; char *at; size_t bytes; Place place; };

// What one block needs, and one thread of the host keeps from block to block.
struct Runner {
    Thread threads[MOST_THREADS];
    Warp warps[MOST_THREADS / WARP];
    Barrier barriers[BARRIERS];
    uint32_t ready; // warps with a lane that can go on
    int n_threads, n_warps, live, n_fibers, favours, favoured;
    Fiber system, *free_fibers;
    Lots lots;
    dim3 blocks, size;
    uint3 block;
    void (*body)(const void *launch);
    const void *launch;
    // shared memory: what the launch asked for, a band, then each array and a band behind it
    char *shared, *dynamic_end, *shared_end;
    Place dynamic_place;
    size_t shared_used;
    Static statics[MOST_STATICS];
    int n_statics;
};
inline thread_local Runner *runner;
inline thread_local Thread *current;

[[noreturn]] __attribute__((format(printf, 2, 3)))
inline void fault(Place place, const char *format, ...) {
    va_list arguments;
    fflush(stdout);
    va_start(arguments, format);
    fprintf(stderr, "%s:%d: ", place.file ? place.file : "?", place.line);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    if (current)
        fprintf(stderr, " (thread %u,%u,%u of block %u,%u,%u)", current->index.x, current->index.y,
                current->index.z, runner->block.x, runner->block.y, runner->block.z);
    fprintf(stderr, "\n");
    abort();
}

// ----------------------------------------------------------------------------
// who is next

inline void no_one_is_ready(void);

// The first that is set from place `from` on, round.
inline int first_from(uint32_t set, unsigned from) {
    uint32_t turned = from ? set >> from | set << (32 - from) : set;
    return (int)((unsigned)__builtin_ctz(turned) + from) % 32;
}
// One of those that can go on: any lane of a warp. In every second block the warp is any, too; in the others
// some are favoured for a while, and run as far ahead as they can.
inline Thread *draw(void) {
    Runner *r = runner;
    if (!r->ready) no_one_is_ready();
    uint64_t lot = seed ? r->lots.next() : 0;
    if (!r->favours || (lot & 0xFF) < 4) r->favoured = (int)((lot >> 40) * (unsigned)r->n_warps >> 24);
    int w = first_from(r->ready, (unsigned)r->favoured),
        lane = first_from(r->warps[w].ready, (unsigned)(lot >> 8) % 32);
    r->warps[w].ready &= ~(1u << lane);
    if (!r->warps[w].ready) r->ready &= ~(1u << w);
    return &r->threads[w * WARP + lane];
}
inline void make_ready(Thread *thread) {
    int w = thread->number / WARP;
    thread->waits = 0;
    runner->warps[w].ready |= 1u << thread->lane;
    runner->ready |= 1u << w;
}

inline void fiber_main(void);
inline Fiber *take_fiber(void) {
    Fiber *fiber = runner->free_fibers;
    if (fiber) runner->free_fibers = fiber->next;
    else fiber = new_fiber(fiber_main, runner->n_fibers++);
    return fiber;
}
// The thread that runs makes way; back here it is its turn again.
inline void make_way(void) {
    Thread *self = current, *next = draw();
    if (next == self) return;
    if (!next->fiber) next->fiber = take_fiber();
    current = next;
    go(self->fiber, next->fiber);
}

// While a copy is on its way others may look at its place.
inline void perhaps_make_way(void) {
    if (!seed || runner->lots.below(4)) return;
    make_ready(current);
    make_way();
}

inline void thread_ends(void);
inline void fiber_main(void) {
    arrived();
    for (;;) {
        Runner *r = runner;
        Fiber *own = current->fiber;
        r->body(r->launch);
        thread_ends();
        Thread *next = r->live ? draw() : NULL;
        if (next && !next->fiber) { // begins where this one ended
            next->fiber = own;
            current = next;
            continue;
        }
        own->next = r->free_fibers;
        r->free_fibers = own;
        current = next;
        go(own, next ? next->fiber : &r->system);
    }
}

// ----------------------------------------------------------------------------
// meeting points

// All lanes of the mask that have not ended come together; the last to come does `all`, what it is about, for
// all.
inline void meet(const char *what, Place place, uint32_t mask, void *brought,
                 void (*all)(Thread *lanes, uint32_t here)) {
    Thread *self = current;
    Runner *r = runner;
    Thread *lanes = self - self->lane;
    self->what = what;
    self->place = place;
    self->mask = mask;
    self->brought = brought;
    if (!(mask >> self->lane & 1))
        fault(place, "%s: the mask %08x is without lane %d, which came", what, mask, self->lane);
    Warp *warp = &r->warps[self->number / WARP];
    uint32_t wanted = mask & warp->all, ended = wanted & ~warp->here;
    if (ended)
        fault(place, "%s: the mask %08x names lane %d, which has ended", what, mask, __builtin_ctz(ended));
    self->waits = 1;
    warp->waiting |= 1u << self->lane;
    if (wanted & ~warp->waiting) { make_way(); return; }
    for (uint32_t rest = wanted; rest; rest &= rest - 1) {
        Thread *other = lanes + __builtin_ctz(rest);
        if (other->mask != mask) { make_way(); return; }
        if (other->what != what || other->place.line != place.line)
            fault(place, "%s meets %s of line %d in the same warp", what, other->what, other->place.line);
    }
    if (all) all(lanes, wanted);
    warp->waiting &= ~wanted;
    for (uint32_t rest = wanted; rest; rest &= rest - 1) make_ready(lanes + __builtin_ctz(rest));
    make_way();
}

// The barrier `id`, for `wanted` threads; 0: all of the block, at the same line. Returns of how many `yes`
// was not 0.
inline int barrier(const char *what, Place place, int id, int wanted, int yes) {
    Thread *self = current;
    Runner *r = runner;
    if (id < 0 || id >= BARRIERS) fault(place, "%s: there is no barrier %d", what, id);
    Barrier *b = &r->barriers[id];
    int all = wanted ? wanted : r->n_threads, held = yes != 0;
    if (b->first && b->wanted != all)
        fault(place, "%s: barrier %d is for %d threads, at line %d for %d", what, id, all,
              b->first->place.line, b->wanted);
    if (b->first && !wanted && (b->first->place.line != place.line || b->first->place.file != place.file))
        fault(place, "%s meets %s of line %d", what, b->first->what, b->first->place.line);
    self->what = what;
    self->place = place;
    self->waits = 2;
    self->brought = &held;
    self->next = b->first;
    b->first = self;
    b->wanted = all;
    b->there++;
    b->yes += held;
    if (b->there < all) { make_way(); return held; }
    int sum = b->yes;
    for (Thread *one = b->first, *next; one; one = next) {
        next = one->next;
        *(int *)one->brought = sum;
        make_ready(one);
    }
    *b = {};
    make_way();
    return held;
}

// Nobody can go on, and not all have ended: who waits where.
inline void no_one_is_ready(void) {
    Runner *r = runner;
    Thread *one = NULL;
    fflush(stdout);
    fprintf(stderr, "emulation: these threads wait for ever in block %u,%u,%u:\n", r->block.x, r->block.y,
            r->block.z);
    for (int i = 0; i < r->n_threads; i++) {
        Thread *t = &r->threads[i];
        if (t->ended || !t->waits) continue;
        int same = 0, first = 1;
        for (int j = 0; j < r->n_threads; j++) {
            Thread *u = &r->threads[j];
            if (u->ended || !u->waits || u->place.line != t->place.line || u->what != t->what) continue;
            first &= j >= i;
            same++;
        }
        if (!first) continue;
        fprintf(stderr, "    %d at %s, %s:%d, the first of them %u,%u,%u", same, t->what, t->place.file,
                t->place.line, t->index.x, t->index.y, t->index.z);
        if (t->waits == 1) fprintf(stderr, ", lanes %08x, of which %08x have not ended", t->mask,
                                   t->mask & r->warps[i / WARP].here);
        fprintf(stderr, "\n");
        if (!one) one = t;
    }
    current = NULL;
    fault(one ? one->place : Place{NULL, 0}, "not all threads reach it: %d have ended, %d wait",
          r->n_threads - r->live, r->live);
}

inline void thread_ends(void) {
    Thread *self = current;
    Runner *r = runner;
    self->ended = 1;
    self->copies.clear();
    r->live--;
    Warp *warp = &r->warps[self->number / WARP];
    warp->here &= ~(1u << self->lane);
    // The others of its warp may have waited for this one alone.
    Thread *lanes = self - self->lane;
    for (uint32_t rest = warp->here; rest; rest &= rest - 1) {
        Thread *t = lanes + __builtin_ctz(rest);
        if (t->waits == 1 && t->mask >> self->lane & 1)
            fault(t->place, "%s waits for lane %d, which ends", t->what, self->lane);
    }
}

// ----------------------------------------------------------------------------
// shared memory

inline void fill_unset(char *at, size_t bytes) { memset(at, NAN_BYTE, bytes); }

// A band behind an array: known bytes, looked at when the block has ended, or what the sanitizer lets nobody
// touch.
#ifdef __SANITIZE_ADDRESS__
inline void lay_band(char *at) { __asan_poison_memory_region(at, BAND); }
inline void check_band(const char *at, Place) { __asan_unpoison_memory_region(at, BAND); }
#else
inline void lay_band(char *at) { fill_unset(at, BAND); }
inline void check_band(const char *at, Place place) {
    for (size_t i = 0; i < BAND; i++)
        if ((unsigned char)at[i] != NAN_BYTE) {
            current = NULL;
            fault(place, "block %u,%u,%u wrote %zu bytes behind this array", runner->block.x, runner->block.y,
                  runner->block.z, i);
        }
}
#endif

inline void *dynamic_shared(Place place) {
    runner->dynamic_place = place;
    return runner->shared;
}

// The array of a block that the declaration `tag` is; the first thread to come makes it, of numbers that are
// none.
inline void *static_shared(const void *tag, size_t bytes, size_t align, Place place) {
    Runner *r = runner;
    for (int i = 0; i < r->n_statics; i++) if (r->statics[i].tag == tag) return r->statics[i].at;
    if (r->n_statics == MOST_STATICS) fault(place, "more than %d shared arrays", MOST_STATICS);
    align = align < 16 ? 16 : align;
    char *at = (char *)(((uintptr_t)r->shared_end + align - 1) & ~(uintptr_t)(align - 1));
    r->shared_used += (bytes + 15) / 16 * 16;
    if (r->shared_used > most_shared)
        fault(place, "%zu bytes of shared memory, a block has %zu", r->shared_used, most_shared);
    r->statics[r->n_statics++] = {tag, at, bytes, place};
    r->shared_end = at + bytes + BAND;
    fill_unset(at, bytes);
    lay_band(at + bytes);
    return at;
}

// ----------------------------------------------------------------------------
// a block

// One launch: what all its blocks have in common.
struct Grid {
    dim3 blocks, size;
    size_t shared;
    uint64_t number;
    void (*body)(const void *launch);
    const void *launch;
};

inline Runner *new_runner(void) {
    Runner *r = new Runner();
    size_t room = most_shared + MOST_STATICS * 2 * 1024 + 4096;
    if (posix_memalign((void **)&r->shared, 1024, room)) abort();
#ifdef __SANITIZE_ADDRESS__
    pthread_attr_t attributes;
    void *bottom;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &r->system.bytes);
    r->system.bottom = (char *)bottom;
    pthread_attr_destroy(&attributes);
#endif
    return r;
}

inline void run_block(const Grid *g, uint3 block) {
    if (!runner) runner = new_runner();
    Runner *r = runner;
    uint64_t place = ((uint64_t)block.z << 48) + ((uint64_t)block.y << 32) + block.x;
    r->lots.begin(g->number, place);
    r->favours = seed ? (int)(r->lots.next() >> 60 & 1) : 1;
    r->blocks = g->blocks;
    r->size = g->size;
    r->block = block;
    r->body = g->body;
    r->launch = g->launch;
    r->n_threads = r->live = (int)(g->size.x * g->size.y * g->size.z);
    r->n_statics = 0;
    r->dynamic_place = {"shared memory of a launch", 0};
    r->shared_used = g->shared;
    r->dynamic_end = r->shared + g->shared;
    r->shared_end = r->dynamic_end + BAND;
    fill_unset(r->shared, g->shared);
    lay_band(r->dynamic_end);
    for (int i = 0; i < r->n_threads; i++) {
        Thread *t = &r->threads[i];
        unsigned n = (unsigned)i, x = n % g->size.x, y = n / g->size.x % g->size.y,
                 z = n / g->size.x / g->size.y;
        t->index = {x, y, z};
        t->number = i;
        t->lane = i % WARP;
        t->fiber = NULL;
        t->ended = t->waits = t->groups = 0;
        t->what = NULL;
        if (!t->copies.empty()) t->copies.clear();
    }
    r->n_warps = (r->n_threads + WARP - 1) / WARP;
    r->favoured = seed ? (int)r->lots.below((unsigned)r->n_warps) : 0;
    for (int w = 0; w < r->n_warps; w++) {
        int lanes = r->n_threads - w * WARP < WARP ? r->n_threads - w * WARP : WARP;
        uint32_t all = 0xFFFFFFFFu >> (WARP - lanes);
        r->warps[w] = {all, all, 0, all};
    }
    r->ready = 0xFFFFFFFFu >> (WARP - r->n_warps);
    current = draw();
    current->fiber = take_fiber();
    go(&r->system, current->fiber);
    current = NULL;
    check_band(r->dynamic_end, r->dynamic_place);
    for (int i = 0; i < r->n_statics; i++)
        check_band(r->statics[i].at + r->statics[i].bytes, r->statics[i].place);
}

// All blocks, in any order, divided among the host's threads where that is worth while.
inline void run_grid(const Grid *g) {
    int64_t n = (int64_t)g->blocks.x * g->blocks.y * g->blocks.z;
    int64_t threads = n * (int64_t)(g->size.x * g->size.y * g->size.z);
    Lots lots;
    lots.begin(g->number, 0);
    // an order: every block once, for the step has no divisor in common with their number
    int64_t from = seed ? (int64_t)(lots.next() % (uint64_t)n) : 0,
            step = seed ? (int64_t)(lots.next() % (uint64_t)n) : 1;
    auto divisor = [](int64_t a, int64_t b) { while (b) { int64_t c = a % b; a = b; b = c; } return a; };
    if (step == 0) step = 1;
    while (divisor(step, n) != 1) step++;
    (void)threads; // without OpenMP
    #pragma omp parallel for schedule(dynamic, 1) if (n > 1 && threads > 2048)
    for (int64_t i = 0; i < n; i++) {
        uint64_t at = (uint64_t)(((__int128)i * step + from) % n), x = g->blocks.x, y = g->blocks.y;
        run_block(g, {(unsigned)(at % x), (unsigned)(at / x % y), (unsigned)(at / x / y)});
    }
}

} // namespace emulate

// ----------------------------------------------------------------------------
// the words of a kernel

#define threadIdx (emulate::current->index)
#define blockIdx (emulate::runner->block)
#define blockDim (emulate::runner->size)
#define gridDim (emulate::runner->blocks)
enum { warpSize = 32 };

#define EMULATED_PLACE emulate::Place{file, line}
#define EMULATED_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATED_HERE) { emulate::barrier("__syncthreads", EMULATED_PLACE, 0, 0, 0); }
inline int __syncthreads_count(int yes, EMULATED_HERE) {
    return emulate::barrier("__syncthreads_count", EMULATED_PLACE, 0, 0, yes);
}
inline int __syncthreads_or(int yes, EMULATED_HERE) {
    return emulate::barrier("__syncthreads_or", EMULATED_PLACE, 0, 0, yes) > 0;
}
inline int __syncthreads_and(int yes, EMULATED_HERE) {
    return emulate::barrier("__syncthreads_and", EMULATED_PLACE, 0, 0, yes) == emulate::runner->n_threads;
}
// PTX's bar.sync: `threads` of the block
inline void barrier_sync(int id, int threads, EMULATED_HERE) {
    if (threads <= 0 || threads % emulate::WARP)
        emulate::fault(EMULATED_PLACE, "bar.sync of %d threads", threads);
    emulate::barrier("bar.sync", EMULATED_PLACE, id, threads, 0);
}
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu, EMULATED_HERE) {
    emulate::meet("__syncwarp", EMULATED_PLACE, mask, NULL, NULL);
}
inline void __threadfence(void) {}
inline void __threadfence_block(void) {}
inline void __threadfence_system(void) {}
inline uint32_t __activemask(void) {
    return emulate::runner->warps[emulate::current->number / emulate::WARP].here;
}

namespace emulate {

// What a lane brings to an exchange, and takes from it. from: the lane whose value it wants.
struct Exchange { uint64_t value, taken; int from; };
inline void exchange_all(Thread *lanes, uint32_t here) {
    for (uint32_t rest = here; rest; rest &= rest - 1) {
        Thread *t = lanes + __builtin_ctz(rest);
        Exchange *own = (Exchange *)t->brought;
        if (!(here >> own->from & 1))
            fault(t->place, "%s: lane %d wants the value of lane %d, which is not there", t->what, t->lane,
                  own->from);
        own->taken = ((Exchange *)lanes[own->from].brought)->value;
    }
}
template <typename V> inline V exchange(const char *what, Place place, uint32_t mask, V value, int from) {
    static_assert(sizeof(V) <= 8 && std::is_trivially_copyable<V>::value, "a shuffle takes up to 8 bytes");
    Exchange own = {0, 0, from};
    memcpy(&own.value, &value, sizeof(V));
    meet(what, place, mask, &own, exchange_all);
    memcpy(&value, &own.taken, sizeof(V));
    return value;
}
// The lane `to` if it is within the same `width` lanes as this one, else this one.
inline int lane_within(int to, int width) {
    int lane = current->lane, base = lane & ~(width - 1);
    return to >= base && to < base + width ? to : lane;
}
struct Vote { uint64_t value, result; };
template <typename F> inline uint64_t vote(const char *what, Place place, uint32_t mask, uint64_t value, F) {
    Vote own = {value, 0};
    meet(what, place, mask, &own, [](Thread *lanes, uint32_t here) { // F keeps nothing: it is made again
        uint64_t result = F::begin();
        for (uint32_t rest = here; rest; rest &= rest - 1) {
            int lane = __builtin_ctz(rest);
            result = F::add(result, ((Vote *)lanes[lane].brought)->value, lane);
        }
        for (uint32_t rest = here; rest; rest &= rest - 1)
            ((Vote *)lanes[__builtin_ctz(rest)].brought)->result = result;
    });
    return own.result;
}
struct Ballot {
    static uint64_t begin(void) { return 0; }
    static uint64_t add(uint64_t all, uint64_t one, int lane) { return all | (uint64_t)(one != 0) << lane; }
};
#define EMULATED_REDUCTION(Name, first, formula) \
    template <typename V> struct Name { \
        static uint64_t begin(void) { return (uint64_t)(V)(first); } \
        static uint64_t add(uint64_t all, uint64_t one, int) { \
            V a = (V)all, b = (V)one; \
            return (uint64_t)(V)(formula); \
        } \
    };
EMULATED_REDUCTION(Add, 0, a + b)
EMULATED_REDUCTION(And, ~(V)0, a & b)
EMULATED_REDUCTION(Or, 0, a | b)
EMULATED_REDUCTION(Xor, 0, a ^ b)
EMULATED_REDUCTION(Min, std::is_signed<V>::value ? (V)0x7FFFFFFF : (V)0xFFFFFFFF, a < b ? a : b)
EMULATED_REDUCTION(Max, std::is_signed<V>::value ? (V)0x80000000 : (V)0, a > b ? a : b)

} // namespace emulate

template <typename V> inline V __shfl_sync(uint32_t mask, V value, int from, int width = 32, EMULATED_HERE) {
    int lane = emulate::current->lane, base = lane & ~(width - 1);
    return emulate::exchange("__shfl_sync", EMULATED_PLACE, mask, value, base + (from & (width - 1)));
}
template <typename V>
inline V __shfl_xor_sync(uint32_t mask, V value, int other, int width = 32, EMULATED_HERE) {
    int to = emulate::current->lane ^ other, base = emulate::current->lane & ~(width - 1);
    if (to >= base + width) to = emulate::current->lane;
    return emulate::exchange("__shfl_xor_sync", EMULATED_PLACE, mask, value, to);
}
template <typename V>
inline V __shfl_up_sync(uint32_t mask, V value, unsigned by, int width = 32, EMULATED_HERE) {
    int from = emulate::lane_within(emulate::current->lane - (int)by, width);
    return emulate::exchange("__shfl_up_sync", EMULATED_PLACE, mask, value, from);
}
template <typename V>
inline V __shfl_down_sync(uint32_t mask, V value, unsigned by, int width = 32, EMULATED_HERE) {
    int from = emulate::lane_within(emulate::current->lane + (int)by, width);
    return emulate::exchange("__shfl_down_sync", EMULATED_PLACE, mask, value, from);
}
inline uint32_t __ballot_sync(uint32_t mask, int yes, EMULATED_HERE) {
    return (uint32_t)emulate::vote("__ballot_sync", EMULATED_PLACE, mask, yes != 0, emulate::Ballot());
}
inline int __any_sync(uint32_t mask, int yes, EMULATED_HERE) {
    return emulate::vote("__any_sync", EMULATED_PLACE, mask, yes != 0, emulate::Or<uint32_t>()) != 0;
}
inline int __all_sync(uint32_t mask, int yes, EMULATED_HERE) {
    return emulate::vote("__all_sync", EMULATED_PLACE, mask, yes != 0, emulate::And<uint32_t>()) != 0;
}
#define EMULATED_REDUCE(name, Name) \
    template <typename V> inline V __reduce_##name##_sync(uint32_t mask, V value, EMULATED_HERE) { \
        static_assert(sizeof(V) == 4, "int or unsigned"); \
        return (V)emulate::vote("__reduce_" #name "_sync", EMULATED_PLACE, mask, (uint64_t)value, \
                                emulate::Name<V>()); \
    }
EMULATED_REDUCE(add, Add)
EMULATED_REDUCE(and, And)
EMULATED_REDUCE(or, Or)
EMULATED_REDUCE(xor, Xor)
EMULATED_REDUCE(min, Min)
EMULATED_REDUCE(max, Max)
#endif
