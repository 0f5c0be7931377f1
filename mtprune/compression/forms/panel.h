/* Panels: what the products of this folder share.
 *
 * A panel is P columns (tokens or pixels) side by side for each row (an input or an output), so that
 * one weight meets P neighbouring numbers, which are vectors. */

#ifndef MTPRUNE_PANEL_H
#define MTPRUNE_PANEL_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define ALWAYS static inline __attribute__((always_inline))
#define SPAN (LANES >= 8 ? 64 : 16) /* columns of the widest panel */
#define TILE 16   /* outputs that are turned around together */
#define CHUNK 32  /* channels that are packed together */

ALWAYS int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
ALWAYS int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* The narrowest panel for so many columns, or the widest. */
ALWAYS int panel_width(int64_t columns)
{
    return (int)smaller(columns <= 16 ? 16 : columns <= 32 ? 32 : 64, SPAN);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE __builtin_shufflevector
#endif
#endif

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

/* out[c * out_pitch + r] = in[r * in_pitch + c], for a tile of 16 x 16. */
ALWAYS void turn_tile(const float *in, int64_t in_pitch, float *out, int64_t out_pitch)
{
#if defined(SHUFFLE) && LANES == 16
    typedef float eight __attribute__((vector_size(32)));
    for (int c = 0; c < 16; c += 4) {
        vec part[4]; /* four columns of rows r, 4 + r, 8 + r and 12 + r */
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const float *from = in + r * in_pitch + c;
            const four a = *(const four *)from, b = *(const four *)(from + 4 * in_pitch);
            const four d = *(const four *)(from + 8 * in_pitch);
            const four e = *(const four *)(from + 12 * in_pitch);
            const eight ab = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
            const eight de = SHUFFLE(d, e, 0, 1, 2, 3, 4, 5, 6, 7);
            part[r] = SHUFFLE(ab, de, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        }
#define EACH(a, b, i, j, k, l)                                                                     \
    SHUFFLE(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, l + 8, i + 12,      \
            j + 12, k + 12, l + 12)
        const vec low01 = EACH(part[0], part[1], 0, 16, 1, 17);
        const vec low23 = EACH(part[2], part[3], 0, 16, 1, 17);
        const vec high01 = EACH(part[0], part[1], 2, 18, 3, 19);
        const vec high23 = EACH(part[2], part[3], 2, 18, 3, 19);
        *(vec *)(out + (c + 0) * out_pitch) = EACH(low01, low23, 0, 1, 16, 17);
        *(vec *)(out + (c + 1) * out_pitch) = EACH(low01, low23, 2, 3, 18, 19);
        *(vec *)(out + (c + 2) * out_pitch) = EACH(high01, high23, 0, 1, 16, 17);
        *(vec *)(out + (c + 3) * out_pitch) = EACH(high01, high23, 2, 3, 18, 19);
#undef EACH
    }
#elif defined(SHUFFLE)
    for (int r = 0; r < 16; r += 4)
        for (int c = 0; c < 16; c += 4) {
            const float *from = in + r * in_pitch + c;
            const four a = *(const four *)from, b = *(const four *)(from + in_pitch);
            const four d = *(const four *)(from + 2 * in_pitch);
            const four e = *(const four *)(from + 3 * in_pitch);
            const four low0 = SHUFFLE(a, b, 0, 4, 1, 5), low1 = SHUFFLE(d, e, 0, 4, 1, 5);
            const four high0 = SHUFFLE(a, b, 2, 6, 3, 7), high1 = SHUFFLE(d, e, 2, 6, 3, 7);
            float *to = out + c * out_pitch + r;
            *(four *)to = SHUFFLE(low0, low1, 0, 1, 4, 5);
            *(four *)(to + out_pitch) = SHUFFLE(low0, low1, 2, 3, 6, 7);
            *(four *)(to + 2 * out_pitch) = SHUFFLE(high0, high1, 0, 1, 4, 5);
            *(four *)(to + 3 * out_pitch) = SHUFFLE(high0, high1, 2, 3, 6, 7);
        }
#else
    for (int r = 0; r < 16; r++)
        for (int c = 0; c < 16; c++)
            out[c * out_pitch + r] = in[r * in_pitch + c];
#endif
}

/* out[c * out_pitch + r] = in[r * in_pitch + c] */
static inline void turn(const float *in, int64_t rows, int64_t columns, int64_t in_pitch, float *out,
                 int64_t out_pitch)
{
    int64_t r = 0;
    for (; r + 16 <= rows; r += 16) {
        int64_t c = 0;
        for (; c + 16 <= columns; c += 16)
            turn_tile(in + r * in_pitch + c, in_pitch, out + c * out_pitch + r, out_pitch);
        for (; c < columns; c++)
            for (int64_t i = r; i < r + 16; i++)
                out[c * out_pitch + i] = in[i * in_pitch + c];
    }
    for (; r < rows; r++)
        for (int64_t c = 0; c < columns; c++)
            out[c * out_pitch + r] = in[r * in_pitch + c];
}

static inline float *scratch(int64_t floats)
{
    void *memory = NULL;
    return posix_memalign(&memory, 64, sizeof(float) * (size_t)(floats > 0 ? floats : 1)) ? NULL
                                                                                         : memory;
}

#endif
