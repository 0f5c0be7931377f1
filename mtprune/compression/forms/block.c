/* A whole layer of a transformer encoder: projections, attention, feed-forward, norms and sums.
 *
 * Tokens are turned around once, into panels, and stay there: each product, dense or sparse, reads
 * panels and writes them, and so do attention, norms and activations, for which tokens side by side
 * are vectors. Whole sentences that fill a panel or more are a span. With more spans than threads,
 * each span is one thread's; with fewer, all threads share each step of a span.
 *
 * Each number is summed up in one order, whatever the number of threads. */

#include "packed.h"

#include <math.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define KEYS 4     /* keys, or numbers of a value, that a query meets together */
#define QUERIES (2 * LANES)

typedef struct {
    const float *weight, *bias; /* [width] or NULL */
    double eps;
} Norm;

typedef struct {
    int64_t width, heads, head, hidden; /* head: numbers of each head */
    int64_t norm_first, activation;
    Product project, out, up, down;
    Norm norm[2];
} Block;

/* The norm of LANES tokens, each of which is a column. */
static void normalize(const Norm *norm, int64_t width, const float *x, int P, float *y)
{
    enum { SUMS = 4 };
    vec sum[SUMS] = {{0}}, square[SUMS] = {{0}};
    for (int64_t i = 0; i < width; i++)
        sum[i % SUMS] += *(const vec *)(x + i * P);
    const vec mean = (sum[0] + sum[1] + sum[2] + sum[3]) / (float)width;
    for (int64_t i = 0; i < width; i++) {
        const vec off = *(const vec *)(x + i * P) - mean;
        square[i % SUMS] += off * off;
    }
    vec scale = (square[0] + square[1] + square[2] + square[3]) / (float)width + (float)norm->eps;
    for (int i = 0; i < LANES; i++)
        scale[i] = 1.0f / sqrtf(scale[i]);
    for (int64_t i = 0; i < width; i++) {
        vec out = (*(const vec *)(x + i * P) - mean) * scale;
        if (norm->weight)
            out *= norm->weight[i];
        if (norm->bias)
            out += norm->bias[i];
        *(vec *)(y + i * P) = out;
    }
}

/* Attention of one head in one sentence. */

/* Tokens side by side in one panel, from a token of a span on. */
typedef struct {
    int64_t panel, column, count;
} Part;

ALWAYS Part part_of(int64_t token, int64_t end, int64_t most, int P)
{
    const int64_t column = token % P;
    return (Part){token / P, column, smaller(smaller(P - column, end - token), most)};
}

/* scores[key] = scale * k[key] . q + mask[key], for QUERIES queries side by side and `count` keys. */
ALWAYS void score(const float *q, const float *k, int P, int64_t head, int count, float scale,
                  const float *mask, float *scores)
{
    vec sum[KEYS][2];
#pragma GCC unroll 4
    for (int j = 0; j < count; j++)
        sum[j][0] = sum[j][1] = (vec){0};
    for (int64_t d = 0; d < head; d++, q += P, k += P) {
        const vec q0 = *(const vec *)q, q1 = *(const vec *)(q + LANES);
#pragma GCC unroll 4
        for (int j = 0; j < count; j++) {
            sum[j][0] += k[j] * q0;
            sum[j][1] += k[j] * q1;
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < count; j++) {
        const float more = mask ? mask[j] : 0.0f;
        *(vec *)(scores + j * QUERIES) = sum[j][0] * scale + more;
        *(vec *)(scores + j * QUERIES + LANES) = sum[j][1] * scale + more;
    }
}

/* Scores of `count` keys become weights, but for their sum, whose inverse is returned. A query that
 * no key is shown to gets nothing, as in torch. */
ALWAYS void soften(float *scores, int64_t count, vec inverse[2])
{
    for (int h = 0; h < 2; h++, scores += LANES) {
        vec most = -INFINITY - (vec){0}, sum = {0};
        for (int64_t j = 0; j < count; j++) {
            const vec s = *(const vec *)(scores + j * QUERIES);
            most = chosen(s > most, s, most);
        }
        const vec nothing = {0}, base = chosen(most > -INFINITY, most, nothing);
        for (int64_t j = 0; j < count; j++) {
            vec *s = (vec *)(scores + j * QUERIES);
            *s = exponential(*s - base);
            sum += *s;
        }
        /* Where sums are no numbers, neither are outputs. */
        inverse[h] = chosen((most > -INFINITY) | (sum != sum), 1.0f / sum, nothing);
    }
}

/* sum[r] += v[r] . weights, for `rows` numbers of the values. */
ALWAYS void mix(const float *v, int P, int rows, const float *weights, int64_t count,
                vec sum[KEYS][2])
{
    for (int64_t j = 0; j < count; j++, weights += QUERIES) {
        const vec w0 = *(const vec *)weights, w1 = *(const vec *)(weights + LANES);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            sum[r][0] += v[r * P + j] * w0;
            sum[r][1] += v[r * P + j] * w1;
        }
    }
}

