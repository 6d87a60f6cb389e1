// attention in tiles: bf16 with heads of up to 128 columns. Weights never leave the registers; the backward
// pass computes them again from the row's log-sum-exp, once for dq and once for dk and dv, so that each sum
// has one owner.
//
// A block keeps 64 rows of one side for each of its groups of warps but the last, which has one thread at
// work: it has the other side's tiles copied into a ring of SLOTS, each as soon as all groups have done
// with what was there. A block a multiprocessor stays for many such pieces of work; the rows of the next
// one arrive, in the other of two places, while groups still work on this one.

// The block's next piece: its head, and as result its place among the head's `blocks` pieces, the longest
// first; -1: no more. Some heads at a time, whose keys and values stay in the L2 cache, take whole turns of
// all blocks; their pieces are in order of length, there and back, so that all blocks get as much.
[[maybe_unused]] __device__ static inline int next_piece(int &turn, int &head, int blocks, int heads,
                                                         int at_once) {
    for (int turns = (blocks * at_once + gridDim.x - 1) / gridDim.x;; turn++) {
        int group = turn / turns, now = min(at_once, heads - group * at_once),
            backwards = (group + turn % turns) % 2,
            piece = turn % turns * gridDim.x + (backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        if (now <= 0) return -1;
        if (piece >= blocks * now) continue;
        turn++;
        head = group * at_once + piece % now;
        return piece / now;
    }
}
static int heads_at_once(int heads, int T, int d) { // 24 MiB of keys and values
    while (heads % 2 == 0 && (int64_t)heads * T * d > 6 << 20) heads /= 2;
    return heads;
}

// The rows stay, the walk is along the keys, 128 at a time; the ring holds K0 K1 V0 K2 V1 ..., for a group
// starts on the next tile's logits before it multiplies this tile's weights with the values, and works on
// the softmax meanwhile. stats: the logarithm of Σ exp in units of log2, and room for the backward pass.
enum { TILE_KEYS = 128, SLOTS = 5 };
template <int DH> struct ForwardShared {
    enum { GROUPS = DH == 64 ? 3 : 2, ROWS = 64 * GROUPS };
    bf16 q[2][DH / ATOM][ROWS][ATOM], ring[SLOTS][DH / ATOM][TILE_KEYS][ATOM];
    uint64_t q_full[2], q_free[2], full[SLOTS], free[SLOTS];
};
template <int DH>
__global__ void __launch_bounds__(GROUP *(ForwardShared<DH>::GROUPS + 1), 1)
    attention_tile_kernel(const __grid_constant__ CUtensorMap q_map,
                          const __grid_constant__ CUtensorMap k_map,
                          const __grid_constant__ CUtensorMap v_map, bf16 *out, float2 *stats, int B, int T,
                          int H, int G, int d, int first, int at_once, float scale) {
#ifdef HOPPER
    enum { GROUPS = ForwardShared<DH>::GROUPS, ROWS = 64 * GROUPS };
    extern __shared__ __align__(1024) unsigned char shared_tiles[];
    ForwardShared<DH> *s = (ForwardShared<DH> *)shared_tiles;
    int rows = T - first, group = threadIdx.x / GROUP, blocks = (rows + ROWS - 1) / ROWS, begun = 0, turn = 0,
        pieces = 0, piece, head;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            barrier_init(&s->q_full[i], 1);
            barrier_init(&s->q_free[i], 4 * GROUPS);
        }
        for (int i = 0; i < SLOTS; i++) { barrier_init(&s->full[i], 1); barrier_init(&s->free[i], GROUPS); }
    }
    barriers_ready();
    wait_for_results(0);
    auto tiles_before = [&](int row) { return (first + row + TILE_KEYS - 1) / TILE_KEYS; };
    if (group == GROUPS) {
        KEEP_REGISTERS("dec", DH == 64 ? 32 : 40);
        if (threadIdx.x % GROUP) return;
        for (; (piece = next_piece(turn, head, blocks, B * H, at_once)) >= 0; pieces++) {
            int end = rows - piece * ROWS, r0 = end > ROWS ? end - ROWS : 0, b = head / H, h = head % H,
                tiles = tiles_before(end), own = pieces % 2;
            if (pieces > 1) barrier_wait(&s->q_free[own], pieces / 2 - 1);
            barrier_expect(&s->q_full[own], sizeof(s->q[0]));
            for (int c = 0; c < DH / ATOM; c++)
                copy_tile(s->q[own][c][0], &q_map, c * ATOM, h, r0, b, &s->q_full[own]);
            for (int n = 0; n < 2 * tiles; n++, begun++) {
                int slot = begun % SLOTS, is_key = n == 0 || (n % 2 && n < 2 * tiles - 1),
                    tile = is_key ? (n + 1) / 2 : n % 2 ? tiles - 1 : n / 2 - 1;
                if (begun >= SLOTS) barrier_wait(&s->free[slot], begun / SLOTS - 1);
                barrier_expect(&s->full[slot], sizeof(s->ring[slot]));
                for (int c = 0; c < DH / ATOM; c++)
                    copy_tile(s->ring[slot][c][0], is_key ? &k_map : &v_map, c * ATOM, h / (H / G),
                              tile * TILE_KEYS, b, &s->full[slot]);
            }
        }
        return;
    }
    KEEP_REGISTERS("inc", DH == 64 ? 160 : 232);
    int lane = threadIdx.x % 32, group_row, row;
    float sum[DH / 8][4], max[2], total[2], shrink[2];
    uint32_t weights[TILE_KEYS / 16][4];
    typedef float Logits[TILE_KEYS / 8][4];
    auto done_with = [&](int item) {
        if (threadIdx.x % GROUP == 0) barrier_arrive(&s->free[(begun + item) % SLOTS]);
    };
    auto logits = [&](Logits &w, int tile) {
        int item = begun + (tile ? 2 * tile - 1 : 0);
        barrier_wait(&s->full[item % SLOTS], item / SLOTS);
        products_begin();
        product_transposed<DH, TILE_KEYS>(w, s->q[pieces % 2][0][64 * group], ROWS * ATOM,
                                     s->ring[item % SLOTS][0][0], TILE_KEYS * ATOM);
        products_commit();
    };
    // logits to weights with the new maximum; shrink: what that does to what was summed
    auto softmax = [&](Logits &w, int tile) {
        int j0 = tile * TILE_KEYS;
        if (j0 + TILE_KEYS - 1 > first + group_row)
            for (int n = 0; n < TILE_KEYS / 8; n++)
                for (int e = 0; e < 4; e++)
                    if (j0 + n * 8 + lane % 4 * 2 + e % 2 > first + row + e / 2 * 8) w[n][e] = -INFINITY;
        for (int half = 0; half < 2; half++) {
            float top = -INFINITY;
            for (int n = 0; n < TILE_KEYS / 8; n++)
                top = fmaxf(top, fmaxf(w[n][2 * half], w[n][2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(max[half], scale * fmaxf(top, __shfl_xor_sync(~0u, top, 2)));
            shrink[half] = exp2_fast(max[half] - top);
            max[half] = top;
            total[half] *= shrink[half];
            for (int n = 0; n < TILE_KEYS / 8; n++)
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    w[n][e] = exp2_fast(w[n][e] * scale - top);
                    total[half] += w[n][e];
                }
        }
    };
    auto read = [&](int number) {
        int item = begun + number;
        barrier_wait(&s->full[item % SLOTS], item / SLOTS);
        products_begin();
        product_plain<DH, TILE_KEYS>(sum, weights, s->ring[item % SLOTS][0][0]);
        products_commit();
    };
    for (; (piece = next_piece(turn, head, blocks, B * H, at_once)) >= 0; pieces++) {
        int end = rows - piece * ROWS; // the piece is cut off the end: the short one sees least
        group_row = (end > ROWS ? end - ROWS : 0) + 64 * group;
        row = group_row + threadIdx.x % GROUP / 32 * 16 + lane / 4;
        // tiles that the group's rows see
        int tiles = tiles_before(end), seen = min(tiles, tiles_before(group_row + 64));
        for (int half = 0; half < 2; half++) { max[half] = -INFINITY; total[half] = 0; }
        for (int n = 0; n < DH / 8; n++)
            for (int e = 0; e < 4; e++) sum[n][e] = 0;
        barrier_wait(&s->q_full[pieces % 2], pieces / 2);
        {
            Logits w;
            logits(w, 0);
            products_wait<0>();
            done_with(0);
            softmax(w, 0);
            as_operand<TILE_KEYS>(weights, w);
        }
        for (int tile = 1; tile < seen; tile++) {
            Logits w;
            logits(w, tile);
            read(2 * tile);
            products_wait<1>();
            done_with(2 * tile - 1);
            softmax(w, tile);
            products_wait<0>();
            done_with(2 * tile);
            for (int n = 0; n < DH / 8; n++)
                for (int e = 0; e < 4; e++) sum[n][e] *= shrink[e / 2];
            as_operand<TILE_KEYS>(weights, w);
        }
        int last = seen == tiles ? 2 * tiles - 1 : 2 * seen;
        read(last);
        products_wait<0>();
        done_with(last);
        // Tiles for the other groups. Who gives a slot back waits for it, and no other thread: a warp that comes
        // late, when the next round has arrived there, would wait for the one after that, and this for the warp.
        for (int tile = seen; tile < tiles && threadIdx.x % GROUP == 0; tile++)
            for (int value = 0; value < 2; value++) {
                int item = !value ? 2 * tile - 1 : tile == tiles - 1 ? 2 * tiles - 1 : 2 * tile + 2;
                barrier_wait(&s->full[(begun + item) % SLOTS], (begun + item) / SLOTS);
                done_with(item);
            }
        for (int half = 0; half < 2; half++) {
            int r = row + half * 8;
            total[half] += __shfl_xor_sync(~0u, total[half], 1);
            total[half] += __shfl_xor_sync(~0u, total[half], 2);
            if (lane % 4 == 0 && r < end)
                stats[(int64_t)head * rows + r] = {max[half] + log2f(total[half]), 0};
        }
        group_barrier(group);
        store_rows<DH>(out + ((int64_t)(head / H) * rows + group_row) * H * d + head % H * d, H * d, sum,
                       end - group_row, d, 1 / total[0], 1 / total[1], s->q[pieces % 2][0][64 * group],
                       ROWS * ATOM);
        rows_stored(&s->q_free[pieces % 2]);
        begun += 2 * tiles;
    }
#endif
}

// stats' second number: delta_t = do_t·o_t = Σ_j p_tj dp_tj. 8 lanes take row n of one head.
__global__ static void attention_delta_kernel(float2 *stats, const bf16 *dout, const bf16 *out, int B, int T,
                                              int H, int d) {
    wait_for_results();
    int64_t item = (int64_t)(gridDim.x - 1 - blockIdx.x) * 32 + threadIdx.x / 8;
    float sum = 0;
    if (item < (int64_t)B * T * H)
        for (int i = threadIdx.x % 8 * 8; i < d; i += 64) {
            float v[8], w[8];
            read_some<8>(v, dout + item * d + i);
            read_some<8>(w, out + item * d + i);
            for (int e = 0; e < 8; e++) sum += v[e] * w[e];
        }
    for (int lane = 4; lane; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
    int n = (int)(item / H), h = (int)(item % H);
    if (item < (int64_t)B * T * H && threadIdx.x % 8 == 0)
        stats[((int64_t)(n / T) * H + h) * T + n % T].y = sum;
}

// dq: 128 rows stay, the walk is along the keys, WALK at a time; a slot of the ring holds keys and values.
// The groups take turns by themselves: one computes weights while the other multiplies.
// dq: own are q and dout, ring keys and values; dk and dv the other way
template <int DH> struct BackwardShared {
    enum { WALK = DH == 64 ? 128 : 64, SLOTS = 3 };
    bf16 own[2][2][DH / ATOM][128][ATOM], ring[SLOTS][2][DH / ATOM][WALK][ATOM];
    float2 stats[SLOTS][WALK];
    uint64_t own_full[2], own_free[2], full[SLOTS], free[SLOTS];
};
template <int DH>
__global__ void __launch_bounds__(3 * GROUP, 1)
    attention_dq_kernel(const __grid_constant__ CUtensorMap q_map,
                        const __grid_constant__ CUtensorMap dout_map,
                        const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                        bf16 *dq, const float2 *stats, int ld, int B, int T, int H, int G, int d, int at_once,
                        float scale, float sigma) {
#ifdef HOPPER
    typedef BackwardShared<DH> Shared;
    enum { WALK = Shared::WALK, SLOTS = Shared::SLOTS, NEXT = WALK * ATOM };
    extern __shared__ __align__(1024) unsigned char shared_tiles[];
    Shared *s = (Shared *)shared_tiles;
    int group = threadIdx.x / GROUP, blocks = (T + 127) / 128, begun = 0, turn = 0, pieces = 0, piece, head;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) { barrier_init(&s->own_full[i], 1); barrier_init(&s->own_free[i], 8); }
        for (int i = 0; i < SLOTS; i++) { barrier_init(&s->full[i], 1); barrier_init(&s->free[i], 2); }
    }
    barriers_ready();
    wait_for_results(0);
    auto tiles_of = [&](int r0) { return (min(r0 + 128, T) + WALK - 1) / WALK; };
    if (group == 2) {
        KEEP_REGISTERS("dec", 40);
        if (threadIdx.x % GROUP) return;
        for (; (piece = next_piece(turn, head, blocks, B * H, at_once)) >= 0; pieces++) {
            int r0 = (blocks - 1 - piece) * 128, b = head / H, h = head % H, tiles = tiles_of(r0),
                own = pieces % 2;
            if (pieces > 1) barrier_wait(&s->own_free[own], pieces / 2 - 1);
            barrier_expect(&s->own_full[own], sizeof(s->own[0]));
            for (int c = 0; c < DH / ATOM; c++) {
                copy_tile(s->own[own][0][c][0], &q_map, c * ATOM, h, r0, b, &s->own_full[own]);
                copy_tile(s->own[own][1][c][0], &dout_map, c * ATOM, h, r0, b, &s->own_full[own]);
            }
            for (int n = 0; n < tiles; n++, begun++) {
                int slot = begun % SLOTS;
                if (begun >= SLOTS) barrier_wait(&s->free[slot], begun / SLOTS - 1);
                barrier_expect(&s->full[slot], sizeof(s->ring[slot]));
                for (int c = 0; c < DH / ATOM; c++) {
                    copy_tile(s->ring[slot][0][c][0], &k_map, c * ATOM, h / (H / G), n * WALK, b,
                              &s->full[slot]);
                    copy_tile(s->ring[slot][1][c][0], &v_map, c * ATOM, h / (H / G), n * WALK, b,
                              &s->full[slot]);
                }
            }
        }
        return;
    }
    KEEP_REGISTERS("inc", 232);
    int lane = threadIdx.x % 32;
    for (; (piece = next_piece(turn, head, blocks, B * H, at_once)) >= 0; pieces++) {
        int r0 = (blocks - 1 - piece) * 128, tiles = tiles_of(r0), group_row = r0 + 64 * group,
            row = group_row + threadIdx.x % GROUP / 32 * 16 + lane / 4;
        bf16 *own = s->own[pieces % 2][0][0][64 * group], *own_dout = s->own[pieces % 2][1][0][64 * group];
        float sum[DH / 8][4];
        uint32_t dlogits[WALK / 16][4];
        float2 known[2];
        for (int half = 0; half < 2; half++)
            known[half] = stats[(int64_t)head * T + min(row + half * 8, T - 1)];
        for (int n = 0; n < DH / 8; n++)
            for (int e = 0; e < 4; e++) sum[n][e] = 0;
        barrier_wait(&s->own_full[pieces % 2], pieces / 2);
        for (int tile = 0; tile < tiles; tile++, begun++) {
            int slot = begun % SLOTS, j0 = tile * WALK;
            barrier_wait(&s->full[slot], begun / SLOTS);
            const bf16 *keys = s->ring[slot][0][0][0], *values = s->ring[slot][1][0][0];
            float w[WALK / 8][4], dw[WALK / 8][4];
            products_begin();
            product_transposed<DH, WALK>(w, own, 128 * ATOM, keys, NEXT);
            products_commit();
            product_transposed<DH, WALK>(dw, own_dout, 128 * ATOM, values, NEXT);
            products_commit();
            products_wait<1>();
            if (tile && threadIdx.x % GROUP == 0) barrier_arrive(&s->free[(begun - 1) % SLOTS]);
            int masked = j0 + WALK - 1 > group_row;
            for (int n = 0; n < WALK / 8; n++)
                for (int e = 0; e < 4; e++) {
                    w[n][e] = exp2_fast(w[n][e] * scale - known[e / 2].x);
                    if (masked && j0 + n * 8 + lane % 4 * 2 + e % 2 > row + e / 2 * 8) w[n][e] = 0;
                }
            products_wait<0>();
            for (int n = 0; n < WALK / 8; n++)
                for (int e = 0; e < 4; e++) w[n][e] *= dw[n][e] - known[e / 2].y;
            as_operand<WALK>(dlogits, w);
            products_begin();
            product_plain<DH, WALK>(sum, dlogits, keys);
            products_commit();
        }
        products_wait<0>();
        group_barrier(group);
        if (threadIdx.x % GROUP == 0) barrier_arrive(&s->free[(begun - 1) % SLOTS]);
        store_rows<DH>(dq + ((int64_t)(head / H) * T + group_row) * ld + head % H * d, ld, sum, T - group_row,
                       d, sigma, sigma, own, 128 * ATOM);
        rows_stored(&s->own_free[pieces % 2]);
    }
#endif
}

