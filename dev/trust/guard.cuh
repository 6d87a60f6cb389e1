// In a build for tests (-DGUARD_BANDS) GUARD known bytes lie behind every buffer of the device's memory; bands says
// where, and whose. Without, there are none. They are NaN as numbers: who reads there shows as well.
#ifdef GUARD_BANDS
enum { GUARD = 1024, GUARD_BYTE = 0xFF, MOST_BANDS = 1 << 16 };
typedef struct { const char *at; size_t bytes; char name[40]; } Band;
static Band bands[MOST_BANDS];
static int n_bands, n_broken; // bands there are; those found written to
static void guard(const void *from, const void *end, const char *name, int layer) {
    must_fit(n_bands + 1, MOST_BANDS, "guard bands");
    Band *band = &bands[n_bands++];
    band->at = (const char *)from;
    band->bytes = (size_t)((const char *)end - (const char *)from);
    snprintf(band->name, sizeof(band->name), layer < 0 ? "%.30s" : "%.25s %d", name, layer);
    CUDA(cudaMemset((void *)from, GUARD_BYTE, band->bytes));
}
static int broken(const Band *band) {
    unsigned char bytes[2 * GUARD];
    for (size_t at = 0; at < band->bytes; at += sizeof(bytes)) {
        size_t n = band->bytes - at < sizeof(bytes) ? band->bytes - at : sizeof(bytes);
        CUDA(cudaMemcpy(bytes, band->at + at, n, cudaMemcpyDeviceToHost));
        for (size_t b = 0; b < n; b++) if (bytes[b] != GUARD_BYTE) return 1;
    }
    return 0;
}
// The memory from .. from+bytes is given back: its bands are looked at, one line for each that was written to.
static void unguard(const void *from, size_t bytes) {
    int kept = 0;
    CUDA(cudaDeviceSynchronize());
    for (int i = 0; i < n_bands; i++) {
        if (bands[i].at < (const char *)from || bands[i].at >= (const char *)from + bytes) bands[kept++] = bands[i];
        else if (broken(&bands[i])) {
            n_broken++;
            fprintf(stderr, "train_sessa: CUDA: written behind %s\n", bands[i].name);
        }
    }
    n_bands = kept;
}
#else
enum { GUARD = 0 };
static void guard(const void *, const void *, const char *, int) {}
static void unguard(const void *, size_t) {}
#endif