/* Numbers of the heads' outputs, for queries in one part. */
ALWAYS void mixed(const float *v, int64_t pitch, int P, int rows, const float *scores, int64_t from,
                  int64_t end, const vec inverse[2], Part query, float *out)
{
    vec sum[KEYS][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        sum[r][0] = sum[r][1] = (vec){0};
    for (int64_t key = from; key < end;) {
        const Part part = part_of(key, end, P, P);
        mix(v + part.panel * pitch + part.column, P, rows, scores + (key - from) * QUERIES,
            part.count, sum);
        key += part.count;
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        const vec both[2] = {sum[r][0] * inverse[0], sum[r][1] * inverse[1]};
        memcpy(out + r * P, both, sizeof(float) * (size_t)query.count);
    }
}

/* Tokens [from, end) of a span, which are one sentence. In `states`, whose panels are `pitch` apart,
 * are queries, keys, values, and then, to be written, what comes of them. */
static void attend(const Block *b, int64_t head, float *states, int64_t pitch, int P, int64_t from,
                   int64_t end, const float *mask, float *scores)
{
    const int64_t all = b->heads * b->head * P;
    const float *q = states + head * b->head * P, *k = q + all, *v = k + all;
    float *out = states + 3 * all + head * b->head * P;
    const float scale = 1.0f / sqrtf((float)b->head);
    for (int64_t query = from; query < end;) {
        const Part part = part_of(query, end, QUERIES, P);
        const float *mine = q + part.panel * pitch + part.column;
        for (int64_t key = from; key < end;) {
            const Part keys = part_of(key, end, KEYS, P);
            const float *theirs = k + keys.panel * pitch + keys.column;
            const float *hidden = mask ? mask + key - from : NULL;
            float *to = scores + (key - from) * QUERIES;
            if (keys.count == KEYS)
                score(mine, theirs, P, b->head, KEYS, scale, hidden, to);
            else
                for (int64_t j = 0; j < keys.count; j++)
                    score(mine, theirs + j, P, b->head, 1, scale, hidden ? hidden + j : NULL,
                          to + j * QUERIES);
            key += keys.count;
        }
        vec inverse[2];
        soften(scores, end - from, inverse);
        float *to = out + part.panel * pitch + part.column;
        int64_t d = 0;
        for (; d + KEYS <= b->head; d += KEYS)
            mixed(v + d * P, pitch, P, KEYS, scores, from, end, inverse, part, to + d * P);
        for (; d < b->head; d++)
            mixed(v + d * P, pitch, P, 1, scores, from, end, inverse, part, to + d * P);
        query += part.count;
    }
}

/* The layer. */

typedef struct {
    int64_t sentences, length, tokens, panels;
    int P;
} Span;

/* Who does a step: one of some threads that share it. */
typedef struct {
    int64_t member, members;
} Share;

ALWAYS void finish_step(Share s)
{
    if (s.members > 1) {
#pragma omp barrier
    }
}

static void product_step(const Product *w, const Span *s, const float *x, int64_t from_pitch,
                         float *y, int64_t to_pitch, int how, int64_t activation, Share share)
{
    const int64_t tiles = rounded(w->outputs, tile_rows(w));
    for (int64_t i = share.member; i < s->panels * tiles; i += share.members)
        tile_of_product(w, i % tiles, x + i / tiles * from_pitch, s->P,
                        y + i / tiles * to_pitch + i % tiles * tile_rows(w) * s->P, how,
                        activation);
    finish_step(share);
}

static void norm_step(const Norm *norm, int64_t width, const Span *s, const float *x, float *y,
                      Share share)
{
    const int64_t each = s->P / LANES;
    for (int64_t i = share.member; i < s->panels * each; i += share.members) {
        const int64_t at = i / each * width * s->P + i % each * LANES;
        normalize(norm, width, x + at, s->P, y + at);
    }
    finish_step(share);
}

/* Rows of `states`: queries, keys, values and heads' outputs, or hidden numbers. */
ALWAYS int64_t state_rows(const Block *b) { return larger(4 * b->heads * b->head, b->hidden); }

/* The tokens of one span, from x to y. */
static void run_span(const Block *b, const Span *s, const float *x, const float *mask, float *y,
                     float *sums, float *normed, float *states, float *scores, Share share)
{
    const int P = s->P;
    const int64_t width = b->width, pitch = width * P, wide = state_rows(b) * P;
    const int64_t bands = rounded(width, TILE);
    for (int64_t i = share.member; i < s->panels * bands; i += share.members) {
        const int64_t token = i / bands * P, count = smaller(P, s->tokens - token);
        const int64_t first = i % bands * TILE, rows = smaller(TILE, width - first);
        float *to = sums + i / bands * pitch + first * P;
        if (count < P)
            memset(to, 0, sizeof(float) * (size_t)(rows * P));
        turn(x + token * width + first, count, rows, width, to, P);
    }
    finish_step(share);
    const float *in = sums;
    if (b->norm_first) {
        norm_step(&b->norm[0], width, s, sums, normed, share);
        in = normed;
    }
    product_step(&b->project, s, in, pitch, states, wide, STORED, -1, share);
    for (int64_t i = share.member; i < s->sentences * b->heads; i += share.members) {
        const int64_t from = i / b->heads * s->length;
        attend(b, i % b->heads, states, wide, P, from, from + s->length,
               mask ? mask + from : NULL, scores);
    }
    finish_step(share);
    product_step(&b->out, s, states + 3 * b->heads * b->head * P, wide, sums, pitch, ADDED, -1,
                 share);
    if (b->norm_first)
        norm_step(&b->norm[1], width, s, sums, normed, share);
    else
        norm_step(&b->norm[0], width, s, sums, sums, share);
    product_step(&b->up, s, in, pitch, states, wide, STORED, b->activation, share);
    product_step(&b->down, s, states, wide, sums, pitch, ADDED, -1, share);
    if (!b->norm_first)
        norm_step(&b->norm[1], width, s, sums, sums, share);
    for (int64_t i = share.member; i < s->panels * bands; i += share.members) {
        const int64_t token = i / bands * P, count = smaller(P, s->tokens - token);
        const int64_t first = i % bands * TILE, rows = smaller(TILE, width - first);
        turn(sums + i / bands * pitch + first * P, rows, count, P, y + token * width + first,
             width);
    }
    finish_step(share);
}

/* So many sentences of a length as a span. */
static Span span_of(int64_t sentences, int64_t length)
{
    const int64_t tokens = sentences * length;
    Span s = {sentences, length, tokens, 0, panel_width(tokens)};
    s.panels = rounded(s.tokens, s.P);
    return s;
}

static int run(const Block *b, int64_t sentences, int64_t each, int64_t length, const float *x,
                const float *mask, float *y, int threads)
{
    const Span most = span_of(each, length);
    const int64_t spans = rounded(sentences, each), rows = 2 * b->width + state_rows(b);
    const int64_t states = most.panels * most.P * rows + QUERIES;
    const int alone = spans >= threads;
    float *shared = alone ? NULL : scratch(states);
    if (!alone && !shared)
        return 1;
    int lacking = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Share whole = {0, 1};
#ifdef _OPENMP
        whole = (Share){omp_get_thread_num(), omp_get_num_threads()};
#endif
        float *scores = scratch(length * QUERIES), *own = alone ? scratch(states) : shared;
        if (!scores || !own)
#pragma omp atomic write
            lacking = 1;
#pragma omp barrier
        const Share share = alone ? (Share){0, 1} : whole;
        for (int64_t i = alone ? whole.member : 0; i < spans && !lacking;
             i += alone ? whole.members : 1) {
            const int64_t first = i * each, from = first * length * b->width;
            const Span s = span_of(smaller(each, sentences - first), length);
            float *sums = own, *normed = sums + s.panels * s.P * b->width;
            run_span(b, &s, x + from, mask ? mask + first * length : NULL, y + from, sums, normed,
                     normed + s.panels * s.P * b->width, scores, share);
        }
        free(scores);
        if (alone)
            free(own);
    }
    free(shared);
    return lacking;
}

