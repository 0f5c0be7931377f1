/* Packed weights, dense and sparse, times panels; and what is done to each number afterwards. */

#ifndef MTPRUNE_PACKED_H
#define MTPRUNE_PACKED_H

#include "panel.h"

#define LINES 64   /* outputs of a sparse product that are made together */
#define GROUP 192  /* inputs that they meet together: few enough for the nearest cache */
#define DENSE 6    /* outputs whose sums a dense product has in registers */
#define BUNDLES 8  /* so many times as many are made together */

typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* One weight [outputs, inputs], packed: dense or sparse.
 *
 * Dense: for each bundle of DENSE outputs, and each input, the weights of all of them.
 * Sparse: for each tile of LINES outputs and each GROUP of inputs a cell. A cell is lines, which are
 * parts of rows with anything in them; those with as many weights are neighbours, so that the
 * processor knows how long the next is. */
typedef struct {
    int64_t outputs, inputs;
    const float *bias;     /* [outputs] or NULL */
    const float *dense;    /* NULL for a sparse one */
    const int32_t *cell;   /* [cells + 1, 2]: where lines and weights of each begin */
    const uint8_t *line;   /* [lines, 2]: which output of the tile, and how many weights */
    const uint8_t *column; /* of each weight: which input of the group */
    const float *value;
    int64_t lines, weights;
} Product;

enum { RELU, GELU, GELU_TANH, ACTIVATIONS };

ALWAYS int64_t rounded(int64_t a, int64_t b) { return (a + b - 1) / b; }

ALWAYS vec chosen(ivec which, vec yes, vec no)
{
    return (vec)((which & (ivec)yes) | (~which & (ivec)no));
}

/* e^x for x up to 87; 0 where that is no normal number. */
ALWAYS vec exponential(vec x)
{
    const vec magic = 12582912.0f - (vec){0}; /* rounds, and its last places are the integer */
    const vec n = x * 1.44269504f + magic, whole = n - magic;
    const vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vec p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return chosen(x < -87.0f, (vec){0}, (vec)((bits)p + ((bits)n << 23)));
}

/* x times the normal distribution function. Up to 5.5 that is 1/2 + x p(u), where u is x^2 brought
 * to [-1, 1] and p the Chebyshev series, off by 1e-6 at most; beyond, it is 0 or 1. A division and an
 * exponential in its place would be another tenth of a sparse layer's time. */
ALWAYS vec gelu(vec x)
{
    static const float terms[] = {
        0.128551929f,    -0.0641725762f, 0.0477377959f,   -0.0387840296f,  0.0320672232f,
        -0.0261416062f,  0.0203848069f,  -0.0145603586f,  0.010164212f,    -0.00787819378f,
        0.00472356962f,  -0.00105177309f, 0.000639906503f, -0.00142804081f, 0.000656236647f,
    };
    enum { DEGREE = sizeof terms / sizeof *terms - 1 };
    const vec u = x * x * (2 / (5.5f * 5.5f)) - 1.0f;
    vec p = terms[DEGREE] - (vec){0};
#pragma GCC unroll 16
    for (int i = DEGREE - 1; i >= 0; i--)
        p = p * u + terms[i];
    const vec near = x * (0.5f + x * p), far = chosen(x > 0.0f, x, x * 0.0f);
    return chosen((u <= 1.0f) | (x != x), near, far);
}

ALWAYS vec gelu_tanh(vec x)
{
    vec twice = 1.59576912f * (x + 0.044715f * x * x * x);
    twice = chosen(twice > 80.0f, 80.0f - (vec){0}, twice);
    return x - x / (1.0f + exponential(twice));
}

static void activate(int64_t kind, float *x, int64_t count)
{
    for (int64_t i = 0; i < count; i += LANES) {
        vec *v = (vec *)(x + i);
        if (kind == RELU)
            *v = chosen(*v < 0.0f, (vec){0}, *v);
        else
            *v = kind == GELU ? gelu(*v) : gelu_tanh(*v);
    }
}

/* Products: out[row] += W[row] x, for the rows of a tile. */

ALWAYS void cell_times_panel(const uint8_t *line, const uint8_t *end, const uint8_t *column,
                             const float *value, const float *x, const int P, float *out)
{
    enum { MOST = SPAN / LANES };
    const int V = P / LANES;
    for (; line < end; line += 2) {
        vec *to = (vec *)(out + line[0] * P), sum[MOST];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++)
            sum[v] = to[v];
        int n = line[1];
        for (; n >= 4; n -= 4, column += 4, value += 4) {
            uint32_t four;
            memcpy(&four, column, 4); /* one read in place of four */
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const vec *from = (const vec *)(x + (four >> 8 * i & 255) * P);
                const vec weight = value[i] - (vec){0};
#pragma GCC unroll 16
                for (int v = 0; v < V; v++)
                    sum[v] += weight * from[v];
            }
        }
        for (; n; n--) {
            const vec *from = (const vec *)(x + *column++ * P);
            const vec weight = *value++ - (vec){0};
#pragma GCC unroll 16
            for (int v = 0; v < V; v++)
                sum[v] += weight * from[v];
        }