#ifdef HOPPER
// A step of dk and dv. The matrices are those above transposed: keys down, rows across. A group has 64 keys
// and their values, a tile of WALK rows from r0 on: dv += w dout, and dlogits as left operand. free: the
// last step's tiles, if not NULL, whose products were still on their way.
template <int DH, int WALK>
__device__ inline void keys_step(float (&v_sum)[DH / 8][4], uint32_t (&dlogits)[WALK / 16][4],
                                 const bf16 *keys, const bf16 *values, const bf16 *queries, const bf16 *douts,
                                 const float2 *stats, int key, int r0, int masked, float scale,
                                 uint64_t *free) {
    enum { NEXT = WALK * ATOM };
    int lane = threadIdx.x % 32;
    float w[WALK / 8][4], dw[WALK / 8][4];
    products_begin();
    product_transposed<DH, WALK>(w, keys, 128 * ATOM, queries, NEXT);
    products_commit();
    products_wait<1>();
    if (free && threadIdx.x % GROUP == 0) barrier_arrive(free);
    products_begin();
    product_transposed<DH, WALK>(dw, values, 128 * ATOM, douts, NEXT);
    products_commit();
    products_wait<1>();
    for (int n = 0; n < WALK / 8; n++) {
        float4 rows = *(const float4 *)&stats[n * 8 + lane % 4 * 2];
        for (int e = 0; e < 4; e++) {
            w[n][e] = exp2_fast(w[n][e] * scale - (e % 2 ? rows.z : rows.x));
            if (masked && key + e / 2 * 8 > r0 + n * 8 + lane % 4 * 2 + e % 2) w[n][e] = 0;
        }
    }
    as_operand<WALK>(dlogits, w);
    products_begin();
    product_plain<DH, WALK>(v_sum, dlogits, douts);
    products_commit();
    products_wait<0>();
    for (int n = 0; n < WALK / 8; n++) { // the weights become the gradients of the logits
        float4 rows = *(const float4 *)&stats[n * 8 + lane % 4 * 2];
        for (int half = 0; half < 2; half++) {
            uint32_t *two = &dlogits[n / 2][n % 2 * 2 + half];
            *two = pack_two(__uint_as_float(*two << 16) * (dw[n][2 * half] - rows.y),
                            __uint_as_float(*two & 0xFFFF0000u) * (dw[n][2 * half + 1] - rows.w));
        }
    }
}
#endif

