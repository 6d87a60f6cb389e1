// cuBLASLt's product, as far as the twin asks for it: out = alpha op(A) op(B) + beta C + bias, by columns, in
// batches, of bfloat16 or float32 numbers, sums in float32. Sums go from the first product to the last.
#ifndef EMULATE_CUBLASLT_H
#define EMULATE_CUBLASLT_H
#include "cuda_bf16.h"
#include "cuda_runtime.h"

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_NOT_SUPPORTED = 15
};
enum cudaDataType { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_FAST_TF32 = 77 };
enum { CUBLAS_OP_N, CUBLAS_OP_T };
enum { CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_BIAS = 4 };
enum { CUBLASLT_POINTER_MODE_HOST, CUBLASLT_POINTER_MODE_DEVICE };
enum { CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2, CUBLASLT_MATMUL_TILE_128x128 = 20 };
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_POINTER_MODE = 2,
    CUBLASLT_MATMUL_DESC_TRANSA = 3,
    CUBLASLT_MATMUL_DESC_TRANSB = 4,
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8
};
enum cublasLtMatrixLayoutAttribute_t {
    CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT = 5,
    CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET = 6
};
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8
};
enum cublasLtMatmulAlgoConfigAttributes_t { CUBLASLT_ALGO_CONFIG_TILE_ID = 1 };

struct cublasLtMatmulDescOpaque_t {
    int tf32, a_transposed, b_transposed, biased, on_device;
    const void *bias;
};
struct cublasLtMatrixLayoutOpaque_t { int bytes, batch; int64_t rows, cols, ld, step; };
struct cublasLtMatmulPreferenceOpaque_t { uint64_t workspace; uint32_t alignments[4]; };
struct cublasLtMatmulAlgo_t { uint64_t workspace; };
struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
};
typedef cublasLtMatmulDescOpaque_t *cublasLtMatmulDesc_t;
typedef cublasLtMatrixLayoutOpaque_t *cublasLtMatrixLayout_t;
typedef cublasLtMatmulPreferenceOpaque_t *cublasLtMatmulPreference_t;
typedef void *cublasLtHandle_t;

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
    *handle = handle;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescInit(cublasLtMatmulDesc_t d, cublasComputeType_t compute,
                                             cudaDataType) {
    *d = {};
    d->tf32 = compute == CUBLAS_COMPUTE_32F_FAST_TF32;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d,
                                                     cublasLtMatmulDescAttributes_t what, const void *value,
                                                     size_t bytes) {
    int32_t number = 0;
    if (bytes == sizeof(number)) memcpy(&number, value, sizeof(number));
    switch (what) {
    case CUBLASLT_MATMUL_DESC_POINTER_MODE: d->on_device = number == CUBLASLT_POINTER_MODE_DEVICE; break;
    case CUBLASLT_MATMUL_DESC_TRANSA: d->a_transposed = number == CUBLAS_OP_T; break;
    case CUBLASLT_MATMUL_DESC_TRANSB: d->b_transposed = number == CUBLAS_OP_T; break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE: d->biased = number == CUBLASLT_EPILOGUE_BIAS; break;
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
        if (bytes != sizeof(d->bias)) return CUBLAS_STATUS_INVALID_VALUE;
        memcpy(&d->bias, value, bytes);
        break;
    }
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutInit(cublasLtMatrixLayout_t m, cudaDataType type, uint64_t rows,
                                               uint64_t cols, int64_t ld) {
    *m = {type == CUDA_R_16BF ? 2 : 4, 1, (int64_t)rows, (int64_t)cols, ld, 0};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t m,
                                                       cublasLtMatrixLayoutAttribute_t what,
                                                       const void *value, size_t bytes) {
    if (what == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT && bytes == sizeof(m->batch))
        memcpy(&m->batch, value, bytes);
    else if (what == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET && bytes == sizeof(m->step))
        memcpy(&m->step, value, bytes);
    else return CUBLAS_STATUS_INVALID_VALUE;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceInit(cublasLtMatmulPreference_t p) {
    *p = {};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                           cublasLtMatmulPreferenceAttributes_t what,
                                                           const void *value, size_t bytes) {
    uint32_t number = 0;
    if (bytes == sizeof(number)) memcpy(&number, value, sizeof(number));
    if (what == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) memcpy(&p->workspace, value, sizeof(p->workspace));
    else if (what >= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES)
        p->alignments[what - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES] = number;
    return CUBLAS_STATUS_SUCCESS;
}

// One way, or none where a bfloat16 matrix begins at an odd number. Small products with long sums say that
// they leave most of the device idle, and take some workspace if they may.
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t d,
                                                     cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t, cublasLtMatrixLayout_t out,
                                                     cublasLtMatmulPreference_t p, int,
                                                     cublasLtMatmulHeuristicResult_t results[], int *found) {
    int64_t K = d->a_transposed ? a->rows : a->cols;
    int small = out->rows * out->cols <= 4096 && K >= 64;
    *found = 0;
    for (uint32_t alignment : p->alignments) if (alignment < 4) return CUBLAS_STATUS_NOT_SUPPORTED;
    if ((a->bytes == 2 && a->ld % 2) || (b->bytes == 2 && b->ld % 2)) return CUBLAS_STATUS_NOT_SUPPORTED;
    size_t workspace = !small ? 0 : p->workspace < 1 << 16 ? p->workspace : 1 << 16;
    results[0] = {{workspace}, workspace, CUBLAS_STATUS_SUCCESS, small ? 0.5f : 1};
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t *,
                                                           cublasLtMatmulAlgoConfigAttributes_t, void *value,
                                                           size_t bytes, size_t *written) {
    memset(value, 0, bytes);
    *written = bytes;
    return CUBLAS_STATUS_SUCCESS;
}

namespace emulate {

// Number i of a matrix, as the product reads it.
inline float number_at(const void *at, int bytes, int64_t i, int tf32) {
    if (bytes == 2) return (float)((const __nv_bfloat16 *)at)[i];
    float x = ((const float *)at)[i];
    return tf32 ? __uint_as_float(cvt_tf32(x)) : x;
}
// rows (n,K): op(matrix)^T or op(matrix), such that the sum goes along a row
inline void pack_rows(float *rows, const void *at, const cublasLtMatrixLayoutOpaque_t *m, int64_t from,
                      int64_t n, int64_t K, int along_columns, int tf32) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t k = 0; k < K; k++)
            rows[i * K + k] =
                number_at(at, m->bytes, from + (along_columns ? i * m->ld + k : k * m->ld + i), tf32);
}
struct ProductCall {
    cublasLtMatmulDescOpaque_t d;
    cublasLtMatrixLayoutOpaque_t a, b, out;
    const void *a_at, *b_at, *bias;
    void *out_at;
    const float *alpha_at, *beta_at; // in the device's memory, or NULL
    float alpha, beta;
    char *workspace;
    size_t workspace_bytes;
};
// Columns j of out, each a row of ours; 8 of its numbers at once, each sum in order.
inline void multiply(ProductCall p) {
    int64_t M = p.out.rows, N = p.out.cols, K = p.d.a_transposed ? p.a.rows : p.a.cols;
    if (p.alpha_at) { p.alpha = *p.alpha_at; p.beta = *p.beta_at; }
    if (p.workspace_bytes) fill_unset(p.workspace, p.workspace_bytes); // whoever has something there loses it
    #pragma omp parallel if (M * N * K * p.out.batch > 200000)
    {
        std::vector<float> left, row((size_t)K), sums((size_t)M);
        int64_t left_of = -1, n_items = p.out.batch * N;
        #pragma omp for schedule(static)
        for (int64_t item = 0; item < n_items; item++) {
            int64_t batch = item / N, j = item % N;
            if (left_of != batch) { // (K,M)
                left.resize((size_t)(K * M));
                for (int64_t k = 0; k < K; k++)
                    for (int64_t i = 0; i < M; i++)
                        left[(size_t)(k * M + i)] =
                            number_at(p.a_at, p.a.bytes,
                                      batch * p.a.step + (p.d.a_transposed ? i * p.a.ld + k : k * p.a.ld + i),
                                      p.d.tf32);
                left_of = batch;
            }
            for (int64_t k = 0; k < K; k++)
                row[(size_t)k] = number_at(p.b_at, p.b.bytes, batch * p.b.step +
                                           (p.d.b_transposed ? k * p.b.ld + j : j * p.b.ld + k), p.d.tf32);
            for (int64_t i = 0; i < M; i++) sums[(size_t)i] = 0;
            for (int64_t k = 0; k < K; k++) {
                const float *a = &left[(size_t)(k * M)];
                float b = row[(size_t)k], *s = sums.data();
                for (int64_t i = 0; i < M; i++) s[i] += a[i] * b;
            }
            for (int64_t i = 0; i < M; i++) {
                int64_t at = batch * p.out.step + j * p.out.ld + i;
                float v = p.alpha * sums[(size_t)i];
                if (p.beta != 0) v += p.beta * number_at(p.out_at, p.out.bytes, at, 0);
                if (p.bias) v += number_at(p.bias, p.out.bytes, i, 0);
                if (p.out.bytes == 2) ((__nv_bfloat16 *)p.out_at)[at] = __nv_bfloat16(v);
                else ((float *)p.out_at)[at] = v;
            }
        }
    }
}

} // namespace emulate

inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void *alpha,
                                     const void *a_at, cublasLtMatrixLayout_t a, const void *b_at,
                                     cublasLtMatrixLayout_t b, const void *beta, const void *c_at,
                                     cublasLtMatrixLayout_t, void *out_at, cublasLtMatrixLayout_t out,
                                     const cublasLtMatmulAlgo_t *algo, void *workspace, size_t bytes,
                                     cudaStream_t stream) {
    int64_t M = out->rows, N = out->cols, K = d->a_transposed ? a->rows : a->cols;
    int64_t rows = d->a_transposed ? a->cols : a->rows, cols = d->b_transposed ? b->rows : b->cols,
            b_K = d->b_transposed ? b->cols : b->rows;
    if (c_at != out_at || rows != M || cols != N || b_K != K || a->ld < a->rows || b->ld < b->rows ||
        out->ld < M || a->batch != out->batch || b->batch != out->batch || algo->workspace > bytes ||
        a->bytes != b->bytes || (d->biased && !d->bias))
        return CUBLAS_STATUS_INVALID_VALUE;
    emulate::ProductCall call = {*d,
                                 *a,
                                 *b,
                                 *out,
                                 a_at,
                                 b_at,
                                 d->biased ? d->bias : NULL,
                                 out_at,
                                 NULL,
                                 NULL,
                                 0,
                                 0,
                                 (char *)workspace,
                                 (size_t)algo->workspace};
    if (d->on_device) { call.alpha_at = (const float *)alpha; call.beta_at = (const float *)beta; }
    else { call.alpha = *(const float *)alpha; call.beta = *(const float *)beta; }
    emulate::submit(stream, [call] { emulate::multiply(call); });
    return CUBLAS_STATUS_SUCCESS;
}
#endif