/* What is called from outside. */

/* Whether the parts of a block fit each other: 0, or 2 if they do not. What fits is run without
 * looking again. */
int mtprune_block_check(const Block *b)
{
    const int64_t most = INT32_MAX / 4;
    if (b->width < 1 || b->heads < 0 || b->head < 1 || b->hidden < 0 || b->width > most ||
        b->heads > most || b->head > most || b->heads * b->head > most || b->hidden > most ||
        b->activation < 0 || b->activation >= ACTIVATIONS)
        return 2;
    const int64_t inner = b->heads * b->head;
    return fits(&b->project, 3 * inner, b->width) && fits(&b->out, b->width, inner) &&
                   fits(&b->up, b->hidden, b->width) && fits(&b->down, b->width, b->hidden)
               ? 0
               : 2;
}

/* x and y: [sentences, length, width]; mask: [sentences, length], added to the scores of keys, or
 * NULL. Returns 0, or 1 if memory ran out. */
int mtprune_block(const Block *b, const float *x, const float *mask, int64_t sentences,
                  int64_t length, float *y, int32_t threads)
{
    if (sentences < 1 || length < 1)
        return 0;
    /* Short sentences share a panel, as long as each thread has one. */
    int64_t each = larger(1, SPAN / length);
    each = smaller(each, larger(1, sentences / threads));
    return run(b, sentences, each, length, x, mask, y, threads);
}
