// Instructions of tensor cores from sm_80 on, a warp's, and copies to shared memory that go on by themselves.
// All lanes of a warp execute a matrix instruction together. On a machine without a GPU dev/trust/emulate
// has them.
#ifndef SESSA_EMULATED
// Four matrices of 8 rows and columns of 16 bits: lane l says where in shared memory row l%8 of number l/8
// is, and gets of each the numbers 2(l%4) and the next of row l/4; transposed, these rows of column l/4.
__device__ static inline void ldmatrix_x4(uint32_t r[4], const void *shared_row) {
    uint32_t at = (uint32_t)__cvta_generic_to_shared(shared_row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
__device__ static inline void ldmatrix_x4_trans(uint32_t r[4], const void *shared_row) {
    uint32_t at = (uint32_t)__cvta_generic_to_shared(shared_row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
// c (16,8) += a (16,16) · b (16,8). Lane l has of c the rows l/4 (0, 1) and l/4 + 8 (2, 3), columns 2(l%4)
// and the next; of a the same rows in turn, columns 2(l%4) and the next (0, 1), and those 8 further (2, 3); of b
// column l/4, rows 2(l%4) and the next, and those 8 further.
__device__ static inline void mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// 16 bytes of which all but the first `bytes` (0 or 16) are 0; there once they are waited for
__device__ static inline void copy_async_16(void *shared, const void *global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global), "r"(bytes)
                 : "memory");
}
__device__ static inline void copy_async_commit(void) {
    asm volatile("cp.async.commit_group;" : : : "memory");
}
template <int LATER> __device__ inline void copy_async_wait(void) { // for all but the last LATER groups
    asm volatile("cp.async.wait_group %0;" : : "n"(LATER) : "memory");
}
__device__ static inline void copy_async_wait_all(void) { asm volatile("cp.async.wait_all;" : : : "memory"); }
// into the L2 cache
__device__ static inline void prefetch_l2(const void *global) {
    asm volatile("prefetch.global.L2 [%0];" : : "l"(global));
}
#endif