// dk and dv: 128 keys stay, the walk is along the rows of the group's heads that see them.
template <int DH>
__global__ void __launch_bounds__(3 * GROUP, 1)
    attention_dkv_kernel(const __grid_constant__ CUtensorMap q_map,
                         const __grid_constant__ CUtensorMap dout_map,
                         const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                         bf16 *dk, bf16 *dv, const float2 *stats, int ld, int B, int T, int H, int G, int d,
                         int at_once, float scale, float sigma) {
#ifdef HOPPER
    typedef BackwardShared<DH> Shared;
    enum { WALK = Shared::WALK, SLOTS = Shared::SLOTS };
    extern __shared__ __align__(1024) unsigned char shared_tiles[];
    Shared *s = (Shared *)shared_tiles;
    int group = threadIdx.x / GROUP, heads = H / G, blocks = (T + 127) / 128, begun = 0, turn = 0, pieces = 0,
        piece, head;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) { barrier_init(&s->own_full[i], 1); barrier_init(&s->own_free[i], 8); }
        for (int i = 0; i < SLOTS; i++) { barrier_init(&s->full[i], 32); barrier_init(&s->free[i], 2); }
    }
    barriers_ready();
    wait_for_results(0);
    auto tiles_of = [&](int j0) { return (T - j0 + WALK - 1) / WALK; };
    if (group == 2) {
        KEEP_REGISTERS("dec", 40);
        int lane = threadIdx.x % GROUP;
        if (lane >= 32) return;
        for (; (piece = next_piece(turn, head, blocks, B * G, at_once)) >= 0; pieces++) {
            int j0 = piece * 128, b = head / G, g = head % G, tiles = tiles_of(j0), own = pieces % 2;
            if (pieces > 1) barrier_wait(&s->own_free[own], pieces / 2 - 1);
            if (lane == 0) {
                barrier_expect(&s->own_full[own], sizeof(s->own[0]));
                for (int c = 0; c < DH / ATOM; c++) {
                    copy_tile(s->own[own][0][c][0], &k_map, c * ATOM, g, j0, b, &s->own_full[own]);
                    copy_tile(s->own[own][1][c][0], &v_map, c * ATOM, g, j0, b, &s->own_full[own]);
                }
            }
            for (int n = 0; n < heads * tiles; n++, begun++) {
                int slot = begun % SLOTS, h = g * heads + n / tiles, r0 = j0 + n % tiles * WALK;
                if (begun >= SLOTS) barrier_wait(&s->free[slot], begun / SLOTS - 1);
                for (int r = lane; r < WALK; r += 32) { // a row past the end has weights of 0
                    float2 known = {INFINITY, 0};
                    s->stats[slot][r] = r0 + r < T ? stats[((int64_t)b * H + h) * T + r0 + r] : known;
                }
                if (lane) { barrier_arrive(&s->full[slot]); continue; }
                barrier_expect(&s->full[slot], sizeof(s->ring[slot]));
                for (int c = 0; c < DH / ATOM; c++) {
                    copy_tile(s->ring[slot][0][c][0], &q_map, c * ATOM, h, r0, b, &s->full[slot]);
                    copy_tile(s->ring[slot][1][c][0], &dout_map, c * ATOM, h, r0, b, &s->full[slot]);
                }
            }
        }
        return;
    }
    KEEP_REGISTERS("inc", 232);
    int lane = threadIdx.x % 32;
    for (; (piece = next_piece(turn, head, blocks, B * G, at_once)) >= 0; pieces++) {
        int j0 = piece * 128, b = head / G, g = head % G, tiles = tiles_of(j0),
            key = j0 + 64 * group + threadIdx.x % GROUP / 32 * 16 + lane / 4;
        bf16 *own = s->own[pieces % 2][0][0][64 * group], *own_v = s->own[pieces % 2][1][0][64 * group];
        float k_sum[DH / 8][4], v_sum[DH / 8][4];
        uint32_t dlogits[WALK / 16][4];
        for (int n = 0; n < DH / 8; n++)
            for (int e = 0; e < 4; e++) k_sum[n][e] = v_sum[n][e] = 0;
        barrier_wait(&s->own_full[pieces % 2], pieces / 2);
        for (int step = 0; step < heads * tiles; step++, begun++) {
            int slot = begun % SLOTS, r0 = j0 + step % tiles * WALK, masked = r0 < j0 + 64 * group + 63;
            const bf16 *queries = s->ring[slot][0][0][0];
            barrier_wait(&s->full[slot], begun / SLOTS);
            keys_step<DH, WALK>(v_sum, dlogits, own, own_v, queries, s->ring[slot][1][0][0], s->stats[slot],
                                key, r0, masked, scale, step ? &s->free[(begun - 1) % SLOTS] : NULL);
            products_begin();
            product_plain<DH, WALK>(k_sum, dlogits, queries);
            products_commit();
        }
        products_wait<0>();
        group_barrier(group);
        if (threadIdx.x % GROUP == 0) barrier_arrive(&s->free[(begun - 1) % SLOTS]);
        int64_t place = ((int64_t)b * T + j0 + 64 * group) * ld + g * d;
        store_rows<DH>(dk + place, ld, k_sum, T - j0 - 64 * group, d, sigma, sigma, own, 128 * ATOM);
        store_rows<DH>(dv + place, ld, v_sum, T - j0 - 64 * group, d, 1, 1, own_v, 128 * ATOM);
        rows_stored(&s->own_free[pieces % 2]);
    }