#pragma GCC unroll 16
        for (int v = 0; v < V; v++)
            to[v] = sum[v];
    }
}

/* Inputs [low, high): of the groups that they lie in, all that x has. */
ALWAYS void sparse_tile(const Product *w, int64_t tile, int64_t low, int64_t high, const float *x,
                        const int P, float *out)
{
    const int64_t groups = rounded(w->inputs, GROUP);
    for (int64_t g = low / GROUP; g < rounded(high, GROUP); g++) {
        const int32_t *cell = w->cell + 2 * (tile * groups + g);
        cell_times_panel(w->line + 2 * cell[0], w->line + 2 * cell[2], w->column + cell[1],
                         w->value + cell[1], x + g * GROUP * P, P, out);
    }
}

ALWAYS void bundle_times_panel(const float *weight, int64_t inputs, int64_t rows, const float *x,
                               const int P, const int V, float *out)
{
    vec sum[DENSE][4];
#pragma GCC unroll 8
    for (int r = 0; r < DENSE; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            sum[r][v] = (vec){0};
    for (int64_t i = 0; i < inputs; i++, weight += DENSE, x += P) {
#pragma GCC unroll 8
        for (int r = 0; r < DENSE; r++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++)
                sum[r][v] += weight[r] * ((const vec *)x)[v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < DENSE; r++)
        if (r < rows)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++)
                ((vec *)(out + r * P))[v] += sum[r][v];
}

ALWAYS void dense_tile(const Product *w, int64_t first, int64_t rows, const float *x, const int P,
                       float *out)
{
    const int V = P / LANES < (LANES == 16 ? 4 : 2) ? P / LANES : (LANES == 16 ? 4 : 2);
    for (int64_t r = 0; r < rows; r += DENSE)
        for (int c = 0; c < P; c += V * LANES)
            bundle_times_panel(w->dense + (first + r) * w->inputs, w->inputs, rows - r, x + c, P, V,
                               out + r * P + c);
}

ALWAYS int64_t tile_rows(const Product *w) { return w->dense ? DENSE * BUNDLES : LINES; }

enum { STORED, ADDED };

/* One tile of a product, which is stored, or added to what is there: `out` is the tile's. */
ALWAYS void tile_of(const Product *w, int64_t tile, int64_t low, int64_t high, const float *x,
                    const int P, float *out, int how, int64_t activation)
{
    const int64_t first = tile * tile_rows(w), rows = smaller(tile_rows(w), w->outputs - first);
    for (int64_t r = 0; r < rows; r++) {
        const vec bias = (w->bias ? w->bias[first + r] : 0.0f) - (vec){0};
        for (int v = 0; v < P / LANES; v++) {
            vec *to = (vec *)(out + r * P) + v;
            if (how == ADDED)
                *to += bias;
            else
                *to = bias;
        }
    }
    if (w->dense)
        dense_tile(w, first, rows, x, P, out);
    else
        sparse_tile(w, tile, low, high, x, P, out);
    if (activation >= 0)
        activate(activation, out, rows * P);
}

/* The same without the groups in which a sparse product has no input from [low, high). */
static void part_of_product(const Product *w, int64_t tile, int64_t low, int64_t high,
                            const float *x, int P, float *out, int how, int64_t activation)
{
    if (P == 16)
        tile_of(w, tile, low, high, x, 16, out, how, activation);
#if SPAN >= 32
    else if (P == 32)
        tile_of(w, tile, low, high, x, 32, out, how, activation);
#endif
#if SPAN >= 64
    else
        tile_of(w, tile, low, high, x, 64, out, how, activation);
#endif
}

static void tile_of_product(const Product *w, int64_t tile, const float *x, int P, float *out,
                            int how, int64_t activation)
{
    part_of_product(w, tile, 0, w->inputs, x, P, out, how, activation);
}

/* Whether the parts of a weight fit each other, and nothing outside of a panel is read. */
static int fits(const Product *w, int64_t outputs, int64_t inputs)
{
    if (w->outputs != outputs || w->inputs != inputs || outputs < 0 || inputs < 0)
        return 0;
    if (w->dense)
        return 1;
    const int64_t tiles = rounded(outputs, LINES), groups = rounded(inputs, GROUP);
    int fine = !w->cell[0] && !w->cell[1];
    for (int64_t c = 0; c < tiles * groups && fine; c++) {
        const int32_t *cell = w->cell + 2 * c;
        const int64_t rows = smaller(LINES, outputs - c / groups * LINES);
        const int64_t columns = smaller(GROUP, inputs - c % groups * GROUP);
        fine = cell[0] <= cell[2] && cell[2] <= w->lines && cell[1] <= cell[3] &&
               cell[3] <= w->weights;
        int64_t count = 0;
        for (int64_t i = cell[0]; i < cell[2] && fine; i++) {
            fine = w->line[2 * i] < rows;
            count += w->line[2 * i + 1];
        }
        fine = fine && count == cell[3] - cell[1];
        for (int64_t i = cell[1]; i < cell[3] && fine; i++)
            fine = w->column[i] < columns;
    }
    return fine;
}

#endif
