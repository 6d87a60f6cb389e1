// The instructions that C++ has no word for, by the names under which the twin writes them in PTX.
#ifndef EMULATE_INSTRUCTIONS_H
#define EMULATE_INSTRUCTIONS_H

namespace emulate {

inline uint32_t word_of(const void *at) { uint32_t word; memcpy(&word, at, 4); return word; }
inline float low_of(uint32_t two) { return __uint_as_float(two << 16); }
inline float high_of(uint32_t two) { return __uint_as_float(two & 0xFFFF0000u); }

// `bytes` at a multiple of 16 within the block's shared memory
inline void check_shared(const void *at, size_t bytes, const char *what, Place place) {
    Runner *r = runner;
    if ((uintptr_t)at % 16) fault(place, "%s: %p is no multiple of 16", what, at);
    const char *from = (const char *)at, *end = from + bytes;
    if (from >= r->shared && end <= r->dynamic_end) return;
    for (int i = 0; i < r->n_statics; i++)
        if (from >= r->statics[i].at && end <= r->statics[i].at + r->statics[i].bytes) return;
    fault(place, "%s: %ld bytes behind the beginning of shared memory there are no %zu", what,
          (long)(from - r->shared), bytes);
}

struct Rows { const void *row; uint32_t *registers; };
// Matrix m of 8 rows and columns has the rows of lanes 8m .. 8m+7. Lane l gets two neighbours of row l/4,
// from column 2(l%4); transposed, two of column l/4, from row 2(l%4).
template <int TRANSPOSED> inline void load_matrices(Thread *lanes, uint32_t) {
    for (int lane = 0; lane < WARP; lane++)
        check_shared(((Rows *)lanes[lane].brought)->row, 16, lanes[lane].what, lanes[lane].place);
    for (int lane = 0; lane < WARP; lane++)
        for (int m = 0; m < 4; m++) {
            auto number = [&](int r, int c) {
                uint16_t bits;
                memcpy(&bits, (const char *)((Rows *)lanes[8 * m + r].brought)->row + 2 * c, 2);
                return (uint32_t)bits;
            };
            int i = lane / 4, j = lane % 4 * 2;
            ((Rows *)lanes[lane].brought)->registers[m] =
                TRANSPOSED ? number(j, i) | number(j + 1, i) << 16 : number(i, j) | number(i, j + 1) << 16;
        }
}
struct Product { float *c; const uint32_t *a, *b; };
// c (16,8) += a (16,16) · b (16,8). With g = lane/4 and t = 2(lane%4) a lane holds of
//     a  rows g, g+8, g, g+8 in columns t, t, t+8, t+8, and the column behind each in the upper half
//     b  column g, rows t and t+8, and the row behind each in the upper half
//     c  row g in columns t and t+1, then row g+8
inline void multiply_matrices(Thread *lanes, uint32_t) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < WARP; lane++) {
        const Product *p = (const Product *)lanes[lane].brought;
        int g = lane / 4, t = lane % 4 * 2;
        for (int i = 0; i < 4; i++) {
            a[g + i % 2 * 8][t + i / 2 * 8] = low_of(p->a[i]);
            a[g + i % 2 * 8][t + i / 2 * 8 + 1] = high_of(p->a[i]);
        }
        for (int i = 0; i < 2; i++) {
            b[t + i * 8][g] = low_of(p->b[i]);
            b[t + i * 8 + 1][g] = high_of(p->b[i]);
        }
    }
    for (int lane = 0; lane < WARP; lane++) {
        float *c = ((const Product *)lanes[lane].brought)->c;
        for (int e = 0; e < 4; e++) {
            int i = lane / 4 + e / 2 * 8, j = lane % 4 * 2 + e % 2;
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += a[i][k] * b[k][j];
            c[e] += sum;
        }
    }
}
inline void whole_warp(const char *what, Place place, void *brought, void (*all)(Thread *, uint32_t)) {
    if (runner->warps[current->number / WARP].all != 0xFFFFFFFFu)
        fault(place, "%s: the warp has less than 32 lanes", what);
    meet(what, place, 0xFFFFFFFFu, brought, all);
}

// What is to arrive is taken from its place now or when it arrives, by lot: nobody may write there meanwhile.
inline void arrive(const Copy &copy) {
    memset(copy.to, 0, 16);
    if (copy.bytes) memcpy(copy.to, copy.from, (size_t)copy.bytes);
}
inline void arrive_up_to(int group) {
    perhaps_make_way();
    std::vector<Copy> &copies = current->copies;
    size_t kept = 0;
    for (size_t i = 0; i < copies.size(); i++)
        if (copies[i].group < group) arrive(copies[i]);
        else copies[kept++] = copies[i];
    copies.resize(kept);
}

} // namespace emulate

// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16
inline void ldmatrix_x4(uint32_t r[4], const void *shared_row, EMULATED_HERE) {
    emulate::Rows own = {shared_row, r};
    emulate::whole_warp("ldmatrix_x4", EMULATED_PLACE, &own, emulate::load_matrices<0>);
}
inline void ldmatrix_x4_trans(uint32_t r[4], const void *shared_row, EMULATED_HERE) {
    emulate::Rows own = {shared_row, r};
    emulate::whole_warp("ldmatrix_x4_trans", EMULATED_PLACE, &own, emulate::load_matrices<1>);
}
// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32: c += a·b
inline void mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2], EMULATED_HERE) {
    emulate::Product own = {c, a, b};
    emulate::whole_warp("mma_bf16", EMULATED_PLACE, &own, emulate::multiply_matrices);
}

// cp.async.cg.shared.global, 16 bytes of which the last 16 - bytes are 0: until it is waited for, what stands
// there is nothing
inline void copy_async_16(void *shared, const void *global, int bytes, EMULATED_HERE) {
    emulate::check_shared(shared, 16, "cp.async", EMULATED_PLACE);
    if ((uintptr_t)global % 16) emulate::fault(EMULATED_PLACE, "cp.async from %p, no multiple of 16", global);
    if (bytes < 0 || bytes > 16) emulate::fault(EMULATED_PLACE, "cp.async of %d bytes", bytes);
    if (bytes) (void)*(const volatile char *)global;
    emulate::current->place = EMULATED_PLACE;
    emulate::fill_unset((char *)shared, 16);
    emulate::current->copies.push_back(
        {(char *)shared, (const char *)global, bytes, emulate::current->groups});
    emulate::perhaps_make_way();
}
inline void copy_async_commit(void) { emulate::current->groups++; }
template <int N> inline void copy_async_wait(void) { emulate::arrive_up_to(emulate::current->groups - N); }
inline void copy_async_wait_all(void) { emulate::arrive_up_to(emulate::current->groups + 1); }

// ld.global.nc.v4.u32
inline uint4 load_16_ahead(const void *global, EMULATED_HERE) {
    if ((uintptr_t)global % 16) emulate::fault(EMULATED_PLACE, "a read of 16 bytes at %p", global);
    uint4 all;
    memcpy(&all, global, 16);
    return all;
}
inline void prefetch_l2(const void *) {}
// cvt.rna.tf32.f32: ten bits behind the point, the nearest, ties away from zero
inline uint32_t cvt_tf32(float x) {
    uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7FFFFFFF : (bits & 0x7F800000) == 0x7F800000 ? bits : (bits + 0x1000) & 0xFFFFE000u;
}
inline float exp2_fast(float x) { return exp2f(x); }
#endif