#endif
}

// dq, dk and dv of sequences of up to 1024 rows, heads of up to 64 columns, each with keys of its own: 5
// products where the two kernels above need 7. A cluster of C blocks, one for each 128 keys, takes heads in
// pairs. Block `rank` has
//     of the first head the keys of block rank, which meet the tiles of 128 rows rank, rank+1, .. C-1,
//     of the second those of block C-1-rank, which meet the tiles C-1, C-2, .. C-1-rank:
// C+1 tiles, as many as every other, and at no time two blocks the same one. So a tile's dq goes round:
// block rank+1 passes what it has summed to block rank, whose next tile that is, there to the second group,
// and this to the first, each thread to the thread of its number. Where the tile has met all its keys the
// first group writes dq. Each sum has one order.
struct RingShared {
    enum { SLOTS = 2 };
    // own: keys and values of both heads
    bf16 own[2][2][128][ATOM], ring[SLOTS][2][128][ATOM], dlogits[2][2][64][ATOM];
    float4 sums[2][16][GROUP];                                                     // that came for each group
    float2 stats[SLOTS][128];
    uint64_t own_full[2], own_free[2], full[SLOTS], free[SLOTS], sums_full[2], sums_free[2];
};
__global__ void __launch_bounds__(3 * GROUP, 1)
    attention_ring_kernel(const __grid_constant__ CUtensorMap q_map,
                          const __grid_constant__ CUtensorMap dout_map,
                          const __grid_constant__ CUtensorMap k_map,
                          const __grid_constant__ CUtensorMap v_map, bf16 *dq, bf16 *dk, bf16 *dv,
                          const float2 *stats, int ld, int B, int T, int H, int d, float scale, float sigma) {
#ifdef HOPPER
    enum { SLOTS = RingShared::SLOTS, BYTES = sizeof(float4) * 16 * GROUP };
    extern __shared__ __align__(1024) unsigned char shared_tiles[];
    RingShared *s = (RingShared *)shared_tiles;
    int group = threadIdx.x / GROUP, C = (T + 127) / 128, rank = blockIdx.x % C, clusters = gridDim.x / C,
        begun = 0, turn = 0;
    if (threadIdx.x == 0)
        // of the second group's sums the bytes are counted, of the first's the four warps
        for (int i = 0; i < 2; i++) {
            barrier_init(&s->own_full[i], 1);
            barrier_init(&s->own_free[i], 8);
            barrier_init(&s->full[i], 32);
            barrier_init(&s->free[i], 2);
            barrier_init(&s->sums_full[i], i ? 1 : 4);
            barrier_init(&s->sums_free[i], 4);
        }
    barriers_ready();
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" : : : "memory");
    wait_for_results(0);
    auto first_key = [&](int second) { return 128 * (second ? C - 1 - rank : rank); };
    auto first_row = [&](int second, int step) { return 128 * (second ? C - 1 - step : rank + step); };
    auto steps_of = [&](int second) { return second ? rank + 1 : C - rank; };
    if (group == 2) {
        KEEP_REGISTERS("dec", 40);
        int lane = threadIdx.x % GROUP;
        for (int head = 2 * (blockIdx.x / C); lane < 32 && head < B * H;
             head += turn % 2 ? 2 * clusters - 1 : 1, turn++) {
            int second = turn % 2, j0 = first_key(second), b = head / H, h = head % H;
            if (turn > 1) barrier_wait(&s->own_free[second], turn / 2 - 1);
            if (lane == 0) {
                barrier_expect(&s->own_full[second], sizeof(s->own[0]));
                copy_tile(s->own[second][0][0], &k_map, 0, h, j0, b, &s->own_full[second]);
                copy_tile(s->own[second][1][0], &v_map, 0, h, j0, b, &s->own_full[second]);
            }
            for (int step = 0; step < steps_of(second); step++, begun++) {
                int slot = begun % SLOTS, r0 = first_row(second, step);
                if (begun >= SLOTS) barrier_wait(&s->free[slot], begun / SLOTS - 1);
                for (int r = lane; r < 128; r += 32) { // a row past the end has weights of 0
                    float2 known = {INFINITY, 0};
                    s->stats[slot][r] = r0 + r < T ? stats[(int64_t)head * T + r0 + r] : known;
                }
                if (lane) { barrier_arrive(&s->full[slot]); continue; }
                barrier_expect(&s->full[slot], sizeof(s->ring[slot]));
                copy_tile(s->ring[slot][0][0], &q_map, 0, h, r0, b, &s->full[slot]);
                copy_tile(s->ring[slot][1][0], &dout_map, 0, h, r0, b, &s->full[slot]);
            }
        }
    } else {
        KEEP_REGISTERS("inc", 232);
        int lane = threadIdx.x % 32, thread = threadIdx.x % GROUP, first = thread / 32 * 16 + lane / 4,
            received = 0, sent = 0;
        for (int head = 2 * (blockIdx.x / C); head < B * H; head += turn % 2 ? 2 * clusters - 1 : 1, turn++) {
            int second = turn % 2, j0 = first_key(second) + 64 * group, b = head / H, h = head % H,
                steps = steps_of(second);
            bf16 *own = s->own[second][0][64 * group], *own_v = s->own[second][1][64 * group];
            float k_sum[8][4], v_sum[8][4];
            for (int n = 0; n < 8; n++)
                for (int e = 0; e < 4; e++) k_sum[n][e] = v_sum[n][e] = 0;
            barrier_wait(&s->own_full[second], turn / 2);
            for (int step = 0; step < steps; step++, begun++) {
                int slot = begun % SLOTS, r0 = first_row(second, step);
                uint32_t dlogits[8][4];
                barrier_wait(&s->full[slot], begun / SLOTS);
                keys_step<64, 128>(v_sum, dlogits, own, own_v, s->ring[slot][0][0], s->ring[slot][1][0],
                                   s->stats[slot], j0 + first, r0, r0 < j0 + 63, scale, NULL);
                for (int n = 0; n < 16; n++)
                    for (int half = 0; half < 2; half++) {
                        int r = first + half * 8, i = (n % 8 ^ r % 8) * 8 + lane % 4 * 2;
                        *(uint32_t *)&s->dlogits[group][n / 8][r][i] = dlogits[n / 2][n % 2 * 2 + half];
                    }
                products_begin();
                product_plain<64, 128>(k_sum, dlogits, s->ring[slot][0][0]);
                products_commit();
                asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
                float sum[2][8][4] = {};
                if (group == 0 || (second ? rank < C - 1 : step > 0)) {
                    if (threadIdx.x == GROUP) barrier_expect(&s->sums_full[1], BYTES);
                    barrier_wait(&s->sums_full[group], received++);
                    for (int i = 0; i < 16; i++) *(float4 *)sum[i / 8][i % 8] = s->sums[group][i][thread];
                    __syncwarp();
                    if (lane == 0 && group == 0) barrier_arrive(&s->sums_free[0]);
                    if (lane == 0 && group == 1) barrier_arrive_at(&s->sums_free[1], rank + 1);
                }
                group_barrier(group);
                products_begin();
                for (int half = 0; half < 2; half++)
                    for (int k = 0; k < 4; k++)
                        tensor_product<64, 1, 1>(sum[half], operand(s->dlogits[group][half][k * 16]),
                                                 operand(own + k * 16 * ATOM), 1);
                products_commit();
                products_wait<0>();
                group_barrier(group); // nobody reads the gradients of the logits any more
                if (thread == 0) barrier_arrive(&s->free[slot]);
                if (group == 0 && (second ? step == rank : rank == 0)) {
                    for (int half = 0; half < 2; half++)
                        store_rows<64>(dq + ((int64_t)b * T + r0 + 64 * half) * ld + h * d, ld, sum[half],
                                       T - r0 - 64 * half, d, sigma, sigma, s->dlogits[0][half][0], 0);
                    continue;
                }
                if (sent) barrier_wait(&s->sums_free[1 - group], sent - 1);
                sent++;
                for (int i = 0; i < 16; i++) {
                    float4 four = *(float4 *)sum[i / 8][i % 8], *to = &s->sums[1 - group][i][thread];
                    if (group) *to = four;
                    else store_at(to, four, &s->sums_full[1], rank - 1);
                }
                __syncwarp();
                if (group && lane == 0) barrier_arrive(&s->sums_full[0]);
            }
            int64_t place = ((int64_t)b * T + j0) * ld + h * d;
            store_rows<64>(dk + place, ld, k_sum, T - j0, d, sigma, sigma, own, 0);
            store_rows<64>(dv + place, ld, v_sum, T - j0, d, 1, 1, own_v, 0);
            rows_stored(&s->own_free[second]);
        }
    }
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;"
                 :
                 :
                 : "memory"); // nobody needs this block's memory any more
#endif
}

static int in_ring(int T, int H, int G) { return gpu.clusters && T <= 1024 && H == G; }
static int in_ring(Shape shape) { return !plain && in_ring(shape.T, shape.H, shape.G); }
// How many clusters of C blocks the GPU takes at once.
template <typename K> static int clusters_at_once(K *kernel, int C, int bytes) {
    int most = 0;
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = launch_config(attributes, C, 3 * GROUP, bytes, gpu.stream, C, 1);
    allow_shared(kernel, bytes);
    if (cudaOccupancyMaxActiveClusters(&most, kernel, &config) == cudaSuccess) return most;
    cudaGetLastError();
    return 0;
}

template <int DH>
static void attention_tiles(bf16 *out, float *stats, const bf16 *q, const bf16 *k, const bf16 *v, int ld,
                            int B, int T, int H, int G, int d, int first, cudaStream_t stream) {
    typedef ForwardShared<DH> Shared;
    int64_t rows = T - first, all = (int64_t)T * ld;
    CUtensorMap q_map = tile_map(q, d, H, rows, ld, rows * ld, B, Shared::ROWS),
        k_map = tile_map(k, d, G, T, ld, all, B, TILE_KEYS),
        v_map = tile_map(v, d, G, T, ld, all, B, TILE_KEYS);
    allow_shared(attention_tile_kernel<DH>, sizeof(Shared));
    LAUNCH(attention_tile_kernel<DH>, gpu.processors, GROUP * (Shared::GROUPS + 1), sizeof(Shared), stream,
           q_map, k_map, v_map, out, (float2 *)stats, B, T, H, G, d, first, heads_at_once(B * H, T, DH),
           1.44269504f / sqrtf((float)d));
}

template <int DH>
static void attention_tiles_backward(bf16 *dq, bf16 *dk, bf16 *dv, const bf16 *dout, const bf16 *out,
                                     float2 *stats, const bf16 *q, const bf16 *k, const bf16 *v, int ld,
                                     int B, int T, int H, int G, int d, cudaStream_t stream) {
    typedef BackwardShared<DH> Shared;
    float sigma = 1 / sqrtf((float)d), scale = 1.44269504f * sigma;
    int64_t all = (int64_t)T * ld, D = (int64_t)H * d;
    CUtensorMap maps[2][4]; // q, dout, k, v: those that stay by 128 rows, those that walk by fewer
    for (int own = 0; own < 2; own++) {
        int rows = own ? 128 : Shared::WALK, keys = own ? Shared::WALK : 128;
        maps[own][0] = tile_map(q, d, H, T, ld, all, B, rows);
        maps[own][1] = tile_map(dout, d, H, T, D, T * D, B, rows);
        maps[own][2] = tile_map(k, d, G, T, ld, all, B, keys);
        maps[own][3] = tile_map(v, d, G, T, ld, all, B, keys);
    }
    allow_shared(attention_dq_kernel<DH>, sizeof(Shared));
    allow_shared(attention_dkv_kernel<DH>, sizeof(Shared));
    LAUNCH(attention_delta_kernel, (unsigned)(((int64_t)B * T * H + 31) / 32), 256, 0, stream, stats, dout,
           out, B, T, H, d);
    if (DH == 64 && in_ring(T, H, G)) {
        int C = (T + 127) / 128, bytes = sizeof(RingShared),
            most = clusters_at_once(attention_ring_kernel, C, bytes) - (gpu.spared + C - 1) / C;
        LAUNCH_AS(C, 1, attention_ring_kernel, C * min_int(most, (B * H + 1) / 2), 3 * GROUP, bytes, stream,
                  maps[0][0], maps[0][1], maps[0][2], maps[0][3], dq, dk, dv, stats, ld, B, T, H, d, scale,
                  sigma);
        return;
    }
    LAUNCH(attention_dq_kernel<DH>, gpu.processors, 3 * GROUP, sizeof(Shared), stream, maps[1][0], maps[1][1],
           maps[1][2], maps[1][3], dq, stats, ld, B, T, H, G, d, heads_at_once(B * H, T, DH), scale, sigma);
    LAUNCH(attention_dkv_kernel<DH>, gpu.processors, 3 * GROUP, sizeof(Shared), stream, maps[0][0],
           maps[0][1], maps[0][2], maps[0][3], dk, dv, stats, ld, B, T, H, G, d, heads_at_once(B * G, T, DH),
           scale, sigma);
}

// The same without Hopper: ampere.cuh
template <int DH>
static void attention_warps(bf16 *out, float *stats, const bf16 *q, const bf16 *k, const bf16 *v, Shape shape,
                            cudaStream_t stream);
template <int DH>
static void attention_warps_backward(bf16 *dq, bf16 *dk, bf16 *dv, const bf16 *dout, const bf16 *out,
                                     float2 *stats, const bf16 *q, const bf16 *k, const bf16 *v, Shape shape,
                                     cudaStream_t stream);

template <typename X>
static void attention_forward_fast(X *out, float *stats, const X *q, const X *k, const X *v, Shape shape,
                                   cudaStream_t stream) {
    if constexpr (sizeof(X) == sizeof(bf16)) {
        auto warps = shape.d <= 64 ? attention_warps<64> : attention_warps<128>;
        if (!gpu.hopper) return warps(out, stats, q, k, v, shape, stream);
        auto tiles = shape.d <= 64 ? attention_tiles<64> : attention_tiles<128>;
        tiles(out, stats, q, k, v, shape.ld, shape.B, shape.T, shape.H, shape.G, shape.d, shape.first,
              stream);
    }
}
template <typename X>
static void attention_backward_fast(X *dq, X *dk, X *dv, const X *dout, const X *out, float *stats,
                                    const X *q, const X *k, const X *v, Shape shape, cudaStream_t stream) {
    if constexpr (sizeof(X) == sizeof(bf16)) {
        auto warps = shape.d <= 64 ? attention_warps_backward<64> : attention_warps_backward<128>;
        if (!gpu.hopper) return warps(dq, dk, dv, dout, out, (float2 *)stats, q, k, v, shape, stream);
        auto tiles = shape.d <= 64 ? attention_tiles_backward<64> : attention_tiles_backward<128>;
        tiles(dq, dk, dv, dout, out, (float2 *)stats, q, k, v, shape.ld, shape.B, shape.T, shape.H, shape.G,
              shape.d, stream);
    }
}
